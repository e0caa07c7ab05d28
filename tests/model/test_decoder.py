"""The model against transformers and PEFT on tiny random weights, and at its real sizes without any weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny import random_batch, random_params, tiny_config

from longlora_jax import presets
from longlora_jax.attention.patterns import Pattern
from longlora_jax.config import ATTENTION_TARGETS, MLP_TARGETS, LoraConfig
from longlora_jax.model.decoder import Llama, abstract_params, init_params, logical_axes
from longlora_jax.model.lora import merge_lora
from longlora_jax.model.trainable import census, combine, partition, trainable_mask
from longlora_jax.training.step import TrainState, loss_sums, train_step
from longlora_jax.weights.hf import load_hf
from longlora_jax.weights.hf_config import config_to_json

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CLOSE = {"rtol": 0, "atol": 1e-4}  # float32 sums of some hundred products in another order
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 3.0, 5.0]}
WAS_16 = {"original_max_position_embeddings": 16}
OPTIONS = {
    "mha": {"num_key_value_heads": 4},
    "gqa_tied": {"tie_word_embeddings": True},
    "odd_kv_heads": {"hidden_size": 18, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4},
    "odd_heads": {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 20, "head_dim": 4},
    "mqa_wide_heads": {"num_key_value_heads": 1, "head_dim": 10},
    "attention_bias": {"attention_bias": True},
    "mlp_bias_odd_vocab": {"mlp_bias": True, "vocab_size": 101, "tie_word_embeddings": True},
    "mistral": {"class": "Mistral", "sliding_window": None},
    "linear": {"rope": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
    "yarn": {"rope": {"rope_type": "yarn", "factor": 4.0, **WAS_16}},
    "llama3": {"rope": LLAMA3 | WAS_16},
    "longrope": {"rope": LONGROPE | WAS_16},
}


def hf_model(**options):
    """A random model of transformers in float32 with the shape of tiny_config."""
    kind, rope = options.pop("class", "Llama"), options.pop("rope", {"rope_type": "default"})
    written = {key for key in config_to_json(tiny_config(), "") if "rope" not in key and "dtype" not in key}
    sizes = {k: v for k, v in vars(tiny_config()).items() if k in written - {"model_type"}} | options
    config = getattr(transformers, f"{kind}Config")(**sizes, rope_parameters={"rope_theta": 5000.0, **rope})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * random if "norm" in name else 0.25 * random)
    return model


def load(model, folder, **options):
    """The same model here, through a folder that transformers wrote: (Llama, params)."""
    model.save_pretrained(folder)
    config, params = load_hf(str(folder))
    return Llama(config, **options), params


def logits(model, params, tokens, positions=None, segment_ids=None):
    return np.asarray(jax.jit(model.apply)({"params": params}, tokens, positions, segment_ids))


# These have nothing that another has not, here, below or in tests/weights/test_families.py.
ALSO_ELSEWHERE = ("gqa_tied", "odd_heads", "mistral")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow if x in ALSO_ELSEWHERE else ()) for x in OPTIONS]
)
def test_logits_equal_transformers(name, tmp_path):
    """Catches: a head that reads another's keys, a lost bias, eps, theta or rope factor, a transposed kernel."""
    theirs = hf_model(**OPTIONS[name])
    ours, params = load(theirs, tmp_path)
    tokens = np.asarray(random_batch(2, 40, vocab_size=ours.config.vocab_size)["tokens"])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert expected.std() > 0.5  # else the tolerance would say nothing
    np.testing.assert_allclose(logits(ours, params, tokens), expected, **CLOSE)


def test_positions_and_padding_equal_transformers(tmp_path):
    """Catches: positions that are counted and not read; padding that is seen, before or after the text."""
    theirs = hf_model()
    ours, params = load(theirs, tmp_path)
    tokens = np.asarray(random_batch(3, 24)["tokens"])
    mask = np.ones(tokens.shape, np.int32)
    mask[0, :7] = mask[1, 15:] = 0
    # Unequal steps: a shift of all positions would change nothing, rotary positions are relative.
    positions = np.cumsum(np.arange(24) % 3, dtype=np.int32) + np.array([[0], [1000], [5]], np.int32)
    with torch.no_grad():
        expected = theirs(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            position_ids=torch.tensor(positions, dtype=torch.long),
        ).logits.numpy()
    found = logits(ours, params, tokens, positions, mask)
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], **CLOSE)
    assert np.isfinite(found).all()


# Gradients against PEFT

