"""CenterSliceInferer: every slice of a volume once, its neighbours around it, the ends repeated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from torch import Tensor

from monai_petl.inferers import CenterSliceInferer


def neighbours(windows: Tensor) -> Tensor:
    """A network whose scores are the slices that it sees."""
    assert windows.ndim == 5
    return windows[:, 0].movedim(-1, 1).unsqueeze(-1)  # (b, S, h, w, 1)


@given(depth=st.integers(1, 6), slices=st.integers(1, 6), batch=st.integers(1, 2), at_a_time=st.integers(1, 4))
def test_each_slice_is_the_center_of_its_neighbours(depth: int, slices: int, batch: int, at_a_time: int) -> None:
    volume = torch.rand(batch, 1, 9, 7, depth)
    seen = CenterSliceInferer((4, 4, slices), at_a_time, overlap=0.5)(volume, neighbours)
    assert seen.shape == (batch, slices, 9, 7, depth)
    for z in range(depth):
        for k in range(slices):
            expected = volume[:, 0, :, :, min(max(z + k - slices // 2, 0), depth - 1)]
            torch.testing.assert_close(seen[:, k, :, :, z], expected)


def test_channels_stay_apart() -> None:
    volume = torch.rand(1, 2, 8, 8, 4)
    out = CenterSliceInferer((8, 8, 3), 2)(volume, lambda windows: windows[..., 1:2])
    torch.testing.assert_close(out, volume)


def test_slices_smaller_than_the_window_are_padded() -> None:
    volume = torch.rand(1, 1, 5, 6, 3)
    out = CenterSliceInferer((8, 8, 3), 2, cval=-1.0)(volume, lambda windows: windows[..., 1:2])
    torch.testing.assert_close(out, volume)


def test_metadata_of_the_volume_is_kept() -> None:
    volume = MetaTensor(torch.rand(1, 1, 8, 8, 3), meta={"name": "scan"})
    out = CenterSliceInferer((8, 8, 3), 2)(volume, lambda windows: windows[..., 1:2])
    assert isinstance(out, MetaTensor)
    assert out.meta["name"] == "scan"
    torch.testing.assert_close(out.as_tensor(), volume.as_tensor())


def test_window_without_slices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"three positive numbers of voxels \(h, w, slices\), got \(8, 8\)"):
        CenterSliceInferer((8, 8), 2)


@pytest.mark.parametrize("roi_size", [(8, 8, 0), (8, 0, 3)])
def test_window_of_no_voxel_is_refused(roi_size: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="three positive numbers of voxels"):
        CenterSliceInferer(roi_size)


def test_volume_without_slices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the volume is empty, its shape is \(1, 1, 8, 8, 0\)"):
        CenterSliceInferer((8, 8, 3))(torch.rand(1, 1, 8, 8, 0), lambda x: x)
