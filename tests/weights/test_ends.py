"""The ids that end an answer, and the template that asks for it, through every conversion."""

import json
from pathlib import Path

import pytest
from chats import CHATML, ENDLESS, build, model_folder
from tiny import random_params, tiny_config

import convert_weights
from longlora_jax.config import Config, DataConfig
from longlora_jax.data.chat import adapter_format, folder_format, run_format
from longlora_jax.model.decoder import Llama
from longlora_jax.weights.gguf_tokenizer import tokenizer_files
from longlora_jax.weights.hf import save_hf
from longlora_jax.weights.load import open_model
from longlora_jax.weights.workdir import workdir_format, write_run_config


def read(folder, name: str) -> dict:
    return json.loads(Path(folder, name).read_text())


def hugging_face(folder: Path, **ends) -> str:
    """A small model with a ChatML template; ends: eos_token_id of config.json and generation_config.json, or none."""
    small = model_folder(folder.parent / f"{folder.name}_small", "smollm2", ENDLESS, CHATML)
    model = Llama(tiny_config(vocab_size=build("smollm2").get_vocab_size()))
    save_hf(str(folder), model.config, random_params(model), tokenizer_from=small)
    for name in ("config", "generation_config"):
        path = folder / f"{name}.json"
        if name in ends:
            path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ends[name]}))
        elif name == "generation_config":
            path.unlink()
    return str(folder)


@pytest.mark.parametrize(
    ("ends", "wanted"),
    [
        ({"config": [1, 8, 9]}, (1, 8, 9)),
        ({"config": 1, "generation_config": [1, 8, 9]}, (1, 8, 9)),
        ({"config": [1, 8], "generation_config": None}, (1, 8)),
        ({"config": 5}, (5,)),
    ],
    ids=["config alone", "generation_config", "null there", "one"],
)
def test_every_end_of_a_model_survives_both_ways(ends, wanted, tmp_path):
    """Catches: a list of ids of which the first alone is left, as config.json or as generation_config.json has it."""
    transformers = pytest.importorskip("transformers")
    source = hugging_face(tmp_path / "source", **ends)
    convert_weights.main(["from-hf", source, str(tmp_path / "converted")])
    convert_weights.main(["to-hf", str(tmp_path / "converted"), str(tmp_path / "back")])
    for folder in (source, tmp_path / "converted", tmp_path / "back"):
        assert open_model(str(folder)).chat_format().end_ids == wanted
    said = transformers.GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id
    assert said == (list(wanted) if len(wanted) > 1 else wanted[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer.chat_template == CHATML and tokenizer.eos_token == ENDLESS
    assert read(tmp_path / "converted", "config.json")["eos_token_id"] == said


def test_an_adapter_ends_by_its_own_token_and_by_those_of_its_base(tmp_path):
    """Catches: ends of the base that an adapter's folder hides, since it has a tokenizer and no configs."""
    base = model_folder(tmp_path / "base", "smollm2", ENDLESS)
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    adapter = model_folder(tmp_path / "adapter", "smollm2", "<|im_end|>", CHATML)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / "adapter" / name).unlink()
    found = adapter_format(adapter, base)
    assert found.end_ids == (build("smollm2").token_to_id("<|im_end|>"), 3, 7) and found.template == CHATML
    assert adapter_format(base, base) == folder_format(base)


def test_a_gguf_file_ends_where_llama_cpp_ends():
    """Catches: an end of turn that a GGUF file names beside its end of text, lost on the way."""
    letters = [f"<{n}>" for n in range(6)]
    keys = {"model": "llama", "tokens": letters, "scores": [0.0] * 6, "token_type": [3] * 6, "unknown_token_id": 0}
    keys |= {"bos_token_id": 1, "eos_token_id": 2, "eot_token_id": 4, "eom_token_id": 99}

    def files(**more):
        given = {f"tokenizer.ggml.{key}": value for key, value in (keys | more).items()}
        return tokenizer_files(
            "model.gguf", lambda key, default=None: given.get(key, default), tiny_config(vocab_size=6)
        )

    assert json.loads(files()["generation_config.json"]) == {"eos_token_id": [2, 4]}
    assert "generation_config.json" not in files(eot_token_id=2)


def test_a_workdir_says_what_its_run_trains_under(tmp_path):
    """Catches: a run that forgets its prompt when its base or tokenizer changes, a workdir of an earlier version that
    has none."""
    base = model_folder(tmp_path / "base", "smollm2", ENDLESS, CHATML)
    data = DataConfig("jsonl", "rows.jsonl", task="sft", prompt="alpaca", packing="best_fit", tokenizer=base)
    config = Config(seq_len=64, steps=1, init_from=base, model=tiny_config(), data=data)
    workdir = tmp_path / "run"
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    write_run_config(str(workdir), config)
    saved = workdir_format(str(workdir))
    assert saved == run_format([data], base) and "[INST]" in saved.template
    (workdir / "chat_format.json").unlink()
    assert workdir_format(str(workdir / "checkpoints" / "3")) == saved
    write_run_config(str(workdir), config)
    (tmp_path / "base" / "tokenizer_config.json").unlink()
    assert workdir_format(str(workdir)) == saved
