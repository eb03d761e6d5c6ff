"""Checks, times and records cases. What every subcommand shares."""

import datetime
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console

from bench import flops, limits, roofline
from bench.backends import Backend, Unsupported, Work
from bench.check import OWN_FACTOR, PEER_FACTOR, Verdict, check
from bench.machine import environment, gpu_state
from bench.patterns import Problem, loads_per_pair
from bench.roofline import Ceilings
from bench.rows import PASSES, Row, append_csv, append_json
from bench.timing import Timing, interleave, peak_bytes

# dk and dv of a peer are checked where that takes seconds, not minutes.
_MOST_DENSE_BLOCKS = 600
_CASE_OPS = {"fine": "fine", "op": "op", "around": "coarse_forward", "block": "block"}


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@dataclass
class Options:
    """What the command line says about a run."""

    device: torch.device
    l2: str = "warm"
    budget_s: float = 3.0
    graphs: bool = True
    json: Path | None = None
    csv: Path | None = None
    commit: str | None = None
    date: str = field(default_factory=_now)
    command: str = field(default_factory=lambda: shlex.join(["python", "-m", "bench", *sys.argv[1:]]))


@dataclass
class _Case:
    """A problem in one direction, with the work and verdict of each backend that passed its check."""

    op: str
    problem: Problem
    direction: str
    checked: dict[Backend, tuple[Work, Verdict]] = field(default_factory=dict)
    failed: list[Row] = field(default_factory=list)


