"""Ceilings of this GPU, measured now: matrix product, copy, L2-to-SMEM gather, fp32 reduction into L2."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.machine import ROOT
from bench.rows import Row
from bench.timing import interleave

HERE = Path(__file__).resolve().parent
PROGRAMS = ("gather", "reduce")
_MATRIX = 8192
_COPY_BYTES = 8 << 30  # read and written


@dataclass(frozen=True)
class Ceilings:
    """None where a ceiling was not measured. Bandwidths in TB/s; a copy counts bytes read and written."""

    matmul_tflops: float | None = None
    copy_tb_per_s: float | None = None
    gather_tb_per_s: float | None = None
    reduce_tb_per_s: float | None = None

    @classmethod
    def from_rows(cls, rows: list[Row]) -> "Ceilings":
        """The best of each kind: what a kernel could at most reach."""
        best: dict[str, float] = {}
        for row in rows:
            if row.op != "roofline" or row.status != "ok":
                continue
            kind = row.case.partition(" ")[0].rstrip(",")
            # A gather of lists that are all alike says nothing about lists that are not.
            if kind == "matmul":
                best["matmul_tflops"] = max(best.get("matmul_tflops", 0.0), row.tflops)
            elif kind in ("copy", "reduce") or row.case.startswith("gather cubes random"):
                best[f"{kind}_tb_per_s"] = max(best.get(f"{kind}_tb_per_s", 0.0), row.tb_per_s)
        return cls(**best)


def find_nvcc():
    """The compiler that the build would use. Raises csrc/toolchain/nvcc.py's NvccNotFound."""
    spec = importlib.util.spec_from_file_location("bench_nvcc", ROOT / "csrc" / "toolchain" / "nvcc.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.find_nvcc()


def compile_program(name: str, folder: Path, extra: tuple[str, ...] = ()) -> Path:
    """Compiles roofline/<name>.cu for sm_90a into `folder`; raises RuntimeError with nvcc's message."""
    nvcc, target = find_nvcc(), folder / name
    command = [str(nvcc.path), "-std=c++20", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", *extra]
    command += [f"-I{ROOT / 'csrc'}", "-o", str(target), str(HERE / f"{name}.cu")]
    result = subprocess.run(command, capture_output=True, text=True, env=nvcc.environment())
    if result.returncode:
        raise RuntimeError(f"roofline: {name}.cu does not compile\n{result.stderr}")
    return target


def run_programs() -> dict[str, list[dict]]:
    """Compiles both programs, runs one after the other and returns what they print."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        paths = dict(
            zip(PROGRAMS, pool.map(lambda name: compile_program(name, Path(folder)), PROGRAMS), strict=True)
        )
        return {name: _run(path) for name, path in paths.items()}


def _run(path: Path) -> list[dict]:
    result = subprocess.run([str(path)], capture_output=True, text=True, timeout=120)
    if result.returncode:
        raise RuntimeError(f"roofline: {path.name} failed: {result.stderr.strip()}")
    return json.loads(result.stdout)


def case_name(program: str, found: dict) -> str:
    if program == "gather":
        ring = f"{found['ctas_per_sm']} CTA/SM, {found['stages']} stages"
        return f"gather {found['blocks']} {found['lists']} lists, {ring}"
    beside = " beside loads" if found["with_loads"] else ""
    return f"reduce{beside}, {found['pieces']} a tile"


def torch_cases(device: torch.device, budget_s: float) -> list[dict]:
    """Matrix product of random bf16 and a copy, by PyTorch."""
    a, b = (torch.randn(_MATRIX, _MATRIX, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    matmul = interleave({"matmul": lambda: torch.mm(a, b, out=product)}, device, budget_s=budget_s)["matmul"]
    source = torch.zeros(_COPY_BYTES // 2, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    # Not as a graph: its memcpy node takes another path than cudaMemcpyAsync, at half the rate for a node of
    # exactly 512 MiB, 1 GiB or 2 GiB (pytorch issue 191284).
    copies = {"copy": lambda: target.copy_(source)}
    copy = interleave(copies, device, budget_s=budget_s, graphs=False)["copy"]
    return [
        {"case": f"matmul {_MATRIX}", "timing": matmul, "tflops": 2 * _MATRIX**3 / matmul.median / 1e9},
        {"case": "copy", "timing": copy, "tb_per_s": _COPY_BYTES / copy.median / 1e9},
    ]
