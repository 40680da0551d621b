"""A call of generate: its files, and what outlives its interruption."""

import json
import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from making import FAST
from reelm.data.clip import Clip
from reelm.data.reading import probe
from reelm.data.writing import write_image, write_video
from reelm.engine import interruption
from reelm.engine import job as job_file
from reelm.engine.errors import one_line_errors
from reelm.engine.inputs import Inputs
from reelm.engine.interruption import keep_tokens, read_tokens
from reelm.engine.job import Job, run_job
from reelm.lm.decoding import OneByOne, Run
from reelm.lm.parallel import Diagonal
from reelm.lm.sampling import Sampling
from reelm.lm.speculative import Jacobi
from reelm.tokenizers.magvit2 import MAGVIT2


@pytest.fixture
def written(monkeypatch) -> dict[str, Tensor]:
    """The pixels of each video that a job writes, by the name of its file. The files themselves cannot be compared: now
    and then the video codec makes another one of the same pixels."""
    pixels = {}

    def write(path, clip):
        pixels[path.name] = clip.video
        return write_video(path, clip)

    monkeypatch.setattr(job_file, "write_video", write)
    return pixels


def test_a_job_leaves_a_clip_a_sheet_and_a_record(box, tmp_path, capsys):
    paths = run_job(Job(str(box), None, Inputs("a red star"), str(tmp_path / "a.mp4"), samples=2), FAST, {"seed": 0})
    assert [path.name for path in paths] == ["a_0.mp4", "a_1.mp4", "a.png"]
    assert abs(probe(paths[0]).duration - 9 / 8) < 0.01
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["prompt"] == "a red star" and record["task"] == "t2v" and record["seeds"] == [0, 1]
    assert len(record["language_model"]) == 16 and record["seconds"]["make"] > 0


@pytest.mark.parametrize("decoding", [OneByOne(), Jacobi(4), Diagonal()], ids=str)
def test_an_interrupted_job_keeps_its_tokens_and_goes_on_exactly(box, tmp_path, written, capsys, monkeypatch, decoding):
    sampling = Sampling(decoding=decoding)
    job = Job(str(box), None, Inputs("a red star"), str(tmp_path / "a.mp4"), frames=13, samples=2, dtype="float32")
    run_job(job, sampling, {})
    passes, calls = json.loads((tmp_path / "a.json").read_text())["passes"], []

    def choose(run, *arguments, real=Run.choose):
        calls.append(1)
        if len(calls) == passes - 3:  # in the second window
            raise KeyboardInterrupt
        return real(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "choose", choose)
        patch.setattr("sys.argv", ["scripts/generate.py", "prompt='a red star'"])
        with pytest.raises(KeyboardInterrupt):
            run_job(replace(job, output=str(tmp_path / "b.mp4")), sampling, {})
    said, kept = capsys.readouterr().err.splitlines(), tmp_path / "b.tokens.safetensors"
    assert said[-1] == f"python scripts/generate.py 'prompt='\"'\"'a red star'\"'\"'' tokens={kept}"
    assert not (tmp_path / "b_0.mp4").exists() and "tokens of each clip are kept" in said[-2]
    run_job(replace(job, output=str(tmp_path / "b.mp4"), tokens=str(kept), dtype="auto"), sampling, {})
    assert all(torch.equal(written[f"a_{i}.mp4"], written[f"b_{i}.mp4"]) for i in range(2))
    again = json.loads((tmp_path / "b.json").read_text())
    assert again["passes"] < passes or isinstance(decoding, Diagonal)
    assert again["dtype"] == "float32"  # that of the tokens
    with pytest.raises(ValueError, match=r"were made with seeds \[0, 1\], not \[1, 2\]; give the same"):
        run_job(replace(job, tokens=str(kept), seed=1), sampling, {})
    kept.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a file of tokens"):
        run_job(replace(job, tokens=str(kept)), sampling, {})
    with pytest.raises(FileNotFoundError, match="tokens=... is what an interrupted call named"):
        run_job(replace(job, tokens=str(tmp_path / "nowhere")), sampling, {})


