"""Tensors on disk: read one at a time from safetensors or PyTorch files, written as safetensors; sharded or not.

What a file is, is read from its first bytes. A PyTorch file is a pickle, and a pickle can run code: it is read with
`weights_only=True`, which refuses all but tensors and plain containers.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from relook.errors import CheckpointError, some
from relook.files import read_object, require_regular, write_json

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is asked for: nothing holds a whole model but the one who wants it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor) -> LazyTensor:
        return LazyTensor(tuple(tensor.shape), lambda: tensor)

    def then(self, change: Callable[[Tensor], Tensor]) -> LazyTensor:
        """The same tensor with a change that keeps its shape, made when it is read."""
        return LazyTensor(self.shape, lambda: change(self.read()))


def read_file(path: Path) -> dict[str, LazyTensor]:
    """The named tensors of one file.

    Raises:
        CheckpointError: no tensor file, a truncated one, or a pickle that holds anything but tensors.
    """
    require_regular(path)
    tensors = _read(path)
    empty = [name for name, tensor in tensors.items() if 0 in tensor.shape]
    if empty:
        raise CheckpointError(
            f"{len(empty)} of {len(tensors)} tensors in {path} are empty ({some(empty)}).",
            "DeepSpeed's ZeRO-3 leaves such files where weights are saved without being gathered: make a whole one by "
            "its zero_to_fp32.py, or save again with stage3_gather_16bit_weights_on_model_save.",
        )
    return tensors


def _read(path: Path) -> dict[str, LazyTensor]:
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from None
    if head[8:] == b"{":
        return _read_safetensors(path)
    if head[:4] == b"PK\x03\x04":
        return _read_pickle(path, mmap=True)
    if head[:1] == b"\x80":  # PyTorch's format before 1.6, which cannot be mapped into memory
        return _read_pickle(path, mmap=False)
    why = "a Git LFS pointer, not the file itself" if head == b"version h" else "no safetensors or PyTorch file"
    raise CheckpointError(f"{path} is {why}.", "Download it again.")


def _read_safetensors(path: Path) -> dict[str, LazyTensor]:
    try:
        file = safe_open(path, "pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is broken: {error}.", "Download or copy it again.") from None
    return {name: LazyTensor(shape, partial(file.get_tensor, name)) for name, shape in shapes.items()}


def _read_pickle(path: Path, mmap: bool) -> dict[str, LazyTensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickles, which are refused
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is refused: it is cut off, or holds more than tensors and could run code when loaded.",
            "Download it again from a source that you trust, as safetensors where there is a choice.",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is broken: {reason}", "Download or copy it again.") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} does not hold named tensors.", "Give a model's or an adapter's file.")
    return {str(name): LazyTensor.of(tensor) for name, tensor in content.items()}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights; none where it holds none. Safetensors go before pickles.

    Raises:
        CheckpointError: an index that names a file which is not in the folder.
    """
    return _layout(folder)[0]


def read_folder(folder: Path) -> dict[str, LazyTensor]:
    """The named tensors of a folder, sharded or not."""
    files, indexed = _layout(folder)
    if not files:
        raise CheckpointError(
            f"{folder} holds no weights.", f"One of {', '.join((*SINGLE_FILES, *INDEX_FILES))} is expected there."
        )
    tensors = {name: tensor for file in files for name, tensor in read_file(file).items()}
    missing = sorted(indexed - tensors.keys())
    if missing:
        raise CheckpointError(f"The shards of {folder} lack tensors of its index: {some(missing)}.", "Download again.")
    return tensors


def _layout(folder: Path) -> tuple[list[Path], set[str]]:
    """Weight files, and the tensors that an index names."""
    for index, single in zip(INDEX_FILES, SINGLE_FILES, strict=True):
        if (folder / index).exists():
            weight_map = read_object(folder / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{folder / index} has no weight_map.", "Download it again.")
            shards = sorted({str(shard) for shard in weight_map.values()})
            missing = [shard for shard in shards if Path(shard).name != shard or not (folder / shard).is_file()]
            if missing:
                raise CheckpointError(
                    f"{folder / index} names shards that are not in the folder: {some(missing)}.",
                    "Download them again.",
                )
            return [folder / shard for shard in shards], set(weight_map)
        if (folder / single).exists():
            return [folder / single], set()
    return [], set()


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that others may read as they may any new file: `save_file` alone makes it private."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write tensors as they come into `model.safetensors`, or into shards with an index; one shard is in memory.

    Args:
        shard_bytes: largest size of a shard; a single tensor may be larger.
    """
    held: dict[str, Tensor] = {}
    held_bytes, total = 0, 0
    parts: list[tuple[Path, list[str]]] = []

    def flush() -> None:
        part = folder / f"part-{len(parts)}.safetensors"
        save_tensors(held, part)
        parts.append((part, list(held)))
        held.clear()

    for name, tensor in tensors:
        if held and held_bytes + tensor.nbytes > shard_bytes:
            flush()
            held_bytes = 0
        # A copy of its own: tensors of one file may share memory, which safetensors does not store.
        held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        held_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(parts) == 1:
        parts[0][0].rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, (part, names) in enumerate(parts, 1):
        shard = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        part.rename(folder / shard)
        weight_map.update(dict.fromkeys(names, shard))
    write_json(folder / INDEX_FILES[0], {"metadata": {"total_size": total}, "weight_map": weight_map})
