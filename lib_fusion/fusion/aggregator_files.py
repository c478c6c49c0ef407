"""Aggregator files: AFA's weights for one ordered list of models, and all that says what they are for.

One ``.safetensors``: tensors ``POINT.NAME`` (points in running order), and in its metadata a card (JSON). A file
belongs to its models in their order: each is known by the hash of its U-Net.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lib_fusion.errors import CheckpointError, FusionError, shorten
from lib_fusion.files import file_version, write_whole
from lib_fusion.fusion.lockstep import sizes_for
from lib_fusion.methods.afa import AggregatorSizes, groups_of
from lib_fusion.unet.checkpoint import Checkpoint
from lib_fusion.unet.lora import Lora
from lib_fusion.unet.model_file import LoraFile, ModelFile

FORMAT = "denoiser-fusion-aggregator"
VERSION = 1
#: Bytes of a hash that are kept, in hexadecimal digits.
HASH_DIGITS = 16
#: The most that a card may tell of, so that no file has us build what no machine holds.
MOST = {"num_models": 16, "context_dim": 8192, "time_dim": 16384, "hidden": 4096, "layers": 64, "heads": 256}
MOST_POINTS, MOST_CHANNELS, LONGEST_NAME = 100, 16384, 200


@dataclass(frozen=True)
class ModelIdentity:
    """One of the models that a file belongs to: its checkpoint's name, the hash of its U-Net, its LoRAs (NAME:WEIGHT).

    The hash alone decides, and counts the LoRAs; the names are for people, and to find the files by.
    """

    name: str
    unet: str
    loras: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Its name for people."""
        return " + ".join([self.name, *self.loras])


@dataclass(frozen=True)
class Card:
    """The models that a file belongs to. ``training``: data, steps, losses and other facts of its training."""

    architecture: str
    prediction: str
    sizes: AggregatorSizes
    models: tuple[ModelIdentity, ...]
    training: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Raises ValueError, KeyError or TypeError for anything that ``to_json`` has not written."""
        try:
            values = dict(json.loads(text))
        except RecursionError as error:
            raise ValueError("nested too deep") from error
        if values.pop("version") != VERSION:
            raise ValueError(f"allowed: version {VERSION}")
        given = dict(values.pop("sizes"))
        sizes = AggregatorSizes(**{**given, "channels": tuple(given["channels"])})
        models = tuple(ModelIdentity(**{**m, "loras": tuple(m.get("loras", ()))}) for m in values.pop("models"))
        card = cls(sizes=sizes, models=models, **values)
        card.check_values()
        return card

    def check_values(self) -> None:
        """Raises ValueError where a value is of another type, or larger, than any file of ours has."""
        limits = [(key, getattr(self.sizes, key), most) for key, most in MOST.items()]
        limits += [("points", len(self.sizes.channels), MOST_POINTS)]
        limits += [("channels", channels, MOST_CHANNELS) for channels in self.sizes.channels]
        for key, value, most in limits:
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{key}: allowed: 1 to {most}")
        groups = groups_of(self.sizes.hidden)
        if not groups or self.sizes.hidden % groups or self.sizes.hidden % self.sizes.heads:
            raise ValueError("hidden: allowed: 4 and more, and what heads and groups divide")
        texts = [self.architecture, self.prediction]
        texts += [text for model in self.models for text in (model.name, model.unet, *model.loras)]
        if not all(isinstance(text, str) and len(text) <= LONGEST_NAME for text in texts):
            raise ValueError(f"names: allowed: texts of at most {LONGEST_NAME} characters")
        if len(self.models) != self.sizes.num_models or not isinstance(self.training, Mapping):
            raise ValueError("models, training: not as many as num_models, or no object")

    def check_models(self, models: Sequence[ModelIdentity], force: bool = False) -> None:
        """Refuses models that the file was not trained for, also those in another order; raises FusionError.

        ``force``: other weights of the same architecture are let through; their number must be right all the same.
        """
        names = ", ".join(model.title for model in self.models)
        given = ", ".join(model.title for model in models)
        if len(models) != self.sizes.num_models:
            wanted = f"{self.sizes.num_models} models ({names})"
            raise FusionError(f"the aggregator is for {wanted}, not {len(models)} ({given})")
        needed, found = ([model.unet for model in group] for group in (self.models, models))
        if needed == found or force:
            return
        if sorted(needed) == sorted(found):
            raise FusionError(f"the aggregator is for its models in the order {names} (base first), not {given}")
        wrong = [f"another file named {a.title}" if a.title == b.title else f"{b.title} in the place of {a.title}"
                 for a, b in zip(self.models, models) if a.unet != b.unet]  # fmt: skip
        problem = f"other U-Nets were given: {', '.join(wrong)} (force lets them through)"
        raise FusionError(f"the aggregator is for {names}; {problem}")

    def describe(self) -> str:
        """A line for people."""
        names = " + ".join(f"({m.title})" if m.loras else m.name for m in self.models)
        sizes = f"N = {self.sizes.num_models}, hidden {self.sizes.hidden}, layers {self.sizes.layers}"
        training = [f"{key} {_short(value)}" for key, value in self.training.items() if not isinstance(value, Mapping)]
        return "; ".join([f"{names} ({self.architecture}, {sizes})", ", ".join(training)])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else shorten(str(value))


def read_card(path: str | Path) -> Card:
    """A file's card; reads its header only. Raises CheckpointError for a file that is something else."""
    return _card_of(Checkpoint.open(path))


