"""`relook doctor`: check if this machine can train and serve, and say what to fix.

Nothing heavy is imported at the top, because a broken library is one of the results. A check that fails with an
unexpected error reports it, and the others go on.
"""

from __future__ import annotations

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

from relook.console import plain_table, readable_size, status, stdout_console

# ----------------------------------------------------------------------------------------------------

OK, NOTE, WARN, FAIL = "ok", "note", "warning", "failure"
GB = 10**9
MIN_DISK = 20 * GB  # for a model of 7B in bf16 and what a run writes
MIN_SHARED_MEMORY = GB  # in /dev/shm, through which worker processes pass tensors
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")


@dataclass(frozen=True)
class CheckResult:
    """Result of a check: "ok", "note" (something optional is absent), "warning" or "failure", and what to do."""

    check: str
    state: str
    message: str
    fix: str = ""


def run_checks(folder: str | Path = Path()) -> list[CheckResult]:
    """Run all checks; `folder` is where free disk space is measured."""
    folder = Path(folder)
    # In this order: a missing library explains later failures.
    checks: Sequence[tuple[str, Callable[[], Iterator[CheckResult]]]] = (
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
    results: list[CheckResult] = []
    for name, check in checks:
        try:
            results += check()
        except ModuleNotFoundError as error:
            results.append(CheckResult(name, FAIL, f"{error.name} is not installed", "pip install -e ."))
        except Exception as error:  # a broken driver or library must not hide what else is wrong
            lines = str(error).strip().splitlines() or [""]
            results.append(CheckResult(name, FAIL, f"{type(error).__name__}: {lines[0]}"))
    return results


def to_json(results: Sequence[CheckResult]) -> dict[str, Any]:
    healthy = not any(result.state == FAIL for result in results)
    return {"healthy": healthy, "findings": [asdict(result) for result in results]}


def print_findings(results: Sequence[CheckResult]) -> None:
    table = plain_table("check", "", "found", "what to do")
    for result in results:
        table.add_row(result.check, result.state, result.message, result.fix)
    stdout_console().print(table)


def _project() -> dict[str, Any]:
    """Return relook's requirements: pyproject.toml's `project` table, or the same from the installed metadata."""
    # A checkout's own file comes first, since its installed metadata may be older.
    path = Path(__file__).parents[1] / "pyproject.toml"
    if path.is_file():
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        return table
    from packaging.requirements import Requirement

    project: dict[str, Any] = {"requires-python": metadata.metadata("relook")["Requires-Python"], "dependencies": []}
    extras = project["optional-dependencies"] = {}
    for text in metadata.requires("relook") or []:
        extra = re.search(r"extra == ['\"](\w+)['\"]", text)
        requirement = Requirement(text)
        group = extras.setdefault(extra[1], []) if extra else project["dependencies"]
        group.append(f"{requirement.name}{requirement.specifier}")
    return project


def _python() -> Iterator[CheckResult]:
    from packaging.specifiers import SpecifierSet

    version, supported = platform.python_version(), _project()["requires-python"]
    good = version in SpecifierSet(supported)
    fix = "" if good else f"Use {supported}."
    yield CheckResult("Python", OK if good else FAIL, f"{version} on {platform.platform()}", fix)


def _libraries() -> Iterator[CheckResult]:
    """Compare installed versions with the supported ranges; libraries of an extra may be absent."""
    project = _project()
    for text in project["dependencies"]:
        yield _library(text, "", FAIL, FAIL)
    # A library of several extras is checked once, for the first of them.
    seen = {"relook", *(_name(text) for text in project["dependencies"])}
    for extra, texts in project["optional-dependencies"].items():
        for text in texts:
            if extra != "dev" and _name(text) not in seen:
                seen.add(_name(text))
                yield _library(text, extra, NOTE, WARN)


def _name(requirement: str) -> str:
    from packaging.requirements import Requirement

    return Requirement(requirement).name


def _library(text: str, extra: str, absent: str, outside: str) -> CheckResult:
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    name = f"{requirement.name} [{extra}]" if extra else requirement.name
    install = f"pip install 'relook[{extra}]'" if extra else f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return CheckResult(name, absent, "not installed", install)
    # A nightly build of a supported version is one.
    if requirement.specifier.contains(version, prereleases=True):
        return CheckResult(name, OK, version)
    return CheckResult(name, outside, f"{version}, but {requirement.specifier} is supported", install)


def _torch() -> Iterator[CheckResult]:
    import torch

    cuda = torch.version.cuda or torch.version.hip
    yield CheckResult("torch build", OK, f"{torch.__version__}, built {f'for CUDA {cuda}' if cuda else 'without CUDA'}")


def _gpu() -> Iterator[CheckResult]:
    import torch

    driver = _driver()
    # Three reasons for no GPU: torch's build, the driver, or none in the machine, which is no fault.
    if not torch.cuda.is_available():
        if driver and torch.version.cuda is None:
            yield CheckResult(
                "GPU", WARN, f"driver {driver}, but torch is built without CUDA", "Install a CUDA build of torch."
            )
        elif driver:
            fix = "Update the driver, or check CUDA_VISIBLE_DEVICES."
            yield CheckResult("GPU", WARN, f"driver {driver}, but torch {torch.__version__} sees no GPU", fix)
        else:
            yield CheckResult("GPU", NOTE, "none", "Toyworld runs on a CPU; models of 7B want a GPU.")
        return
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        message = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, driver {driver or 'unknown'}"
        message += f", {readable_size(free)} of {readable_size(total)} free"
        busy = free < total / 2
        yield CheckResult(
            f"GPU {number}", WARN if busy else OK, message, "Another program holds its memory." if busy else ""
        )


def _driver() -> str:
    """Return the NVIDIA driver's version; empty without a driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    words = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        # A hung driver hangs nvidia-smi too.
        ended = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "that does not answer"
    return ended.stdout.split("\n")[0].strip() if ended.returncode == 0 else ""


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _bf16() -> Iterator[CheckResult]:
    import torch

    device = _device()
    ones = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
    good = float((ones @ ones)[0, 0]) == 64
    native = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    fix = "" if native else "It is emulated and slow here: train with fp16 true."
    message = f"{'works' if good else 'computes wrong numbers'} on {device.type}"
    yield CheckResult("bf16", FAIL if not good else OK if native else WARN, message, fix)


def _flex() -> Iterator[CheckResult]:
    """Compare a tiny FlexAttention with plain attention; on a GPU it is compiled, as the trunk uses it."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = _device()
    compiled = device.type == "cuda"
    if compiled and shutil.which(os.environ.get("CC", "gcc")) is None and shutil.which("cc") is None:
        yield CheckResult(
            "FlexAttention", WARN, "no C compiler, which torch.compile needs", "Install gcc; else trunk_pass dense."
        )
        return
    # Batch 1, 2 heads, 128 positions, width 32: one block of the mask.
    query, key, value = torch.randn(3, 1, 2, 128, 32, device=device, generator=torch.Generator(device).manual_seed(0))
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device=str(device))
    attend: Any = torch.compile(flex_attention) if compiled else flex_attention
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # uncompiled, it says that it is slow
        attended = attend(query, key, value, block_mask=mask)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    # Compiled kernels multiply in TF32, which keeps 10 bits.
    good = torch.allclose(attended, plain, atol=2e-2 if compiled else 1e-4)
    relation = "equals" if good else "differs from"
    message = f"{'compiled, ' if compiled else ''}on {device.type}: {relation} plain attention"
    fix = "" if good else "Set trunk_pass dense in recipes."
    yield CheckResult("FlexAttention", OK if good else FAIL, message, fix)


