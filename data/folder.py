"""Real videos as datasets of clips: a folder of files with captions beside them, or a CSV / JSONL list of files."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import permutations
from pathlib import Path, PurePosixPath
from typing import Literal, TypedDict, Unpack, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from reelm.data import images
from reelm.data.clip import Clip
from reelm.data.controls import with_controls
from reelm.data.decoding import Source
from reelm.data.reading import VideoError, VideoReader
from reelm.data.sounds import SoundReader

SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".mpg", ".mpeg", ".ts", ".m2ts", ".3gp", ".ogv",
    ".wmv", ".gif",
)  # fmt: skip
PATHS, TEXTS = ("path", "video", "videos", "file_name"), ("caption", "text", "prompt")
SOUND_SUFFIXES = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".oga", ".opus", ".mka")
TRIES = 100  # bad files in a row before a dataset counts as unreadable
TEXT_BYTES = 65_536  # of a caption file; the rest is not read

Split = Literal["train", "validation", "all"]
Chance = Literal["start", "crop", "zoom", "flip", "symmetry"]
STORED_RATE = 25.0  # what clips say where each has the frames of its own video: those of a batch must agree


def share_of(key: str) -> float:
    """A number in [0, 1) that depends on the name alone, on every machine and in every version."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def caption_of(data: bytes, suffix: str) -> str:
    """The caption in the bytes of a .txt or .json file, in one line; "" where a JSON file holds none."""
    text = data[:TEXT_BYTES].decode("utf-8-sig", "replace")
    if suffix == ".json":
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            return ""
        found = [fields[name] for name in TEXTS if isinstance(fields, dict) and isinstance(fields.get(name), str)]
        text = found[0] if found else ""
    return " ".join(text.split())


def _symmetric(video: Tensor, draw: np.ndarray) -> Tensor:
    """A video as another that could as well have been, by four numbers in [0, 1)."""
    upright, plain, forward, colours = draw
    video = video if upright < 0.5 else video.flip(-2)
    video = video if plain < 0.5 or video.shape[-1] != video.shape[-2] else video.transpose(-1, -2)
    video = video if forward < 0.5 else video.flip(2)
    return video[:, list(permutations(range(3)))[int(colours * 6)]]


class VideoOptions(TypedDict, total=False):
    """The arguments of `Videos` that its subclasses hand on."""

    frames: int
    size: int | tuple[int, int]
    fps: float | None
    split: Split
    held_out: float | Sequence[str]
    clips_per_video: int
    random: Sequence[Chance]
    controls: Sequence[str]
    audio: bool
    remember: bool
    seed: int


