"""The student's decisions: scores in, decision out. Pure functions.

Phase 1 keeps the pair with the higher IFD, phase 2 the response with the lower r-IFD (arXiv 2402.10110, equations 6
and 9). Both are the same choice among what was there and any number of rewrites.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hf_reflect.errors import RecipeError


Method = Literal["selective", "reflect"]
Keep = Literal["all", "reflected", "below-one"]
Recycled = Literal["original", "instruction", "response", "both"]


def check(name: str, value: str, known: Any) -> None:
    """Refuses a value that its type does not list.

    Raises:
        RecipeError: it is none of them.
    """
    if value not in get_args(known):
        raise RecipeError(f"{name} must be one of {', '.join(get_args(known))}, not {value!r}.")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One rewrite, as a decision sees it.

    Attributes:
        usable: Whether its reflection has a rewrite at all.
        score: What is compared; null where it could not be computed.
        ifd: Its IFD, for the gate.
    """

    usable: bool
    score: float | None = None
    ifd: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What was kept, and why.

    Attributes:
        candidate: Index of the rewrite that was kept; null if what was there stays.
        reason: One of `higher_ifd`, `lower_rifd`, `accepted` (a rewrite was kept), `not_higher_ifd`,
            `not_lower_rifd`, `gated`, `not_scored`, `no_rewrite` (what was there stays).
    """

    candidate: int | None
    reason: str

    @property
    def kept(self) -> str:
        """`original` or `rewrite`."""
        return "original" if self.candidate is None else "rewrite"


def accept(candidates: Sequence[Candidate]) -> Decision:
    """Method `reflect`: the first usable rewrite is kept (arXiv 2310.11716)."""
    for i, candidate in enumerate(candidates):
        if candidate.usable:
            return Decision(i, "accepted")
    return Decision(None, "no_rewrite")


def choose(
    measure: Literal["ifd", "rifd"],
    current: float | None,
    candidates: Sequence[Candidate],
    *,
    current_ifd: float | None = None,
    gate_first: bool = False,
) -> Decision:
    """Method `selective`: the best score is kept; a tie keeps what was there, and the earlier of two rewrites.

    A null score never wins: it loses to any number, and where all are null what was there stays.

    Args:
        measure: `ifd` (the highest is best) or `rifd` (the lowest is).
        current: The score of what was there.
        candidates: The rewrites.
        current_ifd: The IFD of what was there, for the gate.
        gate_first: A rewrite whose IFD is 1 or more (or unknown) never displaces a pair whose IFD is below 1.
    """
    sign = 1 if measure == "ifd" else -1
    if not any(candidate.usable for candidate in candidates):
        return Decision(None, "no_rewrite")
    gate = gate_first and current_ifd is not None and current_ifd < 1
    best = None if current is None or math.isnan(current) else current
    kept: int | None = None
    scored = gated = False
    for i, candidate in enumerate(candidates):
        if not candidate.usable or candidate.score is None or math.isnan(candidate.score):
            continue
        scored = True
        if best is not None and sign * candidate.score <= sign * best:
            continue
        if gate and (candidate.ifd is None or candidate.ifd >= 1):
            gated = True
            continue
        best, kept = candidate.score, i
    if kept is not None:
        return Decision(kept, "higher_ifd" if measure == "ifd" else "lower_rifd")
    if gated:
        return Decision(None, "gated")
    if not scored:
        return Decision(None, "not_scored")
    return Decision(None, "not_higher_ifd" if measure == "ifd" else "not_lower_rifd")


def keep(policy: Keep, recycled: Recycled, ifd: float | None, rifd: float | None) -> bool:
    """Whether a row stays in the recycled dataset.

    `all`: every row. `reflected`: rows with a reflected response (the papers). `below-one`: of those, the ones with
    IFD < 1 and r-IFD < 1 (the papers' code).
    """
    if policy == "all":
        return True
    if recycled not in ("response", "both"):
        return False
    return policy == "reflected" or (ifd is not None and rifd is not None and ifd < 1 and rifd < 1)
