"""What the tests of the benchmark share."""

import sys
import types
from pathlib import Path

import pytest
import torch

from bench import patterns, shapes
from bench.backends.dense import FlashAttention3
from bench.backends.fastvideo import FastVideo
from vsa_cuda import block_sparse_attention, video_sparse_attention

SAMPLE = Path(__file__).resolve().parent / "data" / "bench_sample_rows.json"  # invented, not measured
TINY = shapes.SHAPES["tiny"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_problem(pattern="random", seed=0, **gates):
    problem = patterns.make_problem(TINY, pattern, seed=seed, device="cpu")
    for name, value in gates.items():
        setattr(problem, name, value)
    return problem


@pytest.fixture(scope="module")
def fake_fa3():
    """torch.ops.flash_attn_3 with the peers' signatures, computed by PyTorch."""
    library = torch.library.Library("flash_attn_3", "DEF")
    library.define("fwd(Tensor q, Tensor k, Tensor v, *, float softmax_scale, bool is_causal, int num_splits)"
                   " -> (Tensor, Tensor)")  # fmt: skip
    library.define("bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, *, Tensor(a!) dq,"
                   " Tensor(b!) dk, Tensor(c!) dv, float softmax_scale, bool is_causal) -> ()")  # fmt: skip

    def attend(q, k, v, scale):
        scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * scale
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float()), scores.logsumexp(-1)

    def forward(q, k, v, *, softmax_scale, is_causal, num_splits):
        out, lse = attend(q, k, v, softmax_scale)
        return out.to(q.dtype), lse

    def backward(dout, q, k, v, out, lse, *, dq, dk, dv, softmax_scale, is_causal):
        with torch.enable_grad():
            inputs = [x.detach().float().requires_grad_() for x in (q, k, v)]
            grads = torch.autograd.grad(attend(*inputs, softmax_scale)[0], inputs, dout.float())
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)

    library.impl("fwd", forward, "CPU")
    library.impl("bwd", backward, "CPU")
    yield
    library._destroy()


def found_fa3(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.SimpleNamespace(__version__="3.test"))
    return FlashAttention3()


def fake_fastvideo(monkeypatch):
    """fastvideo_kernel whose kernel is ours on padded blocks."""

    def attend(q, k, v, indices, counts, sizes):
        out = block_sparse_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), counts, indices, block_sizes=sizes, q_block_sizes=sizes
        )
        return out.transpose(1, 2), None

    def whole_op(q, k, v, sizes, q_sizes, topk, block_size, compress_attn_weight):
        # Blocks of the padded order stand for cubes: what matters here is that it runs.
        grid = (1, 1, q.shape[2])
        out = video_sparse_attention(q, k, v, grid, topk=topk, cube=(1, 1, 64), layout="bhsd")
        return out if compress_attn_weight is None else out * compress_attn_weight

    module = types.SimpleNamespace(
        __version__="0.test", block_sparse_attn_from_indices=attend, video_sparse_attn=whole_op
    )
    monkeypatch.setitem(sys.modules, "fastvideo_kernel", module)
    sparse = types.SimpleNamespace(_get_sm90_ops=lambda: (attend, attend))
    monkeypatch.setitem(sys.modules, "fastvideo_kernel.block_sparse_attn", sparse)
    return FastVideo()
