"""What the benchmark makes of its rows on a CPU: schema, limits, floors, plots, README.

tests/data/bench_sample_rows.json holds invented figures; nothing in it was measured.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bench import cli, flops, gpu_tests, limits, plots, readme, rows
from bench.floors import TARGETS, find, gather_floor
from bench.roofline import Ceilings
from bench_cases import SAMPLE
from vsa_cuda import _extension

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def sample():
    return rows.read_json(SAMPLE)


def test_sample_rows_are_marked_as_invented(sample):
    assert {row.device for row in sample} == {"INVENTED SAMPLE DATA"}


def test_rows_round_trip(sample, tmp_path):
    file = tmp_path / "rows.json"
    rows.append_json(file, sample[:2])
    rows.append_json(file, sample[2:5])
    assert rows.read_json(file) == sample[:5]
    assert "pass" in json.loads(file.read_text())[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tflops": "500"}, "tflops: got '500'"),
        ({"S": True}, "S: got True"),
        ({"pass": "forward"}, "direction: got 'forward'"),
        ({"backend": "fa4"}, "backend: got 'fa4'"),
        ({"status": "failed"}, "expected none"),
        ({"error": 0.5}, "above tolerance"),
        ({"error": float("nan")}, "above tolerance"),
        ({"gflops": 1.0}, "unknown fields"),
    ],
)
def test_row_schema(sample, change, message):
    with pytest.raises(rows.RowError, match=message):
        rows.Row.from_dict(sample[0].to_dict() | change)


def test_a_row_lacks_no_field(sample):
    values = sample[0].to_dict()
    del values["overlap"]
    with pytest.raises(rows.RowError, match="missing fields .*overlap"):
        rows.Row.from_dict(values)


# Limits and floors


def test_binding_limit():
    ceilings = Ceilings(matmul_tflops=800.0, copy_tb_per_s=4.0, gather_tb_per_s=8.0)
    pairs = 1_000_000
    least = limits.fine_limits(
        ceilings, flops=flops.executed_flops(pairs, 128), pairs=pairs, head_dim=128, tensor_bytes=200_000_000,
        loads=(0.9,), backward=False, clock_mhz=1000.0,
    )  # fmt: skip
    assert least["matmul"] == pytest.approx(4 * 4096 * 128 * 1e6 / 800e12 * 1e3)
    assert least["gather"] == pytest.approx(0.9 * 32768 * 1e6 / 8e12 * 1e3)
    assert least["memory"] == pytest.approx(0.2)
    assert least["exponentials (datasheet)"] == pytest.approx(4096e6 / 2112 / 1e9 * 1e3)
    assert limits.binding(least, 10.0) == ("gather", pytest.approx(least["gather"] / 10))
    assert limits.binding({}, 10.0) == (None, None)
    assert limits.unshared_gather_tflops(ceilings, 1.0) == 512.0


def test_ceilings_from_rows(sample):
    assert Ceilings.from_rows(sample) == Ceilings(790.0, 4.3, 8.0, 2.4)


def test_floors(sample):
    by_case = {(target.work, target.case): target for target in TARGETS}
    forward = by_case["fine forward", "D128 random, over dense FA3"]
    assert forward.measure(sample) == pytest.approx(500 / 620, abs=1e-3)
    # 0.9 * 64 * 8.0 / 0.97 / 620 = 0.766, between 0.70 and 0.85
    assert forward.bound(sample) == pytest.approx(0.766, abs=1e-3)
    assert forward.verdict(sample) == "floor met"
    assert by_case["fine backward", "D128 random, over dense FA3"].verdict(sample) == "below the floor"
    assert by_case["fine forward", "random, over FastVideo"].verdict(sample) == "aim met"
    assert by_case["whole op", "1M tokens H1 k64, step: temporaries"].verdict(sample) == "not measured"
    assert all(target.verdict([]) == "not measured" for target in TARGETS)


def test_gather_floor_stays_between_its_bounds(sample):
    for rate, expected in ((0.1, 0.70), (100.0, 0.85)):
        changed = [replace(row, tb_per_s=rate) if row.case.startswith("gather") else row for row in sample]
        assert gather_floor("floor-d128")(changed) == expected


def test_at_most_targets(sample):
    row = find(sample, "fine", "bwd", "vsa_cuda", "floor-d128")
    target = next(target for target in TARGETS if target.case == "peak of a step, over dense FA3's")
    for peak, verdict in ((104, "aim met"), (109, "floor met"), (111, "below the floor")):
        step = {"op": "op", "direction": "fwd+bwd", "case": "wan-14b-720p", "pattern": "video"}
        measured = [
            replace(row, **step, peak_bytes=peak),
            replace(row, **step, backend="fa3", peak_bytes=100),
        ]
        assert target.verdict(measured) == verdict


# Plots and README


def test_plot_from_sample(sample, tmp_path):
    from matplotlib.image import imread

    file = tmp_path / "plot.png"
    assert cli.main(["plot", str(SAMPLE), "--output", str(file)]) == 0
    image = imread(file)
    assert image.shape[2] == 4 and image.shape[1] > 1500
    assert image[0, 0, 3] == 0 and (image[..., 3] > 0.5).mean() > 0.01
    assert not plots.draw([row for row in sample if row.op == "roofline"], tmp_path / "none.png")


def test_plot_lines(sample):
    fine = [row for row in sample if row.op == "fine"]
    assert all(
        len({row.topk for row in line}) == 1 for line in plots.lines_over_length(fine) if len(line) == 5
    )
    swept = plots.lines_over_sparsity(fine)
    assert {line[0].S for line in swept} == {32_768}
    assert max(len(line) for line in swept) == 5


def test_newest_row_counts(sample):
    older, newer = replace(sample[0], date="2001-01-01"), replace(sample[0], date="2002-01-01")
    assert plots.newest([newer, older]) == [newer]


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("ground", ["#ffffff", "#0d1117"])
def test_plot_colours_show_on_light_and_dark(ground):
    for colour in (*plots.COLOURS.values(), plots.TEXT):
        dark, light = sorted((luminance(colour), luminance(ground)))
        assert (light + 0.05) / (dark + 0.05) >= 3, f"{colour} on {ground}"


def test_ceilings_stay_with_the_run_of_their_rows(sample, tmp_path):
    """A later run's ceilings are shown beside its own rows, and a run without a newest row shows none."""
    fine = next(row for row in sample if row.op == "fine")
    ceiling = next(row for row in sample if row.op == "roofline")
    runs = [("2026-01-01", "python -m bench session --x", "a"), ("2026-01-02", "python -m bench op", "b"),
            ("2025-12-31", "python -m bench fine", "a")]  # fmt: skip
    for date, command, case in runs:
        measured = [replace(row, date=date, command=command) for row in (replace(fine, case=case), ceiling)]
        rows.append_json(tmp_path / f"{date}.json", measured)
    found = readme.result_rows(tmp_path)
    assert sorted((row.op, row.date) for row in found) == sorted(
        (op, date) for op in ("fine", "roofline") for date, _, _ in runs[:2]
    )
    text = readme.section(found)
    assert text.index("--x") < text.index("<details><summary>b") < text.index("python -m bench op")


