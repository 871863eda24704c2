"""Members of fetched archives. What a package of somebody else unpacks to is read up to a limit, so that a small file cannot
fill a disk or the memory.
"""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from methods.core.job.files import sha256_file

LARGEST_RATIO = 20  # of a member to what it takes in the archive; of those in use, at most 6.4
LARGEST_TEXT = 2**30  # bytes of a file of text; of those in use, at most 83 million
LARGEST_LINE = 2**24
UNREADABLE = (ValueError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError)


def check(archive: Path, sha256: str) -> None:
    """ValueError if the file has another hash: it was put there by hand or by a cache, and not by `fetch`, which checks."""
    if (actual := sha256_file(archive)) != sha256:
        raise ValueError(
            f"{archive} has sha256 {actual}, but {sha256} is pinned in the configuration; it is not opened"
        )


def member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A member, opened. ValueError if there is none of that name, or if it unpacks to far more than it takes."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise ValueError(f"{archive.filename} has no file {name}") from None
    # zipfile reads no more than file_size says. What a member takes is what the archive says, but no more than all of it.
    taken = min(info.compress_size, Path(archive.filename).stat().st_size)
    if info.file_size > LARGEST_RATIO * max(taken, 1):
        raise ValueError(
            f"{archive.filename}: {name} unpacks from {taken:,} to {info.file_size:,} bytes, over "
            f"{LARGEST_RATIO} times as many; it is not read"
        )
    return archive.open(info)


def lines(archive: zipfile.ZipFile, name: str) -> Iterator[str]:
    """The lines of a member that is a gzip file of text. ValueError as above, and for one that is too long."""
    read = 0
    with gzip.open(member(archive, name)) as stream:
        while line := stream.readline(LARGEST_LINE + 1):
            read += len(line)
            if len(line) > LARGEST_LINE or read > LARGEST_TEXT:
                raise ValueError(
                    f"{archive.filename}: {name} is over {LARGEST_TEXT:,} bytes of text, or has a line of over "
                    f"{LARGEST_LINE:,}; the rest is not read"
                )
            yield line.decode("utf-8")
