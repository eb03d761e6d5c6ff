"""Launch plans without launches, for tests of host code."""

import contextlib
import math
from unittest import mock

from vsa_cuda import _extension

NUM_SMS = 132  # of an H200
SHARED_LIMIT = 227 * 1024
BASE = 1 << 20  # where memory would lie that nothing reads


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


def fine_backward_arguments(
    video=(9, 7, 6), cube=(4, 4, 4), head_dim=128, heads=3, batch=2, dtype="bfloat16", kv_video=None,
    **changes,
):  # fmt: skip
    """Without lists; `kv_video` where keys are other tokens than queries."""
    C = _extension.load()

    def tensor(video):
        tokens = math.prod(video)
        strides = (tokens * heads * head_dim, heads * head_dim, head_dim, 1)
        return C.TokenTensor(
            address=BASE, shape=(batch, tokens, heads, head_dim), strides=strides, dtype=dtype
        )  # fmt: skip

    arguments = {
        "kv_schedule": C.Schedule(), "q_schedule": C.Schedule(), "scale": 0.1, "lse": BASE, "delta": BASE,
        "row_terms": BASE, "grad_query_sums": BASE, "adds_directly": False, "num_sms": NUM_SMS,
    }  # fmt: skip
    optional = ("block_sizes", "q_block_sizes", "dq_pooled", "dk_pooled", "dv_pooled", "choose_by")
    arguments |= dict.fromkeys(optional, 0)
    for side, tensors in (("q", "query grad_out grad_query"), ("kv", "key value grad_key grad_value")):
        of = video if side == "q" or kv_video is None else kv_video
        arguments |= dict.fromkeys(tensors.split(), tensor(of))
        arguments |= dict.fromkeys(
            (f"{side}_grid", f"pooled_{side}_grid"), C.CubeGrid(video_shape=of, cube=cube)
        )
    return C.FineBackwardArguments(**(arguments | changes))
