"""What a run is asked under and ends by: found, saved, exported, and read by transformers as it was trained."""

import json
from pathlib import Path

import numpy as np
import pytest
from chats import CHATML, ENDLESS, TEMPLATES, build, chat, examples, model_folder, template_folder

from longlora_jax.config import DataConfig
from longlora_jax.data import load_tokenizer
from longlora_jax.data.chat import (
    ChatFormat,
    ends_with_any,
    export_format,
    folder_format,
    run_format,
    save_format,
    saved_format,
    stop_ids,
)
from longlora_jax.errors import UserError


def sft(folder: str, **options) -> ChatFormat:
    return run_format([DataConfig(task="sft", tokenizer=folder, **options)], folder)


def read(folder: str, name: str) -> dict:
    return json.loads(Path(folder, name).read_text())


@pytest.mark.parametrize("kind", ["smollm2", "llama2", "llama3"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_an_export_of_alpaca_asks_as_the_run_trained_byte_for_byte(kind, add_bos, tmp_path):
    """Catches: an export without the prompt that its run trained under, a BOS too many or too few, a lost space."""
    auto = pytest.importorskip("transformers").AutoTokenizer
    folder = model_folder(tmp_path / "m", kind)
    rows = [
        {"instruction": "Name {it}.\n\n", "output": "Emma's"},
        {"instruction": "And?", "output": "b", "system": "Be brief.", "history": [["q", "a "], ["r", "s"]]},
    ]
    made = examples(folder, rows, prompt="alpaca", add_bos=add_bos)
    export_format(folder, sft(folder, prompt="alpaca", add_bos=add_bos))
    theirs = auto.from_pretrained(folder)
    first = [{"role": "user", "content": "Name {it}.\n\n"}]
    texts = ("Be brief.", "q", "a ", "r", "s", "And?")
    more = [{"role": r, "content": t} for r, t in zip(["system", *["user", "assistant"] * 3], texts, strict=False)]
    for (ids, scored), asked, answer in zip(made, (first, more), ("Emma's", "b"), strict=True):
        encode = lambda said, **how: theirs.apply_chat_template(said, return_dict=False, **how)  # noqa: E731
        assert ids.tolist() == encode([*asked, {"role": "assistant", "content": answer}])
        assert ids[: np.flatnonzero(np.diff(scored) == 1)[-1] + 1].tolist() == encode(asked, add_generation_prompt=True)
    assert "<<SYS>>\nYou are a helpful" in load_tokenizer(folder).decode(made[0][0])


def test_the_token_that_ends_answers_ends_them_in_every_file(tmp_path):
    """Catches: an export whose eos is still the base's, which goes on into an invented next turn."""
    transformers = pytest.importorskip("transformers")
    folder = model_folder(tmp_path / "m", "smollm2", ENDLESS, CHATML)
    (Path(folder) / "special_tokens_map.json").write_text(json.dumps({"eos_token": ENDLESS}))
    end, endless = (build("smollm2").token_to_id(t) for t in ("<|im_end|>", ENDLESS))
    chat_format = sft(folder)
    assert (chat_format.end_ids, chat_format.end_token, chat_format.stops) == ((end, endless), "<|im_end|>", ())
    save_format(str(tmp_path), chat_format)
    assert saved_format(str(tmp_path)) == chat_format and saved_format(folder) is None
    export_format(folder, chat_format)
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == [end, endless]
    assert read(folder, "config.json")["eos_token_id"] == [end, endless]
    assert transformers.AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
    assert load_tokenizer(folder).eos_id == end
    assert folder_format(folder).end_ids == (end, endless) and folder_format(folder).template == CHATML


def test_a_run_on_texts_changes_nothing_in_an_export(tmp_path):
    """Catches: files rewritten that say the same, an end of turn put into a base model."""
    folder = model_folder(tmp_path / "m", "smollm2", ENDLESS, CHATML)
    before = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    export_format(folder, run_format([DataConfig(tokenizer=folder)], folder))
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == before


def test_a_template_that_spells_eos_keeps_it(tmp_path):
    """Catches: an eos_token that is changed under a template which writes it."""
    template = CHATML + "{# {{ eos_token }} #}"
    folder = model_folder(tmp_path / "m", "smollm2", ENDLESS, template)
    export_format(folder, sft(folder))
    assert read(folder, "tokenizer_config.json")["eos_token"] == ENDLESS
    assert read(folder, "generation_config.json")["eos_token_id"][0] == build("smollm2").token_to_id("<|im_end|>")


def test_an_end_of_turn_that_is_no_token_is_a_stop(tmp_path):
    """Catches: a model that was taught to end by a text and is never stopped by it."""
    marks = CHATML.replace("<|im_end|>", "<|end|>").replace("<|im_start|>", "# ")
    folder = template_folder(tmp_path, marks)
    chat_format = sft(folder)
    assert chat_format.stops == ("<|end|>",) and chat_format.end_ids == (load_tokenizer(folder).eos_id,)


def test_a_damaged_file_of_a_run_is_named(tmp_path):
    """Catches: a traceback out of a workdir that somebody has edited."""
    for content in ('{"template": 3, "nothing": 4}', "no JSON"):
        (tmp_path / "chat_format.json").write_text(content)
        with pytest.raises(UserError, match="chat_format.json"):
            saved_format(str(tmp_path))


def test_stops_that_are_special_tokens(tmp_path):
    """Catches: --stop "<|im_end|>" that never comes, since the text of an answer does not show it."""
    tokenizer = load_tokenizer(template_folder(tmp_path, CHATML))
    end = tokenizer.encode_batch(["<|im_end|>\n"], add_bos=False)[0].tolist()
    ends = stop_ids(["\n", "<|im_end|>\n"], tokenizer)
    assert ends == [tuple(end)] and len(end) == 2
    assert ends_with_any([5, *end], ends) and not ends_with_any(end[:1], ends) and not ends_with_any([5], [])
    assert stop_ids(["a"], tokenizer) == []


def test_an_earlier_answer_ends_as_the_last_one_does(tmp_path):
    """Catches: ends of turns before the last that are not scored, by a text that is no special token, or where the
    token that ends turns is also the padding."""
    marks = CHATML.replace("<|im_end|>", "<|end|>")
    row, folder = chat("q", "one", "r", "two"), template_folder(tmp_path, marks)
    tokenizer = load_tokenizer(folder)
    [(ids, scored)] = examples(folder, [row])
    assert tokenizer.decode(ids[scored == 1]) == "one<|end|>\ntwo<|end|>\n<|im_end|>"
    backend = build("smollm2")
    backend.add_tokens(["<|end|>"])  # a token, but no special one
    backend.save(f"{folder}/tokenizer.json")
    config = {"eos_token": ENDLESS, "pad_token": "<|end|>", "chat_template": marks}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    [(ids, scored)] = examples(folder, [row])
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(ids[scored == 1]) == "one<|end|>two<|end|>"
    assert sft(folder).end_ids[0] == tokenizer.added_tokens()["<|end|>"]


def test_templates_of_real_models_end_as_they_say(tmp_path):
    """Catches: an end of turn taken from a probe that the template refuses, or from the next question."""
    for kind, end in {"smollm2": "<|im_end|>", "llama2": "</s>", "llama3": "<|eot_id|>"}.items():
        folder = model_folder(tmp_path / kind, kind, template=TEMPLATES[kind])
        assert sft(folder).end_token == end


NO_SYSTEM = "{% set messages = messages | rejectattr('role', 'equalto', 'system') %}" + CHATML


def test_a_run_folds_system_messages_for_whoever_asks_later(tmp_path):
    """Catches: a system message of data.system, of a row or of --system that is dropped without a word."""
    auto = pytest.importorskip("transformers").AutoTokenizer
    folder = model_folder(tmp_path / "m", "smollm2", ENDLESS, NO_SYSTEM)
    with pytest.raises(UserError, match="data.system: the template leaves the system message out; data.fold_system="):
        sft(folder, system="Be brief.")
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    with pytest.raises(UserError, match="template refuses: the template leaves the system message out"):
        folder_format(folder).render(asked)
    folds = sft(folder, fold_system=True)
    assert folds.render(asked) == "<|im_start|>user\nBe brief.\n\nq<|im_end|>\n<|im_start|>assistant\n"
    assert sft(folder, fold_system=True, system="Be brief.").render(asked[1:]) == folds.render(asked)
    [with_it], [rows] = (
        examples(folder, [chat("q", "a", "q", "b", system=system)], fold_system=True, system=of_run)
        for system, of_run in (("", "Be brief."), ("Be brief.", ""))
    )
    assert with_it[0].tolist() == rows[0].tolist()
    export_format(folder, folds)
    ids = auto.from_pretrained(folder).apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert rows[0][: len(ids)].tolist() == ids


@pytest.mark.parametrize("prompt", ["chat", "alpaca"])
def test_the_system_message_of_a_run_is_part_of_its_template(prompt, tmp_path):
    """Catches: a system message under which a run was trained, and that nobody says to its export."""
    auto = pytest.importorskip("transformers").AutoTokenizer
    folder = model_folder(tmp_path / "m", "smollm2", ENDLESS, CHATML)
    said = 'Don\'t \\ "rhyme".\n'
    asked = [{"role": "user", "content": "q"}]
    [with_it], [own], [without] = (
        examples(folder, [chat("q", "a", system=system)], prompt=prompt, system=of_run)
        for system, of_run in (("", said), ("Sing.", said), (said, ""))
    )
    assert with_it[0].tolist() == without[0].tolist() != own[0].tolist()
    export_format(folder, sft(folder, prompt=prompt, system=said))
    ids = auto.from_pretrained(folder).apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert with_it[0][: len(ids)].tolist() == ids and with_it[1][len(ids)] == 1
