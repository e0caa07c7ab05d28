"""The text model of Gemma 3 4B to a window of 262,144 tokens.

Command:   python train.py --config configs/gemma3_4b_256k.py --workdir runs/gemma3_4b_256k --config.init_from=DIR
           DIR is a local folder of the text model alone (model_type gemma3_text).
           Its data, once downloaded (README.md): --config.data.source=jsonl --config.data.path=redpajama
Hardware:  8 chips of TPU v5e: 10.0 of 15.75 GiB a device, compiled, the sequence cut over them:
           --config.mesh.fsdp=1 --config.mesh.context=8 --config.accumulation=64 --config.remat=offload
Expected:  no figure is quoted: nobody has published this extension.
"""

from longlora_jax.config import Config
from longlora_jax.presets import gemma3_4b, longlora


def get_config() -> Config:
    """The paper's recipe at 262,144 tokens: full layers in groups of 65,536 and interpolated by 16, windows kept."""
    return longlora(gemma3_4b(), init_from="google/gemma-3-4b-pt", seq_len=262_144)
