"""Files packed by gzip or zstd, or not at all, as streams of bytes that end in an error where the file was cut."""

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from longlora_jax.errors import UserError
from longlora_jax.files import one_line

CHUNK = 2**16
LIMIT = 2**28  # bytes that a frame of zstd may refer back to, and that are held to unpack it


class Damaged(Exception):
    """A packed file that ends early or does not unpack; the message goes on from the file's name."""


def unpacked_name(name: str) -> str:
    """A file's name without the suffix of its compression."""
    return name.removesuffix(".gz").removesuffix(".zst")


@contextmanager
def open_bytes(path: str | os.PathLike[str], moved: Callable[[int], None]) -> Iterator[io.BufferedReader]:
    """Gives the unpacked bytes of a file; moved is told how many bytes of the file as it lies there are behind.

    Reading raises Damaged; raises UserError if the file cannot be opened.
    """
    name = os.fspath(path)
    try:
        raw = open(name, "rb")
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}): name a file that can.") from error
    with raw:
        stream: Any = raw
        if name.endswith(".gz"):
            stream = gzip.GzipFile(fileobj=raw)
        elif name.endswith(".zst"):
            stream = _Zstd(raw)
        yield io.BufferedReader(_Watched(stream, raw, moved), CHUNK)
        moved(os.fstat(raw.fileno()).st_size)


class _Watched(io.RawIOBase):
    """A stream whose faults are Damaged, and that says how far it is in the file below it."""

    def __init__(self, stream: Any, raw: BinaryIO, moved: Callable[[int], None]):
        self._stream, self._raw, self._moved = stream, raw, moved

    def readable(self) -> bool:
        return True

    def readinto(self, into) -> int:
        try:
            size = self._stream.readinto(into)
        except (OSError, EOFError, zlib.error) as error:
            raise Damaged(f"damaged ({one_line(str(error), 200)})") from error
        self._moved(self._raw.tell())
        return size


class _Zstd(io.RawIOBase):
    """Unpacks zstd; the library's own reader takes a file cut short for a whole one."""

    def __init__(self, raw: BinaryIO):
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{raw.name} is packed by zstd: pip install zstandard") from None
        self._new = zstandard.ZstdDecompressor(max_window_size=LIMIT).decompressobj
        self._raw, self._frame, self._fault = raw, None, zstandard.ZstdError
        self._ready = memoryview(b"")  # bytes would be copied whole for every piece that is taken off them

    def readable(self) -> bool:
        return True

    def readinto(self, into) -> int:
        while not self._ready:
            ended = self._frame is None or self._frame.eof
            packed = self._frame.unused_data if self._frame and ended else b""
            packed = packed or self._raw.read(4096)  # these unpack to 128 MB at most
            if not packed:
                if not ended:
                    raise EOFError("it ends in the middle of its data")
                return 0
            if ended:
                self._frame = self._new()
            assert self._frame is not None
            try:
                self._ready = memoryview(self._frame.decompress(packed))
            except self._fault as error:
                raise OSError(str(error)) from error
        size = min(len(into), len(self._ready))
        into[:size], self._ready = self._ready[:size], self._ready[size:]
        return size
