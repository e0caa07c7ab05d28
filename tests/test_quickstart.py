"""The quickstart's own commands, two steps long: every file it promises is there and says what the table says."""

import json
import subprocess
import sys

import numpy as np
import pytest

from longlora_jax.model.trainable import count
from longlora_jax.quickstart import BASE, BASE_ROW, CONTROL_ROW, EXTENDED_ROW, LENGTHS, format_table
from longlora_jax.weights import hf


def test_shipped_model_is_what_its_card_says():
    """The card's numbers: parameters, vocabulary, window, and a file of 16 MB at most."""
    config, params = hf.load_hf(BASE)
    assert count(params) == 5_770_496
    assert (config.vocab_size, config.max_position_embeddings) == (4096, 256)
    assert sum(x.nbytes for x in _leaves(params)) < 16e6
    assert all(np.isfinite(x.astype(np.float32)).all() for x in _leaves(params))


def _leaves(tree):
    return [leaf for child in tree.values() for leaf in (_leaves(child) if isinstance(child, dict) else [child])]


@pytest.mark.slow
def test_two_steps_of_everything(environment, tmp_path):
    """Catches a quickstart that breaks in any of its four parts."""
    command = [sys.executable, "-m", "longlora_jax.quickstart", "--steps", "2", "--tokens", "2048"]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "quickstart.json").read_text())["rows"]
    assert [r["seq_len"] for r in table[EXTENDED_ROW]] == list(LENGTHS)
    # Two steps change little: both trained rows are still near the untrained row of their scaling, at every length.
    # A wrong export, or a rope that got lost on the way, is not.
    untrained = [r["perplexity"] for r in table["base, YaRN x8, untrained"]]
    for name in (CONTROL_ROW, EXTENDED_ROW):
        assert [r["perplexity"] for r in table[name]] == pytest.approx(untrained, rel=0.05), name
    assert table[BASE_ROW][-1]["perplexity"] > 3 * table[BASE_ROW][0]["perplexity"]
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    assert hf.load_config(str(tmp_path / "extended-hf")).max_position_embeddings == 2048
    assert format_table(table) in done.stdout
