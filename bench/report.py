"""Tables for the terminal."""

from rich.console import Console
from rich.table import Table

from bench.floors import TARGETS
from bench.models import MODELS
from bench.rows import PASSES, Row


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits at least, whole numbers from 100 up; "-" for None."""
    if value is None:
        return "-"
    if value == float("inf"):
        return "runs"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def milliseconds(value: float | None) -> str:
    """Three or more significant digits."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def print_backends(console: Console, found: list, missing: dict[str, str]) -> None:
    """One line a backend: version and library, or why it is missing."""
    for backend in found:
        digest = "" if backend.library_sha256 is None else f", library sha256 {backend.library_sha256[:12]}"
        console.print(f"[green]found[/]   {backend.name}: {backend.version}{digest}")
    for name, reason in missing.items():
        console.print(f"[yellow]missing[/] {name}: {reason}")


def rows_table(rows: list[Row], title: str | None = None) -> Table:
    """Rows as a table; a failed one shows its error."""
    table = Table(title=title, title_justify="left")
    for name in ("case", "pattern", "op", "pass", "backend"):
        table.add_column(name)
    for name in (
        "ms",
        "spread",
        "TFLOP/s",
        "real",
        "MFU",
        "/ FA3",
        "speed-up",
        "limit",
        "of limit",
        "peak GB",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        head = (row.title, row.pattern or "", row.op, row.direction, row.backend)
        if row.status == "failed":
            table.add_row(*head, "[red]failed[/]")
            continue
        rate = number(row.tflops) if row.tb_per_s is None else f"{number(row.tb_per_s)} TB/s"
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}"
        ratios = (number(row.tflops_ratio_to_dense_fa3), number(row.speedup_over_dense_fa3))
        table.add_row(
            *head,
            milliseconds(row.ms_min if row.ms_median is None else row.ms_median),
            milliseconds(row.ms_spread),
            rate,
            number(row.tflops_real),
            percent(row.mfu),
            *ratios,
            row.limit or "-",
            percent(row.limit_fraction),
            peak,
        )
    return table


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


_COLOURS = {
    "aim met": "bold green",
    "floor met": "green",
    "below the floor": "bold red",
    "not measured": "yellow",
}


def targets_table(rows: list[Row]) -> Table:
    """Floors and aims beside what was measured."""
    table = Table(title="Floors and aims", title_justify="left")
    for name in ("part", "case"):
        table.add_column(name)
    for name in ("measured", "floor", "aim"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for target in TARGETS:
        verdict = target.verdict(rows)
        sign = "<= " if target.at_most else ""
        table.add_row(
            target.work,
            target.case,
            f"{number(target.measure(rows))} {target.unit}".strip(),
            sign + number(target.bound(rows)),
            sign + number(target.aim),
            f"[{_COLOURS[verdict]}]{verdict}[/]",
        )
    return table


_WIDTH = 190  # where the output is no terminal


def make_console() -> Console:
    """A console wide enough for the tables when the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


STEPS, GUIDANCE = 50, 2  # of the extrapolation: denoising steps, each with and without the prompt


def speedup_table(rows: list[Row]) -> Table:
    """Whole op against dense FlashAttention-3 at the same shape, by sparsity."""
    table = Table(title="Attention speed-up over dense FlashAttention-3", title_justify="left")
    table.add_column("case")
    for name in ("top-k", "sparsity", "forward", "backward", "forward+backward"):
        table.add_column(name, justify="right")
    found: dict[tuple, dict[str, float | None]] = {}
    for row in rows:
        if row.op == "op" and row.backend == "vsa_cuda" and row.status == "ok":
            key = (row.case, row.pattern, row.topk, row.blocks_total)
            found.setdefault(key, {})[row.direction] = row.speedup_over_dense_fa3
    for (case, pattern, topk, blocks), by_pass in found.items():
        figures = (f"{number(by_pass.get(name))}x" if by_pass.get(name) else "-" for name in PASSES)
        table.add_row(f"{case} {pattern}", str(topk), percent(1 - topk / blocks), *figures)
    return table


def block_table(rows: list[Row]) -> Table:
    """A block's attention, rest and total in ms, and what the totals extrapolate to."""
    table = Table(title="Transformer block, random weights", title_justify="left")
    for name in ("model", "pass", "backend"):
        table.add_column(name)
    for name in ("attention", "rest", "total", "total / dense", "extrapolated*"):
        table.add_column(name, justify="right")
    attention = {(row.case, row.direction, row.backend): row for row in rows if row.op == "block_attention"}
    for row in rows:
        if row.op != "block" or row.status != "ok":
            continue
        inside = attention[row.case, row.direction, row.backend].ms_median
        total = row.ms_median
        video = "-"
        if row.direction == "fwd":
            video = f"{total * MODELS[row.case].layers * STEPS * GUIDANCE / 1e3:.3g} s"
        ratio = None if row.speedup_over_dense_fa3 is None else 1 / row.speedup_over_dense_fa3
        times = (milliseconds(ms) for ms in (inside, total - inside, total))
        table.add_row(row.case, row.direction, row.backend, *times, number(ratio), video)
    table.caption = (
        f"* extrapolated, not measured: total x layers x {STEPS} steps x {GUIDANCE} (guidance); "
        "the transformer alone"
    )
    return table
