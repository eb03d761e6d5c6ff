"""Interleaved timing: every backend in turn, round after round, so that the card is as warm for all.

Each runs for a while before it is timed: clocks follow the power that is drawn, over more than a tenth of a
second, and a short kernel after a long one would be timed at the long one's clocks. All run before the first
is timed: from rest, clocks dip once or twice before they stay (bench/NOTES.md, "Power").
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

FEWEST, MOST = 3, 100  # rounds
_WARMUP = 2
_LOAD_S = 2.5  # of running all before anything is timed
_SETTLE_MS = 150.0  # of running before a backend's timed calls of a round
_TIMED_MS = 50.0  # of these at least


@dataclass
class Timing:
    """Milliseconds of every round."""

    timer: str  # graph | events | clock
    l2: str  # warm | cold
    samples: list[float] = field(default_factory=list)
    note: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        return min(self.samples)

    @property
    def spread(self) -> float:
        """90th minus 10th percentile."""
        if len(self.samples) < 2:
            return 0.0
        deciles = statistics.quantiles(self.samples, n=10, method="inclusive")
        return deciles[-1] - deciles[0]


def interleave(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    l2: str = "warm",
    budget_s: float = 3.0,
    graphs: bool = True,
) -> dict[str, Timing]:
    """Times calls that are correct and have run before.

    On a GPU each call becomes a CUDA graph where it can be captured ("graph"), else it is launched as usual
    ("events"); both lie between two events. "warm": timed calls follow others of the same. "cold": twice
    the size of L2 is written before each. Either also keeps the GPU busy while the timed launch is on its
    way. On a CPU the clock is read ("clock") and l2 means nothing.

    Args:
        calls: by name; on a GPU they run on the current stream, which must not be the default one for graphs.
        budget_s: about how long to go on; at least FEWEST and at most MOST rounds. On a GPU as long before
            that, but not more than 2.5 s.
    """
    if device.type != "cuda":
        return _on_cpu(calls, budget_s)
    runs, timings, times = {}, {}, {}
    for name, call in calls.items():
        for _ in range(_WARMUP):
            call()
        runs[name], timings[name] = _captured(call, l2) if graphs else (call, Timing("events", l2))
        times[name] = max(_elapsed_ms([_timed(runs[name])])[0], 1e-3)
    flush = _larger_than_l2(device) if l2 == "cold" else None
    began = time.perf_counter()
    while time.perf_counter() - began < min(_LOAD_S, budget_s):
        for name, run in runs.items():
            _settle(run, times[name])
            torch.cuda.synchronize()
    began, rounds = time.perf_counter(), 0
    while rounds < FEWEST or (rounds < MOST and time.perf_counter() - began < budget_s):
        for name, run in runs.items():
            _settle(run, times[name])
            events = [_timed(run, flush) for _ in range(math.ceil(_TIMED_MS / times[name]))]
            timings[name].samples += _elapsed_ms(events)
        rounds += 1
    return timings


def _settle(run: Callable[[], object], ms: float) -> None:
    """`ms`: what a call takes."""
    for _ in range(math.ceil(_SETTLE_MS / ms)):
        run()


def _timed(run: Callable[[], object], flush: torch.Tensor | None = None) -> tuple:
    """Events before and after a call that is only launched."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if flush is not None:
        flush.zero_()
    begin.record()
    run()
    end.record()
    return begin, end


def _elapsed_ms(events: list[tuple]) -> list[float]:
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def _larger_than_l2(device: torch.device) -> torch.Tensor:
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device=device)


def _captured(call: Callable, l2: str) -> tuple[Callable, Timing]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = str(error).strip().splitlines()[0]
        return call, Timing("events", l2, note=f"not captured: {reason}")
    return graph.replay, Timing("graph", l2)


def _on_cpu(calls: dict[str, Callable[[], object]], budget_s: float) -> dict[str, Timing]:
    timings = {name: Timing("clock", "warm") for name in calls}
    began, rounds = time.perf_counter(), 0
    while rounds < FEWEST or (rounds < MOST and time.perf_counter() - began < budget_s):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            timings[name].samples.append((time.perf_counter() - start) * 1e3)
        rounds += 1
    return timings


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most memory that PyTorch's allocator held during the call beyond what it held before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak
