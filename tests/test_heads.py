from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reelm.lm import heads, sampling
from reelm.lm.heads import Categorical, Chained, Factorized, Head, cross_entropy
from reelm.lm.sequence import Sequence
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import SPECIAL, Vocabulary

V = Vocabulary(visual=64, audio=8, text=16)
WIDTH = 12


def randomized(head: Head) -> Head:
    torch.manual_seed(0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


def all_heads() -> list[Head]:
    return [
        randomized(head)
        for head in (
            Categorical(V, WIDTH),
            Categorical(V, WIDTH, tied=True),
            Categorical(V, WIDTH, bits=6),
            Factorized(V, WIDTH, (4, 2)),
            Factorized(V, WIDTH, (3, 1, 2), tied=False),
        )
    ]


def example(head: Head):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(head.offset, head.offset + head.size, (3, 9), generator=g)
    mask = torch.rand(3, 9, generator=g) < 0.5
    return torch.randn(3, 9, WIDTH, generator=g), ids, mask


def joint(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """Log-probability of each code, by enumeration."""
    codes = torch.arange(head.size)
    parts = zip(head.logits(hidden), head.split(codes))
    return sum(logits.log_softmax(-1)[..., part] for logits, part in parts)


@pytest.mark.parametrize("head", all_heads())
def test_loss_is_the_cross_entropy_of_the_next_id(head):
    hidden, ids, mask = example(head)
    logs = joint(head, hidden)
    terms, right = [], []
    for row in range(3):
        for column in range(1, 9):
            if mask[row, column]:
                scores, target = logs[row, column - 1], ids[row, column] - head.offset
                terms.append(-scores[target])
                right.append(float(scores.argmax() == target))
    loss, metrics = head.loss(hidden, ids, mask)
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    torch.testing.assert_close(metrics["nll"], loss)
    assert metrics["accuracy"].item() == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("head", all_heads())
def test_codes_are_a_distribution(head):
    hidden, _, _ = example(head)
    torch.testing.assert_close(joint(head, hidden).logsumexp(-1), torch.zeros(3, 9), atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", all_heads())
def test_parts_of_codes_round_trip(head):
    codes = torch.arange(head.size)
    assert torch.equal(head.join(head.split(codes)), codes)


@pytest.mark.parametrize("head", all_heads())
def test_every_id_has_a_vector_of_its_own(head):
    vectors = head.embed(torch.arange(V.size)[None])[0]
    assert vectors.shape == (V.size, WIDTH)
    assert torch.cdist(vectors, vectors).add(torch.eye(V.size)).min() > 1e-3
    torch.testing.assert_close(vectors[SPECIAL : SPECIAL + 64], head.embed_codes(torch.arange(64)))


@pytest.mark.parametrize("head", all_heads())
def test_loss_in_chunks_is_the_same(head, monkeypatch):
    hidden, ids, mask = example(head)
    hidden.requires_grad_()

    def run():
        loss, metrics = head.loss(hidden, ids, mask.float() * 0.5)
        used = [p for p in (hidden, *head.parameters())]
        return loss, metrics["accuracy"], torch.autograd.grad(loss, used, allow_unused=True)

    whole = run()
    monkeypatch.setattr(heads, "LOGITS_AT_ONCE", 4 * head.size_of_logits)
    monkeypatch.setattr(heads, "ROWS_OF_LOGITS", 3)
    torch.testing.assert_close(run(), whole)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return out


@pytest.mark.parametrize("make", [Categorical, partial(Factorized, bits=(9, 3)), partial(Chained, bits=(9, 3))])
def test_scores_are_never_made_for_more_ids_than_a_chunk_forward_or_backward(make, monkeypatch):
    head = randomized(make(Vocabulary(4096), 8))
    hidden, ids = torch.randn(1, 301, 8, requires_grad=True), torch.randint(SPECIAL, SPECIAL + 4096, (1, 301))
    numbers = []
    for chunk in (300, 16):
        monkeypatch.setattr(heads, "LOGITS_AT_ONCE", chunk * head.size_of_logits)
        with Largest() as largest:
            head.loss(hidden, ids, torch.ones_like(ids))[0].backward()
        numbers.append(largest.numbers)
    widest, tables = max(head.part_sizes), max(p.numel() for p in head.parameters())
    assert numbers[0] == 300 * widest and numbers[1] == max(16 * widest, tables)


def test_weights_count():
    head = all_heads()[0]
    hidden, ids, _ = example(head)
    one, two = (torch.zeros(3, 9) for _ in range(2))
    one[0, 3], two[1, 5] = 1, 1
    a, b = (head.loss(hidden, ids, mask)[0] for mask in (one, two))
    torch.testing.assert_close(head.loss(hidden, ids, one + 3 * two)[0], (a + 3 * b) / 4)


@pytest.mark.parametrize("rows", [1, 1 << 20])
def test_cross_entropy_and_its_gradient_equal_torch(rows, monkeypatch):
    monkeypatch.setattr(heads, "ROWS_OF_LOGITS", rows)
    logits, targets = (torch.randn(7, 11) * 3).requires_grad_(), torch.randint(0, 11, (7,))
    weights = torch.rand(7)
    expected = F.cross_entropy(logits, targets, reduction="none")
    got, right = cross_entropy(logits, targets)
    torch.testing.assert_close(got, expected)
    assert torch.equal(right.bool(), logits.argmax(-1) == targets)
    a, b = (torch.autograd.grad((value * weights).sum(), logits) for value in (got, expected))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("head", all_heads())
def test_samples_follow_the_distribution(head):
    hidden = example(head)[0][0, :1] * 0.3
    draws = 20_000
    g = torch.Generator().manual_seed(0)
    ids = head.sample(hidden.expand(draws, -1), lambda x: torch.multinomial(x.softmax(-1), 1, generator=g)[:, 0])
    counts = torch.bincount(ids - head.offset, minlength=head.size).double()
    expected = joint(head, hidden[0]).exp().double() * draws
    chi = ((counts - expected) ** 2 / expected.clamp_min(1e-9))[expected > 5].sum()
    cells = int((expected > 5).sum())
    assert chi < cells + 5 * (2 * cells) ** 0.5


def test_another_range_may_be_predicted():
    head = randomized(Categorical(V, WIDTH, offset=V.audio_range.start, size=len(V.audio_range)))
    assert head.logits(torch.zeros(1, WIDTH))[0].shape == (1, 8)
    assert int(head.sample(torch.zeros(1, WIDTH), lambda x: x.argmax(-1))) in V.audio_range
    vectors = head.embed(torch.arange(V.size)[None])[0]
    assert torch.cdist(vectors, vectors).add(torch.eye(V.size)).min() > 1e-3


def test_many_codes_need_small_tables_only():
    vocabulary = Vocabulary(visual=1 << 18)
    head = Factorized(vocabulary, 16)
    assert sum(p.numel() for p in head.parameters()) == (SPECIAL + 2 * 512) * 16
    ids = torch.tensor([[256, 256 + (1 << 18) - 1]])
    assert head.loss(torch.randn(1, 2, 16), ids, torch.tensor([[False, True]]))[0].isfinite()


def test_fresh_heads_know_nothing():
    for head in (Categorical(V, WIDTH), Categorical(V, WIDTH, bits=6)):
        hidden, ids, mask = example(head)
        assert head.loss(hidden, ids, mask)[0].item() == pytest.approx(torch.tensor(64.0).log().item(), abs=1e-5)


def test_wrong_ranges_are_refused():
    with pytest.raises(ValueError, match="set head.bits=0"):
        Categorical(V, WIDTH, bits=5)
    with pytest.raises(ValueError, match="not all in a vocabulary of 344"):
        Factorized(V, WIDTH, (9, 9))
    head = Categorical(V, WIDTH)
    hidden, ids, mask = example(head)
    with pytest.raises(ValueError, match="loss mask is empty"):
        head.loss(hidden, ids, torch.zeros_like(mask))


@pytest.mark.parametrize("head", [Categorical(V, 32, bits=6), Factorized(V, 32, (3, 3))])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_tiny_batch_is_learnt_by_heart(head, autocast):
    torch.manual_seed(0)
    model = Transformer(32, 2, 2)
    ids = torch.randint(256, 320, (4, 20))
    positions = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(5)).expand(4, -1, -1)
    mask = torch.zeros(4, 20, dtype=torch.bool)
    mask[:, 4:] = True
    sequence = Sequence(ids, positions, 4, mask)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-2, weight_decay=0.0)
    for _ in range(80):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, metrics = head.loss(model(head.embed(ids), sequence), ids, sequence.loss)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in parameters)
        optimizer.step()
    assert loss < 0.1 and metrics["accuracy"] > 0.98


