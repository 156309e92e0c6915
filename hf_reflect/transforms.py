"""The callables for `Dataset.map` and `Dataset.filter`: what `recycle` chains, and what you can chain by hand.

    ds = ds.map(ReflectInstruction(oracle), batched=True)
    ds = ds.map(ScoreIFD(student), batched=True)
    ds = ds.map(SelectInstruction(), batched=True)
    ds = ds.map(ReflectResponse(oracle), batched=True)
    ds = ds.map(ScoreReversedIFD(student), batched=True)
    ds = ds.map(SelectResponse(), batched=True)
    ds = ds.map(ScoreIFD(student), batched=True)
    ds = ds.filter(KeepRecycled("reflected"), batched=True)

They are plain synchronous callables over batches, so they work in scripts, in notebooks, with `num_proc` and on an
`IterableDataset`. What `datasets` hashes to find a cached result is their identity (models, prompts, parameters),
never a connection, a counter or a key.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal
from weakref import WeakValueDictionary

from hf_reflect import background
from hf_reflect.columns import not_text, rows_of, updated
from hf_reflect.guards import Guards
from hf_reflect.journal import Journal, open_journal
from hf_reflect.oracles import Sampling
from hf_reflect.oracles.base import canonical
from hf_reflect.oracles.pace import Limits
from hf_reflect.pairs import Pair, RowFormat, UnreadableRowError, recognise
from hf_reflect.prompts import Phase, Prompts
from hf_reflect.reflection import Reflector, proposed, reflect_all
from hf_reflect.selection import Candidate, Decision, Keep, Method, accept, check, choose, keep
from hf_reflect.student import Score, Student, load_student
from hf_reflect.teachers import OracleSpec, Teacher, oracle_specs, teachers


Row = dict[str, Any]


class Transform(ABC):
    """Base of all transforms: pickled and hashed by its identity.

    A process that unpickles one finds the living object it was made from (inherited by `fork`), with its connections
    and settings; where there is none (`spawn`), it is made again from what decides its results.
    """

    _living: ClassVar["WeakValueDictionary[str, Transform]"] = WeakValueDictionary()

    done: Callable[[int], None]
    """Called with a number of rows whenever that many are done."""

    check: Callable[[], None]
    """Called now and then while a batch is worked on; what it raises ends the work."""

    def __init__(self) -> None:
        self.done, self.check = _nothing, _nothing

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that decides what this transform does, as JSON-able values."""

    @property
    @abstractmethod
    def arguments(self) -> dict[str, Any] | None:
        """Arguments that make it again, decided by its identity alone; null if it can't be made again."""

    @abstractmethod
    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """What `map` or `filter` calls with a batch of rows."""

    def __getstate__(self) -> dict[str, Any]:
        identity = canonical(self.identity)
        self._living[identity] = self
        return {"identity": identity, "arguments": self.arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        living = self._living.get(state["identity"])
        if living is not None:
            self.__dict__.update(living.__dict__)
        elif state["arguments"] is not None:
            self.__init__(**state["arguments"])  # type: ignore[misc]
        else:
            raise TypeError(
                f"{type(self).__name__} was made from an object without a spec, which a process that is not forked "
                "can't make again: give the object a `spec` that load_oracle understands"
            )


class _Reflect(Transform):
    phase: ClassVar[Phase]

    def __init__(
        self,
        oracle: OracleSpec | Sequence[OracleSpec] = "local",
        *,
        prompts: str | Path | Prompts | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        journal: Journal | str | Path | None = None,
        limits: Limits | None = None,
        guards: Guards | Mapping[str, Any] | None = None,
        retry_truncated: int | None = None,
        **options: Any,
    ) -> None:
        self.teachers = teachers(
            oracle, prompts=prompts, sampling=sampling, journal=_journal(journal), limits=limits, **options
        )
        self.guards = guards if isinstance(guards, Guards) else Guards.from_dict(guards or {})
        self.retry_truncated = retry_truncated
        self._given = {"prompts": prompts and Prompts.load(prompts), "sampling": sampling}
        super().__init__()

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "transform": type(self).__name__,
            "oracles": [teacher.identity for teacher in self.teachers],
            "guards": self.guards.to_dict(),
            "retry_truncated": self.retry_truncated,
            # What is left out for want of money must not be taken for the answer when there is more.
            "budget": self.teachers[0].oracle.purse.budget,
        }

    @property
    def arguments(self) -> dict[str, Any] | None:
        specs = oracle_specs(teacher.spec for teacher in self.teachers)
        if specs is None:
            return None
        # Two ways to ask for the same must not look different to the cache of `datasets`.
        asked = {"prompts": self.teachers[0].prompts, "sampling": self.teachers[0].sampling}
        for name, value in asked.items():
            if any(getattr(teacher, name) != value for teacher in self.teachers):
                asked[name] = self._given[name]
        return {
            "oracle": specs,
            **asked,
            "guards": self.guards.to_dict(),
            "retry_truncated": self.retry_truncated,
        }

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        row_format = recognise(batch.keys())
        why = not_text(batch, row_format.columns)
        pairs = [why or _read_or_why(row_format, row) for row in rows_of(batch, row_format.columns)]
        reflectors = [self._reflector(teacher) for teacher in self.teachers]
        reflections = background.run(reflect_all(reflectors, pairs, self.done))
        column = [[{**one.to_dict(), "ifd": None, "rifd": None} for one in several] for several in reflections]
        return updated(batch, {f"{self.phase}_reflections": column})

    def _reflector(self, teacher: Teacher) -> Reflector:
        return Reflector(
            teacher.oracle.ask,
            teacher.name,
            teacher.prompts,
            teacher.sampling,
            self.phase,
            self.guards,
            self.retry_truncated,
        )


