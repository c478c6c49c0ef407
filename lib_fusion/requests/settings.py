"""The settings of a generation, as typed and validated values, and the table of parameters derived from them.

Panel, API, infotext, XYZ plot, presets and command line are all built from the table's rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lib_fusion.errors import SettingError
from lib_fusion.requests.parameters import CLI, PANEL, Parameter, read_rows, row, rows_of

TIMESTEPS = 1000
#: How many experts the panel and the API take.
MAX_EXPERTS = 3
#: The checkpoint of an expert that is the base itself, with LoRAs or prompts of its own.
SAME_AS_BASE = "same as base"
#: The most characters of a painted mask in base64.
LONGEST_MASK = 16_000_000
#: Places that are no rectangles: where the expert is salient, its painted mask, and img2img's inpaint mask.
AUTO, PAINTED, INPAINT = "auto", "mask", "inpaint"
#: Rows of an expert that a method can't honour, and why.
UNUSED_ROWS: dict[str, tuple[tuple[str, ...], str]] = {
    "AFA": (("weight", "window", "place"), "its aggregator weighs the models"),
    "Average": (("place",), "all models draw everywhere"),
}

#: FreeU's published factors by version: those that the authors' repository recommends now (2) and its first ones (1).
#: For SDXL in version 1 they are Nasir Khalid's, whom it links to.
FREEU_PUBLISHED_ROWS = ("freeu_b1", "freeu_b2", "freeu_s1", "freeu_s2")
FREEU_PUBLISHED: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "SD1.4": {"1": (1.2, 1.4, 0.9, 0.2), "2": (1.3, 1.4, 0.9, 0.2)},
    "SD1.5": {"1": (1.2, 1.4, 0.9, 0.2), "2": (1.5, 1.6, 0.9, 0.2)},
    "SD2.1": {"1": (1.1, 1.2, 0.9, 0.2), "2": (1.4, 1.6, 0.9, 0.2)},
    "SDXL": {"1": (1.1, 1.2, 0.6, 0.4), "2": (1.3, 1.4, 0.9, 0.2)},
}
#: The factors that "Auto" takes, by the U-Net's kind (``checkpoint.unet_kind``).
FREEU_AUTO = {"sd1": "SD1.5", "sd2": "SD2.1", "sdxl": "SDXL", "sdxl-refiner": "SDXL"}
#: FreeU's stages as the channels of h in multiples of the model's: 1280, 640 and 320 in SD1, SD2 and SDXL.
FREEU_STAGES = {1: 4, 2: 2, 3: 1}

#: Ready-made amounts of skipping by forecasts; the first is the rows' own default.
SKIP_PRESETS: dict[str, dict[str, Any]] = {
    "Faithful": {"skip_tolerance": 0.1, "skip_max": 1},
    "Balanced": {"skip_tolerance": 0.1, "skip_max": 3},
    "Fast": {"skip_tolerance": 0.2, "skip_max": 3},
}


# Rows that FreeU has once for each of its stages.


def _freeu_at(stage: int) -> str:
    return f"at stage {stage}, where the features have {FREEU_STAGES[stage]} x the model's channels"


def _freeu_b(stage: int) -> float:
    help_text = f"Factor of the backbone {_freeu_at(stage)}. More: stronger shapes."
    return row(1.0, f"FreeU backbone b{stage}", help_text, low=-1, high=3, step=0.01, name=f"FreeU b{stage}")


def _freeu_s(stage: int) -> float:
    help_text = f"Factor of the skip features' low frequencies {_freeu_at(stage)}. Less: smoother."
    return row(1.0, f"FreeU skip s{stage}", help_text, low=-1, high=3, step=0.01, name=f"FreeU s{stage}")


def _freeu_offset(stage: int) -> float:
    help_text = "Where the scaled channels of the backbone begin, as a fraction of all."
    return row(0.0, f"FreeU offset {stage}", help_text, low=0, high=1)


def _freeu_width(stage: int) -> float:
    help_text = "Fraction of the backbone's channels that are scaled; wraps around past the last one."
    return row(0.5, f"FreeU width {stage}", help_text, low=0, high=1)


def _freeu_high(stage: int) -> float:
    return row(1.0, f"FreeU high {stage}", "Factor of the skip features' other frequencies.", low=-1, high=3)


def _freeu_cutoff(stage: int) -> float:
    help_text = "Highest frequency that s acts on, as a fraction of all; 0: the lowest only, as published."
    return row(0.0, f"FreeU cutoff {stage}", help_text, low=0, high=1)


def is_within(timestep: float, window: tuple[float, float]) -> bool:
    """Whether a timestep is in a window: ``start >= t > end``, and down to 0 where the end is 0."""
    start, end = window
    return start > end and timestep <= start and (timestep > end or end == 0)


def read_mask_text(value: Any, field_name: str) -> str:
    """A painted mask's base64 text; raises SettingError where it is none."""
    if not isinstance(value, str) or len(value) > LONGEST_MASK:
        raise SettingError(field_name, value, f"allowed: a picture file in base64, at most {LONGEST_MASK} characters")
    return value


