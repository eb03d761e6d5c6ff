"""Cube order with padding, which the peers' kernels need: [B, S, H, D] raster <-> [B, H, N * 64, D]."""

import torch

from vsa_cuda.geometry import CUBE_VOLUME, CubeGrid


class Tiling:
    """Real tokens of a cube first, then padding. `sizes` int32 [N], `valid` bool [N * 64]."""

    def __init__(self, grid: CubeGrid, device: torch.device):
        self.grid = grid
        self.sizes = grid.cube_sizes(device)
        self.padded_tokens = grid.num_cubes * CUBE_VOLUME
        slot = torch.arange(CUBE_VOLUME, device=device)
        self.valid = (slot < self.sizes[:, None]).flatten()
        real = grid.valid(device)
        order = (~real).to(torch.uint8).sort(dim=1, stable=True).indices
        tokens = grid.token_index(device).gather(1, order).flatten()
        self.tokens = tokens[self.valid]  # raster token of each real position, in cube order
        self.positions = torch.empty_like(self.tokens)
        self.positions[self.tokens] = self.valid.nonzero().flatten()  # padded position of each raster token

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, H, D] -> a new contiguous [B, H, N * 64, D] with zeros in the padding."""
        batch, _, heads, head_dim = x.shape
        padded = x.new_zeros(batch, heads, self.padded_tokens, head_dim)
        padded.index_copy_(2, self.positions, x.detach().transpose(1, 2))
        return padded

    def tile(self, x: torch.Tensor) -> torch.Tensor:
        """As `pad`, differentiable and without host synchronisation: what a call of such a kernel needs."""
        padded = x.new_zeros(x.shape[0], self.padded_tokens, *x.shape[2:])
        return padded.index_copy(1, self.positions, x).transpose(1, 2).contiguous()

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, N * 64, D] -> [B, S, H, D]."""
        return x.index_select(2, self.positions).transpose(1, 2)
