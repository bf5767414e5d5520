"""The command line. A command reads its arguments, leaves the work to other modules and prints the
result.

Results go to stdout, everything else to stderr. The exit status is 0 after success, 130 after an
interruption, 2 after bad input, a failed check or a full disk, and 1 after other errors. A command
that exits with 2 prints the reason as one line on stderr.
Heavy modules are imported inside the command that needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from reftune import __version__
from reftune.errors import NonFiniteError, ProcessError, RecipeError, ReftuneError
from reftune.processes.launch import first_to_tell, processes
from reftune.processes.world import is_main

if TYPE_CHECKING:
    from reftune.recipe import Recipe
    from reftune.stages.stage import Progress

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
DEMO = "demo/demo.yaml"

app = typer.Typer(
    name="reftune",
    help=(
        "Reinforced Fine-Tuning: a short supervised warm-up, then PPO on the model's own graded"
        " solutions."
    ),
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeName = Annotated[
    str,
    Argument(
        metavar="RECIPE",
        help="A YAML file, a run folder, or a shipped recipe such as demo/demo.yaml.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    Argument(
        metavar="[KEY=VALUE]...", help="Recipe keys to change, such as stages.reft.steps=100."
    ),
]
RunFolders = Annotated[
    list[Path], Argument(metavar="RUN...", help="Run folders, such as runs/demo.")
]
RunFolderPath = Annotated[Path, Argument(metavar="RUN", help="A run folder, such as runs/demo.")]
AsJson = Annotated[bool, Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Show no progress.")]
Method = Annotated[str, Option(help="The stage or snapshot whose model is used.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    try:
        with processes():
            status = app(args=arguments, prog_name="reftune", standalone_mode=False)
            print(end="", flush=True)  # does nothing if stdout is closed
    except typer.Abort:  # Ctrl-C, or Ctrl-D at a prompt
        say("interrupted")
        sys.exit(INTERRUPTED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG):
            raise
        say(f"{error.filename or 'output'}: {error.strerror}")
        if error.errno != errno.ENAMETOOLONG:
            # without this, the interpreter would try to write stdout's buffer again when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BAD_INPUT)
    except ReftuneError as error:
        say(str(error))
        sys.exit(FAILED if isinstance(error, NonFiniteError | ProcessError) else BAD_INPUT)
    except typer.TyperException as error:
        say(f"{error.format_message()} (see reftune --help)")
        sys.exit(BAD_INPUT)
    sys.exit(status or 0)


def say(message: str) -> None:
    """Print one line to stderr."""
    print(" ".join(message.splitlines()), file=sys.stderr)


def show(document: Any, *, indent: int | None = 2) -> None:
    """Print a result as one JSON document. Any unpaired half of a surrogate pair is escaped."""
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    print(text.encode(errors="backslashreplace").decode())


@app.callback()
def _settings(
    context: typer.Context,
    version: Annotated[bool, Option("--version", help="Print the version.")] = False,
) -> None:
    if version or context.invoked_subcommand is None:
        print(__version__ if version else context.get_help())
        raise typer.Exit
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


# --- training -------------------------------------------------------------------------------------


@app.command()
def demo(overrides: Overrides = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Watch a small model learn to reason. This takes a few minutes on two cores.

    SFT and ReFT each continue from the same supervised warm-up, on the same questions. Their
    accuracies are then compared.
    """
    _run(_load(DEMO, overrides), None, as_json=as_json, quiet=quiet)


@app.command()
def run(
    recipe: RecipeName, overrides: Overrides = None, as_json: AsJson = False, quiet: Quiet = False
) -> None:
    """Run all stages of a recipe. A run that was stopped continues from its last checkpoint."""
    _run(_load(recipe, overrides), None, as_json=as_json, quiet=quiet)


def _add_stage_command(name: str, kind: str, what: str) -> None:
    @app.command(name, help=f"Run only {what}. The stages that they start from must be finished.")
    def command(
        recipe: RecipeName,
        overrides: Overrides = None,
        as_json: AsJson = False,
        quiet: Quiet = False,
    ) -> None:
        _run(_load(recipe, overrides), kind, as_json=as_json, quiet=quiet)


_add_stage_command("sft", "sft", "supervised stages")
_add_stage_command("rl", "rl", "reinforcement learning stages")
_add_stage_command("self-train", "self_train", "self-training stages")
_add_stage_command("reward-model", "reward_model", "reward model stages")


def _run(recipe: Recipe, kind: str | None, *, as_json: bool, quiet: bool) -> None:
    from reftune.model.speed.allocator import keep_freed_memory
    from reftune.runs.run import run_recipe, run_stages

    keep_freed_memory()
    with _watched(recipe, quiet=quiet) as progress:
        if kind is not None:
            facts = run_stages(recipe, kind=kind, progress=progress)
            if as_json and is_main():
                show(facts)
            return
        summary = run_recipe(recipe, progress=progress)
    _show_summary(recipe, summary, as_json=as_json)


