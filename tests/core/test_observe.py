"""What modules see while a network runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from monai_petl.core.observe import observe


def test_modules_are_read_in_their_order_and_no_hook_stays() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).eval()
    x = torch.randn(2, 3)
    seen = observe(network, x, [network[2], network[0]], lambda module, inputs, output: output - inputs)
    middle = network[1](network[0](x))
    torch.testing.assert_close(seen, torch.stack((network[0](x) - x, network[2](middle) - middle)).detach())
    assert not seen.requires_grad
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        observe(network, torch.randn(2, 5), [network[0]], lambda module, inputs, output: output)
    assert not any(module._forward_hooks for module in network.modules())
