import pytest
import torch
from torch import nn

from reelm.data.clip import Clip
from reelm.engine.video_lm import VideoLM
from reelm.lm.heads import Categorical, Chained, Factorized
from reelm.lm.language_model import LanguageModel
from reelm.lm.masked import MASK, SCHEDULES, Masked, MaskedSampling, counts, fill
from reelm.lm.sampling import Sampling, seeded
from reelm.lm.sequence import Sequence
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import SPECIAL, Vocabulary
from reelm.tasks.generation import Generation
from reelm.tasks.known_frames import KnownFrames
from reelm.tasks.packing import Packer, interpolate
from reelm.tasks.painting import Painting
from reelm.tasks.task import Given
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import LFQ
from reelm.tokenizers.text import SentencePieceText

V = Vocabulary(visual=16, text=8)
PREFIX, GRID = 5, (3, 2, 2)
N = GRID[0] * GRID[1] * GRID[2]
PLAIN = MaskedSampling(guidance=1.0)


def head(kind: str = "categorical", **changes) -> Masked:
    codes = {
        "categorical": lambda: Categorical(V, 32),
        "factorized": lambda: Factorized(V, 32, (2, 2)),
        "chained": lambda: Chained(V, 32, (3, 1)),
    }[kind]()
    return Masked(V, 32, codes, **changes)


def model(kind: str = "categorical", **changes) -> LanguageModel:
    """One whose every weight matters."""
    torch.manual_seed(0)
    lm = LanguageModel(Transformer(32, 2, 4, sites=(4, 4, 4)), head(kind, **changes))
    for parameter in lm.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return lm.eval()


def canvas(rows: int = 2, known: int = 2, interior: bool = False) -> Sequence:
    """A prompt, `known` tokens of the clip, and the others to predict."""
    g = torch.Generator().manual_seed(1)
    text = torch.stack([torch.full((PREFIX,), -2), torch.arange(PREFIX), torch.zeros(PREFIX, dtype=torch.long)], 1)
    places = torch.cartesian_prod(*(torch.arange(n) for n in GRID))
    ids = torch.cat([torch.randint(0, 9, (rows, PREFIX), generator=g), SPECIAL + codes(rows, g)], 1)
    loss = torch.zeros(ids.shape, dtype=torch.bool)
    loss[:, PREFIX + known :] = True
    conditions = torch.full_like(ids, MASK)
    conditions[:, -3:] = SPECIAL + codes(rows, g)[:, -3:]
    positions = torch.cat([text, places]).expand(rows, -1, -1)
    return Sequence(ids, positions, PREFIX + known, loss, interior=conditions if interior else None)


def codes(rows: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, V.visual, (rows, N), generator=generator)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total, steps", [(1, 5), (2, 2), (7, 3), (12, 12), (320, 12), (320, 300), (5, 1)])
def test_each_step_settles_one_token_or_more_and_the_last_all(schedule, total, steps):
    left = counts(total, steps, schedule)
    assert len(left) == min(steps, total) and left[-1] == 0
    assert all(before > after >= 0 for before, after in zip([total, *left], left))


def test_the_cosine_schedule_is_that_of_the_paper():
    assert counts(256, 8) == [251, 236, 212, 181, 142, 97, 49, 0]  # floor(256 cos(pi k / 16))


@pytest.mark.parametrize("interior", [False, True])
def test_what_is_hidden_in_training(interior):
    s, h = canvas(200, interior=interior), head()
    hidden = h.hide(s)
    assert not (hidden & ~s.loss).any() and hidden.any(1).all()
    share = hidden.sum(1) / s.loss[0].sum()
    assert 0.55 < share.mean() < 0.8  # the mean of the cosine is 2 / pi, rounded up to whole tokens
    shown = h.shown(s, hidden)
    assert shown.prefix == s.length and shown.loss is None and torch.equal(shown.next_positions, s.positions)
    assert torch.equal(shown.ids[~hidden], s.ids[~hidden])
    expected = s.interior if interior else torch.full_like(s.ids, MASK)
    assert torch.equal(shown.ids[hidden], expected[hidden])
    assert (shown.interior[~hidden] == MASK).all()


def test_the_least_share_and_whole_frames():
    s = canvas(100, known=4)
    assert (head(least=0.5).hide(s).sum(1) >= 4).all()
    frames = head(whole_frames=1.0).hide(s)[:, PREFIX + 4 :].view(100, 2, 4)
    assert (frames.all(-1) == frames.any(-1)).all() and frames.any((1, 2)).all()
    assert {int(n) for n in frames.all(-1).sum(1)} == {1, 2}


