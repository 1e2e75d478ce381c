"""The heads: ranges, formulas, gradients and sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monai_petl.networks.punet.heads import SIMILARITIES, ConvHead, SimilarityHead


def slow_logit(voxel, tokens, aggregation, sigma, slope, scale):
    """One voxel and the tokens of one class, by the formulas."""
    similarity = [
        slope * float(voxel @ token) / max(float(voxel.norm()), 1e-12) / max(float(token.norm()), 1e-12) + 0.5
        for token in tokens
    ]
    if aggregation == "mean":
        value = sum(similarity) / len(similarity)
    elif aggregation == "top3":
        largest = sorted(similarity)[-3:]
        value = sum(largest) / len(largest)
    else:
        powers = [math.exp(s / sigma) for s in similarity]
        value = sum(p * s for p, s in zip(powers, similarity, strict=True)) / sum(powers)
    return scale * value


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("aggregation", SIMILARITIES)
@pytest.mark.parametrize("count", [2, 5])
def test_logits_follow_the_formulas(aggregation, published, count):
    head = SimilarityHead(aggregation, sigma=0.2, logit_scale=7.0, published=published)
    embedding, tokens = torch.randn(2, 6, 3, 2, 1), torch.randn(2, 3, count, 6)
    logits = head(embedding, tokens)
    assert logits.shape == (2, 3, 3, 2, 1)
    for b in range(2):
        for i in range(3):
            expected = slow_logit(
                embedding[b, :, 2, 1, 0],
                tokens[b, i],
                aggregation,
                0.2,
                1.0 if published else 0.5,
                1 if published else 7,
            )
            assert float(logits[b, i, 2, 1, 0]) == pytest.approx(expected, abs=1e-5)


@given(
    aggregation=st.sampled_from(SIMILARITIES),
    spread=st.sampled_from((0.0, 1e-3, 1.0, 100.0)),
    scale=st.sampled_from((1.0, 10.0)),
)
def test_logits_stay_in_their_range(aggregation, spread, scale):
    embedding, tokens = torch.randn(1, 4, 3, 3, 2) * spread, torch.randn(1, 2, 4, 4)
    embedding[0, :, 0, 0, 0], embedding[0, :, 1, 0, 0] = tokens[0, 1, 0], -tokens[0, 1, 0]
    published = SimilarityHead(aggregation, published=True)(embedding, tokens)
    assert published.min() >= -0.5 - 1e-6
    assert published.max() <= 1.5 + 1e-6
    corrected = SimilarityHead(aggregation, logit_scale=scale)(embedding, tokens)
    assert corrected.min() >= -1e-5
    assert corrected.max() <= scale * (1 + 1e-6)


def test_the_default_temperature_selects_tokens_as_the_published_head_does():
    embedding, tokens = torch.randn(1, 6, 4, 4, 1), torch.randn(1, 2, 5, 6)
    published = SimilarityHead(sigma=0.1, published=True)(embedding, tokens)
    corrected = SimilarityHead(sigma=0.05, logit_scale=1.0)(embedding, tokens)
    torch.testing.assert_close(corrected, (published - 0.5) / 2 + 0.5, atol=1e-5, rtol=1e-5)


def test_no_gradient_passes_through_the_selection_of_tokens():
    head = SimilarityHead(logit_scale=1.0)
    embedding, tokens = torch.randn(1, 4, 1, 1, 1), torch.randn(1, 1, 3, 4, requires_grad=True)
    (found,) = torch.autograd.grad(head(embedding, tokens).sum(), tokens)
    similarity = torch.cosine_similarity(embedding.view(1, 4), tokens[0, 0]) * 0.5 + 0.5
    weights = (similarity / head.sigma).softmax(-1).detach()
    (expected,) = torch.autograd.grad((weights * similarity).sum(), tokens)
    torch.testing.assert_close(found, expected)


def test_lengths_of_embedding_and_tokens_do_not_matter():
    head = SimilarityHead()
    embedding, tokens = torch.randn(1, 4, 3, 3, 1), torch.randn(1, 2, 3, 4)
    torch.testing.assert_close(head(embedding * 5, tokens * 0.2), head(embedding, tokens))


def test_classes_do_not_influence_each_other():
    head = SimilarityHead()
    embedding, tokens = torch.randn(1, 4, 3, 3, 1), torch.randn(1, 3, 3, 4)
    torch.testing.assert_close(head(embedding, tokens[:, 1:2]), head(embedding, tokens)[:, 1:2])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"aggregation": "median"}, "similarity must be one of .*'median'"),
        ({"sigma": 0.0}, "positive"),
        ({"logit_scale": -1.0}, "positive"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(options, says):
    with pytest.raises(ValueError, match=says):
        SimilarityHead(**options)


def test_the_similarity_head_holds_no_parameters():
    assert not SimilarityHead().state_dict()


@pytest.mark.parametrize(("channels", "outputs", "count"), [(32, 2, 130), (32, 9, 361), (8, 2, 34)])
def test_the_convolution_head_has_the_published_size(channels, outputs, count):
    head = ConvHead(channels, outputs)
    assert sum(p.numel() for p in head.parameters()) == count
    assert head(torch.randn(2, channels, 4, 3, 1)).shape == (2, outputs, 4, 3, 1)
