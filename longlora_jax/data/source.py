"""Documents: text files, Python sources, rows of JSON, CSV or Parquet, or a Hugging Face dataset."""

import hashlib
import json
import logging
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import Any

from longlora_jax.data.formats import Reading, Row, read_file_rows, read_text_file, text_of, without_padding
from longlora_jax.data.packed import unpacked_name
from longlora_jax.errors import UserError
from longlora_jax.files import one_line

log = logging.getLogger(__name__)

SOURCES = ("python", "text", "hf", "jsonl", "csv", "parquet")
SUFFIXES = {
    "text": (".txt",),
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
}

# Never trained on by the shipped tiny model: long modules that every Python version has.
HELD_OUT = ("argparse.py", "difflib.py", "inspect.py", "mailbox.py", "subprocess.py", "tarfile.py")

# Installed packages are not the standard library; the others are tables of data, not programs.
SKIPPED_FOLDERS = (
    *("site-packages", "dist-packages", "__pycache__"),
    *("encodings", "pydoc_data", "lib2to3/tests/data"),
)


@dataclass(frozen=True)
class Document:
    """One whole document; its name is a path below the folder, or says the row."""

    name: str
    text: str


@dataclass(frozen=True)
class Share:
    """A share of the rows or texts (0 to 1) by a hash of each: those in it (held_out), or all the others."""

    share: float
    held_out: bool

    def has(self, value: Any) -> bool:
        """Whether a row or text is read; equal ones are read together, whatever stands around them."""
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        return (int.from_bytes(digest[:8], "big") < self.share * 2**64) == self.held_out


class Corpus:
    """A source that was found: its files, or the rows of a dataset, and what they hold.

    source, path: "python" and a folder ("" is the running interpreter's standard library); "text", "jsonl" (JSON Lines
      or JSON arrays), "csv" or "parquet" and a file, a folder (the files of that kind in it, at any depth) or a glob,
      all but Parquet also as .gz and .zst; "hf" and the name of a dataset (`name:config` where it has several), a
      folder of data files or a folder written by `save_to_disk`.
    hold_out: files never read, wherever they lie: a file name or a relative path. A held-out
      module takes its tests with it: `argparse.py` also `test_argparse.py` and `test_argparse/`.
    only: nothing but these relative paths: how a held-out set is read.
    split, streaming: of an "hf" dataset; streaming reads rows as they are needed. share: which rows or texts are read;
      None: all.
    files: what is read, in order; size: their bytes, or the rows of a dataset, None where nobody knows.
    Raises UserError for a missing folder, file or dataset.
    """

    def __init__(
        self,
        source: str,
        path: str,
        *,
        hold_out: tuple[str, ...] = (),
        only: tuple[str, ...] = (),
        split: str = "train",
        streaming: bool = False,
        share: Share | None = None,
    ):
        if source not in SOURCES:
            raise UserError(f"data source {source!r} is not known: use one of {', '.join(SOURCES)}.")
        if source != "python":
            check_path(source, path)
        self.source, self.path, self.split, self._share = source, path, split, share
        self.files: list[Path] = []
        self.size: int | None = None
        self.dataset: Any = None
        if source == "hf":
            if hold_out or only:
                raise UserError("hold_out and only name files, an hf dataset has rows: use its split.")
            self.dataset = _open_dataset(path, split, streaming)
            self.size = None if streaming else len(self.dataset)
            return
        self._root, files = _python_files(path) if source == "python" else find_files(path, SUFFIXES[source])
        self._names = _select(files, hold_out=hold_out, only=only, root=self._root)
        self.files = [self._root / name for name in self._names]
        self.size = sum(file.stat().st_size for file in self.files)

    def rows(self, reading: Reading, columns: list[str] | None = None) -> Iterator[Row]:
        """Yields the rows of JSON, CSV, Parquet or a dataset; columns: all that is wanted of Parquet."""
        columns = None if self._share else columns  # a row's hash is that of all of it
        for row in self._all_rows(reading, columns):
            if self._share is None or self._share.has(row.value):
                yield row

    def _all_rows(self, reading: Reading, columns: list[str] | None) -> Iterator[Row]:
        if self.source == "hf":
            yield from _dataset_rows(self.dataset, f"{self.path}/{self.split}", reading)
        for file in self.files:
            yield from read_file_rows(file, reading, columns)

    def documents(self, reading: Reading, text_key: str = "text") -> Iterator[Document]:
        """Yields the documents that are not blank, always in the same order.

        text_key: the column of rows that holds the text.
        Raises UserError for what cannot be read (see Reading) and for an empty corpus.
        """
        empty = True
        for name, text in self._texts(reading, text_key):
            if text is not None and text.strip():
                empty = False
                yield Document(name, text)
        if empty:
            left_out = f", {reading.skipped:,} rows of it are left out as bad" if reading.skipped else ""
            raise UserError(f"the corpus {self.path or self.source!r} has no text{left_out}: name another one.")

    def _texts(self, reading: Reading, text_key: str) -> Iterator[tuple[str, str | None]]:
        if self.source not in ("python", "text"):
            known = self.dataset.column_names if self.source == "hf" else None  # None: of a stream, nobody knows
            if known and text_key not in known:
                known = one_line(", ".join(known), 300)
                raise UserError(
                    f"the dataset {self.path!r} has no column {text_key!r}: set text_key to one of {known}."
                )
            for row in self.rows(reading, [text_key]):
                yield row.where, text_of(row, text_key, reading)
            return
        for name, file in zip(self._names, self.files, strict=True):
            if self.source == "text":
                text = read_text_file(file, reading)
            else:
                reading.position += file.stat().st_size
                text = read_python(file)
            if text is not None and (self._share is None or self._share.has(text)):
                yield name, text


