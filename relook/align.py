"""`relook align RECIPE`: rounds of mining, training and evaluation, each by the function of its own command.

    out/round-0/eval        the base on the dev set
    out/round-1/pairs       what `relook mine` finds in the model of the round before
    out/round-1/run         what `relook train` makes of the base by the pairs of all rounds so far
    out/round-1/eval        `relook eval chair`
    out/rounds.json, align.html

Every step is skipped where its result is there already, so the same command goes on after a kill.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relook import distributed
from relook.console import status
from relook.data.convert import DESC, POPE
from relook.data.paths import coco_images
from relook.errors import RecipeError
from relook.evaluate.compare import read_scores
from relook.evaluate.engines import answer_source
from relook.evaluate.judge import JudgeSettings
from relook.evaluate.run import evaluate_model
from relook.evaluate.tasks.chair import compare_coverage, instances_file
from relook.files import claim_output_dir, read_json, write_json, writes_alone
from relook.generate.answering import ONLY_OWN_ENGINE, AnswerSource
from relook.mine.jobs import MiningSettings, MiningSource
from relook.mine.output import SENTENCES
from relook.mine.run import mine_pairs
from relook.model.checkpoint import parse_folder
from relook.model.load import LoadOptions
from relook.recipe import Recipe, load_recipe, read_yaml_or_shipped
from relook.report.align_page import ROUNDS_FILE, write_align_page
from relook.train.run import train

SETTINGS_FILE = "align.json"


@dataclass(frozen=True)
class AlignSettings:
    """Set the rounds.

    Args:
        recipe: name of a shipped training recipe, or a file.
        keys: recipe keys that override it.
        data: folder of the dev set, as `relook eval chair` takes it; it must not be the test set.
        rounds: largest number of rounds.
        min_gain: the rounds stop where CHAIR_i at equal recall falls by no more than this share against the last round.
        engine: what mines by description and evaluates: "" for relook itself, or "vllm".
        engine_args: JSON: arguments of `vllm.LLM`.
    """

    recipe: str
    keys: Mapping[str, Any]
    data: Path
    rounds: int = 3
    min_gain: float = 0.0
    engine: str = ""
    engine_args: str = "{}"

    def source(self, loading: LoadOptions) -> AnswerSource:
        """Return what answers for a model."""
        return answer_source(self.engine, self.engine_args, "", loading)


@writes_alone(lambda model, source, out, *_, **__: Path(out))
def align(
    model: str | Path,
    source: MiningSource,
    out: str | Path,
    settings: AlignSettings,
    mining: MiningSettings,
    judge: JudgeSettings | None = None,
    loading: LoadOptions = LoadOptions(),  # noqa: B008 (frozen)
) -> Path:
    """Run the rounds, or the rest of an unfinished job, and return the report's path.

    Each round mines the last round's model, with the seed of the first plus its number, so that sampled texts and drawn
    images differ, and trains the base anew on the pairs of all rounds so far: models that go on from each other's few
    pairs say less and less.

    Args:
        judge: as in `mine_pairs`.
        loading: how the base is loaded to mine and to evaluate. The recipe says what its training takes.

    Raises:
        RelookError: settings that contradict each other, before anything runs; or whatever a step raises.
    """
    out, model = Path(out), Path(model)
    # The dev set decides when to stop, so nothing of it may train.
    source = dataclasses.replace(source, exclude=(*source.exclude, coco_images(settings.data)))
    _check_settings(model, out, settings, mining)
    if distributed.is_main():
        claim_output_dir(out, SETTINGS_FILE, _identity(model, source, settings, mining, loading), "rounds")
    distributed.barrier("the output folder")

    commands, evaluations = _Commands(settings, judge), [out / "round-0" / "eval"]
    status(f"  {commands.evaluate(model, evaluations[0], mining, loading)}")
    _evaluate(model, evaluations[0], settings, mining, loading)
    rounds: list[dict[str, Any]] = [{"round": 0, "model": str(model), "chair": _scores(evaluations[0])}]
    current, stopped = model, f"{settings.rounds} rounds, as many as wanted"
    for number in range(1, settings.rounds + 1):
        folder = out / f"round-{number}"
        status(f"round {number} of at most {settings.rounds}", style="bold")
        of_round = dataclasses.replace(mining, seed=mining.seed + number - 1)
        shown = [commands.mine(current, source, folder / "pairs", of_round, loading)]
        status(f"  {shown[-1]}")
        card = mine_pairs(current, source, folder / "pairs", of_round, judge, settings.source(loading))
        if not card["descriptions"]["pairs"]:
            stopped = f"round {number} found no pair"
            break
        source = dataclasses.replace(source, earlier=folder / "pairs")
        shown.append(commands.train(_keys(model, folder, settings, of_round)))
        status(f"  {shown[-1]}")
        run = train(_recipe(model, folder, settings, of_round))
        # The base's adapter and tower are in the run.
        loading = dataclasses.replace(loading, adapter=None, vision_tower=None)
        shown.append(commands.evaluate(run, folder / "eval", mining, loading))
        status(f"  {shown[-1]}")
        _evaluate(run, folder / "eval", settings, mining, loading)
        gain = compare_coverage(settings.data, evaluations[-1], folder / "eval")
        rounds.append(
            {
                "round": number,
                "model": str(run.relative_to(out)),
                "pairs": card["descriptions"]["pairs"],
                "question_pairs": card["questions"]["pairs"],
                "cost": card["descriptions"].get("cost", {}),
                "commands": shown,
                "chair": _scores(folder / "eval"),
                "against_last": gain,
                "against_base": compare_coverage(settings.data, evaluations[0], folder / "eval"),
            }
        )
        evaluations.append(folder / "eval")
        if gain["difference"] is None or gain["difference"] >= -settings.min_gain:
            stopped = f"round {number} brought no gain at equal recall"
            break
        current = run
    best = next(line for line in rounds if line["model"] in (str(current), _relative(current, out)))
    if distributed.is_main():
        result = {"stopped": stopped, "best": best["round"], "best_model": best["model"], "rounds": rounds}
        write_json(out / ROUNDS_FILE, result)
        write_align_page(out)
    distributed.barrier("the report")
    status(f"{stopped}: the best model is {current}. {out / ROUNDS_FILE} and {out / 'align.html'}")
    return out / "align.html"


def _relative(path: Path, out: Path) -> str:
    return str(path.relative_to(out)) if path.is_relative_to(out) else str(path)


def _check_settings(model: Path, out: Path, settings: AlignSettings, mining: MiningSettings) -> None:
    """Find mistakes before the first round.

    Raises:
        RecipeError: the recipe does not train on pairs, or a number makes no sense.
    """
    if settings.rounds < 1:
        raise RecipeError(f"There are {settings.rounds} rounds.", "Give --rounds 1 or more.")
    if settings.engine not in ("", "vllm"):
        raise RecipeError("A server has one model, and each round makes a new one.", "Give --engine vllm, or none.")
    if settings.engine and mining.by_sentence:
        raise RecipeError(*ONLY_OWN_ENGINE)
    settings.source(LoadOptions()).open(model)
    reserved = sorted({"model_name_or_path", "output_dir", "vg_path", *PAIR_KEYS} & settings.keys.keys())
    if reserved:
        raise RecipeError(
            f"Each round has its own {', '.join(reserved)}.", "Leave these keys out; --model is the base."
        )
    if {**read_yaml_or_shipped(settings.recipe, "recipe"), **settings.keys}.get("task") != "dpo":
        raise RecipeError(f"{settings.recipe} does not train on pairs.", "Choose a recipe of task dpo.")
    _recipe(model, out / "round-1", settings, mining)  # which checks its keys
    read_json(instances_file(settings.data))


PAIR_KEYS = ("desc_data_path", "pope_data_path", "pairs_path")


def _recipe(model: Path, folder: Path, settings: AlignSettings, mining: MiningSettings) -> Recipe:
    return load_recipe(settings.recipe, _keys(model, folder, settings, mining))


def _keys(model: Path, folder: Path, settings: AlignSettings, mining: MiningSettings) -> dict[str, Any]:
    """Return the recipe keys of a round: the user's, and where model, pairs and run are."""
    pairs = folder / "pairs"
    files = (
        {"pairs_path": pairs / SENTENCES}
        if mining.by_sentence
        else {
            "desc_data_path": pairs / DESC,
            # Without questions there is no pair in the file.
            **({"pope_data_path": pairs / POPE} if mining.questions else {}),
        }
    )
    paths = {"model_name_or_path": model, "vg_path": pairs, **files, "output_dir": folder / "run"}
    return {**settings.keys, **{key: str(path) for key, path in paths.items()}}


