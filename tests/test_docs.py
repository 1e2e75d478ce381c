"""The documentation keeps its word: links and paths exist, examples run, commands and tables fit configs and code."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from monai_petl import Method, summary
from monai_petl.bundle import network_of_config, root_cause
from monai_petl.cli import Command
from monai_petl.cli.verbs import VERBS
from monai_petl.compare import compare
from monai_petl.compare.plan import parse_budget, parse_methods, parse_shots
from monai_petl.methods import METHODS, PUNET_METHODS, adapt_punet
from monai_petl.networks import FPT_VARIANTS, PUNet

ROOT = Path(__file__).resolve().parent.parent
BUNDLES = sorted(path.parent for path in ROOT.glob("bundles/*/configs"))
CARDS = {bundle / "docs" / "README.md": bundle for bundle in BUNDLES}
BUNDLE = ROOT / "bundles" / "punet_ct_segmentation"
CARD = BUNDLE / "docs" / "README.md"
INFLATED = ROOT / "bundles" / "inflated_vit_segmentation"
PUNET_PAGE = ROOT / "docs" / "methods" / "punet.md"
INFLATION_PAGE = ROOT / "docs" / "methods" / "inflation.md"
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("bundles/*/docs/*.md"),
    *ROOT.glob("benchmarks/*.md"),
]
GENERATED = ("docs/figures/demo.png", "docs/results.md", "benchmarks/README.md")  # made by runs; may be absent
TEXTS = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS if path.is_file()}
NEEDS_FILES = ("docs/data.md",)  # its example reads images of the reader's
EXAMPLES = [path for path, text in TEXTS.items() if "```python" in text and not str(path).endswith(NEEDS_FILES)]


def _folder(path: Path) -> Path:
    """Where the commands of a document run: a card's in its bundle, a method's page's in the first bundle it links to."""
    linked = re.search(r"bundles/(\w+)", TEXTS[path])
    return CARDS.get(path) or (ROOT / "bundles" / linked[1] if path.parent.name == "methods" and linked else ROOT)


