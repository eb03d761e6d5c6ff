"""The backward's kernels, in the simulator and on a GPU: index, combination, the fine stage."""

import functools

import pytest
import torch

import simulated
from attention_cases import EDGE_CASES, LINEAR, Case, random_case
from fine_stage import (
    RUNS,
    backward,
    check_fine_backward,
    exact_backward,
    grid_arguments,
    new_gradient,
    run_on_gpu,
)
from inputs import random_index
from simulated import run_simulated, simulated_device
from vsa_cuda import _extension, _kernels, reference
from vsa_cuda.geometry import CubeGrid

pytestmark = pytest.mark.skipif(
    not _extension.is_available(), reason="vsa_cuda._C is not built: no host plan to run"
)


@pytest.fixture(params=RUNS)
def run(request, seed):
    return functools.partial(request.param, seed=seed)


# Transposed index.


@pytest.mark.parametrize(
    "batch, heads, num_q, num_kv, max_blocks",
    [(1, 1, 1, 1, 1), (2, 3, 5, 7, 3), (1, 2, 33, 4, 4), (1, 1, 300, 70, 5), (1, 1, 40, 1500, 33)],
)
def test_transpose_index_equals_reference(batch, heads, num_q, num_kv, max_blocks, run):
    counts = torch.randint(0, max_blocks + 1, (batch, heads, num_q))
    lists = random_index(num_q, num_kv, max_blocks, batch=batch, heads=heads, counts=counts)
    expected = reference.transpose_index(*lists, num_kv)
    for actual, exact in zip(run(_kernels.transpose_index, *lists, num_kv), expected, strict=True):
        assert torch.equal(actual, exact)


def test_transpose_index_of_expanded_lists(run):
    counts, indices = random_index(9, 11, 4, batch=1, heads=1)
    lists = counts.expand(2, 3, 9), indices.expand(2, 3, 9, 4)
    expected = reference.transpose_index(*lists, 11)
    for actual, exact in zip(run(_kernels.transpose_index, *lists, 11), expected, strict=True):
        assert torch.equal(actual, exact)


@pytest.mark.simulator
@pytest.mark.parametrize("schedule", range(20))
def test_transpose_index_under_adversarial_schedules(schedule, seed):
    lists = random_index(40, 23, 5, heads=2, counts=torch.randint(0, 6, (1, 2, 40)))
    expected = reference.transpose_index(*lists, 23)
    results = run_simulated(_kernels.transpose_index, *lists, 23, seed=1000 * seed + schedule)
    for actual, exact in zip(results, expected, strict=True):
        assert torch.equal(actual, exact)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "num_q, num_kv, max_blocks", [(512, 512, 64), (100, 40_000, 200), (16_384, 16_384, 64)]
)
def test_transpose_index_at_size(num_q, num_kv, max_blocks, seed):
    lists = random_index(num_q, num_kv, max_blocks, heads=2)
    expected = reference.transpose_index(*lists, num_kv)
    for actual, exact in zip(run_on_gpu(_kernels.transpose_index, *lists, num_kv), expected, strict=True):
        assert torch.equal(actual, exact)


# Combination.


def gate_of(kind, shape, dtype):
    if kind == "tensor":
        return torch.randn(shape).to(dtype)
    if kind == "strided":  # columns two apart
        return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    return torch.tensor(0.75) if kind == "scalar" else None


