"""The public functions against dense attention in plain PyTorch, and the rules of their arguments."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from called_ops import CalledOps
from inputs import attended, dense_attention, random_index, random_tokens, random_video
from vsa_cuda import block_sparse_attention, checks, topk_from_sparsity, video_sparse_attention
from vsa_cuda.geometry import CubeGrid

SHAPE = (5, 6, 7)
GRID = CubeGrid(SHAPE)


def coarse_output(query, key, value, grid, scale):
    """O_c at every token, by dense attention between cube means; scores [B, H, N, N]."""
    one_hot = torch.nn.functional.one_hot(grid.cube_of_token(), grid.num_cubes).to(query.dtype)
    means = one_hot.T / one_hot.sum(dim=0)[:, None]
    pooled = [torch.einsum("ns,bshd->bhnd", means, x) for x in (query, key, value)]
    scores = pooled[0] @ pooled[1].mT * scale
    out = torch.softmax(scores, dim=-1) @ pooled[2]
    return out[:, :, grid.cube_of_token()].transpose(1, 2), scores


def expected_output(query, key, value, grid, topk, gate_coarse, gate_fine, scale=None):
    """The whole op in plain PyTorch. For scores without ties."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    coarse, scores = coarse_output(query, key, value, grid, scale)
    indices = scores.topk(topk, dim=-1).indices.sort(dim=-1).values.to(torch.int32)
    counts = torch.full(indices.shape[:3], topk, dtype=torch.int32)
    fine, _ = dense_attention(query, key, value, attended(counts, indices, grid, grid), scale)
    return fine * gate_fine + coarse * gate_coarse, counts, indices


