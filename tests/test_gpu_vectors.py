"""The simulator against what a GPU gave for the same inputs (bench/gpu_vectors.py records it)."""

import warnings
from pathlib import Path

import numpy
import pytest
import torch

from bench import gpu_vectors, machine
from simulated import run_simulated
from simulator import SimulationError
from vsa_cuda import _extension

VECTORS = Path(__file__).parents[1] / "bench" / "results" / "gpu_vectors.npz"
CASES = {case.name: case for case in gpu_vectors.CASES}
SMALL = "d64-fp16"
OWN = (SMALL, "dense-d128-bf16", "fused-d64-fp16", "fused-d128-bf16", "select-d64-bf16")

pytestmark = [
    pytest.mark.simulator,
    pytest.mark.skipif(
        not _extension.is_available(), reason="vsa_cuda._C is not built: no host plan to simulate"
    ),
]

# Pooling adds and divides, each correctly rounded, in an order that the PTX fixes: bit for bit. Elsewhere
# ptxas may fuse a product and a sum; wgmma cuts its products off some bits below the largest one and adds in
# an order of its own, where the simulator rounds one after the other; ex2.approx and lg2.approx are up to 2
# ulp off. Each is a few ulp of fp32. In a 16-bit result they show where a rounding tips over: that of the
# value (1 ulp), or that of a P or dS before the second product (up to 1 ulp of the largest value when a row
# has few keys). Measured with an engine made to cut products off at 22, 24 and 25 bits and to jitter ex2 by 2
# ulp: at most 1 ulp in 16-bit results, in at most 3 % of the elements, and 2 ulp in lse.
ULPS = dict.fromkeys(("query_pooled", "key_pooled", "value_pooled"), 0)
ULPS |= dict.fromkeys(("grad_fine", "grad_coarse", "grad_gate_coarse"), 1)
ULPS |= {"delta": 8, "lse": 8}
ULPS |= dict.fromkeys(("out", "out_fine", "dq", "dk", "dv"), 2)
# What a sum of large terms leaves over keeps their errors: where the value is less than this share of the
# tensor's largest, ulps are those of the share. fp32 has no rounding that hides them: the largest value's.
HALF_SHARE, FLOAT_SHARE = 0.25, 1.0
# A fault that is small everywhere, such as another way to round, tips more of them.
MOST_TIPPED = 1 / 16


def differences(actual, expected):
    """(largest difference in ulps of the output's type, share of the elements that differ at all)."""
    finite = expected.isfinite()
    same = torch.equal(actual.isfinite(), finite) and torch.equal(actual[~finite], expected[~finite])
    assert same, "infinities differ, or there is a NaN"
    a, b = actual[finite].double(), expected[finite].double()
    size = torch.maximum(a.abs(), b.abs())
    info = torch.finfo(expected.dtype)
    share = HALF_SHARE if expected.element_size() == 2 else FLOAT_SHARE
    size = size.clamp(min=max(share * size.max().item(), info.tiny))
    ulp = info.eps * torch.exp2(torch.frexp(size).exponent - 1.0)
    return ((a - b).abs() / ulp).max().item(), (a != b).double().mean().item()


def compare(name, actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{name}: shape or type differs"
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), f"{name}: integers differ"
        return
    ulps, share = differences(actual, expected)
    assert ulps <= ULPS[name], f"{name}: {ulps:.3g} ulp apart, bound {ULPS[name]}"
    if expected.element_size() == 2:
        assert share <= MOST_TIPPED, f"{name}: {share:.1%} of the elements differ, bound {MOST_TIPPED:.1%}"


def assert_agrees(path, case, seed):
    """One case of the file at `path` against the simulator's run of it."""
    recorded, about = gpu_vectors.load(path)
    assert about["inputs"][case.name] == gpu_vectors.digest(case.inputs()), (
        f"{case.name}: numpy {numpy.__version__} gives other inputs than those of the recording"
    )

    def execute(function, *arguments):
        return run_simulated(function, *arguments, seed=seed)

    simulated = gpu_vectors.run(case, execute, recorded[case.name])
    assert simulated.keys() == recorded[case.name].keys()
    for name, actual in simulated.items():
        compare(name, actual, recorded[case.name][name])


@pytest.mark.skipif(
    not VECTORS.exists(), reason=f"{VECTORS.name} is not recorded yet: python -m bench.gpu_vectors on an H200"
)
@pytest.mark.parametrize("case", gpu_vectors.CASES, ids=lambda case: case.name)
def test_simulator_agrees_with_the_gpu(case, seed):
    _, about = gpu_vectors.load(VECTORS)
    if case.name not in about["inputs"]:
        pytest.skip(f"{case.name} has not run on a GPU yet: python -m bench.gpu_vectors on an H200")
    if about["csrc_sha256"] != machine.tree_sha256(machine.ROOT, "csrc"):
        warnings.warn(
            f"{VECTORS.name} was recorded from other kernels: commit {about['commit']}, {about['date']}",
            stacklevel=1,
        )
    assert_agrees(VECTORS, case, seed)


# The comparison itself, on a vector that the simulator recorded.


@pytest.fixture(scope="module")
def own_vector(tmp_path_factory):
    """(path, outputs) of the cases that the tests below doctor."""
    path = tmp_path_factory.mktemp("vectors") / "own.npz"
    outputs = {name: gpu_vectors.run(CASES[name], run_simulated) for name in OWN}
    gpu_vectors.save(path, outputs, {})
    return path, outputs


def test_own_vector_agrees_under_another_schedule(own_vector, seed):
    for name in own_vector[1]:
        assert_agrees(own_vector[0], CASES[name], seed + 3)


