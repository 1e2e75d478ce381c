"""Heads that are found by running the network: deep supervision, networks of others, and what is refused with a remedy."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import (
    BasicUNetPlusPlus,
    ControlNet,
    DiffusionModelUNet,
    MedNeXt,
    SegResNetDS,
    SegResNetDS2,
)
from torch import Tensor, nn

from monai_petl import adapt, disabled, load_adapter, save_adapter, summary, trainable_parameters
from monai_petl.methods import HeadOnly, NormOnly
from monai_petl.methods.parts.output_layers import output_layers
from tests.conftest import differing, state_of
from tests.monai_networks import NETWORKS, outputs_of

K = 5
LATENT = {"channels": (8, 8), "attention_levels": (False, True), "num_res_blocks": 1, "norm_num_groups": 4}
MEDNEXT = {"blocks_down": (1, 1), "blocks_bottleneck": 1, "blocks_up": (1, 1)}
SUPERVISED = {
    "SegResNetDS": (lambda: SegResNetDS(2, 8, 1, 2, blocks_down=(1, 1, 1, 1), dsdepth=3), 3),
    "SegResNetDS2": (lambda: SegResNetDS2(2, 8, 1, 2, blocks_down=(1, 1, 1, 1), dsdepth=3), 6),
    "BasicUNetPlusPlus": (lambda: BasicUNetPlusPlus(2, 1, 2, (4, 4, 8, 8, 8, 4), deep_supervision=True), 4),
    "MedNeXt": (lambda: MedNeXt(2, 4, 1, 2, kernel_size=3, deep_supervision=True, **MEDNEXT), 3),
}


def built(make) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize("kind", SUPERVISED)
def test_all_heads_of_deep_supervision_get_the_classes_though_some_answer_in_training_alone(kind, tmp_path):
    make, heads = SUPERVISED[kind]
    network, x = built(make), torch.randn(2, 1, 64, 64)
    before = [output.detach() for output in outputs_of(network(x))]
    adapt(network, HeadOnly(num_classes=K))
    assert str(summary(network)).count("head") >= 1
    for mode in (False, True):
        outputs = outputs_of(network.train(mode)(x))
        assert {output.shape[1] for output in outputs} == {K}
    assert len(outputs) == heads
    sum(output.square().mean() for output in outputs).backward()
    assert len(trainable_parameters(network)) >= heads
    assert all(p.grad is not None for p in trainable_parameters(network))
    network.eval()
    after = outputs_of(network(x))
    with disabled(network):
        assert all(torch.equal(a, b) for a, b in zip(outputs_of(network(x)), before, strict=True))
    fresh = load_adapter(built(make), save_adapter(network, tmp_path / "a.safetensors"))
    assert all(torch.allclose(a, b) for a, b in zip(outputs_of(fresh(x)), after, strict=True))


class Auxiliary(nn.Module):
    """A head in training alone, behind a batch norm and a dropout, that works for large images only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.fc, self.aux = nn.Linear(4, 2), nn.Sequential(nn.AvgPool2d(40), nn.Flatten(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stem(x)
        output = self.fc(x.mean((2, 3)))
        return (output, self.aux(x[..., :40, :40])) if self.training else output


def test_looking_for_the_head_tries_larger_images_for_training_and_changes_nothing():
    network = Auxiliary().train()
    before, noise = state_of(network), torch.get_rng_state()
    assert output_layers(network)[0] == ["fc", "aux.2"]
    assert not differing(before, state_of(network))
    assert torch.equal(noise, torch.get_rng_state())
    assert all(module.training for module in network.modules())


def test_looking_for_the_head_leaves_a_codebook_alone():
    network = next(small for small in NETWORKS if small.kind == "VQVAE").make().train()
    before = state_of(network)
    assert len(output_layers(network)[0]) == 1
    assert not differing(before, state_of(network))


class NeverInTraining(Auxiliary):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("training needs labels")
        return super().forward(x)


def test_that_training_mode_could_not_be_looked_at_is_said(caplog):
    assert output_layers(NeverInTraining())[0] == ["fc"]
    assert "NeverInTraining could not be run in training mode, so its head is that of evaluation" in caplog.text


class Detector(nn.Module):
    """Layers for classes and for boxes, of different numbers of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.cls_logits, self.bbox_reg = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 1), nn.Conv2d(4, 12, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {"classes": self.cls_logits(x), "boxes": self.bbox_reg(x)}


class FiveClassDiffusion(DiffusionModelUNet):
    """A class of one's own counts as what it comes from."""


REFUSED = [
    (Detector, r"cls_logits \(6\), bbox_reg \(12\); say by head= which of them the classes are"),
    (lambda: DiffusionModelUNet(2, 1, 1, num_head_channels=4, **LATENT), "it predicts noise. Use LoRA"),
    (lambda: FiveClassDiffusion(2, 1, 1, num_head_channels=4, **LATENT), "it predicts noise. Use LoRA"),
    (lambda: ControlNet(2, 1, num_head_channels=4, **LATENT), "it steers a diffusion model. Use LoRA"),
]


@pytest.mark.parametrize(("make", "sentence"), REFUSED)
def test_what_has_no_head_for_classes_is_refused_with_a_remedy(make, sentence):
    network = make()
    before = list(network.state_dict())
    with pytest.raises(ValueError, match=sentence):
        adapt(network, HeadOnly(num_classes=K))
    assert list(network.state_dict()) == before


def test_all_heads_of_a_detector_train_as_they_are():
    network = adapt(Detector(), HeadOnly())
    trained = {name.partition(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"cls_logits", "bbox_reg"}


class LayerNorm2d(nn.Module):
    """As Segment Anything's: a class of its own, with scale and shift over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        return self.weight[:, None, None] * (x - mean) / (variance + 1e-6).sqrt() + self.bias[:, None, None]


@pytest.mark.parametrize(("norm", "values"), [(LayerNorm2d, 8), (nn.RMSNorm, 4)])
def test_norms_of_other_libraries_train_too(norm, values):
    network = adapt(nn.Sequential(nn.Conv2d(1, 4, 1), norm(4), nn.BatchNorm2d(4)), NormOnly())
    assert sum(p.numel() for p in trainable_parameters(network)) == values + 8
