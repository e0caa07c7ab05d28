"""mesh.auto: rows first, then the sequence, and what a config names stays."""

import dataclasses

import pytest

from longlora_jax.config import AttentionConfig, MeshConfig
from longlora_jax.config_file import read_config
from longlora_jax.parallel.sharding import abstract_mesh
from longlora_jax.plan import meshes
from longlora_jax.plan.costs import SPARE, estimate
from longlora_jax.training.resolve import extend_model

GIB = 2**30


def paper(**options):
    config = read_config("configs/7b_32k.py")
    config = dataclasses.replace(config, model=extend_model(config.model, config), **options)
    return config


def needed(config, count: int) -> float:
    return estimate(config, abstract_mesh(config.mesh, count))["total"]


def test_rows_where_they_fit_and_else_the_sequence():
    """Catches: a sequence cut where rows would do, a mesh that does not fit, one that exchanges more than it must."""
    config = paper()
    assert meshes.choose_mesh(config, 8, 80 * GIB) == (config, "")
    chosen, why = meshes.choose_mesh(config, 8, 15.75 * GIB)
    assert "would need" in why and needed(config, 8) > SPARE * 15.75 * GIB >= needed(chosen, 8)
    assert chosen.mesh.fsdp * chosen.mesh.context == 8 and chosen.batch_size == config.batch_size
    rows = chosen.batch_size // chosen.accumulation
    assert rows % chosen.mesh.fsdp == 0
    # Everything with less exchange, a shorter cut of the sequence, does not fit.
    for context in (c for c in (1, 2, 4) if c < chosen.mesh.context):
        fsdp = 8 // context
        least = dataclasses.replace(config, mesh=MeshConfig(fsdp=fsdp, context=context), accumulation=64 // fsdp)
        assert needed(least, 8) > SPARE * 15.75 * GIB
    tight, _ = meshes.choose_mesh(config, 8, 7 * GIB)
    assert tight.mesh.context > chosen.mesh.context


def test_what_is_named_stays_and_what_cannot_be_is_not_made():
    """Catches: a mesh that its user chose and did not get, an ablation or short segments over a cut sequence."""
    named = paper(mesh=MeshConfig(fsdp=2, context=4))
    assert meshes.choose_mesh(named, 8, GIB)[0] == named
    off = paper(mesh=MeshConfig(auto=False))
    assert meshes.choose_mesh(off, 8, GIB)[0] == off
    nothing = paper()
    assert meshes.choose_mesh(nothing, 8, GIB // 8)[0] == nothing
    for attention in (AttentionConfig("dilated"), AttentionConfig(full_below=32_768)):
        chosen, _ = meshes.choose_mesh(paper(attention=attention), 8, 8 * GIB)
        assert chosen.mesh.context == 1


@pytest.mark.parametrize(("batch", "accumulation", "mesh"), [(1, 1, (1, 8)), (6, 1, (2, 4)), (16, 2, (-1, 1))])
def test_devices_that_do_not_tell_their_memory_are_cut_by_what_divides(batch, accumulation, mesh, caplog):
    """Catches: eight devices of which a batch of one row can use none."""
    config = paper(batch_size=batch, accumulation=accumulation)
    with caplog.at_level("INFO"):
        chosen = meshes.resolve_mesh(config)  # the eight devices of tests/conftest.py
    assert (chosen.mesh.fsdp, chosen.mesh.context) == mesh and chosen.accumulation == accumulation
    assert ("mesh auto" in caplog.text) == (mesh[1] > 1)
