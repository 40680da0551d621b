from types import SimpleNamespace

import pytest
import torch

from reelm.lm import linear as few_rows
from reelm.lm.linear import FEW, linear
from reelm.lm.norm import rms_norm
from reelm.lm.sequence import Sequence
from reelm.lm.transformer import Rotary, Transformer, rotate
from reelm.lm.vocabulary import Special

LENGTH, PREFIX = 14, 5


def model(seed: int = 0, **changes) -> Transformer:
    """A small model whose every weight matters (fresh ones begin as the identity)."""
    torch.manual_seed(seed)
    built = Transformer(**{"width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "mlp_ratio": 2.0, **changes})
    for block in built.blocks:
        torch.nn.init.normal_(block.attention.out.weight, std=0.2)
        torch.nn.init.normal_(block.mlp.out.weight, std=0.2)
    return built.eval()


def sequence(rows: int = 2, length: int = LENGTH, prefix: int = PREFIX, **changes) -> Sequence:
    g = torch.Generator().manual_seed(1)
    positions = torch.randint(0, 8, (rows, length, 3), generator=g)
    return Sequence(torch.zeros(rows, length, dtype=torch.long), positions, prefix, **changes)


def vectors(rows: int = 2, length: int = LENGTH, width: int = 32) -> torch.Tensor:
    return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rope", ["3d", "1d"])
def test_later_columns_never_change_earlier_ones(rope):
    m, s, x = model(rope=rope), sequence(), vectors()
    before = m(x, s)
    for column in range(PREFIX, LENGTH):
        changed = x.clone()
        changed[:, column] += 1
        after = m(changed, s)
        assert torch.equal(after[:, :column], before[:, :column])
        assert (after[:, column:] != before[:, column:]).any(-1).all()


def test_a_column_of_the_prefix_changes_all():
    m, s, x = model(), sequence(), vectors()
    changed = x.clone()
    changed[:, PREFIX - 1] += 1
    assert (m(changed, s) != m(x, s)).any(-1).all()


def test_rows_do_not_see_each_other():
    m, s, x = model(), sequence(), vectors()
    torch.testing.assert_close(m(x[:1], s[:1]), m(x, s)[:1])


def test_a_fresh_model_is_the_identity_up_to_the_norm():
    m, x = Transformer(32, 2, 4, sites=None), vectors()
    torch.testing.assert_close(m(x, sequence()), rms_norm(x, torch.ones(32)))


@pytest.mark.parametrize("rope,kv_heads", [("3d", 2), ("1d", 4)])
@pytest.mark.parametrize("first", [PREFIX, PREFIX + 3])
def test_decoding_with_a_cache_equals_the_whole(rope, kv_heads, first):
    m, s, x = model(rope=rope, kv_heads=kv_heads), sequence(), vectors()
    cache = m.new_cache(2, LENGTH)

    def part(columns: slice) -> torch.Tensor:
        piece = s.replace(
            ids=s.ids[:, columns], positions=s.positions[:, columns], next_positions=s.next_positions[:, columns],
            prefix=PREFIX if columns.start == 0 else 0,
        )  # fmt: skip
        return m(x[:, columns], piece, cache)

    with torch.no_grad():
        pieces = [part(slice(0, first)), *(part(slice(i, i + 1)) for i in range(first, LENGTH))]
        torch.testing.assert_close(torch.cat(pieces, 1), m(x, s), atol=1e-5, rtol=1e-5)
        cache.rewind(first)
        torch.testing.assert_close(part(slice(first, LENGTH)), m(x, s)[:, first:], atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match=f"room for {LENGTH} columns"):
            part(slice(first, first + 1))


def test_rotary_scores_depend_on_differences_only():
    rotary = Rotary(24, 3, 100.0)
    q, k = vectors(1, 1, 24), vectors(2, 1, 24)[1:]

    def score(a, b):
        a, b = (rotate(x[:, :, None], *rotary(torch.tensor([[place]]))) for x, place in ((q, a), (k, b)))
        return (a * b).sum()

    torch.testing.assert_close(score((1, 2, 3), (4, 0, 5)), score((11, 5, 0), (14, 3, 2)), atol=1e-5, rtol=1e-5)
    for moved in ((5, 0, 5), (4, 1, 5), (4, 0, 6)):
        assert (score((1, 2, 3), (4, 0, 5)) - score((1, 2, 3), moved)).abs() > 1e-4
    x = vectors(1, 3, 24)[:, :, None]
    turned = rotate(x, *rotary(torch.tensor([[[0, 0, 0], [3, 1, 2], [-9, 0, 0]]])))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], x[:, 0])


def test_one_dimensional_positions_ignore_the_data():
    s, x = sequence(), vectors()
    m = model(rope="1d", sites=None)
    assert torch.equal(m(x, s), m(x, s.replace(positions=s.positions + 3)))


