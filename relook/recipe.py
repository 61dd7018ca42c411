"""Recipes: typed, validated, immutable descriptions of a training run, read from YAML and checked key by key."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from relook.data.samples import ON_BAD
from relook.data.sentinel import SUFFIXES as SENTINEL_SUFFIXES
from relook.errors import Faults, RecipeError, did_you_mean, most_similar, preview
from relook.files import read_text, write_text
from relook.flags import (
    FALSE_WORDS,
    HARMLESS,
    IGNORED,
    MODEL_CONFIG_KEYS,
    OTHER_NAMES,
    UNSUPPORTED,
    idle_keys,
    refused,
    renamed,
)

T = TypeVar("T")

# ----------------------------------------------------------------------------------------------------
# Keys and values from YAML files, including those that ship with relook, and from the command line.


def read_yaml_or_shipped(name: str, kind: str) -> dict[str, Any]:
    """Read the keys of a YAML file, or of one that ships with relook.

    Args:
        name: path of the file, or name of a shipped one.
        kind: "recipe" or "sweep".

    Raises:
        RecipeError: there is no such file, or it is not a YAML mapping.
    """
    path = Path(name)
    shipped = shipped_names(kind)
    if path.is_file():  # is_file, since a run folder may have the same name as its recipe
        text = read_text(path)
    elif name in shipped:
        text = (resources.files("relook") / f"{kind}s" / f"{name}.yaml").read_text(encoding="utf-8")
    elif path.suffix in (".yaml", ".yml"):
        raise RecipeError(f"There is no {kind} file {path}.", f"Shipped {kind}s: {', '.join(shipped)}.")
    else:
        hint = did_you_mean(name, shipped, f"Give a .yaml file or one of {', '.join(shipped)}.")
        raise RecipeError(f"There is no {kind} {name!r}.", hint)
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """Parse the keys of a recipe or sweep.

    Args:
        name: name of the file, for errors.

    Raises:
        RecipeError: the text is not a YAML mapping.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not valid YAML: {error}.", "Correct the file at that line.") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{name} is not a mapping of keys to values.", "Write one `key: value` a line.")
    return values


def shipped_names(kind: str) -> list[str]:
    """List the names of the recipes or sweeps that ship with relook."""
    folder = resources.files("relook") / f"{kind}s"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse `--key value` and `--key=value` pairs, with values as YAML (`_value`).

    Raises:
        RecipeError: words that are neither key nor value, and keys without a value, all in one error.
    """
    overrides, faults = read_overrides(arguments)
    faults.check()
    return overrides


def read_overrides(arguments: Sequence[str]) -> tuple[dict[str, Any], Faults]:
    """Parse pairs as `parse_overrides` does, but return the faults along with what could be read."""
    overrides: dict[str, Any] = {}
    faults = Faults()
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        with faults:
            if not word.startswith("--"):
                raise RecipeError(f"{word!r} is neither a key nor the value of one.", "Write --key value.")
            key, equals, value = word[2:].partition("=")
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise RecipeError(f"--{key} has no value.", f"Write --{key} VALUE, e.g. --{key} true.")
                value = rest.pop(0)
            overrides[key] = _value(value)
    return overrides, faults


HUB_KEYS = {"model_name_or_path", "adapter_name_or_path"}  # which a user may name as on the Hugging Face Hub


def missing_paths(values: Mapping[str, Any], of: str = "") -> dict[str, RecipeError]:
    """Find the recipe keys whose files or folders do not exist.

    Args:
        values: recipe values by key.
        of: suffix that names the recipe in the errors, e.g. " of <row>".
    """
    kinds = {
        "model_name_or_path": "model folder",
        "adapter_name_or_path": "adapter",
        "vg_path": "Visual Genome folder",
        **dict.fromkeys(("desc_data_path", "pope_data_path", "pairs_path", "data_path"), ""),
        **({"image_folder": ""} if values.get("task") == "sft" else {}),  # with pairs_path, images are written there
    }
    errors = {}
    for key, kind in kinds.items():
        path = values.get(key)
        if path and not Path(str(path)).exists():
            fault = f"{key}{of}: there is no {kind} {path}." if kind else f"{key} {path}{of} does not exist."
            hub = " relook downloads nothing: hf download does." if key in HUB_KEYS else ""
            errors[key] = RecipeError(fault, f"Check the path.{hub}")
    return errors


def _value(text: str) -> Any:
    """Parse a value as YAML, but keep the text if YAML would silently change it: paths such as `a #2`, or 0123."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    # Words and brackets with a type of their own in YAML are meant as such; quotes ask for YAML's reading.
    explicit = value is None or isinstance(value, (bool, list, dict)) or text.startswith(("'", '"'))
    # 0123 would become 83 (octal), 1_000 would lose its underscore: a number must be written as Python prints it.
    exact_number = isinstance(value, (int, float)) and str(value) == text
    return value if explicit or exact_number else text


