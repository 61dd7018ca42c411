"""What all commands share: groups in the help, every mistake of a command line at once, and JSON for programs."""

import dataclasses
import inspect
import json
import math
import sys
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from relook.errors import Faults, RecipeError, did_you_mean, most_similar
from relook.flags import OTHER_NAMES

START = "Start here"  # the panel of commands for the first hour

Function = TypeVar("Function", bound=Callable[..., Any])

# Typer has click inside or beside it, depending on its version; this name is the same error in both.
UsageError: Any = typer.BadParameter.__base__


class Command(TyperCommand):
    """Command that names all mistakes of its words at once, each with the most similar option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse a command's words.

        Raises:
            RelookError: everything that is wrong with them, in one error.
        """
        if ctx.resilient_parsing:  # shell completion
            return super().parse_args(ctx, args)
        faults, valueless = Faults(), set[str]()
        values, rest = self._read_words(ctx, list(args), faults, valueless)
        for parameter in sorted(self.get_params(ctx), key=lambda parameter: not parameter.is_eager):
            with faults:
                try:
                    value, rest = parameter.handle_parse_result(ctx, values, rest)
                except UsageError as error:
                    if not valueless & {*parameter.opts}:  # its missing value is named already
                        raise as_recipe_error(error, ctx) from None
                else:
                    # Bounds do not keep NaN out, which is neither below nor above.
                    if isinstance(value, float) and not math.isfinite(value):
                        raise RecipeError(f"{parameter.opts[0]} is {value}.", "Give a finite number.")
        if rest and not ctx.allow_extra_args:
            faults.errors.append(RecipeError(f"{' '.join(rest)!r} is too much.", _help_hint(ctx)))
        faults.check()
        ctx.args = rest
        return rest

    def _read_words(
        self, ctx: Any, words: list[str], faults: Faults, valueless: set[str]
    ) -> tuple[dict[str, Any], list[str]]:
        """Sort words into options and arguments; an unknown option counts as the one that it resembles.

        Args:
            valueless: receives the options that lack their value.

        Returns:
            The values by parameter, and the words that are left over.
        """
        options = [
            option for parameter in self.get_params(ctx) for option in (*parameter.opts, *parameter.secondary_opts)
        ]
        while True:
            try:
                values, rest, _ = self.make_parser(ctx).parse_args(args=list(words))
                return values, list(rest)
            except UsageError as error:
                name = getattr(error, "option_name", None)
                index = next((i for i, word in enumerate(words) if word.partition("=")[0] == name), None)
                if index is None:
                    faults.errors.append(as_recipe_error(error, ctx))
                    faults.check()
                    raise
                if name in options:
                    valueless.add(str(name))
                    faults.errors.append(as_recipe_error(error, ctx))
                    del words[index]
                    continue
                # First what recipes call it: it resembles other options more.
                of_recipes = next((f"--{word}" for word, key in OTHER_NAMES.items() if f"--{key}" == name), None)
                similar = of_recipes if of_recipes in options else most_similar(name, options)
                hint = f"Did you mean {similar}?" if similar else _help_hint(ctx)
                faults.errors.append(RecipeError(f"There is no option {name}.", hint))
                if similar:
                    words[index] = similar + words[index].removeprefix(str(name))
                else:  # together with what looks like its value
                    followed = index + 1 < len(words) and "=" not in words[index] and words[index + 1][:1] != "-"
                    del words[index : index + 1 + followed]


class RecipeCommand(Command):
    """Command of a recipe: with `RECIPE --help` it describes the recipe and lists its keys."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--help" in args and not args[0].startswith("-"):
            from relook.recipe_help import print_recipe

            print_recipe(args[0], ctx.command_path)
            ctx.exit()
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    """Group of commands that suggests the most similar command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            if not args:  # which shows the help
                raise
            raise as_recipe_error(error, ctx) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and not ctx.resilient_parsing:
            hint = did_you_mean(args[0], self.commands, f"`{ctx.command_path} --help` lists the commands.")
            raise RecipeError(f"There is no command {args[0]!r}.", hint)
        return super().resolve_command(ctx, args)


class App(typer.Typer):
    """Typer with relook's commands.

    Args:
        panel: heading of its commands in the help.
    """

    def __init__(self, panel: str | None = None, **settings: Any) -> None:
        super().__init__(cls=Group, **settings)
        self.panel = panel

    def command(self, name: str | None = None, cls: Any = Command, **settings: Any) -> Callable[[Function], Function]:
        """Register a function as a command; its docstring is the help, whose paragraphs fill the terminal's lines."""

        def register(function: Function) -> Function:
            paragraphs = (inspect.getdoc(function) or "").split("\n\n")
            text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
            options = {"help": text, "rich_help_panel": self.panel, **settings}
            super(App, self).command(name, cls=cls, **options)(with_options_apart(function))
            return function

        return register


def with_options_apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with an option for each field of the dataclasses among its parameters.

    Commands so share lists of options, which typer wants in a function's signature by name.
    """
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        kind = hints[parameter.name]
        if not dataclasses.is_dataclass(kind):
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=kind))
            continue
        groups[parameter.name] = kind
        of_fields = get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            default = parameter.empty if field.default is dataclasses.MISSING else field.default
            of_field = {"default": default, "annotation": of_fields[field.name]}
            parameters.append(inspect.Parameter(field.name, parameter.KEYWORD_ONLY, **of_field))
    if not groups:
        return function

    def command(**values: Any) -> Any:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
        return function(**values)

    command.__name__, command.__module__ = function.__name__, function.__module__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def as_recipe_error(error: Any, ctx: Any) -> RecipeError:
    """Turn an error of the command-line parser into relook's own."""
    problem = error.format_message().strip().splitlines()[0].rstrip(".")
    return RecipeError(f"{problem}.", _help_hint(ctx))


def _help_hint(ctx: Any) -> str:
    return f"`{ctx.command_path} --help` lists the options."


def print_result(result: Any, as_json: bool | None, print_tables: Callable[[Any], None]) -> None:
    """Print a command's result on standard output as JSON or tables; None is tables on a terminal, JSON elsewhere."""
    if not sys.stdout.isatty() if as_json is None else as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        print_tables(result)
