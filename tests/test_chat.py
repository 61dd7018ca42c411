"""`relook chat`, as a script talks to it and as somebody at a terminal does."""

from __future__ import annotations

import io
import os
import pty
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Command
from helpers.serving import NEW, PICTURES, until
from helpers.tiny import tiny_relook
from PIL import Image
from test_answering import TEXTS, as_loaded

from relook import load_model
from relook.data.samples import Turn
from relook.errors import RelookError
from relook.generate.engine import Engine
from relook.generate.request import EngineLimits, Request
from relook.model.load import without_post_decoder
from relook.serve.terminal import Chat, _lines
from relook.toyworld.build import make_processor


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a post decoder, and a picture in it."""
    folder = tmp_path_factory.mktemp("tuned")
    tiny_relook().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    (folder / "picture.png").write_bytes(PICTURES[0])
    return folder


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[Engine, Engine]]:
    pair = tuple(Engine(as_loaded(tiny_relook(seed=seed)), EngineLimits(slots=1)) for seed in (0, 1))
    yield pair  # type: ignore[misc]
    for engine in pair:
        engine.stop()


class Talk:
    """A chat whose answers are kept."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.said = ""
        self.chat = Chat(engines[0], lambda: engines[1], Request((), max_new_tokens=NEW), self.write)

    def write(self, text: str) -> None:
        self.said += text

    def __call__(self, line: str) -> str:
        self.said = ""
        self.chat.line(line)
        return self.said.strip()


def test_a_script_gets_the_answers_of_both_models(tuned: Path, relook: Command) -> None:
    words = ["chat", tuned, "--image", tuned / "picture.png", "--max-tokens", NEW]
    ended = relook(*words, stdin=f"{TEXTS[3]}\n/base\n/tuned\n/reset\n{TEXTS[0]}\n/quit\nnever read\n")
    assert ended.status == 0, ended.err
    loaded = load_model(tuned)
    base = as_loaded(without_post_decoder(loaded.core))
    picture: Any = [tuned / "picture.png"]
    long, plain = (model.generate(picture, TEXTS[3], max_new_tokens=NEW) for model in (loaded, base))
    assert long != plain
    expected = [long, plain, long, loaded.generate(picture, TEXTS[0], max_new_tokens=NEW)]
    assert ended.out.splitlines() == expected


@pytest.mark.parametrize("line", ["/image nothing.png", "/nonsense", "<image>"])
def test_a_script_ends_at_a_mistake(line: str, tuned: Path, relook: Command) -> None:
    ended = relook("chat", tuned, stdin=f"{line}\nIs there a cup?\n")
    assert ended.status == 2
    assert ended.out == ""
    assert ended.err.count("relook: ") == 1


def test_an_answer_knows_what_was_said(engines: tuple[Engine, Engine], tmp_path: Path) -> None:
    talk = Talk(engines)
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    talk(f"/image {tmp_path / 'a.png'}")
    first, second = talk(TEXTS[0]), talk(TEXTS[1])
    assert talk.chat.turns == [Turn(TEXTS[0], first), Turn(TEXTS[1], second)]
    loaded = engines[0].loaded
    ids = loaded.encoder().prompt(TEXTS[1], 1, [Turn(f"<image>\n{TEXTS[0]}", first)])
    assert engines[0].prompt([talk.chat.turns[0], Turn(TEXTS[1], "")], talk.chat.images) == ids
    assert talk("/base") != second
    assert [turn.prompt for turn in talk.chat.turns] == [TEXTS[0], TEXTS[1]]
    assert talk("/tuned") == second
    assert talk("/reset") == ""
    assert (talk.chat.turns, len(talk.chat.images)) == ([], 1)
    assert talk(TEXTS[0]) == first


