"""Host plans of the backward without a GPU: what is launched for which shape, and each plan."""

import struct

import pytest
import torch

from fine_stage import BOTH, FUSED, LISTED_OR_DENSE, TWO_PASSES
from host_plans import BASE, SHARED_LIMIT, fine_backward_arguments, recorded_plans, stems
from vsa_cuda import _extension, _kernels
from vsa_cuda.geometry import CubeGrid

pytestmark = pytest.mark.skipif(
    not _extension.is_available(), reason="vsa_cuda._C is not built: no host plan to test"
)

KERNELS_OF = {
    TWO_PASSES: ["fine_backward_q", "fine_backward_kv"],
    FUSED: ["start_grad_query", "fine_backward_fused", "finish_grad_query"],
}
KERNELS_OF[BOTH] = KERNELS_OF[TWO_PASSES] + KERNELS_OF[FUSED]
KERNELS_OF[LISTED_OR_DENSE] = ["fine_backward_q", "fine_backward_q_dense", "fine_backward_kv"]
PLANNED = [f"plan_{kernel}" for kernel in KERNELS_OF[BOTH]]


# Which structure.


@pytest.mark.parametrize(
    ("head_dim", "q_blocks", "kv_blocks", "width", "expected"),
    [
        (64, 100, 70, None, FUSED),
        (128, 100, 70, None, FUSED),
        (64, 100, 70, 8, FUSED),
        (64, 100, 70, 70, FUSED),
        (64, 1 << 20, 70, 8, TWO_PASSES),  # a head has 32 KB a query block: far more than L2
        (64, 1 << 20, 70, 70, BOTH),
        (64, 100, 1 << 20, 8, FUSED),  # key blocks take no room there
        (128, 100, 70, 8, TWO_PASSES),
        (128, 100, 70, 69, TWO_PASSES),
        (128, 100, 70, 70, BOTH),
        (128, 100, 70, 71, BOTH),
        (128, 1 << 20, 1 << 20, 8, TWO_PASSES),
        (128, 1 << 20, 1 << 12, 1 << 12, TWO_PASSES),  # more pairs than 31 bits count
        (128, 1, 1, 1, BOTH),
    ],
)
def test_structure(head_dim, q_blocks, kv_blocks, width, expected):
    """`width` of the lists; None: there are none."""
    grids = [CubeGrid.linear(64 * blocks) for blocks in (q_blocks, kv_blocks)]
    lists = None if width is None else torch.empty(1, 3, q_blocks, width, device="meta")
    assert _kernels._ways(head_dim, *grids, lists, None, False) == expected
    deterministic = {FUSED: TWO_PASSES, BOTH: TWO_PASSES}.get(expected, expected)
    if head_dim == 64 and width is not None and width >= kv_blocks:
        deterministic = LISTED_OR_DENSE
    assert _kernels._ways(head_dim, *grids, lists, None, True) == deterministic
    sizes = torch.empty(kv_blocks, device="meta")
    assert _kernels._ways(head_dim, *grids, lists, sizes, True) == TWO_PASSES


