"""What every part of the benchmark shares: rows that are on the disk as they come, a time to stop at, and medians."""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from longlora_jax.files import write_json

# JAX takes 75% of a card by default; the benchmark has the card to itself. Set before jax is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".93")
SHAPES = {"7b": (32, 32, 128), "smollm2": (9, 3, 64)}  # heads, kv heads and head dim of the models
TINY_SHAPES = {"smollm2": (3, 1, 8)}


class Part:
    """A part as a command: PART --json FILE --seconds N [--tiny]."""

    def __init__(self, doc: str):
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--json", required=True, metavar="FILE", help="where to write the rows")
        parser.add_argument("--seconds", type=float, default=600, help="begin nothing after so many (default: 600)")
        parser.add_argument("--tiny", action="store_true", help="a rehearsal: small sizes, for a CPU")
        args = parser.parse_args()
        self.tiny: bool = args.tiny
        self.head: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self._file, self._end = args.json, time.monotonic() + args.seconds

    def left(self) -> float:
        """Seconds until nothing more may begin."""
        return self._end - time.monotonic()

    def run(self, row: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Adds what a case measures to its row. One that fails, or for which no time is left, says so in its row."""
        if self.left() <= 0:
            row = row | {"skipped": "no time was left"}
        else:
            try:
                row = row | measure()
            except Exception as error:  # a case that does not fit must not end the others
                lines = str(error).strip().splitlines() or [""]
                row = row | {"error": f"{type(error).__name__}: {lines[0][:200]}"}
        self.rows.append(row)
        self.save()
        brief = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if not isinstance(v, list)}
        print("  ".join(f"{k}={v}" for k, v in brief.items()), flush=True)
        return row

    def save(self) -> None:
        """Writes all rows so far."""
        write_json(self._file, self.head | {"rows": self.rows})


def jax_device() -> dict[str, Any]:
    """This process's device as jax tells it: {"device", "jax", "peak_tflops"}, the last without what chips.py lacks."""
    import jax

    from benchmarks.attention import peak_flops

    kind = jax.devices()[0].device_kind
    peak = peak_flops(kind)
    return {"device": kind, "jax": jax.__version__} | ({"peak_tflops": peak / 1e12} if peak == peak else {})


def memory_limit() -> int:
    """Bytes that jax may use of the device; 0 where it does not tell."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def random_leaves(tree: Any) -> Any:
    """Small random arrays for a tree of jax.ShapeDtypeStruct, leaf by leaf: no more than they is ever held."""
    import jax

    keys = iter(jax.random.split(jax.random.key(0), 1000))

    def leaf(x):
        def draw(key):
            return (jax.random.normal(key, x.shape, x.dtype) * 0.02).astype(x.dtype)

        return jax.jit(draw, out_shardings=x.sharding)(next(keys))

    return jax.tree.map(leaf, tree)


def milliseconds(run: Callable[[], Any], wait: Callable[[Any], Any], fill: float = 0.06) -> dict[str, float]:
    """{"ms", "ms_min"}: median and best of five measurements, each of enough runs to fill so many seconds."""

    def measure(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            out = run()
        wait(out)
        return (time.perf_counter() - began) / count

    measure(1)  # compiles, and chooses algorithms
    count = max(1, min(50, int(fill / measure(1))))
    times = [measure(count) for _ in range(5)]
    return {"ms": statistics.median(times) * 1e3, "ms_min": min(times) * 1e3}
