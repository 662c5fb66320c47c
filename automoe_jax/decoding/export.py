"""Writes a stand-alone subnet as a folder that translates without the training code.

The folder holds `manifest.json`, `subnet.json`, `weights.safetensors`, serialized `jax.export`
programs, no pickle, and, where there is one, `tokenizer/`. Each beam size has a program of XLA's
operations alone, for every platform, and one for CPUs that calls the project's kernels.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from automoe_jax.architecture.subnet import to_json
from automoe_jax.data.lexicon import Lexicon
from automoe_jax.data.tokenizers.base import INFO
from automoe_jax.decoding import batching, native, weight_file, xla_engine
from automoe_jax.decoding.config import ExportConfig
from automoe_jax.decoding.layout import COMMON, LISTED
from automoe_jax.decoding.manifest import KIND, LAYOUT, WEIGHTS, mismatch
from automoe_jax.decoding.programs import PROGRAM, search
from automoe_jax.decoding.schema import KERNELS, KERNELS_OF
from automoe_jax.decoding.weights import Weights, pack, prepare, quantize, tables, unpack
from automoe_jax.model.extract import Params
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError


def export(
    params: Params,
    spec: xla_engine.ModelSpec,
    config: ExportConfig,
    folder: Path,
    origin: str,
    tokenizer: Path | None = None,
    languages: tuple[str, str] | None = None,
    samples: Sequence[str] = (),
    made_by: dict[str, Any] | None = None,
    kernels: Sequence[str] = KERNELS,
    lexicon: Lexicon | None = None,
    *,
    programs: bool = True,
):
    """Writes an export under a temporary name, then renames it.

    An export in `folder` is replaced; `UserError` where it holds something else.

    Args:
      params: of `stand_alone(spec.subnet, ...)`.
      origin: where the weights come from, in words, for the manifest.
      tokenizer: folder to copy; None for an export that is run on token ids.
      samples: source sentences for benchmarking on real text.
      made_by: the config of the run, seed and space included, for the manifest.
      kernels: kinds that it is for: "native", "xla"; evolved cells have the latter alone.
      lexicon: restricts the output layer, sentence by sentence; None for all words.
      programs: whether to write them. `Translator` needs them only where it is told to trust them,
        so an export that is scored or timed here, and removed, does without.
    """
    check_target(folder)
    packed, about = _pack(params, spec, config.quantize, lexicon)
    kernels = [k for k in KERNELS_OF[spec.subnet.cell] if k in kernels]
    on_cpu = "cpu" in config.platforms
    if not kernels:
        raise UserError(f"a subnet of {spec.subnet.cell} cells has none of the kernels wanted")
    manifest = about | {
        "beam_sizes": list(config.beam_sizes),
        "source_buckets": list(batching.SOURCE_BUCKETS),
        "platforms": list(config.platforms),
        "kernels": [k for k in kernels if k == "xla" or on_cpu],
        "layout": LAYOUT,
        "tokenizer": tokenizer and files.read_json(tokenizer / INFO, "tokenizer")["kind"],
        "languages": languages and list(languages),
        "weights_from": origin,
        "samples": list(samples),
        "scores": {},
        "config": made_by or {},
    }
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if programs:
        _write_programs(temporary, packed, spec, manifest)
    weight_file.save(temporary / WEIGHTS, packed)
    files.write_json(temporary / "subnet.json", manifest["subnet"])
    if tokenizer is not None:
        shutil.copytree(tokenizer, temporary / "tokenizer")
    workdir.write(temporary, KIND, manifest)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def _pack(
    params: Params, spec: xla_engine.ModelSpec, quantization: str, lexicon: Lexicon | None
) -> tuple[Weights, dict[str, Any]]:
    """The weights in the layout of files, and the part of the manifest that describes them."""
    weights = prepare(params, spec.subnet)
    source, _, output = tables(weights)
    if lexicon is not None:
        weights |= {LISTED: lexicon.words_VN, COMMON: lexicon.common_F}
    packed = pack(quantize(weights) if quantization == "int8" else weights)
    about = {
        "subnet": to_json(spec.subnet),
        "base_dims": [spec.encoder_base_dim, spec.decoder_base_dim],
        "gate": spec.gate,
        "vocab_sizes": [int(source.shape[0]), int(output.shape[0])],
        "quantization": quantization,
        "shortlist": 0 if lexicon is None else int(lexicon.words_VN.shape[1]),
        "weights_bytes": sum(w.nbytes for w in packed.values()),
    }
    assert not (wrong := mismatch(packed, about)), wrong
    return packed, about


def _write_programs(
    folder: Path, packed: Weights, spec: xla_engine.ModelSpec, manifest: dict[str, Any]
):
    n_words = manifest["vocab_sizes"][1]
    operands = {
        "native": lambda: (packed, ("cpu",)),
        "xla": lambda: (unpack(packed, n_words), manifest["platforms"]),
    }
    for kind in manifest["kernels"]:
        weights, platforms = operands[kind]()
        for n_beams in manifest["beam_sizes"]:
            path = folder / PROGRAM.format(n_beams, kind)
            path.write_bytes(program(search(kind, spec, n_words, n_beams), weights, platforms))


def check_target(folder: Path):
    """Raises `UserError` where a folder holds anything but an export, which may be replaced."""
    if folder.is_dir() and any(folder.iterdir()):
        try:
            workdir.read(folder, KIND)
        except UserError:
            raise UserError(
                f"{folder} holds something that is not an export; name a new or empty folder"
            ) from None


def program(run: Callable[..., Any], weights: Weights, platforms: Sequence[str]) -> bytes:
    """The serialized program of `programs.search`.

    One for all batch sizes b, source lengths s and cache times t.
    """
    b, s, t = jax_export.symbolic_shape("b, s, t")
    shapes = [((b, s), np.int32), ((t,), np.int32)]
    shapes += [((), np.int32), ((), np.int32), ((), np.float32)]
    abstract = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in weights.items()}
    checks = [jax_export.DisabledSafetyCheck.custom_call(n) for n in native.TARGETS]
    make = jax_export.export(jax.jit(run), platforms=list(platforms), disabled_checks=checks)
    exported = make(abstract, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    return bytes(exported.serialize())


def random_params(abstract: Any, seed: int) -> Any:
    """Random weights of the shapes of `abstract`, for timing an untrained architecture."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(scale=0.05, size=x.shape).astype(np.float32), abstract)
