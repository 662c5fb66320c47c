"""The models that the CPU benchmarks time, and the engines that time them.

`python benchmarks/translators.py ENGINE CPUS` is the child process of an engine: requests on stdin,
answers on stdout, one JSON line each. Engines: `ours`, `ctranslate2`, `pytorch`. Libraries are
imported in functions, so that the memory of an engine is not that of another's libraries.
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from child import Child, serve

EOS, PAD = 2, 1
VOCAB = 32_768
TOKENS = 30  # in and out, eos included
BEAM = 5
# OpenMP's threads spin for 0.2 s after their work.
REST_S = 0.25


class Engine(Child):
    """An engine in a child process that runs on the given CPUs."""

    def __init__(self, name: str, cpus: Sequence[int]):
        environment = {
            **os.environ,
            "NPROC": str(len(cpus)),
            "OMP_NUM_THREADS": str(len(cpus)),
            "JAX_PLATFORMS": "cpu",
        }
        command = [sys.executable, __file__, name, ",".join(map(str, cpus))]
        super().__init__(command, environment)

    def ask(self, **request: Any) -> Any:
        """As `Child.ask`, after a pause in which the engine asked before comes to rest."""
        time.sleep(REST_S)
        return super().ask(**request)


# --- models ------------------------------------------------------------------------------------


def random_export(
    subnet_file: Path,
    folder: Path,
    quantize: str = "none",
    words: int = VOCAB,
    share_embeddings: str = "all",
):
    """Exports an architecture, a file as those of `configs/subnets`, with random weights."""
    import jax  # noqa: PLC0415

    from automoe_jax.decoding.config import ExportConfig  # noqa: PLC0415
    from automoe_jax.decoding.export import export, random_params  # noqa: PLC0415
    from automoe_jax.decoding.xla_engine import ModelSpec  # noqa: PLC0415
    from automoe_jax.model.transformer import Transformer  # noqa: PLC0415
    from automoe_jax.published import subnet_files  # noqa: PLC0415

    arch = subnet_files.load(subnet_file, 512)
    dims = arch.encoder.embed_dim, arch.decoder.embed_dim
    model = Transformer(arch, (words, words), *dims, share_embeddings=share_embeddings)
    ids = np.full((1, 2), EOS, np.int32)
    abstract = jax.eval_shape(lambda key: model.init(key, ids, ids), jax.random.key(0))["params"]
    config = ExportConfig((BEAM,), quantize=quantize)
    export(random_params(abstract, 0), ModelSpec(arch, *dims), config, folder, "random")


def dense_weights(export_folder: Path) -> tuple[Any, dict[str, np.ndarray], int]:
    """Architecture, dense fp32 weights and number of words of an export."""
    from automoe_jax.architecture import subnet  # noqa: PLC0415
    from automoe_jax.decoding import weight_file  # noqa: PLC0415
    from automoe_jax.decoding.manifest import read_manifest  # noqa: PLC0415
    from automoe_jax.decoding.weights import unpack  # noqa: PLC0415

    manifest = read_manifest(export_folder)
    words = manifest["vocab_sizes"][1]
    weights = unpack(weight_file.load(export_folder / "weights.safetensors"), words)
    return subnet.from_json(manifest["subnet"]), weights, words


def write_ctranslate2(export_folder: Path, folder: Path):
    """Writes an export of a dense model as a CTranslate2 model; its words are token ids as text."""
    import ctranslate2  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    import jax.numpy as jnp  # noqa: PLC0415

    from automoe_jax.decoding.xla_engine import sinusoid  # noqa: PLC0415

    arch, weights, words = dense_weights(export_folder)
    layers = len(arch.encoder.layers), len(arch.decoder.layers)
    spec = ctranslate2.specs.TransformerSpec.from_config(
        layers, arch.encoder.layers[0].heads, pre_norm=False
    )

    def linear(target, *names: str):
        kernels = [weights[f"{n}.kernel"].T for n in names]
        target.weight = np.ascontiguousarray(np.concatenate(kernels))
        target.bias = np.concatenate([weights[f"{n}.bias"] for n in names])

    def norm(target, name: str):
        target.gamma, target.beta = weights[f"{name}.scale"], weights[f"{name}.bias"]

    def ffn(target, prefix: str):
        linear(target.linear_0, f"{prefix}.expert_0.fc1")
        linear(target.linear_1, f"{prefix}.expert_0.fc2")
        norm(target.layer_norm, f"{prefix}.experts_norm")

    def self_attention(target, prefix: str):
        linear(target.linear[0], f"{prefix}.qkv")
        linear(target.linear[1], f"{prefix}.self_out")
        norm(target.layer_norm, f"{prefix}.self_attention_norm")

    table = weights["embedding"]
    embeddings = spec.encoder.embeddings
    (embeddings[0] if isinstance(embeddings, list) else embeddings).weight = table
    spec.decoder.embeddings.weight = table
    spec.decoder.projection.weight = table
    positions = np.asarray(sinusoid(jnp.arange(1100) + 2, table.shape[1], table.shape[1]))
    spec.encoder.position_encodings.encodings = positions
    spec.decoder.position_encodings.encodings = positions
    for i, target in enumerate(spec.encoder.layer):
        self_attention(target.self_attention, f"encoder.{i}")
        ffn(target.ffn, f"encoder.{i}")
    for i, target in enumerate(spec.decoder.layer):
        self_attention(target.self_attention, f"decoder.{i}")
        linear(target.attention.linear[0], f"decoder.{i}.cross_q")
        linear(target.attention.linear[1], f"decoder.{i}.cross_kv")
        linear(target.attention.linear[2], f"decoder.{i}.cross_out")
        norm(target.attention.layer_norm, f"decoder.{i}.cross_attention_norm")
        ffn(target.ffn, f"decoder.{i}")
    names = [str(i) for i in range(words)]
    names[0], names[PAD], names[EOS], names[3] = "<s>", "<blank>", "</s>", "<unk>"
    spec.register_source_vocabulary(names)
    spec.register_target_vocabulary(names)
    spec.config.decoder_start_token = "</s>"
    spec.validate()
    spec.optimize()
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))


def protocol_source() -> list[int]:
    """Token ids of the latency protocol's sentence: random words and eos."""
    ids = np.random.default_rng(0).integers(4, VOCAB, TOKENS)
    return [*map(int, ids[:-1]), EOS]


