"""Host plans without a GPU: tensor maps over any layout, coordinates, grids, and errors."""

import math
import struct

import pytest
import torch

from host_plans import BASE, NUM_SMS, SHARED_LIMIT, recorded_plans, stems
from vsa_cuda import _extension, _kernels
from vsa_cuda.geometry import CubeGrid

pytestmark = pytest.mark.skipif(
    not _extension.is_available(), reason="vsa_cuda._C is not built: no host plan to test"
)

LAYOUTS = ["bshd", "bhsd", "packed", "sliced"]


def meta(layout, batch, tokens, heads, head_dim, dtype=torch.bfloat16):
    """A [batch, tokens, heads, head_dim] view without memory."""
    if layout == "bhsd":
        return torch.empty(batch, heads, tokens, head_dim, dtype=dtype, device="meta").transpose(1, 2)
    if layout == "packed":
        qkv = torch.empty(batch, tokens, 3, heads, head_dim, dtype=dtype, device="meta")
        return qkv[:, :, 1]
    if layout == "sliced":
        wider = torch.empty(batch, tokens + 5, heads + 2, head_dim + 8, dtype=dtype, device="meta")
        return wider[:, :tokens, :heads, :head_dim]
    return torch.empty(batch, tokens, heads, head_dim, dtype=dtype, device="meta")


def token_tensor(tensor, address=BASE, **changes):
    arguments = {
        "address": address + tensor.storage_offset() * tensor.element_size(),
        "shape": tuple(tensor.shape),
        "strides": tensor.stride(),
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }
    return _extension.load().TokenTensor(**(arguments | changes))


def contiguous(batch=1, tokens=64, heads=1, head_dim=128, **changes):
    return token_tensor(meta("bshd", batch, tokens, heads, head_dim), **changes)


def host_grid(video_shape, cube=(4, 4, 4)):
    return _extension.load().CubeGrid(video_shape=video_shape, cube=cube)


def plan_pool(tensors, video_shape, cube=(4, 4, 4), outputs=(16, 32, 48)):
    C = _extension.load()
    return C.plan_pool(
        inputs=tensors, grid=host_grid(video_shape, cube), outputs=list(outputs), num_sms=NUM_SMS
    )


def pool_coordinates(plan):
    """(head_in_columns, head_in_outer, batch_in_outer) of each input, and the outputs."""
    grid_words, pad = 12, 4  # of the CubeGrid before them, and bytes up to the outputs
    numbers = struct.unpack_from(f"{grid_words + 9}i{pad}x3Q", plan.params)
    return [numbers[grid_words + 3 * i :][:3] for i in range(3)], numbers[-3:]


def check_map(tensor_map):
    """What cuTensorMapEncodeTiled asks of a map."""
    assert 1 <= len(tensor_map.extents) <= 5
    assert len(tensor_map.box) == len(tensor_map.extents) == len(tensor_map.strides) + 1
    assert tensor_map.address % 16 == 0
    assert all(1 <= extent <= 1 << 32 for extent in tensor_map.extents)
    assert all(0 <= stride < 1 << 40 and stride % 16 == 0 for stride in tensor_map.strides)
    assert all(1 <= size <= 256 for size in tensor_map.box)
    element = 4 if tensor_map.element_type == "float32" else 2
    row = tensor_map.box[0] * element
    assert row % 16 == 0 and (tensor_map.swizzle == 0 or row <= tensor_map.swizzle)


def box_addresses(tensor_map, coordinates):
    """Address of every element of a box, dimension 0 fastest; -1 where it is out of range."""
    index = torch.zeros(1, dtype=torch.int64)
    valid = torch.ones(1, dtype=torch.bool)
    element = 4 if tensor_map.element_type == "float32" else 2
    strides = (element, *tensor_map.strides)
    for size, first, extent, stride in zip(
        tensor_map.box, coordinates, tensor_map.extents, strides, strict=True
    ):
        position = first + torch.arange(size)
        index = (position[:, None] * stride + index).flatten()
        valid = ((position >= 0) & (position < extent))[:, None].logical_and(valid).flatten()
    return torch.where(valid, tensor_map.address + index, -1)


