"""lm-eval's tasks (the package lm_eval, EleutherAI's harness) on any model folder that this package opens.

`python -m longlora_jax.evals.lm_eval --model DIR --tasks TASK` is what `lm_eval --model longlora_jax` would be; that
name is registered for programs that import this module and call lm_eval.simple_evaluate.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import os
import traceback
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlora_jax import errors
from longlora_jax.data import load_tokenizer
from longlora_jax.data.chat import ends_with_any, stop_ids
from longlora_jax.errors import UserError, number
from longlora_jax.evals.command import check_outputs
from longlora_jax.evals.reader import before_any
from longlora_jax.files import load_json, one_line, write_json
from longlora_jax.generate.generation import generate, load_for_generation
from longlora_jax.model.decoder import Llama
from longlora_jax.model.losses import output_kernel, output_logits
from longlora_jax.progress import progress_bar
from longlora_jax.weights.load import open_model
from longlora_jax.weights.workdir import at_step

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
except ImportError as error:
    _lacks = "installed" if error.name == "lm_eval" else f"complete ({error})"

    def _missing() -> None:
        raise UserError(f"the package lm_eval is not {_lacks}: pip install lm_eval")

    if __name__ == "__main__":
        errors.run(_missing)
    raise

LOGITS_AT_ONCE = 256  # positions of a row whose logits exist together
LEAST = 16  # rows are filled up to lengths of powers of two from here, so that few shapes are compiled


@register_model("longlora_jax")
class LongLoraLM(TemplateLM):
    """A model of this package behind lm-eval's interface.

    model: Hugging Face folder, converted checkpoint or workdir; max_length: tokens that it sees at once (None: its
    window), what is before them is left out; batch_size: rows of a forward pass. Weights are read when first needed.
    Raises UserError.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "float32",
        batch_size: int | str = 8,
        max_length: int | None = None,
        quantize: str = "none",
        **ignored: Any,
    ):
        super().__init__()
        self._opened = open_model(model, quantize=quantize)
        self.folder = self._opened.tokenizer_dir
        self._tokenizer = load_tokenizer(self.folder)
        self._format = self._opened.chat_format()
        self._rows = 8 if batch_size in (None, "auto") else int(batch_size)
        self.max_length = int(max_length or self._opened.config.max_position_embeddings)
        self._dtype = dtype
        scaling = self._opened.config.rope_scaling
        self._by_length = scaling is not None and scaling.rope_type in ("dynamic", "longrope")

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._one_of(self._tokenizer.eos_id, *self._format.end_ids)

    @property
    def prefix_token_id(self) -> int:
        """The id before a text that has nothing before it: BOS, or the end of a text."""
        return self._one_of(self._tokenizer.bos_id, self.eot_token_id)

    @property
    def tokenizer_name(self) -> str:
        """The folder of the tokenizer, by which lm-eval tells its caches apart."""
        return self.folder.replace("/", "__")

    @functools.cached_property
    def _model(self):
        return load_for_generation(self._opened, self._dtype)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text; with BOS where the tokenizer adds one, unless it is there or is not wanted."""
        bos = self._tokenizer.bos_id
        has_bos = bos is not None and string.startswith(self._tokenizer.decode([bos]))
        add_bos = not has_bos if add_special_tokens is None else add_special_tokens
        return self._tokenizer.encode_batch([string], add_bos=add_bos)[0].tolist()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of messages under the model's template: what its run trained under, or its tokenizer's.

        Without add_generation_prompt it ends within the last message, which the model is to go on with.
        """
        text = self._format.render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].strip()
        return text[: text.rindex(begun) + len(begun)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of max_length that do not overlap."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for context, target in map(make_disjoint_window, windows):
                pairs.append((None, context, target))
                owners.append(owner)
        sums = np.zeros(len(requests))
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            sums[owner] += value
        return sums.tolist()

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each text, up to the first of the task's stop texts."""
        asked = [request.args for request in requests]
        order = sorted(range(len(asked)), key=lambda i: (repr(asked[i][1]), -len(asked[i][0])))
        answers = [""] * len(asked)
        with progress_bar(len(asked), label="generate_until", unit="text") as bar:
            for _, same in itertools.groupby(order, key=lambda i: repr(asked[i][1])):
                indices = list(same)
                for batch in (indices[i : i + self._rows] for i in range(0, len(indices), self._rows)):
                    texts = self._continue([asked[i][0] for i in batch], dict(asked[batch[0]][1]))
                    for i, text in zip(batch, texts, strict=True):
                        answers[i] = text
                    bar.update(len(batch))
        return answers

    def _continue(self, texts: list[str], given: dict[str, Any]) -> list[str]:
        how = normalize_gen_kwargs(given, 256)
        until, limit = how.get("until") or [], how["max_gen_toks"]
        until = [until] if isinstance(until, str) else until
        if limit >= self.max_length:
            raise UserError(f"the task writes {limit} tokens, the window has {self.max_length}: raise --max_length")
        ends = stop_ids(until, self._tokenizer)
        until = [*until, *self._format.stops]
        prompts = [np.array(self.tok_encode(text)[limit - self.max_length :], np.int32) for text in texts]

        def decode(tokens: Sequence[int]) -> str:
            return self._tokenizer.decode(tokens, skip_special_tokens=True)

        found = generate(
            *self._model,
            prompts,
            max_new_tokens=limit,
            temperature=float(how.get("temperature") or 0.0),
            top_k=int(how.get("top_k") or 0),
            top_p=float(how.get("top_p") or 1.0),
            eos_ids=self._format.end_ids,
            stop=lambda row, tokens: ends_with_any(tokens, ends) or any(stop in decode(tokens) for stop in until),
        )
        return [before_any(decode(tokens), until) for tokens in found]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """(sum of the log-likelihoods of a continuation, whether each of its tokens is the likeliest) of requests."""
        rows = []
        for _, context, target in requests:
            if not 1 <= len(target) <= self.max_length:
                raise UserError(f"a text of {len(target)} tokens to score, max_length is {self.max_length}: raise it")
            ids = [*context, *target][-self.max_length - 1 :]
            rows.append((np.array(ids, np.int32), len(target)))
        sizes = [self._size(len(ids) - 1) for ids, _ in rows]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        with progress_bar(len(rows), label="loglikelihood", unit="text") as bar:
            order = sorted(range(len(rows)), key=lambda i: -sizes[i])
            for size, same in itertools.groupby(order, key=lambda i: sizes[i]):
                indices = list(same)
                for batch in (indices[i : i + self._rows] for i in range(0, len(indices), self._rows)):
                    tokens = np.zeros((self._rows, size + 1), np.int32)
                    for row, i in zip(tokens, batch, strict=False):
                        row[: len(rows[i][0])] = rows[i][0]
                    values, likeliest = map(np.asarray, _score(*self._model, tokens))
                    for value, best, i in zip(values, likeliest, batch, strict=False):
                        here = slice(len(rows[i][0]) - 1 - rows[i][1], len(rows[i][0]) - 1)
                        found[i] = float(value[here].sum(dtype=np.float64)), bool(best[here].all())
                    bar.update(len(batch))
        return found

    def _size(self, tokens: int) -> int:
        # Rotations by the length of a row would see its filling.
        return tokens if self._by_length else max(LEAST, 1 << (tokens - 1).bit_length())

    def _one_of(self, *ids: int | None) -> int:
        for i in ids:
            if i is not None:
                return i
        raise UserError(f"the tokenizer in {self.folder} names no end of text: set eos_token in its config")


@functools.partial(jax.jit, static_argnums=0)
def _score(llama: Llama, params, tokens):
    """Of tokens [B, T + 1] the last T: their log-likelihoods [B, T] f32, and whether each is the likeliest."""
    hidden: Any = llama.apply({"params": params}, tokens[:, :-1], method="hidden")
    kernel = output_kernel(params)

    def some(part):
        x, targets = part
        logits = output_logits(x, kernel, llama.config.final_logit_softcapping)
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return own - jax.nn.logsumexp(logits, axis=-1), logits.argmax(-1) == targets

    size = min(LOGITS_AT_ONCE, hidden.shape[1])
    pad = -hidden.shape[1] % size
    parts = [jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)) for x in (hidden, tokens[:, 1:])]
    parts = [x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1) for x in parts]
    found = jax.lax.map(some, tuple(parts))
    return tuple(x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, : hidden.shape[1]] for x in found)