def test_an_interrupted_chain_goes_on_in_its_link(box, tmp_path, written, monkeypatch):
    chain = ["t2i", "i2v", {"task": "stylization", "prompt": "a blue circle"}]
    job = Job(str(box), None, Inputs("a red star"), str(tmp_path / "a.mp4"), samples=2, dtype="float32", chain=chain)
    run_job(job, FAST, {})
    passes, calls = json.loads((tmp_path / "a.json").read_text())["passes"], []

    def choose(run, *arguments, real=Run.choose):
        calls.append(1)
        if len(calls) == passes - 2:  # in the last link
            raise KeyboardInterrupt
        return real(run, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "choose", choose)
        run_job(replace(job, output=str(tmp_path / "b.mp4")), FAST, {})
    kept = tmp_path / "b.tokens.safetensors"
    run_job(replace(job, output=str(tmp_path / "b.mp4"), tokens=str(kept), dtype="auto"), FAST, {})
    assert all(torch.equal(written[f"a_{i}.mp4"], written[f"b_{i}.mp4"]) for i in range(2))
    assert json.loads((tmp_path / "b.json").read_text())["passes"] < passes
    with pytest.raises(ValueError, match="were made with task t2i,i2v,stylization, not t2i,i2v; give the same"):
        run_job(replace(job, tokens=str(kept), chain=chain[:2]), FAST, {})


def test_windows_without_tokens_keep_their_number(tmp_path):
    made, path = [[], [torch.ones(1, 3, dtype=torch.long)], []], tmp_path / "a.safetensors"
    keep_tokens(path, made, {}, "float32")
    dtype, again = read_tokens(path, {})
    assert dtype == "float32" and again[0] == [] and torch.equal(again[1][0], made[1][0]) and len(again) == 2


def test_before_the_first_token_nothing_is_kept(tmp_path, capsys):
    keep_tokens(tmp_path / "a.safetensors", [], {}, "float32")
    assert capsys.readouterr().err == "no tokens to be kept are made yet; the same command begins anew\n"
    assert not list(tmp_path.iterdir())


def test_tokens_go_elsewhere_where_the_disk_is_full(tmp_path, capsys, monkeypatch):
    made, rest = [[torch.ones(1, 3, dtype=torch.long)]], tmp_path / "rest"
    full = tmp_path / "a.tokens.safetensors"
    full.mkdir()  # what is no file cannot be written
    monkeypatch.setattr(interruption.tempfile, "gettempdir", lambda: str(rest))
    keep_tokens(full, made, {}, "float32")
    assert capsys.readouterr().err.endswith(f"tokens={rest / full.name}\n")
    assert read_tokens(rest / full.name, {})[1][0][0].shape == (1, 3)
    assert (rest / full.name).stat().st_mode & 0o777 == 0o666 & ~umask()
    (rest / full.name).unlink()
    (rest / full.name).mkdir()
    keep_tokens(full, made, {}, "float32")
    assert capsys.readouterr().err.startswith("the tokens made so far are lost: cannot write ")


def umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


@pytest.mark.parametrize("fault", ["decoding", "tokens", "writing"])
def test_tokens_outlive_memory_and_disk(box, tmp_path, written, capsys, monkeypatch, fault):
    job = Job(str(box), None, Inputs("a red star"), str(tmp_path / "a.mp4"), dtype="float32")
    run_job(job, FAST, {})
    calls = []

    def full(*arguments, **options):
        calls.append(1)
        if fault == "tokens" and len(calls) < 20:
            return choose(*arguments, **options)
        raise (
            OSError(28, "No space left on device", "b.mp4")
            if fault == "writing"
            else RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        )

    choose = Run.choose
    place = {"decoding": (MAGVIT2, "decode_latents"), "tokens": (Run, "choose"), "writing": (job_file, "write_video")}
    sampling = replace(FAST, decoding=OneByOne())
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(*place[fault], full)
        patch.setattr("sys.argv", ["scripts/generate.py", "prompt=x"])
        one_line_errors(run_job)(replace(job, output=str(tmp_path / "b.mp4")), sampling, {})
    kept, said = tmp_path / "b.tokens.safetensors", capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said[-1].startswith("error: ") and len(said) == 3
    assert said[-2] == f"python scripts/generate.py prompt=x tokens={kept}" and not (tmp_path / "b.mp4").exists()
    run_job(replace(job, output=str(tmp_path / "b.mp4"), tokens=str(kept)), sampling, {})
    assert torch.equal(written["a.mp4"], written["b.mp4"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames=0; give a whole number from 1"),
        ({"frames": "two"}, "frames=two; give a whole number"),
        ({"frames": 17, "seconds": 2}, "frames=17 and seconds=2 both say how long"),
        ({"seconds": -1}, "seconds=-1; give a number above 0"),
        ({"seconds": float("inf")}, "seconds=inf; give"),
        ({"samples": 1.5}, "samples=1.5; give a whole number"),
        ({"samples": 0}, "samples=0; give"),
        ({"seed": 10**30}, "give a whole number from 0 on, below 2.48"),
        ({"fps": 0}, "fps=0; give a number above 0"),
        ({"fps": "fast"}, "fps=fast; give"),
        ({"size": 0}, "size=0; give .height,width. in pixels"),
        ({"size": [64]}, "size=.64.; give"),
        ({"size": "big"}, "size=big; give"),
    ],
)
def test_impossible_numbers_are_told_before_any_work(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        Job("nowhere", None, Inputs("x"), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"frames": 4 * 10**9 + 1}, {"seconds": 1e9}, {"samples": 10**9}])
def test_what_no_memory_holds_is_told_before_any_work(box, tmp_path, options):
    job = Job(str(box), None, Inputs("a star"), str(tmp_path / "a.mp4"), **options)
    with pytest.raises(ValueError, match="GB of memory, and this machine has .*; ask for fewer"):
        run_job(job, FAST, {})
    assert not list(tmp_path.iterdir())


