"""Conversion of a 7B-shaped folder, both ways, beside a plain copy of the same bytes.

    python -m benchmarks.convert --scratch DIR --json benchmarks/convert.json

DIR needs room for three models (41 GB). The source is LLaMA-2 7B's shape in random bfloat16, 13.5 GB in three shards;
it is written shard by shard and kept in DIR/source for the next time. Every round takes, in turn: `cp -r` and sync of
the source, `from-hf`, `to-hf` of what came out, each a process of its own, timed from its start until everything is
on the disk. Peak memory is the process's own maximum resident set, pages of mapped files included. At the end every
tensor of the way out must have the digest of the source.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from longlora_jax import errors
from longlora_jax.errors import UserError
from longlora_jax.files import check_writable, write_json
from longlora_jax.presets import llama2_7b
from longlora_jax.weights import hf
from longlora_jax.weights.rules import weight_rules
from longlora_jax.weights.tensors import DTYPES, Tensor

ROOT = Path(__file__).parent.parent
COLUMNS = {"seconds": 1, "gb_per_second": 2, "over_copy": 2, "peak_gb": 2}


def write_source(folder: Path) -> None:
    """A folder of LLaMA-2 7B's shape with random finite bfloat16 weights; one tensor at a time is held."""
    config = llama2_7b()
    rng = np.random.Generator(np.random.SFC64(0))

    def random(shape: tuple[int, ...]) -> np.ndarray:
        bits = rng.integers(0, 2**16, shape, np.uint16)
        bits &= 0xBFFF  # an exponent below the largest: no infinity, no NaN
        return bits.view(DTYPES["bfloat16"])

    table = {
        name: Tensor(DTYPES["bfloat16"], rule.hf_shape, lambda shape=rule.hf_shape: random(shape))
        for rule in weight_rules(config)
        for name in rule.names(config.num_hidden_layers)
    }
    hf.write_hf(str(folder), config, table)


def timed(*command) -> dict[str, float]:
    """Seconds and peak resident GB of a command, until what it wrote is on the disk."""
    started = time.perf_counter()
    with open(os.devnull, "w") as nowhere:
        child = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=nowhere, stderr=nowhere)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    os.sync()
    if child.returncode:
        raise UserError(f"{' '.join(map(str, command))} failed with exit code {child.returncode}")
    return {"seconds": time.perf_counter() - started, "peak_gb": usage.ru_maxrss * 1024 / 1e9}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a Hugging Face folder."""
    _, table = hf.open_hf(str(folder))
    return {
        name: hashlib.sha256(tensor.read().reshape(-1).view(np.uint8).data).hexdigest()
        for name, tensor in table.items()
    }


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", required=True, metavar="DIR", help="folder for 41 GB, on the disk to measure")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="where to write the results")
    args = parser.parse_args()
    if args.json:
        check_writable(args.json)
    scratch = Path(args.scratch).absolute()
    source, copy, ours, out = (scratch / name for name in ("source", "copy", "converted", "exported"))
    if not source.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        write_source(source)
    size = sum(file.stat().st_size for file in source.iterdir())
    convert = (sys.executable, "convert_weights.py")
    rounds = []
    for number in range(args.rounds):
        for folder in (copy, ours, out):
            shutil.rmtree(folder, ignore_errors=True)
        os.sync()
        row = {"copy": timed("cp", "-r", source, copy)}
        shutil.rmtree(copy)
        row["from-hf"] = timed(*convert, "from-hf", source, ours)
        row["to-hf"] = timed(*convert, "to-hf", ours, out)
        rounds.append(row)
        print(
            f"round {number + 1}: "
            + ", ".join(f"{k} {v['seconds']:.1f} s, {v['peak_gb']:.2f} GB" for k, v in row.items())
        )
    if digests(out) != digests(source):
        raise UserError(f"the tensors in {out} are not those in {source}")
    with open(ours / "digests.json") as file:
        if json.load(file)["tensors"] != digests(source):
            raise UserError(f"the digests in {ours} are not those of {source}")
    summary = {
        way: {
            "seconds": statistics.median(row[way]["seconds"] for row in rounds),
            "gb_per_second": size / 1e9 / statistics.median(row[way]["seconds"] for row in rounds),
            "over_copy": statistics.median(row[way]["seconds"] / row["copy"]["seconds"] for row in rounds),
            "peak_gb": max(row[way]["peak_gb"] for row in rounds),
        }
        for way in ("copy", "from-hf", "to-hf")
    }
    print(f"\n{size / 1e9:.1f} GB, every tensor bit for bit\n")
    print("| | seconds | GB/s | over copy | peak GB |\n| --- | ---: | ---: | ---: | ---: |")
    for way, row in summary.items():
        cells = [f"{row[key]:.{digits}f}" for key, digits in COLUMNS.items()]
        print(f"| {' | '.join([way, *cells])} |")
    if args.json:
        machine = {"cpu_cores": os.cpu_count(), "python": platform.python_version()}
        write_json(args.json, {"bytes": size, "machine": machine, "summary": summary, "rounds": rounds})


if __name__ == "__main__":
    errors.run(main)
