"""What a failed call means: try again, give up on the row, or stop the run.

huggingface_hub speaks through httpx2, httpx or aiohttp, depending on its version, and raises their errors as they
are. This is the one place that knows.
"""

import asyncio
import json
import math
import re
import sys
import time
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from hf_reflect.errors import OracleError
from hf_reflect.oracles.base import PassingError, RowFailedError


_PASSING = {408, 409, 424, 425, 429, 500, 502, 503, 504, 529}
_THROTTLED = {429, 503, 529}
_SLOW = {408, 504}
_GATEWAY = 502
_ADVICE = {
    402: "Buy credits or take another oracle, then run the same command again: nothing paid for is lost.",
    401: "Set the key in HF_REFLECT_API_KEY, or log in with `hf auth login` for a Hugging Face host.",
    403: "The key has no right to this model: ask for access, or use another key.",
    404: "Check the URL (it usually ends in /v1) and --oracle-model.",
}
_TRANSPORTS = (("httpx2", "TransportError"), ("httpx", "TransportError"), ("aiohttp", "ClientError"))
_LONGEST = 300
_SHORTEST_SECRET = 4
"""Less is no secret, and blanking it would garble every message."""


@dataclass(frozen=True)
class Fault:
    """Why a call failed.

    Attributes:
        message: What happened, in a few words.
        passing: It may work the next time.
        lasting: It will fail for every request.
        unreachable: The server could not be spoken to at all.
        throttled: The server has too much to do.
        slow: It did not answer in time.
        retry_after: Seconds the server asks to wait.
        status: The HTTP status, if there was one.
    """

    message: str
    passing: bool = False
    lasting: bool = False
    unreachable: bool = False
    throttled: bool = False
    slow: bool = False
    retry_after: float | None = None
    status: int | None = None

    @classmethod
    def of_status(cls, status: int, body: str, headers: Mapping[str, str] | None = None) -> "Fault":
        """The fault that an HTTP status stands for."""
        detail = " ".join(body.split())[:_LONGEST]
        return cls(
            message=f"HTTP {status}" + (f": {detail}" if detail else ""),
            passing=status in _PASSING,
            lasting=status in _ADVICE,
            throttled=status in _THROTTLED,
            unreachable=status == _GATEWAY,
            slow=status in _SLOW,
            retry_after=wait_in(headers or {}),
            status=status,
        )

    @property
    def advice(self) -> str:
        """What a person can do about it."""
        if self.unreachable:
            return "Is the server running? Start it and run the same command again: nothing paid for is lost."
        return _ADVICE.get(self.status or 0, "Run the same command again to go on: nothing paid for is lost.")


def failure(error: Exception, where: str, secrets: Sequence[str] = ()) -> Exception | None:
    """The error of ours that an exception of a call means; null if it is none of the failures a call can have.

    Args:
        error: What was raised.
        where: What messages call the oracle.
        secrets: What was sent to be let in: a server may echo it, and no message may.
    """
    if isinstance(error, OracleError | PassingError | RowFailedError):
        return error
    fault = read_fault(error, secrets)
    return None if fault is None else raised(fault, where, secrets)


def raised(fault: Fault, where: str, secrets: Sequence[str] = ()) -> Exception:
    """The error of ours that says what a fault says."""
    if fault.lasting:
        return OracleError(redact(f"oracle {where}: {fault.message}. {fault.advice}", secrets))
    if fault.passing:
        message = redact(fault.message, secrets)
        return PassingError(
            message,
            retry_after=fault.retry_after,
            throttled=fault.throttled,
            unreachable=fault.unreachable,
            slow=fault.slow,
            advice=fault.advice,
        )
    return RowFailedError(redact(fault.message, secrets))


def read_fault(error: BaseException, secrets: Sequence[str] = ()) -> Fault | None:
    """What an exception of a call means; null if it is none of the failures a call can have."""
    from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError, OfflineModeIsEnabled, TextGenerationError

    if isinstance(error, OfflineModeIsEnabled):
        return Fault("HF_HUB_OFFLINE=1 forbids huggingface_hub to call any server; unset it", lasting=True)
    if isinstance(error, InferenceTimeoutError | asyncio.TimeoutError) or type(error).__name__ == "ReadTimeout":
        return Fault("no reply in time", passing=True, slow=True)
    if isinstance(error, TextGenerationError):
        return _of_tgi(error, secrets)
    status, body, headers = _http_answer(error)
    if status is not None and status != 200:
        return Fault.of_status(status, redact(body, secrets), headers)
    if isinstance(error, HfHubHTTPError):
        return Fault(f"{error}"[:_LONGEST], passing=True)
    # aiohttp looks at the content type of an answer, and says so; httpx does not look.
    if status == 200 or isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return Fault("the reply is not JSON", passing=True)
    if isinstance(error, (*_transport_errors(), ConnectionError)):
        return Fault(f"no connection ({type(error).__name__})", passing=True, unreachable=True)
    if isinstance(error, ValueError) and "Invalid" in str(error):  # what huggingface_hub says of JSON of another shape
        return Fault("the reply has not the shape it should have", passing=True)
    return None


