"""The settings of caching a data set and of training on it; command line and training tab are built from their rows."""

from __future__ import annotations

from dataclasses import dataclass

from lib_fusion.requests.parameters import CLI, Parameter, row, rows_of

#: Settings that may differ when a training is resumed: it may be made longer.
CHANGEABLE = ("steps", "save_every")


# fmt: off
@dataclass(frozen=True)
class CacheSettings:
    """How pictures are encoded and stored."""

    resolution: int = row(
        512, "resolution",
        "The shorter side is scaled to this and the middle square used; 0: the pictures' own sizes.",
        low=0, high=4096, multiple_of=8, where=CLI)
    shard_size: int = row(64, "shard size", "Pictures in a file of the cache.", low=1, high=4096, where=CLI)


@dataclass(frozen=True)
class TrainingSettings:
    """How aggregators are trained, and their sizes."""

    steps: int = row(1500, "steps", "Optimiser steps.", low=1, high=10**7, where=CLI)
    batch_size: int = row(
        8, "batch size", "Pictures of a step, over all processes.", low=1, high=4096, where=CLI)
    accumulate: int = row(
        1, "accumulate", "Gradient accumulation: parts that a batch is computed in.", low=1, high=4096, where=CLI)
    learning_rate: float = row(1e-4, "learning rate", "Step size of AdamW.", low=0, high=1, where=CLI)
    weight_decay: float = row(0.01, "weight decay", "Weight decay of AdamW.", low=0, high=1, where=CLI)
    schedule: str = row(
        "constant", "schedule", "The learning rate's course after the warm-up.",
        choices=("constant", "cosine"), where=CLI)
    warm_up: int = row(0, "warm-up", "Steps in which the learning rate rises.", low=0, high=10**6, where=CLI)
    clip: float = row(1.0, "clip", "Gradient norm clipping; 0: none.", low=0, high=1e6, where=CLI)
    caption_dropout: float = row(
        0.1, "caption dropout", "Share of the captions that are left empty.", low=0, high=1, where=CLI)
    min_snr: float = row(
        0.0, "min-SNR gamma",
        "Weight min(SNR, gamma) / SNR on the loss (Hang et al. 2023; 5 there); 0: plain MSE, as published.",
        low=0, high=1000, where=CLI)
    ema: float = row(
        0.0, "EMA decay", "Keep a moving average of the weights; 0: none.", low=0, high=0.99999, where=CLI)
    precision: str = row(
        "float32", "precision", "Of the computation; the weights trained stay float32.",
        choices=("float32", "bfloat16", "float16"), where=CLI)
    checkpointing: bool = row(
        False, "activation checkpointing",
        "Compute activations again in the backward pass: less memory, more time.", where=CLI)
    hidden: int = row(128, "hidden", "The aggregators' width.", low=4, high=1024, multiple_of=4, where=CLI)
    layers: int = row(2, "layers", "The aggregators' transformer blocks.", low=1, high=16, where=CLI)
    heads: int = row(8, "heads", "The aggregators' attention heads.", low=1, high=64, where=CLI)
    save_every: int = row(100, "save every", "Steps between saved states.", low=1, high=10**6, where=CLI)
    seed: int = row(0, "seed", "Random seed of weights, batches and noise.", low=0, high=2**32 - 1, where=CLI)
# fmt: on


CACHE_PARAMETERS = rows_of(CacheSettings)
TRAINING_PARAMETERS = rows_of(TrainingSettings)
#: The rows of a training that an evaluation has too.
EVALUATION_PARAMETERS = tuple(row for row in TRAINING_PARAMETERS if row.key == "precision")


def label_of(row: Parameter) -> str:
    """The label of a row's control, a stable exact string: ui-config and localisation go by it."""
    return row.label[0].upper() + row.label[1:]
