"""Prompts as word pieces of a small sentencepiece model of our own, or as vectors of a frozen T5 encoder.

Ids start at 0 and know nothing of the language model's id space. Sentencepiece: https://arxiv.org/abs/1808.06226;
T5: https://arxiv.org/abs/1910.10683.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor, nn

LONGEST = 64  # word pieces of a prompt that are read
MULTIPLE = 8  # text slots come in this many, so that batches of different prompts share their shapes
PAD, END, UNKNOWN = 0, 1, 2  # as in T5's own models
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pad_to_multiple(
    rows: Sequence[Sequence[int]], multiple: int = MULTIPLE, pad: int = PAD, longest: int = LONGEST
) -> Tensor:
    """Ids `(B, L)`: L is the longest row's length, at most `longest`, rounded up; shorter rows end with `pad`."""
    length = min(max(map(len, rows), default=0), longest)
    length = min(max(-(-length // multiple), 1) * multiple, longest)
    return torch.tensor([[*row[:length], *[pad] * (length - len(row))] for row in rows], dtype=torch.long)


class SentencePieceText:
    """Text as ids of word pieces, and back.

    Args:
        model: a sentencepiece model: its bytes, or the path of its file.

    Raises:
        FileNotFoundError, ValueError: no such file; not a sentencepiece model.
    """

    width = 0  # no vectors: the language model embeds the ids itself

    def __init__(self, model: bytes | str | Path) -> None:
        name = "the text model"
        if not isinstance(model, bytes):
            name, path = str(model), Path(model)
            if not path.is_file():
                raise FileNotFoundError(f"no text model at {path}; train one with SentencePieceText.train")
            model = path.read_bytes()
        self.model = model
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocabulary = self._pieces.vocab_size()
        except RuntimeError:
            self.vocabulary = 0
        if not self.vocabulary:
            raise ValueError(f"{name} is not a sentencepiece model ({len(model)} bytes)")

    @property
    def slots(self) -> TextSlots:
        """What counts the slots of captions."""
        return TextSlots(self)

    def encode(self, texts: Sequence[str], longest: int = LONGEST) -> list[list[int]]:
        """Ids of each text, without an end token; what goes beyond `longest` pieces is left out, with a warning."""
        if isinstance(texts, str):
            raise ValueError(f"encode takes a list of texts; got the text {texts!r}: write [{texts!r}]")
        rows = self._pieces.encode(list(texts))
        if any(len(row) > longest for row in rows):
            warnings.warn(f"only the first {longest} word pieces of a prompt are read; shorten it", stacklevel=2)
        return [row[:longest] for row in rows]

    def decode(self, rows: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of ids; padding is left out."""
        rows = rows.tolist() if isinstance(rows, Tensor) else rows
        wrong = [i for row in rows for i in row if not 0 <= i < self.vocabulary]
        if wrong:
            raise ValueError(f"text ids run from 0 to {self.vocabulary - 1}; got {wrong[0]}")
        return self._pieces.decode([[i for i in row if i != self._pieces.pad_id()] for row in rows])

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = 1024) -> SentencePieceText:
        """A model in which each common word of the captions is one piece; any other text is spelt, if need be in bytes.

        Case is folded. `vocab_size` is an upper limit; 259 of it are bytes and special pieces, about four pieces a word
        are the steps to whole words. The same captions in the same order give the same model.
        """
        lines = (" ".join(caption.split()) for caption in captions)
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line for line in lines if line),
                model_writer=written,
                # Merging goes on until words are whole. The unigram trainer takes its candidates from what several
                # distinct words share, so that in a small vocabulary it never sees a whole word.
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                byte_fallback=True,
                character_coverage=1.0,
                normalization_rule_name="nmt_nfkc_cf",
                max_sentencepiece_length=32,
                max_sentence_length=1 << 16,
                pad_id=PAD,
                eos_id=END,
                unk_id=UNKNOWN,
                bos_id=-1,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(
                f"no text model of {vocab_size} pieces can be trained on these captions: {reason}"
            ) from None
        return cls(written.getvalue())


class TextSlots:
    """How many text slots captions take. It knows no more than the word pieces, so it can be sent to other processes.

    Args:
        pieces: as which texts are read.
        end: whether an end token follows each text.
    """

    def __init__(self, pieces: SentencePieceText, end: bool = False) -> None:
        self.pieces, self.end = pieces, int(end)

    def __call__(self, caption: str) -> int:
        """A multiple of 8, at most 64."""
        count = len(self.pieces.encode([caption], LONGEST - self.end)[0]) + self.end if caption else 0
        return min(max(-(-count // MULTIPLE), 1) * MULTIPLE, LONGEST)


class T5Text(nn.Module):
    """Text as vectors of a frozen T5 encoder.

    Args:
        path: a local folder as `transformers` saves it (`config.json`, `model.safetensors`) with T5's `spiece.model`.
        dtype: of weights and vectors: "float32", "bfloat16" or "float16".

    Raises:
        FileNotFoundError, ValueError: a file is missing; the folder holds no T5 encoder.
    """

    vocabulary = 0  # no ids in the language model's vocabulary

    def __init__(self, path: str | Path, dtype: str = "float32") -> None:
        super().__init__()
        folder = Path(path)
        for name in ("config.json", "spiece.model"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"no {name} in {folder}; T5Text takes a local folder, for example of t5-v1_1-base"
                )
        try:
            kind = json.loads((folder / "config.json").read_text()).get("model_type")
        except (ValueError, AttributeError):
            raise ValueError(f"{folder / 'config.json'} is not a model's configuration") from None
        if kind != "t5":
            raise ValueError(f"{folder} holds no T5 encoder but a model of type {kind}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is one of {', '.join(DTYPES)}; got {dtype}")
        from transformers import T5EncoderModel  # seconds, and only who embeds text with T5 pays them

        self.path, self.dtype = str(path), dtype
        # the ids that transformers' tokenizer makes, without the files that it wants beside them
        self.pieces = SentencePieceText(folder / "spiece.model")
        try:
            self.encoder, found = T5EncoderModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=DTYPES[dtype], output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{folder} holds no T5 encoder in safetensors files: {reason}") from None
        if found["missing_keys"]:
            raise ValueError(f"{folder} holds no T5 encoder: {sorted(found['missing_keys'])[0]} is missing")
        self.width: int = self.encoder.config.d_model
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> T5Text:
        """Stays in eval mode: a frozen encoder has no use for dropout."""
        return super().train(False)

    @property
    def slots(self) -> TextSlots:
        """What counts the slots of captions."""
        return TextSlots(self.pieces, end=True)

    def encode(self, texts: Sequence[str], longest: int = LONGEST) -> list[list[int]]:
        """T5's ids of each text, with its end token; an empty text is the end token alone."""
        return [[*row, END] for row in self.pieces.encode(texts, longest - 1)]

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Vectors `(B, L, width)` and which of them count `(B, L)` bool; L is a multiple of 8, at most 64."""
        rows = self.encode(texts)
        ids = pad_to_multiple(rows).to(self.encoder.device)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        vectors = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, L, D)
        return torch.where(mask[..., None], vectors, 0), mask
