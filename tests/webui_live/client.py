"""Asking the WebUI's API, with the standard library."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from lib_fusion.requests.presets import PAPER
from lib_fusion.requests.settings import EXPERT_PARAMETERS, HOST_OPTIONS

TITLE = "Denoiser Fusion"
PLAIN = {key: PAPER[key] for key in ("snb_hold", "snb_from", "guidance")}
PICTURE = {"prompt": "a (red:1.2) cat, in a hat", "negative_prompt": "dog", "steps": 4, "width": 128, "height": 128,
           "seed": 1, "sampler_name": "Euler", "cfg_scale": 5}  # fmt: skip


DEFAULTS = {f"denoiser_fusion_{key}": row.default for key, row in HOST_OPTIONS.items()}


class RefusedError(Exception):
    """The host has answered with an error."""

    def __init__(self, status: int, answer: dict[str, Any]) -> None:
        self.status, self.answer = status, answer
        super().__init__(f"{status}: {answer.get('detail') or answer.get('errors')}")


@dataclass
class Pictures:
    """The answer to one generation: pixels uint8 (H,W,3) of each picture, and their infotexts.

    ``first`` is what the host has put before the pictures, a grid.
    """

    pixels: list[np.ndarray]
    infotexts: list[str]
    params: dict[str, Any] = field(default_factory=dict)
    first: np.ndarray | None = None

    def same_as(self, other: Pictures) -> bool:
        pairs = list(zip(self.pixels, other.pixels))
        return len(self.pixels) == len(other.pixels) and all(np.array_equal(a, b) for a, b in pairs)


class Client:
    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, body: dict | None = None, **query: Any) -> Any:
        """GET, or POST of ``body``; raises RefusedError for any status but 200."""
        url = self.url + path + ("?" + urllib.parse.urlencode(query) if query else "")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RefusedError(error.code, json.loads(error.read() or b"{}")) from error

    def draw(self, fusion: Any = None, *, model: str | None = None, img2img: Image.Image | None = None,
             args: list | None = None, settings: dict | None = None, others: dict[str, list] | None = None,
             **changes: Any) -> Pictures:  # fmt: skip
        """Pictures with ``fusion`` as the script's one argument (or ``args`` as all of them).

        ``others``: arguments of other extensions' scripts, whose own pictures, after the real ones, are left out.
        """
        body = PICTURE | changes
        if fusion is not None or args is not None:
            body["alwayson_scripts"] = {TITLE: {"args": args if args is not None else [fusion]}}
        if others:
            body["alwayson_scripts"] = {k: {"args": v} for k, v in others.items()} | body.get("alwayson_scripts", {})
        if model:
            body["override_settings"] = {"sd_model_checkpoint": f"{model}.safetensors"}
        if img2img is not None:
            body["init_images"] = [encode(img2img)]
        with self.settings(settings or {}):
            answer = self.ask("/sdapi/v1/img2img" if img2img is not None else "/sdapi/v1/txt2img", body)
        info = json.loads(answer["info"])
        start = info["index_of_first_image"]
        pixels = [decode(text) for text in answer["images"]]
        first = pixels[0] if start else None
        if others:
            pixels = pixels[: start + body.get("batch_size", 1) * body.get("n_iter", 1)]
        return Pictures(pixels[start:], info["infotexts"][start:], info["extra_generation_params"], first)

    def settings(self, values: dict) -> _Settings:
        return _Settings(self, values)

    def state(self) -> dict:
        return self.ask("/probe/state")

    def fusion(self) -> dict:
        return self.ask("/probe/fusion")


def as_set(value: Any) -> Any:
    """A setting as it was set: the host's API lists integers as floats, with which its Hypertile fails."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class _Settings:
    """Settings of the host for a while. Its own override_settings would leave some of them changed."""

    def __init__(self, client: Client, values: dict) -> None:
        self.client, self.values = client, values

    def __enter__(self) -> None:
        if self.values:
            known = self.client.ask("/sdapi/v1/options")
            # A fork does not list ours.
            self.before = {key: as_set(known.get(key, DEFAULTS.get(key))) for key in self.values}
            self.client.ask("/sdapi/v1/options", self.values)

    def __exit__(self, *_: object) -> None:
        if self.values:
            self.client.ask("/sdapi/v1/options", self.before)


def encode(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decode(text: str) -> np.ndarray:
    """Pixels uint8 (H,W,3) of a picture as the API gives it."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def expert(name: str, **more: Any) -> dict[str, Any]:
    """An API dict with one expert, by the paper's rule where ``more`` says nothing else.

    Keys of an expert go into it, the rest stay outside.
    """
    own = {row.key: more.pop(row.key) for row in EXPERT_PARAMETERS if row.key in more}
    return {"experts": [{"checkpoint": name, **own}], **PLAIN, **more}
