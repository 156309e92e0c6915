"""Teachers: each an oracle with how it is asked. A run may have several; their rewrites compete."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_reflect.errors import OracleError
from hf_reflect.journal import Journal
from hf_reflect.oracles import Oracle, Sampling, load_oracle
from hf_reflect.oracles.base import close_all
from hf_reflect.oracles.journaled import JournaledOracle
from hf_reflect.oracles.pace import Limits
from hf_reflect.oracles.purse import Purse
from hf_reflect.prompts import Prompts


REPLAY = "replay:"


@dataclass(frozen=True)
class Teacher:
    """An oracle, the prompts it gets and how it samples.

    Attributes:
        oracle: Who is asked, through the journal.
        prompts: What it is asked with.
        sampling: How it samples.
    """

    oracle: JournaledOracle
    prompts: Prompts
    sampling: Sampling

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.oracle.oracle.name

    @property
    def spec(self) -> str | None:
        """What `teachers` makes it from; null for an object without one."""
        return getattr(self.oracle.oracle, "spec", None)

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides its replies."""
        return {
            "identity": dict(self.oracle.oracle.identity),
            "sampling": self.sampling.to_dict(),
            "prompts": self.prompts.to_dict(),
        }


OracleSpec = str | Oracle | JournaledOracle | Teacher


def teachers(
    oracle: OracleSpec | Sequence[OracleSpec],
    *,
    prompts: str | Path | Prompts | None = None,
    sampling: Sampling | Mapping[str, Any] | None = None,
    journal: Journal,
    limits: Limits | None = None,
    **options: Any,
) -> list[Teacher]:
    """The teachers that specs name. All share one budget.

    Args:
        oracle: One or several: a spec, an oracle, or a teacher already. `replay:FOLDER_OR_HUB_ID` answers from the
            `reflections` of a recycled dataset, one teacher for each of its own.
        prompts: For all of them; by default what suits each.
        sampling: For all of them; what is not given suits each.
        journal: Where replies are kept.
        limits: What asking may cost and how hard it may try.
        **options: What else `load_oracle` takes.

    Raises:
        OracleError: one of them can't be used.
    """
    wanted = [oracle] if isinstance(oracle, OracleSpec) else list(oracle)
    if not wanted:
        raise OracleError("oracle: none is named.")
    purse = Purse(limits or Limits())
    made: list[Teacher] = []
    try:
        for one in wanted:
            made += _teachers(one, prompts, sampling, journal, purse, options)
    except BaseException:
        close_all(teacher.oracle.oracle for teacher in made)
        raise
    return made


def _teachers(
    one: OracleSpec,
    prompts: str | Path | Prompts | None,
    sampling: Sampling | Mapping[str, Any] | None,
    journal: Journal,
    purse: Purse,
    options: Mapping[str, Any],
) -> list[Teacher]:
    if isinstance(one, Teacher):
        return [one]
    if isinstance(one, str) and one.startswith(REPLAY):
        from hf_reflect.replay import Recording

        return [
            Teacher(JournaledOracle(replayed, journal, purse=purse), replayed.asked_with, replayed.sampling)
            for replayed in Recording(one.removeprefix(REPLAY)).oracles
        ]
    if not isinstance(one, JournaledOracle):
        one = JournaledOracle(load_oracle(one, **options), journal, purse=purse)
    return [Teacher(one, Prompts.load(prompts or one.oracle.prompts), _sampling(one.oracle, sampling))]


def oracle_specs(specs: Iterable[str | None]) -> list[str] | None:
    """What `teachers` makes the same teachers from again; null where one has no spec."""
    found: list[str] = []
    for spec in specs:
        if spec is None:
            return None
        if not (spec.startswith(REPLAY) and spec in found):  # one of these stands for all its oracles
            found.append(spec)
    return found


def _sampling(oracle: Oracle, wanted: Sampling | Mapping[str, Any] | None) -> Sampling:
    if isinstance(wanted, Sampling):
        return wanted
    return replace(Sampling(max_tokens=oracle.max_tokens), **(wanted or {}))