def expected_addresses(tensor, grid, batch, head, cube, panel):
    """The same from the tensor's strides and the geometry of Python."""
    tokens = grid.token_index()[cube]
    columns = 64 * panel + torch.arange(64)
    offset = tokens[:, None] * tensor.stride(1) + columns + batch * tensor.stride(0) + head * tensor.stride(2)
    address = BASE + (tensor.storage_offset() + offset) * tensor.element_size()
    return torch.where(grid.valid()[cube][:, None], address, -1).flatten()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    ("video_shape", "cube"),
    [((5, 6, 7), (4, 4, 4)), ((1, 1, 130), (1, 1, 64)), ((3, 9, 5), (1, 8, 8)), ((1, 1, 1), (64, 1, 1))],
)
def test_boxes_hold_the_cubes(layout, batch, heads, video_shape, cube):
    grid = CubeGrid(video_shape, cube)
    tensor = meta(layout, batch, grid.num_tokens, heads, 128)
    plan = plan_pool([token_tensor(tensor)] * 3, video_shape, cube)
    in_columns, in_outer, batch_in_outer = pool_coordinates(plan)[0][0]
    check_map(plan.maps[0])
    sides = [torch.arange(0, size, side).tolist() for size, side in zip(video_shape, cube, strict=True)]
    origins = [(t, h, w) for t in sides[0] for h in sides[1] for w in sides[2]]
    for b in range(batch):
        for head in range(heads):
            for number, (t, h, w) in enumerate(origins):
                for panel in range(2):
                    outer = b * batch_in_outer + head * in_outer
                    at = (head * in_columns + 64 * panel, w, h, t, outer)
                    found = box_addresses(plan.maps[0], at)
                    assert torch.equal(found, expected_addresses(tensor, grid, b, head, number, panel))


@pytest.mark.parametrize(
    ("video_shape", "cube"), [((5, 6, 7), (4, 4, 4)), ((2, 17, 3), (2, 8, 4)), ((1, 1, 130), (1, 1, 64))]
)
def test_host_grid_equals_geometry(video_shape, cube):
    grid, host = CubeGrid(video_shape, cube), host_grid(video_shape, cube)
    assert host.num_cubes == grid.num_cubes and host.num_tokens == grid.num_tokens
    expected = torch.where(grid.valid(), grid.token_index(), -1).tolist()
    for number in range(grid.num_cubes):
        assert host.cube_tokens(number) == expected[number]
        bits = sum(1 << slot for slot, token in enumerate(expected[number]) if token >= 0)
        assert host.valid_slots(number) == bits


def test_head_goes_where_one_stride_serves():
    """Into the outer coordinate with the batch, if their strides allow; else into the columns."""
    cases = [
        ("bhsd", 2, 3, (0, 1, 3)),
        ("bshd", 1, 3, (0, 1, 3)),
        ("bshd", 2, 3, (128, 0, 1)),
        ("packed", 2, 3, (128, 0, 1)),
        ("sliced", 1, 3, (0, 1, 3)),
        ("sliced", 2, 3, (136, 0, 1)),
    ]
    for layout, batch, heads, coordinates in cases:
        tensor = token_tensor(meta(layout, batch, 60, heads, 128))
        assert pool_coordinates(plan_pool([tensor] * 3, (3, 4, 5)))[0][0] == coordinates


@pytest.mark.parametrize("odd", [0, 1, 7, 1 << 50])
def test_strides_of_dimensions_of_length_one_do_not_matter(odd):
    """torch leaves them arbitrary."""
    one_head = contiguous(batch=2, tokens=60, strides=(60 * 128, 128, odd, 1))
    one_batch = contiguous(tokens=60, heads=3, strides=(odd, 3 * 128, 128, 1))
    one_token = contiguous(heads=3, tokens=1, strides=(3 * 128, odd, 128, 1))
    for tensor, video_shape in ((one_head, (3, 4, 5)), (one_batch, (3, 4, 5)), (one_token, (1, 1, 1))):
        for tensor_map in plan_pool([tensor] * 3, video_shape).maps:
            check_map(tensor_map)


