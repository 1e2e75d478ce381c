"""Every network of ``monai.networks.nets`` that can be built small, with what it takes; the others with the reason."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import monai.networks.nets as nets
import torch
from torch import Tensor, nn

__all__ = ["LEFT_OUT", "NETWORKS", "Small", "classes", "outputs_of"]


@dataclass(frozen=True)
class Small:
    """A small network.

    Attributes:
        kind: the class's name.
        make: builds it.
        size: shape of what it takes, with the batch; several for several inputs.
        head: whether ``HeadOnly(num_classes=k)`` gives k channels. Not where there are several heads, a latent space or features,
            nor where a last step reshapes to the number that the network was built for: those are refused.
        noisy: why two training passes differ though nothing trains.
        idle: parts whose parameters no output depends on, with the reason.
    """

    kind: str
    make: Callable[[], nn.Module]
    size: tuple[int, ...] = (2, 1, 32, 32)
    head: bool = True
    noisy: str = ""
    idle: str = ""

    def inputs(self) -> tuple[Tensor, ...]:
        return (torch.randn(*self.size, generator=torch.Generator().manual_seed(1)),)


def classes() -> set[str]:
    """Names of the networks that MONAI exports, parts and aliases aside."""
    found = [getattr(nets, name) for name in dir(nets)]
    return {kind.__name__ for kind in found if inspect.isclass(kind) and issubclass(kind, nn.Module)}


def outputs_of(output: Any) -> list[Tensor]:
    """The tensors of an output, whatever holds them."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [tensor for value in values for tensor in outputs_of(value)]


U = {"channels": (4, 8, 8), "strides": (2, 2)}
VIT = {
    "in_channels": 1,
    "img_size": (32, 32),
    "patch_size": (8, 8),
    "hidden_size": 16,
    "mlp_dim": 16,
    "num_layers": 2,
    "num_heads": 2,
}
KL = {"channels": (8, 8), "attention_levels": (False, False), "num_res_blocks": 1, "norm_num_groups": 4}
KL |= {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False, "latent_channels": 2}
VQ = {"channels": (8, 8), "num_res_channels": (8, 8), "num_res_layers": 1, "num_embeddings": 16, "embedding_dim": 8}
VQ |= {"downsample_parameters": ((2, 4, 1, 1),) * 2, "upsample_parameters": ((2, 4, 1, 1, 0),) * 2}
SWIN = {
    "in_channels": 1,
    "out_channels": 2,
    "feature_size": 12,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 2, 2),
    "spatial_dims": 2,
}
SE = {"spatial_dims": 2, "in_channels": 1, "num_classes": 2, "pretrained": False}
DYN = {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2), "filters": (4, 8, 8)}


def adapter() -> nn.Module:
    return nets.NetAdapter(
        nets.ResNet("basic", (1, 1, 1, 1), (4, 4, 8, 8), 2, 1), num_classes=2, dim=2, in_channels=8, pool=None
    )


def dints() -> nn.Module:
    space = nets.TopologyInstance(channel_mul=0.25, num_blocks=4, num_depths=2, spatial_dims=2, use_downsample=False)
    return nets.DiNTS(space, in_channels=1, num_classes=2, spatial_dims=2, use_downsample=False)


