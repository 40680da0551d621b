"""What is measured of clips beside what the judge reads."""

from reelm.engine.evaluation import evaluate


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
    assert result["loop"]["even"]["judge"] >= 0.5 and "even" in texts[0] and "even" not in result["t2v"]
