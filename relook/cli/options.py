"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relook.data.templates import TEMPLATES
from relook.errors import DataError, Faults, RecipeError, did_you_mean

if TYPE_CHECKING:
    from relook.evaluate.judge import JudgeSettings
    from relook.mine.jobs import MiningSettings, MiningSource

# Names that options accept, for the help, completion and early checks. `tests/test_commands.py` compares them with the
# registries, whose modules take seconds to import.
LAYOUTS = ("hadpo", "sentinel", "llava", "pope", "shr", "amber")
PAIR_LAYOUTS = ("hadpo", "sentinel", "trl", "rlhfv", "rlaifv")
ANNOTATIONS = ("coco", "vg", "toyworld", "none")
BY = ("description", "sentence")
OWN_JUDGES = ("exact", "self")  # values of --judge that are no endpoint
PARSERS = ("official", "llava", "lmms-eval")
SUBMISSIONS = ("vqav2", "vizwiz", "gqa", "mmbench", "mmbench-cn", "seed", "mm-vet", "mme")
ENGINES = ("vllm", "sglang", "transformers-serve")
DTYPES = ("float32", "bfloat16", "float16")


def _existing_path(value: Path | list[Path] | None) -> Path | list[Path] | None:
    """Refuse paths that do not exist."""
    # Typer calls this before the command imports torch, which takes seconds.
    faults = Faults()
    for path in value if isinstance(value, list) else [value]:
        if path is not None and not path.exists():
            faults.errors.append(DataError(f"{path} does not exist.", "Check the path."))
    faults.check()
    return value


def choice(kind: str, names: Iterable[str], text: str = "") -> dict[str, Any]:
    """Build the settings of an option or argument that accepts names: its help, early check and shell completion.

    Args:
        kind: what the names are, for the error.
        text: the help; by default the names.
    """
    choices = list(names)

    def check(value: Any) -> Any:
        faults = Faults()
        for name in value if isinstance(value, list) else [value]:
            if name and name not in choices:
                faults.errors.append(RecipeError(f"There is no {kind} {name!r}.", did_you_mean(name, choices)))
        faults.check()
        return value

    return {
        "help": text or f"{', '.join(choices[:-1])} or {choices[-1]}.",
        "callback": check,
        "autocompletion": completion(lambda: choices),
    }


