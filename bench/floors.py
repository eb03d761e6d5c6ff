"""The project's floors and aims, and how each is read off the rows of a session."""

from collections.abc import Callable
from dataclasses import dataclass

from bench import limits
from bench.roofline import Ceilings
from bench.rows import Row


@dataclass(frozen=True)
class Target:
    """One line of the floors tables. `measure` gives the figure, or None where a row is missing.

    at_most: floor and aim are upper bounds.
    """

    work: str  # what the figure belongs to
    case: str
    measure: Callable[[list[Row]], float | None]
    floor: float | Callable[[list[Row]], float | None]
    aim: float
    unit: str = ""
    at_most: bool = False

    def bound(self, rows: list[Row]) -> float | None:
        return self.floor(rows) if callable(self.floor) else self.floor

    def verdict(self, rows: list[Row]) -> str:
        """ "not measured", "below the floor", "floor met" or "aim met"."""
        value, floor = self.measure(rows), self.bound(rows)
        if value is None or floor is None:
            return "not measured"
        sign = -1 if self.at_most else 1
        if sign * value >= sign * self.aim:
            return "aim met"
        return "floor met" if sign * value >= sign * floor else "below the floor"


def find(
    rows: list[Row], op: str, direction: str, backend: str, case: str, pattern: str | None = None
) -> Row | None:
    """The newest row that is ok. The floors are those of a warm L2."""
    wanted = (op, direction, backend, case)
    found = [
        row
        for row in rows
        if (row.op, row.direction, row.backend, row.case) == wanted
        and row.status == "ok"
        and row.l2 != "cold"
        and pattern in (None, row.pattern)
    ]
    return max(found, key=lambda row: row.date, default=None)


def _figure(name: str, *key) -> Callable:
    def measure(rows):
        row = find(rows, *key)
        return None if row is None else getattr(row, name)

    return measure


def _ratio(over: tuple, under: tuple, name: str = "ms_median") -> Callable:
    """`name` of the row `over` divided by that of the row `under`."""

    def measure(rows):
        above, below = find(rows, *over), find(rows, *under)
        return None if above is None or below is None else getattr(above, name) / getattr(below, name)

    return measure


def _to_dense(direction: str, case: str, pattern: str) -> Callable:
    return _figure("tflops_ratio_to_dense_fa3", "fine", direction, "vsa_cuda", case, pattern)


def _over_fastvideo(op: str, direction: str, case: str, pattern: str) -> Callable:
    return _ratio((op, direction, "fastvideo", case, pattern), (op, direction, "vsa_cuda", case, pattern))


def gather_floor(case: str) -> Callable:
    """The smaller of 0.85 and 0.9 of the ratio that the measured gather allows; never under 0.70."""

    def floor(rows):
        ours = find(rows, "fine", "fwd", "vsa_cuda", case, "random")
        dense = find(rows, "fine", "fwd", "fa3", case, "random")
        if ours is None or dense is None:
            return None
        reachable = limits.unshared_gather_tflops(Ceilings.from_rows(rows), ours.overlap)
        return None if reachable is None else max(0.70, min(0.85, 0.9 * reachable / dense.tflops))

    return floor


def _overhead_us(case: str) -> Callable:
    def measure(rows):
        whole, fine = (find(rows, op, "fwd", "vsa_cuda", case, "video") for op in ("op", "fine"))
        return None if whole is None or fine is None else (whole.ms_median - fine.ms_median) * 1e3

    return measure


def _overhead_percent(direction: str, case: str) -> Callable:
    def measure(rows):
        whole, fine = (find(rows, op, direction, "vsa_cuda", case, "video") for op in ("op", "fine"))
        return None if whole is None or fine is None else (whole.ms_median / fine.ms_median - 1) * 100

    return measure


def _dense_op(rows):
    """Whole op with every cube chosen, over dense FlashAttention-3 plus the coarse stage."""
    case = "floor-d128"
    whole = find(rows, "op", "fwd", "vsa_cuda", case, "dense")
    dense = find(rows, "op", "fwd", "fa3", case, "dense")
    coarse = find(rows, "coarse_forward", "fwd", "vsa_cuda", case, "dense")
    if whole is None or dense is None or coarse is None:
        return None
    return whole.ms_median / (dense.ms_median + coarse.ms_median)


