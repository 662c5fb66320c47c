"""Shared by all tests: four simulated devices, the shared test data, small spaces and models."""

import os

from quick_compilation import FLAGS

# Before JAX starts.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        FLAGS,
        "--xla_force_host_platform_device_count=4",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

import gc
import importlib
import runpy
import shutil
import signal
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest

from automoe_jax.architecture.active import to_active
from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import Subnet
from automoe_jax.model import stacked
from automoe_jax.model.scales import scales_of
from automoe_jax.model.stand_alone import StandAlone, stand_alone
from automoe_jax.model.supernet import Supernet
from automoe_jax.system import compile_cache

# A shell that runs the tests in the background ignores Ctrl-C, which programs would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tracing makes many objects that live on; collecting among them took a sixth of the tests' time.
gc.set_threshold(200_000, 50, 50)
hypothesis.settings.register_profile("here", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("here")

ROOT = Path(__file__).parent.parent
VOCAB = 64
# These begin, so that no worker waits long for the last file of another.
LONGEST = {
    "test_training.py", "test_model.py", "test_search_phase.py", "test_decoding.py",
    "test_pipeline.py", "test_published_model.py", "test_export.py", "test_safe_loading.py",
    "test_final_weights.py", "test_pods.py", "test_grouped_ffn.py", "test_teachers.py",
    "test_survival.py", "test_watching.py", "test_cli.py", "test_convert.py",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Puts the files that take longest first."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def compile_cache_of_this_run(tmp_path_factory):
    """One compilation cache for all tests, workers and child processes of a test run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    compile_cache.enable(folder / "compiled")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared test data; the test is skipped where it is absent."""
    folder = Path(os.environ.get("AUTOMOE_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"shared test data is not at {folder}; set AUTOMOE_SHARED")
    return folder


def shipped_config(name: str):
    """The settings of a file in configs/."""
    return config_file(ROOT / "configs" / f"{name}.py")


def config_file(path: Path):
    """The settings of a config file."""
    from automoe_jax.config import resolve  # noqa: PLC0415

    return resolve(runpy.run_path(str(path))["get_config"]())


def elastic_space(**changes) -> SearchSpace:
    """A tiny space with every dimension elastic."""
    fields = {
        "qkv_dim": 16,
        "encoder_embed_dims": (8, 16),
        "decoder_embed_dims": (8, 16),
        "encoder_depths": (1, 2, 3),
        "decoder_depths": (1, 2, 3),
        "encoder_heads": (2, 4),
        "decoder_self_heads": (2, 4),
        "decoder_cross_heads": (1, 2, 4),
        "cross_spans": (1, 2, 3),
        "encoder_experts": (1, 2, 3),
        "decoder_experts": (1, 2, 3),
        "encoder_ffn_dims": (8, 16, 20),
        "decoder_ffn_dims": (8, 24),
        "identity_experts": True,
        "encoder_top_k": (1, 2),
        "decoder_top_k": (1, 2),
    }
    return SearchSpace(**{**fields, **changes})


@pytest.fixture(scope="session")
def space() -> SearchSpace:
    return elastic_space()


def supernet_of(space: SearchSpace, dropout: float = 0.0, *, masked: bool = False) -> Supernet:
    return Supernet(
        space, (VOCAB, VOCAB), dropout=dropout, attention_dropout=dropout, masked=masked
    )


def logits_of(module, params, *inputs):
    """A model's logits by one program; op by op, each would be compiled alone."""
    return jax.jit(module.apply)({"params": params}, *inputs).logits_BTV


def layers_of(params, space: SearchSpace):
    """A supernet's params with the layers of each stack apart: {"encoder": {"layer_0": ...}}."""
    hull = space.hull()
    return {
        **params,
        **{
            side: stacked.per_layer(
                params[side], [layer.experts for layer in getattr(hull, side).layers]
            )
            for side in ("encoder", "decoder")
        },
    }


def standalone_of(space: SearchSpace, subnet: Subnet) -> StandAlone:
    hull = space.hull()
    return stand_alone(
        subnet,
        (VOCAB, VOCAB),
        (hull.encoder.embed_dim, hull.decoder.embed_dim),
        share_embeddings=space.share_embeddings,
        scales=scales_of(space),
    )


def evolved_space() -> SearchSpace:
    """Cells of different widths in encoder and decoder, with 2 and 3 layers."""
    return SearchSpace(
        qkv_dim=16, encoder_embed_dims=(12,), decoder_embed_dims=(8,), encoder_depths=(2,),
        decoder_depths=(3,), encoder_heads=(2,), decoder_self_heads=(2,), decoder_cross_heads=(4,),
        cross_spans=(1,), encoder_experts=(1,), decoder_experts=(1,), encoder_ffn_dims=(20,),
        decoder_ffn_dims=(24,), cell="evolved",
    )  # fmt: skip


def random_evolved(seed: int = 0, scale: float = 0.3, space: SearchSpace | None = None):
    """As `random_params`, of the one architecture of `space` (default: `evolved_space`'s)."""
    space, ids = space or evolved_space(), np.full((1, 2), 4, np.int32)
    module = standalone_of(space, space.largest())
    abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), ids, ids))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(scale=scale, size=x.shape).astype("f4"), abstract)


def random_params(space: SearchSpace, seed: int = 0, scale: float = 0.3):
    """Weights without any special values: biases, scales and pad rows random too."""
    hull = space.hull()
    ids = np.full((1, 2), 4, np.int32)
    abstract = jax.eval_shape(
        lambda: supernet_of(space).init(jax.random.key(0), ids, ids, to_active(hull, hull))
    )["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.normal(scale=scale, size=x.shape).astype(np.float32), abstract
    )


def token_batch(rng: np.random.Generator, rows: int = 3, source: int = 9, target: int = 7):
    """(source ids, target ids), padded; some sources padded on the left."""
    src = rng.integers(4, VOCAB, (rows, source)).astype(np.int32)
    tgt = rng.integers(4, VOCAB, (rows, target)).astype(np.int32)
    src[0, source - 3 :] = 1
    src[1, :2] = 1
    tgt[-1, target - 2 :] = 1
    return src, tgt


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(Run, data, supernet, random weights) of `tiny_config`, with a corpus."""
    from tiny import tiny_config  # noqa: PLC0415

    from automoe_jax.phases.prepare import prepare  # noqa: PLC0415
    from automoe_jax.phases.run import Run  # noqa: PLC0415
    from automoe_jax.phases.weights import target  # noqa: PLC0415
    from automoe_jax.system.progress import Silent  # noqa: PLC0415
    from automoe_jax.training.target import initial_state  # noqa: PLC0415

    config = tiny_config()
    run = Run(config, tmp_path_factory.mktemp("run"), Silent())
    data = prepare(run)
    supernet = target(config, data.tokenizer.vocab_sizes)
    state = initial_state(supernet, config.training, config.seed)
    return run, data, supernet, jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, through Playwright; tests skip where one is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark by its name, as when it is started."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def compilations():
    """A function that returns how often XLA has compiled since the test began."""
    count = [0]

    def listen(event: str, duration: float, **kwargs):
        count[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: count[0]
    jax.monitoring.unregister_event_duration_listener(listen)