def test_each_column_knows_the_place_of_the_next():
    m, s, x = model(), sequence(), vectors()
    other = s.next_positions.clone()
    other[:, -1, 1] += 1
    changed = m(x, s.replace(next_positions=other))
    assert torch.equal(changed[:, :-1], m(x, s)[:, :-1]) and (changed[:, -1] != m(x, s)[:, -1]).any()
    far = torch.full_like(other, 10_000)  # beyond the tables
    assert torch.equal(m(x, s.replace(next_positions=far)), m(x, s.replace(next_positions=far - 5)))


def test_embedded_text_takes_the_text_columns():
    m, x = model(context_width=6), vectors()
    ids = torch.zeros(2, LENGTH, dtype=torch.long)
    ids[:, 1:4] = Special.text
    context = torch.randn(2, 3, 6)
    s = sequence(context=context).replace(ids=ids)
    noise = x.clone()
    noise[:, 1:4] = 7.0
    assert torch.equal(m(noise, s), m(x, s))  # what stood there does not matter
    assert (m(x, s.replace(context=context + 1)) != m(x, s)).any()
    masked = s.replace(context_mask=torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(m(x, masked), m(x, masked.replace(context=context + 1)))
    with pytest.raises(ValueError, match="one vector for each of the 6 <text> tokens"):
        m(x, s.replace(context=context[:, :2]))
    with pytest.raises(ValueError, match="lm.context_width"):
        model()(x, s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_and_everywhere(dtype):
    m, s = model().train(), sequence()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        out = m(vectors(), s)
    (out.float() * vectors()).sum().backward()
    for name, parameter in m.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_dropout_only_in_training():
    m, s, x = model(dropout=0.5), sequence(), vectors()
    assert torch.equal(m(x, s), m(x, s))
    m.train()
    assert not torch.equal(m(x, s), m(x, s))


@pytest.mark.parametrize("weight", [torch.rand(24), torch.rand(5, 24)], ids=["one", "by head"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_norm_and_its_gradient_equal_the_formula(weight, dtype, tolerance, monkeypatch):
    monkeypatch.setattr("reelm.lm.norm.ROWS", 50)  # several pieces, the last one short
    x = torch.randn(3, 7, 5, 24).to(dtype).requires_grad_()
    weight = weight.clone().requires_grad_()
    exact = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    got = rms_norm(x, weight)
    grad = torch.randn_like(exact)
    assert got.dtype is dtype
    torch.testing.assert_close(got.float(), exact, atol=tolerance, rtol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, weight).float(), exact, atol=tolerance, rtol=tolerance)
    gradients = torch.autograd.grad(got, (x, weight), grad.to(dtype))
    for a, b in zip(gradients, torch.autograd.grad(exact, (x, weight), grad), strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("left", (False, True))
@pytest.mark.parametrize("rows", range(FEW + 2))
def test_products_of_few_rows_are_the_same_in_either_way(rows, left, monkeypatch):
    monkeypatch.setattr(few_rows, "_left_is_faster", lambda *shape: left)
    x, weight = torch.randn(rows, 1, 8), torch.randn(6, 8)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight), x @ weight.t())


@pytest.mark.parametrize("seconds, left", (((0.01, 0.002), True), ((0.002, 0.01), False), ((0.01, 0.0099), False)))
def test_products_of_few_rows_go_the_way_that_is_clearly_faster_here(seconds, left, monkeypatch):
    clock = [0.0]

    def product(taken: float):
        def passing(*factors) -> None:
            clock[0] += taken

        return passing

    monkeypatch.setattr(few_rows, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(few_rows.F, "linear", product(seconds[0]))
    monkeypatch.setattr(few_rows, "_weights_left", product(seconds[1]))
    assert few_rows._left_is_faster.__wrapped__(1, 6, 8, 1) is left


def test_wrong_shapes_are_refused_in_one_line():
    for arguments, message in (
        ({"width": 30, "heads": 4}, "multiple of heads"),
        ({"heads": 4, "kv_heads": 3}, "multiple of kv_heads"),
        ({"rope": "2d"}, "rope is 3d"),
        ({"attention": "fast"}, "attention is one of auto"),
        ({"dropout": 1.0}, "dropout"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            Transformer(**{"width": 32, "depth": 1, "heads": 4, **arguments})
        assert "\n" not in str(error.value)


def kept_and_gradients(m: Transformer, s: Sequence, x: torch.Tensor) -> tuple[int, list[torch.Tensor]]:
    """Bytes that the forward pass keeps for the backward pass beside the weights, and the gradients."""
    weights = {p.untyped_storage().data_ptr() for p in m.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = m(x, s).square().sum()
    return sum(kept.values()), list(torch.autograd.grad(loss, list(m.parameters())))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_keeps_less_and_gives_the_same_gradients(dropout):
    m, s, x = model(depth=6, dropout=dropout).train(), sequence(), vectors()
    torch.manual_seed(0)
    plain, expected = kept_and_gradients(m, s, x)
    m.checkpointing = True
    torch.manual_seed(0)
    less, gradients = kept_and_gradients(m, s, x)
    torch.testing.assert_close(gradients, expected)
    assert less < plain / 4
    with torch.no_grad():
        assert torch.isfinite(m(x, s)).all()
