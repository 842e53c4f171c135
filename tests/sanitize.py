"""Every Triton kernel of the project once, on small tensors: what compute-sanitizer watches.

Ragged packs put document borders, cuts of segments and ends of tensors beside each other, and head
dims are taken with tensor descriptors and without.

Run: compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.sanitize
     compute-sanitizer --tool racecheck --error-exitcode 1 python -m tests.sanitize
"""

from __future__ import annotations

import argparse
from unittest.mock import patch

import torch
import torch.distributed as dist

from lasp import LightningOptions, lightning_decode
from lasp.layers.norm_gate import norm_gate
from lasp.layers.parts import HeadNorm, heads_of
from lasp.lightning.triton import tuning
from moe_parallel import MoEConfig
from moe_parallel.dispatch import sending
from moe_parallel.dispatch.permute import permute, row_order, unpermute
from moe_parallel.dispatch.planned import ChunkCounts
from moe_parallel.dispatch.static_rows import fitting_rows
from moe_parallel.dispatch.token_rows import ArrivedSlots, RowFormat
from moe_parallel.experts.swiglu import swiglu, swiglu_backward, weighted_swiglu_backward
from moe_parallel.mesh import ExpertMesh
from moe_parallel.router import top_k
from moe_parallel.router.counts import AssignmentCounts, Routing, counted
from ring.blocks.merge_kernel import merge_to
from tests.lasp.cases import Case, attend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there with TRITON_INTERPRET=1
DIMS = ((128, 128), (64, 64), (32, 96))  # one launch for dk and dv; two
if DEVICE == "cuda":  # tiles past a head, states in pieces
    DIMS += ((96, 96), (192, 192), (256, 256))
LENGTHS = (200, 0, 65, 1, 130)


def attention(key_dim: int, value_dim: int, with_states: bool) -> None:
    """Forward and backward of a pack."""
    case = Case(
        LENGTHS, 1, rates=(0.0, 0.25), key_dim=key_dim, value_dim=value_dim,
        with_states=with_states, dtype=torch.bfloat16, impl="triton",
    )  # fmt: skip
    with patch.object(tuning, "segment_length", lambda *_: 128):
        attend(case, None, 0, DEVICE)


