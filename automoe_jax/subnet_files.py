"""Subnet files: our JSON, read and written, and HAT's subtransformer YAML, read."""

import json
from pathlib import Path

from automoe_jax import files, hat_yaml
from automoe_jax.subnet import DEFAULT_QKV_DIM, Subnet, SubnetError, from_json, to_json


def load(path: str | Path, default_qkv_dim: int = DEFAULT_QKV_DIM) -> Subnet:
    """Reads a subnet from JSON, or from HAT's YAML where the name ends in .yml or .yaml.

    Args:
      path: the file.
      default_qkv_dim: the Q/K/V width where the file does not say (HAT's never does).

    Raises:
      SubnetError: one line with the file and the field.
    """
    path = Path(path)
    text = files.read_text(path, "subnet")
    try:
        if path.suffix in (".yml", ".yaml"):
            return hat_yaml.parse(text, default_qkv_dim)
        return from_json(json.loads(text), default_qkv_dim)
    except SubnetError as e:
        raise SubnetError(f"subnet file {path}: {e}") from None
    except (ValueError, RecursionError) as e:
        raise SubnetError(f"subnet file {path} is not JSON: {e}") from None


def save(subnet: Subnet, path: str | Path):
    """Writes the JSON form, beside and renamed, so that a reader never sees half a file."""
    files.write_json(path, to_json(subnet))
