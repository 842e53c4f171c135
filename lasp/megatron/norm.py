"""RMSNorms that know tensor and sequence parallelism, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lasp._core.impl import Impl
from lasp.layers.options import LightningOptions
from lasp.layers.parts import gated_norm
from lasp.layers.rms_norm import RMSNorm
from lasp.megatron.checks import parameter_device, require


class ResidualNorm(RMSNorm):
    """RMSNorm of the residual stream, also with sequence parallelism.

    Megatron's own torch norm refuses that. The gradient of its tokens is then summed over the
    tensor-parallel ranks by Megatron.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        part = "ResidualNorm"
        require(config, part, normalization="RMSNorm", layernorm_zero_centered_gamma=False)
        require(config, part, fused_residual_rmsnorm=False)
        super().__init__(
            hidden_size, eps, device=parameter_device(config), dtype=config.params_dtype
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class HeadsNorm(MegatronModule):
    """The output norm of a lightning layer, its gate and weight: each tp rank has a slice.

    Communication: for a norm over all heads one all-reduce of 4 bytes a token over tp, forward and
    backward; for a norm over groups of heads none, each is on one rank.
    """

    def __init__(
        self,
        config: TransformerConfig,
        size: int,
        *,
        options: LightningOptions,
        tp_group: dist.ProcessGroup,
    ) -> None:
        super().__init__(config=config)
        self.options, self.tp_group = options, tp_group
        weight = torch.ones(
            size // tp_group.size(), device=parameter_device(config), dtype=config.params_dtype
        )
        self.weight = nn.Parameter(weight)
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim, self.weight.partition_stride = 0, 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor, gate: Tensor, *, impl: Impl) -> Tensor:
        """``x`` and ``gate`` [..., size / tp], this rank's features."""
        options, tp_size = self.options, self.tp_group.size()
        tp_group = self.tp_group if tp_size > 1 and options.norm_groups == 1 else None
        num_groups = max(options.norm_groups // tp_size, 1)
        return gated_norm(x, gate, self.weight, options, num_groups, tp_group, impl=impl)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weight, cut over tp along its one dim."""
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        return sharded


class OneHeadNorm(MegatronModule):
    """RMSNorm over each head, whose weight ``[head_dim]`` all heads share.

    Every tensor-parallel rank has the whole weight and norms its own heads.

    Communication: in the backward one all-reduce over tp of the gradient of the weight.
    """

    def __init__(
        self, config: TransformerConfig, *, eps: float, tp_group: dist.ProcessGroup
    ) -> None:
        super().__init__(config=config)
        self.eps, self.tp_group = eps, tp_group
        weight = torch.ones(
            config.kv_channels, device=parameter_device(config), dtype=config.params_dtype
        )
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor | None) -> Tensor:
        """``x`` ``[..., H / tp, head_dim]`` normed; for None the weight, for who norms by it."""
        weight: Tensor = copy_to_tensor_model_parallel_region(self.weight, self.tp_group)
        if x is None:
            return weight
        normed: Tensor = F.rms_norm(x, x.shape[-1:], weight, self.eps)
        return normed
