"""Ids in use count, not how many pieces a tokenizer has."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from longlora_jax.config_file import read_config
from longlora_jax.data import load_tokenizer
from longlora_jax.errors import UserError
from longlora_jax.training import run
from longlora_jax.training.resolve import resolve

ROOT = Path(__file__).parents[2]


def test_a_tokenizer_with_more_pieces_than_the_model_has_rows(tmp_path):
    """Catches: CodeLlama-34b's pieces refused, none of which is in the data, or one that is in it let through."""
    shutil.copytree(ROOT / "models" / "tiny-python-llama", tmp_path / "t")
    file = tmp_path / "t" / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"extra_special_tokens": ["<one>", "<two>"]}
    file.write_text(json.dumps(config))
    assert load_tokenizer(str(tmp_path / "t")).vocab_size == 4098
    given = read_config(str(ROOT / "configs" / "quickstart.py"))
    given.init_from = given.data.tokenizer = str(tmp_path / "t")
    resolved, _ = resolve(given, str(tmp_path / "work"))
    assert resolved.model.vocab_size == 4096
    run.check_ids(np.array([[0, 4095]]), resolved)
    with pytest.raises(UserError, match="data holds token 4096, and the model's vocabulary of 4096 ends before it"):
        run.check_ids(np.array([[0, 4096]]), resolved)
