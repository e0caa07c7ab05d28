"""The tokenizer inside a GGUF file, as the files that Hugging Face's tokenizers read.

Ours beside transformers' conversion, because that passes over tokenizer.ggml.pre: SmolLM2's digits would not be cut.
"""

import json
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre

from longlora_jax.config import ModelConfig
from longlora_jax.errors import UserError

# Values of `tokenizer.ggml.token_type`.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut into words before merging, by `tokenizer.ggml.pre`, as in llama.cpp's
# llama-vocab.cpp: regular expressions, each applied to the pieces that the one before has left.
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DEFAULT_SPLITS = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]")
_SPLITS = {
    "smollm": (r"\p{N}", _GPT2_SPLIT),
    "gpt-2": (_GPT2_SPLIT,),
    "default": _DEFAULT_SPLITS,
    "llama-bpe": (_LLAMA3_SPLIT,),
    "llama3": (_LLAMA3_SPLIT,),
    "llama-v3": (_LLAMA3_SPLIT,),
}
_LLAMA3_KINDS = ("llama-bpe", "llama3", "llama-v3")


def tokenizer_files(path: str, read: Callable[..., Any], config: ModelConfig) -> dict[str, str]:
    """Builds tokenizer.json and tokenizer_config.json: {name: content}.

    read(key, default) gives a value of the GGUF file at path. Knows byte-level BPE ("gpt2") and
    SentencePiece's BPE ("llama"). Raises UserError for other kinds.
    """
    kind, cut = read("tokenizer.ggml.model"), read("tokenizer.ggml.pre", "default")
    tokens: list[str] = read("tokenizer.ggml.tokens") or []
    types: list[int] = read("tokenizer.ggml.token_type") or [1] * len(tokens)
    if kind == "gpt2" and cut not in _SPLITS:
        raise UserError(f"{path}: tokenizer.ggml.pre is {cut!r}, known are {', '.join(_SPLITS)}")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{path}: tokenizer.ggml.model is {kind!r}, it must be gpt2 or llama")
    if not 0 < len(tokens) <= config.vocab_size or len(types) != len(tokens):
        raise UserError(
            f"{path}: {len(tokens)} tokens with {len(types)} types do not fit an embedding of {config.vocab_size} rows"
        )
    scores: list[float] = read("tokenizer.ggml.scores") or []
    if kind == "llama" and len(scores) != len(tokens):
        raise UserError(f"{path}: {len(tokens)} tokens have {len(scores)} scores")
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        if kind == "gpt2":
            tokenizer = _byte_level(vocab, read("tokenizer.ggml.merges") or [], cut)
        else:
            unknown = tokens[types.index(_UNKNOWN)] if _UNKNOWN in types else None
            prefix = read("tokenizer.ggml.add_space_prefix", True)
            tokenizer = _sentencepiece(vocab, unknown, scores, prefix)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"{path}: the vocabulary is inconsistent ({error})") from error
    tokenizer.add_special_tokens(_added(tokens, types, (_CONTROL, _UNKNOWN), special=True))
    tokenizer.add_tokens(_added(tokens, types, (_USER_DEFINED,), special=False))

    def token(name: str) -> str | None:
        i = read(f"tokenizer.ggml.{name}_token_id")
        return tokens[i] if i is not None and i < len(tokens) else None

    bos, eos = token("bos"), token("eos")
    bos_by_default = kind == "llama" or cut in _LLAMA3_KINDS
    before = [bos] if bos and read("tokenizer.ggml.add_bos_token", bos_by_default) else []
    after = [eos] if eos and read("tokenizer.ggml.add_eos_token", False) else []
    if before or after:
        single = [*before, "$A", *after]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[*single, *(f"{part}:1" for part in [*before, "$B", *after])],
            special_tokens=[(part, vocab[part]) for part in {*before, *after}],
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": read("tokenizer.chat_template"),
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings, indent=2)}
    # llama.cpp ends an answer at each of these.
    found = (read(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    ends = list(dict.fromkeys(i for i in found if i is not None and i < len(tokens)))
    if len(ends) > 1:
        files["generation_config.json"] = json.dumps({"eos_token_id": ends})
    return files


def _added(tokens: list[str], types: list[int], wanted: tuple[int, ...], special: bool) -> list[AddedToken]:
    return [
        AddedToken(token, special=special, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in wanted
    ]


def _byte_level(vocab: dict[str, int], merges: list[str], cut: str) -> Tokenizer:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    # Llama 3 has whole words that no sequence of merges reaches.
    model = models.BPE(vocab=vocab, merges=pairs, ignore_merges=cut in _LLAMA3_KINDS)
    tokenizer = Tokenizer(model)
    splits = [pre.Split(Regex(split), behavior="isolated") for split in _SPLITS[cut]]
    bytes_ = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre.Sequence([*splits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocab: dict[str, int], unknown: str | None, scores: list[float], prefix: bool) -> Tokenizer:
    """SentencePiece merges the pair whose result scores highest, so scores give the merges."""
    merges = []
    for token, i in vocab.items():
        cuts = ((token[:k], token[k:]) for k in range(1, len(token)))
        merges += [(-scores[i], i, pair) for pair in cuts if pair[0] in vocab and pair[1] in vocab]
    pairs = [pair for _, _, pair in sorted(merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = "\u2581"
    spell = [normalizers.Prepend(space)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*spell, normalizers.Replace(" ", space)])
    unspell = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([*unspell, *strip])
    return tokenizer
