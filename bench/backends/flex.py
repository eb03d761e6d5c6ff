"""torch FlexAttention with the same lists as a BlockMask of 64x64 blocks."""

from dataclasses import replace

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
        _fit_backward_blocks()
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
# As inductor takes them with blocks of 64 on Hopper (head_dim below 64). At head_dim 128 three stages of two
# tiles and two resident ones are 128 KB of shared memory.
_BLOCKS |= {"bwd_num_warps": 4, "bwd_num_stages": 3}


def _fit_backward_blocks() -> None:
    """Cuts the blocks of inductor's backward configurations to the mask's 64.

    Inductor drops a configuration whose own blocks do not divide the mask's, before kernel_options replace
    them. On Hopper its only one at head_dim 128 (in torch 2.13 at 64, too) has blocks of 128: none is left,
    and the backward ends in NoValidChoicesError.
    """
    from torch._inductor.choices import InductorChoices

    default = InductorChoices.get_flex_attention_bwd_configs
    names = ("block_m1", "block_n1", "block_m2", "block_n2")

    def fitting(self, *args, **kwargs):
        return [
            replace(config, **{name: min(64, getattr(config, name)) for name in names})
            for config in default(self, *args, **kwargs)
        ]

    InductorChoices.get_flex_attention_bwd_configs = fitting


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
