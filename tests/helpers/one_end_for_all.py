"""One of several processes that add numbers together until one of them ends.

python tests/helpers/one_end_for_all.py PORT COUNT PROCESS HEARTBEAT_SECONDS HOW
HOW the last one ends: "bug", by an error, or "wait", for whoever ends it from outside.
PORT 0: a launcher says who is who.
"""

import os
import sys
import time

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

from longlora_jax.parallel import distributed


def main() -> None:
    """Joins, and adds for a minute if nothing ends it."""
    port, count, me, heartbeat, how = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
    flags = () if port == "0" else (f"localhost:{port}", count, me)
    distributed.join(*flags, heartbeat_seconds=heartbeat)
    with distributed.one_end():
        distributed.check_same("start", lambda: {"how": how})
        mesh = jax.make_mesh((count,), ("x",))
        ones = jax.jit(lambda: jnp.ones(count), out_shardings=jax.NamedSharding(mesh, jax.P("x")))()
        add = jax.jit(jnp.sum, out_shardings=jax.NamedSharding(mesh, jax.P()))
        for i in range(600):
            assert float(add(ones)) == count
            print("added", flush=True)
            if i == 5 and me == count - 1 and how == "bug":
                raise KeyError("x")
            time.sleep(0.1)


if __name__ == "__main__":
    main()