def launched(head_dim, q_blocks, kv_blocks, width, deterministic, dtype=torch.bfloat16, heads=2):
    """Plans of the backward over so many blocks, but those of schedules; and the gradients."""
    query, key = (
        torch.zeros(1, 64 * blocks, heads, head_dim, dtype=dtype) for blocks in (q_blocks, kv_blocks)
    )
    rows = torch.zeros(1, heads, q_blocks, 64)
    shapes = [(1, 1, 64 * blocks) for blocks in (q_blocks, kv_blocks)]
    index = (None,) * 4
    with recorded_plans() as plans:
        if width is not None:
            index = [torch.zeros(1, heads, q_blocks, *size, dtype=torch.int32) for size in ((), (width,))]
            index += _kernels.transpose_index(*index, kv_blocks)
        plans.clear()
        gradients = _kernels.fine_backward(
            query, query, key, key, rows, rows, *index, *(None,) * 5, *shapes, (1, 1, 64), (1, 1, 64), 0.125,
            deterministic,
        )  # fmt: skip
    return [plan for plan in plans if not plan.kernel.startswith("schedule")], gradients


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "q_blocks", "kv_blocks", "width", "structure"),
    [
        (64, 7, 5, None, FUSED),
        (128, 7, 5, None, FUSED),
        (64, 7, 5, 3, FUSED),
        (64, 7, 5, 5, FUSED),
        (64, 1200, 5, 3, TWO_PASSES),
        (128, 7, 5, 3, TWO_PASSES),
        (128, 7, 5, 5, BOTH),
    ],
)
def test_launched_kernels(head_dim, q_blocks, kv_blocks, width, structure, deterministic):
    """In this order; schedules only of passes that take lists."""
    plans, gradients = launched(head_dim, q_blocks, kv_blocks, width, deterministic)
    if deterministic:
        structure = LISTED_OR_DENSE if head_dim == 64 and width == kv_blocks else TWO_PASSES
    kernels = KERNELS_OF[structure]
    if deterministic and head_dim == 64 and width is None:
        kernels = ["fine_backward_q_dense", "fine_backward_kv"]
    assert stems(plans) == kernels
    assert all(plan.kernel in _extension.load().kernel_names() for plan in plans)
    assert [x.shape[1] for x in gradients] == [64 * q_blocks, 64 * kv_blocks, 64 * kv_blocks]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("width", "head_dim"), [(None, 64), (None, 128), (3, 64), (3, 128), (5, 128)])
def test_sums_are_allocated_for_the_fused_pass_only(width, head_dim, deterministic, monkeypatch):
    sizes = []
    allocate = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        x = allocate(self, *args, **kwargs)
        sizes.append(x.numel() if x.dtype == torch.float32 else 0)
        return x

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    plans, (grad_query, *_) = launched(head_dim, 7, 5, width, deterministic)
    fused = "fine_backward_fused" in stems(plans)
    assert sizes.count(grad_query.numel()) == fused and sum(sizes) == fused * grad_query.numel()


# Plans.


