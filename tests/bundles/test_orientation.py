"""A pre-trained transformer knows pictures upright: rows first, from the top, whatever MONAI's readers do by default."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from monai_petl.bundle import BundleFolder
from tests.bundles.helpers import CLASSIFIERS, FINE_GRAINED, Bundle, named

STEPS = {
    **{
        (bundle, config, name): "image"
        for bundle in CLASSIFIERS
        for config, name in (
            ("train", "train::preprocessing"),
            ("train", "validate::preprocessing"),
            ("inference", "preprocessing"),
        )
    },
    (FINE_GRAINED, "train", "train::preprocessing", "large"): "source",
    (FINE_GRAINED, "preload", "source_transforms"): "source",
}


@pytest.fixture(params=["png", "jpg", "npy"])
def picture(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """40 rows of 48 columns, the upper half white; the JPEG as a phone stores it, on its side with a note of the turn."""
    values, path = np.zeros((40, 48), np.uint8), tmp_path / f"picture.{request.param}"
    values[:20] = 255
    picture = Image.fromarray(values)
    if request.param == "png":
        picture.save(path)
    elif request.param == "jpg":
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    else:
        np.save(path, values)
    return path


@pytest.mark.parametrize("where", STEPS, ids=lambda where: "-".join(map(named, where)))
def test_what_is_above_comes_first(where: tuple, picture: Path, images: Path) -> None:
    bundle: Bundle = where[0]
    parser = BundleFolder(bundle.path).parser(where[1], dataset_dir=str(images), pretrained_path=None, affine_prob=0.0)
    seen = parser.get_parsed_content(where[2])({"image": str(picture), "label": 0})[STEPS[where]]
    rows = seen.shape[1]
    assert seen[:, : rows // 2 - 1].mean() > seen[:, rows // 2 + 1 :].mean() + 0.5
    assert abs(seen[:, :, : rows // 2].mean() - seen[:, :, rows // 2 :].mean()) < 0.1
