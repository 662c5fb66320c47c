"""Exports a subnet as a folder that translates on its own.

python launch/export.py --config FILE --workdir DIR                        # the trained subnet
python launch/export.py --config FILE --workdir DIR --subnet best_1.json   # inherited weights
python launch/export.py --config FILE --subnet x.json --random_weights --out x
python launch/export.py --config FILE --workdir DIR --quantize=int8 --shortlist=30   # faster
"""

import dataclasses

from absl import flags

from automoe_jax.cli import options
from automoe_jax.cli.run_flags import RunFlags
from automoe_jax.data.tokenizers import loading as tokenizers
from automoe_jax.decoding.config import QUANTIZATIONS
from automoe_jax.phases import export
from automoe_jax.phases.prepare import vocab_sizes
from automoe_jax.phases.run import EXPORT
from automoe_jax.phases.weights import origin, subnet_params, supernet_params, trained_folder
from automoe_jax.published import subnet_files
from automoe_jax.system import workdir
from automoe_jax.system.errors import UserError

CONFIG = RunFlags()
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
    options.refuse_beside(_SUBNET, _TRAINED)
    config = CONFIG.load()
    given = {x.name: x.value for x in (_QUANTIZE, _SHORTLIST) if x.value is not None}
    config = dataclasses.replace(config, export=dataclasses.replace(config.export, **given))
    subnet = None
    if _SUBNET.value:
        subnet = subnet_files.load(_SUBNET.value, config.space.qkv_dim)
        config.space.validate(subnet)
    if _RANDOM.value:
        if subnet is None or not _OUT.value:
            raise UserError("--random_weights needs --subnet and --out")
        if config.export.shortlist:
            raise UserError(
                f"--shortlist is {config.export.shortlist}, which is counted in a run's training "
                "text; with --random_weights give --shortlist=0"
            )
        out = workdir.resolve(_OUT.value)
        export.export_random(config, subnet, out, tokenizers.vocab_sizes(config.tokenizer))
        print(f"exported with random weights: {out}")
        return

    CONFIG.require(" (--random_weights needs none)")
    run = CONFIG.open_run(config)
    if subnet is None:
        name = _TRAINED.value or trained_folder(run)
        params, subnet, step = subnet_params(run, name)
        source = origin(
            run.path / name, "trained subnet", step, config.subnet_training.final_weights
        )
    else:
        supernet, step = supernet_params(run, vocab_sizes(run))
        source = origin(run.supernet, "supernet", step, config.training.final_weights)
        params = export.SupernetExporter(run, supernet, source).params(subnet)
    out = workdir.resolve(_OUT.value) if _OUT.value else run.path / EXPORT
    export.export_params(run, params, subnet, out, source)
    print(f"exported ({source}): {out}")
    if not config.export.exact and run.tokens.is_dir():
        difference = export.measure_approximation(run, params, subnet, out)
        print(f"BLEU on validation text, this export minus the exact one: {difference:+.2f}")
    elif not config.export.exact:
        print("the run has no corpus: what not being exact costs in BLEU was not measured")
