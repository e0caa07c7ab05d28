"""LLaMA-2 70B to a window of 32,768 tokens on one host of TPU v5e: the paper's recipe over a base in four bits.

Command:   python train.py --config configs/70b_32k_nf4.py --workdir runs/70b_32k_nf4 --config.init_from=DIR
           DIR is a local folder of meta-llama/Llama-2-70b-hf (safetensors), or one that bitsandbytes quantized.
           Its data, once downloaded (README.md): --config.data.source=jsonl --config.data.path=redpajama
Hardware:  8 chips of TPU v5e (v5e:2x4), the sequence cut over them, one row at a time, the blocks' inputs in the host's
           memory: 9.5 of 15.75 GiB a chip, compiled, of which 4.5 are the base. --config.remat=block needs about 4.5
           more.
Expected:  not run. The unquantized base needs 4 chips of v5p (configs/70b_32k.py).
"""

import dataclasses

from longlora_jax.config import Config, MeshConfig
from longlora_jax.presets import llama2_70b, longlora


def get_config() -> Config:
    """The paper's recipe at 32,768 tokens, its frozen matrices in NF4."""
    config = longlora(llama2_70b(), init_from="meta-llama/Llama-2-70b-hf", seq_len=32_768, learning_rate=1e-5)
    less = {"base_quantization": "nf4", "remat": "offload", "mesh": MeshConfig(fsdp=1, context=8)}
    return dataclasses.replace(config, accumulation=64, **less)
