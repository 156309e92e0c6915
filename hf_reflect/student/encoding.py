"""From texts to token ids and the exact span of the target.

Boundary policy `aligned`: the target's ids come from the joint tokenisation of prefix and target, and the direct pass
reads the very same ids. A token that straddles the boundary belongs to the target. Where the tokenizer puts no BOS in
front, the first target token has no context in the direct pass, so it is left out of both.

Boundary policy `reference` does what the published scripts do, so that their numbers can be reproduced: the joint
tokenisation is cut at the length of the prefix tokenised alone, and the direct pass tokenises the target alone. The
two passes may then see different tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_reflect.student.templates import Scored


Status = Literal["ok", "empty", "too_short", "truncated"]
Boundary = Literal["aligned", "reference"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A sequence to run through the model.

    Attributes:
        ids: Token ids, BOS included where the tokenizer prepends one.
        first: Index of the first id whose loss counts; all from there to the end do. At least 1.
    """

    ids: tuple[int, ...]
    first: int

    @property
    def scored(self) -> int:
        """How many tokens the loss is the mean of."""
        return len(self.ids) - self.first


@dataclass(frozen=True, slots=True)
class Passes:
    """The two sequences of one score; both are null where nothing can be scored."""

    status: Status
    conditioned: Tokens | None = None
    direct: Tokens | None = None


class Encoder:
    """Encodes prefix and target with one tokenizer.

    Args:
        tokenizer: A fast tokenizer of transformers (character offsets are needed).
        bos: The id that the tokenizer prepends to a text; null if it prepends none.
        max_length: The longest sequence, in tokens. A longer one loses the end of its target, in both passes alike.
        boundary: Where the target begins and what the direct pass reads.
    """

    def __init__(self, tokenizer: Any, bos: int | None, max_length: int, boundary: Boundary = "aligned") -> None:
        self.tokenizer, self.max_length, self.boundary = tokenizer, max_length, boundary
        self._front: tuple[int, ...] = () if bos is None else (bos,)

    def encode(self, texts: Sequence[Scored]) -> list[Passes]:
        """The passes of each text, in order."""
        scorable = [text for text in texts if text.target.strip()]
        passes = iter(self._aligned(scorable) if self.boundary == "aligned" else self._reference(scorable))
        return [next(passes) if text.target.strip() else Passes("empty") for text in texts]

    def _aligned(self, texts: Sequence[Scored]) -> list[Passes]:
        joint = self._tokenise([text.prefix + text.target for text in texts])
        return [self._split(*each) for each in zip(texts, joint["input_ids"], joint["offset_mapping"], strict=True)]

    def _split(self, text: Scored, joint: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Passes:
        ids = tuple(joint)
        boundary = len(text.prefix)
        start = next((i for i, (_, end) in enumerate(offsets) if end > boundary), len(ids))
        whole = len(ids) - start
        fits = max(0, self.max_length - len(self._front) - start)
        target = ids[start:][:fits]
        skipped = 0 if self._front else 1
        if len(target) <= skipped:
            return Passes("truncated" if whole > skipped else "too_short")
        prefix = self._front + ids[:start]
        return Passes(
            status="ok" if len(target) == whole else "truncated",
            conditioned=Tokens(prefix + target, max(1, len(prefix) + skipped)),
            direct=Tokens(self._front + target, len(self._front) + skipped),
        )

    def _reference(self, texts: Sequence[Scored]) -> list[Passes]:
        joint, prefixes, targets = (
            self._tokenise(part)["input_ids"]
            for part in (
                [text.prefix + text.target for text in texts],
                [text.prefix for text in texts],
                [text.target for text in texts],
            )
        )
        return [self._cut(*each) for each in zip(joint, prefixes, targets, strict=True)]

    def _cut(self, joint: Sequence[int], prefix: Sequence[int], target: Sequence[int]) -> Passes:
        whole, start = self._front + tuple(joint), len(self._front) + len(prefix)
        conditioned = whole[: self.max_length]
        direct = (self._front + tuple(target))[: max(0, self.max_length - start + 1)]
        if len(conditioned) <= max(1, start) or len(direct) < 2:
            return Passes("truncated" if len(whole) > self.max_length else "too_short")
        status: Status = "ok" if len(whole) <= self.max_length else "truncated"
        return Passes(status, Tokens(conditioned, max(1, start)), Tokens(direct, 1))

    def _tokenise(self, texts: list[str]) -> Any:
        if not texts:
            return {"input_ids": [], "offset_mapping": []}
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )


def prepended_bos(tokenizer: Any) -> int | None:
    """The id that a tokenizer puts in front of a text, found by trying; null if it puts none."""
    with_special: list[int] = tokenizer("a", verbose=False)["input_ids"]
    without: list[int] = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    added = len(with_special) - len(without)
    return with_special[0] if added and with_special[0] != without[0] else None
