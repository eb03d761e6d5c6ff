"""The fine stage's backward in one pass, in the simulator and on a GPU: pads, odd shapes, and who runs."""

import functools

import pytest
import torch

import simulated
from attention_cases import LINEAR, Case
from fine_stage import (
    BOTH,
    FUSED,
    RUNS,
    check_fine_backward,
    exact_backward,
    fine_passes,
    new_gradient,
    on_gpu,
)
from host_plans import fine_backward_arguments
from simulated import kernel_ptx, run_simulated
from simulator import simulate
from tolerance import assert_within_tolerance, half_precision_baseline
from vsa_cuda import _extension, _kernels

pytestmark = pytest.mark.skipif(
    not _extension.is_available(), reason="vsa_cuda._C is not built: no host plan to run"
)
HALVES = [torch.bfloat16, torch.float16]
over_runs = pytest.mark.parametrize("execute", RUNS)
over_schedules = pytest.mark.parametrize("schedule", range(4))  # the simulator's kinds
over_halves = pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
over_head_dims = pytest.mark.parametrize("head_dim", [64, 128])


def blocks_case(q_blocks, kv_blocks, **options):
    """Blocks of 64 consecutive tokens."""
    return Case((1, 1, 64 * q_blocks), LINEAR, (1, 1, 64 * kv_blocks), LINEAR, **options)


def check_fused(run, case, coarse_grid=None):
    """The pass runs by itself, or by the device's choice."""
    assert fine_passes(case, coarse_grid is None) in (FUSED, BOTH)
    return check_fine_backward(run, case, coarse_grid=coarse_grid, deterministic=False)


# Shapes.


@over_runs
@over_head_dims
@pytest.mark.parametrize(
    ("q_blocks", "kv_blocks"), [(1, 1), (1, 2), (2, 1), (2, 3), (3, 2), (5, 5), (4, 4), (7, 1)]
)
def test_odd_numbers_of_blocks(q_blocks, kv_blocks, head_dim, execute, seed):
    """A task of one consumer; a stage of one block at head_dim 64. With lists of everything."""
    case = blocks_case(q_blocks, kv_blocks, head_dim=head_dim, lists="dense", seed=seed)
    check_fused(functools.partial(execute, seed=seed), case)


@pytest.mark.simulator
@over_head_dims
@over_schedules
@pytest.mark.parametrize("lists", [True, False])
def test_many_tasks_of_one_cta(lists, schedule, head_dim, seed, monkeypatch):
    """12 tasks, every third with one consumer: what is left of one is in the way of the next."""
    monkeypatch.setattr(simulated, "NUM_SMS", 1)
    case = blocks_case(5, 5, batch=2, heads=2, head_dim=head_dim, lists="dense", seed=seed)
    run = functools.partial(run_simulated, seed=4 * seed + schedule)
    check_fused(run, case, None if lists else case.q_grid)


@pytest.mark.simulator
@over_schedules
@pytest.mark.parametrize("ctas", [1, 3])
@pytest.mark.parametrize("kind", ["random", "empty", "disjoint"])
def test_lists(kind, ctas, schedule, seed, monkeypatch):
    """Stages of both consumers, of either, and padded ones, in turns."""
    monkeypatch.setattr(simulated, "NUM_SMS", ctas)
    case = blocks_case(9, 7, batch=2, heads=2, topk=4, lists=kind, seed=seed + schedule)
    check_fused(functools.partial(run_simulated, seed=4 * seed + schedule), case)


# Pads.


@over_runs
@over_halves
@over_schedules
@pytest.mark.parametrize(("head_dim", "lists"), [(64, "random"), (64, "dense"), (128, "dense")])
def test_pads_with_nan(head_dim, lists, schedule, dtype, execute, seed):
    """In Q, K, V and dO; some blocks are empty or full."""
    case = blocks_case(
        5, 3, heads=2, head_dim=head_dim, dtype=dtype, topk=2, lists=lists, ragged=True, seed=seed + schedule
    )
    assert case.query.isnan().any() and case.key.isnan().any() and case.value.isnan().any()
    gradients = check_fused(functools.partial(execute, seed=4 * seed + schedule), case)
    for x, grid, sizes in zip(
        gradients,
        (case.q_grid, case.kv_grid, case.kv_grid),
        (case.q_block_sizes, case.block_sizes, case.block_sizes),
        strict=True,
    ):
        assert not x[:, ~case._real(grid, sizes)].any()


@over_runs
@over_halves
@over_head_dims
@pytest.mark.parametrize("ragged", [False, True])
def test_scores_far_below_zero(ragged, head_dim, dtype, execute, seed):
    """exp(score - LSE) of a pad, whose score is 0, overflows fp32; and a half long before."""
    options = {"head_dim": head_dim, "dtype": dtype, "lists": "dense", "scale": 150 / head_dim, "seed": seed}
    case = blocks_case(3, 3, ragged=True, **options) if ragged else Case((3, 5, 6), **options)
    case.query = (1 + 0.02 * case.query.float()).to(dtype)
    case.key = (-1 + 0.02 * case.key.float()).to(dtype)
    _, lse = case.reference()
    assert lse[lse.isfinite()].max() < -100
    for x in check_fused(functools.partial(execute, seed=seed), case):
        assert x.isfinite().all()


