"""Schedules of the fine kernels, in the simulator and on a GPU, against the contract in schedule.h."""

import functools
from collections import Counter
from unittest import mock

import pytest
import torch

from fine_stage import on_gpu
from host_plans import BASE
from schedule_cases import (
    BLOCK_BITS,
    GRIDS,
    KERNELS,
    KINDS,
    PADDED,
    PARTIAL,
    ROW,
    THIN,
    THIN_LISTED,
    TURN,
    UNLISTED,
    Problem,
    ceil_div,
    new_problem,
)
from simulated import simulated_device
from vsa_cuda import _extension, _kernels
from vsa_cuda.geometry import CubeGrid

pytestmark = pytest.mark.skipif(
    not _extension.is_available(), reason="vsa_cuda._C is not built: no host plan to run"
)

over_kernels = pytest.mark.parametrize(("kernel", "head_dim"), KERNELS)


def simulate_schedule(sms, kernel, like, grids, sizes, lists, compressed, seed):
    with simulated_device(sizes, *lists, *compressed, seed=seed), multiprocessors(sms):
        _, made = _kernels._schedule(kernel, like, *grids, sizes, lists, compressed)
    return made


def schedule_on_gpu(sms, kernel, like, grids, sizes, lists, compressed, seed):
    lists, compressed = ([on_gpu(x) for x in pair] for pair in (lists, compressed))
    with multiprocessors(sms):
        _, made = _kernels._schedule(kernel, on_gpu(like), *grids, on_gpu(sizes), lists, compressed)
    return [x.cpu() for x in made]


def multiprocessors(number):
    return mock.patch.object(_extension, "num_sms", lambda device: number)


@pytest.fixture(
    params=[
        pytest.param(simulate_schedule, marks=pytest.mark.simulator, id="simulator"),
        pytest.param(schedule_on_gpu, marks=pytest.mark.gpu, id="gpu"),
    ]
)
def make(request, seed):
    return functools.partial(request.param, seed=seed)


def check(problem, stages, counts, rows, places):
    _, size = KERNELS[problem.kernel, problem.head_dim]
    words, partial, thin = stages.tolist(), problem.partial(), problem.thin()
    tasks = [lists for _, _, lists in problem.tasks()]
    assert counts[len(tasks)] == 0, "fetch_tasks counts from here"
    check_early(problem, tasks, counts[len(tasks) + 1 :].tolist())
    owners = Counter(place for task in places for place in task)
    assert all(count == 1 and 0 <= place < len(words) for place, count in owners.items())
    used, thin_rows = set(), []
    for lists, count, at in zip(tasks, counts[: len(tasks)].tolist(), places, strict=True):
        assert 0 <= count <= len(at)
        used.update(at[:count])
        made = [[word % 2**32 for word in words[place]] for place in at[:count]]
        others = [stage for stage in made if not stage[1] & THIN]
        assert made[: len(others)] == others, "thin cubes come last"
        check_task(others, [[block for block in row if block not in thin] for row in lists], partial, size)
        if thin:
            cube = problem.listed_grid.cube
            thin_rows += check_thin(made[len(others) :], lists, thin, rows, size, cube, len(partial))
        else:
            assert made == others and rows.numel() == 0
    assert len(thin_rows) == len({*thin_rows}), "tasks share a row"
    for place in {*range(len(words))} - used:
        assert words[place] == [UNLISTED] * 2, f"stage {place} belongs to no task, but was written"


def check_early(problem, tasks, early):
    """Of compressed lists: the number of tasks with more entries than usual, which they are, and a mark each.

    Not of the fused pass, nor where a multiprocessor has more than 32 of them.
    """
    if problem.kernel != "fine_backward_kv" or len(tasks) > 32 * problem.sms:
        assert early == []
        return
    count, *early = early
    numbers, marks = early[:count], early[len(tasks) :]
    consumers, _ = KERNELS[problem.kernel, problem.head_dim]
    _, (_, entries) = problem.arguments()
    usual = 3 * consumers * entries.shape[2] // (2 * problem.grid.num_cubes)
    expected = [sum(map(len, lists)) > usual for lists in tasks]
    assert marks == expected and sorted(numbers) == [i for i, long in enumerate(expected) if long]


