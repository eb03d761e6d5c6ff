"""topk of all cubes: dense attention on blocks of consecutive tokens; the coarse stage keeps its cubes."""

import math

import pytest
import torch

from attention_cases import LINEAR, Case
from called_ops import CalledOps
from inputs import random_video
from tolerance import assert_within_tolerance, half_precision_baseline
from vsa_cuda import reference, video_sparse_attention
from vsa_cuda.autograd import VideoSparse
from vsa_cuda.geometry import CubeGrid

GRIDS = [
    CubeGrid((5, 7, 9)),
    CubeGrid((5, 7, 9), (1, 8, 8)),
    CubeGrid((4, 4, 8)),
    CubeGrid((1, 1, 65)),
    CubeGrid((1, 1, 1)),
    CubeGrid.linear(130),
]
GATES = {
    "none": (None, None),
    "fine only": (0.0, 0.5),
    "no coarse": (0.0, None),
    "floats": (0.5, -1.5),
    "scalars": ("scalar", "scalar"),
    "tensors": ("tensor", "tensor"),
    "coarse tensor": ("tensor", None),
}


def make_gate(kind, like):
    if kind == "scalar":
        return torch.randn((), dtype=like.dtype).requires_grad_()
    return torch.randn_like(like).requires_grad_() if kind == "tensor" else kind


def by_cubes(query, key, value, grid, gate_coarse, gate_fine):
    """The same through the index: every list names every cube."""

    def split(gate):
        return (gate, 1.0) if isinstance(gate, torch.Tensor) else (None, 1.0 if gate is None else gate)

    (coarse, coarse_value), (fine, fine_value) = split(gate_coarse), split(gate_fine)
    scale = query.shape[-1] ** -0.5
    return VideoSparse.apply(
        query, key, value, fine, coarse, fine_value, coarse_value, coarse is not None or coarse_value != 0.0,
        grid.video_shape, grid.cube, grid.num_cubes, scale, False, True,
    )  # fmt: skip


@pytest.mark.parametrize("gates", GATES.values(), ids=GATES.keys())
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_the_route_over_cubes(grid, gates, seed):
    inputs = random_video(3, grid.video_shape, batch=2, dtype=torch.float64, requires_grad=True)
    gates = [make_gate(kind, inputs[0].detach()) for kind in gates]
    leaves = inputs + [x for x in gates if isinstance(x, torch.Tensor)]
    wanted, counts, indices, *_ = by_cubes(*inputs, grid, *gates)
    out, *selection = video_sparse_attention(
        *inputs, grid.video_shape, cube=grid.cube, sparsity=0.0, gate_coarse=gates[0], gate_fine=gates[1],
        return_selection=True,
    )  # fmt: skip
    torch.testing.assert_close(out, wanted)
    assert torch.equal(selection[0], counts) and torch.equal(selection[1], indices)
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, weight)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted, leaves, weight))
    assert all(x.is_contiguous() for x in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_layouts_and_dtypes(layout, dtype, seed):
    grid = CubeGrid((5, 7, 9))
    q, k, v, gate = random_video(4, grid.video_shape, dtype=dtype)
    wanted, *_ = by_cubes(q, k, v, grid, gate, None)
    if layout == "bhsd":
        q, k, v, gate = (x.transpose(1, 2) for x in (q, k, v, gate))
    out = video_sparse_attention(q, k, v, grid.video_shape, topk=10**6, gate_coarse=gate, layout=layout)
    out = out.transpose(1, 2) if layout == "bhsd" else out
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out, wanted)


def test_gradcheck(seed):
    q, k, v, coarse, fine = random_video(5, (1, 2, 9), heads=1, dtype=torch.float64, requires_grad=True)

    def function(*inputs):
        return video_sparse_attention(
            *inputs[:3], (1, 2, 9), topk=3, gate_coarse=inputs[3], gate_fine=inputs[4]
        )

    assert torch.autograd.gradcheck(function, (q, k, v, coarse, fine), fast_mode=True)


@pytest.mark.parametrize("gate_coarse", [None, 0.0])
def test_only_what_is_needed_runs(gate_coarse, seed):
    inputs = random_video(3, (5, 7, 9), requires_grad=True)
    with CalledOps() as called:
        out = video_sparse_attention(*inputs, (5, 7, 9), topk=12, gate_coarse=gate_coarse)
        out.sum().backward()
    forward, backward = ["fine_forward"], ["combine_backward", "fine_backward"]
    if gate_coarse is None:
        forward, backward = ["coarse_forward", *forward], [backward[0], "coarse_backward", backward[1]]
    assert called.names == forward + backward


