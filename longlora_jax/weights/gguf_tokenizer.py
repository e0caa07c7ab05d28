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
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _by_case(digits: str, ending: str = "") -> str:
    """Words cut where a small letter is followed by a capital one, as in the tokenizers of GPT-4o and Mistral Nemo."""
    before = r"[^\r\n\p{L}\p{N}]?"
    words = (f"{before}{_UPPER}*{_LOWER}+{ending}", f"{before}{_UPPER}+{_LOWER}*{ending}")
    return "|".join((*words, digits, r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"))


# How text is cut into words before merging, by `tokenizer.ggml.pre`, as in llama.cpp's
# llama-vocab.cpp: regular expressions, each applied to the pieces that the one before has left.
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DEFAULT_SPLITS = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]")
# DeepSeek's: letters that have a case, as it lists them (escaped: some of them change when a text is normalized), and
# what Chinese, Japanese and Korean are written in.
_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_SPLITS = {
    "deepseek-llm": (r"[\r\n]", rf"\s?[{_LETTERS}]+", rf"\s?[{_PUNCTUATION}]+", r"\s+$", _CJK, r"\p{N}+"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
    "falcon3": (_LLAMA3_SPLIT,),
    **dict.fromkeys(("smollm", "refact", "starcoder"), (r"\p{N}", _GPT2_SPLIT)),
    **dict.fromkeys(("gpt-2", "olmo", "mpt"), (_GPT2_SPLIT,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), (_QWEN2_SPLIT,)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), (_LLAMA3_SPLIT,)),
    "gpt-4o": (_by_case(r"\p{N}{1,3}", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"),),
    "tekken": (_by_case(r"\p{N}"),),
    "default": _DEFAULT_SPLITS,
    "llama-bpe": (_LLAMA3_SPLIT,),
    "llama3": (_LLAMA3_SPLIT,),
    "llama-v3": (_LLAMA3_SPLIT,),
}
# They have whole words that no sequence of merges reaches, and begin every text with their first token.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
_COMPOSED = ("qwen2", "deepseek-r1-qwen", "olmo")  # by their own tokenizer.json; llama.cpp does not normalize
_NEVER_STRIPPED = ("<unk>", "<s>", "<|endoftext|>")  # of Phi-3, whose other special tokens swallow spaces behind them


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
    strips = kind == "llama" and read("general.architecture") == "phi3"
    tokenizer.add_special_tokens(_added(tokens, types, (_CONTROL, _UNKNOWN), special=True, strips=strips))
    tokenizer.add_tokens(_added(tokens, types, (_USER_DEFINED,), special=False, strips=strips))

    def token(name: str) -> str | None:
        i = read(f"tokenizer.ggml.{name}_token_id")
        return tokens[i] if i is not None and i < len(tokens) else None

    bos, eos = token("bos"), token("eos")
    bos_by_default = kind == "llama" or cut in _WHOLE_WORDS
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


def _added(
    tokens: list[str], types: list[int], wanted: tuple[int, ...], special: bool, strips: bool
) -> list[AddedToken]:
    return [
        AddedToken(token, special=special, normalized=False, rstrip=strips and token not in _NEVER_STRIPPED)
        for token, kind in zip(tokens, types, strict=True)
        if kind in wanted
    ]


def _byte_level(vocab: dict[str, int], merges: list[str], cut: str) -> Tokenizer:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    model = models.BPE(vocab=vocab, merges=pairs, ignore_merges=cut in _WHOLE_WORDS)
    tokenizer = Tokenizer(model)
    if cut in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
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
