"""Text from a model: transformers' tokens one for one, whatever the chunks, rows, mesh or prefix; and the command."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpr_arrays import shapes
from tiny import random_params, tiny_config

from longlora_jax import errors
from longlora_jax.attention.kernels import compiled_for
from longlora_jax.attention.rope import RopeScaling
from longlora_jax.config import LoraConfig, MeshConfig
from longlora_jax.data import load_tokenizer
from longlora_jax.errors import UserError
from longlora_jax.generate import __main__ as command
from longlora_jax.generate import generate, generation, load_for_generation
from longlora_jax.generate.session import Sampling, Session, chunk_size, complete, draw, warp
from longlora_jax.model.decoder import Llama, abstract_params, logical_axes
from longlora_jax.model.lora import merge_lora
from longlora_jax.parallel.sharding import make_mesh, weight_shardings
from longlora_jax.weights.hf import save_hf
from longlora_jax.weights.load import open_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODEL = str(Path(__file__).parents[2] / "models" / "tiny-python-llama")
NEW = 16
torch.set_num_threads(1)  # its threads wait by spinning, which is slow beside others
PROMPTS = [np.random.default_rng(i).integers(0, 37, n).astype(np.int32) for i, n in enumerate((5, 40, 23))]


def scaled(kind: str, **fields) -> RopeScaling:
    return RopeScaling(rope_type=kind, factor=4.0, original_max_position_embeddings=16, **fields)


CONFIGS = {
    "gqa": {},
    "tied, bias": {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 1},
    "yarn": {"rope_scaling": scaled("yarn"), "num_key_value_heads": 4},
    "dynamic": {"rope_scaling": scaled("dynamic")},
    "longrope": {"rope_scaling": scaled("longrope", short_factor=(1.0, 1.5, 2.0), long_factor=(2.0, 3.0, 4.0))},
}


def transformers_tokens(folder, prompts, new=NEW) -> list[list[int]]:
    """Greedy tokens of each prompt by itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    found = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt[None].astype(np.int64))
        fresh = copy.deepcopy(model)  # a dynamic rope remembers the longest text that it saw
        found.append(fresh.generate(ids, attention_mask=torch.ones_like(ids), **length)[0, len(prompt) :].tolist())
    return found


QUICK = ("gqa",)  # the others' rotations are compared in tests/attention/test_rope.py


@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in CONFIGS])
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    """Catches: a position off by one, a row that sees its padding or its neighbour, a chunk that sees its own future,
    rotations by another length than transformers'."""
    model = Llama(tiny_config(**CONFIGS[name]))
    params = random_params(model, seed=3)
    save_hf(str(tmp_path / "model"), model.config, params)
    expected = transformers_tokens(str(tmp_path / "model"), PROMPTS)
    assert len({tuple(tokens) for tokens in expected}) == 3
    for chunk in (7, 512):
        assert generate(model, params, PROMPTS, max_new_tokens=NEW, chunk=chunk) == expected


