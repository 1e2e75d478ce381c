"""The counts that the pages on V-PETL and on the baselines show, on networks of full size without memory for their values."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from monai.networks import nets
from torch import nn

from monai_petl import Method, adapt, methods, remove_adapter, summary
from monai_petl.methods import VPETL, FFNAdapter

PAGES = Path(__file__).resolve().parents[2] / "docs" / "methods"
CODE = re.compile(r"`([^`]+)`")


def tables(page: str) -> list[list[list[str]]]:
    """The cells of a page's tables, head first."""
    lines = (PAGES / page).read_text(encoding="utf-8").splitlines()
    found: list[list[list[str]]] = []
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip("| ").split(" | ")])
    return found


NETWORKS = {
    name: (CODE.search(code)[1], total)
    for table in tables("baselines.md")
    if table[0][:2] == ["network", "in MONAI"]
    for name, code, total in table[2:]
}
COUNTS = [
    (network, CODE.search(row[0])[1], row[1 + place])
    for page in ("baselines.md", "vpetl.md")
    for table in tables(page)
    if table[0][:2] == ["method", next(iter(NETWORKS))]
    for row in table[2:]
    for place, network in enumerate(NETWORKS)
]
PUBLISHED = [  # network, PATT with bottlenecks of 64 and 128, FFN adapters of 64; all projections with biases
    ("SwinUNETR 24", 140_192, 278_944, 93_392),
    ("SwinUNETR 48", 279_872, 556_864, 186_272),
    ("UNETR", 1_788_672, 3_558_912, 1_189_632),
]


@pytest.fixture(scope="module")
def network_called() -> Callable[[str], nn.Module]:
    @functools.cache
    def build(name: str) -> nn.Module:
        # MONAI reads numbers off one small tensor, which must have some
        with torch.device("meta"), patch("torch.linspace", functools.partial(torch.linspace, device="cpu")):
            return eval(NETWORKS[name][0], vars(nets))

    return build


def counted(network: nn.Module, method: Method) -> int:
    with torch.device("meta"):
        trained = summary(adapt(network, method)).trainable
    remove_adapter(network)
    return trained


@pytest.mark.parametrize("name", NETWORKS)
def test_the_pages_show_the_sizes_of_the_networks(network_called, name):
    assert f"{summary(network_called(name)).total:,}" == NETWORKS[name][1]


@pytest.mark.parametrize(("name", "method", "count"), COUNTS)
def test_the_pages_show_what_each_method_trains(network_called, name, method, count):
    assert f"{counted(network_called(name), eval(method, vars(methods))):,}" == count


def test_the_pages_show_all_baselines():
    shown = {method.partition("(")[0] for _, method, _ in COUNTS}
    page = (PAGES / "baselines.md").read_text(encoding="utf-8")
    sections = {heading for heading in re.findall(r"^## (\w+)$", page, flags=re.M) if hasattr(methods, heading)}
    assert sections == shown - {"LoRA", "VPETL"}
    assert len(COUNTS) > 4 * len(sections)


@pytest.mark.parametrize(("name", "patt_64", "patt_128", "ffn_64"), PUBLISHED)
def test_the_sizes_of_the_published_options_on_networks_of_monai(network_called, name, patt_64, patt_128, ffn_64):
    network = network_called(name)
    assert counted(network, VPETL(bottleneck=64, ffn_bottleneck=None, bias=True)) == patt_64
    assert counted(network, VPETL(bottleneck=128, ffn_bottleneck=None, bias=True)) == patt_128
    assert counted(network, FFNAdapter(64)) == ffn_64
