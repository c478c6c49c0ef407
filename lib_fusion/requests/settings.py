"""The one table of parameters. Panel, API, infotext, XYZ plot, presets and command line all derive from its rows.

A row says what a value may be, reads it from JSON or text (``read``), writes it as text (``show``), and carries the
words for people. ``FusionSettings`` is a validated set of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, make_dataclass
from typing import Any

from lib_fusion.errors import SettingError

TIMESTEPS = 1000
#: The most characters of a text, such as an expert's prompt.
LONGEST_TEXT = 10_000


@dataclass(frozen=True)
class Parameter:
    """One row: ``key`` in the API, ``label`` in the panel and (after "Fusion ") in infotext and XYZ, ``--key`` as flag.

    ``kind`` is one of bool, int, float, choice, text, window; numbers lie in ``low..high`` inclusive; ``step`` is the
    slider's; ``where`` names the surfaces that have the row: "panel" (with API, infotext, XYZ), "cli".
    """

    key: str
    kind: str
    default: Any
    label: str
    help: str
    low: float = -math.inf
    high: float = math.inf
    step: float | None = None
    choices: tuple[str, ...] = ()
    where: tuple[str, ...] = ("panel", "cli")
    multiple_of: int = 1

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")

    @property
    def infotext(self) -> str:
        return f"Fusion {self.label}"

    @property
    def allowed(self) -> str:
        """What a value may be, for help texts and errors."""
        if self.kind == "bool":
            return "allowed: true or false"
        if self.kind == "choice":
            return f"allowed: {', '.join(self.choices)}"
        if self.kind == "window":
            return f"allowed: START:END, timesteps with {self.high:g} >= START >= END >= {self.low:g}"
        if self.kind == "text":
            return f"allowed: text of at most {LONGEST_TEXT} characters that UTF-8 has, without null"
        number = "a whole number" if self.kind == "int" else "a number"
        multiple = f" divisible by {self.multiple_of}" if self.multiple_of > 1 else ""
        limits = [f"at least {self.low:g}"] if self.low > -math.inf else []
        limits += [f"at most {self.high:g}"] if self.high < math.inf else []
        return f"allowed: {number}{multiple}{' ' if limits else ''}{' and '.join(limits)}"

    def read(self, value: Any, field_name: str | None = None) -> Any:
        """The value in its own type, from JSON, the command line or infotext; raises SettingError."""
        try:
            result = _READERS[self.kind](self, value)
        except (TypeError, ValueError, OverflowError) as error:
            raise SettingError(field_name or self.key, value, self.allowed) from error
        return result

    def show(self, value: Any) -> str:
        """The value as text that ``read`` takes back."""
        if self.kind == "window":
            return ":".join(map(_number, value))
        return _number(value) if self.kind == "float" else str(value)


def _number(value: float) -> str:
    """The shorter of two ways to write a number, if it says the same."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _refuse(condition: bool) -> None:
    if condition:
        raise ValueError


def _read_bool(_: Parameter, value: Any) -> bool:
    text = str(value).strip().lower() if isinstance(value, (bool, str)) else ""
    _refuse(text not in ("true", "false"))
    return text == "true"


def _read_number(row: Parameter, value: Any) -> float | int:
    _refuse(isinstance(value, bool) or not isinstance(value, (int, float, str)))
    number = float(value)
    _refuse(not math.isfinite(number) or not row.low <= number <= row.high)
    if row.kind == "int":
        _refuse(number != int(number) or int(number) % row.multiple_of != 0)
        return int(number)
    return number


def _read_choice(row: Parameter, value: Any) -> str:
    _refuse(isinstance(value, bool) or not isinstance(value, (str, int)))
    by_name = {choice.lower(): choice for choice in row.choices}
    name = str(value).strip().lower()
    _refuse(name not in by_name)
    return by_name[name]


def _read_text(_: Parameter, value: Any) -> str:
    _refuse(not isinstance(value, str) or len(value) > LONGEST_TEXT or "\0" in value)
    value.encode()  # half a surrogate pair, which JSON can say, can be neither tokenised nor saved
    return value


def _read_window(row: Parameter, value: Any) -> tuple[float, float]:
    parts = value.split(":") if isinstance(value, str) else list(value)
    _refuse(len(parts) != 2 or any(isinstance(part, bool) for part in parts))
    start, end = (float(part) for part in parts)
    _refuse(not (row.high >= start >= end >= row.low))
    return start, end


