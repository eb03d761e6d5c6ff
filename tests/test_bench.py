"""The benchmark on a CPU: FLOP counts, shapes, lists, backends, refusals, timing, commands."""

import itertools
import types
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from bench import backends, cli, floors, flops, machine, patterns, roofline, rows, shapes, timing
from bench.backends import flex
from bench.backends.flex import block_mask
from bench.backends.tiles import Tiling
from bench.cases import block, coarse
from bench.runner import Options, Runner
from bench_cases import (  # noqa: F401
    TINY,
    fake_fa3,
    fake_fastvideo,
    found_fa3,
    one_thread,
    tiny_problem,
)
from vsa_cuda.geometry import CubeGrid


def quiet_runner(found, **options):
    return Runner(Options(torch.device("cpu"), budget_s=0.01, **options), found)


# FLOPs and the paper's accounting


def test_executed_flops_of_dense_lists_are_dense_flops():
    problem = patterns.make_problem(replace(TINY, video_shape=(4, 8, 8)), "dense", device="cpu")
    lists = problem.kv_num_blocks, problem.kv_indices
    dense = flops.dense_flops(1, 2, 256, 64)
    assert dense == 4 * 2 * 256 * 256 * 64
    assert flops.executed_flops(problem.pairs, 64) == dense
    assert flops.real_flops(problem.grid, *lists, 64) == dense
    assert flops.executed_flops(problem.pairs, 64, backward=True) == 2.5 * dense


def test_real_flops_count_token_pairs(seed):
    problem = tiny_problem(seed=seed)
    problem.kv_num_blocks[0, 1, 3] = 2  # a shorter list: what follows it must not count
    sizes = problem.grid.cube_sizes().tolist()
    pairs = 0
    for head in range(2):
        for cube, listed in enumerate(problem.kv_indices[0, head].tolist()):
            pairs += sum(
                sizes[cube] * sizes[block] for block in listed[: problem.kv_num_blocks[0, head, cube]]
            )
    counted = flops.real_flops(problem.grid, problem.kv_num_blocks, problem.kv_indices, 64)
    assert counted == 4 * 64 * pairs
    assert counted < flops.executed_flops(problem.pairs, 64)


def test_paper_accounting():
    assumed = flops.TrainingFlops()
    assert assumed.attention == 14 * 16384 * 1024 * 24
    assert assumed.attention_cut == 8
    assert assumed.reduction == pytest.approx(2.56, abs=0.005)
    assert flops.TrainingFlops(dim=1000).reduction == pytest.approx(2.53, abs=0.005)
    assert flops.implied_attention_share(2.53, 8) == pytest.approx(0.691, abs=0.0005)
    assert flops.TrainingFlops(gate_projections=1).reduction < assumed.reduction


def test_flops_command_prints_assumptions(capsys, tmp_path):
    assert cli.main(["flops", "--rows"]) == 0
    text = capsys.readouterr().out
    for words in ("2.56x", "2.53x", "assumed", "69.1 %", "not yet measured"):
        assert words in text


# Shapes


@pytest.mark.parametrize(
    ("name", "tokens", "heads", "head_dim", "topk", "cubes"),
    [
        ("wan-1.3b-480p", 32_760, 12, 128, 63, 624),
        ("wan-1.3b-448p", 23_296, 12, 128, 32, 364),
        ("wan-14b-720p", 75_600, 40, 128, 144, 1440),
        ("hunyuan-720p", 118_800, 24, 128, 216, 2160),
        ("flashinfer-h7-109k", 109_632, 7, 128, 64, 1713),
        ("floor-d64", 32_768, 24, 64, 64, 512),
        ("paper-fig4-131k", 131_072, 16, 64, 256, 2048),
        ("sweep-8k", 8_192, 24, 128, 64, 128),
        ("million", 1_048_576, 1, 128, 64, 16_384),
    ],
)
def test_shapes(name, tokens, heads, head_dim, topk, cubes):
    shape = shapes.SHAPES[name]
    assert (shape.num_tokens, shape.heads, shape.head_dim) == (tokens, heads, head_dim)
    assert (shape.resolved_topk, shape.grid.num_cubes) == (topk, cubes)


def test_custom_shapes():
    grid, tokens = shapes.find_shapes("3x5x7,1000", heads=4, head_dim=64)
    assert grid.grid == CubeGrid((3, 5, 7)) and tokens.grid == CubeGrid.linear(1000)
    assert grid.heads == tokens.heads == 4
    assert [shape.name for shape in shapes.find_shapes("sweep")][0] == "sweep-8k"
    with pytest.raises(ValueError, match="expected a grid such as"):
        shapes.find_shapes("3x5")


