"""FLOP counts of attention, and the paper's accounting of training FLOPs."""

from dataclasses import dataclass

import torch

from vsa_cuda.geometry import CUBE_VOLUME, CubeGrid

BACKWARD_FACTOR = 2.5  # five matrix products against two


def executed_pairs(kv_num_blocks: torch.Tensor) -> int:
    """Pairs of 64x64 blocks in all lists."""
    return int(kv_num_blocks.sum(dtype=torch.int64))


def dense_pairs(batch: int, heads: int, tokens: int) -> int:
    """Pairs of blocks of 64 consecutive tokens: what the whole op computes with every cube chosen."""
    return batch * heads * (-(-tokens // CUBE_VOLUME)) ** 2


def executed_flops(pairs: int, head_dim: int, backward: bool = False) -> float:
    """FLOPs of whole 64x64 pairs, partial cubes counted as full; kernels may compute fewer (thin cubes)."""
    return 4 * pairs * CUBE_VOLUME**2 * head_dim * (BACKWARD_FACTOR if backward else 1)


def real_flops(
    grid: CubeGrid,
    kv_num_blocks: torch.Tensor,
    kv_indices: torch.Tensor,
    head_dim: int,
    backward: bool = False,
) -> float:
    """FLOPs between real tokens alone. kv_num_blocks [B, H, N], kv_indices [B, H, N, max_blocks]."""
    sizes = grid.cube_sizes(kv_indices.device).long()
    listed = torch.arange(kv_indices.shape[-1], device=kv_indices.device) < kv_num_blocks[..., None]
    keys = 0
    for batch in range(kv_indices.shape[0]):
        for head in range(kv_indices.shape[1]):
            ids = torch.where(listed[batch, head], kv_indices[batch, head], 0).long()
            key_tokens = torch.where(listed[batch, head], sizes[ids], 0).sum(dim=-1)
            keys += int((key_tokens * sizes).sum())
    return 4 * keys * head_dim * (BACKWARD_FACTOR if backward else 1)


def dense_flops(batch: int, heads: int, tokens: int, head_dim: int, backward: bool = False) -> float:
    """FLOPs of dense attention over real tokens."""
    return 4 * batch * heads * tokens**2 * head_dim * (BACKWARD_FACTOR if backward else 1)


@dataclass(frozen=True)
class TrainingFlops:
    """The paper's accounting: 6 N per token for the weights, FlashAttention's formula for attention.

    Attention costs 4 S dim per token and layer forward and 2.5 times that backward: 14 S dim in all.
    """

    params: float = 410e6
    dim: int = 1024
    layers: int = 24
    tokens: int = 16 * 32 * 32
    topk: int = 32
    gate_projections: int = 0

    @property
    def weights(self) -> float:
        """FLOPs per token of the dense model's weights."""
        return 6 * self.params

    @property
    def attention(self) -> float:
        """FLOPs per token of dense attention."""
        return 4 * (1 + BACKWARD_FACTOR) * self.tokens * self.dim * self.layers

    @property
    def attention_cut(self) -> float:
        return self.tokens / CUBE_VOLUME / self.topk

    @property
    def sparse(self) -> float:
        """FLOPs per token with VSA: the chosen cubes, the coarse stage, and the gates' projections."""
        coarse = self.attention / CUBE_VOLUME**2
        gates = 6 * self.gate_projections * self.dim**2 * self.layers
        return self.weights + self.attention / self.attention_cut + coarse + gates

    @property
    def reduction(self) -> float:
        """Training FLOPs of the dense model over those with VSA."""
        return (self.weights + self.attention) / self.sparse

    @property
    def attention_share(self) -> float:
        return self.attention / (self.weights + self.attention)


def implied_attention_share(reduction: float, attention_cut: float) -> float:
    """Share of attention in dense FLOPs at which cutting it by `attention_cut` gives `reduction`."""
    return (1 - 1 / reduction) / (1 - 1 / attention_cut)
