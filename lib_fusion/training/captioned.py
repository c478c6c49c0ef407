"""A captioned data set as it lies on disk: a folder with metadata.jsonl or .txt captions, or a webdataset tar."""

from __future__ import annotations

import codecs
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
from PIL import Image

from lib_fusion.errors import FusionError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
#: The text that editors call ANSI: Windows' own code page, which is this one in English and most of Europe.
ANSI = "mbcs" if sys.platform == "win32" else "cp1252"
#: Marks at the head of a text, and the encodings that they stand for.
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
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
    if source.is_file() and source.suffix.lower() == ".tar":
        return _read_tar(source)
    if not source.is_dir():
        raise FusionError(f"{source}: no folder of pictures and no .tar")
    if (source / "metadata.jsonl").is_file():
        return _read_listed(source)
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise FusionError(f"{source}: no pictures there ({', '.join(SUFFIXES)})")
    if not any(_caption_file(path) for path in files):
        raise FusionError(f"{source}: {len(files)} pictures, but neither metadata.jsonl nor a .txt beside any of them")
    return _read_folder(source, files)


def _read_listed(source: Path) -> Iterator[Captioned | PictureError]:
    text = read_caption((source / "metadata.jsonl").read_bytes(), "metadata.jsonl")
    for number, line in enumerate(text.split("\n"), start=1):  # a JSON text may hold other ends of lines
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, caption = entry["file_name"], str(entry["text"])
            subset, repeats = str(entry.get("subset", "all")), float(entry.get("repeats", 1))
            if "\\" in name and not (os.sep == "/" and (source / name).is_file()):  # written on Windows
                name = PureWindowsPath(name).as_posix()
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
        name, text = path.relative_to(source).as_posix(), _caption_file(path)
        if text is None:
            yield PictureError(f"{name}: no caption ({path.stem}.txt)")
            continue
        try:
            yield Captioned(name, read_caption(text.read_bytes(), text.name).strip(), path.read_bytes())
        except (PictureError, OSError) as error:
            yield PictureError(f"{name}: {error}")


def _caption_file(picture: Path) -> Path | None:
    """The text beside a picture."""
    return next((path for path in map(picture.with_suffix, (".txt", ".TXT")) if path.is_file()), None)


def read_caption(data: bytes, name: str) -> str:
    """A text as editors save it: UTF-8 or UTF-16, marked or not, or ANSI; raises PictureError with the file's name.

    In ANSI's place other code pages would be read as nonsense. Few of its characters are above ASCII, most of theirs.
    """
    encodings = ["utf-8", ANSI] if 3 * sum(byte > 127 for byte in data) <= len(data) else ["utf-8"]
    if marked := next((encoding for mark, encoding in MARKS.items() if data.startswith(mark)), None):
        encodings = [marked]
    elif b"\0" in data:
        encodings = ["utf-16-le" if data[1::2].count(0) >= data[::2].count(0) else "utf-16-be"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise PictureError(f"{name}: neither UTF-8 nor UTF-16 nor ANSI; save it as UTF-8")


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
            continue
        try:
            yield Captioned(key, read_caption(groups[key][".txt"], f"{key}.txt").strip(), data)
        except PictureError as error:
            yield error


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
