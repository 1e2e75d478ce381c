"""What all methods promise, on all networks that they take: a contract of one test each."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from monai.networks.nets import UNETR, SegResNet, SwinUNETR, UNet, ViT
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import monai_petl as mp
from monai_petl.core.deltas import deltas_of
from monai_petl.core.records import adapters_of
from monai_petl.methods import (
    AIM,
    EPT,
    SSF,
    VPETL,
    VPT,
    BiasOnly,
    FFNAdapter,
    FullFineTuning,
    HeadOnly,
    LastBlocks,
    LoRA,
    NormOnly,
)
from tests.conftest import differing, frozen, shake_statistics, state_of, train
from tests.marks import slow_unless


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    size: tuple[int, ...]
    transformer: bool = True


def _swin(spatial_dims: int) -> nn.Module:
    sizes = {"depths": (2, 1, 1, 1), "num_heads": (2, 2, 2, 2), "feature_size": 12}
    rates = {"drop_rate": 0.2, "dropout_path_rate": 0.2}
    return SwinUNETR(1, 2, **sizes, **rates, window_size=4, norm_name="batch", spatial_dims=spatial_dims)


def _vit(spatial_dims: int) -> nn.Module:
    size = (16,) * spatial_dims
    shape = {"hidden_size": 24, "mlp_dim": 48, "num_layers": 3, "num_heads": 3, "qkv_bias": spatial_dims == 2}
    return ViT(1, size, 8, **shape, spatial_dims=spatial_dims, classification=True, dropout_rate=0.2)


NETWORKS = {
    "ViT 2D": Case(functools.partial(_vit, 2), (16, 16)),
    "ViT 3D": Case(functools.partial(_vit, 3), (16, 16, 16)),
    "UNETR": Case(lambda: UNETR(1, 2, (16, 16, 16), 4, 24, 48, 3, norm_name="batch", dropout_rate=0.2), (16, 16, 16)),
    "SwinUNETR 2D": Case(functools.partial(_swin, 2), (32, 32)),
    "SwinUNETR 3D": Case(functools.partial(_swin, 3), (32, 32, 32)),
    "UNet": Case(
        lambda: UNet(3, 1, 2, (12, 16, 24), (2, 2), num_res_units=1, norm="batch", dropout=0.2),
        (16, 16, 16),
        transformer=False,
    ),
    "SegResNet": Case(
        lambda: SegResNet(3, 12, 1, 2, dropout_prob=0.2, norm="batch", blocks_down=(1, 1, 2), blocks_up=(1, 1)),
        (16, 16, 16),
        transformer=False,
    ),
}
METHODS = {
    "LoRA": LoRA(rank=4),
    "DoRA": LoRA(rank=4, dora=True),
    "VPETL": VPETL(),
    "FFNAdapter": FFNAdapter(8),
    "VPT deep": VPT(3),
    "VPT shallow": VPT(3, deep=False),
    "EPT": EPT(2, init=0.0),
    "SSF": SSF(),
    "AIM": AIM(num_slices=2),
    "BiasOnly": BiasOnly(),
    "NormOnly": NormOnly(),
    "LastBlocks": LastBlocks(1),
    "HeadOnly": HeadOnly(),
    "new head": HeadOnly(num_classes=3),
    "FullFineTuning": FullFineTuning(),
    "LoRA, BiasOnly and a new head": [LoRA(rank=4), BiasOnly(), HeadOnly(num_classes=3)],
}
TRANSFORMERS_ONLY = {"VPETL", "FFNAdapter", "VPT deep", "VPT shallow", "EPT", "AIM", "LastBlocks"}
PLANAR_ONLY, NOT_IN_WINDOWS = {"AIM"}, {"EPT"}
STARTS_ELSEWHERE = {"VPT deep", "VPT shallow", "EPT", "new head", "LoRA, BiasOnly and a new head"}
NEVER_MERGES = {"VPETL", "FFNAdapter", "VPT deep", "VPT shallow", "EPT", "AIM"}
NOTHING_IN_WINDOWS = {("SwinUNETR 2D", "HeadOnly"), ("SwinUNETR 2D", "new head")}
# torch's bfloat16 convolutions on maps of up to 2 x 2 x 2 give kernels gradients of garbage on CPUs, adapted or not
TINY_MAPS = {"UNETR", "SwinUNETR 2D", "SwinUNETR 3D"}
NO_BIAS_FOR_SSF = {"ViT 3D", "SwinUNETR 2D", "SwinUNETR 3D", "UNETR", "SegResNet"}


def fits(method: str, network: str) -> bool:
    planar = network.endswith("2D") or method not in PLANAR_ONLY
    windows = network.startswith("Swin") and method in NOT_IN_WINDOWS
    return planar and not windows and (NETWORKS[network].transformer or method not in TRANSFORMERS_ONLY)


PAIRS = [(method, network) for network in NETWORKS for method in METHODS if fits(method, network)]
REFUSED = [(method, network) for network in NETWORKS for method in METHODS if not fits(method, network)]
every_pair = pytest.mark.parametrize(("method", "network"), PAIRS)


@functools.cache
def _pristine(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shake_statistics(NETWORKS[name].make())


def backbone_of(name: str) -> nn.Module:
    return copy.deepcopy(_pristine(name))


@functools.cache
def _trained(method: str, network: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = mp.adapt(backbone_of(network), METHODS[method])
        x = images(network)
        train(adapted, lambda: output(adapted, x).square().mean(), steps=2, lr=1e-3)
        return adapted.eval()


def trained(method: str, network: str) -> nn.Module:
    """The network after two steps of training, made once; a copy of its own for each test."""
    return copy.deepcopy(_trained(method, network))


def images(network: str) -> Tensor:
    return torch.randn(2, 1, *NETWORKS[network].size, generator=torch.Generator().manual_seed(1))


def output(network: nn.Module, x: Tensor) -> Tensor:
    y = network(x)
    return y[0] if isinstance(y, tuple) else y


def evaluated(network: nn.Module, x: Tensor) -> Tensor:
    with frozen(network):
        return output(network.eval(), x)


# the start


@every_pair
def test_the_start_is_the_backbone(method: str, network: str) -> None:
    backbone, x = backbone_of(network), images(network)
    before = evaluated(backbone, x)
    after = evaluated(mp.adapt(copy.deepcopy(backbone), METHODS[method]), x)
    if method in STARTS_ELSEWHERE:
        assert before.shape != after.shape or not torch.allclose(before, after)
    else:
        torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)


@every_pair
def test_class_and_names_of_the_backbone_stay(method: str, network: str) -> None:
    backbone = backbone_of(network)
    names = list(backbone.state_dict())
    adapted = mp.adapt(copy.deepcopy(backbone), METHODS[method])
    assert type(adapted) is type(backbone)
    found = list(adapted.state_dict())
    assert [name for name in found if "deltas" not in name.split(".")] == names
    assert list(mp.backbone_state_dict(adapted)) == names
    adapted.load_state_dict(backbone.state_dict())  # a plain file loads into the adapted network


@pytest.mark.parametrize(("method", "network"), REFUSED)
def test_a_network_that_a_method_cannot_handle_is_named_and_stays_as_it_was(method: str, network: str) -> None:
    backbone = backbone_of(network)
    before = state_of(backbone)
    with pytest.raises(TypeError, match=type(backbone).__name__):
        mp.adapt(backbone, METHODS[method])
    assert list(backbone.state_dict()) == list(before)
    assert all(p.requires_grad for p in backbone.parameters())
    assert not deltas_of(backbone)


# training


@every_pair
def test_what_is_frozen_is_the_same_bit_for_bit_after_training(method: str, network: str) -> None:
    adapted = trained(method, network)
    before = backbone_of(network).state_dict()
    record = adapters_of(adapted)["default"]
    assert differing(before, adapted.state_dict()) <= set(record.originals)
    assert not differing(before, mp.backbone_state_dict(adapted))
    changed = differing(state_of(mp.adapt(backbone_of(network), METHODS[method])), adapted.state_dict())
    assert changed, "nothing was trained"


@every_pair
def test_a_gradient_reaches_all_that_trains_and_nothing_else(method: str, network: str) -> None:
    adapted, x = trained(method, network).train(), images(network)
    output(adapted, x).square().mean().backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


# files


@every_pair
def test_the_file_holds_the_adapter_alone_and_comes_back_bit_for_bit(method: str, network: str, tmp_path: Path) -> None:
    adapted, x = trained(method, network), images(network)
    file = mp.save_adapter(adapted, tmp_path / "adapter.safetensors")
    tensors = load_file(file)
    state = adapted.state_dict()
    record = adapters_of(adapted)["default"]
    in_place = set(record.originals)
    assert {name for name in tensors if name in state} == in_place
    assert len(tensors) == len(record.tensors)
    values = sum(tensor.numel() for tensor in tensors.values())
    assert values == sum(state[name].numel() for name in record.tensors)
    again = mp.load_adapter(backbone_of(network), file, name="under another name")
    assert torch.equal(evaluated(again, x), evaluated(adapted, x))


@every_pair
def test_switched_off_or_removed_the_network_is_the_backbone(method: str, network: str) -> None:
    backbone, adapted, x = backbone_of(network), trained(method, network), images(network)
    expected, learned = evaluated(backbone, x), evaluated(adapted, x)
    with mp.disabled(adapted):
        assert torch.equal(evaluated(adapted, x), expected)
    assert torch.equal(evaluated(mp.activate(adapted), x), expected)
    assert torch.equal(evaluated(mp.activate(adapted, "default"), x), learned)
    mp.remove_adapter(adapted)
    assert torch.equal(evaluated(adapted, x), expected)
    assert [type(m) for m in adapted.modules()] == [type(m) for m in backbone.modules()]


@every_pair
def test_two_adapters_of_one_backbone_are_switched_without_rebuilding_it(
    method: str, network: str, tmp_path: Path
) -> None:
    adapted, x = trained(method, network), images(network)
    first = evaluated(adapted, x)
    mp.activate(adapted)
    mp.adapt(adapted, METHODS[method], name="second")
    train(adapted, lambda: (output(adapted, x) - 1).square().mean(), steps=2)
    second = evaluated(adapted, x)
    assert not torch.equal(first, second)
    for _ in range(2):
        assert torch.equal(evaluated(mp.activate(adapted, "default"), x), first)
        assert torch.equal(evaluated(mp.activate(adapted, "second"), x), second)
    file = mp.save_adapter(adapted, tmp_path / "second.safetensors", name="second")
    assert torch.equal(evaluated(mp.load_adapter(backbone_of(network), file), x), second)


# merging


@every_pair
def test_merging_keeps_the_output_or_says_why_not(method: str, network: str) -> None:
    adapted, x = trained(method, network), images(network)
    before, state = evaluated(adapted, x), state_of(adapted)
    if method in NEVER_MERGES or (method == "SSF" and network in NO_BIAS_FOR_SSF):
        with pytest.raises((TypeError, ValueError), match=r"cannot be merged|has no bias that could take"):
            mp.merge(adapted)
        assert not differing(state, adapted.state_dict())
        return
    mp.merge(adapted)
    largest = before.abs().max().item()
    torch.testing.assert_close(evaluated(adapted, x), before, atol=1e-5 * largest, rtol=0)
    mp.unmerge(adapted)
    assert not differing(state, adapted.state_dict())
    assert torch.equal(evaluated(adapted, x), before)
    plain = mp.merge_and_unload(adapted)
    torch.testing.assert_close(evaluated(plain, x), before, atol=1e-5 * largest, rtol=0)
    assert [type(m) for m in plain.modules()] == [type(m) for m in backbone_of(network).modules()]
    assert list(plain.state_dict()) == list(backbone_of(network).state_dict())


# the ways in which networks are used


@every_pair
def test_copies_and_pickles_compute_the_same(method: str, network: str) -> None:
    adapted, x = trained(method, network), images(network)
    expected = evaluated(adapted, x)
    copied, again = copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))
    for other in (copied, again):
        assert torch.equal(evaluated(other, x), expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in adapted.parameters()}
    mp.remove_adapter(copied)
    assert torch.equal(evaluated(adapted, x), expected)


@pytest.mark.parametrize(
    ("method", "network"),
    slow_unless(
        lambda method, network: method == "LoRA",
        [(m, n) for m, n in PAIRS if n != "SwinUNETR 3D" and (n, m) not in NOTHING_IN_WINDOWS],
    ),
)
def test_a_compiled_network_computes_the_same(method: str, network: str) -> None:
    """Without a break in the graph; of a SwinUNETR the transformer, whose decoder other networks have too."""
    adapted, x = trained(method, network), images(network)
    part = adapted.swinViT if isinstance(adapted, SwinUNETR) else adapted
    torch.compiler.reset()
    compiled = torch.compile(part, backend="eager", fullgraph=True)
    torch.testing.assert_close(evaluated(compiled, x), evaluated(part, x), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="torch reads its templates by the locale")
@pytest.mark.slow
@pytest.mark.parametrize("network", ["ViT 2D", "SegResNet"])
def test_forward_and_backward_through_a_compiler_give_the_same(network: str) -> None:
    """``aot_eager`` makes the graphs of both passes as inductor does, without a C++ compiler."""
    adapted, x = trained("LoRA", network), images(network)
    compiled = torch.compile(copy.deepcopy(adapted), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(evaluated(compiled, x), evaluated(adapted, x), atol=1e-5, rtol=1e-4)
    for other in (adapted, compiled):
        output(other, x).square().mean().backward()
    for wanted, found in zip(mp.trainable_parameters(adapted), mp.trainable_parameters(compiled), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, atol=1e-5 * wanted.grad.abs().max().item(), rtol=0)


@every_pair
def test_mixed_precision_and_activation_checkpointing_give_gradients(method: str, network: str) -> None:
    plain, x = trained(method, network).train(), images(network)
    again = copy.deepcopy(plain)
    torch.manual_seed(3)
    output(plain, x).square().mean().backward()
    torch.manual_seed(3)
    checkpoint(lambda image: output(again, image), x, use_reentrant=False).square().mean().backward()
    for (name, parameter), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        if parameter.grad is not None:
            largest = parameter.grad.abs().max().item()
            torch.testing.assert_close(other.grad, parameter.grad, atol=1e-5 * largest + 1e-12, rtol=0, msg=name)
    again.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = output(again, x).float().square().mean()
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in again.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            kernel_on_tiny_map = network in TINY_MAPS and parameter.ndim > 3
            assert kernel_on_tiny_map or torch.isfinite(parameter.grad).all(), name


def _ddp_worker(rank: int, folder: str, pairs: list[tuple[str, str]]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for pair in pairs:
        _train_in_two(rank, *pair)
    torch.distributed.destroy_process_group()


def _train_in_two(rank: int, method: str, network: str) -> None:
    """A function of its own: a wrapper that outlives the process group can hang when it goes."""
    torch.manual_seed(0)
    adapted = mp.adapt(backbone_of(network), METHODS[method])
    wrapped = DistributedDataParallel(adapted)
    x = images(network) + rank
    train(wrapped, lambda: output(wrapped, x).square().mean(), steps=2)
    mine = torch.cat([p.detach().flatten() for p in adapted.parameters() if p.requires_grad])
    first = mine.clone()
    torch.distributed.broadcast(first, 0)
    if not torch.equal(mine, first):
        raise AssertionError(f"{method} on {network}: the processes disagree")


@pytest.mark.slow
def test_two_processes_train_the_same_adapter(tmp_path: Path) -> None:
    """All pairs in one pair of processes; a parameter without a gradient would be an error of torch's."""
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path), PAIRS), nprocs=2)