def _require_finite(key: str, value: T) -> T:
    """Return a value without NaN and inf in it, mappings and lists included; YAML writes them as .nan and .inf."""
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        _require_finite(key, part)
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{key} is {value}, not a finite number.", "Correct the value.")
    return value


def coerce(key: str, value: Any, annotation: Any) -> Any:
    """Check a value against the annotation of its field; YAML reads 2e-6 as a string, so numbers are converted."""
    if isinstance(value, Path):
        value = str(value)
    _require_finite(key, value)  # of every type, since mappings and lists are returned as they are
    # Annotations are strings in relook's dataclasses and types in transformers'.
    kind = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    kinds = {part.strip() for part in kind.split("|")}
    # Mappings, lists and types of other libraries are checked where they are used.
    if not kinds & {"bool", "int", "float", "str"} or kinds - {"bool", "int", "float", "str", "None"}:
        return value
    if value is None:
        if "None" in kinds:
            return value
    elif isinstance(value, bool):  # before int, which bool is a subclass of
        if "bool" in kinds:
            return value
    elif isinstance(value, (int, float, str)):
        for name, convert in (("int", int), ("float", float)):
            if name in kinds:
                try:
                    number = convert(value)
                except (ValueError, OverflowError):
                    continue
                if name == "float" or float(value) == number:  # 2.5 is not an int
                    return _require_finite(key, number)
        if "str" in kinds:
            return str(value)
    expected = " or ".join(sorted(kinds - {"None"}))
    raise RecipeError(f"{key} is {value!r}, but must be of type {expected}.", "Correct the value.")


# ----------------------------------------------------------------------------------------------------

CHOICES = {
    "task": ("sft", "dpo"),
    "on_bad": ON_BAD,
    "dpo_tokens": ("all", "differing"),
    "loss_type": (
        *("sigmoid", "ipo", "hinge", "robust", "simpo", "orpo"),
        *("sigmoid_norm", "bco_pair", "apo_zero", "apo_down", "kto"),
    ),
    "post_decoder_init": ("random", "projector"),
    "feature_cache": ("auto", "memory", "disk", "off"),
    "trunk_pass": ("auto", "compiled", "flex", "dense"),
    "bits": (16, 8, 4),
    "quant_type": ("nf4", "fp4"),
    "lora_bias": ("none", "lora_only", "all"),
}
REFERENCE_FREE = ("simpo", "orpo")  # losses without a reference model
LENGTH_NORMALISED = ("ipo", "sigmoid_norm", *REFERENCE_FREE)  # losses of the mean over a response's tokens, not the sum
MDPO_WEIGHTS = ("mdpo_conditional_weight", "mdpo_anchored_weight")
WEIGHTS = ("dpo_weight", "nll_weight", *MDPO_WEIGHTS)
# Bounds that libraries check late or never: torch checks only the first of several learning rates.
BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("model_max_length", "conversations_per_tree"),
        ),
        (lambda n: n >= 1, "1 or more"),
    ),
    **dict.fromkeys(
        ("learning_rate", "post_decoder_lr", "lm_head_lr", "mm_projector_lr", "vision_tower_lr"),
        (lambda n: n >= 0, "0 or more"),
    ),
    **dict.fromkeys(("num_train_epochs", "save_steps", "eval_steps"), (lambda n: n > 0, "a number above 0")),
    "max_steps": (lambda n: n >= 1 or n == -1, "1 or more, or leave it out for whole epochs"),
    "seed": (lambda n: 0 <= n < 2**32, "0 to below 2^32"),
    "activation_offloading": (lambda n: 0 <= n <= 1, "0 to 1, a share of the layers"),
    **dict.fromkeys(("ld_alpha", "unchanged_weight"), (lambda n: 0 <= n <= 1, "0 to 1, the weight of a token")),
}
ALL_LINEAR = "all-linear"
LORA_KEYS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_bias", "use_dora", "use_rslora"),
    "lora_vision_tower",
)
HADPO_KEYS = ("vg_path", "desc_data_path", "pope_data_path")  # vg_path first: SENTINEL's files need it, too
DPO_KEYS = (*HADPO_KEYS, "pairs_path", "loss_type", "beta", "dpo_tokens", "ld_alpha", *WEIGHTS)
KTO_KEYS = ("desirable_weight", "undesirable_weight")
SFT_KEYS = ("data_path", "conversations_per_tree")
ACTIVATION_KEYS = ("activation_memory_budget", "activation_offloading")


