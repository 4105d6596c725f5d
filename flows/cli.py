"""The `sage` command. Each command imports its heavy modules itself, so that --help is fast."""

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.terminal import exit_on_error, quiet

if TYPE_CHECKING:
    from flows.tracking.judging import Judgement
    from flows.tracking.registry import Registration
    from sage.evaluation.results import Results

_HELP = """
Shared sampling for text-to-image diffusion: groups of similar prompts share their early denoising steps.

`sage run` goes from data to a gated and registered model; params.yaml configures it, and a second run repeats nothing.
`sage generate` makes images for your own prompts. If something does not work, `sage doctor` checks the installation.
"""
_EXAMPLES = """
Examples:

  sage run                                 all stages, then a table that compares the arms

  sage plan                                what that would do and cost, and what is wrong with it

  sage run group                           stage `group` and the stages that it needs

  sage generate prompts.txt --out images   images for the prompts of a file

  sage promote                             make the challenger champion

Settings of the machine are environment variables: SAGE_DEVICE, SAGE_TRACKING_URI.
"""

app = typer.Typer(
    help=_HELP, epilog=_EXAMPLES, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
)
# These commands pass their arguments on to another module, which is imported only when the command is called.
_DELEGATE = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
_MODEL = Path("models/sage")
_METRICS = Path("metrics")
_GROUPS = Path("data/groups")
_REPORT = Path("report/index.html")


def main() -> None:
    """Run the `sage` command."""
    exit_on_error(partial(app, prog_name="sage"))


@app.command(rich_help_panel="The main job")
def run(
    stage: Annotated[str | None, typer.Argument(help="Stop after this stage and register nothing.")] = None,
) -> None:
    """Bring data, model, images and report up to date, register the model if it passes its gates, show the results.

    Stages that are up to date are not repeated. `dvc repro` writes the same files, but registers nothing.
    """
    from flows.tracking import registry, runs
    from flows.versioning import locks, repository
    from sage.config import load_params
    from sage.errors import ConfigurationError

    params = load_params()
    names = repository.stages()
    if stage is not None and stage not in names:
        raise ConfigurationError(f"there is no stage {stage!r}; the stages are {', '.join(names)}.")
    with locks.only_writer(), runs.pipeline_run() as pipeline:
        outcomes = repository.reproduce(_write, stage, environment=pipeline.environment)
        executed = [name for name, outcome in outcomes.items() if outcome.state == "executed"]
        for name, outcome in outcomes.items():
            typer.echo(f"{name:<10} {outcome.state:<10} {outcome.seconds:7.1f} s")
        typer.echo(f"executed={len(executed)} cached={len(outcomes) - len(executed)}")
        pipeline.finish("FINISHED", _METRICS if stage is None else None)
        if stage is None:
            _show_results()
            if runs.address() is None:
                typer.echo("tracking is off, so nothing is registered")
            else:
                _say(registry.register(_MODEL, _METRICS, _GROUPS, params))


@app.command(rich_help_panel="The main job")
def plan() -> None:
    """Show what `sage run` would do and cost, and check settings, data, base and machine before anything is trained.

    Nothing is written. What depends on data or groups that are not made yet is said to be unknown. Exits with code 2 if
    a check fails.
    """
    from rich.console import Console

    from flows.commands import plan as planned

    console = Console()
    # Without a terminal rich assumes 80 columns, which breaks sentences over many lines.
    if not planned.report(console if console.is_terminal else Console(width=140)):
        raise typer.Exit(2)


@app.command(rich_help_panel="The main job")
def flow() -> None:
    """Do the same as `sage run`, as the Prefect flow `sage-pipeline` with a task for each stage.

    If PREFECT_API_URL is not set, a temporary server is started, which takes about 15 seconds.
    """
    from flows.versioning import repository
    from sage.config import load_params

    # Report errors in params.yaml and dvc.yaml before a server is started.
    load_params()
    repository.stages()

    from flows.orchestration.graph import sage_pipeline

    sage_pipeline()
    _show_results()


