"""The label that is read is the label that was written, voxel by voxel and in its place, whatever its format and geometry."""

from __future__ import annotations

import gzip
import itertools
import json
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import Compose, EnsureChannelFirstd, Invertd, LoadImaged, Orientationd

from monai_petl.data import (
    DataError,
    VolumeReader,
    check_dataset,
    check_images,
    check_training_data,
    load_datalist,
    make_dataset,
)
from monai_petl.data.volumes import read_array, read_grid
from monai_petl.transforms import GuardedSpacingd
from tests.pipelines import read_case
from tests.volumes import AFFINE, dataset, raw_nifti, save, volume

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".dcm")
AXES = [
    "".join(letters) for order in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*order)
]


def affine_of(codes: str, spacing: tuple[float, ...], origin: tuple[float, ...]) -> np.ndarray:
    """Axes by their codes, such as LPS, turned by 10 degrees about the body's axis."""
    turn = np.array([[0.98480775, -0.17364818, 0], [0.17364818, 0.98480775, 0], [0, 0, 1]])
    axes = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), (1, 1, 1))[:3, :3].T
    return nib.affines.from_matvec(turn @ axes @ np.diag(spacing), origin)


@settings(max_examples=60)
@given(
    codes=st.sampled_from(AXES),
    spacing=st.tuples(*[st.sampled_from([0.3, 0.9765625, 1.0, 2.5, 7.0])] * 3),
    origin=st.tuples(*[st.floats(-300, 300).map(lambda value: round(value, 3))] * 3),
    ending=st.sampled_from(ENDINGS),
    shape=st.tuples(*[st.integers(2, 5)] * 3),
)
def test_the_label_that_is_read_is_the_label_that_was_written(codes, spacing, origin, ending, shape):
    affine = affine_of(codes, spacing, origin)
    if ending == ".dcm" and np.linalg.det(affine) < 0:  # slices are stacked along their normal
        affine = affine @ np.diag([1.0, 1, -1, 1])
    label = np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)
    assert len(AXES) == 48
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder) / f"label{ending}", label, affine)
        assert np.array_equal(read_array(path), label)
        assert np.allclose(read_grid(path)[1], affine, atol=1e-3)
        steps = [
            LoadImaged("label", reader=VolumeReader(), image_only=True),
            EnsureChannelFirstd("label"),
            Orientationd("label", axcodes="RAS", labels=None),
        ]
        found = Compose(steps)({"label": str(path)})["label"]
        places = np.argwhere(label == 2)
        values = found.numpy()[0]
        back = np.linalg.inv(found.affine.numpy())
        for place in places:  # a voxel of the file is where the affine says, in what training sees
            index = np.rint(back @ affine @ [*place, 1])[:3].astype(int)
            assert values[tuple(index)] == 2
        assert int((values == 2).sum()) == len(places)


@pytest.mark.parametrize("ending", [*ENDINGS, ".mgz", ".NII.GZ"])
def test_training_and_conversion_see_the_same_label(tmp_path, ending):
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    for kind, voxels in zip(("images", "labels"), volume(), strict=True):
        save(tmp_path / kind / f"a{ending}", voxels, affine)
    name = "a" if ending == ".dcm" else f"a{ending}"
    case = {kind: str(tmp_path / f"{kind}s" / name) for kind in ("image", "label")}
    seen = read_case(case, tmp_path / "nowhere", (2, 2, 3))["label"]
    assert np.array_equal(seen.numpy()[0], volume()[1][::-1, ::-1])
    made = make_dataset(tmp_path / "images", tmp_path / "labels", tmp_path / "out", ["liver", "spleen"])
    written = nib.load(load_datalist(made)[0]["label"])
    assert np.array_equal(np.asarray(written.dataobj), volume()[1])
    assert np.allclose(written.affine, affine, atol=1e-4)
    assert {int(written.header["sform_code"]), int(written.header["qform_code"])} == {1}


def test_all_that_read_a_volume_refuse_what_one_of_them_refuses(tmp_path):
    root = dataset(tmp_path)
    case = load_datalist(root)[0]
    raw_nifti(Path(case["image"]), volume()[0], sform=AFFINE, sform_code=2, qform_code=1, qoffset_x=5.0)
    sentence = f"{case['image']} has two geometries"
    with pytest.raises(DataError, match=sentence):
        check_training_data(load_datalist(root), root, ["liver"])
    with pytest.raises(DataError, match=sentence):
        check_images([{"image": case["image"]}], root)
    with pytest.raises(DataError, match=sentence):
        make_dataset(root / "imagesTr", root / "labelsTr", root / "out")
    with pytest.raises(RuntimeError) as error:
        read_case(case, root, (2, 2, 3))
    assert sentence in str(error.value.__cause__)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"sform": np.zeros((3, 4)), "sform_code": 1}, "its affine is singular"),
        ({"sform": np.full((3, 4), np.nan), "sform_code": 1}, "an affine that is not finite"),
        ({"sform": AFFINE, "sform_code": 2, "qform_code": 1, "qoffset_y": 3.0}, "has two geometries"),
        ({"qform_code": 1, "pixdim": (1, 2, 0, 3, 0, 0, 0, 0)}, "a voxel size of 2 x 0 x 3"),
        ({"sform": AFFINE, "sform_code": 1, "vox_offset": 0}, "begin at byte 0"),
    ],
)
@pytest.mark.parametrize("kind", ["image", "label"])
def test_every_check_names_a_file_with_a_broken_header(tmp_path, kind, fields, sentence):
    root = dataset(tmp_path)
    cases = load_datalist(root)
    raw_nifti(Path(cases[0][kind]), volume()[kind == "label"], **fields)
    name = f"{kind}sTr/c0.nii.gz"
    assert [problem for problem in check_dataset(root).problems if name in problem and sentence in problem]
    with pytest.raises(DataError, match=f"{name}.*{sentence}"):
        check_training_data(cases, root, ["liver"])
    if kind == "image":
        with pytest.raises(DataError, match=f"{name}.*{sentence}"):
            check_images(cases, root)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
