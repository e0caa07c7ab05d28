"""Hostile and damaged files of torch.save: refused in one line and at once, never run; damage that passes is read as
torch reads it."""

import pickle
import random
import struct
import time
import tracemalloc
import types
import warnings
import zipfile

import pytest
from torch_archives import (
    PARAMETER,
    REBUILD,
    Call,
    OrderedDict,
    Persistent,
    check,
    described,
    entries_of,
    pack,
    pickled,
    refused,
    save,
)

from longlora_jax.errors import UserError
from longlora_jax.weights import torch_archive
from longlora_jax.weights.torch_files import open_torch

torch = pytest.importorskip("torch")


def word(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


COMMAND = word("touch canary")
ORDERED = b"ccollections\nOrderedDict\n)R"
HOSTILE = {
    "REDUCE": b"\x80\x02cos\nsystem\n" + COMMAND + b"\x85R.",
    "posix": b"\x80\x02cposix\nsystem\n(" + COMMAND + b"tR.",
    "eval": b"\x80\x02cbuiltins\neval\n(" + word("open('canary', mode='w')") + b"tR.",
    "exec": b"\x80\x02c__builtin__\nexec\n(" + word("open('canary', mode='w')") + b"tR.",
    "STACK_GLOBAL": b"\x80\x04" + word("os") + word("system") + b"\x93" + COMMAND + b"\x85R.",
    "INST": b"\x80\x02(" + COMMAND + b"ios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\n" + COMMAND + b"o.",
    "BUILD": b"\x80\x02" + ORDERED + b"}" + word("__setstate__") + b"cos\nsystem\nsb" + COMMAND + b"b.",
    "in a table": b"\x80\x02}" + word("w") + b"cos\nsystem\n" + COMMAND + b"\x85Rs.",
    "before the state": b"\x80\x02" + ORDERED + b"cos\nsystem\n" + COMMAND + b"\x85R0}b.",
}
UNKNOWN = {
    "NEWOBJ": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "NEWOBJ_EX": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "EXT1": b"\x80\x02\x82\x01" + COMMAND + b"\x85R.",
    "EXT4": b"\x80\x02\x84\x01\0\0\0" + COMMAND + b"\x85R.",
    "INST": b"\x80\x02(icollections\nOrderedDict\n.",
    "OBJ": b"\x80\x02(ccollections\nOrderedDict\no.",
    "DUP": b"\x80\x02}2.",
    "POP": b"\x80\x02}}0.",
    "PERSID": b"\x80\x02P0\n.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "BYTEARRAY8": b"\x80\x05\x96" + bytes(8) + b".",
    "EMPTY_SET": b"\x80\x04\x8f.",
    "EMPTY_LIST": b"\x80\x02].",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_run(written, tmp_path, monkeypatch, name):
    """Catches: a pickle that runs a command, by any of the opcodes that find or call something."""
    monkeypatch.chdir(tmp_path)
    reason = refused(written(HOSTILE[name]))
    assert "asks for" in reason or name == "INST" and "uses INST" in reason
    assert not (tmp_path / "canary").exists()
    pickle.loads(HOSTILE[name])
    assert (tmp_path / "canary").exists(), "the test's own pickle is harmless"


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_opcodes_are_refused(written, name):
    """Catches: an opcode that no state dict needs, let in because it looks harmless."""
    assert f"uses {name}, which no table" in refused(written(UNKNOWN[name]))


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        *(("builtins", "getattr"), ("collections", "OrderedDict.fromkeys"), ("collections.abc", "OrderedDict")),
        *(("torch", "load"), ("torch.hub", "load"), ("torch", "storage.FloatStorage"), ("torch ", "FloatStorage")),
        *(("", "collections OrderedDict"), ("collections OrderedDict", ""), ("torch", "QInt8Storage")),
    ],
)
def test_every_other_name_is_refused(written, module, attribute):
    """Catches: names looked up by a part of them, with dots or with spaces in them."""
    assert "asks for" in refused(written(b"\x80\x04" + word(module) + word(attribute) + b"\x93."))
    assert "asks for" in refused(written(b"\x80\x02c" + f"{module}\n{attribute}\n.".encode()))


