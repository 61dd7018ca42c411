"""Run by torchrun: carries out recipes, given as a JSON list of key mappings, one after the other.

Each process leaves notes beside a run's folder: which of its batches had images, and what share of the parameters it
held. A recipe with "kill" ends with all processes killed in the middle of writing that checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from relook.files import write_json
from relook.model.sharded import full_shape
from relook.recipe import build_recipe
from relook.train import run, trainer
from relook.train.batches import Collator

notes: dict[str, Any] = {}
collate, prepared, save_trained = Collator.__call__, trainer.RelookTrainer._prepare_for_training, trainer.save_trained
kill = 0


def noted_batch(self: Collator, items: Any) -> dict[str, Any]:
    if self.policy.training:
        notes["images"].append(any(item.example.images for item in items))
    return collate(self, items)


def noted_shares(self: Any, *arguments: Any) -> Any:
    made = prepared(self, *arguments)
    parameters = list(self.model.parameters())
    here = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    notes["held"] = here / sum(full_shape(p).numel() for p in parameters)
    return made


def killed_save(model: Any, path: Path, *rest: Any) -> None:
    save_trained(model, path, *rest)
    if kill and path.parent.name == f"checkpoint-{kill}":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    Collator.__call__ = noted_batch  # type: ignore[method-assign]
    trainer.RelookTrainer._prepare_for_training = noted_shares
    trainer.save_trained = killed_save
    for keys in json.loads(sys.argv[1]):
        kill = keys.pop("kill", 0)
        notes["images"] = []
        out = run.train(build_recipe(keys))
        write_json(out.with_name(f"{out.name}-{os.environ['RANK']}.json"), notes)
