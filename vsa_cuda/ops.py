"""The operators vsa_cuda::*, with their shapes for tracing. CPU runs the reference, CUDA the kernels.

They are functional and have no autograd formula: gradients come from vsa_cuda.autograd, so a direct call to
torch.ops.vsa_cuda.* is for selective checkpointing policies, tests and inference. Tensors are the BSHD view
[B, S, H, D] with any strides that TMA takes (see checks); results are new and contiguous. LSE and delta are
cube-major [B, H, N, 64] in fp32 (fp64 for fp64 inputs), the "compute dtype" below. Where a result does not
apply it is an empty (0,) tensor.

Without an index (kv_num_blocks, kv_indices and, backward, q_offsets, q_indices: all given or all None) every
query block attends to all key blocks. The order of tokens then does not matter to the fine stage, which may
run on another grid than the coarse one: coarse_shape, coarse_cube are the video of `coarse` and of the pooled
gradients, by default the grids of the fine stage.
"""

from collections.abc import Callable

import torch

from vsa_cuda import reference
from vsa_cuda.checks import BASE_ALIGNMENT, STRIDE_MULTIPLE, check_all_or_none, check_base, check_gpu, fail
from vsa_cuda.geometry import CUBE_VOLUME, CubeGrid, check_cube, check_video_shape, num_cubes

_SCHEMAS = (
    "pool(Tensor query, Tensor key, Tensor value, SymInt[3] video_shape, SymInt[3] cube)"
    " -> (Tensor, Tensor, Tensor)",
    "coarse_forward(Tensor query, Tensor key, Tensor value, SymInt[3] video_shape, SymInt[3] cube,"
    " SymInt topk, float scale, bool with_output, bool with_selection=True)"
    " -> (Tensor query_pooled, Tensor key_pooled, Tensor value_pooled, Tensor out_coarse, Tensor lse_coarse,"
    " Tensor kv_num_blocks, Tensor kv_indices)",
    "coarse_backward(Tensor grad_coarse, Tensor query_pooled, Tensor key_pooled, Tensor value_pooled,"
    " Tensor out_coarse, Tensor lse_coarse, float scale) -> (Tensor, Tensor, Tensor)",
    "fine_forward(Tensor query, Tensor key, Tensor value, Tensor? kv_num_blocks, Tensor? kv_indices,"
    " Tensor? block_sizes, Tensor? q_block_sizes, Tensor? coarse, Tensor? gate_fine, Tensor? gate_coarse,"
    " float gate_fine_value, float gate_coarse_value, SymInt[3] q_shape, SymInt[3] kv_shape,"
    " SymInt[3] q_cube, SymInt[3] kv_cube, float scale, bool with_out_fine,"
    " SymInt[3]? coarse_shape=None, SymInt[3]? coarse_cube=None)"
    " -> (Tensor out, Tensor out_fine, Tensor lse)",
    "combine_backward(Tensor grad_out, Tensor out_fine, Tensor? grad_lse, Tensor? coarse, Tensor? gate_fine,"
    " Tensor? gate_coarse, float gate_fine_value, float gate_coarse_value, Tensor? q_block_sizes,"
    " SymInt[3] q_shape, SymInt[3] q_cube, SymInt[3]? coarse_shape=None, SymInt[3]? coarse_cube=None)"
    " -> (Tensor grad_fine, Tensor delta, Tensor grad_coarse, Tensor grad_gate_fine,"
    " Tensor grad_gate_coarse)",
    "transpose_index(Tensor kv_num_blocks, Tensor kv_indices, SymInt num_kv_blocks)"
    " -> (Tensor q_offsets, Tensor q_indices)",
    "fine_backward(Tensor grad_fine, Tensor query, Tensor key, Tensor value, Tensor lse, Tensor delta,"
    " Tensor? kv_num_blocks, Tensor? kv_indices, Tensor? q_offsets, Tensor? q_indices, Tensor? block_sizes,"
    " Tensor? q_block_sizes, Tensor? dq_pooled, Tensor? dk_pooled, Tensor? dv_pooled, SymInt[3] q_shape,"
    " SymInt[3] kv_shape, SymInt[3] q_cube, SymInt[3] kv_cube, float scale, bool deterministic,"
    " SymInt[3]? coarse_shape=None, SymInt[3]? coarse_cube=None)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
)

