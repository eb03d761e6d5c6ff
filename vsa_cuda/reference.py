"""Video Sparse Attention in plain PyTorch: the definition of correct, and what CPU tensors run.

Memory is linear in tokens * selected blocks: query cubes go through in chunks. float32 and float64 inputs are
computed as they are; float16 and bfloat16 are computed in float32 and rounded once, into the results.
Equations: Video Sparse Attention (arXiv 2505.13389), section 2; gradients are the explicit formulas.

Shapes: B batch, H heads, S tokens (raster order), D head_dim, N cubes of 64 slots. Per-token fp32 values are
cube-major, [B, H, N, 64]. Slots with no real token are masked wherever they are read: they may hold NaN.
"""

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from vsa_cuda.geometry import CUBE_VOLUME, CubeGrid

# Elements of the largest temporary of a chunk: 8 MB in fp32, a compromise of cache reuse and call overhead.
_CHUNK_ELEMENTS = 1 << 21

Gate = torch.Tensor | float | None


def pool(x: torch.Tensor, grid: CubeGrid) -> torch.Tensor:
    """Mean over the real tokens of each cube. x [B, S, H, D] -> [B, H, N, D] in x.dtype."""
    sizes = grid.cube_sizes(x.device).to(_compute_dtype(x))
    total = _to_cubes(x, grid, grid.valid(x.device)).sum(dim=3)
    return (total / sizes[:, None]).to(x.dtype)


