"""Manifests of the folders of a run: only the settings that made a folder may continue it."""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from automoe_jax.system import files
from automoe_jax.system.errors import UserError
from automoe_jax.system.version import __version__

VERSION = 1
MANIFEST = "manifest.json"
CONVERTED = "converted_from"  # key of the published checkpoint that weights came from
_NAMED = 4  # most fields that a message names
_SAME = "use the same config, or another --workdir"
# What to do where a folder of a kind was made with another config.
_ADVICE = {
    "search": "use the same config, or search the same supernet again into another folder of the "
    "run: launch/search.py --out=NAME",
    "ranking": "use the same config, or another --out",
    "halving": "use the same config, or another --out",
    "sensitivity": "use the same config, or remove this folder: scoring takes minutes",
}
# Fields that change a run's output, not its results.
_FREE = {
    "log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "max_skipped",
    "final_weights", "averaged_checkpoints", "shard_optimizer", "remat",
    "expert_parallel",
}  # fmt: skip


def resolve(path: str | Path) -> Path:
    """The absolute path of a workdir; `UserError` if it cannot be made or written to."""
    if not str(path):
        raise UserError("--workdir is empty; name a folder for the run")
    folder = files.expanded(path).absolute()
    part = next(part for part in (folder, *folder.parents) if part.exists())
    if not part.is_dir():
        raise UserError(f"{path}: {part} is a file, not a folder; choose another name")
    if not os.access(part, os.W_OK | os.X_OK):
        raise UserError(f"{path}: {part} cannot be written to")
    return folder


def claim(
    folder: Path,
    kind: str,
    config: dict[str, Any],
    *,
    begun: bool,
    added: Collection[str] = (),
):
    """Starts or continues a folder.

    Writes `manifest.json` (kind, config, versions, host, when) if there is none, or if the folder
    has no results yet; of what may change between two starts, as `final_weights`, it says the
    last. `kind` is that of the content, as "run" or "supernet", `config` holds all
    settings that decide it, and `begun` is True if the folder holds results of its manifest;
    `UserError` names the fields that differ if they are of another config. Those in `added` are
    compared only where the manifest has them: earlier versions did not write them.
    """
    folder = resolve(folder)
    origin = {}
    if (folder / MANIFEST).exists():
        manifest = read(folder, kind)
        made = _settings(manifest, folder)
        if begun:
            config = {k: v for k, v in config.items() if k in made or k not in added}
        new = _as_json(config)
        different = _different(made, config)
        if not different:
            if list(_free(made)) != list(_free(new)):
                files.write_json(folder / MANIFEST, {**manifest, "config": new})
            return
        if begun:
            raise UserError(_refusal(folder, different, _ADVICE.get(kind, _SAME)))
        if CONVERTED in manifest:
            origin = {CONVERTED: manifest[CONVERTED]}
    write(folder, kind, {"config": config, **origin})


def _free(settings: Any) -> Iterator[tuple[str, Any]]:
    """The fields of `_FREE` with their values, of all groups."""
    for key, value in sorted(settings.items()) if isinstance(settings, dict) else ():
        if key in _FREE:
            yield key, value
        else:
            yield from _free(value)


def check(folder: Path, kind: str, config: dict[str, Any], free: Collection[str], advice: str):
    """`UserError` if the folder was made with other settings than `config`.

    Those named in `free` may differ; `advice` says what to do.
    """
    made = settings(folder, kind)
    different = _different({k: v for k, v in made.items() if k not in free}, config)
    if different:
        raise UserError(_refusal(folder, different, advice))


def _different(made: dict[str, Any], config: dict[str, Any]) -> list[str]:
    stored = {k: with_defaults(v, config.get(k)) for k, v in made.items()}
    return list(_differences(stored, _as_json(config), ""))


def _refusal(folder: Path, different: list[str], advice: str) -> str:
    more = len(different) - _NAMED
    told = "; ".join(different[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
    return f"{folder} was made with another config: {told}; {advice}"


def write(folder: Path, kind: str, content: dict[str, Any]):
    """Writes a manifest: `content`, versions, host and time."""
    manifest = {
        "version": VERSION,
        "kind": kind,
        **_as_json(content),
        "versions": {
            "automoe_jax": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        },
        "host": {"name": platform.node(), "machine": platform.machine(), "cpus": os.cpu_count()},
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    files.write_json(folder / MANIFEST, manifest)


def read(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a folder; `UserError` if it is missing or of another kind."""
    path = folder / MANIFEST
    manifest = files.read_json(path, f"{kind} manifest")
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise UserError(f"{path} is not a manifest of version {VERSION}")
    if manifest.get("kind") != kind:
        found = manifest.get("kind")
        there = (folder / kind / MANIFEST).exists()
        advice = f"look at {folder / kind}" if there else "name another folder"
        raise UserError(f"{folder} is of kind {found}, not {kind}; {advice}")
    return manifest


def settings(folder: Path, kind: str) -> dict[str, Any]:
    """The settings in the manifest of a folder, by group; `UserError` as `read`."""
    return _settings(read(folder, kind), folder)


def _settings(manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    config = manifest.get("config")
    if not isinstance(config, dict):
        raise UserError(f"{folder / MANIFEST} is damaged: it has no settings")
    return config


def with_defaults(stored: Any, like: Any) -> Any:
    """A stored group of settings; fields added since get the defaults of the dataclass `like`."""
    if not dataclasses.is_dataclass(like) or not isinstance(stored, dict):
        return stored
    fields = {f.name: f.default for f in dataclasses.fields(like)}
    defaults = {name: x for name, x in fields.items() if x is not dataclasses.MISSING}
    known = {k: with_defaults(v, getattr(like, k, None)) for k, v in stored.items()}
    return {**_as_json(defaults), **known}


def same(stored: Any, like: Any) -> bool:
    """True if a stored group of settings equals a dataclass of this version."""
    return not any(_differences(with_defaults(stored, like), _as_json(like), ""))


def _as_json(value: Any) -> Any:
    """The value as JSON returns it: tuples become lists, dataclasses become objects."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(k): _as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(v) for v in value]
    return value


def _differences(old: Any, new: Any, where: str) -> Iterator[str]:
    """`field is A there and B here` of each field that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted((old.keys() | new.keys()) - _FREE):
            name = f"{where}.{key}" if where else key
            yield from _differences(old.get(key), new.get(key), name)
    elif old != new:
        yield f"{where} is {_short(old)} there and {_short(new)} here"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
