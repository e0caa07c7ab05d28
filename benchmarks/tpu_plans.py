"""What fits on TPUs: the train step of each row compiled for its topology, on a machine without any.

    pip install libtpu
    python -m benchmarks.tpu_plans --json benchmarks/tpu_plans.json     (a minute or two a row on 2 cores)

Each row is one `python -m longlora_jax.plan` in a process of its own; the command is in the result.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from longlora_jax import errors
from longlora_jax.files import check_writable, holds_nothing, write_json

ROOT = Path(__file__).parent.parent
ROWS = {  # name: (config, topology, devices on the context axis, further changes)
    "7B, 32,768": ("7b_32k", "v5e:2x4", 8, []),
    "7B, 100,000": ("7b_100k", "v5e:2x4", 8, []),
    "7B, 262,144": ("7b_32k", "v5e:2x4", 8, ["seq_len=262144"]),
    "7B, 524,288, offloaded": ("7b_32k", "v5e:2x4", 8, ["seq_len=524288", "remat=offload"]),
    "7B, 1,048,576, offloaded, in chunks": (
        *("7b_32k", "v5e:2x4", 8),
        ["seq_len=1048576", "remat=offload", "chunks=16"],
    ),
    "13B, 65,536": ("13b_64k", "v5e:2x4", 8, []),
    "70B, 32,768": ("70b_32k", "v5p:2x2x1", 4, []),
    "70B, 262,144": ("70b_32k", "v5p:2x2x4", 16, ["seq_len=262144"]),
}


def command(config: str, topology: str, context: int, changes: list[str]) -> list[str]:
    """The plan's command of a row: the sequence over all devices, one row at a time."""
    flags = [f"mesh.context={context}", "mesh.fsdp=1", "accumulation=64", *changes]
    flags = [f"--config.{flag}" for flag in flags]
    return [
        "python",
        "-m",
        "longlora_jax.plan",
        "--config",
        f"configs/{config}.py",
        "--topology",
        topology,
        *flags,
    ]


def plan_rows(rows: dict[str, tuple], description: str) -> None:
    """The command: plans every row, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", default="", help="rows whose name holds this text")
    parser.add_argument("--json", metavar="FILE", help="where to write the results; rows that are there are kept")
    args = parser.parse_args()
    if args.json:
        check_writable(args.json)
    found = {}
    if args.json and Path(args.json).exists() and not holds_nothing(args.json):
        found = json.loads(Path(args.json).read_text())
    print("| run | topology | GiB a device | limit | host GiB a device | compiled in |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, row in rows.items():
        if args.only not in name:
            continue
        words = command(*row)
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            line = [sys.executable, *words[1:], "--json", file.name]
            done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise errors.UserError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            plan = json.loads(Path(file.name).read_text())
        if plan["not_compiled"]:
            raise errors.UserError(f"{name}: {plan['not_compiled']}")
        found[name] = {"command": shlex.join(words), **plan}
        sizes = ("hbm_bytes_per_device", "hbm_limit_bytes", "host_bytes_per_device")
        total, limit, host = (plan[size] / 2**30 for size in sizes)
        cells = [name, plan["topology"], f"{total:.2f}" if plan["fits"] else f"{total:.2f}, does not fit"]
        cells += [f"{limit:.2f}", f"{host:.1f}", f"{plan['compile_seconds']:.0f} s"]
        print(f"| {' | '.join(cells)} |", flush=True)
        if args.json:
            write_json(args.json, found)


def main() -> None:
    """Plans every row, prints the table and writes it."""
    plan_rows(ROWS, __doc__)


if __name__ == "__main__":
    errors.run(main)
