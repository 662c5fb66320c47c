"""The page on which one types a sentence: its answers, its mistakes, and how a browser shows it."""

import concurrent.futures
import contextlib
import importlib.util
import json
import threading
import time

import numpy as np
import pytest
from programs import mistake

from automoe_jax.decoding.translator import Translator
from automoe_jax.demo import app as web
from automoe_jax.demo.models import DemoModel
from automoe_jax.model.extract import inherited
from automoe_jax.phases.export import export_params, export_random
from automoe_jax.phases.prepare import open_splits
from automoe_jax.phases.routing import analyse
from automoe_jax.system.errors import UserError


@pytest.fixture(scope="module")
def models(prepared, tmp_path_factory):
    """A mixture and a dense model, with random weights."""
    run, _, _, params = prepared
    found = []
    for name in ("largest", "smallest"):
        subnet = getattr(run.config.space, name)()
        folder = tmp_path_factory.mktemp("demo") / name
        export_params(run, inherited(params, subnet, run.config.space), subnet, folder, "a test")
        found.append(DemoModel(name, Translator.load(folder)))
    return found


@pytest.fixture(scope="module")
def client(models):
    return web.make_app(models).test_client()


def test_translations_are_the_translators(client, models):
    given = {"text": "The meeting is on Monday.\n\nToday is Friday.", "num_hypotheses": 2}
    answer = client.post("/translate", json=given)
    assert answer.status_code == 200
    for found, model in zip(answer.get_json(), models, strict=True):
        assert found["name"] == model.name
        lines = found["lines"]
        assert [line["source"] for line in lines] == given["text"].split("\n\n")
        translator = Translator.load(model._translator.folder)
        for line in lines:
            (expected,) = translator.translate([line["source"]], num_hypotheses=2)
            texts = [h.text for h in expected.hypotheses]
            assert [h["text"] for h in line["hypotheses"]] == texts
            assert line["hypotheses"][0]["score"] == pytest.approx(expected.score)
            assert line["ms"] > 0


def test_each_token_has_its_expert(client, models, prepared, tmp_path):
    """As the routing of the same model says, which is measured on the same text."""
    run, data, _, params = prepared
    text = "The meeting is on Monday."
    mixture, dense = client.post("/translate", json={"text": text}).get_json()
    assert "layers" not in dense["lines"][0]
    (line,) = mixture["lines"]
    source = data.tokenizer.encode([text])[0]
    assert len(line["tokens"]["encoder"]) == len(source)
    assert "".join(line["tokens"]["encoder"]).strip() == text
    translated = line["hypotheses"][0]["text"].split()
    assert "".join(line["tokens"]["decoder"]).split() == translated
    subnet = run.config.space.largest()
    sizes = [list(layer.experts) for _, stack in subnet.stacks for layer in stack.layers]
    assert [layer["sizes"] for layer in line["layers"]] == sizes
    for layer in line["layers"]:
        assert len(layer["experts"]) == len(line["tokens"][layer["side"]])
        assert set(layer["experts"]) <= set(range(len(layer["sizes"])))
    # The shares of the first encoder layer on the validation text, sentence by sentence.
    weights = inherited(params, subnet, run.config.space)
    found = analyse(run, data, weights, subnet, "a test", tmp_path / "routing", pairs=5)
    texts = [s.decode() for s, _ in open_splits(run)["valid"].read(range(5))]
    lines = client.post("/translate", json={"text": "\n".join(texts)}).get_json()[0]["lines"]
    experts = [e for own in lines for e in own["layers"][0]["experts"]]
    load = np.bincount(experts, minlength=len(sizes[0])) / len(experts)
    np.testing.assert_allclose(load, found["layers"][0]["load"], atol=1e-6)


def test_the_models_are_described(client):
    mixture, dense = client.get("/models").get_json()
    assert mixture["experts"]
    assert not dense["experts"]
    assert mixture["beam_sizes"] == [2]
    assert mixture["languages"] == "en to de"


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        (b"not json", 400, "JSON object"),
        (b"[1]", 400, "JSON object"),
        ({"text": 3}, 400, "JSON object"),
        ({"text": "a", "beam_size": 3}, 400, "beam size 3 is not in export"),
        ({"text": "a", "beam_size": "2"}, 400, "beam_size is '2'"),
        ({"text": "a", "beam_size": True}, 400, "beam_size is True"),
        ({"text": "a", "num_hypotheses": 0}, 400, "num_hypotheses is 0"),
        ({"text": "a" * 4001}, 400, "4,001 characters"),
        ({"text": "a\n" * 21}, 400, "21 lines"),
        (b'{"text": "' + b"x" * 100_000, 413, "at most 4,000"),
    ],
)
def test_bad_requests_are_one_line(client, given, status, words):
    body = given if isinstance(given, bytes) else json.dumps(given).encode()
    answer = client.post("/translate", data=body, content_type="application/json")
    assert answer.status_code == status
    assert words in answer.get_json()["error"]


def test_other_addresses_are_answered(client):
    assert client.get("/nothing").status_code == 404
    assert client.get("/translate").status_code == 405
    page = client.get("/")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


@pytest.mark.parametrize("text", ["", " \n \n", "\0", "\ud800", "é😀\u202e" * 50, "word " * 700])
def test_odd_text_is_translated(client, text):
    """Also what is long: it has no picture of experts."""
    answer = client.post("/translate", json={"text": text})
    assert answer.status_code == 200
    for model in answer.get_json():
        assert len(model["lines"]) == bool(text.strip())
    if len(text) > 1000:
        assert answer.get_json()[0]["lines"][0]["long"]


