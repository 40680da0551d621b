"""Clips out: mp4, webm, gif, pictures and contact sheets; a file stands under its final name only when it is whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.container import OutputContainer
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from reelm.data.audio import LAYOUTS, resampled
from reelm.data.clip import Clip

VIDEOS = (".mp4", ".webm", ".gif")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
AUDIO_RATES = {".mp4": (16000, 22050, 24000, 32000, 44100, 48000), ".webm": (48000,)}
BT709 = 1  # the number for these primaries and this transfer curve in ISO/IEC 23091-2


def check_output(path: str | os.PathLike[str], known: Sequence[str]) -> Path:
    """The path, where a file of one of the `known` extensions can be written; makes its folder.

    To be asked before long work. Raises ValueError with one line.
    """
    path = Path(path)
    _suffix(path, known)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"output folder {path.parent} cannot be written: {error.strerror}; give another output=..."
        ) from None
    if path.is_dir():
        raise ValueError(f"output={path} is a folder; give the name of a file in it")
    return path


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """What fails in the block is an OSError of one line that names what was to be written."""
    try:
        yield
    except (OSError, av.error.FFmpegError) as error:
        raise OSError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; choose another output"
        ) from error


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well and goes away when it does not.

    Raises OSError with one line where the folder cannot be made or written.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem[:100]}.{os.getpid()}.part{path.suffix}")
    try:
        with writing(path):
            if path.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink()


def to_uint8(video: Tensor) -> np.ndarray:
    """`(3, T, H, W)` in [-1, 1] to `(T, H, W, 3)` bytes; values beyond are clipped."""
    if not torch.isfinite(video).all():
        raise ValueError("the video holds NaN or infinite values and was not written: look for what made them")
    pixels = video.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return pixels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()


def _suffix(path: str | os.PathLike[str], known: Sequence[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in known:
        raise ValueError(f"output={str(path)!r}: {suffix or 'no'} extension cannot be written; use {', '.join(known)}")
    return suffix


def write_video(path: str | os.PathLike[str], clip: Clip, *, quality: int = 18) -> Path:
    """Writes one clip as .mp4 (H.264, AAC), .webm (VP9, Opus) or .gif (no sound) and returns its path.

    Args:
        clip: a batch of one.
        quality: the constant rate factor of the encoder: smaller is better and larger in bytes (H.264: 0 to 51).

    The file plays frames / fps seconds (to the millisecond in mp4 and webm, to the hundredth in gif). mp4 and webm are
    4:2:0, which every player shows and which needs even sides: an odd side grows by one pixel that repeats the edge.
    Raises ValueError for an extension or clip that cannot be written and OSError where the folder cannot.
    """
    suffix = _suffix(path, VIDEOS)
    if len(clip) != 1:
        raise ValueError(f"one clip goes into one file; got a batch of {len(clip)}: write clip[0], clip[1], ...")
    if not 0 < clip.fps <= 1000 or clip.frames == 0:
        raise ValueError(f"a clip of {clip.frames} frames at {clip.fps!r} fps cannot be written: it needs both above 0")
    if not 0 <= quality <= 51:
        raise ValueError(f"quality={quality} must be from 0 (best, largest) to 51")
    frames = to_uint8(clip.video[0])
    with whole_file(path) as part:
        if suffix == ".gif":
            _write_gif(part, frames, clip.fps)
        else:
            _write_container(part, frames, clip, suffix, quality)
    return Path(path)


def _write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    """Each frame with its own palette; times are rounded to hundredths of a second without adding up the errors."""
    times = [round(100 * i / fps) for i in range(len(frames) + 1)]
    lasts = [10 * max(b - a, 1) for a, b in zip(times, times[1:])]
    images = [Image.fromarray(frame).quantize(dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    images[0].save(path, "GIF", save_all=True, append_images=images[1:], duration=lasts, loop=0, optimize=False)


def set_format(context: av.VideoCodecContext, height: int, width: int) -> None:
    """Tells an encoder that it will be given `yuv_frames` of pictures of this size."""
    context.height, context.width, context.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
    context.color_primaries = context.color_trc = BT709
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG


def yuv_frames(frames: np.ndarray, rate: Fraction) -> Iterator[av.VideoFrame]:
    """`(T, H, W, 3)` bytes as 4:2:0 in BT.709, `rate` a second; an odd side grows by a pixel that repeats the edge."""
    tall, wide = frames.shape[1] % 2, frames.shape[2] % 2
    if tall or wide:
        frames = np.pad(frames, ((0, 0), (0, tall), (0, wide), (0, 0)), mode="edge")
    converter = VideoReformatter()
    for number, frame in enumerate(frames):
        picture = converter.reformat(
            av.VideoFrame.from_ndarray(frame, format="rgb24"), format="yuv420p",
            dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1,
        )  # fmt: skip
        picture.pts, picture.time_base, picture.duration = number, 1 / rate, 1
        yield picture


def _write_container(path: Path, frames: np.ndarray, clip: Clip, suffix: str, quality: int) -> None:
    rate = Fraction(clip.fps).limit_denominator(100_000)
    codec, options = {
        ".mp4": ("libx264", {"crf": str(quality), "preset": "medium"}),
        ".webm": ("libvpx-vp9", {"crf": str(quality), "b": "0", "cpu-used": "4", "row-mt": "1"}),
    }[suffix]
    # bitexact: no random identifiers. Still the same clip may make another file: on a busy host libx264 was seen to
    # code a frame differently in one file of some hundreds.
    container = {"fflags": "+bitexact"} | ({"movflags": "faststart"} if suffix == ".mp4" else {})
    with av.open(os.fspath(path), "w", format=suffix[1:], options=container) as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        set_format(stream.codec_context, *frames.shape[1:3])
        sound = _add_sound(out, clip, suffix)  # streams must all be there before the first packet
        for picture in yuv_frames(frames, rate):
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
        if sound is not None:
            _encode_sound(out, *sound)


def _add_sound(out: OutputContainer, clip: Clip, suffix: str):
    if clip.audio is None:
        return None
    if not clip.audio_rate:
        raise ValueError("the clip has audio without audio_rate: give samples a second")
    channels, seconds = clip.audio.shape[1], clip.frames / clip.fps
    if channels not in LAYOUTS:
        raise ValueError(f"audio has {channels} channels; mono or stereo can be written")
    rates = AUDIO_RATES[suffix]
    rate = clip.audio_rate if clip.audio_rate in rates else rates[-1]
    wave = clip.audio[0].detach().float().cpu().clamp(-1, 1).nan_to_num().numpy()
    wave = resampled(wave, clip.audio_rate, rate)[:, : round(seconds * rate)]
    stream = out.add_stream("aac" if suffix == ".mp4" else "libopus", rate=rate, layout=LAYOUTS[channels])
    return stream, wave, rate


def _encode_sound(out: OutputContainer, stream: av.AudioStream, wave: np.ndarray, rate: int) -> None:
    if wave.shape[1]:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave), format="fltp", layout=LAYOUTS[len(wave)])
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def write_image(path: str | os.PathLike[str], clip: Clip, frame: int = 0) -> Path:
    """Writes one frame of a batch of one as .png, .jpg or .webp and returns its path."""
    suffix = _suffix(path, PICTURES)
    if len(clip) != 1:
        raise ValueError(f"one clip goes into one file; got a batch of {len(clip)}: write clip[0], clip[1], ...")
    if not -clip.frames <= frame < clip.frames:
        raise ValueError(f"frame={frame} is not in a clip of {clip.frames} frames")
    pixels = to_uint8(clip.video[0, :, frame : frame + 1 or None])[0]
    options = {} if suffix == ".png" else {"quality": 95}
    with whole_file(path) as part:
        Image.fromarray(pixels).save(part, **options)
    return Path(path)


def write_contact_sheet(
    path: str | os.PathLike[str],
    videos: Clip | Tensor,
    columns: int = 8,
    labels: Sequence[str] | None = None,
    scale: int = 1,
) -> Path:
    """Writes a picture of a batch: a row of evenly chosen frames for each sample, its label above; returns its path.

    Args:
        videos: a clip or `(B, 3, T, H, W)` in [-1, 1].
        columns: frames a row, the first and last always among them.
        labels: one text a sample; a clip's captions by default.
        scale: how many times larger each pixel is drawn.
    """
    _suffix(path, PICTURES)
    if isinstance(videos, Clip):
        labels = videos.captions if labels is None else labels
        videos = videos.video
    if videos.ndim != 5 or videos.shape[1] != 3 or 0 in videos.shape:
        raise ValueError(f"a contact sheet is made of videos (B, 3, T, H, W); got {tuple(videos.shape)}")
    labels = [""] * len(videos) if labels is None else [" ".join(str(label).split()) for label in labels]
    if len(labels) != len(videos):
        raise ValueError(f"{len(videos)} videos but {len(labels)} labels")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns={columns} and scale={scale} must be 1 or more")
    chosen = torch.linspace(0, videos.shape[2] - 1, min(columns, videos.shape[2])).round().long()
    rows = [to_uint8(video[:, chosen]) for video in videos]
    _, height, width, _ = rows[0].shape
    gap, height, width = 2, height * scale, width * scale
    font = ImageFont.load_default(size=13)
    sheet_width = max(len(chosen) * (width + gap) - gap, 160)
    texts = [_wrapped(label, font, sheet_width) for label in labels]
    line = 16
    heights = [height + line * len(text) + 2 * gap for text in texts]
    sheet = Image.new("RGB", (sheet_width, sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for frames, text, tall in zip(rows, texts, heights):
        draw.multiline_text((0, top), "\n".join(text), fill="black", font=font, spacing=2)
        for column, frame in enumerate(frames):
            picture = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (column * (width + gap), top + line * len(text) + gap))
        top += tall
    with whole_file(path) as part:
        sheet.save(part)
    return Path(path)


def side_by_side(videos: Tensor, labels: Sequence[str], gap: int = 4) -> Tensor:
    """`(N, 3, T, H, W)` in [-1, 1] as one video `(1, 3, T, H + 16, ...)`: a row on white, a label above each."""
    count, _, frames, height, width = videos.shape
    row = torch.ones(1, 3, frames, 16 + height, count * (width + gap) - gap)
    for number, (video, label) in enumerate(zip(videos, labels)):
        head = Image.new("RGB", (width, 16), "white")  # of its own, so that a long label ends with its picture
        ImageDraw.Draw(head).text((0, 0), label, fill="black", font=ImageFont.load_default(size=12))
        left = number * (width + gap)
        row[0, :, :, :16, left : left + width] = torch.from_numpy(np.array(head)).permute(2, 0, 1)[:, None] / 127.5 - 1
        row[0, :, :, 16:, left : left + width] = video
    return row


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 3) -> list[str]:
    """The text in at most `most` lines no wider than `width` pixels."""
    lines: list[str] = []
    for word in text[:1000].split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " ..."]
    return lines