def _show_summary(recipe: Recipe, summary: dict[str, Any], *, as_json: bool) -> None:
    from reftune.results import choices_table, read_run, remarks, table_command
    from reftune.storage.run_folder import RunFolder

    if not is_main():
        return
    if as_json:
        show(summary)
    else:
        tables = [table_command([recipe.folder], "text", finished=False), choices_table(summary)]
        print("\n\n".join(filter(None, tables)))
        for line in remarks(read_run(recipe.folder)):
            say(line)
    say(f"report: {RunFolder(recipe.folder).report}")


@contextmanager
def _watched(recipe: Recipe, *, quiet: bool) -> Iterator[Progress]:
    """A progress view that is closed when the `with` block ends, even after an error. After an
    interruption, a message names the checkpoint from which the run can continue."""
    from reftune.stages.loop import Interrupted, stop_signals
    from reftune.storage.run_folder import RunFolder
    from reftune.terminal.live import make_progress
    from reftune.terminal.trackers import tracked

    progress = tracked(make_progress(quiet=quiet or not is_main()), recipe)
    try:
        with stop_signals(signal.default_int_handler):  # training steps have their own handlers
            yield progress
    except (Interrupted, KeyboardInterrupt) as stop:
        progress.close()
        checkpoint = str(stop) or RunFolder(recipe.folder).newest_checkpoint() or "none yet"
        if first_to_tell():
            say(f"interrupted; checkpoint: {checkpoint}; the same command continues from there")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        progress.close()


# --- beginning ------------------------------------------------------------------------------------


@app.command()
def init(
    data: Annotated[
        str | None, Option(help="Training questions: a file, a folder or a Hub id.")
    ] = None,
    model: Annotated[
        str | None, Option(help="A Hub id, a folder, smollm2-135m, or scratch (a new model).")
    ] = None,
    form: Annotated[
        Literal["nl", "program"] | None,
        Option("--format", help="Whether solutions are text (nl) or programs."),
    ] = None,
    test: Annotated[
        str | None, Option(help="Test questions. Default: the test split of --data, if any.")
    ] = None,
    question: Annotated[
        list[str] | None,
        Option(
            metavar="COLUMN",
            help="The question's column, if not recognised. Repeat the option to join columns.",
        ),
    ] = None,
    answer: Annotated[str | None, Option(metavar="COLUMN", help="The answer's column.")] = None,
    rationale: Annotated[
        str | None, Option(metavar="COLUMN", help="The rationale's column.")
    ] = None,
    out: Annotated[
        Path | None, Option(help="The new recipe's path. Default: the name of --data, with .yaml.")
    ] = None,
) -> None:
    """Write a commented recipe for your own data, and print the recipe's path. The command asks
    for whichever of --data, --model and --format is missing."""
    from reftune.advice.golds import gold_kinds, golds_text
    from reftune.terminal.init import Wishes, default_out, guess_columns, guess_format, write_recipe

    if data is None:
        data = _ask("Training questions (a file, a folder or a Hub id)", None, flag="--data")
    joined = question[0] if question and len(question) == 1 else question or None
    options = {"question": joined, "answer": answer, "rationale": rationale}
    named = {field: column for field, column in options.items() if column is not None}
    columns = guess_columns(data, named).named
    spelled = (
        f"{field} is {' + '.join(name) if isinstance(name, list) else name}"
        for field, name in columns.items()
    )
    say(f"columns: {', '.join(spelled)}")
    asked = "Model (a Hub id, a folder, smollm2-135m or scratch)"
    model = model or _ask(asked, "smollm2-135m", flag="--model")
    kind = form or _ask(
        "Format (nl or program)", guess_format(data, columns), flag="--format", accept=_format_kind
    )
    wishes = Wishes(data=data, model=model, format=kind, test=test, columns=columns)
    written = out or default_out(data)
    splits = write_recipe(wishes, written)
    say(golds_text(gold_kinds(splits)))
    for note in splits.notes:
        say(note)
    print(written)
    say(f"next: reftune check {written}")


def _ask(
    question: str, default: str | None, *, flag: str, accept: Callable[[str], str] = str
) -> str:
    """The answer that the user types or, if it is empty, the default. The user is asked again until
    `accept` no longer raises typer.BadParameter for the answer. If there is no terminal, the result
    is the default, and a line on stderr says so. Raises: RecipeError if there is neither a terminal
    nor a default."""
    if sys.stdin is not None and sys.stdin.isatty():  # None if it is closed
        return str(typer.prompt(question, default=default, err=True, value_proc=accept))
    if default is None:
        raise RecipeError(f"{flag} is missing; it is required if stdin is not a terminal")
    say(f"stdin is not a terminal, so the default is used: {flag} {default}")
    return default


