"""Seeded CT-like phantoms of the abdomen: data for tests, demos and first runs, with labels that are exact.

No patient is behind them. Five organs are labelled; muscle, vena cava, stomach, bowel, ribs and table are not, and
share the organs' range of HU, so that a threshold does not find an organ but a small network does.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from monai_petl.data.datalist import new_dataset_folder, write_dataset_json

__all__ = ["PHANTOM_CLASSES", "make_phantom", "make_phantom_dataset"]

PHANTOM_CLASSES = {"liver": 1, "spleen": 2, "kidney": 3, "aorta": 4, "spine": 5}
"""Name of each labelled organ -> label value; 0 is background, both kidneys are one class."""

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
Point = tuple[float, float, float]


def make_phantom(
    seed: int | Sequence[int], size: tuple[int, int, int] = (96, 96, 24), spacing: Point = (2.5, 2.5, 5.0)
) -> tuple[NDArray[np.int16], NDArray[np.uint8], dict[str, int]]:
    """Draws one phantom. The anatomy fills the field of view, whatever its size; equal seeds give equal volumes.

    Axes run to the patient's right, front and head (RAS), so the liver lies at large first indices.

    Args:
        seed: seed of the subject; a sequence such as ``(seed, index)`` gives independent subjects.
        size: voxels along (H, W, D), at least 16 x 16 x 1.
        spacing: voxel size in mm; sets the grain of texture and the width of ribs and table, not the anatomy.

    Returns:
        image in HU, int16 (H, W, D); label, uint8 (H, W, D); ``PHANTOM_CLASSES``.

    Raises:
        ValueError: when the size is too small to hold the organs or the spacing is not positive.

    Example::

        image, label, classes = make_phantom(seed=0)
        kidney = image[label == classes["kidney"]]
    """
    if len(size) != 3 or min(size[:2]) < 16 or size[2] < 1:
        raise ValueError(f"size must be three numbers of voxels, at least 16 x 16 x 1, got {tuple(size)}")
    if len(spacing) != 3 or min(spacing) <= 0:
        raise ValueError(f"spacing must be three positive lengths in mm, got {tuple(spacing)}")
    canvas = _Canvas(np.random.default_rng(seed), size, spacing)
    _draw_trunk(canvas)
    _draw_gut(canvas)
    _draw_organs(canvas)
    _draw_vessels_and_spine(canvas)
    return canvas.scan(), canvas.label, dict(PHANTOM_CLASSES)


def make_phantom_dataset(
    out: str | PathLike[str],
    n_train: int,
    n_val: int,
    n_test: int,
    seed: int = 0,
    size: tuple[int, int, int] = (96, 96, 24),
    spacing: Point = (2.5, 2.5, 5.0),
) -> Path:
    """Writes phantoms as a data set in Decathlon layout, the test part with its labels so that it can be scored.

    Args:
        out: folder to make; it must be absent or empty, and is complete once it appears.
        n_train, n_val, n_test: number of volumes in each section.
        seed: seed of the data set; volume ``i`` has the seed ``(seed, i)``.
        size, spacing: as in :func:`make_phantom`.

    Returns:
        the folder.

    Raises:
        ValueError: when a count is negative or all are 0.
        FileExistsError: when ``out`` holds files.
        OSError: when ``out`` cannot be written.
    """
    counts = {"training": n_train, "validation": n_val, "test": n_test}
    if min(counts.values()) < 0 or not any(counts.values()):
        raise ValueError(f"the numbers of volumes must not be negative, and not all 0, got {tuple(counts.values())}")
    sections: dict[str, list[dict[str, str]]] = {section: [] for section in counts}
    plan = [section for section, count in counts.items() for _ in range(count)]
    with new_dataset_folder(out) as folder:
        for index, section in enumerate(tqdm(plan, desc="phantoms", disable=None)):
            part = "Ts" if section == "test" else "Tr"
            entry = {kind: f"{kind}s{part}/phantom_{index:03d}.nii.gz" for kind in ("image", "label")}
            image, label, _ = make_phantom((seed, index), size, spacing)
            _write_nifti(folder / entry["image"], image, spacing)
            _write_nifti(folder / entry["label"], label, spacing)
            sections[section].append(entry)
        write_dataset_json(folder, sections, PHANTOM_CLASSES, name="abdominal phantoms", modality="CT")
    return Path(out)


class _Canvas:
    """A volume being painted, in coordinates where the body is the unit circle in-plane and z runs from -1 to 1."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int, int], spacing: Point) -> None:
        self.rng, self.size, self.spacing = rng, size, spacing
        self.hu: Array = np.full(size, -1000, dtype=np.float32)
        self.label: NDArray[np.uint8] = np.zeros(size, dtype=np.uint8)
        self.grid: list[Array] = [
            ((2 * np.arange(n) + 1) / n - 1).astype(np.float32).reshape(np.roll((-1, 1, 1), axis))
            for axis, n in enumerate(size)
        ]
        self.half_axes = rng.uniform(0.80, 0.94), rng.uniform(0.60, 0.76)  # of the body, in half fields of view
        shift = rng.uniform(-0.04, 0.04, 2)
        self.back = float(shift[1] - self.half_axes[1])  # where the table is, in half fields of view
        # One smooth warp of space moves neighbours together, as anatomy does.
        self.x: Array = (self.grid[0] - shift[0]) / self.half_axes[0] + 0.035 * self.noise(3)
        self.y: Array = (self.grid[1] - shift[1]) / self.half_axes[1] + 0.035 * self.noise(3)
        self.z: Array = self.grid[2] + 0.08 * self.noise(3)
        self.grain: Array = self.noise(14)
        self.cavity: Mask = np.ones(size, dtype=bool)  # where organs may be, set once the trunk is drawn

    def noise(self, order: int) -> Array:
        """Smooth noise (H, W, D) of deviation about 1: random cosines of up to ``order`` half periods an axis."""
        waves = [np.cos(np.pi * np.arange(order)[:, None] * (axis.ravel() + 1) / 2) for axis in self.grid]
        field: Array = self.rng.normal(size=(order,) * 3).astype(np.float32)
        field[0, 0, 0] = 0
        for wave in waves:  # each step turns one axis of coefficients into voxels and moves it to the end
            field = np.tensordot(field, wave.astype(np.float32), axes=(0, 0))
        return field / (field.std() + 1e-6)

    def blob(self, centre: Point, radii: Point, turn: float = 0.0, rough: float = 0.06, order: int = 5) -> Mask:
        """A superellipsoid turned by ``turn`` radians in-plane; ``rough`` is the relative deviation of its surface."""
        x, y = self.x - centre[0], self.y - centre[1]
        cos, sin = float(np.cos(turn)), float(np.sin(turn))
        u, v = (cos * x + sin * y) / radii[0], (cos * y - sin * x) / radii[1]
        w = (self.z - centre[2]) / radii[2]
        return u * u + v * v + (w * w) ** 2 < 1 + 2 * rough * self.noise(order)  # w^4: long sides, round poles

    def near(self, point: Sequence[float], spread: float = 0.03) -> Point:
        """A random point around ``point``."""
        x, y, z = self.rng.normal(point, (spread, spread, 3 * spread))
        return float(x), float(y), float(z)

    def sizes(self, radii: Sequence[float], spread: float = 0.1) -> Point:
        """Radii scaled together and one by one."""
        common = self.rng.normal(1, spread)
        a, b, c = np.array(radii) * np.clip(common * self.rng.normal(1, spread / 2, 3), 0.7, 1.35)
        return float(a), float(b), float(c)

    def paint(self, mask: Mask, hu: float, texture: float = 4.0, organ: str | None = None) -> None:
        """Gives the mask a mean in HU with a texture of that deviation, and the organ's label (0 without one)."""
        self.hu[mask] = hu + texture * self.grain[mask]
        self.label[mask] = PHANTOM_CLASSES[organ] if organ else 0

    def scan(self) -> NDArray[np.int16]:
        """The image as a scanner gives it: partial volume at the edges, correlated noise, whole HU."""
        blurred = _smooth(self.hu, (0.16, 0.16, 0.08))
        noise = _smooth(self.rng.normal(size=self.size).astype(np.float32), (0.14, 0.14, 0.0))
        noise *= self.rng.uniform(9, 16) / noise.std()
        return np.clip(np.rint(blurred + noise), -1024, 3071).astype(np.int16)


