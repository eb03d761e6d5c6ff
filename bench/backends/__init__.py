"""Backends, found when the benchmark runs. What is missing is listed with the reason, never replaced."""

from collections.abc import Callable
from pathlib import Path

from bench.backends.base import Backend, Missing, Unsupported, Work
from bench.backends.dense import Cudnn, FlashAttention3, TorchDense
from bench.backends.fastvideo import FastVideo
from bench.backends.flex import Flex
from bench.backends.vsa import Vsa

NAMES = ("vsa_cuda", "fa3", "cudnn", "flex", "fastvideo")

__all__ = ["NAMES", "Backend", "Missing", "TorchDense", "Unsupported", "Vsa", "Work", "discover"]


def discover(
    names: tuple[str, ...] = NAMES, *, fa3_library: Path | None = None, peers: Path | None = None
) -> tuple[list[Backend], dict[str, str]]:
    """(backends found, in the order of `names`; reason of each that is missing).

    Args:
        fa3_library: a shared library that registers torch.ops.flash_attn_3.
        peers: the folder made by get_peers.sh, or None.
    """
    makers: dict[str, Callable[[], Backend]] = {
        "vsa_cuda": Vsa,
        "fa3": lambda: FlashAttention3(fa3_library, peers),
        "cudnn": Cudnn,
        "flex": Flex,
        "fastvideo": lambda: FastVideo(peers),
    }
    found, missing = [], {}
    for name in names:
        try:
            found.append(makers[name]())
        except Exception as error:  # whatever loading a library raises, it is missing
            missing[name] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return found, missing
