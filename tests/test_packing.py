import pytest
import torch

from reelm.data.clip import Clip
from reelm.lm.vocabulary import (
    Special,
    Vocabulary,
    duration_token,
    frame_rate_token,
    resolution_token,
    task_token,
)
from reelm.tasks.formats import Format, Formats
from reelm.tasks.generation import Generation
from reelm.tasks.known_frames import KnownFrames, Loop, forth_and_back
from reelm.tasks.packing import CONDITION_TIME, TEXT_TIME, Packer
from reelm.tasks.painting import Painting
from reelm.tasks.stylization import Stylization
from reelm.tasks.task import Given
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import LFQ
from reelm.tokenizers.text import SentencePieceText
from reelm.tokenizers.tokens import Tokens

CAPTIONS = ("a red star moves left", "a blue circle")
SHAPE = (17, 16, 24)
GRID = (5, 2, 3)
PER_FRAME, TEXT = 6, 8
PLACES = Tokens.positions(GRID).tolist()
TASKS = [
    Generation(),
    Generation("unconditional", prompted=False),
    KnownFrames("i2v"),
    KnownFrames("continuation", first=(9,)),
    KnownFrames("backward", first=(0,), last=(9,), order="backward"),
    KnownFrames("rewind", first=(0,), last=1),
    KnownFrames("interpolation", last=1, order="last_first"),
    KnownFrames("connection", first=(5,), last=5),
    Loop(),
    Painting("inpainting", inside=True, marker=1),
    Painting("outpainting", inside=False, marker=2, smallest=0.5, largest=0.8),
    Stylization(),
]
NAMES = [task.name for task in TASKS]
LATENTS_KNOWN = {"i2v": 1, "continuation": 3, "interpolation": 1, "connection": 2, "loop": 1}
ORDER = {
    name: [n for frame in frames for n in range(frame * PER_FRAME, (frame + 1) * PER_FRAME)]
    for name, frames in {"backward": (4, 3, 2, 1, 0), "interpolation": (0, 4, 1, 2, 3)}.items()
}
NEEDS_PIXELS = ("backward", "rewind", "interpolation", "connection", "loop", "inpainting", "outpainting", "stylization")


@pytest.fixture(scope="module")
def packer() -> Packer:
    torch.manual_seed(0)
    tokenizer = MAGVIT2(
        LFQ(6), patch=(4, 4, 4), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, 1), kernels=((1, 3, 3), (3, 3, 3))
    ).eval()
    text = SentencePieceText.train([f"{caption} {i}" for caption in CAPTIONS for i in range(20)], 400)
    return Packer(tokenizer, text, Vocabulary(visual=64, text=text.vocabulary))


def clip(frames: int = SHAPE[0]) -> Clip:
    video = forth_and_back(torch.rand(2, 3, frames, *SHAPE[1:]) * 2 - 1)  # that any task leaves as it is
    controls = {"depth": torch.rand(2, 1, frames, *SHAPE[1:]), "flow": torch.randn(2, 2, frames, *SHAPE[1:])}
    return Clip(video, captions=CAPTIONS, controls=controls)


def split(task, whole: Clip) -> Given:
    return task.split(whole, torch.Generator().manual_seed(0))[0]


def codes(packer: Packer, video: torch.Tensor) -> torch.Tensor:
    """The ids that a video becomes in the language model's id space, `(B, N)`."""
    return packer.tokenizer.encode(video).flatten(1) + 256


def text_ids(packer: Packer) -> torch.Tensor:
    start = packer.vocabulary.text_range.start
    rows = [[start + i for i in row] for row in packer.text.encode(list(CAPTIONS))]
    return torch.tensor([row + [0] * (TEXT - len(row)) for row in rows])


