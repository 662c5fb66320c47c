"""Flags that several commands share, their parsing, and the text of `--help`."""

import re
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from absl import flags

from automoe_jax.system import shipped
from automoe_jax.system.errors import UserError

if TYPE_CHECKING:
    from automoe_jax.cli.config_flag import ConfigFlag

# A flag defined here belongs to the command that calls, as far as `--help` is concerned.
flags.disclaim_key_flags()


def define_json(about: str = "print one JSON line instead of a table") -> flags.FlagHolder[bool]:
    """Defines `--json`."""
    return flags.DEFINE_bool("json", False, about)


def define_exports() -> flags.FlagHolder[list[str] | None]:
    """Defines `--export` of a command that takes several."""
    about = "export folder; may be given several times, or with commas between"
    return flags.DEFINE_multi_string("export", None, about)


def exports(given: flags.FlagHolder[list[str] | None]) -> list[str]:
    """The folders of `define_exports`; `UserError` if there is none."""
    found = [path for own in given.value or () for path in own.split(",") if path]
    if not found:
        raise UserError("--export is missing; give an export folder")
    return found


def refuse_beside(flag: flags.FlagHolder, *others: flags.FlagHolder):
    """`UserError` if one of the others is given beside a flag that makes it useless."""
    for other in others if flag.present else ():
        if other.present:
            raise UserError(f"--{other.name} has no effect beside --{flag.name}; leave one out")


def define_kernels() -> flags.FlagHolder[str]:
    """Defines `--kernels`."""
    kinds, about = ["auto", "native", "xla"], "native needs a CPU and a C compiler"
    return flags.DEFINE_enum("kernels", "auto", kinds, about)


def define_beam() -> tuple[flags.FlagHolder[int | None], flags.FlagHolder[float]]:
    """Defines `--beam_size` and `--length_penalty` of a command that translates."""
    size = "one of the export's (default: 5, or its largest where it has no 5)"
    penalty = "power of the length that scores are divided by"
    beam = flags.DEFINE_integer("beam_size", None, size)
    return beam, flags.DEFINE_float("length_penalty", 0.6, penalty)


def with_shipped(argv: list[str]) -> list[str]:
    """The arguments with the names of shipped configs and architectures as paths."""
    found = list(argv)
    for flag, resolve in (("--config", shipped.config), ("--subnet", shipped.subnet)):
        for i, argument in enumerate(found):
            name, is_set, value = argument.partition("=")
            if name != flag:
                continue
            if is_set:
                found[i] = f"{flag}={resolve(value)}"
            elif i + 1 < len(found):
                found[i + 1] = resolve(found[i + 1])
    return found


def parse(argv: list[str], command: ModuleType):
    """Parses the flags of a command; others go to its `ARGUMENTS`, without it to a `UserError`."""
    config: ConfigFlag | None = getattr(command, "CONFIG", None)
    try:
        if config:
            config.refuse_yaml(argv)
        rest = flags.FLAGS(argv)[1:]
    except Exception as e:  # a config file can raise anything
        line = config.explain(argv, e) if config else None
        if line is None and not isinstance(e, flags.Error):
            raise
        text = str(e).removeprefix("FATAL Flags parsing error:").strip()
        raise UserError(line or f"{text} (--help lists the options)") from None
    if hasattr(command, "ARGUMENTS"):
        command.ARGUMENTS[:] = rest
    elif rest:
        raise UserError(f"unexpected argument {rest[0]!r}; options start with --")


def help_text(command: ModuleType) -> str:
    """What a command does, its flags, and the fields of its `--config`."""
    config: ConfigFlag | None = getattr(command, "CONFIG", None)
    options = flags.FLAGS.module_help(command).replace("\n\n", "\n")
    about = (command.__doc__ or "").strip()
    if not sys.argv[0].endswith(".py"):
        about = _installed(about)
    parts = [about, "Options:" + options.split(":", 1)[1]]
    return "\n\n".join([*parts, config.help_text()] if config else parts)


def _installed(about: str) -> str:
    """A command's examples, written for a clone, as the installed `automoe` takes them."""
    about = re.sub(r"(?:python )?launch/(\w+)\.py", r"automoe \1", about)
    about = re.sub(r"(--config[= ])configs/(\w+)\.py", r"\1\2", about)
    return re.sub(r"(--subnet[= ])configs/subnets/(\w+)\.json", r"\1\2", about)
