"""The tolerance rule of the suite: no worse than twice PyTorch's own error in the same dtype.

`reference` is vsa_cuda.reference in float64 on the very inputs, `baseline` the same maths by PyTorch in the
input dtype, from the functions below: matmuls of half inputs accumulate in fp32 and give half, softmax is
fp32, P is rounded to half.
"""

import torch

FEW_ELEMENTS = 4096  # of a (batch, head): one block of 64 tokens at head_dim 64


def assert_within_tolerance(actual, reference, baseline, name="output", heads_dim=2):
    """Checks an output or gradient [B, ..., H, ...], with H at heads_dim, against both rules.

    max|actual - reference| <= 2 max|baseline - reference| + eps(actual.dtype) max|reference|, and per (batch,
    head) the Frobenius error is at most twice that of the baseline; over the whole tensor where a (batch,
    head) has fewer than FEW_ELEMENTS.

    Returns:
        (error, bound) of the first rule.
    """
    assert reference.dtype == torch.float64, f"{name}: reference is {reference.dtype}, expected float64"
    assert actual.shape == reference.shape == baseline.shape, (
        f"{name}: shapes {tuple(actual.shape)}, {tuple(reference.shape)}, {tuple(baseline.shape)} differ"
    )
    reference = reference.to(actual.device)
    errors = (actual.double() - reference).abs()
    baseline_errors = (baseline.to(actual.device).double() - reference).abs()
    error = errors.max().item()
    bound = (2 * baseline_errors.max() + torch.finfo(actual.dtype).eps * reference.abs().max()).item()
    # Written so that a NaN on either side fails.
    assert error <= bound, (
        f"{name}: max error {error:.3e} at {_worst(errors)}, bound {bound:.3e}, "
        f"max of the reference {reference.abs().max():.3e}"
    )
    dims = [dim for dim in range(actual.dim()) if dim not in (0, heads_dim)]
    if actual[0].numel() // actual.shape[heads_dim] < FEW_ELEMENTS:
        dims = None  # norms of so few errors scatter by more than the rule allows: all heads together
    norms = torch.linalg.vector_norm(errors, dim=dims)
    bounds = 2 * torch.linalg.vector_norm(baseline_errors, dim=dims)
    assert bool((norms <= bounds).all()), (
        f"{name}: Frobenius error {norms.max():.3e} at (batch, head) {_worst(norms - bounds)}, "
        f"{(norms / bounds).max():.2f} of its bound"
    )
    return error, bound


def assert_lse_within_tolerance(actual, reference, name="lse"):
    """|actual - reference| <= 1e-4 + 1e-5 |reference|; infinities exactly where the reference has them.

    Returns:
        (error, bound) at the worst element, (0, 0) without a finite one.
    """
    assert reference.dtype == torch.float64, f"{name}: reference is {reference.dtype}, expected float64"
    assert actual.shape == reference.shape, f"{name}: shapes {actual.shape}, {reference.shape} differ"
    actual, reference = actual.double(), reference.to(actual.device)
    infinite = reference.isinf()
    assert torch.equal(actual[infinite], reference[infinite]), f"{name}: infinities differ"
    errors = torch.where(infinite, 0.0, (actual - reference).abs())
    bounds = torch.where(infinite, 0.0, 1e-4 + 1e-5 * reference.abs())
    index = _worst(errors - bounds)
    assert bool((errors <= bounds).all()), (
        f"{name}: error {errors[index]:.3e} at {index}, bound {bounds[index]:.3e}, "
        f"reference {reference[index]:.3e}"
    )
    return errors[index].item(), bounds[index].item()


