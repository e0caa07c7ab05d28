"""The data room as a whole: what a config may leave out, and what the room must not import."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longlora_jax.config import Config, DataConfig, validate
from longlora_jax.errors import UserError

REPO = Path(__file__).parents[2]
TINY = str(REPO / "models" / "tiny-python-llama")


def command(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=REPO, env=os.environ | env, capture_output=True, text=True)


def test_a_config_without_a_path_is_refused():
    """Catches: a run that trains on every file of the folder that it happens to be started in."""
    config = Config(seq_len=16, steps=1, init_from="x", data=DataConfig(source="jsonl"))
    with pytest.raises(UserError, match="^data.path is empty"):
        validate(config)
    config.data.path, config.eval.every = "x", 5
    with pytest.raises(UserError, match="^eval.data.path is empty"):
        validate(config)
    config.eval.data.source, config.mixture = "python", (DataConfig(),)
    with pytest.raises(UserError, match=r"^mixture\[0\].path is empty"):
        validate(config)


def test_the_room_imports_neither_jax_nor_torch(tmp_path):
    """Catches an import that would keep data/ out of a worker process without jax."""
    for file in (REPO / "longlora_jax" / "data").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {m.split(".")[0] for m in modules} & {"jax", "jaxlib", "torch"}, file
    (tmp_path / "a.txt").write_text("one two three four\n" * 20)
    code = f"""
import sys
sys.modules |= dict.fromkeys(("jax", "jaxlib", "torch", "transformers"))
from longlora_jax import data
tokenizer = data.load_tokenizer({TINY!r})
ids = data.tokenize_documents(data.read_documents("text", {str(tmp_path)!r}), tokenizer)
windows = data.pack_documents(ids, 8, eos_id=tokenizer.eos_id)
print(next(data.batches(windows, batch_size=2, seed=0))["tokens"].shape)
"""
    done = command("-c", code)
    assert done.stdout.strip() == "(2, 8)", done.stderr
