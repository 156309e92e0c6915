"""An oracle behind an OpenAI-compatible chat endpoint: vLLM, SGLang, llama.cpp, TGI's Messages API and the like."""

import os
from base64 import b64encode
from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from hf_reflect.errors import OracleError
from hf_reflect.oracles.base import PassingError, Reply, Request, RowFailedError
from hf_reflect.oracles.clients import Clients
from hf_reflect.oracles.faults import Fault, failure, raised, redact, secrets_in


API_KEY_VARIABLE = "HF_REFLECT_API_KEY"
_HUGGING_FACE_HOSTS = (".huggingface.co", ".huggingface.cloud", ".hf.co", ".hf.space")


class ChatClient:
    """What all oracles have in common that are asked through huggingface_hub's chat completion.

    Args:
        spec: What `load_oracle` finds it by, without secrets.
        name: The model's name at the server.
        client: Arguments of huggingface_hub's `AsyncInferenceClient`.
        concurrency: Calls in flight at once.
    """

    prompts = "paper"
    max_tokens = 2048

    def __init__(self, spec: str, name: str, client: Mapping[str, Any], concurrency: int) -> None:
        self.spec, self.name, self.concurrency = spec, name, concurrency
        self._secrets = secrets_in(client.get("headers", {}), client.get("api_key"))
        self._clients = Clients(partial(_make_client, dict(client)))

    async def complete(self, request: Request) -> Reply:
        """Answers one request.

        Raises:
            PassingError: it failed in a way that may pass.
            RowFailedError: this request has no answer.
            OracleError: no request will have one.
        """
        sampling = request.sampling
        try:
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
        except Exception as error:
            meant = failure(error, self.spec.partition("#")[0], self._secrets)
            if meant is None:  # a bug, not an answer
                raise
            raise meant from error
        return read_completion(output)


class ChatOracle(ChatClient):
    """Asks the server at a URL.

    Args:
        url: The base of the API, usually ending in `/v1`.
        model: The model's name at the server; may be left out where the server serves a single one.
        api_key: Sent as bearer token. By default the environment variable `HF_REFLECT_API_KEY`, or for a host of
            Hugging Face your own token. Another host never gets your Hugging Face token.
        concurrency: Calls in flight at once.
        timeout: Seconds to wait for one reply.
        headers: Sent with every request.

    Raises:
        OracleError: the server does not answer, refuses the key, or does not serve the model.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        concurrency: int = 16,
        timeout: float = 600.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        address, basic = checked(url)
        self.url, sent = without_secrets(address), {**(headers or {}), **basic}
        key = api_key or os.environ.get(API_KEY_VARIABLE) or hugging_face_token(address)
        name = _model_served(address, self.url, model, key, sent)
        # Without a key the client would fall back on the user's Hugging Face token, whatever the host.
        client = {"base_url": address, "api_key": key or "unused", "headers": sent, "timeout": timeout}
        super().__init__(f"{self.url}#{name}", name, client, concurrency)

    @property
    def identity(self) -> dict[str, Any]:
        """The endpoint and the model."""
        return {"kind": "chat", "url": self.url, "model": self.name}


def _make_client(arguments: dict[str, Any]) -> Any:
    from huggingface_hub import AsyncInferenceClient

    return AsyncInferenceClient(**arguments)


def _model_served(address: str, shown: str, model: str | None, key: str | None, headers: Mapping[str, str]) -> str:
    served = _served_models(address, shown, key, headers)
    if model is None:
        if len(served) == 1:
            return served[0]
        known = f"it serves {', '.join(served)}" if served else "it does not say which models it serves"
        raise OracleError(f"oracle {shown}: name a model with --oracle-model ({known}).")
    if served and model not in served:
        raise OracleError(f"oracle {shown} serves no model {model!r}. It serves: {', '.join(served[:20])}.")
    return model


def _served_models(address: str, shown: str, key: str | None, headers: Mapping[str, str]) -> list[str]:
    status, text, data = get(f"{address}/models", shown, key, headers)
    if status in (401, 403):
        secrets = secrets_in(headers, key)
        raise raised(Fault.of_status(status, redact(text, secrets)), shown, secrets)
    try:
        return [model["id"] for model in data["data"]]
    except (KeyError, TypeError):
        return []  # not every server has this route


def get(url: str, shown: str, key: str | None, headers: Mapping[str, str] | None = None) -> tuple[int, str, Any]:
    """Status, text and JSON (null if it is none) of a GET.

    Raises:
        OracleError: the server can't be spoken to.
    """
    from huggingface_hub.utils import get_session

    bearer = {"authorization": f"Bearer {key}"} if key else {}
    sent = {**bearer, **(headers or {})}
    try:
        response = get_session().get(url, headers=sent, timeout=30)
        text = response.text
    except Exception as error:
        meant = failure(error, shown, secrets_in(sent, key))
        if isinstance(meant, PassingError):
            raise OracleError(f"oracle {shown}: {meant}. {meant.advice}") from None
        if meant is None:
            raise
        raise meant from None
    try:
        return response.status_code, text, response.json()
    except ValueError:
        return response.status_code, text, None


def read_completion(output: Any) -> Reply:
    """The reply in an OpenAI-style completion.

    Raises:
        PassingError: it has no choices.
        RowFailedError: it holds something else than text.
    """
    choices = getattr(output, "choices", None)
    if not choices:
        raise PassingError("the server sent a completion without choices")
    choice, used = choices[0], output.usage
    refusal = getattr(choice.message, "refusal", None)
    content = getattr(choice.message, "content", None) or refusal or ""
    if choice.message is None or not isinstance(content, str):
        raise RowFailedError("the server sent a completion whose message is not text")
    # vLLM, SGLang and DeepSeek call it reasoning_content, OpenRouter and newer vLLM reasoning.
    thinking = (getattr(choice.message, name, None) for name in ("reasoning_content", "reasoning"))
    return Reply(
        text=content,
        finish_reason="content_filter" if refusal else choice.finish_reason,
        prompt_tokens=used.prompt_tokens if used else None,
        completion_tokens=used.completion_tokens if used else None,
        thinking=next((text for text in thinking if isinstance(text, str) and text), None),
    )


def checked(url: str) -> tuple[str, dict[str, str]]:
    """A URL without user and password, and the header that says those.

    Raises:
        OracleError: it is no URL of a server.
    """
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


def hugging_face_token(url: str) -> str | None:
    """The user's own token, for a host of Hugging Face; null for any other."""
    host = urlsplit(url).hostname or ""
    if urlsplit(url).scheme == "https" and f".{host}".endswith(_HUGGING_FACE_HOSTS):
        from huggingface_hub import get_token

        return get_token()
    return None
