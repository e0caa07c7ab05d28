"""Digests of a folder's files, written beside them when it is complete and compared before it is read."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from longlora_jax.errors import UserError
from longlora_jax.files import read_json, write_json

SEAL = "sha256.json"
_THREADS = 4  # hashlib lets other threads run


def seal(folder: Path, *, but: str = "") -> None:
    """Writes SEAL: size and SHA-256 of each file in the folder, `but` the one of that name, which still changes."""
    names = [name for name in _files(folder) if name not in (but, SEAL)]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda name: _digest(folder / name), names)
        write_json(str(folder / SEAL), dict(zip(names, digests, strict=True)))


def is_sealed(folder: Path) -> bool:
    """Whether the folder has digests."""
    return (folder / SEAL).exists()


def faults(folder: Path) -> list[str]:
    """What is no longer as it was when the folder was sealed, a line a file; [] if all is, or if it never was."""
    if not is_sealed(folder):
        return []
    try:
        content = read_json(str(folder / SEAL))
    except UserError as error:
        return [str(error)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return [fault for fault in pool.map(lambda item: _fault(folder, *item), content.items()) if fault]


def _fault(folder: Path, name: str, expected) -> str:
    # What names a file outside is a changed seal; nothing out there is read.
    if os.path.isabs(name) or ".." in Path(name).parts:
        return f"{SEAL} names {name!r}, which is not in the folder"
    try:
        return "" if _digest(folder / name) == expected else f"{name} has changed"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def _digest(path: Path) -> list:
    with open(path, "rb") as file:
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _files(folder: Path) -> Iterator[str]:
    return (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())
