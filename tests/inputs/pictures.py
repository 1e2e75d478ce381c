"""Pictures of every mode and format, as a person sees them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from monai_petl.data import require_images
from tests.dicom_files import write_dicom_picture
from tests.inputs import Input
from tests.pipelines import read_picture

MODES, FORMATS, DICOM = "Pictures: modes", "Pictures: formats", "Pictures: DICOM"
SIZE = (24, 40)
COLOURS = np.zeros((*SIZE, 3), np.uint8)
COLOURS[:, :20], COLOURS[:, 20:], COLOURS[:6] = (200, 30, 30), (30, 30, 200), (250, 240, 0)
RGB = Image.fromarray(COLOURS)
GREY = RGB.convert("L")
G = np.asarray(GREY)
TWELVE = (G.astype(np.uint16) * 16)[:, ::-1].copy()


def looks(make: Callable[[Path], Path], expected: np.ndarray, within: float = 0.51) -> Callable[[Path], None]:
    """What the network gets is ``expected`` (0 to 255, rows first); the check before training passes it too."""

    def check(folder: Path) -> None:
        path = make(folder)
        require_images([{"image": str(path), "class_name": "a"}], folder)
        found = 255 * read_picture(path, expected.shape[:2]).numpy()
        wanted = expected.astype(float)
        wanted = np.stack([wanted] * 3) if wanted.ndim == 2 else wanted.transpose(2, 0, 1)
        assert np.abs(found - wanted).max() <= within

    return check


def saved(picture: Image.Image, name: str, **options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        picture.save(folder / f"written{Path(name.lower()).suffix}", **options)
        return (folder / f"written{Path(name.lower()).suffix}").rename(folder / name)

    return make


def renamed(picture: Image.Image, kind: str, name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        picture.save(folder / name, format=kind, quality=100)
        return folder / name

    return make


LOSSLESS = {"a.webp": {"lossless": True}, "a.jpg": {"quality": 100}}


def turned(name: str) -> Callable[[Path], Path]:
    """Stored on its side, with EXIF's note to turn it."""

    def make(folder: Path) -> Path:
        exif = Image.Exif()
        exif[274] = 6
        GREY.transpose(Image.Transpose.ROTATE_90).save(
            folder / name, exif=exif, **({"lossless": True} if "webp" in name else {})
        )
        return folder / name

    return make


def content(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def cut(folder: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80), np.uint8)).save(folder / "a.png")
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:3000])
    return folder / "a.png"


def dicom(values: np.ndarray, photometric: str = "MONOCHROME2", bits: int = 12, **tags: Any) -> Callable[[Path], Path]:
    return lambda folder: write_dicom_picture(folder / "a.dcm", values, photometric, bits, **tags)


def window(values: np.ndarray, center: float, width: float) -> np.ndarray:
    return np.clip((values.astype(float) - (center - 0.5)) / (width - 1) + 0.5, 0, 1) * 255


