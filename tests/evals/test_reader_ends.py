"""Evaluations end an answer where its run ended answers, also by a text that is no token."""

import pytest
from chats import CHATML, template_folder
from tiny import tiny_config

from longlora_jax.data import load_tokenizer
from longlora_jax.data.chat import ChatFormat
from longlora_jax.evals import reader
from longlora_jax.weights.load import OpenModel


@pytest.mark.parametrize(("stops", "wanted"), [((), "Jane.<|end|>x"), (("<|end|>",), "Jane.")])
def test_an_answer_is_cut_where_its_stop_begins(stops, wanted, tmp_path, monkeypatch):
    """Catches: a right answer scored 0, since the mark that ends it counts as a part of it."""
    folder = template_folder(tmp_path, CHATML)
    tokenizer = load_tokenizer(folder)
    chat = ChatFormat(CHATML, {}, (5,), "", stops)

    class Opened(OpenModel):
        def chat_format(self) -> ChatFormat:
            return chat

    opened = Opened(tiny_config(vocab_size=500), {}, folder)
    monkeypatch.setattr(reader, "open_model", lambda path, quantize: opened)
    monkeypatch.setattr(reader, "load_for_generation", lambda *_: ())
    said = tokenizer.encode_batch(["Jane.<|end|>x"], add_bos=False)[0].tolist()
    seen = {}

    def generate(prompts, *, stop, eos_ids, max_new_tokens):
        seen.update(eos_ids=eos_ids, stopped=[stop(0, said[:n]) for n in range(1, len(said) + 1)])
        return [said]

    monkeypatch.setattr(reader, "generate", generate)
    asked = reader.Reader(folder)
    assert asked.template == "chat" and tokenizer.decode(asked.ids("q")).endswith("assistant\n")
    assert asked.answer([asked.ids("q")], 9) == [wanted]
    assert seen["eos_ids"] == (5,) and any(seen["stopped"]) == bool(stops)
