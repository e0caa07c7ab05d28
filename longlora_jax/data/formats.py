"""Rows and texts out of files: JSON Lines, JSON, CSV, Parquet and plain text, as they are or packed by gzip or zstd.

Files are read as they are needed, and no row or text of more than ROW_LIMIT bytes is held.
"""

import csv
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from longlora_jax.data.packed import CHUNK, LIMIT, Damaged, open_bytes, unpacked_name
from longlora_jax.errors import UserError
from longlora_jax.files import TOO_DEEP, check_depth, load_json, one_line

log = logging.getLogger(__name__)

ROW_LIMIT = LIMIT  # bytes of one row, or of one text; the tokenizers library takes about 25 times that
SHOWN = 10  # rows left out that are named one by one

_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # where JSON can spell half a surrogate pair, which is no text


@dataclass(frozen=True)
class Row:
    """One row of data and where it stands, for whoever must mend it."""

    where: str
    value: dict[str, Any]


def without_padding(value: Any) -> Any:
    """A value of an Arrow table without the fields of structs that are null: Arrow gives every struct of a column all
    the fields that any of them has, so that a call of one tool would have the arguments of all tools."""
    if isinstance(value, dict):
        return {name: without_padding(item) for name, item in value.items() if item is not None}
    return [without_padding(item) for item in value] if isinstance(value, list) else value


class Reading:
    """One pass over a corpus: how far it is, and what it does about rows that cannot be used.

    on_bad_row: "stop" raises UserError at the first, "skip" leaves them out, counts them and names the first.
    position: bytes of files (as they lie on the disk) or rows of a dataset behind it.
    """

    def __init__(self, on_bad_row: str = "stop"):
        assert on_bad_row in ("stop", "skip")
        self.on_bad_row = on_bad_row
        self.position = 0
        self.skipped = 0

    def at(self) -> Callable[[int], None]:
        """What to call with each new position in a file that begins where the reading is."""
        start = self.position

        def moved(offset: int) -> None:
            self.position = start + offset

        return moved

    def bad(self, where: str, fault: str) -> None:
        """Takes note of a row that cannot be used: where it stands, and what is wrong with it."""
        if self.on_bad_row == "stop":
            raise UserError(f"{where}: {fault}; mend it, or leave such rows out with on_bad_row=skip")
        self.skipped += 1
        if self.skipped <= SHOWN:
            log.warning("left out %s: %s", where, fault)
        if self.skipped == SHOWN:
            log.warning("further rows that are left out are only counted")


def read_text_file(path: str | os.PathLike[str], reading: Reading) -> str | None:
    """Returns the text of one UTF-8 file exactly as it is, line ends included; None where it is left out."""
    try:
        with open_bytes(path, reading.at()) as stream:
            content = stream.read(ROW_LIMIT + 1)
    except Damaged as error:
        return reading.bad(str(path), str(error))
    if len(content) > ROW_LIMIT:
        return reading.bad(str(path), f"one text of more than {ROW_LIMIT:,} bytes, split it")
    if 100 * content.count(0) > len(content):  # a stray one is no reason: manuals have some
        return reading.bad(str(path), f"not text but binary or UTF-16 ({content.count(0):,} zero bytes)")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        return reading.bad(str(path), f"{_not_utf8(error)}, convert it, for example with iconv")


def read_file_rows(path: str | os.PathLike[str], reading: Reading, columns: list[str] | None = None) -> Iterator[Row]:
    """Yields the rows of one file: Parquet, CSV (.csv, .tsv: the first line names columns), a JSON array, JSON with the
    rows under "data", or JSON Lines, by its name and how it begins.

    columns: all that is wanted of a Parquet file; None: everything.
    """
    name = os.fspath(path)
    if name.endswith(".parquet"):
        yield from _parquet_rows(name, reading, columns)
        return
    try:
        with open_bytes(name, reading.at()) as stream:
            plain, begins = unpacked_name(name), stream.peek(CHUNK).lstrip(b"\xef\xbb\xbf \t\r\n")[:CHUNK]
            if plain.endswith((".csv", ".tsv")):
                yield from _csv_rows(stream, name, reading, "," if plain.endswith(".csv") else "\t")
            elif plain.endswith(".json") and begins[:1] == b"[":
                yield from _array_rows(stream, name, reading)
            elif plain.endswith(".json") and _is_one_object(begins):
                yield from _array_rows(stream, name, reading, wrapped=True)
            else:
                yield from _line_rows(stream, name, reading)
    except Damaged as error:
        reading.bad(name, f"{error}, the rest of the file cannot be read")


