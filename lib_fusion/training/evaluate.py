"""Held-out loss of an aggregator, against every model alone, the averages, and the best model for each subset.

All are given the same latents, noises and timesteps. Single models run as one-hot maps in AFA's own pipeline, so that
nothing but the maps differs.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lib_fusion.files import write_whole
from lib_fusion.fusion.aggregator_files import identify_model, load_for
from lib_fusion.fusion.lockstep import point_names
from lib_fusion.methods import afa
from lib_fusion.training.cache import Cache, Entry, Text, stack_texts
from lib_fusion.training.ensemble import Ensemble, add_noise, alphas_cumprod, load_models
from lib_fusion.unet.checkpoint import distinct_names
from lib_fusion.unet.model_file import ModelFile

#: The middles of five equal ranges of timesteps.
BUCKETS = (100, 300, 500, 700, 900)
BATCH = 8
TRAINED, MEAN_FEATURES, MEAN_PREDICTIONS, ORACLE = (
    "AFA", "uniform average of features", "average of predictions", "best model for each subset"
)  # fmt: skip


@dataclass
class Evaluation:
    """``loss``: {candidate: {subset: {timestep: mean loss}}}.

    ``routing``: {subset: {point: mean weight of each model}}.
    ``sharpness``: {point: mean of the largest weight at a position}, 1 where routing is hard.
    """

    models: list[str]
    subsets: dict[str, int]
    loss: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    routing: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    sharpness: dict[str, float] = field(default_factory=dict)

    def mean(self, candidate: str, subset: str | None = None) -> float:
        """Mean loss over timesteps; over all pictures where no subset is named."""
        if subset is not None:
            values = self.loss[candidate][subset].values()
            return sum(values) / len(values)
        return sum(self.mean(candidate, s) * n for s, n in self.subsets.items()) / sum(self.subsets.values())

    def add_oracle(self) -> None:
        """The best single model for each subset: what perfect routing of whole subsets would give."""
        singles = [only(name) for name in self.models]
        best = {subset: min(singles, key=partial(self.mean, subset=subset)) for subset in self.subsets}
        self.loss[ORACLE] = {subset: self.loss[single][subset] for subset, single in best.items()}

    def at(self, candidate: str, timestep: int) -> float:
        """Mean loss at one timestep, over all pictures."""
        losses = self.loss[candidate]
        return sum(losses[s][timestep] * n for s, n in self.subsets.items()) / sum(self.subsets.values())

    @property
    def timesteps(self) -> list[int]:
        return sorted(next(iter(self.loss[TRAINED].values())))

    def takeover(self) -> str:
        """A sentence on the timesteps at which the average of the predictions is better; "" where it never is."""
        ahead = [t for t in self.timesteps if self.at(TRAINED, t) <= self.at(MEAN_PREDICTIONS, t)]
        behind = [t for t in self.timesteps if t not in ahead]
        if not behind:
            return ""
        problem = f" At timestep {', '.join(map(str, behind))} the average of predictions is better"
        lead = [t for t in ahead if t < behind[0]]
        return f"{problem}: try the window {max(lead)}:0 with the average outside." if lead else f"{problem}."

    def verdict(self) -> str:
        """Whether the aggregator beats the best single model, by how much, and where it should not act."""
        best = min((only(name) for name in self.models), key=self.mean)
        trained, single, average = self.mean(TRAINED), self.mean(best), self.mean(MEAN_PREDICTIONS)
        ratios = (
            f"{trained / single:.2f} of the best single model's loss ({best}) "
            f"and {trained / average:.2f} of the average's"
        )
        if trained >= single:
            return f"The aggregator does NOT beat the best single model: it has {ratios}.{self.takeover()}"
        lost = [s for s in self.subsets if self.mean(TRAINED, s) > min(self.mean(only(m), s) for m in self.models)]
        where = f" A single model is still better on: {', '.join(lost)}." if lost else ""
        return f"The aggregator beats the best single model: it has {ratios}.{where}{self.takeover()}"

    def to_dict(self) -> dict[str, Any]:
        return {"models": self.models, "subsets": self.subsets, "loss": self.loss, "routing": self.routing,
                "sharpness": self.sharpness, "verdict": self.verdict()}  # fmt: skip


def only(name: str) -> str:
    return f"only {name}"


@torch.no_grad()
def evaluate(
    folder: str | Path, checkpoints: Sequence[str | Path | ModelFile], aggregator: str | Path,
    timesteps: Sequence[int] = BUCKETS, captions: bool = True, device: str | torch.device = "cpu",
    tell: Callable[[str], None] = lambda _: None, precision: str = "float32",
) -> Evaluation:  # fmt: skip
    """Measures on the cache in ``folder``. Without ``captions`` the models get the empty one. Raises FusionError.

    ``precision``: the U-Nets', which two of SDXL's need 21 GB for in float32; the aggregators stay in float32.
    """
    cache = Cache(folder)
    device = torch.device(device)
    unets = load_models(checkpoints, cache, getattr(torch, precision), device)
    models = [identify_model(path) for path in checkpoints]
    trained = load_for(aggregator, unets[0], models, [unet.prediction for unet in unets], device=device)
    names = distinct_names([model.title for model in models])
    subsets = {s: sum(e.subset == s for e in cache.entries) for s in sorted({e.subset for e in cache.entries})}
    result = Evaluation(names, subsets)
    candidates = {TRAINED: trained, MEAN_FEATURES: afa.uniform(len(names))}
    candidates |= {only(name): afa.one_hot(len(names), i) for i, name in enumerate(names)}
    sums: dict[tuple[str, str, int], float] = {}
    maps = Routing(point_names(unets[0]))
    for subset in subsets:
        for batch in _batches([entry for entry in cache.entries if entry.subset == subset]):
            data = _load(cache, batch, captions)
            for t in timesteps:
                outputs = {}
                for name, module in candidates.items():
                    ensemble = Ensemble(unets, module.to(device))
                    ensemble.lockstep.on_maps = maps.note(subset) if name == TRAINED else None
                    outputs[name], target = _predict(ensemble, data, t, unets[0].prediction, device)
                    ensemble.hooks.remove()
                outputs[MEAN_PREDICTIONS] = torch.stack([outputs[only(name)] for name in names]).mean(dim=0)
                for name, output in outputs.items():
                    error = (output - target).square().mean(dim=(1, 2, 3)).sum().item()
                    sums[name, subset, t] = sums.get((name, subset, t), 0.0) + error
            tell(f"{subset}: {len(batch)} pictures")
    for (name, subset, t), total in sums.items():
        result.loss.setdefault(name, {}).setdefault(subset, {})[t] = total / subsets[subset]
    result.routing, result.sharpness = maps.means()
    result.add_oracle()
    return result


class Routing:
    """Sums of attention maps by subset and point."""

    def __init__(self, points: Sequence[str]) -> None:
        self.points = points
        self._weights: dict[tuple[str, int], list[torch.Tensor]] = {}
        self._largest: dict[int, list[torch.Tensor]] = {}

    def note(self, subset: str) -> Callable[[int, torch.Tensor], None]:
        def on_maps(point: int, maps: torch.Tensor) -> None:
            self._weights.setdefault((subset, point), []).append(maps.mean(dim=(0, 2, 3)))
            self._largest.setdefault(point, []).append(maps.amax(dim=1).mean())

        return on_maps

    def means(self) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
        """({subset: {point: weight of each model}}, {point: mean largest weight})."""
        routing: dict[str, dict[str, list[float]]] = {}
        for (subset, point), values in self._weights.items():
            mean = torch.stack(values).mean(dim=0).tolist()
            routing.setdefault(subset, {})[self.points[point]] = [round(weight, 4) for weight in mean]
        sharpness = {self.points[point]: float(torch.stack(values).mean()) for point, values in self._largest.items()}
        return routing, sharpness


def _batches(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries of one size together, a few at a time."""
    batches = []
    for size in sorted({entry.size for entry in entries}):
        same = [entry for entry in entries if entry.size == size]
        batches += [same[i : i + BATCH] for i in range(0, len(same), BATCH)]
    return batches


