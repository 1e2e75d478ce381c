"""LoRA adapters as files of the peft library: nothing is lost on the way, and peft computes the same where it is installed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import UNETR, SwinUNETR, ViT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from monai_petl import (
    AdapterFileError,
    activate,
    adapt,
    inspect_adapter,
    load_adapter,
    merge,
    remove_adapter,
    save_adapter,
    summary,
    trainable_parameters,
)
from monai_petl.core.deltas import deltas_of
from monai_petl.methods import VPT, LoRA, export_peft, import_peft
from tests.conftest import differing, frozen, state_of

pytestmark = pytest.mark.filterwarnings("ignore:the rank saves nothing")

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SMALL_VIT = {"hidden_size": 24, "mlp_dim": 48, "num_heads": 2}


class Small(nn.Module):
    """Layers of several kinds, two of which have names that end alike, and names of roles."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 6, 3, padding=1, stride=2)
        self.inner = nn.ModuleDict({"conv": nn.Conv3d(6, 12, (1, 1, 3), bias=False), "plain": nn.Conv3d(12, 12, 1)})
        self.linear = nn.Linear(12, 10)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner["plain"](self.inner["conv"](self.conv(x)))
        return self.head(self.linear(y.mean((2, 3, 4))))


def vit() -> ViT:
    return ViT(1, (16, 16), (8, 8), num_layers=2, spatial_dims=2, **SMALL_VIT)


def unetr() -> UNETR:
    return UNETR(1, 2, (16, 16, 16), feature_size=4, **SMALL_VIT)


def swin() -> SwinUNETR:
    return SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))


SHAPES = {Small: (2, 2, 8, 8, 8), vit: (2, 1, 16, 16), unetr: (1, 1, 16, 16, 16), swin: (1, 1, 64, 32, 32)}
CASES: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
    (vit, {"rank": 3}),
    (vit, {"rank": 4, "targets": ["v", "proj"], "alpha": 7}),
    (vit, {"rank": 3, "rslora": True, "dropout": 0.1}),
    (vit, {"rank": 3, "shared_a": True}),
    (vit, {"rank": 3, "dora": True}),
    (
        vit,
        {"targets": ["all-linear", "patch_embedding"], "rank_pattern": {"*mlp*": 2}, "alpha_pattern": {"*.0.*": 3.5}},
    ),
    (unetr, {"rank": 2, "targets": ["q", "k", "mlp", "decoder2.*"], "exclude": ["*transp_conv*"]}),
    (swin, {"rank": 2, "targets": ["q", "v", "merging", "patch_embedding", "conv"], "exclude": ["out"]}),
    (Small, {"rank": 2, "targets": ["[c]onv", "inner.*", "head.1"]}),
    (Small, {"rank": 2, "targets": ["[c]onv", "linear"], "dora": True}),
]
IDS = [f"{make.__name__}-{'-'.join(k for k in options if k != 'rank') or 'plain'}" for make, options in CASES]


def image_for(make: Callable) -> Tensor:
    shape = SHAPES[make]
    return torch.linspace(-9, 9, torch.Size(shape).numel()).view(shape).sin()


def output(network: nn.Module, x: Tensor) -> Tensor:
    with frozen(network):
        y = network.eval()(x)
    return y[0] if isinstance(y, tuple) else y


