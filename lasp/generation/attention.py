"""What the attention layers of a model do in a step: read their memory, mix, and write it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp.generation.cache import DraftedLayer, KeyMemory
from lasp.generation.partials import as_they_are, over_cached, over_few, over_ranks
from lasp.generation.step import CacheStep
from lasp.layers.lightning_attention import LightningAttention
from lasp.lightning.attention import lightning_attention
from lasp.lightning.decode import lightning_decode
from ring.attention import ring_attention
from ring.blocks.merge import Partial, merge
from ring.expansion import LatentExpansion
from ring.latent_attention import ring_latent_attention
from ring.latent_module import MultiLatentAttention
from ring.module import RingAttention


def shape_of(attention: nn.Module) -> tuple[Any, ...]:
    """What the cache holds of a layer, see :class:`lasp.generation.cache.CacheShape`.

    Raises:
        ValueError: for a layer that sees a window or has sinks.
    """
    if isinstance(attention, LightningAttention):
        dim = attention.head_dim
        return ("state", attention.num_heads, dim, dim)
    assert isinstance(attention, RingAttention | MultiLatentAttention)
    if (
        attention.window != (-1, -1)
        or not attention.causal
        or getattr(attention, "sinks", None) is not None
    ):
        raise ValueError(
            "softmax layers must be causal, without window and sinks, to generate, got window"
            f" {attention.window}, causal {attention.causal}"
        )
    if isinstance(attention, RingAttention):
        heads = attention.k_proj.out_features // attention.head_dim
        return ("keys", heads, attention.head_dim, attention.head_dim)
    latent = attention.kv_lora_rank
    return ("latent", 1, latent + attention.qk_rope_head_dim, latent)


class CachedLayer(NamedTuple):
    """The memory of one layer in one step, as :class:`lasp.hybrid.layer.HybridLayer` takes it.

    Attributes:
        step: the step.
        memory: of the layer.
        token_group: ranks whose experts see the tokens of the step.
    """

    step: CacheStep
    memory: Tensor | KeyMemory
    token_group: dist.ProcessGroup | None

    def attend(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        """The attention layer, of normed tokens ``[T, hidden]``; it changes the memory."""
        if isinstance(attention, LightningAttention):
            assert isinstance(self.memory, Tensor)
            return _lightning(attention, self.memory, hidden, self.step)
        assert isinstance(self.memory, KeyMemory)
        if isinstance(attention, RingAttention):
            return _softmax(attention, self.memory, hidden, self.step)
        assert isinstance(attention, MultiLatentAttention)
        return _latent(attention, self.memory, hidden, self.step)

    def combined(self, output: Tensor) -> Tensor:
        """Output of the experts for every row, of which each rank has computed some.

        Communication: one all-reduce over the token group, where every rank has all rows.
        """
        if self.step.few and self.token_group is not None:
            dist.all_reduce(output, group=self.token_group)
        return output


def _lightning(
    attention: LightningAttention, states: Tensor, hidden: Tensor, step: CacheStep
) -> Tensor:
    q, k, v = attention.project(hidden, None, None, None, step.rows[0])
    how: dict[str, Any] = {"scale": attention.scale, "impl": attention.impl}
    if step.tokens_a_slot and not step.draft:
        each = step.tokens_a_slot
        q, k, v = (x.unflatten(0, (-1, each)) for x in (q, k, v))
        how["slots"] = step.rows[2, ::each].contiguous()
        mixed, _ = lightning_decode(q, k, v, attention.rates, states, in_place=True, **how)
        return attention.finish(hidden, mixed.flatten(0, 1))
    mixed, final = lightning_attention(
        *(q, k, v, attention.rates),
        layout=step.layout,
        cp_group=step.group,
        initial_state=states[step.slots_or_first] if any(step.starts) else None,
        exchange=attention.exchange,
        output_final_state=not step.draft,
        **how,
    )
    if final is None:
        step.drafted.append(DraftedLayer(attention, k, v))
        return attention.finish(hidden, mixed)
    if step.group is not None:
        dist.all_reduce(final, group=step.group)  # zero but on the rank of the last token
    real = step.real_documents
    states[step.slots_or_first[real]] = final[real]
    return attention.finish(hidden, mixed)


def _softmax(
    attention: RingAttention, memory: KeyMemory, hidden: Tensor, step: CacheStep
) -> Tensor:
    q, k, v = attention.project(hidden, step.rows[0])
    scale = attention.head_dim**-0.5
    if step.few:
        memory.store(step.rows[1], k, v)
        partial = over_ranks(over_few(q, memory, step, scale, attention.block), step.cache.cp_group)
        return attention.finish(hidden, partial.output.to(q.dtype))
    own = ring_attention(q, k, v, layout=step.layout, cp_group=step.group, block=attention.block)
    before = over_cached(q, memory, step, scale, attention.block, as_they_are)
    memory.store(step.rows[1], k, v)
    return attention.finish(hidden, _with(before, own, q))


def _latent(
    attention: MultiLatentAttention, memory: KeyMemory, hidden: Tensor, step: CacheStep
) -> Tensor:
    """A few rows meet the latents themselves: the weight of the keys is taken into the queries."""
    q, latent = attention.project(hidden, step.rows[0])
    weight, shared = attention.expansion_weight, attention.qk_rope_head_dim
    own_dim, scale = q.shape[-1] - shared, attention.scale
    if step.few:
        memory.store(step.rows[1], latent.unsqueeze(1), None)
        own, rotated = q.split((own_dim, shared), dim=-1)
        taken_in = torch.einsum("thk,hkr->thr", own, weight[:, :own_dim])
        found = over_few(
            torch.cat((taken_in, rotated), dim=-1), memory, step, scale, attention.block
        )
        mixed = torch.einsum("thr,hvr->thv", found.output, weight[:, own_dim:].to(found.lse.dtype))
        partial = over_ranks(Partial(mixed, found.lse), step.cache.cp_group)
        return attention.finish(hidden, partial.output.to(q.dtype))
    where: dict[str, Any] = {"layout": step.layout, "cp_group": step.group, "scale": scale}
    new = ring_latent_attention(q, latent, weight, block=attention.block, **where)
    expansion = LatentExpansion(weight, weight.shape[1] - own_dim)

    def expand(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return expansion.expand(keys)

    before = over_cached(q, memory, step, scale, attention.block, expand)
    memory.store(step.rows[1], latent.unsqueeze(1), None)
    return attention.finish(hidden, _with(before, new, q))


def _with(before: Partial | None, new: tuple[Tensor, Tensor], q: Tensor) -> Tensor:
    """Output over the keys of before and the new ones, in the dtype of ``q``."""
    return new[0] if before is None else merge(before, Partial(*new)).output.to(q.dtype)
