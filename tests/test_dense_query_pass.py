"""The query pass over all blocks, whose CTAs work in pairs, in the simulator and on a GPU."""

import functools

import pytest
import torch

import simulated
from attention_cases import PAIRS, Case, linear
from fine_stage import (
    LISTED_OR_DENSE,
    RUNS,
    backward,
    check_fine_backward,
    exact_backward,
    fine_passes,
    new_gradient,
)
from simulated import run_simulated
from vsa_cuda import _extension

pytestmark = pytest.mark.skipif(
    not _extension.is_available(), reason="vsa_cuda._C is not built: no host plan to run"
)
over_runs = pytest.mark.parametrize("execute", RUNS)


def gradients_of(case, seed, devices=None):
    case.generator.manual_seed(0)
    grad_out = new_gradient(case)
    out, lse, _ = exact_backward(case, grad_out)
    run = functools.partial(run_simulated, seed=seed, devices=devices)
    return backward(run, case, grad_out, out.to(case.dtype), lse.float())


def query_passes(devices):
    """Which query passes were launched, and whether each worked."""
    return [
        (kernel.split("_d64")[0], report.async_copies > 0)
        for device in devices
        for kernel, report in zip(device.kernels, device.reports, strict=True)
        if kernel.startswith("fine_backward_q")
    ]


def check_pairs(make, sms, seeds, monkeypatch):
    """The gradients are right, and those of CTAs that have no partner."""
    monkeypatch.setattr(simulated, "NUM_SMS", 1)
    case = make()
    expected = gradients_of(case, 0)
    monkeypatch.setattr(simulated, "NUM_SMS", sms)
    check_fine_backward(functools.partial(run_simulated, seed=seeds[0]), make(), deterministic=True)
    for seed in seeds:
        devices = []
        gradients = gradients_of(case, seed, devices)
        assert query_passes(devices) == [("fine_backward_q", False), ("fine_backward_q_dense", True)]
        assert all(torch.equal(x, y) for x, y in zip(gradients, expected, strict=True))


@pytest.mark.simulator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS.keys())
def test_pairs_of_ctas_give_the_same_bits(pairs, dtype, seed, monkeypatch):
    """Under each of the simulator's four kinds of schedules."""
    make, sms = pairs
    make = functools.partial(make, head_dim=64, dtype=dtype, seed=seed)
    check_pairs(make, sms, range(4 * seed, 4 * seed + 4), monkeypatch)


@pytest.mark.simulator
@pytest.mark.parametrize("schedule", range(4))
def test_pairs_of_ctas_over_long_runs(schedule, seed, monkeypatch):
    """66 stages a task, so that the barriers go round in each; the last CTA ends without a block."""
    make = linear(5 * 64, 131 * 64 + 1, seed=seed)
    check_pairs(make, 2, [4 * seed + schedule], monkeypatch)


@pytest.mark.simulator
def test_each_cta_of_a_pair_loads_half(seed, monkeypatch):
    """Two tasks, each of two blocks and all four key blocks: K and V come once for both CTAs."""
    monkeypatch.setattr(simulated, "NUM_SMS", 2)
    devices = []
    gradients_of(linear(4 * 64, 4 * 64, seed=seed)(), seed, devices)
    (device,) = (x for x in devices if "fine_backward_q_dense_d64_bf16" in x.kernels)
    copies = {
        opcode: count
        for opcode, count in device.report("fine_backward_q_dense").opcodes.items()
        if "cp.async.bulk" in opcode
    }
    shared = sum(count for opcode, count in copies.items() if "multicast" in opcode)
    assert shared == 2 * 4 and sum(copies.values()) == shared + 2 * 4


# Nothing; the first head's first list; one in a head between; the last list of all; every one.
SHORT = [
    (), [(0, 0, 0)], [(1, 0, 1)], [(1, 1, 4)], [(b, h, i) for b in (0, 1) for h in (0, 1) for i in range(5)],
]  # fmt: skip


def full_index(kv_blocks, short, seed):
    """Lists of all blocks, of 2 x 2 heads of 5 query blocks; those in `short` lack the last entry."""
    case = linear(5 * 64, kv_blocks * 64, batch=2, heads=2, seed=seed)()
    for place in short:
        case.kv_num_blocks[place] -= 1
        case.kv_indices[place][-1] = 2**31 - 1
    return case


@over_runs
@pytest.mark.parametrize("kv_blocks", [2, 5])
@pytest.mark.parametrize("short", SHORT, ids=len)
def test_either_query_pass_gives_the_gradients(short, kv_blocks, execute, seed):
    case = full_index(kv_blocks, short, seed)
    assert fine_passes(case, deterministic=True) == LISTED_OR_DENSE
    check_fine_backward(functools.partial(execute, seed=seed), case, deterministic=True)


@pytest.mark.simulator
@pytest.mark.parametrize("short", SHORT, ids=len)
def test_one_of_the_query_passes_works(short, seed, monkeypatch):
    monkeypatch.setattr(simulated, "NUM_SMS", 8)
    devices = []
    gradients_of(full_index(3, short, seed), seed, devices)
    chosen = [bool(short), not short]
    names = ["fine_backward_q", "fine_backward_q_dense"]
    assert query_passes(devices) == list(zip(names, chosen, strict=True))


@over_runs
@pytest.mark.parametrize("video_shape", [(4, 24, 20), (5, 9, 10)])
def test_without_lists(video_shape, execute, seed, monkeypatch):
    monkeypatch.setattr(simulated, "NUM_SMS", 8)
    case = Case(video_shape, heads=2, head_dim=64, lists="dense", seed=seed)
    run = functools.partial(execute, seed=seed)
    check_fine_backward(run, case, coarse_grid=case.q_grid, deterministic=True)
