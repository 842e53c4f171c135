"""Keys and values made of something narrower, which moves between ranks in their place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


class LatentExpansion:
    """Keys and values of multi-head latent attention, of what a token sends.

    For head h, with the weight split at its rows K (keys) and V (values), and a latent that is R
    elements c and a key part p that all heads share::

        k_h = [W_h[:K] c, p]      v_h = W_h[K:] c

    Args:
        weight: ``[H, K + V, R]``.
        value_dim: V.
    """

    def __init__(self, weight: Tensor, value_dim: int) -> None:
        self.value_dim = value_dim
        self._rank, self._rows = weight.shape[2], weight.shape[:2]
        self._weight_WR = weight.flatten(0, 1)
        wide = torch.promote_types(torch.float32, weight.dtype)
        self.dweight = weight.new_zeros((), dtype=wide)  # sum over own and received tokens

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens.

        Args:
            latent: ``[T, B, R + P]``, of B rows of a batch; P elements are shared by all heads.

        Returns:
            Keys ``[T, B H, K + P]`` and values ``[T, B H, V]``, contiguous.
        """
        c, shared = latent.split((self._rank, latent.shape[-1] - self._rank), dim=-1)
        both_TBHW = linear(c, self._weight_WR).unflatten(-1, self._rows)
        k, v = both_TBHW.split((self._rows[1] - self.value_dim, self.value_dim), dim=-1)
        shared = shared.unsqueeze(2).expand(*k.shape[:3], -1)
        return torch.cat((k, shared), dim=-1).flatten(1, 2), v.flatten(1, 2).contiguous()

    def gradients(self, latent: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        """Gradient to the latent, and to the weight: added to ``dweight``.

        Args:
            latent: what was expanded.
            dk: ``[T, B H, K + P]``, float32 or float64, or the dtype of the latent.
            dv: ``[T, B H, V]``.

        Returns:
            Like ``latent``, in the dtype of ``dk``. Products are in the dtype of the weight.
        """
        rows, wide = latent.shape[:2], dk.dtype
        heads, width = self._rows
        dk, dv = (x.unflatten(1, (rows[1], heads)) for x in (dk, dv))
        dk, dshared = dk.split((width - self.value_dim, dk.shape[-1] - width + self.value_dim), -1)
        dboth_NW = torch.cat((dk, dv), dim=-1).to(self._weight_WR.dtype).flatten(0, 1).flatten(1)
        c_NR = latent[..., : self._rank].flatten(0, 1)
        self.dweight = self.dweight + dboth_NW.T @ c_NR
        dc = (dboth_NW @ self._weight_WR).to(wide).unflatten(0, rows)
        return torch.cat((dc, dshared.sum(2)), dim=-1)
