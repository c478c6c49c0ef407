"""One pass on a fake of the host's denoiser: which rows are run by whom, and what is written back."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lib_fusion.errors import SettingError
from lib_fusion.methods import snb
from lib_fusion.requests.settings import FusionSettings
from tests.helpers import PLAIN
from tests.webui_fake import fakes


class UNet(nn.Module):
    """Its output depends on its weight, the latent and the text."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.calls = 0

    def state_dict(self) -> dict[str, torch.Tensor]:
        """By which it is taken for SD1's."""
        return {name: torch.zeros(1, 1, 1, 1) for name in ("input_blocks.0.0.weight", "out.2.weight", "proj_in.weight")}

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.sin(self.weight * x + context.mean(dim=(1, 2))[:, None, None, None])


class Model(nn.Module):
    def __init__(self, unet: UNet, parameterization: str = "eps") -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = unet
        self.sd_checkpoint_info = SimpleNamespace(filename="base", name_for_extra="base")
        self.parameterization = parameterization
        self.alphas_cumprod = torch.linspace(0.999, 0.01, 1000)

    def apply_model(self, x: torch.Tensor, t: torch.Tensor, cond: dict[str, Any]) -> torch.Tensor:
        return self.model.diffusion_model(x, t, cond["c_crossattn"][0])


