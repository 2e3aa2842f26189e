"""Text files as people have them: UTF-8 with or without a byte-order mark, UTF-16 and UTF-32 with one."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from puzzle_nas.errors import DataError

POINTER = b"version https://git-lfs"
"""How a file begins that stands for one that was not fetched."""
MARKS = {
    # UTF-32's little-endian mark begins with UTF-16's.
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@contextmanager
def opened(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A text file, or one compressed with gzip (.gz), without its byte-order mark; `newline` as `open` takes it.

    Raises:
        DataError: not to be read, damaged, or not such text; also while it is read.
    """
    try:
        refuse_pointer(path)
        with _bytes_of(path) as file:
            head = file.read(4096)
            file.seek(0)
            encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8")
            if encoding == "utf-8" and b"\0" in head:
                raise DataError(f"{path} holds zero bytes, so it is not UTF-8 text; convert it to UTF-8.")
            yield io.TextIOWrapper(file, encoding, newline=newline)
    except UnicodeError:
        raise DataError(f"{path} is not UTF-8 text; convert it to UTF-8.") from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{path} is damaged; fetch or compress it again.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def refuse_pointer(path: Path) -> None:
    """Raises: DataError: the file is a Git LFS pointer; OSError: it cannot be read."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise DataError(f"{path} is a Git LFS pointer, not the file itself; fetch it with: git lfs pull")


def read_text(path: Path) -> str:
    """The whole of `opened`."""
    with opened(path) as file:
        return file.read()


def _bytes_of(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.name.endswith(".gz") else open(path, "rb")