def check_combine_backward(
    run, grid, shape, dtype, fine, coarse, with_lse=False, q_block_sizes=None, coarse_grid=None
):
    grad_out, out_fine = (torch.randn(shape).to(dtype) for _ in range(2))
    valid = grid.valid()
    if q_block_sizes is not None:
        valid = valid & (torch.arange(64) < q_block_sizes[:, None])
        pads = ~valid.flatten()[grid.slot_of_token()]
        grad_out[:, pads], out_fine[:, pads] = torch.nan, torch.nan
    batch, _, heads, head_dim = shape
    grad_lse = torch.randn(batch, heads, 1, 64).expand(-1, -1, grid.num_cubes, -1) if with_lse else None
    cubes = (coarse_grid or grid).num_cubes
    pooled = None if coarse is None else torch.randn(batch, heads, cubes, head_dim).to(dtype)
    gates = [gate_of(kind, shape, dtype) for kind in (fine, coarse)]
    values = [0.5 if kind == "float" else 1.0 for kind in (fine, coarse)]
    results = run(
        _kernels.combine_backward, grad_out, out_fine, grad_lse, pooled, *gates, *values, q_block_sizes,
        grid.video_shape, grid.cube, *grid_arguments(coarse_grid),
    )  # fmt: skip
    exact_gates = [v if g is None else g.double() for g, v in zip(gates, values, strict=True)]
    expected = reference.combine_backward(
        grad_out.double(), out_fine.double(), grad_lse, None if pooled is None else pooled.double(), grid,
        *exact_gates, q_block_sizes, coarse_grid,
    )  # fmt: skip
    if fine is None:
        expected = (None, *expected[1:])
    names = ("grad_fine", "delta", "grad_coarse", "grad_gate_fine", "grad_gate_coarse")
    for name, actual, exact in zip(names, results, expected, strict=True):
        if exact is None:
            assert actual.shape == (0,), name
            continue
        if q_block_sizes is not None and name in ("grad_fine", "grad_gate_fine", "grad_gate_coarse"):
            assert not actual[:, pads].any(), f"{name} of pads"
            actual, exact = actual[:, ~pads], exact[:, ~pads]
        error = (actual.double() - exact).abs().max()
        # delta comes from the rounded grad_fine.
        eps = torch.finfo(actual.dtype if name != "delta" or fine is None else dtype).eps
        # A scalar gate's gradient is a sum of products of normal numbers, which may cancel.
        size = exact.abs().max() if exact.dim() else grad_out.numel() ** 0.5
        assert error <= 8 * eps * size, f"{name}: error {error:.2e}"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("fine", [None, "float", "scalar", "tensor", "strided"])
@pytest.mark.parametrize("coarse", [None, "float", "scalar", "tensor", "strided"])
def test_combine_backward_equals_reference(fine, coarse, head_dim, run):
    dtype = torch.bfloat16 if head_dim == 64 else torch.float16
    check_combine_backward(run, CubeGrid((3, 5, 6)), (1, 90, 2, head_dim), dtype, fine, coarse)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_combine_backward_of_ragged_blocks_with_lse(head_dim, run):
    grid, sizes = CubeGrid.linear(200), torch.tensor([64, 0, 17, 5], dtype=torch.int32)
    shape = (2, 200, 1, head_dim)
    check_combine_backward(run, grid, shape, torch.bfloat16, None, None, with_lse=True, q_block_sizes=sizes)
    check_combine_backward(run, grid, shape, torch.bfloat16, "tensor", "tensor", q_block_sizes=sizes)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("gate", ["float", "scalar", "tensor"])
@pytest.mark.parametrize("video_shape", [(5, 7, 9), (4, 4, 8), (1, 1, 1)])
def test_combine_backward_of_the_linear_grid(video_shape, gate, head_dim, run):
    """delta by blocks of 64 tokens, the gradient of `coarse` by the cubes of the video."""
    coarse_grid = CubeGrid(video_shape)
    grid, shape = CubeGrid.linear(coarse_grid.num_tokens), (2, coarse_grid.num_tokens, 2, head_dim)
    fine = None if gate == "float" else gate
    check_combine_backward(run, grid, shape, torch.bfloat16, fine, gate, True, coarse_grid=coarse_grid)


def test_combine_backward_of_unlike_grids(run):
    """The fine stage with fewer and with more cubes than the coarse one; then ragged at that."""
    few, many = CubeGrid((9, 9, 10)), CubeGrid((9, 9, 10), (2, 4, 8))
    assert few.num_cubes < many.num_cubes
    sizes = torch.randint(0, 65, (many.num_cubes,), dtype=torch.int32)
    for grid, coarse_grid, ragged in ((few, many, None), (many, few, sizes)):
        shape = (1, few.num_tokens, 2, 64)
        check_combine_backward(run, grid, shape, torch.float16, "tensor", "tensor", True, ragged, coarse_grid)


