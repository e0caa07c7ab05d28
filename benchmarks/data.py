"""What reaches the step: `prepare` beside the tokenizers library alone, and the loader beside what a step consumes.

    python -m benchmarks.data --json benchmarks/data.json

The corpus is the sources of Python's standard library, the tokenizer that of models/, unless others are named. Every
round takes the library alone and `prepare`, in turn and in this process. The library gets texts that lie in memory, a
thousand at a time, and nothing is done with what it gives. prepare loads the tokenizer, reads the files, tokenizes,
writes, checks and waits for the disk. Its ids must be the library's own. CPU seconds are those of all threads.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import tokenizers

from longlora_jax import errors
from longlora_jax.config_file import read_config
from longlora_jax.data import InMemory, batches, pack
from longlora_jax.data.prepare import Job, prepare
from longlora_jax.data.prepared import Prepared
from longlora_jax.data.source import SOURCES, read_documents
from longlora_jax.errors import UserError
from longlora_jax.files import check_writable, write_json
from longlora_jax.parallel import sharding
from longlora_jax.training import run
from longlora_jax.training.resolve import resolve
from longlora_jax.training.step import compile_train_step

ROOT = Path(__file__).parents[1]
LOADED = 200  # batches that a loader alone is measured over
AT_ONCE = 1000  # texts that the library alone gets in one call


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Seconds on the clock and of all cores that some work takes."""
    clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - clock, "cpu_seconds": cpu}


def measure_prepare(source: str, path: str, tokenizer: str, rounds: int) -> dict:
    """Rounds of the library alone and of prepare over the same corpus; raises UserError if their ids differ."""
    library = tokenizers.Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    texts = [document.text for document in read_documents(source, path)]
    taken = []

    def alone() -> None:
        for first in range(0, len(texts), AT_ONCE):
            library.encode_batch_fast(texts[first : first + AT_ONCE])

    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            out = os.path.join(folder, str(number))
            job = Job(source, path, tokenizer)
            ways = {"library": alone, "prepare": lambda job=job, out=out: prepare(job, out)}
            order = ("library", "prepare") if number % 2 else ("prepare", "library")
            taken.append({way: timed(ways[way]) for way in order})
        documents = Prepared(out)
        for first in range(0, len(texts), AT_ONCE):
            for index, wanted in enumerate(library.encode_batch_fast(texts[first : first + AT_ONCE]), first):
                ids, _ = documents.read(index, 0, int(documents.lengths[index]))
                if not np.array_equal(ids, wanted.ids):
                    raise UserError(f"document {index} of {out} has other ids than the library gives")
        tokens = int(documents.lengths.sum())
    best = {way: min(row[way]["seconds"] for row in taken) for way in ("library", "prepare")}
    return {
        "documents": len(texts),
        "characters": sum(map(len, texts)),
        "tokens": tokens,
        "library_tokens_per_second": tokens / best["library"],
        "prepare_tokens_per_second": tokens / best["prepare"],
        "prepare_over_library": statistics.median(r["library"]["seconds"] / r["prepare"]["seconds"] for r in taken),
        "cpu_seconds_over_library": statistics.median(
            r["prepare"]["cpu_seconds"] / r["library"]["cpu_seconds"] for r in taken
        ),
        "rounds": taken,
    }


def measure_loader(source: str, path: str, tokenizer: str, steps: int) -> dict:
    """The loader alone, and around the step of configs/quickstart.py: from memory and from a prepared corpus.

    start_seconds: until the first batch is there. waiting: the share of a loop's time that it stood in next(), after a
    step was started and before its loss was asked for, as train.py does: the most that a step can have waited.
    """
    config, _ = resolve(read_config(str(ROOT / "configs" / "quickstart.py")), "")
    step = _quickstart_step(config)
    batch_tokens = config.batch_size * config.seq_len
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "prepared")
        prepare(Job(source, path, tokenizer), out)
        prepared = Prepared(out)
        ids = (prepared.read(i, 0, int(n))[0] for i, n in enumerate(prepared.lengths))
        for name, documents in (("memory", InMemory(ids, prepared.eos_id)), ("prepared", prepared)):
            windows = pack(documents, config.seq_len)
            for workers in (0, 1, 2):
                data = batches(windows, batch_size=config.batch_size, seed=0, workers=workers)
                start = timed(lambda data=data: next(data))["seconds"]
                alone = timed(lambda data=data: [next(data) for _ in range(LOADED)])["seconds"]
                waited = total = 0.0
                for _ in range(steps):
                    began = time.perf_counter()
                    wait_for_loss = step(next(data))
                    called = time.perf_counter()
                    next(data)
                    waited += time.perf_counter() - called
                    wait_for_loss()
                    total += time.perf_counter() - began
                data.close()
                rows.append(
                    {
                        "documents": name,
                        "workers": workers,
                        "start_seconds": start,
                        "tokens_per_second": LOADED * batch_tokens / alone,
                        "step_tokens_per_second": steps * batch_tokens / total,
                        "waiting": waited / total,
                    }
                )
                print("  ".join(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    return {"seq_len": config.seq_len, "batch_size": config.batch_size, "steps": steps, "loaders": rows}


def _quickstart_step(config):
    """A function that starts a training step on a batch and returns one that waits for its loss."""
    mesh = sharding.make_mesh(config.mesh)
    where, shape = sharding.batch_sharding(mesh, config.batch_size), (config.batch_size, config.seq_len)
    held = sharding.local_rows(where, shape)
    state, frozen = run.initial_state(config, run.build_model(config, mesh), mesh)
    compiled = compile_train_step(state, frozen, jax.ShapeDtypeStruct(shape, "int32", sharding=where))

    def start(batch):
        nonlocal state
        del batch["segment_ids"]
        state, values = compiled(state, frozen, sharding.place_batch(batch, where, held, config.batch_size))
        return lambda: float(values["loss"])

    return start


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=SOURCES, default="python", help="kind of corpus (default: %(default)s)")
    parser.add_argument("--path", default="", help="where it is (default: the running interpreter's library)")
    parser.add_argument("--tokenizer", default=str(ROOT / "models" / "tiny-python-llama"), metavar="DIR")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps around each loader (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="where to write the results")
    args = parser.parse_args()
    if args.json:
        check_writable(args.json)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    results = {
        "machine": {"cpu_cores": len(os.sched_getaffinity(0)), "python": platform.python_version()},
        "prepare": measure_prepare(args.source, args.path, args.tokenizer, args.rounds),
    }
    print(json.dumps({name: value for name, value in results["prepare"].items() if name != "rounds"}, indent=2))
    results["loader"] = measure_loader(args.source, args.path, args.tokenizer, args.steps)
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    errors.run(main)
