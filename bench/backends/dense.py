"""Dense attention: FlashAttention-3, cuDNN through PyTorch, and PyTorch's own choice on a CPU."""

import importlib
import importlib.util
import sys
from pathlib import Path

import torch

from bench.backends.base import DenseBackend, Missing, Unsupported, Work, autograd_work
from bench.machine import loaded_library
from bench.patterns import Problem


def import_peers(folder: Path):
    """The loader that ../shared/peers/get_peers.sh leaves in `folder`."""
    path = folder / "peers.py"
    if not path.is_file():
        raise Missing(f"no {path} (made by get_peers.sh)")
    spec = importlib.util.spec_from_file_location("bench_peers", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_peers"] = module
    spec.loader.exec_module(module)
    return module


class FlashAttention3(DenseBackend):
    """torch.ops.flash_attn_3, whichever binary registered it."""

    name = "fa3"

    def __init__(self, library: Path | None = None, peers: Path | None = None):
        version, library = self._load(library, peers)
        super().__init__(version, library)

    @staticmethod
    def _load(library: Path | None, peers: Path | None) -> tuple[str, Path | None]:
        if library is not None:
            torch.ops.load_library(str(library))
            return f"library {library.name}", library
        try:
            interface = importlib.import_module("flash_attn_interface")
        except ImportError as error:
            if peers is None:
                raise Missing(f"{error}; or pass --fa3-library or --peers") from error
            import_peers(peers).fa3()
            return "xformers build (get_peers.sh)", loaded_library(r"_C\.so$")
        version = getattr(interface, "__version__", "unknown")
        return f"flash_attn_interface {version}", loaded_library(r"(flash_attn_3|_C)\b.*\.so$")

    def fine(self, problem: Problem, backward: bool) -> Work:
        ops = torch.ops.flash_attn_3
        query, key, value, scale = problem.query, problem.key, problem.value, problem.scale

        def forward():
            return ops.fwd(query, key, value, softmax_scale=scale, is_causal=False, num_splits=1)[0]

        if not backward:
            return Work(forward, dense=True)
        out, lse = ops.fwd(query, key, value, softmax_scale=scale, is_causal=False, num_splits=1)[:2]

        def gradients(out, lse):
            dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
            ops.bwd(problem.grad_out, query, key, value, out, lse, dq=dq, dk=dk, dv=dv, softmax_scale=scale,
                    is_causal=False)  # fmt: skip
            return dq, dk, dv

        def both():
            out, lse = ops.fwd(query, key, value, softmax_scale=scale, is_causal=False, num_splits=1)[:2]
            return gradients(out, lse)

        return Work(forward, lambda: gradients(out, lse), both, dense=True)


class Cudnn(DenseBackend):
    """scaled_dot_product_attention held to its cuDNN backend."""

    name = "cudnn"

    def __init__(self):
        if not torch.cuda.is_available() or not torch.backends.cudnn.is_available():
            raise Missing("PyTorch has no cuDNN")
        version = torch.backends.cudnn.version()
        super().__init__(f"cudnn {version}", loaded_library(r"^libcudnn\.so"))

    def fine(self, problem: Problem, backward: bool) -> Work:
        from torch.nn.attention import SDPBackend

        return _sdpa(problem, backward, SDPBackend.CUDNN_ATTENTION)


class TorchDense(DenseBackend):
    """scaled_dot_product_attention as PyTorch dispatches it: the dense baseline of --cpu."""

    name = "torch"

    def __init__(self):
        super().__init__(torch.__version__)

    def fine(self, problem: Problem, backward: bool) -> Work:
        return _sdpa(problem, backward, None)


def _sdpa(problem: Problem, backward: bool, backend) -> Work:
    from torch.nn.attention import sdpa_kernel

    inputs = [
        x.detach().transpose(1, 2).requires_grad_(backward)
        for x in (problem.query, problem.key, problem.value)
    ]

    def attend():
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, scale=problem.scale)
        return out.transpose(1, 2)

    def forward():
        if backend is None:
            return attend()
        with sdpa_kernel(backend):
            return attend()

    try:
        work = autograd_work(forward, inputs, problem.grad_out) if backward else Work(forward)
    except RuntimeError as error:
        raise Unsupported(str(error).splitlines()[0]) from error
    work.dense = True
    if backward:
        work.backward, plain = (lambda: tuple(x.transpose(1, 2) for x in plain())), work.backward
    return work
