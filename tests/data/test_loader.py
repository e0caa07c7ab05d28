"""Batches: their order, their parts on hosts and in worker processes, and where they go on after a kill."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from readers import children, packed

from longlora_jax import data
from longlora_jax.errors import UserError

REPO = Path(__file__).parents[2]


def numbered(num: int, seq_len: int = 4, *, first: int = 0) -> np.ndarray:
    return np.arange(first, first + num * seq_len, dtype=np.int32).reshape(num, seq_len)


def split(batch_size: int, hosts: int) -> list[np.ndarray]:
    return np.split(np.arange(batch_size), hosts)


def ids_of(batch) -> list[tuple]:
    return [tuple(row) for row in batch["tokens"].tolist()]


def test_batch_holds_what_a_training_step_reads():
    """Catches a first token scored without context, and wrong shapes or dtypes."""
    batch = next(data.batches(numbered(7), batch_size=3, seed=0))
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        name: ((3, 4), np.int32) for name in ("tokens", "segment_ids", "positions", "loss_mask")
    }
    assert (batch["segment_ids"] == 1).all() and (batch["positions"] == np.arange(4)).all()
    assert (batch["loss_mask"] == [0, 1, 1, 1]).all()
    assert (np.diff(batch["tokens"]) == 1).all()


@settings(deadline=None, max_examples=5)
@example(num=5, batch_size=3, seed=1, stop=4)  # over the end of an epoch, and of the next
@given(st.integers(1, 12), st.integers(1, 7), st.integers(0, 2**32 - 1), st.integers(0, 12))
def test_resumed_batches_are_those_of_an_uninterrupted_run(num, batch_size, seed, stop):
    """Catches a position lost in the middle of an epoch or over its end."""
    windows = numbered(num)
    whole = list(islice(data.batches(windows, batch_size=batch_size, seed=seed), stop + 4))
    first = data.batches(windows, batch_size=batch_size, seed=seed)
    list(islice(first, stop))
    state = json.loads(json.dumps(first.get_state()))
    rest = list(islice(first, 4))
    assert first.get_state(stop) == state
    again = data.batches(windows, batch_size=batch_size, seed=seed)
    next(again)  # a restored iterator may already have been used
    again.set_state(state)
    assert again.step == stop
    for expected, kept, restored in zip(whole[stop:], rest, islice(again, 4), strict=True):
        for name in expected:
            np.testing.assert_array_equal(expected[name], kept[name])
            np.testing.assert_array_equal(expected[name], restored[name])


@pytest.mark.parametrize("stop", [pytest.param(x, marks=() if x in (0, 3, 6) else pytest.mark.slow) for x in range(7)])
@pytest.mark.parametrize("hosts", [(1, 2), (2, 4), (4, 1), (2, 2)])
def test_killed_and_resumed_on_other_hosts(stop, hosts):
    """Catches: rows read twice or never after a kill, when other hosts take up the run.

    The multiset of rows of the whole run is that of an undisturbed one, and each batch is the same rows.
    """
    parts, weights = [packed(60, 0), packed(40, 1)], [2.0, 1.0]

    def open_batches(rows):
        return data.batches(parts, batch_size=8, seed=5, weights=weights, rows=rows)

    undisturbed = [ids_of(batch) for batch in islice(open_batches(None), 7)]
    before = [open_batches(rows) for rows in split(8, hosts[0])]
    found = [sum((ids_of(next(host)) for host in before), []) for _ in range(stop)]
    states = [json.loads(json.dumps(host.get_state())) for host in before]
    assert all(state == states[0] for state in states)
    after = [open_batches(rows) for rows in split(8, hosts[1])]
    for host in after:
        host.set_state(states[0])
    found += [sum((ids_of(next(host)) for host in after), []) for _ in range(7 - stop)]
    assert found == undisturbed
    assert Counter(sum(found, [])) == Counter(sum(undisturbed, []))


def test_every_window_of_a_packed_corpus_comes_once_an_epoch():
    """Catches: hosts that share a row, a window that is left out, with rows cut 1, 2 and 4 ways."""
    windows = packed(80)
    expected = Counter(tuple(windows[i]["tokens"].tolist()) for i in range(len(windows)))
    steps = len(windows)  # 4 epochs of batches of 4
    for hosts in (1, 2, 4):
        readers = [data.batches(windows, batch_size=4, seed=1, rows=rows) for rows in split(4, hosts)]
        read = [row for _ in range(steps) for host in readers for row in ids_of(next(host))]
        for epoch in range(4):
            assert Counter(read[epoch * len(windows) : (epoch + 1) * len(windows)]) == expected


@settings(deadline=None, max_examples=5)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
@example(1, 1, 0)  # grain's own count of batches overflowed here
def test_every_epoch_reads_every_window_once(num, batch_size, seed):
    """Catches a last partial batch that is dropped, or windows drawn with replacement."""
    it = data.batches(numbered(num), batch_size=batch_size, seed=seed)
    rows = [tuple(row) for batch in islice(it, 3 * num) for row in batch["tokens"].tolist()]
    assert len(rows) == 3 * num * batch_size
    for start in range(0, len(rows), num):
        assert Counter(rows[start : start + num]) == Counter(map(tuple, numbered(num).tolist()))


def test_order_changes_with_the_epoch_and_the_seed(caplog):
    """Catches the same order each epoch, a seed without effect, and a silent second epoch."""
    caplog.set_level(logging.INFO)
    it = data.batches(numbered(64), batch_size=64, seed=0)
    assert it.epochs(3) == [3.0]
    one, two = (next(it)["tokens"].tolist() for _ in range(2))
    other = next(data.batches(numbered(64), batch_size=64, seed=1))["tokens"].tolist()
    assert one != two and one != other and one != numbered(64).tolist()
    assert "after step 2 the corpus has been read 2 times" in caplog.text


@pytest.mark.parametrize(
    "weights",
    [[1.0, 1.0, 2.0], *(pytest.param(x, marks=pytest.mark.slow) for x in ([1.0, 99.0], [3.0, 1.0], [0.7, 0.1]))],
    ids=str,
)
def test_a_mixture_has_its_shares_in_every_stretch(weights):
    """Catches: weights by the size of a corpus, a part that comes late, a part whose windows are not all read."""
    parts = [numbered(10 + 7 * i, first=1000 * i) for i in range(len(weights))]
    windows = [data.Joined(part) for part in parts]
    it = data.batches(windows, batch_size=8, seed=0, weights=weights)
    assert it.shares.tolist() == [w / sum(weights) for w in weights]
    part_of = [row[0] // 1000 for batch in islice(it, 100) for row in ids_of(batch)]
    for rows in (80, 400, 800):
        for part, share in enumerate(it.shares):
            # Of each part the nearest whole number of rows, or one beside it; grain rounds weights to about 1%.
            assert abs(part_of[:rows].count(part) - rows * share) <= 1 + 0.01 * rows * share
    assert it.epochs(100) == pytest.approx([800 * s / len(p) for s, p in zip(it.shares, parts, strict=True)])
    again = data.batches(windows, batch_size=8, seed=0, weights=weights)
    read = Counter(row for batch in islice(again, 100) for row in ids_of(batch) if row[0] < 1000)
    assert set(read) == set(map(tuple, parts[0].tolist())) or sum(read.values()) < len(parts[0])
    assert max(read.values()) - min(read.values()) <= 1  # every window of a part before any of them again


def test_the_same_corpus_twice_is_not_read_in_step():
    """Catches: a mixture of two packings of a corpus that shows each document twice in a batch."""
    it = data.batches([data.Joined(numbered(50))] * 2, batch_size=2, seed=0)
    assert sum(one == other for one, other in (ids_of(next(it)) for _ in range(25))) < 5


def test_a_position_of_another_run_is_refused():
    """Catches a resume on other data or another batch size, which would train on other tokens."""
    state = data.batches(numbered(8), batch_size=2, seed=0).get_state()
    for num, batch_size, seed, what in (
        (9, 2, 0, r"data\[0\].windows\[0\] was 8, is 9"),
        (8, 4, 0, "batch_size was 2, is 4"),
        (8, 2, 1, "seed was 0, is 1"),
    ):
        it = data.batches(numbered(num), batch_size=batch_size, seed=seed)
        with pytest.raises(UserError, match=f"{what}.*: resume with the config and the data of the run"):
            it.set_state(state)
    with pytest.raises(UserError, match=r"data\[0\].crc32 was \d+, is \d+: resume"):
        data.batches(numbered(8) + 1, batch_size=2, seed=0).set_state(state)
    mixed = data.batches([packed(), packed()], batch_size=2, seed=0, weights=[1, 2])
    with pytest.raises(UserError, match=r"weights\[1\] was 2.0, is 3.0: resume"):
        data.batches([packed(), packed()], batch_size=2, seed=0, weights=[1, 3]).set_state(mixed.get_state())
    with pytest.raises(UserError, match="data was .*, is .*; weights was"):
        mixed.set_state(state)
    for wrong in ({"batch_size": 0, "seed": 0}, {"batch_size": 1, "seed": -1}):
        with pytest.raises(UserError, match="batch_size="):
            data.batches(numbered(8), **wrong)


def test_evaluation_takes_the_first_windows_once():
    """Catches: packed windows that evaluation cannot read, a limit that is not kept, rows that fill up and score."""
    windows = packed()
    rows = np.arange(4)
    whole = list(data.in_order(windows, batch_size=4, rows=rows))
    few = list(data.in_order(windows, batch_size=4, rows=rows, max_windows=6))
    assert len(whole) == -(-len(windows) // 4) and len(few) == 2
    np.testing.assert_array_equal(few[0]["segment_ids"], whole[0]["segment_ids"])
    np.testing.assert_array_equal(few[1]["loss_mask"][:2], whole[1]["loss_mask"][:2])
    assert not few[1]["loss_mask"][2:].any()


# Worker processes


@pytest.mark.parametrize("workers", [2, *(pytest.param(x, marks=pytest.mark.slow) for x in (1, 3))])
def test_worker_processes_change_nothing_but_the_time(workers):
    """Catches: batches out of order or doubled with 1, 2 or 3 workers, a position that counts what waits in queues,
    processes that outlive their loader."""
    parts = [packed(60, 0), packed(40, 1)]

    def open_batches(workers):
        return data.batches(parts, batch_size=4, seed=3, weights=[1, 2], workers=workers)

    expected = list(islice(open_batches(0), 12))
    it = open_batches(workers)
    it.set_state(open_batches(0).get_state(5))
    for want, got in zip(expected[5:], islice(it, 7), strict=True):
        for name in want:
            np.testing.assert_array_equal(want[name], got[name])
    assert it.get_state() == open_batches(0).get_state(12) and len(children()) == workers
    it.close()
    assert not children()


def test_a_worker_that_is_killed_ends_the_run_in_one_line():
    """Catches: a loader that waits for ever for a process that the system has killed."""
    it = data.batches(packed(), batch_size=2, seed=0, workers=1)
    next(it)
    for process in children():
        os.kill(process, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"was ended from outside \(exit code -9\): .*set workers lower, or 0"
    ) as caught:
        list(islice(it, 50))
    assert time.monotonic() - began < 20 and "\n" not in str(caught.value)
    it.close()


class Broken(data.Windows):
    """Windows that cannot be read."""

    def __getitem__(self, index):
        raise UserError("the corpus in x changed: prepare it again")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_reader_says_is_heard(workers):
    """Catches: a fault of the data that becomes a traceback, or a hang, because another thread or process met it."""
    windows = Broken(data.InMemory([np.arange(9)], 0), data.plan_packing(np.array([9]), 3))
    it = data.batches(windows, batch_size=2, seed=0, workers=workers)
    with pytest.raises(UserError, match="the corpus in x changed: prepare it again"):
        next(it)
    it.close()


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), 9)", *(pytest.param(x, marks=pytest.mark.slow) for x in ("it.close()", ""))]
)
def test_workers_end_with_the_main_process(end):
    """Catches: readers that stay for ever, with their memory, after a run was killed; warnings of shared memory after
    one that ended well, or that nobody closed."""
    code = f"""
import os, sys
sys.path.insert(0, "tests/helpers")
from longlora_jax import data
from readers import children, packed
it = data.batches(packed(), batch_size=2, seed=0, workers=1)
batch = next(it)
print(*children(), flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=100)
    workers = [int(word) for word in done.stdout.split()]
    assert len(workers) == 1, done.stderr
    assert "kill" in end or "shared" not in done.stderr.lower()
    deadline = time.monotonic() + 20
    while alive := [pid for pid in workers if _runs(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.2)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