# --- engines in their processes ----------------------------------------------------------------


class Ours:
    """This project."""

    def __init__(self, threads: int):
        del threads  # set by CPU affinity
        self._loaded: dict[str, Any] = {}

    def _load(self, path: str):
        from automoe_jax.decoding.translator import Translator  # noqa: PLC0415

        if path not in self._loaded:
            self._loaded[path] = Translator.load(path, kernels="native")
        return self._loaded[path]

    def latency(self, path: str, compute: str, source: list[int]) -> float:
        """Milliseconds of the protocol's sentence."""
        del compute  # set by the export
        import jax  # noqa: PLC0415

        programs = self._load(path).programs
        ids = np.array([source], np.int32)
        start = time.perf_counter()
        jax.block_until_ready(programs.run(ids, BEAM, TOKENS, TOKENS - 1, TOKENS - 1, 0.6))
        return (time.perf_counter() - start) * 1000

    def throughput(self, path: str, compute: str, sources: list[list[int]], batch: int):
        """Seconds, and the translations."""
        del compute
        translator = self._load(path)
        start = time.perf_counter()
        found = translator.translate_ids(sources, BEAM, batch_tokens=batch)
        seconds = time.perf_counter() - start
        return seconds, [list(t.hypotheses[0].ids) for t in found]


class CTranslate2:
    """CTranslate2; `compute` is its compute type."""

    def __init__(self, threads: int):
        self._threads = threads
        self._loaded: dict[tuple[str, str, int], Any] = {}

    def _load(self, path: str, compute: str, parallel: int):
        import ctranslate2  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

        key = (path, compute, parallel)
        if key not in self._loaded:
            self._loaded[key] = ctranslate2.Translator(
                path,
                device="cpu",
                compute_type=compute,
                inter_threads=parallel,
                intra_threads=self._threads // parallel,
            )
        return self._loaded[key]

    @staticmethod
    def _words(sources: list[list[int]]) -> list[list[str]]:
        return [[*map(str, s[:-1]), "</s>"] for s in sources]

    def latency(self, path: str, compute: str, source: list[int]) -> float:
        """As `Ours.latency`."""
        translator = self._load(path, compute, 1)
        words = self._words([source])
        length = {"max_decoding_length": TOKENS - 1, "min_decoding_length": TOKENS - 1}
        start = time.perf_counter()
        translator.translate_batch(words, beam_size=BEAM, length_penalty=0.6, **length)
        return (time.perf_counter() - start) * 1000

    def throughput(self, path: str, compute: str, sources: list[list[int]], batch: int):
        """As `Ours.throughput`; CTranslate2's threads share the batches."""
        translator = self._load(path, compute, self._threads)
        words = self._words(sources)
        start = time.perf_counter()
        found = translator.translate_batch(
            words,
            beam_size=BEAM,
            length_penalty=0.6,
            max_decoding_length=200,
            max_batch_size=batch,
            batch_type="tokens",
        )
        seconds = time.perf_counter() - start
        return seconds, [[_number(w) for w in f.hypotheses[0]] for f in found]


def _number(word: str) -> int:
    special = {"<s>": 0, "<blank>": PAD, "</s>": EOS, "<unk>": 3}
    return special[word] if word in special else int(word)


