"""Tokenizes a corpus once, for all runs that will read it.

    python -m longlora_jax.data.prepare --source jsonl --path "books/*.jsonl.zst" --tokenizer DIR --out DIR

Killed or stopped, it goes on where it was when it is started again with the same arguments: what is finished lies in
shards beside the folder to be, which gets its name when all is there. A config reads it by
`data.source="arrayrecord"`, `data.path="DIR"`.
"""

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from longlora_jax import errors
from longlora_jax.data.formats import Reading
from longlora_jax.data.prepared import INDEX, MANIFEST, RECORD_TOKENS, VERSION, encoding_of, records_of
from longlora_jax.data.source import SOURCES, Corpus, Document
from longlora_jax.data.tokenizer import Tokenizer, end_of, load_tokenizer, tokenize_documents
from longlora_jax.errors import UserError
from longlora_jax.files import empty, new_folder, read_json, to_disk, write_json
from longlora_jax.progress import progress_bar

log = logging.getLogger(__name__)

SHARD_CHARACTERS = 2**26  # of text: about 30 MB of ids, and minutes of work that a kill can cost
SOURCES_FILE = "sources.json"
WORK = "work.json"  # what the shards of an unfinished folder were made from


@dataclass(frozen=True)
class Job:
    """What to prepare, and how: the same job gives the same folder."""

    source: str
    path: str
    tokenizer: str
    text_key: str = "text"
    split: str = "train"
    streaming: bool = False
    hold_out: tuple[str, ...] = ()
    max_tokens: int = 0
    add_bos: bool = True
    on_bad_row: str = "stop"
    shard_characters: int = SHARD_CHARACTERS


@dataclass
class Shard:
    """A finished file of records: what is in it, and what it was made from.

    sha256: of its ids; text_sha256: of its texts. position, skipped: those of the Reading after its last document.
    last: nothing of the corpus is wanted after it.
    """

    file: str
    bytes: int
    documents: int
    records: int
    tokens: int
    sha256: str
    text_sha256: str
    position: int
    skipped: int
    last: bool


def prepare(job: Job, out: str) -> dict[str, Any]:
    """Tokenizes a corpus into the new folder `out`, or goes on with that; returns its manifest.

    Raises UserError for what cannot be read, if `out` exists, and if unfinished work there is of another job or of
    a source that has changed.
    """
    if not out.isascii() and any("\ud800" <= c <= "\udfff" for c in out):  # bytes of a command line
        raise UserError(f"{ascii(out)[1:-1]} is no UTF-8: give another name")
    tokenizer = load_tokenizer(job.tokenizer)
    end_of(tokenizer)
    corpus = Corpus(job.source, job.path, hold_out=job.hold_out, split=job.split, streaming=job.streaming)
    with new_folder(out, resume=True) as folder:
        shards = _finished_shards(folder)
        path = os.path.join(folder, MANIFEST)
        _check_same_work(folder, job, tokenizer, begun=bool(shards) or os.path.exists(path))
        if not os.path.exists(path):
            if shards:
                log.info("going on after %d shards, %s tokens", len(shards), f"{sum(s.tokens for s in shards):,}")
            if not (shards and shards[-1].last):
                shards = _write_shards(folder, job, corpus, tokenizer, shards)
            if not shards:
                raise UserError(f"no document of {job.path!r} has a token: name another corpus")
            write_json(path, _manifest(folder, job, corpus, tokenizer, shards))
            to_disk(folder)
        manifest = read_json(path)
        kept = {MANIFEST, INDEX, SOURCES_FILE, *(shard["file"] for shard in manifest["shards"])}
        for name in sorted({*os.listdir(folder)} - kept, key=lambda name: name == WORK):  # WORK is the last
            os.unlink(os.path.join(folder, name))
    return manifest


class _Texts:
    """The documents of a corpus that are still to be tokenized, and of each what its shard must know."""

    def __init__(self, corpus: Corpus, job: Job, done: list[Shard]):
        self._documents, self._limit, self._done = corpus, job.shard_characters, done
        self._text_key = job.text_key
        self.reading = Reading(job.on_bad_row)
        self.notes: deque[tuple[int, int, str | None]] = deque()  # position, skipped, digest of a shard's texts

    def __iter__(self) -> Iterator[Document]:
        shard, characters, digest = 0, 0, hashlib.sha256()
        for document in self._documents.documents(self.reading, self._text_key):
            text = document.text.encode("utf-8")
            digest.update(len(text).to_bytes(8, "little") + text)
            characters += len(document.text)
            full = digest.hexdigest() if characters >= self._limit else None
            if shard >= len(self._done):
                self.notes.append((self.reading.position, self.reading.skipped, full))
                yield document
            elif full and full != self._done[shard].text_sha256:
                raise self._changed(shard)
            if full:
                shard, characters, digest = shard + 1, 0, hashlib.sha256()
        if shard < len(self._done):
            raise self._changed(shard)

    def _changed(self, shard: int) -> UserError:
        return UserError(
            f"the corpus has changed since {self._done[shard].file} was made of it: remove the unfinished "
            "folder beside --out to begin again"
        )