def expected_prefix(packer: Packer, marker: int, text: torch.Tensor, conditions: list) -> tuple[torch.Tensor, list]:
    """Ids and places from <bos> to <bov_o>, written out token by token."""

    def column(id: int) -> torch.Tensor:
        return torch.full((2, 1), int(id))

    ids = [column(Special.bos), column(task_token(marker)), column(Special.bot_i), text, column(Special.eot_i)]
    places = [[TEXT_TIME, 0, 0], [TEXT_TIME, 1, 0], [TEXT_TIME, 2, 0]]
    places += [[TEXT_TIME, 3, i] for i in range(TEXT)] + [[TEXT_TIME, 4, 0]]
    if conditions:
        ids.append(column(Special.bov_i))
        places.append([TEXT_TIME, 5, 0])
        for tokens, where in conditions:
            ids.append(tokens)
            places += [[t - CONDITION_TIME, y, x] for t, y, x in where]
        ids.append(column(Special.eov_i))
        places.append([TEXT_TIME, 6, 0])
    ids.append(column(Special.bov_o))
    places.append([TEXT_TIME, 7, 0])
    return torch.cat(ids, 1), places


def expected_conditions(packer: Packer, task, given: Given, whole: Clip) -> list:
    if task.name in ("interpolation", "loop", "rewind"):  # the last frame as an image, at its own time
        return [(codes(packer, whole.video[:, :, -1:]), [[4, y, x] for y in range(2) for x in range(3)])]
    if task.name in ("backward", "connection"):  # the last frames as a clip, each latent frame at its own time
        latents = 3 if task.name == "backward" else 2
        return [(codes(packer, whole.video[:, :, 3 - 4 * latents :]), PLACES[-latents * PER_FRAME :])]
    if task.name == "stylization":
        return [(codes(packer, given.condition), PLACES)]
    if task.name in ("inpainting", "outpainting"):
        ids = codes(packer, given.video)
        for n, (t, y, x) in enumerate(PLACES):
            frames = slice(0, 1) if t == 0 else slice(4 * t - 3, 4 * t + 1)
            if not given.known[0, 0, frames, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].any():
                ids[:, n] = int(Special.mask)
        return [(ids, PLACES)]
    return []


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_layout_token_by_token(packer, task):
    whole = clip()
    given = split(task, whole)
    sequence = packer.pack(given, task.marker, packer.tokenizer.encode(whole.video))
    text = text_ids(packer) if task.name != "unconditional" else torch.zeros(2, TEXT, dtype=torch.long)
    ids, places = expected_prefix(packer, task.marker, text, expected_conditions(packer, task, given, whole))
    order = ORDER.get(task.name, range(len(PLACES)))
    assert torch.equal(sequence.ids, torch.cat([ids, codes(packer, whole.video)[:, order]], 1))
    assert (sequence.positions == torch.tensor(places + [PLACES[n] for n in order])).all()
    known = LATENTS_KNOWN.get(task.name, 0) * PER_FRAME
    assert sequence.prefix == ids.shape[1] + known
    assert sequence.context is None and sequence.context_mask is None
    # the loss counts exactly the tokens to make
    assert not sequence.loss[:, : sequence.prefix].any() and sequence.loss[:, sequence.prefix :].all()
    assert sequence.loss[0].sum() == len(PLACES) - known


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_inference_sees_the_prefix_of_training(packer, task):
    whole = clip()
    given = split(task, whole)
    training = packer.pack(given, task.marker, packer.tokenizer.encode(whole.video))
    inference = packer.pack(given, task.marker)
    prefix = training.prefix
    assert inference.prefix == inference.length == prefix
    assert not inference.loss.any()
    for name in ("ids", "positions", "next_positions"):
        assert torch.equal(getattr(training, name)[:, :prefix], getattr(inference, name)), name


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_each_column_knows_the_place_of_the_token_it_predicts(packer, task):
    whole = clip()
    given = split(task, whole)
    sequence = packer.pack(given, task.marker, packer.tokenizer.encode(whole.video))
    assert torch.equal(sequence.next_positions[:, :-1], sequence.positions[:, 1:])
    first = PLACES[ORDER.get(task.name, range(len(PLACES)))[LATENTS_KNOWN.get(task.name, 0) * PER_FRAME]]
    assert sequence.next_positions[0, sequence.prefix - 1].tolist() == first
    assert packer.pack(given, task.marker).next_positions[1, -1].tolist() == first


