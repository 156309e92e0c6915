"""`hf-reflect recycle` and `reselect`: the main job."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_reflect.cli import options as opt
from hf_reflect.cli import output
from hf_reflect.cli.hub import check_target, push_result
from hf_reflect.errors import HfReflectError


if TYPE_CHECKING:
    from hf_reflect.sources import Source

_STUDENT_OPTIONS = ("template", "boundary", "measure", "dtype", "max_length")
_SAMPLING = ("max_tokens", "temperature", "top_p", "seed")


class Method(StrEnum):
    """What decides."""

    selective = "selective"
    reflect = "reflect"


class Keep(StrEnum):
    """Which rows stay."""

    all = "all"
    reflected = "reflected"
    below_one = "below-one"


MethodOption = Annotated[
    Method | None,
    typer.Option(help="selective: the student decides; reflect: every rewrite is kept.  [default: selective]"),
]
KeepOption = Annotated[
    Keep | None,
    typer.Option(
        help="all: rejected rows stay as they were; reflected: only rows with a reflected response; below-one: of "
        "those, only IFD < 1 and r-IFD < 1.  [default: all]"
    ),
]
GateFirst = Annotated[
    bool | None, typer.Option("--gate-first", help="A rewrite with IFD >= 1 never displaces a pair below it.")
]


def recycle(
    source: opt.Source,
    out: opt.Out,
    oracle: opt.OracleOption = None,
    oracle_model: opt.OracleModel = None,
    student: opt.Student = None,
    method: MethodOption = None,
    keep: KeepOption = None,
    gate_first: GateFirst = None,
    template: opt.Template = None,
    boundary: opt.BoundaryOption = None,
    measure: opt.MeasureOption = None,
    dtype: opt.DtypeOption = None,
    max_length: opt.MaxLength = None,
    prompts: opt.PromptsOption = None,
    name: opt.Name = None,
    split: opt.Split = None,
    limit: opt.Limit = None,
    seed: opt.Seed = None,
    max_tokens: opt.MaxTokens = None,
    temperature: opt.Temperature = None,
    retry_truncated: opt.RetryTruncated = None,
    guards: opt.GuardsOption = None,
    longest: opt.Longest = None,
    similarity: opt.Similarity = None,
    concurrency: opt.Concurrency = None,
    timeout: opt.Timeout = None,
    attempts: opt.Attempts = 5,
    patience: opt.Patience = 120.0,
    rpm: opt.Rpm = None,
    tpm: opt.Tpm = None,
    max_tokens_total: opt.MaxTokensTotal = None,
    max_cost: opt.MaxCost = None,
    price_in: opt.PriceIn = None,
    price_out: opt.PriceOut = None,
    pause_after: opt.PauseAfter = False,
    push_to_hub: opt.PushToHub = None,
    private: opt.Private = False,
    config: Annotated[
        Path | None, typer.Option(help="A recipe.yaml whose settings apply where no option is given.")
    ] = None,
    journal: opt.JournalOption = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Reflect on every pair of SOURCE, let the student decide, and write the recycled dataset to OUT.

    Run the same command again to go on after an interruption: nothing is paid for twice.

    \b
    hf-reflect recycle alpaca_data.json recycled --limit 40
    hf-reflect recycle tatsu-lab/alpaca recycled --oracle http://localhost:8000/v1 --student Qwen/Qwen2.5-0.5B
    hf-reflect recycle data.jsonl recycled --oracle hf:Qwen/Qwen3-32B --price-in 0.1 --price-out 0.3 --max-cost 20
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
        "retry_truncated": retry_truncated,
        "guards": guards_from(guards, longest, similarity),
    }
    check_target(push_to_hub)
    recorded = _from_recipe(config) if config else {}
    if config and not (oracle or recorded.get("oracle")):
        raise HfReflectError(f"recipe {config}: its oracle was an object without a spec; name one with --oracle.")
    settings = {**recorded, **{key: value for key, value in given.items() if value is not None}}
    limits = {
        "attempts": attempts,
        "patience": patience,
        "rpm": rpm,
        "tpm": tpm,
        "max_tokens_total": max_tokens_total,
        "max_cost": max_cost,
        "price_in": price_in,
        "price_out": price_out,
    }
    server = {"concurrency": concurrency, "timeout": timeout, "pause_after": pause_after or None}
    run(source, out, settings, limits, server, journal=journal, overwrite=overwrite)
    push_result(out, push_to_hub, private)


def reselect(
    source: Annotated[str, typer.Argument(help="A recycled dataset: a folder that a run wrote, or its Hub id.")],
    out: opt.Out,
    student: Annotated[
        str, typer.Option(help="Who decides this time: local, a Hub id, a folder or a .gguf file.")
    ] = "local",
    method: MethodOption = None,
    keep: KeepOption = None,
    gate_first: GateFirst = None,
    template: opt.Template = None,
    boundary: opt.BoundaryOption = None,
    measure: opt.MeasureOption = None,
    dtype: opt.DtypeOption = None,
    max_length: opt.MaxLength = None,
    data: Annotated[
        str | None,
        typer.Option(help="The dataset that was recycled, where SOURCE lacks rows.  [default: what its recipe names]"),
    ] = None,
    push_to_hub: opt.PushToHub = None,
    private: opt.Private = False,
    journal: opt.JournalOption = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Let another student select among the rewrites of a recycled dataset, without a call to an oracle.

    \b
    hf-reflect reselect recycled recycled-for-llama --student meta-llama/Llama-3.2-1B
    """
    from hf_reflect.reselecting import reselect as reselect_dataset

    check_target(push_to_hub)
    output.quieten_datasets()
    decided = {"method": method, "keep": keep}
    judged = {"template": template, "boundary": boundary, "measure": measure, "dtype": dtype, "max_length": max_length}
    with output.one_line_warnings():
        recycled = reselect_dataset(
            source,
            out,
            student=None if student == "none" else student,
            gate_first=bool(gate_first),
            data=data,
            student_options={
                key: str(value) if isinstance(value, StrEnum) else value for key, value in judged.items()
            },
            journal=journal,
            overwrite=overwrite,
            **{key: str(value) for key, value in decided.items() if value is not None},
        )
    typer.echo(output.summary(recycled.summary))
    output.say_where(out)
    push_result(out, push_to_hub, private)


