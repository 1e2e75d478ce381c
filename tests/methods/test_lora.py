"""Low-rank adaptation: the identity at first, what the formula says afterwards, exact merging, and small files."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets import UNETR, DynUNet, SegResNet, SwinUNETR, UNet, ViT
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from monai_petl import (
    AdapterFileError,
    activate,
    adapt,
    adapter_state_dict,
    backbone_state_dict,
    inspect_adapter,
    load_adapter,
    merge,
    merge_and_unload,
    remove_adapter,
    save_adapter,
    summary,
    trainable_parameters,
    unmerge,
)
from monai_petl.core.deltas import add_delta, deltas_of, merge_deltas, remove_deltas, unmerge_deltas
from monai_petl.core.roles import Site, backbone_modules
from monai_petl.core.switching import backbone_loaded
from monai_petl.methods import PRESETS, ROLES, SSF, LoRA
from monai_petl.methods.parts.lora_layers import ConvLoRA, DoRADelta, FusedLoRA, LinearLoRA, TransposedLoRA, lora_delta
from tests.conftest import differing, frozen, shake_statistics, state_of, train

pytestmark = pytest.mark.filterwarnings("ignore:the rank saves nothing")

SMALL_VIT = {"hidden_size": 24, "mlp_dim": 48, "num_heads": 2}


def vit() -> ViT:
    return ViT(1, (16, 16), (8, 8), num_layers=2, spatial_dims=2, **SMALL_VIT)


def unetr() -> UNETR:
    return UNETR(1, 2, (16, 16, 16), feature_size=4, **SMALL_VIT)


def swin(**options: Any) -> SwinUNETR:
    return SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), **options)


def unet(dims: int = 3) -> UNet:
    return shake_statistics(UNet(dims, 1, 2, (8, 16), (2,), num_res_units=1, norm="batch"))


def segresnet() -> SegResNet:
    return SegResNet(3, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,))


def dynunet() -> DynUNet:
    return DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8], norm_name="batch")


IMAGES = {
    vit: (2, 1, 16, 16),
    unetr: (1, 1, 16, 16, 16),
    swin: (1, 1, 64, 32, 32),
    unet: (2, 1, 16, 16, 16),
    segresnet: (2, 1, 16, 16, 16),
    dynunet: (2, 1, 16, 16, 16),
}


def image_for(make: Callable) -> Tensor:
    shape = IMAGES[make]
    return torch.linspace(-9, 9, math.prod(shape)).view(shape).sin()


def output(network: nn.Module, x: Tensor) -> Tensor:
    with frozen(network):
        y = network.eval()(x)
    return y[0] if isinstance(y, tuple) else y


def shaken(network: nn.Module, deviation: float = 0.3) -> nn.Module:
    """With random values of whatever trains, as after some training."""
    for parameter in trainable_parameters(network):
        nn.init.normal_(parameter, std=deviation)
    return network


def error_of(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float(((found - wanted).abs().max() / wanted.abs().max()).detach())


# single layers: what is computed

LAYERS: dict[str, tuple[Callable[[], nn.Module], Sequence[int], Sequence[int]]] = {  # layer, input, slots
    "linear": (lambda: nn.Linear(12, 10), (2, 5, 12), ()),
    "linear without bias": (lambda: nn.Linear(12, 10, bias=False), (3, 12), ()),
    "q and v": (lambda: nn.Linear(12, 30), (2, 5, 12), (0, 2)),
    "k": (lambda: nn.Linear(12, 30, bias=False), (2, 3, 4, 12), (1,)),
    "q, k and v": (lambda: nn.Linear(12, 30), (2, 12), (0, 1, 2)),
    "kernel 1": (lambda: nn.Conv3d(6, 8, 1), (2, 6, 5, 4, 3), ()),
    "kernel 3": (lambda: nn.Conv3d(6, 8, 3, padding=1), (2, 6, 5, 4, 3), ()),
    "kernel 3, 2D": (lambda: nn.Conv2d(6, 8, 3), (2, 6, 5, 4), ()),
    "kernel 3, 1D": (lambda: nn.Conv1d(6, 8, 3), (2, 6, 5), ()),
    "kernel (1, 1, 3)": (lambda: nn.Conv3d(6, 8, (1, 1, 3)), (2, 6, 5, 4, 3), ()),
    "kernel (3, 3, 1)": (lambda: nn.Conv3d(6, 8, (3, 3, 1), padding="same"), (2, 6, 5, 4, 3), ()),
    "stride 2": (lambda: nn.Conv3d(6, 8, 3, 2, 1, bias=False), (2, 6, 5, 4, 6), ()),
    "dilation 2": (lambda: nn.Conv3d(6, 8, 3, padding=2, dilation=2), (2, 6, 5, 4, 6), ()),
    "replicate": (lambda: nn.Conv3d(6, 8, 3, padding=1, padding_mode="replicate"), (2, 6, 5, 4, 3), ()),
    "reflect": (lambda: nn.Conv3d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 5, 4, 3), ()),
    "circular": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 5, 4), ()),
    "groups 2": (lambda: nn.Conv3d(6, 8, 3, groups=2), (2, 6, 5, 4, 3), ()),
    "depthwise": (lambda: nn.Conv3d(6, 6, 3, padding=1, groups=6), (2, 6, 5, 4, 3), ()),
    "transposed": (lambda: nn.ConvTranspose3d(6, 8, 2, 2), (2, 6, 3, 2, 3), ()),
    "transposed, overlapping": (lambda: nn.ConvTranspose2d(6, 8, 3, 2, 1, 1), (2, 6, 5, 4), ()),
    "transposed, groups 2": (lambda: nn.ConvTranspose3d(6, 8, 2, 2, groups=2, bias=False), (2, 6, 3, 2, 3), ()),
    "transposed, dilation 2": (lambda: nn.ConvTranspose1d(6, 8, 3, dilation=2), (2, 6, 5), ()),
}


class Case:
    """A layer with a delta, beside the layer without."""

    def __init__(self, kind: str, dora: bool = False, **options: Any) -> None:
        make, shape, slots = LAYERS[kind]
        self.plain, self.x = make().eval(), torch.randn(shape)
        self.layer: Any = copy.deepcopy(self.plain)
        given = {"rank": 2, "scale": 0.75, "dropout": 0.0, "gaussian": False, "shared_a": False, **options}
        self.delta: Any = lora_delta(Site(kind, self.layer, tuple(slots)), dora=dora, **given)
        add_delta(self.layer, self.delta, "default")

    def shake(self) -> Case:
        for parameter in self.delta.parameters():
            nn.init.normal_(parameter)
        return self


@pytest.fixture(params=LAYERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def product_by_hand(layer: Any, delta: Any) -> Tensor:
    """B A of the layer's weight, group by group and slot by slot."""
    if isinstance(delta, FusedLoRA):
        whole = torch.zeros_like(layer.weight)
        thirds = whole.chunk(3)  # views
        for slot, a, b in zip(delta.slots, delta.A, delta.B, strict=True):
            thirds[slot].copy_(b @ a)
        return whole
    a, b = delta.A.weight.flatten(1), delta.B.weight.flatten(1)
    if isinstance(delta, LinearLoRA):
        return b @ a
    pairs = list(zip(a.chunk(layer.groups), b.chunk(layer.groups), strict=True))
    if isinstance(delta, TransposedLoRA):
        return torch.cat([a.T @ b for a, b in pairs]).view_as(layer.weight)
    return torch.cat([b @ a for a, b in pairs]).view_as(layer.weight)


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_delta_changes_no_bit(kind, dora):
    case = Case(kind, dora)
    with torch.no_grad():
        assert torch.equal(case.layer(case.x), case.plain(case.x))


