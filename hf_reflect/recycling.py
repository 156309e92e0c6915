"""The whole run: a source goes through the chain of transforms, shard by shard, into a folder.

Shards are contiguous pieces of some hundred rows. A few of them are in flight at once, each in a thread that maps the
chain over it, so the oracle answers for one shard while the student scores another; one limit on the oracle's calls
holds across all of them. Memory is bounded by the shards in flight.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_reflect import __version__
from hf_reflect.cards import CardData, render_card
from hf_reflect.columns import DEFAULT, REFLECTIONS
from hf_reflect.describing import Description
from hf_reflect.errors import OracleError, OutputError, RecipeError, SourceError
from hf_reflect.guards import Guards
from hf_reflect.journal import Journal, open_journal
from hf_reflect.merging import sign
from hf_reflect.oracles import Sampling
from hf_reflect.oracles.base import close_all
from hf_reflect.oracles.pace import Limits
from hf_reflect.output import DataFiles, OutputFolder
from hf_reflect.plotting import can_draw, draw
from hf_reflect.progress import bars
from hf_reflect.prompts import Prompts
from hf_reflect.recipe import Recipe
from hf_reflect.selection import Keep, Method, check
from hf_reflect.sources import Source, load_source
from hf_reflect.student import Student, load_student, warn_of_template
from hf_reflect.summary import Summary
from hf_reflect.teachers import OracleSpec, Teacher, teachers
from hf_reflect.transforms import (
    KeepRecycled,
    ReflectInstruction,
    ReflectResponse,
    ScoreIFD,
    ScoreReversedIFD,
    SelectInstruction,
    SelectResponse,
    Transform,
)


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_SHARD = 200
_SHARDS_IN_FLIGHT = 5
_SHARDS_HELD = 25
_SCORED_TOGETHER = 32


@dataclass(frozen=True)
class Recycled:
    """The result of a run.

    Attributes:
        recipe: What was done.
        summary: What came of it, in numbers.
        folder: Where it was written; null if it was not.
    """

    recipe: Recipe
    summary: Summary
    folder: Path | None
    _load: Callable[[str], Any]

    @cached_property
    def dataset(self) -> "Dataset | DatasetDict":
        """The recycled dataset, in the shape of the source; opened when first asked for."""
        return self._load("default")

    @cached_property
    def reflections(self) -> "Dataset | DatasetDict":
        """The audit trail, one row per row of the source; opened when first asked for."""
        return self._load("reflections")

    def __iter__(self) -> Iterator[Any]:
        """So that `dataset, reflections = recycle(...)` works."""
        return iter((self.dataset, self.reflections))

    def _repr_html_(self) -> str:
        """What a notebook shows: the statistics, with pictures where the extra `plots` is installed."""
        description = Description.of(self.summary)
        where = f"<p>written to <code>{escape(str(self.folder))}</code></p>" if self.folder else ""
        pictures = "".join(picture.to_html() for picture in draw(description)) if can_draw() else ""
        return f"{where}{pictures}{description._repr_html_()}"


def recycle(
    dataset: "str | Path | Dataset | DatasetDict | Source",
    output: str | Path | None = None,
    *,
    oracle: OracleSpec | Sequence[OracleSpec] = "local",
    student: "str | Student | None" = "local",
    method: Method = "selective",
    keep: Keep = "all",
    gate_first: bool = False,
    prompts: str | Path | Prompts | None = None,
    name: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    sampling: Sampling | Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    guards: Guards | None = None,
    retry_truncated: int | None = None,
    oracle_options: dict[str, Any] | None = None,
    student_options: dict[str, Any] | None = None,
    journal: Journal | str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Recycled:
    """Recycles an instruction dataset: the oracle reflects on every pair, the student decides what is kept.

    The result is the same however often the run was interrupted: whatever was paid for is in the journal.

    Args:
        dataset: A Hub id, a folder, a file, a `Dataset` or a `DatasetDict`.
        output: The folder to write; without one the result is only returned.
        oracle: Who reflects: a spec (`local`, `http(s)://HOST/v1`, `tgi:URL`, `hf:MODEL`, ...; see `load_oracle`), an
            `Oracle`, or several of them, whose rewrites compete.
        student: Who decides: `local`, a Hub id, a folder, a `.gguf` file, or a `Student`. None (or `"none"`) with
            method `reflect`: nothing is scored, and torch is not loaded.
        method: `selective` (arXiv 2402.10110) or `reflect` (arXiv 2310.11716), which keeps every rewrite.
        keep: `all` leaves rejected rows as they were; `reflected` keeps only rows with a reflected response;
            `below-one` also requires IFD < 1 and r-IFD < 1.
        gate_first: A rewrite with IFD of 1 or more never displaces a pair below it.
        prompts: A style (`paper`, `json`, `staged`), a YAML file, or `Prompts`; by default what suits the oracle.
        name: The configuration of the source, where it has several.
        split: Only this split.
        limit: Only the first so many rows of each split.
        seed: For the oracle's sampling.
        sampling: How the oracle samples, or the part of it to change; by default greedily, at most as many tokens as
            suit it.
        limits: What asking may cost, how fast it may be and how hard it may try. When the budget is reached, rows that
            were not asked about stay as they were; run again, with as much once more, to go on.
        guards: What a rewrite must not do.
        retry_truncated: Asks once more, with room for so many tokens, where a reply was cut off.
        oracle_options: What else `load_oracle` takes with a spec: `model`, `api_key`, `concurrency`, `timeout`,
            `pause_after`.
        student_options: What else `load_student` takes with a spec: `template`, `boundary`, `measure`, `dtype`,
            `max_length`.
        journal: Where replies and scores are kept; by default under `HF_HOME`.
        overwrite: Replace a folder that holds the result of another recipe.
        progress: Show a bar per phase (on a terminal).

    Returns:
        The recycled dataset with its audit trail.

    Raises:
        HfReflectError: the source, the oracle, the student or the output can't be used; the message says what to do.
    """
    check("method", method, Method)
    check("keep", keep, Keep)
    scored = student not in (None, "none")
    if method == "selective" and not scored:
        raise RecipeError("method selective needs a student; without one only --method reflect is possible.")
    if keep == "below-one" and not scored:
        raise RecipeError("keep below-one needs scores, so it needs a student.")
    if limit is not None and limit < 1:
        raise RecipeError(f"limit must be at least 1, not {limit}.")
    source = load_source(dataset, name=name, split=split, limit=limit)
    splits = {key: rows for key, rows in source.splits.items() if len(rows)}
    if not splits:
        raise SourceError(f"{source.provenance['path']}: there are no rows.")
    book = journal if isinstance(journal, Journal) else open_journal(journal)
    checks = guards or Guards()
    judge = load_student(student, **(student_options or {})) if scored and student is not None else None
    sampling = _seeded(sampling, seed)
    asked = teachers(oracle, prompts=prompts, sampling=sampling, journal=book, limits=limits, **(oracle_options or {}))
    with _closing(asked):
        recipe = Recipe(
            source={**source.provenance, "split": split, "limit": limit},
            method=method,
            keep=keep,
            gate_first=gate_first,
            oracles=[{"spec": teacher.spec, "name": teacher.name, **teacher.identity} for teacher in asked],
            guards=checks.to_dict(),
            retry_truncated=retry_truncated,
            student=judge.recipe if judge else None,
            version=__version__,
            about=source.about,
        )
        reflecting = {"guards": checks, "retry_truncated": retry_truncated}
        steps = chain(asked, judge, method=method, gate_first=gate_first, journal=book, **reflecting)
        folder = OutputFolder(output, recipe, overwrite=overwrite) if output is not None else None
        summary = Summary(purse=asked[0].oracle.purse, policy=keep)
        try:
            parts = _run(splits, steps, KeepRecycled(keep), summary, folder, asked, progress)
            if folder is not None:
                _publish(folder, recipe, summary, str(output))
        except BaseException:
            if folder is not None:
                folder.discard()
            raise
    if judge is not None:
        warn_of_template(judge, summary.ifd_at_least_one, summary.rows)
    load = partial(_collect, parts, folder, list(splits), source.single)
    return Recycled(recipe, summary, folder.path if folder else None, load)


def _seeded(sampling: Sampling | Mapping[str, Any] | None, seed: int | None) -> Sampling | Mapping[str, Any] | None:
    if seed is None:
        return sampling
    return replace(sampling, seed=seed) if isinstance(sampling, Sampling) else {**(sampling or {}), "seed": seed}


@contextmanager
def _closing(asked: list[Teacher]) -> Iterator[None]:
    """Ends the use of the oracles, whatever happens: an endpoint may have to be paused."""
    try:
        yield
    except BaseException:
        close_all(teacher.oracle.oracle for teacher in asked)
        raise
    close_all(teacher.oracle.oracle for teacher in asked)


@dataclass(frozen=True)
class Step:
    """One `map` of the chain.

    Attributes:
        title: What the progress bar says.
        transform: What is mapped.
        batch_size: Rows it gets at once.
    """

    title: str
    transform: Transform
    batch_size: int

    @property
    def slow(self) -> bool:
        """Whether it is worth a progress bar."""
        return not isinstance(self.transform, SelectInstruction | SelectResponse)


def chain(
    teachers: Sequence[Teacher],
    student: Student | None,
    *,
    method: Method,
    gate_first: bool,
    journal: Journal,
    **reflecting: Any,
) -> list[Step]:
    """The transforms of a run, in order: the same that one would chain by hand."""

    def reflect(kind: type[ReflectInstruction] | type[ReflectResponse], title: str) -> Step:
        return Step(title, kind(teachers, journal=journal, **reflecting), _SHARD)

    def score(kind: type[ScoreIFD] | type[ScoreReversedIFD], title: str) -> list[Step]:
        return [] if student is None else [Step(title, kind(student, journal=journal), _SCORED_TOGETHER)]

    def select(kind: type[SelectInstruction] | type[SelectResponse], title: str) -> Step:
        return Step(title, kind(method, gate_first=gate_first), _SHARD)

    return [
        reflect(ReflectInstruction, "reflect on instructions"),
        *score(ScoreIFD, "score IFD"),
        select(SelectInstruction, "select instructions"),
        reflect(ReflectResponse, "reflect on responses"),
        *score(ScoreReversedIFD, "score r-IFD"),
        *(score(ScoreIFD, "score IFD of rewrites") if gate_first else []),
        select(SelectResponse, "select responses"),
        *score(ScoreIFD, "score final IFD"),
    ]


Parts = dict[tuple[str, str], list["Dataset"]]


def _run(
    splits: Any,
    steps: list[Step],
    keep: KeepRecycled,
    summary: Summary,
    folder: OutputFolder | None,
    asked: list[Teacher],
    progress: bool,
) -> Parts:
    """Maps the chain over all splits; gives the parts of each config and split, unless they went to a folder."""
    parts: Parts = {}
    shards = [(key, start) for key, rows in splits.items() for start in range(0, len(rows), _SHARD)]
    stopped = threading.Event()

    def work(shard: tuple[str, int]) -> tuple["Dataset", "Dataset"]:
        split, start = shard
        rows = splits[split]
        return _recycle_shard(rows, start, min(start + _SHARD, len(rows)), steps, keep)

    def check() -> None:
        if stopped.is_set():
            raise OracleError("the run was stopped.")

    def stop() -> None:
        stopped.set()
        for teacher in asked:
            teacher.oracle.stop()

    for step in steps:
        step.transform.check = check
    slow = {step.title: step.transform for step in steps if step.slow}
    with bars(slow, sum(map(len, splits.values())), shown=progress, note=summary.purse.describe):
        for (split, _), (default, reflections) in zip(shards, _in_flight(work, shards, stop), strict=True):
            summary.add(reflections, split)
            summary.kept += len(default)
            summary.columns = default.column_names
            for config, rows in (("default", default), ("reflections", reflections)):
                if folder is None:
                    parts.setdefault((config, split), []).append(rows)
                else:
                    folder.write(config, split, rows)
    return parts


def _recycle_shard(
    rows: "Dataset", start: int, stop: int, steps: list[Step], keep: KeepRecycled
) -> tuple["Dataset", "Dataset"]:
    from datasets import Value

    shard = rows.select(range(start, stop)).add_column("row_id", list(range(start, stop)), feature=Value("int64"))
    for step in steps:
        shard = shard.map(step.transform, batched=True, batch_size=step.batch_size, keep_in_memory=True)
    reflections = shard.select_columns(list(REFLECTIONS))
    default = shard.map(_original_scores, batched=True, batch_size=_SHARD, keep_in_memory=True)
    default = default.select_columns([*rows.column_names, *DEFAULT])
    return default.filter(keep, batched=True, keep_in_memory=True), reflections


def _original_scores(batch: Any) -> Any:
    from hf_reflect.columns import updated

    originals = [original or {} for original in batch["original"]]
    return updated(
        batch,
        {f"{m}_original": [(o.get(m) or {}).get("value") for o in originals] for m in ("ifd", "rifd")},
    )


def _in_flight(work: Callable[[Any], Any], items: list[Any], stop: Callable[[], None]) -> Iterator[Any]:
    """Results of `work`, in order, with a few items in threads at once; an error stops them all.

    An item that takes long holds up no other: those behind it go on, up to a number that bounds the memory.
    """
    pool = ThreadPoolExecutor(_SHARDS_IN_FLIGHT, thread_name_prefix="hf_reflect-shard")
    waiting: deque[Future[Any]] = deque()
    todo = iter(items)
    try:
        while True:
            while sum(not future.done() for future in waiting) < _SHARDS_IN_FLIGHT and len(waiting) < _SHARDS_HELD:
                if (item := next(todo, None)) is None:
                    break
                waiting.append(pool.submit(work, item))
            if not waiting:
                break
            done, _ = wait([future for future in waiting if not future.done()] or waiting, None, FIRST_COMPLETED)
            for future in done:
                future.result()  # an error of any ends the run at once
            while waiting and waiting[0].done():
                yield waiting.popleft().result()
    except BaseException:
        stop()
        # Not waited for: whoever pressed Ctrl-C gets the prompt back, and what is under way is of no use any more.
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _publish(folder: OutputFolder, recipe: Recipe, summary: Summary, location: str) -> None:
    if not summary.kept:
        raise OutputError(
            f"{folder.path}: no row is left to write: keep {recipe.keep} leaves out all {summary.rows}. Run it again "
            "with --keep all, which costs nothing: every reply is in the journal."
        )
    data = CardData(recipe, summary, {}, folder.path.name, location)
    pictures = draw(data.description) if can_draw() else []

    def card(files: DataFiles) -> str:
        return sign(render_card(replace(data, data_files=files, pictures=tuple(pictures))))

    folder.finish(card, {picture.path: picture.png for picture in pictures})


def _collect(parts: Parts, folder: OutputFolder | None, splits: list[str], single: bool, config: str) -> Any:
    from datasets import DatasetDict, concatenate_datasets, load_dataset

    if folder is None:
        by_split = DatasetDict({split: concatenate_datasets(parts[config, split]) for split in splits})
    else:
        by_split = load_dataset(str(folder.path), config)
    return by_split[splits[0]] if single else by_split
