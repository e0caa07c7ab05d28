"""Files of torch.save: what torch writes and loads is the oracle."""

import io
import os
import warnings

import numpy as np
import pytest
from torch_archives import check, entries_of, pack, refused, save, tables

from longlora_jax.errors import UserError
from longlora_jax.weights import torch_archive
from longlora_jax.weights.hf import open_tensor_file
from longlora_jax.weights.torch_files import open_torch

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", tables())
def test_tensors_are_those_that_torch_saved(tmp_path, name, protocol):
    """Catches: a view read without its strides or offset, bf16 read as f16, an opcode of a newer protocol unknown."""
    table = tables()[name]
    check(save(tmp_path / "a.bin", table, pickle_protocol=protocol), table)


def test_many_tensors(tmp_path):
    """Catches: notes past 255 or batches past 1,000 items, which the pickle writes in other opcodes."""
    table = {f"layer.{i}": torch.full((2,), float(i)) for i in range(2100)}
    check(save(tmp_path / "a.bin", table), table)


def test_other_writers(tmp_path):
    """Catches: trust in alignment, in the folder's name or in what only newer versions write."""
    table = tables()["views"]
    path = tmp_path / "pytorch_model-00001-of-00002.bin"
    check(save(path, table), table)
    old = {name: c for name, c in entries_of(path).items() if name in ("data.pkl", "version") or name[:5] == "data/"}
    check(pack(path, old), table)  # the entries that 1.6 to 1.13 wrote, and unaligned
    torch.serialization.set_crc32_options(False)
    try:
        check(save(path, table), table)
    finally:
        torch.serialization.set_crc32_options(True)
    buffer = io.BytesIO()
    torch.save(table, buffer)
    (tmp_path / "buffer.bin").write_bytes(buffer.getvalue())
    check(str(tmp_path / "buffer.bin"), table)


def test_other_dtypes_stay_words(tmp_path):
    """Catches: integers or doubles of a file that pass as weights, or that hide the other tensors."""
    names = "float64 int8 uint8 int16 int32 int64 bool complex64 complex128".split()
    table = {name: torch.ones(3, 2).to(getattr(torch, name)) for name in names} | {"w": torch.ones(2)}
    found = open_torch(save(tmp_path / "a.bin", table))
    assert all(type(found[name].dtype) is str and found[name].dtype == name for name in names)
    assert found["w"].dtype == np.float32 and found["int64"].shape == (3, 2)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="counts resident pages")
def test_only_what_is_used_is_read(tmp_path):
    """Catches: weights that are read, or copied, when the file is opened or a neighbour is asked for."""
    path = save(tmp_path / "a.bin", {"big": torch.ones(4096, 4096).t(), "small": torch.ones(8)})

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    open_torch(path)
    before = resident()
    found = open_torch(path)
    assert found["small"].read().sum() == 8
    column = found["big"].read()[:, 7]
    assert column.sum() == 4096 and not column.flags.writeable
    # A column of the turned matrix is 16 KB of its 64 MB; the kernel reads some pages ahead.
    assert resident() - before < 8e6


def test_a_damaged_storage_is_named(tmp_path):
    """Catches: wrong weights of a file whose checksum says so; its other weights refused; a sum computed each time."""
    path = tmp_path / "a.bin"
    save(
        path, {"small": torch.ones(9), "big": torch.arange(4096.0), "rows": (big := torch.zeros(8, 8)), "half": big[4:]}
    )
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(4096.0).numpy().tobytes()) + 5000] ^= 1
    path.write_bytes(content)
    found = open_torch(str(path))
    assert found["small"].read().sum() == 9 and found["half"].read().shape == (4, 8)
    for _ in range(2):
        with pytest.raises(UserError, match="a.bin is damaged, fetch it again .its storage . is damaged"):
            found["big"].read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_archive.Entry, "check", lambda *_: pytest.fail("checked again"))
        assert found["rows"].read().sum() == 0


