"""The head of video and sound."""

import pytest
import torch
from torch import nn

from reelm.engine import store
from reelm.lm.audio_visual import AudioVisual
from reelm.lm.heads import Categorical, Chained
from reelm.lm.language_model import LanguageModel
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Vocabulary

V = Vocabulary(64, 24, 16)


def head(visual=Categorical) -> AudioVisual:
    made = AudioVisual(V, 12, visual, 3)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("visual", [Categorical, Chained])
def test_each_id_is_predicted_by_its_part(visual):
    made, hidden = head(visual), torch.randn(2, 9, 12)
    ids = torch.tensor([[3, 256, 300, 320, 325, 327, 328, 335, 336]] * 2)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0, 1]] * 2).bool()
    loss, metrics = made.loss(hidden, ids, mask)
    parts = [(made.visual, [1, 2]), (made.sound[0], [3, 4, 5]), (made.sound[1], [6]), (made.sound[2], [8])]
    total = 0
    for part, columns in parts:
        here = torch.zeros_like(mask)
        here[:, columns] = True
        total = total + len(columns) * part.loss(hidden, ids, here)[0]
    torch.testing.assert_close(loss, total / 7)
    torch.testing.assert_close(metrics["nll"], loss)
    assert 0 <= metrics["accuracy"] <= 1
    weighted = made.loss(hidden, ids, mask.float() * torch.tensor([1, 0, 0, 2, 2, 2, 0, 0, 0]))[0]
    torch.testing.assert_close(weighted, made.sound[0].loss(hidden, ids, mask & (ids < 328) & (ids > 319))[0])
    torch.testing.assert_close(made.loss(hidden, ids, 3.0 * mask)[0], loss)
    with pytest.raises(ValueError, match="its loss mask is empty"):
        made.loss(hidden, ids, torch.zeros_like(mask))


def test_levels_are_ranges_and_all_ids_have_vectors():
    made = head()
    assert [(level.offset, level.size) for level in made.sound] == [(320, 8), (328, 8), (336, 8)]
    vectors = made.embed(torch.arange(V.size)[None])[0]
    assert torch.cdist(vectors, vectors).add(torch.eye(V.size)).min() > 1e-3
    for level in made.sound:
        assert torch.equal(level.embed(torch.arange(V.size)[None])[0], vectors)
        drawn = level.sample(torch.randn(50, 12), lambda logits: logits.argmax(-1))
        assert ((drawn >= level.offset) & (drawn < level.offset + 8)).all()
    assert sum(p.numel() for p in made.sound.parameters()) == 24 * 12  # no table of ids of their own
    with pytest.raises(ValueError, match="24 audio ids are not the same number of codes for each of 5 levels"):
        AudioVisual(V, 12, Categorical, 5)


def test_it_is_saved_and_grows_from_a_model_without_sound(tmp_path):
    def transformer() -> Transformer:
        return Transformer(12, 1, 2, sites=None)

    small = Vocabulary(64, 0, 10)
    silent = LanguageModel(transformer(), Chained(small, 12))
    for parameter in silent.parameters():
        nn.init.normal_(parameter, std=0.5)
    store.save(silent, tmp_path / "silent")
    loud = LanguageModel(transformer(), AudioVisual(V, 12, Chained, 3))
    store.grow(loud, tmp_path / "silent", "lm")
    ids = torch.cat([torch.arange(320), torch.arange(small.text_range.start, small.size)])
    moved = torch.where(ids >= small.text_range.start, ids + V.audio, ids)
    torch.testing.assert_close(loud.head.embed(moved[None]), silent.head.embed(ids[None]))
    hidden = torch.randn(5, 12)
    for a, b in zip(loud.head.visual.logits(hidden), silent.head.logits(hidden), strict=True):
        torch.testing.assert_close(a, b)
    store.save(loud, tmp_path / "loud")
    again = store.load(tmp_path / "loud")
    assert torch.equal(again.head.sound[1].scores.weight, loud.head.sound[1].scores.weight)
    assert torch.equal(again.head.sound[2].embed(moved[None]), loud.head.embed(moved[None]))
    more = LanguageModel(transformer(), AudioVisual(V, 12, Chained, 3))
    store.grow(more, tmp_path / "loud", "lm")
    assert torch.equal(more.head.embed(moved[None]), loud.head.embed(moved[None]))
