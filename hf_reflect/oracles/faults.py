"""What a failed call means: try again, give up on the row, or stop the run.

huggingface_hub speaks through httpx2, httpx or aiohttp, depending on its version, and raises their errors as they
are. This is the one place that knows.
"""

import asyncio
import json
import sys
from dataclasses import dataclass
from typing import Any


_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_ADVICE = {
    401: "Set the key in HF_REFLECT_API_KEY, or log in with `hf auth login` for a Hugging Face host.",
    403: "The key has no right to this model: ask for access, or use another key.",
    404: "Check the URL (it usually ends in /v1) and --oracle-model.",
}
_TRANSPORTS = (("httpx2", "TransportError"), ("httpx", "TransportError"), ("aiohttp", "ClientError"))
_LONGEST = 300


@dataclass(frozen=True)
class Fault:
    """Why a call failed.

    Attributes:
        message: What happened, in a few words.
        passing: It may work the next time.
        lasting: It will fail for every request.
        unreachable: The server could not be spoken to at all.
        retry_after: Seconds the server asks to wait.
    """

    message: str
    passing: bool = False
    lasting: bool = False
    unreachable: bool = False
    retry_after: float | None = None
    status: int | None = None

    @classmethod
    def of_status(cls, status: int, body: str, retry_after: str | None = None) -> "Fault":
        """The fault that an HTTP status stands for."""
        detail = " ".join(body.split())[:_LONGEST]
        return cls(
            message=f"HTTP {status}" + (f": {detail}" if detail else ""),
            passing=status in _PASSING,
            lasting=status in _ADVICE,
            retry_after=_seconds(retry_after),
            status=status,
        )

    @property
    def advice(self) -> str:
        """What a person can do about it."""
        if self.unreachable:
            return "Is the server running? Start it and run the same command again: nothing paid for is lost."
        return _ADVICE.get(self.status or 0, "Run the same command again to go on: nothing paid for is lost.")


def read_fault(error: BaseException, secret: str | None = None) -> Fault | None:
    """What an exception of a call means; null if it is none of the failures a call can have.

    Args:
        error: What was raised.
        secret: The key that was sent: a server may echo it, and no message may.
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        InferenceTimeoutError,
        OfflineModeIsEnabled,
        OverloadedError,
        TextGenerationError,
    )

    if isinstance(error, OfflineModeIsEnabled):
        return Fault("HF_HUB_OFFLINE=1 forbids huggingface_hub to call any server; unset it", lasting=True)
    if isinstance(error, InferenceTimeoutError | asyncio.TimeoutError):
        return Fault("no reply in time", passing=True)
    if isinstance(error, OverloadedError):
        return Fault(f"overloaded: {error}"[:_LONGEST], passing=True)
    if isinstance(error, TextGenerationError):
        return Fault(f"{type(error).__name__}: {error}"[:_LONGEST])
    status, body, headers = _http_answer(error)
    if status is not None:
        return Fault.of_status(status, redact(body, secret), headers.get("Retry-After"))
    if isinstance(error, HfHubHTTPError):
        return Fault(f"{error}"[:_LONGEST], passing=True)
    if isinstance(error, (*_transport_errors(), ConnectionError)):
        return Fault(f"no connection ({type(error).__name__})", passing=True, unreachable=True)
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return Fault("the reply is not JSON", passing=True)
    if isinstance(error, ValueError) and "Invalid" in str(error):  # what huggingface_hub says of JSON of another shape
        return Fault("the reply is not a chat completion", passing=True)
    return None


def redact(message: str, secret: str | None) -> str:
    """A message in which a server's echo of the key is blanked out."""
    return message.replace(secret, "***") if secret else message


def _http_answer(error: BaseException) -> tuple[int | None, str, Any]:
    response = getattr(error, "response", None)
    if response is not None and hasattr(response, "status_code"):
        return response.status_code, response.text, response.headers
    if hasattr(error, "response_error_payload"):  # huggingface_hub < 1.0 on aiohttp
        payload = error.response_error_payload
        return error.status, json.dumps(payload) if payload else "", getattr(error, "headers", None) or {}  # type: ignore[attr-defined]
    return None, "", {}


def _transport_errors() -> tuple[type[BaseException], ...]:
    loaded = [(sys.modules[module], name) for module, name in _TRANSPORTS if module in sys.modules]
    requests = [sys.modules["requests"].RequestException] if "requests" in sys.modules else []
    return tuple(getattr(module, name) for module, name in loaded) + tuple(requests)


def _seconds(retry_after: str | None) -> float | None:
    try:
        return max(0.0, float(retry_after)) if retry_after else None
    except ValueError:
        return None