# The command


def _json_object(text: str) -> dict[str, Any]:
    value = load_json(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


_json_object.__name__ = "JSON object"  # what argparse says is invalid


@contextlib.contextmanager
def _data_from(folder: str | None):
    """Tasks name their data OWNER/NAME: a folder of that name where the process stands goes before the hub's.

    Raises UserError for data that is in neither, and for what a task that makes its own data refuses.
    """
    try:
        with contextlib.chdir(folder or "."):
            yield
    except (OSError, LookupError) as error:
        if not isinstance(error, OSError) and type(error) is not LookupError:  # nltk says this of its own data
            raise
        said = next((line.strip() for line in str(error).splitlines() if line.strip(" *")), type(error).__name__)
        raise UserError(
            f"the data of a task could not be had ({said.rstrip('.')}): fetch it elsewhere with `hf download "
            "--repo-type dataset OWNER/NAME --local-dir DIR/OWNER/NAME` and give --data DIR; a resource of nltk is "
            "looked for in the folder that NLTK_DATA names"
        ) from error
    except ValueError as error:  # RULER's, of a length in --metadata in which a question has no room
        if f"{os.sep}tasks{os.sep}ruler{os.sep}" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        raise UserError(f"a task cannot be made: {one_line(str(error), 300)}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; argv without the program's name, None for the process's own."""
    parser = errors.ArgumentParser(
        prog="python -m longlora_jax.evals.lm_eval",
        description="Runs tasks of lm-eval on a model. Tasks that it ships fetch their data from the Hugging Face hub, "
        "unless --data holds it.",
        epilog="Example: python -m longlora_jax.evals.lm_eval --model runs/my_run --tasks niah_single_1,ruler_vt "
        """--metadata '{"max_seq_lengths": [16384]}' --limit 50 --json ruler.json""",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face folder, converted checkpoint or training workdir")
    add("--step", metavar="N", help=errors.STEP_HELP)
    add("--tasks", required=True, metavar="TASK[,TASK...]", help="names of tasks, or YAML files of your own")
    add("--json", metavar="FILE", help="where to write the results")
    add("--include_path", metavar="DIR", help="a folder with further tasks")
    data_help = "a folder with data sets of the hub as OWNER/NAME (default: fetched from the hub)"
    add("--data", metavar="DIR", help=data_help)
    metadata_help = "what tasks that make their own data are told, as RULER's max_seq_lengths; the tokenizer is"
    add("--metadata", metavar="JSON", type=_json_object, default={}, help=metadata_help)
    add("--num_fewshot", type=number(int, 0), metavar="N", help="examples before each question (default: the task's)")
    add("--limit", type=number(int, 1), metavar="N", help="only the first N of each task (default: all)")
    add("--apply_chat_template", action="store_true", help="ask through the tokenizer's chat template")
    add("--max_length", type=number(int, 2), metavar="T", help="tokens seen at once (default: the model's window)")
    add("--batch_size", type=number(int, 1), default=8, metavar="N", help="rows of a forward pass (default: 8)")
    dtype_help = "of weights, activations and cache (default: float32)"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtype_help)
    add("--quantize", choices=errors.QUANTIZE, default="none", help=errors.QUANTIZE_HELP)
    args = parser.parse_args(argv)
    errors.start_logging()
    check_outputs(args.json, None)
    for path in filter(None, (args.data, args.include_path)):
        if not os.path.isdir(path):
            raise UserError(f"{path} is no folder: give one that exists")
    args.model = at_step(args.model, args.step)
    how = {"dtype": args.dtype, "batch_size": args.batch_size, "max_length": args.max_length}
    model = LongLoraLM(args.model, **how, quantize=args.quantize)
    further = args.include_path and os.path.abspath(args.include_path)
    tokenizer = {"tokenizer": os.path.abspath(model.folder)}
    manager = TaskManager(include_path=further, metadata=tokenizer | args.metadata)
    names = args.tasks.split(",")
    if unknown := [name for name in names if not name.endswith(".yaml") and name not in manager.all_tasks]:
        raise UserError(f"lm_eval has no task {', '.join(unknown)}: see python -m lm_eval --tasks list")
    names = [os.path.abspath(name) if name.endswith(".yaml") else name for name in names]
    with _data_from(args.data):
        found = simple_evaluate(
            model,
            tasks=names,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            apply_chat_template=args.apply_chat_template,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    assert found is not None
    for name, metrics in found["results"].items():
        for metric, value in metrics.items():
            unasked = metric.partition(",")[0].isdigit() and value == -1  # RULER's metrics are lengths
            if isinstance(value, float | int) and "stderr" not in metric and not unasked:
                print(f"{name:<30} {metric:<24} {value:.4f}")
    if args.json:
        settings = {
            k: getattr(args, k)
            for k in ("model", "dtype", "quantize", "num_fewshot", "limit", "apply_chat_template", "metadata")
        }
        versions = {
            "max_length": model.max_length,
            "versions": found["versions"],
            "lm_eval": importlib.metadata.version("lm_eval"),
        }
        write_json(args.json, settings | versions | {"results": found["results"]})


if __name__ == "__main__":
    errors.run(main)
