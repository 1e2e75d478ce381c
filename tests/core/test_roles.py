"""Roles, presets and patterns find the layers that they name, each once, and nothing else."""

from __future__ import annotations

import pytest
import torch
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets import UNETR, DynUNet, SwinUNETR, UNet, ViT
from torch import nn

from monai_petl.core.roles import (
    attention_of,
    backbone_modules,
    find_sites,
    has_attention,
    matches,
    transformer_blocks,
    unused_parameters,
    vision_transformers,
)
from monai_petl.methods import PRESETS, ROLES

SMALL_VIT = {"hidden_size": 24, "mlp_dim": 48, "num_heads": 2}


def vit() -> ViT:
    return ViT(1, (16, 16), (8, 8), num_layers=3, spatial_dims=2, classification=True, **SMALL_VIT)


def unetr() -> UNETR:
    return UNETR(1, 2, (16, 16, 16), feature_size=4, **SMALL_VIT)


def swin() -> SwinUNETR:
    return SwinUNETR(1, 2, feature_size=12, depths=(2, 1, 1, 1), num_heads=(1, 1, 2, 2))


def unet() -> UNet:
    return UNet(3, 1, 2, (8, 16), (2,), num_res_units=1, norm="batch")


def dynunet() -> DynUNet:
    return DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8])


NETWORKS = {"vit": vit, "unetr": unetr, "swin": swin, "unet": unet, "dynunet": dynunet}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    return NETWORKS[request.param]()


