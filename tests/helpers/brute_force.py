"""The oracle of the attention tests: the definitions in plain Python and float64, one pair at a time.

It shares no code with longlora_jax and takes no shortcut, so that both can only agree by being right.
"""

import math

import numpy as np


def sees(name: str, g: int, *, head: int, i: int, j: int, heads: int, t: int) -> bool:
    """Whether position i of a head may see position j in a row of t tokens, in groups of g. arXiv:2309.12307."""
    half = g // 2
    first_half_of_heads = head < heads / 2  # 2 of 3 heads: the middle one of an odd number counts as plain
    if name == "s2_wrap" and not first_half_of_heads:
        # The place of a token after the row is rolled to the left; causal order is that of the places.
        place_i, place_j = (i - half) % t, (j - half) % t
        return place_j <= place_i and place_i // g == place_j // g
    if j > i:
        return False
    same_group = i // g == j // g if g else True
    if name == "full":
        return True
    if name == "window":  # itself and the g - 1 before: transformers' sliding_window
        return j > i - g
    if name == "short":
        return same_group
    if name == "s2":
        return same_group if first_half_of_heads else (i + half) // g == (j + half) // g
    if name == "s2_swap":
        return same_group if first_half_of_heads else (i + half) % t // g == (j + half) % t // g
    if name == "s2_wrap":
        return same_group
    if name == "dilated":  # g keys: the nearest ones, or every second one
        return i - j < g if first_half_of_heads else (i - j) % 2 == 0 and (i - j) // 2 < g
    if name == "block_sparse":  # a quarter of the heads each: the own block, one back, two back, three back
        return i // g - j // g == min(math.floor(4 * head / heads), i // g)
    if name == "stride_sparse":  # the nearest g keys, and every g-th of the earlier ones
        return i - j < g or (i - j) % g == 0
    raise AssertionError(name)


def mask(name: str, g: int, *, heads: int, t: int) -> np.ndarray:
    """`sees` of every head and pair: booleans [heads, t, t]."""
    pairs = [
        sees(name, g, head=n, i=i, j=j, heads=heads, t=t) for n in range(heads) for i in range(t) for j in range(t)
    ]
    return np.array(pairs, bool).reshape(heads, t, t)


def attention(q, k, v, allowed, d_out, softcap=0.0):
    """Masked softmax attention and its gradients in float64.

    q, d_out: [B, T, N, H]; k, v: [B, T, K, H]; allowed: booleans that broadcast to [B, N, T, T]; a query that
    sees nothing gives zeros; softcap: scores become softcap * tanh(scores / softcap). Returns out, d_q, d_k, d_v.
    """
    q, k, v, d_out = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (q, k, v, d_out))
    kv_heads, rep, scale = k.shape[1], q.shape[1] // k.shape[1], 1 / math.sqrt(q.shape[-1])
    k, v = np.repeat(k, rep, axis=1), np.repeat(v, rep, axis=1)
    scores, slope = q @ k.swapaxes(2, 3) * scale, 1.0
    if softcap:
        bent = np.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent**2
    scores = np.where(allowed, scores, -1e300)
    weights = np.where(allowed, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1)  # the greatest is 1, unless nothing is seen
    d_weights = d_out @ v.swapaxes(2, 3)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) * slope * scale

    def sum_heads(x):
        return x.reshape(x.shape[0], kv_heads, rep, *x.shape[2:]).sum(2)

    results = weights @ v, d_scores @ k
    results += sum_heads(d_scores.swapaxes(2, 3) @ q), sum_heads(weights.swapaxes(2, 3) @ d_out)
    return tuple(x.transpose(0, 2, 1, 3) for x in results)
