"""Gradients of the public functions, and what of autograd they refuse."""

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from inputs import random_index, random_tokens, random_video
from vsa_cuda import block_sparse_attention, video_sparse_attention
from vsa_cuda.autograd import BlockSparse, VideoSparse
from vsa_cuda.geometry import CubeGrid

SHAPE = (3, 5, 6)
TOKENS = 90


class OpCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vsa_cuda":
            self.counts[func._opname] = self.counts.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


def gate(kind, like):
    value = {"float": 0.7, "none": None, "zero": 0.0}.get(kind)
    if kind == "scalar":
        value = torch.tensor(0.7, dtype=like.dtype, requires_grad=True)
    if kind == "tensor":
        value = torch.randn_like(like).requires_grad_()
    return value


@pytest.mark.parametrize("gates", ["none none", "zero none", "tensor none", "scalar scalar", "float tensor"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_video_sparse_gradcheck(gates, layout, seed):
    # 3 cubes of 8, 8 and 2 tokens: small, because gradcheck repeats a failure element by element.
    inputs = random_tokens(3, 18, heads=1, dtype=torch.float64)
    if layout == "bhsd":
        inputs = [x.transpose(1, 2).contiguous() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    coarse, fine = (gate(kind, inputs[0].detach()) for kind in gates.split())
    tensors = [x for x in (coarse, fine) if isinstance(x, torch.Tensor)]

    def function(query, key, value, *_):
        return video_sparse_attention(
            query, key, value, (1, 2, 9), topk=2, gate_coarse=coarse, gate_fine=fine, layout=layout
        )

    assert torch.autograd.gradcheck(function, (*inputs, *tensors), fast_mode=True)


@pytest.mark.parametrize("sizes", [False, True])
def test_block_sparse_gradcheck(sizes, seed):
    (q,) = random_tokens(1, 26, heads=1, dtype=torch.float64)
    k, v = random_tokens(2, 20, heads=1, dtype=torch.float64)
    index = random_index(4, 2, 2, heads=1, counts=[2, 1, 0, 1])
    sizes = dict(block_sizes=[5, 3], q_block_sizes=[64, 7, 9, 1]) if sizes else {}
    sizes = {name: torch.tensor(x, dtype=torch.int32) for name, x in sizes.items()}

    def function(query, key, value):
        out, lse = block_sparse_attention(
            query, key, value, *index, video_shape=(1, 2, 13), kv_video_shape=(1, 2, 10), kv_cube=(1, 8, 8),
            return_lse=True, **sizes,
        )  # fmt: skip
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in (q, k, v)], fast_mode=True)


def merge(parts):
    """out and LSE over the union of disjoint lists."""
    lse = torch.stack([lse for _, lse in parts]).logsumexp(dim=0)
    weights = [torch.exp(part - lse).transpose(1, 2)[..., None] for _, part in parts]
    return sum(out * weight for (out, _), weight in zip(parts, weights, strict=True)), lse


def test_partial_attentions_merge_by_their_lse(seed):
    grid = CubeGrid(SHAPE)
    inputs = random_tokens(3, TOKENS, dtype=torch.float64, requires_grad=True)
    counts = torch.full((1, 2, grid.num_cubes), 2, dtype=torch.int32)
    every = torch.tensor([[0, 1], [0, 2], [1, 3], [2, 3]], dtype=torch.int32).expand(1, 2, -1, -1)
    parts = [(torch.ones_like(counts), every[..., i : i + 1]) for i in range(2)]
    weights = torch.randn_like(inputs[0]), torch.randn(1, 2, TOKENS, dtype=torch.float64)

    def attend(index):
        return block_sparse_attention(*inputs, *index, video_shape=SHAPE, return_lse=True, check=True)

    wanted = attend((counts, every))
    merged = merge([attend(index) for index in parts])
    torch.testing.assert_close(merged, wanted)
    actual = torch.autograd.grad(merged, inputs, weights)
    torch.testing.assert_close(actual, torch.autograd.grad(wanted, inputs, weights))


def test_gradient_of_lse_alone(seed):
    inputs = random_tokens(3, TOKENS, dtype=torch.float64, requires_grad=True)
    index = random_index(2, 2, 2, counts=2)
    _, lse = block_sparse_attention(*inputs, *index, return_lse=True)
    lse.sum().backward()
    q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in inputs)
    (q @ k.mT / 8).logsumexp(dim=-1).sum().backward()
    torch.testing.assert_close(inputs[0].grad, q.grad.transpose(1, 2))
    torch.testing.assert_close(inputs[1].grad, k.grad.transpose(1, 2))
    assert (inputs[2].grad == 0).all()


def everything(x):
    return video_sparse_attention(x, x, x, SHAPE, topk=2, gate_coarse=x, gate_fine=x)


