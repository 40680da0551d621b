import pytest
import torch

from reelm.lm.sequence import Sequence
from reelm.lm.vocabulary import (
    SPECIAL,
    Special,
    Vocabulary,
    duration_token,
    frame_rate_token,
    resolution_token,
    task_token,
)


def test_ranges_follow_each_other_and_fill_the_vocabulary():
    v = Vocabulary(visual=4096, audio=64, text=1000)
    ids = [*range(SPECIAL), *v.visual_range, *v.audio_range, *v.text_range]
    assert ids == list(range(v.size))


def test_special_ids_are_distinct():
    slots = [*map(int, Special), *map(task_token, range(32)), *map(resolution_token, range(32))]
    slots += [*map(frame_rate_token, range(64)), *map(duration_token, range(64))]
    assert len(set(slots)) == len(slots) and max(slots) < SPECIAL


@pytest.mark.parametrize("kind", ["visual", "audio", "text"])
def test_codes_round_trip(kind):
    v = Vocabulary(visual=16, audio=8, text=4)
    codes = torch.arange(getattr(v, kind))
    ids = getattr(v, f"to_{kind}")(codes)
    assert ids.tolist() == list(getattr(v, f"{kind}_range"))
    assert torch.equal(getattr(v, f"from_{kind}")(ids), codes)


def test_ids_of_another_range_are_refused():
    v = Vocabulary(visual=16, audio=8)
    with pytest.raises(ValueError, match="visual ids reach from 272"):
        v.from_visual(v.to_audio(torch.tensor([0])))
    with pytest.raises(ValueError, match="to 16; this vocabulary has 0 to 15"):
        v.to_visual(torch.tensor([16]))
    with pytest.raises(ValueError, match="task's number is 32"):
        task_token(32)
    with pytest.raises(ValueError, match="-1 ids"):
        Vocabulary(visual=-1)


def sequence(rows: int, length: int, prefix: int, **changes) -> Sequence:
    ids = torch.arange(rows * length).view(rows, length)
    return Sequence(ids, ids[..., None].expand(-1, -1, 3), prefix, **changes)


def test_next_positions_are_those_of_the_next_column_unless_given():
    s = sequence(2, 4, 1)
    assert torch.equal(s.next_positions[:, :-1], s.positions[:, 1:])
    assert torch.equal(s.next_positions[:, -1], s.positions[:, -1])
    given = torch.full((2, 4, 3), 7)
    assert torch.equal(sequence(2, 4, 1, next_positions=given).to("cpu").next_positions, given)


def test_sequences_of_one_shape_join_and_part():
    a, b = sequence(2, 4, 1), sequence(1, 4, 1)
    both = Sequence.cat([a, b])
    assert len(both) == 3 and torch.equal(both[2:].ids, b.ids) and torch.equal(both[:2].positions, a.positions)
    with pytest.raises(ValueError, match="prefix of"):
        Sequence.cat([a, sequence(2, 4, 2)])
    with pytest.raises(ValueError, match="all sequences of one batch have context"):
        Sequence.cat([a, sequence(1, 4, 1, context=torch.zeros(1, 2, 3))])


def test_sequence_refuses_what_cannot_be_learnt():
    with pytest.raises(ValueError, match="inside the prefix of 2"):
        sequence(1, 4, 2, loss=torch.tensor([[False, True, True, True]]))
    with pytest.raises(ValueError, match="does not fit"):
        sequence(1, 4, 5)
    with pytest.raises(ValueError, match="positions"):
        Sequence(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 3, 3), 0)


def test_moving_a_sequence_keeps_integers():
    s = sequence(1, 4, 1, context=torch.zeros(1, 2, 3)).to(torch.bfloat16)
    assert s.ids.dtype is torch.int64 and s.context.dtype is torch.bfloat16
