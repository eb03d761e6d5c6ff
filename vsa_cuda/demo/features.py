"""Latent-like tokens of a video, and q, k, v from them by fixed random projections with 3-D RoPE.

No weights are trained here. The shapes follow Wan 2.1 (a causal video VAE of 4 x 8 x 8, then 2 x 2 patches):
a token covers 16 x 16 pixels of 4 frames. What a VAE learns is replaced by a cosine transform, and the
projections are random numbers from a seed. Query and key projections are correlated, so that a score tells
how alike two tokens look and how near they are: enough for cube lists that follow a real video's content.
"""

import math
import os
from typing import NamedTuple

import torch

from vsa_cuda import ops
from vsa_cuda.demo.video import FRAMES_PER_LATENT, TOKEN_PIXELS, read_frames
from vsa_cuda.geometry import CubeGrid

_BLOCK = 8  # pixels a side of one latent position, as in Wan's VAE
_FREQUENCIES = 2  # lowest cosine frequencies kept along each side
_QK_CORRELATION = 0.9
_ROPE_BASE = 10000.0
_CHANNELS = 3 * _FREQUENCIES**2
TOKEN_CHANNELS = _CHANNELS * (TOKEN_PIXELS // _BLOCK) ** 2


class Projected(NamedTuple):
    """Contiguous [1, S, heads, head_dim] each, tokens in raster order."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gate: torch.Tensor  # a projection of the same tokens, for gate_coarse


def frames_to_tokens(frames: torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """Latent-like tokens of a clip.

    Every 8 x 8 block of pixels, averaged over the latent's frames (frame 0 alone, then 4 at a time), keeps
    its 2 x 2 lowest cosine frequencies in Y, Cb, Cr: 12 channels, each brought to mean 0 and deviation 1
    over the clip, about what latents of a VAE have. A token is a patch of 2 x 2 of them.

    Args:
        frames: uint8 [1 + 4 n, height, width, 3] RGB, height and width multiples of 16.
        device: where to compute; default frames.device.

    Returns:
        float32 [1 + n, height / 16, width / 16, 48].
    """
    num_frames, height, width, _ = frames.shape
    if (num_frames - 1) % FRAMES_PER_LATENT or height % TOKEN_PIXELS or width % TOKEN_PIXELS:
        raise ValueError(
            f"frames: got {tuple(frames.shape)}, expected 1 + {FRAMES_PER_LATENT} n frames with sides that "
            f"are multiples of {TOKEN_PIXELS} pixels; cut the clip"
        )
    device = frames.device if device is None else device
    starts = [0, *range(1, num_frames, FRAMES_PER_LATENT)]
    stops = [*starts[1:], num_frames]
    latents = torch.stack([_latent(frames[a:b].to(device)) for a, b in zip(starts, stops, strict=True)])
    mean = latents.mean((0, 1, 2))
    deviation = latents.std((0, 1, 2), unbiased=False)
    latents = (latents - mean) / deviation.clamp_min(1e-6)
    patch = TOKEN_PIXELS // _BLOCK
    latents = latents.unflatten(1, (-1, patch)).unflatten(3, (-1, patch))  # [T, H, patch, W, patch, C]
    return latents.transpose(2, 3).flatten(3)


def _latent(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [f, height, width, 3] -> float32 [height / 8, width / 8, 12]."""
    # Full-range BT.601.
    ycbcr = frames.new_tensor(
        [[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]], dtype=torch.float32
    )
    position = torch.arange(_BLOCK, device=frames.device) + 0.5
    frequency = torch.arange(_FREQUENCIES, device=frames.device)
    cosines = torch.cos(math.pi / _BLOCK * frequency[:, None] * position)  # [frequency, pixel]
    image = frames.float().mean(0) @ ycbcr.T
    blocks = image.unflatten(0, (-1, _BLOCK)).unflatten(2, (-1, _BLOCK))  # [y, 8, x, 8, 3]
    return torch.einsum("yixjc,ai,bj->yxabc", blocks, cosines, cosines).flatten(2)


def rope_angles(
    video_shape: tuple[int, int, int], head_dim: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Rotation angles of 3-D RoPE, float32 [T*H*W, head_dim / 2].

    A third of the pairs (rounded down) turns with the row, as many with the column, the rest with the latent
    frame: 22, 21, 21 pairs at head_dim 128, as in Wan 2.1. Base 10000 along each axis.
    """
    pairs = head_dim // 2
    space = pairs // 3
    angles = []
    for size, count in zip(video_shape, (pairs - 2 * space, space, space), strict=True):
        rate = _ROPE_BASE ** (-torch.arange(count, device=device, dtype=torch.float32) / count)
        angles.append(torch.arange(size, device=device, dtype=torch.float32)[:, None] * rate)
    t, h, w = angles
    shape = tuple(video_shape)
    return torch.cat(
        [
            t[:, None, None].expand(*shape, -1),
            h[None, :, None].expand(*shape, -1),
            w[None, None, :].expand(*shape, -1),
        ],
        dim=-1,
    ).flatten(0, 2)


def apply_rope(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of x [..., S, heads, D] by angles [S, D / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def project(
    tokens: torch.Tensor,
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Projected:
    """q, k, v and a gate from tokens [T, H, W, C], by random projections that depend on `seed` alone.

    q and k are brought to root mean square 1 per token and head and get 3-D RoPE. Computed in fp32 a latent
    frame at a time, rounded to `dtype` at the end; on the device of `tokens`.
    """
    video_shape, device = tuple(tokens.shape[:3]), tokens.device
    generator = torch.Generator().manual_seed(seed)
    query, other, value, gate = torch.randn(4, tokens.shape[3], heads * head_dim, generator=generator)
    key = _QK_CORRELATION * query + math.sqrt(1 - _QK_CORRELATION**2) * other
    scale = tokens.shape[3] ** -0.5
    weights = [weight.to(device) * scale for weight in (query, key, value, gate)]
    plane = video_shape[1] * video_shape[2]
    angles = rope_angles(video_shape, head_dim, device)
    shape = (1, video_shape[0] * plane, heads, head_dim)
    outputs = Projected(*(torch.empty(shape, dtype=dtype, device=device) for _ in weights))
    for t, frame in enumerate(tokens):
        rows = slice(t * plane, (t + 1) * plane)
        for output, weight in zip(outputs, weights, strict=True):
            x = (frame.flatten(0, 1) @ weight).unflatten(-1, (heads, head_dim))
            if output is outputs.query or output is outputs.key:
                x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
                x = apply_rope(x, angles[rows])
            output[0, rows] = x
    return outputs


def clip_to_qkv(
    path: str | os.PathLike,
    video_shape: tuple[int, int, int] = (21, 45, 80),
    *,
    heads: int,
    head_dim: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [1, T*H*W, heads, head_dim] of a real clip on a token grid (T, H, W).

    The clip is scaled to cover (W * 16) x (H * 16) pixels and cropped at the centre. See this module's
    docstring for what the features are. `vsa_cuda.demo.video.fetch_clip` gives a path.

    Raises:
        DemoError: the file is no video.
        ValueError: the clip is too short for T latent frames.
    """
    latents, rows, columns = video_shape
    num_frames = 1 + FRAMES_PER_LATENT * (latents - 1)
    frames = read_frames(path, num_frames, (columns * TOKEN_PIXELS, rows * TOKEN_PIXELS))
    if len(frames) < num_frames:
        have = 1 + (len(frames) - 1) // FRAMES_PER_LATENT
        raise ValueError(
            f"video_shape: got {tuple(video_shape)}, but {path} has {len(frames)} usable frames: "
            f"expected at most {have} latent frames"
        )
    projected = project(frames_to_tokens(frames, device), heads, head_dim, dtype, seed)
    return projected.query, projected.key, projected.value


def clip_to_block_lists(
    path: str | os.PathLike,
    video_shape: tuple[int, int, int] = (21, 45, 80),
    *,
    topk: int,
    heads: int,
    head_dim: int,
    cube: tuple[int, int, int] = (4, 4, 4),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cubes that VSA's coarse stage chooses on a real clip.

    Arguments as clip_to_qkv's. Returns kv_num_blocks int32 [1, heads, N] and kv_indices int32
    [1, heads, N, topk], ascending.
    """
    query, key, value = clip_to_qkv(
        path, video_shape, heads=heads, head_dim=head_dim, device=device, dtype=dtype, seed=seed
    )
    grid = CubeGrid(video_shape, cube)
    *_, kv_num_blocks, kv_indices = ops.coarse_forward(
        query, key, value, grid.video_shape, grid.cube, topk, head_dim**-0.5, False
    )
    return kv_num_blocks, kv_indices