def test_the_inputs_of_a_plan_may_lie_differently():
    layouts = ("bshd", "bhsd", "packed")
    tensors = [meta(layout, 2, 60, 3, 64) for layout in layouts]
    plan = plan_pool(
        [token_tensor(x, address=BASE * (i + 1)) for i, x in enumerate(tensors)],
        (3, 4, 5),
        outputs=(64, 128, 192),
    )
    coordinates, outputs = pool_coordinates(plan)
    assert coordinates == [(64, 0, 1), (0, 1, 3), (64, 0, 1)]
    assert outputs == (64, 128, 192)
    assert [x.address for x in plan.maps] == [BASE, 2 * BASE, 3 * BASE + 3 * 64 * 2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_million_tokens(layout):
    video_shape = (64, 128, 128)
    tensor = token_tensor(meta(layout, 2, 1 << 20, 40, 128))
    plan = plan_pool([tensor] * 3, video_shape)
    for tensor_map in plan.maps:
        check_map(tensor_map)
    tiles_per_cta = math.ceil(3 * 2 * 40 * (1 << 14) / (6 * NUM_SMS))
    assert plan.grid == (math.ceil(3 * 2 * 40 * (1 << 14) / tiles_per_cta), 1, 1)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "heads", "video_shape"), [(1, 1, (1, 1, 1)), (2, 3, (5, 6, 7))])
def test_pool_plan_covers_every_cube(head_dim, dtype, batch, heads, video_shape):
    tensor = token_tensor(meta("bshd", batch, math.prod(video_shape), heads, head_dim, dtype))
    plan = plan_pool([tensor] * 3, video_shape)
    assert plan.kernel == f"pool_d{head_dim}_{'bf16' if dtype == torch.bfloat16 else 'fp16'}"
    tiles = 3 * batch * heads * CubeGrid(video_shape).num_cubes
    assert plan.grid == (tiles, 1, 1)  # fewer than run at once
    assert plan.block == (head_dim, 1, 1)
    assert plan.shared_bytes <= SHARED_LIMIT
    assert all(x.element_type == str(dtype).removeprefix("torch.") for x in plan.maps)


def pool_with(**changes):
    """A pool plan whose key is changed."""
    plan_pool(
        [
            contiguous(tokens=60, heads=2),
            contiguous(tokens=60, heads=2, **changes),
            contiguous(tokens=60, heads=2),
        ],
        (3, 4, 5),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"address": 0}, "key: got a null pointer"),
        ({"address": BASE + 8}, "key: got an address that is not 16-byte aligned; copy the tensor"),
        (
            {"strides": (60 * 260, 260, 128, 1)},
            "key: got a stride of 260 elements, expected a positive multiple of 8",
        ),
        (
            {"strides": (60 * 256, 256, 4, 1)},
            "key: got a stride of 4 elements, expected a positive multiple of 8",
        ),
        (
            {"strides": (60 * 256, 0, 128, 1)},
            "key: got a stride of 0 elements, expected a positive multiple of 8",
        ),
        (
            {"strides": (60 * 256, 1 << 39, 128, 1)},
            "key: got a stride of .* bytes, expected less than 2\\^40",
        ),
        (
            {"strides": (60 * 512, 512, 256, 2)},
            "strides: got 2 elements between columns of head_dim, expected 1",
        ),
        ({"shape": (1, 59, 2, 128)}, "key: got 59 tokens, expected 60 = T \\* H \\* W"),
        (
            {"shape": (1, 60, 3, 128)},
            "key: got batch 1, heads 3, .* expected batch 1, heads 2, .* as query has",
        ),
        ({"dtype": "float16"}, "key: got .*float16, expected .*bfloat16 as query has"),
        ({"dtype": "int8"}, "dtype: got int8, expected bfloat16, float16 or float32"),
    ],
)
def test_errors_name_the_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        pool_with(**changes)


def test_heads_too_far_apart_in_a_batch():
    """The head's offset must fit an int32 coordinate when the batch has a stride of its own."""
    strides = (128, 4 * 128, 1 << 31, 1)
    tensor = contiguous(batch=2, tokens=60, heads=2, strides=strides)
    with pytest.raises(ValueError, match="query: got heads 2147483648 elements apart in a batch of 2"):
        plan_pool([tensor] * 3, (3, 4, 5))
    one = contiguous(batch=1, tokens=60, heads=2, strides=strides)
    check_map(plan_pool([one] * 3, (3, 4, 5)).maps[0])


