"""vLLM's plugin: `register` is its entry point in the group `vllm.general_plugins`; model.py is the model."""

from __future__ import annotations


def register() -> None:
    """Make the model known to vLLM and its config to transformers; vLLM calls this in each of its processes."""
    from vllm import ModelRegistry

    from relook.model.families import find_family

    find_family("relook_llava")  # registers the config
    # By name: vLLM imports the module where it needs the class, after the GPU was chosen.
    name = "RelookLlavaForConditionalGeneration"
    ModelRegistry.register_model(name, f"{__name__}.model:{name}")
