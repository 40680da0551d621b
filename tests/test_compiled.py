"""Compiled passes: shapes that do not change, and the tokens that eager passes make."""

import pytest
import torch

from reelm.lm.cache import Cache
from reelm.lm.compiled import Passes
from reelm.lm.decoding import OneByOne, generate
from reelm.lm.heads import Chained
from reelm.lm.language_model import LanguageModel
from reelm.lm.layouts import Axial
from reelm.lm.precision import lighten
from reelm.lm.sampling import Sampling, seeded
from reelm.lm.sequence import Sequence
from reelm.lm.speculative import Jacobi
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Vocabulary

V = Vocabulary(64, text=16)
WAYS = {"one by one": OneByOne(), "jacobi": Jacobi(6)}


def language_model(**options) -> LanguageModel:
    torch.manual_seed(0)
    lm = LanguageModel(Transformer(width=64, depth=2, heads=2, **options), Chained(V, 64)).eval()
    for parameter in lm.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return lm


def make(lm: LanguageModel, way: str, prompt: int = 5) -> tuple[torch.Tensor, int]:
    ids = torch.randint(256 + 64, V.size, (2, prompt), generator=torch.Generator().manual_seed(prompt))
    sequence = Sequence(ids, torch.zeros(2, prompt, 3, dtype=torch.long), prefix=prompt)
    where = torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(3))
    passes = []
    sampling = Sampling(guidance=2.0, decoding=WAYS[way])
    made = generate(
        lm.transformer, lm.head, sequence, where, sampling, sequence, seeded([0, 1]), lambda *_: passes.append(1)
    )
    return made, len(passes)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"rope": "1d", "sites": None}, {"kv_heads": 1}], ids=str)
def test_compiled_passes_make_the_tokens_of_eager_ones(options, way):
    lm = language_model(**options)
    eager, count = make(lm, way)
    lm.transformer.passes = Passes(lm.transformer, backend="aot_eager")
    assert torch.equal(make(lm, way)[0], eager) and make(lm, way)[1] == count


def test_prompts_of_other_lengths_are_not_compiled_anew():
    torch._dynamo.reset()
    lm = language_model()
    plain = [make(lm, "jacobi", prompt)[0] for prompt in (5, 9, 12)]
    lm.transformer.passes = Passes(lm.transformer, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert all(
            torch.equal(make(lm, "jacobi", prompt)[0], before) for prompt, before in zip((5, 9, 12), plain, strict=True)
        )


def test_columns_that_were_never_written_do_no_harm():
    """What a mask hides is multiplied by 0, and 0 times nan is nan: a cache begins with numbers, whatever lay there."""
    torch.full((64, 1 << 16), torch.nan)  # for the allocator to hand out again
    cache = Cache(8, (4, 4, 1024, 16))
    assert all(not buffer.any() for buffer in (*cache.keys, *cache.values))


@pytest.mark.slow
def test_the_compiler_of_torch_makes_the_same_tokens():
    lm = language_model()
    eager, _ = make(lm, "jacobi")
    lm.transformer.passes = Passes(lm.transformer)
    assert torch.equal(make(lm, "jacobi")[0], eager)


def test_what_cannot_be_compiled_is_one_line():
    with pytest.raises(ValueError, match="lm.layout or lm.cross_attention are not compiled; leave compile=true out"):
        Passes(Transformer(width=64, depth=3, heads=2, layout=Axial()))
    with pytest.raises(ValueError, match="dtype=int8 cannot be compiled on a CPU"):
        lighten(language_model(), "int8", compiled=True)
