import pytest
import torch

from reelm.data.clip import Clip
from reelm.diffusion.conditions import Conditions
from reelm.tasks.conditioning import Conditioner
from reelm.tasks.generation import Generation
from reelm.tasks.known_frames import KnownFrames
from reelm.tasks.painting import Painting
from reelm.tasks.stylization import Stylization
from reelm.tasks.task import Given
from reelm.tokenizers.latents import LatentSpace
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import FSQ, LFQ, VQ, Continuous
from reelm.tokenizers.text import SentencePieceText, T5Text

CAPTIONS = ("a red star moves left", "a blue circle")
SHAPE, GRID = (17, 16, 24), (5, 2, 3)


def made(quantizer: torch.nn.Module) -> MAGVIT2:
    torch.manual_seed(0)
    return MAGVIT2(
        quantizer, patch=(4, 4, 4), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, 1), kernels=((1, 3, 3), (3, 3, 3))
    ).eval()


@pytest.fixture(scope="module")
def conditioner() -> Conditioner:
    text = SentencePieceText.train([f"{caption} {i}" for caption in CAPTIONS for i in range(20)], 400)
    return Conditioner(made(Continuous(4)), text)


def clip() -> Clip:
    shape = (2, 3, *SHAPE)
    controls = {"depth": torch.rand(2, 1, *SHAPE), "flow": torch.randn(2, 2, *SHAPE)}
    return Clip(torch.rand(shape) * 2 - 1, 8.0, CAPTIONS, controls=controls)


def told(conditioner: Conditioner, task, whole: Clip) -> tuple[Given, Conditions]:
    given = task.split(whole, torch.Generator().manual_seed(0))[0]
    return given, conditioner.conditions(given)


@pytest.mark.parametrize(
    "quantizer", [Continuous(4), LFQ(6), FSQ((8, 5, 4)), VQ(16, 4)], ids=lambda q: type(q).__name__
)
def test_tokens_are_points_and_come_back(quantizer):
    video, tokenizer = torch.rand(2, 3, 5, 16, 16) * 2 - 1, made(quantizer)
    tokenizer.train()(video)  # codes of a vector quantizer begin where latents are
    space = LatentSpace(tokenizer.eval())
    latents, tokens = space.encode(video), space.tokenizer.encode(video)
    assert latents.shape == (2, space.channels, 2, 2, 2) and latents.dtype == torch.float32
    assert torch.equal(space.tokens(latents), tokens) and torch.equal(space.points(tokens), latents)
    assert torch.equal(space.decode(latents), space.tokenizer.decode(tokens))
    if not space.continuous:
        codes = space.points(torch.randint(space.tokenizer.vocabulary, (4, 8, 8, 8)))
        assert codes.std((0, 2, 3, 4)).sub(1).abs().max() < 0.15 and codes.mean((0, 2, 3, 4)).abs().max() < 0.15
        assert torch.equal(space.tokens(latents + 0.01 * torch.randn_like(latents)), tokens)


def test_codes_that_are_no_points_are_refused():
    quantizer = FSQ((8, 5, 4))
    quantizer.nearest = None  # what it does to latents bounds them first
    with pytest.raises(ValueError, match="codes of FSQ are no points that can be denoised"):
        LatentSpace(made(quantizer))


def test_a_prompt_is_all_that_text_to_video_is_told(conditioner):
    _, conditions = told(conditioner, Generation(), clip())
    assert conditions.known is conditions.shares is conditions.kept is conditions.control is None
    assert conditions.text.shape == conditions.text_mask.shape and conditions.fps.tolist() == [8.0, 8.0]
    rows = [row[mask].tolist() for row, mask in zip(conditions.text, conditions.text_mask, strict=True)]
    assert rows == conditioner.text.encode(CAPTIONS)
    assert not told(conditioner, Generation("unconditional", prompted=False), clip())[1].prompted
    given = Given(SHAPE, CAPTIONS)
    mask = conditioner.conditions(given, unprompted=torch.tensor([True, False])).text_mask
    assert not mask[0].any() and mask[1].any()


