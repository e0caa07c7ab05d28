"""Random heads and segments, a function with its gradients compiled as one, and tolerances with their reason."""

import jax
import numpy as np

from longlora_jax.config import MeshConfig
from longlora_jax.parallel.sharding import make_mesh

# Entries are sums of up to some 200 products of normal variables, each rounded to 6e-8 of its value: the largest
# difference of this file is 2e-6, at values of 5.
F32 = {"rtol": 1e-6, "atol": 5e-6}
# The plain and quick compiler: the same program, without the optimizations that take four fifths of the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def random_qkv(seed, b, t, n, k, h):
    """q, k, v and the gradient of the output, standard normal float32."""
    rng = np.random.default_rng(seed)
    shapes = (b, t, n, h), (b, t, k, h), (b, t, k, h), (b, t, n, h)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def random_segments(seed, b, t):
    """Packed rows [b, t]: runs of random lengths, ids in no order, some used twice, and padding (0) at the end."""
    rng = np.random.default_rng(seed)
    rows = [np.repeat(rng.integers(1, 5, t), rng.integers(1, 9, t))[:t] for _ in range(b)]
    for row in rows:
        row[t - rng.integers(0, t + 1) :] = 0
    return np.stack(rows).astype(np.int32)


def same_segment(segments):
    """Who is in one segment with whom: booleans that broadcast to [b, n, t, t]; True for rows without segments."""
    return True if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]


def run(function, q, k, v, d_out, options=QUICK):
    """function(q, k, v) and its gradients, compiled as one: out, d_q, d_k, d_v."""

    def both(q, k, v, d_out):
        out, pullback = jax.vjp(function, q, k, v)
        return out, *pullback(d_out)

    return jax.jit(both, compiler_options=options)(q, k, v, d_out)


def assert_close(ours, oracle, **tolerance):
    for name, x, y in zip(("out", "d_q", "d_k", "d_v"), ours, oracle, strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), y, err_msg=name, **(tolerance or F32))


def mesh_of(data=1, fsdp=1, context=1, tensor=1):
    sizes = MeshConfig(data=data, fsdp=fsdp, context=context, tensor=tensor)
    return make_mesh(sizes, jax.devices()[: data * fsdp * context * tensor])
