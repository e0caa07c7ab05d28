"""Every family of models against transformers: logits, config.json, files written back, decoding, adapters."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from families import MODELS, config_json, make_folder, torch_model
from transformers import AutoConfig, AutoModelForCausalLM

from longlora_jax.errors import UserError
from longlora_jax.generate import generate
from longlora_jax.model.decoder import Llama, abstract_params
from longlora_jax.model.trainable import combine, count, partition, trainable_mask
from longlora_jax.model_config import LoraConfig
from longlora_jax.weights.hf import load_hf, save_hf
from longlora_jax.weights.hf_config import load_config
from longlora_jax.weights.peft import load_peft, open_peft
from longlora_jax.weights.peft_export import save_peft
from longlora_jax.weights.rules import build_params

TOKENS = np.random.default_rng(0).integers(3, 61, (2, 40))
CLOSE = {"rtol": 0, "atol": 1e-4}


def mostly_slow(names, *fast: str):
    """Parameters of a test, all slow but a few: each compiles programs of its own."""
    assert set(fast) <= set(names)
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = make_folder(tmp_path_factory.mktemp("model") / "m", name)
        return made[name]

    return get


def their_logits(model, tokens=TOKENS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


# Files and config.json of every variant; logits of one a family, as each is compiled anew.
COMPUTED = ("qwen2 upper layers slide", "qwen3", "mistral window", "phi4-mini", "smollm3", "olmo2", "granite", "gemma")
COMPUTED += ("gemma2", "gemma3", "stablelm 12b", "gpt_neox")


@pytest.mark.parametrize(
    ("name", "computed"),
    [
        pytest.param(name, computed, id=f"{name}, computed" if computed else name, marks=marks)
        for name in MODELS
        for computed, marks in ((name in COMPUTED, ()), (True, pytest.mark.slow))
        if not (name in COMPUTED and marks)
    ],
)
def test_logits_files_and_config_are_transformers(name, computed, folder, tmp_path):
    """Catches: a norm in another place, a multiplier, a bias, a window or a rotation that is forgotten; a file written
    back with other bytes or under other names, a config.json that makes another model."""
    config, params = load_hf(str(folder(name)))
    theirs = torch_model(folder(name))
    expected = their_logits(theirs)
    if computed:
        got = jax.jit(Llama(config).apply)({"params": params}, jnp.asarray(TOKENS, jnp.int32))
        np.testing.assert_allclose(got, expected, **CLOSE)
    # As transformers itself writes the config today.
    theirs.config.save_pretrained(tmp_path / "again")
    assert load_config(str(tmp_path / "again")) == config
    save_hf(str(tmp_path / "back"), config, params)
    assert load_config(str(tmp_path / "back")) == config
    one, other = (safetensors.numpy.load_file(f / "model.safetensors") for f in (folder(name), tmp_path / "back"))
    assert one.keys() == other.keys()
    for key, array in one.items():
        np.testing.assert_array_equal(other[key], array, key)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    assert type(back) is type(theirs)
    np.testing.assert_allclose(their_logits(back), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", mostly_slow(MODELS, "smollm3", "gemma2", "gpt_neox"))
def test_greedy_tokens_are_transformers(name, folder):
    """Catches: a ring of a window that loses a token or keeps one too long, a layer that reads another's keys."""
    config, params = load_hf(str(folder(name)))
    prompts = [TOKENS[0, :17].astype(np.int32), TOKENS[1, :23].astype(np.int32)]
    theirs, expected = torch_model(folder(name)), []
    theirs.generation_config.eos_token_id = None
    for prompt in prompts:
        ids = torch.from_numpy(prompt[None].astype(np.int64))
        how = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        expected.append(theirs.generate(ids, **how)[0, len(prompt) :].tolist())
    assert generate(Llama(config), params, prompts, max_new_tokens=24, chunk=7) == expected


ADAPTED = ["qwen2", "qwen3", "phi3", "olmo2", "gemma2", "gemma3", "stablelm", "stablelm 12b", "gpt_neox"]


