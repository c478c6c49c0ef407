"""Fetches the emoji pictures the demo models are trained on and renders them to 128 px arrays.

Noto Emoji (Apache-2.0) gives the flat style, Fluent Emoji 3D (MIT) the glossy one; emojibase (MIT) tells people,
symbols and flags, which are left out, from the rest. All come from the npm registry; see NOTICE.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from demo.concepts import CATEGORIES

PACKAGES = ("@iconify-json/noto@1.2.9", "@lobehub/fluent-emoji-3d@1.1.0", "emojibase-data@17.0.0")
SIZE = 128
#: emojibase's groups that are pictures of things.
THING_GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
#: Noto's box: the SVG renderer aborts on it.
BROKEN = {"1f4e6"}
#: Concepts (beyond the demo's 72) kept out of the VAE's training, to measure it on.
VAE_HELD_OUT = 32


def fetch(folder: Path) -> dict[str, Path]:
    """Downloads the packages' tarballs with ``npm pack`` where they are missing; returns {package name: tarball}."""
    folder.mkdir(parents=True, exist_ok=True)
    tarballs = {}
    for package in PACKAGES:
        name, version = package.rsplit("@", 1)
        path = folder / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
        if not path.exists():
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        tarballs[name] = path
    return tarballs


def _read(tarball: Path, names: set[str] | None = None, suffix: str = "") -> dict[str, bytes]:
    with tarfile.open(tarball) as tar:
        return {
            member.name: tar.extractfile(member).read()
            for member in tar
            if member.isfile() and (member.name in names if names else member.name.endswith(suffix))
        }


def _on_white(picture: Image.Image, size: int) -> np.ndarray:
    picture = picture.convert("RGBA")
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def render(folder: Path, size: int = SIZE) -> dict[tuple[str, str], np.ndarray]:
    """All pictures: {(code point, style): uint8 array (size, size, 3)}, cached in ``folder``.

    Only code points that exist in both styles; for sizes other than 128 only the demo's. Composited on white.
    """
    cache = folder / f"pictures-{size}.npz"
    if cache.exists():
        with np.load(cache) as arrays:
            return {tuple(key.split("/")): arrays[key] for key in arrays.files}
    import resvg_py

    tarballs = fetch(folder)
    base = _read(tarballs["emojibase-data"], {"package/en/data.json", "package/en/messages.json"})
    groups = {g["order"]: g["key"] for g in json.loads(base["package/en/messages.json"])["groups"]}
    things = {
        entry["hexcode"].lower()
        for entry in json.loads(base["package/en/data.json"])
        if groups.get(entry.get("group")) in THING_GROUPS
    }
    noto = _read(tarballs["@iconify-json/noto"], {"package/icons.json", "package/chars.json"})
    icons = json.loads(noto["package/icons.json"])
    char_to_icon = json.loads(noto["package/chars.json"])
    glossy = {
        Path(name).stem.replace("-fe0f", ""): data
        for name, data in _read(tarballs["@lobehub/fluent-emoji-3d"], suffix=".webp").items()
    }
    ours = {code for names in CATEGORIES.values() for code in names.values()}
    pictures = {}
    for code in sorted(things):
        short = code.replace("-fe0f", "")
        if size != SIZE and short not in ours:
            continue
        icon = icons["icons"].get(char_to_icon.get(code, char_to_icon.get(short)))
        if icon is None or short not in glossy or short in BROKEN:
            continue
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128">{icon["body"]}</svg>'
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size))
        pictures[short, "flat"] = _on_white(Image.open(io.BytesIO(png)), size)
        pictures[short, "glossy"] = _on_white(Image.open(io.BytesIO(glossy[short])), size)
    missing = [name for names in CATEGORIES.values() for name, code in names.items() if (code, "flat") not in pictures]
    if missing:
        raise RuntimeError(f"the packages lack pictures of: {', '.join(missing)}")
    np.savez(cache, **{"/".join(key): value for key, value in pictures.items()})
    return pictures
