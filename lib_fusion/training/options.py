"""The table of training parameters: command line and training tab derive from its rows."""

from __future__ import annotations

from dataclasses import dataclass

from lib_fusion.requests.settings import Parameter

CLI = ("cli",)
#: What may be other when a run goes on: it may be made longer.
CHANGEABLE = ("steps", "save_every")

CACHE_PARAMETERS: tuple[Parameter, ...] = (
    Parameter("resolution", "int", 512, "resolution",
              "The shorter side is scaled to this and the middle square used; 0: the pictures' own sizes.", 0, 4096,
              multiple_of=8, where=CLI),
    Parameter("shard_size", "int", 64, "shard size", "Pictures in a file of the cache.", 1, 4096, where=CLI),
)  # fmt: skip

TRAINING_PARAMETERS: tuple[Parameter, ...] = (
    Parameter("steps", "int", 1500, "steps", "Optimiser steps.", 1, 10**7, where=CLI),
    Parameter("batch_size", "int", 8, "batch size", "Pictures of a step, over all processes.", 1, 4096, where=CLI),
    Parameter("accumulate", "int", 1, "accumulate", "Parts that a process takes its share of a batch in.", 1, 4096,
              where=CLI),
    Parameter("learning_rate", "float", 1e-4, "learning rate", "AdamW's.", 0, 1, where=CLI),
    Parameter("weight_decay", "float", 0.01, "weight decay", "AdamW's.", 0, 1, where=CLI),
    Parameter("schedule", "choice", "constant", "schedule", "The learning rate's course after the warm-up.",
              choices=("constant", "cosine"), where=CLI),
    Parameter("warm_up", "int", 0, "warm-up", "Steps in which the learning rate rises.", 0, 10**6, where=CLI),
    Parameter("clip", "float", 1.0, "clip", "The longest gradient; 0: any.", 0, 1e6, where=CLI),
    Parameter("caption_dropout", "float", 0.1, "caption dropout", "Share of the captions that are left empty.", 0, 1,
              where=CLI),
    Parameter("min_snr", "float", 0.0, "min-SNR gamma",
              "Weight min(SNR, gamma) / SNR on the loss (Hang et al. 2023; 5 there); 0: plain MSE, as published.",
              0, 1000, where=CLI),
    Parameter("ema", "float", 0.0, "EMA decay", "Keep a moving average of the weights; 0: none.", 0, 0.99999,
              where=CLI),
    Parameter("precision", "choice", "float32", "precision", "Of the computation; the weights trained stay float32.",
              choices=("float32", "bfloat16", "float16"), where=CLI),
    Parameter("checkpointing", "bool", False, "activation checkpointing",
              "Compute activations again in the backward pass: less memory, more time.", where=CLI),
    Parameter("hidden", "int", 128, "hidden", "The aggregators' width.", 4, 1024, multiple_of=4, where=CLI),
    Parameter("layers", "int", 2, "layers", "The aggregators' transformer blocks.", 1, 16, where=CLI),
    Parameter("heads", "int", 8, "heads", "The aggregators' attention heads.", 1, 64, where=CLI),
    Parameter("save_every", "int", 100, "save every", "Steps between saved states.", 1, 10**6, where=CLI),
    Parameter("seed", "int", 0, "seed", "Of the weights, the batches, the noise.", 0, 2**32 - 1, where=CLI),
)  # fmt: skip
#: What an evaluation has in common with a training.
EVALUATION_PARAMETERS = tuple(row for row in TRAINING_PARAMETERS if row.key == "precision")


def label_of(row: Parameter) -> str:
    """The label of a row's control, a stable exact string: ui-config and localisation go by it."""
    return row.label[0].upper() + row.label[1:]


@dataclass(frozen=True)
class TrainingSettings:
    """Fields as in TRAINING_PARAMETERS."""

    steps: int = 1500
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    schedule: str = "constant"
    warm_up: int = 0
    clip: float = 1.0
    caption_dropout: float = 0.1
    min_snr: float = 0.0
    ema: float = 0.0
    precision: str = "float32"
    checkpointing: bool = False
    hidden: int = 128
    layers: int = 2
    heads: int = 8
    save_every: int = 100
    seed: int = 0