@pytest.mark.simulator
@pytest.mark.parametrize("schedule", range(20))
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (128, torch.float16)])
def test_combine_backward_under_adversarial_schedules(head_dim, dtype, schedule, seed):
    """A tensor gate and a scalar one: elementwise gradients and partial sums in one launch."""
    run_schedule = functools.partial(run_simulated, seed=1000 * seed + schedule)
    grid, shape = CubeGrid((3, 5, 6)), (1, 90, 2, head_dim)
    check_combine_backward(run_schedule, grid, shape, dtype, "tensor", "scalar", with_lse=True)


@pytest.mark.simulator
@pytest.mark.parametrize("schedule", range(4))  # the simulator's kinds
@pytest.mark.parametrize("head_dim", [64, 128])
def test_delta_of_many_cubes_of_one_cta(head_dim, schedule, seed, monkeypatch):
    """Every stage of a CTA's ring is filled again and again; pads hold NaN."""
    monkeypatch.setattr(simulated, "NUM_SMS", 1)
    run_schedule = functools.partial(run_simulated, seed=4 * seed + schedule)
    grid = CubeGrid.linear(64 * 9 - 7)
    sizes = torch.tensor([64, 0, 17, 5, 64, 64, 1, 63, 57], dtype=torch.int32)
    shape = (2, grid.num_tokens, 3, head_dim)
    check_combine_backward(run_schedule, grid, shape, torch.bfloat16, None, None, True, sizes)


# Fine stage.

# head_dim and `deterministic` where lists are short: two passes, or the fused one at head_dim 64.
over_structures = pytest.mark.parametrize(
    ("head_dim", "deterministic"), [(64, True), (64, False), (128, True)]
)


@pytest.mark.parametrize("case", EDGE_CASES, ids=str)
def test_fine_backward_equals_reference(case, run):
    check_fine_backward(run, case)


@pytest.mark.parametrize("trial", range(4))
def test_fine_backward_of_random_shapes(trial, run, seed):
    case = random_case(trial, seed)
    check_fine_backward(run, case)


@pytest.mark.simulator
@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiles_that_several_cubes_need_are_loaded_once(head_dim, seed):
    """Two query and four key blocks, each with each other: all of one CTA's consumers need every tile."""
    devices = []
    case = Case(
        (1, 1, 128), LINEAR, (1, 1, 256), LINEAR, head_dim=head_dim, lists="dense", seed=seed
    )  # fmt: skip
    check_fine_backward(functools.partial(run_simulated, seed=seed, devices=devices), case)
    two_passes, chosen = (x for x in devices if any("fine_backward" in kernel for kernel in x.kernels))
    panels = head_dim // 64
    # One task of two cubes: Q and dO, then K and V. At head_dim 64 two kernels look at the lists.
    launched = zip(two_passes.kernels, two_passes.reports, strict=True)
    query_passes = [report for kernel, report in launched if kernel.startswith("fine_backward_q")]
    copies = sorted(report.async_copies for report in query_passes)
    assert copies == [0] * (head_dim == 64) + [2 * 2 * panels + 4 * 2 * panels]
    # Two tasks of two cubes: K and V, then Q and dO with the rows' terms.
    keys_pass = 2 * (2 * 2 * panels + 2 * (2 * panels + 1))
    assert two_passes.report("fine_backward_kv").async_copies == keys_pass
    # And of each stage two tiles of dQ, over the keys of both cubes: a part from each of four warps.
    stages = 2 * panels  # two blocks of 64 columns, or one of 128
    assert chosen.report("fine_backward_fused").async_copies == keys_pass + stages * 2 * 4


@pytest.mark.parametrize("head_dim", [64, 128])
def test_pooled_and_lse_gradients(head_dim, run, seed):
    case = Case((3, 5, 6), kv_shape=(5, 4, 7), heads=2, head_dim=head_dim, topk=2, seed=seed)
    cubes = [grid.num_cubes for grid in (case.q_grid, case.kv_grid, case.kv_grid)]
    pooled = tuple((8 * case.randn(1, 2, count, head_dim)).to(case.dtype) for count in cubes)
    grad_lse = case.randn(1, 2, case.q_grid.num_cubes, 64)
    check_fine_backward(run, case, grad_lse, pooled)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("video_shape", [(5, 7, 9), (4, 4, 8), (1, 1, 1)])
