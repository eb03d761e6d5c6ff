"""What runs here, and why."""

import torch

from vsa_cuda import _extension


def info() -> dict[str, str]:
    """Returns the versions, the device, the backend in use and why. Works without a GPU or the extension.

    Keys: vsa_cuda, torch, device, extension, backend ("cuda" or "reference"), why. With backend "reference"
    CPU tensors run the PyTorch reference and CUDA tensors raise; nothing falls back silently.
    """
    from vsa_cuda import __version__

    device, gpu_problem = _device()
    extension = str(_extension.load().__file__) if _extension.is_available() else "missing"
    if gpu_problem:
        backend, why = "reference", f"{gpu_problem}; CPU tensors run the PyTorch reference"
    elif extension == "missing":
        reason = _extension.unavailable_reason()
        backend, why = "reference", f"the GPU would do, but vsa_cuda._C does not import ({reason}): reinstall"
    else:
        backend, why = "cuda", "sm_90 GPU and compiled extension; CPU tensors run the PyTorch reference"
    return {
        "vsa_cuda": __version__,
        "torch": torch.__version__,
        "device": device,
        "extension": extension,
        "backend": backend,
        "why": why,
    }


def _device() -> tuple[str, str]:
    """(current device, why the kernels cannot run on it or "")."""
    if not torch.cuda.is_available():
        why = "torch is a CPU build" if torch.version.cuda is None else "torch finds no CUDA device"
        return "cpu", why
    index = torch.cuda.current_device()
    major, minor = torch.cuda.get_device_capability(index)
    name = f"cuda:{index} {torch.cuda.get_device_name(index)} (sm_{major}{minor})"
    return name, "" if (major, minor) == (9, 0) else f"{name} is not sm_90; CUDA tensors raise"