# Keeps the gradients where the moments of a real optimizer would be.
KEEP_GRADIENTS = optax.GradientTransformation(lambda params: params, lambda grads, state, params: (grads, grads))
ADAPTED = {
    "longlora": ("longlora", LoraConfig(rank=4, alpha=16.0), {}),
    "longlora_tied_all_targets_rslora": (
        "longlora",
        LoraConfig(rank=3, alpha=5.0, targets=ATTENTION_TARGETS + MLP_TARGETS, rslora=True),
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "lora_q_v_mqa": ("lora", LoraConfig(rank=2, alpha=7.0, targets=("q_proj", "v_proj")), {"num_key_value_heads": 1}),
}


def torch_matrix(leaf, *, outputs: int):
    """[in, *out] or [*in, out] as torch keeps it: [out, in]; outputs: how many of the last axes are *out."""
    leaf = np.asarray(leaf)
    return leaf.reshape(-1, int(np.prod(leaf.shape[leaf.ndim - outputs :]))).T


def peft_adapters(model, lora: LoraConfig):
    """Yields (layer, path in our tree, module of PEFT) of every adapter."""
    for i, layer in enumerate(model.get_base_model().model.layers):
        for name in lora.targets:
            part = "mlp" if name in MLP_TARGETS else "self_attn"
            yield i, (part, name), getattr(getattr(layer, part), name)


def adapter_matrices(tree, layer: int, path, name: str):
    """(A [R, in], B [out, R]) of one adapter of a param tree, as PEFT keeps them."""
    leaves = tree["layers"][path[0]][path[1]]
    a, b = leaves["lora_a"][layer], leaves["lora_b"][layer]
    return torch_matrix(a, outputs=1), torch_matrix(b, outputs=b.ndim - 1)


@pytest.fixture(params=[pytest.param(x, marks=pytest.mark.slow if x == "longlora" else ()) for x in ADAPTED])
def adapted(request, tmp_path):
    """The same base and the same random adapters in PEFT and here: (mode, PEFT model, Llama, params)."""
    peft = pytest.importorskip("peft")
    mode, lora, options = ADAPTED[request.param]
    base = hf_model(**options)
    ours, params = load(base, tmp_path, lora=lora)
    shapes = abstract_params(ours)
    adapters, _ = partition(random_params(ours), trainable_mask(shapes, "lora"))
    theirs = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=list(lora.targets),
            use_rslora=lora.rslora,
            lora_dropout=0.0,
        ),
    )
    with torch.no_grad():
        for i, path, module in peft_adapters(theirs, lora):
            a, b = adapter_matrices(adapters, i, path, module)
            module.lora_A["default"].weight.copy_(torch.tensor(a))
            module.lora_B["default"].weight.copy_(torch.tensor(b))
    return mode, theirs, ours, combine(adapters, jax.tree.map(jnp.asarray, params))


def test_gradients_equal_peft(adapted):
    """Catches: a wrong adapter scale, heads of A or B mixed up, an o_proj adapter that reads too few axes, a tied
    embedding that gets half of its gradient, a mean over the wrong number of tokens."""
    mode, theirs, ours, params = adapted
    for name, parameter in theirs.named_parameters():
        trains = "lora_" in name or (mode == "longlora" and ("embed_tokens" in name or "norm" in name))
        parameter.requires_grad_(trains)
    batch = random_batch(2, 40)
    batch["loss_mask"] = batch["loss_mask"].at[0, 10:20].set(0).at[1, 30:].set(0)
    tokens = torch.tensor(np.array(batch["tokens"]), dtype=torch.long)
    labels = torch.where(torch.tensor(np.array(batch["loss_mask"])) == 1, tokens, -100)
    loss = theirs(input_ids=tokens, labels=labels).loss
    loss.backward()

    trains, frozen = partition(params, trainable_mask(params, mode))
    state = TrainState.create(model=ours, optimizer=KEEP_GRADIENTS, trainable=trains)
    state, values = jax.jit(train_step)(state, frozen, batch)
    np.testing.assert_allclose(values["loss"], loss.item(), **CLOSE)
    assert float(values["tokens"]) == (labels != -100).sum()
    grads = state.opt_state
    for i, path, module in peft_adapters(theirs, ours.lora):
        a, b = adapter_matrices(grads, i, path, module)
        for found, expected in ((a, module.lora_A), (b, module.lora_B)):
            expected = expected["default"].weight.grad.numpy()
            assert np.abs(expected).max() > 1e-2
            np.testing.assert_allclose(found, expected, **CLOSE, err_msg=f"layer {i} {path}")
    assert ("embed_tokens" in grads) == (mode == "longlora")
    if mode == "longlora":
        inner = theirs.get_base_model().model
        pairs = [(grads["embed_tokens"]["embedding"], inner.embed_tokens), (grads["norm"]["scale"], inner.norm)]
        for name in ("input_layernorm", "post_attention_layernorm"):
            pairs += [(grads["layers"][name]["scale"][i], getattr(layer, name)) for i, layer in enumerate(inner.layers)]
        for found, module in pairs:
            assert module.weight.grad.abs().max() > 1e-2
            np.testing.assert_allclose(found, module.weight.grad.numpy(), **CLOSE)


