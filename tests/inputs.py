"""Random inputs shared by the tests of the ops and the public functions."""

import torch


def random_tokens(count, tokens, *, batch=1, heads=2, head_dim=64, dtype=torch.float32, requires_grad=False):
    """`count` normal tensors [B, S, H, D]."""
    shape = (batch, tokens, heads, head_dim)
    return [torch.randn(shape).to(dtype).requires_grad_(requires_grad) for _ in range(count)]


def random_video(count, video_shape, **kwargs):
    t, h, w = video_shape
    return random_tokens(count, t * h * w, **kwargs)


def random_index(num_q_blocks, num_kv_blocks, max_blocks, *, batch=1, heads=2, counts=None):
    """Ascending lists of distinct blocks; entries beyond the length are out of range on purpose."""
    rows = (batch, heads, num_q_blocks)
    if counts is None:
        counts = torch.randint(1, max_blocks + 1, rows)
    counts = torch.as_tensor(counts).expand(rows).to(torch.int32).contiguous()
    chosen = torch.rand(*rows, num_kv_blocks).argsort()[..., :max_blocks]
    beyond = torch.arange(max_blocks) >= counts[..., None]
    indices = chosen.masked_fill(beyond, num_kv_blocks).sort(dim=-1).values
    return counts, indices.masked_fill(indices == num_kv_blocks, 2**31 - 1).to(torch.int32)


def attended(counts, indices, q_grid, kv_grid):
    """bool [B, H, Sq, Skv]: the pairs of tokens that the lists let attend, for dense attention."""
    batch, heads, num_q, max_blocks = indices.shape
    listed = torch.arange(max_blocks) < counts[..., None]
    blocks = torch.zeros(batch, heads, num_q, kv_grid.num_cubes + 1, dtype=torch.bool)
    blocks.scatter_(3, torch.where(listed, indices, kv_grid.num_cubes).long(), True)
    return blocks[..., :-1][:, :, q_grid.cube_of_token()][..., kv_grid.cube_of_token()]


def dense_attention(query, key, value, mask, scale=None):
    """out [B, Sq, H, D] and natural-log LSE [B, H, Sq] by plain PyTorch; empty rows give 0 and -inf."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = (query @ key.mT * scale).masked_fill(~mask, -torch.inf)
    empty = ~mask.any(dim=-1)
    lse = scores.masked_fill(empty[..., None], 0.0).logsumexp(dim=-1)
    probabilities = torch.exp(scores - lse[..., None]).masked_fill(~mask, 0.0)
    return (probabilities @ value).transpose(1, 2), lse.masked_fill(empty, -torch.inf)