def test_more_ctas_than_a_grid_holds():
    tensor = contiguous(batch=1 << 16, tokens=1 << 14, heads=1 << 10, head_dim=64)
    with pytest.raises(ValueError, match="pool: got a problem of .* CTAs, expected 1 to 2\\^31 - 1"):
        plan_pool([tensor] * 3, (16, 32, 32))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"heads": 0}])
def test_an_empty_tensor_has_no_grid(sizes):
    tensor = contiguous(**{"batch": 1, "heads": 2, "tokens": 60, **sizes})
    with pytest.raises(ValueError, match="got a problem of 0 CTAs, expected 1 to"):
        plan_pool([tensor] * 3, (3, 4, 5))


def plan_delta(tensors, video_shape, grad_lse=None, delta=16):
    C = _extension.load()
    grad_lse = C.StridedTensor(address=BASE if grad_lse else 0, strides=grad_lse or [])
    return C.plan_delta(
        grad_out=tensors[0], out=tensors[1], grid=host_grid(video_shape), block_sizes=0,
        grad_lse=grad_lse, delta=delta, num_sms=NUM_SMS,
    )  # fmt: skip


@pytest.mark.parametrize(("head_dim", "ctas_per_sm"), [(64, 6), (128, 3)])
def test_delta_plan(head_dim, ctas_per_sm):
    """Fewer cubes than run at once; a million tokens; a gradient and an output that lie differently."""
    few = plan_delta([contiguous(tokens=60, heads=3, head_dim=head_dim)] * 2, (3, 4, 5))
    assert few.kernel == f"delta_d{head_dim}_bf16" and few.grid == (6, 1, 1)
    assert ctas_per_sm * (few.shared_bytes + 1024) <= SHARED_LIMIT + 1024
    tensors = [token_tensor(meta(layout, 2, 1 << 20, 40, head_dim)) for layout in ("packed", "bhsd")]
    plan = plan_delta(tensors, (64, 128, 128), grad_lse=[1, 2, 3, 4])
    assert [x.address for x in plan.maps] == [BASE + 40 * head_dim * 2, BASE]
    cubes = 2 * 40 * (1 << 14)
    share = math.ceil(cubes / (ctas_per_sm * NUM_SMS))
    assert plan.grid == (math.ceil(cubes / share), 1, 1)


def test_delta_plan_refuses():
    tensors = [contiguous(tokens=60, heads=3)] * 2
    with pytest.raises(ValueError, match="delta: got a null pointer"):
        plan_delta(tensors, (3, 4, 5), delta=0)
    with pytest.raises(ValueError, match=r"grad_lse: got 3 dimensions, expected \[batch, heads"):
        plan_delta(tensors, (3, 4, 5), grad_lse=[1, 2, 3])
    with pytest.raises(ValueError, match="out: got"):
        plan_delta([tensors[0], contiguous(tokens=60, heads=2)], (3, 4, 5))


@pytest.mark.parametrize("head_dim", [32, 96, 256])
def test_head_dim_without_a_kernel(head_dim):
    with pytest.raises(ValueError, match=f"head_dim: got {head_dim}, expected 64 or 128"):
        plan_pool([contiguous(tokens=60, head_dim=head_dim)] * 3, (3, 4, 5))


def test_outputs_must_have_memory():
    with pytest.raises(ValueError, match=r"outputs\[1\]: got a null pointer"):
        plan_pool([contiguous(tokens=60)] * 3, (3, 4, 5), outputs=(16, 0, 48))


@pytest.mark.parametrize(
    ("video_shape", "cube", "message"),
    [
        ((0, 4, 4), (4, 4, 4), r"video_shape\[0\]: got 0"),
        ((4, 1 << 31, 4), (4, 4, 4), r"video_shape\[1\]: got 2147483648"),
        ((1 << 15, 1 << 15, 1 << 15), (4, 4, 4), "video_shape: got .* cubes, expected fewer than 2\\^25"),
        ((4, 4, 4), (4, 4, 8), "cube: got a volume of 128, expected 64"),
        ((4, 4, 4), (4, 4, 3), r"cube\[2\]: got 3, expected a power of two"),
        ((4, 4, 4), (4, 0, 4), r"cube\[1\]: got 0, expected a power of two"),
    ],
)
def test_grid_errors(video_shape, cube, message):
    with pytest.raises(ValueError, match=message):
        host_grid(video_shape, cube)