# Note 99 is a tuple of 2**99 empty ones.
DOUBLED = b")\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(99))
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((%bctorch\nFloatStorage\n%b%bK\x06tQK\0"
TENSOR %= (word("storage"), word("0"), word("cpu"))
BOMBS = {
    "tables": b"}" * 200_000 + b".",
    "marks": b"(" * 200_000 + b".",
    "nested tuples": b")" + b"\x85" * 200_000 + b".",
    "notes": b")" + b"\x94" * 200_000 + b".",
    "doubled tuples": DOUBLED + b".",
    "a doubled key": DOUBLED + b"}h\x63Ns.",
    "a doubled shape": DOUBLED + TENSOR + b"h\x63h\x63\x89" + ORDERED + b"tR.",
    "a doubled storage": DOUBLED + b"h\x63Q.",
    "a doubled name": DOUBLED + b"h\x63h\x63\x93.",
    "a far note": b"}r\xff\xff\xff\x7f.",
    "a large product": TENSOR + b"\x8a\x06\xff\xff\xff\xff\xff\x7f" + word("ab") + b"\x86)\x89" + ORDERED + b"tR.",
    "a long number": b"\x8b\x00\x00\x03\x00" + b"\x7f" * 0x30000 + b".",
    "a long decimal": b"L" + b"9" * 200_000 + b"L\n.",
    "a long word": b"X\xff\xff\xff\xffabc.",
    "a longer word": b"\x8d" + b"\xff" * 7 + b"\x7fabc.",
    "a table in itself": b"}\x94" + word("w") + b"h\x00s.",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "nested tuples" else ()) for name in BOMBS]
)
def test_bombs_end_at_once(written, name):
    """Catches: memory or time that grows with what a program describes instead of with its length."""
    path = written(b"\x80\x04" + BOMBS[name])
    tracemalloc.start()
    started = time.monotonic()
    try:
        refused(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 100 bytes for each byte of the program, as the limit of data.pkl promises, and some for the rest.
    assert peak < 100 * len(BOMBS[name]) + 1e6
    assert time.monotonic() - started < 15  # measured: 1.6 s for the longest, traced


def stored(*identity):
    return described(storage=Persistent(*identity))


FLOAT = torch.FloatStorage


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (described(offset=1), "[2, 3] in it ends at 7 of the 6 elements"),
        (described(stride=(4, 1)), "ends at 7 of the 6"),
        (described(stride=(-3, 1)), "absurd"),
        (described(offset=-1), "absurd"),
        (described(shape=(2, -3)), "absurd"),
        (described(shape=(2, True)), "absurd"),
        (described(shape=(2.0, 3)), "absurd"),
        (described(shape=(2, 3, 1)), "absurd"),
        (described(shape=(0, 2**60), stride=(1, 1)), "absurd"),
        (described(shape=(0, *[2**40] * 9), stride=(1,) * 10), "absurd"),
        (described(shape=(1,) * 99, stride=(1,) * 99), "absurd"),
        (described(shape=(2**40, 2**40), stride=(0, 0)), "absurd"),
        (described(shape=(7,), stride=(0,)), "repeats the 6 elements"),
        (described(rest=({"neg": True},)), "unknown way"),
        (described(storage=FLOAT), "unknown way"),
        ({"w": Call(REBUILD)}, "unknown way"),
        ({"w": Call(PARAMETER, 1, True, OrderedDict())}, "unknown way"),
        ({"w": Call(OrderedDict, (("a", 1),))}, "unknown way"),
        (stored("storage", FLOAT, "1", "cpu", 6), "storage 1 is missing"),
        (stored("storage", FLOAT, "../data.pkl", "cpu", 6), "is missing"),
        (stored("storage", FLOAT, "0", "cpu", 7), "24 bytes, not those of 7"),
        (stored("storage", torch.HalfStorage, "0", "cpu", 6), "24 bytes, not those of 6 float16"),
        (stored("storage", FLOAT, "0", "cpu", -6), "no storage"),
        (stored("storage", FLOAT, "0", "cpu"), "no storage"),
        (stored("module", FLOAT, "0", "cpu", 6), "no storage"),
        (stored("storage", OrderedDict, "0", "cpu", 6), "no storage"),
        (stored("storage", FLOAT, 0, "cpu", 6), "no storage"),
        (stored(), "no storage"),
        (
            {"a": described()["w"], "b": stored("storage", torch.IntStorage, "0", "cpu", 6)["w"]},
            "storage 0 is float32 and int32",
        ),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_wrong_descriptions_are_refused(written, table, reason, protocol):
    """Catches: a tensor that would read beyond its storage, a crash in read(), another error than ValueError."""
    assert reason in refused(written(pickled(table, protocol)))


@pytest.mark.parametrize("protocol", [2, 5])
def test_good_descriptions_are_read(written, protocol):
    """Catches: refusals above that have another reason than the one that they test."""
    check(written(pickled(described(), protocol)), {"w": torch.arange(6.0).reshape(2, 3)})
    turned = described(shape=(3, 2), stride=(1, 3))
    check(written(pickled(turned, protocol)), {"w": torch.arange(6.0).reshape(2, 3).t()})


def frame(length):
    return b"\x95" + struct.pack("<Q", length)


DAMAGED = [b"", b".", b"\x80", b"\x80\2", b"\x80\6}.", b"}.", b"\x80\2\x80\2}.", b"\x80\2\xff."]
DAMAGED += [
    b"\x80\4" + program
    for program in (
        *(b".", b"}", b"}.}", b"}}.", b"}(.", b"(}.", b"t.", b"\x85.", b"R.", b"}R.", b"})R.", b"b.", b"}}b.", b"Q."),
        *(b"s.", b"u.", b"(u.", b"}NNs.", b"}K\1K\1s.", b"}(K\1K\1u.", b"}(" + word("w") + b"u.", b"Nh\0."),
        *(b"N" + word("w") + b"Ns.", b"}" + (word("w") + b"Ns") * 2 + b".", b"}X\3\0\0\0\xed\xa0\x80Ns."),
        *(b"h\0.", b"q\0.", b"}q\1.", b"}q\0q\0.", b"}q\0h\1.", b"\x93.", b"NN\x93.", ORDERED + b"Nb."),
        *(word("OrderedDict") + b")R.", b"X\1\0\0\0\xff.", b"c\xff\n\xff\n.", b"S'\\H'\n.", frame(2**63) + b"}."),
        *(frame(3) + b"}.", frame(3) + ORDERED + b".", frame(11) + frame(2) + b"}."),
    )
]


@pytest.mark.parametrize("program", DAMAGED)
def test_damaged_programs_are_refused(written, program):
    """Catches: IndexError, KeyError, a warning and the like from a program that takes what is not there."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "its pickle" in refused(written(program)) or "in it" in refused(written(program))


def test_files_cut_off_are_refused(tmp_path):
    """Catches: a download that stopped, read as a model; every length is tried."""
    path = tmp_path / "a.bin"
    save(path, {"w": torch.arange(9.0)})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(str(path))


def test_damaged_archives_are_refused(tmp_path):
    """Catches: bytes of another place, of another byte order or still compressed, read as weights."""
    path, table = tmp_path / "a.bin", {"w": torch.arange(64.0), "v": torch.ones(3)}
    entries = entries_of(save(path, table))

    def changed(name, content):
        return refused(pack(path, entries | {name: content}))

    def without(name):
        return refused(pack(path, {key: content for key, content in entries.items() if key != name}))

    assert "storage 0 is missing" in without("data/0")
    assert "255 bytes, not those of 64 float32" in changed("data/0", bytes(255))
    assert "260 bytes" in changed("data/0", bytes(260))
    assert "no data.pkl" in without("data.pkl")
    assert "no data.pkl" in changed("data.pkl", bytes(4_000_001))
    assert "no version" in without("version")
    assert "version is" in changed("version", b"11\n")
    assert "not little-endian" in changed("byteorder", b"big")
    assert "two of its zip entries" in changed("DATA/0", bytes(256))
    assert "compressed" in refused(pack(path, entries, zipfile.ZIP_DEFLATED))
    pack(path, entries)
    content = path.read_bytes()
    at = content.index(entries["data.pkl"]) + 60
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert "checksum" in refused(path)
    path.write_bytes(content.replace(b"PK\3\4", b"PK\3\5").replace(b"PK\3\5", b"PK\3\4", 1))
    assert "has no header" in refused(path)
    path.write_bytes(b"PK\3\4" + content)
    assert "do not start with the file" in refused(path)
    for field, value, reason in [
        ("flag_bits", 1, "compressed, encrypted or a folder"),
        ("compress_type", zipfile.ZIP_DEFLATED, "compressed, encrypted or a folder"),
        ("compress_size", 255, "compressed, encrypted or a folder"),
        ("external_attr", 0x10, "compressed, encrypted or a folder"),
        ("header_offset", len(content), "has no header"),
        ("header_offset", 2**64 - 1, "has no header"),
        ("filename", "elsewhere/data/0", "not in one folder"),
        ("comment", b"none", None),
    ]:

        def edit(archive, field=field, value=value):
            archive.comment = b"PK\3\4" + bytes(8)  # a short header, where one entry below points
            setattr(archive.getinfo("folder/data/0"), field, value)

        pack(path, entries, edit=edit)
        assert reason in refused(path) if reason else open_torch(path)["w"].shape == (64,)


def test_a_long_list_of_entries_is_refused(tmp_path, monkeypatch):
    """Catches: gigabytes of zip entries, which zipfile would hold at once."""
    monkeypatch.setattr(torch_archive, "_DIRECTORY_LIMIT", 70_000)
    path = tmp_path / "a.bin"
    check(save(path, {"w": torch.ones(2)}), {"w": torch.ones(2)})
    assert "too many" in refused(pack(path, entries_of(path) | {f"data/{i}": b"" for i in range(1, 1400)}))


class Known(pickle.Unpickler):
    """torch's own unpickler for the protocols that weights_only does not know, kept from running anything."""

    def find_class(self, module, name):
        known = [("collections", "OrderedDict"), *((f.__module__, f.__name__) for f in (REBUILD, PARAMETER))]
        assert (module, name) in known
        return super().find_class(module, name)


def loaded(path):
    """What torch gives."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        known = types.SimpleNamespace(Unpickler=Known, __name__="known")
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=known)


def accepted(path, otherwise=None):
    """Whether a file is read, to what torch gives, or otherwise to this table; False if it is refused in one line."""
    try:
        found = open_torch(path)
    except (ValueError, OSError) as error:
        assert str(error).isprintable() and len(str(error)) < 300
        return False
    if any(isinstance(tensor.dtype, str) for tensor in found.values()):
        return False  # refused by whoever opens it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = loaded(path)
        except (RuntimeError, ValueError):
            assert otherwise is not None
            expected = otherwise
    try:
        check(path, expected)
    except UserError as error:  # torch reads what a checksum says is damaged
        assert "its checksum is wrong" in str(error)
        return False
    return True


def mutated(content, rng, times):
    """Some bytes flipped, put in, taken out or doubled."""
    content = bytearray(content)
    for _ in range(times):
        at, length = rng.randrange(len(content)), rng.choice([1, 1, 2, 4, 16])
        kind = rng.choice(["bit", "byte", "number", "number", "insert", "delete", "double"])
        if kind == "bit":
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            content[at] = rng.choice([0, 1, 2, 127, 128, 255, rng.randrange(256)])
        elif kind == "number":  # the one that a BININT1 gives
            content[content.find(b"K", at) + 1] = rng.randrange(8)
        elif kind == "insert":
            content[at:at] = rng.randbytes(length)
        elif kind == "delete":
            del content[at : at + length]
        else:
            content[at:at] = content[at : at + length]
    return bytes(content)


FUZZED = {
    "model.layers.0.self_attn.q_proj.weight": torch.arange(12.0).reshape(3, 4).t(),
    "model.layers.0.mlp.down_proj.weight": torch.ones(2, 2).half(),
    "lm_head.weight": torch.arange(3.0)[1:],
}


@pytest.mark.parametrize("protocol", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_fuzzed_pickles_are_refused_or_read_as_torch_does(tmp_path, protocol):
    """Catches: any other error than ValueError, and any tensor that torch reads differently."""
    rng, path, read = random.Random(protocol), tmp_path / "a.bin", 0
    entries = entries_of(save(path, OrderedDict(FUZZED), pickle_protocol=protocol))
    for _ in range(1000):
        changed = {"data.pkl": mutated(entries["data.pkl"], rng, times=rng.choice([1, 1, 2, 5]))}
        read += accepted(pack(path, entries | changed))
    assert 20 < read < 500  # both ends are reached


def test_fuzzed_archives_are_refused_or_read_as_torch_does(tmp_path):
    """Catches: offsets, lengths or names of zip entries that are taken on trust.

    torch refuses some archives for the sake of fields that say nothing of the weights: then these are as they were.
    """
    rng, path, read = random.Random(1), tmp_path / "a.bin", 0
    save(path, FUZZED)
    content = path.read_bytes()
    for _ in range(1000):
        path.write_bytes(mutated(content, rng, times=1))
        read += accepted(str(path), otherwise=FUZZED)
    assert 20 < read < 500


def test_random_programs_are_refused_or_read_as_torch_does(written):
    """Catches: a sequence of opcodes that no pickler writes and that the interpreter does not expect."""
    rng, read = random.Random(2), 0
    tensor = TENSOR + b"K\2K\3\x86K\3K\1\x86\x89" + ORDERED + b"tR"
    items = [word(name) + tensor + b"s" for name in "abc"] + [b"(" + word("d") + tensor + word("e") + tensor + b"u"]
    odd = [bytes([opcode]) for opcode in b"}]()tsuQRbNI\x85\x86\x87\x88\x89\x93\x94."]
    odd += [
        word("a"),
        word("0"),
        tensor,
        TENSOR,
        ORDERED,
        b"h\0",
        b"q\0",
        b"K\1",
        b"cos\nsystem\n",
        b"}" + word("a"),
        b"}b",
    ]
    for _ in range(1000):
        body = b"".join(rng.choice(items if rng.random() < 0.7 else odd) for _ in range(rng.randrange(6)))
        read += accepted(written(b"\x80" + rng.choice([b"\2", b"\4"]) + rng.choice([b"}", ORDERED]) + body + b"."))
    assert 20 < read < 500