_READERS: dict[str, Callable[[Parameter, Any], Any]] = {
    "bool": _read_bool, "int": _read_number, "float": _read_number, "choice": _read_choice, "text": _read_text,
    "window": _read_window,
}  # fmt: skip


#: Rows of one expert; the panel has a block of them for each.
EXPERT_PARAMETERS: tuple[Parameter, ...] = (
    Parameter("checkpoint", "text", "", "checkpoint",
              "The expert's checkpoint; the base's own name is allowed and loads nothing twice."),
    Parameter("prompt", "text", "", "prompt", "The expert's own prompt; empty: the picture's."),
    Parameter("negative_prompt", "text", "", "negative prompt",
              "The expert's own negative prompt; empty: the picture's."),
    Parameter("text_encoder", "choice", "own", "text encoder",
              "Whose text encoder reads the expert's prompts: its own, or the base's as in MagicFusion's code.",
              choices=("own", "base")),
    Parameter("loras", "bool", False, "LoRAs", "Whether the LoRAs of the picture's prompt also act on this expert.",
              where=("panel",)),
)  # fmt: skip

#: FreeU's published factors by version: what the authors' repository recommends now (2) and what it did at first (1).
#: For SDXL in version 1 they are Nasir Khalid's, whom it links to.
FREEU_PUBLISHED_ROWS = ("freeu_b1", "freeu_b2", "freeu_s1", "freeu_s2")
FREEU_PUBLISHED: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "SD1.4": {"1": (1.2, 1.4, 0.9, 0.2), "2": (1.3, 1.4, 0.9, 0.2)},
    "SD1.5": {"1": (1.2, 1.4, 0.9, 0.2), "2": (1.5, 1.6, 0.9, 0.2)},
    "SD2.1": {"1": (1.1, 1.2, 0.9, 0.2), "2": (1.4, 1.6, 0.9, 0.2)},
    "SDXL": {"1": (1.1, 1.2, 0.6, 0.4), "2": (1.3, 1.4, 0.9, 0.2)},
}
#: What "Auto" takes, by the U-Net's kind (``checkpoint.unet_kind``).
FREEU_AUTO = {"sd1": "SD1.5", "sd2": "SD2.1", "sdxl": "SDXL", "sdxl-refiner": "SDXL"}
#: FreeU's stages as the channels of h in multiples of the model's: 1280, 640 and 320 in SD1, SD2 and SDXL.
FREEU_STAGES = {1: 4, 2: 2, 3: 1}


def _freeu_stage(stage: int) -> tuple[Parameter, ...]:
    where = f"at stage {stage}, where the features have {FREEU_STAGES[stage]} x the model's channels"
    return (
        Parameter(f"freeu_b{stage}", "float", 1.0, f"FreeU b{stage}", f"Factor of the backbone {where}.",
                  low=-1, high=3, step=0.01),
        Parameter(f"freeu_s{stage}", "float", 1.0, f"FreeU s{stage}",
                  f"Factor of the skip features' low frequencies {where}.", low=-1, high=3, step=0.01),
        Parameter(f"freeu_offset{stage}", "float", 0.0, f"FreeU offset {stage}",
                  "First of the backbone's channels that are scaled, as a part of all.", low=0, high=1),
        Parameter(f"freeu_width{stage}", "float", 0.5, f"FreeU width {stage}",
                  "How many of the backbone's channels are scaled, as a part of all; on past the end to the first.",
                  low=0, high=1),
        Parameter(f"freeu_high{stage}", "float", 1.0, f"FreeU high {stage}",
                  "Factor of the skip features' other frequencies.", low=-1, high=3),
        Parameter(f"freeu_cutoff{stage}", "float", 0.0, f"FreeU cutoff {stage}",
                  "Up to which frequency s acts, as a part of the highest; 0: the lowest only, as published.",
                  low=0, high=1),
    )  # fmt: skip


