"""Fixtures that several test files share."""

from __future__ import annotations

import functools
import gc
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from helpers.command import Command
    from helpers.serving import Served

# Models this small gain nothing from threads, and threads that wait for each other on a busy machine lose minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As the command does, before transformers is imported: its bars would stand between the lines that tests read.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Threads that read a model's tensors ahead cost a sixth of loading one of a few kilobytes.
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")

# No test depends on how fast a machine is, and the same commit gives the same verdict.
settings.register_profile("relook", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("relook")


# Python's own pace of collections, every 700 new objects, took 4 % of the suite's time.
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """The Trainer collects garbage at its end: it need not walk through all that is loaded by then each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def nothing_for_nobody() -> None:
    """Work whose result nobody sees took 20 % of the suite's time.

    transformers formats every config that it loads for a log that is off; peft renders a model card for every adapter
    that it saves; torch draws first weights for layers on the meta device, which have none, op by op in Python; typer
    inspects the signatures of all commands for each call of one, which a process makes once elsewhere; a client of
    OpenAI's reads all certificates, for addresses without TLS; transformers looks at each reading of a config for
    layers that differ, which no config here has.
    """
    import ssl

    import typer.main
    import typer.testing
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedConfig, configuration_utils

    for kind in (nn.Linear, nn.Embedding, nn.Conv2d, nn.LayerNorm):
        kind.reset_parameters = _unless_on_meta(kind.reset_parameters)  # type: ignore[method-assign]
    PreTrainedConfig.__repr__ = object.__repr__  # type: ignore[method-assign]
    PeftModel.create_or_update_model_card = lambda *_: None  # type: ignore[method-assign]
    ssl.create_default_context = functools.cache(ssl.create_default_context)
    mixin = getattr(configuration_utils, "HeterogeneousConfigMixin", None)  # which older releases do not have
    if mixin is not None and "__getattribute__" in vars(mixin):
        del mixin.__getattribute__
    typer.main.get_command = typer.testing._get_command = functools.cache(typer.main.get_command)


def _unless_on_meta(reset: Callable[[Any], None]) -> Callable[[Any], None]:
    def reset_real(layer: Any) -> None:
        if layer.weight is None or not layer.weight.is_meta:
            reset(layer)

    return reset_real


@pytest.fixture(scope="session")
def refdata() -> Path:
    """Outputs of the original programs: `../shared/refdata` beside the repository, or the folder in RELOOK_REFDATA."""
    folder = Path(os.environ.get("RELOOK_REFDATA") or Path(__file__).parents[2] / "shared" / "refdata")
    if not folder.is_dir():
        pytest.skip(f"no reference data in {folder}; set RELOOK_REFDATA to its folder")
    return folder


@pytest.fixture(scope="session")
def tiny(refdata: Path) -> Path:
    """LLaVA folders that the original code wrote, small ones of every kind."""
    return refdata / "llava_tiny"


@pytest.fixture(scope="session")
def tower(tiny: Path) -> Path:
    """The vision tower that those folders name and do not hold."""
    return tiny / "vision_towers/openai/clip-vit-tiny-patch14-56"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA folder with random weights and a real processor; lm_head is its own, as in real LLaVA models."""
    from helpers.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose attention has biases, which Llama's has not."""
    from helpers.tiny import save_biased

    return save_biased(tmp_path_factory.mktemp("biased"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small toyworld: `vg` with preference pairs of both kinds, `llava` and `test`."""
    from helpers.tiny import write_world

    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of which the server below takes files."""
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="session")
def served(media: Path) -> Iterator[Served]:
    """A server of two models, "tuned" and "base", with small limits."""
    from helpers.serving import KEY, serving
    from helpers.tiny import tiny_relook
    from test_answering import as_loaded

    from relook.generate.engine import Engine
    from relook.generate.request import EngineLimits
    from relook.serve.api import ServerLimits
    from relook.serve.media import ImageSources

    models = {"tuned": as_loaded(tiny_relook()), "base": as_loaded(tiny_relook(seed=1))}
    engines = {name: Engine(loaded, EngineLimits(slots=4)) for name, loaded in models.items()}
    sources = ImageSources(max_bytes=200_000, web=True, root=media, seconds=2)
    with serving(engines, ServerLimits(KEY, sources, max_images=3, max_body=1_000_000, body_seconds=1)) as server:
        yield server


@pytest.fixture
def no_trunk_cache() -> Iterator[None]:
    """Nothing cached by an earlier test, and nothing left for the next one."""
    from relook.train.feature_cache import TrunkCache

    TrunkCache.current = None
    yield
    TrunkCache.current = None


@pytest.fixture
def relook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process; `stdin` is what it reads."""
    from helpers.command import Ended

    from relook import cli

    def run(*words: Any, stdin: str = "") -> Ended:
        monkeypatch.setattr(sys, "argv", ["relook", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        return Ended(status, *capsys.readouterr())

    return run
