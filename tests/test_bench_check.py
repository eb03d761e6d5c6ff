"""The benchmark's correctness check: its float64 side is the reference, and it finds planted faults."""

from dataclasses import replace

import pytest
import torch

from bench import backends, check
from bench_cases import TINY, one_thread, tiny_problem  # noqa: F401
from vsa_cuda import block_sparse_attention, reference

GATES = {
    "fine": {"gate_fine": 1.0, "gate_coarse": 0.0},
    "none": {"gate_fine": None, "gate_coarse": None},
    "tensor": {"gate_fine": 0.5, "gate_coarse": "tensor"},
}


def gated_problem(gates, seed):
    problem = tiny_problem(seed=seed, **GATES[gates])
    if gates == "tensor":
        problem.gate_coarse = torch.randn_like(problem.query)
    return problem


@pytest.mark.parametrize("gates", GATES)
def test_expected_is_the_reference(gates, seed):
    """The float64 side of the check against vsa_cuda.reference in float64, every cube of a head."""
    problem = gated_problem(gates, seed)
    grid, scale = problem.grid, problem.scale
    lists = problem.kv_num_blocks, problem.kv_indices
    q, k, v, grad = (x.double() for x in (problem.query, problem.key, problem.value, problem.grad_out))
    gate = problem.gate_coarse.double() if gates == "tensor" else problem.gate_coarse
    out_fine, lse = reference.fine_forward(q, k, v, *lists, grid, grid, scale)
    # Pooled tensors are rounded to the input dtype by definition.
    pooled = [reference.pool(x, grid).double() for x in (problem.query, problem.key, problem.value)]
    coarse, coarse_lse, *_ = reference.coarse_forward(*pooled, 5, scale)
    used = None if gates == "fine" else coarse
    out = reference.combine(out_fine, used, grid, problem.gate_fine, gate)
    grad_fine, delta, grad_coarse, _, grad_gate = reference.combine_backward(
        grad, out_fine, None, used, grid, problem.gate_fine, gate
    )
    extra = (None,) * 3
    if used is not None:
        extra = reference.coarse_backward(grad_coarse, *pooled, coarse, coarse_lse, scale)
    gradients = reference.fine_backward(
        grad_fine, q, k, v, lse, delta, *lists, grid, grid, scale, None, None, *extra
    )
    head = 1
    expected = check.Expected(problem, 0, head, exact=True)
    for cube in range(grid.num_cubes):
        mine = expected.rows(cube)
        result, rows_lse = expected.out(cube)
        torch.testing.assert_close(result, out[0, mine, head], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(rows_lse, lse[0, head, cube][grid.valid()[cube]], rtol=1e-9, atol=1e-12)
        found = expected.query_gradient(cube), *expected.key_gradients(cube)
        for grads, got in zip(gradients, found, strict=True):
            torch.testing.assert_close(got, grads[0, mine, head], rtol=1e-9, atol=1e-11)
        if grad_gate is not None:
            torch.testing.assert_close(
                expected.gate_gradient(cube), grad_gate[0, mine, head], rtol=1e-9, atol=1e-12
            )


def own_outputs(problem):
    inputs = [x.clone().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    out, lse = block_sparse_attention(
        *inputs, problem.kv_num_blocks, problem.kv_indices, video_shape=TINY.video_shape, return_lse=True
    )
    return out.detach(), torch.autograd.grad(out, inputs, problem.grad_out), lse.detach()


@pytest.mark.parametrize("fault", ["none", "scale", "dropped key", "dk", "dv", "dq", "nan", "lse"])
def test_check_finds_planted_faults(fault, seed):
    problem = tiny_problem(seed=seed)
    computed = problem
    if fault == "scale":
        computed = replace(problem, query=(problem.query.float() * 1.01).bfloat16())
    if fault == "dropped key":
        computed = replace(problem, kv_num_blocks=problem.kv_num_blocks - 1)
    out, (dq, dk, dv), lse = own_outputs(computed)
    for name, grad in (("dq", dq), ("dk", dk), ("dv", dv)):
        if fault == name:
            grad[:, problem.grid.token_index()[0]] *= 1.05
    if fault == "nan":
        out[0, -1, 0, 0] = float("nan")
    if fault == "lse":
        lse[0, 0, 0] += 1e-2
    verdict = check.check(problem, out, (dq, dk, dv), lse)
    assert verdict.ok == (fault == "none")
    named = {"scale": "out", "dropped key": "out", "nan": "NaN"}.get(fault, fault)
    assert verdict.ok or any(named in message for message in verdict.messages)


def test_check_finds_a_wrong_selection():
    problem = gated_problem("none", 0)
    work = backends.Vsa().whole_op(problem, backward=False)
    problem.kv_num_blocks, problem.kv_indices = work.selection()
    assert check.check(problem, work.forward(), selection=True).ok
    worst = problem.kv_indices.clone()
    worst[:] = torch.arange(5)
    wrong = replace(problem, kv_indices=worst)
    assert any("too low" in message for message in check.check(wrong, None, selection=True).messages)
    unsorted = replace(problem, kv_indices=problem.kv_indices.flip(-1))
    assert any("ascending" in message for message in check.check(unsorted, None, selection=True).messages)