def unusual(kind):
    """What torch.save takes besides tables of plain tensors."""
    ones, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    parameter.note = "mine"
    linear = torch.nn.Linear(2, 2)
    return {
        "nested": {"model": linear.state_dict()},
        "state_dict": {"state_dict": {"w": ones}, "epoch": 3},
        "number": {"w": ones, "epoch": 3},
        "optimizer": {"optimizer": torch.optim.SGD(linear.parameters(), momentum=0.9).state_dict()},
        "numbered": {0: ones},
        "tensor": ones,
        "module": linear,
        "float8": {"w": ones.to(torch.float8_e4m3fn)},
        "sparse": {"w": ones.to_sparse()},
        "meta": {"w": ones.to("meta")},
        "attribute": {"w": parameter},
        "negative": {"w": torch.ones(2, dtype=torch.complex64).conj().imag},
        "expanded": {"w": torch.ones(1).expand(5)},
        "storage": {"w": ones.untyped_storage()},
        "numpy": {"w": np.ones(2)},
        "unprintable": {"a\x1b[2J\n": ones},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nested", "model in it is no tensor: save the table"),
        ("state_dict", "state_dict in it is no tensor"),
        ("number", "epoch in it is no tensor"),
        ("optimizer", "save the table of tensors alone"),
        ("numbered", "where a name is needed"),
        ("tensor", "no table of tensors"),
        ("module", "asks for torch.nn.modules.linear.Linear: refused"),
        ("float8", "8-bit floats"),
        ("sparse", "a sparse tensor"),
        ("meta", "a tensor without values"),
        ("attribute", "a parameter with attributes"),
        ("negative", "in an unknown way"),
        ("expanded", "[5] in it repeats the 1 elements"),
        ("storage", "torch.storage.UntypedStorage"),
        ("numpy", "numpy"),
        ("unprintable", "where a name is needed"),
    ],
)
def test_what_is_no_table_of_plain_tensors_is_refused(tmp_path, kind, reason):
    """Catches: a checkpoint of something else read as a model, and a reason that does not tell what to do."""
    assert reason in refused(save(tmp_path / "a.bin", unusual(kind)))


@pytest.mark.parametrize("kind", ["nested", "module", "sparse", "negative", "expanded", "old format", "TorchScript"])
def test_a_whole_file_in_another_form_is_not_called_damaged(tmp_path, kind):
    """Catches: "fetch it again" for gigabytes that are right, and that torch would save in the form that is read."""
    path, ones = tmp_path / "a.bin", {"w": torch.ones(2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if kind == "TorchScript":
            torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
        elif kind == "old format":
            save(path, ones, _use_new_zipfile_serialization=False)
        else:
            save(path, unusual(kind))
    with pytest.raises(UserError, match="^a.bin cannot be read: ") as caught:
        open_tensor_file(str(path))
    assert "damaged" not in str(caught.value) and "fetch" not in str(caught.value)
    save(path, ones)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="^a.bin is damaged or cut off, fetch it again"):
        open_tensor_file(str(path))


def test_other_formats_are_refused(tmp_path):
    """Catches: torch's older and other formats called damaged, where the user can save again."""
    path = tmp_path / "a.bin"
    assert "before 1.6" in refused(save(path, {"w": torch.ones(2)}, _use_new_zipfile_serialization=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    assert "TorchScript" in refused(str(path))
    for protocol in (0, 1):
        assert "protocol 2 to 5" in refused(save(path, {"w": torch.ones(2)}, pickle_protocol=protocol))
    for content, reason in (
        (b"", "no zip file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "no zip file"),
        (b"PK\3\4" + bytes(99), "no whole zip file"),
        (b"PK\5\6" + bytes(18), "no zip file"),
    ):
        path.write_bytes(content)
        assert reason in refused(str(path))
    with pytest.raises(OSError):
        open_torch(str(tmp_path / "missing.bin"))
    with pytest.raises(OSError):
        open_torch(str(tmp_path))
