"""Options, fixtures and skips shared by all tests."""

import pytest
import torch

from poison import poison_new_tensors

try:
    import hypothesis
except ImportError:
    hypothesis = None


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="seed of every random shape and tensor (default 0)")
    parser.addoption(
        "--update-resources", action="store_true", help="rewrite tests/kernel_resources.json from this build"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if hypothesis is not None:
        # The machines that run this are shared: wall time of one example says nothing.
        hypothesis.settings.register_profile("vsa_cuda", deadline=None, database=None)
        hypothesis.settings.load_profile("vsa_cuda")
        if config.getoption("--hypothesis-seed", None) is None:
            config.option.hypothesis_seed = str(config.getoption("--seed"))


def pytest_report_header(config):
    reason = no_gpu_reason()
    device = torch.cuda.get_device_name(0) if reason is None else f"none ({reason})"
    return f"vsa_cuda: seed {config.getoption('--seed')}, torch {torch.__version__}, sm_90 GPU: {device}"


def no_gpu_reason():
    """Why gpu tests cannot run here, or None where they can."""
    if not torch.cuda.is_available():
        return "no CUDA device, or a CPU build of torch"
    capability = torch.cuda.get_device_capability(0)
    if capability != (9, 0):
        return f"device 0 is sm_{capability[0]}{capability[1]}, the kernels are sm_90a"
    return None


def pytest_collection_modifyitems(items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = no_gpu_reason() if gpu_items else None
    if reason is not None:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=f"needs an sm_90 GPU: {reason}"))


@pytest.fixture
def seed(request):
    """The --seed option; torch's global generator starts from it as well."""
    value = request.config.getoption("--seed")
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """gpu tests see NaN (integers: the largest value) in every new tensor that a kernel has not written."""
    if request.node.get_closest_marker("gpu") and not request.node.get_closest_marker("unpoisoned"):
        with poison_new_tensors():
            yield
    else:
        yield
