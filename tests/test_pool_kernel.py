"""Cube mean-pooling in the simulator: partial cubes, layouts, dtypes, against the reference."""

import pytest
import torch

from simulated import simulated_device
from vsa_cuda import _extension, _kernels, reference
from vsa_cuda.geometry import CubeGrid

pytestmark = [
    pytest.mark.simulator,
    pytest.mark.skipif(
        not _extension.is_available(), reason="vsa_cuda._C is not built: no host plan to simulate"
    ),
]


def inputs(batch, grid, heads, head_dim, dtype, layout):
    def tensor():
        if layout == "bhsd":
            return torch.randn(batch, heads, grid.num_tokens, head_dim).to(dtype).transpose(1, 2)
        if layout == "packed":
            return torch.randn(batch, grid.num_tokens, heads, 3 * head_dim).to(dtype)[
                ..., head_dim : 2 * head_dim
            ]
        return torch.randn(batch, grid.num_tokens, heads, head_dim).to(dtype)

    return [tensor() for _ in range(3)]


@pytest.mark.parametrize(
    ("video_shape", "cube", "batch", "heads", "head_dim", "dtype", "layout"),
    [
        ((4, 4, 4), (4, 4, 4), 1, 1, 128, torch.bfloat16, "bshd"),
        ((5, 6, 7), (4, 4, 4), 2, 2, 128, torch.bfloat16, "bshd"),
        ((5, 6, 7), (4, 4, 4), 2, 3, 64, torch.float16, "bhsd"),
        ((3, 9, 5), (1, 8, 8), 1, 2, 64, torch.bfloat16, "packed"),
        ((1, 1, 130), (1, 1, 64), 2, 2, 128, torch.float16, "packed"),
        ((2, 3, 5), (16, 2, 2), 1, 5, 128, torch.bfloat16, "bhsd"),
        ((1, 1, 1), (64, 1, 1), 3, 1, 64, torch.bfloat16, "bshd"),
    ],
)
def test_pool_equals_reference(seed, video_shape, cube, batch, heads, head_dim, dtype, layout):
    grid = CubeGrid(video_shape, cube)
    tensors = inputs(batch, grid, heads, head_dim, dtype, layout)
    with simulated_device(*tensors, seed=seed) as device:
        pooled = _kernels.pool(*tensors, video_shape, cube)
    device.assert_written(*pooled)
    assert len(device.reports) == 1
    for x, mean in zip(tensors, pooled, strict=True):
        exact = reference.pool(x.double(), grid)
        # fp32 sums of 64 terms, then one rounding to the input type.
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 64 * 2**-24 * x.abs().max()
        assert ((mean.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("schedule", range(20))
def test_pool_under_adversarial_schedules(seed, schedule):
    video_shape, cube = (5, 6, 7), (4, 4, 4)
    tensors = inputs(1, CubeGrid(video_shape, cube), 2, 64, torch.bfloat16, "bshd")
    with simulated_device(*tensors, seed=seed * 1000 + schedule) as device:
        pooled = _kernels.pool(*tensors, video_shape, cube)
    device.assert_written(*pooled)
    torch.testing.assert_close(
        pooled[0], reference.pool(tensors[0], CubeGrid(video_shape, cube)), rtol=1e-2, atol=1e-3
    )