def _draw_trunk(canvas: _Canvas) -> None:
    """Table, skin fat, muscle, ribs, the fat of the cavity and the muscles along the spine. None has a label."""
    rng, x, y = canvas.rng, canvas.x, canvas.y
    if rng.random() < 0.7:
        height = canvas.back - 0.06 + 0.12 * canvas.grid[0] ** 2 + 0 * canvas.grid[2]
        canvas.paint(np.broadcast_to(np.abs(canvas.grid[1] - height) < 0.03, canvas.size), rng.uniform(-250, 50))
    square = x * x + y * y + 0.35 * x * x * y * y  # a little squarer than an ellipse
    fat, muscle = rng.uniform(0.05, 0.14), rng.uniform(0.07, 0.1)
    canvas.paint(square < 1, rng.uniform(-112, -92), 7)
    wall = square < (1 - fat) ** 2 + 0.02 * canvas.noise(4)
    canvas.paint(wall, rng.uniform(48, 66), 8)
    cavity = canvas.cavity = square < (1 - fat - muscle) ** 2
    phase = canvas.grid[2] * canvas.size[2] * canvas.spacing[2] / 60 + 0.5 * np.abs(np.arctan2(x, y)) + rng.random()
    canvas.paint(
        wall & ~cavity & (square > (1 - fat - 0.8 * muscle) ** 2) & (phase % 1 < 0.28), rng.uniform(260, 420), 30
    )
    canvas.paint(cavity, rng.uniform(-108, -88), 10)
    for side in (-1, 1):
        canvas.paint(canvas.blob(canvas.near((0.25 * side, -0.72, 0), 0.01), (0.22, 0.16, 9)), rng.uniform(48, 64), 9)
        canvas.paint(
            canvas.blob(canvas.near((0.22 * side, -0.42, -0.3), 0.02), (0.1, 0.13, 1.2)), rng.uniform(50, 68), 6
        )


