"""Rows of tokens that a model has read, and what it says next.

One function advances a model over a cache, by a chunk of a prompt or by one token; one draws a token from logits.
The loop over tokens is Python's: the next step is under way on the device before the last token is looked at.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlora_jax.attention.kernels import platform
from longlora_jax.attention.patterns import FULL
from longlora_jax.errors import UserError
from longlora_jax.model.cache import Cache, cache_shardings, new_cache
from longlora_jax.model.decoder import Llama
from longlora_jax.model.layers import frequencies_of
from longlora_jax.model.losses import output_kernel, output_logits
from longlora_jax.parallel.sharding import AXES

SEEDS = 2**32
COLDEST = 1e-6  # below it logits would leave float32's range, and all but the likeliest token is as good as ruled out
LEAST_CHUNK = 16  # tokens; the end of a prompt comes in a chunk of a power of two, so that few shapes are compiled


class Sampling(NamedTuple):
    """How a token is drawn: temperature 0 takes the likeliest; top_k 0 and top_p 1 leave all of them."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def validate(self) -> None:
        """Raises UserError."""
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"temperature={self.temperature:g}, top_k={self.top_k}, top_p={self.top_p:g}: the first two must be 0 "
                "or more, top_p above 0 and at most 1"
            )


GREEDY = Sampling()


def warp(logits, sampling: Sampling):
    """Logits [B, V] f32 as transformers changes them before it draws: temperature, then top_k, then top_p.

    What is ruled out is -inf. temperature must be COLDEST or more.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        rising = jnp.sort(logits, axis=-1)
        # The unlikeliest go as long as they sum up to no more than 1 - top_p; the likeliest always stays.
        gone = jnp.cumsum(jax.nn.softmax(rising, axis=-1), axis=-1) <= 1 - sampling.top_p
        first = jnp.minimum(gone.sum(-1, keepdims=True), logits.shape[-1] - 1)
        order = jnp.argsort(jnp.argsort(logits, axis=-1, stable=True), axis=-1)
        logits = jnp.where(order < first, -jnp.inf, logits)
    return logits


@functools.partial(jax.jit, static_argnums=1)
def draw(logits, sampling: Sampling, seed, step):
    """One token [B] int32 for each row of logits [B, V]; each row and step has random numbers of its own."""
    if sampling.temperature < COLDEST:
        return logits.argmax(-1).astype(jnp.int32)
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, warp(logits, sampling)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 5))
def _advance(model: Llama, params, cache, tokens, counts, logits):
    """Reads tokens [B, T], the first counts [B] of each row; logits [B, V] f32 are those after a row's last token."""
    hidden: Any = model.apply({"params": params}, tokens, cache=cache, method="hidden")
    x, cache = hidden
    last = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    new = output_logits(last, output_kernel(params), model.config.final_logit_softcapping)
    logits = jnp.where(counts[:, None] > 0, new, logits)
    cache = cache.replace(lengths=cache.lengths + counts, layer=jnp.zeros_like(cache.layer))
    if model.mesh is not None:
        places = (cache_shardings(cache, model.mesh), NamedSharding(model.mesh, P()))
        cache, logits = jax.lax.with_sharding_constraint((cache, logits), places)
    return cache, logits


def as_read(model: Llama) -> Llama:
    """A model as a session runs it: full attention over a cache, a row's tokens together on every mesh."""
    mesh = None if model.mesh is None else _whole_rows(model.mesh)
    return model.clone(mesh=mesh, pattern=FULL, remat="none", chunks=1)


def trace_step(model: Llama, params, cache: Cache, t: int):
    """What reads t tokens of each row into a cache, jax.stages.Traced, of a model out of as_read.

    params, cache: arrays or jax.ShapeDtypeStruct with their shardings.
    """
    rows = cache.keys.shape[1]
    place = None if model.mesh is None else NamedSharding(model.mesh, P())
    small = functools.partial(jax.ShapeDtypeStruct, sharding=place)
    tokens, counts = small((rows, t), jnp.int32), small((rows,), jnp.int32)
    logits = small((rows, model.config.vocab_size), jnp.float32)
    return _advance.trace(model, params, cache, tokens, counts, logits)


