"""The Evolved Transformer in NumPy, from the paper: one sentence without padding, in float64.

So et al. 2019 (arXiv 1901.11117), figure 3 and section 4. Letters: T positions, D width.
"""

import math

import numpy as np


def norm(p, x_TD):
    mean, variance = x_TD.mean(-1, keepdims=True), x_TD.var(-1, keepdims=True)
    return (x_TD - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


def linear(p, x_TD):
    return x_TD @ p["kernel"] + p["bias"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def relu(x):
    return np.maximum(x, 0)


def attention(p, heads, x_TD, memory_SD, *, causal=False):
    q = linear(p["query"], x_TD)
    k, v = linear(p["key"], memory_SD), linear(p["value"], memory_SD)
    size = q.shape[1] // heads
    found = np.zeros((len(x_TD), q.shape[1]))
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        for t in range(len(x_TD)):
            last = t + 1 if causal else len(memory_SD)
            scores = k[:last, own] @ q[t, own] / math.sqrt(size)
            found[t, own] = softmax(scores) @ v[:last, own]
    return linear(p["out"], found)


def near(x_TD, t, offsets):
    """The inputs at t plus each of the offsets; zeros beyond the ends."""
    zero = np.zeros(x_TD.shape[1])
    return [x_TD[t + o] if 0 <= t + o < len(x_TD) else zero for o in offsets]


def separable(p, x_TD, *, causal):
    w = len(p["depthwise"])
    offsets = range(1 - w, 1) if causal else range(-(w // 2), w // 2 + 1)
    sums = [
        sum(a * b for a, b in zip(near(x_TD, t, offsets), p["depthwise"], strict=True))
        for t in range(len(x_TD))
    ]
    return linear(p["map"], np.array(sums))


def convolution(p, x_TD):
    """Of width 3."""
    inputs = [np.concatenate(near(x_TD, t, (-1, 0, 1))) for t in range(len(x_TD))]
    return linear(p["map"], np.array(inputs))


def padded(x_TD, width):
    return np.pad(x_TD, ((0, 0), (0, width - x_TD.shape[1])))


def encoder_cell(p, heads, x_TD):
    d = x_TD.shape[1]
    y = norm(p["gated_norm"], x_TD)
    x_TD = x_TD + linear(p["gated"], y) * sigmoid(linear(p["gates"], y))
    y = norm(p["branches_norm"], x_TD)
    left, right = relu(linear(p["wide"], y)), relu(convolution(p["narrow"], y))
    y = norm(p["joined_norm"], left + padded(right, 4 * d))
    x_TD = x_TD + padded(separable(p["joined"], y, causal=False), d)
    y = norm(p["self_attention_norm"], x_TD)
    x_TD = x_TD + attention(p["self_attention"], heads, y, y)
    y = norm(p["ffn_norm"], x_TD)
    return x_TD + linear(p["fc2"], relu(linear(p["fc1"], y)))


def decoder_cell(p, heads, first_heads, cross_heads, x_TD, memory_SD):
    d = x_TD.shape[1]
    y = norm(p["first_norm"], x_TD)
    own = attention(p["first_self_attention"], first_heads, y, y, causal=True)
    x_TD = x_TD + own + attention(p["first_cross_attention"], cross_heads, y, memory_SD)
    y = norm(p["branches_norm"], x_TD)
    left = relu(separable(p["wide"], y, causal=True))
    right = separable(p["narrow"], y, causal=True)
    y = norm(p["joined_norm"], left + padded(right, 2 * d))
    x_TD = x_TD + separable(p["joined"], y, causal=True)
    y = norm(p["self_attention_norm"], x_TD)
    x_TD = x_TD + attention(p["self_attention"], heads, y, y, causal=True)
    y = norm(p["cross_attention_norm"], x_TD)
    x_TD = x_TD + attention(p["cross_attention"], cross_heads, y, memory_SD)
    y = norm(p["ffn_norm"], x_TD)
    h = linear(p["fc1"], y)
    return x_TD + linear(p["fc2"], h * sigmoid(h))
