"""Freezing and attaching: what trains, what stays still, and what is left behind when something goes wrong."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass

import pytest
import torch
from monai.networks.nets import UNETR, SwinUNETR, UNet, ViT
from torch import Tensor, nn

from monai_petl import Method, adapt, trainable_parameters
from monai_petl.core.records import adapters_of
from monai_petl.methods import BottleneckAdapters, ClassHead, PromptTuning
from tests.conftest import (
    RankOne,
    SmallNet,
    differing,
    frozen,
    shake_statistics,
    small_punet,
    state_of,
    train,
    train_class,
)


@dataclass(frozen=True)
class FailsHalfway(Method):
    """Adds something, then finds that it cannot go on."""

    def attach(self, network: nn.Module, name: str) -> None:
        raise TypeError("FailsHalfway needs another network")


def unet() -> nn.Module:
    return UNet(2, 1, 2, channels=(4, 8), strides=(2,), num_res_units=1, norm="batch", dropout=0.5)


def vit() -> nn.Module:
    return ViT(1, (16, 16), (8, 8), 12, 24, 2, 3, spatial_dims=2, dropout_rate=0.5, classification=True, num_classes=2)


def unetr() -> nn.Module:
    return UNETR(1, 2, (16, 16), 4, 12, 24, 3, norm_name="batch", dropout_rate=0.5, spatial_dims=2)


def swin_unetr() -> nn.Module:
    return SwinUNETR(
        1,
        2,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 1, 1),
        feature_size=12,
        drop_rate=0.5,
        dropout_path_rate=0.5,
        spatial_dims=2,
    )


NETWORKS = {
    "SmallNet": (SmallNet, (16, 16), ("linear",)),
    "UNet": (unet, (16, 16), ("model.0.conv.unit0.conv",)),
    "ViT": (vit, (16, 16), ("blocks.0.mlp.linear1",)),
    "UNETR": (unetr, (16, 16), ("out",)),
    "SwinUNETR": (swin_unetr, (64, 64), ("out",)),
}


def first(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def images(size: tuple[int, ...], batch: int = 4) -> Tensor:
    return torch.randn(batch, 1, *size)


def flags_of(network: nn.Module) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in network.named_parameters()}


def modes_of(network: nn.Module) -> dict[str, bool]:
    return {n: m.training for n, m in network.named_modules()}


# freezing


@pytest.mark.parametrize("name", NETWORKS)
def test_only_what_is_named_trains(name):
    make, _, also_train = NETWORKS[name]
    network = make()
    assert adapt(network, [], also_train) is network
    training = {n for n, flag in flags_of(network).items() if flag}
    assert training
    assert all(n.startswith(also_train[0]) for n in training)
    assert {id(p) for p in trainable_parameters(network)} == {id(network.get_parameter(n)) for n in training}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_frozen_network_computes_in_training_mode_what_it_computes_in_evaluation(name):
    make, size, also_train = NETWORKS[name]
    network = shake_statistics(make())
    x = images(size)
    assert not torch.equal(first(network.train()(x)), first(network.train()(x)))  # dropout acts
    torch.testing.assert_close(first(adapt(network, [], also_train).train()(x)), first(network.eval()(x)))
    with frozen(network):
        expected = first(network.eval()(x))
        assert torch.equal(first(network.train()(x)), expected)
        assert torch.equal(first(network.eval()(x)), expected)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_backbone_is_bit_identical_after_training(name, weight_decay):
    make, size, also_train = NETWORKS[name]
    network = adapt(shake_statistics(make()), [], also_train)
    before, x = state_of(network), images(size)
    train(network, lambda: first(network(x)).square().mean(), weight_decay=weight_decay)
    changed = differing(before, network.state_dict())
    assert changed == {n for n in before if n.startswith(also_train[0])}


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize(
    "method",
    [PromptTuning("pancreas"), ClassHead("pancreas"), [ClassHead("pancreas"), BottleneckAdapters()]],
    ids=["prompts", "head", "adapters"],
)
@pytest.mark.parametrize("arithmetic", ["corrected", "published"])
def test_the_body_of_punet_is_bit_identical_after_training(arithmetic, method, weight_decay):
    network = small_punet("liver", arithmetic=arithmetic)
    before = state_of(network)
    adapt(network, method)
    start = state_of(network)
    train_class(network, "pancreas", torch.randn(2, 1, 32, 32, 1), weight_decay=weight_decay)
    assert differing(before, network.state_dict()) == set()
    changed = differing(start, network.state_dict())
    parameters = {n for n, p in network.named_parameters() if p.requires_grad}
    assert parameters <= changed
    assert all("pancreas" in n or ".adapter." in n for n in changed)


def test_frozen_batch_norm_uses_its_stored_statistics_under_train(small_net):
    adapt(small_net, [], ["out"])
    small_net.train()
    assert small_net.training
    assert small_net.out.training
    assert not small_net.norm.training
    assert not small_net.stem[1].training
    assert not small_net.stem[3].training


class TorchLayers(nn.Module):
    """Layers of torch that drop out, or iterate, by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(self.spectral(x))


