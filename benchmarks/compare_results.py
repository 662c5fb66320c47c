"""Parts of before_after.py that compare what both commits compute, exactly."""

import json
import shutil
from functools import partial
from typing import Any

from commits import Checkout, Comparison, Outcome, difference_goals, overrides
from differences import checkpoint, compare, metrics, read_translations

# One batch shape: several join a run one after the other since 89d9b52. One width of each side:
# since c60627d small supernets run narrower ones in the program of the widest, with other dropout.
TRAINING = {
    "training.buckets": 1, "space.encoder_embed_dims": "(128,)",
    "space.decoder_embed_dims": "(128,)",
    "training.steps": 40, "training.warmup_steps": 10, "training.checkpoint_every": 40,
    "training.log_every": 1, "training.batches_per_step": 2, "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
}  # fmt: skip
# Long enough for translations that differ from sentence to sentence.
TRANSLATED_STEPS, SENTENCES = 600, 200
SUBNET = {
    "version": 1, "qkv_dim": 128,
    "encoder": {"embed_dim": 128, "layers": [
        {"heads": 4, "experts": [384, 256]}, {"heads": 2, "experts": [128]}]},
    "decoder": {"embed_dim": 96, "layers": [
        {"self_heads": 4, "cross_heads": 4, "cross_span": 2, "experts": [256, 384, 256]},
        {"self_heads": 2, "cross_heads": 4, "cross_span": 1, "experts": [384]}]},
}  # fmt: skip
WRITE_SENTENCES = """
import sys
from automoe_jax.data.phrases import pairs
with open(sys.argv[1], "w", encoding="utf-8") as f:
    f.writelines(source + "\\n" for source, _ in pairs("test", int(sys.argv[2])))
"""
TRANSLATE = """
import json, sys
from automoe_jax import Translator
export, sentences, output = sys.argv[1:]
found = []
with open(sentences, encoding="utf-8") as f:
    lines = f.read().splitlines()
for kernels in ("auto", "xla"):
    translator = Translator.load(export, kernels=kernels)
    for translation in translator.translate(lines, beam_size=5, num_hypotheses=5):
        found.append([[h.text, float(h.score)] for h in translation.hypotheses])
with open(output, "w", encoding="utf-8") as f:
    json.dump(found, f)
"""


def training(comparison: Comparison) -> Outcome:
    """Metrics and last checkpoint of a short training; what only the later one logs is left out."""
    flags = [comparison.config, *overrides(TRAINING)]

    def run(checkout: Checkout) -> float:
        shutil.rmtree(checkout.work / "training", ignore_errors=True)
        return checkout.launch("train", *flags, f"--workdir={checkout.work / 'training'}")

    seconds = comparison.each("training", run)
    folders = [c.work / "training" / "supernet" for c in comparison.pair.values()]
    before, after = map(metrics, folders)
    figures = {
        "training metrics": compare(before, {k: v for k, v in after.items() if k in before}),
        "training checkpoint": compare(*map(checkpoint, folders)),
    }
    return {**figures, "training seconds, compiling included": seconds}, difference_goals(figures)


def translations(comparison: Comparison) -> Outcome:
    """Translations by exports that both commits make of one checkpoint, trained before."""
    work = comparison.workdir / "translations"
    sentences, subnet = work / "sentences.txt", work / "subnet.json"
    before, after = comparison.pair.values()
    flags = [comparison.config, *overrides({"training.steps": TRANSLATED_STEPS})]

    def train() -> float:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        subnet.write_text(json.dumps(SUBNET), encoding="utf-8")
        before.python("-c", WRITE_SENTENCES, sentences, str(SENTENCES))
        seconds = before.launch("train", *flags, f"--workdir={work / 'before'}")
        shutil.copytree(work / "before", work / "after")
        return seconds

    def export(quantize: str, checkout: Checkout) -> float:
        workdir, out = work / checkout.name, work / f"export_{checkout.name}_{quantize}"
        shutil.rmtree(out, ignore_errors=True)
        return checkout.launch(
            "export", *flags, f"--workdir={workdir}", f"--subnet={subnet}", f"--out={out}",
            f"--quantize={quantize}",
        )  # fmt: skip

    def translated(checkout: Checkout, made_by: Checkout, quantize: str) -> dict[str, Any]:
        export = work / f"export_{made_by.name}_{quantize}"
        output = work / f"{checkout.name}_by_{export.name}.json"
        part = f"translations: {output.stem}"
        comparison.record.once(
            part, lambda: checkout.python("-c", TRANSLATE, export, sentences, output)
        )
        return read_translations(output)

    comparison.record.once("translations: train", train)
    figures = {}
    for kind, quantize in (("fp32", "none"), ("int8", "int8")):
        comparison.each(f"translations: export {kind}", partial(export, quantize))
        expected = translated(before, before, quantize)
        shared = compare(expected, translated(after, before, quantize))
        own = compare(expected, translated(after, after, quantize))
        figures[f"translations of the export made before, {kind}"] = shared
        figures[f"translations of each commit's own export, {kind}"] = own
    return figures, difference_goals(figures)
