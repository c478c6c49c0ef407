"""The page of a gallery: one HTML file with all pictures in it, which needs no other file and no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lib_fusion.files import write_whole

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2430; --faint: #667085; --line: #d9dee6; --card: #f5f7fa; }
@media (prefers-color-scheme: dark) {
  :root:not([data-theme=light]) {
    --paper: #14181f; --ink: #e6eaf0; --faint: #98a2b3; --line: #2d3541; --card: #1c222b; }
}
:root[data-theme=dark] { color-scheme: dark;
  --paper: #14181f; --ink: #e6eaf0; --faint: #98a2b3; --line: #2d3541; --card: #1c222b; }
:root[data-theme=light] { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1800px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
header { display: flex; gap: 16px; align-items: baseline; justify-content: space-between; }
h1 { font-size: 22px; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 28px 0 8px; overflow-wrap: anywhere; }
h2 small, figcaption small { color: var(--faint); font-weight: normal; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; padding: 12px 16px;
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
.row { display: grid; gap: 12px; align-items: end;
  grid-template-columns: repeat(auto-fill, minmax(min(220px, 100%), 1fr)); }
figure { margin: 0; } figcaption { margin-bottom: 4px; font-weight: 600; overflow-wrap: anywhere; }
figcaption small { display: block; }
figure img { display: block; width: 100%; border: 1px solid var(--line); border-radius: 6px; cursor: zoom-in; }
.mask img { image-rendering: pixelated; }
.missing { display: grid; place-items: center; min-height: 120px; border: 1px dashed var(--line); border-radius: 6px;
  color: var(--faint); }
button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 4px 12px; cursor: pointer; white-space: nowrap; }
dialog { border: 0; padding: 16px; max-width: 96vw; background: var(--paper); color: var(--ink); border-radius: 8px; }
dialog img { display: block; width: min(1024px, 90vw); max-height: 75vh; object-fit: contain; }
dialog pre { white-space: pre-wrap; overflow-wrap: anywhere; max-width: min(1024px, 90vw); color: var(--faint); }
dialog::backdrop { background: rgb(0 0 0 / 70%); }
"""

SCRIPT = """
const root = document.documentElement, box = document.querySelector("dialog");
const preferred = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
const dark = () => (root.dataset.theme || preferred) === "dark";
document.querySelector("#theme").onclick = () => { root.dataset.theme = dark() ? "light" : "dark"; };
for (const image of document.querySelectorAll("figure img")) image.onclick = () => {
  box.querySelector("img").src = image.src;
  box.querySelector("pre").textContent = image.dataset.infotext || "";
  box.showModal();
};
box.onclick = () => box.close();
"""


@dataclass(frozen=True)
class Cell:
    """One picture: its column, its file (None: not drawn yet), what it cost, and its infotext."""

    title: str
    file: Path | None = None
    cost: str = ""
    infotext: str = ""


@dataclass(frozen=True)
class Row:
    """The pictures of one prompt and seed."""

    prompt: str
    seed: int
    cells: Sequence[Cell]


def write_page(path: Path, title: str, rows: Sequence[Row], facts: Mapping[str, str]) -> None:
    """Writes the page; whatever is in prompts and names is shown as text."""
    terms = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f'<header><h1>{escape(title)}</h1><button id="theme">Light / dark</button></header><dl>{terms}</dl>',
        *map(_row, rows),
        f'<dialog><img alt=""><pre></pre></dialog><script>{SCRIPT}</script></body></html>\n',
    ]
    write_whole(path, lambda partial: partial.write_text("".join(parts), "utf-8"))


def _row(row: Row) -> str:
    cells = "".join(map(_cell, row.cells))
    return f'<h2>{escape(row.prompt)} <small>seed {row.seed}</small></h2><div class="row">{cells}</div>'


def _cell(cell: Cell) -> str:
    caption = f"<figcaption>{escape(cell.title)}<small>{escape(cell.cost)}</small></figcaption>"
    if cell.file is None:
        return f'<figure>{caption}<div class="missing">not drawn yet</div></figure>'
    kind = "" if cell.infotext else ' class="mask"'
    data = base64.b64encode(cell.file.read_bytes()).decode("ascii")
    source = f"data:image/{cell.file.suffix[1:]};base64,{data}"
    alt = escape(cell.title, quote=True)
    text = escape(cell.infotext, quote=True)
    return f'<figure{kind}>{caption}<img src="{source}" alt="{alt}" data-infotext="{text}"></figure>'
