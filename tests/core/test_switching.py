"""Several adapters on one network: merging in any order, switching, removing, and what they share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monai.networks.nets import AutoEncoder, SwinUNETR, UNet, ViT
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn

import monai_petl as mp
from monai_petl.core.deltas import Delta, deltas_of
from monai_petl.core.records import adapters_of
from monai_petl.core.switching import backbone_loaded
from monai_petl.methods import AIM, SSF, VPT, BiasOnly, FullFineTuning, HeadOnly, LoRA
from monai_petl.networks import AIMViT, load_swin_unetr
from tests.conftest import differing, state_of, train

SMALL = {"hidden_size": 24, "mlp_dim": 48, "num_layers": 2, "num_heads": 2}


@pytest.fixture
def network() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 16)


def lora(**options: object) -> LoRA:
    return LoRA(rank=2, **{"targets": ["0", "2"], **options})


def shake(network: nn.Module, name: str) -> nn.Module:
    """Values as after training for one adapter."""
    with torch.no_grad():
        for tensor in mp.adapter_state_dict(network, name).values():
            tensor += 0.3 * torch.randn_like(tensor)
    return network


def test_adapters_are_unmerged_in_the_reverse_order_of_merging(network: nn.Module, x: Tensor) -> None:
    before, plain = state_of(network), network(x)
    shake(mp.adapt(network, lora(), name="a"), "a")
    shake(mp.adapt(network, lora(), name="b"), "b")
    both = network(x)
    mp.merge(mp.activate(network, "b"))
    mp.activate(network, "a", "b")  # above one that is not merged, b cannot be
    assert not adapters_of(network)["b"].merged
    torch.testing.assert_close(network(x), both, atol=1e-4, rtol=1e-4)
    for name in ("a", "b"):
        mp.merge(network, name)
    torch.testing.assert_close(network(x), both, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="'b' was merged after 'a'; unmerge it first"):
        mp.unmerge(network, "a")
    with mp.disabled(network):
        assert torch.equal(network(x), plain)
    torch.testing.assert_close(network(x), both, atol=1e-4, rtol=1e-4)
    assert [record.merged > 0 for record in adapters_of(network).values()] == [True, True]
    mp.activate(network)
    assert torch.equal(network(x), plain)
    assert not differing(before, network.state_dict())


def test_nothing_is_attached_and_no_backbone_loaded_while_an_adapter_is_merged(network: nn.Module) -> None:
    mp.merge(shake(mp.adapt(network, lora(), name="a"), "a"))
    for action in (lambda: mp.adapt(network, FullFineTuning(), name="b"), lambda: backbone_loaded(network)):
        with pytest.raises(ValueError, match=r"'a' is merged into the backbone; call unmerge\(network, 'a'\)"):
            action()


def test_adapters_that_train_in_place_are_switched_and_removed_below_a_merged_one(
    network: nn.Module, x: Tensor
) -> None:
    plain, before = network(x), state_of(network)
    shake(mp.adapt(network, FullFineTuning(), name="full"), "full")
    shake(mp.adapt(network, lora(), name="a"), "a")
    with mp.disabled(network, "full"):
        alone = network(x)
    mp.merge(network, "a")
    mp.activate(network, "a")
    torch.testing.assert_close(network(x), alone, atol=1e-4, rtol=1e-4)
    mp.remove_adapter(network, "full")
    torch.testing.assert_close(network(x), alone, atol=1e-4, rtol=1e-4)
    mp.activate(network)
    assert torch.equal(network(x), plain)
    assert not differing(before, network.state_dict())


def test_folding_in_for_good_asks_for_the_other_adapters_to_be_removed(network: nn.Module, x: Tensor) -> None:
    shake(mp.adapt(network, lora(), name="a"), "a")
    mp.adapt(network, BiasOnly(), name="b")
    with pytest.raises(ValueError, match=r"other adapters, .*: b\. Save and remove them"):
        mp.merge_and_unload(network, "a")
    mp.remove_adapter(network, "b")
    expected = network(x)
    torch.testing.assert_close(mp.merge_and_unload(network, "a")(x), expected, atol=1e-4, rtol=1e-4)


def test_removing_an_adapter_leaves_what_another_one_trains(network: nn.Module) -> None:
    mp.adapt(network, lora(), ["2.bias"], name="a")
    mp.adapt(mp.activate(network), lora(), ["2.bias"], name="b")
    mp.remove_adapter(network, "a")
    assert network[2].bias.requires_grad
    assert mp.activate(network, "b", "b") is network


def test_what_is_named_besides_never_includes_another_adapter(network: nn.Module, tmp_path: Path) -> None:
    mp.adapt(network, lora(), name="a")
    mp.adapt(network, lora(targets=["0"]), ["2"], name="b")
    assert not any("lora_a" in name for name in mp.adapter_state_dict(network, "b"))
    assert not any(p.requires_grad for _, delta in deltas_of(network, "a") for p in delta.parameters())
    mp.remove_adapter(network, "a")
    mp.save_adapter(network, tmp_path / "b.safetensors")


class Numbered(Delta):
    tag = "ia3"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((16,), 2.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.scale


@pytest.mark.parametrize("name", ["left_kidney", "a", "x1_y2"])
def test_a_file_loads_under_another_name_whatever_tags_and_names_are_called(
    name: str, x: Tensor, tmp_path: Path
) -> None:
    backbone = nn.Linear(16, 16).eval()  # the adapted layer is the network itself
    state = state_of(backbone)
    network = shake(mp.adapt(backbone, LoRA(rank=2, targets=["linear"]), name=name), name)
    file, expected = mp.save_adapter(network, tmp_path / "a.safetensors"), network(x)
    other = nn.Linear(16, 16).eval()
    other.load_state_dict(state)
    assert torch.equal(mp.load_adapter(other, file, name="another")(x), expected)


def test_a_tag_may_hold_digits(network: nn.Module, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import dataclass

    from monai_petl.core.deltas import add_delta

    monkeypatch.setattr(mp.Method, "registry", dict(mp.Method.registry))

    @dataclass(frozen=True)
    class IA3(mp.Method):
        def attach(self, network: nn.Module, name: str) -> None:
            add_delta(network[0], Numbered(), name)

    state = state_of(network)
    file = mp.save_adapter(mp.adapt(network, IA3(), name="a"), tmp_path / "a.safetensors")
    other = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    other.load_state_dict(state)
    assert torch.equal(mp.load_adapter(other, file, name="z")(x), network(x))


def test_prompts_in_windows_leave_the_adapters_of_the_same_attention_their_place() -> None:
    swin = SwinTransformer(1, 12, (4, 4), (2, 2), (2, 1, 1, 1), (2,) * 4, spatial_dims=2).eval()
    image = torch.randn(2, 1, 32, 32)
    mp.adapt(swin, [AIM(2, temporal=False, joint=False), VPT(2)])
    before = swin(image)[-1]
    for _, delta in deltas_of(swin):
        if delta.tag == "spatial_adapter":
            nn.init.normal_(delta.bottleneck.up.weight)
    assert not torch.allclose(swin(image)[-1], before, atol=1e-2)


def test_shallow_prompts_stay_within_their_transformer() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = ViT(1, (16, 16), (8, 8), spatial_dims=2, **SMALL)
            self.b = ViT(1, (16, 16), (8, 8), spatial_dims=2, **{**SMALL, "hidden_size": 48})

    two = mp.adapt(Two(), VPT(2, deep=False))
    image = torch.randn(1, 1, 16, 16)
    assert two.b(image)[0].shape == (1, 4, 48)
    assert two.a(image)[0].shape == (1, 4, 24)
    assert mp.summary(two).trainable == 2 * 24 + 2 * 48


def test_slices_are_those_of_the_transformer_that_was_taken_over() -> None:
    vit = ViT(1, (16, 16), (8, 8), spatial_dims=2, **SMALL).eval()
    volume = torch.randn(1, 1, 16, 16, 4)
    first = AIMViT(vit).eval()
    shake(mp.adapt(vit, AIM(2)), "default")
    assert torch.equal(first(volume)[0], AIMViT(vit).eval()(volume)[0])


def test_heads_of_unknown_networks_are_not_guessed() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(5)))

    with pytest.raises(
        ValueError, match="was not found, since it could not be run on a single image; give its name as head="
    ):
        mp.adapt(Own(), HeadOnly())


def test_a_new_head_keeps_the_geometry_of_the_old_one() -> None:
    network = AutoEncoder(2, 1, 2, (4, 8), (2, 2))
    mp.adapt(network, HeadOnly(num_classes=5, head="decode"))
    assert network(torch.randn(1, 1, 16, 16)).shape == (1, 5, 16, 16)


def test_the_old_head_does_not_train_beside_a_new_one() -> None:
    network = SwinUNETR(1, 2, depths=(1, 1, 1, 1), num_heads=(2,) * 4, feature_size=12, spatial_dims=2)
    mp.adapt(network, HeadOnly(num_classes=5), also_train=["out"])
    assert {n for n, p in network.named_parameters() if p.requires_grad} == {
        f"out.conv.conv.deltas.head_default.layer.{n}" for n in ("weight", "bias")
    }


def test_a_stage_with_a_new_head_still_counts_its_own_layers_alone() -> None:
    network = UNet(2, 1, 2, (4, 8), (2,), num_res_units=1)
    layers = list(network.model[2])
    mp.adapt(network, HeadOnly(num_classes=3))
    assert len(network.model[2]) == len(layers)
    assert network.model[2][-1] is layers[-1]


def test_a_scale_of_a_part_of_a_fused_projection_is_refused() -> None:
    vit = ViT(1, (16, 16), (8, 8), spatial_dims=2, qkv_bias=True, **SMALL)
    with pytest.raises(ValueError, match=r"SSF scales the whole of blocks\.0\.attn\.qkv"):
        mp.adapt(vit, SSF(targets=["q"]))


def test_a_norm_without_parameters_stays_frozen_beneath_a_scale_of_the_networks_type() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, affine=False)).to(torch.bfloat16)
    mp.adapt(network, SSF(targets=["1"]))
    assert network[1].deltas["ssf_default"].scale.dtype == torch.bfloat16
    before = network[1].running_mean.clone()
    image = torch.randn(2, 1, 4, 4, dtype=torch.bfloat16)
    train(network, lambda: network(image).square().mean())
    assert torch.equal(network[1].running_mean, before)


def test_an_adapted_network_is_no_backbone(tmp_path: Path) -> None:
    sizes = {"depths": (1, 1, 1, 1), "num_heads": (2,) * 4, "feature_size": 12, "spatial_dims": 2}
    torch.save(mp.adapt(SwinUNETR(1, 2, **sizes), LoRA(rank=2)).state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="is an adapted network; fold its adapter in with merge_and_unload"):
        load_swin_unetr(SwinUNETR(1, 2, **sizes), tmp_path / "model.pt")
