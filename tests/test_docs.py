"""The documents keep up with the code."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from relook.cli import app
from relook.model.checkpoint import config_template
from relook.model.families import FAMILIES
from relook.model.post_decoder import PostDecoderSettings
from relook.recipe import Recipe, read_overrides, shipped_names, sort_keys
from relook.sweep_config import SWEEP_KEYS

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
PAGES = [*READMES, *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
COMMAND: Any = get_command(app)
# Programs of HA-DPO, LLaVA, the benchmarks and other engines, which pages name.
FOREIGN = """
train.py train_dpo.py train_mem.py train_xformers.py merge_lora_weights.py pope_eval.py evaluate.py shr_eval.py
json_eval.py gpt_utils.py eval_gpt4.py eval_gpt_obj_halbench.py llava.py template_manager.py
"""


@pytest.fixture(scope="module")
def hooks() -> Any:
    """Return docs/hooks.py, which makes the site's generated pages."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_key_is_in_the_reference(hooks: Any) -> None:
    text = hooks.recipe_keys_page()
    keys = {field.name for field in dataclasses.fields(Recipe)} - {"training", "of_the_model", "post_decoder", "idle"}
    keys |= {f"post_decoder.{name}" for name in PostDecoderSettings.names()} | {"learning_rate", "save_steps"}
    rows = re.findall(r"^\| `(\S+)` \| .* \| .* \| (\S.*) \|$", text, re.M)
    assert keys <= {name for name, _ in rows}
    assert len(rows) == len({name for name, _ in rows})


def test_every_command_and_option_is_in_the_reference(hooks: Any) -> None:
    sections = re.split(r"^## ", hooks.commands_page(), flags=re.M)[1:]
    shown = {section.splitlines()[0]: section for section in sections}

    def check(name: str, command: Any) -> None:
        for word, child in getattr(command, "commands", {}).items():
            check(f"{name} {word}", child)
        if not hasattr(command, "commands"):
            for parameter in command.params:
                if parameter.param_type_name == "option":
                    assert f"`{parameter.opts[0]}" in shown[name]

    check("relook", COMMAND)


def test_links_are_rewritten_for_the_site(hooks: Any) -> None:
    relink = hooks.relink
    assert relink("[a](docs/data.md#check)", "README.md", "index.md") == "[a](data.md#check)"
    assert relink("[a](docs/zh/recipes.md) ![b](docs/images/x.png)", "README.zh-CN.md", "zh/index.md") == (
        "[a](recipes.md) ![b](../images/x.png)"
    )
    assert relink("[a](../benchmarks/RESULTS.md)", "docs/estimate.md", "estimate.md") == "[a](results.md)"
    assert relink("[a](../evaluation.md)", "docs/zh/evaluation.md", "zh/evaluation.md") == "[a](../evaluation.md)"
    for same in ("[a](https://x.org/b.md)", "[a](#data-and-weights)"):
        assert relink(same, "README.md", "index.md") == same


def test_links_are_named_by_their_pages_titles(hooks: Any) -> None:
    text = "See [data.md](data.md#check), [RESULTS](../benchmarks/RESULTS.md) and [real-data.md](real-data.md)."
    assert hooks.titled(text, "docs/estimate.md") == (
        "See [Dataset folders](data.md#check), [RESULTS](../benchmarks/RESULTS.md) and "
        "[From toyworld to LLaVA-1.5-7B](real-data.md)."
    )


def test_the_menu_of_the_site_names_every_page(hooks: Any) -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    pages |= {*hooks.PAGES.values(), "reference/commands.md", "reference/recipe-keys.md", NOTEBOOK.name}
    assert set(re.findall(r": (\S+\.(?:md|ipynb))$", menu, re.M)) == pages


def test_the_zoo_covers_the_families(hooks: Any) -> None:
    assert {family for family, _ in hooks.SHAPES.values()} <= {*FAMILIES}
    text = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert "<!-- table: sizes -->" in text
    assert not [family for family in FAMILIES if not family.startswith("llava") and f"`{family}`" not in text]
    for name in hooks.SHAPES:
        row = re.search(rf"^\| .*`{name}`.* \| .* \| `(\w+)`", text, re.M)
        assert row
        assert row[1] == config_template(hooks.config_of(name))


