"""Continuing prompts: full attention over all that was read, or endless over a few first and last tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlora_jax.config import MeshConfig, ModelConfig
from longlora_jax.data import Tokenizer
from longlora_jax.data.chat import ChatFormat
from longlora_jax.errors import UserError
from longlora_jax.generate.session import Sampling, Session, chunk_size, complete
from longlora_jax.model.codes import Quantization
from longlora_jax.model.decoder import Llama, abstract_params, logical_axes
from longlora_jax.parallel.sharding import make_mesh, place_weights, weight_shardings
from longlora_jax.weights.load import OpenModel


def generate(
    model: Llama,
    params,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_ids: Sequence[int] = (),
    stop: Callable[[int, list[int]], bool] = lambda row, tokens: False,
    seed: int = 0,
    chunk: int | None = None,
    sinks: int = 0,
    window: int = 0,
    on_token: Callable[[int, int], Any] = lambda row, token: None,
) -> list[list[int]]:
    """Continues prompts, ids [tokens] of any lengths, all at once; returns the new tokens of each.

    temperature 0 takes the likeliest token; otherwise top_k and top_p are transformers'. A row ends after one of
    eos_ids, when stop(row, its tokens) says so, or after max_new_tokens. chunk: tokens of the prompts computed at once,
    see session.chunk_size; sinks, window: in tokens, to remember these alone (model/cache.py). on_token(row,
    token) is called with each token. The model's window is not checked. Raises UserError.
    """
    if len(prompts) < 1 or min(map(len, prompts)) < 1 or max_new_tokens < 1:
        raise UserError(f"{len(prompts)} prompts, {max_new_tokens=}: give prompts of a token or more, and 1 or more")
    longest = max(map(len, prompts))
    memory = {"chunk": min(chunk_size(chunk), longest), "sinks": sinks, "window": window}
    session = Session(model, params, len(prompts), longest + max_new_tokens, **memory)
    session.read(prompts)
    sampling = Sampling(temperature, top_k, top_p)
    how = {"sampling": sampling, "seed": seed, "eos_ids": eos_ids, "stop": stop, "on_token": on_token}
    return complete(session, max_new_tokens, **how)


def load_for_generation(model: OpenModel, dtype: str = "float32") -> tuple[Llama, Any]:
    """(model, params) on all devices, weights and activations in dtype: heads cut as far as they divide, then columns.

    Adapters are merged, and matrices kept as model.quantization says.
    """
    mesh, shardings = best_mesh(model.config, model.quantization, jax.device_count(), make_mesh)
    llama = Llama(model.config, dtype=jnp.dtype(dtype), mesh=mesh, quantization=model.quantization)
    dtypes = jax.tree.map(lambda _: jnp.dtype(dtype), shardings)
    return llama, place_weights(model.config, model.table, shardings, dtypes, model.quantization)


def best_mesh(config: ModelConfig, quantization: Quantization | None, count: int, make: Callable[[MeshConfig], Any]):
    """(mesh, shardings of the weights) of all of so many devices, with the most of them over heads, or else of one.

    make: the mesh of a MeshConfig.
    """
    llama = Llama(config, quantization=quantization)
    for used in (count, 1):
        for tensor in (n for n in range(used, 0, -1) if used % n == 0):
            mesh = make(MeshConfig(data=1, fsdp=used // tensor, context=1, tensor=tensor))
            try:
                return mesh, weight_shardings(mesh, logical_axes(llama), abstract_params(llama))
            except UserError:  # does not divide
                continue
    raise AssertionError("one device divides everything")


def prompt_ids(text: str, question: str | None, tokenizer: Tokenizer, chat: ChatFormat, system: str = "") -> np.ndarray:
    """The ids [tokens] of a text, to be continued, or of a question about it ("": about nothing), to be answered.

    A question goes through the model's template, if there is one, as what the user says after the text;
    system: a message before it, "" for none. Raises UserError if the template refuses.
    """
    if question is None:
        return tokenizer.encode(text)
    asked = f"{text}\n\n{question}" if text else question
    if not chat:
        return tokenizer.encode(f"{system}\n\n{asked}\n" if system else f"{asked}\n")
    said = [{"role": "system", "content": system}] if system else []
    return chat.ids([*said, {"role": "user", "content": asked}], tokenizer)


def common_prefix(prompts: Sequence[np.ndarray]) -> int:
    """How many first tokens all prompts share, fewer than any of them has; 0 for a single one."""
    if len(prompts) < 2:
        return 0
    most = min(map(len, prompts)) - 1
    differs = np.any([p[:most] != prompts[0][:most] for p in prompts], axis=0)
    return int(differs.argmax()) if differs.any() else most
