"""Counts a subnet: parameters, active parameters, sparsity, FLOPs.

python launch/describe.py --subnet=best_1.json
python launch/describe.py --subnet=best_1.json --config=configs/wmt14.py --json
"""

import dataclasses

import common
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from automoe_jax.errors import UserError

_SUBNET = flags.DEFINE_string("subnet", None, "subnet file: JSON, or HAT's YAML")
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "config whose space the subnet must be in", lock_config=True
)
_LENGTH = flags.DEFINE_integer("sentence_length", 30, "tokens of source and target")
_JSON = flags.DEFINE_bool("json", False, "print one JSON line instead of a table")


def main():
    if not _SUBNET.value:
        raise UserError("--subnet is missing; give a subnet file")
    if _LENGTH.value < 1:
        raise UserError(f"--sentence_length is {_LENGTH.value}; at least 1 is needed")
    from automoe_jax import complexity, subnet_files  # noqa: PLC0415

    if flags.FLAGS["config"].present:
        space = common.load_config(_CONFIG).space
        subnet = subnet_files.load(_SUBNET.value, space.qkv_dim)
        space.validate(subnet)
        max_experts = max(space.max_experts("encoder"), space.max_experts("decoder"))
    else:
        subnet, max_experts = subnet_files.load(_SUBNET.value), None
    counts = complexity.count(subnet, _LENGTH.value, max_experts)
    if _JSON.value:
        common.print_json(dataclasses.asdict(counts))
        return
    table = Table("layer", "experts", "FFN sizes", "params", "active", "FLOPs")
    specs = (*subnet.encoder.layers, *subnet.decoder.layers)
    for cost, layer in zip(counts.layers, specs, strict=True):
        table.add_row(
            cost.name,
            str(len(layer.experts)),
            " ".join(map(str, layer.experts)),
            f"{cost.params:,}",
            f"{cost.active_params:,.0f}",
            f"{cost.flops:,.0f}",
        )
    Console(width=None if Console().is_terminal else 120).print(table)
    print(f"embedding width {subnet.encoder.embed_dim} / {subnet.decoder.embed_dim}")
    print(f"params         {counts.params:,} (embedding table not counted)")
    print(
        f"active_params  {counts.active_params:,.0f} (uniform routing; from "
        f"{counts.active_params_min:,} to {counts.active_params_max:,})"
    )
    print(f"sparsity       {counts.sparsity:.1%} (of the supernet {counts.sparsity_supernet:.1%})")
    print(f"flops          {counts.flops / 1e9:.4f} G ({counts.sentence_length} tokens in and out)")


if __name__ == "__main__":
    common.run(main)
