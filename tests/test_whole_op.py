"""video_sparse_attention through the kernels, forward and backward: in the simulator, and on a GPU."""

import contextlib
from unittest import mock

import pytest
import torch

from simulated import simulated_device
from tolerance import assert_within_tolerance
from vsa_cuda import _extension, _kernels, ops, video_sparse_attention
from vsa_cuda.geometry import CubeGrid

KERNEL_OPS = (
    "coarse_forward", "coarse_backward", "fine_forward", "combine_backward", "transpose_index",
    "fine_backward",
)  # fmt: skip
MAX_FORWARD_LAUNCHES = 6
MAX_BACKWARD_LAUNCHES = 10

needs_plans = pytest.mark.skipif(
    not _extension.is_available(), reason="vsa_cuda._C is not built: no host plan"
)
RUNNERS = [
    pytest.param("simulator", marks=[pytest.mark.simulator, needs_plans]),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@contextlib.contextmanager
def kernels_on(runner, tensors, seed):
    """The device to put inputs on; with the simulator, the ops of CPU tensors run the kernels."""
    if runner == "cuda":
        yield None
        return
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(simulated_device(*tensors, seed=seed))
        for name in KERNEL_OPS:
            stack.enter_context(mock.patch.object(ops, name, getattr(_kernels, name)))
        yield device


def dense_formula(q, k, v, gate_fine, gate_coarse, selected, grid, scale):
    """The op by torch in the dtype of its inputs, fp32 softmax; selected bool [B, H, N, N]. O(S^2) memory."""
    cube_of = grid.cube_of_token(q.device)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32

    def pool(x):
        sums = x.new_zeros(x.shape[0], grid.num_cubes, *x.shape[2:], dtype=wide).index_add(
            1, cube_of, x.to(wide)
        )
        return (sums / grid.cube_sizes(q.device)[:, None, None]).to(q.dtype)

    def attend(q, k, v, mask=None):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).to(wide) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).to(q.dtype), v)

    coarse = attend(pool(q), pool(k), pool(v))[:, cube_of]
    fine = attend(q, k, v, selected[..., cube_of, :][..., cube_of])
    return fine * gate_fine + coarse * gate_coarse


def run_op(runner, tensors, grid, topk, seed, **options):
    """out, selected bool [B, H, N, N], gradients of `tensors` (None for numbers), launches (fwd, bwd)."""
    names = ("query", "key", "value", "gate_fine", "gate_coarse")
    where = "cuda" if runner == "cuda" else "cpu"
    leaves = [
        x.to(where).detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in tensors[:5]
    ]
    grad_out = tensors[5].to(where)
    real = [x for x in leaves if isinstance(x, torch.Tensor)]
    with kernels_on(runner, [*real, grad_out], seed) as device:
        arguments = dict(zip(names, leaves, strict=True))
        out, counts, indices = video_sparse_attention(
            **arguments,
            video_shape=grid.video_shape,
            cube=grid.cube,
            topk=topk,
            return_selection=True,
            **options,
        )
        forward = len(device.reports) if device else None
        gradients = iter(torch.autograd.grad(out, real, grad_out))
        launches = (forward, len(device.reports) - forward) if device else None
    assert (counts == topk).all()
    selected = torch.zeros(*indices.shape[:3], grid.num_cubes, dtype=torch.bool, device=where)
    selected.scatter_(3, indices.long(), True)
    assert (selected.sum(-1) == topk).all(), "indices are not unique"
    return out, selected, [next(gradients) if isinstance(x, torch.Tensor) else None for x in leaves], launches


