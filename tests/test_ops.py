"""The operators: schemas, opcheck, the rules of their empty results, devices and launch."""

import sys
import types

import pytest
import torch

from inputs import random_index, random_video
from vsa_cuda import _extension, checks, ops, reference
from vsa_cuda.geometry import CubeGrid

SHAPE, CUBE = (3, 5, 6), (4, 4, 4)  # 1 x 2 x 2 cubes, all partial but for one dimension
KV_SHAPE, KV_CUBE = (2, 4, 9), (2, 4, 8)  # 1 x 1 x 2 cubes
SCALE = 64**-0.5


def coarse_arguments(dtype, with_output=True, topk=2):
    return (*random_video(3, SHAPE, dtype=dtype), SHAPE, CUBE, topk, SCALE, with_output)


def coarse_backward_arguments(dtype):
    arguments = coarse_arguments(dtype)
    query_pooled, key_pooled, value_pooled, out, lse, *_ = ops.coarse_forward(*arguments)
    grad = torch.randn_like(out)
    return grad, query_pooled, key_pooled, value_pooled, out, lse, SCALE


def gates(kind, like):
    """gate_fine, gate_coarse, gate_fine_value, gate_coarse_value."""
    scalar = torch.float64 if like.dtype == torch.float64 else torch.float32
    return {
        "none": (None, None, 1.0, 1.0),
        "float": (None, None, 0.5, -2.0),
        "scalar": (torch.tensor(0.7, dtype=scalar), torch.tensor(0.2, dtype=scalar), 1.0, 1.0),
        "tensor": (torch.randn_like(like), torch.randn_like(like), 1.0, 1.0),
        # Any strides: one gate value per head, expanded.
        "expanded": (None, torch.randn(1, 1, 2, 1).to(like.dtype).expand_as(like), 1.0, 1.0),
    }[kind]


def fine_arguments(dtype, gate="none", coarse=True, sizes=False):
    (query,) = random_video(1, SHAPE, dtype=dtype)
    key, value = random_video(2, KV_SHAPE, dtype=dtype)
    counts, indices = random_index(4, 2, 2)
    sizes = (torch.tensor([64, 3]), torch.tensor([7, 64, 1, 0])) if sizes else (None, None)
    block_sizes, q_block_sizes = (None if x is None else x.to(torch.int32) for x in sizes)
    coarse = torch.randn(1, 2, 4, 64).to(dtype) if coarse else None
    shapes = (SHAPE, KV_SHAPE, CUBE, KV_CUBE, SCALE)
    return (
        query,
        key,
        value,
        counts,
        indices,
        block_sizes,
        q_block_sizes,
        coarse,
        *gates(gate, query),
        *shapes,
        True,
    )


def combine_backward_arguments(dtype, gate="none", coarse=True, with_lse=True, sizes=False):
    query, _, _, _, _, _, q_block_sizes, coarse, *rest = arguments = fine_arguments(
        dtype, gate, coarse, sizes
    )
    out, out_fine, lse = ops.fine_forward(*arguments)
    grad_lse = torch.randn_like(lse) if with_lse else None
    out_fine = out if out_fine.numel() == 0 else out_fine
    return torch.randn_like(query), out_fine, grad_lse, coarse, *rest[:4], q_block_sizes, SHAPE, CUBE


def fine_backward_arguments(dtype, pooled=True, sizes=False):
    query, key, value, counts, indices, *sizes = arguments = fine_arguments(dtype, "none", False, sizes)
    out, _, lse = ops.fine_forward(*arguments)
    grad = torch.randn_like(query)
    _, delta, *_ = ops.combine_backward(
        grad, out, None, None, None, None, 1.0, 0.0, arguments[6], SHAPE, CUBE
    )
    transposed = ops.transpose_index(counts, indices, 2)
    shapes = (4, 2, 2) if pooled else ()
    pooled = [torch.randn(1, 2, cubes, 64, dtype=lse.dtype) for cubes in shapes] or [None] * 3
    geometry = (SHAPE, KV_SHAPE, CUBE, KV_CUBE, SCALE)
    tensors = (grad, query, key, value, lse, delta, counts, indices, *transposed)
    return *tensors, *arguments[5:7], *pooled, *geometry, True


