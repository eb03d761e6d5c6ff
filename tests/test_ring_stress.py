"""The fine kernels' rings over long, uneven and empty lists, task after task, in the simulator."""

import functools

import pytest
import torch

import simulated
from attention_cases import LINEAR, Case
from fine_stage import check_fine_backward, check_forward, forward
from simulated import run_simulated
from vsa_cuda import _extension

pytestmark = [
    pytest.mark.simulator,
    pytest.mark.skipif(
        not _extension.is_available(), reason="vsa_cuda._C is not built: no host plan to simulate"
    ),
]


def few_at_the_end(g):
    """Two lists have the first and the last block: what no neighbour shares comes after all their stages."""
    chosen = torch.rand(4, 200, generator=g) < 0.95
    chosen[:, -1] = False
    chosen[[0, 3]] = False
    chosen[[0, 3], 0] = chosen[[0, 3], -1] = True
    return chosen


def few_at_both_ends(g):
    """Two lists share two blocks with all others, which come first, and have one of their own, the last."""
    chosen = torch.rand(4, 200, generator=g) < 0.95
    chosen[:, -1] = False
    chosen[[1, 2], 2:] = False
    chosen[:, :2] = chosen[[1, 2], -1] = True
    return chosen


def gaps(_):
    """The second consumer passes over 0 to 8 stages at a time. And an empty list beside a long one."""
    chosen = torch.ones(4, 9 * 32, dtype=torch.bool)
    for window in range(9):  # as a schedule reads lists: 32 entries at a time, what is shared first
        end = 32 * (window + 1)
        chosen[1, end - 2 * window : end] = False
    chosen[2] = False
    chosen[3, 66:] = False
    return chosen


def early(g):
    """Two lists end long before their neighbours', so that the last stages are none of theirs."""
    chosen = torch.zeros(5, 300, dtype=torch.bool)
    for row in range(5):
        chosen[row, row % 3 :: 3] = True
    chosen[[0, 2], 100:] = False
    return chosen


def whole_windows(g):
    """32 and 64 stages, all shared, which are whole windows; one stage and none between them."""
    lengths = torch.tensor([64, 1, 128, 0])
    return torch.arange(128) < lengths.repeat_interleave(3)[:, None]


def long_and_empty_tasks(g):
    """Lists of unlike lengths: the next stage of a consumer is few stages away or many."""
    chosen = torch.rand(19, 100, generator=g) < 0.1 + 0.5 * torch.rand(19, 1, generator=g)
    chosen[6:12] = False  # whole tasks, be they of two blocks or three
    return chosen


# With the CTAs that run: one takes all tasks, so that what is left of one is in the way of the next.
KINDS = [
    (few_at_the_end, 1), (few_at_both_ends, 1), (gaps, 1), (early, 1), (whole_windows, 1),
    (long_and_empty_tasks, 3),
]  # fmt: skip


@pytest.fixture(params=KINDS, ids=lambda kind: kind[0].__name__)
def chosen(request, monkeypatch, seed):
    """bool [lists, blocks]."""
    kind, ctas = request.param
    monkeypatch.setattr(simulated, "NUM_SMS", ctas)
    return kind(torch.Generator().manual_seed(seed))


def listed(chosen, head_dim, seed):
    """A case of blocks of 64 tokens: chosen, bool [query blocks, key blocks]."""
    queries, keys = chosen.shape
    case = Case((1, 1, 64 * queries), LINEAR, (1, 1, 64 * keys), LINEAR, head_dim=head_dim, seed=seed)
    counts = chosen.sum(dim=1)
    order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    order = order.masked_fill(torch.arange(keys) >= counts[:, None], 2**31 - 1)
    case.kv_num_blocks, case.kv_indices = (x.to(torch.int32)[None, None] for x in (counts, order))
    return case


def same_bits(function, schedules, seed):
    """What function(seed=...) gives, the same under these of the simulator's four kinds of schedules."""
    first, *others = (function(seed=4 * seed + i) for i in schedules)
    for results in others:
        assert all(torch.equal(x, y) for x, y in zip(first, results, strict=True))
    return first


@pytest.mark.parametrize(("head_dim", "schedules"), [(64, (0, 1, 2)), (128, (3,))])
def test_forward(chosen, head_dim, schedules, seed):
    case = listed(chosen, head_dim, seed)
    out, _, lse = same_bits(functools.partial(forward, case), schedules, seed)
    check_forward(case, out, lse)


