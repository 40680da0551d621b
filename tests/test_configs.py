"""Every configuration composes and builds what it says."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf

from reelm.data.module import ClipData
from reelm.engine.benchmark import Settings
from reelm.engine.optimisation import Optimisation
from reelm.lm.language_model import LanguageModel
from reelm.lm.vocabulary import Vocabulary
from reelm.scripts.common import TEXT, check, quoted
from reelm.tasks.task import tasks_of

CONF = Path(__file__).parents[1] / "conf"
MILLIONS = {"tiny": (0, 1), "zoetrope": (4, 12), "small": (80, 130), "base": (250, 350), "pixelcnn": (0, 20)}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str, name: str = "train"):
    GlobalHydra.instance().clear()
    with initialize_config_module("reelm.conf", version_base=None):
        return compose(name, list(overrides))


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_programs_settings_fit_themselves(name):
    check(name, ["data.root=somewhere"] if name == "encode" else [])


@pytest.mark.parametrize("group", sorted(p.name for p in CONF.iterdir() if any(p.glob("*.yaml")) and p.name != "cli"))
def test_every_option_composes_in_some_program(group):
    programs = sorted((p.stem for p in CONF.glob("*.yaml") if f"- {group}:" in p.read_text()), reverse=True)
    assert programs, f"no program has the group {group}"
    for option in options(group):
        known = ["data.root=somewhere"] if group == "data" and option != "zoetrope" else []
        check(programs[0], [f"{group}={option}", *known])


@pytest.mark.parametrize("name", options("task"))
def test_tasks_are_named_as_their_files(name):
    task = instantiate(composed(f"task={name}").task)
    names = [part.name for part in tasks_of(task)]
    mixtures = {"mixture", "audio_visual"}
    every = set(options("task")) - mixtures
    loud = {part.name for part in tasks_of(task) if getattr(part, "audio", False)}
    assert (
        names == [name]
        if name not in mixtures
        else set(names) == every - ({"t2av", "v2a", "a2v", "av_continuation"} - loud)
    )
    assert bool(loud) == (name in ("audio_visual", "t2av", "v2a", "a2v", "av_continuation"))


@pytest.mark.parametrize("size", options("lm"))
def test_language_models_have_the_size_they_say(size):
    cfg = composed(f"lm={size}")
    with torch.device("meta"):  # no memory, no time
        transformer = instantiate(cfg.lm)
        head = instantiate(cfg.head)(vocabulary=Vocabulary(visual=4096, text=1024), width=transformer.width)
        lm = LanguageModel(transformer, head)
    low, high = MILLIONS[size]
    assert low < sum(p.numel() for p in lm.parameters()) / 1e6 < high


def test_a_sweep_over_heads_may_leave_the_language_model():
    check("train", ["-m", "head=chained,per_token_diffusion,dit_flow"])
    stages = [
        composed(f"head={head}").stage._target_.rpartition(".")[2] for head in ("per_token_diffusion", "dit_flow")
    ]
    assert stages == ["LMTraining", "DiffusionTraining"]


@pytest.mark.parametrize("size, low, high", [("tiny", 0, 1), ("zoetrope", 6, 9), ("small", 150, 190)])
def test_denoisers_have_the_size_they_say(size, low, high):
    with torch.device("meta"):
        denoiser = instantiate(composed(f"denoiser={size}").denoiser)(channels=8, frames=4, pieces=1024)
    assert low < sum(p.numel() for p in denoiser.parameters()) / 1e6 < high


@pytest.mark.parametrize(
    "quantizer, head",
    [
        (["quantizer=lfq", "quantizer.bits=12"], ["head=categorical"]),
        (["quantizer=fsq", "quantizer.levels=[8,8,8,8]"], ["head=factorized", "head.bits=[6,6]"]),
        (["quantizer=lfq"], ["head=chained"]),
        (["quantizer=fsq"], ["head=chained", "head.bits=[9,9]"]),
        (["quantizer=vq", "quantizer.levels=2"], ["head=chained", "head.bits=[10,10]"]),
        (["quantizer=lfq"], ["head=masked"]),
        (["quantizer=fsq"], ["head=masked", "head@head.codes=factorized"]),
    ],
)
def test_heads_fit_quantizers(quantizer, head):
    cfg = composed(*quantizer, *head, "tokenizer=tiny", "lm=tiny")
    tokenizer, transformer = instantiate(cfg.tokenizer), instantiate(cfg.lm)
    made = instantiate(cfg.head)(vocabulary=Vocabulary(visual=tokenizer.vocabulary, text=64), width=transformer.width)
    assert made.size == tokenizer.vocabulary
    ids = torch.cat([torch.arange(64), torch.randint(made.vocabulary.size, (500,))])[None]
    assert made.embed(ids).shape == (1, 564, transformer.width)
    hidden, codes = torch.randn(1, 564, transformer.width), torch.randint(made.size, (1, 564)) + made.offset
    assert made.loss(hidden, codes, torch.ones(1, 564, dtype=torch.bool))[0].isfinite()


COMPRESSION = {
    "cvivit": (2, 8, 8), "stvivit": (1, 4, 4), "frame_vq": (1, 8, 8), "conv3d": (4, 4, 4), "palette": (1, 1, 1),
    "magvit2_8x8x8": (8, 8, 8), "magvit2_4x16x16": (4, 16, 16),
}  # fmt: skip


@pytest.mark.parametrize("name", options("tokenizer"))
def test_tokenizers_compress_as_their_papers_do(name):
    with torch.device("meta"):
        tokenizer = instantiate(composed(f"tokenizer={name}").tokenizer)
    assert tuple(tokenizer.compression) == COMPRESSION.get(name, (4, 8, 8))


@pytest.mark.parametrize(("name", "grid"), [("magvit2_8x8x8", (3, 4, 8)), ("magvit2_4x16x16", (5, 2, 4))])
def test_other_compressions_of_magvit2_make_the_tokens_they_say(name, grid):
    narrow = {"channels": 8, "blocks": 1}  # the same network, thinner
    config = composed("tokenizer=magvit2", "quantizer.bits=6").tokenizer
    other = composed(f"tokenizer={name}", "quantizer.bits=6").tokenizer
    assert set(other) == set(config) and other._target_ == config._target_ and other.adaptive == config.adaptive
    for key, value in narrow.items():
        other[key] = [value] * len(other[key])
    tokenizer = instantiate(other).eval()
    ids = tokenizer.encode(torch.rand(1, 3, 17, 32, 64) * 2 - 1)
    assert tuple(ids.shape[1:]) == grid == tokenizer.grid(17, 32, 64)
    assert tokenizer.decode(ids).shape == (1, 3, 17, 32, 64)


def test_the_built_in_data_need_nothing():
    data = instantiate(composed("data.batch_size=2").data)
    assert isinstance(data, ClipData) and data.batch_size == 2 and data.train.get(0).captions[0]


@pytest.mark.parametrize("name", ["one_by_one", "jacobi", "fast", "blocks", "diagonal"])
def test_ways_of_decoding_change_the_passes_alone(name):
    changes = instantiate(composed(f"sampler={name}", name="generate").sampler, _convert_="all")
    assert callable(changes.pop("decoding")) and not any(changes.values())


def test_optimisation_and_sampler_build():
    assert isinstance(instantiate(composed("stage=tokenizer").stage.optimisation), Optimisation)
    assert instantiate(composed().sampler).guidance > 1
    cfg = composed(name="benchmark")
    Settings(cfg.suite, cfg.rounds, cfg.threads, cfg.batch, cfg.quick)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["task=t3v"], "unknown task 't3v'; did you mean t2v? (choose from a2v, "),
        (["lm.dpeth=3"], "no setting lm.dpeth; did you mean lm.depth?"),
        (["lr=1e-3"], "no setting lr; did you mean stage.optimisation.lr?"),
        (["tsk=t2v"], "no setting tsk; did you mean task?"),
        (["data.rot=x"], "no setting data.rot"),
        (["lm.depth=many"], "lm.depth is a number such as 8; got 'many'"),
        (["resume=perhaps"], "resume is true or false; got 'perhaps'"),
        (["lm.sites=3"], "lm.sites is a list such as ["),
        (["stage.optimisation=fast"], "stage.optimisation holds several settings"),
        (["data=folder"], "data.root is not set; give data.root=..."),
        (["head=categorical,factorized"], "head has several values: add -m"),
        (["lm.depth"], "cannot read 'lm.depth': write name=value"),
        (
            ["task=t2v", "or", "t2i", "lm=tiny"],
            "cannot read 'or': write name=value; a value with spaces needs quotes, such as 'task=t2v or t2i'",
        ),
        (["lm.sites=[3"], "cannot read 'lm.sites=[3'"),
        (["--steps", "3"], "unknown option --steps"),
        (["-m", "head=categorical,factorised"], "unknown head 'factorised'; did you mean factorized?"),
        (["-m", "lm.depth=2,x"], "lm.depth is a number such as 8; got 'x'"),
        (["~seed"], "~seed: no setting can be taken away; give seed another value"),
        (["head=null"], "head cannot be null; leave it out (choose from categorical, "),
        (["~lm.dpth"], "no setting lm.dpth; did you mean lm.depth?"),
    ],
)
def test_mistakes_are_named_on_one_line(arguments, message):
    with pytest.raises(ValueError) as caught:
        check("train", arguments)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("program, argument", [("generate", "lm=tiny"), ("reconstruct", "tokenizer=tiny")])
def test_another_program_s_groups_are_no_settings(program, argument):
    with pytest.raises(ValueError, match=f"^no setting {argument.split('=')[0]}"):
        check(program, [argument])


@pytest.mark.parametrize(
    "arguments",
    [
        ["trainer.devices=auto"], ["lm.kv_heads=1"], ["stage.text=512", "stage.text_drop=0"], ["+lm.new=1"],
        ["-m", "head=categorical,factorized", "seed=0,1"], ["data=folder", "data.root=/some where/x"],
        ["trainer=ddp", "hydra.run.dir=.", "hydra.job.name=train_ddp_process_1"], ["--cfg", "job"], ["--help"],
    ],
)  # fmt: skip
def test_right_settings_pass(arguments):
    check("train", arguments)


def test_an_experiment_s_settings_stand_before_the_usual_ones():
    cfg = composed("experiment=heads")
    assert (cfg.output, cfg.ema, cfg.trainer.max_steps) == ("outputs/heads", 0.99, 1200)
    assert composed("experiment=heads", "ema=0.5").ema == 0.5


@pytest.mark.parametrize(
    "text", ["a red, big star", "it's (new) [x]=1", 'say "go"', "back\\", "\\'", "", "5 % {of} it"]
)
def test_prompts_may_hold_any_sign(text):
    cfg = composed(quoted(f"prompt={text}", ["prompt"]), name="generate")
    assert cfg.prompt == text


@pytest.mark.parametrize("argument", ["audio=a clip, (1).mp4", "audio='a clip, (1).mp4'"])
def test_a_path_may_be_given_by_the_name_of_a_group(argument):
    check("generate", [quoted(argument, ["audio"])])
    assert composed(quoted(argument, ["audio"]), name="generate").audio == {TEXT: "a clip, (1).mp4"}


@pytest.mark.parametrize("kind", ["folder", "manifest", "tars"])
def test_the_root_is_said_once(kind):
    cfg = OmegaConf.to_container(composed(f"data={kind}", "data.root=here", "data.train.frames=9").data, resolve=False)
    data = composed(f"data={kind}", "data.root=here", "data.train.frames=9").data
    word = "path" if kind == "manifest" else "root"
    assert cfg["root"] == data.train[word] == data.validation[word] == "here" and data.validation.frames == 9