def backward_plans(*video, only=PLANNED, **changes):
    """Plans of `only`; no lists."""
    arguments = fine_backward_arguments(*video, **changes)
    return [getattr(_extension.load(), name)(arguments) for name in only]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_fine_backward_plans(head_dim, dtype):
    plans = backward_plans(head_dim=head_dim, dtype=dtype)
    suffix = f"_d{head_dim}_{'bf16' if dtype == 'bfloat16' else 'fp16'}"
    names = [kernel + suffix for kernel in KERNELS_OF[BOTH]]
    if head_dim == 64:
        names[0] = f"fine_backward_q_dense{suffix}"
    names[2] = f"start_grad_query_d{head_dim}"  # its tensors are fp32
    assert [plan.kernel for plan in plans] == names
    assert set(names) <= set(_extension.load().kernel_names())
    query_pass, key_pass, first, fused, last = plans
    for plan in (query_pass, key_pass, fused):
        assert plan.grid == (12 // 2 * 6, 1, 1)  # 12 cubes, two a task, 3 heads, batch 2
        assert plan.block == (128 * 3, 1, 1) and len(plan.maps) == 10
        assert 0 < plan.shared_bytes <= SHARED_LIMIT
    for plan in (first, last):
        assert plan.grid == (12 * 6, 1, 1) and plan.block == (128, 1, 1)
        assert plan.shared_bytes == 0 and not plan.maps
    assert [plan.cluster[0] for plan in plans] == [1 + ("dense" in plan.kernel) for plan in plans]
    assert len({len(plan.params) for plan in plans}) == 1


@pytest.mark.parametrize(
    ("blocks", "heads", "sms", "changes", "ctas"),
    [
        (2, 300, 132, {}, None),  # one task a head has no neighbour
        (4, 1, 132, {}, 2),
        (3, 1, 2, {}, 2),
        (5, 44, 132, {}, None),  # 132 groups at once, or 88 pairs at 66 at a time
        (5, 60, 132, {}, 132),  # 180 groups, or 120 pairs: two rounds of either
        (5, 132 * 8, 132, {}, None),  # 24 rounds, or 32 of pairs
        (21, 132, 132, {}, None),  # 11 rounds, or 12 of pairs, which are shorter, but not by so much
        (25, 132, 132, {}, 132),  # 13 rounds, or 14 of pairs
        (8, 3, 1, {}, None),
        (8, 3, 5, {}, 4),
        (8, 3, 132, {"head_dim": 128}, None),
        (8, 3, 132, {"block_sizes": BASE}, None),
        (8, 3, 132, {"q_block_sizes": BASE}, 12),
    ],
)
def test_when_ctas_of_the_query_pass_pair(blocks, heads, sms, changes, ctas):
    """`ctas` of them, or None."""
    changes = {"head_dim": 64, "heads": heads, "batch": 1, "num_sms": sms} | changes
    (plan,) = backward_plans((1, 1, 64 * blocks), (1, 1, 64), only=["plan_fine_backward_q"], **changes)
    if ctas is None:
        assert stems([plan]) == ["fine_backward_q"] and plan.cluster == (1, 1, 1)
    else:
        assert stems([plan]) == ["fine_backward_q_dense"] and plan.cluster == (2, 1, 1)
        assert plan.grid == (ctas, 1, 1)


@pytest.mark.parametrize("only", PLANNED[2:])
def test_a_plan_passes_the_sums_on(only):
    address = 0x123456789ABC00
    (plan,) = backward_plans(only=[only], grad_query_sums=address)
    assert struct.pack("Q", address) in plan.params


@pytest.mark.parametrize("only", PLANNED)
def test_a_plan_passes_the_choice_on(only):
    """Of the offsets the last one of a head, how many heads there are, all pairs, and which of the two."""
    C = _extension.load()
    grid = C.CubeGrid(video_shape=(1, 1, 378), cube=(1, 1, 64))  # of keys: 6 blocks, the same tokens
    address = 0x123456789ABC00
    changes = {"kv_grid": grid, "pooled_kv_grid": grid, "choose_by": address}
    (plan,) = backward_plans(only=[only], **changes)
    if_all = only != "plan_fine_backward_kv"  # of query passes the one without a schedule
    choice = struct.pack("Qqii?", address + 4 * 6, 6 + 1, 2 * 3, 12 * 6, if_all)
    assert choice in plan.params
    (without,) = backward_plans(only=[only], **(changes | {"choose_by": 0}))
    assert choice not in without.params and len(without.params) == len(plan.params)


@pytest.mark.parametrize(
    ("head_dim", "choose_by", "takes"), [(64, 0, True), (64, BASE, False), (128, 0, False)]
)
def test_which_fused_pass_takes_lists(head_dim, choose_by, takes):
    """Not where the device chooses it for all pairs: the schedule is the other passes', thin cubes apart."""
    C, address = _extension.load(), 0x123456789ABC00
    nothing = C.StridedTensor(address=0, strides=[])
    grid = C.CubeGrid(video_shape=(9, 7, 6), cube=(4, 4, 4))
    made = C.ScheduleArguments(
        kernel="fine_backward_kv", batch=2, heads=3, head_dim=head_dim, grid=grid, listed_grid=grid,
        block_sizes=0, counts=nothing, entries=nothing, max_blocks=0, offsets=BASE, compressed_entries=BASE,
        entries_per_head=12, num_sms=1,
    )  # fmt: skip
    made.stages = made.stage_counts = made.thin = address
    changes = {"kv_schedule": made.schedule, "choose_by": choose_by, "head_dim": head_dim}
    key_pass, fused = backward_plans(only=["plan_fine_backward_kv", "plan_fine_backward_fused"], **changes)
    assert struct.pack("Q", address) in key_pass.params
    assert (struct.pack("Q", address) in fused.params) == takes


def test_fine_backward_plan_refuses_another_videos_pooled_gradients():
    other = _extension.load().CubeGrid(video_shape=(9, 7, 7), cube=(4, 4, 4))
    takes = {"pooled_q_grid": (0, 4), "pooled_kv_grid": (1, 3)}
    for name, kernels in takes.items():
        for index in kernels:
            with pytest.raises(ValueError, match=f"{name}: got 441 tokens, expected the 378 of the fine"):
                backward_plans(only=[PLANNED[index]], **{name: other})


def test_fine_backward_plans_of_a_million_tokens():
    """40 heads of 16,384 query blocks: sums of 21 GB, more bytes and elements than 32 bits count."""
    query_pass, key_pass, first, fused, last = backward_plans((61, 128, 128), heads=40, batch=1)
    assert query_pass.grid == key_pass.grid == fused.grid == (132, 1, 1)  # CTAs take task after task
    assert first.grid == last.grid == (40 * 16 * 32 * 32, 1, 1)


def test_more_query_blocks_than_a_grid_holds():
    grid = _extension.load().CubeGrid(video_shape=(1, 1, 64), cube=(1, 1, 64))  # of keys: few tasks
    for plan in ("plan_start_grad_query", "plan_finish_grad_query"):
        with pytest.raises(ValueError, match=r"grad_query.*: got a problem of .* CTAs, expected 1 to 2\^31"):
            backward_plans((1 << 7, 1 << 9, 1 << 9), heads=1 << 8, batch=1 << 5, kv_grid=grid, only=[plan])


@pytest.mark.parametrize(
    ("change", "message", "refused_by"),
    [
        ({"lse": 0}, "lse: got a null pointer", PLANNED),
        ({"delta": 0}, "delta: got a null pointer", PLANNED),
        ({"row_terms": BASE + 4}, "row_terms: got an address that is null or not 16-byte aligned", PLANNED),
        ({"row_terms": 0}, "row_terms: got an address that is null or not 16-byte aligned", PLANNED),
        ({"scale": float("nan")}, "scale: got nan", PLANNED),
        ({"num_sms": 0}, "num_sms: got 0", ["plan_fine_backward_q", "plan_fine_backward_kv", PLANNED[3]]),
        ({"grad_query_sums": 0}, "grad_query_sums: got an address that is null or not 16-b", PLANNED[2:]),
        ({"grad_query_sums": BASE + 8}, "grad_query_sums: got an address that is null or", PLANNED[2:]),
    ],
)
def test_fine_backward_plan_errors(change, message, refused_by):
    for plan in PLANNED:
        if plan in refused_by:
            with pytest.raises(ValueError, match=message):
                backward_plans(only=[plan], **change)
        else:
            backward_plans(only=[plan], **change)


@pytest.mark.parametrize("only", PLANNED)
def test_more_pairs_than_a_choice_counts(only):
    """2^15 query blocks and 2^16 key blocks."""
    video = (1 << 7, 1 << 7, 1 << 7)

    def plan(name, kv_blocks, **changes):
        keys = _extension.load().CubeGrid(video_shape=(1, 1, 64 * kv_blocks), cube=(1, 1, 64))
        return backward_plans(video, heads=1, batch=1, only=[name], kv_grid=keys, **changes)

    with pytest.raises(ValueError, match="q_offsets: got 2147483648 pairs of blocks, expected at most 2"):
        plan(only, 1 << 16, choose_by=BASE)
    plan("plan_start_grad_query", 1 << 16)
    plan("plan_start_grad_query", (1 << 16) - 1, choose_by=BASE)


def test_transpose_index_plan():
    C = _extension.load()
    common = {
        "kv_num_blocks": C.StridedTensor(address=BASE, strides=[1, 1, 1]),
        "kv_indices": C.StridedTensor(address=BASE, strides=[1, 1, 1, 1]),
        "q_offsets": BASE,
        "q_indices": BASE,
    }
    plan = C.plan_transpose_index(shape=(2, 3, 100, 7), num_kv_blocks=50, **common)
    assert plan.grid == (2 * 3 * 8, 1, 1) and plan.cluster == (8, 1, 1)
    # Shared memory does not grow with the number of key blocks: the lists are walked again.
    plan = C.plan_transpose_index(shape=(1, 1, 100, 7), num_kv_blocks=BASE, **common)
    assert plan.shared_bytes <= SHARED_LIMIT
    with pytest.raises(ValueError, match="kv_indices: got .* entries a head"):
        C.plan_transpose_index(shape=(1, 1, BASE, 1 << 12), num_kv_blocks=1 << 12, **common)
