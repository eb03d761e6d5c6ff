"""Builds vsa_cuda._C by CMake and ninja. VSA_CUDA_BUILD=0 builds a pure-Python package.

CMake writes the extension into vsa_cuda/ itself, so that an editable install always loads the latest build;
a wheel gets a copy. Rebuild in place: python setup.py build_ext --inplace
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc" / "toolchain"))
from nvcc import OLDEST, build_enabled, find_nvcc  # noqa: E402


def program(name: str, folder_attribute: str) -> str:
    """The binary inside the PyPI package `name`, else the one on PATH.

    The package's console script would need the package importable in every later call of the build tree.
    """
    try:
        package = __import__(name)
        return str(Path(getattr(package, folder_attribute)) / name)
    except ImportError:
        found = shutil.which(name)
        if found is None:
            raise RuntimeError(f"{name} not found: pip install {name}") from None
        return found


def cached(build_dir: Path, variable: str) -> str | None:
    cache = build_dir / "CMakeCache.txt"
    if cache.is_file():
        for line in cache.read_text().splitlines():
            if line.startswith(variable + ":"):
                return line.split("=", 1)[1]
    return None


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        nvcc = find_nvcc()
        version = nvcc.version()
        if version < OLDEST:
            raise RuntimeError(f"{nvcc.path}: got nvcc {version}, expected {OLDEST} or newer; set CUDACXX")
        print(f"vsa_cuda: nvcc {version[0]}.{version[1]} at {nvcc.path}", flush=True)
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake = program("cmake", "CMAKE_BIN_DIR")
        # Every path that CMake caches is given each time: the last build may have run in an isolated
        # environment that is gone. Another compiler needs a fresh tree.
        settings = {
            "CMAKE_MAKE_PROGRAM": program("ninja", "BIN_DIR"),
            "CMAKE_CUDA_COMPILER": nvcc.path,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        configure = [cmake, "-S", ROOT, "-B", build_dir, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-D{name}={value}" for name, value in settings.items()]
        if cached(build_dir, "CMAKE_CUDA_COMPILER") not in (None, str(nvcc.path)):
            configure.append("--fresh")
        env = nvcc.environment()
        subprocess.run(configure, check=True, env=env)
        jobs = ["--parallel", str(self.parallel)] if self.parallel else []
        subprocess.run([cmake, "--build", build_dir, *jobs], check=True, env=env)

        wanted = Path(self.get_ext_fullpath(ext.name)).resolve()
        built = ROOT / "vsa_cuda" / wanted.name
        if wanted != built:
            wanted.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(built, wanted)


class CleanBuild(build):
    """Without this, files removed from vsa_cuda/ live on in build/lib and reach the next wheel."""

    def run(self):
        if os.path.isdir(self.build_lib):
            shutil.rmtree(self.build_lib)
        super().run()


setup(
    ext_modules=[Extension("vsa_cuda._C", sources=[])] if build_enabled() else [],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