def read_previews(value: Any) -> tuple[str, ...] | None:
    """The previews that a request names; None where it leaves them to the WebUI's settings. Raises SettingError."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or any(name not in PREVIEWS for name in value):
        raise SettingError("previews", value, f"allowed: a list of {', '.join(PREVIEWS)}")
    return tuple(value)


@dataclass(frozen=True)
class ExpertSettings:
    """One expert; the panel has a block of these rows for each."""

    # fmt: off
    checkpoint: str = row(
        "", "checkpoint",
        f"The expert's checkpoint; \"{SAME_AS_BASE}\": the picture's own, which is not loaded twice.",
        required=True)
    prompt: str = row(
        "", "prompt",
        "The expert's own prompt; empty, or with nothing but LoRAs in it: the picture's. A LoRA in it, "
        "<lora:NAME:WEIGHT>, acts on this expert alone.")
    negative_prompt: str = row("", "negative prompt", "The expert's own negative prompt; empty: the picture's.")
    text_encoder: str = row(
        "own", "text encoder",
        "Whose text encoder reads the expert's prompts: its own, or the base's as in MagicFusion's code.",
        choices=("own", "base"))
    loras: bool = row(
        False, "takes the picture's LoRAs", "Whether the LoRAs of the picture's prompt also act on this expert.",
        where=PANEL, name="LoRAs")
    weight: float = row(
        1.0, "strength",
        "How strongly the expert draws where it draws. More: more of it; 1 is the expert alone, 0 the base alone.",
        low=0, high=1, step=0.05, name="weight")
    window: tuple[float, float] = row(
        (1000.0, 0.0), "timesteps",
        "When this expert draws: from START (1000: the first step) down to END (0: past the last). START below 1000 "
        "leaves the layout to the base, END above 0 the detail.",
        low=0, high=TIMESTEPS, name="window")
    place: str = row(
        "auto", "place",
        "Where the expert draws; the base draws the rest. auto: where it is salient (SNB). mask: where its painted "
        "mask is white. inpaint: what img2img's inpaint mask repaints. columns 1:1 2: the second of two columns. rows "
        "2:1 1: the first of two rows. 0.5,0,0.5,1: a rectangle (left, top, width, height as parts of the picture); "
        "several with ; between them.")
    #: A painted mask as base64 of a picture file, white where the expert draws; for place ``mask``.
    mask: str = ""
    # fmt: on

    @property
    def is_painted(self) -> bool:
        """Whether the place is a painted mask: ``mask``, ``mask`` and the hash of a kept one, or ``inpaint``."""
        return self.place.strip().lower().partition(" ")[0] == PAINTED or self.uses_inpaint

    @property
    def uses_inpaint(self) -> bool:
        """Whether the place is img2img's inpaint mask."""
        return self.place.strip().lower() == INPAINT

    def in_window(self, timestep: float) -> bool:
        """Whether the expert takes part at this timestep."""
        return is_within(timestep, self.window)


