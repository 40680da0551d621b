"""Speculative decoding: the distribution is that of one token after the other, in fewer passes."""

import itertools

import pytest
import torch

from reelm.lm.decoding import Run, decode, generate
from reelm.lm.heads import Categorical, Chained, Factorized, Head
from reelm.lm.sampling import Sampling, seeded, truncated
from reelm.lm.sequence import Sequence
from reelm.lm.speculative import Guesses, Jacobi
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import SPECIAL, Vocabulary

CODES, STEPS, GIVEN = 4, 4, 3
HEADS = {
    "categorical": lambda vocabulary: Categorical(vocabulary, 16),
    "factorized": lambda vocabulary: Factorized(vocabulary, 16, (1, 1)),
    "chained": lambda vocabulary: Chained(vocabulary, 16, (1, 1)),
}
SAMPLINGS = {
    "plain": Sampling(),
    "guided": Sampling(temperature=0.9, guidance=2.0),
    "schedule": Sampling(guidance=3.0, guidance_schedule="cosine"),
    "top_k": Sampling(temperature=1.3, top_k=3),
    "top_p": Sampling(temperature=2.0, top_p=0.9, guidance=1.5),
}


def build(head: str, codes: int = CODES, std: float = 0.35) -> tuple[Transformer, Head]:
    torch.manual_seed(0)
    transformer, made = Transformer(16, 1, 2, sites=(4, 4, 4)), HEADS[head](Vocabulary(codes))
    for parameter in [*transformer.parameters(), *made.parameters()]:
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
    return transformer.eval(), made.eval()


def start(rows: int, steps: int = STEPS) -> tuple[Sequence, Sequence, torch.Tensor]:
    where = torch.cartesian_prod(torch.arange(8), torch.arange(2), torch.arange(2))
    ids = torch.tensor([[1, 5, SPECIAL + 2]]).expand(rows, -1)
    given = Sequence(ids, where[:GIVEN].expand(rows, -1, -1), prefix=2)
    return given, given.replace(ids=torch.where(ids == 5, 0, ids)), where[GIVEN : GIVEN + steps]


@torch.no_grad()
def exact(transformer: Transformer, head: Head, sampling: Sampling) -> torch.Tensor:
    """The probability of each sequence of codes, `(CODES,) * STEPS`, by running through all of them."""
    every = torch.tensor(list(itertools.product(range(CODES), repeat=STEPS)))
    given, without, where = start(len(every))
    logs = torch.zeros(len(every), dtype=torch.double)
    hidden = []
    for row in (given, without):
        whole = Sequence(
            torch.cat([row.ids, every + SPECIAL], 1), torch.cat([row.positions, where.expand(len(every), -1, -1)], 1), 2
        )
        hidden.append(transformer(head.embed(whole.ids), whole)[:, GIVEN - 1 : -1])
    for step in range(STEPS):
        scale = sampling.scale(torch.tensor(step / (STEPS - 1)))
        parts = head.split(every[:, step])
        scores = [head.logits_given(h[:, step], parts) for h in hidden]
        for part, with_, not_ in zip(parts, *scores, strict=True):
            p = truncated(not_ + scale * (with_ - not_), sampling.temperature, sampling.top_k, sampling.top_p)
            logs += p.double().gather(-1, part[:, None])[:, 0].log()
    return logs.exp()


def draws(transformer, head, sampling: Sampling, rows: int, times: int = 1) -> torch.Tensor:
    """How often each sequence of codes came out."""
    given, without, where = start(rows)
    generator, found = torch.Generator().manual_seed(1), torch.zeros(CODES**STEPS, dtype=torch.double)
    for _ in range(times):
        ids = generate(transformer, head, given, where, sampling, without, generator) - SPECIAL
        number = (ids * CODES ** torch.arange(STEPS - 1, -1, -1)).sum(1)
        found += torch.bincount(number, minlength=CODES**STEPS)
    return found


