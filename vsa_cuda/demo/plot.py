"""The picture: one query cube and the cubes it chose, over the video's own frames."""

from collections.abc import Sequence
from pathlib import Path

import torch

from vsa_cuda.demo.video import FRAMES_PER_LATENT, TOKEN_PIXELS, require

_QUERY_COLOUR = "#ff2d95"
_CHOSEN_COLOUR = "#ffe14d"
_MAX_PANELS = 6


def moving_cube(frames: torch.Tensor, cube: Sequence[int]) -> tuple[int, int, int]:
    """Cube coordinates (t, h, w) of the whole cube whose pixels change most over its own frames.

    Args:
        frames: uint8 [F, height, width, 3].
        cube: tokens a cube, (t, h, w).
    """
    num_frames, height, width, _ = frames.shape
    rows, columns = cube[1] * TOKEN_PIXELS, cube[2] * TOKEN_PIXELS
    grid_rows, grid_columns = max(height // rows, 1), max(width // columns, 1)
    scores = []
    for start, stop in _slab_frames(num_frames, cube[0]):
        luma = frames[start:stop].float().mean(-1)
        change = luma.diff(dim=0).abs().mean(0) if stop - start > 1 else torch.zeros(height, width)
        change = change[: grid_rows * rows, : grid_columns * columns]
        change = change.unflatten(0, (grid_rows, -1)).unflatten(2, (grid_columns, -1))
        scores.append(change.mean((1, 3)))
    # Not the first slab nor the last: the picture shows what comes before and after.
    skipped = 1 if len(scores) > 2 else 0
    index = int(torch.stack(scores[skipped : len(scores) - skipped]).argmax())
    t, rest = divmod(index, grid_rows * grid_columns)
    return t + skipped, rest // grid_columns, rest % grid_columns


def _slab_frames(num_frames: int, cube_t: int) -> list[tuple[int, int]]:
    """First and past-the-last video frame of every slab of cubes; latent 0 is frame 0 alone."""
    latents = 1 + (num_frames - 1) // FRAMES_PER_LATENT
    slabs = []
    for latent in range(0, latents, cube_t):
        last = min(latent + cube_t, latents) - 1
        start = 0 if latent == 0 else FRAMES_PER_LATENT * (latent - 1) + 1
        slabs.append((start, FRAMES_PER_LATENT * last + 1))
    return slabs


def draw_selection(
    path: str | Path,
    frames: torch.Tensor,
    cube: Sequence[int],
    chosen: torch.Tensor,
    query: Sequence[int],
    title: str,
    subtitle: str,
) -> None:
    """Write a PNG: a panel per slab of cubes in time, chosen cubes in colour, the rest dimmed.

    Args:
        frames: uint8 [F, height, width, 3], the frames that the tokens were made from.
        cube: tokens a cube, (t, h, w).
        chosen: bool [nt, nh, nw], the cubes that the query cube selected.
        query: cube coordinates (t, h, w) of the query cube.
        title, subtitle: two lines of text above the panels.
    """
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    slabs = _slab_frames(frames.shape[0], cube[0])
    shown = _slabs_to_show(len(slabs), query[0])
    height, width = frames.shape[1:3]
    columns = min(3 if width >= height else _MAX_PANELS, len(shown))
    rows = -(-len(shown) // columns)
    panel_width = 15.6 / columns
    panel_height = min(panel_width * height / width, 8.0) + 0.28
    figure = Figure(figsize=(16.0, rows * panel_height + 1.25), facecolor="white", dpi=120)
    FigureCanvasAgg(figure)
    top = 1 - 0.85 / figure.get_figheight()
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(0.0125, 0.4 / figure.get_figheight(), 0.9875, top - 0.24 / figure.get_figheight(),
                           wspace=0.02, hspace=0.28 / panel_height)  # fmt: skip
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, slab in zip(axes.flat, shown, strict=False):
        start, stop = slabs[slab]
        frame = (start + stop - 1) // 2
        _draw_panel(axis, frames[frame], cube, chosen[slab], query[1:] if slab == query[0] else None)
        first = slab * cube[0]
        last = min(first + cube[0] - 1, (frames.shape[0] - 1) // FRAMES_PER_LATENT)
        span = f"latent frames {first}-{last}" if last > first else f"latent frame {first}"
        label = f"{span}, chosen: {int(chosen[slab].sum())}"
        mine = slab == query[0]
        axis.set_title(
            label + (" (query here)" if mine else ""),
            fontsize=10 if columns <= 3 else 8,
            pad=4,
            loc="left",
            color=_QUERY_COLOUR if mine else "#222222",
        )
    figure.text(0.0125, 1 - 0.34 / figure.get_figheight(), title, fontsize=16, weight="bold")
    figure.text(0.0125, 1 - 0.66 / figure.get_figheight(), subtitle, fontsize=11, color="#333333")
    _draw_legend(figure)
    figure.savefig(path)


def _slabs_to_show(count: int, query_slab: int) -> list[int]:
    """All slabs, or _MAX_PANELS of them spread evenly with the query's own among them."""
    if count <= _MAX_PANELS:
        return list(range(count))
    picked = {round(i * (count - 1) / (_MAX_PANELS - 1)) for i in range(_MAX_PANELS)}
    nearest = min(picked, key=lambda slab: abs(slab - query_slab))
    return sorted(picked - {nearest} | {query_slab})


def _draw_panel(axis, image: torch.Tensor, cube, chosen: torch.Tensor, query) -> None:
    from matplotlib.patches import Rectangle

    height, width, _ = image.shape
    rows, columns = cube[1] * TOKEN_PIXELS, cube[2] * TOKEN_PIXELS
    mask = chosen.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:height, :width, None]
    colour = image.float() / 255
    grey = 0.06 + 0.38 * colour.mean(-1, keepdim=True).expand(-1, -1, 3)
    axis.imshow(torch.where(mask, colour, grey).numpy(), extent=(0, width, height, 0))
    style = {"color": _CHOSEN_COLOUR, "linewidth": 1.5, "capstyle": "projecting"}
    axis.vlines(*_borders(chosen.T, columns, rows, width, height), **style)
    axis.hlines(*_borders(chosen, rows, columns, height, width), **style)
    if query is not None:
        top, left = query[0] * rows, query[1] * columns
        box = (left, top), min(columns, width - left), min(rows, height - top)
        axis.add_patch(Rectangle(*box, fill=False, edgecolor="white", linewidth=4.5, zorder=4))
        axis.add_patch(Rectangle(*box, fill=False, edgecolor=_QUERY_COLOUR, linewidth=2.5, zorder=4))
    axis.set_axis_off()


def _borders(chosen: torch.Tensor, step: int, span: int, end: int, span_end: int) -> tuple[list, list, list]:
    """Line segments (position, from, to) where a chosen cell meets one that is not, along dim 0."""
    cells = torch.nn.functional.pad(chosen.int(), (0, 0, 1, 1))
    edges = cells.diff(dim=0).nonzero().tolist()
    positions = [min(i * step, end) for i, _ in edges]
    return positions, [j * span for _, j in edges], [min((j + 1) * span, span_end) for _, j in edges]


def _draw_legend(figure) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor="none", edgecolor=_QUERY_COLOUR, linewidth=3, label="the query cube"),
        Patch(facecolor="none", edgecolor=_CHOSEN_COLOUR, linewidth=2, label="cubes it chose (in colour)"),
        Patch(facecolor="#555555", label="cubes it skips (dimmed)"),
    ]
    figure.legend(handles=handles, loc="lower left", ncols=3, frameon=False, bbox_to_anchor=(0.008, 0))
