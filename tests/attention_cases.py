"""Random inputs of the fine stage for the tests of its kernels: tensors, block lists, and what to expect."""

import functools
from dataclasses import dataclass, field

import torch

from vsa_cuda import reference
from vsa_cuda.geometry import CubeGrid


@dataclass
class Case:
    """One shape. `lists` is "random", "dense", "empty" (some rows without blocks), "disjoint" or "one"."""

    q_shape: tuple
    cube: tuple = (4, 4, 4)
    kv_shape: tuple | None = None
    kv_cube: tuple | None = None
    batch: int = 1
    heads: int = 1
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    layout: str = "bshd"
    topk: int = 2
    lists: str = "random"
    ragged: bool = False
    scale: float | None = None
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)
        self.kv_shape = self.kv_shape or self.q_shape
        self.kv_cube = self.kv_cube or self.cube
        self.scale = self.head_dim**-0.5 if self.scale is None else self.scale
        self.q_grid = CubeGrid(self.q_shape, self.cube)
        self.kv_grid = CubeGrid(self.kv_shape, self.kv_cube)
        self.q_block_sizes = self._sizes(self.q_grid) if self.ragged else None
        self.block_sizes = self._sizes(self.kv_grid) if self.ragged else None
        self.query = self._tokens(self.q_grid, self.q_block_sizes)
        self.key, self.value = (self._tokens(self.kv_grid, self.block_sizes) for _ in range(2))
        self.kv_num_blocks, self.kv_indices = self._lists()

    def __str__(self):
        shapes = "x".join(map(str, self.q_shape)) + (
            "" if self.kv_shape == self.q_shape else f"-{self.kv_shape}"
        )
        kind = "ragged " if self.ragged else ""
        sizes = f"B{self.batch} H{self.heads} D{self.head_dim}"
        return f"{shapes} cube {self.cube} {sizes} {self.dtype} {kind}{self.lists}"

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def _tokens(self, grid, sizes):
        shape = (self.batch, grid.num_tokens, self.heads, self.head_dim)
        x = self.randn(*shape).to(self.dtype)
        if sizes is not None:
            x[:, ~self._real(grid, sizes)] = float("nan")
        if self.layout == "bhsd":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "packed":
            return torch.cat([torch.full_like(x, float("nan")), x, x], dim=-1)[
                ..., self.head_dim : 2 * self.head_dim
            ]
        return x

    @staticmethod
    def _real(grid, sizes):
        """bool [S]: tokens inside the valid prefix of their block."""
        return (torch.arange(64) < sizes[:, None])[grid.cube_of_token(), grid.slot_of_token() % 64]

    def _sizes(self, grid):
        sizes = torch.randint(0, 65, (grid.num_cubes,), generator=self.generator, dtype=torch.int32)
        return sizes

    def _lists(self):
        rows, blocks = (self.batch, self.heads, self.q_grid.num_cubes), self.kv_grid.num_cubes
        topk = blocks if self.lists == "dense" else min(self.topk, blocks)
        order = torch.rand(*rows, blocks, generator=self.generator).argsort(dim=-1)
        if self.lists == "disjoint":
            order = (torch.arange(rows[2])[:, None] * topk + torch.arange(blocks)) % blocks
            order = order.expand(*rows, blocks)
        if self.lists == "one":
            order = torch.arange(blocks).expand(*rows, blocks)
        indices = order[..., :topk].sort(dim=-1).values.to(torch.int32)
        counts = torch.full(rows, topk, dtype=torch.int32)
        if self.lists == "empty":
            counts = torch.randint(0, topk + 1, rows, generator=self.generator, dtype=torch.int32)
        return counts, indices

    @property
    def fine_arguments(self):
        """Arguments of the op fine_forward, without gates."""
        return (
            self.query, self.key, self.value, self.kv_num_blocks, self.kv_indices, self.block_sizes,
            self.q_block_sizes, None, None, None, 1.0, 0.0, self.q_shape, self.kv_shape, self.cube,
            self.kv_cube, self.scale, True,
        )  # fmt: skip

    def reference(self):
        """out, lse of the reference in float64."""
        return reference.fine_forward(
            self.query.double(), self.key.double(), self.value.double(), self.kv_num_blocks, self.kv_indices,
            self.q_grid, self.kv_grid, self.scale, self.block_sizes, self.q_block_sizes,
        )  # fmt: skip


