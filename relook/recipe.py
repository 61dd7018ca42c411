"""Recipes: typed, validated, frozen descriptions of a training run. A YAML file is data; keys are checked by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from relook.errors import RecipeError, some
from relook.files import read_text, write_text
from relook.model.post_decoder import PostDecoderSettings

CHOICES = {
    "task": ("sft", "dpo"),
    "on_bad": ("drop", "error"),
    "dpo_tokens": ("all", "differing"),
    "loss_type": ("sigmoid", "ipo", "hinge", "robust", "simpo", "orpo"),
    "post_decoder_init": ("random", "projector"),
    "feature_cache": ("auto", "memory", "disk", "off"),
    "trunk_pass": ("auto", "compiled", "flex", "dense"),
}
REFERENCE_FREE = ("simpo", "orpo")  # losses that compare with no reference model
LENGTH_NORMALISED = ("ipo", *REFERENCE_FREE)  # losses of means over a response's tokens, not of sums
MDPO_WEIGHTS = ("mdpo_conditional_weight", "mdpo_anchored_weight")


@dataclass(frozen=True)
class Recipe:
    """One training run. Keys not listed here are transformers' TrainingArguments and live in `training`.

    Names follow HA-DPO's and LLaVA's command lines where those have one.
    """

    task: str
    model_name_or_path: str
    output_dir: str
    vision_tower: str = ""  # folder of a liuhaotian model's tower; empty: the one that its config names
    # Data. DPO reads HA-DPO's files over Visual Genome, SFT reads LLaVA's conversations.
    vg_path: str = ""
    desc_data_path: str = ""
    pope_data_path: str = ""
    data_path: str = ""
    image_folder: str = ""
    on_bad: str = "drop"
    version: str = ""  # conversation template; empty: the model's own
    image_aspect_ratio: str = ""  # empty: as the model's config says
    model_max_length: int = 2048
    group_by_modality_length: bool = False  # SFT: batches with images apart from those without
    conversations_per_tree: int = 16  # SFT: how many conversations on one image share its prefix
    eval_fraction: float = 0.0  # of the images: held out, for the loss on them
    # What trains. With none of them, the projector and the language model (full).
    lora_enable: bool = False
    lora_r: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.0
    tune_post_decoder: bool = False
    tune_lm_head: bool = False
    tune_mm_mlp_adapter: bool = False
    freeze_backbone: bool = False
    post_decoder: Mapping[str, Any] = field(default_factory=dict)
    post_decoder_init: str = "random"
    post_decoder_lr: float | None = None
    lm_head_lr: float | None = None
    mm_projector_lr: float | None = None
    # Loss, under TRL's names where it has one
    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0  # robust: the share of pairs that are swapped
    simpo_gamma: float = 0.5  # simpo: the margin between the rewards
    dpo_weight: float = 1.0  # of loss_type
    nll_weight: float = 0.0  # of the supervised term on the chosen response
    mdpo_conditional_weight: float = 0.0  # of the chosen response on its image against a corrupted one
    mdpo_anchored_weight: float = 0.0  # of the chosen reward against mdpo_anchor
    mdpo_anchor: float = 0.0
    dpo_tokens: str = "all"
    feature_cache: str = "auto"
    feature_cache_dir: str = ""  # of feature_cache disk; empty: trunk_cache beside output_dir
    trunk_pass: str = "auto"  # how the language model reads packed trees
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise RecipeError(f"{name} is {getattr(self, name)!r}.", f"It must be one of {', '.join(allowed)}.")
        needed = ["data_path", "image_folder"] if self.task == "sft" else ["vg_path"]
        for name in ["model_name_or_path", "output_dir", *needed]:
            if not getattr(self, name):
                raise RecipeError(f"The recipe sets no {name}.", f"Give it in the recipe or as --{name}.")
        if self.task == "dpo" and not (self.desc_data_path or self.pope_data_path):
            raise RecipeError("The recipe names no preference pairs.", "Set desc_data_path, pope_data_path or both.")
        if self.group_by_modality_length and self.task != "sft":
            raise RecipeError("group_by_modality_length is for sft: every preference pair has an image.", "Remove it.")
        if not 0 <= self.eval_fraction < 1:
            raise RecipeError(f"eval_fraction is {self.eval_fraction}, a share of the images.", "Give 0 to below 1.")
        self._check_loss()
        if self.freeze_backbone and not (self.tune_post_decoder or self.tune_lm_head or self.tune_mm_mlp_adapter):
            raise RecipeError(
                "freeze_backbone is set and nothing else trains.",
                "Set tune_post_decoder, tune_lm_head or tune_mm_mlp_adapter.",
            )
        if self.freeze_backbone and self.lora_enable:
            raise RecipeError("freeze_backbone and lora_enable contradict each other.", "Remove one of them.")
        try:
            PostDecoderSettings(**self.post_decoder)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{error}.", f"The keys of post_decoder are {_settings_keys()}.") from None

    def _check_loss(self) -> None:
        """Values that fit, and no key that the chosen loss would ignore."""
        if self.beta <= 0:
            raise RecipeError(f"beta is {self.beta}, but must be above 0.", "Use dpo_weight 0 to train without DPO.")
        if not 0 <= self.label_smoothing < 0.5:
            raise RecipeError(f"label_smoothing is {self.label_smoothing}, a share of pairs.", "Give 0 to below 0.5.")
        weights = ("dpo_weight", "nll_weight", *MDPO_WEIGHTS)
        for name in weights:
            if getattr(self, name) < 0:
                raise RecipeError(f"{name} is {getattr(self, name)}.", "A weight must not be below 0.")
        if self.task == "dpo" and not any(getattr(self, name) for name in weights):
            raise RecipeError(f"{', '.join(weights)} are all 0: there is no loss.", "Set one of them.")
        if self.training.get("label_smoothing_factor"):
            raise RecipeError("label_smoothing_factor has no effect here.", "Use loss_type robust and label_smoothing.")
        if self.task == "sft":
            self._unused("with task sft", "loss_type", "beta", "dpo_tokens", *weights)
        if self.loss_type != "robust" or not self.dpo_weight:
            self._unused("without loss_type robust and a dpo_weight", "label_smoothing")
        if self.loss_type != "simpo" or not self.dpo_weight:
            self._unused("without loss_type simpo and a dpo_weight", "simpo_gamma")
        if not self.mdpo_anchored_weight:
            self._unused("without mdpo_anchored_weight", "mdpo_anchor")
        if self.loss_type in LENGTH_NORMALISED:
            of = f"with loss_type {self.loss_type}, which counts a response by its mean token"
            self._unused(of, "dpo_tokens", *MDPO_WEIGHTS)
        if any(getattr(self, name) for name in MDPO_WEIGHTS):
            self._unused("beside mDPO's terms, which count whole responses", "dpo_tokens")
        if self.loss_type == "orpo" and self.dpo_weight and not self.nll_weight:
            raise RecipeError("ORPO is its odds-ratio term and a supervised one.", "Set nll_weight, 1 in the paper.")
        if self.mdpo_conditional_weight and self.frozen_trunk and self.feature_cache != "off":
            raise RecipeError(
                "The trunk cache has no states of corrupted images, which mdpo_conditional_weight needs.",
                "Set feature_cache off, or mdpo_conditional_weight 0.",
            )

    def _unused(self, where: str, *keys: str) -> None:
        """Refuse keys that say something other than their default where they have no effect."""
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        given = [key for key in keys if getattr(self, key) != defaults[key]]
        if given:
            raise RecipeError(f"{some(given)} has no effect {where}.", f"Remove {some(given)}.")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the log-probs of a reference model."""
        return self.task == "dpo" and self.loss_type not in REFERENCE_FREE

    @property
    def full(self) -> bool:
        """Projector and language model train, as in LLaVA's second stage."""
        return not (self.lora_enable or self.tune_post_decoder or self.tune_lm_head or self.tune_mm_mlp_adapter)

    @property
    def cached_trunk(self) -> bool:
        """Training reads cached trunk states, and the trunk itself is needed only to fill the cache."""
        return self.frozen_trunk and self.feature_cache != "off"

    @property
    def frozen_trunk(self) -> bool:
        """Nothing before the post decoder trains, so the trunk's states may be computed once."""
        return not (self.full or self.lora_enable or self.tune_mm_mlp_adapter)

    def to_yaml(self) -> str:
        values = dataclasses.asdict(self)
        training = values.pop("training")
        return yaml.safe_dump({**values, **training}, sort_keys=False, allow_unicode=True)

    def save(self, path: Path) -> None:
        write_text(path, self.to_yaml())


