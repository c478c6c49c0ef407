"""Runs N U-Nets in lockstep, block by block, by module hooks on the first one: what AFA's aggregators need.

At every block of the base U-Net, each expert's same block runs on the same input, and the aggregate of all outputs is
what the base's own forward continues with, and stores as skip. So what that forward adds between blocks (ControlNet's
residuals) reaches the aggregate once. After the last decoder block nothing is aggregated: each model's own ``out``
turns its own features into a prediction, and the predictions are aggregated (as in the official code).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from lib_fusion.errors import FusionError
from lib_fusion.fusion.hooks import Hooks
from lib_fusion.methods.afa import AggregatorSizes
from lib_fusion.methods.layers import timestep_embedding
from lib_fusion.unet.layout import Layout, UNetLike, read_layout

#: Why hooks on blocks may not run.
ELSEWHERE = "another extension runs the U-Net's blocks by itself"
#: Why the rows of a call may not be those that its prompts are for.
TILES = "another extension gives the U-Net other rows than the step has, such as tiles"

Aggregate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
#: A part of an expert's U-Net -> a context within which that part is the expert's: with its LoRAs on shared layers.
Wearing = Callable[[nn.Module], AbstractContextManager[Any]]


def point_channels(unet: UNetLike) -> tuple[int, ...]:
    """Channels at each aggregation point, in running order: every block but the last decoder block, and ``out``."""
    blocks = read_layout(unet).points[:-1]
    return (*(point.channels for point in blocks), unet.out[-1].out_channels)


def point_names(unet: UNetLike) -> tuple[str, ...]:
    """Names of the aggregation points, in running order."""
    return (*(point.name for point in read_layout(unet).points[:-1]), "out")


def sizes_for(unet: UNetLike, num_models: int, hidden: int = 128, layers: int = 2, heads: int = 8) -> AggregatorSizes:
    """The sizes of aggregators for ``num_models`` U-Nets like this one."""
    transformer = next(module for name, module in unet.named_modules() if name.endswith("attn2.to_k"))
    return AggregatorSizes(
        num_models=num_models, channels=point_channels(unet), context_dim=transformer.in_features,
        time_dim=unet.time_embed[-1].out_features, hidden=hidden, layers=layers, heads=heads,
    )  # fmt: skip


class Lockstep:
    """Model 0 is ``unet``, 1.. are ``experts`` (one may be ``unet`` itself, with another text).

    ``aggregators``: one a point, or a single one (a control) for all. Inert but inside ``running``. ``on_maps`` is
    called with each point's index and its attention maps (B,N,H,W). An expert's block runs within ``held(block)``,
    where a host can bring weights that wait elsewhere, and within its ``wearing``.
    """

    def __init__(
        self, unet: UNetLike, experts: Sequence[UNetLike], aggregators: nn.ModuleList | nn.Module,
        on_maps: Callable[[int, torch.Tensor], None] | None = None,
        held: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext, wearing: Sequence[Wearing] = (),
    ) -> None:  # fmt: skip
        channels = point_channels(unet)
        for i, expert in enumerate(experts, start=1):
            if point_channels(expert) != channels:
                raise FusionError(f"model {i} of the lockstep has other blocks than model 0")
        if isinstance(aggregators, nn.ModuleList) and len(aggregators) != len(channels):
            raise FusionError(f"{len(aggregators)} aggregators for a U-Net of {len(channels)} aggregation points")
        self.unet, self.experts, self.on_maps, self.held = unet, list(experts), on_maps, held
        self.aggregators = aggregators
        self._wearing = list(wearing) or [nullcontext] * len(self.experts)
        self._layouts: list[Layout] = [read_layout(expert) for expert in self.experts]
        self._texts: tuple[Sequence[torch.Tensor], torch.Tensor, Sequence[torch.Tensor | None]] | None = None
        self._embeddings: list[torch.Tensor] = []
        self._mean_embedding: torch.Tensor | None = None
        self._last: list[torch.Tensor] = []
        #: Of the last call, for each point: sums (N + 1,) in float32 over each model's features and over the aggregate.
        self.totals: list[torch.Tensor] = []

    def attach(self) -> Hooks:
        """Puts the hooks on."""
        hooks = Hooks()
        points = read_layout(self.unet).points
        hooks.before(self.unet, self._begin, with_kwargs=True)
        for index, point in enumerate(points[:-1]):
            hooks.after(point.module, self._block_hook(index))
        hooks.after(points[-1].module, self._keep_last)
        hooks.after(self.unet.out, self._out)
        hooks.after(self.unet, self._end)
        return hooks

    @contextmanager
    def running(
        self, contexts: Sequence[torch.Tensor], mean_context: torch.Tensor,
        vectors: Sequence[torch.Tensor | None] | None = None,
    ) -> Iterator[None]:  # fmt: skip
        """Within, the base's forward is that of all models in lockstep.

        ``contexts``: each expert's text states (B,T,D), ``mean_context`` the mean over all models, with the base's.
        ``vectors``: each expert's own pooled vector (B,V) for SDXL.
        """
        self._texts = (contexts, mean_context, vectors or [None] * len(self.experts))
        try:
            yield
        finally:
            self._texts = None
            self._forget()

    def _forget(self) -> None:
        self._embeddings, self._mean_embedding, self._last = [], None, []

    def _begin(self, unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Each model's own time (and label) embedding, from the arguments of the base's forward."""
        if self._texts is None:
            return
        timesteps = args[1] if len(args) > 1 else kwargs["timesteps"]
        rows = len(self._texts[1])
        if len(timesteps) != rows:
            problem = f"{TILES} ({len(timesteps)} in a call for {rows})"
            raise FusionError(f"AFA could not act: {problem}; switch that or AFA off")
        self.totals = []
        own_vector = args[3] if len(args) > 3 else kwargs.get("y")
        embeddings = [embed(unet, timesteps, own_vector)]
        for expert, vector, wearing in zip(self.experts, self._texts[2], self._wearing, strict=True):
            embeddings.append(embed(expert, timesteps, vector, self.held, wearing))
        self._mean_embedding = torch.stack([e.to(embeddings[0]) for e in embeddings]).mean(dim=0)
        self._embeddings = embeddings[1:]

    def _end(self, *_: Any) -> None:
        # On the U-Net and not on ``out``: ControlNet's reference mode runs its blocks twice in one call.
        self._forget()

    @property
    def _is_running(self) -> bool:
        return self._texts is not None and self._mean_embedding is not None

    def _run_experts(self, index: int, h: torch.Tensor, others: tuple = ()) -> list[torch.Tensor]:
        """Each expert's block on the base's input. Not through hooks: an expert may be the base itself.

        ``others``: what a host's blocks are given after the context, such as the size to grow to.
        """
        assert self._texts is not None
        outputs = []
        parts = zip(self._layouts, self._embeddings, self._texts[0], self._wearing, strict=True)
        for layout, embedding, context, wearing in parts:
            block = layout.points[index].module
            with self.held(block), wearing(block):
                outputs.append(block.forward(h.to(embedding.dtype), embedding, context.to(embedding.dtype), *others))
        return outputs

    def _aggregate(self, index: int, outputs: list[torch.Tensor]) -> torch.Tensor:
        assert self._texts is not None
        assert self._mean_embedding is not None
        modules = self.aggregators
        aggregator = modules[index] if isinstance(modules, nn.ModuleList) else modules
        weight = next(aggregator.parameters(), outputs[0])
        features = torch.stack([output.to(outputs[0].dtype) for output in outputs], dim=1)
        aggregate, maps = aggregator(
            features.to(weight.dtype), self._mean_embedding.to(weight.dtype), self._texts[1].to(weight.dtype)
        )
        if self.on_maps is not None:
            self.on_maps(index, maps)
        sums = features.detach().sum(dim=(0, 2, 3, 4), dtype=torch.float32)
        self.totals.append(torch.cat([sums, aggregate.detach().sum(dtype=torch.float32)[None]]))
        # In the memory layout of the base's output, by which kernels are chosen: a model alone stays what it is.
        return torch.empty_like(outputs[0]).copy_(aggregate)

    def _block_hook(self, index: int) -> Callable[..., torch.Tensor | None]:
        def hook(_: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
            if not self._is_running:
                return None
            return self._aggregate(index, [output, *self._run_experts(index, args[0], args[3:])])

        return hook

    def _keep_last(self, _: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if self._is_running:
            self._last = self._run_experts(-1, args[0], args[3:])

    def _out(self, _: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if not self._is_running:
            return None
        have_run = (len(self.totals) + 1) % len(self._layouts[0].points) == 0  # in ControlNet's reference mode twice
        if len(self._last) != len(self.experts) or not have_run:
            raise FusionError(f"AFA could not act: {ELSEWHERE}; switch that or AFA off")
        own = []
        for expert, h, wearing in zip(self.experts, self._last, self._wearing, strict=True):
            with self.held(expert.out), wearing(expert.out):
                own.append(expert.out.forward(h))
        return self._aggregate(len(self._layouts[0].points) - 1, [output, *own])


def embed(
    unet: UNetLike, timesteps: torch.Tensor, vector: torch.Tensor | None = None,
    held: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext, wearing: Wearing = nullcontext,
) -> torch.Tensor:  # fmt: skip
    """A U-Net's time embedding (B,E) of timesteps (B,), with its label embedding of SDXL's vector (B,V)."""
    first = unet.time_embed[0]
    stored = first.weight.dtype if first.weight.dtype.itemsize > 1 else torch.float32  # in float8 nothing computes
    dtype = getattr(unet, "computation_dtype", stored)  # Forge's U-Nets say what they compute in
    with held(unet.time_embed), wearing(unet.time_embed):
        embedding = unet.time_embed(timestep_embedding(timesteps, first.in_features).to(dtype))
    if vector is None:
        return embedding
    with held(unet.label_emb), wearing(unet.label_emb):
        return embedding + unet.label_emb(vector.to(dtype))


def mean_context(contexts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean (B,T,D) of the models' text states, all of one length."""
    return torch.stack([context.to(contexts[0]) for context in contexts]).mean(dim=0)
