"""Costs of a subnet that are counted, not measured, by the names that limits and fronts use."""

from automoe_jax.architecture.counts import count
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.decoding.config import ExportConfig
from automoe_jax.decoding.layout import Layout

HOW = {
    "gflops": "counted: 30 tokens in and out, uniform routing",
    "active_params_m": "counted: what one token uses, embeddings left out",
    "params_m": "counted, embeddings left out",
    "size_mb": "counted: bytes of the exported weights",
}


class CountedCosts:
    """Costs of the subnets of a space; each subnet is counted once."""

    def __init__(self, space: SearchSpace, export: ExportConfig, vocab_sizes: tuple[int, int]):
        self._space, self._export, self.vocab_sizes = space, export, vocab_sizes
        self._known: dict[Subnet, dict[str, float]] = {}

    def __call__(self, subnet: Subnet) -> dict[str, float]:
        """Value of each cost of `HOW`."""
        if subnet not in self._known:
            counts = count(subnet)
            self._known[subnet] = {
                "gflops": counts.flops / 1e9,
                "active_params_m": counts.active_params / 1e6,
                "params_m": counts.params / 1e6,
                "size_mb": self.weight_bytes(subnet) / 1e6,
            }
        return self._known[subnet]

    def weight_bytes(self, subnet: Subnet) -> int:
        """Bytes of `weights.safetensors`; without its header and a shortlist's common words."""
        export, sharing = self._export, self._space.share_embeddings
        settings = self.vocab_sizes, sharing, export.quantize, export.shortlist
        return Layout(subnet, *settings).nbytes()
