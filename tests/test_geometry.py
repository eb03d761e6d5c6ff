"""Cube geometry: maps, masks, the top-k rule and its errors."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from vsa_cuda.geometry import (
    CubeGrid,
    check_cube,
    check_video_shape,
    cubes_shape,
    num_cubes,
    topk_from_sparsity,
)

CUBES = [
    (t, h, 64 // (t * h)) for t, h in itertools.product((1, 2, 4, 8, 16, 32, 64), repeat=2) if t * h <= 64
]

grids = st.builds(
    CubeGrid,
    st.tuples(st.integers(1, 11), st.integers(1, 13), st.integers(1, 17)),
    st.sampled_from(CUBES),
)


def brute_force_slots(grid):
    """{token: (cube, slot)} from the definition, token by token."""
    (depth, height, width), (ct, ch, cw) = grid.video_shape, grid.cube
    _, nh, nw = (math.ceil(size / side) for size, side in zip(grid.video_shape, grid.cube, strict=True))
    slots = {}
    for token, (t, h, w) in enumerate(itertools.product(range(depth), range(height), range(width))):
        cube = (t // ct * nh + h // ch) * nw + w // cw
        slots[token] = cube, (t % ct * ch + h % ch) * cw + w % cw
    return slots


@given(grids)
@example(CubeGrid((1, 1, 1)))
@example(CubeGrid((1, 1, 65), (1, 1, 64)))
def test_maps_match_the_definition(grid):
    slots = brute_force_slots(grid)
    assert grid.num_tokens == len(slots)
    assert grid.cube_of_token().tolist() == [cube for cube, _ in slots.values()]
    assert grid.slot_of_token().tolist() == [cube * 64 + slot for cube, slot in slots.values()]


@given(grids)
def test_valid_slots_and_tokens_are_a_bijection(grid):
    valid, token_index, slot_of_token = grid.valid(), grid.token_index(), grid.slot_of_token()
    assert valid.shape == token_index.shape == (grid.num_cubes, 64)
    tokens = token_index[valid]
    assert sorted(tokens.tolist()) == list(range(grid.num_tokens))
    torch.testing.assert_close(slot_of_token[tokens], valid.flatten().nonzero().squeeze(1))
    assert int(token_index.min()) >= 0 and int(token_index.max()) < grid.num_tokens


@given(grids)
def test_sizes_count_the_valid_slots(grid):
    sizes = grid.cube_sizes()
    torch.testing.assert_close(sizes, grid.valid().sum(dim=1, dtype=torch.int32))
    assert int(sizes.sum()) == grid.num_tokens and int(sizes.min()) >= 1
    assert grid.num_partial_cubes == int((sizes < 64).sum())
    assert grid.num_cubes == math.prod(grid.cubes_shape) == len(sizes)


@given(grids)
def test_tokens_of_a_cube_ascend_with_the_slot(grid):
    # The order in which a TMA box (cw, ch, ct) lands: W fastest, T slowest.
    for valid, tokens in zip(grid.valid(), grid.token_index(), strict=True):
        assert bool((tokens[valid].diff() > 0).all())


@given(grids)
def test_invalid_slots_point_into_their_own_cube(grid):
    cube = torch.arange(grid.num_cubes)[:, None].expand(-1, 64)
    torch.testing.assert_close(grid.cube_of_token()[grid.token_index()], cube)


def test_first_cube_of_an_exact_grid():
    grid = CubeGrid((4, 8, 8), (4, 4, 4))
    assert grid.token_index()[1, :6].tolist() == [4, 5, 6, 7, 12, 13]
    assert bool(grid.valid().all())


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000])
def test_linear_grid_is_consecutive_blocks(tokens):
    grid = CubeGrid.linear(tokens)
    assert grid == CubeGrid((1, 1, tokens), (1, 1, 64))
    assert grid.slot_of_token().tolist() == list(range(tokens))
    assert grid.num_cubes == math.ceil(tokens / 64)


def test_dtypes_and_description():
    grid = CubeGrid((21, 30, 52))
    dtypes = {
        "cube_sizes": torch.int32,
        "token_index": torch.int64,
        "valid": torch.bool,
        "cube_of_token": torch.int64,
        "slot_of_token": torch.int64,
    }
    for name, dtype in dtypes.items():
        assert getattr(grid, name)().dtype == dtype
    assert str(grid) == "grid 21x30x52 (32760 tokens) in cubes of 4x4x4: 6x8x13 = 624 cubes, 169 partial"


def test_equal_grids_are_one_key():
    assert CubeGrid([3, 4, 5], [4, 4, 4]) == CubeGrid(torch.Size((3, 4, 5)))
    assert len({CubeGrid([3, 4, 5]), CubeGrid((3, 4, 5)), CubeGrid((3, 4, 6))}) == 2
    with pytest.raises(AttributeError):
        CubeGrid((3, 4, 5)).cube = (1, 8, 8)


def test_maps_are_cached():
    assert CubeGrid((3, 5, 7)).valid() is CubeGrid((3, 5, 7)).valid(torch.device("cpu"))


def test_maps_made_under_a_mode_do_not_outlive_it():
    grid = CubeGrid((2, 3, 31), (1, 8, 8))
    with FakeTensorMode():
        assert type(grid.slot_of_token()) is not torch.Tensor
    with torch.inference_mode():
        grid.slot_of_token()
    index = grid.slot_of_token()
    assert type(index) is torch.Tensor and not index.is_inference()
    lse = torch.zeros(1, grid.num_cubes * 64, requires_grad=True)
    lse[..., index].sum().backward()
    assert int(lse.grad.sum()) == grid.num_tokens


def test_maps_on_another_device():
    assert CubeGrid((2, 3, 31)).token_index("meta").device.type == "meta"


def test_shape_helpers_take_symbolic_sizes():
    def cubes(x):
        return x.new_empty(cubes_shape(x.shape, (4, 4, 4))), x.new_empty(num_cubes(x.shape, (2, 4, 8)))

    graph = make_fx(cubes, tracing_mode="symbolic")(torch.empty(5, 6, 7))
    for shape in ((5, 6, 7), (21, 30, 52), (8, 8, 8)):
        by_cube, flat = graph(torch.empty(shape))
        assert by_cube.shape == tuple(math.ceil(size / 4) for size in shape)
        assert flat.shape == (CubeGrid(shape, (2, 4, 8)).num_cubes,)


@pytest.mark.filterwarnings("error:.*lru_cache")
def test_compiled_without_a_graph_break_and_once_for_all_shapes():
    def gather(x, sparsity):
        grid = CubeGrid(x.shape, (4, 4, 4))
        topk = topk_from_sparsity(sparsity, x.shape)
        return x.flatten()[grid.token_index(x.device)], grid.slot_of_token(x.device), x.new_zeros(topk)

    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(gather, backend=backend, fullgraph=True, dynamic=True)
    for shape in ((5, 6, 7), (9, 13, 11), (21, 30, 52)):
        x = torch.randn(shape)
        for actual, expected in zip(compiled(x, 0.9), gather(x, 0.9), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert len(graphs) == 1


@given(st.integers(0, 1000), grids)
def test_topk_is_exact_for_decimal_sparsity(thousandths, grid):
    exact = math.ceil(Fraction(1000 - thousandths, 1000) * grid.num_cubes)
    assert topk_from_sparsity(thousandths / 1000, grid.video_shape, grid.cube) == max(1, exact)


@pytest.mark.parametrize(
    ("sparsity", "video_shape", "expected"),
    [
        (0.9, (21, 45, 80), 144),
        (0.95, (21, 30, 52), 32),
        (0.0, (21, 30, 52), 624),
        (0, (21, 30, 52), 624),
        (1.0, (21, 30, 52), 1),
        (0.999, (4, 4, 4), 1),
        (0.7, (4, 8, 20), 3),
    ],
)
def test_topk_examples(sparsity, video_shape, expected):
    assert topk_from_sparsity(sparsity, video_shape) == expected


BAD_SHAPES = [
    (lambda: check_video_shape(5), TypeError, "video_shape: got 5 \\(int\\), expected a sequence of 3 ints"),
    (lambda: check_video_shape("345"), TypeError, "video_shape: got '345' \\(str\\)"),
    (lambda: check_video_shape(torch.tensor([1, 2, 3])), TypeError, "video_shape: .*\\(Tensor\\)"),
    (lambda: check_video_shape((1.0, 2, 3)), TypeError, "video_shape: .*float, expected 3 ints"),
    (lambda: check_video_shape((True, 2, 3)), TypeError, "video_shape: .*bool, expected 3 ints"),
    (lambda: check_video_shape((1, 2)), ValueError, "video_shape: got 2 sizes \\(1, 2\\), expected 3"),
    (lambda: check_video_shape((0, 2, 3)), ValueError, "got \\(0, 2, 3\\), expected .* at least 1"),
    (lambda: check_video_shape((1, 2, -3), "kv_video_shape"), ValueError, "kv_video_shape: got"),
    (lambda: check_cube((4, 4, 5)), ValueError, "cube: got \\(4, 4, 5\\) of volume 80, expected .* 64"),
    (lambda: check_cube((4, 4, 5), "kv_cube"), ValueError, "kv_cube: got .*pass kv_cube=\\(4, 4, 4\\)"),
    (lambda: check_cube(64), TypeError, "cube: got 64"),
    (
        lambda: CubeGrid((1, 2, 3), (-4, -4, 4)),
        ValueError,
        "cube: got \\(-4, -4, 4\\), expected .* at least 1",
    ),
    (lambda: CubeGrid.linear(0), ValueError, "video_shape: got \\(1, 1, 0\\)"),
    (lambda: topk_from_sparsity("0.9", (1, 2, 3)), TypeError, "sparsity: got '0.9' \\(str\\)"),
    (lambda: topk_from_sparsity(True, (1, 2, 3)), TypeError, "sparsity: got True"),
    (lambda: topk_from_sparsity(90, (1, 2, 3)), ValueError, "sparsity: got 90, expected .* \\[0, 1\\]"),
    (lambda: topk_from_sparsity(-0.1, (1, 2, 3)), ValueError, "sparsity: got -0.1"),
    (lambda: topk_from_sparsity(math.nan, (1, 2, 3)), ValueError, "sparsity: got nan"),
    (lambda: topk_from_sparsity(0.5, (1, 2)), ValueError, "video_shape: got 2 sizes"),
    (lambda: topk_from_sparsity(0.5, (1, 2, 3), (4, 4)), ValueError, "cube: got 2 sizes"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_SHAPES)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