def run(
    source: "str | Source",
    out: Path,
    settings: dict[str, Any],
    limits: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Recycles with these settings and prints what came of it."""
    from hf_reflect.oracles.pace import Limits
    from hf_reflect.recycling import recycle as recycle_dataset

    output.quieten_datasets()
    oracle_options = {"model": settings.pop("oracle_model", None), **(server or {})}
    sampling = {key: settings.pop(key) for key in _SAMPLING if key in settings}
    if settings.get("student") == "none":
        settings["student"] = None
    student_options = {key: settings.pop(key) for key in _STUDENT_OPTIONS if key in settings}
    with output.one_line_warnings():
        recycled = recycle_dataset(
            source,
            out,
            oracle_options=oracle_options,
            student_options=student_options,
            sampling=sampling,
            limits=Limits(**(limits or {})),
            **settings,
            **options,
        )
    typer.echo(output.summary(recycled.summary))
    if not_asked := recycled.summary.spent.not_asked:
        typer.echo(f"\nthe budget was reached: {not_asked} calls were not made, and their rows are as they were.")
        typer.echo("Run the same command again to go on, with as large a budget once more.")
    output.say_where(out)


def guards_from(names: str | None, longest: float | None, similarity: float | None) -> Any:
    """The guards that options ask for; null where they say nothing."""
    from hf_reflect.guards import DEFAULT_GUARDS, Guards

    chosen = (
        list(DEFAULT_GUARDS)
        if names is None
        else [n for n in map(str.strip, names.split(",")) if n not in ("", "none")]
    )
    thresholds = {"length": ("longest", longest), "similarity": ("similarity", similarity)}
    asked = {key: value for key, value in thresholds.values() if value is not None}
    chosen += [guard for guard, (_, value) in thresholds.items() if value is not None and guard not in chosen]
    if names is None and not asked:
        return None
    return Guards(names=tuple(chosen), **asked)  # type: ignore[arg-type]


def _from_recipe(path: Path) -> dict[str, Any]:
    from hf_reflect.guards import Guards
    from hf_reflect.prompts import Prompts
    from hf_reflect.recipe import Recipe
    from hf_reflect.teachers import oracle_specs

    recipe = Recipe.read(path)
    oracles, student = recipe.oracles, recipe.student
    settings = {
        "oracle": oracle_specs(oracle.get("spec") for oracle in oracles),
        "student": student["spec"] if student else "none",
        **(_student_options(student) if student else {}),
        "method": recipe.method,
        "keep": recipe.keep,
        "gate_first": recipe.gate_first,
        "guards": Guards.from_dict(recipe.guards),
        "retry_truncated": recipe.retry_truncated,
        **{key: recipe.source.get(key) for key in ("name", "split", "limit")},
    }
    # Where oracles were asked differently it was because that suits each, as it will again.
    if all(oracle["prompts"] == oracles[0]["prompts"] for oracle in oracles):
        settings["prompts"] = Prompts.from_dict(oracles[0]["prompts"], str(path))
    if all(oracle["sampling"] == oracles[0]["sampling"] for oracle in oracles):
        settings |= oracles[0]["sampling"]
    return {key: value for key, value in settings.items() if value is not None}


def _student_options(student: Mapping[str, Any]) -> dict[str, Any]:
    from hf_reflect.student.templates import TextTemplate

    options = {key: student["identity"][key] for key in _STUDENT_OPTIONS}
    return {**options, "template": TextTemplate(**student["template"])} if "template" in student else options
