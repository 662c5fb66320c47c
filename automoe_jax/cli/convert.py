"""Reads a fairseq checkpoint of HAT or AutoMoE into a run, to search, export, time and train on.

python launch/convert.py --checkpoint=super.pt --config=CONFIG --dict=dict.txt --bpe_codes=code --workdir=DIR
python launch/convert.py --checkpoint=sub.pt --config=CONFIG --subnet=sub.yml --tokenizer=ids --workdir=DIR
python launch/convert.py --write=super.npz --config=CONFIG --workdir=DIR     # and back

CONFIG's space must be the supernet of the checkpoint: configs/supertransformer.py:FILE takes it from
its YAML. Then launch/export.py, launch/search.py and launch/train.py with the same --config and --workdir.
"""  # noqa: E501

from pathlib import Path

from absl import flags

from automoe_jax.cli.run_flags import RunFlags
from automoe_jax.phases import convert
from automoe_jax.published import subnet_files
from automoe_jax.system.errors import UserError

CONFIG = RunFlags()
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "state dict: .npz, .safetensors, or .pt where PyTorch is installed"
)
_SUBNET = flags.DEFINE_string(
    "subnet", None, "architecture (JSON or YAML) that was trained inside the checkpoint's "
    "supernet; without it, the checkpoint is a supernet"
)  # fmt: skip
_DICT = flags.DEFINE_list(
    "dict", [], "fairseq's dict.txt; two with a comma where source and target have their own"
)
_CODES = flags.DEFINE_string("bpe_codes", None, "merges that subword-nmt learned")
_LOWERCASE = flags.DEFINE_bool("lowercase", False, "the model's text is lower case (IWSLT)")
_TOKENIZER = flags.DEFINE_enum(
    "tokenizer", None, ["bpe", "ids"], "bpe: text, with --dict and --bpe_codes; ids: token ids "
    "separated by blanks, where there is no dictionary"
)  # fmt: skip
_WRITE = flags.DEFINE_string(
    "write", None, "write the run's supernet as a state dict to this .npz or .safetensors"
)


def main():
    config = CONFIG.load()
    if bool(_CHECKPOINT.value) == bool(_WRITE.value):
        both = ", not both" if _WRITE.value else ""
        raise UserError(f"give --checkpoint to read one, or --write to write one{both}")
    run = CONFIG.run(config)
    if _WRITE.value:
        for flag in (_SUBNET, _DICT, _CODES, _LOWERCASE, _TOKENIZER):
            if flag.value:
                raise UserError(f"--{flag.name} is for --checkpoint; --write takes none")
        convert.write_checkpoint(run, Path(_WRITE.value))
        print(f"state dict written: {_WRITE.value}")
        return
    subnet = subnet_files.load(_SUBNET.value, config.space.qkv_dim) if _SUBNET.value else None
    given = _TOKENIZER.value, tuple(_DICT.value), _CODES.value
    tokenizer = convert.tokenizer_config(config.tokenizer, *given, lowercase=_LOWERCASE.value)
    if tokenizer is None and not run.tokenizer.is_dir():
        raise UserError(
            "give --dict and --bpe_codes, or --tokenizer=ids to run the model on token ids"
        )
    folder = convert.convert(run, Path(_CHECKPOINT.value or ""), tokenizer, subnet)
    print(f"{'supernet' if subnet is None else 'subnet'} converted: {folder}")