class PyTorch:
    """A plain eager decoder of dense models, with a cache of keys and values."""

    def __init__(self, threads: int):
        import torch  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch = torch
        self._loaded: dict[str, Any] = {}

    def _load(self, path: str):
        if path not in self._loaded:
            arch, weights, _ = dense_weights(Path(path))
            copies = {}
            for name, w in weights.items():
                w = w.T if name.endswith(".kernel") else w  # noqa: PLW2901
                copies[name] = self._torch.from_numpy(np.array(w, order="C"))
            self._loaded[path] = (arch, copies)
        return self._loaded[path]

    def latency(self, path: str, compute: str, source: list[int]) -> float:
        """As `Ours.latency`."""
        del compute
        arch, weights = self._load(path)
        start = time.perf_counter()
        self._translate(arch, weights, source)
        return (time.perf_counter() - start) * 1000

    def _translate(self, arch, w, source: list[int]):
        torch, f = self._torch, self._torch.nn.functional
        d, heads = arch.decoder.embed_dim, arch.decoder.layers[0].self_heads
        rate = math.log(10_000) / (d // 2 - 1)
        angle = torch.arange(2.0, 2.0 + TOKENS)[:, None] * torch.exp(-rate * torch.arange(d // 2))
        positions = torch.cat([angle.sin(), angle.cos()], 1)

        def linear(name, x):
            return f.linear(x, w[f"{name}.kernel"], w[f"{name}.bias"])

        def norm(name, x):
            return f.layer_norm(x, (d,), w[f"{name}.scale"], w[f"{name}.bias"], 1e-5)

        def split(x):
            return x.view(*x.shape[:-1], heads, d // heads).transpose(-3, -2)

        def attend(q, k, v):
            y = f.scaled_dot_product_attention(q, k, v).transpose(-3, -2)
            return y.reshape(*y.shape[:-2], d)

        def ffn(p, x):
            h = linear(f"{p}.expert_0.fc2", f.relu(linear(f"{p}.expert_0.fc1", x)))
            return norm(f"{p}.experts_norm", x + h)

        x = w["embedding"][torch.tensor(source)] * math.sqrt(d) + positions[: len(source)]
        for i in range(len(arch.encoder.layers)):
            p = f"encoder.{i}"
            q, k, v = (split(part) for part in linear(f"{p}.qkv", x).chunk(3, -1))
            x = norm(f"{p}.self_attention_norm", x + linear(f"{p}.self_out", attend(q, k, v)))
            x = ffn(p, x)
        layers = range(len(arch.decoder.layers))
        memory = [
            [split(part) for part in linear(f"decoder.{i}.cross_kv", x).chunk(2, -1)]
            for i in layers
        ]
        keys = [torch.empty(BEAM, heads, 0, d // heads) for _ in layers]
        values = list(keys)
        last = torch.full((BEAM,), EOS)
        scores = torch.tensor([0.0] + [-1e30] * (BEAM - 1))
        for step in range(TOKENS):
            x = w["embedding"][last] * math.sqrt(d) + positions[step]
            for i in layers:
                p = f"decoder.{i}"
                q, k, v = (split(part[:, None]) for part in linear(f"{p}.qkv", x).chunk(3, -1))
                keys[i] = torch.cat([keys[i], k], 2)
                values[i] = torch.cat([values[i], v], 2)
                y = attend(q, keys[i], values[i])[:, 0]
                x = norm(f"{p}.self_attention_norm", x + linear(f"{p}.self_out", y))
                q = split(linear(f"{p}.cross_q", x))
                y = attend(q, *memory[i])
                x = norm(f"{p}.cross_attention_norm", x + linear(f"{p}.cross_out", y))
                x = ffn(p, x)
            logits = f.linear(x, w["embedding"])
            logits[:, [PAD, EOS]] = -1e30
            total = scores[:, None] + logits.log_softmax(-1)
            scores, best = total.view(-1).topk(BEAM)
            row, last = best // logits.shape[1], best % logits.shape[1]
            keys = [k[row] for k in keys]
            values = [v[row] for v in values]
        return scores


def peak_bytes() -> int:
    """Peak resident memory of this process, mapped files included.

    `getrusage` would start from the parent's peak.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main():
    """Serves until stdin ends."""
    cpus = {int(c) for c in sys.argv[2].split(",")}
    os.sched_setaffinity(0, cpus)
    engine = {"ours": Ours, "ctranslate2": CTranslate2, "pytorch": PyTorch}[sys.argv[1]](len(cpus))

    def answer(request: dict[str, Any]) -> Any:
        call = request.pop("call")
        function = peak_bytes if call == "peak" else getattr(engine, call)
        if call == "latency":  # an untimed run first wakes sleeping threads
            function(**request)
        return function(**request)

    serve(answer)


if __name__ == "__main__":
    main()
