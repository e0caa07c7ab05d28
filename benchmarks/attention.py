"""How attention alone and the whole train step grow with the window, under full attention and under S2-Attn.

    python -m benchmarks.attention --json benchmarks/attention.json     (minutes on 2 cores)

On a CPU: 1,024 to 16,384 tokens, a LLaMA of D 256, 2 layers, 4 heads of 64, F 704, V 1,024 in float32. On a GPU: 8,192
to 131,072 tokens, LLaMA-2 7B's shape (--layers of it) in bfloat16, and beside our attention torch's flash attention on
the same groups, in a process of its own; lengths whose step does not fit the card by the planner's formula are left
out. "attention" is one layer's forward and gradients for q, k and v; "step" is a training step of one row, remat block.
Every program is compiled first; then all take turns, one run each a round, so that a machine which speeds up or slows
down does so for all. Exponents are least squares of log(value) on log(T), over the best of the rounds; memory is what
the compiler allots for temporaries, and of a GPU also its own count at the worst, of all programs together.

FLOPs are the useful ones: the pairs that causality and groups leave, forward and twice that backward; frozen matrices
once forward and once for the gradient of their input; nothing that is computed again. MFU is over the peak in chips.py.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from longlora_jax import errors
from longlora_jax.files import check_writable, write_json

ROOT = Path(__file__).parent.parent
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "vocab_size": 1024}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
LENGTHS = {"cpu": (1024, 2048, 4096, 8192, 16_384), "gpu": (8192, 16_384, 32_768, 65_536, 131_072)}


class Case(NamedTuple):
    """One program: run() takes a turn and waits for its end; flops: useful ones of a run; bytes: temporaries."""

    what: str
    library: str
    attention: str
    seq_len: int
    flops: float
    bytes: int | None
    run: Callable[[], float]


def causal_pairs(pattern, seq_len: int) -> float:
    """Pairs of a query and a key that a pattern leaves, a head, on average over the heads."""

    def pieces(first: int, group: int) -> int:
        rest = [min(group, seq_len - start) for start in range(first, seq_len, group)]
        return sum(n * (n + 1) // 2 for n in (first, *rest))

    if pattern.name == "full":
        return pieces(0, seq_len)
    g = pattern.group_size
    return (pieces(0, g) + pieces(g - g // 2, g)) / 2


def step_flops(config, pattern) -> float:
    """Useful FLOPs of one row's training step (plan/costs.step_flops), with the pairs that a pattern leaves."""
    from longlora_jax.plan import costs

    c = config.model
    seen = 4 * causal_pairs(pattern, config.seq_len) * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    return costs.step_flops(config, costs.forward_flops(config) | {"attention": seen})


def timed(run: Callable[[], Any]) -> Callable[[], float]:
    """Seconds of a run, until what it gives is there."""
    import jax

    def turn() -> float:
        began = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - began

    return turn


def attention_case(config, name: str) -> Case:
    """attend's forward and gradients for one row of one layer."""
    import jax

    from longlora_jax.attention.attend import attend
    from longlora_jax.training import run

    c, pattern = config.model, run.build_model(config).pattern
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads, c.num_attention_heads)
    shapes = ((1, config.seq_len, n, c.head_dim) for n in heads)
    q, k, v, g = (jax.random.normal(key, s, config.dtype) for key, s in zip(keys, shapes, strict=True))

    def both(q, k, v, g):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, pattern), q, k, v)
        return out, *back(g)

    compiled = jax.jit(both).lower(q, k, v, g).compile()
    flops = 3 * 4 * causal_pairs(pattern, config.seq_len) * c.num_attention_heads * c.head_dim
    used = compiled.memory_analysis().temp_size_in_bytes
    return Case("attention", "ours", name, config.seq_len, flops, used, timed(lambda: compiled(q, k, v, g)))


class Steps:
    """The train step at any length and pattern, of one model that all of them go on training."""

    def __init__(self, config):
        import jax

        from longlora_jax.config import MeshConfig
        from longlora_jax.parallel.sharding import make_mesh
        from longlora_jax.training import run

        self._mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        self._state, self._frozen = run.initial_state(config, run.build_model(config, self._mesh), self._mesh)

    def case(self, config, name: str) -> Case:
        """The step of one row under a config."""
        import jax

        from longlora_jax.parallel import sharding
        from longlora_jax.training import run
        from longlora_jax.training.step import compile_train_step

        model = run.build_model(config, self._mesh)
        where = sharding.batch_sharding(self._mesh, 1)
        shape = jax.ShapeDtypeStruct((1, config.seq_len), "int32", sharding=where)
        state = self._state.replace(model=model)
        step = compile_train_step(state, self._frozen, shape)
        tokens = jax.random.randint(jax.random.key(1), shape.shape, 0, config.model.vocab_size)
        ones = jax.numpy.ones_like(tokens)
        batch = {"tokens": tokens, "positions": jax.numpy.arange(config.seq_len)[None], "loss_mask": ones}
        batch = jax.device_put(batch, where)

        def run_step():
            self._state, metrics = step(self._state.replace(model=model), self._frozen, batch)
            return metrics

        used, flops = step.memory_analysis().temp_size_in_bytes, step_flops(config, model.pattern)
        return Case("step", "ours", name, config.seq_len, flops, used, timed(run_step))