#: Rows of FreeU's factors, which count where the preset is "Custom".
FREEU_CUSTOM: tuple[Parameter, ...] = tuple(row for stage in FREEU_STAGES for row in _freeu_stage(stage))
FREEU_PARAMETERS: tuple[Parameter, ...] = (
    Parameter("freeu", "choice", "Off", "FreeU",
              "Which factors FreeU takes: the published ones for a base model, Auto: those for the loaded one, or "
              "Custom: those given.", choices=("Off", "Auto", *FREEU_PUBLISHED, "Custom")),
    Parameter("freeu_version", "choice", "2", "FreeU version",
              "1: the backbone is scaled evenly. 2 (the CVPR paper): by more where its features are strong.",
              choices=("2", "1")),
    Parameter("freeu_models", "choice", "all", "FreeU models", "Which models FreeU acts on.",
              choices=("all", "base", "experts")),
    Parameter("freeu_start", "float", 0.0, "FreeU start",
              "From which step on: up to 1 a part of the pass's steps, above 1 a number of steps.", low=0, high=1000),
    Parameter("freeu_stop", "float", 1.0, "FreeU stop",
              "Until which step: up to 1 a part of the pass's steps, above 1 a number of steps.", low=0, high=1000),
    Parameter("freeu_smooth", "float", 0.0, "FreeU smooth",
              "How gradually: 0 switches on and off, 1 rises up to the start and falls until the stop.", low=0, high=1),
    *FREEU_CUSTOM,
)  # fmt: skip

#: Ready-made amounts of skipping by forecasts; the first is the rows' own default.
SKIP_PRESETS: dict[str, dict[str, Any]] = {
    "Faithful": {"skip_tolerance": 0.15, "skip_max": 1},
    "Balanced": {"skip_tolerance": 0.15, "skip_max": 2},
    "Fast": {"skip_tolerance": 0.2, "skip_max": 2},
}
#: Rows of adaptive skipping.
SKIP_PARAMETERS: tuple[Parameter, ...] = (
    Parameter("skipping", "choice", "Off", "skipping",
              "Which steps' U-Net calls are left out. Forecast: where their result can be told from before, by an "
              "error that is measured as it goes. Paper: AdaptiveDiffusion's rule, the last result is used again.",
              choices=("Off", "Forecast", "Paper")),
    Parameter("skip_tolerance", "float", 0.15, "skip tolerance",
              "Forecast: how wrong a forecast may be, relative to the guided noise; more skips more, 0 skips nothing.",
              low=0, high=10, step=0.01),
    Parameter("skip_threshold", "float", 0.01, "skip threshold",
              "Paper: how unsteady the latent's course may be; more skips more, 0 skips nothing.",
              low=0, high=1, step=0.005),
    Parameter("skip_max", "int", 0, "skips in a row",
              "The most calls left out in a row; 0: the policy's own, 1 for Forecast and 4 for Paper.",
              low=0, high=8, step=1),
    Parameter("skip_warmup", "int", 4, "skip warm-up", "Forecast: how many steps are computed before any is skipped.",
              low=3, high=1000),
    Parameter("skip_correct", "bool", True, "skip correction",
              "Forecast: whether the next computed call corrects the step that was skipped, for samplers where that is "
              "exact."),
    Parameter("skip_passes", "choice", "both", "skip passes",
              "In which sampling passes calls are skipped: both, only the first, or only hires fix.",
              choices=("both", "first", "hires"), where=("panel",)),
)  # fmt: skip

#: Rows of the fusion itself.
PARAMETERS: tuple[Parameter, ...] = (
    Parameter("method", "choice", "SNB", "method",
              "SNB: each position from the most salient model. Average: the mean of all models' noises. "
              "AFA: features of all models, aggregated block by block with trained attention maps. "
              "Mask: the first expert where a given picture is white.",
              choices=("SNB", "Average", "AFA", "Mask")),
    Parameter("snb_window", "window", (1000.0, 0.0), "window",
              "Timesteps in which the models are fused, from START down to END (1000 is pure noise, 0 the picture).",
              low=0, high=TIMESTEPS),
    Parameter("snb_outside", "choice", "base", "outside",
              "What acts outside the window: the base alone, the first expert alone, or the average of all models' "
              "noises.", choices=("base", "expert", "average")),
    Parameter("k_general", "float", 1.0, "k general", "How peaked the base's saliency map is.",
              low=0, high=1000, step=0.1),
    Parameter("k_expert", "float", 1.0, "k expert", "How peaked the experts' saliency maps are.",
              low=0, high=1000, step=0.1),
    Parameter("snb_saliency", "choice", "own", "saliency",
              "own: each model's prompt against its own empty prompt (the paper). "
              "code: against the base's empty prompt (the official code).", choices=("own", "code")),
    Parameter("snb_hold", "float", 0.0, "mask hold",
              "The saliency mask is accumulated down to this timestep and then held; "
              "0: a new mask at every step (the paper).",
              low=0, high=TIMESTEPS, step=10),
    Parameter("passes", "choice", "both", "passes",
              "In which sampling passes all of this acts: both, only the first, or only hires fix.",
              choices=("both", "first", "hires"), where=("panel",)),
    Parameter("refiner", "bool", False, "experts on refiner",
              "Whether the experts go on when the refiner takes over from the base; it must be of their kind.",
              where=("panel",)),
    *FREEU_PARAMETERS,
    *SKIP_PARAMETERS,
)  # fmt: skip

