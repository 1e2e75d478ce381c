"""What PUNet promises about shapes, classes, batches, caches and ranges."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monai_petl import adapt, load_adapter, save_adapter
from monai_petl.methods import PromptTuning
from monai_petl.networks import PUNET_CONFIGURATIONS, PUNet, PUNetOutput
from monai_petl.networks.punet.heads import ConvHead
from tests.conftest import shake_statistics, small_punet, train_class

SIZE = (32, 32, 1)


def image_of(batch: int = 1, size=SIZE, channels: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, *size)


@pytest.fixture
def network() -> PUNet:
    return small_punet("liver", "spleen").eval()


@pytest.fixture(params=["corrected", "published"])
def any_arithmetic(request) -> PUNet:
    return small_punet("liver", "spleen", arithmetic=request.param).eval()


def with_head(network: PUNet, name: str) -> PUNet:
    network.heads[name] = shake_statistics(ConvHead(8, 2))
    return network.eval()


# shapes


@pytest.mark.parametrize("arithmetic", ["corrected", "published"])
@pytest.mark.parametrize(
    ("configuration", "size"),
    [
        ("2d", (224, 224, 1)),
        ("2d", (160, 160, 1)),
        ("2d", (100, 100, 1)),
        ("2d", (90, 70, 1)),
        ("3d_flat", (80, 80, 4)),
        ("3d_flat", (112, 112, 4)),
        ("3d_anisotropic", (40, 40, 8)),
        ("3d_anisotropic", (56, 56, 8)),
    ],
)
@torch.no_grad()
def test_logits_have_the_size_of_the_image_and_the_embedding_half_the_plane(configuration, size, arithmetic):
    network = small_punet("liver", arithmetic=arithmetic, **PUNET_CONFIGURATIONS[configuration]).eval()
    out = network(image_of(size=size), ["liver"])
    assert isinstance(out, PUNetOutput)
    assert out.logits.shape == (1, 2, *size)
    assert out.embedding.shape == (1, 8, size[0] // 2, size[1] // 2, size[2])


@given(
    size=st.tuples(st.integers(3, 41), st.integers(3, 41), st.integers(1, 5)),
    partition=st.sampled_from(("grid", "block")),
    depth=st.sampled_from((1, 4)),
    batch=st.integers(1, 2),
)
@torch.no_grad()
def test_any_size_works_with_odd_extents_too(size, partition, depth, batch):
    network = small_punet("a", "b", window_size=(4, 4, 2), partition=partition, design_depth=depth).eval()
    out = network(image_of(batch, size), ["a"] * batch)
    assert out.logits.shape == (batch, 2, *size)
    assert out.embedding.shape == (batch, 8, -(-size[0] // 2), -(-size[1] // 2), size[2])
    assert out.logits.isfinite().all()
    assert network(image_of(batch, size)).shape == (batch, 3, *size)


@torch.no_grad()
def test_a_slice_may_come_without_its_last_axis(any_arithmetic):
    image = image_of(2)
    assert torch.equal(any_arithmetic(image.squeeze(-1)), any_arithmetic(image).squeeze(-1))
    flat, full = any_arithmetic(image.squeeze(-1), ["liver"] * 2), any_arithmetic(image, ["liver"] * 2)
    assert torch.equal(flat.logits, full.logits.squeeze(-1))
    assert torch.equal(flat.embedding, full.embedding.squeeze(-1))


@torch.no_grad()
def test_images_may_have_several_channels():
    assert small_punet("a", in_channels=3).eval()(image_of(1, channels=3)).shape == (1, 2, *SIZE)


# prompts and classes


@pytest.mark.parametrize(("tokens", "values"), [(1, 7_904), (4, 17_792), (8, 30_976), (16, 57_344), (32, 110_080)])
def test_a_class_of_the_default_network_has_the_published_number_of_values(tokens, values):
    prompts = PUNet(classes=("liver",), tokens_per_class=tokens).prompts["liver"]
    assert sum(p.numel() for p in prompts.parameters()) == values
    if tokens == 16:
        assert round(100 * values / 6_758_304, 2) == 0.85


@torch.no_grad()
def test_each_class_has_a_channel_and_background_is_zero(any_arithmetic):
    image = image_of(2)
    out = any_arithmetic(image)
    assert out.shape == (2, 3, *SIZE)
    assert (out[:, 0] == 0).all()
    for channel, name in enumerate(any_arithmetic.classes, 1):
        logits = any_arithmetic(image, [name] * 2).logits
        torch.testing.assert_close(out[:, channel], logits[:, 1] - logits[:, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_argmax_is_the_class_with_the_largest_positive_margin_else_background(network):
    image = image_of(2)
    margins = torch.stack(
        [logits[:, 1] - logits[:, 0] for logits in (network(image, [name] * 2).logits for name in network.classes)], 1
    )
    rule = torch.where(margins.amax(1) > 0, margins.argmax(1) + 1, 0)
    clear = (margins.diff(dim=1).abs().squeeze(1) > 1e-4) & (margins.abs() > 1e-4).all(1)  # no tie within rounding
    found = network(image).argmax(1)
    assert clear.float().mean() > 0.9
    assert torch.equal(found[clear], rule[clear])
    assert found.unique().numel() > 1


@torch.no_grad()
def test_a_mixed_batch_equals_single_images(any_arithmetic):
    image, names = image_of(3), ["liver", "spleen", "liver"]
    together = any_arithmetic(image, names)
    for b, name in enumerate(names):
        alone = any_arithmetic(image[b : b + 1], [name])
        torch.testing.assert_close(together.logits[b], alone.logits[0], atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(together.embedding[b], alone.embedding[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(any_arithmetic(image, ["spleen"] * 3).logits[0], together.logits[0], atol=1e-3)


@pytest.mark.parametrize("arithmetic", ["corrected", "published"])
@torch.no_grad()
def test_classes_of_different_prompting_depth_run_in_one_batch(arithmetic):
    network = small_punet("full", arithmetic=arithmetic)
    depths = ("encoder", "decoder", "start", "end")
    for depth in depths:
        network.prompts.add_class(depth, depth=depth)
    network.eval()
    names = ["end", "full", "decoder", "start", "encoder"]
    image = image_of(1).repeat(5, 1, 1, 1, 1)
    together = network(image, names).logits
    for b, name in enumerate(names):
        torch.testing.assert_close(together[b], network(image[:1], [name]).logits[0], atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("arithmetic", ["corrected", "published"])
def test_more_than_ten_classes_can_be_added_and_told_apart(arithmetic):
    names = [f"organ{i}" for i in range(12)]
    network = small_punet(*names, arithmetic=arithmetic).eval()
    with torch.no_grad():
        out = network(image_of())
    assert out.shape == (1, 13, *SIZE)
    assert len({float(channel.sum()) for channel in out[0, 1:]}) == 12


@torch.no_grad()
def test_the_order_of_tokens_with_their_table_rows_does_not_matter(any_arithmetic):
    image, prompts = image_of(2), any_arithmetic.prompts["liver"]
    before = any_arithmetic(image, ["liver"] * 2).logits
    order = torch.tensor([2, 0, 3, 1])
    for tokens in prompts.tokens.values():
        tokens.copy_(tokens[:, order])
    prompts.bias_tables.copy_(prompts.bias_tables[:, :, order])
    prompts.head_tokens.copy_(prompts.head_tokens[order])
    torch.testing.assert_close(any_arithmetic(image, ["liver"] * 2).logits, before, atol=1e-5, rtol=1e-6)
    prompts.bias_tables.copy_(prompts.bias_tables[:, :, order])  # without the tokens it does
    assert not torch.equal(any_arithmetic(image, ["liver"] * 2).logits, before)


@torch.no_grad()
def test_every_part_of_a_prompt_counts(any_arithmetic):
    image, prompts = image_of(), any_arithmetic.prompts["liver"]
    for name, parameter in prompts.named_parameters():
        before = any_arithmetic(image, ["liver"]).logits
        parameter.add_(torch.randn_like(parameter))
        assert not torch.equal(any_arithmetic(image, ["liver"]).logits, before), name


@pytest.mark.parametrize("prompting", ["separate", "joint"])
@torch.no_grad()
def test_classes_can_be_chosen_and_ordered(prompting):
    network = small_punet("a", "b", "c", prompting=prompting).eval()
    image = image_of()
    assert network.classes == network.active_classes == ["a", "b", "c"]
    network.active_classes = ["c", "a"]
    chosen = network(image)
    torch.testing.assert_close(chosen, network.segment(image, ["c", "a"]))
    turned = network.segment(image, ["a", "c"])
    torch.testing.assert_close(chosen[:, [0, 2, 1]], turned, atol=1e-5, rtol=1e-5)
    network.active_classes = None
    assert network(image).shape[1] == 4


@torch.no_grad()
def test_a_removed_class_is_no_longer_active(network):
    network.active_classes = ["spleen", "liver"]
    network.prompts.remove_class("spleen")
    assert network.active_classes == ["liver"]
    assert network(image_of()).shape[1] == 2


def test_hiding_and_showing_a_class_keeps_the_order_and_later_classes():
    network = small_punet("a", "b", "c")
    network.show("a", False)
    assert network.active_classes == ["b", "c"]
    network.show("a", True)
    assert network.active_classes == ["a", "b", "c"]
    network.prompts.add_class("d")
    assert network.active_classes == ["a", "b", "c", "d"]


@torch.no_grad()
def test_adding_a_class_leaves_the_logits_of_the_others_bit_identical(any_arithmetic):
    image = image_of(2)
    before = any_arithmetic(image, ["liver", "spleen"]).logits, any_arithmetic.segment(image, ["liver", "spleen"])
    any_arithmetic.prompts.add_class("pancreas", init="mean")
    any_arithmetic(image)
    assert torch.equal(any_arithmetic(image, ["liver", "spleen"]).logits, before[0])
    assert torch.equal(any_arithmetic.segment(image, ["liver", "spleen"]), before[1])


@pytest.mark.parametrize("arithmetic", ["corrected", "published"])
def test_training_a_class_leaves_the_logits_of_all_others_bit_identical(arithmetic, tmp_path):
    network = small_punet("liver", "spleen", arithmetic=arithmetic).eval().requires_grad_(False)
    backbone, image = copy.deepcopy(network), image_of(2)
    with torch.no_grad():
        before = network.segment(image, ["liver", "spleen"])
    adapt(network, PromptTuning("pancreas"))
    start = {n: t.clone() for n, t in network.prompts["pancreas"].state_dict().items()}
    train_class(network, "pancreas", image, weight_decay=0.1)
    network.eval().requires_grad_(False)
    trained = network.prompts["pancreas"].state_dict()
    assert all(not torch.equal(tensor, trained[name]) for name, tensor in start.items())
    with torch.no_grad():
        assert torch.equal(network.segment(image, ["liver", "spleen"]), before)
        pancreas = network(image, ["pancreas"] * 2).logits
        load_adapter(backbone, save_adapter(network, tmp_path / "pancreas.safetensors"))
        assert torch.equal(backbone.segment(image, ["liver", "spleen"]), before)
        assert torch.equal(backbone(image, ["pancreas"] * 2).logits, pancreas)


# joint prompting


@pytest.mark.parametrize("arithmetic", ["corrected", "published"])
@torch.no_grad()
def test_joint_prompting_of_one_class_equals_a_pass_of_its_own(arithmetic):
    network = small_punet("a", "b", arithmetic=arithmetic).eval()
    image = image_of(2)
    separate = network.segment(image, ["b"])
    network.prompting = "joint"
    torch.testing.assert_close(network.segment(image, ["b"]), separate, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arithmetic", ["corrected", "published"])
@torch.no_grad()
def test_joint_prompting_attends_to_the_tokens_of_all_classes(arithmetic):
    network = small_punet("a", "b", "c", prompting="joint", arithmetic=arithmetic).eval()
    image = image_of(2)
    out = network(image)
    joined = network.prompts.stack(["a", "b", "c"]).joined()
    rows = torch.zeros(2, dtype=torch.long)
    blocks = {n: tuple(p.select(rows) for p in pair) for n, pair in network.body.project(joined).items()}
    assert blocks["enc0"][0].key.shape[2] == 12
    embedding = network.body(image, blocks)
    for channel, name in enumerate(("a", "b", "c"), 1):
        tokens = torch.stack([network.prompts.background, network.prompts[name].head_tokens])
        logits = network._enlarge(network.head(embedding, tokens.expand(2, -1, -1, -1)), image)
        torch.testing.assert_close(out[:, channel], logits[:, 1] - logits[:, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_joint_prompting_does_not_depend_on_the_order_of_classes():
    network = small_punet("a", "b", prompting="joint").eval()
    network.prompts.add_class("c", own_background=True).background_tokens.add_(0.5)
    network.prompts.add_class("d", depth="decoder")
    image = image_of()
    forth = network.segment(image, ["a", "b", "c", "d"])
    back = network.segment(image, ["c", "d", "b", "a"])
    torch.testing.assert_close(forth[:, [0, 3, 4, 2, 1]], back, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_joint_classes_influence_each_other_and_separate_ones_do_not():
    network = small_punet("a", "b").eval()
    image = image_of()
    first = network.segment(image, ["a", "b"])
    network.prompts["b"].tokens["enc0"].mul_(3)
    assert torch.equal(network.segment(image, ["a", "b"])[:, 1], first[:, 1])
    network.prompting = "joint"
    first = network.segment(image, ["a", "b"])
    network.prompts["b"].tokens["enc0"].mul_(3)
    assert not torch.equal(network.segment(image, ["a", "b"])[:, 1], first[:, 1])


# classes with a convolution in place of prompts


@pytest.mark.parametrize("prompting", ["separate", "joint"])
@torch.no_grad()
def test_convolution_heads_stand_beside_prompted_classes(prompting):
    network = with_head(small_punet("a", "b", prompting=prompting), "c")
    image = image_of(2)
    assert network.classes == ["a", "b", "c"]
    out = network.segment(image, ["c", "b", "a"])
    assert network(image).shape == (2, 4, *SIZE)
    torch.testing.assert_close(out[:, [3, 2]], network.segment(image, ["a", "b"])[:, 1:], atol=1e-5, rtol=1e-5)
    logits = network(image, ["c", "c"]).logits
    torch.testing.assert_close(out[:, 1], logits[:, 1] - logits[:, 0])
    expected = network._enlarge(network.heads["c"](network.body(image)), image)
    torch.testing.assert_close(logits, expected)


@torch.no_grad()
def test_a_batch_may_mix_convolution_heads_and_prompted_classes():
    network = with_head(small_punet("a"), "c")
    image = image_of(3)
    together = network(image, ["c", "a", "c"])
    for b, name in enumerate(("c", "a", "c")):
        alone = network(image[b : b + 1], [name])
        torch.testing.assert_close(together.logits[b], alone.logits[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.embedding[b], alone.embedding[0], atol=1e-5, rtol=1e-5)


# the cache of token keys and values


@pytest.mark.parametrize("prompting", ["separate", "joint"])
@pytest.mark.parametrize("arithmetic", ["corrected", "published"])
def test_cached_keys_and_values_give_equal_outputs(arithmetic, prompting):
    network = small_punet("a", "b", arithmetic=arithmetic, prompting=prompting).eval()
    image = image_of(2)
    recorded = network(image), network(image, ["a", "b"]).logits  # with gradients nothing is remembered
    with torch.no_grad():
        first = network(image), network(image, ["a", "b"]).logits
        torch.testing.assert_close(first, recorded, atol=1e-5, rtol=1e-5)
        assert torch.equal(network(image), first[0])
        assert torch.equal(network(image, ["a", "b"]).logits, first[1])
        assert torch.equal(copy.deepcopy(network)(image), first[0])
    with torch.inference_mode():
        assert torch.equal(network(image), first[0])


@torch.no_grad()
def test_keys_and_values_are_projected_once_for_many_images(network, monkeypatch):
    calls = []
    project = network.body.project
    monkeypatch.setattr(network.body, "project", lambda stacked: calls.append(1) or project(stacked))
    for _ in range(3):
        network(image_of())
    assert len(calls) == 1


@pytest.mark.parametrize(
    "tensor",
    [
        "prompts.background",
        "prompts.classes.liver.head_tokens",
        "prompts.classes.liver.tokens.enc2",
        "prompts.classes.liver.bias_tables",
        "prompts.classes.liver.bias_heads",
        "body.encoder.enc1.attention.attn1.qkv.weight",
        "body.decoder.dec0.attention.attn0.norm.weight",
        "body.decoder.dec3.attention.attn1.norm.bias",
    ],
)
@torch.no_grad()
def test_the_cache_notices_changes_in_place(network, tensor):
    image = image_of()
    before = network(image)
    network.get_parameter(tensor).add_(torch.randn_like(network.get_parameter(tensor)))
    cached, fresh = network(image), copy.deepcopy(network)(image)
    assert not torch.equal(cached, before)
    assert torch.equal(cached, fresh)


@torch.no_grad()
def test_the_cache_notices_loaded_weights_and_replaced_classes(network):
    image, other = image_of(), small_punet("liver", "spleen").eval()
    network(image)
    network.load_state_dict(other.state_dict())
    assert torch.equal(network(image), other(image))
    network.prompts.remove_class("liver")
    network.prompts.add_class("liver")
    assert torch.equal(network(image), copy.deepcopy(network)(image))


@torch.no_grad()
def test_the_cache_is_not_shared_between_precisions(network):
    image = image_of()
    expected = network(image)
    with torch.autocast("cpu", torch.bfloat16):
        half = copy.deepcopy(network)(image)
        assert torch.equal(network(image), half)
    assert torch.equal(network(image), expected)
    other = copy.deepcopy(network)
    with torch.autocast("cpu", torch.bfloat16):
        other(image)
    assert torch.equal(other(image), expected)


def test_a_copy_is_independent_of_its_original(network):
    image = image_of()
    with torch.no_grad():
        before = network(image)
        twin = copy.deepcopy(network)
        assert torch.equal(twin(image), before)
        twin.prompts["liver"].head_tokens.add_(torch.randn(4, 8))
        assert not torch.equal(twin(image), before)
        assert torch.equal(network(image), before)


# ranges, modes, training


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({"arithmetic": "published"}, -0.5, 1.5),
        ({"logit_scale": 10.0}, 0.0, 10.0),
        ({"logit_scale": 3.0, "similarity": "mean"}, 0.0, 3.0),
        ({"logit_scale": 1.0, "similarity": "top3", "partition": "block"}, 0.0, 1.0),
    ],
)
@torch.no_grad()
def test_logits_stay_in_their_range(options, low, high):
    network = small_punet("a", **options).eval()
    network.prompts["a"].head_tokens[0] = network(image_of(), ["a"]).embedding[0, :, 3, 3, 0]  # a perfect match
    logits = network(image_of() * 3, ["a"]).logits
    assert logits.min() >= low - 1e-5
    assert logits.max() <= high + 1e-5


def test_published_arithmetic_has_no_logit_scale():
    image = image_of()
    one = small_punet("a", arithmetic="published", logit_scale=10.0).eval()
    assert one(image, ["a"]).logits.max() <= 1.5 + 1e-5


def test_dropout_on_prompts_acts_in_training_and_not_in_evaluation():
    network = small_punet("a", dropout=0.5)
    image = image_of(2)
    with torch.no_grad():
        network.train()
        network.body.eval()
        assert not torch.equal(network(image), network(image))
        network.eval()
        assert torch.equal(network(image), network(image))


def test_prompts_in_training_mode_are_perturbed_anew_in_each_pass_of_an_evaluated_network():
    network = small_punet("a", dropout=0.5).eval()
    network.prompts.train()
    with torch.no_grad():
        image = image_of()
        first, second = network(image), network(image)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "options",
    [
        {"arithmetic": "published"},
        {"partition": "grid"},
        {"partition": "block"},
        {"partition": "block", "window_size": (4, 4, 2), "design_depth": 4, "mlp_ratio": 2.0},
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_every_parameter_that_a_pass_uses_receives_a_gradient(options, training):
    network = small_punet("a", "b", **options).train(training)
    out = network(image_of(2, (32, 32, options.get("design_depth", 1))), ["a", "b"])
    out.logits.square().mean().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("partition", ["grid", "block"])
def test_half_precision_autocast_stays_close(partition):
    network = small_punet("a", partition=partition, window_size=(4, 4, 1)).eval()
    image = image_of(2, (36, 44, 1))
    with torch.no_grad():
        expected = network(image)
        with torch.autocast("cpu", torch.bfloat16):
            found = network(image)
    assert (found.float() - expected).abs().mean() < 0.1 * expected.abs().mean() + 0.02


def test_state_dict_round_trip_gives_equal_outputs(network):
    other = small_punet("liver", "spleen").eval()
    other.load_state_dict(network.state_dict())
    image = image_of()
    with torch.no_grad():
        assert torch.equal(other(image), network(image))


# errors


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (lambda x: (x, ["kidney"]), KeyError, "unknown class 'kidney'; .* liver, spleen"),
        (lambda x: (x, ["liver", "liver"]), ValueError, "one class name for each of the 1 batch elements"),
        (lambda x: (x, "liver"), ValueError, "one class name for each of the 1 batch elements"),
        (
            lambda x: (x[0, 0, :, :, 0], ["liver"]),
            ValueError,
            r"\(B, C, H, W, D\) or \(B, C, H, W\), got shape \(32, 32\)",
        ),
        (lambda x: (x[None],), ValueError, "image must be"),
    ],
    ids=["unknown-class", "too-many-names", "one-string", "too-few-axes", "too-many-axes"],
)
def test_wrong_inputs_are_refused_with_a_sentence(network, arguments, error, says):
    with pytest.raises(error, match=says):
        network(*arguments(image_of()))


def test_unknown_active_classes_are_refused(network):
    with pytest.raises(KeyError, match="unknown class 'kidney'"):
        network.active_classes = ["kidney"]
    with pytest.raises(KeyError, match="unknown class 'kidney'"):
        network.segment(image_of(), ["liver", "kidney"])
    assert network.active_classes == ["liver", "spleen"]


def test_a_network_without_classes_says_so():
    with pytest.raises(ValueError, match="no class to segment; this network knows: none"):
        small_punet()(image_of())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"partition": "stripes"}, r"partition must be one of \('grid', 'block'\), got 'stripes'"),
        ({"prompting": "mixed"}, "prompting must be one of .*'mixed'"),
        ({"arithmetic": "exact"}, "arithmetic must be one of .*'exact'"),
        ({"arithmetic": "published", "partition": "block"}, "grid windows only; use partition='grid'"),
        ({"num_heads": 3}, "num_heads=3 must divide"),
        ({"similarity": "max"}, "similarity must be one of .*'max'"),
        ({"sigma": 0.0}, "sigma and logit_scale must be positive"),
        ({"logit_scale": 0.0}, "sigma and logit_scale must be positive"),
        ({"prompt_depth": "half"}, "prompt depth must be one of .*'half'"),
        ({"tokens_per_class": 0}, "at least one token"),
        ({"window_size": (8, 8)}, "window_size"),
        ({"window_size": (8, 0, 1)}, "window_size"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(options, says):
    with pytest.raises(ValueError, match=says):
        small_punet("a", **options)
