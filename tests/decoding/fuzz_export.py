"""Changes an export at random, loads it and translates; a child process of test_safe_loading.

python fuzz_export.py EXPORT WORK KERNELS FIRST COUNT

Prints a JSON line: how many changed exports were refused, how many translated, and each that did
neither: its seed, what was changed, and the error. A crash or a hang is for the parent to see.
"""

import json
import random
import shutil
import sys
from pathlib import Path

from automoe_jax.decoding.translator import Translator
from automoe_jax.system.errors import UserError

# Values that checks like to forget.
ODD = (
    None, True, -1, 0, 1, 2, 3, 7, 64, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, "", "x", "../x",
    "/etc/passwd", "\0", [], [0], [2**40, 2], [[]], {}, {"x": 1},
)  # fmt: skip


def paths(value, at=()):
    """Every place in a JSON value."""
    yield at
    items = enumerate(value) if isinstance(value, list) else ()
    items = value.items() if isinstance(value, dict) else items
    for key, inner in items:
        yield from paths(inner, (*at, key))


def change_json(rng: random.Random, value) -> str:
    """Changes one place in a JSON object."""
    places = [p for p in paths(value) if p and p[0] not in ("versions", "host", "when")]
    *way, last = rng.choice(places)
    for key in way:
        value = value[key]
    how = rng.random()
    if how < 0.15:
        del value[last]
        return f"deleted {last}"
    if how < 0.4 and isinstance(value[last], int):
        value[last] += rng.choice((-1, 1, 8, 32, 1 << 20))
    else:
        value[last] = rng.choice(ODD)
    return f"{'/'.join(map(str, [*way, last]))} = {value[last]!r}"


def change_bytes(rng: random.Random, path: Path, most: int | None = None) -> str:
    """Changes some bytes of a file, among the first `most`."""
    data = bytearray(path.read_bytes())
    how = rng.random()
    end = min(most or len(data), len(data))
    if how < 0.15:
        data = data[: rng.randrange(end)]
    elif how < 0.3:
        at = rng.randrange(end)
        data[at:at] = rng.randbytes(rng.randrange(1, 64))
    else:
        for _ in range(rng.choice((1, 1, 4, 64))):
            data[rng.randrange(end)] = rng.randrange(256)
    path.unlink()
    path.write_bytes(data)
    return f"{path.name}, {len(data)} bytes"


def change_header(rng: random.Random, path: Path) -> str:
    """Changes a shape, type or place in the header of the weights."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    what = change_json(rng, header)
    text = json.dumps(header).encode()
    path.unlink()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return f"header: {what}"


def change(rng: random.Random, folder: Path) -> str:
    how = rng.randrange(10)
    if how < 4:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        what = change_json(rng, manifest)
        path.write_text(json.dumps(manifest))
        return what
    if how < 6:
        return change_header(rng, folder / "weights.safetensors")
    if how == 6:
        return change_bytes(rng, folder / "weights.safetensors", 512)
    if how == 7:
        return change_bytes(rng, folder / "weights.safetensors")
    return change_bytes(rng, rng.choice(sorted((folder / "tokenizer").iterdir())))


def main():
    export, work, kernels, first, count = sys.argv[1:]
    refused, translated, wrong = 0, 0, []
    for seed in range(int(first), int(first) + int(count)):
        folder = Path(work) / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(export, folder)
        rng = random.Random(seed)
        what = change(rng, folder)
        print(seed, what, file=sys.stderr, flush=True)  # the last one, if this is the last line
        try:
            translator = Translator.load(folder, kernels=kernels)
            translator.translate(["today is monday.", "", "a b c"], max_length=5)
            translated += 1
        except UserError as e:
            refused += 1
            if "\n" in str(e):
                wrong.append([seed, what, str(e)])
        except Exception as e:
            wrong.append([seed, what, f"{type(e).__name__}: {e}"[:300]])
    print(json.dumps({"refused": refused, "translated": translated, "wrong": wrong}))


if __name__ == "__main__":
    main()
