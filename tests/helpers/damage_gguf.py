"""Families of damage to GGUF files."""

import functools
import random
import struct
import tempfile
from pathlib import Path

import gguf
import numpy as np
from damage import NO_JSON, Cases, flipped
from places import BIN, SAFE, arrays, base

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.": "ffn_",
    "_proj": "",
}
GGUF_KEYS = {
    "llama.embedding_length": 8,
    "llama.block_count": 2,
    "llama.feed_forward_length": 12,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.context_length": 64,
    "llama.rope.freq_base": 10000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.scaling.type": "linear",
    "llama.rope.scaling.factor": 2.0,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *"abcdefghijk", "ab", "bc"],
    "tokenizer.ggml.scores": [0.0] * 14 + [-1.0, -2.0],
    "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 13,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages }}",
}


@functools.cache
def gguf_tensors() -> dict[str, np.ndarray]:
    """The same model as llama.cpp names and turns it, float32."""
    table = {}
    for name, array in arrays().items():
        if "q_proj" in name or "k_proj" in name:
            array = array.reshape(-1, 2, 2, 8).swapaxes(1, 2).reshape(array.shape)
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        table[name] = array.astype(np.float32)
    return table


def gguf_file(keys: dict | None = None, tensors: dict | None = None, **options) -> bytes:
    """A GGUF file; keys: more or other metadata, None leaves one out; tensors: the same."""
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(f"{folder}/m.gguf", "llama", **options)
        add = {bool: writer.add_bool, int: writer.add_int64, float: writer.add_float64}
        add |= {str: writer.add_string, list: writer.add_array}
        for key, value in (GGUF_KEYS | (keys or {})).items():
            if value is not None:
                add[type(value)](key, value)
        for name, array in (gguf_tensors() | (tensors or {})).items():
            if array is not None:
                writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Path(folder, "m.gguf").read_bytes()


def ggufs() -> Cases:
    """GGUF files that end too early, are none, or have other keys and tensors than a model needs."""
    content, rng = gguf_file(), random.Random("ggufs")
    for length in {*rng.sample(range(len(content)), 150), *range(32), len(content) - 1}:
        yield f"ends at {length}", {"m.gguf": content[:length]}
    for other in [*NO_JSON, None, "m.gguf", base("bin")[BIN], base("one")[SAFE], content[::-1], content[1:]]:
        yield f"{other}"[:60], {"m.gguf": other}
    numbers = [0, -1, 2**31, 2**62, "8", [8], [8, 8], ["8"], True, 1.5, float("nan"), float("inf"), 1e300, -1.0]
    sizes = [key for key, value in GGUF_KEYS.items() if type(value) is int and key.startswith("llama")]
    floats = ["llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon", "llama.rope.scaling.factor"]
    odd = dict.fromkeys(sizes, numbers) | dict.fromkeys(floats, [-1, -1.0, "8", [8.0], True, *numbers[-4:-1]])
    odd |= {
        "llama.attention.key_length": numbers,
        "llama.attention.sliding_window": ["8", [8], -8, float("nan")],
        "llama.expert_count": ["8", [8], 8],
        "llama.rope.scaling.type": [5, [5], True, "x" * 5000, "\x1b[2J", "\n", "yarn\n", "llama3"],
        "llama.rope.scaling.original_context_length": [-1, 2**31, 1.5, "8", [8], float("nan")],
        "tokenizer.ggml.model": [5, "bert", "x" * 5000, "\n", [5], None],
        "tokenizer.ggml.pre": [5, [5], True],
        "tokenizer.ggml.tokens": [5, "abc", [5] * 16, [1.5] * 16, ["a"] * 15, ["a"] * 17, None, ["a" * 5000] * 16],
        "tokenizer.ggml.scores": [5, "abc", [5] * 16, ["a"] * 16, [1.0] * 15, None],
        "tokenizer.ggml.token_type": [5, "abc", [1.5] * 16, ["a"] * 16, [1] * 15],
        "tokenizer.ggml.bos_token_id": [-1, "a", 1.5, True, 2**40, [1]],
        "tokenizer.ggml.add_bos_token": [5, "a", [True]],
        "tokenizer.chat_template": [5, [5]],
    }
    for key, values in odd.items():
        for value in values:
            yield f"{key}={str(value)[:40]}", {"m.gguf": gguf_file({key: value})}
    for key in sizes:
        yield f"no {key}", {"m.gguf": gguf_file({key: None})}
    for merges in (5, [5], ["a"], ["x y"], ["a b", "zz\n\nz z"], ["a " + "b" * 5000]):
        yield f"merges={str(merges)[:40]}", {"m.gguf": gguf_file(GPT2 | {"tokenizer.ggml.merges": merges})}
    for ours, (name, array) in zip(arrays(), gguf_tensors().items(), strict=True):
        if name != "output.weight":  # without it, the embedding is the head
            yield f"no {name}", {"m.gguf": gguf_file(tensors={name: None})}
        for new in (ours, "", f"{name} ", "x" * 60, "blk.9.attn_q.weight", "\x1b[2J", "a\nb"):
            yield f"{name} is {new!r}", {"m.gguf": gguf_file(tensors={name: None, new: array})}
        for other in (
            array[:-1],
            array.astype(np.int32),
            array.astype(np.int8),
            array.astype(np.float64)[..., :1],
            array.max(keepdims=False),
        ):
            yield f"{name} is {other.dtype} {other.shape}", {"m.gguf": gguf_file(tensors={name: other})}
    for name in ("model.norm.weight", "rope_freqs.weight", "rope_factors_long.weight"):
        for number in (0.0, -1.0, np.nan, np.inf, 2.0, np.float64(2), np.int32(2), np.int8(2)):
            extra = np.full(8 if "model" in name else 2, number, getattr(number, "dtype", np.float32))
            yield f"{name} of {number!r} is new", {"m.gguf": gguf_file(tensors={name: extra})}
    yield "big-endian", {"m.gguf": gguf_file(endianess=gguf.GGUFEndian.BIG)}


