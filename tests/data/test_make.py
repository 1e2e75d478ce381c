from __future__ import annotations

import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from monai_petl.data import DataError, check_dataset, class_names, load_datalist, make_dataset

HIPPOCAMPUS = Path(__file__).parents[2] / "../shared/data/mr_hippocampus"
SIZE = (7, 6, 5)  # x, y, z
OBLIQUE = (0.0, -1.0, 0.0, 0.96, 0.0, -0.28, 0.28, 0.0, 0.96)


def volume(low: int, high: int, kind: int = sitk.sitkInt16, seed: int = 0) -> sitk.Image:
    voxels = np.random.default_rng(seed).integers(low, high, SIZE[::-1])
    voxels[0, 0, 0], voxels[-1, -1, -1] = low, high - 1
    image = sitk.Cast(sitk.GetImageFromArray(voxels), kind)
    image.SetSpacing((0.8, 1.2, 2.5))
    image.SetOrigin((-30.0, 40.0, -100.0))
    image.SetDirection(OBLIQUE)
    return image


def write(image: sitk.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def write_dicom(image: sitk.Image, folder: Path, uid: str = "1.2.3", modality: str = "CT") -> None:
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    direction = image.GetDirection()
    for index in range(image.GetSize()[2]):
        plane = image[:, :, index]
        position = image.TransformIndexToPhysicalPoint((0, 0, index))
        tags = {
            "0008|0060": modality,
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{uid}.{index + 1}",
            "0020|000d": "1.2.9",
            "0020|000e": uid,
            "0020|0013": str(index),
            "0020|0032": "\\".join(f"{value:.9g}" for value in position),
            "0020|0037": "\\".join(f"{direction[i]:g}" for i in (0, 3, 6, 1, 4, 7)),
            "0028|1052": "-1024",
            "0028|1053": "1",
        }
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"slice{100 - index}.dcm"))
        writer.Execute(plane)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for index in range(10):
        write(volume(-1000, 1000, seed=index), tmp_path / f"images/p{index}.nii.gz")
        write(volume(0, 4, sitk.sitkUInt8, seed=index), tmp_path / f"labels/p{index}.nii.gz")
    return tmp_path


def run(source: Path, **options: object) -> Path:
    return make_dataset(source / "images", source / "labels", source / "out", **options)


def fails(source: Path, match: str, error: type[Exception] = DataError, **options: object) -> None:
    """The run stops with this sentence and leaves nothing behind."""
    before = sorted(source.iterdir())
    with pytest.raises(error, match=match):
        run(source, **options)
    assert sorted(source.iterdir()) == before


def corners(image: sitk.Image) -> np.ndarray:
    """Corners of a SimpleITK image in mm, in RAS."""
    points = [
        image.TransformIndexToPhysicalPoint(index)
        for index in itertools.product(*[(0, n - 1) for n in image.GetSize()])
    ]
    return np.array(points) * (-1, -1, 1)


def nifti_corners(path: str) -> np.ndarray:
    image = nib.load(path)
    return np.array([image.affine @ (*i, 1) for i in itertools.product(*[(0, n - 1) for n in image.shape])])[:, :3]


def test_the_result_is_a_sound_split_data_set(source):
    folder = run(source, class_names=["liver", "spleen", "aorta"])
    assert check_dataset(folder).ok
    assert class_names(folder) == {"liver": 1, "spleen": 2, "aorta": 3}
    assert [len(load_datalist(folder, part)) for part in ("training", "validation", "test")] == [7, 1, 2]
    assert sorted(path.name for path in folder.iterdir()) == [
        "dataset.json",
        "imagesTr",
        "imagesTs",
        "labelsTr",
        "labelsTs",
    ]
    assert json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["numTraining"] == 7


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".mhd"])
def test_voxels_and_their_places_survive(tmp_path, ending):
    image, label = volume(-1000, 1000), volume(0, 3, sitk.sitkUInt8)
    write(image, tmp_path / f"images/a{ending}")
    write(label, tmp_path / f"labels/a{ending}")
    (case,) = load_datalist(run(tmp_path))
    assert np.allclose(nifti_corners(case["image"]), corners(image), atol=1e-3)
    assert np.array_equal(nib.load(case["image"]).get_fdata(), sitk.GetArrayFromImage(image).T)
    assert np.array_equal(nib.load(case["label"]).get_fdata(), sitk.GetArrayFromImage(label).T)
    assert nib.load(case["image"]).get_data_dtype() == np.int16
    assert nib.load(case["label"]).get_data_dtype() == np.uint8


def test_a_dicom_series_keeps_hu_and_place_whatever_its_file_names(tmp_path):
    image = volume(-1000, 1000)
    write_dicom(image, tmp_path / "images/patient_7/1.2.9/1.2.3")  # a tree as archives make it
    write(volume(0, 3, sitk.sitkUInt8), tmp_path / "labels/patient_7.nrrd")
    (case,) = load_datalist(run(tmp_path))
    assert Path(case["image"]).name == "patient_7.nii.gz"
    written = nib.load(case["image"])
    assert np.array_equal(written.get_fdata(), sitk.GetArrayFromImage(image).T)
    assert np.allclose(nifti_corners(case["image"]), corners(image), atol=1e-3)


