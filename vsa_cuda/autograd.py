"""Autograd of the two public functions, above the ops. First derivatives, reverse mode.

Saved for the backward: query, key, value, the index, the LSEs, the pooled tensors (1/64 of the inputs), the
gate tensors, and O_f, which delta = rowsum(dO_f * O_f) and the gradient of the fine gate need. Where nothing
is combined O_f is `out`, which the following projection saves anyway. Otherwise it is one more tensor of the
size of query: `out` - G_c * O_c[cube] would do without, but carries the rounding of `out`. With V of mean 1
and deviation 1 in bfloat16 that takes the error of dQ and dK to 2.2 times at G_c = 1 and 4.5 times at G_c =
4, beyond the tolerance.
"""

import inspect

import torch

from vsa_cuda import ops
from vsa_cuda.geometry import CUBE_VOLUME

_VMAP_ERROR = (
    "got a call under torch.func.vmap, expected plain tensors; "
    "fold the mapped dimension into the batch dimension of query, key and value"
)
_SECOND_ORDER_ERROR = (
    "vsa_cuda: got a derivative of a gradient (double backward), expected first derivatives only; "
    "differentiate once, without create_graph=True, or use scaled_dot_product_attention here"
)


def _with_signature(function):
    """Keeps the signature: Function.apply asks for it in every call, and inspect makes it anew each time."""
    function.__signature__ = inspect.signature(function)
    return function


