"""What a user does wrong is told in one line."""

import pytest

from programs import LM, ROOT, TINY, error_line, process, program


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "data.root is not set"),
        (["data.root=nowhere"], "nowhere: no such folder"),
        (["data=zoetrope", "data.train.size=60"], "a clip of 17 frames of 60 x 60 does not fit this tokenizer"),
        (["data=zoetrope", "model=nowhere"], "no model nowhere"),
        (["tokenizer=nowhere"], "no setting tokenizer"),
        (["data=zoetrope", "passes=1.5"], "passes is a whole number such as 1; got 1.5"),
    ],
)
def test_mistakes_in_what_to_encode_are_one_line(arguments, message, tokenizer, capfd, tmp_path):
    model = [] if any(argument.startswith("model=") for argument in arguments) else [f"model={tokenizer}/model"]
    assert program("encode", *model, *arguments, f"output={tmp_path}/new") == 2
    assert error_line(capfd).startswith(f"error: {message}")
    assert not (tmp_path / "new").exists()


def test_where_tokens_cannot_be_written_is_told_before_any_is_made(tokenizer, capfd, tmp_path):
    (tmp_path / "file").write_text("no folder")
    given = (f"model={tokenizer}/model", "data=zoetrope", "workers=0", f"output={tmp_path}/file")
    assert program("encode", *given) == 2
    said = capfd.readouterr()
    assert said.err.splitlines()[-1].startswith(f"error: cannot write {tmp_path}/file/") and "clips/s" not in said.out


def test_training_again_needs_a_word(tokenizer, capfd):
    assert program("train", "stage=tokenizer", f"output={tokenizer}", *TINY) == 2
    assert "continue it with resume=true" in error_line(capfd)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["stage=lm", "stage.tokenizer=nowhere"], "no model at nowhere"),
        (["stage=lm", "head=dit_flow"], "head=dit_flow is no head of the language model"),
        (["stage=lm", "head=per_token_diffusion", "head.repeats=0"], "repeats is 1 or more; got 0"),
        (["stage=diffusion", "denoiser=tiny", "denoiser.layers=xy"], "layers are a letter for each block"),
        (["stage=diffusion", "denoiser=tiny", "stage.tokenizer=nowhere"], "no model at nowhere"),
        (["stage=diffusion", "denoiser=tiny", "objective.drawn=often"], "times are drawn logit_normal or uniform"),
        (["stage=lm", "stage.text={_target_:reelm.tokenizers.text.T5Text,path:nowhere}"], "no config.json in nowhere"),
        (["stage=lm", "stage.formats=3"], "formats are a list such as [{frames:17,size:[64,64],fps:8}]; got 3"),
        (["stage=lm", "stage.formats=[9]"], "a format is such as {frames:17,size:[64,64],fps:8}; got 9"),
        (["stage=diffusion", "denoiser=tiny", "reward=zoetrope"], "stage=diffusion learns without reward; leave"),
        (["stage=lm", "adversary=magvit2"], "stage=lm learns without adversary; leave"),
        (["stage=tokenizer", "data.batch_size=2.5"], "batch_size=2.5 must be 1 or more, and a whole number"),
        (["stage=tokenizer", "ema=2"], "ema=2 is no share of the average that stays"),
        (["stage=tokenizer", "tokenizer.channels=[16]"], "1 channels ask for 0 strides"),
        (["stage=tokenizer", "+tokenizer.colour=3"], "stage.tokenizer: "),
        (["stage=tokenizer", "stage.optimisation.schedule=linear"], "schedule is cosine, wsd or constant"),
        (["stage=tokenizer", "data=folder", "data.root=nowhere"], "nowhere: no such folder"),
        (["stage=tokenizer", "resume=true"], "resume=true but there is no"),
        (["stage=tokenizer", "trainer.accelerator=abacus"], "You selected an invalid accelerator"),
    ],
)
def test_mistakes_inside_are_one_line_too(arguments, message, capfd, tmp_path):
    assert program("train", *TINY, *arguments, f"output={tmp_path}/new") == 2
    assert error_line(capfd).startswith(f"error: {message}")
    assert not (tmp_path / "new").exists()


def test_weights_of_sound_need_sound(tokenizer, tmp_path, capfd):
    given = (*LM, *TINY, "task=t2v", f"stage.tokenizer={tokenizer}/model", "stage.level_weights=[4,2]")
    assert program("train", *given, f"output={tmp_path}/new") == 2
    assert error_line(capfd).startswith("error: stage.level_weights is for tasks with sound")


