"""`relook chat`: a conversation about a picture in the terminal."""

from __future__ import annotations

import contextlib
import io
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from relook.console import status
from relook.data.samples import Turn
from relook.errors import DataError, RelookError
from relook.generate.engine import Engine
from relook.generate.request import EngineLimits, ProcessedImage, Request
from relook.model.load import LoadedModel, LoadOptions
from relook.serve.server import load_base, load_models, load_sharing_tensors, start_engines

HELP = """/image FILE   talk about another picture
/reset        forget what was said
/base         ask the last question again without what was trained (or --base), and go on so
/tuned        ask it again with it, and go on so
/help, /quit  or Ctrl-D; Ctrl-C stops an answer"""


@dataclass
class Chat:
    """A conversation with a model and, once it is asked for, with the same model without what was trained.

    Args:
        tuned: the model's engine.
        make_base: starts that of the model without its change; raises RelookError where it has none.
        settings: the request of every question, except its prompt and images.
        write: takes pieces of answers.
    """

    tuned: Engine
    make_base: Callable[[], Engine]
    settings: Request
    write: Callable[[str], object]
    images: tuple[ProcessedImage, ...] = ()
    turns: list[Turn] = field(default_factory=list)
    base: Engine | None = None
    on_base: bool = False

    def line(self, line: str) -> None:
        """Do what a line says: a command, or a question.

        Raises:
            RelookError: what is wrong with it.
            EOFError: it ends the conversation.
        """
        # A question may contain a slash, but not begin with one.
        command, _, rest = line.strip().partition(" ")
        if not command.startswith("/"):
            if line.strip():
                self.ask(line.strip())
        elif command == "/image":
            self.show(Path(rest.strip()).expanduser())
        elif command == "/reset":
            self.turns.clear()
        elif command in ("/base", "/tuned"):
            self.switch(command == "/base")
        elif command == "/quit":
            raise EOFError
        elif command == "/help":
            status(HELP)
        else:
            raise RelookError(f"There is no command {command}.", "/help names them.")

    def show(self, path: str | Path) -> None:
        """Talk about a picture; what was said about another is forgotten."""
        try:
            self.images = (self.tuned.image(Path(path).read_bytes()),)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.", "Give the path of an image.") from None
        except DataError as error:
            raise DataError(f"{path}: {error.problem}", error.fix) from None
        self.turns.clear()

    def switch(self, to_base: bool) -> None:
        """Go on with the other model, which is asked the last question again."""
        if to_base and self.base is None:
            self.base = self.make_base()
        # Both models go on with one history: the answers so far are context for either.
        self.on_base = to_base
        status("base:" if to_base else "tuned:", style="bold")
        if self.turns:
            self.ask(self.turns.pop().prompt)

    def ask(self, question: str) -> None:
        """Write the answer as it grows. After Ctrl-C, what came of it is the answer."""
        engine = self.base if self.on_base and self.base is not None else self.tuned
        # Before anything is written: a conversation that is too long leaves the turns as they are.
        ids = engine.prompt([*self.turns, Turn(question, "")], self.images)
        answer, finish = "", ""
        with contextlib.suppress(KeyboardInterrupt):
            for event in engine.stream(replace(self.settings, ids=ids, images=self.images)):
                answer, finish = answer + event.text, event.finish
                self.write(_printable(event.text))
        self.write("\n")
        if finish == "error":
            raise RelookError("The model failed on this question.", "Ask again, or /reset.")
        self.turns.append(Turn(question, answer))
        if finish == "length":
            status(f"[cut at {self.settings.max_new_tokens} tokens: --max-tokens]", style="dim")


def _printable(text: str) -> str:
    """Without characters that would command the terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def converse(
    model: str | Path,
    loading: LoadOptions,
    base: str | Path | None,
    image: str | Path | None,
    settings: Request,
    template: str = "",
) -> None:
    """Talk until the input ends. Answers go to standard output, all else to standard error.

    Args:
        base: the model that /base asks; None for the model itself without what was trained.
        settings: the request of every question, but its prompt and images.
        template: of conversations; empty for the model's own.

    Raises:
        RelookError: a line cannot be followed, and nobody sits at a terminal to mend it.
    """
    model = Path(model)
    base = None if base is None else Path(base)
    image = None if image is None else Path(image)

    started = contextlib.ExitStack()

    def start(loaded: LoadedModel) -> Engine:
        [engine] = start_engines({"": loaded}, EngineLimits(slots=1, seconds=math.inf), template).values()
        started.callback(engine.stop)
        return engine

    def start_base() -> Engine:
        return start(
            load_sharing_tensors([loaded], base, loading) if base is not None else load_base(loaded, model, loading)
        )

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    [loaded] = load_models([model], loading).values()
    with started, contextlib.suppress(EOFError, KeyboardInterrupt):
        chat = Chat(start(loaded), start_base, settings, write)
        if image is not None:
            chat.show(image)
        for line in _lines():
            try:
                chat.line(line)
            except RelookError as error:
                # A script must not go on after a line that failed; a person can type it again.
                if not sys.stdin.isatty():
                    raise
                status(str(error), style="red")


def _lines() -> Iterator[str]:
    if sys.stdin is None:  # closed by whoever started this
        raise RelookError("Standard input is closed.", "Start the chat in a terminal, or pipe questions into it.")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # of systems without it
            import readline  # noqa: F401  (lines that are edited, and earlier ones)
        status("/help names the commands.", style="dim")
        while True:
            if sys.stdout.isatty():
                yield input("> ")
            else:  # `input` would write it among the answers
                sys.stderr.write("> ")
                sys.stderr.flush()
                yield input()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the encoder says what is wrong with such a text
    yield from sys.stdin
