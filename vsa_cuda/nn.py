"""Module form of video_sparse_attention, for a block of a video diffusion transformer."""

import torch
from torch import nn

from vsa_cuda import checks
from vsa_cuda.functional import video_sparse_attention


class VideoSparseAttention(nn.Module):
    """Video Sparse Attention with the coarse gate projected from the hidden states.

    Stands where a block calls its self-attention core, after the q, k, v projections, their norms and RoPE,
    and before the output projection. It owns `to_gate_compress`, Linear(dim, dim): the gate of the coarse
    output. It is zero-initialised, so a pretrained dense block starts from the fine stage alone (exactly its
    dense attention while topk covers all cubes), and has the name that VSA checkpoints use. There is no fine
    gate.

    Args:
        dim: width of the hidden states, heads * head_dim.
        topk, sparsity: default for forward; at most one. See video_sparse_attention.
        cube, scale, layout, deterministic: see video_sparse_attention.
        bias, device, dtype: of `to_gate_compress`. On device "meta" call reset_parameters after to_empty.
    """

    def __init__(
        self,
        dim: int,
        *,
        topk: int | None = None,
        sparsity: float | None = None,
        cube: tuple[int, int, int] = (4, 4, 4),
        scale: float | None = None,
        layout: str = "bshd",
        deterministic: bool | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        checks.check_layout(layout)
        if topk is not None and sparsity is not None:
            checks.fail(ValueError, "topk, sparsity", "both", "at most one", "pass topk or sparsity")
        self.dim = dim
        self.topk = topk
        self.sparsity = sparsity
        self.cube = cube
        self.scale = scale
        self.layout = layout
        self.deterministic = deterministic
        self.to_gate_compress = nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeroes the gate projection: the coarse output starts switched off."""
        for parameter in self.to_gate_compress.parameters():
            nn.init.zeros_(parameter)

    def project_gate(self, hidden_states: torch.Tensor, head_dim: int) -> torch.Tensor:
        """[B, S, dim] -> the coarse gate, laid out like query.

        For sequence parallelism: the gate of the local tokens goes through the same all-to-all as query, key
        and value, then into forward as `gate`.
        """
        gate = self.to_gate_compress(hidden_states).unflatten(-1, (-1, head_dim))
        return gate if self.layout == "bshd" else gate.transpose(1, 2)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        video_shape: tuple[int, int, int],
        *,
        hidden_states: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        topk: int | None = None,
        sparsity: float | None = None,
        return_selection: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attends over one video grid.

        Args:
            query, key, value: [B, S, heads, head_dim] ("bhsd": [B, heads, S, head_dim]), normed and rotated.
            video_shape: (T, H, W) in tokens.
            hidden_states: [B, S, dim], what the q, k, v projections read (the normed, modulated states), in
                the dtype of query unless under autocast. The gate is projected from it.
            gate: the coarse gate itself, like query; see project_gate. Exactly one of hidden_states and gate.
            topk, sparsity: override the module's for this call (a schedule: pass topk).

        Returns:
            Like query; flatten heads and head_dim for the output projection. With return_selection also the
            index, see video_sparse_attention.
        """
        checks.check_one_of(
            "hidden_states",
            hidden_states,
            "gate",
            gate,
            "pass hidden_states [B, S, dim], or gate=module.project_gate(hidden_states, head_dim)",
        )
        if gate is None:
            checks.check_tensor("hidden_states", hidden_states)
            if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.dim:
                checks.fail(
                    ValueError,
                    "hidden_states",
                    f"shape {tuple(hidden_states.shape)}",
                    f"[B, S, dim] with dim {self.dim}",
                    "pass what the query projection reads",
                )
            gate = self.project_gate(hidden_states, query.shape[-1])
        if topk is None and sparsity is None:
            topk, sparsity = self.topk, self.sparsity
        return video_sparse_attention(
            query,
            key,
            value,
            video_shape,
            topk=topk,
            sparsity=sparsity,
            gate_coarse=gate,
            cube=self.cube,
            scale=self.scale,
            layout=self.layout,
            deterministic=self.deterministic,
            return_selection=return_selection,
        )

    def extra_repr(self) -> str:
        amount = f"sparsity={self.sparsity}" if self.topk is None else f"topk={self.topk}"
        return f"dim={self.dim}, {amount}, cube={self.cube}, layout={self.layout!r}"
