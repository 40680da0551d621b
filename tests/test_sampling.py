import itertools

import pytest
import torch

from reelm.engine import seeds
from reelm.lm.decoding import generate
from reelm.lm.heads import Categorical, Factorized
from reelm.lm.sampling import Sampling, guide, sample_logits, seeded, truncated
from reelm.lm.sequence import Sequence
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import SPECIAL, Vocabulary

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 2.0 - 1e-3, -3.0, 0.25])


def counts(draws: int = 20_000, **arguments) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    chosen = sample_logits(LOGITS.expand(draws, -1), generator=generator, **arguments)
    return torch.bincount(chosen, minlength=len(LOGITS)).double()


def agrees(observed: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Chi-square within five standard deviations, and nothing where nothing can be."""
    expected = probabilities.double() * observed.sum()
    inside = expected > 0
    chi = ((observed - expected) ** 2 / expected)[inside].sum()
    freedom = int(inside.sum()) - 1
    return observed[~inside].sum() == 0 and chi <= freedom + 5 * (2 * freedom) ** 0.5 + 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature):
    observed = counts(temperature=temperature)
    assert agrees(observed, (LOGITS / temperature).softmax(-1))
    assert not agrees(observed, (LOGITS / temperature / 1.2).softmax(-1))


def test_no_temperature_takes_the_most_probable():
    assert counts(draws=100, temperature=0)[0] == 100


@pytest.mark.parametrize("k", [1, 3, 8, 100])
def test_top_k_keeps_exactly_k(k):
    kept = LOGITS.topk(min(k, 8)).indices
    expected = torch.zeros(8).index_copy(0, kept, LOGITS[kept].softmax(-1))
    assert agrees(counts(top_k=k), expected)


@pytest.mark.parametrize("p", [0.01, 0.5, 0.8, 0.95])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(p):
    order = LOGITS.argsort(descending=True)
    probabilities = LOGITS.softmax(-1)[order]
    number = next(n for n in range(1, 9) if probabilities[:n].sum() >= p)
    kept = order[:number]
    assert agrees(counts(top_p=p), torch.zeros(8).index_copy(0, kept, LOGITS[kept].softmax(-1)))


def test_top_p_among_many_tokens_equals_sorting_them_all():
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[9.0], [3], [1], [1], [0.1], [5]]
    )
    for rows in (logits[:2], logits):  # a few tokens are enough for all rows, or not
        got = truncated(rows, 1.0, 0, 0.9)
        order = rows.softmax(-1).sort(-1, descending=True)
        number = (order.values.cumsum(-1) < 0.9).sum(-1) + 1
        for row, best, n, p in zip(got, order.indices, number, rows.softmax(-1), strict=True):
            torch.testing.assert_close(row[best[:n]], p[best[:n]] / p[best[:n]].sum())
            assert (row > 0).sum() == n


def test_top_p_counts_within_top_k():
    kept = LOGITS.topk(3).indices  # probabilities about 0.42, 0.42, 0.16 among themselves
    two = kept[:2]
    assert agrees(counts(top_k=3, top_p=0.8), torch.zeros(8).index_copy(0, two, LOGITS[two].softmax(-1)))


def test_guidance_moves_from_the_unconditional_to_the_conditional_and_beyond():
    both = torch.randn(6, 5)
    conditional, unconditional = both[:3], both[3:]
    torch.testing.assert_close(guide(both, 0.0), unconditional)
    torch.testing.assert_close(guide(both, 1.0), conditional)
    torch.testing.assert_close(guide(both, 2.5), unconditional + 2.5 * (conditional - unconditional))


@pytest.mark.parametrize(
    "arguments", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"guidance": -1}]
)
def test_impossible_settings_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Sampling(**arguments)


V = Vocabulary(visual=16, text=8)
PREFIX, KNOWN, STEPS = 4, 2, 9


def parts(kind: str = "categorical", rope: str = "3d"):
    torch.manual_seed(0)
    transformer = Transformer(32, 2, 4, 2, rope=rope)
    head = Categorical(V, 32) if kind == "categorical" else Factorized(V, 32, (2, 2))
    for parameter in [*transformer.parameters(), *head.parameters()]:
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return transformer.eval(), head.eval()


def prompts(rows: int = 2) -> tuple[Sequence, Sequence, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    where = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(4))
    positions = where[: PREFIX + KNOWN].expand(rows, -1, -1)
    ids = torch.randint(0, V.size, (rows, PREFIX + KNOWN), generator=g)
    conditional = Sequence(ids, positions, PREFIX)
    without = ids.clone()
    without[:, 1:3] = 0
    return conditional, conditional.replace(ids=without), where[PREFIX + KNOWN :][:STEPS]


def slow(transformer, head, sequence: Sequence, positions, choose, unconditional=None, guidance=1.0) -> torch.Tensor:
    """Generation by the book: the whole sequence anew for each token, the two halves of guidance apart."""
    made = []
    rows = [sequence] if unconditional is None else [sequence, unconditional]
    for step in range(len(positions)):
        scores = []
        for row in rows:
            ids = torch.cat([row.ids, *made], 1)
            upto = torch.cat([row.positions, positions[:step].expand(len(ids), -1, -1)], 1)
            following = torch.cat([upto[:, 1:], positions[step].expand(len(ids), 1, 3)], 1)
            whole = Sequence(ids, upto, row.prefix, next_positions=following)
            scores.append(head.logits(transformer(head.embed(ids), whole)[:, -1]))
        guided = [s[0] if len(s) == 1 else s[1] + guidance * (s[0] - s[1]) for s in zip(*scores)]
        made.append(head.join(tuple(choose(one) for one in guided))[:, None] + head.offset)
    return torch.cat(made, 1)


@pytest.mark.parametrize("kind", ["categorical", "factorized"])
@pytest.mark.parametrize("rope", ["3d", "1d"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_generation_equals_the_slow_way(kind, rope, guidance):
    transformer, head = parts(kind, rope)
    conditional, without, positions = prompts()
    without = without if guidance != 1 else None
    got = generate(transformer, head, conditional, positions, Sampling(0.0, guidance=guidance), without)
    with torch.no_grad():
        expected = slow(transformer, head, conditional, positions, lambda x: x.argmax(-1), without, guidance)
    assert got.shape == (2, STEPS) and torch.equal(got, expected)
    assert got.min() >= SPECIAL and got.max() < SPECIAL + 16 and len(got.unique()) > 2


def test_sampled_generation_equals_the_slow_way():
    transformer, head = parts()
    conditional, _, positions = prompts()
    got = generate(transformer, head, conditional, positions, Sampling(top_p=0.9), generator=seeded([1, 2]))
    generators = seeded([1, 2])
    with torch.no_grad():
        draw = lambda x: sample_logits(x, top_p=0.9, generator=generators)  # noqa: E731
        assert torch.equal(got, slow(transformer, head, conditional, positions, draw))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_sample_does_not_depend_on_its_neighbours(guidance):
    transformer, head = parts()
    conditional, without, positions = prompts(3)
    sampling = Sampling(guidance=guidance)
    together = generate(transformer, head, conditional, positions, sampling, without, seeded([5, 6, 7]))
    alone = [
        generate(transformer, head, conditional[i : i + 1], positions, sampling, without[i : i + 1], seeded([5 + i]))
        for i in range(3)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_what_is_far_apart_draws_apart():
    """Of a seed torch's generator on CPUs takes 32 bits, and the parts of a call are further apart."""
    far = [0, 7, *(7 + getattr(seeds, part) for part in ("WINDOW", "LEVEL", "STAGE", "ACTIONS", "LINK")), 7 + (1 << 33)]
    drawn = [torch.rand(4, generator=one) for one in seeded(far)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    assert torch.equal(drawn[1], torch.rand(4, generator=torch.Generator().manual_seed(7)))


def test_the_same_seed_gives_the_same_tokens():
    transformer, head = parts()
    conditional, _, positions = prompts()

    def run(seed: int) -> torch.Tensor:
        return generate(transformer, head, conditional, positions, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_the_callback_sees_each_token_as_it_is_made():
    transformer, head = parts()
    conditional, _, positions = prompts()
    seen = []
    ids = generate(transformer, head, conditional, positions, callback=lambda n, new: seen.append((n, new.tolist())))
    assert seen == [(n + 1, ids[:, n : n + 1].tolist()) for n in range(STEPS)]


def test_tokens_made_can_be_learnt_from():
    transformer, head = parts()
    conditional, _, positions = prompts()
    head.embed(generate(transformer, head, conditional, positions)).sum().backward()


def test_mistakes_are_told():
    transformer, head = parts()
    conditional, without, positions = prompts()
    with pytest.raises(ValueError, match="set guidance=1"):
        generate(transformer, head, conditional, positions, Sampling(guidance=2.0))
    with pytest.raises(ValueError, match="prefix"):
        generate(transformer, head, conditional, positions, Sampling(guidance=2.0), without.replace(prefix=1))
    with pytest.raises(ValueError, match="give one a sample"):
        generate(transformer, head, conditional, positions, generator=seeded([1]))