#: The panel's own switch; what the API gives is on unless it says otherwise.
ENABLED = Parameter("enabled", "bool", True, "enabled", "Whether anything is done at all.", where=("panel",))
#: What the panel's button asks for; it is about a run, so it is in no infotext, preset or plot.
COMPARE = Parameter("compare", "bool", False, "compare",
                    "Draw the base and every expert alone, too, with the same seeds, and put all in one grid.",
                    where=("panel",))  # fmt: skip

#: How many experts the panel and the API take.
MAX_EXPERTS = 3

#: Rows of AFA; the window, what runs outside it, and the passes are SNB's.
AFA_PARAMETERS: tuple[Parameter, ...] = (
    Parameter("afa_aggregator", "text", "", "aggregator",
              "The file of trained aggregators; it says which models it is for, the base first."),
    Parameter("afa_maps", "choice", "trained", "AFA maps",
              "trained: the aggregator file's. uniform: the plain mean of all features, no training in it. "
              "only base, only expert 1 ..: one model alone in AFA's pipeline, for comparison.",
              choices=("trained", "uniform", "only base", *(f"only expert {i + 1}" for i in range(MAX_EXPERTS)))),
    Parameter("afa_force", "bool", False, "force aggregator",
              "Use the aggregator with other checkpoints than those it was trained for."),
)  # fmt: skip
PARAMETERS += AFA_PARAMETERS

#: Pictures about a picture. Each is a setting of the WebUI, and a word after ``--previews``.
PREVIEW_PARAMETERS: tuple[Parameter, ...] = (
    Parameter("masks", "bool", False, "Show after each picture which model drew what",
              "SNB: the saliency masks at four steps", where=()),
    Parameter("skips", "bool", False, "Show after each picture which steps were skipped",
              "skipping: which steps ran which model, with the estimated error and its limit", where=()),
    Parameter("weights", "bool", False, "Show after each picture how AFA weighed the models",
              "AFA: each model's mean weight, by block and by step", where=()),
    Parameter("maps", "bool", False, "Show after each picture some of AFA's attention maps",
              "AFA: the attention maps of some blocks at some steps", where=()),
)  # fmt: skip
PREVIEWS = tuple(row.key for row in PREVIEW_PARAMETERS)
#: Rows of the preview "maps".
MAP_PARAMETERS: tuple[Parameter, ...] = (
    Parameter("map_blocks", "text", "", "Attention maps: blocks",
              "The U-Net's blocks whose maps are shown, such as input_blocks.4 middle_block out; empty: four of them.",
              where=("cli",)),
    Parameter("map_timesteps", "text", "1000 700 400 100", "Attention maps: timesteps",
              "A map is shown at the first step at or below each of these timesteps.", where=("cli",)),
)  # fmt: skip


#: Rows of a generation with the embedded engine; in the WebUI they are the host's own.
GENERATION_PARAMETERS: tuple[Parameter, ...] = (
    Parameter("negative_prompt", "text", "", "negative prompt", "What the picture should not show.", where=("cli",)),
    Parameter("width", "int", 512, "width", "Width of the picture in pixels.", 64, 4096,
              multiple_of=8, where=("cli",)),
    Parameter("height", "int", 512, "height", "Height of the picture in pixels.", 64, 4096,
              multiple_of=8, where=("cli",)),
    Parameter("steps", "int", 50, "steps", "Denoising steps.", 1, 1000, where=("cli",)),
    Parameter("sampler", "choice", "DDIM", "sampler", "How a step is taken.", where=("cli",),
              choices=("DDIM", "Euler", "Euler Karras", "DPM++ 2M", "DPM++ 2M Karras")),
    Parameter("cfg_scale", "float", 7.5, "CFG scale", "Classifier-free guidance scale; 1 is none.", 1, 100,
              where=("cli",)),
    Parameter("seed", "int", 0, "seed", "Seed of the first picture; each further one takes the next.", 0, 2**32 - 1,
              where=("cli",)),
    Parameter("count", "int", 1, "count", "Pictures of each prompt.", 1, 1000, where=("cli",)),
    Parameter("batch_size", "int", 4, "batch size", "Pictures denoised at a time.", 1, 64, where=("cli",)),
)  # fmt: skip


