"""A prompt that blocks attend to instead of standing in the sequence: what it changes, and what it must not."""

import pytest
import torch

from reelm.lm.decoding import generate
from reelm.lm.heads import Categorical
from reelm.lm.language_model import LanguageModel
from reelm.lm.layouts import Axial, DualChannel, SpaceTime
from reelm.lm.masked import Masked, MaskedSampling, fill
from reelm.lm.sampling import Sampling, seeded
from reelm.lm.sequence import Sequence
from reelm.lm.speculative import Jacobi
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import SPECIAL, Special, Vocabulary
from reelm.tokenizers.tokens import Tokens

VOCABULARY = Vocabulary(visual=16, text=8)
GRID, WORDS = (3, 2, 2), 4


def model(masked: bool = False, awake: bool = True, **settings) -> LanguageModel:
    torch.manual_seed(0)
    transformer = Transformer(24, 2, 2, cross_attention=True, **{"sites": (8, 8, 8), **settings})
    head = Masked(VOCABULARY, 24, Categorical) if masked else Categorical(VOCABULARY, 24)
    lm = LanguageModel(transformer, head).eval()
    for weight in lm.parameters() if awake else ():
        torch.nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else None
    return lm


def sequence(words: list[int], video: torch.Tensor | None = None) -> Sequence:
    """<bos>, the words, <bov_o>, and 12 tokens (or none) of video; prompts of the batch in reversed order too."""
    text = torch.tensor([words, words[::-1]]) + VOCABULARY.text_range.start
    one = torch.ones(2, 1, dtype=torch.long)
    ids = torch.cat([one * int(Special.bos), text, one * int(Special.bov_o)], 1)
    places = [(-2, 0, 0), *((-2, 3, i) for i in range(WORDS)), (-2, 7, 0)]
    where = torch.tensor(places)
    prefix = ids.shape[1]
    if video is not None:
        ids, where = torch.cat([ids, video], 1), torch.cat([where, Tokens.positions(GRID)])
    loss = torch.arange(ids.shape[1]).expand(2, -1) >= prefix
    return Sequence(ids, where.expand(2, -1, -1), prefix, loss, text=(1, 1 + WORDS))


def tokens() -> torch.Tensor:
    return torch.randint(16, (2, 12), generator=torch.Generator().manual_seed(0)) + VOCABULARY.visual_range.start


@pytest.mark.parametrize("rope", ["3d", "1d"])
def test_at_first_the_prompt_says_nothing_and_is_in_no_column(rope):
    lm, known = model(awake=False, rope=rope), sequence([1, 2, 3, 4], tokens())
    for block in lm.transformer.blocks:  # all but the attention to the prompt
        torch.nn.init.normal_(block.attention.out.weight)
    states = lm(known)
    assert states.shape == (2, 18, 24) and not states[:, 1:5].any()
    plain = Transformer(24, 2, 2, sites=(8, 8, 8), rope=rope)
    plain.load_state_dict(lm.transformer.state_dict(), strict=False)
    rest = known.without_text()
    assert rest.prefix == 2 and rest.length == 14
    want = plain(lm.head.embed(rest.ids), rest)
    torch.testing.assert_close(torch.cat([states[:, :1], states[:, 5:]], 1), want)


@pytest.mark.parametrize("sites", [(8, 8, 8), None])
def test_words_and_their_order_count_in_each_column(sites):
    lm, video = model(sites=sites), tokens()
    first = lm(sequence([1, 2, 3, 4], video))
    other, swapped = (lm(sequence(words, video)) for words in ([1, 2, 3, 5], [2, 1, 3, 4]))
    for states in (other, swapped):
        assert ((states - first).abs().amax(-1)[:, 5:] > 1e-4).all()


def test_gradients_reach_the_attention_to_the_prompt():
    lm = model()
    lm.loss(sequence([1, 2, 3, 4], tokens()))[0].backward()
    for name, weight in lm.transformer.named_parameters():
        if "cross" in name or "text_norm" in name:
            assert weight.grad.any(), name


@pytest.mark.parametrize("layout", [None, Axial(), SpaceTime(), DualChannel(2)], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_decoding_with_a_cache_equals_the_whole(layout, guidance):
    lm, start, where = model(layout=layout, kv_heads=1), sequence([1, 2, 3, 4]), Tokens.positions(GRID)
    if layout is not None and layout.channels == 2:
        torch.nn.init.constant_(lm.transformer.blocks[0].gate, 0.5)
    without = start.replace(ids=torch.where(start.ids >= VOCABULARY.text_range.start, int(Special.pad), start.ids))
    sampling = Sampling(0.0, guidance=guidance)
    made = generate(lm.transformer, lm.head, start, where, sampling, without)
    again = generate(
        lm.transformer, lm.head, start, where, Sampling(0.0, guidance=guidance, decoding=Jacobi()), without
    )
    assert torch.equal(made, again) and len(made.unique()) > 1
    whole = sequence([1, 2, 3, 4], made)
    logits = lm.head.logits(lm(whole))[0]
    if guidance != 1:
        other = lm.head.logits(lm(without.replace(ids=torch.cat([without.ids, made], 1), positions=whole.positions,
                                                  next_positions=None, loss=None)))[0]  # fmt: skip
        logits = other + guidance * (logits - other)
    assert torch.equal(logits[:, 5:-1].argmax(-1) + SPECIAL, made)


def test_filling_in_is_guided_by_the_prompt():
    lm, hidden = model(masked=True), torch.full((2, 12), int(Special.mask))
    start = sequence([1, 2, 3, 4], hidden)
    without = start.replace(ids=torch.where(start.ids >= VOCABULARY.text_range.start, int(Special.pad), start.ids))

    def filled(prompt: Sequence, guidance: float) -> torch.Tensor:
        sampling = MaskedSampling(steps=3, guidance=guidance)
        return fill(lm.transformer, lm.head, prompt, sampling, without, seeded([3, 3]))

    told, untold, far = filled(start, 1.0), filled(without, 1.0), filled(start, 4.0)
    assert torch.equal(untold[0], untold[1])  # one seed, and nothing told
    assert not torch.equal(told[0], told[1]) and not torch.equal(told, untold) and not torch.equal(told, far)
    assert torch.equal(filled(start, 0.0), untold)


def test_embedded_text_is_attended_to_as_well():
    lm = model(context_width=5)
    known = sequence([0, 0, 0, 0], tokens())
    known = known.replace(ids=known.ids.index_fill(1, torch.arange(1, 5), int(Special.text)))
    vectors, mask = torch.randn(2, WORDS, 5), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    states = lm(known.replace(context=vectors, context_mask=mask))
    other = vectors.clone()
    other[:, 3] += 1.0
    changed = (lm(known.replace(context=other, context_mask=mask)) - states).abs().amax((1, 2))
    assert changed[0] == 0 and changed[1] > 1e-4  # what does not count says nothing