def test_a_sampler_of_another_head_is_told_before_the_first_step(tokenizer, tmp_path, capfd):
    given = (*LM, *TINY, "task=t2v", f"stage.tokenizer={tokenizer}/model", "sampler=masked")
    assert program("train", *given, f"output={tmp_path}/new") == 2
    assert error_line(capfd).startswith("error: sampler=masked needs a model with a masked head; this one's is")
    assert not (tmp_path / "new").exists()


def test_what_the_first_batch_shows_leaves_nothing_behind(tokenizer, tmp_path, capfd):
    given = (*LM, *TINY, "task=t2v", f"stage.tokenizer={tokenizer}/model", "data.train.size=60")
    assert program("train", *given, f"output={tmp_path}/new") == 2
    assert error_line(capfd).startswith("error: a clip of 17 frames of 60 x 60 does not fit this tokenizer")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "prompt="], "task=t2v needs prompt=..."),
        (["generate", "task=a2v"], "task=a2v needs audio=..."),
        (["generate", "task=t2v", "prompt=x", "audio=a clip.mp4"], "task=t2v has no use for audio=a clip.mp4; leave"),
        (["generate", "prompt=x", "frames=two"], "frames=two; give a whole number from 1"),
        (["generate", "prompt=x", "size=[64]"], "size=[64]; give [height,width] in pixels, or one side of a square"),
        (["generate", "prompt=x", "fps=fast"], "fps=fast; give a number above 0"),
        (["generate", "prompt=x", "chain=t2v"], "chain=t2v is no list; write it as one, such as chain=[t2i,i2v]"),
        (["generate", "prompt=x", "chain=[t2v,dance]"], "chain has the task dance, which there is not; tasks are t2v"),
        (["generate", "prompt=x", "sampler.guidance_schedule=odd"], "guidance_schedule is one of constant, linear, co"),
        (["generate", "prompt=x", "frames=4000000001"], "frames=4000000001 with samples=1 take "),
        (["generate", "prompt=x", "model=natural"], "model=natural is a tokenizer alone, which makes no clips"),
        (["generate", "prompt=x", "sampler.steps=5"], "this model has no sampler.steps; it has temperature"),
        (["generate", "prompt=x", "sampler.guidance=nan"], "guidance is a number from 0 on (1: none); got nan"),
        (["generate", "prompt=x", "sampler=fast", "sampler.decoding.lenience=nan"], "lenience is 1 (exact), or more"),
        (["generate", "prompt=x", "sampler=masked", "sampler.noise=nan"], "noise and final_temperature are 0 or more"),
        (["generate", "prompt=x", "sampler.temperature=inf"], "temperature is a number from 0 on; got inf"),
        (["generate", "task=unconditional", "prompt=x"], "task=unconditional heeds no prompt; leave prompt='x' out"),
        (
            ["generate", "task=t2i", "prompt=x", "seconds=3", "output=a.png"],
            "task=t2i makes a picture; leave frames",
        ),
        (
            ["generate", "prompt=x", "model=null"],
            "model cannot be null; leave it out, or give a value such as zoetrope",
        ),
        (["generate", "prompt=x", "seed=0,1"], "seed has several values: call the program once for each of them, or"),
        (["generate", "-m", "prompt=x", "seed=0,1"], "-m is for train, whose runs have folders of their own; call gen"),
        (
            ["generate", "prompt=x", "sampler=blocks", "sampler.decoding.rows=1.5"],
            "rows and columns of blocks are",
        ),
        (
            ["generate", "prompt=x", "sampler=jacobi", "sampler.decoding.window=1.5"],
            "window is a whole number from",
        ),
        (["evaluate", "tasks=t2v"], "tasks=t2v is no list; write tasks=[t2v]"),
        (["evaluate", "splits=[odd]"], "unknown split 'odd': choose one of train, validation, compositional"),
        (["evaluate", "clips=2.5"], "clips is a whole number such as 96; got 2.5"),
        (["evaluate", "tasks=[dance]"], "this model has no task 'dance'; it was trained for t2v"),
    ],
)
def test_mistakes_of_users_are_one_line(arguments, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *settings = arguments
    output = (
        [] if any("output" in word for word in settings) else [f"output=a.{'mp4' if name == 'generate' else 'json'}"]
    )
    assert program(name, *settings, *output) == 2
    assert error_line(capfd).startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


def test_nothing_but_one_line_and_status_two():
    done = process("train", "task=t3v")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown task 't3v'; did you mean t2v?") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_traceback_can_be_asked_for():
    done = process("train", "task=t3v", REELM_TRACEBACK="1")
    assert done.returncode != 0 and "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--trainer.max_stepz=3"], "unrecognized arguments: --trainer.max_stepz=3"),
        (["fit", "--config=nowhere.yaml"], "nowhere.yaml"),
        (["fit", f"--config={ROOT}/conf/cli/lm.yaml", "--trainer.max_steps=few"], "few"),
        (["fit", f"--config={ROOT}/conf/cli/lm.yaml", "--model.init_args.optimisation.init_args.lrr=1"], "'lrr'"),
        (["fitt"], "'fitt'"),
        (["fit", f"--config={ROOT}/conf/cli/tokenizer.yaml", "--trainer.accelerator=cpu", "--trainer.devices=0"], "0"),
        (["fit", f"--config={ROOT}/conf/cli/lm.yaml", "--model.init_args.tokenizer=none"], "error: no model at none"),
    ],
)
def test_mistakes_in_the_lightning_command_line_are_one_line(arguments, message, capfd):
    assert program("cli", *arguments) == 2
    assert message in error_line(capfd)


