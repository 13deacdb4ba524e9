"""The command ``minigpt``. Its subcommands import torch and mlflow, so that the help and shell completion are fast."""

from __future__ import annotations

import itertools
import secrets
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click
from pydantic import Field
from pydantic.fields import FieldInfo

from minigpt import __version__, errors, params, profiles, program
from minigpt.files import MODEL, RESULTS, require_root
from minigpt.git import is_untracked
from minigpt.terminal import from_argument, graphemes, read_prompt, show

if TYPE_CHECKING:
    from minigpt.data.tokenizer import Tokenizer

FilePath = click.Path(path_type=Path)


class WriteParams(params.SampleParams):
    """Options of ``minigpt write``: the section ``sample`` of ``params.yaml``, and the device."""

    device: params.Device = Field(default="auto", description="auto, cpu, cuda, cuda:1, ...")


class NumberType(click.FloatRange):
    """Type of a numeric option. The help shows the range, and :func:`minigpt.params.validate` checks it."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ARG002
        """Return a number; text that is not a number stays a string, for the same message as in ``params.yaml``."""
        for kind in (int, float):
            with suppress(ValueError):
                return kind(value) if isinstance(value, str) else value
        return value


class ChoiceType(click.Choice):  # type: ignore[type-arg]
    """Type of an option with named choices, which :func:`minigpt.params.validate` checks."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ARG002
        """Return the value as it is."""
        return value


def option_name(key: str) -> str:
    """Return the option for the dotted key of a value: ``--top-k`` for ``top_k``, ``--stop`` for ``stop.0``."""
    return f"--{key.partition('.')[0].replace('_', '-')}"


def write_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for each field of :class:`WriteParams` with a description to a click command."""
    for name, field in reversed(WriteParams.model_fields.items()):
        if field.description:
            random = name == "seed"
            command = click.option(
                option_name(name), type=option_type(field), multiple=isinstance(field.default, list),
                default=None if random else field.default, show_default="random" if random else field.default != [],
                help=field.description,
            )(command)  # fmt: skip
    return command


def option_type(field: FieldInfo) -> Any:
    """Return click's type of the option for a field."""
    limits = {key: getattr(item, key) for item in field.metadata for key in ("ge", "gt", "le") if hasattr(item, key)}
    if get_origin(field.annotation) is Literal:
        return ChoiceType(get_args(field.annotation))
    if field.annotation in (int, float):
        return NumberType(limits.get("ge", limits.get("gt")), limits.get("le"), min_open="gt" in limits)
    return click.STRING


@click.group(invoke_without_command=True)
@click.version_option(__version__)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Train, evaluate and sample a character-level GPT.

    Run the commands in the root of the repository. `dvc repro` runs the stages.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command()
@click.argument("prompt", required=False)
@click.option("--model", type=FilePath, default=MODEL, show_default=True, help="folder of the exported model")
@write_options
@click.option("--skip-unknown", is_flag=True, help="drop characters of PROMPT that are not in the model's vocabulary")
def write(prompt: str | None, model: Path, skip_unknown: bool, **options: Any) -> None:
    """Continue PROMPT with a trained model.

    Text is shown while it is written, and Ctrl-C stops it. Without PROMPT, the command reads standard input; in a
    terminal, it starts from a newline.

    \b
    minigpt write "HALE:"
    echo "HALE:" | minigpt write --temperature 1 --stop "TOBIT:"
    """  # noqa: D301 - click reads the backspace as "do not wrap this paragraph"
    prompt = read_prompt() if prompt is None else from_argument(prompt, "the prompt")
    if options["seed"] is None:
        options["seed"] = secrets.randbits(63)
        if sys.stderr.isatty():
            print(f"minigpt: --seed {options['seed']}", file=sys.stderr)
    values = options | {
        "stop": [from_argument(stop, "--stop") for stop in options["stop"]],
        "prompts": [prompt or "\n"],
        "num_samples": 1,
    }
    sampling = params.validate(WriteParams, values, rename=option_name)
    from minigpt.runtime import cpu

    cpu.configure_cpu(spin=True)  # before torch is imported
    from minigpt.generation.generator import Generator
    from minigpt.runtime.device import choose_device

    try:
        device = choose_device(sampling.device)
    except errors.UserError:
        raise errors.UserError(f"--device: {sampling.device} is not available here; use auto or cpu") from None
    try:
        generator = Generator.load(
            model, device, sampling.dtype, compile=sampling.compile, characters=sampling.max_new_tokens
        )
    except errors.UserError as error:
        raise errors.UserError(str(error).replace("sample.compile:", "--compile:", 1)) from None
    prompt = check_prompt(generator.tokenizer, prompt or generator.tokenizer.usable_prompt("\n"), skip_unknown)
    warn_of_stops(generator.tokenizer, sampling.stop)
    pieces = (piece for (piece,) in generator.stream(prompt, sampling))
    show(graphemes(itertools.chain([prompt], pieces)))