def _key(default: Any, meaning: str) -> Any:
    """Declare a recipe key: its default, and the meaning that `relook train RECIPE --help` and the documents print."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Recipe:
    """Description of one training run. Other keys are those of transformers' TrainingArguments, kept in `training`.

    Names follow the command lines of HA-DPO and LLaVA where those have one. `relook.recipe_help` describes them.
    """

    task: str = field(metadata={"meaning": "dpo (preference pairs) or sft (conversations)"})
    model_name_or_path: str = field(metadata={"meaning": "folder of the base model, or of an earlier run"})
    output_dir: str = field(metadata={"meaning": "folder of the run"})
    adapter_name_or_path: str = _key(
        "", "adapter merged into the model before training: a run, a LoRA, mm_projector.bin"
    )
    vision_tower: str = _key(
        "", "CLIP tower of a model in liuhaotian's format: folder, or name in Hugging Face's cache; empty: the config's"
    )
    bits: int = _key(16, "8 or 4 quantise the language model's linear layers (QLoRA; needs relook[quant])")
    double_quant: bool = _key(True, "for 4 bits: quantise the scales too")
    quant_type: str = _key("nf4", "for 4 bits: the number format")
    vg_path: str = _key("", "dpo: Visual Genome's folder, with image_data.json, VG_100K, VG_100K_2")
    desc_data_path: str = _key("", "dpo: HA-DPO's file of description pairs")
    pope_data_path: str = _key("", "dpo: HA-DPO's file of yes/no pairs; one of the two, or both")
    pairs_path: str = _key(
        "",
        "dpo, instead of these: parquet file or folder with TRL's, RLHF-V's or RLAIF-V's columns (needs relook[data]); "
        "or SENTINEL's .json or .jsonl over vg_path",
    )
    data_path: str = _key("", "sft: LLaVA's conversation file")
    image_folder: str = _key("", "sft: root of its images; with pairs_path: receives embedded images, empty: beside it")
    on_bad: str = _key("drop", "samples that cannot be used: drop counts and names them, error stops at the first")
    version: str = _key("", "conversation template; empty: the model's own")
    image_aspect_ratio: str = _key("", "pad pads images to a square; empty: as in the model's config")
    model_max_length: int = _key(
        2048, "longest sequence in tokens, image included; longer samples are bad, none is cut"
    )
    group_by_modality_length: bool = _key(
        False, "steps with images apart from steps without, batches of similar length, as in LLaVA's trainer"
    )
    conversations_per_tree: int = _key(16, "sft: how many conversations on one image share its prefix")
    eval_fraction: float = _key(
        0.0, "share of the images held out; their loss is logged as eval_loss, every epoch or by eval_strategy"
    )
    # If none of these is set, the projector and the language model train (full).
    lora_enable: bool = _key(False, "LoRA on the language model, alone or beside other parts")
    lora_r: int = _key(128, "rank of LoRA")
    lora_alpha: int = _key(256, "scale of LoRA: its product is multiplied by alpha / r")
    lora_dropout: float = _key(0.0, "LoRA's dropout, in training steps only")
    lora_target_modules: Any = _key(  # noqa: RUF009 (a string)
        ALL_LINEAR, "or names of the language model's linear layers: [q_proj, v_proj]"
    )
    lora_bias: str = _key("none", "lora_only trains the biases of layers with LoRA, all those of the language model")
    use_dora: bool = _key(False, "DoRA (arXiv:2402.09353)")
    use_rslora: bool = _key(False, "rank-stabilised LoRA, alpha / sqrt(r) (arXiv:2312.03732)")
    lora_vision_tower: bool = _key(False, "LoRA on the vision tower's linear layers, too")
    tune_post_decoder: bool = _key(False, "the post decoder trains (stage 1; with tune_lm_head stage 2)")
    tune_lm_head: bool = _key(False, "lm_head trains")
    tune_mm_mlp_adapter: bool = _key(False, "the projector trains")
    tune_vision_tower: bool = _key(False, "the vision tower trains, too, beside what other keys say or a full run")
    freeze_backbone: bool = _key(False, "asserts that vision tower, projector and language model stay unchanged")
    post_decoder: Mapping[str, Any] = field(default_factory=dict)
    post_decoder_init: str = _key("random", "projector initialises the post decoder's alignment from the projector")
    post_decoder_lr: float | None = _key(None, "learning rate of the post decoder; empty: learning_rate")
    lm_head_lr: float | None = _key(None, "learning rate of lm_head; empty: learning_rate")
    mm_projector_lr: float | None = _key(None, "learning rate of the projector; empty: learning_rate")
    vision_tower_lr: float | None = _key(None, "learning rate of the vision tower, its LoRA too; empty: learning_rate")
    # Names are TRL's where TRL has one.
    loss_type: Any = _key(  # noqa: RUF009 (a string)
        "sigmoid", "preference loss; sigmoid is DPO. Or several with their weights: {sigmoid: 0.8, bco_pair: 0.2}"
    )
    beta: float = _key(0.1, "scale of the rewards; IPO's tau, ORPO's lambda. SimPO's paper uses 2 to 2.5")
    label_smoothing: float = _key(0.0, "robust: share of pairs with swapped labels, below 0.5")
    simpo_gamma: float = _key(0.5, "simpo: margin between the rewards")
    desirable_weight: float = _key(1.0, "kto: weight of good answers; larger where they are fewer")
    undesirable_weight: float = _key(1.0, "kto: weight of bad answers")
    dpo_weight: float = _key(1.0, "weight of the preference term; 0 trains without it (NLL-only control)")
    nll_weight: float = _key(0.0, "weight of the supervised term on the chosen response")
    nll_length_power: float = _key(
        0.0, "a response's tokens weigh 1 / length^power in the supervised term: 0 all alike, 1 responses alike (RPO)"
    )
    mdpo_conditional_weight: float = _key(
        0.0, "mDPO: the chosen response on its image against a corrupted one; 1 in the paper. sigmoid, hinge, robust"
    )
    mdpo_anchored_weight: float = _key(0.0, "mDPO: the chosen response's reward against mdpo_anchor; 1 in the paper")
    mdpo_anchor: float = _key(0.0, "mDPO's anchor, in units of reward")
    dpo_tokens: str = _key("all", "differing counts only tokens in which the responses differ; not for mDPO")
    unchanged_weight: float = _key(
        0.0, "dpo_tokens differing: weight of the tokens that do not differ, 1 / gamma of DDPO; above 0 for means"
    )
    ld_alpha: float = _key(1.0, "LD-DPO: weight of a response's tokens beyond the other's length; not for means")
    feature_cache: str = _key("auto", "where states of a frozen trunk are kept; auto: in memory if half of it suffices")
    feature_cache_dir: str = _key("", "folder of caches on disk, shared by runs; empty: trunk_cache beside output_dir")
    trunk_pass: str = _key(
        "auto", "attention over packed trees: FlexAttention compiled or not, or SDPA with a dense mask"
    )
    activation_memory_budget: float = _key(
        0.8, "share of a compiled layer's activations that is kept; torch recomputes the rest. 1 is fastest"
    )
    activation_offloading: float = _key(
        0.0,
        "share of layers whose activations wait in CPU memory until the backward pass; not with gradient_checkpointing",
    )
    of_the_model: Mapping[str, Any] = field(default_factory=dict)  # must equal the model config's; see `relook.flags`
    training: Mapping[str, Any] = field(default_factory=dict)
    idle: Mapping[str, str] = field(default_factory=dict, compare=False)  # accepted keys without effect, and why

    def __post_init__(self) -> None:
        # All faults are collected before any is raised, so that the user can mend a recipe in one go.
        faults = Faults()
        faults.errors += self._choices()
        if not faults.errors:  # which other keys have an effect depends on these
            faults.errors += refused(self._context)
            unused = idle_keys(self._context)
            object.__setattr__(self, "training", {k: v for k, v in self.training.items() if k not in unused})
            object.__setattr__(self, "idle", {**self.idle, **unused})
            faults.errors += self._unused()
        faults.errors += (*self._needed(), *self._numbers(), *self._loss(), *self._what_trains())
        with faults:
            _check_settings(self.post_decoder)
        faults.check()

    def _choices(self) -> Iterator[RecipeError]:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            several = name == "loss_type" and isinstance(value, Mapping) and value
            if unknown := [choice for choice in (value if several else [value]) if choice not in allowed]:
                close = most_similar(unknown[0], allowed)
                meant = f" Did you mean {close}?" if close else ""
                yield RecipeError(f"{name} is {value!r}.{meant}", f"It must be one of {', '.join(map(str, allowed))}.")
            elif several and not all(isinstance(w, int | float) and w > 0 for w in value.values()):
                yield RecipeError(f"{name} is {value!r}.", "Give each loss a weight above 0.")

    def _needed(self) -> Iterator[RecipeError]:
        over_vg = not self.pairs_path or self.sentinel_pairs
        needed = ["data_path", "image_folder"] if self.task == "sft" else ["vg_path"] if over_vg else []
        for name in ["model_name_or_path", "output_dir", *needed]:
            if not getattr(self, name):
                yield RecipeError(f"The recipe sets no {name}.", f"Give it in the recipe or as --{name}.")
        if self.task == "dpo" and not (self.desc_data_path or self.pope_data_path or self.pairs_path):
            yield RecipeError(
                "The recipe names no preference pairs.", "Set desc_data_path, pope_data_path or both, or pairs_path."
            )
        if not 0 <= self.eval_fraction < 1:
            yield RecipeError(f"eval_fraction is {self.eval_fraction}, a share of the images.", "Give 0 to below 1.")
        if not 0 < self.activation_memory_budget <= 1:
            yield RecipeError(f"activation_memory_budget is {self.activation_memory_budget}.", "Give above 0 to 1.")

    def _numbers(self) -> Iterator[RecipeError]:
        settings = {**vars(self), **self.training}
        for name, (fits, allowed) in BOUNDS.items():
            if settings.get(name) is not None and not fits(settings[name]):
                yield RecipeError(f"{name} is {settings[name]}.", f"Give {allowed}.")

    def _what_trains(self) -> Iterator[RecipeError]:
        if self.freeze_backbone and not (self.tune_post_decoder or self.tune_lm_head or self.tune_mm_mlp_adapter):
            yield RecipeError(
                "freeze_backbone is set and nothing else trains.",
                "Set tune_post_decoder, tune_lm_head or tune_mm_mlp_adapter.",
            )
        for first, second in (
            ("freeze_backbone", "lora_enable"),
            ("freeze_backbone", "tune_vision_tower"),
            ("tune_vision_tower", "lora_vision_tower"),
        ):
            if getattr(self, first) and getattr(self, second):
                yield RecipeError(f"{first} and {second} contradict each other.", "Remove one of them.")
        if self.full and self.bits != 16:
            yield RecipeError(f"Weights of {self.bits} bits cannot train.", "Set lora_enable, or bits 16.")
        if self.lora_enable and not (self.lora_r > 0 and self.lora_alpha > 0 and 0 <= self.lora_dropout < 1):
            rates = f"lora_r {self.lora_r}, lora_alpha {self.lora_alpha}, lora_dropout {self.lora_dropout}"
            yield RecipeError(
                f"{rates} make no LoRA.", "Give a rank and an alpha above 0, a dropout from 0 to below 1."
            )
        names = self.lora_target_modules
        if names != ALL_LINEAR and not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
            yield RecipeError(
                f"lora_target_modules is {names!r}.", f"Give {ALL_LINEAR}, or a list of names such as [q_proj, v_proj]."
            )

    def _unused(self) -> Iterator[RecipeError]:
        """Yield an error for keys that differ from their default although nothing reads them in this recipe."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)} | {"post_decoder": {}}
        losses = self.loss_weights if self.dpo_weight > 0 else {}
        of_means = [name for name in self.loss_weights if name in LENGTH_NORMALISED]
        recomputed = [key for key in ("gradient_checkpointing", "activation_checkpointing") if self.training.get(key)]
        # `resolve_trunk_pass` checks the cases that depend on the machine.
        elsewhere = [key for key in ("fsdp", "deepspeed", "use_cpu") if self.training.get(key)]
        # Each row: whether the keys are idle, the words for it, and the keys.
        for idle, reason, keys in (
            (self.task != "dpo", "without task dpo", DPO_KEYS),
            (bool(self.pairs_path), "beside pairs_path", HADPO_KEYS[self.sentinel_pairs :]),
            (self.task != "sft", "without task sft", SFT_KEYS),
            (
                self.task != "sft" and (not self.pairs_path or self.sentinel_pairs),
                "without task sft or parquet files in pairs_path",
                ("image_folder",),
            ),
            (not self.lora_enable, "without lora_enable", LORA_KEYS),
            (self.bits != 4, "without bits 4", ("double_quant", "quant_type")),
            (
                not self.tune_post_decoder,
                "without tune_post_decoder",
                ("post_decoder", "post_decoder_init", "post_decoder_lr"),
            ),
            (not (self.tune_lm_head or self.full), "without tune_lm_head", ("lm_head_lr",)),
            (not self.trains_projector, "without tune_mm_mlp_adapter", ("mm_projector_lr",)),
            (not self.trains_vision_tower, "without tune_vision_tower or lora_vision_tower", ("vision_tower_lr",)),
            ("robust" not in losses, "without loss_type robust and a dpo_weight", ("label_smoothing",)),
            (not self.nll_weight, "without nll_weight", ("nll_length_power",)),
            ("simpo" not in losses, "without loss_type simpo and a dpo_weight", ("simpo_gamma",)),
            (not self.rates_answers, "without loss_type kto", KTO_KEYS),
            (
                self.rates_answers,
                "with loss_type kto, which rates whole answers, each on its own",
                ("dpo_tokens", "ld_alpha", "nll_weight", *MDPO_WEIGHTS),
            ),
            (self.dpo_tokens != "differing", "without dpo_tokens differing", ("unchanged_weight",)),
            (self.cached_trunk, "with cached trunk states", ACTIVATION_KEYS),
            (bool(recomputed), f"beside {' '.join(recomputed)}", ACTIVATION_KEYS),
            (self.frozen_trunk, "where no gradient flows through the trunk", ("activation_offloading",)),
            (bool(elsewhere), f"with {' '.join(elsewhere)}", ("activation_offloading",)),
            (not self.mdpo_anchored_weight, "without mdpo_anchored_weight", ("mdpo_anchor",)),
            (
                bool(of_means),
                f"with loss_type {preview(of_means)}, which counts a response by its mean token",
                ("ld_alpha", *MDPO_WEIGHTS),
            ),
            (
                # A response without differing tokens would have no mean.
                bool(of_means) and not self.unchanged_weight,
                f"with loss_type {preview(of_means)} and unchanged_weight 0: a response may have no token to average",
                ("dpo_tokens",),
            ),
            (
                any(getattr(self, name) for name in MDPO_WEIGHTS),
                "beside mDPO's terms, which count whole responses",
                ("dpo_tokens", "ld_alpha"),
            ),
        ):
            # A learning rate of 0 (as in HA-DPO's command) is fine for a part that does not train.
            allowed = {key: (defaults[key], 0) if key.endswith("_lr") else (defaults[key],) for key in keys}
            changed = [key for key in keys if getattr(self, key) not in allowed[key]]
            if idle and changed:
                yield RecipeError(f"{preview(changed)} would have no effect {reason}.", "Change that, or leave it out.")
        if not self.frozen_trunk and (self.feature_cache == "disk" or self.feature_cache_dir):
            setting = "feature_cache disk" if self.feature_cache == "disk" else "feature_cache_dir"
            yield RecipeError(
                f"{setting} would have no effect: the trunk trains, and there are no states of it to cache.",
                "Leave it out.",
            )
        if self.trains_vision_tower and self.feature_cache == "memory":
            yield RecipeError(
                "feature_cache memory would have no effect: the vision tower trains, and its features change.",
                "Leave it out.",
            )

    def _loss(self) -> Iterator[RecipeError]:
        """Yield an error for loss settings that are out of range or do not fit together."""
        if self.beta <= 0:
            yield RecipeError(f"beta is {self.beta}, but must be above 0.", "Use dpo_weight 0 to train without DPO.")
        if not 0 <= self.label_smoothing < 0.5:
            yield RecipeError(f"label_smoothing is {self.label_smoothing}, a share of pairs.", "Give 0 to below 0.5.")
        if not 0 <= self.nll_length_power <= 1:
            yield RecipeError(f"nll_length_power is {self.nll_length_power}.", "Give 0 (tokens) to 1 (responses).")
        for name in WEIGHTS:
            if getattr(self, name) < 0:
                yield RecipeError(f"{name} is {getattr(self, name)}.", "A weight must not be below 0.")
        if self.task == "dpo" and not any(getattr(self, name) for name in WEIGHTS):
            yield RecipeError(f"{', '.join(WEIGHTS)} are all 0: there is no loss.", "Set one of them.")
        if "kto" in self.loss_weights and len(self.loss_weights) > 1:
            yield RecipeError("loss_type kto rates single answers; the others compare pairs.", "Give it alone.")
        if "orpo" in self.loss_weights and self.dpo_weight and not self.nll_weight:
            yield RecipeError("ORPO is its odds-ratio term and a supervised one.", "Set nll_weight, 1 in the paper.")
        # Both caches hold whole images by path; the term reads random crops of them.
        caches = self.feature_cache != "off" if self.frozen_trunk else self.feature_cache == "memory"
        if self.mdpo_conditional_weight and caches:
            problem = "The trunk cache has no states" if self.frozen_trunk else "No vision features are kept"
            yield RecipeError(
                f"{problem} of corrupted images, which mdpo_conditional_weight needs.",
                "Set feature_cache off, or mdpo_conditional_weight 0.",
            )

    @property
    def sentinel_pairs(self) -> bool:
        """Return True if `pairs_path` is a file in SENTINEL's layout, by its suffix; its images are in `vg_path`."""
        return Path(self.pairs_path).suffix in SENTINEL_SUFFIXES

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Return the weight of each preference loss within the preference term."""
        return loss_weights(self.loss_type)

    @property
    def rates_answers(self) -> bool:
        """Return True if the loss is of rated answers, not of pairs."""
        return self.task == "dpo" and "kto" in self.loss_weights

    @property
    def needs_reference(self) -> bool:
        """Return True if the loss needs the log-probs of a reference model."""
        return self.task == "dpo" and not set(self.loss_weights) <= set(REFERENCE_FREE)

    @property
    def full(self) -> bool:
        """Return True if the projector and the language model train, as in LLaVA's second stage."""
        return not (self.lora_enable or self.tune_post_decoder or self.tune_lm_head or self.tune_mm_mlp_adapter)

    @property
    def cached_trunk(self) -> bool:
        """Return True if training reads cached trunk states, so that the trunk is needed only to fill the cache."""
        return self.frozen_trunk and self.feature_cache != "off"

    @property
    def encodes_images_once(self) -> bool:
        """Return True if the trunk trains, but its frozen vision tower may run only once per image."""
        can_cache = self.feature_cache != "off" and not self.mdpo_conditional_weight
        return can_cache and not self.frozen_trunk and not self.trains_vision_tower

    @property
    def trains_projector(self) -> bool:
        return self.full or self.tune_mm_mlp_adapter

    @property
    def trains_vision_tower(self) -> bool:
        """Return True if the vision tower trains, whole or by LoRA."""
        return self.tune_vision_tower or self.lora_vision_tower

    @property
    def frozen_trunk(self) -> bool:
        """Return True if nothing before the post decoder trains, so that trunk states may be computed once."""
        return not (self.lora_enable or self.trains_projector or self.trains_vision_tower)

    @property
    def explicit_keys(self) -> dict[str, Any]:
        """Return transformers' keys, with the relook keys that switch some of them on."""
        names = ("eval_fraction", "group_by_modality_length", "cached_trunk")
        return {**self.training, **{name: getattr(self, name) for name in names}}

    @property
    def _context(self) -> dict[str, Any]:
        """Return `explicit_keys` with a default for the workers.

        Their real default number depends on the device, which is known only when a run begins.
        """
        return {"dataloader_num_workers": not self.cached_trunk, **self.explicit_keys}

    def to_yaml(self) -> str:
        # Flat again, as `build_recipe` takes them; `idle` keys had no effect and are left out.
        values = dataclasses.asdict(self)
        del values["idle"]
        flat = {**values.pop("of_the_model"), **values.pop("training")}
        return yaml.safe_dump({**values, **flat}, sort_keys=False, allow_unicode=True)

    def save(self, path: str | Path) -> None:
        write_text(Path(path), self.to_yaml())