class TwoLayers(nn.Module):
    """Torch's attention beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(8, 8)


def roles_of(network: nn.Module) -> dict[str, list[str]]:
    """The roles that the network has, with the names of their layers."""
    found = {}
    for role in ROLES:
        try:
            found[role] = [site.name for site in find_sites(network, [role])]
        except ValueError:
            continue
    return found


# roles


@pytest.mark.parametrize(
    ("make", "counts"),
    [
        (vit, {"q": 3, "k": 3, "v": 3, "proj": 3, "mlp": 6, "patch_embedding": 1, "linear": 1, "norm": 7}),
        (unetr, {"q": 12, "k": 12, "v": 12, "proj": 12, "mlp": 24, "patch_embedding": 1, "norm": 25}),
        (swin, {"q": 5, "k": 5, "v": 5, "proj": 5, "mlp": 10, "patch_embedding": 1, "merging": 4, "norm": 14}),
        (unet, {"norm": 3}),
        (dynunet, {"conv": 11, "transposed_conv": 2, "norm": 10}),
    ],
    ids=["vit", "unetr", "swin", "unet", "dynunet"],
)
def test_networks_have_as_many_layers_of_a_role_as_they_are_built_of(make, counts):
    found = {role: len(names) for role, names in roles_of(make()).items()}
    assert {role: found[role] for role in counts} == counts
    assert found.keys() - counts.keys() <= {"conv", "transposed_conv"}


def test_convolutions_are_told_from_transposed_ones_and_from_the_patch_embedding():
    network = swin()
    kinds = {role: {type(network.get_submodule(n)) for n in names} for role, names in roles_of(network).items()}
    assert kinds["conv"] == {nn.Conv3d}
    assert kinds["transposed_conv"] == {nn.ConvTranspose3d}
    assert kinds["patch_embedding"] == {nn.Conv3d}
    assert not set(roles_of(network)["conv"]) & set(roles_of(network)["patch_embedding"])


def test_every_layer_has_one_role_and_only_fused_projections_have_three(network):
    adaptable = (nn.Linear, nn.modules.conv._ConvNd)
    layers = {n for n, m in backbone_modules(network) if isinstance(m, adaptable)}
    roles: dict[str, list[str]] = {}
    for role, names in roles_of(network).items():
        for name in names:
            roles.setdefault(name, []).append(role)
    assert layers <= roles.keys()
    for name, found in roles.items():
        assert found == (["q", "k", "v"] if name.endswith("qkv") else found[:1]), name


@pytest.mark.parametrize(
    ("targets", "slots"), [(["q"], (0,)), (["k"], (1,)), (["v", "q"], (0, 2)), (["q", "k", "v", "q"], (0, 1, 2))]
)
def test_thirds_of_a_fused_projection_are_gathered_in_one_site(targets, slots):
    sites = find_sites(vit(), targets)
    assert [site.name for site in sites] == [f"blocks.{i}.attn.qkv" for i in range(3)]
    assert {site.slots for site in sites} == {slots}


def test_separate_projections_are_sites_of_their_own():
    network = nn.ModuleDict({"attention": SABlock(24, 2, use_combined_linear=False)})
    assert [(s.name, s.slots) for s in find_sites(network, ["v", "q"])] == [
        ("attention.to_q", ()),
        ("attention.to_v", ()),
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_layers_of_its_roles(network, preset):
    roles = roles_of(network)
    wanted = {name for role in PRESETS[preset] for name in roles.get(role, [])}
    if not wanted:
        with pytest.raises(
            ValueError, match=f"has the role '{preset}'; it has layers with the roles: {', '.join(sorted(roles))}"
        ):
            find_sites(network, [preset])
    else:
        assert {site.name for site in find_sites(network, [preset])} == wanted


def test_sites_come_in_the_networks_order_whatever_the_order_of_targets(network):
    order = [name for name, _ in network.named_modules()]
    targets = list(roles_of(network))
    sites = [site.name for site in find_sites(network, targets)]
    assert sites == sorted(sites, key=order.index)
    assert sites == [site.name for site in find_sites(network, targets[::-1])]
    assert len(set(sites)) == len(sites)


def test_a_role_that_the_network_has_not_got_is_refused_with_those_that_it_has():
    with pytest.raises(ValueError, match=r"no layer of this UNet has the role 'q'; .* conv, norm, transposed_conv"):
        find_sites(unet(), ["conv", "q"])


# what does not contribute


def test_the_cross_attention_that_blocks_do_not_use_is_left_out(network):
    assert not any("cross_attn" in n for n, _ in backbone_modules(network))
    assert not any("cross_attn" in site.name for site in find_sites(network, [*roles_of(network), "*"]))


def test_parameters_that_never_train_are_those_of_unused_parts_and_fixed_positions():
    assert all("cross_attn" in n for n in unused_parameters(vit()))
    fixed = ViT(1, (16, 16), (8, 8), num_layers=1, spatial_dims=2, pos_embed_type="sincos", **SMALL_VIT)
    assert "patch_embedding.position_embeddings" in unused_parameters(fixed)
    assert unused_parameters(unet()) == set()


def test_parameters_outside_of_the_unused_ones_get_gradients():
    network = vit()
    network(torch.randn(2, 1, 16, 16))[0].sum().backward()
    assert {n for n, p in network.named_parameters() if p.grad is None} == unused_parameters(network)


# patterns


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("blocks.0.mlp.linear1", 1), ("*.mlp.*", 6), ("*linear[12]", 6), ("blocks.[02].attn.*", 4), ("*.qkv", 3)],
)
def test_a_pattern_matches_whole_dotted_names(pattern, count):
    sites = find_sites(vit(), [pattern])
    assert len(sites) == count
    assert all(isinstance(site.layer, nn.Linear) for site in sites)
    assert all(site.slots == ((0, 1, 2) if site.name.endswith("qkv") else ()) for site in sites)


def test_a_pattern_leaves_containers_of_the_same_name_alone():
    network = unet()
    named = {n for n, _ in network.named_modules() if n.endswith("conv")}
    sites = find_sites(network, ["*conv"])
    assert {site.name for site in sites} < named
    assert all(isinstance(site.layer, nn.Conv3d | nn.ConvTranspose3d) for site in sites)


def test_roles_and_patterns_combine():
    sites = {site.name: site.slots for site in find_sites(vit(), ["q", "blocks.1.attn.qkv", "blocks.2.mlp.*"])}
    assert sites["blocks.0.attn.qkv"] == (0,)
    assert sites["blocks.1.attn.qkv"] == (0, 1, 2)
    assert {"blocks.2.mlp.linear1", "blocks.2.mlp.linear2"} < sites.keys()


def test_other_kinds_of_layers_are_found_when_asked_for():
    assert len(find_sites(vit(), ["*.norm1"], kinds=(nn.LayerNorm,))) == 3


@pytest.mark.parametrize("pattern", ["blocks.0.mlp.linear3", "linear1", "mlp.linear1", "block.0.mlp.linear1"])
def test_a_pattern_that_finds_nothing_is_refused_with_the_nearest_names(pattern):
    with pytest.raises(
        ValueError, match=r"Patterns match whole dotted names; the nearest are .*mlp.linear.*Roles are: q,"
    ):
        find_sites(vit(), [pattern])


@pytest.mark.parametrize(
    ("make", "pattern", "kinds"),
    [
        (vit, "blocks", "ModuleList"),
        (vit, "*.norm1", "LayerNorm"),
        (TwoLayers, "mha.out_proj", "NonDynamicallyQuantizableLinear"),
        (TwoLayers, "mha", "MultiheadAttention"),
    ],
)
def test_a_pattern_for_what_cannot_be_adapted_is_refused_with_its_kind(make, pattern, kinds):
    with pytest.raises(TypeError, match=rf"{kinds}; only Linear, .* can be adapted"):
        find_sites(make(), [pattern])


def test_a_pattern_passes_over_what_is_inside_torchs_attention():
    assert [site.name for site in find_sites(TwoLayers(), ["*"])] == ["linear"]
    assert [site.name for site in find_sites(TwoLayers(), ["linear"])] == ["linear"]


# exclusion


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["blocks.1.*"], ["blocks.0.attn.qkv", "blocks.2.attn.qkv"]),
        (["blocks.0", "blocks.1.attn"], ["blocks.2.attn.qkv"]),
        (["*.0.*", "*.2.*"], ["blocks.1.attn.qkv"]),
        (["decoder"], [f"blocks.{i}.attn.qkv" for i in range(3)]),
    ],
)
def test_exclusion_wins_over_targets_and_takes_whole_parts(exclude, left):
    assert [site.name for site in find_sites(vit(), ["q", "*.qkv"], exclude)] == left


def test_excluding_everything_is_refused():
    with pytest.raises(ValueError, match=r"nothing is left to adapt: targets \['q'\], of which exclude \['blocks'\]"):
        find_sites(vit(), ["q"], ["blocks"])


@pytest.mark.parametrize("arguments", [("q",), (["q"], "blocks")])
def test_a_text_in_place_of_a_list_is_refused(arguments):
    with pytest.raises(ValueError, match="must be lists of roles or patterns"):
        find_sites(vit(), *arguments)


@pytest.mark.parametrize(
    ("name", "pattern", "match"),
    [
        ("a.b.c", "a.b.c", True),
        ("a.b.c", "a.b", True),
        ("a.b.c", "*.b", True),
        ("a.b.c", "b", False),
        ("a.b.c", "a.b.c.d", False),
        ("ab.c", "a", False),
    ],
)
def test_a_name_matches_by_itself_or_by_what_is_around_it(name, pattern, match):
    assert matches(name, pattern) is match


# transformers


def test_transformers_their_blocks_and_their_attention_are_found_in_order():
    assert [n for n, _ in transformer_blocks(vit())] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [n for n, _ in attention_of(unetr())] == [f"vit.blocks.{i}.attn" for i in range(12)]
    assert len(transformer_blocks(swin())) == len(attention_of(swin())) == 5
    assert [n for n, _ in vision_transformers(swin())] == ["swinViT"]
    assert [n for n, _ in vision_transformers(vit())] == [""]
    assert has_attention(swin())


@pytest.mark.parametrize("find", [transformer_blocks, attention_of])
def test_a_network_without_transformers_is_refused_with_what_fits_it(find):
    assert not has_attention(unet())
    assert vision_transformers(unet()) == []
    with pytest.raises(TypeError, match=r"this UNet has no .*use LoRA\(targets=\['all-conv'\]\)"):
        find(unet())
