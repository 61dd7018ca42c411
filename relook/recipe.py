"""Recipes: typed, validated, frozen descriptions of a training run. A YAML file is data; keys are checked by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from relook.errors import RecipeError, some
from relook.files import read_text, write_text
from relook.flags import FIXED, INSTEAD, OF_THE_MODEL, WORDS, check_fixed, check_switched
from relook.model.post_decoder import PostDecoderSettings

# ----------------------------------------------------------------------------------------------------
# Keys and their values, wherever they stand: in YAML files, ones that ship with relook too, and on a command line.


def read_shipped(name: str, kind: str) -> dict[str, Any]:
    """The keys of a YAML file, or of one that ships with relook.

    Args:
        kind: "recipe" or "sweep".
    """
    path = Path(name)
    known = shipped(kind)
    if path.is_file():  # a run's folder may be called as its recipe
        text = read_text(path)
    elif name in known:
        text = (resources.files("relook") / f"{kind}s" / f"{name}.yaml").read_text(encoding="utf-8")
    elif path.suffix in (".yaml", ".yml"):
        raise RecipeError(f"There is no {kind} file {path}.", f"Shipped {kind}s: {', '.join(known)}.")
    else:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean {close[0]}?" if close else f"Give a .yaml file or one of {', '.join(known)}."
        raise RecipeError(f"There is no {kind} {name!r}.", hint)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not valid YAML: {error}.", "Correct it there.") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{name} is not a mapping of keys to values.", "Write key: value, one a line.")
    return values


def shipped(kind: str) -> list[str]:
    """Names of the recipes or sweeps that ship with relook."""
    folder = resources.files("relook") / f"{kind}s"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--key value` and `--key=value` pairs, values read as YAML (`_value`); `--key` alone is an error that says so."""
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
        overrides[key] = _value(value)
    return overrides


