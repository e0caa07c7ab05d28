"""Files that commands write: whole at every moment, through links, and into what is no file."""

import os
import subprocess
import sys
import threading

import pytest

from longlora_jax.errors import UserError
from longlora_jax.evals.plots import plot_perplexity
from longlora_jax.files import check_writable, write_json, write_text


@pytest.fixture
def pipe(tmp_path):
    """A named pipe, and what a reader gets out of it."""
    path, got = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()), daemon=True)
    reader.start()

    def read() -> bytes:
        reader.join(20)
        return got[0]

    return str(path), read


def test_what_is_no_file_is_written_into(pipe):
    """Catches: --json /dev/null, given by root, that puts a file in the place of the device for the whole machine."""
    path, read = pipe
    check_writable(path)
    write_json(path, {"a": 1})
    assert read() == b'{\n  "a": 1\n}\n'
    assert os.listdir(os.path.dirname(path)) == ["pipe"] and not os.path.isfile(path)


@pytest.mark.parametrize("there", [True, False], ids=["a file", "nothing yet"])
def test_a_link_stays_one(tmp_path, there):
    """Catches: a link to a file elsewhere, on a larger disk for instance, replaced by the file."""
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "a.json", tmp_path / "link.json"
    if there:
        target.write_text("before")
    link.symlink_to(target)
    check_writable(str(link))
    write_text(str(link), "after")
    assert link.is_symlink() and target.read_text() == "after"
    assert [p.name for p in tmp_path.rglob("*.incomplete")] == []


def test_pictures_are_written_through_links(tmp_path):
    """Catches: a second way of writing a file, which replaces the link."""
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    plot_perplexity({"m": [(8, 2.0), (16, 3.0)]}, str(tmp_path / "b.png"), title="x")
    assert (tmp_path / "b.png").is_symlink() and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_standard_output_that_goes_to_a_file_is_added_to(tmp_path):
    """Catches: --json /dev/stdout > FILE that loses the lines printed before or after it."""
    code = f"""
from longlora_jax.files import write_text
print("before")
write_text({str(tmp_path / "out.txt")!r}, "between\\n")
print("after")
"""
    with open(tmp_path / "out.txt", "w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out.txt").read_text() == "before\nbetween\nafter\n"


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    """Catches: a disk that is full, and with it the results of before gone, or half a file beside them."""
    path = tmp_path / "a.json"
    path.write_text("before")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_text(str(path), "after")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("name", ["", "folder", "none/a.json", "none/", "new/", "dangling"])
def test_where_no_file_can_be_is_said_at_once(tmp_path, monkeypatch, name):
    """Catches: hours of work whose results have no place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "a.json")
    with pytest.raises(UserError, match="cannot be written: give a file in an existing folder"):
        check_writable(name)
