"""Autograd over the functions of vsa_cuda.reference, wired as the ops wire them."""

import torch

from vsa_cuda import reference


class Fine(torch.autograd.Function):
    """fine_forward and fine_backward, wired as the ops wire them. Returns out and the cube-major lse."""

    @staticmethod
    def forward(ctx, q, k, v, lists):
        out, lse = reference.fine_forward(q, k, v, *lists)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lists = lists
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse = ctx.saved_tensors
        grad_fine, delta, *_ = reference.combine_backward(
            grad_out, out, grad_lse, None, ctx.lists[2], None, None, ctx.lists[6]
        )
        return *reference.fine_backward(grad_fine, q, k, v, lse, delta, *ctx.lists), None


class VideoSparse(torch.autograd.Function):
    """The whole of VSA: pool, coarse stage, fine stage, combine. Returns out, lse and the selection."""

    @staticmethod
    def forward(ctx, q, k, v, gate_fine, gate_coarse, grid, topk, scale):
        pooled = [reference.pool(x, grid) for x in (q, k, v)]
        coarse, coarse_lse, counts, indices = reference.coarse_forward(*pooled, topk, scale)
        lists = (counts, indices, grid, grid, scale)
        fine, lse = reference.fine_forward(q, k, v, *lists)
        ctx.save_for_backward(q, k, v, *pooled, coarse, coarse_lse, fine, lse)
        ctx.lists, ctx.gates = lists, (gate_fine, gate_coarse)
        ctx.mark_non_differentiable(indices)
        return reference.combine(fine, coarse, grid, gate_fine, gate_coarse), lse, indices

    @staticmethod
    def backward(ctx, grad_out, grad_lse, _):
        q, k, v, *pooled, coarse, coarse_lse, fine, lse = ctx.saved_tensors
        grid, scale = ctx.lists[3:]
        grad_fine, delta, grad_coarse, *grad_gates = reference.combine_backward(
            grad_out, fine, grad_lse, coarse, grid, *ctx.gates
        )
        pooled_gradients = reference.coarse_backward(grad_coarse, *pooled, coarse, coarse_lse, scale)
        gradients = reference.fine_backward(
            grad_fine, q, k, v, lse, delta, *ctx.lists, None, None, *pooled_gradients
        )
        return *gradients, *grad_gates, None, None, None
