"""What the demo measures: attention mass, error against dense attention, time, memory."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from vsa_cuda.geometry import CubeGrid

Result = TypeVar("Result")


@dataclass(frozen=True)
class Mass:
    """Mean share of dense attention, 0 to 1, inside k cubes a query cube."""

    chosen: float  # the k cubes that VSA chose
    random: float  # k cubes drawn at random
    best: float  # the k cubes that hold the most: no choice of k whole cubes a query cube does better
    query_cubes: int  # query cubes averaged over, all heads together


def cube_mass(query: torch.Tensor, key: torch.Tensor, grid: CubeGrid, head: int, cube: int) -> torch.Tensor:
    """Share of dense attention that each cube holds for the tokens of one query cube, float32 [N]; sums to 1.

    query, key: [1, S, H, D]. Softmax in fp32 over all S keys with scale D**-0.5; memory 64 x S.
    """
    rows = grid.token_index(query.device)[cube][grid.valid(query.device)[cube]]
    scores = query[0, rows, head].float() @ key[0, :, head].float().T * query.shape[-1] ** -0.5
    mean = scores.softmax(-1).mean(0)
    return mean.new_zeros(grid.num_cubes).index_add_(0, grid.cube_of_token(query.device), mean)


def attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    grid: CubeGrid,
    kv_num_blocks: torch.Tensor,
    kv_indices: torch.Tensor,
    samples: int,
    seed: int = 0,
) -> Mass:
    """Mass in the chosen cubes, over `samples` random query cubes of every head.

    query, key: [1, S, H, D]; kv_num_blocks int32 [1, H, N]; kv_indices int32 [1, H, N, max_blocks].
    """
    generator = torch.Generator().manual_seed(seed)
    totals = torch.zeros(3, dtype=torch.float64)
    count = 0
    for head in range(query.shape[2]):
        for cube in torch.randperm(grid.num_cubes, generator=generator)[:samples].tolist():
            mass = cube_mass(query, key, grid, head, cube).double().cpu()
            blocks = int(kv_num_blocks[0, head, cube])
            chosen = kv_indices[0, head, cube, :blocks].long().cpu()
            random = torch.randperm(grid.num_cubes, generator=generator)[:blocks]
            totals += torch.stack([mass[chosen].sum(), mass[random].sum(), mass.topk(blocks).values.sum()])
            count += 1
    chosen_mean, random_mean, best_mean = (totals / count).tolist()
    return Mass(chosen_mean, random_mean, best_mean, count)


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """PyTorch's scaled_dot_product_attention on [B, S, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    got, expected = got.detach().float(), expected.detach().float()
    return float((got - expected).norm() / expected.norm())


def timed(call: Callable[[], Result], device: torch.device, repeats: int) -> tuple[float, Result]:
    """Seconds that call() takes (median of `repeats`) and its last result. CUDA events on a GPU."""
    seconds = []
    for _ in range(repeats):
        result = None  # frees what the call before made: peak memory is of one call
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = call()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            result = call()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def peak_bytes(device: torch.device) -> int:
    """Peak memory: of PyTorch's allocator since the last reset on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
