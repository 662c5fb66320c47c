"""Translates text with an export: lines in, lines out, in order.

echo "The meeting is on Monday, 3 March 2025." | python launch/translate.py --export=DIR
python launch/translate.py --export=DIR --input=a.txt --output=a.de
"""

import contextlib
import sys
from pathlib import Path

import common
from absl import flags

from automoe_jax.errors import UserError

_EXPORT = flags.DEFINE_string("export", None, "export folder")
_INPUT = flags.DEFINE_string("input", None, "text file, one sentence a line (default: stdin)")
_OUTPUT = flags.DEFINE_string("output", None, "file to write (default: stdout)")
_BEAM = flags.DEFINE_integer(
    "beam_size", None, "one of the export's (default: 5, or its largest where it has no 5)"
)
_PENALTY = flags.DEFINE_float(
    "length_penalty", 0.6, "power of the length that scores are divided by"
)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 200, "most tokens of a translation")
_PLATFORM = flags.DEFINE_enum("platform", "cpu", ["cpu", "gpu"], "what to run on")
_SCORES = flags.DEFINE_bool("scores", False, "write the score and a tab before each translation")

# Lines translated together: sorted by length within, written in order.
CHUNK = 2048


def main():
    if not _EXPORT.value:
        raise UserError("--export is missing; give an export folder")
    from automoe_jax.decoding.translator import MAX_SOURCE, Translator  # noqa: PLC0415

    progress = common.TerminalProgress()
    with contextlib.ExitStack() as stack:
        source, lines = _lines()
        translator = Translator.load(_EXPORT.value, _PLATFORM.value)
        # A wrong beam size is told before anything is written.
        beam = translator.beam_size(_BEAM.value)
        out = _output(stack)
        task = progress.task("translating", len(lines)) if len(lines) > CHUNK else None
        mended = cut = 0
        for at in range(0, len(lines), CHUNK):
            texts = []
            for line in lines[at : at + CHUNK]:
                text = line.decode("utf-8", errors="replace")
                mended += "\ufffd" in text and b"\xef\xbf\xbd" not in line
                texts.append(text)
            found = translator.translate(texts, beam, _PENALTY.value, max_length=_MAX_LENGTH.value)
            for translation in found:
                cut += translation.cut
                score = f"{translation.score:.4f}\t" if _SCORES.value else ""
                print(score + translation.text, file=out)
            if task:
                task.update(min(at + CHUNK, len(lines)))
        out.flush()
        if task:
            task.close()
    if mended:
        progress.note(f"{source}: {mended} line(s) not UTF-8; the bad bytes were replaced")
    if cut:
        progress.note(f"{source}: {cut} line(s) longer than {MAX_SOURCE} tokens were cut")


def _lines() -> tuple[str, list[bytes]]:
    """Name and lines of the source; refuses what is not text."""
    if _INPUT.value is None:
        name, data = "standard input", sys.stdin.buffer.read()
    else:
        name = _INPUT.value
        try:
            data = Path(name).read_bytes()
        except OSError as e:
            raise UserError(f"--input {name} cannot be read: {e.strerror}") from None
    if b"\0" in data:
        at = data[: data.index(b"\0")].count(b"\n") + 1
        raise UserError(f"{name} is not text: line {at} has a zero byte; give UTF-8 text")
    lines = data.split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    return name, [line.rstrip(b"\r") for line in lines]


def _output(stack):
    if _OUTPUT.value is None:
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        return sys.stdout
    path = Path(_OUTPUT.value)
    try:
        return stack.enter_context(path.open("w", encoding="utf-8"))
    except OSError as e:
        raise UserError(f"--output {path} cannot be written: {e.strerror}") from None


if __name__ == "__main__":
    common.run(main)
