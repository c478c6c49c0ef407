"""Generation: latents from noise under a fusion session, decoded and returned with a record of the run."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from lib_fusion.engine.corrections import SamplerSteps
from lib_fusion.engine.loader import VAE_SCALE, DiffusionModel, check_checkpoint, load_model
from lib_fusion.engine.samplers import make_scheduler
from lib_fusion.errors import CheckpointError, SettingError
from lib_fusion.fusion.aggregator_files import load_for, model_of
from lib_fusion.fusion.hooks import Hooks, attach_freeu
from lib_fusion.fusion.lockstep import Lockstep, mean_context
from lib_fusion.fusion.policies import join_records
from lib_fusion.fusion.records import Keep, PictureRecords
from lib_fusion.fusion.session import AGGREGATOR, FusionSession
from lib_fusion.methods import afa
from lib_fusion.requests.settings import FusionSettings, GenerationSettings
from lib_fusion.unet.checkpoint import Checkpoint
from lib_fusion.unet.layout import read_layout


@dataclass
class Conditioning:
    """What one model is told: text states (B,T,D) with and without the prompt."""

    cond: torch.Tensor
    uncond: torch.Tensor


@dataclass
class Picture:
    """One result: the image, its prompt and seed, and its records where they were asked for."""

    image: Image.Image
    prompt: str
    seed: int
    records: PictureRecords = field(default_factory=PictureRecords)


@dataclass
class Run:
    """All pictures of a run and its record: settings, seconds, U-Net calls and rows per model."""

    pictures: list[Picture]
    record: dict


class Engine:
    """The base and its experts, loaded once, for any number of runs.

    An expert that is the same file as the base, or as another expert, shares what is loaded. Everything is checked
    before anything is loaded; raises SettingError or CheckpointError.
    """

    def __init__(
        self, base: str | Path, experts: Sequence[str | Path] = (), *,
        dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        self.device = torch.device(device)
        files = [check_checkpoint(path) for path in (base, *experts)]
        for file in files[1:]:
            _check_fits(files[0], file)
        loaded: dict[Path, DiffusionModel] = {}
        for i, file in enumerate(files):
            if file.path.resolve() not in loaded:
                loaded[file.path.resolve()] = load_model(file, dtype, device, with_vae=i == 0)
        self.models = [loaded[file.path.resolve()] for file in files]
        self.vae = self.models[0].vae
        self._aggregators: tuple[tuple | None, nn.ModuleList | None] = (None, None)

    @torch.no_grad()
    def generate(
        self, generation: GenerationSettings, fusion: FusionSettings | None = None, *,
        fixed_mask: torch.Tensor | None = None, keep: Keep | None = None, progress: bool = False,
    ) -> Run:  # fmt: skip
        """Draws ``count`` pictures of every prompt. ``fusion.experts`` are, in order, those the engine has loaded.

        ``fixed_mask`` (bool (1,1,h,w)) is for method Mask; ``keep`` says what of its making a picture is to tell. A
        picture depends on its own prompt and seed only.
        """
        fusion = fusion or FusionSettings()
        self.check(fusion, fixed_mask)
        jobs = [(prompt, generation.seed + i) for prompt in generation.prompts for i in range(generation.count)]
        pictures: list[Picture] = []
        skipped: list[dict] = []
        calls = [0] * (1 + len(fusion.experts))
        rows = list(calls)
        began = time.perf_counter()
        size = generation.batch_size
        total = generation.steps * ((len(jobs) + size - 1) // size)
        with tqdm(total=total, unit="step", disable=not progress, dynamic_ncols=True) as bar:
            for start in range(0, len(jobs), size):
                batch = jobs[start : start + size]
                session = FusionSession(fusion, fixed_mask, keep or Keep(), [self.models[0].unet.kind])
                latents = self.denoise(batch, generation, session, bar)
                images = self.decode(latents)
                for i, ((prompt, seed), image) in enumerate(zip(batch, images, strict=True)):
                    pictures.append(Picture(image, prompt, seed, session.records.of(i)))
                if session.skips is not None:
                    skipped.append(session.skips.record())
                calls = [a + b for a, b in zip(calls, session.calls, strict=True)]
                rows = [a + b for a, b in zip(rows, session.rows, strict=True)]
        record = {
            "base": self.models[0].path.stem,
            **asdict(generation),
            **fusion.to_dict(),
            "pictures": len(pictures),
            "seconds": round(time.perf_counter() - began, 3),
            "unet_calls": calls,
            "unet_rows": rows,
        }
        if skipped:
            record["skips"] = join_records(skipped)
        return Run(pictures, record)

    def check(self, fusion: FusionSettings, fixed_mask: torch.Tensor | None = None) -> None:
        """Refuses settings that these models can't do; raises SettingError."""
        if len(fusion.experts) > len(self.models) - 1:
            raise SettingError("experts", len(fusion.experts), f"allowed: at most the {len(self.models) - 1} loaded")
        if fusion.method == "Mask" and (fixed_mask is None or not fusion.experts):
            raise SettingError("method", "Mask", "it needs an expert and a mask picture")
        if fusion.snb_outside != "base" and not fusion.experts:
            raise SettingError("snb_outside", fusion.snb_outside, "allowed without an expert: base")
        self._check_afa(fusion)
        width = self.models[0].text.model.config.hidden_size
        for i, expert in enumerate(fusion.experts):
            needs = self.models[i + 1].unet.context_dim
            if expert.text_encoder == "base" and needs != width:
                allowed = f"allowed: own, since the base's text states are {width} wide and this expert needs {needs}"
                raise SettingError(f"experts[{i}].text_encoder", "base", allowed)

    def _check_afa(self, fusion: FusionSettings) -> None:
        """Loads the aggregators where they are asked for and not loaded yet; raises SettingError or CheckpointError."""
        if fusion.method != "AFA":
            return
        if not fusion.experts:
            raise SettingError("method", "AFA", "it needs an expert")
        models = self.models[: 1 + len(fusion.experts)]
        predictions = [model.unet.prediction for model in models]
        if len(set(predictions)) > 1:
            raise SettingError("method", "AFA", f"its models must predict the same, these predict {predictions}")
        if not fusion.needs_aggregator:
            if fusion.only_model >= len(models):
                raise SettingError("afa_maps", fusion.afa_maps, f"allowed: one of the {len(models)} models")
        elif not fusion.afa_aggregator:
            raise SettingError("afa_aggregator", "", "allowed: a file of trained aggregators; maps uniform need none")
        elif self._aggregators[0] != (key := (fusion.afa_aggregator, fusion.afa_force, len(models))):
            identities = [model_of(model.path) for model in models]
            unet = models[0].unet
            loaded = load_for(fusion.afa_aggregator, unet, identities, predictions, fusion.afa_force,
                              unet.dtype, self.device)  # fmt: skip
            self._aggregators = (key, loaded)

    def make_lockstep(self, fusion: FusionSettings) -> Lockstep:
        """The models in lockstep, with trained aggregators or a control, as the (checked) settings say."""
        models = self.models[: 1 + len(fusion.experts)]
        aggregators = self._aggregators[1]
        if fusion.afa_maps == "uniform":
            aggregators = afa.uniform(len(models)).to(self.device)
        elif not fusion.needs_aggregator:
            aggregators = afa.one_hot(len(models), fusion.only_model).to(self.device)
        return Lockstep(models[0].unet, [model.unet for model in models[1:]], aggregators)

    def denoise(
        self, jobs: Sequence[tuple[str, int]], generation: GenerationSettings, session: FusionSession,
        bar: tqdm | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The final latents (B,4,H/8,W/8), float32, of (prompt, seed) pairs."""
        told = self._conditionings([prompt for prompt, _ in jobs], generation, session.settings)
        scheduler = make_scheduler(generation.sampler, generation.steps, self.device)
        shape = (1, self.models[0].unet.out_channels, generation.height // 8, generation.width // 8)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for _, seed in jobs]
        x = torch.cat(noise).to(self.device) * scheduler.init_noise_sigma
        alphas = scheduler.alphas_cumprod.to(self.device)
        weights = torch.tensor([generation.cfg_scale, 1 - generation.cfg_scale], device=self.device).view(2, 1, 1, 1)
        steps = SamplerSteps(scheduler, session, generation.cfg_scale)
        session.begin([*map(float, scheduler.timesteps), -1.0])
        self._check_afa(session.settings)
        lockstep = self.make_lockstep(session.settings) if session.settings.method == "AFA" else None
        if lockstep:
            session.watch_afa(lockstep)
        unets = [model.unet for model in self.models] if session.freeu else []
        decoder = [point for unet in unets for point in read_layout(unet).decoder]
        freeu = session.freeu[0] if session.freeu else None
        with attach_freeu(decoder, freeu), lockstep.attach() if lockstep else Hooks():
            for t in scheduler.timesteps:
                scaled = steps.sampler.scale_model_input(x, t)  # variance-preserving, whatever the sampler
                skips = session.skips
                models, together = session.models_at(float(t)), session.in_lockstep(float(t))
                if skips is not None:
                    a = float(_alpha_at(t.to(self.device), alphas))
                    skips.begin_step(math.log((1 - a) / a) / 2, list(scaled), bool(t == scheduler.timesteps[-1]))
                    skips.join(together)
                noises: dict[int, torch.Tensor] = {}
                for i in models[:1] if together else models:
                    run = list(range(len(x))) if skips is None else skips.needed(i)
                    if run:
                        if together:
                            session.begin_call(float(t), run * 2)
                        others = self._running(lockstep, [told[j] for j in models], run) if together else nullcontext()
                        with others, session.using_freeu(i, float(t)):
                            noises[i] = self._predict(self.models[i], told[i], scaled, t, alphas, run)
                        if together:
                            for totals in lockstep.totals:
                                session.watch((*models, AGGREGATOR), totals)
                        else:
                            session.watch((i,), noises[i].sum(dtype=torch.float32)[None])
                    for j in models if together else (i,):
                        session.count(j, 2 * len(run), 2 * (len(x) - len(run)))
                    if skips is not None:
                        computed = dict(zip(run, noises.get(i, ()), strict=True))
                        noises[i] = torch.stack([
                            skips.observe(i, picture, computed[picture], weights) if picture in computed
                            else skips.forecast(i, picture) for picture in range(len(x))
                        ])  # fmt: skip
                if skips is not None:
                    x = steps.correct(skips.take_corrections(), x)
                x = steps.take(noises, t, x)
                if bar is not None:
                    bar.update()
        session.check(f"the base ({self.models[0].path.stem})")
        return x

    def _running(self, lockstep: Lockstep, told: Sequence[Conditioning], pictures: list[int]) -> AbstractContextManager:
        """The base's forward as that of all models, for some of the pictures."""
        contexts = [torch.cat([each.cond[pictures], each.uncond[pictures]]) for each in told]
        return lockstep.running(contexts[1:], mean_context(contexts))

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Pictures of latents (B,4,h,w), by the base's VAE."""
        images = []
        for z in latents.split(1):
            x = self.vae.decode(z / VAE_SCALE).sample.clamp(-1, 1)
            array = ((x[0] + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
            images.append(Image.fromarray(array))
        return images

    def _conditionings(
        self, prompts: list[str], generation: GenerationSettings, fusion: FusionSettings
    ) -> list[Conditioning]:
        negatives = [generation.negative_prompt] * len(prompts)
        told = [Conditioning(self.models[0].text(prompts), self.models[0].text(negatives))]
        for model, expert in zip(self.models[1:], fusion.experts, strict=False):
            text = self.models[0].text if expert.text_encoder == "base" else model.text
            own = [expert.prompt] * len(prompts) if expert.prompt else prompts
            own_negatives = [expert.negative_prompt] * len(prompts) if expert.negative_prompt else negatives
            told.append(Conditioning(text(own), text(own_negatives)))
        return told

    def _predict(
        self, model: DiffusionModel, told: Conditioning, x: torch.Tensor, t: torch.Tensor, alphas: torch.Tensor,
        pictures: Sequence[int],
    ) -> torch.Tensor:  # fmt: skip
        """A model's noise for some of the scaled latents (B,4,h,w), with and without its prompt: (n,2,4,h,w)."""
        chosen = list(pictures)
        rows = torch.cat([x[chosen]] * 2)
        timesteps = t.to(self.device, torch.float32).expand(len(rows))
        output = model.unet(rows, timesteps, torch.cat([told.cond[chosen], told.uncond[chosen]])).float()
        if model.unet.prediction == "v":  # eps = sqrt(a) v + sqrt(1 - a) x, with x variance-preserving
            a = _alpha_at(t.to(self.device), alphas)
            output = a.sqrt() * output + (1 - a).sqrt() * rows
        return torch.stack(output.chunk(2), dim=1)


def _check_fits(base: Checkpoint, expert: Checkpoint) -> None:
    if expert.latent_channels != base.latent_channels:
        raise CheckpointError(
            f"{expert.path}: its U-Net predicts {expert.latent_channels} latent channels, "
            f"allowed: {base.latent_channels} as the base's"
        )
    for file in (base, expert):
        taken = file.unet_shapes["input_blocks.0.0.weight"][1]
        if taken != file.latent_channels:
            raise CheckpointError(
                f"{file.path}: its U-Net takes {taken} channels (an inpainting model?), allowed: {file.latent_channels}"
            )


def _alpha_at(t: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """alphas_cumprod at a fractional timestep, linear in log sigma as the schedulers interpolate."""
    log_sigmas = ((1 - alphas) / alphas).log() / 2
    low = t.floor().long().clamp(0, len(alphas) - 1)
    high = (low + 1).clamp(max=len(alphas) - 1)
    log_sigma = torch.lerp(log_sigmas[low], log_sigmas[high], (t - low).to(log_sigmas.dtype))
    return 1 / (1 + (2 * log_sigma).exp())


def single(fusion: FusionSettings, model: int) -> FusionSettings:
    """Settings under which model ``model`` (0 the base, 1 the first expert) draws alone, with its own prompts."""
    if model == 0:
        return FusionSettings()
    return replace(fusion, method="SNB", snb_window=(0.0, 0.0), snb_outside="expert")
