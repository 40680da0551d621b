import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask

from reelm.engine import store
from reelm.lm.attention import visible
from reelm.lm.layouts import Axial, DualChannel, Layout, Nearby, SpaceTime
from reelm.lm.sequence import Sequence
from reelm.lm.transformer import Transformer

TEXT, GRID = 4, (3, 2, 3)
PLACES = [(t, r, c) for t in range(GRID[0]) for r in range(GRID[1]) for c in range(GRID[2])]
LENGTH = TEXT + len(PLACES)
LAYOUTS = [Axial(), Axial(("row", "time")), Nearby((3, 1, 3)), Nearby((1, 3, 3)), SpaceTime(), DualChannel(1)]
BY_HAND = {
    "time": lambda q, k: q[1:] == k[1:],
    "row": lambda q, k: q[:2] == k[:2],
    "column": lambda q, k: (q[0], q[2]) == (k[0], k[2]),
    "frame": lambda q, k: q[0] == k[0],
    "past": lambda q, k: q[1:] == k[1:] and k[0] <= q[0],
    "one back": lambda q, k: q[0] - k[0] == 1,
    "313": lambda q, k: abs(q[0] - k[0]) <= 1 and q[1] == k[1] and abs(q[2] - k[2]) <= 1,
    "133": lambda q, k: q[0] == k[0] and abs(q[1] - k[1]) <= 1 and abs(q[2] - k[2]) <= 1,
}
RULES = [("time", "row", "column"), ("row", "time"), ("313",), ("133",), ("frame", "past"), ("frame", "one back")]


def places() -> torch.Tensor:
    text = [(-2, i, 0) for i in range(TEXT)]
    return torch.tensor(text + PLACES)


def sequence(masked: bool, known: int = 4, rows: int = 2) -> Sequence:
    where = places().expand(rows, -1, -1)
    ids = torch.zeros(rows, LENGTH, dtype=torch.long)
    if masked:
        return Sequence(ids, where, LENGTH, next_positions=where)
    return Sequence(ids, where, TEXT + known)


def by_hand(rule: str, s: Sequence) -> torch.Tensor:
    seen = visible(LENGTH, LENGTH, s.prefix)
    for i, asked in enumerate(s.next_positions[0].tolist()):
        for j, place in enumerate(s.positions[0].tolist()):
            inside = asked[0] >= 0 and BY_HAND[rule](tuple(asked), tuple(place))
            seen[i, j] &= i == j or place[0] < 0 or inside
    return seen


def model(layout: Layout | None, seed: int = 0, **changes) -> Transformer:
    torch.manual_seed(seed)
    settings = {"width": 32, "depth": 3, "heads": 4, "kv_heads": 2, "mlp_ratio": 2.0, "layout": layout}
    m = Transformer(**{**settings, **changes})
    for name, parameter in m.named_parameters():
        if parameter.ndim > 1 or name.endswith("gate"):
            torch.nn.init.normal_(parameter, std=0.2)
    return m.eval()


def vectors(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, LENGTH, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout, rules", list(zip(LAYOUTS, RULES)), ids=str)
def test_masks_are_what_the_names_say(layout, rules, masked):
    s = sequence(masked)
    asked, at = s.next_positions[0], s.positions[0]
    assert layout.rules == len(rules)
    for number, rule in enumerate(rules):
        mask = layout.mask(number, asked, at, s.prefix)
        assert torch.equal(mask, by_hand(rule, s))
        sees = layout.sees(number, asked, at, s.prefix)
        flex = create_mask(lambda b, h, i, j: sees(i, j), None, None, LENGTH, LENGTH, device="cpu")  # noqa: B023
        assert torch.equal(flex[0, 0], mask)
        last = layout.mask(number, asked[-2:], at, s.prefix if masked else 0)
        expected = mask[-2:] if masked else by_hand(rule, s.replace(prefix=0))[-2:]
        assert torch.equal(last, expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("text", [TEXT, 0])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_ways_to_compute_are_equal(layout, masked, text):
    s = sequence(masked)
    asked, at = s.next_positions[0, TEXT - text :], s.positions[0, TEXT - text :]
    prefix, length = s.prefix - TEXT + text, len(at)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 8, generator=g, requires_grad=True) for heads in (4, 2, 2))
    slow = text == 0 or layout not in (LAYOUTS[0], LAYOUTS[2])
    for backend in ("auto",) if slow else ("auto", "flex"):
        for rule, view in enumerate(layout.views(asked, at, prefix, backend)):
            mask = layout.mask(rule, asked, at, prefix)
            expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            if backend == "flex":  # on CPUs without a backward pass
                with torch.no_grad():
                    torch.testing.assert_close(view(q.detach(), k.detach(), v.detach()), expected.detach())
                continue
            torch.testing.assert_close(view(q, k, v), expected)
            weight = torch.randn(expected.shape, generator=g)
            for a, b in zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (view(q, k, v), expected))):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_space_and_time_are_batches_where_all_is_seen_and_a_mask_elsewhere():
    layout, s = SpaceTime(), sequence(True)
    names = [view.__name__ for view in layout.views(s.positions[0], s.positions[0], LENGTH, "auto")]
    assert names == ["within_frames", "along_time"]
    jumbled = s.positions[0].flip(0)
    for other, prefix in ((jumbled, LENGTH), (s.positions[0], TEXT), (s.positions[0, :-1], LENGTH - 1)):
        assert all(view.__name__ == "view" for view in layout.views(other, other, prefix, "auto"))


