"""The conditions of a step as Forge's backend has them: one for each part of a prompt, with a row for each picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from backend.sampling.condition import Condition, ConditionCrossAttn, compile_conditions, compile_weighted_conditions
from modules import prompt_parser

from lib_fusion.fusion.crops import Box
from lib_fusion.fusion.rows import take
from lib_fusion.unet.vector import NUMBERS, crop_vector

#: The mark's name among the arguments of a U-Net call.
PART = "fusion_part"
#: An expert's text states and vector in the base's conditions, for models in lockstep.
TEXT, VECTOR = "fusion_text_{}", "fusion_vector_{}"


class Part:
    """Says of a condition which part of the prompt it is; the host carries it into every call, however it batches.

    It stays in Python, so that nobody waits for the device to read it.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def process_cond(self, **_: Any) -> Part:
        return self

    def can_concat(self, other: Part) -> bool:
        return True

    def concat(self, others: Sequence[Part]) -> list[int]:
        return [self.number, *(other.number for other in others)]


@dataclass
class Parts:
    """One model's conditions in a step: those of the prompt's AND parts, and without the prompt, or None."""

    cond: list[dict[str, Any]]
    uncond: list[dict[str, Any]] | None

    @classmethod
    def encoded(cls, cond: Any, uncond: Any, step: int) -> Parts:
        """From the prompt parser's schedules, at a step."""
        weights, states = prompt_parser.reconstruct_multicond_batch(cond, step)
        without = None if uncond is None else compile_conditions(prompt_parser.reconstruct_cond_batch(uncond, step))
        return cls(compile_weighted_conditions(states, weights), without)

    def __iter__(self) -> Any:
        return iter([*self.cond, *(self.uncond or [])])

    @property
    def weights(self) -> list[float]:
        return [float(item.get("strength", 1.0)) for item in self.cond]

    def copy(self) -> Parts:
        def copies(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [{**item, "model_conds": dict(item["model_conds"])} for item in items]

        return Parts(copies(self.cond), None if self.uncond is None else copies(self.uncond))

    def marked(self) -> Parts:
        """The same with numbered parts: those of the prompt from 0, then the one without it."""
        result = self.copy()
        for number, item in enumerate(result):
            item["model_conds"][PART] = Part(number)
        return result

    def like(self, other: Parts) -> Parts:
        """The same texts with all else that another model's conditions have: ControlNet, a masked picture's latent."""
        result = self.copy()
        for own, its in zip(result, other):
            for key, value in its.items():
                own.setdefault(key, value)
            for key, value in its["model_conds"].items():
                own["model_conds"].setdefault(key, value)
        return result

    def within(self, box: Box, kind: str, corner: tuple[int, int]) -> Parts:
        """The same for a box of the latents, by the backend's own areas; SDXL's vector says which part it is.

        ``kind``: of the U-Net. ``corner``: the top left (pixels) that the picture is said to have.
        """
        result = self.copy()
        for item in result:
            item["area"] = (box.height, box.width, box.top, box.left)
            if kind in NUMBERS and "y" in item["model_conds"]:
                vector = item["model_conds"]["y"].cond
                item["model_conds"]["y"] = Condition(crop_vector(vector, kind, *box.in_pixels(corner)))
        return result

    def without_control(self) -> Parts:
        result = self.copy()
        for item in result:
            item.pop("control", None)
        return result

    def with_texts(self, others: Sequence[Parts]) -> Parts:
        """The base's conditions, which carry the experts' texts and vectors."""
        result = self.copy()
        for number, other in enumerate(others):
            for own, its in zip(result, other):
                given = its["model_conds"]
                own["model_conds"][TEXT.format(number)] = ConditionCrossAttn(given["c_crossattn"].cond)
                if "y" in given:
                    own["model_conds"][VECTOR.format(number)] = Condition(given["y"].cond)
        return result

    def take(self, pictures: Sequence[int], of: int, has_uncond: bool) -> Parts:
        """Those of some of a batch's pictures (``of`` how many), with the unconditional half or not."""
        if len(pictures) == of and has_uncond == (self.uncond is not None):
            return self
        result = self.copy()
        for item in result:
            for key, value in item["model_conds"].items():
                states = getattr(value, "cond", None)
                if torch.is_tensor(states) and states.ndim and len(states) == of:
                    item["model_conds"][key] = type(value)(take(states, pictures))
        return Parts(result.cond, result.uncond if has_uncond else None)


@dataclass(frozen=True)
class Texts:
    """Text states (R,T,D) and vectors (R,V), or None, of the experts in a call of the models in lockstep."""

    states: list[torch.Tensor]
    vectors: list[torch.Tensor | None]

    @classmethod
    def pop(cls, call: dict[str, Any], experts: int) -> Texts:
        """Takes them out of a call's arguments."""
        return cls([call.pop(TEXT.format(i)) for i in range(experts)],
                   [call.pop(VECTOR.format(i), None) for i in range(experts)])  # fmt: skip


def alike(states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """States (R,T,D) of one length, by the backend's own rule: short ones are repeated."""
    longest = math.lcm(*(value.shape[1] for value in states))
    return [value.repeat(1, longest // value.shape[1], 1) for value in states]
