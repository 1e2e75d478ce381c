"""One HTML file to look at: what was learnt, from how much, at what cost."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from matplotlib.figure import Figure

from monai_petl.data import class_names
from monai_petl.demo.checks import read_segmentation
from monai_petl.demo.figures import dice_figure, learning_curves, overlay_figure
from monai_petl.files.atomic import write_text, written_whole

__all__ = ["write_report"]

STYLE = """
body{font:15px/1.55 system-ui,sans-serif;color:#1f2933;background:#f6f8fa;margin:0}
main{max-width:1000px;margin:0 auto;padding:32px 20px 60px}
h1{font-size:28px;margin:0 0 4px}h2{font-size:19px;margin:36px 0 10px}p.lead{color:#52606d;margin:0 0 22px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:14px}
.card{background:#fff;border:1px solid #dde3ea;border-radius:10px;padding:14px 16px}
.card b{display:block;font-size:24px}.card span{color:#52606d;font-size:13px}
.panel{background:#fff;border:1px solid #dde3ea;border-radius:10px;padding:14px;text-align:center}
img{max-width:100%}table{border-collapse:collapse;width:100%;background:#fff}
th,td{border-bottom:1px solid #e4e9ef;padding:7px 10px;text-align:right}th:first-child,td:first-child{text-align:left}
pre{background:#1f2933;color:#e4e9ef;border-radius:8px;padding:12px;overflow-x:auto;font-size:12px;white-space:pre-wrap}
"""


def write_report(
    root: Path,
    folder: Path,
    summary: Mapping[str, Any],
    cases: Sequence[Mapping[str, str]],
    commands: Mapping[str, str],
) -> Path:
    """Write ``report.html`` and its pictures (``overlays.png`` and others) into ``root``.

    Args:
        root: the demo's folder, with the segmentations.
        folder: the data set.
        summary: what :func:`monai_petl.demo.demo` measured.
        cases: test cases with ``image`` and ``label``.
        commands: step -> the command that it ran.
    """
    classes = [*summary["base_classes"], summary["new_class"]]
    ids, shown = class_names(folder), cases[:3]
    maps = []
    for case in shown:
        label = _canonical(case["label"])
        reference = sum(((label == ids[name]) * k for k, name in enumerate(classes, 1)), np.zeros_like(label))
        found = _canonical_map(root / "segmentations", case["image"])
        maps.append([reference, found])
    runs = root / "bundle" / "eval"
    folders = {
        "pre-training on the base classes": runs / "pretrain" / "tensorboard",
        f"{summary['new_class']}: prompt tuning": runs / "prompt" / "tensorboard",
    }
    titles = ["reference", "prompt tuning"]
    pictures = {
        "overlays": overlay_figure(shown, maps, titles, classes),
        "dice": dice_figure({"prompt tuning": summary["dice"]}),
        "curves": learning_curves(folders),
    }
    images = {name: _save(figure, root / f"{name}.png") for name, figure in pictures.items()}
    report = root / "report.html"
    write_text(report, _page(summary, classes, images, commands), "the report")
    return report


def _page(
    summary: Mapping[str, Any], classes: list[str], images: Mapping[str, str], commands: Mapping[str, str]
) -> str:
    new, trained, size = html.escape(summary["new_class"]), summary["trained"], summary["bytes"]
    dice = summary["dice"][summary["new_class"]]
    moved = "identical, bit for bit" if summary["base_classes_unchanged"] else "CHANGED"
    cards = [
        (f"{dice:.2f}", f"Dice of {new}"),
        (
            f"{trained:,}",
            f"values trained: {100 * trained / summary['body']:.2f} % of the backbone",
        ),
        (f"{size / 1e3:.0f} kB", f"file that holds {new}"),
        (moved, f"logits of {', '.join(map(html.escape, classes[:-1]))} after learning {new}"),
        (f"{summary['labelled']}", f"labelled volumes of {new}"),
        (f"{sum(summary['seconds'].values()):.0f} s", "all steps together"),
    ]
    rows = "".join(f"<tr><td>{html.escape(n)}</td><td>{summary['dice'][n]:.3f}</td></tr>" for n in classes)
    steps = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{s:.1f} s</td></tr>" for name, s in summary["seconds"].items()
    )
    runs = "".join(f"<p>{html.escape(name)}</p><pre>{html.escape(text)}</pre>" for name, text in commands.items())
    panels = {
        name: f'<div class="panel"><img alt="{name}" src="data:image/png;base64,{data}"></div>'
        for name, data in images.items()
    }
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>A new organ from a few volumes</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>
<h1>A new class, {new}, from {summary["labelled"]} labelled volumes</h1>
<p class="lead">A network was pre-trained on {", ".join(map(html.escape, classes[:-1]))} and frozen; then only the prompt
tokens of {new} were trained.</p>
<div class="cards">{"".join(f'<div class="card"><b>{value}</b><span>{text}</span></div>' for value, text in cards)}</div>
<h2>Held-out volumes</h2>{panels["overlays"]}
<h2>Dice of every class</h2>{panels["dice"]}
<table><tr><th>class</th><th>Dice</th></tr>{rows}</table>
<h2>Other methods</h2>
<p><a href="comparison/report.html">Prompt tuning, LoRA, an output convolution alone and full
fine-tuning</a> side by side: quality, memory, time, files.</p>
<h2>Learning curves</h2>{panels["curves"]}
<h2>Time</h2><table><tr><th>step</th><th></th></tr>{steps}</table>
<h2>The commands</h2>{runs}</main></body></html>
"""


def _save(figure: Figure, path: Path) -> str:
    """Write the picture and return it in base64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    with written_whole(path, "the picture") as part:
        part.write_bytes(buffer.getvalue())
    return base64.b64encode(buffer.getvalue()).decode()


def _canonical(path: str) -> np.ndarray:
    return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj).astype(np.uint8)


def _canonical_map(folder: Path, image: str) -> np.ndarray:
    read_segmentation(folder, image)  # raises where inference wrote nothing
    name = Path(image).name.removesuffix(".gz").removesuffix(".nii")
    return _canonical(str(folder / f"{name}_seg.nii.gz"))
