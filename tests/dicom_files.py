"""Single pictures in DICOM that tests write byte by byte, so that no library decides what is in them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

LONG = ("OB", "OW", "SQ", "UN")


def write_dicom_picture(
    path: Path,
    values: np.ndarray,
    photometric: str = "MONOCHROME2",
    bits: int = 8,
    frames: int = 1,
    **tags: str | bytes,
) -> Path:
    """A picture (H, W) or (H, W, 3) in explicit little endian; ``tags`` such as ``x00281050="100"`` go between."""
    colours = 3 if values.ndim == 3 else 1
    elements: dict[int, tuple[str, bytes]] = {
        0x00080016: ("UI", b"1.2.840.10008.5.1.4.1.1.1.1"),
        0x00080018: ("UI", b"1.2.3.4"),
        0x00080060: ("CS", b"DX"),
        0x00280002: ("US", struct.pack("<H", colours)),
        0x00280004: ("CS", photometric.encode()),
        0x00280010: ("US", struct.pack("<H", values.shape[0])),
        0x00280011: ("US", struct.pack("<H", values.shape[1])),
        0x00280100: ("US", struct.pack("<H", 8 * values.itemsize)),
        0x00280101: ("US", struct.pack("<H", bits)),
        0x00280102: ("US", struct.pack("<H", bits - 1)),
        0x00280103: ("US", struct.pack("<H", int(values.dtype.kind == "i"))),
        0x7FE00010: ("OW" if values.itemsize > 1 else "OB", values.tobytes() * frames),
    }
    if colours == 3:
        elements[0x00280006] = ("US", struct.pack("<H", 0))
    if frames > 1:
        elements[0x00280008] = ("IS", str(frames).encode())
    for name, value in tags.items():
        tag = int(name.removeprefix("x"), 16)
        private = (tag >> 16) % 2 == 1
        kind = "OB" if private else "SQ" if isinstance(value, bytes) else "CS" if tag == 0x00281056 else "DS"
        elements[tag] = (kind, value if isinstance(value, bytes) else value.encode())
    meta = _element(0x00020010, "UI", b"1.2.840.10008.1.2.1")
    meta = _element(0x00020002, "UI", b"1.2.840.10008.5.1.4.1.1.1.1") + _element(0x00020003, "UI", b"1.2.3.4") + meta
    body = b"".join(_element(tag, *elements[tag]) for tag in sorted(elements))
    path.write_bytes(b"\0" * 128 + b"DICM" + _element(0x00020000, "UL", struct.pack("<I", len(meta))) + meta + body)
    return path


def _element(tag: int, kind: str, value: bytes) -> bytes:
    if len(value) % 2:
        value += b"\0" if kind in ("UI", "OB") else b" "
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + kind.encode()
    return head + (struct.pack("<HI", 0, len(value)) if kind in LONG else struct.pack("<H", len(value))) + value
