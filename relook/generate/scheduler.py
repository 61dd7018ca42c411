"""What is being answered: slots of the cache, and the passes of the model over them. One thread owns it.

New prompts are read into free slots between two steps; a step is one more token for every answer. A prompt that begins
like what a slot has read before, over the same images, takes that over: the earlier turns of a conversation, or the
picture that somebody else asks about at the same time. An image goes through the vision tower once, as long as it is
remembered.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from relook.data.images import Recent, stack
from relook.data.packing import common_start
from relook.generate.kv_cache import ImageSides, SlotCache
from relook.generate.request import Answer, Limits, Request, Said
from relook.generate.sampling import Rule, settings_followed
from relook.generate.tree_decoding import additive
from relook.model.load import LoadedModel
from relook.model.post_decoder import PostDecoder

# ----------------------------------------------------------------------------------------------------
# The next token of many answers at once, each by its own rule.


def pick(logits_RV: Tensor, answers: Sequence[Answer], rule: Callable[[float, float], Rule]) -> list[Said]:
    """What each answer says next.

    Args:
        rule: of a temperature and a top_p. Answers that share one are chosen for together.
    """
    groups: dict[tuple[float, float, bool], list[int]] = {}
    for i, answer in enumerate(answers):
        how = (answer.request.temperature, answer.request.top_p) if answer.draws else (0.0, 1.0)
        groups.setdefault((*how, not answer.said), []).append(i)
    chosen: list[Tensor] = []
    for (temperature, top_p, first), members in groups.items():
        draws = None
        if temperature:
            drawn = [answers[i].draws[len(answers[i].said)] for i in members]
            draws = torch.tensor(drawn, dtype=torch.float64, device=logits_RV.device)
        logits = logits_RV if len(groups) == 1 else logits_RV[members]
        chosen.append(rule(temperature, top_p).choose(logits, draws, first))
    places = [i for members in groups.values() for i in members]
    by_place = dict(zip(places, torch.cat(chosen).tolist(), strict=True))  # the one wait for the device
    tokens = [by_place[i] for i in range(len(answers))]
    likely = _log_probs(logits_RV, answers, tokens)
    return [likely.get(i) or Said(token) for i, token in enumerate(tokens)]


def _log_probs(logits_RV: Tensor, answers: Sequence[Answer], tokens: Sequence[int]) -> dict[int, Said]:
    """Of the answers that want them."""
    wanted = [i for i, answer in enumerate(answers) if answer.request.logprobs]
    if not wanted:
        return {}
    log_probs = logits_RV[wanted].float().log_softmax(-1)
    top = max(answers[i].request.top for i in wanted)
    values, ids = (side.tolist() for side in log_probs.topk(min(top, log_probs.shape[-1])))
    own = log_probs.gather(1, torch.tensor([[tokens[i]] for i in wanted], device=log_probs.device))[:, 0].tolist()
    return {
        i: Said(tokens[i], own[n], tuple(zip(ids[n], values[n], strict=True))[: answers[i].request.top])
        for n, i in enumerate(wanted)
    }


# ----------------------------------------------------------------------------------------------------

WORTH_WAITING = 32  # positions: a prompt that shares as many with one that is just being read comes a step later
RULES = 256  # ways of sampling that are remembered; clients choose them
AT_ONCE = 4096  # positions of prompts that are read between two steps, unless one alone has more

Features = tuple[Tensor, Tensor | None]  # of an image: projected (P, D), and what the post decoder looks at (M, V)


@dataclass
class Slot:
    """What lies in a row of the cache: ids whose keys and values are there, and the images that they name."""

    ids: list[int] = field(default_factory=list)
    images: tuple[str, ...] = ()
    used: int = 0
    answer: Answer | None = None


@dataclass
class Counts:
    """What has been done so far, for those who watch."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    images: int = 0
    steps: int = 0


