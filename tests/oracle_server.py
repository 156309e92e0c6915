"""A loopback server that speaks the OpenAI chat protocol over real sockets, and misbehaves on order.

In a test:

    with OracleServer() as server:
        server.rule = lambda call: error(503) if call.attempt == 1 else None
        ChatOracle(server.url)
    server.calls  # everything that arrived, with its headers

As a process of its own, so that calls can be counted while its clients are killed:

    python oracle_server.py --port-file PORT --log LOG --latency 0.05

The log has a line of JSON when a completion was received (before anything is answered), and another when it was
answered successfully.

An answer is a function of the request's body and of nothing else. To teach the server another protocol, add handlers
to `routes`; an `Answer` whose body is a tuple goes out in chunks.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Call:
    """One HTTP request, as it arrived.

    Attributes:
        headers: By lower-case name.
        body: What the JSON said; null without a body.
        attempt: How often this very request has come, this time included.
        number: How many requests to this path have come, this one included.
        at: When it came, in seconds of the event loop's clock.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any
    attempt: int
    number: int
    at: float

    @property
    def digest(self) -> str:
        return digest_of(self.body)

    @property
    def user(self) -> str:
        return self.body["messages"][-1]["content"]


@dataclass(frozen=True)
class Answer:
    """What goes back.

    Attributes:
        body: Bytes, text, or something for JSON; a tuple of bytes is sent chunk by chunk.
        delay: Seconds to wait first.
        cut: Reset the connection `before` anything is sent, or in the `middle` of the body.
        hang: Never answer.
    """

    status: int = 200
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: str | None = None
    hang: bool = False

    @property
    def payload(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        return (self.body if isinstance(self.body, str) else json.dumps(self.body)).encode()


Rule = Callable[[Call], Answer | None]
Handler = Callable[[Call], Answer]


class OracleServer:
    """The server. It runs in a thread of its own, on a free port of 127.0.0.1.

    Attributes:
        rule: What to answer to a completion instead of the usual; null means the usual.
        models: What `/v1/models` lists.
        calls: Everything received so far.
        most_at_once: The most completions that were in flight together.
        routes: Handlers by method and path.
    """

    def __init__(
        self, rule: Rule | None = None, models: tuple[str, ...] = ("teacher",), log: Path | None = None, port: int = 0
    ) -> None:
        self.rule, self.models, self.log, self.port = rule, models, log, port
        self.calls: list[Call] = []
        self.most_at_once = 0
        self.routes: dict[tuple[str, str], Handler] = {
            ("GET", "/v1/models"): self._list_models,
            ("POST", "/v1/chat/completions"): self._complete,
        }
        self._at_once = 0
        self._seen: Counter[str] = Counter()
        self._paths: Counter[str] = Counter()
        self._connections: set[asyncio.Task[Any]] = set()
        self._ready = threading.Event()

    @property
    def url(self) -> str:
        """The base that a client is given."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def completions(self) -> list[Call]:
        """The calls that asked for a completion."""
        return [call for call in self.calls if call.method == "POST"]

    def __enter__(self) -> "OracleServer":
        threading.Thread(target=lambda: asyncio.run(self.serve()), name="oracle-server", daemon=True).start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Closes the port and every connection."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(10)

    async def serve(self) -> None:
        """Serves until stopped."""
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self._thread = threading.current_thread()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=512, limit=1 << 24)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopping.wait()
        server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(task := asyncio.current_task())
        try:
            while (call := await self._read(reader)) is not None:
                await self._answer(call, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client is gone, or was sent away
        except asyncio.CancelledError:
            pass  # the server stops
        finally:
            self._connections.discard(task)
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Call | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head.strip().split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        path, body = target.partition("?")[0], json.loads(raw) if raw else None
        identity = f"{method} {path} {digest_of(body)}"
        self._seen[identity] += 1
        self._paths[path] += 1
        call = Call(method, path, headers, body, self._seen[identity], self._paths[path], self._loop.time())
        self.calls.append(call)
        return call

    async def _answer(self, call: Call, writer: asyncio.StreamWriter) -> None:
        handler = self.routes.get((call.method, call.path))
        counted = handler is not None and call.method == "POST"
        if counted:
            self._record("received", call)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            answer = handler(call) if handler else error(404, "no such route")
            await asyncio.sleep(answer.delay)
            if answer.hang:
                await asyncio.Event().wait()
            await _send(answer, writer, bodiless=call.method == "HEAD")
        finally:
            if counted:
                self._at_once -= 1
        if counted and answer.status == 200:
            self._record("answered", call)

    def _record(self, event: str, call: Call) -> None:
        if self.log is not None:
            with self.log.open("a") as log:
                log.write(json.dumps({"event": event, "digest": call.digest}) + "\n")

    def _list_models(self, call: Call) -> Answer:
        return Answer(body={"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    def _complete(self, call: Call) -> Answer:
        return (self.rule and self.rule(call)) or completion(call)


async def _send(answer: Answer, writer: asyncio.StreamWriter, *, bodiless: bool) -> None:
    if answer.cut == "before":
        _reset(writer)
    chunked = isinstance(answer.body, tuple)
    length = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(len(answer.payload))}
    headers = {"Content-Type": "application/json", **length, **answer.headers}
    head = f"HTTP/1.1 {answer.status} Status\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
    writer.write(head.encode("latin-1"))
    if answer.cut == "middle":
        writer.write(answer.payload[: len(answer.payload) // 2])
        await writer.drain()
        _reset(writer)
    if bodiless:
        pass
    elif chunked:
        for chunk in (*answer.body, b""):
            writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            await writer.drain()
    else:
        writer.write(answer.payload)
    await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Makes the kernel send RST in place of FIN."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    raise ConnectionResetError


# What can be answered.


def completion(call: Call, text: str | None = None, **choice: Any) -> Answer:
    """A completion in OpenAI's layout, by default the usual reflection; `choice` overrides parts of its choice."""
    text = reflection(call.body) if text is None else text
    words = sum(len(str(message["content"]).split()) for message in call.body["messages"])
    return Answer(
        body={
            "id": f"chatcmpl-{call.digest}",
            "object": "chat.completion",
            "created": 0,
            "model": call.body["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop",
                    "logprobs": None,
                    **choice,
                }
            ],
            "usage": {
                "prompt_tokens": words,
                "completion_tokens": len(text.split()),
                "total_tokens": words + len(text.split()),
            },
        }
    )


