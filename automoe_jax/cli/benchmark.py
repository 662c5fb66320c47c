"""Measures the latency of exports on this machine; several are timed in turns.

python launch/benchmark.py --export=runs/quickstart/export
python launch/benchmark.py --export=A,B --threads=1 --json
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from automoe_jax.cli import options, terminal
from automoe_jax.decoding.manifest import choose_kernels, read_manifest
from automoe_jax.latency.breakdown import parts_ms
from automoe_jax.latency.config import LatencyConfig
from automoe_jax.latency.process import Timer
from automoe_jax.latency.statistics import ratio, summarise
from automoe_jax.report.parts import parts_rows
from automoe_jax.system import files, machine
from automoe_jax.system.errors import UserError

_DEFAULT = LatencyConfig()
_EXPORTS = options.define_exports()
# Flags of the fields of `LatencyConfig`.
_SETTINGS = (
    flags.DEFINE_integer("runs", _DEFAULT.runs, "timed runs per export; 300 gold, 100 partially"),
    flags.DEFINE_integer("threads", 0, "CPU cores to use; 0 for all"),
    flags.DEFINE_enum("platform", "cpu", ["cpu", "gpu"], "what to run on"),
    options.define_kernels(),
    flags.DEFINE_integer("beam_size", _DEFAULT.beam_size, "beam size"),
    flags.DEFINE_integer("source_length", _DEFAULT.source_length, "tokens in"),
    flags.DEFINE_integer("target_length", _DEFAULT.target_length, "tokens out"),
)
_SENTENCES = flags.DEFINE_string(
    "sentences", None, "text file of real sentences (default: those in the first export)"
)
_PARTS = flags.DEFINE_bool(
    "parts", False, "also time what encoder, decoder layers, output layer and beam search take"
)
_JSON = options.define_json()


def main():
    exports = options.exports(_EXPORTS)
    settings: dict[str, Any] = {flag.name: flag.value for flag in _SETTINGS}
    config = LatencyConfig(**settings)
    manifests = [read_manifest(path) for path in exports]
    used = [_used(*of, config) for of in zip(exports, manifests, strict=True)]
    sentences = _sentences(manifests)
    kinds: dict[str, tuple[LatencyConfig, list[str] | None]] = {
        "mixed words": (config, None),
        "one word repeated": (dataclasses.replace(config, words="repeated"), None),
    }
    if sentences and all(m["tokenizer"] for m in manifests):
        kinds["real sentences"] = (config, sentences)
    progress = terminal.TerminalProgress()
    results = {}
    with Timer(config.threads, config.platform) as timer:
        for name, (kind, texts) in kinds.items():
            progress.note(f"timing {name}: {config.runs} runs each, {timer.threads} thread(s)")
            results[name] = timer.time(exports, kind, texts)
        parts = []
        for path in exports if _PARTS.value else ():
            progress.note(f"timing parts of {path}: {config.runs} runs each")
            parts.append(parts_ms(timer, path, config))
    about = {
        "protocol": f"batch 1, {config.source_length} tokens in, {config.target_length} out, beam "
        f"{config.beam_size}, {config.name}, 10 % tails dropped, mean; real sentences end by "
        "themselves",
        "threads": timer.threads,
        "platform": config.platform,
        "kernels": "; ".join(dict.fromkeys(used)),
        "machine": machine.cpu_name(),
    }
    rows = [{**_row(i, path, results), "kernels": used[i]} for i, path in enumerate(exports)]
    if parts:
        rows = [{**row, "parts_ms": own} for row, own in zip(rows, parts, strict=True)]
    if _JSON.value:
        terminal.print_json({**about, "exports": rows})
        return
    header = ("export", "input", "mean ms", "std", "median", "min", "of the first [95 %]")
    terminal.print_table(header, _cells(rows))
    if parts:
        header, *cells = parts_rows({row["export"]: row["parts_ms"] for row in rows})
        terminal.print_table(header, cells)
    print("{protocol}; {threads} thread(s), {kernels} kernels, {machine}".format(**about))


def _sentences(manifests) -> list[str]:
    if _SENTENCES.value is None:
        return manifests[0]["samples"]
    text = files.read_text(_SENTENCES.value, "sentences")
    sentences = [line.strip() for line in files.lines(text) if line.strip()]
    if not sentences:
        raise UserError(f"--sentences {_SENTENCES.value} has no sentence")
    return sentences


def _row(i: int, path: str, results) -> dict:
    inputs = {
        name: {**dataclasses.asdict(summarise(x[i])), "ratio_to_first": ratio(x[i], x[0])}
        for name, x in results.items()
    }
    return {"export": path, "inputs": inputs}


def _cells(rows: list[dict]) -> Iterator[tuple[str, ...]]:
    """The cells of the table: a row for each export and kind of input."""
    for row in rows:
        for name, times in row["inputs"].items():
            value, low, high = times["ratio_to_first"]
            ms = (f"{times[k]:.2f}" for k in ("mean_ms", "std_ms", "median_ms", "min_ms"))
            yield row["export"], name, *ms, f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _used(path: str, manifest: dict[str, Any], config: LatencyConfig) -> str:
    """The kernels that ran an export, with the reason where they are not the native ones."""
    chosen, why = choose_kernels(Path(path), manifest, config.platform, config.kernels)
    return f"{chosen} ({why})" if why else chosen
