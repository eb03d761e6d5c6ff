"""The demo step by step: clip, tokens, q k v, VSA forward and backward, checks, picture, report."""

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vsa_cuda.demo import measure, plot
from vsa_cuda.demo.features import Projected, frames_to_tokens, project
from vsa_cuda.demo.video import DemoError, default_size, find_clip, read_frames, require
from vsa_cuda.functional import video_sparse_attention
from vsa_cuda.geometry import CubeGrid, topk_from_sparsity
from vsa_cuda.info import info

_SPARSITY = 0.875
_STEPS = 7


@dataclass(frozen=True)
class Defaults:
    """What fits a kind of device. Budgets count S * S * heads * head_dim."""

    dtype: torch.dtype
    heads: int
    head_dim: int
    tokens_per_latent: int
    repeats: int
    dense_budget: float  # one forward of dense attention
    equality_budget: float  # VSA at sparsity 0 and dense attention, forward and backward


_DEFAULTS = {
    "cpu": Defaults(torch.float32, 2, 64, 720, 1, 1e11, 2e9),
    "cuda": Defaults(torch.bfloat16, 12, 128, 3600, 5, 2e13, 2e13),
}


def walk_through(args: argparse.Namespace) -> None:
    """Runs the whole demo: prints the report and writes the picture. Raises DemoError."""
    for module in ("rich", "av", "matplotlib"):
        require(module)
    from rich.console import Console

    device = choose_device(args.device)
    defaults = _DEFAULTS[device.type]
    started = time.perf_counter()
    with _progress() as progress:
        try:
            rows = _run_steps(args, device, defaults, progress)
        except torch.OutOfMemoryError as error:
            raise DemoError(
                f"out of memory on {device}; pass a smaller --size, --heads or --frames"
            ) from error
    console = Console()
    console.print(_table(rows))
    console.print(f"Picture: [bold]{args.output}[/bold]", soft_wrap=True, highlight=False)
    console.print(f"Done in {time.perf_counter() - started:.1f} s.", highlight=False)


def choose_device(requested: str) -> torch.device:
    """The device for "auto", "cuda" or "cpu"; "auto" is the GPU exactly when vsa_cuda.info() says "cuda"."""
    found = info()
    if requested == "cuda" and found["backend"] != "cuda":
        raise DemoError(f"--device cuda: the kernels cannot run here ({found['why']}); pass --device cpu")
    return torch.device("cuda" if requested != "cpu" and found["backend"] == "cuda" else "cpu")