def _draw_gut(canvas: _Canvas) -> None:
    """Bowel loops and stomach: unlabelled soft tissue over the organs' range of HU, with contrast medium and gas."""
    rng = canvas.rng
    for _ in range(rng.integers(7, 12)):
        radius = rng.uniform(0.09, 0.18)
        centre = (rng.uniform(-0.55, 0.5), rng.uniform(-0.15, 0.55), rng.uniform(-1, 0.4))
        radii = (radius * rng.uniform(0.8, 1.6), radius, rng.uniform(0.3, 0.8))
        loop = canvas.blob(centre, radii, rng.uniform(0, np.pi), 0.1)
        canvas.paint(loop, rng.uniform(15, 165), 12)
        if rng.random() < 0.3:
            canvas.paint(loop & (canvas.y > centre[1] + 0.4 * radius), -850, 30)
    stomach = canvas.blob(canvas.near((-0.36, 0.3, 0.5)), canvas.sizes((0.27, 0.24, 0.75)), rng.uniform(-0.5, 0.5), 0.1)
    canvas.paint(stomach, rng.uniform(10, 70), 14)
    canvas.paint(stomach & (canvas.y > rng.uniform(0.33, 0.5)), -880, 30)


def _draw_organs(canvas: _Canvas) -> None:
    """Liver, spleen and kidneys, enhanced as in the portal venous phase: their ranges of HU overlap."""
    rng = canvas.rng
    right_lobe = canvas.blob(
        canvas.near((0.44, 0.08, 0.3)), canvas.sizes((0.38, 0.5, 1.1)), rng.uniform(-0.3, 0.3), 0.1
    )
    left_lobe = canvas.blob(canvas.near((0.02, 0.38, 0.6)), canvas.sizes((0.36, 0.2, 0.8)), rng.uniform(-0.3, 0.3), 0.1)
    liver = (right_lobe | left_lobe) & canvas.cavity
    enhancement = rng.uniform(85, 130)
    canvas.paint(liver, enhancement, 5, "liver")
    vessels = liver & (np.abs(canvas.noise(7)) < 0.07) & (canvas.noise(4) > 0)
    canvas.paint(vessels, enhancement + rng.uniform(20, 45), 5, "liver")
    spleen = canvas.blob(
        canvas.near((-0.6, -0.18, 0.3)), canvas.sizes((0.17, 0.34, 0.95)), rng.uniform(-0.5, 0.0), 0.08
    )
    canvas.paint(spleen & canvas.cavity, enhancement + rng.uniform(-5, 35), 5, "spleen")
    cortex = rng.uniform(115, 185)
    medulla = cortex - rng.uniform(10, 45)
    for side in (-1, 1):
        centre = canvas.near((0.4 * side, -0.37, -0.1 - 0.1 * side))
        radii, turn = canvas.sizes((0.165, 0.215, 0.95)), side * rng.uniform(0.1, 0.7)
        capsule = canvas.blob(centre, (1.15 * radii[0], 1.15 * radii[1], 1.1 * radii[2]), turn, 0.06)
        canvas.paint(capsule & canvas.cavity, rng.uniform(-105, -85))  # the fat that parts it from liver and spleen
        kidney = canvas.blob(centre, radii, turn, 0.06)
        core = canvas.blob(centre, (0.68 * radii[0], 0.68 * radii[1], 0.8 * radii[2]), turn, 0.15)
        canvas.paint(kidney, cortex, 6, "kidney")
        canvas.paint(kidney & core, medulla, 8, "kidney")
        hilum = (centre[0] - 0.09 * side, centre[1] + 0.03, centre[2])
        canvas.paint(canvas.blob(hilum, (0.1, 0.07, 0.45 * radii[2]), turn), rng.uniform(-95, -20), 15)