def _format_kind(kind: str) -> str:
    """The kind of format that the user typed. Raises: typer.BadParameter if it does not exist."""
    from reftune.recipe import load_component
    from reftune.text import brief

    try:
        load_component(kind, group="formats")
    except ValueError as error:
        raise typer.BadParameter(brief(error)) from None
    return kind


# --- inspecting -----------------------------------------------------------------------------------


@app.command()
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    offline: Annotated[
        bool,
        Option("--offline", help="Run only the checks that need neither the model nor a download."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Before a run, find problems that would spoil it.

    The command shows the model's input, and suggests a remedy for each problem.
    """
    from reftune.advice.check import check_offline, check_recipe

    report = (check_offline if offline else check_recipe)(_load(recipe, overrides))
    print(report.to_json() if as_json else report.to_text())
    failed = [f"{found.name}: {found.message}; {found.remedy}" for found in report.failed]
    if failed:
        say(f"check failed: {'; '.join(failed)}")
        raise typer.Exit(BAD_INPUT)


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int, Option(min=1, max=65536, help="Number of GPUs.")] = 1,
    memory: Annotated[float, Option(min=1, help="Memory of each GPU, in GB.")] = 80,
    gpu: Annotated[
        Literal["a100", "h100", "h200"],
        Option(help="The kind of GPU, which sets its peak FLOP/s and bandwidths."),
    ] = "h100",
    mfu: Annotated[
        float, Option(min=0.01, max=1, help="Assumed share of the GPU's peak FLOP/s.")
    ] = 0.4,
    prompt: Annotated[
        int | None,
        Option(min=1, help="Prompt tokens. Default: lengths.max_prompt, or 256 if unset."),
    ] = None,
    response: Annotated[
        int | None, Option(min=1, help="Response tokens. Default: lengths.max_new.")
    ] = None,
    stage: Annotated[
        str | None,
        Option(
            help="Plan only this stage. By default, all stages are planned, and the memory is that"
            " of the stage that needs the most."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate how much memory and time a recipe needs on given hardware.

    The command reads the model's configuration but no weights. It reads data only if the model is
    trained from scratch. docs/experiments/plan.md has the equations behind the estimates.
    """
    from dataclasses import asdict

    from reftune.advice.plan import GB, Hardware, make_plan, plan_text

    hardware = Hardware(gpus=gpus, memory=memory * GB, kind=gpu, mfu=mfu)
    loaded = _load(recipe, overrides)
    made = make_plan(loaded, hardware, prompt=prompt, response=response, only=stage)
    if as_json:
        show(asdict(made))
    else:
        print(plan_text(made))


@app.command()
def watch(run_folder: RunFolderPath) -> None:
    """Follow a run that another process is working on, or replay a finished run. Ctrl-C does not
    stop the run."""
    from reftune.results import table_command
    from reftune.terminal.live import make_progress
    from reftune.terminal.watch import RunClock, follow

    clock = RunClock()
    progress = make_progress(time_s=clock)
    try:
        finished = follow(run_folder, progress, clock)
    finally:
        progress.close()
    if finished:
        print(table_command([run_folder], "text"))
    else:
        state = "not finished, and no process is working on it"
        say(f"{run_folder}: {state}; `reftune run` with its recipe continues it")


@app.command()
def sample(
    recipe: RecipeName,
    overrides: Overrides = None,
    method: Method = "reft",
    split: Annotated[Literal["train", "dev", "test"], Option(help="Split to use.")] = "dev",
    num: Annotated[int, Option(min=1, help="Number of problems.")] = 4,
    temperature: Annotated[float, Option(min=0, help="0 means greedy.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Print a trained model's solutions, each with the grader's verdict."""
    from reftune.runs.sample import sample_method, solution_text

    loaded = _load(recipe, overrides)
    rows = sample_method(loaded, method, split=split, num=num, temperature=temperature)
    if as_json:
        show(rows)
    else:
        print("\n\n".join(solution_text(row) for row in rows))


@app.command("eval")
def evaluate(
    recipe: RecipeName,
    overrides: Overrides = None,
    method: Annotated[
        list[str] | None,
        Option(help="Evaluate only the model of this stage or snapshot; may be repeated."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate trained models of a run."""
    from reftune.runs.run import evaluate_methods

    loaded = _load(recipe, overrides)
    with _watched(loaded, quiet=quiet) as progress:
        summary = evaluate_methods(loaded, method or (), progress=progress)
    _show_summary(loaded, summary, as_json=as_json)


@app.command()
def score(
    file: Annotated[
        Path, Argument(help='JSON lines of {"id", "completion", "answer", "choices"?}.')
    ],
    overrides: Overrides = None,
    format_kind: Annotated[
        Literal["nl", "program"] | None, Option("--format", help="The format of the completions.")
    ] = None,
    recipe: Annotated[
        str | None,
        Option(help="Grade with this recipe's format, answer kinds, sandbox and reward."),
    ] = None,
    grading: Annotated[
        str, Option(help="The grader's rules: robust, paper, or your own file.py:Name.")
    ] = "robust",
    as_json: Annotated[bool, Option("--json", help="Print one JSON object per line.")] = False,
) -> None:
    """Grade completions and state the reason for each verdict, for debugging a reward."""
    from reftune.terminal.score import score_as_recipe, score_file
    from reftune.text import printable

    if (format_kind is None) == (recipe is None):
        raise RecipeError("score: expected either --format nl|program or --recipe RECIPE")
    if recipe is not None:
        rows = score_as_recipe(file, _load(recipe, overrides))
    elif overrides:
        key = overrides[0]
        raise RecipeError(f"score: {key}: expected --recipe too, because this sets a recipe key")
    else:
        rows = score_file(file, format_kind or "nl", grading=grading)
    for row in rows:
        if as_json:
            show(row, indent=None)
        else:
            print(printable("  ".join(map(str, row.values()))))


@app.command()
def table(
    runs: RunFolders,
    form: Annotated[
        Literal["text", "markdown", "latex"], Option("--format", help="The output format.")
    ] = "text",
    layout: Annotated[
        Literal["auto", "methods", "paper"],
        Option(
            help=(
                "methods: one table of methods on the same problems; paper: the paper's tables,"
                " one column per task; auto: whichever suits the runs."
            )
        ),
    ] = "auto",
    k: Annotated[
        int | None, Option(min=1, help="Vote and rerank over only the first K samples.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the accuracies of one or more runs."""
    from reftune.results import table_command

    print(table_command(runs, "json" if as_json else form, layout=layout, k=k))


@app.command()
def report(
    runs: RunFolders,
    out: Annotated[Path | None, Option(help="Default: report.html in the first RUN.")] = None,
    figures: Annotated[
        Path | None,
        Option(help="Also write PNG and SVG figures to this folder. Needs finished runs."),
    ] = None,
) -> None:
    """Write an HTML page about one or more runs, and print the paths of all files written."""
    from reftune.results import report_command, write_figures

    print(report_command(runs, out))
    if figures is not None:
        print("\n".join(map(str, write_figures(runs, figures))))


@app.command()
def export(
    run_folder: RunFolderPath,
    out: Annotated[Path, Option(help="The folder to write. It must not exist yet.")],
    method: Method = "reft",
    push: Annotated[
        str | None, Option(metavar="OWNER/NAME", help="Also upload the model to the Hub.")
    ] = None,
    public: Annotated[bool, Option("--public", help="Make the Hub repository public.")] = False,
    adapter: Annotated[
        bool,
        Option("--adapter", help="Export only the LoRA adapters, for use with the base model."),
    ] = False,
) -> None:
    """Copy a trained model to a new folder, with a model card.

    The folder can be loaded by from_pretrained and by vLLM. The command prints the folder's path
    or, with --push, the model's address on the Hub.
    """
    from reftune.runs.export import export_model, push_model

    written = export_model(run_folder, method, out, adapter=adapter)
    print(written if push is None else push_model(written, push, public=public))


# --- recipes --------------------------------------------------------------------------------------


def _load(name: str, overrides: Sequence[str] | None) -> Recipe:
    """The recipe of the run folder `name` or, if `name` is not a run folder, the recipe that
    `find_recipe` finds for this name. The `overrides` are applied to it."""
    from reftune.recipe import load_recipe
    from reftune.storage.run_folder import RunFolder

    folder = RunFolder(Path(name))
    if folder.is_run:
        run_dir = f"run_dir={json.dumps(name, ensure_ascii=False)}"
        return load_recipe(folder.recipe, [run_dir, *(overrides or ())])
    return load_recipe(find_recipe(name), overrides or ())


def find_recipe(name: str) -> Path:
    """The path of the recipe file `name`. If there is no such file, `name` stands for a recipe that
    comes with reftune; it may then begin with `recipes/` and omit `.yaml`. Raises: RecipeError if
    there is no such recipe either."""
    from reftune.recipe import shipped_recipes

    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    inside = name.removeprefix("recipes/")
    for candidate in (shipped / inside, shipped / f"{inside}.yaml"):
        if candidate.is_file():
            return candidate
    # the files in accelerate/ configure a launcher and are not recipes
    recipes = [file for file in shipped.glob("*/*.yaml") if file.parent.name != "accelerate"]
    near = difflib.get_close_matches(
        inside, [str(file.relative_to(shipped)) for file in recipes], cutoff=0
    )
    raise RecipeError(
        f"{name}: no such recipe; nearest of those that come with reftune: {', '.join(near)}"
    )