@torch.no_grad()
def test_the_output_is_that_of_the_weight_plus_the_scaled_product(kind):
    case = Case(kind).shake()
    changed = copy.deepcopy(case.plain)
    changed.weight += 0.75 * product_by_hand(changed, case.delta)
    assert error_of(changed(case.x), case.plain(case.x)) > 0.1
    assert error_of(case.layer(case.x), changed(case.x)) < 1e-5


@torch.no_grad()
def test_dora_is_the_lengths_times_the_directions(kind):
    case = Case(kind, dora=True).shake()
    changed = copy.deepcopy(case.plain)
    changed.weight += 0.75 * product_by_hand(changed, case.delta.factors)
    rows = changed.weight
    if isinstance(changed, nn.modules.conv._ConvTransposeNd):  # outputs first
        rows = torch.cat([group.transpose(0, 1) for group in rows.chunk(changed.groups)])
    directions = rows / rows.flatten(1).norm(dim=1).view(-1, *[1] * (rows.ndim - 1))
    directions[case.delta.touched] *= case.delta.magnitude.view(-1, *[1] * (rows.ndim - 1))
    if isinstance(changed, nn.modules.conv._ConvTransposeNd):
        directions = torch.cat([group.transpose(0, 1) for group in directions.chunk(changed.groups)])
    untouched = [i for i in range(len(rows)) if i not in case.delta.touched]
    directions[untouched] = case.plain.weight[untouched] if untouched else directions[untouched]
    changed.weight.copy_(directions)
    assert error_of(changed(case.x), case.plain(case.x)) > 0.1
    assert error_of(case.layer(case.x), changed(case.x)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("kind", "rest"), [("q and v", slice(10, 20)), ("k", [*range(10), *range(20, 30)])])
def test_the_other_thirds_of_a_fused_projection_stay_bit_identical(kind, rest, dora):
    case = Case(kind, dora).shake()
    assert torch.equal(case.layer(case.x)[..., rest], case.plain(case.x)[..., rest])
    merge_deltas(case.layer, "default")
    assert torch.equal(case.layer.weight[rest], case.plain.weight[rest])
    assert not torch.equal(case.layer.weight, case.plain.weight)


@pytest.mark.parametrize(("gaussian", "deviation"), [(False, 1 / math.sqrt(3 * 600)), (True, 1 / 8)])
@pytest.mark.parametrize("make", [lambda: nn.Linear(600, 30), lambda: nn.Conv1d(200, 30, 3)], ids=["linear", "conv"])
def test_a_starts_at_random_and_b_at_zero(make, gaussian, deviation):
    delta: Any = lora_delta(Site("", make()), 8, 1.0, 0.0, gaussian, False, False)
    assert not delta.B.weight.any()
    assert delta.A.weight.std().item() == pytest.approx(deviation, rel=0.05)
    if not gaussian:
        assert delta.A.weight.abs().max() <= 1 / math.sqrt(600)


@pytest.mark.parametrize("kind", ["linear", "q and v", "kernel 3", "transposed"])
def test_dropout_is_on_the_branch_alone_and_in_training_alone(kind):
    case = Case(kind, dropout=0.5)
    with torch.no_grad():
        assert torch.equal(case.layer.train()(case.x), case.plain(case.x))  # B is zero
        case.shake()
        torch.manual_seed(1)
        found = case.layer(case.x)
        torch.manual_seed(1)
        dropped = F.dropout(case.x)
        case.delta.eval()
        wanted = case.plain(case.x) + case.delta(dropped, torch.zeros_like(found))
        assert error_of(found, wanted) < 1e-6
        assert torch.equal(case.layer.eval()(case.x), case.layer(case.x))
        assert error_of(case.layer(case.x), found) > 0.01


