"""The program of `process.Timer`'s child: requests on stdin, answers on stdout, as JSON lines.

Run as `python -m automoe_jax.latency.worker 0,1`, where 0 and 1 are the CPUs to use.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from automoe_jax.architecture.ids import EOS_ID, UNK_ID
from automoe_jax.decoding import parts
from automoe_jax.decoding.translator import Translator
from automoe_jax.system.errors import UserError

_LOADED: dict[tuple[str, str, str], Any] = {}
_MAX_LOADED = 8


def main():
    """Serves until stdin ends."""
    cpus = {int(c) for c in sys.argv[1].split(",")}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)  # before the first use of JAX starts its threads
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what libraries print out of the answers

    for line in sys.stdin:
        try:
            reply = {"times_ms": _serve(json.loads(line))}
        except UserError as e:
            reply = {"error": str(e)}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def _serve(request: dict[str, Any]) -> list[list[float]]:
    exports = [_load(path, request["platform"], request["kernels"]) for path in request["exports"]]
    if request["parts"]:
        (translator,) = exports
        calls = [[call] for call in _parts(translator, request)]
    else:
        calls = [_calls(translator, request) for translator in exports]
    n = max(len(c) for c in calls)
    for own in calls:
        for call in own:  # each shape compiles here
            call()
    for i in range(request["warmup"]):
        for own in calls:
            own[i % n]()
    times: list[list[float]] = [[] for _ in calls]
    for i in range(request["runs"]):
        # In turns, rotated by one each round, so that no export always follows the same one.
        for k in range(len(calls)):
            which = (i + k) % len(calls)
            start = time.perf_counter()
            calls[which][i % n]()
            times[which].append((time.perf_counter() - start) * 1000)
    return times


def _load(path: str, platform: str, kernels: str):
    key = (path, platform, kernels)
    stamp = os.stat(path).st_mtime_ns if os.path.isdir(path) else 0
    if key in _LOADED and _LOADED[key][0] == stamp:
        return _LOADED[key][1]
    while len(_LOADED) >= _MAX_LOADED:
        del _LOADED[next(iter(_LOADED))]
    _LOADED[key] = (stamp, Translator.load(path, platform, kernels))
    return _LOADED[key][1]


def _calls(translator, request: dict[str, Any]) -> list:
    """Functions to time: one for the protocol's sentence, or one per real sentence."""
    beam = translator.beam_size(request["beam_size"])
    if request["sentences"] is not None:
        return [
            lambda text=text: translator.translate([text], beam_size=beam)
            for text in request["sentences"]
        ]
    return [_whole(translator, request)]


def _parts(translator, request: dict[str, Any]) -> list[Callable[[], Any]]:
    """Parts of the protocol's translation, each with those before it; the last is the whole."""
    programs = translator.programs
    beam = translator.beam_size(request["beam_size"])
    source = _source(translator, request)
    inputs = source, parts.words(programs.n_words, 1, beam, request["target_length"])
    given = programs.weights, *jax.device_put(inputs, programs.device)
    calls = [lambda run=run: jax.block_until_ready(run(*given)) for run in programs.of_parts(beam)]
    return [*calls, _whole(translator, request)]


def _whole(translator, request: dict[str, Any]) -> Callable[[], Any]:
    """The protocol's translation: eos is barred until the last step and forced there."""
    beam, words = translator.beam_size(request["beam_size"]), request["target_length"] - 1
    source = _source(translator, request)

    def call():
        out = translator.programs.run(source, beam, words + 1, words, words, 0.6)
        jax.block_until_ready(out)

    return call


def _source(translator, request: dict[str, Any]) -> np.ndarray:
    """The protocol's sentence, (1, S)."""
    n = request["source_length"]
    vocab = translator.manifest["vocab_sizes"][0]
    rng = np.random.default_rng(0)
    ids = rng.integers(min(UNK_ID + 1, vocab - 1), vocab, n)
    if request["words"] == "repeated":
        ids[:] = ids[0]
    ids[-1] = EOS_ID
    return ids[None].astype(np.int32)


if __name__ == "__main__":
    main()
