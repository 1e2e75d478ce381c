"""Networks with attention of other libraries: nothing is chosen by default, and the layers that could be taken are listed."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from monai.networks.nets import UNETR, AttentionUnet, DiffusionModelUNet, SegResNet, SwinUNETR, VarAutoEncoder, ViT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from monai_petl import Method, adapt, inspect_adapter, load_adapter, save_adapter, trainable_parameters
from monai_petl.methods import EPT, SSF, VPETL, VPT, FFNAdapter, LastBlocks, LoRA
from monai_petl.methods.parts.foreign_attention import collapsed, foreign_attention
from monai_petl.networks import ViTClassifier
from tests.conftest import small_punet


class TimmAttention(nn.Module):
    """As timm's: one projection for q, k and v."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class ViTSelfAttention(nn.Module):
    """As Hugging Face's: three projections, the output in another module."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.query(x) @ self.key(x).mT, -1) @ self.value(x)


class Mixer(nn.Module):
    """Attention in a class of another name, as in many networks of one's own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.to_q(x) @ self.to_k(x).mT, -1) @ self.to_v(x)


class SegmentAnythingAttention(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class Torchs(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(width, 2, batch_first=True), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attn(x, x, x, need_weights=False)[0])


class Levit(nn.Module):
    """As timm's LeViT and EfficientViT: a projection with its norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.qkv = nn.Sequential(OrderedDict(linear=nn.Linear(width, 3 * width), bn=nn.LayerNorm(3 * width)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(q @ k.mT, -1) @ v


class OneAHead(nn.Module):
    """As timm's cascaded group attention: a list of projections."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.qkvs = nn.ModuleList(nn.Linear(width // 2, 3 * width // 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        heads = [qkv(part).chunk(3, -1) for qkv, part in zip(self.qkvs, x.chunk(2, -1), strict=True)]
        return torch.cat([torch.softmax(q @ k.mT, -1) @ v for q, k, v in heads], -1)


class Unnamed(nn.Module):
    """Nothing but the function that it calls says that it is attention."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.first(x), self.first(x), self.second(x))


class Bare(nn.Module):
    """Weights without layers, as torch's own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.in_proj_weight, self.out = nn.Parameter(torch.randn(3 * width, width)), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight).chunk(3, -1)
        return self.out(F.softmax(q @ k.mT, -1) @ v)


class Transformer(nn.Module):
    """Patches by a convolution, blocks, and a neck of convolutions, as image encoders have them."""

    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, 8, 4, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": attention(), "mlp": nn.Linear(8, 8)}) for _ in range(3))
        self.neck = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        tokens = x.flatten(2).mT
        for block in self.blocks:
            tokens = tokens + block["attn"](tokens)
            tokens = tokens + block["mlp"](tokens)
        return self.neck(tokens.mT.reshape(x.shape))


FOREIGN = {
    TimmAttention: "blocks.*.attn.qkv (3), blocks.*.attn.proj (3)",
    ViTSelfAttention: "blocks.*.attn.query (3), blocks.*.attn.key (3), blocks.*.attn.value (3)",
    Mixer: "blocks.*.attn.to_q (3)",
    SegmentAnythingAttention: "blocks.*.attn.q_proj (3)",
    Torchs: "blocks.*.attn.fc (3)",
    Levit: "blocks.*.attn.qkv.linear (3)",
    OneAHead: "blocks.*.attn.qkvs.0 (3), blocks.*.attn.qkvs.1 (3)",
    Unnamed: "blocks.*.attn.first (3), blocks.*.attn.second (3)",
    Bare: "blocks.*.attn.out (3)",
}
BESIDE = (VPETL(), FFNAdapter(), VPT(), EPT(), LastBlocks())


@pytest.mark.parametrize("method", [LoRA(rank=2), SSF()], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("kind", FOREIGN)
def test_the_default_is_refused_with_the_layers_that_could_be_taken(kind, method):
    network = Transformer(kind)
    before = list(network.state_dict())
    with pytest.raises(ValueError, match="attention of another library") as error:
        adapt(network, method)
    for text in (FOREIGN[kind], "3 times, first blocks.0.attn", "patch_embed (1)", "neck (1)", "give targets"):
        assert text in str(error.value)
    assert ".out_proj" not in str(error.value) or kind is SegmentAnythingAttention
    assert list(network.state_dict()) == before
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_patterns_are_taken_and_the_log_names_them(caplog):
    network = Transformer(TimmAttention)
    with caplog.at_level("INFO", "monai_petl"):
        adapt(network, LoRA(rank=2, targets=("blocks.*.attn.qkv",)))
    assert "LoRA on 3 layers: blocks.*.attn.qkv (3)" in caplog.text
    x = torch.randn(1, 1, 16, 16)
    network(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_an_encoder_of_another_library_in_a_network_of_monai_is_refused_too():
    network = UNETR(1, 2, (32, 32), 4, 24, 16, 2, spatial_dims=2)
    network.vit.blocks[1].mlp = Mixer(24)
    with pytest.raises(ValueError, match=r"Mixer, 1 times, first vit\.blocks\.1\.mlp"):
        adapt(network, LoRA(rank=2))


@pytest.mark.parametrize("method", BESIDE, ids=lambda method: type(method).__name__)
def test_methods_of_monais_blocks_do_not_pass_over_the_attention_of_another_library(method):
    network = UNETR(1, 2, (32, 32), 4, 24, 16, 2, spatial_dims=2)
    network.vit.blocks[1] = Mixer(24)
    before = list(network.state_dict())
    with pytest.raises(ValueError, match=r"Mixer, 1 times, first vit\.blocks\.1.*use LoRA\(targets="):
        adapt(network, method)
    assert list(network.state_dict()) == before
    with pytest.raises(TypeError, match=r"of MONAI|MONAI's"):
        adapt(Transformer(TimmAttention), method)


def test_networks_that_work_by_linear_layers_have_no_default():
    block = [nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)]
    network = nn.Sequential(nn.Conv2d(1, 16, 4, 4), nn.Flatten(2), *(nn.Sequential(*deepcopy(block)) for _ in range(3)))
    for method in (LoRA(rank=2), SSF()):
        with pytest.raises(
            ValueError, match=r"works by linear layers \(6, beside 1 convolutions\).*\*\.0 \(3\), \*\.2 \(3\)"
        ):
            adapt(network, method)
    adapt(network, LoRA(rank=2, targets=("2.0", "3.0")))


@pytest.mark.parametrize("bottleneck", [False, True])
def test_convolutions_with_a_classifier_of_linear_layers_keep_their_default(bottleneck):
    layers = [nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten()]
    layers += [nn.Linear(800, 256), nn.Linear(256, 2)] if bottleneck else [nn.Linear(800, 2)]
    network = adapt(nn.Sequential(*layers), LoRA(rank=2))
    assert all("deltas" in name for name, p in network.named_parameters() if p.requires_grad)


def test_networks_of_this_package_and_of_monai_keep_their_default():
    for network in (small_punet("liver"), VarAutoEncoder(2, (1, 32, 32), 2, 4, (4, 8), (2, 2))):
        assert not foreign_attention(network)
        adapt(network, LoRA(rank=2))


def test_attention_of_another_library_inside_a_network_of_this_package_is_found():
    backbone = ViT(1, (16, 16), (8, 8), 16, 16, 2, 2, spatial_dims=2, classification=True)
    network = ViTClassifier(backbone, 2, (16, 16))
    network.backbone.blocks[1].mlp = Mixer(16)
    with pytest.raises(ValueError, match=r"Mixer, 1 times, first backbone\.blocks\.1\.mlp"):
        adapt(network, LoRA(rank=2))


def test_an_encoder_held_as_query_is_no_projection():
    encoder = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(20)))
    network = nn.ModuleDict({"encoder_q": encoder, "encoder_k": deepcopy(encoder)})
    assert not foreign_attention(network)


