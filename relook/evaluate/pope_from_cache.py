"""POPE from trunk states: the first answer token of every question, without a trunk pass for every variant.

Variants with a frozen trunk differ in what stands above it: post decoder and lm_head. The trunk's last hidden state at
the end of each prompt, and the vision features of each image, are computed once for the base, kept in memory and on
disk, and every variant answers from them. Models with a trunk of their own (LoRA, full), or whose post decoder reads
all positions, take one pass of their own over the same trees.

An answer whose first token is Yes or No is done: POPE's parser reads it so, unless the model goes on to contradict
itself before the first full stop ("Yes, there is no dog"). All others are generated in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from relook.console import progress
from relook.data.encode import Encoder, Example
from relook.data.images import ImageLoader, prefetch_map
from relook.data.packing import TokenRow, Tree, batch_targets, copy_to_cpu
from relook.data.samples import Question
from relook.evaluate.benchmark import YES_NO_MAX_TOKENS
from relook.evaluate.compare import kl_divergence
from relook.evaluate.tasks.pope import BENCHMARK, SPLITS, pope_questions, pope_results
from relook.files import atomic_file, write_json, write_jsonl
from relook.forward.collate import Collator, Item
from relook.forward.policy import Policy, TrunkStates, prediction_states
from relook.generate.answering import GenerationSettings, answer_questions, require_finite
from relook.generate.sampling import Sampler
from relook.model.adapters import read_adapter
from relook.model.checkpoint import parse_folder
from relook.model.families import has_post_decoder
from relook.model.load import (
    ABOVE,
    HeadModel,
    LoadedModel,
    LoadOptions,
    add_post_decoder,
    load_model,
    parse_device,
    parse_dtype,
)
from relook.model.modeling_relook import reads_tower
from relook.train.feature_cache import cache_inputs, cache_key

FIRST_FILE = "first_tokens.jsonl"
DECISIVE_MARGIN = ("Yes", "yes", "No", "no")
LogProbs = Iterator[Tensor]  # (n, vocabulary) float32, of successive questions


@dataclass(frozen=True)
class PopeTrees:
    """Distinct questions of POPE's splits as trees, one per image; `questions` are in the order of their branches."""

    questions: list[Question]
    examples: list[Example]

    @staticmethod
    def of(encoder: Encoder, questions: Sequence[Question]) -> PopeTrees:
        by_image: dict[Path, dict[str, Question]] = {}
        for question in questions:
            by_image.setdefault(question.image, {}).setdefault(question.text, question)
        distinct = [question for group in by_image.values() for question in group.values()]
        examples = []
        # All questions on an image share its prefix, so the trunk computes the image once.
        for image, group in by_image.items():
            rows = [encoder.prompt(text, [image]) for text in group]
            # One supervised token more, whichever: the state at the prompt's end is the one that predicts it.
            tree = Tree.of([TokenRow((*ids, 0), (*[False] * len(ids), True)) for ids in rows])
            examples.append(Example(image.name, tree, (image,)))
        return PopeTrees(distinct, examples)


@dataclass(frozen=True)
class AnswerStates:
    """Trunk states that predict the answers' first tokens, (S, D) for each tree, and the features of its image."""

    states: list[Tensor]
    features: list[Tensor] | None  # (M, V) each

    def save(self, path: Path, key: str) -> None:
        tensors = {}
        for name, parts in (("states", self.states), ("features", self.features or [])):
            if parts:  # pieces of different lengths are stored end to end, with their lengths
                tensors[name] = torch.cat(parts)
                tensors[f"{name}.lengths"] = torch.tensor([len(part) for part in parts])
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, {"key": key})

    @staticmethod
    def load(path: Path, key: str) -> AnswerStates | None:
        """Read what `save` wrote under that key; None if the file is missing, damaged or has another key."""
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("key") != key:
                    return None
                parts = {
                    name: list(file.get_tensor(name).split(file.get_tensor(f"{name}.lengths").tolist()))
                    for name in ("states", "features")
                    if name in file.keys()  # noqa: SIM118 (not a dict)
                }
        except (OSError, SafetensorError):
            return None
        return AnswerStates(parts["states"], parts.get("features"))


def first_log_probs(policy: Policy, trunk: TrunkStates) -> Tensor:
    """Compute log p of every first answer token, (N, vocabulary) float32."""
    logits = policy.core.lm_head(prediction_states(policy.post_decoder, trunk))
    log_probs: Tensor = logits.float().log_softmax(-1)
    return log_probs