@over_runs
@over_halves
@pytest.mark.parametrize(
    ("head_dim", "sizes", "counts", "indices"),
    [(64, [64, 0], [1, 2], [[1, 1], [0, 1]]), (128, [0, 0], [2, 2], [[0, 1], [0, 1]])],
)
def test_queries_whose_blocks_are_all_empty(head_dim, sizes, counts, indices, dtype, execute, seed):
    """Their LSE is -inf, though they have lists: no gradient, and above all no NaN."""
    case = blocks_case(2, 2, head_dim=head_dim, dtype=dtype, lists="dense", ragged=True, seed=seed)
    case.block_sizes = torch.tensor(sizes, dtype=torch.int32)
    pads = ~case._real(case.kv_grid, case.block_sizes)
    case.key, case.value = case.key.nan_to_num(), case.value.nan_to_num()
    case.key[:, pads] = case.value[:, pads] = torch.nan
    case.kv_num_blocks = torch.tensor([[counts]], dtype=torch.int32)
    case.kv_indices = torch.tensor([[indices]], dtype=torch.int32)
    dq, dk, dv = check_fused(functools.partial(execute, seed=seed), case)
    assert not dq[:, :64].any()
    assert dk.isfinite().all() and dv.isfinite().all()


# The device's choice.


def full_index(kv_blocks, head_dim, short, seed):
    """Lists of all blocks, of 2 x 2 heads of 3 query blocks; those in `short` lack the last entry."""
    case = blocks_case(3, kv_blocks, batch=2, heads=2, head_dim=head_dim, lists="dense", seed=seed)
    for place in short:
        case.kv_num_blocks[place] -= 1
        case.kv_indices[place][-1] = 2**31 - 1
    return case


# Nothing; the first head's first list; one in a head between; the last list of all; every one.
SHORT = [
    (), [(0, 0, 0)], [(1, 0, 1)], [(1, 1, 2)], [(b, h, i) for b in (0, 1) for h in (0, 1) for i in range(3)],
]  # fmt: skip


@over_runs
@pytest.mark.parametrize("kv_blocks", [2, 5])
@pytest.mark.parametrize("short", SHORT, ids=len)
def test_either_choice_gives_the_gradients(short, kv_blocks, execute, seed):
    case = full_index(kv_blocks, 128, short, seed)
    assert fine_passes(case) == BOTH
    check_fused(functools.partial(execute, seed=seed), case)


@pytest.mark.simulator
@pytest.mark.parametrize("kv_blocks", [2, 5])
@pytest.mark.parametrize("short", SHORT, ids=len)
def test_what_was_not_chosen_does_nothing(short, kv_blocks, seed):
    devices = []
    case = full_index(kv_blocks, 128, short, seed)
    check_fused(functools.partial(run_simulated, seed=seed, devices=devices), case)
    (device,) = (x for x in devices if any("fine_backward" in kernel for kernel in x.kernels))
    kernels = {
        True: ["fine_backward_q", "fine_backward_kv"],
        False: ["start_grad_query", "fine_backward_fused", "finish_grad_query"],
    }
    for stem in kernels[bool(short)]:
        assert worked(device.report(stem))
    for stem in kernels[not short]:
        report = device.report(stem)
        assert not worked(report) and not report.matrix_products and not report.barrier_phases


def worked(report):
    """Whether it wrote or copied anything."""
    return report.async_copies > 0 or any(opcode.startswith(("st.", "red.")) for opcode in report.opcodes)


@pytest.mark.simulator
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
def test_all_heads_are_looked_at(rows, seed):
    """More than the threads of a CTA; by the kernel that writes zeros."""
    generator = torch.Generator().manual_seed(seed)
    all_pairs, kv_blocks = 6 * 2, 2
    ends = torch.full((rows, kv_blocks + 1), all_pairs, dtype=torch.int32)
    ends[:, :-1] = 7
    short = int(torch.randint(rows, (), generator=generator))
    for place, count in ((None, 0), (0, 11), (rows - 1, 11), (short, 0), (short, 13)):
        offsets = ends.clone()
        if place is not None:
            offsets[place, -1] = count
        tensors = lse, delta = [torch.ones(rows, 6, 64) for _ in range(2)]
        terms, sums = torch.zeros(rows, 6, 64, 8, dtype=torch.bfloat16), torch.ones(rows, 6, 64, 64)
        arguments = fine_backward_arguments(
            (1, 1, 384), (1, 1, 64), head_dim=64, heads=rows, batch=1, kv_video=(1, 1, 128),
            lse=lse.data_ptr(), delta=delta.data_ptr(), row_terms=terms.data_ptr(),
            grad_query_sums=sums.data_ptr(), choose_by=offsets.data_ptr(),
        )  # fmt: skip
        plan = _extension.load().plan_start_grad_query(arguments)
        simulate(kernel_ptx(plan.kernel), plan, [*tensors, terms, sums, offsets], seed=seed)
        chosen = place is None
        assert bool((sums == 0).all()) == chosen and bool((sums == 1).all()) != chosen
        assert bool(terms.any()) == chosen


