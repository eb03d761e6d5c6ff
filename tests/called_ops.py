"""Which ops of this package a call runs."""

from torch.utils._python_dispatch import TorchDispatchMode


class CalledOps(TorchDispatchMode):
    """Names of the vsa_cuda ops that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vsa_cuda":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))
