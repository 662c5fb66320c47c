"""Reads `manifest.json` of an export and checks that the export can run here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from automoe_jax.architecture import subnet
from automoe_jax.decoding import native
from automoe_jax.decoding.layout import COMMON, PANEL, Layout
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError

KIND = "export"
KERNELS = ("native", "xla")
WEIGHTS = "weights.safetensors"
# Version of the weights' layout and of the kernels' operands; an export of another cannot be run.
LAYOUT = f"panels of {PANEL}, calls {native.CALLS}"
# JAX's names of a platform.
PLATFORMS = {"cpu": {"cpu"}, "gpu": {"cuda", "rocm"}, "tpu": {"tpu"}}


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an export; `UserError` where `folder` is not one."""
    folder = files.expanded(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"export folder {folder} {what}; make one with launch/export.py")
    return workdir.read(folder, KIND)


def find_device(folder: Path, manifest: dict[str, Any], platform: str) -> Any:
    """The device to run an export on; `UserError` where there is none that it was made for."""
    if platform not in PLATFORMS:
        raise UserError(f"platform is {platform!r}; allowed: cpu, gpu, tpu")
    if not PLATFORMS[platform] & set(manifest["platforms"]):
        name = {"gpu": "cuda"}.get(platform, platform)
        raise UserError(
            f"export {folder} was made for {', '.join(manifest['platforms'])}; export it "
            f"again with --config.export.platforms=cpu,{name}"
        )
    if manifest.get("layout") != LAYOUT:
        raise UserError(
            f"export {folder} was written by another version; write it again with launch/export.py"
        )
    try:
        return jax.local_devices(backend=platform)[0]
    except RuntimeError:
        raise UserError(f"JAX finds no {platform} here; use --platform=cpu") from None


def choose_kernels(
    folder: Path, manifest: dict[str, Any], platform: str, wanted: str
) -> tuple[str, str]:
    """The kernels to run on, and with "auto" the reason why not the native ones, else ""."""
    if wanted not in ("auto", *KERNELS):
        raise UserError(f"kernels is {wanted!r}; allowed: auto, {', '.join(KERNELS)}")
    why = ""
    if platform != "cpu":
        why = f"they run on CPUs, not on {platform}"
    elif wanted != "xla":
        why = native.reason()
    if not why and "native" not in manifest["kernels"]:
        why = f"export {folder} has no program for them"
    if wanted == "native" and why:
        raise UserError(f"the native kernels cannot be used: {why}; use --kernels=xla")
    chosen = "xla" if why or wanted == "xla" else "native"
    if chosen not in manifest["kernels"]:
        raise UserError(
            f"export {folder} has programs for {', '.join(manifest['kernels'])} only, and these "
            f"cannot be used: {why or 'xla was asked for'}; write it again with launch/export.py"
        )
    return chosen, why if wanted == "auto" and platform == "cpu" else ""


def mismatch(weights: Mapping[str, np.ndarray], manifest: dict[str, Any]) -> str:
    """The first array that is not one of the manifest's subnet, in words; "" where all are."""
    # Which embeddings are shared follows from their names.
    separate = "none" if "output" in weights else "decoder"
    sharing = "all" if "embedding" in weights else separate
    arch, vocab_sizes = subnet.from_json(manifest["subnet"]), tuple(manifest["vocab_sizes"])
    lists = manifest["shortlist"], weights[COMMON].size if COMMON in weights else 0
    return Layout(arch, vocab_sizes, sharing, manifest["quantization"], *lists).mismatch(weights)
