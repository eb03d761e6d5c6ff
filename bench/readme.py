"""README's performance section: written from bench/results, and checked against it.

The section is what stands between BEGIN and END in README.md. It is made from the rows, so that a check is to
make it again and compare. Elsewhere in README no speed may be stated, unless the line says where it is from
with `<!-- cited: SOURCE -->`.
"""

import re
from collections import defaultdict
from pathlib import Path

from bench.plots import draw, newest
from bench.report import milliseconds, number, percent
from bench.rows import Row, read_json
from bench.shapes import UsageError

BEGIN = "<!-- bench: begin (python -m bench readme --write) -->"
END = "<!-- bench: end -->"
CITED = re.compile(r"<!-- cited: .+? -->")
NOT_MEASURED = "not yet measured"
PLOT = "performance.png"
_NOT_ROWS = "gpu_tests.json"
_FIGURE = re.compile(
    r"\d[\d.,]*\s*(?:[TG]FLOP/?s?\b|[TG]B/s|[mµu]s\b|(?:x|×|times) (?:faster|FlashAttention))"
)
_TITLES = {"fine": "Fine stage", "op": "Whole op", "block": "Transformer block, random weights",
           "roofline": "Ceilings measured in the same run"}  # fmt: skip

_FIGURES = ("ms", "TFLOP/s", "real tokens", "/ FA3 dense", "speed-up", "limit")


def result_rows(results: Path) -> list[Row]:
    """Rows of every result file, the newest of each case, and the ceilings of the runs they are from."""
    files = sorted(path for path in results.glob("*.json") if path.name != _NOT_ROWS)
    rows = [row for path in files for row in read_json(path)]
    cases = newest([row for row in rows if row.op != "roofline"])
    runs = {(row.date, row.command) for row in cases}
    return cases + [row for row in rows if row.op == "roofline" and (row.date, row.command) in runs]


def section(rows: list[Row]) -> str:
    """The text between the marks, made from `rows`."""
    rows = [row for row in rows if row.status == "ok"]
    if not rows:
        return f"Performance is {NOT_MEASURED}."
    runs = defaultdict(list)
    for row in rows:
        runs[row.date, row.device, row.torch, row.cuda, row.commit, row.dirty, row.command].append(row)
    parts = []
    for run, measured in sorted(runs.items(), key=lambda item: str(item[0])):
        tables = []
        for op in _TITLES:
            found = [row for row in measured if row.op == op]
            if found:
                tables += [f"**{_TITLES[op]}**", _table(op, found)]
        # A session stands open, other runs unfold.
        if " session " in run[-1]:
            parts += [_run_line(*run), *tables]
        else:
            cases = ", ".join(sorted({row.title for row in measured if row.op != "roofline"}))
            parts += [f"<details><summary>{cases}</summary>", _run_line(*run), *tables, "</details>"]
    return "\n\n".join(parts)


def _run_line(date, device, torch, cuda, commit, dirty, command) -> str:
    tree = f"commit {(commit or 'unknown')[:12]}{' with changes' if dirty else ''}"
    return f"{device}, torch {torch}, CUDA {cuda}, {date[:10]}, {tree}: `{command}`"


def _table(op: str, rows: list[Row]) -> str:
    if op == "roofline":
        names = ("ceiling", "TFLOP/s", "TB/s")
        cells = [(row.title, number(row.tflops), number(row.tb_per_s)) for row in rows]
    else:
        names = ("case", "lists", "top-k", "pass", "backend", *_FIGURES)
        cells = [
            (
                row.title,
                row.pattern,
                f"{row.topk} of {row.blocks_total}",
                row.direction,
                f"{row.backend} ({row.backend_version})",
                milliseconds(row.ms_median),
                number(row.tflops),
                number(row.tflops_real),
                number(row.tflops_ratio_to_dense_fa3),
                number(row.speedup_over_dense_fa3),
                "-" if row.limit is None else f"{row.limit}, {percent(row.limit_fraction)}",
            )
            for row in rows
        ]
    lines = [names, ["---"] * len(names), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def check(readme: Path, results: Path) -> list[str]:
    """What is wrong with README's figures; empty when each of them equals its row."""
    text = readme.read_text()
    parts = _split(text)
    problems = []
    if parts is None:
        outside = text
        problems.append(f"no performance section: add the lines {BEGIN} and {END}")
    else:
        before, inside, after = parts
        outside = before + after
        if inside.strip() != _with_plot(section(result_rows(results)), results).strip():
            problems.append(
                "the performance section differs from bench/results; run python -m bench readme --write"
            )
    for line in outside.splitlines():
        found = _FIGURE.search(line)
        if found and not CITED.search(line):
            problems.append(
                f"{found[0]!r} stands outside the performance section with no <!-- cited: SOURCE -->"
            )
    return problems


def write(readme: Path, results: Path) -> None:
    """Puts the section between the marks, its plot beside the results. Raises UsageError without marks."""
    parts = _split(readme.read_text())
    if parts is None:
        raise UsageError(f"{readme}: expected the lines {BEGIN} and {END}; add them where the figures belong")
    rows = result_rows(results)
    draw(rows, results / PLOT)
    readme.write_text(f"{parts[0]}{BEGIN}\n{_with_plot(section(rows), results)}\n{END}{parts[2]}")


def _with_plot(text: str, results: Path) -> str:
    if not (results / PLOT).is_file():
        return text
    return f"{text}\n\n![TFLOP/s over length and sparsity](bench/results/{PLOT})"


def _split(text: str) -> tuple[str, str, str] | None:
    """(before BEGIN, between, after END), or None without the marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        return None
    before, rest = text.split(BEGIN)
    inside, after = rest.split(END)
    return before, inside, after