def coarse_forward(
    q_pooled: torch.Tensor,
    k_pooled: torch.Tensor,
    v_pooled: torch.Tensor,
    topk: int,
    scale: float,
    with_output: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cube-to-cube attention and the selection of topk key cubes per query cube.

    Args:
        q_pooled, k_pooled, v_pooled: [B, H, N, D], from `pool`.
        topk: key cubes kept per query cube, 1 to N; 0 for no selection.

    Returns:
        out: [B, H, N, D] in the input dtype, or an empty (0,) tensor when not `with_output`.
        lse: [B, H, N], natural log, fp32 (fp64 for fp64).
        kv_num_blocks: int32 [B, H, N], all equal to topk.
        kv_indices: int32 [B, H, N, topk], ascending; equal scores go to the lower index.
    """
    batch, heads, cubes, _ = q_pooled.shape
    dtype = _compute_dtype(q_pooled)
    q, k, v = (x.to(dtype).flatten(0, 1) for x in (q_pooled, k_pooled, v_pooled))
    out = torch.empty_like(q) if with_output else q.new_empty(0)
    lse = q.new_empty(q.shape[:2])
    indices = torch.empty(*q.shape[:2], topk, dtype=torch.int32, device=q.device)
    for head in range(batch * heads):
        for rows in _chunks(cubes, cubes):
            scores = q[head, rows] @ k[head].T * scale
            if topk > 0:
                order = scores.sort(dim=-1, descending=True, stable=True).indices
                indices[head, rows] = order[:, :topk].sort(dim=-1).values.to(torch.int32)
            lse[head, rows] = scores.logsumexp(dim=-1)
            if with_output:
                out[head, rows] = torch.exp(scores - lse[head, rows, None]) @ v[head]
    if with_output:
        out = out.to(q_pooled.dtype).unflatten(0, (batch, heads))
    else:
        out = out.to(q_pooled.dtype)
    counts = torch.full((batch, heads, cubes), topk, dtype=torch.int32, device=q.device)
    return out, lse.unflatten(0, (batch, heads)), counts, indices.unflatten(0, (batch, heads))


def coarse_backward(
    grad_out: torch.Tensor,
    q_pooled: torch.Tensor,
    k_pooled: torch.Tensor,
    v_pooled: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the coarse output; none pass through the selection.

    Args:
        grad_out, q_pooled, k_pooled, v_pooled: [B, H, N, D].
        out [B, H, N, D], lse [B, H, N]: from coarse_forward.

    Returns:
        dq_pooled, dk_pooled, dv_pooled: [B, H, N, D] in fp32 (fp64 for fp64).
    """
    batch, heads, cubes, _ = q_pooled.shape
    dtype = _compute_dtype(q_pooled)
    grad, q, k, v, out = (x.to(dtype).flatten(0, 1) for x in (grad_out, q_pooled, k_pooled, v_pooled, out))
    lse = lse.flatten(0, 1)
    delta = (grad * out).sum(dim=-1)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for head in range(batch * heads):
        for rows in _chunks(cubes, cubes):
            p = torch.exp(q[head, rows] @ k[head].T * scale - lse[head, rows, None])
            ds = p * (grad[head, rows] @ v[head].T - delta[head, rows, None]) * scale
            dq[head, rows] = ds @ k[head]
            dk[head] += ds.T @ q[head, rows]
            dv[head] += p.T @ grad[head, rows]
    dq, dk, dv = (x.unflatten(0, (batch, heads)) for x in (dq, dk, dv))
    return dq, dk, dv


def fine_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_num_blocks: torch.Tensor | None,
    kv_indices: torch.Tensor | None,
    q_grid: CubeGrid,
    kv_grid: CubeGrid,
    scale: float,
    block_sizes: torch.Tensor | None = None,
    q_block_sizes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token-to-token attention of every query cube to the key cubes in its list.

    Args:
        q: [B, Sq, H, D]; k, v: [B, Skv, H, D]; any strides.
        kv_num_blocks: int32 [B, H, Nq], length of each list; 0 gives out = 0 and lse = -inf.
        kv_indices: int32 [B, H, Nq, max_blocks], distinct key cubes; entries beyond the length are not read.
            Both None: every list is that of all key cubes.
        block_sizes, q_block_sizes: int32 [Nkv], [Nq]: only this many leading slots of each cube are tokens.

    Returns:
        out: [B, Sq, H, D] contiguous, in q.dtype; 0 for tokens cut off by q_block_sizes.
        lse: [B, H, Nq, 64], natural log, fp32 (fp64 for fp64); +inf for slots with no token.
    """
    batch, _, heads, head_dim = q.shape
    q_valid = _valid_slots(q_grid, q_block_sizes, q.device)
    queries = _to_cubes(q, q_grid, q_valid).flatten(0, 2)
    blocks = _KeyBlocks(k, v, kv_num_blocks, kv_indices, q_grid, kv_grid, block_sizes)
    out = torch.empty_like(queries)
    lse = queries.new_empty(queries.shape[:2])
    for rows in blocks.chunks():
        keys, values, masked = blocks.gather(rows)
        scores = (queries[rows] @ keys.mT).mul_(scale).masked_fill_(masked, -torch.inf)
        lse[rows] = scores.logsumexp(dim=-1)
        out[rows] = scores.sub_(_finite(lse[rows])[..., None]).exp_() @ values
    out = out.view(batch, heads, q_grid.num_cubes, CUBE_VOLUME, head_dim)
    out = _to_raster(out.masked_fill_(~q_valid[..., None], 0.0), q_grid).to(q.dtype)
    return out, lse.view(batch, heads, -1, CUBE_VOLUME).masked_fill_(~q_valid, torch.inf)


def fine_backward(
    grad_fine: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    kv_num_blocks: torch.Tensor | None,
    kv_indices: torch.Tensor | None,
    q_grid: CubeGrid,
    kv_grid: CubeGrid,
    scale: float,
    block_sizes: torch.Tensor | None = None,
    q_block_sizes: torch.Tensor | None = None,
    dq_pooled: torch.Tensor | None = None,
    dk_pooled: torch.Tensor | None = None,
    dv_pooled: torch.Tensor | None = None,
    pooled_grids: tuple[CubeGrid, CubeGrid] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of fine_forward, with the gradients of the pooled tensors spread over their tokens.

    Args:
        grad_fine: [B, Sq, H, D], gradient of `out`.
        lse: [B, H, Nq, 64] from fine_forward.
        delta: [B, H, Nq, 64], rowsum(grad_fine * out) minus the gradient of lse (see combine_backward).
        dq_pooled [B, H, Nq, D], dk_pooled, dv_pooled [B, H, Nkv, D]: every token gets pooled / cube size on
            top; not to be given with block sizes.
        pooled_grids: cubes of the first and of the other two, over the same tokens; None: q_grid, kv_grid.
        The others as for fine_forward.

    Returns:
        dq [B, Sq, H, D], dk, dv [B, Skv, H, D]: contiguous, in the dtype of q, k, v; 0 for tokens cut off by
        block_sizes or q_block_sizes. Queries whose lse is -inf neither get nor give a gradient.
    """
    batch, _, heads, head_dim = q.shape
    q_valid = _valid_slots(q_grid, q_block_sizes, q.device)
    live = (q_valid & (lse != -torch.inf)).flatten(0, 2)
    queries = _to_cubes(q, q_grid, q_valid).flatten(0, 2)
    grads = _to_cubes(grad_fine, q_grid, q_valid).flatten(0, 2).masked_fill_(~live[..., None], 0.0)
    lse = lse.flatten(0, 2).masked_fill(~live, torch.inf)
    delta = delta.flatten(0, 2).masked_fill(~live, 0.0)
    blocks = _KeyBlocks(k, v, kv_num_blocks, kv_indices, q_grid, kv_grid, block_sizes)
    dq, dk, dv = torch.empty_like(queries), torch.zeros_like(blocks.keys), torch.zeros_like(blocks.values)
    for rows in blocks.chunks():
        keys, values, masked = blocks.gather(rows)
        ids = blocks.ids(rows).expand(rows.stop - rows.start, -1).flatten()
        scores = (queries[rows] @ keys.mT).mul_(scale).masked_fill_(masked, -torch.inf)
        p = scores.sub_(lse[rows, :, None]).exp_()
        dv.index_add_(0, ids, (p.mT @ grads[rows]).view(-1, CUBE_VOLUME, head_dim))
        ds = (grads[rows] @ values.mT).sub_(delta[rows, :, None]).mul_(p).mul_(scale)
        dq[rows] = ds @ keys
        dk.index_add_(0, ids, (ds.mT @ queries[rows]).view(-1, CUBE_VOLUME, head_dim))
    dq = dq.view(batch, heads, q_grid.num_cubes, CUBE_VOLUME, head_dim)
    pooled_q_grid, pooled_kv_grid = pooled_grids or (q_grid, kv_grid)
    dq, dk, dv = (
        _add_pooled(_to_raster(grad, grid), pooled, pooled_grid).to(x.dtype)
        for grad, grid, pooled, pooled_grid, x in (
            (dq, q_grid, dq_pooled, pooled_q_grid, q),
            (blocks.unpad(dk), kv_grid, dk_pooled, pooled_kv_grid, k),
            (blocks.unpad(dv), kv_grid, dv_pooled, pooled_kv_grid, v),
        )
    )
    return dq, dk, dv


def combine(
    out_fine: torch.Tensor,
    coarse: torch.Tensor | None,
    coarse_grid: CubeGrid,
    gate_fine: Gate,
    gate_coarse: Gate,
) -> torch.Tensor:
    """out_fine * gate_fine + coarse[cube of the token] * gate_coarse.

    Args:
        out_fine: [B, S, H, D].
        coarse: [B, H, N, D], a row for each cube of coarse_grid, or None for no coarse term.
        gate_fine, gate_coarse: [B, S, H, D] or 0-d tensor, float, or None (1.0).

    Returns:
        out: [B, S, H, D] in out_fine.dtype.
    """
    dtype = _compute_dtype(out_fine)
    out = out_fine.to(dtype) * _gate(gate_fine, dtype)
    if coarse is not None:
        out = out + _spread(coarse, coarse_grid, dtype) * _gate(gate_coarse, dtype)
    return out.to(out_fine.dtype)


def combine_backward(
    grad_out: torch.Tensor,
    out_fine: torch.Tensor,
    grad_lse: torch.Tensor | None,
    coarse: torch.Tensor | None,
    grid: CubeGrid,
    gate_fine: Gate,
    gate_coarse: Gate,
    q_block_sizes: torch.Tensor | None = None,
    coarse_grid: CubeGrid | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of combine, and the row term of the softmax gradient that fine_backward needs.

    Args:
        grad_out, out_fine: [B, S, H, D]; grad_lse: [B, H, N, 64] of `grid` or None (no gradient).
        coarse, gate_fine, gate_coarse: as for combine.
        q_block_sizes: int32 [N] or None, as for fine_forward.
        coarse_grid: the cubes of `coarse`, over the same tokens; None: `grid`, the one of the fine stage.

    Returns:
        grad_fine: [B, S, H, D] in out_fine.dtype; grad_out itself when gate_fine is 1.
        delta: [B, H, N, 64] of `grid`, rowsum(grad_fine * out_fine) - grad_lse; 0 for slots with no token.
        grad_coarse: [B, H, N, D] of coarse_grid, or None without coarse. Like delta fp32 (fp64 for fp64).
        grad_gate_fine, grad_gate_coarse: shape and dtype of the gate, or None when it is not a tensor.
    """
    dtype = _compute_dtype(out_fine)
    valid = _valid_slots(grid, q_block_sizes, out_fine.device)
    grad, fine = grad_out.to(dtype), out_fine.to(dtype)
    if gate_fine is None or (not isinstance(gate_fine, torch.Tensor) and gate_fine == 1.0):
        grad_fine = grad_out
    else:
        grad_fine = (grad * _gate(gate_fine, dtype)).to(out_fine.dtype)
    # From the rounded gradient, the one that fine_backward multiplies with V.
    rows = (grad_fine.to(dtype) * fine).sum(dim=-1, keepdim=True)
    delta = _to_cubes(rows, grid, valid).squeeze(-1)
    if grad_lse is not None:
        delta = (delta - grad_lse).masked_fill(~valid, 0.0)
    grad_gate_fine = _gate_gradient(gate_fine, grad, fine)
    grad_coarse = grad_gate_coarse = None
    if coarse is not None:
        coarse_grid = coarse_grid or grid
        cut_off = ~valid.flatten()[grid.slot_of_token(valid.device), None, None]
        product = (grad * _gate(gate_coarse, dtype)).masked_fill(cut_off, 0.0)
        grad_coarse = _to_cubes(product, coarse_grid, coarse_grid.valid(product.device)).sum(dim=3)
        if isinstance(gate_coarse, torch.Tensor):
            grad_gate_coarse = _gate_gradient(gate_coarse, grad, _spread(coarse, coarse_grid, dtype))
    return grad_fine, delta, grad_coarse, grad_gate_fine, grad_gate_coarse


def transpose_index(
    kv_num_blocks: torch.Tensor, kv_indices: torch.Tensor, num_kv_blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same pairs listed by key block, in compressed rows.

    Args:
        kv_num_blocks: int32 [B, H, Nq]; kv_indices: int32 [B, H, Nq, max_blocks].

    Returns:
        q_offsets: int32 [B, H, Nkv + 1]; row j of q_indices is q_offsets[j] to q_offsets[j + 1].
        q_indices: int32 [B, H, Nq * max_blocks], ascending inside a row; 0 after the last row.
    """
    batch, heads, num_q, max_blocks = kv_indices.shape
    position = torch.arange(max_blocks, device=kv_indices.device)
    listed = position < kv_num_blocks[..., None]
    # Unlisted entries sort after the last key block.
    keys = torch.where(listed, kv_indices, num_kv_blocks).view(batch * heads, num_q * max_blocks).long()
    counts = keys.new_zeros(batch * heads, num_kv_blocks + 1).scatter_add_(1, keys, torch.ones_like(keys))
    q_offsets = counts.cumsum(dim=1) - counts
    by_key, order = keys.sort(dim=1, stable=True)
    q_indices = torch.where(by_key < num_kv_blocks, order // max(max_blocks, 1), 0)
    q_offsets, q_indices = (x.to(torch.int32).unflatten(0, (batch, heads)) for x in (q_offsets, q_indices))
    return q_offsets, q_indices


class _KeyBlocks:
    """Key and value cubes with the lists of query cubes that gather them.

    keys, values: [B * H * (Nkv + 1), 64, D]. The last cube of every head is zero; list entries beyond the
    length stand for it, so that no unlisted token, infinite or NaN, can reach a result. Without an index all
    query cubes of a head have one list, and a chunk of them gathers it once.
    """

    def __init__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_num_blocks: torch.Tensor | None,
        kv_indices: torch.Tensor | None,
        q_grid: CubeGrid,
        grid: CubeGrid,
        block_sizes: torch.Tensor | None,
    ):
        self.batch, _, self.heads, self.head_dim = k.shape
        cubes = grid.num_cubes
        valid = _valid_slots(grid, block_sizes, k.device)
        self.keys, self.values = (
            pad(_to_cubes(x, grid, valid), (0, 0, 0, 0, 0, 1)).flatten(0, 2) for x in (k, v)
        )
        self.masked = ~pad(valid, (0, 0, 0, 1)).repeat(self.batch * self.heads, 1)
        if kv_indices is None:
            self.rows_per_list = q_grid.num_cubes
            ids = torch.arange(cubes, device=k.device)
        else:
            self.rows_per_list = 1
            listed = torch.arange(kv_indices.shape[3], device=k.device) < kv_num_blocks[..., None]
            ids = torch.where(listed, kv_indices, cubes).long().flatten(0, 1)
        first = torch.arange(self.batch * self.heads, device=k.device) * (cubes + 1)
        self.lists = (ids + first[:, None, None]).flatten(0, 1)  # [B * H * Nq or B * H, max_blocks]

    def chunks(self) -> Iterator[slice]:
        """Query cubes over all heads; with one list a head, of one head each."""
        lists, max_blocks = self.lists.shape
        elements = max_blocks * CUBE_VOLUME * self.head_dim
        if self.rows_per_list == 1:
            yield from _chunks(lists, elements)
            return
        for first in range(0, lists * self.rows_per_list, self.rows_per_list):
            for rows in _chunks(self.rows_per_list, elements):
                yield slice(first + rows.start, first + rows.stop)

    def ids(self, rows: slice) -> torch.Tensor:
        """Cubes of the lists of a chunk: [rows, max_blocks], or [1, max_blocks] where one list serves all."""
        return (
            self.lists[rows]
            if self.rows_per_list == 1
            else self.lists[rows.start // self.rows_per_list, None]
        )

    def gather(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """keys, values [R, L, D], masked [R, 1, L], True for no token; R as in ids, L = max_blocks * 64."""
        count, max_blocks = self.ids(rows).shape
        ids, length = self.ids(rows).flatten(), max_blocks * CUBE_VOLUME
        keys, values = (
            x.index_select(0, ids).view(count, length, self.head_dim) for x in (self.keys, self.values)
        )
        return keys, values, self.masked.index_select(0, ids).view(count, 1, length)

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """[B * H * (Nkv + 1), 64, D] -> [B, H, Nkv, 64, D]."""
        return x.view(self.batch, self.heads, -1, CUBE_VOLUME, self.head_dim)[:, :, :-1]


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _chunks(rows: int, row_elements: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, row_elements))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _valid_slots(grid: CubeGrid, block_sizes: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """bool [N, 64]: slots that hold a token of the grid, among the leading block_sizes ones."""
    valid = grid.valid(device)
    if block_sizes is None:
        return valid
    return valid & (torch.arange(CUBE_VOLUME, device=device) < block_sizes[:, None])


def _to_cubes(x: torch.Tensor, grid: CubeGrid, valid: torch.Tensor) -> torch.Tensor:
    """[B, S, H, D] -> a new [B, H, N, 64, D] in the compute dtype, 0 where not valid."""
    slots = x.transpose(1, 2).index_select(2, grid.token_index(x.device).flatten())
    slots = slots.unflatten(2, (grid.num_cubes, CUBE_VOLUME)).to(_compute_dtype(x))
    return slots.masked_fill_(~valid[..., None], 0.0)


def _to_raster(x: torch.Tensor, grid: CubeGrid) -> torch.Tensor:
    """[B, H, N, 64, D] -> [B, S, H, D], contiguous."""
    return x.flatten(2, 3).transpose(1, 2).index_select(1, grid.slot_of_token(x.device))


def _add_pooled(grad: torch.Tensor, pooled: torch.Tensor | None, grid: CubeGrid) -> torch.Tensor:
    """grad [B, S, H, D] plus pooled [B, H, N, D] / cube size, the gradient of a mean."""
    if pooled is None:
        return grad
    return grad + _spread(pooled.to(grad.dtype) / grid.cube_sizes(pooled.device)[:, None], grid, grad.dtype)


def _spread(coarse: torch.Tensor, grid: CubeGrid, dtype: torch.dtype) -> torch.Tensor:
    """[B, H, N, D] -> [B, S, H, D]: every token gets its cube's row."""
    return coarse.to(dtype).transpose(1, 2).index_select(1, grid.cube_of_token(coarse.device))


def _gate(gate: Gate, dtype: torch.dtype) -> torch.Tensor | float:
    if gate is None:
        return 1.0
    return gate.to(dtype) if isinstance(gate, torch.Tensor) else gate


def _gate_gradient(gate: Gate, grad: torch.Tensor, branch: torch.Tensor) -> torch.Tensor | None:
    if not isinstance(gate, torch.Tensor):
        return None
    product = grad * branch
    return (product.sum() if gate.dim() == 0 else product).to(gate.dtype)


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """Replaces the -inf of a row without keys by 0: exp(-inf - 0) = 0 where exp(-inf + inf) is NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)
