"""Selection of key cubes: host plans, the kernel in the simulator, and on a GPU."""

import struct

import pytest
import torch

from simulated import simulated_device
from vsa_cuda import _extension, _kernels, reference

pytestmark = pytest.mark.skipif(
    not _extension.is_available(), reason="vsa_cuda._C is not built: no host plan to test or simulate"
)

SHARED_LIMIT = 227 * 1024
BF16, FP16 = torch.bfloat16, torch.float16
SMALL_CUBES = 1024  # as many as plan_select gives to the kernel for few cubes
LARGE, SMALL = "plan_select_large", "plan_select_small"
both_kernels = pytest.mark.parametrize("planner", [LARGE, SMALL])


def normal(batch, heads, cubes, head_dim, dtype):
    return tuple(torch.randn(batch, heads, cubes, head_dim).to(dtype) for _ in range(2))


def integers(batch, heads, cubes, head_dim, dtype):
    """Small whole numbers, mostly 0: every score is exact in fp32, and most are shared by several keys."""
    shape = (batch, heads, cubes, head_dim)
    return tuple((torch.randint(-2, 3, shape) * (torch.rand(shape) < 0.1)).to(dtype) for _ in range(2))


def assert_valid(counts, indices, rows, topk):
    """Exactly topk distinct cubes a row, ascending."""
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.shape == rows and indices.shape == (*rows, topk)
    assert (counts == topk).all()
    assert (indices[..., 0] >= 0).all() and (indices[..., -1] < rows[-1]).all()
    assert (indices[..., 1:] > indices[..., :-1]).all()


def assert_largest(query, key, topk, scale, indices):
    """Chosen scores reach the topk-th largest, others do not exceed it, within an fp32 product's rounding."""
    head_dim = query.shape[-1]
    for q, k, chosen in zip(
        query.flatten(0, 1), key.flatten(0, 1), indices.flatten(0, 1).long(), strict=True
    ):
        for rows in torch.arange(q.shape[0], device=q.device).split(2048):
            scores = q[rows].double() @ k.double().T * scale
            magnitude = q[rows].double().abs() @ k.double().abs().T * abs(scale)
            slack = 4 * head_dim * 2**-24 * magnitude.amax(dim=-1, keepdim=True)
            last = scores.topk(topk, dim=-1).values[:, -1:]
            assert (scores.gather(1, chosen[rows]) >= last - slack).all()
            others = scores.scatter(1, chosen[rows], -torch.inf)
            assert (others <= last + slack).all()


def simulate_select(query, key, topk, scale, seed, planner):
    with simulated_device(query, key, seed=seed) as device:
        counts, indices = _kernels.select(query, key, topk, scale, planner)
    device.assert_written(counts, indices)
    assert len(device.reports) == 1
    assert_valid(counts, indices, query.shape[:3], topk)
    return indices


def assert_equals_reference(query, key, topk, scale, seed, planner):
    indices = simulate_select(query, key, topk, scale, seed, planner)
    expected = reference.coarse_forward(query, key, key, topk, scale, with_output=False)[3]
    assert torch.equal(indices, expected)


# Plans.


def plan(
    batch=1, heads=1, cubes=100, head_dim=128, topk=10, scale=0.5, dtype="bfloat16", planner=LARGE, **changes
):
    C = _extension.load()
    shape = (batch, cubes, heads, head_dim)
    strides = (heads * cubes * head_dim, head_dim, cubes * head_dim, 1)
    arguments = {
        "query": C.TokenTensor(address=1 << 20, shape=shape, strides=strides, dtype=dtype),
        "key": C.TokenTensor(address=1 << 30, shape=shape, strides=strides, dtype=dtype),
        "topk": topk,
        "scale": scale,
        "counts": 16,
        "indices": 32,
    }
    return getattr(C, planner)(**(arguments | changes))


def unpacked(result):
    """(query and key coordinates, counts, indices, heads, cubes, topk, CTAs a head, rows a CTA, scale)."""
    return struct.unpack("6i2Q5if", result.params)