def check_prompt(tokenizer: Tokenizer, prompt: str, skip_unknown: bool) -> str:
    """Return the prompt; reject characters that are not in the vocabulary, or with ``skip_unknown`` drop them."""
    from minigpt.data.tokenizer import describe_character

    if skip_unknown:
        prompt, unknown = tokenizer.without_unknown(prompt)
        if unknown:
            print(f"minigpt: dropped from the prompt: {', '.join(map(describe_character, unknown))}", file=sys.stderr)
    try:
        tokenizer.encode(prompt, "the prompt")
    except errors.UserError as error:
        raise errors.UserError(f"{error}; use --skip-unknown to drop such characters") from None
    return prompt


def warn_of_stops(tokenizer: Tokenizer, stops: Iterable[str]) -> None:
    """Print a warning for each stop string that the model cannot write."""
    from minigpt.data.tokenizer import describe_character

    for stop in stops:
        if unknown := tokenizer.without_unknown(stop)[1]:
            named = ", ".join(map(describe_character, unknown))
            print(f"minigpt: --stop {stop!r} ends no text, because the model cannot write {named}", file=sys.stderr)


@cli.command()
@click.option("--model", type=FilePath, default=MODEL, show_default=True, help="folder of the exported model")
@click.option("--compare", type=FilePath, help="folder of a second model, shown next to the first")
@click.option("--output", type=FilePath, default=RESULTS / "page.html", show_default=True, help="the page")
@click.option(
    "--dtype", type=click.Choice(get_args(params.WeightFormat)), default="auto", show_default=True,
    help="format of the weights; auto: float32 up to 1M parameters, bfloat16 up to 5M, int8 above",
)  # fmt: skip
def page(model: Path, compare: Path | None, output: Path, dtype: Any) -> None:
    """Make a web page that contains a model and writes text.

    The page is one file. It needs no network and no server. If --model is models/gpt of a workspace, the page also
    shows the results and the text of that training.

    \b
    minigpt page --output songs.html
    minigpt page --compare ../other/models/gpt
    """  # noqa: D301 - click reads the backspace as "do not wrap this paragraph"
    from minigpt.page.facts import PageModel, build_page

    models = [PageModel.load(folder) for folder in (model, compare) if folder]
    size = build_page(models, output, dtype=dtype)
    print(f"minigpt: {output}, {size / 1e6:.1f} MB; open it in a browser")


@cli.command()
@click.argument("files", nargs=-1, type=FilePath)
def check(files: tuple[Path, ...]) -> None:
    """Validate FILES, by default params.yaml.

    A file in configs/ is validated with the other values of params.yaml. A text that exists and is short is checked.
    """
    from minigpt.data.checks import check_text

    for path in files or [profiles.PARAMS]:
        profile = path.parent.name == profiles.DIRECTORY.name
        settings = profiles.load_profile(path.stem, path.parent.parent) if profile else params.load(path)
        unread = check_text(settings)
        if is_untracked(settings.data.source):
            print(
                f"minigpt: {settings.data.source} is not in git or DVC, so experiments with --temp or --queue miss it"
            )
        print(f"minigpt: {path}, with {settings.data.source}: no mistakes" + (f", but {unread}" if unread else ""))


def complete_profile(_ctx: click.Context, _param: click.Parameter, start: str) -> list[str]:
    """Return the names of the profiles that begin with ``start``."""
    return [name for name in profiles.names() if name.startswith(start)]


@cli.command()
@click.argument("name", required=False, shell_complete=complete_profile)
@click.option("--source", default="", help="a text file or folder in place of the profile's text")
@click.option("--force", is_flag=True, help="overwrite changes of params.yaml that are not committed to git")
def profile(name: str | None, source: str, force: bool) -> None:
    """Write the profile NAME into params.yaml, or list the profiles.

    A profile in configs/ sets some values of params.yaml, and `default` restores the original ones. If the text is
    missing, it is fetched from a DVC remote or from its publisher. A star marks the profile that params.yaml has now.
    """
    if not name and (source or force):
        raise click.UsageError("--source and --force need the NAME of a profile")
    if name:
        profiles.write(name, force, source)
        text = f", with {source}" if source else ""
        print(f"minigpt: params.yaml has the values of {name}{text}; `dvc repro` runs it")
        return
    require_root()
    for each in profiles.names():
        print(f"{'*' if profiles.is_applied(each) else ' '} {each:<18} {profiles.describe(each)}")