def test_plans_of_the_forward_ops_are_launchable():
    """Every plan of the forward obeys the hardware's limits and names a kernel of this binary."""
    video_shape, cube, scale = (5, 6, 7), (4, 4, 4), 0.125
    query, key, value = (torch.zeros(2, 210, 3, 128, dtype=torch.bfloat16) for _ in range(3))
    with recorded_plans() as plans:
        coarse = _kernels.coarse_forward(query, key, value, video_shape, cube, 3, scale, True)
        counts, indices = coarse[-2:]
        _kernels.fine_forward(
            query, key, value, counts, indices, None, None, None, None, None, 1.0, 0.0, video_shape,
            video_shape, cube, cube, scale, True,
        )  # fmt: skip
    assert stems(plans) == ["pool", "fine_forward", "select_small", "schedule_pairs_of_2", "fine_forward"]
    for plan in plans:
        assert plan.kernel in _extension.load().kernel_names()
        assert 1 <= plan.grid[0] < 1 << 31 and plan.grid[1:] == (1, 1) and plan.cluster == (1, 1, 1)
        assert plan.block[0] % 32 == 0 and plan.block[0] <= 1024 and plan.block[1:] == (1, 1)
        assert plan.shared_bytes <= SHARED_LIMIT and plan.params
        for tensor_map in plan.maps:
            check_map(tensor_map)


