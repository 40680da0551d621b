"""The programs, as a user runs them."""

import json
from pathlib import Path

import pytest
import torch

from programs import DIFFUSION, LM, ROOT, TINY, error_line, losses, process, program
from reelm.data.clip import Clip
from reelm.data.tokens import TokenShards
from reelm.data.writing import write_video
from reelm.data.zoetrope.dataset import Zoetrope
from reelm.engine import store
from reelm.engine.loading import load
from reelm.engine.model_training import train_text
from reelm.engine.video_diffusion import VideoDiffusion
from reelm.engine.video_lm import VideoLM
from reelm.lm.masked_diffusion import MaskedDenoising
from reelm.lm.token_diffusion import TokenDenoising
from reelm.scripts.common import quoted


def test_a_tokenizer_is_trained(tokenizer):
    model = store.load(tokenizer / "model")
    assert model.encode(torch.zeros(1, 3, 5, 32, 32)).shape == (1, 2, 4, 4)
    assert (tokenizer / "last.ckpt").is_file() and {path.suffix for path in (tokenizer / "samples").iterdir()} == {
        ".png",
        ".mp4",
    }
    assert "val/psnr" in (tokenizer / "logs/metrics.csv").read_text()


ADVERSARY = ("adversary=magvit2", "adversary.discriminator.channels=[8,8]", "adversary.discriminator.strides=[[2,2,2]]")


def test_a_tokenizer_is_trained_against_an_adversary(tmp_path):
    assert (
        program("train", "stage=tokenizer", f"output={tmp_path}", *ADVERSARY, "trainer.log_every_n_steps=1", *TINY) == 0
    )
    logged = (tmp_path / "logs/metrics.csv").read_text()
    assert all(f"train/{name}" in logged for name in ("adversarial", "discriminator", "lecam", "r1"))
    assert not any("discriminator" in name for name in store.load(tmp_path / "model").state_dict())


def test_a_tokenizer_without_quantization_goes_through_the_programs(tmp_path, capfd):
    tiny = [argument for argument in TINY if "quantizer" not in argument] + ["quantizer=continuous"]
    gaussian = ("quantizer.gaussian=true", "trainer.log_every_n_steps=1")
    assert program("train", "stage=tokenizer", *tiny, *gaussian, f"output={tmp_path}/run") == 0
    logged = (tmp_path / "run/logs/metrics.csv").read_text()
    assert "train/kl" in logged and "val/latent_std" in logged and "codes" not in logged
    tokenizer = store.load(tmp_path / "run/model")
    assert tokenizer.quantizer.batches == 2 and tokenizer.vocabulary is None
    clip = write_video(tmp_path / "a.mp4", Clip(torch.rand(1, 3, 5, 32, 32) * 2 - 1))
    common = (f"video={clip}", f"model={tmp_path}/run/model", f"output={tmp_path}/out.mp4")
    assert program("reconstruct", *common, "codecs=[h264]") == 0
    assert json.loads((tmp_path / "out.json").read_text())["results"]["tokenizer"]["bits_per_token"] == 16 * 8
    capfd.readouterr()
    given = (*LM, *tiny, "task=t2v", f"stage.tokenizer={tmp_path}/run/model", f"output={tmp_path}/lm")
    assert program("train", *given) == 2
    assert error_line(capfd).startswith("error: this tokenizer's tokens are continuous")


