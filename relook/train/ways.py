"""The ways in which GPUs share a run, and what each GPU holds then, by part: one GPU or DDP, FSDP2, DeepSpeed.

A step's peak is at one of a few moments; see `_moments`. What DeepSpeed and FSDP2 share out and keep follows their own
rules (ZeRO: Rajbhandari et al. 2019, arXiv:1910.02054), with the settings that ship with relook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from relook.train import activations
from relook.train.memory import LIBRARIES, Job

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "cache", "workspace")
CONTEXT = 512 << 20  # what CUDA itself takes of a GPU, and torch's counters do not see
BUCKET, LIVE = 500_000_000, 1_000_000_000  # DeepSpeed's defaults: numbers of a reduce bucket; live ones under ZeRO-3
DEEPSPEED = {
    "zero2": "ZeRO-2",
    "zero2_offload": "ZeRO-2, offload",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3, offload",
}

# What is added to the command for a way; and the ways, the fastest first, as benchmarks/RESULTS.md measured them.
FLAGS = {"one GPU": "", "DDP": "", "FSDP2": "--fsdp true"}
FLAGS |= {name: f"--deepspeed {file}" for file, name in DEEPSPEED.items()}
FASTEST = ("one GPU", "DDP", "ZeRO-2", "FSDP2", "ZeRO-2, offload", "ZeRO-3", "ZeRO-3, offload")


@dataclass(frozen=True)
class Way:
    """What one GPU holds, in bytes.

    Args:
        parts: at the peak of a step.
        largest: the most of each part, at whatever moment.
        before: before training.
        processor: a process's memory outside the GPU, for what is offloaded.
    """

    name: str
    parts: dict[str, int]
    largest: dict[str, int]
    before: int
    processor: int = 0

    @property
    def flag(self) -> str:
        return FLAGS[self.name]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def decides(self) -> str:
        """Which of both is larger: what comes before training, or a step of it."""
        return "before" if self.before > self.peak else "training"

    def fits(self, memory: float) -> bool:
        """Whether a GPU of so many bytes has room for it, CUDA's own part aside."""
        return max(self.peak, self.before) + CONTEXT <= memory


def ways(job: Job, apart: Job, gpus: int) -> list[Way]:
    """A run on some GPUs, in each way that they can share it; the recipe's own one first.

    Args:
        job: as one GPU, or DDP, has it; `apart` as FSDP and DeepSpeed have it.
    """
    frozen, trained = job.frozen, 4 * job.trained
    optimizer, N = job.state * job.trained, gpus
    if N == 1 and job.keeps_features:
        frozen -= job.tower  # `Policy.rest_tower`
    name, buckets, away = "DDP" if N > 1 else "one GPU", trained if N > 1 else 0, job.leaving * job.one_kept
    found = [_way(name, job, frozen + trained, trained, optimizer, buckets, away)]
    if job.recipe.bits == 16:  # quantised weights are not taken apart
        found += [_fsdp(apart, N)] if N > 1 else []
        found += [_deepspeed(name, apart, N) for name in DEEPSPEED if N > 1 or name.endswith("offload")]
    said = job.recipe.training
    own = "FSDP2" if said.get("fsdp") else DEEPSPEED.get(Path(str(said.get("deepspeed"))).stem, found[0].name)
    return sorted(found, key=lambda way: way.name != own)


def _fsdp(job: Job, N: int) -> Way:
    """FSDP2 as `sharding.prepare_fsdp` sets it up: what trains in float32, gathered in the type of the products."""
    # Whole at a time: what stands around the layers, one layer, and the next one on its way.
    layer = sum(p.numel() for p in job.layers[0].parameters()) if not job.recipe.cached_trunk else 0
    weights = (job.frozen + 4 * job.trained) // N
    gathered = (job.around + 2 * layer) * job.low
    return _way("FSDP2", job, weights, 4 * job.trained // N, job.state * job.trained // N, gathered)


def _deepspeed(name: str, job: Job, N: int) -> Way:
    """DeepSpeed: all weights in the type of the products, and a float32 copy of what trains with its optimizer."""
    stage, offload = int(name[4]), name.endswith("offload")
    everything = job.frozen + job.low * job.trained
    copy = (4 + job.state) * job.trained // N
    gradients = job.low * job.trained // N
    buckets = (2 if stage == 2 else 1) * BUCKET * job.low  # with overlap_comm stage 2 fills one while another is sent
    weights = everything if stage == 2 else everything // N
    live = 0 if stage == 2 else min(LIVE * job.low, everything)
    processor = 0
    if offload:
        processor = copy + 4 * job.trained // N + (weights if stage == 3 else 0)
        copy, gradients, weights = 0, 0 if stage == 2 else gradients, 0 if stage == 3 else weights
    else:
        gradients += 4 * job.trained // N  # in float32 for the step
    return _way(DEEPSPEED[name], job, weights, gradients, copy, buckets + live, processor)


def _way(name: str, job: Job, weights: int, gradients: int, optimizer: int, workspace: int, processor: int = 0) -> Way:
    """Everything at the moment of a step when there is most."""
    always = {"weights": weights, "optimizer": optimizer, "cache": job.cache}
    base = workspace + LIBRARIES + job.waiting
    moments = [{**always, **moment, "workspace": base + moment["workspace"]} for moment in _moments(job, gradients)]
    most = max(moments, key=lambda parts: sum(parts.values()))
    largest = {part: max(moment.get(part, 0) for moment in moments) for part in PARTS}
    return Way(name, {part: most.get(part, 0) for part in PARTS}, largest, job.before, processor)


def _moments(job: Job, gradients: int) -> Sequence[dict[str, int]]:
    """The moments of a step that may be its peak.

    The gradient of the logits is made; that of lm_head is; the post decoder's image side, or the last decoder layer,
    goes back, when nothing before it has; the last one of those whose activations left has come back; the first decoder
    layer goes back, when all gradients are there; the optimizer steps.
    """
    compiled = job.policy.trunk_pass == "compiled"
    logits, rows = activations.logits(job.text.vocab_size, job.batch.targets, job.low, compiled)
    held = gradients if job.accumulates else 0  # from the micro-batches before
    head, above = _share(job, job.policy.core.lm_head), _share(job, job.policy.post_decoder)
    images = job.kept_above[1]
    looking = job.batch.padded_features * job.width * 2 * (4 + job.low) if images else 0  # gradients of keys and values
    layer = job.kept_below + job.again
    casts = round(head * job.trained) * job.low  # of lm_head's gradient, before it is float32
    # As layers go back others return: until the last has, there are as many as may be, beside gradients of the rest.
    there, gone = len(job.layers) - job.leaving, head + above + (1 - head - above) * job.leaving / len(job.layers)
    returned = {
        "activations": there * job.one_kept + job.again,
        "gradients": max(held, round(gone * gradients)),
        "workspace": job.backward,
    }
    after_head = max(held, round(head * gradients))
    after_all = max(held, round((head + above) * gradients))
    return [
        {"activations": job.kept, "logits": logits, "gradients": held, "workspace": rows},
        {"activations": job.kept, "logits": logits // 2, "gradients": after_head, "workspace": casts},
        {"activations": job.kept_below + images, "gradients": after_all, "workspace": looking},
        {"activations": layer, "gradients": after_all, "workspace": job.backward},
        *([returned] if job.leaving else []),
        {"activations": job.one_layer, "gradients": gradients, "workspace": job.backward},
        {"gradients": gradients, "workspace": 0},
    ]


def _share(job: Job, module: nn.Module | None) -> float:
    """Of all that trains."""
    parameters = [] if module is None else list(module.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad) / job.trained
