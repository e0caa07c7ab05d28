"""Archives of torch.save: tables of tensors, their entries, and programs written by hand."""

import collections
import io
import pickle
import zipfile

import numpy as np
import pytest

from longlora_jax.weights.tensors import DTYPES
from longlora_jax.weights.torch_files import open_torch

torch = pytest.importorskip("torch")


OrderedDict = collections.OrderedDict
REBUILD, PARAMETER = torch._utils._rebuild_tensor_v2, torch._utils._rebuild_parameter
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def random_bits(*shape, dtype=torch.float32, seed=0):
    """Any bit pattern, NaNs included."""
    generator = torch.Generator().manual_seed(seed)
    numel, size = int(np.prod(shape)), torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (numel * size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def tables():
    """What people save: {name: table}."""
    base = random_bits(6, 8)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Embedding(5, 2))
    views = {"whole": base, "turned": base.t(), "rows": base[2:4], "steps": base[1::2, 3::3], "one": base[5, 7]}
    return {
        "state_dict": OrderedDict((k, v) for k, v in model.state_dict().items() if v.is_floating_point()),
        "metadata": model[0].state_dict(),
        "parameters": dict(model.named_parameters()),
        "dtypes": {str(dtype): random_bits(3, 5, dtype=dtype) for dtype in FLOATS},
        "views": views | {"swapped": random_bits(2, 3, 4, dtype=torch.bfloat16).permute(2, 0, 1)},
        "tied": {"embed": base, "head": base, "same": base.view(48)},
        "small": {"scalar": torch.tensor(1.5), "ones": base[:1, :1]},
        "empty": {"rows": torch.empty(0, 3), "columns": torch.empty(3, 0), "end": base[6:, 8:]},
        "none": {},
        "umlauts": {"größe.weight": base},
    }


def save(path, table, **options):
    torch.save(table, path, **options)
    return str(path)


def check(path, table):
    """The tensors of the file are those of the table, bit by bit and in its order."""
    found = open_torch(path)
    assert list(found) == list(table)
    for name, tensor in found.items():
        expected = table[name].detach().clone(memory_format=torch.contiguous_format)
        array = tensor.read()
        assert tensor.dtype == array.dtype == DTYPES[str(expected.dtype).removeprefix("torch.")], name
        assert tensor.shape == array.shape == tuple(expected.shape), name
        assert array.tobytes() == expected.view(-1).view(torch.uint8).numpy().tobytes(), name


def entries_of(path):
    """{name within the folder: content}."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def pack(path, entries, method=zipfile.ZIP_STORED, edit=lambda archive: None):
    """Writes a file of these entries, as zipfile does it: nothing is aligned; edit changes its list of entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(f"folder/{name}", content)
        edit(archive)
    path.write_bytes(buffer.getvalue())
    return str(path)


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


class Persistent:
    """Pickled as a persistent id."""

    def __init__(self, *identity):
        self.identity = identity


def pickled(value, protocol=2):
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return obj.identity if isinstance(obj, Persistent) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


STORAGE = Persistent("storage", torch.FloatStorage, "0", "cpu", 6)


def described(shape=(2, 3), stride=(3, 1), offset=0, storage=STORAGE, rest=()):
    return {"w": Call(REBUILD, storage, offset, shape, stride, False, OrderedDict(), *rest)}


def refused(path):
    """The reason, in one line."""
    with pytest.raises((ValueError, OSError)) as caught:
        open_torch(path)
    reason = str(caught.value)
    assert reason and reason.isprintable() and len(reason) < 300
    return reason
