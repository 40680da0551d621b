"""Tokens of a data source in shards: what they hold, what a killed run leaves, what is refused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from reelm.data.clip import Clip
from reelm.data.folder import VideoFolder
from reelm.data.tokens import Shard, TokenShards, write_shard
from reelm.data.writing import write_video
from reelm.data.zoetrope.dataset import Zoetrope
from reelm.engine import store
from reelm.engine.encoding import Encoding, encode
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import LFQ

ROOT = Path(__file__).parents[1]
VIDEOS, SIZE, FRAMES = 9, 16, 5


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Nine videos, each of another look, and two that cannot be read."""
    root = tmp_path_factory.mktemp("clips")
    generator = torch.Generator().manual_seed(0)
    for number in range(VIDEOS):
        video = torch.rand(1, 3, 12, 4, 6, generator=generator).repeat_interleave(8, 3).repeat_interleave(8, 4) * 2 - 1
        write_video(root / f"v{number}.mp4", Clip(video, fps=8.0))
        (root / f"v{number}.txt").write_text(f"number {number} é" if number else "", encoding="utf-8")
    (root / "v2_broken.mp4").write_bytes(b"no video")
    write_video(root / "v4_short.mp4", Clip(torch.zeros(1, 3, 2, 32, 48), fps=8.0))
    return root


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    made = MAGVIT2(
        LFQ(12), patch=(4, 4, 4), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, 1), kernels=((1, 3, 3), (3, 3, 3))
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    store.save(made, folder)
    return folder