def _million_gb(rows):
    row = find(rows, "op", "fwd+bwd", "vsa_cuda", "million")
    if row is None or row.peak_bytes is None:
        return None
    # out, dq, dk, dv are outputs, not temporaries.
    return (row.peak_bytes - 4 * row.B * row.H * row.S * row.D * 2) / 1e9


_FORWARD, _BACKWARD, _AROUND = "fine forward", "fine backward", "whole op"
_SMALL_OP = "wan-1.3b-448p"
TARGETS = [
    Target(_FORWARD, "D128 random, over dense FA3", _to_dense("fwd", "floor-d128", "random"),
           gather_floor("floor-d128"), 1.00),
    Target(_FORWARD, "D64 random, over dense FA3", _to_dense("fwd", "floor-d64", "random"),
           gather_floor("floor-d64"), 1.00),
    Target(_FORWARD, "video lists, over dense FA3", _to_dense("fwd", "video-h24", "video"), 0.95, 1.00),
    Target(_FORWARD, "dense index, over dense FA3", _to_dense("fwd", "floor-d128", "dense"), 0.95, 1.00),
    Target(_FORWARD, "random, over FastVideo", _over_fastvideo("fine", "fwd", "floor-d128", "random"),
           1.05, 1.2, "x"),
    Target(_FORWARD, "video, over FastVideo", _over_fastvideo("fine", "fwd", "video-h24", "video"),
           1.15, 1.4, "x"),
    Target(_FORWARD, "H7 S109,632 random", _figure("tflops", "fine", "fwd", "vsa_cuda", "flashinfer-h7-109k"),
           420, 520, "TFLOP/s"),
    Target(_BACKWARD, "D128 random, over dense FA3", _to_dense("bwd", "floor-d128", "random"), 0.70, 0.85),
    Target(_BACKWARD, "D64 random, over dense FA3", _to_dense("bwd", "floor-d64", "random"), 0.75, 0.95),
    Target(_BACKWARD, "video lists, over dense FA3", _to_dense("bwd", "video-h24", "video"), 0.80, 0.95),
    Target(_BACKWARD, "dense index, over dense FA3", _to_dense("bwd", "floor-d128", "dense"), 0.90, 1.00),
    Target(_BACKWARD, "random, over FastVideo", _over_fastvideo("fine", "bwd", "floor-d128", "random"),
           1.15, 1.4, "x"),
    Target(_BACKWARD, "video, over FastVideo", _over_fastvideo("fine", "bwd", "video-h24", "video"),
           1.3, 1.6, "x"),
    # These have a floor alone; the aim repeats it.
    Target(_BACKWARD, "delta, share of copy bandwidth",
           _figure("limit_fraction", "combine_backward", "bwd", "vsa_cuda", "video-h24"), 0.80, 0.80),
    Target(_BACKWARD, "transposed index over backward",
           _ratio(("transpose_index", "bwd", "vsa_cuda", "video-h24", "video"),
                  ("fine", "bwd", "vsa_cuda", "video-h24", "video")), 0.03, 0.03, at_most=True),
    Target(_AROUND, "16x28x52 H12 k32: op - fine", _overhead_us(_SMALL_OP),
           110, 80, "us", at_most=True),
    Target(_AROUND, "21x45x80 H40 0.9, forward: over fine", _overhead_percent("fwd", "wan-14b-720p"),
           10, 5, "%", at_most=True),
    Target(_AROUND, "21x45x80 H40 0.9, backward: over fine", _overhead_percent("bwd", "wan-14b-720p"),
           20, 10, "%", at_most=True),
    Target(_AROUND, "forward, over FastVideo", _over_fastvideo("op", "fwd", _SMALL_OP, "video"),
           2, 3, "x"),
    Target(_AROUND, "fwd+bwd, over FastVideo", _over_fastvideo("op", "fwd+bwd", _SMALL_OP, "video"),
           2, 3, "x"),
    Target(_AROUND, "every cube chosen, over FA3 + coarse", _dense_op, 1.05, 1.05, at_most=True),
    Target(_AROUND, "peak of a step, over dense FA3's",
           _ratio(("op", "fwd+bwd", "vsa_cuda", "wan-14b-720p", "video"),
                  ("op", "fwd+bwd", "fa3", "wan-14b-720p", "video"), "peak_bytes"), 1.10, 1.05, at_most=True),
    # The floor is that it runs: any figure at all.
    Target(_AROUND, "1M tokens H1 k64, step: temporaries", _million_gb, float("inf"), 10, "GB", at_most=True),
]  # fmt: skip
