"""The public functions. Method and equations: Video Sparse Attention (arXiv 2505.13389), section 2."""

import torch

from vsa_cuda import checks
from vsa_cuda.autograd import BlockSparse, VideoSparse
from vsa_cuda.geometry import (
    CUBE_VOLUME,
    CubeGrid,
    check_cube,
    check_video_shape,
    num_cubes,
    topk_from_sparsity,
)

_LINEAR_CUBE = (1, 1, CUBE_VOLUME)


def video_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    video_shape: tuple[int, int, int],
    *,
    topk: int | None = None,
    sparsity: float | None = None,
    gate_coarse: torch.Tensor | float | None = None,
    gate_fine: torch.Tensor | float | None = None,
    cube: tuple[int, int, int] = (4, 4, 4),
    scale: float | None = None,
    layout: str = "bshd",
    deterministic: bool | None = None,
    return_selection: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Video Sparse Attention: `O = O_f * gate_fine + O_c[cube] * gate_coarse`.

    The coarse stage attends between the means of cubes of 64 tokens, gives O_c and selects `topk` key cubes
    for every query cube and head; the fine stage attends from every token to the tokens of the selected
    cubes, O_f. Gradients flow through O_f, O_c and both gates, none through the selection.

    Args:
        query, key, value: [B, S, H, D] ([B, H, S, D] for layout "bhsd"), S = T * H * W tokens in raster order
            (W fastest). bfloat16 or float16, on the CPU also float32 and float64; D 64 or 128, on every
            device. Views are read in place: head_dim contiguous, base aligned to 16 bytes, strides of
            dimensions longer than 1 multiples of 8 elements. Under autocast they and tensor gates are cast
            to its dtype.
        video_shape: (T, H, W) in tokens, every size at least 1.
        topk: key cubes per query cube, at least 1. From the number of cubes upwards the fine stage is dense:
            nothing is selected, and partial cubes cost no more than their tokens.
        sparsity: fraction of cubes left out, in [0, 1]; see topk_from_sparsity. Exactly one of topk and
            sparsity.
        gate_coarse, gate_fine: a tensor like query (same shape, dtype and layout; any strides), a 0-d tensor
            of any floating dtype, or a float. None is 1.0. gate_coarse=0.0 (the float) skips the coarse
            output, not the selection.
        cube: (t, h, w) in tokens, of volume 64.
        scale: factor of the scores, above 0; head_dim**-0.5 by default.
        layout: "bshd" or "bhsd", of query, key, value, tensor gates and the result.
        deterministic: True gives bitwise repeatable gradients (two passes without atomic sums, where one may
            be faster); None follows torch.are_deterministic_algorithms_enabled(). The forward always is.
        return_selection: return the selected cubes as well.

    Under torch.compile, `sparsity` and float gates are constants, a new value compiles again: schedule with
    `topk` or 0-d tensor gates.

    Returns:
        out: like query, a new tensor in BSHD memory (a transposed view of it for "bhsd").
        With return_selection (out, kv_num_blocks, kv_indices): int32 [B, H, N] and [B, H, N, topk],
        ascending; where topk covers all cubes, expanded views of one list.

    Raises:
        TypeError, ValueError: a bad argument; the message names it, what was got and expected, and the fix.
        RuntimeError: a GPU that is not sm_90, or CUDA tensors without the compiled extension.
    """
    checks.check_layout(layout)
    query, key, value, gate_fine, gate_coarse = _prepare(query, key, value, gate_fine, gate_coarse)
    checks.check_query_key_value(query, key, value, layout)
    video_shape, cube = check_video_shape(video_shape), check_cube(cube)
    sequence = _sequence_dim(layout)
    checks.check_num_tokens("query", query, sequence, video_shape, "video_shape")
    checks.check_num_tokens("key", key, sequence, video_shape, "video_shape")
    checks.check_gate("gate_fine", gate_fine, query)
    checks.check_gate("gate_coarse", gate_coarse, query)
    checks.check_bool("return_selection", return_selection)
    topk = _resolve_topk(topk, sparsity, video_shape, cube)
    scale, deterministic = _resolve_scale(scale, query), _resolve_deterministic(deterministic)

    gate_fine, gate_fine_value = _split_gate(gate_fine, query, layout)
    gate_coarse, gate_coarse_value = _split_gate(gate_coarse, query, layout)
    with_coarse = gate_coarse is not None or gate_coarse_value != 0.0
    query, key, value = (_to_bshd(x, layout) for x in (query, key, value))
    inputs = (query, key, value, gate_fine, gate_coarse)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    out, kv_num_blocks, kv_indices, *_ = VideoSparse.apply(
        query, key, value, gate_fine, gate_coarse, gate_fine_value, gate_coarse_value, with_coarse,
        video_shape, cube, topk, scale, deterministic, differentiable,
    )  # fmt: skip
    out = _from_bshd(out, layout)
    if not return_selection:
        return out
    if topk is None:
        kv_num_blocks, kv_indices = _complete_lists(query, num_cubes(video_shape, cube))
    return out, kv_num_blocks, kv_indices


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_num_blocks: torch.Tensor,
    kv_indices: torch.Tensor,
    *,
    video_shape: tuple[int, int, int] | None = None,
    kv_video_shape: tuple[int, int, int] | None = None,
    cube: tuple[int, int, int] = (4, 4, 4),
    kv_cube: tuple[int, int, int] | None = None,
    block_sizes: torch.Tensor | None = None,
    q_block_sizes: torch.Tensor | None = None,
    scale: float | None = None,
    layout: str = "bshd",
    deterministic: bool | None = None,
    return_lse: bool = False,
    check: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The fine stage alone: every block of 64 queries attends to the blocks of 64 keys in its list.

    Args:
        query: [B, Sq, H, D]; key, value: [B, Skv, H, D]. See video_sparse_attention.
        kv_num_blocks: int32 [B, H, Nq], length of each list. An empty one gives out = 0, LSE = -inf, no
            gradient.
        kv_indices: int32 [B, H, Nq, max_blocks], distinct key blocks, ascending; entries beyond the length
            are not read. from_block_mask makes both from a FlexAttention BlockMask.
        video_shape: (T, H, W) of the query tokens; blocks are then its cubes. None: blocks of 64 consecutive
            tokens, the last one may be shorter.
        kv_video_shape: (T, H, W) of the key tokens; None: as video_shape. For video queries and keys in
            consecutive blocks pass (1, 1, Skv) and kv_cube=(1, 1, 64).
        cube, kv_cube: (t, h, w) in tokens, of volume 64; kv_cube None: as cube.
        block_sizes, q_block_sizes: int32 [Nkv] and [Nq], 0 to 64: only that many leading slots of each block
            hold tokens. The others may hold anything, NaN included; as queries they give out = 0 and
            LSE = -inf, and their gradients are 0.
        return_lse: return the log-sum-exp as well.
        check: validate the values of the index and the sizes. Synchronises; raises under torch.compile.
            Without it, values out of order or range are undefined behaviour.
        scale, layout, deterministic: see video_sparse_attention.

    Returns:
        out: like query, a new tensor in BSHD memory (a transposed view of it for "bhsd").
        With return_lse (out, lse): lse [B, H, Sq] in both layouts, natural log, float32 (float64 for
        float64), differentiable, so that partial attentions can be merged.

    Raises:
        TypeError, ValueError, RuntimeError: see video_sparse_attention.
    """
    checks.check_layout(layout)
    query, key, value, *_ = _prepare(query, key, value, None, None)
    checks.check_query_key_value(query, key, value, layout)
    sequence, heads = _sequence_dim(layout), 3 - _sequence_dim(layout)
    q_shape, kv_shape, cube, kv_cube = _resolve_grids(
        video_shape, kv_video_shape, cube, kv_cube, query.shape[sequence], key.shape[sequence]
    )
    checks.check_num_tokens("query", query, sequence, q_shape, "video_shape")
    checks.check_num_tokens("key", key, sequence, kv_shape, "kv_video_shape")
    num_q_blocks, num_kv_blocks = num_cubes(q_shape, cube), num_cubes(kv_shape, kv_cube)
    checks.check_index(kv_num_blocks, kv_indices, query, (query.shape[0], query.shape[heads], num_q_blocks))
    checks.check_block_sizes("block_sizes", block_sizes, query, num_kv_blocks)
    checks.check_block_sizes("q_block_sizes", q_block_sizes, query, num_q_blocks)
    checks.check_bool("return_lse", return_lse)
    checks.check_bool("check", check)
    scale, deterministic = _resolve_scale(scale, query), _resolve_deterministic(deterministic)
    if check:
        checks.check_index_values(kv_num_blocks, kv_indices, num_kv_blocks, block_sizes, q_block_sizes)

    query, key, value = (_to_bshd(x, layout) for x in (query, key, value))
    kv_num_blocks, kv_indices = kv_num_blocks.contiguous(), kv_indices.contiguous()
    block_sizes, q_block_sizes = (None if x is None else x.contiguous() for x in (block_sizes, q_block_sizes))
    out, lse = BlockSparse.apply(
        query, key, value, kv_num_blocks, kv_indices, block_sizes, q_block_sizes, q_shape, kv_shape, cube,
        kv_cube, num_kv_blocks, scale, return_lse, deterministic,
    )  # fmt: skip
    out = _from_bshd(out, layout)
    return (out, _lse_of_tokens(lse, q_shape, cube, q_block_sizes is not None)) if return_lse else out


