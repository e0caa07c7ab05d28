"""Small GGUF files with random weights."""

import random

import gguf
import numpy as np
import tokenizers
from gguf import GGMLQuantizationType as Kind

D, F, V, L, N, K, H = 256, 256, 64, 2, 4, 2, 64
BLOCK = {
    "attn_norm": (D,),
    "attn_q": (N * H, D),
    "attn_k": (K * H, D),
    "attn_v": (K * H, D),
    "attn_output": (D, N * H),
    "ffn_norm": (D,),
    "ffn_gate": (F, D),
    "ffn_up": (F, D),
    "ffn_down": (D, F),
}
TEXT = (
    "The quick brown fox, 12 lazy dogs and 3456 cats: it's what they'd call naïve — 日本語 too.\n"
    "\n\tdef f(x):\n        return x  # ½ of it's fine  \n"
)


def rotary_order(rows, heads):
    """What llama.cpp's converter does to q and k: (i, i + H/2) become neighbours."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def random_tensors(seed=0):
    """A whole model in GGUF's names and layouts, float32."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,), "output.weight": (V, D)}
    for layer in range(L):
        shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in BLOCK.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def spm_vocab():
    """A small SentencePiece vocabulary: (tokens, scores, types), merges learned from TEXT."""
    learned = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, show_progress=False)
    learned.train_from_iterator([("▁" + TEXT).replace(" ", "▁")] * 3, trainer)
    pieces = sorted(learned.get_vocab().items(), key=lambda item: item[1])
    single = [piece for piece, _ in pieces if len(piece) == 1]
    merged = [piece for piece, _ in pieces if len(piece) > 1]
    scored = [(piece, -float(i)) for i, piece in enumerate(merged + single)]
    # Ids in another order than the scores.
    random.Random(3).shuffle(scored)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += [piece for piece, _ in scored]
    scores = [0.0] * 259 + [score for _, score in scored]
    return tokens, scores, [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)


def write_gguf(path, tensors=None, kinds=None, keys=None, tokenizer=None):
    """Writes a GGUF file; kinds: {tensor: quantization}; keys: more or other metadata."""
    tensors = random_tensors() if tensors is None else tensors
    kinds, tokenizer = (
        kinds or {},
        tokenizer or {"model": "gpt2", "tokens": [chr(i) for i in range(33, 33 + V)]},
    )
    writer = gguf.GGUFWriter(path, "llama")
    metadata = {
        "llama.embedding_length": D,
        "llama.block_count": L,
        "llama.feed_forward_length": F,
        "llama.attention.head_count": N,
        "llama.attention.head_count_kv": K,
        "llama.context_length": 128,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    for key, value in (metadata | (keys or {})).items():
        if value is None:
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add |= {str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    for name, array in tensors.items():
        kind = kinds.get(name, Kind.F32)
        raw = array if array.dtype == np.uint8 else gguf.quantize(array, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)
