"""Draws docs/architecture.png from the imports of lib_fusion, and checks its rules.

``python docs/draw_architecture.py`` prints figures, too. A room is a sub-package of lib_fusion, one of the four in
lib_fusion/webui, or a file that lies between them. An arrow says that files of one room import files of another;
imports for type checkers only are left out. Rooms stand on floors: each imports only what is below it. The exit status
is 1 where rooms import each other in a circle, or where the host is imported outside lib_fusion/webui.
"""

from __future__ import annotations

import argparse
import ast
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lib_fusion"
#: Packages of the host, and who may import them.
HOST = ("modules", "modules_forge", "gradio")
HOST_ROOMS = ("webui", "scripts")
#: Rooms that every other may import; their arrows are counted, but not drawn.
GROUND = ("errors", "log", "files")
#: What the picture says of a room, and where it stands, in widths of a room; any other is put to the right.
JOBS = {
    "methods": ("the formulas, on tensors", 0.55),
    "unet": ("reads and builds U-Nets", 0.0),
    "requests": ("what may be asked for", 1.7),
    "fusion": ("one step of N models", 1.1),
    "training": ("makes aggregators", 0.45),
    "previews": ("draws what was recorded", 1.7),
    "engine": ("host 1: diffusers", 1.1),
    "cli": ("python -m lib_fusion", 1.1),
    "webui.refusal": ("ends a request", 5.2),
    "webui.options": ("the settings page's values", 3.0),
    "webui.other_hosts": ("a sentence in other WebUIs", 6.3),
    "webui.models": ("finds what a request names", 3.0),
    "webui.sampling": ("a pass, in any WebUI", 4.3),
    "webui.a1111": ("host 2: the WebUI's models", 4.15),
    "webui.forge": ("host 3: Forge's backend", 5.3),
    "webui.host": ("which WebUI this is", 4.05),
    "webui.runtime": ("what outlives a request", 4.3),
    "webui.panel": ("controls, axes, gallery, API", 3.0),
    "webui.training": ("the training tab", 3.0),
    "webui.script": ("the script's callbacks", 4.3),
    "scripts": ("registers with the WebUI", 3.65),
}
WIDTH, HEIGHT = 1.06, 0.64
PAPER, INK, RED = "#fbfaf7", "#26323f", "#c23b3b"
CORE, ENGINE, WEBUI, GROUND_COLOUR = "#dcebdd", "#dfe7f5", "#f8e6cf", "#e9e7e1"

Arrows = Counter[tuple[str, str]]


@dataclass
class Source:
    """A file: its module's name, the modules that it imports, its number of lines, and each function's length."""

    module: str
    lines: int
    imports: set[str] = field(default_factory=set)
    functions: list[tuple[int, str]] = field(default_factory=list)

    @property
    def room(self) -> str:
        """``fusion`` for ``lib_fusion.fusion.step``, ``webui.panel`` for ``lib_fusion.webui.panel.api``."""
        parts = self.module.removesuffix(".__init__").split(".")
        if parts[0] != PACKAGE:
            return parts[0]
        parts = ["cli" if part == "__main__" else part for part in parts[1:]]
        return ".".join(parts[: 2 if parts[:1] == ["webui"] else 1])


def read_sources(root: Path) -> list[Source]:
    """All files of the package and the WebUI's scripts."""
    files = sorted([*root.glob(f"{PACKAGE}/**/*.py"), *root.glob("scripts/*.py")])
    return [read_source(file, ".".join(file.relative_to(root).with_suffix("").parts)) for file in files]


def read_source(file: Path, module: str) -> Source:
    text = file.read_text("utf-8")
    source = Source(module, len(text.splitlines()))
    for node in walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            source.imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            source.imports |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            source.functions.append((node.end_lineno - node.lineno + 1, f"{module}:{node.name}"))
    return source


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from walk(other)
        else:
            yield from walk(child)


def rooms_of(sources: list[Source]) -> list[str]:
    """The names of all rooms; the package's own ``__init__`` is none."""
    return sorted({source.room for source in sources} - {"", "webui"})


def find_arrows(sources: list[Source]) -> Arrows:
    """(importing room, imported room) -> how many files of the other each file imports, in sum."""
    room_of = {source.module.removesuffix(".__init__"): source.room for source in sources}
    rooms = rooms_of(sources)
    arrows: Arrows = Counter()
    for source in sources:
        files = {name if name in room_of else name.rpartition(".")[0] for name in source.imports} & set(room_of)
        targets = Counter(room_of[name] for name in files)
        arrows.update({(source.room, room): n for room, n in targets.items() if room != source.room and room in rooms})
    return arrows