class Runner:
    """Runs cases and keeps their rows. `failed` is True once a case has missed its tolerance or raised."""

    def __init__(self, options: Options, backends: list[Backend], console: Console | None = None):
        self.options, self.backends = options, backends
        self.console = console or Console()
        self.ceilings = Ceilings()
        self.rows: list[Row] = []

    @property
    def failed(self) -> bool:
        return any(row.status == "failed" for row in self.rows)

    @property
    def device(self) -> torch.device:
        return self.options.device

    def record(self, rows: list[Row]) -> list[Row]:
        """Keeps the rows and appends them to the files at once: a later crash does not lose them."""
        self.rows += rows
        if self.options.json is not None:
            append_json(self.options.json, rows)
        if self.options.csv is not None:
            append_csv(self.options.csv, rows)
        for row in rows:
            if row.status == "failed":
                self.console.print(
                    f"[bold red]failed[/] {row.case} {row.op} {row.direction} {row.backend}: {row.note}"
                )
        return rows

    def row(self, backend: Backend | None, **values) -> Row:
        """A row with the fields of the machine and the run filled in."""
        known = environment(self.device.type)
        if self.options.commit is not None:
            known = {**known, "commit": self.options.commit}
        name = {"backend": "bench", "backend_version": "", "library_sha256": None}
        if backend is not None:
            name = {
                "backend": backend.name,
                "backend_version": backend.version,
                "library_sha256": backend.library_sha256,
            }
        return Row(**name, **known, command=self.options.command, date=self.options.date, **values)

    def run_roofline(self) -> list[Row]:
        """Measures the ceilings, which later rows are held against."""
        before = gpu_state(self.device)
        results = roofline.torch_cases(self.device, self.options.budget_s / 2)
        for program, found in roofline.run_programs().items():
            results += [{"case": roofline.case_name(program, one), **one} for one in found]
        machine = states(before, gpu_state(self.device))
        rows = []
        for result in results:
            timing = result.get("timing")
            # The programs print their best run alone.
            values = times(timing) if timing else {"ms_min": result["ms"], "timer": "events"}
            values |= {name: result[name] for name in ("tflops", "tb_per_s") if name in result}
            values |= {"op": "roofline", "direction": "fwd", "status": "ok", "case": result["case"]}
            rows.append(self.row(None, **values, **machine))
        self.ceilings = Ceilings.from_rows(rows)
        return self.record(rows)

    def fine(self, problem: Problem, direction: str, only: tuple[str, ...] | None = None) -> list[Row]:
        """The fine stage over the problem's lists, against dense attention over everything."""
        return self._time_cases([self._fine_case(problem, direction, only)])

    def whole_op(self, problem: Problem, direction: str, only: tuple[str, ...] | None = None) -> list[Row]:
        """The whole op. Leaves its selection in `problem`: `fine` afterwards runs on the same lists."""
        return self._time_cases([self._op_case(problem, direction, only)])

    def whole_op_and_fine(
        self, problem: Problem, direction: str, only: tuple[str, ...] | None = None
    ) -> list[Row]:
        """The whole op and this package's fine stage alone on the op's own selection.

        In one loop: the difference of the two means something only at the same clocks, and peers draw power.
        """
        cases = [self._op_case(problem, direction, only)]
        if problem.kv_indices is not None:
            cases.append(self._fine_case(problem, direction, ("vsa_cuda",)))
        return self._time_cases(cases)

    def _fine_case(self, problem, direction, only) -> "_Case":
        problem = replace(problem, gate_fine=1.0, gate_coarse=0.0)
        return self._prepare("fine", problem, direction, Backend.fine.__name__, only)

    def _op_case(self, problem, direction, only) -> "_Case":
        return self._prepare("op", problem, direction, Backend.whole_op.__name__, only)

    def _prepare(self, op, problem, direction, method, only) -> "_Case":
        """Builds and checks a case on every backend."""
        case = _Case(op, problem, direction)
        for backend in self.backends:
            if only is not None and backend.name not in only:
                continue
            try:
                work = getattr(backend, method)(problem, direction != "fwd")
                verdict = self._verify(backend, work, problem, direction, op)
            except Unsupported as error:
                self.console.print(f"[dim]skipped {backend.name}: {error}[/]")
                continue
            except Exception as error:  # whatever a peer raises is a failed case, not the end of the run
                self.console.print_exception(max_frames=8)
                note = describe_error(error)
                case.failed.append(self._failed_row(op, problem, direction, backend, None, note))
                continue
            if verdict.ok:
                case.checked[backend] = work, verdict
            else:
                note = "; ".join(verdict.messages)
                case.failed.append(self._failed_row(op, problem, direction, backend, verdict, note))
        return case

    def _time_cases(self, cases: list["_Case"]) -> list[Row]:
        calls = {
            f"{case.op} {backend.name}": _call(work, case.direction)
            for case in cases
            for backend, (work, _) in case.checked.items()
        }
        before = gpu_state(self.device)
        timings = self.time(calls)
        machine = states(before, gpu_state(self.device))
        rows = []
        for case in cases:
            timed = [
                self._timed_row(
                    case.op, case.problem, case.direction, backend, work, verdict,
                    timings[f"{case.op} {backend.name}"], machine,
                )
                for backend, (work, verdict) in case.checked.items()
            ]  # fmt: skip
            against_dense(timed)
            rows += timed + case.failed
        return self.record(rows)

    def time(self, calls: dict[str, Callable]) -> dict[str, Timing]:
        options = self.options
        return interleave(calls, self.device, l2=options.l2, budget_s=options.budget_s, graphs=options.graphs)

    def _verify(self, backend, work: Work, problem: Problem, direction: str, op: str) -> Verdict:
        checked = problem
        if work.dense:
            checked = with_dense_lists(problem)
        elif op == "op":
            if work.selection is None:
                return Verdict(unchecked="not checked: its selection is not visible")
            counts, indices = work.selection()
            problem.kv_num_blocks, problem.kv_indices = counts, indices
        own = backend.name == "vsa_cuda"
        gradients = None
        if direction != "fwd":
            gradients = tuple(work.to_raster(x) for x in work.backward())
        return check(
            checked,
            work.to_raster(work.forward().detach()),
            gradients,
            work.lse() if work.lse is not None else None,
            factor=OWN_FACTOR if own else PEER_FACTOR,
            key_gradients=own or checked.grid.num_cubes <= _MOST_DENSE_BLOCKS,
            selection=op == "op" and not work.dense,
        )

    def verify_attention(self, backend: Backend, problem: Problem, direction: str) -> bool:
        """Checks a backend's attention on `problem`; a failure is recorded."""
        method, op = (backend.whole_op, "op") if backend.name == "vsa_cuda" else (backend.fine, "fine")
        try:
            verdict = self._verify(backend, method(problem, direction != "fwd"), problem, direction, op)
        except Exception as error:  # a backend that raises is a failed case
            self.console.print_exception(max_frames=8)
            self.record([self._failed_row(op, problem, direction, backend, None, describe_error(error))])
            return False
        if not verdict.ok:
            self.record(
                [self._failed_row(op, problem, direction, backend, verdict, "; ".join(verdict.messages))]
            )
        return verdict.ok

    def describe(self, problem: Problem, backend: Backend | None = None) -> dict:
        """The fields of a row that say what the problem is."""
        shape = problem.shape
        return {
            "case": shape.name,
            "B": shape.batch,
            "H": shape.heads,
            "S": shape.num_tokens,
            "D": shape.head_dim,
            "video_shape": None if shape.video_shape is None else list(shape.video_shape),
            "cube": list(shape.grid.cube),
            "layout": "bshd",
            "dtype": str(problem.query.dtype).removeprefix("torch."),
            "topk": problem.topk,
            "blocks_total": shape.grid.num_cubes,
            "pattern": problem.pattern,
            "seed": problem.seed,
            "deterministic": getattr(backend, "deterministic", None),
        }

    def _failed_row(self, op, problem, direction, backend, verdict, note) -> Row:
        known = {}
        if verdict is not None and math.isfinite(verdict.error):
            known = {"error": verdict.error, "tolerance": verdict.tolerance}
        return self.row(
            backend, op=op, direction=direction, status="failed", note=note, gates=_gates(op, problem),
            **self.describe(problem, backend), **known,
        )  # fmt: skip

    def _timed_row(self, op, problem, direction, backend, work, verdict, timing, machine) -> Row:
        shape = problem.shape
        lists = (problem.kv_num_blocks, problem.kv_indices)
        values: dict = {}
        if work.dense:
            size = (shape.batch, shape.heads, shape.num_tokens, shape.head_dim)
            done = real = _total(direction, lambda back: flops.dense_flops(*size, back))
        elif lists[0] is not None:
            pairs = problem.pairs
            if op == "op" and backend.name == "vsa_cuda" and problem.topk == problem.grid.num_cubes:
                pairs = flops.dense_pairs(shape.batch, shape.heads, shape.num_tokens)
            done = _total(direction, lambda back: flops.executed_flops(pairs, shape.head_dim, back))
            real = _total(
                direction, lambda back: flops.real_flops(problem.grid, *lists, shape.head_dim, back)
            )
            values = {"pairs": pairs, "overlap": loads_per_pair(problem.grid, *lists, 2)}
        else:
            done = real = None
        if done is not None:
            values |= {"tflops": done / timing.median / 1e9, "tflops_real": real / timing.median / 1e9}
            values["mfu"] = values["tflops"] / limits.PEAK_TFLOPS if self.device.type == "cuda" else None
        if direction == "fwd+bwd":
            values["peak_bytes"] = peak_bytes(work.both, self.device)
        if backend.name == "vsa_cuda" and op == "fine" and direction != "fwd+bwd":
            values |= self._limits(problem, direction, done, values["overlap"], timing, machine)
        return self.row(
            backend,
            op=op,
            direction=direction,
            status="ok",
            gates=_gates(op, problem),
            note=timing.note or verdict.unchecked,
            error=verdict.error if verdict.tolerance else None,
            tolerance=verdict.tolerance or None,
            **self.describe(problem, backend),
            **values,
            **times(timing),
            **machine,
        )

    def record_failure(self, case: str, note: str) -> list[Row]:
        """A case that ended before a backend could be named; the op is the first word of its name."""
        op = _CASE_OPS.get(case.split()[0], "roofline")
        direction = case.split()[-1] if case.split()[-1] in PASSES else "fwd"
        return self.record(
            [self.row(None, op=op, direction=direction, status="failed", case=case, note=note)]
        )

    def device_is_lost(self) -> bool:
        """True after an error that ends the CUDA context: nothing more can run in this process."""
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return True
        return False

    def _limits(self, problem, direction, done, overlap, timing, machine) -> dict:
        lists = (problem.kv_num_blocks, problem.kv_indices)
        if direction == "bwd":
            loads = (loads_per_pair(problem.grid, *lists, limits.BACKWARD_GROUP, by_key=True), overlap)
        else:
            loads = (loads_per_pair(problem.grid, *lists, limits.forward_group(problem.shape.head_dim)),)
        least = limits.fine_limits(
            self.ceilings, flops=done, pairs=problem.pairs, head_dim=problem.shape.head_dim,
            tensor_bytes=problem.query.numel() * problem.query.element_size(), loads=loads,
            backward=direction == "bwd", clock_mhz=machine["clock_sm_mhz_after"],
        )  # fmt: skip
        name, fraction = limits.binding(least, timing.median)
        return {"limits_ms": least or None, "limit": name, "limit_fraction": fraction}


def describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def against_dense(rows: list[Row]) -> None:
    """Fills the ratios to dense FlashAttention-3 of rows measured together."""
    dense = next((row for row in rows if row.backend == "fa3"), None)
    for row in rows:
        if dense is not None and row.ms_median:
            row.speedup_over_dense_fa3 = dense.ms_median / row.ms_median
            if row.tflops is not None:
                row.tflops_ratio_to_dense_fa3 = row.tflops / dense.tflops


def with_dense_lists(problem: Problem) -> Problem:
    """The same inputs with every block listed, and no gates."""
    blocks = problem.grid.num_cubes
    rows = (problem.shape.batch, problem.shape.heads, blocks)
    every = torch.arange(blocks, dtype=torch.int32, device=problem.query.device)
    counts = every.new_full((1, 1, 1), blocks).expand(rows)
    indices = every.expand(*rows, blocks)
    return replace(problem, kv_num_blocks=counts, kv_indices=indices, gate_fine=1.0, gate_coarse=0.0)


def _call(work: Work, direction: str) -> Callable:
    return {"fwd": work.forward, "bwd": work.backward, "fwd+bwd": work.both}[direction]


def _total(direction: str, count: Callable[[bool], float]) -> float:
    passes = {"fwd": (False,), "bwd": (True,), "fwd+bwd": (False, True)}[direction]
    return sum(count(back) for back in passes)


def times(timing: Timing) -> dict:
    return {
        "ms_median": timing.median,
        "ms_min": timing.minimum,
        "ms_spread": timing.spread,
        "iterations": len(timing.samples),
        "timer": timing.timer,
        "l2": timing.l2,
    }


def states(before: dict, after: dict) -> dict:
    return {f"{name}_before": value for name, value in before.items()} | {
        f"{name}_after": value for name, value in after.items()
    }


def _gates(op: str, problem: Problem) -> str | None:
    """How the two gates are given: none (1.0), a float, or a tensor."""
    if op != "op":
        return None
    return ", ".join(
        f"{name} {'tensor' if isinstance(gate, torch.Tensor) else 'none' if gate is None else gate}"
        for name, gate in (("coarse", problem.gate_coarse), ("fine", problem.gate_fine))
    )