def test_chained_loss_is_the_joint_cross_entropy_and_its_samples_follow_it():
    """The loss is -log p(a) - log p(b | a), and sampling draws b given the a that was drawn."""
    torch.manual_seed(0)
    vocabulary = Vocabulary(visual=8)
    head = heads.Chained(vocabulary, 12, bits=(1, 2))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    hidden = torch.randn(1, 12)
    joint = torch.zeros(8)
    first = head._score(hidden, 0, ()).log_softmax(-1)[0]
    for a in range(2):
        second = head._score(hidden, 1, (torch.tensor([a]),)).log_softmax(-1)[0]
        joint[a * 4 : a * 4 + 4] = first[a] + second
    torch.testing.assert_close(joint.exp().sum(), torch.tensor(1.0))
    for code in range(8):
        ids = torch.tensor([[0, 256 + code]])
        loss, _ = head.loss(hidden.expand(1, 2, 12), ids, torch.tensor([[False, True]]))
        torch.testing.assert_close(loss, -joint[code])
    generator = torch.Generator().manual_seed(1)
    drawn = (
        head.sample(hidden.expand(20000, 12), lambda logits: sampling.sample_logits(logits, generator=generator)) - 256
    )
    share = torch.bincount(drawn, minlength=8) / 20000
    assert ((share - joint.exp()).abs() < 4 * (joint.exp() * (1 - joint.exp()) / 20000).sqrt() + 1e-3).all()


def test_chained_guidance_goes_on_from_one_choice_in_both_halves():
    torch.manual_seed(0)
    head = heads.Chained(Vocabulary(visual=64), 12, bits=(3, 3))
    ids = head.sample(torch.randn(6, 12), lambda logits: sampling.guide(logits, 2.0).argmax(-1))
    assert ids.shape == (3,)


def test_chained_halves_are_found():
    assert heads.Chained(Vocabulary(visual=1 << 15), 8).bits == (9, 6)
    with pytest.raises(ValueError, match="power of two"):
        heads.Chained(Vocabulary(visual=1000), 8)
