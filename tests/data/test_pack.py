"""Packing: every token of every document is kept once, or counted where it went."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora_jax import data
from longlora_jax.errors import UserError

SIZES = st.lists(st.integers(0, 40), max_size=40)


def numbered(lengths, *, eos_id=None, scored=None) -> data.InMemory:
    """Documents in which no two tokens are the same: token i of document d is 1000 * d + i + 1."""
    documents = [1000 * d + np.arange(n) + 1 for d, n in enumerate(lengths)]
    if scored is not None:
        documents = list(zip(documents, scored, strict=True))
    return data.InMemory(documents, eos_id)


def segments(windows) -> list[list[list[int]]]:
    """The tokens of every segment of every window, by brute force from what a step reads."""
    found = []
    for i in range(len(windows)):
        row = windows[i]
        found.append([row["tokens"][row["segment_ids"] == s].tolist() for s in range(1, row["segment_ids"].max() + 1)])
    return found


# Joined and cut


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=20), st.integers(2, 16))
def test_packing_accounts_for_every_token(documents, seq_len):
    """Catches a token lost, doubled or moved, an EOS forgotten, a tail padded in silence."""
    stream = [token for ids in documents if ids for token in (*ids, 0)]
    arrays = [np.array(ids, np.int32) for ids in documents]
    if len(stream) < seq_len:
        with pytest.raises(UserError, match=rf"longer than the corpus \({len(stream)} tokens\)"):
            data.pack_documents(iter(arrays), seq_len, eos_id=0)
        return
    windows = data.pack_documents(iter(arrays), seq_len, eos_id=0)
    assert windows.dtype == np.int32 and windows.shape == (len(stream) // seq_len, seq_len)
    assert windows.ravel().tolist() == stream[: windows.size]


def test_joined_windows_are_one_segment():
    """Catches: documents of the paper's packing masked from each other, or a first token scored without context."""
    windows = data.pack(numbered([3, 2, 6], eos_id=7), 5)
    assert len(windows) == 2 and not windows.segmented
    row = windows[0]
    assert row["tokens"].tolist() == [1, 2, 3, 7, 1001]
    assert row["segment_ids"].tolist() == [1] * 5 and row["positions"].tolist() == [0, 1, 2, 3, 4]
    assert row["loss_mask"].tolist() == [0, 1, 1, 1, 1]
    assert {x.dtype for x in row.values()} == {np.dtype(np.int32)}
    assert windows.packing.account == {
        "documents": 3, "tokens": 14, "kept": 10, "cut": 2, "left_out": 0, "padded": 0, "dropped": 4,
    }  # fmt: skip


# Whole documents


def best_fit_by_hand(sizes, capacity) -> list[int]:
    """Free tokens of each bin under best-fit decreasing, one size at a time, with every bin looked at."""
    free = []
    for size in sorted(sizes, reverse=True):
        room = [i for i, left in enumerate(free) if left >= size]
        if room:
            i = min(room, key=lambda i: free[i])
        else:
            i = len(free)
            free.append(capacity)
        free[i] -= size
    return sorted(free)