@pytest.mark.parametrize("kind", ["linear", "q and v", "k"])
def test_linear_layers_take_a_single_vector_and_no_vector_at_all(kind):
    case = Case(kind).shake()
    x = torch.randn(3, 12)
    with torch.no_grad():
        assert torch.allclose(case.layer(x[0]), case.layer(x)[0], atol=1e-5)
    assert case.layer(x[:0]).shape == (0, case.plain.out_features)


# single layers: merging


@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_a_merged_layer_computes_the_same(kind, dora):
    case = Case(kind, dora).shake()
    before = case.layer(case.x)
    merge_deltas(case.layer, "default")
    assert error_of(case.layer(case.x), before) < 1e-5
    remove_deltas(case.layer, "default")
    assert type(case.layer) is type(case.plain)
    assert error_of(case.layer(case.x), before) < 1e-5


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", ["linear", "q and v", "kernel 3", "groups 2", "transposed, groups 2"])
def test_unmerging_restores_every_bit_a_hundred_times(kind, dtype, dora):
    case = Case(kind, dora).shake()
    case.layer.to(dtype)
    before = case.layer.weight.clone()
    for _ in range(100):
        merge_deltas(case.layer, "default")
        assert not torch.equal(case.layer.weight, before)
        unmerge_deltas(case.layer, "default")
        assert torch.equal(case.layer.weight, before)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_merging_in_half_precision_rounds_once(kind, dtype, dora):
    case = Case(kind, dora).shake()
    case.layer.to(dtype)
    precise = copy.deepcopy(case.layer).float()
    merge_deltas(case.layer, "default")
    merge_deltas(precise, "default")
    assert torch.equal(case.layer.weight, precise.weight.to(dtype))


# convolutions without gradients


CONVOLUTION_KINDS = [kind for kind, (make, *_) in LAYERS.items() if isinstance(make(), nn.modules.conv._ConvNd)]


@pytest.mark.parametrize("kind", CONVOLUTION_KINDS)
def test_without_gradients_a_convolution_runs_once_and_computes_the_same(kind):
    case = Case(kind).shake()
    plain, _ = operations(case.plain, case.x)
    with_gradients, wanted = operations(case.layer, case.x)
    with torch.no_grad():
        without, found = operations(case.layer, case.x)
    assert error_of(found, wanted) < 1e-5
    assert (
        without == plain + 2 * 2 * case.plain.weight.numel() < with_gradients
    )  # the product of the factors, at rank 2
    case.delta.requires_grad_(False)
    assert torch.equal(case.layer(case.x), found)


@pytest.mark.parametrize("make", [lambda: nn.Conv3d(32, 32, 3, padding=1), lambda: nn.ConvTranspose2d(32, 32, 3)])
@torch.no_grad()
def test_on_a_small_image_a_convolution_runs_beside_its_factors_because_that_is_cheaper(make):
    layer = make()
    x = torch.randn(1, 32, *[2] * (layer.weight.ndim - 2))
    plain, _ = operations(layer, x)
    network = shaken(adapt(nn.Sequential(layer), LoRA(rank=2))).eval()
    found, _ = operations(network, x)
    assert found - plain < 2 * 2 * layer.weight.numel()


def operations(network: nn.Module, x: Tensor) -> tuple[int, Tensor]:
    with FlopCounterMode(display=False) as counter:
        y = network(x)
    return counter.get_total_flops(), y


@pytest.mark.parametrize("second", [LoRA(rank=3), LoRA(rank=2, dora=True), SSF()], ids=["LoRA", "DoRA", "SSF"])
def test_without_gradients_several_deltas_of_a_convolution_compute_the_same(second):
    network = adapt(nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2)), LoRA(rank=2))
    shaken(adapt(shaken(network), second, name="second")).eval()
    x = torch.randn(2, 6, 20, 20)
    with_gradients = network(x)
    with torch.no_grad():
        assert error_of(network(x), with_gradients) < 1e-5


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: ViT(3, (224, 224), (16, 16), spatial_dims=2), (1, 3, 224, 224)),
        (lambda: UNet(3, 1, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2), (1, 1, 64, 64, 64)),
        (lambda: SegResNet(3, 32, 1, 2), (1, 1, 64, 64, 64)),
    ],
    ids=["ViT-B", "UNet", "SegResNet"],
)
@torch.no_grad()
def test_attached_lora_takes_at_most_a_tenth_more_operations(make, shape):
    with torch.device("meta"):
        network, x = make().eval(), torch.empty(shape)
        before, _ = operations(network, x)
        after, _ = operations(adapt(network, LoRA(rank=8)).eval(), x)
    assert before < after < 1.1 * before


def test_a_subclass_of_a_convolution_keeps_its_own_forward():
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    network, x = nn.Sequential(Doubled(6, 8, 3)), torch.randn(2, 6, 20, 20)
    before = output(network, x)
    assert torch.equal(output(adapt(network, LoRA(rank=2)), x), before)


# DoRA


def test_the_length_in_the_denominator_is_not_differentiated():
    case = Case("linear", dora=True).shake()
    a, b = case.delta.factors.A.weight, case.delta.factors.B.weight
    wanted = torch.autograd.grad(_dora_by_hand(case, a, b).square().sum(), [a, b, case.delta.magnitude])
    found = torch.autograd.grad(case.layer(case.x).square().sum(), [a, b, case.delta.magnitude])
    for f, w in zip(found, wanted, strict=True):
        assert error_of(f, w) < 1e-5