def surprise(observed: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chi-square in standard deviations above its mean; cells of few expected draws count as one."""
    expected = probabilities * observed.sum()
    assert observed[expected == 0].sum() == 0
    few = expected < 5
    o, e = (torch.cat([x[~few], x[few].sum()[None]]) for x in (observed, expected))
    freedom = len(e) - 1
    return float((((o - e) ** 2 / e.clamp_min(1e-9)).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize(
    "kind,head",
    [("plain", "categorical"), ("guided", "factorized"), ("schedule", "chained"), ("top_k", "categorical"),
     ("top_p", "chained")],
)  # fmt: skip
@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
def test_the_distribution_of_whole_sequences_is_exact(head, kind, coupling):
    sampling = Sampling(**{**vars(SAMPLINGS[kind]), "decoding": Jacobi(3, coupling, columns=10**6)})
    model, probabilities = build(head), exact(*build(head), sampling)
    assert abs(float(probabilities.sum()) - 1) < 1e-5 and (probabilities > 2e-3).sum() > 12
    assert surprise(draws(*model, sampling, 3000), probabilities) < 4


@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
def test_the_distribution_is_exact_sample_by_sample(coupling):
    """A large batch waits for its slowest at every step; small ones go several tokens a pass."""
    model, sampling = build("chained"), Sampling(top_p=0.9, guidance=1.5, decoding=Jacobi(4, coupling, columns=1000))
    assert surprise(draws(*model, sampling, 25, times=80), exact(*model, sampling)) < 4


def test_a_wrong_distribution_is_noticed():
    model, sampling = build("chained"), Sampling(decoding=Jacobi(4, "maximal", 3, columns=10**6))
    assert surprise(draws(*model, sampling, 4000), exact(*model, sampling)) > 20


def passes(model, sampling: Sampling, steps: int, rows: int = 2) -> tuple[torch.Tensor, int]:
    transformer, head = model
    given, without, where = start(rows, steps)
    count = []
    hook = transformer.register_forward_hook(lambda *_: count.append(1))
    ids = generate(transformer, head, given, where, sampling, without, seeded(list(range(rows))))
    hook.remove()
    return ids, len(count)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "sampling", [Sampling(top_p=0.9, guidance=2.0), Sampling(0.0), Sampling(0.5, guidance_schedule="linear")]
)
def test_with_shared_noise_the_tokens_are_those_of_one_by_one(head, sampling):
    model = build(head, 16 if head == "categorical" else 4)
    plain, most = passes(model, sampling, 20)
    assert most == 20
    for window in (1, 5, 20):
        fast = Sampling(**{**vars(sampling), "decoding": Jacobi(window, columns=1000)})
        ids, count = passes(model, fast, 20)
        assert torch.equal(ids, plain) and count <= 20 and (window > 1 or count == 20)


@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
def test_what_is_sure_takes_few_passes(coupling):
    model = build("categorical", std=0.05)  # each token hardly depends on those before it
    _, count = passes(model, Sampling(decoding=Jacobi(10, coupling)), 20, rows=1)
    assert count <= 8


def test_a_first_guess_stays_with_its_probability_whatever_the_lenience():
    transformer, head = build("categorical")
    given, _, where = start(4000, 1)
    p = float(exact_first(transformer, head)[0])  # the first guess is the first code (see below)
    for lenience in (1.0, 100.0):
        way = Sampling(decoding=Jacobi(2, "maximal", lenience=lenience, columns=10**6))
        ids = generate(transformer, head, given, where, way, None, torch.Generator().manual_seed(0))
        assert float((ids == SPECIAL).float().mean()) == pytest.approx(p, abs=0.03)


@pytest.mark.parametrize("lenience", [1.0, 2.0, 100.0])
def test_lenience_keeps_drawn_guesses_that_often(lenience):
    """The second token was drawn after the first guess; after another first token it stays as often as is said."""
    transformer, head = build("categorical")
    given, _, where = start(40_000, 2)
    way = Sampling(decoding=Jacobi(2, "maximal", lenience=lenience, columns=10**6))
    ids = generate(transformer, head, given, where, way, None, torch.Generator().manual_seed(0)) - SPECIAL
    first = int(ids[:, 0][ids[:, 0] != 0].mode().values)
    q, p = (exact_second(transformer, head, code) for code in (0, first))
    keep = (lenience * p / q).clamp_max(1)
    rest = (p - q).clamp_min(0)
    expected = q * keep + (1 - (q * keep).sum()) * rest / rest.sum()
    after = ids[ids[:, 0] == first, 1]
    found = torch.bincount(after, minlength=len(p)) / len(after)
    assert len(after) > 2000 and (found - expected).abs().max() < 0.03
    assert (p - q).abs().max() > 0.1  # a wrong rule would show


@torch.no_grad()
def exact_second(transformer: Transformer, head: Head, code: int) -> torch.Tensor:
    given, _, where = start(1, 2)
    asked = given.followed_by(torch.tensor([[SPECIAL + code]]), where[:1])
    asked = asked.replace(next_positions=torch.cat([asked.positions[:, 1:], where[1:][None]], 1))
    return head.logits(transformer(head.embed(asked.ids), asked)[0, -1])[0].softmax(-1)


@torch.no_grad()
def exact_first(transformer: Transformer, head: Head) -> torch.Tensor:
    given, _, where = start(1, 1)
    asked = given.replace(next_positions=torch.cat([given.positions[:, 1:], where[None]], 1))
    return head.logits(transformer(head.embed(given.ids), asked)[0, -1])[0].softmax(-1)


def test_lenience_takes_fewer_passes():
    model = build("chained", std=0.6)
    ways = (Sampling(decoding=Jacobi(10, "maximal", k, columns=1000)) for k in (1.0, 3.0, 1e9))
    counts = [passes(model, way, 20, rows=8)[1] for way in ways]
    assert counts[0] > counts[1] > counts[2]


@pytest.mark.parametrize("decoding", [None, Jacobi(6)])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(decoding):
    transformer, head = build("chained")
    given, without, where = start(2, 20)
    sampling = Sampling(top_p=0.9, guidance=2.0, decoding=decoding)
    whole = generate(transformer, head, given, where, sampling, without, seeded([3, 4]))
    for cut in (1, 7, 19, 20):
        rest = list(decode(transformer, head, given, where, sampling, without, seeded([3, 4]), made=whole[:, :cut]))
        assert torch.equal(torch.cat([ids for _, ids in rest], 1), whole) and rest[0][1].shape[1] == cut
        assert [int(n) for numbers, _ in rest for n in numbers] == list(range(20))


def test_what_goes_on_does_not_draw_again_what_was_drawn():
    transformer, head = build("chained")
    for part in head.scores:  # every code is as probable, whatever came before
        torch.nn.init.zeros_(part.weight)
    given, _, where = start(100, 20)
    for decoding in (Jacobi(6, columns=10_000), Jacobi(6, "maximal", columns=10_000)):
        arguments = (transformer, head, given, where, Sampling(decoding=decoding), None)
        made = generate(*arguments, seeded(list(range(100))))[:, :5]
        rest = torch.cat([ids for _, ids in decode(*arguments, seeded(list(range(100))), made=made)], 1)[:, 5:]
        for place in range(5):
            same = (rest[:, place] == made[:, place]).double().mean()
            assert abs(same - 1 / head.size) < 4 * (1 / head.size * (1 - 1 / head.size) / 100) ** 0.5


def test_a_sample_does_not_depend_on_its_neighbours():
    model, sampling = build("chained"), Sampling(guidance=2.0, decoding=Jacobi(6))
    three = passes(model, sampling, 20, rows=3)[0]
    assert torch.equal(three[:1], passes(model, sampling, 20, rows=1)[0])


def test_large_batches_have_short_windows():
    model, sampling = build("chained", std=0.05), Sampling(guidance=2.0, decoding=Jacobi(10, columns=16))
    assert passes(model, sampling, 20, rows=8)[1] == 20 > passes(model, sampling, 20, rows=1)[1]


def test_windows_of_one_are_exact_whatever_the_lenience():
    transformer, head = build("chained", std=0.6)
    given, _, where = start(8, 20)
    ways = (Jacobi(10, "maximal", lenience, columns=16) for lenience in (1.0, 100.0))
    one, other = (
        generate(transformer, head, given, where, Sampling(decoding=way), None, seeded(list(range(8)))) for way in ways
    )
    assert torch.equal(one, other)


def test_first_guesses_come_from_nearby():
    transformer, head = build("chained")
    given, _, where = start(1, 9)  # the given ids end with the token at (0, 1, 0)
    guesses = Guesses(Run(transformer, head, given, where, Sampling()), torch.empty(1, 0, dtype=torch.long))
    guesses.extend(9)
    at = {tuple(place): int(id_) for place, id_ in zip(where.tolist(), guesses.ids[0], strict=True)}
    assert at[0, 1, 1] == SPECIAL  # above it there is an id that the head does not make: the nearest that it does
    assert at[1, 1, 0] == SPECIAL + 2 and at[2, 1, 0] == SPECIAL + 2
    back = torch.tensor([[3, 1, 1], [3, 0, 1], [2, 1, 1]])  # from the last frame to the first: the one after is nearest
    guesses = Guesses(Run(transformer, head, given, back, Sampling()), torch.tensor([[SPECIAL + 1]]))
    guesses.extend(3)
    assert int(guesses.ids[0, 2]) == SPECIAL + 1


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="coupling is one of gumbel, maximal; got none"):
        Jacobi(coupling="none")
    with pytest.raises(ValueError, match="lenience is 1 .exact., or more with coupling=maximal; got 3 with gumbel"):
        Jacobi(4, lenience=3)
    with pytest.raises(ValueError, match="window is a whole number from 1 on; got 0"):
        Jacobi(0)