def png16(values: np.ndarray) -> Callable[[Path], Path]:
    """16 bits a sample, grey with transparency (2 channels) or colours (3), which Pillow does not write."""

    def part(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    kind = {2: 4, 3: 2}[values.shape[2]]
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")
    return content("a.png", data)


def tiff(values: np.ndarray, bits: int, photometric: int) -> Callable[[Path], Path]:
    """Grey of any number of bits in little endian, which Pillow does not write."""
    text = ["".join(format(int(value), f"0{bits}b") for value in row) for row in values]
    rows = [line.ljust(-(-len(line) // 8) * 8, "0") for line in text]
    data = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    if bits == 16:
        data = values.astype("<u2").tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return content("a.tif", struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory)


def array(values: np.ndarray) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.save(folder / "a.npy", values)
        return folder / "a.npy"

    return make


def several_arrays(folder: Path) -> Path:
    np.savez(folder / "a.npz", a=G, b=G)
    return (folder / "a.npz").rename(folder / "a.npy")


def huge(folder: Path) -> Path:
    Image.new("1", (14000, 14000)).save(folder / "a.png")
    return folder / "a.png"


CLEAR = RGB.convert("RGBA")
CLEAR.putalpha(GREY)
WIDE = COLOURS.astype(np.uint16)
SHADED = np.stack([G, 255 + 0 * G], -1).astype(np.uint16)
QUARTERS = G // 64
FAR = {"x00091010": b"\0" * 80000, "x00283010": b"\xfe\xff\x00\xe0\x00\x00\x00\x00"}
SIGNED = TWELVE.astype(np.int16) - 2048
TABLE = b"\xfe\xff\x00\xe0\x00\x00\x00\x00"
LIGHT = 255 - G
INPUTS = [
    Input(MODES, "8-bit grey", looks(saved(GREY, "a.png"), G)),
    Input(MODES, "8-bit RGB", looks(saved(RGB, "a.png"), COLOURS)),
    Input(MODES, "palette, PNG", looks(saved(RGB.quantize(8), "a.png"), COLOURS)),
    Input(MODES, "palette, BMP", looks(saved(RGB.quantize(8), "a.bmp"), COLOURS)),
    Input(MODES, "palette, GIF", looks(saved(RGB.quantize(8), "a.gif"), COLOURS)),
    Input(MODES, "palette with transparency", looks(saved(RGB.quantize(8), "a.png", transparency=0), COLOURS)),
    Input(MODES, "black and white, 1 bit", looks(saved(GREY.point(lambda v: 255 * (v > 100)).convert("1", dither=0), "a.png"),
                                               255 * (G > 100))),
    Input(MODES, "CMYK, JPEG", looks(saved(RGB.convert("CMYK"), "a.jpg", quality=100, subsampling=0), COLOURS, 8)),
    Input(MODES, "CMYK, TIFF", looks(saved(RGB.convert("CMYK"), "a.tif"), COLOURS)),
    Input(MODES, "LAB, TIFF", looks(saved(RGB.convert("LAB"), "a.tif"), np.asarray(RGB.convert("LAB").convert("RGB")))),
    Input(MODES, "YCbCr, TIFF", looks(saved(RGB.convert("YCbCr"), "a.tif"), COLOURS, 3)),
    Input(MODES, "grey with transparency", looks(saved(GREY.convert("LA"), "a.png"), G)),
    Input(MODES, "colours with transparency, which is left out", looks(saved(CLEAR, "a.png"), COLOURS)),
    Input(MODES, "16-bit grey, PNG: 0 to 65535", looks(saved(Image.fromarray(G.astype(np.uint16) * 257), "a.png"), G)),
    Input(MODES, "16-bit grey, TIFF", looks(saved(Image.fromarray(G.astype(np.uint16) * 257), "a.tif"), G)),
    Input(MODES, "16 bits with 12 in use", looks(saved(Image.fromarray(TWELVE), "a.png"), G), True,
          ("a.png has 16 bits, of which at most 12 are used", "Scale")),
    Input(MODES, "32-bit whole numbers", looks(saved(Image.fromarray(G.astype(np.int32) * 70000), "a.tif"), G), True,
          ("a.tif has whole numbers from",)),
    Input(MODES, "fractions from 0 to 1, TIFF", looks(saved(Image.fromarray(G.astype(np.float32) / 255), "a.tif"), G)),
    Input(MODES, "fractions beyond 0 to 1", looks(saved(Image.fromarray(G.astype(np.float32)), "a.tif"), G), True,
          ("a.tif has fractions from", "to 216")),
    Input(MODES, "fractions with NaN", looks(saved(Image.fromarray(np.full(SIZE, np.nan, np.float32)), "a.tif"), G), True,
          ("a.tif has fractions from nan",)),
    Input(MODES, "white is zero, TIFF of 8 bits", looks(saved(Image.fromarray(LIGHT), "a.tif", tiffinfo={262: 0}), LIGHT)),
    Input(MODES, "white is zero, TIFF of 16 bits", looks(saved(
        Image.fromarray(LIGHT.astype(np.uint16) * 257), "a.tif", tiffinfo={262: 0}), G)),
    Input(MODES, "16-bit colours, PNG: the upper 8 bits", looks(png16(WIDE * 257), COLOURS)),
    Input(MODES, "16-bit colours with 12 in use", looks(png16(WIDE * 16), COLOURS), True, ("a.png has 16 bits", "nearly black")),
    Input(MODES, "16-bit grey with transparency", looks(png16(SHADED * 257), G)),
    Input(MODES, "16-bit grey with transparency and 12 in use", looks(png16(SHADED * 16), G), True, ("a.png has 16 bits",)),
    Input(MODES, "12-bit grey, TIFF: 0 to 4095", looks(tiff(G.astype(np.uint16) * 16, 12, 1), G.astype(float) * 16 / 4095 * 255)),
    Input(MODES, "white is zero, TIFF of 1 bit", looks(tiff(G <= 100, 1, 0), 255 * (G > 100))),
    Input(MODES, "white is zero, TIFF of 2 bits", looks(tiff(3 - QUARTERS, 2, 0), QUARTERS * 85)),
    Input(MODES, "white is zero, TIFF of 16 bits with 12 in use", looks(tiff(65535 - G.astype(np.uint16) * 16, 16, 0), G), True,
          ("a.tif has 16 bits", "nearly black")),
    Input(MODES, "palette with alpha, TIFF", looks(saved(CLEAR.convert("PA"), "a.tif"), np.asarray(CLEAR.convert("PA").convert("RGB")))),
    *(Input(MODES, f"turned by EXIF, {name[2:].upper()}", looks(turned(name), G, within))
      for name, within in (("a.jpg", 12), ("a.png", 0.51), ("a.tif", 0.51), ("a.webp", 0.51))),
    Input(FORMATS, "`.jfif`, `.jpe`", looks(renamed(GREY, "JPEG", "a.jfif"), G, 4)),
    Input(FORMATS, "`.JPG`", looks(saved(GREY, "a.JPG", quality=100), G, 4)),
    Input(FORMATS, "`.webp`", looks(saved(RGB, "a.webp", lossless=True), COLOURS)),
    Input(FORMATS, "`.jp2`", looks(saved(RGB, "a.jp2"), COLOURS, 2)),
    Input(FORMATS, "`.pgm`", looks(saved(GREY, "a.pgm"), G)),
    Input(FORMATS, "a JPEG called `.png`", looks(renamed(GREY, "JPEG", "a.png"), G, 4)),
    Input(FORMATS, "an animation, GIF", looks(saved(GREY, "a.gif", save_all=True, append_images=[RGB.convert("L").rotate(90)]), G),
          True, ("a.gif holds 2 pictures",)),
    Input(FORMATS, "TIFF of two pages", looks(saved(GREY, "a.tif", save_all=True, append_images=[GREY]), G), True,
          ("a.tif holds 2 pictures", "Save the one")),
    Input(FORMATS, "a picture that is cut off", looks(cut, G), True, ("a.png cannot be read",)),
    Input(FORMATS, "an empty file", looks(content("a.png", b""), G), True, ("a.png cannot be read",)),
    Input(FORMATS, "a text with the name of a picture", looks(content("a.jpg", b"no picture"), G), True, ("a.jpg cannot be read",)),
    Input(FORMATS, "a picture of one pixel", looks(saved(GREY.crop((0, 0, 1, 1)), "a.png"), G[:1, :1])),
    Input(FORMATS, "an animation, WebP", looks(saved(GREY, "a.webp", save_all=True, append_images=[GREY.rotate(90)]), G), True,
          ("a.webp holds 2 pictures",)),
    Input(FORMATS, "an animation, PNG", looks(saved(GREY, "a.png", save_all=True, append_images=[GREY.rotate(90)]), G), True,
          ("a.png holds 2 pictures",)),
    Input(FORMATS, "196 million pixels", looks(huge, G), True, ("a.png has more than", "smaller copy")),
    Input(FORMATS, "`.npy` with NaN", looks(array(np.full(SIZE, np.nan)), G), True, ("a.npy has values", "NaN")),
    Input(FORMATS, "`.npz` called `.npy`", looks(several_arrays, G), True, ("a.npy holds several arrays",)),
    Input(FORMATS, "a text called `.dcm`", looks(content("a.dcm", b"no picture"), G), True, ("a.dcm cannot be read as a DICOM",)),
    Input(DICOM, "8 bits without a window", looks(dicom(G, bits=8), G)),
    Input(DICOM, "12 bits without a window: 0 to 4095", looks(dicom(TWELVE), TWELVE / 4095 * 255)),
    Input(DICOM, "MONOCHROME1", looks(dicom(255 - G, "MONOCHROME1", 8), G)),
    Input(DICOM, "MONOCHROME1 with a window", looks(dicom(TWELVE, "MONOCHROME1", x00281050="1600", x00281051="1000"),
                                                    255 - window(TWELVE, 1600, 1000))),
    Input(DICOM, "a window", looks(dicom(TWELVE, x00281050="1600", x00281051="1000"), window(TWELVE, 1600, 1000))),
    Input(DICOM, "two windows, of which the first counts", looks(dicom(
        TWELVE, x00281050="1600\\100", x00281051="1000\\50"), window(TWELVE, 1600, 1000))),
    Input(DICOM, "rescaled, with a window", looks(dicom(
        TWELVE, x00281050="40", x00281051="400", x00281052="-1024", x00281053="0.5"), window(TWELVE * 0.5 - 1024, 40, 400))),
    Input(DICOM, "signed values", looks(dicom(SIGNED, x00281050="0", x00281051="2000"), window(SIGNED, 0, 2000))),
    Input(DICOM, "a window of the kind SIGMOID", looks(dicom(
        TWELVE, x00281050="1600", x00281051="1000", x00281056="SIGMOID"), 255 / (1 + np.exp(-4 * (TWELVE - 1600.0) / 1000)))),
    Input(DICOM, "colours", looks(dicom(COLOURS, "RGB", 8), COLOURS)),
    Input(DICOM, "a table in place of a window", looks(dicom(TWELVE, x00283010=TABLE), G), True,
          ("a.dcm has a VOI LUT Sequence", "PNG")),
    Input(DICOM, "a table in place of a window, behind long private values", looks(dicom(TWELVE, **FAR), G), True,
          ("a.dcm has a VOI LUT Sequence",)),
    Input(DICOM, "a table beside a window, which counts", looks(dicom(
        TWELVE, x00283010=TABLE, x00281050="1600", x00281051="1000"), window(TWELVE, 1600, 1000))),
    Input(DICOM, "a table in place of slope and intercept", looks(dicom(
        TWELVE, x00283000=TABLE, x00281050="1600", x00281051="1000"), G), True, ("a.dcm has a Modality LUT Sequence",)),
    Input(DICOM, "a negative slope", looks(dicom(TWELVE, x00281050="-1600", x00281051="1000", x00281052="0", x00281053="-1"),
                                           window(-TWELVE.astype(float), -1600, 1000))),
    Input(DICOM, "MONOCHROME1 with slope and window", looks(dicom(
        TWELVE, "MONOCHROME1", x00281050="40", x00281051="400", x00281052="-1024", x00281053="0.5"),
        255 - window(TWELVE * 0.5 - 1024, 40, 400))),
    Input(DICOM, "a window of the kind LINEAR_EXACT", looks(dicom(
        TWELVE, x00281050="1600", x00281051="1000", x00281056="LINEAR_EXACT"), 255 * np.clip((TWELVE - 1600.0) / 1000 + 0.5, 0, 1))),
    Input(DICOM, "10 bits without a window: 0 to 1023", looks(dicom(TWELVE // 4, bits=10), (TWELVE // 4) / 1023 * 255)),
    Input(DICOM, "16 bits without a window: 0 to 65535", looks(dicom(TWELVE * 16, bits=16), TWELVE.astype(float) * 16 / 65535 * 255)),
    Input(DICOM, "16 bits without a window, 12 in use", looks(dicom(TWELVE, bits=16), G), True,
          ("a.dcm has no window, and values from", "PNG")),
    Input(DICOM, "the slope 0", looks(dicom(TWELVE, x00281052="5", x00281053="0"), G), True, ("a.dcm has the rescale slope 0",)),
    Input(DICOM, "colours of 16 bits", looks(dicom(WIDE * 257, "RGB", 16), COLOURS), True, ("a.dcm has colours of uint16",)),
    Input(DICOM, "YBR_FULL", looks(dicom(np.asarray(RGB.convert("YCbCr")), "YBR_FULL", 8), COLOURS, 3)),
    Input(DICOM, "two frames", looks(dicom(G, bits=8, frames=2), G), True, ("a.dcm has 2 frames",)),
    Input(DICOM, "a window of no width", looks(dicom(TWELVE, x00281050="1600", x00281051="0"), G), True, ("means nothing",)),
]  # fmt: skip