def test_adapters_apart_merged_and_exported_say_the_same(tmp_path):
    """Catches: a cached forward pass without its adapters, a merge or an export that changes the model."""
    lora = LoraConfig(rank=2)
    model = Llama(tiny_config(), lora=lora)
    params = random_params(model, seed=5)
    apart = generate(model, params, PROMPTS, max_new_tokens=NEW)
    merged, base = merge_lora(params, lora), Llama(model.config)
    assert generate(base, merged, PROMPTS, max_new_tokens=NEW) == apart
    save_hf(str(tmp_path / "model"), model.config, merged)
    assert transformers_tokens(str(tmp_path / "model"), PROMPTS) == apart
    loaded = load_for_generation(open_model(str(tmp_path / "model")))
    assert generate(*loaded, PROMPTS, max_new_tokens=NEW) == apart


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices (see conftest.py)")
@pytest.mark.parametrize(
    "axes, rows, cut",
    [
        ((1, 2, 1, 4), 4, (2, 1)),
        pytest.param((2, 2, 2, 1), 4, (2, 1), marks=pytest.mark.slow),
        pytest.param((2, 2, 2, 1), 1, (1, 1), marks=pytest.mark.slow),
        pytest.param((1, 1, 4, 2), 1, (1, 2), marks=pytest.mark.slow),  # test_cache_cut.py has such a cut
    ],
    ids=str,
)
def test_a_mesh_says_what_one_device_says(axes, rows, cut):
    """Catches: heads that meet another's cache, a cache that every device holds whole, rows lost on a context axis."""
    config = tiny_config(num_key_value_heads=4, vocab_size=40)
    model = Llama(config)
    params = random_params(model)
    prompts = (PROMPTS * 2)[:rows]
    alone = generate(model, params, prompts, max_new_tokens=8, chunk=16)
    mesh = make_mesh(MeshConfig(*axes), jax.devices()[: int(np.prod(axes))])
    placed = jax.device_put(params, weight_shardings(mesh, logical_axes(model), abstract_params(model)))
    session = Session(model.clone(mesh=mesh), placed, rows, 48, chunk=16)
    session.read(prompts)
    assert complete(session, 8) == alone
    keys = session._cache.keys
    assert keys.sharding.shard_shape(keys.shape)[1:3] == cut  # rows and kv heads of a device


def test_a_prefix_is_read_once():
    """Catches: a question that sees the one before it, in either kind of cache."""
    model = Llama(tiny_config())
    params = random_params(model)
    prefix, questions = PROMPTS[1], (PROMPTS[0], PROMPTS[2])
    for memory in ({}, {"sinks": 2, "window": 12}):
        session = Session(model, params, 1, 100, chunk=16, **memory)
        session.read([prefix])
        session.mark()
        for question in questions:
            session.rewind()
            session.read([question])
            found = complete(session, NEW)
            whole = np.concatenate([prefix, question])
            assert found == generate(model, params, [whole], max_new_tokens=NEW, chunk=16, **memory)


def test_a_session_goes_on_after_an_answer():
    """Catches: the last token of a stopped answer read twice, or never."""
    model = Llama(tiny_config())
    params = random_params(model)
    session = Session(model, params, 1, 100)
    session.read(PROMPTS[:1])
    stopped = complete(session, NEW, stop=lambda row, tokens: len(tokens) == 6)
    assert session.lengths.tolist() == [5 + 6]
    session.read([PROMPTS[2]])
    whole = np.concatenate([PROMPTS[0], stopped[0], PROMPTS[2]]).astype(np.int32)
    assert complete(session, 8) == generate(model, params, [whole], max_new_tokens=8)
    with pytest.raises(UserError, match="101 tokens do not fit a session of 100"):
        session.read([np.zeros(101 - session.lengths[0], np.int32)])


def test_rows_end_on_their_own():
    """Catches: a row that writes on after its end, an end that stops all rows, tokens told out of order."""
    model = Llama(tiny_config())
    params = random_params(model)
    free = generate(model, params, PROMPTS, max_new_tokens=NEW)
    ends = (free[0][3], free[1][5])
    told = [[], [], []]
    found = generate(
        model, params, PROMPTS, max_new_tokens=NEW, eos_ids=ends, on_token=lambda row, token: told[row].append(token)
    )
    assert found == told
    for tokens, whole in zip(found, free, strict=True):
        first = next((i for i, token in enumerate(whole) if token in ends), NEW - 1)
        assert tokens == whole[: first + 1]


def test_no_scores_of_a_chunk_against_the_whole_window():
    """Catches: attention that makes [chunk, window] scores of all heads."""
    model = Llama(tiny_config())
    rows, window, chunk = 2, 16_384, 512
    session = Session(model, random_params(model), rows, window, chunk=chunk)
    zeros = jnp.zeros((rows, chunk), jnp.int32)
    run = lambda params, cache: model.apply({"params": params}, zeros, cache=cache, method="hidden")  # noqa: E731
    made = shapes(run, session._params, session._cache)
    scores = rows * model.config.num_attention_heads * chunk * 512
    assert session._cache.keys.shape in made
    assert max(int(np.prod(s)) for s in made if s != session._cache.keys.shape) == scores


