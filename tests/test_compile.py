"""torch.compile and torch.export: one graph, results and gradients equal to eager, few recompilations."""

import functools

import pytest
import torch
from functorch.compile import make_boxed_compiler
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from inputs import random_index, random_tokens, random_video
from vsa_cuda import block_sparse_attention, video_sparse_attention
from vsa_cuda.geometry import num_cubes

SHAPE = (3, 5, 6)
TOKENS = 90


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, **kwargs):
    """(compiled function, counter of the graphs)."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter, **kwargs), counter


def strides(x):
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def assert_same(function, other, arguments):
    """Equal results, and equal gradients of every tensor that asks for one, bit for bit."""
    inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    wanted, actual = function(*arguments), other(*arguments)
    wanted, actual = ((x,) if isinstance(x, torch.Tensor) else x for x in (wanted, actual))
    assert len(wanted) == len(actual)
    for x, y in zip(actual, wanted, strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype and strides(x) == strides(y)
    weights = [torch.randn_like(x) for x in wanted if x.requires_grad]
    grads = [
        torch.autograd.grad([x for x in results if x.requires_grad], inputs, weights)
        for results in (actual, wanted)
    ]
    assert len(grads[0]) == len(inputs) > 0
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


def everything(query, key, value, coarse, fine, scalar, video_shape, topk):
    """Both public functions, every output, gates of three kinds, both layouts."""
    out, *index = video_sparse_attention(
        query, key, value, video_shape, topk=topk, gate_coarse=coarse, gate_fine=fine, return_selection=True
    )
    other = video_sparse_attention(
        query, key, value, video_shape, topk=topk, gate_coarse=scalar, gate_fine=0.5
    )
    transposed = (x.transpose(1, 2) for x in (query, key, value))
    alone, lse = block_sparse_attention(
        *transposed, *index, video_shape=video_shape, return_lse=True, layout="bhsd"
    )
    return out, *index, other, alone, lse


def everything_arguments(video_shape, topk, dtype=torch.float32):
    tensors = random_video(5, video_shape, dtype=dtype, requires_grad=True)
    return *tensors, torch.tensor(0.3, requires_grad=True), video_shape, topk


def test_static_shapes(seed):
    function, counter = compiled(everything, dynamic=False)
    for shape, topk in ((SHAPE, 2), ((4, 8, 8), 3)):
        assert_same(everything, function, everything_arguments(shape, topk, torch.bfloat16))
    assert counter.frame_count == 2


def test_dynamic_shapes_compile_once(seed):
    function, counter = compiled(everything, dynamic=True)
    for shape, topk in ((SHAPE, 2), ((4, 8, 8), 3), ((5, 6, 13), 7), ((9, 9, 4), 2)):
        assert_same(everything, function, everything_arguments(shape, topk))
    assert counter.frame_count == 1


def test_automatic_dynamic_shapes_compile_twice(seed):
    function, counter = compiled(everything)
    for shape, topk in ((SHAPE, 2), ((4, 8, 8), 3), ((5, 6, 13), 7), ((9, 9, 4), 2)):
        assert_same(everything, function, everything_arguments(shape, topk))
    assert counter.frame_count == 2


def padded(query, key, value, counts, indices, sizes, q_sizes):
    return block_sparse_attention(
        query, key, value, counts, indices, block_sizes=sizes, q_block_sizes=q_sizes, return_lse=True
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_block_sizes_and_unequal_lengths(dynamic, seed):
    function, counter = compiled(padded, dynamic=dynamic)
    for q_tokens, kv_tokens in ((130, 200), (70, 300)):
        (q,) = random_tokens(1, q_tokens, requires_grad=True)
        k, v = random_tokens(2, kv_tokens, requires_grad=True)
        q_blocks, kv_blocks = (
            num_cubes((1, 1, q_tokens), (1, 1, 64)),
            num_cubes((1, 1, kv_tokens), (1, 1, 64)),
        )
        sizes = torch.randint(1, 65, (kv_blocks,), dtype=torch.int32)
        q_sizes = torch.randint(1, 65, (q_blocks,), dtype=torch.int32)
        assert_same(padded, function, (q, k, v, *random_index(q_blocks, kv_blocks, 2), sizes, q_sizes))
    assert counter.frame_count == (1 if dynamic else 2)


@pytest.mark.parametrize("cube", [(4, 4, 4), (1, 8, 8)])
def test_lse_alone(cube, seed):
    def function(query, key, value, counts, indices):
        return block_sparse_attention(
            query, key, value, counts, indices, video_shape=SHAPE, cube=cube, return_lse=True
        )[1]

    index = random_index(num_cubes(SHAPE, cube), num_cubes(SHAPE, cube), 2)
    assert_same(function, compiled(function)[0], (*random_tokens(3, TOKENS, requires_grad=True), *index))


def scheduled(query, key, value, topk, sparsity, gate):
    return video_sparse_attention(
        query, key, value, (5, 8, 12), topk=topk, sparsity=sparsity, gate_coarse=gate
    )


def test_topk_and_scalar_gate_schedule_does_not_recompile(seed):
    """From dense (12 cubes and more) down to 1: the first value, any integer, and dense or 1 on their own."""
    function, counter = compiled(scheduled)
    inputs = random_video(3, (5, 8, 12), requires_grad=True)
    for step, topk in enumerate([11, 20, 12, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]):
        gate = torch.tensor(step / 12, requires_grad=True)
        assert_same(scheduled, function, (*inputs, topk, None, gate))
    assert counter.frame_count <= 4


def test_sparsity_and_float_gates_are_constants(seed):
    function, counter = compiled(scheduled)
    inputs = random_video(3, (5, 8, 12), requires_grad=True)
    for repeat in range(2):
        for sparsity, gate in ((0.5, 0.25), (0.75, 0.25), (0.75, 0.5)):
            assert_same(scheduled, function, (*inputs, None, sparsity, gate))
        if repeat == 0:
            compilations = counter.frame_count
    assert counter.frame_count == compilations >= 3


def test_sparsity_with_dynamic_shapes(seed):
    def function(query, key, value, video_shape):
        return video_sparse_attention(query, key, value, video_shape, sparsity=0.6)

    other, counter = compiled(function, dynamic=True)
    for shape in (SHAPE, (5, 8, 12), (9, 6, 5)):
        assert_same(function, other, (*random_video(3, shape, requires_grad=True), shape))
    assert counter.frame_count == 1


def test_sparsity_zero_with_dynamic_shapes(seed):
    def function(query, key, value, video_shape):
        return video_sparse_attention(query, key, value, video_shape, sparsity=0.0)

    other, counter = compiled(function, dynamic=True)
    for shape in (SHAPE, (5, 8, 12), (9, 6, 5)):
        assert_same(function, other, (*random_video(3, shape, requires_grad=True), shape))
    assert counter.frame_count == 1


def same_tensor(x):
    return video_sparse_attention(x, x, x, SHAPE, topk=2, gate_coarse=x, gate_fine=x)


def test_same_tensor_for_every_argument(seed):
    inputs = random_tokens(1, TOKENS, requires_grad=True)
    assert_same(same_tensor, compiled(same_tensor)[0], inputs)


def test_same_tensor_in_compiled_autograd(seed):
    (x,) = random_tokens(1, TOKENS, requires_grad=True)
    weight = torch.randn_like(x)
    (wanted,) = torch.autograd.grad(same_tensor(x), x, weight)

    def step(x):
        same_tensor(x).backward(weight)

    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(step, backend="aot_eager")(x)
    assert torch.equal(x.grad, wanted)


def test_autocast(seed):
    def function(query, key, value, gate):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return video_sparse_attention(query, key, value, SHAPE, topk=2, gate_coarse=gate)

    assert_same(function, compiled(function)[0], random_tokens(4, TOKENS, requires_grad=True))


def test_expanded_gradient(seed):
    """Eager and compiled backward both get stride 0 from the sum."""

    def function(query, key, value):
        return video_sparse_attention(query, key, value, SHAPE, topk=2).sum()

    assert_same(function, compiled(function)[0], random_tokens(3, TOKENS, requires_grad=True))


def test_frozen_inputs(seed):
    def function(query, key, value, gate):
        return video_sparse_attention(query, key, value, SHAPE, topk=2, gate_coarse=gate)

    *frozen, gate = random_tokens(4, TOKENS)
    assert_same(function, compiled(function)[0], (*frozen, gate.requires_grad_()))


@pytest.mark.parametrize("enabled", [False, True])
def test_deterministic_algorithms_are_guarded(enabled, seed):
    flags = []

    def record(graph, inputs):
        flags.extend(
            node.args[-1]
            for node in graph.graph.nodes
            if node.target is torch.ops.vsa_cuda.fine_backward.default
        )
        return graph

    def function(query, key, value):
        return video_sparse_attention(query, key, value, SHAPE, topk=2)

    record = make_boxed_compiler(record)
    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=record, bw_compiler=record)
    torch.use_deterministic_algorithms(enabled)
    try:
        torch.compile(function, backend=backend)(
            *random_tokens(3, TOKENS, requires_grad=True)
        ).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert flags == [enabled]


def fine_forward_policy(ctx, op, *args, **kwargs):
    saved = op == torch.ops.vsa_cuda.fine_forward.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.MUST_RECOMPUTE


save_fine_forward = functools.partial(create_selective_checkpoint_contexts, fine_forward_policy)


def test_selective_checkpointing(seed):
    def block(query, key, value):
        return video_sparse_attention(query * 2, key, value, SHAPE, topk=2).square()

    def function(query, key, value):
        return checkpoint(block, query, key, value, use_reentrant=False, context_fn=save_fine_forward)

    calls = []

    def record(graph, inputs):
        calls.append([str(node.target) for node in graph.graph.nodes if "vsa_cuda" in str(node.target)])
        return graph

    backend = torch._dynamo.backends.common.aot_autograd(
        fw_compiler=make_boxed_compiler(record),
        bw_compiler=make_boxed_compiler(record),
        partition_fn=min_cut_rematerialization_partition,
    )
    inputs = random_tokens(3, TOKENS, requires_grad=True)
    assert_same(block, torch.compile(function, backend=backend, fullgraph=True), inputs)
    assert "vsa_cuda.fine_forward.default" in calls[0]
    assert "vsa_cuda.fine_forward.default" not in calls[1]
    assert "vsa_cuda.coarse_forward.default" in calls[1]


def test_inductor(seed):
    def function(query, key, value, gate):
        return video_sparse_attention(query * 1.5, key, value, SHAPE, topk=2, gate_coarse=gate)

    inputs = random_tokens(4, TOKENS, requires_grad=True)
    assert_same(function, torch.compile(function, fullgraph=True), inputs)


class Attention(torch.nn.Module):
    def forward(self, query, key, value):
        out, counts, indices = video_sparse_attention(
            query, key, value, SHAPE, topk=2, gate_coarse=0.5, return_selection=True
        )
        return out, *block_sparse_attention(
            query, key, value, counts, indices, video_shape=SHAPE, return_lse=True
        )


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, seed):
    inputs = tuple(random_tokens(3, TOKENS))
    batch = torch.export.Dim("batch", min=2, max=8)
    example = tuple(x.expand(2, -1, -1, -1).contiguous() for x in inputs)
    program = torch.export.export(Attention(), example, strict=strict, dynamic_shapes=[{0: batch}] * 3)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("vsa_cuda.fine_forward.default") == 2
    assert targets.count("vsa_cuda.coarse_forward.default") == 1
    three = tuple(x.expand(3, -1, -1, -1).contiguous() for x in inputs)
    wanted = Attention()(*three)
    assert all(torch.equal(x, y) for x, y in zip(program.module()(*three), wanted, strict=True))


def test_check_raises(seed):
    def function(query, key, value, counts, indices):
        return block_sparse_attention(query, key, value, counts, indices, check=True)

    arguments = (*random_tokens(3, TOKENS), *random_index(2, 2, 2))
    with pytest.raises(Exception, match="check=True under torch.compile"):
        compiled(function)[0](*arguments)


def test_bad_arguments_raise_what_eager_raises(seed):
    def function(query, key, value):
        return video_sparse_attention(query, key, value, (3, 5, 7), topk=2)

    with pytest.raises(Exception, match=r"query: got 90 tokens .*expected 105 = 3 \* 5 \* 7 tokens"):
        compiled(function)[0](*random_tokens(3, TOKENS))
