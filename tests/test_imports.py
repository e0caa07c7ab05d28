"""The order of the house: imports point down, workers load no jax, everything public says what it is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "longlora_jax"
SCRIPTS = {"train", "convert_weights"}
# Each room may import those before it. A folder is one room.
ORDER = (
    *("errors", "fields", "roll_call", "files", "seals"),
    *("progress", "rope", "patterns", "config", "presets", "losses", "lora", "trainable", "data"),
    *("hub", "tensors", "torch_files", "hf_config", "weights", "hf", "peft_files", "peft", "gguf_tokenizer", "gguf"),
    *("kernels", "attention", "optim", "sharding"),
    *("context_parallel", "linear", "cache", "model", "session", "trainer", "converted", "checkpoint", "distributed"),
    *("watch", "health", "run_checkpoints", "metrics", "versions", "run", "generate"),
    *("chips", "collectives", "costs", "plan", "evals", "quickstart", "report", "chat"),
)
WITHOUT_JAX = ("data", "files", "progress", *ORDER[ORDER.index("hub") : ORDER.index("kernels")])
SOURCES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The room of a file: its name, or that of its folder; "" for the package's own front door."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


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


def test_imports_point_down():
    """Catches: a model that knows its trainer, a circle that only some order of imports survives."""
    assert {room(path) for path in SOURCES} - {""} == set(ORDER), "give every room its place in ORDER"
    wrong = []
    for path in SOURCES:
        for name in imported(path):
            below = name.split(".")[1:2] if name.startswith("longlora_jax.") else []
            if below and below[0] in ORDER and room(path) and below[0] != room(path):
                if ORDER.index(below[0]) > ORDER.index(room(path)):
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
        if room(path) in WITHOUT_JAX
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
