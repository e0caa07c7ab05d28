"""What a function really builds: the shapes of all arrays of its jaxpr, in loops, branches and calls too."""

import jax
from jax.extend import core


def shapes(function, *args) -> set[tuple[int, ...]]:
    """The shapes of every value that function(*args) computes; args may be jax.ShapeDtypeStruct."""
    found: set[tuple[int, ...]] = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            found.update(v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
            for inner in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    walk(getattr(inner, "jaxpr", inner))

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def _is_jaxpr(x) -> bool:
    return isinstance(x, (core.Jaxpr, core.ClosedJaxpr))