# Sampling


def transformers_warped(logits, sampling: Sampling):
    scores = torch.from_numpy(logits)
    warpers = [transformers.TemperatureLogitsWarper(sampling.temperature)]
    warpers += [transformers.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [transformers.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    for warper in warpers:
        scores = warper(None, scores)
    return scores.numpy()


@pytest.mark.parametrize(
    "sampling",
    [(0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 500, 1.0), (0.9, 0, 0.8), (0.5, 20, 0.95), (1.0, 0, 1e-4), (2.0, 1, 0.3)],
    ids=str,
)
def test_sampling_is_that_of_transformers(sampling):
    """Catches: another order of temperature, top_k and top_p, a bound on the wrong side, no token left."""
    sampling = Sampling(*sampling)
    logits = np.random.default_rng(0).normal(size=(50, 101)).astype(np.float32) * 3
    ours, theirs = np.asarray(warp(jnp.asarray(logits), sampling)), transformers_warped(logits, sampling)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_draws_follow_the_distribution():
    """Catches: rows or steps that share random numbers, a temperature that is applied twice, a seed without effect."""
    logits = jnp.asarray(np.random.default_rng(1).normal(size=12), jnp.float32)
    sampling, rows = Sampling(0.8, 8, 0.9), 20_000
    drawn = np.asarray(draw(jnp.tile(logits[None], (rows, 1)), sampling, 0, 0))
    p = np.asarray(jax.nn.softmax(warp(logits[None], sampling)))[0]
    counts = np.bincount(drawn, minlength=12)
    assert (counts[p == 0] == 0).all() and (p == 0).sum() >= 4
    # Five standard deviations of a binomial count: once in two million.
    assert (np.abs(counts - rows * p) <= 5 * np.sqrt(rows * p * (1 - p))).all()
    same, step, seed = (draw(jnp.tile(logits[None], (64, 1)), sampling, *at) for at in ((0, 0), (0, 1), (1, 0)))
    assert (np.asarray(same) == drawn[:64]).all() and (same != step).any() and (same != seed).any()


def test_a_temperature_next_to_zero_takes_the_likeliest():
    """Catches: NaN out of a temperature that float32 takes for 0, a seed that does not fit 31 bits."""
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(4, 12)), jnp.float32)
    for temperature in (1e-7, 1e-40, 1e-300):
        drawn = draw(logits, Sampling(temperature, 3, 0.5), 0, 0)
        np.testing.assert_array_equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize("seed", [2**31 + 7, 2**32 - 1])