@pytest.mark.parametrize("cubes", [1, 63, 64, 65, 364, 1440, 16384, 65536])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [1, 12, 40])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_plan_covers_all_rows(cubes, batch, heads, head_dim):
    result = plan(batch, heads, cubes, head_dim, topk=1)
    assert result.kernel in (f"select_d{head_dim}_bf16", f"select_wide_d{head_dim}_bf16")
    wide = "wide" in result.kernel
    narrow_ctas = batch * heads * -(-cubes // 64)
    assert wide == (narrow_ctas > 132)
    assert result.grid == (batch * heads * -(-cubes // 128) if wide else narrow_ctas, 1, 1)
    assert result.block == (544 if wide else 288, 1, 1)
    assert result.shared_bytes <= SHARED_LIMIT
    assert result.kernel in _extension.load().kernel_names()


@pytest.mark.parametrize("cubes", [1, 2, 33, 364, 384, 385, 512, 513, 1000, 1024])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads", [1, 12, 40, 200])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_small_plan_fills_the_sms(cubes, batch, heads, head_dim):
    """One round of CTAs on the SMs after another: no more of them than the most rows a CTA allow."""
    result = plan(batch, heads, cubes, head_dim, topk=1, planner=SMALL)
    assert result.kernel == f"select_small_d{head_dim}_bf16"
    assert result.kernel in _extension.load().kernel_names()
    ctas_per_head, rows = unpacked(result)[11:13]
    assert (ctas_per_head - 1) * rows < cubes <= ctas_per_head * rows
    assert result.grid == (batch * heads * ctas_per_head, 1, 1) and result.block == (768, 1, 1)

    most_rows = 48 if cubes <= 512 else 24  # two rows a warp, or one
    rounds = -(-batch * heads * -(-cubes // most_rows) // 132)
    assert rows <= most_rows and -(-result.grid[0] // 132) <= rounds
    smaller_ctas = batch * heads * -(-cubes // max(rows - 1, 1))
    assert rows == 1 or smaller_ctas > rounds * 132

    tiles = 7 * 64 * head_dim * 2 if head_dim == 128 else 13 * 64 * head_dim * 2
    scores = -(-rows // 8) * 8 * -(-cubes // 64) * 64 * 4
    assert tiles + scores < result.shared_bytes <= tiles + scores + 1024
    assert result.shared_bytes <= SHARED_LIMIT


def test_small_plan_of_a_short_clip():
    """Video 16x28x52 with 12 heads: a CTA for each SM."""
    result = plan(heads=12, cubes=364, topk=32, planner=SMALL)
    assert result.grid == (132, 1, 1) and unpacked(result)[11:13] == (11, 34)


@pytest.mark.parametrize("cubes", [1, 364, SMALL_CUBES, SMALL_CUBES + 1, 1440, 65536])
@pytest.mark.parametrize("heads", [1, 40])
def test_the_number_of_cubes_chooses_the_kernel(cubes, heads):
    result = plan(heads=heads, cubes=cubes, topk=1, planner="plan_select")
    assert ("small" in result.kernel) == (cubes <= SMALL_CUBES)
    expected = plan(heads=heads, cubes=cubes, topk=1, planner=SMALL if cubes <= SMALL_CUBES else LARGE)
    assert (result.kernel, result.grid, result.params) == (expected.kernel, expected.grid, expected.params)


@pytest.mark.parametrize(
    ("planner", "stem", "ctas", "rows"), [(LARGE, "select", 2, 64), (SMALL, "select_small", 20, 5)]
)
def test_plan_fields(planner, stem, ctas, rows):
    result = plan(batch=2, heads=3, cubes=100, topk=10, scale=-0.25, dtype="float16", planner=planner)
    assert result.kernel == f"{stem}_d128_fp16"
    assert unpacked(result) == (0, 1, 3, 0, 1, 3, 16, 32, 3, 100, 10, ctas, rows, -0.25)
    assert result.grid == (6 * ctas, 1, 1)
    for tensor_map, address in zip(result.maps, (1 << 20, 1 << 30), strict=True):
        assert tensor_map.address == address
        assert tensor_map.extents == (128, 100, 1, 1, 6)
        assert tensor_map.box == (64, 64, 1, 1, 1)
        assert tensor_map.strides[0] == 256 and tensor_map.strides[3] == 100 * 256
        assert tensor_map.element_type == "float16"


@both_kernels
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": 0}, "topk: got 0, expected 1 to 100"),
        ({"topk": 101}, "topk: got 101, expected 1 to 100"),
        ({"scale": float("nan")}, "scale: got nan"),
        ({"scale": 1e39}, "scale: got 1e"),
        ({"counts": 0}, "counts: got a null pointer"),
        ({"indices": 0}, "indices: got a null pointer"),
        ({"heads": 0}, "query: got batch 1, heads 0, expected at least 1 of each"),
        ({"head_dim": 96}, "head_dim: got 96, expected 64 or 128"),
        ({"dtype": "float32"}, "dtype: got float32"),
        (
            {"batch": 1 << 20, "heads": 1 << 10, "cubes": 1 << 10},
            "expected 1 to 2\\^31 - 1|expected less than 2\\^40",
        ),
    ],
)
def test_plan_errors(changes, message, planner):
    with pytest.raises(ValueError, match=message):
        plan(planner=planner, **changes)


def test_small_plan_refuses_many_cubes():
    with pytest.raises(ValueError, match="query: got 1025 cubes, expected at most 1024"):
        plan(cubes=1025, planner=SMALL)


def test_plan_rejects_a_key_of_another_shape():
    C = _extension.load()
    other = C.TokenTensor(
        address=1 << 30, shape=(1, 99, 1, 128), strides=(99 * 128, 128, 128, 1), dtype="bfloat16"
    )
    with pytest.raises(ValueError, match="key: got 99 tokens, expected 100"):
        plan(key=other)
    heads = C.TokenTensor(
        address=1 << 30, shape=(1, 100, 2, 128), strides=(25600, 256, 128, 1), dtype="bfloat16"
    )
    with pytest.raises(ValueError, match="key: got batch 1, heads 2"):
        plan(key=heads)


# The kernels in the simulator.


@pytest.mark.simulator
@pytest.mark.parametrize(
    ("batch", "heads", "cubes", "topk", "head_dim", "dtype"),
    [
        (1, 1, 1, 1, 128, BF16),
        (2, 2, 2, 1, 64, BF16),
        (1, 2, 2, 2, 128, FP16),
        (1, 1, 31, 30, 128, FP16),
        (1, 2, 32, 1, 64, BF16),
        (1, 1, 33, 32, 128, BF16),
        (1, 1, 63, 5, 128, BF16),
        (2, 1, 64, 63, 64, FP16),
        (1, 2, 64, 1, 128, BF16),
        (1, 3, 65, 64, 64, BF16),
        (2, 2, 65, 2, 128, FP16),
        (2, 3, 100, 10, 64, BF16),
        (1, 2, 130, 13, 128, BF16),
        (1, 1, 130, 129, 64, BF16),
        (2, 1, 193, 100, 64, FP16),
        (1, 1, 364, 1, 64, FP16),
        (1, 1, 364, 32, 128, BF16),
        (1, 1, 364, 363, 128, FP16),
        (1, 1, 364, 364, 128, BF16),
    ],
)
@both_kernels
def test_select_takes_the_largest_scores(seed, batch, heads, cubes, topk, head_dim, dtype, planner):
    query, key = normal(batch, heads, cubes, head_dim, dtype)
    indices = simulate_select(query, key, topk, head_dim**-0.5, seed, planner)
    assert_largest(query, key, topk, head_dim**-0.5, indices)


@pytest.mark.simulator
@pytest.mark.parametrize(
    ("heads", "cubes", "topk", "head_dim", "dtype", "rows"),
    [
        (12, 364, 32, 128, BF16, 34),
        (66, 96, 17, 64, FP16, 48),  # the most rows of a CTA; two a warp
        (1, 512, 500, 128, FP16, 4),
        (1, 513, 3, 64, BF16, 4),
        (6, 528, 40, 128, BF16, 24),  # the most rows; one a warp
        (1, SMALL_CUBES, 1, 64, FP16, 8),
        (1, SMALL_CUBES, 100, 128, BF16, 8),
        (1, SMALL_CUBES, SMALL_CUBES - 1, 64, BF16, 8),
        (1, SMALL_CUBES, SMALL_CUBES, 128, FP16, 8),
    ],
)
def test_sizes_of_the_small_kernel(seed, heads, cubes, topk, head_dim, dtype, rows):
    assert unpacked(plan(heads=heads, cubes=cubes, topk=topk, planner=SMALL))[12] == rows
    query, key = integers(1, heads, cubes, head_dim, dtype)
    assert_equals_reference(query, key, topk, 0.5, seed, SMALL)


@pytest.mark.simulator
@pytest.mark.parametrize("topk", [1, 2, 40, 129])
@pytest.mark.parametrize("scale", [0.125, -0.5])
@pytest.mark.parametrize(("head_dim", "dtype"), [(128, BF16), (64, FP16)])
@both_kernels
def test_ties_go_to_the_lower_index(seed, topk, scale, head_dim, dtype, planner):
    query, key = integers(1, 2, 130, head_dim, dtype)
    assert_equals_reference(query, key, topk, scale, seed, planner)


@pytest.mark.simulator
@pytest.mark.parametrize(("cubes", "topk"), [(65, 1), (130, 64), (130, 65), (200, 127), (200, 199)])
@pytest.mark.parametrize("scale", [0.0, 1.0])
@both_kernels
def test_all_scores_equal(seed, cubes, topk, scale, planner):
    """With scale 0, or keys that are all the same, the first topk cubes are selected."""
    query, key = normal(1, 1, cubes, 64, BF16)
    if scale:
        key = key[:, :, :1].expand_as(key).contiguous()
    indices = simulate_select(query, key, topk, scale, seed, planner)
    assert torch.equal(indices, torch.arange(topk, dtype=torch.int32).expand_as(indices))


@pytest.mark.simulator
@both_kernels
def test_scores_that_differ_in_the_last_bit_only(seed, planner):
    """Scores 1 + j * 2^-23: the decision falls in the last pass."""
    cubes, topk = 130, 37
    query, key = torch.zeros(2, 1, 1, cubes, 64, dtype=BF16).unbind(0)
    steps = torch.randperm(cubes)
    query[..., 0], query[..., 1] = 1.0, 2.0**-23
    key[..., 0], key[..., 1] = 1.0, steps.to(BF16)
    assert_equals_reference(query, key, topk, 1.0, seed, planner)


@pytest.mark.simulator
@both_kernels
def test_negative_zero_equals_zero(seed, planner):
    """Scores that underflow to -0 and to +0."""
    query, key = torch.zeros(2, 1, 1, 130, 64, dtype=BF16).unbind(0)
    query[..., 0] = 0.5
    key[..., 0] = 0.5 * torch.randint(-1, 2, (130,))
    indices = simulate_select(query, key, 50, 2.0**-149, seed, planner)
    assert torch.equal(indices, torch.arange(50, dtype=torch.int32).expand_as(indices))


@pytest.mark.simulator
@pytest.mark.parametrize("topk", [1, 3, 60])
@pytest.mark.parametrize("scale", [1.0, -1.0])
@both_kernels
def test_nan_and_infinite_scores(seed, topk, scale, planner):
    """NaN before +inf before numbers before -inf, and still topk distinct cubes."""
    query, key = integers(1, 1, 100, 64, BF16)
    query[0, 0, :, 0] = 1.0
    query[0, 0, 7, 0] = torch.nan
    key[0, 0, torch.tensor([5, 70, 71]), 0] = torch.nan
    key[0, 0, torch.tensor([0, 80]), 0] = torch.inf
    key[0, 0, torch.tensor([1, 66, 99]), 0] = -torch.inf
    assert_equals_reference(query, key, topk, scale, seed, planner)


@pytest.mark.simulator
@pytest.mark.parametrize(
    ("heads", "cubes", "topk", "head_dim", "dtype"),
    [(34, 70, 9, 128, BF16), (23, 130, 30, 64, FP16), (17, 200, 7, 64, BF16), (67, 65, 65, 128, FP16)],
)
def test_two_row_groups(seed, heads, cubes, topk, head_dim, dtype):
    """Enough heads for the kernel with 128 rows a CTA."""
    query, key = integers(2, heads, cubes, head_dim, dtype)
    assert "wide" in plan(2, heads, cubes, head_dim, topk).kernel
    assert_equals_reference(query, key, topk, 0.5, seed, LARGE)


@pytest.mark.simulator
@pytest.mark.parametrize("schedule", range(20))
def test_select_under_adversarial_schedules(seed, schedule):
    query, key = integers(1, 1, 260, 64, BF16)
    assert_equals_reference(query, key, 25, 0.5, seed * 1000 + schedule, LARGE)


@pytest.mark.simulator
@pytest.mark.parametrize("schedule", range(20))
def test_select_wide_under_adversarial_schedules(seed, schedule):
    query, key = integers(1, 67, 65, 64, FP16)
    assert "wide" in plan(1, 67, 65, 64, 9).kernel
    assert_equals_reference(query, key, 9, 0.5, seed * 1000 + schedule, LARGE)


@pytest.mark.simulator
@pytest.mark.parametrize("schedule", range(20))
def test_select_small_under_adversarial_schedules(seed, schedule):
    """More key tiles than the rings of the warpgroups hold at once."""
    cubes, head_dim = (400, 128) if schedule % 2 else (800, 64)
    query, key = integers(1, 1, cubes, head_dim, BF16)
    assert_equals_reference(query, key, 25, 0.5, seed * 1000 + schedule, SMALL)


@pytest.mark.simulator
@pytest.mark.parametrize("batch", [1, 2])
@both_kernels
def test_select_takes_strided_tensors(seed, batch, planner):
    """A head is one of the tensor maps' outermost dimension, or, of a batch, a run of columns."""
    packed = torch.randn(batch, 70, 3, 2, 64).to(BF16)
    query, key = packed.unbind(3)[0].transpose(1, 2), packed.unbind(3)[1].transpose(1, 2)
    indices = simulate_select(query, key, 11, 0.125, seed, planner)
    assert_largest(query, key, 11, 0.125, indices)


# The kernels on a GPU.

GPU_CASES = [
    (1, 1, 1, 1, 128, BF16),
    (2, 3, 65, 64, 64, FP16),
    (1, 12, 364, 32, 128, BF16),
    (2, 66, 96, 17, 64, FP16),
    (3, 12, 512, 100, 64, BF16),
    (1, 40, 513, 52, 128, FP16),
    (1, 12, 1024, 103, 128, BF16),
    (1, 3, 1000, 1000, 128, FP16),
    (1, 40, 1440, 144, 128, BF16),
    (2, 24, 2160, 2159, 64, FP16),
    (1, 2, 16384, 64, 128, BF16),
    (1, 1, 65536, 128, 64, BF16),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("planner", "batch", "heads", "cubes", "topk", "head_dim", "dtype"),
    [(LARGE, *case) for case in GPU_CASES] + [(SMALL, *case) for case in GPU_CASES if case[2] <= SMALL_CUBES],
)
@pytest.mark.parametrize("values", [normal, integers])
def test_select_on_the_gpu(seed, planner, batch, heads, cubes, topk, head_dim, dtype, values):
    query, key = (x.cuda() for x in values(batch, heads, cubes, head_dim, dtype))
    counts, indices = _kernels.select(query, key, topk, head_dim**-0.5, planner)
    assert_valid(counts, indices, query.shape[:3], topk)
    if values is integers:
        scale = head_dim**-0.5
        for head in range(batch * heads):
            q, k, chosen = (x.flatten(0, 1)[head] for x in (query, key, indices))
            for rows in torch.arange(cubes, device="cuda").split(2048):
                order = (
                    (q[rows].float() @ k.float().T * scale).sort(dim=-1, descending=True, stable=True).indices
                )
                assert torch.equal(chosen[rows].long(), order[:, :topk].sort(dim=-1).values)
    else:
        assert_largest(query, key, topk, head_dim**-0.5, indices)
    again = _kernels.select(query, key, topk, head_dim**-0.5, planner)[1]
    assert torch.equal(indices, again)
