"""Perplexity on files of raw ids, under LongLoRA's own protocol, and over several calls."""

import json

import numpy as np
import pytest

from longlora_jax import errors
from longlora_jax.evals import perplexity

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

V = 50
# Both sides compute in float32, and the original's mean of means too.
CLOSE = {"rtol": 2e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder without a tokenizer: ids need none."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,  # far from uniform guesses: a wrong target or position is seen
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def ids_file(tmp_path):
    def write(tokens, dtype="uint16"):
        ids = np.random.default_rng(0).integers(0, V, tokens).astype(dtype)
        ids.tofile(tmp_path / "test.bin")
        return str(tmp_path / "test.bin")

    return write


def as_the_original(folder, path, seq_len, batch_size, sliding_window=256):
    """(val_loss, val_perplexity) as LongLoRA's eval.py comes to them, in float32 on the CPU."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    data = np.memmap(path, dtype=np.uint16, mode="r")
    starts = list(range(0, len(data) - seq_len, sliding_window))
    starts.pop()
    losses = []
    for first in range(0, len(starts), batch_size):
        rows = [torch.from_numpy(data[i : i + seq_len].astype(np.int64)) for i in starts[first : first + batch_size]]
        x = torch.stack(rows)
        with torch.no_grad():
            loss = model(input_ids=x, labels=x, use_cache=False).loss
        losses.append((loss * seq_len / seq_len).item())
    mean = torch.as_tensor(losses).mean().item()
    return mean, 2.71828**mean


def command(folder, path, out, *flags):
    flags = ["--model", str(folder), "--data", path, "--batch_size", "2", "--json", str(out), *flags]
    perplexity.main(flags)  # one shape for all windows of a length: compiled once
    return json.loads(out.read_text())


@pytest.mark.parametrize(("tokens", "seq_len", "batch"), [(1500, 48, 1), (1500, 48, 4), (1328, 48, 3), (820, 300, 1)])
def test_protocol_equals_the_originals_code(folder, ids_file, tmp_path, tokens, seq_len, batch):
    """Catches: the last window kept, a stride that is not 256, only the last targets scored, a mean over tokens where
    the original's is over batches, windows of one token more."""
    path = ids_file(tokens)
    flags = ["--seq_len", str(seq_len), "--protocol", "longlora", "--protocol_batch", str(batch)]
    written = command(folder, path, tmp_path / "out.json", *flags)
    (row,) = written["results"]
    loss, value = as_the_original(folder, path, seq_len, batch)
    np.testing.assert_allclose(row["nll"], loss, **CLOSE)
    np.testing.assert_allclose(row["perplexity"], value, **CLOSE)
    assert row["windows"] == len(range(0, tokens - seq_len, 256)) - 1 and row["tokens"] == row["windows"] * (
        seq_len - 1
    )
    assert (written["protocol"], written["protocol_batch"], row["stride"]) == ("longlora", batch, 256)
    if batch == 4:  # or this test could not tell one mean from the other
        assert abs(loss - as_the_original(folder, path, seq_len, 1)[0]) > 1e-3


def test_ids_of_both_sizes_are_read(folder, ids_file, tmp_path):
    """Catches: 32-bit ids read as pairs of 16-bit ones; a .bin that is tokenized as text; a tokenizer asked for."""
    flags = ["--seq_len", "48", "--max_windows", "2"]
    one = command(folder, ids_file(500), tmp_path / "1.json", *flags)
    two = command(folder, ids_file(500, "uint32"), tmp_path / "2.json", *flags, "--bin_dtype", "uint32")
    assert one["results"] == two["results"] and one["data_tokens"] == two["data_tokens"] == [500]
    assert one["results"][0]["tokens"] == 94


def test_lengths_that_are_there_are_not_computed_again(folder, ids_file, tmp_path, monkeypatch, caplog):
    """Catches: hours lost at the last length; results of other data or flags mixed."""
    path, out = ids_file(500), tmp_path / "out.json"
    first = command(folder, path, out, "--seq_len", "48")
    calls, evaluate = [], perplexity.evaluate
    monkeypatch.setattr(perplexity, "evaluate", lambda *a, **k: calls.append(a[2]) or evaluate(*a, **k))
    both = command(folder, path, out, "--seq_len", "24,48")
    assert calls == [24] and both["results"][1] == first["results"][0]
    assert [r["seq_len"] for r in both["results"]] == [24, 48]
    other = command(folder, path, out, "--seq_len", "48", "--dtype", "bfloat16")
    assert 'results with dtype "float32", these are with "bfloat16": it is written anew' in caplog.text
    assert other["dtype"] == "bfloat16" and [r["seq_len"] for r in other["results"]] == [48]
    longer = command(folder, ids_file(600), out, "--seq_len", "48", "--dtype", "bfloat16")
    assert longer["data_tokens"] == [600] and calls == [24, 48, 48]


@pytest.mark.parametrize(
    ("tokens", "flags", "says"),
    [
        (500, ["--protocol", "longlora", "--stride", "8"], "leave out --stride"),
        (500, ["--protocol_batch", "8"], "--protocol_batch needs --protocol"),
        (300, ["--protocol", "longlora"], "seq_len=48 needs more than 304 tokens under this protocol, there are 300"),
        (500, ["--bin_dtype", "uint32"], "holds the id"),
        (501, ["--bin_dtype", "uint32"], "1,002 bytes"),
        (0, [], "0 bytes"),
    ],
)
def test_faults_are_one_line(folder, ids_file, tmp_path, capsys, tokens, flags, says):
    """Catches: a traceback, or a perplexity of ids that are none."""
    argv = ["--model", str(folder), "--data", ids_file(tokens), "--seq_len", "48", *flags]
    with pytest.raises(SystemExit) as exit:
        errors.run(lambda: perplexity.main(argv))
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert exit.value.code == 2 and len(lines) == 1 and not printed.out
    assert says in lines[0]