def test_selection_takes_no_memory_of_its_size(seed):
    inputs = random_video(3, (5, 7, 9))
    _, counts, indices = video_sparse_attention(*inputs, (5, 7, 9), topk=12, return_selection=True)
    assert counts.shape == (1, 2, 12) and indices.shape == (1, 2, 12, 12)
    assert counts.dtype == indices.dtype == torch.int32
    assert indices.untyped_storage().nbytes() == 12 * 4 and counts.untyped_storage().nbytes() == 4


def test_saves_no_index(seed):
    """Of 256 cubes of one token each, an entry for each pair would be four times query."""
    inputs = random_video(3, (1, 1, 256), heads=1, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        video_sparse_attention(*inputs, (1, 1, 256), cube=(64, 1, 1), topk=256)
    assert max(sizes) == inputs[0].numel()


def test_compiles_to_one_graph(seed):
    inputs = random_video(4, (5, 7, 9), requires_grad=True)

    def function(query, key, value, gate):
        return video_sparse_attention(
            query, key, value, (5, 7, 9), topk=12, gate_coarse=gate, return_selection=True
        )

    wanted, compiled = function(*inputs), torch.compile(function, fullgraph=True)(*inputs)
    for x, y in zip(compiled, wanted, strict=True):
        torch.testing.assert_close(x, y)
    gradients = (torch.autograd.grad(x[0].square().sum(), inputs) for x in (compiled, wanted))
    torch.testing.assert_close(*gradients)


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("return_selection", [False, True])
def test_memory_is_linear_in_tokens(return_selection, seed):
    """12,800 cubes: an int32 for each pair of them would be 655 MB, query is 26 MB."""
    shape = (1, 640, 320)
    inputs = [
        torch.randn(1, 640 * 320, 1, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    ]
    grad_out = torch.randn_like(inputs[0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = video_sparse_attention(*inputs, shape, sparsity=0.0, return_selection=return_selection)
    out = out[0] if return_selection else out
    gradients = torch.autograd.grad(out, inputs, grad_out)
    assert torch.cuda.max_memory_allocated() - before < 10 * out.numel() * out.element_size()
    assert all(x.isfinite().all() for x in (out, *gradients))


def check_against_reference(device, video_shape, heads, head_dim, seed):
    """Output and gradients, without the coarse output, against float64."""
    blocks = (1, 1, math.prod(video_shape))
    case = Case(blocks, LINEAR, heads=heads, head_dim=head_dim, lists="dense", seed=seed)
    grad_out = case.randn(*case.query.shape).to(case.dtype).to(device)
    q, k, v = inputs = [x.to(device).requires_grad_() for x in (case.query, case.key, case.value)]
    out = video_sparse_attention(q, k, v, video_shape, sparsity=0.0, gate_coarse=0.0)
    gradients = torch.autograd.grad(out, inputs, grad_out)
    q, k, v = (x.detach() for x in inputs)
    exact, grids = [x.double() for x in (q, k, v)], (case.q_grid, case.kv_grid, case.scale)
    expected, lse = reference.fine_forward(*exact, None, None, *grids)
    _, delta, *_ = reference.combine_backward(
        grad_out.double(), expected, None, None, case.q_grid, None, None
    )
    wanted = reference.fine_backward(grad_out.double(), *exact, lse, delta, None, None, *grids)
    index = case.kv_num_blocks.to(device), case.kv_indices.to(device)
    baseline = half_precision_baseline(q, k, v, *index, *grids, grad_out)
    assert_within_tolerance(out, expected, baseline[0], "out")
    for name, *versions in zip("qkv", gradients, wanted, baseline[1:], strict=True):
        assert_within_tolerance(*versions, f"d{name}")


def test_half_precision_against_float64(seed):
    check_against_reference("cpu", (5, 7, 9), 2, 64, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("video_shape", [(9, 30, 41), (8, 16, 24)])
def test_gpu_against_float64(video_shape, head_dim, seed):
    check_against_reference("cuda", video_shape, 3, head_dim, seed)


@pytest.mark.gpu
def test_gpu_repeats_its_bits(seed):
    shape = (9, 30, 41)
    inputs = [
        torch.randn(1, 9 * 30 * 41, 3, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(4)
    ]

    def step():
        out = video_sparse_attention(
            *inputs[:3], shape, sparsity=0.0, gate_coarse=inputs[3], deterministic=True
        )  # fmt: skip
        return out, *torch.autograd.grad(out, inputs, out.detach())

    first = step()
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(first, step(), strict=True))
