"""Opening files of text, plain or compressed, a part at a time: none is held in memory whole."""

import codecs
import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

# Characters that are read at a time.
CHUNK = 1 << 20
# A text or a record of more characters is not held in memory whole.
LONGEST = 1 << 22

# What files begin with to say how they are encoded. UTF-32's comes first, because UTF-16's is a part of it.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class _Compression(NamedTuple):
    """How to open a compressed file, and what reading a broken one raises."""

    open: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]


@contextlib.contextmanager
def open_text(file: Path) -> Iterator[TextIO]:
    """Opens a file of text; .gz and .zst are decompressed. Line ends CR and CRLF are read as LF.

    The encoding is UTF-8, or what a byte order mark, which is dropped, says. Raises ValueError, naming the file, where
    it is in another encoding, with the line of the decompressed text, or where its compression is broken.
    """
    compression = _compression(file)
    try:
        with compression.open(file) as raw:
            encoding = _encoding(raw, file)
            with io.TextIOWrapper(raw, encoding=encoding) as opened:
                yield opened
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} line {_bad_line(compression, file, error.encoding)} is not {error.encoding.upper()} text "
            f"({error.reason}); convert it to UTF-8, as with: iconv -f LATIN1 -t UTF-8"
        ) from error
    except compression.errors as error:
        ending = file.suffix.lower()
        raise ValueError(f"{file} is not a whole {ending} file ({error}); make or download it again") from error


def _compression(file: Path) -> _Compression:
    ending = file.suffix.lower()
    if ending == ".gz":
        return _Compression(lambda file: gzip.open(file, "rb"), (EOFError, gzip.BadGzipFile, zlib.error))
    if ending == ".zst":
        zstd = _zstd(file)
        return _Compression(lambda file: zstd.open(file, "rb"), (EOFError, zstd.ZstdError))
    return _Compression(lambda file: open(file, "rb"), ())


def _zstd(file: Path) -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        # Not the package zstandard, whose streams end without an error where the file was cut.
        try:
            from backports import zstd  # type: ignore[import-not-found, no-redef, unused-ignore]
        except ModuleNotFoundError as error:
            raise ValueError(f"{file} needs the package backports.zstd; pip install 'twotower[data]'") from error
    return zstd


def _encoding(raw: Any, file: Path) -> str:
    """The encoding that a file's first bytes tell."""
    head: bytes = raw.peek(4)[:4]
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if len(head) == 4 and (head[0::2] == b"\0\0") != (head[1::2] == b"\0\0"):  # of two Latin letters
        guess = "UTF-16BE" if head[0] == 0 else "UTF-16LE"
        raise ValueError(
            f"{file} is {guess} text without a byte order mark; convert it, as with: iconv -f {guess} -t UTF-8"
        )
    return "utf-8"


def _bad_line(compression: _Compression, file: Path, encoding: str) -> int:
    """The number of the first line that can't be decoded."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    line = 1
    with compression.open(file) as raw:
        if encoding == "utf-8":
            raw.seek(3 if raw.read(3) == codecs.BOM_UTF8 else 0)
        while data := raw.read(CHUNK):
            try:
                line += decoder.decode(data).count("\n")
            except UnicodeDecodeError as error:
                good = error.object[: error.start].decode(encoding, "ignore")
                return line + good.replace("\r\n", "\n").replace("\r", "\n").count("\n")
    return line
