"""One of two hosts that read a model onto a mesh over both; prints what it read and a digest of what it holds.

python tests/helpers/place_on_two_hosts.py PORT PROCESS FOLDER
"""

import hashlib
import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from longlora_jax.config import MeshConfig
from longlora_jax.model.decoder import Llama, abstract_params, logical_axes
from longlora_jax.parallel.sharding import make_mesh, place_weights, weight_shardings
from longlora_jax.weights.hf import open_hf


def resident_bytes(views) -> int:
    """Bytes of the mappings behind these arrays that this process has touched."""
    starts = {view.__array_interface__["data"][0] & ~0xFFF for view in views}
    found, current = 0, None
    for line in open("/proc/self/smaps"):
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(part, 16) for part in head.split("-"))
            current = any(low <= start < high for start in starts)
        elif current and head == "Rss:":
            found += int(line.split()[1]) * 1024
    return found


def main() -> None:
    """Places the model with fsdp over all four devices, and counts."""
    port, process, folder = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
    config, table = open_hf(folder)
    model = Llama(config)
    mesh = make_mesh(MeshConfig(fsdp=4))
    shardings = weight_shardings(mesh, logical_axes(model), abstract_params(model))
    dtypes = jax.tree.map(lambda _: np.dtype(np.float32), shardings)
    views = []

    def kept(tensor):
        def read():
            views.append(tensor.read())
            return views[-1]

        return tensor._replace(read=read)

    placed = place_weights(config, {name: kept(tensor) for name, tensor in table.items()}, shardings, dtypes)
    shards = {
        jax.tree_util.keystr(path): {
            str(shard.index): hashlib.sha256(np.ascontiguousarray(shard.data)).hexdigest()
            for shard in leaf.addressable_shards
        }
        for path, leaf in jax.tree_util.tree_leaves_with_path(placed)
    }
    total = sum(tensor.nbytes for tensor in table.values())
    print(json.dumps({"read": resident_bytes(views) / total, "shards": shards}))


if __name__ == "__main__":
    main()
