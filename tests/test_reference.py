"""The reference against dense SDPA, a naive per-token loop and gradcheck."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracles import by_token, close, dense, naive, randn, random_lists, token_mask
from reference_autograd import Fine, VideoSparse
from vsa_cuda import reference
from vsa_cuda.geometry import CubeGrid

SCALE = 0.4


@pytest.mark.parametrize(
    ("batches", "heads", "video_shape", "cube", "topk"),
    [
        (1, 1, (5, 3, 6), (4, 4, 4), 3),
        (2, 1, (1, 9, 5), (1, 8, 8), 1),
        (1, 2, (2, 3, 9), (8, 2, 4), 2),
        (1, 1, (1, 1, 100), (1, 1, 64), 2),
    ],
)
def test_whole_op_against_a_loop_over_tokens(seed, batches, heads, video_shape, cube, topk):
    grid = CubeGrid(video_shape, cube)
    inputs = [randn(batches, grid.num_tokens, heads, 5).requires_grad_() for _ in range(5)]
    out, lse, selection = VideoSparse.apply(*inputs, grid, topk, SCALE)
    lse = by_token(lse, grid)
    expected_out, expected_lse, expected_selection = naive(*inputs, grid, topk, SCALE)
    assert selection.flatten(0, 1).tolist() == expected_selection
    close(out, expected_out)
    close(lse, expected_lse)
    weights = randn(*out.shape), randn(*lse.shape)
    gradients = torch.autograd.grad((out, lse), inputs, weights)
    expected = torch.autograd.grad((expected_out, expected_lse), inputs, weights)
    for name, actual, wanted in zip(
        ("q", "k", "v", "gate_fine", "gate_coarse"), gradients, expected, strict=True
    ):
        close(actual, wanted, msg=lambda text, name=name: f"gradient of {name}: {text}")


@pytest.mark.parametrize(
    "grid", [CubeGrid((5, 9, 6)), CubeGrid((3, 7, 13), (2, 4, 8)), CubeGrid.linear(270)], ids=str
)
def test_all_cubes_is_dense_sdpa(seed, grid):
    q, k, v = (randn(2, grid.num_tokens, 3, 16).requires_grad_() for _ in range(3))
    out, lse, _ = VideoSparse.apply(q, k, v, None, 0.0, grid, grid.num_cubes, SCALE)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), scale=SCALE
    ).transpose(1, 2)
    close(out, expected)
    close(by_token(lse, grid), torch.logsumexp(torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE, dim=-1))
    weight = randn(*out.shape)
    gradients = torch.autograd.grad(out, (q, k, v), weight)
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, (q, k, v), weight), strict=True):
        close(actual, wanted)


def test_all_cubes_is_the_same_on_every_grid(seed):
    q, k, v, grad = (randn(1, 6 * 5 * 9, 2, 8) for _ in range(4))
    results = []
    for grid in (CubeGrid.linear(270), CubeGrid((6, 5, 9)), CubeGrid((9, 6, 5), (16, 1, 4))):
        every = torch.arange(grid.num_cubes, dtype=torch.int32).expand(1, 2, grid.num_cubes, -1)
        lists = (torch.full((1, 2, grid.num_cubes), grid.num_cubes), every, grid, grid, SCALE)
        out, lse = reference.fine_forward(q, k, v, *lists)
        _, delta, *_ = reference.combine_backward(grad, out, None, None, grid, None, None)
        gradients = reference.fine_backward(grad, q, k, v, lse, delta, *lists)
        results.append((out, by_token(lse, grid), *gradients))
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            close(actual, expected)


@pytest.mark.parametrize(
    ("q_grid", "kv_grid"),
    [
        (CubeGrid((5, 6, 7)), CubeGrid((3, 9, 5), (1, 8, 8))),
        (CubeGrid.linear(65), CubeGrid((4, 9, 9))),
        (CubeGrid((4, 9, 9), (2, 4, 8)), CubeGrid.linear(1)),
    ],
    ids=str,
)
def test_unequal_grids_ragged_lists_and_empty_rows(seed, q_grid, kv_grid):
    q = randn(2, q_grid.num_tokens, 2, 8).requires_grad_()
    k, v = (randn(2, kv_grid.num_tokens, 2, 8).requires_grad_() for _ in range(2))
    counts, indices = random_lists(2, 2, q_grid.num_cubes, kv_grid.num_cubes, min(3, kv_grid.num_cubes))
    counts[0, 1, -1] = 0
    out, lse = Fine.apply(q, k, v, (counts, indices, q_grid, kv_grid, SCALE, None, None))
    lse = by_token(lse, q_grid)
    expected_out, expected_lse = dense(q, k, v, token_mask(counts, indices, q_grid, kv_grid), SCALE)
    close(out, expected_out)
    close(lse, expected_lse)
    empty = expected_lse == -torch.inf
    assert bool(empty.any()) and bool((out.transpose(1, 2)[empty] == 0).all())
    weights = randn(*out.shape), randn(*lse.shape)
    gradients = torch.autograd.grad((out, lse), (q, k, v), weights)
    # Autograd through logsumexp gives NaN for rows without keys: leave them out of the expected loss.
    loss = (expected_out * weights[0]).sum() + expected_lse[~empty] @ weights[1][~empty]
    expected = [x.nan_to_num() for x in torch.autograd.grad(loss, (q, k, v))]
    for actual, wanted in zip(gradients, expected, strict=True):
        close(actual, wanted)
    assert bool((gradients[0].transpose(1, 2)[empty] == 0).all())


def test_block_sizes_cut_off_pads_that_hold_nan(seed):
    q_sizes, kv_sizes = torch.tensor([64, 17, 0, 64, 1]), torch.tensor([3, 64, 0, 40])
    q_grid, kv_grid = CubeGrid.linear(5 * 64), CubeGrid.linear(4 * 64)
    q_real, kv_real = ((torch.arange(64) < sizes[:, None]).flatten() for sizes in (q_sizes, kv_sizes))
    q, grad_out = (randn(1, q_grid.num_tokens, 2, 8) for _ in range(2))
    k, v = (randn(1, kv_grid.num_tokens, 2, 8) for _ in range(2))
    grad_lse = randn(1, 2, 5, 64)
    counts, indices = random_lists(1, 2, 5, 4, 3, torch.tensor([[[3, 1, 2, 0, 2], [2, 2, 3, 3, 1]]]))
    indices[0, 0, 1, 0] = 2  # the only block of the row has no token
    mask = token_mask(counts, indices, q_grid, kv_grid)[:, :, q_real][..., kv_real]
    compact = [x.clone().requires_grad_() for x in (q[:, q_real], k[:, kv_real], v[:, kv_real])]
    expected_out, expected_lse = dense(*compact, mask, SCALE)
    live = expected_lse != -torch.inf
    loss = (expected_out * grad_out[:, q_real]).sum() + expected_lse[live] @ grad_lse.flatten(2)[..., q_real][
        live
    ]
    expected = [x.nan_to_num() for x in torch.autograd.grad(loss, compact)]

    for x, real in ((q, q_real), (grad_out, q_real), (k, kv_real), (v, kv_real)):
        x[:, ~real] = torch.nan
    grad_lse.flatten(2)[..., ~q_real] = torch.nan
    lists = (counts, indices, q_grid, kv_grid, SCALE, kv_sizes.int(), q_sizes.int())
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = Fine.apply(*inputs, lists)
    gradients = torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse))
    delta = reference.combine_backward(grad_out, out, grad_lse, None, q_grid, None, None, lists[6])[1]
    assert bool((delta.flatten(2)[..., ~q_real] == 0).all()) and bool(delta.isfinite().all())
    lse = lse.flatten(2)
    close(out[:, q_real], expected_out)
    close(lse[..., q_real], expected_lse)
    assert bool((out[:, ~q_real] == 0).all()) and bool((lse[..., ~q_real] == torch.inf).all())
    for actual, wanted, real in zip(gradients, expected, (q_real, kv_real, kv_real), strict=True):
        close(actual[:, real], wanted)
        assert bool((actual[:, ~real] == 0).all())


@pytest.mark.parametrize("max_blocks", [0, 2])
def test_no_keys_at_all(max_blocks):
    grid = CubeGrid.linear(100)
    x = randn(1, 100, 1, 4)
    lists = (
        torch.zeros(1, 1, 2),
        torch.full((1, 1, 2, max_blocks), -1, dtype=torch.int32),
        grid,
        grid,
        SCALE,
    )
    out, lse = reference.fine_forward(x, x, x, *lists)
    assert bool((out == 0).all()) and bool((by_token(lse, grid) == -torch.inf).all())
    # What a merge by logaddexp may send back to a row of -inf.
    grad, delta = torch.full_like(x, torch.nan), torch.full((1, 1, 2, 64), torch.nan)
    for gradient in reference.fine_backward(grad, x, x, x, lse, delta, *lists):
        assert bool((gradient == 0).all())


def test_blocks_not_listed_are_not_read(seed):
    grid = CubeGrid.linear(3 * 64)
    q, k, v, grad = (randn(1, grid.num_tokens, 1, 4) for _ in range(4))
    k[:, :64], v[:, :64] = torch.inf, torch.nan
    counts = torch.tensor([[[1, 2, 1]]], dtype=torch.int32)
    indices = torch.tensor([[[[1, 0], [1, 2], [2, 0]]]], dtype=torch.int32)
    out, lse = Fine.apply(
        *(x.requires_grad_() for x in (q, k, v)), (counts, indices, grid, grid, SCALE, None, None)
    )
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    assert all(bool(x.isfinite().all()) for x in (out, lse, *gradients))
    assert bool((gradients[1][:, :64] == 0).all()) and bool((gradients[2][:, :64] == 0).all())


GRID = CubeGrid((3, 5, 6))
GATES = {
    "none": (lambda: None, lambda: None),
    "floats": (lambda: -0.7, lambda: 1.3),
    "0-d": (lambda: randn().requires_grad_(), lambda: randn().requires_grad_()),
    "tensors": (lambda: randn(1, 90, 1, 3).requires_grad_(), lambda: randn(1, 90, 1, 3).requires_grad_()),
    "mixed": (lambda: randn(1, 90, 1, 3).requires_grad_(), lambda: 0.0),
}


@pytest.mark.parametrize("gates", GATES.values(), ids=GATES)
def test_gradcheck_of_the_whole_op(seed, gates):
    q, k, v = (randn(1, 90, 1, 3).requires_grad_() for _ in range(3))

    def run(*inputs):
        out, lse, _ = VideoSparse.apply(*inputs, GRID, 2, SCALE)
        return out, by_token(lse, GRID)

    assert torch.autograd.gradcheck(run, (q, k, v, *(gate() for gate in gates)), fast_mode=True)


@pytest.mark.parametrize("shape", [(), (1, 90, 1, 3)])
def test_gate_gradients_are_like_the_gates(seed, shape):
    fine, grad, coarse = randn(1, 90, 1, 3), randn(1, 90, 1, 3), randn(1, 1, GRID.num_cubes, 3)
    gates = [torch.randn(shape, dtype=dtype) for dtype in (torch.float16, torch.float32)]
    *_, fine_gradient, coarse_gradient = reference.combine_backward(grad, fine, None, coarse, GRID, *gates)
    for gradient, gate in zip((fine_gradient, coarse_gradient), gates, strict=True):
        assert gradient.shape == gate.shape and gradient.dtype == gate.dtype
    product = grad * coarse[:, :, GRID.cube_of_token()].transpose(1, 2)
    close(coarse_gradient, (product if shape else product.sum()).float())
    *_, fine_again, nothing = reference.combine_backward(grad, fine, None, None, GRID, *gates)
    close(fine_again, fine_gradient)
    assert nothing is None


def test_gradcheck_of_the_coarse_stage(seed):
    class Coarse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, lse, *_ = reference.coarse_forward(q, k, v, 1, SCALE)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx, grad):
            return reference.coarse_backward(grad, *ctx.saved_tensors, SCALE)

    assert torch.autograd.gradcheck(Coarse.apply, [randn(2, 2, 4, 3).requires_grad_() for _ in range(3)])


def test_gradcheck_of_the_fine_stage(seed):
    q_grid, kv_grid = CubeGrid((1, 3, 5), (1, 2, 32)), CubeGrid.linear(66)
    lists = (
        *random_lists(1, 2, 2, 2, 2, torch.tensor([[[2, 1], [1, 2]]])),
        q_grid,
        kv_grid,
        SCALE,
        None,
        None,
    )

    def run(*inputs):
        out, lse = Fine.apply(*inputs, lists)
        return out, by_token(lse, q_grid)

    inputs = [randn(1, tokens, 2, 2).requires_grad_() for tokens in (15, 66, 66)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@given(st.data())
def test_selection_is_exact_with_ties(data):
    cubes, dim = data.draw(st.integers(1, 9)), 2
    topk = data.draw(st.integers(1, cubes))
    values = st.lists(st.integers(-1, 1), min_size=2 * cubes * dim, max_size=2 * cubes * dim)
    q, k = (torch.tensor(data.draw(values), dtype=torch.bfloat16).view(1, 2, cubes, dim) for _ in range(2))
    scale = 0.5
    out, lse, counts, indices = reference.coarse_forward(q, k, k, topk, scale, with_output=False)
    assert out.shape == (0,) and out.dtype == q.dtype and lse.dtype == torch.float32
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.shape == (1, 2, cubes) and bool((counts == topk).all())
    scores = (q.float() @ k.float().mT * scale).tolist()
    for head, cube in itertools.product(range(2), range(cubes)):
        row = scores[0][head][cube]
        wanted = sorted(sorted(range(cubes), key=lambda j, row=row: (-row[j], j))[:topk])
        assert indices[0, head, cube].tolist() == wanted


def test_ties_of_many_cubes_go_to_the_lowest(seed):
    cubes, topk = 700, 300
    k = torch.randint(0, 3, (1, 1, cubes, 1)).float()
    indices = reference.coarse_forward(torch.ones_like(k), k, k, topk, 1.0, with_output=False)[3]
    scores = k.flatten().tolist()
    wanted = sorted(sorted(range(cubes), key=lambda j: (-scores[j], j))[:topk])
    assert indices.tolist() == [[[wanted] * cubes]]


def test_scores_keep_fp32(seed):
    # Scores that bfloat16 would round to one value: 256 + j / 4.
    k = torch.stack([torch.full((6,), 256.0), torch.arange(6) / 4], dim=-1)[None, None].bfloat16()
    indices = reference.coarse_forward(torch.ones_like(k), k, k, 2, 1.0)[3]
    assert indices.tolist() == [[[[4, 5]] * 6]]


def test_coarse_output_does_not_weigh_cubes_by_size(seed):
    grid = CubeGrid.linear(65)
    v = torch.cat([torch.zeros(64), torch.ones(1)]).view(1, 65, 1, 1)
    zero = torch.zeros(1, 65, 1, 1)
    pooled = [reference.pool(x, grid) for x in (zero, zero, v)]
    assert reference.coarse_forward(*pooled, 1, SCALE)[0].tolist() == [[[[0.5], [0.5]]]]


@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 6), st.integers(0, 6))
def test_transpose_index_against_a_loop(random_seed, num_q, num_kv, max_blocks):
    torch.manual_seed(random_seed)
    max_blocks = min(max_blocks, num_kv)
    counts, indices = random_lists(2, 2, num_q, num_kv, max_blocks)
    offsets, transposed = reference.transpose_index(counts, indices, num_kv)
    assert offsets.dtype == transposed.dtype == torch.int32
    for batch, head in itertools.product(range(2), range(2)):
        rows = [
            [q for q in range(num_q) if kv in indices[batch, head, q, : counts[batch, head, q]]]
            for kv in range(num_kv)
        ]
        flat = list(itertools.chain(*rows))
        assert offsets[batch, head].tolist() == [0, *itertools.accumulate(map(len, rows))]
        assert transposed[batch, head].tolist() == flat + [0] * (num_q * max_blocks - len(flat))


def in_fp32(function, *args):
    """function(*args) with every float argument, and half results, in fp32."""
    return function(
        *(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_inputs_are_computed_in_fp32_and_rounded_once(seed, dtype):
    grid = CubeGrid((5, 6, 7))
    q, k, v, grad, gate = (randn(2, grid.num_tokens, 2, 16).to(dtype) for _ in range(5))
    grad_lse = randn(2, 2, grid.num_cubes, 64).float()

    def check(dtypes, function, *args):
        results, expected = function(*args), in_fp32(function, *args)
        assert tuple(x.dtype for x in results) == dtypes
        for actual, wanted in zip(results, expected, strict=True):
            close(actual, wanted.to(actual.dtype), rtol=0, atol=0)
        return results

    fp32, int32 = torch.float32, torch.int32
    pooled = [check((dtype,), lambda x: (reference.pool(x, grid),), x)[0] for x in (q, k, v)]
    stage = (dtype, fp32, int32, int32)
    coarse, coarse_lse, *lists = check(stage, reference.coarse_forward, *pooled, 2, SCALE)
    lists += (grid, grid, SCALE)
    fine, lse = check((dtype, fp32), reference.fine_forward, q, k, v, *lists)
    check((dtype,), lambda *x: (reference.combine(x[0], x[1], grid, x[2], 0.5),), fine, coarse, gate)

    def gradients_of_combine(*args):
        grad_fine, _, grad_coarse, grad_gate, _ = reference.combine_backward(*args)
        return grad_fine, grad_coarse, grad_gate

    combined = (grad, fine, grad_lse, coarse, grid, gate, 0.5)
    grad_fine, grad_coarse, _ = check((dtype, fp32, dtype), gradients_of_combine, *combined)
    # delta comes from the rounded gradient.
    delta = reference.combine_backward(*combined)[1]
    close(delta, in_fp32(reference.combine_backward, grad_fine, fine, grad_lse, None, grid, None, None)[1])
    backward = (grad_coarse, *pooled, coarse, coarse_lse, SCALE)
    pooled_gradients = check((fp32,) * 3, reference.coarse_backward, *backward)
    backward = (grad_fine, q, k, v, lse, delta, *lists, None, None, *pooled_gradients)
    check((dtype,) * 3, reference.fine_backward, *backward)


def test_pool_is_the_rounded_mean_of_real_tokens():
    grid = CubeGrid((1, 3, 3), (1, 8, 8))
    x = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 256.0]).bfloat16()
    pooled = reference.pool(x.view(1, 9, 1, 1), grid)
    close(pooled, torch.tensor(257 / 9).bfloat16().view(1, 1, 1, 1), rtol=0, atol=0)


def test_strides_do_not_matter(seed):
    grid, dims = CubeGrid((3, 5, 6)), (2, 90, 3, 8)
    packed = randn(2, 90, 3, 3, 8)
    views = [packed[:, :, i] for i in range(2)] + [randn(2, 3, 90, 8).transpose(1, 2)]
    gates = [randn(8, 3, 90, 2).permute(3, 2, 1, 0), randn(1, 90, 1, 8).expand(dims)]
    actual = VideoSparse.apply(*views, *gates, grid, 2, SCALE)
    expected = VideoSparse.apply(*(x.contiguous() for x in (*views, *gates)), grid, 2, SCALE)
    for result, wanted in zip(actual, expected, strict=True):
        assert result.is_contiguous()
        close(result, wanted, rtol=0, atol=0)