LOSS_LABELS = {
    "sigmoid": "DPO",
    "ipo": "IPO",
    "hinge": "hinge DPO",
    "robust": "robust DPO",
    "simpo": "SimPO",
    "orpo": "odds ratio",
    "sigmoid_norm": "length-normalised DPO",
    "bco_pair": "BCO",
    "apo_zero": "APO-zero",
    "apo_down": "APO-down",
    "kto": "KTO",
}


def loss_weights(loss_type: Any) -> Mapping[str, float]:
    """Return the weights of the preference losses that a `loss_type` names."""
    weights: Mapping[str, float] = loss_type if isinstance(loss_type, Mapping) else {loss_type: 1.0}
    return weights


def objective_name(values: Mapping[str, Any]) -> str:
    """Return the name of the training objective for tables, given a recipe's keys."""
    if values.get("task") == "sft":
        return "SFT"
    parts = {
        **{LOSS_LABELS[name]: values.get("dpo_weight", 1) for name in loss_weights(values.get("loss_type", "sigmoid"))},
        "mDPO conditional": values.get("mdpo_conditional_weight"),
        "mDPO anchored": values.get("mdpo_anchored_weight"),
    }
    terms = [name for name, weight in parts.items() if weight]
    if not terms:
        return "NLL of chosen"
    return " + ".join([*terms, *(["NLL"] if values.get("nll_weight") else [])])


