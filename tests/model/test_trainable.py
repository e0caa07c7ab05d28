"""The mask tree: which leaves train, the split and its inverse, and the same update by optax's own route."""

import functools
import math

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora_jax.config import ATTENTION_TARGETS, MLP_TARGETS, MODES, LoraConfig, ModelConfig, OptimConfig
from longlora_jax.errors import UserError
from longlora_jax.model.decoder import Llama, abstract_params
from longlora_jax.model.trainable import census, combine, count, partition, trainable_mask
from longlora_jax.training.optim import make_optimizer

LORA = LoraConfig(rank=2, targets=(*ATTENTION_TARGETS, *MLP_TARGETS))

# The same program without the optimizations that take most of the time of so small a tree.
QUICK = {"xla_backend_optimization_level": 0}


def tiny(**changes):
    sizes = {"vocab_size": 19, "hidden_size": 10, "intermediate_size": 14, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    rest = {"max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False}
    return ModelConfig(**(sizes | heads | rest | changes))


def paths(tree):
    return {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}


def llama2_7b():
    return tiny(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        head_dim=128,
        num_attention_heads=32,
        num_key_value_heads=32,
    )


NORMS = {"norm/scale", "layers/input_layernorm/scale", "layers/post_attention_layernorm/scale"}
PROJECTIONS = {f"layers/self_attn/{x}" for x in ATTENTION_TARGETS} | {f"layers/mlp/{x}" for x in MLP_TARGETS}
ADAPTERS = {f"{projection}/{leaf}" for projection in PROJECTIONS for leaf in ("lora_a", "lora_b")}


@pytest.mark.parametrize("tied", [False, True])
def test_what_each_mode_trains(tied):
    """LongLoRA without its norms or embedding; a bias or the head that trains along; a final norm left out."""
    config = tiny(attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    params = abstract_params(Llama(config, LORA))
    trained = {mode: paths(partition(params, trainable_mask(params, mode))[0]) for mode in MODES}
    assert trained["lora"] == ADAPTERS
    assert trained["lora_norm"] == ADAPTERS | NORMS
    assert trained["lora_embedding"] == ADAPTERS | {"embed_tokens/embedding"}
    assert trained["longlora"] == ADAPTERS | NORMS | {"embed_tokens/embedding"}
    head = set() if tied else {"lm_head/kernel"}
    weights = {f"{projection}/{leaf}" for projection in PROJECTIONS for leaf in ("kernel", "bias")}
    assert trained["full"] == trained["longlora"] | head | weights == paths(params)


def test_unknown_mode_is_one_clear_line():
    """A typing error that trains nothing or everything."""
    with pytest.raises(UserError, match="longlora") as error:
        trainable_mask({}, "lora+")
    assert "\n" not in str(error.value)


TREES = st.recursive(
    st.integers(0, 99).map(np.int32), lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, min_size=1)
)


@settings(max_examples=25)
@given(tree=st.dictionaries(st.sampled_from("abcd"), TREES, min_size=1), bits=st.integers(0, 2**60 - 1))
def test_combine_undoes_partition(tree, bits):
    """A leaf lost, doubled or moved; a frozen place kept as None, which optax would treat as a leaf."""
    leaves, shape = jax.tree.flatten(tree)
    for kind in (bool, np.bool_):  # a mask made by numpy comparisons works as well
        mask = jax.tree.unflatten(shape, [kind(bits >> i & 1) for i in range(len(leaves))])
        trainable, frozen = partition(tree, mask)
        assert paths(trainable) == {path for path in paths(tree) if dict(_flat(mask))[path]}
        assert paths(trainable) | paths(frozen) == paths(tree)
        assert not paths(trainable) & paths(frozen)
        assert combine(trainable, frozen) == combine(frozen, trainable) == tree
        assert None not in map(type, jax.tree.leaves((trainable, frozen), is_leaf=lambda x: x is None))
        assert {} not in jax.tree.leaves(list(trainable.values()), is_leaf=lambda x: x == {})


def _flat(tree):
    return [("/".join(k.key for k in path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def test_combine_refuses_a_leaf_of_both():
    """Two versions of a weight, of which one would silently win."""
    with pytest.raises(AssertionError, match="both partitions"):
        combine({"a": {"b": 1}}, {"a": {"b": 2}})
    with pytest.raises(AssertionError, match="both partitions"):
        combine({"a": {"b": 1}}, {"a": 2})


def test_census_of_llama2_7b():
    """The method's counts, exactly: what is printed before a run that takes days."""
    params = abstract_params(Llama(llama2_7b(), LoraConfig()))
    mask = trainable_mask(params, "longlora")
    assert census(params, mask) == {
        "lora": {"trainable": 8_388_608, "frozen": 0},
        "embedding": {"trainable": 131_072_000, "frozen": 0},
        "norm": {"trainable": 266_240, "frozen": 0},
        "attention": {"trainable": 0, "frozen": 32 * 4 * 4096**2},
        "mlp": {"trainable": 0, "frozen": 32 * 3 * 4096 * 11_008},
        "lm_head": {"trainable": 0, "frozen": 131_072_000},
    }
    trainable, frozen = partition(params, mask)
    assert count(trainable) == 139_726_848
    assert count(params) - 8_388_608 == 6_738_415_616
    assert count(trainable) + count(frozen) == count(params)


def optimizer():
    """The real one, with decay and a clip that is at work, so that frozen leaves would show in both."""
    config = OptimConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.1, clip_norm=0.5)
    return make_optimizer(config, steps=10)


def random_like(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def small_tree():
    params = random_like(abstract_params(Llama(tiny(), LORA)), 0)
    return params, trainable_mask(params, "longlora")


def three_steps(optimizer, params, gradients):
    step = jax.jit(optimizer.update, compiler_options=QUICK)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        params = jax.tree.map(np.add, params, updates)
    return params, state


# The other route: also test_step.py, as one whole step.
@pytest.mark.parametrize("route", ["multi_transform", pytest.param("masked", marks=pytest.mark.slow)])
def test_optax_masks_give_the_same_update(route):
    """Our split tree and optax's two ways of masking one tree, three steps of clip, warm-up, AdamW and decay."""
    params, mask = small_tree()
    trainable, frozen = partition(params, mask)
    gradients = [random_like(params, seed) for seed in (1, 2, 3)]
    ours, state = three_steps(optimizer(), trainable, [partition(gradient, mask)[0] for gradient in gradients])
    if route == "multi_transform":
        labels = jax.tree.map(lambda trains: "train" if trains else "freeze", mask)
        theirs = optax.multi_transform({"train": optimizer(), "freeze": optax.set_to_zero()}, labels)
    else:
        frozen_mask = jax.tree.map(lambda trains: not trains, mask)
        theirs = optax.chain(optax.masked(optimizer(), mask), optax.masked(optax.set_to_zero(), frozen_mask))
    oracle, _ = three_steps(theirs, params, gradients)
    # Bitwise, but for the order of the sum in the gradient's norm: 1e-7 of an update of 0.1.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, ours, partition(oracle, mask)[0])
    jax.tree.map(np.testing.assert_array_equal, frozen, partition(oracle, mask)[1])
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * count(trainable)  # nothing is kept for what is frozen


def test_the_trap_of_optax_masked():
    """Why the tree is split: optax.masked(adamw, mask) hands frozen leaves their raw gradients as updates."""
    params, mask = small_tree()
    gradients = random_like(params, 1)
    trap = optax.masked(optax.adamw(1e-3), mask)
    updates, _ = jax.jit(trap.update, compiler_options=QUICK)(gradients, trap.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, partition(updates, mask)[1], partition(gradients, mask)[1])
    assert math.isclose(float(np.abs(updates["norm"]["scale"]).max()), 1e-3, rel_tol=1e-2)  # a trained leaf, at lr
