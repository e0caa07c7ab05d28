"""One layer's attention by length, forward and gradients: full, s2, rows of documents, and what is without cuDNN.

Useful FLOPs: the pairs that causality, groups and documents leave, forward and twice that backward. Full attention over
four rows of T/4 is what the kernel makes of groups without anything around it: `s2` cannot be faster for a pair.
The late half of a group of T/4 is also timed as devices of a context axis that hold half a group compute it: over two
sets of keys, its own and the early half's, and as the square of the whole group, whose early half is dropped.
"""

import functools
from collections.abc import Callable
from unittest import mock

from benchmarks.gpu.part import SHAPES, TINY_SHAPES, Part, jax_device, memory_limit, milliseconds

LENGTHS = (8192, 16_384, 32_768, 65_536, 131_072)


def main() -> None:
    """Every shape, length and pattern, shortest first."""
    part = Part(__doc__)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.attention import causal_pairs
    from longlora_jax.attention import kernels
    from longlora_jax.attention.attend import attend
    from longlora_jax.attention.blockwise import Rules
    from longlora_jax.attention.partial import Keys, Queries, attend_sets
    from longlora_jax.attention.patterns import FULL, Pattern

    shapes = TINY_SHAPES if part.tiny else SHAPES
    lengths = (256, 512) if part.tiny else LENGTHS
    dtype = "float32" if part.tiny else "bfloat16"
    part.head = jax_device() | {"dtype": dtype, "kernel": kernels.kernel_name(dtype)}
    part.head["kernel_packed"] = kernels.kernel_name(dtype, packed=True)
    limit, peak = memory_limit(), part.head.get("peak_tflops")

    def time_of(what: str, shape: str, t: int, attention: Callable, pairs: float, rows=1, queries=None, keys=None):
        """Times attention(q, k, v) of rows of so many queries and keys (t), of a window of t tokens."""
        n, kv, h = shapes[shape]

        def both(q, k, v, g):
            out, back = jax.vjp(attention, q, k, v)
            return out, *back(g)

        def measure():
            sizes = [(n, queries or t), (kv, keys or t), (kv, keys or t), (n, queries or t)]
            draws = zip(jax.random.split(jax.random.key(t), 4), sizes, strict=True)
            given = [jax.random.normal(key, (rows, tokens, heads, h), dtype) for key, (heads, tokens) in draws]
            compiled = jax.jit(both).lower(*given).compile()
            found = milliseconds(lambda: compiled(*given), jax.block_until_ready, 0.0 if part.tiny else 0.06)
            tflops = 3 * 4 * pairs * n * h / found["ms"] / 1e9
            found |= {"temp_bytes": compiled.memory_analysis().temp_size_in_bytes, "tflops": tflops}
            return found | ({"mfu": tflops / peak} if peak else {})

        row = {"what": what, "shape": shape, "seq_len": t}
        if limit and 16 * 2 * t * n * h > limit:  # q, k, v, output, their gradients, and as much again for temporaries
            part.run(row, lambda: {"skipped": "the card's memory"})
        else:
            part.run(row, measure)

    def case(what: str, shape: str, t: int, pattern, pairs: float, segments=None):
        time_of(what, shape, t, lambda q, k, v: attend(q, k, v, pattern, segment_ids=segments), pairs)

    def late_half(shape: str, t: int):
        half = t // 8

        def in_sets(q, k, v):
            own, early = Keys(k[:, half:], v[:, half:]), Keys(k[:, :half], v[:, :half])
            return attend_sets(q, None, [(own, Queries(), Rules()), (early, Queries(), Rules(causal=False))], 0.0)

        def squared(q, k, v):
            return attend(jnp.pad(q, ((0, 0), (half, 0), (0, 0), (0, 0))), k, v, FULL)[:, half:]

        for what, attention in (("in two sets", in_sets), ("as a square", squared)):
            sizes = {"queries": half, "keys": 2 * half}
            time_of(f"late half of a group, {what}", shape, t, attention, half * (half + 1) / 2 + half**2, **sizes)

    def packed(what: str, shape: str, t: int, count: int):
        ids = jnp.asarray(np.repeat(np.arange(1, count + 1), t // count)[None].astype(np.int32))
        case(what, shape, t, FULL, t * (t // count + 1) / 2, ids)

    for shape in shapes:
        for t in lengths:
            s2 = Pattern("s2", t // 4)
            for what, pattern in (("full", FULL), ("s2 G=T/4", s2), ("s2 G=4096", Pattern("s2", min(4096, t // 4)))):
                case(what, shape, t, pattern, causal_pairs(pattern, t))
            rows_of = functools.partial(attend, pattern=FULL)
            short = {"rows": 4, "queries": t // 4, "keys": t // 4}
            time_of("full, 4 rows of T/4", shape, t, rows_of, 4 * causal_pairs(FULL, t // 4), **short)
            late_half(shape, t)
            if t != lengths[1]:
                continue
            for count in (8, 64):
                packed(f"packed full, {count} documents", shape, t, count)
            with mock.patch.object(kernels, "gpu_fault", lambda *_, **__: "asked for"):
                case("blockwise full", shape, t, FULL, causal_pairs(FULL, t))
                case("blockwise s2", shape, t, s2, causal_pairs(s2, t))
                packed("blockwise packed full, 8 documents", shape, t, 8)
    part.save()


if __name__ == "__main__":
    main()