def test_all_seeds_of_32_bits(seed):
    """Catches: OverflowError in the middle of an answer, a seed that is cut to fewer bits."""
    model = Llama(tiny_config())
    ask = {"max_new_tokens": 8, "temperature": 5.0}
    params = random_params(model)
    drawn = [generate(model, params, PROMPTS[:1], seed=s, **ask) for s in (seed, seed, seed - 2**31)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(UserError, match=f"seed={2**32}"):
        generate(model, params, PROMPTS[:1], seed=2**32, **ask)


def test_a_chunk_is_no_longer_than_the_prompt():
    """Catches: memory for a chunk of a thousand million tokens that no prompt has."""
    model = Llama(tiny_config())
    ask = {"max_new_tokens": 2, "sinks": 2, "window": 8}
    params = random_params(model)
    found = generate(model, params, PROMPTS[:1], chunk=10**9, **ask)
    assert found == generate(model, params, PROMPTS[:1], chunk=16, **ask)


# The command


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def run(tmp_path, *flags) -> dict:
    command.main([*map(str, flags), "--json", str(tmp_path / "out.json")])
    return json.loads((tmp_path / "out.json").read_text())


def test_the_command_continues_a_text(tmp_path, capsys, tokenizer):
    """Catches: a text that is not what the tokens say, a prompt without its BOS, an end that is not obeyed."""
    text = "def fibonacci(n):\n    "
    found = run(tmp_path, "--model", MODEL, "--prompt", text, "--max_new_tokens", 20)
    ids = tokenizer.encode(text)
    assert found["tokens"] == transformers_tokens(MODEL, [ids], 20)[0][: len(found["tokens"])]
    assert found["prompt_tokens"] == len(ids) and found["prefill_seconds"] > 0
    assert found["decode_tokens_per_second"] > 0 and found["finished_by"] in ("length", "eos")
    assert found["text"] == tokenizer.decode(found["tokens"], skip_special_tokens=True)
    assert capsys.readouterr().out == found["text"] + "\n"
    stop = found["text"][3:8]
    stopped = run(tmp_path, "--model", MODEL, "--prompt", text, "--max_new_tokens", 20, "--stop", "never", stop)
    assert stopped["text"] == found["text"].partition(stop)[0] and stopped["finished_by"] == "stop"
    assert stopped["tokens"] == found["tokens"][: len(stopped["tokens"])] and len(stopped["tokens"]) < 20


def test_every_eos_of_the_model_ends_an_answer(tmp_path):
    """Catches: the first of several end-of-turn tokens alone, or those of config.json over generation_config.json's."""
    folder = shutil.copytree(MODEL, tmp_path / "model")
    flags = ("--model", folder, "--prompt", "import ", "--max_new_tokens", 12)
    free = run(tmp_path, *flags)["tokens"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, free[4]]}))
    found = run(tmp_path, *flags)
    assert found["tokens"] == free[: free.index(free[4]) + 1] and found["finished_by"] == "eos"


@pytest.mark.parametrize(
    "memory", [(), pytest.param(("--window", 40, "--sinks", 2), marks=pytest.mark.slow)], ids=["all", "sinks"]
)
def test_questions_share_the_text(memory, tmp_path, capsys):
    """Catches: a text that is read again for each question, answers that are not those of the question alone."""
    folder = shutil.copytree(MODEL, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "book.txt").write_text("class Whale:\n    colour = 'white'\n" * 6, encoding="utf-8")
    flags = ("--model", folder, "--prompt_file", tmp_path / "book.txt", "--max_new_tokens", 8, "--chunk", 32, *memory)
    questions = ["What colour?", "Who is it?"]
    both = run(tmp_path, *flags, "--question", questions[0], "--question", questions[1])
    assert both["shared_tokens"] > 60 and [a["question"] for a in both["answers"]] == questions
    assert both["prefill_seconds"] >= both["shared_seconds"] > 0
    assert capsys.readouterr().out.startswith(f"> {questions[0]}\n{both['answers'][0]['text']}")
    alone, second = run(tmp_path, *flags, "--question", questions[1]), both["answers"][1]
    assert alone["shared_tokens"] == 0 and alone["tokens"] == second["tokens"]
    assert alone["prompt_tokens"] == second["prompt_tokens"]


def wrong_uses(folder: Path):
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes("caf\u00e9 ol\u00e9".encode("latin-1"))
    (folder / "nothing").mkdir()
    (folder / "work" / "checkpoints").mkdir(parents=True)
    shutil.copy(Path(MODEL) / "config.json", folder / "work" / "config.json")
    model, prompt = ["--model", MODEL], ["--prompt", "a"]
    window = open_model(MODEL).config.max_position_embeddings
    return {
        "is not a folder": ["--model", str(folder / "gone"), *prompt],
        "config.json is missing": ["--model", str(folder / "nothing"), *prompt],
        "empty.txt is empty": [*model, "--prompt_file", str(folder / "empty.txt")],
        "--prompt is empty": [*model, "--prompt", ""],
        "is not UTF-8": [*model, "--prompt_file", str(folder / "latin.txt")],
        "cannot be read": [*model, "--prompt_file", str(folder / "gone.txt")],
        "not allowed with argument": [*model, *prompt, "--prompt_file", str(folder / "latin.txt")],
        "give --prompt, --prompt_file or --question": model,
        "max_new_tokens: -1 must be at least 1": [*model, *prompt, "--max_new_tokens", "-1"],
        "temperature: -0.5 must be at least 0": [*model, *prompt, "--temperature", "-0.5"],
        "top_p=2": [*model, *prompt, "--top_p", "2"],
        "--sinks needs --window": [*model, *prompt, "--sinks", "2"],
        "more than the model's window": [*model, *prompt, "--window", str(window)],
        "seed: 4294967296 must be at least 0 and at most 4294967295": [*model, *prompt, "--seed", str(2**32)],
        "max_new_tokens: 9999": [*model, *prompt, "--window", "10", "--max_new_tokens", "9" * 19],
        f"top_k: {'1' * 400} must be": [*model, *prompt, "--top_k", "1" * 400],
        "chunk: 100000000000 must be": [*model, *prompt, "--window", "10", "--chunk", "100000000000"],
        "--prompt is not UTF-8": [*model, "--prompt", "a\udcff"],
        "--question is not UTF-8": [*model, *prompt, "--question", "b", "--question", "a\udcff"],
        "--stop is not UTF-8": [*model, *prompt, "--stop", "a\udcff"],
        "cannot be written": [*model, *prompt, "--json", str(folder / "no" / "out.json")],
    }


