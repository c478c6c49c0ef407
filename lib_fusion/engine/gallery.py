"""``python -m lib_fusion gallery``: a page of pictures from any checkpoints, each alone and fused, that can be resumed.

A picture is kept under a name made of all that determines it, so an interrupted run resumes where it was, and other
prompts, seeds or settings only add what is not there yet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lib_fusion import __version__
from lib_fusion.engine.gallery_page import Cell, Row, write_page
from lib_fusion.engine.generate import Engine, single
from lib_fusion.engine.sheets import infotext, lora_words, name_loras
from lib_fusion.errors import SettingError
from lib_fusion.files import write_whole
from lib_fusion.fusion.records import Keep
from lib_fusion.previews import mask_image
from lib_fusion.requests.presets import Presets
from lib_fusion.requests.settings import FusionSettings, GenerationSettings
from lib_fusion.unet.checkpoint import distinct_names
from lib_fusion.unet.model_file import ModelFile

#: The column of the settings given as flags, and that of its mask.
FUSED, MASK = "fused", "who drew where"
QUALITY = 92


def read_prompts(file: str) -> list[str]:
    """The prompts of a text file, one a line; empty lines and those that begin with # do not count.

    Raises SettingError.
    """
    try:
        lines = Path(file).read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise SettingError("prompts", file, f"allowed: a text file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise SettingError("prompts", file, "allowed: a text file in UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise SettingError("prompts", file, "allowed: a file with at least one prompt, one on each line")
    return list(dict.fromkeys(prompts))


def columns_of(names: Sequence[str], fusion: FusionSettings, presets: Sequence[str]) -> dict[str, FusionSettings]:
    """Title -> settings: every model alone, the settings given, and these with each preset's values.

    ``names``: the models', distinct, the base first. Raises SettingError.
    """
    plain = FusionSettings(experts=fusion.experts)
    alone = {f"{name} alone": single(plain, i) for i, name in enumerate(names)}
    shipped = Presets(Path("none"))
    changed = {name: FusionSettings.from_dict({**fusion.to_dict(), **shipped.get(name)}) for name in presets}
    return {**alone, FUSED: fusion, **changed}


@dataclass
class Gallery:
    """Draws what is missing in ``folder`` and writes its page after every row."""

    models: Sequence[ModelFile]
    columns: dict[str, FusionSettings]
    generation: GenerationSettings
    folder: Path
    masks: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def make(self, engine: Engine, tell: Callable[[str], None], progress: bool = False) -> Path:
        """Returns the page's path. All settings are checked before anything is drawn; raises SettingError."""
        for settings in self.columns.values():
            engine.check_settings(settings, self.masks)
        jobs = [(prompt, self.generation.seed + i)
                for prompt in self.generation.prompts for i in range(self.generation.count)]  # fmt: skip
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        total, number = len(jobs) * len(self.columns), 0
        page = self._write(jobs)
        for prompt, seed in jobs:
            has_drawn = False
            for title in self.columns:
                number += 1
                if not self._paths(title, prompt, seed)[0].exists():
                    seconds = self._draw(engine, title, prompt, seed, progress)
                    tell(f"{number} of {total}: {title}; {prompt}, seed {seed} ({seconds:.0f} s)")
                    has_drawn = True
            if has_drawn:  # the page has all pictures in it, so that a resumed run writes it for new ones only
                self._write(jobs)
        return page

    @cached_property
    def _shared(self) -> tuple[list[Any], list[Any], dict[int, Any]]:
        """What all pictures are determined by: the files, the LoRAs' weights, and the masks."""
        files = [[str(file), file.stat().st_size, file.stat().st_mtime_ns]
                 for model in self.models for file in (model.path, *(lora.path for lora in model.loras))]  # fmt: skip
        weights = [[lora.weight for lora in model.loras] for model in self.models]
        return files, weights, {expert: mask.tolist() for expert, mask in self.masks.items()}

    def _paths(self, title: str, prompt: str, seed: int) -> tuple[Path, Path, Path]:
        """Where a picture's record is, written last, and the picture and its mask."""
        generation = replace(self.generation, prompts=(prompt,), seed=seed, count=1, batch_size=1)
        files, weights, masks = self._shared
        all_of_it = [files, weights, asdict(generation), self.columns[title].to_dict(), masks]
        key = hashlib.sha256(json.dumps(all_of_it, sort_keys=True, default=str).encode()).hexdigest()[:16]
        folder = self.folder / "pictures"
        return folder / f"{key}.json", folder / f"{key}.webp", folder / f"{key}-mask.png"

    def _draw(self, engine: Engine, title: str, prompt: str, seed: int, progress: bool) -> float:
        record, picture, mask = self._paths(title, prompt, seed)
        settings = self.columns[title]
        generation = replace(self.generation, prompts=(prompt,), seed=seed, count=1)
        run = engine.generate(generation, settings, masks=self.masks, keep=Keep.read(["masks"]), progress=progress)
        drawn = run.pictures[0]
        write_whole(picture, lambda file: drawn.image.save(file, format="WEBP", quality=QUALITY))
        if drawn.records.masks:
            image = mask_image(drawn.records.masks[-1][1]).resize(drawn.image.size, 0)
            write_whole(mask, lambda file: image.save(file, format="PNG", optimize=True))
        base, *experts = self.models
        text = infotext(prompt + lora_words(base), seed, generation, name_loras(settings, experts), base.path.stem)
        told = {"seconds": run.record["seconds"], "rows": sum(run.record["unet_rows"]), "infotext": text}
        write_whole(record, lambda file: file.write_text(json.dumps(told), "utf-8"))
        return run.record["seconds"]

    def _write(self, jobs: Sequence[tuple[str, int]]) -> Path:
        rows = []
        for prompt, seed in jobs:
            cells = [self._cell(title, prompt, seed) for title in self.columns]
            _, _, mask = self._paths(FUSED, prompt, seed)
            if mask.exists():
                cells.append(Cell(MASK, mask))
            rows.append(Row(prompt, seed, cells))
        page = self.folder / "index.html"
        write_page(page, " and ".join(distinct_names([model.name for model in self.models])), rows, self._facts())
        return page

    def _cell(self, title: str, prompt: str, seed: int) -> Cell:
        record, picture, _ = self._paths(title, prompt, seed)
        if not record.exists():
            return Cell(title)
        told: dict[str, Any] = json.loads(record.read_text("utf-8"))
        return Cell(title, picture, f"{told['seconds']:.1f} s, {told['rows']} U-Net rows", told["infotext"])

    def _facts(self) -> dict[str, str]:
        """The settings that all pictures share."""
        base, *experts = self.models
        g = self.generation
        colours = "dark the base, then orange, green and red the experts"
        return {
            "base": base.name, **{f"expert {i + 1}": expert.name for i, expert in enumerate(experts)},
            "sampler": f"{g.sampler}, {g.steps} steps, CFG {g.cfg_scale:g}", "size": f"{g.width} x {g.height}",
            "negative prompt": g.negative_prompt or "none", MASK: f"{colours}, of the column {FUSED}",
            "made by": f"Denoiser Fusion {__version__}",
        }  # fmt: skip
