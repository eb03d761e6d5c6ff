"""Every bad argument raises, naming the argument, what was got, what was expected and the fix."""

import re

import pytest
import torch

from inputs import random_tokens
from vsa_cuda import block_sparse_attention, checks, video_sparse_attention

SHAPE, TOKENS = (3, 5, 6), 90


def video_arguments():
    query, key, value = random_tokens(3, TOKENS)
    return dict(query=query, key=key, value=value, video_shape=SHAPE, topk=2)


def block_arguments():
    """Two linear blocks of queries and keys, lists of width 2."""
    query, key, value = random_tokens(3, TOKENS)
    counts = torch.full((1, 2, 2), 2, dtype=torch.int32)
    indices = torch.tensor([0, 1], dtype=torch.int32).expand(1, 2, 2, 2).contiguous()
    return dict(query=query, key=key, value=value, kv_num_blocks=counts, kv_indices=indices)


def tokens(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def all_of(function, *names):
    """`function` applied to each of the named arguments."""
    return {name: function for name in names}


def index(rows):
    """kv_indices with both heads holding `rows`."""
    return torch.tensor(rows, dtype=torch.int32).expand(1, 2, 2, -1).contiguous()


QKV = ("query", "key", "value")
LONG_STRIDE = torch.zeros(1, TOKENS, 2, 68)[..., :64]

# Rows: changes to good arguments, exception, argument named, then substrings of got, expected and fix.
# A change is a value, or a function of the good value.
BOTH = [
    (dict(query=[1.0]), TypeError, "query", "list", "a torch.Tensor", "pass query as a tensor"),
    (dict(value=None), TypeError, "value", "NoneType", "a torch.Tensor", "pass value as a tensor"),
    (
        dict(query=lambda x: x[0]),
        ValueError, "query", "3 dimensions (90, 2, 64)", "4 dimensions [B, S, H, D]", "reshape",
    ),
    (dict(key=lambda x: x.flatten(2)), ValueError, "key", "3 dimensions", "4 dimensions", ".unflatten(-1"),
    (
        all_of(lambda x: x.long(), *QKV),
        TypeError, "query", "torch.int64 on cpu", "float64", ".to(torch.bfloat16)",
    ),
    (all_of(lambda x: x.to(torch.complex64), *QKV), TypeError, "query", "complex64", "bfloat16", "autocast"),
    (
        all_of(lambda x: x.to(torch.float8_e4m3fn), *QKV),
        TypeError, "query", "float8_e4m3fn", "bfloat16, float16", "query.to(torch.bfloat16)",
    ),
    (
        dict(key=lambda x: x.bfloat16()),
        TypeError, "key", "torch.bfloat16", "torch.float32 as in query", "key.to(",
    ),
    (dict(value=lambda x: x.half()), TypeError, "value", "torch.float16", "torch.float32", "autocast"),
    (
        dict(key=lambda x: x.to("meta")),
        ValueError, "key", "device meta", "the device of query, cpu", 'key.to("cpu")',
    ),
    (
        all_of(lambda x: x[..., :32], *QKV),
        ValueError, "query", "head_dim 32", "head_dim 64 or 128", "zero-pad",
    ),
    (all_of(lambda x: tokens(1, 90, 2, 96), *QKV), ValueError, "query", "head_dim 96", "64 or 128", "scale="),
    (
        all_of(lambda x: x[:0], *QKV),
        ValueError, "query", "shape (0, 90, 2, 64)", "no empty dimension", "skip",
    ),
    (dict(key=tokens(2, 90, 2, 64)), ValueError, "key", "batch 2", "1 as in query", "make batch agree"),
    (
        dict(value=tokens(1, 90, 1, 64)),
        ValueError, "value", "heads 1", "2 as in query", "repeat the key and value heads",
    ),
    (
        dict(key=tokens(1, 90, 2, 128)),
        ValueError, "key", "head_dim 128", "64 as in query", "make head_dim agree",
    ),
    (
        dict(value=tokens(1, 80, 2, 64)),
        ValueError, "value", "(1, 80, 2, 64)", "the shape of key (1, 90", "check the layout",
    ),
    (
        dict(query=lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
        ValueError, "query", "stride 2 of head_dim", "stride 1", "query.contiguous()",
    ),
    (
        dict(key=LONG_STRIDE),
        ValueError, "key", "stride 68 of dimension 2", "multiples of 8 elements", "key.contiguous()",
    ),
    (
        dict(value=torch.zeros(TOKENS * 128 + 8)[3:-5].view(1, TOKENS, 2, 64)),
        ValueError, "value", "a base address 12 bytes past", "aligned to 16 bytes", "value.clone()",
    ),
    (dict(scale="1"), TypeError, "scale", "str", "a float or None", "float(scale)"),
    (dict(scale=torch.tensor(1.0)), TypeError, "scale", "Tensor", "a float or None", "float(scale)"),
    (dict(scale=0.0), ValueError, "scale", "0.0", "above 0", "head_dim**-0.5"),
    (dict(scale=float("nan")), ValueError, "scale", "nan", "finite", "pass None"),
    (dict(scale=float("inf")), ValueError, "scale", "inf", "finite", "pass None"),
    (dict(layout="sbhd"), ValueError, "layout", "'sbhd'", '"bshd" or "bhsd"', 'layout="bshd"'),
    (
        dict(deterministic=1),
        TypeError, "deterministic", "1 (int)", "True, False or None", "bool(deterministic)",
    ),
    (dict(cube=(4, 4)), ValueError, "cube", "2 sizes", "3 (t, h, w)", "pass cube="),
    (dict(cube=(4, 4, 8)), ValueError, "cube", "volume 128", "a volume of 64", "(4, 4, 4)"),
    (dict(cube=64), TypeError, "cube", "64 (int)", "3 ints", "pass cube="),
    (dict(video_shape=(3, 5)), ValueError, "video_shape", "2 sizes", "3 (t, h, w)", "pass video_shape="),
    (dict(video_shape=(3.0, 5, 6)), TypeError, "video_shape", "float", "3 ints", "pass video_shape="),
    (dict(video_shape=(3, 0, 6)), ValueError, "video_shape", "(3, 0, 6)", "at least 1", "pass video_shape="),
    (
        dict(video_shape=(3, 5, 7)),
        ValueError, "query", "90 tokens in dimension 1", "105 = 3 * 5 * 7", "(T, H, W) of query",
    ),
]  # fmt: skip

VIDEO = [
    (dict(topk=None), ValueError, "topk, sparsity", "neither", "exactly one", "topk=32 or sparsity=0.9"),
    (dict(sparsity=0.5), ValueError, "topk, sparsity", "both", "exactly one", "topk=32 or sparsity=0.9"),
    (
        dict(layout="bhsd"),
        ValueError, "query", "2 tokens in dimension 2", "90 = 3 * 5 * 6", "check the layout",
    ),
    (dict(topk=0), ValueError, "topk", "0", "at least 1", "topk=1 or more"),
    (dict(topk=-3), ValueError, "topk", "-3", "at least 1", "topk=1 or more"),
    (dict(topk=2.0), TypeError, "topk", "float", "an int", "int(topk)"),
    (dict(topk=True), TypeError, "topk", "bool", "an int", "int(topk)"),
    (dict(topk=torch.tensor(2)), TypeError, "topk", "Tensor", "an int", "int(topk)"),
    (dict(topk=None, sparsity=1.5), ValueError, "sparsity", "1.5", "a fraction in [0, 1]", "0.9"),
    (dict(topk=None, sparsity=-0.1), ValueError, "sparsity", "-0.1", "a fraction in [0, 1]", "0.9"),
    (dict(topk=None, sparsity=float("nan")), ValueError, "sparsity", "nan", "[0, 1]", "0.9"),
    (
        dict(topk=None, sparsity="0.9"),
        TypeError, "sparsity", "'0.9' (str)", "a float in [0, 1]", "sparsity=0.9",
    ),
    (dict(video_shape=None), TypeError, "video_shape", "None", "3 ints", "pass video_shape="),
    (
        all_of(lambda x: tokens(1, 80, 2, 64), "key", "value"),
        ValueError, "key", "80 tokens", "90 = 3 * 5 * 6", "of key",
    ),
    (
        dict(gate_coarse=tokens(1, 90, 1, 64)),
        ValueError, "gate_coarse", "(1, 90, 1, 64)", "shape of query", "expand_as",
    ),
    (
        dict(gate_fine=tokens(1, 90, 128)),
        ValueError, "gate_fine", "(1, 90, 128)", "shape of query", ".unflatten(-1",
    ),
    (dict(gate_coarse=tokens(1)), ValueError, "gate_coarse", "(1,)", "or a 0-d tensor", "expand_as"),
    (
        dict(gate_coarse=tokens(1, 90, 2, 64, dtype=torch.bfloat16)),
        TypeError, "gate_coarse", "torch.bfloat16", "torch.float32 as in query", "autocast",
    ),
    (
        dict(gate_fine=torch.tensor(1)),
        TypeError, "gate_fine", "0-d torch.int64", "floating", "gate_fine.float()",
    ),
    (dict(gate_fine=torch.tensor(1.0, device="meta")), ValueError, "gate_fine", "device meta", "cpu", ".to("),
    (dict(gate_fine="on"), TypeError, "gate_fine", "str", "a tensor, a float or None", "float(gate_fine)"),
    (
        dict(gate_coarse=True),
        TypeError, "gate_coarse", "bool", "a tensor, a float or None", "float(gate_coarse)",
    ),
    (dict(gate_coarse=float("inf")), ValueError, "gate_coarse", "inf", "a finite float", "check where"),
    (dict(gate_fine=float("nan")), ValueError, "gate_fine", "nan", "a finite float", "check where"),
    (
        dict(return_selection=1),
        TypeError, "return_selection", "1 (int)", "True or False", "bool(return_selection)",
    ),
]  # fmt: skip

LINEAR_KEYS = dict(video_shape=SHAPE, cube=(1, 8, 8), key=tokens(1, 70, 2, 64), value=tokens(1, 70, 2, 64))
BLOCK = [
    (
        dict(kv_num_blocks=lambda x: x.long()),
        TypeError, "kv_num_blocks", "int64", "torch.int32", ".to(torch.int32)",
    ),
    (
        dict(kv_indices=lambda x: x.long()),
        TypeError, "kv_indices", "int64", "torch.int32", "kv_indices.to(torch.int32)",
    ),
    (
        dict(kv_indices=lambda x: x.tolist()),
        TypeError, "kv_indices", "list", "a torch.Tensor", "pass kv_indices",
    ),
    (
        dict(kv_indices=lambda x: x.to("meta")),
        ValueError, "kv_indices", "device meta", "cpu", 'kv_indices.to("cpu")',
    ),
    (
        dict(kv_num_blocks=lambda x: x[:, :1]),
        ValueError, "kv_num_blocks", "(1, 1, 2)", "= (1, 2, 2)", ".expand(",
    ),
    (
        dict(kv_num_blocks=lambda x: x[..., :1]),
        ValueError, "kv_num_blocks", "(1, 2, 1)", "= (1, 2, 2)", ".expand(",
    ),
    (
        dict(kv_indices=lambda x: x[:, :1]),
        ValueError, "kv_indices", "(1, 1, 2, 2)", "(1, 2, 2, 'max_blocks')", ".expand(",
    ),
    (dict(kv_indices=lambda x: x[0]), ValueError, "kv_indices", "(2, 2, 2)", "max_blocks]", ".expand("),
    (
        dict(kv_indices=lambda x: x[..., :0]),
        ValueError, "kv_indices", "max_blocks 0", "at least 1", "one column of zeros",
    ),
    (
        dict(block_sizes=torch.tensor([64, 26])),
        TypeError, "block_sizes", "int64", "torch.int32", ".to(torch.int32)",
    ),
    (
        dict(block_sizes=int32(64, 26, 1)),
        ValueError, "block_sizes", "(3,)", "one size per block, [2]", "of shape [2]",
    ),
    (
        dict(q_block_sizes=int32(64)),
        ValueError, "q_block_sizes", "(1,)", "one size per block, [2]", "of shape [2]",
    ),
    (dict(q_block_sizes=64), TypeError, "q_block_sizes", "int", "a torch.Tensor", "pass q_block_sizes"),
    (
        dict(cube=(2, 4, 8)),
        ValueError, "cube", "(2, 4, 8)", "the default without video_shape", "pass video_shape",
    ),
    (
        dict(kv_cube=(2, 4, 8)),
        ValueError, "kv_cube", "(2, 4, 8)", "None without kv_video_shape", "pass kv_video_shape",
    ),
    (
        dict(kv_video_shape=SHAPE, kv_cube=(2, 4, 4)),
        ValueError, "kv_cube", "volume 32", "64", "pass kv_cube=",
    ),
    (
        dict(kv_video_shape=(90,)),
        ValueError, "kv_video_shape", "1 sizes", "3 (t, h, w)", "pass kv_video_shape=",
    ),
    (
        LINEAR_KEYS,
        ValueError, "key", "70 tokens", "90 = 3 * 5 * 6 tokens for kv_video_shape", "kv_video_shape",
    ),
    (dict(return_lse="yes"), TypeError, "return_lse", "'yes' (str)", "True or False", "bool(return_lse)"),
    (dict(check=None), TypeError, "check", "None", "True or False", "bool(check)"),
    (
        dict(check=True, kv_num_blocks=int32(1, 3).expand(1, 2, 2)),
        ValueError, "kv_num_blocks", "3 at [0, 0, 1]", "to max_blocks = 2", "clamp",
    ),
    (
        dict(check=True, kv_num_blocks=int32(1, -1).expand(1, 2, 2)),
        ValueError, "kv_num_blocks", "-1 at [0, 0, 1]", "counts from 0", "clamp",
    ),
    (
        dict(check=True, kv_indices=index([0, 2])),
        ValueError, "kv_indices", "2 at [0, 0, 0, 1]", "from 0 to 1", "check kv_video_shape",
    ),
    (
        dict(check=True, kv_indices=index([-1, 0])),
        ValueError, "kv_indices", "-1 at [0, 0, 0, 0]", "from 0 to 1", "kv_num_blocks",
    ),
    (
        dict(check=True, kv_indices=index([1, 0])),
        ValueError, "kv_indices", "0 at [0, 0, 0, 1]", "ascending order", "sort",
    ),
    (
        dict(check=True, kv_indices=index([1, 1])),
        ValueError, "kv_indices", "1 at [0, 0, 0, 1]", "distinct", "sort",
    ),
    (
        dict(check=True, block_sizes=int32(64, 65)),
        ValueError, "block_sizes", "65 at [1]", "from 0 to 64", "clamp(0, 64)",
    ),
    (
        dict(check=True, q_block_sizes=int32(-1, 5)),
        ValueError, "q_block_sizes", "-1 at [0]", "from 0 to 64", "clamp(0, 64)",
    ),
]  # fmt: skip


def identify(row):
    changes, kind, name, got, *_ = row
    return f"{name}-{got}".replace(" ", "_")


def assert_raises(function, arguments, row):
    changes, kind, name, got, expected, fix = row
    for argument, change in changes.items():
        arguments[argument] = change(arguments[argument]) if callable(change) else change
    with pytest.raises(kind) as raised:
        function(**arguments)
    assert type(raised.value) is kind
    parts = re.fullmatch(r"([\w, ]+): got (.+), expected (.+?); (.+)", str(raised.value), re.DOTALL)
    assert parts, f"message without the four parts: {raised.value}"
    assert parts[1] == name
    assert got in parts[2], f"{got!r} not in {parts[2]!r}"
    assert expected in parts[3], f"{expected!r} not in {parts[3]!r}"
    assert fix in parts[4], f"{fix!r} not in {parts[4]!r}"


@pytest.mark.parametrize("row", BOTH + VIDEO, ids=identify)
def test_video_sparse_attention(row, seed):
    assert_raises(video_sparse_attention, video_arguments(), row)


@pytest.mark.parametrize("row", BOTH + BLOCK, ids=identify)
def test_block_sparse_attention(row, seed):
    assert_raises(block_sparse_attention, block_arguments(), row)


@pytest.mark.parametrize(
    "arguments, function",
    [(video_arguments, video_sparse_attention), (block_arguments, block_sparse_attention)],
)
def test_good_arguments_pass(arguments, function, seed):
    """The rows above differ from these by their change alone."""
    assert function(**arguments()).shape == (1, TOKENS, 2, 64)


def test_unlisted_entries_are_not_checked(seed):
    arguments = block_arguments() | dict(kv_num_blocks=int32(1, 0).expand(1, 2, 2), kv_indices=index([1, -7]))
    assert block_sparse_attention(**arguments, check=True).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_takes_half_precision_only(dtype):
    """On the CPU both pass; the message is the one that a CUDA tensor gets."""

    class OnCuda:
        device = torch.device("cuda", 0)

    x = OnCuda()
    x.dtype = dtype
    with pytest.raises(
        TypeError, match=rf"query: got {dtype} on cuda, expected bfloat16 or float16; call query.to"
    ):
        checks.check_dtype_device("query", x)
    x.dtype = torch.float16
    checks.check_dtype_device("query", x)


def test_other_devices_raise():
    class OnXla:
        device = torch.device("xla", 0)
        dtype = torch.bfloat16

    with pytest.raises(
        ValueError, match=r'query: got device xla:0, expected a cuda or cpu tensor; call query.to\("cuda"\)'
    ):
        checks.check_dtype_device("query", OnXla())