@dataclass(frozen=True)
class FusionSettings:
    """How models are combined: the method, FreeU, skipping, and the experts."""

    # fmt: off
    # The fusion itself.
    method: str = row(
        "SNB", "method",
        "SNB: each part of the picture is drawn by the model whose prompt matters most there; the one to begin with. "
        "Average: the mean of all models' predictions. AFA: the features of all models, combined block by block with "
        "trained attention maps; needs an aggregator that was trained for these models.",
        choices=("SNB", "Average", "AFA"))
    snb_window: tuple[float, float] = row(
        (1000.0, 0.0), "timesteps",
        "When the models are fused: from START (1000: the first step) down to END (0: past the last). Early steps "
        "decide the layout, late ones the detail.",
        low=0, high=TIMESTEPS, name="window")
    snb_outside: str = row(
        "base", "outside these timesteps",
        "Who draws before and after: the base alone, the first expert alone, or the average of all predictions.",
        choices=("base", "expert", "average"), name="outside")
    k_general: float = row(
        1.0, "base mask sharpness",
        "How sharp the base's saliency map is. More: the base keeps its few strongest positions and loses the others.",
        low=0, high=1000, step=0.1, name="k general")
    k_expert: float = row(
        1.0, "expert mask sharpness",
        "How sharp the experts' saliency maps are. More: an expert keeps its few strongest positions and loses the "
        "others.",
        low=0, high=1000, step=0.1, name="k expert")
    snb_saliency: str = row(
        "own", "mask decided by",
        "How it is measured who draws where. own: each model with its prompt against itself without (the paper). "
        "code: each against the base without a prompt (the official code). divergence: each expert against the base, "
        "for experts that were trained from it; with two or more of them the base itself draws nothing.",
        choices=("own", "code", "divergence"), name="saliency")
    snb_hold: float = row(
        900.0, "mask decided until timestep",
        "Down to this timestep it is decided who draws where; then the mask is kept. Less: more steps decide. 0: each "
        "step decides for itself (the paper).",
        low=0, high=TIMESTEPS, step=10, earlier=0.0, name="mask hold")
    snb_from: float = row(
        300.0, "mask used from timestep",
        "From this timestep down each model draws its own part by the kept mask; before, their average draws. More: "
        "parts are sharper and colours harsher. 1000: at once.",
        low=0, high=TIMESTEPS, step=10, earlier=1000.0, name="mask from")
    place_strength: float = row(
        1.0, "place strength",
        "How strictly places are kept. 1: an expert draws in its place and nowhere else. Less: saliency may move its "
        "borders. 0: places do nothing.",
        low=0, high=1, step=0.05)
    place_feather: float = row(
        2.0, "place feather", "How soft the edges of places are, in latent pixels (of 8 pixels each). More: softer.",
        low=0, high=32, step=0.5)
    place_crop: bool = row(
        False, "compute places only",
        "Computes each model only on its place and a margin around it, where that is at most three quarters of the "
        "picture. Saves time, and no model sees what the others draw; the picture becomes another one. With place "
        "strength 1; not with Tiling, Hypertile or ControlNet.",
        name="place crop")
    guidance: str = row(
        "with experts", "guidance interval",
        "Whether the CFG scale is lowered late in a picture, which keeps colours clean and saves time: in pictures "
        "with experts, always, or off.",
        choices=("with experts", "always", "off"), earlier="off")
    guidance_until: float = row(
        400.0, "lower CFG from timestep", "Below this timestep, of 1000 to 0, the CFG scale is lowered. More: earlier.",
        low=0, high=TIMESTEPS, step=10, name="guidance until")
    guidance_after: float = row(
        1.0, "lowered CFG scale",
        "The CFG scale below that timestep, if it is less than the picture's. More: more contrast. At 1 the negative "
        "prompt is not computed there, which saves half of the time.",
        low=1, high=30, step=0.5, name="guidance after")
    passes: str = row(
        "both", "passes", "Which passes are fused: both, only the first, or only hires fix.",
        choices=("both", "first", "hires"), where=PANEL)
    refiner: bool = row(
        False, "experts on refiner",
        "Whether the experts go on when the refiner takes over from the base; it must be of their kind.", where=PANEL)

    # FreeU; the factors of its stages count where the preset is "Custom".
    freeu: str = row(
        "Off", "FreeU",
        "Strengthens structure at no cost. Auto: the published factors for the loaded model. SD1.4 .. SDXL: those for "
        "that one. Custom: your own.",
        choices=("Off", "Auto", *FREEU_PUBLISHED, "Custom"))
    freeu_version: str = row(
        "2", "FreeU version",
        "2 (the CVPR paper): the backbone is scaled by more where its features are strong. 1: evenly.",
        choices=("2", "1"))
    freeu_models: str = row(
        "all", "FreeU acts on", "Which models FreeU acts on.", choices=("all", "base", "experts"), name="FreeU models")
    freeu_start: float = row(
        0.0, "FreeU starting step",
        "When FreeU begins: up to 1 as a part of the steps (0.25: after a quarter), above 1 as a step.",
        low=0, high=1000, name="FreeU start")
    freeu_stop: float = row(
        1.0, "FreeU ending step",
        "When FreeU ends: up to 1 as a part of the steps (1: the last step), above 1 as a step.",
        low=0, high=1000, name="FreeU stop")
    freeu_smooth: float = row(
        0.0, "FreeU fade", "How gradually FreeU begins and ends. 0: at once; more: over more steps.",
        low=0, high=1, name="FreeU smooth")
    freeu_b1: float = _freeu_b(1)
    freeu_s1: float = _freeu_s(1)
    freeu_offset1: float = _freeu_offset(1)
    freeu_width1: float = _freeu_width(1)
    freeu_high1: float = _freeu_high(1)
    freeu_cutoff1: float = _freeu_cutoff(1)
    freeu_b2: float = _freeu_b(2)
    freeu_s2: float = _freeu_s(2)
    freeu_offset2: float = _freeu_offset(2)
    freeu_width2: float = _freeu_width(2)
    freeu_high2: float = _freeu_high(2)
    freeu_cutoff2: float = _freeu_cutoff(2)
    freeu_b3: float = _freeu_b(3)
    freeu_s3: float = _freeu_s(3)
    freeu_offset3: float = _freeu_offset(3)
    freeu_width3: float = _freeu_width(3)
    freeu_high3: float = _freeu_high(3)
    freeu_cutoff3: float = _freeu_cutoff(3)

    # Adaptive skipping.
    skipping: str = row(
        "Off", "skipping",
        "Leaves out U-Net calls to save time. Forecast: predicts results from earlier ones while the measured error is "
        "small. Paper: AdaptiveDiffusion's rule, which uses the last result again.",
        choices=("Off", "Forecast", "Paper"))
    skip_tolerance: float = row(
        0.1, "skip tolerance",
        "Forecast: how wrong a forecast may be, relative to the guided noise. More: more is skipped; 0: nothing.",
        low=0, high=10, step=0.01, earlier=0.15)
    skip_threshold: float = row(
        0.01, "skip threshold",
        "Paper: how unsteady the latent's course may be. More: more is skipped; 0: nothing.",
        low=0, high=1, step=0.005)
    skip_max: int = row(
        0, "most skips in a row",
        "The most calls left out in a row; 0: the policy's own, 1 for Forecast and 4 for Paper.",
        low=0, high=8, step=1, earlier=1, name="skips in a row")
    skip_warmup: int = row(
        4, "steps before skipping", "Forecast: so many steps are computed before any is skipped. More: safer.",
        low=3, high=1000, name="skip warm-up")
    skip_correct: bool = row(
        True, "correct skipped steps",
        "Forecast: whether the next computed result corrects the steps that were skipped, with samplers that allow it.",
        name="skip correction")
    skip_passes: str = row(
        "both", "skip in passes",
        "In which passes calls are skipped: both, only the first, or only hires fix.",
        choices=("both", "first", "hires"), where=PANEL, name="skip passes")

    # AFA; the window, the method outside it, and the passes are SNB's.
    afa_aggregator: str = row(
        "", "aggregator", "The file of trained aggregators, for just the models that it names, the base first.")
    afa_maps: str = row(
        "trained", "AFA maps",
        "trained: those of the aggregator. For comparison: uniform, the plain mean of all features; only base, only "
        "expert 1 ..: one model alone.",
        choices=("trained", "uniform", "only base", *(f"only expert {i + 1}" for i in range(MAX_EXPERTS))))
    afa_force: bool = row(
        False, "force aggregator", "Use the aggregator with other checkpoints than those it was trained for.")

    experts: tuple[ExpertSettings, ...] = ()
    # fmt: on
    #: Which previews are shown after a picture, by their names in PREVIEWS; None: those that the WebUI's settings name.
    previews: tuple[str, ...] | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FusionSettings:
        """Reads an API dict or parsed flags; every key is optional.

        ``experts`` is a list of objects with the rows of ExpertSettings. Raises SettingError, which names the field,
        for unknown keys, for values that are not allowed, and for FreeU factors without the preset "Custom".
        """
        if not isinstance(values, Mapping):
            raise SettingError("settings", values, "allowed: an object of settings")
        experts = values.get("experts", ())
        if isinstance(experts, (str, Mapping)) or not isinstance(experts, Iterable):
            raise SettingError("experts", experts, "allowed: a list of objects")
        read = []
        for i, expert in enumerate(experts):
            if not isinstance(expert, Mapping):
                raise SettingError(f"experts[{i}]", expert, "allowed: an object with a checkpoint")
            mask = read_mask_text(expert.get("mask", ""), f"experts[{i}].mask")
            known = {key: value for key, value in expert.items() if key != "mask"}
            read.append(ExpertSettings(**read_rows(EXPERT_PARAMETERS, known, f"experts[{i}]."), mask=mask))
        previews = read_previews(values.get("previews"))
        rest = {key: value for key, value in values.items() if key not in ("experts", "previews")}
        rows = read_rows(PARAMETERS, rest)
        for factor in FREEU_CUSTOM:
            if rows["freeu"] != "Custom" and rows[factor.key] != factor.default:
                problem = f"allowed with freeu {rows['freeu']}: {factor.default:g}; Custom takes others"
                raise SettingError(factor.key, rows[factor.key], problem)
        settings = cls(experts=tuple(read), previews=previews, **rows)
        settings._check_experts()
        return settings

    def _check_experts(self) -> None:
        """Raises SettingError for rows of experts that the method can't honour, and for masks without their place."""
        unused, reason = UNUSED_ROWS.get(self.method, ((), ""))
        for i, expert in enumerate(self.experts):
            for key in unused:
                found = next(row for row in EXPERT_PARAMETERS if row.key == key)
                if getattr(expert, key) != found.default:
                    allowed = f"allowed with method {self.method}: {found.show(found.default)}; {reason}"
                    raise SettingError(f"experts[{i}].{key}", getattr(expert, key), allowed)
            if expert.mask and (not expert.is_painted or expert.uses_inpaint):
                raise SettingError(f"experts[{i}].place", expert.place, f"allowed with a mask: {PAINTED}")

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON objects and lists, in the form that ``from_dict`` reads."""
        rows = {row.key: getattr(self, row.key) for row in PARAMETERS}
        rows["snb_window"] = list(self.snb_window)
        experts = [{**vars(expert), "window": list(expert.window)} for expert in self.experts]
        return {"experts": [{k: v for k, v in expert.items() if k != "mask" or v} for expert in experts], **rows}

    @property
    def needs_aggregator(self) -> bool:
        """Whether the method requires a file of trained aggregators."""
        return self.method == "AFA" and self.afa_maps == "trained"

    @property
    def only_model(self) -> int:
        """The one model that AFA's maps select: 0 the base, 1 the first expert; also 0 where they select them all."""
        last = self.afa_maps.rpartition(" ")[2]
        return int(last) if last.isdigit() else 0

    @property
    def may_skip(self) -> bool:
        """Whether U-Net calls may be skipped at all."""
        limit = {"Off": 0, "Forecast": self.skip_tolerance, "Paper": self.skip_threshold}
        return limit[self.skipping] > 0

    @property
    def crops(self) -> bool:
        """Whether models may be run on their places only, which SNB keeps where places alone count."""
        has_place = any(expert.place.strip().lower() not in ("", AUTO) for expert in self.experts)
        return self.place_crop and self.place_strength == 1 and self.method == "SNB" and has_place

    @property
    def is_idle(self) -> bool:
        """Whether the settings change nothing: no experts, no FreeU, no skipping, no guidance interval."""
        names_experts = self.needs_aggregator and bool(self.afa_aggregator)
        is_plain = self.freeu == "Off" and self.skipping == "Off" and self.guidance != "always"
        return is_plain and not self.experts and not names_experts

    @property
    def lowers_guidance(self) -> bool:
        """Whether the guidance interval acts."""
        return self.guidance == "always" or (self.guidance == "with experts" and bool(self.experts))

    def in_window(self, timestep: float) -> bool:
        """Whether the models are fused at this timestep."""
        return is_within(timestep, self.snb_window)


