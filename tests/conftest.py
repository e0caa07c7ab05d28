"""Settings of every test: 8 fake CPU devices, strict shapes, fixed seeds, our warnings are errors; and a browser."""

import gc
import importlib.metadata
import importlib.util
import logging
import os
import random
import shutil
import sys
from pathlib import Path

# Tests start many processes: each would compile our modules anew, and every worker the tests (see below).
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the work of most tests, and how well it is done says nothing: nine tenths of it are spared here
# and in processes that tests start. XLA's emitters of fused loops are slow to compile; from jaxlib 0.11 on there are no
# others.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# libtpu reads these flags as well, and ends a process for one that it does not know.
if not importlib.util.find_spec("libtpu"):
    if importlib.metadata.version("jaxlib") < "0.11":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
    # A program in one piece: cut in 32, for as many threads, it takes a third more to compile on all cores together.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_parallel_codegen_split_count=1"
    # YNNPACK prepares each matrix product anew when a program runs for the first time, which is mostly the only one.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_experimental_ynn_fusion_type="
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# bitsandbytes would have its formulas compiled by a C++ compiler first, in each worker; they are the same without.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of torch and numpy wait for each other by spinning

import hypothesis
import jax
import pytest
import tokenizers
from runs import FakeEvaluation, FakeStep, shape, train_module, write_config
from tiny import random_params
from tokenizers import models, pre_tokenizers

from longlora_jax.config import Config
from longlora_jax.model.decoder import Llama
from longlora_jax.weights.hf import save_hf

sys.dont_write_bytecode = False
# Imports, and jax as it traces, make so many objects that the collector would take a quarter of the time.
gc.set_threshold(100_000, 20, 20)
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("repository", deadline=None, derandomize=True, print_blob=False)
hypothesis.settings.load_profile("repository")


# What waits for processes or trains for real: begun last, one of them would leave the other cores idle at the end.
LONG = ("test_train_script", "test_preemption", "test_multi_process", "test_export", "test_resume")


def pytest_collection_modifyitems(items):
    """Files with long tests first."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish():
    """The collector leaves alone what is imported by now."""
    gc.freeze()


def pytest_sessionfinish():
    """Nor does it go through what the tests have left, five times, for exceptions that nobody sees any more."""
    gc.freeze()


@pytest.fixture
def browser():
    """Chromium without a window; skips where playwright or a browser is not there."""
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            made = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        yield made
        made.close()


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with what a run needs: base/ (a Hugging Face folder, a byte for a token) and text.txt."""
    folder = tmp_path_factory.mktemp("home")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(["<eos>", *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    model = Llama(shape())
    save_hf(str(folder / "base"), model.config, random_params(model), tokenizer_from=str(folder / "tokenizer"))
    words = ["pear", "quince", "rowan", "sloe", "and", "or", "of", "\n"]
    (folder / "text.txt").write_text(" ".join(random.Random(0).choices(words, k=5000)))
    return folder


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    """A cache of compiled programs that this process, the other workers and all that they start share: they spend most
    of their time on the same."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


@pytest.fixture(scope="session")
def environment(compiled):
    """One device, and the cache of compiled programs, for processes that train."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    return os.environ | cache | {"XLA_FLAGS": flags}


@pytest.fixture
def script():
    """train.py as a module."""
    return train_module()


@pytest.fixture
def train(script, tmp_path, monkeypatch):
    """Runs train.py's main on a config: train(config, workdir)."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(config: Config, workdir: Path) -> None:
        argv = ["train.py", "--config", write_config(tmp_path, config), "--workdir", str(workdir)]
        monkeypatch.setattr(sys, "argv", argv)
        script.main(script.parse_flags(argv))

    yield run
    root.handlers[:], _ = handlers, root.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture
def fake(script, monkeypatch):
    """The loop of train.py around a step that costs nothing."""
    step = FakeStep()
    monkeypatch.setattr(script, "compile_train_step", step.compile)
    monkeypatch.setattr(script, "Evaluation", lambda config, model: FakeEvaluation([2.0]))
    return step
