"""Words <-> values; computes nothing. `hasten --help` imports neither torch nor an engine."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from hasten.core.errors import HastenError, Interrupted, UsageError
from hasten.words import Drop, Json, Model, Pins, Run, Seed, Weights, rate_of, source_of

if TYPE_CHECKING:
    from hasten.core.report import Report

app = typer.Typer(
    name="hasten",
    help="Makes neural networks fast and proves that they still work.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130


@app.command()
def optimize(
    model: Model,
    data: Annotated[Path, typer.Option("--data", help=".npz, .csv, .parquet, or a folder of images by class.")],
    prove: Annotated[
        Path | None,
        typer.Option("--prove", help="Data that the network was not trained on; the verdict is about it."),
    ] = None,
    weights: Weights = None,
    pin: Pins = [],  # noqa: B006
    max_drop: Drop = "1pt",
    run: Run = None,
    batch: Annotated[int, typer.Option("--batch", help="Batch size whose latency is to fall.")] = 1,
    score: Annotated[str | None, typer.Option("--score", help="accuracy, top5, squared-error, macro-f1, auc, …")] = None,
    target: Annotated[str | None, typer.Option("--target", help="Column or array with the labels.")] = None,
    group: Annotated[str | None, typer.Option("--group", help="Column whose equal values stay together.")] = None,
    seed: Seed = 0,
    trials: Annotated[int | None, typer.Option("--trials", help="Most recipes to try.")] = None,
    time_limit: Annotated[str | None, typer.Option("--time-limit", help="Of the whole run: 10m, 90s, 1h30m.")] = None,
    effort: Annotated[str, typer.Option("--effort", help="quick (a minute), normal (ten), thorough (as long as it takes).")] = "normal",
    objective: Annotated[
        str, typer.Option("--objective", help="latency, throughput, size, memory, energy, or several: latency,size.")
    ] = "latency",
    pick: Annotated[str | None, typer.Option("--pick", help="Of a finished run: fastest, smallest, balanced, or a trial's number.")] = None,
    confidence: Annotated[float, typer.Option("--confidence", help="Of the statement about the drop.")] = 0.95,
    accept: Annotated[str, typer.Option("--accept", help="proof, or point to be content with the estimate.")] = "proof",
    latency_ms: Annotated[float | None, typer.Option("--latency-ms", help="Cap on the latency.")] = None,
    size_bytes: Annotated[int | None, typer.Option("--size-bytes", help="Cap on the size on disk.")] = None,
    peak_memory_bytes: Annotated[int | None, typer.Option("--peak-memory-bytes", help="Cap on memory.")] = None,
    energy_mj: Annotated[float | None, typer.Option("--energy-mj", help="Cap on the energy of a call.")] = None,
    min_speedup: Annotated[float | None, typer.Option("--min-speedup", help="Least speed-up.")] = None,
    examples_per_s: Annotated[float | None, typer.Option("--examples-per-s", help="Least throughput.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes that train side by side.")] = None,
    ray: Annotated[str | None, typer.Option("--ray", help="Address of a Ray cluster whose nodes train.")] = None,
    json_: Json = False,
) -> None:
    """Find the fastest network that keeps the score, and prove it."""
    words = dict(locals())  # most of them go on under their own names
    from hasten import verbs

    if accept not in ("proof", "point"):
        raise UsageError(f"--accept must be proof or point, got {accept!r}")
    options = verbs.Options(**{f.name: words[f.name] for f in fields(verbs.Options) if f.name in words}, command=_command())
    try:
        with _progress(json_) as watcher:
            found = verbs.optimize(
                source_of(model, weights, pin), data, prove, max_drop=max_drop, run=run, options=options, watcher=watcher
            )
    except Interrupted as why:
        _show_interrupted(why.report, json_)
    _show(found, json_)


@app.command()
def apply(
    recipe: Annotated[Path, typer.Argument(help="A recipe.json, or the artifact that holds it.")],
    model: Model,
    data: Annotated[Path, typer.Option("--data", help="For training, calibrating and scoring; formats as for optimize.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder for the result.")],
    weights: Weights = None,
    pin: Pins = [],  # noqa: B006
    score: Annotated[str | None, typer.Option("--score", help="accuracy, top5, squared-error, macro-f1, auc, …")] = None,
    target: Annotated[str | None, typer.Option("--target", help="Column or array with the labels.")] = None,
    group: Annotated[str | None, typer.Option("--group", help="Column whose equal values stay together.")] = None,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Apply a recipe that a search has found to another network; proves nothing."""
    from hasten import applying

    columns = applying.Columns(score=score, target=target, group=group)
    try:
        with _progress(json_) as watcher:
            found = applying.apply(recipe, source_of(model, weights, pin), data, out=out, columns=columns, seed=seed, watcher=watcher)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", INTERRUPTED)
    print(json.dumps(found.to_json(), indent=1) if json_ else found)


