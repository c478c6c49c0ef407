"""Generation: latents from noise under a fusion session, decoded and returned with a record of the run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from lib_fusion.engine.corrections import CorrectedSampler
from lib_fusion.engine.loader import VAE_SCALE, DiffusionModel, add_loras, check_checkpoint, load_model
from lib_fusion.engine.samplers import adds_noise, is_sigma_scaled, make_scheduler, sigmas_of
from lib_fusion.errors import CheckpointError, SettingError
from lib_fusion.fusion.aggregator_files import identify_model, load_for
from lib_fusion.fusion.crops import Box
from lib_fusion.fusion.hooks import attach_freeu
from lib_fusion.fusion.lockstep import Lockstep, mean_context
from lib_fusion.fusion.places import make_places
from lib_fusion.fusion.policies import join_records
from lib_fusion.fusion.records import Keep, PictureRecords
from lib_fusion.fusion.rows import Rows
from lib_fusion.fusion.session import FusionSession
from lib_fusion.fusion.step import Step
from lib_fusion.methods import afa
from lib_fusion.requests.settings import FusionSettings, GenerationSettings
from lib_fusion.unet.checkpoint import Checkpoint
from lib_fusion.unet.layout import read_layout
from lib_fusion.unet.lora import read_loras
from lib_fusion.unet.model_file import ModelFile


@dataclass
class Picture:
    """One result: the image, its prompt and seed, and its records where they were asked for."""

    image: Image.Image
    prompt: str
    seed: int
    records: PictureRecords = field(default_factory=PictureRecords)


@dataclass
class Generated:
    """All pictures of a run and its record: settings, seconds, U-Net calls and rows per model."""

    pictures: list[Picture]
    record: dict


class Engine:
    """The base and its experts, loaded once, for any number of runs.

    Each is a checkpoint, or one with LoRAs: ``general.safetensors+style.safetensors:0.8``, or a ``ModelFile``. Models
    of the same checkpoint share what is loaded of it, all but the layers that their LoRAs change. Everything is checked
    before anything is loaded; raises SettingError or CheckpointError.
    """

    def __init__(
        self, base: str | Path | ModelFile, experts: Sequence[str | Path | ModelFile] = (), *,
        dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        self.device = torch.device(device)
        given = [ModelFile.of(model) for model in (base, *experts)]
        files = [check_checkpoint(model.path) for model in given]
        for file in files[1:]:
            _check_fits(files[0], file)
        loras = [read_loras(model, file) for model, file in zip(given, files, strict=True)]
        loaded: dict[ModelFile, DiffusionModel] = {}
        self.models: list[DiffusionModel] = []
        for i, (model, file) in enumerate(zip(given, files, strict=True)):
            plain, whole = ModelFile(file.path.resolve()), ModelFile(file.path.resolve(), model.loras)
            if plain not in loaded:
                loaded[plain] = load_model(file, dtype, device, with_vae=i == 0)
            if whole not in loaded:
                loaded[whole] = add_loras(loaded[plain], loras[i])
            self.models.append(loaded[whole])
        self.vae = self.models[0].vae
        self._aggregators: tuple[tuple | None, nn.ModuleList | None] = (None, None)

    @torch.no_grad()
    def generate(
        self, generation: GenerationSettings, fusion: FusionSettings | None = None, *,
        masks: Mapping[int, torch.Tensor] | None = None, keep: Keep | None = None, progress: bool = False,
    ) -> Generated:  # fmt: skip
        """Draws ``count`` pictures of every prompt. ``fusion.experts`` are, in order, those the engine has loaded.

        ``masks``: the painted maps (1,1,h,w) in 0..1 of the experts whose place is ``mask``, by their number, 1 the
        first. ``keep``: the records to keep of each picture. A picture depends on its own prompt and seed only.
        """
        fusion = fusion or FusionSettings()
        self.check_settings(fusion, masks)
        places = make_places(fusion, masks or {})
        jobs = [(prompt, generation.seed + i) for prompt in generation.prompts for i in range(generation.count)]
        pictures: list[Picture] = []
        skipped: list[dict] = []
        calls = [0] * (1 + len(fusion.experts))
        rows: list[float] = list(calls)
        began = time.perf_counter()
        size = generation.batch_size
        total = generation.steps * ((len(jobs) + size - 1) // size)
        with tqdm(total=total, unit="step", disable=not progress, dynamic_ncols=True) as bar:
            for start in range(0, len(jobs), size):
                batch = jobs[start : start + size]
                session = FusionSession(fusion, places, keep or Keep(), [self.models[0].unet.kind])
                latents = self.denoise(batch, generation, session, bar)
                images = self.decode(latents)
                for i, ((prompt, seed), image) in enumerate(zip(batch, images, strict=True)):
                    pictures.append(Picture(image, prompt, seed, session.records.of(i)))
                if session.skips is not None:
                    skipped.append(session.skips.record())
                calls = [a + b for a, b in zip(calls, session.calls, strict=True)]
                rows = [a + b for a, b in zip(rows, session.rows, strict=True)]
        record = {
            "base": self.models[0].file.name,
            **asdict(generation),
            **fusion.to_dict(),
            "pictures": len(pictures),
            "seconds": round(time.perf_counter() - began, 3),
            "unet_calls": calls,
            "unet_rows": rows,
        }
        if skipped:
            record["skips"] = join_records(skipped)
        return Generated(pictures, record)

    def check_settings(self, fusion: FusionSettings, masks: Mapping[int, torch.Tensor] | None = None) -> None:
        """Refuses settings that these models can't do; raises SettingError."""
        if len(fusion.experts) > len(self.models) - 1:
            raise SettingError("experts", len(fusion.experts), f"allowed: at most the {len(self.models) - 1} loaded")
        make_places(fusion, masks or {})
        if fusion.snb_outside != "base" and not fusion.experts:
            raise SettingError("snb_outside", fusion.snb_outside, "allowed without an expert: base")
        self._check_afa(fusion)
        self._load_aggregators(fusion)
        width = self.models[0].text.model.config.hidden_size
        for i, expert in enumerate(fusion.experts):
            needs = self.models[i + 1].unet.context_dim
            if expert.text_encoder == "base" and needs != width:
                allowed = f"allowed: own, since the base's text states are {width} wide and this expert needs {needs}"
                raise SettingError(f"experts[{i}].text_encoder", "base", allowed)

    def _check_afa(self, fusion: FusionSettings) -> None:
        """Raises SettingError where AFA is asked for and these models can't do it."""
        if fusion.method != "AFA":
            return
        if not fusion.experts:
            raise SettingError("method", "AFA", "it needs an expert")
        count = 1 + len(fusion.experts)
        predictions = self._predictions(count)
        if len(set(predictions)) > 1:
            raise SettingError("method", "AFA", f"its models must predict the same, these predict {predictions}")
        if not fusion.needs_aggregator and fusion.only_model >= count:
            raise SettingError("afa_maps", fusion.afa_maps, f"allowed: one of the {count} models")
        if fusion.needs_aggregator and not fusion.afa_aggregator:
            raise SettingError("afa_aggregator", "", "allowed: a file of trained aggregators; maps uniform need none")

    def _predictions(self, count: int) -> list[str]:
        return [model.unet.prediction for model in self.models[:count]]

    def _load_aggregators(self, fusion: FusionSettings) -> nn.ModuleList | None:
        """The (checked) settings' aggregators, kept until others are asked for; None where none are needed.

        Raises SettingError or CheckpointError where the file does not fit the models.
        """
        if not fusion.needs_aggregator:
            return None
        count = 1 + len(fusion.experts)
        key = (fusion.afa_aggregator, fusion.afa_force, count)
        if self._aggregators[0] != key:
            identities = [identify_model(model.file) for model in self.models[:count]]
            unet = self.models[0].unet
            loaded = load_for(fusion.afa_aggregator, unet, identities, self._predictions(count), fusion.afa_force,
                              unet.dtype, self.device)  # fmt: skip
            self._aggregators = (key, loaded)
        return self._aggregators[1]

    def make_lockstep(self, fusion: FusionSettings) -> Lockstep:
        """The models in lockstep, with trained aggregators or a control, as the (checked) settings say."""
        models = self.models[: 1 + len(fusion.experts)]
        aggregators: nn.Module | None = self._load_aggregators(fusion)
        if aggregators is None:
            is_mean = fusion.afa_maps == "uniform"
            control = afa.uniform(len(models)) if is_mean else afa.one_hot(len(models), fusion.only_model)
            aggregators = control.to(self.device)
        return Lockstep(models[0].unet, [model.unet for model in models[1:]], aggregators)

    def denoise(
        self, jobs: Sequence[tuple[str, int]], generation: GenerationSettings, session: FusionSession,
        bar: tqdm | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The final latents (B,4,H/8,W/8), float32, of (prompt, seed) pairs."""
        scheduler = make_scheduler(generation.sampler, generation.steps, self.device)
        generators = [torch.Generator().manual_seed(seed) for _, seed in jobs]
        x = self._draw_noise(generators, generation) * scheduler.init_noise_sigma
        sigmas = sigmas_of(scheduler)
        conditionings = self._conditionings([prompt for prompt, _ in jobs], generation, session.settings)
        rows = Rows.plain(len(jobs))
        session.guidance_scale = generation.cfg_scale
        session.begin(sigmas, sigmas)
        sampler = CorrectedSampler(scheduler, session, generators if adds_noise(generation.sampler) else None)
        with self._hooked(session):
            for t, sigma in zip(scheduler.timesteps, sigmas[:-1], strict=True):
                alpha = 1 / (1 + sigma**2)
                scaled = sampler.scheduler.scale_model_input(x, t)  # variance-preserving, whatever the sampler
                inputs = torch.cat([scaled] * 2)
                level = session.schedule.level(sigma, float(t), alpha)
                step = Step(session, level, rows, list(x), sigma_scaled=is_sigma_scaled(scheduler))
                step.run(range(len(inputs)), inputs, partial(self._predict, session, conditionings, inputs, t, alpha))
                step.observe()
                x = sampler.take(step, t, x)
                if bar is not None:
                    bar.update()
        session.check_finite(f"the base ({self.models[0].file.name})")
        session.check_acted()
        return x

    def _draw_noise(self, generators: Sequence[torch.Generator], generation: GenerationSettings) -> torch.Tensor:
        """Each picture's noise (B,C,H/8,W/8), by its own generator."""
        shape = (1, self.models[0].unet.out_channels, generation.height // 8, generation.width // 8)
        noise = [torch.randn(shape, generator=generator) for generator in generators]
        return torch.cat(noise).to(self.device)

    @contextmanager
    def _hooked(self, session: FusionSession) -> Iterator[None]:
        """Within, the session's hooks are on the U-Nets."""
        decoder = [point for model in self.models for point in read_layout(model.unet).decoder] if session.freeu else []
        with attach_freeu(decoder, session.freeu[0] if session.freeu else None):
            if session.settings.method != "AFA":
                yield
                return
            lockstep = self.make_lockstep(session.settings)
            session.join(lockstep)
            with lockstep.attach():
                yield

    def _predict(
        self, session: FusionSession, conditionings: Sequence[torch.Tensor], inputs: torch.Tensor, t: torch.Tensor,
        alpha: float, models: Sequence[int], rows: Sequence[int], box: Box | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The noise (R,C,H,W) of some rows of the step, or of a box of them: one model's, or that of all in lockstep.

        ``inputs`` (2B,C,H,W) are the step's scaled latents, ``conditionings`` each model's text states (2B,T,D).
        """
        chosen = list(rows)
        unet, x = self.models[models[0]].unet, inputs[chosen]
        x = x if box is None else box.cut(x)
        contexts = [conditionings[model][chosen] for model in models]
        lockstep = session.lockstep if len(models) > 1 else None
        with lockstep.running(contexts[1:], mean_context(contexts)) if lockstep else nullcontext():
            output = unet(x, t.to(self.device, torch.float32).expand(len(x)), contexts[0]).float()
        if unet.prediction == "v":  # eps = sqrt(a) v + sqrt(1 - a) x, with x variance-preserving
            output = math.sqrt(alpha) * output + math.sqrt(1 - alpha) * x
        return output

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Pictures of latents (B,4,h,w), by the base's VAE."""
        images = []
        assert self.vae is not None
        for z in latents.split(1):
            x = self.vae.decode(z / VAE_SCALE).sample.clamp(-1, 1)
            array = ((x[0] + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
            images.append(Image.fromarray(array))
        return images

    def _conditionings(
        self, prompts: list[str], generation: GenerationSettings, fusion: FusionSettings
    ) -> list[torch.Tensor]:
        """Each model's text states (2B,T,D) with and without prompt, by its own text encoder or the base's."""
        negatives = [generation.negative_prompt] * len(prompts)
        base = self.models[0].text
        result = [torch.cat([base(prompts), base(negatives)])]
        for model, expert in zip(self.models[1:], fusion.experts, strict=False):
            text = base if expert.text_encoder == "base" else model.text
            own = [expert.prompt] * len(prompts) if expert.prompt else prompts
            own_negatives = [expert.negative_prompt] * len(prompts) if expert.negative_prompt else negatives
            result.append(torch.cat([text(own), text(own_negatives)]))
        return result


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


def single(fusion: FusionSettings, model: int) -> FusionSettings:
    """Settings under which model ``model`` (0 the base, 1 the first expert) draws alone, with its own prompts."""
    if model == 0:
        return FusionSettings()
    experts = tuple(replace(e, weight=1.0, window=(1000.0, 0.0), place="auto", mask="") for e in fusion.experts)
    return replace(fusion, experts=experts, method="SNB", snb_window=(0.0, 0.0), snb_outside="expert", guidance="off")
