"""Slow definitions that the reference is checked against, and random inputs for both."""

import itertools

import torch


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def close(actual, expected, **tolerances):
    torch.testing.assert_close(actual, expected, **({"rtol": 1e-10, "atol": 1e-12} | tolerances))


def by_token(lse, grid):
    """[B, H, N, 64] -> [B, H, S]."""
    return lse.flatten(2)[..., grid.slot_of_token()]


def random_lists(batch, heads, num_q, num_kv, max_blocks, counts=None):
    """Distinct ascending blocks in each row's first `counts` entries and garbage after them."""
    order = torch.rand(batch, heads, num_q, num_kv).argsort()[..., :max_blocks]
    if counts is None:
        counts = torch.randint(0, max_blocks + 1, (batch, heads, num_q))
    listed = torch.arange(max_blocks) < counts[..., None]
    indices = torch.where(listed, order, num_kv).sort().values
    garbage = torch.tensor([-1, 2**31 - 1])[torch.randint(0, 2, indices.shape)]
    return counts.int(), torch.where(listed, indices, garbage).int()


def cube_tokens(grid):
    """Raster tokens of each cube, from the definition."""
    cubes = {}
    for token, position in enumerate(itertools.product(*map(range, grid.video_shape))):
        cube = tuple(p // side for p, side in zip(position, grid.cube, strict=True))
        cubes.setdefault(cube, []).append(token)
    return [cubes[cube] for cube in sorted(cubes)]


def token_mask(counts, indices, q_grid, kv_grid):
    """bool [B, H, Sq, Skv]: which key tokens each query token attends to."""
    mask = torch.zeros(*counts.shape[:2], q_grid.num_tokens, kv_grid.num_tokens, dtype=torch.bool)
    q_cubes, kv_cubes = cube_tokens(q_grid), cube_tokens(kv_grid)
    for batch, head, cube in itertools.product(*map(range, counts.shape)):
        for block in indices[batch, head, cube, : counts[batch, head, cube]].tolist():
            mask[batch, head, torch.tensor(q_cubes[cube])[:, None], torch.tensor(kv_cubes[block])] = True
    return mask


def dense(q, k, v, mask, scale):
    """out [B, S, H, D] and lse [B, H, S] of masked attention; rows without a key give 0 and -inf."""
    scores = (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("bhqk,bkhd->bqhd", p, v), lse


def naive(q, k, v, gate_fine, gate_coarse, grid, topk, scale):
    """VSA token by token from section 2 of the paper: out, lse [B, H, S] and the selection."""
    cubes = cube_tokens(grid)
    batches, tokens, heads, _ = q.shape
    cube_of = {token: cube for cube, members in enumerate(cubes) for token in members}
    out, lse, selection = [], [], []
    for b, h in itertools.product(range(batches), range(heads)):
        q_c, k_c, v_c = (torch.stack([sum(x[b, t, h] for t in c) / len(c) for c in cubes]) for x in (q, k, v))
        chosen, coarse = [], []
        for cube in range(len(cubes)):
            scores = [scale * torch.dot(q_c[cube], key) for key in k_c]
            ranking = sorted(range(len(cubes)), key=lambda j, s=scores: (-s[j].item(), j))
            chosen.append(sorted(ranking[:topk]))
            weights = torch.softmax(torch.stack(scores), dim=0)
            coarse.append(sum(w * value for w, value in zip(weights, v_c, strict=True)))
        selection.append(chosen)
        for t in range(tokens):
            keys = [j for block in chosen[cube_of[t]] for j in cubes[block]]
            scores = torch.stack([scale * torch.dot(q[b, t, h], k[b, j, h]) for j in keys])
            fine = sum(w * v[b, j, h] for w, j in zip(torch.softmax(scores, dim=0), keys, strict=True))
            out.append(fine * gate_fine[b, t, h] + coarse[cube_of[t]] * gate_coarse[b, t, h])
            lse.append(torch.log(torch.exp(scores).sum()))
    out = torch.stack(out).view(batches, heads, tokens, -1).transpose(1, 2)
    return out, torch.stack(lse).view(batches, heads, tokens), selection