def _dora_by_hand(case: Case, a: Tensor, b: Tensor) -> Tensor:
    weight = case.plain.weight.detach() + 0.75 * b @ a
    lengths = weight.detach().norm(dim=1)
    return F.linear(case.x, (case.delta.magnitude / lengths)[:, None] * weight, case.plain.bias.detach())


def test_rows_of_zeros_stay_zero_with_dora():
    case = Case("linear", dora=True)
    with torch.no_grad():
        case.layer.weight[3] = 0
    case.delta.reset(case.layer)
    loss = case.layer(case.x).square().sum()
    loss.backward()
    assert torch.equal(case.layer(case.x)[..., 3], case.layer.bias[3].expand(2, 5))
    assert all(p.grad.isfinite().all() for p in case.delta.parameters())


# networks


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (vit, {}),
        (vit, {"targets": ["all-linear"], "dora": True}),
        (vit, {"targets": ["transformer"], "exclude": ["*norm*"]}),
        (unetr, {"targets": ["all-linear", "all-conv", "patch_embedding"], "rank": 2}),
        (unetr, {"dora": True, "rslora": True}),
        (unetr, {"shared_a": True}),
        (swin, {}),
        (swin, {"targets": ["attention", "merging", "patch_embedding"], "init": "gaussian", "bias": "lora_only"}),
        (unet, {"rank": 4}),
        (unet, {"rank": 4, "dora": True, "bias": "all"}),
        (dynunet, {"rank": 3}),
    ],
)
def test_an_adapted_network_computes_what_the_backbone_computes_and_is_of_its_class(make, options):
    network, image = make(), image_for(make)
    kind, before = type(network), output(network, image)
    adapt(network, LoRA(**{"rank": 4, **options}))
    difference = (output(network, image) - before).abs().max()
    assert difference <= (1e-6 if options.get("dora") else 0)
    assert type(network) is kind
    shaken(network)
    assert not torch.allclose(output(network, image), before, atol=1e-3)


def test_planar_convolutions_are_adapted_too():
    network, image = unet(2), torch.randn(2, 1, 16, 16)
    before = output(network, image)
    assert torch.equal(output(adapt(network, LoRA(rank=2)), image), before)


@pytest.mark.parametrize(
    ("column", "make", "device", "trained"),
    [
        (1, lambda: ViT(3, (224, 224), (16, 16), spatial_dims=2, classification=True, qkv_bias=True), "meta", 294_912),
        (2, lambda: UNETR(1, 2, (96, 96, 96)), "meta", 294_912),
        (3, lambda: SwinUNETR(1, 2, feature_size=24), "cpu", 23_040),
        (4, lambda: SwinUNETR(1, 2, feature_size=48), "cpu", 46_080),
        (5, lambda: UNet(3, 1, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2), "meta", 251_104),
    ],
    ids=["ViT-B", "UNETR", "SwinUNETR 24", "SwinUNETR 48", "UNet"],
)
def test_the_default_and_the_methods_of_the_page_train_as_many_values_as_stated(column, make, device, trained):
    with torch.device(device):
        network = make()
        assert summary(adapt(network, LoRA(rank=8))).trainable == trained
        rows = [row for row in page_rows() if row[0].startswith("LoRA(")]
        assert len(rows) == 6
        for row in rows:
            remove_adapter(network)
            if row[column]:
                adapt(network, eval(row[0], {"LoRA": LoRA}))
                assert f"{summary(network).trainable:,}" == row[column], row[0]
            else:
                with pytest.raises(ValueError, match="no layer of this"):
                    adapt(network, eval(row[0], {"LoRA": LoRA}))
                adapt(network, [])


def test_the_page_has_all_roles_presets_and_options():
    rows = {row[0]: row[1:] for row in page_rows()}
    for role, meaning in ROLES.items():
        assert rows[role][0].startswith(meaning)
    for preset, roles in PRESETS.items():
        assert rows[preset] == [", ".join(f"`{role}`" for role in roles)]
    assert {field.name for field in dataclasses.fields(LoRA)} <= rows.keys()


def page_rows() -> list[list[str]]:
    """Cells of the page's tables whose first one is code."""
    page = Path(__file__).resolve().parents[2] / "docs" / "methods" / "lora.md"
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")] for line in lines]
    return [[row[0].strip("`"), *row[1:]] for row in rows]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"targets": ["blocks.0.mlp.linear1"]}, 4 * (24 + 48)),
        ({"targets": ["blocks.0.attn.qkv"]}, 3 * 4 * (24 + 24)),
        ({"targets": ["q"]}, 2 * 4 * (24 + 24)),
        ({"targets": ["q"], "shared_a": True}, 2 * 4 * (24 + 72)),
        ({"targets": ["q"], "dora": True}, 2 * (4 * (24 + 24) + 24)),
        ({"targets": ["blocks.0.attn.out_proj"], "bias": "lora_only"}, 4 * (24 + 24) + 24),
        ({"rank_pattern": {"blocks.0.*": 2}}, 2 * (2 + 4) * (24 + 24)),
    ],
)
def test_the_number_of_trained_parameters_is_that_of_the_formula(options, count):
    assert summary(adapt(vit(), LoRA(**{"rank": 4, **options}))).trainable == count


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (nn.Conv3d(6, 8, 3), 2 * (6 * 27 + 8)),
        (nn.Conv3d(6, 8, 3, groups=2), 2 * 2 * 3 * 27 + 8 * 2),
        (nn.ConvTranspose3d(6, 8, 2, 2), 2 * (6 + 8 * 8)),
    ],
)
def test_convolutions_have_the_parameters_of_the_formula(layer, count):
    network = adapt(nn.Sequential(layer), LoRA(rank=2))
    assert summary(network).trainable == count


