"""What every bundle keeps to: each passes all checks that users can make, and the table of what works says what they found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from docs.support_table import row_of, rows_in
from monai_petl.bundle import items_of
from monai_petl.bundle.verify import verify
from tests.bundles.helpers import BUNDLES, REPOSITORY, RUNS, SEGMENTERS, Bundle, Trained, named, parsed
from tests.marks import slow_unless

SCHEMA = REPOSITORY / "tests" / "schemas" / "meta_schema_20240725.json"
CONFIGS = sorted((REPOSITORY / "bundles").glob("*/configs/*.json"))


@pytest.mark.parametrize("bundle", slow_unless(lambda bundle: bundle.name.startswith("ept"), BUNDLES), ids=named)
def test_every_check_passes_and_the_table_says_so(bundle: Bundle) -> None:
    found = verify(bundle.path, SCHEMA)
    assert found.ok, str(found)
    assert {check.detail for check in found.found if check.status == "skipped"} <= {"the card says no"}, str(found)
    row, label = row_of(found.to_dict()), "MONAI Label"  # which another test fills in, with a server
    written = rows_in(REPOSITORY / "docs" / "bundles.md")[bundle.name]
    assert {key: cell for key, cell in written.items() if key != label} == {
        key: cell for key, cell in row.items() if key != label
    }


@pytest.mark.parametrize(
    ("each", "config"), [run for run in RUNS if run[1] != "inference"], ids=named, indirect=["each"]
)
def test_property_list_of_training_is_complete(
    each: Bundle,
    config: str,
    trained: Trained,
    weights: dict[str, str],
    data_of: Callable[[Bundle], Path],
    tmp_path: Path,
) -> None:
    flow = each.workflow(config, trained.bundle, data_of(each), output_dir=str(tmp_path), **weights)
    flow.initialize()
    assert flow.check_properties() == []


def test_the_images_values_are_those_of_the_metadata(each: Bundle) -> None:
    value_range = each.config("metadata")["network_data_format"]["inputs"]["image"]["value_range"]
    assert value_range == ([-1, 1] if each in SEGMENTERS else [-3, 3])


@pytest.mark.parametrize("each", SEGMENTERS, ids=named, indirect=True)
@pytest.mark.parametrize("normalisation", ["window", "percentile", "zscore"])
def test_validation_and_inference_see_the_same_voxels(
    each: Bundle, normalisation: str, tmp_path: Path, data: Path
) -> None:
    images = []
    for name, section in (("train", "validate::preprocessing"), ("inference", "preprocessing")):
        flow = each.workflow(name, tmp_path, data, normalisation=normalisation, spacing=[9.0, 7.0, 10.0])
        case = parsed(flow, "validate::datalist" if name == "train" else "test_cases")[0]
        source = sorted((data / "imagesTr").iterdir())[0]
        label = data / "labelsTr" / source.name
        images.append(parsed(flow, section)({**case, "image": str(source), "label": str(label)})["image"])
    assert torch.equal(*images)
    low, high = images[0].aminmax()
    assert (-1.0 <= low < high <= 1.0) or normalisation == "zscore"


# Volumes smaller than the patch


@pytest.mark.parametrize("path", [path for path in CONFIGS if "segmentation" in path.parts[-3]], ids=named)
def test_windows_and_slabs_beyond_the_volume_hold_the_same_intensity(path: Path) -> None:
    contents = json.loads(path.read_text(encoding="utf-8"))
    components = [value for _, value in items_of(contents) if isinstance(value, dict) and "_target_" in value]
    windows = [c for c in components if c["_target_"].endswith(("SlidingWindowInferer", "CenterSliceInferer"))]
    pads = [c for c in components if c["_target_"] == "SpatialPadd" and "image" in c["keys"]]
    outside = {c.get("cval", c.get("padding_mode")) for c in windows} | {c.get("value", c.get("mode")) for c in pads}
    assert outside <= {"@pad_value"} or outside <= {"replicate", "edge"}  # two words for the voxels of the border
    assert bool(windows) == (path.stem in ("train", "pretrain", "inference"))
