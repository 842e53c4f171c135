"""Megatron-LM's own unit tests, run with our parts in the place of Megatron's.

    git clone --branch core_v0.19.0 https://github.com/NVIDIA/Megatron-LM
    python -m tests.megatron.upstream Megatron-LM                  # CPU ranks over gloo
    python -m tests.megatron.upstream Megatron-LM --device cuda    # NCCL, a GPU a rank

The checkout's ``megatron`` is imported, not an installed one; nothing of it is copied. Its tests
are functions and classes called here directly, without its conftest, which downloads data. In a
test module the names of Megatron's classes are bound to ours, and those options to other values
that the test takes as they come and our parts refuse (dropout, GELU experts, balancing in each
sequence).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import multiprocessing
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from tests.ranks import RankError, close_pools, run_on_ranks


class Check(NamedTuple):
    """One test of upstream's with one of our parts.

    Attributes:
        name: printed.
        ranks: how many it takes.
        run: rank function, called with the folder for checkpoints and ``arguments``.
        arguments: of ``run``.
        skip: why it is not run, if so.
    """

    name: str
    ranks: int
    run: Callable[..., None]
    arguments: tuple[Any, ...]
    skip: str = ""


class OnCpu(TorchFunctionMode):
    """Makes tensors on the CPU that are asked for on a GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return function(*args, **kwargs)


@functools.cache
def prepare(checkout: str, device: str) -> None:
    """Make the checkout importable in this process, and the CPU stand in for GPUs."""
    import tests

    if sys.version_info < (3, 12):  # Megatron's training package is for 3.12
        import typing_extensions

        typing.override = typing_extensions.override
    sys.path.insert(1, checkout)  # after this repository, whose tests have the same name
    tests.__path__.append(str(Path(checkout, "tests")))
    # Megatron writes checkpoints from processes of its own, which a daemon may not have.
    multiprocessing.current_process()._config["daemon"] = False
    sys.argv = sys.argv[:1]  # its parse_args reads them
    if device == "cpu":
        from tests.megatron.cpu import run_on_cpu

        run_on_cpu()
        torch.Tensor.cuda = lambda self, *_, **__: self
        torch.nn.Module.cuda = lambda self, *_, **__: self
        torch.cuda.set_device = lambda *_: None
        torch.cuda.Stream = torch.cuda.current_stream = lambda *_, **__: mock.MagicMock()
        torch.cuda.stream = lambda _: nullcontext()
        OnCpu().__enter__()
    utilities = upstream("test_utilities")
    utilities.Utils.rank, utilities.Utils.world_size = dist.get_rank(), dist.get_world_size()


def upstream(name: str) -> Any:
    return importlib.import_module(f"tests.unit_tests.{name}")


def attention_spec(part: str) -> Any:
    """Spec of a self-attention of ours, or of Megatron's with our core attention."""
    from tests.megatron.test_gpt import layer_spec

    if part == "ring self-attention":
        from ring.megatron import ring_attention_spec

        return ring_attention_spec(rotary_dim=16)
    return layer_spec((part,)).submodules.self_attention


def supported(config: Callable[..., Any], device: str, **values: Any) -> Callable[..., Any]:
    """TransformerConfig with other values for some options; weights made where the tensors are."""
    if device == "cpu":
        values["use_cpu_initialization"] = True
    return lambda **options: config(**(options | values))


