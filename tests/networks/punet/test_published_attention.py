"""The published network, case by case: outputs, stage means and gradients against recorded numbers."""

from __future__ import annotations

import pytest
import torch

from tests.networks.punet.punet_parity import gradient_of, network_of
from tests.parity_cases import check, load_cases, load_expected, tensor

CASES = {case["name"]: case for case in load_cases("punet")}
EXPECTED = load_expected("punet")


@pytest.mark.parametrize("name", CASES)
def test_published_arithmetic_reproduces_the_published_network(name: str) -> None:
    case = CASES[name]
    network = network_of(case, case["config"], case["weight_prefix"]).eval()
    means: dict[str, torch.Tensor] = {}
    stages = {"stem": network.body.stem, **{b: network.body.level(b) for b in network.body.blocks}}
    body = network.body
    encoded = {}
    for stage, module in stages.items():
        if stage.startswith("enc"):
            # the sum with the shortcut is formed in the body: record both parts
            module.attention.register_forward_hook(
                lambda _m, _i, out, s=stage: encoded.__setitem__(s, out.mean((2, 3, 4)))
            )
            module.shortcut.register_forward_hook(
                lambda _m, _i, out, s=stage: means.__setitem__(s, out.mean((2, 3, 4)))
            )
        else:
            module.register_forward_hook(lambda _m, _i, out, s=stage: means.__setitem__(s, out.mean((2, 3, 4))))
    classes = case["batch_classes"] or ["a"] * case["input"]["shape"][0]
    out = network(tensor(case["input"]), classes)
    for stage in body.blocks:
        if stage.startswith("enc"):
            means[stage] = means[stage] + encoded[stage]
    for stage, mean in means.items():
        check(EXPECTED, case, f"channel_means.{stage}", mean)
    check(EXPECTED, case, "embedding", out.embedding)
    check(EXPECTED, case, "logits", out.logits)
    if "gradient" in case:
        probes = [tensor(row) for row in case["gradient"]["probes"]]
        value = (out.logits * probes[0]).mean() + (out.embedding * probes[1]).mean()
        value.backward()
        check(EXPECTED, case, "probe_value", value)
        for row in case["gradient"]["with_respect_to"]:
            check(EXPECTED, case, f"grad.{row}", gradient_of(network, row))
    compared = {"logits", "embedding", *(f"channel_means.{s}" for s in means)}
    compared |= {o for o in case["outputs"] if o.startswith("grad.") or o == "probe_value"}
    assert compared == set(case["outputs"])
