"""Converted checkpoints: bit-exact, digested, resumed; orbax reads them; nothing incomplete looks complete."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny import tiny_config

import convert_weights
from longlora_jax.errors import UserError
from longlora_jax.weights.converted import open_converted, write_converted
from longlora_jax.weights.hf import build_params, open_hf, save_hf, write_hf
from longlora_jax.weights.rules import weight_rules
from longlora_jax.weights.tensors import DTYPES, Tensor

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "plain": {},
    "tied, kv heads, odd head_dim": {"tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 10},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one layer": {"num_hidden_layers": 1},
}


def random_table(config, dtypes=("bfloat16",), seed=0):
    """Random bytes, so that every pattern of bits occurs, those of NaN too; dtypes are taken in turn."""
    rng, table = np.random.default_rng(seed), {}
    names = [(n, r) for r in weight_rules(config) for n in r.names(config.num_hidden_layers)]
    for i, (name, rule) in enumerate(names):
        dtype = DTYPES[dtypes[i % len(dtypes)]]
        array = np.frombuffer(rng.bytes(int(np.prod(rule.hf_shape)) * dtype.itemsize), dtype).reshape(rule.hf_shape)
        table[name] = Tensor(dtype, rule.hf_shape, lambda array=array: array)
    return table


def raw(table):
    return {name: (t.dtype, t.shape, np.ascontiguousarray(t.read()).tobytes()) for name, t in table.items()}


@pytest.fixture(params=[1 << 24, 100], ids=["whole", "many chunks"])
def chunk_bytes(request, monkeypatch):
    monkeypatch.setattr("longlora_jax.weights.converted._CHUNK_BYTES", request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_there_and_back_every_bit_is_kept(name, dtype, chunk_bytes, tmp_path):
    """Catches: rows that change places between chunks, a last chunk cut short, NaNs that lose their payload."""
    config = tiny_config(**OPTIONS[name])
    table = random_table(config, (dtype,))
    out = str(tmp_path / "out")
    write_converted(out, config, table, tokenizer_from=None)
    again, found = open_converted(out)
    assert again == config and raw(found) == raw(table)
    digests = json.loads((tmp_path / "out" / "digests.json").read_text())["tensors"]
    assert digests == {n: hashlib.sha256(content).hexdigest() for n, (_, _, content) in raw(table).items()}
    write_hf(str(tmp_path / "hf"), again, found, max_shard_bytes=3000)
    assert raw(open_hf(str(tmp_path / "hf"))[1]) == raw(table)


def test_orbax_reads_it_as_the_tree_of_the_model(chunk_bytes, tmp_path):
    """Catches: a folder that only this project can read, or whose axes are turned."""
    config = tiny_config(attention_bias=True)
    table = random_table(config)
    write_converted(str(tmp_path / "out"), config, table, tokenizer_from=None)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "out" / "params")
    expected = build_params(config, table)

    def compare(found, wanted):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            if isinstance(value, dict):
                compare(found[key], value)
            else:
                np.testing.assert_array_equal(np.asarray(found[key]).view(np.uint16), value.view(np.uint16))

    compare(restored, expected)


def test_layers_of_several_dtypes_are_held_exactly(tmp_path):
    """Catches: a float32 layer among bfloat16 ones that is rounded."""
    config = tiny_config()
    rng, table = np.random.default_rng(0), {}
    for i, name in enumerate(n for r in weight_rules(config) for n in r.names(2)):
        shape = next(r.hf_shape for r in weight_rules(config) if name in r.names(2))
        array = rng.normal(size=shape).astype([np.float32, ml_dtypes.bfloat16][i % 2])
        table[name] = Tensor(array.dtype, shape, lambda array=array: array)
    write_converted(str(tmp_path / "out"), config, table, tokenizer_from=None)
    _, found = open_converted(str(tmp_path / "out"))
    for name, tensor in table.items():
        np.testing.assert_array_equal(found[name].read().astype(np.float32), tensor.read().astype(np.float32))


def test_what_is_there_is_kept_and_what_is_not_is_made(tmp_path, monkeypatch):
    """Catches: a stopped conversion that starts anew, or that trusts a chunk which the stop left half written."""
    monkeypatch.setattr("longlora_jax.weights.converted._CHUNK_BYTES", 100)
    config, out, aside = tiny_config(), str(tmp_path / "out"), tmp_path / ".out.incomplete"
    table, reads = random_table(config), 0

    def failing(name, tensor):
        def read():
            nonlocal reads
            reads += 1
            if reads > 9:
                raise KeyboardInterrupt
            return tensor.read()

        return tensor._replace(read=read)

    with pytest.raises(KeyboardInterrupt):
        write_converted(out, config, {n: failing(n, t) for n, t in table.items()}, tokenizer_from=None)
    assert not os.path.exists(out)
    chunks = sorted(p for p in (aside / "params").rglob("*") if "c" in p.parts and p.is_file())
    assert len(chunks) > 20
    kept, halved, damaged = chunks[0], chunks[5], chunks[10]
    halved.write_bytes(halved.read_bytes()[:-7])
    damaged.write_bytes(bytes([damaged.read_bytes()[0] ^ 1]) + damaged.read_bytes()[1:])
    before = {p: p.stat().st_mtime_ns for p in chunks}
    time.sleep(0.01)
    write_converted(out, config, table, tokenizer_from=None)
    assert raw(open_converted(out)[1]) == raw(table) and not aside.exists()
    final = {p: (Path(out) / p.relative_to(aside)).stat().st_mtime_ns for p in chunks}
    assert final[kept] == before[kept]
    assert {p for p in chunks if final[p] != before[p]} == {halved, damaged}


def test_what_another_model_left_behind_is_not_taken_over(tmp_path):
    """Catches: arrays of a stopped conversion of one model inside of another one's."""
    out, aside = tmp_path / "out", tmp_path / ".out.incomplete"
    aside.mkdir()
    (aside / "config.json").write_text('{"model_type": "llama"}')
    (aside / "params").mkdir()
    (aside / "params" / "stale").write_text("x")
    config = tiny_config()
    table = random_table(config)
    write_converted(str(out), config, table, tokenizer_from=None)
    assert raw(open_converted(str(out))[1]) == raw(table)
    assert not (out / "params" / "stale").exists()


