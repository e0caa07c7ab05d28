"""What a function really builds: the shapes of all arrays of its jaxpr, in loops, branches and calls too."""

import jax
from jax.extend import core


def shapes(function, *args) -> set[tuple[int, ...]]:
    """The shapes of every value that function(*args) computes; args may be jax.ShapeDtypeStruct."""
    equations = (equation for equation, _ in _equations(jax.make_jaxpr(function)(*args).jaxpr))
    return {v.aval.shape for equation in equations for v in equation.outvars if hasattr(v.aval, "shape")}


def casts(function, *args) -> list[tuple[tuple[int, ...], bool]]:
    """(its shape, whether it is in a loop) of every array that function(*args) makes one of another dtype."""
    found = _equations(jax.make_jaxpr(function)(*args).jaxpr)
    return [(e.outvars[0].aval.shape, looped) for e, looped in found if e.primitive.name == "convert_element_type"]


def _equations(jaxpr, looped: bool = False):
    for equation in jaxpr.eqns:
        yield equation, looped
        for inner in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from _equations(getattr(inner, "jaxpr", inner), looped or equation.primitive.name == "scan")


def _is_jaxpr(x) -> bool:
    return isinstance(x, (core.Jaxpr, core.ClosedJaxpr))
