"""Chat models small enough for tests: the templates of real ones, and tokenizers that split as theirs do."""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors

from longlora_jax.config import DataConfig
from longlora_jax.data import load_tokenizer
from longlora_jax.data.chat import load_prompt
from longlora_jax.data.formats import Reading, Row
from longlora_jax.data.sft import read_examples

# As their models ship them.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SPECIAL = {
    "smollm2": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    "llama2": ("<s>", "</s>", "<unk>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
}
TEMPLATES = {"smollm2": SMOLLM2, "llama2": LLAMA2, "llama3": LLAMA3}
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# Enough of each word for a token of its own; "](" and "/INST](" so that a seam can melt.
TEXT = ["Who wrote it? Jane Austen did, in 1811. [INST] a [/INST] b [/INST](c) x](y). Thank you! You are welcome."] * 30


def build(kind: str) -> tokenizers.Tokenizer:
    """A small tokenizer that splits, spells and adds tokens as the real one does."""
    special = [AddedToken(t, special=True, normalized=False) for t in SPECIAL[kind]]
    if kind == "llama2":  # sentencepiece's BPE: a space before every beginning, bytes for unknown characters
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # only to train
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=480, special_tokens=[*special, *bytes_])
        backend.train_from_iterator(TEXT, trainer)
        content = json.loads(backend.to_str())
        content["pre_tokenizer"] = None
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in SPECIAL[kind]]
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
        return backend
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")
    if kind == "llama3":
        split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXT, trainer)
    if kind == "llama3":
        begin = SPECIAL[kind][0]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
        )
    return backend


# Folders and examples


ENDLESS = "<|endoftext|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template_folder(folder: Path, template: str) -> str:
    """A tokenizer with this template, whose eos is <|im_end|>."""
    build("smollm2").save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def model_folder(folder: Path, kind: str, eos: str | None = None, template: str | None = None) -> str:
    """A model's small files, its eos named in all of them."""
    folder.mkdir(exist_ok=True)
    backend = build(kind)
    backend.save(str(folder / "tokenizer.json"))
    bos, end = SPECIAL[kind][0], eos or SPECIAL[kind][1]
    config = {"bos_token": bos, "eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}
    if template:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ids = {"eos_token_id": backend.token_to_id(end)}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **ids}))
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, **ids}))
    return str(folder)


def examples(folder: str, rows: list[dict], on_bad_row: str = "stop", window: int = 0, **options) -> list:
    """The examples (ids, scored) of rows under a prompt."""
    located = [Row(f"file.jsonl, line {number}", row) for number, row in enumerate(rows, 1)]
    data, tokenizer = DataConfig(task="sft", **options), load_tokenizer(folder)
    template = load_prompt(data, folder)
    return list(read_examples(located, Reading(on_bad_row), tokenizer, template, data, window=window))


def chat(*turns: str, system: str = "") -> dict:
    """A row of messages, which the user begins."""
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + messages}
