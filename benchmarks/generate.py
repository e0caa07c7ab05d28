"""Reading and writing tokens beside transformers: float32 on a CPU, both in one process, by turns.

    python -m benchmarks.generate --json benchmarks/generate.json

SmolLM2-135M's shape with random weights, the same in both. A round is, for each: the prompt at once, then tokens one
by one (greedy, a cache, no early end). Every time is a median over rounds; the first round, in which one side compiles,
is not counted. Both have the same threads. Tokens must be equal, or nothing is written.
"""

import os
import platform
import statistics
import tempfile
import time

import jax
import numpy as np
import torch
import transformers

from longlora_jax import errors
from longlora_jax.errors import UserError
from longlora_jax.files import check_writable, write_json
from longlora_jax.generate.session import Session, complete
from longlora_jax.model.decoder import Llama, init_params
from longlora_jax.presets import smollm2_135m
from longlora_jax.weights.hf import save_hf


def ours(model: Llama, params, prompt: np.ndarray, new: int) -> tuple[float, float, list[int]]:
    """(seconds for the prompt and its first token, seconds for each later one, tokens)."""
    session = Session(model, params, 1, len(prompt) + new)
    times = [time.perf_counter()]
    session.read([prompt])
    (tokens,) = complete(session, new, on_token=lambda row, token: times.append(time.perf_counter()))
    return times[1] - times[0], (times[-1] - times[1]) / (new - 1), tokens


@torch.no_grad()
def theirs(model, prompt: np.ndarray, new: int) -> tuple[float, float, list[int]]:
    """The same of transformers, by its forward pass and its cache alone, which is less work than its generate()."""
    ids, cache, tokens = torch.from_numpy(prompt[None].astype(np.int64)), None, []
    times = [time.perf_counter()]
    while len(tokens) < new:
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        tokens.append(int(ids))
        times.append(time.perf_counter())
    return times[1] - times[0], (times[-1] - times[1]) / (new - 1), tokens


def main() -> None:
    """The command."""
    parser = errors.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", type=int, default=1000, help="tokens (default: %(default)s)")
    parser.add_argument("--new", type=int, default=32, help="tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="that count (default: %(default)s)")
    parser.add_argument("--json", required=True, metavar="FILE", help="where to write the results")
    args = parser.parse_args()
    check_writable(args.json)
    model = Llama(smollm2_135m())
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.PRNGKey(0))
    with tempfile.TemporaryDirectory() as folder:
        save_hf(f"{folder}/model", model.config, params)
        reference = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, args.prompt).astype(np.int32)
    sides = {
        "longlora_jax": lambda: ours(model, params, prompt, args.new),
        "transformers": lambda: theirs(reference, prompt, args.new),
    }
    rounds: dict[str, list] = {name: [] for name in sides}
    for _ in range(args.rounds + 1):
        for name, side in sides.items():
            rounds[name].append(side())
    if rounds["longlora_jax"][0][2] != rounds["transformers"][0][2]:
        raise UserError("the two sides wrote other tokens: one of them is wrong, so its time means nothing")
    summary = {}
    for name, results in rounds.items():
        prefill, decode = (statistics.median(r[i] for r in results[1:]) for i in (0, 1))
        summary[name] = {"prefill_seconds": prefill, "decode_tokens_per_second": 1 / decode}
        print(f"{name:14}{args.prompt / prefill:9.1f} tokens/s read {1 / decode:9.1f} tokens/s written")
    us, them = summary["longlora_jax"], summary["transformers"]
    ratios = {
        "prefill": them["prefill_seconds"] / us["prefill_seconds"],
        "decode": us["decode_tokens_per_second"] / them["decode_tokens_per_second"],
    }
    print(f"times as fast: {ratios['prefill']:.2f} read, {ratios['decode']:.2f} written")
    machine = {"cpu_cores": os.cpu_count(), "load_average": os.getloadavg()[0], "python": platform.python_version()}
    machine |= {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    plain = {name: [{"prefill_seconds": r[0], "seconds_a_token": r[1]} for r in rs] for name, rs in rounds.items()}
    head = {"shape": "SmolLM2-135M", "dtype": "float32", "prompt": args.prompt, "new": args.new, "machine": machine}
    write_json(args.json, head | {"times_as_fast": ratios, "summary": summary, "rounds": plain})


if __name__ == "__main__":
    errors.run(main)
