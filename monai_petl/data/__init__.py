"""Data sets: phantoms to start with, data lists for bundles, checks, and conversion from other formats."""

from monai_petl.data.check import (
    CaseReport,
    DatasetReport,
    check_dataset,
    check_images,
    check_training_data,
    validate_cases,
)
from monai_petl.data.class_table import class_names, require_names
from monai_petl.data.classification import image_classes, load_image_list, require_images
from monai_petl.data.datalist import (
    few_shot,
    load_datalist,
    require_data,
    split_cases,
)
from monai_petl.data.errors import DataError
from monai_petl.data.feature_cache import FeatureCache, preload_states, weights_digest
from monai_petl.data.few_shot import (
    balancing_weights,
    few_shot_per_class,
    few_shot_split,
    find_leaks,
    positive_classes,
    require_disjoint,
)
from monai_petl.data.make import make_dataset
from monai_petl.data.medfmc import MEDFMC_CLASSES, make_medfmc_table, read_medfmc_list
from monai_petl.data.medmnist import make_medmnist_folder
from monai_petl.data.phantom import PHANTOM_CLASSES, make_phantom, make_phantom_dataset
from monai_petl.data.picture_reader import PictureReader
from monai_petl.data.volume_reader import VolumeReader
from monai_petl.data.volume_writer import VolumeWriter, output_name

__all__ = [
    "MEDFMC_CLASSES",
    "PHANTOM_CLASSES",
    "CaseReport",
    "DataError",
    "DatasetReport",
    "FeatureCache",
    "PictureReader",
    "VolumeReader",
    "VolumeWriter",
    "balancing_weights",
    "check_dataset",
    "check_images",
    "check_training_data",
    "class_names",
    "few_shot",
    "few_shot_per_class",
    "few_shot_split",
    "find_leaks",
    "image_classes",
    "load_datalist",
    "load_image_list",
    "make_dataset",
    "make_medfmc_table",
    "make_medmnist_folder",
    "make_phantom",
    "make_phantom_dataset",
    "output_name",
    "positive_classes",
    "preload_states",
    "read_medfmc_list",
    "require_data",
    "require_disjoint",
    "require_images",
    "require_names",
    "split_cases",
    "validate_cases",
    "weights_digest",
]