class Shrink(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        front = x[:, :, :1].expand(-1, -1, 3, -1, -1)
        return torch.nn.functional.avg_pool3d(torch.cat([front, x], 2), (4, 8, 8))


class Spread(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(4, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)[:, :, 3:]


def test_a_tokenizer_from_outside_goes_through_the_programs_if_trusted(tmp_path, capfd):
    for name, module in (("encoder", Shrink()), ("decoder", Spread())):
        torch.jit.script(module).save(str(tmp_path / f"{name}.jit"))
    clip = write_video(tmp_path / "a.mp4", Clip(torch.rand(1, 3, 5, 32, 32) * 2 - 1))
    given = ("reconstruct", f"video={clip}", f"model={tmp_path}", f"output={tmp_path}/out.mp4", "codecs=[]")
    assert program(*given) == 2
    assert "holds TorchScript programs, which can read and write your files" in error_line(capfd)
    assert program(*given, "trust=true") == 0
    assert json.loads((tmp_path / "out.json").read_text())["results"]["tokenizer"]["numbers_per_token"] == 3
    few = ("+data.train.length=2", "+data.validation.length=2", "data.train.size=32")
    given = ("encode", f"model={tmp_path}", "data=zoetrope", *few, f"output={tmp_path}/tokens", "workers=0")
    assert program(*given, "trust=true") == 0
    assert TokenShards(tmp_path / "tokens")[1].tokens.shape == (1, 5, 4, 4, 3)
    capfd.readouterr()
    given = (*LM, *TINY, "task=t2v", f"stage.tokenizer={tmp_path}", f"output={tmp_path}/lm")
    assert program("train", *given) == 2
    assert "holds TorchScript programs" in error_line(capfd)


def test_a_decoder_is_trained_on_for_the_same_tokens(tokenizer, tmp_path):
    only = ("stage.part=decoder", f"init={tokenizer}/model", f"output={tmp_path}")
    assert (
        program("train", "stage=tokenizer", *TINY, "tokenizer.blocks=[2,1]", "+tokenizer.encoder_blocks=[1,1]", *only)
        == 0
    )
    before, after = store.load(tokenizer / "model"), store.load(tmp_path / "model")
    assert store.fingerprint(after) == store.fingerprint(before)
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    assert torch.equal(after.encode(video), before.encode(video))
    assert not torch.equal(after.decode(after.encode(video)), before.decode(before.encode(video)))


def test_a_language_model_is_trained_on_the_mixture(tokenizer, tmp_path):
    assert program("train", *LM, f"stage.tokenizer={tokenizer}/model", f"output={tmp_path}", *TINY) == 0
    model = VideoLM.from_pretrained(tmp_path / "model")
    assert {"t2v", "t2i", "i2v", "stylization"} <= set(model.tasks)
    logged = (tmp_path / "logs/metrics.csv").read_text()
    assert "val/nll" in logged and all(f"val/{name}" in logged for name in model.tasks)


def test_a_masked_model_is_trained_and_makes_clips(tokenizer, tmp_path, capfd):
    common = (*LM, "task=t2v", f"stage.tokenizer={tokenizer}/model", *TINY)
    codes = ("head=masked", "head@head.codes=factorized", "head.codes.bits=[6,6]")
    assert program("train", *common, *codes, f"output={tmp_path}") == 0
    made = (f"model={tmp_path}/model", "prompt=a star", f"output={tmp_path}/a.gif")
    assert program("generate", *made) == 0 and program("generate", *made, "sampler=masked", "sampler.steps=3") == 0
    assert json.loads((tmp_path / "a.json").read_text())["sampling"]["steps"] == 3
    capfd.readouterr()
    assert program("train", *common, f"init={tmp_path}/model", f"output={tmp_path}/b") == 2
    assert "holds weights of another model: head." in error_line(capfd)
    assert program("generate", "model=zoetrope", "prompt=a star", "sampler=masked", f"output={tmp_path}/b.gif") == 2
    assert "sampler=masked needs a model with a masked head; this one's is Chained" in error_line(capfd)


def test_a_language_model_is_trained_on_several_formats(tokenizer, tmp_path):
    formats = "stage.formats=[{frames:9,size:[32,32]},{frames:5,size:[16,48],fps:12}]"
    common = (*LM, "task=i2v", f"stage.tokenizer={tokenizer}/model", formats, *TINY, "trainer.max_steps=8")
    assert program("train", *common, f"output={tmp_path}") == 0
    output = tmp_path / "a.mp4"
    wide = ("size=[16,48]", "fps=12", "chain=[t2v,i2v]", "prompt=a star")
    assert program("generate", f"model={tmp_path}/model", *wide, f"output={output}") != 0  # it has no t2v
    assert program("generate", f"model={tmp_path}/model", "task=i2v", "image=nowhere.png", "size=[16,48]") != 0
    model = VideoLM.from_pretrained(tmp_path / "model")
    assert [str(part) for part in model.formats.parts] == [
        "9 frames of 32 x 32 at 8 fps",
        "5 frames of 16 x 48 at 12 fps",
    ]


def test_weights_keep_the_text_model_they_were_trained_with(tokenizer, tmp_path):
    common = (*LM, "task=t2v", f"stage.tokenizer={tokenizer}/model", *TINY)
    assert program("train", *common, f"output={tmp_path}/first") == 0
    text = (tmp_path / "first/model/text.model").read_bytes()
    assert train_text(Zoetrope(short_captions=1), 400).model != text  # what other captions would make of it
    common += ("data.train.short_captions=1",)
    assert program("train", *common, f"output={tmp_path}/first", "resume=true", "trainer.max_steps=4") == 0
    assert (tmp_path / "first/model/text.model").read_bytes() == text
    assert len(list((tmp_path / "first/logs").glob("metrics*.csv"))) == 2
    assert program("train", *common, f"output={tmp_path}/second", f"init={tmp_path}/first/model") == 0
    assert (tmp_path / "second/model/text.model").read_bytes() == text


def test_prompts_can_be_read_by_t5(tokenizer, t5_folder, tmp_path):
    text = f"stage.text={{_target_:reelm.tokenizers.text.T5Text,path:{t5_folder}}}"
    common = ("stage=lm", text, "lm.context_width=32", "task=t2v", f"stage.tokenizer={tokenizer}/model", *TINY)
    assert program("train", *common, f"output={tmp_path}") == 0
    assert not any("encoder.block" in name for name in torch.load(tmp_path / "last.ckpt")["state_dict"])
    assert program("train", *common, f"output={tmp_path}", "resume=true", "trainer.max_steps=3") == 0
    assert VideoLM.from_pretrained(tmp_path / "model").generate("a red star").video.shape == (1, 3, 17, 64, 64)


def test_the_jobs_of_a_sweep_have_folders_and_are_set_side_by_side(tokenizer, tmp_path, capfd):
    common = ("task=t2v", "stage.text=400", f"stage.tokenizer={tokenizer}/model", f"output={tmp_path}/sweep")
    small = ("denoiser=tiny", "data.train.size=32", "data.train.frames=5")
    assert program("train", "-m", "head=factorized,chained,dit_flow", *common, *TINY, *small) == 0
    heads = [json.loads((tmp_path / "sweep" / job / "model/lm/config.json").read_text()) for job in "01"]
    assert [head["model"]["head"]["_target_"].rpartition(".")[2] for head in heads] == ["Factorized", "Chained"]

    few = ("clips=2", "batch=2", "rounds=1", "splits=[validation]")
    made = (f"output={tmp_path}/out.json", f"sheets={tmp_path}/sheets")
    assert program("evaluate", "suite=sweep", f"model={tmp_path}/sweep", *few, *made) == 0
    models = json.loads((tmp_path / "out.json").read_text())["models"]
    assert list(models) == ["Factorized", "Chained", "DiT, Flow"] and [m["folder"] for m in models.values()] == [*"012"]
    assert models["DiT, Flow"]["passes"] == 32 and 1 < models["Factorized"]["passes"] <= 32  # of 2 x 4 x 4 tokens
    for one in models.values():
        assert one["steps"] == 2 and min(one["flops_a_clip"], one["seconds_a_step"], one["seconds_a_clip"]) > 0
        assert set(one["scores"]["validation"]) >= {"generated", "ceiling", "judge", "chance"}
    table = (tmp_path / "sheets" / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table if line.startswith("| ")] == [
        "| head", "| Factorized", "| Chained", "| DiT, Flow", "| *ceiling*", "| *judge*", "| *chance*",
    ]  # fmt: skip
    assert len({line.count("|") for line in table if line.startswith("|")}) == 1
    assert (tmp_path / "sheets" / "dit_flow_validation.png").is_file()
    assert program("evaluate", "suite=sweep", f"model={tokenizer}", *few, *made) == 2
    assert "suite=sweep compares the models of a multirun" in error_line(capfd)


@pytest.fixture(scope="module")
def continuous(tmp_path_factory) -> Path:
    """A tokenizer without quantization, trained for two steps by the program."""
    output = tmp_path_factory.mktemp("continuous")
    tiny = [argument for argument in TINY if not argument.startswith("quantizer")]
    assert program("train", "stage=tokenizer", "quantizer=continuous", f"output={output}", *tiny) == 0
    return output


def test_a_model_that_denoises_is_trained_resumed_and_used(continuous, tmp_path):
    common = (*DIFFUSION, f"stage.tokenizer={continuous}/model", f"output={tmp_path}", *TINY)
    assert program("train", *common) == 0
    assert program("train", *common, "resume=true", "trainer.max_steps=3") == 0
    assert isinstance(model := load(tmp_path / "model"), VideoDiffusion) and "stylization" in model.tasks
    logged = "".join(path.read_text() for path in (tmp_path / "logs").glob("metrics*.csv"))
    assert "val/mse" in logged and all(f"val/{name}" in logged for name in model.tasks)
    output = tmp_path / "clip.mp4"
    assert program("generate", f"model={tmp_path}/model", "prompt=a star", "sampler.steps=1", f"output={output}") == 0
    assert json.loads(output.with_suffix(".json").read_text())["sampling"]["steps"] == 1
    scores = ("tasks=[t2v,inpainting]", "splits=[validation]", "clips=2", "batch=2", f"output={tmp_path}/scores.json")
    assert program("evaluate", "suite=zoetrope", f"model={tmp_path}/model", *scores) == 0
    assert set(json.loads((tmp_path / "scores.json").read_text())["validation"]) == {"t2v", "inpainting"}


@pytest.mark.parametrize("head, kind", [("per_token_diffusion", TokenDenoising), ("mar", MaskedDenoising)])
def test_continuous_tokens_are_denoised_one_by_one_or_in_masked_order(head, kind, continuous, tmp_path):
    common = (*LM, f"stage.tokenizer={continuous}/model", "task=i2v", f"output={tmp_path}", *TINY)
    small = ("data.train.size=32", "data.train.frames=5", "sampler.guidance=3")
    assert program("train", f"head={head}", *common, *small) == 0
    assert "val/mse" in (tmp_path / "logs/metrics.csv").read_text()
    model = load(tmp_path / "model")
    assert isinstance(model, VideoLM) and model.sampling == kind(guidance=3)
    output = (
        "prompt=a star",
        "task=i2v",
        f"image={next((tmp_path / 'samples').glob('*.png'))}",
        f"output={tmp_path}/a.gif",
    )
    assert program("generate", f"model={tmp_path}/model", "sampler.steps=1", *output) == 0


def test_latent_actions_are_learned_and_clips_played_by_them(tokenizer, tmp_path, capsys):
    small = ("data.train.size=32", "data.train.frames=5")
    acts = ("stage=latent_actions", "latent_actions=tiny", "latent_actions.stride=4", f"output={tmp_path}/actions")
    assert program("train", *acts, *small, *TINY) == 0
    assert "val/dpsnr" in (tmp_path / "actions/logs/metrics.csv").read_text()
    assert store.load(tmp_path / "actions/model").codes == 4
    world = (*LM, "task=i2v", "head=masked", "sampler=masked", f"stage.tokenizer={tokenizer}/model", *small, *TINY)
    folder = f"stage.actions={tmp_path}/actions/model"
    assert program("train", *world, folder, f"output={tmp_path}/wrong") == 2
    assert "the head knows 0 actions and the latent action model has 4" in capsys.readouterr().err
    assert program("train", *world, folder, "head.actions=4", f"output={tmp_path}/world") == 0
    picture = next((tmp_path / "world/samples").glob("*.png"))
    play = (f"model={tmp_path}/world/model", f"image={picture}", "sampler.guidance=1", f"output={tmp_path}/a.gif")
    assert program("generate", *play, "actions=[3]") == 0
    assert json.loads((tmp_path / "a.json").read_text())["actions"] == [3]
    for wrong, message in (
        ("[1,2]", "actions has 2 numbers; this clip takes 1, one for each latent frame to make"),
        ("[4]", "actions are numbers from 0 to 3; got 4"),
        ("left", "actions is a list of whole numbers such as [0,3,3]; got left"),
    ):
        assert program("generate", *play, f"actions={wrong}") == 2
        assert message in capsys.readouterr().err


def test_a_multirun_needs_no_output(tokenizer, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["-m", "head=chained,masked", f"stage.tokenizer={tokenizer}/model", "trainer.max_steps=0", *LM[1:]]
    assert program("train", *given) == 2 and "the schedule wsd needs an end" in error_line(capfd)
    assert (tmp_path / "outputs" / "lm" / "multirun.yaml").is_file()


def test_lightning_command_line(tmp_path, capfd):
    small = "--model.init_args.tokenizer.init_args"
    arguments = (
        "fit", f"--config={ROOT}/conf/cli/tokenizer.yaml", "--trainer.max_steps=2", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--trainer.logger=false", "--trainer.val_check_interval=2",
        "--data.batch_size=2", "--data.workers=0", "--data.validation_clips=2", f"--export.folder={tmp_path}",
        f"{small}.channels=[16,16]", f"{small}.blocks=[1,1]",
    )  # fmt: skip
    assert program("cli", *arguments) == 0
    assert store.load(tmp_path / "model").vocabulary == 4096 and (tmp_path / "last.ckpt").is_file()
    assert program("cli", *arguments) == 2
    assert f"continue it with --ckpt_path={tmp_path}/last.ckpt" in error_line(capfd)
    again = ("--trainer.max_steps=3", f"--ckpt_path={tmp_path}/last.ckpt")
    assert program("cli", *arguments, *again) == 0
    assert json.loads((tmp_path / "model/config.json").read_text())["notes"] == {"step": 3}


def test_lightning_command_line_trains_language_models(tokenizer, tmp_path):
    status = program(
        "cli", "fit", f"--config={ROOT}/conf/cli/lm.yaml", "--trainer.max_steps=1", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--trainer.logger=false", "--trainer.limit_val_batches=0",
        "--data.batch_size=2", "--data.workers=0", f"--export.folder={tmp_path}", "--model.init_args.text=400",
        f"--model.init_args.tokenizer={tokenizer}/model", "--model.init_args.lm.init_args.width=64",
        "--model.init_args.lm.init_args.depth=1", "--model.init_args.lm.init_args.heads=2",
    )  # fmt: skip
    assert status == 0 and (tmp_path / "last.ckpt").is_file()
    assert VideoLM.from_pretrained(tmp_path / "model").tasks.keys() == {"t2v"}


@pytest.mark.parametrize("setting", ["stage.pack=true", "stage.checkpointing=true"])
def test_packed_and_checkpointed_training_has_the_losses_of_the_plain_one(tokenizer, tmp_path, setting):
    common = (*LM, *TINY, "task=t2v", f"stage.tokenizer={tokenizer}/model", "trainer.log_every_n_steps=1")
    common += ("trainer.precision=32-true", "data.train.short_captions=0", "ema=0", "stage.text_drop=0")
    for folder, settings in (("plain", ()), ("other", (setting,))):
        assert program("train", *common, *settings, f"output={tmp_path}/{folder}") == 0
    # a prompt may lack padding that it has in the plain run
    tolerance = 0.01 if "pack" in setting else 1e-5
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)


@pytest.mark.slow
def test_two_processes_train_together(tmp_path):
    done = process("train", "stage=tokenizer", "trainer=ddp", f"output={tmp_path}", *TINY)
    assert done.returncode == 0, done.stderr
    assert store.load(tmp_path / "model").vocabulary == 4096


@pytest.mark.slow
def test_two_processes_train_tasks_of_which_some_use_no_sound(tokenizer, tmp_path):
    output, sound = tmp_path / "lm", ROOT / "pretrained/zoetrope/audio"
    arguments = ("trainer=ddp", "task=audio_visual", "seed=1", f"stage.audio={sound}", f"output={output}")
    done = process("train", *arguments, f"stage.tokenizer={tokenizer}/model", *LM, *TINY, "trainer.max_steps=3")
    assert done.returncode == 0, done.stderr
    assert VideoLM.from_pretrained(output / "model").audio is not None


def test_a_clip_is_reconstructed(tokenizer, tmp_path, capsys):
    clip = write_video(tmp_path / "a, [b].mp4", Clip(torch.rand(1, 3, 9, 33, 47) * 2 - 1))
    output = tmp_path / "out.mp4"
    common = (f"video={clip}", f"model={tokenizer}/model", f"output={output}")
    assert program("reconstruct", *common, "size=[32,40]", "frames=5", "codecs=[h264]") == 0
    assert {"out.mp4", "out.png", "out.json"} < {path.name for path in tmp_path.iterdir()}
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["config"]["size"] == record["size"] == [32, 40] and set(record["results"]) == {"tokenizer", "h264"}
    assert record["results"]["tokenizer"]["bits"] == 12 * 2 * 4 * 5
    assert "PSNR dB" in capsys.readouterr().out
    assert program("reconstruct", *common, "size=[32,40]", "frames=5", "codecs=[]", "audio_model=zoetrope") == 0
    assert "has no sound" in capsys.readouterr().err


def test_free_text_stays_what_it_was():
    words = ("prompt", "audio", "output")
    assert quoted("output=null", words) == "output=null" and quoted("seed=3", words) == "seed=3"
    for argument in ("audio=a.wav", "prompt=it's a star", 'prompt="stop" he said "go"', "prompt='quoted'"):
        once = quoted(argument, words)
        assert quoted(once, words) == once  # as in the command that an interrupted call prints
    assert quoted('prompt="stop" he said "go"', words) == 'prompt=\'"stop" he said "go"\''
