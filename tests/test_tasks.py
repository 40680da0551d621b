import pytest
import torch

from reelm.data.clip import Clip
from reelm.data.controls import control_image
from reelm.tasks.generation import Generation
from reelm.tasks.known_frames import KnownFrames, Loop
from reelm.tasks.painting import Painting
from reelm.tasks.stylization import Stylization
from reelm.tasks.task import Given, Mixture, tasks_of

FRAMES, SIZE = 17, 24
TASKS = [
    Generation(),
    Generation("unconditional", prompted=False),
    KnownFrames("i2v"),
    KnownFrames("continuation", first=(5, 9)),
    KnownFrames("backward", first=(0,), last=(5, 9), order="backward"),
    KnownFrames("interpolation", last=1),
    KnownFrames("connection", first=(5,), last=5),
    Painting("inpainting", inside=True, marker=1),
    Painting("outpainting", inside=False, marker=2, smallest=0.5, largest=0.8),
    Stylization(),
]
BY_NAME = {task.name: task for task in TASKS}


def clip(frames: int = FRAMES, batch: int = 2) -> Clip:
    controls = {"depth": torch.rand(batch, 1, frames, SIZE, SIZE), "flow": torch.randn(batch, 2, frames, SIZE, SIZE)}
    video = torch.rand(batch, 3, frames, SIZE, SIZE) + 0.1  # never 0, so that unknown pixels can be told
    return Clip(video, fps=6.0, captions=("a red star", "a blue heart"), controls=controls)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("task", TASKS, ids=BY_NAME)
def test_the_target_is_the_clip_and_pixels_are_there_where_they_are_known(task):
    whole = clip()
    given, target = task.split(whole, seeded(0))
    assert target is whole and given.shape == (FRAMES, SIZE, SIZE) and len(given) == 2 and given.fps == 6.0
    assert given.captions == (("", "") if task.name == "unconditional" else whole.captions)
    if given.known is not None:
        assert given.known.dtype == torch.bool and given.known.shape == (2, 1, FRAMES, SIZE, SIZE)
        assert torch.equal(given.video, torch.where(given.known, whole.video, 0.0))
        assert given.known.any() and not given.known.all()


@pytest.mark.parametrize("task", TASKS, ids=BY_NAME)
def test_all_chance_comes_from_the_generator(task):
    whole = clip()
    before, state = whole.video.clone(), torch.get_rng_state()
    results = [task.split(whole, seeded(seed))[0] for seed in (3, 3)]
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(whole.video, before)
    for name in ("video", "known", "condition"):
        a, b = (getattr(given, name) for given in results)
        assert (a is None and b is None) or torch.equal(a, b)


def known_frames(name: str, seed: int = 0) -> list[int]:
    known = BY_NAME[name].split(clip(), seeded(seed))[0].known
    frames = known.flatten(3).all(-1)
    assert torch.equal(frames, known.flatten(3).any(-1))  # whole frames only
    return frames[0, 0].nonzero()[:, 0].tolist()


def test_which_frames_are_known():
    assert BY_NAME["t2v"].split(clip())[0].known is None
    assert known_frames("i2v") == [0]
    assert known_frames("interpolation") == [0, 16]
    assert known_frames("connection") == [0, 1, 2, 3, 4, 12, 13, 14, 15, 16]
    assert {len(known_frames("backward", seed)) for seed in range(20)} == {5, 9}
    assert known_frames("backward", 1)[-5:] == [12, 13, 14, 15, 16]
    for seed in range(9):  # of a short clip no more is known than leaves some of it
        assert BY_NAME["continuation"].split(clip(9), seeded(seed))[0].leading == 5
    assert {tuple(known_frames("continuation", seed)) for seed in range(20)} == {tuple(range(5)), tuple(range(9))}


def test_a_loop_leads_back_to_its_first_frame():
    whole = clip()
    given, target = Loop().split(whole.replace(audio=torch.zeros(2, 1, 9), audio_rate=4))
    assert torch.equal(target.video[:, :, :9], whole.video[:, :, :9])
    assert torch.equal(target.video, target.video.flip(2)) and target.audio is None and not target.controls
    assert not (target.video[:, :, 1:] == target.video[:, :, :-1]).all(1).flatten(2).all(-1).any()  # it never stands
    assert given.known.flatten(3).all(-1)[0, 0].nonzero()[:, 0].tolist() == [0, 16]
    assert torch.equal(given.video[:, :, -1], whole.video[:, :, 0])
    with pytest.raises(ValueError, match="loop needs clips of 3 frames"):
        Loop().split(clip(1))


