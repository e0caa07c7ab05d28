"""Names of the Hugging Face hub: a model there becomes a folder here."""

import logging
import os
import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from longlora_jax.errors import UserError

_log = logging.getLogger(__name__)

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@.+)?", re.ASCII)
_ALWAYS = ["*.json", "*.model", "*.txt", "*.jinja", "trainable_params.bin"]
_SAFETENSORS, _BIN = ["*.safetensors"], ["pytorch_model*.bin*", "adapter_model.bin"]
# Inner folders hold other formats (original/, onnx/) and old steps; consolidated* is a second copy of the weights.
_NEVER = ["*/*", "consolidated*"]
_PATIENCE_SECONDS = 10


def is_name(name: str) -> bool:
    """Whether a model of the hub can be called so: "org/name" or "org/name@revision"."""
    return bool(_NAME.fullmatch(name))


def local_folder(name: str, *, what: str = "a Hugging Face folder") -> str:
    """The folder on this machine that holds a model: name itself if it is one, else a model of the hub, fetched.

    name: a path, or "org/name" or "org/name@revision" of the hub. A single word ("gpt2") is a path, though the hub has
    such names. what: what a path must lead to, for the message.
    Configuration, tokenizer and weights go into huggingface_hub's cache, .bin weights only where there are no
    safetensors; files that are there already are not fetched again. Where the hub fails or refuses, a whole copy in the
    cache does. Raises UserError.
    """
    if os.path.isdir(name):
        return name
    no_folder = f"{name} is not a folder: give {what}, or a name of the hub such as org/name"
    if os.path.exists(name) or not is_name(name):
        raise UserError(no_folder)
    from huggingface_hub.errors import HFValidationError

    repo, _, revision = name.partition("@")
    try:
        with _bars_only() as bar:
            return _fetch(repo, revision or None, bar)
    except HFValidationError as error:
        raise UserError(no_folder) from error
    except Exception as error:  # huggingface_hub lets the errors of its HTTP and Xet clients through
        raise UserError(_fault(name, error)) from error


def _fetch(repo: str, revision: str | None, bar: type) -> str:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    def snapshot(weights: list[str], **options: Any) -> str:
        others = _BIN if weights is _SAFETENSORS else []
        options |= {"allow_patterns": _ALWAYS + weights, "ignore_patterns": _NEVER + others, "tqdm_class": bar}
        return snapshot_download(repo, revision=revision, **options)

    def has(files: Iterable[str], weights: list[str]) -> bool:
        return any(filter_repo_objects(files, allow_patterns=weights, ignore_patterns=_NEVER))

    try:
        # snapshot_download asks the same without a time limit: behind a firewall it would hang.
        info = HfApi().model_info(repo, revision=revision, timeout=_PATIENCE_SECONDS)
    except Exception as error:
        for weights in (_SAFETENSORS, _BIN):
            try:
                folder = snapshot(weights, local_files_only=True)
            except LocalEntryNotFoundError:
                break
            if has(os.listdir(folder), weights):
                _log.info("%s comes from the cache, the hub did not give it (%s)", repo, _reason(error))
                return folder
        raise
    files = [file.rfilename for file in info.siblings or []]
    return snapshot(_SAFETENSORS if has(files, _SAFETENSORS) else _BIN)


def _fault(name: str, error: BaseException) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    repo, _, revision = name.partition("@")
    reason = _reason(error)
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision} on the hub: give a branch, a tag or a commit after the @"
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        return f"{name} is no folder and not on the hub: correct the name, or `hf auth login` if it is private"
    if status in (401, 403):
        return f"the hub refuses {name} ({reason}): `hf auth login`, and accept the licence on the model's page"
    if isinstance(error, OSError) and error.errno:
        return f"{name} cannot be stored in {constants.HF_HUB_CACHE} ({reason}): make room or set HF_HUB_CACHE"
    command = f"hf download {repo}{f' --revision {revision}' if revision else ''} --local-dir DIR"
    problem = "the hub failed" if status else "the hub was not reached"
    return f"{name} is no folder and {problem} ({reason}): fetch it elsewhere with `{command}` and give DIR"


def _reason(error: BaseException) -> str:
    """An error in a few words, without the addresses in those of huggingface_hub, which may be signed."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    text = f"{type(error).__name__}: {error}"
    if isinstance(error, HfHubHTTPError):
        said = f": {error.server_message}" if error.server_message else ""
        text = f"{error.response.status_code} {error.response.reason_phrase}{said}"
    elif isinstance(error, OfflineModeIsEnabled):
        text = "HF_HUB_OFFLINE is set"
    return textwrap.shorten(text, 160)


@contextmanager
def _bars_only() -> Iterator[type]:
    """Gives a class of progress bars. huggingface_hub writes nothing else meanwhile, and leaves no bar open."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils import tqdm

    bars: list[tqdm] = []

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            bars.append(self)

    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield Bar
    finally:
        hub_logging.set_verbosity(level)
        for bar in bars:
            bar.close()
