"""The YAML files of HAT and AutoMoE: command line options of their fairseq, one per line."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from automoe_jax.architecture.subnet import STACKS
from automoe_jax.system.errors import UserError

# Cross-attention span by its form in the files: encoder layers before the last, -1 for none.
_SPANS = {-1: 1, 1: 2, 2: 3}
WRITTEN_SPANS = {span: written for written, span in _SPANS.items()}


def _words(both: str, each: str) -> set[str]:
    """The option names of a text, and those of `each` for encoder and decoder."""
    return {*both.split(), *(f"{side}-{name}" for side in STACKS for name in each.split())}


# Options of training, data and logging: they are allowed and have no effect.
_TRAINING = _words(
    """
    arch data task source-lang target-lang seed cpu num-workers ddp-backend distributed-world-size
    fp16 fp16-init-scale min-loss-scale memory-efficient-fp16 train-subtransformer sandwich-rule
    max-tokens max-sentences max-source-positions max-target-positions left-pad-source
    left-pad-target required-batch-size-multiple update-freq max-update max-epoch
    optimizer adam-betas adam-eps clip-norm weight-decay criterion label-smoothing
    dropout attention-dropout activation-dropout
    lr lr-scheduler lr-shrink warmup-updates warmup-init-lr max-lr min-lr
    save-dir save-interval save-interval-updates keep-last-epochs keep-interval-updates
    no-epoch-checkpoints no-save validate-interval validation-metric
    log-format log-interval no-progress-bar tensorboard-logdir
    """,
    "attention-heads capacity-factor load-balancing-loss-coeff expert-dropout-ratio",
)
# Options that, switched on, make an architecture that this project does not have.
_UNSUPPORTED = _words(
    "no-token-positional-embeddings vocab-original-scaling adaptive-softmax-cutoff",
    "normalize-before learned-pos drop-tokens is-first-expert-identity",
)
# Options that make such an architecture when switched off.
_SCALED = _words("", "is-scale-prob")
# Options with a single supported value.
_FIXED = {"activation-fn": "relu", **{f"{side}-expert-type": "switch" for side in STACKS}}
_INTEGER = re.compile(r"[+-]?[0-9]+")


class _Loader(yaml.BaseLoader):
    """Keeps all values as text, makes no objects, and refuses a key that is given twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key} is given twice")
        return super().construct_mapping(node, deep)


class Options:
    """The options of one file, as texts or lists of texts: to YAML, 3072_1024 is one number."""

    def __init__(self, values: dict[str, Any], error: type[UserError]):
        self._values, self._error = values, error

    def given(self, key: str) -> bool:
        """True for an option that is present and no empty list."""
        return key in self._values and self._values[key] != []

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; an error if it is missing and has no default."""
        if default is not None and not self.given(key):
            return default
        return self._as_integer(key, self._value(key))

    def integers(
        self, key: str, default: Iterable[int] | None = None, depth: int | None = None
    ) -> tuple[int, ...]:
        """A list of whole numbers, or its front `depth` entries; a single number is a list."""
        if default is not None and not self.given(key):
            return tuple(default)
        found = self._list(key) if depth is None else self.front(key, depth)
        if not found:
            raise self._error(f"{key} is an empty list; at least one value is needed")
        return tuple(self._as_integer(key, value) for value in found)

    def front(self, key: str, depth: int) -> list[Any]:
        """The front `depth` entries of a list, which may be longer."""
        values = self._list(key)
        if len(values) < depth:
            given = ", ".join(map(str, values))
            raise self._error(f"{key} is [{given}]; it must list at least {depth} value(s)")
        return values[:depth]

    def spans(self, key: str, depth: int | None = None) -> tuple[int, ...]:
        """A list of cross-attention spans, or those of the front `depth` layers."""
        found = self.integers(key, depth=depth)
        for span in found:
            if span not in _SPANS:
                raise self._error(f"{key} has {span}; allowed: -1, 1 and 2")
        return tuple(_SPANS[span] for span in found)

    def flag(self, key: str) -> bool:
        """True for an option that is switched on."""
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
    """The options of a YAML file; training options are allowed besides the `known` keys.

    Raises `error`, naming the kind of file `what`, if it is not YAML or has an unknown key or one
    of an architecture that this project does not have.
    """
    try:
        values = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise error("not YAML: " + " ".join(str(e).split())) from None
    if not isinstance(values, dict):
        raise error(f"not a YAML mapping of {what} keys")
    known = set(known)
    for key in sorted(map(str, values)):
        if key in _UNSUPPORTED and not _on(values[key]):
            continue
        unscaled = key in _SCALED and not _on(values[key])
        if key in _UNSUPPORTED or unscaled or values[key] != _FIXED.get(key, values[key]):
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


def write(blocks: Iterable[Sequence[tuple[str, Any]]]) -> str:
    """A file of (key, value) blocks; HAT's YAML and command line readers accept its lists."""

    def line(key: str, value: Any) -> str:
        return f"{key}: {list(value) if isinstance(value, tuple) else value}\n"

    return "\n".join("".join(line(*pair) for pair in block) for block in blocks if block)


def _on(value: Any) -> bool:
    return str(value).strip().lower() not in ("false", "no", "0", "none", "null", "")