def text_of(row: Row, key: str, reading: Reading) -> str | None:
    """The text of a row; None where it has none or is left out."""
    if key not in row.value:
        fields = ", ".join(map(str, row.value)) or "none"
        return reading.bad(row.where, one_line(f"no field {key!r}, set text_key to one of {fields}", 300))
    text = row.value[key]
    if isinstance(text, str) and len(text) > ROW_LIMIT:
        return reading.bad(row.where, f"a text of more than {ROW_LIMIT:,} characters, split it")
    if text is None or isinstance(text, str):
        return text
    return reading.bad(row.where, f"no text but {_kind(text)} in the field {key!r}")


def _line_rows(stream: io.BufferedReader, name: str, reading: Reading) -> Iterator[Row]:
    number = 0
    while line := stream.readline(ROW_LIMIT + 1):
        number += 1
        where = f"{name}, line {number}"
        if len(line) > ROW_LIMIT:
            while line and not line.endswith(b"\n"):
                line = stream.readline(ROW_LIMIT)
            reading.bad(where, f"a row of more than {ROW_LIMIT:,} bytes")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            value = load_json(text := line.decode("utf-8"))
        except UnicodeDecodeError as error:
            reading.bad(where, _not_utf8(error))
        except ValueError as error:
            reading.bad(where, f"not JSON ({one_line(str(error), 200)})")
        else:
            if row := _checked(where, value, text, reading):
                yield row


def _is_one_object(begins: bytes) -> bool:
    """Whether a .json file is one object, and not an object a line: by how it begins."""
    line = begins.split(b"\n", 1)[0].strip()
    # A line that is a whole object is a row of JSON Lines, unless it is one around rows.
    around = re.match(rb'\{\s*("\w+"\s*:\s*("[^"\\]*"|[\w.+-]+|\{[^{}]*\})\s*,\s*)*"data"\s*:\s*\[\s*[\[{\]]', begins)
    return begins[:1] == b"{" and (around is not None or line in (b"{", b"{}"))


