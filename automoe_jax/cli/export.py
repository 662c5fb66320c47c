"""Exports a subnet as a folder that translates on its own.

python launch/export.py --config FILE --workdir DIR                        # the trained subnet
python launch/export.py --config FILE --workdir DIR --subnet best_1.json   # inherited weights
python launch/export.py --config FILE --subnet x.json --random_weights --out x
python launch/export.py --config FILE --workdir DIR --quantize=int8 --shortlist=30   # faster
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from absl import flags

from automoe_jax.cli import options, terminal
from automoe_jax.cli.config_flag import ConfigFlag
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.decoding.config import QUANTIZATIONS
from automoe_jax.model.extract import extract
from automoe_jax.phases import approximation
from automoe_jax.phases import run as phases
from automoe_jax.published import subnet_files
from automoe_jax.system import compile_cache, workdir
from automoe_jax.system.errors import UserError

CONFIG = ConfigFlag()
_WORKDIR = options.define_workdir()
_SUBNET = flags.DEFINE_string(
    "subnet", None, "subnet file to export with the supernet's weights; without it, the run's "
    "trained subnet"
)  # fmt: skip
_TRAINED = flags.DEFINE_string(
    "trained", None, "folder in the workdir of a trained subnet (default: subnet/, or the one in "
    "it that the pipeline chose)"
)  # fmt: skip
_OUT = flags.DEFINE_string("out", None, "folder to write (default: export/ in the workdir)")
_RANDOM = flags.DEFINE_bool(
    "random_weights", False, "export --subnet with random weights and no tokenizer, for timing"
)
_QUANTIZE = flags.DEFINE_enum(
    "quantize", None, QUANTIZATIONS, "matrices in int8, or none (default: what the config says)"
)
_SHORTLIST = flags.DEFINE_integer(
    "shortlist", None, "target words for each source word that the output layer is restricted to, "
    "by a lexicon of the training text; 0 for all words (default: what the config says)"
)  # fmt: skip


def main():
    config = CONFIG.load()
    given = {"quantize": _QUANTIZE.value, "shortlist": _SHORTLIST.value}
    given = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(config, export=dataclasses.replace(config.export, **given))
    subnet = None
    if _SUBNET.value:
        subnet = subnet_files.load(_SUBNET.value, config.space.qkv_dim)
        config.space.validate(subnet)
    if _RANDOM.value:
        if subnet is None or not _OUT.value:
            raise UserError("--random_weights needs --subnet and --out")
        out = workdir.resolve(_OUT.value)
        phases.export_random(config, subnet, out, tokenizers.vocab_sizes(config.tokenizer))
        print(f"exported with random weights: {out}")
        return

    run = workdir.resolve(_WORKDIR.value or CONFIG.default_workdir)
    if not (run / workdir.MANIFEST).exists():
        raise UserError(
            f"--workdir {run} is not a run; train one with launch/train.py, or convert one with "
            "launch/convert.py (--random_weights needs none)"
        )
    run = phases.open_run(config, run)
    compile_cache.enable(run / phases.CACHE)
    if subnet is None:
        folder = _TRAINED.value or phases.trained_folder(run)
        params, subnet, step = phases.subnet_params(config, run, folder)
        origin = phases.origin(run / folder, "trained subnet", step)
    else:
        vocab_sizes = tokenizers.load(run / "tokenizer").vocab_sizes
        params, step = phases.supernet_params(config, run, vocab_sizes)
        params = jax.tree.map(np.asarray, extract(params, subnet, config.space.hull()))
        origin = phases.origin(run / phases.SUPERNET, "supernet", step)
    out = workdir.resolve(_OUT.value) if _OUT.value else Path(run) / phases.EXPORT
    phases.export_params(config, run, params, subnet, out, origin)
    print(f"exported ({origin}): {out}")
    if config.export.exact:
        return
    if not (run / "tokens").is_dir():
        print("the run has no corpus: what not being exact costs in BLEU was not measured")
        return
    progress = terminal.TerminalProgress()
    difference = approximation.measure(config, run, params, subnet, out, progress)
    print(f"BLEU on validation text, this export minus the exact one: {difference:+.2f}")
