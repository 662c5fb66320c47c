"""The translator's kernels for CPUs: C, compiled for this machine at first use, called by XLA.

XLA's own products reach two thirds of the memory's bandwidth for the few rows of a beam, and a
third in int8; these reach nearly all of it. Where there is no C compiler, the translator runs the
same model on XLA's products instead (`decoding.model`).
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

from automoe_jax.system.compile_cache import machine

SOURCE = Path(__file__).with_name("kernels.c")
HEADERS = ("pool.h", "memory.h", "vectors.h", "products.h", "calls.h")
# Goes up when a kernel takes other operands: exported programs name them in order.
CALLS = 2
FLAGS = (
    "-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", "-fvisibility=hidden", "-shared", "-fPIC",
)  # fmt: skip
TARGETS = (
    "automoe_embed",
    "automoe_linear",
    "automoe_linear_add_norm",
    "automoe_encoder_attention",
    "automoe_cross_attention",
    "automoe_self_attention",
    "automoe_experts_add_norm",
    "automoe_top_words",
    "automoe_top_listed",
)
# Columns of a panel of a matrix; PANEL in kernels.c.
PANEL = 32
SECONDS = 120.0


class Unavailable(Exception):
    """There are no kernels; the text says why in one line."""


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The kernels, compiled where needed, loaded and registered; or why that failed."""
    try:
        library = ctypes.CDLL(str(build(cache_folder())))
        for name in TARGETS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(library[name]), platform="cpu")
    except (Unavailable, OSError, RuntimeError, ValueError) as e:
        return None, " ".join(str(e).split())
    return library, ""


def available() -> bool:
    """Whether the kernels can be used here."""
    return _library()[0] is not None


def reason() -> str:
    """Why they cannot, in one line; "" where they can."""
    return _library()[1]


def n_threads() -> int:
    """What the kernels share their work among: CPUs that this process may use.

    Its affinity, the quota of its container and `$NPROC` each limit them.
    """
    library, _ = _library()
    return 1 if library is None else library.automoe_threads()


@contextlib.contextmanager
def one_thread_a_call():
    """Within, a call of a kernel does not share its work: for several batches at a time."""
    library, why = _library()
    if library is None:
        raise Unavailable(why)
    library.automoe_alone(1)
    try:
        yield
    finally:
        library.automoe_alone(-1)


def cache_folder() -> Path:
    """Where compiled kernels are kept: `$XDG_CACHE_HOME/automoe_jax`, or under the home folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "automoe_jax"


def build(folder: Path, flags: tuple[str, ...] = FLAGS) -> Path:
    """The compiled library, made in `folder` where it is not there yet.

    Its name changes with the source, the flags, the compiler's name and the machine.

    Raises:
      Unavailable: there is no C compiler, or it failed.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or [
        next(filter(shutil.which, ("cc", "gcc", "clang")), "")
    ]
    if not compiler[0] or not shutil.which(compiler[0]):
        raise Unavailable("no C compiler was found (cc, gcc, clang, or what $CC names)")
    sources = [SOURCE, *map(SOURCE.with_name, HEADERS)]
    about = [*(path.read_text(encoding="utf-8") for path in sources), *flags, *compiler, machine()]
    name = f"kernels-{hashlib.sha256(chr(0).join(about).encode()).hexdigest()[:16]}.so"
    if (folder / name).exists():
        return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(suffix=".so", dir=folder)
    except OSError:  # a home that cannot be written
        folder = _temporary_folder()
        if (folder / name).exists():
            return folder / name
        handle, made = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    include = ["-I", jax.ffi.include_dir()]
    command = [*compiler, *flags, *include, "-o", made, str(SOURCE), "-lm", "-pthread"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        failed = next(iter(done.stderr.strip().splitlines()), "") if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as e:
        failed = str(e)
    if failed is not None:
        os.unlink(made)
        raise Unavailable(f"{compiler[0]} could not compile {SOURCE.name}: {failed}")
    os.replace(made, folder / name)  # two processes may build at the same time
    return folder / name


def _temporary_folder() -> Path:
    """A folder of this user's alone: what is loaded from it is run."""
    folder = Path(tempfile.gettempdir()) / f"automoe_jax-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise Unavailable(f"{folder} belongs to somebody else or can be written by others")
    return folder
