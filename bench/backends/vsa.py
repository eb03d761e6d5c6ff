"""This package."""

from pathlib import Path

import torch

import vsa_cuda
from bench.backends.base import Backend, Work, autograd_work
from bench.patterns import Problem


class Vsa(Backend):
    name = "vsa_cuda"

    def __init__(self):
        extension = vsa_cuda.info()["extension"]
        super().__init__(vsa_cuda.__version__, Path(extension) if Path(extension).is_file() else None)
        self.deterministic = False

    def fine(self, problem: Problem, backward: bool) -> Work:
        query, key, value = _inputs(problem, backward)
        shape = problem.shape
        grid = {} if shape.video_shape is None else {"video_shape": shape.video_shape, "cube": shape.cube}

        def attend(return_lse=False):
            return vsa_cuda.block_sparse_attention(
                query, key, value, problem.kv_num_blocks, problem.kv_indices, **grid,
                deterministic=self.deterministic, return_lse=return_lse,
            )  # fmt: skip

        work = autograd_work(attend, [query, key, value], problem.grad_out) if backward else Work(attend)
        work.lse = lambda: attend(return_lse=True)[1].detach()
        return work

    def whole_op(self, problem: Problem, backward: bool) -> Work:
        inputs = _inputs(problem, backward)
        gates = {"gate_coarse": problem.gate_coarse, "gate_fine": problem.gate_fine}
        if backward:
            gates = {
                name: gate.detach().requires_grad_() if isinstance(gate, torch.Tensor) else gate
                for name, gate in gates.items()
            }
        shape = problem.shape
        video_shape, cube = shape.grid.video_shape, shape.grid.cube

        def attend(return_selection=False):
            return vsa_cuda.video_sparse_attention(
                *inputs, video_shape, cube=cube, topk=problem.topk, **gates,
                deterministic=self.deterministic, return_selection=return_selection,
            )  # fmt: skip

        leaves = [*inputs, *(gate for gate in gates.values() if isinstance(gate, torch.Tensor))]
        work = autograd_work(attend, leaves, problem.grad_out) if backward else Work(attend)
        work.selection = lambda: attend(return_selection=True)[1:]
        return work


def _inputs(problem: Problem, backward: bool) -> list[torch.Tensor]:
    inputs = (problem.query, problem.key, problem.value)
    return [x.detach().requires_grad_() if backward else x for x in inputs]