@cli.command()
def summary() -> None:
    """Show the results of all stages."""
    from minigpt.summary import summarize

    click.echo(summarize(MODEL, RESULTS))


@cli.command()
@click.argument("experiments", nargs=-1)
@click.option("--seeds", is_flag=True, help="group trainings that differ only in train.seed; show mean ± deviation")
@click.option(
    "--html", type=click.Path(path_type=Path), metavar="FILE", help="also write a page with curves and the text"
)
def compare(experiments: tuple[str, ...], seeds: bool, html: Path | None) -> None:
    """Compare the params and losses of EXPERIMENTS.

    Each is a DVC experiment, a git revision, a folder with a workspace, `workspace`, or a run: its name, or at least
    six digits of its key or of its ID in MLflow. The difference of two losses is paired: both models score the same
    characters. Without EXPERIMENTS, the command lists those of this workspace, the best first.

    \b
    minigpt compare
    minigpt compare main gyral-snob
    minigpt compare ../other workspace
    minigpt compare --seeds
    minigpt compare main workspace --html comparison.html
    """  # noqa: D301 - click reads the backspace as "do not wrap this paragraph"
    from minigpt.comparison import tables
    from minigpt.comparison.experiment import find

    chosen = [find(name) for name in experiments]
    click.echo(tables.comparison(chosen, seeds) if chosen else tables.overview(seeds))
    if html:
        from minigpt.comparison.page import write_page

        write_page(chosen, html)
        click.echo(f"\nminigpt: wrote {html}")


@cli.command()
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="port of the page")
def ui(port: int) -> None:
    """Show the runs of this repository in MLflow's page."""
    from minigpt.tracking.ui import show_runs

    require_root()
    show_runs(port)


@cli.command()
def sync() -> None:
    """Upload runs that are not in MLflow yet.

    A run gets the names of all DVC experiments that have its training, also of those that DVC restored from its cache.
    """
    from minigpt.comparison.experiment import experiments
    from minigpt.tracking.journal import journals
    from minigpt.tracking.run import add_experiment
    from minigpt.tracking.store import resolve_tracking_uri
    from minigpt.tracking.uploader import Uploader, sync

    require_root()
    known = {journal.key: journal for journal in journals()}
    for experiment in reversed(list(experiments())):
        with suppress(errors.UserError):  # its results are damaged
            if journal := known.get(str(experiment.run.get("run"))):
                add_experiment(journal, experiment.name)
    count = sync()
    print(f"minigpt: {count} runs are in {Uploader(resolve_tracking_uri()).display_uri}")


@cli.command()
@click.option("--alias", default="", help="name that always refers to the newest choice, such as champion")
def register(alias: str) -> None:
    """Register the model of this workspace in MLflow.

    \b
    minigpt register --alias champion
    """  # noqa: D301 - click reads the backspace as "do not wrap this paragraph"
    from minigpt.tracking.registry import register
    from minigpt.tracking.run import key_of_model

    address = register(key_of_model(RESULTS / "train" / "run.json"), alias)
    print(f"minigpt: registered; serve it with `mlflow models serve -m {address} --env-manager local`")


@cli.command()
@click.argument("repo")
def dagshub(repo: str) -> None:
    """Connect DVC and MLflow to DagsHub.

    REPO is user/repo. The token comes from DAGSHUB_USER_TOKEN or from `dagshub login`; in a terminal, the command asks
    for it.
    """
    from minigpt.tracking import credentials, dagshub

    credentials.dagshub_page(repo, "REPO")  # a mistake in the name comes before a question for the token
    dagshub.connect(repo, dagshub.read_token())


@cli.command()
def plots_page() -> None:
    """Make the page of `dvc plots show` work without a network."""
    from minigpt.evaluation.plots_page import write_page

    write_page()


def main() -> None:
    """Run the command line, and raise its errors as errors of this project."""
    try:
        cli.main(prog_name="minigpt", standalone_mode=False)
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        message = error.format_message().rstrip(".")
        usage = f"; see `{error.ctx.command_path} --help`" if isinstance(error, click.UsageError) and error.ctx else ""
        raise errors.UserError(f"{message[:1].lower()}{message[1:]}{usage}") from None


def run() -> None:
    """Run ``minigpt`` as a program."""
    program.run(main)