def test_text_may_come_embedded(conditioner, t5_folder):
    conditions = Conditioner(conditioner.tokenizer, T5Text(t5_folder)).conditions(Given(SHAPE, (CAPTIONS[0], "")))
    assert conditions.text.shape == (2, 24, 32) and conditions.text_mask.any(1).tolist() == [True, False]


@pytest.mark.parametrize("first, latents", [(1, 1), (5, 2), (9, 3)])
def test_leading_frames_are_the_first_latents_of_the_clip(conditioner, first, latents):
    whole = clip()
    given, conditions = told(conditioner, KnownFrames("x", first=(first,)), whole)
    target = conditioner.space.encode(whole.video)
    torch.testing.assert_close(conditions.known[:, :, :latents], target[:, :, :latents], atol=1e-5, rtol=0)
    assert (
        not conditions.known[:, :, latents:].any() and conditions.kept.tolist() == [[i < latents for i in range(5)]] * 2
    )
    assert conditions.shares[:, :, :latents].eq(1).all() and not conditions.shares[:, :, latents:].any()
    training = conditioner.conditions(given, target)
    assert torch.equal(training.known[:, :, :latents], target[:, :, :latents])
    short = given.replace(video=given.video[:, :, :first], known=given.known[:, :, :first])  # as a user gives them
    again = conditioner.conditions(short)
    for name in ("known", "shares", "kept"):
        torch.testing.assert_close(getattr(again, name), getattr(conditions, name))


def test_a_last_frame_is_told_but_not_kept(conditioner):
    whole = clip()
    _, conditions = told(conditioner, KnownFrames("interpolation", last=1), whole)
    assert conditions.kept[0].tolist() == [True, False, False, False, False]
    assert conditions.shares[0, :, 4, 0, 0].tolist() == [0, 0, 0, 1]  # the last of the last four frames
    assert conditions.known[:, :, 4].any() and not conditions.known[:, :, 1:4].any()
    other = clip()
    other = other.replace(video=torch.cat([whole.video[:, :, :1], other.video[:, :, 1:-1], whole.video[:, :, -1:]], 2))
    assert torch.equal(told(conditioner, KnownFrames("interpolation", last=1), other)[1].known, conditions.known)


def test_a_mask_tells_the_share_of_each_latent(conditioner):
    whole = clip()
    known = torch.zeros(2, 1, *SHAPE, dtype=torch.bool)
    known[..., :16] = True
    known[:, :, :, :2, 16:] = True  # a quarter of the height of a latent
    given = Given(SHAPE, CAPTIONS, whole.video * known, known)
    conditions = conditioner.conditions(given)
    assert conditions.kept is None
    assert conditions.shares[0, 2, 3].tolist() == [[1, 1, 0.25], [1, 1, 0]]
    assert not conditions.known[..., 1, 2].any() and conditions.known[..., :2].any()
    hidden = Given(SHAPE, CAPTIONS, torch.where(known, whole.video, 0.7) * known, known)
    assert torch.equal(conditioner.conditions(hidden).known, conditions.known)


@pytest.mark.parametrize("task", [Painting("inpainting", True, 1), Painting("outpainting", False, 2), Stylization()])
def test_other_tasks(conditioner, task):
    _, conditions = told(conditioner, task, clip())
    if task.name == "stylization":
        assert conditions.control.shape == (2, 4, *GRID) and conditions.known is None
    else:
        assert conditions.known.shape == (2, 4, *GRID) and conditions.shares.shape == (2, 4, *GRID)


def test_mistakes_are_one_line(conditioner):
    given = Given(SHAPE, CAPTIONS, condition=torch.zeros(2, 3, 9, 16, 24))
    with pytest.raises(
        ValueError, match=r"\(9, 16, 24\), the clip to make \(17, 16, 24\); give both the same"
    ) as caught:
        conditioner.conditions(given)
    assert "\n" not in str(caught.value)