def from_block_mask(block_mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Converts a torch.nn.attention.flex_attention.BlockMask with blocks of 64x64.

    Takes the union of its full and partial lists. Partial blocks under a mask_mod would need the mask inside
    the block, which block_sparse_attention does not evaluate: they are refused. Lists without a mask_mod
    (BlockMask.from_kv_blocks) mean whole blocks. With a mask_mod, synchronises to read the counts.

    Returns:
        kv_num_blocks int32 [B, H, Nq], kv_indices int32 [B, H, Nq, max_blocks], ascending, 0 after the list.
        B and H are those of the mask: .expand them where the mask is shared.

    Raises:
        TypeError: not a BlockMask. ValueError: another block size, or partial blocks with a mask_mod.
    """
    from torch.nn.attention.flex_attention import BlockMask, noop_mask

    if not isinstance(block_mask, BlockMask):
        checks.fail(
            TypeError,
            "block_mask",
            type(block_mask).__name__,
            "a torch.nn.attention.flex_attention.BlockMask",
            "make it with create_block_mask(..., BLOCK_SIZE=64) or BlockMask.from_kv_blocks",
        )
    if tuple(block_mask.BLOCK_SIZE) != (CUBE_VOLUME, CUBE_VOLUME):
        checks.fail(
            ValueError,
            "block_mask",
            f"BLOCK_SIZE {tuple(block_mask.BLOCK_SIZE)}",
            f"({CUBE_VOLUME}, {CUBE_VOLUME})",
            f"build the mask with BLOCK_SIZE={CUBE_VOLUME}",
        )
    partial = (block_mask.kv_num_blocks, block_mask.kv_indices)
    full = (block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    if block_mask.mask_mod is not noop_mask and bool((partial[0] > 0).any()):
        checks.fail(
            ValueError,
            "block_mask",
            f"{int(partial[0].sum())} partial blocks with a mask_mod",
            "whole blocks: a mask inside a block is not evaluated",
            "align the mask_mod to blocks of 64 tokens, or use flex_attention",
        )
    return _union([lists for lists in (partial, full) if lists[0] is not None], _num_kv_blocks(block_mask))


def _num_kv_blocks(block_mask) -> int:
    return -(-block_mask.seq_lengths[1] // CUBE_VOLUME)


def _union(
    lists: list[tuple[torch.Tensor, torch.Tensor]], num_kv_blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted union of (counts [...], indices [..., width]) pairs."""
    columns = []
    for counts, indices in lists:
        listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
        columns.append(torch.where(listed, indices, num_kv_blocks))
    merged = torch.cat(columns, dim=-1).sort(dim=-1).values
    repeated = merged[..., 1:] == merged[..., :-1]
    merged[..., 1:] = merged[..., 1:].masked_fill(repeated, num_kv_blocks)
    merged = merged.sort(dim=-1).values[..., :num_kv_blocks]
    counts = (merged < num_kv_blocks).sum(dim=-1)
    return counts.to(torch.int32), merged.masked_fill(merged == num_kv_blocks, 0).to(torch.int32).contiguous()


def _prepare(query, key, value, gate_fine, gate_coarse):
    """Autocast, and a view of each tensor: one passed twice would lose a gradient in compiled autograd."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.check_tensor(name, x)
    device = query.device.type
    autocast = torch.is_autocast_enabled(device) if device in ("cuda", "cpu") else False
    dtype = torch.get_autocast_dtype(device) if autocast else None

    def prepared(x):
        if not isinstance(x, torch.Tensor):
            return x
        if dtype is not None and x.dim() > 0 and x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(dtype)
        return x.view_as(x)

    return tuple(prepared(x) for x in (query, key, value, gate_fine, gate_coarse))


def _sequence_dim(layout: str) -> int:
    return 1 if layout == "bshd" else 2


def _to_bshd(x: torch.Tensor, layout: str) -> torch.Tensor:
    return x if layout == "bshd" else x.transpose(1, 2)


_from_bshd = _to_bshd


def _split_gate(gate, query: torch.Tensor, layout: str) -> tuple[torch.Tensor | None, float]:
    """(tensor or None, float used when None). A 0-d tensor in the compute dtype: what the kernels read."""
    if gate is None:
        return None, 1.0
    if not isinstance(gate, torch.Tensor):
        return None, float(gate)
    if gate.dim() == 0:
        return gate.to(torch.float64 if query.dtype == torch.float64 else torch.float32), 1.0
    return _to_bshd(gate, layout), 1.0


def _complete_lists(query: torch.Tensor, cubes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all cubes in every row, without memory for each."""
    every = torch.arange(cubes, dtype=torch.int32, device=query.device)
    rows = (query.shape[0], query.shape[2], cubes)
    return every.new_full((1,), cubes).expand(rows), every.expand(*rows, cubes)


def _resolve_topk(topk, sparsity, video_shape, cube) -> int | None:
    """None where it covers all cubes."""
    checks.check_one_of("topk", topk, "sparsity", sparsity, "pass topk=32 or sparsity=0.9, for instance")
    if topk is None:
        # A traced float cannot become an integer under torch.compile: hashing makes it a constant there.
        hash(sparsity)
        topk = topk_from_sparsity(sparsity, video_shape, cube)
    checks.check_topk(topk)
    return None if topk >= num_cubes(video_shape, cube) else topk


def _resolve_scale(scale: float | None, query: torch.Tensor) -> float:
    if scale is None:
        return query.shape[3] ** -0.5
    checks.check_scale(scale)
    return float(scale)


def _resolve_deterministic(deterministic: bool | None) -> bool:
    checks.check_bool("deterministic", deterministic, optional=True)
    return torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic


def _resolve_grids(video_shape, kv_video_shape, cube, kv_cube, num_q_tokens, num_kv_tokens):
    """Query and key grids with their cubes; without shapes, blocks of 64 consecutive tokens."""
    cube = check_cube(cube)
    kv_cube = None if kv_cube is None else check_cube(kv_cube, "kv_cube")
    if video_shape is None and kv_video_shape is None and kv_cube is not None:
        checks.fail(
            ValueError,
            "kv_cube",
            kv_cube,
            "None without kv_video_shape",
            "pass kv_video_shape, or leave kv_cube out",
        )
    if video_shape is None and cube != (4, 4, 4) and (kv_video_shape is None or kv_cube is not None):
        checks.fail(
            ValueError, "cube", cube, "the default without video_shape", "pass video_shape, or leave cube out"
        )
    if kv_video_shape is not None:
        kv_shape, kv_cube = check_video_shape(kv_video_shape, "kv_video_shape"), kv_cube or cube
    elif video_shape is not None:
        kv_shape, kv_cube = check_video_shape(video_shape), kv_cube or cube
    else:
        kv_shape, kv_cube = (1, 1, num_kv_tokens), _LINEAR_CUBE
    if video_shape is not None:
        return check_video_shape(video_shape), kv_shape, cube, kv_cube
    return (1, 1, num_q_tokens), kv_shape, _LINEAR_CUBE, kv_cube


def _lse_of_tokens(lse: torch.Tensor, shape, cube, padded: bool) -> torch.Tensor:
    """[B, H, N, 64] -> [B, H, S] in raster order; padded queries get -inf, like empty rows."""
    lse = lse.flatten(2).index_select(2, CubeGrid(shape, cube).slot_of_token(lse.device))
    return lse.masked_fill(lse == torch.inf, -torch.inf) if padded else lse
