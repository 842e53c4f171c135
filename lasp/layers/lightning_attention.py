"""The lightning attention layer in plain torch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp._core.checks import check_part, check_sizes
from lasp._core.impl import Impl, check_impl
from lasp.layers.options import MINIMAX_OPTIONS, LightningOptions
from lasp.layers.parts import GatedNorm, HeadNorm, heads_of
from lasp.lightning.attention import LightningOutput, lightning_attention
from lasp.lightning.decay import Variant, decay_rates
from lasp.lightning.decode import lightning_decode
from lasp.lightning.validation import check_exchange
from lasp.sequence.layout import SequenceLayout
from lasp.state_exchange import Exchange


class LightningAttention(nn.Module):
    """Token mixer: projection, lightning attention, norm, gate, projection.

    As MiniMax-01 has it by default: ``q, k, v = split(SiLU(W_qkv x))``;
    ``o = lightning_attention(q, k, v)`` with scale 1 and no rotary embedding;
    ``y = W_out (sigmoid(W_gate x) * RMSNorm(o))``. Other models differ by their ``options``. The
    fused projection is laid out head by head (q, k, v of head 0, then of head 1, ...), so that
    parameters have the names and shapes of MiniMax checkpoints.

    Args:
        hidden_size: width of the input and the output.
        num_heads: H.
        head_dim: key and value dim of a head; ``H * head_dim`` need not be ``hidden_size``.
        layer_index: index of the layer among all layers of the model, for the decay rates.
        num_layers: number of all layers of the model.
        decay: formula of the rates, see ``lasp.lightning.decay``, or the rates ``[H]`` themselves.
        options: what is computed around the attention.
        exchange: how states cross ranks, see ``lasp.state_exchange``.
        impl: who computes, see :func:`lasp.lightning_attention`: ``triton`` has kernels for what
            is before and after the attention too, see ``lasp.layers``.
        device: where the parameters live.
        dtype: of the parameters. The rates are float32 and stay on the CPU, whatever the module is
            cast or moved to: the operator reads them there.

    Raises:
        ValueError: for an unknown ``decay``, ``exchange`` or ``impl``, and for heads that the
            ``options`` do not fit.

    Source: MiniMax-01, arXiv:2501.08313, section 2; transformers 5.23
    ``models/minimax/modeling_minimax.py``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        layer_index: int,
        num_layers: int,
        *,
        decay: Variant | Tensor = "minimax",
        options: LightningOptions = MINIMAX_OPTIONS,
        exchange: Exchange = "auto",
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim)
        check_part("options", options, LightningOptions)
        check_exchange(exchange)
        check_impl(impl)
        options.check_heads(num_heads, head_dim)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.options = options
        self.scale = options.scale_of(head_dim)
        self.exchange: Exchange = exchange
        self.impl: Impl = impl
        inner = num_heads * head_dim

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.qkv_proj = linear(hidden_size, 3 * inner, options.qkv_bias)
        self.output_gate = (
            linear(hidden_size, inner, options.gate_bias) if options.gate != "none" else None
        )
        if options.qk_norm:
            self.q_norm, self.k_norm = (
                HeadNorm(head_dim, options.norm_eps, device=device, dtype=dtype) for _ in "qk"
            )
        self.norm = GatedNorm(inner, options, device=device, dtype=dtype)
        self.out_proj = linear(inner, hidden_size, options.out_bias)
        self.rates = decay_rates(num_heads, layer_index, num_layers, decay)

    def forward(
        self,
        hidden: Tensor,
        *,
        layout: SequenceLayout | None = None,
        cp_group: dist.ProcessGroup | None = None,
        initial_state: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens of each document.

        Args:
            hidden: ``[T, hidden_size]``, this rank's tokens of the pack, or ``[B, T, hidden_size]``
                for rows of one document each.
            layout: see :func:`lasp.lightning_attention`, which also gives the final states.
            cp_group: likewise.
            initial_state: likewise, ``[N or B, H, head_dim, head_dim]``.
            position_ids: int64 ``[T]`` or ``[B, T]``, for the rotation of ``options.rotary_dim``;
                None: from 0 in each document. They must be given with ``initial_state``.

        Returns:
            As ``hidden``.

        Communication: that of :func:`lasp.lightning_attention`.
        """
        return self._mix(
            hidden, layout, cp_group, initial_state, position_ids, output_final_state=False
        ).output

    def prefill(
        self,
        hidden: Tensor,
        *,
        layout: SequenceLayout | None = None,
        cp_group: dist.ProcessGroup | None = None,
        initial_state: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> LightningOutput:
        """As :meth:`forward`, and the states that the documents leave, for :meth:`step`.

        Prompts, parts of prompts and single tokens are documents of any lengths of one pack, each
        with its initial state. Arguments are those of :meth:`forward`.

        Returns:
            Output as ``hidden``, and final states as of :func:`lasp.lightning_attention`.

        Communication: that of :func:`lasp.lightning_attention`.
        """
        return self._mix(
            hidden, layout, cp_group, initial_state, position_ids, output_final_state=True
        )

    @torch.no_grad()
    def step(
        self,
        hidden: Tensor,
        state: Tensor,
        *,
        position_ids: Tensor | None = None,
        in_place: bool = False,
    ) -> LightningOutput:
        """Mix the next tokens of each sequence, without gradients.

        Args:
            hidden: ``[B, T, hidden_size]``, the T next tokens (one, or a few) of B sequences.
            state: ``[B, H, head_dim, head_dim]``, from :meth:`prefill` or the step before.
            position_ids: int64 ``[B, T]``, or ``[T]`` for all sequences; they must be given where
                ``options.rotary_dim`` is not 0.
            in_place: see :func:`lasp.lightning_decode`.

        Returns:
            Output as ``hidden``, and the states after these tokens.
        """
        if hidden.dim() != 3:
            raise ValueError(
                f"hidden must be [B, T, {self.hidden_size}], T new tokens a sequence, got"
                f" {tuple(hidden.shape)}"
            )
        q, k, v = self.project(hidden, None, None, state, position_ids)
        mixed, new_state = lightning_decode(
            q, k, v, self.rates, state, scale=self.scale, in_place=in_place, impl=self.impl
        )
        return LightningOutput(self.finish(hidden, mixed), new_state)

    def _mix(
        self,
        hidden: Tensor,
        layout: SequenceLayout | None,
        cp_group: dist.ProcessGroup | None,
        initial_state: Tensor | None,
        position_ids: Tensor | None,
        *,
        output_final_state: bool,
    ) -> LightningOutput:
        q, k, v = self.project(hidden, layout, cp_group, initial_state, position_ids)
        mixed, final_state = lightning_attention(
            q,
            k,
            v,
            self.rates,
            layout=layout,
            cp_group=cp_group,
            scale=self.scale,
            initial_state=initial_state,
            exchange=self.exchange,
            impl=self.impl,
            output_final_state=output_final_state,
        )
        return LightningOutput(self.finish(hidden, mixed), final_state)

    def project(
        self,
        hidden: Tensor,
        layout: SequenceLayout | None,
        cp_group: dist.ProcessGroup | None,
        state: Tensor | None,
        position_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[..., H, head_dim]``, see :meth:`forward`."""
        if hidden.dim() not in (2, 3) or hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden must be [T, {self.hidden_size}] or [B, T, {self.hidden_size}], got"
                f" {tuple(hidden.shape)}"
            )
        qkv = self.qkv_proj(hidden).unflatten(-1, (self.num_heads, 3 * self.head_dim))
        if state is not None and position_ids is None and self.options.rotary_dim:
            raise ValueError(
                "position_ids must be given with a state, got None: the layer rotates q and k by"
                " the position in the document, and a state does not say how many tokens it has"
                " seen"
            )
        return heads_of(
            qkv,
            self.options,
            (self.q_norm, self.k_norm) if self.options.qk_norm else None,
            layout=layout,
            cp_group=cp_group,
            position_ids=position_ids,
            impl=self.impl,
        )

    def finish(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The output of the layer, from that of the attention ``[..., H, head_dim]``."""
        gate = None if self.output_gate is None else self.output_gate(hidden)
        projected: Tensor = self.out_proj(self.norm(mixed.flatten(-2), gate, impl=self.impl))
        return projected