def error_of(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def shaken(network: nn.Module) -> nn.Module:
    for parameter in trainable_parameters(network):
        nn.init.normal_(parameter, std=0.2)
    return network


def exported(folder: Path, backbone: nn.Module | None = None, **options: Any) -> nn.Module:
    """A ViT with random factors, and its files."""
    network = shaken(adapt(copy.deepcopy(backbone or vit()), LoRA(**{"rank": 3, **options})))
    export_peft(network, folder)
    return network


def rewrite(folder: Path, config: Callable = id, tensors: Callable = id) -> None:
    """Change the files in place."""
    values, settings = load_file(folder / TENSORS), json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors(values)
    config(settings)
    save_file(values, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps(settings), encoding="utf-8")


# round trips


@pytest.mark.parametrize(("make", "options"), CASES, ids=IDS)
def test_an_exported_adapter_computes_the_same_when_imported(make, options, tmp_path):
    backbone, image = make().eval(), image_for(make)
    network = shaken(adapt(copy.deepcopy(backbone), LoRA(**options)))
    assert export_peft(network, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [CONFIG, TENSORS]
    assert import_peft(backbone, tmp_path / "new" / "folder") is backbone
    assert error_of(output(backbone, image), output(network, image)) < 1e-6
    assert len(deltas_of(backbone)) == len(deltas_of(network))
    export_peft(backbone, tmp_path / "again")
    first, second = load_file(tmp_path / "new" / "folder" / TENSORS), load_file(tmp_path / "again" / TENSORS)
    assert list(first) == list(second)
    assert differing(first, second) == set()
    config, other = [json.loads((tmp_path / f / CONFIG).read_text(encoding="utf-8")) for f in ("new/folder", "again")]
    assert config == other


def test_the_files_have_the_names_and_numbers_of_peft(tmp_path):
    network = exported(tmp_path, rank=3, alpha=6, targets=["q", "v", "blocks.1.mlp.linear1"])
    tensors = load_file(tmp_path / TENSORS)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layer = "base_model.model.blocks.1.mlp.linear1"
    assert shapes[f"{layer}.lora_A.weight"] == (3, 24)
    assert shapes[f"{layer}.lora_B.weight"] == (48, 3)
    layer = "base_model.model.blocks.0.attn.qkv"
    assert shapes[f"{layer}.lora_A.weight"] == (6, 24)
    assert shapes[f"{layer}.lora_B.weight"] == (72, 6)
    b = tensors[f"{layer}.lora_B.weight"]
    own = network.blocks[0].attn.qkv.deltas["lora_default"].B
    assert torch.equal(b[:24, :3], own[0])
    assert torch.equal(b[48:, 3:], own[1])
    assert b.count_nonzero() == own.count_nonzero()
    config = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 6, 12, "none")
    assert config["rank_pattern"] == {"^blocks.1.mlp.linear1": 3}
    assert config["alpha_pattern"] == {"^blocks.1.mlp.linear1": 6}
    assert config["target_modules"].count("|") == 2


def test_an_imported_adapter_is_frozen_unless_it_is_to_be_trained_further(tmp_path):
    backbone = vit()
    exported(tmp_path, backbone)
    first, second = copy.deepcopy(backbone), copy.deepcopy(backbone)
    import_peft(first, tmp_path)
    assert not any(p.requires_grad for p in first.parameters())
    import_peft(second, tmp_path, trainable=True)
    assert {n.split(".deltas.")[1] for n, p in second.named_parameters() if p.requires_grad} == {
        "lora_default.A.weight",
        "lora_default.B.weight",
    }


def test_an_imported_adapter_is_like_any_other(tmp_path):
    backbone, image = vit().eval(), image_for(vit)
    plain = output(backbone, image)
    network = exported(tmp_path, backbone)
    wanted = output(network, image)
    import_peft(backbone, tmp_path, name="second")
    path = save_adapter(backbone, tmp_path / "own.safetensors")
    assert inspect_adapter(path)["methods"][0]["shared_a"]
    remove_adapter(backbone)
    assert torch.equal(output(backbone, image), plain)
    load_adapter(backbone, path)
    assert error_of(output(backbone, image), wanted) < 1e-6
    assert error_of(output(merge(backbone), image), wanted) < 1e-5


def test_other_adapters_stay(tmp_path):
    backbone, image = vit().eval(), image_for(vit)
    wanted = output(exported(tmp_path, backbone), image)
    shaken(adapt(backbone, LoRA(rank=2), name="first"))
    before = output(backbone, image)
    import_peft(backbone, tmp_path, "second")
    activate(backbone, "second")
    assert error_of(output(backbone, image), wanted) < 1e-6
    activate(backbone, "first")
    assert torch.equal(output(backbone, image), before)
    export_peft(backbone, tmp_path / "first", "first")
    assert load_file(tmp_path / "first" / TENSORS)["base_model.model.blocks.0.attn.qkv.lora_A.weight"].shape == (4, 24)


def test_alphas_follow_the_first_pattern_that_matches_the_end_of_a_name(tmp_path):
    backbone = vit()
    exported(tmp_path, backbone, targets=["mlp"], alpha=6)
    patterns = {
        "near1": 30,
        "linear1": 12,
        r"blocks\.0\.mlp\.linear[12]": 9,
        "^mlp.linear2": 3,
        "blocks.1.*.linear2": 1.5,
    }
    rewrite(tmp_path, lambda config: config.update(alpha_pattern=patterns))
    import_peft(backbone, tmp_path)
    scales = {
        n: d.scale for n, d in zip(("0.1", "0.2", "1.1", "1.2"), [d for _, d in deltas_of(backbone)], strict=True)
    }
    assert scales == {"0.1": 4.0, "0.2": 3.0, "1.1": 4.0, "1.2": 0.5}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_another_precision_are_converted(dtype, tmp_path):
    backbone = vit()
    exported(tmp_path, backbone)
    rewrite(tmp_path, tensors=lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    import_peft(backbone, tmp_path)
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


def test_a_failed_export_leaves_the_old_files_and_nothing_else(tmp_path, monkeypatch):
    exported(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("monai_petl.methods.parts.peft_files.json.dumps", fail)
        with pytest.raises(OSError, match="the disk is full"):
            exported(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    exported(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == before.keys()
    assert (tmp_path / TENSORS).read_bytes() != before[TENSORS]


# refusals


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.ConvTranspose3d(6, 8, 2, 2), "a transposed convolution"),
        (nn.Conv3d(6, 8, 3, groups=2), "a convolution in 2 groups"),
        (nn.Conv3d(6, 8, 3, dilation=2), "a dilated convolution"),
        (nn.Conv3d(6, 8, 3, padding=1, padding_mode="replicate"), "a convolution with replicate padding"),
    ],
)
def test_layers_that_peft_computes_otherwise_are_refused_in_both_directions(layer, reason, tmp_path):
    network = nn.ModuleDict({"up": layer})
    adapt(network, LoRA(rank=2, targets=["up"]))
    with pytest.raises(ValueError, match=rf"up is {reason}, for which peft has no .* LoRA\(exclude=\['up'\]\)"):
        export_peft(network, tmp_path)
    assert not list(tmp_path.iterdir())
    other = adapt(nn.ModuleDict({"up": nn.Conv3d(6, 8, 3)}), LoRA(rank=2))
    export_peft(other, tmp_path)
    remove_adapter(network)
    with pytest.raises(AdapterFileError, match=f"up is {reason} here"):
        import_peft(network, tmp_path)


@pytest.mark.parametrize(
    ("method", "also_train", "reason"),
    [
        ([LoRA(rank=2), VPT()], [], "trains VPT too, and a peft file holds low-rank factors alone. save_adapter"),
        ([LoRA(rank=2)], ["norm"], "trains norm.weight too"),
        ([LoRA(rank=2, targets=["proj"], bias="lora_only")], [], "trains blocks.0.attn.out_proj.bias too"),
        ([], ["norm"], "trains norm.weight too"),
        ([LoRA(rank=2), LoRA(rank=2, dora=True, targets=["mlp"])], [], "has DoRA on some layers only"),
    ],
)
def test_what_peft_cannot_hold_is_refused(method, also_train, reason, tmp_path):
    network = adapt(vit(), method, also_train)
    with pytest.raises(ValueError, match=reason):
        export_peft(network, tmp_path)
    assert not list(tmp_path.iterdir())


def test_merged_absent_and_disabled_adapters_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has not got any adapter"):
        export_peft(vit(), tmp_path)
    network = merge(adapt(vit(), LoRA(rank=2)))
    with pytest.raises(ValueError, match=r"'default' is merged; call unmerge\(network, 'default'\) before exporting"):
        export_peft(network, tmp_path)
    with pytest.raises(
        ValueError, match=r"'default' is switched off; call activate\(network, 'default'\) before exporting"
    ):
        export_peft(activate(network), tmp_path)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "no adapter of peft: .*adapter_config.json is missing"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "adapter_model.safetensors is missing .*pickle"),
    "truncated": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-8]), "is damaged.*export it again"),
    "text": (lambda f: (f / CONFIG).write_text("r = 8", encoding="utf-8"), "adapter_config.json is damaged"),
    "list": (lambda f: (f / CONFIG).write_text("[8]", encoding="utf-8"), "adapter_config.json is damaged"),
    "method": (lambda f: rewrite(f, lambda c: c.update(peft_type="IA3")), "is of the method IA3; only LORA is read"),
    "no alpha": (lambda f: rewrite(f, lambda c: c.pop("lora_alpha")), "damaged .KeyError: 'lora_alpha'"),
    "bad alpha": (lambda f: rewrite(f, lambda c: c.update(lora_alpha="x")), "damaged .ValueError"),
    "deep": (lambda f: (f / CONFIG).write_text("[" * 100_000, encoding="utf-8"), "is nested too deeply"),
    "twice": (
        lambda f: (f / CONFIG).write_text('{"r": 1, "r": 2}', encoding="utf-8"),
        "the name 'r' stands there twice",
    ),
    "infinite alpha": (lambda f: rewrite(f, lambda c: c.update(lora_alpha=float("inf"))), "above 0 and finite"),
    "wrong dropout": (lambda f: rewrite(f, lambda c: c.update(lora_dropout=5)), "cannot be attached.*dropout must be"),
    "dropout of text": (lambda f: rewrite(f, lambda c: c.update(lora_dropout="x")), "cannot be attached to this ViT"),
    "nan": (
        lambda f: rewrite(f, tensors=lambda t: t.update({n: x * float("nan") for n, x in t.items()})),
        "does not hold finite numbers",
    ),
    "slow pattern": (
        lambda f: rewrite(f, lambda c: c.update(alpha_pattern={"(([a-z0-9_.]+)+)+x": 1})),
        "could take for ever to match: it repeats a group.*Write the names of the layers",
    ),
    "many repetitions": (
        lambda f: rewrite(f, lambda c: c.update(alpha_pattern={".*" * 30 + "x": 1})),
        "could take for ever to match",
    ),
    "many options": (
        lambda f: rewrite(f, lambda c: c.update(alpha_pattern={"b?" * 40 + "b" * 40: 1})),
        "could take for ever to match",
    ),
    "alternatives": (
        lambda f: rewrite(f, lambda c: c.update(alpha_pattern={"(a|a|b|.|[a-z])*x": 1})),
        "could take for ever to match",
    ),
    "bad pattern": (lambda f: rewrite(f, lambda c: c.update(alpha_pattern={"(": 1})), "is damaged"),
    "heads": (
        lambda f: rewrite(f, lambda c: c.update(modules_to_save=["out"])),
        r"modules_to_save = \['out'\], which is not",
    ),
    "bias": (lambda f: rewrite(f, lambda c: c.update(bias="all")), "option bias = 'all', which is not read here"),
    "start": (
        lambda f: rewrite(f, lambda c: c.update(init_lora_weights="pissa")),
        "option init_lora_weights = 'pissa'",
    ),
    "new": (lambda f: rewrite(f, lambda c: c.update(use_sorcery=True)), "option use_sorcery = True, which is not read"),
    "stray": (
        lambda f: rewrite(f, tensors=lambda t: t.update(x=torch.ones(1))),
        "has the tensor x, which is no low-rank",
    ),
    "empty": (lambda f: rewrite(f, tensors=lambda t: t.clear()), "is empty"),
    "half": (
        lambda f: rewrite(f, tensors=lambda t: t.pop(next(iter(t)))),
        r"has lora_[AB].weight for blocks.*, needed are",
    ),
    "lengths": (
        lambda f: rewrite(f, lambda c: c.update(use_dora=True)),
        "needed are lora_A.weight, .*magnitude_vector",
    ),
    "names": (
        lambda f: rewrite(f, tensors=lambda t: t.update({n.replace("blocks", "layer"): t.pop(n) for n in list(t)})),
        r"does not fit: 2 of its 2 layers are missing in this ViT, such as layer\.",
    ),
    "shape": (
        lambda f: rewrite(f, tensors=lambda t: t.update({n: x[:, 1:].contiguous() for n, x in t.items() if "_A" in n})),
        r"does not fit: lora_A.weight of blocks.* has shape \[6, 23\], the network needs \[6, 24\]",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_with_its_reason_and_the_network_is_as_it_was(kind, tmp_path):
    network = vit()
    exported(tmp_path, network)
    before = state_of(network), [(n, type(m)) for n, m in network.named_modules()]
    spoil, message = BAD[kind]
    spoil(tmp_path)
    with pytest.raises((AdapterFileError, FileNotFoundError), match=f"(?s){message}"):
        import_peft(network, tmp_path)
    assert list(network.state_dict()) == list(before[0])
    assert [(n, type(m)) for n, m in network.named_modules()] == before[1]
    assert all(p.requires_grad for p in network.parameters())


def test_layers_that_are_no_linear_ones_are_refused(tmp_path):
    exported(tmp_path, vit(), targets=["mlp"])
    renamed = {"mlp.linear1": "norm1", "mlp.linear2": "norm2"}

    def rename(tensors: dict[str, Tensor]) -> None:
        for old, new in renamed.items():
            tensors.update({n.replace(old, new): tensors.pop(n) for n in list(tensors) if old in n})

    rewrite(tmp_path, tensors=rename)
    with pytest.raises(AdapterFileError, match=r"blocks.0.norm1 is of the kind LayerNorm here"):
        import_peft(vit(), tmp_path)


def test_a_name_that_is_taken_is_refused(tmp_path):
    network = vit()
    exported(tmp_path, network)
    import_peft(network, tmp_path)
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        import_peft(network, tmp_path)


# peft itself


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft", reason="peft is not installed", exc_type=ImportError)


@pytest.mark.parametrize(("make", "options"), CASES, ids=IDS)
def test_peft_computes_the_same_from_exported_files(peft, make, options, tmp_path):
    backbone, image = make().eval(), image_for(make)
    network = shaken(adapt(copy.deepcopy(backbone), LoRA(**options)))
    export_peft(network, tmp_path)
    other = peft.PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path)
    assert sum("lora_A" in n for n, _ in other.named_parameters()) == len(deltas_of(network))
    assert error_of(output(other, image), output(network, image)) < (1e-5 if make is swin else 1e-6)  # folded weights
    assert error_of(output(network, image), output(backbone, image)) > 1e-3


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (vit, {"target_modules": ["qkv"]}),
        (vit, {"target_modules": r".*\.(qkv|linear1|out_proj)", "use_rslora": True, "rank_pattern": {"qkv": 5}}),
        (vit, {"target_modules": ["qkv", "linear2"], "alpha_pattern": {"blocks.1.attn.qkv": 2.5}, "lora_dropout": 0.1}),
        (vit, {"target_modules": ["qkv", "linear2"], "use_dora": True, "init_lora_weights": "gaussian"}),
        (Small, {"target_modules": r"conv|inner\.conv|inner\.plain|linear|head\.1"}),
        (Small, {"target_modules": r"conv|inner\.plain|linear", "use_dora": True}),
    ],
)
def test_peft_adapters_compute_the_same_when_imported(peft, make, options, tmp_path):
    backbone, image = make().eval(), image_for(make)
    other = peft.get_peft_model(copy.deepcopy(backbone), peft.LoraConfig(r=3, lora_alpha=6, **options))
    shaken(other)
    other.save_pretrained(tmp_path)
    network = import_peft(copy.deepcopy(backbone), tmp_path, trainable=True)
    assert summary(network).trainable == sum(p.numel() for p in other.parameters() if p.requires_grad)
    assert error_of(output(network, image), output(other, image)) < 1e-6
    assert error_of(output(network, image), output(backbone, image)) > 1e-3
    export_peft(network, tmp_path / "back")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path / "back")
    assert error_of(output(again, image), output(other, image)) < 1e-6
