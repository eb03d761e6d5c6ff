"""Whether to build the extension, and with which nvcc.

Standard library only: setup.py, the build backend and the tests use it.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

OLDEST = (12, 5)  # cudaGetDriverEntryPointByVersion, the cuda::ptx wrappers of TMA
SEARCHED = "$CUDACXX, $CUDA_HOME/bin, $PATH, /usr/local/cuda/bin, nvidia/cu13/bin on sys.path"


def build_enabled(env=os.environ, platform=sys.platform) -> bool:
    """Whether a build compiles the extension: on Linux, the only system with this compiler and Hopper, unless
    VSA_CUDA_BUILD=0."""
    choice = env.get("VSA_CUDA_BUILD", "1")
    if choice not in ("0", "1"):
        raise ValueError(f"VSA_CUDA_BUILD: got {choice!r}, expected 0 (pure Python) or 1 (with kernels)")
    return choice == "1" and platform == "linux"


class NvccNotFound(RuntimeError):
    pass


@dataclass(frozen=True)
class Nvcc:
    path: Path

    def toolkit(self) -> Path:
        """The folder of include/ and lib/, by nvcc's own account: its path may be a link or a script."""
        command = [self.path, "--dryrun", "-x", "cu", "-c", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        (top,) = (line.removeprefix("#$ TOP=") for line in log.splitlines() if line.startswith("#$ TOP="))
        return Path(top).resolve()

    def environment(self, base=os.environ) -> dict[str, str]:
        """`base` plus what linking needs: PyPI wheels keep the runtime in lib/, nvcc looks in lib64/."""
        env, toolkit = dict(base), self.toolkit()
        if not (toolkit / "lib64").is_dir():
            known = env.get("LIBRARY_PATH")
            env["LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(toolkit / "lib"), known]))
        return env

    def version(self) -> tuple[int, int]:
        text = subprocess.run([self.path, "--version"], capture_output=True, text=True, check=True).stdout
        major, minor = text.split("release ")[1].split(",")[0].split(".")
        return int(major), int(minor)


def candidates(env=os.environ, path=None, toolkit="/usr/local/cuda"):
    """Where nvcc may be, best first. `path` is a sys.path."""
    if env.get("CUDACXX"):
        named = shutil.which(env["CUDACXX"], path=env.get("PATH"))
        if named is None:
            raise NvccNotFound(f"CUDACXX={env['CUDACXX']!r} is not an executable; correct or unset it")
        yield named
    if env.get("CUDA_HOME"):
        yield os.path.join(env["CUDA_HOME"], "bin", "nvcc")
    on_path = shutil.which("nvcc", path=env.get("PATH", ""))
    if on_path:
        yield on_path
    yield os.path.join(toolkit, "bin", "nvcc")
    for folder in sys.path if path is None else path:
        yield os.path.join(folder or ".", "nvidia", "cu13", "bin", "nvcc")


def find_nvcc(env=os.environ, path=None, toolkit="/usr/local/cuda") -> Nvcc:
    """The first nvcc of the search order; NvccNotFound names the places and the ways out."""
    for candidate in candidates(env, path, toolkit):
        if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            found, target = Path(candidate).absolute(), Path(candidate).resolve()
            return Nvcc(target if target.name == "nvcc" else found)  # a link to ccache stays a link
    raise NvccNotFound(
        f"no nvcc in {SEARCHED}. Set CUDACXX, or install NVIDIA's wheels with\n"
        "  pip install -r third_party/nvidia-compiler.txt\n"
        "or build without kernels: VSA_CUDA_BUILD=0"
    )
