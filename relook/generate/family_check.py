"""Check of a model of an untested family against transformers' own forward pass and `generate`.

Packed trees must give what separate rows give, and the engine must write what `generate` writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from relook.console import status
from relook.data.images import RecentCache
from relook.data.packing import Tree
from relook.data.templates import CHAT, IMAGE, TemplatePiece
from relook.errors import CheckpointError
from relook.forward.collate import build_live_batch
from relook.forward.policy import Policy
from relook.generate.model_runner import ModelRunner
from relook.generate.scheduler import Scheduler, feature_bytes
from relook.generate.text import Text
from relook.model.trainable import PACKS, keep_unpacked

if TYPE_CHECKING:
    from relook.model.load import LoadedModel

SIZES = [(90, 60), (500, 700)]  # width and height of pictures: a model may cut a large one into tiles
ANSWERS = (" A cup of tea.", " Two dogs on the grass, and a cat.")
TOKENS = 4  # of the answer
TOLERANCE = {torch.float32: 1e-3}  # of log-probs; half precision rounds at about 1e-1


def check_family(loaded: LoadedModel) -> None:
    """Compare trees of an image and two answers with their rows, and an answer of the engine with `generate`'s.

    Raises:
        CheckpointError: they differ, or the model or its processor lacks an interface that relook needs.
    """
    kind = loaded.core.config.model_type
    advice = "docs/trunks.md says what a family needs; the tested ones are listed there."
    packing = keep_unpacked(loaded.core)  # the check runs without gradients, and the model may be about to train
    try:
        difference = max(_difference(loaded, _noise(size)) for size in SIZES)
        same_answer = _answers_alike(loaded, _noise(SIZES[0]))
        same_prompt = loaded.template != CHAT or _prompts_alike(loaded, _noise(SIZES[0]))
    except Exception as error:  # of an unknown class: anything may be missing anywhere
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(f"{loaded.path} is a {kind}, which relook cannot read: {reason}", advice) from error
    finally:
        for layer in packing:
            setattr(layer, PACKS, True)
    if not difference <= TOLERANCE.get(loaded.core.dtype, 0.25):
        raise CheckpointError(
            f"{loaded.path} is a {kind}, of which relook would compute something else: log-probs of packed answers "
            f"differ from those of separate ones by {difference:.1e}.",
            advice,
        )
    if not same_answer:
        raise CheckpointError(f"{loaded.path} is a {kind}, whose answers the engine would change.", advice)
    if not same_prompt:
        status(f"  {loaded.path}: a {kind}'s processor changes texts beside images, relook does not", style="yellow")


def _noise(size: tuple[int, int]) -> Image.Image:
    values = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(values.numpy())


def _prompts_alike(loaded: LoadedModel, picture: Image.Image) -> bool:
    """Return True if a prompt over a picture is that of the processor and its chat template."""
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    text = loaded.processor.apply_chat_template(messages, add_generation_prompt=True)
    theirs = loaded.processor(images=[picture], text=[text], return_tensors="pt")["input_ids"]
    return bool(torch.equal(loaded.encode([picture], "What is it?")["input_ids"].cpu(), theirs))


@torch.inference_mode()
def _difference(loaded: LoadedModel, picture: Image.Image) -> float:
    """Return the largest difference of log-probs between a tree and transformers' own forward pass on its rows."""
    encoder, core = loaded.plain_encoder(), loaded.core
    positions = encoder.positions([picture])
    question = TemplatePiece(f"Look: {IMAGE} What is it?")
    tree = Tree.of([encoder.row([question, TemplatePiece(answer, True)], positions) for answer in ANSWERS])
    policy = Policy(core, core.dtype, trunk_pass="dense")
    batch = build_live_batch(policy, loaded.images, loaded.pad_id, [(tree, [picture])])
    ours = policy(batch.to(core.device))
    theirs: list[Tensor] = []
    for branch in tree.branches:
        inputs = _arguments(loaded, (*tree.prefix, *branch.ids), picture)
        log_probs = core(**inputs).logits[0].float().log_softmax(-1)
        targets = inputs["input_ids"][0, len(tree.prefix) :]
        theirs.append(log_probs[len(tree.prefix) - 1 : -1].gather(-1, targets[:, None])[:, 0])
    return float((ours - torch.cat(theirs)).abs().max())


@torch.inference_mode()
def _answers_alike(loaded: LoadedModel, picture: Image.Image) -> bool:
    """Return True if the engine's greedy tokens are those of `generate`; in half precision, the first one."""
    encoder, core = loaded.plain_encoder(), loaded.core
    inputs = loaded.images.inputs(picture)
    ids = encoder.row([TemplatePiece(f"Look: {IMAGE} What is it?")], encoder.positions([picture])).ids
    runner = ModelRunner(loaded, len(ids) + TOKENS, compiled=False)
    scheduler = Scheduler(runner, 1, RecentCache(1 << 30, feature_bytes))
    text = Text(ids, (0,), TOKENS, lambda *_: False, image_inputs={0: inputs})
    scheduler.waiting.append(text)
    while scheduler.busy:
        scheduler.step()
    greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    arguments = _arguments(loaded, ids, picture)
    expected = core.generate(**arguments, **greedy, eos_token_id=None)[0, len(ids) :].tolist()
    return bool(text.tokens == expected or (core.dtype != torch.float32 and text.tokens[:1] == expected[:1]))


def _arguments(loaded: LoadedModel, ids: Sequence[int], picture: Image.Image) -> dict[str, Tensor]:
    """Return the arguments of transformers' own forward pass over one row."""
    core, row = loaded.core, torch.tensor([ids], device=loaded.core.device)
    images = {
        name: value.to(core.device, core.dtype if value.is_floating_point() else value.dtype)
        for name, value in loaded.images.batch([picture]).items()
    }
    return {"input_ids": row, "attention_mask": torch.ones_like(row), **loaded.token_types(row), **images}
