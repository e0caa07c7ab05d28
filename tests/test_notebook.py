"""docs/longlora.ipynb: what is committed was run from top to bottom, says nothing of a machine, and still runs."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
NOTEBOOK = Path("docs/longlora.ipynb")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook) -> str:
    """All text that the outputs hold."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "\n".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in outputs)


def test_committed_outputs_are_of_one_run():
    """Catches: a cell that was run alone, an error or a warning that was saved, a path of somebody's machine."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells[1:])
    assert {output.get("name", "stdout") for cell in cells for output in cell.outputs} == {"stdout"}
    assert not re.search(r"(?<![\w.])/(?!s\b)\w+/\w+|[A-Z]:\\|Traceback", printed(notebook))


def test_what_it_says_of_perplexity_holds():
    """Catches: a text that was written for other numbers: the base fails, and training beats untrained YaRN."""
    text = printed(nbformat.read(NOTEBOOK, as_version=4))
    rows = {
        name: [float(x) for x in re.search(rf"^{name} +([\d. ]+)$", text, re.MULTILINE)[1].split()]
        for name in ("base", "base, YaRN x4, untrained", "extended by LongLoRA")
    }
    assert rows["base"][-1] > 3 * rows["base"][0]
    assert rows["extended by LongLoRA"][-1] < rows["base, YaRN x4, untrained"][-1] < rows["base"][-1]


@pytest.mark.slow
def test_it_runs(environment, monkeypatch, tmp_path):
    """Catches: a name that has moved, a flag that a command no longer takes, a cell that needs another before it."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("torch")
    for name, value in {**environment, "NOTEBOOK_STEPS": "2", "NOTEBOOK_OUT": str(tmp_path / "out")}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=where).execute()
    assert (tmp_path / "out" / "extended-hf" / "model.safetensors").is_file()
    assert "the model goes on:" in printed(notebook)