def test_chunks_suit_the_platform_unless_given():
    """Catches: a GPU that reads by chunks of a CPU, a chunk of nothing that is taken for none given."""
    assert chunk_size(None) == 512 and chunk_size(None, "gpu") == 4096 and chunk_size(7, "gpu") == 7
    with compiled_for("gpu"):
        assert chunk_size(None) == 4096
    model = Llama(tiny_config())
    with pytest.raises(UserError, match="chunk=0"):
        generate(model, random_params(model), [np.zeros(3, np.int32)], max_new_tokens=1, chunk=0)


def test_wrong_uses_get_one_line(tmp_path):
    """Catches: a traceback, or a model that is loaded before a fault of the call is told."""
    for message, flags in wrong_uses(tmp_path).items():
        with pytest.raises(UserError) as error:
            command.main(flags)
        assert message in str(error.value) and "\n" not in str(error.value), (message, str(error.value))


@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_that_goes_ends_the_command_quietly(flush):
    """Catches: a traceback behind `| head`, also where the text is first written at the very end."""
    code = f"from longlora_jax import errors; errors.run(lambda: [print('a' * 100, flush={flush}) for _ in range(9)])"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left on device"), None], ids=repr)
def test_what_the_machine_runs_out_of_is_one_line(error, capsys):
    """Catches: pages of traceback for memory or disk in any command; other errors hidden."""

    def fail():
        raise error or ValueError("a bug")

    if error is None:
        with pytest.raises(ValueError, match="a bug"):
            errors.run(fail)
        return
    with pytest.raises(SystemExit) as left:
        errors.run(fail)
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1


def test_a_workdir_without_a_checkpoint(tmp_path):
    """Catches: a run that has saved nothing yet, taken for a model."""
    from longlora_jax.config import Config
    from longlora_jax.weights.workdir import write_run_config

    (tmp_path / "checkpoints").mkdir()
    write_run_config(str(tmp_path), Config(model=tiny_config(), seq_len=64, steps=1, mode="full"))
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        command.main(["--model", str(tmp_path), "--prompt", "a"])


def test_a_prompt_too_long_is_told_with_the_numbers_and_before_weights_are_read(tmp_path, monkeypatch):
    """Catches: minutes of reading weights before, or nonsense after a prompt that does not fit."""
    monkeypatch.setattr(generation, "place_weights", lambda *_: pytest.fail("weights are read"))
    opened = open_model(MODEL)
    window = opened.config.max_position_embeddings
    text = "a = 1\n" * window
    tokens = len(load_tokenizer(MODEL).encode(text))
    with pytest.raises(UserError) as error:
        command.main(["--model", MODEL, "--prompt", text, "--max_new_tokens", "7"])
    assert f"{tokens} prompt tokens + --max_new_tokens 7 = {tokens + 7} are more" in str(error.value)
    assert f"window of {window}" in str(error.value)
