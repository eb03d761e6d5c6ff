"""Named problem shapes: where they come from, and their cube grids."""

from dataclasses import dataclass, replace

from vsa_cuda.geometry import CubeGrid, topk_from_sparsity

Shape3 = tuple[int, int, int]


class UsageError(ValueError):
    """Arguments that do not fit: reported as one message, without a traceback."""


@dataclass(frozen=True)
class Shape:
    """A self-attention problem. Without `video_shape` blocks are 64 consecutive of `tokens` tokens."""

    name: str
    heads: int
    head_dim: int
    video_shape: Shape3 | None = None
    tokens: int = 0
    batch: int = 1
    cube: Shape3 = (4, 4, 4)
    topk: int | None = None
    sparsity: float | None = None
    source: str = ""

    @property
    def grid(self) -> CubeGrid:
        if self.video_shape is None:
            return CubeGrid.linear(self.tokens)
        return CubeGrid(self.video_shape, self.cube)

    @property
    def num_tokens(self) -> int:
        return self.grid.num_tokens

    @property
    def resolved_topk(self) -> int:
        """Blocks of a list, at most all of them."""
        grid = self.grid
        if self.topk is not None:
            return min(self.topk, grid.num_cubes)
        return topk_from_sparsity(self.sparsity or 0.0, grid.video_shape, grid.cube)

    def keep(self, *, topk: int | None = None, sparsity: float | None = None) -> "Shape":
        """The same shape with another list length; both None changes nothing."""
        if topk is None and sparsity is None:
            return self
        return replace(self, topk=topk, sparsity=sparsity)

    def __str__(self) -> str:
        size = f"{self.num_tokens:,}" if self.video_shape is None else "x".join(map(str, self.video_shape))
        return f"B{self.batch} H{self.heads} D{self.head_dim} {size}"


# 87.5 % and head_dim 64 are the paper's; its head count is not stated, 16 is our choice.
_PAPER_FIGURE = {
    "heads": 16,
    "head_dim": 64,
    "sparsity": 0.875,
    "source": "VSA paper, figure 4b; heads assumed",
}
_SWEEP = {"heads": 24, "head_dim": 128, "topk": 64, "source": "length sweep"}
_LENGTHS = {"8k": 8, "16k": 16, "32k": 32, "65k": 64, "131k": 128}  # latent frames of 32 x 32 tokens

_SHAPES = [
    Shape("wan-1.3b-480p", 12, 128, (21, 30, 52), sparsity=0.9, source="Wan 2.1 1.3B, 81 frames 480x832"),
    Shape("wan-1.3b-448p", 12, 128, (16, 28, 52), topk=32, source="VSA paper, Wan 1.3B, 61 frames 448x832"),
    Shape("wan-14b-720p", 40, 128, (21, 45, 80), sparsity=0.9, source="Wan 2.1 14B, 81 frames 720x1280"),
    Shape("hunyuan-720p", 24, 128, (33, 45, 80), sparsity=0.9, source="HunyuanVideo, 129 frames 720x1280"),
    Shape("flashinfer-h7-109k", 7, 128, tokens=109_632, topk=64, source="FlashInfer pull request 5326"),
    Shape("floor-d128", 24, 128, (32, 32, 32), topk=64, source="the project's floors"),
    Shape("floor-d64", 24, 64, (32, 32, 32), topk=64, source="the project's floors"),
    Shape("video-h24", 24, 128, (21, 45, 80), topk=64, source="the project's floors, video lists"),
    Shape("million", 1, 128, (64, 128, 128), topk=64, source="one million tokens"),
    Shape("paper-410m", 16, 64, (16, 32, 32), topk=32, source="VSA paper, 410M model; widths assumed"),
    Shape("tiny", 2, 64, (5, 9, 10), topk=5, source="for --cpu"),
]
_SHAPES += [Shape(f"sweep-{name}", video_shape=(t, 32, 32), **_SWEEP) for name, t in _LENGTHS.items()]
_SHAPES += [
    Shape(f"paper-fig4-{name}", video_shape=(t, 32, 32), **_PAPER_FIGURE) for name, t in _LENGTHS.items()
]
SHAPES = {shape.name: shape for shape in _SHAPES}
GROUPS = {
    "sweep": [f"sweep-{name}" for name in _LENGTHS],
    "paper-fig4": [f"paper-fig4-{name}" for name in _LENGTHS],
    "wan": ["wan-1.3b-480p", "wan-14b-720p"],
}


def find_shapes(text: str, *, heads: int = 24, head_dim: int = 128, batch: int = 1) -> list[Shape]:
    """Shapes for a comma-separated list of names, groups, grids (21x45x80) or token counts (32768).

    heads, head_dim and batch are for grids and token counts. Raises UsageError for anything else.
    """
    shapes = []
    for word in text.split(","):
        if word in GROUPS:
            shapes += [SHAPES[name] for name in GROUPS[word]]
        elif word in SHAPES:
            shapes.append(SHAPES[word])
        else:
            shapes.append(_custom(word, heads, head_dim, batch))
    return shapes


def _custom(word: str, heads: int, head_dim: int, batch: int) -> Shape:
    sizes = word.split("x")
    if len(sizes) not in (1, 3) or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UsageError(
            f"shape: got {word!r}, expected a grid such as 21x45x80, a number of tokens, or one of "
            f"{', '.join([*SHAPES, *GROUPS])}"
        )
    if len(sizes) == 1:
        return Shape(word, heads, head_dim, tokens=int(word), batch=batch, sparsity=0.9)
    video_shape = (int(sizes[0]), int(sizes[1]), int(sizes[2]))
    return Shape(word, heads, head_dim, video_shape, batch=batch, sparsity=0.9)
