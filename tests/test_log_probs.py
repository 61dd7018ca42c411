"""Log-probabilities of logits: against torch's own cross-entropy, and gradients against differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from relook.forward import policy
from relook.forward.policy import LogProb, log_prob


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts, the last one shorter."""
    monkeypatch.setattr(policy, "ROWS", 3)


def drawn(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(rows, 11, generator=generator)).to(dtype).requires_grad_(True)
    return logits, torch.randint(0, 11, (rows,), generator=generator)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])  # a compiler takes seconds
@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_it_is_torchs_cross_entropy(rows: int, dtype: torch.dtype, off: float, compiled: bool) -> None:
    logits, ids = drawn(rows, dtype)
    weight = torch.arange(1.0, rows + 1)
    found = log_prob(logits, ids, compiled)
    assert found.dtype == torch.float32
    (found * weight).sum().backward()
    gradient, logits.grad = logits.grad, None
    expected = -F.cross_entropy(logits.float(), ids, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (expected * weight).sum().backward()
    torch.testing.assert_close(gradient, logits.grad, rtol=off, atol=off)


def test_its_gradient_is_that_of_differences() -> None:
    logits, ids = drawn(7, torch.float64)
    assert torch.autograd.gradcheck(lambda values: LogProb.apply(values, ids, False), logits)


def test_a_word_that_cannot_be_said() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    found = log_prob(logits, torch.tensor([2]))
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
