"""Builds a PUNet that carries the weights of a parity case."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from monai_petl.networks import PUNet
from monai_petl.networks.punet.body import BottleneckAdapter
from monai_petl.networks.punet.heads import ConvHead
from tests.parity_cases import Case, tensors

ATTENTION = re.compile(r"(?P<block>(?:enc|dec)\d)\.attn(?P<i>[01])\.(?P<rest>.+)")


def network_of(case: Case, config: dict, prefix: str) -> PUNet:
    """A network with published arithmetic and the weights that the case's rule generates."""
    given = tensors(case, prefix)
    prompts = "classes" in config
    network = PUNet(
        config["in_channels"],
        config["classes"] if prompts else (),
        channels=config["channels"],
        num_heads=config["heads"],
        window_size=config["window"],
        design_depth=config["design_depth"],
        tokens_per_class=config["tokens_per_class"],
        prompt_depth="end" if case.get("attention_prompts") == "none" else config.get("prompt_depth", "full"),
        arithmetic="published",
        similarity=config.get("similarity", "soft"),
    )
    if config["head"] == "two_output_conv":
        network.heads["a"] = ConvHead(config["channels"][0], config["outputs"])
    if config.get("adapter"):
        for block, width in network.body.blocks.items():
            window = network.body.level(block).attention
            window.attn0.adapter, window.attn1.adapter = BottleneckAdapter(width), BottleneckAdapter(width)
    state = network.state_dict()
    for name in state:
        if not name.endswith("num_batches_tracked"):
            state[name] = published_tensor(network, given, name)
    network.load_state_dict(state)
    return network


def published_tensor(network: PUNet, given: dict[str, Tensor], name: str) -> Tensor:
    """The value of our tensor ``name`` from tensors under the fixture's names."""
    if name.startswith("prompts.classes."):
        return _class_tensor(network, given, name)
    if name == "prompts.background":
        return given.get("prompt.background.head_tokens", network.prompts.background.detach())
    if name.startswith("heads."):
        return given["head." + name.split(".", 2)[2]]
    name = name.removeprefix("body.").removeprefix("encoder.").removeprefix("decoder.").replace(".attention.", ".")
    name = name.replace("adapter.down", "adapter_down").replace("adapter.up", "adapter_up")
    if name.endswith("qkv.weight"):
        stem = name.removesuffix("qkv.weight")
        return torch.cat([given[f"{stem}{part}.weight"] for part in ("query", "key", "value")])
    return given[name]


def _class_tensor(network: PUNet, given: dict[str, Tensor], name: str) -> Tensor:
    _, _, label, kind, *block = name.split(".")
    blocks = network.prompts[label].blocks
    if kind == "head_tokens":
        return given[f"prompt.{label}.head_tokens"]
    if kind == "tokens":
        return torch.stack([given[f"prompt.{label}.{block[0]}.attn{i}.tokens"] for i in (0, 1)])
    owner, part = (label, "bias_table") if kind == "bias_tables" else ("shared", "bias_head")
    return torch.stack([torch.stack([given[f"prompt.{owner}.{b}.attn{i}.{part}"] for i in (0, 1)]) for b in blocks])


def published_value(network: PUNet, name: str) -> Tensor:
    """The value of the tensor that the fixture calls ``name``: a class's own one, or one of the body."""
    if name.startswith("prompt."):
        _, label, *rest = name.split(".")
        prompts = network.prompts[label]
        return prompts.head_tokens if rest == ["head_tokens"] else prompts.tokens[rest[0]][int(rest[1][-1])]
    stage, rest_of_name = name.split(".", 1)
    owner = network.body.stem if stage == "stem" else network.body.level(stage)
    prefix = "attention." if rest_of_name.startswith("attn") else ""
    return owner.state_dict()[prefix + rest_of_name]


def gradient_of(network: PUNet, name: str) -> Tensor:
    """The gradient of the tensor that the fixture calls ``name``; of a shared one, the sum over the classes' copies."""
    if name.startswith("prompt."):
        _, label, *rest = name.split(".")
        if rest == ["head_tokens"]:
            bank = network.prompts
            return (bank.background if label == "background" else bank[label].head_tokens).grad
        block, sub, kind = rest
        i = int(sub[-1])
        if kind == "tokens":
            return network.prompts[label].tokens[block].grad[i]
        owners = network.prompts.names if label == "shared" else [label]
        total = torch.zeros(())
        for owner in owners:
            prompts = network.prompts[owner]
            gradient = getattr(prompts, "bias_heads" if kind == "bias_head" else "bias_tables").grad
            if gradient is not None:
                total = total + gradient[prompts.blocks.index(block), i]
        return total
    match = ATTENTION.fullmatch(name)
    if match:
        window = network.body.level(match["block"]).attention
        attention = (window.attn0, window.attn1)[int(match["i"])]
        part, *_ = match["rest"].split(".")
        if part in ("query", "key", "value"):
            return attention.qkv.weight.grad.chunk(3)[("query", "key", "value").index(part)]
        return attention.get_parameter(match["rest"]).grad
    stage, rest = name.split(".", 1)
    owner = network.body.stem if stage == "stem" else network.body.level(stage)
    return owner.get_parameter(rest).grad
