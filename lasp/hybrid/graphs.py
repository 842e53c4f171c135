"""A step as one CUDA graph, which the host launches at once: of decoding, and of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lasp._core.cache import holding_results
from lasp._core.checks import check_part, check_sizes
from lasp._core.summed_gradients import any_summed
from lasp.generation import PADDING, GenerationCache
from lasp.generation.cache import KeyMemory
from lasp.generation.partials import MAX_HEAD_DIM, MAX_LATENT, has_kernel
from lasp.generation.step import CacheStep, plan_step
from lasp.hybrid.steps import batch_of, check_ready, packed
from lasp.layers.lightning_attention import LightningAttention
from moe_parallel.router.route import Router

if TYPE_CHECKING:
    from lasp.hybrid.model import HybridModel


_NOT_PLAIN = (
    "a StepGraph must be of a plain model on one rank, got one over groups or in a wrapper: call"
    " the model instead"
)


class DecodeGraph:
    """Steps of one new token a slot, for up to ``batch_size`` slots, on one rank.

    Ids, positions, slots and lengths are copied into memory that the graph reads, all else is
    replayed. What is missing to ``batch_size`` is padding. On a CPU the same memory is used without
    a graph. The graph holds the memory of the cache, and the logits of a step until the next one.

    Args:
        model: in eval mode, on one rank. On a GPU everything must run without the host: parameters
            in bfloat16, whose experts then are one grouped product, or no experts.
        cache: of the model.
        batch_size: most slots of a step.

    Raises:
        ValueError: for a model over several ranks, or one whose softmax layers no kernel runs
            (wide heads, float64), or a cache that is not the model's.
    """

    def __init__(self, model: HybridModel, cache: GenerationCache, batch_size: int) -> None:
        check_ready(model, cache)
        check_one_rank(model)
        check_sizes(batch_size=batch_size)
        self._model, self._cache, self.batch_size = model, cache, batch_size
        idle = plan_step(cache, [PADDING] * batch_size, [1] * batch_size)
        self._rows = torch.empty_like(idle.rows).copy_(idle.rows)
        self._ids = idle.rows.new_zeros(batch_size)
        self._batch = batch_of(model, idle)
        self._replay: Callable[[], Tensor] | None = None
        if cache.device.type == "cuda":
            _check_kernels(model, cache)
            with torch.cuda.device(cache.device):
                self._replay = _captured(lambda: self._run(idle))

    @torch.no_grad()
    def _run(self, plan: CacheStep) -> Tensor:
        static = replace(plan, rows=self._rows)
        logits: Tensor = self._model(self._ids, self._batch, cached=static).logits
        return logits

    def step(self, slots: Sequence[int], tokens: Tensor) -> Tensor:
        """As :meth:`lasp.hybrid.HybridModel.step` with one token a slot.

        Args:
            slots: at most ``batch_size``.
            tokens: int64 ``[slots]`` or ``[slots, 1]``.

        Returns:
            Logits ``[slots, vocab]``, which the next step overwrites.

        Raises:
            ValueError: naming the argument; the cache is as it was.
        """
        check_ready(self._model, self._cache)
        ids, counts = packed(tokens.view(-1, 1), self._model.config.vocab_size, self._cache.device)
        missing = self.batch_size - len(slots)
        if missing < 0 or len(counts) != len(slots):
            raise ValueError(
                f"tokens must be one for each of at most {self.batch_size} slots, got"
                f" {len(counts)} for {len(slots)} slots"
            )
        padded = [*slots, *[PADDING] * missing]
        plan = plan_step(self._cache, padded, [1] * self.batch_size)
        lengths = [start + 1 for start in plan.starts]
        self._model.config.attention.check_documents(lengths)
        self._rows.copy_(plan.rows)
        self._ids[: len(slots)].copy_(ids)
        plan.begin()
        logits = self._run(plan) if self._replay is None else self._replay()
        plan.commit()
        return logits[: len(slots)]


def check_one_rank(model: HybridModel) -> None:
    """Raise ValueError unless the model is on one rank, as a :class:`DecodeGraph` must be."""
    if any(group is not None for group in model.groups):
        raise ValueError(
            "a DecodeGraph must be of a model on one rank, got one over groups: use model.step, or"
            " generate with graph=False"
        )


class StepGraph:
    """Forward and backward of batches of one layout, on one rank, as one CUDA graph.

    Short batches wait for the host, which takes milliseconds a layer to launch a step kernel by
    kernel. Here it copies the inputs and launches once::

        def loss_of(tokens, labels):
            output = model(tokens, batch, labels=labels)
            return output.loss / batch.layout.num_tokens + output.aux_loss

        graph = StepGraph(model, loss_of, tokens, labels)
        for tokens, labels in batches:
            loss = graph.step(tokens, labels)
            optimizer.step()

    ``loss_of`` runs four times when the graph is made, three of them to warm up, and never again:
    what it reads beside its arguments, the layout, coefficients and flags, is that of then. On a
    CPU it runs in every step. The graph holds the memory of activations and gradients.

    Args:
        model: in the mode and dtype of training, on one rank, not in a wrapper. On a GPU everything
            must run without the host: experts in bfloat16 with few rows each, which then are one
            grouped product, or with ``static_shapes``; without capacity, but ``pad_to_capacity``.
        loss_of: takes tensors, returns a scalar that depends on parameters of ``model`` alone.
        inputs: tensors of the shapes, dtypes and devices of all steps; values are used to warm up.

    Raises:
        ValueError: for arguments of another type, a model over ranks or in a wrapper, one that
            offloads activations or has nothing to train, and a loss that is no scalar.
        RuntimeError: where a layer needs the host.
    """

    def __init__(self, model: HybridModel, loss_of: Callable[..., Tensor], *inputs: Tensor) -> None:
        _check_trainable(model)
        if not callable(loss_of):
            raise ValueError(f"loss_of must be a function of the inputs, got {loss_of!r}")
        for x in inputs:
            check_part("inputs", x, Tensor)
        self._model, self._loss_of = model, loss_of
        self._inputs = [x.clone() for x in inputs]
        self._all = list(model.parameters())
        self._trained = [x.requires_grad for x in self._all]
        self._parameters = [x for x in self._all if x.requires_grad]
        self._check_gradients([None] * len(self._parameters))
        self._replay: Callable[[], Tensor] | None = None
        self._gradients: list[Tensor | None] = [None] * len(self._parameters)
        device = model.embedding.weight.device
        if device.type == "cuda":
            counted = {name: x.clone() for name, x in _counters(model)}
            with torch.cuda.device(device):
                self._replay = _captured(self._run)
            for name, x in _counters(model):
                x.copy_(counted[name])
            self._clear_gradients()

    def step(self, *inputs: Tensor) -> Tensor:
        """Loss and gradients of a batch.

        Args:
            inputs: like those that the graph was made with. Copies from a host's pinned memory are
                not waited for: change it only after the step has run.

        Returns:
            The loss, which the next step overwrites. So are gradients: they do not add up.

        Raises:
            ValueError: for other shapes or dtypes, a gradient that is not of this graph, or
                parameters that were frozen or unfrozen since it was made.
        """
        self._check_inputs(inputs)
        if [x.requires_grad for x in self._all] != self._trained:
            raise ValueError(
                "parameters must require gradients as when the graph was made, got some that were"
                " frozen or unfrozen since: make the graph anew"
            )
        self._check_gradients(self._gradients)
        for static, given in zip(self._inputs, inputs):
            static.copy_(given, non_blocking=True)
        if self._replay is None:
            return self._run()
        for parameter, gradient in zip(self._parameters, self._gradients):
            parameter.grad = gradient
        return self._replay()

    def _run(self) -> Tensor:
        self._gradients = []  # those of the run before would be in memory beside the new ones
        self._clear_gradients()
        with self._model.register_forward_pre_hook(_refuse_ddp):
            loss = self._loss_of(*self._inputs)
        if loss.dim():
            raise ValueError(f"loss_of must return a scalar, got {list(loss.shape)}: sum it up")
        loss.backward()
        self._gradients = [parameter.grad for parameter in self._parameters]
        return loss.detach()

    def _clear_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _check_inputs(self, inputs: Sequence[Tensor]) -> None:
        wanted, got = ([(x.dtype, list(x.shape)) for x in of] for of in (self._inputs, inputs))
        if wanted != got:
            raise ValueError(
                f"inputs must be {wanted} as those that the graph was made with, got {got}: make a"
                " graph for each layout"
            )

    def _check_gradients(self, own: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, own):
            if parameter.grad is not None and parameter.grad is not gradient:
                raise ValueError(
                    "parameters must have no gradients but those of this graph, got one of"
                    f" {list(parameter.shape)} that a step would lose: add it up elsewhere, and"
                    " call optimizer.zero_grad() before"
                )


def _check_trainable(model: HybridModel) -> None:
    from lasp.hybrid.activations import offloads
    from lasp.hybrid.model import HybridModel

    wrapped = isinstance(model, DistributedDataParallel)
    check_part("model", model.module if wrapped else model, HybridModel)
    if wrapped or any_summed(model) or any(group is not None for group in model.groups):
        raise ValueError(_NOT_PLAIN)
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in model.parameters()):
        raise ValueError(
            "a StepGraph must be made with gradients enabled, of a model some of whose parameters"
            " require them, got none: it runs a backward"
        )
    if offloads(model):
        raise ValueError(
            "a StepGraph must keep activations on the device, got a policy with 'offload', whose"
            " memory of the host is given to others after a step: leave it out"
        )


def _refuse_ddp(*_: object) -> None:
    """Raise ValueError in a forward that DistributedDataParallel calls: its hooks sum gradients."""
    if DistributedDataParallel._get_active_ddp_module() is not None:
        raise ValueError(_NOT_PLAIN)


def _counters(model: HybridModel) -> list[tuple[str, Tensor]]:
    """What a backward counts beside gradients: warming up must leave no trace."""
    return [
        (name, module.local_tokens_per_expert)
        for name, module in model.named_modules()
        if isinstance(module, Router) and module.expert_bias is not None
    ]


def _check_kernels(model: HybridModel, cache: GenerationCache) -> None:
    """Raise ValueError if a softmax layer would read lengths on the host, which a graph cannot."""
    for layer, memory in zip(model.decoder_layers(), cache.layers):
        if isinstance(layer.attention, LightningAttention):
            continue
        assert isinstance(memory, KeyMemory)
        if not has_kernel(memory, layer.attention.block):
            raise ValueError(
                "a DecodeGraph must be of softmax layers that a kernel runs, 16 or 32 bits, heads"
                f" up to {MAX_HEAD_DIM} or latents up to {MAX_LATENT}, got {memory.keys.shape[-1]}"
                f" in {memory.keys.dtype}: use model.step"
            )


def _captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A replay of ``run``, whose result every replay overwrites; it runs four times."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may ask the device meanwhile, as NCCL's watchdog does.
    captured = torch.cuda.graph(graph, capture_error_mode="thread_local")
    with holding_results() as held, captured:
        result = run()

    def replay() -> Tensor:
        assert held is not None  # it lives as long as the graph that reads what it holds
        graph.replay()
        return result

    return replay
