"""What holds for every network of MONAI: frozen is frozen, adapters come and go, heads are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from monai_petl import adapt, disabled, load_adapter, remove_adapter, save_adapter, summary, trainable_parameters
from monai_petl.core.roles import has_attention
from monai_petl.methods import HeadOnly, LoRA
from tests.conftest import differing, state_of
from tests.marks import slow_unless
from tests.monai_networks import LEFT_OUT, NETWORKS, Small, classes, outputs_of

K = 5
HEADS_BEFORE_HIDDEN_STATES = ("ViT", "ViTAutoEnc")


def built(small: Small) -> nn.Module:
    """With running statistics as after some training, so that normalisation says something."""
    torch.manual_seed(0)
    network = small.make()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def lora(network: nn.Module) -> LoRA:
    """On convolutions, or on linear layers where there are none."""
    return LoRA(rank=2, targets=("attention",)) if has_attention(network) else LoRA(rank=2, targets=_there(network))


def _there(network: nn.Module) -> tuple[str, ...]:
    conv = any(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in network.modules())
    return ("conv",) if conv else ("linear",)


def passes(network: nn.Module, small: Small) -> list[Tensor]:
    with torch.no_grad():
        return outputs_of(network(*small.inputs()))


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Of outputs in another form in training (deep supervision), what corresponds: the tensors that both have."""
    shared = [(a, b) for a, b in zip(first, second, strict=False) if a.shape == b.shape]
    return bool(shared) and all((a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1) for a, b in shared)


def test_every_network_of_monai_is_in_the_table_or_left_out_with_a_reason():
    listed = {small.kind for small in NETWORKS} | set(LEFT_OUT)
    assert classes() <= listed
    assert not {small.kind for small in NETWORKS} & set(LEFT_OUT)


def quick(small: Small) -> bool:
    return small.kind != "HoVerNet"  # whose images have 256 x 256 pixels


@pytest.mark.parametrize("small", slow_unless(quick, NETWORKS), ids=lambda small: small.kind)
def test_an_untouched_adapter_under_train_equals_evaluation_and_nothing_frozen_changes(small: Small):
    network = built(small)
    expected = passes(network, small)
    adapt(network, lora(network))
    before = state_of(network)
    assert same(passes(network, small), expected) or small.noisy
    network.train()
    first, second = passes(network, small), passes(network, small)
    if not small.noisy:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert same(first, expected)
    assert not differing(before, state_of(network))


@pytest.mark.parametrize("small", slow_unless(quick, NETWORKS), ids=lambda small: small.kind)
def test_all_that_trains_gets_a_gradient_and_the_file_loads_again(small: Small, tmp_path: Path):
    network = built(small)
    adapt(network, lora(network))
    torch.manual_seed(1)
    for parameter in trainable_parameters(network):
        nn.init.normal_(parameter, 0, 0.1)
    network.train()
    sum(o.float().square().mean() for o in outputs_of(network(*small.inputs()))).backward()
    without = {n for n, p in network.named_parameters() if p.requires_grad and p.grad is None}
    assert all(small.idle and name.startswith(small.idle) for name in without), without
    network.eval()
    expected = passes(network, small)
    file = save_adapter(network, tmp_path / "a.safetensors")
    fresh = load_adapter(built(small), file)
    assert same(passes(fresh, small), expected) or small.noisy
    remove_adapter(fresh, "default")
    assert same(passes(fresh, small), passes(built(small), small)) or small.noisy


@pytest.mark.parametrize("small", [s for s in NETWORKS if s.head], ids=lambda small: small.kind)
def test_another_number_of_classes_in_every_network_that_has_a_head(small: Small, tmp_path: Path):
    network = built(small)
    before = passes(network, small)
    adapt(network, HeadOnly(num_classes=K))
    for mode in (False, True):
        output = outputs_of(network.train(mode)(*small.inputs()))
        output = output[:1] if small.kind in HEADS_BEFORE_HIDDEN_STATES else output
        assert {tensor.shape[1] for tensor in output if tensor.ndim} == {K}
    sum(tensor.float().square().mean() for tensor in output if tensor.ndim).backward()
    assert all(p.grad is not None for p in trainable_parameters(network))
    assert summary(network).fraction < 0.5 or small.kind in ("FullyConnectedNet", "UNet", "NetAdapter")
    network.eval()
    expected = passes(network, small)
    with disabled(network):
        assert same(passes(network, small), before)
    fresh = load_adapter(built(small), save_adapter(network, tmp_path / "a.safetensors"))
    assert same(passes(fresh, small), expected)


@pytest.mark.parametrize("small", slow_unless(quick, [s for s in NETWORKS if not s.head]), ids=lambda small: small.kind)
def test_a_network_without_one_head_for_classes_is_refused_with_a_remedy(small: Small):
    network = built(small)
    before = list(network.state_dict())
    with pytest.raises(ValueError, match=r"head=|build the network|has no head for classes"):
        adapt(network, HeadOnly(num_classes=K))
    assert list(network.state_dict()) == before


class Features(nn.Module):
    """A feature extractor as RetinaNet takes it."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"0": self.conv(x)}


def test_the_classes_of_a_retinanet_train_and_another_number_of_them_is_refused():
    from monai.apps.detection.networks.retinanet_network import RetinaNet

    network = RetinaNet(2, num_classes=3, num_anchors=2, feature_extractor=Features(), size_divisible=2)
    with pytest.raises(ValueError, match=r"build it with num_classes=5, load the other weights"):
        adapt(network, HeadOnly(num_classes=K))
    adapt(network, HeadOnly())
    trained = {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"classification_head"}


def test_the_summary_says_which_head_was_found():
    small = next(s for s in NETWORKS if s.kind == "VNet")
    network = adapt(built(small), HeadOnly(num_classes=K))
    assert "head of default: out_tr.conv2 (found where the output comes from)" in str(summary(network))
