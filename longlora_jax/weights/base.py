"""How a run keeps the matrices of its base: as its config asks for, or as the folder has them; what it exports."""

import logging

from longlora_jax.config import Config
from longlora_jax.config_file import read_run_config
from longlora_jax.errors import UserError
from longlora_jax.weights import bnb
from longlora_jax.weights.hf_config import is_quantized
from longlora_jax.weights.load import open_model
from longlora_jax.weights.workdir import split_step

log = logging.getLogger(__name__)


def kept_as(config: Config) -> str:
    """The base_quantization of a run whose model and init_from (a folder) are known.

    Raises UserError where the folder is quantized and the config asks for something else, or trains all of it.
    """
    assert config.model is not None
    wanted, folder = config.base_quantization, config.init_from
    if not is_quantized(folder) and not wanted.startswith("fp4"):
        return wanted
    table = open_model(folder).table
    found, _ = bnb.of_table(config.model, table)
    if found and config.mode == "full":
        raise UserError(
            f"{folder} is quantized ({found}): codes have no gradient, and mode='full' trains every weight; set mode "
            "to longlora or lora, or dequantize it first (convert_weights.py from-hf)"
        )
    kept = bnb.name_of(bnb.agreed(config.model, table, wanted, folder))
    if wanted == "none" and found:
        how = "stay so" if kept != "none" else "are dequantized: not all of them, or in blocks of another size than 64"
        log.info("%s is quantized (%s): its matrices %s", folder, found, how)
    return kept


def merged_into(workdir: str, base: str | None = None) -> str:
    """What the adapters of a run over a packed base are merged into, in a line; "" for every other model.

    workdir: that of the run, "" if there is none; base: where its base lies by now.
    """
    if not workdir:
        return ""
    config = read_run_config(split_step(workdir)[0])
    kept, folder = config.base_quantization, base or config.init_from
    if kept == "none" or config.mode == "full":
        return ""
    if is_quantized(folder):
        return f"merged into {folder} dequantized, as it is quantized ({kept}) on the disk"
    return f"merged into {folder} in its own dtype; in training its matrices were in {kept}"
