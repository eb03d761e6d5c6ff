"""PEP 517 backend: setuptools, plus NVIDIA's compiler wheels where a build needs nvcc and there is none."""

from pathlib import Path

from nvcc import NvccNotFound, build_enabled, find_nvcc
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that are not overridden below)

ROOT = Path(__file__).resolve().parents[2]
COMPILER_PINS = ROOT / "third_party" / "nvidia-compiler.txt"


def compiler_requirements() -> list[str]:
    if not build_enabled():
        return []
    try:
        find_nvcc()
        return []
    except NvccNotFound:
        lines = COMPILER_PINS.read_text().splitlines()
        return [line for line in lines if line and not line.startswith("#")]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + compiler_requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + compiler_requirements()
