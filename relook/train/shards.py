"""Tensors by name as safetensors files in a folder: written whole or not at all, checked by content, mapped."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from relook.console import say
from relook.errors import RelookError
from relook.files import file_hash, runs, whole_file

ENDING = ".safetensors"
DATA = "data"  # the one tensor's name inside its file


class ShardFolder:
    """A folder of tensors. A file's name ends in the hash of its bytes, so that a broken one is noticed.

    `name in folder` reads the whole file, once per process; a broken file is removed, and the answer is no. Tensors are
    views of the mapped file: pages are read when they are touched, and several processes share them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.look()

    def look(self) -> None:
        """Find out which files there are, also those of other processes."""
        self._files = {path.name.rpartition("-")[0]: path for path in self.folder.glob(f"*{ENDING}")}

    def has(self, name: str) -> bool:
        """Whether there is a file of that name, whatever is in it."""
        return name in self._files

    def __contains__(self, name: str, /) -> bool:
        path = self._files.get(name)
        if path is None:
            return False
        if path.name == _file_name(name, file_hash(path)):
            return True
        say(f"  {path} is broken: it is computed again", style="yellow")
        path.unlink()
        del self._files[name]
        return False

    def __getitem__(self, name: str, /) -> Tensor:
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(DATA)
        return tensor

    def __setitem__(self, name: str, tensor: Tensor, /) -> None:
        data = save({DATA: tensor.contiguous()})
        path = self.folder / _file_name(name, hashlib.sha256(data).hexdigest())
        try:
            with whole_file(path) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            raise RelookError(f"{path} cannot be written: {error.strerror}.", "Free some space there.") from None
        self._files[name] = path

    def tidy(self) -> None:
        """Remove what killed processes of this machine left half written."""
        for path in self.folder.glob(f".*{ENDING}.*.part"):
            if not runs(path.name.split(".")[-2]):
                path.unlink(missing_ok=True)


def _file_name(name: str, content: str) -> str:
    return f"{name}-{content[:16]}{ENDING}"