def dense_arguments(video_shape, cube, batch=2, heads=3, head_dim=128):
    """query; arguments of fine_forward, combine_backward and fine_backward over all blocks of 64 tokens."""
    tokens = math.prod(video_shape)
    query, gate = (torch.zeros(batch, tokens, heads, head_dim, dtype=torch.bfloat16) for _ in range(2))
    coarse = torch.zeros(batch, heads, CubeGrid(video_shape, cube).num_cubes, head_dim, dtype=torch.bfloat16)
    rows = torch.zeros(batch, heads, -(-tokens // 64), 64)
    shape, block = (1, 1, tokens), (1, 1, 64)
    grids = (shape, shape, block, block, 0.125, True, video_shape, cube)
    gates = (coarse, None, gate, 1.0, 1.0)
    return (
        query,
        (query, query, query, None, None, None, None, *gates, *grids),
        (query, query, None, *gates, None, shape, block, video_shape, cube),
        (query, query, query, query, rows, rows, *(None,) * 6, coarse, coarse, coarse, *grids),
    )


def test_plans_of_dense_attention():
    """The fine stage over blocks of consecutive tokens, the coarse stage and combine_backward over cubes."""
    video_shape, cube = (5, 7, 9), (4, 4, 4)  # 12 cubes, 315 tokens in 5 blocks
    query, forward, combine, backward = dense_arguments(video_shape, cube)
    with recorded_plans() as plans:
        *_, counts, indices = _kernels.coarse_forward(
            query, query, query, video_shape, cube, 0, 0.125, True, False
        )
        _, _, lse = _kernels.fine_forward(*forward)
        _, delta, grad_coarse, *_ = _kernels.combine_backward(*combine)
        _kernels.fine_backward(*backward)
    assert counts.shape == indices.shape == (0,)
    assert lse.shape == delta.shape == (2, 3, 5, 64) and grad_coarse.shape == (2, 3, 12, 128)
    assert list(zip(stems(plans), [plan.grid[0] for plan in plans], strict=True)) == [
        ("pool", 3 * 2 * 3 * 12),
        ("fine_forward", 2 * 3 * 2),  # 12 pooled tokens are one block, in a group for two
        ("fine_forward", 2 * 3 * 6),  # a block each, of three groups
        ("combine_backward", 2 * 3 * 12),
        ("fine_backward_q", 2 * 3 * 3),
        ("fine_backward_kv", 2 * 3 * 3),
    ]


@pytest.mark.parametrize(
    ("blocks", "heads", "sms", "changes", "ctas"),
    [
        (2, 300, 132, {}, None),  # one task a head has no neighbour
        (3, 1, 3, {}, 2),
        (3, 1, 132, {}, None),  # a block in each of three CTAs
        (5, 66, 132, {}, None),  # 198 groups, 132 of them and then 132 blocks: less than two rounds of pairs
        (5, 66, 131, {}, None),  # two rounds of groups, or three of pairs, of which each second is half empty
        (5, 44, 132, {}, None),  # 132 groups at once, or 88 pairs at 66 at a time
        (5, 33, 133, {}, 132),
        (74, 66, 132, {}, 132),  # 18.5 rounds of groups, or 19 of pairs, which are shorter
        (74, 50, 132, {}, 132),  # 14 rounds and 2 groups, which are short, or 14.4 of pairs
        (70, 4, 3, {}, None),  # 140 at 3 at a time, or 72 pairs at one
        (8, 1, 3, {}, None),  # three groups and two blocks
        (8, 3, 3, {}, None),  # 12 at 3 at a time, or 6 pairs at one
        (8, 3, 1, {}, None),
        (8, 3, 132, {"head_dim": 64}, None),
        (8, 3, 132, {"block_sizes": BASE}, None),
        (8, 3, 132, {"schedule": True}, None),
    ],
)
def test_when_ctas_of_the_forward_pair(blocks, heads, sms, changes, ctas):
    """`ctas` of them, or None."""
    plan = plan_forward(blocks, heads, sms, **changes)
    if ctas is None:
        assert stems([plan]) == ["fine_forward"] and plan.cluster == (1, 1, 1)
    else:
        assert stems([plan]) == ["fine_forward_dense"] and plan.cluster == (2, 1, 1)
        assert plan.grid == (ctas, 1, 1)


def plan_forward(blocks, heads, sms, head_dim=128, block_sizes=0, schedule=False):
    like = torch.zeros(1, 64 * blocks, heads, head_dim, dtype=torch.bfloat16)
    grid = host_grid((1, 1, 64 * blocks), (1, 1, 64))
    lists = torch.zeros(1, heads, blocks, dtype=torch.int32), torch.zeros(1, heads, blocks, 1).int()
    with recorded_plans():
        made, _kept = _kernels._schedule(
            "fine_forward", like, grid, grid, None, lists if schedule else (None, None)
        )
    return plan_self_attention(like, grid, made, block_sizes, sms)


def plan_self_attention(like, grid, schedule, block_sizes=0, sms=NUM_SMS):
    tensor, (gate, _) = _kernels._tokens(like), _kernels._gate(None, 1.0)
    return _extension.load().plan_fine_forward(
        query=tensor, key=tensor, value=tensor, out=tensor, out_fine=tensor, store_out_fine=False,
        q_grid=grid, kv_grid=grid, coarse_grid=grid, schedule=schedule, block_sizes=block_sizes,
        q_block_sizes=0, lse=BASE, coarse=0, gate_fine=gate, gate_coarse=gate, scale=0.125, num_sms=sms,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("cube", "boxes"),
    [
        ((4, 4, 4), [(64, 4, 4, 4, 1), (64, 4, 4, 1, 1), (64, 4, 1, 4, 1), (64, 1, 4, 4, 1)]),
        ((16, 2, 2), [(64, 2, 2, 16, 1), (64, 2, 2, 4, 1)]),
        ((1, 1, 64), [(64, 64, 1, 1, 1), None, None, (64, 16, 1, 1, 1)]),
    ],
)
def test_boxes_of_a_cube_and_of_a_quarter_of_it(cube, boxes):
    """By the side that is a quarter: time, height, width. None of sides below four."""
    like = torch.zeros(1, 5 * 6 * 7, 2, 64, dtype=torch.bfloat16)
    plan = plan_self_attention(like, host_grid((5, 6, 7), cube), _extension.load().Schedule())
    assert len(plan.maps) == 1 + 2 * 4 and plan.maps[0].box == boxes[0]
    for first in (1, 5):
        for found, box in zip(plan.maps[first:], boxes, strict=False):
            assert box is None or found.box == box
            assert (found.extents, found.strides) == (plan.maps[0].extents, plan.maps[0].strides)


@pytest.mark.parametrize(
    ("op", "position"), [("fine_forward", 1), ("combine_backward", 2), ("fine_backward", 3)]
)
def test_the_coarse_grid_has_the_same_tokens(op, position):
    arguments = dense_arguments((5, 7, 9), (4, 4, 4))[position]
    with recorded_plans(), pytest.raises(ValueError, match="grid: got 280 tokens, expected the 315"):
        getattr(_kernels, op)(*arguments[:-2], (5, 7, 8), (4, 4, 4))
