"""Runs vsa_cuda._kernels on CPU tensors: each launch executes the kernel's PTX in the simulator."""

import contextlib
import functools
import pathlib
from unittest import mock

import torch

import poison
from simulator import compile_ptx, simulate
from vsa_cuda import _extension

NUM_SMS = 3  # so few that a resident CTA takes several tasks
CSRC = pathlib.Path(__file__).parents[1] / "csrc"


@functools.cache
def kernel_ptx(kernel: str) -> str:
    """PTX of the file in csrc/launch that instantiates `kernel`."""
    words = kernel.split("_")
    paths = [CSRC / "launch" / f"{'_'.join(words[:count])}.cu" for count in range(len(words), 0, -1)]
    return compile_ptx(next(path for path in paths if path.exists()), include_dirs=[CSRC])


class SimulatedDevice:
    """Global memory and launches of one context; `reports` has a simulator.Report of each of `kernels`."""

    def __init__(self, inputs, seed):
        self.seed = seed
        self.inputs = [x for x in inputs if x is not None]
        self.allocated = []
        self.written = set()
        self.unwritten = {}
        self.kernels, self.reports = [], []

    def report(self, stem):
        """Of the one launch of a kernel whose name begins so."""
        (index,) = (i for i, kernel in enumerate(self.kernels) if kernel.startswith(stem))
        return self.reports[index]

    def launch(self, plan, tensor):
        memory = [_storage(x) for x in _distinct(self.inputs)]
        fresh = [x for x in _distinct(self.allocated) if x.numel()]
        first_output = len(memory)
        memory += [_storage(x) if x.data_ptr() in self.written else (_storage(x), "w") for x in fresh]
        report = simulate(kernel_ptx(plan.kernel), plan, memory, seed=self.seed)
        self.kernels.append(plan.kernel)
        self.reports.append(report)
        for index, x in enumerate(fresh, start=first_output):
            if x.data_ptr() in self.written:
                continue
            self.unwritten[x.data_ptr()] = report.unwritten.get(index, 0)
            if report.unwritten.get(index, 0) < x.numel() * x.element_size():
                self.written.add(x.data_ptr())

    def assert_written(self, *tensors):
        """Every byte of each tensor was written by the first launch that wrote to it."""
        for x in tensors:
            assert x.data_ptr() in self.written, f"nothing was written to a tensor of shape {tuple(x.shape)}"
            missing = self.unwritten[x.data_ptr()]
            assert missing == 0, f"{missing} bytes of a tensor of shape {tuple(x.shape)} were not written"


def _storage(tensor):
    """All bytes of a tensor's storage, pads and gaps between its strides included."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _distinct(tensors):
    return list({x.untyped_storage().data_ptr(): x for x in tensors}.values())


@contextlib.contextmanager
def simulated_device(*inputs, seed=0):
    """While active, kernels run in the simulator; `inputs` are all tensors they read but did not allocate."""
    device = SimulatedDevice(inputs, seed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(_extension, "launch", device.launch))
        stack.enter_context(mock.patch.object(_extension, "num_sms", lambda device: NUM_SMS))
        new_empty, new_zeros = torch.Tensor.new_empty, torch.Tensor.new_zeros

        def poisoned(self, *args, **kwargs):
            device.allocated.append(poison.poison(new_empty(self, *args, **kwargs)))
            return device.allocated[-1]

        def zeros(self, *args, **kwargs):
            device.allocated.append(new_zeros(self, *args, **kwargs))
            device.written.add(device.allocated[-1].data_ptr())
            return device.allocated[-1]

        stack.enter_context(mock.patch.object(torch.Tensor, "new_empty", poisoned))
        stack.enter_context(mock.patch.object(torch.Tensor, "new_zeros", zeros))
        yield device


def run_simulated(function, *arguments, seed=0, devices=None):
    """function(*arguments) with its launches in the simulator; every byte of its results must be written.

    Its SimulatedDevice is appended to the list `devices`.
    """
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    with simulated_device(*tensors, seed=seed) as device:
        results = function(*arguments)
    device.assert_written(*(x for x in results if x.dim() and x.numel()))
    if devices is not None:
        devices.append(device)
    return results
