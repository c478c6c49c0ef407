"""A canvas for an expert's mask: a picture, and what is painted on it, by whichever component the host's page has."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import gradio as gr

#: Of the strokes on a canvas, on any picture.
BRUSH = "#ff7f0e"
HEIGHT = 360
#: Gradio 4 has no sketching on pictures in one component any more; the hosts that use it bring their own canvas.
HAS_SKETCH = int(gr.__version__.split(".")[0]) < 4


@dataclass
class Canvas:
    """``picture`` takes what is painted on, as a data URL; ``painted`` is what a script gets."""

    picture: Any
    painted: Any

    @property
    def parts(self) -> list[Any]:
        """The components, each once."""
        return [self.picture] if self.picture is self.painted else [self.picture, self.painted]


def brush_width(canvas: Any) -> int:
    """Half of what a host's canvases begin with; a unit is 4 pixels of the picture in one, 20 of the page in others."""
    return max(1, inspect.signature(canvas).parameters["scribble_width"].default // 2)


def make_canvas(label: str, elem_id: str) -> Canvas:
    """Builds a canvas in the open block."""
    if HAS_SKETCH:
        image = gr.Image(label=label, source="upload", tool="sketch", type="pil", height=HEIGHT, brush_color=BRUSH,
                         elem_id=elem_id)  # fmt: skip
        canvas = Canvas(image, image)
    else:
        from modules_forge.forge_canvas.canvas import ForgeCanvas

        forge = ForgeCanvas(
            height=HEIGHT, scribble_color=BRUSH, scribble_color_fixed=True, scribble_width=brush_width(ForgeCanvas),
            scribble_alpha_fixed=True, scribble_softness_fixed=True, elem_id=elem_id,
        )  # fmt: skip
        canvas = Canvas(forge.background, forge.foreground)
    for part in canvas.parts:
        part.do_not_save_to_config = True
    return canvas
