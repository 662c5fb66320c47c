"""Reads `manifest.json` of an export and checks that the export can run here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from automoe_jax.architecture import subnet
from automoe_jax.decoding import native, schema
from automoe_jax.decoding.layout import COMMON, LISTED, PANEL, Layout
from automoe_jax.decoding.schema import KERNELS
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError

KIND = "export"
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
    if not (folder / workdir.MANIFEST).exists():
        raise UserError(
            f"{folder} is no export, or not a whole one: it has no {workdir.MANIFEST}; copy it "
            "again, or make one with launch/export.py"
        )
    manifest = workdir.read(folder, KIND)
    if manifest.get("layout") != LAYOUT:
        raise UserError(
            f"export {folder} was written by another version; write it again with launch/export.py"
        )
    manifest.setdefault("gate", "probability")  # that of exports of earlier versions
    schema.check(folder / workdir.MANIFEST, manifest)
    _check_inside(folder)
    return manifest


def _check_inside(folder: Path):
    """Raises `UserError` if a file of an export is a link to somewhere else."""
    root = folder.resolve()
    for path in (*folder.iterdir(), *folder.glob("tokenizer/*")):
        if not path.resolve().is_relative_to(root):
            raise UserError(f"{path} is a link out of the export {folder}; copy the file there")


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
    return device(platform)


def device(platform: str) -> Any:
    """The first device of a platform; `UserError` where there is none."""
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
        if manifest["subnet"].get("cell") == "evolved":
            why = "they have no convolutions, as evolved cells need them"
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
    layout = Layout(arch, vocab_sizes, sharing, manifest["quantization"], *lists)
    return layout.mismatch(weights) or _wrong_words(weights, vocab_sizes[1])


def _wrong_words(weights: Mapping[str, np.ndarray], n_words: int) -> str:
    """The first list of words that names one that the model does not have; "" without."""
    for name, low in ((LISTED, -1), (COMMON, 0)):
        words = weights.get(name)
        if words is not None and words.size and not low <= words.min() <= words.max() < n_words:
            return f"{name} has words {words.min()} to {words.max()}, of {n_words}"
    return ""
