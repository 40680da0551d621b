from collections import Counter
from itertools import islice

import pytest
import torch
from torch.utils.data import Dataset

from reelm.data.clip import Clip
from reelm.data.module import Batch, Batches, ClipData, Group, GroupedBatches, in_turn


class Numbers(Dataset):
    """Clips that know their index and what was asked of them; captions of 1 to 40 words."""

    def __init__(self, length: int = 96) -> None:
        self.length, self.draws = length, []

    def __len__(self) -> int:
        return self.length

    def caption(self, index: int, frames: int | None = None) -> str:
        return " ".join(["word"] * (1 + index * 7919 % 40))

    def get(self, index: int, frames: int | None = None, controls=None, draw: int = 0) -> Clip:
        video = torch.full((1, 3, frames or 5, 2, 2), index / self.length)
        made = {name: video[:, :1] for name in controls or ()}
        self.draws.append(draw)
        return Clip(video, captions=(self.caption(index, frames),), keys=(str(index),), controls=made)


GROUPS = (Group("clips", 2.0, controls=("depth",)), Group("images", 1.0, frames=1, batch=2.0))


def batches(source=None, groups=GROUPS, batch_size=4, steps=200, **options) -> list[tuple[str, list[int]]]:
    """(group, indices) of each step."""
    made = GroupedBatches(source or Numbers(), groups, batch_size, steps, **options)
    assert len(made) == steps
    return [(batch[0].group.name, [request.index for request in batch]) for batch in made]


def test_a_batch_is_a_function_of_the_seed_and_the_step():
    first = batches(steps=40)
    torch.manual_seed(5)
    assert batches(steps=40) == first and batches(steps=40, seed=1) != first
    made = GroupedBatches(Numbers(), GROUPS, 4, 40)
    for step in (39, 3, 17):  # in any order, and from nothing but the step
        batch = made[step]
        assert (batch[0].group.name, [request.index for request in batch]) == first[step]


def test_a_batch_is_of_one_group_and_its_size():
    made = GroupedBatches(Numbers(), GROUPS, 4, 200)
    names = Counter()
    for batch in made:
        (group,) = {request.group for request in batch}
        assert len(batch) == (8 if group.name == "images" else 4)
        assert len({request.index for request in batch}) == len(batch)
        names[group.name] += 1
    assert 0.45 < names["clips"] / 200 < 0.9  # two of three windows; 50 windows are drawn


def test_a_schedule_decides_by_progress():
    groups = (
        Group("early", schedule=lambda progress: float(progress < 0.5)),
        Group("late", schedule=lambda progress: float(progress >= 0.5)),
    )
    names = [name for name, _ in batches(groups=groups, steps=40)]
    assert names == ["early"] * 20 + ["late"] * 20


@pytest.mark.parametrize("length", [96, 100, 7])
def test_no_clip_comes_twice_before_each_came_once(length):
    groups = (Group("a"), Group("b"))
    seen = Counter()
    for number, (_, indices) in enumerate(batches(Numbers(length), groups, steps=120), start=1):
        seen.update(indices)
        if number % GroupedBatches.WINDOW == 0:
            passes, rest = divmod(number * 4, length)
            assert all(passes <= seen[i] <= passes + 1 for i in range(length))
            assert sum(seen[i] > passes for i in range(length)) == rest


def test_each_pass_is_another_draw():
    seen = Counter((r.index, r.draw) for batch in GroupedBatches(Numbers(7), (Group("a"),), 4, 28) for r in batch)
    assert seen == Counter((index, draw) for index in range(7) for draw in range(16))


