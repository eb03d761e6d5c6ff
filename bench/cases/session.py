"""One GPU session: ceilings, then every case of the floors tables, in the order of their worth.

A kernel that has never run may hang, or take the CUDA context with it. So the cases run in a worker; the
parent kills it when a case takes too long, records that, and starts another one on the cases that are left.
"""

import gc
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.cases.block import measure_block
from bench.cases.coarse import measure_coarse
from bench.machine import ROOT
from bench.patterns import VideoSource, make_problem
from bench.report import rows_table, targets_table
from bench.roofline import Ceilings
from bench.rows import read_json
from bench.runner import Runner, describe_error
from bench.shapes import SHAPES

_LOST = 3  # exit code of a worker whose CUDA context is gone
_POLL_S = 0.2
_START_S = 120.0  # a worker's imports and libraries
_OURS_AND_DENSE = ("vsa_cuda", "fa3")


@dataclass(frozen=True)
class Case:
    """run(runner, video) measures and records. timeout_s counts from the case's start."""

    name: str
    run: Callable[[Runner, VideoSource], object]
    timeout_s: float = 60.0


def _fine(shape: str, pattern: str, direction: str, only: tuple[str, ...] | None = None) -> Case:
    def run(runner: Runner, video: VideoSource):
        problem = make_problem(SHAPES[shape], pattern, device=runner.device, video=video)
        runner.fine(problem, direction, only)

    return Case(f"fine {shape} {pattern} {direction}", run)


def _op(shape: str, pattern: str, direction: str, only: tuple[str, ...] | None = None) -> Case:
    """The whole op, and the fine stage alone on the op's own selection."""

    def run(runner: Runner, video: VideoSource):
        problem = make_problem(SHAPES[shape], pattern, device=runner.device, video=video, with_lists=False)
        problem.gate_coarse = problem.gate_fine = None
        runner.whole_op_and_fine(problem, direction, only)

    return Case(f"op {shape} {pattern} {direction}", run)


def _around(shape: str, pattern: str) -> Case:
    def run(runner: Runner, video: VideoSource):
        measure_coarse(runner, make_problem(SHAPES[shape], pattern, device=runner.device, video=video))

    return Case(f"around {shape} {pattern}", run)


def _block(model: str, direction: str) -> Case:
    return Case(f"block {model} {direction}", lambda runner, video: measure_block(runner, model, direction))


CASES = [
    Case("roofline", lambda runner, video: runner.run_roofline(), 150.0),
    _fine("floor-d128", "random", "fwd"),
    _fine("floor-d128", "random", "bwd"),
    _fine("floor-d64", "random", "fwd"),
    _fine("floor-d64", "random", "bwd"),
    _fine("video-h24", "video", "fwd"),
    _fine("video-h24", "video", "bwd"),
    _fine("floor-d128", "dense", "fwd", _OURS_AND_DENSE),
    _fine("floor-d128", "dense", "bwd", _OURS_AND_DENSE),
    _fine("flashinfer-h7-109k", "random", "fwd"),
    _op("wan-1.3b-448p", "video", "fwd"),
    _op("wan-14b-720p", "video", "fwd"),
    _op("wan-14b-720p", "video", "bwd"),
    _op("wan-14b-720p", "video", "fwd+bwd"),
    _op("wan-1.3b-448p", "video", "fwd+bwd"),
    _around("video-h24", "video"),
    _op("million", "random", "fwd+bwd", ("vsa_cuda",)),
    _op("floor-d128", "dense", "fwd", _OURS_AND_DENSE),
    _around("floor-d128", "dense"),
    _fine("floor-d64", "dense", "fwd", _OURS_AND_DENSE),
    _fine("floor-d64", "dense", "bwd", _OURS_AND_DENSE),
    _fine("paper-fig4-8k", "random", "fwd"),
    _fine("paper-fig4-8k", "random", "bwd"),
    _fine("paper-fig4-32k", "random", "bwd"),
    _block("wan-1.3b", "fwd"),
    _block("wan-1.3b", "fwd+bwd"),
    _block("wan-14b", "fwd"),
    _block("wan-14b", "fwd+bwd"),
    _block("paper-410m", "fwd+bwd"),
]


