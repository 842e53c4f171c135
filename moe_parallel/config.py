"""What an expert layer computes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from lasp._core.checks import (
    check_flags,
    check_not_negative,
    check_one_of,
    check_part,
    check_positive,
    check_positive_or_none,
    check_sizes,
    check_sizes_or_none,
)
from lasp._core.impl import Impl, check_impl

DropPolicy = Literal["position", "probability"]
Gemm = Literal["auto", "loop", "grouped"]
Send = Literal["auto", "tokens", "assignments"]
ScoreFunction = Literal["softmax_of_top_k", "softmax", "sigmoid"]


@dataclass(frozen=True)
class RouterConfig:
    """How a router scores the experts and chooses among them; the default is MiniMax-01's.

    Args:
        score_function: ``softmax_of_top_k``: the largest logits are chosen, and weights are the
            softmax over them. ``softmax``: over all E logits, before the choice. ``sigmoid``: of
            each logit. The last two choose the largest scores.
        normalize: a token's weights are divided by their sum. False needs ``softmax`` or
            ``sigmoid``, and allows a ``top_k`` of 1.
        scaling: factor of the weights, after that.
        expert_bias: an expert's score, plus a bias of its own, decides whether it is chosen. The
            bias is not part of the weights, and no gradient reaches it:
            :func:`moe_parallel.update_expert_bias` moves it after each step.
        num_groups: neighbouring experts form so many groups; None: no groups.
        top_groups: groups from which a token chooses: those in which its ``top_k // top_groups``
            best scores have the largest sum.
        sequence_loss_coefficient: weight of the auxiliary loss of each sequence, averaged over the
            sequences (:func:`moe_parallel.router.losses.sequence_loss`).
        z_loss_coefficient: weight of the mean over the tokens of log(sum exp logits)^2.

    Raises:
        ValueError: naming the argument.
    """

    score_function: ScoreFunction = "softmax_of_top_k"
    normalize: bool = True
    scaling: float = 1.0
    expert_bias: bool = False
    num_groups: int | None = None
    top_groups: int | None = None
    sequence_loss_coefficient: float = 0.0
    z_loss_coefficient: float = 0.0

    def __post_init__(self) -> None:
        check_flags(normalize=self.normalize, expert_bias=self.expert_bias)
        check_one_of(ScoreFunction, score_function=self.score_function)
        if self.score_function == "softmax_of_top_k" and not self.normalize:
            raise ValueError(
                "normalize must be True with score_function 'softmax_of_top_k', whose weights sum"
                " to 1, got False: use 'softmax'"
            )
        check_positive(scaling=self.scaling)
        check_not_negative(sequence_loss_coefficient=self.sequence_loss_coefficient)
        check_not_negative(z_loss_coefficient=self.z_loss_coefficient)
        if (self.num_groups is None) != (self.top_groups is None):
            raise ValueError(
                "num_groups and top_groups must be given together,"
                f" got {self.num_groups} and {self.top_groups}"
            )
        check_sizes_or_none(num_groups=self.num_groups, top_groups=self.top_groups)

    @cached_property
    def by_logits(self) -> bool:
        """The largest logits are chosen, weighted by the softmax over them: kernels do this."""
        return self.score_function == "softmax_of_top_k" and self.by_score and self.scaling == 1

    @cached_property
    def by_score(self) -> bool:
        """The experts with the largest scores are chosen: there is no bias and no group."""
        return not self.expert_bias and self.num_groups is None

    @cached_property
    def has_losses(self) -> bool:
        """There are losses beside the global auxiliary loss."""
        return bool(self.sequence_loss_coefficient or self.z_loss_coefficient)

    def check_choice(self, num_experts: int, top_k: int) -> None:
        """Raise ValueError unless ``top_k`` of so many experts can be chosen, and learn."""
        if self.normalize and top_k == 1 < num_experts:
            raise ValueError(
                f"top_k must be at least 2 with num_experts {num_experts}, got 1: weights are"
                " the softmax over the chosen logits, or their scores over the sum of these. That"
                " of one expert is always 1, and the gate would get no gradient from the task:"
                " use RouterConfig('softmax', normalize=False)"
            )
        if self.num_groups is None or self.top_groups is None:
            return
        if num_experts % self.num_groups:
            raise ValueError(
                f"num_experts must divide into num_groups {self.num_groups}, got {num_experts}"
            )
        most = self.top_groups * num_experts // self.num_groups
        if not self.top_groups <= min(top_k, self.num_groups) or top_k > most:
            raise ValueError(
                f"top_groups must be at most num_groups {self.num_groups} and top_k {top_k}, and"
                f" have top_k experts in them, got {self.top_groups} of"
                f" {num_experts // self.num_groups} each"
            )


@dataclass(frozen=True)
class MoEConfig:
    """What an expert layer computes, whatever the ranks.

    Args:
        hidden_size: width of a token.
        ffn_size: F, the FFN width of a whole expert.
        num_experts: E.
        top_k: k, experts a token; at least 2 of several experts, unless weights are not
            normalised. The normalised weight of a single choice is 1 whatever the gate says: it
            would not learn.
        capacity_factor: in training mode an expert keeps at most ceil(factor * N * k / E)
            assignments of the N tokens of all ranks; None keeps all, as eval mode does.
        drop_policy: which assignments stay when an expert is full: the first by ``position``, or
            those of highest ``probability``.
        aux_loss_coefficient: weight of the load-balancing loss
            (:func:`moe_parallel.router.route.route`).
        gemm: how the experts multiply (:class:`moe_parallel.experts.experts.Experts`).
        overlap_groups: into how many groups a rank's experts are cut, so that the communication of
            one runs under the products of another (:mod:`moe_parallel.pipeline.pipeline`); at most
            the experts of a rank. None: by the rule of
            :func:`moe_parallel.dispatch.dispatcher.Dispatcher.overlap_groups`. Results have the
            same bits for any number.
        max_rows: most rows (kept assignments) that the experts of one rank may take in a call; more
            raise on every rank of its EP x ETP block, before any row travels, unless
            ``static_shapes`` drops them. None: as many as come (docs/moe.md has their memory).
        pad_to_capacity: in training mode every rank sends as many rows to every expert, so that no
            shape depends on the routing and nothing is copied to the host; capacity is then counted
            on each rank, see :mod:`moe_parallel.dispatch.padding`. Needs a ``capacity_factor`` and
            drops by position.
        static_shapes: without a capacity, no shape depends on the routing and nothing is copied to
            the host, in training or not. A rank's experts have memory for ``max_rows`` rows, None:
            for all that may come. Assignments beyond are dropped and counted, see
            :mod:`moe_parallel.dispatch.static_rows`. Not with ETP or several groups. On a GPU
            experts must be bfloat16: products of other dtypes need counts on the host.
        impl: of the router, the activation, and the rows of tokens and their sums: ``eager`` is
            plain torch, ``triton`` kernels, ``auto`` triton on CUDA but for float64
            (:func:`lasp._core.impl.chosen_impl`). Kernels choose the experts
            unless a choice is made again, or there are groups and E or their number is no power of
            2: then they compute the logits and their gradients, and plain torch chooses.
        router: how experts are scored and chosen.
        shared_ffn_size: FFN width of the shared expert, a dense SwiGLU that takes every token and
            whose output is added; several shared experts are one of their widths' sum. None: none.
        shared_gate: the shared expert's output is multiplied by a sigmoid gate of its own.
        send: ``tokens`` cross to a rank once, whatever number of their experts live there, and one
            sum comes back; EP without ETP alone, and one group. ``assignments`` travel one by one,
            in ``overlap_groups``. ``auto`` chooses where ``overlap_groups`` is None
            (:func:`moe_parallel.dispatch.sending.tokens_pay`), and is ``assignments`` otherwise.

    Raises:
        ValueError: naming the argument.
    """

    hidden_size: int
    ffn_size: int
    num_experts: int
    top_k: int
    capacity_factor: float | None = None
    drop_policy: DropPolicy = "position"
    aux_loss_coefficient: float = 0.01
    gemm: Gemm = "auto"
    overlap_groups: int | None = None
    max_rows: int | None = None
    pad_to_capacity: bool = False
    static_shapes: bool = False
    impl: Impl = "auto"
    router: RouterConfig = RouterConfig()
    shared_ffn_size: int | None = None
    shared_gate: bool = False
    send: Send = "auto"

    def __post_init__(self) -> None:
        check_flags(
            pad_to_capacity=self.pad_to_capacity,
            static_shapes=self.static_shapes,
            shared_gate=self.shared_gate,
        )
        check_part("router", self.router, RouterConfig)
        check_sizes(hidden_size=self.hidden_size, ffn_size=self.ffn_size)
        check_sizes(num_experts=self.num_experts, top_k=self.top_k)
        check_sizes_or_none(overlap_groups=self.overlap_groups, max_rows=self.max_rows)
        check_sizes_or_none(shared_ffn_size=self.shared_ffn_size)
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be at most num_experts {self.num_experts}, got {self.top_k}"
            )
        self.router.check_choice(self.num_experts, self.top_k)
        check_not_negative(aux_loss_coefficient=self.aux_loss_coefficient)
        if self.shared_gate and self.shared_ffn_size is None:
            raise ValueError(
                "shared_gate must be False without a shared expert, got True: set shared_ffn_size"
            )
        check_one_of(Gemm, gemm=self.gemm)
        check_one_of(Send, send=self.send)
        if self.send == "tokens" and (self.overlap_groups or 1) > 1:
            raise ValueError(
                "overlap_groups must be None or 1 with send 'tokens', which go to all experts of a"
                f" rank at once, got {self.overlap_groups}: use send 'assignments' for groups"
            )
        check_impl(self.impl)
        check_drop(self.capacity_factor, self.drop_policy)
        by_position = self.capacity_factor is not None and self.drop_policy == "position"
        if self.pad_to_capacity and not by_position:
            raise ValueError(
                "pad_to_capacity needs a capacity_factor and drop_policy 'position', got"
                f" {self.capacity_factor} and {self.drop_policy!r}: padding needs a size"
            )
        self._check_static()

    def _check_static(self) -> None:
        """Raise ValueError for options with which shapes depend on the routing."""
        if not self.static_shapes:
            return
        for name, wanted, why in (
            ("capacity_factor", (None,), "use pad_to_capacity with one"),
            ("overlap_groups", (None, 1), "tokens cross in one group"),
            ("send", ("auto", "tokens"), "how many assignments travel depends on the routing"),
            ("gemm", ("auto", "grouped"), "a loop needs the rows of each expert on the host"),
        ):
            if (value := getattr(self, name)) not in wanted:
                raise ValueError(
                    f"{name} must be one of {list(wanted)} with static_shapes, got {value!r}: {why}"
                )


def check_drop(capacity_factor: float | None, drop_policy: str) -> None:
    """Raise ValueError for a capacity factor or policy that the router does not know."""
    check_positive_or_none(capacity_factor=capacity_factor)
    check_one_of(DropPolicy, drop_policy=drop_policy)
