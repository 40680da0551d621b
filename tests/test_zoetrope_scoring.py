"""How much of what a clip is to show and to let hear it does."""

import pytest
import torch

from reelm.data.clip import Clip
from reelm.data.zoetrope.dataset import Zoetrope
from reelm.engine.zoetrope_scoring import ZoetropeReward, asked, changes, closes, even
from reelm.tasks.generation import Generation
from reelm.tasks.known_frames import KnownFrames, Loop, forth_and_back
from reelm.tasks.painting import Painting
from reelm.tasks.with_sound import WithSound

TASKS = (
    Generation(), Generation("t2i", frames=1), Generation("unconditional", prompted=False), KnownFrames("i2v"),
    KnownFrames("interpolation", last=1), Painting("inpainting", inside=True, marker=1),
    WithSound("t2av"), WithSound("v2a", told=("video",), asks=("audio",), prompted=False, marker=4),
    WithSound("a2v", told=("audio",), asks=("video",), prompted=False, marker=0),
)  # fmt: skip


def moving() -> torch.Tensor:
    """Clips of 9 frames: to the right, there and back, and a walk that hurries back in its last steps."""
    video = torch.zeros(3, 3, 9, 16, 16)
    for time in range(9):
        video[0, :, time, 4:8, time : time + 4] = 1
        video[1, :, time, 4:8, 2 * min(time, 9 - time)] = 1
        video[2, :, time, 4:8, (0, 1, 2, 3, 4, 5, 6, 3, 1)[time] : 8] = 1
    return video


def test_clips_that_jump_where_they_begin_anew_do_not_close():
    assert closes(changes(moving())).tolist() == [False, True, True]
    assert closes(changes(forth_and_back(moving())[:, :, :-1])).all()
    assert closes(changes(torch.zeros(1, 3, 5, 4, 4))).all()  # what stands still can go on for ever


def test_loops_that_hurry_back_close_but_do_not_run_evenly():
    assert even(changes(moving())).tolist() == [False, True, False]
    assert even(changes(torch.zeros(1, 3, 5, 4, 4))).all()


def test_a_loop_is_not_asked_how_it_moves():
    caption = Zoetrope("validation").caption(0)
    assert all(one.motion is None for one in asked(Loop(), caption).objects)
    assert any(one.motion is not None for one in asked(Generation(), caption).objects)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_true_clips_have_the_whole_reward_and_others_have_less(task):
    world = Zoetrope("validation", audio=True, short_captions=0)
    clip = Clip.stack([world.get(i, frames=task.frames) for i in range(6)])
    given, target = task.split(clip, torch.Generator().manual_seed(0))
    made = target if "audio" in given.asks else target.replace(audio=None, audio_rate=None)
    reward = ZoetropeReward(whole=0.5)
    right = reward(task, given, target, made)
    least = 1.3 if task.name == "a2v" else 1.45  # two objects of one shape are one voice
    assert right.mean() > least and right.max() == 1.5
    others = [made[(i + 1) % 6] for i in range(6)]
    wrong = reward(task, given, target, Clip.stack(others))
    assert (wrong <= right).all()
    if task.name == "unconditional":
        grey = reward(task, given, target, made.replace(video=torch.zeros_like(made.video)))
        assert grey.tolist() == [0] * 6
    else:
        assert wrong.mean() < 0.8


def test_known_pixels_count_where_they_are_not_kept_anyhow():
    world = Zoetrope("validation", short_captions=0)
    task, clip = KnownFrames("interpolation", last=1), Clip.stack([world.get(i) for i in range(2)])
    given, target = task.split(clip, torch.Generator())
    last = target.video.clone()
    last[:, :, -1] += 0.2 * (-1.0) ** torch.arange(64)
    reward = ZoetropeReward(whole=0)
    near = reward(task, given, target, target.replace(video=last))
    assert (near < 1).all() and (near > 0.7).all()
    first = target.video.clone()
    first[:, :, 0] += 0.01
    assert torch.equal(reward(task, given, target, target.replace(video=first)), torch.ones(2))


def test_a_loop_has_to_move_and_to_run_evenly():
    world = Zoetrope("validation", short_captions=0)
    task = Loop(order="last_first")
    given, target = task.split(Clip.stack([world.get(i) for i in range(8)]), torch.Generator())
    reward = ZoetropeReward(whole=0)
    right = reward(task, given, target, target)
    cut = target.video.clone()
    cut[:, :, 8:-1] = target.video[:, :, :1]  # back at once
    frozen = target.video[:, :, :1].expand_as(target.video)
    for worse in (cut, frozen):
        found = reward(task, given, target, target.replace(video=worse))
        assert found.mean() < right.mean() - 0.1 and (found > right - 0.05).float().mean() < 0.5


def test_captions_in_other_words_are_refused():
    clip = Zoetrope("validation").get(0).replace(captions=("a dog runs",))
    given, target = Generation().split(clip)
    with pytest.raises(ValueError, match="captions in Zoetrope's words; 'a dog runs' asks for nothing"):
        ZoetropeReward()(Generation(), given, target, target)