def test_a_picture_is_shown_upright(engines: tuple[Engine, Engine], tmp_path: Path) -> None:
    """A file that is stored lying, and says so, is to the model what it is to a viewer."""
    with Image.open(io.BytesIO(PICTURES[0])) as picture:
        lying = picture.convert("RGB").transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / "turned.png", exif=exif)
    lying.save(tmp_path / "lying.png")
    talk = Talk(engines)
    shown = {}
    for name in ("turned", "lying"):
        talk(f"/image {tmp_path / name}.png")
        shown[name] = talk.chat.images[0].inputs["pixel_values"]
    upright = engines[0].image(PICTURES[0]).inputs["pixel_values"]
    assert shown["turned"].equal(upright)
    assert not shown["lying"].equal(upright)


def test_a_mistake_changes_nothing(engines: tuple[Engine, Engine], tmp_path: Path) -> None:
    talk = Talk(engines)
    (tmp_path / "no.png").write_bytes(b"no picture")
    answer = talk(TEXTS[0])
    for line, what in {
        f"/image {tmp_path / 'no.png'}": "in no known format",
        f"/image {tmp_path}": "cannot be read",
        "/image": "cannot be read",
        "<image>": "images are given",
        "/else": "no command",
        "A " * 2000: "positions",
    }.items():
        with pytest.raises(RelookError, match=what):
            talk(line)
    assert talk.chat.turns == [Turn(TEXTS[0], answer)]
    with pytest.raises(EOFError):
        talk("/quit")


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(engines: tuple[Engine, Engine]) -> None:
    talk = Talk(engines)
    whole = talk(TEXTS[3])
    talk("/reset")

    def write(text: str) -> None:
        talk.said += text
        if text.strip():
            raise KeyboardInterrupt

    talk.chat.write = write
    talk.chat.ask(TEXTS[3])
    [turn] = talk.chat.turns
    assert turn.response
    assert whole.startswith(turn.response)
    assert turn.response != whole
    until(lambda: not engines[0].running)


def test_nothing_that_a_model_says_commands_the_terminal(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(engines)
    decode = engines[0].loaded.processor.tokenizer.decode
    monkeypatch.setattr(
        engines[0].loaded.processor.tokenizer, "decode", lambda *a, **k: "\x1b[2J\x07" + decode(*a, **k).lstrip()
    )
    assert set(talk(TEXTS[3])).isdisjoint("\x1b\x07")


def test_a_question_that_the_model_failed_on_is_not_in_the_conversation(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(engines)
    answer = talk(TEXTS[0])
    with monkeypatch.context() as failing:
        failing.setattr(engines[0].batch.runner, "prefill", lambda *_: 1 / 0)
        with pytest.raises(RelookError, match="failed on this question"):
            talk(TEXTS[1])
    assert talk.chat.turns == [Turn(TEXTS[0], answer)]
    assert talk(TEXTS[1])


def test_answers_alone_go_to_a_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Though somebody writes the questions at a terminal."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Is there a cup?\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    lines = _lines()
    assert next(lines) == "Is there a cup?"
    with pytest.raises(EOFError):
        next(lines)
    out, err = capsys.readouterr()
    assert (out, err.count("> ")) == ("", 2)


def test_a_closed_input_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(RelookError, match="closed"):
        next(_lines())


@pytest.mark.slow
def test_at_a_terminal(tuned: Path) -> None:
    """Ctrl-C stops an answer, and the conversation goes on; at the prompt it ends, with nothing else said."""
    pid, terminal = pty.fork()
    if not pid:
        words = ["-m", "relook", "chat", str(tuned), "--max-tokens", "100000"]
        os.execv(sys.executable, [sys.executable, *words])
    seen = ""

    def read(enough: Callable[[str], bool]) -> None:
        nonlocal seen
        seen, end = "", time.monotonic() + 60
        while not enough(seen):
            assert time.monotonic() < end, seen
            seen += os.read(terminal, 4096).decode(errors="replace")

    read(lambda text: "> " in text)
    for _ in range(2):
        os.write(terminal, b"Describe this image.\n")
        read(lambda text: len(text) > 60)
        os.write(terminal, b"\x03")
        read(lambda text: text.endswith("> "))
    os.write(terminal, b"/nonsense\n")
    read(lambda text: "There is no command" in text and "> " in text)
    os.write(terminal, b"\x03")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert "Traceback" not in seen