def _write_shards(folder: str, job: Job, corpus: Corpus, tokenizer: Tokenizer, done: list[Shard]) -> list[Shard]:
    """The finished shards, and those that are made of what follows them."""
    texts, shards, writer = _Texts(corpus, job, done), list(done), None
    tokens, position, skipped = sum(shard.tokens for shard in done), 0, 0
    if job.max_tokens and tokens >= job.max_tokens:
        return shards
    ids = tokenize_documents(texts, tokenizer, max_tokens=max(0, job.max_tokens - tokens), add_bos=job.add_bos)
    start, unit = done[-1].position if done else 0, " rows" if job.source == "hf" else "B"
    with progress_bar(corpus.size, label="tokenizing", unit=unit, start=start) as bar:
        for document in ids:
            position, skipped, text_sha256 = texts.notes.popleft()
            writer = writer or _ShardWriter(folder, len(shards), encoding_of(tokenizer.rows))
            writer.add(document)
            tokens += len(document)
            if text_sha256:
                shards.append(writer.close(text_sha256, position, skipped))
                writer = None
            bar.set_postfix_str(f"{tokens / 1e6:,.1f}M tokens", refresh=False)
            bar.update(position - bar.n)
        if not job.max_tokens or tokens < job.max_tokens:  # the whole corpus, and what is left out at its end
            position, skipped = texts.reading.position, texts.reading.skipped
            bar.update(position - bar.n)
    if writer:
        shards.append(writer.close("", position, skipped, last=True))
    elif shards:
        shards[-1].position, shards[-1].skipped = max(position, shards[-1].position), max(skipped, shards[-1].skipped)
    return shards


class _ShardWriter:
    """Writes the records of one shard; it counts as finished when close() has written what it holds beside it."""

    def __init__(self, folder: str, number: int, encoding: str):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._name = f"shard-{number:05}.array_record"
        self._path = os.path.join(folder, self._name)
        self._dtype = np.dtype(encoding).newbyteorder("<")
        self._writer = ArrayRecordWriter(self._path, "group_size:1")  # records are read one by one
        self._lengths: list[int] = []
        self._digest = hashlib.sha256()

    def add(self, ids: np.ndarray) -> None:
        """Writes a document, unless it has no token."""
        if not len(ids):
            return
        self._lengths.append(len(ids))
        content = ids.astype(self._dtype).tobytes()
        self._digest.update(len(content).to_bytes(8, "little") + content)
        step = RECORD_TOKENS * self._dtype.itemsize
        for start in range(0, len(content), step):
            self._writer.write(content[start : start + step])

    def close(self, text_sha256: str, position: int, skipped: int, *, last: bool = False) -> Shard:
        """Waits until the shard is on the disk, and says so in a file beside it."""
        self._writer.close()
        with open(self._path, "rb") as file:
            os.fsync(file.fileno())
        lengths = np.array(self._lengths, np.int64)
        np.save(f"{self._path}.npy", lengths)
        shard = Shard(
            file=self._name,
            bytes=os.path.getsize(self._path),
            documents=len(lengths),
            records=int(records_of(lengths).sum()),
            tokens=int(lengths.sum()),
            sha256=self._digest.hexdigest(),
            text_sha256=text_sha256,
            position=position,
            skipped=skipped,
            last=last,
        )
        write_json(f"{self._path}.json", asdict(shard))
        return shard


def _check_same_work(folder: str, job: Job, tokenizer: Tokenizer, *, begun: bool) -> None:
    path, manifest = os.path.join(folder, WORK), os.path.join(folder, MANIFEST)
    work = json.loads(json.dumps({**asdict(job), "format_version": VERSION, "fingerprint": tokenizer.fingerprint}))
    if not begun:
        empty(folder)  # nothing that a first try left, perhaps with wrong arguments, is of use
        write_json(path, work)
        return
    if os.path.exists(path):
        saved = read_json(path)
    else:  # removed a moment before the folder was to get its name
        said = read_json(manifest)
        saved = {**work, **said["source"], "add_bos": said["add_bos"], "fingerprint": said["tokenizer"]["fingerprint"]}
    if changed := [name for name in work if work[name] != saved.get(name)]:
        raise UserError(
            f"{folder} holds unfinished work with another {', '.join(changed)}: start with the same arguments to go "
            "on with it, or remove it"
        )


def _finished_shards(folder: str) -> list[Shard]:
    shards = []
    while os.path.exists(path := os.path.join(folder, f"shard-{len(shards):05}.array_record.json")):
        try:
            shard = Shard(**read_json(path))
            lengths = np.load(path.removesuffix(".json") + ".npy", allow_pickle=False)
            if os.path.getsize(path.removesuffix(".json")) != shard.bytes or lengths.sum() != shard.tokens:
                break
        except (UserError, TypeError, ValueError, OSError):
            break  # cut short by what stopped the machine: it is made again
        shards.append(shard)
    return shards