def test_groups_of_other_sizes_repeat_nothing_within_a_pass():
    source = Numbers(32 * 6)  # a pass is six windows of the larger group
    seen = Counter(i for _, indices in batches(source, steps=4 * 6) for i in indices)
    assert max(seen.values()) == 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_out_the_global_batch(ranks):
    source = Numbers(9600)
    whole = batches(source, batch_size=4 * ranks, steps=24)
    parts = [batches(source, steps=24, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step, (name, indices) in enumerate(whole):
        assert all(part[step][0] == name and len(part[step][1]) == len(indices) // ranks for part in parts)
        assert sorted(i for part in parts for i in part[step][1]) == sorted(indices)


def words(text: str) -> int:
    return len(text.split())


def slots(text: str) -> int:
    """Text takes slots in eights."""
    return -(-words(text) // 8) * 8


def padding(source, rest: int) -> float:
    """Share of padding in sequences of a text and `rest` other tokens, filled up to the longest text of the batch."""
    text = filled = count = 0
    for _, indices in batches(source, (Group("clips"),), batch_size=16, steps=24, length=slots):
        captions = [source.caption(i) for i in indices]
        text, filled = text + sum(map(words, captions)), filled + len(captions) * max(map(slots, captions))
        count += len(captions)
    return (filled - text) / (filled + count * rest)


def test_captions_of_a_batch_are_of_similar_length():
    assert padding(Numbers(9600), rest=0) < 0.3  # in any order nearly half


def test_zoetrope_batches_hold_little_padding():
    zoetrope = pytest.importorskip("reelm.data.zoetrope.dataset")
    assert padding(zoetrope.Zoetrope(), rest=326) < 0.05


def test_nothing_to_train_on():
    with pytest.raises(ValueError, match="data source is empty"):
        GroupedBatches(Numbers(0), GROUPS, 4, 10)
    with pytest.raises(ValueError, match="no group"):
        GroupedBatches(Numbers(), (), 4, 10)


def content(batch: Batch) -> tuple:
    return batch.name, batch.clip.keys, batch.clip.captions, batch.clip.video.flatten().tolist()


def loaders(workers: int):
    data = ClipData(Numbers(), Numbers(8), batch_size=4, workers=workers)
    data.groups = GROUPS
    return data


def test_loaders_carry_what_the_group_asks_for():
    data = loaders(0)
    loader = data.train_dataloader()
    assert len(loader) == 96 // 4
    for batch in islice(loader, 12):
        assert batch.clip.frames == (1 if batch.name == "images" else 5)
        assert set(batch.clip.controls) == (set() if batch.name == "images" else {"depth"})
        assert batch.to("meta").clip.video.is_meta and batch.to("meta").name == batch.name
    assert [content(b) for b in data.val_dataloader()] == [content(b) for b in data.val_dataloader()]


def test_the_draw_reaches_the_source():
    source = Numbers(8)
    for batch in Batches(source, GroupedBatches(source, (Group("a"),), 4, steps=8)):
        assert len(batch.clip) == 4
    assert Counter(source.draws) == {0: 8, 1: 8, 2: 8, 3: 8}


def test_making_and_reading_loaders_draws_no_random_numbers():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(islice(loaders(0).train_dataloader(), 2))
    list(loaders(0).val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("clips, length", [(24, 96), (24, 7), (1, 2), (64, 20)])
def test_validation_takes_each_group_in_turn(ranks, clips, length):
    groups = (Group("a"), Group("b", frames=1))
    parts = [in_turn(Numbers(length), groups, 4, clips, rank, ranks) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1  # or one rank would wait for the others for ever
    count = min(max(clips // 2, 4 * ranks), length)
    for name in "ab":
        seen = [r.index for part in parts for batch in part for r in batch if r.group.name == name]
        assert set(seen) == set(range(count)) and len(seen) < count + ranks
    assert all(len({r.group.name for r in batch}) == 1 and 0 < len(batch) <= 4 for part in parts for batch in part)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stop", [6, 8])  # in the middle of a window, and at its end
def test_training_goes_on_where_it_stopped(workers, stop):
    whole = [content(batch) for batch in islice(loaders(0).train_dataloader(), 14)]
    loader = loaders(workers).train_dataloader()
    running = iter(loader)
    assert [content(next(running)) for _ in range(stop)] == whole[:stop]
    state = loader.state_dict()
    del running
    resumed = loaders(workers).train_dataloader()
    resumed.load_state_dict(state)
    assert [content(batch) for batch in islice(resumed, 14 - stop)] == whole[stop:]


def test_what_a_batch_is_made_of_is_worked_out_by_the_loaders_process(monkeypatch):
    data = loaders(1)
    expected = [content(batch) for batch in islice(loaders(0).train_dataloader(), 6)]
    loader = iter(data.train_dataloader())  # the process has begun
    monkeypatch.setattr(Numbers, "caption", None)  # a call here would fail
    assert [content(next(loader)) for _ in range(6)] == expected
