"""The test frame itself: poisoned memory and the seed."""

import pytest
import torch

from poison import poison_new_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_new_floating_tensors_are_nan(dtype):
    like = torch.zeros(3, 5, dtype=dtype)
    with poison_new_tensors():
        made = [torch.empty(3, 5, dtype=dtype), torch.empty_like(like), like.new_empty(7)]
        made.append(torch.empty_strided((3, 5), (1, 3), dtype=dtype))
    assert all(bool(tensor.isnan().all()) for tensor in made)


def test_new_integer_tensors_hold_the_largest_value():
    with poison_new_tensors():
        assert torch.empty(4, dtype=torch.int32).tolist() == [2**31 - 1] * 4
        assert torch.empty(2, dtype=torch.bool).all()


def test_poison_ends_with_its_context():
    before = torch.empty
    with poison_new_tensors():
        assert torch.empty is not before
    assert torch.empty is before


def test_seed_fixture_follows_the_option(seed, request):
    assert seed == request.config.getoption("--seed")
    assert torch.initial_seed() == seed
