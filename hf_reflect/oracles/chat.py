"""An oracle behind an OpenAI-compatible chat endpoint: vLLM, SGLang, llama.cpp, TGI's Messages API and the like."""

import asyncio
import os
import random
from base64 import b64encode
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from hf_reflect.errors import OracleError
from hf_reflect.oracles.base import Reply, Request, RowFailedError
from hf_reflect.oracles.clients import Clients
from hf_reflect.oracles.faults import Fault, read_fault, redact


API_KEY_VARIABLE = "HF_REFLECT_API_KEY"
_HUGGING_FACE_HOSTS = (".huggingface.co", ".huggingface.cloud", ".hf.co", ".hf.space")


class ChatOracle:
    """Asks a chat endpoint through huggingface_hub's async client.

    Args:
        url: The base of the API, usually ending in `/v1`.
        model: The model's name at the server; may be left out where the server serves a single one.
        api_key: Sent as bearer token. By default the environment variable `HF_REFLECT_API_KEY`, or for a host of
            Hugging Face your own token. Another host never gets your Hugging Face token.
        concurrency: Calls in flight at once.
        timeout: Seconds to wait for one reply.
        attempts: Tries per request, where the failure may pass.

    Raises:
        OracleError: the server does not answer, refuses the key, or does not serve the model.
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
        attempts: int = 5,
    ) -> None:
        self._url, self._headers = _checked(url)
        self.url = self.spec = without_secrets(self._url)
        self.concurrency, self.timeout, self.attempts = concurrency, timeout, attempts
        self._api_key = api_key or os.environ.get(API_KEY_VARIABLE) or _hugging_face_token(self._url)
        self._clients = Clients(partial(_client, self._url, self._api_key, self._headers, timeout))
        self.name = self._check_model(model)

    @property
    def identity(self) -> dict[str, Any]:
        """The endpoint and the model."""
        return {"kind": "chat", "url": self.url, "model": self.name}

    async def complete(self, request: Request) -> Reply:
        """Answers one request, trying again where the failure may pass.

        Raises:
            RowFailedError: this request has no answer.
            OracleError: no request will have one.
        """
        attempt = 1
        while True:
            try:
                return await self._complete_once(request)
            except Exception as error:
                fault = read_fault(error, self._api_key)
                if fault is None:  # a bug, not an answer
                    raise
            last = attempt == self.attempts
            if fault.lasting or (last and fault.unreachable):
                raise self._stop(fault)
            if last or not fault.passing:
                raise RowFailedError(self._clean(f"{fault.message} (attempt {attempt} of {self.attempts})"))
            backoff = random.uniform(0.25, 0.5) * 2**attempt
            await asyncio.sleep(backoff if fault.retry_after is None else fault.retry_after)
            attempt += 1

    async def _complete_once(self, request: Request) -> Reply:
        sampling = request.sampling
        async with self._clients.borrow() as client:
            output = await client.chat_completion(
                [dict(message) for message in request.messages],
                model=self.name,
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                response_format=_json_schema(request.schema) if request.schema else None,
            )
        return read_completion(output)

    def _check_model(self, model: str | None) -> str:
        served = self._served_models()
        if model is None:
            if len(served) == 1:
                return served[0]
            known = f"it serves {', '.join(served)}" if served else "it does not say which models it serves"
            raise OracleError(f"oracle {self.url}: name a model with --oracle-model ({known}).")
        if served and model not in served:
            raise OracleError(f"oracle {self.url} serves no model {model!r}. It serves: {', '.join(served[:20])}.")
        return model

    def _served_models(self) -> list[str]:
        from huggingface_hub.utils import get_session

        headers = {"authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        try:
            response = get_session().get(f"{self._url}/models", headers={**headers, **self._headers}, timeout=30)
            status = response.status_code
        except Exception as error:
            fault = read_fault(error, self._api_key)
            if fault is None:
                raise
            raise self._stop(fault) from None
        if status in (401, 403):
            raise self._stop(Fault.of_status(status, redact(response.text, self._api_key)))
        try:
            return [model["id"] for model in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return []  # not every server has this route

    def _stop(self, fault: Fault) -> OracleError:
        return OracleError(self._clean(f"oracle {self.url}: {fault.message}. {fault.advice}"))

    def _clean(self, message: str) -> str:
        return redact(message, self._api_key)


def _client(url: str, key: str | None, headers: dict[str, str], timeout: float) -> Any:
    from huggingface_hub import AsyncInferenceClient

    # Without a key the client would fall back on the user's Hugging Face token, whatever the host.
    return AsyncInferenceClient(base_url=url, api_key=key or "unused", headers=dict(headers), timeout=timeout)


def read_completion(output: Any) -> Reply:
    """The reply in an OpenAI-style completion.

    Raises:
        RowFailedError: it has no choices.
    """
    choices = getattr(output, "choices", None)
    if not choices:
        raise RowFailedError("the server sent a completion without choices")
    choice, used = choices[0], output.usage
    refusal = getattr(choice.message, "refusal", None)
    content = getattr(choice.message, "content", None) or refusal or ""
    if choice.message is None or not isinstance(content, str):
        raise RowFailedError("the server sent a completion whose message is not text")
    return Reply(
        text=content,
        finish_reason="content_filter" if refusal else choice.finish_reason,
        prompt_tokens=used.prompt_tokens if used else None,
        completion_tokens=used.completion_tokens if used else None,
    )


def _checked(url: str) -> tuple[str, dict[str, str]]:
    """A URL without user and password, and the header that says those."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not sound:
        raise OracleError("oracle: that is no URL of a server; write it like http://localhost:8000/v1.")
    user, _, host = parts.netloc.rpartition("@")
    basic = {"authorization": "Basic " + b64encode(unquote(user).encode()).decode()} if user else {}
    return urlunsplit((parts.scheme, host, parts.path, parts.query, "")).rstrip("/"), basic


def without_secrets(url: str) -> str:
    """A URL without user, password, query and fragment."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


class _Verbatim(dict[str, Any]):
    """A response format that reaches the server as it is.

    For a server named by its URL, huggingface_hub rewrites OpenAI's form into one that only TGI reads. It looks at
    the type with `get` to find out; serialising goes by the items.
    """

    def get(self, key: str, default: Any = None) -> Any:
        return default if key == "type" else super().get(key, default)


def _json_schema(schema: Any) -> dict[str, Any]:
    form = {"name": "reflection", "schema": schema, "strict": True}
    return _Verbatim(type="json_schema", json_schema=form)


def _hugging_face_token(url: str) -> str | None:
    host = urlsplit(url).hostname or ""
    if urlsplit(url).scheme == "https" and f".{host}".endswith(_HUGGING_FACE_HOSTS):
        from huggingface_hub import get_token

        return get_token()
    return None