def half_precision_baseline(
    q,
    k,
    v,
    kv_num_blocks,
    kv_indices,
    q_grid,
    kv_grid,
    scale,
    grad_out=None,
    grad_lse=None,
    block_sizes=None,
    q_block_sizes=None,
    pooled_gradients=(None, None, None),
    pooled_grids=None,
):
    """The fine stage in the dtype of q, one query cube at a time; arguments as for reference.fine_forward.

    Args:
        grad_out: [B, Sq, H, D]; None computes no gradients. grad_lse: [B, H, Nq, 64] or None.
        pooled_gradients, pooled_grids: dq_pooled, dk_pooled, dv_pooled and the grids of the first and of the
            others, as for reference.fine_backward.

    Returns:
        out, dq, dk, dv in the dtype of q; the last three are None without grad_out.
    """
    half = q.dtype
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dq, dk, dv = (torch.zeros(x.shape, device=x.device) for x in (q, k, v))
    kv_tokens = _cube_tokens(kv_grid, block_sizes, q.device)
    q_tokens, q_slots = (
        _cube_tokens(q_grid, q_block_sizes, q.device, of) for of in (q_grid.token_index, _slots)
    )
    counts, lists = kv_num_blocks.tolist(), kv_indices.tolist()
    for batch in range(q.shape[0]):
        for head in range(q.shape[2]):
            for cube, rows in enumerate(q_tokens):
                listed = lists[batch][head][cube][: counts[batch][head][cube]]
                keys = torch.cat([kv_tokens[block] for block in listed]) if listed else rows[:0]
                if len(rows) == 0 or len(keys) == 0:
                    continue
                q_rows, k_rows, v_rows = q[batch, rows, head], k[batch, keys, head], v[batch, keys, head]
                p = torch.softmax(_matmul(q_rows, k_rows.T).float() * scale, dim=-1).to(half)
                o = _matmul(p, v_rows)
                out[batch, rows, head] = o
                if grad_out is None:
                    continue
                do = grad_out[batch, rows, head]
                delta = (do.float() * o.float()).sum(dim=-1)
                if grad_lse is not None:
                    delta -= grad_lse[batch, head, cube, q_slots[cube]]
                ds = (p.float() * (_matmul(do, v_rows.T).float() - delta[:, None])).to(half)
                dq[batch, rows, head] = _matmul(ds, k_rows).float() * scale
                dk[batch, keys, head] += _matmul(ds.T, q_rows).float() * scale
                dv[batch, keys, head] += _matmul(p.T, do).float()
    if grad_out is None:
        return out, None, None, None
    gradients = []
    pooled_q_grid, pooled_kv_grid = pooled_grids or (q_grid, kv_grid)
    grids = (pooled_q_grid, pooled_kv_grid, pooled_kv_grid)
    for grad, pooled, grid in zip((dq, dk, dv), pooled_gradients, grids, strict=True):
        if pooled is not None:
            mean = (pooled.float() / grid.cube_sizes(q.device)[:, None]).transpose(1, 2)
            grad = grad + mean[:, grid.cube_of_token(q.device)]
        gradients.append(grad.to(half))
    return out, *gradients


def half_precision_coarse_baseline(q_pooled, k_pooled, v_pooled, scale, grad_out=None):
    """The coarse stage with P and dS in the dtype of q_pooled [B, H, N, D]; scores stay fp32.

    Returns:
        out in the input dtype, and dq_pooled, dk_pooled, dv_pooled in fp32 (None without grad_out).
    """
    half = q_pooled.dtype
    p = torch.softmax(q_pooled.float() @ k_pooled.float().mT * scale, dim=-1).to(half)
    out = _matmul(p, v_pooled)
    if grad_out is None:
        return out, None, None, None
    grad = grad_out.to(half)
    delta = (grad.float() * out.float()).sum(dim=-1, keepdim=True)
    ds = (p.float() * (_matmul(grad, v_pooled.mT).float() - delta)).to(half)
    dq = _matmul(ds, k_pooled).float() * scale
    dk = _matmul(ds.mT, q_pooled).float() * scale
    return out, dq, dk, _matmul(p.mT, grad).float()


def _cube_tokens(grid, block_sizes, device, of=None):
    """For each cube the `of` ([N, 64], raster tokens unless given) of its real slots, in slot order."""
    valid = grid.valid(device)
    if block_sizes is not None:
        valid = valid & (torch.arange(64, device=device) < block_sizes[:, None])
    values = (of or grid.token_index)(device)
    return [row[keep] for row, keep in zip(values.expand_as(valid), valid, strict=True)]


def _slots(device):
    return torch.arange(64, device=device)


def _matmul(a, b):
    """A half matmul with fp32 accumulation, the same on every device."""
    return (a.float() @ b.float()).to(a.dtype)


def _worst(errors):
    return tuple(int(i) for i in torch.unravel_index(errors.nan_to_num(nan=torch.inf).argmax(), errors.shape))
