"""A document that somebody brings: a file of text, or the text of a PDF."""

import logging
from pathlib import Path
from typing import NamedTuple

from longlora_jax.errors import UserError
from longlora_jax.files import one_line

SUFFIXES = (".txt", ".md", ".pdf")


class Document(NamedTuple):
    """A document: its name, its text, and what a reader should know of it ("" if nothing)."""

    name: str
    text: str
    note: str = ""


def read_document(path: str) -> Document:
    """Reads a UTF-8 text or a PDF, which is known by how it begins and not by its name.

    Raises UserError for a file without text: empty, binary, in another encoding, locked, damaged, or scanned.
    """
    name = one_line(Path(path).name, 100)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}): choose another file") from error
    if content.lstrip()[:5] == b"%PDF-":
        return _read_pdf(name, path)
    if b"\0" in content:
        raise UserError(f"{name} is a binary file, not text: choose one of {', '.join(SUFFIXES)}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {content[error.start]:#04x} at offset {error.start:,}): save it as UTF-8, "
            "or choose another file"
        ) from error
    if not text.strip():
        raise UserError(f"{name} is empty: choose a file with text")
    return Document(name, text)


def _read_pdf(name: str, path: str) -> Document:
    try:
        import pypdf  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"{name} is a PDF, which needs pypdf: pip install pypdf") from error
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it tells of every odd object that it can live with
    try:
        reader = pypdf.PdfReader(path)
        locked = reader.is_encrypted and not reader.decrypt("")
        pages = [] if locked else [page.extract_text().strip() for page in reader.pages]
    except Exception as error:  # what strangers wrote may fail in any way
        reason = one_line(str(error) or type(error).__name__, 150)
        raise UserError(f"{name} cannot be read as a PDF ({reason}): save it again, or as text") from error
    if locked:
        raise UserError(f"{name} is locked by a password: save a copy without one")
    blank = sum(not page for page in pages)
    if blank == len(pages):
        raise UserError(
            f"{name} has no text on its {len(pages)} pages, as a scan has none: put it through text recognition "
            "(ocrmypdf, for example) first"
        )
    note = f"{blank} of {len(pages)} pages have no text, as scans have none" if blank else ""
    return Document(name, "\n\n".join(filter(None, pages)), note)
