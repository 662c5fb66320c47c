"""Public figures of accelerators, per chip."""

from typing import NamedTuple

# https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, read in November 2026. Of the
# bandwidth between chips, one direction: what they list is of both.
SOURCE = "docs.cloud.google.com/tpu/docs"


class Chip(NamedTuple):
    """Peaks of one chip; a program that reaches a tenth to a half of them does well."""

    flops: float  # FLOP/s in bfloat16
    memory_bandwidth: float  # bytes/s
    memory: float  # bytes
    network_bandwidth: float  # bytes/s that a chip sends to its neighbours


TPUS = {
    "v4": Chip(275e12, 1200e9, 32 * 2**30, 300e9),
    "v5e": Chip(197e12, 819e9, 16e9, 200e9),
    "v5p": Chip(459e12, 2765e9, 95e9, 600e9),
    "v6e": Chip(918e12, 1638e9, 32e9, 400e9),
}

# Dense FLOP/s in bfloat16 of NVIDIA's SXM modules and of the L4, from the data sheets at nvidia.com
# as of November 2026: half of what they list "with sparsity".
_GPU_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L4": 121e12}
_SLOWER = {"PCIe", "PCIE", "NVL"}  # cards with lower power limits
# What JAX calls TPUs.
_TPU_KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e",
}  # fmt: skip


def peak_flops(kind: str) -> float | None:
    """Published FLOP/s in bfloat16 of a JAX device kind, as "NVIDIA L4"; None where not known."""
    if kind in _TPU_KINDS:
        return TPUS[_TPU_KINDS[kind]].flops
    maker, *words = kind.replace("-", " ").split()
    if maker != "NVIDIA" or _SLOWER & set(words):
        return None
    return next((_GPU_FLOPS[word] for word in words if word in _GPU_FLOPS), None)
