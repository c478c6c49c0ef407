"""What the demo is measured on: scenes that no model was trained on, the methods compared, and the bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from demo.concepts import CATEGORIES, STYLES, is_held_out, scene_caption
from lib_fusion.engine.demo_sheet import ENSEMBLES, afa_settings, average_first
from lib_fusion.requests.presets import PAPER
from lib_fusion.requests.settings import FusionSettings

MODELS = ("general", *CATEGORIES)
LAYOUTS = ("left/right", "swapped", "above/below", "sides not named")
#: An object is right by distance where its latent is closer than this (RMS) to the sharp reference.
RMS_BOUND = 0.6
#: The timestep from which the methods named "mask held" hold SNB's mask.
HOLD = 900.0
CFGS = (4.0, 7.5)
SEEDS = (1001, 2002)
#: Where the models' denoising loss is measured.
TIMESTEPS = (150, 400, 650)


@dataclass(frozen=True)
class Scene:
    """A held-out pair of an animal and a vehicle in one layout; ``first`` stands left or above."""

    first: str
    second: str
    style: str
    layout: str
    vertical: bool

    @property
    def caption(self) -> str:
        words = {"above/below": "above", "sides not named": "and"}.get(self.layout, "left")
        return scene_caption(self.first, self.second, words, self.style)


def scenes(pairs: int) -> list[Scene]:
    """``pairs`` held-out pairs for each of the four layouts, spread over concepts, styles, orders."""
    held = [(a, v) for a in CATEGORIES["animals"] for v in CATEGORIES["vehicles"] if is_held_out(a, v)]
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(5)).tolist()
    result = []
    for i, layout in enumerate(LAYOUTS):
        for n in range(pairs):
            animal, vehicle = held[order[(i * pairs + n) % len(held)]]
            turned = layout == "swapped" or (layout in LAYOUTS[2:] and n % 2 == 1)
            first, second = (vehicle, animal) if turned else (animal, vehicle)
            vertical = layout == "above/below" or (layout == "sides not named" and n % 4 >= 2)
            result.append(Scene(first, second, list(STYLES)[n // 2 % 2], layout, vertical))
    return result


def paper(*experts: str, **changes: Any) -> FusionSettings:
    """The paper's rule for these experts, with some settings changed."""
    return FusionSettings.from_dict({**PAPER, "experts": [{"checkpoint": name} for name in experts], **changes})


def placed(settings: FusionSettings) -> FusionSettings:
    """Settings whose first expert draws in a painted mask, with a sharp edge."""
    first, *others = settings.experts
    return replace(settings, experts=(replace(first, place="mask"), *others), place_feather=0.0)


def methods() -> dict[str, tuple[tuple[str, ...], FusionSettings]]:
    """Name -> (models, settings). A: animals, B: vehicles."""
    two = paper("expert")
    pair = ("animals", "vehicles")
    return {
        "general alone": (("general",), FusionSettings()),
        "A alone": (("animals",), FusionSettings()),
        "B alone": (("vehicles",), FusionSettings()),
        "average A + B": (pair, replace(two, method="Average")),
        "SNB own, A + B": (pair, two),
        "SNB code, A + B": (pair, replace(two, snb_saliency="code")),
        "SNB own, mask held": (pair, replace(two, snb_hold=HOLD)),
        "SNB code, mask held": (pair, replace(two, snb_hold=HOLD, snb_saliency="code")),
        "fixed mask (oracle)": (pair, placed(two)),
        "SNB code, general + A": (("general", "animals"), replace(two, snb_saliency="code")),
        "SNB code, general + B": (("general", "vehicles"), replace(two, snb_saliency="code")),
        "AFA untrained, A + B": (pair, replace(two, method="AFA", afa_maps="uniform")),
    } | {
        f"{name}, {' + '.join(models)}": (models, change(afa_settings(file, models)))
        for file, models in ENSEMBLES.items()
        for name, change in {"AFA": lambda afa: afa, "average, then AFA": average_first}.items()
    }
