"""The config file of a run, read as train.py reads it: for commands that are not train.py."""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from longlora_jax.config import Config
from longlora_jax.errors import UserError


def read_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """The Config of a file with get_config(), changed by flags such as --config.seq_len=4096.

    Raises UserError if the file cannot be read or a flag does not fit.
    """
    values, words = flags.FlagValues(), ["", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=words)
    try:
        values(words)
        config = values["config"].value
        _ = getattr(config, "seq_len", None)  # a file that could not be read says so here
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        fault = " ".join(str(error.args[0] if error.args else error).split())
        raise UserError(fault.split("earlier failure to load: ")[-1]) from error
    if not isinstance(config, Config):
        raise UserError(f"get_config() of {path} gives a {type(config).__name__}: return a Config")
    return config