@app.command()
def evaluate(
    network: Annotated[str, typer.Argument(help="A run folder or its artifact, or a network as for optimize.")],
    data: Annotated[Path, typer.Option("--data", help="Formats as for optimize.")],
    against: Annotated[str | None, typer.Option("--against", help="Another one, on the same examples.")] = None,
    against_weights: Annotated[Path | None, typer.Option("--against-weights", help="Its --weights.")] = None,
    weights: Weights = None,
    pin: Pins = [],  # noqa: B006
    score: Annotated[str | None, typer.Option("--score", help="accuracy, top5, squared-error, macro-f1, auc, …")] = None,
    target: Annotated[str | None, typer.Option("--target", help="Column or array with the labels.")] = None,
    group: Annotated[str | None, typer.Option("--group", help="Column that is no input.")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Examples of a call.")] = 64,
    confidence: Annotated[float, typer.Option("--confidence", help="Of the intervals.")] = 0.95,
    noise: Annotated[float, typer.Option("--noise", help="Score again with noise, a share of the inputs' deviation.")] = 0.0,
    ray: Annotated[str | None, typer.Option("--ray", help="Address of a Ray cluster whose nodes share the examples.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="In the cluster; one on each node without it.")] = None,
    json_: Json = False,
) -> None:
    """Score a network, or a result, on data, with what chance leaves open."""
    from hasten import applying, evaluating, judging

    columns = applying.Columns(score=score, target=target, group=group)
    asked = judging.Asked(columns=columns, batch=batch, confidence=confidence, noise=noise, ray=ray, workers=workers)
    other = against and source_of(against, against_weights, pin)
    try:
        with _progress(json_) as watcher:
            found = evaluating.evaluate(source_of(network, weights, pin), data, against=other, asked=asked, watcher=watcher)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", INTERRUPTED)
    print(json.dumps(found.to_json(), indent=1) if json_ else found)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="A built-in task, or script.py:name of a network of yours.")],
    data: Annotated[str | None, typer.Option("--data", help="For a network of yours: a file, a folder or a task.")] = None,
    validation: Annotated[str | None, typer.Option("--validation", help="Data to look at; a task has its own.")] = None,
    network: Annotated[str | None, typer.Option("--network", help="For a task: mlp, small_cnn, resnet20, lstm, words, …")] = None,
    run: Annotated[Path | None, typer.Option("--run", help="Folder; the same command goes on there.")] = None,
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the data.")] = 10.0,
    batch: Annotated[int, typer.Option("--batch", help="Examples per step; 0 for all of them.")] = 128,
    steps: Annotated[int | None, typer.Option("--steps", help="Of the optimizer, in the place of --epochs.")] = None,
    rate: Annotated[str, typer.Option("--lr", help="Learning rate at its highest, or auto.")] = "0.002",
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw, muon, sgd, lion, schedule_free, sam, …")] = "adamw",
    schedule: Annotated[str, typer.Option("--schedule", help="linear, cosine, one-cycle, steps, …")] = "linear",
    warm_up: Annotated[float, typer.Option("--warm-up", help="Share of the steps; one-cycle has its own.")] = 0.2,
    loss: Annotated[str, typer.Option("--loss", help="classes or values.")] = "classes",
    stop_loss: Annotated[float | None, typer.Option("--stop-loss", help="End when a pass has a mean loss this low.")] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", help="End after this time.")] = None,
    patience: Annotated[int | None, typer.Option("--patience", help="End after so many looks without a gain.")] = None,
    precision: Annotated[str, typer.Option("--precision", help="float32, bfloat16 or float16.")] = "float32",
    augment: Annotated[str, typer.Option("--augment", help="none or shift.")] = "none",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, mps, or xla (tpu).")] = "cpu",
    target: Annotated[str | None, typer.Option("--target", help="Column or array with the labels.")] = None,
    standardize: Annotated[bool, typer.Option("--standardize", help="Inputs to mean 0 and variance 1, inside the network.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write events for TensorBoard as well.")] = False,
    set_: Annotated[
        list[str], typer.Option("--set", help="NAME=VALUE for any field of Fit: accumulate=4, average.kind=ema; may be repeated.")
    ] = [],  # noqa: B006
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Train a network; the run folder takes its curves, its log and the network as model.pt2."""
    words = dict(locals())  # they go on under their own names
    from hasten import training

    found = training.train(*training.asked({**words, "learning_rate": rate_of(rate)}), as_json=json_)
    if json_:
        print(json.dumps(found, indent=1))
    else:
        for name, value in found.items():
            print(f"{name.replace('_', ' '):18} {value}")


@app.command()
def demo(
    task: Annotated[str, typer.Option("--task", help="mnist5k, or fashion_mnist where it is installed.")] = "mnist5k",
    run: Annotated[Path | None, typer.Option("--run", help="Folder; by default runs/demo-TASK.")] = None,
    max_drop: Drop = "1pt",
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Train a small network on real images, make it fast, and prove it."""
    from hasten import demo as demonstration

    with _progress(json_) as watcher:
        place = run or Path("runs") / f"demo-{task}"
        found = demonstration.demo(place, task=task, max_drop=max_drop, seed=seed, watcher=watcher, say=_say)
    _show(found, json_)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder: finished, running or broken off.")],
    html: Annotated[Path | None, typer.Option("--html", help="Write the page to this file.")] = None,
    json_: Json = False,
) -> None:
    """Show what a run has found so far."""
    from hasten import verbs

    found = verbs.load_report(run)
    if html:
        verbs.write_page(found, html)
    _show(found, json_, running=True)


