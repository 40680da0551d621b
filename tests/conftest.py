"""What every test starts from: no network, a fixed seed, and few threads (tests run in parallel)."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported; a forgotten download fails at once
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model():
    """`making.small_model`, where a file has no model of its own."""
    from making import small_model

    return small_model()


@pytest.fixture(scope="module")
def box(model, tmp_path_factory):
    """The folder of the file's model."""
    folder = tmp_path_factory.mktemp("box") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """`making.material_in` a folder."""
    from making import material_in

    return material_in(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """`programs.train_tokenizer` in a folder, where a file has no tokenizer of its own."""
    from programs import train_tokenizer

    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    """A tiny random T5 encoder with a unigram model, as T5's own are."""
    import sentencepiece
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    things = [
        f"{colour} {shape}" for colour in ("red", "green", "blue", "white") for shape in ("circle", "star", "box")
    ]
    captions = [
        f"A {thing} {motion} on a night sky." for thing in things for motion in ("moves left", "bounces", "spins")
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_prefix=str(folder / "spiece"), vocab_size=50, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "spiece.model")).vocab_size()
    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    T5EncoderModel(T5Config(vocab_size=pieces, dropout_rate=0.5, **size)).save_pretrained(folder)
    return folder