def check_task(stages, lists, partial, size):
    """The stages of one task against the lists of its consumers."""
    chose = Counter()  # block -> members
    for consumer, row in enumerate(lists):
        chose.update(dict.fromkeys(row, 1 << consumer))
    pairs, attended, split = Counter(), Counter(), set()
    for first, second in stages:
        members = first >> BLOCK_BITS & 15
        blocks = [word % (1 << BLOCK_BITS) for word in (first, second)]
        alone = blocks[0] == blocks[1]
        flags = [PARTIAL * partial[block] for block in blocks]
        assert 0 < members < 1 << len(lists)
        assert first & ~TURN == blocks[0] | members << BLOCK_BITS | flags[0]
        assert second == blocks[1] | (PADDED | PARTIAL if alone else flags[1])
        assert alone or size == 2
        consumers = [i for i in range(len(lists)) if members >> i & 1]
        attended.update(consumers)
        for block in set(blocks):
            pairs.update((i, block) for i in consumers)
            if members != chose[block]:
                assert len(consumers) == 1, "only what has no partner goes to its lists one by one"
                split.add(block)
    assert pairs == Counter((i, block) for i, row in enumerate(lists) for block in row)
    assert attended == Counter({i: ceil_div(len(row), size) for i, row in enumerate(lists) if row})
    sets = Counter(chose[block] for block in split)
    assert all(count == 1 for count in sets.values()) and (size == 2 or not split)
    check_rounds([(first >> BLOCK_BITS & 15, bool(first & TURN)) for first, _ in stages], len(lists))


def check_rounds(stages, consumers):
    """Marked stages come in rounds, of which each consumer is a member of one."""
    everyone, taken = (1 << consumers) - 1, 0
    for members, marked in stages:
        assert members & taken == 0 and (marked or taken == 0)
        if marked:
            taken = (taken | members) % everyone
    assert taken == 0 and (consumers == 3 or not any(marked for _, marked in stages))