def sum_of_separate_gradients(x, weight):
    copies = [x.detach().clone().requires_grad_() for _ in range(5)]
    query, key, value, coarse, fine = copies
    out = video_sparse_attention(query, key, value, SHAPE, topk=2, gate_coarse=coarse, gate_fine=fine)
    return sum(torch.autograd.grad(out, copies, weight))


def test_same_tensor_for_every_argument(seed):
    (x,) = random_tokens(1, TOKENS, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    everything(x).backward(weight)
    torch.testing.assert_close(x.grad, sum_of_separate_gradients(x, weight))


def test_packed_projection(seed):
    packed = torch.randn(1, TOKENS, 3, 2, 64, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, TOKENS, 2, 64, dtype=torch.float64)
    video_sparse_attention(*packed.unbind(2), SHAPE, topk=2).backward(weight)
    separate = [x.detach().clone().requires_grad_() for x in packed.unbind(2)]
    video_sparse_attention(*separate, SHAPE, topk=2).backward(weight)
    assert torch.equal(packed.grad, torch.stack([x.grad for x in separate], dim=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_and_gradients_return_in_the_original_dtype(dtype, seed):
    inputs = random_tokens(4, TOKENS, requires_grad=True)
    scalar = torch.tensor(0.5, requires_grad=True)
    weight = torch.randn_like(inputs[0])
    with torch.autocast("cpu", dtype=dtype):
        out = video_sparse_attention(*inputs[:3], SHAPE, topk=2, gate_coarse=inputs[3], gate_fine=scalar)
    assert out.dtype == dtype
    actual = torch.autograd.grad(out, [*inputs, scalar], weight.to(dtype))
    assert all(x.dtype == torch.float32 for x in actual)
    cast = [x.detach().to(dtype).requires_grad_() for x in inputs]
    wanted_out = video_sparse_attention(*cast[:3], SHAPE, topk=2, gate_coarse=cast[3], gate_fine=scalar)
    wanted = torch.autograd.grad(wanted_out, [*cast, scalar], weight.to(dtype))
    assert torch.equal(out, wanted_out)
    assert all(torch.equal(x, y.float()) for x, y in zip(actual, wanted, strict=True))


def test_autocast_mends_mixed_dtypes(seed):
    q, k, v = random_tokens(3, TOKENS)
    index = random_index(2, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block_sparse_attention(q.bfloat16(), k, v.half(), *index)
    wanted = block_sparse_attention(q.bfloat16(), k.bfloat16(), v.half().bfloat16(), *index)
    assert torch.equal(out, wanted)


def test_frozen_inputs_skip_the_fine_backward(seed):
    q, k, v, coarse = random_tokens(4, TOKENS)
    coarse.requires_grad_()
    with OpCounter() as counter:
        video_sparse_attention(q, k, v, SHAPE, topk=2, gate_coarse=coarse).sum().backward()
    assert coarse.grad is not None
    assert counter.counts == {"coarse_forward": 1, "fine_forward": 1, "combine_backward": 1}


@pytest.mark.parametrize("function", [VideoSparse, BlockSparse])
def test_no_call_makes_a_signature(function, monkeypatch):
    """torch's Function.apply asks for it; to make one takes a sixth of a small call's time on the host."""
    monkeypatch.setattr(inspect, "_signature_from_function", None)
    assert "query" in inspect.signature(function.forward).parameters


def test_backward_fills_no_tensor_with_zeros(seed):
    """Gradients of the outputs that are not used stay undefined."""
    filled = []

    class Fills(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "aten" and "zero" in func._opname:
                filled.append(func._opname)
            return func(*args, **(kwargs or {}))

    inputs = random_tokens(3, TOKENS, requires_grad=True)
    index = random_index(2, 2, 2)
    video = video_sparse_attention(*inputs, SHAPE, topk=2)
    out = torch.ones_like(video)
    block = block_sparse_attention(*inputs, *index)
    with Fills():
        torch.autograd.grad(video, inputs, out)
        torch.autograd.grad(block, inputs, out)
    # The reference's accumulators, inside the ops, are not seen here.
    assert filled == []


def test_only_out_is_differentiable(seed):
    inputs = random_tokens(3, TOKENS, requires_grad=True)
    constants = (None, None, 1.0, 1.0, True, SHAPE, (4, 4, 4), 2, 0.125, False, True)
    results = VideoSparse.apply(*inputs, *constants)
    assert [x.requires_grad for x in results] == [True] + [False] * (len(results) - 1)


def test_selection_has_no_gradient(seed):
    inputs = random_tokens(3, TOKENS, requires_grad=True)
    out, counts, indices = video_sparse_attention(*inputs, SHAPE, topk=2, return_selection=True)
    assert out.requires_grad and not counts.requires_grad and not indices.requires_grad


@pytest.mark.parametrize(
    "gates, extra", [({"gate_coarse": 0.0}, 0), ({}, 1), ({"gate_fine": 0.5, "gate_coarse": 0.0}, 1)]
)
def test_saved_memory(gates, extra, seed):
    """Besides query, key, value and out: out_fine where it differs from out, no other tensor of that size."""
    inputs = random_video(3, (8, 8, 8), requires_grad=True)
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = video_sparse_attention(*inputs, (8, 8, 8), topk=2, **gates)
    known = {x.untyped_storage().data_ptr() for x in (*inputs, out)}
    others = [numel for pointer, numel in saved.items() if pointer not in known]
    assert sum(numel >= out.numel() for numel in others) == extra
    # LSE and delta rows, pooled tensors and the index.
    assert sum(numel for numel in others if numel < out.numel()) < 0.25 * out.numel()


@pytest.mark.parametrize("saved_op", ["fine_forward", "coarse_forward"])
def test_selective_checkpointing_saves_the_named_op(saved_op, seed):
    saved = getattr(torch.ops.vsa_cuda, saved_op).default

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op == saved else CheckpointPolicy.PREFER_RECOMPUTE

    inputs = random_tokens(4, TOKENS, requires_grad=True)

    def block(query, key, value, coarse):
        return video_sparse_attention(query * 2, key, value, SHAPE, topk=2, gate_coarse=coarse).square()

    wanted = torch.autograd.grad(block(*inputs).sum(), inputs)
    with OpCounter() as counter:
        out = checkpoint(
            block,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )
        actual = torch.autograd.grad(out.sum(), inputs)
    assert all(torch.equal(x, y) for x, y in zip(actual, wanted, strict=True))
    recomputed = {"fine_forward", "coarse_forward"} - {saved_op}
    assert counter.counts[saved_op] == 1
    assert [counter.counts[name] for name in recomputed] == [2]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_full_checkpointing(use_reentrant, seed):
    inputs = random_tokens(3, TOKENS, requires_grad=True)

    def block(query, key, value):
        return video_sparse_attention(query, key, value, SHAPE, topk=2)

    wanted = torch.autograd.grad(block(*inputs).sum(), inputs)
    checkpoint(block, *inputs, use_reentrant=use_reentrant).sum().backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(inputs, wanted, strict=True))


def attend(kind):
    """A function of query, key, value for each public function."""
    if kind == "video":
        return lambda q, k, v: video_sparse_attention(q, k, v, SHAPE, topk=2)
    index = random_index(2, 2, 2)
    return lambda q, k, v: block_sparse_attention(q, k, v, *index)


@pytest.mark.parametrize("kind", ["video", "block"])
def test_double_backward_raises(kind, seed):
    inputs = random_tokens(3, TOKENS, requires_grad=True)
    out = attend(kind)(*inputs)
    grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    for grad in grads:
        with pytest.raises(
            RuntimeError, match="vsa_cuda: got a derivative of a gradient.*expected first.*; diff"
        ):
            torch.autograd.grad(grad.sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("kind", ["video", "block"])
def test_create_graph_without_a_second_derivative_is_fine(kind, seed):
    inputs = random_tokens(3, TOKENS, requires_grad=True)
    function = attend(kind)
    actual = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
    wanted = torch.autograd.grad(function(*inputs).sum(), inputs)
    assert all(torch.equal(x, y) for x, y in zip(actual, wanted, strict=True))


@pytest.mark.parametrize("kind", ["video", "block"])
def test_vmap_raises(kind, seed):
    inputs = [x.expand(3, *x.shape) for x in random_tokens(3, TOKENS)]
    with pytest.raises(
        RuntimeError, match="_sparse_attention: got a call under torch.func.vmap, expected .*; fold"
    ):
        torch.func.vmap(attend(kind))(*inputs)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("kind", ["video", "block"])
def test_jvp_raises(kind, position, seed):
    inputs = random_tokens(3, TOKENS)
    name = ("query", "key", "value")[position]

    def function(x):
        return attend(kind)(*inputs[:position], x, *inputs[position + 1 :])

    with pytest.raises(
        NotImplementedError, match=f"{name}: got a tangent .*, expected a tensor without one; use"
    ):
        torch.func.jvp(function, (inputs[position],), (torch.ones_like(inputs[position]),))


def test_functional_vjp(seed):
    inputs = random_tokens(3, TOKENS, requires_grad=True)
    function = attend("video")
    wanted = torch.autograd.grad(function(*inputs).sum(), inputs)
    out, pullback = torch.func.vjp(function, *(x.detach() for x in inputs))
    assert all(torch.equal(x, y) for x, y in zip(pullback(torch.ones_like(out)), wanted, strict=True))


@pytest.fixture
def one_rank_mesh():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("kind", ["video", "block"])
def test_dtensor_raises(kind, one_rank_mesh, seed):
    from torch.distributed.tensor import Shard, distribute_tensor

    inputs = [distribute_tensor(x, one_rank_mesh, [Shard(2)]) for x in random_tokens(3, TOKENS)]
    with pytest.raises(
        TypeError, match=r"query: got a DTensor, expected a plain tensor.*; shard .*to_local\(\)"
    ):
        attend(kind)(*inputs)