RUNS_IN = {path: _folder(path) for path in TEXTS}
PLACES = ("monai_petl/", "bundles/", "docs/", "tests/", "benchmarks/", "configs/")
RUN_ARGUMENTS = {"config_file", "meta_file", "logging_file", "args_file", "run_id", "init_id", "final_id", "tracking"}
EXPORT_ARGUMENTS = {"net_id", "filepath", "ckpt_file", "meta_file", "config_file", "use_trace", "input_shape"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(params=DOCUMENTS, ids=name_of)
def document(request: pytest.FixtureRequest) -> Path:
    return request.param


def prose(document: Path) -> str:
    """The text without fenced blocks."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [text for name, text in fenced if name == language]


def is_there(path: Path) -> bool:
    return path.exists() or (path.is_relative_to(ROOT) and name_of(path) in GENERATED)


# links and names


def test_every_relative_link_leads_somewhere(document):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(document))
    for target in links:
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert is_there(path), f"{name_of(document)}: {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{name_of(document)}: {target}"


def anchors(document: Path) -> set[str]:
    """Anchors of the headings, as repository sites and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(document), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_path_in_the_text_exists(document):
    for code in re.findall(r"`([^`\n]+)`", prose(document)):
        if not code.startswith(PLACES) or not re.fullmatch(r"[\w./-]+", code):
            continue
        places = (ROOT, document.parent, *BUNDLES)
        assert any(is_there((place / code).resolve()) for place in places), f"{name_of(document)}: {code}"


def test_every_name_of_the_package_in_the_text_exists(document):
    for code in re.findall(r"`(monai_petl(?:\.\w+)+)`", prose(document)):
        module, _, attribute = code.rpartition(".")
        found = hasattr(importlib.import_module(module), attribute)
        assert found or importlib.util.find_spec(code), f"{name_of(document)}: {code}"


def test_every_test_in_the_text_exists(document):
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", prose(document)):
        assert f"def {name}(" in sources, f"{name_of(document)}: {name}"


# examples


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_python_examples_run(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Method, "registry", dict(Method.registry))
    source = blocks(example, "python")
    assert source
    Path("example.py").write_text("\n".join(source), encoding="utf-8")
    runpy.run_path("example.py", run_name="example")


# commands


def commands() -> Iterator[tuple[str, Path, list[str]]]:
    """Every command of the package or of a bundle: document, folder in which it is run, words after the module."""
    for document, folder in RUNS_IN.items():
        for block in blocks(document, ""):
            for line in block.replace("\\\n", " ").splitlines():
                match = re.search(r"-m (monai\.bundle|monai_petl) .*", line)
                if match:
                    yield name_of(document), folder, shlex.split(match[0])[1:]


COMMANDS = list(commands())


def of(module: str, verb: str) -> list[tuple[str, Path, list[str]]]:
    return [(d, f, words) for d, f, words in COMMANDS if words[:2] == [module, verb]]


def options(words: list[str]) -> dict[str, str]:
    names = [word.removeprefix("--") for word in words[2:] if word.startswith("--")]
    values = {words[i].removeprefix("--"): words[i + 1] for i in range(len(words) - 1) if words[i].startswith("--")}
    return {name: values.get(name, "") for name in names}


def config_of(folder: Path, value: str) -> dict[str, object]:
    files = [part.strip("[]' ") for part in value.split(",")]
    merged: dict[str, object] = {}
    for file in files:
        merged |= json.loads((folder / file).read_text(encoding="utf-8"))
    return merged


def test_documents_show_all_workflows():
    verbs = {tuple(words[:2]) for _, _, words in COMMANDS}
    assert ("monai.bundle", "run") in verbs
    assert ("monai_petl", "adapter") in verbs
    for card, bundle in CARDS.items():
        used = " ".join(" ".join(words) for document, _, words in COMMANDS if document == name_of(card))
        for config in bundle.glob("configs/*.json"):
            assert config.name in used, config


@pytest.mark.parametrize(("document_name", "folder", "words"), of("monai.bundle", "run"))
def test_bundle_commands_name_files_and_ids_that_exist(document_name, folder, words):
    given = options(words)
    config = config_of(folder, given["config_file"])
    for name in given.keys() - RUN_ARGUMENTS:
        assert name in config, f"{document_name}: {' '.join(words)}: no id {name!r}"
    if "bundle_root" in given:
        assert (folder / given["bundle_root"]).resolve() in BUNDLES


@pytest.mark.parametrize(("document_name", "folder", "words"), of("monai.bundle", "ckpt_export"))
def test_export_commands_name_files_and_ids_that_exist(document_name, folder, words):
    given = options(words)
    assert given.keys() <= EXPORT_ARGUMENTS, document_name
    assert given["net_id"] in config_of(folder, given["config_file"])
    assert (folder / given["meta_file"]).is_file()


@pytest.mark.parametrize(
    ("document_name", "folder", "words"), [entry for entry in COMMANDS if entry[2][0] == "monai_petl"]
)
def test_package_commands_have_verbs_and_options_that_exist(document_name, folder, words):
    given = options(words)
    found, *rest = VERBS, *words[1:]
    while not isinstance(found, Command):
        found = found[rest.pop(0)]
    parameters = found.parameters()
    known = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    if words[1] == "backbone":
        known |= {"in_channels", "out_channels"}  # arguments of the network
    elif len(known) < len(parameters):
        known |= config_of(folder, f"{words[2]}/configs/train.json").keys()
    assert given.keys() <= known, document_name
    if words[1] == "compare":
        assert parse_shots(given["shots"])
        assert parse_budget(given["budget"])
        assert set(parse_methods(given["methods"])) <= METHODS.keys()


# tables


def rows(document: Path, heading: str) -> list[list[str]]:
    """Cells of the tables under a heading, up to the next one of the same or a higher level."""
    level = heading.split(" ")[0]
    text = document.read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1]
    text = re.split(rf"^#{{1,{len(level)}}} ", text, maxsplit=1, flags=re.M)[0]
    lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line] for line in lines]


CONFIGS = [
    (card, config)
    for card, bundle in CARDS.items()
    for config in ("train.json", "pretrain.json", "evaluate.json", "inference.json")
    if (bundle / "configs" / config).is_file()
]


