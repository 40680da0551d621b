import pytest
import torch
from torch import nn

from reelm.lm.audio_visual import AudioVisual
from reelm.lm.heads import Categorical, Chained
from reelm.lm.language_model import LanguageModel
from reelm.lm.masked import Masked
from reelm.lm.sequence import Sequence
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Special, Vocabulary
from reelm.lm.weighting import Weighting

V = Vocabulary(64, 24, 16)  # three levels of sound, of 8 codes each
VIDEO, SOUND, TEXT = V.visual_range.start, V.audio_range.start, V.text_range.start


def sequence(known: int = 0) -> Sequence:
    """A word, three frames of two codes, the first `known` of which are not to be predicted, and sound of two codes a
    level."""
    ids = [
        TEXT,
        *range(VIDEO, VIDEO + 6),
        int(Special.boa_o),
        *(SOUND + 8 * level + i for level in range(3) for i in (1, 4)),
    ]
    times = [-2, 0, 0, 1, 1, 2, 2, -2, *[0, 1] * 3]
    positions = torch.tensor([[time, 0, 0] for time in times])
    loss = torch.tensor([[False, *(i >= known for i in range(6)), False, *[True] * 6]])
    return Sequence(torch.tensor([ids]), positions[None], prefix=1 + known, loss=loss)


def test_each_id_has_its_weight():
    plain = sequence()
    assert Weighting().of(plain, V, 3) is plain.loss
    assert Weighting(onset=32).of(plain, V) is plain.loss  # there is no sound
    frames = Weighting(frames=(2, 3)).of(plain, V, 3)
    assert frames.tolist() == [[0, 2, 2, 3, 3, 1, 1, 0, *[1] * 6]]
    assert Weighting(levels=(4, 2, 0.5)).of(plain, V, 3).tolist() == [[0, *[1] * 6, 0, 4, 4, 2, 2, 0.5, 0.5]]
    everything = Weighting((2, 3), (4, 2, 0.5), onset=5).of(plain, V, 3)
    assert everything.tolist() == [[0, 2, 2, 3, 3, 1, 1, 0, 20, 4, 10, 2, 2.5, 0.5]]
    known = Weighting((2, 3)).of(sequence(known=3), V, 3)
    assert known.tolist() == [[0, 0, 0, 0, 3, 1, 1, 0, *[1] * 6]]


def test_weights_that_cannot_be():
    for wrong in ((1, 0), 3, "a"):
        with pytest.raises(ValueError, match="frame_weights are a list of numbers above 0; got "):
            Weighting(frames=wrong)
    with pytest.raises(ValueError, match="level_weights are 3 numbers, one for each level"):
        Weighting(levels=(1, 1)).check(3)
    with pytest.raises(ValueError, match="onset=0; give a number above 0"):
        Weighting(onset=0)


def head() -> AudioVisual:
    made = AudioVisual(V, 12, Categorical, 3)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def test_the_loss_is_the_weighted_mean_and_the_log_is_not():
    made, given, hidden = head(), sequence(), torch.randn(1, 14, 12)
    weights = Weighting((2, 3), (4, 2, 0.5), onset=5).of(given, V, 3)
    loss, logged = made.loss(hidden, given.ids, weights)
    each = []
    for column in given.loss[0].nonzero()[:, 0]:
        alone = torch.zeros_like(given.loss)
        alone[0, column] = True
        each.append(made.loss(hidden, given.ids, alone)[0])
    values, counts = torch.stack(each), weights[given.loss]
    torch.testing.assert_close(loss, (counts * values).sum() / counts.sum())
    torch.testing.assert_close(logged["nll"], values.mean())
    torch.testing.assert_close(logged["nll"], made.loss(hidden, given.ids, given.loss)[1]["nll"])


def test_masked_heads_take_weights():
    masked, given = Masked(V, 12, Categorical), sequence()
    given = given.replace(loss=given.loss & (given.ids < SOUND))
    first = Weighting((1000.0,)).of(given, V)
    states = torch.randn(1, 14, 12)
    for parameter in masked.parameters():
        nn.init.normal_(parameter)
    torch.manual_seed(0)
    loss = masked.learn(lambda _: states, given.replace(loss=first))[0]
    alone = given.loss & (given.positions[..., 0] == 0)
    torch.testing.assert_close(loss, masked.loss(states, given.ids, alone)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", [Categorical, Chained])
def test_divergence_is_that_of_what_may_come(kind):
    made, given = kind(V, 12), sequence()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    one, other = torch.randn(2, 1, 14, 12)
    mask = given.loss & (given.ids < SOUND)
    found = made.divergence(one, other, given.ids, mask)
    assert (found[~mask] == 0).all() and (found[mask] > 0.01).all()
    for column in mask[0].nonzero()[:, 0]:
        p, q = (made.logits(states[0, column - 1])[0].log_softmax(-1) for states in (one, other))
        torch.testing.assert_close(found[0, column], (p.exp() * (p - q)).sum())
    assert not made.divergence(one, one, given.ids, mask).any() and not found.requires_grad
    swapped = torch.where(mask, given.ids.flip(1), given.ids).where(given.ids.flip(1) < SOUND, VIDEO)
    torch.testing.assert_close(made.divergence(one, other, swapped, mask)[mask], found[mask])  # whatever came


def test_ids_count_by_what_the_prompt_tells_of_them():
    torch.manual_seed(0)
    lm = LanguageModel(Transformer(12, 1, 2, sites=None), head())
    for parameter in lm.parameters():
        nn.init.normal_(parameter, std=0.5)
    given = sequence()
    without = given.replace(ids=torch.where(given.ids == TEXT, int(Special.pad), given.ids))
    plain = lm.loss(given)[0]
    torch.testing.assert_close(lm.loss(given, unprompted=without, prompt_weight=0.0)[0], plain)
    torch.testing.assert_close(lm.loss(given, unprompted=given, prompt_weight=8.0)[0], plain)
    told = lm.head.divergence(lm(given), lm(without), given.ids, given.loss)
    assert (told[given.loss] > 0).all()
    loss, logged = lm.loss(given, unprompted=without, prompt_weight=8.0)
    torch.testing.assert_close(loss, lm.head.loss(lm(given), given.ids, given.loss * (1 + 8 * told))[0])
    torch.testing.assert_close(logged["nll"], plain)
    assert (loss - plain).abs() > 1e-3