@dataclass(frozen=True)
class GenerationSettings:
    """The pictures to draw with the embedded engine; in the WebUI these settings are the host's own."""

    # fmt: off
    prompts: tuple[str, ...]
    negative_prompt: str = row("", "negative prompt", "What the picture should not show.", where=CLI)
    width: int = row(512, "width", "Width of the picture in pixels.", low=64, high=4096, multiple_of=8, where=CLI)
    height: int = row(512, "height", "Height of the picture in pixels.", low=64, high=4096, multiple_of=8, where=CLI)
    steps: int = row(50, "steps", "Denoising steps.", low=1, high=1000, where=CLI)
    sampler: str = row(
        "DDIM", "sampler", "How a step is taken.",
        choices=("DDIM", "Euler", "Euler Karras", "DPM++ 2M", "DPM++ 2M Karras",
                 "Euler a", "DPM++ 2M SDE", "DPM++ 2M SDE Karras"), where=CLI)
    cfg_scale: float = row(
        7.5, "CFG scale", "Classifier-free guidance scale; 1 is none.", low=1, high=100, where=CLI)
    seed: int = row(
        0, "seed", "Seed of the first picture; each further one takes the next.", low=0, high=2**32 - 1, where=CLI)
    count: int = row(1, "count", "Pictures of each prompt.", low=1, high=1000, where=CLI)
    batch_size: int = row(4, "batch size", "Pictures denoised at a time.", low=1, high=64, where=CLI)
    # fmt: on

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationSettings:
        """Reads a dict with ``prompts``, at least one text, and any of the rows.

        Raises SettingError, which names the field, for unknown keys and for values that are not allowed.
        """
        prompts = tuple(values.get("prompts") or ())
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise SettingError("prompt", list(prompts), "allowed: at least one text")
        rest = {key: value for key, value in values.items() if key != "prompts"}
        return cls(prompts=prompts, **read_rows(GENERATION_PARAMETERS, rest))


