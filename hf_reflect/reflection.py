"""Ask the oracle about a pair, read its reply, give a `Reflection`. Never raises for a row."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from hf_reflect import guards
from hf_reflect.guards import Guards
from hf_reflect.oracles.base import Reply, Request, RowFailedError, Sampling
from hf_reflect.pairs import Pair
from hf_reflect.prompts import Phase, Prompts
from hf_reflect.replies import (
    Rewrite,
    is_refusal,
    json_schema,
    parse_json,
    parse_markers,
    says_already_good,
    split_thinking,
    undress,
)


Status = Literal["ok", "unchanged", "unparsed", "truncated", "refused", "empty", "failed", "skipped"] | guards.Status

Ask = Callable[[Request], Awaitable[Reply]]
"""Asks the oracle; raises `RowFailedError` when this one request has no answer."""


_CRITIQUE_TOKENS = 120
"""The longest staged critique: it is asked for in one or two sentences."""


@dataclass(frozen=True)
class Call:
    """One call to the oracle, as it came back.

    Attributes:
        part: Which part of the prompts asked for it (`user`, or a stage).
        text: The answer.
        finish_reason: `stop`, `length`, or whatever the server said.
        prompt_tokens: Tokens read.
        completion_tokens: Tokens written, thinking included.
        thinking: What a reasoning model thought first.
        attempts: How many calls it took.
    """

    part: str
    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    thinking: str | None = None
    attempts: int = 1


@dataclass(frozen=True)
class Reflection:
    """An oracle's critique of a pair and the rewrite it proposes.

    Attributes:
        status: `ok` when there is a rewrite; otherwise why there is none.
        reason: More about the status, for people.
        oracle: The name of the oracle.
        prompts: The id of the prompts.
        critique: What the oracle found, as text.
        instruction: The rewritten instruction; null in the response phase or without a rewrite.
        input: The rewritten input, with the instruction.
        response: The rewritten response.
        calls: Every reply that was paid for, raw.
    """

    status: Status
    reason: str | None = None
    oracle: str | None = None
    prompts: str | None = None
    critique: str | None = None
    instruction: str | None = None
    input: str | None = None
    response: str | None = None
    calls: tuple[Call, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy, the shape of the `*_reflections` columns."""
        return asdict(self)