@app.command()
def benchmark(
    model: Model,
    data: Annotated[Path | None, typer.Option("--data", help="Real inputs; random ones without.")] = None,
    weights: Weights = None,
    pin: Pins = [],  # noqa: B006
    batch: Annotated[list[int], typer.Option("--batch", help="Batch size; may be given more than once.")] = [1, 32],  # noqa: B006
    every: Annotated[bool, typer.Option("--every", help="Also engines that take minutes to compile, and why others are absent.")] = False,
    json_: Json = False,
) -> None:
    """Race the engines on the unchanged network."""
    from hasten import racing

    with _progress(json_) as watcher:
        found = racing.benchmark(source_of(model, weights, pin), data, batches=tuple(batch), every=every, watcher=watcher)
    if json_:
        print(json.dumps(found, indent=1))
    else:
        racing.show(found, _console())
    raise typer.Exit(0)


@app.command()
def inspect(
    model: Model,
    data: Annotated[Path | None, typer.Option("--data", help="Real inputs; random ones without.")] = None,
    weights: Weights = None,
    pin: Pins = [],  # noqa: B006
    batch: Annotated[int, typer.Option("--batch", help="Rows of a call.")] = 1,
    threads: Annotated[int, typer.Option("--threads", help="Of one operator; 0 for all cores.")] = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Write the page to this file.")] = None,
    json_: Json = False,
) -> None:
    """Show the layers, where the time of a call goes, and what is likely to make it shorter."""
    from hasten import inspecting

    with _progress(json_) as watcher:
        found = inspecting.inspect(source_of(model, weights, pin), data, batch=batch, threads=threads, watcher=watcher)
    if html:
        inspecting.write_page(found, html)
    if json_:
        print(json.dumps(found, indent=1))
    else:
        inspecting.show(found, _console())


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="A finished run folder, or a network as for optimize.")],
    to: Annotated[str, typer.Option("--to", help="onnx, openvino, pt2, aotinductor, tflite, executorch, safetensors.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder; by default export/FORMAT in the run.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Inputs to check a model file on; random ones without.")] = None,
    weights: Weights = None,
    pin: Pins = [],  # noqa: B006
    tolerance: Annotated[float | None, typer.Option("--tolerance", help="Share of the largest output. [default: 0.001 or 0.01]")] = None,
    json_: Json = False,
) -> None:
    """Write a result in another format, checked in that format's own runtime; what differs goes to rejected/."""
    from hasten import exporting

    with _progress(json_) as watcher:
        found = exporting.export(source_of(source, weights, pin), to, out=out, data=data, tolerance=tolerance, watcher=watcher)
    print(json.dumps(found.to_json(), indent=1) if json_ else found)
    raise typer.Exit(found.exit_code)


