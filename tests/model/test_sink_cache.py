"""Sinks and a rolling window: what StreamingLLM defines, token by token, in memory that does not grow."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params, tiny_config

from longlora_jax.attention.rope import RopeScaling, rope_frequencies
from longlora_jax.generate import generate
from longlora_jax.generate.session import Session, complete
from longlora_jax.model.decoder import Llama

SINKS, WINDOW = 3, 12
YARN = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)


def from_scratch(model: Llama, params, tokens, sinks: int, window: int) -> np.ndarray:
    """Logits [T, V] by the letter of arXiv:2309.17453: one token at a time, a list of unrotated keys from which the
    oldest behind the sinks goes, rotated anew for every token by their places in the list; float64."""
    c = model.config
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    inv_freq, factor = rope_frequencies(
        head_dim=c.head_dim, theta=c.rope_theta, scaling=c.rope_scaling, seq_len=sinks + window
    )
    angles = np.arange(sinks + window)[:, None] * inv_freq[None].astype(np.float64)
    cos, sin = np.cos(angles)[:, None] * factor, np.sin(angles)[:, None] * factor

    def norm(x, scale):
        return x / np.sqrt((x * x).mean() + c.rms_norm_eps) * scale

    def turn(x, places):  # [places, heads, H]
        one, two = np.split(x, 2, axis=-1)
        return np.concatenate([one * cos[places] - two * sin[places], two * cos[places] + one * sin[places]], -1)

    layers, rep = p["layers"], c.num_attention_heads // c.num_key_value_heads
    lists: list[tuple[list, list]] = [([], []) for _ in range(c.num_hidden_layers)]
    logits = []
    for token in tokens:
        x = p["embed_tokens"]["embedding"][token]
        for i, (keys, values) in enumerate(lists):
            attention, mlp = layers["self_attn"], layers["mlp"]
            y = norm(x, layers["input_layernorm"]["scale"][i])
            q, k, v = (np.einsum("d,dnh->nh", y, attention[f"{n}_proj"]["kernel"][i]) for n in "qkv")
            if len(keys) == sinks + window:
                del keys[sinks], values[sinks]
            keys.append(k)
            values.append(v)
            places = np.arange(len(keys))
            k = np.repeat(turn(np.stack(keys), places), rep, axis=1)
            v = np.repeat(np.stack(values), rep, axis=1)
            scores = np.einsum("nh,snh->ns", turn(q[None], places[-1:])[0], k) / np.sqrt(c.head_dim)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            y = np.einsum("ns,snh->nh", weights / weights.sum(-1, keepdims=True), v)
            x = x + np.einsum("nh,nhd->d", y, attention["o_proj"]["kernel"][i])
            y = norm(x, layers["post_attention_layernorm"]["scale"][i])
            gate, up = y @ mlp["gate_proj"]["kernel"][i], y @ mlp["up_proj"]["kernel"][i]
            x = x + (gate / (1 + np.exp(-gate)) * up) @ mlp["down_proj"]["kernel"][i]
        logits.append(norm(x, p["norm"]["scale"]) @ p["lm_head"]["kernel"])
    return np.stack(logits)


def model_and_tokens(length: int, rows: int = 1, **options):
    model = Llama(tiny_config(**options))
    tokens = np.random.default_rng(2).integers(0, 37, (rows, length)).astype(np.int32)
    return model, random_params(model, seed=1), tokens


def after_each(session: Session, tokens) -> np.ndarray:
    """Logits [T, V] after each token of a row that is read one by one."""
    found = []
    for token in tokens:
        session.read([np.array([token], np.int32)])
        found.append(np.asarray(session._logits[0]))
    return np.stack(found)


@pytest.mark.parametrize(
    "options, sinks",
    [pytest.param({}, SINKS, marks=pytest.mark.slow), ({"rope_scaling": YARN}, SINKS), ({}, 0)],
    ids=["sinks", "yarn", "no sinks"],
)
def test_equals_a_reference_that_recomputes_everything(options, sinks):
    """Catches: positions that go on growing, a sink that is evicted, a window one too long, keys rotated twice."""
    model, params, tokens = model_and_tokens(50, **options)
    expected = from_scratch(model, params, tokens[0], sinks, WINDOW)
    full = np.asarray(jax.jit(model.apply)({"params": params}, tokens))[0]
    session = Session(model, params, 1, 1, sinks=sinks, window=WINDOW, chunk=8)
    found = after_each(session, tokens[0])
    # Logits of about 4, float32 against float64.
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)
    np.testing.assert_allclose(found[: sinks + WINDOW], full[: sinks + WINDOW], rtol=0, atol=5e-5)
    assert np.abs(found - full)[sinks + WINDOW :].max(-1).min() > 1e-3  # every later token lost something


@pytest.mark.parametrize("chunk", [5, pytest.param(WINDOW, marks=pytest.mark.slow), 64])
def test_chunks_give_what_single_tokens_give(chunk):
    """Catches: a chunk that evicts what its first tokens still see, padding that lands on a key in use, a token that
    sees all of its chunk."""
    model, params, tokens = model_and_tokens(100, rows=3)
    lengths = (100, 41, 2)
    session = Session(model, params, 3, 1, sinks=SINKS, window=WINDOW, chunk=chunk)
    session.read([row[:length] for row, length in zip(tokens, lengths, strict=True)])
    for row, length in enumerate(lengths):
        expected = from_scratch(model, params, tokens[row, :length], SINKS, WINDOW)[-1]
        np.testing.assert_allclose(session._logits[row], expected, rtol=0, atol=5e-5)


def test_scores_of_a_whole_chunk():
    """Catches: logits of a chunk's inner tokens that are not those of the tokens by themselves."""
    from longlora_jax.model.cache import new_cache

    model, params, tokens = model_and_tokens(96)
    expected = from_scratch(model, params, tokens[0], SINKS, WINDOW)
    cache = new_cache(model.config, 1, 1, dtype=jnp.float32, chunk=32, sinks=SINKS, window=WINDOW)
    run = jax.jit(lambda tokens, cache: model.apply({"params": params}, tokens, cache=cache))
    for start in range(0, 96, 32):
        logits, cache = run(tokens[:, start : start + 32], cache)
        cache = cache.replace(lengths=cache.lengths + 32, layer=jnp.zeros_like(cache.layer))
        np.testing.assert_allclose(logits[0], expected[start : start + 32], rtol=0, atol=5e-5)