@app.command(rich_help_panel="The main job")
def up(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of Prefect's server.")] = 4200,
    tracking_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of MLflow's server.")] = 5000,
    check: Annotated[bool, typer.Option("--check", help="Run one deployment, report the result, and stop.")] = False,
) -> None:
    """Start Prefect, MLflow and a worker on this machine, and create the deployments; Ctrl-C stops everything.

    The servers listen on 127.0.0.1 only.
    """
    from flows.commands import up as everything

    everything.up(port, tracking_port, check)


@app.command(rich_help_panel="The main job")
def doctor(
    pipeline: Annotated[
        str | None, typer.Option(help="Check a pipeline of diffusers instead: its folder, or a name on the hub.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt to try it on; give two or more, or leave it out.")
    ] = None,
) -> None:
    """Check packages, weights, git, DVC, tracking, disk, memory and device, and say how to fix each problem.

    With --pipeline, check whether that pipeline can share sampling: run it on a few prompts, and compare with the stock
    run. Exits with code 1 if there is a problem.
    """
    from flows.commands import doctor as checks

    fit = checks.report(typer.echo) if pipeline is None else checks.try_pipeline(pipeline, prompt, typer.echo)
    if not fit:
        raise typer.Exit(1)


@app.command(context_settings=_DELEGATE, rich_help_panel="Pictures for your own prompts")
def generate(context: typer.Context) -> None:
    """Generate images for a list of prompts, sharing early steps among similar ones; print the evaluations saved."""
    _delegate("flows.prompts.generate", context)


@app.command(context_settings=_DELEGATE, rich_help_panel="Pictures for your own prompts")
def group(context: typer.Context) -> None:
    """Show which prompts of a file would share their early steps, and how many evaluations that would save."""
    _delegate("flows.prompts.group", context)


@app.command(rich_help_panel="Pictures for your own prompts")
def serve(
    model: Annotated[
        str, typer.Argument(help="Pipeline folder, hub name or registered model.")
    ] = "models:/sage@champion",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    batch_size: Annotated[int, typer.Option(min=1, help="Maximum images in a network call.")] = 8,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="One image per network call: bits independent of other requests.")
    ] = False,
    queue: Annotated[int, typer.Option(min=0, help="Images that may wait; above it, 429.")] = 64,
    tokens: Annotated[Path | None, typer.Option(help="File of bearer tokens, lines of tenant:token.")] = None,
    allowed_host: Annotated[list[str] | None, typer.Option(help="Further host name of this server.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH of a LoRA that requests may name; give it once for each.")
    ] = None,
    batches: Annotated[
        Path | None, typer.Option(help="Folder of batches and their results; without it the server takes no batches.")
    ] = None,
    prefix_memory: Annotated[int, typer.Option(min=0, help="MiB of prefixes in memory; 0 keeps none.")] = 64,
    prefix_folder: Annotated[
        Path | None, typer.Option(help="Folder where the prefix cache survives a restart. It holds prompts.")
    ] = None,
    prefix_disk: Annotated[int, typer.Option(min=1, help="MiB of the files in that folder.")] = 1024,
    prefixes_across_tenants: Annotated[
        bool, typer.Option("--prefixes-across-tenants", help="Let tenants use each other's prefixes.")
    ] = False,
) -> None:
    """Serve images over HTTP with OpenAI's images API; requests run in one batch and may share early steps.

    On SIGTERM, accepted requests are answered first. Exits with code 1 if the model process cannot run.
    """
    from flows.serving import server
    from flows.serving.worker import Source, named

    source = Source(
        model,
        batch_size,
        deterministic,
        loras=named(lora or []),
        prefix_memory=prefix_memory << 20,
        prefix_folder=prefix_folder,
        prefix_bytes=prefix_disk << 20,
        across_tenants=prefixes_across_tenants,
    )
    if code := server.serve(source, host, port, queue, tokens, allowed_host or [], batches):
        raise typer.Exit(code)


