"""How faithful a tokenizer is on real videos, beside video codecs at as many bits: the suite `reconstruction`."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from reelm.data.clip import Clip
from reelm.data.codecs import check_codecs
from reelm.data.folder import SUFFIXES
from reelm.data.reading import VideoReader
from reelm.data.writing import write_contact_sheet
from reelm.engine.comparison import SMALLEST, Result, compare, load_lpips
from reelm.engine.loading import load_tokenizer
from reelm.engine.store import fingerprint
from reelm.evaluation.reconstruction import token_usage
from reelm.tokenizers.tokenizer import VideoTokenizer

Figures = dict[str, dict[str, float]]  # of each way to store a clip, by name
FIGURES = {"psnr": ("PSNR dB", ".2f"), "ssim": ("SSIM", ".4f"), "bits_per_pixel": ("bits/pixel", ".4f")}


def _videos(videos: str | Sequence[str]) -> list[Path]:
    """The files that a folder or a list names; an error for what is not there."""
    if isinstance(videos, str) and Path(videos).is_dir():
        found = sorted(path for path in Path(videos).iterdir() if path.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"videos={videos} holds no video ({', '.join(SUFFIXES)})")
        return found
    paths = [Path(path) for path in ([videos] if isinstance(videos, str) else videos)]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no video {path}; videos=... is a folder or a list of files")
    if not paths:
        raise ValueError("videos=[] names no video")
    return paths


@dataclass(frozen=True)
class Reconstructions:
    """What is judged; the fields are those of conf/evaluate.yaml."""

    videos: str | Sequence[str] | None = None
    sizes: Sequence[int] = (128, 256)
    frames: int = 17
    clips_per_video: int = 2
    fps: float | None = None
    lpips: str | None = None
    lpips_linear: str | None = None
    codecs: Sequence[str] = ("h264",)
    trust: bool = False

    def __post_init__(self) -> None:
        if not self.videos:
            raise ValueError("suite=reconstruction needs videos=..., a folder or a list of files")
        for name, value in (("frames", self.frames), ("clips_per_video", self.clips_per_video)):
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        check_codecs(self.codecs)

    def _clips(self, path: Path, size: int) -> Iterator[Clip]:
        """Square clips from the middle of a video, evenly spread over its time."""
        with VideoReader(path) as reader:
            rate = self.fps or reader.info.fps or 1.0
            latest = max(0.0, reader.info.duration - (self.frames + 0.5) / rate)
            for number in range(self.clips_per_video):
                start = latest * number / max(self.clips_per_video - 1, 1)
                yield reader.read(fps=self.fps, frames=self.frames, size=size, start=start)

    def _check(self, tokenizer: VideoTokenizer) -> None:
        for size in self.sizes:
            if size < SMALLEST:
                raise ValueError(f"sizes={list(self.sizes)}: LPIPS takes no less than {SMALLEST} pixels")
            tokenizer.grid(self.frames, size, size)

    @torch.inference_mode()
    def judge(self, model: str, sheets: Path | None = None, show: Callable[[str], None] = print) -> dict[str, Any]:
        """Means over each video's clips, and over all videos; `sheets`: folder of a contact sheet for each size."""
        tokenizer, _ = load_tokenizer(model, self.trust)
        names = _names(_videos(self.videos))
        self._check(tokenizer)
        lpips = load_lpips(self.lpips, self.lpips_linear) if self.lpips else None
        report: dict[str, Any] = {"tokenizer": fingerprint(tokenizer), "frames": self.frames, "sizes": {}}
        for size in self.sizes:
            each: dict[str, dict[str, list[Result]]] = {}
            tokens: list[Tensor] = []
            rows: list[tuple[str, Tensor]] = []
            for path, name in names.items():
                each[name] = defaultdict(list)
                for number, clip in enumerate(self._clips(path, size)):
                    tokens.append(tokenizer.encode(clip.video).flatten(0, 2))
                    results = compare(clip, tokenizer, tuple(self.codecs), lpips, _note)
                    for result in results:
                        each[name][result.name].append(result)
                    if not number:
                        rows.append((f"{name}, original", clip.video))
                        rows += [(_label(result), result.video) for result in results]
            used = token_usage(torch.cat(tokens), tokenizer.vocabulary)
            means = {video: {name: _means(some) for name, some in found.items()} for video, found in each.items()}
            whole = {
                name: {figure: fmean(means[video][name][figure] for video in means) for figure in figures}
                for name, figures in next(iter(means.values())).items()
            }
            report["sizes"][str(size)] = {"mean": whole, "codes": used, "videos": means}
            show(table(size, whole, means, used))
            if sheets is not None:
                pictures = torch.cat([video for _, video in rows])
                write_contact_sheet(sheets / f"reconstruction_{size}.png", pictures, 6, [text for text, _ in rows])
        return report


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """What each video is called: by its stem, or by its whole path where several have the same."""
    stems = Counter(path.stem for path in dict.fromkeys(paths))
    return {path: path.stem if stems[path.stem] == 1 else str(path) for path in paths}


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _means(results: Sequence[Result]) -> dict[str, float]:
    names = [name for name in results[0].figures if name in FIGURES or name.startswith("lpips")]
    return {name: fmean(result.figures[name] for result in results) for name in names}


def _label(result: Result) -> str:
    distance = "".join(f", LPIPS {value:.3f}" for name, value in result.figures.items() if name.startswith("lpips"))
    return f"{result.name}: {result.figures['psnr']:.1f} dB{distance}"


def table(
    size: int,
    whole: dict[str, dict[str, float]],
    videos: dict[str, dict[str, dict[str, float]]],
    used: dict[str, float],
) -> str:
    """A row for each video and way to store it, their means, and what the tokens are."""
    names = list(next(iter(whole.values())))
    heads = [FIGURES.get(name, (name.replace("lpips_", "LPIPS-"), ".4f")) for name in names]
    lines = [f"{f'{size} x {size}':<34}{'':<11}" + "".join(f"{head:>12}" for head, _ in heads)]
    for title, found in [*videos.items(), ("mean", whole)]:
        for name, figures in found.items():
            cells = "".join(f"{figures[figure]:>12{style}}" for figure, (_, style) in zip(names, heads))
            lines.append(f"{title[:33]:<34}{name:<11}{cells}")
    if "numbers_per_token" in used:
        lines.append(f"latents of {used['numbers_per_token']} numbers, 16 bits each")
        return "\n".join(lines)
    lines.append(
        f"{used['codes_used']:,} of {used['vocabulary']:,} codes used, perplexity {used['perplexity']:,.0f}, "
        f"{used['entropy']:.2f} of {used['bits_per_token']:.2f} bits a token"
    )
    return "\n".join(lines)
