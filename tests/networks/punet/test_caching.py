"""Remembered values are never stale."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from monai_petl.networks.punet.caching import TensorCache


class Counted:
    """Doubles its source and counts how often."""

    def __init__(self, source: Tensor) -> None:
        self.source, self.calls = source, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return self.source * 2


@pytest.fixture
def source() -> Tensor:
    return torch.ones(3)


@torch.no_grad()
def test_a_value_is_computed_once(source):
    cache, compute = TensorCache(), Counted(source)
    values = [cache.get("key", [source], compute) for _ in range(3)]
    assert compute.calls == 1
    assert all(torch.equal(value, source * 2) for value in values)


@torch.no_grad()
def test_keys_have_values_of_their_own(source):
    cache = TensorCache()
    assert torch.equal(cache.get("double", [source], lambda: source * 2), source * 2)
    assert torch.equal(cache.get("triple", [source], lambda: source * 3), source * 3)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [lambda t: t.add_(1), lambda t: t[0].fill_(7), lambda t: t.copy_(torch.zeros(3))],
    ids=["add", "view", "copy"],
)
def test_an_in_place_change_of_a_source_forgets_the_value(source, change):
    cache, compute = TensorCache(), Counted(source)
    cache.get("key", [source], compute)
    change(source)
    assert torch.equal(cache.get("key", [source], compute), source * 2)
    assert compute.calls == 2


@torch.no_grad()
def test_an_optimiser_step_forgets_the_value():
    parameter = nn.Parameter(torch.ones(3))
    cache, compute = TensorCache(), Counted(parameter)
    cache.get("key", [parameter], compute)
    parameter.grad = torch.ones(3)
    torch.optim.AdamW([parameter], lr=0.1).step()
    assert torch.equal(cache.get("key", [parameter], compute), parameter * 2)


@torch.no_grad()
def test_new_data_of_a_parameter_forgets_the_value():
    parameter = nn.Parameter(torch.ones(3))
    cache, compute = TensorCache(), Counted(parameter)
    cache.get("key", [parameter], compute)
    parameter.data = torch.zeros(3)
    assert torch.equal(cache.get("key", [parameter], compute), torch.zeros(3))


@torch.no_grad()
def test_a_new_tensor_in_the_memory_of_an_old_source_is_not_mistaken_for_it():
    memory = np.ones(3, dtype=np.float32)
    cache = TensorCache()
    for value in range(20):
        memory[:] = value
        source = torch.from_numpy(memory)
        assert cache.get("key", [source], lambda source=source: source * 2).tolist() == [2 * value] * 3
        del source


def test_nothing_is_remembered_while_gradients_are_recorded(source):
    source.requires_grad_()
    cache, compute = TensorCache(), Counted(source)
    first, second = cache.get("key", [source], compute), cache.get("key", [source], compute)
    assert compute.calls == 2
    assert first.requires_grad
    assert second.requires_grad


def test_a_value_from_a_pass_without_gradients_is_not_used_in_training(source):
    source.requires_grad_()
    cache, compute = TensorCache(), Counted(source)
    with torch.no_grad():
        cache.get("key", [source], compute)
    assert cache.get("key", [source], compute).requires_grad


def test_tensors_made_in_inference_mode_are_not_trusted():
    with torch.inference_mode():
        source = torch.ones(3)
        cache, compute = TensorCache(), Counted(source)
        cache.get("key", [source], compute)
        source.add_(1)
        assert torch.equal(cache.get("key", [source], compute), source * 2)


@torch.no_grad()
def test_only_recent_keys_are_kept(source):
    cache = TensorCache(size=2)
    for key in range(5):
        cache.get(key, [source], lambda: source)
    assert len(cache.values) == 2


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
def test_a_copy_works_on_its_own(source, duplicate):
    cache = TensorCache()
    cache.get("key", [source], lambda: source * 2)
    other = torch.zeros(3)
    assert torch.equal(duplicate(cache).get("key", [other], lambda: other * 2), other)