def completion(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Build a shell completion from known names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def input_option(text: str) -> Any:
    """Declare an option that is a path to read."""
    return typer.Option(help=text, callback=_existing_path)


def input_argument(text: str) -> Any:
    """Declare an argument that is a path to read."""
    return typer.Argument(help=text, callback=_existing_path)


def is_server(engine: str) -> bool:
    """Return True if `--engine` gives the address of a server."""
    from relook.evaluate.judge import is_address

    return is_address(engine)


def _engine(value: str) -> str:
    if value not in ("", "vllm") and not is_server(value):
        raise RecipeError(f"There is no engine {value!r}.", "Give vllm, or an address as http://127.0.0.1:8000/v1.")
    return value


def _engine_arguments(value: str) -> str:
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise RecipeError(f"--engine-args {value!r} is not a JSON object.", "Give one as '{\"max_model_len\": 2048}'.")
    return value


def _model_or_name(context: typer.Context, value: Path) -> Path:
    """Refuse a path that does not exist, unless a server knows the model by this name."""
    if not is_server(context.params.get("engine", "")):
        _existing_path(value)
    return value


def _bits(value: int) -> int:
    if value not in (4, 8, 16):
        raise RecipeError(f"--bits is {value}.", "Give 16, 8 or 4.")
    return value


Tower = Annotated[
    Path | None,
    typer.Option(help="The vision tower's folder, or name in Hugging Face's cache, if the model's config lacks it."),
]
Adapter = Annotated[Path | None, input_option("A change that is laid on the model.")]
Dtype = Annotated[str, typer.Option(**choice("dtype", DTYPES))]
Bits = Annotated[int, typer.Option(callback=_bits, help="8 or 4 quantise the language model (needs relook\\[quant]).")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; empty: a GPU where there is one.")]
Version = Annotated[
    str, typer.Option(**choice("conversation template", TEMPLATES, "Conversation template; empty: the model's own."))
]
Engine = Annotated[
    str,
    typer.Option(
        callback=_engine, is_eager=True, help="What answers: vllm, or the address of a server; empty: relook itself."
    ),
]
EngineArgs = Annotated[
    str,
    typer.Option(callback=_engine_arguments, help="JSON: arguments of vllm.LLM, or further fields of requests."),
]
EngineKey = Annotated[str, typer.Option(help="Environment variable that holds the server's key.")]
AnsweringModel = Annotated[
    Path,
    typer.Option(
        callback=_model_or_name, help="A model folder, or the output folder of a training run; or its name at a server."
    ),
]
JudgeUrl = Annotated[str, typer.Option(help="OpenAI-compatible endpoint of a judge, as https://api.openai.com/v1.")]
JudgeModel = Annotated[str, typer.Option(help="The judge's name there.")]
JudgePrice = Annotated[tuple[float, float], typer.Option(help="Dollars per million tokens: of prompts, of replies.")]
JudgeKey = Annotated[str, typer.Option(help="Environment variable that holds the endpoint's key.")]
JudgeWorkers = Annotated[int, typer.Option(help="Prompts before the judge at once.", min=1)]
JudgeRequest = Annotated[str, typer.Option(help="JSON: further fields of its requests; null leaves one out.")]
AsJson = Annotated[bool | None, typer.Option("--json/--text", help="Write JSON, or tables also into a pipe.")]

BatchSize = Annotated[int, typer.Option(help="Prompts that a batch has memory for.", min=1)]
By = Annotated[str, typer.Option(**choice("kind of pairs", BY, "Pairs of a description each, or by sentence."))]


@dataclass(frozen=True)
class MiningOptions:
    """Options of the commands that mine: what is described, who checks it, and how much of it."""

    images: Annotated[Path, input_option("Folder of the images: of Visual Genome, of a split of COCO's, or any.")]
    annotations: Annotated[
        str,
        typer.Option(
            **choice("kind of annotations", ANNOTATIONS, "What says what is on them: coco, vg, toyworld or none.")
        ),
    ]
    exclude: Annotated[
        list[Path] | None, input_option("Evaluation images: a file that names them, or a folder of them. Repeat.")
    ] = None
    synonyms: Annotated[Path | None, input_option('JSON: further words for objects, as {"cup": ["mug"]}.')] = None
    samples: Annotated[int, typer.Option(help="Sampled descriptions an image, besides the greedy one.", min=0)] = 1
    continuations: Annotated[
        int, typer.Option(help="By sentence: continuations sampled at each sentence's end.", min=2)
    ] = 5
    complete: Annotated[
        bool, typer.Option("--complete", help="By sentence: pair complete descriptions that differ in a sentence.")
    ] = False
    temperature: Annotated[float, typer.Option(help="Of what is sampled.")] = 1.0
    questions: Annotated[int, typer.Option(help="Yes/no questions an image.", min=0)] = 6
    contrast: Annotated[
        bool, typer.Option("--contrast", help="Pair descriptions without a mistake with worse ones; annotations only.")
    ] = False
    near_texts: Annotated[
        float, typer.Option(help="Similarity from which a description was said before; 0 keeps all.", min=0, max=1)
    ] = 0.9
    max_pairs: Annotated[int, typer.Option(help="Largest number of pairs, without questions; 0 keeps all.", min=0)] = 0
    max_images: Annotated[int, typer.Option(help="Number of images, drawn by the seed; 0: all.", min=0)] = 0
    max_new_tokens: Annotated[int, typer.Option(help="Longest description in tokens.", min=1)] = 256
    batch_size: BatchSize = 64
    version: Version = ""
    judge: Annotated[
        str,
        typer.Option(help="exact: annotations alone; a judge's endpoint; self: by sentence, the model's own answers."),
    ] = "exact"
    judge_model: JudgeModel = ""
    judge_price: JudgePrice = (0.0, 0.0)
    judge_key: JudgeKey = "OPENAI_API_KEY"
    judge_workers: JudgeWorkers = 8
    judge_request: JudgeRequest = "{}"

    def source(self, earlier: Path | None = None) -> MiningSource:
        from relook.mine.jobs import MiningSource

        return MiningSource(self.images, self.annotations, self.synonyms, self.exclude or (), earlier)

    def settings(self, by: str, seed: int, parquet: bool) -> MiningSettings:
        from relook.mine.jobs import MiningSettings

        names = (
            *("samples", "questions", "temperature", "batch_size", "max_new_tokens", "near_texts"),
            *("continuations", "complete", "max_pairs", "max_images", "contrast"),
        )
        chosen: dict[str, Any] = {name: getattr(self, name) for name in names}
        own_answers = self.judge == OWN_JUDGES[1]
        return MiningSettings(seed, template=self.version, by=by, own_answers=own_answers, parquet=parquet, **chosen)

    def judge_settings(self) -> JudgeSettings | None:
        """Return the judge that the options name; None if none does."""
        from relook.evaluate.judge import judge_settings

        url = "" if self.judge in OWN_JUDGES else self.judge
        return judge_settings(
            url, self.judge_model, self.judge_price, self.judge_key, self.judge_workers, self.judge_request
        )
