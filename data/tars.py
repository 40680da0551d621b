"""WebDataset tars as video2dataset writes them (KEY.mp4, KEY.txt, KEY.json), read in place and never unpacked."""

from __future__ import annotations

import io
import os
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Unpack

from reelm.data import images
from reelm.data.folder import SUFFIXES, TEXT_BYTES, VideoOptions, Videos, caption_of

PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
TEXT_SUFFIXES = (".txt", ".json")  # in the order in which a caption is looked for


@dataclass(frozen=True, slots=True)
class Member:
    """Where the bytes of one file stand."""

    tar: str
    offset: int
    size: int


class Section(io.RawIOBase):
    """A stretch of an open file as a file of its own."""

    def __init__(self, file: io.BufferedReader, member: Member, name: str) -> None:
        super().__init__()
        self.file, self.member, self.name, self.at = file, member, name, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.member.size}[whence]
        self.at = max(0, base + offset)
        return self.at

    def readinto(self, buffer: memoryview) -> int:
        self.file.seek(self.member.offset + self.at)
        count = max(0, min(len(buffer), self.member.size - self.at))
        count = self.file.readinto(memoryview(buffer)[:count])
        self.at += count
        return count


def index_tar(path: str) -> Iterator[tuple[str, Member]]:
    """(name, place) of every ordinary file in a tar, by reading its headers only.

    Links, devices, sparse files, names that lead out of the tar and files cut off by its end are passed over with one
    warning. Raises ValueError for a compressed tar or what is no tar.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such tar; check the path")
    with open(path, "rb") as file:
        packing = PACKED.get(file.read(2))
    if packing:
        raise ValueError(f"{path}: is packed with {packing}, so it cannot be read in place: unpack it to a plain .tar")
    end, passed, why = os.path.getsize(path), 0, ""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # a million headers need not stay in memory
                if member.size < 0 or tar.offset <= member.offset:
                    raise tarfile.ReadError(f"a header at {member.offset} points backwards")
                name = member.name
                if member.isdir():
                    continue
                reason = (
                    "is a link, device or sparse file" if not member.isreg() or member.issparse()
                    else "leads out of the tar" if name.startswith(("/", "\\")) or ".." in PurePosixPath(name).parts
                    else "is cut off" if member.offset_data + member.size > end
                    else ""
                )  # fmt: skip
                if reason:
                    passed, why = passed + 1, why or f"{name[:80]!r} {reason}"
                else:
                    yield name, Member(path, member.offset_data, member.size)
    except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
        if isinstance(error, tarfile.ReadError) and passed == 0 and end and "empty" in str(error):
            return
        raise ValueError(f"{path}: is no whole tar ({' '.join(str(error).split())}): make it anew") from error
    if passed:
        warnings.warn(f"{path}: {passed} members are passed over, the first because {why}", stacklevel=2)


class Tars(Videos):
    """The videos in plain tars whose members share a key: KEY.mp4 with its caption in KEY.txt or KEY.json.

    root: a folder (every .tar below it), one tar or a list of tars. Headers are read once, here; clips are then read at
    their place. The other arguments are those of `Videos`. With frames=1 pictures (KEY.jpg) count too.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        frames: int = 17,
        **options: Unpack[VideoOptions],
    ) -> None:
        if options.get("remember"):
            raise ValueError("remember=true is for videos in files of their own; leave it out with tars")
        suffixes = SUFFIXES + (images.SUFFIXES if frames == 1 else ())
        self.members: list[Member] = []
        self.texts: list[tuple[Member, str] | None] = []
        keys = []
        for tar in _tars(root):
            videos: dict[str, tuple[str, Member]] = {}
            texts: dict[tuple[str, str], Member] = {}
            for name, member in index_tar(tar):
                folder, _, base = name.rpartition("/")
                stem, dot, rest = base.partition(".")  # the key ends at the first dot, as in WebDataset
                key, suffix = f"{folder}/{stem}" if folder else stem, (dot + rest).lower()
                if suffix in TEXT_SUFFIXES:
                    texts[key, suffix] = member
                elif suffix.endswith(suffixes):
                    videos.setdefault(key, (name, member))
            for key, (name, member) in videos.items():
                found = ((texts[key, suffix], suffix) for suffix in TEXT_SUFFIXES if (key, suffix) in texts)
                keys.append(f"{Path(tar).name}/{name}")
                self.members.append(member)
                self.texts.append(next(found, None))
        where = os.fspath(root) if isinstance(root, (str, os.PathLike)) else "the tars"
        super().__init__(keys, str(where), frames=frames, **options)

    @contextmanager
    def _source(self, number: int):
        member = self.members[number]
        with open(member.tar, "rb") as file:
            yield Section(file, member, self.keys[number])

    def _text(self, number: int) -> str:
        if self.texts[number] is None:
            return ""
        member, suffix = self.texts[number]
        with open(member.tar, "rb") as file:
            file.seek(member.offset)
            return caption_of(file.read(min(member.size, TEXT_BYTES)), suffix)


def _tars(root: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """The tars that are meant; FileNotFoundError or ValueError where there are none."""
    if not isinstance(root, (str, os.PathLike)):
        return [os.fspath(path) for path in root]
    if not os.path.isdir(root):
        return [os.fspath(root)]
    below = [path for path in Path(root).rglob("*") if ".tar" in path.suffixes or path.suffix in (".tgz", ".tbz")]
    if not below:
        raise ValueError(f"{root}: no .tar files there; check the path")
    return sorted(str(path) for path in below)
