"""Groups of tokens in one pass, by other orders than the raster."""

import pytest
import torch

from reelm.lm.decoding import decode, generate
from reelm.lm.heads import Chained
from reelm.lm.parallel import Blocks, Diagonal
from reelm.lm.sampling import Sampling, seeded
from reelm.lm.sequence import Sequence
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Vocabulary

FRAMES, SIDE = 2, 4
PASSES = {  # of each frame
    Diagonal(): 2 * SIDE - 1,
    Blocks(2, 2): 4 + 3,
    Blocks(1, 1): SIDE * SIDE,
    Blocks(4, 1): 4 + 3,
    Blocks(3, 1): 2 + 7,  # of unequal sizes: 2 rows each, so two regions
}


def model():
    torch.manual_seed(0)
    transformer, head = Transformer(16, 2, 2, sites=(4, 4, 4)), Chained(Vocabulary(16), 16, (2, 2))
    for parameter in [*transformer.parameters(), *head.parameters()]:
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return transformer.eval(), head.eval()


def start(rows: int = 2):
    ids = torch.tensor([[1, 5, 3]]).expand(rows, -1)
    positions = torch.tensor([[-2, 0, 0], [-2, 1, 0], [-2, 2, 0]]).expand(rows, -1, -1)
    where = torch.cartesian_prod(torch.arange(FRAMES), torch.arange(SIDE), torch.arange(SIDE))
    given = Sequence(ids, positions, prefix=3)
    return given, given.replace(ids=torch.where(ids == 5, 0, ids)), where


def run(decoding, made=None, guidance: float = 2.0, from_last: bool = False):
    transformer, head = model()
    given, without, where = start()
    where = where.unflatten(0, (FRAMES, -1)).flip(0).flatten(0, 1) if from_last else where
    sampling = Sampling(guidance=guidance, decoding=decoding)
    return list(decode(transformer, head, given, where, sampling, without, seeded([1, 2]), made))


@pytest.mark.parametrize("from_last", [False, True])
@pytest.mark.parametrize("decoding", PASSES, ids=str)
def test_every_token_is_made_once_frame_by_frame(decoding, from_last):
    steps = run(decoding, from_last=from_last)
    assert len(steps) == FRAMES * PASSES[decoding]
    numbers = torch.cat([n for n, _ in steps])
    assert numbers.sort().values.tolist() == list(range(FRAMES * SIDE * SIDE))
    assert (numbers[: SIDE * SIDE] < SIDE * SIDE).all()


def test_one_block_is_next_token_prediction():
    transformer, head = model()
    given, without, where = start()
    made = [
        generate(transformer, head, given, where, Sampling(guidance=2.0, decoding=d), without, seeded([1, 2]))
        for d in (Blocks(1, 1), None)
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize("decoding", [Diagonal(), Blocks(2, 2)], ids=str)
def test_each_token_is_asked_for_at_its_place_and_read_once_for_those_after_it(decoding):
    """The columns that the passes leave in the cache are those of the tokens made, each once."""
    transformer, head = model()
    given, _, where = start()
    asked, kept = [], []
    transformer.site_tables.register_forward_hook(lambda _, inputs, out: asked.append(inputs[0][0].tolist()))
    transformer.register_forward_hook(lambda _, inputs, out: kept.append(inputs[2].length - len(given.ids[0])))
    steps = list(decode(transformer, head, given, where, Sampling(decoding=decoding), generator=seeded([1, 2])))
    before = 0
    for (numbers, _), places, columns in zip(steps, asked, kept, strict=True):
        assert all(where[n].tolist() in places for n in numbers)
        assert columns >= before
        before += len(numbers)


@pytest.mark.parametrize("decoding", [Diagonal(), Blocks(2, 2)], ids=str)
def test_an_interrupted_run_goes_on(decoding):
    whole = run(decoding)
    made = torch.cat([ids for _, ids in whole[:5]], 1)
    again = run(decoding, made)
    assert all(torch.equal(a[1], b[1]) and torch.equal(a[0], b[0]) for a, b in zip(whole, again, strict=True))


def test_impossible_blocks_are_refused():
    with pytest.raises(ValueError, match="rows and columns of blocks are whole numbers from 1 on; got 0 and 2"):
        Blocks(0, 2)