@pytest.fixture
def page(tmp_path):
    (tmp_path / "results").mkdir()
    file = tmp_path / "README.md"
    file.write_text(f"# title\n\n{readme.BEGIN}\n{readme.END}\n\nEnd.\n")
    return file, tmp_path / "results"


def test_readme_needs_the_section(tmp_path):
    (tmp_path / "README.md").write_text("# title\n")
    assert "no performance section" in readme.check(tmp_path / "README.md", tmp_path)[0]


def test_readme_without_rows_says_so(page):
    assert readme.check(*page)
    readme.write(*page)
    assert readme.check(*page) == [] and readme.NOT_MEASURED in page[0].read_text()


def test_readme_figures_equal_their_rows(page):
    shutil.copy(SAMPLE, page[1] / "h200.json")
    (page[1] / "gpu_tests.json").write_text("{}")
    readme.write(*page)
    text = page[0].read_text()
    assert readme.check(*page) == [] and "invented for tests" in text and readme.PLOT in text
    assert text.startswith("# title") and text.endswith("End.\n")
    figure = next(cell for cell in text.split("|") if cell.strip() == "500")
    page[0].write_text(text.replace(figure, " 512 ", 1))
    assert any("differs" in problem for problem in readme.check(*page))


@pytest.mark.parametrize("figure", ["512 TFLOP/s", "0.73 ms", "80 µs", "4.3 TB/s", "6x faster"])
def test_readme_refuses_figures_elsewhere(page, figure):
    readme.write(*page)
    page[0].write_text(page[0].read_text() + f"\nIt runs at {figure}.\n")
    assert any(figure in problem for problem in readme.check(*page))
    page[0].write_text(page[0].read_text().replace(".\n", ". <!-- cited: arXiv 2505.13389 -->\n"))
    assert not any(figure in problem for problem in readme.check(*page))


def test_this_readme():
    assert readme.check(ROOT / "README.md", ROOT / "bench" / "results") == []


@pytest.mark.skipif(not _extension.is_available(), reason="vsa_cuda._C is not built: it knows the kernels")
def test_sanitizer_findings_are_apart_from_launches_it_gave_up_on():
    lost = (
        "========= Internal Sanitizer Error: The Sanitizer encountered an error while launching {} and didn't"
    )
    text = "\n".join(
        [lost.format("_ZN2at6native"), lost.format("_ZN2at6native"), lost.format("pool_d64_bf16")]
    )
    found = gpu_tests.sanitizer_findings(text + "\n========= ERROR SUMMARY: 5 errors\n17 passed", 60)
    assert found == {"findings": 2, "untracked_launches": 3, "untracked_own": ["pool_d64_bf16"]}
    clean = gpu_tests.sanitizer_findings("========= ERROR SUMMARY: 0 errors", 60)
    assert clean == {"findings": 0, "untracked_launches": 0, "untracked_own": []}
    race = "===== Warning: Race\n========= RACECHECK SUMMARY: 7 hazards displayed (5 errors, 2 warnings)"
    assert gpu_tests.sanitizer_findings(race, 60) == {**clean, "findings": 7}
    assert gpu_tests.sanitizer_findings("....", 60) == {"summary": "no summary within 60 s"}
