"""What make installs: pins for each Python, with JAX 0.10 on 3.11 and JAX 0.11 from 3.12 on."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from longlora_jax.attention import segments
from longlora_jax.plan import gpus

PYTHONS = {"3.11": "0.10", "3.12": "0.11", "3.13": "0.11"}  # and the JAX that is tested there


def pins(python: str) -> dict[str, Version]:
    """{package: version} that pip takes out of both files of requirements on a Python."""
    found = {}
    for file in ("requirements.txt", "requirements-test.txt"):
        for line in Path(file).read_text().splitlines():
            if line.startswith("#"):
                continue
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"python_version": python}):
                name, (pin,) = canonicalize_name(wanted.name), wanted.specifier
                assert pin.operator == "==" and name not in found, line
                found[name] = Version(pin.version)
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_what_the_package_asks_for(python):
    """Catches: a dependency without a pin, or with one that pyproject.toml forbids; two pins of a package."""
    project, found = tomllib.loads(Path("pyproject.toml").read_text())["project"], pins(python)
    assert Version(python) in Requirement(f"python{project['requires-python']}").specifier
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    for requirement in map(Requirement, wanted):
        assert found[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize("python, jax", PYTHONS.items())
def test_the_jax_of_a_python_is_known(python, jax):
    """Catches: JAX and jaxlib apart, and a version for which functions that are not public are not known."""
    version = pins(python)["jax"]
    assert version == pins(python)["jaxlib"] and str(version).startswith(f"{jax}.")
    assert not segments.jax_fault(version.release) and str(version).startswith(gpus._TRIED)