def test_a_failure_is_told(models, monkeypatch):
    def fail(*_):
        raise RuntimeError("nobody knows")

    client = web.make_app(models[1:]).test_client()
    monkeypatch.setattr(DemoModel, "translate", fail)
    answer = client.post("/translate", json={"text": "a"})
    assert answer.status_code == 500
    assert "terminal" in answer.get_json()["error"]


def test_pages_from_elsewhere_are_refused(models):
    """They cannot send JSON without asking, and their names do not lead here."""
    client = web.make_app(models[1:]).test_client()
    plain = client.post("/translate", data=b'{"text": "a"}', content_type="text/plain")
    assert plain.status_code == 400
    elsewhere = client.get("/models", headers={"Host": "elsewhere.example:8123"})
    assert elsewhere.status_code == 400
    assert "does not answer to the name elsewhere.example" in elsewhere.get_json()["error"]
    for name in ("127.0.0.1:8123", "localhost", "[::1]:80"):
        assert client.get("/models", headers={"Host": name}).status_code == 200
    to_all = web.make_app(models[1:], hosts=()).test_client()
    assert to_all.get("/models", headers={"Host": "anything"}).status_code == 200


def test_many_requests_at_once(models, monkeypatch):
    """As many as may wait are answered; more are told to come again."""
    monkeypatch.setattr(web, "MAX_WAITING", 4)
    begin, go_on = threading.Semaphore(0), threading.Event()

    def slow(self, texts, beam, n):
        begin.release()
        go_on.wait(30)
        return {"name": self.name, "lines": texts}

    monkeypatch.setattr(DemoModel, "translate", slow)
    app = web.make_app(models[1:])

    def ask(text):
        return app.test_client().post("/translate", json={"text": text})

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(ask, f"text {i}") for i in range(4)]
        for _ in waiting:
            assert begin.acquire(timeout=30)
        refused = [ask("one more") for _ in range(4)]
        go_on.set()
        answered = [own.result() for own in waiting]
    assert [own.status_code for own in refused] == [503] * 4
    assert "try again" in refused[0].get_json()["error"]
    assert [own.get_json()[0]["lines"] for own in answered] == [[f"text {i}"] for i in range(4)]
    assert ask("later").status_code == 200


def test_translations_of_several_models_do_not_overlap(models, monkeypatch):
    """Else they would disturb each other's milliseconds."""
    running, most = [0], [0]

    def one(self, text, beam, n):
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.05)
        running[0] -= 1
        return {}

    monkeypatch.setattr(DemoModel, "_one", one)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda model: model.translate(["a"], None, 1), models * 2))
    assert most == [1]


def test_compilation_is_no_latency(models, monkeypatch):
    """A sentence of another length is translated again where that compiled a program."""
    calls = []
    own = models[1]._translator
    translate = type(own).translate

    def counted(self, texts, *rest, **named):
        calls.append(texts)
        return translate(self, texts, *rest, **named)

    monkeypatch.setattr(type(own), "translate", counted)
    text = "one two three four five six seven eight nine ten " * 6
    models[1].translate([text], None, 1)
    assert len(calls) == 2
    models[1].translate([text], None, 1)
    assert len(calls) == 3


def test_an_export_without_tokenizer_is_refused(prepared, tmp_path):
    run = prepared[0]
    export_random(run.config, run.config.space.smallest(), tmp_path / "random", (60, 60))
    with pytest.raises(UserError, match="has no tokenizer"):
        DemoModel("random", Translator.load(tmp_path / "random"))


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"flask and waitress.*pip install flask"):
        web.check_installed()


@contextlib.contextmanager
def served(app):
    """The address of an application that is served for real."""
    server = web.listen(app, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield web.address(server)
    finally:
        server.close()
        thread.join(10)


def test_a_taken_port_is_one_line(models):
    app = web.make_app(models[1:])
    with served(app) as address, pytest.raises(UserError, match="give another --port"):
        web.listen(app, "127.0.0.1", int(address.rstrip("/").rpartition(":")[2]))
    with pytest.raises(UserError, match="cannot be listened on"):
        web.listen(app, "no such host", 0)


def test_a_name_of_several_addresses(models):
    server = web.listen(web.make_app(models[1:]), "localhost", 0)
    assert web.address(server).startswith(("http://127.0.0.1:", "http://[::1]:"))
    server.close()


def test_mistakes_of_the_command(tmp_path):
    assert "--export is missing" in mistake("demo")
    assert "manifest" in mistake("demo", f"--export={tmp_path}")


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(models, browser, width, scheme):
    with served(web.make_app(models)) as address:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#beam option", state="attached")
        page.fill("#text", "The meeting is on Monday.\n" + "word" * 100)
        page.select_option("#n", "3")
        page.wait_for_selector("section >> nth=1 >> .line >> nth=1", timeout=60_000)
        assert page.locator("section").count() == 2
        assert page.locator("section >> nth=0 >> .tokens span").count() > 10
        assert page.locator("section >> nth=1 >> .tokens").count() == 0
        assert page.locator("section >> nth=0 >> ol li").count() == 4  # a beam of 2, twice
        wide = page.evaluate(
            "[...document.querySelectorAll('*')].filter("
            "x => x.getBoundingClientRect().right > innerWidth + 1).length"
        )
        assert wide == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.fill("#text", "x" * 4001)
        page.wait_for_selector("#status.wrong")
        assert "4,001 characters" in page.inner_text("#status")
        # The browser itself names the answer of 400; nothing else is said.
        assert [text for text in said if "400" not in text] == []
        page.close()
