"""Launch plans without launches, for tests of host code."""

import contextlib
from unittest import mock

from vsa_cuda import _extension

NUM_SMS = 132  # of an H200
SHARED_LIMIT = 227 * 1024


@contextlib.contextmanager
def recorded_plans():
    """The plans of what _kernels would launch on an H200."""
    plans = []
    with (
        mock.patch.object(_extension, "launch", lambda plan, tensor: plans.append(plan)),
        mock.patch.object(_extension, "num_sms", lambda device: NUM_SMS),
    ):
        yield plans


def stems(plans):
    """Names of the kernels without head_dim and dtype."""
    return [plan.kernel.split("_d64")[0].split("_d128")[0] for plan in plans]