def adapt(name: str, base, folder):
    """PEFT's own model of a base, all projections adapted, norms trained whole; and its folder."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    settings = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", mostly_slow(ADAPTED, "phi3", "gpt_neox"))
def test_adapters_and_their_gradients_are_pefts(name, folder, tmp_path):
    """Catches: an adapter of a fused matrix that is cut in the wrong place, a gradient that a norm or a multiplier
    bends, an export that PEFT reads as another update."""
    theirs = adapt(name, folder(name), tmp_path / "adapter")
    expected = their_logits(theirs)
    config, lora, params = load_peft(str(tmp_path / "adapter"), base=str(folder(name)))
    assert set(lora.targets) == set(config.targets)
    model, tokens = Llama(config, lora=lora), jnp.asarray(TOKENS, jnp.int32)

    def loss(trained, frozen):
        logits = model.apply({"params": combine(trained, frozen)}, tokens)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1).mean(), logits

    trained, frozen = partition(params, trainable_mask(params, "lora"))
    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(trained, frozen)
    np.testing.assert_allclose(logits, expected, **CLOSE)
    labels = torch.tensor(TOKENS)
    theirs(labels, labels=labels).loss.backward()
    wanted = {key: p.grad.numpy() for key, p in theirs.named_parameters() if "lora_" in key}
    compared = compare_gradients(config, gradients["layers"], wanted)
    assert compared == len(wanted)
    # Out again: PEFT reads ours as the same model, and so do we.
    save_peft(str(tmp_path / "ours"), config, lora, trained, base=str(folder(name)))
    base = AutoModelForCausalLM.from_pretrained(folder(name), attn_implementation="eager", dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    np.testing.assert_allclose(their_logits(again), expected, **CLOSE)
    _, table, _ = open_peft(str(tmp_path / "ours"), base=str(folder(name)))
    merged = jax.jit(Llama(config).apply)({"params": build_params(config, table)}, tokens)
    np.testing.assert_allclose(merged, expected, **CLOSE)


@pytest.mark.parametrize("name", [pytest.param("qwen3", marks=pytest.mark.slow), "gemma3", "gpt_neox", "stablelm 12b"])
def test_what_longlora_trains_goes_to_peft_whole(name, folder, tmp_path):
    """Catches: a norm of q or k, a LayerNorm's bias or an embedding under another name that PEFT does not put back."""
    config, base = load_hf(str(folder(name)))
    lora = LoraConfig(rank=2, targets=config.targets)
    model, rng = Llama(config, lora=lora), np.random.default_rng(2)
    shapes = abstract_params(model)
    params = combine(base, partition(shapes, trainable_mask(shapes, "lora"))[0])
    params = jax.tree.map(lambda x: np.asarray(x if isinstance(x, np.ndarray) else np.zeros(x.shape, x.dtype)), params)
    trained, frozen = partition(params, trainable_mask(params, "longlora"))
    trained = jax.tree.map(lambda x: (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32), trained)
    tokens = jnp.asarray(TOKENS, jnp.int32)
    ours = jax.jit(model.apply)({"params": combine(trained, frozen)}, tokens)
    save_peft(str(tmp_path / "ours"), config, lora, trained, base=str(folder(name)))
    theirs = AutoModelForCausalLM.from_pretrained(folder(name), attn_implementation="eager", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    np.testing.assert_allclose(their_logits(theirs), ours, **CLOSE)
    _, table, _ = open_peft(str(tmp_path / "ours"), base=str(folder(name)))
    merged = jax.jit(Llama(config).apply)({"params": build_params(config, table)}, tokens)
    np.testing.assert_allclose(merged, ours, **CLOSE)


def compare_gradients(config, ours, wanted) -> int:
    """Holds ours [L, ...] against PEFT's; A of a fused matrix is one there: its gradient is the sum of ours."""
    fused = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "query_key_value": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    plain = {"dense": "o_proj", "dense_h_to_4h": "up_proj", "dense_4h_to_h": "down_proj"}
    for key, array in wanted.items():
        layer, module = int(key.split("layers.")[1].split(".")[0]), key.split(".")[-4]
        letter = key.split(".lora_")[1][0]
        names = fused.get(module, (plain.get(module, module),))
        blocks = [ours["self_attn" if name in ours["self_attn"] else "mlp"][name] for name in names]
        if letter == "A":
            got = sum(np.asarray(b["lora_a"][layer]).reshape(-1, array.shape[0]).T for b in blocks)
        else:
            parts = [np.asarray(b["lora_b"][layer]) for b in blocks]
            if module == "query_key_value":
                parts = [part.reshape(part.shape[0], config.num_attention_heads, 1, -1) for part in parts]
                got = np.concatenate(parts, axis=2).reshape(array.shape[1], -1).T
            else:
                got = np.concatenate([part.reshape(part.shape[0], -1) for part in parts], axis=1).T
        np.testing.assert_allclose(got, array, err_msg=key, **CLOSE)
    return len(wanted)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model_type": "mixtral"}, "a mixture of experts"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "multimodal"),
        ({"model_type": "mamba2"}, "no attention"),
        ({"model_type": "gpt2"}, "it must be one of llama"),
        (config_json("stablelm") | {"qk_layernorm": 2}, "qk_layernorm"),
        (config_json("stablelm") | {"use_parallel_residual": "yes"}, "use_parallel_residual"),
        (config_json("gemma2") | {"layer_types": ["full_attention"]}, "layer_types"),
        (config_json("gemma2") | {"sliding_window": None}, "sliding_window"),
        (config_json("smollm3") | {"no_rope_layers": [1, 2, 1, 1, 1]}, "no_rope_layers"),
        (config_json("qwen2") | {"hidden_act": "relu"}, "hidden_act"),
        (config_json("phi4-mini") | {"partial_rotary_factor": 0.1}, "partial_rotary_factor"),
        (config_json("granite") | {"residual_multiplier": "much"}, "residual_multiplier"),
    ],
)
def test_another_model_is_refused_by_its_name(content, said, tmp_path):
    """Catches: a model that is read as something else than it is, or refused without a reason."""
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said) as caught:
        load_config(str(tmp_path))
    assert "\n" not in str(caught.value)


