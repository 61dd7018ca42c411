"""Answers by other engines: a server with OpenAI's API gives the answers, files and scores of relook's own engine."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from helpers.command import Command
from helpers.endpoint import Answer, Endpoint, endpoint
from helpers.serving import KEY, Served, serving
from PIL import Image

import relook as package
from relook import load_model
from relook.data.images import open_image
from relook.errors import DataError, RecipeError, RelookError
from relook.evaluate.engines import ServerSource, VllmSource, answer_source, image_url
from relook.evaluate.run import evaluate_model
from relook.files import read_json, read_records
from relook.generate.answering import GenerationSettings, Question, answer_questions
from relook.generate.engine import Engine
from relook.generate.request import EngineLimits
from relook.mine.jobs import MiningSettings, MiningSource
from relook.mine.run import mine_pairs
from relook.model.load import LoadOptions, model_hash
from relook.serve.api import ServerLimits
from relook.toyworld.build import shipped_base

PAGES = {"/v1/models": {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]}}


@pytest.fixture(scope="module")
def served_base() -> Iterator[Served]:
    """The shipped base behind OpenAI's API, named as its folder is."""
    engine = Engine(load_model(shipped_base()), EngineLimits(slots=8))
    with serving({shipped_base().name: engine}, ServerLimits(KEY)) as server:
        yield server


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def source(served: Served | Endpoint, **request: Any) -> ServerSource:
    url = served.url if isinstance(served, Endpoint) else f"http://127.0.0.1:{served.port}/v1"
    return ServerSource(url, request)


def test_a_server_gives_the_files_and_scores_of_relooks_own_engine(
    served_base: Served, world: Path, tmp_path: Path
) -> None:
    results = {}
    for name, loading in (("own", LoadOptions()), ("server", source(served_base))):
        results[name] = evaluate_model(
            shipped_base(), ["pope"], world / "test", tmp_path / name, max_new_tokens=40, loading=loading
        )
    for file in (tmp_path / "own").glob("*.jsonl"):
        own, server = read_records(file), read_records(tmp_path / "server" / file.name)
        differing = [(a, b) for a, b in zip(own, server, strict=True) if a != b]
        assert not differing, f"{len(differing)} of {len(own)} texts of {file.name} differ: {differing[0]}"
    provenance = results["server"]["pope"].pop("provenance")
    assert provenance["engine"] == {
        "name": "relook",
        "version": package.__version__,
        "model": shipped_base().name,
        "request": {},
    }
    assert provenance["model_hash"] == model_hash(shipped_base())
    results["own"]["pope"].pop("provenance")
    assert results["server"]["pope"] == results["own"]["pope"]


def test_sampled_answers_are_the_same_draws(served_base: Served, world: Path) -> None:
    images = sorted((world / "test" / "val2014").iterdir())[:4]
    questions: list[Question] = [(image, "Describe this image in detail.") for image in images]
    settings = GenerationSettings(
        max_new_tokens=30, generate=(("do_sample", True), ("temperature", 1.5), ("top_k", 0)), seed=7, first=100
    )
    answers = [
        dict(answer_questions(answerer, questions, settings, lambda *_: None))
        for answerer in (load_model(shipped_base()), source(served_base).load(shipped_base()))
    ]
    assert answers[0] == answers[1]


def test_pairs_are_mined_from_a_servers_answers(served_base: Served, world: Path, tmp_path: Path) -> None:
    settings = MiningSettings(questions=2, samples=0, max_new_tokens=40, parquet=False)
    for name, loading in (("own", LoadOptions()), ("server", source(served_base))):
        mine_pairs(shipped_base(), MiningSource(world / "vg", "vg"), tmp_path / name, settings, loading=loading)
    own, server = (read_json(tmp_path / name / "desc_data.json") for name in ("own", "server"))
    assert own == server
    assert read_json(tmp_path / "server" / "card.json")["engine"]["name"] == "relook"
    assert "answers by relook" in (tmp_path / "server" / "README.md").read_text()


def asked_records(out: Path) -> dict[tuple[str, str], str]:
    """The answers in a folder's files by image and question, of which POPE's three splits share some."""
    records = [record for file in out.glob("*.jsonl") for record in read_records(file)]
    return {(record["image"], record["question"]): record["answer"] for record in records}