@pytest.mark.parametrize(("options", "scale"), [({}, 1.5), ({"rslora": True}, 3.0)])
def test_the_scale_is_alpha_over_the_rank_or_its_root(options, scale):
    network = shaken(adapt(nn.Sequential(nn.Linear(12, 10)), LoRA(rank=4, alpha=6, targets=["linear"], **options)))
    x, (_, delta) = torch.randn(3, 12), deltas_of(network)[0]
    with torch.no_grad():
        wanted = F.linear(x, network[0].weight + scale * delta.B.weight @ delta.A.weight, network[0].bias)
        assert error_of(network(x), wanted) < 1e-6


def test_ranks_and_alphas_may_differ_by_layer():
    patterns = {"rank_pattern": {"blocks.0.*": 2}, "alpha_pattern": {"*.1.attn.*": 3.0}}
    network = adapt(vit(), LoRA(rank=4, alpha=8, **patterns))
    assert [(d.rank, d.scale) for _, d in deltas_of(network)] == [(2, 4.0), (4, 0.75)]
    with pytest.raises(
        ValueError, match=r"rank_pattern: none of the 2 adapted layers is called '\*.mlp'; they are: blocks.0"
    ):
        adapt(vit(), LoRA(rank_pattern={"*.mlp": 2}))
    with pytest.raises(ValueError, match="alpha_pattern: none of the 2"):
        adapt(vit(), LoRA(alpha_pattern={"*.mlp": 2}))


def test_the_default_targets_are_queries_and_values_or_all_convolutions():
    assert [(type(d), d.slots) for _, d in deltas_of(adapt(vit(), LoRA()))] == [(FusedLoRA, (0, 2))] * 2
    kinds = {type(d) for _, d in deltas_of(adapt(unet(), LoRA(rank=2)))}
    assert kinds == {ConvLoRA, TransposedLoRA}
    segresnet = adapt(SegResNet(init_filters=8, blocks_down=(1, 1), blocks_up=(1,)), LoRA(rank=2))
    assert {type(d) for _, d in deltas_of(segresnet)} == {ConvLoRA}


def test_separate_projections_get_plain_factors():
    network = adapt(nn.ModuleDict({"attention": SABlock(24, 2, use_combined_linear=False)}), LoRA(rank=4))
    assert [type(d) for _, d in deltas_of(network)] == [LinearLoRA, LinearLoRA]


def test_containers_are_never_adapted():
    network = adapt(unet(), LoRA(rank=2, targets=["*conv"]))
    assert all(isinstance(layer, nn.Conv3d | nn.ConvTranspose3d) for layer, _ in deltas_of(network))


# training


@pytest.mark.parametrize(
    ("make", "also_train"),
    [(vit, ["norm"]), (unetr, ["out"]), (unet, []), (dynunet, ["output_block"])],
    ids=["vit", "unetr", "unet", "dynunet"],
)
def test_the_factors_and_what_is_named_train_and_nothing_else_changes(make, also_train):
    network = adapt(make(), LoRA(rank=2), also_train)
    image, before = image_for(make), state_of(network)
    wanted = {n for n in before if ".deltas." in n or n.startswith(tuple(f"{n}." for n in also_train))}
    assert {n for n, p in network.named_parameters(remove_duplicate=False) if p.requires_grad} == wanted

    def loss() -> Tensor:
        y = network(image)
        return (y[0] if isinstance(y, tuple) else y).square().mean()

    train(network, loss, steps=5, weight_decay=0.01)
    assert differing(before, network.state_dict()) == wanted


def test_b_moves_in_the_first_step_and_a_in_the_second():
    network = adapt(vit(), LoRA(rank=2))
    image = image_for(vit)

    def changed(before: dict[str, Tensor]) -> set[str]:
        return {name.rsplit(".", 1)[1] for name in differing(before, network.state_dict())}

    before = state_of(network)
    train(network, lambda: network(image)[0].square().mean(), steps=1, weight_decay=0)
    assert changed(before) == {"B"}
    after_one = state_of(network)
    train(network, lambda: network(image)[0].square().mean(), steps=1, weight_decay=0)
    assert changed(after_one) == {"A", "B"}


@pytest.mark.parametrize(
    ("bias", "trained"),
    [("none", set()), ("lora_only", {"blocks.0.attn.out_proj.bias", "blocks.1.attn.out_proj.bias"}), ("all", None)],
)
def test_biases_train_as_asked(bias, trained):
    network = adapt(vit(), LoRA(rank=2, targets=["proj"], bias=bias))
    found = {n for n, p in network.named_parameters() if p.requires_grad and ".deltas." not in n}
    used = {name for name, _ in backbone_modules(network)}
    every = {n for n, _ in network.named_parameters() if n.endswith(".bias") and n.removesuffix(".bias") in used}
    assert found == (every if trained is None else trained)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"targets": ["all-linear"]}], ids=["plain", "dora", "linear"])
def test_checkpointed_activations_give_the_same_gradients(options):
    image, gradients = image_for(swin), []
    for use_checkpoint in (False, True):
        torch.manual_seed(0)
        network = shaken(adapt(swin(use_checkpoint=use_checkpoint), LoRA(rank=2, **options)), 0.1)
        network.train()(image).square().mean().backward()
        gradients.append([p.grad for p in trainable_parameters(network)])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.isfinite().all()
        assert torch.allclose(plain, checkpointed, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "q and v", "kernel 3", "transposed"])
