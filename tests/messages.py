"""The sentences in the source that people read: found in the code itself, so that none is forgotten."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lib_fusion"
#: What a request in the WebUI can run into; the command line and the embedded engine speak English.
OF_REQUESTS = ("fusion", "requests", "unet", "webui")
ERRORS = ("SettingError", "CheckpointError", "FusionError", "RequestRefusedError")


@dataclass(frozen=True)
class Message:
    """One call: where, of what (an error's class), and its arguments as templates, each in all its wordings.

    What differs in a template is ``{0}``, ``{1}`` ..; an argument that is computed elsewhere has no wording.
    """

    where: str
    kind: str
    arguments: tuple[tuple[str, ...], ...]


def errors_of(*folders: str) -> Iterator[Message]:
    """The errors that the files in folders of the package raise."""
    for folder in folders:
        yield from calls_of(folder, *ERRORS)


def calls_of(folder: str, *called: str) -> Iterator[Message]:
    """The calls of these names, and what is given to them."""
    for file in sorted((PACKAGE / folder).rglob("*.py")):
        yield from _calls_in(file, called)


def _calls_in(file: Path, called: tuple[str, ...]) -> Iterator[Message]:
    tree = ast.parse(file.read_text("utf-8"))
    constants = _assignments(tree.body)
    for function in [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Module))]:
        body = list(_own_nodes(function))
        names = {**constants, **_assignments(body)}
        for node in body:
            if isinstance(node, ast.Call) and _called(node) in called:
                arguments = tuple(tuple(dict.fromkeys(_wordings(arg, names))) for arg in node.args)
                yield Message(f"{file.relative_to(PACKAGE)}:{node.lineno}", _called(node), arguments)


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """All nodes in a function, without those of functions inside it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            yield child
            yield from _own_nodes(child)
        elif isinstance(child, ast.ClassDef):
            yield from _own_nodes(child)


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _assignments(nodes: list) -> dict[str, list[ast.expr]]:
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(node.value)
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for name, value in zip(target.elts, node.value.elts):
                        found.setdefault(getattr(name, "id", ""), []).append(value)
        if isinstance(node, ast.For) and isinstance(node.iter, (ast.Tuple, ast.List)):  # a table of cases
            _rows(node, found)
    return found


def _rows(node: ast.For, found: dict[str, list[ast.expr]]) -> None:
    targets = node.target.elts if isinstance(node.target, ast.Tuple) else [node.target]
    for item in node.iter.elts:  # type: ignore[attr-defined]
        values = item.elts if isinstance(item, ast.Tuple) and len(targets) > 1 else [item]
        for name, value in zip(targets, values):
            found.setdefault(getattr(name, "id", ""), []).append(value)


def _wordings(node: ast.expr, names: dict[str, list[ast.expr]], depth: int = 0) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from _wordings(node.body, names, depth)
        yield from _wordings(node.orelse, names, depth)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _wordings(value, names, depth)
    elif isinstance(node, ast.Name) and depth < 4:
        for value in names.get(node.id, ()):
            yield from _wordings(value, names, depth + 1)
    elif isinstance(node, ast.JoinedStr):
        yield from _joined(node, names, depth)


def _joined(node: ast.JoinedStr, names: dict[str, list[ast.expr]], depth: int) -> Iterator[str]:
    """An f-string's template, and after it the wordings of the texts that are put into it."""
    template, count = "", 0
    for part in node.values:
        if isinstance(part, ast.Constant):
            template += str(part.value)
        else:
            template, count = f"{template}{{{count}}}", count + 1
    yield template
    for part in node.values:
        if isinstance(part, ast.FormattedValue) and depth < 4:
            yield from _wordings(part.value, names, depth + 1)