def test_generates_what_the_reference_continues():
    """Catches: drawn tokens that are read at another place than a prompt's."""
    model, params, tokens = model_and_tokens(40)
    found = generate(model, params, tokens, max_new_tokens=40, sinks=SINKS, window=WINDOW)[0]
    logits = from_scratch(model, params, [*tokens[0], *found], SINKS, WINDOW)
    assert logits[39:-1].argmax(-1).tolist() == found


def endless(tokens: int, chunk: int) -> None:
    """Reads and writes so many tokens, half of them each; memory stays, and the end equals the reference."""
    model, params, prompt = model_and_tokens(tokens // 2)
    session = Session(model, params, 1, 1, sinks=SINKS, window=WINDOW, chunk=chunk)
    session.read([prompt[0][:chunk]])
    written = complete(session, 10)[0]
    gc.collect()
    before = sum(x.nbytes for x in jax.live_arrays())
    session.read([prompt[0][chunk:]])
    written += complete(session, tokens // 2 - 10)[0]
    gc.collect()
    assert sum(x.nbytes for x in jax.live_arrays()) == before
    assert session._cache.keys.shape[3] <= 2 * (SINKS + WINDOW + chunk)
    # Whoever drew a whole stream did not read its last token.
    history = [*prompt[0][:chunk], *written[:9], *prompt[0][chunk:], *written[10:]]
    # What is farther back than a window for each layer reaches the end through the sinks alone.
    tail = history[-1 - (model.config.num_hidden_layers + 2) * WINDOW : -1]
    expected = from_scratch(model, params, [*history[:SINKS], *tail], SINKS, WINDOW)[-1]
    np.testing.assert_allclose(session._logits[0], expected, rtol=0, atol=5e-5)
    assert session.lengths[0] == len(history) - 1


@pytest.mark.slow
def test_a_few_hundred_tokens_take_the_memory_of_a_few():
    """Catches: a cache that grows, angles that lose their precision with the distance from the start."""
    endless(300, chunk=32)


@pytest.mark.slow
def test_twenty_thousand_tokens_take_the_memory_of_a_few():
    """Catches: the same, later."""
    endless(20_000, chunk=64)
