"""Counting parameters, activations and seconds."""

from __future__ import annotations

import time
import weakref

import pytest
import torch
from torch import nn

from monai_petl import adapt, summary
from monai_petl.core.summary import Summary, TensorMemory, measure_step, saved_activation_bytes, step_seconds
from monai_petl.methods import PromptTuning
from monai_petl.networks import PUNet
from tests.conftest import RankOne


def test_counts_add_up(small_net):
    adapt(small_net, RankOne("linear"))
    found = summary(small_net)
    assert found.total == sum(p.numel() for p in small_net.parameters())
    assert found.trainable == 6 + 6
    assert found.frozen == found.total - 12
    assert found.fraction == pytest.approx(12 / found.total)
    assert sum(total for _, total, _ in found.rows) == found.total
    assert sum(trainable for _, _, trainable in found.rows) == found.trainable
    assert ("linear", 6 * 6 + 6 + 12, 12) in found.rows


def test_parameters_of_the_network_itself_have_a_row():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.layer = nn.Linear(2, 2)
            self.empty = nn.ReLU()

    assert summary(Own()).rows == (("layer", 6, 6), ("(own)", 3, 3))


def test_a_shared_parameter_counts_once_in_the_total():
    network = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False)})
    network["b"] = network["a"]
    assert summary(network).total == 9


def test_the_default_prompt_tuning_is_0_85_percent_of_the_body():
    network = adapt(PUNet(), PromptTuning("liver"))
    found = summary(network)
    assert found.trainable == 57_344
    assert found.total == 6_758_304 + 57_344 + 512
    assert round(100 * found.trainable / 6_758_304, 2) == 0.85


def test_the_table_names_every_module_and_ends_in_a_sentence(small_net):
    small_net.requires_grad_(False)
    small_net.out.requires_grad_(True)
    lines = str(summary(small_net)).splitlines()
    assert lines[0].split() == ["module", "parameters", "trainable"]
    assert [line.split()[0] for line in lines[1:-1]] == ["stem", "linear", "norm", "out", "total"]
    assert lines[-2].split() == ["total", "140", "14"]
    assert lines[-1] == "14 of 140 parameters train: 10.00 %"


def test_to_dict_has_the_four_figures():
    assert Summary(10, 4, 6, 0.4, (("a", 10, 4),)).to_dict() == {
        "total": 10,
        "trainable": 4,
        "frozen": 6,
        "fraction": 0.4,
    }


def test_a_network_without_parameters_has_a_fraction_of_zero():
    assert summary(nn.ReLU()) == Summary(0, 0, 0, 0.0)


def test_saved_activations_of_two_linear_layers_are_their_inputs():
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(32, 8)
    kept = saved_activation_bytes(network, lambda: network(x))
    # the input of the first layer; the output of ReLU, which is also the input of the last layer
    assert kept == 4 * 32 * (8 + 16)


def test_a_frozen_first_layer_keeps_nothing():
    network = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 4))
    network[0].requires_grad_(False)
    x = torch.randn(32, 8)
    assert saved_activation_bytes(network, lambda: network(x)) == 4 * 32 * 16
    with torch.no_grad():
        assert saved_activation_bytes(network, lambda: network(x)) == 0


def test_views_of_one_storage_count_once_and_weights_do_not_count():
    weight = nn.Linear(4, 4, bias=False)
    x = torch.randn(6, 4, requires_grad=True)
    kept = saved_activation_bytes(weight, lambda: weight(x) * x * x.view(6, 4))
    # x in all its roles, W x, and the product (W x) x
    assert kept == 4 * 6 * 4 * 3


def test_step_seconds_is_the_median_after_a_warm_up(monkeypatch):
    durations = iter([5.0, 0.3, 0.1, 0.2])
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def step() -> None:
        clock[0] += next(durations)

    assert step_seconds(step, repeats=3) == pytest.approx(0.2)
    assert next(durations, None) is None


def test_counting_what_is_kept_keeps_nothing_itself():
    network, x = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), torch.randn(2, 4)
    outputs = []

    def forward():
        y = network(x)
        outputs.append(weakref.ref(y))
        return y.sum()

    assert saved_activation_bytes(network, forward) > 0
    assert outputs[0]() is None


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 50))


def test_tensor_memory_counts_a_storage_once_and_forgets_what_is_freed():
    with TensorMemory() as memory:
        x = torch.rand(1000)
        view = x[:10].view(2, 5)
        assert memory.bytes == 4000
        y = x + 1
        assert memory.bytes == 8000
        del y
        assert memory.bytes == 4000
        x.add_(1)
        del x
        assert memory.bytes == 4000  # the view holds it
        del view
        assert memory.bytes == 0
    assert memory.peak_bytes == 8000


def test_what_is_there_already_counts_once():
    network = two_layers()
    size = sum(p.nbytes for p in network.parameters())
    with TensorMemory((*network.parameters(), *network.parameters())) as memory:
        assert memory.bytes == size
        network[0].weight.detach()
        assert memory.bytes == size


def test_cost_of_a_step():
    network, x = two_layers(), torch.rand(32, 100)
    cost = measure_step(network, lambda: network(x).sum())
    forward = 2 * 32 * (100 * 200 + 200 * 50)
    assert cost.forward_flops == forward
    assert cost.flops == forward + 2 * 32 * (100 * 200 + 2 * 200 * 50)  # no gradient of the image
    assert cost.saved_bytes == 4 * 32 * (100 + 200)  # input of either linear layer; the second is the output of ReLU
    values = sum(p.numel() for p in network.parameters())
    assert cost.peak_bytes >= 4 * 4 * values  # weights, gradients, two moments of AdamW
    assert cost.peak_bytes <= 4 * 6 * values + 2 * cost.saved_bytes
    assert cost.seconds > 0


def test_a_frozen_layer_makes_a_step_cheaper():
    network, x = two_layers(), torch.rand(32, 100)
    whole = measure_step(network, lambda: network(x).sum())
    network[0].requires_grad_(False)
    part = measure_step(network, lambda: network(x).sum())
    assert part.forward_flops == whole.forward_flops
    assert part.flops == whole.flops - 2 * 32 * (100 * 200 + 200 * 50)  # neither its weights nor what lies before them
    assert part.saved_bytes == 4 * 32 * 200
    assert part.peak_bytes < whole.peak_bytes


def test_measuring_leaves_values_and_gradients_alone():
    network, x = two_layers(), torch.rand(4, 100)
    before = [p.detach().clone() for p in network.parameters()]
    measure_step(network, lambda: network(x).sum())
    assert all(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))
    assert all(p.grad is None for p in network.parameters())


def test_the_optimizer_that_is_given_counts():
    network, x = two_layers(), torch.rand(4, 100)
    plain = measure_step(network, lambda: network(x).sum(), torch.optim.SGD(network.parameters(), lr=0.0))
    adam = measure_step(network, lambda: network(x).sum())
    values = sum(p.numel() for p in network.parameters())
    assert adam.peak_bytes - plain.peak_bytes >= 2 * 4 * values


def test_fused_attention_counts_on_cpus():
    q, k, v = (torch.rand(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    layer = nn.Linear(1, 1)

    def loss() -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v).sum() + layer.weight.sum()

    cost = measure_step(layer, loss)
    products = 2 * 2 * (2 * 3 * 16 * 16 * 8)  # scores, and their mean of the values
    assert cost.forward_flops == products
    assert cost.flops == products + 5 * products // 2  # of torch's formula: scores again, and four gradients
