"""A clip beside what a tokenizer makes of it, and beside what video codecs make of it with as many bits."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reelm.data.clip import Clip
from reelm.data.codecs import CODECS, TOLERANCE, check_codecs, decode, encode
from reelm.data.reading import VideoReader
from reelm.data.writing import VIDEOS, check_output, side_by_side, whole_file, write_contact_sheet, write_video
from reelm.engine import sound_comparison
from reelm.engine.loading import load_tokenizer
from reelm.engine.outside import weights_digest
from reelm.engine.store import fingerprint
from reelm.evaluation.reconstruction import bits_per_pixel, mean_over_frames, psnr, ssim, token_usage
from reelm.tokenizers.memory import bytes_of
from reelm.tokenizers.perceptual import LPIPS
from reelm.tokenizers.tiling import Tiled, padded
from reelm.tokenizers.tokenizer import VideoTokenizer, in_half_precision

Note = Callable[[str], None]
SMALLEST, LARGEST = 32, 4096  # pixels a side; LPIPS takes no less
MOST_PIXELS = 1 << 25  # of all frames, where the user names no size: several such clips are held at once


@dataclass(frozen=True)
class Comparison:
    """What is compared; the fields are those of conf/reconstruct.yaml.

    video: a clip or picture. model: a model of the box, its folder, or a tokenizer's, also from outside. output: the
    clip to write (.mp4, .webm, .gif). size: one side of a square, (height, width), or None for the video's own. fps:
    None for every frame of the video. frames: at most. audio_model: an audio tokenizer, named as model is, or None
    to leave the sound out. lpips, lpips_linear: files of weights (`LPIPS`). codecs: of CODECS. trust: model may be
    TorchScript programs (`engine/torchscript.py`). memory: what the tokenizer may take for a tile of a large frame
    (`Tiled`); None: no tiles.
    """

    video: str | None
    model: str = "zoetrope"
    output: str | None = None
    size: int | tuple[int, ...] | None = None
    fps: float | None = None
    frames: int = 65
    start: float = 0.0
    audio_model: str | None = None
    lpips: str | None = None
    lpips_linear: str | None = None
    codecs: tuple[str, ...] = ("h264", "vp9")
    trust: bool = False
    memory: int | str | None = "2GB"

    def check(self) -> None:
        """Raises ValueError for what no video could make right."""
        if not self.video:
            raise ValueError("give video=..., the path of a clip or picture")
        for name, value in (("size", self.size), ("fps", self.fps), ("frames", self.frames), ("start", self.start)):
            parts = value if isinstance(value, tuple) else (value,)
            if value is not None and not all(type(part) in (int, float) for part in parts):
                raise ValueError(f"{name}={value!r} is no number")
        if self.frames < 1 or int(self.frames) != self.frames:
            raise ValueError(f"frames={self.frames} is no number of frames; give 1 or more")
        sides = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        whole = len(sides) == 2 and all(isinstance(side, int) and SMALLEST <= side <= LARGEST for side in sides)
        if self.size is not None and not whole:
            raise ValueError(
                f"size={self.size} is no size: give a side or [height,width] in pixels, {SMALLEST} to {LARGEST}"
            )
        if self.memory is not None:
            bytes_of(self.memory)
        check_codecs(self.codecs)

    def outputs(self) -> tuple[Path, Path, Path]:
        """The clip, the contact sheet and the JSON, where all can be written and none is the video."""
        path = check_output(self.output or Path("outputs") / f"reconstruct_{Path(self.video).stem}.mp4", VIDEOS)
        paths = path, path.with_suffix(".png"), path.with_suffix(".json")
        if Path(self.video).resolve() in [one.resolve() for one in paths]:
            raise ValueError(f"output={path} would overwrite the video {self.video}; give another output=...")
        return paths


def load_lpips(features: str, linear: str | None) -> LPIPS:
    """LPIPS from a file of network features; its linear layers from the other, or from the only such file beside it."""
    if linear is None:
        beside = sorted(path for path in Path(features).parent.glob("*linear*") if path.is_file())
        if len(beside) != 1 and Path(features).is_file():
            raise ValueError(f"{len(beside)} files of linear layers stand beside {features}; give lpips_linear=...")
        linear = str(beside[0]) if beside else features
    return LPIPS(features, linear).eval()


def large_enough(video: Tensor) -> Tensor:
    """`(B, 3, T, H, W)` whose sides below SMALLEST have grown by repeating their edges."""
    tall, wide = (max(SMALLEST - side, 0) for side in video.shape[3:])
    return F.pad(video, (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2, 0, 0), mode="replicate")


def read(wanted: Comparison, note: Note, audio_rate: int | None = None) -> Clip:
    """The clip, as it is in the file where nothing else is asked for and it is not too small or too large; with its
    sound where a rate is given."""
    with VideoReader(wanted.video) as reader:
        info, size = reader.info, wanted.size
        if isinstance(size, int):
            size = (size, size)
        frames = int(wanted.frames)
        count = min(frames, info.frames or frames) if info.fps else 1
        if size is None and count * math.prod(info.size) > MOST_PIXELS:
            height, width = info.size[0], info.size[1] * info.pixel_aspect
            scale = math.sqrt(MOST_PIXELS / (count * height * width))
            size = tuple(max(int(side * scale), SMALLEST) for side in (height, width))
            note(f"{count} frames of {width:.0f} x {height} are large: made {size[1]} x {size[0]}; fewer frames=... or "
                 "size=[height,width] give another")  # fmt: skip
        sound = {} if audio_rate is None else {"audio": True, "audio_rate": audio_rate}
        clip = reader.read(fps=wanted.fps, frames=frames, size=size, start=wanted.start, short="shorter", **sound)
    return clip.replace(video=large_enough(clip.video).contiguous())


@dataclass(frozen=True)
class Result:
    """One way to store a clip: its reconstruction and its figures."""

    name: str
    video: Tensor
    figures: dict[str, Any] = field(default_factory=dict)


def measure(name: str, video: Tensor, clip: Clip, bits: float, lpips: LPIPS | None, **more: Any) -> Result:
    """A reconstruction with its figures; `more` stands beside them."""
    figures = {"psnr": float(psnr(video, clip.video)), "ssim": float(ssim(video, clip.video))}
    if lpips is not None:
        figures[f"lpips_{lpips.network}"] = float(mean_over_frames(lpips.distances, video, clip.video))
    figures |= {"bits_per_pixel": bits_per_pixel(bits, clip.video), "bits": bits, **more}
    return Result(name, video, figures)


@torch.inference_mode()
def compare(
    clip: Clip,
    tokenizer: VideoTokenizer,
    codecs: tuple[str, ...],
    lpips: LPIPS | None,
    note: Note,
    memory: int | str | None = None,
) -> list[Result]:
    """The tokenizer's reconstruction of a batch of one, then each codec's at as many bits.

    A clip that does not fit the compression is padded, and its reconstruction cut: the tokens, and so the bits, are
    those of the padded clip.
    """
    frames, height, width = clip.video.shape[2:]
    tiled = Tiled(tokenizer, memory=memory)
    video = padded(clip.video, tokenizer.compression)
    if video.shape != clip.video.shape:
        more = " x ".join(str(side) for side in (video.shape[2], video.shape[4], video.shape[3]))
        note(f"{frames} x {width} x {height} do not fit the tokenizer: it sees {more}, the edges repeated")
    tokens = tiled.encode(video)
    if tiled.used > 1:
        note(f"frames are made in {tiled.used} tiles (memory={memory}), which norms over whole frames can tell")
    tokens = tokens if tokenizer.vocabulary is not None else in_half_precision(tokens)
    count, usage = tokens.shape[:4].numel(), token_usage(tokens, tokenizer.vocabulary)
    if "entropy" in usage:
        usage["entropy_bits_per_pixel"] = bits_per_pixel(count * usage["entropy"], clip.video)
    bits = count * usage["bits_per_token"]
    video = tiled.decode(tokens)[:, :, :frames, :height, :width]
    results = [measure("tokenizer", video, clip, bits, lpips, tokens=count, **usage)]
    for name in check_codecs(codecs):
        encoded = encode(clip, name, bits)
        if not encoded.reached:
            note(f"{name} cannot go below {encoded.bits / bits:.2f} times the tokenizer's bits")
        made = decode(encoded, clip.size)
        encoder = {"encoder": CODECS[name].encoder, "options": dict(CODECS[name].options)}
        results.append(
            measure(name, made, clip, encoded.bits, lpips, rate_factor=encoded.rate_factor,
                    same_bits=encoded.reached, **encoder)
        )  # fmt: skip
    return results


HEADS = {"psnr": ("PSNR dB", ".2f"), "ssim": ("SSIM", ".4f"), "bits_per_pixel": ("bits/pixel", ".5f")}


def table(results: list[Result]) -> str:
    """A row for each result, and what the tokenizer's tokens are."""
    names = [name for name in results[0].figures if name in HEADS or name.startswith("lpips")]
    heads = [HEADS.get(name, (name.replace("lpips_", "LPIPS-"), ".4f")) for name in names]
    lines = [f"{'':<12}" + "".join(f"{head:>12}" for head, _ in heads) + f"{'of the bits':>14}"]
    asked = results[0].figures["bits"]
    for result in results:
        cells = "".join(f"{result.figures[name]:>12{style}}" for name, (_, style) in zip(names, heads))
        lines.append(f"{result.name:<12}{cells}{result.figures['bits'] / asked:>14.3f}")
    f = results[0].figures
    if "numbers_per_token" in f:
        lines.append(f"{f['tokens']:,} latents of {f['numbers_per_token']} numbers, 16 bits each, rounded to them here")
        return "\n".join(lines)
    lines.append(
        f"{f['tokens']:,} tokens: {f['codes_used']:,} of {f['vocabulary']:,} codes, perplexity {f['perplexity']:,.1f}; "
        f"{f['bits_per_token']:.2f} bits a token, {f['entropy']:.2f} by the entropy of these tokens "
        f"({f['entropy_bits_per_pixel']:.5f} bits/pixel)"
    )
    return "\n".join(lines)