class ReflectInstruction(_Reflect):
    """Phase 1: the oracle reflects on the instruction and proposes a new one with its response.

    Adds the column `instruction_reflections`; the row itself is not changed.

    Args:
        oracle: A spec (such as `local` or `http://HOST/v1`; see `load_oracle`), an oracle, or several, whose
            rewrites compete.
        prompts: A style (`paper`, `json`, `staged`), a YAML file, or `Prompts`; by default what suits the oracle.
        sampling: How to sample; by default greedily, at most as many tokens as suit the oracle.
        journal: Where replies are kept; by default under `HF_HOME`.
        limits: What asking may cost and how hard it may try.
        guards: What a rewrite must not do.
        retry_truncated: Asks once more, with room for so many tokens, where a reply was cut off.
        **options: What else `load_oracle` takes with a spec: `model`, `api_key`, `concurrency`, `timeout`.

    Raises:
        OracleError: the oracle can't be asked, now or while mapping.
    """

    phase = "instruction"


class ReflectResponse(_Reflect):
    """Phase 2: the oracle reflects on the response and proposes a better one to the same instruction.

    Adds the column `response_reflections`; the row itself is not changed.

    Args:
        oracle: As for `ReflectInstruction`.
        prompts: As for `ReflectInstruction`.
        sampling: As for `ReflectInstruction`.
        journal: As for `ReflectInstruction`.
        limits: As for `ReflectInstruction`.
        guards: As for `ReflectInstruction`.
        retry_truncated: As for `ReflectInstruction`.
        **options: As for `ReflectInstruction`.

    Raises:
        OracleError: the oracle can't be asked, now or while mapping.
    """

    phase = "response"


class _Score(Transform):
    measure: ClassVar[str]

    def __init__(
        self, student: "str | Student" = "local", *, journal: Journal | str | Path | None = None, **options: Any
    ) -> None:
        self.student, self.journal = load_student(student, **options), _journal(journal)
        super().__init__()

    @property
    def identity(self) -> dict[str, Any]:
        return {"transform": type(self).__name__, "student": self.student.identity}

    @property
    def arguments(self) -> dict[str, Any]:
        return {"student": self.student.spec, **self.student.options}

    @abstractmethod
    def score(self, pairs: list[Pair]) -> list[Score]:
        """The scores of pairs, in order."""

    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> Any:
        if rank is not None:  # map(num_proc=N, with_rank=True): one GPU for each process
            self.student.model.use_gpu(rank)
        row_format = recognise(batch.keys())
        rows = rows_of(batch, row_format.columns)
        jobs: list[tuple[Row | None, int, Pair]] = []  # (reflection, or null for the row itself; row; pair)
        updates: dict[str, list[Any]] = {}
        why = not_text(batch, row_format.columns)
        for i, row in enumerate(rows):
            pair = why or _read_or_why(row_format, row)
            if isinstance(pair, str):
                continue
            jobs.append((None, i, pair))
            for column, reflections in _waiting(row).items():
                copies = [dict(reflection) for reflection in reflections]
                updates.setdefault(column, [r.get(column) for r in rows])[i] = copies
                jobs.extend((copy, i, _proposed(pair, copy)) for copy in copies if copy["status"] == "ok")
        scores: list[Row | None] = [None] * len(rows)
        for (reflection, i, _), score in zip(jobs, self.score([pair for *_, pair in jobs]), strict=True):
            if reflection is None:
                scores[i] = asdict(score)
            else:
                reflection[self.measure] = asdict(score)
        self.done(len(rows))
        values = [score and score["value"] for score in scores]
        return updated(batch, {self.measure: values, f"{self.measure}_score": scores, **updates})