@dataclass
class Reflector:
    """Reflects on pairs with one oracle and one set of prompts.

    Attributes:
        ask: Asks the oracle.
        name: The oracle's name.
        prompts: The prompts to ask with.
        sampling: How to sample.
        phase: What is reflected on.
        guards: What a rewrite must not do.
        retry_truncated: Asks once more, with room for so many tokens, where a reply was cut off.
    """

    ask: Ask
    name: str
    prompts: Prompts
    sampling: Sampling
    phase: Phase
    guards: Guards = field(default_factory=Guards)
    retry_truncated: int | None = None
    _styles: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._styles = {"paper": self._one_call, "json": self._one_call, "staged": self._stages}

    async def reflect(self, pair: Pair) -> Reflection:
        """The oracle's reflection on a pair. Errors of the row become its status; errors of the oracle are raised.

        Raises:
            OracleError: asking on is useless.
        """
        if not pair.question.strip():
            return self._give("skipped", "there is no instruction to reflect on")
        calls: list[Call] = []
        try:
            rewrite = await self._styles[self.prompts.style](pair, calls)
        except RowFailedError as error:
            return self._give(error.status, str(error), calls=calls)
        except _NoRewriteError as error:
            return self._give(error.status, error.reason, error.rewrite, calls)
        return self._judge(pair, rewrite, calls)

    async def _one_call(self, pair: Pair, calls: list[Call]) -> Rewrite:
        schema = json_schema(self.phase) if self.prompts.style == "json" else None
        parse = parse_json if self.prompts.style == "json" else parse_markers
        text = await self._call("user", pair, calls, {}, schema=schema)
        rewrite = parse(text, self.phase)
        if rewrite is None:
            if is_refusal(text):
                raise _NoRewriteError("refused", "the oracle declined")
            raise _NoRewriteError("unparsed", "no complete rewrite was found in the reply", Rewrite(text))
        return rewrite

    async def _stages(self, pair: Pair, calls: list[Call]) -> Rewrite:
        critique = await self._critique(pair, calls)
        if says_already_good(critique):
            return Rewrite(critique, unchanged=True)
        if self.phase == "response":
            response = await self._stage("response", pair, calls, critique=critique)
            return Rewrite(critique, response=undress(response))
        instruction = undress(await self._stage("instruction", pair, calls, critique=critique))
        if not instruction:
            raise _NoRewriteError("empty", "the new instruction is blank", Rewrite(critique))
        response = await self._stage("response", pair, calls, critique=critique, new_instruction=instruction)
        return Rewrite(critique, instruction, "", undress(response))

    async def _critique(self, pair: Pair, calls: list[Call]) -> str:
        """The first stage. It is advice for the next ones, so a critique that was cut short still serves."""
        short = replace(self.sampling, max_tokens=min(self.sampling.max_tokens, _CRITIQUE_TOKENS))
        try:
            return await self._stage("critique", pair, calls, sampling=short)
        except _NoRewriteError as error:
            if error.status != "truncated" or not calls[-1].text.strip():
                raise
            return calls[-1].text.strip()

    async def _stage(
        self, part: str, pair: Pair, calls: list[Call], sampling: Sampling | None = None, **values: str
    ) -> str:
        text = await self._call(part, pair, calls, values, sampling=sampling)
        if is_refusal(text):
            raise _NoRewriteError("refused", f"the oracle declined ({part})")
        return text

    async def _call(
        self,
        part: str,
        pair: Pair,
        calls: list[Call],
        values: Mapping[str, str],
        *,
        schema: dict[str, Any] | None = None,
        sampling: Sampling | None = None,
    ) -> str:
        sampling = sampling or self.sampling
        request = Request(self.prompts.messages(self.phase, part, pair, values), sampling, schema)
        call = await self._ask(part, request, calls)
        more = self.retry_truncated if part != "critique" else None  # a critique that was cut short still serves
        if call.finish_reason == "length" and more is not None and more > sampling.max_tokens:
            sampling = replace(sampling, max_tokens=more)
            call = await self._ask(part, replace(request, sampling=sampling), calls)
        if call.finish_reason == "content_filter":
            raise _NoRewriteError("refused", "the server's content filter stopped the reply")
        if call.finish_reason == "length":
            raise _NoRewriteError("truncated", f"the reply reached its limit of {sampling.max_tokens} tokens")
        if not call.text.strip():
            raise _NoRewriteError("empty", "the oracle replied with nothing")
        return call.text.strip()

    async def _ask(self, part: str, request: Request, calls: list[Call]) -> Call:
        reply = await self.ask(request)
        thinking, text = split_thinking(reply.text)
        thinking = "\n".join(filter(None, (reply.thinking, thinking))) or None
        call = Call(
            part, text, reply.finish_reason, reply.prompt_tokens, reply.completion_tokens, thinking, reply.attempts
        )
        calls.append(call)
        return call

    def _judge(self, pair: Pair, rewrite: Rewrite, calls: list[Call]) -> Reflection:
        if rewrite.unchanged:
            return self._give("unchanged", "the oracle finds the pair good as it is", rewrite, calls)
        if not rewrite.response or (self.phase == "instruction" and not rewrite.instruction):
            return self._give("empty", "the rewrite is blank", Rewrite(rewrite.critique), calls)
        if is_refusal(rewrite.response) and not is_refusal(pair.response):
            return self._give("refused", "the new response declines", Rewrite(rewrite.critique), calls)
        after = proposed(pair, rewrite.instruction, rewrite.input, rewrite.response)
        if _stripped(after) == _stripped(pair):
            return self._give("unchanged", "the rewrite is the original, word for word", rewrite, calls)
        if finding := self.guards.check(pair, after, rewrite.critique):
            return self._give(*finding, Rewrite(rewrite.critique), calls)
        return self._give("ok", None, rewrite, calls)

    def _give(
        self, status: Status, reason: str | None, rewrite: Rewrite | None = None, calls: list[Call] | None = None
    ) -> Reflection:
        rewrite = rewrite or Rewrite()
        ok = status == "ok"
        return Reflection(
            status=status,
            reason=reason,
            oracle=self.name,
            prompts=self.prompts.id,
            critique=rewrite.critique,
            instruction=rewrite.instruction if ok else None,
            input=rewrite.input if ok and rewrite.instruction is not None else None,
            response=rewrite.response if ok else None,
            calls=tuple(calls or ()),
        )


def proposed(pair: Pair, instruction: str | None, input: str | None, response: str | None) -> Pair:
    """The pair that a reflection proposes: a new instruction with its response, or a new response alone."""
    if instruction is None:
        return pair.replace(response=response)
    return pair.replace(instruction=instruction, input=input or "", response=response)


def _stripped(pair: Pair) -> Pair:
    return pair.replace(instruction=pair.instruction.strip(), input=pair.input.strip(), response=pair.response.strip())


async def reflect_all(
    reflectors: Sequence[Reflector], pairs: Sequence[Pair | str], done: Callable[[int], None]
) -> list[list[Reflection]]:
    """Every reflector's reflection on every pair, all at once.

    Args:
        reflectors: Of one phase.
        pairs: What to reflect on; a string in place of a pair says why its row holds none.
        done: Called with 1 whenever a pair is done.

    Returns:
        For each pair, in order, its reflections in the order of the reflectors.

    Raises:
        OracleError: asking on is useless; calls still in flight are cancelled.
    """

    async def one(pair: Pair | str) -> list[Reflection]:
        if isinstance(pair, str):
            reflections = [Reflection("skipped", pair) for _ in reflectors]
        else:
            reflections = list(await asyncio.gather(*(reflector.reflect(pair) for reflector in reflectors)))
        done(1)
        return reflections

    tasks = [asyncio.ensure_future(one(pair)) for pair in pairs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


class _NoRewriteError(Exception):
    def __init__(self, status: Status, reason: str, rewrite: Rewrite | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.rewrite = status, reason, rewrite