def test_a_disk_that_lies_is_found_out(tmp_path, monkeypatch):
    """Catches: a conversion that says it verified itself and did not read back."""
    from longlora_jax.weights import converted

    write = converted._write

    def lying(path, content, size):
        write(path, content, size)
        if "/norm.scale/" in path:
            with open(path, "r+b") as file:
                file.write(b"\x55")

    monkeypatch.setattr(converted, "_write", lying)
    config = tiny_config()
    with pytest.raises(UserError, match="model.norm.weight came back from the disk"):
        write_converted(str(tmp_path / "out"), config, random_table(config), tokenizer_from=None)
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_write_one_folder(tmp_path):
    """Catches: two conversions that write into each other's files."""
    config = tiny_config()
    table = random_table(config)

    def second_try():
        with pytest.raises(UserError, match="out is being written by another process"):
            write_converted(str(tmp_path / "out"), config, random_table(config, seed=1), tokenizer_from=None)
        return table["model.norm.weight"].read()

    first = table | {"model.norm.weight": table["model.norm.weight"]._replace(read=second_try)}
    write_converted(str(tmp_path / "out"), config, first, tokenizer_from=None)
    assert raw(open_converted(str(tmp_path / "out"))[1]) == raw(table)


def test_a_lost_chunk_is_an_error_and_not_zeros(tmp_path):
    """Catches: zarr's habit of reading zeros where a file is missing."""
    config = tiny_config()
    write_converted(str(tmp_path / "out"), config, random_table(config), tokenizer_from=None)
    _, table = open_converted(str(tmp_path / "out"))
    (tmp_path / "out" / "params" / "norm.scale" / "c" / "0").unlink()
    (tmp_path / "out" / "params" / "layers.mlp.up_proj.kernel" / "zarr.json").unlink()
    with pytest.raises(UserError, match="model.norm.weight is damaged or missing, convert the model again") as caught:
        table["model.norm.weight"].read()
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="layers/mlp/up_proj/kernel cannot be read") as caught:
        open_converted(str(tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_an_export_checks_the_digests(tmp_path):
    """Catches: a flipped bit on the disk that goes out as a weight."""
    config, out = tiny_config(), tmp_path / "out"
    write_converted(str(out), config, random_table(config), tokenizer_from=None)
    chunk = out / "params" / "norm.scale" / "c" / "0"
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    with pytest.raises(UserError, match="model.norm.weight is not what digests.json says"):
        convert_weights.main(["to-hf", str(out), str(tmp_path / "hf")])
    assert os.listdir(tmp_path) == ["out"]


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """The folder of a model of 168 MB, enough for a process to be killed in the middle of it."""
    folder = tmp_path_factory.mktemp("big") / "source"
    config = tiny_config(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=20000, head_dim=128)
    rng = np.random.default_rng(0)
    table = {
        name: Tensor(DTYPES["float32"], r.hf_shape, lambda r=r: rng.standard_normal(r.hf_shape, np.float32))
        for r in weight_rules(config)
        for name in r.names(8)
    }
    write_hf(str(folder), config, table, max_shard_bytes=50_000_000)
    yield folder
    shutil.rmtree(folder)


def convert(*arguments, **options):
    command = [sys.executable, "convert_weights.py", *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes, **options)


@pytest.mark.slow
def test_a_killed_conversion_goes_on_and_an_export_starts_clean(big, tmp_path):
    """Catches: half a model under the final name, a lock that outlives its process, a stop that loses the work."""
    source, out, aside = big, tmp_path / "out", tmp_path / ".out.incomplete"

    def size():
        total = 0
        for file in (os.path.join(parent, name) for parent, _, names in os.walk(aside) for name in names):
            with contextlib.suppress(FileNotFoundError):  # renamed or removed since it was listed
                total += os.path.getsize(file)
        return total

    def kill_at(process, limit):
        while process.poll() is None and size() < limit:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()

    kill_at(convert("from-hf", source, out), 40_000_000)
    assert not out.exists() and size() > 30_000_000
    before = {p.relative_to(aside): p.stat().st_mtime_ns for p in aside.rglob("*") if "c" in p.parts and p.is_file()}
    done = convert("from-hf", source, out)
    assert done.communicate() and done.returncode == 0
    assert os.listdir(tmp_path) == ["out"]
    unchanged = [p for p, at in before.items() if (out / p).stat().st_mtime_ns == at]
    assert len(unchanged) >= len(before) - 2  # two were perhaps being written
    assert raw(open_converted(str(out))[1]) == raw(open_hf(str(source))[1])

    aside = tmp_path / ".hf.incomplete"
    kill_at(convert("to-hf", out, tmp_path / "hf"), 60_000_000)
    assert not (tmp_path / "hf").exists() and aside.exists()
    done = convert("to-hf", out, tmp_path / "hf")
    assert done.communicate() and done.returncode == 0 and not aside.exists()
    assert raw(open_hf(str(tmp_path / "hf"))[1]) == raw(open_hf(str(source))[1])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(big, tmp_path):
    """Catches: a leaf or a shard that is held whole; mapped pages that are never given back."""
    (tmp_path / "big").symlink_to(big)
    save_hf(str(tmp_path / "small"), tiny_config(), build_params(tiny_config(), random_table(tiny_config())))

    def peak(*arguments):
        process = convert(*arguments)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return usage.ru_maxrss * 1024

    peaks = {size: peak("from-hf", tmp_path / size, tmp_path / f"{size}-out") for size in ("small", "big")}
    assert peaks["big"] - peaks["small"] < 120e6  # of 208 MB; two tensors of up to 41 MB and two buffers of 17 MB
    peaks = {size: peak("to-hf", tmp_path / f"{size}-out", tmp_path / f"{size}-hf") for size in ("small", "big")}
    assert peaks["big"] - peaks["small"] < 150e6  # one tensor and what the file system's threads hold of it


def test_ctrl_c_is_one_line(big, tmp_path):
    """Catches: a traceback for a user who stops what may be gone on with."""

    def as_at_a_terminal():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and so do their children

    for _ in range(5):  # on a busy machine the signal may come when all is done
        process = convert("from-hf", big, tmp_path / "out", start_new_session=True, preexec_fn=as_at_a_terminal)
        while process.poll() is None and not any((tmp_path / ".out.incomplete" / "params").glob("*")):
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
        if process.returncode != 0:
            break
        shutil.rmtree(tmp_path / "out")
    assert process.returncode == 130 and out == "" and err.splitlines()[-1] == "stopped", err
    assert "Traceback" not in err and not (tmp_path / "out").exists()


def test_the_folder_is_complete_for_the_next_command(tmp_path):
    """Catches: a converted checkpoint that loses tokenizer or generation config on the way out again."""
    config = tiny_config()
    save_hf(str(tmp_path / "source"), config, build_params(config, random_table(config, ("float32",))))
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / "source" / name).write_text("{}")
    generation = json.dumps({"eos_token_id": [2, 3]})
    (tmp_path / "source" / "generation_config.json").write_text(generation)
    for arguments in (("from-hf", "source", "out"), ("to-hf", "out", "hf")):
        convert_weights.main([arguments[0], *(str(tmp_path / a) for a in arguments[1:])])
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "source"))
    assert ours == theirs | {"eos_token_id": [2, 3]}  # every id that ends an answer, where config.json named none
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_text() == (tmp_path / "source" / name).read_text(), name