def _evaluate(
    model: Path, out: Path, settings: AlignSettings, mining: MiningSettings, loading: LoadOptions
) -> dict[str, Any]:
    numbers = (mining.template, mining.batch_size, mining.max_new_tokens)
    return evaluate_model(model, ["chair"], settings.data, out, *numbers, settings.source(loading))


def _scores(evaluation: Path) -> dict[str, Any]:
    scores: dict[str, Any] = read_scores(evaluation, ["chair"])["chair"]
    return scores


def _identity(
    model: Path, source: MiningSource, settings: AlignSettings, mining: MiningSettings, loading: LoadOptions
) -> dict[str, Any]:
    """Return all that the rounds depend on. Their steps check the rest, such as the content of files."""
    return {
        **settings.source(loading).identity(parse_folder(model)),
        "images": str(source.images.resolve()),
        "annotations": source.annotations,
        "exclude": [str(path.resolve()) for path in source.exclude],
        "recipe": settings.recipe,
        "keys": {key: str(value) for key, value in settings.keys.items()},
        "data": str(settings.data.resolve()),
        "min_gain": settings.min_gain,
        **dataclasses.asdict(mining),
    }


@dataclass(frozen=True)
class _Commands:
    """Write the commands that do the same as the rounds' steps."""

    settings: AlignSettings
    judge: JudgeSettings | None

    def mine(self, model: Path, source: MiningSource, out: Path, mining: MiningSettings, loading: LoadOptions) -> str:
        names = (
            *("by", "seed", "samples", "continuations", "questions", "temperature", "near_texts"),
            *("max_pairs", "max_images", "max_new_tokens", "batch_size"),
        )
        defaults = MiningSettings()
        changed = {n: getattr(mining, n) for n in names if getattr(mining, n) != getattr(defaults, n)}
        flags = [f"--{name}" for name in ("complete", "contrast") if getattr(mining, name)]
        judge = {"judge": self.judge.address, "judge-model": self.judge.model} if self.judge else {}
        return _command(
            ["relook", "mine", *flags],
            {
                "model": model,
                "images": source.images,
                "annotations": source.annotations,
                "exclude": source.exclude,
                "synonyms": source.synonyms,
                "earlier": source.earlier,
                **{name.replace("_", "-"): value for name, value in changed.items()},
                "judge": "self" if mining.own_answers else None,
                **judge,
                **self._answering_options(mining, loading),
                "out": out,
            },
        )

    def train(self, keys: Mapping[str, Any]) -> str:
        return _command(["relook", "train", self.settings.recipe], keys)

    def evaluate(self, model: Path, out: Path, mining: MiningSettings, loading: LoadOptions) -> str:
        numbers = {"max-new-tokens": mining.max_new_tokens, "batch-size": mining.batch_size}
        options = {"model": model, "data": self.settings.data, **numbers, **self._answering_options(mining, loading)}
        return _command(["relook", "eval", "chair"], {**options, "out": out})

    def _answering_options(self, mining: MiningSettings, loading: LoadOptions) -> dict[str, Any]:
        return {
            "version": mining.template,
            "adapter": loading.adapter,
            "vision-tower": loading.vision_tower,
            "dtype": loading.dtype if loading.dtype != "float32" else None,
            "device": loading.device,
            "engine": self.settings.engine,
            "engine-args": self.settings.engine_args if self.settings.engine_args != "{}" else None,
        }


def _command(words: Sequence[str], options: Mapping[str, Any]) -> str:
    """Write a command; empty values are left out, and those of a list have an option each."""
    pairs = [
        (f"--{name}", _word(item))
        for name, value in options.items()
        for item in (value if isinstance(value, tuple) else [value])
        if item not in (None, "")
    ]
    return shlex.join([*words, *(word for pair in pairs for word in pair)])


def _word(value: Any) -> str:
    """Write a recipe key's value as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
