"""Tokens as they come shown as text, and chats as the text that a model was trained on."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlora_jax.data import load_tokenizer
from longlora_jax.data.chat import render_chat
from longlora_jax.data.stream import TextStream
from longlora_jax.errors import UserError

transformers = pytest.importorskip("transformers")

MODEL = str(Path(__file__).parents[2] / "models" / "tiny-python-llama")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@given(text=st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), max_size=30))
def test_text_comes_in_whole_characters(tokenizer, text):
    """Catches: halves of a character on the screen, a space lost or doubled where two tokens meet."""
    stream = TextStream(tokenizer)
    ids = tokenizer.encode_batch([text], add_bos=False)[0]
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == stream.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


@given(text=st.text("abn \n\u00e9", min_size=1, max_size=20), stop=st.text("abn \n\u00e9", min_size=1, max_size=3))
def test_a_stop_string_is_never_shown(tokenizer, text, stop):
    """Catches: a stop string missed across tokens, its head shown before the rest comes, text before it lost."""
    stream = TextStream(tokenizer, [stop, "zzz"])
    shown = ""
    for token in tokenizer.encode_batch([text], add_bos=False)[0]:
        shown += stream.push(token)
        assert stop not in shown
    shown += stream.finish()
    before, found, _ = text.partition(stop)
    assert (shown, stream.stopped, stream.text) == (before, bool(found), before)


def test_broken_bytes_do_not_hold_the_text_back_for_ever(tokenizer):
    """Catches: a model that writes a broken character and is then silent to the end."""
    first_byte = tokenizer.encode_batch(["\u20ac"], add_bos=False)[0][0]
    stream = TextStream(tokenizer)
    assert "".join(stream.push(first_byte) for _ in range(40))


TEMPLATES = [
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]\n    {{ message.content | trim }}\n"
    "{% endfor %}\n{% if add_generation_prompt %}[assistant]{% endif %}",
    "{% for m in messages %}\n  {% if m.role == 'user' %}\nU:{{ m | tojson }}{% else %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% endif %}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chats_are_rendered_as_by_transformers(template, tmp_path):
    """Catches: white space of blocks, markup escapes, special tokens and extensions that templates count on."""
    folder = shutil.copytree(MODEL, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    messages = [{"role": "user", "content": " <a> & \u00e9 "}, {"role": "assistant", "content": "No."}]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for ask in (True, False):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        assert render_chat(str(folder), messages, ask) == expected


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ ''.__class__.__mro__ }}", "{{ 1 + x }}"],
)
def test_a_template_that_refuses(template, tmp_path):
    """Catches: a template that reaches out of its sandbox, a traceback out of jinja."""
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="the chat template of") as error:
        render_chat(str(tmp_path), [{"role": "user", "content": "a"}])
    assert "\n" not in str(error.value)
