"""A captioned data set as it lies on disk: a folder with metadata.jsonl or .txt captions, or a webdataset tar."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

from lib_fusion.errors import FusionError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
#: Latents have an eighth of the picture's side.
FACTOR = 8


class PictureError(FusionError):
    """One picture can't be used; says why."""


@dataclass(frozen=True)
class Captioned:
    """One picture: ``name`` within its data set, its caption, and its encoded bytes.

    ``subset`` is what it is counted to in an evaluation, ``repeats`` how often it is drawn where others are drawn once.
    """

    name: str
    caption: str
    data: bytes
    subset: str = "all"
    repeats: float = 1.0


def read_pictures(source: Path) -> Iterator[Captioned | PictureError]:
    """Every picture of a folder or tar in the order of its names; those without a caption come as PictureError.

    A line of metadata.jsonl is ``{"file_name": .., "text": .., "subset": .., "repeats": ..}``; the last two are
    optional. Raises FusionError where there is no data set at all.
    """
    if source.is_file() and source.suffix == ".tar":
        return _read_tar(source)
    if not source.is_dir():
        raise FusionError(f"{source}: no folder of pictures and no .tar")
    if (source / "metadata.jsonl").is_file():
        return _read_listed(source)
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise FusionError(f"{source}: no pictures there ({', '.join(SUFFIXES)})")
    if not any(path.with_suffix(".txt").is_file() for path in files):
        raise FusionError(f"{source}: {len(files)} pictures, but neither metadata.jsonl nor a .txt beside any of them")
    return _read_folder(source, files)


def _read_listed(source: Path) -> Iterator[Captioned | PictureError]:
    for number, line in enumerate((source / "metadata.jsonl").read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, caption = entry["file_name"], str(entry["text"])
            subset, repeats = str(entry.get("subset", "all")), float(entry.get("repeats", 1))
            path = (source / name).resolve()
            if not path.is_relative_to(source.resolve()):
                raise ValueError("the file is outside the folder")
            if not 0 < repeats < float("inf"):
                raise ValueError("repeats must be more than 0")
            yield Captioned(name, caption, path.read_bytes(), subset, repeats)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            yield PictureError(f"metadata.jsonl, line {number}: {error!r}")


def _read_folder(source: Path, files: list[Path]) -> Iterator[Captioned | PictureError]:
    for path in files:
        text = path.with_suffix(".txt")
        name = path.relative_to(source).as_posix()
        if text.is_file():
            yield Captioned(name, text.read_text("utf-8").strip(), path.read_bytes())
        else:
            yield PictureError(f"{name}: no caption ({text.name})")


def _read_tar(source: Path) -> Iterator[Captioned | PictureError]:
    """webdataset: members that share a name up to the first dot belong together."""
    try:
        with tarfile.open(source) as tar:
            groups: dict[str, dict[str, bytes]] = {}
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                if file is not None:
                    path = PurePosixPath(member.name)
                    key = str(path.parent / path.name.split(".")[0])
                    groups.setdefault(key, {})[path.suffix.lower()] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise FusionError(f"{source}: can't be read as a tar ({error})") from error
    pictures = {key: next((parts[s] for s in SUFFIXES if s in parts), None) for key, parts in sorted(groups.items())}
    if not any(".txt" in groups[key] for key, data in pictures.items() if data is not None):
        raise FusionError(f"{source}: no picture with a .txt caption in it")
    for key, data in pictures.items():
        if data is None:
            continue
        if ".txt" not in groups[key]:
            yield PictureError(f"{key}: no caption")
        else:
            yield Captioned(key, groups[key][".txt"].decode("utf-8").strip(), data)


def to_tensor(picture: Captioned, resolution: int) -> torch.Tensor:
    """The picture as (3,H,W) in -1..1, on white. Raises PictureError where it can't be read.

    ``resolution`` > 0: the shorter side is scaled to it (bilinear) and the middle square cut out; 0: the picture's own
    size, cut to multiples of 8.
    """
    try:
        with Image.open(BytesIO(picture.data)) as opened:
            rgba = opened.convert("RGBA")
    except Exception as error:  # Pillow raises many kinds for broken files
        raise PictureError(f"{picture.name}: can't be read ({error})") from error
    image = Image.new("RGBA", rgba.size, "white")
    image.alpha_composite(rgba)
    if resolution:
        scale = resolution / min(image.size)
        width, height = (max(resolution, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    wanted = [resolution or side // FACTOR * FACTOR for side in image.size]
    if min(wanted) < FACTOR:
        raise PictureError(f"{picture.name}: {image.width}x{image.height} is too small")
    left, top = ((side - want) // 2 for side, want in zip(image.size, wanted, strict=True))
    image = image.crop((left, top, left + wanted[0], top + wanted[1])).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
