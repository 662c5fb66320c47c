"""The translator's C kernels for CPUs, compiled for this machine at first use and called by XLA.

For the few rows of a beam, XLA's matrix products reach two thirds of the memory bandwidth, and a
third in int8; these kernels reach nearly all of it. Without a C compiler the translator runs on
XLA's products (`decoding.xla_engine`).
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax

from automoe_jax.system import user_cache
from automoe_jax.system.compile_cache import machine

SOURCE = Path(__file__).with_name("kernels.c")
HEADERS = ("pool.h", "memory.h", "vectors.h", "products.h", "calls.h", "experts.h")
# Version of the kernels' operands, whose order exported programs contain.
CALLS = 2
FLAGS = (
    "-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", "-fvisibility=hidden", "-shared", "-fPIC",
)  # fmt: skip
TARGETS = (
    "automoe_embed", "automoe_linear", "automoe_linear_add_norm", "automoe_encoder_attention",
    "automoe_cross_attention", "automoe_self_attention", "automoe_experts_add_norm",
    "automoe_top_words", "automoe_top_listed",
)  # fmt: skip
COMPILE_TIMEOUT_S = 120.0


class Unavailable(Exception):
    """The kernels cannot be used; the text says why in one line."""


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The kernels, compiled, loaded and registered; or None and why that failed."""
    try:
        library = ctypes.CDLL(str(build(user_cache.folder())))
        for name in TARGETS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(library[name]), platform="cpu")
    except (Unavailable, OSError, RuntimeError, ValueError) as e:
        return None, " ".join(str(e).split())
    return library, ""


def available() -> bool:
    """Whether the kernels can be used here."""
    return _library()[0] is not None


def reason() -> str:
    """Why the kernels cannot be used here, in one line; "" where they can."""
    return _library()[1]


def n_threads() -> int:
    """CPUs that the kernels use: limited by affinity, by the container's quota and by `$NPROC`."""
    library, _ = _library()
    return 1 if library is None else library.automoe_threads()


@contextlib.contextmanager
def one_thread_a_call():
    """Within, a kernel runs on its caller's thread alone: for several batches at a time."""
    library, why = _library()
    if library is None:
        raise Unavailable(why)
    library.automoe_alone(1)
    try:
        yield
    finally:
        library.automoe_alone(-1)


def build(folder: Path, flags: tuple[str, ...] = FLAGS) -> Path:
    """Compiles the library into `folder` unless it is there; `Unavailable` where that fails.

    Its name is a hash of the source, the flags, the compiler's name and the machine.
    """
    found = next(filter(shutil.which, ("cc", "gcc", "clang")), "")
    compiler = shlex.split(os.environ.get("CC", "")) or [found]
    if not compiler[0] or not shutil.which(compiler[0]):
        raise Unavailable("no C compiler was found (cc, gcc, clang, or what $CC names)")
    sources = [SOURCE, *map(SOURCE.with_name, HEADERS)]
    about = [*(path.read_text(encoding="utf-8") for path in sources), *flags, *compiler, machine()]
    name = f"kernels-{hashlib.sha256(chr(0).join(about).encode()).hexdigest()[:16]}.so"
    if (folder / name).exists():
        return folder / name
    handle, made = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    include = ["-I", jax.ffi.include_dir()]
    command = [*compiler, *flags, *include, "-o", made, str(SOURCE), "-lm", "-pthread"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
        )
        failed = next(iter(done.stderr.strip().splitlines()), "") if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as e:
        failed = str(e)
    if failed is not None:
        os.unlink(made)
        raise Unavailable(f"{compiler[0]} could not compile {SOURCE.name}: {failed}")
    os.replace(made, folder / name)  # two processes may build at the same time
    return folder / name