@app.command(rich_help_panel="The main job")
def configure(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="YAML of settings, as in configs/.")],
    setting: Annotated[list[str] | None, typer.Argument(help="Further ones: finetune.steps=1000")] = None,
) -> None:
    """Change params.yaml by the settings of a file and print them, in the form that `dvc exp run -S` takes."""
    from flows.commands import configure as configuring

    for change in configuring.apply(file, setting or []):
        typer.echo(change)


@app.command(rich_help_panel="Models")
def base(
    model: Annotated[str, typer.Argument(help="OWNER/NAME on the hub, or OWNER/NAME@REVISION: commit, tag or branch.")],
) -> None:
    """Get a base model from the hub, pin its revision in a file, and say how to name it in params.yaml."""
    from flows.commands import base as bases

    bases.pin(model, typer.echo)


@app.command(context_settings=_DELEGATE, rich_help_panel="Models")
def pretrain(context: typer.Context) -> None:
    """Train the base model (autoencoder, denoiser) and the judge that reads the attributes of composed figures."""
    _delegate("flows.commands.pretrain", context)


@app.command(context_settings=_DELEGATE, rich_help_panel="Models")
def calibrate(context: typer.Context) -> None:
    """Measure the damage of sharing by similarity of the prompts, and store it with the model for group.max_damage."""
    _delegate("flows.commands.calibrate", context)


@app.command(context_settings=_DELEGATE, rich_help_panel="Models")
def distil(context: typer.Context) -> None:
    """Train an encoder that tells the model's first predictions from the text, for group.by: distilled."""
    _delegate("flows.commands.distil", context)


@app.command(rich_help_panel="Models")
def register() -> None:
    """Register the model of `sage run` as challenger if it passed its gates; the same model is registered once."""
    from flows.tracking import registry
    from sage.config import load_params

    _say(registry.register(_MODEL, _METRICS, _GROUPS, load_params()))


@app.command(rich_help_panel="Models")
def judge(
    versions: Annotated[
        list[str], typer.Argument(help="Numbers or aliases of versions, or models:/NAME/VERSION, models:/NAME@ALIAS.")
    ],
) -> None:
    """Judge registered versions on this folder's held-out set, with its prompts, groups, seeds, judges and gates.

    The evaluation is recorded in MLflow beside the version. A version that has been judged on this set already is not
    drawn again.
    """
    from flows.tracking import judging

    judgements = judging.judge_named(versions, judging.today(), _write)
    _show_judged(judgements)
    for judgement in judgements:
        typer.echo(f"version {judgement.version}: run {judgement.run}")


@app.command(rich_help_panel="Models")
def promote(
    version: Annotated[str | None, typer.Argument(help="Version to promote; by default the challenger.")] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Make the previous champion champion again.")] = False,
    to: Annotated[
        str, typer.Option(help="Registered model to promote in; if it is not `sage`, the version is copied there.")
    ] = "sage",
) -> None:
    """Make the challenger champion, unless it is damaged, failed a gate, or is worse than the champion.

    If both were judged on different held-out sets or by different judges, they are judged anew, as by `sage judge`.
    With --to production, the champion (or the given version) is copied to the registered model `production` and
    becomes champion there.
    """
    from flows.tracking import promotion
    from sage.errors import ConfigurationError

    if rollback and version:
        raise ConfigurationError(
            "--rollback returns to the previous champion, so it takes no version; omit the version."
        )
    champion = promotion.rollback(to) if rollback else promotion.promote(version, to, _judged)
    typer.echo(f"version {champion} of {to} is champion")


