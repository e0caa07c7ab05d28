"""Files that are read whole and folders that are written whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from longlora_jax.errors import UserError


def read_json(path: str) -> dict[str, Any]:
    """Reads a file that holds one JSON object; raises UserError if it does not."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, it holds a {type(content).__name__}")
    return content


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Writes an indented JSON file, aside first: the file at path is whole at every moment."""
    aside = f"{path}.incomplete"
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    os.replace(aside, path)


def check_new(folder: str) -> None:
    """Raises UserError if folder could not be created without touching something."""
    if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise UserError(f"{folder} exists already: remove it or give another folder")


@contextmanager
def new_folder(folder: str) -> Iterator[str]:
    """Gives a folder beside the wanted one to write in, and renames it when all went well."""
    check_new(folder)
    folder = os.path.abspath(folder)
    aside = os.path.join(os.path.dirname(folder), f".{os.path.basename(folder)}.{os.getpid()}")
    try:
        os.makedirs(aside)
        yield aside
        os.rename(aside, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