@pytest.mark.parametrize("with_pooled", [False, True])
def test_fine_backward_of_the_linear_grid(with_pooled, video_shape, head_dim, run, seed):
    """No lists; a token takes the pooled gradients of its cube of the video."""
    coarse_grid = CubeGrid(video_shape)
    blocks = (1, 1, coarse_grid.num_tokens)
    case = Case(blocks, LINEAR, batch=2, heads=2, head_dim=head_dim, lists="dense", seed=seed)
    rows = (2, 2, coarse_grid.num_cubes, head_dim)
    pooled = tuple((8 * case.randn(*rows)).to(case.dtype) if with_pooled else None for _ in range(3))
    check_fine_backward(run, case, None, pooled, coarse_grid)


@over_structures
def test_key_cubes_that_nobody_chose_get_zero(head_dim, deterministic, run, seed):
    """Beside one that somebody chose, two together, and one alone in its task."""
    case = Case((4, 4, 8), kv_shape=(4, 4, 20), head_dim=head_dim, topk=1, lists="one", seed=seed)
    _, dk, dv = check_fine_backward(run, case, deterministic=deterministic)
    unchosen = case.kv_grid.cube_of_token() >= 1
    assert unchosen.any() and not dk[:, unchosen].any() and not dv[:, unchosen].any()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_slots_without_a_token_count_nothing(head_dim, run, seed):
    """All scores are near -30: a slot without a token, whose score is 0, would weigh e^30 times a token."""
    case = Case(
        (3, 5, 6), head_dim=head_dim, dtype=torch.float16, lists="dense", scale=30 / head_dim, seed=seed
    )
    case.query = (1 + 0.05 * case.query.float()).to(case.dtype)
    case.key = (-1 + 0.05 * case.key.float()).to(case.dtype)
    check_fine_backward(run, case)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_lists_far_apart_do_not_deadlock(head_dim, run, seed):
    """Between two cubes of one list lie more of its neighbour's than a ring has stages, in both passes."""
    blocks = (1, 1, 64 * 16)
    case = Case(blocks, LINEAR, blocks, LINEAR, head_dim=head_dim, topk=14, seed=seed)
    case.kv_indices[0, 0] = torch.arange(1, 15)
    case.kv_num_blocks[0, 0] = 14
    for query in (0, 15):
        case.kv_indices[0, 0, query, :2] = torch.tensor([0, 15])
        case.kv_num_blocks[0, 0, query] = 2
    check_fine_backward(run, case)


@pytest.mark.simulator
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_launched_first_leaves_the_rows_terms(dtype, deterministic, seed):
    """LSE / scale and delta in three bf16 each, exactly; for LSE = +inf a large number, NaN for NaN."""
    case = Case((5, 6, 7), heads=2, batch=2, dtype=dtype, scale=0.3, topk=2, seed=seed)
    rows = (2, 2, case.q_grid.num_cubes, 64)
    lse, delta = (case.randn(*rows) * 10 ** (20 * case.randn(*rows).clamp(-1, 1)) for _ in range(2))
    lse.view(-1)[:6] = torch.tensor([torch.inf, 3e38, 2e38, torch.nan, 0.0, -3e37])
    delta.view(-1)[:4] = torch.tensor([0.0, torch.nan, 3e38, -1e-20])
    index = case.kv_num_blocks, case.kv_indices
    index += reference.transpose_index(*index, case.kv_grid.num_cubes)
    arguments = new_gradient(case), case.query, case.key, case.value, lse, delta, *index
    with simulated_device(*arguments, seed=seed) as device:
        _kernels.fine_backward(
            *arguments, *(None,) * 5, case.q_shape, case.kv_shape, case.cube, case.kv_cube, case.scale,
            deterministic,
        )  # fmt: skip
    assert any(
        x.startswith("fine_backward_q" if deterministic else "start_grad_query") for x in device.kernels
    )
    (terms,) = (x for x in device.allocated if x.dtype == torch.bfloat16 and x.shape[-1] == 8)
    assert terms.shape == (4 * case.q_grid.num_cubes + 1, 64, 8)
    terms = terms[:-1].view(*rows, 8)
    if deterministic:  # the pass after it loads 16 rows of a thin cube
        assert case.q_grid.video_shape == (5, 6, 7) and case.q_grid.cube == (4, 4, 4)
        thin, real = slice(4, 8), slice(16)  # along time: their tokens are the first 16
        for x in (lse, delta):
            x[:, :, thin, 16:] = 0
        terms[:, :, thin, 16:] = 0
        assert terms[:, :, thin, real].any()
    assert not terms[..., 3].any() and not terms[..., 7].any()
    sums = terms.double().unflatten(-1, (2, 4)).sum(dim=-1)
    exact = torch.stack([lse / torch.tensor(case.scale), delta], dim=-1).double()
    large = torch.stack([exact[..., 0] > 3e38, torch.zeros_like(delta).bool()], dim=-1)
    assert large.sum() >= 2 and sums[large].min() > 1e38 and sums[large].isfinite().all()
    assert torch.equal(sums.isnan(), exact.isnan()) and exact.isnan().sum() == 2
    others = ~large & ~exact.isnan()
    assert torch.equal(sums[others], exact[others])


