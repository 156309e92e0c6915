"""`hf-reflect recycle`: the main job."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_reflect.cli import output
from hf_reflect.cli.options import (
    BoundaryOption,
    DtypeOption,
    Limit,
    MaxLength,
    MeasureOption,
    Name,
    Out,
    Overwrite,
    Source,
    Split,
    Template,
)


_STUDENT_OPTIONS = ("template", "boundary", "measure", "dtype", "max_length")


class Method(StrEnum):
    """What decides."""

    selective = "selective"
    reflect = "reflect"


class Keep(StrEnum):
    """Which rows stay."""

    all = "all"
    reflected = "reflected"
    below_one = "below-one"


def recycle(
    source: Source,
    out: Out,
    oracle: Annotated[
        str | None,
        typer.Option(
            help="Who reflects: local (an embedded small model), local:PATH.gguf, or the URL of an OpenAI-compatible "
            "server, such as http://localhost:8000/v1.  [default: local]"
        ),
    ] = None,
    oracle_model: Annotated[str | None, typer.Option(help="The model's name at the server.")] = None,
    student: Annotated[
        str | None,
        typer.Option(
            help="Who decides: local, a Hub id, a folder or a .gguf file; with --method reflect also none.  "
            "[default: local]"
        ),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(help="selective: the student decides; reflect: every rewrite is kept.  [default: selective]"),
    ] = None,
    keep: Annotated[
        Keep | None,
        typer.Option(
            help="all: rejected rows stay as they were; reflected: only rows with a reflected response; below-one: of "
            "those, only IFD < 1 and r-IFD < 1.  [default: all]"
        ),
    ] = None,
    gate_first: Annotated[
        bool | None, typer.Option("--gate-first", help="A rewrite with IFD >= 1 never displaces a pair below it.")
    ] = None,
    template: Template = None,
    boundary: BoundaryOption = None,
    measure: MeasureOption = None,
    dtype: DtypeOption = None,
    max_length: MaxLength = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="paper, json, staged, or a YAML file.  [default: paper; staged for an embedded oracle]",
            metavar="STYLE|FILE",
        ),
    ] = None,
    name: Name = None,
    split: Split = None,
    limit: Limit = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the oracle's sampling.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest reply in tokens.  [default: 2048; 320 for an embedded oracle]")
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Of the oracle's sampling.  [default: 0]")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Calls to the oracle in flight at once.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A recipe.yaml whose settings apply where no option is given.")
    ] = None,
    journal: Annotated[
        Path | None, typer.Option(help="Where replies and scores are kept.  [default: a file under HF_HOME]")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Reflect on every pair of SOURCE, let the student decide, and write the recycled dataset to OUT.

    Run the same command again to go on after an interruption: nothing is paid for twice.

    \b
    hf-reflect recycle alpaca_data.json recycled --limit 40
    hf-reflect recycle tatsu-lab/alpaca recycled --oracle http://localhost:8000/v1 --student Qwen/Qwen2.5-0.5B
    hf-reflect recycle data.jsonl recycled --method reflect --student none --prompts json
    """
    given = {
        "oracle": oracle,
        "oracle_model": oracle_model,
        "student": student,
        "method": method and str(method),
        "keep": keep and str(keep),
        "gate_first": gate_first,
        "template": template,
        "boundary": boundary and str(boundary),
        "measure": measure and str(measure),
        "dtype": dtype and str(dtype),
        "max_length": max_length,
        "prompts": prompts,
        "name": name,
        "split": split,
        "limit": limit,
        "seed": seed,
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    settings = {**(_from_recipe(config) if config else {}), **{k: v for k, v in given.items() if v is not None}}
    run(source, out, settings, concurrency=concurrency, journal=journal, overwrite=overwrite)


def run(source: str, out: Path, settings: dict[str, Any], *, concurrency: int | None = None, **options: Any) -> None:
    """Recycles with these settings and prints what came of it."""
    from hf_reflect.oracles import Sampling, load_oracle
    from hf_reflect.recycling import recycle as recycle_dataset

    output.quieten_datasets()
    oracle_options = {"model": settings.pop("oracle_model", None), "concurrency": concurrency}
    sampling = {key: settings.pop(key) for key in ("max_tokens", "temperature", "top_p") if key in settings}
    if settings.get("student") == "none":
        settings["student"] = None
    student_options = {key: settings.pop(key) for key in _STUDENT_OPTIONS if key in settings}
    oracle = load_oracle(settings.pop("oracle", "local"), **oracle_options)
    with output.one_line_warnings():
        recycled = recycle_dataset(
            source,
            out,
            oracle=oracle,
            student_options=student_options,
            sampling=Sampling(**{"max_tokens": oracle.max_tokens, **sampling}),
            **settings,
            **options,
        )
    typer.echo(output.summary(recycled.summary))
    output.say_where(out)


def _from_recipe(path: Path) -> dict[str, Any]:
    from hf_reflect.prompts import Prompts
    from hf_reflect.recipe import Recipe

    recipe = Recipe.read(path)
    oracle, student = recipe.oracle, recipe.student
    settings = {
        "oracle": oracle["spec"],
        "oracle_model": oracle["identity"]["model"] if oracle["identity"]["kind"] == "chat" else None,
        "student": student["spec"] if student else "none",
        **(_student_options(student) if student else {}),
        "method": recipe.method,
        "keep": recipe.keep,
        "gate_first": recipe.gate_first,
        "prompts": Prompts.from_dict(recipe.prompts, str(path)),
        **{key: recipe.source.get(key) for key in ("name", "split", "limit")},
        **oracle["sampling"],
    }
    return {key: value for key, value in settings.items() if value is not None}


def _student_options(student: Mapping[str, Any]) -> dict[str, Any]:
    from hf_reflect.student.templates import TextTemplate

    options = {key: student["identity"][key] for key in _STUDENT_OPTIONS}
    return {**options, "template": TextTemplate(**student["template"])} if "template" in student else options
