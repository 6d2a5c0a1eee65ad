"""A server on loopback that speaks as much of OpenAI's completions as the tests need, and
misbehaves when it is told to."""

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STOP = 2
"""The end of sequence of the tests' tokenizer."""


def written(payload: dict[str, Any]) -> tuple[list[int], list[float]]:
    """The ids and log-probabilities of a pretended model: a function of seed and prompt."""
    text = json.dumps([payload["seed"], payload["prompt"]])
    digest = hashlib.sha256(text.encode()).digest()
    length = min(payload["max_tokens"], 1 + digest[0] % 6)
    ids = [4 + byte % 10 for byte in digest[1 : 1 + length]]
    if length < payload["max_tokens"]:
        ids[-1] = STOP
    return ids, [-byte / 64 for byte in digest[9 : 9 + length]]


def completion(payload: dict[str, Any]) -> dict[str, Any]:
    """An answer as vLLM gives it."""
    ids, logprobs = written(payload)
    choice = {
        "index": 0,
        "text": "",
        "finish_reason": "stop" if ids[-1] == STOP else "length",
        "token_ids": ids,
        "prompt_token_ids": payload["prompt"],
        "logprobs": {"token_logprobs": logprobs, "tokens": [""] * len(ids)},
    }
    return {"object": "text_completion", "model": payload["model"], "choices": [choice]}


class StandIn:
    """The server's state: what it was asked, and what it does about it."""

    def __init__(self) -> None:
        self.models: list[dict[str, Any]] = [{"id": "stand-in", "max_model_len": 128}]
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.answer: Callable[[dict[str, Any]], dict[str, Any]] = completion
        self.misbehave: Callable[[int, BaseHTTPRequestHandler], bool] = lambda count, handler: False
        self.url = ""
        self._lock = threading.Lock()

    def begin(self, payload: dict[str, Any], headers: dict[str, str]) -> int:
        with self._lock:
            self.asked.append(payload)
            self.headers.append(headers)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            return len(self.asked)

    def end(self) -> None:
        with self._lock:
            self.at_once -= 1


def say(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def failing(status: int, message: str = "", times: int = 10**9, **headers: str):
    """The first so many completions are refused with this status."""

    def misbehave(count: int, handler: BaseHTTPRequestHandler) -> bool:
        if count > times:
            return False
        say(handler, status, json.dumps({"error": {"message": message}}).encode(), **headers)
        return True

    return misbehave


def cut_off(times: int = 10**9):
    """The first so many answers end in the middle of their JSON."""

    def misbehave(count: int, handler: BaseHTTPRequestHandler) -> bool:
        if count > times:
            return False
        say(handler, 200, b'{"choices": [{"index": 0, "token_ids": [4, 5')
        return True

    return misbehave


def dropping(times: int = 10**9):
    """The connection is closed after a part of what was announced."""

    def misbehave(count: int, handler: BaseHTTPRequestHandler) -> bool:
        if count > times:
            return False
        handler.send_response(200)
        handler.send_header("content-length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"choices"')
        handler.close_connection = True
        return True

    return misbehave


def hanging(seconds: float, times: int = 10**9, *, trickle: bool = False):
    """Nothing comes for a while, or a byte now and then."""

    def misbehave(count: int, handler: BaseHTTPRequestHandler) -> bool:
        if count > times:
            return False
        until = time.monotonic() + seconds
        if trickle:
            handler.send_response(200)
            handler.send_header("content-length", "1000")
            handler.end_headers()
        while time.monotonic() < until:
            time.sleep(0.02)
            if trickle:
                handler.wfile.write(b" ")
        return True

    return misbehave


@contextmanager
def stand_in() -> Iterator[StandIn]:
    state = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            say(self, 200, json.dumps({"object": "list", "data": state.models}).encode())

        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["content-length"])))
            count = state.begin(payload, dict(self.headers))
            try:
                if not state.misbehave(count, self):
                    body = json.dumps(state.answer(payload)).encode()
                    say(self, 200, body)
            except OSError:  # the client has gone
                self.close_connection = True
            finally:
                state.end()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def top_logprobs(logits: list[float], k: int, token: int) -> dict[str, dict[str, Any]]:
    """One position of `prompt_logprobs` as vLLM gives it: the k most likely, and the token's
    own."""
    total = math.log(math.fsum(math.exp(one) for one in logits))
    order = sorted(range(len(logits)), key=lambda row: -logits[row])
    shown = list(dict.fromkeys([*order[:k], token]))
    return {
        str(row): {
            "logprob": logits[row] - total,
            "rank": order.index(row) + 1,
            "decoded_token": "",
        }
        for row in shown
    }