def regime_name(values: Mapping[str, Any]) -> str:
    """Return the names of the trained parts, joined by plus signs, given a recipe's keys."""
    parts = {
        "LoRA": "lora_enable",
        "post decoder": "tune_post_decoder",
        "head": "tune_lm_head",
        "projector": "tune_mm_mlp_adapter",
    }
    regime = " + ".join(name for name, key in parts.items() if values.get(key)) or "full"
    tower = {"tune_vision_tower": "vision tower", "lora_vision_tower": "LoRA of the vision tower"}
    return " + ".join([regime, *(name for key, name in tower.items() if values.get(key))])


@functools.cache
def training_keys() -> dict[str, str]:
    """Return transformers' training arguments with their types, as its source states them: an import takes seconds."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).with_name("training_args.py").read_text(encoding="utf-8")
    classes = {node.name: node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    fields = [statement for statement in classes["TrainingArguments"] if isinstance(statement, ast.AnnAssign)]
    return {ast.unparse(field.target): ast.unparse(field.annotation) for field in fields}


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load a recipe from a YAML file, or a shipped one by name, with some keys overridden.

    Args:
        name: path of the file, or name of a shipped recipe.
        overrides: values that replace those of the file, by key.

    Raises:
        RecipeError: no such recipe, invalid YAML, an unknown key, or an invalid value.
    """
    return build_recipe({**renamed(read_yaml_or_shipped(name, "recipe")), **renamed(overrides or {})})


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """Build a recipe from flat keys; `a.b` sets key `b` of the mapping `a`.

    Raises:
        RecipeError: everything that is wrong with keys and values, including unknown keys, in one error.
    """
    keys = sort_keys(values)
    top_level = keys.top_level
    missing = [name for name in ("task", "model_name_or_path", "output_dir") if name not in top_level]
    if missing:
        problem = f"The recipe sets no {', '.join(missing)}."
        keys.faults.errors.append(RecipeError(problem, f"Give it in the recipe or as --{missing[0]}."))
        if "task" in missing:  # everything else depends on it
            keys.faults.check()
    nested = {name: getattr(keys, name) for name in ("post_decoder", "of_the_model", "training", "idle")}
    # Placeholders for missing keys let the checks of all other keys run; `check` raises either way.
    with keys.faults:
        recipe = Recipe(**{**dict.fromkeys(missing, "not given"), **top_level}, **nested)
    keys.faults.check()
    return recipe


