"""Names of tensors in checkpoints of other libraries, as tables of pattern -> name in MONAI.

In a pattern ``{i}``, ``{s}`` and ``{b}`` are numbers, ``{p}`` is weight or bias, ``{*}`` is anything, and ``(a|b)`` are
alternatives. Some names on the right are of no MONAI tensor but of something that :mod:`monai_petl.weights.inflation.readers`
folds into one: ``pos_embed`` (class entry included), ``attn.q`` and its like, ``scale1``, ``table``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["PREFIXES", "SOURCES", "Source", "detect_source", "refuse_unrepresentable", "without_prefixes"]

PREFIXES = ("module.", "model.", "backbone.", "teacher.", "vit.", "deit.", "dinov2.", "beit.", "swin.")


@dataclass(frozen=True)
class Source:
    """A family of checkpoints.

    Attributes:
        name: what users call it.
        kind: which MONAI network holds it: vit, swin or resnet.
        eps: epsilon of its layer norms.
        present: patterns of names by which the family is known; the first that fits in the order of ``SOURCES`` is taken.
        renamed: pattern -> name in MONAI.
        dropped: pattern -> reason.
    """

    name: str
    kind: str
    eps: float
    present: tuple[str, ...]
    renamed: Mapping[str, str]
    dropped: Mapping[str, str]

    def rename(self, key: str) -> str | None:
        """The MONAI name of a key, or None when the table does not know it."""
        for pattern, name in self.renamed.items():
            if found := _compiled(pattern).fullmatch(key):
                groups = found.groupdict()
                stage = {"s1": str(int(groups["s"]) + 1)} if groups.get("s") else {}
                return name.replace("{s+1}", "{s1}").format(**groups, **stage)
        return None

    def reason_to_drop(self, key: str) -> str | None:
        """Why a key is left out, or None when it is not."""
        return next((why for pattern, why in self.dropped.items() if _compiled(pattern).fullmatch(key)), None)


def detect_source(keys: Iterable[str]) -> Source:
    """The family that a checkpoint's names (without prefixes) belong to.

    Raises:
        ValueError: none fits.
    """
    keys = list(keys)

    def holds(pattern: str) -> bool:
        return any(_compiled(pattern).fullmatch(key) for key in keys)

    for source in SOURCES.values():
        if all(map(holds, source.present)):
            return source
    first = ", ".join(sorted(keys)[:3]) or "no tensor at all"
    raise ValueError(
        f"the checkpoint holds {first} ..., names of no known family; expected one of {', '.join(SOURCES)}. "
        "Rename its tensors to those of such a family"
    )


def without_prefixes(keys: Iterable[str]) -> dict[str, str]:
    """Key -> key without the prefixes that training scripts and task models put in front."""

    def cut(key: str) -> str:
        prefix = next((p for p in PREFIXES if key.startswith(p)), None)
        return key if prefix is None else cut(key.removeprefix(prefix))

    return {key: cut(key) for key in keys}


def refuse_unrepresentable(keys: Iterable[str]) -> None:
    """Raise for what MONAI's networks cannot compute.

    Raises:
        ValueError: names the tensor and the part that MONAI has not got.
    """
    for key in keys:
        for pattern, part in _REFUSED.items():
            if re.search(pattern, key):
                raise ValueError(
                    f"the checkpoint holds {key}: {part}, which MONAI's network has not got. "
                    "Use a checkpoint of the same family without it"
                )


def _compiled(pattern: str) -> re.Pattern[str]:
    if pattern not in _CACHE:
        text = pattern.replace(".", r"\.").replace("(", "(?:").replace("{*}", ".*")
        text = text.replace("{p}", "(?P<p>weight|bias)").replace("{t}", f"(?P<t>{_BATCH_NORM})")
        _CACHE[pattern] = re.compile(re.sub(r"\{([isb])\}", r"(?P<\1>[0-9]+)", text))
    return _CACHE[pattern]


_CACHE: dict[str, re.Pattern[str]] = {}
_BATCH_NORM = "weight|bias|running_mean|running_var|num_batches_tracked"

_REFUSED = {
    r"(^|\.)(ln_pre|norm_pre|pre_layrnorm|pre_layernorm)\.": "a layer norm between embedding and first block",
    r"register_token|reg_token": "register tokens",
    r"dist_token|distillation_token": "a distillation token",
    r"\.(q_norm|k_norm)\.": "normalisation of queries and keys",
    r"\.mlp\.(weights_in|weights_out|w1|w2|w3|w12|fc1_g|fc1_x)\.": "a gated (SwiGLU) MLP",
    r"(^|\.)(attn_pool|attention_pool|global_pool)\.": "pooling by attention",
    r"\.(logit_scale|cpb_mlp|continuous_position_bias_mlp)(\.|$)": "the cosine attention of Swin v2",
    r"\.(mlp|attn)\.norm\.": "a normalisation inside attention or MLP",
}

_PATCH = "patch_embedding.patch_embeddings.{p}"
_LAYER = "(encoder.layer|layers).{i}"
_HF_TRANSFORMER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.{p}": _PATCH,
    f"{_LAYER}.(layernorm_before|norm1).{{p}}": "blocks.{i}.norm1.{p}",
    f"{_LAYER}.attention.(attention.query|q_proj).{{p}}": "blocks.{i}.attn.q.{p}",
    f"{_LAYER}.attention.(attention.key|k_proj).{{p}}": "blocks.{i}.attn.k.{p}",
    f"{_LAYER}.attention.(attention.value|v_proj).{{p}}": "blocks.{i}.attn.v.{p}",
    f"{_LAYER}.attention.(output.dense|o_proj).{{p}}": "blocks.{i}.attn.out_proj.{p}",
    f"{_LAYER}.(attention.attention.)?relative_position_bias.relative_position_bias_table": "blocks.{i}.table",
    "(encoder.relative_position_bias|shared_position_bias).relative_position_bias_table": "table",
    f"{_LAYER}.(lambda_1|layer_scale1.lambda1)": "blocks.{i}.scale1",
    f"{_LAYER}.(layernorm_after|norm2).{{p}}": "blocks.{i}.norm2.{p}",
    f"{_LAYER}.(intermediate.dense|mlp.fc1).{{p}}": "blocks.{i}.mlp.linear1.{p}",
    f"{_LAYER}.(output.dense|mlp.fc2).{{p}}": "blocks.{i}.mlp.linear2.{p}",
    f"{_LAYER}.(lambda_2|layer_scale2.lambda1)": "blocks.{i}.scale2",
    "layernorm.{p}": "norm.{p}",
}
_TIMM_TRANSFORMER = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "patch_embed.proj.{p}": _PATCH,
    "blocks.{i}.norm1.{p}": "blocks.{i}.norm1.{p}",
    "blocks.{i}.attn.qkv.{p}": "blocks.{i}.attn.qkv.{p}",
    "blocks.{i}.attn.q_bias": "blocks.{i}.attn.q.bias",
    "blocks.{i}.attn.k_bias": "blocks.{i}.attn.k.bias",
    "blocks.{i}.attn.v_bias": "blocks.{i}.attn.v.bias",
    "blocks.{i}.attn.proj.{p}": "blocks.{i}.attn.out_proj.{p}",
    "blocks.{i}.attn.relative_position_bias_table": "blocks.{i}.table",
    "rel_pos_bias.relative_position_bias_table": "table",
    "blocks.{i}.(ls1.gamma|gamma_1)": "blocks.{i}.scale1",
    "blocks.{i}.norm2.{p}": "blocks.{i}.norm2.{p}",
    "blocks.{i}.mlp.fc1.{p}": "blocks.{i}.mlp.linear1.{p}",
    "blocks.{i}.mlp.fc2.{p}": "blocks.{i}.mlp.linear2.{p}",
    "blocks.{i}.(ls2.gamma|gamma_2)": "blocks.{i}.scale2",
    "norm.{p}": "norm.{p}",
}
_TORCHVISION_LAYER = "encoder.layers.encoder_layer_{i}"
_TORCHVISION_TRANSFORMER = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj.{p}": _PATCH,
    f"{_TORCHVISION_LAYER}.ln_1.{{p}}": "blocks.{i}.norm1.{p}",
    f"{_TORCHVISION_LAYER}.self_attention.in_proj_{{p}}": "blocks.{i}.attn.qkv.{p}",
    f"{_TORCHVISION_LAYER}.self_attention.out_proj.{{p}}": "blocks.{i}.attn.out_proj.{p}",
    f"{_TORCHVISION_LAYER}.ln_2.{{p}}": "blocks.{i}.norm2.{p}",
    f"{_TORCHVISION_LAYER}.mlp.(0|linear_1).{{p}}": "blocks.{i}.mlp.linear1.{p}",
    f"{_TORCHVISION_LAYER}.mlp.(3|linear_2).{{p}}": "blocks.{i}.mlp.linear2.{p}",
    "encoder.ln.{p}": "norm.{p}",
}
_SWIN_BLOCK = "layers{s+1}.0.blocks.{b}"
_HF_STAGE = "encoder.layers.{s}"
_HF_SWIN_BLOCK = f"{_HF_STAGE}.blocks.{{b}}"
_HF_SWIN = {
    "embeddings.patch_embeddings.projection.{p}": "patch_embed.proj.{p}",
    "embeddings.norm.{p}": "patch_embed.norm.{p}",
    f"{_HF_SWIN_BLOCK}.layernorm_before.{{p}}": f"{_SWIN_BLOCK}.norm1.{{p}}",
    f"{_HF_SWIN_BLOCK}.attention.(self.query|q_proj).{{p}}": f"{_SWIN_BLOCK}.attn.q.{{p}}",
    f"{_HF_SWIN_BLOCK}.attention.(self.key|k_proj).{{p}}": f"{_SWIN_BLOCK}.attn.k.{{p}}",
    f"{_HF_SWIN_BLOCK}.attention.(self.value|v_proj).{{p}}": f"{_SWIN_BLOCK}.attn.v.{{p}}",
    f"{_HF_SWIN_BLOCK}.attention.(output.dense|o_proj).{{p}}": f"{_SWIN_BLOCK}.attn.proj.{{p}}",
    f"{_HF_SWIN_BLOCK}.attention.(self|relative_position_bias).relative_position_bias_table": (
        f"{_SWIN_BLOCK}.attn.relative_position_bias_table"
    ),
    f"{_HF_SWIN_BLOCK}.layernorm_after.{{p}}": f"{_SWIN_BLOCK}.norm2.{{p}}",
    f"{_HF_SWIN_BLOCK}.(intermediate.dense|mlp.fc1).{{p}}": f"{_SWIN_BLOCK}.mlp.linear1.{{p}}",
    f"{_HF_SWIN_BLOCK}.(output.dense|mlp.fc2).{{p}}": f"{_SWIN_BLOCK}.mlp.linear2.{{p}}",
    f"{_HF_STAGE}.downsample.norm.{{p}}": "layers{s+1}.0.downsample.norm.{p}",
    f"{_HF_STAGE}.downsample.reduction.{{p}}": "layers{s+1}.0.downsample.reduction.{p}",
}
_MICROSOFT_SWIN = {
    "patch_embed.proj.{p}": "patch_embed.proj.{p}",
    "patch_embed.norm.{p}": "patch_embed.norm.{p}",
    "layers.{s}.blocks.{b}.norm1.{p}": f"{_SWIN_BLOCK}.norm1.{{p}}",
    "layers.{s}.blocks.{b}.attn.qkv.{p}": f"{_SWIN_BLOCK}.attn.qkv.{{p}}",
    "layers.{s}.blocks.{b}.attn.proj.{p}": f"{_SWIN_BLOCK}.attn.proj.{{p}}",
    "layers.{s}.blocks.{b}.attn.relative_position_bias_table": f"{_SWIN_BLOCK}.attn.relative_position_bias_table",
    "layers.{s}.blocks.{b}.norm2.{p}": f"{_SWIN_BLOCK}.norm2.{{p}}",
    "layers.{s}.blocks.{b}.mlp.fc1.{p}": f"{_SWIN_BLOCK}.mlp.linear1.{{p}}",
    "layers.{s}.blocks.{b}.mlp.fc2.{p}": f"{_SWIN_BLOCK}.mlp.linear2.{{p}}",
    "layers.{s}.downsample.norm.{p}": "layers{s+1}.0.downsample.norm.{p}",
    "layers.{s}.downsample.reduction.{p}": "layers{s+1}.0.downsample.reduction.{p}",
}
_TIMM_SWIN = {  # timm merges at the start of a stage, everyone else at the end of the one before
    **_MICROSOFT_SWIN,
    "layers.{s}.downsample.norm.{p}": "layers{s}.0.downsample.norm.{p}",
    "layers.{s}.downsample.reduction.{p}": "layers{s}.0.downsample.reduction.{p}",
}
_RESNET = {  # the names are MONAI's; {t} is any tensor of a batch norm
    pattern: pattern
    for pattern in (
        "conv1.weight",
        "bn1.{t}",
        "layer{s}.{b}.conv{i}.weight",
        "layer{s}.{b}.bn{i}.{t}",
        "layer{s}.{b}.downsample.0.weight",
        "layer{s}.{b}.downsample.1.{t}",
    )
}

_HF_BLOCK = f"{_LAYER}.(layernorm_before|norm1).weight".replace("{i}", "0")
_HEAD = "head of the source's task"
_HEADS = {
    "(head|heads|head_dist|fc|fc_norm|classifier|cls_classifier|pre_logits|lm_head|pooler).{*}": _HEAD,
    "(decoder|decoder_embed|decoder_pos_embed|decoder_norm|decoder_blocks|decoder_pred)(.{*}|)": "decoder of the source",
    "(embeddings.|)mask_token": "mask token, used in pre-training only",
    "({*}.|)(relative_position_index|attn_mask)": "buffer that belongs to the target's windows",
}
_SWIN_HEADS = {**_HEADS, "(norm|layernorm).{p}": "final norm, which SwinTransformer has not got"}

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source("torchvision_resnet", "resnet", 1e-5, ("layer1.0.conv1.weight",), _RESNET, {"fc.{p}": _HEAD}),
        Source("torchvision_vit", "vit", 1e-6, ("conv_proj.weight",), _TORCHVISION_TRANSFORMER, _HEADS),
        Source("hf_swin", "swin", 1e-5, ("encoder.layers.0.blocks.0.layernorm_before.weight",), _HF_SWIN, _SWIN_HEADS),
        Source(
            "swin",
            "swin",
            1e-5,
            ("layers.0.blocks.0.attn.{*}", "layers.0.downsample.{*}"),
            _MICROSOFT_SWIN,
            _SWIN_HEADS,
        ),
        Source("timm_swin", "swin", 1e-5, ("layers.0.blocks.0.attn.{*}",), _TIMM_SWIN, _SWIN_HEADS),
        Source(
            "hf_beit", "vit", 1e-12, (_HF_BLOCK, "{*}(lambda_1|relative_position_bias_table)"), _HF_TRANSFORMER, _HEADS
        ),
        Source("hf_dinov2", "vit", 1e-6, (_HF_BLOCK, "{*}layer_scale1.lambda1"), _HF_TRANSFORMER, _HEADS),
        Source("hf_vit", "vit", 1e-12, (_HF_BLOCK,), _HF_TRANSFORMER, _HEADS),
        Source(
            "timm_vit", "vit", 1e-6, ("patch_embed.proj.weight", "blocks.0.norm1.weight"), _TIMM_TRANSFORMER, _HEADS
        ),
    )
}