_library = torch.library.Library("vsa_cuda", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def has_fine_gate(gate_fine: torch.Tensor | None, gate_fine_value: float) -> bool:
    """False when the fine output enters `out` unscaled: its gradient is then grad_out itself."""
    return gate_fine is not None or gate_fine_value != 1.0


def combines(coarse: torch.Tensor | None, gate_fine: torch.Tensor | None, gate_fine_value: float) -> bool:
    """False when `out` is the fine output itself, which fine_forward then does not return a second time."""
    return coarse is not None or has_fine_gate(gate_fine, gate_fine_value)


# Shapes, for FakeTensor and meta tensors.


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(0)


def _pool_fake(query, key, value, video_shape, cube):
    batch, _, heads, head_dim = query.shape
    shape = (batch, heads, num_cubes(video_shape, cube), head_dim)
    return tuple(x.new_empty(shape) for x in (query, key, value))


def _coarse_lse_shape(rows):
    """Cube-major over the linear grid of the pooled tokens [B, H, N]."""
    return (*rows[:2], num_cubes((1, 1, rows[2]), (1, 1, CUBE_VOLUME)), CUBE_VOLUME)


def _coarse_forward_fake(
    query, key, value, video_shape, cube, topk, scale, with_output, with_selection=True
):  # fmt: skip
    pooled = _pool_fake(query, key, value, video_shape, cube)
    rows = pooled[0].shape[:3]
    out = torch.empty_like(pooled[0]) if with_output else _empty(query)
    lse = query.new_empty(_coarse_lse_shape(rows) if with_output else 0, dtype=_compute_dtype(query))
    counts = query.new_empty(rows if with_selection else 0, dtype=torch.int32)
    indices = query.new_empty((*rows, topk) if with_selection else 0, dtype=torch.int32)
    return *pooled, out, lse, counts, indices


def _coarse_backward_fake(grad_coarse, query_pooled, key_pooled, value_pooled, out_coarse, lse_coarse, scale):
    return tuple(x.new_empty(x.shape) for x in (query_pooled, key_pooled, value_pooled))


def _fine_forward_fake(
    query, key, value, kv_num_blocks, kv_indices, block_sizes, q_block_sizes, coarse, gate_fine, gate_coarse,
    gate_fine_value, gate_coarse_value, q_shape, kv_shape, q_cube, kv_cube, scale, with_out_fine,
    coarse_shape=None, coarse_cube=None,
):  # fmt: skip
    stored = with_out_fine and combines(coarse, gate_fine, gate_fine_value)
    out_fine = query.new_empty(query.shape) if stored else _empty(query)
    lse_shape = (query.shape[0], query.shape[2], num_cubes(q_shape, q_cube), CUBE_VOLUME)
    return query.new_empty(query.shape), out_fine, query.new_empty(lse_shape, dtype=_compute_dtype(query))


def _combine_backward_fake(
    grad_out, out_fine, grad_lse, coarse, gate_fine, gate_coarse, gate_fine_value, gate_coarse_value,
    q_block_sizes, q_shape, q_cube, coarse_shape=None, coarse_cube=None,
):  # fmt: skip
    batch, _, heads, head_dim = out_fine.shape
    blocks, dtype = num_cubes(q_shape, q_cube), _compute_dtype(out_fine)
    cubes = blocks if coarse_shape is None else num_cubes(coarse_shape, coarse_cube)
    grad_fine = out_fine.new_empty(out_fine.shape) if has_fine_gate(gate_fine, gate_fine_value) else None
    grad_coarse = None if coarse is None else out_fine.new_empty((batch, heads, cubes, head_dim))
    return (
        _empty(out_fine) if grad_fine is None else grad_fine,
        out_fine.new_empty((batch, heads, blocks, CUBE_VOLUME), dtype=dtype),
        _empty(out_fine) if grad_coarse is None else grad_coarse,
        _empty(out_fine) if gate_fine is None else gate_fine.new_empty(gate_fine.shape),
        _empty(out_fine) if gate_coarse is None else gate_coarse.new_empty(gate_coarse.shape),
    )


def _transpose_index_fake(kv_num_blocks, kv_indices, num_kv_blocks):
    batch, heads, num_q_blocks, max_blocks = kv_indices.shape
    q_offsets = kv_indices.new_empty((batch, heads, num_kv_blocks + 1))
    return q_offsets, kv_indices.new_empty((batch, heads, num_q_blocks * max_blocks))


def _fine_backward_fake(grad_fine, query, key, value, *_):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


# CPU: the reference.


def _pool_cpu(query, key, value, video_shape, cube):
    grid = CubeGrid(video_shape, cube)
    return tuple(reference.pool(x, grid) for x in (query, key, value))


def _coarse_grid(coarse_shape, coarse_cube, fine_grid: CubeGrid) -> CubeGrid:
    if coarse_shape is None:
        return fine_grid
    grid = CubeGrid(check_video_shape(coarse_shape, "coarse_shape"), check_cube(coarse_cube, "coarse_cube"))
    if grid.num_tokens != fine_grid.num_tokens:
        fail(
            ValueError,
            "coarse_shape",
            f"{grid.num_tokens} tokens in {grid.video_shape}",
            f"the {fine_grid.num_tokens} tokens of the fine stage",
            "pass the shape of the same video",
        )
    return grid


def _coarse_forward_cpu(
    query, key, value, video_shape, cube, topk, scale, with_output, with_selection=True
):  # fmt: skip
    pooled = _pool_cpu(query, key, value, video_shape, cube)
    out, lse, counts, indices = reference.coarse_forward(
        *pooled, topk if with_selection else 0, scale, with_output
    )
    if not with_selection:
        counts, indices = counts.new_empty(0), indices.new_empty(0)
    blocks = lse.new_full(_coarse_lse_shape(lse.shape) if with_output else (0,), torch.inf)
    if with_output:
        blocks.flatten(2)[..., : lse.shape[2]] = lse
    return *pooled, out, blocks, counts, indices


def _coarse_backward_cpu(grad_coarse, query_pooled, key_pooled, value_pooled, out_coarse, lse_coarse, scale):
    lse = lse_coarse.flatten(2)[..., : query_pooled.shape[2]]
    grads = reference.coarse_backward(
        grad_coarse, query_pooled, key_pooled, value_pooled, out_coarse, lse, scale
    )
    return tuple(grad.to(query_pooled.dtype) for grad in grads)


def _fine_forward_cpu(
    query, key, value, kv_num_blocks, kv_indices, block_sizes, q_block_sizes, coarse, gate_fine, gate_coarse,
    gate_fine_value, gate_coarse_value, q_shape, kv_shape, q_cube, kv_cube, scale, with_out_fine,
    coarse_shape=None, coarse_cube=None,
):  # fmt: skip
    q_grid, kv_grid = CubeGrid(q_shape, q_cube), CubeGrid(kv_shape, kv_cube)
    out_fine, lse = reference.fine_forward(
        query, key, value, kv_num_blocks, kv_indices, q_grid, kv_grid, scale, block_sizes, q_block_sizes
    )
    if not combines(coarse, gate_fine, gate_fine_value):
        return out_fine, _empty(query), lse
    fine_gate = gate_fine_value if gate_fine is None else gate_fine
    coarse_gate = gate_coarse_value if gate_coarse is None else gate_coarse
    coarse_grid = _coarse_grid(coarse_shape, coarse_cube, q_grid)
    out = reference.combine(out_fine, coarse, coarse_grid, fine_gate, coarse_gate)
    return out, out_fine if with_out_fine else _empty(query), lse


def _combine_backward_cpu(
    grad_out, out_fine, grad_lse, coarse, gate_fine, gate_coarse, gate_fine_value, gate_coarse_value,
    q_block_sizes, q_shape, q_cube, coarse_shape=None, coarse_cube=None,
):  # fmt: skip
    grid = CubeGrid(q_shape, q_cube)
    coarse_gate = gate_coarse_value if gate_coarse is None else gate_coarse
    fine_gate = gate_fine_value if gate_fine is None else gate_fine
    grad_fine, delta, *others = reference.combine_backward(
        grad_out, out_fine, grad_lse, coarse, grid, fine_gate, coarse_gate, q_block_sizes,
        _coarse_grid(coarse_shape, coarse_cube, grid),
    )  # fmt: skip
    grad_coarse, *gate_grads = (_empty(grad_out) if x is None else x for x in others)
    grad_fine = grad_fine if has_fine_gate(gate_fine, gate_fine_value) else _empty(grad_out)
    return grad_fine, delta, grad_coarse.to(out_fine.dtype), *gate_grads


def _fine_backward_cpu(
    grad_fine, query, key, value, lse, delta, kv_num_blocks, kv_indices, q_offsets, q_indices, block_sizes,
    q_block_sizes, dq_pooled, dk_pooled, dv_pooled, q_shape, kv_shape, q_cube, kv_cube, scale, deterministic,
    coarse_shape=None, coarse_cube=None,
):  # fmt: skip
    grids = CubeGrid(q_shape, q_cube), CubeGrid(kv_shape, kv_cube)
    pooled_grids = tuple(_coarse_grid(coarse_shape, coarse_cube, grid) for grid in grids)
    return reference.fine_backward(
        grad_fine, query, key, value, lse, delta, kv_num_blocks, kv_indices, *grids, scale, block_sizes,
        q_block_sizes, dq_pooled, dk_pooled, dv_pooled, pooled_grids,
    )  # fmt: skip


def _on_cpu(compute: Callable) -> Callable:
    def run(*args):
        # Autocast reaches into an op's implementation: the reference chooses its precision itself.
        with torch.autocast("cpu", enabled=False):
            return compute(*args)

    return run


def _on_cuda(name: str) -> Callable:
    def run(*args):
        from vsa_cuda import _kernels

        check_gpu(args[0].device.index)
        return getattr(_kernels, name)(*args)

    return run


def _with_aligned_inputs(run: Callable) -> Callable:
    """The address of query, key and value: known only here, not while tracing."""

    def checked(query, key, value, *args):
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_base(name, x)
        return run(query, key, value, *args)

    return checked


# Optional arguments that mean something together only.
_TOGETHER = (("kv_num_blocks", "kv_indices", "q_offsets", "q_indices"), ("coarse_shape", "coarse_cube"))


def _with_whole_groups(run: Callable, name: str) -> Callable:
    positions = {x.name: i for i, x in enumerate(getattr(torch.ops.vsa_cuda, name).default._schema.arguments)}
    groups = [{x: positions[x] for x in group if x in positions} for group in _TOGETHER]

    def checked(*args):
        for group in groups:
            # Trailing arguments that are None are left out of the call.
            check_all_or_none({x: args[i] if i < len(args) else None for x, i in group.items()})
        return run(*args)

    return checked


def _with_tma_gradient(run: Callable) -> Callable:
    """Autograd hands over gradients with any strides (0 from out.sum()): a copy where TMA cannot read one."""

    def copied(grad, *args):
        strides = (grad.stride(dim) % STRIDE_MULTIPLE == 0 for dim in range(3) if grad.shape[dim] > 1)
        if grad.stride(3) != 1 or grad.data_ptr() % BASE_ALIGNMENT != 0 or not all(strides):
            grad = grad.clone(memory_format=torch.contiguous_format)
        return run(grad, *args)

    return copied


def _register(name: str, fake: Callable, cpu: Callable, wrap: Callable | None = None) -> Callable:
    cuda, cpu = _on_cuda(name), _on_cpu(cpu)
    if wrap is not None:
        cuda, cpu = wrap(cuda), wrap(cpu)
    cuda, cpu = _with_whole_groups(cuda, name), _with_whole_groups(cpu, name)
    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"vsa_cuda::{name}", fake, lib=_library)
    return getattr(torch.ops.vsa_cuda, name).default


pool = _register("pool", _pool_fake, _pool_cpu, _with_aligned_inputs)
coarse_forward = _register("coarse_forward", _coarse_forward_fake, _coarse_forward_cpu, _with_aligned_inputs)
coarse_backward = _register("coarse_backward", _coarse_backward_fake, _coarse_backward_cpu)
fine_forward = _register("fine_forward", _fine_forward_fake, _fine_forward_cpu, _with_aligned_inputs)
combine_backward = _register(
    "combine_backward", _combine_backward_fake, _combine_backward_cpu, _with_tma_gradient
)
transpose_index = _register("transpose_index", _transpose_index_fake, reference.transpose_index)
fine_backward = _register("fine_backward", _fine_backward_fake, _fine_backward_cpu, _with_tma_gradient)
