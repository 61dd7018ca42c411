"""`relook doctor`: whether this machine can do the work, and what to mend. Nothing heavy is imported at the top.

Each check says what it found; one that fails in a way that nobody foresaw says so, and the others go on.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from relook.console import output, plain_table, readable_size

OK, NOTE, WARN, FAIL = "ok", "note", "warning", "failure"
GB = 10**9
ROOM = 20 * GB  # for a model of 7B in bf16 and what a run writes
SHARED = 10**9
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")


@dataclass(frozen=True)
class Finding:
    """What a check found: "ok", "note" (something optional is absent), "warning" or "failure", and what to do."""

    check: str
    state: str
    said: str
    fix: str = ""


def examine(folder: str | Path = Path()) -> list[Finding]:
    """All checks; `folder` is where the disk's room is asked for."""
    folder = Path(folder)
    checks: Sequence[tuple[str, Callable[[], Iterator[Finding]]]] = (
        ("Python", _python),
        ("libraries", _libraries),
        ("torch", _torch),
        ("GPU", _gpu),
        ("bf16", _bf16),
        ("FlexAttention", _flex),
        ("several processes", _processes),
        ("CPU", _cpu),
        ("memory", _memory),
        ("disk", lambda: _disk(folder)),
        ("Hugging Face", _hub),
        ("browser", _browser),
    )
    found: list[Finding] = []
    for name, check in checks:
        try:
            found += check()
        except ModuleNotFoundError as error:
            found.append(Finding(name, FAIL, f"{error.name} is not installed", "pip install -e ."))
        except Exception as error:  # a broken driver or library must not hide what else is wrong
            lines = str(error).strip().splitlines() or [""]
            found.append(Finding(name, FAIL, f"{type(error).__name__}: {lines[0]}"))
    return found


def to_json(found: Sequence[Finding]) -> dict[str, Any]:
    return {"healthy": not any(one.state == FAIL for one in found), "findings": [asdict(one) for one in found]}


def print_findings(found: Sequence[Finding]) -> None:
    table = plain_table("check", "", "found", "what to do")
    for one in found:
        table.add_row(one.check, one.state, one.said, one.fix)
    output().print(table)


def _project() -> dict[str, Any]:
    """What relook asks for: pyproject.toml beside a checkout, whose installed metadata may be older; else that."""
    file = Path(__file__).parents[1] / "pyproject.toml"
    if file.is_file():
        found: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        return found
    from packaging.requirements import Requirement

    project: dict[str, Any] = {"requires-python": metadata.metadata("relook")["Requires-Python"], "dependencies": []}
    extras = project["optional-dependencies"] = {}
    for text in metadata.requires("relook") or []:
        extra = re.search(r"extra == ['\"](\w+)['\"]", text)
        wanted = Requirement(text)
        where = extras.setdefault(extra[1], []) if extra else project["dependencies"]
        where.append(f"{wanted.name}{wanted.specifier}")
    return project


def _python() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    version, wanted = platform.python_version(), _project()["requires-python"]
    good = version in SpecifierSet(wanted)
    fix = "" if good else f"Use {wanted}."
    yield Finding("Python", OK if good else FAIL, f"{version} on {platform.platform()}", fix)


def _libraries() -> Iterator[Finding]:
    """Installed versions against the supported ranges. What is an extra may be absent."""
    project = _project()
    for text in project["dependencies"]:
        yield _library(text, "", FAIL, FAIL)
    for extra, texts in project["optional-dependencies"].items():
        if extra != "dev":
            yield from (_library(text, extra, NOTE, WARN) for text in texts if not text.startswith("relook"))


def _library(text: str, extra: str, absent: str, outside: str) -> Finding:
    from packaging.requirements import Requirement

    wanted = Requirement(text)
    name = f"{wanted.name} [{extra}]" if extra else wanted.name
    install = f"pip install 'relook[{extra}]'" if extra else f"pip install '{wanted.name}{wanted.specifier}'"
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return Finding(name, absent, "not installed", install)
    if wanted.specifier.contains(version, prereleases=True):
        return Finding(name, OK, version)
    return Finding(name, outside, f"{version}, but {wanted.specifier} is supported", install)


def _torch() -> Iterator[Finding]:
    import torch

    cuda = torch.version.cuda or torch.version.hip
    yield Finding("torch", OK, f"{torch.__version__}, built {f'for CUDA {cuda}' if cuda else 'without CUDA'}")


