"""Counts a subnet (parameters, active parameters, sparsity, FLOPs), or describes a search space.

python launch/describe.py --subnet=configs/subnets/transformer_big.json
python launch/describe.py --subnet=best_1.json --config=configs/wmt14.py --json
python launch/describe.py --subnet=best_1.json --out=best_1.yml     # as a subtransformer YAML
python launch/describe.py --config=configs/wmt14.py --out=space.yml # as a supertransformer YAML
"""

import dataclasses
import math
from pathlib import Path

from absl import flags

from automoe_jax.architecture import counts as complexity
from automoe_jax.architecture.subnet import DEFAULT_QKV_DIM
from automoe_jax.cli import options, terminal
from automoe_jax.cli.config_flag import ConfigFlag
from automoe_jax.published import subnet_files, supertransformer
from automoe_jax.system import files
from automoe_jax.system.errors import UserError

_SUBNET = flags.DEFINE_string("subnet", None, "subnet file: JSON, or HAT's or AutoMoE's YAML")
CONFIG = ConfigFlag("config whose space the subnet must be in, or is described without --subnet")
_LENGTH = flags.DEFINE_integer("sentence_length", 30, "tokens of source and target")
_OUT = flags.DEFINE_string(
    "out", None, "file to write the subnet to, JSON or (.yml) subtransformer YAML; without "
    "--subnet, the config's space as supertransformer YAML"
)  # fmt: skip
_JSON = options.define_json()


def main():
    if _LENGTH.value < 1:
        raise UserError(f"--sentence_length is {_LENGTH.value}; at least 1 is needed")
    space = CONFIG.load().space if CONFIG.present else None
    if not _SUBNET.value:
        if space is None:
            raise UserError("--subnet is missing; give a subnet file, or a --config to describe")
        _describe_space(space)
        return
    subnet = subnet_files.load(_SUBNET.value, space.qkv_dim if space else DEFAULT_QKV_DIM)
    max_experts = max_ffn_dims = None
    if space is not None:
        space.validate(subnet)
        max_experts = max(stack.max_experts for stack in space.stacks)
        max_ffn_dims = max(space.encoder_ffn_dims), max(space.decoder_ffn_dims)
    if _OUT.value:
        subnet_files.save(subnet, _OUT.value)
    counts = complexity.count(subnet, _LENGTH.value, max_experts, max_ffn_dims)
    if _JSON.value:
        terminal.print_json(dataclasses.asdict(counts))
        return
    rows = []
    layers = (*subnet.encoder.layers, *subnet.decoder.layers)
    for cost, layer in zip(counts.layers, layers, strict=True):
        numbers = f"{cost.params:,}", f"{cost.active_params:,.0f}", f"{cost.flops:,.0f}"
        sizes = " ".join(map(str, layer.experts))
        rows.append((cost.name, str(len(layer.experts)), sizes, *numbers))
    terminal.print_table(("layer", "experts", "FFN sizes", "params", "active", "FLOPs"), rows)
    print(f"Q/K/V width     {subnet.qkv_dim}")
    print(f"embedding width {subnet.encoder.embed_dim} / {subnet.decoder.embed_dim}")
    print(f"params         {counts.params:,} (embedding tables and output layer not counted)")
    print(
        f"active_params  {counts.active_params:,.0f} (uniform routing; from "
        f"{counts.active_params_min:,} to {counts.active_params_max:,})"
    )
    print(f"sparsity       {counts.sparsity:.1%} (of the supernet {counts.sparsity_supernet:.1%})")
    print(f"flops          {counts.flops / 1e9:.4f} G ({counts.sentence_length} tokens in and out)")


def _describe_space(space):
    if _OUT.value:
        if Path(_OUT.value).suffix not in (".yml", ".yaml"):
            raise UserError(f"--out is {_OUT.value}; a space is written as .yml or .yaml")
        files.write_text(_OUT.value, supertransformer.dump(space))
    corners = {"largest": space.largest(), "smallest": space.smallest()}
    corners = {name: complexity.count(x, _LENGTH.value) for name, x in corners.items()}
    if _JSON.value:
        counts = {name: dataclasses.asdict(count) for name, count in corners.items()}
        terminal.print_json({"space": dataclasses.asdict(space), **counts})
        return
    for field in dataclasses.fields(space):
        value = getattr(space, field.name)
        if value != ():
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            print(f"{field.name:<20} {shown}")
    print(f"{'architectures':<20} about 10^{math.log10(space.size()):.0f}")
    for name, count in corners.items():
        print(
            f"{name:<20} {count.params / 1e6:.2f} M parameters, "
            f"{count.active_params / 1e6:.2f} M active, {count.flops / 1e9:.3f} GFLOPs"
        )