def layers() -> None:
    """Decoding in place and not, and what is around the attention."""
    q, k, v = torch.randn(3, 3, 2, 2, 128, device=DEVICE).bfloat16()
    state = torch.randn(3, 2, 128, 128, device=DEVICE)
    for in_place in (False, True):
        lightning_decode(q, k, v, torch.rand(2), state, in_place=in_place, impl="triton")
    y, gate = torch.randn(2, 37, 192, device=DEVICE).bfloat16().requires_grad_().unbind()
    weight = torch.ones(192, device=DEVICE, requires_grad=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for group in (None, dist.group.WORLD):
        norm_gate(
            y, gate, weight, eps=1e-6, tp_group=group, impl="triton"
        ).sum().backward(retain_graph=True)  # fmt: skip
    dist.destroy_process_group()
    how = {"eps": 1e-6, "num_groups": 3, "silu": True, "gate_first": True}
    norm_gate(y, gate, weight, **how, impl="triton").sum().backward()
    norms = (HeadNorm(32, 1e-6, DEVICE), HeadNorm(32, 1e-6, DEVICE))
    for options in (LightningOptions(), LightningOptions(qk_norm=True, rotary_dim=12)):
        parts = heads_of(
            torch.randn(37, 3, 3 * 32, device=DEVICE, requires_grad=True), options,
            norms if options.qk_norm else None,
            layout=None, cp_group=None, position_ids=None, impl="triton",
        )  # fmt: skip
        sum(part.sum() for part in parts).backward()


def experts() -> None:
    """SwiGLU, and rows to slots and back."""
    hidden = torch.randn(13, 2 * 72, device=DEVICE).bfloat16()
    swiglu_backward(swiglu(hidden, "triton"), hidden, "triton")
    chosen = torch.rand(11, 5, device=DEVICE).argsort(1)[:, :2]
    kept = torch.ones_like(chosen, dtype=torch.bool)
    kept[3] = False
    order = row_order(chosen, kept, int(kept.sum()), 5)
    x = torch.randn(11, 200, device=DEVICE).bfloat16().requires_grad_()
    weights = torch.rand(11, 2, device=DEVICE, requires_grad=True)
    unpermute(permute(x, order, "triton"), weights, order, "triton").sum().backward()


def router() -> None:
    """Experts chosen out of a product and of parts, several programs, and the rows they make."""
    gate = torch.randn(5, 40, device=DEVICE, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(700, 40, device=DEVICE).to(dtype).requires_grad_()
        with patch.object(top_k, "takes_parts", lambda x: x.dtype == torch.bfloat16):
            choice = top_k.choose(x, gate, 2, "triton")
        order = {"histogram": choice.histogram, "positions_E": torch.randperm(5, device=DEVICE)}
        rows = row_order(choice.experts, None, 1400, 5, **order)
        loss = choice.weights.square().sum() + choice.logits.sum()
        (loss + permute(x, rows, "triton").float().sum()).backward()


def tokens_once() -> None:
    """Rows of tokens that cross to a rank once, what travels at their ends, and gradients of it."""
    config, mesh = MoEConfig(40, 8, 6, 3), ExpertMesh(0, 2, 0, 0, ((0, 1),))
    x, gate = torch.randn(700, 40, device=DEVICE), torch.randn(6, 40, device=DEVICE)
    choice = top_k.choose(x, gate, 3, "triton", None, 2)
    kept_RE = counted(choice.experts, 6).expand(2, 6).contiguous()
    counts = AssignmentCounts(kept_RE, kept_RE)
    decision = (choice.experts, choice.weights, None, counts, choice.logits)
    routing = Routing(*decision, 700, 0.0, choice.histogram)
    fitting_rows(kept_RE, 2, 100, "triton")
    ChunkCounts("triton", kept_RE, mesh.sources, 3).order(range(3), int(kept_RE[:, 3:].sum()))
    slots, _ = sending._slots(routing, mesh, config, "triton", everywhere=False)
    form = RowFormat(40, 3, torch.bfloat16, torch.float32)
    rows = torch.zeros(slots.sent.num_rows, form.width, dtype=torch.bfloat16, device=DEVICE)
    slots.pack(routing.weights, form.rows(rows), form.weights(rows), "triton")
    own, total = rows[: int((slots.sent.row[:, 0] >= 0).sum())], int(kept_RE[:, :3].sum())
    ends = (form.rows(own), form.weights(own))
    arrived = ArrivedSlots.unpack(*ends, total, "triton", padded=True)
    arrived.pack_gradients(torch.rand(total, device=DEVICE), form.weights(own), "triton")
    slots.unpack_gradients(form.weights(rows), "triton")
    hidden, grad = torch.randn(13, 144, device=DEVICE), torch.randn(13, 72, device=DEVICE)
    weighted_swiglu_backward(grad, hidden, torch.rand(13, device=DEVICE), "triton")


def merging() -> None:
    """Parts of softmax attention."""
    outputs, lses = torch.randn(2, 11, 3, 96, device=DEVICE), torch.randn(2, 11, 3, device=DEVICE)
    narrow, lse = outputs[0].bfloat16(), lses[0].clone()
    merge_to(narrow, lse, narrow, lse, outputs[1], lses[1])  # in place, rounded
    merge_to(outputs[0], lses[0], narrow, lse, outputs[1], lses[1])


def run_all() -> None:
    """All of them."""
    for key_dim, value_dim in DIMS:
        for with_states in (False, True):
            attention(key_dim, value_dim, with_states)
    layers()
    experts()
    router()
    tokens_once()
    merging()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    run_all()
    print("ran every kernel")
