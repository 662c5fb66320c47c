"""Translates text with an export: lines in, lines out, in order.

echo "The meeting is on Monday, 3 March 2025." | python launch/translate.py --export=DIR
python launch/translate.py --export=DIR --input=a.txt --output=a.de

Translates the lines that a pipe holds without waiting for more. No line stops it: an empty line
gives an empty line, U+FFFD replaces zero bytes and bytes that are not UTF-8, and lines are cut
after 1,024 tokens; a note at the end counts lines with bad bytes and lines that were cut.
"""

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from automoe_jax.cli import options, terminal
from automoe_jax.decoding.batching import BATCH_TOKENS, MAX_SOURCE
from automoe_jax.decoding.translator import Translator
from automoe_jax.system import malloc
from automoe_jax.system.errors import UserError

_EXPORT = flags.DEFINE_string("export", None, "export folder")
_INPUT = flags.DEFINE_string("input", None, "text file, one sentence a line (default: stdin)")
_OUTPUT = flags.DEFINE_string("output", None, "file to write (default: stdout)")
_BEAM, _PENALTY = options.define_beam()
_HYPOTHESES = flags.DEFINE_integer(
    "num_hypotheses", 1, "translations of each line, best first, each on a line of its own; empty "
    "lines where there are fewer"
)  # fmt: skip
_MAX_LENGTH = flags.DEFINE_integer("max_length", 200, "most tokens of a translation")
_BATCH = flags.DEFINE_integer(
    "batch_tokens", BATCH_TOKENS, "source tokens translated together on a core", lower_bound=1
)
_PLATFORM = flags.DEFINE_enum("platform", "cpu", ["cpu", "gpu"], "what to run on")
_KERNELS = options.define_kernels()
_SCORES = flags.DEFINE_bool("scores", False, "write the score and a tab before each translation")

# Lines translated together: sorted by length, written in the order of the input.
CHUNK = 2048
READ_BYTES = 1 << 16
GZIP = b"\x1f\x8b"  # the first bytes of such a file


def main():
    if not _EXPORT.value:
        raise UserError("--export is missing; give an export folder")
    for stream, flag in ((sys.stdin, _INPUT), (sys.stdout, _OUTPUT)):
        if stream is None and flag.value is None:
            raise UserError(f"the standard stream is closed; give a file, as --{flag.name}=FILE")
    malloc.return_large_blocks()
    progress = terminal.TerminalProgress()
    with contextlib.ExitStack() as stack:
        source = _Source(stack)

        def compiling(what: str):
            progress.note(f"compiling for {what}; kept for the next time")

        kind = _PLATFORM.value, _KERNELS.value
        translator = Translator.load(_EXPORT.value, *kind, compiling, malloc.trim)
        if translator.why_xla:
            progress.note(f"slower than it could be, on XLA's operations: {translator.why_xla}")
        # Refuses a wrong option before anything is read or written.
        beam = _BEAM.value, _PENALTY.value, _HYPOTHESES.value
        settings = translator.check(*beam, _MAX_LENGTH.value)
        out = _output(stack, source.file)
        lines = source.lines()
        task = progress.task("translating", lines) if lines > CHUNK else None
        done = mended = cut = 0
        for chunk in source.chunks():
            texts = [line.decode(errors="replace").replace("\0", "\ufffd") for line in chunk]
            mended += sum(
                "\ufffd" in text and b"\xef\xbf\xbd" not in line
                for text, line in zip(texts, chunk, strict=True)
            )

            def show(n: int, total: int, before: int = done):
                if task:
                    task.update(before + n)

            found = translator.translate(texts, *settings, batch_tokens=_BATCH.value, progress=show)
            for translation in found:
                cut += translation.cut
                # The same number of output lines for every input line.
                best = [(x.score, x.text) for x in translation.hypotheses]
                best += [(float("-inf"), "")] * (_HYPOTHESES.value - len(best))
                for score, text in best:
                    print(f"{score:.4f}\t{text}" if _SCORES.value else text, file=out)
            out.flush()
            done += len(chunk)
        if task:
            task.close()
    if mended:
        note = f"{mended} line(s) not UTF-8 text; the bad bytes were replaced"
        progress.note(f"{source.name}: {note}")
    if cut:
        progress.note(f"{source.name}: {cut} line(s) longer than {MAX_SOURCE} tokens were cut")


class _Source:
    """A file or standard input, line by line."""

    def __init__(self, stack: contextlib.ExitStack):
        self.name = _INPUT.value or "standard input"
        path = _INPUT.value
        try:
            self.file: io.RawIOBase = stack.enter_context(
                open(path or sys.stdin.fileno(), "rb", 0, closefd=path is not None)  # noqa: SIM115
            )
        except OSError as e:
            raise UserError(f"--input {self.name} cannot be read: {e.strerror}") from None
        a_file = path is not None and Path(path).is_file()
        if a_file and os.pread(self.file.fileno(), len(GZIP), 0) == GZIP:
            raise UserError(f"--input {path} is compressed; give its text, as from: zcat {path}")

    def lines(self) -> int:
        """Number of lines of a file; 0 if it cannot be known beforehand."""
        if _INPUT.value is None or not Path(_INPUT.value).is_file():
            return 0
        with open(_INPUT.value, "rb") as f:
            return sum(block.count(b"\n") for block in iter(lambda: f.read(1 << 20), b""))

    def chunks(self) -> Iterator[list[bytes]]:
        """Lines as they arrive, up to `CHUNK` at a time, without waiting for a full chunk."""
        begun: list[bytes] = []  # pieces of a line whose end has not arrived
        lines: list[bytes] = []
        while True:
            if lines and not self._waiting():
                yield lines
                lines = []
            block = self.file.read(READ_BYTES)
            if block is None:  # a non-blocking pipe is empty
                select.select([self.file], [], [])
                continue
            if not block:
                break
            *whole, rest = block.split(b"\n")
            if whole:
                whole[0] = b"".join([*begun, whole[0]])
                begun = []
            begun.append(rest)
            lines += whole
            while len(lines) >= CHUNK:
                yield lines[:CHUNK]
                lines = lines[CHUNK:]
        if any(begun):
            lines.append(b"".join(begun))
        if lines:
            yield lines

    def _waiting(self) -> bool:
        """True if reading would not block (always, for a file)."""
        try:
            return bool(select.select([self.file], [], [], 0)[0])
        except (OSError, ValueError):  # a system that can select sockets only
            return True


def _output(stack: contextlib.ExitStack, source: io.RawIOBase):
    if _OUTPUT.value is None:
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        return sys.stdout
    path = Path(_OUTPUT.value)
    if path.is_file() and os.path.samestat(path.stat(), os.fstat(source.fileno())):
        raise UserError(f"--output {path} is the input; name another file")
    try:
        return stack.enter_context(path.open("w", encoding="utf-8"))
    except OSError as e:
        raise UserError(f"--output {path} cannot be written: {e.strerror}") from None