def test_layers_of_torch_with_dropout_or_iterations_of_their_own_are_frozen_too():
    network, x = TorchLayers(), torch.randn(3, 5, 8)
    assert not torch.equal(network.train()(x), network.train()(x))
    adapt(network, [], ["out"])
    before = state_of(network)
    train(network, lambda: network(x).square().mean())
    assert differing(before, network.state_dict()) == {"out.weight", "out.bias"}
    torch.testing.assert_close(network.train()(x), network.eval()(x))


def test_what_is_added_to_a_frozen_layer_follows_the_mode_of_the_network():
    class Added(Method):
        def attach(self, network, name):
            network.attention.added = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))

    network = adapt(TorchLayers(), Added())
    network.eval()
    network.train()
    assert not network.attention.training
    assert network.attention.added[1].training


def test_norm_and_dropout_that_train_are_released(small_net):
    adapt(small_net, [], ["stem", "norm"])
    before = state_of(small_net)
    small_net.train()
    assert small_net.norm.training
    assert small_net.stem[1].training
    assert small_net.stem[3].training
    x = images((16, 16))
    train(small_net, lambda: small_net(x).square().mean())
    assert {"norm.running_mean", "stem.1.running_var"} <= differing(before, small_net.state_dict())
    assert {"linear.weight", "out.bias"}.isdisjoint(differing(before, small_net.state_dict()))
    small_net.eval()
    assert not small_net.stem[3].training


def test_batch_norm_of_which_only_the_bias_trains_keeps_its_statistics(small_net):
    adapt(small_net, [], ["*.bias"])
    before, x = state_of(small_net), images((16, 16))
    train(small_net, lambda: small_net(x).square().mean())
    assert differing(before, small_net.state_dict()) == {n for n in before if n.endswith(".bias")}


def test_everything_trains_when_everything_is_named(small_net):
    adapt(small_net, [], ["*"])
    small_net.train()
    assert all(m.training for m in small_net.modules())
    assert len(trainable_parameters(small_net)) == len(list(small_net.parameters()))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["norm"], {"norm.weight", "norm.bias"}),
        (["norm.weight"], {"norm.weight"}),
        (["stem.0", "out.bias"], {"stem.0.weight", "stem.0.bias", "out.bias"}),
        (["*.weight"], {"stem.0.weight", "stem.1.weight", "linear.weight", "norm.weight", "out.weight"}),
        (["stem.[01].bias"], {"stem.0.bias", "stem.1.bias"}),
    ],
)
def test_patterns_name_modules_or_parameters(small_net, patterns, expected):
    adapt(small_net, [], patterns)
    assert {n for n, flag in flags_of(small_net).items() if flag} == expected


