"""An oracle behind Text Generation Inference's own protocol.

Asked through the `text-generation` client where the extra `tgi` is installed, else through huggingface_hub.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from hf_reflect.errors import OracleError
from hf_reflect.oracles.base import PassingError, Reply, Request
from hf_reflect.oracles.chat import API_KEY_VARIABLE, checked, get, hugging_face_token, without_secrets
from hf_reflect.oracles.clients import Clients
from hf_reflect.oracles.faults import Fault, failure, raised, redact, secrets_in
from hf_reflect.oracles.tgi_chat import ChatTemplate


_VAGUE = {
    "NotFoundError",
    "OverloadedError",
    "RateLimitExceededError",
    "ShardNotReadyError",
    "ShardTimeoutError",
    "UnknownError",
}
"""Errors of the `text-generation` client that a proxy in front of TGI may have caused, for any reason."""
_FINISHED = {"eos_token": "stop", "stop_sequence": "stop"}


class TGIOracle:
    """Asks a TGI server natively, with its `grammar` for structured replies.

    Args:
        url: The server's base.
        model: Whose chat template is used if the server can't apply its own; by default the model it names.
        api_key: As for `ChatOracle`.
        concurrency: Calls in flight at once.
        timeout: Seconds to wait for one reply.

    Raises:
        OracleError: the server does not answer, is no TGI, or its chat template can't be found.
    """

    prompts = "paper"
    max_tokens = 2048

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        concurrency: int = 16,
        timeout: float = 600.0,
    ) -> None:
        self._address, self._headers = checked(url)
        self.url = without_secrets(self._address)
        self.spec, self.concurrency, self.timeout = f"tgi:{self.url}", concurrency, timeout
        self._api_key = api_key or os.environ.get(API_KEY_VARIABLE) or hugging_face_token(self._address)
        if self._api_key:
            self._headers = {"authorization": f"Bearer {self._api_key}", **self._headers}
        self._secrets = secrets_in(self._headers, self._api_key)
        info = self._info()
        self.name = str(info["model_id"])
        self._revision = info.get("model_sha")
        self.context: int | None = info.get("max_total_tokens")
        self._template = ChatTemplate(
            self._address,
            self._headers,
            self._secrets,
            spec=self.spec,
            served=self.name,
            revision=self._revision,
            model=model,
            timeout=timeout,
        )
        self._clients = Clients(partial(_make_client, self._address, self._headers, timeout))
        self._generate: _Generate = _by_text_generation() or _by_huggingface_hub(self._address)

    @property
    def identity(self) -> dict[str, Any]:
        """The endpoint, the model and its revision."""
        return {"kind": "tgi", "url": self.url, "model": self.name, "revision": self._revision}

    async def complete(self, request: Request) -> Reply:
        """Answers one request.

        Raises:
            PassingError: it failed in a way that may pass.
            RowFailedError: this request has no answer.
            OracleError: no request will have one.
        """
        try:
            prompt, length = await asyncio.to_thread(self._template, [dict(m) for m in request.messages])
            async with self._clients.borrow() as client:
                answer = await self._generate(client, prompt, self._parameters(request, length))
        except Exception as error:
            meant = failure(await self._plain(error), self.spec, self._secrets)
            if meant is None:
                raise
            raise meant from error
        return _read(answer, length)

    async def _plain(self, error: Exception) -> Exception:
        """What the HTTP client said, from under what a client of TGI made of it."""
        translated = _translated(error)
        if type(error).__name__ in _VAGUE or isinstance(translated, _NoStatusError):
            return await asyncio.to_thread(self._refusal, translated)
        return translated

    def _refusal(self, error: Exception) -> Exception:
        """What is behind an error of a client that gives neither status nor headers.

        Asking once more, for nothing, tells: a server that would have answered finds that invalid.
        """
        from huggingface_hub.utils import get_session

        try:
            response = get_session().post(f"{self._address}/", json={}, headers=self._headers, timeout=self.timeout)
        except Exception as failed:
            return failed
        if response.status_code in (200, 400, 422):
            return error
        fault = Fault.of_status(response.status_code, redact(response.text, self._secrets), response.headers)
        return raised(fault, self.spec, self._secrets)

    def _parameters(self, request: Request, length: int) -> dict[str, Any]:
        sampling = request.sampling
        room = sampling.max_tokens if self.context is None else min(sampling.max_tokens, self.context - length)
        sampled = sampling.temperature > 0
        return {
            # A prompt that fills the context is the server's to refuse: it says by how much.
            "max_new_tokens": max(1, room),
            "do_sample": sampled,
            "temperature": sampling.temperature if sampled else None,
            "top_p": sampling.top_p if sampled and sampling.top_p < 1 else None,
            "seed": sampling.seed,
            "grammar": dict(request.schema) if request.schema else None,
        }

    def _info(self) -> dict[str, Any]:
        status, text, data = get(f"{self._address}/info", self.spec, self._api_key, self._headers)
        if status in (401, 403):
            raise raised(Fault.of_status(status, redact(text, self._secrets)), self.spec, self._secrets)
        if not isinstance(data, dict) or "model_id" not in data:
            raise OracleError(f"oracle {self.spec}: no TGI answers there (GET /info: HTTP {status}). Check the URL.")
        return data


_Generate = Callable[[Any, str, dict[str, Any]], Awaitable[Any]]


def _by_text_generation() -> _Generate | None:
    try:
        from text_generation.types import Grammar, GrammarType
    except ImportError:
        return None

    async def generate(client: Any, prompt: str, parameters: dict[str, Any]) -> Any:
        schema = parameters.pop("grammar")
        grammar = Grammar(type=GrammarType.Json, value=schema) if schema else None
        return await client.generate(prompt, grammar=grammar, **parameters)

    return generate


def _by_huggingface_hub(address: str) -> _Generate:
    async def generate(client: Any, prompt: str, parameters: dict[str, Any]) -> Any:
        schema = parameters.pop("grammar")
        grammar = {"type": "json", "value": schema} if schema else None
        return await client.text_generation(
            prompt, model=f"{address}/generate", details=True, return_full_text=False, grammar=grammar, **parameters
        )

    return generate


def _make_client(address: str, headers: Mapping[str, str], timeout: float) -> Any:
    try:
        from text_generation import AsyncClient
    except ImportError:
        from huggingface_hub import AsyncInferenceClient

        # A token is never to be taken from the user's login; what authorises is among the headers.
        return AsyncInferenceClient(address, token="unused", headers=dict(headers), timeout=timeout)
    return AsyncClient(address, headers=dict(headers), timeout=timeout)


class _NoStatusError(PassingError):
    """A client did not understand an answer, and does not say which status it had."""


def _read(answer: Any, length: int) -> Reply:
    """The reply in an answer of either client.

    Raises:
        PassingError: it has not the shape that TGI's have.
    """
    details = getattr(answer, "details", None)
    text, written = getattr(answer, "generated_text", None), getattr(details, "generated_tokens", None)
    reason = getattr(details, "finish_reason", None)
    reason = getattr(reason, "value", reason)  # an enumeration, or its value
    if not isinstance(text, str) or not isinstance(written, int) or not isinstance(reason, str):
        raise PassingError("the reply has not the shape that those of TGI have")
    return Reply(text, _FINISHED.get(reason, reason), prompt_tokens=length, completion_tokens=written)


def _translated(error: Exception) -> Exception:
    """An error of a client as one that `failure` knows."""
    from huggingface_hub import errors

    name = type(error).__name__
    if type(error).__module__.startswith("pydantic"):
        return PassingError("the reply has not the shape that those of TGI have")
    if type(error).__module__ == "text_generation.errors":
        if name == "RateLimitExceededError":
            return errors.OverloadedError(str(error))
        if name in ("ValidationError", "OverloadedError", "GenerationError", "IncompleteGenerationError"):
            return getattr(errors, name)(str(error))  # type: ignore[no-any-return]
        if name == "BadRequestError":
            return errors.ValidationError(str(error))
        return errors.GenerationError(str(error))  # a shard that is not ready, or times out
    if isinstance(error, KeyError | IndexError | TypeError | AttributeError):
        # Both clients index into an error's body before they look at what it is.
        under = error.__context__ or error.__cause__
        return under if isinstance(under, Exception) else _NoStatusError("the reply is not one of TGI")
    return error
