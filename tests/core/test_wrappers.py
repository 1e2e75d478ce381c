"""Compiled networks and networks on several devices: adapter files have plain names, or the order of steps is said."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from monai.networks.nets import SegResNet
from torch import nn

import monai_petl as mp
from monai_petl.methods import HeadOnly, LoRA

IMAGE = torch.randn(1, 1, 16, 16)


def network() -> SegResNet:
    torch.manual_seed(0)
    return SegResNet(2, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,)).eval()


def compiled(plain: nn.Module) -> nn.Module:
    return torch.compile(plain, backend="eager")


WRAPS = [compiled, nn.DataParallel, lambda plain: nn.DataParallel(compiled(plain))]


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def spoiled(adapted: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in mp.trainable_parameters(adapted):
        nn.init.normal_(parameter, 0, 0.1)
    return adapted


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("adapt_first", [True, False])
def test_files_have_plain_names_in_either_order(wrap: Callable, adapt_first: bool, tmp_path):
    method = [LoRA(rank=2), HeadOnly(num_classes=3)]
    if adapt_first:
        wrapped = wrap(spoiled(mp.adapt(network(), method)))
    else:
        wrapped = mp.adapt(wrap(network()), method)
        spoiled(wrapped)
    file = mp.save_adapter(wrapped, tmp_path / "a.safetensors")
    assert not [
        name for name in mp.inspect_adapter(file)["shapes"] if "_orig_mod" in name or name.startswith("module.")
    ]
    plain = mp.load_adapter(network(), file)
    with torch.no_grad():
        expected = plain(IMAGE)
        assert expected.shape[1] == 3
        assert torch.allclose(wrapped(IMAGE), expected, atol=1e-5)
        again = mp.load_adapter(wrap(network()), file)
        assert torch.allclose(again(IMAGE), expected, atol=1e-5)
        with mp.disabled(wrapped) as same:
            assert same is wrapped
            assert torch.allclose(wrapped(IMAGE), network()(IMAGE), atol=1e-5)
        assert mp.merge(wrapped) is wrapped
        assert torch.allclose(wrapped(IMAGE), expected, atol=1e-4)
    mp.unmerge(wrapped)
    assert mp.summary(wrapped).total == mp.summary(spoiled(mp.adapt(network(), method))).total
    assert set(mp.backbone_state_dict(wrapped)) == set(network().state_dict())
    assert set(mp.adapter_state_dict(wrapped)) == set(mp.adapter_state_dict(mp.adapt(network(), method)))
    mp.activate(wrapped)
    mp.remove_adapter(wrapped)
    assert set(wrapped.state_dict()) == set(wrap(network()).state_dict())


def test_a_network_that_is_distributed_already_is_refused(group, tmp_path):
    file = mp.save_adapter(mp.adapt(network(), LoRA(rank=2)), tmp_path / "a.safetensors")
    wrapped = nn.parallel.DistributedDataParallel(network())
    for act in (lambda: mp.adapt(wrapped, LoRA(rank=2)), lambda: mp.load_adapter(wrapped, file)):
        with pytest.raises(
            ValueError, match=r"in DistributedDataParallel already.*Adapt the network first, then wrap it"
        ):
            act()


def test_an_adapted_network_that_is_distributed_is_saved_plainly(group, tmp_path):
    adapted = spoiled(mp.adapt(network(), LoRA(rank=2)))
    file = mp.save_adapter(nn.parallel.DistributedDataParallel(adapted), tmp_path / "a.safetensors")
    plain = mp.load_adapter(network(), file)
    assert torch.allclose(plain(IMAGE), adapted.eval()(IMAGE), atol=1e-5)


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel])
def test_a_part_that_is_wrapped_is_refused_by_name(wrap: Callable):
    plain = network()
    before = copy.deepcopy(plain.state_dict())
    plain.conv_final = wrap(plain.conv_final)
    with pytest.raises(ValueError, match=r"conv_final is wrapped in (OptimizedModule|DataParallel)"):
        mp.adapt(plain, LoRA(rank=2))
    assert all(p.requires_grad for p in plain.parameters())
    assert len(before) == len(plain.state_dict())