def _gpu() -> Iterator[Finding]:
    import torch

    driver = _driver()
    if not torch.cuda.is_available():
        if driver and torch.version.cuda is None:
            yield Finding(
                "GPU", WARN, f"driver {driver}, but torch is built without CUDA", "Install a CUDA build of torch."
            )
        elif driver:
            fix = "Update the driver, or check CUDA_VISIBLE_DEVICES."
            yield Finding("GPU", WARN, f"driver {driver}, but torch {torch.__version__} sees no GPU", fix)
        else:
            yield Finding("GPU", NOTE, "none", "Toyworld runs on a CPU; models of 7B want a GPU.")
        return
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        said = f"{found.name}, compute capability {found.major}.{found.minor}, driver {driver or 'unknown'}"
        said += f", {readable_size(free)} of {readable_size(total)} free"
        busy = free < total / 2
        yield Finding(f"GPU {number}", WARN if busy else OK, said, "Another program holds its memory." if busy else "")


def _driver() -> str:
    """The NVIDIA driver's version; empty where there is none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    words = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        ended = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "that does not answer"
    return ended.stdout.split("\n")[0].strip() if ended.returncode == 0 else ""


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _bf16() -> Iterator[Finding]:
    import torch

    device = _device()
    one = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
    good = float((one @ one)[0, 0]) == 64
    native = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    fix = "" if native else "It is emulated and slow here: train with fp16 true."
    said = f"{'works' if good else 'computes wrong numbers'} on {device.type}"
    yield Finding("bf16", FAIL if not good else OK if native else WARN, said, fix)


def _flex() -> Iterator[Finding]:
    """A tiny FlexAttention against plain attention; on a GPU compiled, as the trunk uses it."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = _device()
    compiled = device.type == "cuda"
    if compiled and shutil.which(os.environ.get("CC", "gcc")) is None and shutil.which("cc") is None:
        yield Finding(
            "FlexAttention", WARN, "no C compiler, which torch.compile needs", "Install gcc; else trunk_pass dense."
        )
        return
    query, key, value = torch.randn(3, 1, 2, 128, 32, device=device, generator=torch.Generator(device).manual_seed(0))
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device=str(device))
    attend: Any = torch.compile(flex_attention) if compiled else flex_attention
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # uncompiled, it says that it is slow
        found = attend(query, key, value, block_mask=mask)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    good = torch.allclose(found, plain, atol=2e-2 if compiled else 1e-4)
    said = f"{'compiled, ' if compiled else ''}on {device.type}: {'equals' if good else 'differs from'} plain attention"
    yield Finding("FlexAttention", OK if good else FAIL, said, "" if good else "Set trunk_pass dense in recipes.")


def _processes() -> Iterator[Finding]:
    """What several processes talk through."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding("NCCL", OK, f"{version}, {gpus} GPUs")
    else:
        said = "not in this build of torch" + ("" if gpus else ", and no GPU needs it: processes talk through gloo")
        yield Finding("NCCL", WARN if gpus > 1 else NOTE, said)
    shared = Path("/dev/shm")
    if shared.is_dir():
        room = shutil.disk_usage(shared)
        small = room.free < SHARED
        fix = "Start the container with --shm-size 8g or --ipc host." if small else ""
        said = f"{readable_size(room.free)} of {readable_size(room.total)} free"
        yield Finding("/dev/shm", WARN if small else OK, said, fix)


def _cpu() -> Iterator[Finding]:
    import torch

    cores, set_to = os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS")
    said = f"{cores} cores, {torch.get_num_threads()} threads a process"
    said += f" (OMP_NUM_THREADS={set_to})" if set_to else ""
    odd = torch.get_num_threads() > cores
    fix = "More threads than cores wait for each other: lower OMP_NUM_THREADS." if odd else ""
    yield Finding("CPU", WARN if odd else OK, said, fix)


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    yield Finding("memory", OK, f"{readable_size(memory.available)} of {readable_size(memory.total)} free")


def _disk(folder: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(folder).free
    little = free < ROOM
    fix = "A 7B model and its run take about 20 GB; feature_cache disk takes more." if little else ""
    yield Finding("disk", WARN if little else OK, f"{readable_size(free)} free in {folder.resolve()}", fix)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    models = sorted(path.name for path in cache.glob("models--*")) if cache.is_dir() else []
    place = next(path for path in (cache, *cache.parents) if path.exists())
    said = f"{cache}: {len(models)} models, {readable_size(shutil.disk_usage(place).free)} free"
    said += ", offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
    writable = os.access(place, os.W_OK)
    fix = "" if writable else "It cannot be written: set HF_HOME to a folder that can."
    yield Finding("HF cache", OK if writable else WARN, said, fix)


def _browser() -> Iterator[Finding]:
    """What only the pages of `relook serve` and their tests use."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    yield Finding(
        "chromium", OK if found else NOTE, found or "not installed", "" if found else "Only for tests of pages."
    )
    gradio = importlib.util.find_spec("gradio") is not None
    yield Finding("gradio", OK if gradio else NOTE, "installed" if gradio else "not installed")
