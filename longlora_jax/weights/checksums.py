"""Checksums: size and SHA-256 of a folder's files, written beside them when it is complete, verified before it is read.

Ours because orbax keeps none: it reads a flipped bit as another weight.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from longlora_jax.errors import UserError
from longlora_jax.files import read_json, write_json

CHECKSUMS = "sha256.json"
_THREADS = 4  # hashlib lets other threads run


def write_checksums(folder: Path, *, skip: str = "") -> None:
    """Writes CHECKSUMS for all files in the folder, but for the one named skip, which still changes."""
    names = [name for name in _files(folder) if name not in (skip, CHECKSUMS)]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda name: _digest(folder / name), names)
        write_json(str(folder / CHECKSUMS), dict(zip(names, digests, strict=True)))


def has_checksums(folder: Path) -> bool:
    """Whether the folder has checksums."""
    return (folder / CHECKSUMS).exists()


def verify(folder: Path) -> list[str]:
    """What has changed since the checksums were written, a line a file; [] if nothing has, or if there are none."""
    if not has_checksums(folder):
        return []
    try:
        content = read_json(str(folder / CHECKSUMS))
    except UserError as error:
        return [str(error)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return [fault for fault in pool.map(lambda item: _fault(folder, *item), content.items()) if fault]


def _fault(folder: Path, name: str, expected) -> str:
    # Checksums that name a file outside were changed; nothing out there is read.
    if os.path.isabs(name) or ".." in Path(name).parts:
        return f"{CHECKSUMS} names {name!r}, which is not in the folder"
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
