"""Forge's side without Forge: conditions are numbered, cut to pictures, and each row is answered once."""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lib_fusion.errors import SettingError
from lib_fusion.fusion.level import Schedule
from lib_fusion.fusion.rows import Rows
from lib_fusion.fusion.session import FusionSession
from lib_fusion.requests.settings import ExpertSettings, FusionSettings
from tests.webui_fake import fakes

SIGMA = 2.0


class Condition:
    def __init__(self, cond: torch.Tensor) -> None:
        self.cond = cond


def calc_cond_uncond_batch(model: Any, cond: list, uncond: list | None, x: Any, sigma: Any, options: dict) -> None:
    """As the backend calls a model: the last condition first, here each by itself and then the rest together."""
    items = [(item, 0) for item in cond] + [(item, 1) for item in uncond or []]
    for group in ([items[-1]], items[-2::-1]):
        own = [item["model_conds"] for item, _ in group]
        if not own:
            continue
        call = {"text": torch.cat([given["text"].cond for given in own]),
                "fusion_part": own[0]["fusion_part"].concat([given["fusion_part"] for given in own[1:]])}  # fmt: skip
        given = {"input": torch.cat([x] * len(group)), "timestep": torch.cat([sigma] * len(group)), "c": call,
                 "cond_or_uncond": [which for _, which in group]}  # fmt: skip
        options["model_function_wrapper"](model.apply_model, given)


class Model:
    """Its denoised latents are the text's number, in all positions; it keeps the numbers of rows of its calls."""

    def __init__(self, shift: float = 0.0) -> None:
        self.shift, self.calls = shift, []

    def apply_model(self, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(x))
        return (text + self.shift).view(-1, 1, 1, 1).expand_as(x).clone()