@app.command(rich_help_panel="Models")
def compare(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Two MLflow run ids or registered versions (models:/sage@champion).")
    ] = None,
    out: Annotated[Path, typer.Option(help="HTML file for the comparison of two runs.")] = Path("work/comparison.html"),
    model: Annotated[str, typer.Option(help="Registered model whose versions are listed.")] = "sage",
) -> None:
    """List all registered versions, or write a page that compares the parameters, figures and images of two runs."""
    from flows.tracking import recorded, registry
    from sage.errors import ConfigurationError

    if runs and len(runs) != 2:
        raise ConfigurationError(f"{len(runs)} runs were given, but compare takes two, or none to list all versions.")
    if runs:
        from flows.report import comparison
        from sage.files import write_text

        write_text(out, comparison.build(*map(recorded.recorded, runs)))
        typer.echo(f"{runs[0]} and {runs[1]}: {out}")
    elif rows := registry.versions(model):
        _table(f"registered versions of {model}", rows)
    else:
        typer.echo("nothing is registered yet; `sage run` registers a model that passes its gates")


@app.command(rich_help_panel="Data")
def push(remote: Annotated[str | None, typer.Argument(help="Name of the DVC remote.")] = None) -> None:
    """Upload data and models to the default DVC remote or a named one, unless the cache is damaged."""
    from flows.versioning import integrity

    typer.echo(integrity.push(remote))


@app.command(rich_help_panel="Data")
def pull(remote: Annotated[str | None, typer.Argument(help="Name of the DVC remote.")] = None) -> None:
    """Download data and models from the default DVC remote or a named one, and check their hashes."""
    from flows.versioning import integrity

    typer.echo(integrity.pull(remote))


@app.command(rich_help_panel="Data")
def verify(
    remote: Annotated[
        bool, typer.Option("--remote", help="Also check the default DVC remote; reads all of it.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Also check the remote of this name.")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="First delete corrupt copies here; `sage pull` or `sage run` replace them.")
    ] = False,
) -> None:
    """Re-hash data and models in the cache, the work tree and the remote; list what is corrupt or missing.

    Exits with code 1 if anything is corrupt or missing.
    """
    from flows.versioning import integrity

    if repair:
        for finding in integrity.repair():
            typer.echo(f"{finding.place}: {finding.path}: {finding.state}")
    checked, findings = integrity.verify(name or ("" if remote else None))
    for finding in findings:
        typer.echo(f"{finding.place}: {finding.path}: {finding.state}")
    typer.echo(f"{checked} copies re-hashed, {len(findings)} not as they should be")
    if findings:
        raise typer.Exit(1)


def _delegate(module: str, context: typer.Context) -> None:
    """Call a module's `app`, or its `main` as a command, with the arguments of this command."""
    found = import_module(module)
    quiet()
    sub = getattr(found, "app", None)
    if sub is None:
        sub = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        sub.command()(found.main)
    sub(args=context.args, prog_name=f"sage {context.info_name}")


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _say(registration: "Registration") -> None:
    """Print the result of a registration; a model that failed its gates is a result, not an error."""
    if registration.version is None:
        typer.echo("not registered, because a gate failed:\n  " + "\n  ".join(registration.reasons))
    else:
        typer.echo(f"registered as version {registration.version}" + ("" if registration.new else " before"))


def _judged(versions: Sequence[Any]) -> "list[Results]":
    """Judge versions of the registry on this folder's held-out set, and show the figures."""
    from flows.tracking import judging

    judgements = judging.judge(versions, judging.today(), _write)
    _show_judged(judgements)
    return [judgement.results for judgement in judgements]


def _show_judged(judgements: "Sequence[Judgement]") -> None:
    from flows.report import tables

    _table(
        "versions on this folder's held-out set",
        tables.versions({f"version {found.version}": found.results for found in judgements}),
    )


def _show_results() -> None:
    from flows.report import tables
    from sage.evaluation import results

    evaluate = results.read(_METRICS / "evaluate.json")
    _table("arms, on held-out prompts", tables.arms(evaluate))
    _table("gates", tables.gates(evaluate))
    typer.echo(f"report: {_REPORT}")


def _table(title: str, rows: Sequence[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from flows.report import tables

    names = tables.columns(rows)
    table = Table(*(name.replace("_", " ") for name in names), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(row.get(name, "-") for name in names))
    console = Console()
    # Without a terminal rich assumes 80 columns, which would break every interval over two lines.
    (console if console.is_terminal else Console(width=140)).print(table)
