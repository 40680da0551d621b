"""What is measured of clips beside what the judge reads."""

import torch

from reelm.data.zoetrope.dataset import Zoetrope
from reelm.engine.evaluation import asked, closes, evaluate
from reelm.tasks.generation import Generation
from reelm.tasks.known_frames import Loop, forth_and_back


def test_clips_that_jump_where_they_begin_anew_do_not_close():
    moving = torch.zeros(2, 3, 9, 16, 16)
    for time in range(9):
        moving[0, :, time, 4:8, time : time + 4] = 1  # to the right
        moving[1, :, time, 4:8, 2 * min(time, 9 - time)] = 1  # there and back
    assert closes(moving).tolist() == [False, True] and closes(forth_and_back(moving)[:, :, :-1]).all()
    assert closes(torch.zeros(1, 3, 5, 4, 4)).all()  # what stands still can go on for ever


def test_of_a_loop_it_is_told_whether_it_closes_and_not_how_it_moves(model):
    texts = []
    result = evaluate(model, ["loop", "t2v"], ("validation",), clips=4, batch=4, show=texts.append)["validation"]
    assert result["loop"]["closes"]["judge"] == 1.0 and set(result["loop"]["closes"]) == {
        "generated", "ceiling", "judge"
    }  # fmt: skip
    assert set(result["loop"]["last_frame_psnr"]) == {"generated", "ceiling"} and "last frame" in texts[0]
    assert (
        "last_frame_psnr" not in result["t2v"]
        and "closes" not in result["t2v"]
        and "closes" in texts[0]
        and "closes" not in texts[1]
    )
    caption = Zoetrope("validation").caption(0)
    assert all(one.motion is None for one in asked(Loop(), caption).objects)
    assert any(one.motion is not None for one in asked(Generation(), caption).objects)