def test_merging_equals_peft(adapted):
    """Catches: a merge with another scale than the forward pass, a bias or an untouched kernel that changes."""
    _, theirs, ours, params = adapted
    merged = merge_lora(params, ours.lora)
    inner = theirs.merge_and_unload().model
    for part, names in (("self_attn", ATTENTION_TARGETS), ("mlp", MLP_TARGETS)):
        for name in names:
            leaves = merged["layers"][part][name]
            assert set(leaves) <= {"kernel", "bias"}
            for i, layer in enumerate(inner.layers):
                module = getattr(getattr(layer, part), name)
                kernel = leaves["kernel"][i]
                found = torch_matrix(kernel, outputs=1 if name == "o_proj" else kernel.ndim - 1)
                np.testing.assert_allclose(found, module.weight.detach().numpy(), rtol=0, atol=1e-6)
                if "bias" in leaves:
                    np.testing.assert_array_equal(leaves["bias"][i].reshape(-1), module.bias.detach().numpy())


# Sizes, axes and initial values


def test_every_weight_has_its_shape_and_axes():
    """Catches: a renamed weight, a lost layer axis, an axis that sharding.py would never find."""
    config = tiny_config(attention_bias=True, mlp_bias=True)
    model = Llama(config, lora=LoraConfig(rank=3, targets=("q_proj", "o_proj", "down_proj")))
    d, f, v, n, k, h, r, two = 16, 28, 37, 4, 2, 6, 3, 2

    def linear(inputs: str, outputs: str, sizes: dict, adapter: bool = False):
        def leaf(axes):
            return (two, *(sizes[a] for a in axes)), P("layers", *axes)

        axes_in, axes_out = inputs.split(), outputs.split()
        leaves = {"kernel": leaf(axes_in + axes_out), "bias": leaf(axes_out)}
        if adapter:
            leaves |= {"lora_a": leaf([*axes_in, "rank"]), "lora_b": leaf(["rank", *axes_out])}
        return leaves

    sizes = {"embed": d, "heads": n, "kv_heads": k, "head_dim": h, "mlp": f, "rank": r}
    norm = {"scale": ((two, d), P("layers", "norm"))}
    expected = {
        "embed_tokens": {"embedding": ((v, d), P("vocab", "embed"))},
        "layers": {
            "input_layernorm": norm,
            "post_attention_layernorm": norm,
            "self_attn": {
                "q_proj": linear("embed", "heads head_dim", sizes, adapter=True),
                "k_proj": linear("embed", "kv_heads head_dim", sizes),
                "v_proj": linear("embed", "kv_heads head_dim", sizes),
                "o_proj": linear("heads head_dim", "embed", sizes, adapter=True),
            },
            "mlp": {
                "gate_proj": linear("embed", "mlp", sizes),
                "up_proj": linear("embed", "mlp", sizes),
                "down_proj": linear("mlp", "embed", sizes, adapter=True),
            },
        },
        "norm": {"scale": ((d,), P("norm"))},
        "lm_head": {"kernel": ((d, v), P("embed", "vocab"))},
    }
    found = jax.tree.map(lambda shape, axes: (shape.shape, axes), abstract_params(model), logical_axes(model))
    assert found == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(model))} == {jnp.dtype(jnp.float32)}


def test_a_tied_model_without_adapters_has_no_more_leaves_than_it_needs():
    """Catches: an lm_head beside a tied embedding, empty adapters or biases where none are wanted."""
    model = Llama(tiny_config(tie_word_embeddings=True))
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model))
    names = {path[-1].key for path, _ in leaves}
    assert names == {"embedding", "kernel", "scale"} and len(leaves) == 1 + 2 + 4 + 3 + 1
    assert jax.tree.structure(logical_axes(model)) == jax.tree.structure(abstract_params(model))


@pytest.mark.parametrize(
    "config, total, kv_width",
    [
        (presets.llama2_7b(), 6_738_415_616, 4096),
        (presets.llama2_13b(), 13_015_864_320, 5120),
        (presets.llama2_70b(), 68_976_648_192, 1024),
    ],
    ids=["7b", "13b", "70b"],
)
def test_parameter_counts_of_the_paper(config, total, kv_width):
    """Catches: a preset with a wrong size, a group of leaves that trains or freezes against the method."""
    shapes = abstract_params(Llama(config, lora=LoraConfig()))
    counts = census(shapes, trainable_mask(shapes, "longlora"))
    d, layers = config.hidden_size, config.num_hidden_layers
    expected = {
        "lora": layers * 8 * (2 * (d + d) + 2 * (d + kv_width)),  # q and o, k and v
        "embedding": 32_000 * d,
        "norm": (2 * layers + 1) * d,
    }
    assert {name: c["trainable"] for name, c in counts.items() if c["trainable"]} == expected
    assert sum(c["frozen"] for c in counts.values()) + expected["embedding"] + expected["norm"] == total
    if d == 4096:
        assert expected == {"lora": 8_388_608, "embedding": 131_072_000, "norm": 266_240}
        assert sum(expected.values()) == 139_726_848


