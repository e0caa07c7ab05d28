"""Speed and memory of one training step of LongLoRA, beside transformers + PEFT + SDPA doing the same step.

Command:  python -m benchmarks.train_step --json benchmarks/train_step.json   (about 15 minutes on 2 cores)

The model: D 512, 8 layers, 8 heads, F 1408, V 32,000, random weights; float32 on a CPU, bfloat16 on a GPU. The step:
LoRA r=8 on q, k, v, o, the embedding and all norms; forward, backward, gradient clipping, AdamW. Every way of running
it ("variant") is a process of its own, so that its peak memory is its own (on a GPU as its library counts it, on a CPU
that of the process); all of them take turns, one step each, so that a machine which speeds up or slows down does so for
all. The peer has the same group pattern: its heads are cut in two, the second half is shifted and cut in groups (of
equal length and unmasked but for causality, so SDPA runs its flash path), with gradient checkpointing. Before anything
is timed, both start from the same weights and must agree on the loss.

Where google-tunix is installed, its step under full attention takes turns too (tunix_peer.py). On a CPU so does a
product of square matrices: the share of its rate that a step's useful FLOPs reach says how much is left.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
}
VARIANTS = {  # name: (library, attention, remat)
    "ours s2, remat block": ("ours", "s2", "block"),
    "ours s2, remat attention": ("ours", "s2", "attention"),
    "ours s2, remat dots": ("ours", "s2", "dots"),
    "ours s2, no remat": ("ours", "s2", "none"),
    "ours full, remat block": ("ours", "full", "block"),
    "peer s2, checkpointing": ("peer", "s2", "block"),
}
PEER = "peer s2, checkpointing"
TUNIX = {"tunix full, remat block": ("tunix", "full", "block")}
MATMUL = {"matrix product": ("matmul", "", "")}
SIDE = 2048  # of its square matrices
LEARNING_RATE, RANK, ALPHA = 2e-5, 8, 16
# How far first losses may lie apart: other orders of sums in float32; of logits up to some 4, bfloat16 keeps 1e-2.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2}


def our_step(seq_len: int, attention: str, remat: str, weights: str):
    """(run, peak, about): run does one step of ours on tokens [1, T] and returns the loss; peak: bytes until now."""
    import jax
    import jax.numpy as jnp

    from longlora_jax.attention.patterns import FULL, Pattern
    from longlora_jax.config import LoraConfig, OptimConfig
    from longlora_jax.model.decoder import Llama, init_params
    from longlora_jax.model.trainable import combine, partition, trainable_mask
    from longlora_jax.training import optim
    from longlora_jax.training.step import TrainState, jit_train_step
    from longlora_jax.weights import hf

    gpu = jax.default_backend() == "gpu"
    dtype = jnp.bfloat16 if gpu else jnp.float32
    config, base = hf.load_hf(weights)
    pattern = FULL if attention == "full" else Pattern("s2", seq_len // 4)
    model = Llama(config, lora=LoraConfig(rank=RANK, alpha=ALPHA), pattern=pattern, remat=remat, dtype=dtype)
    is_new = lambda path, _: path[-1].key.startswith("lora_")  # noqa: E731

    def adapters(key):
        params = init_params(model, key)
        return partition(params, jax.tree_util.tree_map_with_path(is_new, params))[0]

    params = combine(jax.jit(adapters)(jax.random.PRNGKey(0)), jax.tree.map(jnp.asarray, base))
    trainable, frozen = partition(params, trainable_mask(params, "longlora"))
    frozen = jax.tree.map(lambda x: x.astype(dtype), frozen)
    optimizer = optim.make_optimizer(OptimConfig(learning_rate=LEARNING_RATE, warmup_steps=0), 1000)
    state = TrainState.create(model=model, optimizer=optimizer, trainable=trainable)
    # Committed to the device, as train.py has it; else the second step would be compiled anew and timed so.
    state, frozen = jax.device_put((state, frozen), jax.devices()[0])
    del base, params, trainable
    step = jit_train_step(state)

    def run(tokens) -> float:
        nonlocal state
        positions = jnp.arange(seq_len)[None]
        batch = {"tokens": jnp.asarray(tokens), "positions": positions, "loss_mask": jnp.ones((1, seq_len), jnp.int32)}
        state, metrics = step(state, frozen, batch)
        return float(metrics["loss"])

    def peak() -> int:
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"] if gpu else process_peak()

    return run, peak, {"device": jax.devices()[0].device_kind, "dtype": jnp.dtype(dtype).name}


def grouped_attention(group: int):
    """SDPA under `s2`, as an attention function of transformers: q [B, N, T, H] cut into pieces by torch views."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def pieces(q, k, v, first):
        b, n, t, h = q.shape
        middle = (t - first) // group * group
        bounds = [(0, first, 1), (first, first + middle, middle // group), (first + middle, t, 1)]
        out = []
        for start, stop, count in bounds:
            if stop > start:
                cut = (x[:, :, start:stop].reshape(b, n * count, -1, h) for x in (q, k, v))
                out.append(sdpa(*cut, is_causal=True).reshape(b, n, stop - start, h))
        return torch.cat(out, 2)

    def attention(module, query, key, value, attention_mask, **kwargs):
        half = query.shape[1] // 2
        plain = pieces(query[:, :half], key[:, :half], value[:, :half], 0)
        shifted = pieces(query[:, half:], key[:, half:], value[:, half:], group // 2)
        return torch.cat([plain, shifted], 1).transpose(1, 2).contiguous(), None

    return attention


def peer_step(seq_len: int, attention: str, remat: str, weights: str):
    """The same step by transformers, PEFT and torch: as our_step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AttentionInterface, AutoModelForCausalLM

    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    torch.set_num_threads(os.cpu_count())
    AttentionInterface.register("grouped", grouped_attention(seq_len // 4))
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype, attn_implementation="grouped")
    model.to(device)
    model.config.use_cache = False
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name or "norm" in name or "embed_tokens" in name
    model.train()
    if remat == "block":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def run(tokens) -> float:
        ids = torch.from_numpy(tokens).long().to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if gpu else process_peak()

    return run, peak, {"device": torch.cuda.get_device_name() if gpu else "cpu", "dtype": str(dtype).split(".")[1]}


def matmul_step(seq_len: int, attention: str, remat: str, weights: str):
    """One product of square matrices in float32 for a step, as our_step; its loss is 0."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
    product = jax.jit(jnp.matmul)

    def run(tokens) -> float:
        product(x, x).block_until_ready()
        return 0.0

    return run, process_peak, {"device": jax.devices()[0].device_kind, "dtype": "float32"}


def useful_flops(seq_len: int, attention: str) -> float:
    """FLOPs of a step: frozen matrices twice, causal pairs, nothing twice by remat (plan/costs.py)."""
    import dataclasses

    from benchmarks.attention import step_flops
    from longlora_jax import presets
    from longlora_jax.config import AttentionConfig
    from longlora_jax.training import run
    from longlora_jax.training.resolve import extend_model

    model = dataclasses.replace(presets.llama2_7b(), **SIZES, head_dim=SIZES["hidden_size"] // 8)
    config = presets.longlora(model, init_from="", seq_len=seq_len)
    pattern = AttentionConfig("full") if attention == "full" else AttentionConfig()
    config = dataclasses.replace(config, attention=pattern)
    config = dataclasses.replace(config, model=extend_model(model, config))
    return step_flops(config, run.build_model(config).pattern)


def variants() -> dict[str, tuple[str, str, str]]:
    """VARIANTS, and what else there is to compare with here."""
    import jax

    found = VARIANTS | (TUNIX if importlib.util.find_spec("tunix") else {})
    return found | (MATMUL if jax.default_backend() == "cpu" else {})


def process_peak() -> int:
    """Bytes of this process at its worst."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker(variant: str, seq_len: int, weights: str) -> None:
    """Takes a step for each line on standard input, and answers with loss, seconds and peak memory."""
    import numpy as np

    library, attention, remat = (VARIANTS | TUNIX | MATMUL)[variant]
    steps = {"ours": our_step, "peer": peer_step, "matmul": matmul_step}
    if library == "tunix":
        from benchmarks.tunix_peer import tunix_step as step
    else:
        step = steps[library]
    run, peak, about = step(seq_len, attention, remat, weights)
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (1, seq_len), dtype=np.int32)
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = run(tokens)
        found = {"loss": loss, "seconds": time.perf_counter() - began, "peak_bytes": peak()}
        print(json.dumps(found | about), flush=True)


class Worker:
    """A variant in a process of its own."""

    def __init__(self, variant: str, seq_len: int, weights: str):
        command = [sys.executable, __file__, "--worker", variant, "--seq_len", str(seq_len), "--weights", weights]
        # The others need memory of the same GPU.
        ours = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        env = {**os.environ, **ours}
        self._variant, self._said = variant, tempfile.TemporaryFile("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
        self._process = subprocess.Popen(command, text=True, env=env, **pipes)

    def step(self) -> dict:
        """One step: {"loss", "seconds", "peak_bytes", "device", "dtype"}."""
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self._said.seek(0)
            last = (self._said.read().strip().splitlines() or ["it said nothing; -9 is what Linux does for memory"])[-1]
            raise SystemExit(f"{self._variant} ended with exit code {code}: {last}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def measure(seq_len: int, weights: str, rounds: int) -> list[dict]:
    """Every variant at one length, taking turns; the first step of each compiles and is not timed."""
    compared = variants()
    workers = {name: Worker(name, seq_len, weights) for name in compared}
    first = {name: w.step() for name, w in workers.items()}
    # The same weights and tokens: the first loss differs by the rounding of other summation orders alone.
    for pattern in ("s2", "full"):
        losses = {name: r["loss"] for name, r in first.items() if compared[name][1] == pattern}
        if max(losses.values()) - min(losses.values()) > TOLERANCE[first[PEER]["dtype"]]:
            raise SystemExit(f"the variants do not compute the same loss: {losses}")
    times: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(rounds):
        for name, w in workers.items():
            last = w.step()
            times[name].append(last["seconds"])
            first[name]["peak_bytes"] = last["peak_bytes"]
            print(f"T={seq_len} round {turn + 1}/{rounds}  {name:<26} {last['seconds']:7.2f} s", flush=True)
    for w in workers.values():
        w.close()
    peer, rate = times[PEER], None
    if product := times.pop(next(iter(MATMUL)), None):
        rate = 2 * SIDE**3 / statistics.median(product)
        print(f"T={seq_len} matrix product: {rate / 1e9:.0f} GFLOP/s", flush=True)

    def flops(name: str) -> dict[str, float]:
        each = useful_flops(seq_len, compared[name][1]) / statistics.median(times[name])
        return {"gflops": each / 1e9} | ({"share_of_matrix_product": each / rate} if rate else {})

    return [
        {
            "seq_len": seq_len,
            "variant": name,
            "device": first[name]["device"],
            "dtype": first[name]["dtype"],
            "first_loss": first[name]["loss"],
            "seconds": times[name],
            "tokens_per_second": seq_len / statistics.median(times[name]),
            "peak_bytes": first[name]["peak_bytes"],
            "speed_over_peer": statistics.median(p / s for p, s in zip(peer, times[name], strict=True)),
            "memory_over_peer": first[name]["peak_bytes"] / first[PEER]["peak_bytes"],
        }
        | flops(name)
        for name in times
    ]


def make_weights(folder: str) -> None:
    """A random model of SIZES as a Hugging Face folder, in a process of its own."""
    code = (
        "import sys, torch; from transformers import LlamaConfig, LlamaForCausalLM; torch.manual_seed(0); "
        f"c = LlamaConfig(**{SIZES!r}, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=False); "
        "LlamaForCausalLM(c).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, folder], check=True, stderr=subprocess.DEVNULL)


def main() -> None:
    """Measures and prints a table; --json keeps it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq_len", default="2048,8192", metavar="T,...", help="lengths (default: 2048,8192)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each variant (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="where to write the results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    weights = Path(tempfile.gettempdir(), "train_step_weights")
    parser.add_argument("--weights", default=str(weights), metavar="DIR", help="folder for the model")
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, int(args.seq_len), args.weights)
    if not Path(args.weights, "config.json").is_file():
        make_weights(args.weights)
    results = [r for t in args.seq_len.split(",") for r in measure(int(t), args.weights, args.rounds)]
    print(
        f"\n{'T':>6}  {'variant':<26} {'tokens/s':>9} {'peak GiB':>9} {'speed/peer':>11} {'memory/peer':>12} "
        f"{'GFLOP/s':>8} {'of products':>12}"
    )
    for r in results:
        print(
            f"{r['seq_len']:>6}  {r['variant']:<26} {r['tokens_per_second']:>9.0f} {r['peak_bytes'] / 2**30:>9.2f} "
            f"{r['speed_over_peer']:>11.2f} {r['memory_over_peer']:>12.2f} {r['gflops']:>8.0f} "
            + (f"{r['share_of_matrix_product']:>12.0%}" if "share_of_matrix_product" in r else "")
        )
    if args.json:
        hardware = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
        Path(args.json).write_text(
            json.dumps({"sizes": SIZES, "hardware": hardware, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
