"""A captioned data set, encoded once: latents and every model's text states, in safetensors shards. Resumable.

A shard holds ``I.latent`` (C,h,w) and ``I.text.M`` (T,D) of its I-th picture and model M, for SDXL also ``I.pooled.M``
(P,), in float16; what is the same as model 0's is not there again. ``empty.safetensors`` holds the empty caption's, and
index.json what the cache was made of. Only whole shards are ever there, so that nothing is lost and nothing is half.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib_fusion.errors import FusionError
from lib_fusion.files import read_text, write_whole
from lib_fusion.fusion.aggregator_files import model_hash, part_hash
from lib_fusion.training.captioned import Captioned, PictureError, read_pictures, to_tensor
from lib_fusion.unet.checkpoint import VAE_PREFIX, Checkpoint
from lib_fusion.unet.model_file import ModelFile

FORMAT = "denoiser-fusion-cache-1"
INDEX, EMPTY = "index.json", "empty.safetensors"


class Text(NamedTuple):
    """One model's conditioning of B captions: ``states`` (B,T,D), for SDXL also ``pooled`` (B,P). Of one, without B."""

    states: torch.Tensor
    pooled: torch.Tensor | None = None

    def to(self, device: torch.device) -> Text:
        """The same on a device."""
        return Text(self.states.to(device), None if self.pooled is None else self.pooled.to(device))


def stack_texts(captions: Iterable[Sequence[Text]]) -> list[Text]:
    """Each caption's texts by model -> each model's texts of all captions."""
    models = zip(*captions, strict=True)
    return [_stack(texts) for texts in models]


def _stack(texts: Sequence[Text]) -> Text:
    pooled = [text.pooled for text in texts if text.pooled is not None]
    return Text(torch.stack([text.states for text in texts]), torch.stack(pooled) if pooled else None)


class Encoders(Protocol):
    """What turns pictures and captions into what U-Nets are given: the engine's classes, or the WebUI's."""

    identity: Mapping[str, Any]  # {"models": their names, "texts": and "vae": what tells the encoders from others}

    def encode_picture(self, picture: torch.Tensor) -> torch.Tensor:
        """(3,H,W) in -1..1 -> latent (C,H/8,W/8), scaled as the U-Nets expect it."""

    def encode_texts(self, texts: Sequence[str]) -> list[Text]:
        """Each model's conditioning of B captions."""


def encoder_identity(given: Sequence[str | Path | ModelFile], vae: Checkpoint) -> dict[str, Any]:
    """What a cache depends on; U-Nets may be trained further and still use it. Raises FusionError as text_hashes."""
    models = [ModelFile.of(model) for model in given]
    return {
        "models": [model.name for model in models],
        "texts": text_hashes(models),
        "vae": part_hash(vae, VAE_PREFIX),
    }


def text_hashes(models: Sequence[ModelFile]) -> list[str]:
    """The identity of each model's text encoders; raises FusionError where the models are of several kinds."""
    files = [Checkpoint.open(model.path) for model in models]
    if len({file.kind for file in files}) > 1:
        problem = ", ".join(f"{file.path.stem} {file.kind}" for file in files)
        raise FusionError(f"the models are of several kinds ({problem}); allowed: models of one kind")
    return [model_hash(model, file, "text") for model, file in zip(models, files)]


@dataclass(frozen=True)
class Entry:
    """One cached picture: where it is, and what is known of it."""

    shard: Path
    index: int
    size: tuple[int, int]
    subset: str
    repeats: float
    name: str
    caption: str


@dataclass(frozen=True)
class Report:
    """What a run of ``write_cache`` did."""

    cached: int
    new: int
    skipped: tuple[str, ...]


def write_cache(
    source: Path, folder: Path, encoders: Encoders, resolution: int = 512, shard_size: int = 64,
    tell: Callable[[str], None] = lambda _: None,
) -> Report:  # fmt: skip
    """Encodes what is not yet in ``folder``; raises FusionError where that is something else, or the disk is full."""
    index = {"format": FORMAT, "source": source.name, "resolution": resolution, **encoders.identity}
    pictures = read_pictures(source)
    folder.mkdir(parents=True, exist_ok=True)
    _check_index(folder, index)
    done = {entry.name for entry in list_entries(folder)}
    old = len(done)
    skipped: list[str] = []
    if not (folder / EMPTY).is_file():
        _save(_caption_tensors(encoders.encode_texts([""]), 0, ""), folder / EMPTY, {}, 0)
    fresh = _encodable(pictures, done, resolution, skipped, tell)
    number = 1 + max((int(path.stem.rpartition("-")[2]) for path in folder.glob("shard-*.safetensors")), default=-1)
    while batch := list(islice(fresh, shard_size)):
        tensors: dict[str, torch.Tensor] = {}
        texts = encoders.encode_texts([picture.caption for picture, _ in batch])
        for i, (_, picture) in enumerate(batch):
            tensors[f"{i}.latent"] = encoders.encode_picture(picture)
            tensors |= _caption_tensors(texts, i, f"{i}.")
        items = [
            {"name": p.name, "caption": p.caption, "subset": p.subset, "repeats": p.repeats, "size": list(x.shape[1:])}
            for p, x in batch
        ]
        _save(tensors, folder / f"shard-{number:05d}.safetensors", {"items": json.dumps(items)}, len(done))
        number += 1
        done.update(picture.name for picture, _ in batch)
        tell(f"{len(done)} pictures cached")
    if not done:
        raise FusionError(f"{source}: none of its pictures can be used; {'; '.join(skipped[:3])}")
    return Report(len(done), len(done) - old, tuple(skipped))


