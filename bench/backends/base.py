"""What a backend is, and what it prepares for a problem."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.machine import file_sha256
from bench.patterns import Problem


class Missing(RuntimeError):
    """A backend that is not here; the message says what was looked for."""


class Unsupported(RuntimeError):
    """A problem that a backend does not take; the message says why."""


@dataclass
class Work:
    """A problem prepared for a backend. `forward` and `backward` are what is timed.

    `backward` uses the results of one earlier forward. `to_raster` brings outputs and gradients to
    [B, S, H, D] in raster order and is not timed. `lse` gives [B, H, S] for the check, where it is known.
    """

    forward: Callable[[], torch.Tensor]
    backward: Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None
    both: Callable[[], object] | None = None
    to_raster: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    lse: Callable[[], torch.Tensor] | None = None
    selection: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None
    dense: bool = False
    timer_graphs: bool = True


class Backend:
    """One way to compute attention. Methods raise Unsupported for problems that it does not take."""

    name = ""

    def __init__(self, version: str, library: Path | None = None):
        self.version = version
        self.library = library
        self.library_sha256 = file_sha256(library)

    def fine(self, problem: Problem, backward: bool) -> Work:
        """Attention over the problem's lists, or over everything for a dense backend."""
        raise Unsupported(f"{self.name} has no block-sparse attention over given lists")

    def whole_op(self, problem: Problem, backward: bool) -> Work:
        """Coarse stage, selection, fine stage and combination."""
        raise Unsupported(f"{self.name} does not compute the whole op")


class DenseBackend(Backend):
    """Dense attention takes the place of the whole op: what the op is compared with."""

    def whole_op(self, problem: Problem, backward: bool) -> Work:
        return self.fine(problem, backward)


def autograd_work(
    forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor], grad_out: torch.Tensor
) -> Work:
    """Work of a function of `inputs` whose gradients come from autograd. The inputs require gradients."""
    out = forward()

    def backward():
        return torch.autograd.grad(out, inputs, grad_out, retain_graph=True)

    def both():
        return torch.autograd.grad(forward(), inputs, grad_out)

    return Work(forward, backward, both)