def test_what_cannot_be_packed_is_told(tokenizer, tmp_path, capfd):
    given = (*LM, *TINY, "task=t2v", f"stage.tokenizer={tokenizer}/model", f"output={tmp_path}", "stage.pack=true")
    for other in ("head=masked", "lm=pixelcnn"):
        assert program("train", *given, other) == 2
        assert error_line(capfd).startswith("error: stage.pack=true is for transformers that go on, without lm.layout")
    assert program("train", *given, "stage.pack=false", "stage.checkpointing=true", "lm=pixelcnn") == 2
    assert "are for networks of blocks; PixelCNN has none" in error_line(capfd)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give video=..., the path of a clip or picture"),
        (["video=nowhere.mp4", "codecs=[h265]"], "codec 'h265' is unknown"),
        (["video=nowhere.mp4", "model=nowhere"], "no model nowhere: give a folder"),
        (["video=nowhere.mp4", "tokenizer=tiny"], "no setting tokenizer"),
        (["video=nowhere.mp4", "size=big"], "size='big' is no number"),
        (["video=nowhere.mp4", "frames=many"], "frames is a number such as 65"),
        (["video=nowhere.mp4", "frames=null"], "frames cannot be null; leave it out, or give a value such as 65"),
        (["video=nowhere.mp4", "frames=nan"], "frames is a whole number such as 65; got nan"),
    ],
)
def test_mistakes_in_a_reconstruction_are_one_line(arguments, message, capfd, tmp_path):
    assert program("reconstruct", f"output={tmp_path}/a.mp4", *arguments) == 2
    assert error_line(capfd).startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_told_before_anything_is_measured(tmp_path, capfd):
    assert program("evaluate", f"output={tmp_path}") == 2
    assert "no extension cannot be written; use .json" in error_line(capfd)
    (tmp_path / "a.json").mkdir()
    assert program("evaluate", f"output={tmp_path / 'a.json'}") == 2
    assert "is a folder" in error_line(capfd)


@pytest.mark.parametrize("name", ["fast", "model", "blocks"])
def test_samplers_of_generate_are_none_of_training(name, tokenizer, tmp_path, capfd):
    output = tmp_path / "x"
    assert (
        program("train", *LM, f"stage.tokenizer={tokenizer}/model", *TINY, f"sampler={name}", f"output={output}") == 2
    )
    assert "in training, sampler is how the model samples where nothing else is asked for" in error_line(capfd)


def test_weights_to_begin_with_must_fit(tokenizer, tmp_path, capfd):
    only = ("stage=tokenizer", "stage.part=decoder", f"output={tmp_path}", *TINY)
    assert program("train", *only) == 2 and "goes on from a trained tokenizer" in error_line(capfd)
    assert program("train", *only, f"init={tokenizer}/model", "quantizer.bits=13") == 2
    assert "keeps the tokens" in error_line(capfd)
    other = ("task=t2v", f"stage.tokenizer={tokenizer}/model", f"output={tmp_path}", *LM, *TINY)
    assert program("train", *other, "init=pretrained/zoetrope") == 2
    assert "trained on tokens of another tokenizer" in error_line(capfd)
    assert program("train", *other, "init=pretrained/zoetrope/lm") == 2
    assert "init=... names the folder that holds lm/" in error_line(capfd)
    assert not list(tmp_path.rglob("*.ckpt"))
