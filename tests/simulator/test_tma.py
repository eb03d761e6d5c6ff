"""Tensor copies between global and shared memory (PTX ISA "Tensors", "cp.async.bulk.tensor")."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from simulator.helpers import (
    aligned,
    assert_fault,
    copy_words,
    entry,
    init_barriers,
    pointers,
    run,
    swizzled,
    tensor_map,
    wait_parity,
)

pytestmark = pytest.mark.simulator
TILE = 1024  # offset of the tile in dynamic shared memory; the mbarrier is at 0
SEEDS = range(3)


def coordinates(at: Sequence[int]) -> str:
    return "".join(f"mov.s32 %r{40 + i}, {item};" for i, item in enumerate(at))


def operand(rank: int) -> str:
    return "{" + ", ".join(f"%r{40 + i}" for i in range(rank)) + "}"


def box_slices(
    shape: Sequence[int], box: Sequence[int], at: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of the part inside the tensor, in the tensor and in the box; outermost dimension first."""
    inside, part = [], []
    for extent, size, start in zip(shape, box, at, strict=True):
        low, high = max(start, 0), min(start + size, extent)
        inside.append(slice(low, max(low, high)))
        part.append(slice(low - start, max(low, high) - start))
    return tuple(inside), tuple(part)


def shared_image(tile: torch.Tensor, swizzle: int, base: int = TILE) -> np.ndarray:
    """Bytes of shared memory from `base` on that hold a tile."""
    data = tile.contiguous().view(torch.uint8).numpy().ravel()
    image = np.zeros_like(data)
    image[swizzled(np.arange(data.size) + base, swizzle) - base] = data
    return image


def tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    count = int(np.prod(shape))
    raw = torch.from_numpy(aligned((count,), np.float32)).view(dtype)[:count]
    raw.copy_(torch.arange(count) % 199 + 1)
    return raw.view(*shape)


def load_program(
    rank: int,
    at: Sequence[int],
    size: int,
    *,
    base: int = TILE,
    expect: int | None = None,
    hint: bool = False,
) -> str:
    """Thread 0 loads a box; all threads wait and copy the tile's bytes to params[0]."""
    policy = "createpolicy.fractional.L2::evict_last.b64 %rd20, 1.0;" if hint else ""
    suffix = (".L2::cache_hint", ", %rd20") if hint else ("", "")
    return entry(
        f"""
        mov.u32 %r0, smem; add.u32 %r1, %r0, {base};
        {init_barriers(1)}
        {coordinates(at)} {policy}
        setp.eq.u32 %p1, %thread, 0;
        @%p1 prefetch.tensormap [%map0];
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0], {size if expect is None else expect};
        @%p1 cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes{suffix[0]}
            [%r1], [%map0, {operand(rank)}], [%r0]{suffix[1]};
        {wait_parity("%r0", 0, "WAIT")}
        {copy_words("global:%rd0", "shared:%r1", size // 4, 64, "COPY")}
        """,
        maps=1,
    )


def check_load(
    source: torch.Tensor,
    box: Sequence[int],
    at: Sequence[int],
    swizzle: int,
    memory: torch.Tensor | None = None,
    **options: object,
) -> None:
    """box and at innermost first; source may be a view of `memory`."""
    inside, part = box_slices(source.shape, tuple(reversed(box)), tuple(reversed(at)))
    tile = torch.zeros(*reversed(box), dtype=source.dtype)
    tile[part] = source[inside]
    size = tile.numel() * tile.element_size()
    output = np.zeros(size, np.uint8)
    base = int(options.get("base", TILE))
    for seed in SEEDS:
        run(
            load_program(len(box), at, size, **options),
            [(source if memory is None else memory, "r"), (output, "w")],
            params=pointers(output),
            maps=[tensor_map(source, box, swizzle)],
            block=64,
            shared_bytes=base + size,
            seed=seed,
        )
        np.testing.assert_array_equal(output, shared_image(tile, swizzle, base))