def find_host_imports(sources: list[Source]) -> list[str]:
    """Files that import the host and may not."""
    return sorted(
        f"{source.module} imports {name}"
        for source in sources
        for name in source.imports
        if name.split(".")[0] in HOST and source.room.split(".")[0] not in HOST_ROOMS
    )


def below(room: str, arrows: Arrows) -> set[str]:
    """All rooms that a room imports, also through others."""
    found: set[str] = set()
    todo = [room]
    while todo:
        news = {b for a, b in arrows if a == todo[-1]} - found
        todo[-1:] = news
        found |= news
    return found


def find_circles(rooms: list[str], arrows: Arrows) -> list[list[str]]:
    """Groups of rooms that import each other."""
    reach = {room: below(room, arrows) for room in rooms}
    groups = {tuple(b for b in rooms if b in reach[a] and a in reach[b]) for a in rooms}
    return sorted(list(group) for group in groups if group)


def find_floors(rooms: list[str], arrows: Arrows) -> dict[str, int]:
    """Each room's floor, from 0: one above the highest room that it imports; rooms in a circle share theirs."""
    reach = {room: below(room, arrows) for room in rooms}
    lower = {a: {b for b in reach[a] if a not in reach[b]} for a in rooms}
    floors: dict[str, int] = {}
    for room in sorted(rooms, key=lambda room: len(lower[room])):
        floors[room] = 1 + max((floors[b] for b in lower[room]), default=-1)
    return floors


def describe(sources: list[Source]) -> str:
    """The figures, a line each."""
    rooms, arrows = rooms_of(sources), find_arrows(sources)
    circles = find_circles(rooms, arrows)
    length, longest = max(function for source in sources for function in source.functions)
    figures = {
        "rooms": len(rooms),
        "arrows": f"{len(arrows)} ({arrows.total()} imports)",
        "circles": f"{len(circles)} {'; '.join(' <-> '.join(circle) for circle in circles)}".strip(),
        "files": len(sources),
        "lines": sum(source.lines for source in sources),
        "longest function": f"{longest}, {length} lines",
    }
    return "\n".join(f"{name}: {figure}" for name, figure in figures.items())


def find_implied(arrows: Arrows) -> set[tuple[str, str]]:
    """Arrows without which everything is still reached, through other rooms."""
    kept = Counter(arrows)
    for a, b in sorted(arrows, key=lambda pair: (len(below(pair[1], arrows)), pair)):
        n = kept.pop((a, b))
        if b not in below(a, kept):
            kept[a, b] = n
    return set(arrows) - set(kept)


def draw(sources: list[Source], path: Path) -> None:
    """Draws the rooms, and an arrow wherever one room is reached through no other; the rest is listed in the rooms."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    all_arrows = find_arrows(sources)
    arrows = Counter({pair: n for pair, n in all_arrows.items() if not set(pair) & set(GROUND)})
    rooms = [room for room in rooms_of(sources) if room not in GROUND]
    circles = {pair for group in find_circles(rooms, arrows) for pair in arrows if set(pair) <= set(group)}
    implied = find_implied(arrows) - circles
    places = place(rooms, find_floors(rooms, arrows))
    top, right = max(y for _, y in places.values()) + 0.5, max(x for x, _ in places.values()) + 0.65
    figure, axes = pyplot.subplots(figsize=(2.1 * (right + 0.7), 1.3 * (top + 1.6)), dpi=130, facecolor=PAPER)
    axes.set(xlim=(-0.7, right + 0.05), ylim=(-1.1, top + 0.55), facecolor=PAPER)
    axes.axis("off")
    own = [places[room] for room in rooms if colour_of(room) == WEBUI]
    if own:
        corners = [(pick(x for x, _ in own), pick(y for _, y in own)) for pick in (min, max)]
        (left, low), (east, high) = corners
        add_box(axes, (left - 0.6, low - 0.42, east + 0.6, high + 0.42), "#fdf5ea", "#ecd3ae")
        note = {"ha": "right", "va": "bottom", "color": "#9a6b22", "size": 9, "style": "italic"}
        axes.text(east + 0.6, high + 0.46, "only these rooms import the WebUI", **note)
    for pair in sorted(set(arrows) - implied):
        draw_arrow(axes, pair, arrows, set(arrows) - implied, places, RED if pair in circles else INK)
    for room in rooms:
        also = [f"{b.removeprefix('webui.')}\N{NO-BREAK SPACE}{arrows[a, b]}" for a, b in sorted(implied) if a == room]
        draw_room(axes, room, places[room], [source for source in sources if source.room == room], also)
    ground = ", ".join(room for room in GROUND if room in rooms_of(sources))
    add_box(axes, (-0.55, -0.78, right - 0.05, -0.52), GROUND_COLOUR, INK)
    told = f"{ground}: imported from everywhere ({all_arrows.total() - arrows.total()} imports, not drawn)"
    style = {"va": "center", "color": INK}
    axes.text(right / 2 - 0.3, -0.655, told, ha="center", size=9, **style)
    legend = "An arrow points to what is imported; its number counts imports, file by file. "
    legend += "Also: imports of rooms that other arrows lead to."
    axes.text(-0.55, -0.98, legend, size=8.5, **style)
    axes.text(-0.55, top + 0.3, "The rooms of lib_fusion", size=16, weight="bold", **style)
    figure.savefig(path, facecolor=PAPER, bbox_inches="tight", pad_inches=0.15, metadata={"Software": None})


def place(rooms: list[str], floors: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Each room's middle."""
    strangers = iter(range(6, 100))
    return {room: (JOBS[room][1] if room in JOBS else 1.2 * next(strangers), floors[room]) for room in rooms}


