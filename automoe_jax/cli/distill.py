"""Writes a corpus of a teacher's translations, to train a smaller model on.

python launch/distill.py --config configs/multi30k.py --teacher=TEACHER/export --out=DISTILLED
python launch/train.py --config configs/multi30k.py --config.data.path=DISTILLED --workdir NEW

Sequence-level distillation: the export translates the training text of the config's corpus; the
original pairs stand beside its translations, unless --nooriginal. --out is a folder of parallel
text with the same validation and test text. A killed run goes on where it was. With --ray parts of
the text are translated on the nodes of a Ray cluster.
"""

from absl import flags

from automoe_jax.cli import options
from automoe_jax.cli.run_flags import RunFlags
from automoe_jax.phases import distill
from automoe_jax.phases.prepare import open_splits
from automoe_jax.system import files, malloc, workdir
from automoe_jax.system.errors import UserError

CONFIG = RunFlags(parts=True, memory_gb=2.0)
_TEACHER = flags.DEFINE_string("teacher", None, "export that translates")
_OUT = flags.DEFINE_string("out", None, "folder for the corpus")
_BEAM, _PENALTY = options.define_beam()
_CHOICE = flags.DEFINE_string(
    "choice",
    "best",
    "which hypothesis becomes a pair: the teacher's best, or of its beam the nearest to the "
    "reference, by sentence BLEU",
)
_N_BEST = flags.DEFINE_integer("n_best", 1, "with --choice=best, hypotheses that become pairs")
_ORIGINAL = flags.DEFINE_bool("original", True, "put the original pairs beside them")
_KERNELS = options.define_kernels()


def main():
    config = CONFIG.load()
    if not _TEACHER.value:
        raise UserError("--teacher is missing; give an export folder")
    if not _OUT.value:
        raise UserError("--out is missing; give a folder for the corpus")
    malloc.return_large_blocks()
    teacher = distill.Teacher(files.expanded(_TEACHER.value).absolute(), _KERNELS.value)
    how = distill.Distillation(
        teacher.load().beam_size(_BEAM.value), _PENALTY.value, _CHOICE.value, _N_BEST.value,
        original=_ORIGINAL.value,
    )  # fmt: skip
    run = CONFIG.open_run(config)
    folder, splits = workdir.resolve(_OUT.value), open_splits(run)
    found = distill.distill(run, splits, teacher, how, folder)
    print(f"{found.pairs:,} training pairs, {found.translated:,} of them translated: {folder}")
