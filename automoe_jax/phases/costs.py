"""What a subnet costs, by the names that limits and fronts use."""

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import DecoderLayer, EncoderLayer, Subnet
from automoe_jax.decoding.config import ExportConfig
from automoe_jax.decoding.native import PANEL

HOW = {
    "gflops": "counted: 30 tokens in and out, uniform routing",
    "active_params_m": "counted: what one token uses, embeddings left out",
    "params_m": "counted, embeddings left out",
    "size_mb": "counted: bytes of the exported weights",
}


class Counted:
    """Costs that are counted, not measured."""

    def __init__(self, space: SearchSpace, export: ExportConfig, vocab_sizes: tuple[int, int]):
        self._space, self._export, self._vocab_sizes = space, export, vocab_sizes
        self._known: dict[Subnet, dict[str, float]] = {}

    def __call__(self, subnet: Subnet) -> dict[str, float]:
        """Value of each cost of `HOW`."""
        if subnet not in self._known:
            counts = complexity.count(subnet)
            self._known[subnet] = {
                "gflops": counts.flops / 1e9,
                "active_params_m": counts.active_params / 1e6,
                "params_m": counts.params / 1e6,
                "size_mb": self.weight_bytes(subnet) / 1e6,
            }
        return self._known[subnet]

    def weight_bytes(self, subnet: Subnet) -> int:
        """Bytes of `weights.safetensors`, its header left out: `decoding.weights.pack`."""
        e, d, q = subnet.encoder.embed_dim, subnet.decoder.embed_dim, subnet.qkv_dim
        total = self._tables(subnet)
        for layer in subnet.encoder.layers:
            total += self._attention(e, e, q) + self._experts(layer, e)
        for layer in subnet.decoder.layers:
            total += self._attention(d, d, q) + self._experts(layer, d)
            total += self._matrix(d, q) + self._matrix(e, 2 * q) + self._matrix(q, d) + 2 * d * 4
        return total

    def _attention(self, d_in: int, d_out: int, qkv_dim: int) -> int:
        norm = 2 * d_out * 4
        return self._matrix(d_in, 3 * qkv_dim) + self._matrix(qkv_dim, d_out) + norm

    def _experts(self, layer: EncoderLayer | DecoderLayer, dim: int) -> int:
        total = 2 * dim * 4
        if len(layer.experts) > 1:
            total += (dim + 1) * len(layer.experts) * 4
        for size in layer.experts:
            if size:
                total += self._matrix(dim, size) + self._matrix(size, dim)
        return total

    def _matrix(self, inputs: int, outputs: int, bias: bool = True) -> int:
        padded = _up(outputs, PANEL)
        if self._export.quantize == "int8":
            own = _up(inputs, 4) * padded + 2 * padded * 4
        else:
            own = inputs * padded * 4
        return own + outputs * 4 * bias

    def _tables(self, subnet: Subnet) -> int:
        """Embeddings and output layer."""
        source, target = self._vocab_sizes
        e, d = subnet.encoder.embed_dim, subnet.decoder.embed_dim
        shared = self._space.share_embeddings
        if shared == "all":
            tables, output_is_own = [(source, max(e, d))], d < e
        else:
            tables, output_is_own = [(source, e), (target, d)], shared == "none"
        total = sum(words * width * 4 for words, width in tables)
        table = target * d * 4
        panels = self._matrix(d, target, bias=False)
        if self._export.shortlist:
            return total + output_is_own * table + source * self._export.shortlist * 4
        if self._export.quantize == "int8" or output_is_own:
            return total + panels
        return total + panels - table  # it lies in panels itself


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
