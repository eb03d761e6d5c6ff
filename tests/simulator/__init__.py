"""Runs the PTX of a Hopper kernel on the CPU, under an adversarial schedule. See README.md."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulator.engine_build import BUILD, find_nvcc, load_engine

__all__ = ["Report", "SimulationError", "compile_ptx", "simulate"]

PTX_FLAGS = [
    "-ptx",
    "-gencode",
    "arch=compute_90a,code=compute_90a",
    "-std=c++20",
    "-O3",
    "-lineinfo",
    "--expt-relaxed-constexpr",
]
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
RESIDENT_CTAS = 4


class SimulationError(Exception):
    """A fault of the simulated kernel.

    kind: race, uninitialised, out-of-bounds, misaligned, wgmma-register, missing-fence, barrier, deadlock,
    exit, bulk-read, unknown-instruction, limit or unsupported; see README.md.
    cta, warp, lane: where, -1 if nowhere.
    ptx_line: line of the PTX text; source_line: "file:line" where -lineinfo gives it.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        kernel: str,
        cta: int,
        warp: int,
        lane: int,
        ptx_line: int,
        source_line: str,
    ):
        self.kind, self.message, self.kernel = kind, message, kernel
        self.cta, self.warp, self.lane = cta, warp, lane
        self.ptx_line, self.source_line = ptx_line, source_line
        where = [
            f"{name} {value}" for name, value in (("CTA", cta), ("warp", warp), ("lane", lane)) if value >= 0
        ]
        if ptx_line >= 0:
            where.append(f"PTX line {ptx_line}")
        if source_line:
            where.append(source_line)
        super().__init__(f"[{kind}] {kernel}: {message} ({', '.join(where)})")


@dataclass(frozen=True)
class Report:
    """What one launch did.

    instructions: warp-instructions executed; opcodes: the same per PTX opcode; shared_bytes: of one CTA;
    unwritten: index of a "w" memory -> bytes that no thread wrote; barrier_phases: mbarrier phases completed;
    async_copies: bulk and tensor copies; matrix_products: wgmma and mma instructions.
    """

    instructions: int
    opcodes: dict[str, int]
    shared_bytes: int
    unwritten: dict[int, int] = field(default_factory=dict)
    barrier_phases: int = 0
    async_copies: int = 0
    matrix_products: int = 0


@functools.cache
def engine():
    return load_engine()


def compile_ptx(
    path: str | Path, include_dirs: Iterable[str | Path] = (), defines: Iterable[str] = ()
) -> str:
    """PTX text of a .cu file for sm_90a, with line information; cached until a source changes.

    Raises RuntimeError with the compiler's output.
    """
    nvcc, path = find_nvcc(), Path(path).resolve()
    flags = [*(f"-I{directory}" for directory in include_dirs), *(f"-D{define}" for define in defines)]
    command = [nvcc, *PTX_FLAGS, *flags, str(path)]
    cached = BUILD / "ptx" / f"{path.stem}-{hashlib.sha256(repr(command).encode()).hexdigest()[:16]}.json"
    try:
        made = json.loads(cached.read_text())
        if all(_digest(name) == digest for name, digest in made["sources"].items()):
            return made["ptx"]
    except OSError:
        pass  # never compiled, or an included file is gone
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as directory:
        ptx, depends, complete = (Path(directory) / name for name in ("out.ptx", "depends", "complete"))
        _execute([*command, "-MD", "-MF", str(depends), "-o", str(ptx)])
        names = depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        made = {"sources": {name: _digest(name) for name in names}, "ptx": ptx.read_text()}
        complete.write_text(json.dumps(made))
        os.replace(complete, cached)
    return made["ptx"]


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _execute(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")


def _span(array: Any) -> tuple[int, int]:
    """Address and bytes of a contiguous torch tensor or numpy array."""
    if hasattr(array, "data_ptr"):
        if array.device.type != "cpu":
            raise ValueError(f"memory: got a tensor on {array.device}, expected CPU tensors")
        storage = array.untyped_storage()
        if not array.is_contiguous():  # strided views: the whole storage is visible
            return storage.data_ptr(), storage.nbytes()
        return array.data_ptr(), array.numel() * array.element_size()
    if not array.flags["C_CONTIGUOUS"]:
        raise ValueError("memory: got a numpy array that is not contiguous, expected a contiguous one")
    return array.ctypes.data, array.nbytes


def _map(plan: Any) -> dict[str, Any]:
    if plan.element_type not in ELEMENT_BYTES:
        raise ValueError(f"element_type: got {plan.element_type!r}, expected one of {sorted(ELEMENT_BYTES)}")
    return {
        "address": plan.address,
        "element_type": plan.element_type,
        "element_bytes": ELEMENT_BYTES[plan.element_type],
        "extents": list(plan.extents),
        "strides": list(plan.strides),
        "box": list(plan.box),
        "swizzle": plan.swizzle,
    }


def simulate(
    ptx: str | Sequence[str],
    plan: Any,
    memory: Sequence[Any],
    *,
    seed: int = 0,
    max_steps: int | None = None,
    resident_ctas: int = RESIDENT_CTAS,
) -> Report:
    """Execute one launch; global memory is the host memory of `memory`, changed in place.

    ptx: module text, or several. plan: csrc/launch's LaunchPlan or anything with its attributes.
    memory: CPU tensors or arrays, or (array, "r") read-only, (array, "w") not written yet.
    seed: schedule of warps and of asynchronous operations. max_steps: most warp-instructions.
    resident_ctas: CTAs interleaved, in grid order.
    Raises SimulationError for a fault of the kernel.
    """
    texts = [ptx] if isinstance(ptx, str) else list(ptx)
    spans = []
    for entry in memory:
        array, mode = entry if isinstance(entry, tuple) else (entry, "rw")
        if mode not in ("r", "w", "rw"):
            raise ValueError(f'memory mode: got {mode!r}, expected "r", "w" or none')
        spans.append((*_span(array), mode))
    launch = {
        "kernel": plan.kernel,
        "grid": list(plan.grid),
        "block": list(plan.block),
        "cluster": list(plan.cluster),
        "shared_bytes": plan.shared_bytes,
        "params": bytes(plan.params),
        "maps": [_map(item) for item in plan.maps],
    }
    result = engine().run(texts, launch, spans, seed, max_steps or 0, resident_ctas)
    if "fault" in result:
        raise SimulationError(**result["fault"])
    return Report(**result)