@pytest.mark.parametrize("frames", [17, 1])
def test_formats_are_told_after_the_task(packer, frames):
    formats = Formats((Format(17, (32, 32)), Format(17, (16, 24), 12.0), Format(9, (16, 24))))
    told = Packer(packer.tokenizer, packer.text, packer.vocabulary, formats=formats)
    whole = clip(frames).replace(fps=12.0)
    task = KnownFrames("continuation", first=(9,)) if frames > 1 else Generation("t2i", frames=1)
    target = packer.tokenizer.encode(whole.video)
    with_format, plain = (one.pack(split(task, whole), task.marker, target) for one in (told, packer))
    asked = [resolution_token(1), *([frame_rate_token(12)] if frames > 1 else []), duration_token(len(target[0]))]
    more = len(asked)
    assert with_format.ids[:, 2 : 2 + more].tolist() == [asked, asked]
    places = with_format.positions[0]
    assert places[2 : 2 + more].tolist() == [[TEXT_TIME, 8 + i, 0] for i in range(more)]
    assert len(set(map(tuple, places.tolist()))) == len(places)
    # all else is as in a model that is told no format
    assert with_format.prefix == plain.prefix + more and with_format.length == plain.length + more
    for name in ("ids", "positions", "loss"):
        value = getattr(with_format, name)
        assert torch.equal(torch.cat([value[:, :2], value[:, 2 + more :]], 1), getattr(plain, name)), name
    bare = told.pack(split(task, whole), task.marker)
    assert torch.equal(told.known_in(bare), packer.known_in(packer.pack(split(task, whole), task.marker)))
    assert bare.without_prompt().ids[:, 2 : 2 + more].tolist() == [asked, asked]


def test_a_size_of_no_format_is_refused(packer):
    told = Packer(packer.tokenizer, packer.text, packer.vocabulary, formats=Formats((Format(17, (32, 32)),)))
    with pytest.raises(ValueError, match="makes clips of 32 x 32; got 16 x 24"):
        told.pack(split(Generation(), clip()), 0)


def test_an_image_is_a_clip_of_one_frame(packer):
    whole = clip(1)
    given = split(Generation("t2i", frames=1), whole)
    sequence = packer.pack(given, 0, packer.tokenizer.encode(whole.video))
    ids, places = expected_prefix(packer, 0, text_ids(packer), [])
    assert torch.equal(sequence.ids, torch.cat([ids, codes(packer, whole.video)], 1))
    assert (sequence.positions == torch.tensor(places + PLACES[:PER_FRAME])).all()
    assert sequence.loss.sum() == 2 * PER_FRAME


def test_an_image_can_be_painted(packer):
    whole = clip(1)
    known = torch.ones(2, 1, 1, *SHAPE[1:], dtype=torch.bool)
    known[..., :8, 8:16] = False
    given = Given((1, *SHAPE[1:]), CAPTIONS, whole.video * known, known)
    sequence = packer.pack(given, 1)
    assert (sequence.ids == int(Special.mask)).sum() == 2 and packer.known_tokens(given) is None


def test_partly_known_supervoxels_are_not_masked(packer):
    whole = clip()
    known = torch.zeros(2, 1, *SHAPE, dtype=torch.bool)
    known[0, 0, 7, 15, 23] = True  # one pixel of one sample: latent frame 2, row 1, column 2
    given = Given(SHAPE, CAPTIONS, whole.video * known, known)
    ids = packer.pack(given, 1).ids
    assert (ids == int(Special.mask)).sum(1).tolist() == [29, 30]
    start = ids[0].tolist().index(int(Special.bov_i)) + 1
    assert ids[0, start + PLACES.index([2, 1, 2])] != int(Special.mask)


