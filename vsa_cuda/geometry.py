"""Cubes of 64 tokens over a video's token grid: shapes, token <-> cube maps, validity masks.

Tokens are in raster order, W fastest: token (t, h, w) of a grid (T, H, W) is (t * H + h) * W + w.
Cubes are in raster order too, over the cube grid (ceil(T / ct), ceil(H / ch), ceil(W / cw)); those at the far
edges may be partial. Slot (dt * ch + dh) * cw + dw is a position in a cube; invalid where beyond the edge.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

CUBE_VOLUME = 64

Shape3 = tuple[int, int, int]
Device = torch.device | str | None


def _shape3(name: str, value: Sequence[int], example: str) -> Shape3:
    fix = f"pass {name}={example}, for instance"
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        got = f"{value!r} ({type(value).__name__})"
        raise TypeError(f"{name}: got {got}, expected a sequence of 3 ints; {fix}")
    for size in value:
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            raise TypeError(
                f"{name}: got {value!r} with an element of type {type(size).__name__}, expected 3 ints; {fix}"
            )
    if len(value) != 3:
        raise ValueError(f"{name}: got {len(value)} sizes {tuple(value)}, expected 3 (t, h, w); {fix}")
    for size in value:
        if size < 1:
            raise ValueError(f"{name}: got {tuple(value)}, expected every size to be at least 1; {fix}")
    return value[0], value[1], value[2]


def check_video_shape(video_shape: Sequence[int], name: str = "video_shape") -> Shape3:
    """Returns `video_shape` as a tuple (T, H, W), counted in tokens.

    Raises TypeError when it is not a sequence of ints and ValueError when it is not 3 sizes of at least 1.
    `name` is the argument's name in the message.
    """
    return _shape3(name, video_shape, "(21, 30, 52)")


def check_cube(cube: Sequence[int], name: str = "cube") -> Shape3:
    """Returns `cube` as a tuple (ct, ch, cw) of volume 64; raises TypeError or ValueError otherwise."""
    cube = _shape3(name, cube, "(4, 4, 4)")
    volume = cube[0] * cube[1] * cube[2]
    if volume != CUBE_VOLUME:
        raise ValueError(
            f"{name}: got {cube} of volume {volume}, expected a volume of {CUBE_VOLUME}; "
            f"pass {name}=(4, 4, 4), (2, 4, 8) or (1, 8, 8), for instance"
        )
    return cube


def cubes_shape(video_shape: Sequence[int], cube: Sequence[int]) -> Shape3:
    """Cubes along T, H and W. Pure arithmetic, nothing is checked: the sizes may be torch.SymInt."""
    t, h, w = ((size + side - 1) // side for size, side in zip(video_shape, cube, strict=True))
    return t, h, w


def num_cubes(video_shape: Sequence[int], cube: Sequence[int]) -> int:
    """Number of cubes. Pure arithmetic, nothing is checked: the sizes may be torch.SymInt."""
    t, h, w = cubes_shape(video_shape, cube)
    return t * h * w


def topk_from_sparsity(sparsity: float, video_shape: Sequence[int], cube: Sequence[int] = (4, 4, 4)) -> int:
    """Cubes that every query cube keeps: ceil(round((1 - sparsity) * cubes, 6)), at least 1.

    The rounding absorbs the binary error of decimal fractions: a sparsity of 0.7 leaves 3 of 10 cubes, not 4.

    Args:
        sparsity: fraction of the cubes left out, in [0, 1]. 0 keeps every cube (dense), 1 keeps one.
        video_shape: (T, H, W) in tokens.
        cube: (ct, ch, cw) in tokens, of volume 64.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TypeError(
            f"sparsity: got {sparsity!r} ({type(sparsity).__name__}), expected a float in [0, 1]; "
            "pass sparsity=0.9, for instance, or topk"
        )
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(
            f"sparsity: got {sparsity}, expected a fraction in [0, 1]; 0.9 leaves out 90 % of the cubes"
        )
    cubes = num_cubes(check_video_shape(video_shape), check_cube(cube))
    kept = math.ceil(round((1.0 - sparsity) * cubes, 6))
    return torch.sym_max(1, kept)


