"""What fits on GPUs: the train step of each row compiled for its cards, on a machine without any.

    pip install -e ".[gpu-plan]"
    python -m benchmarks.gpu_plans --json benchmarks/gpu_plans.json     (one to three minutes a row on 2 cores)

Each row is one `python -m longlora_jax.plan` in a process of its own; the command is in the result.
"""

from benchmarks.tpu_plans import plan_rows
from longlora_jax import errors

ROWS = {  # name: (config, topology, devices on the context axis, further changes), as in benchmarks/tpu_plans.py
    "7B, 32,768": ("7b_32k", "h100:1", 1, []),
    "7B, 100,000": ("7b_100k", "h100:1", 1, []),
    "7B, 131,072": ("7b_32k", "h100:1", 1, ["seq_len=131072"]),
    "7B, 524,288": ("7b_32k", "h100:8", 8, ["seq_len=524288"]),
    "70B, 32,768": ("70b_32k", "h100:8", 8, []),
    "70B in NF4, 32,768, offloaded": ("70b_32k_nf4", "h100:1", 1, []),
    "7B in NF4, 32,768": ("7b_32k_nf4", "rtx4090:1", 1, []),
    # Measured on one H200: docs/measured.md.
    "7B, 32,768, on a H200": ("7b_32k", "h200:1", 1, ["batch_size=1", "accumulation=1"]),
    "7B, 100,000, on a H200": ("7b_100k", "h200:1", 1, ["batch_size=1", "accumulation=1"]),
}


def main() -> None:
    """Plans every row, prints the table and writes it."""
    plan_rows(ROWS, __doc__)


if __name__ == "__main__":
    errors.run(main)