def test_autocast_keeps_the_type_of_the_backbone_and_stays_close(kind, dora):
    case = Case(kind, dora).shake()
    exact = case.layer(case.x)
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = case.plain(case.x), case.layer(case.x)
    assert found.dtype == plain.dtype
    assert error_of(found.float(), exact) < 0.03
    found.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in case.delta.parameters())


@pytest.mark.parametrize("make", [vit, unet, segresnet])
def test_networks_train_under_autocast(make):
    network, image = shaken(adapt(make(), LoRA(rank=2)), 0.1), image_for(make)
    exact = output(network, image)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(image)
    y = y[0] if isinstance(y, tuple) else y
    assert error_of(y.float(), exact) < 0.05
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in trainable_parameters(network))


# merging


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (vit, {"targets": ["all-linear", "patch_embedding"]}),
        (vit, {"targets": ["all-linear"], "dora": True}),
        (unetr, {"targets": ["q", "v", "conv", "transposed_conv"]}),
        (swin, {}),
        (swin, {"shared_a": True, "rslora": True}),
        (unet, {}),
        (dynunet, {}),
    ],
)
def test_a_merged_network_computes_the_same_and_unloaded_is_a_plain_one(make, options):
    network = make()
    keys, kinds = list(network.state_dict()), {n: type(m) for n, m in network.named_modules()}
    shaken(adapt(network, LoRA(rank=2, **options)), 0.1)
    image = image_for(make)
    before = output(network, image)
    assert error_of(output(merge(network), image), before) < 1e-5
    merge_and_unload(network)
    assert list(network.state_dict()) == keys
    assert {n: type(m) for n, m in network.named_modules()} == kinds
    assert error_of(output(network, image), before) < 1e-5


@pytest.mark.parametrize("make", [vit, unet])
def test_a_network_merged_and_unmerged_is_as_it_was(make):
    network = shaken(adapt(make(), LoRA(rank=2)))
    before, image = state_of(network), image_for(make)
    adapted = output(network, image)
    merge(network)
    with pytest.raises(ValueError, match="adapter 'default' is merged already; call unmerge"):
        merge(network)
    unmerge(network)
    assert differing(before, network.state_dict()) == set()
    assert torch.equal(output(network, image), adapted)
    with pytest.raises(ValueError, match="is not merged"):
        unmerge(network)


def test_without_a_backup_merging_is_for_good():
    network = merge(shaken(adapt(vit(), LoRA(rank=2))), keep_backup=False)
    assert all(delta.backup is None for _, delta in deltas_of(network))
    with pytest.raises(ValueError, match="the weights from before are gone"):
        unmerge(network)


@pytest.mark.parametrize("unload", [True, False], ids=["unloaded", "attached"])
def test_unetr_can_be_scripted(unload):
    method = LoRA(rank=2, targets=["q", "v", "proj", "mlp", "decoder2.*"], dropout=0.1)
    network, image = shaken(adapt(unetr(), method), 0.1).eval(), image_for(unetr)
    if unload:
        merge_and_unload(network)
    scripted = torch.jit.script(network)
    assert torch.allclose(output(scripted, image), output(network, image), atol=1e-6)


@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("make", [unet, segresnet])
def test_convolutional_networks_with_lora_can_be_scripted_traced_and_exported(make, gradients):
    network, image = shaken(adapt(make(), LoRA(rank=2)), 0.1).eval(), image_for(make)
    with torch.set_grad_enabled(gradients):
        wanted = network(image)
        for other in (torch.jit.script(network), torch.jit.trace(network, image)):
            for _ in range(3):  # the first two are those in which it is optimised
                assert error_of(other(image), wanted) < 1e-5
        batch = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(network, (image,), dynamic_shapes=({0: batch},)).module()
        for count in (1, 2, 5):
            images = image[:1].repeat(count, 1, 1, 1, 1)
            assert error_of(exported(images), network(images)) < 1e-5


def test_dora_can_be_scripted_once_it_is_merged_for_good():
    layers = nn.Sequential(nn.Conv3d(6, 8, 3), nn.ConvTranspose3d(8, 6, 2, 2), nn.Flatten(2), nn.Linear(64, 10))
    network = shaken(adapt(layers, LoRA(rank=2, dora=True, targets=["all-conv", "linear"]))).eval()
    x = torch.randn(2, 6, 4, 4, 4)
    before = output(network, x)
    assert error_of(torch.jit.script(merge_and_unload(network))(x), before) < 1e-5


