"""The reference's memory, time and chunks."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from oracles import close, randn
from reference_autograd import VideoSparse
from vsa_cuda import reference
from vsa_cuda.geometry import CubeGrid


def stages(grid, topk, dtype=torch.float32):
    """Forward and backward of everything, 2 heads, head_dim 16."""
    q, k, v, grad = (randn(1, grid.num_tokens, 2, 16, dtype=dtype) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse, indices = VideoSparse.apply(*inputs, None, None, grid, topk, 0.25)
    reference.transpose_index(torch.full(indices.shape[:3], topk), indices, grid.num_cubes)
    return out, lse, indices, *torch.autograd.grad(out, inputs, grad)


def test_chunks_do_not_change_results_and_runs_repeat(seed, monkeypatch):
    def run():
        torch.manual_seed(seed)
        return stages(CubeGrid((7, 9, 10)), 5, torch.float64)

    expected, repeated = run(), run()
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 1)
    for whole, again, one_row in zip(expected, repeated, run(), strict=True):
        close(again, whole, rtol=0, atol=0)
        close(one_row, whole)


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_iter(result) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_memory_is_linear_in_tokens(seed, monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 1 << 15)
    for cubes in (256, 512):
        grid = CubeGrid.linear(cubes * 64)
        with LargestTensor() as largest:
            stages(grid, topk=4)
        # The widest tensors are those of the inputs' size, with a zero cube for each head.
        assert largest.elements == 2 * 16 * 64 * (cubes + 1)


WAN_480P = """
import json, resource, sys, time
import torch
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from reference_autograd import VideoSparse
from vsa_cuda.geometry import CubeGrid

torch.set_num_threads(2)
grid = CubeGrid((21, 30, 52))
inputs = [torch.randn(1, grid.num_tokens, 2, 128).requires_grad_() for _ in range(3)]
start = time.perf_counter()
out, lse, indices = VideoSparse.apply(*inputs, None, None, grid, 32, 128**-0.5)
forward = time.perf_counter()
gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
end = time.perf_counter()
assert indices.shape == (1, 2, 624, 32)
assert all(bool(x.isfinite().all()) for x in (out, *gradients))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"forward": forward - start, "backward": end - forward, "peak_kib": peak}))
"""


def test_wan_480p_in_time_and_memory():
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", WAN_480P, root], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    # 32,760^2 scores of one head alone are 4.3 GB.
    assert used["peak_kib"] < 1.5 * 2**20, used
    assert used["forward"] + used["backward"] < 120, used
