"""A PNG of result rows: TFLOP/s and ratio to dense FlashAttention-3, over length and over sparsity."""

from collections import defaultdict
from pathlib import Path

from bench.rows import Row

# Transparent ground: every colour keeps a contrast of at least 3 to white and to GitHub's dark #0d1117.
COLOURS = {
    "vsa_cuda": "#d9480f",
    "fa3": "#4c6ef5",
    "fastvideo": "#0c8599",
    "flex": "#2f9e44",
    "cudnn": "#be4bdb",
    "torch": "#868e96",
}
TEXT = "#7d858d"
_MARKERS = {"random": "o", "video": "s", "dense": "D"}
_LABELS = {"vsa_cuda": "VSA (this package)", "fa3": "FlashAttention-3, dense", "fastvideo": "FastVideo VSA",
           "flex": "FlexAttention", "cudnn": "cuDNN, dense", "torch": "PyTorch, dense"}  # fmt: skip
_DIRECTIONS = {"fwd": "forward", "bwd": "backward"}
_WIDTHS = {64: 1, 128: 2.5}  # of lines, by head_dim


def draw(rows: list[Row], path: Path) -> bool:
    """Writes the PNG from the fine-stage rows; returns False when none of them has a TFLOP/s figure.

    Left: over tokens, at one list length or sparsity; right: over sparsity, at one shape. Solid lines are
    forward, dashed ones backward. Where a case was measured again the newest row counts.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = newest([row for row in rows if row.op == "fine" and row.direction in _DIRECTIONS and row.tflops])
    if not rows:
        return False
    figure = Figure(figsize=(12, 7.4), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    _draw_column(axes[:, 0], lines_over_length(rows), "tokens", lambda row: row.S)
    _draw_column(axes[:, 1], lines_over_sparsity(rows), "sparsity, %", _sparsity_percent)
    axes[0, 0].set_xscale("log", base=2)
    _name_lengths(axes[1, 0], sorted({row.S for row in rows}))
    axes[0, 0].set_ylabel("TFLOP/s, executed pairs")
    axes[1, 0].set_ylabel("ratio to dense FlashAttention-3")
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylim(bottom=0)
    _legend(figure, rows)
    figure.suptitle(_title(rows), color=TEXT, fontsize=12, x=0.06, ha="left", weight="bold")
    figure.tight_layout(rect=(0, 0.09, 1, 0.98))
    figure.savefig(path, transparent=True)
    return True


def newest(rows: list[Row]) -> list[Row]:
    """The last measured row of every key."""
    return list({row.key: row for row in sorted(rows, key=lambda row: row.date or "")}.values())


def _sparsity_percent(row: Row) -> float:
    return 100 * (1 - row.topk / row.blocks_total)


def lines_over_length(rows: list[Row]) -> list[list[Row]]:
    """Rows that differ in length alone: the list, or the share of cubes in it, stays the same."""
    by_topk = _group(rows, lambda row: (row.H, row.topk), lambda row: row.S)
    by_share = _group(rows, lambda row: (row.H, round(_sparsity_percent(row))), lambda row: row.S)
    return _longest(by_topk + by_share)


def lines_over_sparsity(rows: list[Row]) -> list[list[Row]]:
    """Rows that differ in sparsity alone, of the shapes measured at several; of all shapes if none was."""
    lines = _group(rows, lambda row: (row.H, row.S), _sparsity_percent)
    swept = {(line[0].H, line[0].S, line[0].D) for line in lines if len(line) > 1}
    return [line for line in lines if not swept or (line[0].H, line[0].S, line[0].D) in swept]


def _group(rows: list[Row], alike, x) -> list[list[Row]]:
    """Lists sorted by x, one row an x; rows of a line share what `alike` gives."""
    groups = defaultdict(dict)
    for row in rows:
        groups[(row.backend, row.direction, row.pattern, row.D, *alike(row))][x(row)] = row
    return [[line[key] for key in sorted(line)] for line in groups.values()]


def _longest(lines: list[list[Row]]) -> list[list[Row]]:
    """Without the single points of a backend, pass, pattern and head_dim that has a line."""

    def kind(line):
        return line[0].backend, line[0].direction, line[0].pattern, line[0].D

    swept = {kind(line) for line in lines if len(line) > 1}
    return [line for line in lines if len(line) > 1 or kind(line) not in swept]


def _draw_column(axes, lines: list[list[Row]], label: str, x) -> None:
    for line in lines:
        first = line[0]
        style = {
            "color": COLOURS[first.backend],
            "linestyle": "-" if first.direction == "fwd" else "--",
            "marker": _MARKERS[first.pattern],
            "markersize": 3 if first.D == 64 else 6,
            "linewidth": _WIDTHS[first.D],
        }
        axes[0].plot([x(row) for row in line], [row.tflops for row in line], **style)
        rated = [row for row in line if row.tflops_ratio_to_dense_fa3 is not None and row.backend != "fa3"]
        axes[1].plot([x(row) for row in rated], [row.tflops_ratio_to_dense_fa3 for row in rated], **style)
    axes[1].axhline(1.0, color=COLOURS["fa3"], linewidth=2)
    axes[1].set_xlabel(label)
    for axis in axes:
        axis.set_facecolor("none")
        axis.grid(color=TEXT, alpha=0.25)
        axis.tick_params(colors=TEXT, labelsize=10)
        axis.xaxis.label.set_color(TEXT)
        axis.yaxis.label.set_color(TEXT)
        for spine in axis.spines.values():
            spine.set_color(TEXT)


def _name_lengths(axis, lengths: list[int]) -> None:
    """Ticks at the measured lengths that are far enough apart to read."""
    kept = []
    for length in lengths:
        if not kept or length > 1.35 * kept[-1]:
            kept.append(length)
    axis.set_xticks(kept, [f"{length / 1024:.0f}k" if length >= 1024 else str(length) for length in kept])
    axis.minorticks_off()


def _legend(figure, rows: list[Row]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linewidth=3, label=_LABELS[name])
        for name, colour in COLOURS.items()
        if any(row.backend == name for row in rows)
    ]
    for direction, style in (("fwd", "-"), ("bwd", "--")):
        if any(row.direction == direction for row in rows):
            handles.append(
                Line2D([], [], color=TEXT, linestyle=style, linewidth=2, label=_DIRECTIONS[direction])
            )
    for dim, width in _WIDTHS.items():
        if any(row.D == dim for row in rows):
            handles.append(Line2D([], [], color=TEXT, linewidth=width, label=f"head_dim {dim}"))
    for pattern, marker in _MARKERS.items():
        if any(row.pattern == pattern for row in rows):
            handles.append(Line2D([], [], color=TEXT, linestyle="", marker=marker, label=f"{pattern} lists"))
    figure.legend(handles=handles, loc="lower left", ncols=5, frameon=False, labelcolor=TEXT, fontsize=10,
                  bbox_to_anchor=(0.04, 0.0))  # fmt: skip


def _title(rows: list[Row]) -> str:
    dims = "/".join(str(dim) for dim in sorted({row.D for row in rows}))
    devices = ", ".join(sorted({row.device or "unknown device" for row in rows}))
    dates = sorted({(row.date or "")[:10] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"Fine stage, blocks of 64x64, head_dim {dims} - {devices}, {when}"