EXPERT_PARAMETERS = rows_of(ExpertSettings)
PARAMETERS = rows_of(FusionSettings)
GENERATION_PARAMETERS = rows_of(GenerationSettings)
FREEU_PARAMETERS = tuple(row for row in PARAMETERS if row.key.startswith("freeu"))
#: FreeU's factors, one set for each stage.
FREEU_CUSTOM = tuple(row for row in FREEU_PARAMETERS if row.key[-1].isdigit())
SKIP_PARAMETERS = tuple(row for row in PARAMETERS if row.key.startswith("skip"))
AFA_PARAMETERS = tuple(row for row in PARAMETERS if row.key.startswith("afa"))

#: The panel's own switch; settings given through the API are on unless they say otherwise.
ENABLED = Parameter("enabled", "bool", True, "enabled", "Whether Denoiser Fusion is on.", where=PANEL)
#: The panel's comparison button; it belongs to one run, so no infotext, preset or plot has it.
COMPARE = Parameter("compare", "bool", False, "compare",
                    "Draw the base and every expert alone, too, with the same seeds, and put all in one grid.",
                    where=PANEL)  # fmt: skip

#: Pictures about a picture. Each is a setting of the WebUI, and a word after ``--previews``.
PREVIEW_PARAMETERS = (
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
MAP_PARAMETERS = (
    Parameter("map_blocks", "text", "", "Attention maps: blocks",
              "The U-Net's blocks whose maps are shown, such as input_blocks.4 middle_block out; empty: four of them.",
              where=CLI),
    Parameter("map_timesteps", "text", "1000 700 400 100", "Attention maps: timesteps",
              "A map is shown at the first step at or below each of these timesteps.", where=CLI),
)  # fmt: skip
#: Where experts wait while they do not run.
PLACES = ("GPU", "RAM between pictures", "RAM between U-Net calls")
#: The rows of the WebUI's settings page.
HOST_OPTIONS = {
    row.key: row for row in (
        Parameter("cache", "int", 1, "Experts kept in memory between generations",
                  "those of the running generation are always kept", low=0, high=8, step=1, where=()),
        Parameter("place", "choice", PLACES[0], "Where an expert waits", "RAM spares GPU memory and costs time",
                  choices=PLACES, where=()),
        Parameter("paste_switches", "bool", True, "Pasting a fused picture's settings switches the panel on",
                  "and those of a picture made without fusion switch it off", where=()),
        *(replace(row, key=f"preview_{row.key}") for row in (*PREVIEW_PARAMETERS, *MAP_PARAMETERS)),
    )
}  # fmt: skip
