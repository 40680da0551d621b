import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from reelm.engine import store
from reelm.lm.heads import Categorical
from reelm.lm.language_model import LanguageModel
from reelm.lm.sequence import Sequence
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Vocabulary
from reelm.tasks.generation import Generation
from reelm.tasks.known_frames import KnownFrames
from reelm.tasks.task import Mixture
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import FSQ, LFQ


def tokenizer(quantizer: nn.Module | None = None) -> MAGVIT2:
    return MAGVIT2(
        quantizer or LFQ(6, 0.5), patch=(4, 4, 4), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, 1),
        kernels=((1, 3, 3), (3, 3, 3)),
    )  # fmt: skip


def language_model() -> LanguageModel:
    vocabulary = Vocabulary(visual=64, text=20)
    return LanguageModel(Transformer(32, depth=1, heads=2, sites=(8, 8, 8)), Categorical(vocabulary, 32))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "value",
    [
        tokenizer(),
        tokenizer(FSQ((4, 3))),
        language_model(),
        Mixture({"t2v": Generation(), "i2v": KnownFrames("i2v")}, {"t2v": 2, "i2v": 1}),
        {"a": [1, 2.5, None, True, "x"], "b": {"c": Generation(prompted=False)}},
    ],
    ids=["LFQ", "FSQ", "lm", "mixture", "plain"],
)
def test_build_is_the_inverse_of_describe(value):
    config = json.loads(json.dumps(store.describe(value)))
    built = store.build(config)
    assert type(built) is type(value) and store.describe(built) == config
    if isinstance(value, nn.Module):
        built.load_state_dict(value.state_dict())
        assert same_weights(built, value)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "torch.load",
        "reelm.engine.store.load",
        "reelm.data.reading.read",
        "reelm.tokenizers.perceptual.np.load",
        "reelm.tokenizers.text.os.system",
        "reelm.tokenizers.text.io.open",
        "reelm.tokenizers.magvit2.rearrange",
        "reelm.tokenizers.magvit2.nn.Linear",
        "reelm.tokenizers.magvit2.Tensor",
        "reelm.tokenizers.magvit2.haar_basis",
        "reelm.tokenizers.magvit2.Absent",
        "reelm.tokenizers.absent.Thing",
        "reelm.tokenizers.",
        "reelm.lm...os.system",
        "",
        17,
    ],
)
def test_only_our_classes_are_built(target, tmp_path, monkeypatch):
    def run(*_, **__):
        raise AssertionError("code of a stranger ran")

    monkeypatch.setattr(os, "system", run)
    monkeypatch.setattr(subprocess, "Popen", run)
    config = {"model": {"a": [{"_target_": target, "command": "true"}]}}
    with pytest.raises(ValueError, match="config names") as error:
        store.build(config)
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config names"):
        store.load(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_loaded_model_is_saved_as_the_same_again(dtype, tmp_path):
    model = tokenizer()
    store.save(model, tmp_path / "a", dtype, notes={"step": 3})
    loaded = store.load(tmp_path / "a")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert same_weights(loaded, model) == (dtype == "float32")
    store.save(loaded, tmp_path / "b")
    again = store.load(tmp_path / "b")
    assert same_weights(loaded, again) and store.fingerprint(loaded) == store.fingerprint(again)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    config = store.read_json(tmp_path / "a" / "config.json")
    assert config["dtype"] == dtype and config["notes"] == {"step": 3}
    assert sorted(os.listdir(tmp_path / "a")) == ["config.json", "model.safetensors"]


def test_how_far_rounded_weights_may_be(tmp_path):
    model = tokenizer()
    with torch.no_grad():
        model.encoder[0].weight[0] = 0  # a row without a scale of its own
        model.encoder[0].weight[1] *= 1e4
    stored = dict(model.state_dict())
    for dtype in ("bfloat16", "int8"):
        store.save(model, tmp_path / dtype, dtype)
        for name, weight in store.load(tmp_path / dtype).state_dict().items():
            true = stored[name]
            if true.ndim < 2:
                assert torch.equal(weight, true)
            elif dtype == "bfloat16":
                assert ((weight - true).abs() <= true.abs() * 2**-8).all()
            else:
                step = true.flatten(1).abs().amax(1) / 127
                assert ((weight - true).flatten(1).abs() <= 0.76 * step[:, None]).all()
    sizes = [(tmp_path / dtype / "model.safetensors").stat().st_size for dtype in ("bfloat16", "int8")]
    assert sizes[1] < sizes[0]


def test_fingerprints_tell_weights_and_descriptions_apart():
    model = tokenizer()
    other = tokenizer(LFQ(6, 1.0))
    other.load_state_dict(model.state_dict())
    assert store.fingerprint(other) != store.fingerprint(model)
    first = store.fingerprint(model)
    assert first == store.fingerprint(model) and len(first) == 16
    with torch.no_grad():
        model.encoder[0].weight[0, 0, 0, 0, 0] += 1e-6
    assert store.fingerprint(model) != first


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    model = tokenizer()
    store.save(model, tmp_path / "model")

    def full(path, content):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        store.save(tokenizer(), tmp_path / "model")
    assert same_weights(store.load(tmp_path / "model"), model)
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]