@pytest.mark.slow
def test_the_zoo_counts_parameters_and_memory(hooks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaVA-1.5-7B has 7.06e9 parameters (llava-hf's model card says 7B)."""
    name = "llava-hf/llava-1.5-7b-hf"
    monkeypatch.setattr(hooks, "SHAPES", {name: hooks.SHAPES[name]})
    monkeypatch.setattr(hooks, "JOBS", hooks.JOBS[:1])
    row = re.findall(r"^\| `(\S+)` \| (\S+) \| (\S+) \| (\S+) \|$", hooks.sizes_table(), re.M)
    assert row[0][:3] == (name, "7.06e9", "13.2")
    assert float(row[0][3]) == pytest.approx(20.2, abs=0.5)


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_begins_with_text_and_shows_its_output() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["cells"][0]["cell_type"] == "markdown"
    assert all(cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    for number, code in enumerate(code_cells()):
        compile(code, f"cell {number}", "exec")


def test_the_notebooks_outputs_are_of_the_shipped_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first cell describes pictures: what it says now is what the file shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cell = next(
        cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
    )
    source = "".join(cell["source"])
    assert "scenes=800" in source
    exec(compile(source.replace("scenes=800", "scenes=1"), "cell", "exec"), {})  # those to mine from take seconds
    stored = "".join(line for output in cell["outputs"] for line in output.get("text", []))
    assert capsys.readouterr().out == stored


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict[str, Any] = {}
    for number, code in enumerate(code_cells()):
        exec(compile(code, f"cell {number}", "exec"), names)
    assert names["after"]["CHAIR_i"] < names["before"]["CHAIR_i"]


def test_every_sweep_key_and_shipped_sweep_is_documented() -> None:
    text = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    assert not [
        key for key in (*SWEEP_KEYS, "rows", "grid", "recipe", *shipped_names("sweep")) if f"`{key}`" not in text
    ]


def test_the_readme_shows_the_folders() -> None:
    tree = re.search(r"^relook/\n.*?^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert tree
    folders = {path.parent.name for path in (ROOT / "relook").glob("*/__init__.py")}
    assert set(re.findall(r"^  (\w+)/ ", tree[0], re.M)) == folders


@pytest.mark.parametrize("name", READMES)
def test_the_readme_names_every_command(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    commands = COMMAND.commands
    assert not [command for command in commands if not re.search(rf"`relook {command}[` ]", text)]


def test_the_readmes_have_the_same_tables() -> None:
    """By the numbers of rows, and the numbers in them."""
    tables = [
        [
            [re.findall(r"\d(?:[\d,.]*\d)?", row) for row in block.splitlines()]
            for block in re.findall(r"(?:^\|.*\n)+", (ROOT / name).read_text(encoding="utf-8"), re.M)
        ]
        for name in READMES
    ]
    assert len(tables[0]) >= 5
    assert [len(rows) for rows in tables[0]] == [len(rows) for rows in tables[1]]
    for english, chinese in zip(*tables, strict=True):
        for row, translated in zip(english, chinese, strict=True):
            assert sorted(row) == sorted(translated)


def test_documents_name_recipes_that_exist() -> None:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in (*READMES, "docs/real-data.md"))
    named = set(re.findall(r"relook train ([\w-]+)", text)) - {"RECIPE"}
    assert named <= {*shipped_names("recipe")}


@pytest.mark.parametrize("document", PAGES)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert not [link for link in links if not ((ROOT / document).parent / link).exists()]


# --- The documents' commands, through the real command line.


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a page that are marked with a language; the empty one is no language."""
    fenced = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.M | re.S)
    return [textwrap.dedent(block) for _, marked, block in fenced if marked == language]


def command_words(block: str, variables: dict[str, str]) -> Iterator[list[str]]:
    """Yield the words of every relook or make command of a block of shell lines."""
    for line in block.replace("\\\n", " ").splitlines():
        assigned = re.fullmatch(r'(\w+)="(.*)"', line)
        if assigned:
            variables[assigned[1]] = assigned[2]
        lexer = shlex.shlex(
            re.sub(r"\$(\w+)", lambda m: variables.get(m[1], m[0]), line), posix=True, punctuation_chars=True
        )
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";|&"):
                if words[:1] == ["relook"] or words[:1] == ["make"]:
                    yield words
                for flag in ("-m", "--module"):
                    if flag in words and words[words.index(flag) + 1].startswith("relook"):
                        module, *arguments = words[words.index(flag) + 1 :]
                        yield ["relook", *module.split(".")[1:], *arguments]
                words = []
            elif words or not (word in ("do", "time") or re.match(r"\w+=", word)):
                words.append(word)


def parse_command(words: list[str]) -> None:
    """Parse a command as the command line does: names, options, types, paths (which exist here), and recipe keys."""
    program, *words = words
    words = [word for word in words if word != "--help"]
    if program == "make":
        targets = re.findall(r"^(\w+)(?= .*:|:)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert set(words) <= set(targets)
        return
    command: Any = COMMAND
    name = ""
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    for word in words:
        if not word.startswith("-") and not Path(word).is_absolute():
            Path(word).mkdir(parents=True, exist_ok=True)
    context = command.make_context(name, list(words))
    if name in ("train", "estimate", "sweep", "align"):
        kind = "sweep" if name == "sweep" else "recipe"
        file = context.params["file" if kind == "sweep" else "recipe"]
        assert file in {*shipped_names(kind), "RECIPE"} or file.endswith(".yaml")
        values, odd = read_overrides(context.args)
        odd.check()
        sort_keys(
            {key: value for key, value in values.items() if kind == "recipe" or key not in SWEEP_KEYS}
        ).faults.check()
    else:
        assert not context.args


@pytest.mark.parametrize("page", PAGES)
def test_every_page_opens_with_a_sentence_and_an_example(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    opening = re.match(r"# .+\n\n(?:\S.*\n){1,3}\n```bash\n((?:.*\n)*?)```\n", text)
    assert opening or page in READMES
    first = opening[1] if opening else blocks(text, "bash")[0]
    assert list(command_words(first, {})), "The first example shows no command of relook."


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_taken(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    variables: dict[str, str] = {}
    for block in blocks(text, "bash"):
        for words in command_words(block, variables):
            try:
                parse_command(words)
            except Exception as error:
                pytest.fail(f"{' '.join(words)}: {error!r}")
    assert not re.findall(r"^relook \w+", "".join(blocks(text, "")), re.M), "Blocks of commands are marked bash."


@pytest.mark.parametrize("page", PAGES)
def test_options_named_in_a_sentence_or_a_table_exist(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    for line in re.findall(r"`relook ([a-z][^`]*)`", text):
        command: Any = COMMAND
        words = line.replace("\\|", "|").split()
        while hasattr(command, "commands") and words:
            names = words.pop(0).split("|")
            assert set(names) <= set(command.commands), line
            command = command.commands[names[0]]
        if getattr(command, "context_settings", {}).get("ignore_unknown_options"):
            continue
        options = {option for parameter in getattr(command, "params", []) for option in parameter.opts}
        options |= {option for parameter in getattr(command, "params", []) for option in parameter.secondary_opts}
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", " ".join(words))) <= options, line


@pytest.mark.parametrize("page", PAGES)
def test_examples_in_python_and_yaml_are_read(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in blocks(text, "python"):
        compile(block, page, "exec")
    for block in blocks(text, "yaml"):
        yaml.safe_load(block)


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_lines_are_short_but_for_tables(page: str) -> None:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 110 and not line.startswith("|")]


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_files_that_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    tracked = [
        path.as_posix() for folder in ("relook", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    named = {name for name in re.findall(r"`([\w/.-]+\.py)`", text) if Path(name).name not in FOREIGN.split()}
    assert not [name for name in named if not any(path.endswith(f"/{name}") for path in tracked)]


def test_the_architecture_page_names_what_the_code_has() -> None:
    """Every backticked identifier appears in the code."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "relook").rglob("*.py"))
    words = set(re.findall(r"\w+", source))
    named = {word for span in re.findall(r"`([\w.]+)`", text) if not span.endswith(".py") for word in span.split(".")}
    assert named <= words | {path.name for path in ROOT.iterdir()} | {"json", "yaml", "py"}
