"""A model that reads long prompts and answers, and prompts that have an exact length.

A prompt is built as text and counted as a whole, template and all: pieces that are tokenized apart and then joined
are tokens that the text does not have.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from longlora_jax.data import load_tokenizer
from longlora_jax.errors import UserError
from longlora_jax.evals.results import identity
from longlora_jax.generate.generation import generate, load_for_generation
from longlora_jax.model_config import ModelConfig
from longlora_jax.weights.load import open_model

TEMPLATES = ("auto", "plain", "chat")
TOKENS_AT_ONCE = 8192  # rows of prompts that are read together times their length, unless batch_size says otherwise
# One character more may be a token more, none, or one less: cuts are tried beyond the first that is too long, so many
# or until they are too long by so many tokens.
NEARBY, FAR = 48, 8
_MESSAGE = "WHAT-THE-USER-SAYS"


class Reader:
    """A model folder of any kind, its tokenizer and its template; weights are read when it is asked first.

    template: "chat" sends what is asked through the model's template (what its run trained under, or the tokenizer's),
    "plain" as it is, "auto" takes the template if there is one. batch_size: prompts read at once (None: TOKENS_AT_ONCE
    tokens' worth); quantize: see open_model; stretch: what its config becomes, for an untrained scaling of positions.
    identity: what results depend on of it (see results.identity). Raises UserError.
    """

    def __init__(
        self,
        path: str,
        *,
        template: str = "auto",
        dtype: str = "float32",
        batch_size: int | None = None,
        quantize: str = "none",
        stretch: Callable[[ModelConfig], ModelConfig] = lambda config: config,
    ):
        self._opened = open_model(path, quantize=quantize)
        self._dtype, self._batch_size = dtype, batch_size
        self.config = stretch(self._opened.config)
        folder = self._opened.tokenizer_dir
        self.tokenizer = load_tokenizer(folder)
        self.identity = identity(self._opened, self.tokenizer)
        self._format = self._opened.chat_format()
        if template == "chat" and not self._format:
            raise UserError(f"the tokenizer of {path} has no chat template: use --template plain")
        self.chat = template != "plain" and bool(self._format)
        self.template = "chat" if self.chat else "plain"
        self._frame = ("", "")
        if self.chat:
            said = [{"role": "user", "content": _MESSAGE}]
            parts = self._format.render(said).split(_MESSAGE)
            if len(parts) != 2:
                raise UserError(f"the chat template of {path} changes what the user says: use --template plain")
            self._frame = (parts[0], parts[1])

    def ids(self, text: str, lead: str = "") -> np.ndarray:
        """The ids [tokens] of a text that the user says and of the lead, with which the answer has begun.

        Raises UserError for a tokenizer with more tokens than the model.
        """
        if self.chat:
            before, after = self._frame
            ids = self.tokenizer.encode_batch([before + text + after + lead.lstrip()], add_bos=False)[0]
        else:
            ids = self.tokenizer.encode(text + lead)
        if len(ids) and (largest := int(ids.max())) >= self.config.vocab_size:
            raise UserError(f"token {largest} is outside the model's vocabulary of {self.config.vocab_size}")
        return ids

    def answer(
        self, prompts: Sequence[np.ndarray], max_new_tokens: int, stop: Callable[[str], bool] = lambda text: False
    ) -> list[str]:
        """What the model writes after each prompt, greedily, until it ends, stop(text so far) says so, or the limit.

        Prompts of one call are filled up to whole batches, so that few shapes are compiled.
        """
        longest = max(map(len, prompts))
        rows = min(self._batch_size or max(TOKENS_AT_ONCE // longest, 1), len(prompts))
        texts: list[str] = []
        for first in range(0, len(prompts), rows):
            batch = list(prompts[first : first + rows])
            batch += batch[-1:] * (rows - len(batch))
            tokens = generate(
                *self._model,
                batch,
                max_new_tokens=max_new_tokens,
                eos_ids=self._format.end_ids,
                stop=lambda row, tokens: self._ended(self._text(tokens), stop),
            )
            texts += (before_any(self._text(row), self._format.stops) for row in tokens)
        return texts[: len(prompts)]

    def _ended(self, text: str, stop: Callable[[str], bool]) -> bool:
        return stop(text) or any(end in text for end in self._format.stops)

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    @functools.cached_property
    def _model(self):
        return load_for_generation(self._opened._replace(config=self.config), self._dtype)


def before_any(text: str, stops: Sequence[str]) -> str:
    """The text up to where the first of the stops begins."""
    return text[: min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=len(text))]


def fit(render: Callable[[int], np.ndarray], length: int, most: int) -> np.ndarray:
    """The ids of render(n), 0 <= n <= most, that have `length` tokens, or as near below it as there are.

    render(n): ids [tokens] of a prompt with n units of filling, more of them the larger n. Raises UserError if the
    empty prompt is too long, or the full one too short by more than one unit can be.
    """
    if len(ids := render(0)) > length:
        raise UserError(f"length {length} is too short: the task by itself takes {len(ids)} tokens")
    low, high = 0, min(most, length)
    while high < most and len(render(high)) <= length:
        low, high = high, min(2 * high, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(render(middle)) <= length else (low, middle - 1)
    best = render(low)
    if low == most and len(best) < length:
        raise UserError(
            f"length {length} is more than the text gives: with all of it the prompt has {len(best)} tokens, "
            "give a longer text or a shorter length"
        )
    for n in range(low + 1, min(low + NEARBY, most) + 1):
        if len(best) == length or len(ids := render(n)) > length + FAR:
            break
        if len(best) < len(ids) <= length:
            best = ids
    return best
