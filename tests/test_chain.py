"""Tasks in a chain, each given what the one before made."""

import pytest
import torch

from making import FAST
from reelm.engine import seeds
from reelm.engine.chain import chain_of, make_chain
from reelm.engine.generation import make
from reelm.engine.inputs import Inputs
from reelm.engine.job import Job


def test_a_chain_gives_each_task_what_the_one_before_made(model, material):
    photo = str(material / "photo.jpg")
    steps = chain_of(["i2v", {"task": "outpainting", "keep": 0.5}], Inputs("a star", image=photo))
    first = make(model, "i2v", Inputs("a star", image=photo), samples=2, seed=4)
    second = make(model, "outpainting", Inputs("a star", video=first, keep=0.5), samples=2, seed=4 + seeds.LINK)
    chained = make_chain(model, steps, samples=2, seed=4)
    assert torch.equal(chained.video, second.video) and len(chained) == 2
    inner = torch.nn.functional.interpolate(first.video[0].transpose(0, 1), (16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(chained.video[0, :, :, 8:24, 8:24], inner.transpose(0, 1).clamp(-1, 1))
    longer = chain_of(["t2i", "i2v", "stylization"], Inputs("a star"))
    assert make_chain(model, longer, frames=5).video.shape == (1, 3, 5, 32, 32)


@pytest.mark.parametrize(
    ("links", "inputs", "message"),
    [
        (["t2i", "t2v"], Inputs("x"), "task=t2v takes no clip, so it can only be the first of a chain"),
        (["t2v", "stylization"], Inputs("x", image="a"), "no task of chain=.* has a use for image="),
        (["i2v", "outpainting"], Inputs("x"), "task=i2v needs image=..."),
        (["t2v", {"task": "outpainting", "kep": 1}], Inputs("x"), "got one with kep"),
        ([{"prompt": "x"}], Inputs("x"), "got one with no task"),
        ("t2v", Inputs("x"), "chain=t2v is no list; write it as one"),
        ({"task": "t2v"}, Inputs("x"), "is no list; write it as one"),
        (["t2v", 3], Inputs("x"), "got 3"),
        (["t2v", ["i2v"]], Inputs("x"), "got .'i2v'."),
        (["t2v", "dance"], Inputs("x"), "chain has the task dance, which there is not; tasks are t2v"),
        (["t2v", {"task": "stylization", "prompt": 3}], Inputs("x"), "prompt=3 of stylization in chain is not a text"),
        (["t2i", {"task": "i2v", "image": "b"}], Inputs("x"), "i2v in chain goes on from .*; leave its image=... out"),
        (["t2i", {"task": "i2v", "mask": "b"}], Inputs("x"), "task=i2v has no use for mask=b; leave it out"),
        (["t2v", {"task": "continuation", "start": 1}], Inputs("x"), "task=continuation has no use for start=1; leave"),
        (["t2i", "i2v"], Inputs("x", image="b"), "no task of chain=.* has a use for image="),
        (["t2v", {"task": "outpainting", "keep": "wide"}], Inputs("x"), "keep=wide of outpainting in chain is not a n"),
    ],
)
def test_chains_that_cannot_be_are_told_before_any_work(links, inputs, message):
    with pytest.raises(ValueError, match=message) as caught:
        Job("nowhere", None, inputs, chain=links).steps()
    assert "\n" not in str(caught.value)


def test_one_says_a_task_or_a_chain():
    with pytest.raises(ValueError, match="both say what to do"):
        Job("nowhere", "t2v", Inputs("x"), chain=["t2v"]).steps()


def test_a_chain_starts_its_first_clip_alone_later(model, material):
    steps = chain_of(
        ["outpainting", {"task": "stylization", "prompt": "x"}], Inputs(video=str(material / "clip.mp4"), start=1.0)
    )
    assert [inputs.start for _, inputs in steps] == [1.0, 0.0]
    late = chain_of(["t2v", {"task": "stylization", "start": 9.0}], Inputs(prompt="x"))
    with pytest.raises(ValueError, match="start=9.0 lies after the end of the clip that was made before"):
        make_chain(model, late, sampling=FAST)


def test_a_chain_that_cannot_end_is_not_begun(model, monkeypatch):
    monkeypatch.setattr(model, "generate", None)  # a call would fail
    with pytest.raises(ValueError, match="task=stylization makes clips of up to 9 frames with this model; got 33"):
        make_chain(model, chain_of(["t2v", "stylization"], Inputs(prompt="x")), frames=33)
    with pytest.raises(ValueError, match="a2v in chain goes on from sound, and t2v before it makes none"):
        chain_of(["t2v", "a2v"], Inputs(prompt="x"))