def _value(text: str) -> Any:
    """As YAML reads it; but as it stands what that would change without being asked to: paths such as `a #2`, 0123."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    asked = value is None or isinstance(value, (bool, list, dict)) or text.startswith(("'", '"'))
    number = isinstance(value, (int, float)) and str(value) == text
    return value if asked or number else text


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


# ----------------------------------------------------------------------------------------------------

CHOICES = {
    "task": ("sft", "dpo"),
    "on_bad": ("drop", "error"),
    "dpo_tokens": ("all", "differing"),
    "loss_type": ("sigmoid", "ipo", "hinge", "robust", "simpo", "orpo"),
    "post_decoder_init": ("random", "projector"),
    "feature_cache": ("auto", "memory", "disk", "off"),
    "trunk_pass": ("auto", "compiled", "flex", "dense"),
    "bits": (16, 8, 4),
    "quant_type": ("nf4", "fp4"),
    "lora_bias": ("none", "lora_only", "all"),
}
REFERENCE_FREE = ("simpo", "orpo")  # losses that compare with no reference model
LENGTH_NORMALISED = ("ipo", *REFERENCE_FREE)  # losses of means over a response's tokens, not of sums
MDPO_WEIGHTS = ("mdpo_conditional_weight", "mdpo_anchored_weight")
WEIGHTS = ("dpo_weight", "nll_weight", *MDPO_WEIGHTS)
# Bounds of numbers that libraries find out late, or never: torch looks at the first of several learning rates alone.
BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("model_max_length", "conversations_per_tree"),
        ),
        (lambda n: n >= 1, "1 or more"),
    ),
    **dict.fromkeys(
        ("learning_rate", "post_decoder_lr", "lm_head_lr", "mm_projector_lr"), (lambda n: n >= 0, "0 or more")
    ),
    **dict.fromkeys(("num_train_epochs", "save_steps", "eval_steps"), (lambda n: n > 0, "a number above 0")),
    "max_steps": (lambda n: n >= 1 or n == -1, "1 or more, or leave it out for whole epochs"),
    "seed": (lambda n: 0 <= n < 2**32, "0 to below 2^32"),
    "activation_offloading": (lambda n: 0 <= n <= 1, "0 to 1, a share of the layers"),
}
ALL_LINEAR = "all-linear"
LORA_KEYS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_bias", "use_dora", "use_rslora")
HADPO_KEYS = ("vg_path", "desc_data_path", "pope_data_path")
DPO_KEYS = (*HADPO_KEYS, "pairs_path", "loss_type", "beta", "dpo_tokens", *WEIGHTS)
SFT_KEYS = ("data_path", "conversations_per_tree")
KEPT_KEYS = ("activation_memory_budget", "activation_offloading")


@dataclass(frozen=True)
class Recipe:
    """One training run. Keys not listed here are transformers' TrainingArguments and live in `training`.

    Names follow HA-DPO's and LLaVA's command lines where those have one.
    """

    task: str
    model_name_or_path: str
    output_dir: str
    adapter_name_or_path: str = ""  # a change that lies on the model before training, e.g. an SFT LoRA; it is merged
    vision_tower: str = ""  # of a liuhaotian model: its tower's folder; empty: the one that its config names
    bits: int = 16  # 8 and 4: the language model's linear layers are quantised (QLoRA)
    double_quant: bool = True
    quant_type: str = "nf4"
    # Data. DPO reads HA-DPO's files over Visual Genome or a parquet file, SFT reads LLaVA's conversations.
    vg_path: str = ""
    desc_data_path: str = ""
    pope_data_path: str = ""
    pairs_path: str = ""  # TRL's, RLHF-V's or RLAIF-V's columns
    data_path: str = ""
    image_folder: str = ""
    on_bad: str = "drop"
    version: str = ""  # conversation template; empty: the model's own
    image_aspect_ratio: str = ""  # empty: as the model's config says
    model_max_length: int = 2048
    group_by_modality_length: bool = False  # steps with images apart from those without, batches of even length
    conversations_per_tree: int = 16  # SFT: how many conversations on one image share its prefix
    eval_fraction: float = 0.0  # of the images: held out, for the loss on them
    # What trains. With none of them, the projector and the language model (full).
    lora_enable: bool = False
    lora_r: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.0
    lora_target_modules: Any = ALL_LINEAR  # or names of linear layers of the language model: [q_proj, v_proj]
    lora_bias: str = "none"
    use_dora: bool = False
    use_rslora: bool = False
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
    activation_memory_budget: float = 0.8  # share of a compiled layer's activations that is kept, not computed again
    activation_offloading: float = 0.0  # share of the layers whose activations leave the GPU until the backward pass
    of_the_model: Mapping[str, Any] = field(default_factory=dict)  # what its config must say; see `flags`
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise RecipeError(
                    f"{name} is {getattr(self, name)!r}.", f"It must be one of {', '.join(map(str, allowed))}."
                )
        needed = ["data_path", "image_folder"] if self.task == "sft" else [] if self.pairs_path else ["vg_path"]
        for name in ["model_name_or_path", "output_dir", *needed]:
            if not getattr(self, name):
                raise RecipeError(f"The recipe sets no {name}.", f"Give it in the recipe or as --{name}.")
        if self.task == "dpo" and not (self.desc_data_path or self.pope_data_path or self.pairs_path):
            raise RecipeError(
                "The recipe names no preference pairs.", "Set desc_data_path, pope_data_path or both, or pairs_path."
            )
        if not 0 <= self.eval_fraction < 1:
            raise RecipeError(f"eval_fraction is {self.eval_fraction}, a share of the images.", "Give 0 to below 1.")
        if not 0 < self.activation_memory_budget <= 1:
            raise RecipeError(f"activation_memory_budget is {self.activation_memory_budget}.", "Give above 0 to 1.")
        self._check_numbers()
        self._check_loss()
        self._check_what_trains()
        try:
            PostDecoderSettings(**self.post_decoder)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{error}.", f"The keys of post_decoder are {_settings_keys()}.") from None
        self._check_idle()

    def _check_numbers(self) -> None:
        given = {**vars(self), **self.training}
        for name, (fits, wanted) in BOUNDS.items():
            if given.get(name) is not None and not fits(given[name]):
                raise RecipeError(f"{name} is {given[name]}.", f"Give {wanted}.")

    def _check_what_trains(self) -> None:
        if self.freeze_backbone and not (self.tune_post_decoder or self.tune_lm_head or self.tune_mm_mlp_adapter):
            raise RecipeError(
                "freeze_backbone is set and nothing else trains.",
                "Set tune_post_decoder, tune_lm_head or tune_mm_mlp_adapter.",
            )
        if self.freeze_backbone and self.lora_enable:
            raise RecipeError("freeze_backbone and lora_enable contradict each other.", "Remove one of them.")
        if self.full and self.bits != 16:
            raise RecipeError(f"Weights of {self.bits} bits cannot train.", "Set lora_enable, or bits 16.")
        if self.lora_enable and not (self.lora_r > 0 and self.lora_alpha > 0 and 0 <= self.lora_dropout < 1):
            said = f"lora_r {self.lora_r}, lora_alpha {self.lora_alpha}, lora_dropout {self.lora_dropout}"
            raise RecipeError(f"{said} make no LoRA.", "Give a rank and an alpha above 0, a dropout from 0 to below 1.")
        names = self.lora_target_modules
        if names != ALL_LINEAR and not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
            raise RecipeError(
                f"lora_target_modules is {names!r}.", f"Give {ALL_LINEAR}, or a list of names such as [q_proj, v_proj]."
            )

    def _check_idle(self) -> None:
        """A key must say nothing but its default where nothing reads it: it would be ignored."""
        plain = {item.name: item.default for item in dataclasses.fields(self)} | {"post_decoder": {}}
        dpo = self.dpo_weight > 0
        recomputed = [key for key in ("gradient_checkpointing", "activation_checkpointing") if self.training.get(key)]
        elsewhere = [key for key in ("fsdp", "deepspeed", "use_cpu") if self.training.get(key)]  # else see `resolve`
        for idle, where, keys in (
            (self.task != "dpo", "without task dpo", DPO_KEYS),
            (bool(self.pairs_path), "beside pairs_path", HADPO_KEYS),
            (self.task != "sft", "without task sft", SFT_KEYS),
            (self.task != "sft" and not self.pairs_path, "without task sft or pairs_path", ("image_folder",)),
            (not self.lora_enable, "without lora_enable", LORA_KEYS),
            (self.bits != 4, "without bits 4", ("double_quant", "quant_type")),
            (
                not self.tune_post_decoder,
                "without tune_post_decoder",
                ("post_decoder", "post_decoder_init", "post_decoder_lr"),
            ),
            (not (self.tune_lm_head or self.full), "without tune_lm_head", ("lm_head_lr",)),
            (not (self.tune_mm_mlp_adapter or self.full), "without tune_mm_mlp_adapter", ("mm_projector_lr",)),
            (not dpo or self.loss_type != "robust", "without loss_type robust and a dpo_weight", ("label_smoothing",)),
            (not dpo or self.loss_type != "simpo", "without loss_type simpo and a dpo_weight", ("simpo_gamma",)),
            (self.cached_trunk, "with cached trunk states", KEPT_KEYS),
            (bool(recomputed), f"beside {' '.join(recomputed)}", KEPT_KEYS),
            (self.frozen_trunk, "where no gradient flows through the trunk", ("activation_offloading",)),
            (bool(elsewhere), f"with {' '.join(elsewhere)}", ("activation_offloading",)),
            (not self.mdpo_anchored_weight, "without mdpo_anchored_weight", ("mdpo_anchor",)),
            (
                self.loss_type in LENGTH_NORMALISED,
                f"with loss_type {self.loss_type}, which counts a response by its mean token",
                ("dpo_tokens", *MDPO_WEIGHTS),
            ),
            (
                any(getattr(self, name) for name in MDPO_WEIGHTS),
                "beside mDPO's terms, which count whole responses",
                ("dpo_tokens",),
            ),
        ):
            # A learning rate of 0 (as in HA-DPO's command) says of what does not train that it does not.
            allowed = {key: (plain[key], 0) if key.endswith("_lr") else (plain[key],) for key in keys}
            found = [key for key in keys if getattr(self, key) not in allowed[key]]
            if idle and found:
                raise RecipeError(f"{some(found)} would have no effect {where}.", "Change that, or leave it out.")
        if not self.frozen_trunk and (self.feature_cache == "disk" or self.feature_cache_dir):
            given = "feature_cache disk" if self.feature_cache == "disk" else "feature_cache_dir"
            raise RecipeError(
                f"{given} would have no effect: the trunk trains, and there are no states of it to keep.",
                "Leave it out.",
            )
        # How many workers there are by default depends on the device, and is looked at when a run begins.
        check_switched({"dataloader_num_workers": not self.cached_trunk, **self.said})
        if recomputed and self.cached_trunk:
            raise RecipeError(
                f"{recomputed[0]} would have no effect: the trunk's states are cached.",
                "Leave it out, or set feature_cache off.",
            )

    def _check_loss(self) -> None:
        """Values that fit, and fit together."""
        if self.beta <= 0:
            raise RecipeError(f"beta is {self.beta}, but must be above 0.", "Use dpo_weight 0 to train without DPO.")
        if not 0 <= self.label_smoothing < 0.5:
            raise RecipeError(f"label_smoothing is {self.label_smoothing}, a share of pairs.", "Give 0 to below 0.5.")
        for name in WEIGHTS:
            if getattr(self, name) < 0:
                raise RecipeError(f"{name} is {getattr(self, name)}.", "A weight must not be below 0.")
        if self.task == "dpo" and not any(getattr(self, name) for name in WEIGHTS):
            raise RecipeError(f"{', '.join(WEIGHTS)} are all 0: there is no loss.", "Set one of them.")
        if self.loss_type == "orpo" and self.dpo_weight and not self.nll_weight:
            raise RecipeError("ORPO is its odds-ratio term and a supervised one.", "Set nll_weight, 1 in the paper.")
        wanted = self.feature_cache != "off" if self.frozen_trunk else self.feature_cache == "memory"
        if self.mdpo_conditional_weight and wanted:
            what = "The trunk cache has no states" if self.frozen_trunk else "No vision features are kept"
            raise RecipeError(
                f"{what} of corrupted images, which mdpo_conditional_weight needs.",
                "Set feature_cache off, or mdpo_conditional_weight 0.",
            )

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
    def sees_once(self) -> bool:
        """The trunk trains, and what its frozen vision tower says of each image may be computed once."""
        return not self.frozen_trunk and self.feature_cache != "off" and not self.mdpo_conditional_weight

    @property
    def frozen_trunk(self) -> bool:
        """Nothing before the post decoder trains, so the trunk's states may be computed once."""
        return not (self.full or self.lora_enable or self.tune_mm_mlp_adapter)

    @property
    def said(self) -> dict[str, Any]:
        """transformers' keys, and relook's that switch some of them on."""
        names = ("eval_fraction", "group_by_modality_length")
        return {**self.training, **{name: getattr(self, name) for name in names}}

    def to_yaml(self) -> str:
        values = dataclasses.asdict(self)
        flat = {**values.pop("of_the_model"), **values.pop("training")}
        return yaml.safe_dump({**values, **flat}, sort_keys=False, allow_unicode=True)

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


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from flat keys; `a.b` reaches into the mapping `a`. Unknown keys are an error."""
    nested = ("training", "of_the_model", "post_decoder")
    own = {item.name: item.type for item in dataclasses.fields(Recipe) if item.name not in nested}
    training_keys = _training_keys()
    arguments: dict[str, Any] = {}
    of_the_model: dict[str, Any] = {}
    training: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for key, value in values.items():
        value = WORDS.get(key, value) if value is False else value
        head, _, rest = str(key).partition(".")
        if head == "post_decoder":
            settings.update({rest: value} if rest else _mapping(head, value))
        elif key in own:
            arguments[key] = fit(key, value, own[key])
        elif key in INSTEAD:
            raise RecipeError(f"{key} would have no effect.", INSTEAD[key])
        elif key in FIXED:
            check_fixed(key, value)
        elif key in OF_THE_MODEL:
            of_the_model[key] = fit(key, value, OF_THE_MODEL[key])
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
    settings = _fit_settings(settings)
    return Recipe(**arguments, post_decoder=settings, of_the_model=of_the_model, training=training)


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