def test_known_frames_that_fill_no_latent_frame_become_images(packer):
    whole = clip()
    known = torch.zeros(2, 1, *SHAPE, dtype=torch.bool)
    known[:, :, :7] = True
    given = Given(SHAPE, CAPTIONS, whole.video * known, known)
    sequence = packer.pack(given, 0)
    assert torch.equal(packer.known_tokens(given), packer.tokenizer.encode(whole.video[:, :, :5]).flatten(1))
    start = sequence.ids[0].tolist().index(int(Special.bov_i)) + 1
    assert torch.equal(sequence.ids[:, start : start + PER_FRAME], codes(packer, whole.video[:, :, 5:6]))
    assert sequence.positions[0, start, 0] == 2 - CONDITION_TIME


@pytest.mark.parametrize(
    ("frames", "clips"),
    [
        ([16], [(16, 17)]),
        ([12, 13, 14, 15, 16], [(12, 17)]),
        (range(10, 17), [(10, 11), (11, 12), (12, 17)]),  # seven: two that fill no clip, and five
        ([6, 9, 10, 16], [(6, 7), (9, 10), (10, 11), (16, 17)]),
    ],
)
def test_known_frames_in_a_row_are_few_tokens(packer, frames, clips):
    whole = clip()
    known = torch.zeros(2, 1, *SHAPE, dtype=torch.bool)
    known[:, :, list(frames)] = True
    ids = packer.pack(Given(SHAPE, CAPTIONS, whole.video * known, known), 0)
    start, end = (ids.ids[0].tolist().index(int(mark)) for mark in (Special.bov_i, Special.eov_i))
    told = torch.cat([codes(packer, whole.video[:, :, a:b]) for a, b in clips], 1)
    assert torch.equal(ids.ids[:, start + 1 : end], told)
    times = [-(-a // 4) + i for a, b in clips for i in range(1 + (b - a - 1) // 4)]
    assert (ids.positions[0, start + 1 : end, 0] + CONDITION_TIME).tolist() == [t for t in times for _ in range(6)]


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_clips_in_one_row_are_those_of_each_clip_alone(packer, task):
    whole = clip()
    whole = whole.replace(captions=(CAPTIONS[0], " ".join(CAPTIONS * 2)))
    given, tokens = split(task, whole), packer.tokenizer.encode(whole.video)
    row = packer.pack_in_one_row(given, task.marker, tokens, torch.tensor([False, True]))
    alone = [
        packer.pack(given[[i]], task.marker, tokens[[i]], unprompted=bool(i), slots=packer.text_length(caption))
        for i, caption in enumerate(given.captions)
    ]
    assert row.segments == tuple((part.length, part.prefix) for part in alone)
    for name in ("ids", "positions", "next_positions", "loss"):
        assert torch.equal(getattr(row, name), torch.cat([getattr(part, name) for part in alone], 1)), name
    filled = packer.pack(given, task.marker, tokens)
    assert row.length < filled.ids.numel() or task.name == "unconditional"


def test_nothing_of_what_is_to_be_made_leaks_into_the_prefix(packer):
    for task in TASKS:
        whole = clip()
        given = split(task, whole)
        known = torch.zeros(2, 1, *SHAPE, dtype=torch.bool) if given.known is None else given.known
        other = whole.replace(video=torch.where(known, whole.video, torch.rand_like(whole.video)))
        a, b = (packer.pack(split(task, c), task.marker, packer.tokenizer.encode(c.video)) for c in (whole, other))
        assert a.prefix == b.prefix and torch.equal(a.ids[:, : a.prefix], b.ids[:, : b.prefix]), task.name


def test_a_prompt_left_out_is_padding_of_the_same_length(packer):
    given = split(KnownFrames("i2v"), clip())
    told, left_out = packer.pack(given, 0), packer.pack(given, 0, unprompted=torch.tensor([False, True]))
    assert told.ids.shape == left_out.ids.shape and told.prefix == left_out.prefix
    assert torch.equal(told.positions, left_out.positions)
    assert torch.equal(told.ids[0], left_out.ids[0])
    assert (left_out.ids[1, 3 : 3 + TEXT] == int(Special.pad)).all()
    different = (told.ids != left_out.ids).nonzero()
    assert set(different[:, 0].tolist()) == {1} and 3 <= different[:, 1].min() and different[:, 1].max() < 3 + TEXT
    assert torch.equal(packer.pack(given, 0, unprompted=True).ids, packer.pack(given.replace(captions=("", "")), 0).ids)


@pytest.mark.parametrize("pieces, slots", [(0, 8), (1, 8), (8, 8), (9, 16), (64, 64), (90, 64)])
def test_text_takes_slots_in_eights(packer, pieces, slots):
    word = packer.text.decode([packer.text.encode(["star"])[0]])
    prompt = " ".join(word * pieces)
    given = Given(SHAPE, (prompt, ""))
    if pieces > 64:
        with pytest.warns(UserWarning, match="first 64"):
            assert packer.pack(given, 0).ids[0, 3 + slots] == int(Special.eot_i)
    else:
        assert packer.text_length(prompt) == slots
        ids = packer.pack(given, 0).ids
        assert ids[0, 3 + slots] == int(Special.eot_i) and (ids[0, 3 : 3 + slots] != 0).sum() == pieces
    assert packer.pack(Given(SHAPE, ("", "")), 0, slots=slots).ids.shape[1] == 3 + slots + 2


class Embedding:
    """A text model that embeds the text itself, as T5 does: each vector is the word's number and its length."""

    vocabulary, width = 0, 2

    def encode(self, texts):
        return [[*map(len, text.split()), 1] for text in texts]

    def slots(self, text):
        return -(-len(self.encode([text])[0]) // 8) * 8

    def __call__(self, texts):
        rows = self.encode(texts)
        length = -(-max(map(len, rows)) // 8) * 8
        vectors, mask = torch.zeros(len(rows), length, 2), torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            mask[i, : len(row)] = True
            vectors[i, : len(row)] = torch.tensor([[n, value] for n, value in enumerate(row)], dtype=torch.float)
        return vectors, mask


def test_embedded_text_comes_as_vectors(packer):
    embedded = Packer(packer.tokenizer, Embedding(), Vocabulary(visual=64))
    whole = clip()
    given = split(KnownFrames("i2v"), whole)
    target = packer.tokenizer.encode(whole.video)
    sequence = embedded.pack(given, 0, target, unprompted=torch.tensor([False, True]))
    plain = packer.pack(given, 0, target)
    text = slice(3, 3 + TEXT)
    assert (sequence.ids[:, text] == int(Special.text)).all()
    assert torch.equal(sequence.ids[:, 3 + TEXT :], plain.ids[:, 3 + TEXT :]) and sequence.prefix == plain.prefix
    assert sequence.context.shape == (2, TEXT, 2) and sequence.context.dtype == torch.float32
    assert sequence.context_mask.sum(1).tolist() == [6, 0]  # five words and the end; a prompt left out
    assert sequence.context[0, :6, 1].tolist() == [1, 3, 4, 5, 4, 1]
    wide = embedded.pack(given, 0, slots=16)
    assert wide.context.shape == (2, 16, 2) and wide.context_mask.sum(1).tolist() == [6, 4]


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_prefixes_of_the_clips_own_tokens_need_no_pixels(packer, task):
    whole = clip()
    needed = task.name in NEEDS_PIXELS
    assert packer.needs_pixels(split(task, whole)) == needed
    if task.name != "stylization":
        tokens = packer.tokenizer.encode(whole.video)
        bare = split(task, whole.replace(video=whole.video.to("meta"), tokens=tokens))
        assert packer.needs_pixels(bare) == needed
        if not needed:
            one, other = (packer.pack(given, task.marker, tokens) for given in (split(task, whole), bare))
            assert torch.equal(one.ids, other.ids) and one.prefix == other.prefix
    assert packer.needs_pixels(split(KnownFrames("odd", first=(4,)), whole))  # one frame fills no latent frame
