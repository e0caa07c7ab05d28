"""Embedding and loss over a mesh: rows and the sequence cut over devices, every device its own tokens."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from longlora_jax.attention.context_parallel import row_axes
from longlora_jax.model.losses import cross_entropy, token_nll


def embed_on_mesh(embedding, tokens, mesh: Mesh | None, dtype, *, chunks: int = 1):
    """embedding[tokens] in dtype: [V, D] and [B, T] give [B, T, D], where activations live.

    Every device looks up its columns for the tokens of all devices that share the embedding with it, and sends them
    home: nobody holds the whole embedding, or a whole row of activations. chunks: so many shares of a device's tokens,
    one after another.
    """
    if mesh is None or mesh.size == 1:
        return embedding[tokens].astype(dtype)
    shared = ("fsdp", "context")
    rows = row_axes(tokens.shape[0], mesh)

    def local(columns, tokens):
        if chunks == 1 or tokens.shape[1] % chunks:
            return share(columns, tokens)
        pieces = tokens.reshape(tokens.shape[0], chunks, -1).swapaxes(0, 1)
        found = jax.lax.map(lambda piece: share(columns, piece), pieces)
        return found.swapaxes(0, 1).reshape(*tokens.shape, -1)

    def share(columns, tokens):
        everyone = jax.lax.all_gather(tokens, shared)  # [n, b, t]
        first = jax.lax.axis_index("tensor") * columns.shape[0]
        here = (everyone >= first) & (everyone < first + columns.shape[0])
        found = columns[jnp.where(here, everyone - first, 0)].astype(dtype)
        found = jax.lax.psum(jnp.where(here[..., None], found, 0), "tensor")  # one of them has the token
        return jax.lax.all_to_all(found, shared, split_axis=0, concat_axis=3, tiled=True)[0]

    specs = (P("tensor", shared), P(rows, "context"))
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(rows, "context", None), check_vma=False)
    return run(embedding, tokens)


def neftune_noise(key, x, alpha: float, segment_ids=None):
    """Uniform noise in +-alpha / sqrt(L D) for embeddings x [B, T, D]. arXiv:2310.05914.

    L: tokens of the sequence that a token belongs to: its segment, or the whole row without segment_ids [B, T].
    """
    lengths = jnp.full(x.shape[:2], x.shape[1])
    if segment_ids is not None:
        lengths = jax.vmap(lambda row: jnp.bincount(row, length=row.size + 1)[row])(segment_ids)
    bound = alpha * jax.lax.rsqrt((lengths * x.shape[2]).astype(jnp.float32))
    noise = jax.random.uniform(key, x.shape, jnp.float32, -1, 1)
    return (noise * jnp.broadcast_to(bound[..., None], x.shape)).astype(x.dtype)


def cross_entropy_on_mesh(hidden, kernel, targets, weights, mesh: Mesh | None, *, chunk: int, softcap=None):
    """losses.cross_entropy with every device scoring its own tokens, in chunks of its own.

    hidden: [B, T, D]; kernel: [D, V], gathered on every device; targets, weights: [B, T]. The tokens of a tensor axis,
    which all of its devices hold, are shared out among them where they divide.
    """
    if mesh is None or mesh.size == 1:
        return cross_entropy(hidden, kernel, targets, weights, chunk=chunk, softcap=softcap)
    rows = row_axes(hidden.shape[0], mesh)
    sequence = ("context", "tensor")
    if hidden.shape[1] % (mesh.shape["context"] * mesh.shape["tensor"]):
        sequence = ("context",)

    def local(hidden, kernel, targets, weights):
        sums = cross_entropy(hidden, kernel, targets, weights, chunk=chunk, softcap=softcap)
        return jax.lax.psum(sums, (*rows, *sequence))

    specs = (P(rows, sequence, None), P(), P(rows, sequence), P(rows, sequence))
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), P()), check_vma=False)
    return run(hidden, kernel, targets, weights)


def token_nll_on_mesh(hidden, kernel, targets, mesh: Mesh | None, *, softcap=None):
    """losses.token_nll with every device scoring its own tokens; hidden: [B, T, D], targets: [B, T]."""
    if mesh is None or mesh.size == 1:
        return token_nll(hidden, kernel, targets, softcap=softcap)
    here = P(row_axes(hidden.shape[0], mesh), "context")
    run = jax.shard_map(
        functools.partial(token_nll, softcap=softcap),
        mesh=mesh,
        in_specs=(here, P(), here),
        out_specs=here,
        check_vma=False,
    )
    return run(hidden, kernel, targets)
