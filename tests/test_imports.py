"""The order of the house: imports point down, workers load no jax, everything public says what it is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "longlora_jax"
SCRIPTS = {"train", "convert_weights"}
# Each wing may import those before it, and inside a wing each file those before it. A file beside the wings is one.
# Wings without an order of files (None) have their own doors: data/, evals/, report/ and chat/ are small programs.
ORDER: dict[str, tuple[str, ...] | None] = {
    "errors": (),
    "fields": (),
    "files": (),
    "progress": (),
    "attention": (
        "patterns",
        "rope",
        "segments",
        "blockwise",
        "strips",
        "kernels",
        "partial",
        "ring",
        "attend",
        "context_parallel",
    ),
    "data_config": (),
    "model_config": (),
    "config": (),
    "config_file": (),
    "presets": (),
    "model": (
        *("codes", "losses", "lora", "trainable", "on_mesh", "quantized", "linear", "layers", "cache"),
        *("declared", "decoder"),
    ),
    "data": None,
    "weights": (
        *(
            "checksums",
            "hub",
            "tensors",
            "torch_archive",
            "torch_files",
            "family_keys",
            "families",
            "hf_rope",
            "config_faults",
        ),
        *("hf_config", "rules", "bnb", "layouts", "habits", "hf"),
        *("peft_files", "peft_layouts", "peft_export", "peft"),
        *("gguf_reader", "gguf_tokenizer", "gguf_families", "gguf_config", "gguf"),
        *("converted", "workdir", "load", "base"),
    ),
    "parallel": ("rendezvous", "sharding", "distributed"),
    "generate": ("session", "generation", "__main__"),
    "resilience": ("lock", "watchdog", "health", "checkpoints", "versions"),
    "training": ("optim", "metrics", "step", "resolve", "run"),
    "plan": ("gpus", "chips", "collectives", "costs", "meshes", "planner", "generation", "__main__"),
    "evals": None,
    "quickstart": (),
    "paper": ("tables", "runs", "results", "__main__"),
    "report": None,
    "chat": None,
}
WINGS = tuple(ORDER)
WITHOUT_JAX = {
    *("data", "files", "progress", "model/codes"),
    *(
        f"weights/{name}"
        for name in ("hub", "tensors", "torch_archive", "torch_files", "hf_rope", "hf_config", "rules", "bnb", "hf")
    ),
    *(f"weights/{name}" for name in ("family_keys", "families", "config_faults", "layouts", "habits")),
    *(f"weights/{name}" for name in ("checksums", "peft_files", "peft_layouts", "peft_export", "peft")),
    *(f"weights/{name}" for name in ("gguf_reader", "gguf_tokenizer", "gguf_families", "gguf_config", "gguf")),
}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> tuple[str, str]:
    """(wing, file) of a source; ("", "") for the package's own front door, (wing, "") for a wing's."""
    parts = [part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__"]
    return (*parts, "", "")[:2]  # type: ignore[return-value]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file, as full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively: give the full name"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_file_has_its_place():
    """Catches: a new file that no wing's order knows, and an order that names a file that is gone."""
    assert {place(path)[0] for path in SOURCES} - {""} == set(ORDER)
    for wing, files in ORDER.items():
        if files:
            assert {place(path)[1] for path in SOURCES if place(path)[0] == wing} - {""} == set(files), wing


def test_imports_point_down():
    """Catches: a model that knows its trainer, a circle that only some order of imports survives."""
    wrong = []
    for path in SOURCES:
        wing, file = place(path)
        for name in imported(path):
            below = (*name.split(".")[1:], "")[:2] if name.startswith("longlora_jax.") else ("", "")
            if not wing or below[0] not in ORDER:
                continue
            files = ORDER[wing]
            if below[0] != wing:
                up = WINGS.index(below[0]) > WINGS.index(wing)
            else:
                up = bool(files) and file in files and below[1] in files and files.index(below[1]) > files.index(file)
            if up:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_nobody_imports_the_scripts():
    """Catches: a library function that lives in a script, where no other program can reach it."""
    files = [*SOURCES, *ROOT.glob("*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("benchmarks/*.py")]
    wrong = [f"{path.name} imports {name}" for path in files for name in imported(path) & SCRIPTS]
    assert not wrong


@pytest.mark.parametrize("blocked", [("jax", "torch", "transformers")], ids=["no jax, torch, transformers"])
def test_workers_need_no_framework(blocked):
    """Catches: seconds of import, and a grab at the accelerator, in every process that only reads or tokenizes."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCES
        if place(path)[0] in WITHOUT_JAX or "/".join(place(path)) in WITHOUT_JAX
    ]
    assert "longlora_jax.data.source" in modules and "longlora_jax.weights.hf" in modules
    code = f"""
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is not for a worker")

sys.meta_path.insert(0, Blocker())
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def public_without_docstring(tree: ast.Module) -> list[str]:
    """Names of what is public in a module and has no docstring; nested functions are nobody's business."""
    found = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else []
        for item in (node, *members):
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            if isinstance(item, kinds) and not item.name.startswith("_") and not ast.get_docstring(item):
                found.append(item.name)
    return [name for name in found if name != "setup"]  # Flax calls it, and its class says what for


def test_everything_public_has_a_docstring():
    """Catches: a function whose shapes, units and errors only its author knows."""
    files = [*SOURCES, *ROOT.glob("*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("benchmarks/*.py")]
    faults = {str(p.relative_to(ROOT)): public_without_docstring(ast.parse(p.read_text())) for p in files}
    assert not {path: names for path, names in faults.items() if names}


def test_every_library_name_is_there():
    """Catches: a name of the front door that leads nowhere after a move."""
    code = "import longlora_jax as l; [getattr(l, name) for name in l.__all__]; print(len(l.__all__))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 15, done.stderr