def _manifest(folder: str, job: Job, corpus: Corpus, tokenizer: Tokenizer, shards: list[Shard]) -> dict[str, Any]:
    """Writes the index and the list of sources; returns what the manifest says."""
    lengths = np.concatenate([np.load(os.path.join(folder, f"{shard.file}.npy")) for shard in shards])
    records = records_of(lengths)
    np.save(os.path.join(folder, INDEX), np.stack([lengths, np.cumsum(records) - records]))
    sources = _sources(corpus, shards[-1].position)
    with open(os.path.join(folder, SOURCES_FILE), "w", encoding="utf-8") as file:
        json.dump(sources, file, indent=1)
    with open(os.path.join(folder, SOURCES_FILE), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    names = ("source", "path", "text_key", "split", "streaming", "max_tokens", "on_bad_row")
    powers, counts = np.unique(np.frexp(lengths)[1] - 1, return_counts=True)
    kept = ("file", "bytes", "documents", "records", "tokens", "sha256")
    return {
        "format_version": VERSION,
        "tokenizer": {"folder": os.path.abspath(job.tokenizer), "fingerprint": tokenizer.fingerprint},
        "vocab_size": tokenizer.rows,
        "eos_id": tokenizer.eos_id,
        "add_bos": job.add_bos,
        "encoding": encoding_of(tokenizer.rows),
        "record_tokens": RECORD_TOKENS,
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "skipped_rows": shards[-1].skipped,
        # Documents of at least so many tokens, and of less than twice as many.
        "lengths": {str(2 ** int(power)): int(count) for power, count in zip(powers, counts, strict=True)},
        "source": {
            **{name: getattr(job, name) for name in names},
            "hold_out": list(job.hold_out),
            "files": len(sources) if corpus.files else 0,
            "sha256": digest,  # of sources.json, which has that of every file
        },
        "shards": [{name: getattr(shard, name) for name in kept} for shard in shards],
    }


def _sources(corpus: Corpus, position: int) -> list[dict[str, Any]]:
    """Size and SHA-256 of every file that was read, or what a dataset says of itself."""
    if corpus.dataset is not None:
        return [{"fingerprint": getattr(corpus.dataset, "_fingerprint", None), "rows_read": position}]
    sources, start = [], 0
    for path in corpus.files:
        if start >= position:
            break
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        sources.append({"file": str(path), "bytes": path.stat().st_size, "sha256": digest})
        start += path.stat().st_size
    return sources


def main() -> None:
    """Prepares what the command line names."""
    parser = errors.ArgumentParser(
        prog="python -m longlora_jax.data.prepare",
        description="Tokenize a corpus into a folder that runs read by data.source=arrayrecord. Started again with the "
        "same arguments after it was stopped, it goes on where it was.",
    )
    parser.add_argument("--source", choices=SOURCES, required=True, help="kind of corpus")
    parser.add_argument("--path", default="", help="file, folder, glob or dataset (name or name:config)")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder with tokenizer.json")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--text_key", default="text", help="where the text is in a row (default: %(default)s)")
    parser.add_argument("--split", default="train", help="split of a dataset (default: %(default)s)")
    parser.add_argument("--streaming", action="store_true", help="read a dataset's rows as they are needed")
    parser.add_argument("--hold_out", nargs="*", default=[], metavar="FILE", help="files by name that are never read")
    parser.add_argument("--max_tokens", type=int, default=0, help="stop after so many tokens (default: read all)")
    parser.add_argument("--no_bos", action="store_true", help="do not begin documents with BOS (data.add_bos=False)")
    parser.add_argument(
        "--on_bad_row",
        choices=("stop", "skip"),
        default="stop",
        help="what to do about rows that cannot be read: stop, or leave them out and count them (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=0, help="cores to tokenize on (default: all)")
    args = parser.parse_args()
    if args.workers < 0 or args.max_tokens < 0:
        raise UserError("--workers and --max_tokens must be 0 or more")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if args.workers:
        os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    job = Job(
        source=args.source,
        path=args.path,
        tokenizer=args.tokenizer,
        text_key=args.text_key,
        split=args.split,
        streaming=args.streaming,
        hold_out=tuple(args.hold_out),
        max_tokens=args.max_tokens,
        add_bos=not args.no_bos,
        on_bad_row=args.on_bad_row,
    )
    manifest = prepare(job, args.out)
    print(
        f"{args.out}: {manifest['tokens']:,} tokens of {manifest['documents']:,} documents in "
        f"{len(manifest['shards'])} shards, {manifest['skipped_rows']:,} rows left out"
    )


if __name__ == "__main__":
    errors.run(main)