def torch_worker() -> None:
    """Answers each line {"seq_len", "group", "heads", "head_dim", "dtype"} with seconds of torch's attention."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from benchmarks.train_step import grouped_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for line in sys.stdin:
        ask = json.loads(line)
        options = {"dtype": getattr(torch, ask["dtype"]), "device": device}
        shape = (1, ask["heads"], ask["seq_len"], ask["head_dim"])
        q, k, v = (torch.randn(shape, **options, requires_grad=True) for _ in range(3))
        grouped = grouped_attention(ask["group"]) if ask["group"] else None
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            wait()
            began = time.perf_counter()
            out = grouped(None, q, k, v, None)[0] if grouped else scaled_dot_product_attention(q, k, v, is_causal=True)
            out.backward(torch.ones_like(out))
            wait()
        print(json.dumps(time.perf_counter() - began), flush=True)
        del q, k, v, out


class Torch:
    """torch in a process of its own: two libraries of CUDA in one do not always agree."""

    def __init__(self):
        command = [sys.executable, "-m", "benchmarks.attention", "--worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, text=True, cwd=ROOT, **pipes)

    def case(self, config, ours: Case) -> Case:
        """What torch takes for one of our cases of attention."""
        from longlora_jax.training import run

        c, group = config.model, run.build_model(config).pattern.group_size
        ask = {"seq_len": config.seq_len, "group": group, "heads": c.num_attention_heads, "head_dim": c.head_dim}

        def turn() -> float:
            self._process.stdin.write(json.dumps({**ask, "dtype": config.dtype}) + "\n")
            self._process.stdin.flush()
            if not (answer := self._process.stdout.readline()):
                raise errors.UserError(f"torch ended with exit code {self._process.wait()}: see above, or --no-torch")
            return json.loads(answer)

        turn()
        return ours._replace(library="torch", bytes=None, run=turn)

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def configs(platform: str, lengths, layers: int):
    """(name of the attention, config) for every length; groups of a quarter, and of one size for all lengths."""
    from longlora_jax import presets
    from longlora_jax.config import AttentionConfig
    from longlora_jax.training.resolve import extend_model

    model = presets.llama2_7b()
    model = dataclasses.replace(model, **SMALL) if platform == "cpu" else model
    model = dataclasses.replace(model, num_hidden_layers=layers or model.num_hidden_layers)
    fixed = min(lengths) // 2
    patterns = {"full": AttentionConfig("full"), "s2 G=T/4": AttentionConfig()}
    patterns[f"s2 G={fixed}"] = AttentionConfig(group_size=fixed)
    for seq_len in lengths:
        for name, attention in patterns.items():
            config = presets.longlora(model, init_from="", seq_len=seq_len)
            dtype = "float32" if platform == "cpu" else "bfloat16"
            config = dataclasses.replace(config, batch_size=1, accumulation=1, attention=attention, dtype=dtype)
            yield name, dataclasses.replace(config, model=extend_model(model, config))


def fitting(everything: list) -> list:
    """The configs whose step fits this device by the planner's formula; all where it does not tell its memory."""
    import jax

    from longlora_jax.config import MeshConfig
    from longlora_jax.parallel.sharding import make_mesh
    from longlora_jax.plan import costs

    if not (limit := (jax.devices()[0].memory_stats() or {}).get("bytes_limit")):
        return everything
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    needed = {config.seq_len: costs.estimate(config, mesh)["total"] for _, config in everything}
    for seq_len, size in needed.items():
        if size > costs.SPARE * limit:
            print(f"left out   {seq_len:,}: {size / 2**30:.1f} GiB by estimate, of {limit / 2**30:.1f}", flush=True)
    found = [(name, config) for name, config in everything if needed[config.seq_len] <= costs.SPARE * limit]
    if not found:
        raise errors.UserError("no length fits this device: give fewer --layers, or a shorter --seq_len")
    return found


def exponents(rows: list[dict]) -> list[dict]:
    """How best seconds and bytes of each kind of program grow: the slope of their logarithms over that of T."""
    import numpy as np

    found = []
    for kind in dict.fromkeys((r["what"], r["library"], r["attention"]) for r in rows):
        mine = [r for r in rows if (r["what"], r["library"], r["attention"]) == kind]
        lengths = np.log([r["seq_len"] for r in mine])
        found.append(dict(zip(("what", "library", "attention"), kind, strict=True)))
        for value in ("best_seconds", "temp_bytes"):
            if len(mine) > 1 and all(r[value] for r in mine):
                found[-1][value] = float(np.polyfit(lengths, np.log([r[value] for r in mine]), 1)[0])
    return found


