"""Reads and writes subnet files: our JSON, and the YAML of HAT and AutoMoE."""

import json
from pathlib import Path

from automoe_jax.architecture.subnet import DEFAULT_QKV_DIM, Subnet, SubnetError, from_json, to_json
from automoe_jax.published import subtransformer
from automoe_jax.system import files

_YAML = (".yml", ".yaml")


def load(path: str | Path, default_qkv_dim: int = DEFAULT_QKV_DIM) -> Subnet:
    """Reads JSON, or subtransformer YAML (.yml, .yaml); `SubnetError` names the file and field.

    HAT's files have no Q/K/V width: they get `default_qkv_dim`.
    """
    path = Path(path)
    text = files.read_text(path, "subnet")
    try:
        if path.suffix in _YAML:
            return subtransformer.parse(text, default_qkv_dim)
        return from_json(json.loads(text), default_qkv_dim)
    except SubnetError as e:
        raise SubnetError(f"subnet file {path}: {e}") from None
    except (ValueError, RecursionError) as e:
        raise SubnetError(f"subnet file {path} is not JSON: {e}") from None


def save(subnet: Subnet, path: str | Path):
    """Writes JSON, or subtransformer YAML, which not every subnet fits, to .yml and .yaml."""
    path = Path(path)
    if path.suffix in _YAML:
        files.write_text(path, subtransformer.dump(subnet))
    else:
        files.write_json(path, to_json(subnet))