@over_structures
def test_nan_lse_spoils_what_its_row_takes_part_in(head_dim, deterministic, run, seed):
    """And nothing else."""
    case = Case((1, 1, 64 * 7), LINEAR, head_dim=head_dim, topk=2, seed=seed)
    grad_out = new_gradient(case)
    out, lse, _ = exact_backward(case, grad_out)
    out, lse = out.to(case.dtype), lse.float()
    clean = backward(run, case, grad_out, out, lse, deterministic=deterministic)
    lse[0, 0, 2, 17] = torch.nan
    spoiled = torch.zeros(64 * 7, dtype=torch.bool)
    spoiled[64 * 2 + 17] = True
    keys = torch.isin(case.kv_grid.cube_of_token(), case.kv_indices[0, 0, 2])
    gradients = backward(run, case, grad_out, out, lse, deterministic=deterministic)
    for name, x, before, rows in zip(
        ("dq", "dk", "dv"), gradients, clean, (spoiled, keys, keys), strict=True
    ):
        assert x[:, rows].isnan().all()
        assert x[:, ~rows].isfinite().all()
        if deterministic or name != "dq":
            assert torch.equal(x[:, ~rows], before[:, ~rows])


@pytest.mark.simulator
@pytest.mark.parametrize("schedule", range(20))
@over_structures
def test_every_schedule_gives_the_same_bits(head_dim, deterministic, schedule, seed):
    """But those of the fused pass's dQ, which is a sum in any order."""
    gradients = gradients_of_schedule(head_dim, deterministic, 1000 * seed + schedule, seed)
    first = gradients_of_schedule(head_dim, deterministic, seed + 999, seed)
    for name, x, y in zip(("dq", "dk", "dv"), gradients, first, strict=True):
        assert torch.equal(x, y) or (name == "dq" and not deterministic)


@functools.cache
def gradients_of_schedule(head_dim, deterministic, schedule, seed):
    case = Case((4, 6, 13), head_dim=head_dim, topk=3, seed=seed)
    run_schedule = functools.partial(run_simulated, seed=schedule)
    return check_fine_backward(run_schedule, case, deterministic=deterministic)


@pytest.mark.gpu
@over_structures
def test_repeated_runs_give_the_same_bits(head_dim, deterministic, seed):
    """But those of the fused pass's dQ."""

    def gradients():
        case = Case((8, 12, 20), heads=4, head_dim=head_dim, topk=12, seed=seed)
        return check_fine_backward(run_on_gpu, case, deterministic=deterministic)

    first, *others = (gradients() for _ in range(5))
    for other in others:
        for name, x, y in zip(("dq", "dk", "dv"), first, other, strict=True):
            assert torch.equal(x, y) or (name == "dq" and not deterministic)
