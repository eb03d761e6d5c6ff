"""The kernels around the fine stage, one at a time, against the memory that each must move."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench import limits
from bench.backends import Backend
from bench.check import Expected, Verdict, check_selection
from bench.machine import gpu_state
from bench.patterns import Problem
from bench.rows import Row
from bench.runner import Runner, states, times
from vsa_cuda import reference


@dataclass
class Kernel:
    """An op of torch.ops.vsa_cuda with its inputs bound, the bytes it must move at least, and its check."""

    direction: str
    call: Callable[[], object]
    moved_bytes: int
    check: Callable[[object], Verdict]


def measure_coarse(runner: Runner, problem: Problem) -> list[Row]:
    """Checks and times pool, coarse_forward, coarse_backward, combine_backward and transpose_index."""
    backend = next(backend for backend in runner.backends if backend.name == "vsa_cuda")
    good: dict[str, tuple[Kernel, Verdict]] = {}
    rows = []
    for name, make in _KERNELS.items():
        try:
            kernel = make(problem)
            verdict = kernel.check(kernel.call())
        except Exception as error:  # a kernel that raises is a failed case
            runner.console.print_exception(max_frames=8)
            rows.append(_failed(runner, backend, problem, name, f"{type(error).__name__}: {error}"))
            continue
        if verdict.ok:
            good[name] = kernel, verdict
        else:
            rows.append(_failed(runner, backend, problem, name, "; ".join(verdict.messages), verdict))
    before = gpu_state(runner.device)
    timings = runner.time({name: kernel.call for name, (kernel, _) in good.items()})
    machine = states(before, gpu_state(runner.device))
    for name, (kernel, verdict) in good.items():
        timing = timings[name]
        least = limits.memory_limit(runner.ceilings, kernel.moved_bytes)
        limit, fraction = limits.binding(least, timing.median)
        rows.append(
            runner.row(
                backend,
                op=name,
                direction=kernel.direction,
                status="ok",
                note=timing.note,
                limits_ms=least or None,
                limit=limit,
                limit_fraction=fraction,
                tb_per_s=kernel.moved_bytes / timing.median / 1e9,
                error=verdict.error if verdict.tolerance else None,
                tolerance=verdict.tolerance or None,
                **runner.describe(problem, backend),
                **times(timing),
                **machine,
            )  # fmt: skip
        )
    return runner.record(rows)


def _failed(runner: Runner, backend: Backend, problem: Problem, name: str, note: str, verdict=None) -> Row:
    known = {}
    if verdict is not None and math.isfinite(verdict.error):
        known = {"error": verdict.error, "tolerance": verdict.tolerance}
    direction = "bwd" if name.endswith("backward") or name == "transpose_index" else "fwd"
    return runner.row(backend, op=name, direction=direction, status="failed", note=note, **known,
                      **runner.describe(problem, backend))  # fmt: skip


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _inputs(problem: Problem) -> tuple[torch.Tensor, ...]:
    return problem.query, problem.key, problem.value


def _pool(problem: Problem) -> Kernel:
    grid, inputs = problem.grid, _inputs(problem)

    def checked(outputs) -> Verdict:
        verdict = Verdict()
        for name, x, pooled in zip(("query", "key", "value"), inputs, outputs, strict=True):
            head = x[:1, :, -1:]
            exact = reference.pool(head.double(), grid)
            verdict.add(f"pooled {name}", pooled[:1, -1:], exact, reference.pool(head, grid), 2.0)
        return verdict

    def call():
        return torch.ops.vsa_cuda.pool(*inputs, grid.video_shape, grid.cube)

    return Kernel("fwd", call, _bytes(*inputs) * 65 // 64, checked)


def _with_coarse(problem: Problem) -> Problem:
    return replace(problem, gate_coarse=1.0)


def _coarse_forward(problem: Problem) -> Kernel:
    grid, inputs = problem.grid, _inputs(problem)

    def call():
        return torch.ops.vsa_cuda.coarse_forward(
            *inputs, grid.video_shape, grid.cube, problem.topk, problem.scale, True
        )

    def checked(outputs) -> Verdict:
        *_, out, _, counts, indices = outputs
        verdict, chosen = Verdict(), replace(_with_coarse(problem), kv_num_blocks=counts, kv_indices=indices)
        head = problem.shape.heads - 1
        exact, baseline = (Expected(chosen, 0, head, flag) for flag in (True, False))
        verdict.add("out_coarse", out[0, head], exact.coarse().out, baseline.coarse().out.to(out.dtype), 2.0)
        cubes = list(range(0, grid.num_cubes, max(1, grid.num_cubes // 8)))
        check_selection(verdict, exact, cubes, f"head {head}")
        return verdict

    return Kernel("fwd", call, _bytes(*inputs) * 65 // 64, checked)


def _coarse_backward(problem: Problem) -> Kernel:
    grid = problem.grid
    *pooled, out, lse, _, _ = torch.ops.vsa_cuda.coarse_forward(
        *_inputs(problem), grid.video_shape, grid.cube, problem.topk, problem.scale, True
    )
    batch, heads, cubes, head_dim = out.shape
    # What combine_backward hands over with a coarse gate of 1: sums of dO over the cubes, in the type of out.
    sums = reference.pool(problem.grad_out.float(), grid) * grid.cube_sizes(out.device)[:, None]
    sums = sums.to(out.dtype)

    def checked(outputs) -> Verdict:
        verdict, head = Verdict(), heads - 1
        counts, indices = _one_block(problem)
        chosen = replace(_with_coarse(problem), kv_num_blocks=counts, kv_indices=indices)
        exact, baseline = (Expected(chosen, 0, head, flag).coarse() for flag in (True, False))
        for name, actual, truth, rounded in zip(
            ("dq_pooled", "dk_pooled", "dv_pooled"), outputs, exact.pooled_gradients,
            baseline.pooled_gradients, strict=True,
        ):  # fmt: skip
            verdict.add(name, actual[0, head], truth, rounded.to(actual.dtype), 2.0)
        return verdict

    def call():
        return torch.ops.vsa_cuda.coarse_backward(sums, *pooled, out, lse, problem.scale)

    return Kernel("bwd", call, _bytes(sums, *pooled, out, lse) + 3 * _bytes(sums), checked)


def _one_block(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (problem.shape.batch, problem.shape.heads, problem.grid.num_cubes)
    counts = torch.ones(shape, dtype=torch.int32, device=problem.query.device)
    return counts, torch.zeros(*shape, 1, dtype=torch.int32, device=problem.query.device)


def _combine_backward(problem: Problem) -> Kernel:
    """delta alone, with both gates 1 and no coarse output: one read of dO and O."""
    grid, out = problem.grid, problem.value

    def call():
        return torch.ops.vsa_cuda.combine_backward(
            problem.grad_out, out, None, None, None, None, 1.0, 0.0, None, grid.video_shape, grid.cube
        )

    def checked(outputs) -> Verdict:
        verdict, head = Verdict(), problem.shape.heads - 1
        grad, fine = (x[:1, :, head:].double() for x in (problem.grad_out, out))
        exact = reference.combine_backward(grad, fine, None, None, grid, None, None)[1]
        bound = 1e-5 * (grad * fine).abs().sum(dim=-1).max().item()
        error = (outputs[1][:1, head:].double() - exact).abs().max().item()
        verdict.add_bound("delta", error, bound)
        return verdict

    slots = problem.shape.batch * problem.shape.heads * grid.num_cubes * 64 * 4
    return Kernel("bwd", call, _bytes(problem.grad_out, out) + slots, checked)


def _transpose_index(problem: Problem) -> Kernel:
    blocks = problem.grid.num_cubes
    counts, indices = problem.kv_num_blocks, problem.kv_indices

    def checked(outputs) -> Verdict:
        verdict = Verdict()
        expected = reference.transpose_index(counts[:1, -1:], indices[:1, -1:], blocks)
        offsets, rows = (x[:1, -1:] for x in outputs)
        listed = int(expected[0][0, 0, -1])
        if not (
            torch.equal(offsets, expected[0]) and torch.equal(rows[..., :listed], expected[1][..., :listed])
        ):
            verdict.messages.append("transpose_index: differs from the reference")
        return verdict

    moved = 2 * _bytes(indices)
    return Kernel("bwd", lambda: torch.ops.vsa_cuda.transpose_index(counts, indices, blocks), moved, checked)


_KERNELS = {
    "pool": _pool,
    "coarse_forward": _coarse_forward,
    "coarse_backward": _coarse_backward,
    "combine_backward": _combine_backward,
    "transpose_index": _transpose_index,
}