class ScoreIFD(_Score):
    """IFD(y|x) = ppl(y|x) / ppl(y): how much the instruction helps the student towards the response.

    Adds `ifd` (null where it can't be computed) and `ifd_score`, with the losses and token counts of both passes, and
    puts scores into the reflections that wait for a decision. Source: arXiv 2402.10110, equation 3.

    Args:
        student: A spec (`local`, a Hub id, a folder, a `.gguf` file) or a student.
        journal: Where losses are kept; by default under `HF_HOME`.
        **options: What else `load_student` takes with a spec: `template`, `boundary`, `measure`, `dtype`,
            `max_length`.

    Raises:
        StudentError: the student can't be loaded.
    """

    measure = "ifd"

    def score(self, pairs: list[Pair]) -> list[Score]:
        return self.student.ifd(pairs, self.journal, self.check)


class ScoreReversedIFD(_Score):
    """r-IFD(x|y) = ppl(x|q(y)) / ppl(x): how much the response helps the student to guess the instruction.

    Adds `rifd` (null where it can't be computed) and `rifd_score`, with the losses and token counts of both passes,
    and puts scores into the reflections that wait for a decision. Source: arXiv 2402.10110, equation 8.

    Args:
        student: As for `ScoreIFD`.
        journal: As for `ScoreIFD`.
        **options: As for `ScoreIFD`.

    Raises:
        StudentError: the student can't be loaded.
    """

    measure = "rifd"

    def score(self, pairs: list[Pair]) -> list[Score]:
        return self.student.reversed_ifd(pairs, self.journal, self.check)


class _Select(Transform):
    phase: ClassVar[Phase]
    measure: ClassVar[Literal["ifd", "rifd"]]

    def __init__(self, method: Method = "selective", *, gate_first: bool = False) -> None:
        check("method", method, Method)
        self.method, self.gate_first = method, gate_first
        super().__init__()

    @property
    def identity(self) -> dict[str, Any]:
        return {"transform": type(self).__name__, **self.arguments}

    @property
    def arguments(self) -> dict[str, Any]:
        return {"method": self.method, "gate_first": self.gate_first}

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        row_format = recognise(batch.keys())
        self._check(batch)
        written = [name for name in row_format.text_columns if name in batch.keys()]  # noqa: SIM118
        own = ["original", f"{self.phase}_decision", "recycled", "ifd", "ifd_score", "rifd", "rifd_score"]
        if self.phase == "response" and "instruction_reflections" in batch.keys():  # noqa: SIM118
            own.append("instruction_reflections")
        selected = [self._select(row_format, row) for row in rows_of(batch, row_format.columns)]
        self.done(len(selected))
        return updated(batch, {name: [row.get(name) for row in selected] for name in (*written, *own)})

    def _check(self, batch: Mapping[str, Any]) -> None:
        needed = {f"{self.phase}_reflections": f"Reflect{self.phase.capitalize()}"}
        if self.method == "selective":
            needed[self.measure] = "ScoreIFD" if self.measure == "ifd" else "ScoreReversedIFD"
        for column, transform in needed.items():
            if column not in batch.keys():  # noqa: SIM118 (a lazy batch is no dict)
                raise ValueError(f"{type(self).__name__} needs the column {column!r}: map {transform} first")

    def _select(self, row_format: RowFormat, row: Row) -> Row:
        reflections = row[f"{self.phase}_reflections"]
        decision = self._decide(row, reflections)
        chosen: Row = {**row, "original": _original(row_format, row), **_scored_instruction(row)}
        changed = set() if row.get("recycled") in (None, "original") else {row["recycled"]}
        if decision.candidate is not None:
            reflection = reflections[decision.candidate]
            pair = _proposed(row_format.read(row), reflection)
            chosen |= row_format.write(row, pair)
            for measure in ("ifd", "rifd"):
                score = reflection[measure]
                chosen |= {measure: score and score["value"], f"{measure}_score": score}
            changed.add(self.phase)
        chosen["recycled"] = "both" if len(changed) > 1 else next(iter(changed), "original")
        chosen[f"{self.phase}_decision"] = {**asdict(decision), "kept": decision.kept}
        return chosen

    def _decide(self, row: Row, reflections: list[Row]) -> Decision:
        candidates = [
            Candidate(r["status"] == "ok", (r[self.measure] or {}).get("value"), (r["ifd"] or {}).get("value"))
            for r in reflections
        ]
        if self.method == "reflect":
            return accept(candidates)
        return choose(
            self.measure,
            row[self.measure],
            candidates,
            current_ifd=row.get("ifd"),
            gate_first=self.gate_first,
        )