PUBLISHED = {
    "Qwen2.5-7B": (
        {
            **{"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28},
            **{"num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6},
        },
        7_615_616_512,
    ),
    "Qwen3-8B": (
        {
            **{"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32},
            **{"num_hidden_layers": 36, "num_key_value_heads": 8, "vocab_size": 151936, "head_dim": 128},
        },
        8_190_735_360,
    ),
    "Mistral-7B": (
        {
            **{"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
            **{"num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 32000},
        },
        7_241_732_096,
    ),
    "Phi-3-mini": (
        {
            **{"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32},
            **{"num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 32064},
        },
        3_821_079_552,
    ),
    "SmolLM3-3B": (
        {
            **{"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16},
            **{"num_hidden_layers": 36, "num_key_value_heads": 4, "vocab_size": 128256},
        },
        3_075_098_624,
    ),
    "OLMo-2-7B": (
        {
            **{"model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
            **{"num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 100352},
        },
        None,
    ),
    "Gemma-2-9B": (
        {
            **{"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16},
            **{"num_hidden_layers": 42, "num_key_value_heads": 8, "vocab_size": 256000, "head_dim": 256},
        },
        9_241_705_984,
    ),
    "Gemma-3-270M": (
        {
            **{"model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4},
            **{"num_hidden_layers": 18, "num_key_value_heads": 1, "vocab_size": 262144, "head_dim": 256},
            "sliding_window": 512,
        },
        268_098_176,
    ),
    "Pythia-1B": (
        {
            **{"model_type": "gpt_neox", "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 8},
            **{"num_hidden_layers": 16, "vocab_size": 50304},
        },
        1_011_781_632,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_parameters(name, tmp_path):
    """Catches: a weight that a family has and we do not, or the other way round."""
    content, known = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    ours = count(abstract_params(Llama(load_config(str(tmp_path)))))
    assert ours == sum(p.numel() for p in theirs.parameters())
    assert known is None or ours == known
