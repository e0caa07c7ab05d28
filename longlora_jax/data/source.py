"""Documents: text files, the sources of Python's standard library, or a Hugging Face dataset."""

import logging
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path, PurePosixPath

from longlora_jax.errors import UserError

log = logging.getLogger(__name__)

SOURCES = ("python", "text", "hf")

# Never trained on by the shipped tiny model: long modules that every Python version has.
HELD_OUT = ("argparse.py", "difflib.py", "inspect.py", "mailbox.py", "subprocess.py", "tarfile.py")

# Installed packages are not the standard library; the others are tables of data, not programs.
SKIPPED_FOLDERS = (
    *("site-packages", "dist-packages", "__pycache__"),
    *("encodings", "pydoc_data", "lib2to3/tests/data"),
)


@dataclass(frozen=True)
class Document:
    """One whole document; its name is a path below the folder, or dataset, split and row."""

    name: str
    text: str


def read_documents(
    source: str,
    path: str,
    *,
    hold_out: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    text_key: str = "text",
    split: str = "train",
) -> Iterator[Document]:
    """Yields the documents of a corpus that are not blank, always in the same order.

    source, path: "python" and a folder ("" is the running interpreter's standard library);
      "text" and a file, a folder (its *.txt, at any depth) or a glob; "hf" and the name of a
      dataset, a folder of data files or a folder written by `save_to_disk`.
    hold_out: files never read, wherever they lie: a file name or a relative path. A held-out
      module takes its tests with it: `argparse.py` also `test_argparse.py` and `test_argparse/`.
    only: nothing but these relative paths: how a held-out set is read.
    text_key, split: the column and the split of an "hf" dataset.
    Raises UserError for a missing folder or file, for text that is not UTF-8, for an empty corpus.
    """
    if source not in SOURCES:
        raise UserError(f"data source {source!r} is not known: use one of {', '.join(SOURCES)}.")
    if source == "hf":
        if hold_out or only:
            raise UserError("hold_out and only name files, an hf dataset has rows: use its split.")
        documents = _rows(path, text_key, split)
    else:
        root, files = _python_files(path) if source == "python" else _text_files(path)
        read = read_python if source == "python" else read_text
        names = _select(files, hold_out=hold_out, only=only, root=root)
        documents = ((name, read(root / name)) for name in names)
    empty = True
    for name, text in documents:
        if text is not None and text.strip():
            empty = False
            yield Document(name, text)
    if empty:
        raise UserError(f"the corpus {path or source!r} has no text: name another one.")


def read_text(path: str | os.PathLike[str]) -> str:
    """Returns the text of one UTF-8 file exactly as it is, line ends included."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a text file.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}; "
            "convert it, for example with iconv, or leave the file out."
        ) from error


def read_python(path: str | os.PathLike[str]) -> str | None:
    """Returns a Python source in the encoding it declares, or None where that cannot be decoded."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        # The standard library tests its own decoder on such files.
        log.info("skipped %s: it is not in the encoding that it declares", path)
        return None


def standard_library() -> str:
    """Returns the folder of the running interpreter's standard library."""
    return sysconfig.get_path("stdlib")


def is_held_out(name: str, hold_out: tuple[str, ...]) -> bool:
    """Says whether a relative path is one of the held-out files, or a test of one."""
    path = PurePosixPath(name)
    for held in map(PurePosixPath, hold_out):
        if path.parts[-len(held.parts) :] == held.parts:
            return True
        test = f"test_{held.stem}"
        if held.suffix == ".py" and (path.name == f"{test}.py" or test in path.parts[:-1]):
            return True
    return False


def _select(names: list[str], *, hold_out: tuple[str, ...], only: tuple[str, ...], root: Path) -> list[str]:
    if only:
        if missing := sorted(set(only) - set(names)):
            raise UserError(f"{root} has no {', '.join(missing)}: `only` wants paths below it.")
        names = [name for name in names if name in only]
    for held in hold_out:
        if not any(is_held_out(name, (held,)) for name in names):
            log.warning("nothing in %s is held out by %s: is it spelled right?", root, held)
    return [name for name in names if not is_held_out(name, hold_out)]


def _python_files(path: str) -> tuple[Path, list[str]]:
    root = Path(path or standard_library())
    if not root.is_dir():
        raise UserError(f"the folder {root} does not exist: name a folder of Python sources.")
    names = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py"))
    return root, [name for name in names if not _is_skipped(name)]


def _is_skipped(name: str) -> bool:
    # _sysconfigdata is the build machine's settings: it differs everywhere and teaches nothing.
    if PurePosixPath(name).name.startswith("_sysconfigdata"):
        return True
    return any(f"/{folder}/" in f"/{name}" for folder in SKIPPED_FOLDERS)


def _text_files(path: str) -> tuple[Path, list[str]]:
    if Path(path).is_file():
        return Path(path).parent, [Path(path).name]
    if Path(path).is_dir():
        root, pattern = Path(path), "**/*.txt"
    elif has_magic(path):
        fixed = []
        for part in Path(path).parts:
            if has_magic(part):
                break
            fixed.append(part)
        root = Path(*fixed)
        pattern = Path(path).relative_to(root).as_posix()
    else:
        raise UserError(f"{path!r} does not exist: name a text file, a folder of *.txt or a glob.")
    names = (name for name in glob(pattern, root_dir=root, recursive=True))
    files = sorted(PurePosixPath(name).as_posix() for name in names if (root / name).is_file())
    if not files:
        raise UserError(f"no file matches {path!r}: name a text file, a folder of *.txt or a glob.")
    return root, files


def _rows(path: str, text_key: str, split: str) -> Iterator[tuple[str, str]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError("source 'hf' needs the package datasets: pip install datasets.") from error
    try:
        if (Path(path) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(path)[split]
        elif (Path(path) / "state.json").is_file():
            rows = datasets.load_from_disk(path)
        else:
            rows = datasets.load_dataset(path, split=split)
    except Exception as error:  # hub, network, parser and split faults have no common base class
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"the dataset {path!r}, split {split!r}, cannot be read: {reason[0]}; "
            "name a dataset that can be reached, or a local folder."
        ) from error
    assert isinstance(rows, datasets.Dataset)  # one split of it, not streamed: its rows are dicts
    if text_key not in rows.column_names:
        raise UserError(
            f"the dataset {path!r} has no column {text_key!r}: set text_key to one of {', '.join(rows.column_names)}."
        )
    for index, row in enumerate(rows):
        yield f"{path}/{split}/{index}", row[text_key]  # pyright: ignore[reportCallIssue, reportArgumentType]
