"""The ops on a Hopper GPU: outputs from torch's allocator, one plan and one launch a kernel.

Functions have the signatures of the ops in `ops.py`; tensors are [batch, tokens, heads, head_dim] views.
"""

from __future__ import annotations

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


def _strided(tensor: torch.Tensor | None):
    if tensor is None:
        return _extension.load().StridedTensor(address=0, strides=[])
    return _extension.load().StridedTensor(address=tensor.data_ptr(), strides=list(tensor.stride()))


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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
    )
    _extension.launch(plan, query)
    return pooled


def _attend(
    query, key, value, out, lse, q_grid, kv_grid, scale, kv_num_blocks=None, kv_indices=None, block_sizes=None,
    q_block_sizes=None, out_fine=None, coarse=None, gate_fine=(None, 1.0), gate_coarse=(None, 0.0),
):  # fmt: skip
    """One launch of the fine forward kernel. Without kv_indices every query block attends to all key blocks."""
    C = _extension.load()
    # The second of each pair keeps a converted gate alive until the launch is on the stream.
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
        kv_num_blocks=_strided(kv_num_blocks),
        kv_indices=_strided(kv_indices),
        block_sizes=_address(block_sizes),
        q_block_sizes=_address(q_block_sizes),
        lse=lse.data_ptr(),
        coarse=_address(coarse),
        gate_fine=fine,
        gate_coarse=combined,
        scale=scale,
    )
    _extension.launch(plan, query)


def _new_lse(query, q_grid):
    return query.new_empty((query.shape[0], query.shape[2], q_grid.num_cubes, 64), dtype=torch.float32)


def fine_forward(
    query, key, value, kv_num_blocks, kv_indices, block_sizes, q_block_sizes, coarse, gate_fine, gate_coarse,
    gate_fine_value, gate_coarse_value, q_shape, kv_shape, q_cube, kv_cube, scale,
):  # fmt: skip
    q_grid, kv_grid = _grid(q_shape, q_cube), _grid(kv_shape, kv_cube)
    out, lse = query.new_empty(query.shape), _new_lse(query, q_grid)
    gated = gate_fine is not None or gate_fine_value != 1.0
    out_fine = query.new_empty(query.shape) if gated else None
    _attend(
        query, key, value, out, lse, q_grid, kv_grid, scale, kv_num_blocks, kv_indices, block_sizes, q_block_sizes,
        out_fine, coarse, (gate_fine, gate_fine_value), (gate_coarse, gate_coarse_value),
    )  # fmt: skip
    return out, out_fine if gated else query.new_empty(0), lse


def _linear_grid(num_tokens):
    return _grid((1, 1, num_tokens), (1, 1, 64))


def coarse_forward(query, key, value, video_shape, cube, topk, scale, with_output):
    pooled = pool(query, key, value, video_shape, cube)
    query_pooled, key_pooled, value_pooled = (x.transpose(1, 2) for x in pooled)
    # The coarse output is dense attention over the pooled tokens.
    grid = _linear_grid(pooled[0].shape[2])
    lse = _new_lse(query_pooled, grid)
    out = pooled[0].new_empty(pooled[0].shape if with_output else 0)
    if with_output:
        _attend(query_pooled, key_pooled, value_pooled, out.transpose(1, 2), lse, grid, grid, scale)
    return *pooled, out, lse, *select(pooled[0], pooled[1], topk, scale)
