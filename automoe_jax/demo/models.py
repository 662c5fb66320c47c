"""An export of the demo: translations, how long they took, and the expert of each token."""

import functools
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from automoe_jax.architecture.ids import EOS_ID, PAD_ID
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.decoding.translation import Translation
from automoe_jax.decoding.translator import Translator
from automoe_jax.phases import teachers
from automoe_jax.system.errors import UserError

# Longest sentence, in tokens, whose experts are shown.
MOST_SHOWN = 256
_SHORTEST = 16  # tokens that a pass is compiled for
_ONE_AT_A_TIME = threading.Lock()


class DemoModel:
    """One export."""

    def __init__(self, name: str, translator: Translator):
        """Compiles what a first request needs; `UserError` for an export without a tokenizer."""
        if translator.tokenizer is None:
            raise UserError(
                f"the export {translator.folder} has no tokenizer (random weights?): it can be "
                "timed, not translated with"
            )
        self.name, self._translator = name, translator
        self._tokenizer = translator.tokenizer
        several = any(len(x.experts) > 1 for _, s in translator.subnet.stacks for x in s.layers)
        self._route = TokenRouter(translator.folder, translator.subnet) if several else None
        self.translate(["."], None, 1)

    @property
    def about(self) -> dict[str, Any]:
        """What the page says of the export."""
        manifest = self._translator.manifest
        languages = manifest["languages"]
        return {
            "name": self.name,
            "languages": " to ".join(languages) if languages else "",
            "weights": manifest["weights_from"],
            "quantize": manifest["quantization"],
            "kernels": self._translator.kernels,
            "beam_sizes": manifest["beam_sizes"],
            "default_beam": self._translator.beam_size(),
            "experts": self._route is not None,
        }

    def translate(self, texts: list[str], beam: int | None, n: int) -> dict[str, Any]:
        """Translations of sentences one by one, as the page takes them."""
        beam = self._translator.beam_size(beam)
        # A translation uses all cores: those of several models would disturb each other's times.
        with _ONE_AT_A_TIME:
            return {"name": self.name, "lines": [self._one(x, beam, min(n, beam)) for x in texts]}

    def _one(self, text: str, beam: int, n: int) -> dict[str, Any]:
        programs = self._translator.programs.count
        found, ms = self._timed(text, beam, n)
        if self._translator.programs.count != programs:  # it compiled: that is no latency
            found, ms = self._timed(text, beam, n)
        return {
            "source": text,
            "ms": ms,
            "cut": found.cut,
            "hypotheses": [{"text": h.text, "score": h.score} for h in found.hypotheses],
            **self._tokens(text, found),
        }

    def _timed(self, text: str, beam: int, n: int) -> tuple[Translation, float]:
        begin = time.perf_counter()
        found = self._translator.translate([text], beam, num_hypotheses=n)[0]
        return found, (time.perf_counter() - begin) * 1000

    def _tokens(self, text: str, found: Translation) -> dict[str, Any]:
        """The tokens of a sentence and its translation, with their experts in each layer."""
        if self._route is None or not text.strip():
            return {}
        source = self._tokenizer.encode([text])[0]
        target = [*map(int, found.hypotheses[0].ids), EOS_ID]
        if max(len(source), len(target)) > MOST_SHOWN:
            return {"long": True}
        tokens = {
            "encoder": self._tokenizer.pieces(source, "source"),
            "decoder": self._tokenizer.pieces(target, "target"),
        }
        return {"tokens": tokens, "layers": self._route(source, target)}


class TokenRouter:
    """The expert that each token is sent to in each layer, by a pass of the model in an export.

    A decoder's token is the one that is written at a position, not the one that is read there.
    """

    def __init__(self, folder: Path, subnet: Subnet):
        module, params = teachers.model_of_export(folder)
        self._layers = subnet.layers

        @jax.jit
        def experts(params: Any, source_BS: jax.Array, read_BT: jax.Array) -> list[jax.Array]:
            output: Any = module.apply({"params": params}, source_BS, read_BT)
            return [jnp.argmax(x, axis=-1).reshape(-1) for x in output.router_logits]

        self._experts = functools.partial(experts, jax.device_put(params))

    def __call__(self, source: list[int], target: list[int]) -> list[dict[str, Any]]:
        """The layers, with the expert of each token: from 0, in the order of `sizes`."""
        read = [EOS_ID, *target[:-1]]
        length = _SHORTEST
        while length < max(len(source), len(target)):
            length *= 2
        padded = [np.array([[*ids, *[PAD_ID] * (length - len(ids))]]) for ids in (source, read)]
        real = {"encoder": len(source), "decoder": len(target)}
        return [
            {"side": side, "number": number, "sizes": list(layer.experts),
             "experts": np.asarray(own)[: real[side]].tolist()}
            for (side, number, layer), own in zip(self._layers, self._experts(*padded), strict=True)
        ]  # fmt: skip