def _of_tgi(error: Exception, secrets: Sequence[str]) -> Fault:
    from huggingface_hub.errors import OverloadedError, ValidationError

    _, _, headers = _http_answer(error.__cause__ or error.__context__ or error)
    return Fault(
        redact(f"{type(error).__name__}: {error}", secrets)[:_LONGEST],
        passing=not isinstance(error, ValidationError),
        throttled=isinstance(error, OverloadedError),
        retry_after=wait_in(headers),
    )


def secrets_in(headers: Mapping[str, str], key: str | None = None) -> tuple[str, ...]:
    """What must be shown nowhere of what is sent to be let in: keys, and user and password in both spellings."""
    secrets = [key] if key else []
    for name, value in headers.items():
        scheme, _, token = value.partition(" ")
        if name.lower() != "authorization" or not token:
            continue
        secrets.append(token)
        if scheme == "Basic":
            user = b64decode(token).decode("utf-8", "replace")
            secrets += [user, user.partition(":")[2]]
    return tuple(secret for secret in secrets if len(secret) >= _SHORTEST_SECRET)


def redact(message: str, secrets: Sequence[str]) -> str:
    """A message in which a server's echo of a secret is blanked out."""
    for secret in secrets:
        message = message.replace(secret, "***")
    return message


def _http_answer(error: BaseException) -> tuple[int | None, str, Any]:
    response = getattr(error, "response", None)
    if response is not None and hasattr(response, "status_code"):
        return response.status_code, response.text, response.headers
    if hasattr(error, "request_info"):  # aiohttp, under huggingface_hub < 1.0 and text-generation
        payload = getattr(error, "response_error_payload", None)
        return error.status, json.dumps(payload) if payload else "", getattr(error, "headers", None) or {}  # type: ignore[attr-defined]
    return None, "", {}


def _transport_errors() -> tuple[type[BaseException], ...]:
    loaded = [(sys.modules[module], name) for module, name in _TRANSPORTS if module in sys.modules]
    requests = [sys.modules["requests"].RequestException] if "requests" in sys.modules else []
    return tuple(getattr(module, name) for module, name in loaded) + tuple(requests)


_SPAN = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def wait_in(headers: Mapping[str, str]) -> float | None:
    """Seconds that the headers of a refusal ask to wait; null if they don't.

    Reads `Retry-After` (seconds or a date) and `retry-after-ms`, the IETF's `RateLimit`, and the `x-ratelimit-reset`
    family, of which the longest that has nothing remaining counts.
    """
    found = {name.lower(): value.strip() for name, value in headers.items()}
    if (milliseconds := _number(found.get("retry-after-ms"))) is not None:
        return max(0.0, milliseconds / 1000)
    if "retry-after" in found:
        return _until(found["retry-after"])
    waits = [wait for item in found.get("ratelimit", "").split(",") if (wait := _spent(item)) is not None]
    if waits:
        return max(waits)
    for name, value in found.items():
        kind = name.removeprefix("x-ratelimit-reset")
        remaining = _number(found.get(f"x-ratelimit-remaining{kind}"))
        if name != kind and (remaining is None or remaining <= 0) and (wait := _span(value)) is not None:
            waits.append(wait)
    return max(waits, default=None)


def _spent(item: str) -> float | None:
    """Seconds until an item of the `RateLimit` header is filled again; null where something remains of it."""
    parameters = dict(part.strip().partition("=")[::2] for part in item.split(";")[1:])
    return _number(parameters.get("t")) if _number(parameters.get("r")) == 0 else None


def _until(retry_after: str) -> float | None:
    seconds = _number(retry_after)
    if seconds is not None:
        return max(0.0, seconds)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None


def _span(text: str) -> float | None:
    """Seconds in `1.5`, `20ms` or `6m0s`; null for a moment since 1970, which some servers send, and for the rest."""
    seconds = _number(text)
    if seconds is not None:
        return seconds if 0 <= seconds < 1e8 else None
    parts = _SPAN.findall(text)
    return sum(float(n) * _UNITS[unit] for n, unit in parts) if parts else None


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        return None
    return value if value is None or math.isfinite(value) else None
