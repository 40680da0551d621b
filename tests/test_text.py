import warnings

import pytest
import torch

from reelm.tokenizers.text import END, PAD, SentencePieceText, T5Text, pad_to_multiple

COLOURS = "red green blue yellow purple orange white cyan".split()
SHAPES = "circle square triangle star cross heart".split()
MOTIONS = ["moves left", "moves right", "bounces", "spins in place", "orbits clockwise", "appears", "stays still"]
CAPTIONS = [f"A {c} {s} {m}, over a checkered background." for c in COLOURS for s in SHAPES for m in MOTIONS]


@pytest.fixture(scope="module")
def text() -> SentencePieceText:
    return SentencePieceText.train(CAPTIONS, 512)


def test_every_word_of_the_captions_is_one_piece(text):
    words = sorted({word.strip(".,").lower() for caption in CAPTIONS for word in caption.split()})
    assert {word: len(ids) for word, ids in zip(words, text.encode(words))} == dict.fromkeys(words, 1)
    assert len(text.encode(["a red star moves left"])[0]) == 5


@pytest.mark.parametrize(
    "prompt", ["a red star moves left", "a zebra rides 12 bikes!", "ein rötlicher Stern ★ 星が動く", ""]
)
def test_any_prompt_survives(text, prompt):
    (ids,) = text.encode([prompt])
    assert all(0 <= i < text.vocabulary for i in ids)
    assert text.encode(text.decode([ids])) == [ids]
    assert text.decode([ids]) == [prompt.lower()]


def test_case_does_not_matter(text):
    assert text.encode(["A RED Star"]) == text.encode(["a red star"])


def test_decoding_leaves_out_padding(text):
    ids = pad_to_multiple(text.encode(["a red star", "a blue circle bounces"]))
    assert ids.shape == (2, 8) and text.decode(ids) == ["a red star", "a blue circle bounces"]


def test_training_is_deterministic_silent_and_saved(text, tmp_path, capfd):
    again = SentencePieceText.train(iter(CAPTIONS), 512)
    assert capfd.readouterr() == ("", "")
    assert again.model == text.model
    (tmp_path / "text.model").write_bytes(again.model)
    loaded = SentencePieceText(tmp_path / "text.model")
    assert loaded.encode(CAPTIONS[:9]) == text.encode(CAPTIONS[:9]) and loaded.vocabulary == text.vocabulary <= 512


def test_long_prompts_are_cut_with_a_warning(text):
    with pytest.warns(UserWarning, match="first 64 word pieces"):
        (ids,) = text.encode(["a red star moves left " * 20])
    assert len(ids) == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.encode(["a red star moves left"])


def test_mistakes_are_told(text, tmp_path):
    with pytest.raises(FileNotFoundError, match="no text model at"):
        SentencePieceText(tmp_path / "none.model")
    for junk in (b"", b"not a model", text.model[: len(text.model) // 2]):
        (tmp_path / "junk.model").write_bytes(junk)
        with pytest.raises(ValueError, match="junk.model is not a sentencepiece model"):
            SentencePieceText(tmp_path / "junk.model")
    with pytest.raises(ValueError, match="takes a list of texts"):
        text.encode("a red star")
    with pytest.raises(ValueError, match=f"0 to {text.vocabulary - 1}; got 99999"):
        text.decode([[99999]])
    for captions, size in (([], 512), (CAPTIONS, 100)):
        with pytest.raises(ValueError, match=f"no text model of {size} pieces") as error:
            SentencePieceText.train(captions, size)
        assert "\n" not in str(error.value)


def test_padding_to_a_multiple():
    assert pad_to_multiple([[5, 6], [7]]).tolist() == [[5, 6] + [PAD] * 6, [7] + [PAD] * 7]
    assert pad_to_multiple([list(range(9))], pad=3).tolist() == [[*range(9), *[3] * 7]]
    assert pad_to_multiple([[]]).shape == (1, 8)
    assert pad_to_multiple([list(range(99))]).tolist() == [list(range(64))]
    assert pad_to_multiple([[1]]).dtype == torch.long


def test_t5_embeds_a_prompt_whatever_it_is_batched_with(t5_folder):
    t5 = T5Text(t5_folder).train()  # a training run must not turn its dropout on
    prompts = ["a red star moves left", "a blue circle bounces, over a checkered background.", ""]
    vectors, mask = t5(prompts)
    assert vectors.shape[0] == 3 and vectors.shape[1] % 8 == 0 and vectors.shape[2] == 32 and not vectors.requires_grad
    assert mask.sum(1).tolist() == [len(row) for row in t5.encode(prompts)] and mask[2].sum() == 1
    alone, _ = t5(prompts[:1])
    assert alone.shape[1] < vectors.shape[1]
    torch.testing.assert_close(vectors[:1, : alone.shape[1]], alone)
    assert (vectors[~mask] == 0).all() and not any(p.requires_grad for p in t5.parameters())


def test_t5_reads_the_ids_that_transformers_makes(t5_folder):
    from transformers import T5Tokenizer

    theirs = T5Tokenizer.from_pretrained(t5_folder)(CAPTIONS[:50:7])["input_ids"]
    assert T5Text(t5_folder).encode(CAPTIONS[:50:7]) == theirs and theirs[0][-1] == END


def test_t5_reads_at_most_64_pieces(t5_folder):
    with pytest.warns(UserWarning, match="word pieces"):
        vectors, mask = T5Text(t5_folder, dtype="bfloat16")(["a red star " * 40])
    assert vectors.shape == (1, 64, 32) and mask.all() and vectors.dtype == torch.bfloat16


def test_t5_tells_what_is_missing(t5_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json in"):
        T5Text("google/t5-v1_1-base")
    for name in ("config.json", "spiece.model"):
        (tmp_path / name).write_bytes((t5_folder / name).read_bytes())
    with pytest.raises(ValueError, match="holds no T5 encoder") as error:
        T5Text(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="float32, bfloat16, float16; got int8"):
        T5Text(t5_folder, dtype="int8")


def test_t5_of_a_whole_model_is_its_encoder_and_other_models_are_refused(t5_folder, tmp_path):
    from transformers import BertConfig, BertModel, T5Config, T5EncoderModel, T5ForConditionalGeneration

    config = T5Config.from_pretrained(t5_folder)
    whole = T5ForConditionalGeneration(config).eval()
    whole.encoder.load_state_dict(T5EncoderModel.from_pretrained(t5_folder).encoder.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=9, **size)).save_pretrained(tmp_path / "bert")
    for name in ("whole", "bert"):
        (tmp_path / name / "spiece.model").write_bytes((t5_folder / "spiece.model").read_bytes())
    torch.testing.assert_close(T5Text(tmp_path / "whole")(CAPTIONS[:2])[0], T5Text(t5_folder)(CAPTIONS[:2])[0])
    with pytest.raises(ValueError, match="holds no T5 encoder"):
        T5Text(tmp_path / "bert")