@pytest.mark.parametrize("first", [TEXT + 4, TEXT + 7])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_decoding_with_a_cache_equals_the_whole(layout, first):
    m, s, x = model(layout), sequence(False), vectors()
    cache = m.new_cache(2, LENGTH)

    def part(columns: slice) -> torch.Tensor:
        piece = s.replace(
            ids=s.ids[:, columns], positions=s.positions[:, columns], next_positions=s.next_positions[:, columns],
            prefix=s.prefix if columns.start == 0 else 0,
        )  # fmt: skip
        return m(x[:, columns], piece, cache)

    with torch.no_grad():
        pieces = [part(slice(0, first)), *(part(slice(i, i + 1)) for i in range(first, LENGTH))]
        whole = m(x, s)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)
        cache.rewind(first)
        torch.testing.assert_close(part(slice(first, LENGTH)), whole[:, first:], atol=1e-5, rtol=1e-5)


def reach(layout: Layout, column: int, depth: int, masked: bool = True) -> set[tuple[int, int, int]]:
    """The places of the grid that a hidden state depends on."""
    m, s, x = model(layout, depth=depth), sequence(masked), vectors().requires_grad_()
    slopes = torch.autograd.grad(m(x, s)[0, TEXT + column].sum(), x)[0][0, TEXT:]
    return {PLACES[i] for i in slopes.abs().sum(-1).nonzero()[:, 0].tolist()}


def test_godiva_the_receptive_field_of_a_token_is_the_union_of_its_axes():
    here, column = PLACES[10], 10
    union = set()
    for axis in ("time", "row", "column"):
        field = reach(Axial((axis,)), column, depth=1)
        assert field == {place for place in PLACES if BY_HAND[axis](here, place)}
        union |= field
    assert len(union) == sum(GRID) - 2
    assert reach(Axial(), column, depth=3) == set(PLACES)  # and through three layers everything


def test_nuwa_each_layer_widens_the_neighbourhood_by_one_window():
    for depth in (1, 2):
        near = {p for p in PLACES if all(abs(a - b) <= depth for a, b in zip(p, PLACES[0]))}
        assert reach(Nearby((3, 3, 3)), 0, depth) == near


def test_genie_earlier_frames_know_nothing_of_later_ones():
    m, s, x = model(SpaceTime(), depth=4), sequence(True), vectors()
    changed = x.clone()
    changed[:, -6:] += 1  # the last frame
    before, after = m(x, s), m(changed, s)
    assert torch.equal(before[:, :-6], after[:, :-6]) and (before[:, -6:] != after[:, -6:]).any(-1).all()
    assert reach(SpaceTime(), 7, depth=2) == {place for place in PLACES if place[0] <= 1}


@pytest.mark.parametrize("masked", [False, True])
def test_cogvideo_with_a_closed_gate_is_the_image_model_on_each_frame(masked, tmp_path):
    image = model(Nearby((1, 9, 9)) if masked else None)  # text does not see the frame
    store.save(image, tmp_path / "lm")
    video = Transformer(32, 3, 4, 2, 2.0, layout=DualChannel())
    store.grow(video, tmp_path, "lm")  # as init=... does
    video.eval()
    s, x = sequence(masked, known=0), vectors()
    whole, size = video(x, s), GRID[1] * GRID[2]
    for frame in range(GRID[0]):
        columns = torch.cat([torch.arange(TEXT), torch.arange(size) + TEXT + frame * size])
        at = places()[columns].clone()
        at[TEXT:, 0] = 0
        at = at.expand(2, -1, -1)
        one = Sequence(s.ids[:, columns], at, TEXT + size if masked else TEXT, next_positions=at if masked else None)
        alone = image(x[:, columns], one)
        kept = slice(TEXT, None if masked else -1)  # the last column of a frame already asks for the next frame
        torch.testing.assert_close(whole[:, columns][:, kept], alone[:, kept], atol=1e-5, rtol=1e-5)
    for block in video.blocks:
        torch.nn.init.constant_(block.gate, 0.5)
    assert not torch.allclose(video(x, s)[:, TEXT:], whole[:, TEXT:])
    video(x, s).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in video.blocks.parameters())


def test_layouts_are_kept_with_a_model(tmp_path):
    m = model(Nearby((3, 1, 3)))
    store.save(m, tmp_path)
    loaded = store.load(tmp_path)
    assert loaded.layout == m.layout and torch.equal(loaded(vectors(), sequence(True)), m(vectors(), sequence(True)))
    for layout in LAYOUTS:
        assert store.build(store.describe(layout)) == layout


def test_mistakes_are_told():
    for wrong, match in (
        (lambda: Axial(("depth",)), "axes are some of time, row, column"),
        (lambda: Axial(()), "axes are some of"),
        (lambda: Nearby((3, 2, 3)), "three odd numbers"),
        (lambda: DualChannel(0), "window is 1 frame or more"),
        (lambda: Transformer(32, 1, 2, rope="1d", layout=DualChannel()), "rope=3d"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()
    s = sequence(True)
    with pytest.raises(ValueError, match="all rows of a batch have the same positions"):
        model(SpaceTime())(vectors(), s.replace(positions=s.positions + torch.arange(2)[:, None, None]))