def linear_arguments(dtype):
    """fine_forward, combine_backward, fine_backward of all blocks of 64 tokens, the coarse stage on cubes."""
    query, key, value, gate = random_video(4, SHAPE, dtype=dtype)
    pooled = [torch.randn(1, 2, 4, 64).to(dtype) for _ in range(4)]
    shape, block = (1, 1, 90), (1, 1, 64)
    geometry = (shape, shape, block, block, SCALE)
    tensors = (query, key, value, None, None, None, None, pooled[0], None, gate)
    forward = (*tensors, 1.0, 1.0, *geometry, True, SHAPE, CUBE)
    _, out_fine, lse = ops.fine_forward(*forward)
    grad = torch.randn_like(query)
    gates = (None, gate, 1.0, 1.0)
    combine = (grad, out_fine, None, pooled[0], *gates, None, shape, block, SHAPE, CUBE)
    delta = ops.combine_backward(*combine)[1]
    tensors = (grad, query, key, value, lse, delta, *(None,) * 6, *pooled[1:])
    return forward, combine, (*tensors, *geometry, True, SHAPE, CUBE)


SAMPLES = {
    "pool": lambda dtype: (*random_video(3, SHAPE, dtype=dtype), SHAPE, CUBE),
    "coarse_forward": coarse_arguments,
    "coarse_forward-no-output": lambda dtype: coarse_arguments(dtype, with_output=False),
    "coarse_backward": coarse_backward_arguments,
    "transpose_index": lambda dtype: (*random_index(4, 3, 2), 3),
    "fine_forward-alone": lambda dtype: fine_arguments(dtype, coarse=False),
    "fine_forward-sizes": lambda dtype: fine_arguments(dtype, coarse=False, sizes=True),
    "fine_forward-none": fine_arguments,
    "fine_forward-float": lambda dtype: fine_arguments(dtype, "float"),
    "fine_forward-scalar": lambda dtype: fine_arguments(dtype, "scalar"),
    "fine_forward-tensor": lambda dtype: fine_arguments(dtype, "tensor"),
    "fine_forward-expanded": lambda dtype: fine_arguments(dtype, "expanded"),
    "combine_backward-alone": lambda dtype: combine_backward_arguments(dtype, coarse=False),
    "combine_backward-sizes": lambda dtype: combine_backward_arguments(dtype, coarse=False, sizes=True),
    "combine_backward-none": lambda dtype: combine_backward_arguments(dtype, with_lse=False),
    "combine_backward-float": lambda dtype: combine_backward_arguments(dtype, "float"),
    "combine_backward-scalar": lambda dtype: combine_backward_arguments(dtype, "scalar"),
    "combine_backward-tensor": lambda dtype: combine_backward_arguments(dtype, "tensor"),
    "combine_backward-expanded": lambda dtype: combine_backward_arguments(dtype, "expanded"),
    "fine_backward": fine_backward_arguments,
    "fine_backward-alone": lambda dtype: fine_backward_arguments(dtype, pooled=False),
    "coarse_forward-no-selection": lambda dtype: (*coarse_arguments(dtype), False),
    "fine_forward-linear": lambda dtype: linear_arguments(dtype)[0],
    "combine_backward-linear": lambda dtype: linear_arguments(dtype)[1],
    "fine_backward-linear": lambda dtype: linear_arguments(dtype)[2],
    "fine_backward-sizes": lambda dtype: fine_backward_arguments(dtype, pooled=False, sizes=True),
}


def operator(sample):
    return getattr(ops, sample.split("-")[0])


def test_samples_cover_all_ops():
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "vsa_cuda::" in name}
    assert {sample.split("-")[0] for sample in SAMPLES} == defined


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample, dtype, seed):
    torch.library.opcheck(operator(sample), SAMPLES[sample](dtype))


@pytest.mark.parametrize("sample", SAMPLES)
def test_results_are_contiguous_new_tensors(sample, seed):
    arguments = SAMPLES[sample](torch.float32)
    results = operator(sample)(*arguments)
    storages = [x.untyped_storage().data_ptr() for x in (*arguments, *results) if isinstance(x, torch.Tensor)]
    storages = [pointer for pointer in storages if pointer]
    assert all(result.is_contiguous() for result in results)
    assert len(set(storages)) == len(storages)