NETWORKS = [
    Small("AHNet", lambda: nets.AHNet((1, 1, 1, 1), 3, 1, 2, psp_block_num=0, upsample_mode="trilinear"), (2, 1, 64, 64, 32)),
    Small("AttentionUnet", lambda: nets.AttentionUnet(2, 1, 2, **U)),
    Small("AutoEncoder", lambda: nets.AutoEncoder(2, 1, 2, (4, 8), (2, 2))),
    Small("AutoencoderKL", lambda: nets.AutoencoderKL(2, 1, 1, **KL), head=False, noisy="samples of a latent space"),
    Small("BasicUNet", lambda: nets.BasicUNet(2, 1, 2, (4, 4, 8, 8, 8, 4))),
    Small("BasicUNetPlusPlus", lambda: nets.BasicUNetPlusPlus(2, 1, 2, (4, 4, 8, 8, 8, 4)), idle="final_conv"),
    Small("Classifier", lambda: nets.Classifier((1, 32, 32), 2, **U), head=False),
    Small("Critic", lambda: nets.Critic((1, 32, 32), (4, 8), (2, 2), dropout=0.5), head=False),
    Small("DenseNet", lambda: nets.DenseNet(2, 1, 2, 8, 4, (1, 1), dropout_prob=0.2)),
    Small("DenseNet121", lambda: nets.DenseNet121(2, 1, 2, 8, 4, (1, 1))),
    Small("DiNTS", dints, (2, 1, 32, 32)),
    Small("Discriminator", lambda: nets.Discriminator((1, 32, 32), (4, 8), (2, 2)), head=False),
    Small("DynUNet", lambda: nets.DynUNet(2, 1, 2, **DYN, dropout=0.3)),
    Small("EfficientNetBN", lambda: nets.EfficientNetBN("efficientnet-b0", False, spatial_dims=2, in_channels=1, num_classes=2)),
    Small("FlexibleUNet", lambda: nets.FlexibleUNet(1, 2, "efficientnet-b0", spatial_dims=2), idle="encoder._conv_head"),
    Small("FullyConnectedNet", lambda: nets.FullyConnectedNet(6, 2, (8, 8), dropout=0.5), (2, 6)),
    Small("HighResNet", lambda: nets.HighResNet(2, 1, 2, dropout_prob=0.3)),
    Small("HoVerNet", lambda: nets.HoVerNet("fast", 3, out_classes=3, dropout_prob=0.3), (1, 3, 256, 256), head=False),
    Small("MaskedAutoEncoderViT", lambda: nets.MaskedAutoEncoderViT(
        **VIT, spatial_dims=2, decoder_hidden_size=16, decoder_mlp_dim=16, decoder_num_layers=1, decoder_num_heads=2),
        head=False, noisy="hides patches at random"),
    Small("MedNeXt", lambda: nets.MedNeXt(
        2, 4, 1, 2, kernel_size=3, blocks_down=(1, 1), blocks_bottleneck=1, blocks_up=(1, 1)), idle="out_1"),
    Small("MultiScalePatchDiscriminator", lambda: nets.MultiScalePatchDiscriminator(
        1, 2, spatial_dims=2, channels=4, in_channels=1, minimum_size_im=32), head=False),
    Small("NetAdapter", adapter),
    Small("PatchDiscriminator", lambda: nets.PatchDiscriminator(2, 4, 1, 2, 2), head=False),
    Small("Quicknat", lambda: nets.Quicknat(2, 1, 8, drop_out=0.3)),
    Small("RegUNet", lambda: nets.RegUNet(2, 1, 4, 2, out_channels=2)),
    Small("LocalNet", lambda: nets.LocalNet(2, 1, 4, (0, 1, 2), out_channels=2)),
    Small("Regressor", lambda: nets.Regressor((1, 32, 32), (2,), **U), head=False),
    Small("ResNet", lambda: nets.ResNet("basic", (1, 1, 1, 1), (4, 4, 8, 8), 2, 1, num_classes=2)),
    Small("SENet", lambda: nets.SENet(2, 1, "se_bottleneck", (1, 1, 1, 1), 1, 4, num_classes=2)),
    Small("SENet154", lambda: nets.SENet154(layers=(1, 1, 1, 1), **SE)),
    Small("SEResNet50", lambda: nets.SEResNet50(layers=(1, 1, 1, 1), **SE)),
    Small("SEResNet101", lambda: nets.SEResNet101(layers=(1, 1, 1, 1), **SE)),
    Small("SEResNet152", lambda: nets.SEResNet152(layers=(1, 1, 1, 1), **SE)),
    Small("SEResNext50", lambda: nets.SEResNext50(layers=(1, 1, 1, 1), **SE)),
    Small("SEResNext101", lambda: nets.SEResNext101(layers=(1, 1, 1, 1), **SE)),
    Small("SegResNet", lambda: nets.SegResNet(2, 8, 1, 2, 0.3, blocks_down=(1, 1), blocks_up=(1,))),
    Small("SegResNetDS", lambda: nets.SegResNetDS(2, 8, 1, 2, blocks_down=(1, 1), dsdepth=2), idle="up_layers.0.head"),
    Small("SegResNetDS2", lambda: nets.SegResNetDS2(2, 8, 1, 2, blocks_down=(1, 1)), idle="up_layers_auto"),
    Small("SegResNetVAE", lambda: nets.SegResNetVAE(
        (32, 32), spatial_dims=2, in_channels=1, out_channels=2, blocks_down=(1, 1, 1), blocks_up=(1, 1)), idle="vae", noisy="a loss by samples of a latent space"),
    Small("SwinUNETR", lambda: nets.SwinUNETR(**SWIN, drop_rate=0.3, attn_drop_rate=0.3, dropout_path_rate=0.3), (2, 1, 64, 64)),
    Small("UNETR", lambda: nets.UNETR(
        1, 2, (32, 32), 4, 24, 16, 2, spatial_dims=2, dropout_rate=0.3)),
    Small("UNet", lambda: nets.UNet(2, 1, 2, **U, num_res_units=1, dropout=0.3)),
    Small("VNet", lambda: nets.VNet(2, 1, 2)),
    Small("VQVAE", lambda: nets.VQVAE(2, 1, 2, **VQ)),
    Small("VarAutoEncoder", lambda: nets.VarAutoEncoder(2, (1, 32, 32), 2, 4, (4, 8), (2, 2)), noisy="samples of a latent space", head=False),
    Small("VarFullyConnectedNet", lambda: nets.VarFullyConnectedNet(6, 2, 3, (8,), (8,)), (2, 6),
          noisy="samples of a latent space", head=False),
    Small("ViT", lambda: nets.ViT(**VIT, spatial_dims=2, classification=True, num_classes=2, dropout_rate=0.3)),
    Small("ViTAutoEnc", lambda: nets.ViTAutoEnc(**{**VIT, "patch_size": (4, 4)}, out_channels=2, deconv_chns=4, spatial_dims=2)),
    Small("VoxelMorphUNet", lambda: nets.VoxelMorphUNet(2, 2, 2, (4, 4, 8, 8, 8, 8), (4, 4)), (2, 2, 32, 32)),
    Small("Generator", lambda: nets.Generator((6,), (4, 8, 8), (8, 1), (2, 1)), (2, 6), head=False),
    Small("ResNetFeatures", lambda: nets.ResNetFeatures("resnet10", False, 2, 1), head=False),
    Small("EfficientNetBNFeatures", lambda: nets.EfficientNetBNFeatures("efficientnet-b0", False, spatial_dims=2, in_channels=1),
          head=False, idle="_conv_head"),
]  # fmt: skip