def colour_of(room: str) -> str:
    if room.split(".")[0] in HOST_ROOMS:
        return WEBUI
    return ENGINE if room in ("engine", "cli", "training") else CORE


def add_box(axes: Any, sides: tuple[float, float, float, float], fill: str, edge: str, zorder: float = 0) -> None:
    """A box with round corners between left, lower, right and upper side."""
    from matplotlib.patches import FancyBboxPatch

    left, low, right, high = sides
    style = {"boxstyle": "round,pad=0,rounding_size=0.06", "fc": fill, "ec": edge, "zorder": zorder}
    axes.add_patch(FancyBboxPatch((left, low), right - left, high - low, **style))


def draw_room(axes: Any, room: str, middle: tuple[float, float], files: list[Source], also: list[str]) -> None:
    x, y = middle
    lines = sum(file.lines for file in files)
    size = f"{len(files)} file{'s' * (len(files) > 1)}, {f'about {round(lines, -2)}' if lines > 99 else lines} lines"
    job = JOBS.get(room, ("",))[0]
    rest = textwrap.wrap(f"also {', '.join(also)}", 36) if also else []
    texts = [(room, 10.5, "bold"), (job, 8, "normal"), (size, 7, "normal"), *((line, 6.5, "normal") for line in rest)]
    add_box(axes, (x - WIDTH / 2, y - HEIGHT / 2, x + WIDTH / 2, y + HEIGHT / 2), colour_of(room), INK, zorder=3)
    heights = [size_ * 0.0148 for _, size_, _ in texts]
    y += sum(heights) / 2
    for (text, size_, weight), height in zip(texts, heights):
        colour = "#66717d" if size_ < 7 else INK
        axes.text(x, y - height / 2, text, ha="center", va="center", size=size_, weight=weight, color=colour, zorder=4)
        y -= height


def draw_arrow(
    axes: Any, pair: tuple[str, str], arrows: Arrows, drawn: set[tuple[str, str]],
    places: dict[str, tuple[float, float]], colour: str,
) -> None:  # fmt: skip
    """From the lower edge of a room to the upper edge of one below; in a circle from side to side."""
    a, b = pair
    (ax, ay), (bx, by) = places[a], places[b]
    if ay > by:
        start = (ax + spread(b, [y for x, y in drawn if x == a], places), ay - HEIGHT / 2)
        end = (bx + spread(a, [x for x, y in drawn if y == b], places), by + HEIGHT / 2)
    else:
        side = 1 if ax < bx else -1
        start, end = (ax + side * WIDTH / 2, ay + 0.08 * side), (bx - side * WIDTH / 2, by + 0.08 * side)
    line = {"arrowstyle": "-|>", "color": colour, "lw": 1 + 0.1 * arrows[pair], "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=line, zorder=1)
    at = [(s + e) / 2 for s, e in zip(start, end)]
    box = {"boxstyle": "circle,pad=0.18", "fc": PAPER, "ec": "none"}
    axes.text(*at, str(arrows[pair]), ha="center", va="center", size=8, color=colour, bbox=box, zorder=2)


def spread(room: str, others: list[str], places: dict[str, tuple[float, float]]) -> float:
    """Where on an edge the arrow to a room goes, among those to others."""
    order = sorted(others, key=lambda other: places[other])
    return (order.index(room) - (len(order) - 1) / 2) * 0.8 * WIDTH / max(len(order), 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: the one of this file)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "architecture.png", help="the picture")
    args = parser.parse_args()
    sources = read_sources(args.root)
    print(describe(sources))
    draw(sources, args.out)
    problems = [f"a circle of rooms: {', '.join(group)}"
                for group in find_circles(rooms_of(sources), find_arrows(sources))]  # fmt: skip
    problems += [f"{found}, which only lib_fusion/webui may" for found in find_host_imports(sources)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