def _training_keys() -> dict[str, Any]:
    from transformers import TrainingArguments

    return {item.name: item.type for item in dataclasses.fields(TrainingArguments)}


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe from a YAML file or by the name of one that ships with relook, with some keys replaced.

    Raises:
        RecipeError: no such recipe, not YAML, an unknown key, or a value that does not fit.
    """
    return build_recipe({**read_shipped(name, "recipe"), **(overrides or {})})


def read_shipped(name: str, kind: str) -> dict[str, Any]:
    """The keys of a YAML file, or of one that ships with relook.

    Args:
        kind: "recipe" or "sweep".
    """
    path = Path(name)
    known = shipped(kind)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise RecipeError(f"There is no {kind} file {path}.", f"Shipped {kind}s: {', '.join(known)}.")
        text = read_text(path)
    elif name in known:
        text = (resources.files("relook") / f"{kind}s" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean {close[0]}?" if close else f"Give a .yaml file or one of {', '.join(known)}."
        raise RecipeError(f"There is no {kind} {name!r}.", hint)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not valid YAML: {error}.") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{name} is not a mapping of keys to values.")
    return values


def shipped_recipes() -> list[str]:
    return shipped("recipe")


def shipped(kind: str) -> list[str]:
    """Names of the recipes or sweeps that ship with relook."""
    folder = resources.files("relook") / f"{kind}s"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from flat keys; `a.b` reaches into the mapping `a`. Unknown keys are an error."""
    own = {item.name: item.type for item in dataclasses.fields(Recipe) if item.name not in ("training", "post_decoder")}
    training_keys = _training_keys()
    arguments: dict[str, Any] = {}
    training: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for key, value in values.items():
        head, _, rest = str(key).partition(".")
        if head == "post_decoder":
            settings.update({rest: value} if rest else _mapping(head, value))
        elif key in own:
            arguments[key] = fit(key, value, own[key])
        elif key in training_keys:
            # transformers declares fsdp as a string, and asks for true.
            training[key] = value if key == "fsdp" else fit(key, value, training_keys[key])
        else:
            close = difflib.get_close_matches(str(key), [*own, "post_decoder", *training_keys], 1)
            hint = f"Did you mean {close[0]}?" if close else "See docs/recipes.md for all keys."
            raise RecipeError(f"There is no recipe key {key!r}.", hint)
    missing = [name for name in ("task", "model_name_or_path", "output_dir") if name not in arguments]
    if missing:
        raise RecipeError(f"The recipe sets no {', '.join(missing)}.", f"Give it in the recipe or as --{missing[0]}.")
    return Recipe(**arguments, post_decoder=_fit_settings(settings), training=training)


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{key} is {value!r}, but must be a mapping.", f"Its keys are {_settings_keys()}.")
    return value


