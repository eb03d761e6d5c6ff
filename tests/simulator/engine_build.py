"""Builds the engine with the host's C++ compiler on first use, into build/simulator, keyed by its sources."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ENGINE = Path(__file__).parent / "engine"
REPOSITORY = Path(__file__).parents[2]
BUILD = REPOSITORY / "build" / "simulator"
FLAGS = [
    "-std=c++20",
    "-O2",
    "-march=native",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
]
EXTRA_FLAGS = {"float.cpp": ["-frounding-math"], "products.cpp": ["-O3"]}
JOBS = 2


def compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise RuntimeError(
        "no C++ compiler: the simulator needs g++ or clang++ with C++20 on PATH, or CXX to name one"
    )


def host() -> str:
    """Processor features that -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def digest(command: list[str]) -> str:
    state = hashlib.sha256("\0".join([*command, host(), sys.version]).encode())
    for path in sorted(ENGINE.iterdir()):
        if path.suffix in (".h", ".cpp"):
            state.update(path.name.encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:16]


@functools.cache
def find_nvcc() -> str:
    """The compiler that csrc/toolchain finds for the build."""
    path = REPOSITORY / "csrc" / "toolchain" / "nvcc.py"
    spec = importlib.util.spec_from_file_location("simulator_nvcc", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return str(module.find_nvcc().path)


def load_engine() -> ModuleType:
    import pybind11

    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    command = [compiler(), *FLAGS, *include]
    library = BUILD / digest(command) / f"simulator_engine{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with open(BUILD / "engine.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                build(command, library)
    spec = importlib.util.spec_from_file_location("simulator_engine", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(command: list[str], library: Path) -> None:
    """Compiles changed sources only: objects are keyed by their text, the headers and the flags."""
    objects = BUILD / "objects"
    objects.mkdir(exist_ok=True)
    library.parent.mkdir(exist_ok=True)
    headers = b"".join(path.read_bytes() for path in sorted(ENGINE.glob("*.h")))

    def compile_one(source: Path) -> Path:
        flags = EXTRA_FLAGS.get(source.name, [])
        key = hashlib.sha256(
            "\0".join([*command, *flags, host()]).encode() + headers + source.read_bytes()
        ).hexdigest()
        target = objects / f"{source.stem}-{key[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(".partial.o")
            execute([*command, *flags, "-c", str(source), "-o", str(partial)])
            partial.rename(target)
        return target

    with ThreadPoolExecutor(JOBS) as pool:
        built = list(pool.map(compile_one, sorted(ENGINE.glob("*.cpp"))))
    partial = library.with_suffix(".partial")
    execute([command[0], "-shared", *map(str, built), "-o", str(partial)])
    partial.rename(library)


def execute(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"building the simulator's engine failed:\n{' '.join(command)}\n{result.stderr}")