@pytest.mark.parametrize("reconstruct, refine", [(1.0, 1.0), (0.0, 2.0), (0.5, 3.0)])
def test_the_loss_is_that_of_the_definition(reconstruct, refine, monkeypatch):
    lm = model("factorized", reconstruct=reconstruct, refine=refine)
    s = canvas(3, interior=True)
    hidden = lm.head.hide(s)
    monkeypatch.setattr(lm.head, "hide", lambda _: hidden)
    loss, metrics = lm.loss(s)
    total = weight = nll = unknown = 0.0
    states = lm(lm.head.shown(s, hidden))
    for row in range(3):
        for column in range(s.length):
            if not s.loss[row, column]:
                continue
            high, low = (scores.log_softmax(-1) for scores in lm.head.codes.logits(states[row, column]))
            code = int(s.ids[row, column]) - SPECIAL
            value = -(high[code // 4] + low[code % 4])
            kind = reconstruct
            if hidden[row, column]:
                kind = 1.0 if s.interior[row, column] == MASK else refine
                nll, unknown = nll + value, unknown + 1
            total, weight = total + kind * value, weight + kind
    torch.testing.assert_close(loss, total / weight)
    torch.testing.assert_close(metrics["nll"], nll / unknown)


@pytest.mark.parametrize("kind", ["categorical", "factorized", "chained"])
def test_the_gradient_reaches_everything(kind):
    lm = model(kind).train()
    lm.loss(canvas(8, interior=True))[0].backward()
    still = [name for name, p in lm.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


@pytest.mark.parametrize("kind", ["categorical", "factorized", "chained"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("by_frame", [False, True])
def test_what_is_known_stays_and_all_else_is_filled_in(kind, guidance, by_frame):
    lm, s = model(kind), canvas(interior=True)
    seen = []
    lm.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[1].ids.clone()))
    made = []
    ids = fill(
        lm.transformer, lm.head, s, MaskedSampling(guidance=guidance, steps=3, by_frame=by_frame), s,
        seeded([1, 2]), callback=lambda count, ids: made.append((count, ids.clone())),
    )  # fmt: skip
    assert ids.shape == (2, N - 2) and (ids >= SPECIAL).all() and (ids < SPECIAL + 16).all()
    assert torch.equal(ids, made[-1][1]) and made[-1][0] == N - 2
    known = ~s.loss[0]
    assert len(seen) == (3 + 3 + 2 if by_frame else 3)  # the first frame has but two tokens to make
    assert all(torch.equal(view[:2, known], s.ids[:, known]) for view in seen)
    start = seen[0][:2, ~known]
    assert torch.equal(start, s.interior[:, ~known])
    for (count, before), (_, after) in zip(made, made[1:]):
        settled = before != MASK
        assert (settled.sum(1) == count).all()
        assert torch.equal(after[settled], before[settled])
    if by_frame:
        assert torch.equal(seen[4][:2, -4:], s.interior[:, -4:])  # the last frame waits for the one before it


def test_a_sample_depends_on_its_seed_alone_and_no_guidance_computes_nothing_twice():
    lm, s = model("factorized"), canvas(3)
    rows = []
    hook = lm.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    together = fill(lm.transformer, lm.head, s, PLAIN, generator=seeded([5, 6, 7]))
    assert set(rows) == {3} and len(rows) == 10
    hook.remove()
    for i in range(3):
        assert torch.equal(
            fill(lm.transformer, lm.head, s[i : i + 1], PLAIN, generator=seeded([5 + i]))[0], together[i]
        )
    same = fill(lm.transformer, lm.head, s, Sampling(), None, seeded([5, 6, 7]))  # a plain sampling has the defaults
    assert torch.equal(same, together)
    with pytest.raises(ValueError, match="set guidance=1"):
        fill(lm.transformer, lm.head, s, MaskedSampling(guidance=2.0))


class Conditionals(nn.Module):
    """In place of a transformer: exact log-probabilities of hidden binary tokens, given those that are settled."""

    def __init__(self, joint: torch.Tensor) -> None:
        super().__init__()
        self.joint = joint

    def forward(self, x: torch.Tensor, s: Sequence) -> torch.Tensor:
        count = self.joint.ndim
        values = torch.cartesian_prod(*[torch.arange(2)] * count)  # (2^n, n)
        ids = s.ids[:, -count:, None].transpose(1, 2)
        fits = ((ids == MASK) | (ids - SPECIAL == values)).all(-1)  # (B, 2^n)
        weight = fits * self.joint.flatten()
        out = torch.full((*s.ids.shape, 2), -torch.inf)
        for bit in (0, 1):
            out[:, -count:, bit] = ((values == bit)[None] * weight[..., None]).sum(1).log()
        return out


def hidden_bits(rows: int) -> Sequence:
    loss = torch.arange(4).expand(rows, -1) > 0
    return Sequence(torch.full((rows, 4), MASK), torch.zeros(rows, 4, 3, dtype=torch.long), 1, loss)


def joint_and_draws(**sampling) -> tuple[torch.Tensor, torch.Tensor]:
    joint = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(0)) ** 3
    joint /= joint.sum()
    vocabulary = Vocabulary(visual=2)
    h = Masked(vocabulary, 2, Categorical(vocabulary, 2))
    h.codes.scores.weight.data.copy_(torch.eye(2))
    s = hidden_bits(20_000)
    ids = fill(Conditionals(joint), h, s, MaskedSampling(guidance=1.0, **sampling)) - SPECIAL
    return joint, torch.bincount(ids @ torch.tensor([4, 2, 1]), minlength=8) / 20_000


def agree(share: torch.Tensor, expected: torch.Tensor) -> bool:
    expected = expected.flatten().double()
    chi = ((share - expected) ** 2 / expected).sum() * 20_000
    return chi < 7 + 5 * 14**0.5


def test_one_token_a_step_in_any_order_draws_from_the_joint_distribution():
    joint, share = joint_and_draws(steps=3, noise=1e6)
    assert agree(share, joint)


def test_all_tokens_in_one_step_draw_from_the_marginals():
    joint, share = joint_and_draws(steps=1)
    a, b, c = joint.sum((1, 2)), joint.sum((0, 2)), joint.sum((0, 1))
    assert agree(share, a[:, None, None] * b[:, None] * c) and not agree(share, joint)


def test_without_noise_the_surest_is_settled_first():
    joint, _ = joint_and_draws(steps=1)
    first = {}
    transformer = Conditionals(joint)
    vocabulary = Vocabulary(visual=2)
    h = Masked(vocabulary, 2, Categorical(vocabulary, 2))
    h.codes.scores.weight.data.copy_(torch.eye(2))
    s = hidden_bits(1)
    fill(
        transformer, h, s, MaskedSampling(0.0, noise=0.0, steps=3), callback=lambda n, i: first.setdefault(n, i.clone())
    )
    marginals = torch.stack([joint.sum((1, 2)), joint.sum((0, 2)), joint.sum((0, 1))])
    assert int((first[1][0] >= SPECIAL).nonzero()) == int(marginals.amax(1).argmax())


def test_schedules_of_temperature_and_guidance():
    s = MaskedSampling(1.0, guidance=3.0, final_temperature=0.0, guidance_schedule="linear")
    assert [s.temperature_at(p) for p in (0.0, 0.5, 1.0)] == [1.0, 0.5, 0.0]
    assert [s.guidance_at(p) for p in (0.0, 0.5, 1.0)] == [1.0, 2.0, 3.0]
    assert MaskedSampling(guidance=3.0).guidance_at(0.1) == 3.0
    lm, c = model(), canvas()
    without = c.replace(ids=torch.where(torch.arange(c.length) < 3, 0, c.ids))
    a, b = (
        fill(lm.transformer, lm.head, c, MaskedSampling(0.0, noise=0.0, guidance=scale), without)
        for scale in (1.0, 6.0)
    )
    assert not torch.equal(a, b)


@pytest.mark.parametrize(
    "setting",
    [{"schedule": "sine"}, {"steps": 0}, {"noise": -1.0}, {"final_temperature": -1.0}, {"guidance_schedule": "no"}],
)
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        MaskedSampling(**setting)


@pytest.mark.parametrize("setting", [{"schedule": "x"}, {"least": 2.0}, {"whole_frames": -1.0}, {"refine": 0.0}])
def test_impossible_heads_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        head(**setting)


SHAPE = (9, 16, 16)
TASKS = [
    Generation(), KnownFrames("i2v"), KnownFrames("interpolation", last=1), KnownFrames("rewind", first=(0,), last=4),
    Painting("inpainting", True, 1), Painting("outpainting", False, 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def video_lm() -> VideoLM:
    torch.manual_seed(0)
    tokenizer = MAGVIT2(
        LFQ(6), patch=(4, 4, 4), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, 1), kernels=((1, 3, 3), (3, 3, 3))
    )
    text = SentencePieceText.train([f"a red star {i}" for i in range(40)], 400)
    vocabulary = Vocabulary(visual=64, text=text.vocabulary)
    codes = Chained(vocabulary, 32, (3, 3))
    lm = LanguageModel(Transformer(32, depth=2, heads=2, sites=(8, 8, 8)), Masked(vocabulary, 32, codes))
    for parameter in lm.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return VideoLM(tokenizer, text, lm, {t.name: t for t in TASKS}, SHAPE, 5.0, MaskedSampling(steps=3)).eval()


def given_for(task) -> tuple[Given, Clip]:
    video = torch.rand(2, 3, *SHAPE, generator=torch.Generator().manual_seed(4)) * 2 - 1
    return task.split(Clip(video, 5.0, ("a red star", "a star")), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_task_is_packed_learnt_and_made(video_lm, task):
    given, target = given_for(task)
    packer = video_lm.packer
    tokens = packer.tokenizer.encode(target.video)
    train, ask = packer.pack(given, 0, tokens), packer.pack(given, 0)
    assert (train.length, train.prefix) == (ask.length, ask.prefix) and torch.equal(train.loss, ask.loss)
    assert torch.equal(train.ids[:, : train.prefix], ask.ids[:, : ask.prefix]) and (ask.ids[ask.loss] == MASK).all()
    assert (train.interior is None) == (ask.interior is None) == (task.name in ("t2v", "i2v"))
    if ask.interior is not None:
        assert torch.equal(train.interior, ask.interior)
    assert torch.isfinite(video_lm.lm.loss(train)[0])
    known = packer.known_in(ask)
    assert known.shape[1] == (4 if task.name in ("i2v", "interpolation") else 0)
    clip = video_lm.generate(given, task.name)
    assert clip.video.shape == (2, 3, *SHAPE)
    if known.shape[1]:  # the tokens of the known frame are the result's, and so is what they show
        first = packer.tokenizer.decode(known.sub(SPECIAL).view(2, 1, 2, 2))
        torch.testing.assert_close(clip.video[:, :, :1], first)


def test_conditions_stand_where_something_is_known(video_lm):
    packer = video_lm.packer
    given, _ = given_for(TASKS[2])
    places = packer.pack(given, 0).interior[0] != MASK
    assert places[-4:].all() and not places[:-4].any()  # the last frame's latent
    given, _ = given_for(TASKS[3])
    places = packer.pack(given, 0).interior[0] != MASK
    assert places[-4:].all() and not places[:-4].any()
    known = torch.zeros(2, 1, *SHAPE, dtype=torch.bool)
    known[..., :8] = True  # the left column of tokens
    given = Given(SHAPE, ("", ""), torch.rand(2, 3, *SHAPE) * known, known)
    places = packer.pack(given, 0).interior[0, -12:].view(3, 2, 2) != MASK
    assert places[..., 0].all() and not places[..., 1].any()
    known[:, :, 3:], known[:, :, 2:3] = False, True  # fewer frames than the clip has, and not whole latent frames
    short = Given(SHAPE, ("", ""), given.video[:, :, :7], known[:, :, :7])
    places = packer.pack(short, 0).interior[0, -12:].view(3, 2, 2) != MASK
    assert places[:2].any() and not places[2].any()


def test_unknown_frames_are_interpolated_in_time():
    video = torch.zeros(1, 3, 6, 2, 2)
    video[:, :, 1], video[:, :, 5] = 1.0, 3.0
    known = torch.zeros(1, 1, 6, 2, 2, dtype=torch.bool)
    known[:, :, [1, 5]] = True
    assert interpolate(video, known)[0, 0, :, 0, 0].tolist() == [1.0, 1.0, 1.5, 2.0, 2.5, 3.0]
    known[..., 0] = False
    assert torch.equal(interpolate(video, known), video)


def test_a_saved_model_is_the_same(video_lm, tmp_path):
    video_lm.save_pretrained(tmp_path / "m")
    loaded = VideoLM.from_pretrained(tmp_path / "m")
    assert loaded.sampling == video_lm.sampling and isinstance(loaded.lm.head, Masked)
    assert torch.equal(loaded.generate("a red star", seed=1).video, video_lm.generate("a red star", seed=1).video)


def test_settings_for_masks_need_a_masked_head(video_lm):
    vocabulary = video_lm.lm.head.vocabulary
    lm = LanguageModel(Transformer(32, depth=1, heads=2), Categorical(vocabulary, 32))
    other = VideoLM(video_lm.tokenizer, video_lm.text, lm, video_lm.tasks, SHAPE).eval()
    with pytest.raises(ValueError, match="sampler=masked needs a model with a masked head; this one's is Categorical"):
        other.generate("a star", sampling=MaskedSampling())
    assert isinstance(other.packer, Packer) and not other.packer.masked