def gates(kind, like):
    return {
        "none": (None, None),
        "floats": (0.5, -1.5),
        "scalars": (torch.tensor(0.75), torch.tensor(-0.5)),
        "tensors": (torch.randn_like(like), torch.randn_like(like)),
        "coarse": (None, torch.randn_like(like)),
    }[kind]


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("gate", ["none", "floats", "scalars", "tensors", "coarse"])
@pytest.mark.parametrize(
    ("video_shape", "cube", "batch", "heads", "head_dim", "dtype", "topk"),
    [
        ((5, 6, 7), (4, 4, 4), 1, 2, 64, torch.bfloat16, 3),
        ((3, 9, 10), (1, 8, 8), 2, 1, 128, torch.float16, 4),
        ((5, 7, 9), (4, 4, 4), 1, 2, 128, torch.bfloat16, 12),  # dense, as the next two
        ((3, 5, 10), (1, 8, 8), 2, 1, 64, torch.float16, 6),
        ((1, 2, 5), (4, 4, 4), 1, 1, 128, torch.bfloat16, 2),
    ],
)
def test_forward_and_backward(runner, gate, video_shape, cube, batch, heads, head_dim, dtype, topk, seed):
    grid = CubeGrid(video_shape, cube)
    shape = (batch, grid.num_tokens, heads, head_dim)
    q, k, v, grad_out = (torch.randn(shape).to(dtype) for _ in range(4))
    gate_fine, gate_coarse = gates(gate, q)
    tensors = (q, k, v, gate_fine, gate_coarse, grad_out)
    out, selected, gradients, launches = run_op(runner, tensors, grid, topk, seed)
    if launches:
        assert launches[0] <= MAX_FORWARD_LAUNCHES and launches[1] <= MAX_BACKWARD_LAUNCHES

    def by_torch(dtype):
        given = [
            x if isinstance(x, torch.Tensor) else torch.tensor(1.0 if x is None else x) for x in tensors[:5]
        ]
        leaves = [x.to(out.device, dtype if x.dim() else None).detach().requires_grad_() for x in given]
        leaves = [x.to(dtype) if dtype == torch.float64 else x for x in leaves]
        leaves = [x.detach().requires_grad_() for x in leaves]
        result = dense_formula(*leaves, selected, grid, head_dim**-0.5)
        grads = torch.autograd.grad(result, leaves, grad_out.to(out.device, result.dtype))
        return result, grads

    exact, exact_gradients = by_torch(torch.float64)
    half, half_gradients = by_torch(dtype)
    assert_within_tolerance(out, exact, half, "out")
    names = ("query", "key", "value", "gate_fine", "gate_coarse")
    for name, got, want, baseline in zip(names, gradients, exact_gradients, half_gradients, strict=True):
        if got is None:
            continue
        if got.dim() == 0:
            # A sum of S * H * D products of rounded factors.
            torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2 * out.numel() ** 0.5)
        else:
            assert_within_tolerance(got, want, baseline.to(got.dtype), name)


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("topk", [32, 364])
def test_launches_of_a_training_step(topk, seed):
    """Kernels and memsets that the profiler sees, gates None."""
    shape = (16, 28, 52)
    q, k, v = (torch.randn(1, 23296, 12, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grad_out = torch.randn_like(q)

    def count(call):
        call()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]

    forward = count(lambda: video_sparse_attention(*leaves, shape, topk=topk))
    assert len(forward) <= MAX_FORWARD_LAUNCHES, forward
    out = video_sparse_attention(*leaves, shape, topk=topk)
    backward = count(lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True))
    assert len(backward) <= MAX_BACKWARD_LAUNCHES, backward


@pytest.mark.gpu
@pytest.mark.parametrize("topk", [16, 135])
@pytest.mark.parametrize("deterministic", [True, False])
def test_training_step_in_a_cuda_graph_and_compiled(deterministic, topk, seed):
    """The same bits, but where sums of the query's gradient may come in another order."""
    shape = (9, 20, 33)
    tokens = shape[0] * shape[1] * shape[2]
    q, k, v, gate = (torch.randn(1, tokens, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v, gate)]
    grad_out = torch.randn_like(q)

    options = {"topk": topk, "deterministic": deterministic}

    def step(function=video_sparse_attention):
        out = function(*leaves[:3], shape, gate_coarse=leaves[3], **options)
        return out, *torch.autograd.grad(out, leaves, grad_out)

    def check(results):
        for i, (a, b) in enumerate(zip(expected, results, strict=True)):
            if i == 1 and not deterministic:
                torch.testing.assert_close(a, b)
            else:
                assert torch.equal(a, b)

    expected = step()
    check(step(torch.compile(video_sparse_attention, fullgraph=True)))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The engine runs a leaf's gradient on the stream that made the leaf.
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for x in captured:
        x.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    check(captured)
