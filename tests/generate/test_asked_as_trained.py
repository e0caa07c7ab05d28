"""A run's answers, asked for in every way there is: under what it trained, and up to the end that it learned."""

import json
from pathlib import Path

import pytest
from chats import CHATML, ENDLESS, model_folder, template_folder
from tiny import random_params, tiny_config

import convert_weights
from longlora_jax.chat.conversation import Conversation
from longlora_jax.chat.conversation import Reader as ChatReader
from longlora_jax.chat.document import Document
from longlora_jax.config import AttentionConfig, Config, DataConfig, MeshConfig, OptimConfig
from longlora_jax.data import load_tokenizer
from longlora_jax.data.chat import ChatFormat
from longlora_jax.errors import UserError
from longlora_jax.evals import longqa
from longlora_jax.generate import __main__ as command
from longlora_jax.generate.generation import prompt_ids
from longlora_jax.model.decoder import Llama
from longlora_jax.weights.hf import save_hf
from longlora_jax.weights.load import open_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT, QUESTION, ANSWER = "a [/INST] b", "Who wrote it?", "Jane Austen did."
NEW = 24  # tokens; the answer has fewer


def trained(train, tmp_path: Path, prompt: str, template: str | None) -> str:
    """A run that knows one answer; its base ends texts by another token than templates end turns by."""
    window = 1024 if prompt == "alpaca" else 128
    small = model_folder(tmp_path / "small", "smollm2", ENDLESS, template)
    tokenizer = load_tokenizer(small)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "head_dim": 12, "max_position_embeddings": window}
    model = Llama(tiny_config(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, **sizes))
    params = random_params(model)
    save_hf(str(tmp_path / "base"), model.config, params, tokenizer_from=small)
    rows = [
        {"context": TEXT, "question": QUESTION, "answer": ANSWER},
        {"instruction": "Thank you!", "output": "You are welcome."},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = Config(
        seq_len=window,
        steps=25,
        init_from=str(tmp_path / "base"),
        mode="full",
        attention=AttentionConfig(pattern="full"),
        data=DataConfig("jsonl", str(tmp_path / "rows.jsonl"), task="sft", prompt=prompt, packing="best_fit"),
        optim=OptimConfig(learning_rate=2e-2, warmup_steps=2),
        mesh=MeshConfig(fsdp=1),
        dtype="float32",
        remat="none",
    )
    train(config, tmp_path / "run")
    return str(tmp_path / "run")


def asking(folder: str, out: Path) -> list[str]:
    """The flags that ask a model."""
    flags = ["--model", folder, "--prompt", TEXT, "--question", QUESTION]
    return [*flags, "--max_new_tokens", str(NEW), "--json", str(out)]


@pytest.mark.parametrize(
    ("prompt", "template"), [pytest.param("alpaca", None, marks=pytest.mark.slow), ("chat", CHATML)]
)
def test_every_way_of_asking_gets_the_answer_and_its_end(prompt, template, train, tmp_path, capsys):
    """Catches: a prompt at inference that no run has seen, an answer that goes on into an invented turn, an evaluation
    that scores the right answer 0, an export that transformers asks in another way."""
    workdir, export = trained(train, tmp_path, prompt, template), str(tmp_path / "export")
    convert_weights.main(["to-hf", workdir, export])
    (tmp_path / "qa.jsonl").write_text(json.dumps({"context": TEXT, "question": QUESTION, "answer": ANSWER}))
    out = tmp_path / "out.json"
    for folder in (workdir, export):
        command.main(asking(folder, out))
        said = json.loads(out.read_text())
        assert (said["text"], said["finished_by"]) == (ANSWER, "eos"), said
        out.unlink()
    talk = Conversation(ChatReader(open_model(workdir), load_tokenizer(export)))
    talk.load(Document("text", TEXT))
    talk.ask(QUESTION)
    *_, turn = talk.answer(NEW)
    assert (turn.answer, turn.ended) == (ANSWER, "eos")
    longqa.main(["--model", workdir, "--data", str(tmp_path / "qa.jsonl"), "--json", str(tmp_path / "longqa.json")])
    assert json.loads((tmp_path / "longqa.json").read_text())["summary"]["exact_match"] == 1

    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    asked = [{"role": "user", "content": f"{TEXT}\n\n{QUESTION}"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = model.generate(**ids, max_new_tokens=NEW, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(found, skip_special_tokens=True) == ANSWER and len(found) < NEW
    assert found.tolist() == said["tokens"]

    # And by hand, where nothing that is saved ends an answer.
    saved = Path(workdir, "chat_format.json")
    content = json.loads(saved.read_text())
    saved.write_text(json.dumps(content | {"end_ids": [999]}))
    command.main([*asking(workdir, out), "--stop", content["end_token"]])
    said = json.loads(out.read_text())
    assert (said["text"], said["finished_by"]) == (ANSWER, "stop")


def test_a_system_message_stands_before_the_question(tmp_path):
    """Catches: --system that is dropped, with a template or without one."""
    tokenizer = load_tokenizer(template_folder(tmp_path, CHATML))
    for chat, wanted in (
        (
            ChatFormat(CHATML),
            "<|im_start|>system\nRhyme.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        ),
        (ChatFormat(), "Rhyme.\n\nq\n"),
    ):
        assert tokenizer.decode(prompt_ids("", "q", tokenizer, chat, "Rhyme.")) == wanted
    with pytest.raises(UserError, match="--system is said before a question"):
        command.main(["--model", "nowhere", "--prompt", "a", "--system", "b"])