@settings(deadline=None, max_examples=300)
@given(SIZES, st.integers(2, 20), st.sampled_from([None, 9]), st.booleans())
def test_best_fit_is_best_fit_decreasing(lengths, seq_len, eos_id, whole):
    """Catches: a window too full, a document split that fits, a token lost or twice, more windows than best-fit
    decreasing makes, an example cut where whole ones were asked for."""
    sizes = [n + (eos_id is not None) for n in lengths if n]
    fitting = [n % seq_len or seq_len for n in sizes] if not whole else [n for n in sizes if n <= seq_len]
    documents = numbered(lengths, eos_id=eos_id)
    if not fitting:
        with pytest.raises(UserError, match="longer than"):
            data.pack(documents, seq_len, "best_fit", whole=whole)
        return
    windows = data.pack(documents, seq_len, "best_fit", whole=whole)
    found = segments(windows)
    free = [seq_len - sum(map(len, row)) for row in found]
    assert min(free) >= 0
    tails = [n % seq_len for n in sizes if n % seq_len] if not whole else fitting
    expected = best_fit_by_hand(tails, seq_len) + ([] if whole else [0] * sum(n // seq_len for n in sizes))
    assert sorted(free) == sorted(expected)
    ends = [] if eos_id is None else [eos_id]
    originals = [[*(1000 * d + np.arange(n) + 1).tolist(), *ends] for d, n in enumerate(lengths) if n]
    pieces = [
        ids[at : at + seq_len]
        for ids in originals
        if not whole or len(ids) <= seq_len
        for at in range(0, len(ids), seq_len)
    ]
    assert sorted(map(tuple, (piece for row in found for piece in row))) == sorted(map(tuple, pieces))
    account = windows.packing.account
    assert account["kept"] == sum(map(len, pieces)) and account["padded"] == sum(free)
    assert account["left_out"] == (sum(n > seq_len for n in sizes) if whole else 0)
    assert account["cut"] == (0 if whole else sum(n > seq_len for n in sizes))


def test_a_packed_row_says_where_its_documents_are():
    """Catches: positions that run on, padding that is scored or seen, EOS forgotten, a first token scored."""
    row = data.pack(numbered([2, 4, 1], eos_id=7), 10, "best_fit")[0]
    assert row["tokens"].tolist() == [1, 2, 7, 1001, 1002, 1003, 1004, 7, 2001, 7]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 2, 2, 2, 3, 3]
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1]
    assert row["loss_mask"].tolist() == [0, 1, 1, 0, 1, 1, 1, 1, 0, 1]
    padded = data.pack(numbered([3]), 5, "best_fit")[0]
    assert padded["segment_ids"].tolist() == [1, 1, 1, 0, 0] and padded["loss_mask"].tolist() == [0, 1, 1, 0, 0]
    assert padded["positions"].tolist() == [0, 1, 2, 0, 0] and padded["tokens"].tolist() == [1, 2, 3, 0, 0]


def test_only_answers_are_scored_and_long_examples_are_left_out():
    """Catches: a prompt that is trained on, an answer that is cut, a row that nobody counts."""
    documents = numbered([4, 3, 9], scored=[[0, 0, 1, 1], [1, 0, 1], [1] * 9])
    windows = data.pack(documents, 8, "best_fit", whole=True)
    assert len(windows) == 1
    assert windows[0]["loss_mask"].tolist() == [0, 0, 1, 1, 0, 0, 1, 0]
    account = windows.packing.account
    assert (account["left_out"], account["cut"], account["dropped"], account["padded"]) == (1, 0, 9, 1)
    with pytest.raises(UserError, match="all 3 examples are longer than a window of 2 tokens, the shortest has 3"):
        data.pack(documents, 2, "best_fit", whole=True)


