"""What numbers were chosen by, and what was tried and not built: ``python -m demo.trials`` (an hour on one core).

One picture of each of 16 held-out pairs of an animal and a vehicle, by the default settings for two experts, or with
a half given to each. Scores as in ``demo.assess``; every trial's are kept by name in the folder of results, so that an
interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from demo.assess import Scorer, draw, load_engine, reference_latents
from demo.concepts import CATEGORY_OF
from demo.data import render
from demo.report import table
from demo.scenes import SEEDS, scenes
from lib_fusion.engine.generate import Engine
from lib_fusion.engine.loader import quiet_libraries
from lib_fusion.fusion import crops
from lib_fusion.fusion.session import FusionSession
from lib_fusion.requests.settings import FusionSettings

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs/measurements/trials.md"
MODELS = ("animals", "vehicles")
HEAD = ["trial", "steps", "both sharp", "both near", "rms", "rows"]
INTRODUCTION = """# Trials: what numbers were chosen by, and what was not built

Made by `python -m demo.trials` on the demo's small checkpoints: 16 held-out pairs of an animal and a vehicle, a
picture of each, DDIM, CFG 7.5. *sharp*, *near* and *rms* as in [fusion-rules.md](fusion-rules.md); *rows* as a share of
one model's. A share of 16 pictures has a standard error of about 0.1. **Orders mean something here, sizes nothing.**"""
CONCLUSION = """**Places only** (*Compute places only*) draws both objects as often as whole pictures or more often: no
model sees the other's object outside its box. Two objects appear that were lost in whole pictures, and one animal is
spoilt: in the margin a piece of it was drawn that the place cuts off. A margin of 4 spares one more row in six and
loses more objects. The base is cropped, too: on whole pictures the distance is larger, for more rows. Pictures become
other ones: the first two lines are 25.6 dB apart on average.

**One unconditional half for all models**, the base's, would spare a quarter of the rows above the guidance interval's
end. It was not built: at either scale both objects are sharp less often and further off, although the mask is still
decided with each model's own half."""
Change = Callable[[Engine], Any]


@dataclass(frozen=True)
class Trial:
    """A line of the table. ``has_places``: each model has its half; ``change``: a context in which it is drawn."""

    title: str
    cfg: float
    steps: int = 25
    has_places: bool = True
    values: Mapping[str, Any] = field(default_factory=dict)
    change: Change | None = None


@contextmanager
def one_uncond(engine: Engine) -> Iterator[None]:
    """Once the mask is decided, experts have the base's unconditional half in the place of their own."""
    own, last = engine._predict, {}

    def predict(session: FusionSession, texts: Any, inputs: torch.Tensor, t: torch.Tensor, alpha: float,
                models: Sequence[int], rows: Sequence[int], *box: Any) -> torch.Tensor:  # fmt: skip
        output = own(session, texts, inputs, t, alpha, models, rows, *box)
        for place, row in enumerate(rows):
            if row >= len(inputs) // 2 and models[0] == 0:
                last[row] = output[place]
            elif row >= len(inputs) // 2 and float(t) <= session.settings.snb_hold:
                output[place] = last[row]
        return output

    with mock.patch.object(engine, "_predict", predict):
        yield


@contextmanager
def small_margin(_: Engine) -> Iterator[None]:
    """A margin of 4, which the demo's U-Nets with two halvings can have."""
    with mock.patch.object(crops, "MARGIN", 4), mock.patch.object(crops, "STEP", 4):
        yield


@contextmanager
def experts_only(engine: Engine) -> Iterator[None]:
    """The base sees the whole picture."""
    make = crops.Crops._make

    def without_base(self: crops.Crops, models: Sequence[int], size: Sequence[int]) -> dict[int, crops.Box]:
        return {model: box for model, box in make(self, models, size).items() if model}

    with small_margin(engine), mock.patch.object(crops.Crops, "_make", without_base):
        yield


CROP, SHARP = {"place_crop": True}, {"place_feather": 0}
TRIALS = (
    Trial("a half each, whole pictures", 7.5),
    Trial("a half each, places only", 7.5, values=CROP),
    Trial("sharp edges, whole pictures", 7.5, values=SHARP),
    Trial("sharp edges, places only", 7.5, values={**SHARP, **CROP}),
    Trial("sharp edges, places only, margin 4", 7.5, values={**SHARP, **CROP}, change=small_margin),
    Trial("the same, the base on whole pictures", 7.5, values={**SHARP, **CROP}, change=experts_only),
    Trial("default", 7.5, 50, has_places=False),
    Trial("default, one unconditional half", 7.5, 50, has_places=False, change=one_uncond),
    Trial("default, CFG 4", 4.0, has_places=False),
    Trial("default, CFG 4, one unconditional half", 4.0, has_places=False, change=one_uncond),
)


def measure(trial: Trial, scorer: Scorer) -> tuple[list[dict[str, float]], float]:
    """The scores of all pictures, and the rows as a share of one unskipped model's."""
    engine, sessions, scores = load_engine(*MODELS), [], []

    class Session(FusionSession):
        def __post_init__(self) -> None:
            super().__post_init__()
            sessions.append(self)

    pairs = [(scene, SEEDS[0] + i) for vertical in (False, True)
             for i, scene in enumerate(s for s in scenes(4) if s.vertical == vertical)]  # fmt: skip
    with ExitStack() as stack:
        if trial.change:
            stack.enter_context(trial.change(engine))
        for vertical in (False, True):
            for first in (False, True):
                group = [pair for pair in pairs if pair[0].vertical == vertical
                         and (CATEGORY_OF[pair[0].first] == MODELS[1]) == first]  # fmt: skip
                place = f"{'rows' if vertical else 'columns'} 1:1 {1 if first else 2}"
                expert = {"checkpoint": MODELS[1], **({"place": place} if trial.has_places else {})}
                fusion = FusionSettings.from_dict({"experts": [expert], **trial.values})
                z = draw(
                    engine,
                    [scene.caption for scene, _ in group],
                    [seed for _, seed in group],
                    (256, 128) if vertical else (128, 256),
                    trial.cfg,
                    fusion,
                    steps=trial.steps,
                    session=Session,
                )
                scores += [scorer.scene(latent, scene) for (scene, _), latent in zip(group, z, strict=True)]
    return scores, sum(sum(session.rows) for session in sessions) / (2 * trial.steps * len(scores))


def summary(trial: Trial, scores: Sequence[dict[str, float]], rows: float) -> list[object]:
    def mean(key: str) -> float:
        return sum(score[key] for score in scores) / len(scores)

    far = (mean("rms animals") + mean("rms vehicles")) / 2
    return [trial.title, trial.steps, mean("both"), mean("both rms"), f"{far:.3f}", f"{rows:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo.trials", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "data-cache", help="where demo.train keeps the pictures")
    parser.add_argument("--results", type=Path, default=HERE / "state", help="where the JSON files are kept")
    args = parser.parse_args()
    quiet_libraries()
    render(args.data)
    args.results.mkdir(parents=True, exist_ok=True)
    scorer, lines = Scorer(reference_latents(load_engine("general"), args.data)), []
    for trial in TRIALS:
        path = args.results / f"trial {trial.title}.json"
        if not path.exists():
            path.write_text(json.dumps(measure(trial, scorer)), "utf-8")
        lines.append(summary(trial, *json.loads(path.read_text("utf-8"))))
        print(*lines[-1], flush=True)
    PAGE.write_text(f"{INTRODUCTION}\n\n{table(HEAD, lines)}\n\n{CONCLUSION}\n", "utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
