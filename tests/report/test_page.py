"""The page of a run, as a browser shows it."""

import numpy as np
import pytest
from pages import assert_fits

from automoe_jax.architecture.space import SearchSpace
from automoe_jax.architecture.subnet import to_json
from automoe_jax.report import page, plots
from automoe_jax.search.sensitivity import Worth

SPACE = SearchSpace(encoder_experts=(1, 6), decoder_experts=(1, 6))
LONG = "2" * 150


def results(gain=True):
    subnet = to_json(SPACE.largest())
    row = {
        "params": 2e6, "active_params": 1e6, "flops": 7e7, "subnet": subnet,
        "latency": {"mean_ms": 20.0, "std_ms": 1.0}, "latency_ratio": [0.6, 0.59, 0.61],
        "bleu_inherited": 60.0, "bleu_trained": None,
        "parts_ms": {"encoder": [2.0, 1.9, 2.1], "beam search": [-0.1, -0.3, 0.1]},
    }  # fmt: skip
    rows = [{**row, "name": n} for n in ("largest", "random within the limit", "searched")]
    rows[-1] |= {"bleu_trained": 71.6, "latency": {"mean_ms": 9.5, "std_ms": 0.1}}
    examples = [{"source": "a <b>", "translation": f"den 28. {LONG}", "reference": "x " * 40}]
    return {
        "rows": rows, "examples": examples * 3, "seconds": {"supernet": 100.0, "search": 60.0},
        "test": {"bleu": 71.6, "chrf": 80.0, "sentences": 200, "bleu_signature": "nrefs:1|" * 9},
        "latency": {"source_length": 30, "target_length": 30, "beam_size": 5, "runs": 100,
                    "threads_used": 2, "platform": "cpu"},
        "searched_loss": 0.5, "random": {"count": 20, "median_loss": 0.6, "best_loss": 0.55},
        "gain_over_random": {"bleu": 1.25, "low": -0.5, "high": 3.0} if gain else None,
        "repeating": 3, "most_repeats": 4, "routing": [],
        "computation": {"encoder": {
            "least": 1e6, "most": 3e6, "all": {"mean": 2e6, "std": 5e5},
            "classes": {"beginning": {"mean": 1.5e6, "std": 0.0}},
            "sentences": [{"pieces": [" a", " <b>", ""], "flops": [1e6, 2e6, 3e6]}],
        }},
    }  # fmt: skip


def search():
    """The result of a search and its lines."""
    rng = np.random.default_rng(0)
    subnets = [to_json(SPACE.sample(rng)) for _ in range(12)]
    lines = [
        {"costs": {"latency_ms": 5.0 + i}, "loss": 1.0 - 0.02 * i, "iteration": 0, "subnet": s}
        for i, s in enumerate(subnets)
    ]
    corner = {"costs": {"latency_ms": 30.0}, "sample_loss": 0.4}
    return {
        "limits": {"latency_ms": {"most": 14.0}}, "over": ["latency_ms"], "scored": 12,
        "objective": {"label": "validation loss"}, "random": {"first": subnets[3]},
        "best": [{"costs": {"latency_ms": 12.0}, "sample_loss": 0.8}] * 3,
        "corners": {"largest": corner, "smallest": {**corner, "costs": {"latency_ms": 4.0}}},
    }, lines  # fmt: skip


def test_the_gain_over_the_random_subnet_is_told():
    assert page.gain_text(results()).startswith(
        "+1.2 BLEU against the random subnet after the same training, 95 % interval -0.5 to +3.0"
    )
    assert page.gain_text(results(gain=False)) == ""
    within, beyond = ({**results(), "limit_ratio": limit} for limit in (0.6, 0.55))
    assert "slower than the limit" not in page.gain_text(within)
    assert page.gain_text(beyond).endswith("0.60 of the largest's latency for 0.55")
    header, *rows = page.table_rows(results())
    assert header[-1] == "BLEU trained"
    assert [row[-1] for row in rows] == ["", "", "71.6"]


def test_the_picture_names_the_compared_subnets():
    found, lines = search()
    marked = page._marked(found, lines, "latency_ms")
    assert marked == {
        "searched, 1": (12.0, 0.8), "searched, 2": (12.0, 0.8), "largest": (30.0, 0.4),
        "smallest": (4.0, 0.4), "random within the limit": (8.0, 0.94),
    }  # fmt: skip
    del found["corners"]  # of an earlier version
    assert "largest" not in page._marked(found, lines, "latency_ms")


WORTHS = (
    Worth("encoder depth", 2, 6, -0.1, -0.12, -0.08, 0.7, 2.0, 0.6),
    Worth("decoder experts", 1, 6, 0.001, -0.01, 0.012, 0.01, 0.0, 0.0),
)


def test_the_page_needs_no_other_file(tmp_path):
    found, lines = search()
    page.write(tmp_path, results(), lines, found, WORTHS)
    shown = (tmp_path / "index.html").read_text()
    assert shown.count('src="data:image/png') == shown.count("src=") == 3
    for name in (page.SEARCHED, page.PARTS, page.WORTHS):
        for path in plots.with_svg(tmp_path / name):
            assert path.stat().st_size > 1000
    assert "More of these bought nothing: decoder experts." in shown
    assert "<td>0.05</td>" in shown  # nats gained for a unit of cost
    for words in ("2.000 ± 0.500", "&lt;b&gt;", "50% / 34%", 'title="3.000 MFLOPs"', "·</span>"):
        assert words in shown
    # A card for each of the compared architectures.
    assert shown.count("<figure>") == 3
    page.write(tmp_path, {**results(), "computation": {}}, lines, found)
    shown = (tmp_path / "index.html").read_text()
    assert "Too few subnets were scored to tell" in shown
    assert "What is computed" not in shown


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1400, "light")])
def test_nothing_is_outside_the_window(tmp_path, browser, width, scheme):
    """But for tables, which scroll by themselves; the examples wrap. The comparison sorts."""
    found, lines = search()
    page.write(tmp_path, results(), lines, found, WORTHS)
    shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said = []
    shown.on("console", lambda message: said.append(message.text))
    shown.goto(f"file://{tmp_path}/index.html")
    assert_fits(shown, width)
    cells = "[...document.querySelectorAll('.text td')]"
    assert shown.evaluate(f"{cells}.every(x => x.scrollWidth <= x.clientWidth + 1)")
    right = f"Math.max(...{cells}.map(x => x.getBoundingClientRect().right))"
    assert shown.evaluate(right) <= width
    back = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}[scheme]

    def column(nth):
        return shown.locator(f".sortable tbody td:nth-child({nth})").all_inner_texts()

    latency = shown.locator(".sortable th:nth-child(5)")
    for order, ms in (("descending", ["20.00", "20.00", "9.50"]), ("ascending", ["9.50", "20.00"])):
        latency.locator("button").click()
        assert latency.get_attribute("aria-sort") == order
        # By their numbers: as text, 20.00 ± 1.00 is before 9.50 ± 0.10.
        assert [text.split()[0] for text in column(5)][: len(ms)] == ms
    assert column(1)[0] == shown.locator(".chosen td:first-child").inner_text() == "searched"
    assert said == []
    shown.close()
