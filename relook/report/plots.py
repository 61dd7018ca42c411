"""Plots as inline SVG, and the attention maps of the post decoder."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from relook.data.images import ImageSource
from relook.data.packing import Tree
from relook.data.samples import Turn
from relook.forward.collate import build_live_batch
from relook.forward.policy import Policy
from relook.model.load import LoadedModel

# ----------------------------------------------------------------------------------------------------

FIELDS = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "reward accuracy",
    "nll": "NLL of chosen, nats a token",
}


def curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Plot one panel per logged field, one line per run, as an SVG element.

    Args:
        logs: the Trainer's log history of each run.
    """
    plt, figure, panels = _panels(len(FIELDS))
    for panel, (field, title) in zip(panels, FIELDS.items(), strict=True):
        for name, log in logs.items():
            points = [(entry["epoch"], float(entry[field])) for entry in log if field in entry]
            if points:
                panel.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        _label(panel, title, "epoch")
    if panels[0].lines:
        panels[0].legend(fontsize=8 if len(logs) < 10 else 5)
    return _svg(plt, figure)


Points = Mapping[str, Sequence[tuple[float, float]]]


def against_rate(panels: Mapping[str, Points], base: Mapping[str, float]) -> str:
    """Plot scores against the learning rate, one panel each, one line per variant, as an SVG element.

    Args:
        panels: by title, by variant: (learning rate, score) points in order.
        base: by title, the base's score, a dashed line.
    """
    plt, figure, axes = _panels(len(panels))
    for panel, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, points in lines.items():
            panel.plot(*zip(*points, strict=True), label=name, marker="o", markersize=3, linewidth=1.2)
        panel.axhline(base[title], color="#888", linestyle="--", linewidth=1, label="base")
        rates = sorted({rate for points in lines.values() for rate, _ in points})
        panel.set_xscale("log")
        ticks = rates[:: -(-len(rates) // 6)]  # more labels would run into each other
        panel.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        panel.minorticks_off()
        _label(panel, title, "learning rate")
    axes[0].legend(fontsize=8 if len(lines) < 8 else 5)
    return _svg(plt, figure)


def coverage_curves(lines: Points, shared: float) -> str:
    """Plot hallucination against recall, one line per model, with the shared recall dashed, as an SVG element."""
    plt, figure, [panel] = _panels(1)
    for name, points in lines.items():
        if points:
            panel.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
    panel.axvline(shared, color="#888", linestyle="--", linewidth=1, label="recall of both")
    _label(panel, "CHAIRi, %", "recall, %: captions cut after 1, 2, ... words")
    panel.legend(fontsize=8)
    return _svg(plt, figure)


def _panels(count: int) -> tuple[Any, Any, Any]:
    import matplotlib

    # Chosen before pyplot is imported: the default backend would look for a display.
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, count, figsize=(4.2 * count, 3.1), layout="constrained", squeeze=False)
    return plt, figure, panels[0]


def _label(panel: Any, title: str, below: str) -> None:
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(below, fontsize=9)
    panel.grid(alpha=0.25)
    panel.tick_params(labelsize=8)


def _svg(plt: Any, figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})  # without a date: the same bytes each time
    plt.close(figure)
    # The XML head is for files of their own. Matplotlib escapes the labels: templates may take the rest as it is.
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


# ----------------------------------------------------------------------------------------------------
# Where the post decoder looked just before a word.


def has_attention_maps(loaded: LoadedModel) -> bool:
    """Return True if a model has a post decoder whose attention over an image can be shown."""
    return _attention_recorder(_policy(loaded))


def _policy(loaded: LoadedModel) -> Policy:
    # One conversation is not worth the compilation of layers.
    return Policy(loaded.model.eval(), trunk_pass="dense")


def _attention_recorder(policy: Policy) -> bool:
    return policy.needs_vision_features and not policy.needs_all_states


@torch.inference_mode()
def attention_before(
    loaded: LoadedModel, image: ImageSource, turns: Sequence[Turn], starts: Sequence[int], template: str = ""
) -> list[list[list[float]]]:
    """Return the last post decoder block's attention over the image, averaged over heads, where words are predicted.

    Args:
        turns: a conversation about the image, whose `<image>` is in its first prompt. Words are looked up in the
            last answer, whichever model gave it.
        starts: character offsets in that answer where words begin.
        template: of the conversation; empty for the model's own.

    Returns:
        For each word a square grid of weights that sum to 1; no grids where the model has no cross-attention, or looks
        at more than one square grid of features (the tiles of LLaVA-NeXT).

    Raises:
        DataError: training would refuse the conversation: too long, an empty answer, marks of the template.
    """
    policy = _policy(loaded)
    if not _attention_recorder(policy) or policy.post_decoder is None:
        return []
    encoder = loaded.encoder(template)
    row = encoder.learned(turns, [image], "look")
    batch = build_live_batch(policy, loaded.images, loaded.pad_id, [(Tree.of([row]), [image])])
    trunk = policy.trunk(batch.to(loaded.core.device))
    if trunk.features is None:
        return []
    context = policy.post_decoder.image_context(trunk.features, trunk.image_counts)
    if context is None:
        return []
    # trunk.states are the states before each supervised token; maps: (states, image features).
    maps = policy.post_decoder.attention_maps(trunk.states, context)[0]
    vision = policy.config.vision_config
    side = vision.image_size // vision.patch_size
    if maps.shape[-1] != side * side:
        return []
    # The targets are the tokens of all answers; those of the last one are what is supervised up to the row's end.
    first = sum(row.supervised) - sum(1 for _ in itertools.takewhile(bool, reversed(row.supervised)))
    text = turns[-1].response
    tokens = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    # A token's offsets may begin with the space before the word, so the word's token is the one that ends after it.
    positions = [next(i for i, (_, end) in enumerate(tokens) if end > start) for start in starts]
    return [maps[int(trunk.targets.slot[first + position])].view(side, side).tolist() for position in positions]