def load_aggregators(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Card, nn.ModuleList]:
    """A file's card and its aggregators, ready to run. Raises CheckpointError if it is foreign, truncated or broken."""
    file = Checkpoint.open(path)
    card = _card_of(file)
    with torch.device("meta"):
        aggregators = card.sizes.make()
    wanted = {key: tuple(value.shape) for key, value in aggregators.state_dict().items()}
    if wanted != dict(file.shapes):
        wrong = sorted(key for key in wanted.keys() | file.shapes.keys() if wanted.get(key) != file.shapes.get(key))
        raise CheckpointError(f"{path}: {len(wrong)} tensors are not those that its card lists, such as {wrong[0]}")
    tensors = file.read("", dtype)
    broken = [key for key, value in tensors.items() if not value.is_floating_point() or not value.isfinite().all()]
    if broken:
        raise CheckpointError(f"{path}: {len(broken)} tensors hold values that are not finite, such as {broken[0]}")
    aggregators.load_state_dict(tensors, assign=True)
    return card, aggregators.to(device).eval().requires_grad_(False)


def load_for(
    path: str | Path, unet: nn.Module, models: Sequence[ModelIdentity], predictions: Sequence[str], force: bool = False,
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
) -> nn.ModuleList:  # fmt: skip
    """The aggregators in a file, for these models (base first); raises FusionError where they are not for them.

    ``unet`` is the base's, ``predictions`` are ``epsilon`` or ``v`` of each model.
    """
    card = read_card(path)
    card.check_models(models, force)
    if len({card.prediction, *predictions}) > 1:
        raise FusionError(f"the aggregator is for models that predict {card.prediction}, not {', '.join(predictions)}")
    sizes = card.sizes
    if sizes != sizes_for(unet, sizes.num_models, sizes.hidden, sizes.layers, sizes.heads):
        raise FusionError(f"the aggregator is for {card.architecture} U-Nets of other widths than {models[0].name}'s")
    return load_aggregators(path, dtype, device)[1]


def save_aggregators(
    path: str | Path, card: Card, state: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float16
) -> None:
    """Writes a file; never leaves half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in state.items()}
    write_whole(path, lambda partial: save_file(tensors, partial, {"format": FORMAT, "card": card.to_json()}))


def identify_model(model: str | Path | ModelFile) -> ModelIdentity:
    """A model's name and the hash of its U-Net, by checkpoint and LoRAs; raises CheckpointError."""
    model = ModelFile.of(model)
    name, *loras = (shorten(text, LONGEST_NAME - 3) for text in (model.path.stem, *(lora.name for lora in model.loras)))
    return ModelIdentity(name, model_hash(model, Checkpoint.open(model.path), "unet"), tuple(loras))


def model_hash(model: ModelFile, file: Checkpoint, part: str) -> str:
    """What tells a model's ``unet`` or ``text`` encoders from others: the checkpoint's part, with that of its LoRAs.

    LoRAs that do not change the part, or weigh 0, do not count, nor does their order: they are summed.
    """
    own = part_hash(file, file.unet_prefix if part == "unet" else file.text_prefix)
    changes = sorted(found for lora in model.loras if (found := lora_hash(lora, file, part)))
    return hashlib.sha256("+".join([own, *changes]).encode()).hexdigest()[:HASH_DIGITS] if changes else own


def part_hash(file: Checkpoint, prefix: str) -> str:
    """SHA-256 over the tensors whose names start so, in float16: a file and its half-precision copy are one model."""
    return _part_hash(file.path.resolve(), file_version(file.path), prefix)