@pytest.mark.parametrize("name", ["inpainting", "outpainting"])
def test_painting_hides_a_rectangle_or_all_but_one(name):
    task, whole = BY_NAME[name], clip()
    boxes = set()
    for seed in range(30):
        given = task.split(whole, seeded(seed))[0]
        box = ~given.known if task.inside else given.known
        assert (box == box[:1, :, :1]).all()  # the same in all frames and samples
        rows, columns = (box[0, 0, 0].any(axis).nonzero()[:, 0] for axis in (1, 0))
        height, width = (int(axis.max() - axis.min() + 1) for axis in (rows, columns))
        assert box[0, 0, 0].sum() == height * width
        assert all(round(task.smallest * SIZE) <= side <= round(task.largest * SIZE) for side in (height, width))
        assert given.leading == 0
        boxes.add((int(rows.min()), int(columns.min()), height, width))
    assert len(boxes) > 20


def test_stylization_is_told_depth_and_flow_alone():
    whole = clip()
    given, _ = Stylization().split(whole)
    assert given.video is None and given.known is None
    assert torch.equal(given.condition, control_image(whole.controls["depth"], whole.controls["flow"]))
    with pytest.raises(ValueError, match="stylization needs flow of the clip"):
        Stylization().split(whole.replace(controls={"depth": whole.controls["depth"]}))


def test_leading_frames_are_those_known_in_every_sample():
    known = torch.zeros(2, 1, 9, 4, 4, dtype=torch.bool)
    known[0, :, :7], known[1, :, :5], known[:, :, 8] = True, True, True
    given = Given((9, 4, 4), ("", ""), torch.zeros(2, 3, 9, 4, 4), known)
    assert given.leading == 5
    known[1, 0, 3, 0, 0] = False
    assert given.leading == 3
    assert given.replace(known=None).leading == 0
    assert given.to(torch.float64).video.dtype == torch.float64 and given.to(torch.float64).known.dtype == torch.bool


def test_mistakes_are_told_in_one_line():
    with pytest.raises(ValueError, match="continuation knows 5 frames; a clip of 5 leaves none"):
        KnownFrames("continuation", first=(5,)).split(clip(5))
    with pytest.raises(
        ValueError, match="connection makes frames in one of the orders forward, backward, last_first; "
    ):
        KnownFrames("connection", first=(5,), last=5, order="inward")
    with pytest.raises(ValueError, match="0 < smallest <= largest < 1; got 0.5 and 0.4"):
        Painting("inpainting", True, 1, smallest=0.5, largest=0.4)
    parts = {"t2v": Generation()}
    with pytest.raises(ValueError, match="weights for some of t2v; got {'t3v': 1}"):
        Mixture(parts, {"t3v": 1})
    with pytest.raises(ValueError, match="weights for some"):
        Mixture(parts, {"t2v": 0})
    with pytest.raises(ValueError, match="weights for some"):
        Mixture(parts, {"t2v": -1})
    with pytest.raises(ValueError, match="part a is the task t2v"):
        Mixture({"a": Generation()}, {"a": 1})


def mixture(**weights: float) -> Mixture:
    return Mixture({**BY_NAME, "t2i": Generation("t2i", frames=1)}, weights)


def clips_of(whole: Mixture, progress: float) -> dict[str, float]:
    """Expected share of clips of each task at a point of the training."""
    clips = {
        task.name: whole.schedule(task)(progress) * (whole.image_batch if task.frames == 1 else 1)
        for task in whole.tasks
    }
    return {name: value / sum(clips.values()) for name, value in clips.items()}


def test_a_mixture_begins_with_images():
    whole = mixture(t2v=3, i2v=1, t2i=5)
    assert clips_of(whole, 0.0) == pytest.approx({"t2i": 0.9, "t2v": 0.075, "i2v": 0.025})
    assert clips_of(whole, 0.2499) == pytest.approx(clips_of(whole, 0.0))
    assert clips_of(whole, 0.25) == pytest.approx({"t2i": 0.1, "t2v": 0.675, "i2v": 0.225})
    assert clips_of(whole, 1.0) == pytest.approx(clips_of(whole, 0.25))


def test_a_mixture_without_images_or_without_clips_follows_its_weights():
    assert clips_of(mixture(t2v=3, i2v=1, t2i=0), 0.0) == pytest.approx({"t2v": 0.75, "i2v": 0.25})
    assert clips_of(mixture(t2i=2), 0.9) == pytest.approx({"t2i": 1.0})


def test_a_part_without_weight_is_left_out():
    assert [task.name for task in tasks_of(mixture(t2v=1, i2v=0))] == ["t2v"]
    assert tasks_of(BY_NAME["i2v"]) == (BY_NAME["i2v"],)
