"""Which training steps a card can take: models and windows by the planner's formula and the card's memory."""

import dataclasses
from typing import NamedTuple

from benchmarks.attention import SMALL
from longlora_jax import presets
from longlora_jax.config import AttentionConfig, Config, MeshConfig
from longlora_jax.parallel.sharding import make_mesh
from longlora_jax.plan import costs
from longlora_jax.training.resolve import extend_model

MODELS = {
    "7b": presets.llama2_7b(),
    "1b": dataclasses.replace(  # Llama 3.2 1B without its scaling of RoPE
        presets.llama31_8b(),
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
        tie_word_embeddings=True,
    ),
    "smollm2": presets.smollm2_135m(),
    "tiny": dataclasses.replace(presets.llama2_7b(), **SMALL),
}


class Step(NamedTuple):
    """One training step of one row: MODELS' name, tokens, pattern, remat, and whether the row is 8 documents."""

    model: str
    seq_len: int
    attention: str = "s2"
    remat: str = "block"
    packed: bool = False


def config_of(step: Step, dtype: str) -> Config:
    """The run of a step: LoRA of rank 8, embedding and norms."""
    model = MODELS[step.model]
    config = presets.longlora(model, init_from="", seq_len=step.seq_len)
    attention = AttentionConfig("full") if step.attention == "full" else AttentionConfig()
    given = {"attention": attention, "remat": step.remat, "dtype": dtype}
    config = dataclasses.replace(config, batch_size=1, accumulation=1, **given)
    return dataclasses.replace(config, model=extend_model(model, config))


def planned(step: Step, devices) -> int:
    """Bytes that the planner's formula gives a step on one device."""
    return costs.estimate(config_of(step, "bfloat16"), make_mesh(MeshConfig(), devices))["total"]


def steps_for(limit: int, devices) -> list[Step]:
    """The steps for a card on which a program may use so many bytes, by model from small to large.

    SmolLM2 at 16,384 tokens fits 16 GB. Then the 1B model, and of LLaMA-2 7B the largest of three windows that fits,
    and 100,000 tokens if those do.
    """
    wanted = [Step("smollm2", 16_384), Step("smollm2", 16_384, packed=True), Step("smollm2", 16_384, remat="none")]
    for model in ("1b", "7b"):
        windows = [t for t in (32_768, 16_384, 8192) if planned(Step(model, t), devices) <= costs.SPARE * limit]
        if windows:
            t = windows[0]
            wanted += [Step(model, t), Step(model, t, "full"), Step(model, t, packed=True)]
            wanted += [Step(model, t, remat="attention"), Step(model, t, remat="dots")]
    wanted.append(Step("7b", 100_000))
    return [step for step in wanted if planned(step, devices) <= costs.SPARE * limit]


TINY = [Step("tiny", 512, packed=True), Step("tiny", 512)]