def chunk_size(chunk: int | None, where: str | None = None) -> int:
    """How many tokens of a prompt are computed at once: as asked for, None for what suits a platform.

    where: the platform, None for the one that JAX runs on. Measured on an H200: 4,096 take about half the time of 512
    for a 7B, a fifth for a model of 135M (docs/measured.md).
    """
    return (4096 if (where or platform()) == "gpu" else 512) if chunk is None else chunk


def fitting_chunk(chunk: int, tokens: int) -> int:
    """How many tokens are computed at once where no more than `tokens` come: a power of two, or a whole chunk."""
    return min(chunk, max(LEAST_CHUNK, 1 << (int(tokens) - 1).bit_length()))


class Session:
    """Rows that a model reads and continues: read() and then stream(), in any turns.

    rows: how many; tokens: the most that a row may come to; chunk: how many of a prompt are computed at once
    (chunk_size).
    sinks, window: remember so many first and last tokens instead of all, and take any number (see model/cache.py).
    lengths: [rows] tokens read so far, drawn ones included. Positions are absolute, and those of a row do not depend on
    its neighbours: a row gives what it would give alone. Scalings that go by length (dynamic, longrope) rotate what is
    read at once by the length that the row comes to with it, and each drawn token by the length with it, as
    transformers does.
    """

    def __init__(
        self,
        model: Llama,
        params,
        rows: int,
        tokens: int,
        *,
        chunk: int | None = None,
        sinks: int = 0,
        window: int = 0,
    ):
        chunk = chunk_size(chunk)
        if rows < 1 or tokens < 1 or chunk < 1 or sinks < 0 or window < 0 or (sinks and not window):
            raise UserError(
                f"{rows=}, {tokens=}, {chunk=}, {sinks=}, {window=}: the first three must be 1 or more, sinks need a "
                "window of 1 token or more"
            )
        self.model = as_read(model)
        mesh = self.model.mesh
        self._params, self._capacity, self._window = params, tokens, window
        self._chunk = chunk if window else fitting_chunk(chunk, tokens)
        cache = {"dtype": model.dtype, "chunk": self._chunk, "sinks": sinks, "window": window, "mesh": mesh}
        self._cache = new_cache(model.config, rows, tokens, **cache)
        zeros = functools.partial(jnp.zeros, (rows, model.config.vocab_size), jnp.float32)
        self._logits = jax.jit(zeros, out_shardings=None if mesh is None else NamedSharding(mesh, P()))()
        self.lengths = np.zeros(rows, np.int64)
        self._mark: Any = None

    def read(self, rows: Sequence[np.ndarray], progress: Callable[[int], Any] = lambda tokens: None) -> None:
        """Reads ids [tokens] int of each row, of any lengths; progress is told how many of the longest were read."""
        counts = np.array([len(ids) for ids in rows])
        self._check(self.lengths + counts)
        self._rotate_by(self.lengths + counts)
        for start in range(0, counts.max(), self._chunk):
            size = self._size(counts.max() - start)
            here = np.clip(counts - start, 0, size)
            tokens = np.zeros((len(rows), size), np.int32)
            for row, ids, count in zip(tokens, rows, here, strict=True):
                row[:count] = ids[start : start + count]
            self._step(tokens, here.astype(np.int32))
            progress(int(here.max()))
        self.lengths = self.lengths + counts

    def stream(self, limit: int, sampling: Sampling = GREEDY, seed: int = 0) -> Iterator[np.ndarray]:
        """Draws up to `limit` tokens for every row and yields them [rows] int32 as they come.

        Whoever stops earlier finds all tokens yielded so far read; of a whole stream the last one is not.
        """
        sampling.validate()
        if not 0 <= seed < SEEDS:
            raise UserError(f"{seed=}: give 0 to {SEEDS - 1}")
        ones = np.ones(len(self.lengths), np.int32)
        self._check(self.lengths + limit - 1)
        for step in range(limit):
            tokens = draw(self._logits, sampling, np.uint32(seed), step)
            if step < limit - 1:
                self._rotate_by(self.lengths + 1)
                self._step(tokens[:, None], ones)
                self.lengths = self.lengths + 1
            yield np.asarray(tokens)

    def mark(self) -> None:
        """Remembers this point for rewind()."""
        # A cache of all tokens is rewound by its lengths: what was written since is written over. A ring has lost some.
        is_ring = self._window or any(self.model.config.windows)
        cache = jax.tree.map(jnp.copy, self._cache) if is_ring else None
        self._mark = (self.lengths, jnp.copy(self._logits), cache)

    def rewind(self) -> None:
        """Goes back to mark(), as often as needed."""
        lengths, logits, cache = self._mark
        if cache is None:
            place = self._cache.lengths.sharding
            self._cache = self._cache.replace(lengths=jax.device_put(lengths.astype(np.int32), place))
        else:
            self._cache = jax.tree.map(jnp.copy, cache)
        self.lengths, self._logits = lengths, jnp.copy(logits)

    def compile(self, reads: Iterable[int]) -> None:
        """Compiles what reads of so many tokens and stream() run, on tokens that do not count."""
        nobody = np.zeros(len(self.lengths), np.int32)
        whole = {self._chunk for tokens in reads if tokens >= self._chunk}
        for size in whole | {self._size(tokens % self._chunk) for tokens in reads if tokens % self._chunk}:
            self._step(np.zeros((len(nobody), size), np.int32), nobody)
        self._step(draw(self._logits, GREEDY, np.uint32(0), 0)[:, None], nobody)
        self.wait()

    def wait(self) -> None:
        """Waits until all that was read is computed."""
        self._logits.block_until_ready()

    def _size(self, tokens: int) -> int:
        return fitting_chunk(self._chunk, tokens)

    def _step(self, tokens, counts) -> None:
        self._cache, self._logits = _advance(self.model, self._params, self._cache, tokens, counts, self._logits)

    def _check(self, lengths: np.ndarray) -> None:
        if not self._window and lengths.max() > self._capacity:
            raise UserError(f"{lengths.max()} tokens do not fit a session of {self._capacity}: start one with more")

    def _rotate_by(self, lengths: np.ndarray) -> None:
        """Sets the frequencies of the tokens to come, where these depend on what their rows come to."""
        c = self.model.config
        if self._window or c.rope_scaling is None or c.rope_scaling.rope_type not in ("dynamic", "longrope"):
            return
        rows = np.stack([frequencies_of(c, int(length))[0] for length in lengths], axis=1)
        place = self._cache.frequencies.sharding
        self._cache = self._cache.replace(frequencies=jax.device_put(rows, place))