def grown(quantizer: nn.Module, depth: int) -> MAGVIT2:
    return MAGVIT2(
        quantizer, patch=(4, 4, 4), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, depth),
        kernels=((1, 3, 3), (3, 3, 3)), encoder_blocks=(1, 1),
    )  # fmt: skip


def test_a_deeper_decoder_begins_as_the_shallower_one(tmp_path):
    small, large = grown(FSQ((4, 4)), 1), grown(FSQ((4, 4)), 3)
    ids = torch.randint(small.vocabulary, (2, 2, 4, 4))
    store.save(small, tmp_path)
    store.grow(large, tmp_path, "lm")
    assert torch.equal(large.decode(ids), small.decode(ids))
    large.decoder.level1_block2.conv2.weight.requires_grad_().data.add_(0.1)
    assert not torch.equal(large.decode(ids), small.decode(ids))
    assert store.fingerprint(large) == store.fingerprint(small)


def test_a_larger_codebook_begins_with_what_the_smaller_one_learned(tmp_path):
    small, large = grown(FSQ((4, 4)), 1), grown(FSQ((4, 4, 4)), 1)
    store.save(small, tmp_path)
    store.grow(large, tmp_path, "lm")
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    assert torch.equal(large.encode_latents(video)[:, :2], small.encode_latents(video))
    latents = torch.rand(1, 3, 2, 4, 4)
    torch.testing.assert_close(large.decode_latents(latents), small.decode_latents(latents[:, :2]))
    assert large.encode_latents(video)[:, 2].std() > 0 and store.fingerprint(large) != store.fingerprint(small)


@pytest.mark.parametrize("adaptive", [False, True])
def test_an_image_tokenizer_becomes_one_of_video(adaptive, tmp_path):
    def network(time: int, kernel: int) -> MAGVIT2:
        return MAGVIT2(
            LFQ(6), channels=(8, 8, 16), strides=((time, 2, 2), (time, 2, 2)), blocks=(1,) * 3,
            kernels=((kernel, 3, 3),) * 3, adaptive=adaptive,
        ).eval()  # fmt: skip

    small, large = network(1, 1), network(2, 3)
    store.save(small, tmp_path)
    store.grow(large, tmp_path, "tokenizer")
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    latents = large.encode_latents(video)
    images = [small.encode_latents(video[:, :, frame : frame + 1]) for frame in (0, 4, 8)]
    torch.testing.assert_close(latents, torch.cat(images, 2))
    shown = [small.decode_latents(image) for image in images]  # each latent frame makes copies of its picture
    expected = torch.cat([shown[0], *[shown[1]] * 4, *[shown[2]] * 4], 2)
    torch.testing.assert_close(large.decode_latents(latents), expected)


def test_growth_asks_for_a_smaller_model_of_the_same_kind(tmp_path):
    store.save(grown(FSQ((4, 4)), 2), tmp_path)
    with pytest.raises(ValueError, match="another model: decoder.level1_block1.* which this one has not"):
        store.grow(grown(FSQ((4, 4)), 1), tmp_path, "lm")
    with pytest.raises(ValueError, match=r"another model: encoder.last.weight is .*, .* here"):
        store.grow(grown(FSQ((4,)), 2), tmp_path, "lm")


