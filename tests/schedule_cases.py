"""Problems of the schedule kernels: lists, and the contract in schedule.h for what is made of them."""

import itertools
from dataclasses import dataclass
from operator import lt

import torch

from vsa_cuda import _kernels, reference
from vsa_cuda.geometry import CubeGrid, cubes_shape

BLOCK_BITS = 25
TURN = THIN = 1 << 29  # of a stage's first word, and of its second
PADDED, PARTIAL = 1 << 30, 1 << 31
ROW = 4  # thin cubes in the place of a block
UNLISTED = 2**31 - 1  # what fills lists behind their ends, and new integers as tests see them
KERNELS = {  # consumers of a CTA, blocks of a stage
    ("fine_forward", 64): (3, 2),
    ("fine_forward", 128): (2, 2),
    ("fine_backward_q", 64): (2, 2),
    ("fine_backward_q", 128): (2, 2),
    ("fine_backward_kv", 64): (2, 2),
    ("fine_backward_kv", 128): (2, 1),
    ("fine_backward_fused", 64): (2, 2),
}
COMPRESSED = ("fine_backward_kv", "fine_backward_fused")
LENGTHS = (0, 1, 31, 32, 33, 64, 65, 200)
KINDS = ("random", "lengths", "overlap", "same", "disjoint", "all", "none", "one")