@pytest.mark.parametrize("unload", [True, False], ids=["unloaded", "attached"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_swin_unetr_can_be_traced(unload):
    network, image = shaken(adapt(swin(), LoRA(rank=2)), 0.1).eval(), image_for(swin)
    if unload:
        merge_and_unload(network)
    with torch.no_grad():
        traced = torch.jit.trace(network, image, check_trace=False)
        assert torch.allclose(traced(image), network(image), atol=1e-6)


# copies


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"targets": ["all-linear"]}], ids=["plain", "dora", "linear"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same_and_share_nothing(options, copied):
    network, image = shaken(adapt(vit(), LoRA(rank=2, **options))), image_for(vit)
    before = output(network, image)
    other = copied(network)
    assert torch.equal(output(other, image), before)
    assert torch.equal(output(merge(other), image), output(merge(copied(network)), image))
    for parameter in other.parameters():
        nn.init.ones_(parameter)
    assert torch.equal(output(network, image), before)


def test_the_state_survives_pickling(tmp_path):
    network, image = shaken(adapt(vit(), LoRA(rank=2))), image_for(vit)
    torch.save(network.state_dict(), tmp_path / "state.pt")
    other = adapt(vit(), LoRA(rank=2))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(output(other, image), output(network, image))


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=["plain", "dora"])
def test_replicas_compute_the_same_and_pass_gradients_on(options, monkeypatch):
    def broadcast(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    replication = importlib.import_module("torch.nn.parallel.replicate")  # the function has the module's name
    monkeypatch.setattr(replication, "_broadcast_coalesced_reshape", broadcast)
    network, image = shaken(adapt(vit(), LoRA(rank=2, **options))).eval(), image_for(vit)
    for replica in replication.replicate(network, [0, 1]):
        assert torch.equal(replica(image)[0], network(image)[0])
        network.zero_grad()
        replica(image)[0].square().sum().backward()
        assert all(p.grad.any() for p in trainable_parameters(network))


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=["plain", "dora"])
def test_a_compiled_network_computes_the_same(options):
    network, image = shaken(adapt(vit(), LoRA(rank=2, **options))).eval(), image_for(vit)
    compiled = torch.compile(network, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(image)[0], network(image)[0], atol=1e-6)
        merge(network)
        assert torch.allclose(compiled(image)[0], network(image)[0], atol=1e-6)
    torch.compiler.reset()


# files and checkpoints


def test_a_checkpoint_of_the_plain_network_loads_before_and_after(tmp_path):
    trained, image = unetr(), image_for(unetr)
    torch.save(trained.state_dict(), tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    before, after = unetr(), adapt(unetr(), LoRA(rank=2))
    before.load_state_dict(plain)
    adapt(before, LoRA(rank=2))
    after.load_state_dict(plain)
    wanted = output(trained, image)
    assert torch.equal(output(before, image), wanted)
    assert torch.equal(output(after, image), wanted)
    with pytest.raises(RuntimeError, match=r"Missing key.*norm.weight"):
        after.load_state_dict({n: t for n, t in plain.items() if n != "vit.norm.weight"})


def test_a_checkpoint_loaded_afterwards_gives_dora_its_lengths_when_told():
    trained, image = vit(), image_for(vit)
    network = adapt(vit(), LoRA(rank=2, dora=True))
    network.load_state_dict(trained.state_dict())
    backbone_loaded(network)
    assert torch.allclose(output(network, image), output(trained, image), atol=1e-6)


def test_the_plain_networks_names_and_values_can_be_had_back():
    network, image = vit(), image_for(vit)
    before = state_of(network)
    adapt(network, LoRA(rank=2, bias="all"), ["norm"])
    train(network, lambda: network(image)[0].square().mean())
    plain = backbone_state_dict(network)
    assert list(plain) == list(before)
    assert differing(before, plain) == set()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["lora_A", "lora_B"]),
        ({"shared_a": True}, ["lora_A.weight", "lora_B.weight"]),
        ({"dora": True}, ["dora_magnitude", "dora_factors.A", "dora_factors.B"]),
        ({"targets": ["q", "*.qkv"], "rank_pattern": {"*.1.*": 3}}, ["lora_A", "lora_B"]),
    ],
)
def test_a_file_holds_the_trained_tensors_and_restores_the_outputs(options, names, tmp_path):
    backbone, image = vit(), image_for(vit)
    network = shaken(adapt(copy.deepcopy(backbone), LoRA(rank=2, **options), ["norm"]))
    path = save_adapter(network, tmp_path / "lora.safetensors")
    found = inspect_adapter(path)
    factors = {f"blocks.{i}.attn.qkv.{name}" for i in range(2) for name in names}
    assert set(found["shapes"]) == {"norm.weight", "norm.bias"} | factors
    assert found["values"] == summary(network).trainable
    assert (found["methods"][0]["method"], found["methods"][0]["rank"]) == ("LoRA", 2)
    assert torch.equal(output(load_adapter(backbone, path), image), output(network, image))


def test_a_file_is_hardly_larger_than_its_tensors(tmp_path):
    network = adapt(SwinUNETR(1, 2, feature_size=24), LoRA(rank=8))
    path = save_adapter(network, tmp_path / "lora.safetensors")
    payload = sum(4 * t.numel() for t in adapter_state_dict(network).values())
    assert payload == 4 * 23_040
    assert path.stat().st_size < 1.05 * payload + 4096


def test_another_backbone_is_refused(tmp_path):
    backbone = vit()
    path = save_adapter(adapt(copy.deepcopy(backbone), LoRA(rank=2)), tmp_path / "lora.safetensors")
    with pytest.raises(AdapterFileError, match=r"trained on another backbone \(ViT\).*with other values"):
        load_adapter(vit(), path)
    with pytest.raises(AdapterFileError, match="trained on another backbone"):
        load_adapter(unet(), path)


def test_two_adapters_of_one_backbone_are_swapped(tmp_path):
    backbone, image = vit(), image_for(vit)
    plain, wanted = output(backbone, image), {}
    for name, options in {"liver": {"rank": 2}, "kidney": {"rank": 3, "targets": ["all-linear"]}}.items():
        network = shaken(adapt(copy.deepcopy(backbone), LoRA(**options), name=name))
        save_adapter(network, tmp_path / f"{name}.safetensors")
        wanted[name] = output(network, image)
    for name in wanted:
        load_adapter(backbone, tmp_path / f"{name}.safetensors")
    for name in ("liver", "kidney", "liver"):
        activate(backbone, name)
        assert torch.equal(output(backbone, image), wanted[name])
    merge(backbone, "liver")
    assert error_of(output(backbone, image), wanted["liver"]) < 1e-5
    activate(backbone, "kidney")
    assert torch.equal(output(backbone, image), wanted["kidney"])
    activate(backbone)
    assert torch.equal(output(backbone, image), plain)
    for name in wanted:
        remove_adapter(backbone, name)
    assert type(backbone.blocks[0].attn.qkv) is nn.Linear


