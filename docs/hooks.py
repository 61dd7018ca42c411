"""Hooks of MkDocs: pages made from the code, and links that leave the folder of documents.

`make docs` makes these pages anew each time, so none is in the repository and none can be out of date.
"""

from __future__ import annotations

import json
import posixpath
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# Files outside docs/ that become pages, and where.
PAGES = {
    "README.md": "index.md",
    "README.zh-CN.md": "zh/index.md",
    "benchmarks/RESULTS.md": "results.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not files of docs/."""
    from mkdocs.structure.files import File

    pages = {page: (ROOT / source).read_text(encoding="utf-8") for source, page in PAGES.items()}
    pages |= {"reference/commands.md": commands_page(), "reference/recipe-keys.md": recipe_keys_page()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to where their target is on the site, and fill the model zoo's table."""
    path = page.file.src_uri
    source = {target: name for name, target in PAGES.items()}.get(path, f"docs/{path}")
    if path == "zoo.md":
        markdown = markdown.replace("<!-- table: sizes -->", sizes_table())
    return relink(titled(markdown, source), source, path)


def titled(markdown: str, source: str) -> str:
    """Name links whose text is a file's name by that page's title: on the site nobody sees the file."""

    def title(match: re.Match[str]) -> str:
        target = (ROOT / source).parent / match[1]
        first = target.read_text(encoding="utf-8").partition("\n")[0]
        return f"[{first.removeprefix('# ')}]({match[1]}"

    return re.sub(r"\[[\w./-]+\.md\]\(([\w./-]+\.md)", title, markdown)


def relink(markdown: str, source: str, page: str) -> str:
    """Rewrite a text's relative links, which are right in the repository, for its page on the site.

    Args:
        source: the text's path in the repository.
        page: the page's path on the site, before it becomes HTML.
    """

    def target(match: re.Match[str]) -> str:
        link, anchor = match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        path = PAGES.get(path, path.removeprefix("docs/"))
        return f"{match[1]}{posixpath.relpath(path, posixpath.dirname(page) or '.')}{anchor}{match[4]}"

    return re.sub(r'(\]\(|src=")(?!https?:|#|mailto:)([^)#"\s]+)(#[^)"\s]*)?([)"])', target, markdown)


# ----------------------------------------------------------------------------------------------------
# The reference, from the command line and the recipe.


def cell(text: object) -> str:
    """Return a text as the cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(cell, line))} |\n" for line in lines)


def commands_page() -> str:
    """Return the reference of all commands, as their own `--help` describes them."""
    from typer.main import get_command

    from relook.cli import app

    sections = [f"## {name}\n\n{_command(name, command)}" for name, command in _commands("relook", get_command(app))]
    return (
        "# Commands\n\nEvery command, argument and option; `relook COMMAND --help` shows the same.\n\n"
        "```bash\nrelook --help\n```\n\n" + "\n".join(sections)
    )


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield every command that does something, with its full name."""
    for word, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from _commands(f"{name} {word}", child)
    if not hasattr(command, "commands"):
        yield name, command


def _command(name: str, command: Any) -> str:
    rows, words = [], [name]
    for parameter in command.params:
        argument = parameter.param_type_name == "argument"
        shown = parameter.name.upper() if argument else ", ".join((*parameter.opts, *parameter.secondary_opts))
        if argument:
            words.append(f"{shown}..." if parameter.nargs == -1 else shown)
        rows.append((f"`{shown}`", _default(parameter), (parameter.help or "").replace("\\[", "[")))
    more = " [--key value ...]" if command.context_settings.get("ignore_unknown_options") else ""
    options = " [OPTIONS]" if any(p.param_type_name == "option" for p in command.params) else ""
    usage = f"```text\n{' '.join(words)}{options}{more}\n```\n"
    return f"{(command.help or '').replace(chr(92) + '[', '[')}\n\n{usage}\n{table(('', 'default', 'meaning'), rows)}"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is None or value is False or value in ("", (), []) or callable(value):
        return ""
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple | list) else value}`"


def recipe_keys_page() -> str:
    """Return the reference of all recipe keys, as `relook train RECIPE --help` lists them."""
    from relook.recipe_help import describe_keys

    text = (
        "# Recipe keys\n\nEvery key of a recipe, as a line of its YAML file or as `--key value`.\n\n"
        "```bash\nrelook train post-decoder --help\n```\n"
    )
    section = ""
    for key in describe_keys():
        if key.section != section:
            section = key.section
            text += f"\n## {section}\n\n" + table(("key", "default", "type or choices", "meaning"), [])
        text += table(_key_row(key), []).splitlines()[0] + "\n"
    return text


def _key_row(key: Any) -> Sequence[str]:
    value = str(key.default).lower() if isinstance(key.default, bool) else key.default
    default = "" if value in (None, "") else value if value == "required" else f"`{value}`"
    return (f"`{key.name}`", default, key.kind, key.meaning)


# ----------------------------------------------------------------------------------------------------
# The model zoo: sizes and memory, from configs of the models' shapes. Nothing is downloaded.

CLIP_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def _text(kind: str, width: int, inner: int, layers: int, heads: int, kv_heads: int, words: int) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": words,
    }


# By source name: the family, and the language model's shape from the config.json there.
SHAPES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llava-hf/llava-1.5-7b-hf": ("llava", _text("llama", 4096, 11008, 32, 32, 32, 32064)),
    "llava-hf/llava-1.5-13b-hf": ("llava", _text("llama", 5120, 13824, 40, 40, 40, 32064)),
    "llava-hf/llava-v1.6-mistral-7b-hf": ("llava_next", _text("mistral", 4096, 14336, 32, 32, 8, 32064)),
    "llava-hf/llava-v1.6-vicuna-7b-hf": ("llava_next", _text("llama", 4096, 11008, 32, 32, 32, 32064)),
}
GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def config_of(name: str) -> dict[str, Any]:
    """Return a config.json of a model's shape."""
    family, text = SHAPES[name]
    common = {
        "model_type": family,
        "vision_config": CLIP_336,
        "text_config": text,
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    if family == "llava":
        return {**common, "architectures": ["LlavaForConditionalGeneration"]}
    return {**common, "architectures": ["LlavaNextForConditionalGeneration"], "image_grid_pinpoints": GRID}


# Columns of predicted memory: the recipe and keys of `relook estimate`.
JOBS = (
    ("post decoder", "post-decoder", []),
    ("LoRA, 8 pairs", "hadpo-lora", ["--per_device_train_batch_size", "8"]),
    ("QLoRA, 8 pairs", "hadpo-lora", ["--per_device_train_batch_size", "8", "--bits", "4"]),
)


def sizes_table() -> str:
    """Return the zoo's table: parameters, weights in GiB by precision, and memory of training by `relook estimate`."""
    from relook.estimate.run import GIB, AssumedData, estimate_command

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in SHAPES:
            path = Path(folder, *name.split("/"))
            path.mkdir(parents=True)
            (path / "config.json").write_text(json.dumps(config_of(name)), encoding="utf-8")
            # NeXT's tiles take more positions than the default allows.
            keys = ["--model_name_or_path", str(path), "--model_max_length", "4096"]
            results = [
                estimate_command(recipe, [*keys, *extra], 1, 80.0, AssumedData(), 0.0) for _, recipe, extra in JOBS
            ]
            # Without the part that trains, which the recipe adds.
            count = results[0]["parameters"]["all"] - results[0]["parameters"]["trained"]
            rows.append(
                (
                    f"`{name}`",
                    f"{count / 1e9:.2f}e9",
                    f"{2 * count / GIB:.1f}",
                    *(f"{result['predicted_gib']:.1f}" for result in results),
                )
            )
    head = ("model", "parameters", "weights in bf16, GiB", *(f"{title}, GiB" for title, _, _ in JOBS))
    return table(head, rows)