def label(result: Result) -> str:
    """What stands above a result's pictures."""
    f = result.figures
    return f"{result.name}: {f['psnr']:.1f} dB, SSIM {f['ssim']:.3f}, {f['bits_per_pixel']:.4f} bits/pixel"


def run(wanted: Comparison, config: dict[str, Any]) -> list[Path]:
    """Reads, compares, prints the table and writes the clip, the contact sheet and the JSON; returns their paths."""

    def note(text: str) -> None:
        print(f"note: {text}", file=sys.stderr)

    wanted.check()
    paths = wanted.outputs()
    tokenizer, folder = load_tokenizer(wanted.model, wanted.trust)
    audio = sound_comparison.load_audio_tokenizer(wanted.audio_model) if wanted.audio_model else None
    lpips = load_lpips(wanted.lpips, wanted.lpips_linear) if wanted.lpips else None
    clip = read(wanted, note, None if audio is None else audio.rate)
    results = compare(clip, tokenizer, wanted.codecs, lpips, note, wanted.memory)
    length = f"{clip.frames} frames" if clip.frames > 1 else "1 frame"
    print(f"{wanted.video}: {length} of {clip.size[1]} x {clip.size[0]} at {clip.fps:g} a second")
    print(table(results))
    heard, figures = {}, None
    if audio is not None and clip.audio is None:
        note(f"{wanted.video} has no sound")
    elif audio is not None:
        sound, figures = sound_comparison.reconstruct(clip, audio)
        heard = {"audio": sound, "audio_rate": audio.rate}
        print(sound_comparison.line(figures))

    videos = torch.cat([clip.video, *(result.video for result in results)])
    names = ["original", *(result.name for result in results)]
    # nearly without loss, so that what is seen is not this file's own
    write_video(paths[0], Clip(side_by_side(videos, names), clip.fps, **heard), quality=8)
    labels = ["original", *(label(result) for result in results)]
    write_contact_sheet(paths[1], videos, columns=6, labels=labels, scale=max(1, 192 // max(clip.size)))
    record = {
        "frames": clip.frames,
        "size": list(clip.size),
        "fps": clip.fps,
        # the fingerprint tells which tokens, the weights also which decoder
        "tokenizer": {"fingerprint": fingerprint(tokenizer), "weights": weights_digest(folder)},
        "tolerance": TOLERANCE,
        "sound": figures,
        "results": {result.name: result.figures for result in results},
        "config": config,
    }
    with whole_file(paths[2]) as part:
        part.write_text(json.dumps(record, indent=1) + "\n")
    for path in paths:
        print(f"wrote {path}")
    return list(paths)
