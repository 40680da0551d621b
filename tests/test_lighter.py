"""Lighter weights: nearly the same products, only where nothing is learned, chosen by trying."""

import pytest
import torch

from reelm.lm import precision
from reelm.lm.heads import Chained, Factorized
from reelm.lm.language_model import LanguageModel
from reelm.lm.precision import FORMATS, PACKERS, fastest, lighten
from reelm.lm.sequence import Sequence
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Vocabulary


def model(head: type = Chained) -> LanguageModel:
    torch.manual_seed(0)
    lm = LanguageModel(Transformer(64, 2, 2, sites=None), head(Vocabulary(64), 64, (3, 3)))
    for parameter in lm.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.125)
    return lm.eval()


def scores(lm: LanguageModel) -> torch.Tensor:
    ids = torch.arange(256, 272)[None]
    positions = torch.zeros(1, 16, 3, dtype=torch.long)
    return torch.cat(lm.head.logits_given(lm(Sequence(ids, positions, 4)), lm.head.split(ids - 256)), -1)


@pytest.mark.parametrize("head", [Chained, Factorized])
@pytest.mark.parametrize("dtype,least", [("bfloat16", 40), ("int8", 25)])
def test_scores_hardly_change_and_only_where_nothing_is_learned(head, dtype, least):
    lm = model(head)
    exact = scores(lm).detach()
    assert lighten(lm, dtype) == dtype
    with torch.inference_mode():
        light = scores(lm)
    assert not torch.equal(light, exact)
    assert 10 * torch.log10(exact.var() / (light - exact).var()) > least  # decibels
    assert torch.equal(scores(lm), exact)  # with gradients
    lighten(lm, "float32")
    with torch.no_grad():
        torch.testing.assert_close(scores(lm), exact)


def test_without_the_cpu_s_kernels_int8_gives_nearly_the_same(monkeypatch):
    weight, x = torch.randn(32, 64), torch.randn(3, 5, 64)
    fast = PACKERS["int8"](weight)(x)
    monkeypatch.setattr(precision, "_integer_kernels", lambda: False)
    slow = PACKERS["int8"](weight)(x)
    assert slow.shape == fast.shape == (3, 5, 32)
    for y in (slow, fast):
        assert (y - x @ weight.t()).norm() < 0.03 * (x @ weight.t()).norm()


def test_the_machine_chooses(monkeypatch):
    lm = model()
    assert lighten(lm, "auto") in FORMATS

    def absent(weight):
        raise RuntimeError("not here")

    monkeypatch.setitem(PACKERS, "int8", absent)
    assert fastest(lm) != "int8"
    monkeypatch.setitem(PACKERS, "bfloat16", lambda weight: lambda x: [x @ weight.t() for _ in range(20)][0])
    assert fastest(lm) == "float32"


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match="dtype is one of auto, float32, bfloat16, int8; got int4"):
        lighten(model(), "int4")