def _caption_tensors(texts: Sequence[Text], row: int, prefix: str) -> dict[str, torch.Tensor]:
    """One caption's tensors by their names in a file."""
    tensors = {}
    for m, text in enumerate(texts):
        for name, part, first in zip(("text", "pooled"), text, texts[0], strict=True):
            if part is not None and (m == 0 or first is None or not torch.equal(part[row], first[row])):
                tensors[f"{prefix}{name}.{m}"] = part[row]
    return tensors


def _encodable(
    pictures: Iterable[Captioned | PictureError], done: set[str], resolution: int, skipped: list[str],
    tell: Callable[[str], None],
) -> Iterable[tuple[Captioned, torch.Tensor]]:  # fmt: skip
    """The pictures that are new and can be read; the others are reported."""
    for picture in pictures:
        if isinstance(picture, PictureError):
            error = picture
        elif picture.name in done:
            continue
        else:
            try:
                yield picture, to_tensor(picture, resolution)
                continue
            except PictureError as found:
                error = found
        skipped.append(str(error))
        tell(f"skipped: {error}")


def _check_index(folder: Path, index: Mapping[str, Any]) -> None:
    path = folder / INDEX
    if not path.is_file():
        if any(folder.iterdir()):
            raise FusionError(f"{folder}: not empty, and not a cache")
        _write(path, lambda partial: partial.write_text(json.dumps(index, indent=1), "utf-8"), 0)
        return
    found = read_index(folder)
    for key, value in index.items():
        if found.get(key) != value:
            problem = f"a cache with another {key} ({found.get(key)}, not {value})"
            raise FusionError(f"{folder}: {problem}; use another folder")


def read_index(folder: Path) -> dict[str, Any]:
    """What a cache was made of; raises FusionError where there is none."""
    try:
        found = json.loads(read_text(folder / INDEX))
    except (OSError, ValueError) as error:
        raise FusionError(f"{folder}: no cache there ({INDEX} can't be read)") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise FusionError(f"{folder}: no cache there, or one of another version")
    return found


def list_entries(folder: Path) -> list[Entry]:
    """Everything cached, in the order of the shards."""
    entries = []
    for shard in sorted(folder.glob("shard-*.safetensors")):
        try:
            with safe_open(shard, framework="pt") as file:
                items = json.loads(file.metadata()["items"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise FusionError(f"{shard}: broken; delete it, and cache again ({error})") from error
        entries += [
            Entry(shard, i, tuple(item["size"]), item["subset"], item["repeats"], item["name"], item["caption"])
            for i, item in enumerate(items)
        ]
    return entries


class Cache:
    """A cache to read from: ``entries``, and the tensors of any of them, in float32."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.index = read_index(folder)
        self.num_models = len(self.index["texts"])
        self.entries = list_entries(folder)
        if not self.entries:
            raise FusionError(f"{folder}: a cache without pictures")
        with safe_open(folder / EMPTY, framework="pt") as file:
            self.empty = self._read_texts(file, "")
        self._open: dict[Path, Any] = {}

    def read(self, entry: Entry) -> tuple[torch.Tensor, list[Text]]:
        """Latent (C,h,w) and each model's conditioning of the caption."""
        if entry.shard not in self._open:
            self._open[entry.shard] = safe_open(entry.shard, framework="pt")
        file = self._open[entry.shard]
        return file.get_tensor(f"{entry.index}.latent").float(), self._read_texts(file, f"{entry.index}.")

    def _read_texts(self, file: Any, prefix: str) -> list[Text]:
        names = set(file.keys())

        def get(name: str, m: int) -> torch.Tensor:
            own = f"{prefix}{name}.{m}"
            return file.get_tensor(own if own in names else f"{prefix}{name}.0").float()

        has_pooled = f"{prefix}pooled.0" in names
        return [Text(get("text", m), get("pooled", m) if has_pooled else None) for m in range(self.num_models)]


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str], safe: int) -> None:
    tensors = {key: value.to("cpu", torch.float16).contiguous() for key, value in tensors.items()}
    _write(path, lambda partial: save_file(tensors, partial, metadata), safe)


def _write(path: Path, write: Callable[[Path], Any], safe: int) -> None:
    """Writes a file whole or not at all; ``safe`` pictures are in the cache already."""
    try:
        write_whole(path, write)
    except (OSError, SafetensorError) as error:
        problem = f"{safe} pictures are cached and stay; the same command goes on from there"
        raise FusionError(f"{path}: can't be written ({error}); {problem}") from error
