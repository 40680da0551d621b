"""The programs on stored tokens."""

from pathlib import Path

import pytest

from programs import DIFFUSION, LM, ROOT, TINY, error_line, losses, program
from reelm.data.writing import write_video
from reelm.data.zoetrope.dataset import Zoetrope

CLIPS = (
    "data=folder", "data.train.size=32", "data.train.frames=9", "data.train.held_out=[v6,v7]",
    "data.validation.clips_per_video=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    root, world = tmp_path_factory.mktemp("videos"), Zoetrope(size=(32, 48))
    for number in range(10):  # eight to train on: a second pass over them would draw other crops of the clips
        write_video(root / f"v{number}.mp4", world.get(number))
        (root / f"v{number}.txt").write_text(world.caption(number))
    return root


@pytest.fixture(scope="module")
def tokens(tokenizer, videos, tmp_path_factory) -> Path:
    """Tokens of a folder of videos, made by the program."""
    output = tmp_path_factory.mktemp("tokens")
    arguments = (*CLIPS, f"data.root={videos}", "shard_clips=4", "workers=0", "batch_size=2")
    assert program("encode", *arguments, f"model={tokenizer}/model", f"output={output}") == 0
    return output


def test_codes_are_denoised_as_points_from_stored_tokens_too(tokenizer, tokens, tmp_path):
    common = (*DIFFUSION, f"stage.tokenizer={tokenizer}/model", "task=i2v", *TINY)
    assert program("train", *common, "data=tokens", f"data.root={tokens}", f"output={tmp_path}/first") == 0
    again = (*common, f"output={tmp_path}/second", f"init={tmp_path}/first/model")
    assert program("train", *again, "data.train.size=32", "data.train.frames=9") == 0
    text = [(tmp_path / run / "model/text.model").read_bytes() for run in ("first", "second")]
    assert text[0] == text[1]


@pytest.mark.parametrize("task", ["t2v", "continuation"])
def test_stored_tokens_train_as_the_clips_they_are_of_do(task, tokenizer, videos, tokens, tmp_path):
    common = (*LM, *TINY, f"task={task}", f"stage.tokenizer={tokenizer}/model", "trainer.log_every_n_steps=1")
    common += ("trainer.precision=32-true",) + (("task.first=[5]",) if task == "continuation" else ())
    assert program("train", *common, "data=tokens", f"data.root={tokens}", f"output={tmp_path}/tokens") == 0
    assert program("train", *common, *CLIPS, f"data.root={videos}", f"output={tmp_path}/clips") == 0
    assert losses(tmp_path / "tokens") == pytest.approx(losses(tmp_path / "clips"), rel=1e-6)
    assert len(losses(tmp_path / "tokens")) == 3 and list((tmp_path / "tokens/samples").glob("*.mp4"))


def test_a_mixture_of_what_needs_no_pixels_is_trained_on_tokens(tokenizer, tokens, tmp_path):
    pixels = "backward interpolation connection loop inpainting outpainting stylization".split()
    without = [f"task.weights.{name}=0" for name in pixels]
    without += ["task.parts.continuation.first=[5]", "trainer.max_steps=8", "data.workers=1"]
    common = (*LM, *TINY, *without, f"stage.tokenizer={tokenizer}/model")
    assert program("train", *common, "data=tokens", f"data.root={tokens}", f"output={tmp_path}") == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["stage=lm", "task=inpainting"], "inpainting needs pixels and data=tokens holds none"),
        (["stage=lm", "task=stylization"], "stylization needs pixels"),
        (["stage=lm", "task=mixture"], "backward needs pixels"),
        (
            ["stage=lm", "task=t2v", "stage.tokenizer=pretrained/zoetrope/tokenizer"],
            "{tokens}/train holds tokens of an",
        ),
        (["stage=tokenizer"], "a tokenizer is trained on pixels"),
    ],
)
def test_what_tokens_cannot_train_is_one_line(arguments, message, tokenizer, tokens, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    common = [] if arguments[0] == "stage=tokenizer" else ["stage.text=400", f"stage.tokenizer={tokenizer}/model"]
    given = [*TINY, *common, *arguments, "data=tokens", f"data.root={tokens}", "quantizer.bits=18"]
    assert program("train", *given, f"output={tmp_path}") == 2
    assert error_line(capfd).startswith(f"error: {message.format(tokens=tokens)}")