class Videos(Dataset[Clip], ABC):
    """Clips cut from named videos; subclasses say where the bytes and the captions are.

    Args:
        keys: a stable name for each video, with forward slashes.
        where: what messages call the whole.
        frames, size: of a clip (`read_video`).
        fps: of a clip; None: the stored frames, at whatever rate, for what does not ask how fast things go. Clips then
            say `STORED_RATE`.
        split: "train" and "validation" part the videos by a hash of their name, or by `held_out`.
        held_out: the share of videos that validation gets, or their names (whole, last part or without suffix).
        clips_per_video: how many clips are cut from each, so that few videos still make an epoch. Item i is part
            `i % clips_per_video` of video `i // clips_per_video`.
        random: what is drawn, from (seed, index, draw) alone and so anew in each pass over the data: the "start"
            within the item's part of the video (else parts are spread evenly from the first frame on), the "crop" (else
            the centre), the "zoom" (up to where a stored pixel is one of the clip), a horizontal "flip" (for captions
            that never say left or right; stereo sound is swapped too), a "symmetry" (upside down, rows for columns in
            squares, backwards, colours exchanged: for tokenizers, to which few videos are then many).
        controls: made for every clip, of "flow" and "depth" (`reelm.data.controls`).
        audio: also read the sound, stereo at 16 kHz; without a track, silence. A clip of one frame has none.
        remember: keep the decoded frames of each video in memory (1.5 bytes a stored pixel), for few videos that many
            passes go over.
        seed: of what is drawn.

    A video that cannot be read, or is too short, is replaced by the next one that can, always the same one; it is named
    in a warning once and in `failures` (name: reason) of the process that read it.
    """

    suffixes = SUFFIXES  # of the files that are looked for

    def __init__(
        self,
        keys: Sequence[str],
        where: str,
        *,
        frames: int = 17,
        size: int | tuple[int, int] = 64,
        fps: float | None = 8.0,
        split: Split = "all",
        held_out: float | Sequence[str] = 0.05,
        clips_per_video: int = 1,
        random: Sequence[Chance] = ("start",),
        controls: Sequence[str] = (),
        audio: bool = False,
        remember: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value in (("frames", frames), ("clips_per_video", clips_per_video)):
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        chances = get_args(Chance)
        unknown = set(random) - set(chances)
        if unknown:
            raise ValueError(f"random={list(random)} holds {unknown.pop()!r}; it can hold {', '.join(chances)}")
        if audio and "symmetry" in random:
            raise ValueError("random=[symmetry] may turn time round, which sound does not bear; set audio=false")
        if audio and fps is None:
            raise ValueError("fps=null takes the stored frames at any rate, so their sound has no one length; give fps")
        self.keys, self.where, self.frames, self.fps = list(keys), where, frames, fps
        self.size = size if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.clips_per_video, self.random, self.seed = clips_per_video, tuple(random), seed
        self.controls, self.audio, self.remember = tuple(controls), audio, remember
        self._readers: dict[int, VideoReader] = {}
        self.videos = self._split(split, held_out)
        self.failures: dict[str, str] = {}
        self._bad: set[tuple[float | None, ...]] = set()

    @abstractmethod
    def _source(self, number: int) -> AbstractContextManager[Source]:
        """What `VideoReader` reads of video `number`, open while in use."""

    @abstractmethod
    def _text(self, number: int) -> str:
        """The caption of video `number`, "" where there is none."""

    def _split(self, split: str, held_out: float | Sequence[str]) -> list[int]:
        """Numbers of the videos of a split; ValueError where there are none."""
        if split not in ("train", "validation", "all"):
            raise ValueError(f"split={split!r} is unknown: use 'train', 'validation' or 'all'")
        everything = list(range(len(self.keys)))
        if not everything:
            raise ValueError(f"{self.where}: no videos there ({', '.join(self.suffixes)}); check the path")
        if split == "all":
            return everything
        if isinstance(held_out, (int, float)):
            if not 0 <= held_out <= 1:
                raise ValueError(f"held_out={held_out} must be a share from 0 to 1, or a list of names")
            out = [share_of(key) < held_out for key in self.keys]
        else:
            names = {str(name) for name in held_out}
            paths = [PurePosixPath(key) for key in self.keys]
            out = [bool(names & {str(path), path.name, path.stem}) for path in paths]
        chosen = [number for number in everything if out[number] == (split == "validation")]
        if not chosen:
            raise ValueError(
                f"{self.where}: no video of {len(out)} is in split={split!r}; change data.train.held_out={held_out}"
            )
        return chosen

    def __len__(self) -> int:
        return len(self.videos) * self.clips_per_video

    def __getitem__(self, index: int) -> Clip:
        return self.get(index)

    def key(self, index: int) -> str:
        """The name of the video that a clip is cut from."""
        return self.keys[self._place(index)[0]]

    def caption(self, index: int, frames: int | None = None) -> str:
        """The caption of a clip, without decoding it."""
        return self._text(self._place(index)[0])

    def get(
        self,
        index: int,
        frames: int | None = None,
        controls: Sequence[str] | None = None,
        draw: int = 0,
        size: int | tuple[int, int] | None = None,
        fps: float | None = None,
        audio: bool | None = None,
    ) -> Clip:
        """A clip, or its replacement where its video cannot be read; VideoError when nothing can."""
        frames = frames or self.frames
        return self._or_another(
            index, (frames, draw, fps), lambda clip: self.read(clip, frames, controls, draw, size, fps, audio)
        )

    def sound(self, index: int, rate: int = 16_000, frames: int | None = None, draw: int = 0) -> Clip:
        """Stereo sound alone, as long as a clip, at `rate` samples a second; the video has no pixels.

        A file need not hold pictures. A file without sound is replaced as in `get`; where a track ends, silence
        follows.
        """
        frames = frames or self.frames
        return self._or_another(
            index, (frames, draw, None, rate), lambda clip: self._read_sound(clip, rate, frames, draw)
        )

    def _or_another(self, index: int, what: tuple[float | None, ...], read: Callable[[int], Clip]) -> Clip:
        """What `read` makes of an item, or of the next one that it can read."""
        first, part = divmod(index, self.clips_per_video)
        self._place(index)
        tries = min(len(self.videos), TRIES)
        for offset in range(tries):
            candidate = (first + offset) % len(self.videos) * self.clips_per_video + part
            if (candidate, *what) in self._bad:
                continue
            try:
                return read(candidate)
            except VideoError as error:
                self._bad.add((candidate, *what))
                self._name(candidate, str(error))
        some = next(iter(self.failures.values()))
        raise VideoError(f"{self.where}: {tries} videos in a row cannot be read, the first because {some}")

    def _name(self, index: int, reason: str) -> None:
        key = self.key(index)
        if key not in self.failures:
            self.failures[key] = reason
            warnings.warn(f"left out, another clip takes its place: {reason}", stacklevel=3)

    def _place(self, index: int) -> tuple[int, int]:
        """The number of the video and the part of it that an item is."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.where} has the items 0 to {len(self) - 1}; got {index}")
        video, part = divmod(index, self.clips_per_video)
        return self.videos[video], part

    def read(
        self,
        index: int,
        frames: int | None = None,
        controls: Sequence[str] | None = None,
        draw: int = 0,
        size: int | tuple[int, int] | None = None,
        fps: float | None = None,
        audio: bool | None = None,
    ) -> Clip:
        """Exactly the clip `index`; VideoError where it cannot be read."""
        frames, size, fps = frames or self.frames, size or self.size, fps or self.fps
        number, part = self._place(index)
        rng = np.random.default_rng((self.seed, index, draw))
        shift, *crop_at, flip, zoom = rng.random(5).tolist()
        symmetry = rng.random(4)
        with self._reader(number) as reader:
            start = self._start(reader, frames, part, shift, fps)
            options = {
                "fps": fps, "frames": frames, "size": size,
                "audio": (self.audio if audio is None else audio) and frames > 1,
                "crop_at": tuple(crop_at) if "crop" in self.random else (0.5, 0.5),
                "zoom": zoom if "zoom" in self.random else 0.0,
            }  # fmt: skip
            try:
                clip = reader.read(start=start, **options)
            except VideoError:
                if start == 0:
                    raise
                clip = reader.read(start=0.0, **options)  # the header promised more than there is
        rate = fps or STORED_RATE
        clip = clip.replace(captions=(self._text(number),), keys=(self.keys[number],), fps=rate)
        if options["audio"] and clip.audio is None:
            clip = clip.replace(audio=clip.video.new_zeros(1, 2, round(frames / rate * 16000)), audio_rate=16000)
        if "flip" in self.random and flip < 0.5:
            clip = clip.replace(video=clip.video.flip(-1), audio=None if clip.audio is None else clip.audio.flip(1))
        if "symmetry" in self.random:
            clip = clip.replace(video=_symmetric(clip.video, symmetry), audio=None)
        return with_controls(clip, self.controls if controls is None else controls)

    @contextmanager
    def _reader(self, number: int) -> Iterator[VideoReader]:
        if number in self._readers:
            yield self._readers[number]
            return
        with self._source(number) as source:
            reader = VideoReader(source)
            if self.remember:
                reader.keep()
                self._readers[number] = reader
                yield reader
            else:
                with reader:
                    yield reader

    def _read_sound(self, index: int, rate: int, frames: int, draw: int) -> Clip:
        number, part = self._place(index)
        shift, _, _, flip, _ = np.random.default_rng((self.seed, index, draw)).random(5).tolist()
        rate_of_frames = self.fps or STORED_RATE
        seconds = frames / rate_of_frames
        with self._source(number) as source, SoundReader(source) as reader:
            if part or "start" in self.random:
                start = self._spread(reader.duration() - seconds, part, shift)
            else:
                start = 0.0
            wave = reader.read(start, seconds, rate)
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        return Clip(
            video=torch.empty(1, 3, frames, *size, device="meta"),
            fps=rate_of_frames,
            audio=wave.flip(1) if "flip" in self.random and flip < 0.5 else wave,
            audio_rate=rate,
            captions=(self._text(number),),
            keys=(self.keys[number],),
        )

    def _start(self, reader: VideoReader, frames: int, part: int, shift: float, fps: float | None) -> float:
        if part == 0 and "start" not in self.random:
            return 0.0
        info = reader.info
        latest = info.duration - (frames - 1) / (fps or info.fps or 1.0) - 1.5 / (info.fps or 1.0)
        return self._spread(latest, part, shift)

    def _spread(self, latest: float, part: int, shift: float) -> float:
        drawn, parts = "start" in self.random, self.clips_per_video
        return max(0.0, latest) * ((part + shift) / parts if drawn else part / (parts - 1))


def _beside(path: str) -> str:
    """The caption in a .txt or .json file with the name of the video, "" without one."""
    for suffix in (".txt", ".json"):
        try:
            with open(os.path.splitext(path)[0] + suffix, "rb") as file:
                return caption_of(file.read(TEXT_BYTES), suffix)
        except OSError:
            continue
    return ""


class VideoFolder(Videos):
    """Every video below a folder, with the caption in a .txt or .json file of the same name beside it.

    root: the folder; files and folders whose name begins with a dot are passed over, links to folders not followed.
    The other arguments are those of `Videos`. With frames=1 pictures count too.
    """

    def __init__(self, root: str | os.PathLike[str], frames: int = 17, **options: Unpack[VideoOptions]) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder of videos; check the path")
        suffixes = self.suffixes + (images.SUFFIXES if frames == 1 else ())
        found = []
        for folder, folders, files in os.walk(self.root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = Path(folder).relative_to(self.root)
            found += [
                (below / name).as_posix()
                for name in files
                if name.lower().endswith(suffixes) and not name.startswith(".")
            ]
        super().__init__(sorted(found), str(root), frames=frames, **options)

    def _source(self, number: int) -> AbstractContextManager[Source]:
        return nullcontext(self.root / self.keys[number])

    def _text(self, number: int) -> str:
        return _beside(os.fspath(self.root / self.keys[number]))


class SoundFolder(VideoFolder):
    """As `VideoFolder`, but files of sound alone count too; for what asks for `sound`."""

    suffixes = SUFFIXES + SOUND_SUFFIXES


class Manifest(Videos):
    """The videos that a .csv or .jsonl file lists, one a line, paths relative to that file.

    path: of the list. A column (or key) `path`, `video`, `videos` or `file_name` names the video and `caption`, `text`
    or `prompt` its caption; without the latter, captions are looked for beside the videos as in a folder. The other
    arguments are those of `Videos`.
    """

    def __init__(self, path: str | os.PathLike[str], **options: Unpack[VideoOptions]) -> None:
        self.root = Path(path).parent
        rows = _rows(Path(path))
        self.texts = [text for _, text in rows]
        super().__init__([key for key, _ in rows], str(path), **options)

    def _source(self, number: int) -> AbstractContextManager[Source]:
        key = self.keys[number]
        return nullcontext(key if "://" in key else self.root / key)  # the reader refuses links, by their own name

    def _text(self, number: int) -> str:
        text = self.texts[number]
        return _beside(os.fspath(self.root / self.keys[number])) if text is None else text


def _rows(path: Path) -> list[tuple[str, str | None]]:
    """(path, caption) of every line of a CSV or JSONL list; ValueError with the line that is wrong."""
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise ValueError(f"{path}: a list of videos is a .csv or .jsonl file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such list of videos; check the path")
    rows: list[tuple[str, str | None]] = []
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        try:
            entries = (
                csv.DictReader(file) if path.suffix.lower() == ".csv" else map(json.loads, filter(str.strip, file))
            )
            for entry in entries:
                key = next((entry[name] for name in PATHS if entry.get(name)), None)
                text = next((entry[name] for name in TEXTS if entry.get(name) is not None), None)
                if not isinstance(key, str):
                    raise ValueError(f"it names no video in {', '.join(PATHS)}")
                rows.append((key, None if text is None else " ".join(str(text).split())))
        except (ValueError, AttributeError, RecursionError, csv.Error) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: entry {len(rows) + 1} cannot be used: {reason}") from error
    return rows
