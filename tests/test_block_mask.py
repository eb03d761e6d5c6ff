"""from_block_mask: FlexAttention's lists, and what they must not hold."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from inputs import dense_attention, random_tokens
from vsa_cuda import block_sparse_attention, from_block_mask


def lists(*rows):
    """kv_num_blocks and kv_indices of one head in flex's form: rows of all blocks, the listed ones first."""
    width = len(rows)
    counts = torch.tensor([[[len(row) for row in rows]]], dtype=torch.int32)
    columns = [[*row, *(block for block in range(width) if block not in row)] for row in rows]
    return counts, torch.tensor([[columns]], dtype=torch.int32)


def whole_blocks(batch, head, q, kv):
    return ((q // 64 + kv // 64 + head) % 3 != 0) & (batch < 5)


def test_union_of_partial_and_full_lists_ascends():
    mask = BlockMask.from_kv_blocks(
        *lists([3, 0], [2], [], [1, 0]), *lists([1], [0, 2], [], [2, 3]), BLOCK_SIZE=64
    )
    counts, indices = from_block_mask(mask)
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.tolist() == [[[3, 2, 0, 4]]]
    assert indices.tolist() == [[[[0, 1, 3, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 1, 2, 3]]]]


def test_without_full_list():
    counts, indices = from_block_mask(BlockMask.from_kv_blocks(*lists([1], [1, 0]), BLOCK_SIZE=64))
    assert counts.tolist() == [[[1, 2]]] and indices.tolist() == [[[[1, 0], [0, 1]]]]


def test_block_aligned_mask_mod(seed):
    mask = create_block_mask(whole_blocks, 2, 2, 192, 256, device="cpu", BLOCK_SIZE=64)
    (q,), (k, v) = random_tokens(1, 192, batch=2), random_tokens(2, 256, batch=2)
    index = from_block_mask(mask)
    out = block_sparse_attention(q, k, v, *index, check=True)
    places = torch.meshgrid(*(torch.arange(n) for n in (2, 2, 192, 256)), indexing="ij")
    wanted, _ = dense_attention(q, k, v, whole_blocks(*places))
    torch.testing.assert_close(out, wanted)


def test_partial_blocks_with_a_mask_mod_are_refused():
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, 1, 1, 128, 128, device="cpu", BLOCK_SIZE=64)
    with pytest.raises(
        ValueError, match="block_mask: got 2 partial blocks with a mask_mod, expected whole blocks.*; "
    ):
        from_block_mask(mask)


@pytest.mark.parametrize("size", [128, (64, 128)])
def test_other_block_sizes_are_refused(size):
    mask = create_block_mask(lambda b, h, q, kv: q >= 0, 1, 1, 256, 256, device="cpu", BLOCK_SIZE=size)
    with pytest.raises(
        ValueError, match=r"block_mask: got BLOCK_SIZE .*128.*, expected \(64, 64\); build the mask"
    ):
        from_block_mask(mask)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="block_mask: got Tensor, expected a .*BlockMask; make it with"):
        from_block_mask(torch.ones(2, 2))