def read_documents(
    source: str,
    path: str,
    *,
    hold_out: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    text_key: str = "text",
    split: str = "train",
    streaming: bool = False,
    reading: Reading | None = None,
) -> Iterator[Document]:
    """Yields the documents of a corpus that are not blank, always in the same order: see Corpus."""
    corpus = Corpus(source, path, hold_out=hold_out, only=only, split=split, streaming=streaming)
    yield from corpus.documents(reading or Reading(), text_key)


def read_rows(
    path: str,
    *,
    source: str = "jsonl",
    split: str = "train",
    streaming: bool = False,
    reading: Reading | None = None,
) -> Iterator[Row]:
    """Yields the rows of JSON Lines, JSON arrays, Parquet or a dataset, each with its file and line: see Corpus."""
    if source in ("python", "text"):
        raise UserError(f"data source {source!r} has no rows: use jsonl, parquet or hf.")
    yield from Corpus(source, path, split=split, streaming=streaming).rows(reading or Reading())


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


def check_path(source: str, path: str) -> None:
    """Raises UserError for an empty path, which would mean the folder that a command was started in."""
    if not path:
        raise UserError(f"data source {source!r} has no path: name a file, a folder or a glob, for hf a dataset")


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
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]  # not walked at all: they may be large
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return root, [name for name in sorted(names) if not _is_skipped(name)]


def _is_skipped(name: str) -> bool:
    # _sysconfigdata is the build machine's settings: it differs everywhere and teaches nothing.
    if PurePosixPath(name).name.startswith("_sysconfigdata"):
        return True
    return any(f"/{folder}/" in f"/{name}" for folder in SKIPPED_FOLDERS)


def find_files(path: str, suffixes: tuple[str, ...]) -> tuple[Path, list[str]]:
    """Returns a folder and the paths below it that `path` means: a file, the files of a folder by suffix, a glob."""
    if Path(path).is_file():
        return Path(path).parent, [Path(path).name]
    if Path(path).is_dir():
        root, pattern, wanted = Path(path), "**/*", suffixes
    elif has_magic(path):
        fixed = []
        for part in Path(path).parts:
            if has_magic(part):
                break
            fixed.append(part)
        root, wanted = Path(*fixed), ("",)
        pattern = Path(path).relative_to(root).as_posix()
    else:
        raise UserError(f"{path!r} does not exist: name a file, a folder or a glob of *{suffixes[0]}.")
    names = (PurePosixPath(name).as_posix() for name in glob(pattern, root_dir=root, recursive=True))
    files = sorted(name for name in names if unpacked_name(name).endswith(wanted) and (root / name).is_file())
    if not files:
        raise UserError(f"no file matches {path!r}: name a file, a folder or a glob of *{suffixes[0]}.")
    return root, files


def _open_dataset(path: str, split: str, streaming: bool) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("source 'hf' needs the package datasets: pip install datasets.") from error
    try:
        if any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json")):
            rows: Any = _part_of(datasets.load_from_disk(path), path, split)
        else:
            name, _, config = (path, "", "") if Path(path).exists() else path.partition(":")
            return datasets.load_dataset(name, config or None, split=split, streaming=streaming)
        return rows.to_iterable_dataset() if streaming else rows
    except UserError:
        raise
    except Exception as error:  # hub, network, parser and split faults have no common base class
        advice = "name a dataset that can be reached, or a local folder."
        if "scripts are no longer supported" in (said := _first_line(error)):
            advice = (
                f"download it (hf download --repo-type dataset {path.partition(':')[0]} --local-dir DIR) and read its "
                "files with data.source=jsonl or parquet and data.path=DIR"
            )
        raise UserError(f"the dataset {path!r}, split {split!r}, cannot be read: {said}; {advice}") from error


def _part_of(saved: Any, path: str, split: str) -> Any:
    """The rows of a split ("train[:4]", "train+test") of what save_to_disk has written."""
    import datasets

    if not isinstance(saved, dict):
        # A dataset that was never part of several has no name of its own: it is called by the default.
        saved = {str(saved.split) if saved.split else "train": saved}
    sizes = {name: len(rows) for name, rows in saved.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except Exception as error:  # of names, of slices and of their syntax
        raise UserError(
            f"the dataset {path!r} has no split {split!r}, it has {', '.join(sizes)} (of which train[:4] is a part): "
            "set split to one of them"
        ) from error
    found = [saved[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return found[0] if len(found) == 1 else datasets.concatenate_datasets(found)


def _dataset_rows(rows: Any, name: str, reading: Reading) -> Iterator[Row]:
    try:
        for row in rows:
            reading.position += 1
            yield Row(f"{name}/{reading.position - 1}", {key: without_padding(value) for key, value in row.items()})
    except Exception as error:  # streamed rows bring faults of the network, of parsers and of decoders
        raise UserError(
            f"the dataset {name} cannot be read after row {reading.position}: {_first_line(error)}."
        ) from error


def _first_line(error: Exception) -> str:
    return one_line((str(error).strip().splitlines() or [type(error).__name__])[0], 300)
