"""block_sparse_attention on the GPU: output, LSE and gradients against the reference."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from attention_cases import EDGE_CASES, LINEAR, Case
from tolerance import assert_lse_within_tolerance, assert_within_tolerance, half_precision_baseline
from vsa_cuda import _extension, block_sparse_attention, reference

pytestmark = pytest.mark.gpu

NUM_GENERATED = 200
CUBES = [(4, 4, 4), (1, 8, 8), (2, 4, 8), (8, 8, 1), (16, 2, 2), (64, 1, 1), (1, 1, 64), (2, 1, 32)]


def generated_case(index, seed):
    """Shape number `index`: token counts from 1 to 100k on a logarithmic scale, the rest uniform."""
    g = torch.Generator().manual_seed(100_000 * seed + index)

    def pick(*choices):
        return choices[torch.randint(len(choices), (), generator=g)]

    def video_shape(tokens):
        t = min(tokens, int(torch.randint(1, 40, (), generator=g)))
        h = max(1, int(math.sqrt(tokens / t) * (0.5 + torch.rand((), generator=g).item())))
        return t, h, max(1, round(tokens / (t * h)))

    tokens = int(10 ** (5 * (index + 1) / NUM_GENERATED))
    linear = index % 4 == 3
    shape = (1, 1, tokens) if linear else video_shape(tokens)
    cube = LINEAR if linear else pick(*CUBES)
    other_keys = index % 5 == 2
    few = tokens > 20_000
    return Case(
        shape,
        cube,
        (video_shape(max(1, tokens // 3)) if not linear else (1, 1, tokens // 2 + 1)) if other_keys else None,
        (LINEAR if linear else pick(*CUBES)) if other_keys else None,
        batch=1 if few else pick(1, 2, 3),
        heads=1 if few else pick(1, 2, 5),
        head_dim=pick(64, 128),
        dtype=pick(torch.bfloat16, torch.float16),
        layout=pick("bshd", "bhsd", "packed"),
        topk=pick(1, 2, 7, 32, 64),
        lists=pick("random", "random", "empty", "disjoint")
        if few
        else pick("random", "dense", "empty", "disjoint"),
        ragged=linear and pick(True, False),
        seed=100_000 * seed + index,
    )


def attend(case, device="cuda", grad_out=None, grad_lse=None, **options):
    """out, lse [B, H, S], then the three gradients when grad_out is given."""
    q, k, v = (
        x.to(device).detach().requires_grad_(grad_out is not None) for x in (case.query, case.key, case.value)
    )
    sizes = (None if x is None else x.to(device) for x in (case.block_sizes, case.q_block_sizes))
    block_sizes, q_block_sizes = sizes
    out, lse = block_sparse_attention(
        q, k, v, case.kv_num_blocks.to(device), case.kv_indices.to(device), video_shape=case.q_shape,
        kv_video_shape=case.kv_shape, cube=case.cube, kv_cube=case.kv_cube, block_sizes=block_sizes,
        q_block_sizes=q_block_sizes, scale=case.scale, return_lse=True, **options,
    )  # fmt: skip
    if grad_out is None:
        return out, lse
    outputs, grads = [out], [grad_out]
    if grad_lse is not None:
        outputs, grads = [out, lse], [grad_out, grad_lse]
    return out, lse, *torch.autograd.grad(outputs, (q, k, v), grads)


def check_against_reference(case):
    """Runs forward and backward and holds everything against float64 on the same GPU."""
    g = torch.Generator().manual_seed(case.seed + 1)
    grad_out = torch.randn(case.query.shape, generator=g).to(case.dtype).cuda()
    out, lse, dq, dk, dv = attend(case, grad_out=grad_out)
    q, k, v = (x.cuda() for x in (case.query, case.key, case.value))
    index = (case.kv_num_blocks.cuda(), case.kv_indices.cuda())
    sizes = [None if x is None else x.cuda() for x in (case.block_sizes, case.q_block_sizes)]
    exact = [x.double() for x in (q, k, v)]
    grids = (case.q_grid, case.kv_grid, case.scale)
    expected, expected_lse = reference.fine_forward(*exact, *index, *grids, *sizes)
    grad_fine, delta, *_ = reference.combine_backward(
        grad_out.double(), expected, None, None, case.q_grid, None, None, sizes[1]
    )
    gradients = reference.fine_backward(grad_fine, *exact, expected_lse, delta, *index, *grids, *sizes)
    baseline = half_precision_baseline(q, k, v, *index, *grids, grad_out, None, *sizes)
    assert_within_tolerance(out, expected, baseline[0], "out")
    raster = expected_lse.flatten(2)[..., case.q_grid.slot_of_token("cuda")]
    assert_lse_within_tolerance(lse, raster.masked_fill(raster == torch.inf, -torch.inf))
    for name, got, want, half in zip("qkv", (dq, dk, dv), gradients, baseline[1:], strict=True):
        assert_within_tolerance(got, want, half, f"d{name}")


# As if the GPU had so many multiprocessors: with all of them, the tasks of small problems have a block each.
@pytest.mark.parametrize("sms", [None, 2], ids=["all", "few"])
@pytest.mark.parametrize("case", EDGE_CASES, ids=str)
def test_edge_cases(case, sms, monkeypatch):
    if sms is not None:
        monkeypatch.setattr(_extension, "num_sms", lambda device: sms)
    check_against_reference(case)


@pytest.mark.parametrize("index", range(NUM_GENERATED))
def test_generated_shapes(index, seed, monkeypatch):
    if index % 2:
        monkeypatch.setattr(_extension, "num_sms", lambda device: 7)
    check_against_reference(generated_case(index, seed))


def test_fastwan_shape_of_455_cubes(seed):
    check_against_reference(Case((20, 28, 52), heads=2, head_dim=128, topk=32, seed=seed))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_repeated_runs_give_the_same_bits(head_dim, seed):
    case = Case((9, 30, 41), heads=3, head_dim=head_dim, topk=16, seed=seed)
    grad_out = torch.randn(case.query.shape).to(case.dtype).cuda()
    first = attend(case, grad_out=grad_out, deterministic=True)
    for _ in range(5):
        for a, b in zip(first, attend(case, grad_out=grad_out, deterministic=True), strict=True):
            assert torch.equal(a, b)


def test_side_stream(seed):
    case = Case((8, 16, 24), heads=2, head_dim=128, topk=8, seed=seed)
    expected = attend(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        got = attend(case)
    stream.synchronize()
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


def test_first_call_of_a_thread(seed):
    """Each op in a thread of its own, where it makes tensor maps before anything else called the runtime."""
    case = Case((8, 16, 24), heads=2, head_dim=64, topk=8, seed=seed)
    query, key, value = (x.cuda() for x in (case.query, case.key, case.value))
    ops, grid = torch.ops.vsa_cuda, (case.q_shape, (4, 4, 4))

    def pooled():
        return ops.pool(query, key, value, *grid)

    def delta():
        return ops.combine_backward(query, value, None, None, None, None, 1.0, 0.0, None, *grid)[1:2]

    for call in (pooled, delta):
        with ThreadPoolExecutor(1) as thread:
            results = thread.submit(call).result()
        for a, b in zip(results, call(), strict=True):
            assert torch.equal(a, b)


def test_cuda_graph_of_forward_and_backward(seed):
    case = Case((8, 16, 24), heads=2, head_dim=128, topk=8, seed=seed)
    q, k, v = (x.cuda().requires_grad_() for x in (case.query, case.key, case.value))
    index = (case.kv_num_blocks.cuda(), case.kv_indices.cuda())
    grad_out = torch.randn(case.query.shape).to(case.dtype).cuda()

    def step():
        out = block_sparse_attention(q, k, v, *index, video_shape=case.q_shape, deterministic=True)
        return out, *torch.autograd.grad(out, (q, k, v), grad_out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The engine runs a leaf's gradient on the stream that made the leaf.
        q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(expected, captured, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("fault", ["one key dropped", "scale"])
def test_the_tolerance_catches_faults(fault, seed):
    case = Case((8, 8, 8), heads=2, head_dim=128, topk=4, seed=seed)
    out, _ = attend(case)
    if fault == "scale":
        case.scale *= 1.01
    else:
        case.kv_num_blocks = case.kv_num_blocks - 1
    expected, _ = reference.fine_forward(
        case.query.double(), case.key.double(), case.value.double(), case.kv_num_blocks, case.kv_indices,
        case.q_grid, case.kv_grid, case.scale,
    )  # fmt: skip
    baseline = half_precision_baseline(
        case.query,
        case.key,
        case.value,
        case.kv_num_blocks,
        case.kv_indices,
        case.q_grid,
        case.kv_grid,
        case.scale,
    )[0]
    with pytest.raises(AssertionError):
        assert_within_tolerance(out.cpu(), expected, baseline)


@pytest.mark.slow
def test_a_million_tokens(seed):
    """Offsets past 2^31 bytes, and memory linear in tokens."""
    tokens, topk = 1 << 20, 64
    grid = (64, 128, 128)
    blocks = tokens // 64
    q, k, v = (
        torch.randn(1, tokens, 1, 128, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)
    )
    indices = torch.randint(0, blocks // topk, (1, 1, blocks, topk), device="cuda", dtype=torch.int32)
    indices += torch.arange(topk, device="cuda", dtype=torch.int32) * (blocks // topk)
    counts = torch.full((1, 1, blocks), topk, device="cuda", dtype=torch.int32)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = block_sparse_attention(q, k, v, counts, indices, video_shape=grid)
    grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    size = out.numel() * 2
    assert torch.cuda.max_memory_allocated() - before < 6 * size + 2**30
    for x in (out, *grads):
        assert torch.isfinite(x).all()