def test_the_state_dict_keeps_its_names(small_net):
    names = list(small_net.state_dict())
    adapt(small_net, RankOne("linear"))
    assert [n for n in small_net.state_dict() if ".delta." not in n] == names
    assert isinstance(small_net, SmallNet)


# attaching


@pytest.mark.parametrize("name", ["ViT", "UNETR", "SwinUNETR"])
def test_an_additive_method_starts_as_the_backbone(name):
    make, size, _ = NETWORKS[name]
    network, x = make().eval().requires_grad_(False), images(size)
    before = first(network(x))
    adapt(network, RankOne("mlp.linear1", rank=2))
    assert torch.equal(first(network(x)), before)


@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD])
def test_training_an_additive_method_changes_nothing_else(small_net, optimiser):
    before = state_of(small_net)
    adapt(small_net, RankOne("linear"))
    x = images((16, 16))
    small_net.train()
    updates = optimiser(trainable_parameters(small_net), lr=0.1, weight_decay=0.3)
    for _ in range(3):
        updates.zero_grad()
        small_net(x).square().mean().backward()
        updates.step()
    assert differing(before, small_net.state_dict()) == set()
    assert small_net.linear.delta.up.abs().sum() > 0
    assert {n for n, p in small_net.named_parameters() if p.grad is not None} == {
        "linear.delta.down",
        "linear.delta.up",
    }


def test_several_methods_and_patterns_go_together(small_net):
    adapt(small_net, [RankOne("linear"), RankOne("out", rank=2)], ["norm"])
    assert {n for n, flag in flags_of(small_net).items() if flag} == {
        *(f"{layer}.delta.{part}" for layer in ("linear", "out") for part in ("down", "up")),
        "norm.weight",
        "norm.bias",
    }


def test_a_second_adapter_trains_alone_and_leaves_the_first_as_it_is(small_net):
    adapt(small_net, RankOne("linear"), name="first")
    x = images((16, 16))
    train(small_net, lambda: small_net(x).square().mean())
    adapt(small_net, RankOne("out"), name="second")
    before = state_of(small_net)
    train(small_net, lambda: small_net(x).square().mean(), weight_decay=0.5)
    assert differing(before, small_net.state_dict()) == {"out.delta.down", "out.delta.up"}
    assert list(adapters_of(small_net)) == ["first", "second"]


def test_a_network_in_which_nothing_trains_is_refused(small_net):
    small_net.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter of this network trains; call adapt"):
        trainable_parameters(small_net)


# failures


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [(), ("stem",)], ids=["trained", "partly-frozen"])
@pytest.mark.parametrize(
    ("method", "also_train", "error", "says"),
    [
        ([], ["head"], ValueError, r"nothing in the network is called 'head'.*stem, linear, norm, out"),
        (RankOne("linear"), ["norm", "decoder.*"], ValueError, r"nothing in the network is called 'decoder.\*'"),
        (RankOne("linear"), "norm", ValueError, r"also_train must be a list .* got the string 'norm'"),
        (RankOne("attention"), [], ValueError, r"no linear layer is called 'attention'"),
        ([RankOne("linear"), FailsHalfway()], ["norm"], TypeError, r"needs another network"),
        (PromptTuning("liver"), [], TypeError, r"PromptTuning needs a monai_petl.networks.PUNet, got SmallNet"),
    ],
    ids=["pattern", "second-pattern", "string", "no-target", "second-method", "other-network"],
)
def test_after_a_failure_the_network_is_as_it_was(small_net, method, also_train, error, says, frozen, training):
    for name in frozen:
        small_net.get_submodule(name).requires_grad_(False)
    small_net.train(training)
    before = state_of(small_net), flags_of(small_net), modes_of(small_net), str(small_net)
    with pytest.raises(error, match=says):
        adapt(small_net, method, also_train)
    assert (flags_of(small_net), modes_of(small_net), str(small_net)) == before[1:]
    assert list(small_net.state_dict()) == list(before[0])
    assert differing(before[0], small_net.state_dict()) == set()
    assert not adapters_of(small_net)
    small_net.train()
    assert all(m.training for m in small_net.modules())
    adapt(small_net, RankOne("linear"))


