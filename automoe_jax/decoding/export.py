"""Writes a stand-alone subnet as a folder that translates without the training code.

The folder holds `manifest.json` (what it is), `subnet.json`, `weights.safetensors`, serialized
`jax.export` programs and, where there is one, `tokenizer/`. No pickle. Each beam size has a program
of XLA's operations alone, for every platform, and for CPUs one that calls the project's kernels.
"""

import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from automoe_jax.architecture.subnet import to_json
from automoe_jax.data.lexicon import Lexicon
from automoe_jax.data.tokenizers.base import INFO
from automoe_jax.decoding import beam, native, weight_file
from automoe_jax.decoding import native_engine as native_model
from automoe_jax.decoding import xla_engine as model
from automoe_jax.decoding.batching import SOURCE_BUCKETS
from automoe_jax.decoding.config import ExportConfig
from automoe_jax.decoding.translator import (
    KERNELS,
    KIND,
    LAYOUT,
    PROGRAM,
    WEIGHTS,
)
from automoe_jax.decoding.weights import (
    COMMON,
    LISTED,
    Weights,
    pack,
    prepare,
    quantize,
    tables,
    unpack,
)
from automoe_jax.decoding.xla_engine import Spec
from automoe_jax.model.extract import Params
from automoe_jax.system import files, workdir
from automoe_jax.system.errors import UserError


def export(
    params: Params,
    spec: Spec,
    config: ExportConfig,
    folder: Path,
    origin: str,
    tokenizer: Path | None = None,
    languages: tuple[str, str] | None = None,
    samples: Sequence[str] = (),
    made_by: dict[str, Any] | None = None,
    kernels: Sequence[str] = KERNELS,
    lexicon: Lexicon | None = None,
):
    """Writes an export, beside its name and then renamed.

    Args:
      params: of `Transformer(arch=spec.subnet)`.
      spec: the architecture and its base widths.
      config: beam sizes, platforms and quantisation.
      folder: where; an export that is there is replaced.
      origin: where the weights come from, in words, for the manifest.
      tokenizer: folder to copy; None for an export that is run on token ids.
      languages: source and target.
      samples: source sentences for benchmarking on real text.
      made_by: the config of the run, seed and space included, for the manifest.
      kernels: which kinds of programs to write: "native", "xla" (where export time matters, the
        one that will be run is enough).
      lexicon: restricts the output layer, sentence by sentence; None for all words.

    Raises:
      UserError: `folder` holds something else.
    """
    check_target(folder)
    dense = prepare(params, spec.subnet)
    words = tables(dense)
    vocab_sizes = (int(words.source.shape[0]), int(words.output.shape[0]))
    if lexicon is not None:
        dense |= {LISTED: lexicon.words_VN, COMMON: lexicon.common_F}
    if config.quantize == "int8":
        dense = quantize(dense)
    packed = pack(dense)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    programs = {}
    if "native" in kernels and "cpu" in config.platforms:
        programs["native"] = (native_model, packed, ("cpu",))
    if "xla" in kernels:
        programs["xla"] = (model, unpack(packed, vocab_sizes[1]), config.platforms)
    for n_beams in config.beam_sizes:
        for kind, (engine, weights, platforms) in programs.items():
            path = temporary / PROGRAM.format(n_beams, kind)
            path.write_bytes(program(engine, weights, spec, vocab_sizes[1], n_beams, platforms))
    weight_file.save(temporary / WEIGHTS, packed)
    files.write_json(temporary / "subnet.json", to_json(spec.subnet))
    if tokenizer is not None:
        shutil.copytree(tokenizer, temporary / "tokenizer")
    workdir.write(
        temporary,
        KIND,
        {
            "subnet": to_json(spec.subnet),
            "base_dims": [spec.encoder_base_dim, spec.decoder_base_dim],
            "vocab_sizes": list(vocab_sizes),
            "beam_sizes": list(config.beam_sizes),
            "source_buckets": list(SOURCE_BUCKETS),
            "platforms": list(config.platforms),
            "quantization": config.quantize,
            "shortlist": 0 if lexicon is None else int(lexicon.words_VN.shape[1]),
            "kernels": list(programs),
            "layout": LAYOUT,
            "tokenizer": None if tokenizer is None else _tokenizer_kind(tokenizer),
            "languages": None if languages is None else list(languages),
            "weights_from": origin,
            "weights_bytes": sum(w.nbytes for w in packed.values()),
            "samples": list(samples),
            "scores": {},
            "config": made_by or {},
        },
    )
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def check_target(folder: Path):
    """Raises `UserError` where a folder holds anything but an export, which may be replaced."""
    if folder.is_dir() and any(folder.iterdir()):
        try:
            workdir.read(folder, KIND)
        except UserError:
            raise UserError(
                f"{folder} holds something that is not an export; name a new or empty folder"
            ) from None


def _tokenizer_kind(folder: Path) -> str:
    return files.read_json(folder / INFO, "tokenizer")["kind"]


def program(
    engine: ModuleType,
    weights: Weights,
    spec: Spec,
    n_words: int,
    n_beams: int,
    platforms: Sequence[str],
) -> bytes:
    """The serialized program: one for all batch sizes, source lengths and cache times.

    It takes (weights, source ids (b, s), arange (t,), minimum length, maximum length, length
    penalty) and returns a dict of the fields of `beam.Result`.
    """

    def run(weights, source_BS, time_T, min_length, max_length, length_penalty):
        search = functools.partial(beam.search, engine, weights, spec, n_words, n_beams)
        return search(source_BS, time_T, min_length, max_length, length_penalty)._asdict()

    b, s, t = jax_export.symbolic_shape("b, s, t")
    ints, floats = jnp.int32, jnp.float32
    arguments = (
        {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in weights.items()},
        jax.ShapeDtypeStruct((b, s), ints),
        jax.ShapeDtypeStruct((t,), ints),
        jax.ShapeDtypeStruct((), ints),
        jax.ShapeDtypeStruct((), ints),
        jax.ShapeDtypeStruct((), floats),
    )
    exported = jax_export.export(
        jax.jit(run),
        platforms=list(platforms),
        disabled_checks=[jax_export.DisabledSafetyCheck.custom_call(n) for n in native.TARGETS],
    )(*arguments)
    return bytes(exported.serialize())


def random_params(abstract: Any, seed: int) -> Any:
    """Weights of the right shapes, for timing an architecture that nobody has trained."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(scale=0.05, size=x.shape).astype(np.float32), abstract)
