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


def fine_forward(
    query, key, value, kv_num_blocks, kv_indices, block_sizes, q_block_sizes, coarse, gate_fine, gate_coarse,
    gate_fine_value, gate_coarse_value, q_shape, kv_shape, q_cube, kv_cube, scale,
):  # fmt: skip
    C = _extension.load()
    batch, _, heads, _ = query.shape
    q_grid, kv_grid = _grid(q_shape, q_cube), _grid(kv_shape, kv_cube)
    out = query.new_empty(query.shape)
    gated = gate_fine is not None or gate_fine_value != 1.0
    out_fine = query.new_empty(query.shape if gated else 0)
    lse = query.new_empty((batch, heads, q_grid.num_cubes, 64), dtype=torch.float32)
    # The second of each pair keeps a converted gate alive until the launch is on the stream.
    fine, kept_fine = _gate(gate_fine, gate_fine_value)
    coarse_gate, kept_coarse = _gate(gate_coarse, gate_coarse_value)
    plan = C.plan_fine_forward(
        query=_tokens(query),
        key=_tokens(key),
        value=_tokens(value),
        out=_tokens(out),
        out_fine=_tokens(out_fine if gated else out),
        store_out_fine=gated,
        q_grid=q_grid,
        kv_grid=kv_grid,
        kv_num_blocks=_strided(kv_num_blocks),
        kv_indices=_strided(kv_indices),
        block_sizes=_address(block_sizes),
        q_block_sizes=_address(q_block_sizes),
        lse=lse.data_ptr(),
        coarse=_address(coarse),
        gate_fine=fine,
        gate_coarse=coarse_gate,
        scale=scale,
    )
    _extension.launch(plan, query)
    del kept_fine, kept_coarse
    return out, out_fine, lse
