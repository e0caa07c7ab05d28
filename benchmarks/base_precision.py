"""The price of a packed base: one extension trained over it in each precision, its perplexity by length.

python -m benchmarks.base_precision --config.steps=150 --json benchmarks/base_precision.json
python -m benchmarks.base_precision --config configs/smollm2_135m_16k.py --data 'novels/*.txt' \
    --lengths 2048,8192,16384 --last 2048 --json benchmarks/base_precision_smollm2.json \
    --config.init_from=models/smollm2 --config.steps=20

Every run has the same steps over the same tokens. What it trained is scored in three ways: merged into the base as it
is published (what to-hf writes), merged and quantized again (--quantize of the commands), and the base alone, quantized
and not, with nothing trained.
"""

import argparse
import dataclasses
import glob
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from longlora_jax import errors
from longlora_jax.config_file import read_config
from longlora_jax.data import HELD_OUT, load_tokenizer, read_documents, read_text
from longlora_jax.errors import UserError, number, numbers
from longlora_jax.evals.perplexity import evaluate, on_device, stretch_rope
from longlora_jax.weights.load import open_model

KINDS = ("none", "int8", "nf4", "nf4_double")


def documents_of(tokenizer, pattern: str | None, tokens: int) -> list:
    """The first tokens of every text: files by a glob pattern, or those that the quickstart holds out."""
    if pattern is None:
        texts = [document.text for document in read_documents("python", "", only=HELD_OUT)]
    else:
        texts = [read_text(path) for path in sorted(glob.glob(pattern))]
    if not texts:
        raise UserError(f"--data {pattern} names no file: give a pattern of text files")
    return [tokenizer.encode(text)[:tokens] for text in texts]


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing, scores what is missing, prints a table."""
    parser = errors.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py", metavar="FILE")
    parser.add_argument("--data", metavar="GLOB", help="texts to score (default: what the quickstart holds out)")
    parser.add_argument("--lengths", type=numbers(int, 2), default=[256, 512, 1024, 2048], metavar="T[,T...]")
    parser.add_argument("--last", type=number(int, 1), metavar="K", help="score the last K targets of same windows")
    parser.add_argument("--tokens", type=number(int, 2), default=8192, help="of each text (default: %(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which precisions (default: %(default)s)")
    parser.add_argument("--workdir", type=Path, default=Path("runs/base_precision"))
    parser.add_argument("--json", required=True, type=Path)
    args, overrides = parser.parse_known_args(argv)
    kinds = args.kinds.split(",")
    config = read_config(args.config, overrides)
    base = config.init_from
    found = json.loads(args.json.read_text()) if args.json.exists() else {"rows": {}}
    found |= {"config": args.config, "overrides": overrides, "steps": config.steps, "base": base, "last": args.last}
    for kind in kinds:
        command = ["train.py", "--config", args.config, "--workdir", str(args.workdir / kind)]
        command += [*overrides, f"--config.base_quantization={kind}"]
        print(f"$ {shlex.join(['python', *command])}", flush=True)
        if subprocess.run([sys.executable, *command]).returncode:
            raise UserError("the run above failed: mend what it says and give the same command again")
    rows = {f"base, {kind}, untrained": (base, kind) for kind in kinds}
    rows |= {f"trained over {kind}, merged into the published base": (args.workdir / kind, "none") for kind in kinds}
    packed = [kind for kind in kinds if kind != "none"]
    rows |= {f"trained over {kind}, quantized again": (args.workdir / kind, kind) for kind in packed}
    rows |= {f"trained over none, quantized to {kind}": (args.workdir / "none", kind) for kind in packed}
    for name, (path, kind) in rows.items():
        if name not in found["rows"]:
            found["rows"][name] = score(name, str(path), kind, args)
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    print("| " + " | ".join(["", *(f"{t:,}" for t in args.lengths)]) + " |")
    for name in rows:
        cells = [f"{math.exp(r['nll']):.3f}" for r in found["rows"][name]]
        print("| " + " | ".join([name, *cells]) + " |")


def score(name: str, path: str, kind: str, args: argparse.Namespace) -> list[dict]:
    """nll, its standard error and the number of targets at every length; an untrained base is stretched by YaRN."""
    opened = open_model(path, "float32", quantize=kind)
    documents = documents_of(load_tokenizer(opened.tokenizer_dir), args.data, args.tokens)
    model, longest = on_device(opened, "float32"), max(args.lengths)
    if model.config.max_position_embeddings < longest:
        model = dataclasses.replace(model, config=stretch_rope(model.config, longest, "yarn"))
    how = {"last": args.last, "longest": longest} if args.last else {}
    results = [evaluate(model, documents, t, label=f"{name}, {t:,} tokens", **how) for t in args.lengths]
    return [{key: r[key] for key in ("seq_len", "nll", "stderr", "tokens", "perplexity")} for r in results]


if __name__ == "__main__":
    errors.run(main)