@pytest.mark.parametrize(
    "network",
    [
        ViT(1, (16, 16), (8, 8), 16, 16, 2, 2, spatial_dims=2),
        UNETR(1, 2, (32, 32), 4, 24, 16, 2, spatial_dims=2),
        SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), spatial_dims=2),
        AttentionUnet(2, 1, 2, (4, 8), (2,)),
        SegResNet(2, 8, 1, 2),
        DiffusionModelUNet(
            2,
            1,
            1,
            channels=(8, 8),
            attention_levels=(False, True),
            norm_num_groups=4,
            num_head_channels=4,
            num_res_blocks=1,
        ),
    ],
    ids=lambda network: type(network).__name__,
)
def test_networks_of_monai_have_a_default(network):
    assert not foreign_attention(network)
    adapt(network, LoRA(rank=2))


def test_torchs_own_transformer_layers_do_not_leave_adapters_out_in_evaluation():
    torch.manual_seed(0)
    network = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False
    ).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        before = network(x)
    adapt(network, LoRA(rank=2, targets=("*.linear1",)))
    with torch.no_grad():
        assert torch.allclose(network(x), before, atol=1e-6)
        for parameter in network.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        assert not torch.allclose(network(x), before, atol=1e-3)


def test_names_are_collapsed():
    names = ["blocks.0.attn.qkv", "blocks.1.attn.qkv", "0.conv1", "1.conv1", "stage2.proj"]
    assert collapsed(names) == "blocks.*.attn.qkv (2), *.conv1 (2), stage2.proj (1)"
    assert collapsed(["layer_0.mlp.0", "layer_1.mlp.0", "layer_0.mlp.3"]) == "layer_*.mlp.0 (2), layer_0.mlp.3 (1)"


def test_a_name_that_would_match_more_than_is_counted_is_no_pattern():
    names = ["0.conv", "1.conv", "layer.0.conv"]
    assert collapsed(names) == "0.conv and 1 like it, layer.0.conv (1)"


@pytest.mark.parametrize("method", [partial(LoRA, rank=2), SSF], ids=["LoRA", "SSF"])
def test_a_file_that_was_saved_by_a_former_default_loads(method: Callable[..., Method], tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Transformer(TimmAttention)
    network, image = adapt(deepcopy(plain), method(targets=["patch_embed", "neck"])), torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        for tensor in trainable_parameters(network):
            tensor.normal_()
    save_adapter(network, tmp_path / "new.safetensors")
    tensors = load_file(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        header = file.metadata()
    header.pop("sha256")
    header["methods"] = json.dumps([json.loads(header["methods"])[0] | {"targets": None}])
    save_file(tensors, tmp_path / "old.safetensors", header)
    loaded = load_adapter(plain, tmp_path / "old.safetensors")
    torch.testing.assert_close(loaded(image), network(image))
    save_adapter(loaded, tmp_path / "again.safetensors")
    assert inspect_adapter(tmp_path / "again.safetensors")["methods"][0]["targets"] == ["neck", "patch_embed"]