# On a GPU.


def gpu_steps(head_dim, lists, seed):
    """The pass on 2 heads of 40 blocks, all of which meet in dQ's sums; and a check of what it gives."""
    case = blocks_case(40, 40, heads=2, head_dim=head_dim, lists="dense", seed=seed)
    grad_out = new_gradient(case)
    out, lse, exact = exact_backward(case, grad_out)
    index = (case.kv_num_blocks, case.kv_indices) if lists else (None, None)
    _, *baseline = half_precision_baseline(
        case.query, case.key, case.value, case.kv_num_blocks, case.kv_indices, case.q_grid, case.kv_grid,
        case.scale, grad_out,
    )  # fmt: skip
    grids = case.q_shape, case.kv_shape, case.cube, case.kv_cube
    grad_out, out, lse, query, key, value, *index = map(
        on_gpu, (grad_out, out.to(case.dtype), lse.float(), case.query, case.key, case.value, *index)
    )
    _, delta, *_ = _kernels.combine_backward(
        grad_out, out, None, None, None, None, 1.0, 0.0, None, case.q_shape, case.cube
    )

    def step():
        compressed = _kernels.transpose_index(*index, 40) if lists else (None, None)
        return _kernels.fine_backward(
            grad_out, query, key, value, lse, delta, *index, *compressed, *(None,) * 5, *grids, case.scale,
            False,
        )  # fmt: skip

    def check(gradients):
        for name, x, *versions in zip(("dq", "dk", "dv"), gradients, exact, baseline, strict=True):
            assert_within_tolerance(x.cpu(), *versions, name)

    assert fine_passes(case, lists) in (FUSED, BOTH)
    return step, check


over_dense = pytest.mark.parametrize(
    ("head_dim", "lists"), [(64, False), (64, True), (128, False), (128, True)]
)


@pytest.mark.gpu
@over_dense
def test_repeated_runs(head_dim, lists, seed):
    """dK and dV are the same bits."""
    step, check = gpu_steps(head_dim, lists, seed)
    _, *first = step()
    for _ in range(10):
        gradients = step()
        check(gradients)
        assert all(torch.equal(x, y) for x, y in zip(first, gradients[1:], strict=True))


@pytest.mark.gpu
@over_dense
def test_cuda_graph(head_dim, lists, seed):
    """Replayed, it begins its sums at zero again."""
    step, check = gpu_steps(head_dim, lists, seed)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for _ in range(3):
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        check(captured)


@pytest.mark.gpu
@over_dense
def test_side_stream(head_dim, lists, seed):
    step, check = gpu_steps(head_dim, lists, seed)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        gradients = step()
    stream.synchronize()
    check(gradients)


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("head_dim", "width", "fused"), [(64, 16, True), (128, 16, False), (128, None, True)]
)
def test_memory_of_the_backward(head_dim, width, fused, seed):
    """Beside the gradients: the index and schedules, terms of 16 bytes a row, and one fp32 dQ if fused."""
    heads, blocks = 4, 256
    case = blocks_case(blocks, blocks, heads=heads, head_dim=head_dim, topk=width or 1, seed=seed)
    q, k, v = (on_gpu(x) for x in (case.query, case.key, case.value))
    rows = torch.zeros(1, heads, blocks, 64, device="cuda")
    index = [None] * 4
    if width is not None:
        index = [on_gpu(x) for x in (case.kv_num_blocks, case.kv_indices)]
        index += _kernels.transpose_index(*index, blocks)
    assert (FUSED[0] in fine_passes(case, width is not None)) == fused
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = _kernels.fine_backward(
        q, q, k, v, rows, rows, *index, *[None] * 5, case.q_shape, case.kv_shape, case.cube, case.kv_cube,
        case.scale, False,
    )  # fmt: skip
    peak = torch.cuda.max_memory_allocated() - before
    sums = 4 * q.numel() if fused else 0
    schedules = 0 if width is None else 2 * 8 * heads * blocks * (width + 2) + (1 << 16)
    result = sum(x.numel() * x.element_size() for x in gradients)
    small = 16 * rows.numel() + schedules + (1 << 16)
    small += 1 << 20  # what the allocator does not split off a block
    assert result + sums <= peak <= result + sums + small
    assert small < 2 * q.numel()  # so that one more buffer would show
