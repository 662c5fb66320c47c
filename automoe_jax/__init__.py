"""automoe_jax: train, search and ship mixture-of-experts translation models under a budget."""

from typing import TYPE_CHECKING, Any

from automoe_jax.system.version import __version__ as __version__

if TYPE_CHECKING:
    from automoe_jax.decoding.translator import Translator as Translator


def __getattr__(name: str) -> Any:
    """`automoe_jax.Translator`, loaded at first use: reading the version does without JAX."""
    if name == "Translator":
        from automoe_jax.decoding.translator import Translator  # noqa: PLC0415

        return Translator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
