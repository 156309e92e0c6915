"""An oracle behind Text Generation Inference's own protocol (`/generate`).

Asked through the `text-generation` client where the extra `tgi` is installed, else through huggingface_hub. The
protocol takes plain text, so the model's chat template is applied here: by the server itself (`/chat_tokenize`), or
by the model's tokenizer where the server is too old for that.
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
        self._template = self._chat_template(model)
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
                details = answer.details
                written, reason = (
                    details.generated_tokens,
                    str(getattr(details.finish_reason, "value", details.finish_reason)),
                )
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise PassingError(f"the reply is not one of TGI ({type(error).__name__})") from error
        except Exception as error:
            meant = failure(_translated(error), self.spec, self._secrets)
            if meant is None:
                raise
            raise meant from error
        reason = str(getattr(reason, "value", reason))  # an enumeration, or its value
        return Reply(
            text=answer.generated_text,
            finish_reason=_FINISHED.get(reason, reason),
            prompt_tokens=length,
            completion_tokens=written,
        )

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

    def _chat_template(self, model: str | None) -> "_Template":
        probe = [{"role": "user", "content": "probe"}]
        if model is None:
            by_server = partial(_templated_by_server, self._address, self._headers)
            try:
                by_server(probe)
            except _NoTemplateError:
                pass  # an older server
            except Exception as error:
                meant = failure(error, self.spec, self._secrets)
                if meant is None:
                    raise
                raise OracleError(f"oracle {self.spec}: its chat template can't be had: {meant}") from None
            else:
                return by_server
        from transformers import AutoTokenizer

        name = model or self.name
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=None if model else self._revision)
        except (OSError, ValueError) as error:
            raise OracleError(
                f"oracle {self.spec}: the chat template of {name} can't be had. Name the model or a folder with its "
                "tokenizer with --oracle-model, or ask through the Messages API: --oracle URL/v1"
            ) from error
        if not tokenizer.chat_template:
            raise OracleError(
                f"oracle {self.spec}: {name} has no chat template. Name a chat model with --oracle-model."
            )
        return partial(_templated_by_tokenizer, tokenizer)


_Template = Callable[[list[dict[str, str]]], tuple[str, int]]
"""Chat messages to the text that the model reads, and its length in tokens."""

_Generate = Callable[[Any, str, dict[str, Any]], Awaitable[Any]]


class _NoTemplateError(Exception):
    pass


def _templated_by_tokenizer(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str, int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text, len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _templated_by_server(address: str, headers: Mapping[str, str], messages: list[dict[str, str]]) -> tuple[str, int]:
    from huggingface_hub.utils import get_session

    body = {"model": "tgi", "messages": messages}
    response = get_session().post(f"{address}/chat_tokenize", json=body, headers=dict(headers), timeout=60)
    if response.status_code in (404, 405, 422):
        raise _NoTemplateError
    response.raise_for_status()
    data = response.json()
    return str(data["templated_text"]), len(data["tokenize_response"])


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


def _translated(error: Exception) -> Exception:
    """An error of the `text-generation` client as huggingface_hub would have raised it."""
    if type(error).__module__.startswith("pydantic"):
        return PassingError("the reply is not one of TGI")
    if type(error).__module__ != "text_generation.errors":
        return error
    from huggingface_hub import errors

    name = type(error).__name__
    if name in ("ValidationError", "OverloadedError", "GenerationError", "IncompleteGenerationError"):
        return getattr(errors, name)(str(error))  # type: ignore[no-any-return]
    if name == "RateLimitExceededError":
        return errors.OverloadedError(str(error))
    if name in ("BadRequestError",):
        return errors.ValidationError(str(error))
    if name == "NotFoundError":
        return OracleError(f"oracle: {error}")
    return errors.GenerationError(str(error))  # a shard that is not ready, or times out