@dataclass(frozen=True)
class CubeGrid:
    """A video's token grid cut into cubes of 64 tokens. Immutable and hashable.

    Args:
        video_shape: (T, H, W) in tokens, every size at least 1.
        cube: (ct, ch, cw) in tokens, of volume 64.

    The maps are made on `device` (None: CPU) and may be shared between calls: do not write to them.

    Raises:
        TypeError, ValueError: see check_video_shape and check_cube.
    """

    video_shape: Shape3
    cube: Shape3 = (4, 4, 4)

    def __post_init__(self):
        object.__setattr__(self, "video_shape", check_video_shape(self.video_shape))
        object.__setattr__(self, "cube", check_cube(self.cube))

    @classmethod
    def linear(cls, num_tokens: int) -> "CubeGrid":
        """Blocks of 64 consecutive tokens: the grid (1, 1, num_tokens) with cube (1, 1, 64)."""
        return cls((1, 1, num_tokens), (1, 1, CUBE_VOLUME))

    @property
    def num_tokens(self) -> int:
        t, h, w = self.video_shape
        return t * h * w

    @property
    def cubes_shape(self) -> Shape3:
        """Cubes along T, H and W."""
        return cubes_shape(self.video_shape, self.cube)

    @property
    def num_cubes(self) -> int:
        return num_cubes(self.video_shape, self.cube)

    @property
    def num_partial_cubes(self) -> int:
        """Cubes that reach over an edge of the grid and hold fewer than 64 tokens."""
        t, h, w = (size // side for size, side in zip(self.video_shape, self.cube, strict=True))
        return self.num_cubes - t * h * w

    def __str__(self) -> str:
        def by(shape: Shape3) -> str:
            return "x".join(str(size) for size in shape)

        return (
            f"grid {by(self.video_shape)} ({self.num_tokens} tokens) in cubes of {by(self.cube)}: "
            f"{by(self.cubes_shape)} = {self.num_cubes} cubes, {self.num_partial_cubes} partial"
        )

    def cube_sizes(self, device: Device = None) -> torch.Tensor:
        """int32 [N]: real tokens of each cube, 1 to 64."""
        return self._map(_cube_sizes, device)

    def token_index(self, device: Device = None) -> torch.Tensor:
        """int64 [N, 64]: raster token of each slot; an invalid slot gives the nearest token of the grid."""
        return self._map(_token_index, device)

    def valid(self, device: Device = None) -> torch.Tensor:
        """bool [N, 64]: True where the slot holds a token of the grid."""
        return self._map(_valid, device)

    def cube_of_token(self, device: Device = None) -> torch.Tensor:
        """int64 [S]: cube of each raster token."""
        return self._map(_cube_of_token, device)

    def slot_of_token(self, device: Device = None) -> torch.Tensor:
        """int64 [S]: cube * 64 + slot of each raster token, an index into a flattened [N, 64] tensor."""
        return self._map(_slot_of_token, device)

    def _map(
        self, compute: Callable[["CubeGrid", torch.device], torch.Tensor], device: Device
    ) -> torch.Tensor:
        """compute(self, device), from the cache where it is safe.

        A tensor cached on a GPU would belong to the stream, or to the CUDA graph capture, of its first use.
        Under a tensor mode (FakeTensorMode, ...) factories give subclasses, which must not outlive the mode.
        """
        device = torch.device("cpu" if device is None else device)
        if device.type != "cpu" or torch.compiler.is_compiling():
            return compute(self, device)
        if type(torch.empty(0, device=device)) is not torch.Tensor:
            return compute(self, device)
        return _cpu_map(self, compute)


@lru_cache(maxsize=32)
def _cpu_map(grid: CubeGrid, compute: Callable[[CubeGrid, torch.device], torch.Tensor]) -> torch.Tensor:
    # An inference tensor could not be saved for a later backward.
    with torch.inference_mode(False):
        return compute(grid, torch.device("cpu"))


def _cube_sizes(grid: CubeGrid, device: torch.device) -> torch.Tensor:
    sizes = []
    for size, side, count in zip(grid.video_shape, grid.cube, grid.cubes_shape, strict=True):
        first = torch.arange(count, device=device, dtype=torch.int32) * side
        sizes.append((size - first).clamp(max=side))
    t, h, w = sizes
    return (t[:, None, None] * h[:, None] * w).flatten()


def _token_index(grid: CubeGrid, device: torch.device) -> torch.Tensor:
    _, height, width = grid.video_shape
    t, h, w = (
        position.clamp(max=size - 1)
        for position, size in zip(_slot_positions(grid, device), grid.video_shape, strict=True)
    )
    return (t * height + h) * width + w


def _valid(grid: CubeGrid, device: torch.device) -> torch.Tensor:
    t, h, w = (
        position < size
        for position, size in zip(_slot_positions(grid, device), grid.video_shape, strict=True)
    )
    return t & h & w


def _cube_of_token(grid: CubeGrid, device: torch.device) -> torch.Tensor:
    return _slot_of_token(grid, device) // CUBE_VOLUME


def _slot_of_token(grid: CubeGrid, device: torch.device) -> torch.Tensor:
    _, height, width = grid.video_shape
    _, nh, nw = grid.cubes_shape
    ct, ch, cw = grid.cube
    token = torch.arange(grid.num_tokens, device=device)
    t, h, w = token // (height * width), token // width % height, token % width
    cube = ((t // ct) * nh + h // ch) * nw + w // cw
    return cube * CUBE_VOLUME + ((t % ct) * ch + h % ch) * cw + w % cw


def _slot_positions(grid: CubeGrid, device: torch.device) -> tuple[torch.Tensor, ...]:
    """int64 [N, 64] each: position along T, H and W of every slot, beyond the edge where invalid."""
    _, nh, nw = grid.cubes_shape
    _, ch, cw = grid.cube
    cube = torch.arange(grid.num_cubes, device=device)[:, None]
    slot = torch.arange(CUBE_VOLUME, device=device)
    cubes = (cube // (nh * nw), cube // nw % nh, cube % nw)
    slots = (slot // (ch * cw), slot // cw % ch, slot % cw)
    return tuple(c * side + s for c, side, s in zip(cubes, grid.cube, slots, strict=True))
