"""Tokens that are added to a tokenizer: its files afterwards, against what transformers makes of them."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers

from longlora_jax.data.new_tokens import add_tokens, load_with_tokens
from longlora_jax.data.tokenizer import load_tokenizer

TINY = Path(__file__).parents[2] / "models" / "tiny-python-llama"
TOKENS = ("<tool>", "self", "<|call|>")  # the second is an ordinary piece of that vocabulary
TEXT = "def myself(self):<tool> return self, itself <|call|>selfish"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "made"
    add_tokens(str(TINY), str(folder), TOKENS)
    return folder


def ours(tokenizer) -> list[int]:
    return tokenizer.encode_batch([TEXT], add_bos=False)[0].tolist()


def test_added_tokens_are_those_of_transformers(made):
    """Catches: a new token that already is an ordinary piece left one, so that a text holds it in other pieces."""
    transformers = pytest.importorskip("transformers")
    before = load_tokenizer(str(TINY))
    assert before.token_id("self") is not None and "self" not in before.added_tokens()
    theirs = transformers.AutoTokenizer.from_pretrained(TINY)
    theirs.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    expected = theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert expected.count(before.token_id("self")) == 5
    assert ours(load_tokenizer(str(made))) == ours(load_with_tokens(str(TINY), TOKENS)) == expected
    assert ours(load_with_tokens(str(TINY), TOKENS[1:2])) != ours(before)
    again = transformers.AutoTokenizer.from_pretrained(made)
    assert again(TEXT, add_special_tokens=False)["input_ids"] == expected
    assert again.decode(expected, skip_special_tokens=True) == theirs.decode(expected, skip_special_tokens=True)


def test_the_vocabulary_alone_has_them(made):
    """Catches: a program that reads tokenizer.json alone and splits the tokens that were trained."""
    alone = tokenizers.Tokenizer.from_file(str(made / "tokenizer.json"))
    assert alone.encode(TEXT, add_special_tokens=False).ids == ours(load_tokenizer(str(made)))
    before = json.loads((TINY / "tokenizer.json").read_text())["added_tokens"]
    after = json.loads((made / "tokenizer.json").read_text())["added_tokens"]
    assert [token for token in after if token["content"] not in TOKENS] == before


def test_other_added_tokens_stay_as_they_are(tmp_path):
    """Catches: a token that was added without being special, made special beside a new one."""
    shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((TINY / "tokenizer.json").read_text())
    size = load_tokenizer(str(TINY)).max_id + 1
    plain = {"id": size, "content": "<plain>", "special": False, "normalized": True}
    plain |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    (tmp_path / "base" / "tokenizer.json").write_text(
        json.dumps(content | {"added_tokens": content["added_tokens"] + [plain]})
    )
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    assert add_tokens(str(tmp_path / "base"), str(tmp_path / "made"), ("<tool>",)) == size + 1
    made = load_tokenizer(str(tmp_path / "made"))
    assert "<plain>" in made.added_tokens() and "<plain>" not in made.special_tokens()
    assert "<tool>" in made.special_tokens()