def speed_over_full(rows: list[dict]) -> list[dict]:
    """Full's time over that of each other attention, beside the same of FLOPs; share: what was made of it."""
    best = {(r["what"], r["library"], r["attention"], r["seq_len"]): r for r in rows}
    found = []
    for (what, library, attention, seq_len), r in best.items():
        full = best[what, library, "full", seq_len]
        if attention != "full":
            speed, flops = full["best_seconds"] / r["best_seconds"], full["flops"] / r["flops"]
            row = {"what": what, "library": library, "attention": attention, "seq_len": seq_len}
            found.append(row | {"speed": speed, "flops": flops, "share": speed / flops})
    return found


def peak_flops(kind: str) -> float:
    """Peak bf16 FLOP/s of a GPU by its name, NaN if chips.py has none."""
    from longlora_jax.plan.chips import GPUS

    return next((chip.tflops * 1e12 for name, chip in GPUS.items() if name.split("-")[0] in kind.lower()), math.nan)


def main() -> None:
    """Compiles all, measures in turns, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq_len", metavar="T,...", help="lengths (default: by the device, see above)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=0, help="layers of the step's model (default: all it has)")
    parser.add_argument("--no-torch", action="store_true", help="on a GPU: our kernels alone")
    parser.add_argument("--json", metavar="FILE", help="where to write the results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.json:
        check_writable(args.json)
    if args.worker:
        return torch_worker()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory of the same GPU
    import jax

    from longlora_jax.attention.kernels import kernel_name

    platform, kind = jax.default_backend(), jax.devices()[0].device_kind
    peak = peak_flops(kind)
    lengths = tuple(map(int, args.seq_len.split(","))) if args.seq_len else LENGTHS[platform]
    everything = fitting(list(configs(platform, lengths, args.layers)))
    beside = Torch() if platform == "gpu" and not args.no_torch else None
    with contextlib.closing(beside) if beside else contextlib.nullcontext():
        steps, cases = Steps(everything[0][1]), []
        for name, config in everything:
            print(f"compiling  {config.seq_len:,} {name}", flush=True)
            cases.append(attention_case(config, name))
            if beside and name != everything[2][0]:
                cases.append(beside.case(config, cases[-1]))
            cases.append(steps.case(config, name))
        for case in cases:
            case.run()
        seconds: list[list[float]] = [[] for _ in cases]
        for turn in range(args.rounds):
            for case, times in zip(cases, seconds, strict=True):
                times.append(case.run())
                label = f"{case.what:<9} {case.library:<5} {case.attention:<9} {case.seq_len:>7,}"
                print(f"round {turn + 1}/{args.rounds}  {label} {times[-1]:9.4f} s", flush=True)
    rows = [
        {**{k: v for k, v in case._asdict().items() if k not in ("run", "bytes")}, "temp_bytes": case.bytes}
        | {"seconds": times, "best_seconds": min(times), "median_seconds": statistics.median(times)}
        | {"tflops_per_second": case.flops / min(times) / 1e12}
        | ({} if math.isnan(peak) else {"mfu": case.flops / min(times) / peak})
        for case, times in zip(cases, seconds, strict=True)
    ]
    print(f"\n{'':<26} {'T':>7} {'best s':>9} {'median':>9} {'GiB':>7} {'TFLOP/s':>8} {'MFU':>6}")
    for r in rows:
        size = "" if r["temp_bytes"] is None else f"{r['temp_bytes'] / 2**30:.3f}"
        used = f"{r['mfu']:.1%}" if "mfu" in r else ""
        print(
            f"{r['what']:<9} {r['library']:<6} {r['attention']:<9} {r['seq_len']:>7,} {r['best_seconds']:>9.4f} "
            f"{r['median_seconds']:>9.4f} {size:>7} {r['tflops_per_second']:>8.3f} {used:>6}"
        )
    grows, ratios = exponents(rows), speed_over_full(rows)
    for r in grows:
        slopes = ", ".join(f"T^{r[key]:.2f} {key}" for key in ("best_seconds", "temp_bytes") if key in r)
        print(f"grows      {r['what']:<9} {r['library']:<6} {r['attention']:<9} {slopes}")
    for r in ratios:
        print(
            f"over full  {r['what']:<9} {r['library']:<6} {r['attention']:<9} {r['seq_len']:>7,} "
            f"{r['speed']:.2f} times as fast, FLOPs {r['flops']:.2f} times fewer: {r['share']:.0%}"
        )
    if args.json:
        device = {"platform": platform, "kind": kind, "cores": os.cpu_count(), "jax": jax.__version__}
        if peak_bytes := (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):
            device["peak_bytes"] = peak_bytes
        device["kernel"] = kernel_name(everything[0][1].dtype, everything[0][1].model.head_dim)
        write_json(args.json, {"device": device, "results": rows, "exponents": grows, "speed_over_full": ratios})


if __name__ == "__main__":
    errors.run(main)
