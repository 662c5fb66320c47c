"""The flag `--config`: a file of `configs/`, and `--config.group.field` to change its fields."""

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from automoe_jax.config import RunConfig, resolve
from automoe_jax.system import field_docs
from automoe_jax.system.errors import UserError

# `--help` lists a flag under the command that calls `ConfigFlag`, not under this module.
flags.disclaim_key_flags()


class ConfigFlag:
    """`--config` of one command, defined when this is constructed."""

    def __init__(self, about: str = "config file"):
        self._holder = config_flags.DEFINE_config_file("config", None, about, lock_config=True)

    @property
    def present(self) -> bool:
        """Whether the command line has a `--config`."""
        return bool(self._holder.present)

    @property
    def stem(self) -> str:
        """Name of the config file, without folder and suffix, and what stands behind a colon."""
        flag: Any = flags.FLAGS["config"]
        file, _, rest = str(flag.config_filename).partition(":")
        return "_".join([Path(file).stem, *(Path(part).stem for part in rest.split(":") if part)])

    def load(self) -> RunConfig:
        """The settings, checked."""
        try:
            value: Any = self._holder.value
            list(value or ())  # a file that failed to load raises at its first use
        except Exception as e:  # a config is a program: it can raise anything
            lines = [line.strip() for line in str(e).splitlines() if line.strip()]
            raise UserError(f"--config cannot be read: {lines[-1] if lines else e}") from None
        if value is None:
            raise UserError("--config is missing; give a file, as --config configs/quickstart.py")
        return resolve(value)

    def close(self):
        """Ends what a command has begun; called when it ends, however."""

    def help_text(self) -> str:
        """The fields of a config, their defaults and what they are."""
        lines = []
        for name, value, kind in _fields(RunConfig()):
            lines.append(f"  --config.{name}={value}")
            _, known = field_docs.described(kind)
            if about := known.get(name.rpartition(".")[2]):
                lines.append(flags.text_wrap(about, indent=" " * 6))
        return "Fields of --config and their defaults:\n\n" + "\n".join(lines)

    def refuse_yaml(self, argv: list[str]):
        """Raises `UserError` for a supertransformer YAML given as the config file."""
        for name, value in zip(argv[1:], [*argv[2:], ""], strict=False):
            file = value if name == "--config" else name.removeprefix("--config=")
            if name.startswith("--config") and file.endswith((".yml", ".yaml")) and ":" not in file:
                raise UserError(f"{file} is YAML; use --config=configs/supertransformer.py:{file}")

    def explain(self, argv: list[str], error: Exception) -> str | None:
        """The error line if the config file or a field of it made parsing fail."""
        text = str(error)
        if "Traceback" in text:  # of the config file
            reason = text.splitlines()[-1].partition(": ")[2]
            if "takes 0 positional arguments" in reason:
                reason = "this file takes nothing behind a colon"
            return f"--config cannot be read: {reason}"
        if isinstance(error, flags.Error):
            return None
        known = [name for name, _, _ in _fields(RunConfig())]
        for argument in argv[1:]:
            name = argument.removeprefix("--config.").split("=")[0]
            if argument.startswith("--config.") and name not in known:
                near = difflib.get_close_matches(name, known, 1, 0.5)
                hint = f"; did you mean --config.{near[0]}?" if near else ""
                return f"--config.{name} is not a field of the config{hint}"
        return f"--config cannot be read: {type(error).__name__}: {error}"


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, type]]:
    """Every field of a config: its dotted name, as "training.steps", its default, its class."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, type(config)
