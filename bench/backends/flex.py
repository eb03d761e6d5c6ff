"""torch FlexAttention with the same lists as a BlockMask of 64x64 blocks."""

import torch

from bench.backends.base import Backend, Missing, Work, autograd_work
from bench.backends.tiles import Tiling
from bench.patterns import Problem


class Flex(Backend):
    """Tokens are brought to cube order, padded to 64 a cube, before the timing starts."""

    name = "flex"

    def __init__(self):
        try:
            import triton
            from torch.nn.attention import flex_attention
        except ImportError as error:
            raise Missing(f"FlexAttention needs Triton ({error})") from error
        super().__init__(f"torch {torch.__version__}, triton {triton.__version__}")
        self._attend = torch.compile(flex_attention.flex_attention, dynamic=False)

    def fine(self, problem: Problem, backward: bool) -> Work:
        tiling = Tiling(problem.grid, problem.query.device)
        inputs = [tiling.pad(x).requires_grad_(backward) for x in (problem.query, problem.key, problem.value)]
        mask = block_mask(problem, tiling)

        def forward():
            return self._attend(*inputs, block_mask=mask, scale=problem.scale, kernel_options=_BLOCKS)

        work = autograd_work(forward, inputs, tiling.pad(problem.grad_out)) if backward else Work(forward)
        work.to_raster = tiling.unpad
        return work


_BLOCKS = {name: 64 for name in ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")}


def block_mask(problem: Problem, tiling: Tiling):
    """The lists as a BlockMask: full cubes in its full list, partial ones where the mask is evaluated."""
    from torch.nn.attention.flex_attention import BlockMask

    counts, indices = problem.kv_num_blocks, problem.kv_indices.long()
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    whole = tiling.grid.cube_sizes(indices.device)[indices] == 64
    valid = tiling.valid

    def real_key(batch, head, query, key):
        return valid[key]

    blocks = tiling.grid.num_cubes

    def lists(chosen):
        # A stable sort brings the chosen entries to the front, still ascending. BlockMask reads the number of
        # key blocks off the width.
        order = (~chosen).to(torch.uint8).sort(dim=-1, stable=True).indices
        entries = torch.nn.functional.pad(indices.gather(-1, order), (0, blocks - indices.shape[-1]))
        return chosen.sum(dim=-1, dtype=torch.int32), entries.to(torch.int32)

    partial, full = lists(listed & ~whole), lists(listed & whole)
    length = tiling.padded_tokens
    return BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=64, mask_mod=real_key, seq_lengths=(length, length)
    )
