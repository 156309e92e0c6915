"""`hf-reflect estimate`: what a run would cost, before it costs anything much."""

from typing import Annotated

import typer

from hf_reflect.cli import options as opt
from hf_reflect.cli.output import one_line_warnings, quieten_datasets


def estimate(
    source: opt.Source,
    oracle: opt.OracleOption = None,
    oracle_model: opt.OracleModel = None,
    sample: Annotated[int, typer.Option(min=2, help="Rows to ask about. They are paid for, once.")] = 20,
    price_in: opt.PriceIn = None,
    price_out: opt.PriceOut = None,
    prompts: opt.PromptsOption = None,
    name: opt.Name = None,
    split: opt.Split = None,
    limit: opt.Limit = None,
    seed: opt.Seed = None,
    max_tokens: opt.MaxTokens = None,
    temperature: opt.Temperature = None,
    concurrency: opt.Concurrency = None,
    timeout: opt.Timeout = None,
    attempts: opt.Attempts = 5,
    patience: opt.Patience = 120.0,
    rpm: opt.Rpm = None,
    tpm: opt.Tpm = None,
    pause_after: opt.PauseAfter = False,
    journal: opt.JournalOption = None,
) -> None:
    """Run a sample of SOURCE, and say what all of it would take: calls, tokens, time and cost.

    \b
    hf-reflect estimate tatsu-lab/alpaca --oracle http://localhost:8000/v1
    hf-reflect estimate data.jsonl --oracle hf:Qwen/Qwen3-32B --price-in 0.1 --price-out 0.3
    """
    from hf_reflect.estimating import Range
    from hf_reflect.estimating import estimate as estimate_run
    from hf_reflect.oracles.pace import Limits

    quieten_datasets()
    sampling = {"seed": seed, "max_tokens": max_tokens, "temperature": temperature}
    with one_line_warnings():
        found = estimate_run(
            source,
            oracle=oracle or "local",
            sample=sample,
            price_in=price_in,
            price_out=price_out,
            prompts=prompts,
            sampling={key: value for key, value in sampling.items() if value is not None},
            name=name,
            split=split,
            limit=limit,
            journal=journal,
            model=oracle_model,
            concurrency=concurrency,
            timeout=timeout,
            pause_after=pause_after or None,
            limits=Limits(attempts=attempts, patience=patience, rpm=rpm, tpm=tpm),
        )

    def shown(total: Range, digits: int = 0) -> str:
        return f"{total.value:,.{digits}f}  ({total.low:,.{digits}f} to {total.high:,.{digits}f})"

    lines = [
        ("rows", f"{found.rows:,}, of which {found.sampled} were sampled ({found.paid} calls paid for now)"),
        ("calls", shown(found.calls)),
        ("tokens read", shown(found.prompt_tokens)),
        ("tokens written", shown(found.completion_tokens)),
    ]
    if found.cost is not None and found.prices is not None:
        lines.append(
            ("cost", f"{shown(found.cost, 2)} at {found.prices[0]:g} / {found.prices[1]:g} per million tokens")
        )
    else:
        lines.append(("cost", "unknown: give --price-in and --price-out, per million tokens"))
    lines.append(
        ("time", "unknown: the whole sample was in the journal" if found.seconds is None else _time(found.seconds))
    )
    if found.failed:
        lines.append(("failed", f"{found.failed:.0%} of the sample's reflections"))
    for title, value in lines:
        typer.echo(f"{title:<16}{value}")
    typer.echo("in brackets: 95 % intervals; what the journal already has costs nothing")


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