def test_names_that_differ_are_paired_by_a_pattern(tmp_path):
    for index in range(3):
        write(volume(-9, 9), tmp_path / f"both/volume-{index}.nii.gz")
        write(volume(0, 2, sitk.sitkUInt8), tmp_path / f"both/labels-{index}.nii.gz")
    both = tmp_path / "both"
    folder = make_dataset(both / "volume-*.gz", both / "labels-*.gz", tmp_path / "out", case_pattern=r"-(\d+)")
    assert {Path(case["image"]).name for case in load_datalist(folder)} <= {f"{index}.nii.gz" for index in range(3)}
    with pytest.raises(DataError, match=r"without a partner.*case_pattern"):
        make_dataset(both / "volume-*.gz", both / "labels-*.gz", tmp_path / "other")
    with pytest.raises(DataError, match=r"finds nothing in volume-0\.nii\.gz"):
        make_dataset(both / "volume-*.gz", both / "labels-*.gz", tmp_path / "other", case_pattern="scan")


def test_a_mapping_keeps_merges_and_renumbers(source):
    folder = run(source, class_names={"kidney": [1, 3], "liver": 2})
    assert class_names(folder) == {"kidney": 1, "liver": 2}
    case = load_datalist(folder)[0]
    before = nib.load(source / "labels" / Path(case["label"]).name).get_fdata()
    after = nib.load(case["label"]).get_fdata()
    assert np.array_equal(after, np.choose(before.astype(int), [0, 1, 2, 1]))
    other = make_dataset(source / "images", source / "labels", source / "other", {"liver": 2})
    assert np.array_equal(nib.load(load_datalist(other)[0]["label"]).get_fdata(), before == 2)


def test_without_names_the_values_stay(source):
    assert class_names(run(source)) == {"class_1": 1, "class_2": 2, "class_3": 3}


def test_sources_are_split_by_themselves_and_subjects_stay_together(tmp_path):
    for name in [f"{site}_{subject}_{visit}" for site in "ab" for subject in range(5) for visit in range(2)]:
        write(volume(-9, 9), tmp_path / f"images/{name}.nii.gz")
        write(volume(0, 2, sitk.sitkUInt8), tmp_path / f"labels/{name}.nii.gz")
    folder = run(tmp_path, source_pattern="^[ab]", subject_pattern=r"^([ab]_\d)")
    test = sorted(Path(case["image"]).name[:3] for case in load_datalist(folder, "test"))
    assert len(test) == 4
    assert test[0] == test[1]
    assert test[2] == test[3]
    assert test[0][0] == "a"
    assert test[2][0] == "b"


def test_float_images_stay_float(tmp_path):
    write(sitk.Cast(volume(0, 100), sitk.sitkFloat64) * 0.25, tmp_path / "images/a.nii.gz")
    write(volume(0, 2, sitk.sitkUInt8), tmp_path / "labels/a.nii.gz")
    (case,) = load_datalist(run(tmp_path))
    assert nib.load(case["image"]).get_data_dtype() == np.float32


def test_a_grid_within_rounding_is_accepted_and_made_equal(source):
    label = volume(0, 4, sitk.sitkUInt8)
    label.SetOrigin((-30.0, 40.0, -100.01))
    write(label, source / "labels/p0.nii.gz")
    run(source)
    assert check_dataset(source / "out").ok


def test_a_label_elsewhere_is_refused(source):
    label = volume(0, 4, sitk.sitkUInt8)
    label.SetOrigin((-30.0, 40.0, -99.0))
    write(label, source / "labels/p3.nii.gz")
    fails(source, r"p3.nii.gz does not lie on the grid of .*p3.nii.gz: corners lie up to 1 mm apart.*Resample")


def test_a_label_of_other_shape_is_refused(source):
    write(volume(0, 4, sitk.sitkUInt8)[:, :, 1:], source / "labels/p3.nii.gz")
    fails(source, r"p3.nii.gz does not lie on the grid .* shape \(7, 6, 4\) instead of \(7, 6, 5\)")


def test_a_case_without_partner_is_refused(source):
    (source / "labels/p4.nii.gz").unlink()
    fails(source, "images holds cases without a partner in .*labels: p4. Give both")


def test_a_corrupt_file_is_refused(source):
    (source / "images/p9.nii.gz").write_bytes(b"not an image")
    fails(source, r"p9\.nii\.gz cannot be read")


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (volume(5, 6), "constant"),
        (volume(-9, 9)[:, :, 0], "does not lie on the grid"),
        (sitk.JoinSeries([volume(-9, 9), volume(-9, 9)]), "has 4 axes"),
        (sitk.Compose(volume(-9, 9), volume(-9, 9)), "has 5 axes"),
    ],
)
def test_an_image_that_is_none_is_refused(source, image, sentence):
    write(image, source / "images/p3.nii.gz")
    fails(source, rf"p3\.nii\.gz .*{sentence}")