def test_an_evaluation_that_a_server_broke_off_goes_on(world: Path, tmp_path: Path) -> None:
    def answer(request: dict[str, Any], number: int) -> Answer:
        return Answer(" Yes.") if number < 5 or resumed else Answer("No.", status=400, body='{"error": "no"}')

    resumed = False
    with endpoint(answer, PAGES | {"/version": {"version": "0.32.0"}}) as server:

        def ask() -> dict[str, Any]:
            data = world / "test"
            return evaluate_model("m", ["pope"], data, tmp_path, batch_size=1, loading=source(server, chat="x"))

        with pytest.raises(RelookError, match="does not answer as it should") as error:
            ask()
        assert "the same command goes on" in error.value.fix
        kept = asked_records(tmp_path)
        assert len(kept) == 5
        resumed, before = True, len(server.requests)
        result = ask()["pope"]
        records = asked_records(tmp_path)
        assert set(records.values()) == {"Yes."}  # vLLM's leading space is gone
        assert len(server.requests) - before == len(records) - len(kept)
    assert (result["provenance"]["model"], result["provenance"]["model_hash"]) == ("m", None)
    assert result["provenance"]["engine"] == {
        "name": "vllm",
        "version": "0.32.0",
        "model": "m",
        "request": {"chat": "x"},
    }
    request = server.requests[0]
    assert (request["model"], request["temperature"], request["chat"]) == ("m", 0, "x")
    picture, text = request["messages"][0]["content"]
    assert text["text"] in {question for _, question in records}
    sent = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
    assert sent in {path.read_bytes() for path in (world / "test" / "val2014").iterdir()}


def test_a_server_is_sent_the_pixels_that_evaluation_reads(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # servers rotate by it
    noise = Image.effect_noise((20, 30), 80)
    for name, image, how in (
        ("rotated.jpg", noise.convert("RGB"), {"exif": exif}),
        ("grey.jpg", noise, {}),
        ("clear.png", noise.convert("RGBA"), {}),
        ("plain.jpg", noise.convert("RGB"), {}),
    ):
        image.save(tmp_path / name, **how)
        data = base64.b64decode(image_url(tmp_path / name).partition(",")[2])
        with Image.open(io.BytesIO(data)) as sent:
            assert sent.getexif().get(0x0112, 1) == 1
            assert sent.mode == "RGB"
            assert sent.tobytes() == open_image(tmp_path / name).tobytes()


def test_what_engines_cannot_do_is_refused() -> None:
    with endpoint(lambda *_: Answer("Yes."), PAGES) as server:
        engine = source(server).load("m")
        beams = GenerationSettings(generate=(("num_beams", 5),))
        with pytest.raises(RecipeError, match="num_beams=5"):
            list(answer_questions(engine, [((), "Why?")], beams, lambda *_: None))
        with pytest.raises(RecipeError, match="not by v0"):
            list(answer_questions(engine, [((), "Why?")], GenerationSettings("v0"), lambda *_: None))
        with pytest.raises(DataError, match="inside a text"):
            list(answer_questions(engine, [((), "Why <image>?")], GenerationSettings(), lambda *_: None))
        with pytest.raises(RelookError, match=r"serves m, not other"):
            source(server).identity("other")
        assert source(server).identity("m")["engine"]["version"] is None
    with pytest.raises(RelookError, match="does not answer"):
        source(server).identity("m")
    with pytest.raises(RecipeError, match="--dtype, --bits would do nothing"):
        answer_source("http://localhost/v1", "{}", "KEY", LoadOptions(dtype="float16", bits=8))
    with pytest.raises(RecipeError, match="--engine-args would do nothing"):
        answer_source("", '{"seed": 1}', "KEY", LoadOptions())
    for address in ("http://localhost:1", "http://localhost:1/", "http://localhost:1/v1/"):
        assert answer_source(address, "{}", "K", LoadOptions()) == ServerSource("http://localhost:1/v1", {}, "K")


def test_the_command_finds_all_faults_of_an_engine(relook: Command, tmp_path: Path) -> None:
    ended = relook("eval", "pope", "--model", "nowhere", "--out", tmp_path / "out", "--engine", "sglang")
    assert ended.status == 2
    assert "There is no engine 'sglang'" in ended.err
    words = ("eval", "pope", "--out", tmp_path / "out", "--data", tmp_path)
    ended = relook(*words, "--model", "m", "--engine", "http://127.0.0.1:9", "--engine-args", "[]")
    assert "not a JSON object" in ended.err
    ended = relook(*words, "--model", shipped_base(), "--engine", "vllm")
    assert "pip install 'relook[vllm]'" in ended.err
    assert not (tmp_path / "out").exists()


def test_vllms_temporary_export_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export's lines are about a folder that ends with the command."""
    vllm = ModuleType("vllm")
    vllm.LLM = lambda model, **_: SimpleNamespace(llm_engine=read_json(Path(model) / "config.json"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    assert VllmSource(LoadOptions(), {}).load(shipped_base()).engine["model_type"] == "llava"
    assert capsys.readouterr().err == ""