class CachedPope:
    """Evaluate many models that share one base on one set of POPE questions.

    Args:
        base: the model whose trunk the others share.
        data: folder with pope/ and val2014/, as `relook eval` takes it.
        states: the file that keeps the base's trunk states.
        template: conversation template.
        loading: how models come into memory.
        max_new_tokens: upper bound on answers that are generated in full, YES_NO_MAX_TOKENS at most.
    """

    def __init__(
        self,
        base: Path,
        data: Path,
        states: Path,
        template: str,
        loading: LoadOptions,
        batch_size: int = 64,
        max_new_tokens: int = YES_NO_MAX_TOKENS,
    ) -> None:
        self.base, self.file, self.loading = base, states, loading
        self.dtype, self.device = parse_dtype(loading.dtype), parse_device(loading.device)
        self.settings = GenerationSettings(template, min(max_new_tokens, YES_NO_MAX_TOKENS), batch_size)
        self.images = max(1, batch_size // 8)  # trees a batch: each holds up to 18 questions
        self.data, self.splits = data, pope_questions(data)

    @cached_property
    def loaded(self) -> LoadedModel:
        """Load the base; see `release`."""
        return self.loading.load(self.base)

    @cached_property
    def keeps_tower(self) -> bool:
        """Return True if the vision features beside the base's states are the tower's."""
        return reads_tower(self.loaded.core.config)

    def release(self) -> None:
        """Free the base's weights, after computing what other models need of it."""
        _ = self.base_log_probs, self.decisive, self.keeps_tower
        self.loaded.model = None

    @cached_property
    def decisive(self) -> dict[int, str]:
        """Return the tokens that decide an answer when they are its likeliest first token, with their text.

        Empty if the model's generation settings do more than take the likeliest token.
        """
        tokenizer, trees = self.loaded.processor.tokenizer, [example.tree for example in self.prompts.examples]
        longest = max(len(tree.prefix) + len(branch.ids) for tree in trees for branch in tree.branches)
        rule = Sampler.of(self.loaded, self.settings.template, self.settings.generate_arguments, longest)
        if rule is None:
            return {}
        # A token that sampling never chooses cannot be the first, however likely it is.
        suppressed = {*rule.never, *rule.not_first}
        # Several tokens decode to the same word, with and without a leading space: all of them count.
        words = {token: tokenizer.decode([token]).strip() for token in range(len(tokenizer))}
        return {token: word for token, word in words.items() if word in DECISIVE_MARGIN and token not in suppressed}

    @cached_property
    def prompts(self) -> PopeTrees:
        questions = [question for split in SPLITS for question in self.splits[split]]
        return PopeTrees.of(self.loaded.encoder(self.settings.template), questions)

    @cached_property
    def states(self) -> AnswerStates:
        """Read the base's states from the file, or compute and save them if its key differs."""
        model = self.loaded.model
        if not has_post_decoder(model.config):  # add one that is never run, so that the vision features come out
            model = add_post_decoder(model, {}, None)
        policy, examples = Policy(model), self.prompts.examples
        bits, images = str(self.loading.bits), self.loaded.images
        key = cache_key(
            cache_inputs(self.base, self.loading.vision_tower, policy, self.dtype, examples, images, bits=bits)
        )
        stored = AnswerStates.load(self.file, key)
        if stored is None:
            stored = self._compute(policy)
            stored.save(self.file, key)
        return stored

    def _compute(self, policy: Policy) -> AnswerStates:
        states: list[Tensor] = []
        features: list[Tensor] = []
        for trunk in self._passes(policy, self.loaded.images, "trunk states of the questions"):
            counts = (trunk.targets.kept_branch >= 0).sum(1).tolist()
            # Drop the padding of the batch, and clone: a view would keep the whole batch in memory.
            on_cpu = copy_to_cpu(trunk.states)
            states += [of_tree[:count].clone() for of_tree, count in zip(on_cpu, counts, strict=True)]
            features += [copy_to_cpu(of_image).clone() for of_image in trunk.features or []]
        return AnswerStates(states, features or None)

    @torch.inference_mode()
    def _passes(self, policy: Policy, images: ImageLoader, title: str) -> Iterator[TrunkStates]:
        """Run the trunk over the trees, batch by batch."""
        policy.eval()
        collator = Collator(policy, images, self.loaded.pad_id)
        examples = self.prompts.examples
        with progress(title) as report:
            items = [Item(example) for example in examples]
            batches = [items[start : start + self.images] for start in range(0, len(items), self.images)]
            done = 0
            for batch, live in zip(batches, prefetch_map(collator.live_batch, batches), strict=True):
                yield policy.trunk(live.to(policy.core.device))
                done += len(batch)
                report(done, len(items))

    @torch.inference_mode()
    def _from_states(self, policy: Policy) -> LogProbs:
        states, features = self.states.states, self.states.features
        for start in range(0, len(states), self.images):
            here = slice(start, start + self.images)
            trees = [example.tree for example in self.prompts.examples[here]]
            padded = pad_sequence(states[here], batch_first=True)  # (trees, longest S, D)
            trunk = TrunkStates(padded, features[here] if features else None, [1] * len(trees), batch_targets(trees))
            yield first_log_probs(policy, trunk.to(self.device))

    @torch.inference_mode()
    def _live(self, loaded: LoadedModel) -> LogProbs:
        policy = Policy(loaded.model)
        for trunk in self._passes(policy, loaded.images, "first answer tokens"):
            yield first_log_probs(policy, trunk)

    def log_probs(self, model: Path, load: Callable[[], LoadedModel]) -> LogProbs:
        """Yield first-token log-probs of the base or of a model trained on it, in the order of `prompts.questions`."""
        if shares_trunk(model, self.base):
            tower = self.loading.vision_tower if model == self.base else None
            above = load_model(model, None, tower, self.dtype, device=self.device, trunk=False)
            policy = Policy(HeadModel(above.model))
            # A post decoder with self-attention reads every position of the prompt; the states are those at its end, of
            # images as the base gets them. And it may look at other features than those that were kept.
            same_images = above.images.aspect_ratio == self.loaded.images.aspect_ratio
            if not policy.needs_all_states and same_images and reads_tower(policy.config) == self.keeps_tower:
                return self._from_states(policy)
        return self._live(load())

    @cached_property
    def base_log_probs(self) -> Tensor:
        """Compute the base's log-probs of first tokens, (questions, vocabulary)."""
        return torch.cat(list(self.log_probs(self.base, lambda: self.loaded)))

    def evaluate(self, model: Path, out: Path) -> dict[str, Any]:
        """Answer and score all splits; writes `relook eval`'s files and FIRST_FILE under `out`.

        Returns:
            As `relook eval pope`, with the number of questions that were `generated` in full.
        """
        if model == self.base:
            loading: Callable[[], LoadedModel] = lambda: self.loaded  # noqa: E731
        else:
            loading = cache(lambda: replace(self.loading, vision_tower=None).load(model))  # a run names its own
        records = self._first_tokens(model, loading)
        # First tokens that settle nothing ("The", "There"): these questions are generated in full.
        waiting = [index for index, record in enumerate(records) if record["generated"]]
        if waiting:
            questions = [(self.prompts.questions[i].image, self.prompts.questions[i].text) for i in waiting]
            with progress("answers generated in full") as report:
                for number, text in answer_questions(loading(), questions, self.settings, report):
                    records[waiting[number]]["answer"] = text
        # A question may be in several splits, each of which has an answer file of its own.
        by_question = {(record["image"], record["question"]): record for record in records}
        generated = {}
        for split, questions_of in self.splits.items():
            of_split = [by_question[question.image.name, question.text] for question in questions_of]
            answers = [BENCHMARK.record(q, record["answer"]) for q, record in zip(questions_of, of_split, strict=True)]
            write_jsonl(out / f"pope_{split}.jsonl", answers)
            generated[split] = sum(record["generated"] for record in of_split)
        results = pope_results(self.data, out)
        for split, count in generated.items():
            results[split]["generated"] = count
        write_jsonl(out / FIRST_FILE, records)
        write_json(out / "pope.json", results)
        return results

    def _first_tokens(self, model: Path, load: Callable[[], LoadedModel]) -> list[dict[str, Any]]:
        """Build one record per distinct question: its first token and the KL divergence from the base, in nats."""
        tokenizer = self.loaded.processor.tokenizer
        records: list[dict[str, Any]] = []
        for log_probs in self.log_probs(model, load):
            require_finite(log_probs.isfinite().all())
            # Batches come in the order of the questions, so the number of records so far is the offset in the base's.
            base = self.base_log_probs[len(records) : len(records) + len(log_probs)]
            kl = kl_divergence(log_probs, base).tolist()
            for token, distance in zip(log_probs.argmax(-1).tolist(), kl, strict=True):
                question = self.prompts.questions[len(records)]
                word = self.decisive.get(token)
                record = {"image": question.image.name, "question": question.text, "label": question.label}
                record |= {"first": tokenizer.decode([token]), "kl": distance}
                records.append({**record, "answer": word, "generated": word is None})
        return records


def shares_trunk(model: Path, base: Path) -> bool:
    """Return True if a model differs from the base in post decoder and lm_head alone, as its files say."""
    if model.resolve() == base.resolve():
        return True
    run = parse_folder(model)
    if run.kind != "run" or run.previous or run.base.path.resolve() != base.resolve():
        return False
    change = read_adapter(run)
    return not change.lora and all(name.startswith(ABOVE) for name in change.tensors)