def test_two_adapters_add_up():
    network = adapt(nn.Sequential(nn.Linear(12, 10)), LoRA(rank=2, targets=["linear"]), name="first")
    shaken(network)
    shaken(adapt(network, LoRA(rank=3, targets=["linear"]), name="second"))
    x, both = torch.randn(4, 12), [d for _, d in deltas_of(network)]
    with torch.no_grad():
        weight = network[0].weight + sum(d.scale * d.B.weight @ d.A.weight for d in both)
        assert error_of(network(x), F.linear(x, weight, network[0].bias)) < 1e-5
        merge(merge(network, "first"), "second")
        assert error_of(network(x), F.linear(x, weight, network[0].bias)) < 1e-5


# refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be a whole number of at least 1, got 0"),
        ({"rank": 2.5}, ValueError, "rank must be a whole number of at least 1, got 2.5"),
        ({"rank_pattern": {"*": -1}}, ValueError, "rank must be a whole number of at least 1, got -1"),
        ({"alpha": 0}, ValueError, "alpha must be above 0 and finite, got 0"),
        ({"alpha_pattern": {"*": -1.0}}, ValueError, "alpha must be above 0 and finite, got -1"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1, got 1.0"),
        ({"init": "zeros"}, ValueError, "init must be 'kaiming' or 'gaussian', got 'zeros'"),
        ({"bias": "some"}, ValueError, "bias must be 'none', 'lora_only' or 'all', got 'some'"),
        ({"targets": "q"}, ValueError, "must be lists of roles or patterns"),
        ({"targets": ["mlp.linear1"]}, ValueError, r"nearest are .*mlp\.linear1"),
        ({"targets": ["blocks"]}, TypeError, "only Linear, .* can be adapted"),
        (
            {"targets": ["norm"]},
            TypeError,
            "LoRA adapts linear layers and convolutions, and blocks.0.norm1 is a LayerNorm",
        ),
        ({"exclude": ["*"]}, ValueError, "nothing is left to adapt"),
        ({"rank": 24}, ValueError, "rank 24 is not below that of any of the 2 layers .* give a rank below 24"),
    ],
)
def test_what_makes_no_sense_is_refused_and_the_network_is_as_it_was(options, error, message):
    network = vit()
    before = [(n, type(m), m.training) for n, m in network.named_modules()]
    with pytest.raises(error, match=message):
        adapt(network, LoRA(**options))
    assert [(n, type(m), m.training) for n, m in network.named_modules()] == before
    assert all(p.requires_grad for p in network.parameters())


def test_adapting_twice_under_one_name_is_refused():
    network = adapt(vit(), LoRA(rank=2))
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        adapt(network, LoRA(rank=2))
    with pytest.raises(ValueError, match="adapter 'twice' has a delta of the kind 'lora' at this Linear already"):
        adapt(network, [LoRA(rank=2, targets=["q"]), LoRA(rank=2, targets=["v"])], name="twice")
    assert len(deltas_of(network)) == 2


def test_exclusion_wins():
    network = adapt(vit(), LoRA(rank=2, targets=["q", "*.qkv"], exclude=["blocks.0"]))
    assert [layer is network.blocks[1].attn.qkv for layer, _ in deltas_of(network)] == [True]


def test_layers_in_which_the_rank_saves_nothing_are_left_out_with_a_warning():
    with pytest.warns(
        UserWarning, match=r"the rank saves nothing in 2 of 4 layers, which are left out: .*linear1"
    ) as caught:
        network = adapt(ViT(1, (16, 16), (8, 8), 24, 16, 1, 2, spatial_dims=2), LoRA(rank=16, targets=["all-linear"]))
    assert caught[0].filename == __file__
    assert len(deltas_of(network)) == 2


def test_a_rank_given_to_a_layer_by_name_holds_and_warns_when_it_saves_nothing():
    with pytest.warns(UserWarning, match=r"the rank saves nothing in 1 of 2 layers: blocks.1.attn.qkv"):
        network = adapt(vit(), LoRA(rank=2, rank_pattern={"blocks.1.*": 30}))
    assert [d.rank for _, d in deltas_of(network)] == [2, 30]


def test_the_delta_of_a_fused_projection_with_one_a_is_that_of_a_linear_layer():
    network = adapt(vit(), LoRA(rank=2, shared_a=True))
    assert [type(d) for _, d in deltas_of(network)] == [LinearLoRA] * 2
    dora = adapt(vit(), LoRA(rank=2, dora=True))
    assert [(type(d), d.magnitude.numel()) for _, d in deltas_of(dora)] == [(DoRADelta, 48)] * 2


def test_dropout_that_is_switched_on_alone_draws_in_inference_too() -> None:
    """As for Monte Carlo samples of the scores."""
    network = adapt(nn.Sequential(nn.Conv3d(8, 8, 3, padding=1)), LoRA(2, dropout=0.5, targets=["0"])).eval()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.train()
        if hasattr(module, "B"):
            nn.init.ones_(module.B.weight)
    x = torch.rand(1, 8, 16, 16, 16)
    with torch.no_grad():
        assert not torch.equal(network(x), network(x))
        assert torch.equal(network.eval()(x), network(x))