@pytest.mark.parametrize("kind", ["images", "labels"])
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_nan_is_refused(source, kind, ending):
    """ITK turns NaN in a NIfTI file into 0 without a word."""
    voxels = sitk.GetArrayFromImage(volume(0, 4)).astype(np.float32)
    voxels[0, 0, 0] = np.nan
    image = sitk.GetImageFromArray(voxels)
    image.CopyInformation(volume(0, 4))
    (source / kind / "p3.nii.gz").unlink()
    write(image, source / kind / f"p3{ending}")
    fails(source, r"p3\.(nii\.gz|nrrd) holds 1 .*(NaN|nan)")


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        (sitk.Cast(volume(0, 4), sitk.sitkFloat32) * 0.5, "not whole numbers"),
        (volume(-3, 4), "label values from -3"),
        (volume(0, 5), "holds label value 4, for which class_names has no name"),
    ],
)
def test_a_label_with_other_values_is_refused(source, label, sentence):
    write(label, source / "labels/p3.nii.gz")
    fails(source, rf"p3\.nii\.gz .*{sentence}", class_names="a, b, c")


def test_a_name_without_any_voxel_is_refused(source):
    fails(source, "no label in .*labels holds the class pancreas", class_names={"liver": 1, "pancreas": 11})


@pytest.mark.parametrize("names", [[], ["a", "a"], ["a", ""], {"a": 0}, {"a": 1, "b": [1, 2]}])
def test_senseless_class_names_are_refused(source, names):
    fails(source, "class", ValueError, class_names=names)


def test_an_empty_or_absent_folder_is_refused(source):
    with pytest.raises(DataError, match="nowhere holds no volumes"):
        make_dataset(source / "nowhere", source / "labels", source / "out")
    (source / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no volumes"):
        make_dataset(source / "empty", source / "labels", source / "out")


def test_two_files_for_one_case_are_refused(source):
    write(volume(-9, 9), source / "images/again/p3.mha")
    fails(source, "two volumes for case p3")


def test_an_occupied_output_folder_is_left_alone(source):
    (source / "out").mkdir()
    (source / "out/mine.txt").touch()
    fails(source, "not an empty folder", FileExistsError)
    assert [path.name for path in (source / "out").iterdir()] == ["mine.txt"]


def test_an_empty_output_folder_is_used(source):
    (source / "out").mkdir()
    assert check_dataset(run(source)).ok


def test_an_unwritable_output_folder_is_explained(source):
    (source / "file").touch()
    with pytest.raises(OSError, match=r"cannot write the output folder .*Choose a writable place"):
        make_dataset(source / "images", source / "labels", source / "file/out")


def test_a_failure_while_writing_leaves_nothing(source, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full)
    fails(source, "cannot write the volume to .*No space left.*MiB are free", OSError)


def test_a_dicom_series_with_a_gap_is_refused(tmp_path):
    write_dicom(volume(0, 100), tmp_path / "images/a")
    (tmp_path / "images/a/slice98.dcm").unlink()
    write(volume(0, 2, sitk.sitkUInt8), tmp_path / "labels/a.nii.gz")
    fails(tmp_path, "lacks slices or has uneven ones: they lie 2.5 to 5 mm apart")


def test_two_dicom_series_in_one_folder_are_refused(tmp_path):
    write_dicom(volume(0, 100), tmp_path / "images/a")
    write_dicom(volume(0, 100), tmp_path / "b", uid="1.2.4")
    for path in (tmp_path / "b").iterdir():
        path.rename(tmp_path / "images/a" / f"b_{path.name}")
    write(volume(0, 2, sitk.sitkUInt8), tmp_path / "labels/a.nii.gz")
    fails(tmp_path, "holds 2 DICOM series; give each a folder of its own")


def test_a_dicom_segmentation_object_is_refused(tmp_path):
    write(volume(0, 100), tmp_path / "images/a.nii.gz")
    write_dicom(volume(0, 2), tmp_path / "labels/a", modality="SEG")
    fails(tmp_path, "DICOM object of modality SEG. Convert a segmentation to NIfTI")


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the hippocampus volumes are not at hand")
def test_real_volumes_are_converted(tmp_path):
    at = HIPPOCAMPUS
    folder = make_dataset(at / "images/*_00?.*", at / "labels/*_00?.*", tmp_path / "out", ["anterior", "posterior"])
    assert check_dataset(folder).ok
    case = load_datalist(folder)[0]
    original = nib.load(at / "images" / Path(case["image"]).name)
    assert np.allclose(nib.load(case["image"]).affine, original.affine, atol=1e-5)
    assert np.array_equal(nib.load(case["image"]).get_fdata(), original.get_fdata())