def parallel_attention(
    folder: str, device: str, part: str, tp: int, sp: bool, cp: int, packed: bool
) -> None:
    """The layer under tp, sp and cp is that on one rank: output, bias and input gradient."""
    module = upstream("transformer.test_attention")
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from lasp.megatron import ResidualNorm
    from tests.megatron.test_gpt import layer_spec

    layer = layer_spec(("lightning",))
    layer.submodules.self_attention = attention_spec(part)
    config = supported(module.TransformerConfig, device)(
        num_layers=1,
        hidden_size=128,
        num_attention_heads=4,
        normalization="RMSNorm",
        bf16=True,
        params_dtype=torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    module._test_parallel_attention_correctness(
        config,
        TransformerBlockSubmodules([layer], layer_norm=ResidualNorm),
        Path(folder),
        atol=1e-2,
        rtol=1e-2,
        tp=tp,
        sp=sp,
        cp=cp,
        seed=123,
        sequence_length=256,
        sequence_packing=packed,
    )


def packed_attention(folder: str, device: str, part: str, suite: str, test: str) -> None:
    """Packs, padded too, through a layer on one rank."""
    module = upstream("transformer.test_attention_packed_seq")
    spec = attention_spec(part)
    layer = SimpleNamespace(self_attention=SimpleNamespace(submodules=spec.submodules))
    params = {k: v for k, v in spec.params.items() if k != "attn_mask_type"}
    config = supported(module.TransformerConfig, device, attention_dropout=0.0)
    with ExitStack() as stack:
        for name, value in (
            ("SelfAttention", functools.partial(spec.module, **params)),
            ("get_gpt_layer_with_transformer_engine_submodules", lambda: layer),
            ("TransformerConfig", config),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        instance = getattr(module, suite)()
        instance.setup_method(None)
        getattr(instance, test)()
        instance.teardown_method(None)


def expert_options(device: str) -> dict[str, Any]:
    return {
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "moe_router_load_balancing_type": "global_aux_loss",
    }


def moe_layer(folder: str, device: str, suite: str, test: str, arguments: dict[str, Any]) -> None:
    """Forward and backward of the layer alone."""
    module = upstream("transformer.moe.test_moe_layer")
    from moe_parallel.megatron import ExpertParallelMoELayer

    config = supported(module.TransformerConfig, device, **expert_options(device))
    with (
        mock.patch.object(module, "MoELayer", ExpertParallelMoELayer),
        mock.patch.object(module, "TransformerConfig", config),
    ):
        getattr(getattr(module, suite)(), test)(**arguments)


def token_dispatcher(
    folder: str, device: str, test: str, sizes: dict[str, int], capacity: float | None
) -> None:
    """Rows sent to their experts and back are the tokens they came from; so are gradients."""
    module = upstream("transformer.moe.test_token_dispatcher")
    config = supported(module.TransformerConfig, device, **expert_options(device))
    with (
        mock.patch.object(module, "MoELayer", layer_with_dispatcher()),
        mock.patch.object(module, "TransformerConfig", config),
    ):
        container = module.MoEModelTestContainer(
            pp_size=1, moe_expert_capacity_factor=capacity, **sizes
        )
        getattr(container, test)()


def layer_with_dispatcher() -> type:
    """Our layer with its stages under the names of a router and of a dispatcher.

    The tests multiply rows by the probs they get with them and sum; ours are weighted when they
    are back, by the probs of dispatch_preprocess, so those of the rows are 1.
    """
    from moe_parallel import exchange
    from moe_parallel.megatron import ExpertParallelMoELayer

    class Router(torch.nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.route, self.topk = layer.route, layer.config.moe_router_topk

        def forward(self, hidden: torch.Tensor) -> Any:
            return self.route(hidden if hidden.dim() == 3 else hidden.unsqueeze(1))

    class Dispatcher:
        def __init__(self, layer: Any) -> None:
            self.layer, self.etp = layer, layer.moe.groups.etp
            self.token_dispatch, self.token_combine = layer.dispatch, layer.combine

        def dispatch_preprocess(self, hidden: Any, routing_map: Any, probs: Any) -> Any:
            self.shape = hidden.shape
            hidden = hidden if hidden.dim() == 3 else hidden.unsqueeze(1)
            return self.layer.preprocess(hidden, probs, routing_map)

        def dispatch_postprocess(self, rows: Any, probs: Any) -> Any:
            call = self.layer._call
            call.probs = probs
            rows = exchange.gather_etp(rows, call.plan, self.etp)
            rows = exchange.group_by_expert(rows, call.plan)
            counts = torch.tensor(call.plan.expert_rows)
            return rows, counts, rows.new_ones(len(rows))

        def combine_preprocess(self, rows: Any) -> Any:
            plan = self.layer._call.plan
            return exchange.scatter_etp(exchange.group_by_source(rows, plan), plan, self.etp)

        def combine_postprocess(self, rows: Any) -> Any:
            return self.layer.postprocess(rows, None).view(self.shape)

    class Layer(ExpertParallelMoELayer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.router, self.token_dispatcher = Router(self), Dispatcher(self)

    return Layer


def checks() -> Iterator[Check]:
    splits = [(4, False, 1), (4, True, 1), (2, False, 2), (2, True, 2), (1, False, 4)]
    splits += [(2, True, 1), (1, False, 2)]  # for two GPUs
    for part in ("lightning", "ring", "ring self-attention"):
        for tp, sp, cp in splits:
            for packed in (False, True):
                name = f"_test_parallel_attention_correctness[{part}, tp {tp}, sp {sp}, cp {cp}"
                why = "Megatron's packs, zigzag in every document: refused with cp > 1"
                yield Check(
                    name + (", packed]" if packed else "]"),
                    tp * cp,
                    parallel_attention,
                    (part, tp, sp, cp, packed),
                    why if packed and cp > 1 else "",
                )
    for suite in ("", "Padded"):
        suite = f"TestParallelAttentionWithPacked{suite}Sequence"
        tests = ["test_gpu_forward"] + ["test_checkpointed_gpu_forward"] * ("Padded" not in suite)
        for part in ("ring", "ring self-attention"):
            for test in tests:
                yield Check(f"{suite}.{test}[{part}]", 1, packed_attention, (part, suite, test))
        yield Check(f"{suite}[lightning]", 1, packed_attention, (), "asserts the shape of a bias")
    yield from moe_checks()


def moe_checks() -> Iterator[Check]:
    shared = {"moe_token_dispatcher_type": "alltoall", "num_moe_experts": 4}
    more = {"with_padding_mask": False, "fp8": False}
    for suite, test, extra in (
        ("TestMoELayerFP16", "test_moe_layer_fp16_forward_backward", {}),
        ("TestMoELayerRecompute", "test_moe_layer_recompute_forward_backward", more),
    ):
        for tp, ep in ((1, 1), (1, 2), (2, 2)):
            arguments = shared | extra | {"tp_size": tp, "ep_size": ep}
            yield Check(f"{suite}[tp {tp}, ep {ep}]", tp * ep, moe_layer, (suite, test, arguments))
    why = "a padding mask: refused, padding is what a token order leaves out"
    yield Check("TestMoELayerRecompute[with_padding_mask]", 1, moe_layer, (), why)
    for test, capacity in (("dispatcher_dropless_test", None), ("dispatcher_capacity_test", 0.5)):
        for tp, ep, etp in ((1, 1, 1), (1, 2, 1), (2, 1, 2), (1, 4, 1), (4, 1, 4), (2, 2, 2)):
            sizes = {"tp_size": tp, "ep_size": ep, "moe_tp_size": etp}
            name = f"MoEModelTestContainer.{test}[tp {tp}, ep {ep}, etp {etp}]"
            ranks = max(tp, ep * etp)
            yield Check(name, ranks, token_dispatcher, (test, sizes, capacity))
    for name, why in (
        ("MoEModelTestContainer.dispatcher_drop_and_pad_test", "padding to capacity: refused"),
        ("TestMoELayerInit", "GELU experts without a gate and TransformerEngine's"),
        ("TestMoELayerDispatcherDiscrepancy", "compares Megatron's dispatchers; ours is one"),
        ("TestAuxLoss, TestSeqAuxLoss", "losses in each sequence, refused; ours is global"),
    ):
        yield Check(name, 1, moe_layer, (), why)


def on_rank(checkout: str, run: Callable[..., None], device: str, *arguments: Any) -> None:
    prepare(checkout, device)
    folder, *rest = arguments
    run(folder, device, *rest)
    # The process that writing a checkpoint started would outlive this one.
    importlib.import_module(
        "megatron.core.dist_checkpointing.strategies.filesystem_async"
    )._results_queue = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a checkout of Megatron-LM, >= 0.16 and < 0.20")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("-k", default="", help="only the checks whose names have this")
    options = parser.parse_args()
    if not Path(options.checkout, "tests/unit_tests").is_dir():
        parser.error(f"checkout must have tests/unit_tests, got {options.checkout}")
    backend = {"cpu": "gloo", "cuda": "nccl"}[options.device]
    most = 4 if options.device == "cpu" else torch.cuda.device_count()
    counts, lines = dict.fromkeys(("passed", "skipped", "failed"), 0), []
    for check in sorted(checks(), key=lambda check: check.ranks):
        if options.k not in check.name:
            continue
        why = check.skip or (f"{check.ranks} ranks" if check.ranks > most else "")
        outcome = "skipped" if why else "passed"
        if not why:
            with tempfile.TemporaryDirectory() as folder:
                arguments = (check.run, options.device, folder, *check.arguments)
                checkout = str(options.checkout.resolve())
                try:
                    run_on_ranks(on_rank, check.ranks, checkout, *arguments, backend=backend)
                except RankError as error:
                    outcome, why = "failed", str(error)
            close_pools()  # process groups are never freed, and their threads keep polling
        counts[outcome] += 1
        lines.append(f"{outcome:8}{check.name}{': ' * bool(why)}{why}")
        print(lines[-1], flush=True)
    # Once more, below what Megatron has written.
    print("\n".join(lines), ", ".join(f"{n} {outcome}" for outcome, n in counts.items()), sep="\n")
    return counts["failed"]


if __name__ == "__main__":
    sys.exit(bool(main()))