@pytest.mark.parametrize("cube", [(4, 4, 4), (1, 8, 8), (2, 4, 8)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_video_sparse_attention(head_dim, cube, seed):
    q, k, v, gate_coarse, gate_fine = random_video(5, SHAPE, batch=2, head_dim=head_dim, dtype=torch.float64)
    wanted = expected_output(q, k, v, CubeGrid(SHAPE, cube), 3, gate_coarse, gate_fine, scale=0.3)
    gates = dict(gate_coarse=gate_coarse, gate_fine=gate_fine)
    actual = video_sparse_attention(
        q, k, v, SHAPE, topk=3, cube=cube, scale=0.3, return_selection=True, **gates
    )
    torch.testing.assert_close(actual, wanted)
    assert actual[0].is_contiguous() and actual[1].dtype == actual[2].dtype == torch.int32


GATES = {
    "none": (1.0, 1.0),
    "zero": (0.0, 1.0),
    "float": (-0.5, 2.0),
    "coarse tensor": ("x", 1.0),
    "tensors": ("x", "x"),
}


@pytest.mark.parametrize("gates", GATES.values(), ids=GATES.keys())
def test_gradients_of_video_sparse_attention(gates, seed):
    inputs = random_video(3, SHAPE, dtype=torch.float64, requires_grad=True)
    gates = [torch.randn_like(inputs[0]).requires_grad_() if gate == "x" else gate for gate in gates]
    inputs += [gate for gate in gates if isinstance(gate, torch.Tensor)]
    weight = torch.randn_like(inputs[0])
    wanted, *_ = expected_output(*inputs[:3], GRID, 3, *gates)
    out = video_sparse_attention(*inputs[:3], SHAPE, topk=3, gate_coarse=gates[0], gate_fine=gates[1])
    actual = torch.autograd.grad(out, inputs, weight)
    torch.testing.assert_close(actual, torch.autograd.grad(wanted, inputs, weight))
    assert all(x.is_contiguous() for x in actual)


def test_dense_topk_without_coarse_output_is_dense_attention(seed):
    q, k, v = random_video(3, SHAPE, dtype=torch.float64)
    wanted = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    for topk in (GRID.num_cubes, 10**6):
        out = video_sparse_attention(q, k, v, SHAPE, topk=topk, gate_coarse=0.0)
        torch.testing.assert_close(out, wanted.transpose(1, 2))


def test_gates_of_every_kind_agree(seed):
    q, k, v = random_video(3, SHAPE)
    wanted, *_ = expected_output(q, k, v, GRID, 2, 0.25, -1.5)
    for make in (
        float,
        torch.tensor,
        lambda x: torch.tensor(x, dtype=torch.bfloat16),
        lambda x: torch.full_like(q, x),
    ):
        out = video_sparse_attention(q, k, v, SHAPE, topk=2, gate_coarse=make(0.25), gate_fine=make(-1.5))
        torch.testing.assert_close(out, wanted)
    expanded = torch.full((1, 1, 2, 1), 0.25).expand_as(q)
    out = video_sparse_attention(q, k, v, SHAPE, topk=2, gate_coarse=expanded, gate_fine=-1.5)
    torch.testing.assert_close(out, wanted)


def test_no_gate_is_one(seed):
    q, k, v = random_video(3, SHAPE)
    out = video_sparse_attention(q, k, v, SHAPE, topk=2)
    assert torch.equal(out, video_sparse_attention(q, k, v, SHAPE, topk=2, gate_coarse=1.0, gate_fine=1.0))
    wanted, *_ = expected_output(q, k, v, GRID, 2, 1.0, 1.0)
    torch.testing.assert_close(out, wanted)


def test_zero_coarse_gate_skips_the_coarse_output_but_selects(seed):
    q, k, v = random_video(3, SHAPE, requires_grad=True)
    with CalledOps() as called:
        out, counts, indices = video_sparse_attention(
            q, k, v, SHAPE, topk=2, gate_coarse=0.0, return_selection=True
        )
        out.sum().backward()
    assert called.names == [
        "coarse_forward", "fine_forward", "combine_backward", "transpose_index", "fine_backward"
    ]  # fmt: skip
    _, *selection = video_sparse_attention(q, k, v, SHAPE, topk=2, return_selection=True)
    assert torch.equal(counts, selection[0]) and torch.equal(indices, selection[1])


def test_sparsity_chooses_topk(seed):
    q, k, v = random_video(3, SHAPE)
    assert topk_from_sparsity(0.7, SHAPE) == 3
    by_sparsity = video_sparse_attention(q, k, v, SHAPE, sparsity=0.7)
    assert torch.equal(by_sparsity, video_sparse_attention(q, k, v, SHAPE, topk=3))


@pytest.mark.parametrize("video_shape", [(1, 1, 1), (1, 1, 65), (3, 1, 2), (9, 1, 5)])
def test_small_and_odd_grids(video_shape, seed):
    q, k, v = random_video(3, video_shape, dtype=torch.float64)
    grid = CubeGrid(video_shape)
    wanted, *_ = expected_output(q, k, v, grid, grid.num_cubes, 1.0, 1.0)
    torch.testing.assert_close(video_sparse_attention(q, k, v, video_shape, sparsity=0.0), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, seed):
    q, k, v, gate = random_video(4, SHAPE, dtype=dtype)
    out, *selection = video_sparse_attention(q, k, v, SHAPE, topk=3, gate_coarse=gate, return_selection=True)
    assert out.dtype == dtype
    q, k, v, gate = (x.double() for x in (q, k, v, gate))
    fine, _ = dense_attention(q, k, v, attended(*selection, GRID, GRID))
    wanted = fine + coarse_output(q, k, v, GRID, 64**-0.5)[0] * gate
    assert (out.double() - wanted).abs().max() <= 4 * torch.finfo(dtype).eps * wanted.abs().max()


def test_layouts_and_strides_agree(seed):
    packed = torch.randn(2, GRID.num_tokens, 3, 2, 64, dtype=torch.float64)
    q, k, v = packed.unbind(2)
    (gate,) = random_video(1, SHAPE, batch=2, dtype=torch.float64)
    wanted = video_sparse_attention(
        q.contiguous(), k.contiguous(), v.contiguous(), SHAPE, topk=2, gate_coarse=gate, return_selection=True
    )
    strided = video_sparse_attention(q, k, v, SHAPE, topk=2, gate_coarse=gate, return_selection=True)
    transposed = (x.transpose(1, 2) for x in (q, k, v))
    bhsd = video_sparse_attention(
        *transposed, SHAPE, topk=2, gate_coarse=gate.transpose(1, 2), layout="bhsd", return_selection=True
    )
    assert bhsd[0].transpose(1, 2).is_contiguous()
    for actual in (strided, (bhsd[0].transpose(1, 2), *bhsd[1:])):
        assert all(torch.equal(x, y) for x, y in zip(actual, wanted, strict=True))
    index = wanted[1:]
    out, lse = block_sparse_attention(q, k, v, *index, video_shape=SHAPE, return_lse=True)
    transposed = (x.transpose(1, 2) for x in (q, k, v))
    bhsd = block_sparse_attention(*transposed, *index, video_shape=SHAPE, return_lse=True, layout="bhsd")
    assert torch.equal(bhsd[0].transpose(1, 2), out) and torch.equal(bhsd[1], lse)


def test_size_one_dimensions_may_have_any_stride(seed):
    q, k, v = random_video(3, (4, 4, 4), heads=1)
    wanted = video_sparse_attention(q, k, v, (4, 4, 4), topk=1)
    odd = q.as_strided(q.shape, (7, 64, 3, 1))
    checks.check_strides("query", odd)
    assert torch.equal(video_sparse_attention(odd, k, v, (4, 4, 4), topk=1), wanted)


CASES = {
    "linear": dict(tokens=(200, 130), arguments={}, grids=(CubeGrid.linear(200), CubeGrid.linear(130))),
    "cubes": dict(tokens=(210, 210), arguments=dict(video_shape=SHAPE), grids=(GRID, GRID)),
    "other key grid": dict(
        tokens=(210, 90),
        arguments=dict(video_shape=SHAPE, kv_video_shape=(2, 5, 9), kv_cube=(2, 4, 8)),
        grids=(GRID, CubeGrid((2, 5, 9), (2, 4, 8))),
    ),
    "same cube": dict(
        tokens=(210, 90),
        arguments=dict(video_shape=SHAPE, kv_video_shape=(2, 5, 9), cube=(1, 8, 8)),
        grids=(CubeGrid(SHAPE, (1, 8, 8)), CubeGrid((2, 5, 9), (1, 8, 8))),
    ),
    "other key cube": dict(
        tokens=(210, 210),
        arguments=dict(video_shape=SHAPE, kv_cube=(2, 4, 8)),
        grids=(GRID, CubeGrid(SHAPE, (2, 4, 8))),
    ),
    "text keys": dict(
        tokens=(210, 77),
        arguments=dict(video_shape=SHAPE, kv_video_shape=(1, 1, 77), kv_cube=(1, 1, 64)),
        grids=(GRID, CubeGrid.linear(77)),
    ),
    "text queries": dict(
        tokens=(77, 210),
        arguments=dict(kv_video_shape=SHAPE),
        grids=(CubeGrid.linear(77), GRID),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_block_sparse_attention(case, seed):
    q_grid, kv_grid = case["grids"]
    (q,) = random_tokens(1, case["tokens"][0], batch=2, dtype=torch.float64)
    k, v = random_tokens(2, case["tokens"][1], batch=2, dtype=torch.float64)
    index = random_index(q_grid.num_cubes, kv_grid.num_cubes, min(3, kv_grid.num_cubes), batch=2)
    wanted = dense_attention(q, k, v, attended(*index, q_grid, kv_grid), scale=0.2)
    for check in (False, True):
        actual = block_sparse_attention(
            q, k, v, *index, **case["arguments"], scale=0.2, return_lse=True, check=check
        )
        torch.testing.assert_close(actual, wanted)
    assert torch.equal(block_sparse_attention(q, k, v, *index, **case["arguments"], scale=0.2), actual[0])


def test_empty_rows(seed):
    q, k, v = random_tokens(3, 192, dtype=torch.float64, requires_grad=True)
    counts, indices = random_index(3, 3, 2, counts=[2, 0, 1])
    out, lse = block_sparse_attention(q, k, v, counts, indices, return_lse=True)
    assert (out[:, 64:128] == 0).all() and (lse[..., 64:128] == -torch.inf).all()
    assert lse[..., :64].isfinite().all() and lse[..., 128:].isfinite().all()
    # NaN is what logaddexp of two empty rows sends back.
    grad_lse = torch.ones_like(lse)
    grad_lse[..., 64:128] = torch.nan
    torch.autograd.backward([out, lse], [torch.ones_like(out), grad_lse])
    assert (q.grad[:, 64:128] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert (q.grad[:, :64] != 0).any()


def test_pads_are_neither_read_nor_written(seed):
    q, k, v = (torch.randn(1, 192, 2, 64, dtype=torch.float64) for _ in range(3))
    sizes, q_sizes = torch.tensor([64, 5, 0], dtype=torch.int32), torch.tensor([0, 64, 9], dtype=torch.int32)
    slot, block = torch.arange(192) % 64, torch.arange(192) // 64
    real, q_real = slot < sizes[block], slot < q_sizes[block]
    counts, indices = random_index(3, 3, 3, counts=3)
    mask = (real & q_real[:, None]).expand(1, 2, 192, 192)
    wanted, wanted_lse = dense_attention(q, k, v, mask)
    weights = torch.randn_like(q), torch.randn(1, 2, 192, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    dense, dense_lse = dense_attention(*inputs, mask)
    finite = dense_lse[..., q_real]
    expected = torch.autograd.grad(
        [dense[:, q_real], finite], inputs, [weights[0][:, q_real], weights[1][..., q_real]]
    )

    k[:, ~real], v[:, ~real], q[:, ~q_real] = torch.nan, torch.inf, torch.nan
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = block_sparse_attention(
        *inputs, counts, indices, block_sizes=sizes, q_block_sizes=q_sizes, return_lse=True, check=True
    )
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    assert (out[:, ~q_real] == 0).all() and (lse[..., ~q_real] == -torch.inf).all()
    weights[0][:, ~q_real] = torch.nan
    actual = torch.autograd.grad([out, lse], inputs, weights)
    torch.testing.assert_close(actual, expected)


def test_shared_index_by_expand(seed):
    q, k, v = random_tokens(3, 192, batch=2)
    counts, indices = random_index(3, 3, 2, heads=1)
    shared = counts.expand(2, 2, -1), indices.expand(2, 2, -1, -1)
    wanted = block_sparse_attention(q, k, v, *(x.contiguous() for x in shared))
    assert torch.equal(block_sparse_attention(q, k, v, *shared), wanted)


@pytest.mark.parametrize("enabled", [False, True])
def test_deterministic_follows_torch(enabled, seed):
    q, k, v = random_video(3, SHAPE, requires_grad=True)
    flags = []

    class Deterministic(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.vsa_cuda.fine_backward.default:
                flags.append(args[-1])
            return func(*args, **(kwargs or {}))

    torch.use_deterministic_algorithms(enabled)
    try:
        with Deterministic():
            for choice in (None, True, False):
                video_sparse_attention(q, k, v, SHAPE, topk=2, deterministic=choice).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert flags == [enabled, True, False]
