"""What a row says about the machine and the tree: GPU, versions, clocks, commit, hashes."""

import csv
import functools
import hashlib
import io
import re
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
GPU_QUERY = {
    "clock_sm_mhz": "clocks.sm",
    "clock_memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
}


def no_gpu_reason() -> str | None:
    """Why nothing can be measured here, or None on a Hopper GPU."""
    if not torch.cuda.is_available():
        return "torch is a CPU build" if torch.version.cuda is None else "torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"{torch.cuda.get_device_name()} is sm_{major}{minor}, expected sm_90 (Hopper)"
    return None


def gpu_state(device: torch.device) -> dict[str, float | None]:
    """Clocks, power and temperature by nvidia-smi; None where it does not say."""
    values: list[str] = []
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        values = _nvidia_smi(device, list(GPU_QUERY.values()))
    return {
        name: _number(value) for name, value in zip(GPU_QUERY, values or [""] * len(GPU_QUERY), strict=True)
    }


def _nvidia_smi(device: torch.device, fields: list[str]) -> list[str]:
    """One value a field, or an empty list where nvidia-smi does not answer."""
    index = torch.cuda.current_device() if device.index is None else device.index
    # CUDA_VISIBLE_DEVICES renumbers torch's devices; a virtual machine may not know the uuid.
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    for name in (f"GPU-{uuid}", str(index)):
        command = [
            "nvidia-smi",
            f"--query-gpu={','.join(fields)}",
            "--format=csv,noheader,nounits",
            "-i",
            name,
        ]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except subprocess.TimeoutExpired:
            return []
        rows = list(csv.reader(io.StringIO(result.stdout), skipinitialspace=True))
        if result.returncode == 0 and rows and len(rows[0]) == len(fields):
            return rows[0]
    return []


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@functools.cache
def environment(device_type: str) -> dict[str, str | bool | None]:
    """Versions and state of the tree, the same for every row of a run."""
    cuda = device_type == "cuda"
    driver = (
        _nvidia_smi(torch.device("cuda"), ["driver_version"]) if cuda and shutil.which("nvidia-smi") else []
    )
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "driver": driver[0] if driver else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": _nvcc_version(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _dirty(),
        "csrc_sha256": tree_sha256(ROOT, "csrc"),
    }


def _nvcc_version() -> str | None:
    path = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release [\d.]+, V([\d.]+)", text)
    return found[1] if found else None


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _dirty() -> bool | None:
    """Whether the tree differs from the commit, new files included; None without git."""
    status = _git("status", "--porcelain")
    return None if status is None else bool(status)


def tree_sha256(root: Path, *folders: str) -> str:
    """SHA-256 over the files under `folders` in sorted path order, each as path + NUL + bytes (DESIGN 7).

    Paths are relative to `root`, with forward slashes. Python's caches and
    built extensions are left out.
    """
    digest = hashlib.sha256()
    paths = [path for folder in folders for path in (root / folder).rglob("*")]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so":
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def file_sha256(path: Path | None) -> str | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def loaded_library(pattern: str) -> Path | None:
    """The file of a shared library that this process has loaded, by a regular expression on its name."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    for line in maps.read_text().splitlines():
        words = line.split(maxsplit=5)
        if len(words) == 6 and re.search(pattern, Path(words[5]).name) and Path(words[5]).is_file():
            return Path(words[5])
    return None
