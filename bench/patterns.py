"""Block lists and inputs: random, dense, or from a real clip by the demo's random projections."""

from dataclasses import dataclass
from pathlib import Path

import torch

from bench import flops
from bench.shapes import Shape, UsageError
from vsa_cuda import reference
from vsa_cuda.geometry import CubeGrid

PATTERNS = ("random", "video", "dense")


@dataclass
class Problem:
    """Inputs of one case. Tensors are [B, S, H, D] in raster order; the lists as in the public API."""

    shape: Shape
    pattern: str
    seed: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad_out: torch.Tensor
    kv_num_blocks: torch.Tensor | None = None
    kv_indices: torch.Tensor | None = None
    gate_fine: torch.Tensor | float | None = 1.0
    gate_coarse: torch.Tensor | float | None = 0.0

    @property
    def grid(self) -> CubeGrid:
        return self.shape.grid

    @property
    def topk(self) -> int:
        return self.grid.num_cubes if self.pattern == "dense" else self.shape.resolved_topk

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5

    @property
    def pairs(self) -> int:
        return flops.executed_pairs(self.kv_num_blocks)


class VideoSource:
    """Tokens of the demo's clip, decoded here or read from a file made by `python -m bench tokens`."""

    def __init__(self, tokens_file: Path | None = None, clip: str | None = None):
        self.tokens_file, self.clip = tokens_file, clip

    def tokens(self, video_shape: tuple[int, int, int]) -> torch.Tensor:
        """float32 [T, H, W, channels] on the CPU: the leading part when the file holds a larger grid."""
        if self.tokens_file is not None:
            tokens = torch.load(self.tokens_file, weights_only=True)
            if any(have < want for have, want in zip(tokens.shape, video_shape, strict=False)):
                raise UsageError(
                    f"--video-tokens: got a grid of {tuple(tokens.shape[:3])}, expected at least "
                    f"{video_shape}; make it with python -m bench tokens --grid"
                )
            t, h, w = video_shape
            return tokens[:t, :h, :w].float()
        return clip_tokens(video_shape, self.clip)


def clip_tokens(video_shape: tuple[int, int, int], clip: str | None = None) -> torch.Tensor:
    """float32 [T, H, W, channels] of a clip (None: the demo's own), see vsa_cuda.demo.features."""
    from vsa_cuda.demo.features import frames_to_tokens
    from vsa_cuda.demo.video import FRAMES_PER_LATENT, TOKEN_PIXELS, find_clip, read_frames

    latents, rows, columns = video_shape
    num_frames = 1 + FRAMES_PER_LATENT * (latents - 1)
    frames = read_frames(find_clip(clip), num_frames, (columns * TOKEN_PIXELS, rows * TOKEN_PIXELS))
    if len(frames) < num_frames:
        raise UsageError(
            f"pattern video: the clip has {len(frames)} frames, {video_shape} needs {num_frames}"
        )
    return frames_to_tokens(frames)


def make_problem(
    shape: Shape,
    pattern: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    video: VideoSource | None = None,
    with_lists: bool = True,
) -> Problem:
    """Inputs and lists. Random inputs are standard normal; video ones are projections of the clip's tokens.

    The lists of a video come from the reference on pooled q and k, not from the kernels under test.
    """
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.batch, shape.num_tokens, shape.heads, shape.head_dim)

    def normal():
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    if pattern == "video":
        query, key, value = _video_inputs(shape, seed, dtype, device, video or VideoSource())
    else:
        query, key, value = normal(), normal(), normal()
    problem = Problem(shape, pattern, seed, query, key, value, normal())
    if with_lists:
        problem.kv_num_blocks, problem.kv_indices = _lists(problem, generator)
    return problem


def _video_inputs(shape: Shape, seed, dtype, device, video: VideoSource):
    from vsa_cuda.demo.features import project

    if shape.video_shape is None or shape.batch != 1:
        raise UsageError(f"pattern video: got shape {shape}, expected a video grid and batch 1")
    tokens = video.tokens(shape.video_shape).to(device)
    projected = project(tokens, shape.heads, shape.head_dim, dtype, seed)
    return projected.query, projected.key, projected.value


def _lists(problem: Problem, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    shape, blocks = problem.shape, problem.grid.num_cubes
    device = problem.query.device
    rows = (shape.batch, shape.heads, blocks)
    if problem.pattern == "dense":
        indices = torch.arange(blocks, dtype=torch.int32, device=device).expand(*rows, blocks).contiguous()
    elif problem.pattern == "random":
        indices = torch.empty(*rows, problem.topk, dtype=torch.int32, device=device)
        for batch in range(shape.batch):
            for head in range(shape.heads):
                draw = torch.rand(blocks, blocks, generator=generator, device=device)
                indices[batch, head] = draw.topk(problem.topk, dim=-1).indices.sort(dim=-1).values
    else:
        pooled = [reference.pool(x, problem.grid) for x in (problem.query, problem.key)]
        *_, indices = reference.coarse_forward(*pooled, pooled[0], problem.topk, problem.scale, False)
    return torch.full(rows, problem.topk, dtype=torch.int32, device=device), indices


def loads_per_pair(
    grid: CubeGrid, kv_num_blocks: torch.Tensor, kv_indices: torch.Tensor, group: int, by_key: bool = False
) -> float:
    """Tiles loaded over pairs computed when `group` cubes that follow each other in time share their loads.

    by_key: groups of key cubes share the query cubes that chose them, as in the backward's key pass.
    """
    blocks, time = grid.num_cubes, grid.cubes_shape[0]
    order = torch.arange(blocks, device=kv_indices.device).view(time, -1).T.flatten()
    loads = pairs = 0
    for batch in range(kv_indices.shape[0]):
        for head in range(kv_indices.shape[1]):
            counts, indices = kv_num_blocks[batch, head], kv_indices[batch, head].long()
            listed = torch.arange(indices.shape[-1], device=indices.device) < counts[:, None]
            member = torch.zeros(blocks, blocks + 1, dtype=torch.bool, device=indices.device)
            member.scatter_(1, torch.where(listed, indices, blocks), True)
            member = member[:, :-1]
            member = (member.T if by_key else member)[order]
            missing = -blocks % group
            padded = torch.nn.functional.pad(member, (0, 0, 0, missing))
            loads += int(padded.view(-1, group, blocks).any(dim=1).sum())
            pairs += int(member.sum())
    return loads / max(pairs, 1)