def test_fine_forward_returns_out_fine_where_it_combines(seed):
    alone = ops.fine_forward(*fine_arguments(torch.float32, coarse=False))
    gated = ops.fine_forward(*fine_arguments(torch.float32, "float", coarse=False))
    combined = ops.fine_forward(*fine_arguments(torch.float32))
    assert [x[1].numel() for x in (alone, gated, combined)] == [0, alone[0].numel(), alone[0].numel()]
    torch.testing.assert_close(gated[0], 0.5 * gated[1])


def test_fine_forward_combines_like_the_equation(seed):
    arguments = fine_arguments(torch.float64, "tensor")
    coarse, gate_fine, gate_coarse = arguments[7:10]
    out, out_fine, _ = ops.fine_forward(*arguments)
    spread = coarse.transpose(1, 2)[:, CubeGrid(SHAPE, CUBE).cube_of_token()]
    torch.testing.assert_close(out, out_fine * gate_fine + spread * gate_coarse)


@pytest.mark.parametrize("gate", ["none", "float", "scalar", "tensor", "expanded"])
def test_combine_backward_is_the_gradient_of_combine(gate, seed):
    grad, out_fine, grad_lse, coarse, *rest = combine_backward_arguments(torch.float64, gate)
    tensors = [x.clone().requires_grad_() for x in (out_fine, coarse)]
    gate_tensors = [None if x is None else x.clone().requires_grad_() for x in rest[:2]]
    fine_gate, coarse_gate = (
        value if x is None else x for x, value in zip(gate_tensors, rest[2:4], strict=True)
    )
    out = reference.combine(*tensors, CubeGrid(SHAPE, CUBE), fine_gate, coarse_gate)
    inputs = tensors + [x for x in gate_tensors if x is not None]
    expected = torch.autograd.grad(out, inputs, grad)
    grad_fine, delta, *others = ops.combine_backward(grad, out_fine, grad_lse, coarse, *rest)
    if grad_fine.numel() == 0:
        assert gate in ("none", "expanded")
        grad_fine = grad
    present = [grad_fine, *(x for x in others if x.numel() > 0)]
    assert len(present) == len(expected)
    for actual, wanted in zip(present, expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    rows = (grad_fine * out_fine).sum(dim=-1).transpose(1, 2)
    grid = CubeGrid(SHAPE, CUBE)
    raster = (delta + grad_lse).flatten(2)[..., grid.slot_of_token()]
    torch.testing.assert_close(raster, rows)
    assert (delta[..., ~grid.valid()] == 0).all()


@pytest.mark.parametrize(
    ("sample", "change", "message"),
    [
        ("fine_forward-linear", {3: torch.ones(1, 2, 2).int()}, "kv_indices: got None with kv_num_blocks"),
        ("fine_backward-alone", {9: None}, "q_indices: got None with kv_num_blocks, kv_indices, q_offsets"),
        ("fine_forward-linear", {19: None}, "coarse_cube: got None with coarse_shape"),
        ("combine_backward-linear", {11: (1, 5, 6)}, "coarse_shape: got 30 tokens in .* the 90 tokens"),
        ("fine_backward-linear", {21: (2, 5, 6)}, "coarse_shape: got 60 tokens in .* the 90 tokens"),
    ],
)
def test_arguments_that_belong_together(sample, change, message, seed):
    arguments = dict(enumerate(SAMPLES[sample](torch.float32))) | change
    with pytest.raises(ValueError, match=message):
        operator(sample)(*arguments.values())


def test_ops_ignore_autocast(seed):
    arguments = coarse_arguments(torch.float32)
    expected = ops.coarse_forward(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = ops.coarse_forward(*arguments)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("sample", ["pool", "coarse_forward", "fine_forward-alone"])
def test_misaligned_base_raises(sample, position, seed):
    arguments = list(SAMPLES[sample](torch.bfloat16))
    x = arguments[position]
    arguments[position] = torch.empty(x.numel() + 8, dtype=x.dtype)[3 : 3 + x.numel()].view(x.shape)
    name = ("query", "key", "value")[position]
    with pytest.raises(ValueError, match=rf"{name}: got a base address 6 bytes past .*\.clone\(\)"):
        operator(sample)(*arguments)


def odd_gradients(good):
    """Gradients of the shape of `good` that TMA cannot read."""
    yield torch.ones(()).to(good.dtype).expand(good.shape)
    yield torch.ones(good.numel() + 1).to(good.dtype)[1:].view(good.shape)
    yield good.transpose(2, 3).contiguous().transpose(2, 3)
    yield torch.nn.functional.pad(good, (0, 1))[..., :-1]


def test_gradients_that_tma_cannot_read_are_copied(seed):
    seen = []
    run = ops._with_tma_gradient(lambda grad, other: seen.append((grad, other)))
    (good,) = random_video(1, SHAPE, dtype=torch.bfloat16)
    for grad in (good, good.transpose(1, 2).contiguous().transpose(1, 2), good[:, ::2]):
        run(grad, 1)
        assert seen[-1][0] is grad and seen[-1][1] == 1
    for grad in odd_gradients(good):
        run(grad, 1)
        assert seen[-1][0].is_contiguous() and seen[-1][0].data_ptr() % 16 == 0
        assert torch.equal(seen[-1][0], grad)


@pytest.mark.parametrize("sample", ["combine_backward-none", "fine_backward-alone"])
def test_gradients_may_have_any_strides(sample, seed):
    good, *rest = SAMPLES[sample](torch.bfloat16)
    for grad in odd_gradients(good):
        for x, y in zip(
            operator(sample)(grad, *rest), operator(sample)(grad.contiguous(), *rest), strict=True
        ):
            assert torch.equal(x, y)


def test_transpose_index_accepts_entries_beyond_the_list():
    counts = torch.tensor([[[1, 2, 0]]], dtype=torch.int32)
    indices = torch.tensor([[[[1, -5], [0, 1], [9, 9]]]], dtype=torch.int32)
    offsets, q_indices = ops.transpose_index(counts, indices, 2)
    assert offsets.tolist() == [[[0, 1, 3]]]
    assert q_indices.tolist() == [[[1, 0, 1, 0, 0, 0]]]


class FakeExtension(types.ModuleType):
    def __init__(self):
        super().__init__("vsa_cuda._C")
        self.launched = []

    def launch(self, plan, *, device, stream):
        self.launched.append((plan, device, stream))


@pytest.fixture
def fresh_extension(monkeypatch):
    """Forgets whether vsa_cuda._C was imported, before and after."""
    _extension._import.cache_clear()
    yield monkeypatch
    _extension._import.cache_clear()


def test_missing_extension_raises_once_used(fresh_extension):
    fresh_extension.setitem(sys.modules, "vsa_cuda._C", None)
    assert not _extension.is_available()
    assert "vsa_cuda._C" in _extension.unavailable_reason()
    with pytest.raises(
        RuntimeError, match=r"vsa_cuda\._C: got no compiled extension.*expected.*rebuild with"
    ):
        _extension.load()


def test_launch_uses_the_tensors_device_and_its_current_stream(fresh_extension):
    fake = FakeExtension()
    fresh_extension.setitem(sys.modules, "vsa_cuda._C", fake)
    fresh_extension.setattr(
        torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=100 + device.index)
    )
    tensor = types.SimpleNamespace(device=torch.device("cuda", 3))
    _extension.launch("plan", tensor)
    assert _extension.is_available() and fake.launched == [("plan", 3, 103)]


def test_gpu_that_is_not_sm_90_raises(monkeypatch):
    checks.check_gpu.cache_clear()
    capabilities = {0: (9, 0), 1: (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A100")
    checks.check_gpu(0)
    with pytest.raises(
        RuntimeError, match=r"device: got cuda:1 NVIDIA A100 \(sm_80\), expected an sm_90 GPU"
    ):
        checks.check_gpu(1)
    checks.check_gpu.cache_clear()


def test_every_op_has_a_cuda_implementation():
    for name in (sample.split("-")[0] for sample in SAMPLES):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vsa_cuda::{name}", "CUDA")
