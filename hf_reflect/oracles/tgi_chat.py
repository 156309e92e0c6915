"""Chat messages as the text that a TGI server's model reads.

TGI's native protocol takes plain text, so the model's chat template is applied before: by the server itself
(`/chat_tokenize`), or by the model's tokenizer where the server is too old for that. TGI prepends a BOS to whatever it
is sent, so one that the template wrote is taken off again; and some templates know no system role, so for those the
system message opens the user's.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from hf_reflect.errors import OracleError
from hf_reflect.oracles.base import PassingError, RowFailedError
from hf_reflect.oracles.faults import Fault, failure, raised, redact


Messages = list[dict[str, str]]
Apply = Callable[[Messages], tuple[str, int]]
"""Gives the text of messages and its length in tokens."""

_PROBE: Messages = [{"role": "system", "content": "probe"}, {"role": "user", "content": "probe"}]


class ChatTemplate:
    """The chat template of a TGI server's model.

    Args:
        address: The server's base.
        headers: What is sent to be let in.
        secrets: What of it no message may show.
        spec: What messages call the oracle.
        served: The model that the server names.
        revision: Its revision.
        model: Whose tokenizer to use instead of asking the server; null for the server's.
        timeout: Seconds to wait for an answer.

    Raises:
        OracleError: there is no template to be had.
    """

    def __init__(
        self,
        address: str,
        headers: Mapping[str, str],
        secrets: Sequence[str],
        *,
        spec: str,
        served: str,
        revision: str | None,
        model: str | None,
        timeout: float,
    ) -> None:
        self._address, self._headers, self._timeout = address, dict(headers), timeout
        self._secrets, self._spec = secrets, spec
        self._system = True
        self._apply: Apply = self._by_server
        try:
            if model is not None or not self._server_applies():
                self._apply = self._by_tokenizer(model or served, None if model else revision)
                self._system = self._knows_system()
            self._written, self._prepended = self._bos()
        except (PassingError, RowFailedError) as error:
            raise OracleError(f"oracle {spec}: its chat template can't be had: {error}.") from error

    def __call__(self, messages: Messages) -> tuple[str, int]:
        """The text to send for these messages, and how many tokens the model then reads.

        Raises:
            PassingError: the server failed in a way that may pass.
            RowFailedError: the template refuses the messages.
            OracleError: the server will refuse them all.
        """
        text, length = self._apply(messages if self._system else _folded(messages))
        if self._written and text.startswith(self._written):
            return text[len(self._written) :], length
        return text, length + self._prepended

    def _server_applies(self) -> bool:
        """Whether the server has a template, with or without a system role."""
        try:
            self._system = self._knows_system()
        except (OracleError, RowFailedError) as error:
            if isinstance(error, _NoRouteError | RowFailedError):
                return False
            raise
        return True

    def _knows_system(self) -> bool:
        try:
            self._apply(_PROBE)
        except RowFailedError:
            self._apply(_folded(_PROBE))
            return False
        return True

    def _bos(self) -> tuple[str, int]:
        """A BOS that the template writes and TGI would prepend once more, and how many TGI prepends to a text."""
        text, length = self._apply(_PROBE if self._system else _folded(_PROBE))
        try:
            tokens = self._post("tokenize", {"inputs": text})
        except (OracleError, RowFailedError):
            return "", 0  # no such route: then nothing is known, and nothing is changed
        if not isinstance(tokens, list) or not all(isinstance(t, dict) and {"id", "text"} <= set(t) for t in tokens):
            return "", 0
        prepended = max(0, len(tokens) - length)
        if prepended and len(tokens) > 1 and tokens[0]["id"] == tokens[1]["id"]:
            return str(tokens[1]["text"]), 0
        return "", prepended

    def _by_server(self, messages: Messages) -> tuple[str, int]:
        data = self._post("chat_tokenize", {"model": "tgi", "messages": messages})
        try:
            return str(data["templated_text"]), len(data["tokenize_response"])
        except (KeyError, TypeError) as error:
            raise PassingError("the server's templated chat has not the shape it should have") from error

    def _post(self, route: str, body: Mapping[str, Any]) -> Any:
        from huggingface_hub.utils import get_session

        try:
            response = get_session().post(
                f"{self._address}/{route}", json=body, headers=self._headers, timeout=self._timeout
            )
            if response.status_code in (404, 405):
                raise _NoRouteError(f"oracle {self._spec}: it has no route /{route}.")
            if response.status_code != 200:
                said = redact(response.text, self._secrets)
                fault = Fault.of_status(response.status_code, said, response.headers)
                raise raised(fault, self._spec, self._secrets)
            return response.json()
        except Exception as error:
            meant = failure(error, self._spec, self._secrets)
            if meant is None:
                raise
            raise meant from None

    def _by_tokenizer(self, name: str, revision: str | None) -> Apply:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        except (OSError, ValueError) as error:
            raise OracleError(
                f"oracle {self._spec}: the chat template of {name} can't be had. Name the model or a folder with its "
                "tokenizer with --oracle-model, or ask through the Messages API: --oracle URL/v1"
            ) from error
        if not tokenizer.chat_template:
            raise OracleError(
                f"oracle {self._spec}: {name} has no chat template. Name a chat model with --oracle-model."
            )
        return partial(_templated, tokenizer)


class _NoRouteError(OracleError):
    """The server is too old, or no TGI."""


def _templated(tokenizer: Any, messages: Messages) -> tuple[str, int]:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise RowFailedError(f"the chat template refuses the messages: {error}") from error
    return text, len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _folded(messages: Messages) -> Messages:
    """Messages whose system message opens the first of the user."""
    if not messages or messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]