class _FirstOrder(torch.autograd.Function):
    """Passes gradients through; differentiating them raises."""

    @staticmethod
    def forward(count, *tensors):
        return tuple(grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(_SECOND_ORDER_ERROR)


def _first_order(grads: tuple, sources: tuple) -> tuple:
    """`grads`, differentiable only in name when create_graph=True: see _FirstOrder."""
    if not torch.is_grad_enabled():
        return grads
    present = [grad for grad in grads if grad is not None]
    tensors = (x for x in sources if x is not None and x.is_floating_point())
    marked = iter(_FirstOrder.apply(len(present), *present, *tensors))
    return tuple(None if grad is None else next(marked) for grad in grads)


class VideoSparse(torch.autograd.Function):
    """query, key, value [B, S, H, D], gates (tensors or None) and constants -> out, index, intermediates.

    topk None: all cubes. The fine stage is dense then, whatever the order of tokens: it runs on blocks of 64
    consecutive ones, of which one at most is partial, and without an index (empty in the results).
    """

    @staticmethod
    @_with_signature
    def forward(
        query, key, value, gate_fine, gate_coarse, gate_fine_value, gate_coarse_value, with_coarse,
        video_shape, cube, topk, scale, deterministic, differentiable,
    ):  # fmt: skip
        dense = topk is None
        if dense and not with_coarse:
            *coarse, kv_num_blocks, kv_indices = (query.new_empty(0) for _ in range(7))
        else:
            *coarse, kv_num_blocks, kv_indices = ops.coarse_forward(
                query, key, value, video_shape, cube, 0 if dense else topk, scale, with_coarse, not dense
            )
        index = (None, None) if dense else (kv_num_blocks, kv_indices)
        shape, block, coarse_grid = _grids(query, video_shape, cube, dense)
        out, out_fine, lse = ops.fine_forward(
            query, key, value, *index, None, None, coarse[3] if with_coarse else None, gate_fine, gate_coarse,
            gate_fine_value, gate_coarse_value, shape, shape, block, block, scale, differentiable,
            *coarse_grid,
        )  # fmt: skip
        return out, kv_num_blocks, kv_indices, out_fine, lse, *coarse

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, gate_fine, gate_coarse, *constants = inputs
        gate_fine_value, _, with_coarse, *_ = constants
        out, kv_num_blocks, kv_indices, out_fine, lse, *coarse = output
        ctx.constants = constants
        ctx.mark_non_differentiable(kv_num_blocks, kv_indices, out_fine, lse, *coarse)
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        if not (with_coarse or ops.has_fine_gate(gate_fine, gate_fine_value)):
            out_fine = out
        ctx.save_for_backward(
            query, key, value, gate_fine, gate_coarse, out_fine, lse, kv_num_blocks, kv_indices, *coarse
        )

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * 14
        saved = ctx.saved_tensors
        with torch.no_grad():
            grads = _video_sparse_backward(grad_out, saved, ctx.constants, ctx.needs_input_grad)
        return *_first_order(grads, (grad_out, *saved)), *(None,) * 9

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(f"video_sparse_attention: {_VMAP_ERROR}")


def _grids(query, video_shape, cube, dense):
    """Shape and block of the fine stage, and the ops' arguments for a coarse stage on another grid."""
    if dense:
        return (1, 1, query.shape[1]), (1, 1, CUBE_VOLUME), (video_shape, cube)
    return video_shape, cube, ()


def _video_sparse_backward(grad_out, saved, constants, needs_input_grad):
    query, key, value, gate_fine, gate_coarse, out_fine, lse, kv_num_blocks, kv_indices, *coarse = saved
    query_pooled, key_pooled, value_pooled, out_coarse, lse_coarse = coarse
    gate_fine_value, gate_coarse_value, with_coarse, video_shape, cube, topk, *constants = constants
    scale, deterministic, _ = constants
    dense = topk is None
    shape, block, coarse_grid = _grids(query, video_shape, cube, dense)
    grad_fine, delta, grad_coarse, grad_gate_fine, grad_gate_coarse = ops.combine_backward(
        grad_out, out_fine, None, out_coarse if with_coarse else None, gate_fine, gate_coarse,
        gate_fine_value, gate_coarse_value, None, shape, block, *coarse_grid,
    )  # fmt: skip
    gate_grads = (
        None if gate_fine is None else grad_gate_fine,
        None if gate_coarse is None else grad_gate_coarse,
    )
    if not any(needs_input_grad[:3]):
        return None, None, None, *gate_grads
    pooled_grads = (None, None, None)
    if with_coarse:
        pooled_grads = ops.coarse_backward(
            grad_coarse, query_pooled, key_pooled, value_pooled, out_coarse, lse_coarse, scale
        )
    if not ops.has_fine_gate(gate_fine, gate_fine_value):
        grad_fine = grad_out
    index = (None,) * 4
    if not dense:
        transposed = ops.transpose_index(kv_num_blocks, kv_indices, kv_num_blocks.shape[2])
        index = (kv_num_blocks, kv_indices, *transposed)
    dq, dk, dv = ops.fine_backward(
        grad_fine, query, key, value, lse, delta, *index, None, None, *pooled_grads, shape, shape, block,
        block, scale, deterministic, *coarse_grid,
    )  # fmt: skip
    return dq, dk, dv, *gate_grads


class BlockSparse(torch.autograd.Function):
    """query [B, Sq, H, D], key, value [B, Skv, H, D], the index and constants -> out, lse [B, H, Nq, 64]."""

    @staticmethod
    @_with_signature
    def forward(
        query, key, value, kv_num_blocks, kv_indices, block_sizes, q_block_sizes, q_shape, kv_shape, q_cube,
        kv_cube, num_kv_blocks, scale, with_lse, deterministic,
    ):  # fmt: skip
        out, _, lse = ops.fine_forward(
            query, key, value, kv_num_blocks, kv_indices, block_sizes, q_block_sizes, None, None, None,
            1.0, 0.0, q_shape, kv_shape, q_cube, kv_cube, scale, False,
        )  # fmt: skip
        return out, lse

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.constants = inputs[7:]
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:7], *output)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        if grad_out is None and grad_lse is None:
            return (None,) * 15
        saved = ctx.saved_tensors
        with torch.no_grad():
            grads = _block_sparse_backward(grad_out, grad_lse, saved, ctx.constants)
        return *_first_order(grads, (grad_out, grad_lse, *saved)), *(None,) * 12

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(f"block_sparse_attention: {_VMAP_ERROR}")


def _block_sparse_backward(grad_out, grad_lse, saved, constants):
    query, key, value, kv_num_blocks, kv_indices, block_sizes, q_block_sizes, out, lse = saved
    q_shape, kv_shape, q_cube, kv_cube, num_kv_blocks, scale, with_lse, deterministic = constants
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if not with_lse:
        grad_lse = None  # zeros under torch.compile, which materialises gradients
    _, delta, *_ = ops.combine_backward(
        grad_out, out, grad_lse, None, None, None, 1.0, 0.0, q_block_sizes, q_shape, q_cube
    )
    q_offsets, q_indices = ops.transpose_index(kv_num_blocks, kv_indices, num_kv_blocks)
    return ops.fine_backward(
        grad_out, query, key, value, lse, delta, kv_num_blocks, kv_indices, q_offsets, q_indices, block_sizes,
        q_block_sizes, None, None, None, q_shape, kv_shape, q_cube, kv_cube, scale, deterministic,
    )  # fmt: skip