class SelectInstruction(_Select):
    """Phase 1: keeps the pair with the higher IFD. A tie keeps what was there; a null score never wins.

    Writes the winner into the row and adds `instruction_decision`, `original` and `recycled`. Needs the columns of
    `ReflectInstruction` and, for the selective method, of `ScoreIFD`. Source: arXiv 2402.10110, equation 6.

    Args:
        method: `selective` (the student's scores decide) or `reflect` (every rewrite is kept).
        gate_first: A rewrite with an IFD of 1 or more never displaces a pair below it.
    """

    phase, measure = "instruction", "ifd"


class SelectResponse(_Select):
    """Phase 2: keeps the response with the lower r-IFD. A tie keeps what was there; a null score never wins.

    Writes the winner into the row and adds `response_decision`, `original` and `recycled`. Where a rewrite was kept,
    the row's `ifd` is that of the new response if `ScoreIFD` has seen it, else null. Needs the columns of
    `ReflectResponse` and, for the selective method, of `ScoreReversedIFD`. Source: arXiv 2402.10110, equation 9.

    Args:
        method: As for `SelectInstruction`.
        gate_first: As for `SelectInstruction`; the rewrites must then have been seen by `ScoreIFD` as well.
    """

    phase, measure = "response", "rifd"


class KeepRecycled(Transform):
    """For `filter`: which rows belong to the recycled dataset.

    Args:
        policy: `all`; `reflected`, rows with a reflected response (the papers); `below-one`, of those the ones with
            IFD < 1 and r-IFD < 1 (the papers' code).
    """

    def __init__(self, policy: Keep = "all") -> None:
        check("keep", policy, Keep)
        super().__init__()
        self.policy = policy

    @property
    def identity(self) -> dict[str, Any]:
        return {"transform": type(self).__name__, **self.arguments}

    @property
    def arguments(self) -> dict[str, Any]:
        return {"policy": self.policy}

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        if isinstance(batch["recycled"], str):  # a single row
            return self._keep(batch)
        return [self._keep(row) for row in rows_of(batch, ())]

    def _keep(self, row: Mapping[str, Any]) -> bool:
        return keep(self.policy, row["recycled"], row.get("ifd"), row.get("rifd"))


def _waiting(row: Row) -> dict[str, list[Row]]:
    """The reflections of a row that no decision has been made on, by column."""
    return {
        f"{phase}_reflections": row[f"{phase}_reflections"]
        for phase in ("instruction", "response")
        if row.get(f"{phase}_reflections") and not row.get(f"{phase}_decision")
    }


def _original(row_format: RowFormat, row: Row) -> Row | None:
    """The pair as the source has it, with the scores it has so far."""
    known: Row | None = row.get("original")
    untouched = row.get("recycled") in (None, "original")
    if known is None:
        try:
            pair = row_format.read(row)
        except UnreadableRowError:
            return None
        known = asdict(pair) | row_format.nulls(row)
    if untouched:
        known = {**known, "ifd": row.get("ifd_score"), "rifd": row.get("rifd_score")}
    return {"ifd": None, "rifd": None, **known}


def _scored_instruction(row: Row) -> dict[str, list[Row]]:
    """The instruction reflections with the r-IFD of the one that was kept, which phase 2 compares with."""
    kept = (row.get("instruction_decision") or {}).get("candidate")
    if kept is None:
        return {}
    reflections = [dict(reflection) for reflection in row["instruction_reflections"]]
    reflections[kept]["rifd"] = row.get("rifd_score")
    return {"instruction_reflections": reflections}


def _proposed(pair: Pair, reflection: Row) -> Pair:
    return proposed(pair, reflection["instruction"], reflection["input"], reflection["response"])


def _read_or_why(row_format: RowFormat, row: Row) -> Pair | str:
    try:
        return row_format.read(row)
    except UnreadableRowError as error:
        return str(error)


def _journal(journal: Journal | str | Path | None) -> Journal:
    return journal if isinstance(journal, Journal) else open_journal(journal)


def _nothing(*_: int) -> None:
    """Where nobody watches the progress."""
