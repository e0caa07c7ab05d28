"""The config of a run, as train.py reads it from a file, and as it has written it into a workdir."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence

from absl import flags
from ml_collections import config_flags

from longlora_jax.config import Config
from longlora_jax.errors import UserError
from longlora_jax.fields import from_dict
from longlora_jax.files import read_json


@contextlib.contextmanager
def without_bytecode() -> Iterator[None]:
    """Within it Python keeps no bytecode of what is imported.

    Of a config file that was written twice in a second, with another number of the same length, Python would take the
    bytecode of the first for that of the second: it compares times in seconds, and sizes.
    """
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def read_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """The Config of a file with get_config(), changed by flags such as --config.seq_len=4096.

    Raises UserError if the file cannot be read or a flag does not fit.
    """
    values, words = flags.FlagValues(), ["", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=words)
    try:
        with without_bytecode():
            values(words)
            config = values["config"].value
            _ = getattr(config, "seq_len", None)  # a file that could not be read says so here
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        fault = " ".join(str(error.args[0] if error.args else error).split())
        raise UserError(fault.split("earlier failure to load: ")[-1]) from error
    if not isinstance(config, Config):
        raise UserError(f"get_config() of {path} gives a {type(config).__name__}: return a Config")
    return config


def read_run_config(workdir: str) -> Config:
    """The resolved config of a workdir."""
    values = read_json(os.path.join(workdir, "config.json"))
    values.pop("base_fingerprint", None)
    return from_dict(Config, values)


def with_base_of(config: Config, workdir: str) -> Config:
    """The config with the base model and the tokenizer of a workdir, where it does not say them itself."""
    earlier = read_run_config(workdir)
    tokenizer = config.data.tokenizer or config.init_from or earlier.data.tokenizer
    return dataclasses.replace(
        config,
        init_from=config.init_from or earlier.init_from,
        model=config.model or (None if earlier.init_from else earlier.model),
        data=dataclasses.replace(config.data, tokenizer=tokenizer),
    )