def moved(x, ulps, elements=1):
    """The largest finite values moved by so many ulps."""
    changed = x.clone()
    order = changed.double().abs().nan_to_num(posinf=0).flatten().argsort(descending=True)
    bits = changed.view({2: torch.int16, 4: torch.int32}[x.element_size()]).flatten()
    bits[order[:elements]] -= ulps
    return changed


@pytest.mark.parametrize("name", [*ULPS, "q_offsets", "selected", "selected_counts"])
def test_doctored_vector_fails(name, own_vector, tmp_path, seed):
    """One element beyond its bound; integers by one."""
    path, outputs = tmp_path / "doctored.npz", own_vector[1]
    case = next(case for case in outputs if name in outputs[case])
    right = outputs[case][name]
    gpu_vectors.save(path, {case: outputs[case] | {name: moved(right, ULPS.get(name, 0) + 1)}}, {})
    with pytest.raises((AssertionError, SimulationError)) as failure:
        assert_agrees(path, CASES[case], seed)
    if failure.type is AssertionError:  # a wrong offset is an address out of bounds, too
        assert f"{name}: " in str(failure.value)


def test_later_launches_get_what_was_recorded(own_vector):
    recorded = own_vector[1][SMALL]
    zero = recorded | {"out_fine": torch.zeros_like(recorded["out_fine"])}
    assert recorded["delta"].any()
    assert not gpu_vectors.run(CASES[SMALL], run_simulated, zero)["delta"].any()


def test_many_small_differences_fail(own_vector):
    right = own_vector[1][SMALL]["out"]
    compare("out", moved(right, 1, right.numel() // 32), right)
    with pytest.raises(AssertionError, match="of the elements differ"):
        compare("out", moved(right, 1, right.numel() // 8), right)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_must_agree(value, own_vector):
    lse = own_vector[1][SMALL]["lse"]
    changed = lse.clone()
    changed[lse.isfinite()] = value
    for pair in ((changed, lse), (lse, changed)):
        with pytest.raises(AssertionError, match="infinities differ, or there is a NaN"):
            compare("lse", *pair)


@pytest.mark.parametrize("fault", ["scale", "shorter lists"])
def test_faulty_kernel_is_outside_the_bounds(fault, own_vector):
    """A scale off by 1 %, or lists without their last block: what the bounds must tell from rounding."""
    case, recorded = CASES[SMALL], own_vector[1][SMALL]
    scale, counts = case.head_dim**-0.5, case.inputs()["kv_num_blocks"]

    def wrong(x):
        if isinstance(x, torch.Tensor):
            same = fault == "shorter lists" and x.shape == counts.shape and torch.equal(x, counts)
            return (x - 1).clamp(min=0) if same else x
        return 1.01 * x if fault == "scale" and x == scale else x

    outputs = gpu_vectors.run(
        case, lambda function, *args: run_simulated(function, *map(wrong, args)), recorded
    )
    for name in ("out_fine", "lse", "dq"):
        with pytest.raises(AssertionError, match=f"{name}: |infinities"):
            compare(name, outputs[name], recorded[name])


def test_recorder(monkeypatch, tmp_path, capsys):
    file = tmp_path / "made" / "vectors.npz"
    monkeypatch.setattr("sys.argv", ["gpu_vectors", "--commit", "abc", "--output", str(file)])
    monkeypatch.setattr(machine, "no_gpu_reason", lambda: "torch finds no CUDA device")
    assert gpu_vectors.main() == 2 and not file.exists()
    monkeypatch.setattr(machine, "no_gpu_reason", lambda: None)
    monkeypatch.setattr(machine, "environment", lambda kind: {"device": kind, "commit": None})
    monkeypatch.setattr(gpu_vectors, "execute_on_gpu", run_simulated)
    monkeypatch.setattr(gpu_vectors, "CASES", [CASES[SMALL]])
    assert gpu_vectors.main() == 0
    outputs, about = gpu_vectors.load(file)
    assert about["commit"] == "abc" and about["device"] == "cuda" and about["date"]
    assert about["inputs"] == {SMALL: gpu_vectors.digest(CASES[SMALL].inputs())}
    assert set(outputs[SMALL]) == set(ULPS) | {"q_offsets", "q_indices"}
    monkeypatch.setattr(gpu_vectors, "_MOST_BYTES", 1000)
    assert gpu_vectors.main() == 1
    assert "expected at most" in capsys.readouterr().err


def test_other_inputs_are_noticed(own_vector, tmp_path, monkeypatch, seed):
    monkeypatch.setattr(gpu_vectors, "digest", lambda values: "0")
    gpu_vectors.save(tmp_path / "other.npz", {SMALL: own_vector[1][SMALL]}, {})
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="other inputs"):
        assert_agrees(tmp_path / "other.npz", CASES[SMALL], seed)


def test_vector_covers_every_kernel(monkeypatch):
    launched = set()

    def launch(plan, tensor):
        launched.add(plan.kernel)

    monkeypatch.setattr(_extension, "launch", launch)
    monkeypatch.setattr(_extension, "num_sms", lambda device: 3)
    for case in gpu_vectors.CASES:
        gpu_vectors.run(case, lambda function, *arguments: function(*arguments))
    assert launched == set(_extension.load().kernel_names())


def test_untied_scores_decide_by_more_than_rounding():
    for case in gpu_vectors.CASES:
        if isinstance(case, gpu_vectors.Selection) and not case.ties:
            query, key = (x.double() for x in case.inputs().values())
            scores = (query @ key.mT * case.scale).sort(dim=-1, descending=True).values
            gap = (scores[..., case.topk - 1] - scores[..., case.topk]).min()
            sums = (query.abs() @ key.abs().mT * case.scale).max()
            assert gap > 4 * case.head_dim * 2**-24 * sums
