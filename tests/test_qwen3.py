import pytest
import torch

from reelm.engine.qwen3 import to_qwen3
from reelm.lm.decoding import generate
from reelm.lm.heads import Categorical, Chained
from reelm.lm.language_model import LanguageModel
from reelm.lm.sampling import Sampling
from reelm.lm.sequence import Sequence
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Vocabulary


def build(**changes) -> LanguageModel:
    torch.manual_seed(0)
    vocabulary = Vocabulary(60)
    options = {"width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "rope": "1d", "sites": None, **changes}
    lm = LanguageModel(Transformer(**options), Categorical(vocabulary, 32, offset=0, size=vocabulary.size - 1))
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return lm.eval()


def test_scores_and_greedy_tokens_are_those_of_transformers():
    lm, ids = build(), torch.randint(0, 300, (2, 12))
    theirs = to_qwen3(lm)
    sequence = Sequence(ids, torch.zeros(2, 12, 3, dtype=torch.long), prefix=1)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits[..., :-1], lm.head.logits(lm(sequence))[0], atol=1e-4, rtol=1e-4)
    where = torch.zeros(9, 3, dtype=torch.long)
    ours = generate(lm.transformer, lm.head, sequence, where, Sampling(0.0))
    options = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(theirs.generate(ids, **options)[:, 12:], ours)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="only lm.rope=1d"):
        to_qwen3(build(rope="3d", heads=2))
    vocabulary = Vocabulary(64)
    with pytest.raises(ValueError, match="only lm.rope=1d"):
        to_qwen3(LanguageModel(Transformer(32, 1, 2, rope="1d", sites=None), Chained(vocabulary, 32, (3, 3))))