def _csv_rows(stream: io.BufferedReader, name: str, reading: Reading, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(ROW_LIMIT)
    table = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    try:
        for row in table:
            where = f"{name}, line {table.line_num}"
            if None in row or None in row.values():
                reading.bad(where, f"another number of columns than the first line's {len(table.fieldnames or ())}")
                continue
            yield Row(where, row)
    except UnicodeDecodeError as error:
        reading.bad(f"{name}, after line {table.line_num}", f"{_not_utf8(error)}, the rest of the file cannot be read")
    except csv.Error as error:
        fault = f"not CSV ({one_line(str(error), 200)}), the rest of the file cannot be read"
        reading.bad(f"{name}, line {table.line_num}", fault)


def _array_rows(stream: io.BufferedReader, name: str, reading: Reading, wrapped: bool = False) -> Iterator[Row]:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    window = _Window(text)
    number = 0
    try:
        if wrapped:
            _go_to_data(window)
        window.take("[")
        while not (window.next() == "]" and not number):
            number += 1
            line = window.line
            window.next()
            value, spelled = window.value()
            if row := _checked(f"{name}, item {number} (line {line})", value, spelled, reading):
                yield row
            if window.next() != ",":
                break
            window.take(",")
        window.take("]")
        while wrapped and window.next() == ",":  # what else the object says is not of rows
            window.take(",")
            _take_key(window)
            window.next()
            window.value()
        if wrapped:
            window.take("}")
        if window.next():
            raise ValueError("text after the end of the " + ("object" if wrapped else "array"))
    except UnicodeDecodeError as error:
        reading.bad(f"{name}, after line {window.line}", f"{_not_utf8(error)}, the rest of the file cannot be read")
    except UserError:  # a ValueError as well
        raise
    except ValueError as error:
        fault = f"not JSON ({one_line(str(error), 200)}), the rest of the file cannot be read"
        reading.bad(f"{name}, line {window.line}", fault)


def _go_to_data(window: "_Window") -> None:
    """Goes over the beginning of an object, up to the value of "data". Raises ValueError if it has none."""
    window.take("{")
    while window.next() == '"' and _take_key(window) != "data":
        window.next()
        window.value()
        if window.next() != ",":
            break
        window.take(",")
    if window.next() != "[":
        raise ValueError('one object, without rows under "data": give a list of rows, or a row a line')


def _take_key(window: "_Window") -> Any:
    window.next()
    key, _ = window.value()
    window.take(":")
    return key


class _Window:
    """The part of a long JSON text that is being looked at: characters, and the line that they begin in."""

    def __init__(self, text: io.TextIOWrapper):
        self._text, self._buffer, self._at, self._ended = text, "", 0, False
        self._decoder = json.JSONDecoder()
        self.line = 1

    def next(self) -> str:
        """The next character that is no blank; "" at the end."""
        while True:
            while self._at < len(self._buffer):
                if (character := self._buffer[self._at]) not in " \t\r\n":
                    return character
                self._move(self._at + 1)
            if not self._more():
                return ""

    def take(self, wanted: str) -> None:
        """Goes over one character; raises ValueError if it is another one."""
        if (found := self.next()) != wanted:
            raise ValueError(f"{wanted!r} expected, found {found!r}" if found else f"it ends before {wanted!r}")
        self._move(self._at + 1)

    def value(self) -> tuple[Any, str]:
        """Goes over one JSON value; returns it, and how it is spelled."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
                if end < len(self._buffer) or not self._more():
                    spelled = self._buffer[self._at : end]
                    self._move(end)
                    return check_depth(value, spelled), spelled
            except RecursionError:
                raise ValueError(TOO_DEEP) from None
            except json.JSONDecodeError as error:
                # A value that is not read to its end looks broken at its end, or in its last string.
                open_end = error.msg.startswith("Unterminated") or error.pos > len(self._buffer) - 16
                if not open_end or not self._more():
                    self._move(error.pos)
                    raise ValueError(error.msg) from None

    def _move(self, to: int) -> None:
        self.line += self._buffer.count("\n", self._at, to)
        self._at = to

    def _more(self) -> bool:
        rest = self._buffer[self._at :]
        if len(rest) > ROW_LIMIT:
            raise ValueError(f"an item of more than {ROW_LIMIT:,} characters")
        read = self._text.read(max(CHUNK, len(rest)))
        self._buffer, self._at = rest + read, 0
        return bool(read)


def _parquet_rows(path: str, reading: Reading, columns: list[str] | None) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs the package pyarrow: pip install pyarrow") from None
    moved, size = reading.at(), os.path.getsize(path)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if missing := set(columns or ()) - set(names):
                fields = one_line(", ".join(names), 300)
                raise UserError(f"{path} has no column {', '.join(missing)}: set text_key to one of {fields}.")
            rows = file.metadata.num_rows
            for batch in file.iter_batches(8, columns=columns, use_threads=False):
                for index in range(batch.num_rows):
                    number += 1
                    moved(size * number // rows)
                    where = f"{path}, row {number}"
                    if batch.slice(index, 1).nbytes > ROW_LIMIT:
                        reading.bad(where, f"a row of more than {ROW_LIMIT:,} bytes")
                        continue
                    try:
                        row = {name: without_padding(batch[name][index].as_py()) for name in batch.schema.names}
                        yield Row(where, row)
                    except UnicodeDecodeError as error:
                        reading.bad(where, _not_utf8(error))
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reading.bad(f"{path}, after row {number}", f"not Parquet that can be read ({one_line(str(error), 200)})")
    moved(size)


def _checked(where: str, value: Any, spelled: str, reading: Reading) -> Row | None:
    if not isinstance(value, dict):
        return reading.bad(where, f"{_kind(value)} where a JSON object is needed")
    if _HALF_PAIR.search(spelled):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return reading.bad(where, "half a surrogate pair, which is no character")
    return Row(where, value)


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start:,}"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")