class Batch:
    """The answers of one model. The first `live` slots are being answered.

    Args:
        length: positions of a slot.
    """

    def __init__(self, loaded: LoadedModel, limits: Limits, length: int) -> None:
        self.loaded, self.core, self.length = loaded, loaded.core, length
        self.decoder: PostDecoder | None = getattr(self.core.model, "post_decoder", None)
        blocks = 0 if self.decoder is None else len(self.decoder.blocks)
        own = blocks if self.decoder is not None and self.decoder.reads_all_positions else 0
        self.cache = SlotCache(limits.slots, self.core.config.text_config.num_hidden_layers + own, length)
        self.sides = ImageSides(limits.slots, blocks)
        self.slots = [Slot() for _ in range(limits.slots)]
        self.live = 0
        self.counts = Counts()
        self._features: Recent[Features] = Recent(int(limits.image_gb * 1e9), _size)
        self._rule = lru_cache(RULES)(self._make_rule)

    def _make_rule(self, temperature: float, top_p: float) -> Rule:
        how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        settings = settings_followed(self.loaded, how if temperature else {"do_sample": False}, self.length)
        assert settings is not None, "the engine has checked it"
        return Rule(settings, self.loaded.pad_id, None, 0, self.core.device)

    # --- who comes and goes

    def admit(self, waiting: deque[Answer]) -> None:
        """Read prompts from the queue's head into free slots, as many as may be read at once."""
        first, room = self.live, AT_ONCE
        starts: list[int] = []
        try:
            while waiting and self.live < len(self.slots):
                request = waiting[0].request
                room -= len(request.ids)
                shared = [self._shares(request, slot) for slot in self.slots]
                if starts and (room < 0 or max(shared[first : self.live]) >= WORTH_WAITING):
                    break
                shared[first : self.live] = [0] * len(starts)  # they are not read yet
                starts.append(self._place(waiting.popleft(), shared))
                self.live += 1
            self._prefill(first, starts)
        except Exception:
            self.fail(first)
            raise

    def leave(self, now: float) -> None:
        """Free the slots of those who went away or ran out of time."""
        for slot in self.slots[: self.live]:
            if slot.answer is not None and slot.answer.over(now):
                _end(slot, "timeout")
        self._compact()

    def fail(self, first: int = 0) -> None:
        """End the answers from a slot on; what lies there is not known any more."""
        for i in range(first, len(self.slots)):
            if self.slots[i].answer is not None:
                _end(self.slots[i], "error")
            self.slots[i] = Slot()
        self.live = first

    def _compact(self) -> None:
        """Bring the slots that are being answered to the front."""
        for i in reversed(range(self.live)):
            if self.slots[i].answer is None:
                self.live -= 1
                self._swap(i, self.live)

    def _swap(self, a: int, b: int) -> None:
        if a != b:
            self.slots[a], self.slots[b] = self.slots[b], self.slots[a]
            self.cache.swap(a, b)
            self.sides.swap(a, b)

    def _shares(self, request: Request, slot: Slot) -> int:
        """Positions of a prompt that a slot has: with the same images, all of them, or it has none."""
        if slot.images != tuple(image.key for image in request.images):
            return 0
        ids = tuple(slot.ids)
        shared = common_start([ids, request.ids], min(len(ids), len(request.ids) - 1))
        return 0 if self.core.config.image_token_id in request.ids[shared:] else shared

    def _place(self, answer: Answer, shared: Sequence[int]) -> int:
        """Give a request the slot behind the live ones, with what can be taken over; how many positions that is."""
        best = max(range(len(shared)), key=shared.__getitem__)
        free = range(self.live, len(self.slots))
        target = best if shared[best] and best >= self.live else min(free, key=lambda i: self.slots[i].used)
        slot, request = self.slots[target], answer.request
        slot.answer, answer.reused = answer, shared[best]
        self._swap(target, self.live)
        if best < self.live and shared[best]:
            self.cache.copy(best, self.live, shared[best])
            self.sides.copy(best, self.live)
        slot.ids, slot.images = list(request.ids), tuple(image.key for image in request.images)
        self.counts.prompt_tokens += len(request.ids)
        self.counts.reused_tokens += shared[best]
        return shared[best]

    # --- passes

    def step(self) -> None:
        """One more token for every answer."""
        rows = self.slots[: self.live]
        starts = [len(slot.ids) for slot in rows]
        for slot in rows:
            if slot.answer is not None:
                slot.ids.append(slot.answer.said[-1].id)
        try:
            self._advance(0, starts, [])
        except Exception:
            self.fail()
            raise
        self._compact()

    def _prefill(self, first: int, starts: Sequence[int]) -> None:
        """Read the prompts from a slot on, of which `starts` positions are there: neighbours that begin at nothing in
        one pass, which needs no mask, and neighbours that go on from something in another."""
        requests = [slot.answer.request for slot in self.slots[first : self.live] if slot.answer is not None]
        features = self._encode(requests)
        for _, group in itertools.groupby(range(len(starts)), key=lambda i: bool(starts[i])):
            members = list(group)
            projected: list[Tensor] = []
            for i in members:
                if not starts[i]:
                    own = [features[image.key] for image in requests[i].images]
                    projected += [one for one, _ in own]
                    if self.decoder is not None:
                        looks = [look for _, look in own if look is not None]
                        self.sides.put(first + i, self.decoder.look(looks, [len(looks)]))
            self._advance(first + members[0], [starts[i] for i in members], projected)
        self._compact()

    def _encode(self, requests: Sequence[Request]) -> dict[str, Features]:
        """The features of the requests' images; what is not remembered goes through the vision tower, in one pass."""
        images = {image.key: image for request in requests for image in request.images}
        found = {key: kept for key in images if (kept := self._features.get(key)) is not None}
        missing = [image for key, image in images.items() if key not in found]
        if missing:
            device, dtype = self.core.device, self.core.dtype
            inputs = stack([image.inputs for image in missing])
            inputs = {n: t.to(device, dtype) if t.is_floating_point() else t.to(device) for n, t in inputs.items()}
            made = self.core.model.get_image_features(**inputs, return_dict=True)
            looks: Sequence[Tensor | None] = getattr(made, "vision_features", None) or [None] * len(missing)
            for image, projected, look in zip(missing, made.pooler_output, looks, strict=True):
                # Copies: a view would keep what all images of the pass have in memory.
                found[image.key] = projected.to(dtype).clone(), None if look is None else look.clone()
                self._features.put(image.key, found[image.key])
            self.counts.images += len(missing)
        return found

    def _advance(self, first: int, starts: Sequence[int], images: Sequence[Tensor]) -> None:
        """Read neighbouring slots' ids from `starts` on, and say the next token of each."""
        rows = self.slots[first : first + len(starts)]
        states = self._read(first, starts, [slot.ids[start:] for slot, start in zip(rows, starts, strict=True)], images)
        answers = [slot.answer for slot in rows if slot.answer is not None]
        said = pick(self.core.lm_head(states), answers, self._rule)
        self.counts.steps += 1
        self.counts.new_tokens += len(said)
        for slot, answer, token in zip(rows, answers, said, strict=True):
            slot.used = self.counts.steps
            finish = answer.add(token)
            if finish:
                _end(slot, finish)
            elif answer.request.stream:
                answer.report()

    def _read(
        self, first: int, starts: Sequence[int], new: Sequence[Sequence[int]], images: Sequence[Tensor]
    ) -> Tensor:
        """New tokens of neighbouring slots through the model: the states at the last of each, (R, D)."""
        device, counts = self.core.device, [len(row) for row in new]
        pad, longest = self.loaded.pad_id, max(counts)
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in new], device=device)
        numbers, sees = self.cache.open(first, starts, counts, device)
        embeds = self.core.get_input_embeddings()(ids)
        if images:
            where = (ids == self.core.config.image_token_id)[..., None]
            embeds = embeds.masked_scatter(where, torch.cat(list(images)).to(embeds.dtype))
        self.cache.relook_image = self.sides.view(first, len(new))
        hidden: Tensor = self.core.model(
            inputs_embeds=embeds,
            attention_mask=None if sees is None else additive(sees, embeds.dtype),
            position_ids=numbers,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        if min(counts) == longest:
            return hidden[:, -1]
        return hidden[torch.arange(len(new), device=device), torch.tensor(counts, device=device) - 1]


def _end(slot: Slot, finish: str) -> None:
    answer, slot.answer = slot.answer, None
    assert answer is not None
    answer.report(finish)


def _size(features: Features) -> int:
    return sum(tensor.nbytes for tensor in features if tensor is not None)
