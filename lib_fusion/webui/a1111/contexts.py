"""The host's conditioning of a U-Net call, and an expert's text states put into it. Pure tensor code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lib_fusion.fusion.crops import Box
from lib_fusion.fusion.rows import take
from lib_fusion.unet.vector import NUMBERS, crop_vector

if TYPE_CHECKING:
    from lib_fusion.webui.a1111.conditioning import Conditioning

#: The first token of a context that ControlNet has marked: all of it +-1024.
MARKER = 1024.0


def change_prediction(raw: torch.Tensor, x: torch.Tensor, alpha: float, wanted: str) -> torch.Tensor:
    """A U-Net's output (R,C,H,W) for its input ``x`` (R,C,H,W) as one of the other prediction would have said it.

    ``wanted`` is ``epsilon`` where ``raw`` is v, ``v`` where it is the noise; ``alpha`` in 0..1 is the cumulated alpha
    of the input's noise level. By ``noise = sqrt(alpha) v + sqrt(1 - alpha) x``, in float32.
    """
    a, b = math.sqrt(alpha), math.sqrt(1 - alpha)
    raw, x = raw.float(), x.float()
    return a * raw + b * x if wanted == "epsilon" else (raw - b * x) / a


class Context:
    """An expert's text states (or the host's dict of them) for any run of rows of a step."""

    def __init__(self, conditioning: Conditioning, parser: Any) -> None:
        self.conditioning, self.parser = conditioning, parser

    def at(self, step: int) -> tuple[Any, Any]:
        """Conditional and unconditional states at a step, as the host reconstructs its own."""
        _, cond = self.parser.reconstruct_multicond_batch(self.conditioning.cond, step)
        return cond, self.parser.reconstruct_cond_batch(self.conditioning.uncond, step)

    def slice(self, step: int, chosen: Sequence[int], pad: bool, v0: bool) -> Any:
        """The states of the rows ``chosen``, ascending. Both halves get one length where a call mixes them or it pads.

        ``v0``: by the host's older rule. Anywhere else padding would change the picture.
        """
        cond, uncond = self.at(step)
        num_cond = tokens(cond).shape[0]
        first = [row for row in chosen if row < num_cond]
        second = [row - num_cond for row in chosen if row >= num_cond]
        if tokens(cond).shape[1] != tokens(uncond).shape[1] and (pad or (first and second)):
            cond, uncond = equalize(cond, uncond, self.conditioning.empty, v0)
        if not second:
            return take_states(cond, first)
        if not first:
            return take_states(uncond, second)
        return join(take_states(cond, first), take_states(uncond, second))


def tokens(states: Any) -> torch.Tensor:
    return states["crossattn"] if isinstance(states, dict) else states


def take_states(states: Any, rows: list[int]) -> Any:
    if isinstance(states, dict):
        return {key: take(value, rows) for key, value in states.items()}
    return take(states, rows)


def join(first: Any, second: Any) -> Any:
    if isinstance(first, dict):
        return {key: torch.cat([first[key], second[key]]) for key in first}
    return torch.cat([first, second])


def equalize(cond: Any, uncond: Any, empty: torch.Tensor, v0: bool) -> tuple[Any, Any]:
    """Both halves with one number of tokens, by the host's rules: chunks of the empty prompt, or its older one (v0).

    v0 repeats the unconditional half's last token, or cuts that half.
    """
    wanted, has = tokens(cond).shape[1], tokens(uncond).shape[1]
    if v0:
        short = tokens(uncond)
        longer = torch.cat([short, short[:, -1:].repeat(1, max(wanted - has, 0), 1)], dim=1)
        return cond, _with_tokens(uncond, longer[:, :wanted])

    def pad(states: Any, missing: int) -> Any:
        chunks = empty.to(tokens(states)).repeat(tokens(states).shape[0], missing // empty.shape[1], 1)
        return _with_tokens(states, torch.cat([tokens(states), chunks], dim=1))

    return (pad(cond, has - wanted), uncond) if has > wanted else (cond, pad(uncond, wanted - has))


def put_context(cond: dict[str, Any], states: Any) -> dict[str, Any]:
    """The host's conditioning of one call with other text states in it."""
    if isinstance(states, dict):
        return {**cond, **states}
    return {**cond, "c_crossattn": [states]}


def is_marked(cond: dict[str, Any]) -> bool:
    """Whether the host's conditioning of one call begins with the token by which ControlNet tells the halves apart."""
    states = tokens_of(cond)
    return states.shape[1] > 1 and bool((states[:, 0].abs() == MARKER).all())


def strip_marker(cond: dict[str, Any]) -> dict[str, Any]:
    """The host's conditioning of one call without ControlNet's token.

    Its own U-Net forward takes the token off; an expert's own U-Net does not run that forward.
    """
    return _with_states(cond, tokens_of(cond)[:, 1:]) if is_marked(cond) else cond


def keep_marker(cond: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    """An expert's conditioning of one call, with ControlNet's token where the host's own of the call has it."""
    if not is_marked(call):
        return cond
    states = tokens_of(cond)
    token = tokens_of(call)[:, :1, :1].to(states).expand(-1, 1, states.shape[2])
    return _with_states(cond, torch.cat([token, states], dim=1))


def take_rows(cond: dict[str, Any], chosen: list[int]) -> dict[str, Any]:
    """The host's conditioning of one call, for some of its rows."""
    return {
        key: [take(part, chosen) for part in value] if isinstance(value, list) else take(value, chosen)
        for key, value in cond.items()
    }


def crop_cond(cond: dict[str, Any], box: Box, size: Sequence[int]) -> dict[str, Any]:
    """The host's conditioning of one call, for a box of latents of this size (H, W): an inpainting model's pictures."""

    def cut(value: Any) -> Any:
        return box.cut(value) if torch.is_tensor(value) and value.ndim == 4 and value.shape[-2:] == size else value

    return {key: [cut(part) for part in value] if isinstance(value, list) else cut(value)
            for key, value in cond.items()}  # fmt: skip


def locate(cond: dict[str, Any], kind: str, box: Box, corner: tuple[int, int]) -> dict[str, Any]:
    """SDXL's conditioning of one call with a box in its vector; ``corner``: the top left of the picture (pixels)."""
    if kind not in NUMBERS or "vector" not in cond:
        return cond
    return {**cond, "vector": crop_vector(cond["vector"], kind, *box.in_pixels(corner))}


def tokens_of(cond: dict[str, Any]) -> torch.Tensor:
    """The text states (R,T,D) in the host's conditioning of one call."""
    return cond["crossattn"] if "crossattn" in cond else cond["c_crossattn"][0]


def vector_of(cond: dict[str, Any]) -> torch.Tensor | None:
    """SDXL's vector (R,V) in the host's conditioning of one call."""
    return cond.get("vector")


def pad_alike(states: Sequence[torch.Tensor], empties: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """States (R,T,D) of one length, filled up as the host does: with chunks of each model's empty prompt (1,T,D)."""
    longest = max(value.shape[1] for value in states)
    result = []
    for value, empty in zip(states, empties):
        chunks = empty.to(value).repeat(value.shape[0], (longest - value.shape[1]) // empty.shape[1], 1)
        result.append(torch.cat([value, chunks], dim=1))
    return result


def _with_states(cond: dict[str, Any], states: torch.Tensor) -> dict[str, Any]:
    return {**cond, "crossattn": states} if "crossattn" in cond else {**cond, "c_crossattn": [states]}


def _with_tokens(states: Any, value: torch.Tensor) -> Any:
    return {**states, "crossattn": value} if isinstance(states, dict) else value
