"""AddCoordinatesd: voxel indices relative to the centre of the volume, for whole images and for crops of them."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    RandCropByPosNegLabeld,
    RandSpatialCropd,
    RandSpatialCropSamplesd,
    SpatialPadd,
)

from monai_petl.transforms import AddCoordinatesd


def volume(size=(7, 6, 4)):
    """An image whose three channels are the coordinates that it should get, and a label."""
    axes = torch.meshgrid(*(torch.arange(extent) - (extent - 1) / 2 for extent in size), indexing="ij")
    return {
        "image": MetaTensor(torch.stack(axes)),
        "label": MetaTensor(torch.arange(size[0]).view(1, -1, 1, 1).expand(1, *size) % 2),
    }


def test_coordinates_are_centred_voxel_indices():
    sample = AddCoordinatesd()(volume())
    coords = sample["coords"]
    assert type(coords) is torch.Tensor
    assert coords.dtype == torch.float32
    assert torch.equal(coords, sample["image"].as_tensor())
    assert coords[:, 0, 0, 0].tolist() == [-3.0, -2.5, -1.5]


@pytest.mark.parametrize(
    "crop",
    [
        RandSpatialCropSamplesd(("image", "label"), (4, 3, 1), num_samples=3, random_size=False),
        RandCropByPosNegLabeld(("image", "label"), "label", (4, 3, 1), num_samples=2),
        Compose(
            [
                CenterSpatialCropd(("image", "label"), (6, 5, 4)),
                RandSpatialCropd(("image", "label"), (4, 4, 2), random_size=False),
            ]
        ),
    ],
    ids=["samples", "label", "two crops"],
)
def test_crops_keep_the_frame_of_their_volume(crop):
    samples = Compose([crop, AddCoordinatesd()]).set_random_state(3)(volume())
    for sample in samples if isinstance(samples, list) else [samples]:
        assert torch.equal(sample["coords"], sample["image"].as_tensor())


def test_padding_makes_a_new_volume():
    pad = SpatialPadd("image", (9, 6, 4))
    crop = RandSpatialCropd("image", (9, 3, 1), random_size=False)
    coords = Compose([pad, crop, AddCoordinatesd()])(volume())["coords"]
    assert coords[0, :, 0, 0].tolist() == [-4, -3, -2, -1, 0, 1, 2, 3, 4]


def test_plain_tensors_are_volumes_of_their_own():
    coords = AddCoordinatesd("slab", "where")({"slab": torch.zeros(1, 3, 2, 1)})["where"]
    assert coords[:, :, 0, 0].tolist() == [[-1, 0, 1], [-0.5, -0.5, -0.5], [0, 0, 0]]


def test_images_without_three_axes_are_refused():
    with pytest.raises(ValueError, match="three spatial axes"):
        AddCoordinatesd()({"image": torch.zeros(1, 4, 4)})


def test_pending_operations_are_refused():
    sample = RandSpatialCropd("image", (4, 4, 2), random_size=False, lazy=True)(volume())
    with pytest.raises(ValueError, match="pending"):
        AddCoordinatesd()(sample)
