"""Which models an aggregator file takes, by their checkpoints and LoRAs, without a host."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lib_fusion.errors import FusionError, SettingError
from lib_fusion.fusion.aggregator_files import Card, ModelIdentity, identify_model
from lib_fusion.fusion.lockstep import sizes_for
from lib_fusion.requests.settings import ExpertSettings, FusionSettings
from lib_fusion.unet.model import load_unet
from lib_fusion.unet.model_file import LoraFile
from tests.training.conftest import DEMO
from tests.webui_fake import fakes

GENERAL = DEMO / "general.safetensors"
ANIMALS, VEHICLES = (DEMO / f"loras/demo-{name}.safetensors" for name in ("animals", "vehicles"))


@pytest.fixture
def aggregators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module under test; the host's list has the demo's LoRAs, a LoHa, and the animals' under another name."""
    fakes.install(monkeypatch)
    save_file({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, tmp_path / "loha.safetensors")
    files = {"demo-animals": ANIMALS, "demo-vehicles": VEHICLES, "loha": tmp_path / "loha.safetensors", "zoo": ANIMALS}
    networks = ModuleType("networks")
    networks.loaded_networks, networks.forbidden_network_aliases = [], {}
    networks.update_available_networks_by_names = lambda names: None
    networks.available_networks = networks.available_network_aliases = {
        name: SimpleNamespace(filename=str(file)) for name, file in files.items()
    }
    monkeypatch.setitem(sys.modules, "networks", networks)
    from lib_fusion.webui.models import aggregators

    return aggregators


def card_of(*models: str) -> Card:
    return Card("sd1", "epsilon", sizes_for(load_unet(GENERAL), len(models), 4, 1, 1),
                tuple(identify_model(f"{GENERAL}{loras}") for loras in models))  # fmt: skip


def identified(aggregators: Any, card: Card, prompt: str, picture: tuple[LoraFile, ...] = (), loras: bool = False,
               force: bool = False) -> list[ModelIdentity]:  # fmt: skip
    """The base under the picture's LoRAs, and one expert with a prompt, as the host draws with them."""
    experts = (ExpertSettings("same as base", prompt=prompt, loras=loras),)
    settings = FusionSettings(experts=experts, method="AFA", afa_aggregator="x", afa_force=force)
    own = [LoraFile(Path(call.file), call.unet) for call in aggregators.find_loras(prompt, "prompt")[1]]
    given = [aggregators.AfaModel(str(GENERAL), picture),
             aggregators.AfaModel(str(GENERAL), (*(picture if loras else ()), *own))]  # fmt: skip
    return aggregators.identify_all(card, settings, given)


@pytest.mark.parametrize(
    "prompt", ["<lora:demo-animals:0.5>", "a cat <lora:zoo:0.5>", "<lora:demo-animals:1:0.5>", "<lora:zoo:unet=0.5>"]
)
def test_the_loras_and_weights_for_the_unet_decide(aggregators: Any, prompt: str) -> None:
    card = card_of("", f"+{ANIMALS}:0.5")
    card.check_models(identified(aggregators, card, prompt))


def test_loras_of_the_picture_count_where_they_are_needed(aggregators: Any) -> None:
    style, needed = LoraFile(VEHICLES, 0.3), LoraFile(ANIMALS)
    card = card_of(f"+{ANIMALS}", f"+{ANIMALS}+{VEHICLES}:2")
    own = "<lora:demo-vehicles:2> <lora:demo-animals:1>"
    for picture in ((needed,), (style, needed), (needed, style)):
        card.check_models(identified(aggregators, card, own, picture))
    card.check_models(identified(aggregators, card, "<lora:demo-vehicles:2>", (needed,), loras=True))
    with pytest.raises(FusionError, match="in the place of"):
        card.check_models(identified(aggregators, card, "<lora:demo-vehicles:2>", (needed,)))
    plain = card_of("", "")
    for loras in (False, True):
        plain.check_models(identified(aggregators, plain, "a cat", (style,), loras))


@pytest.mark.parametrize(
    ("models", "prompt", "picture", "remedies"),
    [
        (("", f"+{ANIMALS}"), "a cat", (), ["write <lora:demo-animals:1> into expert 1's prompt"]),
        (("", f"+{ANIMALS}"), "<lora:zoo:0.9>", (), ["write <lora:demo-animals:1> into expert 1's prompt"]),
        (("", f"+{ANIMALS}"), "<lora:zoo:1> <lora:demo-vehicles:1>", (),
         ["write <lora:demo-animals:1> into expert 1's prompt"]),
        (("", ""), "<lora:zoo:1>", (), ["take the LoRAs out of expert 1's prompt"]),
        ((f"+{ANIMALS}", ""), "a cat", (), ["write <lora:demo-animals:1> into the picture's prompt"]),
        ((f"+{ANIMALS}", ""), "a cat", (LoraFile(ANIMALS, 0.9),),
         ["write <lora:demo-animals:1> into the picture's prompt"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_the_remedy(
    aggregators: Any, models: tuple[str, ...], prompt: str, picture: tuple[LoraFile, ...], remedies: list[str]
) -> None:
    card = card_of(*models)
    found = identified(aggregators, card, prompt, picture)
    with pytest.raises(FusionError, match="in the place of"):
        card.check_models(found)
    assert aggregators.tell_loras(card, found) == remedies


@pytest.mark.parametrize(
    ("prompt", "problem"), [("<lora:loha:1>", "this is LoHa"), ("<lora:zoo:1:1:4>", "cut to a rank")]
)
def test_loras_that_cannot_be_known_are_refused_unless_by_force(aggregators: Any, prompt: str, problem: str) -> None:
    card = card_of("", f"+{ANIMALS}")
    with pytest.raises(SettingError, match=problem) as caught:
        identified(aggregators, card, prompt)
    assert caught.value.field == "experts[0].prompt"
    card.check_models(identified(aggregators, card, prompt, force=True), force=True)


def test_the_files_of_a_card(aggregators: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card = card_of(f"+{VEHICLES}:0.5", f"+{ANIMALS}+{VEHICLES}:-1", "")
    info = SimpleNamespace(name="sub/general.safetensors", filename=str(GENERAL))
    monkeypatch.setattr(aggregators, "list_infos", lambda: [info])
    monkeypatch.setattr(aggregators, "card_of", lambda name: card)
    prompt = "<lora:demo-animals:1> <lora:demo-vehicles:-1>"
    assert aggregators.experts_of(card) == [ExpertSettings(info.name, prompt=prompt), ExpertSettings(info.name)]
    assert aggregators.implied_by("x") == {
        "method": "AFA", "expert1_checkpoint": info.name, "expert1_prompt": prompt, "expert2_checkpoint": info.name,
        "expert3_checkpoint": "None",
    }  # fmt: skip
    assert aggregators.describe("x").endswith(". Write <lora:demo-vehicles:0.5> into the picture's prompt.")
    gone = replace(card, models=(card.models[0], replace(card.models[1], loras=("demo-anima:1",))))
    with pytest.raises(SettingError, match=r"afa_aggregator: .*no such LoRA; near it: demo-animals"):
        aggregators.experts_of(gone)