def test_initial_values():
    """Catches: adapters that start by changing the model, and an A whose range forgets an axis that it reads."""
    lora = LoraConfig(rank=8, targets=ATTENTION_TARGETS + MLP_TARGETS)
    model = Llama(tiny_config(hidden_size=48, initializer_range=0.1), lora=lora)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0, impl="rbg"))  # compiles fast
    inputs = {
        "q_proj": 48,
        "k_proj": 48,
        "v_proj": 48,
        "o_proj": 4 * 6,
        "gate_proj": 48,
        "up_proj": 48,
        "down_proj": 28,
    }
    for part in ("self_attn", "mlp"):
        for name, leaves in params["layers"][part].items():
            assert not leaves["lora_b"].any()
            assert 0.9 < float(jnp.abs(leaves["lora_a"]).max()) * inputs[name] ** 0.5 <= 1, name
            assert 0.08 < float(leaves["kernel"].std()) < 0.12
            assert (leaves["kernel"][0] != leaves["kernel"][1]).all()  # layers draw their own numbers
    assert (params["norm"]["scale"] == 1).all()


# Ways of computing


def test_remat_policies_agree_and_save_memory():
    """Catches: a policy that does nothing, one that drops a gradient, products that "dots" computes again."""
    lora = LoraConfig(rank=2, targets=("q_proj",))
    config = tiny_config(num_hidden_layers=6)
    params = random_params(Llama(config, lora=lora))
    batch = random_batch(1, 64)
    memory, results, products = {}, {}, {}
    for remat in ("none", "dots", "attention", "block"):
        model = Llama(config, lora=lora, pattern=Pattern("short", 32), remat=remat)
        loss = functools.partial(loss_sums, model=model, loss_chunk=64)
        step = jax.jit(jax.value_and_grad(lambda p, loss=loss: loss(p, batch)[0]))
        step = step.lower(params).compile()
        memory[remat] = step.memory_analysis().temp_size_in_bytes
        results[remat], products[remat] = step(params), step.as_text().count(" dot(")
    # All but the adapter's first, x A, which is thin.
    assert products["none"] <= products["dots"] <= products["none"] + 1 < products["attention"] < products["block"]
    assert memory["block"] < memory["attention"] < memory["dots"] < memory["none"]
    for remat in ("dots", "attention", "block"):
        # The same operations fused otherwise: sums of float32 in another order, no more.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), results[remat], results["none"]
        )


def test_bfloat16_is_near_float32():
    """Catches: positions, scores or norms in bf16, which are far off at position 3,000 or over wide rows."""
    model = Llama(tiny_config(), dtype=jnp.bfloat16)
    params = random_params(model)
    tokens = random_batch(2, 40)["tokens"]
    positions = jnp.broadcast_to(3000 + 7 * jnp.arange(40), tokens.shape)
    half = logits(model, params, tokens, positions)
    full = logits(model.clone(dtype=jnp.float32), params, tokens, positions)
    assert half.dtype == np.float32
    # A bf16 number is off by 2**-9 at most; 2 layers of about 12 roundings each add up to 2% at random.
    assert np.linalg.norm(half - full) / np.linalg.norm(full) < 0.03
    hidden = jax.eval_shape(functools.partial(model.apply, method="hidden"), {"params": params}, tokens)
    assert hidden.dtype == jnp.bfloat16


def test_adapter_dropout_needs_a_key():
    """Catches: dropout at evaluation, and a dropout that reaches the base weights."""
    lora = LoraConfig(rank=2, dropout=0.5)
    model = Llama(tiny_config(), lora=lora)
    params, tokens = random_params(model), random_batch(1, 16)["tokens"]
    apply = jax.jit(lambda params, rngs: model.apply({"params": params}, tokens, rngs=rngs))
    still, same, other = (apply(params, {"dropout": jax.random.PRNGKey(i)}) for i in (0, 0, 1))
    assert (still == same).all() and (still != other).any()
    base = Llama(model.config)
    np.testing.assert_allclose(logits(model, params, tokens), logits(base, merge_lora(params, lora), tokens), **CLOSE)
    off = jax.tree_util.tree_map_with_path(lambda p, x: x * (p[-1].key != "lora_b"), params)
    np.testing.assert_allclose(apply(off, {"dropout": jax.random.PRNGKey(2)}), logits(model, off, tokens), **CLOSE)