@pytest.fixture
def forge(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    fakes.install(monkeypatch)
    named = {"backend": {}, "backend.sampling": {},
             "backend.sampling.condition": {"Condition": Condition, "ConditionCrossAttn": Condition,
                                            "compile_conditions": None, "compile_weighted_conditions": None},
             "backend.sampling.sampling_function": {"calc_cond_uncond_batch": calc_cond_uncond_batch},
             "backend.memory_management": {}, "backend.args": {"dynamic_args": {}},
             "backend.loader": {"forge_loader": None}}  # fmt: skip
    for name, contents in named.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    from lib_fusion.webui.forge import conditions, engines, host_step

    return SimpleNamespace(Parts=conditions.Parts, HostStep=host_step.HostStep, check_base=engines.check_base)


def parts_of(forge: SimpleNamespace, *texts: list[float], uncond: bool = True) -> Any:
    """Conditions for two pictures: of each AND part, and without the prompt."""
    items = [{"model_conds": {"text": Condition(torch.tensor(text))}, "strength": 1.0} for text in texts]
    return forge.Parts(items[:-1] if uncond else items, items[-1:] if uncond else None)


def a_pass(*models: Model, **settings: Any) -> Any:
    experts = tuple(ExpertSettings(f"{i}.safetensors") for i in range(1, len(models)))
    session = FusionSession(FusionSettings(experts=experts, **settings), guidance_scale=5.0)
    session.schedule = Schedule([SIGMA, 1.0, 0.0])
    return SimpleNamespace(
        session=session, models=models, experts=experts, conditionings=[None] * len(experts), rows_of=Rows,
        is_sigma_scaled=True, check_finite=lambda: None, timestep_of=lambda sigma: torch.full_like(sigma, 500.0),
        denoiser=SimpleNamespace(step=0),
    )  # fmt: skip


def step_of(forge: SimpleNamespace, fusion: Any, parts: Any, options: dict | None = None) -> Any:
    step = forge.HostStep(fusion, parts, torch.zeros(2, 4, 3, 3), torch.full((2,), SIGMA), options or {})
    step.run()
    return step


def ask(step: Any, *parts: int) -> list[float]:
    """The host's call of its model for some parts; the number in each row."""
    given = {"input": torch.zeros(2 * len(parts), 4, 3, 3), "timestep": None, "c": {"fusion_part": list(parts)}}
    return step.answer(lambda *_, **__: torch.zeros(2 * len(parts), 1, 1, 1), given).flatten(1)[:, 0].tolist()


def test_rows_come_back_to_their_parts(forge: SimpleNamespace) -> None:
    """Two AND parts and the unconditional one, in whatever order the host batches and asks."""
    base = Model()
    step = step_of(forge, a_pass(base), parts_of(forge, [1, 2], [3, 4], [5, 6]))
    assert base.calls == [2, 4]
    assert ask(step, 2, 0) == [5, 6, 1, 2]
    assert not step.is_over
    assert ask(step, 1) == [3, 4]
    assert step.is_over


def test_a_part_is_answered_once(forge: SimpleNamespace) -> None:
    """Later calls are those of other extensions, which get the model itself."""
    step = step_of(forge, a_pass(Model()), parts_of(forge, [1, 2], [5, 6]))
    assert ask(step, 1, 0) == [5, 6, 1, 2]
    assert ask(step, 0) == [0, 0]
    without_marks = {"input": torch.zeros(2, 4, 3, 3), "timestep": None, "c": {"text": torch.ones(2)}}
    assert step.answer(lambda *_, text: text + 1, without_marks).tolist() == [2, 2]


def test_models_are_averaged(forge: SimpleNamespace) -> None:
    step = step_of(forge, a_pass(Model(), Model(shift=2), method="Average"), parts_of(forge, [1, 2], [5, 6]))
    assert ask(step, 0, 1) == [2, 3, 6, 7]


def test_a_wrapper_of_another_extension_is_around_each_call(forge: SimpleNamespace) -> None:
    seen: list[int] = []

    def wrapper(apply: Any, given: dict) -> torch.Tensor:
        seen.append(len(given["input"]))
        assert "fusion_part" not in given["c"]
        return apply(given["input"], given["timestep"], **given["c"]) + 10

    options = {"model_function_wrapper": wrapper}
    step = step_of(forge, a_pass(Model()), parts_of(forge, [1, 2], [5, 6]), options)
    assert seen == [2, 2]
    assert ask(step, 0) == [11, 12]


def test_some_pictures_without_the_unconditional_half(forge: SimpleNamespace) -> None:
    marked = parts_of(forge, [1, 2], [3, 4], [5, 6]).marked()
    cut = marked.take([1], 2, has_uncond=False)
    assert [item["model_conds"]["text"].cond.tolist() for item in cut] == [[2], [4]]
    assert cut.uncond is None
    assert marked.take([0, 1], 2, has_uncond=True) is marked


def test_what_else_the_bases_conditions_have(forge: SimpleNamespace) -> None:
    base, own = (parts_of(forge, [1, 2], [5, 6]) for _ in range(2))
    control = object()
    for item in base:
        item["control"] = control
        item["model_conds"]["c_concat"] = Condition(torch.ones(2))
    with_all = own.like(base)
    assert all(item["control"] is control and "c_concat" in item["model_conds"] for item in with_all)
    assert all("control" not in item for item in own)
    assert all("control" not in item for item in with_all.without_control())


def test_without_guidance_there_is_one_half(forge: SimpleNamespace) -> None:
    base = Model()
    fusion = a_pass(base, skipping="Forecast")
    fusion.session.guidance_scale = 1.0
    step = step_of(forge, fusion, parts_of(forge, [1, 2], uncond=False))
    assert step.step.skips
    assert base.calls == [2]
    assert ask(step, 0) == [1, 2]
    assert step.is_over


def loaded(predicts: str = "epsilon", compiled: str = "", **blocks: Any) -> SimpleNamespace:
    """What the host has loaded; ``blocks``: the lists of layers by which the backend's classes go."""
    model = SimpleNamespace(diffusion_model=SimpleNamespace(**blocks), apply_model=None)
    model.predictor = SimpleNamespace(prediction_type=predicts)
    if compiled == "model":  # as torch.compile leaves it
        model.diffusion_model._orig_mod = None
    elif compiled == "calls":  # as the extension of Forge Neo does
        model._orig_apply_model = model.apply_model
    info = SimpleNamespace(name_for_extra="mine")
    return SimpleNamespace(forge_objects=SimpleNamespace(unet=SimpleNamespace(model=model)), sd_checkpoint_info=info)


UNET = {"input_blocks": [], "middle_block": [], "output_blocks": []}


@pytest.mark.parametrize(
    "blocks",
    [{"double_blocks": [], "single_blocks": []}, {"noise_refiner": [], "layers": []}, {"transformer_blocks": []},
     {"joint_blocks": []}, {"blocks": []}],
    ids=["Flux, Chroma", "Z-Image, Lumina", "Qwen", "SD3", "Wan, Anima"],
)  # fmt: skip
@pytest.mark.parametrize("uses_blocks", [True, False])
def test_transformers_are_refused(forge: SimpleNamespace, blocks: dict, uses_blocks: bool) -> None:
    """With any method, by a sentence that names the checkpoint and what to do."""
    with pytest.raises(SettingError, match="base checkpoint: 'mine' is not allowed; it is no U-Net of Stable "
                       "Diffusion; allowed: Stable Diffusion 1, 2 and XL"):  # fmt: skip
        forge.check_base(loaded("const", **blocks), uses_blocks)


@pytest.mark.parametrize(("predicts", "told"), [("const", "a flow"), ("edm", "as EDM does"), ("x0", "x0")])
def test_other_predictions_are_refused(forge: SimpleNamespace, predicts: str, told: str) -> None:
    """A U-Net that predicts a flow has the blocks, but none of the methods' formulas."""
    with pytest.raises(SettingError, match=f"it predicts {told}; allowed: models that predict noise or v"):
        forge.check_base(loaded(predicts, **UNET), False)


@pytest.mark.parametrize("compiled", ["model", "calls"])
def test_compiled_models_have_no_hooks(forge: SimpleNamespace, compiled: str) -> None:
    base = loaded(compiled=compiled, **UNET)
    with pytest.raises(SettingError, match=r"torch\.compile: 'on' is not allowed; allowed with FreeU and AFA: off"):
        forge.check_base(base, True)
    forge.check_base(base, False)  # SNB, average and skipping act around the model's calls
    forge.check_base(loaded(**UNET), True)