GPT2 = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.scores": None}


def gguf_numbers() -> Cases:
    """Counts, lengths, types and offsets in the header of a GGUF file that are not right."""
    content = gguf_file()
    wrong = [0, 1, 3, 8, 9, 13, 2**20, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
    places = {"tensors": (8, 8), "keys": (16, 8), "version": (4, 4)}
    for key, value in GGUF_KEYS.items():
        at = content.index(key.encode())
        places |= {f"length of {key}": (at - 8, 8), f"type of {key}": (at + len(key), 4)}
        if isinstance(value, list):
            places |= {f"types in {key}": (at + len(key) + 4, 4), f"count of {key}": (at + len(key) + 8, 8)}
        if isinstance(value, str):
            places[f"length of the text of {key}"] = (at + len(key) + 4, 8)
    for name, array in list(gguf_tensors().items())[::2]:
        at = content.index(name.encode())
        shape = at + len(name) + 4
        places |= {f"length of {name}": (at - 8, 8), f"axes of {name}": (shape - 4, 4), f"rows of {name}": (shape, 8)}
        places |= {f"type of {name}": (shape + 8 * array.ndim, 4), f"offset of {name}": (shape + 8 * array.ndim + 4, 8)}
    for place, (at, width) in places.items():
        right = int.from_bytes(content[at : at + width], "little")
        for number in {n % 2 ** (8 * width) for n in (*wrong, right + 1, right - 1, right + 32, right << 8)} - {right}:
            if place.startswith("type") and number not in wrong[3:]:  # it may be one of as many bytes
                continue
            if place != "version" or number != 2:  # of the same form
                damaged = content[:at] + number.to_bytes(width, "little") + content[at + width :]
                yield f"{place} is {number}", {"m.gguf": damaged}
    for text in (
        b"linear",
        b"<unk>",
        b"{{ messages }}",
        b"tokenizer.ggml.scores",
        b"general.architecture",
        b"blk.0.attn_q",
    ):
        for at in range(len(text)):
            odd = text[:at] + b"\xff" + text[at + 1 :]
            yield f"{odd}", {"m.gguf": content.replace(text, odd)}
    deep = content.index(b"llama.block_count") + len("llama.block_count")
    for depth in (2, 900, 20_000):
        nested = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth
        yield f"lists in {depth} lists", {"m.gguf": content[:deep] + nested + content[deep:]}


def gguf_flips() -> Cases:
    """One byte of the header of a GGUF file is wrong, which may be harmless."""
    content, rng = gguf_file(), random.Random("gguf flips")
    header = content.index(gguf_tensors()["token_embd.weight"].tobytes())
    for i in range(300):
        damaged = flipped(content[:header], rng)
        if i % 2 and len(damaged) != header:
            damaged = damaged[:header].ljust(header, b"\0")
        yield f"{i}", {"m.gguf": damaged + content[header:]}


def gguf_truth(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file as the gguf package reads them, under our names."""
    table = {}
    for tensor in gguf.GGUFReader(path).tensors:
        array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = next(ours for ours, theirs in zip(arrays(), gguf_tensors(), strict=True) if theirs == tensor.name)
        if "q_proj" in name or "k_proj" in name:
            array = array.reshape(-1, 2, 2, 8).swapaxes(1, 2).reshape(array.shape)
        table[name] = array
    return table
