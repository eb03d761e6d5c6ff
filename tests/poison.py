"""New tensors full of NaN, so that an element which a kernel forgets to write shows up in its result.

torch.utils.deterministic.fill_uninitialized_memory does the same, but only in deterministic mode, which would
also change the default of `deterministic=None` in the functions under test.
"""

import contextlib
from unittest import mock

import torch


def poison(tensor):
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


def _poisoned(allocate):
    def allocate_poisoned(*args, **kwargs):
        return poison(allocate(*args, **kwargs))

    return allocate_poisoned


@contextlib.contextmanager
def poison_new_tensors():
    """Fills what torch.empty, empty_like, empty_strided and Tensor.new_empty return, while active."""
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        ):
            stack.enter_context(mock.patch.object(owner, name, _poisoned(getattr(owner, name))))
        yield
