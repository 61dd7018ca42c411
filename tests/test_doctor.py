"""`relook doctor`: what is missing or does not fit is named, without a traceback; what known warnings mean."""

from __future__ import annotations

import inspect
import json
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from typing import Any

import accelerate.state
import pytest
import torch.distributed.run
import torch.utils.checkpoint
import transformers.configuration_utils
import transformers.tokenization_utils_base
from helpers.command import Command

from relook import doctor
from relook.doctor import FAIL, KNOWN_WARNINGS, NOTE, OK, WARN, CheckResult, find_known_warnings, run_checks, to_json


def state(results: list[CheckResult], check: str) -> str:
    return next(one.state for one in results if one.check == check)


def test_the_environment_of_the_tests_is_healthy(relook: Command) -> None:
    ended = relook("doctor", "--json")
    report = json.loads(ended.out)
    failures = [one for one in report["findings"] if one["state"] == FAIL]
    assert (ended.status, report["healthy"], failures) == (0, True, [])
    names = [one["check"].partition(" [")[0] for one in report["findings"]]
    assert len(names) == len(set(names))  # no library twice
    checks = {one["check"] for one in report["findings"]}
    assert {"Python", "torch", "transformers", "bf16", "FlexAttention", "disk", "HF cache", "CPU", "NCCL"} <= checks


def test_a_library_that_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch, relook: Command) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("peft", "bitsandbytes"):
            raise metadata.PackageNotFoundError(name)
        return {"transformers": "4.37.2", "pyarrow": "3.0"}.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    results = list(doctor._libraries())
    assert state(results, "peft") == state(results, "transformers") == FAIL
    assert (state(results, "bitsandbytes [quant]"), state(results, "pyarrow [data]")) == (NOTE, WARN)
    [peft] = [one for one in results if one.check == "peft"]
    assert (peft.message, peft.fix) == ("not installed", "pip install 'peft<0.22,>=0.18'")
    ended = relook("doctor")
    assert ended.status == 1
    shown = ended.out
    assert "4.37.2, but <5.25,>=5.10.1 is supported" in shown
    assert "FlexAttention" in shown


def test_without_torch_the_other_checks_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what an import then finds
    results = run_checks()
    assert [one.message for one in results if one.check == "FlexAttention"] == ["torch is not installed"]
    assert state(results, "disk") in (OK, WARN)
    assert state(results, "numpy") == OK
    assert not to_json(results)["healthy"]


def test_a_check_that_breaks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA driver initialization failed\nand more lines")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    results = run_checks()
    assert [one.message for one in results if one.check == "bf16"] == [
        "RuntimeError: CUDA driver initialization failed"
    ]
    assert state(results, "memory") == OK


def test_little_room_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage(64 << 20, 0, 64 << 20))
    assert [one.state for one in doctor._disk(Path())] == [WARN]
    [shared] = [one for one in doctor._processes() if one.check == "/dev/shm"]
    assert (shared.state, "--shm-size" in shared.fix) == (WARN, True)


def test_metadata_is_read_where_there_is_no_pyproject(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "relook" / "doctor.py"))
    results = list(doctor._libraries())
    assert state(results, "transformers") == OK
    assert [one.state for one in doctor._python()] == [OK]


# As the libraries print them (torch 2, transformers, accelerate, DeepSpeed, LLaVA, Pillow).
SAID = {
    "OMP_NUM_THREADS": "*** Setting OMP_NUM_THREADS environment variable for each process to be 1 in default, to avoid",
    "device-side assert": "RuntimeError: CUDA error: device-side assert triggered\nCUDA kernel errors might be",
    "NCCL device of a barrier": "[PG 0 Rank 0]  using GPU 0 to perform barrier as devices used by this process are "
    "currently unknown. This can potentially cause a hang if this rank to GPU mapping is incorrect.",
    "process group left open": "Warning: WARNING: destroy_process_group() was not called before program exit",
    "NCCL timeout": "[E ProcessGroupNCCL.cpp:616] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(",
    "DeepSpeed extensions": " [WARNING]  async_io requires the dev libaio .so object and headers but these were not",
    "DeepSpeed compiler": "deepspeed.ops.op_builder.builder.MissingCUDAException: CUDA_HOME does not exist",
    "DeepSpeed accelerator": "[INFO] [real_accelerator.py:203:get_accelerator] Setting ds_accelerator to cuda (auto)",
    "DeepSpeed's own NCCL": "[WARNING] [comm.py:152:init_deepspeed_backend] NCCL "
    "backend in DeepSpeed not yet implemented",
    "allocator cache flushes": "[WARNING] [stage3.py:2114:step] 3 pytorch allocator cache flushes since last step. "
    "this happens when there is high memory pressure and is detrimental to performance.",
    "token estimate": "Could not estimate the number of tokens of the input, floating-point operations will not be "
    "computed",
    "columns of DPODataCollatorWithPadding": "UserWarning: When using DPODataCollatorWithPadding, you should set "
    "`remove_unused_columns=False` in your TrainingArguments we have set it for you",
    "cuBLAS": "RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmStridedBatchedEx("
    "handle, opa, opb, (int)m, (int)n, (int)k, (void*)&falpha, a, CUDA_R_16BF, (int)lda, stridea`",
    "tokenizer length": "Token indices sequence length is longer than the specified maximum sequence length for this "
    "model (2412 > 2048). Running this sequence through the model will result in indexing errors",
    "tokenization mismatch": "WARNING: tokenization mismatch: 1 vs. 57. (ignored)",
    "tokenizers after a fork": "huggingface/tokenizers: The current process just got forked, after parallelism has "
    "already been used. Disabling parallelism to avoid deadlocks...",
    "random weights": "You should probably TRAIN this model on a down-stream task to be able to use it for predictions "
    "and inference. Some weights of LlavaForConditionalGeneration were not initialized from the model checkpoint",
    "shared memory": "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory. Please try to raise your shared memory limit.",
    "broken image": "OSError: image file is truncated (12 bytes not processed)",
}


@pytest.mark.parametrize("name", SAID)
def test_a_known_warning_is_explained(name: str) -> None:
    assert [notice.name for notice in find_known_warnings(SAID[name])] == [name]


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("OMP_NUM_THREADS", torch.distributed.run),
        ("tokenizer length", transformers.tokenization_utils_base),
        ("peer to peer", accelerate.state),
        ("recomputation without gradients", torch.utils.checkpoint),
    ],
)
def test_the_installed_libraries_say_it_so(name: str, module: Any) -> None:
    assert name in [notice.name for notice in find_known_warnings(inspect.getsource(module))]


def test_a_log_and_all(relook: Command) -> None:
    ended = relook("doctor", "--explain", "-", "--json", stdin="\n".join(("step 1", *SAID.values())))
    assert ended.status == 0
    assert {one["name"] for one in json.loads(ended.out)} == SAID.keys()
    ended = relook("doctor", "--explain", "all")
    assert (ended.status, ended.out.count("  Here: ")) == (0, len(KNOWN_WARNINGS))
    assert relook("doctor", "--explain", "nothing that is known").status == 1
    assert find_known_warnings("loss 0.69, grad_norm 1.0") == []