def complete(
    session: Session,
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    stop: Callable[[int, list[int]], bool] = lambda row, tokens: False,
    on_token: Callable[[int, int], Any] = lambda row, token: None,
) -> list[list[int]]:
    """Continues every row until one of eos_ids comes (it is kept), stop says so, or max_new_tokens are there.

    stop(row, tokens so far) and on_token(row, token) are called for each token, in order. Returns each row's tokens.
    """
    tokens: list[list[int]] = [[] for _ in session.lengths]
    running = set(range(len(tokens)))
    for drawn in session.stream(max_new_tokens, sampling, seed):
        for row in sorted(running):
            tokens[row].append(int(drawn[row]))
            on_token(row, tokens[row][-1])
            if tokens[row][-1] in eos_ids or stop(row, tokens[row]):
                running.remove(row)
        if not running:
            break
    return tokens


def _whole_rows(mesh: Mesh) -> Mesh:
    """The mesh with its context axis joined to fsdp: weights stay where they are, and a row's tokens together."""
    sizes = dict(mesh.shape)
    if sizes["context"] == 1:
        return mesh
    sizes |= {"fsdp": sizes["fsdp"] * sizes["context"], "context": 1}
    return Mesh(mesh.devices.reshape([sizes[axis] for axis in AXES]), AXES, axis_types=(AxisType.Auto,) * len(AXES))
