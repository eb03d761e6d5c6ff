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


def simulate_select(query, key, topk, scale, seed=0):
    with simulated_device(query, key, seed=seed) as device:
        counts, indices = _kernels.select(query, key, topk, scale)
    device.assert_written(counts, indices)
    assert len(device.reports) == 1
    assert_valid(counts, indices, query.shape[:3], topk)
    return indices


def assert_equals_reference(query, key, topk, scale, seed=0):
    indices = simulate_select(query, key, topk, scale, seed)
    expected = reference.coarse_forward(query, key, key, topk, scale, with_output=False)[3]
    assert torch.equal(indices, expected)


# Plans.


def plan(batch=1, heads=1, cubes=100, head_dim=128, topk=10, scale=0.5, dtype="bfloat16", **changes):
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
    return C.plan_select(**(arguments | changes))


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


def test_plan_fields():
    result = plan(batch=2, heads=3, cubes=100, topk=10, scale=-0.25, dtype="float16")
    assert result.kernel == "select_d128_fp16"
    # query and key coordinates (columns, outer and batch factors), pointers, heads, cubes, topk, CTAs a head,
    # rows a CTA, scale
    assert struct.unpack("6i2Q5if", result.params) == (0, 1, 3, 0, 1, 3, 16, 32, 3, 100, 10, 2, 64, -0.25)
    for tensor_map, address in zip(result.maps, (1 << 20, 1 << 30), strict=True):
        assert tensor_map.address == address
        assert tensor_map.extents == (128, 100, 1, 1, 6)
        assert tensor_map.box == (64, 64, 1, 1, 1)
        assert tensor_map.strides[0] == 256 and tensor_map.strides[3] == 100 * 256
        assert tensor_map.element_type == "float16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": 0}, "topk: got 0, expected 1 to 100"),
        ({"topk": 101}, "topk: got 101, expected 1 to 100"),
        ({"scale": float("nan")}, "scale: got nan"),
        ({"scale": 1e39}, "scale: got 1e"),
        ({"counts": 0}, "counts: got a null pointer"),
        ({"indices": 0}, "indices: got a null pointer"),
        ({"head_dim": 96}, "head_dim: got 96, expected 64 or 128"),
        ({"dtype": "float32"}, "dtype: got float32"),
        (
            {"batch": 1 << 20, "heads": 1 << 10, "cubes": 1 << 10},
            "expected at most 2\\^31 - 1|expected less than 2\\^40",
        ),
    ],
)
def test_plan_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


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


# The kernel in the simulator.


@pytest.mark.simulator
@pytest.mark.parametrize(
    ("batch", "heads", "cubes", "topk", "head_dim", "dtype"),
    [
        (1, 1, 1, 1, 128, BF16),
        (2, 2, 2, 1, 64, BF16),
        (1, 2, 2, 2, 128, FP16),
        (1, 1, 63, 5, 128, BF16),
        (2, 1, 64, 63, 64, FP16),
        (1, 2, 64, 1, 128, BF16),
        (1, 3, 65, 64, 64, BF16),
        (2, 2, 65, 2, 128, FP16),
        (1, 2, 130, 13, 128, BF16),
        (1, 1, 130, 129, 64, BF16),
        (2, 1, 193, 100, 64, FP16),
        (1, 1, 364, 32, 128, BF16),
        (1, 1, 364, 364, 128, BF16),
    ],
)
def test_select_takes_the_largest_scores(seed, batch, heads, cubes, topk, head_dim, dtype):
    query, key = normal(batch, heads, cubes, head_dim, dtype)
    indices = simulate_select(query, key, topk, head_dim**-0.5, seed)
    assert_largest(query, key, topk, head_dim**-0.5, indices)


@pytest.mark.simulator
@pytest.mark.parametrize("topk", [1, 2, 40, 129])
@pytest.mark.parametrize("scale", [0.125, -0.5])
@pytest.mark.parametrize(("head_dim", "dtype"), [(128, BF16), (64, FP16)])
def test_ties_go_to_the_lower_index(seed, topk, scale, head_dim, dtype):
    query, key = integers(1, 2, 130, head_dim, dtype)
    assert_equals_reference(query, key, topk, scale, seed)


@pytest.mark.simulator
@pytest.mark.parametrize(("cubes", "topk"), [(65, 1), (130, 64), (130, 65), (200, 127), (200, 199)])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_all_scores_equal(seed, cubes, topk, scale):
    """With scale 0, or keys that are all the same, the first topk cubes are selected."""
    query, key = normal(1, 1, cubes, 64, BF16)
    if scale:
        key = key[:, :, :1].expand_as(key).contiguous()
    indices = simulate_select(query, key, topk, scale, seed)
    assert torch.equal(indices, torch.arange(topk, dtype=torch.int32).expand_as(indices))