@pytest.mark.parametrize(
    ("card", "config"), CONFIGS, ids=lambda value: value if isinstance(value, str) else name_of(value)
)
def test_tables_of_options_show_the_ids_and_defaults_of_the_configs(card, config):
    written = json.loads((CARDS[card] / "configs" / config).read_text(encoding="utf-8"))
    table = rows(card, f"### `configs/{config}`")
    assert table
    for name, default, _ in table:
        assert name.strip("`") in written, f"{config} has no id {name}"
        assert json.loads(default.strip("`")) == written[name.strip("`")], f"{config}: default of {name}"


def test_pretraining_has_the_ids_that_the_model_card_says_it_shares_with_training():
    pretraining = json.loads((BUNDLE / "configs" / "pretrain.json").read_text(encoding="utf-8"))
    section = CARD.read_text(encoding="utf-8").split("### `configs/pretrain.json`\n")[1]
    missing = set(re.findall(r"`(\w+)`", section.split("New or different")[0]))
    different = {row[0] for row in rows(CARD, "### `configs/pretrain.json`")}
    for name, default, _ in rows(CARD, "### `configs/train.json`"):
        if name.strip("`") in missing:
            assert name.strip("`") not in pretraining
        elif name not in different:
            assert json.loads(default.strip("`")) == pretraining[name.strip("`")], name


def test_the_table_of_methods_is_complete_and_its_counts_are_right():
    table = {row[0].strip("`"): row for row in rows(CARD, "## Network and method")}
    assert list(table) == list(PUNET_METHODS)
    for method, row in table.items():
        trained = summary(adapt_punet(PUNet(classes=("liver",)), method, "kidney")).trainable
        assert row[2] == f"{trained:,}", method


WINDOWS = {"aim": "refused: it wants 2D slices", "ept": "refused: it wants tokens that all attend to each other"}
NOT_LISTED = {  # methods of the library that a card leaves out, with the reason
    "lora_swin_unetr_segmentation": WINDOWS,
    "vpetl_swin_unetr_segmentation": WINDOWS,
    "inflated_vit_segmentation": {"aim": WINDOWS["aim"], "ept": "it wants a learning rate of its own"},
    "san_vit_segmentation": {
        "aim": WINDOWS["aim"],
        "vpt": "refused: beside relative positions tokens have no place",
        "ept": "refused: as vpt",
    },
    "aim_vit_segmentation": {"ept": "it wants a learning rate of its own"},
    "ept_vit_classification": {"aim": "images are no slices of a volume"},
    "lora_vit_classification": {
        "aim": "images are no slices of a volume",
        "ept": "it wants a learning rate of its own; another bundle has it",
    },
}


@pytest.mark.parametrize(
    "card",
    [card for card, text in TEXTS.items() if "| id `method` |" in text and "punet" not in str(card)],
    ids=name_of,
)
def test_counts_in_the_table_of_methods_are_right(card):
    table = {row[0].strip("`"): row for row in rows(card, "## Network and method")}
    bundle = CARDS[card].name
    wanted = FPT_VARIANTS if bundle.startswith("fpt") else METHODS.keys() - NOT_LISTED.get(bundle, {}).keys()
    assert set(table) == set(wanted)
    for method, reason in NOT_LISTED.get(bundle, {}).items():
        if reason.startswith("refused"):
            with pytest.raises((RuntimeError, TypeError)) as error:
                network_of_config(CARDS[card], method=method)
            assert isinstance(root_cause(error.value), TypeError)
    for method, row in table.items():
        assert row[2] == f"{trained_values(CARDS[card], method):,}", method


def trained_values(bundle: Path, method: str) -> int:
    """Counted without values, where the network can be built so."""
    try:
        with torch.device("meta"):
            return summary(network_of_config(bundle, method=method)).trainable
    except RuntimeError:
        return summary(network_of_config(bundle, method=method)).trainable


def test_the_page_of_punet_has_the_counts_of_its_blocks():
    body = PUNet().body
    for name, _, count in rows(PUNET_PAGE, "## Shapes"):
        block = name.strip("`")
        assert count == f"{sum(p.numel() for p in body.level(block).parameters()):,}", block


def test_the_page_of_compare_has_all_its_options():
    shown = re.findall(
        r"`--(\w+)`", (ROOT / "docs" / "compare.md").read_text(encoding="utf-8").split("## What is equal")[0]
    )
    own = [name for name in inspect.signature(compare).parameters if name not in ("bundle", "settings")]
    assert set(own) <= set(shown)
