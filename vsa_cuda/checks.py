"""Argument checks. Every message reads `argument: got ..., expected ...; fix`."""

import functools
import math
from typing import NoReturn

import torch

from vsa_cuda.geometry import CUBE_VOLUME

HEAD_DIMS = (64, 128)
HALF_DTYPES = (torch.bfloat16, torch.float16)
CPU_DTYPES = (*HALF_DTYPES, torch.float32, torch.float64)
# TMA takes strides in multiples of 16 bytes: 8 elements of a 2-byte type. The CPU keeps the same rule.
STRIDE_MULTIPLE = 8
BASE_ALIGNMENT = 16


def fail(kind: type[Exception], name: str, got: object, expected: str, fix: str) -> NoReturn:
    raise kind(f"{name}: got {got}, expected {expected}; {fix}")


def check_layout(layout: str) -> None:
    if layout not in ("bshd", "bhsd"):
        fail(ValueError, "layout", repr(layout), '"bshd" or "bhsd"', 'pass layout="bshd" for [B, S, H, D]')


def check_tensor(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        fail(TypeError, name, type(x).__name__, "a torch.Tensor", f"pass {name} as a tensor")
    # By name: importing torch.distributed.tensor costs seconds.
    if type(x).__name__ == "DTensor":
        fail(
            TypeError,
            name,
            "a DTensor",
            "a plain tensor: the op has no sharding rule",
            f"shard batch or heads and pass {name}.to_local()",
        )
    if not torch.compiler.is_compiling() and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        fail(
            NotImplementedError,
            name,
            "a tangent (forward-mode AD: torch.func.jvp, dual tensors)",
            "a tensor without one",
            "use reverse mode: backward, torch.autograd.grad or torch.func.vjp",
        )


def check_query_key_value(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: str) -> None:
    """Rank, dtype, device, head_dim, strides; equal batch, heads, head_dim; key and value of one shape."""
    axes = "[B, S, H, D]" if layout == "bshd" else "[B, H, S, D]"
    heads = 2 if layout == "bshd" else 1
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            fail(
                ValueError,
                name,
                f"{x.dim()} dimensions {tuple(x.shape)}",
                f"4 dimensions {axes} for layout={layout!r}",
                f"reshape {name}, for instance with .unflatten(-1, (heads, head_dim))",
            )
    check_dtype_device("query", query)
    for name, x in (("key", key), ("value", value)):
        check_like_query(name, x, query)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if any(size == 0 for size in x.shape):
            fail(
                ValueError,
                name,
                f"shape {tuple(x.shape)}",
                f"{axes} with no empty dimension",
                f"skip empty {name}",
            )
        if x.shape[3] not in HEAD_DIMS:
            fail(
                ValueError,
                name,
                f"head_dim {x.shape[3]}",
                f"head_dim {HEAD_DIMS[0]} or {HEAD_DIMS[1]} as the last dimension of {axes}",
                "zero-pad head_dim to the next of them and pass scale=head_dim**-0.5 of the original",
            )
        for dim, axis in ((0, "batch"), (heads, "heads"), (3, "head_dim")):
            if x.shape[dim] != query.shape[dim]:
                fail(
                    ValueError,
                    name,
                    f"{axis} {x.shape[dim]} in shape {tuple(x.shape)}",
                    f"{query.shape[dim]} as in query {tuple(query.shape)}",
                    "repeat the key and value heads" if axis == "heads" else f"make {axis} agree",
                )
        check_strides(name, x)
    if value.shape != key.shape:
        fail(
            ValueError,
            "value",
            f"shape {tuple(value.shape)}",
            f"the shape of key {tuple(key.shape)}",
            f"key and value hold the same tokens: check the layout ({layout!r}) and the sequence length",
        )


def check_dtype_device(name: str, x: torch.Tensor) -> None:
    kind = x.device.type
    if kind not in ("cuda", "cpu", "meta"):
        fail(ValueError, name, f"device {x.device}", "a cuda or cpu tensor", f'call {name}.to("cuda")')
    if x.dtype in HALF_DTYPES or (kind != "cuda" and x.dtype in CPU_DTYPES):
        return
    expected = "bfloat16 or float16" if kind == "cuda" else "bfloat16, float16, float32 or float64"
    fail(
        TypeError,
        name,
        f"{x.dtype} on {kind}",
        expected,
        f"call {name}.to(torch.bfloat16), or run under torch.autocast so that the projections give bfloat16",
    )


def check_like_query(name: str, x: torch.Tensor, query: torch.Tensor) -> None:
    """Same dtype and device as query."""
    if x.dtype != query.dtype:
        fail(
            TypeError,
            name,
            f"{x.dtype}",
            f"{query.dtype} as in query",
            f"call {name}.to({query.dtype}), or run under torch.autocast",
        )
    check_same_device(name, x, query)


def check_same_device(name: str, x: torch.Tensor, query: torch.Tensor) -> None:
    if x.device != query.device:
        fail(
            ValueError,
            name,
            f"device {x.device}",
            f"the device of query, {query.device}",
            f'call {name}.to("{query.device}")',
        )


def check_strides(name: str, x: torch.Tensor) -> None:
    """What TMA can address: see STRIDE_MULTIPLE. The base address is checked inside the ops."""
    if x.stride(3) != 1:
        fail(
            ValueError,
            name,
            f"stride {x.stride(3)} of head_dim (strides {tuple(x.stride())})",
            "a contiguous head_dim, stride 1",
            f"call {name}.contiguous()",
        )
    for dim in range(3):
        if x.shape[dim] > 1 and x.stride(dim) % STRIDE_MULTIPLE != 0:
            fail(
                ValueError,
                name,
                f"stride {x.stride(dim)} of dimension {dim} (strides {tuple(x.stride())})",
                f"strides that are multiples of {STRIDE_MULTIPLE} elements for dimensions longer than 1",
                f"call {name}.contiguous()",
            )


def check_base(name: str, x: torch.Tensor) -> None:
    if x.data_ptr() % BASE_ALIGNMENT != 0:
        fail(
            ValueError,
            name,
            f"a base address {x.data_ptr() % BASE_ALIGNMENT} bytes past a multiple of {BASE_ALIGNMENT} "
            f"(storage offset {x.storage_offset()})",
            f"a base aligned to {BASE_ALIGNMENT} bytes",
            f"call {name}.clone(), or slice at a multiple of {STRIDE_MULTIPLE} elements",
        )


def check_num_tokens(
    name: str, x: torch.Tensor, dim: int, shape: tuple[int, int, int], shape_name: str
) -> None:
    t, h, w = shape
    if x.shape[dim] != t * h * w:
        fail(
            ValueError,
            name,
            f"{x.shape[dim]} tokens in dimension {dim} of shape {tuple(x.shape)}",
            f"{t * h * w} = {t} * {h} * {w} tokens for {shape_name} {tuple(shape)}",
            f"pass the (T, H, W) of {name}'s tokens as {shape_name}, and check the layout",
        )


def check_topk(topk: int) -> None:
    if isinstance(topk, bool) or not isinstance(topk, (int, torch.SymInt)):
        fail(TypeError, "topk", f"{type(topk).__name__}", "an int", "pass topk=int(topk)")
    if topk < 1:
        fail(ValueError, "topk", topk, "at least 1 cube", "pass topk=1 or more; topk >= cubes is dense")


def check_one_of(first: str, first_value: object, second: str, second_value: object, fix: str) -> None:
    if (first_value is None) == (second_value is None):
        got = "neither" if first_value is None else "both"
        fail(ValueError, f"{first}, {second}", got, "exactly one of the two", fix)


def check_all_or_none(arguments: dict[str, object]) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given and len(given) < len(arguments):
        missing = [name for name in arguments if name not in given]
        fail(
            ValueError,
            ", ".join(missing),
            f"None with {', '.join(given)}",
            "all of them or none",
            "pass what is missing, or None for all",
        )


def check_scale(scale: float) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        fail(TypeError, "scale", type(scale).__name__, "a float or None", "pass scale=float(scale)")
    if not (0.0 < scale and scale < math.inf):
        fail(ValueError, "scale", scale, "a finite number above 0", "pass None for head_dim**-0.5")


def check_bool(name: str, x: bool, *, optional: bool = False) -> None:
    if not (isinstance(x, bool) or (optional and x is None)):
        expected = "True, False or None" if optional else "True or False"
        fail(TypeError, name, f"{x!r} ({type(x).__name__})", expected, f"pass {name}=bool({name})")


def check_gate(name: str, gate: torch.Tensor | float | None, query: torch.Tensor) -> None:
    """None, a finite float, a 0-d floating tensor, or a tensor with the shape and dtype of query."""
    if gate is None:
        return
    if not isinstance(gate, torch.Tensor):
        if isinstance(gate, bool) or not isinstance(gate, (int, float, torch.SymFloat, torch.SymInt)):
            fail(
                TypeError,
                name,
                type(gate).__name__,
                "a tensor, a float or None",
                f"pass {name}=float({name})",
            )
        if not (-math.inf < gate and gate < math.inf):
            fail(ValueError, name, gate, "a finite float", f"check where {name} comes from")
        return
    check_tensor(name, gate)
    check_same_device(name, gate, query)
    if gate.dim() == 0:
        if not gate.is_floating_point():
            fail(TypeError, name, f"a 0-d {gate.dtype}", "a floating 0-d tensor", f"call {name}.float()")
        return
    if gate.shape != query.shape:
        fail(
            ValueError,
            name,
            f"shape {tuple(gate.shape)}",
            f"the shape of query {tuple(query.shape)}, or a 0-d tensor",
            f"call {name}.expand_as(query), or .unflatten(-1, (heads, head_dim)) after a projection",
        )
    check_like_query(name, gate, query)


def check_index(
    kv_num_blocks: torch.Tensor, kv_indices: torch.Tensor, query: torch.Tensor, rows: tuple[int, int, int]
) -> None:
    """int32 [B, H, Nq] and [B, H, Nq, max_blocks] on the device of query; rows is (B, H, Nq)."""
    for name, x in (("kv_num_blocks", kv_num_blocks), ("kv_indices", kv_indices)):
        check_int32(name, x, query)
    if tuple(kv_num_blocks.shape) != rows:
        fail(
            ValueError,
            "kv_num_blocks",
            f"shape {tuple(kv_num_blocks.shape)}",
            f"[B, H, query blocks] = {rows}",
            "give every batch entry and head its row, with .expand(batch, heads, -1) for shared lists",
        )
    if kv_indices.dim() != 4 or tuple(kv_indices.shape[:3]) != rows:
        fail(
            ValueError,
            "kv_indices",
            f"shape {tuple(kv_indices.shape)}",
            f"[B, H, query blocks, max_blocks] = {(*rows, 'max_blocks')}",
            "give every batch entry and head its rows, with .expand(batch, heads, -1, -1) for shared lists",
        )
    if kv_indices.shape[3] < 1:
        fail(
            ValueError,
            "kv_indices",
            f"max_blocks 0 in shape {tuple(kv_indices.shape)}",
            "max_blocks of at least 1",
            "pass one column of zeros with kv_num_blocks 0 for empty lists",
        )


def check_int32(name: str, x: torch.Tensor, query: torch.Tensor) -> None:
    check_tensor(name, x)
    if x.dtype != torch.int32:
        fail(TypeError, name, f"{x.dtype}", "torch.int32", f"call {name}.to(torch.int32)")
    check_same_device(name, x, query)


def check_block_sizes(name: str, sizes: torch.Tensor | None, query: torch.Tensor, blocks: int) -> None:
    """None or int32 [blocks] on the device of query."""
    if sizes is None:
        return
    check_int32(name, sizes, query)
    if tuple(sizes.shape) != (blocks,):
        fail(
            ValueError,
            name,
            f"shape {tuple(sizes.shape)}",
            f"one size per block, [{blocks}]",
            f"pass {name} as int32 of shape [{blocks}]: it is shared by batch and heads",
        )


def check_index_values(
    kv_num_blocks: torch.Tensor,
    kv_indices: torch.Tensor,
    num_kv_blocks: int,
    block_sizes: torch.Tensor | None,
    q_block_sizes: torch.Tensor | None,
) -> None:
    """Counts in [0, max_blocks], listed indices ascending in [0, num_kv_blocks), sizes in [0, 64].

    Reads the tensors: synchronises, and raises RuntimeError under torch.compile.
    """
    if torch.compiler.is_compiling():
        fail(
            RuntimeError,
            "check",
            "check=True under torch.compile",
            "check=False: the check reads index values on the host",
            "check the index once outside the compiled region",
        )
    max_blocks = kv_indices.shape[3]
    _check_values(
        "kv_num_blocks",
        kv_num_blocks,
        (kv_num_blocks < 0) | (kv_num_blocks > max_blocks),
        f"counts from 0 to max_blocks = {max_blocks}",
        "clamp it, or widen kv_indices",
    )
    listed = torch.arange(max_blocks, device=kv_indices.device) < kv_num_blocks[..., None]
    _check_values(
        "kv_indices",
        kv_indices,
        listed & ((kv_indices < 0) | (kv_indices >= num_kv_blocks)),
        f"key blocks from 0 to {num_kv_blocks - 1}",
        "check kv_video_shape and kv_cube, or kv_num_blocks",
    )
    disorder = torch.zeros_like(listed)
    disorder[..., 1:] = listed[..., 1:] & (kv_indices[..., 1:] <= kv_indices[..., :-1])
    _check_values(
        "kv_indices",
        kv_indices,
        disorder,
        "distinct key blocks in ascending order in every row",
        "sort the listed part: kv_indices.sort(dim=-1).values where rows are full",
    )
    for name, sizes in (("block_sizes", block_sizes), ("q_block_sizes", q_block_sizes)):
        if sizes is not None:
            _check_values(
                name,
                sizes,
                (sizes < 0) | (sizes > CUBE_VOLUME),
                f"sizes from 0 to {CUBE_VOLUME}",
                f"clamp it: {name}.clamp(0, {CUBE_VOLUME})",
            )


def _check_values(name: str, x: torch.Tensor, wrong: torch.Tensor, expected: str, fix: str) -> None:
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        fail(ValueError, name, f"{x[position].item()} at {list(position)}", expected, fix)


@functools.cache
def check_gpu(index: int) -> None:
    """Raises RuntimeError unless CUDA device `index` is sm_90, the only one the kernels are built for."""
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) != (9, 0):
        fail(
            RuntimeError,
            "device",
            f"cuda:{index} {torch.cuda.get_device_name(index)} (sm_{major}{minor})",
            "an sm_90 GPU (H100, H200, GH200)",
            "run there, or move the tensors to the CPU for the reference",
        )
