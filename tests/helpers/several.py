"""What tests do in processes of their own. Run by torchrun, it carries out recipes, given as a JSON list."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from relook import distributed
from relook.cli import main
from relook.distributed import full_shape
from relook.files import write_json
from relook.forward.collate import Collator
from relook.recipe import build_recipe
from relook.train import cache_store, run, trainer

notes: dict[str, Any] = {}
collate, prepared, save_trained = Collator.__call__, trainer.RelookTrainer._prepare_for_training, trainer.save_trained
write_bytes = Path.write_bytes
kill = 0


def train_all(recipes: Sequence[dict[str, Any]]) -> None:
    """Carry out recipes, given as their keys, one after the other.

    Each process leaves notes beside a run's folder: which of its batches had images, and what share of the parameters
    it held. A recipe with "kill" ends with all processes killed in the middle of writing that checkpoint.
    """
    global kill
    Collator.__call__ = noted_batch  # type: ignore[method-assign]
    trainer.RelookTrainer._prepare_for_training = noted_shares
    trainer.save_trained = killed_save
    for keys in recipes:
        kill = keys.pop("kill", 0)
        notes["images"] = []
        out = run.train(build_recipe(keys))
        write_json(out.with_name(f"{out.name}-{distributed.rank()}.json"), notes)


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
        if distributed.is_main():
            path.write_bytes(path.read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)


def fill_cache(keys: dict[str, Any], shard_bytes: int, positions: int, cut: str = "") -> None:
    """Train on small shards; killed while it writes the shard `cut`."""

    def cut_off(path: Path, data: bytes) -> int:
        if cut and path.name.startswith(cut):
            write_bytes(path, data[:1000])
            os.kill(os.getpid(), signal.SIGKILL)
        return write_bytes(path, data)

    cache_store.SHARD_BYTES, cache_store.BATCH_POSITIONS = shard_bytes, positions
    cache_store.Path.write_bytes = cut_off  # type: ignore[method-assign, assignment]
    run.train(build_recipe(keys))


def command(*words: str) -> None:
    """`relook` with these words."""
    sys.argv = ["relook", *words]
    main()


if __name__ == "__main__":
    train_all(json.loads(sys.argv[1]))
