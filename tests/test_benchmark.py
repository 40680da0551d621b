"""Measurements beside other projects, as far as they need none of them."""

import io
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from reelm.engine import peers as outside
from reelm.engine import store
from reelm.engine.benchmark import Settings
from reelm.engine.peers import PEERS, Codec, install, matched, ours
from reelm.engine.tokenizer_benchmark import AGAIN, OURS, Peers, Row, interleave, interval, rivals, run, table
from reelm.engine.workers import Timed, Worker, serve
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import LFQ

TOY = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    do = request.pop("do")
    if do == "build":
        answer = {"parameters": request["parameters"]} if request["parameters"] else {"error": "ValueError: too small"}
    elif do == "seconds":
        if request["what"] == "decode": sys.exit(3)
        answer = {"seconds": request["shape"][0] / 1000}
    else:
        answer = {"encode": 1, "decode": 2}
    print(json.dumps(answer), flush=True)
"""
COMMAND = [sys.executable, "-c", TOY]


def tiny() -> MAGVIT2:
    return MAGVIT2(
        LFQ(8), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, 1), kernels=((1, 3, 3),) * 2, patch=(4, 4, 4)
    ).eval()


def test_another_process_answers_line_by_line():
    with Worker(COMMAND, parameters=70) as worker:
        assert worker.parameters == 70
        assert worker.seconds("encode", (17, 32, 32)) == 0.017
        assert worker.memory((17, 32, 32)) == {"encode": 1, "decode": 2}
        with pytest.raises(RuntimeError, match="its process ended with status 3"):
            worker.seconds("decode", (17, 32, 32))
    assert worker.process.poll() is not None
    with pytest.raises(RuntimeError, match="^ValueError: too small$"):
        Worker(COMMAND, parameters=0)


def test_a_codec_is_served():
    requests = [
        {"do": "build", "peer": None, "parameters": 0, "model": store.describe(tiny()), "threads": 1},
        {"do": "seconds", "what": "encode", "shape": [5, 16, 16]},
        {"do": "seconds", "what": "decode", "shape": [5, 16, 16], "dtype": "bfloat16"},
        {"do": "seconds", "what": "encode", "shape": [4, 16, 16]},
    ]
    answers = io.StringIO()
    serve(io.StringIO("\n".join(map(json.dumps, requests))), answers)
    built, encoded, decoded, wrong = map(json.loads, answers.getvalue().splitlines())
    assert built["parameters"] == ours(tiny()).parameters > 0
    assert encoded["seconds"] > 0 and decoded["seconds"] > 0
    assert wrong["error"].startswith("ValueError: a clip of 4 frames of 16 x 16 does not fit")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are Linux's to tell")
def test_peaks_count_weights_and_what_is_held_beside_them():
    model = tiny()
    held = 64 << 20
    codec = Codec(lambda video: video, lambda codes: torch.ones(held // 4).sum() + codes, 1000)
    peaks = Timed(codec).memory((5, 16, 16))
    assert 0.9 * held <= peaks["decode"] < 2 * held and peaks["encode"] < held
    assert Timed(ours(model)).memory((5, 16, 16))["encode"] >= 4 * ours(model).parameters


def test_a_codec_that_loses_frames_is_no_rival():
    with pytest.raises(ValueError, match=r"was decoded as one of \(1, 3, 4, 8, 8\)"):
        Timed(Codec(lambda video: video, lambda codes: codes[:, :, 1:], 1)).work("decode", (5, 8, 8))


@pytest.mark.parametrize("parameters", [1, 50, 399, 5_000_000])
def test_widths_are_chosen_by_parameters(parameters):
    def build(width: int) -> Codec:
        return Codec(None, None, 3 * width**2 + width)

    nearest = min((build(width).parameters for width in range(1, 3000)), key=lambda count: abs(count - parameters))
    assert matched(build, parameters).parameters == nearest


def test_rows_tell_medians_of_ratios_and_when_they_are_void():
    row = Row("default", "encode", 32, "float32", {OURS: [1.0, 2.0, 4.0], "a": [2.0, 4.0, 4.0], "b": [8.0, 8.0, 8.0]})
    row.seconds[AGAIN] = [1.0, 2.0, 3.9]
    report = row.report()
    assert report["best_peer"] == "a" and not report["void"] and report["same_twice"] == 1
    assert report["ratio"]["a"] == [0.5, 0.5, 1.0] and report["ratio"]["b"][0] == 0.25
    assert report["ms_per_frame"][OURS] == pytest.approx(2000 / 17)
    row.seconds[AGAIN] = [0.9, 1.8, 4.0]
    assert row.report()["void"]


def test_intervals_hold_the_median_and_narrow_with_rounds():
    values = [1 + 0.01 * (i % 5) for i in range(60)]
    few, many = interval(values[:5]), interval(values)
    assert few[0] <= 1.02 <= few[1] and few[0] <= many[0] <= 1.02 <= many[1] <= few[1] and many != few


def test_measurements_are_taken_in_turn_and_large_ones_in_some_rounds():
    taken = []

    def arm(name: str):
        return lambda: taken.append(name) or 1.0

    rows = [
        (Row("m", "encode", size, "float32", {"a": [], "b": []}), {n: arm(f"{n}{size}") for n in "ab"})
        for size in (8, 16)
    ]
    interleave(rows, rounds=6, large=2, first=8)
    assert "".join(taken) == "a8b8a16b16a8b8a8b8" * 2
    assert [len(row.seconds["a"]) for row, _ in rows] == [6, 2]


def pip(monkeypatch, status: int, error: str = "") -> list[list[str]]:
    calls = []

    def fake(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, status, "", error)

    monkeypatch.setattr(outside.subprocess, "run", fake)
    return calls


def test_the_other_environment_is_made_once(tmp_path, monkeypatch):
    calls = pip(monkeypatch, 0)
    for _ in range(2):
        (tmp_path / "p").mkdir(exist_ok=True)
        assert install(tmp_path / "p") == tmp_path / "p"
    assert len(calls) == 1 and "magvit2-pytorch==0.5.1" in calls[0] and "--no-deps" in calls[0]
    assert not any("torchvision" in word or word.startswith("torch==") for word in calls[0])


def test_peers_that_cannot_be_had_are_left_out_in_one_line_each(tmp_path, monkeypatch, capsys):
    pip(monkeypatch, 1, "WARNING: something\nERROR: no network\n")
    monkeypatch.setattr("reelm.engine.tokenizer_benchmark.installed", lambda name: False)
    with ExitStack() as stack:
        assert rivals(Peers(folder=tmp_path), 1000, 1, stack) == {}
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "VidTok is left out: it is in diffusers: pip install 'reelm[outside]'" and len(lines) == 3
    assert lines[2].startswith("magvit2-pytorch is left out: pip could not") and lines[2].endswith("ERROR: no network")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ("VidTik",)}, "peers has VidTik, which is none of VidTok, CogVideoX, magvit2-pytorch"),
        ({"dtypes": ("float16",)}, "dtypes has float16, which is none of float32, bfloat16"),
        ({"sizes": ()}, "give one of sizes"),
        ({"large": 0}, "large is 1 or more; got 0"),
    ],
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        Peers(**settings)


def test_sizes_that_do_not_fit_are_told_before_anything_is_measured(tmp_path):
    with pytest.raises(ValueError, match="17 frames of 20 x 20 does not fit"):
        run({"a": tiny()}, Peers(sizes=(20,), folder=tmp_path / "no"), Settings("tokenizer"), tmp_path / "b.json")
    assert not list(tmp_path.iterdir())


def test_a_run_beside_a_peer(tmp_path, monkeypatch, capsys):
    """The whole suite with a small codec in the place of another project's."""
    small = outside.Peer(lambda width: ours(tiny()), "diffusers")
    monkeypatch.setitem(PEERS, "VidTok", small)
    monkeypatch.setattr("reelm.engine.tokenizer_benchmark.installed", lambda name: True)
    monkeypatch.setattr("reelm.engine.tokenizer_benchmark.ceilings", lambda quick: {})
    peers = Peers(names=("VidTok",), sizes=(16, 32), large=1, dtypes=("float32", "bfloat16"), memory=False)
    results = run({"default": tiny()}, peers, Settings("tokenizer", rounds=2), tmp_path / "b.json")
    assert results == json.loads((tmp_path / "b.json").read_text())
    assert [row["rounds"] for row in results["rows"]] == [2] * 4 + [1] * 4
    assert results["parameters"]["default"] == {OURS: ours(tiny()).parameters, "VidTok": ours(tiny()).parameters}
    assert all(0.1 < row["ratio"]["VidTok"][0] < 10 and row["best_peer"] == "VidTok" for row in results["rows"])
    assert "of VidTok's" in table(results) and "ms a frame" in capsys.readouterr().out