def test_windows_come_in_the_order_of_the_corpus():
    """Catches: an evaluation of the first windows that sees the longest documents alone."""
    windows = data.pack(numbered([3, 8, 2, 8, 5, 1]), 8, "best_fit")
    assert [row[0][0] // 1000 for row in segments(windows)] == [0, 1, 2, 3]
    assert all([x[0] for x in row] == sorted(x[0] for x in row) for row in segments(windows))


# Long documents alone


@settings(deadline=None)
@given(SIZES, st.integers(2, 12), st.integers(0, 30))
def test_long_documents_alone(lengths, seq_len, min_tokens):
    """Catches: a window over two documents, a short document that comes in, a tail that nobody counts."""
    least = max(seq_len, min_tokens)
    expected = [
        [(1000 * d + np.arange(n) + 1)[at : at + seq_len].tolist()]
        for d, n in enumerate(lengths)
        if n >= least
        for at in range(0, n - seq_len + 1, seq_len)
    ]
    documents = numbered(lengths)
    if not expected:
        with pytest.raises(UserError, match="no document has|longer than the corpus"):
            data.pack(documents, seq_len, "long", min_tokens=min_tokens)
        return
    windows = data.pack(documents, seq_len, "long", min_tokens=min_tokens)
    assert segments(windows) == expected and not windows.segmented
    assert windows.packing.account["left_out"] == sum(0 < n < least for n in lengths)
    assert all((windows[i]["positions"] == np.arange(seq_len)).all() for i in range(len(windows)))


# All of them


@settings(deadline=None)
@given(SIZES, st.integers(2, 12), st.sampled_from(["concat", "best_fit", "long"]), st.booleans())
def test_the_account_adds_up(lengths, seq_len, packing, eos):
    """Catches: tokens that are neither kept nor dropped, padding that is not counted."""
    documents = numbered(lengths, eos_id=0 if eos else None)
    try:
        windows = data.pack(documents, seq_len, packing)
    except UserError:
        return
    account = windows.packing.account
    assert account["tokens"] == sum(n + eos for n in lengths if n)
    assert account["documents"] == sum(n > 0 for n in lengths)
    assert account["kept"] + account["dropped"] == account["tokens"]
    assert len(windows) * seq_len == account["kept"] + account["padded"]
    assert account["padded"] == sum(int((windows[i]["segment_ids"] == 0).sum()) for i in range(len(windows)))
    if packing == "concat":
        assert account["padded"] == 0 and account["dropped"] == account["tokens"] % seq_len


def test_a_million_documents_in_seconds():
    """Catches: a bin packing that looks at every window for every document (hours)."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(6.5, 1.5, 1_000_000).astype(np.int64) + 1, 200_000)
    windows = data.plan_packing(lengths, 32_768, "best_fit")
    least = -(-int(lengths.sum()) // 32_768)
    assert least <= len(windows) <= least * 1.001


def test_packing_says_what_it_drops_and_refuses_what_cannot_be(caplog):
    """Catches a dropped tail that nobody hears of, and faults without an instruction."""
    caplog.set_level(logging.INFO)
    data.pack_documents([np.arange(1, 1200)], 500, eos_id=0)
    assert (
        "packed concat: 1,200 tokens of 1 documents in 2 windows of 500: 1,000 kept, 200 dropped, 0 padded, "
        "1 documents cut, 0 left out"
    ) in caplog.text
    with pytest.raises(UserError, match="seq_len=1 has no target"):
        data.pack_documents([np.arange(9)], 1, eos_id=0)
    with pytest.raises(UserError, match="set eos_token in tokenizer_config.json"):
        data.pack_documents([np.arange(9)], 4, eos_id=None)
    with pytest.raises(UserError, match="no document has 10 tokens, the longest has 9: lower seq_len or min_tokens"):
        data.pack(numbered([9, 3]), 10, "long")
    with pytest.raises(UserError, match=r"longer than the corpus \(0 tokens\)"):
        data.pack(numbered([0, 0]), 10, "best_fit")


def test_identity_tells_packings_apart():
    """Catches: a resumed run whose windows are others than those it was started with."""
    documents = numbered([5, 9, 3, 12], eos_id=0)
    different = [
        data.pack(documents, 4),
        data.pack(documents, 5),
        data.pack(documents, 4, "best_fit"),
        data.pack(documents, 4, "long"),
        data.pack(documents, 4, "long", min_tokens=9),
        data.pack(numbered([5, 9, 4, 11], eos_id=0), 4),
        data.pack(numbered([5, 9, 3, 12], eos_id=1), 4),
    ]
    identities = [str(windows.identity()) for windows in different]
    assert len(set(identities)) == len(identities)
    assert str(data.pack(numbered([5, 9, 3, 12], eos_id=0), 4).identity()) == identities[0]
