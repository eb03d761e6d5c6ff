"""Lazy access to the compiled extension vsa_cuda._C, and the one place that launches kernels."""

import functools
import importlib
from types import ModuleType

import torch


@functools.cache
def _import() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("vsa_cuda._C"), ""
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"


def is_available() -> bool:
    """True when vsa_cuda._C imports. Needs neither a GPU nor a driver."""
    return _import()[0] is not None


def unavailable_reason() -> str:
    """Why vsa_cuda._C does not import; empty when it does."""
    return _import()[1]


def load() -> ModuleType:
    """Returns vsa_cuda._C; raises RuntimeError with the reason and the fix when it does not import."""
    module, reason = _import()
    if module is None:
        raise RuntimeError(
            f"vsa_cuda._C: got no compiled extension ({reason}), expected it beside {__file__}; "
            "rebuild with `pip install --force-reinstall .` from the source tree, without VSA_CUDA_BUILD=0, "
            "or use CPU tensors"
        )
    return module


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a CUDA device: how many CTAs a kernel that stays resident starts."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(plan, tensor: torch.Tensor) -> None:
    """Launches `plan` on the device of `tensor`, on that device's current stream. Does not synchronise."""
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    load().launch(plan=plan, device=tensor.device.index, stream=stream)
