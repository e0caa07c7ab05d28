"""Files that are read whole and folders that are written whole or not at all."""

import fcntl
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from longlora_jax.errors import UserError

# Bytes of JSON. An index or a header takes some 100 for each tensor, and a LLaMA of 405 B has 1,137. What is read takes
# up to 25 times that in memory.
JSON_LIMIT = 4_000_000
DEEPEST, TOO_DEEP = 500, "it is nested too deeply"


def one_line(text: str, limit: int) -> str:
    """The text in at most about `limit` characters, all of them printable: what files hold may be anything."""
    text = " ".join(text[: 2 * limit].split())
    text = text if len(text) <= limit else f"{text[:limit]}..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: str) -> None:
    """Raises UserError if the file is a Git LFS pointer: a few lines that stand for a file still to be fetched."""
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(len(_POINTER)) == _POINTER
    except OSError:  # said by who reads it
        return
    if is_pointer:
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or fetch it again"
        )


def parse_json(content: bytes) -> Any:
    """load_json of UTF-8; raises ValueError also if an object has a key twice."""
    return load_json(content.decode("utf-8"), object_pairs_hook=_unique)


def load_json(text: str, **how: Any) -> Any:
    """json.loads; raises ValueError also if the value is nested too deeply (see check_depth)."""
    try:
        return check_depth(json.loads(text, **how), text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def check_depth(value: Any, spelled: str) -> Any:
    """The value that a JSON text spells; raises ValueError if it is nested more than DEEPEST times.

    Pythons differ in what they read themselves (up to 10,000), and who walks through it calls itself.
    """
    if spelled.count("[") + spelled.count("{") > DEEPEST:
        inside = [[value]]
        for _ in range(DEEPEST + 1):
            values = (x for part in inside for x in (part.values() if isinstance(part, dict) else part))
            inside = [x for x in values if isinstance(x, dict | list)]
        if inside:
            raise ValueError(TOO_DEEP)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{name} is in it twice")
        content[name] = value
    return content


def read_json(path: str) -> dict[str, Any]:
    """Reads a file that holds one JSON object; raises UserError if it does not."""
    if not os.path.exists(path):
        raise UserError(f"{path} is missing")
    if not os.path.isfile(path) or os.path.getsize(path) > JSON_LIMIT:
        raise UserError(f"{path} is no JSON file of at most {JSON_LIMIT} bytes, fetch it again")
    refuse_pointer(path)
    try:
        with open(path, "rb") as file:
            content = parse_json(file.read())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {one_line(str(error), 200)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, it holds a {type(content).__name__}")
    return content


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Writes an indented JSON file as write_text does."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: str, text: str) -> None:
    """Writes a file as write_bytes does. What is no UTF-8 becomes a sign."""
    write_bytes(path, text.encode("utf-8", errors="replace"))


def write_bytes(path: str, content: bytes) -> None:
    """Writes a file aside first: the one at path is whole at every moment.

    Of a link, what it names is written. A device, a pipe and standard output stay what they are: content is added.
    Raises OSError, and leaves nothing beside.
    """
    if (stream := _stream(path)) is not None:
        with open(stream, "wb") as file:
            file.write(content)
        return
    path = os.path.realpath(path)
    aside = f"{path}.incomplete"
    try:
        with open(aside, "wb") as file:
            file.write(content)
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            os.unlink(aside)
        raise


def _stream(path: str) -> int | None:
    """A descriptor of what cannot be replaced: standard output, or what is no regular file; else None."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    for standard in (sys.stdout, sys.stderr):
        # Not opened again: where it is a file, each descriptor of its own would write from the beginning.
        with suppress(AttributeError, OSError, ValueError):  # none, closed, or one that Python has in memory
            if os.path.samestat(found, os.fstat(standard.fileno())):
                standard.flush()
                return os.dup(standard.fileno())
    return None if stat.S_ISREG(found.st_mode) else os.open(path, os.O_WRONLY)


def holds_nothing(path: str) -> bool:
    """Whether a file has nothing in it but blanks, as `touch` and `mktemp` make them."""
    if not os.path.isfile(path) or os.path.getsize(path) > 4096:
        return False
    with open(path, "rb") as file:
        return not file.read().strip()


def check_writable(path: str) -> None:
    """Raises UserError if a file could not be written there."""
    target = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe is written into, a folder cannot be
        writable = not os.path.isdir(path) and os.access(path, os.W_OK)
    else:
        writable = bool(os.path.basename(path)) and os.access(os.path.dirname(target), os.W_OK)
    if not writable:
        raise UserError(f"{path} cannot be written: give a file in an existing folder that you may write to")


def check_new(folder: str) -> None:
    """Raises UserError if folder could not be created without touching something."""
    if not folder:
        raise UserError("the folder to create has an empty name: give one")
    try:
        free = not os.path.lexists(folder) or os.path.isdir(folder) and not os.listdir(folder)
    except OSError:  # one that cannot be looked into
        free = False
    if not free:
        raise UserError(f"{folder} exists already: remove it or give another folder")


@contextmanager
def new_folder(folder: str, *, resume: bool = False) -> Iterator[str]:
    """Gives a folder beside the wanted one to write in; when all went well it is on disk, and gets its name.

    The folder beside is `.NAME.incomplete`. What an earlier process left there, killed while it wrote, is removed;
    with resume it is kept, and what this process leaves behind when it fails is kept as well.
    Raises UserError if `folder` holds something, cannot be written, or is being written by another process.
    """
    check_new(folder)
    folder = os.path.realpath(folder)  # a link to an empty folder stays one
    aside = os.path.join(os.path.dirname(folder), f".{os.path.basename(folder)}.incomplete")
    try:
        os.makedirs(aside, exist_ok=True)
        with _locked(aside, folder):
            if not resume:
                empty(aside)
            try:
                yield aside
                to_disk(aside)
                os.rename(aside, folder)
            except BaseException:
                if not resume:
                    shutil.rmtree(aside, ignore_errors=True)
                raise
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error


@contextmanager
def _locked(aside: str, folder: str) -> Iterator[None]:
    lock = os.open(aside, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is being written by another process: wait for it, or stop it") from None
        yield
    finally:
        os.close(lock)


def empty(folder: str) -> None:
    """Removes all that is in a folder."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def to_disk(folder: str) -> None:
    """Waits until every file of the folder is on the disk: a rename must not overtake what it names."""
    for parent, _, names in os.walk(folder):
        for path in (*(os.path.join(parent, name) for name in names), parent):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