SHAPES = {1: (96,), 2: (9, 96), 3: (4, 9, 96), 4: (3, 4, 5, 96), 5: (2, 3, 4, 5, 96)}
BOXES = {1: (64,), 2: (64, 8), 3: (64, 4, 2), 4: (64, 4, 2, 2), 5: (64, 4, 2, 2, 1)}
CORNERS = [
    [0] * 5,
    [32, 1, 1, 1, 1],
    [-16, -1, -1, -1, 0],
    [64, 3, 3, 2, 1],
    [-64, 0, 0, 0, 0],
    [1000, 100, 0, 0, 0],
]


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("corner", range(len(CORNERS)))
def test_load_ranks(rank: int, corner: int) -> None:
    """Boxes inside, over every edge and outside; missing elements are zero and count as transferred bytes."""
    check_load(
        tensor(SHAPES[rank], torch.bfloat16), BOXES[rank], CORNERS[corner][:rank], 128 if rank > 1 else 0
    )


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_load_swizzles(swizzle: int, dtype: torch.dtype) -> None:
    source = tensor((40, 64), dtype)
    width = (swizzle or 64) // source.element_size()
    check_load(source, (width, 32), (8, 4), swizzle)


@pytest.mark.parametrize("base", [1024 + 128, 1024 + 640])
@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_swizzle_follows_the_address(swizzle: int, base: int) -> None:
    """The pattern depends on shared address bits, not on the offset in the tile."""
    check_load(tensor((40, 64), torch.bfloat16), (swizzle // 2, 16), (0, 2), swizzle, base=base)


def test_load_with_cache_hint() -> None:
    check_load(tensor((9, 96), torch.bfloat16), (64, 8), (16, 3), 128, hint=True)


def test_load_of_strided_tensor() -> None:
    """Strides larger than the extents, as of one tensor of a packed projection."""
    packed = tensor((6, 7, 192), torch.bfloat16)
    check_load(packed[:, 1:5, 64:128], (64, 4, 2), (0, 2, 3), 128, memory=packed)


def store_program(
    rank: int, at: Sequence[int], size: int, instruction: str, fence: str = "fence.proxy.async.shared::cta;"
) -> str:
    """All threads fill the tile from params[0]; thread 0 stores or reduces it."""
    return entry(
        f"""
        mov.u32 %r0, smem; add.u32 %r1, %r0, {TILE};
        {copy_words("shared:%r1", "global:%rd0", size // 4, 64, "COPY")}
        {fence}
        bar.sync 0;
        {coordinates(at)}
        setp.eq.u32 %p1, %thread, 0;
        @%p1 {instruction} [%map0, {operand(rank)}], [%r1];
        @%p1 cp.async.bulk.commit_group;
        @%p1 cp.async.bulk.wait_group 0;
        """,
        maps=1,
    )


STORE = "cp.async.bulk.tensor.{}d.global.shared::cta.tile.bulk_group"
REDUCE = "cp.reduce.async.bulk.tensor.{}d.global.shared::cta.{}.tile.bulk_group"


def run_store(
    target: torch.Tensor, tile: torch.Tensor, at: Sequence[int], swizzle: int, instruction: str, seed: int
) -> None:
    image = shared_image(tile, swizzle)
    box = tuple(reversed(tile.shape))
    run(
        store_program(len(box), at, image.size, instruction),
        [target, (image, "r")],
        params=pointers(image),
        maps=[tensor_map(target, box, swizzle)],
        block=64,
        shared_bytes=TILE + image.size,
        seed=seed,
    )


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("corner", range(len(CORNERS)))
def test_store_ranks(rank: int, corner: int) -> None:
    """Elements outside the tensor are not written."""
    at, box = CORNERS[corner][:rank], BOXES[rank]
    tile = tensor(tuple(reversed(box)), torch.bfloat16)
    expected = tensor(SHAPES[rank], torch.bfloat16)
    inside, part = box_slices(SHAPES[rank], tuple(reversed(box)), tuple(reversed(at)))
    target = tensor(SHAPES[rank], torch.bfloat16)
    expected[inside] = tile[part]
    run_store(target, tile, at, 128 if rank > 1 else 0, STORE.format(rank), seed=corner)
    torch.testing.assert_close(target, expected, rtol=0, atol=0)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_store_and_reduce_swizzles(swizzle: int, dtype: torch.dtype) -> None:
    tile = tensor((16, (swizzle or 64) // dtype.itemsize), dtype)
    for instruction, initial in ((STORE.format(2), 0), (REDUCE.format(2, "add"), 1)):
        target = tensor((20, 64), dtype)
        expected = target.clone()
        expected[3:19, : tile.shape[1]] = expected[3:19, : tile.shape[1]] * initial + tile
        run_store(target, tile, (0, 3), swizzle, instruction, seed=1)
        torch.testing.assert_close(target, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "function"), [("min", torch.minimum), ("max", torch.maximum)])
def test_reduce_minimum_maximum(name: str, function: object) -> None:
    tile, target = tensor((8, 64), torch.bfloat16), tensor((8, 64), torch.bfloat16).flip(0).contiguous()
    expected = function(tile, target)
    run_store(target, tile, (0, 0), 128, REDUCE.format(2, name), seed=1)
    torch.testing.assert_close(target, expected, rtol=0, atol=0)


def test_reductions_of_many_ctas_add_up() -> None:
    tile, target = tensor((8, 32), torch.float32), tensor((8, 32), torch.float32)
    expected = target + 6 * tile
    image = shared_image(tile, 128)
    ptx = store_program(2, (0, 0), image.size, REDUCE.format(2, "add"))
    maps = [tensor_map(target, (32, 8), 128)]
    run(ptx, [target, (image, "r")], params=pointers(image), maps=maps, block=64, grid=6, shared_bytes=4096)
    torch.testing.assert_close(target, expected, rtol=0, atol=0)


def test_loads_complete_out_of_order() -> None:
    """Two loads on two barriers: some schedule finishes the second before the first."""
    body = f"""
        mov.u32 %r0, smem; add.u32 %r1, %r0, {TILE}; add.u32 %r2, %r0, 8; add.u32 %r3, %r1, 1024;
        {init_barriers(1, 1)} {coordinates((0, 0))}
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0], 1024;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 1024;
        cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
            [%r1], [%map0, {operand(2)}], [%r0];
        cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
            [%r3], [%map0, {operand(2)}], [%r2];
    AGAIN:
        mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;
        mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r0], 0;
        or.pred %p3, %p1, %p2;
        @!%p3 bra AGAIN;
        selp.u32 %r9, 1, 0, %p1; st.global.b32 [%rd0], %r9;
        {wait_parity("%r0", 0, "FIRST")} {wait_parity("%r2", 0, "SECOND")}
    """
    source = tensor((8, 64), torch.bfloat16)
    seen = set()
    for seed in range(24):
        output = np.zeros(1, np.uint32)
        maps = [tensor_map(source, (64, 8), 128)]
        run(
            entry(body, maps=1),
            [(source, "r"), output],
            params=pointers(output),
            maps=maps,
            block=1,
            shared_bytes=4096,
            seed=seed,
        )
        seen.add(int(output[0]))
    assert seen == {0, 1}


def load_fault(
    kinds: str | tuple[str, ...],
    *,
    base: int = TILE,
    expect: int | None = None,
    edit: tuple[str, str] | None = None,
    **changes: object,
) -> None:
    source, output = tensor((40, 64), torch.bfloat16), np.zeros(2048, np.uint8)
    plan = tensor_map(source, (64, 16), 128)
    for name, value in changes.items():
        setattr(plan, name, value)
    good = load_program(2, (0, 2), 2048, base=base, expect=expect)
    assert edit is None or good.count(edit[0]) == 1
    ptx = good.replace(*edit) if edit else good

    def action(seed: int) -> None:
        run(
            ptx,
            [(source, "r"), output],
            params=pointers(output),
            maps=[plan],
            block=64,
            shared_bytes=4096,
            seed=seed,
        )

    assert_fault(kinds, action)


def test_load_faults() -> None:
    early = ("race", "uninitialised")
    load_fault("misaligned", base=TILE + 64)
    load_fault("out-of-bounds", base=TILE + 2048)
    load_fault(("barrier", "deadlock", *early), expect=1024)
    load_fault(("deadlock", "barrier"), expect=4096)
    load_fault(early, edit=(wait_parity("%r0", 0, "WAIT"), ""))
    load_fault("missing-fence", edit=("@%p30 fence.mbarrier_init.release.cluster;", ""))


BAD_BOX = ("out-of-bounds", "unsupported", "misaligned", "limit")


def test_bad_tensor_maps() -> None:
    """The limits of cuTensorMapEncodeTiled: alignment, box, swizzle span; rank against the instruction."""
    source = tensor((40, 64), torch.bfloat16)
    load_fault(("misaligned", "unsupported"), address=source.data_ptr() + 8)
    load_fault(("misaligned", "unsupported"), strides=(120,))
    load_fault(BAD_BOX, box=(64, 257))
    load_fault(BAD_BOX, box=(128, 8))
    load_fault(BAD_BOX, extents=(64,), strides=(), box=(64,))


def test_load_outside_memory() -> None:
    """Extents that reach past the tensor's memory."""
    source = tensor((40, 64), torch.bfloat16)
    load_fault("out-of-bounds", extents=(64, 4000), address=source.data_ptr())


def test_store_faults() -> None:
    tile, target = tensor((8, 64), torch.bfloat16), tensor((8, 64), torch.bfloat16)
    image = shared_image(tile, 128)
    good = store_program(2, (0, 0), image.size, STORE.format(2))

    def fault(kinds: str | tuple[str, ...], old: str, new: str) -> None:
        assert good.count(old) == 1
        maps = [tensor_map(target, (64, 8), 128)]

        def action(seed: int) -> None:
            run(
                good.replace(old, new),
                [target, (image, "r")],
                params=pointers(image),
                maps=maps,
                block=64,
                shared_bytes=TILE + image.size,
                seed=seed,
            )

        assert_fault(kinds, action)

    fault("missing-fence", "fence.proxy.async.shared::cta;", "")
    fault(("race", "missing-fence", "uninitialised"), "bar.sync 0;", "")
    fault("exit", "@%p1 cp.async.bulk.wait_group 0;", "")
    fault(("exit", "bulk-read"), "@%p1 cp.async.bulk.commit_group;", "")
    fault(
        "missing-fence",
        "fence.proxy.async.shared::cta;\n        bar.sync 0;",
        "fence.acq_rel.cta; bar.sync 0;",
    )
    fault(
        "bulk-read",
        "@%p1 cp.async.bulk.wait_group 0;",
        "@%p1 st.shared.b32 [%r1], 0; @%p1 cp.async.bulk.wait_group 0;",
    )


def test_wait_group_read_allows_reuse() -> None:
    tile, target = tensor((8, 64), torch.bfloat16), tensor((8, 64), torch.bfloat16)
    image = shared_image(tile, 128)
    reuse = (
        "@%p1 cp.async.bulk.wait_group.read 0; @%p1 st.shared.b32 [%r1], 0; @%p1 cp.async.bulk.wait_group 0;"
    )
    ptx = store_program(2, (0, 0), image.size, STORE.format(2)).replace(
        "@%p1 cp.async.bulk.wait_group 0;", reuse
    )
    for seed in SEEDS:
        target.zero_()
        maps = [tensor_map(target, (64, 8), 128)]
        run(
            ptx,
            [target, (image, "r")],
            params=pointers(image),
            maps=maps,
            block=64,
            shared_bytes=TILE + image.size,
            seed=seed,
        )
        torch.testing.assert_close(target, tile, rtol=0, atol=0)
