"""A BPE vocabulary learned from two sentences, in the files of fairseq."""

import collections
import contextlib
import io
import subprocess
import sys

from sacremoses import MosesTokenizer
from subword_nmt.learn_bpe import learn_bpe

ENGLISH = ['A well-known man doesn\'t say "yes" & goes.', "The lower towers: 3.5 % wider!"]


GERMAN = ["Ein bekannter Mann sagt nicht „ja“.", "Die Türme z.B. sind breiter."]


def bpe_files(folder, lowercase=False, dashes=False):
    """(codes, English dict.txt, German dict.txt), learned from the sentences as theirs were."""
    tokens = {}
    for language, sentences in (("en", ENGLISH), ("de", GERMAN)):
        moses = MosesTokenizer(language)
        lines = [
            moses.tokenize(s, aggressive_dash_splits=dashes, return_str=True) for s in sentences
        ]
        tokens[language] = [line.lower() if lowercase else line for line in lines]
    codes = folder / "codes"
    text = "\n".join(line for lines in tokens.values() for line in lines * 3) + "\n"
    with codes.open("w", encoding="utf-8") as f, contextlib.redirect_stderr(io.StringIO()):
        learn_bpe(io.StringIO(text), f, 400 if dashes else 40)
    dictionaries = []
    for language, lines in tokens.items():
        plain = folder / f"tok.{language}"
        plain.write_text("\n".join(lines) + "\n", encoding="utf-8")
        # The program itself, not the class that the tokenizer uses.
        command = [sys.executable, "-m", "subword_nmt.apply_bpe", "-c", str(codes)]
        with plain.open("rb") as f:
            done = subprocess.run(command, stdin=f, capture_output=True, check=True)
        pieces = done.stdout.decode().split()
        counts = collections.Counter(pieces).most_common()
        path = folder / f"dict.{language}.txt"
        path.write_text("".join(f"{piece} {n}\n" for piece, n in counts), encoding="utf-8")
        (folder / f"bpe.{language}").write_bytes(done.stdout)
        dictionaries.append(path)
    return codes, *dictionaries