def _processes() -> Iterator[CheckResult]:
    """Check what several processes communicate through: NCCL and shared memory."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version()))
        yield CheckResult("NCCL", OK, f"{version}, {gpus} GPUs")
    else:
        message = "not in this build of torch" + ("" if gpus else ", and no GPU needs it: processes talk through gloo")
        yield CheckResult("NCCL", WARN if gpus > 1 else NOTE, message)
    shared = Path("/dev/shm")
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        small = usage.free < MIN_SHARED_MEMORY  # containers often get 64 MB
        fix = "Start the container with --shm-size 8g or --ipc host." if small else ""
        message = f"{readable_size(usage.free)} of {readable_size(usage.total)} free"
        yield CheckResult("/dev/shm", WARN if small else OK, message, fix)


def _cpu() -> Iterator[CheckResult]:
    import torch

    cores, omp_threads = os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS")
    message = f"{cores} cores, {torch.get_num_threads()} threads a process"
    message += f" (OMP_NUM_THREADS={omp_threads})" if omp_threads else ""
    oversubscribed = torch.get_num_threads() > cores
    fix = "More threads than cores wait for each other: lower OMP_NUM_THREADS." if oversubscribed else ""
    yield CheckResult("CPU", WARN if oversubscribed else OK, message, fix)


def _memory() -> Iterator[CheckResult]:
    import psutil

    memory = psutil.virtual_memory()
    yield CheckResult("memory", OK, f"{readable_size(memory.available)} of {readable_size(memory.total)} free")


def _disk(folder: Path) -> Iterator[CheckResult]:
    free = shutil.disk_usage(folder).free
    little = free < MIN_DISK
    fix = "A 7B model and its run take about 20 GB; feature_cache disk takes more." if little else ""
    yield CheckResult("disk", WARN if little else OK, f"{readable_size(free)} free in {folder.resolve()}", fix)


def _hub() -> Iterator[CheckResult]:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    models = sorted(path.name for path in cache.glob("models--*")) if cache.is_dir() else []
    # The cache may not exist yet: its nearest existing parent decides.
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    message = f"{cache}: {len(models)} models, {readable_size(shutil.disk_usage(existing).free)} free"
    message += ", offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
    writable = os.access(existing, os.W_OK)
    fix = "" if writable else "It cannot be written: set HF_HOME to a folder that can."
    yield CheckResult("HF cache", OK if writable else WARN, message, fix)


def _browser() -> Iterator[CheckResult]:
    """Check for what only the pages of `relook serve` and their tests use."""
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    yield CheckResult(
        "chromium", OK if browser else NOTE, browser or "not installed", "" if browser else "Only for tests of pages."
    )


# ----------------------------------------------------------------------------------------------------
# Warnings and errors of torch, transformers and the like that users meet, and what they mean in relook, for
# `relook doctor --explain`. Patterns are searched without regard to case.


@dataclass(frozen=True)
class KnownWarning:
    """Known message: a pattern that finds it, what it says, and what it means in relook or what to do."""

    name: str
    pattern: str
    meaning: str
    in_relook: str


KNOWN_WARNINGS = (
    KnownWarning(
        "OMP_NUM_THREADS",
        r"Setting OMP_NUM_THREADS environment variable",
        "torchrun gives each process one CPU thread, so that several do not fight for the same cores.",
        "Harmless on GPUs: images are read by threads of relook's own. Training or answering on a CPU alone, set "
        "OMP_NUM_THREADS to cores divided by processes.",
    ),
    KnownWarning(
        "device-side assert",
        r"device-side assert|srcIndex < srcSelectDimSize|indexSelectLargeIndex|vectorized_gather_kernel",
        "A kernel was given an index outside its table: mostly a token id that the model has no embedding for. The "
        "line that the error names is not the one to blame, and the process cannot go on.",
        "relook checks ids and numbers of images when samples and prompts are encoded, on the CPU, and names the "
        "sample. In a program of your own: use the model's own tokenizer (LLaVA's marks an image with -200, outside "
        "the vocabulary), or run with CUDA_LAUNCH_BLOCKING=1 to see the real line.",
    ),
    KnownWarning(
        "NCCL device of a barrier",
        r"devices? used by this process (are|is) currently unknown|No device id is provided via",
        "A barrier came before the process had said which GPU is its own. It hangs only where processes and GPUs do "
        "not correspond by number.",
        "Harmless under torchrun, where process n uses GPU n.",
    ),
    KnownWarning(
        "process group left open",
        r"destroy_process_group\(\) was not called",
        "The program ended without closing NCCL.",
        "Harmless at a normal end. relook closes it after a run; after an error it leaves it, since the others may "
        "wait.",
    ),
    KnownWarning(
        "NCCL timeout",
        r"Watchdog caught collective operation timeout|collective operation timeout|"
        r"Some NCCL operations have failed or timed out",
        "One process waited for others that never came: one of them has failed, or does another thing.",
        "Look for the first error of any process. Batches without images do not cause it: they are given a blank one.",
    ),
    KnownWarning(
        "NCCL over the network",
        r"NCCL WARN|NCCL INFO|NET/IB : No device found|unhandled (system|cuda) error",
        "NCCL's own log. 'No device found' under NET/IB says that there is no InfiniBand, and that it takes sockets.",
        "INFO is no fault (unset NCCL_DEBUG). For a system error set NCCL_DEBUG=INFO and read the line before it: "
        "often /dev/shm is too small (`relook doctor`), or NCCL_SOCKET_IFNAME names no interface.",
    ),
    KnownWarning(
        "peer to peer",
        r"doesn't support faster communication broadband via P2P or IB",
        "Consumer cards of this series cannot copy to each other directly.",
        "Set NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1; accelerate asks for them.",
    ),
    KnownWarning(
        "DDP without unused parameters",
        r"find_unused_parameters=True was specified",
        "DDP looks for unused parameters at every step, and there are none.",
        "relook sets ddp_find_unused_parameters false: every batch uses all that trains. Leave the key out.",
    ),
    KnownWarning(
        "DDP reduction",
        r"Expected to have finished reduction in the prior iteration",
        "A parameter that trains had no part in a step, and DDP waits for its gradient.",
        "Should not happen in relook: what no batch can use is frozen (the vision tower always is). Please report it.",
    ),
    KnownWarning(
        "DeepSpeed extensions",
        r"async_io requires|sparse_attn|requires? .*libaio|transformer_inference .*not compatible|"
        r"using untested triton version|Please specify the CUTLASS",
        "DeepSpeed lists extensions of its own that it cannot build here.",
        "Harmless: relook's settings use none of them. libaio is for NVMe offload only.",
    ),
    KnownWarning(
        "DeepSpeed compiler",
        r"CUDA_HOME does not exist|MissingCUDAException|op_builder|cpu_adam|nvcc(: command)? not found",
        "DeepSpeed compiles an operator at its first use, mostly the Adam step on the CPU, and finds no CUDA "
        "toolkit or another version than torch's.",
        "relook's own offload files take torch's AdamW, and nothing is compiled (docs/clusters.md). In another file "
        "set zero_force_ds_cpu_optimizer false, or install the toolkit of torch's CUDA version and set CUDA_HOME.",
    ),
    KnownWarning(
        "DeepSpeed offload with a client optimizer",
        r"ZeRO-Offload with a client provided optimizer",
        "DeepSpeed refuses torch's optimizer beside offload, or calls it slow, unless its settings allow it.",
        "relook's own offload files do (zero_force_ds_cpu_optimizer false); write so in a file of yours.",
    ),
    KnownWarning(
        "DeepSpeed accelerator",
        r"Setting ds_accelerator to|DeepSpeed info: version|ds_accelerator",
        "DeepSpeed says which device it found.",
        "Harmless. If it says cpu on a machine with GPUs, torch does not see them: `relook doctor`.",
    ),
    KnownWarning(
        "DeepSpeed's own NCCL",
        r"NCCL backend in DeepSpeed not yet implemented",
        "DeepSpeed has no NCCL code of its own and takes torch's, as the next line of the log says (TorchBackend).",
        "Harmless.",
    ),
    KnownWarning(
        "allocator cache flushes",
        r"allocator cache flushes since last step",
        "ZeRO-3 nearly ran out of GPU memory, so torch returned its cached blocks to the driver and asked again. That "
        "is slow, and the next larger batch may fail.",
        "Once after the start is harmless. If it repeats, lower per_device_train_batch_size, use zero3_offload or "
        "gradient_checkpointing, or set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True. `relook estimate` shows the "
        "largest batch that fits.",
    ),
    KnownWarning(
        "token estimate",
        r"Could not estimate the number of tokens of the input",
        "transformers' Trainer looked for input_ids in a batch to count floating-point operations and found none, as "
        "with TRL's pairs.",
        "Harmless: only the Trainer's total_flos is missing. relook counts by itself and logs tflops.",
    ),
    KnownWarning(
        "columns of DPODataCollatorWithPadding",
        r"When using DPODataCollatorWithPadding",
        "TRL before 0.12 set remove_unused_columns or the maximum lengths itself, because the caller had not.",
        "Harmless, but a length of 512 then cuts texts: set max_length there. relook does not use this collator, drops "
        "no columns and cuts nothing (model_max_length).",
    ),
    KnownWarning(
        "cuBLAS",
        r"cublasGemmStridedBatchedEx|CUBLAS_STATUS_(EXECUTION_FAILED|NOT_SUPPORTED|INVALID_VALUE|NOT_INITIALIZED)",
        "A matrix product failed on the GPU. Often an earlier kernel is to blame (an index outside its table), or "
        "memory is exhausted, or the card or driver does not support the type: bf16 needs an Ampere card or newer.",
        "Run with CUDA_LAUNCH_BLOCKING=1 to see the first kernel that fails; `relook doctor` tests bf16 and driver. "
        "If memory is nearly full, lower the batch size. On older cards train with fp16 true.",
    ),
    KnownWarning(
        "tokenizer length",
        r"Token indices sequence length is longer than the specified maximum",
        "A text has more tokens than the tokenizer's model_max_length. The warning cuts nothing; the model may not "
        "have been trained for such positions.",
        "relook counts images in, never cuts, and drops and names samples beyond model_max_length (or stops: "
        "on_bad). Raise model_max_length up to what the language model was made for.",
    ),
    KnownWarning(
        "tokenization mismatch",
        r"tokenization mismatch: \d+ vs",
        "LLaVA's trainer could not find the answers in a sample and trains on nothing of it.",
        "relook finds answers by their characters, so this cannot happen; a sample that would be ambiguous is named.",
    ),
    KnownWarning(
        "tokenizers after a fork",
        r"current process just got forked, after parallelism has already been used",
        "A process that had used the tokenizer was forked, so its threads are switched off in the child.",
        "Harmless. TOKENIZERS_PARALLELISM=false silences it.",
    ),
    KnownWarning(
        "added tokens",
        r"Special tokens have been added in the vocabulary",
        "The tokenizer has tokens that were not in its vocabulary file; their embeddings may be untrained.",
        "Normal for LLaVA's <image>, which is replaced by image features. An id beyond the embeddings is refused by "
        "name.",
    ),
    KnownWarning(
        "legacy tokenizer",
        r"default legacy behaviou?r of the",
        "The sentencepiece tokenizer treats spaces after special tokens in the old way.",
        "relook reads tokenizer.model as the original does, for both settings (docs/real-data.md).",
    ),
    KnownWarning(
        "type of a model",
        r"You are using a model of type .* to instantiate a model of type",
        "A config of one class is read by another: liuhaotian's folders call themselves llava_llama, or llava.",
        "In another program most tensors may then be random. relook reads such folders by their own names, strictly.",
    ),
    KnownWarning(
        "random weights",
        r"were not initialized from the model checkpoint|newly initialized|You should probably TRAIN this model",
        "Tensors are missing in the folder and were drawn at random.",
        "Never ignore it. relook refuses missing and unused tensors by name; convert the folder with `relook convert`.",
    ),
    KnownWarning(
        "cache and recomputation",
        r"use_cache=True.{0,3} is incompatible with (gradient|activation) checkpointing",
        "Keys and values are not kept in training.",
        "Harmless.",
    ),
    KnownWarning(
        "recomputation without gradients",
        r"None of the inputs have requires_grad=True",
        "A recomputed layer gets inputs that need no gradient, so its weights would not train.",
        "With a frozen trunk there is nothing to recompute: leave gradient_checkpointing out.",
    ),
    KnownWarning(
        "generation settings",
        r"do_sample. is set to .False.|generation flags are not valid|Setting .pad_token_id. to .eos_token_id",
        "Settings of sampling stand beside greedy decoding and do nothing, or padding was taken from the end token.",
        "Harmless.",
    ),
    KnownWarning(
        "memory of the GPU",
        r"CUDA out of memory|OutOfMemoryError",
        "The GPU has not enough memory for the batch.",
        "Lower per_device_train_batch_size (raise gradient_accumulation_steps) or --batch-size; train with bits 4, "
        "or gradient_checkpointing where the trunk trains.",
    ),
    KnownWarning(
        "shared memory",
        r"out of shared memory|killed by signal: Bus error|No space left on device.*/dev/shm",
        "/dev/shm is full: processes hand tensors to each other through it. Containers often give it 64 MB.",
        "Start the container with --shm-size 8g (or --ipc host), or set dataloader_num_workers 0.",
    ),
    KnownWarning(
        "broken image",
        r"image file is truncated|cannot identify image file|broken data stream|Truncated File Read",
        "An image file is cut off or is no image.",
        "`relook data check` names all of them, `relook data fix` writes a folder without.",
    ),
    KnownWarning(
        "image notes",
        r"Corrupt EXIF data|Palette images with Transparency|DecompressionBombWarning",
        "Pillow's remarks about odd pictures; a decompression bomb is one of more than 89 million pixels.",
        "The first two are harmless. relook refuses bombs by name.",
    ),
    KnownWarning(
        "bitsandbytes without a GPU",
        r"bitsandbytes was compiled without GPU support|The 8-bit optimizer is not available",
        "bitsandbytes found no CUDA library that fits.",
        "8 and 4 bits need a GPU that torch sees: `relook doctor`.",
    ),
)


def find_known_warnings(text: str) -> list[KnownWarning]:
    """Return the known messages in a text or a whole log, in the order of the table."""
    return [warning for warning in KNOWN_WARNINGS if re.search(warning.pattern, text, re.IGNORECASE)]


def print_known_warnings(text: str, as_json: bool = False) -> int:
    """Print the known messages in a text, or all if it is "all"; return the exit status, 1 if there are none."""
    matches = list(KNOWN_WARNINGS) if text == "all" else find_known_warnings(text)
    out = stdout_console()
    if as_json:
        out.print_json(data=[asdict(warning) for warning in matches])
    for warning in () if as_json else matches:
        out.print(f"{warning.name}\n  {warning.meaning}\n  Here: {warning.in_relook}", soft_wrap=True)
    if not matches:
        status("The text holds no known message. `relook doctor --explain all` lists them.")
    return 0 if matches else 1