def check_schedules(case, deterministic, schedules, seed, **options):
    """Gradients under each schedule; the same bits, but those of the fused pass's dQ. Returns the devices."""
    devices, first = [], None
    for schedule in schedules:
        case.generator.manual_seed(seed)
        run = functools.partial(run_simulated, seed=4 * seed + schedule, devices=devices)
        gradients = check_fine_backward(run, case, deterministic=deterministic, **options)
        first = first or gradients
        summed = 0 if deterministic else 1
        assert all(torch.equal(x, y) for x, y in zip(first[summed:], gradients[summed:], strict=True))
    return devices


@pytest.mark.parametrize(
    ("side", "head_dim", "schedules"),
    [
        ("query", 64, (1,)), ("key", 64, (2, 3)), ("fused", 64, (0,)), ("fused, short lists", 64, (1,)),
        ("query", 128, (3,)), ("key", 128, (0,)),
    ],
)  # fmt: skip
def test_backward(chosen, side, head_dim, schedules, seed):
    """Of the pass that has these lists; the other one of two has many short ones."""
    case = listed(chosen if side == "query" else chosen.T, head_dim, seed)
    if side == "fused, short lists":  # which have no room for a block that nobody chose
        case = listed(torch.nn.functional.pad(chosen.T, (0, 1)), head_dim, seed)
        case.kv_indices = case.kv_indices[..., : chosen.shape[0]]
    devices = check_schedules(case, not side.startswith("fused"), schedules, seed)
    if side.startswith("fused"):
        (device,) = (x for x in devices if "start_grad_query_d64" in x.kernels)
        opcodes = " ".join(device.report("fine_backward_fused").opcodes)
        assert ("cp.reduce" in opcodes) == (side == "fused") == ("atom.global.add.v4.f32" not in opcodes)


def copies(device, case, lists):
    """By kernel, when each task is worked on once."""
    panels, blocks = case.head_dim // 64, case.heads * case.q_grid.num_cubes
    size = 3 - panels  # blocks of a stage of the passes that keep keys; the query pass has two
    tasks = case.heads * -(-case.q_grid.num_cubes // 2)
    if lists:
        counts = [x for x in device.allocated if x.dtype == torch.int32 and x.dim() == 1]
        key_stages, *query_stages = (int(x[:tasks].sum()) for x in counts)
    else:
        key_stages, *query_stages = (tasks * -(-case.q_grid.num_cubes // count) for count in (size, 2))
    resident = 2 * panels * blocks
    keys = resident + key_stages * size * (2 * panels + 1)  # the queries' terms
    expected = {"fine_backward_kv": keys, "fine_backward_fused": keys}
    if not lists:
        expected["fine_backward_fused"] += key_stages * 2 * 4  # dQ, by warps
    if query_stages:
        expected["fine_backward_q"] = resident + query_stages[0] * 2 * 2 * panels
        # Half as many of a pair's CTAs each, and each to both.
        expected["fine_backward_q_dense"] = expected["fine_backward_q"]
    return expected


@pytest.mark.parametrize(("ctas", "head_dim"), [(3, 64), (8, 64), (20, 64), (2, 128)])
@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
def test_tasks_are_handed_out_once(deterministic, lists, ctas, head_dim, seed, monkeypatch):
    """Eight of each pass, to fewer, as many and more CTAs; without lists they go round."""
    monkeypatch.setattr(simulated, "NUM_SMS", ctas)
    blocks = (1, 1, 64 * 7)
    kind = "empty" if lists else "dense"  # with rows of any length
    case = Case(blocks, LINEAR, heads=2, head_dim=head_dim, topk=6, lists=kind, seed=seed)
    coarse_grid = None if lists else case.q_grid
    passes = 0
    for device in check_schedules(case, deterministic, (0, 3), seed, coarse_grid=coarse_grid):
        launched = dict(zip(device.kernels, device.reports, strict=True))
        for kernel, report in launched.items():
            if kernel.startswith("fine_backward"):
                stem = kernel.split(f"_d{head_dim}")[0]
                assert report.async_copies == copies(device, case, lists)[stem]
                passes += 1
    fused = not deterministic and (head_dim == 64 or not lists)
    assert passes == 2 * (1 if fused else 2)