def _run_steps(
    args: argparse.Namespace, device: torch.device, defaults: Defaults, progress: "_Progress"
) -> list[tuple[str, str]]:
    with progress.step("find the clip"):
        path = find_clip(args.video)
        size = args.size or default_size(path, defaults.tokens_per_latent)
    with progress.step("decode", total=args.frames) as advance:
        frames = read_frames(path, args.frames, size, advance)
    with progress.step("pixels -> tokens -> q, k, v"):
        tokens = frames_to_tokens(frames, device)
        grid = CubeGrid(tuple(tokens.shape[:3]))
        heads, head_dim = args.heads or defaults.heads, args.head_dim or defaults.head_dim
        projected = project(tokens, heads, head_dim, defaults.dtype, args.seed)
    sparsity = _SPARSITY if args.sparsity is None else args.sparsity
    topk = min(args.topk or topk_from_sparsity(sparsity, grid.video_shape), grid.num_cubes)
    with progress.step("VSA forward and backward"):
        attended = _forward_backward(projected, grid, topk, device, defaults.repeats)
    with progress.step("attention mass of the chosen cubes"):
        query, key = projected.query, projected.key
        samples = max(1, 64 // heads)
        mass = measure.attention_mass(query, key, grid, *attended.selection, samples, args.seed)
    with progress.step("dense attention"):
        dense_rows = _compare_to_dense(projected, grid, topk, mass, device, defaults)
    with progress.step("picture"):
        _draw(args.output, frames, projected, grid, attended.selection, topk)

    shape = "x".join(str(side) for side in size)
    kept = f"{topk} of {grid.num_cubes} cubes kept for every query cube"
    return [
        ("clip", f"{path.name}: frames 0 to {len(frames) - 1} at {shape} pixels"),
        ("features", "fixed random projections of pixels with 3-D RoPE; no trained weights"),
        *_device_rows(device),
        ("grid", str(grid).removeprefix("grid ")),
        ("q, k, v", f"heads {heads}, head_dim {head_dim}, {str(defaults.dtype).removeprefix('torch.')}"),
        ("sparsity", f"{1 - topk / grid.num_cubes:.4f}: {kept}"),
        (
            "attention mass",
            f"chosen cubes {mass.chosen:.1%}, as many random cubes {mass.random:.1%}, best possible "
            f"{mass.best:.1%} (dense softmax over {mass.query_cubes} sampled query cubes)",
        ),
        *dense_rows,
        ("gradient norms", attended.gradient_norms + " (loss: mean of the squared output)"),
        *attended.cost_rows,
    ]


@dataclass(frozen=True)
class Attended:
    selection: tuple[torch.Tensor, torch.Tensor]  # kv_num_blocks [1, H, N], kv_indices [1, H, N, topk]
    gradient_norms: str
    cost_rows: list[tuple[str, str]]


def _forward_backward(
    projected: Projected, grid: CubeGrid, topk: int, device: torch.device, repeats: int
) -> Attended:
    inputs = [x.detach().requires_grad_() for x in projected]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def forward():
        query, key, value, gate = inputs
        return video_sparse_attention(
            query, key, value, grid.video_shape, topk=topk, gate_coarse=gate, return_selection=True
        )

    forward_seconds, (out, *selection) = measure.timed(forward, device, repeats)
    # d mean(out ** 2) / d out, given directly so that only the op's own backward is timed.
    grad_out = (out.detach().float() * (2 / out.numel())).to(out.dtype)

    def backward():
        return torch.autograd.grad(out, inputs, grad_out, retain_graph=True)

    backward_seconds, grads = measure.timed(backward, device, repeats)
    peak = measure.peak_bytes(device) / 2**30
    norms = [float(grad.float().norm()) for grad in grads]
    text = ", ".join(f"{name} {norm:.3g}" for name, norm in zip(("q", "k", "v", "gate"), norms, strict=True))
    if not all(map(math.isfinite, norms)):
        raise DemoError(f"a gradient is not finite (norms: {text}); please report this as a bug")
    what = f"median of {repeats}" if device.type == "cuda" else "PyTorch reference, not built for speed"
    where = "GPU tensors, inputs included" if device.type == "cuda" else "the whole process so far"
    return Attended(
        (selection[0], selection[1]),
        text,
        [
            ("time", f"forward {_time(forward_seconds)}, backward {_time(backward_seconds)} ({what})"),
            ("peak memory", f"{peak:.2f} GiB ({where})"),
        ],
    )


def _compare_to_dense(
    projected: Projected,
    grid: CubeGrid,
    topk: int,
    mass: measure.Mass,
    device: torch.device,
    defaults: Defaults,
) -> list[tuple[str, str]]:
    """Rows: error of the fine output against dense attention; at sparsity 0, of output and gradients."""
    query, key, value, _ = projected
    cost = grid.num_tokens**2 * query.shape[2] * query.shape[3]
    if cost <= defaults.dense_budget:
        fine = video_sparse_attention(query, key, value, grid.video_shape, topk=topk, gate_coarse=0.0)
        seconds, dense = measure.timed(
            lambda: measure.dense_attention(query, key, value), device, defaults.repeats
        )
        error = measure.relative_error(fine, dense)
        text = (
            f"{error:.3f} relative, of the fine output: {1 - mass.chosen:.0%} of the attention lies outside "
            f"the chosen cubes. Dense forward (PyTorch): {_time(seconds)}"
        )
    else:
        text = f"not measured: dense attention over {grid.num_tokens} tokens is too much here"

    latents, *plane = grid.video_shape
    fitting = int((defaults.equality_budget / cost) ** 0.5 * latents)
    shape = (max(1, min(latents, fitting)), *plane)
    num_tokens = shape[0] * plane[0] * plane[1]
    inputs = [x[:, :num_tokens].detach().requires_grad_() for x in (query, key, value)]
    out = video_sparse_attention(*inputs, shape, sparsity=0.0, gate_coarse=0.0)
    dense = measure.dense_attention(*inputs)
    pairs = zip(
        (out, *torch.autograd.grad(out, inputs, dense.detach())),
        (dense, *torch.autograd.grad(dense, inputs, dense.detach())),
        strict=True,
    )
    errors = [measure.relative_error(got, expected) for got, expected in pairs]
    names = ("out", "dq", "dk", "dv")
    named = ", ".join(f"{name} {error:.1e}" for name, error in zip(names, errors, strict=True))
    span = "all" if shape[0] == latents else f"the first {shape[0]}"
    return [
        ("error to dense", text),
        ("at sparsity 0", f"relative error to dense: {named} ({span} latent frames)"),
    ]


def _draw(output, frames, projected: Projected, grid: CubeGrid, selection, topk: int) -> None:
    kv_num_blocks, kv_indices = selection
    query = plot.moving_cube(frames, grid.cube)
    _, nh, nw = grid.cubes_shape
    cube = (query[0] * nh + query[1]) * nw + query[2]
    chosen = torch.zeros(grid.num_cubes, dtype=torch.bool)
    chosen[kv_indices[0, 0, cube, : int(kv_num_blocks[0, 0, cube])].long().cpu()] = True
    held = float(measure.cube_mass(projected.query, projected.key, grid, 0, cube).cpu()[chosen].sum())
    subtitle = (
        f"One head. The {topk} of {grid.num_cubes} cubes that the query cube chose hold {held:.0%} of its "
        f"dense attention; {topk} random cubes would hold {topk / grid.num_cubes:.0%} on average. "
        "Features: random projections of pixels, no trained weights."
    )
    title = "Video Sparse Attention: where one cube of 4x4x4 tokens looks"
    plot.draw_selection(output, frames, grid.cube, chosen.view(grid.cubes_shape), query, title, subtitle)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _device_rows(device: torch.device) -> list[tuple[str, str]]:
    found = info()
    if device.type == "cuda":
        return [("device", found["device"]), ("backend", "vsa_cuda kernels (sm_90a)")]
    why = "asked for with --device cpu" if found["backend"] == "cuda" else found["why"].partition(";")[0]
    threads = torch.get_num_threads()
    return [
        ("device", f"CPU, {threads} {'thread' if threads == 1 else 'threads'}"),
        ("backend", f"PyTorch reference ({why})"),
    ]


def _table(rows: list[tuple[str, str]]):
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Video Sparse Attention", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, escape(value))
    return table


class _Progress:
    """A bar over the steps of the demo, with a second bar for a step that reports its own progress."""

    def __init__(self, bars, task):
        self._bars, self._task = bars, task

    @contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator:
        """Yields a function that takes the amount done so far, out of `total`."""
        self._bars.update(self._task, description=name)
        own = self._bars.add_task(name, total=total) if total else None
        yield lambda done: self._bars.update(own, completed=done)
        if own is not None:
            self._bars.remove_task(own)
        self._bars.advance(self._task)


@contextmanager
def _progress() -> Iterator[_Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as bars:
        task = bars.add_task("start", total=_STEPS)
        yield _Progress(bars, task)
        bars.update(task, description="done")
