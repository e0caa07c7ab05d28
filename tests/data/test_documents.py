"""Tokenized documents: any part of any of them, whatever they are held in."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlora_jax import data
from longlora_jax.config import DataConfig
from longlora_jax.data.documents import Head, InMemory, Memmap, open_documents
from longlora_jax.errors import UserError

TINY = "models/tiny-python-llama"


@pytest.fixture(scope="module")
def tokenizer() -> data.Tokenizer:
    return data.load_tokenizer(TINY)


def whole(documents) -> list[list[int]]:
    return [documents.read(i, 0, int(n))[0].tolist() for i, n in enumerate(documents.lengths)]


DOCUMENTS = st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=6)


@given(DOCUMENTS, st.data())
def test_memory_gives_every_part_back(documents, draw):
    """Catches: a part of a neighbour, an empty document that shifts the others, a mask that is not the ids' own."""
    plain = InMemory(documents, 7)
    masked = InMemory([(ids, [n % 2 for n in ids]) for ids in documents], None)
    assert plain.lengths.tolist() == [len(ids) for ids in documents] and whole(plain) == documents
    for index, ids in enumerate(documents):
        start = draw.draw(st.integers(0, len(ids)))
        stop = draw.draw(st.integers(start, len(ids)))
        assert plain.read(index, start, stop)[0].tolist() == ids[start:stop] and plain.read(index, 0, 0)[1] is None
        part, scored = masked.read(index, start, stop)
        assert part.dtype == scored.dtype == np.int32
        assert part.tolist() == ids[start:stop] and scored.tolist() == [n % 2 for n in ids[start:stop]]


def test_identity_tells_data_apart():
    """Catches: a resume on other tokens, other borders, another mask or another end that passes for the same data."""
    same = [InMemory([[1, 2], [3]], 0) for _ in range(2)]
    others = [InMemory([[1], [2, 3]], 0), InMemory([[1, 2], [4]], 0), InMemory([[1, 2], [3]], 1)]
    others += [InMemory([([1, 2], [0, 1]), ([3], [1])], 0), InMemory([([1, 2], [1, 1]), ([3], [1])], 0)]
    assert same[0].identity() == json.loads(json.dumps(same[1].identity()))
    assert len({json.dumps(d.identity()) for d in (same[0], *others)}) == 6


@given(DOCUMENTS, st.integers(1, 40))
def test_the_head_of_documents(documents, max_tokens):
    """Catches: a token too many or too few, and a document that is cut in the wrong place."""
    stream = [token for ids in documents for token in ids]
    head = Head(InMemory(documents, 7), max_tokens)
    assert [token for ids in whole(head) for token in ids] == stream[:max_tokens]
    assert all(ids == documents[i][: len(ids)] for i, ids in enumerate(whole(head))) and head.eos_id == 7
    assert head.identity() != InMemory(documents, 7).identity()


def test_a_memmap_of_either_width(tmp_path, tokenizer):
    """Catches: LongLoRA's uint16 read as uint32 or the reverse, in silence; an offset in bytes for one in ids."""
    ids = np.arange(1, 4000, dtype=np.int64)
    for width in ("uint16", "uint32"):
        ids.astype(f"<{width[0]}{int(width[4:]) // 8}").tofile(tmp_path / f"{width}.bin")
        documents = open_documents(DataConfig(source="tokens", path=str(tmp_path / f"{width}.bin")), tokenizer)
        assert documents.lengths.tolist() == [3999] and documents.eos_id is None
        part, scored = documents.read(0, 100, 1100)
        assert part.dtype == np.int32 and scored is None and (part == ids[100:1100]).all()
    both = Memmap(str(tmp_path), vocab_size=4096)
    assert both.lengths.tolist() == [3999, 3999] and (both.read(1, 5, 9)[0] == ids[5:9]).all()
    assert pickle.loads(pickle.dumps(both)).identity() == both.identity()
    head = open_documents(DataConfig(source="tokens", path=str(tmp_path), max_tokens=4001), tokenizer)
    assert head.lengths.tolist() == [3999, 2]
    large = np.array([5, 2**17, 6], "<u4")
    large.tofile(tmp_path / "large.bin")
    assert Memmap(str(tmp_path / "large.bin"), vocab_size=2**18).read(0, 0, 3)[0].tolist() == large.tolist()


