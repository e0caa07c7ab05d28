"""What several tests of weights stand on."""

import pytest


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{name: folder} of BASES."""
    from peft_models import BASES, tiny_base

    home = tmp_path_factory.mktemp("bases")
    for name, options in BASES.items():
        tiny_base(**options).save_pretrained(home / name)
    return {name: str(home / name) for name in BASES}


@pytest.fixture(scope="module")
def few_entries(tmp_path_factory):
    """The entries of an archive of torch.save with one tensor of 6 numbers."""
    torch = pytest.importorskip("torch")
    from torch_archives import entries_of, save

    return entries_of(save(tmp_path_factory.mktemp("few") / "a.bin", {"w": torch.arange(6.0)}))


@pytest.fixture
def written(tmp_path, few_entries):
    """Makes a file whose data.pkl is the given program; its one storage, "0", has 24 bytes."""
    from torch_archives import pack

    return lambda program: pack(tmp_path / "a.bin", few_entries | {"data.pkl": program})