def random_case(trial, seed):
    """Any shape, cube, dtype, layout and kind of lists, query and key grids unlike."""
    g = torch.Generator().manual_seed(1000 * seed + trial)
    cubes = [(4, 4, 4), (1, 8, 8), (2, 4, 8), (8, 8, 1), (1, 1, 64), (64, 1, 1)]

    def pick(*choices):
        return choices[torch.randint(len(choices), (), generator=g)]

    def shape():
        return tuple(int(torch.randint(1, limit, (), generator=g)) for limit in (7, 11, 13))

    return Case(
        shape(), pick(*cubes), shape(), pick(*cubes), batch=pick(1, 2), heads=pick(1, 2),
        head_dim=pick(64, 128), dtype=pick(torch.bfloat16, torch.float16),
        layout=pick("bshd", "bhsd", "packed"), topk=pick(1, 2, 4),
        lists=pick("random", "dense", "empty", "disjoint"), seed=1000 * seed + trial,
    )  # fmt: skip


LINEAR = (1, 1, 64)
EDGE_CASES = [
    Case((1, 1, 1), head_dim=128),
    Case((4, 4, 4), head_dim=64, dtype=torch.float16),
    Case((5, 6, 7), head_dim=128, heads=2, topk=3),
    Case((5, 6, 7), head_dim=64, batch=2, topk=2, layout="bhsd", dtype=torch.float16),
    Case((3, 9, 17), cube=(1, 8, 8), head_dim=64, topk=4, layout="packed"),
    Case((9, 5, 6), cube=(16, 2, 2), head_dim=128, topk=2, lists="empty"),
    Case((2, 4, 70), cube=(2, 1, 32), head_dim=64, lists="dense"),
    Case((8, 8, 8), head_dim=128, lists="dense", dtype=torch.float16),
    Case((8, 8, 12), head_dim=128, topk=2, lists="disjoint"),
    Case((8, 8, 12), head_dim=64, topk=3, lists="one", batch=2, heads=2),
    Case((1, 1, 200), cube=LINEAR, kv_shape=(1, 1, 330), kv_cube=LINEAR, head_dim=128, topk=3),
    Case((1, 1, 256), cube=LINEAR, head_dim=64, ragged=True, topk=3),
    Case((1, 1, 256), cube=LINEAR, head_dim=128, ragged=True, lists="empty", topk=4, layout="packed"),
    Case((4, 6, 8), cube=(4, 4, 4), kv_shape=(3, 5, 11), kv_cube=(1, 8, 8), head_dim=64, topk=3),
    Case((4, 8, 8), head_dim=128, topk=2, scale=0.9),
    Case((4, 4, 28), head_dim=64, topk=1),
    Case((4, 4, 28), head_dim=128, topk=7),
    # Thin cubes (cube_grid.h): 18 of 24; in short lists; along one side; of another cube.
    Case((5, 9, 13), head_dim=128, heads=2, lists="dense"),
    Case((5, 9, 13), head_dim=64, heads=2, topk=9, layout="packed", dtype=torch.float16),
    Case((9, 10, 12), head_dim=128, topk=7, batch=2, layout="bhsd"),
    Case((4, 8, 4), kv_shape=(17, 4, 8), kv_cube=(16, 2, 2), head_dim=64, lists="dense"),
]


def linear(queries, keys, **options):
    """Makes a case of so many tokens in blocks of 64, where every block has every block."""
    shapes = (1, 1, queries), LINEAR, (1, 1, keys), LINEAR
    return functools.partial(Case, *shapes, lists="dense", **options)


# For kernels whose CTAs work in pairs where every block has every block, 128 queries a
# task and 128 keys a stage: what makes a case, given a head_dim, and multiprocessors.
PAIRS = {
    "one pair": (linear(4 * 64, 3 * 64), 3),
    "the last task of one block, and its partner of none": (linear(5 * 64 - 7, 9 * 64 - 3, heads=2), 8),
    "the last partner's block would lie two further": (linear(6 * 64, 4 * 64, heads=2, layout="packed"), 8),
    "a few keys": (linear(4 * 64, 10, batch=2, layout="bhsd"), 4),
    "partners of none before and after others": (linear(13 * 64 - 1, 4 * 64 - 5, heads=3), 4),
    "more multiprocessors than pairs": (linear(9 * 64, 2 * 64), 9),
    "an odd number of multiprocessors": (linear(8 * 64, 5 * 64, heads=2), 5),
    "cubes of a video, some of them thin": (
        functools.partial(Case, (5, 9, 10), heads=2, lists="dense", layout="packed"), 24
    ),
}  # fmt: skip
