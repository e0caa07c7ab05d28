"""Prompts read and tokens written after them, by model and length: one row, a cache of all tokens.

Weights are random. Useful FLOPs of reading: every matrix once a token, and the causal pairs; over the card's dense peak
in 16 bits. A token after the prompt reads the weights and the whole cache once: bytes_per_second is that, over its
time. first_token_ms is that of a token which has nothing before it: the weights, and one block of the cache.
"""

import functools
import statistics
import time
from typing import NamedTuple
from unittest import mock

from benchmarks.gpu.part import Part, jax_device, memory_limit, random_leaves

NEW = 32


class Prompt(NamedTuple):
    """One prompt: sizes.MODELS' name, tokens, how many of them are computed at once, the slots of a cache's block."""

    model: str
    tokens: int
    chunk: int = 512
    piece: int | None = None  # model/cache.py's own


PROMPTS = [Prompt(m, t, c) for m in ("smollm2", "7b") for t in (16_384, 98_304) for c in (512, 4096)]
PROMPTS += [Prompt(m, 98_304, 4096, piece) for m in ("smollm2", "7b") for piece in (16_384, 32_768)]
TINY = [Prompt("tiny", 512, 128), Prompt("tiny", 512, 128, 128)]


def seconds_a_token(session) -> float:
    """The median of NEW tokens."""
    times = [time.perf_counter()]
    for _ in session.stream(NEW):
        times.append(time.perf_counter())
    return statistics.median(b - a for a, b in zip(times[1:-1], times[2:], strict=True))


def main() -> None:
    """Every prompt that fits the card."""
    part = Part(__doc__)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.gpu.sizes import MODELS
    from longlora_jax.generate.session import Session
    from longlora_jax.model import cache
    from longlora_jax.model.decoder import Llama, abstract_params
    from longlora_jax.plan.generation import reading_flops

    limit, dtype = memory_limit(), "float32" if part.tiny else "bfloat16"
    part.head = jax_device() | {"dtype": dtype, "limit_gib": limit / 2**30}
    peak = part.head.get("peak_tflops")
    held: dict[str, tuple] = {}

    def needed(case: Prompt) -> tuple[int, int]:
        """Bytes of the weights and of the cache."""
        c, size = MODELS[case.model], jnp.dtype(dtype).itemsize
        weights = sum(x.size for x in jax.tree.leaves(abstract_params(Llama(c))))
        return size * weights, size * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * case.tokens

    def measure(case: Prompt):
        if case.model not in held:
            held.clear()
            model = Llama(MODELS[case.model], dtype=jnp.dtype(dtype))
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract_params(model))
            held[case.model] = model, random_leaves(shapes)
        model, params = held[case.model]
        prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, case.tokens)
        with mock.patch.object(cache, "PIECE", case.piece):
            session = Session(model, params, 1, case.tokens + NEW, chunk=case.chunk)
        began = time.perf_counter()
        session.compile([case.tokens])
        found = {"compile_seconds": time.perf_counter() - began}
        session.mark()
        began = time.perf_counter()
        session.read([prompt])
        session.wait()
        seconds = time.perf_counter() - began
        token = seconds_a_token(session)
        session.rewind()
        flops = reading_flops(model.config, 0, case.tokens)
        found |= {"seconds": seconds, "tokens_per_second": case.tokens / seconds, "tflops": flops / seconds / 1e12}
        found |= {"mfu": found["tflops"] / peak} if peak else {}
        found |= {"token_ms": 1e3 * token, "first_token_ms": 1e3 * seconds_a_token(session)}
        return found | {"bytes_per_second": sum(needed(case)) / token}

    for case in TINY if part.tiny else PROMPTS:
        case = case._replace(piece=case.piece or cache.PIECE)
        if limit and sum(needed(case)) > 0.85 * limit:
            part.run(case._asdict(), lambda: {"skipped": "the card's memory"})
        else:
            part.run(case._asdict(), functools.partial(measure, case))
    part.save()


if __name__ == "__main__":
    main()
