"""The same attention by torch: scaled_dot_product_attention with each of its backends, full and in the groups of s2.

k and v are repeated for every query head, as transformers does it. Of the backends the fastest is the one to compare
with: flash (FlashAttention-2), cuDNN's, and the memory-efficient one.
"""

from benchmarks.gpu.attention import LENGTHS
from benchmarks.gpu.part import SHAPES, TINY_SHAPES, Part, milliseconds

BACKENDS = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")


def main() -> None:
    """Every shape, length, backend and pattern, shortest first."""
    part = Part(__doc__)
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from benchmarks.attention import causal_pairs
    from benchmarks.train_step import grouped_attention
    from longlora_jax.attention.patterns import FULL, Pattern

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    name = torch.cuda.get_device_name() if cuda else "cpu"
    part.head = {"device": name, "torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    limit = torch.cuda.mem_get_info()[1] if cuda else 0

    def wait(_):
        if cuda:
            torch.cuda.synchronize()

    def case(shape: str, t: int, backend: str, what: str, pattern):
        n, kv, h = (TINY_SHAPES if part.tiny else SHAPES)[shape]

        def measure():
            def heads(count):
                return torch.randn(1, t, count, h, device=device, dtype=dtype).transpose(1, 2).requires_grad_()

            q, k, v, g = heads(n), heads(kv), heads(kv), heads(n).detach()
            grouped = grouped_attention(pattern.group_size) if pattern.group_size else None

            def run():
                q.grad = k.grad = v.grad = None
                wide = [x.repeat_interleave(n // kv, 1) if n > kv else x for x in (k, v)]
                if grouped:
                    out = grouped(None, q, *wide, None)[0].transpose(1, 2)
                else:
                    out = scaled_dot_product_attention(q, *wide, is_causal=True)
                out.backward(g)

            with sdpa_kernel(getattr(SDPBackend, backend)):
                found = milliseconds(run, wait, 0.0 if part.tiny else 0.06)
            return found | {"tflops": 3 * 4 * causal_pairs(pattern, t) * n * h / found["ms"] / 1e9}

        row = {"what": f"torch {backend.split('_')[0].lower()} {what}", "shape": shape, "seq_len": t}
        if limit and 16 * 2 * t * n * h > limit:
            part.run(row, lambda: {"skipped": "the card's memory"})
        else:
            part.run(row, measure)

    for shape in TINY_SHAPES if part.tiny else SHAPES:
        for t in (256, 512) if part.tiny else LENGTHS:
            for backend in BACKENDS if cuda else BACKENDS[1:2]:
                for what, pattern in (("full", FULL), ("s2 G=T/4", Pattern("s2", t // 4))):
                    case(shape, t, backend, what, pattern)
    part.save()


if __name__ == "__main__":
    main()
