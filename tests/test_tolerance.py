"""The tolerance rule accepts the reference rounded to half and refuses small faults."""

import pytest
import torch

from tolerance import (
    assert_lse_within_tolerance,
    assert_within_tolerance,
    half_precision_baseline,
    half_precision_coarse_baseline,
)
from vsa_cuda import reference
from vsa_cuda.geometry import CubeGrid

NAMES = ("out", "dq", "dk", "dv")


class Problem:
    """Half inputs of a fine stage: 2 heads, head_dim 64, 40 blocks of 64 tokens, lists of 32."""

    def __init__(self, dtype):
        self.grid = CubeGrid.linear(40 * 64)
        self.scale = 64**-0.5
        self.q, self.k, self.v, self.grad_out = (
            torch.randn(1, self.grid.num_tokens, 2, 64).to(dtype) for _ in range(4)
        )
        self.grad_lse = torch.randn(1, 2, 40, 64)
        self.counts = torch.full((1, 2, 40), 32, dtype=torch.int32)
        self.indices = torch.rand(1, 2, 40, 40).argsort()[..., :32].sort().values.int()

    def run(self, dtype, scale=1.0, dropped=0):
        """(out, dq, dk, dv) and lse by the reference, computed in `dtype`, with planted faults."""
        q, k, v, grad_out = (x.to(dtype) for x in (self.q, self.k, self.v, self.grad_out))
        sizes = torch.full((40,), 64, dtype=torch.int32)
        sizes[self.indices[0, 0, 0, 0]] -= dropped
        lists = (self.counts, self.indices, self.grid, self.grid, self.scale * scale, sizes)
        out, lse = reference.fine_forward(q, k, v, *lists)
        grad_fine, delta, *_ = reference.combine_backward(
            grad_out, out, self.grad_lse.to(lse.dtype), None, self.grid, None, None
        )
        return (out, *reference.fine_backward(grad_fine, q, k, v, lse, delta, *lists, None)), lse

    def baseline(self):
        lists = (self.counts, self.indices, self.grid, self.grid, self.scale)
        return half_precision_baseline(self.q, self.k, self.v, *lists, self.grad_out, self.grad_lse)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def problem(request):
    torch.manual_seed(request.config.getoption("--seed"))
    problem = Problem(request.param)
    return problem, *problem.run(torch.float64), problem.baseline()


def test_rounded_reference_passes(problem):
    problem, expected, expected_lse, baseline = problem
    actual, lse = problem.run(problem.q.dtype)
    for case in zip(actual, expected, baseline, NAMES, strict=True):
        error, bound = assert_within_tolerance(*case)
        assert 0 < error <= bound
    assert_lse_within_tolerance(lse, expected_lse)


@pytest.mark.parametrize("fault", [{"scale": 1.01}, {"scale": 0.99}, {"dropped": 1}], ids=str)
def test_small_faults_fail(problem, fault):
    problem, expected, expected_lse, baseline = problem
    actual, lse = problem.run(problem.q.dtype, **fault)
    for case in zip(actual, expected, baseline, NAMES, strict=True):
        with pytest.raises(AssertionError, match=f"^{case[3]}: "):
            assert_within_tolerance(*case)
    with pytest.raises(AssertionError, match="^lse: error"):
        assert_lse_within_tolerance(lse, expected_lse)


def test_one_wrong_element_and_one_wrong_head_fail(problem):
    problem, expected, _, baseline = problem
    actual, _ = problem.run(problem.q.dtype)
    out = actual[0].clone()
    out[0, 1234, 1, 5] += 0.01 * expected[0].abs().max() + out[0, 1234, 1, 5].abs() * 0.5
    with pytest.raises(AssertionError, match=r"^out: max error .* at \(0, 1234, 1, 5\)"):
        assert_within_tolerance(out, expected[0], baseline[0], "out")
    out = actual[0].clone()
    out[:, :, 1] *= 1 + 2 * torch.finfo(out.dtype).eps
    with pytest.raises(AssertionError, match=r"^out: Frobenius error .* at \(batch, head\) \(0, 1\)"):
        assert_within_tolerance(out, expected[0], baseline[0], "out")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_element_never_written_fails(problem, value):
    _, expected, expected_lse, baseline = problem
    out = baseline[0].clone()
    out[0, 7, 0, 3] = value
    with pytest.raises(AssertionError, match="^out: max error"):
        assert_within_tolerance(out, expected[0], baseline[0], "out")
    lse = expected_lse.float()
    lse[0, 0, 3, 3] = value
    with pytest.raises(AssertionError, match="^lse: error"):
        assert_lse_within_tolerance(lse, expected_lse)


def test_infinities_of_the_lse_are_exact():
    expected = torch.tensor([1.0, -torch.inf, torch.inf], dtype=torch.float64)
    assert_lse_within_tolerance(expected.float() + 5e-5, expected)
    for wrong in ([1.0, -1e30, torch.inf], [1.0, torch.inf, torch.inf], [1.0, torch.nan, torch.inf]):
        with pytest.raises(AssertionError, match="infinities differ"):
            assert_lse_within_tolerance(torch.tensor(wrong), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_coarse_baseline_accepts_the_reference_and_refuses_a_fault(seed, dtype):
    q, k, v, grad = (torch.randn(2, 3, 150, 64).to(dtype) for _ in range(4))

    def run(dtype, scale):
        x = [x.to(dtype) for x in (q, k, v)]
        out, lse, _, _ = reference.coarse_forward(*x, 4, scale)
        return out, *reference.coarse_backward(grad.to(dtype), *x, out, lse, scale)

    baseline = half_precision_coarse_baseline(q, k, v, 0.125, grad)
    expected = run(torch.float64, 0.125)
    for case in zip(run(dtype, 0.125), expected, baseline, NAMES, strict=True):
        assert_within_tolerance(*case, heads_dim=1)
    for case in zip(run(dtype, 0.125 * 1.01), expected, baseline, NAMES, strict=True):
        with pytest.raises(AssertionError, match=f"^{case[3]}: "):
            assert_within_tolerance(*case, heads_dim=1)
