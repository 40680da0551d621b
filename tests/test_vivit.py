"""What only tokenizers of transformers have; what all tokenizers have in common is in test_tokenizer.py."""

import pytest
import torch

from reelm.tokenizers.quantizers import LFQ
from reelm.tokenizers.vivit import Spatial, Temporal, ViViT


def test_attention_in_time_sees_its_place_and_its_window_and_nothing_later():
    torch.manual_seed(0)
    layer = Temporal(16, 2, window=3)
    x = torch.randn(1, 7, 2, 2, 16)
    other = x.clone()
    other[0, 3, 0, 1] = torch.randn(16)
    changed = (layer(x) != layer(other)).any(-1)[0]
    expected = torch.zeros(7, 2, 2, dtype=torch.bool)
    expected[3:6, 0, 1] = True
    assert torch.equal(changed, expected)


def test_attention_in_time_is_softmax_attention_with_a_bias_of_the_distance():
    torch.manual_seed(0)
    layer = Temporal(8, 1, window=3)
    torch.nn.init.normal_(layer.bias)
    q, k, v = torch.randn(3, 1, 5, 1, 1, 1, 8)
    found = layer.attend(q, k, v, None).view(5, 8)
    for t in range(5):
        seen = range(max(0, t - 2), t + 1)
        scores = torch.stack([q[0, t].flatten() @ k[0, j].flatten() / 8**0.5 + layer.bias[0, j - t + 2] for j in seen])
        expected = sum(p * v[0, j].flatten() for p, j in zip(scores.softmax(0), seen, strict=True))
        torch.testing.assert_close(found[t], expected)


def test_attention_in_space_sees_its_frame_alone():
    torch.manual_seed(0)
    layer = Spatial(16, 2)
    x = torch.randn(1, 3, 4, 4, 16)
    other = x.clone()
    other[0, 1, 2, 2] = torch.randn(16)
    changed = (layer(x) != layer(other)).any(-1)[0]
    assert changed[1].all() and not changed[0].any() and not changed[2].any()


def test_attention_in_space_tells_places_apart_by_where_they_lie():
    torch.manual_seed(0)
    layer = Spatial(16, 2)
    x = torch.randn(1, 1, 3, 4, 16)
    assert not torch.allclose(layer(x.flip(3)).flip(3), layer(x), atol=1e-3)  # a bag of patches could not tell


def test_the_decoder_mirrors_the_encoder():
    model = ViViT(LFQ(4), width=16, heads=2, layers="sst")
    assert [type(layer) for layer in model.decoder.layers.stack] == [Temporal, Spatial, Spatial]
    model = ViViT(LFQ(4), width=16, heads=2, layers="st", decoder_layers="stst")
    assert [type(layer) for layer in model.decoder.layers.stack] == [Spatial, Temporal] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "sxt"}, "letters s .* and t .*; got 'sxt'"),
        ({"width": 36, "heads": 8}, "width 36 must be a multiple of four times the 8 heads"),
        ({"window": 0}, "window=0"),
    ],
)
def test_mistakes_are_told_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        ViViT(LFQ(4), **{"width": 32, "heads": 2, **options})
    assert "\n" not in str(error.value)