def lora_hash(lora: LoraFile, model: Checkpoint, part: str) -> str:
    """As ``Lora.part_hash``, of a file; raises CheckpointError as ``Lora.read``."""
    version = file_version(lora.path) if lora.path.is_file() else (0, 0)
    return _lora_hash(lora, version, model.path, file_version(model.path), part)


@lru_cache(maxsize=64)
def _lora_hash(
    lora: LoraFile, _version: tuple[int, int], model: Path, _of_model: tuple[int, int], part: str
) -> str:
    return Lora.read(lora, Checkpoint.open(model)).part_hash(part)


@lru_cache(maxsize=64)
def _part_hash(path: Path, _version: tuple[int, int], prefix: str) -> str:
    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as opened:
        for key in sorted(key for key in opened.keys() if key.startswith(prefix)):  # noqa: SIM118
            value = opened.get_tensor(key)
            digest.update(f"{key.removeprefix(prefix)}{tuple(value.shape)}".encode())
            digest.update(value.to(torch.float16).numpy().tobytes())
    return digest.hexdigest()[:HASH_DIGITS]


def _card_of(file: Checkpoint) -> Card:
    if file.metadata.get("format") != FORMAT:
        raise CheckpointError(f"{file.describe()}, not an aggregator file of Denoiser Fusion")
    try:
        return Card.from_json(file.metadata["card"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file.path}: its card can't be read ({error})") from error


def convert_official(
    source: str | Path, checkpoints: Sequence[str | Path], heads: int | None = None
) -> tuple[Card, dict[str, torch.Tensor]]:
    """Card and tensors of aggregators that the official code has saved, for checkpoints in the order of its models.

    ``source``: the folder with ``aggregator_0``, ``aggregator_1`` .., or one ``.safetensors`` of the whole list.
    ``heads`` can't be seen in the tensors: they are in the folder's config.json, else 8 as in the code.
    """
    source = Path(source)
    tensors, told_heads = _read_official(source)
    count = 1 + max((int(key.split(".")[0]) for key in tensors if key[0].isdigit()), default=-1)
    try:
        shapes = [{key.removeprefix(f"{i}."): tuple(v.shape) for key, v in tensors.items() if key.startswith(f"{i}.")}
                  for i in range(count)]  # fmt: skip
        first = shapes[0]
        num_models = first["conv_out.weight"][0]
        sizes = AggregatorSizes(
            num_models=num_models,
            channels=tuple(point["conv_in.weight"][1] // num_models for point in shapes),
            context_dim=first["transformer.transformer_blocks.0.attn2.to_k.weight"][1],
            time_dim=first["res_block.time_emb_proj.weight"][1],
            hidden=first["conv_in.weight"][0],
            layers=len({key.split(".")[2] for key in first if key.startswith("transformer.transformer_blocks.")}),
            heads=heads or told_heads or 8,
        )
    except (KeyError, IndexError) as error:
        problem = f"not aggregators as the official code saves them (nothing is named {error})"
        raise CheckpointError(f"{source}: {problem}") from error
    with torch.device("meta"):
        wanted = {key: tuple(value.shape) for key, value in sizes.make().state_dict().items()}
    given = {key: tuple(value.shape) for key, value in tensors.items()}
    if wanted != given:
        wrong = min(key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key))
        raise CheckpointError(f"{source}: not aggregators as the official code saves them (see {wrong})")
    files = [Checkpoint.open(ModelFile.of(model).path) for model in checkpoints]
    if len(files) != num_models:
        raise CheckpointError(f"{source}: aggregators for {num_models} models, {len(files)} checkpoints were given")
    card = Card(files[0].kind, files[0].prediction, sizes, tuple(identify_model(model) for model in checkpoints),
                {"data": "unknown", "origin": "converted from the official code's format"})  # fmt: skip
    return card, tensors


def _read_official(source: Path) -> tuple[dict[str, torch.Tensor], int | None]:
    """{``POINT.NAME``: tensor}, and the heads where a config.json has them."""
    if source.is_file():
        tensors = Checkpoint.open(source).read("")
        return {key.removeprefix("aggregators."): value for key, value in tensors.items()}, None
    folders = sorted(source.glob("aggregator_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    if not folders:
        raise CheckpointError(f"{source}: no file, and no folder with aggregator_0, aggregator_1 and so on")
    tensors = {}
    for i, folder in enumerate(folders):
        tensors |= {f"{i}.{key}": v for key, v in Checkpoint.open(folder / "aggregator.safetensors").read("").items()}
    config = folders[0] / "config.json"
    return tensors, json.loads(config.read_text("utf-8")).get("num_attn_heads") if config.is_file() else None