def error(status: int, message: str = "", *, retry_after: float | None = None) -> Answer:
    """An error in OpenAI's layout."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return Answer(status, {"error": {"message": message or f"status {status} on order", "code": status}}, headers)


def _cut(where: str) -> Callable[[Call], Answer]:
    return lambda call: replace(completion(call), cut=where)


FAULTS: dict[str, Callable[[Call], Answer]] = {
    **{str(status): lambda call, s=status: error(s) for status in (400, 401, 403, 404, 429, 500, 502, 503)},
    "429-wait": lambda call: error(429, retry_after=1.5),
    "reset": _cut("before"),
    "reset-middle": _cut("middle"),
    "not-json": lambda call: Answer(body="<html>upstream is asleep</html>"),
    "truncated-json": lambda call: Answer(body=completion(call).payload[:-20]),
    "no-choices": lambda call: Answer(body={**completion(call).body, "choices": []}),
    "wrong-type": lambda call: replace(completion(call), headers={"Content-Type": "text/plain"}),
    "length": lambda call: completion(call, "It should be", finish_reason="length"),
    "content-filter": lambda call: completion(call, "", finish_reason="content_filter"),
    "refusal": lambda call: completion(call, "I'm sorry, but I can't help with that."),
    "empty": lambda call: completion(call, ""),
    "surrogate": lambda call: completion(call, "half a pair: \ud83d"),
    "hang": lambda call: Answer(hang=True),
}
"""Everything that goes wrong out there, by name."""


# The usual reflection.

_WORDS = """
    because the reader needs exact steps and a short example first we compare both sides then name the reason
    with numbers where they help such as three percent of cases finally say what remains open and why it matters
""".split()  # noqa: SIM905


def digest_of(body: Any) -> str:
    """A short hash of a request's body."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def reflection(body: Any) -> str:
    """A plausible reflection in the layout that the prompt asks for: an eighth `[Unchanged]`, others long or short."""
    user, digest = body["messages"][-1]["content"].rstrip(), digest_of(body)
    chance = random.Random(digest)
    critique = f"Review {digest}: it could say more, and say it more plainly."
    unchanged, long = chance.random() < 1 / 8, chance.random() < 1 / 2
    instruction = f"{_subject(user)} Explain {' '.join(chance.choices(_WORDS, k=6))}, in {chance.randint(2, 9)} steps."
    response = " ".join(chance.choices(_WORDS, k=chance.randint(40, 160) if long else chance.randint(3, 12))) + "."
    if chance.random() < 1 / 4:
        response += "\n\n- one\n- two {with braces}"
    properties = ((body.get("response_format") or {}).get("json_schema") or {}).get("schema", {}).get("properties")
    if properties:
        filled = {"critique": critique, "new_instruction": instruction, "new_input": "", "new_response": response}
        told = {name: "" if unchanged else filled[name] for name in properties if name in filled}
        return json.dumps({**told, "critique": critique, "already_good": unchanged})
    if user.endswith("[End]"):  # the `paper` layout
        if unchanged:
            return f"{critique}\n[Unchanged]"
        new = f"[New Instruction]\n{instruction}\n[End]\n" if "exactly these two blocks" in user[-600:] else ""
        return f"{critique}\n\n{new}[New Response]\n{response}\n[End]"
    if user.endswith("ALREADY GOOD"):  # the first stage of `staged`
        return "ALREADY GOOD" if unchanged else critique
    return instruction if "Rewrite the instruction" in user[-300:] else response


def _subject(user: str) -> str:
    found = re.search(r"### Instruction\n(.*?)(?:\n|$)", user)
    return (found[1] if found else user)[:60].strip()


def main() -> None:
    """Serves in this process until it is killed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port-file", type=Path, required=True, help="where the port is written once it is open")
    parser.add_argument("--log", type=Path, help="where calls are recorded")
    parser.add_argument("--models", default="teacher", help="served models, separated by commas")
    parser.add_argument("--latency", type=float, default=0.0, help="mean seconds per completion")
    parser.add_argument("--fault", choices=FAULTS, help="what goes wrong")
    parser.add_argument("--every", type=int, default=1, help="which completions it happens to: each so-many-th")
    options = parser.parse_args()

    def rule(call: Call) -> Answer:
        faulty = options.fault and call.number % options.every == 0
        answer = FAULTS[options.fault](call) if faulty else completion(call)
        return replace(answer, delay=options.latency * 2 * random.Random(call.digest).random())

    async def serve() -> None:
        server = OracleServer(rule, tuple(options.models.split(",")), options.log)
        serving = asyncio.ensure_future(server.serve())
        while not server.port:
            await asyncio.sleep(0.01)
        unfinished = options.port_file.with_suffix(".part")
        unfinished.write_text(str(server.port))
        os.replace(unfinished, options.port_file)
        await serving

    asyncio.run(serve())


if __name__ == "__main__":
    main()
