"""The benchmark's checks of the kernels around the fine stage, on the kernels in the simulator."""

import functools

import pytest
import torch

from bench.cases import coarse
from bench_cases import one_thread, tiny_problem  # noqa: F401
from simulated import run_simulated
from vsa_cuda import _extension, _kernels

pytestmark = [
    pytest.mark.simulator,
    pytest.mark.skipif(
        not _extension.is_available(), reason="vsa_cuda._C is not built: no host plan to simulate"
    ),
]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The ops run the kernels on CPU tensors."""
    for name in coarse._KERNELS:
        run = functools.partial(run_simulated, getattr(_kernels, name))
        monkeypatch.setattr(torch.ops.vsa_cuda, name, run)


@pytest.mark.parametrize("name", coarse._KERNELS)
def test_kernel_passes_its_check(name, seed):
    kernel = coarse._KERNELS[name](tiny_problem(seed=seed))
    verdict = kernel.check(kernel.call())
    assert verdict.ok, verdict.messages


@pytest.mark.parametrize("output", range(3))
def test_check_of_coarse_backward_finds_a_fault(output, seed):
    kernel = coarse._KERNELS["coarse_backward"](tiny_problem(seed=seed))
    results = list(kernel.call())
    assert {x.dtype for x in results} == {torch.bfloat16}
    results[output] = results[output] * 1.03
    assert not kernel.check(results).ok