def test_bad_memmaps_are_refused(tmp_path, tokenizer):
    """Catches: an id past the embedding, which XLA would clamp in silence; half an id at the end; an empty file."""
    np.array([1, 2, 4096, 3], "<u2").tofile(tmp_path / "past.bin")
    documents = Memmap(str(tmp_path / "past.bin"), vocab_size=4096)
    assert documents.read(0, 0, 2)[0].tolist() == [1, 2]
    with pytest.raises(UserError, match="past.bin holds the id 4096 at place 2, the tokenizer has ids below 4,096"):
        documents.read(0, 1, 4)
    (tmp_path / "past.bin").write_bytes(b"ab")
    with pytest.raises(UserError, match="has become shorter"):
        documents.read(0, 1, 4)
    for content in (b"", b"abc"):
        (tmp_path / "odd.bin").write_bytes(content)
        with pytest.raises(UserError, match=rf"odd.bin has {len(content)} bytes, which is not a number of uint16 ids"):
            Memmap(str(tmp_path / "odd.bin"), vocab_size=4096)
    with pytest.raises(UserError, match="nowhere' does not exist"):
        Memmap(str(tmp_path / "nowhere"), vocab_size=4096)
    with pytest.raises(UserError, match="hold_out and only name files of text"):
        open_documents(DataConfig(source="tokens", path=str(tmp_path), hold_out=("a",)), tokenizer)


def test_text_is_tokenized_into_memory(tmp_path, tokenizer):
    """Catches: a config's field that the sources do not see."""
    (tmp_path / "a.jsonl").write_text('{"t": "import os"}\n{"t": "x = 1"}\n{"t": 1}\n')
    config = DataConfig(source="jsonl", path=str(tmp_path), text_key="t", on_bad_row="skip")
    documents = open_documents(config, tokenizer)
    assert whole(documents) == [tokenizer.encode(text).tolist() for text in ("import os", "x = 1")]
    assert documents.eos_id == tokenizer.eos_id == 0
    config.max_tokens = len(tokenizer.encode("import os")) + 1
    assert whole(open_documents(config, tokenizer))[1] == tokenizer.encode("x = 1").tolist()[:1]
    config.on_bad_row, config.max_tokens = "stop", 0
    with pytest.raises(UserError, match="a.jsonl, line 3: no text but a number"):
        open_documents(config, tokenizer)


def test_a_first_example_past_max_tokens_is_named(tmp_path):
    """Catches: a run of no example at all that blames its data."""
    (tmp_path / "a.jsonl").write_text('{"instruction": "q", "output": "a"}\n')
    config = DataConfig(source="jsonl", path=str(tmp_path), task="sft", prompt="alpaca", max_tokens=5)
    with pytest.raises(UserError, match="max_tokens=5 is less than the .* tokens of the first example"):
        open_documents(config, data.load_tokenizer(TINY))


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "hf", "tokens", "arrayrecord"])
def test_an_empty_path_is_no_corpus(source, tokenizer, tmp_path, monkeypatch):
    """Catches: every file of the folder that a command happens to be started in, read and trained on."""
    (tmp_path / "a.txt").write_text("import os")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"source '{source}' has no path: "):
        open_documents(DataConfig(source=source), tokenizer)


def test_bos_is_added_where_it_is_wanted(tmp_path):
    """Catches: add_bos without effect, and a BOS where the tokenizer adds none."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(f"{TINY}/tokenizer.json")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    adding = data.Tokenizer(backend, bos_id=0, eos_id=0, pad_id=0)
    (tmp_path / "a.txt").write_text("import os")
    plain = data.load_tokenizer(TINY).encode("import os").tolist()
    config = DataConfig(source="text", path=str(tmp_path))
    assert whole(open_documents(config, adding)) == [[0, *plain]]
    config.add_bos = False
    assert whole(open_documents(config, adding)) == [plain]
    backend = tokenizers.Tokenizer.from_file(f"{TINY}/tokenizer.json")
    with pytest.raises(UserError, match="set eos_token in tokenizer_config.json"):
        open_documents(config, data.Tokenizer(backend, bos_id=None, eos_id=None, pad_id=None))


def test_many_documents_keep_their_order(tokenizer, monkeypatch):
    """Catches: ids out of order or lost where batches of long and short texts are tokenized at the same time."""
    monkeypatch.setattr("longlora_jax.data.tokenizer.CHARACTERS_AT_ONCE", 3000)
    monkeypatch.setattr("longlora_jax.data.tokenizer.CHARACTERS_AHEAD", 50_000)
    texts = [f"x_{n} = {n}\n" * (3000 if n % 7 == 0 else n) for n in range(1, 40)]
    documents = (data.Document(str(n), text) for n, text in enumerate(texts))
    ids = list(data.tokenize_documents(documents, tokenizer))
    assert [i.tolist() for i in ids] == [tokenizer.encode(text).tolist() for text in texts]
    stopped = data.tokenize_documents(
        (data.Document("", text) for text in texts), tokenizer, max_tokens=len(ids[0]) + 5
    )
    assert [len(i) for i in stopped] == [len(ids[0]), 5]


def test_a_fault_of_the_reader_comes_through(tokenizer):
    """Catches: a thread that hangs, or a corpus that ends in silence, where a file breaks in the middle."""

    def documents():
        yield data.Document("a", "x = 1\n" * 100_000)
        raise UserError("broken in the middle")

    with pytest.raises(UserError, match="broken in the middle"):
        list(data.tokenize_documents(documents(), tokenizer))