def check_thin(stages, lists, thin, rows, size, cube, num_blocks):
    """The last stages of one task, of rows of cubes that the same lists have. Which rows these are."""
    taken, used = [[] for _ in range(2 ** len(lists))], []  # cubes by set of lists
    for first, second in stages:
        index, members = second % THIN, first >> BLOCK_BITS & 15
        assert first & ~PARTIAL == members << BLOCK_BITS and second & ~PARTIAL == index | THIN
        assert first & PARTIAL == second & PARTIAL
        for row in rows[index : index + size].tolist():
            valid = [row[ROW + j // 2] >> 16 * (j % 2) & 0xFFFF for j in range(ROW)]
            taken[members] += zip(row[:ROW], valid, strict=True)
            assert first & PARTIAL or valid == [0xFFFF] * ROW
        used += range(index, index + size)
    quarter = min(i for i in range(3) if cube[i] >= 4)
    for members, cubes in enumerate(taken):
        chose = [
            x for x in thin if members and sum(1 << i for i, row in enumerate(lists) if x in row) == members
        ]
        expected = [(block | thin[block][0] << BLOCK_BITS, thin[block][1]) for block in chose]
        nothing = [(num_blocks | quarter << BLOCK_BITS, 0)] * (-len(chose) % (size * ROW))
        assert sorted(cubes[: len(chose)]) == sorted(expected) and cubes[len(chose) :] == nothing
        if not nothing and all(valid == 0xFFFF for _, valid in expected):
            assert not any(x & PARTIAL for x, _ in stages if x >> BLOCK_BITS & 15 == members)
    return used


@over_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_schedule_keeps_its_promises(kernel, head_dim, kind, make, seed):
    index = KINDS.index(kind)
    grid = CubeGrid(GRIDS[index % len(GRIDS)])
    problem = new_problem(kernel, head_dim, kind, 100 * seed + index, grid, ragged=index % 2 == 0)
    check(problem, *problem.made(make))


@over_kernels
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_thin_cubes_stand_apart(kernel, head_dim, kind, ragged, make, seed):
    index = KINDS.index(kind)
    grid = CubeGrid(GRIDS[index % len(GRIDS)])
    problem = new_problem(
        kernel, head_dim, kind, 100 * seed + index, grid, heads=2, ragged=ragged, video=THIN_LISTED
    )
    check(problem, *problem.made(make))


@over_kernels
@pytest.mark.parametrize(
    ("video_shape", "cube", "thin"),
    [
        ((8, 8, 9), (4, 4, 4), 4), ((1, 9, 12), (4, 4, 4), 9), ((5, 5, 5), (4, 4, 4), 7),
        ((18, 6, 6), (16, 2, 2), 9), ((3, 3, 3), (2, 2, 16), 4), ((3, 3, 21), (2, 2, 16), 0),
        ((1, 1, 70), (1, 1, 64), 1), ((2, 1, 144), (1, 1, 64), 2), ((6, 6, 6), (4, 4, 4), 0),
    ],
)  # fmt: skip
def test_which_cubes_are_thin(kernel, head_dim, video_shape, cube, thin, make):
    listed_grid = CubeGrid(video_shape, cube)
    rows = [list(range(listed_grid.num_cubes))] * 3
    problem = Problem(kernel, head_dim, CubeGrid((12, 1, 1)), listed_grid, [[rows]])
    assert len(problem.thin()) == (0 if kernel == "fine_backward_fused" else thin)
    check(problem, *problem.made(make))


@over_kernels
@pytest.mark.parametrize("trial", range(4))
def test_random_schedules(kernel, head_dim, trial, make, seed):
    """Several heads; lists of one head for all of them; room for more entries than there are."""
    g = torch.Generator().manual_seed(100 * seed + trial)
    shape = tuple(int(torch.randint(1, limit, (), generator=g)) for limit in (24, 10, 10))
    problem = new_problem(
        kernel, head_dim, KINDS[trial % 3], 100 * seed + 50 + trial, CubeGrid(shape), batch=2, heads=2,
        ragged=trial == 0, one_head=trial == 1, wide=70 * (trial == 2), sms=1 + 5 * trial,
    )  # fmt: skip
    check(problem, *problem.made(make))


@pytest.mark.parametrize(("head_dim", "sms"), [(64, 8), (64, 15), (64, 100), (128, 7), (128, 12), (128, 11)])
def test_the_last_groups_are_a_task_a_block(head_dim, sms, make, seed):
    """7 blocks in each of 3 heads: 3 or 4 groups, of which a head's last one has a single block."""
    problem = new_problem(
        "fine_forward", head_dim, "overlap", seed, CubeGrid((26, 1, 1)), heads=3, ragged=True, sms=sms
    )
    blocks = [len(blocks) for _, blocks, _ in problem.tasks()]
    expected = {
        (64, 8): [3, 3, 1, 3, 3, 1, 3, 3, 1, 0, 0], (64, 15): [3, 3, 1] * 3,
        (64, 100): ([1] * 7 + [0, 0]) * 3, (128, 7): [2, 2, 2, 1] * 3, (128, 12): [2, 2, 2, 1] * 3,
        (128, 11): [2, 2, 2, 1] * 2 + [2, 2, 2, 1, 0],
    }  # fmt: skip
    assert blocks == expected[head_dim, sms]
    check(problem, *problem.made(make))


def stages_of_one_task(problem, make):
    """(members, the two blocks, whether of a round) of each stage of a problem that is one task."""
    stages, counts, _, (places,) = problem.made(make)
    words = (stages[place].tolist() for place in places[: counts[0]])
    return [
        (first >> BLOCK_BITS & 15, [x % (1 << BLOCK_BITS) for x in (first, second)], bool(first & TURN))
        for first, second in words
    ]


@over_kernels
def test_order_of_stages(kernel, head_dim, make):
    """What several chose ascends; what they chose alone comes in turns."""
    consumers, size = KERNELS[kernel, head_dim]
    blocks = 64
    shared = [list(range(blocks))] * consumers
    alone = [list(range(i, consumers * blocks, consumers)) for i in range(consumers)]
    for rows in (shared, alone):
        grid, listed_grid = CubeGrid((4 * consumers, 1, 1)), CubeGrid.linear(64 * consumers * blocks)
        problem = Problem(kernel, head_dim, grid, listed_grid, [[rows]])
        made = stages_of_one_task(problem, make)
        members, firsts = [of for of, _, _ in made], [pair[0] for _, pair, _ in made]
        assert all(turn == (rows is alone and consumers == 3) for _, _, turn in made)
        if rows is shared:
            assert firsts == list(range(0, blocks, size))
        else:
            assert members == [1 << i % consumers for i in range(consumers * blocks // size)]
            for i in range(consumers):
                assert firsts[i::consumers] == alone[i][::size]


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (
            {3: 4, 5: 2, 7: 1, 1: 9, 2: 11, 4: 13},
            [((3, 4), 4), ((5, 2), 2), (7, 1), ((1, 2, 4), 9)],
        ),
        (
            {3: 3, 5: 4, 6: 1, 1: 8, 2: 2, 4: 2},
            [((3, 4), 2), (3, 1), ((5, 2), 2), (5, 2), ((6, 1), 1), (1, 7)],
        ),
        ({6: 5, 1: 3, 2: 1, 4: 2}, [((6, 1), 3), (6, 2), (2, 1), (4, 2)]),
        ({1: 4, 2: 3, 4: 6}, [((1, 2, 4), 3), (1, 1), (4, 3)]),
    ],
)
def test_what_two_of_three_chose_stands_beside_what_the_third_chose(stages, expected, make, seed):
    """Stages by set of consumers, at most 32 blocks a list; those of a set ascend. Expected: a round, or the
    consumers of a stage that is of none, and how often."""
    labels = torch.tensor([members for members, count in stages.items() for _ in range(2 * count)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))].tolist()
    rows = [[block for block, members in enumerate(labels) if members >> i & 1] for i in range(3)]
    problem = Problem("fine_forward", 64, CubeGrid((12, 1, 1)), CubeGrid.linear(64 * len(labels)), [[rows]])
    made = stages_of_one_task(problem, make)
    expected = [
        (members, isinstance(group, tuple))
        for group, count in expected
        for members in count * (group if isinstance(group, tuple) else (group,))
    ]
    assert [(members, turn) for members, _, turn in made] == expected
    for members in stages:
        blocks = [block for of, pair, _ in made for block in pair if of == members]
        assert blocks == [block for block, label in enumerate(labels) if label == members]


@over_kernels
@pytest.mark.parametrize("blocks", [1 << 14, (1 << 14) + 1])
def test_the_most_blocks_that_have_marks_and_more(kernel, head_dim, blocks, make, seed):
    """Lists that begin, overlap and end anywhere, the last block in some."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randperm(blocks, generator=g)[:60].tolist()
    rows = []
    for i in range(6):
        own = torch.randint(blocks, (10 * i,), generator=g).tolist()
        rows.append(sorted({*common[i : i + 40], *own, *[blocks - 1] * (i % 2)}))
    problem = Problem(kernel, head_dim, CubeGrid((24, 1, 1)), CubeGrid.linear(64 * blocks), [[rows]])
    check(problem, *problem.made(make))


@pytest.mark.parametrize(("blocks", "marked"), [(1, 1), (32, 1), (33, 2), (1 << 14, 512), ((1 << 14) + 1, 0)])
def test_marks_of_a_plan(blocks, marked):
    listed = _extension.load().CubeGrid(video_shape=(1, 1, 64 * blocks), cube=(1, 1, 64))
    plan = _extension.load().plan_schedule(schedule_arguments(head_dim=64, listed_grid=listed))
    assert plan.shared_bytes == 4 * 3 * 4 * marked <= 28 * 1024  # eight CTAs of an SM


@over_kernels
def test_stages_name_blocks_that_exist(kernel, head_dim, make, seed):
    """Whatever the lists say: kernels read memory there."""
    problem = new_problem(kernel, head_dim, "random", seed, CubeGrid(GRIDS[0]), ragged=True)
    lists, compressed = problem.arguments()
    entries = lists[1] if compressed[1] is None else compressed[1]
    wrong = torch.rand(entries.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
    limits = torch.iinfo(torch.int32)
    for value in (limits.min, -1, problem.listed_grid.num_cubes, limits.max):
        entries[wrong] = value
        stages, counts, _, places = problem.made(make, lists, compressed)
        partial = problem.partial()
        for count, at in zip(counts.tolist(), places, strict=False):
            for word in stages[list(at[:count])].flatten().tolist():
                block = word % (1 << BLOCK_BITS)
                assert block < len(partial)
                assert bool(word % 2**32 & PARTIAL) == (partial[block] or bool(word & PADDED))


@pytest.mark.simulator
@pytest.mark.parametrize("schedule", range(20))
@over_kernels
def test_every_schedule_of_the_simulator_makes_the_same(kernel, head_dim, schedule, seed):
    made = adversarial(kernel, head_dim, seed, 1000 * seed + schedule)
    for x, first in zip(made, adversarial(kernel, head_dim, seed, 1000 * seed), strict=True):
        assert torch.equal(x, first)


@functools.cache
def adversarial(kernel, head_dim, seed, schedule):
    problem = new_problem(kernel, head_dim, "overlap", seed, CubeGrid((21, 3, 3)), heads=2, video=THIN_LISTED)
    made = problem.made(functools.partial(simulate_schedule, seed=schedule))
    check(problem, *made)
    stages, counts, rows, _ = made
    return stages, counts[: len(list(problem.tasks()))], rows  # tasks may come in any order


# Host plans.


def schedule_arguments(kernel="fine_forward", head_dim=128, like="lists", **changes):
    """Lists ("lists") or compressed rows of 12 blocks that name 80, for 3 heads and a batch of 2."""
    C = _extension.load()
    nothing = C.StridedTensor(address=0, strides=[])
    arguments = dict.fromkeys(
        ("block_sizes", "max_blocks", "offsets", "compressed_entries", "entries_per_head"), 0
    )
    arguments |= {"kernel": kernel, "batch": 2, "heads": 3, "head_dim": head_dim, "counts": nothing}
    arguments["num_sms"] = 1
    arguments |= {"entries": nothing, "grid": C.CubeGrid(video_shape=(9, 7, 6), cube=(4, 4, 4))}
    arguments["listed_grid"] = C.CubeGrid(video_shape=(1, 1, 64 * 80), cube=(1, 1, 64))
    if like == "lists":
        arguments["counts"] = C.StridedTensor(address=BASE, strides=[36, 12, 1])
        arguments["entries"] = C.StridedTensor(address=BASE, strides=[36 * 33, 12 * 33, 33, 1])
        arguments["max_blocks"] = 33
    else:
        arguments |= {"offsets": BASE, "compressed_entries": BASE, "entries_per_head": 101}
    memory = {name: changes.pop(name, BASE) for name in ("stages", "stage_counts", "thin")}
    arguments = C.ScheduleArguments(**(arguments | changes))
    for name, address in memory.items():
        setattr(arguments, name, address)
    return arguments


@over_kernels
@pytest.mark.parametrize("like", ["lists", "compressed"])
def test_schedule_plans(kernel, head_dim, like):
    """12 blocks of each of 6 heads."""
    consumers, size = KERNELS[kernel, head_dim]
    arguments = schedule_arguments(kernel, head_dim, like)
    assert arguments.num_tasks == 12 // consumers * 6
    if like == "lists":
        assert arguments.num_stages == arguments.num_tasks * consumers * ceil_div(33, size)
    else:
        assert arguments.num_stages == 6 * (1 + (101 if size == 1 else (101 + 12) // 2 + 2 * 12))
    if like == "compressed" and consumers == 3:
        with pytest.raises(ValueError, match="q_offsets: got compressed lists for 3 consumers, expected 2"):
            _extension.load().plan_schedule(arguments)
        return
    plan = _extension.load().plan_schedule(arguments)
    assert plan.kernel == f"schedule_{'pairs' if size == 2 else 'singles'}_of_{consumers}"
    assert plan.kernel in _extension.load().kernel_names()
    assert plan.grid == (ceil_div(arguments.num_tasks, 4), 1, 1) and plan.block == (4 * 32, 1, 1)
    assert not plan.maps and plan.shared_bytes == 4 * consumers * 12  # 80 bits a list in each of 4 warps


def test_schedule_plan_of_a_tail_group():
    grid = _extension.load().CubeGrid(video_shape=(5, 4, 4 * 7), cube=(4, 4, 4))  # 14 cubes
    assert schedule_arguments(head_dim=64, grid=grid).num_tasks == 5 * 6


def test_thin_cubes_are_like_others_where_a_stage_cannot_name_their_rows():
    """2^29 rows."""
    listed = _extension.load().CubeGrid(video_shape=(1, 1, 64 * 80 + 1), cube=(1, 1, 64))
    rows = 3 * (1 // 4 + 2)  # of a task: three sets of lists, one thin cube
    arguments = schedule_arguments(listed_grid=listed)
    assert arguments.num_thin == arguments.num_tasks * rows
    for batch in ((1 << 29) // (18 * rows), (1 << 29) // (18 * rows) + 1):
        arguments = schedule_arguments(listed_grid=listed, batch=batch)
        assert arguments.num_tasks == 18 * batch
        assert arguments.num_thin == (18 * batch * rows if 18 * batch * rows < 1 << 29 else 0)


def strided(address=BASE, strides=(36, 12, 1)):
    return _extension.load().StridedTensor(address=address, strides=list(strides))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": BASE, "compressed_entries": BASE}, "kv_indices, q_offsets: got both or neither"),
        ({"offsets": BASE}, "kv_indices, q_offsets: got both or neither"),
        ({"entries": (0, ())}, "kv_indices, q_offsets: got both or neither"),
        ({"compressed_entries": BASE}, "q_offsets, q_indices: got one of the two, expected both"),
        ({"like": "compressed", "compressed_entries": 0}, "q_offsets, q_indices: got one of the two"),
        (
            {"like": "compressed", "entries_per_head": 1 << 31},
            "q_indices: got 2147483648 entries a head, expected at most 2\\^31 - 1",
        ),
        ({"stages": 0}, "stages, counts: got a null pointer"),
        ({"stage_counts": 0}, "stages, counts: got a null pointer"),
        ({"thin": 0, "listed_grid": (1, 1, 64 * 80 + 1)}, "thin: got a null pointer, expected device memory"),
        ({"num_sms": 0}, "num_sms: got 0, expected at least 1"),
        ({"kernel": "fine_backward"}, "got fine_backward, expected fine_forward, fine_backward_kv, f"),
        ({"counts": (0, ())}, "kv_num_blocks: got no tensor of 3 dimensions"),
        ({"counts": (BASE, (12, 1))}, "kv_num_blocks: got no tensor of 3 dimensions"),
        ({"entries": (BASE, (12, 1, 1))}, "kv_indices: got no tensor of 4 dimensions with the last one cont"),
        ({"entries": (BASE, (99, 9, 9, 2))}, "kv_indices: got no tensor of 4 dimensions with the last one"),
        ({"batch": 1 << 29}, "schedule: got a problem of .* expected 1 to 2\\^31 - 1"),
    ],
)
def test_schedule_plan_errors(changes, message):
    if "listed_grid" in changes:
        grid = _extension.load().CubeGrid(video_shape=changes["listed_grid"], cube=(1, 1, 64))
        changes = changes | {"listed_grid": grid}
    changes = {name: strided(*x) if isinstance(x, tuple) else x for name, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        _extension.load().plan_schedule(schedule_arguments(**changes))


def test_schedule_of_all_blocks_needs_no_plan():
    like = torch.empty(1, 1, 1, 64)
    _, made = _kernels._schedule("fine_forward", like, None, None, None)
    assert made == ()
