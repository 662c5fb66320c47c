"""Shared by the benchmarks that train: the command, a small architecture, and what a run logged."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def command(config: str, workdir: Path, *more: str) -> list[str]:
    """`launch/train.py` of this project."""
    program = str(ROOT / "launch" / "train.py")
    return [sys.executable, program, "--config", config, "--workdir", str(workdir), *more]


def flags(settings: dict[str, Any]) -> list[str]:
    """The flags that set fields of a config."""
    return [f"--config.{name}={value}" for name, value in settings.items()]


def architecture(experts: list[int]) -> dict[str, Any]:
    """A subnet of 3 + 2 layers of width 128 with these experts in each layer."""
    encoder = {"heads": 4, "experts": experts}
    decoder = {"self_heads": 4, "cross_heads": 4, "cross_span": 1, "experts": experts}
    return {
        "version": 1,
        "qkv_dim": 128,
        "encoder": {"embed_dim": 128, "layers": [encoder] * 3},
        "decoder": {"embed_dim": 128, "layers": [decoder] * 2},
    }


def values(folder: Path, name: str) -> dict[int, float]:
    """The values of a metric of a training, by step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["value"] for line in lines if line["name"] == name}
