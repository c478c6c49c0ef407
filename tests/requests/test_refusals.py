"""Refusals in the panel name its controls, in the API its fields."""

from __future__ import annotations

import re

import pytest

from lib_fusion.errors import CheckpointError, FusionError, SettingError
from lib_fusion.requests.infotext import list_fields
from lib_fusion.requests.refusals import HOST_CONTROLS, controls, in_panels_words
from lib_fusion.requests.settings import HOST_OPTIONS
from tests.messages import OF_REQUESTS, errors_of

#: Fields that only the API and the command line can get wrong, and the training tab, which has labels of its own.
NOT_OF_THE_PANEL = {"args", "settings", "prompt", "previews", "FreeU factors", "models", "LoRA"}
LABELS = {label for field in list_fields() for label in field.labels} | {row.label for row in HOST_OPTIONS.values()}


def test_every_refusal_of_a_request_names_a_control() -> None:
    """Each field that an error in the code names has a label, and each label is one that the page has."""
    known, found = controls(), set()
    for message in errors_of(*OF_REQUESTS):
        if message.kind == "SettingError" and message.arguments:
            found |= {re.sub(r"\{\d\}", "0", field) for field in message.arguments[0] if not field.startswith("{")}
    assert {"afa_aggregator", "experts[0].place", "freeu", "passes"} <= found
    assert found - set(known) - NOT_OF_THE_PANEL - {"experts", "experts[0].0"} == set()  # which remedies and rows have
    parts = {part for label in known.values() for part in label.split(" or ")}
    assert parts <= LABELS | set(HOST_CONTROLS.values()) | {f"Expert {i}" for i in (1, 2, 3)} | {
        *(f"Expert {i} mask" for i in (1, 2, 3)), "Fusion preset", "Compare"}  # fmt: skip


@pytest.mark.parametrize(
    ("error", "told"),
    [(SettingError("snb_hold", -5, "allowed: a number"), "Denoiser Fusion, Mask decided until timestep: -5 is not"),
     (SettingError("experts[1].window", [3, 7], "allowed: x"),
      "Denoiser Fusion, Expert 2 starting timestep or Expert 2 ending timestep: [3, 7] is not allowed; allowed: x"),
     (SettingError("freeu_stop", 3, "allowed with freeu_start 5 in 9 steps: no less"),
      "Denoiser Fusion, FreeU ending step: 3 is not allowed; allowed with FreeU starting step 5 in 9 steps: no less"),
     (SettingError("afa_aggregator", "", "allowed: an aggregator, or afa_maps uniform"),
      "Denoiser Fusion: choose an Aggregator in the AFA tab, or uniform under AFA maps"),
     (SettingError("afa_aggregator", "x", "allowed: afa_maps uniform, or afa_force"),
      "Denoiser Fusion, Aggregator: 'x' is not allowed; allowed: AFA maps uniform, or Force aggregator"),
     (SettingError("compare", True, "allowed: false"), "Denoiser Fusion: choose None under Script to compare"),
     (SettingError("experts", [], "allowed: 1"), "Denoiser Fusion: choose a checkpoint under Expert 1, switch on"),
     (SettingError("base checkpoint", "x", "it is SSD-1B"), "Denoiser Fusion, Stable Diffusion checkpoint: 'x' is not"),
     (CheckpointError("/m/b.safetensors: no such file"), "Denoiser Fusion, Expert 2 checkpoint: /m/b.safetensors: no"),
     (FusionError("AFA could not act"), "Denoiser Fusion: AFA could not act"),
     (FusionError("Denoiser Fusion was taken off"), "Denoiser Fusion was taken off")],
)  # fmt: skip
def test_words_of_the_panel(error: FusionError, told: str) -> None:
    assert in_panels_words(error, ["a.safetensors", "b.safetensors"]).startswith(told)