@app.command()
def doctor(json_: Json = False) -> None:
    """Say what this machine is and what is missing."""
    from hasten import doctor as checkup

    found = checkup.doctor()
    if json_:
        print(json.dumps(found, indent=1))
    else:
        checkup.show(found, _console())


@app.command()
def tasks(json_: Json = False) -> None:
    """List the built-in tasks and where their data comes from."""
    from hasten import tasks as built_in

    found = [{"name": name, "missing": built_in.missing(name)} for name in built_in.names()]
    if json_:
        print(json.dumps(found, indent=1))
    else:
        for entry in found:
            print(f"{entry['name']:16} {entry['missing'] or 'ready'}")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from hasten import __version__

        print(__version__)
        raise typer.Exit(0)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; every error is one line on standard error and an exit code of docs/format.md."""
    try:
        code = app(args=arguments, standalone_mode=False)
        if code == INTERRUPTED:  # typer's word for Ctrl-C
            raise KeyboardInterrupt
    except HastenError as why:
        _fail(str(why), why.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from here", INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as why:
        told = getattr(why, "format_message", None)  # what typer raises on words that it cannot use
        if told is None:
            raise
        _fail(told(), 2)
    sys.exit(code if isinstance(code, int) else 0)


def _show_interrupted(found: Any, as_json: bool) -> NoReturn:
    """Prints the report so far; leaves with the exit code of an unfinished run, for which `main` has the words."""
    best = Path(found.artifact).with_name("best-so-far") if found.artifact else None
    if best and best.is_dir():
        print(f"hasten: the best so far, not proved yet, is in {best}", file=sys.stderr)
    _show(found, as_json)


def _fail(message: str, code: int) -> NoReturn:
    print(f"hasten: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _command() -> str:
    return shlex.join(["hasten", *sys.argv[1:]])


def _say(words: str) -> None:
    print(words, file=sys.stderr)


def _console() -> Any:
    from rich.console import Console

    return Console()


def _progress(as_json: bool = False) -> Any:
    from hasten.live import Live

    return Live(sys.stderr, as_json=as_json)


def _show(found: Report, as_json: bool, *, running: bool = False) -> NoReturn:
    """Prints the report and leaves with its exit code; looking at an unfinished run is no error."""
    if as_json:
        from hasten.report import json_text

        print(json_text(found), end="")
    else:
        from hasten.report.terminal import show

        show(found, _console())
    code: Literal[0] | int = 0 if running and found.state != "finished" else found.exit_code
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
