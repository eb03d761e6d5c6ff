"""Which ceiling binds: the least time that each one allows a case, against the time it took."""

from bench.roofline import Ceilings

PEAK_TFLOPS = 989.4  # datasheet: bf16 and fp16, dense, of H100 and H200 SXM
_EXPONENTIALS_PER_CLOCK = 16 * 132
_BLOCK = 64
# The shipped backward has two passes: S and dP are computed twice (csrc/kernels/fine_backward.cuh).
_BACKWARD_MATMULS = 7 / 5


def forward_group(head_dim: int) -> int:
    """Query cubes of a CTA in the forward (fine_forward_consumers in csrc)."""
    return 2 if head_dim == 128 else 3


BACKWARD_GROUP = 2


def fine_limits(
    ceilings: Ceilings,
    *,
    flops: float,
    pairs: int,
    head_dim: int,
    tensor_bytes: int,
    loads: tuple[float, ...],
    backward: bool,
    clock_mhz: float | None,
) -> dict[str, float]:
    """Least milliseconds of the fine kernels by each ceiling that was measured.

    Args:
        flops: of the executed pairs.
        tensor_bytes: of one of q, k, v, out.
        loads: loads per pair of each pass: (forward,) or (key pass, query pass).
        clock_mhz: SM clock for the exponentials, whose rate is the datasheet's.
    """
    least = {}
    if ceilings.matmul_tflops:
        least["matmul"] = flops * (_BACKWARD_MATMULS if backward else 1) / ceilings.matmul_tflops / 1e9
    if ceilings.gather_tb_per_s:
        pair_bytes = 2 * _BLOCK * head_dim * 2
        least["gather"] = pairs * sum(loads) * pair_bytes / ceilings.gather_tb_per_s / 1e9
    if ceilings.copy_tb_per_s:
        least["memory"] = (8 if backward else 4) * tensor_bytes / ceilings.copy_tb_per_s / 1e9
    if clock_mhz:
        passes = 2 if backward else 1
        least["exponentials (datasheet)"] = (
            pairs * passes * _BLOCK**2 / _EXPONENTIALS_PER_CLOCK / clock_mhz / 1e3
        )
    return least


def memory_limit(ceilings: Ceilings, moved_bytes: int) -> dict[str, float]:
    """Least milliseconds to move so many bytes."""
    if not ceilings.copy_tb_per_s:
        return {}
    return {"memory": moved_bytes / ceilings.copy_tb_per_s / 1e9}


def binding(limits_ms: dict[str, float], ms: float) -> tuple[str | None, float | None]:
    """(name of the ceiling that allows the least speed, its time over `ms`)."""
    if not limits_ms:
        return None, None
    name = max(limits_ms, key=limits_ms.get)
    return name, limits_ms[name] / ms


def unshared_gather_tflops(ceilings: Ceilings, loads: float) -> float | None:
    """TFLOP/s of the forward at which its tiles' loads reach the gather ceiling: 64 FLOP a byte unshared."""
    return None if ceilings.gather_tb_per_s is None else _BLOCK * ceilings.gather_tb_per_s / loads