def job(clips: Path, tokenizer: Path, output: Path, split: str = "train", **changes) -> Encoding:
    source = VideoFolder(clips, frames=FRAMES, size=SIZE, clips_per_video=2, random=("start", "crop"))
    options = {"shard_clips": 4, "batch_size": 3, "about": {"size": SIZE}, **changes}
    return Encoding(options.pop("source", source), store.load(tokenizer), output / split, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tokens(clips, tokenizer, tmp_path_factory) -> Path:
    """What an undisturbed run leaves."""
    output = tmp_path_factory.mktemp("tokens")
    encode([job(clips, tokenizer, output)], workers=0)
    return output


def test_shards_hold_exactly_the_clips_that_can_be_read(clips, tokenizer, tokens):
    source, model, stored = job(clips, tokenizer, tokens).source, store.load(tokenizer), TokenShards(tokens)
    wanted = [i for i in range(len(source)) if not source.key(i).endswith(("broken.mp4", "short.mp4"))]
    assert len(stored) == len(wanted) == 2 * VIDEOS
    for row, index in enumerate(wanted):
        true, clip = source.read(index), stored[row]
        assert torch.equal(clip.tokens, model.encode(true.video)) and clip.tokens.dtype == torch.int64
        assert (clip.captions, clip.keys, clip.fps) == (true.captions, true.keys, true.fps)
        assert clip.video.shape == true.video.shape and clip.video.is_meta
        assert stored.caption(row) == true.captions[0]
    first = stored.get(0, frames=1)
    assert torch.equal(first.tokens, stored[0].tokens[:, :1]) and first.frames == 1
    index = json.loads((tokens / "train/index.json").read_text())
    assert index["clips"] == 2 * VIDEOS and index["left_out"] == 4 and len(index["shards"]) == 6
    assert index["settings"]["tokenizer"] == stored.tokenizer == store.fingerprint(model)
    with safe_open(tokens / "train/000000.safetensors", framework="np") as shard:
        assert shard.get_tensor("ids").dtype == np.uint16 and shard.get_tensor("ids").shape == (4, 2, 2, 2)


def test_bad_clips_are_counted_and_named_once(clips, tokenizer, tmp_path, capfd):
    encode([job(clips, tokenizer, tmp_path)], workers=0)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert len(said) == 2 and "v2_broken.mp4" in said[0] and "v4_short.mp4" in said[1]
    failures = json.loads((tmp_path / "train/index.json").read_text())["failures"]
    assert list(failures) == ["v2_broken.mp4", "v4_short.mp4"] and "damaged or no video" in failures["v2_broken.mp4"]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_bytes(workers, clips, tokenizer, tokens, tmp_path):
    encode([job(clips, tokenizer, tmp_path)], workers=workers)
    assert files(tmp_path) == files(tokens)


def test_a_stopped_run_continues_to_the_same_bytes(clips, tokenizer, tokens, tmp_path, monkeypatch):
    made = []
    make = Encoding.make

    def stopped(self, number, reads):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(number)
        make(self, number, reads)

    monkeypatch.setattr(Encoding, "make", stopped)
    with pytest.raises(KeyboardInterrupt):
        encode([job(clips, tokenizer, tmp_path)], workers=0)
    with pytest.raises(FileNotFoundError, match="holds no finished tokens"):
        TokenShards(tmp_path)
    (tmp_path / "train/.000002.77.part.safetensors").write_bytes(b"half")  # what a kill in the middle of a write leaves
    monkeypatch.setattr(Encoding, "make", lambda self, number, reads: (made.append(number), make(self, number, reads)))
    encode([job(clips, tokenizer, tmp_path)], workers=0)
    assert made == list(range(6)) and files(tmp_path) == files(tokens)


def program(tokenizer: Path, output: Path) -> subprocess.Popen:
    """The program in a process of its own, making 100 shards."""
    where = os.pathsep.join([str(ROOT / ".links"), os.environ.get("PYTHONPATH", "")])
    arguments = ["data=zoetrope", "+data.train.length=400", "+data.validation.length=4", "shard_clips=4"]
    return subprocess.Popen(
        [sys.executable, ROOT / "scripts/encode.py", *arguments, f"model={tokenizer}", f"output={output}"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": where, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tokenizer, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed")
    assert program(tokenizer, output).wait() == 0
    return files(output)


@pytest.mark.slow
@pytest.mark.parametrize(
    "end, status, word",
    [("SIGKILL", -9, ""), ("SIGTERM", 143, "the same command goes on"), ("SIGINT", 130, "interrup")],
)
def test_a_killed_program_continues_to_the_same_bytes(end, status, word, tokenizer, undisturbed, tmp_path):
    running = program(tokenizer, tmp_path)
    while not (tmp_path / "train/000003.safetensors").exists() and running.poll() is None:
        time.sleep(0.005)
    running.send_signal(getattr(signal, end))
    assert word in running.communicate()[1] and running.returncode == status
    assert not (tmp_path / "train/index.json").exists()
    if end != "SIGKILL":
        assert not list(tmp_path.rglob(".*"))
    left = files(tmp_path)
    assert program(tokenizer, tmp_path).wait() == 0
    assert files(tmp_path) == undisturbed and any(left[name] == undisturbed.get(name) for name in left)


def killed(work, after: float) -> bool:
    """Does some work in a process that is killed after so many seconds; whether it was, before its end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work()
            status = 0
        finally:
            os._exit(status)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "encoding itself failed"
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_at_any_moment_leave_nothing_half_made(kills, clips, tokenizer, tmp_path):
    def again(output: Path) -> None:
        source = Zoetrope("train", size=SIZE, frames=FRAMES, length=40)
        encode([job(clips, tokenizer, output, source=source, about={})], workers=0)

    started = time.monotonic()
    again(tmp_path / "whole")
    whole, lasts, draw, done = files(tmp_path / "whole"), time.monotonic() - started, random.Random(0), 0
    output = tmp_path / "killed"
    for number in range(20 * kills):
        done += killed(lambda: again(output), draw.uniform(0, lasts))
        left = {name: content for name, content in files(output).items() if "/." not in name} if number else {}
        assert all(
            whole[name] == content for name, content in left.items()
        )  # under its name stands the whole or nothing
        if done >= kills:
            break
        if left.keys() == whole.keys():  # and from the beginning
            for path in output.rglob("*.*"):
                path.unlink()
    assert done >= kills
    again(output)
    assert files(output) == whole


def test_every_flipped_bit_is_found(tokens, tmp_path):
    shutil.copytree(tokens, tmp_path, dirs_exist_ok=True)
    path, draw = tmp_path / "train/000002.safetensors", random.Random(0)
    whole = path.read_bytes()
    for _ in range(60):
        place = draw.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        stored = TokenShards(tmp_path)
        with pytest.raises(ValueError, match="000002.safetensors is missing or damaged; .* remakes it") as caught:
            stored[int(stored.ends[1])]
        assert "\n" not in str(caught.value) and stored[0].keys  # the others are as they were
    path.write_bytes(whole)
    assert TokenShards(tmp_path)[int(stored.ends[1])].keys


def test_a_shard_of_another_tokenizer_is_named(tokens, tmp_path):
    shutil.copytree(tokens, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "train/000002.safetensors"
    shard = Shard(path)
    texts = [[shard.text(name, row) for row in range(len(shard))] for name in ("captions", "keys")]
    ids = np.concatenate([shard.tokens(row, 2, 4096) for row in range(len(shard))]).astype(np.uint16)
    notes = {**shard.notes, "settings": {**shard.notes["settings"], "tokenizer": "f" * 16}}
    write_shard(path, ids, *texts, notes)
    with pytest.raises(ValueError, match="000002.safetensors holds tokens of another tokenizer than its") as caught:
        TokenShards(tmp_path)[int(TokenShards(tmp_path).ends[1])]
    assert "\n" not in str(caught.value)


def test_damaged_shards_are_made_anew(clips, tokenizer, tokens, tmp_path, capfd):
    encode([job(clips, tokenizer, tmp_path)], workers=0)
    first, second, third, fourth = sorted((tmp_path / "train").glob("*.safetensors"))[:4]
    content = bytearray(first.read_bytes())
    content[-20] ^= 1
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(ValueError, match="000001.safetensors is missing or damaged"):
        TokenShards(tmp_path)
    third.unlink()
    fourth.write_bytes((tmp_path / "train/000004.safetensors").read_bytes())  # whole, but another one
    capfd.readouterr()
    encode([job(clips, tokenizer, tmp_path)], workers=0)
    assert capfd.readouterr().err.count("damaged and made anew") == 2
    assert files(tmp_path) == files(tokens)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    write_shard(tmp_path / "x.safetensors", np.full((1, 2, 2, 2), 5000, np.uint16), [""], ["a"], {})
    with pytest.raises(ValueError, match="damaged"):
        Shard(tmp_path / "x.safetensors").tokens(0, 2, 4096)


def test_texts_of_all_kinds_come_back(tmp_path):
    texts = ["", "plain", "é 動画", "\udc80name\ud800", ""]
    for words in (texts, [""] * 5):
        write_shard(tmp_path / "x.safetensors", np.zeros((5, 1, 2, 2), np.uint8), words, texts, {"one": [1]})
        shard = Shard(tmp_path / "x.safetensors")
        shard.verify()
        assert [shard.text("captions", i) for i in range(5)] == words and shard.notes == {"one": [1]}
        assert [shard.text("keys", i) for i in range(5)] == texts


def test_tokens_of_something_else_are_left_alone(clips, tokenizer, tokens, tmp_path):
    before = files(tokens)
    other = tmp_path / "other"
    store.save(MAGVIT2(LFQ(12), patch=(4, 4, 4), channels=(8,), strides=(), blocks=(1,), kernels=((1, 3, 3),)), other)
    few = VideoFolder(clips, frames=FRAMES, size=SIZE, held_out=["v3"], split="train", clips_per_video=2)
    for changes, message in [
        ({"tokenizer": other}, "holds tokens of another tokenizer"),
        ({"shard_clips": 5}, r"another shard_clips \(4, this run's is 5\)"),
        ({"batch_size": 2}, "another batch_size"),
        ({"about": {"size": SIZE, "seed": 1}}, r"another data.seed \(None, this run's is 1\)"),
        ({"source": few}, "tokens of other clips"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            encode([job(clips, changes.pop("tokenizer", tokenizer), tokens, **changes)], workers=0)
        assert "\n" not in str(caught.value)
    assert files(tokens) == before


def test_passes_are_other_draws(clips, tokenizer, tokens, tmp_path):
    encode([job(clips, tokenizer, tmp_path, passes=2)], workers=0)
    once, twice = TokenShards(tokens), TokenShards(tmp_path)
    assert len(twice) == 2 * len(once)
    assert all(torch.equal(twice[i].tokens, once[i].tokens) for i in range(len(once)))
    assert any(not torch.equal(twice[len(once) + i].tokens, once[i].tokens) for i in range(len(once)))


def test_what_cannot_be_encoded(clips, tokenizer, tokens, tmp_path):
    with pytest.raises(ValueError, match="data=tokens is what this makes"):
        job(clips, tokenizer, tmp_path, source=TokenShards(tokens))
    with pytest.raises(ValueError, match="shard_clips=0 must be 1 or more"):
        job(clips, tokenizer, tmp_path, shard_clips=0)
    with pytest.raises(ValueError, match="does not fit this tokenizer"):
        encode([job(clips, tokenizer, tmp_path, source=Zoetrope(frames=6, size=16, length=2))], workers=0)
    with pytest.raises(ValueError, match="backend=spark"):
        encode([job(clips, tokenizer, tmp_path)], backend="spark")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="no clip could be read, the first because .*a.mp4"):
        encode([job(clips, tokenizer, tmp_path, source=VideoFolder(tmp_path / "bad", frames=5, size=16))], workers=0)


class Deadly(Zoetrope):
    def read(self, *_, **__):
        os._exit(3)


def test_a_decoder_that_dies_is_one_line(clips, tokenizer, tmp_path):
    with pytest.raises(OSError, match="a process that decodes has died") as caught:
        encode([job(clips, tokenizer, tmp_path, source=Deadly(length=2, frames=5, size=16))], workers=1)
    assert "\n" not in str(caught.value)


class Rows:
    """As much of a Ray dataset as is used, in this process."""

    def __init__(self, rows: list) -> None:
        self.rows = rows

    def map(self, kind, fn_constructor_args, concurrency):
        worker = kind(*fn_constructor_args)
        return Rows([worker(row) for row in reversed(self.rows)])

    def iter_rows(self):
        return iter(self.rows)


def test_shards_made_by_ray_are_the_same(clips, tokenizer, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ray = types.ModuleType("ray")
    ray.data = types.ModuleType("ray.data")
    ray.data.from_items = lambda items: Rows([{"item": item} for item in items])
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", ray.data)
    encode([job(clips, tokenizer, tmp_path)], backend="ray")
    assert files(tmp_path) == files(tokens)


def test_without_ray_its_extra_is_named(clips, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install reelm\[ray\]"):
        encode([job(clips, tokenizer, tmp_path)], backend="ray")