def _draw_vessels_and_spine(canvas: _Canvas) -> None:
    """Vena cava (without a label), aorta and spine with its canal and processes."""
    rng = canvas.rng
    cava = canvas.near((0.14, -0.2, 0), 0.02)
    canvas.paint(canvas.blob(cava, (rng.uniform(0.07, 0.1), rng.uniform(0.06, 0.09), 9), 0.3), rng.uniform(100, 165), 4)
    aorta, radius = canvas.near((-0.08, -0.24, 0), 0.02), rng.uniform(0.065, 0.095)
    canvas.paint(canvas.blob(aorta, (radius, radius * 1.2, 9), 0, 0.04), rng.uniform(110, 190), 4, "aorta")
    body = (aorta[0] + 0.07, -0.5, 0.0)
    radii = rng.uniform(0.15, 0.18), rng.uniform(0.15, 0.18)
    spongy = rng.uniform(150, 230)
    disc = np.cos(canvas.z * canvas.size[2] * canvas.spacing[2] / 2 * 2 * np.pi / 32 + rng.uniform(0, 6)) > 0.85
    processes = canvas.blob((body[0], -0.77, 0), (0.045, 0.13, 9)) | canvas.blob((body[0], -0.68, 0), (0.26, 0.05, 9))
    canvas.paint(processes & ~disc, rng.uniform(300, 450), 30, "spine")
    canvas.paint(canvas.blob(body, (radii[0], radii[1], 9), 0, 0.03), rng.uniform(380, 520), 20, "spine")
    canvas.paint(canvas.blob(body, (0.82 * radii[0], 0.82 * radii[1], 9), 0, 0.03), spongy, 25, "spine")
    canvas.paint(canvas.blob(body, (0.86 * radii[0], 0.86 * radii[1], 9)) & disc, rng.uniform(75, 120), 8, "spine")
    canvas.paint(canvas.blob((body[0], -0.68, 0), (0.065, 0.07, 9), 0, 0.03), rng.uniform(15, 40), 3)


def _smooth(volume: Array, weights: Point) -> Array:
    """Convolves each axis with (w, 1 - 2w, w); edges are repeated."""
    for axis, weight in enumerate(weights):
        width = [(1, 1) if i == axis else (0, 0) for i in range(3)]
        padded = np.pad(volume, width, mode="edge")
        before, after = np.split(padded, [-2], axis)[0], np.split(padded, [2], axis)[1]
        volume = (1 - 2 * weight) * volume + weight * (before + after)
    return volume


def _write_nifti(path: Path, volume: NDArray[np.int16] | NDArray[np.uint8], spacing: Point) -> None:
    """Writes a RAS volume with its centre at the origin."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -(np.array(volume.shape) - 1) / 2 * np.array(spacing)
    image = nib.Nifti1Image(volume, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(exist_ok=True)
    nib.save(image, path)
