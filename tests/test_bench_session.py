"""The benchmark's GPU session on a CPU: hangs and crashes of a worker, and the roofline programs' build."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from bench import backends, cli, roofline, rows, shapes
from bench.cases import session
from bench.floors import TARGETS
from bench.models import MODELS
from bench.runner import Options, Runner
from bench_cases import SAMPLE, fake_fa3, fake_fastvideo, found_fa3, one_thread  # noqa: F401

# Notes the cases it is told as work_through does; "hang" and "crash" do what they say.
WORKER = """
import json, os, sys, time
progress, log, names = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
def note(name, done):
    with open(progress + ".partial", "w") as file:
        json.dump({"case": name, "started": time.time(), "done": done}, file)
    os.replace(progress + ".partial", progress)
for name in names:
    note(name, False)
    with open(log, "a") as file:
        file.write(name + "\\n")
    if name == "hang":
        time.sleep(60)
    if name == "crash":
        os.abort()
    if name == "lost":
        note(name, True)
        sys.exit(3)
note(None, True)
if "slow" in names:
    time.sleep(1.5)
"""


def runner_into(file, found=()):
    return Runner(Options(torch.device("cpu"), budget_s=0.01, json=file), list(found))


@pytest.fixture
def supervised(tmp_path):
    """(log, rows, exit code) of a session over the named cases."""

    def run(*names, timeout_s=1.5, seconds=30.0):
        (tmp_path / "worker.py").write_text(WORKER)
        progress, log, file = (tmp_path / name for name in ("progress", "log", "rows.json"))
        command = [sys.executable, str(tmp_path / "worker.py"), str(progress), str(log)]
        cases = [session.Case(name, lambda runner, video: None, timeout_s) for name in names]
        code = session.supervise(
            runner_into(file), command, progress, seconds=seconds, names=list(names), cases=cases
        )
        return log.read_text().split(), rows.read_json(file) if file.exists() else [], code

    return run


def test_session_runs_every_case_once(supervised):
    assert supervised("a", "b", "c") == (["a", "b", "c"], [], 0)


def test_a_worker_may_take_its_time_to_end(supervised, monkeypatch):
    monkeypatch.setattr(session, "_START_S", 1.0)
    assert supervised("a", "slow") == (["a", "slow"], [], 0)


def test_session_outlives_hangs_and_crashes(supervised):
    log, failed, code = supervised("a", "hang", "b", "crash", "c", "lost", "d")
    assert log == ["a", "hang", "b", "crash", "c", "lost", "d"] and code == 1
    assert [(row.case, row.status) for row in failed] == [("hang", "failed"), ("crash", "failed")]
    assert "killed after" in failed[0].note and "died" in failed[1].note


def test_session_ends_with_its_time(supervised, capsys):
    log, failed, code = supervised("hang", "b", timeout_s=60.0, seconds=3.0)
    assert log == ["hang"] and failed == [] and code == 1
    text = capsys.readouterr().out
    assert "not run: hang" in text and "not run: b" in text and "Floors and aims" in text


def test_worker_measures_and_records(tmp_path, capsys):
    file, progress = tmp_path / "rows.json", tmp_path / "progress"
    shutil.copy(SAMPLE, file)
    runner = runner_into(file, [backends.Vsa()])

    def measured(runner, video):
        runner.fine(session.make_problem(shapes.SHAPES["tiny"], "random", device="cpu"), "fwd")

    def raising(runner, video):
        raise ValueError("no such clip")

    cases = [session.Case("fine a fwd", raising), session.Case("fine b fwd", measured)]
    assert session.work_through(runner, None, [case.name for case in cases], progress, cases) == 1
    assert runner.ceilings.gather_tb_per_s == 8.0  # from the rows of an earlier worker
    failed, fine = rows.read_json(file)[-2:]
    assert (failed.status, failed.case, failed.op) == ("failed", "fine a fwd", "fine")
    assert "no such clip" in failed.note and fine.status == "ok" and fine.limit == "gather"
    assert json.loads(progress.read_text())["done"]


def test_worker_command_parses_back(monkeypatch, tmp_path):
    """What the parent passes on, the worker understands."""
    seen = {}
    monkeypatch.setattr(cli, "no_gpu_reason", lambda: None)
    monkeypatch.setattr(
        session, "supervise", lambda runner, command, *a, **k: seen.update(command=command) or 0
    )
    options = [
        "--fa3-library",
        "f.so",
        "--l2",
        "cold",
        "--no-graphs",
        "--commit",
        "abc",
        "--video-tokens",
        "t.pt",
    ]
    assert cli.main(["session", "--json", str(tmp_path / "rows.json"), *options]) == 0
    args = cli.build_parser().parse_args([*seen["command"][3:], "roofline"])
    assert args.cases == "roofline" and args.worker_progress is not None and args.no_graphs
    assert (args.l2, args.commit, args.fa3_library.name, args.video_tokens.name) == (
        "cold",
        "abc",
        "f.so",
        "t.pt",
    )
    assert args.session_command.startswith("python -m bench") and args.session_date
    assert args.fa3_library.is_absolute() and args.json == tmp_path / "rows.json"


@pytest.mark.usefixtures("fake_fa3")
def test_every_case_runs_and_the_floors_are_read(monkeypatch, tmp_path, capsys):
    """The whole session at a small shape, with PyTorch behind the peers' names."""
    from bench import patterns
    from bench.cases import block

    small = {"video_shape": (4, 8, 9), "tokens": 0, "heads": 1, "topk": 2, "sparsity": None}
    shrunk = {name: replace(shape, **small) for name, shape in shapes.SHAPES.items()}
    models = {name: replace(MODELS["tiny"], shape=shrunk["tiny"]) for name in MODELS}
    monkeypatch.setattr(session, "SHAPES", shrunk)
    monkeypatch.setattr(block, "MODELS", models)
    # A CPU has no allocator to ask: 1 GB stands for every peak.
    monkeypatch.setattr("bench.runner.peak_bytes", lambda call, device: call() and 10**9)
    monkeypatch.setattr("bench.timing.FEWEST", 1)
    tokens = tmp_path / "tokens.pt"
    torch.save(torch.randn(4, 8, 9, 48, generator=torch.Generator().manual_seed(0)), tokens)
    file = tmp_path / "rows.json"
    rows.append_json(file, [row for row in rows.read_json(SAMPLE) if row.op == "roofline"])
    runner = runner_into(file, [backends.Vsa(), found_fa3(monkeypatch), fake_fastvideo(monkeypatch)])
    runner.options.budget_s = 0.0
    names = [case.name for case in session.CASES if case.name != "roofline"]
    made = {}
    for name in names:
        before, source = len(runner.rows), patterns.VideoSource(tokens)
        code = session.work_through(runner, source, [name], tmp_path / "progress")
        made[name] = runner.rows[before:]
        assert code == 0, [row.note for row in made[name] if row.status == "failed"]
    assert [target.case for target in TARGETS if target.measure(rows.read_json(file)) is None] == []
    # A session that runs out of time has read the floors first.
    needed = []
    for name in names:
        others = [row for row in rows.read_json(file) if row not in made[name]]
        needed.append(any(target.measure(others) is None for target in TARGETS))
    assert session.CASES[0].name == "roofline" and needed == sorted(needed, reverse=True)
    assert {name for name, flag in zip(names, needed, strict=True) if not flag} == {
        name for name in names if name.startswith(("block ", "fine floor-d64 dense ", "fine paper-fig4-"))
    }
    assert {row.backend for row in runner.rows} == {"vsa_cuda", "fa3", "fastvideo"}
    text = capsys.readouterr().out
    assert all(name in text for name in names)


def have_nvcc():
    try:
        return bool(roofline.find_nvcc())
    except RuntimeError:
        return False


@pytest.mark.skipif(not have_nvcc(), reason="needs nvcc")
@pytest.mark.parametrize("name", roofline.PROGRAMS)
def test_roofline_programs_compile(name, tmp_path):
    ptx = roofline.compile_program(name, tmp_path, ("-ptx",)).read_text()
    instruction = {"gather": "cp.async.bulk.tensor.5d", "reduce": "cp.reduce.async.bulk.global.shared::cta"}[
        name
    ]
    assert instruction in ptx and ".target sm_90a" in ptx