def test_an_unknown_precision_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="float32, bfloat16 or int8; got float8"):
        store.save(tokenizer(), tmp_path / "model", "float8")
    assert not (tmp_path / "model").exists()


def refused(folder: Path, match: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=match) as caught:
        store.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_broken_folders_are_refused_in_one_line(tmp_path):
    refused(tmp_path, "config.json is missing", FileNotFoundError)
    store.save(tokenizer(), tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good_config, good_weights = config.read_text(), weights.read_bytes()

    for text in (good_config[:50], "\xff", ""):
        config.write_bytes(text.encode("latin-1"))
        refused(tmp_path, "is not a JSON file")
    for text in ("[]", "3", "null"):
        config.write_text(text)
        refused(tmp_path, "does not describe")
    for model in ("x", 3, None, {}, [1], {"_target_": "reelm.tasks.generation.Generation"}):
        config.write_text(json.dumps({"model": model}))
        refused(tmp_path, "describes no model")
    for change in ({"channels": [8]}, {"quantizer": "LFQ"}, {"colour": "red"}, {"channels": None}):
        config.write_text(json.dumps({"model": {**json.loads(good_config)["model"], **change}}))
        refused(tmp_path, "does not fit|channels ask for")
    config.write_text("{}")
    refused(tmp_path, "does not fit")

    config.write_text(good_config)
    for data in (good_weights[: len(good_weights) // 2], b"", b"x" * 100, b"\xff" * 8 + good_weights[8:]):
        weights.write_bytes(data)
        refused(tmp_path, "is not a readable safetensors file")
    weights.unlink()
    refused(tmp_path, "no weights at", FileNotFoundError)


def test_weights_of_another_model_are_refused_in_one_line(tmp_path):
    model = tokenizer()
    store.save(model, tmp_path, "int8")
    weights = tmp_path / "model.safetensors"
    good = load_file(weights)
    name = next(name for name, weight in good.items() if weight.dtype == torch.int8)

    save_file({key: value for key, value in good.items() if key != f"{name}.scale"}, weights)
    refused(tmp_path, "int8 without one scale a row")
    save_file({**good, f"{name}.scale": torch.ones(3)}, weights)
    refused(tmp_path, "int8 without one scale a row")
    for other in (
        {**good, "extra": torch.ones(2)},
        {key: value for key, value in good.items() if not key.startswith(name)},
        {**good, name: good[name][:, :1].contiguous()},
    ):
        save_file(other, weights)
        refused(tmp_path, "holds weights of another model")
    save_file(good, weights)
    assert math.isfinite(sum(p.sum().item() for p in store.load(tmp_path).parameters()))


def test_what_lies_together_in_one_matrix_does_not_grow(tmp_path):
    def language_model(width: int, depth: int) -> LanguageModel:
        vocabulary = Vocabulary(visual=64, text=16)
        return LanguageModel(Transformer(width, depth, heads=2), Categorical(vocabulary, width))

    small = language_model(16, 1)
    store.save(small, tmp_path)
    with pytest.raises(ValueError, match="width=16, which cannot grow to 32"):
        store.grow(language_model(32, 1), tmp_path, "lm")
    deeper, ids = language_model(16, 3), torch.randint(300, (2, 9))
    store.grow(deeper, tmp_path, "lm")
    places = torch.arange(9)[None, :, None].expand(2, -1, 3)
    sequence = Sequence(ids, places, prefix=2)
    torch.testing.assert_close(deeper(sequence), small(sequence))
    store.save(grown(FSQ((4, 4)), 1), tmp_path / "video")
    with pytest.raises(ValueError, match=r"patch=\(4, 4, 4\), which cannot grow to \(8, 4, 4\)"):
        wider = MAGVIT2(FSQ((4, 4)), patch=(8, 4, 4), channels=(8, 8), strides=((1, 2, 2),), blocks=(1, 1),
                        kernels=((1, 3, 3), (3, 3, 3)))  # fmt: skip
        store.grow(wider, tmp_path / "video", "tokenizer")
