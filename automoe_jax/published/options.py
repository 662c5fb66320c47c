"""The YAML files of HAT and AutoMoE: command line options of their fairseq, one a line."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

import yaml

from automoe_jax.system.errors import UserError

# How they write a cross-attention span: the number of encoder layers before the last, or -1.
SPANS = {-1: 1, 1: 2, 2: 3}
WRITTEN_SPANS = {span: written for written, span in SPANS.items()}
SIDES = ("encoder", "decoder")

# Options of the same files that say nothing of the architecture: training, data, logging.
_TRAINING = {
    "arch",
    "data",
    "source-lang",
    "target-lang",
    "max-tokens",
    "train-subtransformer",
    "optimizer",
    "adam-betas",
    "adam-eps",
    "clip-norm",
    "weight-decay",
    "dropout",
    "attention-dropout",
    "activation-dropout",
    "criterion",
    "label-smoothing",
    "ddp-backend",
    "distributed-world-size",
    "fp16",
    "update-freq",
    "max-update",
    "max-epoch",
    "warmup-updates",
    "lr-scheduler",
    "warmup-init-lr",
    "max-lr",
    "min-lr",
    "lr",
    "lr-shrink",
    "keep-last-epochs",
    "save-interval",
    "save-dir",
    "save-interval-updates",
    "keep-interval-updates",
    "no-epoch-checkpoints",
    "no-save",
    "validate-interval",
    "validation-metric",
    "seed",
    "cpu",
    "task",
    "num-workers",
    "log-format",
    "log-interval",
    "no-progress-bar",
    "tensorboard-logdir",
    "max-sentences",
    "max-source-positions",
    "max-target-positions",
    "left-pad-source",
    "left-pad-target",
    "required-batch-size-multiple",
    "fp16-init-scale",
    "min-loss-scale",
    "memory-efficient-fp16",
    "sandwich-rule",
    "encoder-attention-heads",
    "decoder-attention-heads",
    "encoder-capacity-factor",
    "decoder-capacity-factor",
    "encoder-load-balancing-loss-coeff",
    "decoder-load-balancing-loss-coeff",
    "encoder-expert-dropout-ratio",
    "decoder-expert-dropout-ratio",
}
# Options that make another architecture, where they are on.
_OTHER = {
    "encoder-normalize-before",
    "decoder-normalize-before",
    "encoder-learned-pos",
    "decoder-learned-pos",
    "no-token-positional-embeddings",
    "vocab-original-scaling",
    "adaptive-softmax-cutoff",
    "encoder-drop-tokens",
    "decoder-drop-tokens",
    "encoder-is-first-expert-identity",
    "decoder-is-first-expert-identity",
}
# Options that make another architecture where they are off.
_SCALED = {f"{side}-is-scale-prob" for side in SIDES}
# Options that have one value here.
_FIXED = {"activation-fn": "relu", **{f"{side}-expert-type": "switch" for side in SIDES}}
_INTEGER = re.compile(r"[+-]?[0-9]+")


class _Loader(yaml.BaseLoader):
    """All values stay text, no object is made; a key that is given twice is refused."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key} is given twice")
        return super().construct_mapping(node, deep)


class Options:
    """The options of one file: every value as text or a list of texts.

    Not as YAML reads them: to YAML, the sizes 3072_1024 are one number.
    """

    def __init__(self, values: dict[str, Any], error: type[UserError]):
        self._values, self._error = values, error

    def given(self, key: str) -> bool:
        """Whether an option is there and not an empty list."""
        return key in self._values and self._values[key] != []

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; refused where it is missing and there is no default."""
        if default is not None and not self.given(key):
            return default
        return self._as_integer(key, self._value(key))

    def integers(self, key: str, default: Iterable[int] | None = None) -> tuple[int, ...]:
        """A list of whole numbers; one alone is a list too."""
        if default is not None and not self.given(key):
            return tuple(default)
        values = tuple(self._as_integer(key, value) for value in self._list(key))
        if not values:
            raise self._error(f"{key} is an empty list; at least one value is needed")
        return values

    def layers(self, key: str, depth: int, default: int | None = None) -> tuple[int, ...]:
        """A number for each of the front `depth` layers; the list may be longer."""
        if default is not None and not self.given(key):
            return (default,) * depth
        return tuple(self._as_integer(key, value) for value in self.front(key, depth))

    def front(self, key: str, depth: int) -> list[Any]:
        """The front `depth` entries of a list."""
        values = self._list(key)
        if len(values) < depth:
            given = ", ".join(map(str, values))
            raise self._error(f"{key} is [{given}]; it must list at least {depth} value(s)")
        return values[:depth]

    def flag(self, key: str) -> bool:
        """Whether an option is on."""
        return key in self._values and _on(self._values[key])

    def _value(self, key: str) -> Any:
        if key not in self._values:
            raise self._error(f"{key} is missing")
        return self._values[key]

    def _list(self, key: str) -> list[Any]:
        value = self._value(key)
        return value if isinstance(value, list) else [value]

    def _as_integer(self, key: str, value: Any) -> int:
        if isinstance(value, str) and _INTEGER.fullmatch(value):
            return int(value)
        raise self._error(f"{key} has {value!r}; a whole number is needed")


def read(text: str, known: Iterable[str], what: str, error: type[UserError]) -> Options:
    """The options of a file.

    Args:
      text: YAML.
      known: the keys that the caller reads; those of training are allowed too, and have no effect.
      what: the kind of file, for error lines.
      error: what to raise.

    Raises:
      error: not YAML, an unknown key, or one that makes another architecture than ours.
    """
    try:
        values = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise error("not YAML: " + " ".join(str(e).split())) from None
    if not isinstance(values, dict):
        raise error(f"not a YAML mapping of {what} keys")
    known = set(known)
    for key in sorted(map(str, values)):
        if key in _OTHER and not _on(values[key]):
            continue
        unscaled = key in _SCALED and not _on(values[key])
        if key in _OTHER or unscaled or values[key] != _FIXED.get(key, values[key]):
            raise error(f"{key} is {values[key]}: this project has no such architecture")
        if key not in known | _TRAINING | _SCALED | _FIXED.keys():
            if what == "supertransformer" and key.endswith("-subtransformer"):
                raise error("it is a subtransformer file (one architecture); give it as --subnet")
            if what == "subtransformer" and key.endswith("-choice"):
                raise error(
                    "it is a supertransformer file (a search space); give it as "
                    "--config=configs/supertransformer.py:FILE"
                )
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise error(f"{key} is not a key of {what} YAML{hint}")
    return Options(values, error)


def line(key: str, value: Any) -> str:
    """`key: value`, lists as both their YAML and their command line readers take them."""
    return f"{key}: {list(value) if isinstance(value, tuple) else value}\n"


def _on(value: Any) -> bool:
    return str(value).strip().lower() not in ("false", "no", "0", "none", "null", "")