def test_a_name_that_is_taken_is_refused_and_the_adapter_stays(small_net):
    adapt(small_net, RankOne("linear"), name="mine")
    flags, modes = flags_of(small_net), modes_of(small_net.train())
    with pytest.raises(
        ValueError, match=r"'mine' already \(RankOne\); to attach RankOne, remove that with remove_adapter"
    ):
        adapt(small_net, RankOne("out"), name="mine")
    assert flags_of(small_net) == flags
    assert modes_of(small_net) == modes
    assert not small_net.norm.training


@pytest.mark.parametrize(
    "method",
    [
        PromptTuning("liver", init="nonsense"),
        PromptTuning("liver", depth="half"),
        [PromptTuning("liver"), FailsHalfway()],
        [ClassHead("liver"), FailsHalfway()],
        [ClassHead("liver"), BottleneckAdapters(reduction=0)],
    ],
    ids=["init", "depth", "after-prompts", "after-head", "adapters"],
)
def test_after_a_failure_a_class_of_that_name_has_its_prompts_back(method):
    network = small_punet("liver", "spleen").eval()
    before, image = state_of(network), torch.randn(1, 1, 32, 32, 1)
    with torch.no_grad():
        expected = network(image)
        with pytest.raises((TypeError, ValueError)):
            adapt(network, method)
        assert network.classes == ["liver", "spleen"]
        assert list(network.state_dict()) == list(before)
        assert differing(before, network.state_dict()) == set()
        assert torch.equal(network(image), expected)


# copies


def test_a_deep_copy_stays_frozen_and_is_independent(small_net):
    adapt(small_net, RankOne("linear"))
    twin, before, x = copy.deepcopy(small_net), state_of(small_net), images((16, 16))
    train(twin, lambda: twin(x).square().mean())
    assert differing(before, small_net.state_dict()) == set()
    assert differing(before, twin.state_dict()) == {"linear.delta.down", "linear.delta.up"}
    twin.eval().train()
    assert not twin.norm.training
    assert not twin.stem[3].training
    assert adapters_of(twin)["default"] is not adapters_of(small_net)["default"]
    assert torch.equal(small_net.train()(x), small_net.eval()(x))


def test_a_deep_copy_can_be_adapted_further_without_the_original(small_net):
    adapt(small_net, RankOne("linear"))
    twin = adapt(copy.deepcopy(small_net), [], ["norm", "stem"], name="more")
    assert list(adapters_of(small_net)) == ["default"]
    twin.train()
    small_net.train()
    assert twin.norm.training
    assert not small_net.norm.training


def test_the_state_dict_can_be_saved_and_loaded_by_torch(small_net):
    adapt(small_net, RankOne("linear"))
    x, file = images((16, 16)), io.BytesIO()
    train(small_net, lambda: small_net(x).square().mean())
    torch.save(small_net.state_dict(), file)
    file.seek(0)
    other = adapt(SmallNet(), RankOne("linear"))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.train()(x), small_net.train()(x))


def test_a_whole_adapted_network_can_be_pickled(small_net):
    adapt(small_net, RankOne("linear"))
    file, x = io.BytesIO(), images((16, 16))
    torch.save(small_net, file)
    file.seek(0)
    other = torch.load(file, weights_only=False).train()
    assert not other.norm.training
    assert torch.equal(other(x), small_net.train()(x))
    assert list(adapters_of(other)) == ["default"]


def test_a_method_that_says_nothing_is_refused_with_a_sentence(small_net):
    @dataclass(frozen=True)
    class Silent(Method):
        pass

    assert Method.registry["Silent"] is Silent
    with pytest.raises(TypeError, match="Silent does not say how it attaches"):
        adapt(small_net, Silent())
    del Method.registry["Silent"]
