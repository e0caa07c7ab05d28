"""The zip archives of torch.save: their entries, where these lie in the file, and their checksums."""

import io
import struct
import zipfile
import zlib
from typing import BinaryIO, NamedTuple

_DIRECTORY_LIMIT = 16_000_000  # bytes of the zip's list of entries, each some 70
_PIECE = 1 << 20  # bytes
_OLD_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # MAGIC_NUMBER, little endian, as a pickle before 1.6 starts
TORCH_AGAIN = "load it with torch and save its state_dict() again"


class OtherForm(ValueError):
    """Raised for a file that may well be whole, in a form that is not read."""


class Entry(NamedTuple):
    """An entry of the archive: its place in the file, in bytes."""

    start: int
    size: int
    crc: int  # 0 if the writer left it out

    def check(self, path: str, name: str) -> None:
        """Raises ValueError if its bytes have another checksum; they are read once from head to tail, in pieces."""
        found, left = 0, self.size if self.crc else 0
        with open(path, "rb") as file:
            file.seek(self.start)
            while piece := file.read(min(left, _PIECE)):
                found, left = zlib.crc32(piece, found), left - len(piece)
        if self.crc and found != self.crc:
            raise ValueError(f"its {name} is damaged (its checksum is wrong)")


class Bounded(io.FileIO):
    """A file that is never read in large pieces: zipfile trusts the lengths that it finds."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As any file's; raises ValueError for a large piece."""
        if (size or 0) > _DIRECTORY_LIMIT:
            raise ValueError(f"{size} bytes of it would list its entries: too many")
        return super().read(size)


def entries_of(file: BinaryIO, size: int) -> dict[str, Entry]:
    """{name within the archive's folder: entry}; size: that of the file, in bytes."""
    first = file.read(64)
    if _OLD_MAGIC in first:
        raise OtherForm(f"torch before 1.6, or its old format, wrote it: {TORCH_AGAIN}")
    if not first.startswith(b"PK\3\4"):
        raise ValueError("it is no zip file, as torch.save writes them")
    try:
        infos = zipfile.ZipFile(file).infolist()
    except Exception as error:  # of many kinds, and not all of them said in its documentation
        raise ValueError(f"it is no whole zip file ({shown(str(error))}): cut off or damaged") from None
    # With bytes put in before the list of entries zipfile moves all offsets; torch does not.
    if not infos or min(info.header_offset for info in infos) != 0:
        raise ValueError("its zip entries do not start with the file: damaged")
    names = [info.orig_filename for info in infos]
    if len({name.lower() for name in names}) != len(names):  # torch ignores case
        raise ValueError("two of its zip entries have one name")
    folder = names[0].partition("/")[0] + "/"
    if not all(name.startswith(folder) for name in names):
        raise ValueError("its zip entries are not in one folder")
    if f"{folder}constants.pkl" in names:
        raise OtherForm(f"it is a TorchScript archive: {TORCH_AGAIN}")
    return {name.removeprefix(folder): _entry(file, size, info) for name, info in zip(names, infos, strict=True)}


def _entry(file: BinaryIO, size: int, info: zipfile.ZipInfo) -> Entry:
    name = shown(info.orig_filename)
    odd = info.compress_type or info.flag_bits & 1 or info.external_attr & 0x10  # torch reads rubbish from folders
    if odd or info.compress_size != info.file_size:
        raise OtherForm(f"its entry {name} is compressed, encrypted or a folder: torch.save stores plain files")
    file.seek(min(info.header_offset, size))
    header = file.read(30)
    if len(header) != 30 or not header.startswith(b"PK\3\4"):
        raise ValueError(f"its entry {name} has no header: cut off or damaged")
    # The lengths of the name and of the extra field, by which torch aligns what follows.
    start = info.header_offset + 30 + sum(struct.unpack("<2H", header[26:]))
    if start + info.file_size > size:
        raise ValueError(f"its entry {name} ends at byte {start + info.file_size} of {size}: cut off or damaged")
    return Entry(start, info.file_size, info.CRC)


def content_of(file: BinaryIO, entries: dict[str, Entry], name: str, limit: int) -> bytes:
    """The content of a small entry, compared with its checksum. Raises ValueError."""
    entry = entries.get(name)
    if entry is None or entry.size > limit:
        raise ValueError(f"it has no {name} of at most {limit} bytes, as torch.save writes it")
    file.seek(entry.start)
    content = file.read(entry.size)
    if entry.crc and zlib.crc32(content) != entry.crc:
        raise ValueError(f"its {name} is damaged (its checksum is wrong)")
    return content


def shown(text: str) -> str:
    """The text, short and printable."""
    return (text if text.isprintable() else ascii(text))[:150]
