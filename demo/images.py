"""The small captioned image set in demo/images: the demo's 72 concepts in both styles, for the training utilities."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from demo.concepts import CATEGORIES, CATEGORY_OF, CONCEPTS, STYLES, single_caption
from demo.data import render


def write_images(data: Path, folder: Path) -> None:
    """144 WebP pictures of 128 px and a metadata.jsonl of {file_name, text}."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = render(data)
    lines = []
    for name in CONCEPTS:
        for style in STYLES:
            file = f"{name.replace(' ', '-')}-{style}.webp"
            array = pictures[CATEGORIES[CATEGORY_OF[name]][name], style]
            Image.fromarray(array).save(folder / file, quality=76, method=6)
            lines.append(json.dumps({"file_name": file, "text": single_caption(name, style)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
