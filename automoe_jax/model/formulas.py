"""What the model and its exported twin must agree on; imports neither Flax nor JAX."""

import math

import numpy as np

LAYER_NORM_EPS = 1e-5
# Score of what attention must not see: fp32's softmax makes it exactly zero.
MASKED = -1e9


def frequencies(dim: int) -> np.ndarray:
    """Angular frequencies (dim // 2,) of sinusoidal positions, fairseq's arithmetic."""
    half = dim // 2
    scale = math.log(10000) / max(half - 1, 1)
    return np.exp(np.arange(half, dtype=np.float32) * np.float32(-scale))