@pytest.mark.simulator
def test_scores_that_differ_in_the_last_bit_only(seed):
    """Scores 1 + j * 2^-23: the decision falls in the last pass."""
    cubes, topk = 130, 37
    query, key = torch.zeros(2, 1, 1, cubes, 64, dtype=BF16).unbind(0)
    steps = torch.randperm(cubes)
    query[..., 0], query[..., 1] = 1.0, 2.0**-23
    key[..., 0], key[..., 1] = 1.0, steps.to(BF16)
    assert_equals_reference(query, key, topk, 1.0, seed)


@pytest.mark.simulator
def test_negative_zero_equals_zero(seed):
    """Scores that underflow to -0 and to +0."""
    query, key = torch.zeros(2, 1, 1, 130, 64, dtype=BF16).unbind(0)
    query[..., 0] = 0.5
    key[..., 0] = 0.5 * torch.randint(-1, 2, (130,))
    indices = simulate_select(query, key, 50, 2.0**-149, seed)
    assert torch.equal(indices, torch.arange(50, dtype=torch.int32).expand_as(indices))


@pytest.mark.simulator
@pytest.mark.parametrize("topk", [1, 3, 60])
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_nan_and_infinite_scores(seed, topk, scale):
    """NaN before +inf before numbers before -inf, and still topk distinct cubes."""
    query, key = integers(1, 1, 100, 64, BF16)
    query[0, 0, :, 0] = 1.0
    query[0, 0, 7, 0] = torch.nan
    key[0, 0, torch.tensor([5, 70, 71]), 0] = torch.nan
    key[0, 0, torch.tensor([0, 80]), 0] = torch.inf
    key[0, 0, torch.tensor([1, 66, 99]), 0] = -torch.inf
    assert_equals_reference(query, key, topk, scale, seed)


@pytest.mark.simulator
@pytest.mark.parametrize(
    ("heads", "cubes", "topk", "head_dim", "dtype"),
    [(34, 70, 9, 128, BF16), (23, 130, 30, 64, FP16), (17, 200, 7, 64, BF16), (67, 65, 65, 128, FP16)],
)
def test_two_row_groups(seed, heads, cubes, topk, head_dim, dtype):
    """Enough heads for the kernel with 128 rows a CTA."""
    query, key = integers(2, heads, cubes, head_dim, dtype)
    assert "wide" in plan(2, heads, cubes, head_dim, topk).kernel
    assert_equals_reference(query, key, topk, 0.5, seed)


@pytest.mark.simulator
@pytest.mark.parametrize("schedule", range(20))
def test_select_under_adversarial_schedules(seed, schedule):
    query, key = integers(1, 1, 260, 64, BF16)
    assert_equals_reference(query, key, 25, 0.5, seed * 1000 + schedule)


@pytest.mark.simulator
@pytest.mark.parametrize("schedule", range(20))
def test_select_wide_under_adversarial_schedules(seed, schedule):
    query, key = integers(1, 67, 65, 64, FP16)
    assert "wide" in plan(1, 67, 65, 64, 9).kernel
    assert_equals_reference(query, key, 9, 0.5, seed * 1000 + schedule)


@pytest.mark.simulator
def test_select_takes_strided_tensors(seed):
    packed = torch.randn(2, 70, 3, 2, 64).to(BF16)
    query, key = packed.unbind(3)[0].transpose(1, 2), packed.unbind(3)[1].transpose(1, 2)
    indices = simulate_select(query, key, 11, 0.125, seed)
    assert_largest(query, key, 11, 0.125, indices)


# The kernel on a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "heads", "cubes", "topk", "head_dim", "dtype"),
    [
        (1, 1, 1, 1, 128, BF16),
        (2, 3, 65, 64, 64, FP16),
        (1, 12, 364, 32, 128, BF16),
        (1, 40, 1440, 144, 128, BF16),
        (2, 24, 2160, 2159, 64, FP16),
        (1, 3, 1000, 1000, 128, FP16),
        (1, 2, 16384, 64, 128, BF16),
        (1, 1, 65536, 128, 64, BF16),
    ],
)
@pytest.mark.parametrize("values", [normal, integers])
def test_select_on_the_gpu(seed, batch, heads, cubes, topk, head_dim, dtype, values):
    query, key = (x.cuda() for x in values(batch, heads, cubes, head_dim, dtype))
    counts, indices = _kernels.select(query, key, topk, head_dim**-0.5)
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
    again = _kernels.select(query, key, topk, head_dim**-0.5)[1]
    assert torch.equal(indices, again)