def _load(cache: Cache, batch: Sequence[Entry], captions: bool) -> tuple[torch.Tensor, list[Text], list[str]]:
    read = [cache.read(entry) for entry in batch]
    texts = [text if captions else cache.empty for _, text in read]
    return torch.stack([latent for latent, _ in read]), stack_texts(texts), [entry.name for entry in batch]


def _predict(
    ensemble: Ensemble, data: tuple[torch.Tensor, list[Text], list[str]], t: int, prediction: str,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Prediction and target; the noise of a picture at a timestep is always the same."""
    latents, texts, names = data
    noise = torch.stack([
        torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(zlib.crc32(f"{name}/{t}".encode())))
        for name in names
    ])  # fmt: skip
    alphas = alphas_cumprod()[t].expand(len(latents)).to(device)
    noisy, target = add_noise(latents.to(device), noise.to(device), alphas, prediction)
    steps = torch.full((len(latents),), t, device=device)
    return ensemble(noisy, steps, [text.to(device) for text in texts]), target


def write_report(result: Evaluation, folder: Path, title: str) -> str:
    """Writes evaluation.json, .md and (where matplotlib is) .png into ``folder``; returns the text."""
    folder.mkdir(parents=True, exist_ok=True)
    record = json.dumps(result.to_dict(), indent=1)
    write_whole(folder / "evaluation.json", lambda partial: partial.write_text(record, "utf-8"))
    text = "\n".join([f"# {title}", "", result.verdict(), "", *_loss_table(result), "", *_step_table(result), "",
                      *_routing_table(result), ""])  # fmt: skip
    write_whole(folder / "evaluation.md", lambda partial: partial.write_text(text, "utf-8"))
    try:
        write_whole(folder / "evaluation.png", lambda partial: _plot(result, partial, title))
    except ImportError:
        text += "\n(no plot: matplotlib is not installed)"
    return text


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(f'{cell:.4f}' if isinstance(cell, float) else _plain(str(cell)) for cell in cells)} |"


def _plain(text: str) -> str:
    """Markdown that shows a name as it is: none of its marks is a table's, a style's or a tag's."""
    marks = r"[\\`*\[\]<|~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
    return re.sub(marks, r"\\\g<0>", " ".join(text.split()))


def _loss_table(result: Evaluation) -> list[str]:
    subsets = list(result.subsets)
    head = ["held-out loss", *(f"{s} ({n})" for s, n in result.subsets.items()), "all"]
    rows = [[name, *(result.mean(name, s) for s in subsets), result.mean(name)] for name in result.loss]
    return [_row(head), _row(["---"] * len(head)), *(_row(row) for row in rows)]


def _step_table(result: Evaluation) -> list[str]:
    head = ["loss at timestep", *result.timesteps]
    rows = [[name, *(result.at(name, t) for t in result.timesteps)] for name in result.loss]
    return [_row(head), _row(["---"] * len(head)), *(_row(row) for row in rows)]


def _routing_table(result: Evaluation) -> list[str]:
    head = ["mean weight at", *(f"{model}, {s}" for s in result.subsets for model in result.models), "largest weight"]
    rows = [
        [point, *(f"{w:.2f}" for s in result.subsets for w in result.routing[s][point]), f"{sharp:.2f}"]
        for point, sharp in result.sharpness.items()
    ]
    return [_row(head), _row(["---"] * len(head)), *(_row(row) for row in rows)]


def _plot(result: Evaluation, path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    fig.suptitle(title)
    for name in result.loss:
        values = [result.at(name, t) for t in result.timesteps]
        left.plot(result.timesteps, values, marker="o", label=name, linewidth=2.5 if name == TRAINED else 1)
    left.set(xlabel="timestep", ylabel="held-out loss", yscale="log")
    left.legend(fontsize=7)
    points = list(result.sharpness)
    for s, routing in result.routing.items():
        right.plot(points, [routing[point][0] for point in points], marker="o", label=s)
    right.set(ylabel=f"mean weight of {result.models[0]}", ylim=(0, 1))
    right.tick_params(axis="x", rotation=90, labelsize=7)
    right.legend(fontsize=7, title="subset")
    fig.savefig(path, format="png", dpi=110)
    plt.close(fig)