def read_rows(rows: Iterable[Parameter], values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Validated values of all ``rows``, defaults where ``values`` has no such key; unknown keys raise SettingError."""
    rows = list(rows)
    known = {row.key for row in rows}
    for key in values:
        if key not in known:
            raise SettingError(f"{prefix}{key}", values[key], f"no such setting; there are: {', '.join(sorted(known))}")
    return {row.key: row.read(values.get(row.key, row.default), f"{prefix}{row.key}") for row in rows}


@dataclass(frozen=True)
class ExpertSettings:
    """One expert; fields as in EXPERT_PARAMETERS."""

    checkpoint: str
    prompt: str = ""
    negative_prompt: str = ""
    text_encoder: str = "own"
    loras: bool = False


@dataclass(frozen=True)
class GenerationSettings:
    """What to draw; fields as in GENERATION_PARAMETERS, and the prompts."""

    prompts: tuple[str, ...]
    negative_prompt: str = ""
    width: int = 512
    height: int = 512
    steps: int = 50
    sampler: str = "DDIM"
    cfg_scale: float = 7.5
    seed: int = 0
    count: int = 1
    batch_size: int = 4

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationSettings:
        """From a dict with ``prompts`` and any of the rows; raises SettingError naming the field."""
        prompts = tuple(values.get("prompts") or ())
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise SettingError("prompt", list(prompts), "allowed: at least one text")
        rest = {key: value for key, value in values.items() if key != "prompts"}
        return cls(prompts=prompts, **read_rows(GENERATION_PARAMETERS, rest))


_Rows = make_dataclass("_Rows", [(row.key, Any, row.default) for row in PARAMETERS], frozen=True)


@dataclass(frozen=True)
class FusionSettings(_Rows):
    """A validated set of values: one field for each of PARAMETERS, and the experts."""

    experts: tuple[ExpertSettings, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FusionSettings:
        """From an API dict or parsed flags: every key optional; raises SettingError naming the field."""
        if not isinstance(values, Mapping):
            raise SettingError("settings", values, "allowed: an object of settings")
        experts = values.get("experts", ())
        if isinstance(experts, (str, Mapping)) or not isinstance(experts, Iterable):
            raise SettingError("experts", experts, "allowed: a list of objects")
        read = []
        for i, expert in enumerate(experts):
            if not isinstance(expert, Mapping):
                raise SettingError(f"experts[{i}]", expert, "allowed: an object with a checkpoint")
            read.append(ExpertSettings(**read_rows(EXPERT_PARAMETERS, expert, f"experts[{i}].")))
        rest = {key: value for key, value in values.items() if key != "experts"}
        rows = read_rows(PARAMETERS, rest)
        for row in FREEU_CUSTOM:
            if rows["freeu"] != "Custom" and rows[row.key] != row.default:
                told = f"allowed with freeu {rows['freeu']}: {row.default:g}; Custom takes others"
                raise SettingError(row.key, rows[row.key], told)
        return cls(experts=tuple(read), **rows)

    @property
    def needs_aggregator(self) -> bool:
        """Whether a file of trained aggregators has to be there."""
        return self.method == "AFA" and self.afa_maps == "trained"

    @property
    def only_model(self) -> int:
        """The model that AFA's maps leave alone: 0 the base, 1 the first expert; 0 too where they leave all."""
        last = self.afa_maps.rpartition(" ")[2]
        return int(last) if last.isdigit() else 0

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON, as ``from_dict`` takes them."""
        rows = {row.key: getattr(self, row.key) for row in PARAMETERS}
        rows["snb_window"] = list(self.snb_window)
        return {"experts": [dict(vars(expert)) for expert in self.experts], **rows}

    @property
    def may_skip(self) -> bool:
        """Whether U-Net calls may be skipped at all."""
        limit = {"Off": 0, "Forecast": self.skip_tolerance, "Paper": self.skip_threshold}
        return limit[self.skipping] > 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is asked for, so that there is nothing to do."""
        names_experts = self.needs_aggregator and bool(self.afa_aggregator)
        return not self.experts and not names_experts and self.freeu == "Off" and self.skipping == "Off"

    def in_window(self, timestep: float) -> bool:
        """Whether the models are fused at this timestep: ``start >= t > end``, and down to 0 where the end is 0."""
        start, end = self.snb_window
        return start > end and timestep <= start and (timestep > end or end == 0)
