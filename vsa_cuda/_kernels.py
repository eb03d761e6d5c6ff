"""The ops on a Hopper GPU: outputs from torch's allocator, one plan and one launch a kernel.

Functions have the signatures of the ops in `ops.py`; tensors are [batch, tokens, heads, head_dim] views.
"""

from __future__ import annotations

import functools

import torch

from . import _extension


def _tokens(tensor: torch.Tensor):
    return _extension.load().TokenTensor(
        address=tensor.data_ptr(),
        shape=tuple(tensor.shape),
        strides=tuple(tensor.stride()),
        dtype=str(tensor.dtype).removeprefix("torch."),
    )


def _grid(video_shape, cube):
    return _extension.load().CubeGrid(video_shape=tuple(video_shape), cube=tuple(cube))


def _coarse_grid(coarse_shape, coarse_cube, fine_grid):
    return fine_grid if coarse_shape is None else _grid(coarse_shape, coarse_cube)


def _strided(tensor: torch.Tensor | None):
    if tensor is None:
        return _extension.load().StridedTensor(address=0, strides=[])
    return _extension.load().StridedTensor(address=tensor.data_ptr(), strides=list(tensor.stride()))


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _packed(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _gate(gate: torch.Tensor | None, value: float):
    """A gate for a kernel; a 0-d tensor stays on the device, as fp32."""
    if gate is None:
        return _extension.load().Gate(values=_strided(None), scalar=0, factor=value), None
    if gate.dim() == 0:
        scalar = gate.to(torch.float32)
        return _extension.load().Gate(values=_strided(None), scalar=scalar.data_ptr(), factor=1.0), scalar
    return _extension.load().Gate(values=_strided(gate), scalar=0, factor=1.0), gate


def pool(query, key, value, video_shape, cube):
    C = _extension.load()
    batch, _, heads, head_dim = query.shape
    grid = _grid(video_shape, cube)
    pooled = tuple(query.new_empty((batch, heads, grid.num_cubes, head_dim)) for _ in range(3))
    plan = C.plan_pool(
        inputs=[_tokens(query), _tokens(key), _tokens(value)],
        grid=grid,
        outputs=[x.data_ptr() for x in pooled],
        num_sms=_extension.num_sms(query.device),
    )
    _extension.launch(plan, query)
    return pooled


def _schedule(kernel, like, grid, listed_grid, block_sizes, lists=(None, None), compressed=(None, None)):
    """The stages in which a fine kernel works through its lists: a _C.Schedule and the tensors it lies in.

    The blocks of `grid` have lists of blocks of `listed_grid`, as counts [B, H, N], entries [B, H, N, max] or
    compressed as transpose_index gives them; with neither, all blocks.
    """
    C = _extension.load()
    counts, entries = lists
    offsets, compressed_entries = compressed
    if entries is None and offsets is None:
        return C.Schedule(), ()
    arguments = C.ScheduleArguments(
        kernel=kernel,
        batch=like.shape[0],
        heads=like.shape[2],
        head_dim=like.shape[3],
        grid=grid,
        listed_grid=listed_grid,
        block_sizes=_address(block_sizes),
        counts=_strided(counts),
        entries=_strided(entries),
        max_blocks=0 if entries is None else entries.shape[3],
        offsets=_address(offsets),
        compressed_entries=_address(compressed_entries),
        entries_per_head=0 if offsets is None else compressed_entries.shape[2],
        num_sms=_extension.num_sms(like.device),
    )
    stages = like.new_empty((arguments.num_stages, 2), dtype=torch.int32)
    # Behind the stages of each task and a counter, both written, early tasks are counted from 0.
    new_counts = like.new_zeros if arguments.num_counts > arguments.num_tasks + 1 else like.new_empty
    stage_counts = new_counts(arguments.num_counts, dtype=torch.int32)
    thin = like.new_empty((arguments.num_thin, 6), dtype=torch.int32)
    arguments.stages, arguments.stage_counts = stages.data_ptr(), stage_counts.data_ptr()
    arguments.thin = thin.data_ptr()
    _extension.launch(C.plan_schedule(arguments), like)
    return arguments.schedule, (stages, stage_counts, thin)


def _attend(
    query, key, value, out, lse, q_grid, kv_grid, scale, lists=(None, None), block_sizes=None,
    q_block_sizes=None, out_fine=None, coarse=None, gate_fine=(None, 1.0), gate_coarse=(None, 0.0),
    coarse_grid=None,
):  # fmt: skip
    """The fine forward kernel. Without lists every query block attends to all keys."""
    C = _extension.load()
    schedule, _kept_schedule = _schedule("fine_forward", query, q_grid, kv_grid, block_sizes, lists)
    # The second of each pair keeps tensors alive until the launch is on the stream.
    fine, _kept_fine = _gate(*gate_fine)
    combined, _kept_coarse = _gate(*gate_coarse)
    plan = C.plan_fine_forward(
        query=_tokens(query),
        key=_tokens(key),
        value=_tokens(value),
        out=_tokens(out),
        out_fine=_tokens(out if out_fine is None else out_fine),
        store_out_fine=out_fine is not None,
        q_grid=q_grid,
        kv_grid=kv_grid,
        coarse_grid=q_grid if coarse_grid is None else coarse_grid,
        schedule=schedule,
        block_sizes=_address(block_sizes),
        q_block_sizes=_address(q_block_sizes),
        lse=lse.data_ptr(),
        coarse=_address(coarse),
        gate_fine=fine,
        gate_coarse=combined,
        scale=scale,
        num_sms=_extension.num_sms(query.device),
    )
    _extension.launch(plan, query)


def _new_lse(query, q_grid):
    return query.new_empty((query.shape[0], query.shape[2], q_grid.num_cubes, 64), dtype=torch.float32)


def fine_forward(
    query, key, value, kv_num_blocks, kv_indices, block_sizes, q_block_sizes, coarse, gate_fine, gate_coarse,
    gate_fine_value, gate_coarse_value, q_shape, kv_shape, q_cube, kv_cube, scale, with_out_fine,
    coarse_shape=None, coarse_cube=None,
):  # fmt: skip
    q_grid, kv_grid = _grid(q_shape, q_cube), _grid(kv_shape, kv_cube)
    out, lse = query.new_empty(query.shape), _new_lse(query, q_grid)
    combined = coarse is not None or gate_fine is not None or gate_fine_value != 1.0
    out_fine = query.new_empty(query.shape) if combined and with_out_fine else None
    _attend(
        query, key, value, out, lse, q_grid, kv_grid, scale, (kv_num_blocks, kv_indices), block_sizes,
        q_block_sizes, out_fine, coarse, (gate_fine, gate_fine_value), (gate_coarse, gate_coarse_value),
        _coarse_grid(coarse_shape, coarse_cube, q_grid),
    )  # fmt: skip
    return out, query.new_empty(0) if out_fine is None else out_fine, lse


def _linear_grid(num_tokens):
    return _grid((1, 1, num_tokens), (1, 1, 64))


def select(query_pooled, key_pooled, topk, scale, planner="plan_select"):
    """The `topk` key cubes with the largest scores of each query cube; pooled tensors are [B, H, N, D].

    Args:
        planner: plan_select chooses the kernel by N; plan_select_large and plan_select_small are its choices.

    Returns:
        kv_num_blocks: int32 [B, H, N], all topk.
        kv_indices: int32 [B, H, N, topk], ascending; equal scores go to the lower index, NaN is the largest.
    """
    C = _extension.load()
    rows = query_pooled.shape[:3]
    counts = query_pooled.new_empty(rows, dtype=torch.int32)
    indices = query_pooled.new_empty((*rows, topk), dtype=torch.int32)
    plan = getattr(C, planner)(
        query=_tokens(query_pooled.transpose(1, 2)),
        key=_tokens(key_pooled.transpose(1, 2)),
        topk=topk,
        scale=scale,
        counts=counts.data_ptr(),
        indices=indices.data_ptr(),
    )
    _extension.launch(plan, query_pooled)
    return counts, indices


def coarse_forward(query, key, value, video_shape, cube, topk, scale, with_output, with_selection=True):
    pooled = pool(query, key, value, video_shape, cube)
    query_pooled, key_pooled, value_pooled = (x.transpose(1, 2) for x in pooled)
    # The coarse output is dense attention over the pooled tokens.
    grid = _linear_grid(pooled[0].shape[2])
    if with_output:
        lse = _new_lse(query_pooled, grid)
        out = pooled[0].new_empty(pooled[0].shape)
        _attend(query_pooled, key_pooled, value_pooled, out.transpose(1, 2), lse, grid, grid, scale)
    else:
        out, lse = pooled[0].new_empty(0), pooled[0].new_empty(0, dtype=torch.float32)
    if not with_selection:
        return *pooled, out, lse, *(query.new_empty(0, dtype=torch.int32) for _ in range(2))
    return *pooled, out, lse, *select(pooled[0], pooled[1], topk, scale)


def combine_backward(
    grad_out, out_fine, grad_lse, coarse, gate_fine, gate_coarse, gate_fine_value, gate_coarse_value,
    q_block_sizes, q_shape, q_cube, coarse_shape=None, coarse_cube=None,
):  # fmt: skip
    C = _extension.load()
    batch, _, heads, head_dim = out_fine.shape
    coarse = _packed(coarse)
    q_grid = _grid(q_shape, q_cube)
    coarse_grid = q_grid if coarse is None else _coarse_grid(coarse_shape, coarse_cube, q_grid)
    cubes = (batch, heads, coarse_grid.num_cubes)
    gated = gate_fine is not None or gate_fine_value != 1.0
    if not gated and coarse is None:
        absent = [out_fine.new_empty(0) for _ in range(4)]
        return absent[0], _delta(grad_out, out_fine, grad_lse, q_block_sizes, q_grid), *absent[1:]
    grad_fine = out_fine.new_empty(out_fine.shape if gated else 0)
    delta = out_fine.new_empty((batch, heads, q_grid.num_cubes, 64), dtype=torch.float32)
    grad_coarse = out_fine.new_empty(0 if coarse is None else (*cubes, head_dim))
    fine, _kept_fine = _gate(gate_fine, gate_fine_value)
    combined, _kept_coarse = _gate(gate_coarse, gate_coarse_value)
    gate_coarse = None if coarse is None else gate_coarse
    grad_gate_fine, scalar_fine = _new_gate_gradient(out_fine, gate_fine, cubes)
    grad_gate_coarse, scalar_coarse = _new_gate_gradient(out_fine, gate_coarse, cubes)
    plan = C.plan_combine_backward(
        grad_out=_tokens(grad_out),
        out_fine=_tokens(out_fine),
        q_grid=q_grid,
        coarse_grid=coarse_grid,
        block_sizes=_address(q_block_sizes),
        grad_lse=_strided(grad_lse),
        coarse=_address(coarse),
        gate_fine=fine,
        gate_coarse=combined,
        grad_fine=grad_fine.data_ptr(),
        delta=delta.data_ptr(),
        grad_coarse=grad_coarse.data_ptr(),
        grad_gate_fine=_address(grad_gate_fine),
        grad_gate_coarse=_address(grad_gate_coarse),
        scalar_fine=_address(scalar_fine),
        scalar_coarse=_address(scalar_coarse),
    )
    _extension.launch(plan, out_fine)
    gate_gradients = (
        _gate_gradient(out_fine, gate_fine, grad_gate_fine, scalar_fine),
        _gate_gradient(out_fine, gate_coarse, grad_gate_coarse, scalar_coarse),
    )
    return grad_fine, delta, grad_coarse, *gate_gradients


def _delta(grad_out, out, grad_lse, block_sizes, grid):
    C = _extension.load()
    batch, _, heads, _ = out.shape
    delta = out.new_empty((batch, heads, grid.num_cubes, 64), dtype=torch.float32)
    plan = C.plan_delta(
        grad_out=_tokens(grad_out),
        out=_tokens(out),
        grid=grid,
        block_sizes=_address(block_sizes),
        grad_lse=_strided(grad_lse),
        delta=delta.data_ptr(),
        num_sms=_extension.num_sms(out.device),
    )
    _extension.launch(plan, out)
    return delta


def _new_gate_gradient(out_fine, gate, cubes):
    """What the kernel writes: the gradient of a tensor gate, or of a 0-d one a partial sum for each cube."""
    if gate is None:
        return None, None
    if gate.dim() == 0:
        return None, out_fine.new_empty(cubes, dtype=torch.float32)
    return out_fine.new_empty(out_fine.shape), None


def _gate_gradient(out_fine, gate, gradient, partial_sums):
    if partial_sums is not None:
        return partial_sums.sum().to(gate.dtype)
    return out_fine.new_empty(0) if gradient is None else gradient


def transpose_index(kv_num_blocks, kv_indices, num_kv_blocks):
    C = _extension.load()
    batch, heads, num_q_blocks, max_blocks = kv_indices.shape
    q_offsets = kv_indices.new_empty((batch, heads, num_kv_blocks + 1))
    q_indices = kv_indices.new_empty((batch, heads, num_q_blocks * max_blocks))
    plan = C.plan_transpose_index(
        shape=tuple(kv_indices.shape),
        kv_num_blocks=_strided(kv_num_blocks),
        kv_indices=_strided(kv_indices),
        num_kv_blocks=num_kv_blocks,
        q_offsets=q_offsets.data_ptr(),
        q_indices=q_indices.data_ptr(),
    )
    _extension.launch(plan, kv_indices)
    return q_offsets, q_indices


def fine_backward(
    grad_fine, query, key, value, lse, delta, kv_num_blocks, kv_indices, q_offsets, q_indices, block_sizes,
    q_block_sizes, dq_pooled, dk_pooled, dv_pooled, q_shape, kv_shape, q_cube, kv_cube, scale, deterministic,
    coarse_shape=None, coarse_cube=None,
):  # fmt: skip
    """One pass that sums dQ in fp32; if `deterministic`, two passes without sums that several CTAs make."""
    gradients = tuple(query.new_empty(x.shape) for x in (query, key, value))
    grids = _grid(q_shape, q_cube), _grid(kv_shape, kv_cube)
    _differentiate(
        grad_fine, query, key, value, lse, delta, gradients, *grids, scale, (kv_num_blocks, kv_indices),
        (q_offsets, q_indices), (block_sizes, q_block_sizes), (dq_pooled, dk_pooled, dv_pooled),
        [_coarse_grid(coarse_shape, coarse_cube, grid) for grid in grids], deterministic,
    )  # fmt: skip
    return gradients


def _differentiate(
    grad_fine, query, key, value, lse, delta, gradients, q_grid, kv_grid, scale, lists=(None, None),
    transposed=(None, None), sizes=(None, None), pooled=(None, None, None), pooled_grids=None,
    deterministic=True,
):  # fmt: skip
    """dQ, dK and dV into `gradients` (q, k, v). Without lists all pairs of blocks."""
    C = _extension.load()
    # Named, so that a packed copy and a schedule live until both launches are on the stream.
    lse, delta, *kept = (_packed(x) for x in (lse, delta, *transposed, *pooled))
    q_offsets, q_indices, dq_pooled, dk_pooled, dv_pooled = kept
    ways = _ways(query.shape[3], q_grid, kv_grid, lists[1], sizes[0], deterministic)
    two_passes, fused = TWO_PASSES in ways, FUSED in ways
    key_pass = "fine_backward_kv" if two_passes else "fine_backward_fused"
    kv_schedule, _kept_kv = _schedule(
        key_pass, query, kv_grid, q_grid, sizes[1], compressed=(q_offsets, q_indices)
    )
    q_schedule, _kept_q, grad_query_sums = C.Schedule(), (), None
    if two_passes:
        q_schedule, _kept_q = _schedule("fine_backward_q", query, q_grid, kv_grid, sizes[0], lists)
    if fused:
        grad_query_sums = lse.new_empty((*lse.shape, query.shape[3]))
    # A block more than there are, for rows that count for nothing.
    row_terms = lse.new_empty((lse[..., 0].numel() + 1, 64, 8), dtype=torch.bfloat16)
    pooled_q_grid, pooled_kv_grid = pooled_grids or (q_grid, kv_grid)
    arguments_with = functools.partial(
        C.FineBackwardArguments,
        query=_tokens(query),
        key=_tokens(key),
        value=_tokens(value),
        grad_out=_tokens(grad_fine),
        grad_query=_tokens(gradients[0]),
        grad_key=_tokens(gradients[1]),
        grad_value=_tokens(gradients[2]),
        q_grid=q_grid,
        kv_grid=kv_grid,
        kv_schedule=kv_schedule,
        block_sizes=_address(sizes[0]),
        q_block_sizes=_address(sizes[1]),
        lse=_address(lse),
        delta=_address(delta),
        row_terms=row_terms.data_ptr(),
        grad_query_sums=_address(grad_query_sums),
        # Where lists are shorter than all blocks, neighbours share few stages.
        adds_directly=lists[1] is not None and lists[1].shape[3] < kv_grid.num_cubes,
        dq_pooled=_address(dq_pooled),
        dk_pooled=_address(dk_pooled),
        dv_pooled=_address(dv_pooled),
        pooled_q_grid=pooled_q_grid,
        pooled_kv_grid=pooled_kv_grid,
        scale=scale,
        num_sms=_extension.num_sms(query.device),
    )
    look = _address(q_offsets) if len(ways) > 1 else 0
    listed = arguments_with(q_schedule=q_schedule, choose_by=look)
    plans = []
    if two_passes:
        plans.append(C.plan_fine_backward_q(listed))
        if DENSE_QUERY_PASS in ways:
            plans.append(C.plan_fine_backward_q(arguments_with(q_schedule=C.Schedule(), choose_by=look)))
        # Either query pass is followed by this key pass; only the fused pass would take its place.
        key_arguments = listed if fused else arguments_with(q_schedule=q_schedule, choose_by=0)
        plans.append(C.plan_fine_backward_kv(key_arguments))
    if fused:
        plans += [
            C.plan_start_grad_query(listed),
            C.plan_fine_backward_fused(listed),
            C.plan_finish_grad_query(listed),
        ]
    for plan in plans:
        _extension.launch(plan, query)


# Of one head's queries, output gradients and sums of dQ: what L2 holds of them while key blocks from all over
# the video ask for them (bench/NOTES.md). With every pair of blocks all keys go through them side by side.
_FUSED_LISTED_BYTES = 24 << 20


TWO_PASSES, DENSE_QUERY_PASS, FUSED = "two passes", "query pass over all blocks", "fused pass"


def _ways(head_dim, q_grid, kv_grid, kv_indices, block_sizes, deterministic):
    """The fastest way to the gradients; of two the device takes the second if the lists name every block.

    DENSE_QUERY_PASS stands for TWO_PASSES with another query pass.
    """
    if kv_indices is None:
        return (TWO_PASSES,) if deterministic else (FUSED,)
    if not deterministic and head_dim == 64:
        if q_grid.num_cubes * 64 * head_dim * (2 + 2 + 4) <= _FUSED_LISTED_BYTES:
            return (FUSED,)
    # An index with room for every block may hold every block.
    pairs = q_grid.num_cubes * kv_grid.num_cubes
    if kv_indices.shape[3] < kv_grid.num_cubes or pairs >= 2**31:
        return (TWO_PASSES,)
    if not deterministic:
        return TWO_PASSES, FUSED
    # CTAs do not pair at head_dim 128, nor with block_sizes.
    return (TWO_PASSES, DENSE_QUERY_PASS) if head_dim == 64 and block_sizes is None else (TWO_PASSES,)


def coarse_backward(grad_coarse, query_pooled, key_pooled, value_pooled, out_coarse, lse_coarse, scale):
    """The backward of dense attention over the pooled tokens, as coarse_forward computes it."""
    shape, cube = (1, 1, query_pooled.shape[2]), (1, 1, 64)
    grad, query, key, value, out = (
        x.transpose(1, 2) for x in (grad_coarse, query_pooled, key_pooled, value_pooled, out_coarse)
    )
    _, delta, *_ = combine_backward(grad, out, None, None, None, None, 1.0, 0.0, None, shape, cube)
    gradients = tuple(query_pooled.new_empty(query_pooled.shape) for _ in range(3))
    views = tuple(x.transpose(1, 2) for x in gradients)
    grid = _grid(shape, cube)
    _differentiate(grad, query, key, value, lse_coarse, delta, views, grid, grid, scale)
    return gradients
