"""Layers that run slices of depth one as images give what the 3D operations give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from monai_petl.core.summary import saved_activation_bytes
from monai_petl.networks.punet.layers import BatchNorm3d, Conv3d, upsample, upsample_like


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from((1, 1, 2, 5))),
    kernel=st.sampled_from(((1, 1, 1), (3, 3, 1), (3, 3, 3))),
    stride=st.sampled_from(((1, 1, 1), (2, 2, 1), (2, 2, 2))),
    bias=st.booleans(),
)
def test_convolution_equals_the_3d_operation(size, kernel, stride, bias):
    conv = Conv3d(2, 3, kernel, stride, bias)
    x = torch.randn(2, 2, *size, requires_grad=True)
    expected = F.conv3d(x, conv.weight, conv.bias, stride, tuple(k // 2 for k in kernel))
    found = conv(x)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    probe = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((found * probe).sum(), [x, conv.weight]),
        torch.autograd.grad((expected * probe).sum(), [x, conv.weight]),
        atol=1e-5,
        rtol=1e-5,
    )


@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from((1, 1, 3))),
    scale=st.sampled_from(((2, 2, 1), (2, 2, 2), (1, 1, 1), (3, 2, 1))),
)
def test_upsampling_equals_the_3d_operation(size, scale):
    x = torch.randn(2, 3, *size)
    expected = F.interpolate(x, scale_factor=[float(s) for s in scale], mode="trilinear", align_corners=False)
    torch.testing.assert_close(upsample(x, scale), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("size", "skip"), [((4, 4, 1), (7, 8, 1)), ((3, 5, 2), (5, 9, 3)), ((2, 2, 1), (4, 4, 1))])
def test_upsampling_crops_the_end_to_the_skip(size, skip):
    x = torch.randn(1, 2, *size)
    scale = (2, 2, 1 if skip[2] == 1 else 2)
    found = upsample_like(x, scale, torch.zeros(1, 5, *skip))
    assert found.shape == (1, 2, *skip)
    assert torch.equal(found, upsample(x, scale)[:, :, : skip[0], : skip[1], : skip[2]])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_batch_norm_equals_that_of_torch(training, depth):
    ours, reference = BatchNorm3d(3), nn.BatchNorm3d(3)
    for norm in (ours, reference):
        norm.load_state_dict(
            {
                "weight": torch.tensor([0.5, 1.0, 2.0]),
                "bias": torch.tensor([-1.0, 0.0, 1.0]),
                "running_mean": torch.tensor([0.1, 0.2, 0.3]),
                "running_var": torch.tensor([0.5, 1.0, 2.0]),
                "num_batches_tracked": torch.tensor(4),
            }
        )
        norm.train(training)
    x = torch.randn(2, 3, 5, 4, depth, requires_grad=True)
    probe = torch.randn_like(x)
    results = []
    for norm in (ours, reference):
        y = norm(x)
        results.append((y, *torch.autograd.grad((y * probe).sum(), [x, norm.weight, norm.bias])))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)


def test_frozen_batch_norm_keeps_no_activation_for_backward():
    norm = BatchNorm3d(3).requires_grad_(False).eval()
    x = torch.randn(2, 3, 16, 16, 1, requires_grad=True)
    assert saved_activation_bytes(norm, lambda: norm(x)) < x.numel() * x.element_size() / 4
