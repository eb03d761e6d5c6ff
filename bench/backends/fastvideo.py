"""The VSA authors' kernel (fastvideo_kernel): BHSD, bf16, batch 1, cubes padded to 64 tokens."""

import importlib
from pathlib import Path

import torch

from bench.backends.base import Backend, Missing, Unsupported, Work, autograd_work
from bench.backends.dense import import_peers
from bench.backends.tiles import Tiling
from bench.machine import loaded_library
from bench.patterns import Problem


class FastVideo(Backend):
    name = "fastvideo"

    def __init__(self, peers: Path | None = None):
        try:
            self.module = importlib.import_module("fastvideo_kernel")
        except ImportError as error:
            if peers is None:
                raise Missing(f"fastvideo_kernel does not import ({error})") from error
            self.module = import_peers(peers).fastvideo()
        sparse = importlib.import_module("fastvideo_kernel.block_sparse_attn")
        forward, _ = sparse._get_sm90_ops()
        if forward is None:
            raise Missing("fastvideo_kernel has no sm_90 kernel here and would run its Triton one")
        library = loaded_library(r"fastvideo_kernel_ops.*\.so$")
        super().__init__(f"fastvideo_kernel {self.module.__version__}", library)

    def fine(self, problem: Problem, backward: bool) -> Work:
        """The kernel alone: tokens are in cube order before the timing starts."""
        _check(problem)
        tiling = Tiling(problem.grid, problem.query.device)
        inputs = [tiling.pad(x).requires_grad_(backward) for x in (problem.query, problem.key, problem.value)]

        def forward():
            return self.module.block_sparse_attn_from_indices(
                *inputs, problem.kv_indices, problem.kv_num_blocks, tiling.sizes
            )[0]

        work = autograd_work(forward, inputs, tiling.pad(problem.grad_out)) if backward else Work(forward)
        work.to_raster = tiling.unpad
        return work

    def whole_op(self, problem: Problem, backward: bool) -> Work:
        """video_sparse_attn with the tile and untile copies that raster tokens need."""
        _check(problem)
        if isinstance(problem.gate_fine, torch.Tensor) or problem.gate_fine not in (None, 1.0):
            raise Unsupported("fastvideo has no fine gate")
        gate = problem.gate_coarse
        if gate is not None and not isinstance(gate, torch.Tensor):
            raise Unsupported("fastvideo takes a coarse gate tensor or none")
        tiling = Tiling(problem.grid, problem.query.device)
        inputs = [x.detach().requires_grad_(backward) for x in (problem.query, problem.key, problem.value)]
        if gate is not None:
            inputs.append(gate.detach().requires_grad_(backward))

        def forward():
            query, key, value, *gates = (tiling.tile(x) for x in inputs)
            out = self.module.video_sparse_attn(
                query, key, value, tiling.sizes, tiling.sizes, problem.topk, block_size=problem.shape.cube,
                compress_attn_weight=gates[0] if gates else None,
            )  # fmt: skip
            return tiling.unpad(out)

        return autograd_work(forward, inputs, problem.grad_out) if backward else Work(forward)


def _check(problem: Problem) -> None:
    if problem.query.shape[0] != 1 or problem.query.dtype != torch.bfloat16:
        raise Unsupported("fastvideo takes batch 1 and bfloat16 on Hopper")
    if problem.scale != problem.shape.head_dim**-0.5:
        raise Unsupported("fastvideo has a fixed scale")
