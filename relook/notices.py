"""Warnings and errors of the libraries below that users meet, and what they mean here. `relook doctor --explain`."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from relook.console import output, say


@dataclass(frozen=True)
class Notice:
    """A message by a pattern that finds it, what it says, and what it means here or what to do."""

    name: str
    pattern: str
    meaning: str
    here: str


NOTICES = (
    Notice(
        "OMP_NUM_THREADS",
        r"Setting OMP_NUM_THREADS environment variable",
        "torchrun gives each process one CPU thread, so that several do not fight for the same cores.",
        "Harmless on GPUs: images are read by threads of relook's own. Training or answering on a CPU alone, set "
        "OMP_NUM_THREADS to cores divided by processes.",
    ),
    Notice(
        "device-side assert",
        r"device-side assert|srcIndex < srcSelectDimSize|indexSelectLargeIndex|vectorized_gather_kernel",
        "A kernel was given an index outside its table: mostly a token id that the model has no embedding for. The "
        "line that the error names is not the one to blame, and the process cannot go on.",
        "relook checks ids and numbers of images when samples and prompts are encoded, on the CPU, and names the "
        "sample. In a program of your own: use the model's own tokenizer (LLaVA's marks an image with -200, outside "
        "the vocabulary), or run with CUDA_LAUNCH_BLOCKING=1 to see the real line.",
    ),
    Notice(
        "NCCL device of a barrier",
        r"devices? used by this process (are|is) currently unknown|No device id is provided via",
        "A barrier came before the process had said which GPU is its own. It hangs only where processes and GPUs do "
        "not correspond by number.",
        "Harmless under torchrun, where process n uses GPU n.",
    ),
    Notice(
        "process group left open",
        r"destroy_process_group\(\) was not called",
        "The program ended without closing NCCL.",
        "Harmless at a normal end. relook closes it after a run; after an error it leaves it, since the others may "
        "wait.",
    ),
    Notice(
        "NCCL timeout",
        r"Watchdog caught collective operation timeout|collective operation timeout|"
        r"Some NCCL operations have failed or timed out",
        "One process waited for others that never came: one of them has failed, or does another thing.",
        "Look for the first error of any process. Batches without images do not cause it: they are given a blank one.",
    ),
    Notice(
        "NCCL over the network",
        r"NCCL WARN|NCCL INFO|NET/IB : No device found|unhandled (system|cuda) error",
        "NCCL's own log. 'No device found' under NET/IB says that there is no InfiniBand, and that it takes sockets.",
        "INFO is no fault (unset NCCL_DEBUG). For a system error set NCCL_DEBUG=INFO and read the line before it: "
        "often /dev/shm is too small (`relook doctor`), or NCCL_SOCKET_IFNAME names no interface.",
    ),
    Notice(
        "peer to peer",
        r"doesn't support faster communication broadband via P2P or IB",
        "Consumer cards of this series cannot copy to each other directly.",
        "Set NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1; accelerate asks for them.",
    ),
    Notice(
        "DDP without unused parameters",
        r"find_unused_parameters=True was specified",
        "DDP looks for unused parameters at every step, and there are none.",
        "relook sets ddp_find_unused_parameters false: every batch uses all that trains. Leave the key out.",
    ),
    Notice(
        "DDP reduction",
        r"Expected to have finished reduction in the prior iteration",
        "A parameter that trains had no part in a step, and DDP waits for its gradient.",
        "Should not happen in relook: what no batch can use is frozen (the vision tower always is). Please report it.",
    ),
    Notice(
        "DeepSpeed extensions",
        r"async_io requires|sparse_attn|requires? .*libaio|transformer_inference .*not compatible|"
        r"using untested triton version|Please specify the CUTLASS",
        "DeepSpeed lists extensions of its own that it cannot build here.",
        "Harmless: relook's settings use none of them. libaio is for NVMe offload only.",
    ),
    Notice(
        "DeepSpeed compiler",
        r"CUDA_HOME does not exist|MissingCUDAException|op_builder|cpu_adam|nvcc(: command)? not found",
        "DeepSpeed compiles an operator at its first use, mostly the Adam step on the CPU, and finds no CUDA "
        "toolkit or another version than torch's.",
        "relook's own offload files take torch's AdamW, and nothing is compiled (docs/clusters.md). In another file "
        "set zero_force_ds_cpu_optimizer false, or install the toolkit of torch's CUDA version and set CUDA_HOME.",
    ),
    Notice(
        "DeepSpeed offload with a client optimizer",
        r"ZeRO-Offload with a client provided optimizer",
        "DeepSpeed refuses torch's optimizer beside offload, or calls it slow, unless its settings allow it.",
        "relook's own offload files do (zero_force_ds_cpu_optimizer false); write so in a file of yours.",
    ),
    Notice(
        "DeepSpeed accelerator",
        r"Setting ds_accelerator to|DeepSpeed info: version|ds_accelerator",
        "DeepSpeed says which device it found.",
        "Harmless. If it says cpu on a machine with GPUs, torch does not see them: `relook doctor`.",
    ),
    Notice(
        "tokenizer length",
        r"Token indices sequence length is longer than the specified maximum",
        "A text has more tokens than the tokenizer's model_max_length. The warning cuts nothing; the model may not "
        "have been trained for such positions.",
        "relook counts images in, never cuts, and drops and names samples beyond model_max_length (or stops: "
        "on_bad). Raise model_max_length up to what the language model was made for.",
    ),
    Notice(
        "tokenization mismatch",
        r"tokenization mismatch: \d+ vs",
        "LLaVA's trainer could not find the answers in a sample and trains on nothing of it.",
        "relook finds answers by their characters, so this cannot happen; a sample that would be ambiguous is named.",
    ),
    Notice(
        "tokenizers after a fork",
        r"current process just got forked, after parallelism has already been used",
        "A process that had used the tokenizer was forked, so its threads are switched off in the child.",
        "Harmless. TOKENIZERS_PARALLELISM=false silences it.",
    ),
    Notice(
        "added tokens",
        r"Special tokens have been added in the vocabulary",
        "The tokenizer has tokens that were not in its vocabulary file; their embeddings may be untrained.",
        "Normal for LLaVA's <image>, which is replaced by image features. An id beyond the embeddings is refused by "
        "name.",
    ),
    Notice(
        "legacy tokenizer",
        r"default legacy behaviou?r of the",
        "The sentencepiece tokenizer treats spaces after special tokens in the old way.",
        "relook reads tokenizer.model as the original does, for both settings (docs/real-data.md).",
    ),
    Notice(
        "type of a model",
        r"You are using a model of type .* to instantiate a model of type",
        "A config of one class is read by another: liuhaotian's folders call themselves llava_llama, or llava.",
        "In another program most tensors may then be random. relook reads such folders by their own names, strictly.",
    ),
    Notice(
        "random weights",
        r"were not initialized from the model checkpoint|newly initialized",
        "Tensors are missing in the folder and were drawn at random.",
        "Never ignore it. relook refuses missing and unused tensors by name; convert the folder with `relook convert`.",
    ),
    Notice(
        "cache and recomputation",
        r"use_cache=True.{0,3} is incompatible with (gradient|activation) checkpointing",
        "Keys and values are not kept in training.",
        "Harmless.",
    ),
    Notice(
        "recomputation without gradients",
        r"None of the inputs have requires_grad=True",
        "A recomputed layer gets inputs that need no gradient, so its weights would not train.",
        "With a frozen trunk there is nothing to recompute: leave gradient_checkpointing out.",
    ),
    Notice(
        "generation settings",
        r"do_sample. is set to .False.|generation flags are not valid|Setting .pad_token_id. to .eos_token_id",
        "Settings of sampling stand beside greedy decoding and do nothing, or padding was taken from the end token.",
        "Harmless.",
    ),
    Notice(
        "memory of the GPU",
        r"CUDA out of memory|OutOfMemoryError",
        "The GPU has not enough memory for the batch.",
        "Lower per_device_train_batch_size (raise gradient_accumulation_steps) or --batch-size; train with bits 4, "
        "or gradient_checkpointing where the trunk trains.",
    ),
    Notice(
        "shared memory",
        r"out of shared memory|killed by signal: Bus error|No space left on device.*/dev/shm",
        "/dev/shm is full: processes hand tensors to each other through it. Containers often give it 64 MB.",
        "Start the container with --shm-size 8g (or --ipc host), or set dataloader_num_workers 0.",
    ),
    Notice(
        "broken image",
        r"image file is truncated|cannot identify image file|broken data stream|Truncated File Read",
        "An image file is cut off or is no image.",
        "`relook data check` names all of them, `relook data fix` writes a folder without.",
    ),
    Notice(
        "image notes",
        r"Corrupt EXIF data|Palette images with Transparency|DecompressionBombWarning",
        "Pillow's remarks about odd pictures; a decompression bomb is one of more than 89 million pixels.",
        "The first two are harmless. relook refuses bombs by name.",
    ),
    Notice(
        "bitsandbytes without a GPU",
        r"bitsandbytes was compiled without GPU support|The 8-bit optimizer is not available",
        "bitsandbytes found no CUDA library that fits.",
        "8 and 4 bits need a GPU that torch sees: `relook doctor`.",
    ),
)


def explain(text: str) -> list[Notice]:
    """The known messages that a text or a whole log holds, in the order of the table."""
    return [notice for notice in NOTICES if re.search(notice.pattern, text, re.IGNORECASE)]


def print_notices(text: str, as_json: bool = False) -> int:
    """Print what is known of a text, or all that is known of where it is "all"; 1 where nothing is, else 0."""
    found = list(NOTICES) if text == "all" else explain(text)
    out = output()
    if as_json:
        out.print_json(data=[asdict(notice) for notice in found])
    for notice in () if as_json else found:
        out.print(f"{notice.name}\n  {notice.meaning}\n  Here: {notice.here}", soft_wrap=True)
    if not found:
        say("No known message is in it. `relook doctor --explain all` lists those that are.")
    return 0 if found else 1