# Lists


def test_random_lists_are_seeded_ascending_sets(seed):
    first, again, other = (tiny_problem(seed=s).kv_indices for s in (seed, seed, seed + 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.int32 and first.shape == (1, 2, 18, 5)
    assert bool((first[..., 1:] > first[..., :-1]).all()) and int(first.max()) < 18


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("group", [2, 3])
def test_loads_per_pair(seed, group, by_key):
    problem = tiny_problem(seed=seed)
    time, height, width = problem.grid.cubes_shape
    order = [(t * height + h) * width + w for h in range(height) for w in range(width) for t in range(time)]
    loads = 0
    for lists in problem.kv_indices[0].tolist():
        sets = [set(listed) for listed in lists]
        if by_key:
            sets = [{cube for cube, listed in enumerate(lists) if key in listed} for key in range(len(lists))]
        members = [sets[cube] for cube in order]
        loads += sum(len(set().union(*members[i : i + group])) for i in range(0, len(members), group))
    found = patterns.loads_per_pair(problem.grid, problem.kv_num_blocks, problem.kv_indices, group, by_key)
    assert found == pytest.approx(loads / problem.pairs)


def test_video_lists_are_the_demos(monkeypatch, tmp_path):
    from vsa_cuda.demo import features, video

    frames = torch.randint(
        0, 256, (17, 96, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for module in (features, video):
        monkeypatch.setattr(module, "read_frames", lambda path, num_frames, size: frames[:num_frames])
    monkeypatch.setattr(video, "find_clip", lambda clip: "clip.mp4")
    grid = (5, 6, 8)
    expected = features.clip_to_block_lists("clip.mp4", grid, topk=3, heads=2, head_dim=64)
    shape = shapes.Shape("clip", 2, 64, grid, topk=3)
    problem = patterns.make_problem(shape, "video", device="cpu")
    assert all(
        torch.equal(*pair) for pair in zip((problem.kv_num_blocks, problem.kv_indices), expected, strict=True)
    )

    saved = tmp_path / "tokens.pt"
    assert cli.main(["tokens", "--grid", "5x6x8", "--output", str(saved)]) == 0
    source = patterns.VideoSource(saved)
    assert source.tokens((3, 4, 5)).shape == (3, 4, 5, features.TOKEN_CHANNELS)
    with pytest.raises(ValueError, match="expected at least"):
        source.tokens((6, 6, 8))


# Backends


def test_discovery_lists_what_is_missing(tmp_path):
    found, missing = backends.discover(fa3_library=tmp_path / "none.so", peers=tmp_path)
    assert [backend.name for backend in found][0] == "vsa_cuda"
    assert {"fa3", "fastvideo"} <= set(missing)
    assert "peers.py" in missing["fastvideo"] and "none.so" in missing["fa3"]
    assert set(missing) | {backend.name for backend in found} == set(backends.NAMES)


@pytest.mark.usefixtures("fake_fa3")
def test_fa3_from_the_peers_folder(tmp_path):
    (tmp_path / "peers.py").write_text("def fa3():\n    pass\n")
    found, missing = backends.discover(("fa3",), peers=tmp_path)
    assert not missing and "get_peers" in found[0].version


@pytest.mark.usefixtures("fake_fa3")
@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd+bwd"])
def test_backends_agree_and_ratios_are_filled(direction, monkeypatch, tmp_path):
    found = [backends.Vsa(), found_fa3(monkeypatch), fake_fastvideo(monkeypatch), backends.TorchDense()]
    runner = quiet_runner(found, json=tmp_path / "rows.json")
    measured = runner.fine(tiny_problem(), direction)
    assert [(row.backend, row.status) for row in measured] == [(backend.name, "ok") for backend in found]
    ours, dense, fastvideo, _ = measured
    assert ours.speedup_over_dense_fa3 == pytest.approx(dense.ms_median / ours.ms_median)
    assert ours.tflops_ratio_to_dense_fa3 == pytest.approx(ours.tflops / dense.tflops)
    assert dense.speedup_over_dense_fa3 == 1.0 and dense.pairs is None and ours.pairs == 180
    assert fastvideo.error <= fastvideo.tolerance and ours.timer == "clock"
    assert rows.read_json(tmp_path / "rows.json") == measured


def test_tiling_round_trip(seed):
    grid = CubeGrid((5, 6, 7), (2, 4, 8))
    tiling = Tiling(grid, torch.device("cpu"))
    x = torch.randn(2, grid.num_tokens, 3, 8, generator=torch.Generator().manual_seed(seed))
    padded = tiling.pad(x)
    assert torch.equal(tiling.unpad(padded), x) and torch.equal(tiling.tile(x), padded)
    blocks = padded.unflatten(2, (-1, 64))
    for cube, size in enumerate(grid.cube_sizes().tolist()):
        mine = grid.token_index()[cube][grid.valid()[cube]]
        assert torch.equal(blocks[:, :, cube, :size], x[:, mine].transpose(1, 2))
        assert not blocks[:, :, cube, size:].any()


def test_flex_block_mask_means_the_same_lists():
    problem = tiny_problem()
    problem.kv_num_blocks[0, 0, 2] = 3
    tiling = Tiling(problem.grid, torch.device("cpu"))
    mask = block_mask(problem, tiling)
    sizes = problem.grid.cube_sizes().tolist()
    listed = torch.zeros(1, 2, 18, 18, dtype=torch.bool)
    for head in range(2):
        for cube, count in enumerate(problem.kv_num_blocks[0, head].tolist()):
            mine = problem.kv_indices[0, head, cube, :count].tolist()
            listed[0, head, cube, mine] = True
            # Whole cubes skip the mask; partial ones are masked token by token.
            for lists, whole in (((mask.full_kv_num_blocks, mask.full_kv_indices), True),
                                 ((mask.kv_num_blocks, mask.kv_indices), False)):  # fmt: skip
                number = int(lists[0][0, head, cube])
                expected = [block for block in mine if (sizes[block] == 64) == whole]
                assert lists[1][0, head, cube, :number].tolist() == expected
    assert torch.equal(mask.to_dense().bool(), listed)
    keys = torch.arange(tiling.padded_tokens)
    assert torch.equal(mask.mask_mod(0, 0, 0, keys), tiling.valid)
    assert int(mask.q_num_blocks.sum() + mask.full_q_num_blocks.sum()) == problem.pairs


@pytest.mark.parametrize("head_dim", [64, 128])
def test_flex_backward_blocks_divide_the_masks(head_dim, monkeypatch):
    """Inductor takes no other configuration, whatever kernel_options say."""
    from torch._inductor.choices import InductorChoices

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    name = "get_flex_attention_bwd_configs"
    monkeypatch.setattr(InductorChoices, name, getattr(InductorChoices, name))  # put back afterwards
    flex._fit_backward_blocks()
    configs = InductorChoices().get_flex_attention_bwd_configs(head_dim, torch.bfloat16, "cuda")
    assert configs
    for config in configs:
        blocks = (config.block_m1, config.block_n1, config.block_m2, config.block_n2)
        assert all(64 % block == 0 for block in blocks)


# Refusal


class WrongBackend(backends.Vsa):
    def fine(self, problem, backward):
        work = super().fine(problem, backward)
        right = work.forward
        work.forward = lambda: right() * 1.05
        return work


class RaisingBackend(backends.Vsa):
    def fine(self, problem, backward):
        raise RuntimeError("CUDA error: no such kernel")


class UncompiledBackend(backends.Vsa):
    """As FlexAttention does: the backward is compiled when it first runs, and that fails."""

    name = "flex"

    def fine(self, problem, backward):
        work = super().fine(problem, backward)

        def raising():
            raise RuntimeError("LoweringException: NoValidChoicesError")

        if backward:
            work.backward = work.both = raising
        return work


@pytest.mark.parametrize("direction", ["bwd", "fwd+bwd"])
def test_a_failing_peer_leaves_the_other_rows(direction):
    runner = quiet_runner([backends.Vsa(), UncompiledBackend(), backends.TorchDense()])
    measured = {row.backend: row for row in runner.fine(tiny_problem(), direction)}
    assert {name: row.status for name, row in measured.items()} == {
        "vsa_cuda": "ok",
        "flex": "failed",
        "torch": "ok",
    }
    assert "NoValidChoicesError" in measured["flex"].note and measured["flex"].ms_median is None


@pytest.mark.parametrize(("broken", "words"), [(WrongBackend, "error"), (RaisingBackend, "no such kernel")])
def test_a_failing_case_is_not_timed(broken, words, monkeypatch, capsys, tmp_path):
    timed = []
    real = timing.interleave
    monkeypatch.setattr(
        "bench.runner.interleave", lambda calls, *a, **k: timed.append(set(calls)) or real(calls, *a, **k)
    )
    monkeypatch.setattr(backends, "Vsa", broken)
    file = tmp_path / "rows.json"
    assert cli.main(["fine", "--cpu", "--budget", "0.01", "--passes", "fwd", "--json", str(file)]) == 1
    assert timed == [{"fine torch"}]
    failed = next(row for row in rows.read_json(file) if row.backend == "vsa_cuda")
    assert failed.status == "failed" and failed.ms_median is None and words in failed.note
    assert "failed" in capsys.readouterr().out


def test_the_op_and_its_fine_stage_are_timed_in_one_loop(monkeypatch, tmp_path):
    timed = []
    real = timing.interleave
    monkeypatch.setattr(
        "bench.runner.interleave", lambda calls, *a, **k: timed.append(set(calls)) or real(calls, *a, **k)
    )
    file = tmp_path / "rows.json"
    assert cli.main(["op", "--cpu", "--budget", "0.01", "--passes", "fwd", "--json", str(file)]) == 0
    assert timed == [{"op vsa_cuda", "op torch", "fine vsa_cuda"}]
    assert {(row.op, row.backend) for row in rows.read_json(file)} == {
        ("op", "vsa_cuda"), ("op", "torch"), ("fine", "vsa_cuda"),
    }  # fmt: skip


# Timing, machine, command line


def test_interleaving_takes_turns():
    turns = []
    calls = {name: lambda name=name: turns.append(name) for name in "abc"}
    timings = timing.interleave(calls, torch.device("cpu"), budget_s=0.0)
    assert turns == list("abc") * timing.FEWEST
    assert {len(one.samples) for one in timings.values()} == {timing.FEWEST}


def test_timing_figures():
    one = timing.Timing("clock", "warm", [float(i) for i in range(11)])
    assert (one.median, one.minimum, one.spread) == (5.0, 0.0, 8.0)


class FakeGraph:
    """Stands for torch.cuda.CUDAGraph: replays what was called while it was open, unless that cannot be."""

    def replay(self):
        self.call()


def fake_gpu(monkeypatch, captures=True):
    """Calls "a" and "b" that take 1.5 ms, and the log of them, of events and of flushes."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 1.5

    @contextmanager
    def graph(graph, stream):
        graph.call = lambda: log.append("run")
        if not captures:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    fakes = {"Event": Event, "CUDAGraph": FakeGraph, "graph": graph, "synchronize": lambda *_: None,
             "current_stream": lambda: None}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    buffer = types.SimpleNamespace(zero_=lambda: log.append("flush"))
    monkeypatch.setattr(timing, "_larger_than_l2", lambda device: buffer)
    return {name: lambda: log.append("run") for name in "ab"}, log


SETTLE = ["run"] * 100  # 150 ms of calls that take 1.5
TIMED = ["event", "run", "event"] * 34  # 50 ms of them


@pytest.mark.parametrize("l2", ["warm", "cold"])
@pytest.mark.parametrize("captures", [True, False])
def test_gpu_timing_warms_or_flushes_and_falls_back(l2, captures, monkeypatch):
    calls, log = fake_gpu(monkeypatch, captures)
    timings = timing.interleave(calls, torch.device("cuda"), l2=l2, budget_s=0.0)
    timed = ["flush", "event", "run", "event"] * 34 if l2 == "cold" else TIMED
    turn = SETTLE + timed
    assert log[-2 * timing.FEWEST * len(turn) :] == 2 * timing.FEWEST * turn
    assert timings["a"].timer == ("graph" if captures else "events") and timings["a"].l2 == l2
    assert timings["a"].samples == [1.5] * 34 * timing.FEWEST
    assert timings["a"].note == (
        None if captures else "not captured: operation not permitted when stream is capturing"
    )


@pytest.mark.parametrize("budget_s, loads", [(0.0, 0), (1.5, 1), (8.0, 2)])
def test_gpu_runs_before_anything_is_timed(budget_s, loads, monkeypatch):
    """As long as it is timed, at most 2.5 s. The clock goes on by a second whenever it is read."""
    calls, log = fake_gpu(monkeypatch)
    monkeypatch.setattr(timing.time, "perf_counter", itertools.count().__next__)
    timings = timing.interleave(calls, torch.device("cuda"), budget_s=budget_s)
    rounds = len(timings["a"].samples) // 34
    first_look = ["run"] * 3 + ["event", "run", "event"]  # warm-up, capture, how long it takes
    turns = loads * 2 * SETTLE + rounds * 2 * (SETTLE + TIMED)
    assert log == 2 * first_look + turns and rounds >= timing.FEWEST


def test_flush_is_larger_than_l2(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=60)
    )
    buffer = timing._larger_than_l2(torch.device("cpu"))
    assert buffer.nbytes >= 2 * 60


def test_rows_say_that_l2_was_cold(monkeypatch):
    """From --l2 to every kind of row and the tables; the floors are not read off such rows."""
    asked = []

    def interleave(calls, device, *, l2, **options):
        asked.append(l2)
        return {name: timing.Timing("graph", l2, [1.0]) for name in calls}

    monkeypatch.setattr("bench.runner.interleave", interleave)
    args = cli.build_parser().parse_args(["fine", "--l2", "cold"])
    options = cli._options(args, torch.device("cpu"))
    runner = Runner(options, [backends.Vsa()])
    problem = tiny_problem()
    runner.fine(problem, "fwd")
    runner.whole_op(tiny_problem(gate_coarse=None, gate_fine=None), "fwd+bwd")
    coarse.measure_coarse(runner, problem)
    block.measure_block(runner, "tiny", "fwd")
    assert set(asked) == {"cold"} and {row.l2 for row in runner.rows} == {"cold"}
    assert runner.rows[0].title == "tiny, L2 cold" and replace(runner.rows[0], l2="warm").title == "tiny"
    key = ("fine", "fwd", "vsa_cuda", "tiny")
    assert floors.find(runner.rows, *key) is None
    assert floors.find([replace(runner.rows[0], l2="warm")], *key) is not None


def test_copy_is_timed_without_a_graph(monkeypatch):
    asked = {}

    def interleave(calls, device, *, graphs=True, **options):
        (name,) = calls
        calls[name]()
        asked[name] = graphs
        return {name: timing.Timing("events", "warm", [2.0])}

    monkeypatch.setattr(roofline, "interleave", interleave)
    monkeypatch.setattr(roofline, "_MATRIX", 8)
    monkeypatch.setattr(roofline, "_COPY_BYTES", 1 << 20)
    _, copy = roofline.torch_cases(torch.device("cpu"), 0.0)
    assert asked == {"matmul": True, "copy": False}
    assert copy["tb_per_s"] == pytest.approx((1 << 20) / 2e-3 / 1e12)


def test_gpu_state_from_nvidia_smi(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$*" in *GPU-abc*) exit 6;; esac\necho "1830, 3201, [N/A], 61"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="abc"))
    state = machine.gpu_state(torch.device("cuda:0"))
    assert state == {"clock_sm_mhz": 1830, "clock_memory_mhz": 3201, "power_w": None, "temperature_c": 61}
    assert set(machine.gpu_state(torch.device("cpu")).values()) == {None}


def test_tree_sha256(tmp_path):
    import hashlib

    for name, text in (("csrc/b.h", "two"), ("csrc/a/z.cu", "one"), ("csrc/__pycache__/x.pyc", "no")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    expected = hashlib.sha256(b"csrc/a/z.cu\0onecsrc/b.h\0two").hexdigest()
    assert machine.tree_sha256(tmp_path, "csrc") == expected


def test_without_a_hopper_gpu(monkeypatch, capsys):
    monkeypatch.setattr(cli, "no_gpu_reason", lambda: "torch finds no CUDA device")
    assert cli.main(["fine"]) == cli.NO_GPU == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and "no Hopper GPU" in captured.err


@pytest.mark.parametrize(
    "command",
    [
        ["fine"],
        ["op", "--gates", "tensor", "--passes", "fwd+bwd"],
        ["coarse"],
        ["block"],
        ["speedup", "--sparsity", "0.8"],
    ],
    ids=lambda command: command[0],
)
def test_cpu_commands(command, capsys, tmp_path):
    json_file, csv_file = tmp_path / "rows.json", tmp_path / "rows.csv"
    files = ["--json", str(json_file), "--csv", str(csv_file)]
    assert cli.main([*command, "--cpu", "--budget", "0.01", *files]) == 0
    measured = rows.read_json(json_file)
    assert measured and all(row.device == "cpu" and row.status == "ok" and row.command for row in measured)
    assert len(csv_file.read_text().splitlines()) == 1 + len(measured)
    assert "say nothing about the kernels" in capsys.readouterr().out