def work_through(runner: Runner, video: VideoSource, names: list[str], progress: Path, cases=None) -> int:
    """The worker: runs the named cases, noting in `progress` which one is on. Returns the exit code."""
    by_name = {case.name: case for case in cases or CASES}
    if runner.options.json.exists():
        runner.ceilings = Ceilings.from_rows(read_json(runner.options.json))
    for name in names:
        _note(progress, name)
        runner.console.print(f"[bold]{name}[/]")
        recorded = len(runner.rows)
        try:
            by_name[name].run(runner, video)
        except Exception as error:  # one case must not take the others with it
            runner.console.print_exception(max_frames=8)
            runner.record_failure(name, describe_error(error))
        runner.console.print(rows_table(runner.rows[recorded:]))
        if runner.device_is_lost():
            _note(progress, name, done=True)
            return _LOST
        gc.collect()
        if runner.device.type == "cuda":
            torch.cuda.empty_cache()
    _note(progress, None, done=True)
    return 1 if runner.failed else 0


def _note(progress: Path, name: str | None, done: bool = False) -> None:
    partial = progress.with_name(progress.name + ".partial")
    partial.write_text(json.dumps({"case": name, "started": time.time(), "done": done}))
    partial.replace(progress)


def supervise(
    runner: Runner, worker_command: list[str], progress: Path, *, seconds: float, names: list[str], cases=None
) -> int:
    """The parent: keeps a worker going until the cases or the seconds are used up, then prints the floors.

    `worker_command` is completed with the names of the cases. Returns 1 if a case failed or did not run.
    """
    by_name = {case.name: case for case in cases or CASES}
    deadline, left = time.time() + seconds, list(names)
    while left and time.time() < deadline:
        progress.unlink(missing_ok=True)
        worker = subprocess.Popen([*worker_command, ",".join(left)], cwd=ROOT)
        left = _watch(runner, worker, progress, by_name, left, deadline)
    for name in left:
        runner.console.print(f"[yellow]not run: {name} (no time left)[/]")
    path = runner.options.json
    rows = read_json(path) if path.exists() else []
    runner.console.print(targets_table(rows))
    return 1 if left or any(row.status == "failed" for row in rows) else 0


def _watch(runner, worker, progress, by_name, left, deadline) -> list[str]:
    """Waits for the worker to end, or ends it; returns the cases still to run."""
    began, current = time.time(), {"case": None, "started": time.time(), "done": False}
    while worker.poll() is None:
        time.sleep(_POLL_S)
        current = _read(progress) or current
        case = by_name.get(current["case"])
        timeout = _START_S if case is None else case.timeout_s
        now = time.time()
        if now > deadline:
            _end(worker)
            return left if case is None else left[left.index(case.name) :]
        if not current["done"] and now - (current["started"] if case else began) > timeout:
            _end(worker)
            if case is None:
                runner.record_failure("session", "the worker did not start in time")
                return []
            runner.record_failure(case.name, f"killed after {now - current['started']:.0f} s")
            return left[left.index(case.name) + 1 :]
    current = _read(progress) or current
    if current["case"] is None:
        if not current["done"]:
            runner.record_failure("session", f"the worker ended with code {worker.returncode} at once")
        return []
    if not current["done"]:
        runner.record_failure(current["case"], f"the worker died with code {worker.returncode}")
    return left[left.index(current["case"]) + 1 :]


def _read(progress: Path) -> dict | None:
    try:
        return json.loads(progress.read_text())
    except FileNotFoundError:
        return None


def _end(worker: subprocess.Popen) -> None:
    worker.send_signal(signal.SIGTERM)
    try:
        worker.wait(5)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


def worker_prefix(arguments: list[str], progress: Path) -> list[str]:
    """The command of a worker, up to the names of the cases."""
    return [sys.executable, "-m", "bench", *arguments, "--worker-progress", str(progress), "--cases"]