PART = "a part of another network"
SAME = "its blocks are those of a network in the table"
SEVERAL = "it takes more than an image"
LEFT_OUT = {
    **dict.fromkeys(
        ("BertAttention", "BertMixedLayer", "BertOutput", "BertPreTrainedModel", "EfficientNetEncoder", "HighResBlock", "MultiModal",
         "PatchMerging", "PatchMergingV2", "Pooler", "ResNetBlock", "ResNetBottleneck", "ResNetEncoder", "TopologyConstruction",
         "TopologyInstance"), PART),
    **dict.fromkeys(("DenseNet169", "DenseNet201", "DenseNet264", "EfficientNet"), SAME),
    **dict.fromkeys(
        ("ControlNet", "DecoderOnlyTransformer", "DiffusionModelUNet", "SPADEAutoencoderKL", "SPADEDiffusionModelUNet", "SPADENet",
         "Transchex", "VISTA3D", "VoxelMorph", "NaViT"), SEVERAL),
    "TopologySearch": "a search over networks",
    "GlobalNet": "its output is a displacement field, of which one layer gives an affine matrix",
    "HyenaNDUNETR": "it needs a package beside MONAI",
    "MILModel": "it needs torchvision, which is not installed",
    "DAF3D": "it needs torchvision, which is not installed",
    "TorchVisionFCModel": "it needs torchvision, which is not installed; NetAdapter, from which it comes, is in the table",
}  # fmt: skip