@dataclass
class Keys:
    """Flat recipe keys, sorted by the field they belong to, with the faults of the invalid ones."""

    top_level: dict[str, Any] = field(default_factory=dict)
    post_decoder: dict[str, Any] = field(default_factory=dict)
    of_the_model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    idle: dict[str, str] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)


def sort_keys(values: Mapping[str, Any], options: Sequence[str] = ()) -> Keys:
    """Sort a recipe's flat keys by the field they belong to, and check the type of each value.

    Args:
        options: the command's own options, one of which an unknown key may have meant.
    """
    nested = ("training", "of_the_model", "post_decoder", "idle")  # filled from keys of other names
    field_types = {field.name: field.type for field in dataclasses.fields(Recipe) if field.name not in nested}
    arguments = training_keys()
    keys = Keys()
    settings: dict[str, Any] = {}
    with keys.faults:
        values = renamed(values)
    # Which class a key belongs to is decided here alone; every key ends in one of them or in a fault.
    for key, value in values.items():
        value = FALSE_WORDS.get(key, value) if value is False else value  # unquoted `no` and `off`
        head, _, rest = str(key).partition(".")
        with keys.faults:
            if head == "post_decoder":
                settings.update({rest: value} if rest else _mapping(head, value))
            elif key in field_types:
                keys.top_level[key] = coerce(key, value, field_types[key])
            elif key in IGNORED:
                keys.idle[key] = IGNORED[key]
            elif key in UNSUPPORTED:
                if key not in HARMLESS or not HARMLESS[key](value, values):
                    raise RecipeError(f"{key} would have no effect.", UNSUPPORTED[key])
                keys.idle[key] = "that is the case anyway"
            elif key in MODEL_CONFIG_KEYS:
                keys.of_the_model[key] = coerce(key, value, MODEL_CONFIG_KEYS[key])
            elif key in arguments:
                # transformers declares fsdp as a string, but expects true.
                keys.training[key] = value if key == "fsdp" else coerce(key, value, arguments[key])
            else:
                valid = [*field_types, "post_decoder", *arguments, *MODEL_CONFIG_KEYS, *options]
                if meant := OTHER_NAMES.get(str(key)):
                    raise RecipeError(f"There is no recipe key {key!r}.", f"It is {meant} in a recipe.")
                hint = did_you_mean(str(key), valid, "`relook train RECIPE --help` and docs/recipes.md list all keys.")
                raise RecipeError(f"There is no recipe key {key!r}.", hint)
    with keys.faults:
        keys.post_decoder = _fit_settings(settings)
    return keys


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{key} is {value!r}, but must be a mapping.", f"Its keys are {_settings_keys()}.")
    return value


def _fit_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    if not settings:  # torch, which takes seconds to load, is not needed to find a command's other mistakes
        return {}
    from relook.model.post_decoder import PostDecoderSettings

    field_types = {field.name: field.type for field in dataclasses.fields(PostDecoderSettings)}
    unknown = [key for key in settings if key not in field_types]
    if unknown:
        raise RecipeError(f"post_decoder has no key {preview(unknown)}.", f"Its keys are {_settings_keys()}.")
    return {key: coerce(f"post_decoder.{key}", value, field_types[key]) for key, value in settings.items()}


def _check_settings(settings: Mapping[str, Any]) -> None:
    if not settings:  # as in `_fit_settings`
        return
    from relook.model.post_decoder import PostDecoderSettings

    try:
        PostDecoderSettings(**settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{error}.", f"The keys of post_decoder are {_settings_keys()}.") from None


def _settings_keys() -> str:
    from relook.model.post_decoder import PostDecoderSettings

    return ", ".join(PostDecoderSettings.names())
