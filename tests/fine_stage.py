"""Runs the fine stage's kernels, in the simulator or on a GPU, and checks them against the reference."""

import pytest
import torch

from simulated import run_simulated, simulated_device
from tolerance import assert_lse_within_tolerance, assert_within_tolerance, half_precision_baseline
from vsa_cuda import _kernels, reference


def on_gpu(x):
    """A copy with the same strides and pads."""
    if not isinstance(x, torch.Tensor):
        return x
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).cuda()
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def run_on_gpu(function, *arguments, seed=0):
    return tuple(x.cpu() for x in function(*map(on_gpu, arguments)))


# Where kernels run, for parametrize.
RUNS = [
    pytest.param(run_simulated, marks=pytest.mark.simulator, id="simulator"),
    pytest.param(run_on_gpu, marks=pytest.mark.gpu, id="gpu"),
]


def forward(case, seed=0, coarse_grid=None, with_lists=True, kernels=None, **gates):
    """The names of the kernels that ran are appended to the list `kernels`."""
    arguments = list(case.fine_arguments)
    if not with_lists:
        arguments[3:5] = None, None
    if coarse_grid is not None:
        arguments += [coarse_grid.video_shape, coarse_grid.cube]
    for position, name in enumerate(
        ("coarse", "gate_fine", "gate_coarse", "gate_fine_value", "gate_coarse_value"), 7
    ):
        arguments[position] = gates.get(name, arguments[position])
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    with simulated_device(*tensors, seed=seed) as device:
        out, out_fine, lse = _kernels.fine_forward(*arguments)
    device.assert_written(out, lse)
    if kernels is not None:
        kernels += device.kernels
    return out, out_fine, lse


def check_forward(case, out, lse):
    expected, expected_lse = case.reference()
    baseline = half_precision_baseline(
        case.query, case.key, case.value, case.kv_num_blocks, case.kv_indices, case.q_grid, case.kv_grid,
        case.scale, block_sizes=case.block_sizes, q_block_sizes=case.q_block_sizes,
    )[0]  # fmt: skip
    assert_within_tolerance(out, expected, baseline, "out")
    assert_lse_within_tolerance(lse, expected_lse)


def grid_arguments(grid):
    return () if grid is None else (grid.video_shape, grid.cube)


def backward(
    run, case, grad_out, out, lse, grad_lse=None, pooled=(None, None, None), coarse_grid=None,
    deterministic=True,
):  # fmt: skip
    """dq, dk, dv by the kernels, as autograd calls them; out and lse as a forward gives them.

    With coarse_grid without lists, and pooled gradients by its cubes.
    """
    _, delta, *_ = run(
        _kernels.combine_backward, grad_out, out, grad_lse, None, None, None, 1.0, 0.0, case.q_block_sizes,
        case.q_shape, case.cube,
    )  # fmt: skip
    index = (None,) * 4
    if coarse_grid is None:
        lists = case.kv_num_blocks, case.kv_indices
        index = *lists, *run(_kernels.transpose_index, *lists, case.kv_grid.num_cubes)
    return run(
        _kernels.fine_backward, grad_out, case.query, case.key, case.value, lse, delta, *index,
        case.block_sizes, case.q_block_sizes, *pooled, case.q_shape, case.kv_shape, case.cube, case.kv_cube,
        case.scale, deterministic, *grid_arguments(coarse_grid),
    )  # fmt: skip


TWO_PASSES, FUSED = (_kernels.TWO_PASSES,), (_kernels.FUSED,)
BOTH = TWO_PASSES + FUSED
LISTED_OR_DENSE = (_kernels.TWO_PASSES, _kernels.DENSE_QUERY_PASS)


def fine_passes(case, with_lists=True, deterministic=False):
    """What runs; where it is more than one way, the device chooses one."""
    lists = case.kv_indices if with_lists else None
    return _kernels._ways(
        case.head_dim, case.q_grid, case.kv_grid, lists, case.block_sizes, deterministic
    )  # fmt: skip


def exact_backward(case, grad_out, grad_lse=None, pooled=(None, None, None), pooled_grids=None):
    out, lse = case.reference()
    doubles = [None if x is None else x.double() for x in (grad_out, grad_lse)]
    _, delta, *_ = reference.combine_backward(
        doubles[0], out, doubles[1], None, case.q_grid, None, None, case.q_block_sizes
    )
    return out, lse, reference.fine_backward(
        doubles[0], case.query.double(), case.key.double(), case.value.double(), lse, delta,
        case.kv_num_blocks, case.kv_indices, case.q_grid, case.kv_grid, case.scale, case.block_sizes,
        case.q_block_sizes, *pooled, pooled_grids,
    )  # fmt: skip


def new_gradient(case):
    """Like a gradient of out; NaN in the pads of ragged blocks."""
    grad_out = case.randn(*case.query.shape).to(case.dtype)
    if case.ragged:
        grad_out[:, ~case._real(case.q_grid, case.q_block_sizes)] = torch.nan
    return grad_out


def check_fine_backward(
    run, case, grad_lse=None, pooled=(None, None, None), coarse_grid=None, deterministic=None
):  # fmt: skip
    """Returns dq, dk, dv; of both structures, where `deterministic` is None, those of deterministic=False."""
    grad_out = new_gradient(case)
    grids = None if coarse_grid is None else (coarse_grid, coarse_grid)
    out, lse, exact = exact_backward(case, grad_out, grad_lse, pooled, grids)
    baseline = half_precision_baseline(
        case.query, case.key, case.value, case.kv_num_blocks, case.kv_indices, case.q_grid, case.kv_grid,
        case.scale, grad_out, grad_lse, case.block_sizes, case.q_block_sizes, pooled, grids,
    )  # fmt: skip
    for choice in (True, False) if deterministic is None else (deterministic,):
        gradients = backward(
            run, case, grad_out, out.to(case.dtype), lse.float(), grad_lse, pooled, coarse_grid, choice
        )
        for name, *versions in zip(("dq", "dk", "dv"), gradients, exact, baseline[1:], strict=True):
            assert_within_tolerance(*versions, f"{name}, deterministic={choice}")
        if choice and fine_passes(case, coarse_grid is None) == TWO_PASSES:
            break  # they are what deterministic=False would run again
    return gradients
