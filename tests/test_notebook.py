"""docs/longlora.ipynb still runs."""

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
