#!/usr/bin/env python3
"""Tests of ollama_gateway.py: real sockets on the loopback interface, only the standard library, no fixed sleeps.

    python3 test_ollama_gateway.py                                          all tests, in parallel, in about a minute and a half
    python3 test_ollama_gateway.py Authentication                           one class
    python3 test_ollama_gateway.py Authentication.test_deleted_token_is_refused
                                                                            one test
    python3 test_ollama_gateway.py -k limit                                 tests whose name contains a word
    ../shared/real-ollama/with-ollama.sh python3 test_ollama_gateway.py -k Live
                                                                            tests against a real Ollama at OLLAMA_TEST_URL

    python3 test_ollama_gateway.py --fake-ollama [PORT]                     no tests: a fake Ollama on port 11434, to try the README
    python3 test_ollama_gateway.py --bench [--json]                         no tests: benchmark of the gateway's overhead, in less than a minute

The toolbox comes first: timeouts and leak detection, the fake Ollama, a client that exposes exactly what is received,
and the base classes of the tests. The tests follow by feature, from the settings to the real Ollama.
"""

import ast
import base64
import collections
import concurrent.futures
import contextlib
import csv
import errno
import functools
import gc
import hashlib
import html
import http.client
import http.server
import importlib.util
import io
import itertools
import json
import logging
import os
import queue
import random
import re
import select
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import struct
import subprocess
import symtable
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import unittest
import unittest.mock
import urllib.request
import warnings

try:
    import fcntl
    import pty
    import termios
except ImportError:   # on Windows
    fcntl = pty = termios = None

try:
    import resource
except ImportError:   # on Windows
    resource = None

import ollama_gateway as gateway

TESTS = os.path.abspath(__file__)
HERE = os.path.dirname(TESTS)
GATEWAY = os.path.join(HERE, "ollama_gateway.py")
README = os.path.join(HERE, "README.md")
GUARD = 10   # timeout in seconds after which a hanging test fails; a passing test never comes close to it

NDJSON, SSE, JSON = "application/x-ndjson", "text/event-stream", "application/json; charset=utf-8"
FORM_TYPE = [("Content-Type", "multipart/form-data; boundary=x")]
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
DIGEST = "sha256:" + "0" * 64

# == Toolbox ==================================================================


def eventually(predicate, what="the condition"):
    """Poll until the predicate is true and return its value; fail after GUARD seconds. `what` names the awaited event."""
    deadline = time.monotonic() + GUARD
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out after {GUARD} s waiting for {what}")
        time.sleep(0.002)


class Leaks:
    """Collects exceptions from destructors and threads, which are otherwise only printed, and fails the test class that caused them."""

    def __init__(self):
        self.found = []

    def watch(self):
        warnings.simplefilter("error", ResourceWarning)   # in a destructor it reaches the hook below
        for module, hook in ((sys, "unraisablehook"), (threading, "excepthook")):
            unittest.addModuleCleanup(setattr, module, hook, getattr(module, hook))
            setattr(module, hook, self._note)

    def _note(self, event):
        self.found.append("".join(traceback.format_exception(event.exc_type, event.exc_value, event.exc_traceback)))

    def check(self):
        gc.collect()
        found, self.found = self.found, []
        if found:
            raise AssertionError("leaked resources or uncaught exceptions in threads:\n" + "\n".join(found))


LEAKS = Leaks()


def setUpModule():
    """Isolate the tests from the user's settings and .env file, and start leak detection."""
    LEAKS.watch()
    for variable in {option.variable for option in gateway.OPTIONS} & set(os.environ):
        del os.environ[variable]
    folder = tempfile.mkdtemp()
    unittest.addModuleCleanup(shutil.rmtree, folder)
    unittest.addModuleCleanup(os.chdir, os.getcwd())
    os.chdir(folder)


@contextlib.contextmanager
def running(server):
    """Run the server in a thread during the with block, then shut it down."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(GUARD)


Seen = collections.namedtuple("Seen", "method path headers body")

WORDS = ("The", " sky", " is", " blue", ".")
CREATED = "2026-11-23T02:41:34.580792323Z"
COUNTS = {"total_duration": 19151440, "load_duration": 6990370, "prompt_eval_count": 8, "prompt_eval_duration": 2024595,
          "eval_count": len(WORDS), "eval_duration": 9733044}
USAGE = {"prompt_tokens": 8, "completion_tokens": len(WORDS), "total_tokens": 8 + len(WORDS)}
DETAILS = {"parent_model": "", "format": "gguf", "family": "llama", "families": ["llama"], "parameter_size": "4.18M", "quantization_level": "F16"}
MODEL = {"name": "tiny:latest", "model": "tiny:latest", "size": 8_393_184, "digest": "cb8f39cc" * 8, "details": DETAILS}
V1_MODEL = {"id": "tiny:latest", "object": "model", "created": 1795401614, "owned_by": "library"}
VECTOR = [-0.1646678, -0.10103558, 0.14922705, -0.13328274]


def compact(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


class Cut(Exception):
    """Raised by a piece of a reply: the fake Ollama drops the connection at this point."""


def cut(exchange):
    """A piece that drops the connection."""
    raise Cut


def until_hangup(exchange):
    """A piece that sends nothing until the client disconnects."""
    while exchange.connection.recv(65536):
        pass
    raise ConnectionResetError("the client disconnected")


class Reply:
    """Replies of the fake Ollama: functions of the exchange. A piece is bytes, an Event to wait for, or a function of the exchange."""

    @staticmethod
    def json(status, value, kind=JSON, **headers):
        return Reply.body(status, compact(value), **{"Content-Type": kind, **headers})

    @staticmethod
    def body(status, data, **headers):
        def reply(exchange):
            exchange.start(status, {**headers, "Content-Length": str(len(data))})
            exchange.send(data)
        return reply

    @staticmethod
    def raw(*pieces):
        """Send exactly these bytes, then close the connection."""
        def reply(exchange):
            exchange.close_connection, exchange.framed = True, False
            exchange.play(pieces)
        return reply

    @staticmethod
    def stream(*pieces, kind=NDJSON, length=None, pause=0):
        """Send each piece of bytes as one chunk; with a length, send a Content-Length of that many bytes and no chunks."""
        def reply(exchange):
            framing = {"Transfer-Encoding": "chunked"} if length is None else {"Content-Length": str(length)}
            exchange.start(200, {"Content-Type": kind, **framing})
            exchange.play(pieces, pause)
            exchange.end()
        return reply


class Exchange(http.server.BaseHTTPRequestHandler):
    """One request to the fake Ollama and its response."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 3 * GUARD
    framed = False   # whether bytes go out in chunks

    def answer(self):
        seen = Seen(self.command, self.path, self.headers.items(), b"")
        try:
            seen = seen._replace(body=self._read_body(seen))
            self.server.received.append(seen)
            self.server.reply_to(seen)(self)
        except Cut:
            self.close_connection = True
        except ConnectionError:
            self.close_connection = True
            self.server.hangups.put(self.path)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer   # noqa: N815, http.server's names

    def _read_body(self, seen):
        body = bytearray()
        try:
            for piece in self._body_pieces():
                body += piece
                self.server.arrived += len(piece)
        except (ValueError, ConnectionError):
            self.server.broken.append(seen._replace(body=bytes(body)))
            raise Cut from None
        return bytes(body)

    def _body_pieces(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield from self._exactly(int(self.headers.get("Content-Length", 0)))
            return
        size = 1
        while size:
            size = int(self.rfile.readline(), 16)
            yield from self._exactly(size)
            if self.rfile.readline() != b"\r\n":
                raise ConnectionResetError("a chunk without its CRLF")

    def _exactly(self, left):
        while left:
            piece = self.rfile.read1(min(left, 65536))
            if not piece:
                raise ConnectionResetError("the body ended early")
            left -= len(piece)
            yield piece

    def start(self, status, headers):
        self.framed = "Transfer-Encoding" in headers
        self.send_response_only(status)
        for name, value in {**headers, "Date": self.date_time_string()}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def play(self, pieces, pause=0):
        for piece in pieces:
            if isinstance(piece, bytes):
                self.send(piece)
                time.sleep(pause)
            elif isinstance(piece, threading.Event):
                piece.wait(GUARD)
            else:
                piece(self)

    def send(self, data):
        if self.command != "HEAD":
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if self.framed else data)

    def end(self):
        if self.framed and self.command != "HEAD":
            self.framed = False
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args):
        """Log nothing."""


class FakeOllama(http.server.ThreadingHTTPServer):
    """A fake Ollama that records its requests and sends the configured replies, by default those of Ollama 0.9."""

    daemon_threads = False   # closing waits for all exchanges
    request_queue_size = 128

    def __init__(self, port=0, host="127.0.0.1", pause=0):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Exchange)
        self.pause = pause            # seconds between the pieces of a stream
        self.replies = {}             # path -> a reply, or a list of replies of which the last one repeats
        self.received = []            # every complete request, as Seen
        self.broken = []              # requests with a truncated or malformed body, with the part received
        self.arrived = 0              # bytes of request bodies received so far
        self.accepted = 0             # connections so far
        self.hangups = queue.Queue()  # the path of each exchange whose client disconnected
        self._lock, self._open = threading.Lock(), set()

    @property
    def url(self):
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)   # that of http.server would look up the host name

    def get_request(self):
        connection, address = super().get_request()
        with self._lock:
            self.accepted += 1
            self._open.add(connection)
        return connection, address

    def shutdown_request(self, request):
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def drop(self):
        """Shut down every open connection, and wait until all are closed."""
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        eventually(lambda: not self._open, "the fake Ollama to close its connections")

    def server_close(self):
        self.drop()
        super().server_close()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def reply_to(self, seen):
        reply = self.replies.get(seen.path.partition("?")[0])
        if isinstance(reply, list):
            reply = reply.pop(0) if len(reply) > 1 else reply[0]
        return reply or usual_reply(seen, self.pause)


def usual_reply(seen, pause=0):
    """The reply of a real Ollama to this request."""
    path = seen.path.partition("?")[0]
    try:
        parameters = dict(json.loads(seen.body))
    except (ValueError, TypeError):
        parameters = {}
    model = parameters.get("model") or parameters.get("name") or "tiny"
    if path in MODEL_REPLIES:
        make_reply, streams = MODEL_REPLIES[path]
        options = {"usage": True} if (parameters.get("stream_options") or {}).get("include_usage") else {}
        return make_reply(model, parameters.get("stream", streams), pause, **options)
    if path in ("/api/copy", "/api/delete"):
        return Reply.body(200, b"")
    return Reply.json(200, usual_value(path, model))


def usual_value(path, model):
    return {
        "/api/version": {"version": "0.9.3"},
        "/api/tags": {"models": [dict(MODEL, modified_at=CREATED)]},
        "/api/ps": {"models": [dict(MODEL, expires_at=CREATED, size_vram=0)]},
        "/api/show": {"modelfile": "FROM tiny", "template": "{{ .Prompt }}", "details": DETAILS, "capabilities": ["completion"]},
        "/api/embed": {"model": model, "embeddings": [VECTOR], "total_duration": 1203041, "load_duration": 501230, "prompt_eval_count": 3},
        "/api/embeddings": {"embedding": VECTOR},
        "/v1/embeddings": {"object": "list", "data": [{"object": "embedding", "embedding": VECTOR, "index": 0}], "model": model,
                           "usage": {"prompt_tokens": 3, "total_tokens": 3}},
        "/v1/models": {"object": "list", "data": [V1_MODEL]},
        "/v1/models/tiny": dict(V1_MODEL, id="tiny"),
    }.get(path, {"status": "success"})


def ndjson_reply(part, model, streaming, pause):
    """Answer like /api/chat and /api/generate."""
    head = {"model": model, "created_at": CREATED}
    last = {"done_reason": "stop", "done": True, **COUNTS}
    if not streaming:
        return Reply.json(200, {**head, **part("".join(WORDS)), **last})
    lines = [{**head, **part(word), "done": False} for word in WORDS] + [{**head, **part(""), **last}]
    return Reply.stream(*[compact(line) + b"\n" for line in lines], pause=pause)


def sse_reply(kind, whole, part, model, streaming, pause, usage=False):
    """Answer like /v1/chat/completions, or like /v1/completions, which has a usage in every event."""
    head = {"id": "chatcmpl-91", "object": kind, "created": 1795401704, "model": model, "system_fingerprint": "fp_ollama"}
    if not streaming:
        choice = {"index": 0, **whole("".join(WORDS)), "finish_reason": "stop"}
        return Reply.json(200, {**head, "choices": [choice], "usage": USAGE}, kind="application/json")
    choices = [{"index": 0, **part(word), "finish_reason": None} for word in WORDS] + [{"index": 0, **part(""), "finish_reason": "stop"}]
    nothing_yet = {"usage": dict.fromkeys(USAGE, 0)} if usage and kind == "text_completion" else {}
    events = [b"data: %s\n\n" % compact({**head, "choices": [choice], **nothing_yet}) for choice in choices]
    if usage:
        events[-1] += b"data: %s\n\n" % compact({**head, "choices": [], "usage": USAGE})
    events[-1] += b"data: [DONE]\n\n"
    return Reply.stream(*events, kind=SSE, pause=pause)


def responses_reply(model, streaming, pause):
    """Answer like /v1/responses, following openai/responses.go of Ollama."""
    whole = {"id": "resp_1", "object": "response", "status": "completed", "model": model, "output": [], "tools": [],
             "usage": {"input_tokens": 8, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 5, "total_tokens": 13},
             "metadata": {"usage": {"input_tokens": 1}}}
    if not streaming:
        return Reply.json(200, whole, kind="application/json")
    events = [{"type": "response.created", "response": {**whole, "usage": None}}]
    events += [{"type": "response.output_text.delta", "sequence_number": number, "delta": word} for number, word in enumerate(WORDS)]
    events += [{"type": "response.completed", "sequence_number": 9, "response": whole}]
    return Reply.stream(*map(response_event, events), kind=SSE, pause=pause)


def response_event(event):
    """An event as openai/responses.go writes it: Go maps, whose keys encoding/json sorts at all levels."""
    data = json.dumps(event, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode()
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), data)


def messages_reply(model, streaming, pause):
    """Answer like /v1/messages, following anthropic/anthropic.go of Ollama."""
    whole = {"id": "msg_1", "type": "message", "role": "assistant", "model": model, "content": [], "usage": {"input_tokens": 8, "output_tokens": 5}}
    if not streaming:
        return Reply.json(200, {**whole, "content": [{"type": "text", "text": "".join(WORDS)}]}, kind="application/json")
    events = [{"type": "message_start", "message": {**whole, "usage": {"input_tokens": 7, "output_tokens": 0}}}]
    events += [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}} for word in WORDS]
    events += [{"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": whole["usage"]}, {"type": "message_stop"}]
    return Reply.stream(*[b"event: %s\ndata: %s\n\n" % (event["type"].encode(), compact(event)) for event in events], kind=SSE, pause=pause)


MODEL_REPLIES = {   # path -> reply function, and whether streaming is the default
    "/api/chat": (functools.partial(ndjson_reply, lambda text: {"message": {"role": "assistant", "content": text}}), True),
    "/api/generate": (functools.partial(ndjson_reply, lambda text: {"response": text}), True),
    "/v1/chat/completions": (functools.partial(sse_reply, "chat.completion", lambda text: {"message": {"role": "assistant", "content": text}},
                                                lambda text: {"delta": {"role": "assistant", "content": text}}), False),
    "/v1/completions": (functools.partial(sse_reply, "text_completion", lambda text: {"text": text}, lambda text: {"text": text}), False),
    "/v1/responses": (responses_reply, False),
    "/v1/messages": (messages_reply, False),
}


def serve_fake_ollama(port=11434):
    """Run only the fake Ollama until Ctrl-C, slowly enough to watch it stream."""
    with FakeOllama(port, pause=0.15) as fake:
        print(f"A stand-in Ollama answers on {fake.url} (Ctrl-C stops it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            fake.serve_forever()


class Answer:
    """A response: `ended` is None until the body ends, then "clean" or, if it was truncated, "cut"."""

    def __init__(self, version, status, headers):
        self.version, self.status, self.headers, self.body = version, status, headers, b""
        self.ended = "clean" if status < 200 or status in (204, 304) else None

    def json(self):
        return json.loads(self.body)

    def __repr__(self):
        return f"<{self.status} {self.headers} {self.body[:600]} {self.ended}>"


def request(method, path, body=None, headers=(), version="1.1", host="gateway.test"):
    """Serialize a request; a body that is not bytes is encoded as JSON."""
    if body is not None and not isinstance(body, bytes):
        body = compact(body)
    lines = [f"{method} {path} HTTP/{version}", f"Host: {host}", *[f"{name}: {value}" for name, value in headers]]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines + ["", ""]).encode("utf-8") + (body or b"")


def chunked(*pieces):
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def bearer(secret):
    return [("Authorization", f"Bearer {secret}")]


class Client:
    """A connection to the gateway that exposes exactly what is received."""

    def __init__(self, address, tls=None, source=None):
        plain = socket.create_connection(address[:2], GUARD, source_address=source and (source, 0))
        if plain.getsockname() == plain.getpeername():
            plain.close()   # Linux may connect a socket to itself if nothing listens on the port
            raise ConnectionRefusedError
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = tls.wrap_socket(plain, server_hostname="localhost") if tls else plain
        self.stream = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def close(self):
        self.stream.close()
        self.socket.close()

    def reset(self):
        """Close the connection with a TCP reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def half_close(self):
        self.socket.shutdown(socket.SHUT_WR)

    def send(self, *pieces):
        """Send each piece separately; the gateway may close the connection meanwhile."""
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                self.socket.sendall(piece)

    def ask(self, *args, **kwargs):
        self.send(request(*args, **kwargs))
        return self.answer(args[0])

    def answer(self, method="GET"):
        """Read one complete response; None if the gateway closed the connection instead."""
        answer = self.head()
        return answer and self.read(answer, method=method)

    def head(self):
        """Read a status line and headers; a repeated header is a failure."""
        line = self.stream.readline()
        if not line:
            return None
        version, status = re.fullmatch(rb"HTTP/(1\.[01]) (\d{3})(?: [^\r\n]*)?\r\n", line).groups()
        headers = {}
        for line in iter(self.stream.readline, b"\r\n"):
            name, value = re.fullmatch(r"([!#$%&'*+.^_`|~\w-]+): ?([^\r\n]*)\r\n", line.decode("latin-1")).groups()
            if name.lower() in headers:
                raise AssertionError(f"repeated header {name}")
            headers[name.lower()] = value
        return Answer(version.decode(), int(status), headers)

    def read(self, answer, until=None, method="GET"):
        """Read the body to its end, or until it contains these bytes."""
        left = 0 if method == "HEAD" else int(answer.headers.get("content-length", -1))
        left -= len(answer.body) if left > 0 else 0
        while answer.ended is None and not (until and until in answer.body):
            try:
                piece = self._chunk(answer) if "transfer-encoding" in answer.headers and left else self._some(answer, left)
            except ConnectionError:
                answer.ended = "cut"
                break
            answer.body += piece
            left -= len(piece) if left > 0 else 0
        return answer

    def _some(self, answer, left):
        piece = self.stream.read1(65536 if left < 0 else min(left, 65536)) if left else b""
        if not piece:
            answer.ended = "cut" if left > 0 else "clean"
        return piece

    def _chunk(self, answer):
        line = self.stream.readline()
        if not line:
            answer.ended = "cut"
            return b""
        size = int(re.fullmatch(rb"([0-9a-fA-F]+)\r\n", line).group(1), 16)
        piece, end = self.stream.read(size), self.stream.readline()
        if len(piece) < size or end != b"\r\n":
            answer.ended = "cut"
        elif not size:
            answer.ended = "clean"
        return piece

    def everything(self):
        """Read responses until the gateway closes the connection."""
        answers = []
        with contextlib.suppress(ConnectionError):
            for answer in iter(self.answer, None):
                answers.append(answer)
        return answers


LEAVING = (("closes", Client.close), ("resets", Client.reset), ("closes its half", Client.half_close))


def chromium_binary():
    """The path of Chromium, None if not installed: the variable CHROMIUM takes precedence over the usual names."""
    return next(filter(None, map(shutil.which, (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"))), None)


class Chromium:
    """A headless Chromium controlled over --remote-debugging-pipe: NUL-terminated JSON messages."""

    FLAGS = ("--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions", "--no-proxy-server")

    def __init__(self, binary):
        self._folder = tempfile.TemporaryDirectory()
        # It reads from descriptor 3 and writes to 4; a shell redirects them, as subprocess cannot.
        self._process = subprocess.Popen(["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 0</dev/null 1>/dev/null', binary, *self.FLAGS,
                                          f"--user-data-dir={self._folder.name}"], start_new_session=True, bufsize=0,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._buffer, self._ids = b"", itertools.count(1)
        self.events = []    # (session, method, params)

    def call(self, method, session=None, **params):
        """Call a DevTools method and return its result, recording the events received meanwhile."""
        number = next(self._ids)
        command = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        self._process.stdin.write(json.dumps(command).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == number:
                if "error" in message:
                    raise AssertionError(f"{method} {params}: {message['error']}")
                return message["result"]
            self.events.append((message.get("sessionId"), message.get("method"), message.get("params")))

    def _message(self):
        while b"\0" not in self._buffer:
            if not select.select([self._process.stdout], [], [], 3 * GUARD)[0]:
                raise AssertionError("Chromium sent no message")
            piece = self._process.stdout.read(65536)
            if not piece:
                raise AssertionError(f"Chromium exited with status {self._process.wait(GUARD)}")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(GUARD)
        self._process.stdin.close()
        self._process.stdout.close()
        eventually(self._cleaned, "Chromium to release its profile folder")

    def _cleaned(self):
        try:    # its processes write to the folder until the last one has exited
            self._folder.cleanup()
        except OSError:
            return False
        return True


class Tab:
    """A browser page with its own storage, and the actions of a user on it."""

    def __init__(self, browser, width=1280, height=900, dark=False):
        self._browser = browser
        self._context = browser.call("Target.createBrowserContext")["browserContextId"]
        target = browser.call("Target.createTarget", url="about:blank", browserContextId=self._context)["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def call(self, method, **params):
        return self._browser.call(method, self._session, **params)

    def close(self):
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)

    def evaluate(self, expression):
        """The value of an expression or of the promise it returns; None if the page was replaced meanwhile."""
        try:
            reply = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True)
        except AssertionError as error:
            if "navigated" in str(error) or "context was destroyed" in str(error):
                return None
            raise
        if "exceptionDetails" in reply:
            raise AssertionError(f"{expression}: {reply['exceptionDetails']}")
        return reply["result"].get("value")

    def visit(self, url):
        self.call("Page.navigate", url=url)
        eventually(lambda: self.evaluate("location.href") == url and self.evaluate("document.readyState") == "complete", f"the page of {url}")

    @contextlib.contextmanager
    def reloading(self):
        """Wait at the end of the with block until the page has been replaced and loaded."""
        self.evaluate("window.old = true")
        yield
        eventually(lambda: self.evaluate("!window.old && document.readyState === 'complete'"), "a new page")

    def text(self, selector="body"):
        """The visible text of an element, "" if it does not exist or is hidden."""
        return self.evaluate(f"(found => found && found.checkVisibility() ? found.innerText : '')(document.querySelector({json.dumps(selector)}))")

    def shows(self, text, selector="body"):
        """Wait until a text is visible."""
        try:
            eventually(lambda: text in self.text(selector), "the text")
        except AssertionError:
            raise AssertionError(f"{text!r} never appeared in {selector}: {self.text(selector)!r}") from None

    def holds(self, text):
        """Whether a text is anywhere in the page, visible or not."""
        return self.evaluate(f"document.documentElement.outerHTML.includes({json.dumps(text)})")

    def press(self, name):
        """Click the button with this name, in the dialog if one is open."""
        eventually(lambda: self.evaluate("""(name => {
            const scope = [...document.querySelectorAll("dialog[open]")].pop() || document;
            const found = [...scope.querySelectorAll("button")].find(button => button.checkVisibility() && !button.matches(':disabled')
                && (button.getAttribute("aria-label") || button.textContent).trim() === name);
            if (found) found.click();
            return Boolean(found);
        })(%s)""" % json.dumps(name)), f"a button {name!r}")

    def type(self, label, text):
        """Replace the content of the field with this label, as if pasted."""
        eventually(lambda: self.evaluate("""(name => {
            const scope = [...document.querySelectorAll("dialog[open]")].pop() || document;
            const field = [...scope.querySelectorAll("input, textarea")].find(field => field.checkVisibility() && !field.matches(":disabled")
                && (field.ariaLabel || field.labels[0].textContent).startsWith(name));
            if (field) field.focus();
            if (field) field.select();
            return Boolean(field) && document.activeElement === field;
        })(%s)""" % json.dumps(label)), f"a field {label!r}")
        self.call("Input.insertText", text=text) if text else self.evaluate("document.execCommand('delete')")

    def complaints(self):
        """Errors, exceptions and policy violations in the console of the page, except HTTP error responses."""
        self.evaluate("0")  # after this call all earlier events have been received
        return [params for session, method, params in self._browser.events if session == self._session and (
            method == "Runtime.exceptionThrown" or method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert")
            or method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning") and params["entry"]["source"] != "network")]

    def asked(self):
        """The URLs that the page requested."""
        return [params["request"]["url"] for session, method, params in self._browser.events
                if session == self._session and method == "Network.requestWillBeSent"]

    def screenshot(self, path):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip={**size, "scale": 1})
        with open(path, "wb") as file:
            file.write(base64.b64decode(shot["data"]))


class Case(unittest.TestCase):
    """A test with its own temporary folder, and cleanup at its end."""

    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.addClassCleanup(LEAKS.check)

    def setUp(self):
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.enter = stack.enter_context
        self.folder = self.enter(tempfile.TemporaryDirectory())
        self.db = self.path("tokens.db")

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, content):
        with open(self.path(name), "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        return self.path(name)

    def read(self, name):
        with open(self.path(name), "rb") as file:
            return file.read()

    def hold(self):
        """An Event for a piece to wait for; it is set when the test ends, if not before."""
        event = threading.Event()
        self.enter(contextlib.ExitStack()).callback(event.set)
        return event

    def open_store(self, path=None, create=True):
        return self.enter(contextlib.closing(gateway.TokenStore(path or self.db, create=create)))

    def find(self, *secrets, db=None):
        """Look up the tokens of these secrets as a newly started server would; None for an unknown secret."""
        with contextlib.closing(gateway.TokenStore(db or self.db)) as store, contextlib.closing(gateway.TokenCache(store)) as cache:
            return [cache.lookup(secret) for secret in secrets]

    def bytes_of_all_files(self):
        return b"".join(self.read(name) for name in sorted(os.listdir(self.folder)) if os.path.isfile(self.path(name)))


def run_alone(*argv, **how):
    """Run a command in a separate process and wait for its end."""
    return subprocess.run([sys.executable, GATEWAY, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=3 * GUARD, **how)


class CommandCase(Case):
    """Runs commands in the test process."""

    def run_command(self, *argv, stdin=""):
        if "--db" not in argv and "--env-file" not in argv:
            argv = ("--db", self.db, *argv)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), unittest.mock.patch("sys.stdin", io.StringIO(stdin)):
            try:
                status = gateway.main(list(argv))
            except SystemExit as exit_:   # raised by argparse
                status = exit_.code or 0
        return status, out.getvalue(), err.getvalue()

    def succeeds(self, *argv, stdin=""):
        """Run a command that must succeed, and return its output."""
        status, out, err = self.run_command(*argv, stdin=stdin)
        self.assertEqual((status, err), (0, ""), f"{argv}\n{out}")
        return out

    def fails(self, *argv, status=1, stdin=""):
        """Run a command that must fail, and return its error message."""
        got, out, err = self.run_command(*argv, stdin=stdin)
        self.assertEqual((got, out), (status, ""), f"{argv}\n{err}")
        self.assertNotIn("Traceback", err)
        self.assertTrue(err.strip(), f"{argv} failed without an error message")
        if status == 1:
            self.assertEqual(len(err.splitlines()), 1, f"{argv}: the error message must be one line\n{err}")
        return err

    def create(self, user="ada", name="laptop", *flags):
        return self.succeeds("token", "create", user, name, "--quiet", *flags).strip()

    def tokens(self, *flags):
        return json.loads(self.succeeds("token", "list", "--json", *flags))


class GatewayCase(Case):
    """A gateway in front of a fake Ollama, with a user token and an admin token."""

    flags = {}
    tls = None          # the SSLContext of the clients, if the gateway uses TLS

    def setUp(self):
        super().setUp()
        self.fake = self.enter(running(FakeOllama()))
        self.store = self.open_store()
        self.token = self.store.create("ada", "laptop")[1]
        self.admin = self.store.create("root", "box", admin=True)[1]
        self.lines = []
        self.server = self.serve(**self.flags)

    def serve(self, **flags):
        """Start a gateway in front of the fake Ollama; flags have the form of the command line."""
        return self.enter(self.serving(**flags))

    def serving(self, **flags):
        settings = gateway.load_settings({"ollama_url": self.fake.url, "db": self.db, "host": "127.0.0.1", "port": "0", **flags}, {})
        return running(gateway.build_server(settings, self.store, log=lambda lines: self.lines.extend(lines.split("\n"))))

    def client(self, server=None):
        return self.enter(Client((server or self.server).server_address, self.tls))

    def ask(self, method, path, body=None, headers=(), token=None, server=None, version="1.1"):
        """Send one request on a new connection, by default with ada's token; a token of "" means no credentials."""
        credentials = bearer(token or self.token) if token != "" else []
        with Client((server or self.server).server_address, self.tls) as client:
            return client.ask(method, path, body, [*credentials, *headers], version)

    def begin(self, method, path, body=None, token=None, server=None, headers=()):
        """Send a request and return the client, without reading the response."""
        client = self.client(server)
        client.send(request(method, path, body, [*bearer(token or self.token), *headers]))
        return client

    def probe_health(self, server=None):
        """Start the health probe as `serve` does, and wait for its first result."""
        first = threading.Event()
        (server or self.server).gateway.health.start(first.set)
        self.assertTrue(first.wait(GUARD), "the health probe has no result")

    def health(self, server=None):
        return self.ask("GET", "/health", token="", server=server).json()["upstream"]

    def seen(self):
        return [(seen.method, seen.path) for seen in self.fake.received]

    def upstream(self):
        """The only request that reached the fake Ollama, with its headers as a dict in lower case."""
        self.assertEqual(len(self.fake.received), 1, self.seen())
        seen = self.fake.received[0]
        self.assertEqual(len(seen.headers), len({name.lower() for name, value in seen.headers}), "a header was forwarded twice")
        return seen._replace(headers={name.lower(): value for name, value in seen.headers})

    def logged(self, predicate=lambda fields: True):
        """Wait for a request's log line whose fields satisfy the predicate, and return the fields."""
        return eventually(lambda: next((fields for fields in map(log_fields, list(self.lines)) if "status" in fields and predicate(fields)), None),
                          "a log line")

    def assertStatus(self, answer, status):
        self.assertEqual(answer and answer.status, status, f"\n{answer}\nupstream saw {self.seen()}\nlog {self.lines}")

    def assertRefused(self, answer, status, path="/api/chat"):
        """Check status, error format and request ID of a refusal, and return its message."""
        self.assertStatus(answer, status)
        self.assertIn("x-request-id", answer.headers)
        self.assertTrue(answer.headers["content-type"].startswith("application/json"), answer)
        text = refusal_text(path, answer.json())
        self.assertTrue(text and isinstance(text, str), answer)
        return text


def certificate(folder, name):
    """Create a self-signed certificate for localhost, and its key."""
    cert, key = os.path.join(folder, name + ".pem"), os.path.join(folder, name + ".key")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                    "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", cert],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return cert, key


@unittest.skipUnless(shutil.which("openssl"), "needs the openssl command to make a certificate")
class OverTls:
    """Mixin that runs the tests of a GatewayCase over TLS."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, folder)
        cls.cert, cls.key = certificate(folder, "localhost")
        cls.tls = ssl.create_default_context(cafile=cls.cert)

    def serving(self, **flags):
        return super().serving(**{"tls_cert": self.cert, "tls_key": self.key, **flags})

    def plain_client(self, server=None):
        """Connect without a TLS handshake."""
        return self.enter(Client((server or self.server).server_address))


ON_A_TERMINAL = f"""import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.path.insert(0, {HERE!r})
import ollama_gateway
print("ended with", ollama_gateway.main(sys.argv[1:]), flush=True)
os.read(0, 1)
"""
SIGNALLED_IN_A_CALLBACK = ON_A_TERMINAL.replace("import ollama_gateway\n", """import time, weakref, ollama_gateway

class Referent: pass
def signal_and_stay(_):
    os.kill(os.getpid(), 15)
    while time.monotonic() < end: pass
def can_show(text):
    global end
    end, referent = time.monotonic() + 3 * ollama_gateway.SIGNAL_SECONDS, Referent()
    reference = weakref.ref(referent, signal_and_stay)
    del referent
    return plain(text)
plain, ollama_gateway.can_show = ollama_gateway.can_show, can_show
""")
AS_A_JOB = f"""import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.path.insert(0, {HERE!r})
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
job = os.fork()
if not job:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    import ollama_gateway
    os._exit(ollama_gateway.main(sys.argv[1:]))
while os.WIFSTOPPED(os.waitpid(job, os.WUNTRACED)[1]):
    print("stopped in", "normal" if termios.tcgetattr(0)[3] & termios.ICANON else "raw", "mode", flush=True)
    os.kill(job, signal.SIGCONT)
print("ended with 0", flush=True)
os.read(0, 1)
"""
UP, DOWN, LEFT = "\x1b[A", "\x1b[B", "\x1b[D"
MAIN_MENU = "Ollama Gateway ("


class Terminal:
    """A command on its own pseudo-terminal, which stays open for inspection until it is closed."""

    def __init__(self, *argv, columns=80, rows=24, script=ON_A_TERMINAL, **environ):
        self.master, slave = pty.openpty()
        self.resize(columns, rows)
        self.before, self.raw, self.at = termios.tcgetattr(self.master), b"", 0
        environ = dict({name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")},
                       **{"TERM": "xterm", "PYTHONIOENCODING": "utf-8", **environ})
        self.process = subprocess.Popen([sys.executable, "-c", script, *argv], stdin=slave, stdout=slave, stderr=slave,
                                        start_new_session=True, env=environ)
        os.close(slave)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(GUARD)
        os.close(self.master)

    def resize(self, columns, rows):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, *keys):
        for key in keys:
            os.write(self.master, key if isinstance(key, bytes) else key.encode())

    @property
    def text(self):
        """All output so far without escape sequences, with a form feed where lines were erased."""
        text = re.sub(rb"\x1b(\[[0-9;?]*)?\Z", b"", self.raw).decode("utf-8", "ignore").replace("\r\n", "\n").replace("\x1b[J", "\f")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text)

    def shows(self, text):
        """Wait until a text is shown after the previously awaited ones, and return the output up to its end."""
        deadline = time.monotonic() + GUARD
        while text not in self.text[self.at:]:
            ready = select.select([self.master], (), (), max(deadline - time.monotonic(), 0))[0]
            assert ready, f"{text!r} was not shown, but:\n{self.text[self.at:]}"
            try:
                self.raw += os.read(self.master, 65536)
            except OSError:
                raise AssertionError(f"{text!r} was not shown before the end, but:\n{self.text[self.at:]}") from None
        start, self.at = self.at, self.text.index(text, self.at) + len(text)
        return self.text[start:self.at]

    def frames(self):
        """The frames drawn so far, in order."""
        return self.text.split("\f")

    def ends(self):
        """Wait for the command to end; return its exit status and whether terminal mode and cursor are restored."""
        self.shows("ended with ")
        status = int(self.shows("\n"))
        shown = [match for match in re.findall(rb"\x1b\[\?25([lh])", self.raw)]
        return status, termios.tcgetattr(self.master) == self.before and shown[-1:] in ([], [b"h"])


class Serving:
    """A gateway in a separate process, with its log output."""

    def __init__(self, folder, *argv, preexec=None, **env):
        self.process = subprocess.Popen([sys.executable, "-X", "dev", GATEWAY, "serve", *argv], cwd=folder, env={**os.environ, **env},
                                        preexec_fn=preexec, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.lines = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.decode().rstrip("\r\n"))

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.process.kill()
        self.process.wait(GUARD)
        self._reader.join(GUARD)
        self.process.stdout.close()
        self.process.stderr.close()

    @property
    def first_line(self):
        return eventually(lambda: self.lines or self.process.poll() is not None, "the first line") and self.lines[0]

    @property
    def server_address(self):
        host, port = re.search(r"listening on https?://(127\.0\.0\.\d):(\d+)", self.first_line).groups()
        return host, int(port)

    def stop(self, signal_number=signal.SIGTERM):
        self.process.send_signal(signal_number)
        return self.wait()

    def wait(self):
        self.process.wait(GUARD)
        self._reader.join(GUARD)
        return self.process.returncode

# == Settings =================================================================


def refusal_text(path, value):
    """Extract the message of a refusal, which must have exactly the error format of the route's API dialect."""
    if path == "/v1/messages":
        assert set(value) == {"type", "error"} and value["type"] == "error" and set(value["error"]) == {"type", "message"}, value
        return value["error"]["message"]
    if path.startswith("/v1/"):
        assert set(value) == {"error"} and set(value["error"]) == {"message", "type", "param", "code"}, value
        return value["error"]["message"]
    assert set(value) == {"error"}, value
    return value["error"]


def log_fields(line):
    """Parse a logfmt line."""
    return {name: json.loads(value) if value.startswith('"') else value
            for name, value in re.findall(r'([\w.]+)=("(?:[^"\\]|\\.)*"|\S*)', line)}


def found(store, secret):
    """The token that a server would find for a secret."""
    with contextlib.closing(gateway.TokenCache(store)) as cache:
        return cache.lookup(secret)


def ipv6_loopback():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


LEGACY_VARIABLES = {"--ollama-url": "OLLAMA_BASE_URL", "--base-path": "BASE_PATH", "--db": "TOKEN_DB_PATH",
                    "--log-level": "LOG_LEVEL", "--log-file-level": "LOG_FILE_LEVEL"}
VALUES = {   # option -> its default and two other, different values
    "ollama_url": ("http://localhost:11434", "http://127.0.0.1:1", "https://[::1]:2/prefix"),
    "base_path": ("/api", "/ollama", "/a/b"),
    "db": ("tokens.db", "one.db", "/two.db"),
    "log_level": ("INFO", "DEBUG", "ERROR"),
    "log_file_level": ("INFO", "DEBUG", "ERROR"),
    "log_file": (None, "one.log", "two.log"),
    "host": ("127.0.0.1", "127.0.0.2", "::1"),
    "port": ("8000", "0", "65535"),
    "tls_cert": (None, "one.pem", "two.pem"),
    "tls_key": (None, "one.pem", "two.pem"),
    "cors_origins": (None, "*", "https://a.example, http://localhost:3000"),
    "path_tokens": (None, "1", None),
    "connect_timeout": ("5s", "6s", "1m"),
    "first_byte_timeout": ("600s", "15m", "12h"),
    "stall_timeout": ("300s", "90s", "1h"),
    "max_connections": ("1024", "1", "20000"),
    "max_body": ("100MiB", "4096", "2 GB"),
    "max_spool": ("2GiB", "1M", "50 GB"),
    "header_timeout": ("15s", "5", "1m"),
    "idle_timeout": ("75s", "5", "1m"),
    "drain_timeout": ("30s", "5", "1m"),
    "trusted_proxies": (None, "127.0.0.1", "10.0.0.0/8, ::1"),
    "max_parallel": ("0", "1", "64"),
    "max_queue": ("128", "1", "1000"),
    "queue_timeout": ("60s", "5", "1h"),
    "metrics_open": (None, "1", None),
    "no_admin_api": (None, "1", None),
}
BAD_VALUES = (
    ("ollama_url", "ftp://localhost", "localhost:11434", "http://", "http://host:99999", "http://host:x", "http://a b"),
    ("base_path", "/v1", "v1/x", "t", "/docs", "/openapi.json", "/admin/", "/health", "me", "/metrics/x", "/a b", "/a?b", "/../x"),
    ("port", "-1", "65536", "http", "80.5"),
    ("log_level", "LOUD"),
    ("log_file_level", "LOUD"),
    ("cors_origins", "example.com", "https://a.example/path"),
    ("path_tokens", "perhaps"),
    ("connect_timeout", "soon", "0s", "-1s"),
    ("first_byte_timeout", "5 parsecs"),
    ("stall_timeout", "1y"),
    ("max_connections", "0", "-1", "many", "1.5"),
    ("max_body", "0", "big", "1XB", "-1"),
    ("max_spool", "0", "big"),
    ("header_timeout", "0"),
    ("idle_timeout", "soon"),
    ("drain_timeout", "-3s"),
    ("trusted_proxies", "localhost", "10.0.0.0/33", "10.0.0.1/8"),
    ("max_parallel", "-1", "all", "1.5"),
    ("max_queue", "0", "-1", "all"),
    ("queue_timeout", "0", "soon"),
    ("metrics_open", "perhaps"),
    ("no_admin_api", "perhaps"),
)
REQUIRED_OPTIONS = {"tls_key": {"tls_cert": "cert.pem"}}   # options that another option requires


class Settings(Case):

    def load(self, flags=(), environ=(), env=None):
        return gateway.load_settings(dict(flags), dict(environ), self.write("settings.env", env or b""))

    def value(self, name, **sources):
        return getattr(self.load(**sources), name)

    def test_options_are_exactly_the_documented_ones(self):
        self.assertEqual({option.flag for option in gateway.OPTIONS}, {flag(name) for name in VALUES})

    def test_environment_variables_are_named_after_flags_except_five_legacy_names(self):
        for option in gateway.OPTIONS:
            usual = "GATEWAY_" + option.flag[2:].upper().replace("-", "_")
            self.assertEqual(option.variable, LEGACY_VARIABLES.get(option.flag, usual))

    def test_defaults_are_the_documented_ones(self):
        for name, (default, *others) in VALUES.items():
            with self.subTest(name):
                if default is None:
                    self.assertFalse(self.value(name))
                else:
                    self.assertEqual(self.value(name), self.value(name, flags={name: default}))

    def test_precedence_is_flag_environment_file_default(self):
        for name, (default, one, two) in VALUES.items():
            variable, required = variable_of(name), REQUIRED_OPTIONS.get(name, {})
            want_one, want_two = (self.value(name, flags={name: value, **required}) for value in (one, two or one))
            with self.subTest(name):
                self.assertEqual(self.value(name, flags=required, env=f"{variable}={one}"), want_one)
                self.assertEqual(self.value(name, flags=required, env=f"{variable}={one}", environ={variable: two or one}), want_two)
                self.assertEqual(self.value(name, flags={name: one, **required}, environ={variable: two or one}), want_one)
                self.assertNotEqual(want_one, self.value(name))

    def test_invalid_value_error_names_the_setting_the_value_and_its_source(self):
        for name, *values in BAD_VALUES:
            for value in values:
                with self.subTest(name, value=value):
                    self.assert_usage_error([flag(name), value], flags={name: value})
                    self.assert_usage_error([variable_of(name), value], environ={variable_of(name): value})
                    self.assert_usage_error([variable_of(name), value, "settings.env"], env=f'{variable_of(name)}="{value}"')

    def assert_usage_error(self, expected, **sources):
        with self.assertRaises(gateway.UsageError) as caught:
            self.load(**sources)
        for text in expected:
            self.assertIn(text, str(caught.exception))

    def test_env_file_syntax_variants_are_accepted(self):
        for label, content in (
            ("plain", b"TOKEN_DB_PATH=x.db"),
            ("exported", b"export TOKEN_DB_PATH=x.db\n"),
            ("in double quotes", b'TOKEN_DB_PATH="x.db"\n'),
            ("in single quotes", b"TOKEN_DB_PATH='x.db'\n"),
            ("spaced", b"  TOKEN_DB_PATH = x.db  \n"),
            ("below comments and blank lines", b"# a comment\n\n   # another\nTOKEN_DB_PATH=x.db\n"),
            ("before a comment", b"TOKEN_DB_PATH=x.db # the tokens\n"),
            ("quoted before a comment", b"TOKEN_DB_PATH=\"x.db\"   # the tokens\n"),
            ("with Windows' line ends", b"LOG_LEVEL=INFO\r\nTOKEN_DB_PATH=x.db\r\n"),
            ("with a byte order mark", b"\xef\xbb\xbfTOKEN_DB_PATH=x.db\n"),
            ("among unknown names", b"CLI_API_KEY_ADA=s3cret\nNO_SUCH=1\nTOKEN_DB_PATH=x.db\nnot a line\n"),
        ):
            with self.subTest(label):
                self.assertEqual(self.value("db", env=content), "x.db")

    def test_env_file_hash_inside_quotes_or_word_is_not_a_comment(self):
        for content, value in ((b"TOKEN_DB_PATH='x #1.db'", "x #1.db"), (b'TOKEN_DB_PATH="x #1.db" # no', "x #1.db"),
                               (b"TOKEN_DB_PATH=x#1.db", "x#1.db")):
            with self.subTest(content):
                self.assertEqual(self.value("db", env=content), value)

    def test_env_file_of_the_predecessor_works_unchanged(self):
        settings = self.load(env='OLLAMA_BASE_URL="http://localhost:11434"\nBASE_PATH="/ollama"\nTOKEN_DB_PATH="old.db"\n'
                                 'LOG_LEVEL="WARNING"\nLOG_FILE_LEVEL="DEBUG"\nCLI_API_KEY_ADA="s3cret"\n')
        same = self.load(flags={"base_path": "ollama", "db": "old.db", "log_level": "WARNING", "log_file_level": "DEBUG"})
        del settings.given, same.given      # where each value came from differs
        self.assertEqual(settings, same)
        self.assertEqual(os.path.basename(settings.log_file), "app.log")

    def test_env_file_in_the_working_directory_is_read_by_default(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        self.write(".env", "TOKEN_DB_PATH=here.db")
        self.assertEqual(gateway.load_settings({}, {}).db, "here.db")

    def test_base_path_leading_and_trailing_slashes_are_ignored(self):
        for path in ("ollama", "/ollama", "ollama/", "/ollama/"):
            with self.subTest(path):
                self.assertEqual(self.value("base_path", flags={"base_path": path}), self.value("base_path", flags={"base_path": "/ollama"}))

    def test_tls_key_without_certificate_is_rejected(self):
        with self.assertRaises(gateway.UsageError):
            self.load(flags={"tls_key": "key.pem"})

# == HTTP =====================================================================

GOOD_HEAD = b"Host: gateway.test\r\nAuthorization: Bearer %(token)s\r\n"


def head(line=b"GET /api/tags HTTP/1.1", *fields):
    """A request head whose lines may be malformed."""
    return line + b"\r\n" + GOOD_HEAD + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def post(*fields, body=b"{}"):
    return head(b"POST /api/chat HTTP/1.1", *fields) + body


def post_chunks(body, *fields):
    return post(b"Transfer-Encoding: chunked", *fields, body=body)


BAD_REQUEST_LINES = (   # label, request line, allowed statuses
    ("two spaces", b"GET  /api/tags HTTP/1.1", 400),
    ("two spaces before the version", b"GET /api/tags  HTTP/1.1", 400),
    ("a space at the start", b" GET /api/tags HTTP/1.1", 400),
    ("a space at the end", b"GET /api/tags HTTP/1.1 ", 400),
    ("four parts", b"GET /api/tags x HTTP/1.1", 400),
    ("a tab between", b"GET\t/api/tags\tHTTP/1.1", 400),
    ("no version", b"GET /api/tags", 400),
    ("one word", b"GET", 400),
    ("no method", b"/api/tags HTTP/1.1", 400),
    ("a method that is not a token", b"GE(T /api/tags HTTP/1.1", 400),
    ("a method with a NUL", b"GET\0 /api/tags HTTP/1.1", 400),
    ("a method beyond ASCII", b"G\xc9T /api/tags HTTP/1.1", 400),
    ("a target without a leading slash", b"GET api/tags HTTP/1.1", 400),
    ("a star", b"GET * HTTP/1.1", 400),
    ("an absolute URL with another host", b"GET http://other.test/api/tags HTTP/1.1", 400),
    ("an absolute URL with another scheme", b"GET ftp://gateway.test/api/tags HTTP/1.1", 400),
    ("an absolute URL with user information", b"GET http://a@gateway.test/api/tags HTTP/1.1", 400),
    ("the CONNECT method", b"CONNECT gateway.test:443 HTTP/1.1", (400, 405)),
    ("a NUL in the target", b"GET /api/tags\0 HTTP/1.1", (400, 404)),
    ("a control character in the target", b"GET /api/tags\x01 HTTP/1.1", (400, 404)),
    ("a DEL in the target", b"GET /api/tags\x7f HTTP/1.1", (400, 404)),
    ("a target beyond ASCII", b"GET /api/t\xe4gs HTTP/1.1", (400, 404)),
    ("a bare CR in the target", b"GET /api/tags\rx HTTP/1.1", 400),
    ("version 2.0", b"GET /api/tags HTTP/2.0", 505),
    ("version 1.2", b"GET /api/tags HTTP/1.2", 505),
    ("version 0.9", b"GET /api/tags HTTP/0.9", 505),
    ("a version of three digits", b"GET /api/tags HTTP/1.10", (400, 505)),
    ("a version in lower case", b"GET /api/tags http/1.1", (400, 505)),
    ("a version with a sign", b"GET /api/tags HTTP/+1.1", (400, 505)),
    ("another protocol", b"GET /api/tags RTSP/1.0", (400, 505)),
)
BAD_FIELDS = (   # label, header lines, allowed statuses
    ("no colon", [b"nonsense"], 400),
    ("no colon, and a length after it", [b"nonsense", b"Content-Length: 5"], 400),
    ("no name", [b": x"], 400),
    ("a space before the colon", [b"X-A : x"], 400),
    ("a tab before the colon", [b"X-A\t: x"], 400),
    ("a space in the name", [b"X A: x"], 400),
    ("a name that is not a token", [b"X@A: x"], 400),
    ("a name beyond ASCII", [b"X-\xc4: x"], 400),
    ("a NUL in the name", [b"X\0A: x"], 400),
    ("a folded line", [b"X-A: x", b" y"], 400),
    ("a line folded with a tab", [b"X-A: x", b"\ty"], 400),
    ("a line of blanks", [b"X-A: x", b"  "], 400),
    ("a NUL in a value", [b"X-A: x\0y"], 400),
    ("a control character in a value", [b"X-A: x\x01y"], 400),
    ("a DEL in a value", [b"X-A: x\x7fy"], 400),
    ("a bare CR in a value", [b"X-A: x\ry"], 400),
    ("a bare CR that would make a header", [b"X-A: x\rContent-Length: 5"], 400),
    ("a bare LF in a value", [b"X-A: x\ny: z"], 400),
    ("a CR before the line's end", [b"X-A: x\r"], 400),
    ("two hosts", [b"Host: gateway.test"], 400),
    ("a length with a sign", [b"Content-Length: +0"], 400),
    ("a negative length", [b"Content-Length: -1"], 400),
    ("a length in words", [b"Content-Length: two"], 400),
    ("a hexadecimal length", [b"Content-Length: 0x2"], 400),
    ("a length with an underscore", [b"Content-Length: 1_0"], 400),
    ("a length in non-ASCII digits", [b"Content-Length: \xd9\xa2"], 400),
    ("a length with a space in it", [b"Content-Length: 0 0"], 400),
    ("a list of lengths", [b"Content-Length: 0, 0"], 400),
    ("an empty length", [b"Content-Length:"], 400),
    ("an absurd length", [b"Content-Length: " + b"9" * 400], (400, 413)),
    ("two lengths", [b"Content-Length: 0", b"Content-Length: 0"], 400),
    ("two lengths that differ", [b"Content-Length: 0", b"Content-Length: 2"], 400),
    ("Content-Length and Transfer-Encoding", [b"Content-Length: 5", b"Transfer-Encoding: chunked"], 400),
    ("Transfer-Encoding and Content-Length", [b"Transfer-Encoding: chunked", b"Content-Length: 5"], 400),
    ("an unsupported transfer coding", [b"Transfer-Encoding: gzip"], 501),
    ("an unsupported transfer coding, then chunked", [b"Transfer-Encoding: gzip, chunked"], 501),
    ("chunked, then an unsupported transfer coding", [b"Transfer-Encoding: chunked, gzip"], (400, 501)),
    ("chunked twice", [b"Transfer-Encoding: chunked, chunked"], (400, 501)),
    ("Transfer-Encoding twice", [b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"], (400, 501)),
    ("Transfer-Encoding twice, differing", [b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked"], (400, 501)),
    ("chunked with a parameter", [b"Transfer-Encoding: chunked;q=1"], (400, 501)),
    ("chunked with a leading x", [b"Transfer-Encoding: xchunked"], (400, 501)),
    ("chunked after a vertical tab", [b"Transfer-Encoding: \x0bchunked"], 400),
    ("chunked in quotes", [b'Transfer-Encoding: "chunked"'], (400, 501)),
    ("an empty transfer coding", [b"Transfer-Encoding:"], (400, 501)),
    ("identity", [b"Transfer-Encoding: identity"], (400, 501)),
)
BAD_HEADS = (   # label, the whole head, allowed statuses
    ("no host", b"GET /api/tags HTTP/1.1\r\nAuthorization: Bearer %(token)s\r\n\r\n", 400),
    ("a host with a space", b"GET /api/tags HTTP/1.1\r\nHost: a b\r\nAuthorization: Bearer %(token)s\r\n\r\n", 400),
    ("a host with a path", b"GET /api/tags HTTP/1.1\r\nHost: a/b\r\nAuthorization: Bearer %(token)s\r\n\r\n", 400),
    ("a host with user information", b"GET /api/tags HTTP/1.1\r\nHost: a@b\r\nAuthorization: Bearer %(token)s\r\n\r\n", 400),
    ("bare LF after the request line", b"GET /api/tags HTTP/1.1\n" + GOOD_HEAD + b"\r\n", 400),
    ("bare LF after a header", b"GET /api/tags HTTP/1.1\r\nX-A: x\n" + GOOD_HEAD + b"\r\n", 400),
    ("bare LF at the end", b"GET /api/tags HTTP/1.1\r\n" + GOOD_HEAD + b"\n", 400),
    ("bare LF throughout", (b"GET /api/tags HTTP/1.1\r\n" + GOOD_HEAD + b"\r\n").replace(b"\r\n", b"\n"), 400),
    ("a first header that is folded", b"GET /api/tags HTTP/1.1\r\n X-A: x\r\n" + GOOD_HEAD + b"\r\n", 400),
    ("chunks in HTTP/1.0", b"POST /api/chat HTTP/1.0\r\n" + GOOD_HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 400),
    ("two hosts in HTTP/1.0", b"GET /api/tags HTTP/1.0\r\n" + GOOD_HEAD + b"Host: b\r\n\r\n", 400),
    ("a TLS ClientHello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    ("the HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, 405, 505)),
)
BAD_CHUNKS = (   # label, body
    ("a size that is not hexadecimal", b"g\r\n{}\r\n0\r\n\r\n"),
    ("no size", b"\r\n{}\r\n0\r\n\r\n"),
    ("a size with a sign", b"+2\r\n{}\r\n0\r\n\r\n"),
    ("a negative size", b"-2\r\n{}\r\n0\r\n\r\n"),
    ("a size with 0x", b"0x2\r\n{}\r\n0\r\n\r\n"),
    ("a size with an underscore", b"0_2\r\n{}\r\n0\r\n\r\n"),
    ("a space before the size", b" 2\r\n{}\r\n0\r\n\r\n"),
    ("a space after the size", b"2 \r\n{}\r\n0\r\n\r\n"),
    ("an excessive size", b"f" * 40 + b"\r\n{}\r\n0\r\n\r\n"),
    ("a size in non-ASCII digits", b"\xd9\xa2\r\n{}\r\n0\r\n\r\n"),
    ("bare LF after the size", b"2\n{}\r\n0\r\n\r\n"),
    ("bare CR after the size", b"2\r{}\r\n0\r\n\r\n"),
    ("no CRLF after the data", b"2\r\n{}0\r\n\r\n"),
    ("bare LF after the data", b"2\r\n{}\n0\r\n\r\n"),
    ("more data than the chunk size", b"2\r\n{}x\r\n0\r\n\r\n"),
    ("bare LF at the end", b"2\r\n{}\r\n0\r\n\n\r\n"),
    ("a trailer without a colon", b"2\r\n{}\r\n0\r\nnonsense\r\n\r\n"),
    ("a folded trailer", b"2\r\n{}\r\n0\r\nX-A: x\r\n y\r\n\r\n"),
    *((f"{name} in the trailer", b"2\r\n{}\r\n0\r\n%s: 5\r\n\r\n" % name.encode())
      for name in ("Content-Length", "Transfer-Encoding", "Host", "Authorization", "X-Api-Key", "Content-Type", "Content-Encoding", "Trailer",
                   "Connection")),
)
GOOD_REQUESTS = (   # label, request, number of body bytes forwarded
    ("a simple GET", head(), 0),
    ("no blank before the value", head(b"GET /api/tags HTTP/1.1", b"X-A:x"), 0),
    ("blanks and tabs around the value", head(b"GET /api/tags HTTP/1.1", b"X-A: \t x\ty \t"), 0),
    ("an empty value", head(b"GET /api/tags HTTP/1.1", b"X-A:"), 0),
    ("a name with all permitted special characters", head(b"GET /api/tags HTTP/1.1", b"!#$%%&'*+-.^_`|~9: x"), 0),
    ("a repeated header", head(b"GET /api/tags HTTP/1.1", b"X-A: x", b"X-A: y"), 0),
    ("an absolute URL with the host of the gateway", head(b"GET http://gateway.test/api/tags HTTP/1.1"), 0),
    ("a body of length zero", post(b"Content-Length: 0", body=b""), 0),
    ("a body", post(b"Content-Length: 2"), 2),
    ("a length with leading zeros", post(b"Content-Length: 002"), 2),
    ("chunks", post_chunks(b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"), 2),
    ("chunk sizes in either case, with zeros", post_chunks(b'00A\r\n{"a":"6789\r\n00b\r\n012345678"}\r\n000\r\n\r\n'), 21),
    ("only the last chunk", post_chunks(b"0\r\n\r\n"), 0),
    ("a permitted trailer", post_chunks(b"2\r\n{}\r\n0\r\nX-Checksum: 1\r\n\r\n"), 2),
)
NEXT = b"GET /api/version HTTP/1.1\r\nHost: gateway.test\r\nAuthorization: Bearer %(token)s\r\nX-Request-Id: smuggled\r\nConnection: close\r\n\r\n"


class RequestFraming(GatewayCase):

    def feed(self, raw, expected):
        """Send a request whole, byte by byte, and followed by another one; call `expected` for each."""
        raw = self.filled(raw)
        for how, pieces in (("whole", [raw]), ("byte by byte", [raw[at:at + 1] for at in range(len(raw))]),
                            ("with one behind it", [raw + self.filled(NEXT)])):
            with self.subTest(fed=how), Client(self.server.server_address) as client:
                self.fake.received.clear()
                client.send(*pieces)
                expected(client, "behind" in how)

    def filled(self, raw):
        return raw.replace(b"%(token)s", self.token.encode()).replace(b"%%", b"%")

    def assert_refused(self, raw, statuses):
        def expected(client, behind):
            answers = client.everything()
            self.assertEqual(len(answers), 1, f"expected exactly one response: {answers}")
            self.assertIn(answers[0].status, statuses if isinstance(statuses, tuple) else (statuses,), answers)
            self.assertEqual((answers[0].ended, self.fake.received, self.fake.broken), ("clean", [], []), "nothing may be forwarded")
        self.feed(raw, expected)

    def test_malformed_request_lines_are_rejected(self):
        for label, line, statuses in BAD_REQUEST_LINES:
            with self.subTest(case=label):
                self.assert_refused(head(line), statuses)

    def test_malformed_header_fields_and_framing_are_rejected(self):
        for label, fields, statuses in BAD_FIELDS:
            with self.subTest(case=label):
                self.assert_refused(post(*fields, body=b""), statuses)

    def test_malformed_request_heads_are_rejected(self):
        for label, raw, statuses in BAD_HEADS:
            with self.subTest(case=label):
                self.assert_refused(raw, statuses)

    def test_malformed_chunks_are_rejected(self):
        for label, body in BAD_CHUNKS:
            with self.subTest(case=label):
                self.assert_refused(post_chunks(body), 400)

    def test_well_formed_requests_are_served(self):
        for label, raw, length in GOOD_REQUESTS:
            with self.subTest(case=label):
                def expected(client, behind, length=length):
                    self.assertStatus(client.answer(), 200)
                    if behind:
                        self.assertEqual(client.answer().headers["x-request-id"], "smuggled")
                    self.assertEqual(len(self.fake.received[0].body), length)
                self.feed(raw, expected)

    def test_truncated_body_is_rejected_and_not_forwarded(self):
        for label, raw in (("a length", post(b"Content-Length: 10")), ("within a chunk", post_chunks(b"a\r\n{}")),
                           ("between two chunks", post_chunks(b"2\r\n{}\r\n")),
                           ("within a size", post_chunks(b"2\r\n{}\r\n1")), ("before the last line's end", post_chunks(b"2\r\n{}\r\n0\r\n"))):
            with self.subTest(case=label), Client(self.server.server_address) as client:
                client.send(self.filled(raw))
                client.half_close()
                self.assertLessEqual({answer.status for answer in client.everything()}, {400})
        self.assertEqual((self.fake.received, self.fake.broken), ([], []))

    def test_blob_with_malformed_chunk_is_never_completed_upstream(self):
        self.store.update("ada", "laptop", admin=True)
        for label, bad in BAD_CHUNKS[:12]:
            with self.subTest(case=label), Client(self.server.server_address) as client:
                self.fake.broken.clear()
                self.fake.arrived = 0
                client.send(self.filled(head(b"POST /api/blobs/%s HTTP/1.1" % DIGEST.encode(), b"Transfer-Encoding: chunked")), b"3\r\nabc\r\n")
                eventually(lambda: self.fake.arrived == 3, "the arrival of the valid chunk")
                client.send(bad)
                self.assertEqual([answer.status for answer in client.everything()], [400])
                eventually(lambda: self.fake.broken, "the fake Ollama to see the broken body")
        self.assertEqual(self.fake.received, [])

    def test_refusal_is_readable_by_a_client_that_is_still_sending_its_body(self):
        for label, token, path, status in (("no token", "", "/api/chat", 401), ("no such route", self.token, "/api/nonsense", 404),
                                           ("no right", self.token, "/api/create", 403)):
            with self.subTest(case=label), Client(self.server.server_address) as client:
                client.socket.sendall(request("POST", path, b"x" * 8_000_000, bearer(token)))   # must not fail with a reset
                self.assertEqual([answer.status for answer in client.everything()], [status])

    def test_refusal_with_unread_body_closes_the_connection(self):
        client = self.client()
        client.send(request("POST", "/api/chat", CHAT) + self.filled(NEXT))
        answer, = client.everything()
        self.assertEqual((answer.status, answer.headers["connection"]), (401, "close"))

    def test_head_received_byte_by_byte_is_served(self):
        dribble = threading.Event()
        for _ in range(2):
            client = self.client()
            for byte in self.filled(head(b"GET /api/tags HTTP/1.1", b"X-A: x", b"X-B: y")):
                client.send(bytes([byte]))
                dribble.wait(0.0005)   # not required for the result: makes separate arrival of the pieces likely
            self.assertStatus(client.answer(), 200)

    def test_header_fields_of_a_cached_head_are_read_only(self):
        request = gateway.parse_cached_request(b"GET / HTTP/1.1\r\nHost: a\r\n")
        self.assertIs(gateway.parse_cached_request(b"GET / HTTP/1.1\r\nHost: a\r\n"), request)
        with self.assertRaises(TypeError):
            request.fields["host"] = "b"

    def test_next_request_is_served_after_malformed_ones(self):
        for label, body in BAD_CHUNKS[:3]:
            self.assert_refused(post_chunks(body), 400)
        self.assertStatus(self.ask("GET", "/api/tags"), 200)


USER, ADMIN, SERIAL = b"ogw_" + b"u" * 43, b"ogw_" + b"a" * 43, b"nnnnnn"   # placeholders of the same length as the actual values
ODD_BYTES = (b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b",", b";", b"/", b"..", b"%2f", b"?", b"#", b"\x7f", b"\x80", b"\xff",
             b"\r\n ", b"0\r\n\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n",
             b"\r\nX-Api-Key: " + ADMIN + b"\r\n", b"Connection: x-api-key\r\n")
DELIMITER_VARIANTS = ((b"\r\n", (b"\n", b"\r", b"\n\r", b"\r\r\n", b" \r\n", b"\0\r\n", b"\r\n\r\n", b"\r\n ", b"")),
                      (b": ", (b" : ", b"\t: ", b":", b" ", b": ,", b":\0")), (b" ", (b"  ", b"\t", b"", b"\r", b"\x0b")))
ODD_NUMBERS = (b"0", b"1", b"2", b"-1", b"+2", b"00", b"0x5", b"1e1", b"2.0", b"5 5", b"1_0", b"ffff", b"65536", b"4294967296", b"9" * 19)
REACHABLE_ROUTES = (rb"GET /(?:api/(?:tags|version)|v1/models(?:/[^/?]+)?)(?:\?.*)?", rb"POST /(?:api/(?:chat|generate)|v1/messages)(?:\?.*)?",
                    rb"DELETE /api/delete(?:\?.*)?", rb"POST /api/blobs/sha256[:-][0-9a-f]{64}(?:\?.*)?")   # routes that mutants can reach
UPSTREAM_HEADERS = re.compile("host|accept-encoding|accept|content-type|content-encoding|content-length|transfer-encoding|user-agent|x-request-id"
                               "|anthropic-.*|openai-.*")
HTTP_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
HTTP_HEAD = re.compile(rb"(%b) (/[!-\"$-~]*) HTTP/1\.([01])\r\n((?:%b:[\t -~\x80-\xff]*\r\n)*)\r\n" % (HTTP_TOKEN, HTTP_TOKEN))
HTTP_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")
HTTP_TRAILERS = re.compile(rb"(?:%b:[\t -~\x80-\xff]*\r\n)*\r\n" % HTTP_TOKEN)


def well_formed(raw):
    """The complete, well-formed requests at the start of the data, as (method, target, body), and whether a malformed head follows.

    An independent implementation of RFC 9112. An incomplete head, or a truncated or malformed body, may follow as well.
    """
    found = []
    while raw:
        head = HTTP_HEAD.match(raw)
        start, end, body = reference_body(raw, head) if head else (0, 0, b"")
        if not end:
            return found, not start and b"\r\n\r\n" in raw
        found.append((head[1].decode(), head[2].decode(), body))
        raw = raw[end:]
    return found, False


def reference_body(raw, head):
    """The start of the body after a head, 0 if the head is invalid; its end, 0 if truncated or malformed; and the body."""
    fields = [(name.lower(), value.strip(b" \t")) for name, _, value in (line.partition(b":") for line in head[4].split(b"\r\n"))]
    hosts, lengths, codings = ([value for name, value in fields if name == wanted] for wanted in (b"host", b"content-length", b"transfer-encoding"))
    valid = len(hosts) == 1 or not hosts and head[3] == b"0"
    if codings:
        valid = valid and not lengths and head[3] == b"1" and [coding.lower() for coding in codings] == [b"chunked"]
        return (head.end(), *reference_chunks(raw, head.end())) if valid else (0, 0, b"")
    if not valid or len(lengths) > 1 or lengths and not re.fullmatch(rb"[0-9]{1,18}", lengths[0]):
        return 0, 0, b""
    end = head.end() + int(lengths[0] if lengths else 0)
    return (head.end(), end, raw[head.end():end]) if end <= len(raw) else (head.end(), 0, b"")


def reference_chunks(raw, at):
    body = b""
    while True:
        size = HTTP_SIZE.match(raw, at)
        if not size:
            return 0, b""
        at, left = size.end(), int(size[1], 16)
        if not left:
            trailers = HTTP_TRAILERS.match(raw, at)
            return (trailers.end(), body) if trailers else (0, b"")
        body, at = body + raw[at:at + left], at + left + 2
        if raw[at - 2:at] != b"\r\n":
            return 0, b""


class MutatedRequests:
    """An endless iterator of mutated requests; the same seed gives the same ones on every Python version."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        user, admin, chunks = bearer(USER.decode()), [("x-api-key", ADMIN.decode())], ("Transfer-Encoding", "chunked")
        extra_headers = [("User-Agent", "fuzz/1"), ("Cookie", "a=b"), ("anthropic-version", "2"), ("Connection", "keep-alive"), ("Accept", "*/*")]
        get, get_page = self.seed_request("GET", "/api/tags", headers=user), self.seed_request("GET", "/v1/models/tiny", headers=extra_headers + user)
        post = self.seed_request("POST", "/api/chat", dict(CHAT, stream=False), user + [("Content-Type", "application/json")])
        post_chunked = self.seed_request("POST", "/api/generate", headers=[*user, chunks]) + chunked(b'{"model": "ti', b'ny", "stream": 0}')
        delete = self.seed_request("DELETE", "/api/delete", {"model": "tiny"}, admin)
        old = self.seed_request("GET", "/api/version", headers=user, version="1.0")
        blob, post_blob = self.seed_request("POST", f"/api/blobs/{DIGEST}", b"0123456789" * 3, admin), ("POST", f"/api/blobs/{DIGEST}")
        blob_chunked = self.seed_request(*post_blob, headers=[chunks, *admin]) + chunked(b"0123456789" * 2, b"a")
        smuggling = [self.seed_request("POST", "/v1/messages", get, user + extra_headers), self.seed_request(*post_blob, get_page, admin),
                     self.seed_request("POST", "/api/chat", headers=[*user, chunks]) + chunked(get, b"\r\n0\r\n\r\n" + get)]   # to be smuggled
        self.seeds = (get, get_page, post, post_chunked, delete, old, blob, blob_chunked, *smuggling, get + post, post + get_page,
                      post_chunked + get, get_page + delete, blob + get, blob_chunked + post, delete + blob_chunked)

    @staticmethod
    def seed_request(method, path, *args, **kwargs):
        return request(method, f"{path}?n={SERIAL.decode()}", *args, **kwargs)

    def __iter__(self):
        while True:
            raw = self.rng.choice(self.seeds)
            for _ in range(self.rng.choice((0, 1, 1, 1, 2, 2, 3))):
                raw = self.mutated(raw or b"\n")
            yield raw

    def mutated(self, raw):
        """Apply one random mutation: of bytes, a line, a delimiter or a number."""
        rng, other = self.rng, self.rng.choice(self.seeds)
        at = rng.randrange(len(raw))
        to = min(at + rng.choice((1, 1, 2, 4, 16)), len(raw))
        return rng.choice((
            lambda: raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:],
            lambda: raw[:at] + rng.choice(ODD_BYTES) + raw[at:],
            lambda: raw[:at] + rng.choice(ODD_BYTES) + raw[to:],
            lambda: raw[:at] + raw[to:],
            lambda: raw[:to] + raw[at:],
            lambda: raw[:at] + other[rng.randrange(len(other)):],
            lambda: raw[:at] + raw[at:to].swapcase() + raw[to:],
            lambda: self.with_another_line(raw, other),
            lambda: self.with_another_line(raw, raw),
            lambda: self.with_another_delimiter(raw),
            lambda: self.with_another_number(raw)))()

    def with_another_line(self, raw, other):
        """Insert a line of another request, or replace a line with it."""
        lines = raw.split(b"\r\n")
        at = self.rng.randrange(len(lines))
        lines[at:at + self.rng.randrange(2)] = [self.rng.choice(other.split(b"\r\n"))]
        return b"\r\n".join(lines)

    def with_another_delimiter(self, raw):
        """Replace a line end, a colon or a space with a variant."""
        delimiter, others = self.rng.choice(DELIMITER_VARIANTS)
        match = self.rng.choice(list(re.finditer(delimiter + b"|$", raw)))
        return raw[:match.start()] + self.rng.choice(others) + raw[match.end():]

    def with_another_number(self, raw):
        numbers = list(re.finditer(rb"[0-9]+", raw))
        match = self.rng.choice(numbers) if numbers else re.search(b"$", raw)
        return raw[:match.start()] + self.rng.choice(ODD_NUMBERS) + raw[match.end():]


class RequestFuzzing(GatewayCase):
    """Whatever a client sends, only well-formed requests are forwarded, and the gateway keeps running."""

    SEED, ROUNDS, AT_ONCE = 3, 190, 8

    def test_mutated_requests_reach_upstream_only_if_well_formed(self):
        mutants, statuses = iter(MutatedRequests(self.SEED)), collections.Counter()
        serials, sent = itertools.count(100_000), []
        with unittest.mock.patch.object(gateway, "FREE_FAILURES", 10 ** 6), self.assertLogs("ollama_gateway") as logs:   # without throttling
            for _ in range(self.ROUNDS):
                raws = [self.filled(raw, next(serials)) for raw in itertools.islice(mutants, self.AT_ONCE)]
                statuses.update(self.send_concurrently(raws))
                arrived = collections.Counter((seen.method, seen.path, seen.body) for seen in self.fake.received[len(sent):])
                expected = collections.Counter(parsed for raw in raws for parsed in well_formed(raw)[0])
                self.assertEqual(arrived - expected, {}, f"forwarded, but not well-formed in {raws}")
                for seen in self.fake.received[len(sent):]:
                    self.assert_forwarded_well_formed(seen, raws)
                    sent.append(seen)
            gateway.LOG.warning("over")
        self.assertEqual(logs.output, ["WARNING:ollama_gateway:over"])
        self.assertLessEqual(set(statuses), {200, 400, 401, 403, 404, 405, 413, 414, 417, 431, 501, 505}, statuses)
        self.assertTrue(min(statuses[200], statuses[400]) > self.ROUNDS and {401, 404, 405} <= set(statuses), statuses)
        self.assertEqual([seen.path for seen in self.fake.broken if not seen.path.startswith("/api/blobs/")], [], "only blobs are streamed")
        self.assertStatus(self.ask("GET", "/api/tags"), 200)

    def filled(self, raw, serial):
        return raw.replace(USER, self.token.encode()).replace(ADMIN, self.admin.encode()).replace(SERIAL, b"%d" % serial)

    def send_concurrently(self, raws):
        """Send each item on its own connection, all at once; return the statuses of all responses."""
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Client(self.server.server_address)) for _ in raws]
            for client, raw in zip(clients, raws):
                client.send(raw)
            return [answer.status for client, raw in zip(clients, raws) for answer in self.answers(client, raw)]

    def answers(self, client, raw):
        """Read the responses to the well-formed requests; then half-close, and read the remaining responses."""
        answers, (parsed, refusable) = [], well_formed(raw)
        with contextlib.suppress(ConnectionError):
            for method in [method for method, _, _ in parsed] + ["GET"] * refusable:   # a malformed head is refused without waiting for more
                answers += filter(None, [client.answer(method)])
            self.assertTrue(all(answer.ended == "clean" for answer in answers), f"{answers} to {raw}")
            client.half_close()
            answers += client.everything()
        for answer in answers:
            ours = answer.status < 400 or answer.headers["content-type"] == "application/json"
            self.assertTrue(ours and "x-request-id" in answer.headers, f"{answer} to {raw}")
        return answers

    def assert_forwarded_well_formed(self, seen, raws):
        """Check a forwarded request: a known route, only permitted headers, and no credential except where a mutant put it."""
        self.assertTrue(any(re.fullmatch(target, f"{seen.method} {seen.path}".encode()) for target in REACHABLE_ROUTES), seen)
        names = [name.lower() for name, value in seen.headers]
        self.assertEqual(([name for name in names if not UPSTREAM_HEADERS.fullmatch(name)], len(names)), ([], len(set(names))), seen)
        for name, value in seen.headers:
            self.assertRegex(value, r"\A[\t -~\x80-\xff]*\Z", seen)
            for part in value.split(", "):   # values of repeated headers are joined
                if self.token in part or self.admin in part:
                    self.assertRegex(b"".join(raws), (r"(?i)\n%s:\s*%s" % (name, re.escape(part))).encode("latin-1"), seen)

# == Request body =============================================================


class ModelNameInBody(unittest.TestCase):
    """The model name is found as Go's decoder would find it, without decoding the whole body."""

    def value(self, random, depth=0):
        kind = random.random()
        if kind < 0.5 or depth > 2:
            return "".join(random.choice('a"\\{}[]:,\n é') for _ in range(random.randrange(8)))
        if kind < 0.7:
            return [self.value(random, depth + 1) for _ in range(random.randrange(3))]
        if kind < 0.9:
            return {random.choice(("model", 'x"', "name")): self.value(random, depth + 1) for _ in range(random.randrange(3))}
        return random.choice((1, -2.5e3, None, True, "x" * 6000))

    def read(self, body):
        try:
            return gateway.inspect_json(body).model
        except gateway.AmbiguousBody as error:
            return error

    def test_model_name_equals_that_of_a_full_json_decoder(self):
        source = random.Random(1)
        for decoded_bytes in 2000 * [gateway.DECODED_BYTES] + 2000 * [0]:   # both code paths: decoded and scanned
            pairs = [(source.choice(("model", "MODEL", "name", 'p"\\', "messages", "")), self.value(source)) for _ in range(source.randrange(6))]
            blank = source.choice(("", " ", "\n\t"))
            members = (json.dumps(key, ensure_ascii=source.random() < 0.5) + blank + ":" + json.dumps(value) for key, value in pairs)
            body = ("{" + f"{blank},{blank}".join(members) + "}" + source.choice(("", "\n", '{"model":"z"}'))).encode()
            found = [[value for key, value in pairs if key.lower() == name] for name in ("model", "name")]
            with unittest.mock.patch.object(gateway, "DECODED_BYTES", decoded_bytes):
                got = self.read(body)
            if any(len(values) > 1 or values and len(json.dumps(values[0])) > 4000 and (isinstance(values[0], str) or not decoded_bytes)
                   for values in found):
                self.assertIsInstance(got, gateway.AmbiguousBody, body)
            else:
                names = [values[0] if values and isinstance(values[0], str) else "" for values in found]
                self.assertEqual(got, names[0] or names[1], body)

    def test_scanner_and_decoder_agree_on_large_bodies(self):
        """For any value, and any position of a window boundary in it, the scanner finds what the decoder finds."""
        source = random.Random(2)
        values = (b'"}\\\\\\""', b'["]",{"x":"\\\\"}]', b"-1.5e3", b'{"a":{"b":null}}', b'"\\u00e9"', b"true", b"[]",
                  b'"' + "é\\\"".encode() * 300 + b'"')
        for size in 16, 32, 1024:    # the first window is an eighth of this size
            with unittest.mock.patch.multiple(gateway, VALUE_BYTES=size, WINDOW_BYTES=4 * size):
                for _ in range(300):
                    body = b"{" + b" ,\n".join(b'"k%d" : %b' % (at, source.choice(values)) for at in range(source.randrange(1, 8))) + b"}"
                    expected = [(key, value if len(raw) <= size else gateway.TOO_LONG)
                                for (key, value), raw in zip(gateway.DECODER.decode(body.decode()), re.split(rb' ,\n"k\d" : ', body[8:-1]))]
                    with unittest.mock.patch.object(gateway, "DECODED_BYTES", 0):
                        pairs, end = gateway.read_object(body + b' {"model":"z"}')
                    self.assertEqual((list(pairs), end), (expected, len(body)), body)

    def test_long_prompt_with_many_escaped_quotes_is_skipped(self):
        for prompt in b'print(\\"hello, world\\")\\n', b'print(\\\\\\"hello, world\\\\\\")\\n':
            self.assertEqual(self.read(b'{"prompt":"' + prompt * 200_000 + b'","model":"tiny"}'), "tiny")

    def test_bodies_with_many_short_strings_or_messages_are_accepted(self):
        for key, value in ("input", ["a short text"] * 60_000), ("messages", [{"role": "user", "content": "Hello"}] * 17_000):
            self.assertEqual(self.read(json.dumps({key: value, "model": "tiny"}).encode()), "tiny")

    def test_exceeding_the_string_and_bracket_limit_is_a_413_that_names_it(self):
        for label, body in (("brackets", b"[]," * gateway.JSON_PARTS), ("strings", b'"",' * gateway.JSON_PARTS)):
            error = self.read(b'{"model":"tiny","x":[' + body + b"[]]}")
            self.assertIn(f"{gateway.JSON_PARTS} strings and brackets", str(error), label)
            self.assertEqual(error.code, "body_too_large")
        error = self.read(b"{" + b",".join(b'"%d":"%b"' % (at, b"x" * 90) for at in range(3000)) + b"}")
        self.assertIn(f"{gateway.TOP_LEVEL_BYTES} bytes", str(error))

    def test_number_with_many_digits_is_scanned_in_linear_time(self):
        with unittest.mock.patch.object(gateway, "DECODED_BYTES", 10_000_000):  # int() without a digit limit would take minutes
            got = self.read(b'{"model":"tiny","x":' + b"7" * 5_000_000 + b"}")
        self.assertTrue(got == "tiny" or isinstance(got, gateway.AmbiguousBody), got)  # depends on whether this Python limits the digits of int()

    def test_long_runs_of_backslashes_are_scanned_correctly(self):
        for label, prompt, name in (("even", b"\\" * 8_000_000, "tiny"), ("odd", b"\\" * 8_000_001, gateway.AmbiguousBody),
                                    ("pairs", b"\\\\a" * 3_000_000, "tiny")):
            with self.subTest(label):
                got = self.read(b'{"prompt":"' + prompt + b'","model":"tiny"}')
                self.assertEqual(got, name) if name == "tiny" else self.assertIsInstance(got, name)

    def test_whitespace_between_members_is_skipped(self):
        blanks = b" \r\n\t" * 5000
        self.assertEqual(self.read(blanks.join((b"", b'{"model"', b":", b'"tiny"', b",", b'"x"', b":", b"[", b"1", b"]", b"}", b""))), "tiny")
        self.assertIsInstance(self.read(b'{"model":' + blanks + b'"tiny" "x"}'), gateway.AmbiguousBody)

    def test_body_that_is_not_a_json_object_is_ambiguous(self):
        for body in (b"", b"{", b"hello", b'{"model', b'{"model":', b'{"model":"', b'["model","x"]', b'{"model":"\\ud8"}', b"}" * 10,
                     b'{"model":"\xff"}', b'{"x":"' + b"x" * 9000 + b'\xff","model":"a"}', b'{"model" "a"}', b'{"model":"a",}', b'{"model":\'a\'}',
                     b'\xef\xbb\xbf{"model":"a"}', '{"model":"a"}'.encode("utf-16"), b'{"model":"a\nb"}', b"[" * 200_000,
                     b'{"a":' * 3000 + b"1" + b"}" * 2999):
            with self.subTest(body[:60]):
                self.assertIsInstance(self.read(body), gateway.AmbiguousBody)
        for body in (b"{}", b'{"model":5}', b'{"a":{"model":"x"}}', b'{"model":null}', b'{"model":["a"]}'):
            with self.subTest(body):
                self.assertEqual(self.read(body), "")

    def test_model_name_variants_are_normalized(self):
        own = ("tiny:latest", "library/tiny:latest", "registry.ollama.ai/library/tiny:latest")
        for name in ("tiny", "TINY:Latest", "library/tiny", "registry.ollama.ai/library/tiny", "Registry.Ollama.AI/library/tiny:latest",
                     "https://registry.ollama.ai/library/tiny", "://registry.ollama.ai/library/tiny", " tiny\n"):
            self.assertEqual(gateway.name_variants(name), own, name)
        self.assertEqual(gateway.name_variants("ada/tiny:7b"), ("ada/tiny:7b", "registry.ollama.ai/ada/tiny:7b"))
        self.assertEqual(gateway.name_variants("hf.co:443/ada/tiny"), ("hf.co:443/ada/tiny:latest",))
        for name in ("", "tiny:", ":tiny", "/tiny", "//tiny", "x://tiny", "a/b/c/d", "tiny@sha256:1", "tiny:a:b", "ti ny", "tiny\0", "../tiny",
                     "tïny"):
            self.assertEqual(gateway.name_variants(name), (), name)

    def test_globs_match_all_variants_of_a_model_name(self):
        for globs, inside, outside in (
            ("tiny", "tiny TINY:latest library/tiny registry.ollama.ai/library/tiny", "tiny:7b tiny-2 ada/tiny hf.co/library/tiny"),
            ("tiny*", "tiny tiny:7b tiny-2:latest", "my-tiny ada/tiny tiny:cloud tiny:7b-cloud tiny:7b-CLOUD"),
            ("*tiny", "tiny my-tiny ada/tiny hf.co/ada/tiny", "tiny:7b tiny-2"),
            ("library/*", "tiny a:b", "ada/tiny"), ("registry.ollama.ai/*", "tiny ada/tiny", "hf.co/ada/tiny"),
            ("hf.co/ada/*,a?:7b", "hf.co/ada/x ab:7b", "ada/x hf.co/eve/x a:7b"),
            ("*", "tiny ada/tiny hf.co/ada/tiny", "big:cloud big:1b-cloud big-cloud big:cloud:local a:b:c"),
            ("big:*cloud,x", "big:cloud big:1b-cloud x", "big:1b other:cloud")):
            for name in inside.split():
                self.assertTrue(gateway.model_allowed(name, globs), (name, globs))
            for name in outside.split():
                self.assertFalse(gateway.model_allowed(name, globs), (name, globs))


class Uploads(GatewayCase):
    """While a body is received: limits are checked before its first byte, memory and disk are bounded, the token is rechecked."""

    def upload(self, path, body, token=None, server=None):
        """Announce a body and return the client after the 100 response; the caller sends the body."""
        client = self.client(server)
        fields = [*bearer(token or self.token), ("Content-Length", str(len(body))), ("Expect", "100-continue")]
        client.send(request("POST", path, None, fields))
        self.assertStatus(client.head(), 100)
        return client

    def hold_requests(self, *bodies, server=None):
        """Return clients with running requests, whose responses have begun and end when `self.released` is set."""
        self.fake.replies["/api/chat"] = Reply.stream(LINE, self.released)
        clients = []
        for body in bodies:     # sequentially, so that each body is complete before the next one is sent
            clients.append(self.begin("POST", "/api/chat", body, server=server))
            clients[-1].begun = clients[-1].read(clients[-1].head(), until=LINE)
        return clients

    def setUp(self):
        super().setUp()
        self.released = self.hold()

    def test_rate_budget_and_parallel_limits_are_checked_before_100_continue(self):
        self.hold_requests(CHAT)
        self.store.add_usage({(int(time.time()) // 3600 * 3600, "ada", "laptop", "tiny", "/api/chat"): self.usage_row(prompt_tokens=50)}, {})
        for limits, words in (({"max_parallel": 1}, "1 request at once"), ({"tokens_per_day": 50}, "50 tokens a day")):
            with self.subTest(words):
                self.store.update("ada", "laptop", **{"max_parallel": None, "tokens_per_day": None, **limits})
                client = self.client()
                client.send(request("POST", "/api/chat", None, [*bearer(self.token), ("Content-Length", "9"), ("Expect", "100-continue")]))
                self.assertIn(words, self.assertRefused(client.answer(), 429))
        token = self.store.create("eve", "phone", rpm=1)[1]
        self.assertStatus(self.ask("POST", "/api/embed", CHAT, token=token), 200)
        client = self.client()
        client.send(request("POST", "/api/chat", None, [*bearer(token), ("Content-Length", "9"), ("Expect", "100-continue")]))
        self.assertIn("1 request a minute", self.assertRefused(client.answer(), 429))

    @staticmethod
    def usage_row(**values):
        return [values.get(column, 0) for column in gateway.MEASURED]

    def test_request_with_body_in_transit_counts_as_running(self):
        for limits in {"max_parallel": 1}, {"rpm": 1}:
            with self.subTest(limits):
                token = self.store.create("eve", f"phone {limits}", **limits)[1]
                body = compact(CHAT)
                client = self.upload("/api/chat", body, token)
                self.assertRefused(self.ask("POST", "/api/chat", CHAT, token=token), 429)
                client.send(body)
                self.fake.replies["/api/chat"] = Reply.json(200, {})
                self.assertStatus(client.answer(), 200)

    def test_aborted_upload_is_released_from_the_limits(self):
        token = self.store.create("eve", "phone", rpm=1, max_parallel=1)[1]
        for end in LEAVING:
            with self.subTest(end[0]):
                client = self.upload("/api/chat", b"x" * 100, token)
                end[1](client)
                eventually(lambda: self.ask("GET", "/me", token=token).json()["left"]["rpm"]["remaining"] == 1, "its rate to recover")
        client = self.upload("/api/chat", b"x" * 100, token)
        client.send(b"x" * 100)
        self.assertRefused(client.answer(), 400)
        self.assertStatus(self.ask("POST", "/api/embed", CHAT, token=token), 200)

    def test_total_size_of_bodies_on_disk_is_bounded(self):
        server = self.serve(max_spool="3MiB")
        body = compact({**CHAT, "x": "x" * 2_000_000})
        held, = self.hold_requests(body, server=server)
        answer = self.ask("POST", "/api/chat", body, server=server)
        self.assertIn("--max-spool", self.assertRefused(answer, 503))
        self.assertIn("retry-after", answer.headers)
        self.released.set()
        self.assertEqual(held.read(held.begun).ended, "clean")
        eventually(lambda: self.ask("POST", "/api/chat", body, server=server).status == 200, "the release of the disk space")

    def test_total_size_of_bodies_in_memory_is_bounded_and_the_rest_spools_to_disk(self):
        with unittest.mock.patch.object(gateway, "BODY_MEMORY", 100_000):
            server = self.serve(max_spool="100000")
            body = compact({**CHAT, "x": "x" * 80_000})
            self.hold_requests(body, body, server=server)   # one in memory, one on disk
            self.assertRefused(self.ask("POST", "/api/chat", body, server=server), 503)
            self.assertStatus(self.ask("POST", "/api/embed", CHAT, server=server), 200)     # small bodies are always accepted
            self.assertEqual([seen.body for seen in self.fake.received if seen.path == "/api/chat"], [body] * 2)

    def test_disk_error_while_spooling_a_body_is_an_immediate_503(self):
        class Broken(io.BytesIO):
            def read(self, *_):
                raise OSError(errno.EIO, "Input/output error")

            def fileno(self):
                return file.fileno()

        body = compact({**CHAT, "x": "x" * 2_000_000})
        with open(self.write("body", body), "rb") as file, unittest.mock.patch("tempfile.TemporaryFile", Broken):
            self.assertIn("Input/output error", self.assertRefused(self.ask("POST", "/api/chat", body), 503))

    def test_token_can_hold_at_most_a_quarter_of_the_connections(self):
        server = self.serve(max_connections="8")
        uploads = [self.upload(path, b"xx", server=server) for path in ("/api/show", "/api/chat")]
        answer = self.ask("GET", "/api/tags", server=server)
        self.assertIn("a quarter of --max-connections", self.assertRefused(answer, 429))
        self.assertStatus(self.ask("GET", "/api/tags", server=server, token=self.admin), 200)
        uploads[0].send(b"{}")
        self.assertStatus(uploads[0].answer(), 200)
        eventually(lambda: self.ask("GET", "/api/tags", server=server).status == 200, "a free connection of the token")

    def test_token_is_rechecked_after_the_body_has_arrived(self):
        for label, change, status in (("deleted", lambda: self.store.delete("eve", "phone"), 401),
                                      ("rotated", lambda: self.store.rotate("eve", "phone"), 401),
                                      ("expired", lambda: self.store.update("eve", "phone", expires_at=1), 401),
                                      ("narrowed", lambda: self.store.update("eve", "phone", models="other"), 403),
                                      ("limited", lambda: self.store.update("eve", "phone", tokens_per_day=5), 429)):
            with self.subTest(label):
                token = self.store.create("eve", "phone")[1]
                self.store.add_usage({(int(time.time()) // 3600 * 3600, "eve", "phone", "tiny", "/api/chat"): self.usage_row(prompt_tokens=50)}, {})
                client = self.upload("/api/chat", compact(CHAT), token)
                change()
                client.send(compact(CHAT))
                self.assertRefused(client.answer(), status)
                if label != "deleted":
                    self.store.delete("eve", "phone")
        self.assertEqual(self.fake.received, [])

    def test_limit_that_is_lowered_during_an_upload_applies_to_it(self):
        for limits in {"max_parallel": 1}, {"rpm": 1}:
            with self.subTest(limits):
                name = f"phone {limits}"
                token = self.store.create("eve", name, rpm=9)[1]
                self.fake.replies["/api/chat"] = Reply.stream(LINE, self.released)
                other = self.begin("POST", "/api/chat", CHAT, token)
                other.read(other.head(), until=LINE)
                client = self.upload("/api/chat", compact(CHAT), token)
                self.store.update("eve", name, **limits)
                client.send(compact(CHAT))
                self.assertRefused(client.answer(), 429)

    def test_token_is_rechecked_when_its_request_leaves_the_queue(self):
        server = self.serve(max_parallel="1")
        held, = self.hold_requests(CHAT, server=server)
        tokens = [self.store.create("eve", name)[1] for name in ("phone", "desk")]
        waiting = [self.begin("POST", "/api/chat", CHAT, token, server) for token in tokens]
        eventually(lambda: b"queued_requests 2" in self.ask("GET", "/metrics", token=self.admin, server=server).body, "both requests to be queued")
        self.store.delete("eve", "phone")
        self.store.update("eve", "desk", models="other")
        self.released.set()
        self.assertEqual([self.assertRefused(client.answer(), status) is not None for client, status in zip(waiting, (401, 403))], [True] * 2)
        self.assertEqual(len(self.fake.received), 1)

    def test_admin_token_deleted_during_an_admin_api_upload_creates_no_token(self):
        admin = self.store.create("mallory", "box", admin=True)[1]
        body = compact({"user": "mallory", "name": "again", "admin": True})
        client = self.upload("/admin/tokens", body, admin)
        self.store.delete("mallory", "box")
        client.send(body)
        self.assertRefused(client.answer(), 401)
        self.assertEqual(self.store.list("mallory"), [])

    def test_blob_upload_stops_when_its_admin_token_is_deleted(self):
        admin = self.store.create("mallory", "box", admin=True)[1]
        with unittest.mock.patch.object(gateway, "TOKEN_CHECK_SECONDS", 0):
            client = self.upload(f"/api/blobs/{DIGEST}", b"x" * 20, admin)
            client.send(b"x" * 10)
            self.store.delete("mallory", "box")
            client.send(b"x" * 10)
            self.assertRefused(client.answer(), 401)

    def test_admin_api_body_has_an_overall_deadline(self):
        with unittest.mock.patch.object(gateway, "PAGE_BODY_SECONDS", 0.3):
            client = self.upload("/admin/tokens", b" " * 5000, self.admin)
            for _ in range(5000):
                client.send(b" ")
                if select.select([client.socket], [], [], 0.005)[0]:
                    break
            self.assertIn("0.3 s", self.assertRefused(client.answer(), 408))


class UploadsOverTls(OverTls, Uploads):
    pass


class PromptEstimate(Case):
    """The estimated number of tokens of a prompt that Ollama has not counted."""

    IMAGE = base64.b64encode(random.Random(1).randbytes(150_000) if hasattr(random.Random, "randbytes") else bytes(range(256)) * 600).decode()

    def test_prompt_text_bytes_equal_the_length_of_all_strings(self):
        generator = random.Random(5)
        for _ in range(60):
            texts = ["".join(generator.choice(('"', "\\", "a ", "é", "\n", "{", "x" * 50)) for _ in range(generator.randrange(2000)))
                     for _ in range(generator.randrange(1, 40))]
            body = json.dumps([{"k": text} for text in texts], ensure_ascii=generator.random() < 0.5).encode()
            size = sum(len(match) for match in re.findall(rb'"((?:[^"\\]|\\.)*)"', body))
            self.assertEqual(gateway.prompt_text_bytes(body), size)

    def test_escapes_across_a_window_boundary_are_counted_correctly(self):
        for run in range(1, 6):
            for before in range(gateway.WINDOW_BYTES - 8, gateway.WINDOW_BYTES + 1):
                body = b'"' + b" " * before + b"\\\\" * run + b'\\"' + b'x","y"'
                self.assertEqual(gateway.prompt_text_bytes(body), before + 2 * run + 2 + 1 + 1)
        for body in b"", b"\\", b'"\\', b"\\" * 70_001:
            self.assertLessEqual(gateway.prompt_text_bytes(body), 1)

    def test_base64_images_are_not_counted_as_text(self):
        for image in (self.IMAGE, "data:image/png;base64," + self.IMAGE, self.IMAGE.replace("/", "\\/")):
            for before in 0, gateway.WINDOW_BYTES - 1500:
                body = b'{"content":"%s","images":["%s"]}' % (b"a b " * (before // 4), image.encode())
                self.assertLess(abs(gateway.prompt_text_bytes(body) - before), 2500)
        self.assertEqual(gateway.prompt_text_bytes(b'"%s"' % (b"word " * 10_000)), 50_000)

    def test_token_ratio_is_learned_per_model_within_bounds(self):
        ratio = gateway.TokenRatio()
        self.assertEqual(ratio.tokens("tiny:latest", 400), 100)
        for _ in range(50):
            ratio.learn("tiny:latest", 3000, 1000)
            ratio.learn("terse:latest", 50_000, 10)
            ratio.learn("wordy:latest", 10, 50_000)
        for model, tokens in (("tiny:latest", 800), ("terse:latest", 300), ("wordy:latest", 2400), ("other:latest", 600)):
            self.assertEqual(ratio.tokens(model, 2400), tokens)
        for number in range(gateway.MODEL_CACHE_SIZE):
            ratio.learn(f"model-{number}", 10, 1)
        self.assertEqual(ratio.tokens("terse:latest", 2400), 600)

# == Store ====================================================================


def flag(name):
    return "--" + name.replace("_", "-")


def variable_of(name):
    return next(option.variable for option in gateway.OPTIONS if option.flag == flag(name))


SECRET = re.compile(r"ogw_[A-Za-z0-9_-]{43}")
COMMANDS = ((), ("serve",), ("usage",), ("doctor",), ("token",),
            *(("token", word) for word in ("create", "list", "update", "rotate", "delete", "export", "import", "menu")))
KEYS = {"id", "user", "name", "hint", "created_at", "expires_at", "last_used_at", "expired", "admin", "models", "rpm", "max_parallel",
        "tokens_per_day"}
LIMITS = ("--models", "Llama3*, qwen2.5:7b", "--rpm", "60", "--max-parallel", "2", "--tokens-per-day", "100000")
ODD_NAMES = ("=cmd|' /C calc'!A0", "+1", "@sum", "'quoted'", "a,b;c", 'say "hi"', "Zoë Ångström", "日本語", "x" * 64)
BAD_NAMES = (("empty", ""), ("too long", "x" * 65), ("a line break", "a\nb"), ("a tab", "a\tb"), ("an escape", "\x1b[31mred"), ("a NUL", "a\0b"),
             ("a C1 control", "a\x9bb"), ("half a character", "a\udc80b"), ("a leading dash", "-a"), ("a right-to-left override", "a\u202eb"))


class Store(Case):

    def test_lookup_finds_the_exact_secret_only(self):
        store = self.open_store()
        token, secret = store.create("ada", "laptop")
        self.assertRegex(secret, SECRET)
        self.assertEqual(self.find(secret), [token])
        self.assertEqual((token.user, token.name), ("ada", "laptop"))
        for label, wrong in (("cut", secret[:-1]), ("longer", secret + "x"), ("other case", secret.swapcase()), ("empty", ""),
                             ("its hint", secret[:8]),
                             ("its digest", hashlib.sha256(secret.encode()).hexdigest())):
            with self.subTest(label):
                self.assertEqual(self.find(wrong), [None])

    def test_secrets_are_unique(self):
        store = self.open_store()
        self.assertEqual(len({store.create("ada", str(number))[1] for number in range(50)}), 50)

    def test_only_digest_and_hint_of_a_secret_are_stored(self):
        store = self.open_store()
        secret = store.create("ada", "laptop")[1]
        kept = self.bytes_of_all_files()
        digest = hashlib.sha256(secret.encode())
        self.assertNotIn(secret[8:20].encode(), kept)
        self.assertIn(secret[:8].encode(), kept)
        self.assertTrue(digest.digest() in kept or digest.hexdigest().encode() in kept)

    def test_concurrent_creation_of_a_database_succeeds_for_all_openers(self):
        for number in range(12):
            path, start, failed = self.path(f"{number}.db"), threading.Barrier(8), []

            def open_at_once(path=path, start=start, failed=failed):
                start.wait(GUARD)
                try:
                    gateway.TokenStore(path, create=True).close()
                except gateway.Failure as error:
                    failed.append(str(error))
            threads = [threading.Thread(target=open_at_once) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(GUARD)
            self.assertEqual(failed, [])

    def test_changes_are_visible_to_other_stores_immediately(self):
        one, two = self.open_store(), self.open_store()
        one.create("ada", "laptop")
        self.assertEqual([token.user for token in two.list()], ["ada"])
        two.delete("ada", "laptop")
        self.assertEqual(one.list(), [])

    @unittest.skipIf(os.name == "nt", "Windows has no such permissions")
    def test_new_database_files_have_mode_0600_with_umask_0(self):
        self.addCleanup(os.umask, os.umask(0))
        self.open_store().create("ada", "laptop")
        for name in os.listdir(self.folder):
            self.assertEqual(stat.S_IMODE(os.stat(self.path(name)).st_mode), 0o600, name)

    @unittest.skipIf(os.name == "nt", "Windows has no such permissions")
    def test_world_readable_database_is_changed_to_mode_0600(self):
        gateway.TokenStore(self.db, create=True).close()
        os.chmod(self.db, 0o644)
        self.open_store()
        self.assertEqual(stat.S_IMODE(os.stat(self.db).st_mode), 0o600)

    def test_empty_file_is_initialized_as_a_database(self):
        self.write("tokens.db", b"")
        self.assertTrue(self.open_store().create("ada", "laptop"))

    def test_failed_commit_is_rolled_back(self):
        store = self.open_store()
        store._db.execute("PRAGMA foreign_keys = ON")
        with self.assertRaisesRegex(gateway.Failure, "FOREIGN KEY"), store._access(write=True) as db:
            db.execute("CREATE TABLE x (y INTEGER REFERENCES tokens (id) DEFERRABLE INITIALLY DEFERRED)")
            db.execute("INSERT INTO x VALUES (99)")
        store.create("ada", "laptop")
        self.assertEqual([token.user for token in self.open_store().list()], ["ada"])

    def test_database_has_a_schema_version_and_wal_mode(self):
        self.open_store()
        with contextlib.closing(sqlite3.connect(self.db)) as db:
            self.assertGreater(db.execute("PRAGMA user_version").fetchone()[0], 0)
            self.assertEqual(db.execute("PRAGMA journal_mode").fetchone()[0], "wal")

    def test_upgrade_from_version_2_keeps_tokens_and_usage(self):
        hour = 20_000 * 86400
        with unittest.mock.patch.object(gateway, "MIGRATIONS", gateway.MIGRATIONS[:2]), \
                contextlib.closing(gateway.TokenStore(self.db, create=True)) as store:
            secret = store.create("ada", "laptop", tokens_per_day=1000)[1]
            kept = store.list()
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("INSERT INTO usage VALUES (?, 'ada', 'laptop', 'tiny:latest', '/api/chat', 4, 2, 1, 30, 60, 5.0)", (hour,))
            self.assertEqual(db.execute("PRAGMA user_version").fetchone()[0], 2)
        store = self.open_store()
        row = {"requests": 4, "errors": 2, "cancelled": 1, "prompt_tokens": 30, "cached_tokens": None, "completion_tokens": 60, "seconds": 5.0,
               "estimated_tokens": 0}
        self.assertEqual(store.usage("user", 0), [{"user": "ada", **row}])
        self.assertEqual(store.list(), kept)
        with contextlib.closing(gateway.TokenCache(store)) as cache:
            self.assertEqual(cache.tokens_used_on(cache.lookup(secret), 20_000), 90)
        store.add_usage({(hour, "ada", "laptop", "tiny:latest", "/api/chat"): (1, 0, 0, 10, 4, 5, 1.0, 2)}, {})
        self.assertEqual([list(row.values()) for row in store.usage("user", 0)], [["ada", 5, 2, 1, 40, 4, 65, 6.0, 2]])


class LegacyDatabaseUpgrade(CommandCase):

    def setUp(self):
        super().setUp()
        self.create_legacy_database(self.db)

    def create_legacy_database(self, path, journal="delete"):
        """Write a database as the FastAPI gateway did, with remains of a deleted token in a free page."""
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute(f"PRAGMA journal_mode = {journal}")
            db.execute("PRAGMA secure_delete = OFF")
            db.execute(OLD_SCHEMA)
            db.executemany("INSERT INTO tokens (user_id, user, api_name, token, created_at, expires_at) VALUES ('u1', ?, ?, ?, ?, ?)",
                           OLD_ROWS + (("deleted", "x", "clear-token-of-deleted-0013" + "y" * 20000, None, None),))
            db.commit()
            db.execute("DELETE FROM tokens WHERE user = 'deleted'")
            db.commit()

    def assert_upgraded(self):
        *tokens, unknown = self.find(*OLD_SECRETS, "")
        self.assertTrue(all(tokens), tokens)
        self.assertIsNone(unknown)
        self.assert_no_cleartext_token()

    def assert_no_cleartext_token(self):
        for name in os.listdir(self.folder):
            if name.startswith("tokens.db"):
                self.assertNotIn(b"clear-token-of", self.read(name), name)

    def test_legacy_fixture_contains_cleartext_tokens(self):
        stored = {token.decode() for token in re.findall(rb"clear-token-of-\w+-\d{4}", self.read("tokens.db"))}
        self.assertEqual(stored, {*OLD_SECRETS, "clear-token-of-deleted-0013"})

    def test_legacy_tokens_work_and_no_cleartext_remains(self):
        self.assert_upgraded()

    def test_no_cleartext_token_remains_while_the_database_is_open(self):
        self.open_store().create("new", "one")
        self.assert_no_cleartext_token()

    def test_legacy_database_in_wal_mode_is_upgraded(self):
        os.remove(self.db)
        live = self.path("live.db")
        self.create_legacy_database(live, "wal")
        with contextlib.closing(sqlite3.connect(live)) as db:   # the WAL is not checkpointed when the files are copied
            db.execute("INSERT INTO tokens (user, api_name, token) VALUES ('late', 'one', 'clear-token-of-late-0014')")
            db.commit()
            for ending in ("", "-wal"):
                shutil.copy(live + ending, self.db + ending)
        self.assertTrue(os.path.getsize(self.db + "-wal"))
        self.assertTrue(self.find("clear-token-of-late-0014")[0])
        self.assert_upgraded()

    def test_legacy_users_are_listed(self):
        rows = self.tokens()
        listed = [(row["user"], row["name"]) for row in rows]
        self.assertEqual(len(listed), len(set(listed)), listed)
        self.assertGreaterEqual(len(listed), len(OLD_SECRETS))
        for user, name in (("ada", "laptop"), ("ada", "phone"), ("bob", "desk"), ("Zoë", "=1+1")):
            self.assertIn((user, name), listed)
        self.assertEqual([row for row in rows if row["admin"]], [])

    def test_invalid_legacy_names_become_names_that_every_command_accepts(self):
        for row in self.tokens():
            with self.subTest(row):
                self.succeeds("token", "rotate", "--quiet", "--", row["user"], row["name"])
        self.assertTrue(self.succeeds("token", "list").replace("\n", "").isprintable())

    def test_legacy_hints_are_the_first_characters_of_the_token(self):
        self.assertIn("clear-to", {row["hint"] for row in self.tokens()})

    @unittest.skipUnless(hasattr(time, "tzset"), "needs a time zone to be set")
    def test_legacy_naive_timestamps_are_utc_in_any_local_time_zone(self):
        self.enter(unittest.mock.patch.dict(os.environ, TZ="Asia/Tokyo"))
        self.addCleanup(time.tzset)
        time.tzset()
        rows = {(row["user"], row["name"]): row for row in self.tokens()}
        self.assertEqual(rows["ada", "phone"]["expires_at"][:19], "2099-01-31T12:30:00")
        self.assertEqual(rows["bob", "desk"]["expires_at"][:19], "2099-01-31T10:30:00")
        self.assertEqual(rows["ada", "laptop"]["created_at"][:10], "2024-05-01")
        self.assertEqual({key for key, row in rows.items() if row["expired"]}, {("bob", "gone")})

    @unittest.skipIf(os.name == "nt", "Windows has no such permissions")
    def test_legacy_database_is_changed_to_mode_0600(self):
        os.chmod(self.db, 0o666)
        self.tokens()
        self.assertEqual(stat.S_IMODE(os.stat(self.db).st_mode), 0o600)

    def test_exported_legacy_tokens_can_be_imported(self):
        self.succeeds("token", "export", self.path("out.csv"))
        self.succeeds("token", "import", self.path("out.csv"), "--db", self.path("new.db"))
        self.assertTrue(all(self.find(*OLD_SECRETS, db=self.path("new.db"))))

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_upgrade_killed_at_any_statement_is_finished_by_the_next_opener(self):
        original = self.read("tokens.db")
        for statement in itertools.count(1):
            for name in os.listdir(self.folder):
                os.remove(self.path(name))
            self.write("tokens.db", original)
            with self.subTest(killed_at=statement):
                killed = open_and_die_at(statement, self.db)
                self.assert_upgraded()
            if not killed:
                break
        self.assertGreater(statement, 5, "the upgrade was never interrupted")


ROTATE = """
import contextlib, sys
sys.path.insert(0, {here!r})
import ollama_gateway
with contextlib.closing(ollama_gateway.TokenStore({db!r})) as store:
    for _ in sys.stdin:
        print(store.rotate("ada", "laptop")[1], flush=True)
"""
BREAK_WAL_INDEX = """
import sys
with open(sys.argv[1], "r+b") as file:
    file.write(bytes(48))
"""
TRY_LOCK = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 128)
"""


class TokenCacheAcrossProcesses(Case):
    """A token revoked by another process is refused by the very next lookup, without waiting for the periodic check."""

    def setUp(self):
        super().setUp()
        self.store = self.open_store()
        self.secret = self.store.create("ada", "laptop")[1]
        self.enter(unittest.mock.patch.object(gateway, "RECHECK_SECONDS", float("inf")))

    def open_cache(self, store=None):
        return self.enter(contextlib.closing(gateway.TokenCache(store or self.store)))

    def rotate_and_check(self, cache, times):
        """Let another process rotate the token many times; check the lookup after each rotation."""
        script = ROTATE.format(here=HERE, db=self.db)
        child = self.enter(subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        for number in range(times):
            old = self.secret
            self.assertTrue(cache.lookup(old), number)
            child.stdin.write(b"\n")
            child.stdin.flush()
            self.secret = child.stdout.readline().decode().strip()
            self.assertIsNone(cache.lookup(old), number)
            self.assertTrue(cache.lookup(self.secret), number)
        child.stdin.close()
        self.assertEqual(child.wait(GUARD), 0)

    def write_usage(self, stop, store):
        while not stop.wait(0.001):
            store.add_usage({(0, "ada", "laptop", "tiny", "/api/chat"): gateway.UsageRow(1, 0, 0, 1, None, 1, 1.0, 0)}, {})

    def checkpoint(self, stop):
        with contextlib.closing(sqlite3.connect(self.db)) as db:
            for mode in itertools.cycle(("PASSIVE", "FULL", "RESTART", "TRUNCATE")):
                with contextlib.suppress(sqlite3.OperationalError):
                    db.execute(f"PRAGMA wal_checkpoint({mode})")
                if stop.wait(0.001):
                    return

    def test_token_revoked_by_another_process_is_refused_immediately(self):
        self.rotate_and_check(self.open_cache(), times=200)

    def test_token_revoked_during_usage_writes_and_checkpoints_is_refused_immediately(self):
        stop = self.hold()
        threads = [threading.Thread(target=self.write_usage, args=(stop, self.store)),
                   threading.Thread(target=self.write_usage, args=(stop, self.open_store())),
                   threading.Thread(target=self.checkpoint, args=(stop,))]
        for thread in threads:
            thread.start()
        try:
            self.rotate_and_check(self.open_cache(), times=100)
            eventually(lambda: self.store.usage("user", 0)[0]["requests"] > 100)
        finally:
            stop.set()
            for thread in threads:
                thread.join(GUARD)

    @unittest.skipIf(os.name == "nt", "Windows does not map the WAL index")
    def test_sqlite_is_queried_only_after_a_commit(self):
        cache = self.open_cache()
        cache.lookup(self.secret)
        with unittest.mock.patch.object(cache, "_refresh", wraps=cache._refresh) as refresh:
            for _ in range(100):
                self.assertTrue(cache.lookup(self.secret))
            self.assertEqual(refresh.call_count, 0)
            self.store.delete("ada", "laptop")
            for _ in range(100):
                self.assertIsNone(cache.lookup(self.secret))
            self.assertEqual(refresh.call_count, 1)

    @unittest.skipIf(os.name == "nt", "Windows does not map the WAL index")
    def test_token_revoked_after_wal_index_recovery_is_refused_immediately(self):
        cache = self.open_cache()
        for times in range(1, 4):
            self.rotate_and_check(cache, times)
            subprocess.run([sys.executable, "-c", BREAK_WAL_INDEX, self.db + "-shm"], check=True)    # as a killed writer would leave it
            if times % 2:
                self.assertTrue(cache.lookup(self.secret))

    def test_every_lookup_queries_sqlite_without_a_wal_index(self):
        self.store.close()
        with unittest.mock.patch("mmap.mmap", side_effect=OSError("no memory")):
            cache = self.open_cache(self.open_store())
            self.assertEqual(cache._wal_index, b"")
            self.rotate_and_check(cache, times=3)

    def test_sqlite_is_also_queried_periodically(self):
        with unittest.mock.patch.object(gateway, "_map_wal_index", return_value=b"never changes"), \
                contextlib.closing(gateway.TokenStore(self.db)) as store, contextlib.closing(gateway.TokenCache(store)) as cache:
            self.assertTrue(cache.lookup(self.secret))
            self.store.delete("ada", "laptop")
            self.assertTrue(cache.lookup(self.secret))
            with unittest.mock.patch.object(gateway, "RECHECK_SECONDS", 0.1):
                eventually(lambda: cache.lookup(self.secret) is None, "the periodic check")

    @unittest.skipIf(os.name == "nt", "Windows does not map the WAL index")
    def test_sqlite_locks_on_the_wal_index_survive_closing_other_stores_and_caches(self):
        def is_locked():
            return bool(subprocess.run([sys.executable, "-c", TRY_LOCK, self.db + "-shm"], stderr=subprocess.DEVNULL).returncode)
        with contextlib.closing(gateway.TokenStore(self.db)) as other, contextlib.closing(gateway.TokenCache(other)) as cache:
            self.assertTrue(cache.lookup(self.secret))
            self.assertTrue(is_locked())
        self.assertTrue(is_locked())
        with contextlib.closing(gateway.TokenCache(self.store)):
            self.assertTrue(is_locked())
        self.assertTrue(is_locked())


@unittest.skipIf(os.name == "nt", "Windows replaces no file that is open")
class ReplacedDatabase(GatewayCase):
    """The database file is replaced, removed or corrupted while the gateway runs."""

    def setUp(self):
        super().setUp()
        quiet = logging.NullHandler()   # otherwise warnings not checked by a test go to stderr
        gateway.LOG.addHandler(quiet)
        self.addCleanup(gateway.LOG.removeHandler, quiet)
        self.assertStatus(self.ask("GET", "/api/tags"), 200)

    def users_in_other_process(self):
        """The users with tokens, as read by another process."""
        return {row["user"] for row in json.loads(run_alone("token", "list", "--json", "--db", self.db).stdout)}

    def delete_in_other_process(self):
        done = run_alone("token", "delete", "ada", "laptop", "--db", self.db)
        self.assertEqual((done.returncode, done.stderr), (0, b""))

    def copy(self, name="copy.db"):
        """Back up the database with SQLite's backup API."""
        with contextlib.closing(sqlite3.connect(self.db)) as db, contextlib.closing(sqlite3.connect(self.path(name))) as copy:
            db.backup(copy)
        return self.path(name)

    def other(self, name="other.db"):
        """Create a database with another token of ada; return its path and the token."""
        with contextlib.closing(gateway.TokenStore(self.path(name), create=True)) as store:
            return self.path(name), store.create("ada", "new")[1]

    def assertOnlyRefused(self, *words, times=3):
        """Check that requests are refused because of the database, and that this is logged once, with these words."""
        with self.assertLogs("ollama_gateway", "ERROR") as logs:
            for _ in range(times):
                text = self.assertRefused(self.ask("GET", "/api/tags"), 503)
                self.assertNotIn(self.folder, text)     # clients must not see local paths
        self.assertEqual(len(logs.output), 1, logs.output)
        for word in (self.db, *words):
            self.assertIn(word, logs.output[0])

    def test_database_moved_over_the_old_one_applies_to_the_next_request(self):
        path, secret = self.other()
        client = self.client()
        self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(secret)), 401)
        for _ in range(3):
            self.copy()
            os.replace(path, self.db)
            with self.assertLogs("ollama_gateway", "WARNING") as logs:
                self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(secret)), 200)
                self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(self.token)), 401)
            # the journal may warn, too: the file may have been replaced while it stored usage
            self.assertEqual([self.db in line for line in logs.output if "using the new file" in line], [True])
            self.copy(path)
            os.replace(self.path("copy.db"), self.db)
            self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(self.token)), 200)

    def test_restored_backup_is_not_altered_by_the_old_wal(self):
        """Changes to the old file since the backup, still in its -wal, must not get into the restored file."""
        copy = self.copy()
        lost = self.store.create("eve", "lost")[1]
        self.store.delete("ada", "laptop")
        with contextlib.closing(sqlite3.connect(self.db)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM state").fetchone()
            self.store.create("eve", "in the wal")
            self.assertTrue(os.path.getsize(self.db + "-wal"))
            os.replace(copy, self.db)
            self.assertStatus(self.ask("GET", "/api/tags"), 200)
            self.assertStatus(self.ask("GET", "/api/tags", token=lost), 401)
        self.assertEqual(self.users_in_other_process(), {"ada", "root"})

    def test_other_process_reads_the_restored_backup(self):
        copy = self.copy()
        self.store.create("eve", "lost")
        os.replace(copy, self.db)   # without a request, so the gateway has not noticed it yet
        self.assertEqual(self.users_in_other_process(), {"ada", "root"})
        self.delete_in_other_process()
        self.assertStatus(self.ask("GET", "/api/tags"), 401)

    def test_token_revoked_by_another_process_in_the_new_file_is_refused(self):
        os.replace(self.copy(), self.db)
        self.assertStatus(self.ask("GET", "/api/tags"), 200)
        self.delete_in_other_process()
        self.assertStatus(self.ask("GET", "/api/tags"), 401)

    def test_two_gateways_both_switch_to_the_new_file(self):
        store = self.open_store()
        settings = gateway.load_settings({"ollama_url": self.fake.url, "db": self.db, "port": "0"}, {})
        other = self.enter(running(gateway.build_server(settings, store, log=lambda lines: None)))
        copy = self.copy()
        store.create("eve", "lost")
        os.replace(copy, self.db)
        for server in (self.server, other):
            self.assertStatus(self.ask("GET", "/api/tags", server=server), 200)
        store.delete("ada", "laptop")
        self.assertStatus(self.ask("GET", "/api/tags"), 401)
        secret = self.store.create("bob", "desk")[1]
        self.assertStatus(self.ask("GET", "/api/tags", token=secret, server=other), 200)
        self.assertEqual(self.users_in_other_process(), {"bob", "root"})

    def test_usage_not_stored_yet_is_written_to_the_new_file(self):
        self.store.update("ada", "laptop", tokens_per_day=20)   # each response costs 13
        copy = self.copy()
        self.assertStatus(self.ask("POST", "/api/chat", CHAT), 200)
        os.replace(copy, self.db)
        self.assertStatus(self.ask("POST", "/api/chat", CHAT), 200)
        with contextlib.closing(gateway.TokenStore(self.db)) as store:
            eventually(lambda: [row["completion_tokens"] for row in store.usage("user", 0)] in ([5], [10]), "the usage to be stored")
        self.store.update("ada", "laptop", tokens_per_day=1)
        self.assertStatus(self.ask("POST", "/api/chat", CHAT), 429)

    def test_admin_api_changes_are_written_to_the_new_file(self):
        copy = self.copy()
        self.store.create("eve", "lost")
        os.replace(copy, self.db)
        made = self.ask("POST", "/admin/tokens", {"user": "bob", "name": "desk"}, token=self.admin)
        self.assertStatus(made, 201)
        self.assertEqual(self.users_in_other_process(), {"ada", "bob", "root"})

    def test_requests_are_refused_while_the_database_is_removed(self):
        away = self.path("away.db")
        os.rename(self.db, away)
        self.assertOnlyRefused("is gone")
        with self.assertRaises(gateway.Failure):
            self.store.create("bob", "desk")
        self.assertFalse(os.path.exists(self.db), "a new empty database would hide the loss")
        os.rename(away, self.db)
        with self.assertLogs("ollama_gateway", "WARNING") as logs:
            self.assertStatus(self.ask("GET", "/api/tags"), 200)
        self.assertIn("readable again", logs.output[-1])
        self.store.delete("ada", "laptop")
        self.assertStatus(self.ask("GET", "/api/tags"), 401)

    def test_requests_are_refused_while_the_file_is_not_a_valid_database(self):
        aside, new, newer = self.path("aside.db"), self.path("new.db"), self.copy("newer.db")
        with contextlib.closing(sqlite3.connect(newer)) as db:
            db.execute("PRAGMA user_version = 99")
        os.link(self.db, aside)
        self.write("new.db", b"This is not a database.\n" * 1000)
        for path, words in ((new, "not a database"), (newer, "version 99")):
            with self.subTest(path):
                os.replace(path, self.db)
                self.assertOnlyRefused(words)
        os.replace(aside, self.db)   # the original, whose -wal was removed
        self.assertStatus(self.ask("GET", "/api/tags"), 200)
        self.delete_in_other_process()
        self.assertStatus(self.ask("GET", "/api/tags"), 401)

    def put_back(self):
        """Replace the database and put it back, so that only the store notices; the token cache keeps the old -shm open."""
        os.link(self.db, self.path("aside.db"))
        self.write("bad.db", b"This is not a database.\n" * 1000)
        os.replace(self.path("bad.db"), self.db)
        with self.assertRaises(gateway.Failure):
            self.store.list()
        os.replace(self.path("aside.db"), self.db)

    def test_database_replaced_and_put_back_between_requests_is_reopened(self):
        self.put_back()
        with self.assertRaises(gateway.Failure):
            self.store.list()
        self.delete_in_other_process()     # creates a new -shm
        with self.assertRaises(gateway.Failure):
            self.store.list()
        self.assertEqual(eventually(lambda: {self.ask("GET", "/api/tags").status} - {503}), {401})
        self.assertEqual([token.user for token in self.store.list()], ["root"])

    def test_database_put_back_keeps_what_another_process_has_in_its_wal(self):
        self.put_back()
        script = f"""import sqlite3
db = sqlite3.connect({self.db!r})
with db:
    db.execute("DELETE FROM tokens WHERE user = 'ada'")
print(flush=True)
input()"""
        child = self.enter(subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        self.assertEqual(child.stdout.readline().strip(), b"")
        for _ in range(2):
            with self.assertRaises(gateway.Failure):
                self.store.list()
        self.assertEqual(self.users_in_other_process(), {"root"})
        child.communicate(b"\n", GUARD)

    def test_database_repaired_in_place_is_reopened(self):
        good = self.copy("good.db")
        self.write("bad.db", b"This is not a database.\n" * 1000)
        os.replace(self.path("bad.db"), self.db)
        self.assertStatus(self.ask("GET", "/api/tags"), 503)
        shutil.copyfile(good, self.db)
        eventually(lambda: self.ask("GET", "/api/tags").status == 200, "the gateway to reopen the database")

    def test_replacement_with_an_older_schema_is_upgraded(self):
        with contextlib.closing(sqlite3.connect(self.path("old.db"))) as db:
            for statement in gateway.MIGRATIONS[0]:
                db.execute(statement)
            db.execute("INSERT INTO tokens (user, name, digest, hint, created_at) VALUES ('ada', 'old', ?, '', 0)", (gateway.digest_of("old"),))
            db.execute("PRAGMA user_version = 1")
            db.commit()
        os.replace(self.path("old.db"), self.db)
        self.assertStatus(self.ask("GET", "/me", token="old"), 200)

    def test_sqlite_errors_are_503_and_logged_once(self):
        for error in (sqlite3.DatabaseError("database disk image is malformed"), sqlite3.OperationalError("disk I/O error"),
                      sqlite3.OperationalError("attempt to write a readonly database")):
            self.store.update("ada", "laptop", rpm=1000)
            with self.subTest(error), unittest.mock.patch.object(gateway, "_select", side_effect=error):
                self.assertOnlyRefused(str(error))
            self.assertStatus(self.ask("GET", "/api/tags"), 200)

    def test_replacement_of_a_read_only_database_is_detected(self):
        path, secret = self.other()
        with unittest.mock.patch("os.access", lambda path, mode: mode != os.W_OK):
            with contextlib.closing(gateway.TokenStore(self.copy())) as store, contextlib.closing(gateway.TokenCache(store)) as cache:
                self.assertIsNone(cache.lookup(secret))
                os.replace(path, store.path)
                self.assertEqual(cache.lookup(secret).name, "new")
                self.assertIsNone(cache.lookup(self.token))
                os.link(store.path, self.path("aside.db"))
                os.replace(self.write("bad.db", b"This is not a database.\n" * 1000), store.path)
                self.assertRaises(gateway.Failure, cache.lookup, secret)
                os.replace(self.path("aside.db"), store.path)
                self.assertEqual((cache.lookup(secret).name, len(store.list())), ("new", 1))

    def test_commit_during_replacement_fails(self):
        copy = self.copy()
        with self.assertRaisesRegex(gateway.Failure, "replaced meanwhile"), self.store._access(write=True) as db:
            db.execute("UPDATE tokens SET rpm = 1")
            os.replace(copy, self.db)

    @unittest.skipUnless(sys.platform == "linux", "reads /proc")
    def test_file_descriptors_of_a_replaced_database_are_closed(self):
        def replaced():
            links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
            return [link for link in map(os.readlink, filter(os.path.islink, links)) if link.startswith(self.db) and link.endswith(" (deleted)")]
        for _ in range(3):
            os.replace(self.copy(), self.db)
            self.assertStatus(self.ask("GET", "/api/tags"), 200)
            self.assertEqual(replaced(), [])

    def test_commit_is_checkpointed_and_leaves_the_wal_empty(self):
        self.store.create("bob", "desk")
        self.assertEqual(os.path.getsize(self.db + "-wal"), 0)

    def test_leftover_wal_and_shm_files_are_changed_to_mode_0600(self):
        names = [self.path("x.db" + suffix) for suffix in ("", "-wal", "-shm")]
        script = f"import os, sqlite3; db = sqlite3.connect({names[0]!r}); db.execute('PRAGMA journal_mode = WAL'); " \
                 "db.execute('VACUUM'); db.execute('CREATE TABLE x (y)'); db.commit(); db.execute('DROP TABLE x'); db.commit(); os._exit(0)"
        with contextlib.closing(gateway.TokenStore(names[0], create=True)):
            pass
        subprocess.run([sys.executable, "-c", script], check=True)
        for name in names:
            os.chmod(name, 0o644)
        with contextlib.closing(gateway.TokenStore(names[0])):
            self.assertEqual([stat.S_IMODE(os.stat(name).st_mode) for name in names], [0o600] * 3)

    def test_failure_to_change_the_file_mode_is_a_warning(self):
        os.chmod(self.db, 0o644)
        refused = unittest.mock.patch("os.chmod", side_effect=PermissionError("not permitted"))
        with refused, self.assertLogs("ollama_gateway", "WARNING") as logs, contextlib.closing(gateway.TokenStore(self.db)):
            self.assertIn("not permitted", logs.output[0])

# == Server ===================================================================

CREATE_FIVE = """
import sys
sys.path.insert(0, {here!r})
import ollama_gateway
sys.stdin.readline()
sys.exit(max(ollama_gateway.main(["token", "create", sys.argv[1], str(n), "--quiet", "--db", sys.argv[2]]) for n in range(5)))
"""


class ConcurrentChangesAndClients(GatewayCase):

    def run_in_other_process(self, *argv):
        """Run a command in another process; return its output."""
        done = run_alone(*argv, "--db", self.db)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        return done.stdout.decode().strip()

    def test_created_rotated_and_deleted_tokens_apply_on_an_open_connection(self):
        client = self.client()
        secret = self.store.create("bob", "desk")[1]
        self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(secret)), 200)
        rotated = self.store.rotate("bob", "desk")[1]
        self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(secret)), 401)
        self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(rotated)), 200)
        self.store.delete("bob", "desk")
        self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(rotated)), 401)

    def test_admin_right_change_applies_to_the_next_request(self):
        client = self.client()
        for admin, status in ((False, 403), (True, 200), (False, 403)):
            self.store.update("ada", "laptop", admin=admin)
            self.assertStatus(client.ask("HEAD", f"/api/blobs/{DIGEST}", headers=bearer(self.token)), status)

    def test_token_expires_on_an_open_connection(self):
        client = self.client()
        secret = self.store.create("bob", "desk", expires_at=int(time.time()) + 2)[1]
        self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(secret)), 200)
        eventually(lambda: client.ask("GET", "/api/tags", headers=bearer(secret)).status == 401, "the expiry")

    def test_token_commands_of_another_process_apply_to_the_next_request(self):
        client = self.client()
        secret = self.run_in_other_process("token", "create", "bob", "desk", "--quiet")
        self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(secret)), 200)
        self.run_in_other_process("token", "delete", "bob", "desk")
        self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(secret)), 401)

    def test_each_of_many_rapid_changes_applies_to_the_next_request(self):
        with Client(self.server.server_address) as client, contextlib.closing(gateway.TokenStore(self.db)) as store:
            for number in range(100):
                store.update("ada", "laptop", admin=number % 2)
                self.assertStatus(client.ask("GET", "/metrics", None, bearer(self.token)), 200 if number % 2 else 403)

    def test_direct_sql_change_applies_to_the_next_request(self):
        self.assertStatus(self.ask("GET", "/api/tags"), 200)
        with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as db:
            db.execute("DELETE FROM tokens WHERE user = 'ada'")
        self.assertStatus(self.ask("GET", "/api/tags"), 401)

    def test_import_by_another_process_applies_to_the_next_request(self):
        other = self.open_store(self.path("other.db"))
        secret = other.create("eve", "desk")[1]
        client = self.client()
        self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(secret)), 401)
        run_alone("token", "export", self.path("x.json"), "--db", self.path("other.db"), check=True)
        self.run_in_other_process("token", "import", self.path("x.json"))
        self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(secret)), 200)

    def test_running_stream_survives_token_deletion_but_new_requests_are_refused(self):
        hold = self.hold()
        self.fake.replies["/api/chat"] = Reply.stream(b"one\n", hold, b"two\n")
        client = self.begin("POST", "/api/chat", CHAT)
        answer = client.read(client.head(), until=b"one\n")
        self.store.delete("ada", "laptop")
        self.assertRefused(self.ask("GET", "/api/tags"), 401)
        hold.set()
        self.assertEqual(client.read(answer).body, b"one\ntwo\n")
        self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(self.token)), 401)

    def test_concurrent_clients_each_get_their_own_response(self):
        wrong = []

        def ask_often(number):
            with Client(self.server.server_address) as client:
                for attempt in range(10):
                    model = f"m{number}-{attempt}"
                    answer = client.ask("POST", "/api/chat", {"model": model, "stream": attempt % 2 == 0}, bearer(self.token))
                    if answer.status != 200 or set(re.findall(r'"model":"(.*?)"', answer.body.decode())) != {model} or answer.ended != "clean":
                        wrong.append((model, answer))
        threads = [threading.Thread(target=ask_often, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(3 * GUARD)
        self.assertEqual(wrong, [])
        self.assertEqual(len(self.fake.received), 200)

    def test_stalled_streams_do_not_block_other_clients(self):
        hold = self.hold()
        self.fake.replies["/api/chat"] = Reply.stream(b"one\n", hold, b"two\n")
        waiting = [self.begin("POST", "/api/chat", CHAT) for _ in range(30)]
        eventually(lambda: len(self.fake.received) == 30)
        self.assertStatus(self.ask("GET", "/api/tags"), 200)
        hold.set()
        self.assertEqual([client.answer().ended for client in waiting], ["clean"] * 30)

    def test_last_used_updates_do_not_invalidate_the_token_cache(self):
        def generation():
            with contextlib.closing(sqlite3.connect(self.db)) as db:
                return db.execute("SELECT generation FROM state").fetchone()
        before, token = generation(), self.store.list("ada")[0].id
        for when in (1000, 1000, 1001, 900):
            self.store.add_usage({}, {token: when})
        self.assertEqual((generation(), self.store.list("ada")[0].last_used_at), (before, 1001))

    def test_concurrent_token_creation_by_eight_processes_loses_none(self):
        script = CREATE_FIVE.format(here=HERE)
        for label, db in (("database of a running gateway", self.db), ("new database", self.path("new.db"))):
            with self.subTest(label):
                pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
                processes = [self.enter(subprocess.Popen([sys.executable, "-c", script, f"user{number}", db], **pipes)) for number in range(8)]
                for process in processes:
                    process.stdin.write(b"go\n")
                    process.stdin.flush()
                outputs = [process.communicate(timeout=3 * GUARD) for process in processes]
                self.assertEqual([(process.returncode, err) for process, (out, err) in zip(processes, outputs)], [(0, b"")] * 8)
                secrets = b"".join(out for out, err in outputs).decode().split()
                self.assertEqual(len(secrets), 40)
                self.assertTrue(all(self.find(*secrets, db=db)))
                if db == self.db:
                    self.assertEqual({self.ask("GET", "/api/version", token=secret).status for secret in secrets}, {200})

    def test_stopped_gateway_leaves_no_threads(self):
        before = set(threading.enumerate())
        self.fake.replies["/api/chat"] = Reply.stream(b"one\n", until_hangup)
        with self.serving() as server:
            idle, _, half = self.client(server), self.client(server), self.client(server)
            self.assertStatus(idle.ask("GET", "/api/tags", headers=bearer(self.token)), 200)
            half.send(b"GET /api/tags HTTP/1.1\r\nHo")
            busy = self.begin("POST", "/api/chat", CHAT, server=server)
            busy.read(busy.head(), until=b"one\n")
        self.fake.drop()
        eventually(lambda: set(threading.enumerate()) <= before, "the gateway's threads to end")


class ConnectionLimitsAndSlowClients(GatewayCase):
    """Many or slow clients do not make the gateway unavailable to the others."""

    def hold_a_stream(self, server, hold, token=None):
        """Begin a request whose response does not end before the Event is set."""
        self.fake.replies["/api/chat"] = Reply.stream(LINE, hold)
        client = self.begin("POST", "/api/chat", CHAT, server=server, token=token)
        client.begun = client.read(client.head(), until=LINE)
        return client

    def ask_until_there_is_room(self, server):
        """Repeat the request while the status is 503: a connection whose response has just been read is not idle yet."""
        answers = (self.ask("GET", "/api/tags", server=server) for _ in itertools.count())
        return eventually(lambda: next((answer for answer in [next(answers)] if answer.status != 503), None))

    def test_connection_over_the_limit_evicts_the_longest_idle_one(self):
        server = self.serve(max_connections="3")
        clients = []
        for _ in range(3):
            clients.append(self.client(server))
            self.assertStatus(clients[-1].ask("GET", "/api/tags", headers=bearer(self.token)), 200)
        self.assertStatus(self.ask_until_there_is_room(server), 200)
        self.assertIsNone(clients[0].answer(), "closed without a response")
        for client in clients[1:]:
            self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(self.token)), 200)

    def test_connection_over_the_limit_gets_503_if_none_is_idle(self):
        hold, server = self.hold(), self.serve(max_connections="2")
        busy = [self.hold_a_stream(server, hold, token) for token in (self.token, self.admin)]
        for data in (b"", request("GET", "/api/tags", headers=bearer(self.token)), request("POST", "/api/chat", b"x" * 300_000)):
            with self.subTest(len(data)), Client(server.server_address) as client:
                client.send(data)
                answer = client.answer()
                self.assertEqual((answer.status, answer.ended, answer.json().keys()), (503, "clean", {"error"}))
                self.assertGreater(int(answer.headers["retry-after"]), 0)
        hold.set()
        for client in busy:
            self.assertEqual(client.read(client.begun).ended, "clean")
        self.assertStatus(self.ask_until_there_is_room(server), 200)

    def test_silent_connection_is_closed_without_a_response(self):
        server = self.serve(header_timeout="0.3s", idle_timeout="0.3s")
        fresh, used = self.client(server), self.client(server)
        self.assertStatus(used.ask("GET", "/api/tags", headers=bearer(self.token)), 200)
        self.assertEqual((fresh.answer(), used.answer()), (None, None))

    def test_slowly_sent_head_times_out_with_408(self):
        server = self.serve(header_timeout="0.5s")
        for label, data in (("headers", b"GET /api/tags HTTP/1.1\r\n" + b"X: y\r\n" * 1000), ("a line", b"GET /" + b"a" * 5000),
                            ("half a line end", b"GET / HTTP/1.1\r")):
            with self.subTest(label), Client(server.server_address) as client:
                for byte in data:
                    client.send(bytes([byte]))
                    if select.select([client.socket], [], [], 0.005)[0]:
                        break
                self.assertRefused(client.answer(), 408)

    def test_stalled_body_times_out_with_408(self):
        with unittest.mock.patch.object(gateway, "BODY_SECONDS", 0.3):
            for path, token in (("/api/chat", self.token), (f"/api/blobs/{DIGEST}", self.admin)):
                with self.subTest(path):
                    client = self.client()
                    client.send(request("POST", path, None, [*bearer(token), ("Content-Length", "10")]) + b"abc")
                    self.assertRefused(client.answer(), 408)

    def test_body_size_is_limited_by_max_body_except_for_blobs(self):
        server = self.serve(max_body="2MiB")
        for size, status in ((2 * 1024 * 1024, 200), (2 * 1024 * 1024 + 1, 413)):
            body = b'{"x":"%s"}' % (b"x" * (size - 8))
            for framing, sent in (("length", body), ("chunks", chunked(body))):
                with self.subTest(framing, size=size):
                    client = self.client(server)
                    fields = [("Transfer-Encoding", "chunked")] if framing == "chunks" else [("Content-Length", str(size))]
                    client.send(request("POST", "/api/chat", None, [*bearer(self.token), *fields]) + sent)
                    self.assertStatus(client.answer(), status)
        self.assertStatus(self.ask("POST", f"/api/blobs/{DIGEST}", b"x" * 3_000_000, token=self.admin, server=server), 200)

    def test_large_body_spooled_to_disk_is_forwarded_unchanged(self):
        body = compact({"images": ["x" * 3_000_000], "model": "tiny"})
        self.assertStatus(self.ask("POST", "/api/chat", body), 200)
        self.assertEqual((self.upstream().body, self.logged()["model"]), (body, "tiny"))

    @unittest.skipUnless(hasattr(signal, "SIGXFSZ"), "needs a file size limit")
    def test_body_that_exceeds_the_disk_space_is_refused_and_never_truncated(self):
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(signal.signal, signal.SIGXFSZ, signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
        body = compact({**CHAT, "stream": True, "images": ["x" * 2_000_000]})
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(body) - 5, hard))
        self.assertRefused(self.ask("POST", "/v1/chat/completions", body), 503, "/v1/chat/completions")
        self.assertEqual(self.fake.received, [])
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(body), hard))     # the inserted member is not written to disk
        self.assertStatus(self.ask("POST", "/v1/chat/completions", body), 200)
        self.assertTrue(self.upstream().body == body[:-1] + b',"stream_options":{"include_usage":true}}')

    def test_full_disk_refuses_large_bodies_only(self):
        with unittest.mock.patch("tempfile.TemporaryFile", side_effect=OSError(errno.ENOSPC, "No space left on device")):
            answer = self.ask("POST", "/api/chat", b"x" * 3_000_000)
            self.assertIn("No space left", self.assertRefused(answer, 503))
            self.assertIn("retry-after", answer.headers)
            self.assertStatus(self.ask("POST", "/api/chat", CHAT), 200)

    def test_client_that_does_not_read_is_disconnected(self):
        def endless(exchange):
            while True:
                exchange.send(b"x" * 65536)
        self.fake.replies["/api/chat"] = Reply.stream(endless)
        with unittest.mock.patch.object(gateway, "SEND_SECONDS", 0.3):
            self.begin("POST", "/api/chat", CHAT)
            self.assertEqual(self.fake.hangups.get(timeout=GUARD), "/api/chat")
            self.assertEqual(self.logged()["outcome"], "left")

    def test_burst_of_connections_is_served_completely(self):
        clients = [self.client() for _ in range(150)]
        for client in clients:
            client.send(request("GET", "/api/tags", headers=bearer(self.token)))
        self.assertEqual({client.answer().status for client in clients}, {200})

    def test_connection_with_running_request_is_not_evicted(self):
        hold, server = self.hold(), self.serve(max_connections="2")
        busy = self.hold_a_stream(server, hold, self.admin)
        for _ in range(4):
            self.assertStatus(self.ask_until_there_is_room(server), 200)
        hold.set()
        self.assertEqual(busy.read(busy.begun).ended, "clean")

    def incomplete_head(self, server, source="127.0.0.1", data=b"G"):
        """Open a connection that has sent an incomplete request head."""
        client = self.enter(Client(server.server_address, source=source))
        client.send(data)
        return client

    def assert_evicted(self, *clients):
        for client in clients:
            with contextlib.suppress(ConnectionResetError):     # it had sent data that was not read
                self.assertIsNone(client.answer(), "closed without a response")

    def assert_open(self, *clients):
        """Complete the clients' request heads: they must still be served."""
        for client in clients:
            client.send(b"ET / HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertStatus(client.answer(), 200)

    def test_incomplete_heads_do_not_block_valid_tokens_and_are_evicted_silently(self):
        server = self.serve(max_connections="8")
        clients = [self.incomplete_head(server, f"127.0.0.{number}") for number in range(2, 10)]
        used = self.client(server)
        self.assertStatus(used.ask("GET", "/", headers=[("X-Request-Id", "first")]), 200)
        used.send(b"G")     # the start of its next head
        for _ in range(8):
            self.assertStatus(self.client(server).ask("GET", "/api/tags", headers=bearer(self.token)), 200)
        self.assert_evicted(*clients, used)
        eventually(lambda: len(self.lines) >= 9)
        self.assertEqual([log_fields(line)["path"] for line in self.lines], ["/", *["/api/tags"] * 8])
        metrics = self.ask("GET", "/metrics", token=self.admin, server=server).body.decode()
        self.assertIn("\nollama_gateway_cancelled_total 0\n", metrics)

    def test_longest_waiting_connection_is_evicted_whether_idle_or_with_incomplete_head(self):
        server = self.serve(max_connections="3")
        incomplete_head, idle, other = self.incomplete_head(server, "127.0.0.2"), self.client(server), self.incomplete_head(server, "127.0.0.3")
        self.assertStatus(idle.ask("GET", "/"), 200)
        self.assertStatus(self.ask_until_there_is_room(server), 200)
        self.assert_evicted(incomplete_head)
        self.assertStatus(idle.ask("GET", "/"), 200)
        self.assert_open(other)

    def test_incomplete_heads_per_address_are_limited_to_a_quarter_of_the_connections(self):
        server = self.serve(max_connections="12")
        idle = []
        for _ in range(4):      # sequentially: each has completed a request before the next one connects
            idle.append(self.client(server))
            self.assertStatus(idle[-1].ask("GET", "/"), 200)
        other = self.incomplete_head(server, "127.0.0.3")
        clients = [self.incomplete_head(server, "127.0.0.2") for _ in range(5)]
        self.assert_evicted(*clients[:2])
        self.assert_open(*clients[2:], other)
        for client in idle:
            self.assertStatus(client.ask("GET", "/"), 200)

    def test_incomplete_head_limit_does_not_apply_to_a_trusted_proxy(self):
        server = self.serve(max_connections="8", trusted_proxies="127.0.0.2")
        self.assert_open(*[self.incomplete_head(server, "127.0.0.2") for _ in range(8)])

    def test_client_that_does_not_read_is_evicted_unless_its_token_is_valid(self):
        server = self.serve(max_connections="2")
        self.fake.replies["/api/chat"] = Reply.stream(*[b"x" * 65536] * 120)
        valid = self.begin("POST", "/api/chat", CHAT, token=self.admin, server=server)
        self.assertStatus(valid.head(), 200)
        public = self.client(server)
        public.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        public.send(request("GET", "/docs") * 500)
        self.assertStatus(public.head(), 200)
        eventually(lambda: [connection.waits_for_client for connection in server.connections._active] == [True, True], "all buffers to fill")
        for _ in range(3):
            self.assertStatus(self.ask_until_there_is_room(server), 200)
        pieces = iter(lambda: valid.socket.recv(1 << 20)[-5:], b"")     # Client.read would take seconds
        self.assertIn(b"0\r\n\r\n", pieces, "the response to the valid token must be complete")


def clients_sockets(clients):
    return [client.socket for client in clients]


class Tls(OverTls, GatewayCase):

    def test_certificate_and_key_can_share_one_file(self):
        with open(self.cert, "rb") as cert, open(self.key, "rb") as key:
            both = self.write("both.pem", cert.read() + key.read())
        client = self.client(self.serve(tls_cert=both, tls_key=""))
        self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(self.token)), 200)

    def test_upload_gets_503_when_the_server_stops(self):
        client = self.client()
        client.send(request("POST", "/api/chat", None, [*bearer(self.token), ("Content-Length", "9"), ("Expect", "100-continue")]))
        self.assertEqual(client.head().status, 100)
        client.send(b"half")
        threading.Thread(target=self.server.connections.drain, args=(0,)).start()
        answer = client.answer()
        client.socket.sendall(b" more")     # not reset
        self.assertIn("stop", self.assertRefused(answer, 503))

    def fake_over_tls(self):
        fake = FakeOllama()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)
        fake.socket = context.wrap_socket(fake.socket, server_side=True)
        self.enter(running(fake))
        return fake

    def test_tls_upstream_is_accepted_only_with_a_trusted_certificate(self):
        fake = self.fake_over_tls()
        for trusted, status in ((self.cert, 200), (os.devnull, 502)):
            with self.subTest(status), unittest.mock.patch.dict(os.environ, SSL_CERT_FILE=trusted):
                server = self.serve(ollama_url="https://localhost:%d" % fake.server_address[1])
                self.assertStatus(self.ask("GET", "/api/tags", server=server), status)

    def test_blob_is_forwarded_to_a_tls_upstream(self):
        fake = self.fake_over_tls()
        with unittest.mock.patch.dict(os.environ, SSL_CERT_FILE=self.cert):
            server = self.serve(ollama_url="https://localhost:%d" % fake.server_address[1])
        client = self.client(server)
        client.send(request("POST", f"/api/blobs/{DIGEST}", None, [*bearer(self.admin), ("Transfer-Encoding", "chunked")]), b"3\r\nabc\r\n")
        eventually(lambda: fake.arrived == 3, "the first chunk")   # TLS session tickets have arrived by now and must not count as a response
        client.send(b"3\r\ndef\r\n", b"0\r\n\r\n")
        self.assertStatus(client.answer(), 200)
        self.assertEqual(fake.received[0].body, b"abcdef")

    def test_connection_over_the_limit_is_closed_without_a_response(self):
        hold, server = self.hold(), self.serve(max_connections="1")
        self.fake.replies["/api/chat"] = Reply.stream(LINE, hold)
        busy = self.begin("POST", "/api/chat", CHAT, server=server)
        begun = busy.read(busy.head(), until=LINE)
        self.assertIsNone(self.plain_client(server).answer(), "a response would require a handshake")
        hold.set()
        self.assertEqual(busy.read(begun).ended, "clean")

    def test_incomplete_handshakes_do_not_block_valid_tokens(self):
        server = self.serve(max_connections="8")
        clients = [self.plain_client(server) for _ in range(8)]
        for client in clients:
            client.send(b"\x16\x03\x01")     # the start of a ClientHello
        for _ in range(8):
            client = self.client(server)
            self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(self.token)), 200)
        for client in clients:
            with contextlib.suppress(ConnectionResetError):
                self.assertEqual(client.stream.read(1), b"")

    def test_connection_evicted_while_its_socket_is_being_wrapped_is_closed(self):
        take_over = self.server.tls.wrap_socket

        def wrap_socket(*args, **how):
            wrapped = take_over(*args, **how)
            self.server.connections.evict()
            return wrapped
        with unittest.mock.patch.object(self.server, "tls", unittest.mock.Mock(wrap_socket=wrap_socket)):
            self.assertEqual(self.plain_client().stream.read(1), b"")

    def test_plaintext_and_silent_connections_do_not_block_others(self):
        silent, plain = self.plain_client(), self.plain_client()
        plain.send(request("GET", "/api/tags", headers=bearer(self.token)))
        self.assertStatus(self.ask("GET", "/api/tags"), 200)
        with contextlib.suppress(ConnectionError):
            self.assertNotIn(b"HTTP/1.1 200", plain.stream.read(4096) or b"")
        silent.close()


@unittest.skipIf(os.name == "nt", "stops by signals")
class CpuAffinity(unittest.TestCase):
    """The process is pinned to one core, the one that other processes use least."""

    def cores_chosen(self, *rounds, cores=(0, 1, 2), failures=()):
        """The core chosen in each round; `rounds` are the seconds that other processes used each core during the round."""
        busy, own, moves, left = dict.fromkeys(cores, 0.0), [0.0], [], list(rounds)

        def pass_time(_=None):
            if not left:
                raise KeyboardInterrupt("the end of the test")
            for core, used in enumerate(left.pop(0)):
                busy[core] = busy.get(core, 0.0) + used
            if moves:
                busy[min(moves[-1])] += 4   # used by the gateway itself
                own[0] += 4
        clock = unittest.mock.Mock(sleep=pass_time, process_time=lambda: own[0])
        system = unittest.mock.Mock(sched_getaffinity=lambda _: set(cores), listdir=lambda _: ["7"])
        system.sched_setaffinity.side_effect = lambda thread, chosen: moves.append(chosen)
        pass_time()
        read = unittest.mock.Mock(side_effect=[*failures, *[lambda: dict(busy)] * 9])
        with unittest.mock.patch.multiple(gateway, time=clock, os=system, core_seconds=lambda: read()()), \
                contextlib.suppress(KeyboardInterrupt):
            gateway.stay_on_one_core()
        return [min(chosen) for chosen in moves]

    def test_core_selection_is_retried_after_file_descriptors_ran_out(self):
        self.assertEqual(self.cores_chosen((9, 5, 7), (0, 0, 0), failures=[OSError(errno.EMFILE, "Too many open files")]), [1])

    def test_least_used_core_is_chosen_and_changed_only_for_a_clear_gain(self):
        for label, rounds, chosen in (("least used so far", [(9, 5, 7)], [1]), ("small gain", [(9, 5, 7), (5, 0.5, 0)], [1, 1]),
                                      ("clear gain", [(9, 5, 7), (5, 4, 0.2)], [1, 2]), ("no gain", [(9, 5, 7), (5, 5, 5)], [1, 1])):
            with self.subTest(label):
                self.assertEqual(self.cores_chosen(*rounds), chosen)

    def test_affinity_is_unchanged_with_one_core_or_without_proc_or_affinity_support(self):
        self.assertEqual(self.cores_chosen((5,), (5,), cores=(0,)), [])
        self.assertEqual(self.cores_chosen((9, 5, 7), failures=[FileNotFoundError()] * 9), [])
        with unittest.mock.patch.object(gateway, "os", unittest.mock.Mock(spec=[])):
            gateway.stay_on_one_core()

    @unittest.skipUnless(os.path.exists("/proc/stat"), "needs Linux")
    def test_busy_seconds_per_core_are_read_from_proc_stat(self):
        stat = b"cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 100 20 30 4000 500 6 7 8 0 0\ncpu1 1 1 1 1 1 1 1 1 0 0\nintr 5\n"
        with unittest.mock.patch.object(gateway, "open", unittest.mock.mock_open(read_data=stat), create=True):
            found = gateway.core_seconds()
        tick = os.sysconf("SC_CLK_TCK")
        self.assertEqual(found, {0: 171 / tick, 1: 6 / tick})

    @unittest.skipUnless(hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1, "needs two cores, and Linux")
    def test_served_process_and_all_its_threads_run_on_one_core(self):
        with tempfile.TemporaryDirectory() as folder, Serving(folder, "--port", "0", "--ollama-url", "http://127.0.0.1:1") as serving:
            with Client(serving.server_address) as client:
                self.assertEqual(client.ask("GET", "/").status, 200)
                def cores():
                    return [tuple(os.sched_getaffinity(int(thread))) for thread in os.listdir(f"/proc/{serving.process.pid}/task")]
                eventually(lambda: set(map(len, cores())) == {1} and len(set(cores())) == 1, "all threads to be pinned to one core")
                self.assertGreater(len(cores()), 2, "the server has several threads")
        self.assertGreater(len(os.sched_getaffinity(0)), 1, "the test process must not be pinned")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def popen_as(popen, program, argv, **kwargs):
    """Run `program` instead of the gateway's file."""
    at = argv.index(GATEWAY)
    return popen([*argv[:at], *program, *argv[at + 1:]], **kwargs)


def connected(address):
    """A client, None if nothing listens at the address."""
    with contextlib.suppress(ConnectionRefusedError):
        return Client(address)


def popen_with(prefix, popen, argv, **kwargs):
    return popen([*prefix, *argv], **kwargs)


HOSTILE = ("<img src=x onerror='window.hit=1'>", '"><script>window.hit=1</script>')
KEY = "ollama_gateway.token"


def chat_line(text, **more):
    return compact({"message": {"role": "assistant", "content": text, **more}, "done": False}) + b"\n"


LAST_CHAT_LINE = compact({"message": {"role": "assistant", "content": ""}, "done": True, **COUNTS, "eval_duration": 10 ** 9}) + b"\n"


@unittest.skipUnless(hasattr(resource, "prlimit") and os.path.isdir("/proc/self/fd"), "needs Linux")
class FileDescriptorExhaustion(GatewayCase):
    """The process really runs out of file descriptors: its limit is lowered while it runs."""

    def start_gateway(self, *argv, url=None, preexec=None):
        # A separate address: the gateway of another test may still probe a port of 127.0.0.1 that its stopped upstream used.
        return self.enter(Serving(self.folder, "--host", "127.0.0.2", "--port", "0", "--ollama-url", url or self.fake.url, "--db", self.db,
                                  "--metrics-open", *argv, preexec=preexec))

    @staticmethod
    def used(serving):
        return {int(name) for name in os.listdir(f"/proc/{serving.process.pid}/fd")}

    def limit_descriptors(self, serving, free):
        """Lower the process's limit so that it can open only `free` more descriptors."""
        used = self.used(serving)
        limit = max(limit for limit in range(max(used) + free + 2) if limit - sum(number < limit for number in used) == free)
        resource.prlimit(serving.process.pid, resource.RLIMIT_NOFILE, (limit, resource.prlimit(serving.process.pid, resource.RLIMIT_NOFILE)[1]))

    def lift_limit(self, serving):
        hard = resource.prlimit(serving.process.pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(serving.process.pid, resource.RLIMIT_NOFILE, (hard, hard))

    def used_client(self, serving):
        """A connection that has completed a request, and so needs no further descriptors."""
        client = self.client(serving)
        self.assertStatus(client.ask("GET", "/me", headers=bearer(self.token)), 200)
        return client

    def streaming(self, serving, hold):
        self.fake.replies["/api/chat"] = [Reply.stream(LINE, hold), Reply.stream(LINE)]
        client = self.begin("POST", "/api/chat", CHAT, server=serving)
        client.begun = client.read(client.head(), until=LINE)
        return client

    def assert_out_of_descriptors(self, serving, client, body=CHAT):
        """Check the refusal, the metrics and that there is exactly one warning."""
        for _ in range(3):
            text = self.assertRefused(client.ask("POST", "/v1/chat/completions", body, bearer(self.token)), 503, "/v1/chat/completions")
            self.assertEqual(text, gateway.REFUSALS["no_descriptors"].meaning)
        warnings_ = eventually(lambda: [line for line in serving.lines if "ulimit -n" in line], "the warning")
        self.assertEqual(len(warnings_), 1, "at most one warning a minute")
        self.assertRegex(warnings_[0], "WARNING.*LimitNOFILE.*--max-connections")
        self.assertNotIn("Traceback", "".join(serving.lines))
        self.assertNotIn("upstream_errors_total{", client.ask("GET", "/metrics").body.decode())

    def test_no_descriptor_for_the_upstream_connection_is_503_not_502(self):
        for host in "127.0.0.1", "localhost":
            with self.subTest(host):
                hold, serving = self.hold(), self.start_gateway(url=self.fake.url.replace("127.0.0.1", host))
                client, stream = self.used_client(serving), self.streaming(serving, hold)
                self.limit_descriptors(serving, 0)
                self.assert_out_of_descriptors(serving, client)
                hold.set()
                self.assertEqual(stream.read(stream.begun).ended, "clean")
                stream.close()
                self.assertStatus(client.ask("POST", "/v1/chat/completions", CHAT, bearer(self.token)), 200)

    def test_no_descriptor_for_a_large_body_is_503(self):
        serving, body = self.start_gateway(), compact({**CHAT, "images": ["x" * 2_000_000]})
        for attempt in range(2):
            client = self.used_client(serving)
            self.limit_descriptors(serving, 0)
            text = self.assertRefused(client.ask("POST", "/api/chat", body, bearer(self.token)), 503)
            self.assertEqual(text, gateway.REFUSALS["no_descriptors"].meaning)
            self.lift_limit(serving)
        self.assertStatus(self.ask("POST", "/api/chat", body, server=serving), 200)
        eventually(lambda: sum("ulimit -n" in line for line in serving.lines) == 1, "the one warning")

    def test_fewer_than_two_descriptors_for_the_queue_is_503(self):
        hold, serving = self.hold(), self.start_gateway("--max-parallel", "1")
        client, stream = self.used_client(serving), self.streaming(serving, hold)
        self.limit_descriptors(serving, 1)
        self.assert_out_of_descriptors(serving, client)
        hold.set()
        self.assertEqual(stream.read(stream.begun).ended, "clean")
        self.assertStatus(client.ask("POST", "/api/chat", CHAT, bearer(self.token)), 200)

    def test_no_descriptor_for_a_new_client_evicts_an_idle_connection(self):
        serving = self.start_gateway()
        idle = self.used_client(serving)
        self.limit_descriptors(serving, 0)
        for _ in range(5):      # each evicts the one before it
            self.assertStatus(self.client(serving).ask("GET", "/"), 200)
        self.assertIsNone(idle.answer())
        eventually(lambda: sum("ulimit -n" in line for line in serving.lines) == 1, "the one warning")
        self.lift_limit(serving)
        self.assertStatus(self.ask("POST", "/api/chat", CHAT, server=serving), 200)

    def test_connection_needs_four_descriptors_queued_and_three_while_forwarding(self):
        hold, serving = [self.hold(), self.hold()], self.start_gateway("--max-parallel", "1")
        stream, before = self.streaming(serving, hold[0]), len(self.used(serving))
        self.fake.replies["/api/chat"] = Reply.stream(LINE, hold[1])
        client = self.begin("POST", "/api/chat", compact({**CHAT, "images": ["x" * 2_000_000]}), server=serving)
        eventually(lambda: len(self.used(serving)) == before + 4, "the request to be queued with its body on disk")
        hold[0].set()
        stream.read(stream.begun)
        client.read(client.head(), until=LINE)
        self.assertEqual(len(self.used(serving)), before + 2, "the upstream connection of the stream must be reused")
        hold[1].set()

    def test_burst_under_a_low_hard_limit_is_served_up_to_the_reduced_cap(self):
        limits = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (256, 256))
        hold, body = self.hold(), compact({**CHAT, "images": ["x" * 1_100_000]})
        serving = self.start_gateway(preexec=limits)
        self.fake.replies["/api/chat"] = Reply.stream(LINE, hold)
        expected_cap = (256 - gateway.POOL_SIZE - gateway.SPARE_DESCRIPTORS) // gateway.CONNECTION_DESCRIPTORS
        self.assertIn(f"Only {expected_cap} connections fit", eventually(lambda: serving.lines[1:] and serving.lines[1]))
        tokens = [self.store.create("eve", f"phone {number}")[1] for number in range(expected_cap)]
        clients = [self.begin("POST", "/api/chat", body, token, serving) for token in tokens]
        begun = [client.read(client.head(), until=LINE) for client in clients]
        self.assertEqual({answer.status for answer in begun}, {200})
        self.assertIn("too many connections", self.ask("GET", "/", server=serving).json()["error"])
        hold.set()
        self.assertEqual({client.read(answer).ended for client, answer in zip(clients, begun)}, {"clean"})
        eventually(lambda: self.ask("POST", "/api/chat", body, server=serving).status == 200, "a free connection")
        self.assertFalse([line for line in serving.lines if "ulimit -n" in line][1:])


@unittest.skipIf(os.name == "nt", "stops by signals")
class GracefulShutdown(Case):
    """After a stop signal, new connections are refused, and running requests finish or are visibly truncated."""

    def setUp(self):
        super().setUp()
        self.fake = self.enter(running(FakeOllama()))
        self.fake.replies["/api/chat"] = Reply.stream(LINE, until_hangup)
        self.token = self.open_store().create("ada", "laptop")[1]

    def begin_and_stop(self, drain, version="1.1"):
        """Start a gateway with one running stream and one idle connection, and send it SIGTERM."""
        self.serving = self.enter(Serving(self.folder, "--port", "0", "--ollama-url", self.fake.url, "--db", self.db, "--drain-timeout", drain))
        idle, busy = (self.enter(Client(self.serving.server_address)) for _ in range(2))
        self.assertEqual(idle.ask("GET", "/health").status, 200)
        busy.send(request("POST", "/api/chat", CHAT, bearer(self.token), version))
        answer = busy.read(busy.head(), until=LINE)
        self.serving.process.send_signal(signal.SIGTERM)
        self.assertIsNone(idle.answer(), "the idle connection must be closed first")
        with self.assertRaises(OSError):
            Client(self.serving.server_address).close()
        return busy, answer

    def test_running_stream_finishes_and_new_connections_are_refused(self):
        hold = self.hold()
        self.fake.replies["/api/chat"] = Reply.stream(LINE, hold, LINE)
        busy, answer = self.begin_and_stop("30s")
        hold.set()
        self.assertEqual((busy.read(answer).body, answer.ended), (LINE + LINE, "clean"))
        self.assertEqual(self.serving.wait(), 0)

    def test_stream_beyond_the_drain_timeout_is_visibly_truncated(self):
        for version in "1.1", "1.0":
            with self.subTest(version):
                busy, answer = self.begin_and_stop("0.2s", version)
                self.assertEqual(busy.read(answer).ended, "cut")
                if version == "1.1":
                    self.assertRegex(answer.body[len(LINE):], rb'\A\{"error": ".*stop.*"\}\n\Z')
                self.assertEqual(self.serving.wait(), 0)
                self.assertEqual(self.fake.hangups.get(timeout=GUARD), "/api/chat")

    def test_upload_beyond_the_drain_timeout_gets_503(self):
        admin = self.open_store().create("root", "box", admin=True)[1]
        for path, goes_on in (("/api/chat", False), ("/api/chat", True), (f"/api/blobs/{DIGEST}", False)):
            with self.subTest(path, goes_on=goes_on):
                serving = self.enter(Serving(self.folder, "--port", "0", "--ollama-url", self.fake.url, "--db", self.db, "--drain-timeout", "0.2s"))
                client = self.enter(Client(serving.server_address))
                client.send(request("POST", path, None, [*bearer(admin), ("Content-Length", "50000000"), ("Expect", "100-continue")]))
                self.assertEqual(client.head().status, 100)
                client.send(b"x" * 100_000)
                serving.process.send_signal(signal.SIGTERM)
                if goes_on:
                    eventually(lambda client=client: client.send(b"x" * 1000) or select.select([client.socket], (), (), 0)[0], "the response")
                answer = client.answer()
                self.assertEqual((answer.status, answer.headers["connection"], serving.wait()), (503, "close", 0))
                self.assertIn("stop", answer.json()["error"])
        self.assertNotIn("POST", [seen.method for seen in self.fake.received])

    def test_request_accepted_as_the_signal_arrives_is_served(self):
        def begin(server, *args, begin=socketserver.ThreadingMixIn.process_request):
            begin(server, *args)
            raise KeyboardInterrupt
        settings = gateway.load_settings({"ollama_url": self.fake.url, "db": self.db, "host": "127.0.0.1", "port": "0"}, {})
        with contextlib.closing(gateway.TokenStore(self.db)) as store:
            server = gateway.build_server(settings, store)
            with Client(server.server_address) as client:
                with unittest.mock.patch.object(socketserver.ThreadingMixIn, "process_request", begin), self.assertRaises(KeyboardInterrupt):
                    server.handle_request()
                self.assertEqual(client.ask("GET", "/").body, b"Ollama is running")
            server.server_close()

    def test_second_signal_stops_without_draining(self):
        busy, answer = self.begin_and_stop("10m")
        self.serving.process.send_signal(signal.SIGINT)
        self.assertEqual(busy.read(answer).ended, "cut")
        self.assertEqual((self.serving.wait(), [line for line in self.serving.lines if "Traceback" in line]), (0, []))

    def test_many_signals_at_once_stop_it_cleanly(self):
        self.begin_and_stop("10m")
        for number in (signal.SIGINT, signal.SIGTERM) * 60:
            self.serving.process.send_signal(number)
        self.assertEqual((self.serving.wait(), [line for line in self.serving.lines if "Traceback" in line]), (0, []))

# == Routing and access =======================================================

USER_ROUTES = (
    ("GET", "/api/version"), ("GET", "/api/status"), ("GET", "/api/tags"), ("GET", "/api/ps"), ("POST", "/api/show"), ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"), ("GET", "/api/experimental/model-recommendations"),
    ("POST", "/api/generate"), ("POST", "/api/chat"), ("POST", "/api/embed"), ("POST", "/api/embeddings"), ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"), ("POST", "/v1/embeddings"), ("POST", "/v1/responses"), ("POST", "/v1/audio/transcriptions"),
    ("POST", "/v1/messages"))
ADMIN_ROUTES = (
    ("POST", "/api/pull"), ("POST", "/api/push"), ("POST", "/api/create"), ("POST", "/api/copy"), ("DELETE", "/api/delete"),
    ("POST", f"/api/blobs/{DIGEST}"),
    ("HEAD", f"/api/blobs/{DIGEST}"), ("POST", "/api/me"), ("POST", "/api/signout"), ("DELETE", "/api/user/keys/key-1"),
    ("POST", "/api/experimental/web_search"), ("POST", "/api/experimental/web_fetch"))
UNKNOWN_PATHS = (
    "/api", "/api/", "/api/nonsense", "/API/tags", "/api/tags/", "//api/tags", "/api//tags", "/./api/tags", "/api/./tags", "/api/../api/tags",
    "/api%2Ftags", "/api/%74ags", "/api/tags%00", "/api/tags;x", "/api\\tags", "/api/tags\\", "/api/blobs/", "/api/blobs/x/y",
    f"/api/blobs/{DIGEST}/..", "/api/user/keys/", "/api/user/keys/a/b", "/v1", "/v1/", "/v2/models", "/v1/models/", "/v1/models/a/b",
    "/v1/models/..", "/v1/models/a%20b", "/v1/models/%2e%2e", "/v1/messages/count_tokens", "/v1/images/generations", "/t/x/api/tags",
    "/debug/pprof/", "/metrics/", "/me/", "/index.html", "/favicon.ico", "/healthz")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
MODEL_BODY = {"model": "tiny", "name": "tiny", "stream": False}
FORM_BODY = (b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\ntiny\r\n'
             b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\nRIFF\0\r\n--x--\r\n')


class Routing(GatewayCase):

    def body_for(self, method):
        return MODEL_BODY if method in ("POST", "DELETE", "PUT", "PATCH") else None

    def test_user_routes_are_open_to_any_token(self):
        for method, path in USER_ROUTES:
            with self.subTest(f"{method} {path}"):
                self.fake.received.clear()
                form = path.endswith("/transcriptions")
                self.assertStatus(self.ask(method, path, FORM_BODY if form else self.body_for(method), FORM_TYPE if form else ()), 200)
                self.assertEqual(self.seen(), [(method, path)])

    def test_management_and_account_routes_require_an_admin_token(self):
        for method, path in ADMIN_ROUTES:
            with self.subTest(f"{method} {path}"):
                self.fake.received.clear()
                answer = self.ask(method, path, self.body_for(method))
                self.assertStatus(answer, 403) if method == "HEAD" else self.assertRefused(answer, 403)
                self.assertEqual(self.fake.received, [])
                self.assertStatus(self.ask(method, path, self.body_for(method), token=self.admin), 200)
                self.assertEqual(self.seen(), [(method, path)])

    def test_route_table_contains_no_other_routes(self):
        own = {"/", "/health", "/me", "/metrics", "/docs", "/openapi.json", "/admin", "/admin/status", "/admin/usage", "/admin/tokens",
               "/admin/tokens/{id}", "/admin/tokens/{id}/rotate"}
        known = set(USER_ROUTES + ADMIN_ROUTES)
        for route in gateway.ROUTES:
            pattern = re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(route.path)))
            with self.subTest(f"{route.method} {route.path}"):
                self.assertTrue(route.path in own or any(method == route.method and pattern.fullmatch(path) for method, path in known))

    def test_head_is_accepted_wherever_get_is_and_has_no_body(self):
        for method, path in USER_ROUTES + (("GET", "/"), ("GET", "/health")):
            if method == "GET":
                with self.subTest(path), Client(self.server.server_address) as client:
                    client.send(request("HEAD", path, headers=bearer(self.token)), request("GET", path, headers=bearer(self.token)))
                    head, get = client.answer("HEAD"), client.answer()
                    self.assertEqual((head.status, head.headers.get("content-length")), (200, get.headers.get("content-length")))

    def test_wrong_method_is_405_with_the_allowed_methods(self):
        allowed = collections.defaultdict(set)
        for method, path in USER_ROUTES + ADMIN_ROUTES + (("GET", "/health"),):
            allowed[path] |= {"GET", "HEAD"} if method == "GET" else {method}
        for path, methods in allowed.items():
            for method in set(METHODS) - methods:
                with self.subTest(f"{method} {path}"):
                    answer = self.ask(method, path, self.body_for(method))
                    self.assertStatus(answer, 405)
                    self.assertEqual(set(re.split(", *", answer.headers["allow"])) - {"OPTIONS"}, methods)
        self.assertEqual(self.fake.received, [])

    def test_method_names_are_case_sensitive(self):
        for method in ("get", "Get"):
            with self.subTest(method):
                self.assertStatus(self.ask(method, "/api/tags"), 405)

    def test_unknown_path_is_404(self):
        for path in UNKNOWN_PATHS:
            for token in (self.token, self.admin):
                with self.subTest(path, token=token[:8]):
                    self.assertStatus(self.ask("GET", path, token=token), 404)
        self.assertEqual(self.fake.received, [])

    def test_refusals_use_the_error_format_of_the_api_dialect(self):
        for path in ("/api/nonsense", "/v1/nonsense", "/nonsense"):
            with self.subTest(path):
                self.assertRefused(self.ask("GET", path), 404, path)
        self.assertRefused(self.ask("GET", "/v1/chat/completions"), 405, "/v1/chat/completions")
        self.assertRefused(self.ask("GET", "/v1/messages"), 405, "/v1/messages")

    def test_model_name_in_path_may_contain_encoded_slash_and_colon(self):
        for path in ("/v1/models/library%2Ftiny%3Alatest", "/v1/models/tiny:latest", "/v1/models/library%2ftiny"):
            with self.subTest(path):
                self.fake.received.clear()
                self.assertStatus(self.ask("GET", path), 200)
                self.assertEqual(self.seen(), [("GET", path)])

    def test_query_string_does_not_affect_routing(self):
        self.assertStatus(self.ask("GET", "/api/tags?x=/../1&y=%00"), 200)
        self.assertStatus(self.ask("GET", "/api/nonsense?/api/tags"), 404)
        self.assertEqual(self.fake.received[0].path.partition("?")[0], "/api/tags")

    def test_root_path_is_served_without_the_upstream(self):
        self.fake.server_close()
        answer = self.ask("GET", "/", token="")
        self.assertStatus(answer, 200)
        self.assertEqual(answer.body, b"Ollama is running")
        self.assertTrue(answer.headers["content-type"].startswith("text/plain"))

    def test_health_reports_whether_the_upstream_responds(self):
        self.assertEqual((self.health(), self.seen()), ("down", []), "before the first probe")
        self.probe_health()
        answer = self.ask("GET", "/health", token="")
        self.assertEqual((answer.status, answer.json()["status"], answer.json()["upstream"]), (200, "ok", "up"))
        self.assertEqual(set(answer.json()), {"status", "upstream", "version"})

    def test_health_is_ok_while_the_upstream_is_down(self):
        self.fake.server_close()
        self.probe_health()
        answer = self.ask("GET", "/health", token="")
        self.assertEqual((answer.status, answer.json()["status"], answer.json()["upstream"]), (200, "ok", "down"))

    def test_base_path_replaces_only_the_api_prefix(self):
        server = self.serve(base_path="/team/ollama")
        for path, upstream in (("/team/ollama/tags", "/api/tags"), ("/v1/models", "/v1/models"), ("/api/tags", None),
                               ("/team/ollama/v1/models", None),
                               ("/team/ollama/api/tags", None), ("/team/ollamatags", None), ("/team/ollama", None), ("/tags", None)):
            with self.subTest(path):
                self.fake.received.clear()
                self.assertStatus(self.ask("GET", path, server=server), 200 if upstream else 404)
                self.assertEqual(self.seen(), [("GET", upstream)] if upstream else [])

    def test_root_base_path_does_not_hide_the_gateways_own_routes(self):
        server = self.serve(base_path="/")
        for path, upstream in (("/tags", "/api/tags"), ("/v1/models", "/v1/models"), ("/api/tags", None), ("/version", "/api/version")):
            with self.subTest(path):
                self.fake.received.clear()
                self.assertStatus(self.ask("GET", path, server=server), 200 if upstream else 404)
                self.assertEqual(self.seen(), [("GET", upstream)] if upstream else [])
        self.assertEqual(self.ask("GET", "/", server=server).body, b"Ollama is running")
        self.assertEqual(self.ask("GET", "/health", server=server, token="").json()["status"], "ok")


PAGE = "https://app.example"


class Cors(GatewayCase):

    flags = {"cors_origins": PAGE + ",http://localhost:3000"}

    def preflight(self, origin=PAGE, path="/api/chat", server=None, method="POST", headers="authorization,content-type"):
        return self.ask("OPTIONS", path, token="", server=server, headers=[
            ("Origin", origin), ("Access-Control-Request-Method", method), ("Access-Control-Request-Headers", headers)])

    def test_preflight_needs_no_token_and_is_not_forwarded(self):
        answer = self.preflight()
        self.assertStatus(answer, 204)
        self.assertEqual(answer.body, b"")
        self.assertEqual(answer.headers["access-control-allow-origin"], PAGE)
        self.assertIn("origin", answer.headers["vary"].lower())
        self.assertEqual(self.fake.received, [])

    def test_preflight_allows_all_used_methods(self):
        allowed = {method.strip() for method in self.preflight().headers["access-control-allow-methods"].split(",")}
        self.assertGreaterEqual(allowed, {"GET", "POST", "DELETE"})

    def test_preflight_allows_the_request_headers_of_all_three_dialects(self):
        stainless = ["x-stainless-" + name for name in ("arch", "lang", "os", "package-version", "retry-count", "runtime", "timeout")]
        wanted = ("authorization", "content-type", "x-request-id", "x-api-key", "anthropic-version", "anthropic-beta",
                  "anthropic-dangerous-direct-browser-access", "openai-beta", "openai-organization", *stainless)
        answer = self.preflight(headers=",".join(wanted))
        allowed = {name.strip().lower() for name in answer.headers["access-control-allow-headers"].split(",")}
        self.assertEqual(set(wanted) - allowed, set())

    def test_unlisted_origin_gets_no_cors_headers(self):
        for origin in ("https://evil.example", "null", PAGE + ".evil.example", "http://app.example", PAGE + ":444", "https://APP.example.evil"):
            with self.subTest(origin):
                for answer in (self.preflight(origin), self.ask("GET", "/api/tags", headers=[("Origin", origin)])):
                    self.assertIn(answer.status, (200, 204))
                    self.assertEqual([name for name in answer.headers if name.startswith("access-control")], [])

    def test_responses_to_a_listed_origin_allow_it(self):
        for label, answer in (
            ("an answer", self.ask("GET", "/api/tags", headers=[("Origin", PAGE)])),
            ("a stream", self.ask("POST", "/api/chat", CHAT, headers=[("Origin", PAGE)])),
            ("a refusal", self.ask("GET", "/api/tags", token="", headers=[("Origin", PAGE)])),
            ("an unknown route", self.ask("GET", "/api/nonsense", headers=[("Origin", PAGE)])),
            ("a route of the gateway", self.ask("GET", "/health", headers=[("Origin", PAGE)])),
        ):
            with self.subTest(label):
                self.assertEqual(answer.headers.get("access-control-allow-origin"), PAGE)
                self.assertIn("origin", answer.headers["vary"].lower())

    def test_credentials_are_never_allowed(self):
        self.assertNotIn("access-control-allow-credentials", self.preflight().headers)

    def test_upstream_cors_headers_are_not_forwarded(self):
        self.fake.replies["/api/tags"] = Reply.json(200, {}, Access_Control_Allow_Origin="http://localhost",
                                                    Access_Control_Allow_Credentials="true")
        answer = self.ask("GET", "/api/tags", headers=[("Origin", PAGE)])
        self.assertEqual(answer.headers["access-control-allow-origin"], PAGE)
        self.assertNotIn("access-control-allow-credentials", answer.headers)

    def test_wildcard_allows_every_origin(self):
        server = self.serve(cors_origins="*")
        for answer in (self.preflight(server=server), self.ask("GET", "/api/tags", headers=[("Origin", PAGE)], server=server)):
            self.assertIn(answer.headers["access-control-allow-origin"], ("*", PAGE))

    def test_no_cors_headers_without_configured_origins(self):
        server = self.serve()
        for answer in (self.preflight(server=server), self.ask("GET", "/api/tags", headers=[("Origin", PAGE)], server=server)):
            self.assertIn(answer.status, (200, 204))
            self.assertEqual([name for name in answer.headers if name.startswith("access-control")], [])


class TokenInPath(GatewayCase):

    flags = {"path_tokens": "1", "base_path": "/ollama"}

    def at(self, rest, secret=None, method="GET", **kwargs):
        return self.ask(method, f"/t/{secret or self.token}{rest}", token="", **kwargs)

    def test_token_in_path_works_on_all_routes(self):
        for rest, upstream in (("/api/tags", "/api/tags"), ("/ollama/tags", "/api/tags"), ("/v1/models", "/v1/models"), ("/health", None)):
            with self.subTest(rest):
                self.fake.received.clear()
                self.assertStatus(self.at(rest), 200)
                self.assertEqual([path for method, path in self.seen() if path != "/api/version"], [upstream] if upstream else [])

    def test_ollama_cli_heartbeat_is_served_by_the_gateway(self):
        self.assertStatus(self.at("/", method="HEAD"), 200)
        self.assertEqual(self.at("/").body, b"Ollama is running")
        self.assertEqual(self.fake.received, [])

    def test_ollama_cli_heartbeat_is_served_for_any_token(self):
        for method in ("GET", "HEAD"):
            with self.subTest(method):
                self.assertStatus(self.at("/", "nonsense", method), 200)

    def test_refusals_with_token_in_path_use_the_error_format_of_the_api_dialect(self):
        for path, status in (("/v1/nonsense", 404), ("/v1/messages", 405), ("/v1/models/a:cloud", 403), ("/api/nonsense", 404)):
            with self.subTest(path):
                self.assertRefused(self.ask("GET", f"/t/{self.token}{path}", token=""), status, path)

    def test_invalid_token_in_path_is_403_with_the_message_of_the_401(self):
        refused = self.assertRefused(self.ask("GET", "/ollama/tags", token="ogw_nonsense"), 401)
        for secret in ("nonsense", self.token[:-1], self.token + "x", self.token.swapcase()):
            with self.subTest(secret):
                self.assertEqual(self.assertRefused(self.at("/api/tags", secret), 403), refused)

    def test_additional_credential_in_a_header_is_400(self):
        for headers in (bearer(self.token), bearer(self.admin), [("x-api-key", self.token)], bearer("nonsense")):
            with self.subTest(headers):
                self.assertRefused(self.at("/api/tags", headers=headers), 400)

    def test_admin_token_in_path_can_manage_models(self):
        for secret, status in ((self.token, 403), (self.admin, 200)):
            self.assertStatus(self.at("/api/delete", secret, "DELETE", body=MODEL_BODY), status)

    def test_nested_or_malformed_token_prefix_is_refused(self):
        for rest in (f"/t/{self.token}/api/tags", "/api/nonsense", "//api/tags", ""):
            with self.subTest(rest):
                self.assertStatus(self.at(rest), 404)
        for path in ("/t//api/tags", "/t/", "/t", f"/T/{self.token}/api/tags"):
            with self.subTest(path):
                self.assertIn(self.ask("GET", path, token="").status, (403, 404))
        self.assertEqual(self.fake.received, [])

    def test_token_in_path_is_neither_forwarded_nor_logged(self):
        self.assertStatus(self.at("/api/tags?x=1"), 200)
        self.assertEqual(self.logged()["path"], "/t/*/api/tags")
        upstream = self.upstream()
        self.assertNotIn(self.token, repr(upstream) + "".join(self.lines))

    def test_token_in_path_is_404_and_not_logged_with_the_option_off(self):
        server = self.serve()
        for secret in (self.token, "a-secret-of-another-form"):
            with self.subTest(secret):
                self.lines.clear()
                self.assertStatus(self.ask("GET", f"/t/{secret}/api/tags", token="", server=server), 404)
                self.assertEqual(self.logged()["path"][:4], "/t/*")
                self.assertNotIn(secret, "".join(self.lines))

    def test_header_credentials_still_work_with_the_option_on(self):
        self.assertStatus(self.ask("GET", "/ollama/tags"), 200)
        self.assertStatus(self.ask("GET", "/api/tags"), 404)


OTHER_MODELS = [dict(MODEL, name=name, model=name) for name in ("Tiny:Latest", "secret:7b", "ada/tiny:latest", "big:cloud")]
DISPOSITION = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'


def form(*fields, end=b"--x--\r\n", more=b""):
    """A multipart form of (name, value) pairs; `more` is appended to each Content-Disposition."""
    return b"".join(DISPOSITION % (name, more, value) for name, value in fields) + end


class ModelAllowList(GatewayCase):
    """A token with an allow-list can use only the models on it, whatever the request looks like."""

    def setUp(self):
        super().setUp()
        self.restricted = self.store.create("eve", "phone", models="tiny,ada/*")[1]

    def statuses_by_token(self, method, path, body=None, headers=()):
        """Send the request with the token with an allow-list, the one without and the admin's; return the statuses."""
        self.fake.received.clear()
        return [self.ask(method, path, body, headers, token=token).status for token in (self.restricted, self.token, self.admin)]

    def test_model_lists_contain_only_allowed_models(self):
        self.fake.replies["/api/tags"] = self.fake.replies["/api/ps"] = Reply.json(200, {"models": OTHER_MODELS, "more": 1.5})
        self.fake.replies["/v1/models"] = Reply.json(200, {"object": "list", "data": [dict(V1_MODEL, id=row["name"]) for row in OTHER_MODELS]})
        for path, key, name in (("/api/tags", "models", "name"), ("/api/ps", "models", "model"), ("/v1/models", "data", "id")):
            with self.subTest(path):
                for token, count in ((self.restricted, 2), (self.token, 4), (self.admin, 4)):
                    self.assertEqual(len(self.ask("GET", path, token=token).json()[key]), count)
                answer = self.ask("GET", path, token=self.restricted)
                self.assertEqual([row[name] for row in answer.json()[key]], ["Tiny:Latest", "ada/tiny:latest"])
                self.assertEqual(int(answer.headers["content-length"]), len(answer.body))
                head = self.ask("HEAD", path, token=self.restricted)
                self.assertEqual((head.headers["content-length"], head.body), (answer.headers["content-length"], b""))
        self.assertEqual(self.ask("GET", "/api/tags", token=self.restricted).json()["more"], 1.5)

    def test_model_list_that_cannot_be_filtered_is_502(self):
        for reply in (Reply.body(200, b'{"models": [{"name": "secret"}'), Reply.json(200, ["secret"]), Reply.json(200, {"other": ["secret"]}),
                      Reply.json(200, {"models": [{"nom": "secret"}]}), Reply.json(200, {"models": [{"model": 5}]})):
            self.fake.replies["/api/tags"] = reply
            self.assertNotIn("secret", self.assertRefused(self.ask("GET", "/api/tags", token=self.restricted), 502))
        self.fake.replies["/api/tags"] = Reply.json(500, {"error": "no"})
        self.assertEqual(self.ask("GET", "/api/tags", token=self.restricted).json(), {"error": "no"})
        self.fake.replies["/v1/models"] = Reply.json(200, {"object": "list", "data": None})
        self.assertEqual(self.ask("GET", "/v1/models", token=self.restricted).json()["data"], [])

    def test_model_not_allowed_is_403_on_every_route_that_names_a_model(self):
        for route in gateway.ROUTES:
            if not route.model_in or route.access == "admin":
                continue
            for model, status in (("tiny", 200), ("Library/TINY:latest", 200), ("ada/x:7b", 200), ("secret", 403), ("tiny:7b", 403),
                                  ("big:cloud", 403)):
                with self.subTest(route.path, model=model):
                    self.fake.received.clear()
                    path, body, headers = route.path.replace("{model}", model.replace("/", "%2F")), {"model": model}, ()
                    if route.model_in == "form":
                        body, headers = form((b"model", model.encode()), (b"prompt", b"secret")), FORM_TYPE
                    answer = self.ask(route.method, path, None if route.model_in == "path" else body, headers, token=self.restricted)
                    if status == 200:
                        self.assertTrue(self.fake.received, answer)
                    else:
                        message = self.assertRefused(answer, 403, path)
                        self.assertIn(model, message)
                        self.assertEqual(self.fake.received, [])

    def test_name_member_is_checked_if_model_is_missing(self):
        for body, status in (({"name": "secret"}, 403), ({"model": "", "name": "secret"}, 403), ({"model": None, "name": "secret"}, 403),
                             ({"model": "tiny", "name": "secret"}, 200), ({"name": "tiny"}, 200), ({}, 400), (None, 400), ({"model": ["tiny"]}, 400)):
            with self.subTest(body):
                self.assertEqual(self.statuses_by_token("POST", "/api/show", body), [status, 200, 200])

    def test_json_body_variants_do_not_bypass_the_allow_list(self):
        for label, body, statuses in (
            ("two keys that differ in case", b'{"model":"tiny","MODEL":"secret"}', (400, 400)),
            ("the same key twice", b'{"model":"secret","model":"tiny"}', (400, 400)),
            ("an escaped key", b'{"model":"tiny","mod\\u0065l":"secret"}', (400, 400)),
            ("one key in another case", b'{"MoDeL":"secret"}', (403, 200)),
            ("an escaped name", b'{"model":"\\u0073ecret"}', (403, 200)),
            ("an escaped cloud model", b'{"model":"big:\\u0063loud"}', (403, 403)),
            ("a cloud model in whitespace", b'{"model":" big:Cloud\\t\xc2\xa0"}', (403, 403)),
            ("a cloud model with tag local", b'{"model":"big:cloud:local"}', (403, 403)),
            ("a model after much whitespace", b'{"model":"' + b" " * 5000 + b'secret:cloud"}', (400, 400)),
            ("name before model", b'{"name":"tiny","model":"secret","x":{"model":"tiny"}}', (403, 200)),
            ("two names that differ in case", b'{"name":"tiny","Name":"secret"}', (400, 400)),
            ("two JSON values", b'{"model":"secret"}{"model":"tiny"}', (403, 200)),
            ("a JSON array", b'[{"model":"secret"}]', (400, 400)),
            ("invalid UTF-8", b'{"model":"tiny","x":"\xff"}', (400, 400)),
            ("a byte order mark", b'\xef\xbb\xbf{"model":"tiny"}', (400, 400)),
            ("UTF-16", '{"model":"tiny"}'.encode("utf-16"), (400, 400)),
            ("a NUL", b'{"model":"tiny\\u0000"}', (403, 200)),
            ("a digest", b'{"model":"tiny@sha256:00"}', (403, 200)),
            ("a registry's port", b'{"model":"registry.ollama.ai:443/library/tiny"}', (403, 200)),
            ("a path", b'{"model":"../tiny"}', (403, 200)),
            ("a glob", b'{"model":"*"}', (403, 200)),
        ):
            for path in "/api/chat", "/v1/chat/completions", "/v1/messages":
                with self.subTest(label, path=path):
                    self.assertEqual(self.statuses_by_token("POST", path, body), [*statuses, 200])
                    self.assertEqual([seen.body for seen in self.fake.received], [body] * (1 + statuses.count(200)), "not forwarded as sent")

    def test_form_body_variants_do_not_bypass_the_allow_list(self):
        path, tiny, secret = "/v1/audio/transcriptions", (b"model", b"tiny"), (b"model", b"secret")
        for label, body, kind, query, statuses in (
            ("only the model", form(tiny), None, "", (200, 200)),
            ("model and file", FORM_BODY, None, "", (200, 200)),
            ("a model not allowed", form(secret), None, "", (403, 200)),
            ("two models", form(tiny, secret), None, "", (400, 400)),
            ("no model", form((b"x", b"y")), None, "", (400, 200)),
            ("another model in the query, which Go's net/http prefers", form(tiny), None, "?model=secret", (400, 400)),
            ("a file field named model", form(tiny, more=b'; filename="a"'), None, "", (400, 400)),
            ("an encoded name", form((b"model*=utf-8''model\"; name=\"x", b"secret")), None, "", (400, 400)),
            ("no quotes, as .NET writes it", form(tiny, secret[::-1]).replace(b'"', b""), None, "", (200, 200)),
            ("a model not allowed, without quotes", form(secret).replace(b'"', b""), None, "", (403, 200)),
            ("binary content, as Dart writes it", form(tiny).replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: binary\r\n\r\n"), None, "",
             (200, 200)),
            ("filename before name", form(tiny, end=b'--x\r\nContent-Disposition: form-data; filename="a\\"b.wav"; name="file"\r\n\r\nx\r\n--x--'),
             None, "", (200, 200)),
            ("a leading line end", b"\r\n" + form(tiny), None, "", (200, 200)),
            ("two name parameters", form(tiny, more=b'; name="secret"'), None, "", (400, 400)),
            ("a backslash in the name", form((b'mod\\el', b"secret")), None, "", (400, 400)),
            ("no name", b'--x\r\nContent-Disposition: form-data; filename="a"\r\n\r\nx\r\n--x--', None, "", (400, 400)),
            ("quoted-printable content", form(tiny).replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n"), None, "",
             (400, 400)),
            ("a folded header", form(tiny).replace(b"; name", b";\r\n name"), None, "", (400, 400)),
            ("bare line ends", form(tiny).replace(b"\r\n", b"\n"), None, "", (400, 400)),
            ("a bare line end before a delimiter", form(tiny).replace(b"tiny\r\n", b'tiny\n--x\r\n'), None, "", (400, 400)),
            ("a preamble", b"x\r\n" + form(tiny), None, "", (400, 400)),
            ("an epilogue", form(tiny) + form(secret), None, "", (400, 400)),
            ("no closing delimiter", form(tiny, end=b""), None, "", (400, 400)),
            ("a longer boundary", form(tiny).replace(b"--x\r\n", b"--xy\r\n"), None, "", (400, 400)),
            ("two boundaries", form(tiny), "multipart/form-data; boundary=x; boundary=y", "", (400, 400)),
            ("an encoded boundary", form(tiny), "multipart/form-data; boundary*=utf-8''x", "", (400, 400)),
            ("a URL-encoded form", b"model=secret", "application/x-www-form-urlencoded", "", (400, 400)),
            ("a boundary in quotes", form(tiny), 'Multipart/Form-Data; charset=utf-8; boundary="x"', "", (200, 200)),
            ("many parts", form(tiny, *[(b"x", b"y")] * 100), None, "", (400, 400)),
        ):
            with self.subTest(label):
                headers = [("Content-Type", kind)] if kind else FORM_TYPE
                self.assertEqual(self.statuses_by_token("POST", path + query, body, headers), [*statuses, 200])

    def test_compressed_body_is_refused(self):
        for path in "/api/chat", "/v1/responses":
            self.assertEqual(self.statuses_by_token("POST", path, {"model": "tiny"}, [("Content-Encoding", "zstd")]), [415, 415, 200])

    def test_cloud_model_is_allowed_only_by_an_explicit_cloud_pattern(self):
        for models, status in (("*", 403), ("big*", 403), ("big:cloud", 200), ("*-cloud,*:cloud", 200)):
            token = self.store.create("bob", models.replace("*", "+"), models=models)[1]
            self.assertStatus(self.ask("POST", "/api/chat", {"model": "big:CLOUD"}, token=token), status)

    def test_allow_list_change_applies_to_the_next_request(self):
        with Client(self.server.server_address) as client:
            for models, status in (("tiny", 403), ("secret*", 200), (None, 200), ("x", 403)):
                self.store.update("eve", "phone", models=models)
                self.assertStatus(client.ask("POST", "/api/chat", {"model": "secret"}, bearer(self.restricted)), status)

    def test_admin_token_cannot_have_an_allow_list(self):
        with self.assertRaises(gateway.UsageError):
            self.store.create("eve", "box", admin=True, models="tiny")
        with self.assertRaises(gateway.UsageError):
            self.store.update("eve", "phone", admin=True)
        self.assertEqual([(token.name, token.admin) for token in self.store.list("eve")], [("phone", False)])

# == Authentication ===========================================================


def open_and_die_at(statement, path):
    """Open the store in a child process that kills itself before its n-th statement; False if it ended before."""
    child = os.fork()
    if child == 0:
        try:
            count = itertools.count(1)

            def killing(name):
                def execute(self, *args):
                    if next(count) == statement:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return getattr(sqlite3.Connection, name)(self, *args)
                return execute
            doomed = type("Doomed", (sqlite3.Connection,), {name: killing(name) for name in ("execute", "executemany", "executescript", "commit")})
            connect = sqlite3.connect
            sqlite3.connect = lambda *args, **kwargs: connect(*args, **{**kwargs, "factory": doomed})
            gateway.TokenStore(path).close()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


class Authentication(GatewayCase):

    def status(self, *headers, path="/api/tags"):
        with Client(self.server.server_address) as client:
            return client.ask("GET", path, headers=headers).status

    def test_valid_token_is_accepted_in_either_header_in_any_case(self):
        for headers in (("Authorization", "Bearer %s"), ("authorization", "bearer %s"), ("AUTHORIZATION", "BEARER %s"), ("x-api-key", "%s"),
                        ("X-API-Key", "%s")):
            with self.subTest(headers):
                self.assertEqual(self.status((headers[0], headers[1] % self.token)), 200)

    def test_same_token_in_both_headers_is_accepted(self):
        self.assertEqual(self.status(*bearer(self.token), ("x-api-key", self.token)), 200)

    def test_ambiguous_credentials_are_400(self):
        for label, headers in (
            ("two different tokens", [*bearer(self.token), ("x-api-key", self.admin)]),
            ("a valid and an invalid token", [*bearer(self.token), ("x-api-key", "nonsense")]),
            ("Authorization twice", bearer(self.token) * 2),
            ("Authorization twice, differing", bearer(self.token) + bearer(self.admin)),
            ("x-api-key twice", [("x-api-key", self.token)] * 2),
            ("x-api-key twice, differing in case", [("x-api-key", self.token), ("X-Api-Key", self.token)]),
        ):
            with self.subTest(label):
                self.assertEqual(self.status(*headers), 400)
        self.assertEqual(self.fake.received, [])

    def test_empty_credential_is_refused_even_if_a_row_has_its_digest(self):
        row = dict(ExportAndImport.ROW, name="phone", digest=hashlib.sha256(b"").hexdigest(), created_at=0, admin=1)
        self.store.import_rows([row])
        for headers in ((), (("Authorization", "Bearer "),), (("x-api-key", ""),), (("Authorization", ""),)):
            with self.subTest(headers):
                self.assertEqual(self.status(*headers), 401)

    def test_invalid_credentials_are_refused(self):
        digest = hashlib.sha256(self.token.encode()).hexdigest()
        for label, headers in (
            ("no header", []), ("an empty header", [("Authorization", "")]), ("no secret", [("Authorization", "Bearer")]),
            ("an empty secret", [("Authorization", "Bearer ")]), ("an empty key", [("x-api-key", "")]),
            ("another scheme", [("Authorization", f"Basic {self.token}")]), ("no scheme", [("Authorization", self.token)]),
            ("Ollama's own signature", [("Authorization", "AAAAC3NzaC1lZDI1NTE5:c2lnbmF0dXJl")]),
            ("an unknown token", bearer("ogw_" + "x" * 43)), ("a prefix", bearer(self.token[:-1])), ("a longer token", bearer(self.token + "x")),
            ("another case", bearer(self.token.swapcase())), ("its digest", bearer(digest)), ("its hint", bearer(self.token[:8])),
            ("two words", bearer(self.token + " x")), ("beyond ASCII", bearer("ogw_é" + "ÿ" * 40)), ("a quoted token", bearer(f'"{self.token}"')),
            ("a list", bearer(f"{self.token},{self.admin}")), ("a cookie", [("Cookie", f"token={self.token}")]),
            ("a proxy's header", [("Proxy-Authorization", f"Bearer {self.token}")]),
        ):
            with self.subTest(label):
                self.assertIn(self.status(*headers), (400, 401))
        self.assertIn(self.status(path=f"/api/tags?token={self.token}&key={self.token}"), (400, 401))
        self.assertEqual(self.fake.received, [])

    def test_unknown_expired_and_deleted_tokens_get_the_same_refusal(self):
        expired = self.store.create("ada", "old", expires_at=int(time.time()) - 60)[1]
        deleted = self.store.create("ada", "gone")[1]
        self.store.delete("ada", "gone")
        answers = [self.ask("GET", "/api/tags", token=secret) for secret in ("ogw_" + "x" * 43, expired, deleted)]
        self.assertEqual(len({self.assertRefused(answer, 401) for answer in answers}), 1)
        self.assertEqual({answer.headers["www-authenticate"] for answer in answers}, {"Bearer"})

    def test_deleted_token_is_refused(self):
        self.assertStatus(self.ask("GET", "/api/tags"), 200)
        self.store.delete("ada", "laptop")
        self.assertRefused(self.ask("GET", "/api/tags"), 401)

    def test_all_requests_are_refused_if_no_token_exists(self):
        self.store.delete("ada", "laptop")
        self.store.delete("root", "box")
        for token in ("", self.token, "ogw_", "x"):
            with self.subTest(token):
                self.assertRefused(self.ask("GET", "/api/tags", token=token), 401)

    def test_authentication_errors_use_the_error_format_of_the_api_dialect(self):
        for method, path, kinds in (("POST", "/api/chat", None), ("POST", "/v1/chat/completions", None), ("GET", "/v1/models", None),
                                    ("POST", "/v1/messages", "authentication_error")):
            with self.subTest(path):
                answer = self.ask(method, path, token="")
                self.assertRefused(answer, 401, path)
                if kinds:
                    self.assertEqual(answer.json()["error"]["type"], kinds)

    def test_route_is_checked_before_credentials(self):
        self.assertStatus(self.ask("GET", "/api/nonsense", token=""), 404)
        self.assertStatus(self.ask("GET", "/api/chat", token=""), 405)

    def test_framing_is_checked_before_the_route(self):
        with Client(self.server.server_address) as client:
            client.send(b"GET /nonsense HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
            self.assertStatus(client.answer(), 400)

    def test_public_routes_need_no_token(self):
        for method, path, status in (("GET", "/", 200), ("HEAD", "/", 200), ("GET", "/health", 200), ("HEAD", "/health", 200),
                                     ("OPTIONS", "/api/chat", 204)):
            with self.subTest(f"{method} {path}"):
                self.assertStatus(self.ask(method, path, token=""), status)

    def test_cloud_model_requires_an_admin_token(self):
        for model in ("big:cloud", "big:120b-cloud"):
            with self.subTest(model):
                self.assertRefused(self.ask("POST", "/api/chat", {**CHAT, "model": model}), 403)
                self.assertEqual(self.fake.received, [])
        self.assertStatus(self.ask("POST", "/api/chat", {**CHAT, "model": "big:cloud"}, token=self.admin), 200)

    def test_body_with_undeterminable_model_requires_an_admin_token(self):
        hidden = (("many brackets", b'{"x":[' + b"[]," * gateway.JSON_PARTS + b'[]],"model":"big:cloud"}', [], 413),
                  ("many quotes", b'{"x":"' + b'\\\\\\"' * 100_001 + b'","model":"big:cloud"}', [], 403),
                  ("many members", b"{" + b'"a":1,' * 50_000 + b'"model":"big:cloud"}', [], 413),
                  ("a long model", b'{"model":"' + b" " * gateway.VALUE_BYTES + b'big:cloud"}', [], 400),
                  ("compressed", b"(zstd)", [("Content-Encoding", "zstd")], 415))
        for label, body, headers, status in hidden:
            for path in ("/api/chat", "/v1/responses"):
                with self.subTest(label, path=path):
                    self.fake.received.clear()
                    self.assertRefused(self.ask("POST", path, body, headers), status, path)
                    self.assertEqual(self.fake.received, [])
                    self.assertStatus(self.ask("POST", path, body, headers, token=self.admin), 200)
        form = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + b'"{' * 200_000 + b"\r\n--x--\r\n"
        self.assertStatus(self.ask("POST", "/v1/audio/transcriptions", form, FORM_TYPE), 200)


class AuthenticationThrottling(GatewayCase):
    """Guessing tokens is slowed down, other requests are not."""

    def setUp(self):
        self.enter_patch = unittest.mock.patch.object(gateway, "FAILED_DELAY", 0.01)
        self.enter_patch.start()
        self.addCleanup(self.enter_patch.stop)
        super().setUp()

    def guess(self, path="/api/tags", server=None, **headers):
        return self.ask("GET", path, headers=list(headers.items()), token="nonsense", server=server)

    def test_repeated_failures_of_an_address_get_429_and_a_valid_token_still_passes(self):
        statuses = [self.guess().status for _ in range(gateway.MAX_FAILURES + 3)]
        self.assertEqual(set(statuses[:gateway.FREE_FAILURES]), {401})
        answer = self.guess("/v1/models")
        self.assertRefused(answer, 429, "/v1/models")
        self.assertGreater(int(answer.headers["retry-after"]), 0)
        self.assertStatus(self.ask("GET", "/api/tags"), 200)

    def test_missing_credential_is_not_counted_as_a_failure(self):
        for _ in range(gateway.MAX_FAILURES + 3):
            self.assertStatus(self.ask("GET", "/api/tags", token=""), 401)

    def test_address_reported_by_a_trusted_proxy_is_throttled(self):
        server = self.serve(trusted_proxies="127.0.0.0/8, 10.0.0.0/8")
        forwarded = {"X-Forwarded-For": "6.6.6.6, 192.0.2.7, 10.1.1.1"}
        for _ in range(gateway.MAX_FAILURES + 3):
            self.guess(server=server, **forwarded)
        self.assertStatus(self.guess(server=server, **forwarded), 429)
        self.assertStatus(self.guess(server=server, **{"X-Forwarded-For": "192.0.2.8"}), 401)
        self.assertEqual(self.logged()["peer"], "192.0.2.7")

    def test_forwarded_address_from_an_untrusted_peer_is_ignored(self):
        for label, trusted, forwarded_for, peer in (
            ("no trusted proxy", "", "192.0.2.7", "127.0.0.1"), ("another proxy", "10.0.0.1", "192.0.2.7", "127.0.0.1"),
            ("invalid header", "127.0.0.1", "192.0.2.7, unknown", "127.0.0.1"), ("empty header", "127.0.0.1", "", "127.0.0.1"),
            ("only proxies", "127.0.0.1", "127.0.0.1", "127.0.0.1"), ("IPv6", "127.0.0.1", "2001:DB8::1", "2001:db8::1"),
        ):
            with self.subTest(label):
                self.lines.clear()
                server = self.serve(trusted_proxies=trusted)
                self.assertStatus(self.ask("GET", "/api/tags", headers=[("X-Forwarded-For", forwarded_for)], server=server), 200)
                self.assertEqual(self.logged()["peer"], peer)

    def test_number_of_delayed_failures_is_bounded(self):
        clock = unittest.mock.Mock(wraps=time, sleep=self.hold().wait)
        with unittest.mock.patch.multiple(gateway, FAILED_DELAY=100, FREE_FAILURES=-30, time=clock):
            clients = [self.begin("GET", "/api/tags", token="nonsense") for _ in range(gateway.DELAYED_AT_ONCE + 2)]
            eventually(lambda: len(select.select(clients_sockets(clients), [], [], 0.01)[0]) == 2, "the refusal of the two requests over the limit")
            ready = select.select(clients_sockets(clients), [], [], 0)[0]
            self.assertEqual({client.answer().status for client in clients if client.socket in ready}, {429})
            self.assertStatus(self.ask("GET", "/api/tags"), 200)

    def test_failures_expire_one_by_one(self):
        now = [0.0]
        failures = gateway.AuthThrottle(clock=lambda: now[0])
        self.assertEqual([failures.add("192.0.2.7") for _ in range(3)], [1, 2, 3])
        now[0] += 2 * gateway.LEAK_SECONDS
        self.assertEqual((failures.add("192.0.2.7"), failures.add("192.0.2.8")), (2, 1))
        now[0] += 1e6
        self.assertEqual(failures.add("192.0.2.7"), 1)

    def test_ipv6_failures_count_per_network_and_table_size_is_bounded(self):
        failures = gateway.AuthThrottle(clock=lambda: 0.0)
        self.assertEqual([failures.add(peer) for peer in ("2001:db8::1", "2001:db8::2:3", "fe80::1%eth0", "2001:db8:0:1::1")], [1, 2, 1, 1])
        self.assertEqual([failures.add(peer) for peer in ("192.0.2.7", "::ffff:192.0.2.7")], [1, 2])
        for number in range(gateway.FAILING_ADDRESSES):
            failures.add(f"10.0.{number // 256}.{number % 256}")
        self.assertEqual(failures.add("2001:db8::1"), 1)

# == Limits and usage =========================================================

CHAT_ROUTE = next(route for route in gateway.ROUTES if route.path == "/api/chat")


class StubUsageLedger:
    """A usage ledger with a fixed usage, which records nothing."""

    spent_today = 0

    def spent(self, token):
        return self.spent_today

    def day_left(self):
        return 3600

    def start(self, context):
        """Record nothing."""

    update = start


class LimiterWithFakeClock(unittest.TestCase):

    def setUp(self):
        self.now = 1000.0
        self.ledger = StubUsageLedger()
        self.limiter = gateway.Limiter(gateway.FairQueue(0, 1, 1), self.ledger, lambda: self.now)

    def token(self, **limits):
        blank = dict.fromkeys(gateway.Token._fields)
        return gateway.Token(**{**blank, "id": 1, "user": "ada", "name": "laptop", **limits})

    def slot(self, token):
        context = gateway.RequestContext("", 0)
        context.token = token
        return gateway.Slot(self.limiter, context)

    def fields(self, token):
        return self.limiter.fields(self.slot(token).context)

    def admit(self, token):
        """Admit a request; return a function that ends it, or the code and Retry-After of the refusal."""
        held = contextlib.ExitStack()
        try:
            held.enter_context(self.slot(token)).wait(None, None)
        except gateway.Refusal as refusal:
            return refusal.code, dict(refusal.fields)["Retry-After"]
        return held.close

    def test_rate_limit_is_never_exceeded_in_any_minute(self):
        token, admitted = self.token(rpm=3), []
        for second in range(0, 400, 7):
            self.now = 1000.0 + second
            for _ in range(2):
                end = self.admit(token)
                if callable(end):
                    end()
                    admitted.append(self.now)
        self.assertTrue(all(sum(start <= moment < start + 60 for moment in admitted) <= 3 for start in admitted))
        self.assertGreaterEqual(len(admitted), 3 * 400 // 60, "the limit must be fully usable")

    def test_rate_limit_allows_no_double_burst_across_a_minute_boundary(self):
        token = self.token(rpm=2)
        self.now = 1019.0   # near a minute boundary
        self.assertTrue(callable(self.admit(token)) and callable(self.admit(token)))
        self.now = 1021.5
        self.assertEqual(self.admit(token), ("rate_limited", "58"))
        self.now = 1079.0
        self.assertTrue(callable(self.admit(token)))

    def test_refused_requests_do_not_count_toward_the_rate(self):
        token = self.token(rpm=1)
        self.admit(token)()
        for _ in range(5):
            self.assertEqual(self.admit(token)[0], "rate_limited")
        self.now += 60
        self.assertTrue(callable(self.admit(token)))

    def test_parallel_limit_is_enforced(self):
        token = self.token(max_parallel=2)
        ends = [self.admit(token), self.admit(token)]
        self.assertEqual(self.admit(token)[0], "too_many_at_once")
        ends[0]()
        self.assertTrue(callable(self.admit(token)))

    def test_spent_daily_budget_refuses_new_requests(self):
        token = self.token(tokens_per_day=10)
        self.ledger.spent_today = 9
        self.assertTrue(callable(self.admit(token)))
        self.ledger.spent_today = 13
        self.assertEqual(self.admit(token), ("budget_spent", "3600"))

    def test_lowered_rate_limit_applies_immediately(self):
        for _ in range(4):
            self.admit(self.token(rpm=9))
            self.now += 10
        self.assertEqual(self.admit(self.token(rpm=2)), ("rate_limited", "40"))
        self.assertTrue(callable(self.admit(self.token())), "a token without limits is never refused")

    def test_limit_nearest_exhaustion_is_in_the_ratelimit_fields(self):
        token = self.token(rpm=10, max_parallel=2, tokens_per_day=1000)
        self.assertEqual(self.fields(token), (("RateLimit-Limit", 10), ("RateLimit-Remaining", 10), ("RateLimit-Reset", 0)))
        ends = [self.admit(token), self.admit(token)]
        self.assertEqual(self.fields(token), (("RateLimit-Limit", 2), ("RateLimit-Remaining", 0), ("RateLimit-Reset", 5)))
        ends[0](), ends[1]()
        self.ledger.spent_today = 900
        self.assertEqual(self.fields(token), (("RateLimit-Limit", 1000), ("RateLimit-Remaining", 100), ("RateLimit-Reset", 3600)))
        self.assertEqual(self.fields(self.token()), ())

    def test_ratelimit_fields_exclude_the_slot_of_the_request_itself(self):
        token = self.token(max_parallel=1)
        slot = self.slot(token)
        with slot:
            self.assertEqual(dict(self.limiter.fields(slot.context))["RateLimit-Remaining"], 1)
            self.assertEqual(dict(self.fields(token))["RateLimit-Remaining"], 0)
        self.assertEqual(dict(self.limiter.fields(slot.context))["RateLimit-Remaining"], 1)

    def test_unreadable_usage_refuses_the_request(self):
        self.ledger.spent = unittest.mock.Mock(side_effect=gateway.Failure("no"))
        self.assertEqual(self.admit(self.token(tokens_per_day=10))[0], "uncounted")
        self.assertEqual(self.fields(self.token(tokens_per_day=10)), ())


class LimitsOverHttp(GatewayCase):
    """Limits of a token, tested over HTTP."""

    def limited_token(self, **limits):
        return self.store.create("eve", f"phone {len(self.store.list())}", **limits)[1]

    def test_exceeded_limit_is_429_in_the_api_dialect_and_names_the_limit(self):
        token = self.limited_token(rpm=1)
        self.assertStatus(self.ask("POST", "/api/chat", CHAT, token=token), 200)
        for path, kind in (("/api/chat", None), ("/v1/chat/completions", "rate_limit_error"), ("/v1/messages", "rate_limit_error")):
            with self.subTest(path):
                answer = self.ask("POST", path, CHAT, token=token)
                self.assertIn("1 request a minute", self.assertRefused(answer, 429, path))
                self.assertTrue(1 <= int(answer.headers["retry-after"]) <= 60)
                self.assertEqual(kind and answer.json()["error"]["type"], kind)
        self.assertEqual(len(self.fake.received), 1)

    def test_every_response_to_a_limited_token_has_ratelimit_fields(self):
        token = self.limited_token(rpm=2)
        for method, path, body, status, remaining in (
            ("GET", "/api/tags", None, 200, 2), ("POST", "/api/pull", {}, 403, 2), ("POST", "/api/chat", {"model": "a:cloud"}, 403, 2),
            ("POST", "/api/chat", CHAT, 200, 1), ("POST", "/api/embed", {"model": "tiny"}, 200, 0), ("POST", "/api/chat", CHAT, 429, 0),
            ("GET", "/me", None, 200, 0)):
            with self.subTest(path, status=status):
                answer = self.ask(method, path, body, token=token)
                self.assertStatus(answer, status)
                self.assertEqual([answer.headers.get(f"ratelimit-{name}") for name in ("limit", "remaining")], ["2", str(remaining)])
                self.assertTrue(0 <= int(answer.headers["ratelimit-reset"]) <= 60)
        self.assertNotIn("ratelimit-limit", self.ask("GET", "/api/tags").headers)

    def test_failed_and_cancelled_requests_count_but_refused_ones_do_not(self):
        token = self.limited_token(rpm=3)
        self.fake.replies["/api/chat"] = [Reply.json(404, {"error": "no"}), Reply.stream(LINE, until_hangup), Reply.json(200, {})]
        self.assertStatus(self.ask("POST", "/api/chat", {"model": "a:cloud"}, token=token), 403)
        self.assertStatus(self.ask("POST", "/api/chat", b"nonsense", token=token), 400)
        self.assertStatus(self.ask("POST", "/api/chat", CHAT, token=token), 404)
        client = self.begin("POST", "/api/chat", CHAT, token=token)
        client.read(client.head(), until=LINE)
        client.close()
        self.fake.hangups.get(timeout=GUARD)
        self.assertEqual([self.ask("POST", "/api/chat", CHAT, token=token).status for _ in range(3)], [200, 429, 429])

    def test_sequential_requests_never_exceed_a_parallel_limit_of_one(self):
        token = self.limited_token(max_parallel=1)
        self.assertEqual({self.ask("POST", "/api/chat", {**CHAT, "stream": number % 2 > 0}, token=token).status for number in range(60)}, {200})

    def test_parallel_slot_is_released_when_the_last_line_has_been_sent(self):
        """Clients stop reading at the last line, without waiting for the end of the body."""
        token, hold = self.limited_token(max_parallel=1), self.hold()
        for path, kind, pieces in (
                ("/api/chat", NDJSON, [LINE, compact({"done": True, "eval_count": 2}) + b"\n"]),
                ("/v1/chat/completions", SSE, [EVENT, b"data: [DONE]\n\n"]),
                ("/v1/messages", SSE, [EVENT, b"event: message_stop\ndata: {}\n\n"]),
                ("/v1/responses", SSE, [EVENT, b'event: response.completed\ndata: {"type":"response.completed","response":{}}\n\n'])):
            with self.subTest(path):
                self.fake.replies[path] = Reply.stream(*pieces, hold, kind=kind)
                client = self.begin("POST", path, {**CHAT, "stream": True}, token=token)
                client.read(client.head(), until=pieces[-1])
                self.assertStatus(self.ask("POST", "/api/embed", CHAT, token=token), 200)
                client.close()
        eventually(lambda: [row["requests"] for row in self.store.usage("user", 0) if row["user"] == "eve"] == [8], "the usage of all requests")
        self.assertEqual([row["cancelled"] for row in self.store.usage("user", 0)], [0], "requests whose last line was sent are not cancelled")

    def test_parallel_limit_applies_to_concurrent_clients(self):
        hold, token = self.hold(), self.limited_token(max_parallel=3)
        self.fake.replies["/api/chat"] = Reply.stream(LINE, hold, LINE)
        clients = [self.begin("POST", "/api/chat", CHAT, token=token) for _ in range(8)]
        heads = [client.head() for client in clients]
        self.assertEqual(sorted(head.status for head in heads), [200] * 3 + [429] * 5)
        hold.set()
        self.assertEqual([client.read(head).ended for client, head in zip(clients, heads)], ["clean"] * 8)
        self.assertStatus(self.ask("POST", "/api/chat", CHAT, token=token), 200)

    def test_spent_budget_stays_spent_after_a_restart(self):
        token = self.limited_token(tokens_per_day=20)   # each response costs 13
        self.assertEqual([self.ask("POST", "/api/chat", CHAT, token=token).status for _ in range(3)], [200, 200, 429])
        self.server.gateway.close()
        again = self.serve()
        answer = self.ask("POST", "/v1/chat/completions", CHAT, token=token, server=again)
        self.assertIn("20 tokens a day", self.assertRefused(answer, 429, "/v1/chat/completions"))
        self.assertTrue(0 < int(answer.headers["retry-after"]) <= 86400)
        self.assertEqual(answer.headers["x-should-retry"], "false", "otherwise SDKs sleep until midnight")
        self.store.update("eve", self.store.list("eve")[0].name, tokens_per_day=100)
        self.assertStatus(self.ask("POST", "/api/chat", CHAT, token=token, server=again), 200)

    def test_two_gateways_on_one_database_share_a_budget(self):
        token, other = self.limited_token(tokens_per_day=20), self.serve()
        self.assertStatus(self.ask("POST", "/api/chat", CHAT, token=token, server=other), 200)
        self.assertStatus(self.ask("POST", "/api/chat", CHAT, token=token), 200)
        eventually(lambda: self.ask("GET", "/me", token=token, server=other).json()["left"]["tokens_per_day"]["remaining"] == 0)
        self.assertStatus(self.ask("POST", "/api/chat", CHAT, token=token, server=other), 429)

    def test_limits_are_per_token(self):
        one, other = self.limited_token(rpm=1), self.limited_token(rpm=1)
        self.assertEqual([self.ask("POST", "/api/chat", CHAT, token=token).status for token in (one, other, one)], [200, 200, 429])


class FairQueueOrder(unittest.TestCase):

    def setUp(self):
        self.queue = gateway.FairQueue(1, 100, 60)
        self.addCleanup(LEAKS.check)

    def enter_queue(self, user):
        """Enter the queue; return the slot and a function that releases it."""
        context = gateway.RequestContext("", 0)
        context.token = unittest.mock.Mock(user=user)
        slot = gateway.Slot(None, context)
        self.queue.enter(slot)
        cleanup = contextlib.ExitStack()
        cleanup.callback(self.queue.leave, slot)
        self.addCleanup(cleanup.close)
        return slot, cleanup.close

    def served_order(self, entries):
        """End the running request until all are served; return the users in the order served."""
        order = []
        while entries:
            (running,) = [pair for pair in entries if pair[0].granted]
            order.append(running[0].user)
            entries.remove(running)
            running[1]()
        return "".join(order)

    def test_fifty_requests_of_one_user_delay_another_user_by_one_turn(self):
        entries = [self.enter_queue("a") for _ in range(50)] + [self.enter_queue("b")]
        self.assertEqual(self.served_order(entries), "ab" + "a" * 49)     # the first one is already running

    def test_delay_is_one_turn_with_a_third_users_request_running(self):
        entries = [self.enter_queue("c"), *[self.enter_queue("a") for _ in range(50)], self.enter_queue("b")]
        self.assertEqual(self.served_order(entries), "c" + "ab" + "a" * 49)

    def test_user_who_requeues_after_each_turn_gets_every_second_turn(self):
        entries, order = [self.enter_queue("a") for _ in range(10)], []
        entries.append(self.enter_queue("b"))
        while len(order) < 10:
            (running,) = [pair for pair in entries if pair[0].granted]
            order.append(running[0].user)
            entries.remove(running)
            running[1]()
            if running[0].user == "b":
                entries.append(self.enter_queue("b"))
        self.assertEqual("".join(order), "ab" * 5)

    def test_turns_are_round_robin_and_first_in_first_out_per_user(self):
        entries = [self.enter_queue(user) for user in "aaabbc"]
        slots = [slot for slot, _ in entries]
        woken = []
        for slot in slots:
            slot.wakeup and setattr(slot.wakeup, "set", lambda slot=slot: woken.append(slot))
        self.assertEqual(self.served_order(list(entries)), "abcaba")
        self.assertEqual([slot for slot in woken if slot.user == "a"], slots[1:3])
        self.assertEqual(self.queue._granted, {}, "the service history is cleared when nobody waits")

    def test_queue_grants_as_many_slots_as_its_limit(self):
        self.queue = gateway.FairQueue(3, 100, 60)
        entries = [self.enter_queue(user) for user in "aaaab"]
        self.assertEqual([slot.granted for slot, _ in entries], [True, True, True, False, False])
        self.assertEqual((self.queue.running, self.queue.waiting), (3, 2))
        entries[1][1]()
        entries[0][1]()
        self.assertEqual((self.queue.running, self.queue.waiting), (3, 0))

    def test_abandoned_queue_entry_is_skipped(self):
        entries = [self.enter_queue(user) for user in "aabab"]
        for number in (2, 3):
            entries.pop(2)[1]()
        self.assertEqual(self.served_order(entries), "aba")

    def test_waiting_requests_per_user_are_limited(self):
        self.queue = gateway.FairQueue(1, 2, 60)
        for user in "aaa":
            self.enter_queue(user)
        with self.assertRaises(gateway.Refusal) as caught:
            self.enter_queue("a")
        self.assertEqual(caught.exception.code, "queue_full")
        self.enter_queue("b")

    def test_no_request_waits_without_a_limit(self):
        self.queue = gateway.FairQueue(0, 1, 60)
        self.assertTrue(all(self.enter_queue("a")[0].granted for _ in range(50)))


class FairQueueOverHttp(GatewayCase):
    """The queue, tested over HTTP: one request at a time is forwarded."""

    flags = {"max_parallel": "1", "max_queue": "3"}

    def setUp(self):
        super().setUp()
        self.other = self.store.create("bob", "phone")[1]
        self.first = self.hold()
        self.fake.replies["/api/chat"] = [Reply.stream(LINE, self.first), Reply.stream(LINE)]

    def begin_first(self):
        client = self.begin("POST", "/api/chat", CHAT)
        return client, client.read(client.head(), until=LINE)

    def queue_requests(self, *tokens):
        """Queue requests one after the other, each with its own model name."""
        clients = []
        for number, token in enumerate(tokens):
            waiting = self.waiting()
            clients.append(self.begin("POST", "/api/chat", {**CHAT, "model": f"m{number}"}, token=token))
            eventually(lambda waiting=waiting: self.waiting() > waiting, "the request to be queued")
        return clients

    def waiting(self):
        lines = self.ask("GET", "/metrics", token=self.admin).body.decode().splitlines()
        return int(next(line for line in lines if line.startswith("ollama_gateway_queued_requests ")).split()[1])

    def test_waiting_requests_are_served_round_robin_by_user(self):
        self.begin_first()
        clients = self.queue_requests(self.token, self.token, self.other)
        self.assertStatus(self.ask("GET", "/api/tags"), 200)   # this route is not queued
        self.first.set()
        self.assertEqual([client.answer().status for client in clients], [200] * 3)
        order = [json.loads(seen.body)["model"] for seen in self.fake.received if seen.path == "/api/chat"]
        self.assertEqual(order, ["tiny", "m2", "m0", "m1"])
        self.assertTrue(float(self.logged(lambda fields: fields["model"] == "m1")["queued"]) > 0)

    def test_full_queue_is_503_and_does_not_count(self):
        self.begin_first()
        self.store.update("ada", "laptop", rpm=4)   # after the first request, which is not counted
        self.queue_requests(*[self.token] * 3)
        answer = self.ask("POST", "/v1/messages", CHAT)
        self.assertIn("--max-queue", self.assertRefused(answer, 503, "/v1/messages"))
        self.assertTrue(int(answer.headers["retry-after"]))
        me = self.ask("GET", "/me").json()
        self.assertEqual((me["usage"], me["left"]["rpm"]["remaining"]), ([], 1))
        self.store.update("ada", "laptop", rpm=3)
        self.assertRefused(self.ask("POST", "/v1/messages", CHAT), 429, "/v1/messages")
        self.first.set()

    def test_budget_spent_while_a_request_waits_refuses_it(self):
        self.fake.replies["/api/chat"] = [Reply.stream(compact({"done": False}) + b"\n", self.first,
                                                       compact({"done": True, "prompt_eval_count": 80, "eval_count": 50}) + b"\n")]
        self.store.update("ada", "laptop", tokens_per_day=100)
        client = self.begin("POST", "/api/chat", CHAT)
        client.read(client.head(), until=b"\n")
        waiting, = self.queue_requests(self.token)
        self.first.set()
        self.assertRefused(waiting.answer(), 429)

    def test_disconnected_client_leaves_the_queue_immediately(self):
        self.begin_first()
        for label, leave in LEAVING:
            with self.subTest(label):
                client, = self.queue_requests(self.token)
                leave(client)
                eventually(lambda: self.waiting() == 0, "the queue to be empty")
        self.first.set()
        self.assertEqual([seen.path for seen in self.fake.received].count("/api/chat"), 1)
        eventually(lambda: [row["cancelled"] for row in self.store.usage("user", 0)] == [3], "the usage of the cancelled requests")

    def test_queue_timeout_is_503_with_retry_after(self):
        server = self.serve(max_parallel="1", queue_timeout="0.2s")
        client = self.begin("POST", "/api/chat", CHAT, server=server)
        client.read(client.head(), until=LINE)
        answer = self.ask("POST", "/v1/chat/completions", CHAT, server=server)
        self.assertIn("--queue-timeout", self.assertRefused(answer, 503, "/v1/chat/completions"))
        self.assertTrue(int(answer.headers["retry-after"]))
        self.first.set()
        client.close()

    def test_client_disconnect_starts_the_next_request(self):
        self.fake.replies["/api/chat"] = [Reply.stream(LINE, until_hangup), Reply.stream(LINE)]
        running, _ = self.begin_first()
        waiting, = self.queue_requests(self.other)
        running.close()
        self.assertStatus(waiting.answer(), 200)

    def test_upstream_failure_starts_the_next_request(self):
        self.fake.replies["/api/chat"] = [Reply.stream(LINE, self.first, cut), Reply.json(500, {"error": "no"}), Reply.stream(LINE)]
        self.begin_first()
        clients = self.queue_requests(self.token, self.other)
        self.first.set()
        self.assertEqual([client.answer().status for client in clients], [200, 500], "the other user's turn comes first")

    def test_upstream_queue_full_503_is_forwarded_with_retry_after(self):
        for headers, retry_after in (({}, "5"), ({"Retry-After": "7"}, "7")):
            self.fake.replies["/api/chat"] = Reply.json(503, {"error": "server busy"}, **headers)
            answer = self.ask("POST", "/api/chat", CHAT)
            self.assertEqual((answer.status, answer.json(), answer.headers["retry-after"]), (503, {"error": "server busy"}, retry_after))

    def test_waiting_requests_count_toward_the_parallel_limit(self):
        self.begin_first()
        token = self.store.create("eve", "phone", max_parallel=1)[1]
        self.queue_requests(token)
        self.assertStatus(self.ask("POST", "/api/chat", CHAT, token=token), 429)
        self.first.set()


class UsageAccounting(GatewayCase):
    """Usage is recorded by user, token, model, route and hour."""

    def usage(self, by="user", **where):
        """Wait for usage rows and return them."""
        return eventually(lambda: self.store.usage(by, 0, **where), "usage rows")

    def assertUsage(self, **expected):
        row, = eventually(lambda: [row for row in self.store.usage("user", 0) if row["requests"] == expected.get("requests", 1)], "the usage row")
        self.assertEqual({key: row[key] for key in expected}, expected)

    def rows(self):
        with contextlib.closing(sqlite3.connect(self.db)) as db:
            return db.execute("SELECT user, name, model, route, requests, errors, cancelled, prompt_tokens, completion_tokens FROM usage "
                              "ORDER BY route").fetchall()

    def test_usage_is_counted_in_every_dialect_with_and_without_streaming(self):
        cases = [(path, stream, 8, 5) for path in ("/api/generate", "/api/chat", "/v1/chat/completions", "/v1/completions", "/v1/responses",
                                                    "/v1/messages") for stream in (True, False)]
        for path, stream, prompt, completion in cases + [("/api/embed", False, 3, 0), ("/v1/embeddings", False, 3, 0)]:
            with self.subTest(path, stream=stream):
                self.lines.clear()
                self.assertStatus(self.ask("POST", path, {**CHAT, "stream": stream}), 200)
                fields = self.logged()
                self.assertEqual((fields["prompt"], fields["completion"]), (str(prompt), str(completion)))
        self.assertUsage(requests=14, errors=0, cancelled=0, prompt_tokens=12 * 8 + 6, completion_tokens=60)

    def test_token_counts_are_null_where_ollama_reports_none(self):
        self.ask("POST", "/api/embeddings", {"model": "tiny"})
        self.ask("POST", "/v1/audio/transcriptions", FORM_BODY, FORM_TYPE)
        self.assertUsage(requests=2, errors=0, prompt_tokens=None, completion_tokens=None)
        self.ask("POST", "/api/embed", {"model": "tiny"})
        self.assertUsage(requests=3, prompt_tokens=3, completion_tokens=0)

    def test_include_usage_is_added_upstream_and_its_chunk_removed_from_the_response(self):
        for path in "/v1/chat/completions", "/v1/completions":
            expected = self.ask("POST", path, {**CHAT, "stream": True}, token=self.admin).body
            for label, options, requested in (("no stream_options", b"", False), ("null", b',"stream_options":null', False),
                                         ("other options", b',"stream_options":{"x":1}', False),
                                         ("include_usage false", b',"stream_options":{"include_usage":false}', False),
                                         ("include_usage true", b',"stream_options":{"include_usage":true}', True),
                                         ("include_usage in another case", b',"Stream_Options":{"Include_usage":true}', True)):
                with self.subTest(path, label=label):
                    self.fake.received.clear()
                    body = b' {"model":"tiny","stream":true' + options + b"} \n"
                    answer = self.ask("POST", path, body)
                    sent = self.upstream().body
                    if requested:
                        self.assertEqual(sent, body)
                    else:
                        self.assertEqual(sent, body.replace(b"} \n", b',"stream_options":{"include_usage":true}} \n'))
                        self.assertEqual(self.upstream().headers["content-length"], str(len(sent)))
                        self.assertEqual(answer.body, expected)
            self.assertNotIn(b"usage", expected)

    def test_include_usage_is_not_added_where_it_does_not_apply(self):
        for path, body in (("/v1/chat/completions", b'{"model":"tiny"}'), ("/v1/chat/completions", b'{"model":"tiny","stream":"true"}'),
                           ("/api/chat", b'{"model":"tiny","stream":true}'), ("/v1/messages", b'{"model":"tiny","stream":true}')):
            with self.subTest(path):
                self.fake.received.clear()
                self.ask("POST", path, body)
                self.assertEqual(self.upstream().body, body)

    def test_include_usage_injection_cannot_be_bypassed(self):
        path, options = "/v1/chat/completions", b',"stream_options":{"include_usage":true}}'
        for label, body in (("a null that Go ignores", b'{"model":"tiny","stream":true,"stream":null}'),
                            ("a long s that Go folds", '{"model":"tiny","ſtream":true}'.encode()),
                            ("long stream_options", b'{"model":"tiny","stream":true,"stream_options":{"x":"' + b"x" * 5000 + b'"}}'),
                            ("include_usage revoked", b'{"model":"tiny","stream":true,"stream_options":{"include_usage":true,'
                             b'"include_u\xc5\xbfage":false}}'),
                            ("long trailing whitespace", b'{"model":"tiny","stream":true}' + b" " * 100_000),
                            ("longer trailing whitespace, on disk", b'{"model":"tiny","stream":true}' + b" " * 2_000_000)):
            with self.subTest(label):
                self.fake.received.clear()
                self.assertStatus(self.ask("POST", path, body), 200)
                end = body.rindex(b"}")
                self.assertTrue(self.upstream().body == body[:end] + options + body[end + 1:])
        body = b'{"model":"tiny","stream":true,"stream_options":{"x":"' + b"x" * gateway.DECODED_BYTES + b'"}}'    # too long to inspect
        self.assertRefused(self.ask("POST", path, body), 400, path)

    def test_include_usage_is_added_to_a_body_spooled_to_disk(self):
        body = compact({**CHAT, "images": ["x" * 3_000_000], "stream": True})
        self.assertStatus(self.ask("POST", "/v1/chat/completions", body), 200)
        self.assertTrue(self.upstream().body == body[:-1] + b',"stream_options":{"include_usage":true}}')

    def test_upstream_error_is_forwarded_unchanged(self):
        self.fake.replies["/v1/chat/completions"] = Reply.json(404, {"error": {"message": "no", "usage": {}}}, kind="application/json")
        answer = self.ask("POST", "/v1/chat/completions", {**CHAT, "stream": True})
        self.assertEqual((answer.status, answer.json()), (404, {"error": {"message": "no", "usage": {}}}))
        self.assertEqual(answer.headers["content-length"], str(len(answer.body)))
        self.assertUsage(requests=1, errors=1, prompt_tokens=0, completion_tokens=0)

    def test_aborted_stream_counts_its_chunks_and_estimates_its_prompt(self):
        line = b'{"model":"tiny","message":{"role":"assistant","content":"x"},"done":false}\n'
        event = b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
        delta = b'event: content_block_delta\ndata: {"type":"content_block_delta"}\n\n'
        start = b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":4,"output_tokens":0}}}\n\n'
        text = response_event({"type": "response.output_text.delta", "delta": "x"})
        for path, kind, pieces, cost in (   # prompt: 240 bytes plus some JSON keys, 4 bytes a token
                ("/api/chat", NDJSON, [line] * 3, (72, 3)), ("/v1/chat/completions", SSE, [event] * 3, (72, 3)),
                ("/v1/messages", SSE, [start, delta, delta], (72, 2)), ("/v1/responses", SSE, [text], (72, 1))):
            for outcome, ending in (("broken", cut), ("left", until_hangup)):
                with self.subTest(path, outcome=outcome):
                    self.lines.clear()
                    self.fake.replies[path] = Reply.stream(*pieces, ending, kind=kind)
                    client = self.begin("POST", path, {**CHAT, "prompt": "word " * 48, "stream": True})
                    answer = client.read(client.head(), until=b"".join(pieces))
                    client.read(answer) if outcome == "broken" else client.close()
                    fields = self.logged()
                    self.assertEqual([fields[name] for name in ("outcome", "prompt", "completion", "estimated")],
                                     [outcome, *map(str, cost), str(sum(cost))])
        self.assertUsage(requests=8, errors=4, cancelled=4, prompt_tokens=576, completion_tokens=18, estimated_tokens=594)

    def test_client_disconnect_still_charges_the_prompt_to_the_budget(self):
        token = self.store.create("eve", "phone", tokens_per_day=2000)[1]
        line = b'{"model":"tiny","message":{"role":"assistant","content":"x"},"done":false}\n'
        self.fake.replies["/api/chat"] = [Reply.stream(line, until_hangup), Reply.raw(until_hangup)]
        for first in line, b"":     # also before the response head
            client = self.begin("POST", "/api/chat", {**CHAT, "prompt": "word " * 800}, token=token)
            client.read(client.head(), until=first) if first else eventually(lambda: len(self.fake.received) == 2, "the request upstream")
            client.close()
            self.assertEqual(self.fake.hangups.get(timeout=GUARD), "/api/chat")
            eventually(lambda count=2 - bool(first): len([line for line in self.lines if "outcome=left" in line]) == count, "the log line")
        self.assertRefused(self.ask("POST", "/api/chat", CHAT, token=token), 429)
        row, = eventually(lambda: [row for row in self.usage("user") if row["requests"] == 2], "the usage row")
        self.assertEqual((row["cancelled"], row["completion_tokens"], row["estimated_tokens"]), (2, 1, row["prompt_tokens"] + 1))
        self.assertGreater(row["prompt_tokens"], 2000)

    def test_response_without_counts_is_charged_an_estimate(self):
        self.store.update("ada", "laptop", tokens_per_day=10**9)
        for path, reply in (("/api/chat", Reply.json(200, {"message": {}})), ("/api/chat", Reply.body(200, b"x", Content_Type="text/plain")),
                            ("/v1/chat/completions", Reply.stream(events(CHUNK + '{"index":0}]}', "[DONE]"), kind=SSE)),
                            ("/api/generate", Reply.stream(b'{"error":"x"}\n'))):
            with self.subTest(path):
                self.lines.clear()
                self.fake.replies[path] = reply
                self.ask("POST", path, {**CHAT, "stream": True})
                self.assertGreaterEqual(int(self.logged()["prompt"]), 10)

    def test_failed_or_uncounted_requests_are_not_estimated(self):
        for path, reply in (("/api/chat", Reply.json(500, {"error": "x"})), ("/api/chat", Reply.raw()), ("/api/embeddings", None),
                            ("/api/chat", Reply.json(200, {"done": True, "done_reason": "load"})), ("/api/tags", None),
                            ("/api/chat", Reply.stream(b'{"done":true,"eval_count":2}\n'))):
            with self.subTest(path):
                self.lines.clear()
                self.fake.replies[path] = reply
                self.ask("GET" if path == "/api/tags" else "POST", path, CHAT)
                fields = self.logged()
                self.assertIn(fields.get("prompt"), ("0", "-", None))
                self.assertNotIn("estimated", fields)

    def test_estimate_uses_the_token_ratio_learned_for_the_model(self):
        token = self.store.create("eve", "phone", tokens_per_day=10**9)[1]
        self.fake.replies["/api/chat"] = Reply.json(200, {"done": True, "prompt_eval_count": 2000, "eval_count": 1})
        for images in (), ["iVBO" * 9000]:
            for _ in range(30):
                self.ask("POST", "/api/chat", {**CHAT, "prompt": "word " * 800 if not images else "", "images": images}, token=token)
        eventually(lambda: len(self.lines) == 60, "the log lines")
        self.lines.clear()
        self.fake.replies["/api/chat"] = Reply.json(200, {})
        self.ask("POST", "/api/chat", {**CHAT, "model": "TINY:latest", "prompt": "word " * 800}, token=token)
        estimate = int(self.logged()["prompt"])     # learned ratio: 2 bytes a token; images do not affect it
        self.assertTrue(1900 < estimate < 2100, estimate)

    def test_cached_tokens_are_counted_but_not_charged(self):
        token = self.store.create("eve", "phone", tokens_per_day=100)[1]
        self.fake.replies["/api/chat"] = Reply.json(200, {"done": True, "prompt_eval_count": 80, "prompt_eval_cached_count": 70, "eval_count": 5})
        self.ask("POST", "/api/chat", CHAT, token=token)
        self.assertEqual(self.logged()["cached"], "70")
        row, = self.usage()
        self.assertEqual([row[name] for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "estimated_tokens")], [80, 70, 5, 0])
        me = self.ask("GET", "/me", token=token).json()
        self.assertEqual((me["left"]["tokens_per_day"]["remaining"], me["usage"][0]["cached_tokens"]), (85, 70))
        self.assertIn('tokens_total{user="eve",token="phone",model="tiny:latest",kind="cached"} 70',
                      self.ask("GET", "/metrics", token=self.admin).body.decode())

    def test_usage_rows_are_grouped_by_hour_user_token_model_and_route(self):
        for model in "tiny", "TINY:latest", "library/tiny", "tiny:7b":
            self.ask("POST", "/api/chat", {**CHAT, "model": model})
        self.ask("POST", "/api/generate", {"model": "tiny"}, token=self.admin)
        self.ask("GET", "/api/tags")
        self.ask("POST", "/api/show", {"model": "tiny"})
        eventually(lambda: sum(row[4] for row in self.rows()) == 5, "the usage rows")
        self.assertEqual(self.rows(), [("ada", "laptop", "tiny:7b", "/api/chat", 1, 0, 0, 8, 5),
                                       ("ada", "laptop", "tiny:latest", "/api/chat", 3, 0, 0, 24, 15),
                                       ("root", "box", "tiny:latest", "/api/generate", 1, 0, 0, 8, 5)])

    def test_unknown_models_create_no_usage_rows_of_their_own(self):
        self.fake.replies["/api/chat"] = Reply.json(404, {"error": "no"})
        for number in range(5):
            self.ask("POST", "/api/chat", {"model": f"nonsense-{number}"})
        eventually(lambda: sum(row[4] for row in self.rows()) == 5, "the usage row")
        self.assertEqual(self.rows(), [("ada", "laptop", "", "/api/chat", 5, 5, 0, 0, 0)])

    def test_usage_survives_deletion_of_the_token(self):
        self.ask("POST", "/api/chat", CHAT)
        self.usage()
        self.store.delete("ada", "laptop")
        self.assertEqual([(row["user"], row["completion_tokens"]) for row in self.store.usage("user", 0)], [("ada", 5)])

    def test_running_stream_is_included_in_the_usage(self):
        hold = self.hold()
        self.fake.replies["/api/chat"] = Reply.stream(*[compact({"done": False}) + b"\n"] * 4, hold,
                                                      compact({"done": True, "prompt_eval_count": 8, "eval_count": 5}) + b"\n")
        client = self.begin("POST", "/api/chat", CHAT)
        answer = client.read(client.head(), until=b"\n" * 1)
        self.assertUsage(requests=1, prompt_tokens=0, completion_tokens=4, errors=0)
        hold.set()
        client.read(answer)
        eventually(lambda: self.usage()[0]["completion_tokens"] == 5, "the final usage")
        self.assertUsage(requests=1, prompt_tokens=8, completion_tokens=5)

    def test_usage_survives_a_kill_except_for_the_last_second(self):
        serving = self.enter(Serving(self.folder, "--port", "0", "--ollama-url", self.fake.url, "--db", self.db))
        line = compact({"done": False}) + b"\n"
        self.fake.replies["/api/generate"] = Reply.stream(line, line, until_hangup)
        self.assertStatus(self.ask("POST", "/api/chat", CHAT, server=serving), 200)
        client = self.begin("POST", "/api/generate", CHAT, server=serving)
        client.read(client.head(), until=line * 2)
        eventually(lambda: len(self.store.usage("token", 0)) == 1 and self.store.usage("token", 0)[0]["requests"] == 2, "the usage of both requests")
        serving.process.kill()
        serving.process.wait(GUARD)
        self.assertUsage(requests=2, prompt_tokens=8, completion_tokens=7)

    def test_usage_that_cannot_be_stored_is_stored_later(self):
        with unittest.mock.patch.object(self.store, "add_usage", side_effect=gateway.Failure("the disk is full")) as add, \
                self.assertLogs("ollama_gateway") as logs:
            self.ask("POST", "/api/chat", CHAT)
            eventually(lambda: add.call_count >= 2, "a second attempt")
            self.ask("POST", "/api/chat", CHAT)
        self.assertEqual(len(logs.output), 1)
        self.assertUsage(requests=2, prompt_tokens=16, completion_tokens=10)

    def test_me_returns_the_limits_and_usage_of_the_token(self):
        token = self.store.create("eve", "phone", rpm=60, tokens_per_day=1000, models="tiny*", max_parallel=4)[1]
        self.ask("POST", "/api/chat", CHAT, token=token)
        self.ask("POST", "/api/chat", CHAT)
        eventually(lambda: len(self.store.usage("user", 0)) == 2, "the usage rows of both users")
        me = self.ask("GET", "/me", token=token).json()
        self.assertEqual(set(me), (KEYS | {"left", "usage"}) - {"last_used_at", "expired"})
        self.assertEqual((me["user"], me["models"], me["rpm"]), ("eve", ["tiny*"], 60))
        self.assertEqual({name: (left["limit"], left["remaining"]) for name, left in me["left"].items()},
                         {"rpm": (60, 59), "max_parallel": (4, 4), "tokens_per_day": (1000, 987)})
        self.assertEqual([(row["requests"], row["prompt_tokens"], row["completion_tokens"]) for row in me["usage"]], [(1, 8, 5)])
        self.assertNotIn(token[8:], json.dumps(me))
        self.assertEqual(self.ask("GET", "/me").json()["left"], {})
        self.assertRefused(self.ask("GET", "/me", token=""), 401)
        self.assertEqual([seen.path for seen in self.fake.received], ["/api/chat"] * 2)


class UsageLedgerWithFakeClock(Case):
    """Budget days of the usage ledger, on a fake clock."""

    def setUp(self):
        super().setUp()
        self.now = 20_000 * 86400.0 + 86400 - 10    # ten seconds before midnight
        self.store = self.open_store()
        self.token = self.store.create("ada", "laptop", tokens_per_day=10)[0]
        self.ledger = self.open_ledger()

    def open_ledger(self):
        return gateway.UsageLedger(self.store, self.enter(contextlib.closing(gateway.TokenCache(self.store))), lambda: self.now)

    def record_usage(self, completion, ledger=None):
        record = gateway.RequestContext("", 0)
        record.token, record.route, record.model_label, record.status = self.token, CHAT_ROUTE, "tiny:latest", 200
        record.usage_reader = unittest.mock.Mock(usage=gateway.Usage(completion=completion))
        (ledger or self.ledger).start(record)
        record.released_at = record.started_at
        (ledger or self.ledger).finish(record)

    def set_clock(self, seconds):
        """Set the clock, query the budget, and return the warnings that the ledger logs."""
        self.now = seconds
        with self.assertLogs("ollama_gateway") as logs:
            gateway.LOG.info("the clock is set")
            self.ledger.spent(self.token)
            self.ledger.day_left()
            self.record_usage(0)
        return logs.output[1:]

    def test_clock_set_a_year_ahead_and_back_does_not_lock_a_budget(self):
        self.record_usage(10)
        today = self.now
        self.assertEqual(self.set_clock(today + 365 * 86400), [])
        self.record_usage(10)
        self.assertEqual(self.ledger.spent(self.token), 10)
        warning, = self.set_clock(today)
        self.assertRegex(warning, r"WARNING.*back from 2025-10-04T23:59:50Z to 2024-10-04T23:59:50Z")
        self.assertEqual((self.ledger.spent(self.token), self.ledger.day_left()), (10, 10))
        self.assertEqual(self.set_clock(today + 10), [])
        self.assertEqual((self.ledger.spent(self.token), self.ledger.day_left()), (0, 86400))

    def test_clock_set_back_two_hours_across_midnight_refills_no_budget(self):
        self.record_usage(10)
        self.now += 3600
        self.record_usage(9)
        self.assertEqual(self.set_clock(self.now - 2 * 3600), [])
        self.assertEqual((self.ledger.spent(self.token), self.ledger.day_left()), (9, 86400 + 3600 + 10))
        self.assertEqual(self.set_clock(self.now + 2 * 3600), [])
        self.assertEqual(self.ledger.spent(self.token), 9)

    def test_clock_set_back_two_days_is_followed_with_one_warning(self):
        self.record_usage(10)
        self.assertEqual(len(self.set_clock(self.now - 2 * 86400)), 1)
        self.assertEqual((self.ledger.spent(self.token), self.ledger.day_left()), (0, 10))
        self.record_usage(3)
        self.ledger.store()
        self.assertEqual(self.set_clock(self.now - 3600), [])
        self.assertEqual([row["completion_tokens"] for row in self.store.usage("day", 0)], [3, 10])

    def test_request_without_a_response_is_counted_as_an_error(self):
        context = gateway.RequestContext("", 0)
        context.token, context.route, context.model_label = self.token, CHAT_ROUTE, "tiny:latest"
        self.ledger.start(context)
        self.ledger.finish(context)
        self.assertEqual(self.ledger.running(), [])
        self.ledger.store()
        row, = self.store.usage("user", 0)
        self.assertEqual((row["requests"], row["errors"], row["cancelled"]), (1, 1, 0))

    def test_budget_day_ends_at_midnight_utc_and_is_not_reopened_by_clock_set_back(self):
        self.record_usage(4)
        self.assertEqual((self.ledger.spent(self.token), self.ledger.day_left()), (4, 10))
        self.now += 10
        self.assertEqual((self.ledger.spent(self.token), self.ledger.day_left()), (0, 86400))
        self.record_usage(3)
        self.now -= 3600    # the clock is set back
        self.record_usage(2)
        self.assertEqual(self.ledger.spent(self.token), 5)
        self.ledger.store()
        self.assertEqual([row["completion_tokens"] for row in self.store.usage("day", 0)], [4, 5])

    def test_usage_not_stored_yet_counts_toward_the_budget(self):
        self.record_usage(4)
        self.ledger.store()
        self.record_usage(3)
        for _ in range(3):
            self.now += 1
            self.assertEqual(self.ledger.spent(self.token), 7)
        self.ledger.store()
        self.now += 1
        self.assertEqual(self.ledger.spent(self.token), 7)

    def test_usage_of_another_gateway_counts_once_stored(self):
        other = self.open_ledger()
        self.assertEqual(self.ledger.spent(self.token), 0)
        self.record_usage(9, other)
        other.store()
        self.now += 1
        self.assertEqual(self.ledger.spent(self.token), 9)

    def test_locked_database_keeps_the_last_known_budget(self):
        self.record_usage(4)
        self.assertEqual(self.ledger.spent(self.token), 4)
        self.now += 5
        with unittest.mock.patch.object(gateway.TokenCache, "tokens_used_on", side_effect=gateway.Failure("locked")):
            self.assertEqual(self.ledger.spent(self.token), 4)
            with self.assertRaises(gateway.Failure):
                self.open_ledger().spent(self.token)

    def test_budget_read_while_usage_is_being_stored_counts_nothing_twice(self):
        self.record_usage(60)
        started, spent, add_usage = threading.Event(), [], self.store.add_usage

        def slowly(rows, uses):
            thread.start()
            started.wait(GUARD)
            add_usage(rows, uses)
        thread = threading.Thread(target=lambda: (started.set(), spent.append(self.ledger.spent(self.token))))
        with unittest.mock.patch.object(self.store, "add_usage", slowly):
            self.ledger.store()
        thread.join(GUARD)
        self.assertEqual(spent, [60])

    def test_read_only_database_still_enforces_the_budget(self):
        self.store.writable = False
        self.record_usage(4)
        self.ledger.store()
        self.now += 5
        self.assertEqual(self.ledger.spent(self.token), 4)
        self.assertEqual(self.store.usage("user", 0), [])

# == Backends =================================================================

FORWARDED_HEADERS = (("Accept", "application/x-ndjson, */*;q=0.1"), ("Content-Type", 'application/json; x="a b"'),
                     ("User-Agent", "ollama-python/0.5 (x86_64)"), ("X-Request-Id", "req-1.A_b"), ("Anthropic-Version", "2023-06-01"),
                     ("anthropic-beta", "tools-2024"), ("OpenAI-Beta", "assistants=v2"))
REMOVED_HEADERS = (("Cookie", "session=1"), ("Origin", "http://localhost"), ("Referer", "http://localhost/chat"), ("Forwarded", "for=1.2.3.4"),
                   ("X-Forwarded-For", "1.2.3.4"), ("X-Forwarded-Host", "evil.example"), ("X-Real-Ip", "1.2.3.4"), ("Via", "1.1 proxy"),
                   ("Accept-Language", "de"), ("Proxy-Authorization", "Basic x"), ("Proxy-Connection", "keep-alive"), ("Keep-Alive", "timeout=5"),
                   ("TE", "trailers"), ("Upgrade", "h2c"), ("Trailer", "X-T"), ("X-Stainless-Lang", "python"), ("X-Whatever", "1"),
                   ("Range", "bytes=0-1"),
                   ("If-None-Match", '"x"'), ("Cache-Control", "no-cache"))
BODIES = (
    ("unusually formatted JSON", b' {"model" :"tiny",\n\t"messages": [], "n": 1.0e+02, "n": 2, "u": "\\u00e9\xc3\xa9"}\n\n'),
    ("two values", b'{"model":"tiny","stream":false}{"x":1}'),
    ("no JSON at all", bytes(range(256))),   # accepted from an administrator only
    ("nothing", b""),
    ("three megabytes", b'{"model":"tiny","images":["' + b"iVBORw0KGgo" * 280_000 + b'"]}'),
)


class Forwarding(GatewayCase):

    def test_only_allowed_request_headers_are_forwarded(self):
        self.ask("POST", "/api/chat", CHAT, headers=FORWARDED_HEADERS + REMOVED_HEADERS)
        headers = self.upstream().headers
        for name, value in FORWARDED_HEADERS:
            self.assertEqual(headers.pop(name.lower()), value)
        self.assertEqual(headers.pop("host"), "127.0.0.1:%d" % self.fake.server_address[1])
        self.assertEqual(headers.pop("accept-encoding"), "identity")
        self.assertLessEqual(set(headers), {"content-length", "connection"}, headers)

    def test_client_credentials_are_not_forwarded(self):
        for headers in (bearer(self.token), [("x-api-key", self.token)]):
            self.fake.received.clear()
            self.assertStatus(self.ask("GET", "/api/tags", token="", headers=headers), 200)
            self.assertNotIn(self.token, repr(self.upstream()))

    def test_headers_named_in_the_clients_connection_header_are_not_forwarded(self):
        self.ask("POST", "/api/chat", CHAT, headers=(("Connection", "keep-alive, Anthropic-Beta ,openai-beta"), ("anthropic-beta", "1"),
                                                     ("OpenAI-Beta", "2"), ("anthropic-version", "3")))
        headers = self.upstream().headers
        self.assertEqual(sorted(name for name in headers if name.startswith(("anthropic", "openai"))), ["anthropic-version"])

    def test_request_id_of_the_client_is_forwarded_and_returned(self):
        answer = self.ask("GET", "/api/tags", headers=[("X-Request-Id", "req-7")])
        self.assertEqual((answer.headers["x-request-id"], self.upstream().headers["x-request-id"]), ("req-7", "req-7"))

    def test_request_body_is_forwarded_byte_for_byte(self):
        for label, body in BODIES:
            for framing in ("length", "chunks"):
                with self.subTest(label, framing=framing), Client(self.server.server_address) as client:
                    self.fake.received.clear()
                    self.fake.replies["/api/chat"] = Reply.json(200, {})
                    token = self.admin if label.startswith("no JSON") else self.token
                    if framing == "length":
                        client.send(request("POST", "/api/chat", body, bearer(token)))
                    else:
                        head = request("POST", "/api/chat", None, [*bearer(token), ("Transfer-Encoding", "chunked")])
                        client.send(head, chunked(*(body[start:start + 50_000] for start in range(0, len(body), 50_000))))
                    self.assertStatus(client.answer(), 200)
                    self.assertTrue(self.upstream().body == body, "the body was changed")

    def test_compressed_body_of_an_administrator_is_forwarded_unchanged(self):
        body = b"\x28\xb5\x2f\xfd not really zstd"
        self.ask("POST", "/v1/responses", body, headers=[("Content-Encoding", "zstd")], token=self.admin)
        upstream = self.upstream()
        self.assertEqual((upstream.body, upstream.headers["content-encoding"]), (body, "zstd"))

    def test_delete_request_keeps_its_body(self):
        self.assertStatus(self.ask("DELETE", "/api/delete", {"model": "tiny"}, token=self.admin), 200)
        self.assertEqual(self.upstream().body, b'{"model":"tiny"}')

    def test_request_without_a_body_is_forwarded_without_one(self):
        self.ask("GET", "/api/tags")
        headers = self.upstream().headers
        self.assertNotIn("transfer-encoding", headers)
        self.assertEqual(headers.get("content-length", "0"), "0")

    def test_blob_upload_is_streamed_to_the_upstream(self):
        path = f"/api/blobs/{DIGEST}"
        for framing, last in ((("Transfer-Encoding", "chunked"), b"3\r\ndef\r\n0\r\n\r\n"), (("Content-Length", "6"), b"def")):
            with self.subTest(framing):
                self.fake.received.clear()
                self.fake.arrived = 0
                first = b"abc" if framing[0] == "Content-Length" else b"3\r\nabc\r\n"
                client = self.client()
                client.send(request("POST", path, None, [*bearer(self.admin), framing]) + first)
                eventually(lambda: self.fake.arrived == 3, "arrival of the first piece")
                client.send(last)
                self.assertStatus(client.answer(), 200)
                self.assertEqual(self.upstream().body, b"abcdef")

    def test_expect_100_continue_is_answered_with_100(self):
        client = self.client()
        client.send(request("POST", "/api/chat", None, [*bearer(self.token), ("Content-Length", "2"), ("Expect", "100-continue")]))
        self.assertEqual(client.answer().status, 100)
        client.send(b"{}")
        self.assertStatus(client.answer(), 200)
        self.assertNotIn("expect", self.upstream().headers)

    def test_expect_100_continue_without_a_token_is_refused_at_once(self):
        client = self.client()
        client.send(request("POST", "/api/chat", None, [("Content-Length", "1000000"), ("Expect", "100-continue")]))
        self.assertRefused(client.answer(), 401)

    def test_unknown_expectation_is_refused_with_417(self):
        self.assertRefused(self.ask("POST", "/api/chat", CHAT, headers=[("Expect", "miracles")]), 417)

    def test_every_upstream_status_and_body_is_passed_on(self):
        for status in (200, 201, 400, 401, 403, 404, 429, 499, 500, 503):
            with self.subTest(status):
                self.fake.replies["/api/chat"] = Reply.body(status, b'{"error" : "caf\xc3\xa9" }\n', Content_Type="application/json; x=1")
                answer = self.ask("POST", "/api/chat", CHAT)
                self.assertEqual((answer.status, answer.body, answer.headers["content-type"], answer.ended),
                                 (status, b'{"error" : "caf\xc3\xa9" }\n', "application/json; x=1", "clean"))

    def test_response_without_a_content_type_gets_none(self):
        answer = self.ask("POST", "/api/copy", {"source": "a", "destination": "b"}, token=self.admin)
        self.assertEqual((answer.status, answer.body, answer.headers.get("content-type"), answer.headers["content-length"]), (200, b"", None, "0"))

    def test_responses_without_a_body_end_cleanly(self):
        for status in (204, 304):
            with self.subTest(status):
                self.fake.replies["/api/tags"] = Reply.raw(b"HTTP/1.1 %d X\r\nETag: x\r\n\r\n" % status)
                client = self.client()
                client.send(request("GET", "/api/tags", headers=bearer(self.token)) + request("GET", "/", headers=bearer(self.token)))
                self.assertStatus(client.answer(), status)
                self.assertEqual(client.answer().body, b"Ollama is running")

    def test_redirects_are_passed_on_and_not_followed(self):
        for status in (301, 302, 307, 308):
            with self.subTest(status):
                self.fake.received.clear()
                self.fake.replies["/api/chat"] = Reply.body(status, b"", Location="/api/tags")
                answer = self.ask("POST", "/api/chat", CHAT)
                self.assertEqual((answer.status, answer.headers["location"]), (status, "/api/tags"))
                self.assertEqual(self.seen(), [("POST", "/api/chat")])

    def test_interim_1xx_responses_of_the_upstream_are_skipped(self):
        self.fake.replies["/api/tags"] = Reply.raw(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n",
                                                   b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        answer = self.ask("GET", "/api/tags")
        self.assertEqual((answer.status, answer.body), (200, b"{}"))

    def test_hop_by_hop_response_headers_are_not_passed_on(self):
        self.fake.replies["/api/tags"] = Reply.raw(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive, X-Private\r\nX-Private: 1\r\nKeep-Alive: timeout=5\r\n"
            b"Proxy-Authenticate: Basic\r\nUpgrade: h2c\r\nTrailer: X-T\r\n\r\n{}")
        answer = self.ask("GET", "/api/tags")
        self.assertEqual((answer.status, answer.body), (200, b"{}"))
        self.assertEqual(set(answer.headers) & {"x-private", "keep-alive", "proxy-authenticate", "upgrade", "trailer"}, set())
        self.assertNotIn("X-Private", answer.headers.get("connection", ""))

    def test_proxy_environment_variables_are_ignored(self):
        proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"), "http://127.0.0.1:1")
        with unittest.mock.patch.dict(os.environ, proxies, no_proxy="", NO_PROXY=""):
            self.assertStatus(self.ask("GET", "/api/tags", server=self.serve()), 200)

    def test_upstream_path_prefix_is_kept(self):
        for prefix in ("/prefix", "/prefix/"):
            with self.subTest(prefix):
                self.fake.received.clear()
                server = self.serve(ollama_url=self.fake.url + prefix)
                self.ask("GET", "/api/tags", server=server)
                self.ask("GET", "/v1/models", server=server)
                self.assertEqual(self.seen(), [("GET", "/prefix/api/tags"), ("GET", "/prefix/v1/models")])

    @unittest.skipUnless(ipv6_loopback(), "this machine has no IPv6")
    def test_upstream_with_an_ipv6_address_is_reached(self):
        fake = self.enter(running(FakeOllama(host="::1")))
        self.assertStatus(self.ask("GET", "/api/tags", server=self.serve(ollama_url=fake.url)), 200)
        self.assertEqual(dict(fake.received[0].headers)["Host"], "[::1]:%d" % fake.server_address[1])


FIRST_LINE = b'{"message":{"content":"a"},"done":false}\n'
PHASES = (   # label, request body, the fake Ollama's reply, what the client has read when it disconnects
    ("before the first byte", CHAT, Reply.raw(until_hangup), None),
    ("before the first byte of an unstreamed answer", {**CHAT, "stream": False}, Reply.raw(until_hangup), None),
    ("after the head", CHAT, Reply.stream(until_hangup), b""),
    ("mid-stream", CHAT, Reply.stream(FIRST_LINE, until_hangup), FIRST_LINE),
    ("within an answer of known length", {**CHAT, "stream": False}, Reply.stream(FIRST_LINE, until_hangup, length=1000), FIRST_LINE),
)


class ClientDisconnects(GatewayCase):
    """A client that disconnects cancels its upstream request in every phase of the response."""

    def assert_upstream_request_cancelled(self):
        self.assertEqual(self.fake.hangups.get(timeout=GUARD), "/api/chat")
        self.assertEqual(self.logged(lambda fields: fields["path"] == "/api/chat")["outcome"], "left")

    def disconnect(self, way, body, reply, read, **how):
        self.fake.replies["/api/chat"] = reply
        self.fake.received.clear()
        self.lines.clear()
        client = self.begin("POST", "/api/chat", body, **how)
        eventually(lambda: self.fake.received, "arrival of the request upstream")
        if read is not None:
            client.read(client.head(), until=read or None) if read else client.head()
        way(client)
        self.assert_upstream_request_cancelled()

    def test_client_disconnect_cancels_the_upstream_request(self):
        for (phase, body, reply, read), (how, way) in itertools.product(PHASES, LEAVING):
            with self.subTest(phase, client=how):
                self.disconnect(way, body, reply, read)

    def test_client_disconnect_cancels_the_upstream_request_without_poll(self):
        with unittest.mock.patch.multiple(gateway, new_poll=gateway.Poll, WRITABLE=2, HUNG_UP=0):    # as on Windows
            for (phase, body, reply, read), (how, way) in itertools.product(PHASES, LEAVING):
                with self.subTest(phase, client=how):
                    self.disconnect(way, body, reply, read)

    def test_disconnect_after_pipelined_data_is_detected(self):
        for (phase, body, reply, read), ahead in itertools.product(PHASES, (b"{}", b"x" * 100_000)):
            with self.subTest(phase, ahead=len(ahead)):
                def send_ahead_and_close(client, ahead=ahead):
                    client.send(request("POST", "/api/chat", ahead, bearer(self.token)))
                    client.close()
                self.disconnect(send_ahead_and_close, body, reply, read)

    def test_half_close_of_a_client_that_does_not_read_is_detected(self):
        def endless(exchange):
            while True:
                exchange.send(b"x" * 65536)
        self.fake.replies["/api/chat"] = Reply.stream(endless)
        client = self.client()
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.send(request("POST", "/api/chat", CHAT, bearer(self.token)))
        eventually(lambda: self.fake.received)
        client.half_close()
        self.assert_upstream_request_cancelled()

    def test_blob_upload_of_a_disconnected_client_is_never_completed(self):
        for label, framing, sent in (("chunks", ("Transfer-Encoding", "chunked"), b"3\r\nabc\r\n"), ("a length", ("Content-Length", "6"), b"abc")):
            for how, way in LEAVING:
                with self.subTest(label, client=how):
                    self.fake.broken.clear()
                    self.fake.arrived = 0
                    client = self.client()
                    client.send(request("POST", f"/api/blobs/{DIGEST}", None, [*bearer(self.admin), framing]) + sent)
                    eventually(lambda: self.fake.arrived == 3)
                    way(client)
                    eventually(lambda: self.fake.broken, "detection by the fake Ollama")
        self.assertEqual(self.fake.received, [])

    def test_client_lost_within_its_request_body_is_logged_as_left(self):
        lost = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))      # how a read fails after unanswered keep-alive probes
        with unittest.mock.patch.object(gateway.BodyDecoder, "read", side_effect=lost):
            self.begin("POST", "/api/chat", CHAT)
            self.assertEqual(self.logged()["outcome"], "left")

    def test_next_request_after_a_disconnect_is_served(self):
        self.disconnect(Client.close, *PHASES[0][1:])
        self.fake.replies.clear()
        self.assertStatus(self.ask("POST", "/api/chat", CHAT), 200)


class ClientDisconnectsOverTls(OverTls, ClientDisconnects):
    pass


MALFORMED_RESPONSES = (   # label, what an upstream sends instead of a valid HTTP response
    ("an empty response", b""),
    ("another protocol", b"SSH-2.0-OpenSSH_9.2\r\n"),
    ("a page without a head", b"<html>hello</html>"),
    ("an incomplete head", b"HTTP/1.1 200 OK\r\nContent-Le"),
    ("another version", b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\n{}"),
    ("a non-numeric status", b"HTTP/1.1 fine OK\r\nContent-Length: 2\r\n\r\n{}"),
    ("a status too short", b"HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\n{}"),
    ("a status above 999", b"HTTP/1.1 1000 OK\r\nContent-Length: 2\r\n\r\n{}"),
    ("a switch of protocols", b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n"),
    ("a line without a colon", b"HTTP/1.1 200 OK\r\nnonsense\r\nContent-Length: 2\r\n\r\n{}"),
    ("a space before the colon", b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\n{}"),
    ("a folded line", b"HTTP/1.1 200 OK\r\nContent-Type: a\r\n b\r\nContent-Length: 2\r\n\r\n{}"),
    ("a NUL", b"HTTP/1.1 200 OK\r\nContent-Type: a\0b\r\nContent-Length: 2\r\n\r\n{}"),
    ("a bare CR", b"HTTP/1.1 200 OK\r\nContent-Type: a\rSet-Cookie: b\r\nContent-Length: 2\r\n\r\n{}"),
    ("a megabyte of header", b"HTTP/1.1 200 OK\r\nX-Big: " + b"x" * 1048576 + b"\r\nContent-Length: 2\r\n\r\n{}"),
    ("a megabyte of headers", b"HTTP/1.1 200 OK\r\n" + b"X-Many: x\r\n" * 100_000 + b"Content-Length: 2\r\n\r\n{}"),
    ("both framings", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    ("two lengths", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x"),
    ("a non-numeric length", b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\n{}"),
    ("a negative length", b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}"),
    ("a length with a sign", b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\n{}"),
    ("another transfer coding", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    ("chunks in HTTP/1.0", b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
)
LINE = b'{"response":"a","done":false}\n'
EVENT = b'data: {"choices":[]}\n\n'
HALF_LINE, HALF_EVENT = LINE + b'{"response":"b', EVENT + b'data: {"cho'


class OllamaThatStopsReading:
    """A server on the loopback that reads the beginning of a request, sends its response, and reads no more until `hung_up`."""

    def __init__(self, response):
        self._response, self._listener, self._release = response, socket.create_server(("127.0.0.1", 0)), threading.Event()
        self._listener.settimeout(GUARD)
        self._closed = False
        self.url = "http://127.0.0.1:%d" % self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)

    def _serve(self):
        with self._listener.accept()[0] as connection:
            connection.settimeout(GUARD)
            connection.recv(4096)
            connection.sendall(self._response)
            self._release.wait(GUARD)
            with contextlib.suppress(ConnectionError):
                while connection.recv(65536):
                    pass
            self._closed = True

    def hung_up(self):
        """Read the rest, and return whether the peer closed the connection."""
        self._release.set()
        self._thread.join(GUARD)
        return self._closed

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._release.set()
        self._listener.close()
        self._thread.join(GUARD)


class UpstreamFailures(GatewayCase):

    def test_unreachable_upstream_is_answered_with_502(self):
        self.fake.server_close()
        for method, path in (("POST", "/api/chat"), ("GET", "/v1/models"), ("POST", "/v1/messages")):
            with self.subTest(path):
                self.assertRefused(self.ask(method, path, CHAT if method == "POST" else None), 502, path)

    def test_upstream_is_used_again_after_it_comes_back(self):
        port = self.fake.server_address[1]
        self.fake.shutdown()
        self.fake.server_close()
        self.assertRefused(self.ask("GET", "/api/tags"), 502)
        self.enter(running(FakeOllama(port)))
        self.assertStatus(self.ask("GET", "/api/tags"), 200)

    def test_invalid_upstream_host_name_is_answered_with_502(self):
        for name in "a..b", "x" * 64 + ".example":
            with self.subTest(name):
                self.assertRefused(self.ask("GET", "/api/tags", server=self.serve(ollama_url=f"http://{name}:1")), 502)

    def black_hole(self):
        """Return the address of a listener that accepts no connection, because its backlog is full."""
        listener = self.enter(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):   # fill its backlog
            filler = self.enter(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        return listener.getsockname()

    def serve_by_name(self, look_up, **flags):
        """Start a gateway whose upstream is a host name that `look_up` resolves."""
        real = socket.getaddrinfo
        self.enter(unittest.mock.patch("socket.getaddrinfo", lambda host, *args, **how: (
            look_up() if host in ("ollama.test", b"ollama.test") else real(host, *args, **how))))
        return self.serve(ollama_url="http://ollama.test:11434", **flags)

    @staticmethod
    def address_info(*addresses):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]

    @unittest.skipUnless(sys.platform == "linux", "needs Linux, where a full backlog leaves connections pending")
    def test_connect_timeout_is_answered_with_502(self):
        server = self.serve(ollama_url="http://127.0.0.1:%d" % self.black_hole()[1], connect_timeout="0.3s")
        self.assertIn("--connect-timeout", self.assertRefused(self.ask("GET", "/api/tags", server=server), 502))

    @unittest.skipUnless(sys.platform == "linux", "needs Linux, where a full backlog leaves connections pending")
    def test_connect_timeout_is_divided_among_the_addresses_of_a_name(self):
        for addresses in ([self.black_hole(), self.fake.server_address], [self.black_hole(), ("127.0.0.1", 1), self.fake.server_address]):
            with self.subTest(len(addresses)):
                server = self.serve_by_name(lambda addresses=addresses: self.address_info(*addresses), connect_timeout="0.9s")
                self.assertStatus(self.ask("GET", "/api/tags", server=server), 200)
        nowhere = self.serve_by_name(lambda: self.address_info(self.black_hole(), self.black_hole()), connect_timeout="0.3s")
        self.assertIn("0.3 s (--connect-timeout)", self.assertRefused(self.ask("GET", "/api/tags", server=nowhere), 502))

    def test_name_lookup_is_within_the_connect_timeout_and_blocks_no_other_request(self):
        hold = self.hold()
        server = self.serve_by_name(lambda: hold.wait(GUARD) and self.address_info(self.fake.server_address), connect_timeout="0.3s")
        waiting = [self.begin("GET", "/api/tags", server=server) for _ in range(3)]
        self.assertStatus(self.ask("GET", "/", server=server), 200)
        for client in waiting:
            self.assertIn("--connect-timeout", self.assertRefused(client.answer(), 502))
        self.assertEqual([thread.name for thread in threading.enumerate()].count("resolver"), 1, "one lookup serves all requests")
        hold.set()
        eventually(lambda: self.ask("GET", "/api/tags", server=server).status == 200, "resolution of the name")

    def test_failed_name_lookup_is_answered_with_502_and_tried_again(self):
        answers = iter([socket.gaierror(socket.EAI_NONAME, "Name or service not known"), UnicodeError("label too long")])

        def look_up():
            error = next(answers, None)
            if error:
                raise error
            return self.address_info(self.fake.server_address)
        server = self.serve_by_name(look_up)
        for words in "Name or service not known", "label too long":
            self.assertIn(words, self.assertRefused(self.ask("GET", "/api/tags", server=server), 502))
        self.assertStatus(self.ask("GET", "/api/tags", server=server), 200)

    @unittest.skipUnless(sys.platform == "linux", "needs Linux, where a full backlog leaves connections pending")
    def test_client_disconnect_during_lookup_or_connect_ends_the_wait(self):
        hold, looking_up = self.hold(), threading.Event()

        def hang():
            looking_up.set()
            hold.wait(GUARD)
            return self.address_info(self.fake.server_address)

        def swallow():
            looking_up.set()
            return self.address_info(self.black_hole())
        for label, look_up in (("look-up", hang), ("connect", swallow)):
            with self.subTest(label):
                looking_up.clear()
                self.lines.clear()
                client = self.begin("GET", "/api/tags", server=self.serve_by_name(look_up, connect_timeout="10m"))
                self.assertTrue(looking_up.wait(GUARD))
                client.close()
                self.assertEqual(self.logged()["outcome"], "left")

    def test_first_byte_timeout_is_answered_with_504_that_names_the_flag(self):
        server = self.serve(first_byte_timeout="0.3s")
        for path, reply in (("/api/chat", Reply.raw(until_hangup)),
                            ("/v1/chat/completions", Reply.raw(b"HTTP/1.1 100 Continue\r\n\r\n", until_hangup)),
                            ("/v1/messages", Reply.raw(b"HTTP/1.1 200 OK\r\nContent-", until_hangup))):
            with self.subTest(path):
                self.fake.replies[path] = reply
                self.assertIn("--first-byte-timeout", self.assertRefused(self.ask("POST", path, CHAT, server=server), 504, path))
                self.assertEqual(self.fake.hangups.get(timeout=GUARD), path)

    def test_malformed_upstream_response_is_answered_with_502(self):
        for label, sent in MALFORMED_RESPONSES:
            with self.subTest(label):
                self.fake.replies["/api/chat"] = Reply.raw(sent)
                self.assertRefused(self.ask("POST", "/api/chat", CHAT), 502)
        self.fake.replies.clear()
        self.assertStatus(self.ask("GET", "/api/tags"), 200)

    def assert_broken_stream(self, client, sent, ending):
        """Check that the client received `sent`, then `ending` with an error in it, and no clean end of the response."""
        answer = client.answer()
        self.assertStatus(answer, 200)
        self.assertEqual(answer.ended, "cut")
        self.assertEqual(answer.body[:len(sent)], sent)
        match = re.fullmatch(ending, answer.body[len(sent):])
        self.assertTrue(match, answer)
        self.assertTrue(json.loads(match.group(1))["error"], answer)
        self.assertIsNone(client.answer())

    def test_broken_stream_ends_with_an_error_line_and_without_a_clean_end(self):
        for label, path, kind, sent, ending in (
            ("NDJSON between two lines", "/api/chat", NDJSON, LINE, rb'(\{"error":.*\})\n'),
            ("NDJSON within a line", "/api/chat", NDJSON, HALF_LINE, rb'\n(\{"error":.*\})\n'),
            ("NDJSON before any line", "/api/chat", NDJSON, b"", rb'(\{"error":.*\})\n'),
            ("SSE between two events", "/v1/chat/completions", SSE, EVENT, rb'data: (\{"error":.*\})\n\n'),
            ("SSE within a line", "/v1/chat/completions", SSE, HALF_EVENT, rb'\n\n?data: (\{"error":.*\})\n\n'),
            ("SSE within an event", "/v1/chat/completions", SSE, EVENT + EVENT[:-1], rb'\n?data: (\{"error":.*\})\n\n'),
        ):
            with self.subTest(label):
                pieces = [sent] if sent else []
                self.fake.replies[path] = Reply.stream(*pieces, cut, kind=kind)
                self.assert_broken_stream(self.begin("POST", path, {**CHAT, "stream": True}), sent, ending)

    def test_stream_broken_at_its_first_byte_is_answered_with_502(self):
        self.fake.replies["/v1/chat/completions"] = Reply.raw(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\nxyz")
        for stream in (True, False):
            self.assertRefused(self.ask("POST", "/v1/chat/completions", {**CHAT, "stream": stream}), 502, "/v1/chat/completions")

    def test_stalled_stream_is_ended_with_an_error_line(self):
        server = self.serve(stall_timeout="0.3s")
        self.fake.replies["/api/chat"] = Reply.stream(HALF_LINE, until_hangup)
        self.assert_broken_stream(self.begin("POST", "/api/chat", CHAT, server=server), HALF_LINE, rb'\n(\{"error":.*\})\n')
        self.assertEqual(self.fake.hangups.get(timeout=GUARD), "/api/chat")

    def test_stream_with_malformed_chunks_ends_with_an_error_line(self):
        size = b"%x\r\n" % len(HALF_LINE)
        for label, good, bad in (("half a chunk", b"ff\r\n" + HALF_LINE, b""), ("half a size", size + HALF_LINE, b"\r\nf"),
                                 ("a non-numeric size", size + HALF_LINE, b"\r\nxyz\r\n"),
                                 ("more bytes than its size", size + HALF_LINE, b"X\r\n0\r\n\r\n"),
                                 ("no end of the last chunk", size + HALF_LINE, b"\r\n0\r\n")):
            with self.subTest(label):
                hold = self.hold()
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
                self.fake.replies["/api/chat"] = Reply.raw(head + good, hold, bad)
                client = self.begin("POST", "/api/chat", CHAT)
                answer = client.read(client.head(), until=HALF_LINE)
                hold.set()
                self.assertRegex(client.read(answer).body[len(HALF_LINE):], rb'\A\n\{"error":.*\}\n\Z')
                self.assertEqual(answer.ended, "cut")

    def test_broken_unstreamed_response_is_cut_off(self):
        for label, reply in (("of known length", Reply.stream(b'{"models":', cut, kind=JSON, length=1000)),
                             ("in chunks", Reply.stream(b'{"models":', cut, kind=JSON))):
            with self.subTest(label):
                self.fake.replies["/api/tags"] = reply
                answer = self.ask("GET", "/api/tags")
                self.assertEqual((answer.status, answer.body, answer.ended), (200, b'{"models":', "cut"))

    def test_response_before_the_end_of_the_request_body_is_passed_on(self):
        early = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\n{}"
        body = compact({**CHAT, "images": ["x" * 12_000_000]})
        for path, token in (("/api/chat", self.token), (f"/api/blobs/{DIGEST}", self.admin)):
            with self.subTest(path), OllamaThatStopsReading(early) as upstream:
                server = self.serve(ollama_url=upstream.url)
                client = self.begin("POST", path, body, token, server)
                self.assertEqual((client.answer().status, upstream.hung_up()), (413, True))

    def test_interim_response_within_the_request_body_is_answered_with_502(self):
        with OllamaThatStopsReading(b"HTTP/1.1 102 Processing\r\n\r\n") as upstream:
            client = self.client(self.serve(ollama_url=upstream.url))
            client.send(request("POST", f"/api/blobs/{DIGEST}", None, [*bearer(self.admin), ("Content-Length", "9")]) + b"abc")
            self.assertRefused(client.answer(), 502)

    def test_timeouts_of_several_weeks_are_accepted(self):
        server = self.serve(first_byte_timeout="30d", stall_timeout="20w", connect_timeout="40d")
        hold = self.hold()
        self.fake.replies["/api/chat"] = Reply.stream(hold, LINE, hold, LINE)
        client = self.begin("POST", "/api/chat", CHAT, server=server)
        eventually(lambda: self.fake.received)
        hold.set()
        self.assertEqual(client.answer().body, LINE + LINE)

    def test_health_is_down_when_the_version_response_is_stalled_endless_or_invalid(self):
        def drip(exchange):
            while True:
                exchange.send(b" ")
                time.sleep(0.01)
        endless = Reply.stream(b'{"version":"', *[b"x" * 65536] * 100, until_hangup, kind=JSON)
        for label, reply in (("a stall", Reply.stream(b"{", until_hangup, kind=JSON)), ("no end", endless), ("a list", Reply.json(200, [])),
                             ("one byte at a time", Reply.stream(drip, kind=JSON)), ("no HTTP", Reply.raw(b"SSH-2.0\r\n\r\n")),
                             ("an error", Reply.json(500, {"version": "0.9.3"})),
                             ("deep nesting", Reply.body(200, b'{"a":' * 50_000, **{"Content-Type": JSON}))):
            with self.subTest(label), unittest.mock.patch.object(gateway, "PROBE_SECONDS", 0.5):
                self.fake.replies["/api/version"] = reply
                server = self.serve()
                self.probe_health(server)
                self.assertEqual(self.health(server), "down")

    def test_health_and_status_survive_invalid_model_lists(self):
        for label, reply in (("no list", Reply.json(200, {"models": 5})), ("an object", Reply.json(200, {"models": {"a": 1}})),
                             ("a list too large", Reply.json(200, {"models": ["x" * 100] * 50_000})), ("an error", Reply.json(500, {}))):
            with self.subTest(label):
                self.fake.replies.update({"/api/tags": reply, "/api/ps": reply})
                server = self.serve()
                self.probe_health(server)
                upstream = self.ask("GET", "/admin/status", token=self.admin, server=server).json()["upstream"]
                self.assertEqual(upstream, {"status": "up", "version": "0.9.3", "models": [], "loaded": []})

    def test_health_and_status_do_not_wait_for_a_running_probe(self):
        hold = self.hold()
        self.fake.replies["/api/version"] = Reply.stream(hold, b'{"version":"0.9.3"}', kind=JSON)
        with unittest.mock.patch.object(gateway, "PROBE_SECONDS", 10 * GUARD):
            first = threading.Event()
            self.server.gateway.health.start(first.set)
            eventually(lambda: self.fake.received, "the request of the probe")
            self.assertEqual(self.health(), "down")
            self.assertEqual(self.ask("GET", "/admin/status", token=self.admin).json()["upstream"]["status"], "down")
            self.assertEqual(self.seen(), [("GET", "/api/version")], "no other request")
            self.assertFalse(first.is_set())
            hold.set()
            self.assertTrue(first.wait(GUARD))
        self.assertEqual(self.health(), "up")

    def test_health_follows_the_state_of_the_upstream(self):
        with unittest.mock.patch.object(gateway, "HEALTH_SECONDS", 0.01):
            self.probe_health()
            self.assertEqual(self.health(), "up")
            self.fake.replies["/api/version"] = Reply.json(503, {})
            eventually(lambda: self.health() == "down", "the change to down")
            self.fake.replies.clear()
            eventually(lambda: self.health() == "up", "the change to up")
            self.assertEqual(self.fake.accepted, 1, "all probes share one connection")

    def test_waiting_health_probe_ends_with_the_server(self):
        self.fake.replies["/api/version"] = Reply.stream(b"{", until_hangup, kind=JSON)
        with unittest.mock.patch.object(gateway, "PROBE_SECONDS", 0.5), self.serving() as server:
            server.gateway.health.start()
            eventually(lambda: self.fake.received, "the request of the probe")
        self.assertEqual(self.fake.hangups.get(timeout=GUARD), "/api/version")
        self.assertNotIn("health", [thread.name for thread in threading.enumerate()])

    def test_http_1_0_client_sees_a_broken_stream_as_a_reset(self):
        self.fake.replies["/api/chat"] = Reply.stream(LINE, cut)
        client = self.client()
        client.send(request("POST", "/api/chat", CHAT, bearer(self.token), version="1.0"))
        self.assertEqual(client.answer().ended, "cut")

    def test_control_characters_in_an_upstream_header_do_not_split_it(self):
        self.fake.replies["/api/tags"] = Reply.raw(b"HTTP/1.1 200 OK\r\nLocation: a\r\xc2\x85Set-Cookie: b\r\nContent-Length: 2\r\n\r\n{}")
        self.assertNotIn("set-cookie", self.ask("GET", "/api/tags").headers)

    def test_broken_stream_is_logged_as_broken(self):
        self.fake.replies["/api/chat"] = Reply.stream(LINE, cut)
        self.ask("POST", "/api/chat", CHAT)
        fields = self.logged()
        self.assertEqual((fields["status"], fields["outcome"]), ("200", "broken"))


class UpstreamFailuresOverTls(OverTls, UpstreamFailures):
    test_http_1_0_client_sees_a_broken_stream_as_a_reset = None  # the test client does not notice a missing close_notify

# == Relay ====================================================================

STREAMS = (   # label, path, content type, first and last piece
    ("NDJSON", "/api/chat", NDJSON, b'{"message":{"content":"a"},"done":false}\n', b'{"done":true}\n'),
    ("SSE", "/v1/chat/completions", SSE, b'data: {"choices":[]}\n\n', b"data: [DONE]\n\n"),
    ("half a line", "/api/generate", NDJSON, b'{"response":"caf\xc3', b'\xa9"}\n'),
    ("progress", "/api/pull", NDJSON, b'{"status":"pulling manifest"}\n', b'{"status":"success"}\n'),
)


class ResponseRelay(GatewayCase):

    def test_stream_delivers_its_first_piece_before_the_upstream_sends_the_last(self):
        for label, path, kind, first, last in STREAMS:
            with self.subTest(label):
                hold = self.hold()
                self.fake.replies[path] = Reply.stream(first, hold, last, kind=kind)
                client = self.begin("POST", path, CHAT, token=self.admin)
                answer = client.read(client.head(), until=first)
                self.assertEqual((answer.body, answer.ended), (first, None))
                hold.set()
                self.assertEqual((client.read(answer).body, answer.ended), (first + last, "clean"))

    def test_body_of_known_length_is_not_buffered(self):
        hold = self.hold()
        self.fake.replies["/api/tags"] = Reply.stream(b"first", hold, b"last", kind=JSON, length=9)
        client = self.begin("GET", "/api/tags")
        answer = client.read(client.head(), until=b"first")
        self.assertEqual(answer.headers["content-length"], "9")
        hold.set()
        self.assertEqual((client.read(answer).body, answer.ended), (b"firstlast", "clean"))

    def test_response_head_arrives_before_the_first_piece(self):
        hold = self.hold()
        self.fake.replies["/api/chat"] = Reply.stream(hold, b"late\n")
        client = self.begin("POST", "/api/chat", CHAT)
        answer = client.head()
        self.assertStatus(answer, 200)
        hold.set()
        self.assertEqual(client.read(answer).body, b"late\n")

    def test_streams_have_their_content_type_and_disable_proxy_buffering(self):
        for label, path, kind, first, last in STREAMS:
            with self.subTest(label):
                self.fake.replies[path] = Reply.stream(first, last, kind=kind)
                answer = self.ask("POST", path, CHAT, token=self.admin)
                self.assertEqual((answer.headers["content-type"], answer.headers["x-accel-buffering"], answer.headers["transfer-encoding"]),
                                 (kind, "no", "chunked"))
        self.assertNotIn("x-accel-buffering", self.ask("GET", "/api/tags").headers)

    def test_response_bytes_are_unchanged_wherever_they_are_split(self):
        whole = b'{"a":"\xc3\xa9\\u0000"}\r\n\n {"b":1}\n' + bytes(range(256)) + b"x" * 200_000
        for size in (1, 7, 4096, 10 ** 6):
            with self.subTest(size):
                part = whole[:400] if size < 8 else whole
                self.fake.replies["/api/chat"] = Reply.stream(*(part[start:start + size] for start in range(0, len(part), size)))
                answer = self.ask("POST", "/api/chat", CHAT)
                self.assertTrue(answer.body == part)
                self.assertEqual(answer.ended, "clean")

    def test_http_1_0_client_gets_a_stream_without_chunks(self):
        for path in ("/api/chat", "/api/show"):
            with self.subTest(path):
                self.fake.replies[path] = Reply.stream(b"one\n", b"two\n")
                client = self.client()
                client.send(request("POST", path, CHAT, bearer(self.token), version="1.0"))
                answer = client.answer()
                self.assertNotIn("transfer-encoding", answer.headers)
                self.assertEqual((answer.body, answer.ended), (b"one\ntwo\n", "clean"))
                self.assertIsNone(client.answer(), "the connection must end with the response")

    def test_response_that_ends_with_the_upstream_connection_is_relayed(self):
        for version in (b"1.0", b"1.1"):
            with self.subTest(version):
                head = b"HTTP/%s 200 OK\r\nContent-Type: application/json\r\n\r\n" % version
                self.fake.replies["/api/tags"] = Reply.raw(head, b'{"models"', b":[]}")
                answer = self.ask("GET", "/api/tags")
                self.assertEqual((answer.status, answer.body, answer.ended), (200, b'{"models":[]}', "clean"))

    def test_client_connection_carries_many_requests(self):
        client = self.client()
        for number in range(3):
            self.assertStatus(client.ask("GET", "/api/tags", headers=bearer(self.token)), 200)
            self.assertEqual(client.ask("POST", "/api/chat", CHAT, bearer(self.token)).ended, "clean")

    def test_connection_close_of_the_client_is_obeyed(self):
        client = self.client()
        self.assertStatus(client.ask("GET", "/api/tags", headers=[*bearer(self.token), ("Connection", "Close")]), 200)
        self.assertIsNone(client.answer())

    def test_pipelined_requests_are_answered_in_order(self):
        client = self.client()
        bodies = [{"model": f"m{number}", "stream": number % 2 == 0} for number in range(6)]
        client.send(b"".join(request("POST", "/api/generate", body, bearer(self.token)) for body in bodies)
                    + request("GET", "/", headers=[("Connection", "close")]))
        answers = client.everything()
        self.assertEqual([re.search(rb'"model":"(m\d)"', answer.body).group(1).decode() for answer in answers[:-1]],
                         [f"m{number}" for number in range(6)])
        self.assertEqual(answers[-1].body, b"Ollama is running")

    def test_pipelined_request_is_not_taken_for_a_disconnect(self):
        hold = self.hold()
        self.fake.replies["/api/chat"] = [Reply.stream(hold, b"one\n"), Reply.stream(b"two\n")]
        client = self.begin("POST", "/api/chat", CHAT)
        eventually(lambda: self.fake.received)
        client.send(request("POST", "/api/chat", CHAT, bearer(self.token)))
        hold.set()
        self.assertEqual([client.answer().body, client.answer().body], [b"one\n", b"two\n"])

    def client_with_upstream_connection(self):
        """Return a client whose next request will reuse the upstream connection of its first one."""
        client = self.client()
        self.assertStatus(client.ask("GET", "/api/version", headers=bearer(self.admin)), 200)
        self.fake.received.clear()
        return client

    def ask_again(self, client, method="POST", path="/api/chat", body=CHAT):
        return client.ask(method, path, body, bearer(self.admin))

    def test_upstream_connections_are_reused(self):
        client = self.client_with_upstream_connection()
        for _ in range(5):
            self.assertStatus(self.ask_again(client, "GET", "/api/tags", None), 200)
            self.assertEqual(self.ask_again(client).ended, "clean")
        self.assertEqual(self.fake.accepted, 1)

    def test_upstream_connection_closed_while_idle_is_replaced(self):
        for method, path, body in (("GET", "/api/tags", None), ("POST", "/api/chat", CHAT), ("POST", f"/api/blobs/{DIGEST}", b"blob")):
            with self.subTest(path):
                client = self.client_with_upstream_connection()
                self.fake.drop()
                self.assertStatus(self.ask_again(client, method, path, body), 200)

    def test_idle_upstream_connections_older_than_60_s_are_not_reused(self):
        upstream, now = self.server.gateway.upstream, [1000.0]
        with unittest.mock.patch.object(upstream, "_clock", lambda: now[0]):
            client = self.client_with_upstream_connection()
            now[0] += 60
            self.assertStatus(self.ask_again(client), 200)
            self.assertEqual(self.fake.accepted, 1)
            now[0] += 61
            self.assertStatus(self.ask_again(client), 200)
            self.assertEqual(self.fake.accepted, 2)
            eventually(lambda: len(self.fake._open) == 1, "the end of the old connection")

    def test_idle_upstream_connections_of_a_burst_are_closed_while_a_newer_one_is_in_use(self):
        upstream, now = self.server.gateway.upstream, [1000.0]
        with unittest.mock.patch.object(upstream, "_clock", lambda: now[0]):
            hold = self.hold()
            self.fake.replies["/api/chat"] = Reply.stream(hold, LINE)
            burst = [self.begin("POST", "/api/chat", CHAT) for _ in range(4)]
            eventually(lambda: len(self.fake.received) == 4)
            hold.set()
            for client in burst:
                self.assertStatus(client.answer(), 200)
            for _ in range(4):
                now[0] += 20
                self.assertStatus(self.ask("GET", "/api/tags"), 200)
            upstream.close(60)     # as the health probe does
            eventually(lambda: len(self.fake._open) == 1, "the end of the other connections")
            self.assertEqual(self.fake.accepted, 4)

    def test_tcp_keep_alive_is_set_for_clients_and_for_the_upstream(self):
        client = self.client_with_upstream_connection()
        client_side, = {**self.server.connections._idle, **self.server.connections._active}
        upstream_side, = self.server.gateway.upstream._idle
        expected = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}
        supported = {name: value for name, value in expected.items() if hasattr(socket, name)}
        for side in client_side, upstream_side:
            self.assertTrue(side.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            self.assertEqual({name: side.sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in supported}, supported)
        client.close()

    def test_request_is_retried_on_a_new_connection_if_the_reused_one_timed_out(self):
        client, fill = self.client_with_upstream_connection(), gateway.UpstreamConnection.fill

        def time_out_if_reused(connection, *args):
            if connection.reused:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))   # as the system reports it
            return fill(connection, *args)
        with unittest.mock.patch.object(gateway.UpstreamConnection, "fill", time_out_if_reused):
            self.assertStatus(self.ask_again(client), 200)
        with unittest.mock.patch.object(gateway.UpstreamConnection, "fill", side_effect=TimeoutError(errno.ETIMEDOUT, "timed out")):
            self.assertIn("cannot be reached", self.assertRefused(self.ask_again(client), 502))

    def test_restarted_upstream_is_reached_again(self):
        for number in range(4):
            self.begin("GET", "/api/version").answer()
        port = self.fake.server_address[1]
        self.fake.shutdown()
        self.fake.server_close()
        self.fake = self.enter(running(FakeOllama(port)))
        for number in range(4):
            self.assertStatus(self.ask("POST", "/api/chat", CHAT), 200)

    def test_request_is_retried_if_its_reused_connection_breaks(self):
        client = self.client_with_upstream_connection()
        self.fake.replies["/api/chat"] = [cut, Reply.json(200, {"done": True})]
        answer = self.ask_again(client)
        self.assertEqual((answer.status, answer.body), (200, b'{"done":true}'))
        self.assertEqual([seen.body for seen in self.fake.received], [compact(CHAT)] * 2)
        self.assertEqual(self.fake.accepted, 2, "the retry must use a new connection")

    def test_request_is_retried_only_once(self):
        client = self.client_with_upstream_connection()
        self.fake.replies["/api/chat"] = cut
        self.assertRefused(self.ask_again(client), 502)
        self.assertEqual(len(self.fake.received), 2)

    def test_request_on_a_new_connection_is_not_retried(self):
        self.fake.replies["/api/chat"] = cut
        self.assertRefused(self.ask("POST", "/api/chat", CHAT), 502)
        self.assertEqual(len(self.fake.received), 1)

    def test_request_is_not_retried_after_a_response_began(self):
        client = self.client_with_upstream_connection()
        self.fake.replies["/api/chat"] = Reply.raw(b"HTTP/1.1 2")
        self.assertRefused(self.ask_again(client), 502)
        self.assertEqual(len(self.fake.received), 1)

    def test_request_with_a_streamed_body_is_not_retried(self):
        client = self.client_with_upstream_connection()
        self.fake.replies[f"/api/blobs/{DIGEST}"] = cut
        self.assertRefused(self.ask_again(client, path=f"/api/blobs/{DIGEST}", body=b"blob"), 502)
        self.assertEqual(len(self.fake.received), 1)

    def test_upstream_connection_with_surplus_bytes_is_not_reused(self):
        surplus = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
        for label, framing in (("a length", b"Content-Length: 4\r\n\r\ngood"),
                               ("chunks", b"Transfer-Encoding: chunked\r\n\r\n4\r\ngood\r\n0\r\n\r\n")):
            with self.subTest(label):
                hold = self.hold()
                self.fake.replies["/api/tags"] = Reply.raw(b"HTTP/1.1 200 OK\r\n" + framing + surplus, hold)
                client = self.client()
                self.assertEqual(self.ask_again(client, "GET", "/api/tags", None).body, b"good")
                self.assertEqual(self.ask_again(client, "GET", "/api/version", None).json(), {"version": "0.9.3"})
                hold.set()

    def test_upstream_connection_that_received_bytes_while_idle_is_not_reused(self):
        answered, sent, hold = threading.Event(), threading.Event(), self.hold()

        def speak_again(exchange):
            answered.wait(GUARD)
            exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
            sent.set()
            hold.wait(GUARD)
        self.fake.replies["/api/tags"] = Reply.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood", speak_again)
        client = self.client()
        self.assertEqual(self.ask_again(client, "GET", "/api/tags", None).body, b"good")
        answered.set()
        sent.wait(GUARD)
        self.assertEqual(self.ask_again(client, "GET", "/api/version", None).json(), {"version": "0.9.3"})
        hold.set()

    def test_client_that_reads_nothing_stops_the_upstream(self):
        stalled = threading.Event()

        def flood(exchange):
            exchange.connection.settimeout(0.5)   # for 64 KiB: sending takes that long only when all buffers are full
            try:
                for _ in range(4096):
                    exchange.send(b"x" * 65536)
            except socket.timeout:
                stalled.set()
                raise Cut from None
        self.fake.replies["/api/chat"] = Reply.stream(flood)
        client = self.begin("POST", "/api/chat", CHAT)
        client.head()
        self.assertTrue(stalled.wait(GUARD), "256 MiB were accepted although the client reads nothing")


class ResponseRelayOverTls(OverTls, ResponseRelay):
    pass


CHUNK = '{"id":"chatcmpl-311","object":"chat.completion.chunk","created":1795401704,"model":"tiny","system_fingerprint":"fp_ollama","choices":['
TEXT_HEAD = '{"id":"cmpl-617","object":"text_completion","created":1795571834,"choices":['
TEXT_TAIL = '"model":"tiny","system_fingerprint":"fp_ollama"'
CHAT_LINE = '{"model":"tiny","created_at":"2026-11-23T02:41:43.56846717Z","message":{"role":"assistant","content":"%s"},'
NO_USAGE = ',"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}'


def events(*values):
    return "".join(f"data: {value}\n\n" for value in values).encode()


RECORDED = (    # route, content type, response of a real Ollama (0.9.3, shortened), whether the gateway requested the usage, expected usage
    ("/api/chat", NDJSON, "".join(
        [CHAT_LINE % text + '"done":false}\n' for text in ("Info", " уча", r'\"done\":true')]
        + [CHAT_LINE % "" + '"done_reason":"length","done":true,"total_duration":21941249,"load_duration":8747656,"prompt_eval_count":8,'
           '"prompt_eval_duration":2617067,"eval_count":6,"eval_duration":9931259}\n']).encode(), False, (8, None, 6)),
    ("/api/generate", JSON, b'{"model":"tiny","created_at":"2026-11-23T02:41:34.559073114Z","response":"Infoinding \\"eval_count\\":99 ","done":true,'
     b'"done_reason":"length","context":[1404,29901,22172],"total_duration":19657958,"load_duration":6588271,"prompt_eval_count":8,'
     b'"prompt_eval_duration":2661894,"eval_count":6,"eval_duration":9804650,"logprobs":[{"token":"x","eval_count":99}]}', False, (8, None, 6)),
    ("/api/generate", JSON, b'{"model":"tiny","created_at":"2026-11-23T02:41:34.6Z","response":"","done":true,"done_reason":"load"}', False,
     (0, None, 0)),
    ("/api/embed", JSON, b'{"model":"tiny-embed","embeddings":[[-0.1646678,-0.10103558]],"total_duration":1203041,"prompt_eval_count":3}', False,
     (3, None, 0)),
    ("/v1/embeddings", JSON, b'{"object":"list","data":[{"object":"embedding","embedding":[-0.1],"index":0}],"model":"tiny-embed",'
     b'"usage":{"prompt_tokens":3,"total_tokens":3}}\n', False, (3, None, 0)),
    ("/v1/chat/completions", "application/json", b'{"id":"chatcmpl-709","object":"chat.completion","created":1795401704,"model":"tiny","choices":'
     b'[{"index":0,"message":{"role":"assistant","content":"keepAnt\\u003e"},"finish_reason":"length"}],"usage":{"prompt_tokens":8,'
     b'"completion_tokens":5,"total_tokens":13}}\n', False, (8, None, 5)),
    *[("/v1/chat/completions", SSE, events(
        CHUNK + '{"index":0,"delta":{"role":"assistant","content":"ном"},"finish_reason":null}]}',
        CHUNK + '{"index":0,"delta":{"role":"assistant","content":"\\"usage\\":{}"},"finish_reason":null}]}',
        CHUNK + '{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":"length"}]}',
        CHUNK + '],"usage":{"prompt_tokens":8,"completion_tokens":3,"total_tokens":11}}', "[DONE]"), ours, (8, None, 3)) for ours in (True, False)],
    *[("/v1/completions", SSE, events(
        TEXT_HEAD + '{"text":" tier","index":0,"finish_reason":null}],' + TEXT_TAIL + NO_USAGE + "}",
        TEXT_HEAD + '{"text":"","index":0,"finish_reason":"length"}],' + TEXT_TAIL + NO_USAGE + "}",
        TEXT_HEAD + "]," + TEXT_TAIL + ',"usage":{"prompt_tokens":8,"completion_tokens":2,"total_tokens":10}}', "[DONE]"), ours, (8, None, 2))
      for ours in (True, False)],
)


def reformatted(body, ending=b"\n", data=b"data: ", order=list, **how):
    """Return a stream with its JSON written by json.dumps(**how), and with these line ends and this spelling of SSE's field name."""
    def line(text):
        field, brace, value = text.partition(b"{")
        value = brace and json.dumps(json.loads(brace + value, object_pairs_hook=lambda pairs: dict(order(pairs))), **how).encode()
        return field.replace(b"data: ", data) + value
    return ending.join(map(line, body.split(b"\n")))


with_reversed_keys = functools.partial(reformatted, order=reversed)


def escaped_keys(body):
    """Return JSON with the first letter of each key written as a \\u escape."""
    return re.sub(rb'([{,] *)"([a-z])(?=\w+" *:)', lambda match: b'%s"\\u%04x' % (match[1], ord(match[2])), body)


MESSAGES = b"".join(b"event: %s\ndata: %s\n\n" % (event["type"].encode(), compact(event)) for event in (
    {"type": "message_start", "message": {"content": [], "usage": {"input_tokens": 7, "output_tokens": 0}}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "\n\nevent: message_stop"}},
    {"type": "message_delta", "delta": {}, "usage": {"input_tokens": 3, "cache_read_input_tokens": 5, "output_tokens": 2}},
    {"type": "message_stop"}))


def responses(kind):
    """Return a stream of /v1/responses that ends with an event of this type."""
    usage = {"input_tokens": 8, "input_tokens_details": {"cached_tokens": 5}, "output_tokens": 2, "total_tokens": 10}
    whole = {"id": "resp_1", "tools": [{"parameters": {"usage": {"input_tokens": 99}}}], "usage": None, "max_output_tokens": 77}
    return b"".join(map(response_event, (
        {"type": "response.created", "sequence_number": 0, "response": whole},
        {"type": "response.output_text.delta", "sequence_number": 1, "delta": '"usage":{"input_tokens":99}'},
        {"type": kind, "sequence_number": 2, "response": {**whole, "output": [{"text": "x"}], "usage": usage}})))


CACHED_LINE = CHAT_LINE % "" + ('"done":true,"total_duration":1,"prompt_eval_count":8,"prompt_eval_cached_count":5,"prompt_eval_duration":2,'
                                '"eval_count":2,"eval_duration":9}\n')
NATIVE = (CHAT_LINE % "false" + '"done":false}\n' + CACHED_LINE).encode()
DETAILED = events(CHUNK + '{"index":0,"delta":{"content":"\\r\\n"}}]}',
                  CHUNK + '],"usage":{"prompt_tokens":8,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":5}}}', "[DONE]")
REFORMATTED = tuple((path, kind, body, ours, (8, 5, 2)) for path, kind, body, ours in (     # like RECORDED, as newer Ollamas or proxies write it
    *[("/v1/responses", SSE, spelling(responses(f"response.{end}")), False) for end in ("completed", "incomplete", "failed") for spelling in (
        bytes, reformatted, with_reversed_keys, functools.partial(reformatted, ending=b"\r\n", data=b"data:", separators=(" , ", " : ")))],
    ("/v1/responses", SSE, reformatted(responses("response.completed"), ending=b"\r"), False),
    *[("/v1/messages", SSE, reformatted(MESSAGES, ending), False) for ending in (b"\n", b"\r\n", b"\r")],
    ("/v1/messages", SSE, escaped_keys(MESSAGES), False),
    *[("/api/chat", NDJSON, spelling(NATIVE), False) for spelling in (bytes, reformatted, with_reversed_keys, escaped_keys)],
    *[("/api/chat", JSON, json.dumps(json.loads(CACHED_LINE), **how).encode(), False) for how in ({}, {"indent": 4}, {"sort_keys": True})],
    ("/api/chat", JSON, escaped_keys(CACHED_LINE.encode()), False),
    *[("/v1/chat/completions", SSE, reformatted(DETAILED, ending, data), ours)
      for ending in (b"\n", b"\r\n", b"\r") for data in (b"data: ", b"data:") for ours in (True, False)],
    ("/v1/messages", "application/json", b'{"usage" : {"output_tokens":2,"cache_read_input_tokens":5,"cache_creation_input_tokens":1,'
     b'"input_tokens":2}, "content":[]}', False)))
EXTRA_EVENT = re.compile(rb'data: ?[^\r\n]*"choices": ?\[\][^\r\n]*(?:\r\n|\r|\n){2}')


class UsageReaders(unittest.TestCase):
    """Token usage is read from a response however its bytes are split, and only requested usage is removed from it."""

    def usage_reader(self, path, kind, ours):
        reply = unittest.mock.Mock(status=200, **{"head.media_type": kind.partition(";")[0]})
        return gateway.usage_reader_for(reply, next(route for route in gateway.ROUTES if route.path == path), ours)

    def test_usage_of_a_partly_read_response_is_complete_at_its_end(self):
        reader, answer = gateway.UsageReader(), compact({"response": "x" * 100, "done": True, "prompt_eval_count": 8, "eval_count": 5})
        for piece, last, usage in ((answer[:60], False, gateway.Usage(None, None, None)), (answer[60:], True, gateway.Usage(8, None, 5))):
            reader.feed(piece, last)
            self.assertEqual(reader.usage, usage)

    def test_usage_of_recorded_responses_split_at_every_byte(self):
        for path, kind, body, ours, cost in RECORDED + REFORMATTED:
            expected = EXTRA_EVENT.sub(b"", body).replace(NO_USAGE.encode(), b"") if ours else body
            with self.subTest(path, ours=ours, body=body):
                for split in range(1, len(body), 1 if (path, kind, body, ours, cost) in RECORDED else 7):
                    tap = self.usage_reader(path, kind, ours)
                    self.assertEqual(tap.feed(body[:split], False) + tap.feed(body[split:], True), expected, split)
                    self.assertEqual(tap.usage[:3], cost, split)

    def test_usage_of_recorded_responses_read_byte_by_byte(self):
        for path, kind, body, ours, cost in RECORDED + REFORMATTED:
            with self.subTest(path, ours=ours):
                tap = self.usage_reader(path, kind, ours)
                for at in range(len(body)):
                    tap.feed(body[at:at + 1], at == len(body) - 1)
                self.assertEqual(tap.usage[:3], cost)

    def test_usage_of_recorded_responses_read_at_once(self):
        for path, kind, body, ours, cost in RECORDED + REFORMATTED:
            with self.subTest(path, ours=ours):
                tap = self.usage_reader(path, kind, ours)
                tap.feed(body, True)
                self.assertEqual(tap.usage[:3], cost)

    def test_usage_is_read_only_from_the_top_level_of_a_response(self):
        call = b'{"message":{"tool_calls":[{"function":{"arguments":{"usage":{"prompt_tokens":99},"total_duration":1,"eval_count":77}}}]},'
        counts = b'"prompt_eval_count":3,"eval_count":4'
        for answer, cost in ((b'{%b,"message":%b"x":1}}' % (counts, call), (3, 4)), (call + b'"total_duration":1,%b } \r\n' % counts, (3, 4)),
                             (b'{%b,"response":"\\"usage\\":{\\"prompt_tokens\\":99}"}' % counts, (3, 4)),
                             (call + b'"usage":{"total_duration":', (None, None)),
                             (b'{"usage":{"prompt_tokens":8},"output":[{"total_duration":5}]}', (8, 0)), (b'{"total_duration":7}', (0, 0)),
                             (b'{"usage":{"input_tokens":8,"output_tokens":6,"details":{"usage":{"input_tokens":9}}}}', (8, 6))):
            for pieces in (answer,), (answer[:20], answer[20:]):
                tap = self.usage_reader("/api/chat", JSON, False)
                for piece in pieces:
                    tap.feed(piece, piece is pieces[-1])
                self.assertEqual(tap.usage[::2], cost, pieces)

    def test_usage_is_not_read_from_the_arguments_of_a_tool_call(self):
        tap = self.usage_reader("/api/chat", NDJSON, False)
        call = b'{"message":{"tool_calls":[{"function":{"arguments":{"done":true,"response":{"eval_count":99},"eval_count":77}}}]},%s}\n'
        tap.feed(call % b'"done":false', False)
        self.assertEqual((tap.usage[::2], tap.ended), ((0, 1), False))
        tap.feed(call % b'"done":true,"prompt_eval_count":3,"eval_count":4', True)
        self.assertEqual(tap.usage[::2], (3, 4))

    def test_pending_bytes_of_a_broken_stream_lack_the_usage_the_gateway_requested(self):
        tap = self.usage_reader("/v1/completions", SSE, True)
        self.assertEqual(tap.feed(b'data: {"x":1}\n\ndata: {"id":"1","usage":{"pro', False), b'data: {"x":1}\n\n')
        self.assertEqual(tap.feed(b"", True), b'data: {"id":"1"')

    def test_usage_of_an_unstreamed_response_of_any_size_is_read(self):
        tap = self.usage_reader("/api/embed", JSON, False)
        tap.feed(b'{"model":"tiny-embed","embeddings":[', False)
        for _ in range(2000):
            tap.feed(b"[" + b"-0.1646678," * 400 + b"1],", False)
        tap.feed(b'[1]],"total_duration":1203041,"load_duration":501230,"prompt_eval_count":7}', True)
        self.assertEqual(tap.usage[::2], (7, 0))

    def test_usage_of_a_line_with_a_long_context_is_read(self):
        tap = self.usage_reader("/api/generate", NDJSON, False)
        line = b'{"done":true,"context":[' + b"29901," * 130_000 + b'1],"prompt_eval_count":9,"eval_count":2}\n'
        for at in range(0, len(line), 65536):
            tap.feed(line[at:at + 65536], False)
        self.assertEqual(tap.usage[::2], (9, 2))
        for size in range(600, 900, 7):     # around the limit of what is kept of a value, in one piece and in two
            line = b'{"done":true , "context" : [' + b"29901," * size + b'1] ,"prompt_eval_count":9,"eval_count":2}'
            for pieces in (line,), (line[:2000], line[2000:]):
                tap = self.usage_reader("/api/generate", JSON, False)
                for piece in pieces:
                    tap.feed(piece, piece is pieces[-1])
                self.assertEqual(tap.usage[::2], (9, 2), (size, len(pieces)))

    def test_usage_of_responses_too_long_to_be_decoded_as_a_whole(self):
        logprobs = b',"logprobs":[' + b'{"token":"eval_count","logprob":-0.1},' * 10_000 + b"{}]}"
        counts = b'"total_duration":1,"prompt_eval_count":9,"eval_count":2,"eval_duration":9'
        item = b'{"role" : "x", "eval_count":1.5}, '
        response = responses("response.completed").replace(b'"text":"x"', b'"text":"%s"' % (b"x" * 300_000))
        for path, kind, answer, cost in (
                ("/api/chat", JSON, b'{"message":{},"done":true,' + counts + logprobs, (9, 2)),
                ("/api/chat", JSON, b'{"messages":[' + item * 10_000 + b"{}], " + counts.replace(b":", b" : ") + b"}", (9, 2)),
                ("/v1/messages", "application/json", b'{"content":[' + item * 10_000
                 + b'{}],"usage":{"input_tokens":9,"output_tokens":2},"x":{}}', (9, 2)),
                ("/v1/responses", SSE, response, (8, 2))):
            for size in len(answer), 10_000:
                tap = self.usage_reader(path, kind, False)
                for at in range(0, len(answer), size):
                    tap.feed(answer[at:at + size], at + size >= len(answer))
                self.assertEqual(tap.usage[::2], cost, answer[:40])

    def test_events_with_any_line_ending_are_passed_on_at_once(self):
        for ending in b"\n\n", b"\r\n\r\n", b"\r\r":
            tap = self.usage_reader("/v1/chat/completions", SSE, True)
            event = b'data: {"choices":[{"delta":{"content":"x"}}],"usage":null}' + ending
            for _ in range(2):
                self.assertEqual(tap.feed(event, False), event.replace(b',"usage":null', b""))
            self.assertEqual((tap.feed(b"", True), tap.usage[::2]), (b"", (0, 2)))

    def test_stream_end_is_detected_from_its_last_event(self):
        for path, kind, body, ours, _ in RECORDED + REFORMATTED[:1] + REFORMATTED[3:4]:
            tap = self.usage_reader(path, kind, ours)
            tap.feed(body, False)
            self.assertEqual(tap.ended, kind in (NDJSON, SSE), path)

    def test_zero_usage_within_a_stream_is_ignored(self):
        tap = self.usage_reader("/v1/completions", SSE, True)
        tap.feed(events(TEXT_HEAD + '{"text":" tier"}],' + TEXT_TAIL + NO_USAGE + "}"), False)
        self.assertEqual((tap.reported, tap.usage[::2]), (None, (0, 1)))

    def test_missing_token_counts_are_zero_only_in_a_last_line(self):
        for answer, reported in (({"done": True, "done_reason": "load"}, True), ({"model": "x", "embeddings": []}, True),
                                 ({"total_duration": 5}, True), ({"error": "x"}, False), ({"done": False, "eval_count": 3}, False),
                                 ({"usage": {}}, False), ({}, False)):
            self.assertEqual(gateway.parse_usage(answer), gateway.Usage() if reported else None, answer)

    def test_cached_tokens_are_limited_to_the_prompt_tokens(self):
        self.assertEqual(gateway.parse_usage({"done": True, "prompt_eval_count": 5, "prompt_eval_cached_count": 9}), (5, 5, 0, 0))

    def test_invalid_token_counts_are_ignored(self):
        for value in (b"-5", b"1e9", b'"7"', b"null", b"[1]"):
            tap = self.usage_reader("/api/embed", JSON, False)
            tap.feed(b'{"prompt_eval_count":' + value + b"}", True)
            self.assertEqual(tap.usage[::2], (0, 0), value)

    def test_incomplete_lines_are_passed_on_unless_something_is_removed(self):
        for kind, path, ours in ((NDJSON, "/api/chat", False), (SSE, "/v1/chat/completions", False)):
            self.assertEqual(self.usage_reader(path, kind, ours).feed(b'data: {"cho', False), b'data: {"cho')

# == Logging and metrics ======================================================

SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\[\\"n])*",?)*)\})? (\S+)')


class Metrics(GatewayCase):

    def metrics(self, server=None, token=None):
        """Return the samples by name and labels, after a check of the format."""
        answer = self.ask("GET", "/metrics", server=server, token=self.admin if token is None else token)
        self.assertStatus(answer, 200)
        self.assertTrue(answer.headers["content-type"].startswith("text/plain; version=0.0.4"))
        samples, typed = {}, set()
        for line in answer.body.decode().split("\n")[:-1]:
            if line.startswith("#"):
                self.assertRegex(line, r"\A# (HELP|TYPE) ollama_gateway_\w+ \S")
                typed.add(line.split()[2])
                continue
            name, labels, number = SAMPLE.fullmatch(line).groups()
            self.assertIn(re.sub("_(bucket|sum|count)$", "", name) if "seconds" in name else name, typed)
            labels = tuple(re.findall(r'="((?:[^"\\]|\\.)*)"', labels or ""))
            self.assertNotIn((name, labels), samples)
            samples[name[len("ollama_gateway_"):], labels] = float(number)
        return samples

    def eventual_sample(self, *key):
        return eventually(lambda: self.metrics().get(key), key)

    def test_metrics_need_an_admin_token_unless_they_are_configured_as_open(self):
        self.assertRefused(self.ask("GET", "/metrics", token=""), 401)
        self.assertRefused(self.ask("GET", "/metrics"), 403)
        self.assertTrue(self.metrics())
        self.assertTrue(self.metrics(self.serve(metrics_open="on"), token=""))

    def test_metrics_count_requests_tokens_and_times(self):
        self.ask("POST", "/api/chat", CHAT)
        self.ask("POST", "/api/chat", {**CHAT, "stream": False})
        self.ask("GET", "/api/tags", token="")
        self.eventual_sample("requests_total", ("", "", "", "/api/tags", "401"))
        samples = self.metrics()
        for key, number in ((("requests_total", ("ada", "laptop", "tiny:latest", "/api/chat", "200")), 2),
                            (("tokens_total", ("ada", "laptop", "tiny:latest", "prompt")), 16),
                            (("tokens_total", ("ada", "laptop", "tiny:latest", "completion")), 10),
                            (("in_flight_requests", ()), 0), (("queued_requests", ()), 0), (("cancelled_total", ()), 0)):
            self.assertEqual(samples[key], number, key)
        self.assertGreaterEqual(samples["connections", ()], 1)
        for name in "first_byte_seconds", "queue_wait_seconds", "duration_seconds":
            buckets = [(labels[1], number) for (key, labels), number in samples.items() if key == name + "_bucket"]
            self.assertEqual(buckets[-1], ("+Inf", 2))
            self.assertEqual([number for _, number in buckets], sorted(number for _, number in buckets))
            self.assertEqual(samples[name + "_count", ("tiny:latest",)], 2)
            self.assertGreaterEqual(samples[name + "_sum", ("tiny:latest",)], 0)

    def test_metrics_count_cancellations_upstream_errors_and_rate_limits(self):
        self.fake.replies["/api/chat"] = Reply.stream(LINE, until_hangup)
        client = self.begin("POST", "/api/chat", CHAT)
        client.read(client.head(), until=LINE)
        self.assertEqual(self.metrics()["in_flight_requests", ()], 1)
        client.close()
        self.fake.replies["/api/embed"] = Reply.raw(b"nonsense")
        self.ask("POST", "/api/embed", CHAT)
        self.store.update("ada", "laptop", max_parallel=1, rpm=1)
        self.ask("POST", "/api/generate", CHAT)
        self.ask("POST", "/api/generate", CHAT)
        self.assertEqual([self.eventual_sample("cancelled_total", ()), self.eventual_sample("upstream_errors_total", ("upstream_failed",)),
                          self.eventual_sample("rate_limited_total", ("rpm",))], [1, 1, 1])

    def test_metrics_of_unknown_models_and_paths_create_no_series(self):
        before = len(self.metrics())
        self.fake.replies["/api/chat"] = Reply.json(404, {"error": "no"})
        for number in range(5):
            self.ask("POST", "/api/chat", {"model": f"nonsense-{number}"})
            self.ask("GET", f"/nonsense-{number}")
            self.ask("GET", f"/v1/models/nonsense-{number}", token=f"ogw_{number}")
        eventually(lambda: ("requests_total", ("", "", "", "/v1/models/{model}", "401")) in self.metrics(), "counting of the requests")
        self.assertEqual({labels[2] for name, labels in self.metrics() if name == "requests_total"}, {""})
        self.assertLess(len(self.metrics()) - before, 60)

    def test_metric_labels_are_escaped(self):
        token = self.store.create('a"b\\c', "d}e,f")[1]
        self.ask("GET", "/api/tags", token=token)
        self.eventual_sample("requests_total", ('a\\"b\\\\c', "d}e,f", "", "/api/tags", "200"))

    def test_number_of_metric_series_is_limited(self):
        metrics, record = gateway.Metrics({}), gateway.RequestContext("", 0)
        record.sent_at = record.first_byte_at = record.ended_at = 1.0
        record.token = self.store.list("ada")[0]
        with unittest.mock.patch.object(gateway, "MAX_SERIES", 3):
            for number in range(9):
                record.model_label = f"m{number}"
                metrics.observe(record)
        lines = [line for line in metrics.lines() if "requests_total{" in line or "duration_seconds_count" in line]
        self.assertEqual(len(lines), 8)
        self.assertEqual(sum(float(line.split()[-1]) for line in lines), 18)


class RequestLog(GatewayCase):

    def test_finished_request_is_logged_in_one_line(self):
        answer = self.ask("POST", "/api/chat", CHAT)
        fields = self.logged()
        self.assertEqual({name: fields[name] for name in ("token", "method", "path", "model", "status", "bytes", "id")},
                         {"token": "ada/laptop", "method": "POST", "path": "/api/chat", "model": "tiny", "status": "200",
                          "bytes": str(len(answer.body)),
                          "id": answer.headers["x-request-id"]})
        self.assertTrue(fields["peer"].startswith("127.0.0.1"))
        self.assertTrue(0 <= float(fields["first"]) <= float(fields["total"]), fields)
        self.assertNotIn("outcome", fields)
        self.ask("GET", "/")
        self.logged(lambda fields: fields["path"] == "/")
        self.assertEqual(len(self.lines), 2)

    def test_model_is_logged_for_every_api_dialect(self):
        for method, path, body in (("POST", "/api/generate", {"model": "a"}), ("POST", "/api/show", {"name": "a"}),
                                   ("POST", "/v1/chat/completions", {"messages": [], "model": "a"}),
                                   ("POST", "/v1/embeddings", {"input": '"model": "b"', "model": "a"}), ("GET", "/v1/models/a", None)):
            with self.subTest(path):
                self.ask(method, path, body)
                self.assertEqual(self.logged(lambda fields: fields["path"] == path)["model"], "a")

    def test_request_without_a_model_is_logged_without_one(self):
        for body in (b"", b"[]", b"nonsense", b'{"model":', b'{"model": 5}', b"\xff\xfe", b'{"options": {"model": "b"}}'):
            with self.subTest(body):
                self.lines.clear()
                self.assertStatus(self.ask("POST", "/api/chat", body, token=self.admin), 200)
                self.assertEqual(self.logged()["model"], "-")

    def test_refused_request_is_logged(self):
        for method, path, token, status in (("GET", "/api/tags", "", "401"), ("GET", "/api/tags", "ogw_nonsense", "401"),
                                            ("GET", "/nonsense", self.token, "404"),
                                            ("POST", "/api/pull", self.token, "403"), ("PUT", "/api/chat", self.token, "405")):
            with self.subTest(status, token=token):
                self.lines.clear()
                answer = self.ask(method, path, token=token)
                fields = self.logged()
                self.assertEqual((fields["status"], fields["method"], fields["path"], fields["id"]),
                                 (status, method, path, answer.headers["x-request-id"]))
                self.assertEqual(fields["token"], "ada/laptop" if status == "403" else "-")

    def test_malformed_request_is_logged(self):
        with Client(self.server.server_address) as client:
            client.send(b"nonsense\x1b[31m\r\n\r\n")
            answer = client.answer()
        self.assertEqual(self.logged()["id"], answer.headers["x-request-id"])
        self.assertTrue(all(line.isprintable() for line in self.lines), self.lines)

    def test_secrets_prompts_and_queries_are_not_logged(self):
        unknown, prompt, query = "ogw_" + "unknown" * 6 + "x", "my-prompt-is-private", "my-query-is-private"
        self.ask("POST", f"/api/chat?key={query}", {**CHAT, "messages": [{"role": "user", "content": prompt}]})
        self.ask("POST", "/api/generate", {"model": "tiny", "prompt": prompt, "system": prompt}, token=unknown)
        self.ask("GET", f"/t/{self.token}/api/tags?{query}", token="", headers=[("x-api-key", unknown)])
        self.ask("GET", "/api/tags", token="", headers=[("Authorization", f"Basic {unknown}"), ("Cookie", unknown)])
        self.ask("POST", "/api/chat", b'{"model": "tiny", "prompt": "' + prompt.encode())
        with Client(self.server.server_address) as client:
            client.send(request("GET", "/api/tags", headers=[("Bad Header", unknown), *bearer(self.token)]))
            client.answer()
        eventually(lambda: len(self.lines) >= 6)
        log = "\n".join(self.lines)
        for secret in (self.token, unknown, prompt, query, self.token[4:20], unknown[4:20]):
            self.assertNotIn(secret, log)

    def test_control_characters_of_a_client_are_escaped_in_the_log(self):
        odd = 'a\nstatus=200 model="x" \x1b[31m\u2028\u202e"'
        self.ask("POST", "/api/chat", {"model": odd})
        self.assertEqual(self.logged()["model"], odd)
        self.ask("GET", '/api/"x"\\=1')
        self.assertEqual(self.logged(lambda fields: fields["status"] == "404")["path"], '/api/"x"\\=1')
        self.assertEqual([line for line in self.lines if not line.isprintable()], [])

    def test_user_and_token_names_with_spaces_are_logged_in_full(self):
        secret = self.store.create("Ada Lovelace", 'her "new" phone')[1]
        self.ask("GET", "/api/tags", token=secret)
        self.assertEqual(self.logged()["token"], 'Ada Lovelace/her "new" phone')

    def test_long_model_name_is_shortened_in_the_log(self):
        self.ask("POST", "/api/chat", {"model": "m" * 100_000})
        self.logged()
        self.assertLess(len(self.lines[0]), 2000)

    def test_valid_request_id_is_kept_and_an_invalid_one_replaced(self):
        for good in ("x", "A-z_0.9", "r" * 128):
            self.assertEqual(self.ask("GET", "/api/tags", headers=[("X-Request-Id", good)]).headers["x-request-id"], good)
        for bad in ("", "r" * 129, "a b", "a/b", "é", "a\tb", "a,b"):
            with self.subTest(bad):
                answer = self.ask("GET", "/api/tags", headers=[("X-Request-Id", bad)])
                self.assertRegex(answer.headers["x-request-id"], r"\A[A-Za-z0-9._-]{1,128}\Z")
                self.assertNotEqual(answer.headers["x-request-id"], bad)

    def test_generated_request_ids_differ(self):
        self.assertEqual(len({self.ask("GET", "/").headers["x-request-id"] for _ in range(5)}), 5)

    def test_last_use_of_a_token_is_stored(self):
        started = int(time.time())
        self.ask("GET", "/api/tags")
        used = eventually(lambda: next((token.last_used_at for token in self.store.list("ada") if token.last_used_at), None),
                          "recording of the use")
        self.assertTrue(started <= used <= time.time())
        self.assertIsNone(self.store.list("root")[0].last_used_at)

    def test_last_use_of_a_token_is_stored_before_the_gateway_stops(self):
        with self.serving() as server:
            self.ask("GET", "/api/tags", token=self.admin, server=server)
        self.assertTrue(self.store.list("root")[0].last_used_at)
        self.assertEqual(len(self.lines), 1)


class BackgroundLog(Case):
    """Log lines are written in the background: a failing record or a failing log loses no lines but its own."""

    def records(self, count):
        return [logging.makeLogRecord({"levelname": "INFO", "levelno": 20, "msg": f"line {number}"}) for number in range(count)]

    def test_record_that_fails_does_not_lose_the_rest_of_its_batch(self):
        store = self.open_store()
        token = store.create("ada", "laptop")[0]
        ledger, metrics = gateway.UsageLedger(store, None), gateway.Metrics({})
        first, go, lines = threading.Event(), self.hold(), []
        observe, line = gateway.Metrics.observe, gateway.log_line

        def log(text):
            first.set()
            go.wait(GUARD)
            lines.extend(text.split("\n"))

        def fails_for(name, action):
            def act(*args):
                if args[-1].id == name:
                    raise RuntimeError(f"{name} is bad")
                return action(*args)
            return act
        with unittest.mock.patch.object(gateway.Metrics, "observe", fails_for("r2", observe)), \
                unittest.mock.patch.object(gateway, "log_line", fails_for("r3", line)), \
                self.assertLogs("ollama_gateway", "ERROR") as logs, contextlib.closing(gateway.Journal(ledger, metrics, log)) as journal:
            for number in range(6):
                record = gateway.RequestContext("", 0)
                record.id, record.token, record.route, record.model_label, record.status = f"r{number}", token, CHAT_ROUTE, "m", 200
                ledger.start(record)
                record.released_at = record.started_at
                journal.write(record)
                self.assertTrue(first.wait(GUARD))  # so that the others form one batch
            go.set()
        self.assertEqual([gateway_line.split()[0] for gateway_line in lines], ["id=r0", "id=r1", "id=r2", "id=r4", "id=r5"])
        self.assertEqual([row["requests"] for row in store.usage("user", 0)], [6])
        self.assertEqual([[name in text for name in ("r2", "r3")] for text in logs.output], [[True, False], [False, True]])
        self.assertIn('route="/api/chat",status="200"} 5', "\n".join(metrics.lines()))

    def test_usage_is_stored_when_the_log_fails(self):
        store = self.open_store()
        ledger, record = gateway.UsageLedger(store, None), gateway.RequestContext("", 0)
        record.token, record.route, record.model_label, record.status = store.create("ada", "laptop")[0], CHAT_ROUTE, "m", 200
        ledger.start(record)
        log = unittest.mock.Mock(side_effect=RuntimeError("no log"))
        with self.assertLogs("ollama_gateway", "ERROR"), contextlib.closing(gateway.Journal(ledger, gateway.Metrics({}), log)) as journal:
            record.released_at = record.started_at
            journal.write(record)
        self.assertEqual([row["requests"] for row in store.usage("user", 0)], [1])

    def test_lines_for_a_blocked_log_are_dropped_counted_and_reported(self):
        go, began, written = self.hold(), threading.Event(), []

        def write(data):
            began.set()
            go.wait(GUARD)
            written.append(data.decode())
        with unittest.mock.patch.object(gateway, "LOG_QUEUE", 100):
            writer = gateway.LogWriter("the log", write, logging.INFO)
            first, *others = self.records(9)
            writer.handle(first)
            self.assertTrue(began.wait(GUARD))
            for record in others:
                writer.handle(record)
            go.set()
            eventually(lambda: "dropped" in "".join(written), "the report")
            writer.handle(first)
            writer.finish()
        *lines, report, last = "".join(written).splitlines()
        self.assertEqual([line.split()[-1] for line in (*lines, last)], ["0", "1", "2", "0"])
        self.assertRegex(report, r"\A20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z WARNING dropped 6 log lines: the log is too slow")
        self.assertEqual(writer.dropped, 6)

    def test_unwritable_log_is_reported_once_in_the_other_logs(self):
        whole, full = [], [True]

        def write(data):
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(data.decode())
        written, bad = [], gateway.LogWriter("bad.log", write, logging.INFO)
        good = gateway.LogWriter("good.log", lambda data: whole.append(data.decode()), logging.INFO)
        with unittest.mock.patch.object(gateway.LOG, "handlers", [bad, good]), unittest.mock.patch.object(gateway.LOG, "propagate", False):
            for number in range(3):
                bad.handle(self.records(1)[0])
                eventually(lambda: bad.dropped > number, "dropping of the line")
            eventually(lambda: bad.dropped == 4, "dropping of the error report")
            full.clear()
            bad.handle(self.records(1)[0])
            bad.finish()
            good.finish()
        self.assertEqual([line.split(" ", 1)[1] for line in "".join(whole).splitlines()],
                         ["ERROR log lines are lost: bad.log cannot be written: [Errno 28] No space left on device"])
        self.assertRegex("".join(written), r"(?s)INFO line 0\n.*WARNING dropped 4 log lines: bad\.log .*cannot be written\n\Z")

    def test_every_line_of_a_traceback_has_time_and_level(self):
        written = []
        writer = gateway.LogWriter("the log", lambda data: written.append(data.decode()), logging.INFO)
        with unittest.mock.patch.object(gateway.LOG, "handlers", [writer]), unittest.mock.patch.object(gateway.LOG, "propagate", False):
            try:
                raise ValueError("no \ud800")
            except ValueError:
                gateway.LOG.exception("a fault")
            writer.finish()
        lines = "".join(written).splitlines()
        self.assertRegex(lines[-1], r"Z ERROR ValueError: no \\ud800")
        self.assertEqual({line.split()[1] for line in lines}, {"ERROR"})

    def test_log_file_is_rotated_by_size_and_reopened_on_request(self):
        path = self.path("app.log")
        with unittest.mock.patch.object(gateway, "LOG_FILE_BYTES", 14):
            file = gateway.LogFile(path)
            self.addCleanup(lambda: [os.close(descriptor) for descriptor in file._descriptors])
            for letter in b"abcdefghijklm":
                file.write(b"line %c\n" % letter)
            names = ["app.log", *(f"app.log.{number}" for number in range(1, 6))]
            self.assertEqual(["".join(self.read(name).decode().split()).replace("line", "") for name in names], ["m", "kl", "ij", "gh", "ef", "cd"])
            self.assertEqual(set(os.listdir(self.folder)), {*names})
            os.replace(path, self.path("moved"))
            file.write(b"8\n")
            file.reopen()
            file.write(b"9\n")
        self.assertEqual((self.read("moved"), self.read("app.log")), (b"line m\n8\n", b"9\n"))
        if os.name == "posix":
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)


class ServingWithUnreadStderr(Serving):
    """A gateway whose stderr nobody reads after the first line, until `resume` is set."""

    def __init__(self, *argv):
        self.resume = threading.Event()
        super().__init__(*argv)

    def _read(self):
        self.lines.append(self.process.stderr.readline().decode())
        self.resume.wait()
        super()._read()

    def __exit__(self, *exc_info):
        self.resume.set()
        super().__exit__(*exc_info)


@unittest.skipIf(os.name == "nt", "the process is stopped by signals")
class StalledLog(Case):
    """A blocked log loses its own lines only: requests, usage records and the shutdown go on."""

    def setUp(self):
        super().setUp()
        fake, self.store = self.enter(running(FakeOllama())), self.open_store()
        self.token = self.store.create("ada", "laptop")[1]
        self.argv = self.folder, "--port", "0", "--ollama-url", fake.url, "--db", self.db

    def fill_log(self, serving, lines):
        """Cause this many log lines of 7 KB, then 20 requests that count as usage, and wait until that is stored."""
        with Client(serving.server_address) as client:
            for number in range(lines):
                self.assertEqual(client.ask("GET", f"/{number}{'x' * 7000}", headers=bearer(self.token)).status, 404)
            for _ in range(20):
                self.assertEqual(client.ask("POST", "/api/chat", CHAT, bearer(self.token)).status, 200)
        eventually(lambda: [row["requests"] for row in self.store.usage("user", 0)] == [20], "storing of the usage")

    def test_stalled_stderr_blocks_neither_the_usage_records_nor_the_shutdown(self):
        with ServingWithUnreadStderr(*self.argv) as serving:
            self.fill_log(serving, 20)
            with Client(serving.server_address) as client:
                client.ask("POST", "/api/chat", CHAT, bearer(self.token))

            def ends_after_another_signal():
                serving.process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return serving.process.wait(0.05) is not None
            eventually(ends_after_another_signal, "the end of the process")     # repeated signals lose nothing either
        self.assertEqual(serving.process.returncode, 0)
        self.assertEqual([row["requests"] for row in self.store.usage("user", 0)], [21])

    def test_dropped_log_lines_are_reported_when_stderr_is_read_again(self):
        with ServingWithUnreadStderr(*self.argv) as serving:
            self.fill_log(serving, 250)
            serving.resume.set()
            report = eventually(lambda: next((line for line in serving.lines if "dropped" in line), None), "the report")
            dropped = int(re.search(r"WARNING dropped (\d+) log lines: stderr is too slow", report).group(1))
            with Client(serving.server_address) as client:
                client.ask("GET", "/health")
            self.assertEqual(serving.stop(), 0)
            self.assertEqual(sum(" status=" in line for line in serving.lines) + dropped, 271)

    @unittest.skipUnless(hasattr(os, "mkfifo"), "needs a FIFO")
    def test_stalled_log_file_blocks_neither_stderr_nor_the_shutdown(self):
        os.mkfifo(self.path("log"))
        reader = os.open(self.path("log"), os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(os.close, reader)
        with Serving(*self.argv, "--log-file", self.path("log")) as serving:
            self.fill_log(serving, 20)
            eventually(lambda: sum("path=/api/chat" in line for line in serving.lines) == 20, "the lines on stderr")
            self.assertEqual(serving.stop(), 0)


class DatabaseFailures(GatewayCase):
    """If the disk or the database fails, whatever needs neither goes on."""

    def test_locked_database_blocks_neither_requests_nor_their_log_lines(self):
        self.assertStatus(self.ask("GET", "/api/tags"), 200)
        with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            for number in range(3):
                self.assertStatus(self.ask("GET", "/api/tags", headers=[("X-Request-Id", f"locked-{number}")]), 200)
                self.logged(lambda fields, number=number: fields["id"] == f"locked-{number}")
            other.execute("ROLLBACK")
        eventually(lambda: self.store.list("ada")[0].last_used_at, "storing of the last use")

    def test_failure_to_store_last_uses_is_logged_once_and_retried(self):
        full = gateway.Failure("the disk is full")
        with unittest.mock.patch.object(self.store, "add_usage", side_effect=full) as add, self.assertLogs("ollama_gateway") as logs:
            self.assertStatus(self.ask("GET", "/api/tags"), 200)
            eventually(lambda: add.call_count >= 2, "a second attempt")
        self.assertEqual(["the disk is full" in line for line in logs.output], [True])
        eventually(lambda: self.store.list("ada")[0].last_used_at, "storing of the last use")

    def test_server_killed_while_tokens_are_created_loses_none(self):
        serving = self.enter(Serving(self.folder, "--port", "0", "--ollama-url", self.fake.url, "--db", self.db))
        self.assertTrue(serving.first_line)
        made = []
        for number in range(6):
            if number == 3:
                serving.process.kill()
            done = subprocess.run([sys.executable, GATEWAY, "token", "create", "bob", str(number), "--quiet", "--db", self.db],
                                  stdout=subprocess.PIPE, check=True, timeout=3 * GUARD)
            made.append(done.stdout.decode().strip())
        self.assertEqual([found(self.store, secret).name for secret in made], list("012345"))
        with contextlib.closing(sqlite3.connect(self.db)) as db:
            self.assertEqual(db.execute("PRAGMA integrity_check").fetchall(), [("ok",)])

# == OpenAPI ==================================================================


class OpenApi(GatewayCase):

    def document(self, **flags):
        answer = self.ask("GET", "/openapi.json", token="", server=self.serve(**flags))
        self.assertStatus(answer, 200)
        return answer.json()

    def test_openapi_document_has_exactly_the_routes_that_are_served(self):
        paths = self.document()["paths"]
        self.assertEqual({(method.upper(), path) for path, methods in paths.items() for method in methods},
                         {(route.method, route.path) for route in gateway.ROUTES})

    def test_openapi_document_has_the_base_path_and_lacks_disabled_routes(self):
        paths = self.document(base_path="/team", no_admin_api="on", metrics_open="on")["paths"]
        self.assertIn("/team/chat", paths)
        self.assertIn("/v1/models", paths)
        self.assertEqual(paths["/metrics"]["get"]["security"], [])
        self.assertEqual([path for path in paths if path.startswith(("/api", "/admin"))], [])

    def test_every_route_has_a_summary(self):
        self.assertTrue(all(route.summary for route in gateway.ROUTES))

    def test_every_openapi_reference_resolves(self):
        document = self.document()
        for reference in set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document))):
            with self.subTest(reference):
                self.assertTrue(functools.reduce(lambda value, key: value[key], reference.split("/"), document))
        names = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
        self.assertEqual(len(set(names)), len(names))

    def test_request_bodies_of_ollamas_routes_are_left_to_its_documentation(self):
        document = self.document()
        self.assertTrue(document["externalDocs"]["url"].startswith("https://"))
        chat = document["paths"]["/api/chat"]["post"]
        self.assertNotIn("requestBody", chat)
        self.assertEqual((chat["summary"], chat["responses"]["200"]), ("continue a conversation", {"description": "done"}))

    def test_every_openapi_schema_has_a_json_schema_type(self):
        for name, schema in self.document()["components"]["schemas"].items():
            for kind in re.findall(r'"type": "(\w+)"', json.dumps(schema)):
                with self.subTest(name):
                    self.assertIn(kind, ("object", "string", "integer", "number", "boolean", "array"))

    def test_error_responses_conform_to_their_schemas(self):
        document = self.document()
        for path, dialect in (("/api/tags", "ollama"), ("/v1/models", "openai"), ("/v1/messages", "anthropic")):
            answer = self.ask("GET" if path != "/v1/messages" else "POST", path, token="")
            operation = document["paths"][path]["get" if path != "/v1/messages" else "post"]
            self.assertEqual(operation["tags"], [dialect.capitalize()])
            self.assertConforms(answer.json(), operation["responses"]["default"]["content"]["application/json"]["schema"], document)
        for status, meaning in gateway.REFUSALS.values():
            self.assertIn(f"{status}: {meaning}", document["info"]["description"])

    def test_responses_of_the_gateways_own_endpoints_conform_to_their_schemas(self):
        document = self.document()
        self.ask("POST", "/api/chat", CHAT)
        eventually(lambda: self.store.usage("user", 0), "storing of the usage")
        for path in "/health", "/me", "/admin/status", "/admin/usage", "/admin/tokens", "/admin/tokens/1":
            with self.subTest(path):
                answer = document["paths"][path.replace("/1", "/{id}")]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
                self.assertConforms(self.ask("GET", path, token=self.admin).json(), answer, document)

    def assertConforms(self, value, schema, document=None):
        """Check a value against a schema, with the part of JSON Schema that the document uses."""
        if "$ref" in schema:
            schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        kinds = schema.get("type", [])
        types = {"object": dict, "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "null": type(None)}
        if kinds:
            self.assertTrue(any(isinstance(value, types[kind]) for kind in ([kinds] if isinstance(kinds, str) else kinds)), (value, schema))
        if isinstance(value, dict):
            self.assertLessEqual(set(schema.get("required", ())), set(value))
            for name, member in value.items():
                self.assertConforms(member, schema.get("properties", {}).get(name, {}), document)
        for member in value if isinstance(value, list) else ():
            self.assertConforms(member, schema.get("items", {}), document)

# == Web pages ================================================================


class PrefixProxy(http.server.BaseHTTPRequestHandler):
    """A reverse proxy that serves the gateway below /box."""

    def do_GET(self):   # noqa: N802, http.server's name
        credentials = [(name, value) for name, value in self.headers.items() if name == "Authorization"]
        with Client(self.server.gateway) as client:
            answer = client.ask("GET", self.path[len("/box"):] if self.path.startswith("/box/") else "/nonsense", None, credentials)
        self.send_response_only(answer.status)
        for name in set(answer.headers) & {"content-type", "content-security-policy"}:
            self.send_header(name, answer.headers[name])
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, *args):
        """Log nothing."""


@unittest.skipUnless(chromium_binary(), "needs Chromium")
class WebPagesInBrowser(GatewayCase):

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.browser = Chromium(chromium_binary())
        cls.addClassCleanup(cls.browser.close)

    def open(self, path, server=None, **how):
        return self.enter(self.visiting("http://{}:{}".format(*(server or self.server).server_address[:2]), path, **how))

    @contextlib.contextmanager
    def visiting(self, origin, path, **how):
        """Open a tab; afterwards, check that it logged no errors and sent requests to this origin only."""
        tab = Tab(self.browser, **how)
        try:
            tab.visit(origin + path)
            yield tab
            self.assertEqual(tab.complaints(), [])
            self.assertEqual([url for url in tab.asked() if not url.startswith((origin + "/", "data:"))], [])
            self.assertIsNone(tab.evaluate("window.hit"))
        finally:
            tab.close()

    def docs(self, token=None, path="/docs", server=None, **how):
        """Open the documentation and sign in with ada's token."""
        tab = self.open(path, server, **how)
        tab.type("Token", token or self.token)
        tab.press("Sign in")
        tab.shows("Sign out", "#signed-in")
        return tab

    def panel(self, server=None, **how):
        """Open the admin page and sign in with an admin token."""
        if not (server or self.server).gateway.health.up:
            self.probe_health(server)
        tab = self.open("/admin", server, **how)
        tab.type("Admin token", self.admin)
        tab.press("Sign in")
        tab.shows("ada/laptop", "#tokens")
        return tab

    def chat(self, *pieces):
        self.fake.replies["/api/chat"] = Reply.stream(*pieces)

    def names(self):
        return [f"{token.user}/{token.name}" for token in self.store.list()]

    # -- the documentation

    def test_docs_keep_the_token_in_session_storage_only(self):
        tab = self.docs()
        tab.shows("ada/laptop", "#who")
        kept = "JSON.stringify([Object.entries(sessionStorage), localStorage.length, document.cookie])"
        self.assertEqual(json.loads(tab.evaluate(kept)), [[[KEY, self.token]], 0, ""])
        tab.visit(tab.evaluate("location.href"))
        tab.shows("ada/laptop", "#who")
        with tab.reloading():
            tab.press("Sign out")
        self.assertEqual(json.loads(tab.evaluate(kept)), [[], 0, ""])
        self.assertFalse(tab.holds("ada/laptop"))

    def test_docs_show_a_streamed_answer_token_by_token(self):
        rest = self.hold()
        self.chat(chat_line("", thinking="Blue?"), chat_line("The sky"), rest,
                  chat_line(" is blue"), LAST_CHAT_LINE)
        tab = self.docs()
        tab.type("Prompt", "Why?")
        tab.press("Send")
        tab.shows("The sky", "#said")
        self.assertEqual((tab.text("#thought"), tab.text("#said")), ("Blue?", "The sky"))
        tab.shows("first token after", "#figures")
        rest.set()
        tab.shows("5 tokens, 5.0 a second", "#figures")
        self.assertEqual(tab.text("#said").strip(), "The sky is blue")
        sent = json.loads(next(seen.body for seen in self.fake.received if seen.path == "/api/chat"))
        self.assertEqual(sent, {"model": "tiny:latest", "messages": [{"role": "user", "content": "Why?"}]})

    def test_docs_show_lines_and_characters_that_were_split_correctly(self):
        whole = chat_line("blü") + chat_line("te") + LAST_CHAT_LINE
        cuts = (0, whole.index(b"\xbc"), whole.index(b"\n") + 1, whole.index(b'"te"') + 2, len(whole) - 1, len(whole))
        holds = [self.hold() for _ in cuts]
        self.chat(*itertools.chain.from_iterable((whole[begin:end], hold) for begin, end, hold in zip(cuts, cuts[1:], holds)))
        tab = self.docs()
        tab.evaluate("""window.decoded = 0;
            const decode = TextDecoder.prototype.decode;
            TextDecoder.prototype.decode = function(data, ...how) {
                window.decoded += data ? data.length : 0;
                return decode.call(this, data, ...how);
            }""")
        tab.press("Send")
        for end, hold in zip(cuts[1:], holds):
            eventually(lambda end=end: tab.evaluate("window.decoded") == end, f"arrival of the first {end} bytes")
            hold.set()
        tab.shows("5 tokens", "#figures")
        self.assertEqual(tab.text("#said"), "blüte")

    def test_docs_enable_send_only_when_the_models_are_known(self):
        rest = self.hold()
        self.fake.replies["/api/tags"] = Reply.stream(b'{"models": ', rest, json.dumps([MODEL]).encode() + b"}")
        tab = self.docs()
        self.assertTrue(tab.evaluate("byId('send').disabled"))
        rest.set()
        tab.press("Send")
        tab.shows("The sky is blue.", "#said")

    def test_admin_page_shows_a_new_secret_after_its_dialog_was_cancelled(self):
        tab = self.panel()
        tab.evaluate("""(() => {
            const ask = window.fetch;
            window.fetch = (url, how) => how.method === "POST"
                ? new Promise(released => { window.release = () => released(ask(url, how)); }) : ask(url, how);
        })()""")
        tab.press("New secret: ada/laptop")
        tab.press("New secret")
        tab.press("Cancel")
        eventually(lambda: tab.evaluate("!document.querySelector('dialog')"), "closing of the dialog")
        tab.evaluate("release()")
        tab.shows("shown only once", "dialog")

    def test_docs_stop_button_cancels_the_request(self):
        self.chat(chat_line("The"), until_hangup)
        tab = self.docs()
        tab.press("Send")
        tab.shows("The", "#said")
        tab.press("Stop")
        self.assertEqual(self.fake.hangups.get(timeout=GUARD), "/api/chat")
        tab.shows("(stopped)", "#figures")
        self.chat(chat_line("Again"), LAST_CHAT_LINE)
        tab.press("Send")
        tab.shows("Again", "#said")

    def test_docs_show_errors_of_ollama_and_of_the_gateway(self):
        tab = self.docs()
        for label, reply, text in (("Ollama's error", Reply.json(404, {"error": "model 'tiny' not found"}), "model 'tiny' not found"),
                                   ("an error line", Reply.stream(chat_line("The"), b'{"error": "out of <b>memory</b>"}\n'), "out of <b>memory</b>"),
                                   ("a broken stream", Reply.stream(chat_line("The"), cut), "broke off")):
            with self.subTest(label):
                self.fake.replies["/api/chat"] = reply
                tab.press("Send")
                tab.shows(text, "#problem")
        del self.fake.replies["/api/chat"]
        self.store.update("ada", "laptop", rpm=1)
        tab.press("Send")
        tab.shows("The sky is blue.", "#said")
        tab.press("Send")
        tab.shows("try again in", "#problem")
        self.store.delete("ada", "laptop")
        tab.press("Send")
        tab.shows("This token is not valid", "#problem")

    def test_sign_in_rejects_an_invalid_token_and_does_not_keep_it(self):
        for path, label in (("/docs", "Token"), ("/admin", "Admin token")):
            tab = self.open(path)
            for secret, message in (("ogw_nonsense", "not valid"), ("ö no", "one word")):
                with self.subTest(path, secret=secret):
                    tab.type(label, secret)
                    tab.press("Sign in")
                    tab.shows(message, "#sign-in-problem")
                    self.assertEqual(tab.evaluate("sessionStorage.length"), 0)

    def test_docs_show_limits_and_usage(self):
        self.ask("POST", "/api/chat", CHAT)
        self.store.update("ada", "laptop", rpm=30, tokens_per_day=1000, models="tiny")
        eventually(lambda: self.store.usage("day", 0), "storing of the usage")
        tab = self.docs()
        for text in ("tiny", "30\nleft of 30", "987\nleft of 1,000", "until deleted"):
            tab.shows(text, "#me")
        tab.evaluate("document.querySelector('#me details').open = true")
        tab.shows("13", "#me table")
        self.assertEqual(tab.evaluate("document.querySelectorAll('#me svg g').length"), 1)

    def test_docs_examples_contain_the_address_and_the_model_but_not_the_secret(self):
        self.fake.replies["/api/tags"] = Reply.json(200, {"models": [dict(MODEL, name='x"$(rm)'), dict(MODEL, name="own:1b")]})
        tab = self.docs()
        address = "http://{}:{}".format(*self.server.server_address[:2])
        eventually(lambda: tab.evaluate("byId('model').options.length") == 2, "the list of models")
        for name in ("curl", "ollama", "Python", "JavaScript", "OpenAI", "Anthropic"):
            with self.subTest(name):
                tab.evaluate(f"byId('example-{name}').open = true")
                tab.shows(address, f"#example-{name} code")
                tab.shows("own:1b", f"#example-{name} code")
        tab.press("Copy")
        tab.shows("Copied", "#example-Anthropic")
        self.assertNotIn("rm)", tab.text("#examples"))
        self.assertFalse(tab.holds(self.token))

    def test_docs_work_below_every_base_path(self):
        for base, path in (("/team/x", "/docs"), ("", "/docs"), ("/x", "/t/nonsense/docs")):
            with self.subTest(base, path=path):
                server = self.serve(base_path=base or "/", path_tokens="1")
                tab = self.docs(path=path, server=server)
                tab.press("Send")
                tab.shows("The sky is blue.", "#said")
                self.assertIn("http://{}:{}{}/chat".format(*server.server_address[:2], base), tab.asked())

    def test_docs_below_a_path_token_use_that_token(self):
        tab = self.open(f"/t/{self.token}/docs", self.serve(path_tokens="1"))
        tab.shows("ada/laptop", "#who")
        tab.press("Send")
        tab.shows("The sky is blue.", "#said")
        self.assertEqual(tab.evaluate("sessionStorage.length"), 0)
        self.assertFalse(tab.holds(self.token))
        with tab.reloading():
            tab.press("Sign out")
        self.assertEqual(tab.evaluate("location.pathname"), "/docs")
        tab.shows("Sign in", "#sign-in")

    def test_docs_work_below_a_path_prefix_of_a_proxy(self):
        proxy = self.enter(running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), PrefixProxy)))
        proxy.gateway = self.server.server_address
        tab = self.docs(path="/box/docs", server=proxy)
        eventually(lambda: tab.evaluate("byId('model').value") == "tiny:latest", "the list of models")
        tab.shows("/box/api/chat", "#example-curl")

    # -- administration

    def test_admin_page_needs_an_admin_token(self):
        tab = self.open("/admin")
        tab.type("Admin token", self.token)
        tab.press("Sign in")
        tab.shows("it takes an admin token", "#sign-in-problem")
        self.assertFalse(tab.text("#panel"))

    def test_admin_page_creates_edits_rotates_and_deletes_a_token(self):
        tab = self.panel()
        tab.press("New token")
        tab.type("User", "kim")
        tab.type("Name", "school")
        tab.type("Requests a minute", "7")
        tab.press("Create")
        tab.shows("shown only once", "dialog")
        self.assertEqual(tab.evaluate("document.activeElement.textContent"), "Copy")
        secret = tab.text("#secret").strip()
        self.assertStatus(self.ask("GET", "/api/tags", token=secret), 200)
        tab.press("I have saved it")
        eventually(lambda: not tab.holds(secret), "removal of the secret")
        tab.shows("7 a minute", "#tokens")
        tab.press("Edit: kim/school")
        tab.type("Requests a minute", "")
        tab.type("Models", "tiny*,own")
        tab.press("Save")
        tab.shows("models tiny*, own", "#tokens")
        kim = self.store.list("kim")[0]
        self.assertEqual((kim.rpm, kim.models, kim.admin), (None, "tiny*,own", False))
        self.assertEqual(tab.evaluate("sessionStorage.getItem(KEY)"), self.admin)
        tab.press("New secret: kim/school")
        tab.press("New secret")
        tab.shows("shown only once", "dialog")
        self.assertStatus(self.ask("GET", "/api/tags", token=secret), 401)
        self.assertStatus(self.ask("GET", "/api/tags", token=tab.text("#secret").strip()), 200)
        tab.press("I have saved it")
        tab.press("Delete: kim/school")
        tab.press("Delete")
        eventually(lambda: "kim" not in tab.text("#tokens"), "removal of the row")
        self.assertEqual(self.names(), ["ada/laptop", "root/box"])

    def test_admin_page_uses_the_new_secret_after_rotating_its_own_token(self):
        tab = self.panel()
        tab.press("New secret: root/box")
        tab.press("New secret")
        tab.shows("shown only once", "dialog")
        self.assertEqual(tab.evaluate("sessionStorage.getItem(KEY)"), tab.text("#secret").strip())
        tab.press("I have saved it")
        tab.press("Edit: ada/laptop")
        tab.type("Tokens a day", "5")
        tab.press("Save")
        tab.shows("5 tokens a day", "#tokens")

    def rotate_while_polling(self, *order):
        """Rotate the token in use while a status request with the old secret is pending; release the responses in this order."""
        tab = self.panel()
        tab.evaluate("""(() => {
            const ask = window.fetch, go = {};
            window.looks = 0;
            window.release = name => go[name] ? (go[name](), true) : false;
            window.fetch = (url, how) => {
                const name = url.split("/").pop(), released = new Promise(released => { go[name] = released; });
                if (name === "rotate") return ask(url, how).then(reply => released.then(() => reply));
                return name === "status" && ++looks === 1 ? released.then(() => ask(url, how)) : ask(url, how);
            };
        })()""")
        eventually(lambda: tab.evaluate("looks === 1"), "a status request")
        old = self.store.list("root")[0].hint
        tab.press("New secret: root/box")
        tab.press("New secret")
        eventually(lambda: self.store.list("root")[0].hint != old, "the rotation")
        for name in order:
            eventually(lambda name=name: tab.evaluate(f"release('{name}')"), name)
            if name == "status":
                eventually(lambda: tab.evaluate("looks > 1"), "the next status request")
        tab.shows("shown only once", "dialog")
        self.assertEqual(tab.evaluate("sessionStorage.getItem(KEY)"), tab.text("#secret").strip())
        tab.press("I have saved it")
        tab.shows("ada/laptop", "#tokens")

    def test_admin_page_stays_signed_in_if_the_old_secret_is_refused_before_the_new_one_arrives(self):
        self.rotate_while_polling("status", "rotate")

    def test_admin_page_stays_signed_in_if_the_old_secret_is_refused_after_the_new_one_arrives(self):
        self.rotate_while_polling("rotate", "status")

    def test_chart_days_follow_the_gateways_clock(self):
        hour = int(time.time()) // 3600 * 3600
        self.store.add_usage({(hour - hours * 3600, "ada", "laptop", "", "/api/chat"): [1, 0, 0, 1, 0, 1, 1, 0] for hours in range(9 * 24)}, {})
        days = [f"{row['day']}: {row['prompt_tokens'] * 2} tokens" for row in self.store.usage("day", 0)[-7:]]
        for tab, place, load in ((self.docs(), "#me", "loadMe()"), (self.panel(), "#usage", "loadUsage()")):
            with self.subTest(place):
                tab.evaluate("Date.now = () => 4e12")   # the browser's clock is wrong
                tab.evaluate(load)
                self.assertEqual(tab.evaluate(f"[...document.querySelectorAll('{place} svg title')].map(title => "
                                              "title.textContent.split(',')[0])"), days)

    def test_admin_page_signs_out_a_token_that_lost_its_admin_right(self):
        tab = self.panel()
        self.store.update("root", "box", admin=False)
        with tab.reloading():
            tab.evaluate("watch()")
        tab.shows("it takes an admin token", "#sign-in-problem")
        self.assertFalse(tab.text("#panel"))
        self.assertFalse(tab.holds("ada/laptop"))

    def test_admin_page_dialogs_change_nothing_when_cancelled(self):
        tab = self.panel()
        before = self.store.list()
        for action in ("New token", "Edit: ada/laptop", "New secret: ada/laptop", "Delete: ada/laptop"):
            with self.subTest(action):
                tab.press(action)
                tab.shows("Cancel", "dialog")
                tab.press("Cancel")
                eventually(lambda: tab.evaluate("!document.querySelector('dialog')"), "closing of the dialog")
        self.assertEqual([token._replace(last_used_at=None) for token in self.store.list()], [token._replace(last_used_at=None) for token in before])

    def test_admin_page_shows_an_error_beside_the_field_that_caused_it(self):
        tab = self.panel()
        tab.press("New token")
        tab.type("User", "ada")
        tab.type("Name", "laptop")
        tab.type("Requests a minute", "many")
        tab.press("Create")
        tab.shows('"many" is not a whole number', "[name=rpm] + .problem")
        self.assertEqual(tab.evaluate("document.activeElement.name"), "rpm")
        tab.type("Requests a minute", "3")
        tab.press("Create")
        tab.shows("already", "dialog .problem")
        self.assertEqual(self.names(), ["ada/laptop", "root/box"])

    def test_admin_page_updates_running_requests_and_the_state_of_ollama(self):
        rest = self.hold()
        self.chat(chat_line("The"), rest, LAST_CHAT_LINE)
        tab = self.panel()
        tab.shows("No requests are running", "#status")
        tab.shows("up, 0.9.3", "#status")
        tab.shows("tiny:latest", "#status")
        self.begin("POST", "/api/chat", CHAT)
        tab.shows("running", "#status")
        tab.shows("ada/laptop", "#status")
        rest.set()
        self.logged(lambda fields: fields["path"] == "/api/chat")
        tab.evaluate("watch()")
        tab.shows("No requests are running", "#status")
        with tab.reloading():
            tab.press("Sign out")
        self.assertEqual(tab.evaluate("byId('panel').querySelectorAll('tr').length"), 0)

    def test_admin_page_sends_no_requests_while_it_is_hidden(self):
        tab = self.panel()
        tab.shows("up", "#status")
        tab.evaluate("""(async () => {
            Object.defineProperty(document, 'hidden', {value: true, configurable: true});
            window.asked = 0;
            const ask = window.fetch, wait = window.setTimeout;
            window.fetch = (...how) => { window.asked += 1; return ask(...how); };
            window.setTimeout = action => wait(action, 0);
            await watch();
        })()""")
        self.assertEqual(tab.evaluate("asked"), 0)
        tab.evaluate("delete document.hidden")
        eventually(lambda: tab.evaluate("asked"), "the next request")

    def test_admin_page_shows_cached_tokens_without_adding_them_to_the_total(self):
        self.store.add_usage({(int(time.time()) // 3600 * 3600, "ada", "laptop", "tiny:latest", "/api/chat"): (1, 0, 0, 800, 700, 50, 1.0, 0)}, {})
        tab = self.panel()
        tab.shows("most in a day: 150", "#usage")
        self.assertRegex(tab.text("#usage"), r"(?s)By user\s+User\s+Tokens\s+Cached\s+Requests\s+ada\s+150\s+700\s+1\b")

    def test_hostile_names_are_shown_as_text(self):
        user, name = HOSTILE
        secret = self.store.create(user, name)[1]
        self.fake.replies["/api/ps"] = Reply.json(200, {"models": [dict(MODEL, name=user)]})
        self.ask("POST", "/api/chat", CHAT, token=secret)
        eventually(lambda: self.store.usage("user", 0), "storing of the usage")
        rest = self.hold()
        self.chat(chat_line(user), rest, LAST_CHAT_LINE)
        docs = self.docs(secret)
        docs.shows(f"{user}/{name}", "#who")
        docs.press("Send")
        docs.shows(user, "#said")
        tab = self.panel()
        for place in ("#tokens", "#status"):
            tab.shows(f"{user}/{name}", place)
        tab.shows(user, "#usage")
        tab.shows(user, "#status")
        for action in ("Edit", "New secret", "Delete"):
            tab.press(f"{action}: {user}/{name}")
            tab.shows(f"{user}/{name}", "dialog")
            tab.press("Cancel")
        self.assertEqual([tab.evaluate("document.querySelectorAll('img').length"), docs.evaluate("document.querySelectorAll('img').length")], [0, 0])
        self.assertEqual(tab.evaluate("document.querySelectorAll('script').length"), 1)

    def test_pages_do_not_scroll_sideways_at_the_width_of_a_phone(self):
        self.store.create("x" * 64, "y" * 64, models="z" * 200)
        self.ask("POST", "/api/chat", CHAT)
        eventually(lambda: self.store.usage("user", 0), "storing of the usage")
        for tab in (self.docs(width=400), self.panel(width=400)):
            tab.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
            self.assertLessEqual(tab.evaluate("document.scrollingElement.scrollWidth"), 400)


class WebPageResponses(GatewayCase):

    def page(self, path, **flags):
        answer = self.ask("GET", path, token="", server=self.serve(**flags) if flags else None)
        self.assertStatus(answer, 200)
        self.assertEqual(answer.headers["content-type"], "text/html; charset=utf-8")
        return answer, answer.body.decode()

    def test_content_security_policy_allows_exactly_the_inline_code(self):
        for path in ("/docs", "/admin"):
            with self.subTest(path):
                answer, text = self.page(path)
                policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
                for tag in ("style", "script"):
                    source, = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
                    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
                    self.assertEqual(policy.pop(f"{tag}-src"), f"'sha256-{digest}'")
                self.assertEqual(policy, {"default-src": "'none'", "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'",
                                          "form-action": "'none'", "frame-ancestors": "'none'"})
                self.assertEqual((answer.headers["referrer-policy"], answer.headers["cache-control"]), ("no-referrer", "no-cache"))

    def test_pages_load_nothing_from_other_origins(self):
        for path in ("/docs", "/admin"):
            text = self.page(path)[1]
            for target in re.findall(r"\b(?:src|href|action)=[\"']?([^\"' >]*)", text):
                with self.subTest(path, target=target):
                    self.assertRegex(target, r"\A(#[\w-]+|data:,|docs|admin|openapi\.json)\Z")
            self.assertNotRegex(text, r"@import|url\(")

    def test_scripts_never_turn_values_into_html(self):
        self.assertNotRegex(gateway.SCRIPT + gateway.DOCS_SCRIPT + gateway.ADMIN_SCRIPT,
                            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bFunction\(|srcdoc|createContextualFragment|\.style\b")
        self.assertNotRegex(gateway.DOCS + gateway.ADMIN + gateway.SIGN_IN, r"\s(style|on\w+)=")

    def test_docs_contain_every_route_error_and_option(self):
        for base in ("/api", "/team/x", "/"):
            text = html.unescape(re.sub("<[^>]*>", " ", self.page("/docs", base_path=base)[1]))
            for route in gateway.ROUTES:
                with self.subTest(f"{base}: {route.method} {route.path}"):
                    self.assertIn(f"{route.method} {gateway.at_base(route.path, base.rstrip('/'))}", text)
                    self.assertIn(route.summary, text)
        for required in [reason.meaning for reason in gateway.REFUSALS.values()] + [
                word for option in gateway.OPTIONS for word in (option.flag, option.variable, option.default, option.help) if word]:
            with self.subTest(required):
                self.assertIn(required, text)

    def test_disabled_admin_api_leaves_no_trace(self):
        server = self.serve(no_admin_api="1")
        for path in ("/admin", "/admin/tokens", "/admin/tokens/1", "/admin/status", "/admin/usage"):
            with self.subTest(path):
                self.assertRefused(self.ask("GET", path, token=self.admin, server=server), 404, path)
        text = self.ask("GET", "/docs", token="", server=server).body.decode()
        self.assertNotRegex(text, r'[A-Z] /admin|href="admin')

    def test_docs_omit_examples_that_need_a_base_path_ending_in_api(self):
        for base, shown in (("/api", True), ("/team/api", True), ("/team/x", False), ("/", False)):
            with self.subTest(base):
                self.assertEqual('id="example-Python"' in self.page("/docs", base_path=base)[1], shown)

    def test_head_request_for_a_page_is_answered_without_a_body(self):
        for path in ("/docs", "/admin"):
            with self.subTest(path), Client(self.server.server_address) as client:
                client.send(request("HEAD", path), request("GET", path))
                head, get = client.answer("HEAD"), client.answer()
                self.assertEqual((head.status, head.headers["content-length"]), (200, get.headers["content-length"]))

# == Own endpoints ============================================================


class AdminApi(GatewayCase):

    def call(self, method, path, body=None, status=200, **how):
        """Send a request below /admin as the administrator, and return the decoded JSON of its response."""
        answer = self.ask(method, "/admin" + path, body, token=how.pop("token", self.admin), **how)
        self.assertStatus(answer, status)
        self.assertEqual(answer.headers["content-type"], "application/json")
        self.assertEqual(answer.headers.get("cache-control", "no-store"), "no-store")
        self.assertEqual(self.fake.received, [])
        return answer.json()

    def refused(self, method, path, body=None, status=400):
        return self.call(method, path, body, status)["error"]

    def make(self, **members):
        return self.call("POST", "/tokens", {"user": "eve", "name": "phone", **members}, 201)

    def test_admin_api_needs_an_admin_token(self):
        for method, path in (("GET", "/tokens"), ("POST", "/tokens"), ("GET", "/tokens/1"), ("PATCH", "/tokens/1"), ("DELETE", "/tokens/1"),
                             ("POST", "/tokens/1/rotate"), ("GET", "/usage"), ("GET", "/status")):
            with self.subTest(f"{method} {path}"):
                body = {} if method in ("POST", "PATCH") else None
                self.assertRefused(self.ask(method, "/admin" + path, body, token=""), 401)
                self.assertRefused(self.ask(method, "/admin" + path, body), 403)
        self.assertEqual([token.user for token in self.store.list()], ["ada", "root"])

    def test_disabled_admin_api_is_answered_with_404(self):
        server = self.serve(no_admin_api="on")
        for method, path in (("GET", ""), ("GET", "/tokens"), ("POST", "/tokens"), ("DELETE", "/tokens/1"), ("GET", "/status")):
            with self.subTest(f"{method} {path}"):
                self.assertRefused(self.ask(method, "/admin" + path, token=self.admin, server=server), 404)

    def test_token_list_has_the_same_keys_as_the_command(self):
        listed = self.call("GET", "/tokens")
        self.assertEqual([set(token) for token in listed], [KEYS, KEYS])
        self.assertEqual([token["user"] for token in listed], ["ada", "root"])
        self.assertEqual([token["user"] for token in self.call("GET", "/tokens?user=root")], ["root"])
        self.assertEqual(self.call("GET", f"/tokens/{listed[1]['id']}")["name"], "box")

    def test_created_token_has_its_limits_and_a_working_secret(self):
        made = self.make(models=["tiny*", "llama3"], rpm=5, max_parallel=2, tokens_per_day=1000, expires_at="30d", admin=False)
        self.assertEqual(set(made), KEYS | {"token"})
        self.assertEqual([made[key] for key in ("models", "rpm", "max_parallel", "tokens_per_day")], [["tiny*", "llama3"], 5, 2, 1000])
        self.assertTrue(made["expires_at"].endswith("Z"))
        self.assertEqual(self.ask("GET", "/me", token=made["token"]).json()["user"], "eve")
        del made["token"]
        shown = self.call("GET", f"/tokens/{made['id']}")
        self.assertEqual(shown, dict(made, last_used_at=shown["last_used_at"]))

    def test_duplicate_token_name_is_refused_with_409(self):
        self.make()
        self.assertIn("exists already", self.refused("POST", "/tokens", {"user": "eve", "name": "phone"}, 409))

    def test_patch_changes_only_the_given_fields_and_null_removes_a_limit(self):
        made = self.make(rpm=5, models="tiny", expires_at="2099-01-31")
        secret, path = made.pop("token"), f"/tokens/{made['id']}"
        for changes, shown in (({"rpm": 7}, {}), ({"rpm": None, "max_parallel": 3}, {}), ({"expires_at": None}, {}),
                               ({"models": ["a", "b*"]}, {}), ({"models": None, "admin": True}, {}), ({"expires_at": "2098-01-31"},
                                                                                                      {"expires_at": "2098-01-31T00:00:00Z"})):
            with self.subTest(changes):
                made.update(changes, **shown)
                self.assertEqual(self.call("PATCH", path, changes), made)
        self.assertEqual(self.call("PATCH", path, {}), made)
        self.assertTrue(found(self.store, secret).admin)

    def test_rotate_replaces_the_secret(self):
        made = self.make(rpm=5)
        rotated = self.call("POST", f"/tokens/{made['id']}/rotate")
        self.assertEqual((rotated["id"], rotated["rpm"]), (made["id"], 5))
        self.assertStatus(self.ask("GET", "/me", token=made["token"]), 401)
        self.assertStatus(self.ask("GET", "/me", token=rotated["token"]), 200)

    def test_deleted_token_is_refused_at_once(self):
        made = self.make()
        self.assertEqual(self.call("DELETE", f"/tokens/{made['id']}")["name"], "phone")
        self.assertStatus(self.ask("GET", "/me", token=made["token"]), 401)
        for method, path in (("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/rotate")):
            self.refused(method, f"/tokens/{made['id']}{path}", {} if method == "PATCH" else None, 404)

    def test_invalid_token_fields_are_refused_with_the_messages_of_the_command(self):
        for body, words in (
            ({"rpm": 0}, 'rpm: "0" is not a whole number'), ({"rpm": "many"}, 'rpm: "many" is not a whole number'), ({"rpm": True}, "rpm"),
            ({"rpm": 1.5}, "rpm"), ({"rpm": {}}, "rpm"), ({"rpm": 10 ** 30}, "rpm"), ({"max_parallel": -1}, "max_parallel"),
            ({"tokens_per_day": []}, "tokens_per_day"), ({"models": "a b"}, 'models: "a b" is not a list of models'),
            ({"models": [1, {}]}, "models"), ({"models": []}, "models"), ({"expires_at": "soon"}, 'expires_at: "soon" is not a date'),
            ({"expires_at": 5}, "expires_at"), ({"expires_at": "2020-01-31"}, "is in the past"), ({"admin": 1}, "admin"), ({"admin": None}, "admin"),
            ({"admin": True, "models": "x"}, "admin's"), ({"name": "-x"}, "printable"), ({"name": ""}, "printable"), ({"name": None}, "name"),
            ({"user": 7}, "user"), ({"user": "a\u0000"}, "printable"), ({"colour": "red"}, '"colour"'),
        ):
            with self.subTest(body):
                self.assertIn(words, self.refused("POST", "/tokens", {"user": "eve", "name": "phone", **body}))
        for label, body in (("nothing", b""), ("a list", b"[]"), ("no JSON", b"{"), ("a text", b'"x"'),
                            ("pairs in a list", b'[["user","eve"],["name","phone"]]'),
                            ("a key twice", b'{"user":"eve","name":"phone","user":"bob"}'), ("no UTF-8", b'{"user":"\xff"}'),
                            ("very deep", b'{"user":' + b"[" * 8000), ("no name", b'{"user":"eve"}'),
                            ("half a character", b'{"user":"eve","name":"\\ud800"}')):
            with self.subTest(label):
                self.refused("POST", "/tokens", body)
        self.assertIn("larger than", self.refused("POST", "/tokens", b" " * 20000, 413))
        self.assertEqual([token.user for token in self.store.list()], ["ada", "root"])

    def test_invalid_patch_changes_nothing(self):
        made = self.make(rpm=5)
        for body in ({"rpm": 7, "max_parallel": 0}, {"rpm": 7, "user": "bob"}, {"rpm": 7, "id": 1}, {"admin": True, "models": "x", "rpm": 7}):
            with self.subTest(body):
                self.refused("PATCH", f"/tokens/{made['id']}", body)
        self.assertEqual(self.call("GET", f"/tokens/{made['id']}")["rpm"], 5)

    def test_token_paths_accept_only_numeric_ids(self):
        for path in ("/tokens/", "/tokens/0", "/tokens/01", "/tokens/-1", "/tokens/ada", "/tokens/1/", "/tokens/1/rotate/", "/tokens/%31",
                     "/tokens/9223372036854775808", "/tokens/1/2"):
            with self.subTest(path):
                self.assertStatus(self.ask("GET", "/admin" + path, token=self.admin), 404)
        self.assertIn("number", self.refused("GET", "/tokens/999999999999999999", status=404))

    def test_usage_is_reported_as_by_the_command(self):
        self.assertStatus(self.ask("POST", "/api/chat", CHAT), 200)
        eventually(lambda: self.store.usage("user", 0), "storing of the usage")
        self.fake.received.clear()
        for by in gateway.USAGE_BY:
            with self.subTest(by):
                row, = self.call("GET", f"/usage?by={by}&since=30d")
                self.assertEqual(set(row), {*gateway.USAGE_BY[by], *gateway.MEASURED})
                self.assertEqual(row["completion_tokens"], len(WORDS))
        self.assertEqual([row["user"] for row in self.call("GET", "/usage")], ["ada"])
        hour = int(time.time()) // 3600 * 3600
        self.store.add_usage({(hour - hours * 3600, "ada", "laptop", "", "/api/chat"): [1, 0, 0, 1, 0, 1, 1, 0] for hours in range(9 * 24)}, {})
        days = [row["day"] for row in self.call("GET", "/usage?by=day&since=7d")]
        self.assertEqual((len(days), [row["day"] for row in self.ask("GET", "/me").json()["usage"]]), (7, days))
        for query, word in (("by=colour", "colour"), ("since=never", "never"), ("since=2099-01-01", "future"), ("what=x", "what"),
                            ("by=user&by=day", "by"), ("by=", "by"), ("since=%00", "since")):
            with self.subTest(query):
                self.assertIn(word, self.refused("GET", "/usage?" + query))

    def test_status_reports_running_and_queued_requests(self):
        server, go = self.serve(max_parallel="1"), self.hold()
        self.probe_health(server)
        self.fake.replies["/api/chat"] = Reply.stream(b'{"done":false}\n', go, b'{"done":true}\n')
        first = self.begin("POST", "/api/chat", CHAT, server=server)
        first.head()
        waiting = self.begin("POST", "/api/chat", CHAT, token=self.admin, server=server)

        def state_of_two():
            status = self.ask("GET", "/admin/status", token=self.admin, server=server).json()
            return status if status["queued_requests"] and len(status["requests"]) == 2 else None
        state = eventually(state_of_two, "queueing of the second request")
        self.assertEqual([(one["user"], one["name"], one["model"], one["path"], one["waiting"]) for one in state["requests"]],
                         [("ada", "laptop", "tiny", "/api/chat", False), ("root", "box", "tiny", "/api/chat", True)])
        self.assertEqual((state["in_flight_requests"], state["queued_requests"], state["version"]), (1, 1, gateway.VERSION))
        self.assertEqual((state["upstream"]["status"], state["upstream"]["version"]), ("up", "0.9.3"))
        self.assertEqual([model["name"] for model in state["upstream"]["models"] + state["upstream"]["loaded"]], ["tiny:latest"] * 2)
        go.set()
        self.assertStatus(waiting.answer(), 200)

    def test_status_is_available_while_the_upstream_is_down(self):
        self.fake.server_close()
        self.probe_health()
        self.assertEqual(self.call("GET", "/status")["upstream"], {"status": "down", "version": None, "models": [], "loaded": []})

    def test_locked_database_is_answered_with_503(self):
        with contextlib.closing(sqlite3.connect(self.db, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            self.assertIn("locked", self.refused("POST", "/tokens", {"user": "eve", "name": "phone"}, 503))
        self.make()

    def test_page_of_another_origin_cannot_create_a_token(self):
        answer = self.ask("POST", "/admin/tokens", {"user": "eve", "name": "phone"}, [("Origin", PAGE), ("Cookie", f"token={self.admin}")], token="")
        self.assertRefused(answer, 401)
        self.assertFalse({name for name in answer.headers if name.startswith("access-control-")})

# == Commands =================================================================


class CommandLine(CommandCase):

    def test_create_shows_the_secret_and_how_to_use_it(self):
        out = self.succeeds("token", "create", "ada", "laptop")
        secrets = SECRET.findall(out)
        self.assertGreaterEqual(len(secrets), 1, out)
        self.assertEqual(len(set(secrets)), 1, out)
        for word in ("ada", "laptop", "Authorization"):
            self.assertIn(word, out)

    def test_messages_contain_the_full_path_of_the_database(self):
        relative = os.path.relpath(self.db)
        for argv in (("create", "ada", "laptop"), ("delete", "ada", "laptop")):
            with self.subTest(argv):
                self.assertIn(self.db, self.succeeds("token", *argv, "--db", relative))
        self.assertIn(self.db, self.fails("token", "delete", "ada", "laptop", "--db", relative))

    def test_create_shows_an_example_with_the_configured_address(self):
        for settings, url in (("GATEWAY_PORT=1234\nGATEWAY_HOST=::", "http://[::1]:1234/api/tags"),
                              ("GATEWAY_HOST=0.0.0.0\nGATEWAY_TLS_CERT=x.pem\nBASE_PATH=/o", "https://127.0.0.1:8000/o/tags")):
            env = self.write("x.env", f"TOKEN_DB_PATH={self.db}\n{settings}")
            self.assertIn(url, self.succeeds("token", "create", "ada", url[-20:], "--env-file", env))

    def test_limits_are_set_shown_and_removed(self):
        made = json.loads(self.succeeds("token", "create", "ada", "laptop", "--json", *LIMITS))
        self.assertEqual([made[key] for key in gateway.LIMIT_BY_COLUMN], [["llama3*", "qwen2.5:7b"], 60, 2, 100000])
        self.assertRegex(self.succeeds("token", "list"), r"(?s)MODELS +RPM +PARALLEL +A DAY.* llama3\*,qwen2.5:7b +60 +2 +100000")
        for flags, changes in ((("--rpm", "none"), {"rpm": None}), (("--models", "x", "--max-parallel", "9"), {"models": ["x"], "max_parallel": 9}),
                               (("--tokens-per-day", "none", "--models", "none"), {"tokens_per_day": None, "models": None})):
            self.succeeds("token", "update", "ada", "laptop", *flags)
            made.update(changes)
            self.assertEqual({key: made[key] for key in KEYS}, self.tokens()[0])
        self.assertIn("60 a minute", self.succeeds("token", "create", "ada", "phone", *LIMITS))

    def test_invalid_limit_is_reported_with_its_flag_and_value(self):
        self.create()
        for flag, *values in (("--rpm", "0", "-1", "many", "1.5", "9" * 20), ("--max-parallel", "0", "all"), ("--tokens-per-day", "1k", "0"),
                              ("--models", "a b", ",", "a:b:c", "none,a", "ünï", "[a")):
            for value in values:
                for command in ("create", "bob", "box"), ("update", "ada", "laptop"):
                    with self.subTest(flag, value=value, command=command[0]):
                        error = self.fails("token", *command, f"{flag}={value}", status=2)
                        self.assertIn(f'{flag}: "{value}"', error)
        self.assertIn('--rpm: "?[2J"', self.fails("token", "create", "bob", "box", "--rpm", "\x1b[2J", status=2))
        self.assertIn("models", self.fails("token", "create", "bob", "box", "--admin", "--models", "x", status=2))
        self.assertIn("models", self.fails("token", "update", "ada", "laptop", "--admin", "--models", "x", status=2))
        self.assertEqual([(token["user"], token["admin"]) for token in self.tokens()], [("ada", False)])

    def test_quiet_prints_only_the_secret(self):
        self.assertRegex(self.succeeds("token", "create", "ada", "laptop", "--quiet"), SECRET.pattern + r"\n\Z")
        self.assertRegex(self.succeeds("token", "rotate", "ada", "laptop", "--quiet"), SECRET.pattern + r"\n\Z")

    def test_json_output_has_the_documented_keys(self):
        self.assertEqual(set(json.loads(self.succeeds("token", "create", "ada", "laptop", "--json"))), KEYS | {"token"})
        self.assertEqual(set(json.loads(self.succeeds("token", "rotate", "ada", "laptop", "--json"))), KEYS | {"token"})
        self.assertEqual([set(row) for row in self.tokens()], [KEYS])

    def test_json_output_matches_the_stored_token(self):
        made = json.loads(self.succeeds("token", "create", "ada", "laptop", "--admin", "--expires", "2099-01-31", "--json"))
        secret = made.pop("token")
        self.assertEqual([made], self.tokens())
        self.assertEqual((made["user"], made["name"], made["hint"], made["admin"], made["expired"], made["last_used_at"]),
                         ("ada", "laptop", secret[:8], True, False, None))
        self.assertRegex(made["expires_at"], r"2099-01-31T00:00:00(Z|\+00:00)")
        self.assertRegex(made["created_at"], r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d(Z|\+00:00)")

    def test_token_name_is_unique_per_user(self):
        self.create("ada", "laptop")
        self.assertIn("laptop", self.fails("token", "create", "ada", "laptop"))
        self.create("ada", "phone")
        self.create("bob", "laptop")
        self.assertEqual(len(self.tokens()), 3)

    def test_unusual_printable_names_are_stored_unchanged(self):
        for name in ODD_NAMES:
            self.create(name, name)
        self.assertEqual({(row["user"], row["name"]) for row in self.tokens()}, {(name, name) for name in ODD_NAMES})

    def test_invalid_names_are_refused_without_echoing_control_characters(self):
        for label, name in BAD_NAMES:
            for argv in ((name, "laptop"), ("ada", name)):
                with self.subTest(label, argv=argv):
                    err = self.fails("token", "create", "--", *argv, status=2)
                    self.assertTrue(err.replace("\n", "").isprintable(), err)
        self.create()
        self.assertEqual([row["user"] for row in self.tokens()], ["ada"])

    def test_names_that_are_not_valid_unicode_are_reported(self):
        self.create()
        for command in (("delete", "\udcff", "x"), ("rotate", "ada", "\udcff"), ("update", "\udcff", "x", "--admin"), ("list", "--user", "\udcff")):
            with self.subTest(command):
                self.assertIn("printable", self.fails("token", *command, status=2))
        self.assertIn("database", self.fails("token", "list", "--db", self.path("a\0b")))

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_failure_to_write_the_output_is_reported(self):
        """If stdout or stderr is full or closed: one line of error where possible, status 1, and no error from Python at exit."""
        self.create()
        tokens, new = ("token", "list", "--db", self.db), ("token", "create", "bob", "desk", "--db", self.db)
        for argv, redirection, status, lines in (
                (tokens, ">/dev/full", 1, 1), (new, ">&-", 1, 1), (("-h",), ">/dev/full", 1, 1), (("-h",), ">&- 2>&-", 1, 0),
                (tokens, ">/dev/full 2>&1", 1, 0), (tokens, "2>&-", 0, 0), (("token", "list", "--bad"), "2>/dev/full", 2, 0)):
            self.assert_printed(argv, redirection, status, lines)
        self.assert_printed(("-h",), ">/dev/full", 1, 1, PYTHONUNBUFFERED="1")

    def assert_printed(self, argv, redirection, status, lines, **environ):
        env = {**{name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}, **environ}
        done = subprocess.run(["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, GATEWAY, *argv], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=3 * GUARD, env=env)
        with self.subTest(argv, redirection=redirection, **environ):
            self.assertEqual((done.returncode, len(done.stderr.splitlines())), (status, lines), done.stderr)

    def test_missing_token_is_reported(self):
        self.create("ada", "laptop")
        for argv in (("update", "ada", "phone", "--admin"), ("rotate", "ada", "phone"), ("delete", "ada", "phone")):
            with self.subTest(argv):
                self.assertIn("phone", self.fails("token", *argv))

    def test_expiry_accepts_a_duration_a_date_or_a_timestamp(self):
        for number, (value, expected) in enumerate((
            ("90s", 90), ("15m", 900), ("12h", 43200), ("30d", 30 * 86400), ("8w", 56 * 86400),
            ("2099-01-31", "2099-01-31T00:00:00"), ("2099-01-31T12:30:00Z", "2099-01-31T12:30:00"),
            ("2099-01-31T12:30:00+02:00", "2099-01-31T10:30:00"), ("2099-01-31T12:30:00-05:30", "2099-01-31T18:00:00"),
        )):
            with self.subTest(value):
                started = time.time()
                made = json.loads(self.succeeds("token", "create", "ada", str(number), "--expires", value, "--json"))
                if isinstance(expected, str):
                    self.assertEqual(made["expires_at"][:19], expected)
                else:
                    instant = self.find(made["token"])[0].expires_at
                    self.assertTrue(int(started) + expected <= instant <= time.time() + expected + 1, instant)

    def test_create_prints_the_expiry_date(self):
        self.assertIn("2099-01-31", self.succeeds("token", "create", "ada", "laptop", "--expires", "2099-01-31"))

    def test_invalid_or_past_expiry_is_refused(self):
        for value in ("soon", "30", "d", "-1d", "1y", "2099-02-30", "2099-13-01", "2020-01-31", "2020-01-31T00:00:00Z", "2099-01-31T12:30:00",
                      "2099-01-31T12:30Z", "2099-01-31T25:00:00Z", "99999999999999w", "999999999w", "9999-12-31T23:59:59-23:59", "1.5.2d", "٣d",
                      "0d"):
            with self.subTest(value):
                self.assertIn(value, self.fails("token", "create", "ada", "laptop", f"--expires={value}", status=2))

    def test_update_changes_only_the_given_fields(self):
        secret = self.create("ada", "laptop", "--expires", "2099-01-31")
        before, = self.tokens()
        for label, flags, changes in (
            ("nothing else", ("--admin",), {"admin": True}),
            ("a limit is lifted", ("--expires", "none"), {"expires_at": None}),
            ("both at once", ("--no-admin", "--expires", "2098-01-31"),
             {"admin": False, "expires_at": before["expires_at"].replace("2099", "2098")}),
        ):
            with self.subTest(label):
                self.succeeds("token", "update", "ada", "laptop", *flags)
                before.update(changes)
                self.assertEqual(self.tokens(), [before])
        self.assertTrue(self.find(secret)[0])

    def test_rotate_changes_only_the_secret(self):
        old = self.create("ada", "laptop", "--expires", "2099-01-31", "--admin")
        before, = self.tokens()
        new = self.succeeds("token", "rotate", "ada", "laptop", "--quiet").strip()
        after, = self.tokens()
        self.assertEqual(dict(after, hint=""), dict(before, hint=""))
        unknown, known = self.find(old, new)
        self.assertEqual((unknown, known.name), (None, "laptop"))

    def test_delete_removes_one_token(self):
        kept, gone = self.create("ada", "laptop"), self.create("ada", "phone")
        self.succeeds("token", "delete", "ada", "phone")
        self.assertEqual([token and token.name for token in self.find(kept, gone)], ["laptop", None])

    def test_list_prints_a_table_that_fits_the_terminal(self):
        secret = self.create("ada", "laptop", "--expires", "2099-01-31")
        self.create("bob", "old phone", "--admin")
        self.expire("ada", "laptop")
        out = self.succeeds("token", "list")
        for word in ("ada", "laptop", secret[:8], "bob", "old phone", "expired", "never"):
            self.assertIn(word, out)
        for column in ("USER", "NAME", "CREATED", "EXPIRES", "LAST USED"):
            self.assertIn(column, out.upper())
        self.assertNotIn(secret, out)
        self.assertLessEqual(max(len(line) for line in out.splitlines() if self.db not in line), 80, out)

    def expire(self, user, name):
        with contextlib.closing(gateway.TokenStore(self.db)) as store:
            store.update(user, name, expires_at=1)

    def test_list_can_be_restricted_to_one_user(self):
        self.create("ada", "laptop")
        self.create("bob", "laptop")
        self.assertEqual([row["user"] for row in self.tokens("--user", "bob")], ["bob"])
        self.assertNotIn("ada", self.succeeds("token", "list", "--user", "bob").replace(self.db, ""))

    def test_commands_that_only_read_create_no_database(self):
        for argv in (("list",), ("list", "--json"), ("export", "-"), ("export", self.path("out.csv"))):
            with self.subTest(argv):
                self.assertIn(self.db, self.fails("token", *argv))
                self.assertEqual(os.listdir(self.folder), [])

    def test_file_that_is_not_a_token_database_is_reported_and_not_changed(self):
        with contextlib.closing(sqlite3.connect(self.path("newer.db"))) as db:
            db.execute("PRAGMA user_version = 99")
            db.execute("CREATE TABLE tokens (x)")
            db.commit()
        self.write("text.db", "This is no database.\n" * 100)
        for name in ("newer.db", "text.db"):
            before = self.read(name)
            os.chmod(self.path(name), 0o644)
            for argv in (("list",), ("create", "ada", "laptop")):
                with self.subTest(name, argv=argv):
                    self.assertIn(name, self.fails("token", *argv, "--db", self.path(name)))
            self.assertEqual((self.read(name), stat.S_IMODE(os.stat(self.path(name)).st_mode)), (before, 0o644))
            self.assertEqual(sorted(os.listdir(self.folder)), ["newer.db", "text.db"])

    def test_database_path_that_is_a_folder_or_in_a_missing_folder_is_reported(self):
        for path in (self.folder, self.path("no/such/tokens.db")):
            with self.subTest(path):
                self.assertIn(path, self.fails("token", "create", "ada", "laptop", "--db", path))

    def test_global_options_are_accepted_before_or_after_the_subcommand(self):
        self.create()
        env = self.write("a.env", f"TOKEN_DB_PATH={self.db}")
        listed = self.succeeds("token", "list")
        for argv in (("--db", self.db, "token", "list"), ("token", "--db", self.db, "list"), ("token", "list", "--db", self.db)):
            with self.subTest(argv):
                self.assertEqual(self.succeeds(*argv), listed)
        for argv in (("--env-file", env, "token", "list"), ("token", "--env-file", env, "list"), ("token", "list", "--env-file", env)):
            with self.subTest(argv):
                self.assertEqual(self.succeeds(*argv), listed)

    def test_invalid_arguments_are_usage_errors(self):
        for argv in ((), ("nonsense",), ("token",), ("token", "nonsense"), ("token", "create"), ("token", "create", "ada"),
                     ("token", "list", "--us", "ada"),
                     ("token", "create", "ada", "x", "--quiet", "--json"), ("serve", "--port", "x"), ("token", "create", "ada", "x", "--admin=1")):
            with self.subTest(argv):
                self.fails(*argv, status=2)

    def test_invalid_setting_of_serve_is_reported_with_its_source(self):
        env = self.write("a.env", "TOKEN_DB_PATH=x.db\nGATEWAY_PORT=http\n")
        err = self.fails("serve", "--env-file", env, status=2)
        for word in ("GATEWAY_PORT", "http", env):
            self.assertIn(word, err)

    def test_help_of_every_command_ends_with_an_example(self):
        for argv in COMMANDS:
            with self.subTest(argv):
                out = self.succeeds(*argv, "-h")
                example = [line for line in out.splitlines() if "ollama_gateway.py" in line and not line.lower().startswith("usage")]
                self.assertEqual(out.rstrip().splitlines()[-1:], example[-1:], out)

    def test_help_of_every_command_fits_80_columns_and_version_is_available(self):
        for argv in COMMANDS:
            with self.subTest(argv), unittest.mock.patch.dict(os.environ, COLUMNS="200"):
                self.assertEqual([line for line in self.succeeds(*argv, "-h").splitlines() if len(line) > 80], [])
                self.assertEqual(self.succeeds(*argv, "--version"), f"ollama_gateway {gateway.VERSION}\n")

    def test_mistyped_argument_is_answered_with_a_suggestion(self):
        for argv, near in ((("serv",), "serve"), (("token", "creat"), "create"), (("token", "dele", "ada", "x"), "delete"),
                           (("usage", "--by", "modl"), "model"), (("serve", "--prot", "1"), "--port"),
                           (("token", "create", "ada", "x", "--rpn=4"), "--rpm")):
            with self.subTest(argv):
                self.assertIn(f'did you mean "{near}"?', self.fails(*argv, status=2))
        for argv in (("frobnicate",), ("token", "xyz"), ("serve", "--zzz")):
            with self.subTest(argv):
                self.assertNotIn("did you mean", self.fails(*argv, status=2))

    def test_examples_in_the_help_are_valid_commands(self):
        for argv in COMMANDS:
            for line in re.findall(r"python3 (ollama_gateway\.py .*)", self.succeeds(*argv, "-h")):
                with self.subTest(line):
                    self.assertTrue(gateway.build_parser().parse_args(shell_words(line)[1:]))


class ExportAndImport(CommandCase):

    ROW = {"user": "ada", "name": "laptop", "digest": "0" * 64, "hint": "ogw_xxxx", "created_at": "2026-11-23T00:00:00Z", "expires_at": None,
           "last_used_at": None, "admin": False, "models": None, "rpm": None, "max_parallel": None, "tokens_per_day": None}

    def test_import_refuses_rows_with_invalid_values(self):
        for key, value in (("created_at", "9999-12-31T23:59:59-23:00"), ("created_at", "0001-01-01T00:00:00+23:00"), ("hint", "\x1b[2J"),
                           ("hint", "a\0b"), ("hint", "\ud800"), ("hint", "x" * 9), ("user", ["a"]), ("user", {}), ("user", 5), ("user", "\ud800"),
                           ("digest", "0" * 63), ("admin", "perhaps"), ("created_at", None), ("models", "a b"), ("models", ["a"]), ("rpm", 0),
                           ("rpm", "many"), ("models", 5), ("admin", 1), ("expires_at", 5), ("max_parallel", -1),
                           ("tokens_per_day", 1.5), ("tokens_per_day", True)):
            with self.subTest(key, value=value):
                error = self.fails("token", "import", "-", stdin=json.dumps({"version": 2, "tokens": [dict(self.ROW, **{key: value})]}))
                self.assertIn("nothing was imported", error)

    def test_import_refuses_rows_without_limits_and_admin_rows_with_models(self):
        for label, row in (("without", {key: self.ROW[key] for key in self.ROW if key != "rpm"}),
                           ("an admin's", dict(self.ROW, admin=True, models="tiny"))):
            with self.subTest(label):
                self.assertIn("row 1", self.fails("token", "import", "-", stdin=json.dumps({"version": 2, "tokens": [row]})))

    def test_import_accepts_rows_without_hint_expiry_and_last_use(self):
        row = {key: value for key, value in self.ROW.items() if key not in ("hint", "expires_at", "last_used_at")}
        self.succeeds("token", "import", "-", "--db", self.other, stdin=json.dumps({"version": 2, "tokens": [row]}))
        self.assertEqual([(token["hint"], token["expires_at"]) for token in self.tokens("--db", self.other)], [("", None)])

    def test_import_accepts_version_1_exports_without_limits(self):
        row = {key: value for key, value in self.ROW.items() if key not in gateway.LIMIT_BY_COLUMN}
        cells = [["version", *row], ["1", *("" if value is None else str(value) for value in row.values())]]
        for text in (json.dumps({"version": 1, "tokens": [row]}), "\n".join(map(",".join, cells))):
            self.succeeds("token", "import", "-", "--db", self.other, stdin=text)
            self.assertEqual([(token["user"], token["rpm"], token["models"]) for token in self.tokens("--db", self.other)], [("ada", None, None)])

    def test_import_refuses_json_that_is_nested_too_deeply(self):
        self.assertIn("nothing was imported", self.fails("token", "import", "-", stdin='{"a":' * 100_000))

    def setUp(self):
        super().setUp()
        self.secrets = {name: self.create(name, name) for name in ODD_NAMES}
        self.secrets["root"] = self.create("root", "box", "--admin", "--expires", "2099-01-31")
        self.secrets["limited"] = self.create("limited", "limited", *LIMITS)
        self.other = self.path("other.db")

    def export(self, name, *flags):
        self.succeeds("token", "export", self.path(name), *flags)
        return self.path(name)

    def comparable(self, db):
        return sorted(({**row, "id": 0} for row in self.tokens("--db", db)), key=lambda row: row["user"])

    def test_exported_tokens_work_after_import_into_another_database(self):
        for name in ("tokens.csv", "tokens.json"):
            with self.subTest(name):
                other = self.path(name + ".db")
                self.succeeds("token", "import", self.export(name), "--db", other)
                self.assertEqual(self.comparable(other), self.comparable(self.db))
                self.assertEqual([token.user for token in self.find(*self.secrets.values(), db=other)], list(self.secrets))

    def test_export_of_imported_tokens_is_identical(self):
        for name in ("tokens.csv", "tokens.json"):
            with self.subTest(name):
                first = self.export(name)
                self.succeeds("token", "import", first, "--db", self.path(name + ".db"))
                again = self.path("again-" + name)
                self.succeeds("token", "export", again, "--db", self.path(name + ".db"))
                self.assertEqual(self.read(name), self.read("again-" + name))

    def test_dash_stands_for_standard_output_and_input_in_json(self):
        out = self.succeeds("token", "export", "-")
        self.assertTrue(json.loads(out))
        self.succeeds("token", "import", "-", "--db", self.other, stdin=out)
        self.assertEqual(self.comparable(self.other), self.comparable(self.db))

    def test_export_format_follows_the_file_extension_unless_it_is_given(self):
        self.assertEqual(json.loads(self.read(os.path.basename(self.export("a.csv", "--format", "json")))),
                         json.loads(self.succeeds("token", "export", "-")))
        self.assertEqual(self.succeeds("token", "export", "-", "--format", "csv").encode().replace(b"\r\n", b"\n"),
                         self.read(os.path.basename(self.export("a.json", "--format", "csv"))).replace(b"\r\n", b"\n"))
        self.fails("token", "export", self.path("a.txt"), status=2)

    def test_export_contains_digests_and_no_secrets(self):
        for name in ("tokens.csv", "tokens.json"):
            self.export(name)
            for secret in self.secrets.values():
                self.assertNotIn(secret.encode(), self.read(name))
                self.assertIn(hashlib.sha256(secret.encode()).hexdigest().encode(), self.read(name))

    def test_csv_export_contains_no_spreadsheet_formulas(self):
        for row in csv.reader(io.StringIO(self.read(os.path.basename(self.export("tokens.csv"))).decode("utf-8-sig"))):
            for cell in row:
                self.assertFalse(cell.startswith(("=", "+", "-", "@", "\t", "\r")), cell)

    @unittest.skipIf(os.name == "nt", "Windows has no such permissions")
    def test_export_replaces_its_target_atomically_and_with_private_permissions(self):
        for name in ("tokens.csv", "tokens.json"):
            with self.subTest(name):
                before = os.stat(self.write(name, "what was there"))
                with open(self.path(name), "rb") as reader:
                    self.export(name)
                    self.assertEqual(reader.read(), b"what was there", "a reader of the old file must not see it change")
                after = os.stat(self.path(name))
                self.assertNotEqual(before.st_ino, after.st_ino)
                self.assertEqual(stat.S_IMODE(after.st_mode), 0o600)
        self.assertEqual({name for name in os.listdir(self.folder) if not name.startswith("tokens.db")}, {"tokens.csv", "tokens.json"})

    def test_failed_export_leaves_no_files(self):
        os.mkdir(self.path("taken.csv"))
        for target in ("taken.csv", "no/such.csv"):
            with self.subTest(target):
                self.assertIn(target, self.fails("token", "export", self.path(target)))
        self.assertEqual({name for name in os.listdir(self.folder) if not name.startswith("tokens.db")}, {"taken.csv"})

    def test_repeated_import_changes_nothing(self):
        before = self.tokens()
        for name in ("tokens.csv", "tokens.json"):
            self.succeeds("token", "import", self.export(name))
        self.assertEqual(self.tokens(), before)

    def test_import_with_a_conflicting_name_is_refused_as_a_whole(self):
        exported = self.export("tokens.json")
        self.succeeds("token", "create", "root", "box", "--db", self.other)
        before = self.tokens("--db", self.other)
        self.assertIn("root", self.fails("token", "import", exported, "--db", self.other))
        self.assertEqual(self.tokens("--db", self.other), before)

    def test_import_with_a_known_secret_under_another_name_is_refused(self):
        exported = self.export("tokens.json")
        self.succeeds("token", "import", exported, "--db", self.other)
        self.write("renamed.json", self.read("tokens.json").replace(b'"root"', b'"toor"'))
        self.fails("token", "import", self.path("renamed.json"), "--db", self.other)
        self.assertEqual(self.comparable(self.other), self.comparable(self.db))

    def test_import_of_an_invalid_file_is_refused_and_changes_nothing(self):
        before = self.tokens()
        whole = self.read(os.path.basename(self.export("tokens.json")))
        table = self.read(os.path.basename(self.export("tokens.csv")))
        digest = hashlib.sha256(self.secrets["root"].encode()).hexdigest().encode()
        for label, name, content in (
            ("empty", "x.json", b""), ("an empty table", "x.csv", b""), ("no JSON", "x.json", b"hello"), ("other JSON", "x.json", b'[1, "two"]'),
            ("binary", "x.csv", bytes(range(256))),
            ("half", "x.json", whole[:len(whole) // 2]), ("half a table", "x.csv", table[:len(table) // 2]),
            ("other columns", "x.csv", b"a,b\r\n1,2\r\n"),
            ("a digest too short", "x.json", whole.replace(digest, digest[:-2])),
            ("a name that may not be", "x.json", whole.replace(b'"root"', b'"ro\\u001bot"')),
            ("a newer version", "x.json", re.sub(rb'"version": ?\d+', b'"version": 99', whole)),
        ):
            with self.subTest(label):
                self.assertIn(name, self.fails("token", "import", self.write(name, content)))
                self.assertEqual(self.tokens(), before)

    def test_import_of_a_missing_file_is_reported(self):
        self.assertIn("missing.csv", self.fails("token", "import", self.path("missing.csv")))


OLD_SCHEMA = "CREATE TABLE tokens (id INTEGER PRIMARY KEY, user_id TEXT, user TEXT, api_name TEXT, token TEXT, created_at TEXT, expires_at TEXT)"
OLD_ROWS = (   # user, name, token in clear text, created, expires
    ("ada", "laptop", "clear-token-of-ada-0001", "2024-05-01 10:00:00", None),
    ("ada", "phone", "clear-token-of-ada-0002", "2024-05-01T10:00:00.123456", "2099-01-31 12:30:00"),
    ("bob", "desk", "clear-token-of-bob-0003", "2024-05-01T10:00:00+00:00", "2099-01-31T12:30:00+02:00"),
    ("bob", "gone", "clear-token-of-bob-0004", "2024-05-01 10:00:00", "2024-06-01 10:00:00"),
    ("ada", "laptop", "clear-token-of-ada-0005", "2024-05-02 10:00:00", None),
    ("", "", "clear-token-of-nobody-0006", "", ""),
    (None, None, "clear-token-of-nobody-0007", None, None),
    ("x" * 100, "n" * 100, "clear-token-of-long-0008", "2024-05-01 10:00:00", None),
    ("x" * 100, "n" * 100 + "!", "clear-token-of-long-0009", "2024-05-01 10:00:00", None),
    ("-rf", "red\x1b[31m\nname", "clear-token-of-odd-0010", "2024-05-01 10:00:00", None),
    ("Zoë", "=1+1", "clear-token-of-zoe-0011", "2024-05-01 10:00:00", None),
    ("twin", "one", "clear-token-of-twin-0012", "2024-05-01 10:00:00", None),
    ("twin", "two", "clear-token-of-twin-0012", "2024-05-01 10:00:00", None),
    ("none", "no-token", None, "2024-05-01 10:00:00", None),
    ("none", "empty-token", "", "2024-05-01 10:00:00", None),
)
OLD_SECRETS = sorted({row[2] for row in OLD_ROWS if row[2]})


class TableFormat(unittest.TestCase):

    ROWS = [("USER", "NAME", "SECRET", "EXPIRES", "LAST USED"),
            ("a" * 30, "b" * 40, "ogw_1234…", "2027-01-31", "2026-11-23 11:56"), ("日本語", "é", "ogw_1234…", "expired", "never")]

    def table(self, columns, terminal=True, **how):
        with unittest.mock.patch("shutil.get_terminal_size", lambda: os.terminal_size((columns, 24))), \
                unittest.mock.patch("sys.stdout.isatty", lambda: terminal, create=True):
            return gateway.format_table(self.ROWS, **how)

    def test_table_shrinks_its_widest_columns_to_fit_the_terminal(self):
        for columns, margin, user in ((200, 0, "a" * 30), (100, 0, "a" * 27 + "…"), (100, 10, "a" * 22 + "…"), (80, 8, "a" * 14 + "…")):
            with self.subTest(columns, margin=margin):
                lines = self.table(columns, margin=margin)
                self.assertLessEqual(max(map(gateway.text_width, lines)), columns - margin, lines)
                self.assertEqual(lines[1].split()[0], user)
                self.assertIn("2027-01-31  2026-11-23", lines[1])
        self.assertIn("ogw_1234…  2027-01-31  2026-11-23…", self.table(10)[1], "a date stays whole, and the line wraps")

    def test_table_omits_droppable_columns_if_shrinking_is_not_enough(self):
        for columns, headings in ((60, self.ROWS[0]), (50, ("USER", "NAME", "EXPIRES", "LAST USED")), (40, ("USER", "NAME", "EXPIRES"))):
            with self.subTest(columns):
                lines = self.table(columns, droppable=("SECRET", "LAST USED"))
                self.assertLessEqual(max(map(gateway.text_width, lines)), columns, lines)
                self.assertEqual(lines[0].replace("LAST USED", "LAST_USED").split(), [name.replace(" ", "_") for name in headings])

    def test_table_is_not_shortened_if_the_output_is_not_a_terminal(self):
        self.assertIn(f"{'a' * 30}  {'b' * 40}  ogw_1234…", self.table(40, terminal=False)[1])


class UsageCommand(CommandCase):

    def setUp(self):
        super().setUp()
        self.create()
        self.hour = int(time.time()) // 3600 * 3600
        with contextlib.closing(gateway.TokenStore(self.db)) as store:
            store.add_usage({
                (self.hour, "ada", "laptop", "tiny:latest", "/api/chat"): [3, 1, 0, 30, 10, 60, 4.5, 0],
                (self.hour, "ada", "phone", "", "/api/chat"): [1, 1, 0, 0, None, 0, 0.5, 0],
                (self.hour - 2 * 86400, "=bob", "box", "tiny:latest", "/api/embeddings"): [2, 0, 1, None, None, None, 1.0, 0],
                (self.hour - 20 * 86400, "=bob", "box", "big:70b", "/api/chat"): [7, 0, 0, 700, None, 70, 99.0, 500]}, {})

    def rows(self, *flags):
        return json.loads(self.succeeds("usage", "--json", *flags))

    def test_usage_is_grouped_by_the_requested_key(self):
        ada = {"requests": 4, "errors": 2, "cancelled": 0, "prompt_tokens": 30, "cached_tokens": 10, "completion_tokens": 60, "seconds": 5.0,
               "estimated_tokens": 0}
        bob = {"requests": 2, "errors": 0, "cancelled": 1, "prompt_tokens": None, "cached_tokens": None, "completion_tokens": None,
               "seconds": 1.0, "estimated_tokens": 0}
        self.assertEqual(self.rows(), [{"user": "ada", **ada}, {"user": "=bob", **bob}])
        self.assertEqual(list(self.rows()[0]), ["user", *ada])
        self.assertEqual([(row["user"], row["name"], row["requests"]) for row in self.rows("--by", "token")],
                         [("ada", "laptop", 3), ("=bob", "box", 2), ("ada", "phone", 1)])
        self.assertEqual([(row["model"], row["requests"]) for row in self.rows("--by", "model", "--since", "30d")],
                         [("big:70b", 7), ("tiny:latest", 5), ("", 1)])
        days = [row["day"] for row in self.rows("--by", "day", "--since", "30d")]
        self.assertEqual((len(days), days), (3, sorted(days)))
        self.assertEqual(self.rows("--since", "1h")[0]["user"], "ada")
        self.assertEqual(len(self.rows("--since", "2020-01-01")), 2)

    def test_since_7d_covers_seven_utc_days_including_today(self):
        midnight = 20_000 * 86400
        for text, start in (("7d", midnight - 6 * 86400), ("1d", midnight), ("1w", midnight - 6 * 86400), ("12h", midnight - 3600),
                            ("24h", midnight - 13 * 3600), ("1.5d", midnight - 25 * 3600), ("2024-10-01", midnight - 3 * 86400)):
            with self.subTest(text):
                self.assertEqual(gateway.usage_start(text, lambda: midnight + 11 * 3600 + 37 * 60), start)

    def test_usage_by_day_since_7d_has_seven_rows(self):
        with contextlib.closing(gateway.TokenStore(self.db)) as store:
            store.add_usage({(self.hour - hours * 3600, "ada", "laptop", "", "/api/chat"): [1, 0, 0, 1, 0, 1, 1, 0] for hours in range(9 * 24)}, {})
        days = [row["day"] for row in self.rows("--by", "day", "--since", "7d")]
        self.assertEqual(days, [gateway.format_instant((self.hour // 86400 - back) * 86400)[:10] for back in range(6, -1, -1)])
        self.assertEqual([row["day"] for row in self.rows("--by", "day")], days)

    def test_usage_csv_contains_no_spreadsheet_formulas(self):
        rows = list(csv.reader(io.StringIO(self.succeeds("usage", "--csv"))))
        self.assertEqual(rows, [["user", *gateway.MEASURED], ["ada", "4", "2", "0", "30", "10", "60", "5.0", "0"],
                                ["'=bob", "2", "0", "1", "", "", "", "1.0", "0"]])

    def test_usage_table_marks_unknown_counts_and_names_the_database(self):
        out = self.succeeds("usage")
        self.assertIn(self.db, out)
        self.assertRegex(out, r"=bob +2 +0 +1 +unknown +unknown +unknown +1\.0")
        self.assertRegex(out, r"6 requests, 80 tokens since 20\d\d-\d\d-\d\d \d\d:00 UTC")
        self.assertRegex(self.succeeds("usage", "--by", "model"), "(?m)^- ")
        self.assertRegex(out, r"PROMPT +CACHED +COMPLETION +SECONDS\n")
        self.assertRegex(self.succeeds("usage", "--since", "30d"), r"SECONDS +ESTIMATED\n=bob .* 500\n")

    def test_wide_terminal_shows_a_bar_for_each_row(self):
        for columns, encoding, bar in ((120, "utf-8", "█"), (120, "ascii", "#"), (70, "utf-8", ""), (40, "utf-8", "")):
            with self.subTest(columns, encoding=encoding), io.TextIOWrapper(io.BytesIO(), encoding) as out, \
                    unittest.mock.patch("sys.stdout", out), unittest.mock.patch.object(out, "isatty", lambda: True, create=True), \
                    unittest.mock.patch("shutil.get_terminal_size", lambda: os.terminal_size((columns, 24))):
                self.assertEqual(gateway.main(["usage", "--since", "30d", "--by", "token", "--db", self.db]), 0)
                lines = out.buffer.getvalue().decode(encoding).splitlines()[:4]
                self.assertEqual([bool(re.search("[█#]", line)) for line in lines], [False, bool(bar), bool(bar), False])
                self.assertTrue(all(gateway.text_width(line) <= max(columns, 46) for line in lines), lines)
                if bar:
                    self.assertGreater(lines[1].count(bar), 3 * lines[2].count(bar))

    def test_invalid_since_is_reported_and_no_database_is_created(self):
        for since in ("soon", "7", "2999-01-01", "-1d"):
            with self.subTest(since):
                self.assertIn("--since", self.fails("usage", f"--since={since}", status=2))
        self.fails("usage", "--by", "colour", status=2)
        self.fails("usage", "--db", self.path("missing.db"))
        self.assertFalse(os.path.exists(self.path("missing.db")))

    def test_usage_of_an_empty_database_is_reported_as_zero(self):
        self.assertRegex(self.succeeds("usage", "--since", "1s", "--db", self.create_empty()), "^0 requests, 0 tokens since")

    def create_empty(self):
        self.succeeds("token", "create", "x", "y", "--db", self.path("empty.db"))
        return self.path("empty.db")


class StopDuringStartup(Case):

    @unittest.skipIf(os.name == "nt", "the process is stopped by signals")
    def test_sigterm_during_startup_stops_the_gateway_cleanly(self):
        """A signal may arrive while any step of the startup is still running."""
        for number in range(12):
            with self.subTest(number):
                serving = self.enter(Serving(self.folder, "--port", "0", "--ollama-url", "http://127.0.0.1:1"))
                with Client(serving.server_address) as client:
                    client.ask("GET", "/")
                    self.assertEqual(serving.stop(signal.SIGTERM), 0)
                    self.assertEqual([line for line in serving.lines if "Warning" in line or "Traceback" in line], [])


class ServeCommand(Case):

    def setUp(self):
        super().setUp()
        self.fake = self.enter(running(FakeOllama()))

    def serving(self, *argv, **env):
        return self.enter(Serving(self.folder, "--port", "0", "--ollama-url", self.fake.url, *argv, **env))

    def make_token(self):
        with contextlib.closing(gateway.TokenStore(self.db, create=True)) as store:
            return store.create("ada", "laptop")[1]

    def test_first_line_names_address_upstream_models_database_and_tokens(self):
        self.make_token()
        line = self.serving().first_line
        self.assertRegex(line, r"http://127\.0\.0\.1:[1-9]\d*")
        self.assertIn(self.fake.url, line)
        self.assertRegex(line, r"\b1 model\b")
        self.assertIn(os.path.realpath(self.db), line)
        self.assertRegex(line, r"\b1 token\b")

    def test_requests_are_served_while_the_first_line_waits_for_ollama(self):
        hold, port = self.hold(), free_port()
        self.fake.replies["/api/version"] = Reply.stream(hold, b'{"version":"0.9.3"}', kind=JSON)
        program = (f"import sys; sys.path.insert(0, {HERE!r}); import ollama_gateway as gateway; "
                   f"gateway.PROBE_SECONDS = {10 * GUARD}; gateway.main()")
        with unittest.mock.patch.object(subprocess, "Popen", functools.partial(popen_as, subprocess.Popen, ["-c", program])):
            serving = self.serving("--port", str(port))
        eventually(lambda: self.fake.received, "the health probe")
        with Client(("127.0.0.1", port)) as client:
            self.assertEqual(client.ask("GET", "/").body, b"Ollama is running")
            self.assertEqual(client.ask("GET", "/health").json()["upstream"], "down")
            self.assertNotIn(self.fake.url, "".join(serving.lines), "the line with the models must wait for Ollama")
            hold.set()
            line = eventually(lambda: next((line for line in serving.lines if self.fake.url in line), None))
            self.assertRegex(line, r"\b1 model\b")
            self.assertEqual(client.ask("GET", "/health").json()["upstream"], "up")

    def test_serve_without_tokens_shows_how_to_create_one_and_refuses_requests(self):
        serving = self.serving()
        eventually(lambda: any("token create" in line for line in serving.lines), "the hint")
        with Client(serving.server_address) as client:
            self.assertEqual(client.ask("GET", "/api/tags").status, 401)

    def test_serve_starts_with_the_upstream_down_and_recovers(self):
        secret, port = self.make_token(), self.fake.server_address[1]
        self.fake.shutdown()
        self.fake.server_close()
        serving = self.serving()
        self.assertRegex(serving.first_line, "(?i)not answer|unreachable|down")
        with Client(serving.server_address) as client:
            self.assertEqual(client.ask("GET", "/api/tags", headers=bearer(secret)).status, 502)
            self.enter(running(FakeOllama(port)))
            self.assertEqual(client.ask("GET", "/api/tags", headers=bearer(secret)).status, 200)

    def test_serve_stops_cleanly_on_sigterm_and_sigint(self):
        secret = self.make_token()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(signal_number):
                serving = self.serving()
                with Client(serving.server_address) as client:
                    self.assertEqual(client.ask("POST", "/api/chat", CHAT, bearer(secret)).status, 200)
                self.assertEqual(serving.stop(signal_number), 0)
                self.assertNotRegex("\n".join(serving.lines), "Traceback|Warning|Exception")

    @unittest.skipUnless(shutil.which("prlimit"), "needs prlimit to limit the descriptors")
    def test_connection_limit_is_reduced_to_the_available_descriptors(self):
        command = ["prlimit", "--nofile=400:400", sys.executable, GATEWAY, "serve", "--port", "0", "--db", self.db]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=self.folder) as process:
            try:
                first, second = (next(line for line in process.stderr if b"token create" in line or b"connections" in line) for _ in range(2))
            finally:
                process.terminate()
        self.assertIn(b"ollama_gateway", first)
        self.assertRegex(second.decode(), r"Only 52 connections .*ulimit")

    def test_occupied_port_is_reported(self):
        port = str(self.fake.server_address[1])
        serving = self.serving("--port", port)
        self.assertEqual(serving.wait(), 1)
        self.assertIn(port, serving.lines[-1])
        self.assertNotIn("Traceback", "\n".join(serving.lines))

    def test_invalid_setting_is_reported_in_one_line_with_status_2(self):
        self.write(".env", "GATEWAY_STALL_TIMEOUT=soon")
        serving = self.serving()
        self.assertEqual(serving.wait(), 2)
        for word in ("GATEWAY_STALL_TIMEOUT", "soon", ".env"):
            self.assertIn(word, serving.lines[-1])
        self.assertNotIn("Traceback", "\n".join(serving.lines))

    def test_settings_come_from_dot_env_and_the_environment(self):
        self.write(".env", "TOKEN_DB_PATH=from-file.db\nBASE_PATH=/file\n")
        with contextlib.closing(gateway.TokenStore(self.path("from-file.db"), create=True)) as store:
            secret = store.create("ada", "laptop")[1]
        serving = self.serving(BASE_PATH="/env")
        with Client(serving.server_address) as client:
            self.assertEqual(client.ask("GET", "/env/tags", headers=bearer(secret)).status, 200)

    def test_requests_are_logged_on_stderr_with_their_time(self):
        secret = self.make_token()
        serving = self.serving()
        with Client(serving.server_address) as client:
            client.ask("GET", "/api/tags", headers=bearer(secret))
        line = eventually(lambda: next((line for line in serving.lines if "path=/api/tags" in line), None))
        self.assertRegex(line, r"20\d\d-\d\d-\d\dT?.\d\d:\d\d:\d\d")

    def test_log_file_level_enables_the_log_file(self):
        secret = self.make_token()
        serving = self.serving(LOG_LEVEL="ERROR", LOG_FILE_LEVEL="INFO")
        with Client(serving.server_address) as client:
            client.ask("GET", "/api/tags", headers=bearer(secret))
        self.assertEqual(serving.stop(), 0)
        self.assertIn(b"path=/api/tags", self.read("app.log"))
        self.assertNotIn("path=/api/tags", "\n".join(serving.lines))
        self.assertNotIn(secret.encode(), self.read("app.log"))

    def test_only_serve_opens_the_log_file(self):
        run_alone("token", "create", "ada", "laptop", cwd=self.folder, env={**os.environ, "LOG_FILE_LEVEL": "INFO"}, check=True)
        self.assertNotIn("app.log", os.listdir(self.folder))

    @unittest.skipUnless(ipv6_loopback(), "this machine has no IPv6")
    def test_serve_listens_on_an_ipv6_address(self):
        serving = self.serving("--host", "::1")
        port = int(re.search(r"http://\[::1\]:(\d+)", serving.first_line).group(1))
        with Client(("::1", port)) as client:
            self.assertEqual(client.ask("GET", "/").body, b"Ollama is running")

    @unittest.skipUnless(shutil.which("openssl"), "needs the openssl command to make a certificate")
    def test_sighup_reloads_the_certificate(self):
        secret = self.make_token()
        cert, key = certificate(self.folder, "first")
        serving = self.serving("--tls-cert", cert, "--tls-key", key)
        self.assertIn("https://127.0.0.1", serving.first_line)
        first = ssl.get_server_certificate(serving.server_address)
        for old, new in zip((cert, key), certificate(self.folder, "second")):
            os.replace(new, old)
        serving.process.send_signal(signal.SIGHUP)
        eventually(lambda: ssl.get_server_certificate(serving.server_address) != first, "the new certificate")
        with Client(serving.server_address, ssl.create_default_context(cafile=cert)) as client:
            self.assertEqual(client.ask("GET", "/api/tags", headers=bearer(secret)).status, 200)

    @unittest.skipUnless(shutil.which("openssl"), "needs the openssl command to make a certificate")
    def test_sighup_with_a_wrong_or_missing_key_keeps_the_old_certificate(self):
        cert, key = certificate(self.folder, "first")
        new_cert, new_key = certificate(self.folder, "second")
        serving = self.serving("--tls-cert", cert, "--tls-key", key)
        first = ssl.get_server_certificate(serving.server_address)
        os.replace(new_cert, cert)
        for number, break_key in enumerate((lambda: None, lambda: os.remove(key)), 1):
            break_key()
            serving.process.send_signal(signal.SIGHUP)
            eventually(lambda number=number: sum("old certificate stays" in line for line in serving.lines) == number, "logging of the error")
            self.assertEqual(ssl.get_server_certificate(serving.server_address), first)
        os.replace(new_key, key)
        serving.process.send_signal(signal.SIGHUP)
        eventually(lambda: ssl.get_server_certificate(serving.server_address) != first, "the new certificate")

    def test_sighup_reopens_the_log_file_and_interrupts_no_stream(self):
        secret, hold, log = self.make_token(), self.hold(), self.path("gateway.log")
        self.fake.replies["/api/chat"] = Reply.stream(LINE, hold, LINE)
        serving = self.serving("--log-file", log)
        with Client(serving.server_address) as streaming, Client(serving.server_address) as other:
            streaming.send(request("POST", "/api/chat", CHAT, bearer(secret)))
            answer = streaming.read(streaming.head(), until=LINE)
            os.rename(log, log + ".1")
            serving.process.send_signal(signal.SIGHUP)
            eventually(lambda: os.path.exists(log) and f"SIGHUP: reloaded the log file {log}".encode() in self.read("gateway.log"), "the new file")
            self.assertEqual(stat.S_IMODE(os.stat(log).st_mode), 0o600)
            self.assertEqual(other.ask("GET", "/api/tags", headers=bearer(secret)).status, 200)
            eventually(lambda: b"path=/api/tags" in self.read("gateway.log"), "the line in the new file")
            os.rename(log, log + ".2")
            os.mkdir(log)
            serving.process.send_signal(signal.SIGHUP)
            eventually(lambda: b"the old log file stays" in self.read("gateway.log.2"), "logging of the error in the old file")
            hold.set()
            self.assertEqual((streaming.read(answer).body, answer.ended), (LINE + LINE, "clean"))
        self.assertEqual(serving.stop(), 0)
        self.assertIn(b"path=/api/chat", self.read("gateway.log.2"))

    def test_sighup_with_nothing_to_reload_is_logged_and_does_not_stop_the_gateway(self):
        serving = self.serving()
        with Client(serving.server_address) as client:
            serving.process.send_signal(signal.SIGHUP)
            eventually(lambda: any("SIGHUP: reloaded nothing" in line for line in serving.lines), "the log line")
            self.assertEqual(client.ask("GET", "/").status, 200)

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_serve_starts_and_logs_to_its_file_if_stderr_cannot_be_written(self):
        secret = self.make_token()
        for redirection in "2>/dev/full", "2>&-", ">&- 2>&-":
            with self.subTest(redirection), socket.create_server(("127.0.0.1", 0)) as free:
                address, log = free.getsockname(), f"{len(redirection)}.log"
                free.close()
                command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, GATEWAY, "serve", "--port", str(address[1]),
                           "--ollama-url", self.fake.url, "--log-file", log]
                with subprocess.Popen(command, cwd=self.folder, stdout=subprocess.DEVNULL) as process:
                    try:
                        with eventually(lambda address=address: connected(address), "the start of the gateway") as client:
                            self.assertEqual(client.ask("GET", "/api/tags", headers=bearer(secret)).status, 200)
                    finally:
                        process.terminate()
                    self.assertEqual(process.wait(GUARD), 0)
                self.assertIn(b"path=/api/tags", self.read(log))

    def test_unreadable_certificate_is_reported(self):
        for content in (None, "no certificate"):
            with self.subTest(content):
                path = self.write("bad.pem", content) if content else self.path("missing.pem")
                serving = self.serving("--tls-cert", path, "--tls-key", path)
                self.assertIn(serving.wait(), (1, 2))
                self.assertIn(path, serving.lines[-1])
                self.assertNotIn("Traceback", "\n".join(serving.lines))

    @unittest.skipUnless(sys.platform == "linux" and shutil.which("setpriv"), "needs setpriv, because root may write anything")
    def test_read_only_database_is_served_with_a_warning(self):
        secret = self.make_token()
        os.chmod(self.db, 0o400)
        os.chmod(self.folder, 0o500)
        self.addCleanup(os.chmod, self.folder, 0o700)
        without_root = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []
        with unittest.mock.patch("subprocess.Popen", functools.partial(popen_with, without_root, subprocess.Popen)):
            serving = self.serving("--db", self.db)
            with Client(serving.server_address) as client:
                self.assertEqual(client.ask("GET", "/api/tags", headers=bearer(secret)).status, 200)
            self.assertRegex("\n".join(serving.lines), "read-only.*(restart|next start)")
            refused = run_alone("token", "create", "bob", "desk", "--db", self.db)
        self.assertEqual((refused.returncode, refused.stdout), (1, b""))
        self.assertIn(b"read-only", refused.stderr)

# == Menu =====================================================================


@unittest.skipIf(pty is None, "needs pseudo-terminals")
class Menu(CommandCase):
    """`token menu`, operated by keys on a terminal or by lines from a pipe."""

    def menu(self, *tokens, **how):
        """Start the menu on a database with these tokens, each "user/name", and wait until it is shown."""
        with contextlib.closing(gateway.TokenStore(self.db, create=True)) as store:
            for token in tokens:
                store.create(*token.split("/"))
        menu = self.enter(Terminal("token", "menu", "--db", self.db, **how))
        menu.shows(MAIN_MENU)
        return menu

    def names(self):
        return [f'{token["user"]}/{token["name"]}' for token in self.tokens()]

    def test_menu_creates_a_token_and_shows_its_secret_in_a_frame(self):
        menu = self.enter(Terminal("token", "menu", "--db", self.db))
        menu.shows(MAIN_MENU)
        menu.press("\r")
        for question, keys in (("User (a", "ada\r"), ("[laptop]", "\r"), ("Expires", "2099-01-31\r"), ("Admin", "\r"), ("No limits", DOWN + "\r"),
                               ("Models", "Tiny*\r"), ("a minute", "60\r"), ("at once", "\r"), ("a day", "5000\r")):
            menu.shows(question)
            menu.press(keys)
        out = menu.shows(MAIN_MENU)
        box = re.search("\n(-+)\n(\\S+)\n\\1\n", out)
        self.assertTrue(box, out)
        self.assertIn(f"Bearer {box[2]}", out)
        token, = self.find(box[2])
        self.assertEqual((token.user, token.name, gateway.format_minute(token.expires_at)[:10], token.admin, token.models, token.rpm,
                          token.max_parallel, token.tokens_per_day), ("ada", "laptop", "2099-01-31", 0, "tiny*", 60, None, 5000))
        menu.press("\x1b")
        self.assertEqual(menu.ends(), (0, True))

    def test_menu_validates_every_answer_at_once(self):
        menu = self.menu("ada/laptop")
        menu.press("1")
        menu.shows("❯ 1")
        menu.press("\r")
        menu.shows("A new user")
        menu.press("2\r")
        for typed, text in (("laptop\r", "exists already"), ("-x\r", "printable"), ("\r", "Expires"), ("soon\r", '"soon" is not a date'),
                            ("1999-01-01\r", "in the past"), ("1d\r", "Admin"), (DOWN + "\r", "Limits"), ("2\r", "a minute"),
                            ("0\r", '"0" is not a whole number')):
            menu.press(typed)
            self.assertNotIn("--", menu.shows(text))
        menu.press("\x03")
        self.assertEqual((menu.ends(), self.names()), ((0, True), ["ada/laptop"]))

    def test_menu_changes_rotates_and_deletes_tokens(self):
        menu = self.menu("ada/laptop", "bob/box", "bob/phone")
        menu.press("5\r")
        menu.shows("ada (1 token)")
        menu.press(DOWN, "\r")
        self.assertIn("ogw_", menu.shows("never"))
        menu.press(DOWN, "\r")
        for keys, text in (("2\r", "Admin (may"), (DOWN + "\r", "Changed the admin token"), ("", MAIN_MENU), ("\r", "Whose"), ("2\r", "Which"),
                           ("2\r", "Change"), ("3\r", "Models (as"), ("tiny\r", "may use every model"), ("", MAIN_MENU), ("\r2\r2\r4\r", "[none]"),
                           ("7\r", "7 a minute"), ("", MAIN_MENU), ("\r2\r2\r4\r", "a minute [7]"),
                           ("none\r", 'Changed the admin token "bob/phone" (does not expire) in'), ("", MAIN_MENU)):
            menu.press(keys)
            menu.shows(text)
        self.assertEqual([token["admin"] for token in self.tokens()], [False, False, True])
        hints = [token["hint"] for token in self.tokens()]
        for keys, text in (("6\r", "Whose"), ("2\r", "Which"), ("1\r", "old secret stops"), ("\r", MAIN_MENU), ("6\r", "Whose"), ("\r", "Which"),
                           ("\r", "old secret stops"), (DOWN + "\r", "---"), ("", MAIN_MENU), ("3\r", "Whose"), ("2\r", "Which"), ("1\r", "stops at"),
                           ("\r", MAIN_MENU), ("3\r", "Whose"), ("2\r", "Which"), ("2\r", 'Delete "bob/phone"?'), (UP + "\r", "Deleted the token"),
                           ("8\r", "")):
            menu.press(keys)
            menu.shows(text)
        self.assertEqual((menu.ends(), self.names()), ((0, True), ["ada/laptop", "bob/box"]))
        self.assertEqual([new["hint"] == old for new, old in zip(self.tokens(), hints)], [False, True])

    def test_menu_lists_and_exports_tokens_and_shows_their_usage(self):
        menu, file = self.menu("ada/laptop"), self.path("out.csv")
        menu.press("2\r")
        self.assertRegex(menu.shows("1 token in"), r"USER +NAME.*\nada +laptop ")
        menu.shows(MAIN_MENU)
        menu.press("4\r")
        menu.shows("[tokens.csv]")
        for keys, text in ((self.path("out.txt\r"), "ends neither in"), (file + "\r", "Exported 1 token"), ("", MAIN_MENU), ("4\r", "File"),
                           (file + "\r", "Replace "), ("\r", MAIN_MENU), ("7\r", "model"), ("3\r", "[7d]"), ("x\r", '"x" is not a date'),
                           ("30d\r", "0 requests, 0 tokens since"), ("", MAIN_MENU)):
            menu.press(keys)
            menu.shows(text)
        self.assertIn(b"ada,laptop", self.read("out.csv"))

    def test_menu_goes_back_on_escape_left_and_less_than_and_ends_on_escape(self):
        menu = self.menu("ada/laptop")
        for keys, text in (("\r", "A new user"), ("\x1b", MAIN_MENU), ("\r", "A new user"), (LEFT, MAIN_MENU), ("\r", "A new user"), ("<", MAIN_MENU),
                           ("\r", "A new user"), (DOWN + "\r", "[laptop-2]"), ("\r", "Expires"), (" < \r", MAIN_MENU), ("\x1b", "")):
            menu.press(keys)
            menu.shows(text)
        self.assertEqual((menu.ends(), self.names()), ((0, True), ["ada/laptop"]))

    def test_menu_restores_the_terminal_when_ended_by_a_key_or_a_signal(self):
        for label, keys, end in (("Ctrl-C", "\x03", None), ("Ctrl-D", "\x04", None), ("Ctrl-\\", "\x1c", None),
                                 ("Ctrl-Z without a shell", "\x1a\x03", None), ("SIGTERM", "", signal.SIGTERM), ("two at once", "", signal.SIGHUP)):
            with self.subTest(label):
                menu = self.menu()
                self.assertNotEqual(termios.tcgetattr(menu.master), menu.before)
                menu.press(keys)
                for number in (signal.SIGSTOP, end, signal.SIGTERM, signal.SIGCONT) if end else ():   # so that both are pending at once
                    menu.process.send_signal(number)
                self.assertEqual(menu.ends(), (0, True))

    def test_menu_ends_on_a_signal_within_a_callback_that_ignores_exceptions(self):
        menu = self.enter(Terminal("token", "menu", "--db", self.db, script=SIGNALLED_IN_A_CALLBACK))
        self.assertEqual(menu.ends(), (0, True))
        self.assertNotIn("ignored", menu.text)

    def test_menu_restores_the_terminal_when_ended_at_a_text_prompt(self):
        for label, keys, end in (("Ctrl-C", "\x03", 0), ("Ctrl-D", "\x04", 0), ("Ctrl-\\", "\x1c", 0), ("SIGTERM", "", signal.SIGTERM),
                                 ("SIGHUP", "", signal.SIGHUP)):
            with self.subTest(label):
                menu = self.menu()
                menu.press("\r")
                menu.shows("User (a person): ")
                menu.press("ada\b\b\b")
                menu.shows("ada")
                menu.press(keys)
                menu.process.send_signal(end)
                self.assertEqual(menu.ends(), (0, True))

    def test_menu_suspended_by_ctrl_z_restores_the_terminal_and_resumes(self):
        menu = self.menu("ada/laptop", script=AS_A_JOB)
        stopped = "stopped in normal mode"
        for keys, text in (("\x1a", stopped), ("", "❯ 1"), ("1\r", "A new user"), ("\r", "User (a"), ("ki\x1a", stopped), ("m\r", "[laptop]"),
                           ("<\r", MAIN_MENU), ("\x1a", stopped), ("", "❯ 1"), ("\x1b", "")):
            menu.press(keys)
            menu.shows(text)
        self.assertEqual(menu.ends(), (0, True))

    def test_menu_keeps_keys_that_are_typed_ahead(self):
        keys = f"{DOWN}{UP}\r<\r\rada\r\r30d\r\r2\rtiny*\r60\r\r5\r2\r8\r"
        for label, pieces in (("before it starts", [keys]), ("one by one", keys)):
            with self.subTest(label):
                menu = self.enter(Terminal("token", "menu", "--db", self.db))
                menu.press(*pieces)
                menu.shows("1 token in")
                self.assertEqual(menu.ends(), (0, True))
                token, = self.tokens()
                self.assertEqual([token[key] for key in ("user", "name", "models", "rpm", "max_parallel", "tokens_per_day")],
                                 ["ada", "laptop", ["tiny*"], 60, None, 5])
                self.succeeds("token", "delete", "ada", "laptop")

    def test_menu_restores_terminal_and_signal_handlers_after_an_exception(self):
        master, slave = pty.openpty()
        before, handler = termios.tcgetattr(slave), signal.getsignal(signal.SIGTERM)

        def fail(prompt):
            self.assertNotEqual(termios.tcgetattr(slave), before)
            raise ZeroDivisionError
        try:
            with open(slave, encoding="utf-8", closefd=False) as stdin, unittest.mock.patch("sys.stdin", stdin), \
                    unittest.mock.patch.object(gateway.ArrowPrompt, "_read_key", fail), contextlib.redirect_stdout(io.StringIO()), \
                    self.assertRaises(ZeroDivisionError):
                with gateway.ArrowPrompt().handling_signals() as prompt:
                    prompt.choose("?", ["a"])
            self.assertEqual((termios.tcgetattr(slave), signal.getsignal(signal.SIGTERM)), (before, handler))
        finally:
            os.close(master)
            os.close(slave)

    def test_menu_handles_a_signal_that_arrives_just_before_the_wait_for_a_key(self):
        """The signal arrives after Python's last check for signals: `map` calls only C functions, so no handler runs in between."""
        master, slave = pty.openpty()
        go, done = threading.Lock(), threading.Lock()
        go.acquire()
        done.acquire()

        def send_signal():
            go.acquire()
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            done.release()
            if not ended.wait(GUARD):
                os.write(master, b"x\n")
        ended, thread = threading.Event(), threading.Thread(target=send_signal)
        thread.start()
        with open(master, "wb", buffering=0), open(slave, encoding="utf-8") as stdin, unittest.mock.patch("sys.stdin", stdin), \
                gateway.ArrowPrompt().handling_signals() as prompt:
            with self.assertRaises(KeyboardInterrupt):
                prompt._wait(list, map(functools.partial.__call__, [functools.partial(go.release), functools.partial(done.acquire),
                                                                    functools.partial(os.read, slave, 1)]))
            ended.set()
            thread.join(GUARD)

    def test_menu_scrolls_a_long_list_and_selects_a_line_by_its_number(self):
        menu = self.menu(*(f"user{number:02}/box" for number in range(1, 61)), rows=10)
        menu.press("3\r")
        for keys, place in (("", 1), (UP, 60), (DOWN, 1), ("4", 4), ("2", 42), ("9", 9), ("0", 9), (UP, 8), (DOWN, 9), ("1", 1),
                            ("\x1bOB", 2), ("\x1b[1;5B", 3), ("\x1b[24~\x00é", 3)):
            with self.subTest(keys):
                menu.press(keys)
                menu.shows(f"Whose token? ({place}/60)")
                menu.shows(f"❯ {place:2}  user{place:02} (1 token)")
        self.assertLess(max(frame.count("\n") for frame in menu.frames()[1:-1]), 10)

    def test_menu_lines_are_not_wider_than_the_terminal(self):
        menu = self.menu(f"{'x' * 64}/{'y' * 64}", f"{'日' * 64}/{'本' * 64}", columns=40)
        for keys, text in (("3\r", "Whose"), ("2\r", "Which"), ("\r", "Delete"), ("\r", MAIN_MENU), ("1\r", "Whose"), ("\r", "User (a"),
                           ("é" * 70, "éé"), ("\r", "printable"), ("<\r", MAIN_MENU)):
            menu.press(keys)
            menu.shows(text)
        menu.shows("❯")
        start = len(menu.frames())
        for columns in (30, 1):
            menu.resize(columns, 8)
            menu.press("\x7f", DOWN)
            menu.shows("❯")
            menu.shows("❯")
        menu.press("\x03")
        self.assertEqual(menu.ends(), (0, True))
        frames = menu.frames()
        for columns, frames in ((40, frames[:start]), (30, frames[start:-1])):
            for frame in frames:
                if "❯" in frame:
                    for line in frame.splitlines():
                        self.assertLess(gateway.text_width(line), columns, line)

    def test_menu_escapes_control_characters_in_stored_names(self):
        menu = self.menu("ada/laptop")
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.execute("UPDATE tokens SET user = ?, name = ?", ("\x1b]0;owned\x07\u202e", "a\nb\x9b31m"))
        for keys, text in (("3\r", "❯ 1  ?]0;owned??"), ("\r", "❯ 1  a?b?31m")):
            menu.press(keys)
            menu.shows(text)
        self.assertNotIn(b"\x07", menu.raw)

    def test_menu_sends_no_escape_sequences_to_a_dumb_terminal(self):
        for term in ("xterm", "dumb"):
            with self.subTest(term):
                menu = self.enter(Terminal("token", "menu", "--db", self.db, TERM=term))
                menu.shows("1  Gen")
                self.assertEqual(b"\x1b" in menu.raw, term == "xterm")
                menu.press("\x04")
                self.assertEqual(menu.ends(), (0, True))

    def test_menu_has_no_colour_if_no_color_is_set(self):
        for environ, colour in ({}, True), ({"NO_COLOR": "1"}, False):
            with self.subTest(environ):
                menu = self.enter(Terminal("token", "menu", "--db", self.db, **environ))
                menu.shows("8  Exit")
                self.assertEqual((b"\x1b[1;36m" in menu.raw, b"\x1b[1m" in menu.raw), (colour, not colour))

    def test_menu_writes_only_ascii_to_an_ascii_terminal(self):
        menu = self.menu("日本/laptop", PYTHONIOENCODING="ascii")
        for keys, text in (("6\r", r"> 1  \u65e5\u672c (1 token)"), ("\r\r\x1b[B\r", "----")):
            menu.press(keys)
            menu.shows(text)
        self.assertTrue(menu.raw.isascii())

    def test_create_frames_the_secret_on_a_terminal(self):
        for columns, width in ((80, 47), (40, 39)):
            terminal = self.enter(Terminal("token", "create", "ada", str(columns), "--db", self.db, columns=columns))
            terminal.shows("ended with 0")
            self.assertRegex(terminal.text, rf"\n-{{{width}}}\n{SECRET.pattern}\n-{{{width}}}\n")

    def test_menu_reports_an_error_and_goes_on(self):
        menu = self.menu("ada/laptop")
        for name in os.listdir(self.folder):
            os.remove(self.path(name))
        menu.press("2\r")
        menu.shows("there is no database")
        menu.shows(MAIN_MENU)
        menu.press("8\r")
        self.assertEqual(menu.ends(), (0, True))

    def script(self, *lines):
        return self.succeeds("token", "menu", stdin="".join(line + "\n" for line in lines))

    def test_menu_reads_its_answers_from_a_pipe(self):
        self.assertIn("There are no tokens yet", self.script("3"))
        out = self.script("1", "ada", "", "", "2", "2", "60", "", "")
        self.assertEqual(len(self.find(*set(SECRET.findall(out)))), 1, out)
        self.script("5", "1", "1", "3", "tiny*", "8")
        file = self.path("out.json")
        out = self.script("2", "4", file, "4", file, "2", "4", file, "1", "7", "2", "1d", "6", "1", "1", "2", "9", "x", "8")
        words = ("USER  NAME", "Exported 1", "0 requests", "Gave a new secret", "not a whole number from 0 to 8")
        self.assertEqual([out.count(word) for word in words], [1, 2, 1, 1, 2], out)
        self.script("1", "2", "", "", "", "", "3", "1", "2", "1", "3", "1", "2", "2")
        self.assertEqual(self.names(), ["ada/laptop"])

    def test_menu_handles_end_of_input_going_back_and_invalid_lines_from_a_pipe(self):
        self.assertNotIn("Created", self.script())
        self.assertTrue(os.path.getsize(self.db))
        self.assertNotIn("Created", self.script("1", "ada"))
        self.assertEqual(self.script("1", "<", "0").count("User (a person)"), 1)
        done = run_alone("token", "menu", "--db", self.db, input=b"1\n\xff\n\x1b[31m\n\r\nada\r\n\n\n\n\n0\n",
                         env=dict(os.environ, PYTHONIOENCODING="utf-8:strict"))
        self.assertEqual((done.returncode, done.stderr, done.stdout.count(b"printable"), self.names()), (0, b"", 3, ["ada/laptop"]), done)
        self.assertNotIn(b"\x1b", done.stdout)

    def test_menu_creates_a_missing_or_empty_database(self):
        self.write("tokens.db", b"")
        self.assertIn(self.db, self.script("8"))
        self.assertEqual(self.tokens(), [])
        self.assertIn("directory", self.fails("token", "menu", "--db", self.folder))
        with unittest.mock.patch("sys.stdin", None), contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertEqual((gateway.main(["token", "menu", "--db", self.db]), "closed" in err.getvalue()), (1, True))

# == Doctor ===================================================================


class BufferingProxy(http.server.BaseHTTPRequestHandler):
    """A reverse proxy that buffers a whole response before it passes it on."""

    def do_GET(self):   # noqa: N802, http.server's name
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        forwarded = urllib.request.Request(self.server.upstream + self.path, body or None, dict(self.headers), method=self.command)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(forwarded, timeout=GUARD) as reply:
            whole = reply.read()
            self.send_response(reply.status)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole)

    do_POST = do_GET    # noqa: N815

    def log_message(self, *args):
        """Log nothing."""


class Doctor(GatewayCase, CommandCase):

    def setUp(self):
        super().setUp()
        self.enter(unittest.mock.patch.object(gateway, "HEALTH_SECONDS", 0.02))
        self.probe_health()

    def stop_ollama(self):
        self.fake.server_close()
        eventually(lambda: self.health() == "down", "detection by the gateway")

    def run_doctor(self, *flags, addresses=(), token=""):
        """Run doctor against the fake Ollama, and return its exit status and its lines."""
        port = str(self.server.server_address[1])
        with unittest.mock.patch("ollama_gateway.local_addresses", lambda: list(addresses)), \
                unittest.mock.patch("ollama_gateway.can_show", lambda text: True), \
                unittest.mock.patch.dict(os.environ, {"GATEWAY_TOKEN": token}):
            status, out, err = self.run_command("doctor", "--ollama-url", self.fake.url, "--port", port, *flags)
        self.assertEqual(err, "")
        for secret in {token, self.token, self.admin} - {""}:
            self.assertNotIn(secret, out)
        return status, out.splitlines()

    def finding(self, word, *flags, mark="✓", **how):
        """Run doctor, and return the line that contains a word and its advice; check its mark and the exit status."""
        status, lines = self.run_doctor(*flags, **how)
        self.assertEqual(status, int(any(line.startswith("✗") for line in lines)), lines)
        at, = [at for at, line in enumerate(lines) if word in line and line[:1] in "✓✗-"]
        self.assertTrue(lines[at].startswith(mark + " "), lines)
        return lines[at], lines[at + 1].strip() if lines[at + 1].startswith("  ") else ""

    def stream_reply(self, seconds, pause):
        """Have the fake Ollama stream an answer with this pause between its lines, and report that it took this many seconds."""
        last = b'{"done":true,"eval_duration":%d}\n' % (seconds * 1e9)
        self.fake.replies["/api/generate"] = Reply.stream(*[b'{"response":"x","done":false}\n'] * 4, last, pause=pause)

    def url_of_buffering_proxy(self):
        proxy = self.enter(running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), BufferingProxy)))
        proxy.upstream = "http://127.0.0.1:%d" % self.server.server_address[1]
        return "http://127.0.0.1:%d/" % proxy.server_address[1]

    def test_doctor_accepts_an_ollama_that_refuses_other_origins(self):
        def reply(exchange):
            (Reply.body(403, b"") if exchange.headers.get("Origin") else Reply.json(200, {"version": "0.9.3"}))(exchange)
        self.assertIn("any Origin", self.finding("Ollama accepts")[0])
        self.fake.replies["/api/version"] = reply
        self.assertIn("forwards none", self.finding("Ollama accepts")[0])

    def test_doctor_prompts_for_a_token_without_echo_if_a_url_is_given(self):
        terminal = type("Terminal", (io.StringIO,), {"isatty": lambda _: True})
        with unittest.mock.patch("getpass.getpass", return_value=self.token) as prompt, unittest.mock.patch("io.StringIO", terminal):
            self.stream_reply(0.1, 0.02)
            _, lines = self.run_doctor("--url", "http://127.0.0.1:%d/" % self.server.server_address[1])
            self.assertTrue([line for line in lines if "without delay" in line], lines)
            self.assertEqual(prompt.call_count, 1)
            self.run_doctor()
            self.assertEqual(prompt.call_count, 1)

    def test_doctor_reports_no_failure_for_a_working_setup(self):
        status, lines = self.run_doctor()
        self.assertEqual((status, [line for line in lines if line.startswith("✗")]), (0, []))
        self.assertRegex(lines[-1], r"\A\d+ checks, none failed\Z")

    def test_doctor_reports_settings_with_their_sources(self):
        env = self.write("x.env", f"BASE_PATH=/team\nTOKEN_DB_PATH={self.db}\n")
        with unittest.mock.patch.dict(os.environ, GATEWAY_MAX_QUEUE="7"):
            line, _ = self.finding("settings:", "--env-file", env)
        for source in (f"--ollama-url {self.fake.url}", f"BASE_PATH in {env}: /team", "GATEWAY_MAX_QUEUE: 7"):
            self.assertIn(source, line)

    def test_doctor_reports_an_invalid_setting_and_skips_the_other_checks(self):
        status, lines = self.run_doctor("--max-queue", "none")
        self.assertEqual((status, lines[2][:14], lines[-1]), (1, "✗ settings: --", "1 of 3 checks failed"))

    def test_doctor_reports_outdated_versions(self):
        floors = (("Python", "3.7.1", (3, 8)), ("SQLite", "3.25.3", (3, 26)))
        with unittest.mock.patch("ollama_gateway.FLOORS", floors):
            self.assertIn("3.8", self.finding("Python", mark="✗")[1])
            self.assertIn("3.26", self.finding("SQLite", mark="✗")[1])

    def test_doctor_reports_a_missing_or_invalid_database_and_creates_none(self):
        self.assertIn("token create", self.finding("no database", "--db", self.path("none.db"), mark="✗")[0])
        self.write("text.db", "hello, this is no database" * 100)
        self.finding("cannot use the database", "--db", self.path("text.db"), mark="✗")
        self.assertEqual(self.read("text.db"), b"hello, this is no database" * 100)
        self.assertFalse(os.path.exists(self.path("none.db")))

    @unittest.skipIf(os.name == "nt", "Windows has no such permissions")
    def test_doctor_reports_a_database_readable_by_others_and_leaves_it_unchanged(self):
        os.chmod(self.db, 0o644)
        self.assertIn("chmod 600", self.finding("other users of this machine", mark="✗")[1])
        self.assertEqual(stat.S_IMODE(os.stat(self.db).st_mode), 0o644)

    @unittest.skipUnless(sys.platform == "linux", "reads mountinfo")
    def test_doctor_and_serve_warn_about_a_network_or_fuse_file_system(self):
        device = os.stat(self.folder).st_dev
        line = "36 35 %d:%d / /mnt\\040x rw,noatime master:1 - %%s host:/share rw\n" % (os.major(device), os.minor(device))
        for kind in ("nfs4", "cifs", "fuse.sshfs"):
            mounts = self.write("mounts", "1 1 0:999 / / rw - ext4 /dev/x rw\n" + line % kind)
            with self.subTest(kind), unittest.mock.patch("ollama_gateway.MOUNTS", mounts):
                self.assertIn("local disk", self.finding(f"({kind})", mark="✗")[1])
                settings = gateway.load_settings({"ollama_url": self.fake.url}, {})
                with contextlib.redirect_stderr(io.StringIO()) as err:
                    gateway.announce(settings, self.server, self.store)
                self.assertIn(kind, err.getvalue())
        with unittest.mock.patch("ollama_gateway.MOUNTS", self.write("mounts", line % "ext4")):
            self.assertEqual(gateway.remote_file_system(self.db), "")
        with unittest.mock.patch("ollama_gateway.MOUNTS", self.path("missing")):
            self.assertEqual(gateway.remote_file_system(self.db), "")

    def test_doctor_reports_an_old_database_and_does_not_upgrade_it(self):
        old = self.path("old.db")
        with contextlib.closing(sqlite3.connect(old)) as db:
            db.execute(OLD_SCHEMA)
            db.commit()
        os.chmod(old, 0o600)
        before = self.read("old.db")
        self.assertIn("upgraded to", self.finding("the database", "--db", old)[0])
        self.assertEqual(self.read("old.db"), before)
        self.assertEqual([name for name in os.listdir(self.folder) if name.startswith("old.db")], ["old.db"])

    def test_doctor_reports_the_version_and_models_of_ollama(self):
        line, _ = self.finding("Ollama 0.9.3")
        self.assertIn("1 model: tiny:latest", line)
        self.fake.replies["/api/tags"] = Reply.json(200, {"models": None})
        self.assertIn("ollama pull", self.finding("Ollama 0.9.3")[0])

    def test_doctor_reports_an_unreachable_or_invalid_ollama(self):
        for label, reply, words in (("another server", Reply.json(200, {"hello": 1}), "is not Ollama"),
                                    ("an error", Reply.json(500, {}), "is not Ollama"),
                                    ("our Host", Reply.body(403, b""), "refuses requests for that host name"),
                                    ("nonsense", Reply.raw(b"SSH-2.0\r\n\r\n"), "does not speak HTTP")):
            with self.subTest(label):
                self.fake.replies["/api/version"] = reply
                self.assertTrue(self.finding(words, mark="✗")[1])
        self.fake.server_close()
        self.assertIn("--ollama-url", self.finding("Ollama at", mark="✗")[1])

    def test_doctor_survives_an_invalid_list_of_models(self):
        for models, shown in (("x", "0 models"), (5, "0 models"), ([1, None, {"name": "a\x1b[31mb"}], "1 model: a?[31mb"), ({"a": 1}, "0 models")):
            with self.subTest(models):
                self.fake.replies["/api/tags"] = Reply.json(200, {"models": models})
                self.assertIn(shown, self.finding("Ollama 0.9.3")[0])

    def test_doctor_reports_an_ollama_that_other_machines_can_reach(self):
        with running(FakeOllama(self.fake.server_address[1], "127.0.0.2")) as other:
            line, advice = self.finding("protects nothing", addresses=("127.0.0.2", "127.0.0.3"), mark="✗")
            self.assertIn("OLLAMA_HOST", advice)
            self.assertNotIn("127.0.0.3", line)
            other.replies["/api/version"] = Reply.json(401, {"error": "no valid token"})    # as a gateway answers
            self.finding("is closed", addresses=("127.0.0.2",))
        self.assertIn("127.0.0.3", self.finding("is closed", addresses=("127.0.0.3",))[0])

    def test_doctor_does_not_judge_the_exposure_of_a_remote_ollama(self):
        with unittest.mock.patch("ollama_gateway.is_local_host", lambda host: False):
            self.assertIn("only this machine", self.finding("cannot be checked from here", mark="-")[1])

    def test_local_addresses_exclude_loopback_and_link_local(self):
        for address in gateway.local_addresses():
            self.assertFalse(address.startswith(("127.", "::1", "fe80", "169.254", "0.0.0.0")), address)
        self.assertTrue(gateway.is_local_host("localhost"))
        self.assertFalse(gateway.is_local_host("192.0.2.77"))

    @unittest.skipUnless(shutil.which("openssl"), "needs the openssl command to make a certificate")
    def test_doctor_checks_that_the_certificate_matches_its_key(self):
        os.mkdir(self.path("other"))
        cert, key = certificate(self.folder, "localhost")
        _, other = certificate(self.path("other"), "localhost")
        self.finding("are readable and match", "--tls-cert", cert, "--tls-key", key)
        self.finding("cannot use the certificate", "--tls-cert", cert, "--tls-key", other, mark="✗")
        self.finding("cannot use the certificate", "--tls-cert", self.path("none.pem"), mark="✗")

    def test_doctor_reports_missing_tls(self):
        self.assertIn("only this machine", self.finding("no TLS", mark="-")[0])
        self.assertIn("--tls-cert", self.finding("no TLS", "--host", "0.0.0.0", mark="-")[1])

    def test_doctor_reports_whether_the_address_is_free_or_used_by_the_gateway(self):
        self.assertIn("reaches Ollama", self.finding("the gateway 1.0.0")[0])
        self.finding("is free", "--port", "0")
        self.assertIn("--port", self.finding("cannot listen", "--port", str(self.fake.server_address[1]), mark="✗")[1])

    def test_doctor_reports_a_gateway_that_does_not_reach_ollama(self):
        self.stop_ollama()
        self.finding("does not reach Ollama", mark="✗")

    def test_doctor_tests_a_stream_with_the_token_of_the_environment(self):
        self.assertIn("GATEWAY_TOKEN", self.finding("was not tried", mark="-")[1])
        self.stream_reply(0.08, 0.02)
        self.finding("forwards streams", token=self.token)
        self.stream_reply(0.001, 0)
        self.finding("is unknown", token=self.token, mark="-")
        self.assertIn("GATEWAY_TOKEN", self.finding("answers 401", token="ogw_wrong", mark="✗")[1])

    def test_doctor_reports_a_proxy_that_buffers_streams(self):
        self.stream_reply(0.4, 0.1)
        line, advice = self.finding("holds streams back", "--url", self.url_of_buffering_proxy(), token=self.token, mark="✗")
        self.assertIn("proxy_buffering off", advice)
        self.assertIn("tiny:latest took 0.40 s", line)

    def test_doctor_skips_a_model_that_generates_no_text(self):
        self.fake.replies["/api/generate"] = Reply.json(400, {"error": "does not support generate"})
        self.finding("no model makes text", token=self.token, mark="-")

    def test_doctor_skips_the_stream_test_if_a_rate_limit_refuses_it(self):
        self.store.update("ada", "laptop", rpm=1)
        self.stream_reply(0.08, 0.02)
        self.finding("forwards streams", token=self.token)
        self.assertIn("429", self.finding("was not tried", token=self.token, mark="-")[0])

    def test_doctor_without_ollama_blames_no_token_and_calls_no_port_closed(self):
        self.stop_ollama()
        status, lines = self.run_doctor(token=self.token)
        self.assertEqual((status, lines[-1][:4]), (1, "2 of"), lines)
        self.finding("whether others reach Ollama itself", mark="-")

    def test_doctor_trims_a_token_and_rejects_one_with_spaces_inside(self):
        self.stream_reply(0.08, 0.02)
        self.finding("forwards streams", token=f" {self.token} \n")
        with unittest.mock.patch.dict(os.environ, {"GATEWAY_TOKEN": "ogw_x ogw_y"}):
            self.assertIn("GATEWAY_TOKEN", self.fails("doctor", status=2))

    def test_doctor_reports_a_broken_stream(self):
        self.fake.replies["/api/generate"] = Reply.stream(b'{"done":false}\n', cut)
        self.finding("a stream of", token=self.token, mark="✗")

    def test_doctor_reports_a_wrong_public_url(self):
        for url, words in ((self.fake.url, "is not this gateway"), ("http://127.0.0.1:1/", "refused"),
                           ("https://127.0.0.1:%d/" % self.server.server_address[1], "https://")):
            with self.subTest(url):
                self.finding(words, "--url", url, mark="✗")
        self.assertIn("--url", self.fails("doctor", "--url", "ftp://x", status=2))

    def test_doctor_prints_ascii_marks_if_the_encoding_is_ascii(self):
        done = run_alone("doctor", "--ollama-url", "http://127.0.0.1:1", "--db", self.db, "--port", "0",
                         env={**os.environ, "PYTHONIOENCODING": "ascii"})
        self.assertEqual((done.returncode, done.stderr), (1, b""))
        self.assertEqual({line[:5].strip() for line in done.stdout.decode("ascii").splitlines()[:-1]} - {""}, {"ok", "FAIL", "--"})

# == Source code rules ========================================================


def source_of(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def shell_words(line):
    """Return the words of a shell command line up to its first operator or redirection."""
    words = shlex.split(line, comments=True)
    return list(itertools.takewhile(lambda word: not re.match(r"[|&;<>]|2>", word), words))


def sections(source):
    """Return the sections of the source, {name: text}."""
    parts = re.split(r"^# == (\S[^=]*?) =+$", source, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


LINE_BUDGET = 5700


class SourceCodeRules(unittest.TestCase):
    """Rules for the source code, and checks of the README against it."""

    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.source, cls.tests = source_of(GATEWAY), source_of(TESTS)
        cls.tree = ast.parse(cls.source)

    def test_module_index_lists_all_sections(self):
        index = re.findall(r"^    ([A-Z]\w+(?: \w+)*) {2,}\S", ast.get_docstring(self.tree), re.MULTILINE)
        self.assertEqual(index, list(sections(self.source)))

    def test_section_banners_are_79_columns_wide(self):
        for line in re.findall("^# ==.*$", self.source + self.tests, re.MULTILINE):
            self.assertRegex(line, r"\A# == \S.* =+\Z")
            self.assertEqual(len(line), 79, line)

    def test_every_name_is_defined_above_its_use(self):
        defined = {}
        for node in self.tree.body:
            for name in names_bound_by(node):
                defined.setdefault(name, node.lineno)
        table = symtable.symtable(self.source, GATEWAY, "exec")
        spans = {node.name: (node.lineno, node.end_lineno) for node in self.tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        used_too_early = [f"{child.get_name()} uses {name}, defined below it" for child in table.get_children() if child.get_name() in spans
                          for name in globals_used_by(child) if defined.get(name, 0) > spans[child.get_name()][1]]
        self.assertEqual(used_too_early, [])

    def test_no_top_level_name_or_method_is_bound_twice(self):
        for tree in (self.tree, ast.parse(self.tests)):
            bound = collections.Counter(name for node in tree.body for name in names_bound_by(node))
            bound.update(f"{node.name}.{method.name}" for node in tree.body if isinstance(node, ast.ClassDef)
                         for method in node.body if isinstance(method, ast.FunctionDef) and not method.decorator_list)
            self.assertEqual([name for name, times in bound.items() if times > 1 and name != "_"], [])

    def test_only_the_standard_library_is_imported(self):
        library = [os.path.realpath(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib")]
        for path, own in ((GATEWAY, set()), (TESTS, {"ollama_gateway"})):
            for name in imports_of(ast.parse(source_of(path))) - set(sys.builtin_module_names) - own - {"msvcrt"}:  # exists on Windows only
                origin = importlib.util.find_spec(name).origin
                if origin != "frozen":
                    origin = os.path.realpath(origin)
                    self.assertTrue(origin.startswith(tuple(library)) and "site-packages" not in origin, (name, origin))

    def test_upserts_are_compatible_with_sqlite_3_26(self):
        self.assertNotRegex(self.source, r"ON CONFLICT\s+DO")     # the conflict target may be omitted only since 3.35

    def test_both_files_are_valid_python_3_8(self):
        for source in (self.source, self.tests):
            self.assertTrue(ast.parse(source, feature_version=(3, 8)))

    def test_no_function_is_longer_than_40_lines(self):
        for tree in (self.tree, ast.parse(self.tests)):
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    self.assertLessEqual(node.end_lineno - node.lineno + 1, 40, node.name)

    def test_no_line_is_longer_than_150_columns(self):
        for source in (self.source, self.tests):
            self.assertEqual([line for line in source.splitlines() if len(line) > 150], [])

    def test_modules_and_functions_are_used_only_in_their_sections(self):
        for pattern, homes in ((r"\bsqlite3\.", {"Store"}), (r"\burllib\.request\.", {"Backends"}),
                               (r"\bsocket\.", {"Connection", "Server", "Backends", "Doctor"}),
                               (r"\bprint\(", {"Commands", "Menu", "Main"}), (r"\binput\(", {"Commands", "Menu"})):
            with self.subTest(pattern):
                code = {name: re.sub(r'#.*|"""(?s:.*?)"""', "", text) for name, text in sections(self.source).items()}
                self.assertLessEqual({name for name, text in code.items() if re.search(pattern, text)}, homes)

    def test_program_stays_within_its_line_budget(self):
        self.assertLessEqual(len(self.source.splitlines()), LINE_BUDGET)

    def test_no_line_of_the_program_is_longer_than_120_columns(self):
        self.assertEqual([line for line in self.source.splitlines() if len(line) > 120], [])

    def test_import_has_no_side_effects(self):
        done = subprocess.run([sys.executable, "-W", "error", "-c", f"import sys; sys.path.insert(0, {HERE!r}); import ollama_gateway, threading; "
                               "sys.exit(threading.active_count() - 1)"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               cwd=tempfile.gettempdir())
        self.assertEqual((done.returncode, done.stdout), (0, b""))

    def test_every_option_is_in_the_readme_with_its_variable_and_default(self):
        readme = source_of(README)
        for option in gateway.OPTIONS:
            with self.subTest(option.flag):
                names = (f"`{option.flag}`", f"`{option.variable}`")
                row, = [line for line in readme.splitlines() if line.startswith("|") and all(name in line for name in names)]
                self.assertIn(option.default or "", row)

    def test_refusals_with_429_and_503_have_a_retry_after_header(self):
        for code, reason in gateway.REFUSALS.items():
            with self.subTest(code):
                delays = [int(value) for name, value in gateway.Refusal(code).fields if name == "Retry-After"]
                self.assertEqual([seconds > 0 for seconds in delays], [True] if reason.status in (429, 503) else [])

    def test_every_refusal_is_in_the_readme(self):
        readme = source_of(README)
        for code, reason in gateway.REFUSALS.items():
            with self.subTest(code):
                self.assertTrue(re.search(rf"(?m)^\|.*\b{reason.status}\b.*\|", readme))

    def test_commands_in_the_readme_are_valid(self):
        lines = re.findall(r"^\s*(?:\$ )?(?:\w+=\$\()?python3 (ollama_gateway\.py .*?)\)?$", source_of(README).replace("\\\n", " "), re.MULTILINE)
        self.assertTrue(lines)
        for line in lines:
            with self.subTest(line):
                self.assertTrue(gateway.build_parser().parse_args(shell_words(line)[1:]))


def names_bound_by(node):
    """Return the top-level names that a statement of the module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def globals_used_by(table):
    """Return the global names that a function or class and everything nested in it read."""
    used = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
    return used.union(*map(globals_used_by, table.get_children()))


def imports_of(tree):
    return {name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])}

# == Fake Ollama ==============================================================


class FakeOllamaItself(Case):
    """Tests of the fake Ollama, because no other test would notice its mistakes."""

    def setUp(self):
        super().setUp()
        self.fake = self.enter(running(FakeOllama()))

    def ask(self, method, path, body=None, **headers):
        connection = self.enter(contextlib.closing(http.client.HTTPConnection(*self.fake.server_address, timeout=GUARD)))
        connection.request(method, path, body if body is None or isinstance(body, bytes) else compact(body), headers)
        return connection.getresponse()

    def test_fake_ollama_responds_like_ollama(self):
        for path, kind, streaming in (("/api/chat", NDJSON, True), ("/api/generate", NDJSON, True), ("/v1/chat/completions", SSE, True),
                                      ("/v1/completions", SSE, True),
                                      ("/api/chat", JSON, False), ("/v1/chat/completions", "application/json", False)):
            with self.subTest(path, streaming=streaming):
                reply = self.ask("POST", path, {"model": "m", "stream": streaming})
                self.assertEqual((reply.status, reply.headers["Content-Type"]), (200, kind))
                self.assertEqual(reply.headers["Transfer-Encoding"], "chunked" if streaming else None)
                text = reply.read().decode()
                self.assertIn(WORDS[1] if streaming else "".join(WORDS), text)
                self.assertTrue(text.endswith("data: [DONE]\n\n" if kind == SSE else "}\n" if streaming else "}"))

    def test_fake_ollama_records_requests(self):
        self.ask("POST", "/api/show?x", b"abc", X_A="1").read()
        seen, = self.fake.received
        self.assertEqual((seen.method, seen.path, seen.body), ("POST", "/api/show?x", b"abc"))
        self.assertIn(("X_A", "1"), seen.headers)

    def test_fake_ollama_sends_configured_replies_in_order(self):
        self.fake.replies["/api/tags"] = [Reply.json(503, {"error": "busy"}), Reply.json(200, {})]
        self.assertEqual([self.ask("GET", "/api/tags").status for _ in range(3)], [503, 200, 200])

    def test_fake_ollama_records_client_disconnects(self):
        self.fake.replies["/api/tags"] = Reply.stream(b"x", until_hangup)
        with Client(self.fake.server_address) as client:
            client.send(request("GET", "/api/tags"))
            client.read(client.head(), until=b"x")
        self.assertEqual(self.fake.hangups.get(timeout=GUARD), "/api/tags")

    def test_fake_ollama_can_be_restarted_on_its_port(self):
        port = self.fake.server_address[1]
        self.fake.shutdown()
        self.fake.server_close()
        self.fake = self.enter(running(FakeOllama(port)))
        self.assertEqual(self.ask("GET", "/api/version").read(), b'{"version":"0.9.3"}')

    def test_fake_ollama_records_incomplete_request_bodies(self):
        for framing, sent in ((("Content-Length", "5"), b"abc"), (("Transfer-Encoding", "chunked"), b"3\r\nabc\r\n")):
            with self.subTest(framing):
                self.fake.broken.clear()
                with Client(self.fake.server_address) as client:
                    client.send(request("POST", "/api/chat", None, [framing]) + sent)
                    eventually(lambda: self.fake.arrived >= 3)
                self.assertEqual(eventually(lambda: self.fake.broken)[0].body, b"abc")
        self.assertEqual(self.fake.received, [])

    def test_fake_ollama_can_be_started_from_the_command_line(self):
        process = self.enter(subprocess.Popen([sys.executable, TESTS, "--fake-ollama", "0"], stdout=subprocess.PIPE))
        try:
            url = re.search(r"http://\S+", process.stdout.readline().decode()).group()
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url + "/api/version", timeout=GUARD) as reply:
                self.assertEqual(json.load(reply), {"version": "0.9.3"})
        finally:
            process.terminate()

# == The benchmark ============================================================

BENCH_ROUNDS, BENCH_SECONDS = 3, 0.7
BENCH_LINES = 64
TAGS = compact({"models": [dict(MODEL, name=f"tiny-{number}:latest", modified_at=CREATED) for number in range(6)]})
GENERATED = compact({"model": "tiny", "created_at": CREATED, "response": "".join(WORDS) * 12, "done": True, "context": list(range(2000, 2040)),
                     **COUNTS})
STREAM_LINE = compact({"model": "tiny", "created_at": CREATED, "response": " sky", "done": False}) + b"\n"
LAST_LINE = compact({"model": "tiny", "created_at": CREATED, "response": "", "done": True, **COUNTS}) + b"\n"


def lean_upstream():
    """Serve as an upstream of minimal cost that hardly parses requests; the prompt of a stream is its pause between lines, in milliseconds."""
    def plain(body):
        return b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (JSON.encode(), len(body), body)

    def serve(connection):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream, lines = connection.makefile("rb"), [chunked(STREAM_LINE)[:-5]] * (BENCH_LINES - 1) + [chunked(LAST_LINE)]
        with contextlib.suppress(OSError), connection:
            for first in iter(stream.readline, b""):
                length = sum(int(line.split()[1]) for line in iter(stream.readline, b"\r\n") if line.lower().startswith(b"content-length:"))
                options = json.loads(stream.read(length) or b"{}") if length < 4096 else {"stream": False}
                for _ in range(length // 65536 + 1 if length >= 4096 else 0):   # a large body is neither kept nor parsed
                    length -= len(stream.read(min(length, 65536)))
                if first.startswith(b"GET "):
                    connection.sendall(answers[0])
                elif not options.get("stream", True):
                    connection.sendall(answers[1])
                else:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n")
                    for line in lines[-options.get("lines", BENCH_LINES):]:
                        time.sleep(float(options["prompt"]) / 1000) if options["prompt"] else None
                        connection.sendall(line)

    answers = plain(TAGS), plain(GENERATED)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


class BenchmarkClient(threading.Thread):
    """A connection that repeats one request until the time is up, and keeps the measured times in lists."""

    def __init__(self, port, data, until, streams):
        super().__init__(daemon=True)
        self.data, self.until, self.streams = data, until, streams
        self.took, self.first, self.gaps, self.lines = [], [], [], 0
        self.connection = socket.create_connection(("127.0.0.1", port), GUARD)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run(self):
        with self.connection:
            while time.perf_counter() < self.until or not self.took:
                began = time.perf_counter()
                self.connection.sendall(self.data)
                self.read_stream(began) if self.streams else self.read_answer()
                self.took.append(time.perf_counter() - began)

    def read_answer(self):
        data = self.receive(b"")
        while b"\r\n\r\n" not in data:
            data = self.receive(data)
        end = data.index(b"\r\n\r\n") + 4
        left = end + int(re.search(rb"(?i)content-length: (\d+)", data)[1]) - len(data)
        while left > 0:
            left -= len(self.receive(b""))

    def read_stream(self, began):
        data, before = b"", None
        while not data.endswith(b"0\r\n\r\n"):
            data = data[-5:]
            piece = self.receive(b"")
            now, lines = time.perf_counter(), piece.count(b'"done":')
            if lines and before is None:
                self.first.append(now - began)
            elif lines:
                self.gaps.append(now - before)
            before = now if lines else before
            self.lines += lines
            data += piece

    def receive(self, data):
        piece = self.connection.recv(65536)
        if not piece:
            raise ConnectionError("the response ended early")
        return data + piece


def chat_of(size):
    """Return a chat request like a coding agent's, of about this many bytes: messages that contain code."""
    code = "def hello(name):\n    return f\"Hello, {name}!\"\n\n\n" * 40
    message = compact({"role": "user", "content": code})
    return b'{"model":"tiny","stream":false,"messages":[' + b",".join([message] * (size // len(message) + 1)) + b"]}"


def long_value(start, piece, end, size=90 * 1024 * 1024):
    return b'{"model":"tiny","stream":false,"x":' + start + piece * (size // len(piece)) + end + b"}"


def bench_request(token, body):
    """Return the bytes of a request; without a body, of one for the list of models."""
    headers = [*bearer(token), ("User-Agent", "ollama-python/0.6.3"), ("Accept", "*/*")]
    return request("GET", "/api/tags", None, headers) if body is None else request("POST", "/api/generate", body, headers)


class Benchmark:
    """Send requests to `lean_upstream` directly and through the gateway, in turns; on a shared machine only ratios are meaningful."""

    BODIES = {"tags": None, "generate": {"model": "tiny", "prompt": "", "stream": False}, "stream": {"model": "tiny", "prompt": ""},
              "paced": {"model": "tiny", "prompt": "10"}, "idle": {"model": "tiny", "prompt": "500", "lines": 5}}
    SCRIPT, MODULE = (GATEWAY,), ("-m", "ollama_gateway")

    def __init__(self, folder):
        self.rows = []
        self.upstream = subprocess.Popen([sys.executable, TESTS, "--bench-upstream"], stdout=subprocess.PIPE)
        self.direct = int(self.upstream.stdout.readline())
        self.db = os.path.join(folder, "tokens.db")
        with contextlib.closing(gateway.TokenStore(self.db, create=True)) as store:
            self.token = store.create("ada", "laptop")[1]
        self.gateway, self.through = None, None

    def start(self, program):
        """Start the gateway again, and return how many seconds it took until it answered."""
        if self.gateway:
            self.gateway.kill()
            self.gateway.wait()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.through = probe.getsockname()[1]
        cache = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        began = time.perf_counter()
        self.gateway = subprocess.Popen([sys.executable, *program, "serve", "--port", str(self.through), "--db", self.db, "--ollama-url",
                                         f"http://127.0.0.1:{self.direct}", "--log-file", self.db + ".log"], stderr=subprocess.DEVNULL,
                                        cwd=os.path.dirname(GATEWAY), env={**cache, "PYTHONPYCACHEPREFIX": self.db + ".cache"})
        while True:
            with contextlib.suppress(OSError), Client(("127.0.0.1", self.through)) as client:
                client.ask("GET", "/")
                return time.perf_counter() - began
            if self.gateway.poll() is not None:     # another connection occupied its port
                return self.start(program)
            time.sleep(0.002)

    def stop(self):
        for process in self.gateway, self.upstream:
            process.kill()
            process.wait()
        self.upstream.stdout.close()

    def measure(self, port, kind, connections, seconds=BENCH_SECONDS):
        """Send requests over this many connections at once; return responses and lines per second, and the measured times."""
        data = bench_request(self.token, kind if isinstance(kind, bytes) else self.BODIES[kind])
        began, cpu = time.perf_counter(), self.cpu()
        clients = [BenchmarkClient(port, data, began + seconds, kind in ("stream", "paced", "idle")) for _ in range(connections)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(3 * GUARD)
        seconds = time.perf_counter() - began
        took, first, gaps = (sorted(itertools.chain.from_iterable(getattr(client, name) for client in clients)) for name in ("took", "first", "gaps"))
        lines = sum(client.lines for client in clients)
        return {"answers": len(took) / seconds, "lines": lines / seconds, "p50": median(took), "first": median(first),
                "gap": gaps[int(len(gaps) * 0.99)] if gaps else 0.0, "failed": sum(not client.took for client in clients),
                "cpu": (self.cpu() - cpu) / (lines or len(took) or 1)}

    def cpu(self):
        """Return the CPU seconds that the gateway used so far; 0 where there is no /proc."""
        try:
            with open(f"/proc/{self.gateway.pid}/stat", encoding="ascii") as stat:
                return sum(map(int, stat.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
        except OSError:
            return 0.0

    def memory(self):
        try:
            with open(f"/proc/{self.gateway.pid}/statm", encoding="ascii") as statm:
                return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        except OSError:
            return 0.0

    def compare(self, kind, connections, seconds=BENCH_SECONDS):
        """Measure both ways in turns; return the medians of every value, direct and through the gateway."""
        rounds = [[self.measure(port, kind, connections, seconds) for port in (self.direct, self.through)] for _ in range(BENCH_ROUNDS)]
        return [{name: median(sorted(one[which][name] for one in rounds)) for name in rounds[0][0]} for which in (0, 1)]

    def row(self, what, direct, through, ratio=None, difference=False):
        self.rows.append({"what": what, "direct": direct, "gateway": through, "ratio": ratio, "difference": difference})

    def rates(self, what, kind, connections, figure="answers"):
        direct, through = self.compare(kind, connections)
        self.row(f"{what}, {gateway.plural(connections, 'connection')}: {figure}/s", direct[figure], through[figure],
                 through[figure] / direct[figure])
        return direct, through

    def bodies(self):
        """Measure the cost of bodies of real sizes as multiples of json.loads, and how long a large one delays a concurrent stream."""
        small = self.measure(self.through, "generate", 1)["cpu"]
        for name, size in ("64 KiB", 64 * 1024), ("256 KiB", 256 * 1024), ("10 MiB", 10 * 1024 * 1024):
            body = chat_of(size)
            loads = timed(lambda: [json.loads(body) for _ in range(2 ** 24 // size)], time.process_time) / (2 ** 24 // size)
            more = self.measure(self.through, body, 1)["cpu"] - small
            self.row(f"a chat of {name}: CPU beyond a small one's, ms, to json.loads", loads * 1e3, more * 1e3, more / loads)
        for name, body in (("base64", long_value(b'"', b"QUJD", b'"')), ("escaped code", long_value(b'"', b'print(\\"hi\\")\\n', b'"')),
                           ("brackets", long_value(b"[", b"[],", b"[]]"))):
            gaps = [self.longest_gap(port, body) for port in (self.direct, self.through)]
            self.row(f"longest gap of a stream beside 90 MiB of {name}, ms", *(gap * 1e3 for gap in gaps), difference=True)

    def longest_gap(self, port, body):
        """Send a body during a stream of one line every 10 ms, and return the longest time between two lines."""
        stream = BenchmarkClient(port, bench_request(self.token, self.BODIES["paced"]), float("inf"), True)
        stream.start()
        BenchmarkClient(port, bench_request(self.token, body), 0, False).run()
        stream.until = 0
        stream.join(GUARD)
        return max(stream.gaps)

    def run(self):
        """Measure everything; this takes about a minute."""
        imports = [sys.executable, "-c", "import http.server, urllib.request, sqlite3, argparse"]
        self.start(self.MODULE)     # compiles it, so that the measured starts do not
        starts = [(timed(lambda: subprocess.run(imports, check=True)), self.start(self.MODULE), self.start(self.SCRIPT)) for _ in range(5)]
        direct, through = self.rates("small answers", "tags", 1)
        self.row("  median time, ms", direct["p50"] * 1e3, through["p50"] * 1e3, difference=True)
        direct, through = self.rates("small answers", "tags", 8)
        self.row("  CPU of the gateway an answer, us", None, through["cpu"] * 1e6)
        self.rates("whole generations", "generate", 8)
        direct, through = self.rates("streams as fast as they come", "stream", 8, "lines")
        self.row("  CPU of the gateway a line, us", None, through["cpu"] * 1e6)
        direct, through = self.compare("paced", 16)
        self.row("16 streams, a line each 10 ms: first line, median, ms", direct["first"] * 1e3, through["first"] * 1e3, difference=True)
        self.row("  time between two lines, 99 of 100 below, ms", direct["gap"] * 1e3, through["gap"] * 1e3, difference=True)
        self.bodies()
        self.start(self.SCRIPT)
        idle = self.measure(self.through, "idle", 200, 0)
        self.row("200 streams, two lines a second each: dropped", None, idle["failed"])
        self.row("  memory of the gateway, MB", None, self.memory())
        self.start(self.MODULE)
        self.measure(self.through, "idle", 200, 0)
        self.row("  of python3 -m ollama_gateway, MB", None, self.memory())
        bare, module, script = (median(sorted(times)) for times in zip(*starts))
        self.row("start to the first answer, ms, to importing the library", bare * 1e3, script * 1e3, script / bare)
        self.row("  of python3 -m ollama_gateway, ms", bare * 1e3, module * 1e3, module / bare)
        return self.rows


def median(values):
    return values[len(values) // 2] if values else 0.0


def timed(action, clock=time.perf_counter):
    began = clock()
    action()
    return clock() - began


def figure(value):
    return "" if value is None else f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"


def bench(as_json):
    """Run the benchmark and print its results."""
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(folder)
        try:
            rows = benchmark.run()
        finally:
            benchmark.stop()
    if as_json:
        return print(json.dumps(rows, indent=2))
    print(f"{'':61}{'direct':>9}{'gateway':>9}{'':>7}")
    for row in rows:
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else f"{row['gateway'] - row['direct']:+.2f}" if row["difference"] else ""
        print(f"{row['what']:61}{figure(row['direct']):>9}{figure(row['gateway']):>9}{ratio:>7}")


class BenchmarkItself(Case):
    """A benchmark that counts more than it requested would report too good results."""

    def test_benchmark_counts_whole_responses_directly_and_through_the_gateway(self):
        benchmark = Benchmark(self.folder)
        self.addCleanup(benchmark.stop)
        for program in Benchmark.MODULE, Benchmark.SCRIPT:
            self.assertGreater(benchmark.start(program), 0)
        for kind, lines in (("tags", 0), ("generate", 0), ("stream", BENCH_LINES), ("idle", 5)):
            benchmark.BODIES = {**Benchmark.BODIES, "idle": {"model": "tiny", "prompt": "1", "lines": 5}}
            for port in benchmark.direct, benchmark.through:
                with self.subTest(kind, direct=port == benchmark.direct):
                    result = benchmark.measure(port, kind, 2, seconds=0)
                    self.assertEqual((result["failed"], round(result["lines"] / result["answers"])), (0, lines))
        for port in benchmark.direct, benchmark.through:
            self.assertEqual(benchmark.measure(port, chat_of(100_000), 1, seconds=0)["failed"], 0)
        with contextlib.closing(gateway.TokenStore(self.db)) as store:
            eventually(lambda: [row["requests"] for row in store.usage("user", 0)] == [7], "storing of the usage")
            self.assertEqual(store.usage("user", 0)[0]["completion_tokens"], 7 * len(WORDS))

# == A real Ollama ============================================================

OLLAMA = os.environ.get("OLLAMA_TEST_URL", "").rstrip("/")
SAME = {"temperature": 0, "seed": 1, "num_predict": 8}
VOLATILE = re.compile(rb'"(created_at|expires_at|\w*_duration|id|created)": ?("[^"]*"|\d+)')


@unittest.skipUnless(OLLAMA, "needs a real Ollama at OLLAMA_TEST_URL")
class LiveCase(GatewayCase):
    """Responses through the gateway are identical to those of Ollama itself."""

    def setUp(self):
        super().setUp()
        self.real = self.serve(ollama_url=OLLAMA, path_tokens="1")
        host, _, port = OLLAMA.partition("://")[2].partition(":")
        self.direct = (host, int(port))

    def through(self, method, path, body=None, token=None):
        return self.ask(method, path, body, token=token, server=self.real)

    def directly(self, method, path, body=None):
        with Client(self.direct) as client:
            return client.ask(method, path, body, host="localhost")

    def assert_same(self, method, path, body=None):
        """Send a request both ways; except for times and ids, both responses must be identical."""
        ours, theirs = self.through(method, path, body), self.directly(method, path, body)
        self.assertEqual((ours.status, ours.headers.get("content-type"), ours.ended), (theirs.status, theirs.headers.get("content-type"), "clean"))
        self.assertEqual(VOLATILE.sub(b"", ours.body), VOLATILE.sub(b"", theirs.body))
        return ours


class LiveInference(LiveCase):

    def test_generate_and_chat_responses_are_identical(self):
        for stream in (True, False):
            for path, rest in (("/api/generate", {"prompt": "hello"}), ("/api/chat", {"messages": CHAT["messages"]})):
                with self.subTest(path, stream=stream):
                    answer = self.assert_same("POST", path, {"model": "tiny", "stream": stream, "options": SAME, **rest})
                    self.assertEqual(json.loads(answer.body.splitlines()[-1])["eval_count"], 8)

    def test_openai_responses_are_identical(self):
        for stream in (True, False):
            for path, rest in (("/v1/chat/completions", {"messages": CHAT["messages"]}), ("/v1/completions", {"prompt": "hello"})):
                with self.subTest(path, stream=stream):
                    answer = self.assert_same("POST", path, {"model": "tiny", "stream": stream, "temperature": 0, "seed": 1, "max_tokens": 8,
                                                             **rest})
                    self.assertEqual(answer.body.endswith(b"data: [DONE]\n\n"), stream)

    def test_embedding_responses_are_identical(self):
        for path, rest in (("/api/embed", {"input": ["hello", "x"]}), ("/api/embeddings", {"prompt": "hello"}),
                           ("/v1/embeddings", {"input": "hello"})):
            with self.subTest(path):
                self.assertEqual(self.assert_same("POST", path, {"model": "tiny-embed", **rest}).status, 200)

    def test_error_responses_are_identical(self):
        for path, body in (("/api/chat", {"model": "nope", "messages": []}), ("/api/generate", b""), ("/api/generate", b'{"prompt":"x"}'),
                           ("/v1/chat/completions", {"model": "nope", "messages": CHAT["messages"]}),
                           ("/api/chat", {"model": "tiny", "messages": [{"role": "user", "content": 5}]})):
            with self.subTest(path, body=body):
                self.assertGreaterEqual(self.assert_same("POST", path, body).status, 400)

    def test_path_token_gives_access_to_ollama(self):
        answer = self.ask("POST", f"/t/{self.token}/api/generate", {"model": "tiny", "prompt": "hello", "options": SAME}, token="",
                          server=self.real)
        self.assertEqual(json.loads(answer.body.splitlines()[-1])["done"], True)

    @unittest.skipUnless(os.environ.get("OLLAMA_TEST_LOG"), "needs the server's log at OLLAMA_TEST_LOG")
    def test_cancelled_request_ends_in_the_log_of_ollama(self):
        for stream, path in ((True, "/api/generate"), (False, "/api/generate"), (True, "/v1/completions")):
            with self.subTest(path, stream=stream):
                self.unload()
                client = self.begin("POST", path, {"model": "long", "prompt": "hello", "stream": stream, "max_tokens": 20000}, server=self.real)
                eventually(self.loaded, "loading of the model")
                if stream:
                    client.read(client.head(), until=b"\n")
                before = self.finished(path)
                client.close()
                eventually(lambda path=path, before=before: self.finished(path) > before, "the end of the cancelled request")
                self.unload()   # one of a hundred cancellations leaves the runner of 0.9.3 stuck, even without a gateway
                self.assertStatus(self.through("POST", "/api/generate", {"model": "tiny", "prompt": "hello", "stream": False, "options": SAME}),
                                  200)

    def unload(self):
        self.directly("POST", "/api/generate", {"model": "tiny", "keep_alive": 0})
        eventually(lambda: not self.loaded(), "unloading of the model")

    def loaded(self):
        return [row for row in self.directly("GET", "/api/ps").json()["models"] if row["details"]["family"] == "llama"]

    def finished(self, path):
        with open(os.environ["OLLAMA_TEST_LOG"], encoding="utf-8", errors="replace") as log:
            return sum("[GIN]" in line and f'"{path}"' in line for line in log)


class LiveUsage(LiveCase):
    """Recorded usage equals what Ollama itself counts."""

    def counted(self, path, body, stream):
        """Send a request through the gateway, and return the usage that Ollama reports in its response."""
        body = {**body, "stream": stream, **({"stream_options": {"include_usage": True}} if stream and path.startswith("/v1/") else {})}
        lines = [line[line.find(b"{"):] for line in self.through("POST", path, body, token=self.admin).body.splitlines() if b"{" in line]
        last = json.loads(lines[-1])
        usage = last.get("usage") or last
        return (usage.get("prompt_eval_count", usage.get("prompt_tokens", 0)), usage.get("eval_count", usage.get("completion_tokens", 0)))

    def test_usage_of_every_api_dialect_matches_the_counts_of_ollama(self):
        talk = {"model": "tiny", "options": SAME, "temperature": 0, "seed": 1, "max_tokens": 8}
        for path, body, streams in (
                ("/api/generate", {**talk, "prompt": "hello"}, (True, False)), ("/api/chat", {**talk, "messages": CHAT["messages"]}, (True, False)),
                ("/v1/chat/completions", {**talk, "messages": CHAT["messages"]}, (True, False)),
                ("/v1/completions", {**talk, "prompt": "hello"}, (True, False)),
                ("/api/embed", {"model": "tiny-embed", "input": ["hello", "a b"]}, (False,)),
                ("/v1/embeddings", {"model": "tiny-embed", "input": "hello"}, (False,))):
            for stream in streams:
                with self.subTest(path, stream=stream):
                    cost = self.counted(path, body, stream)
                    answer = self.through("POST", path, {**body, "stream": stream})
                    self.assertStatus(answer, 200)
                    fields = self.logged(lambda fields, answer=answer: fields["id"] == answer.headers["x-request-id"])
                    self.assertEqual((int(fields["prompt"]), int(fields["completion"])), cost)
                    self.assertGreater(cost[0], 0)

    def test_model_names_that_ollama_accepts_are_recognized(self):
        for name in ("tiny", "TINY:Latest", "library/tiny", "registry.ollama.ai/library/tiny:latest", "x://registry.ollama.ai/library/tiny",
                     " tiny", "tiny:", "/tiny", "library//tiny", "registry.ollama.ai:443/library/tiny", "tiny@sha256:1", "tiny\0", "tiny:a:b",
                     "ada/tiny"):
            with self.subTest(name):
                known = self.directly("POST", "/api/show", {"model": name}).status == 200
                self.assertLessEqual(known, gateway.model_allowed(name, "tiny"))
                self.assertEqual(known, self.through("POST", "/api/show", {"model": name}).status == 200)

    def test_ollama_uses_the_last_of_two_equal_keys_in_any_case(self):
        """The gateway refuses such bodies, and relies on this rule when it requests the usage of a stream."""
        self.assertEqual(self.directly("POST", "/api/show", b'{"model":"nope","MODEL":"tiny"}').status, 200)
        stream = b'{"model":"tiny","prompt":"x","max_tokens":1,"stream":true,%s"stream_options":{"include_usage":true}}'
        for before in (b"", b'"stream_options":null,', b'"Stream_options":{"include_usage":false},'):
            self.assertIn(b'"total_tokens":', self.directly("POST", "/v1/completions", stream % before).body)

    def test_token_with_a_model_list_sees_only_its_models(self):
        token = self.store.create("eve", "phone", models="tiny,tiny-e*")[1]
        for path, key, name in (("/api/tags", "models", "name"), ("/v1/models", "data", "id")):
            self.assertEqual(sorted(row[name] for row in self.through("GET", path, token=token).json()[key]), ["tiny-embed:latest", "tiny:latest"])
        self.assertStatus(self.through("POST", "/api/generate", {"model": "long", "prompt": "x"}, token=token), 403)


class LiveModels(LiveCase):

    def test_model_lists_are_identical(self):
        for path in ("/api/version", "/v1/models/tiny"):
            with self.subTest(path):
                self.assertEqual(self.assert_same("GET", path).status, 200)
        for path, key in (("/api/tags", "models"), ("/v1/models", "data")):   # models modified in the same second have no fixed order
            with self.subTest(path):
                ours, theirs = (sorted(answer.json()[key], key=compact) for answer in (self.through("GET", path), self.directly("GET", path)))
                self.assertEqual(ours, theirs)

    def test_show_and_ps_return_the_models(self):
        self.assertIn("completion", self.through("POST", "/api/show", {"model": "tiny"}).json()["capabilities"])
        self.through("POST", "/api/generate", {"model": "tiny", "prompt": "x", "stream": False, "options": SAME})
        self.assertTrue(self.through("GET", "/api/ps").json()["models"])

    def test_administrator_creates_copies_and_deletes_models(self):
        def manage(method, path, body):
            self.assertRefused(self.through(method, path, body), 403)
            answer = self.through(method, path, body, token=self.admin)
            self.assertEqual((answer.status, answer.ended), (200, "clean"), answer)
            return answer.body
        self.assertIn(b'{"status":"success"}', manage("POST", "/api/create", {"model": "mine", "from": "tiny", "system": "You are x."}))
        manage("POST", "/api/copy", {"source": "mine", "destination": "mine-too"})
        for model in ("mine", "mine-too"):
            self.assertIn(model + ":latest", [row["name"] for row in self.through("GET", "/api/tags").json()["models"]])
            manage("DELETE", "/api/delete", {"model": model})
        self.assertNotIn("mine", self.through("GET", "/api/tags").body.decode())

    def test_uploaded_blob_is_found(self):
        blob = os.urandom(3_000_000)
        path = "/api/blobs/sha256:" + hashlib.sha256(blob).hexdigest()
        self.assertStatus(self.through("HEAD", path, token=self.admin), 404)
        client = self.client(self.real)
        client.send(request("POST", path, None, [*bearer(self.admin), ("Transfer-Encoding", "chunked")]),
                    chunked(blob[:1_000_000], blob[1_000_000:]))
        self.assertStatus(client.answer(), 201)
        self.assertStatus(self.through("HEAD", path, token=self.admin), 200)

# == Parallel test runner =====================================================


def run_classes(names):
    """Run the tests of these classes; return how many ran, how many were skipped, and a report if one failed."""
    report = io.StringIO()
    result = unittest.TextTestRunner(report).run(unittest.defaultTestLoader.loadTestsFromNames(names, sys.modules[__name__]))
    return result.testsRun, len(result.skipped), "" if result.wasSuccessful() else report.getvalue()


def run_all():
    """Run all classes in parallel, as most tests spend their time waiting; report as unittest does and return the exit status."""
    names = [name for name, value in globals().items() if isinstance(value, type) and issubclass(value, unittest.TestCase)
             and unittest.defaultTestLoader.getTestCaseNames(value)]
    single = [[name] for name in names if not name.startswith("Live")]
    single.sort(key=lambda job: job != ["WebPagesInBrowser"])      # the slowest class first
    jobs = [*single[:1], [name for name in names if name.startswith("Live")], *single[1:]]    # tests of the real Ollama run one after the other
    began, ran, skipped, failed = time.perf_counter(), 0, 0, 0
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count() + 2) as pool:
        for done in concurrent.futures.as_completed([pool.submit(run_classes, job) for job in jobs]):
            tests, left_out, report = done.result()
            ran, skipped, failed = ran + tests, skipped + left_out, failed + bool(report)
            print(report or ".", end="", file=sys.stderr, flush=True)
    found = [f"classes with failures={failed}"] * bool(failed) + [f"skipped={skipped}"] * bool(skipped)
    print(f"\n{'-' * 70}\nRan {ran} tests in {time.perf_counter() - began:.3f}s\n\n{'FAILED' if failed else 'OK'}"
          + (f" ({', '.join(found)})" if found else ""), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fake-ollama"]:
        serve_fake_ollama(*map(int, sys.argv[2:3]))
    elif sys.argv[1:2] == ["--bench-upstream"]:
        lean_upstream()
    elif sys.argv[1:2] == ["--bench"]:
        bench("--json" in sys.argv[2:])
    elif not sys.argv[1:]:
        sys.exit(run_all())
    else:
        unittest.main()