def test_a_header_is_checked_without_its_voxels(tmp_path, name, monkeypatch):
    from nibabel.arrayproxy import ArrayProxy

    path = save(tmp_path / name, volume()[0])
    monkeypatch.setattr(ArrayProxy, "__array__", None)
    assert read_grid(path)[0] == volume()[0].shape


def test_packed_voxels_are_read_once_up_to_their_checksum(tmp_path, monkeypatch):
    path = save(tmp_path / "a.nii.gz", volume()[0])
    opened = []
    monkeypatch.setattr(gzip, "open", lambda name, *mode, real=gzip.open: opened.append(name) or real(name, *mode))
    reader = VolumeReader()
    assert np.array_equal(reader.get_data(reader.read(str(path)))[0], volume()[0])
    assert len(opened) == 2  # the header, and the voxels


def test_sheared_volumes_are_resampled_where_they_lie_and_come_back(tmp_path):
    affine = nib.affines.from_matvec(np.array([[-2.0, 0.8, 0.4], [0.2, 2, 0], [0.3, 0, -3]]), [50, 6, 70])
    slope = np.array([1.0, 2.0, -1.5])  # a ramp in mm: linear resampling keeps it
    ramp = (nib.affines.apply_affine(affine, np.moveaxis(np.indices((24, 20, 16)), 0, -1)) @ slope).astype(np.float32)
    save(tmp_path / "a.nii.gz", ramp, affine)
    steps = Compose(
        [
            LoadImaged("image", reader=VolumeReader(), image_only=True),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            GuardedSpacingd("image", pixdim=(1.5, 1.5, 2), mode="bilinear"),
        ]
    )
    data = steps({"image": str(tmp_path / "a.nii.gz")})
    seen = data["image"]
    places = nib.affines.apply_affine(seen.affine.numpy(), np.moveaxis(np.indices(seen.shape[1:]), 0, -1))
    indices = nib.affines.apply_affine(np.linalg.inv(affine), places)
    inside = ((indices >= 0) & (indices <= np.array(ramp.shape) - 1)).all(-1)
    assert inside.mean() > 0.3
    assert np.abs(seen.numpy()[0] - places @ slope)[inside].max() < 1e-3
    data["pred"] = seen.clone()
    back = Invertd("pred", transform=steps, orig_keys="image", nearest_interp=False)(data)["pred"]
    assert np.allclose(back.affine, affine)
    assert np.abs(back.numpy()[0] - ramp)[3:-3, 3:-3, 3:-3].max() < 1e-3


def test_the_modality_is_what_the_series_say_or_unknown(tmp_path):
    for kind, voxels in zip(("images", "labels"), volume(), strict=True):
        save(tmp_path / kind / "a.dcm", voxels, np.diag([-2.0, -2.0, 3.0, 1.0]))
    save(tmp_path / "nifti" / "a.nii.gz", volume()[0], np.diag([-2.0, -2.0, 3.0, 1.0]))
    for images, given_as, said in (("images", None, "CT"), ("nifti", None, "unknown"), ("nifti", "MR", "MR")):
        out = make_dataset(tmp_path / images, tmp_path / "labels", tmp_path / f"{images}{said}", modality=given_as)
        assert json.loads((out / "dataset.json").read_text(encoding="utf-8"))["modality"] == {"0": said}


def test_metadata_are_those_of_monais_reader(tmp_path):
    from monai.data import NibabelReader

    path = save(tmp_path / "a.nii.gz", volume()[0], affine_of("LSA", (1, 2, 3), (4, 5, 6)))
    theirs, ours = NibabelReader(), VolumeReader()
    (array, meta), (expected, wanted) = ours.get_data(ours.read(path)), theirs.get_data(theirs.read(path))
    assert np.array_equal(array, expected)
    assert set(meta) == set(wanted)
    for name, value in wanted.items():
        assert np.array_equal(meta[name], value, equal_nan=np.asarray(value).dtype.kind == "f"), name