class KDenoiser:
    """k-diffusion's, for noise: rows are ``x - sigma * eps``."""

    def get_scalings(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return -sigma, (sigma**2 + 1).rsqrt()


class Step:
    """One denoising step of the host with ``images`` pictures of ``parts`` AND parts each."""

    def __init__(self, model: Model, images: int = 2, weights: tuple[float, ...] = (1.0,), sigma: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model, self.images = model, images
        self.num_cond = images * len(weights)
        self.cond = fakes.composed(torch.randn(self.num_cond, 3, 4, generator=generator), weights)
        self.uncond = list(torch.randn(images, 3, 4, generator=generator))
        latents = torch.randn(images, 4, 6, 6, generator=generator)
        self.x = torch.cat([latents.repeat_interleave(len(weights), 0), latents])
        self.sigma = torch.full((len(self.x),), sigma)
        extra = {"cond": self.cond, "uncond": self.uncond, "cond_scale": 5.0}
        self.sampler = SimpleNamespace(sampler_extra_args=extra)
        self.denoiser = SimpleNamespace(sampler=self.sampler, step=0, padded_cond_uncond=False,
                                        padded_cond_uncond_v0=False)  # fmt: skip
        self.context = torch.cat([torch.stack([p.states for image in self.cond.batch for p in image]),
                                  torch.stack(self.uncond)])  # fmt: skip

    def raw(self, unet: UNet) -> torch.Tensor:
        return unet(self.x, torch.zeros(1), self.context)

    def run(self, fusion: Any, splits: tuple[int, ...], inner: Any = None, t: float = 500.0) -> torch.Tensor:
        """The rows as the host has them after its callback; ``splits`` are the rows of its calls."""
        inner = inner or KDenoiser()
        fusion.begin_step(SimpleNamespace(denoiser=self.denoiser, x=self.x, sigma=self.sigma))
        outputs, start = [], 0
        for rows in splits:
            part = slice(start, start + rows)
            told = {"c_crossattn": [self.context[part]], "c_concat": []}
            eps = self.model.apply_model(self.x[part], torch.full((rows,), t), told)
            outputs.append(self.x[part] - self.sigma[part, None, None, None] * eps)
            start += rows
        x = torch.cat(outputs)
        if start == self.num_cond:  # the host leaves the unconditional half out, and copies
            x = torch.cat([x, x[:: self.num_cond // self.images]])
        fusion.end_step(SimpleNamespace(x=x, inner_model=inner))
        return x


@pytest.fixture
def sampling(monkeypatch: pytest.MonkeyPatch) -> Any:
    fakes.install(monkeypatch)
    from lib_fusion.webui.a1111 import hooked_pass as sampling

    return sampling


def make_pass(sampling: Any, step: Step, expert: UNet, **settings: Any) -> Any:
    sampling.shared.sd_model = step.model
    told = FusionSettings.from_dict({"experts": [{"checkpoint": "b"}], **PLAIN, **settings})
    loaded = SimpleNamespace(unet=expert, worn=None, model=sampling.kind_of_model(step.model))
    return sampling.FusionPass(told, lambda _: ([loaded], [None]), step.sampler, step.model)


def expected(step: Step, base: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    n = step.num_cond
    maps = [snb.saliency(raw[:n], raw[n:], 5.0) for raw in (base, expert)]
    mask = snb.expert_mask(*maps)
    assert 0 < mask.float().mean() < 1
    eps = snb.blend(torch.cat([mask, mask]), base, expert)
    return step.x - step.sigma[:, None, None, None] * eps


@pytest.mark.parametrize("splits", [(4,), (2, 2), (1, 1, 1, 1), (3, 1)])
def test_snb_whatever_the_calls(sampling: Any, splits: tuple[int, ...]) -> None:
    base, expert = UNet(1.0), UNet(1.7)
    step = Step(Model(base))
    want = expected(step, step.raw(base), step.raw(expert))
    fusion = make_pass(sampling, step, expert)
    fusion.attach()
    got = step.run(fusion, splits)
    fusion.detach()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert fusion.session.calls == [len(splits)] * 2
    assert "apply_model" not in step.model.__dict__
    assert "forward" not in base.__dict__


def test_composed_prompts_share_one_mask(sampling: Any) -> None:
    base, expert = UNet(1.0), UNet(1.7)
    step = Step(Model(base), images=2, weights=(1.0, 0.5))
    raws = [step.raw(base), step.raw(expert)]
    combined = []
    for raw in raws:
        cond, uncond = raw[:4].view(2, 2, 4, 6, 6), raw[4:]
        combined.append((uncond + (cond[:, 0] - uncond) + 0.5 * (cond[:, 1] - uncond), uncond))
    mask = snb.expert_mask(*(snb.saliency(c, u, 5.0) for c, u in combined))
    want = snb.blend(torch.cat([mask.repeat_interleave(2, 0), mask]), *raws)
    fusion = make_pass(sampling, step, expert)
    fusion.attach()
    got = step.run(fusion, (6,))
    torch.testing.assert_close(got, step.x - step.sigma[:, None, None, None] * want, atol=1e-5, rtol=0)


def test_without_the_unconditional_half_the_last_mask_is_held(sampling: Any) -> None:
    base, expert = UNet(1.0), UNet(1.7)
    step = Step(Model(base))
    fusion = make_pass(sampling, step, expert)
    fusion.attach()
    plain = step.x - step.sigma[:, None, None, None] * step.raw(base)
    early = step.run(fusion, (2,))
    torch.testing.assert_close(early[:2], plain[:2])  # no mask yet: the base's
    full = step.run(fusion, (4,))
    late = step.run(fusion, (2,))
    torch.testing.assert_close(late[:2], full[:2])
    torch.testing.assert_close(late[2:], late[:2])


def test_the_expert_alone_spares_the_base(sampling: Any) -> None:
    base, expert = UNet(1.0), UNet(1.7)
    step = Step(Model(base))
    fusion = make_pass(sampling, step, expert, snb_window=[0, 0], snb_outside="expert")
    want = step.x - step.sigma[:, None, None, None] * step.raw(expert)
    fusion.attach()
    base.calls = 0
    assert torch.equal(step.run(fusion, (4,)), want)
    assert base.calls == 0


def test_v_is_weighed_as_noise(sampling: Any) -> None:
    """The mask is that of the noises: softmax is not scale-free, so raw v would give another for a large k."""
    base, expert = UNet(1.0), UNet(1.7)
    step = Step(Model(base, "v"), sigma=3.0)
    n, scale = step.num_cond, 10**-0.5
    raws = [step.raw(base), step.raw(expert)]
    maps = [snb.saliency(scale * raw[:n], scale * raw[n:], 5.0) for raw in raws]
    mask = snb.expert_mask(*maps, 40.0, 90.0)
    assert not torch.equal(mask, snb.expert_mask(*(m / scale for m in maps), 40.0, 90.0))
    fusion = make_pass(sampling, step, expert, k_general=40, k_expert=90)
    fusion.attach()
    got = step.run(fusion, (4,))
    want = step.x - step.sigma[:, None, None, None] * snb.blend(torch.cat([mask, mask]), *raws)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_inert_outside_steps_and_after_a_refiner(sampling: Any) -> None:
    base, expert = UNet(1.0), UNet(1.7)
    step = Step(Model(base))
    fusion = make_pass(sampling, step, expert)
    fusion.attach()
    told = {"c_crossattn": [step.context], "c_concat": []}
    with pytest.raises(ValueError, match="announces no steps"):  # rather than a picture without the expert
        step.model.apply_model(step.x, torch.full((4,), 500.0), told)
    step.run(fusion, (4,))
    assert expert.calls == 1
    step.model.apply_model(step.x, torch.full((4,), 500.0), told)
    assert expert.calls == 1
    step.model.sd_checkpoint_info = SimpleNamespace(filename="refiner", name_for_extra="refiner")
    plain = step.x - step.sigma[:, None, None, None] * step.raw(base)
    torch.testing.assert_close(step.run(fusion, (4,)), plain)
    assert expert.calls == 1
    assert fusion.refined


def test_errors_of_callbacks_end_the_next_call(sampling: Any) -> None:
    from lib_fusion.webui.runtime import Runtime

    base, expert = UNet(1.0), UNet(1.7)
    step = Step(Model(base))
    fusion = make_pass(sampling, step, expert)
    fusion.attach()
    runtime = Runtime()
    runtime.current = fusion
    runtime.begin_step(SimpleNamespace(denoiser=step.denoiser, x=step.x[:3], sigma=step.sigma))
    with pytest.raises(ValueError, match="how many rows"):
        step.model.apply_model(step.x, torch.zeros(4), {"c_crossattn": [step.context]})
    runtime.drop_leftovers()
    assert "apply_model" not in step.model.__dict__


def test_a_later_wrapper_of_someone_else_stays(sampling: Any) -> None:
    base, expert = UNet(1.0), UNet(1.7)
    step = Step(Model(base))
    fusion = make_pass(sampling, step, expert)
    fusion.attach()
    ours = step.model.apply_model
    theirs = lambda *args: ours(*args)  # noqa: E731
    step.model.apply_model = theirs
    fusion.detach()
    assert step.model.apply_model is theirs
    told = {"c_crossattn": [step.context]}
    torch.testing.assert_close(theirs(step.x, torch.zeros(4), told), step.raw(base))
    assert expert.calls == 0


def test_controlnets_marker_is_taken_off(sampling: Any) -> None:
    from lib_fusion.webui.a1111.contexts import strip_marker

    states = torch.randn(2, 3, 4)
    marked = torch.cat([torch.full((2, 1, 4), 1024.0), states], dim=1)
    assert torch.equal(strip_marker({"c_crossattn": [marked]})["c_crossattn"][0], states)
    assert torch.equal(strip_marker({"crossattn": -marked})["crossattn"], -states)
    plain = {"c_crossattn": [states]}
    assert strip_marker(plain) is plain


def test_a_step_without_its_unconditional_half_is_in_the_timeline(
    sampling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sampling.shared.opts.data, "denoiser_fusion_preview_skips", True)
    monkeypatch.setattr("lib_fusion.webui.a1111.host_step.leaves_out_uncond", lambda *_: True)
    step = Step(Model(UNet(1.0)))
    step.sampler.sampler_extra_args["s_min_uncond"] = 4.0
    fusion = make_pass(sampling, step, UNet(1.7), method="Average", skipping="Forecast")
    fusion.attach()
    step.run(fusion, (step.num_cond,))
    fusion.detach()
    assert fusion.session.records.skips == [{model: [("#", None)] * step.images for model in (0, 1)}]


@pytest.mark.parametrize(
    ("arguments", "levels"),
    [
        ({"sigmas": torch.tensor([8.0, 2.0, 0.0])}, [8, 2, 0]),
        ({"sigma_sched": torch.tensor([8.0, 2.0, 0.0])}, [8, 2, 0]),
        ({"timesteps": torch.tensor([1, 501, 901])}, [901, 501, 1]),
        ({"n": 2, "sigma_min": torch.tensor(0.1), "sigma_max": 10.0}, [10, 1, 0.1]),
    ],
)
def test_levels_of_a_pass(sampling: Any, arguments: dict, levels: list[float]) -> None:
    from lib_fusion.webui.sampling.levels import levels_of

    assert levels_of(arguments, 2) == pytest.approx(levels)


def test_levels_are_told_and_the_samplers_function_comes_back(sampling: Any) -> None:
    def function(model: Any, x: Any, sigmas: torch.Tensor | None = None) -> Any:
        return x

    from lib_fusion.webui.sampling.launch import announced_levels

    sampler = SimpleNamespace(func=function)

    def read(arguments: Any) -> list[float]:
        return arguments["sigmas"].tolist()

    fusion = sampling.FusionSession(FusionSettings(freeu="Auto", freeu_start=0.5))
    with announced_levels(sampler, fusion, read):
        assert sampler.func(None, 5, sigmas=torch.tensor([8.0, 2.0, 0.0])) == 5
    assert sampler.func is function
    assert fusion.schedule.levels == [8, 2, 0]
    with announced_levels(sampler, sampling.FusionSession(FusionSettings()), read):
        assert sampler.func(None, 6) == 6  # nothing needs levels here
    with announced_levels(sampler, fusion, read), pytest.raises(KeyError):
        sampler.func(None, 6)
    assert sampler.func is function


def test_a_pass_keeps_nothing_alive_after_its_end(sampling: Any) -> None:
    """Without waiting for the collector: an expert that is freed is free at once."""
    step, expert = Step(Model(UNet(1.0))), UNet(1.7)
    fusion = make_pass(sampling, step, expert)
    fusion.attach()
    step.run(fusion, (4,))
    fusion.detach()
    alive = [weakref.ref(fusion), weakref.ref(expert), weakref.ref(fusion.session)]
    gc.collect()
    gc.disable()
    try:
        del fusion, expert
        assert [found() for found in alive] == [None] * 3
    finally:
        gc.enable()


def test_a_pass_without_a_model_call_is_an_error(sampling: Any) -> None:
    step = Step(Model(UNet(1.0)))
    fusion = make_pass(sampling, step, UNet(1.7))
    fusion.session.begin([8.0, 2.0, 0.0])
    with pytest.raises(ValueError, match="could not act"):
        fusion.finish()
    fusion.session.begin([8.0])  # img2img may have no step to take
    fusion.finish()


def test_rows_that_are_not_the_steps_are_noticed_with_skipping_alone(
    sampling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tiles are, which another extension gives the model in place of pictures."""
    step = Step(Model(UNet(1.0)))
    step.sampler.sampler_extra_args["s_min_uncond"] = 0.0
    monkeypatch.setattr("lib_fusion.webui.a1111.host_step.leaves_out_uncond", lambda *_: False)
    sampling.shared.sd_model = step.model
    settings = FusionSettings.from_dict({"skipping": "Forecast"})
    fusion = sampling.FusionPass(settings, lambda _: ([], []), step.sampler, step.model)
    fusion.attach()
    fusion.begin_step(SimpleNamespace(denoiser=step.denoiser, x=step.x, sigma=step.sigma))
    told = {"c_crossattn": [step.context], "c_concat": []}
    step.model.apply_model(step.x, torch.full((4,), 500.0), told)
    with pytest.raises(ValueError, match="expected 4 rows in a step, the host has asked for 8"):
        step.model.apply_model(step.x, torch.full((4,), 500.0), told)
    fusion.detach()


@pytest.mark.parametrize(
    ("key", "freeu", "told"),
    [("FreeU Stages", "Auto", 1), ("freeu_enabled", "Auto", 1), ("FreeU Stages", "Off", 0), ("Model", "Auto", 0)],
)
def test_another_freeu_is_told_once(sampling: Any, key: str, freeu: str, told: int) -> None:
    """By what others write into the infotext: sd-webui-freeu, and the one built into Forge."""
    from lib_fusion.webui import script

    comments: dict[str, int] = {}
    p = SimpleNamespace(extra_generation_params={key: "x"}, comment=lambda text: comments.update({text: 1}))
    job = script.Request(FusionSettings(freeu=freeu))
    for _ in range(2):  # both passes of a picture
        script._tell(p, job, {"refined": False})
    assert len(comments) == told


def test_change_prediction(sampling: Any) -> None:
    """Both say the same of the picture, whichever is asked for."""
    from lib_fusion.webui.a1111.contexts import change_prediction

    picture, noise = torch.randn(2, 2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    for alpha in (0.0047, 0.5, 0.9991):
        a, b = alpha**0.5, (1 - alpha) ** 0.5
        x, v = a * picture + b * noise, a * noise - b * picture
        torch.testing.assert_close(change_prediction(v, x, alpha, "epsilon"), noise, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(change_prediction(noise, x, alpha, "v"), v, rtol=1e-4, atol=1e-4)
        assert change_prediction(noise.half(), x.half(), alpha, "v").dtype == torch.float32


def test_a_base_that_predicts_v_lends_no_expert_its_configuration(
    sampling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ordinary file has no .yaml; that of a v model says v."""
    from lib_fusion.webui.a1111 import experts

    near = SimpleNamespace(find_checkpoint_config_near_filename=lambda _: None)
    monkeypatch.setattr(experts, "sd_models_config", near)
    monkeypatch.setattr(experts, "guess_config", lambda *_: "the host's guess")
    monkeypatch.setattr(experts, "OmegaConf", SimpleNamespace(load=lambda path: path))
    info = SimpleNamespace(filename="plain.safetensors")
    for parameterization, expected in (("v", "the host's guess"), ("eps", "the base's")):
        model = Model(UNet(1.0), parameterization)
        model.used_config = "the base's"
        assert experts.config_of(info, "sd1", model) == expected


def test_an_experts_positions_are_its_files_own(sampling: Any) -> None:
    """Merges break them in many files: fractions are cut off, as where the host loads the file."""
    from lib_fusion.webui.a1111.text_encoders import put_positions

    encoder, find = nn.Module(), "text.{}".format
    encoder.embeddings = nn.Module()
    encoder.embeddings.register_buffer("position_ids", torch.tensor([[9, 9, 9]]))  # the base's
    put_positions(encoder, {"text.embeddings.position_ids": torch.tensor([[0.0, 0.5, 1.5]])}, find)
    assert encoder.embeddings.position_ids.tolist() == [[0, 0, 1]]
    put_positions(encoder, {}, find)
    assert encoder.embeddings.position_ids.tolist() == [[0, 1, 2]]
    assert encoder.embeddings.position_ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("what", "is_hires", "told"),
    [
        ("tiling", False, "allowed without Tiling"),
        ("hypertile_enable_unet", False, "allowed without Hypertile"),
        ("hypertile_enable_unet_secondpass", True, "allowed without Hypertile"),
        ("hypertile_enable_unet_secondpass", False, ""),
        ("control", False, "allowed without ControlNet"),
        ("", True, ""),
    ],
)
def test_what_counts_on_whole_pictures_refuses_places_only(
    sampling: Any, monkeypatch: pytest.MonkeyPatch, what: str, is_hires: bool, told: str
) -> None:
    unet = UNet(0.7)
    monkeypatch.setattr(sampling.model_hijack, "circular_enabled", what == "tiling")
    monkeypatch.setattr(sampling.shared, "opts", SimpleNamespace(**{what: True} if what.startswith("hyper") else {}))
    if what == "control":
        unet.forward = lambda *args: None
    with pytest.raises(SettingError, match=f"place_crop: True is not allowed; {told}") if told else nullcontext():
        sampling.check_crops(unet, is_hires)
