"""What a pass of the model consists of: the tensors that `pass_layout.py` builds and `model_runner.py` runs.

Shape letters: N positions of a pass or rows of a step, T texts of a prefill.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from relook.generate.attention import ExtentReads
from relook.generate.dense_attention import DenseReads
from relook.generate.sampling import RowSampling

# Rows of a step are rounded up to these, so that a few graphs serve any number of texts.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024)
TARGET_PROGRAMS = 1024  # of the decode kernel: with fewer, extents are cut into pieces
MAX_PIECES = 16

AnyReads = list[ExtentReads] | DenseReads


@dataclass
class StepState:
    """The rows of a step, some of which belong to no text; a step changes them in place.

    Attributes:
        tokens: (N,) the last token of each row.
        ints: all integers of the rows in one tensor, so that one copy brings them to the device.
        counters: (4, N) of `ints`: each row's position and cell, tokens so far, and cells of its own extent.
        moves: (N,) of `ints`: 1, or 0 where a row belongs to no text and stays at the pool's last cell.
        reads: of the beginning that a row shares, and of its own extent.
        image: reads of the images' keys and values by the post decoder.
        logprobs: log-probabilities and ids as `token_logprobs` returns them, where any row wants them.
    """

    tokens: Tensor
    ints: Tensor
    counters: Tensor
    moves: Tensor
    reads: AnyReads
    image: AnyReads | None
    sampling: RowSampling | None
    logprobs: tuple[Tensor, Tensor] | None = None

    @property
    def rows(self) -> int:
        """Return N."""
        return len(self.tokens)

    @property
    def is_over(self) -> bool:
        """Return True if its reads serve no further step."""
        return isinstance(self.reads, DenseReads) and self.reads.step >= self.reads.steps


@dataclass(frozen=True)
class Prefill:
    """One flat pass over new positions: ids and positions (N,), cells, reads, and where each text's last one is.

    Attributes:
        image_rows: projected image features for the placeholders in `ids`, in order.
        last: (T,) indices of positions whose next token is chosen.
        image: reads of the post decoder's images: by the T texts, or by all N positions where it reads all of them.
        top: likeliest tokens that are wanted beside each chosen one; -1 where log-probabilities are not.
    """

    ids: Tensor
    positions: Tensor
    cells: Tensor
    reads: AnyReads
    image_rows: list[Tensor]
    last: Tensor
    image: AnyReads | None
    sampling: RowSampling | None
    top: int = -1


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; the host goes on at once, which takes pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def pieces_of(groups: int, key_heads: int) -> int:
    """Return into how many pieces the decode kernel cuts extents, so that its programs fill a GPU."""
    pieces = 1
    while pieces < MAX_PIECES and groups * key_heads * pieces < TARGET_PROGRAMS:
        pieces *= 2
    return pieces
