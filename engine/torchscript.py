"""Tokenizers that come as TorchScript programs, as NVIDIA Cosmos publishes its own (arXiv:2501.03575).

A program is code. Loading it may already run parts of it, and running it can read and write any file that the user can:
`torch.jit` bounds what is said in it, not what it does. So `trust` has to be said, nothing is opened before it is, and
no stored model can ask for one (`store.ALLOWED`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from reelm.tokenizers.quantizers import Continuous
from reelm.tokenizers.tokenizer import Past, Triple, VideoTokenizer

ENCODER, DECODER = "encoder.jit", "decoder.jit"
COSMOS = 64_000  # codes of Cosmos's discrete tokenizers: levels of 8, 8, 8, 5, 5, 5
PROBE = (17, 64, 64)  # frames, rows and columns of the grey clip by which a program is known


class Ids(nn.Module):
    """In place of a quantizer where the program quantizes: its latents are its ids `(B, 1, t, h, w)`."""

    dim = inputs = 1

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        most = int(z.max())
        if most >= self.vocabulary:
            raise ValueError(f"{ENCODER} made the code {most}; {self.vocabulary} were known of")
        return z, z[:, 0].long(), {}

    def lookup(self, ids: Tensor) -> Tensor:
        return ids.unsqueeze(1)


class TorchScript(VideoTokenizer):
    """Two programs: `encoder.jit` makes of `(B, 3, T, H, W)` in [-1, 1] ids, or latents that are not scaled; a tuple
    begins with them. `decoder.jit` makes pixels of them. Those that take images `(B, 3, H, W)` get each frame.

    Compression and kind are found by a grey clip.

    Args:
        folder: of the two files.
        trust: that whoever made them may run programs here.
    """

    streams = False
    decoding_only = ("decoder", "folder", "trust")

    def __init__(self, folder: str | Path, trust: bool = False) -> None:
        super().__init__()
        self.folder, self.trust = str(folder), trust
        if not trust:
            raise ValueError(
                f"{folder} holds TorchScript programs, which can read and write your files; "
                "if you trust whoever made them, add trust=true"
            )
        self.encoder, self.decoder = (_loaded(Path(folder) / name) for name in (ENCODER, DECODER))
        with open(Path(folder) / ENCODER, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        # tokens depend on the program as they do on weights
        self.register_buffer("program", torch.tensor(list(digest), dtype=torch.uint8))
        tokens = self._probe()
        self.ids = tokens.dtype if not tokens.is_floating_point() else None
        self.quantizer = Continuous(tokens.shape[1]) if self.ids is None else Ids(self._codes())

    @torch.no_grad()
    def _probe(self) -> Tensor:
        """What the encoder makes of a grey clip; finds what it takes and the compression."""
        grey = torch.zeros(1, 3, *PROBE)
        self.images = False
        try:
            made = self._encoded(grey)
        except RuntimeError:
            self.images = True
            try:
                made = self._encoded(grey)
            except RuntimeError as error:
                why = str(error).strip().splitlines()[-1]
                raise ValueError(f"{self.folder}/{ENCODER} takes no clip and no image in [-1, 1]: {why}") from None
        frames, *sides = PROBE
        t, *grid = made.shape[2:] if made.ndim == 5 else (0, 0, 0)
        steps = (t - 1, *grid)
        if min(steps) < 1 or any(whole % step for whole, step in zip((frames - 1, *sides), steps)):
            raise ValueError(f"{self.folder}/{ENCODER} makes {tuple(made.shape)} of {PROBE} and is no causal tokenizer")
        self.compression: Triple = tuple(whole // step for whole, step in zip((frames - 1, *sides), steps))
        return made

    def _codes(self) -> int:
        """Number of codes: what the program says of its levels, or Cosmos's."""
        levels = [buffer for name, buffer in self.encoder.named_buffers() if name.rpartition(".")[2] == "_levels"]
        return int(levels[0].prod()) if levels else COSMOS

    def _encoded(self, video: Tensor) -> Tensor:
        """`(B, C, t, h, w)` latents, or ids with C of 1."""
        weight = next(self.encoder.parameters(), video)  # Cosmos's are of bfloat16

        def run(x: Tensor) -> Tensor:
            made = self.encoder(x.to(weight.dtype))
            made = made if isinstance(made, Tensor) else made[0]
            return made.float() if made.is_floating_point() else made.unsqueeze(1)

        return self._each(video, run)

    def _each(self, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Runs a program on a clip, or on each of its frames."""
        return torch.stack([run(frame) for frame in x.unbind(2)], 2) if self.images else run(x)

    def encode_latents(self, video: Tensor, past: Past | None = None) -> Tensor:
        self.check(video, past)
        return self._encoded(video)

    def decode_latents(self, latents: Tensor, past: Past | None = None) -> Tensor:
        weight = next(self.decoder.parameters(), latents)

        def run(z: Tensor) -> Tensor:
            return self.decoder(z.to(weight.dtype) if self.ids is None else z[:, 0].to(self.ids))

        return self._each(latents, run).float()


def _loaded(path: Path) -> torch.jit.ScriptModule:
    """A program on the CPU, whatever machine it was written on."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; a TorchScript tokenizer is {ENCODER} and {DECODER}")
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(f"{path} is no TorchScript program: {str(error).strip().splitlines()[0]}") from None