def test_long_prompts_are_noted_once(box, tmp_path, capsys):
    run_job(Job(str(box), "t2i", Inputs("a red star " * 40), str(tmp_path / "a.png")), FAST, {})
    assert capsys.readouterr().err == "note: only the first 64 word pieces of a prompt are read; shorten it\n"


def test_nothing_is_written_where_nothing_can_be(box, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        run_job(Job(str(box), None, Inputs("a star"), str(tmp_path / "file" / "a.mp4")), FAST, {})
    with pytest.raises(ValueError, match=r"ends in \.avi"):
        run_job(Job(str(box), None, Inputs("a star"), str(tmp_path / "a.avi")), FAST, {})
    with pytest.raises(FileNotFoundError, match="no model nothing"):
        run_job(Job("nothing", None, Inputs("a star"), str(tmp_path / "a.mp4")), FAST, {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_result_is_not_written_over_what_it_is_made_of(box, tmp_path):
    write_video(tmp_path / "a.mp4", Clip(torch.zeros(1, 3, 9, 32, 32)))
    write_image(tmp_path / "a.png", Clip(torch.zeros(1, 3, 1, 32, 32)))
    before = (tmp_path / "a.mp4").read_bytes(), (tmp_path / "a.png").read_bytes()
    name = str(tmp_path / "a.mp4")
    for job in (
        Job(str(box), "continuation", Inputs(video=name), name),
        Job(str(box), "i2v", Inputs(image=str(tmp_path / "a.png")), name, samples=2),  # its sheet is a.png
        Job(
            str(box),
            None,
            Inputs(prompt="x", video=name),
            str(tmp_path / "sub" / ".." / "a.mp4"),
            chain=["stylization"],
        ),
    ):
        with pytest.raises(ValueError, match="would be written over (video|image)=.*a.(mp4|png); give another output"):
            run_job(job, FAST, {})
    assert ((tmp_path / "a.mp4").read_bytes(), (tmp_path / "a.png").read_bytes()) == before


@pytest.mark.parametrize(
    "job, message",
    [
        (lambda: Job("zoetrope", None, Inputs("x"), seed=None), "seed=None; give a whole number from 0"),
        (lambda: Job("zoetrope", None, Inputs("x"), samples=None), "samples=None; give a whole number from 1"),
        (lambda: Inputs("x", keep=None).check("t2v"), "keep=None is not a number"),
        (lambda: Inputs("x", start=None).check("t2v"), "start=None is not a number"),
    ],
)
def test_what_must_be_a_number_cannot_be_null(job, message):
    with pytest.raises(ValueError, match=message):
        job()


def test_a_clip_with_sound_is_not_written_where_there_is_none(box, tmp_path):
    with pytest.raises(ValueError, match="task=t2av writes .mp4, .webm"):
        run_job(Job(str(box), "t2av", Inputs("x"), str(tmp_path / "a.gif")), FAST, {})