def ceil_div(a, b):
    return -(-a // b)


def along_time(grid):
    """Cube numbers, time running fastest."""
    t, h, w = cubes_shape(grid.video_shape, grid.cube)
    return torch.arange(t * h * w).view(t, h * w).T.flatten().tolist()


@dataclass
class Problem:
    """What a schedule is made of; `rows` [batch][head][block] are the lists."""

    kernel: str
    head_dim: int
    grid: CubeGrid
    listed_grid: CubeGrid
    rows: list
    sizes: torch.Tensor | None = None
    wide: int = 0  # entries that no list needs
    one_head: bool = False  # whose lists all others share, by a stride of 0
    sms: int = 1

    @property
    def heads(self):
        return [head for entry in self.rows for head in entry]

    def lists(self, rows, wide=0):
        """kv_num_blocks, kv_indices; with strides of their own."""
        rows = [entry[:1] for entry in rows] if self.one_head else rows
        counts = [[[[len(x), -1] for x in head] for head in entry] for entry in rows]
        counts = torch.tensor(counts, dtype=torch.int32)[..., 0]
        longest = max(1, int(counts.max())) + wide
        indices = torch.full((*counts.shape, longest + 3), UNLISTED, dtype=torch.int32)[..., :longest]
        for b, entry in enumerate(rows):
            for h, head in enumerate(entry):
                for i, x in enumerate(head):
                    indices[b, h, i, : len(x)] = torch.tensor(x)
        heads = len(self.rows[0])
        return counts.expand(-1, heads, -1), indices.expand(-1, heads, -1, -1)

    def arguments(self):
        """Lists for the query side; for the key side what transpose_index makes of its lists."""
        if self.kernel not in COMPRESSED:
            return self.lists(self.rows, self.wide), (None, None)
        listed = self.listed_grid.num_cubes
        chosen = self.lists([[transposed(head, listed) for head in entry] for entry in self.rows], self.wide)
        return (None, None), reference.transpose_index(*chosen, self.grid.num_cubes)

    def made(self, make, lists=None, compressed=None):
        if lists is None:
            lists, compressed = self.arguments()
        like = torch.empty(len(self.rows), 1, len(self.rows[0]), self.head_dim, dtype=torch.bfloat16)
        grids = [_kernels._grid(grid.video_shape, grid.cube) for grid in (self.grid, self.listed_grid)]
        stages, counts, rows = make(self.sms, self.kernel, like, grids, self.sizes, lists, compressed)
        return stages, counts, rows, self.places(*lists, *compressed)

    def tasks(self):
        """The lists of each task's blocks, and the head and the blocks.

        The forward's last groups, fewer than multiprocessors, are a task a block where each gets one at most;
        a head's last group may have too few blocks for all of them.
        """
        consumers, _ = KERNELS[self.kernel, self.head_dim]
        order = along_time(self.grid)
        groups = [
            (number, order[first : first + consumers])
            for number in range(len(self.heads))
            for first in range(0, len(order), consumers)
        ]
        last = len(groups) % self.sms
        if self.kernel == "fine_forward" and 0 < last * consumers <= self.sms:
            for number, blocks in groups[-last:]:
                groups += [(number, blocks[i : i + 1]) for i in range(consumers)]
            del groups[-last * (consumers + 1) : -last * consumers]
        for number, blocks in groups:
            yield number, blocks, [self.heads[number][block] for block in blocks]

    def places(self, counts, indices, offsets, entries):
        """Where stages of each task may lie: in a stretch of its own, or along the rows of its lists."""
        consumers, size = KERNELS[self.kernel, self.head_dim]
        if offsets is None:
            length = consumers * ceil_div(indices.shape[3], size)
            if self.thin():
                length += consumers + 2**consumers - 1
            return [range(i * length, (i + 1) * length) for i, _ in enumerate(self.tasks())]
        rows, per_head = self.grid.num_cubes, entries.shape[2]
        per_head = 1 + (per_head if size == 1 else (per_head + rows) // 2 + 2 * rows)
        offsets = offsets.flatten(0, 1).tolist()

        def begin(head, row):
            return head * per_head + (
                offsets[head][row] if size == 1 else (offsets[head][row] + row) // 2 + 2 * row
            )

        places = []
        for head, blocks, lists in self.tasks():
            first, *second = ((begin(head, x), begin(head, x + 1)) for x in blocks)
            used = first[0] + ceil_div(len(lists[0]), size)
            assert used <= first[1]
            places.append(
                [*range(first[0], used if second else first[1]), *(x for y in second for x in range(*y))]
            )
        return places

    def thin(self):
        """Cubes with tokens in at most a quarter of a side: number -> (side, mask of their 16 slots).

        None of the fused pass's, nor where the cubes' sizes are given.
        """
        if self.kernel == "fine_backward_fused" or self.sizes is not None:
            return {}
        thin, grid = {}, self.listed_grid
        for number, at in enumerate(itertools.product(*map(range, cubes_shape(grid.video_shape, grid.cube)))):
            tokens = [
                min(side, extent - i * side)
                for side, extent, i in zip(grid.cube, grid.video_shape, at, strict=True)
            ]
            sides = [i for i in range(3) if 4 * tokens[i] <= grid.cube[i]]
            if sides:
                box = list(grid.cube)
                box[sides[0]] //= 4
                slots = [all(map(lt, slot, tokens)) for slot in itertools.product(*map(range, box))]
                thin[number] = sides[0], sum(real << i for i, real in enumerate(slots))
        return thin

    def partial(self):
        """Blocks with a slot that holds no token."""
        tokens = self.listed_grid.cube_sizes().tolist()
        sizes = [64] * len(tokens) if self.sizes is None else self.sizes.tolist()
        return [min(pair) < 64 for pair in zip(tokens, sizes, strict=True)]


def transposed(rows, listed):
    """For each listed block those whose list has it."""
    chosen = [[] for _ in range(listed)]
    for number, row in enumerate(rows):
        for block in row:
            chosen[block].append(number)
    return chosen


def random_rows(kind, grid, listed, g):
    """Ascending lists of one head, by block."""

    def number(limit):
        return int(torch.randint(limit, (), generator=g))

    def chosen(count, of=range(listed)):
        return sorted(of[i] for i in torch.randperm(len(of), generator=g)[:count].tolist())

    longest = min(listed, 200)
    order = along_time(grid)
    rows, same, shared = [[] for _ in order], chosen(longest), 0
    for position, block in enumerate(order):
        if kind == "random":
            rows[block] = chosen(number(longest + 1))
        elif kind == "lengths":
            rows[block] = chosen(LENGTHS[number(len(LENGTHS))])
        elif kind == "overlap":  # of six neighbours: from nothing to all
            if position % 6 == 0:
                same, shared = chosen(longest), number(longest + 1)
            common = same[:: max(1, longest // max(1, shared))][:shared]
            rest = sorted({*range(listed)} - {*common})
            rows[block] = sorted(common + chosen(longest - len(common), rest))
        elif kind == "same":
            rows[block] = same
        elif kind == "disjoint":
            rows[block] = chosen(longest, range(position % 3, listed, 3))
        elif kind == "all":
            rows[block] = list(range(listed))
    if kind == "one":
        rows[number(len(rows))] = same
    return rows


GRIDS = [(9, 5, 6), (3, 9, 8), (13, 4, 3), (5, 6, 13), (1, 1, 1)]  # 3, 1, 4, 2 and 1 cubes along time
LISTED = (14, 15, 58)  # 4 * 4 * 15 cubes, those at all far sides partial
THIN_LISTED = (13, 15, 57)  # as many; thin along time and width


def new_problem(
    kernel, head_dim, kind, seed, grid, batch=1, heads=1, ragged=False, one_head=False, wide=0, sms=1,
    video=LISTED,
):  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    listed_grid = CubeGrid(video)
    listed = listed_grid.num_cubes
    rows = [[random_rows(kind, grid, listed, g) for _ in range(heads)] for _ in range(batch)]
    if one_head:
        rows = [[entry[0]] * heads for entry in rows]
    sizes = None
    if ragged:
        sizes = torch.randint(60, 65, (listed,), generator=g, dtype=torch.int32)
        sizes[0] = 0
    return Problem(kernel, head_dim, grid, listed_grid, rows, sizes, wide, one_head, sms)