def _fit_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    known = {item.name: item.type for item in dataclasses.fields(PostDecoderSettings)}
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise RecipeError(f"post_decoder has no key {some(unknown)}.", f"Its keys are {_settings_keys()}.")
    return {key: fit(f"post_decoder.{key}", value, known[key]) for key, value in settings.items()}


def _settings_keys() -> str:
    return ", ".join(PostDecoderSettings.names())


def fit(key: str, value: Any, annotation: Any) -> Any:
    """Check a value against the annotation of its field; YAML reads 2e-6 as a string, so numbers are converted."""
    if isinstance(value, Path):
        value = str(value)
    # Annotations are strings in relook's dataclasses and types in transformers'.
    kind = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    kinds = {part.strip() for part in kind.split("|")}
    if not kinds & {"bool", "int", "float", "str"} or kinds - {"bool", "int", "float", "str", "None"}:
        return value
    if value is None:
        if "None" in kinds:
            return value
    elif isinstance(value, bool):
        if "bool" in kinds:
            return value
    elif isinstance(value, (int, float, str)):
        for name, convert in (("int", int), ("float", float)):
            if name in kinds:
                try:
                    number = convert(value)
                except (ValueError, OverflowError):
                    continue
                if name == "float" or float(value) == number:
                    return number
        if "str" in kinds:
            return str(value)
    expected = " or ".join(sorted(kinds - {"None"}))
    raise RecipeError(f"{key} is {value!r}, but must be of type {expected}.", "Correct the value.")


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` pairs, values read as YAML; `--key` alone is an error that says so."""
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise RecipeError(f"{word!r} is neither a key nor the value of one.", "Write --key value.")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise RecipeError(f"--{key} has no value.", f"Write --{key} VALUE, e.g. --{key} true.")
            value = rest.pop(0)
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            overrides[key] = value
    return overrides
