#!/usr/bin/env python3
"""Authenticating reverse proxy for Ollama: a token for each person and device, limits and usage, in one file.

    python3 ollama_gateway.py token create ada laptop
    python3 ollama_gateway.py serve

It works with every Ollama, OpenAI and Anthropic client, streaming. Requests without a token are refused.

The sections, in order (`grep -n '^# =='` lists them):

    Constants and errors  fixed numbers and names, each with its reason; the exceptions
    Settings              one table of options, read from flags, the environment and .env
    Model                 types that the other sections share: tokens and their limits, routes, usage
    Connection            a buffered, non-blocking socket with deadlines
    HTTP                  HTTP/1.1 on bytes, strict in both directions: heads, framing, chunks
    Request body          buffered and streamed bodies; the model that a body names
    Store                 the database of tokens and usage: every line of SQL
    Server                the listener, its connections, requests in, responses out
    Routing and access    the table of routes, who may use them, with which models
    Authentication        the client's address and the token of a request
    Limits and usage      rates, budgets, the fair queue, the usage ledger
    Backends              connections to Ollama, requests and responses, its health
    Relay                 the response from Ollama to the client, and the usage that it reports
    Logging and metrics   log lines and metrics, written in the background
    Pipeline              the stages of a request, in one function
    OpenAPI               the API described for programs
    Web pages             the documentation and the admin page: style, scripts, HTML
    Own endpoints         the gateway's own JSON endpoints and pages
    Assembly              builds the server from the settings
    Commands              the commands of the command line
    Menu                  the same commands as an interactive menu
    Doctor                checks of the configuration, Ollama and the network
    Main                  the grammar of the command line, and the exit statuses

Each name stands above its users, so most calls go up. The calls of one request, indented by depth:

    GatewayServer.finish_request          Server: the thread of a connection
      GatewayServer._serve_request        Server: waits for the head
        Gateway.serve                     Pipeline
          Router.match                    Routing and access
          Authenticator.identify          Authentication
          Slot.__enter__                  Limits and usage
          ClientStream.read_whole_body    Server
          inspect_body, authorize_model   Routing and access
          Slot.wait                       Limits and usage
          Upstream.send                   Backends
          relay                           Relay: each piece through a UsageReader; UsageStripper alone holds bytes back
          Journal.write                   Logging and metrics: the rest happens in the background
            UsageLedger.finish, store     Limits and usage: counts what TokenStore.usage reports on every page
            log_line, Metrics.observe     Logging and metrics

Any stage can raise Refusal. It becomes the error response or, if the response has started, an error event at its end.
"""
from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import csv
import email.utils
import errno
import fnmatch
import functools
import hashlib
import html
import http
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import mmap
import operator
import os
import queue
import re
import secrets
import select
import selectors
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import sys
import threading
import time
import types
import urllib.parse
import urllib.request
import weakref
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from datetime import datetime, timedelta
from typing import Callable, Mapping, NamedTuple, Optional

LOG = logging.getLogger(__name__)  # only `serve` adds handlers

# == Constants and errors =====================================================

VERSION = "1.0.0"
KIB, MIB = 1024, 1024 * 1024
MINUTE, HOUR, DAY = 60, 3600, 86400

SECRET_PREFIX = "ogw_"      # identifies a leaked string, for people and for secret scanners
HINT_LENGTH = 8             # characters of a secret that are stored: enough to recognise it, too few to guess it
NAME_LENGTH = 64            # fits a line of `token list` and of the log

LINE_BYTES = 8 * KIB        # largest request line; RFC 9112 3 asks for at least 8000 bytes
HEAD_BYTES = 32 * KIB       # largest head; SDKs send less than 2 KiB, cookies of a shared domain up to 16
HEAD_CACHE_SIZE = 256       # parsed heads that are kept, of requests and of responses
CACHED_HEAD_BYTES = 1 * KIB     # largest head that is kept; SDKs send smaller ones
MODEL_CACHE_SIZE = 256      # models that are kept, of name variants and of token ratios
FIELD_COUNT = 100           # most fields of a head; the limit of http.client too
TRAILER_BYTES = 4 * KIB     # largest trailers; no known client sends any
SPOOL_BYTES = 1 * MIB       # a larger request body is kept in a temporary file
BODY_MEMORY = 64 * MIB      # memory for all request bodies together; beyond, they are kept in files
FILE_PIECE_BYTES = 64 * KIB     # read at once from a body in a file, and sent at once
RECEIVE_BYTES = 16 * KIB    # read at once from a socket: 64 KiB would leave 3 MB in the heap after a burst
PIPELINED_BYTES = 64 * KIB  # read ahead of the next request while one is served
DRAIN_BYTES, DRAIN_SECONDS = 16 * MIB, 3    # read from a refused client: closing sooner could reset the response
DECODED_BYTES = 256 * KIB   # a JSON body up to this size is decoded in C, a larger one is scanned in windows
WINDOW_BYTES = 64 * KIB     # one step of a scan: no other thread can run for about 0.2 ms
JSON_PARTS = 2_000_000      # most strings and brackets that a scan reads: about 0.1 s of CPU
VALUE_BYTES = 4 * KIB       # longest value that is read; a model name in escapes may take 3.5 KiB
TOP_LEVEL_BYTES = 64 * KIB  # a large body's keys and short values together
FORM_PARTS = 100            # most parts of a form that is searched for its model
PAGE_BODY_BYTES, PAGE_BODY_SECONDS = 16 * KIB, 15   # for the whole body of a request to an own page

BODY_SECONDS = 60           # longest silence within a request body
TOKEN_CHECK_SECONDS = 1     # interval at which the token of a streamed request body is checked again
SEND_SECONDS = 60           # for a piece of at most 64 KiB to a slow client
HEALTH_SECONDS = 5          # between two probes: with PROBE_SECONDS, the state in /health is at most 10 s old
PROBE_SECONDS = 2           # for all requests of a health probe, from the name look-up to the last byte
PROBE_BYTES = 1 * MIB       # largest response to a request of the gateway itself; a list of 2,500 models
LIST_BYTES = 16 * MIB       # largest list of models that is filtered for a token
LINE_LIMIT = 8 * MIB        # longest line of a stream that is read; the limit of Ollama's own client too
WHOLE_BYTES = 256 * KIB     # largest response or line that is decoded as a whole to find its token counts
ENDING_BYTES = 1 * KIB      # the end of a response, where Ollama writes the counts
LEARNING_BYTES = 256 * KIB  # largest request body from which the bytes of text in a token are learnt
MAX_TOKENS = 10 ** 9        # most tokens that are believed of one request
GATHER_SECONDS = 0.01       # finished requests gather before they are recorded: requests wait for the GIL meanwhile
LOG_SECONDS = 0.05          # log lines gather before they are written: each wake-up of a thread delays a request
STORE_SECONDS = 0.5         # interval at which usage and the tokens' last uses are stored
BUDGET_SECONDS = 0.5        # for which a sum of stored tokens is used: other gateways may add to it
BUSY_SECONDS = 20           # for which a command waits for other writers of the database
LEDGER_BUSY_SECONDS = 0.5   # for which the background writer waits for other writers: log lines wait meanwhile
LOG_QUEUE = 1 * MIB         # characters of log lines that wait for a slow log, about 5,000 requests
LOG_FILE_BYTES, LOG_FILES = 10_000_000, 5   # size at which a log file is rotated, and number of old ones kept
FLUSH_SECONDS = 2           # for which a stop waits for a slow log
ABORT_SECONDS = 2           # grace period of a stop after running requests are aborted
STOP_CHECK_SECONDS = 0.2    # a second signal aborts running requests within this time
REJECT_SECONDS = 2          # for which a rejected connection is kept, so that its client can read the response
FAILED_DELAY = 1.0          # longest delay of the response to a failed credential
RETRY_SECONDS = 5           # Retry-After on 429 and 503 where no better time is known

BACKLOG = 1024              # connections that arrive at once; the system's own maximum applies
AFFINITY_SECONDS = 5        # interval at which the least used core is chosen
MAX_REJECTING = 64          # rejected connections that are kept at once
CONNECTION_DESCRIPTORS = 4  # see connections_that_fit
SPARE_DESCRIPTORS = 64      # for the database, logs, spooled bodies and connections that are being closed
FREE_FAILURES = 5           # failed credentials of an address without a delay: people mistype
MAX_FAILURES = 30           # failed credentials of an address after which it gets 429 at once
LEAK_SECONDS = 3            # after which one failed credential is forgiven
FAILING_ADDRESSES = 4096    # addresses with failures that are kept; the one that failed least recently is forgotten
DELAYED_AT_ONCE = 8         # failed requests that are delayed, each in its thread; others get 429 at once
MAX_SERIES = 5000           # label sets of one metric; further ones are counted as "other"
POOL_SIZE = 128             # idle upstream connections that are kept; Ollama has no limit
IDLE_SECONDS = 60           # an upstream connection idle for longer is not reused: NAT devices forget it

HOP_BY_HOP = frozenset((    # RFC 9110 7.6.1: fields about one connection only
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade"))
FRAMING = frozenset(("host", "content-length", "transfer-encoding", "expect"))  # fields that may not be repeated
FORBIDDEN_TRAILERS = HOP_BY_HOP | FRAMING | {  # RFC 9110 6.5.1
    "authorization", "x-api-key", "cookie", "content-type", "content-encoding", "content-range", "cache-control"}
FORWARDED = ("accept", "content-type", "content-encoding", "user-agent")  # others could leak, or be misread
FORWARDED_PREFIXES = ("anthropic-", "openai-")
STREAM_TYPES = ("application/x-ndjson", "text/event-stream")


class UsageError(Exception):
    """A wrong flag, setting or value: exit status 2, or a refusal where it came over HTTP."""


class Failure(Exception):
    """An action that failed: exit status 1 or, where it was requested over HTTP, the refusal of its code."""

    def __init__(self, message, code="unstored"):
        super().__init__(message)
        self.code = code


Reason = NamedTuple("Reason", [("status", int), ("meaning", str)])     # of a refusal
REFUSALS = {
    "malformed": Reason(400, "the request is malformed, or has two credentials"),
    "unauthorized": Reason(401, "no token, or one that is unknown, expired or deleted"),
    "forbidden": Reason(403, "the token does not allow this"),
    "unknown_route": Reason(404, "the gateway has no such path"),
    "no_such_token": Reason(404, "there is no such token"),
    "wrong_method": Reason(405, "the path has other methods: see Allow"),
    "too_slow": Reason(408, "the request did not arrive in time"),
    "token_exists": Reason(409, "the user already has a token of that name"),
    "body_too_large": Reason(413, "the body is too large"),
    "line_too_long": Reason(414, "the request line is too long"),
    "encoded": Reason(415, "the body is compressed: its model cannot be read"),
    "unknown_expectation": Reason(417, "Expect is not 100-continue"),
    "rate_limited": Reason(429, "too many requests of this token in the last minute (--rpm)"),
    "too_many_at_once": Reason(429, "too many running requests of this token (--max-parallel)"),
    "budget_spent": Reason(429, "the token has used its tokens of the day (--tokens-per-day)"),
    "too_many_failures": Reason(429, "too many requests without a valid token came from this address"),
    "head_too_large": Reason(431, "the headers are too many or too long"),
    "internal": Reason(500, "the gateway failed: its log has the reason"),
    "unknown_coding": Reason(501, "the Transfer-Encoding is not chunked"),
    "upstream_failed": Reason(502, "Ollama cannot be reached, or does not speak HTTP"),
    "no_room": Reason(503, "no disk space for the body: try again later"),
    "no_descriptors": Reason(503, "the gateway is out of file descriptors: try again later"),
    "queue_full": Reason(503, "too many queued requests of this user (--max-queue)"),
    "queue_timeout": Reason(503, "the request waited too long in the queue (--queue-timeout)"),
    "uncounted": Reason(503, "the token's usage of today cannot be read: try again later"),
    "unstored": Reason(503, "the database cannot be read or changed: try again later"),
    "stopping": Reason(503, "the gateway is stopping: try again later"),
    "upstream_silent": Reason(504, "Ollama did not respond in time"),
    "unknown_version": Reason(505, "the HTTP version is not 1.0 or 1.1"),
}
OPENAI_TYPES = {403: "permission_error", 404: "not_found_error", 429: "rate_limit_error", 500: "api_error",
                502: "api_error", 503: "api_error", 504: "api_error"}
ANTHROPIC_TYPES = {**OPENAI_TYPES, 401: "authentication_error", 413: "request_too_large", 503: "overloaded_error"}


class Refusal(Exception):
    """The end of a request: any stage raises it, one place makes a response of it."""

    def __init__(self, code, message="", fields=(), retry_after=RETRY_SECONDS):
        super().__init__(message or REFUSALS[code].meaning)
        self.code, self.status, self.fields = code, REFUSALS[code].status, list(fields)
        if self.status in (429, 503):  # without it, SDKs use up their retries within half a second
            self.fields.append(("Retry-After", str(retry_after)))

    def body_for(self, dialect):
        """Return the error object that clients of "ollama", "openai" or "anthropic" expect."""
        types = ANTHROPIC_TYPES if dialect == "anthropic" else OPENAI_TYPES
        error = {"message": str(self), "type": types.get(self.status, "invalid_request_error")}
        if dialect == "openai":
            return {"error": {**error, "param": None, "code": self.code}}
        return {"type": "error", "error": error} if dialect == "anthropic" else {"error": str(self)}


class Malformed(Exception):
    """Bytes that are not valid HTTP: from the client a refusal by its code, from the upstream a failure."""

    def __init__(self, message, code="malformed"):
        super().__init__(message)
        self.code = code


class ClientLeft(Exception):
    """The client closed the connection or stopped reading: nobody reads a response."""

# == Settings =================================================================


def converter(pattern, kind, convert):
    """Return a function that converts the match of a whole text; it raises ValueError if there is none."""
    def read(text):
        match = re.fullmatch(pattern, text)
        if not match:
            raise ValueError(f"is not {kind}")
        return convert(match)
    return read


UNITS = {"": 1, "s": 1, "m": MINUTE, "h": HOUR, "d": DAY, "w": 7 * DAY}
duration = converter(r"(?=.*[1-9])([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhdw]?)", "a duration like 90s, 15m, 12h, 30d or 8w",
                     lambda match: float(match[1]) * UNITS[match[2]])   # in seconds
byte_size = converter(r"(?i)(?=.*[1-9])([0-9]{1,12}) ?(?:([KMG])(?:i?B)?|B)?", "a size like 100MiB",
                      lambda match: int(match[1]) * KIB ** " KMG".index((match[2] or " ").upper()))
boolean = converter("(?i)(1|true|yes|on)|0|false|no|off", "on or off", lambda match: bool(match[1]))
log_level = converter("(?i)debug|info|warn(ing)?|error|critical", "DEBUG, INFO, WARNING, ERROR or CRITICAL",
                      lambda match: logging.getLevelName(match[0].upper()))


def parse_instant(text, direction=0, clock=time.time):
    """Read a date (its first moment in UTC) or an ISO 8601 time as Unix seconds.

    With a direction, the text may be a duration, and the result must be after now (1) or not after it (-1).
    """
    now = int(clock())
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d:\d\d)(?:\.\d+)?(Z|[+-]\d\d:?\d\d)?)?", text, re.ASCII)
    if direction and re.fullmatch(r"[0-9.]+[a-z]", text):
        seconds = max(now + direction * int(duration(text)), 0)
    elif not match or match[2] and not match[3]:
        others = ", or a duration like 30d" if direction else ""
        raise ValueError(f"is not a date like 2027-01-31 or a time like 2027-01-31T18:00:00Z{others}")
    else:
        zone = "+00:00" if match[3] in (None, "Z") else f"{match[3][:3]}:{match[3][-2:]}"
        seconds = int(datetime.fromisoformat(f"{match[1]}T{match[2] or '00:00:00'}{zone}").timestamp())
    if not 0 <= seconds <= 253402300799:    # the end of the year 9999
        raise ValueError("is not a time from 1970 to 9999")
    if direction and (direction > 0) != (seconds > now):
        raise ValueError("is in the past" if direction > 0 else "is in the future")
    return seconds


def utc_day(seconds):
    """Return the UTC day of Unix seconds, counted from 1970."""
    return int(seconds) // DAY


def usage_start(text, clock=time.time):
    """Read "7d" as the start of seven UTC days, today's included; "12h", a date or a time as the start of an hour."""
    seconds = parse_instant(text, -1, clock)
    return (utc_day(seconds) + 1) * DAY if re.fullmatch("[0-9]+[dw]", text) else seconds // HOUR * HOUR


def format_instant(seconds):
    """Format Unix seconds as ISO 8601 in UTC; None stays None."""
    return None if seconds is None else (datetime(1970, 1, 1) + timedelta(seconds=seconds)).isoformat() + "Z"


def plural(number, noun):
    """Return "1 token", "2 tokens"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def integer(text, low=1, high=999_999_999, kind="whole number"):
    """Read decimal digits as a number within a range."""
    if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise ValueError(f"is not a {kind} from {low} to {high}")
    return int(text)


non_negative = functools.partial(integer, low=0)
port_number = functools.partial(integer, low=0, high=65535, kind="port number")


def model_globs(text):
    """Read a comma list of model names, in which * and ? are wildcards; return it in lower case without blanks."""
    globs = [part.strip().lower() for part in text.split(",") if part.strip()]
    if not globs or "none" in globs or not all(re.fullmatch(r"[a-z0-9._:/*?-]{1,200}", glob) for glob in globs) \
            or any(glob.rpartition("/")[2].count(":") > 1 for glob in globs):
        raise ValueError("is not a list of models like llama3*,qwen2.5:7b (letters, digits and . _ : / - * ?)")
    return ",".join(globs)


def networks(text):
    """Read a comma list of addresses and networks."""
    try:
        return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"is not a list of addresses or networks: {error}") from None


def upstream_url(text):
    """Read an http or https URL, which may have a path, as the parts of urllib.parse."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(text.rstrip("/"))
        parts.port  # raises ValueError for a port out of range
        if parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.fragment \
                and parts.username is None and re.fullmatch(r"[\x21-\x7e]+", text):
            return parts
    raise ValueError("is not a URL like http://localhost:11434")


def base_path(text):
    """Read the path that replaces /api, as "/path" or, for the root, ""."""
    path = text.strip("/")
    if path and not re.fullmatch(r"[A-Za-z0-9_~-][A-Za-z0-9._~-]*(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*", path):
        raise ValueError("is not a path of letters, digits, '.', '_', '~' and '-'")
    if path.split("/")[0] in ("v1", "t", "docs", "openapi.json", "admin", "health", "me", "metrics"):
        raise ValueError("starts with a path that the gateway uses itself")
    return "/" + path if path else ""


def origins(text):
    """Read "*" or a comma list of origins, as browsers send them (RFC 6454 7)."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not all(re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+|null|\*", origin) for origin in found):
        raise ValueError("is not * or a list of origins like https://chat.example.com")
    return found


class Option(NamedTuple):
    """A setting; `convert` reads its text and raises ValueError with the end of a message."""

    group: str              # heading in the help
    flag: str
    default: Optional[str]
    convert: Callable
    metavar: str
    help: str
    inherited: str = ""     # its variable, if that is named as in the FastAPI gateway

    @property
    def name(self):
        return self.flag[2:].replace("-", "_")

    @property
    def variable(self):
        return self.inherited or "GATEWAY_" + self.name.upper()


OPTIONS = tuple(itertools.starmap(Option, (
    ("network", "--ollama-url", "http://localhost:11434", upstream_url, "URL", "Ollama to protect", "OLLAMA_BASE_URL"),
    ("network", "--base-path", "/api", base_path, "PATH", "path at which clients find Ollama's /api", "BASE_PATH"),
    ("network", "--db", "tokens.db", str, "FILE", "the database of tokens", "TOKEN_DB_PATH"),
    ("network", "--host", "127.0.0.1", str, "ADDRESS", "address to listen on; :: is all addresses"),
    ("network", "--port", "8000", port_number, "PORT", "port to listen on"),
    ("network", "--tls-cert", None, str, "FILE", "certificate chain: serve HTTPS"),
    ("network", "--tls-key", None, str, "FILE", "private key, if it is not in the file of --tls-cert"),
    ("access", "--cors-origins", "", origins, "LIST", "origins of web pages that may use the gateway, or *"),
    ("access", "--path-tokens", "off", boolean, "", "accept /t/SECRET before any path"),
    ("access", "--trusted-proxies", "", networks, "LIST", "addresses or networks of proxies that send X-Forwarded-For"),
    ("access", "--metrics-open", "off", boolean, "", "serve /metrics without a token"),
    ("access", "--no-admin-api", "off", boolean, "", "do not serve /admin and its API"),
    ("limits", "--max-connections", "1024", integer, "N", "client connections; one more replaces the longest idle"),
    ("limits", "--max-body", "100MiB", byte_size, "SIZE", "largest request body; blobs have no limit"),
    ("limits", "--max-spool", "2GiB", byte_size, "SIZE", "disk space for request bodies; those over 1 MiB are files"),
    ("limits", "--max-parallel", "0", non_negative, "N", "inference requests at once, others queue; 0: no limit"),
    ("limits", "--max-queue", "128", integer, "N", "requests of one user that may be queued"),
    ("timeouts", "--queue-timeout", "60s", duration, "TIME", "longest wait of a request in the queue"),
    ("timeouts", "--connect-timeout", "5s", duration, "TIME", "to connect to Ollama, name look-up included"),
    ("timeouts", "--first-byte-timeout", "600s", duration, "TIME", "for a response's first byte; models load first"),
    ("timeouts", "--stall-timeout", "300s", duration, "TIME", "for the next byte of a response"),
    ("timeouts", "--header-timeout", "15s", duration, "TIME", "for a whole request head, or a TLS handshake"),
    ("timeouts", "--idle-timeout", "75s", duration, "TIME", "for the next request on a connection"),
    ("timeouts", "--drain-timeout", "30s", duration, "TIME", "for running requests to finish at a stop"),
    ("logging", "--log-level", "INFO", log_level, "LEVEL", "level of the log on stderr", "LOG_LEVEL"),
    ("logging", "--log-file-level", "INFO", log_level, "LEVEL", "level of the log file", "LOG_FILE_LEVEL"),
    ("logging", "--log-file", None, str, "FILE", "log file, rotated at 10 MB; app.log if LOG_FILE_LEVEL is set"),
)))
DATABASE_OPTION = next(option for option in OPTIONS if option.flag == "--db")   # every command has it

ENV_LINE = re.compile(r"""\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*      # name; then a value in quotes, or words
    (?:'([^']*)'|"((?:[^"\\]|\\.)*)"|([^\s\#]\S*(?:\s+[^\s\#]\S*)*))?\s*(?:\#.*)?""", re.VERBOSE)


def read_env_file(path):
    """Read a .env file into a dictionary; without a path it is .env, which may be missing."""
    try:
        with open(path or ".env", encoding="utf-8-sig") as file:
            lines = [ENV_LINE.fullmatch(line) for line in file.read().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        if path is None and isinstance(error, FileNotFoundError):
            return {}
        raise UsageError(f'cannot read the settings in "{path or ".env"}": {error}') from None
    return {line[1]: line[2] or re.sub(r'\\(["\\])', r"\1", line[3] or "") or line[4] for line in lines if line}


def load_settings(flags, environ, env_file=None, options=OPTIONS):
    """Return the options' values as attributes: flags beat the environment, that the .env file, that the defaults.

    flags: {option name: text}; an empty text is none. `given` of the result: {name: (source, text)}. Raises UsageError.
    """
    file, settings = read_env_file(env_file), types.SimpleNamespace(given={})
    for option in options:
        sources = ((option.flag, flags.get(option.name)), (option.variable, environ.get(option.variable)),
                   (f'{option.variable} in {env_file or ".env"}', file.get(option.variable)))
        source, text = next((pair for pair in sources if pair[1]), ("default", option.default))
        if source != "default":
            settings.given[option.name] = source, text
        try:
            setattr(settings, option.name, None if text is None else option.convert(text))
        except ValueError as error:
            raise UsageError(f'{source}: "{text}" {error}') from None
    if "log_file_level" in settings.given and "log_file" not in settings.given:
        settings.log_file = "app.log"  # as in the FastAPI gateway
    if "tls_key" in settings.given and "tls_cert" not in settings.given:
        raise UsageError("--tls-key: --tls-cert FILE is missing")
    return settings

# == Model ====================================================================


class Token(NamedTuple):
    """A row of the database; times are Unix seconds in UTC."""

    id: int
    user: str
    name: str
    digest: str
    hint: str
    created_at: int
    expires_at: Optional[int]
    last_used_at: Optional[int]
    admin: bool
    models: Optional[str]           # comma list of globs: other models are forbidden
    rpm: Optional[int]              # inference requests in any minute
    max_parallel: Optional[int]     # inference requests at once
    tokens_per_day: Optional[int]   # of prompts and completions, in a UTC day


class Limit(NamedTuple):
    """A limit of a token; flags, admin API, export, list, menu, pages, OpenAPI and messages iterate LIMITS."""

    column: str         # in the database and in JSON
    refusal: str        # of a request beyond the limit: one of REFUSALS
    help: str           # of the flag
    heading: str        # in `token list`
    label: str          # in the menu and on the pages
    phrase: str         # a value in a sentence
    metavar: str = "N"
    read: Callable = integer    # returns the value of a text; raises ValueError
    json_type: str = "integer"
    example: str = ""   # of a value that is not a number

    @property
    def flag(self):
        return "--" + self.column.replace("_", "-")


LIMITS = (
    Limit("models", "forbidden", "the only models that it may use, like llama3*,qwen2.5:7b", "MODELS", "Models",
          "models {}", "LIST", model_globs, "string[]", "llama3*,qwen2.5:7b"),
    Limit("rpm", "rate_limited", "inference requests in any minute", "RPM", "Requests a minute", "{} a minute"),
    Limit("max_parallel", "too_many_at_once", "inference requests at once", "PARALLEL", "Requests at once",
          "{} at once"),
    Limit("tokens_per_day", "budget_spent", "tokens of prompts and completions in a UTC day", "A DAY", "Tokens a day",
          "{} tokens a day"),
)
LIMIT_BY_COLUMN = {limit.column: limit for limit in LIMITS}
SETTABLE = {"expires_at": functools.partial(parse_instant, direction=1),
            **{limit.column: limit.read for limit in LIMITS}}   # columns of a token


def read_column(column, text):
    """Return the value of a text for one of SETTABLE, None for "none"; raise ValueError."""
    return None if text == "none" else SETTABLE[column](text)


def is_expired(token):
    return token.expires_at is not None and token.expires_at <= time.time()


def token_json(token):
    """Return a token's columns, ready for JSON."""
    shown = {**token._asdict(), "admin": bool(token.admin), "expired": is_expired(token)}
    del shown["digest"]
    for column in "created_at", "expires_at", "last_used_at":
        shown[column] = format_instant(shown[column])
    return {**shown, "models": token.models and token.models.split(",")}


class Route(NamedTuple):
    """A path of Ollama or of the gateway (`{name}` is one segment), and who may use it."""

    method: str
    path: str
    access: str                 # "public", "token" or "admin"
    category: str               # "page", "read", "inference", "model" or "account"
    summary: str = ""           # in the documentation
    model_in: str = ""          # where the request names its model: "json", "form" or "path"
    model_list_key: str = ""    # the key of the list of models in the response
    handler: str = ""           # the method that responds, for own pages
    streamed: bool = False      # the request body is sent on while it arrives


class Usage(NamedTuple):
    """The tokens of a request; None where Ollama reports none."""

    prompt: Optional[int] = 0
    cached: Optional[int] = None        # part of the prompt that was read from the model's cache
    completion: Optional[int] = 0
    estimated: int = 0                  # part of prompt and completion that the gateway estimated


class RequestContext:
    """What is known of a request, from its head to its log line. Times are those of time.monotonic()."""

    id = request = route = token = slot = status = refusal_code = reason = None
    path = ""                       # the route's path, with its segment: without base path and token
    body = b""                      # of a request for one of our own pages
    insert_at = 0                   # where the body is to get INCLUDE_USAGE, 0: nowhere
    model, model_label = None, ""   # as requested; its full name, once Ollama has accepted it
    usage_reader = estimate = None  # the estimate: of a prompt that Ollama has not counted
    bytes_sent, queue_seconds = 0, 0.0
    sent_at = released_at = first_byte_at = ended_at = None
    outcome = None                  # "left" or "broken" if the response did not reach its end

    def __init__(self, client_address, now):
        self.client_address, self.started_at = client_address, now

    @property
    def usage(self):
        usage = Usage() if self.usage_reader is None else self.usage_reader.usage
        if self.estimate is None:
            return usage
        return usage._replace(prompt=self.estimate, estimated=self.estimate + (usage.completion or 0))

# == Connection ===============================================================


class Deadline:
    """A time limit that starts at the first wait; `flag` names the option that changes it."""

    __slots__ = ("_at", "_seconds", "_flag")

    def __init__(self, seconds, flag="", at=None):
        self._at, self._seconds, self._flag = at, seconds, flag

    def left(self):
        """Return the seconds left; raise TimeoutError if none are."""
        now = time.monotonic()
        if self._at is None:
            self._at = now + self._seconds
        seconds = self._at - now
        if seconds <= 0:
            raise TimeoutError(f"nothing came for {self._seconds:g} s" + (f" ({self._flag})" if self._flag else ""))
        return seconds

    def share(self, parts):
        """Return the deadline of the first of some equal parts of the time left; raise TimeoutError."""
        return Deadline(self._seconds, self._flag, time.monotonic() + self.left() / parts)


def is_late(error):
    """Return whether a Deadline has passed; the system's ETIMEDOUT, a lost connection, is a TimeoutError too."""
    return isinstance(error, TimeoutError) and error.errno is None


READABLE = selectors.EVENT_READ     # the value of POLLIN too
WRITABLE = getattr(select, "POLLOUT", selectors.EVENT_WRITE)
HUNG_UP = getattr(select, "POLLRDHUP", 0)   # reports a half-closed peer without a read; Linux only
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError)
# A peer that vanished without a FIN is given up after 30 s: 15 s of silence and 3 probes 5 s apart, few enough for a
# phone's battery. TCP_USER_TIMEOUT (ms, RFC 5482) is for unacknowledged data and, on Linux, for the probes too.
KEEP_ALIVE = [(getattr(socket, option), value) for option, value in (
    ("TCP_KEEPIDLE", 15), ("TCP_KEEPALIVE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3),  # TCP_KEEPALIVE: macOS
    ("TCP_USER_TIMEOUT", 30_000)) if hasattr(socket, option)]


def set_tcp_options(sock):
    """Set the options of a connection, or of a listener, whose connections inherit them."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else Nagle delays each response by 44 ms
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with contextlib.suppress(OSError):  # a system may know an option and not support it
        for option, value in KEEP_ALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def look_up(host, port, flags=0):
    """Return the TCP addresses of getaddrinfo; an ASCII name avoids the IDNA codec, whose import takes 3 ms."""
    host = host.encode("ascii") if host.isascii() else host
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)


def address_of(text):
    """Return an IP address without its zone, an IPv4-mapped one as IPv4; raise ValueError."""
    address = ipaddress.ip_address(text.strip().partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


@functools.lru_cache(256)   # else it costs a new connection more than its acceptance
def network_of(text):
    """Return the bytes of an IPv4 address or of the /64 of an IPv6 address, which one peer controls."""
    return address_of(text).packed[:8]


OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


def is_out_of_descriptors(error):
    """Return whether an OSError came from a lack of descriptors; getaddrinfo and tempfile raise other errors then."""
    try:
        if error.errno not in OUT_OF_DESCRIPTORS:
            os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as found:
        error = found
    return error.errno in OUT_OF_DESCRIPTORS


class Poll(selectors.SelectSelector):
    """The part of select.poll() that is used here, for Windows."""

    def poll(self, milliseconds):
        return [(key.fd, events) for key, events in self.select(milliseconds / 1000)]


new_poll = getattr(select, "poll", Poll)


class Waitable:
    """Has a descriptor to wait for. One that can cancel a wait has watched_events() and on_readable(), too."""

    def wait(self, events, deadline, cancel_on=None):
        """Return the descriptor's events, once there are some; raise TimeoutError, and what on_readable() raises."""
        while True:
            poll = new_poll()
            if cancel_on is not None:
                poll.register(cancel_on.descriptor, cancel_on.watched_events())
            poll.register(self.descriptor, events)
            ready = dict(poll.poll(min(deadline.left() * 1000, 2 ** 31 - 1)))   # the largest argument of poll
            if cancel_on is not None and cancel_on.descriptor in ready:
                cancel_on.on_readable()
            if self.descriptor in ready:
                return ready[self.descriptor]


class Wakeup(Waitable):
    """Wakes the thread that waits until it is readable."""

    def __init__(self):
        self._write_end, self._read_end = socket.socketpair()
        self.descriptor = self._read_end.fileno()

    def set(self):
        self._write_end.send(b"!")

    def close(self):
        self._write_end.close()
        self._read_end.close()


class Connection(Waitable):
    """A buffered non-blocking socket; subclasses define what `until_writable` does while the peer reads nothing."""

    had_to_wait = False     # `fill` was called since this was last reset
    is_shut = False         # by another thread

    def __init__(self, sock):
        sock.setblocking(False)
        self.sock, self.descriptor, self.buffer = sock, sock.fileno(), b""

    def start_tls(self, context, deadline, cancel_on=None, **how):
        """Do the TLS handshake; `how` is passed to SSLContext.wrap_socket."""
        self.sock = context.wrap_socket(self.sock, do_handshake_on_connect=False, **how)
        if self.is_shut:    # shut_down was called meanwhile, and found a detached socket
            raise ConnectionAbortedError("the connection was shut down")
        while True:
            try:
                return self.sock.do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                self.wait(READABLE if isinstance(error, ssl.SSLWantReadError) else WRITABLE, deadline, cancel_on)

    def watched_events(self):
        """Return the events to watch for: only the hang-up if much is unread."""
        return HUNG_UP if len(self.buffer) >= PIPELINED_BYTES else READABLE | HUNG_UP

    def fill(self, deadline, cancel_on=None):
        """Read into the buffer as soon as there is data; return False at the end of the stream."""
        self.had_to_wait = True
        while True:
            if not (isinstance(self.sock, ssl.SSLSocket) and self.sock.pending()):  # poll cannot see what TLS holds
                self.wait(READABLE, deadline, cancel_on)
            try:
                data = self.sock.recv(RECEIVE_BYTES)
            except WOULD_BLOCK:
                continue
            self.buffer += data
            return bool(data)

    def alive(self):
        """Return whether the peer is still there; data that it has sent is read, without a wait."""
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except WOULD_BLOCK:
            return True
        except OSError:
            return False
        self.buffer += data
        return bool(data)

    def send(self, data, deadline, cancel_on=None):
        """Send all data."""
        while data:
            try:
                sent = self.sock.send(data)
                data = memoryview(data)[sent:] if sent < len(data) else b""
            except (BlockingIOError, ssl.SSLWantWriteError):
                self.until_writable(deadline, cancel_on)

    def shut_down(self, how=socket.SHUT_RDWR):
        """End the connection from another thread: a thread that waits on it wakes up."""
        self.is_shut = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, how)  # SSLSocket.shutdown would go on without TLS

    def close(self, notify=False):
        """Close; notify: not without TLS's close_notify, or the end looks like a truncation (RFC 8446 6.1)."""
        with contextlib.suppress(OSError, ValueError):
            if notify and isinstance(self.sock, ssl.SSLSocket):
                self.sock.unwrap()
        with contextlib.suppress(OSError):
            self.sock.close()

    def reset(self):
        """Close so that the peer sees an error instead of an end."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # struct linger {1, 0}
        self.close()

# == HTTP =====================================================================

BARE_LF = re.compile(rb"(?<!\r)\n")
FIELD_BLOCK = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*")  # RFC 9110 5.1, 5.5


def read_head(connection, deadline, cancel_on=None):
    """Return the head of a message, without the empty line at its end (RFC 9112 2.2); raise Malformed or OSError."""
    start = 0
    while True:
        data = connection.buffer
        end = data.find(b"\r\n\r\n", start)
        size = len(data) if end < 0 else end
        if size > LINE_BYTES and data.find(b"\r\n", 0, LINE_BYTES + 2) < 0:
            raise Malformed(f"the first line is longer than {LINE_BYTES} bytes", "line_too_long")
        if size > HEAD_BYTES:
            raise Malformed(f"the headers are larger than {HEAD_BYTES} bytes", "head_too_large")
        if end >= 0:
            connection.buffer = data[end + 4:]
            return data[:end + 2]
        if BARE_LF.search(data, start):
            raise Malformed("a line does not end in CR LF")
        start = max(size - 3, 0)    # the empty line may have begun
        if not connection.fill(deadline, cancel_on):
            if data:
                raise Malformed("the headers end early")
            raise ConnectionError("the connection was closed before any data")


def parse_fields(block):
    """Return a head's (name, value) pairs, {name in lower case: values, joined by commas} and the names that repeat."""
    if not FIELD_BLOCK.fullmatch(block):
        raise Malformed("a header is malformed")
    lines = block.decode("latin-1").split("\r\n")[:-1]
    if len(lines) > FIELD_COUNT:
        raise Malformed(f"there are more than {FIELD_COUNT} headers", "head_too_large")
    pairs = [(name, value.strip(" \t")) for name, _, value in (line.partition(":") for line in lines)]
    fields, repeated = {}, set()
    for name, value in ((name.lower(), value) for name, value in pairs):
        if name in fields:
            repeated.add(name)
        fields[name] = f"{fields[name]}, {value}" if name in fields else value  # RFC 9110 5.3
    if repeated & FRAMING:
        raise Malformed(f"there are two {min(repeated & FRAMING)} headers")
    return pairs, types.MappingProxyType(fields), frozenset(repeated)


def body_framing(fields, version, default=None):
    """Return (length or None, whether chunked) of a body (RFC 9112 6); raise Malformed if readers could differ."""
    coding, length = fields.get("transfer-encoding"), fields.get("content-length")
    if coding is None:
        if length is not None and not (length.isascii() and length.isdigit() and len(length) <= 18):
            raise Malformed(f'Content-Length is "{length[:40]}", not a number')
        return default if length is None else int(length), False
    if length is not None:
        raise Malformed("there are both Content-Length and Transfer-Encoding")
    if version == "1.0":
        raise Malformed("HTTP/1.0 has no Transfer-Encoding")
    if coding.lower() != "chunked":
        raise Malformed(f'the transfer coding "{coding[:40]}" is not "chunked"', "unknown_coding")
    return None, True


class Request(NamedTuple):
    """The head of a request; the one of equal heads is shared (`parse_cached_request`)."""

    method: str
    path: str
    query: str
    version: str
    fields: Mapping[str, str]           # by names in lower case
    repeated: frozenset                 # names of fields that came more than once
    closes: bool                        # the client sends no other request on the connection
    bearer: Optional[str]               # the secret in Authorization: "" if it has none, None without that field
    redacted_path: str                  # the path without secrets
    forwarded: str                      # the fields that go to Ollama, as lines of a head
    path_secret: Optional[str] = None   # the secret behind /t/, which is then not in `path`


REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([\x21-\x7e]+) HTTP/([0-9]\.[0-9])")  # RFC 9112 3
HOST = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")  # RFC 9110 7.2, RFC 3986 3.2.2
ABSOLUTE = re.compile(r"https?://([^/?]+)/?(.*)", re.IGNORECASE)
SECRET_IN_PATH = re.compile(rf"(?<=/t/)[^/]+|{SECRET_PREFIX}[\w-]+", re.IGNORECASE)
PATH_TOKEN = re.compile("/t/([^/]+)(/.*)")
BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)  # RFC 6750 2.1; RFC 9110 11.1: the case of the scheme is free
REQUEST_ID = re.compile("[A-Za-z0-9._-]{1,128}")


def parse_request(head):
    """Parse the head of a request strictly (RFC 9112 2 to 3); raise Malformed."""
    line, _, block = head.partition(b"\r\n")
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise Malformed("the request line is not METHOD SP PATH SP HTTP/1.1")
    method, target, version = (part.decode("ascii") for part in match.groups())
    if version not in ("1.0", "1.1"):
        raise Malformed(f"HTTP/{version} is not supported, HTTP/1.1 is", "unknown_version")
    _, fields, repeated = parse_fields(block)
    host = fields.get("host", "" if version == "1.0" else None)
    if host is None or not HOST.fullmatch(host):
        raise Malformed("the Host header is missing or malformed")
    absolute = None if target.startswith("/") else ABSOLUTE.fullmatch(target)
    if absolute and absolute[1].lower() == host.lower():    # RFC 9112 3.2.2
        target = "/" + absolute[2]
    if not target.startswith("/") or "#" in target:
        raise Malformed("the request target is not a path")
    path, mark, query = target.partition("?")
    hop = {option.strip(" \t") for option in fields.get("connection", "").lower().split(",")}
    authorization = fields.get("authorization")
    bearer = None if authorization is None else (BEARER.fullmatch(authorization) or ("", ""))[1]
    forwarded = "".join(f"{name}: {value}\r\n" for name, value in fields.items()
                        if (name in FORWARDED or name.startswith(FORWARDED_PREFIXES)) and name not in hop)
    return Request(method, path, mark + query, version, fields, repeated, version == "1.0" or "close" in hop,
                   bearer, SECRET_IN_PATH.sub("*", path), forwarded)


# Equal heads come again and again; parsing one takes a tenth of the CPU of a small response.
parse_cached_request = functools.lru_cache(HEAD_CACHE_SIZE)(parse_request)


def dialect_of(path):
    """Return the dialect of error objects that clients expect at a path, which may begin with /t/SECRET."""
    path = re.sub("^/t/[^/]+/", "/", path)
    if f"{path}/".startswith("/v1/messages/"):
        return "anthropic"
    return "openai" if path.startswith("/v1/") else "ollama"


STATUS_LINE = re.compile(rb"HTTP/(1\.[01]) ([1-5][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?")  # RFC 9112 4
NOT_RELAYED = HOP_BY_HOP | {"content-length", "x-request-id", "x-accel-buffering"}


class ResponseHead(NamedTuple):
    """The head of a response of Ollama; the one of equal heads is shared (`parse_cached_response_head`)."""

    status: int
    phrase: str
    fields: Mapping[str, str]   # by names in lower case
    lines: str                  # the fields that go to the client, as they came
    media_type: str             # the content type without parameters
    length: Optional[int]
    chunked: bool
    keep_alive: bool            # the connection may be used again after the response


def parse_response_head(head):
    """Parse the head of a response strictly; raise Malformed."""
    line, _, block = head.partition(b"\r\n")
    match = STATUS_LINE.fullmatch(line)
    if not match or match[2] == b"101":
        raise Malformed("its response has no status line")
    pairs, fields, _ = parse_fields(block)
    version = match[1].decode()
    hop = {option.strip(" \t") for option in fields.get("connection", "").lower().split(",")}
    dropped = hop | NOT_RELAYED
    lines = "".join(f"{name}: {value}\r\n" for name, value in pairs
                    if name.lower() not in dropped and not name.lower().startswith("access-control-"))
    return ResponseHead(int(match[2]), (match[3] or b"").decode("latin-1"), fields, lines,
                        fields.get("content-type", "").partition(";")[0].strip().lower(),
                        *body_framing(fields, version), version == "1.1" and "close" not in hop)


parse_cached_response_head = functools.lru_cache(HEAD_CACHE_SIZE)(parse_response_head)


def encode_chunk(piece, last=False):
    """Return a piece as a chunk (RFC 9112 7.1), nothing for an empty one; behind the last one the end of the body."""
    return (b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b"") + (b"0\r\n\r\n" if last else b"")


class BodyDecoder:
    """Decodes a body of a known length, one that ends with the connection (no length), or a chunked one (RFC 9112 6.3).

    Sizes of chunks are plain hex without extensions (RFC 9112 7.1); trailers are read and dropped.
    """

    FIRST_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")
    NEXT_SIZE = re.compile(rb"\r\n([0-9A-Fa-f]{1,16})\r\n")
    PART_OF_SIZE = re.compile(rb"(?:\r\n)?[0-9A-Fa-f]{0,16}\r?")

    def __init__(self, length, chunked=False):
        self.chunked, self.complete, self._size_line = chunked, length == 0, self.FIRST_SIZE
        self._ends_with_connection = length is None and not chunked
        self.left = sys.maxsize if self._ends_with_connection else length or 0  # bytes of the body, or of a chunk

    def decode(self, data):
        """Return (the data of the body, as far as it is there, and the bytes behind it); raise Malformed."""
        pieces, at = [], 0
        while not self.complete:
            if self.left:
                piece = data[at:at + self.left]
                pieces.append(piece)
                at += len(piece)
                self.left -= len(piece)
                if self.left:
                    break
                if not self.chunked:
                    self.complete = True
                    break
            match = self._size_line.match(data, at)
            if not match:
                if not self.PART_OF_SIZE.fullmatch(data, at):
                    raise Malformed("a chunk is malformed")
                break
            size, end = int(match[1], 16), match.end()
            if not size:    # the end, after the trailers
                trailers, end = end, data.find(b"\r\n\r\n", end - 2) + 4     # up to the first empty line
                if end < 4:
                    if len(data) - at > TRAILER_BYTES or BARE_LF.search(data, at):
                        raise Malformed("the trailers are too large, or have a line that does not end in CR LF")
                    break
                forbidden = FORBIDDEN_TRAILERS & parse_fields(data[trailers:end - 2])[1].keys()
                if forbidden:
                    raise Malformed(f"{min(forbidden)} is not allowed in trailers")
            self.left, self.complete, self._size_line, at = size, not size, self.NEXT_SIZE, end
        return b"".join(pieces), data[at:]

    def read(self, connection, deadline, cancel_on=None):
        """Return the next piece of the body as soon as it is there, b"" only at its end; raise Malformed or OSError."""
        while True:
            piece, connection.buffer = self.decode(connection.buffer)
            if piece or self.complete:
                return piece
            if not connection.fill(deadline, cancel_on):
                if not self._ends_with_connection:
                    raise Malformed("the body ends early")
                self.complete = True

# == Request body =============================================================


class AmbiguousBody(Malformed):
    """A body in which the gateway cannot determine what Ollama will read; `code` is one of REFUSALS."""


TOO_LONG = object()     # replaces a value of more than VALUE_BYTES


def fold_keys(pairs):
    """Return {key in lower case: [its values]} of a JSON object's members, as encoding/json matches keys."""
    members = {}
    for key, value in pairs:
        members.setdefault(key.lower().replace("\u017f", "s"), []).append(value)    # Go folds the long s too
    return members


# int() without a limit on digits takes quadratic time: older Pythons get float(), slower for short numbers
DECODER = json.JSONDecoder(object_pairs_hook=tuple, parse_constant=lambda _: TOO_LONG,
                           parse_int=None if hasattr(sys, "set_int_max_str_digits") else float)


def split_at_quotes(data):
    """Yield (position, whether it begins in a string, texts between quotation marks) for each window of a JSON text.

    In the texts, "--" replaces escapes. Windows, because a method of bytes blocks all threads until it returns.
    """
    at, quoted = 0, False
    while at < len(data):
        window = data[at:at + WINDOW_BYTES].replace(b"\\\\", b"--").replace(b'\\"', b"--")
        if window.endswith(b"\\", 1):   # the next window has the rest of the escape
            window = window[:-1]
        texts = window.split(b'"')
        yield at, quoted, texts
        at += len(window)
        quoted ^= len(texts) % 2 == 0
        if at > DECODED_BYTES:
            time.sleep(1e-6)    # releases the GIL: a waiting thread would have to wait 5 ms for it


TOKEN = re.compile(rb'"[^"]*(?:"|(?P<unclosed>\Z))|(?P<opening>[{\[])|(?P<closing>[}\]])')
STEPS = bytes(1 if mark in b"{[" else 255 for mark in range(256))   # of depth, as signed bytes: 1 opens, -1 closes
NO_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))


def reduce_object(data):
    """Return the JSON object at the start of data with NaN for each value of more than VALUE_BYTES, and its size.

    These values are not validated: Ollama refuses malformed ones. Raises ValueError and AmbiguousBody.
    """
    kept, parts, depth = bytearray(), 0, 0
    end, start = 0, None    # of the last token that was kept or replaced, and of the one that is open
    for at, quoted, texts in split_at_quotes(data):
        steps = memoryview(b"".join(texts[quoted::2]).translate(STEPS, NO_BRACKETS)).cast("b")
        parts += len(texts) // 2 + len(steps)
        if parts > JSON_PARTS:
            raise AmbiguousBody(f"it has more than {JSON_PARTS} strings and brackets", "body_too_large")
        if len(kept) + (at - end if start is None else 0) > TOP_LEVEL_BYTES:
            raise AmbiguousBody(f"its keys and short values take more than {TOP_LEVEL_BYTES} bytes", "body_too_large")
        if depth + min(itertools.accumulate(steps, initial=0)) > 1:     # the window lies within a nested value
            depth += sum(steps)
            continue
        for token in TOKEN.finditer(b'"' * quoted + b'"'.join(texts)):
            if start is None:
                start = at - quoted + token.start()
                kept += data[end:start].translate(None, b" \t\r\n")
            kind = token.lastgroup
            depth += (kind == "opening") - (kind == "closing")
            if depth <= 1 and kind != "unclosed":
                end = at - quoted + token.end()
                kept += data[start:end] if end - start <= VALUE_BYTES else b"NaN"
                start = None
                if depth <= 0:
                    return kept.decode(), end
    raise ValueError


def read_object(data):
    """Return the (key, value) pairs of the JSON object at the start of data, and its size; raise AmbiguousBody.

    A nested object is a tuple of pairs too; in a large object, a value of more than VALUE_BYTES is TOO_LONG.
    """
    try:
        if len(data) > DECODED_BYTES:
            reduced, size = reduce_object(data)
            pairs = DECODER.decode(reduced)
        else:
            text = data[:].decode()
            pairs, end = DECODER.raw_decode(text, len(text) - len(text.lstrip(" \t\r\n")))
            size = end if text.isascii() else len(text[:end].encode())
    except (ValueError, RecursionError) as error:
        problem = "UTF-8" if isinstance(error, UnicodeDecodeError) else "a JSON object"
        raise AmbiguousBody(f"it is not {problem}") from None
    if not isinstance(pairs, tuple):
        raise AmbiguousBody("it is not a JSON object")
    return pairs, size


class BodyInfo(NamedTuple):
    """What a request's body says, as Ollama will read it."""

    model: str = ""
    insert_at: int = 0      # the position for INCLUDE_USAGE, without which the usage is not reported; 0: none


def single_text(members, key):
    """Return the string that is a key's only value, "" for no value or another type; raise AmbiguousBody."""
    text, *others = members.get(key, ("",))
    if others:
        raise AmbiguousBody(f'it has two keys "{key}"')
    if text is TOO_LONG or isinstance(text, str) and len(text) > VALUE_BYTES:
        raise AmbiguousBody(f'its "{key}" is too long')
    return text if isinstance(text, str) else ""


def requests_usage(members):
    """Return whether stream_options request the usage; the values of equal keys are merged as encoding/json does."""
    found = members.get("stream_options", ())
    if TOO_LONG in found:
        raise AmbiguousBody('its "stream_options" are too long')
    values = [value for options in found
              for value in (fold_keys(options).get("include_usage", ()) if isinstance(options, tuple) else [False])]
    return [value for value in values if value is not None][-1:] == [True]


def inspect_json(data, usage_on_request=False):
    """Return the BodyInfo of a JSON body: the model is the top-level key "model", or else "name"; raise AmbiguousBody.

    usage_on_request: a streamed response reports its usage only if `stream_options` request it.
    """
    pairs, size = read_object(data)
    members = fold_keys(pairs)
    model, name = single_text(members, "model"), single_text(members, "name")
    inserts = usage_on_request and True in members.get("stream", ()) and not requests_usage(members)
    return BodyInfo(model or name, size - 1 if inserts else 0)


FORM = re.compile(r'multipart/form-data(?: *; *charset=[\w-]+)? *; *boundary=(?:"([^"\\]{1,70})"|([^\s";]{1,70}))'
                  r'(?: *; *charset=[\w-]+)? *', re.IGNORECASE)
UNQUOTED = rb"[\w!#$%&+.^`|~-]+"
FILE_NAME = rb'(?:; *filename=(?:"(?:[^"\\\r\n]|\\[^\r\n])*"|%b))?(?:; *filename\*=[^\s";]*)?' % UNQUOTED
PART_FIELD = (rb"(?:(?:content-(?:type|length|id)|mime-version):[^\r\n]*"
              rb"|content-transfer-encoding: *(?:7bit|8bit|binary) *)")
PART_HEAD = re.compile(rb'(?:%b\r\n)*content-disposition: *form-data(%b); *name=(?:"([^"\\\r\n]*)"|(%b))(%b)(?:\r\n%b)*'
                       % (PART_FIELD, FILE_NAME, UNQUOTED, FILE_NAME, PART_FIELD), re.IGNORECASE)


def inspect_form(data, content_type):
    """Return the BodyInfo of a form with a field "model" (RFC 7578, RFC 2046 5.1.1).

    Raises AmbiguousBody for a form that no client writes, or that two readers could split in two ways.
    """
    form = FORM.fullmatch(content_type)
    if not form:
        raise AmbiguousBody("it is not multipart/form-data with a plain boundary")
    delimiter = b"--" + (form[1] or form[2]).encode("latin-1")
    found, at, models = [], 0, []       # found: the positions of the delimiters
    while at < len(data) and len(found) < FORM_PARTS + 2:
        position = data.find(delimiter, at, at + WINDOW_BYTES)      # a longer search would block all threads
        at = position + len(delimiter) if position >= 0 else at + WINDOW_BYTES - len(delimiter) + 1
        if position >= 0:
            found.append((position, at))
    if not found or data[:found[0][0]] not in (b"", b"\r\n") or len(found) > FORM_PARTS + 1 \
            or data[found[-1][1]:found[-1][1] + 5] not in (b"--", b"--\r\n"):
        raise AmbiguousBody(f"it is not a form, or has more than {FORM_PARTS} parts")
    for (_, start), (end, _) in zip(found, found[1:]):
        head_end = data.find(b"\r\n\r\n", start, min(end, start + VALUE_BYTES))
        if data[start:start + 2] != b"\r\n" or data[end - 2:end] != b"\r\n" or not start < head_end <= end - 4 - 2:
            raise AmbiguousBody("a part of the form is malformed")
        head = PART_HEAD.fullmatch(data[start + 2:head_end])
        if not head:
            raise AmbiguousBody("a part of the form has no plain name, or other headers than clients send")
        if b"model" in (head[2], head[3]):
            if models or head[1] or head[4] or end - head_end > VALUE_BYTES:
                raise AmbiguousBody('it has more than one plain field "model"')
            models.append(data[head_end + 4:end - 2])
    try:
        return BodyInfo(models[0].decode() if models else "")
    except UnicodeDecodeError:
        raise AmbiguousBody("it is not UTF-8") from None


NAME_PART = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,79}", re.ASCII)
HOST_PART = re.compile(r"[a-z0-9_][a-z0-9_.:-]{0,349}", re.ASCII)
CLOUD_MODEL = re.compile(r"[:-]\s*cloud(?:\s*:\s*local)*\s*\Z")     # Ollama's internal/modelref


@functools.lru_cache(MODEL_CACHE_SIZE)
def name_variants(model):
    """Return a model's full names in lower case (Ollama's types/model/name.go), shortest first; () if it is invalid."""
    *before, name = model.strip().lower().split("/")
    name = name if ":" in name else name + ":latest"
    if len(before) == 4 and before[0].endswith(":") and not before[1]:
        del before[:2]  # scheme://
    namespace = before[-1] if before else "library"
    host = before[0] if len(before) > 1 else "registry.ollama.ai"
    if len(before) > 2 or not HOST_PART.fullmatch(host) \
            or not all(map(NAME_PART.fullmatch, (namespace, *name.split(":", 1)))):
        return ()
    variants = (name, f"{namespace}/{name}", f"{host}/{namespace}/{name}")
    return variants[2:] if host != "registry.ollama.ai" else variants[1:] if namespace != "library" else variants


def normalize_model(model):
    """Return the shortest full spelling of a model's name, "" for an invalid name."""
    return (name_variants(model) or ("",))[0]


def is_cloud_model(model):
    """Return whether Ollama runs a model on its owner's ollama.com account, by the model's name."""
    return CLOUD_MODEL.search(model.lower()) is not None


def model_allowed(model, globs):
    """Return whether a list of globs allows a model in any spelling; a cloud model only by a glob with "cloud"."""
    globs = [glob for glob in globs.split(",") if "cloud" in glob or not is_cloud_model(model)]
    tagged = [glob if glob.endswith("*") or ":" in glob.rpartition("/")[2] else glob + ":latest" for glob in globs]
    return any(fnmatch.fnmatchcase(name, glob) for name in name_variants(model) for glob in tagged)


BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\\"   # a backslash may escape the slash


def prompt_text_bytes(data):
    """Return the number of bytes in all strings of a JSON body; long base64 strings, such as images, do not count."""
    total = 0
    for _, quoted, texts in split_at_quotes(data):
        total += sum(len(string) for string in texts[1 - quoted::2]
                     if len(string) <= KIB or string[256:].translate(None, BASE64))     # after the type (RFC 2397)
    return total


@contextlib.contextmanager
def disk_errors():
    """Convert an OSError of a body's file to a Refusal."""
    try:
        yield
    except OSError as error:
        if is_out_of_descriptors(error):
            raise Refusal("no_descriptors") from None
        raise Refusal("no_room", f"the body cannot be kept: {error.strerror}") from None


class BodyStorage:
    """Bounds the memory and the disk space of all request bodies together; threads may share it."""

    def __init__(self, max_spool):
        self._lock, self._left = threading.Lock(), {"memory": BODY_MEMORY, "disk": max_spool}

    def take(self, kind, size):
        """Reserve bytes of "memory" or "disk", free a negative number; return False if not enough are left."""
        with self._lock:
            fits = size <= self._left[kind]
            self._left[kind] -= size if fits else 0
            return fits


class BufferedBody(contextlib.AbstractContextManager):
    """A whole request body, in memory or, if it is large, in a temporary file. It can be sent twice."""

    replayable = True
    _file = None
    _reserved = 0           # bytes of the storage: disk space if there is a file, else memory
    insertion = (0, b"")    # a position, and bytes that are sent in front of those there

    def __init__(self, data=b"", declared=True, storage=None):
        self.size, self._data, self._declared, self._storage = len(data), data, declared, storage

    def append(self, piece):
        """Add a piece; raise Refusal if there is no room for it."""
        self.size += len(piece)
        if self._file is None and self.size <= SPOOL_BYTES and self._storage.take("memory", len(piece)):
            self._reserved += len(piece)
            self._data += piece
            return
        with disk_errors():
            if self._file is None:
                import tempfile  # few requests need it, and every start would wait for it
                self._file = tempfile.TemporaryFile()
                self._storage.take("memory", -self._reserved)
                piece, self._data, self._reserved = self._data + piece, b"", 0
            if not self._storage.take("disk", len(piece)):
                raise Refusal("no_room", "request bodies already take the disk space of --max-spool: try again later")
            self._reserved += len(piece)
            self._file.write(piece)

    @property
    def framing(self):
        return f"content-length: {self.size + len(self.insertion[1])}\r\n" if self._declared else ""

    def pieces(self, _=None):
        """Yield the bytes to send; raise Refusal if they cannot be read."""
        at, extra = self.insertion
        if self._file is None:
            yield self._data[:at] + extra + self._data[at:] if extra else self._data
            return
        for start in range(0, self.size, FILE_PIECE_BYTES):
            with disk_errors():
                self._file.seek(start)
                piece = self._file.read(FILE_PIECE_BYTES)
            if 0 <= at - start < FILE_PIECE_BYTES:
                piece = piece[:at - start] + extra + piece[at - start:]
            yield piece

    def inspect(self, function, *args):
        """Return function(data, *args); the data of a file is mapped, not read into memory."""
        if self._file is None:
            return function(self._data, *args)
        with disk_errors():
            self._file.flush()
            view = mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_READ)
        with view:
            return function(view, *args)

    def __exit__(self, *_):
        if self._file is not None:
            with contextlib.suppress(OSError):  # unwritten data is not needed any more
                self._file.close()
        if self._storage is not None:
            self._storage.take("disk" if self._file else "memory", -self._reserved)


NO_BODY = BufferedBody(declared=False)


class StreamedBody:
    """A request body that is forwarded while it arrives, with the client's framing.

    check_again: raises Refusal if the token has lost its rights meanwhile.
    """

    replayable = False

    def __init__(self, client, check_again):
        self._client, self._check_again = client, check_again
        chunked, left = client.body.chunked, client.body.left
        self.framing = "transfer-encoding: chunked\r\n" if chunked else f"content-length: {left}\r\n"

    def pieces(self, upstream):
        """Yield the bytes to send; a response of the upstream ends the wait for the client."""
        checked_at = time.monotonic()
        while not self._client.body.complete:
            piece = self._client.read_body(upstream)
            if time.monotonic() - checked_at > TOKEN_CHECK_SECONDS:
                self._check_again()
                checked_at = time.monotonic()
            yield encode_chunk(piece, self._client.body.complete) if self._client.body.chunked else piece

# == Store ====================================================================

SQLITE_VERSION = sqlite3.sqlite_version
OWN_COLUMNS = {("tokens", "digest"), ("state", "generation")}   # of every version
FASTAPI_COLUMNS = {("tokens", column) for column in "id user_id user api_name token created_at expires_at".split()}
MOUNTS, REMOTE = "/proc/self/mountinfo", "nfs|cifs|smb|fuse|9p"     # WAL needs memory shared by processes
RECHECK_SECONDS = 0.5   # interval at which SQLite is queried although its index has not changed
WAL_INDEXES, WAL_INDEXES_LOCK = weakref.WeakValueDictionary(), threading.Lock()     # {(file, its -shm): header}
DatabaseInfo = namedtuple("DatabaseInfo", "version tokens writable mode")   # writable by this user; mode of its file
MIGRATIONS = (      # the statements that lead to version 1, 2, …
    ("""CREATE TABLE tokens (id INTEGER PRIMARY KEY AUTOINCREMENT, user TEXT NOT NULL, name TEXT NOT NULL,
        digest TEXT NOT NULL UNIQUE, hint TEXT NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER,
        last_used_at INTEGER, admin INTEGER NOT NULL DEFAULT 0, UNIQUE (user, name))""",
     # generation: changes with the tokens, but not with last_used_at; TokenCache compares it
     "CREATE TABLE state (generation INTEGER NOT NULL, scrub_owed INTEGER NOT NULL)",
     "INSERT INTO state SELECT 1, count(*) FROM sqlite_master WHERE name = 'fastapi_tokens'",   # see _upgrade
     *(f"CREATE TRIGGER tokens_{event.lower()} AFTER {event} ON tokens {when} "
       "BEGIN UPDATE state SET generation = generation + 1; END"
       for event, when in (("INSERT", ""), ("UPDATE", "WHEN OLD.last_used_at IS NEW.last_used_at"), ("DELETE", "")))),
    ("ALTER TABLE tokens ADD COLUMN models TEXT",
     *(f"ALTER TABLE tokens ADD COLUMN {column} INTEGER" for column in ("rpm", "max_parallel", "tokens_per_day")),
     """CREATE TABLE usage (hour INTEGER NOT NULL, user TEXT NOT NULL, name TEXT NOT NULL, model TEXT NOT NULL,
        route TEXT NOT NULL, requests INTEGER NOT NULL, errors INTEGER NOT NULL, cancelled INTEGER NOT NULL,
        prompt_tokens INTEGER, completion_tokens INTEGER, seconds REAL NOT NULL,
        PRIMARY KEY (user, name, hour, model, route)) WITHOUT ROWID""",     # a token's day is one range
     "CREATE INDEX usage_by_hour ON usage (hour)"),
    ("ALTER TABLE usage ADD COLUMN cached_tokens INTEGER",
     "ALTER TABLE usage ADD COLUMN estimated_tokens INTEGER NOT NULL DEFAULT 0"))


def _printable(text):
    return "".join(c if c.isprintable() else "?" for c in text)


def digest_of(secret):
    """Return the SHA-256 of a secret in hex; 256 random bits need no slow hash."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _stored(secret):
    """Return the columns of a secret: its digest, and its first characters, never more than half of it."""
    return {"digest": digest_of(secret), "hint": _printable(secret[:min(HINT_LENGTH, len(secret) // 2)])}


def check_name(what, name):
    """Return a user's or token's name; raise UsageError if a list could not show it."""
    if not name or len(name) > NAME_LENGTH or not name.isprintable() or name != name.strip() or name.startswith("-"):
        raise UsageError(f"the {what} {json.dumps(name[:80])} must have 1 to {NAME_LENGTH} printable characters, "
                         "none of them '-' at the start or a space at either end")
    return name


def check_rights(user, name, admin, models):
    """Raise UsageError for an admin token with a list of models, because admin tokens may use every model."""
    if admin and models:
        raise UsageError(f'an admin\'s token may use every model: give "{user}/{name}" --models none, or --no-admin')


def token_exists(user, name):
    return Failure(f'the token "{user}/{name}" exists already: choose another, or "token rotate" it', "token_exists")


@contextlib.contextmanager
def _database_errors(path):
    """Raise Failure, naming the database, for the errors of SQLite and the file system."""
    try:
        yield
    except (sqlite3.Error, OSError, ValueError) as error:   # ValueError: a NUL in the path
        raise Failure(f"cannot use the database {path!r}: {getattr(error, 'strerror', None) or error}") from error


def _identify(path):
    """Return device and inode of a file, None if it is missing or out of reach."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def remote_file_system(path):
    """Return the type of the network or FUSE file system that holds a file, "" for others or if it is unknown."""
    with contextlib.suppress(OSError), open(MOUNTS, encoding="utf-8", errors="replace") as mounts:
        device = os.stat(os.path.dirname(path)).st_dev
        mount = rf"(?m)^\S+ \S+ {os.major(device)}:{os.minor(device)} .* - ((?:{REMOTE})\S*)"    # see proc(5)
        return "".join(re.findall(mount, mounts.read())[:1])
    return ""


def _find_file(path, create):
    """Make sure that the file exists, a new one its owner's alone before it holds a byte; return if it is writable."""
    if not create and not (os.path.isfile(path) and os.path.getsize(path)):
        raise Failure(f'there is no database at {path} yet: "token create" makes one, or name another with --db')
    if not os.path.isfile(path):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    return os.access(path, os.W_OK) and os.access(os.path.dirname(path), os.W_OK)


def _connect(path, writable, timeout=BUSY_SECONDS):
    """Connect to the file. A read-only one without a -shm must be opened as immutable: SQLite could not make one."""
    mode = "mode=rw" if writable else "mode=ro" if os.path.exists(path + "-shm") else "immutable=1"
    return sqlite3.connect(f"file:{urllib.parse.quote(os.fsencode(path))}?{mode}", uri=True, timeout=timeout,
                           isolation_level=None, check_same_thread=False)


def _check_version(db, path):
    """Return the version of a database of ours or of the FastAPI gateway (0); raise Failure for another's."""
    with db:
        db.execute("BEGIN")     # one moment for all that is read: another process may be upgrading the database
        version, = db.execute("PRAGMA user_version").fetchone()
        found = set(db.execute("SELECT m.name, c.name FROM sqlite_master AS m, pragma_table_info(m.name) AS c"))
    if version > len(MIGRATIONS):
        raise Failure(f"the database {path} has version {version}, this program {len(MIGRATIONS)}: use a newer program")
    if (version or found) and not found >= (OWN_COLUMNS if version else FASTAPI_COLUMNS):
        raise Failure(f"{path} is a database of another program: name another file with --db")
    return version


def describe_database(path):
    """Return the DatabaseInfo of a database without any change to it; raise Failure if it cannot be used."""
    with _database_errors(path):
        writable = _find_file(path, create=False)
        with contextlib.closing(_connect(path, writable=False)) as db:
            version, tokens = _check_version(db, path), db.execute("SELECT count(*) FROM tokens").fetchone()[0]
        return DatabaseInfo(version, tokens, writable, os.stat(path).st_mode & 0o777)


def _use_wal(db, timeout):
    """Let readers and a writer work side by side, if the file system can."""
    deadline = time.monotonic() + timeout
    while True:     # SQLite itself does not wait here for others that open a new database
        try:
            return db.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _insert(db, **row):
    db.execute(f"INSERT INTO tokens ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", list(row.values()))


def _select(db, condition="1", *values):
    """Return the tokens that meet a condition, by user and name."""
    rows = db.execute(f"SELECT {', '.join(Token._fields)} FROM tokens WHERE {condition} ORDER BY user, name", values)
    return list(map(Token._make, rows))


def _import_fastapi_tokens(db):
    """Replace the FastAPI gateway's table. Times are Unix seconds or ISO texts: naive is UTC, an unreadable one now."""
    unit = "CASE typeof({0}) WHEN 'text' THEN '+0 days' ELSE 'unixepoch' END"
    seconds = f"ifnull(max(0, CAST(strftime('%s', {{0}}, {unit}) AS INTEGER)), strftime('%s', 'now'))".format
    db.text_factory = functools.partial(str, encoding="utf-8", errors="surrogateescape")    # some may not be UTF-8
    taken = set()
    for user, base, secret, created_at, expires_at in db.execute(
            f"""SELECT CAST(coalesce(nullif(user, ''), user_id, '') AS TEXT), CAST(ifnull(api_name, '') AS TEXT),
            CAST(token AS TEXT), {seconds("created_at")}, CASE WHEN expires_at != '' THEN {seconds("expires_at")} END
            FROM fastapi_tokens WHERE length(token) > 0 ORDER BY id"""):
        user, base = (_printable(text).lstrip("- ")[:NAME_LENGTH].rstrip() or "unnamed" for text in (user, base))
        names = itertools.chain([base], (f"{base[:NAME_LENGTH - 12]}-{number}" for number in itertools.count(2)))
        name = next(name for name in names if (user, name) not in taken)
        if secret not in taken:
            taken.update((secret, (user, name)))
            _insert(db, user=user, name=name, created_at=created_at, expires_at=expires_at, **_stored(secret))
    db.execute("DROP TABLE fastapi_tokens")


def _upgrade(db):
    """Bring the database to the newest version, even if others are doing the same."""
    with db:
        db.execute("BEGIN IMMEDIATE")
        version, = db.execute("PRAGMA user_version").fetchone()
        is_fastapi = not version and db.execute("SELECT 1 FROM sqlite_master WHERE name = 'tokens'").fetchone()
        if is_fastapi:
            db.execute("ALTER TABLE tokens RENAME TO fastapi_tokens")
        for statement in itertools.chain.from_iterable(MIGRATIONS[version:]):
            db.execute(statement)
        if is_fastapi:
            _import_fastapi_tokens(db)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _scrub(db):
    """Rewrite the database, so that no page of it, free or live, nor its WAL, holds a clear token."""
    try:
        db.execute("PRAGMA secure_delete = ON")
        db.execute("VACUUM")
        if not db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:     # else others read: it stays owed
            db.execute("UPDATE state SET scrub_owed = 0")
    except sqlite3.OperationalError as error:
        LOG.warning("clear tokens of the FastAPI gateway stay in the database until it is opened again: %s", error)


def _empty_wal(db):
    """Move what was committed into the database file: SQLite would apply a -wal to any file that replaces it."""
    with contextlib.suppress(sqlite3.Error):    # if there are readers, the next writer does it
        db.execute("PRAGMA busy_timeout = 0")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _remove_wal(paths, files):
    """Remove the -wal and -shm of a replaced database: SQLite would apply them to the new one."""
    with contextlib.ExitStack() as stack:   # with a lock, or one gateway removes what another has just created
        with contextlib.suppress(OSError, ImportError):     # Windows has no such lock, and replaces no open file
            import fcntl
            folder = os.open(os.path.dirname(paths[0]), os.O_RDONLY)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)
        for path in paths[1:] if files[1:] == list(map(_identify, paths[1:])) else ():
            with contextlib.suppress(OSError):
                os.unlink(path)


def _map_wal_index(path, file, shm):
    """Map the header of a WAL index, 48 bytes of the -shm file that each commit changes; return b"" if that fails.

    See sqlite.org/walformat.html 2.1. A process that closes any descriptor of a file loses all its fcntl locks on it,
    and SQLite holds some on this one: so a process maps it once, and keeps the map until it has no connection.
    """
    with contextlib.suppress(OSError, ValueError), WAL_INDEXES_LOCK:
        if os.name == "posix" and (file, shm) not in WAL_INDEXES:
            descriptor = os.open(path + "-shm", os.O_RDONLY)    # stays open after an error, for the locks
            header = mmap.mmap(descriptor, 48, access=mmap.ACCESS_READ)
            weakref.finalize(header, os.close, descriptor).atexit = False
            WAL_INDEXES[file, _identify(descriptor)] = header
    return WAL_INDEXES.get((file, shm), b"")


class UsageRow(NamedTuple):
    """Measurements of the requests with one USAGE_KEY; tokens are None if Ollama reports none."""

    requests: int
    errors: int
    cancelled: int
    prompt_tokens: Optional[int]
    cached_tokens: Optional[int]        # of the prompt
    completion_tokens: Optional[int]
    seconds: float
    estimated_tokens: int               # of prompt and completion

    @classmethod
    def sum(cls, rows):
        """Return the sums by column; None counts as nothing, and the sum of None alone is None."""
        columns = ([number for number in column if number is not None] for column in zip(*rows))
        return cls._make(sum(numbers) if numbers else None for numbers in columns)

    def __sub__(self, other):
        return UsageRow._make([a if a is None or b is None else a - b for a, b in zip(self, other)])

    @property
    def tokens_used(self):
        """The tokens that a budget is charged: the cached part of a prompt costs no computation."""
        return (self.prompt_tokens or 0) - (self.cached_tokens or 0) + (self.completion_tokens or 0)


NO_USAGE = UsageRow(0, 0, 0, None, None, None, 0.0, 0)
USAGE_KEY = ("hour", "user", "name", "model", "route")
MEASURED = UsageRow._fields
TOKENS_USED = "ifnull(prompt_tokens, 0) - ifnull(cached_tokens, 0) + ifnull(completion_tokens, 0)"   # as UsageRow's
USAGE_BY = {"user": ("user",), "token": ("user", "name"), "model": ("model",), "day": ("day",)}


class TokenStore:
    """The database of tokens and usage, for threads and processes; each access first follows a replaced file."""

    def __init__(self, path, create=False):
        self.path, self.lock, self.timeout = os.path.abspath(path), threading.Lock(), BUSY_SECONDS
        self._open(create)

    def close(self):
        self._db.close()
        self._wal_index = b""

    def connect(self):
        """Return a new connection that never waits, the identities of the files, and the WAL index; raise Failure."""
        with self._access():
            return _connect(self.path, self.writable, timeout=0), self.files, self._wal_index

    def _open(self, create=False):
        """Open the database, or make a new one, and upgrade an older one; raise Failure, and change none of others."""
        path = self.path
        with _database_errors(path), contextlib.ExitStack() as stack:
            writable = _find_file(path, create)
            # Of a read-only database only the file itself counts: other processes create and remove the -wal.
            file, paths = _identify(path), [path, path + "-wal", path + "-shm"] if writable else [path]
            self._check_files(file)
            db = stack.enter_context(contextlib.closing(_connect(path, writable, self.timeout)))
            version = _check_version(db, path)
            if version < len(MIGRATIONS) and not writable:
                raise Failure(f"the database {path} must be upgraded and is read-only: make it and its folder writable")
            if writable:
                for each in paths:      # SQLite keeps the mode of a -wal or -shm left behind
                    try:
                        if os.stat(each).st_mode & 0o077:
                            os.chmod(each, 0o600)
                    except OSError as error:
                        if error.errno != errno.ENOENT:
                            LOG.warning("others on this machine may read %s: %s", each, error)
                _use_wal(db, self.timeout)
                if version < len(MIGRATIONS):
                    _upgrade(db)
                if db.execute("SELECT scrub_owed FROM state").fetchone()[0]:
                    _scrub(db)
                _empty_wal(db)
            files = list(map(_identify, paths))
            self._check_files(file)
            stack.pop_all()
        self._db, self.writable, self._paths, self.files = db, writable, paths, files
        self._wal_index = _map_wal_index(path, file, files[2]) if writable else b""

    def _check_files(self, file):
        """Raise Failure if the file was replaced, or if a connection of this process still has another -shm.

        SQLite would share that one, even if it has been removed, and empty a -wal that other processes write to.
        """
        shm = _identify(self.path + "-shm")
        if _identify(self.path) != file or any(known == file and other != shm for known, other in list(WAL_INDEXES)):
            raise Failure(f"the database {self.path} was replaced while it was opened: try again")

    def _reopen_if_replaced(self):
        """Reopen the database if it was replaced; raise Failure while it is missing or cannot be used."""
        found = list(map(_identify, self._paths))
        if not found[0]:
            raise Failure(f"the database {self.path} is gone: move it, or a copy of it, back there")
        if found != self.files:
            if found[0] != self.files[0]:
                _remove_wal(self._paths, self.files)
            self.files = [None]     # even if the old file comes back
            self.close()
            self._open()
            LOG.warning("the database %s was replaced: using the new file", self.path)

    @contextlib.contextmanager
    def _access(self, write=False):
        """Hold a transaction; raise Failure if the database cannot be used, or was replaced during a change."""
        with self.lock, _database_errors(self.path):
            self._reopen_if_replaced()
            if write and not self.writable:
                raise Failure(f"the database {self.path} is read-only: first make it and its folder writable")
            self._db.rollback()     # a commit may have failed, and Python 3.8 leaves its transaction open
            self._db.execute(f"PRAGMA busy_timeout = {int(self.timeout * 1000)}")
            with self._db:
                self._db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                yield self._db
            if write and list(map(_identify, self._paths)) != self.files:
                raise Failure(f"the database {self.path} was replaced meanwhile: repeat the change if it was not saved")
            if write:
                _empty_wal(self._db)

    def _get(self, db, user, name):
        owner = check_name("user", user), check_name("name", name)
        for token in _select(db, "user = ? AND name = ?", *owner):
            return token
        raise Failure(f'no token "{user}/{name}" in {self.path}: see "token list"', "no_such_token")

    def create(self, user, name, admin=False, **columns):
        """Make a token; return it and its secret, which is not stored. columns: expires_at and those of LIMITS."""
        owner = check_name("user", user), check_name("name", name)
        check_rights(*owner, admin, columns.get("models"))
        secret = SECRET_PREFIX + secrets.token_urlsafe(32)
        with self._access(write=True) as db:
            if _select(db, "user = ? AND name = ?", *owner):
                raise token_exists(user, name)
            _insert(db, user=user, name=name, created_at=int(time.time()), admin=admin, **_stored(secret), **columns)
            return self._get(db, user, name), secret

    def rotate(self, user, name):
        """Give a token a new secret and return both; the old secret stops working."""
        secret = SECRET_PREFIX + secrets.token_urlsafe(32)
        return self.update(user, name, **_stored(secret)), secret

    def update(self, user, name, **changes):
        """Change columns of a token: expires_at, admin or limits; return the token."""
        with self._access(write=True) as db:
            token = self._get(db, user, name)._replace(**changes)
            check_rights(user, name, token.admin, token.models)
            for column, value in changes.items():
                db.execute(f"UPDATE tokens SET {column} = ? WHERE id = ?", (value, token.id))
            return token

    def delete(self, user, name):
        """Delete a token and return it."""
        with self._access(write=True) as db:
            token = self._get(db, user, name)
            db.execute("DELETE FROM tokens WHERE id = ?", (token.id,))
            return token

    def get(self, token_id):
        """Return the token with an id."""
        with self._access() as db:
            for token in _select(db, "id = ?", token_id):
                return token
        raise Failure(f"no token has the number {token_id}", "no_such_token")

    def list(self, user=None):
        """Return the tokens of a user or of all, by user and name."""
        with self._access() as db:
            return _select(db, "? IN (user, '')", "" if user is None else check_name("user", user))

    def import_rows(self, rows):
        """Add exported tokens, all or none; an identical one is no change. Return how many were new."""
        added = 0
        with self._access(write=True) as db:
            for row in rows:
                known = _select(db, "user = ? AND name = ? OR digest = ?", row["user"], row["name"], row["digest"])
                if any(token._replace(**{**row, "last_used_at": token.last_used_at}) != token for token in known):
                    raise Failure(f'the token "{row["user"]}/{row["name"]}" clashes with one in {self.path}: '
                                  "nothing was imported; delete or rename one of them first")
                if not known:
                    _insert(db, **row)
                    added += 1
        return added

    def add_usage(self, rows, uses):
        """Add {USAGE_KEY's values: UsageRow} to the usage, and set when tokens were last used: {id: Unix seconds}."""
        columns = USAGE_KEY + MEASURED
        sums = ", ".join(f"{name} = coalesce({name} + excluded.{name}, {name}, excluded.{name})" for name in MEASURED)
        with self._access(write=True) as db:
            db.executemany(f"INSERT INTO usage ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) "
                           f"ON CONFLICT ({', '.join(USAGE_KEY)}) DO UPDATE SET {sums}",
                           [(*key, *row) for key, row in rows.items()])
            db.executemany("UPDATE tokens SET last_used_at = ? WHERE id = ? AND ifnull(last_used_at, 0) < ?",
                           [(when, token_id, when) for token_id, when in uses.items()])

    def usage(self, by, since, token=None):
        """Return the usage since the start of an hour, of a token or of all: a dictionary for each value of `by`."""
        keys, owner = USAGE_BY[by], (token.user, token.name) if token else ()
        sums = ", ".join("round(sum(seconds), 3)" if column == "seconds" else f"sum({column})" for column in MEASURED)
        query = (f"SELECT {', '.join(keys)}, {sums} FROM (SELECT *, date(hour, 'unixepoch') AS day FROM usage "
                 f"WHERE {'user = ? AND name = ? AND ' if owner else ''}hour >= ?) "
                 f"GROUP BY {', '.join(keys)} ORDER BY {'day' if by == 'day' else f'sum({TOKENS_USED}) DESC, 1'}")
        with self._access() as db:
            return [dict(zip(keys + MEASURED, row)) for row in db.execute(query, (*owner, since))]


class TokenCache:
    """All tokens by digest, in memory, as new as the last commit of any process.

    A lookup queries SQLite, which costs 42 µs of CPU with 8 threads, only if the file's device and inode or the header
    of its WAL index have changed, every RECHECK_SECONDS, and without a WAL index. Tokens are read again only if their
    generation has changed. While the database is locked, the old tokens count; while it is unusable, a lookup fails.
    """

    def __init__(self, store):
        self._store, self._path, self._lock = store, store.path, threading.Lock()
        self._db, self._files, self._header, self._checked_at, self._complaint = None, [None], b"", 0.0, ""
        self._refresh(None)

    def lookup(self, secret):
        """Return the token of a secret, expired or not, or None; raise Failure while the database cannot be read."""
        file, header, now = _identify(self._path), self._wal_index[:], time.monotonic()
        if (file != self._files[0] or self._files is not self._store.files
                or not header or header != self._header or now - self._checked_at > RECHECK_SECONDS):
            with self._lock:
                self._update(file, header, now)
        return self._tokens.get(digest_of(secret))

    def _update(self, file, header, now):
        """Update the tokens unless the database is locked; raise Failure, logged once, if it is unusable."""
        try:
            self._refresh(file)
        except Failure as error:
            if "locked" in str(error.__cause__) and self._files[0]:
                return
            self._files = [None]    # connect again
            if str(error) != self._complaint:
                LOG.error("requests are refused, because tokens cannot be checked: %s", error)
            self._complaint = str(error)
            raise
        self._header, self._checked_at = header, now
        if self._complaint:
            LOG.warning("the database %s is readable again: requests are served", self._path)
            self._complaint = ""

    def _refresh(self, file):
        """Connect to a replaced file, and read the tokens if they have changed."""
        with _database_errors(self._path):
            files = self._files
            if file != files[0] or files is not self._store.files:
                self._files, self._generation = [None], None
                with self._store.lock:  # not while the store opens a connection: that would share a removed -shm
                    self.close()
                self._db, files, self._wal_index = self._store.connect()
            generation = self._db.execute("SELECT generation FROM state").fetchone()
            if generation != self._generation:
                self._tokens = {token.digest: token for token in _select(self._db)}
                self._generation = generation   # of before: the tokens may be newer, never older
            self._files = files

    def tokens_used_on(self, token, day):
        """Return the tokens charged to a token's budget on a UTC day, as stored; raise Failure."""
        with self._lock, _database_errors(self._path):
            return self._db.execute(
                f"SELECT ifnull(sum({TOKENS_USED}), 0) FROM usage WHERE user = ? AND name = ? AND hour BETWEEN ? AND ?",
                (token.user, token.name, day * DAY, (day + 1) * DAY - 1)).fetchone()[0]

    def close(self):
        if self._db:
            self._db.close()
        self._wal_index = b""   # after the connection: see _map_wal_index

# == Server ===================================================================


class ClientConnection(Connection):
    """A client's connection. As `cancel_on` it ends a wait when the client leaves or the server aborts its requests."""

    token_id = None             # of the current request's valid token; 0 when the last piece of the response is sent
    waits_for_client = False    # the current request has waited until its client took or sent more

    def wait(self, events, deadline, cancel_on=None):
        """Wait for events and return them; raise Refusal if the server aborts its requests."""
        found = super().wait(events, deadline, cancel_on)
        if self.is_shut and events & READABLE:  # a read would end TLS, and no response could be sent
            raise Refusal("stopping")
        return found

    def on_readable(self):
        """Raise ClientLeft if the client closed its side; keep a pipelined request for later."""
        if self.is_shut:
            raise Refusal("stopping")
        if len(self.buffer) >= PIPELINED_BYTES or not self.alive():
            raise ClientLeft("the client hung up")

    def until_writable(self, deadline, cancel_on):
        """Wait for a slow reader; raise ClientLeft if it hung up."""
        self.waits_for_client = True
        if self.wait(WRITABLE | HUNG_UP, deadline, cancel_on) & HUNG_UP:
            raise ClientLeft("the client hung up")

    def discard_rest(self):
        """Discard what a refused client still sends: closing with unread data would reset the response."""
        aborted, self.is_shut, self.waits_for_client = self.is_shut, False, True
        deadline, left = Deadline(ABORT_SECONDS / 2 if aborted else DRAIN_SECONDS), DRAIN_BYTES
        with contextlib.suppress(OSError, Refusal):
            self.sock.shutdown(socket.SHUT_WR)
            while left > 0 and (self.fill(deadline) or aborted):
                left -= len(self.buffer)
                if not self.buffer:     # after SHUT_RD: nothing has arrived
                    time.sleep(0.02)
                self.buffer = b""


class ConnectionLimiter:
    """Limits the open connections: idle until the head of a request is there, then active until its response ends."""

    def __init__(self, most, trusted=()):
        self.most, self._trusted = most, trusted
        self._share = max(most // 4, 1)     # of a network's connections without a request, and of a token's requests
        self._idle = OrderedDict()          # {connection: its network until its first request, then None}, oldest first
        self._active = {}                   # {connection: True}, oldest first
        self.stopping = self._aborting = False      # no connection may have another request; drain() must not wait
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    def __len__(self):
        return len(self._idle) + len(self._active)

    def admit(self, connection, address):
        """Add a new connection, if need be in place of one of its network, or of any; return False if there is none."""
        proxied = any(address_of(address) in network for network in self._trusted)
        network, own = None if proxied else network_of(address), ()
        with self._lock:
            if network and len(self._idle) >= self._share:
                own = [other for other, found in self._idle.items() if found == network]
            if len(own) >= self._share:
                self._end(own[0])
            elif len(self) >= self.most and not self.evict():
                return False
            self._idle[connection] = network
            return True

    def evict(self):
        """End the connection idle longest or, if none is, an active one that waits for its client without a token."""
        with self._lock:
            waiting = (other for other in self._active if other.waits_for_client and other.token_id is None)
            connection = next(itertools.chain(self._idle, waiting), None)
            if connection is not None:
                self._end(connection)
            return connection is not None

    def _end(self, connection):
        self.remove(connection)
        connection.shut_down()

    def mark_idle(self, connection):
        """Note that a connection waits for a request; return False if it must end."""
        with self._lock:
            if self._active.pop(connection, False):
                self._idle[connection] = None
            return connection in self._idle and not self.stopping

    def mark_active(self, connection):
        """Note that the head of a request has arrived; return False if the connection was evicted before."""
        with self._lock:
            if self._idle.pop(connection, False) is False:
                return False
            connection.token_id, connection.waits_for_client = None, False
            self._active[connection] = True
            return True

    def authenticate(self, connection, token_id):
        """Note the token of a connection's request; raise Refusal if it has a quarter of all connections already."""
        if len(self._active) > self._share:
            if sum(other.token_id == token_id for other in list(self._active)) >= self._share:
                raise Refusal("too_many_at_once", f"this token may have {plural(self._share, 'request')} open, a "
                                                  "quarter of --max-connections: try again later")
        connection.token_id = token_id

    def remove(self, connection):
        with self._lock:
            self._idle.pop(connection, None)
            self._active.pop(connection, None)
            self._changed.notify_all()

    def drain(self, seconds):
        """Let active connections finish for some seconds, then abort them so that their clients see an error."""
        with self._lock:
            self.stopping = True
            for connection in list(self._idle):
                self._end(connection)
            deadline = time.monotonic() + seconds
            while self._active and not self._aborting and time.monotonic() < deadline:
                self._changed.wait(STOP_CHECK_SECONDS)
            for how in socket.SHUT_RD, socket.SHUT_RDWR:    # the first lets the connection's thread send an error
                for connection in self._active:
                    connection.shut_down(how)
                self._changed.wait_for(lambda: not self._active, ABORT_SECONDS)

    def abort_soon(self):
        """End the wait of drain() for active connections; safe in a signal handler."""
        self._aborting = True


def core_seconds():
    """Return {core: seconds that it was busy}: proc(5) lists user, nice, system, idle, iowait, irq, softirq, steal."""
    with open("/proc/stat", "rb") as stat:
        rows = [line.split() for line in stat if re.match(rb"cpu[0-9]", line)]
    return {int(name[3:]): (sum(map(int, ticks[:8])) - int(ticks[3]) - int(ticks[4])) / os.sysconf("SC_CLK_TCK")
            for name, *ticks in rows}


def stay_on_one_core():
    """Keep the process, as long as it lives, on the core that other processes use least; only Linux allows that.

    Its threads share the GIL, so they run one at a time; on several cores each handover of the GIL wakes another core.
    On two cores, clients without a pause got 1.5 times the responses; paced streams began after 1.5 ms instead of 2.5;
    beside two busy processes, clients got 1.1 times the responses (medians of four rounds each).
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    core, busy, own = None, {}, 0.0
    while len(cores) > 1:
        with contextlib.suppress(OSError, ValueError, LookupError):  # no descriptor, or no usual /proc/stat
            busy_before, own_before, busy, own = busy, own, core_seconds(), time.process_time()
            used = {number: busy[number] - busy_before.get(number, 0.0) for number in cores}
            if core is not None:
                used[core] -= own - own_before
            best = min(used, key=used.get)
            if core is None or used[core] > 2 * used[best] + AFFINITY_SECONDS / 5:
                core = best
            for thread in os.listdir("/proc/self/task"):    # each time: a thread inherits the core of its creator
                with contextlib.suppress(OSError):  # it has ended
                    os.sched_setaffinity(int(thread), {core})
        time.sleep(AFFINITY_SECONDS)


def client_failure(error, late):
    """Return the exception for an error in reading from a client: Refusal, with the text `late`, or ClientLeft."""
    if isinstance(error, Malformed):
        return Refusal(error.code, str(error))
    return Refusal("too_slow", late) if is_late(error) else ClientLeft(str(error))


class ClientStream:
    """The client's side of a request; `head` has been read: bytes, or the exception that `read_request` raises."""

    extra_fields = tuple    # returns the fields of each response that CORS and the token's limits need, as of now
    keep_alive = False      # another request may follow on the connection
    pending = b""           # a head that waits for the first piece
    _framing = ""           # "chunked", "length", "open" (until the connection ends) or "none"
    _stream_type = ""       # the response's content type, if its body consists of lines
    _tail = b"\n\n"         # the last two bytes of the response's body
    body = BodyDecoder(None)    # until the head is parsed: all that arrives belongs to this request

    def __init__(self, server, connection, context, head):
        self.connection, self.context, self._server, self._head = connection, context, server, head

    def read_request(self):
        """Parse and return the request's head; raise Refusal or ClientLeft."""
        head, context = self._head, self.context
        if isinstance(head, Exception):
            raise head
        try:
            parse = parse_cached_request if len(head) <= CACHED_HEAD_BYTES else parse_request
            context.request = request = parse(head)
            given = request.fields.get("x-request-id")
            if given and REQUEST_ID.fullmatch(given):
                context.id = given
            self.body = BodyDecoder(*body_framing(request.fields, request.version, 0))
        except Malformed as error:
            raise Refusal(error.code, str(error)) from None
        self._expects_continue = "expect" in request.fields and request.version == "1.1"
        if self._expects_continue and request.fields["expect"].lower() != "100-continue":
            raise Refusal("unknown_expectation", "only 100-continue can be expected here")
        return request

    def read_body(self, cancel_on=None, deadline=None):
        """Return the next piece of the request's body, b"" at its end; raise Refusal if it is malformed or too slow."""
        try:
            if self._expects_continue and not self.body.complete and not self.connection.buffer:
                self.connection.send(b"HTTP/1.1 100 Continue\r\n\r\n", Deadline(SEND_SECONDS))
            self._expects_continue = False
            return self.body.read(self.connection, deadline or Deadline(BODY_SECONDS), cancel_on)
        except (Malformed, OSError) as error:
            late = (f"the body took longer than {PAGE_BODY_SECONDS:g} s" if deadline else
                    f"nothing of the body arrived for {BODY_SECONDS:g} s")
            raise client_failure(error, late) from None

    def read_whole_body(self, page=False):
        """Return the request's body, for a with block; raise Refusal. One for our own pages has smaller limits."""
        if self.body.complete:
            return BufferedBody(declared="content-length" in self.context.request.fields)
        most, flag = (PAGE_BODY_BYTES, "") if page else (self._server.settings.max_body, " (--max-body)")
        deadline = Deadline(PAGE_BODY_SECONDS) if page else None
        piece = self.read_body(deadline=deadline) if self.body.left <= most else b""
        if self.body.complete and len(piece) <= min(RECEIVE_BYTES, most):
            return BufferedBody(piece)
        with contextlib.ExitStack() as stack:
            body = stack.enter_context(BufferedBody(bytearray(), storage=self._server.storage))
            body.append(piece)
            while body.size + self.body.left <= most:
                if self.body.complete:
                    stack.pop_all()
                    return body
                body.append(self.read_body(deadline=deadline))
        raise Refusal("body_too_large", f"the body is larger than {most} bytes{flag}")

    def start(self, status, phrase, lines, content_type, length=None):
        """Begin the response, with its own fields as lines; without a length, its body ends with the last `write`."""
        request, bodiless = self.context.request, status in (204, 304)
        framing = "length" if length is not None else "chunked" if request.version == "1.1" else "open"
        self._framing = "none" if bodiless or request and request.method == "HEAD" else framing
        self.keep_alive = self.body.complete and not (request.closes or self._server.connections.stopping)
        head = f"HTTP/1.1 {status} {phrase}\r\n{lines}X-Request-Id: {self.context.id}\r\n"
        if content_type.startswith(STREAM_TYPES):
            self._stream_type = content_type
            head += "X-Accel-Buffering: no\r\n"  # or an nginx in front of the gateway holds pieces back
        for name, value in self.extra_fields():
            head += f"{name}: {value}\r\n"
        if length is not None and not bodiless:
            head += f"Content-Length: {length}\r\n"
        elif self._framing == "chunked":
            head += "Transfer-Encoding: chunked\r\n"
        self.pending = (head + ("\r\n" if self.keep_alive else "Connection: close\r\n\r\n")).encode("latin-1")
        self.context.status = status

    def write(self, piece, last=False):
        """Send a piece of the response at once; the last one ends it. Raise ClientLeft if it cannot be sent."""
        data, self.pending = self.pending, b""
        if self._framing != "none":
            data += encode_chunk(piece, last) if self._framing == "chunked" else piece
            self._tail = (self._tail + piece[-2:])[-2:]
            self.context.bytes_sent += len(piece)
        if last and self.connection.token_id:   # a client that has read it may send its next request at once
            self.connection.token_id = 0
        if data:
            try:
                self.connection.send(data, Deadline(SEND_SECONDS))
            except OSError as error:
                raise ClientLeft(str(error)) from None
            if self.context.first_byte_at is None:
                self.context.first_byte_at = time.monotonic()

    def answer(self, status, content_type, body, fields=()):
        """Send a whole response of the gateway's own."""
        about = [("Content-Type", content_type), ("X-Content-Type-Options", "nosniff")] if body else []
        own = [("Date", email.utils.formatdate(usegmt=True)), *fields, *about]
        lines = "".join(f"{name}: {value}\r\n" for name, value in own)
        self.start(status, http.HTTPStatus(status).phrase, lines, content_type, len(body))
        self.write(body, last=True)

    def refuse(self, refusal, reason=None):
        """Send a refusal; if a response has begun, end it with an error so that it does not look complete."""
        self.context.refusal_code, self.context.reason = refusal.code, str(refusal) if reason is None else reason
        dialect = dialect_of(self.context.request.path) if self.context.request else "ollama"
        error = json.dumps(refusal.body_for(dialect)).encode()
        try:
            if self.context.first_byte_at is None:
                return self.answer(refusal.status, "application/json", error + b"\n", refusal.fields)
            self.context.outcome = "broken"
            if self._stream_type and self._framing in ("chunked", "open"):
                events = self._stream_type.startswith("text/event-stream")
                if events:
                    error = b"event: error\n" * (dialect == "anthropic") + b"data: " + error + b"\n"
                line_ends = len(self._tail) - len(self._tail.rstrip(b"\n"))     # an open line or event is ended first
                self.write(b"\n" * (1 + events - line_ends) + error + b"\n")
        except ClientLeft:
            self.context.outcome = "left"
        self.abort()

    def abort(self):
        """Close the connection before the response's end; reset it where a normal close would look like the end."""
        self.keep_alive = False
        if self._framing == "open" or self.context.outcome == "left":
            self.connection.reset()
        self.connection.close()


class GatewayServer(http.server.ThreadingHTTPServer):
    """Accepts connections and serves each in its own thread, from the TLS handshake on."""

    request_queue_size = BACKLOG
    allow_reuse_address = os.name == "posix"  # on Windows it would let another program steal the port
    BUSY_RESPONSE = (b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\n"
                     b"Connection: close\r\nContent-Length: 47\r\n\r\n"
                     b'{"error": "too many connections: retry later"}\n')

    def __init__(self, settings, gateway, tls):
        self.address_family, *_, address = look_up(settings.host, settings.port, socket.AI_PASSIVE)[0]
        self.settings, self.gateway, self.connections, self.tls = settings, gateway, gateway.connections, tls
        self.storage = BodyStorage(settings.max_spool)
        self._next_id = map((secrets.token_hex(4) + "%08x").__mod__, itertools.count()).__next__    # ids of requests
        self._rejecting = deque()   # (connection, when to close it)
        self._starved_at = self._warned_at = -math.inf      # when descriptors ran out, and the last warning of that
        super().__init__(address, None)
        host, port = self.server_address[:2]
        name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        self.url = f"{'https' if tls else 'http'}://{name}:{port}"

    def server_bind(self):
        """Bind without http.server's lookup of the host's name; :: accepts IPv4 too."""
        with contextlib.suppress(OSError):      # the address is of IPv4
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        set_tcp_options(self.socket)
        socketserver.TCPServer.server_bind(self)

    def get_request(self):
        """Accept a connection; without descriptors or memory, evict one and back off: the listener stays readable."""
        try:
            accepted, address = super().get_request()
            return ClientConnection(accepted), address
        except OSError as error:
            if error.errno in (*OUT_OF_DESCRIPTORS, errno.ENOBUFS, errno.ENOMEM):
                self._starved_at = time.monotonic()
                if not self.connections.evict():
                    self.gateway.upstream.close()
                time.sleep(0.05)
            raise

    def process_request(self, request, client_address):
        """Start a thread for a new connection; at the limit answer 503 without a thread."""
        if self.connections.admit(request, client_address[0]):
            with contextlib.suppress(RuntimeError):     # no thread could be started
                return super().process_request(request, client_address)
        if self.tls:
            return self.shutdown_request(request)   # a response would cost a handshake
        with contextlib.suppress(OSError):
            request.sock.send(self.BUSY_RESPONSE)  # fits the buffer of a new socket
            request.sock.shutdown(socket.SHUT_WR)
        self._rejecting.append((request, time.monotonic() + REJECT_SECONDS))    # a reset now could lose the response

    def service_actions(self):
        """Close rejected connections in time, and warn of a lack of descriptors; called at least twice a second."""
        while self._rejecting and (len(self._rejecting) > MAX_REJECTING or self._rejecting[0][1] < time.monotonic()):
            self.shutdown_request(self._rejecting.popleft()[0])
        if self._starved_at > self._warned_at + MINUTE:
            self._warned_at = self._starved_at
            LOG.warning("out of file descriptors: raise the limit (ulimit -n, or LimitNOFILE= of the systemd unit) or "
                        "lower --max-connections (now %d)", self.connections.most)

    def finish_request(self, request, client_address):
        """Serve a connection in its own thread, until it ends or there is nothing to answer."""
        timeout = self.settings.header_timeout
        with contextlib.suppress(OSError, Refusal):
            if self.tls:
                request.start_tls(self.tls, Deadline(timeout), server_side=True)
            while self._serve_request(request, client_address[0], timeout):
                timeout = self.settings.idle_timeout
        request.close(notify=True)

    def _serve_request(self, connection, address, timeout):
        """Wait for a request and serve it; return whether another one may follow. An eviction ends it silently."""
        if not self.connections.mark_idle(connection) or not (connection.buffer or connection.fill(Deadline(timeout))):
            return False
        context = RequestContext(address, time.monotonic())
        context.id = self._next_id()
        try:
            head = read_head(connection, Deadline(self.settings.header_timeout))
        except (Malformed, OSError) as error:
            head = client_failure(error, f"the headers took longer than {self.settings.header_timeout:g} s")
        if not self.connections.mark_active(connection):
            return False
        client = ClientStream(self, connection, context, head)
        self.gateway.serve(client)
        if context.refusal_code == "no_descriptors":
            self._starved_at = time.monotonic()
        if not client.body.complete:
            connection.discard_rest()
        return client.keep_alive

    def shutdown_request(self, request):
        """Close a connection; after a signal to stop, its thread may have started and closes it."""
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            self.connections.remove(request)
            request.close()

    def server_close(self, seconds=0):
        """Stop listening, let running requests finish for some seconds, and stop the gateway's background threads."""
        super().server_close()
        self.connections.drain(seconds)
        for connection, _ in self._rejecting:
            connection.close()
        self.gateway.close()

# == Routing and access =======================================================

ROUTES = (
    Route("GET", "/", "public", "page", "health check for Ollama's clients", handler="banner"),
    Route("GET", "/health", "public", "page", "state of the gateway and of Ollama", handler="health"),
    Route("GET", "/me", "token", "page", "the token, what is left of its limits, and its usage", handler="me"),
    Route("GET", "/metrics", "admin", "page", "metrics for Prometheus", handler="metrics"),
    Route("GET", "/docs", "public", "page", "documentation, with a console", handler="docs"),
    Route("GET", "/openapi.json", "public", "page", "this API as an OpenAPI document", handler="openapi"),
    Route("GET", "/admin", "public", "page", "admin page", handler="admin"),
    Route("GET", "/admin/status", "admin", "page", "running and queued requests, state of Ollama", handler="status"),
    Route("GET", "/admin/usage", "admin", "page", "usage by user, token, model or day", handler="usage"),
    Route("GET", "/admin/tokens", "admin", "page", "list the tokens", handler="list_tokens"),
    Route("POST", "/admin/tokens", "admin", "page", "create a token and its secret", handler="create_token"),
    Route("GET", "/admin/tokens/{id}", "admin", "page", "show a token", handler="show_token"),
    Route("PATCH", "/admin/tokens/{id}", "admin", "page", "change a token; null lifts a limit", handler="update_token"),
    Route("DELETE", "/admin/tokens/{id}", "admin", "page", "delete a token", handler="delete_token"),
    Route("POST", "/admin/tokens/{id}/rotate", "admin", "page", "give a token a new secret", handler="rotate_token"),
    Route("GET", "/api/version", "token", "read", "Ollama's version"),
    Route("GET", "/api/status", "token", "read", "Ollama's state"),
    Route("GET", "/api/tags", "token", "read", "list the models", model_list_key="models"),
    Route("GET", "/api/ps", "token", "read", "list the loaded models", model_list_key="models"),
    Route("POST", "/api/show", "token", "read", "show a model", "json"),
    Route("GET", "/api/experimental/model-recommendations", "token", "read", "models that Ollama recommends"),
    Route("GET", "/v1/models", "token", "read", "list the models", model_list_key="data"),
    Route("GET", "/v1/models/{model}", "token", "read", "show a model", "path"),
    Route("POST", "/api/generate", "token", "inference", "continue a prompt", "json"),
    Route("POST", "/api/chat", "token", "inference", "continue a conversation", "json"),
    Route("POST", "/api/embed", "token", "inference", "embed texts", "json"),
    Route("POST", "/api/embeddings", "token", "inference", "embed a text (superseded by /api/embed)", "json"),
    Route("POST", "/v1/chat/completions", "token", "inference", "continue a conversation", "json"),
    Route("POST", "/v1/completions", "token", "inference", "continue a prompt", "json"),
    Route("POST", "/v1/embeddings", "token", "inference", "embed texts", "json"),
    Route("POST", "/v1/responses", "token", "inference", "continue a conversation (OpenAI Responses)", "json"),
    Route("POST", "/v1/messages", "token", "inference", "continue a conversation (Anthropic Messages)", "json"),
    Route("POST", "/v1/audio/transcriptions", "token", "inference", "transcribe speech", "form"),
    Route("POST", "/api/pull", "admin", "model", "download a model from a registry", "json"),
    Route("POST", "/api/push", "admin", "model", "upload a model to a registry", "json"),
    Route("POST", "/api/create", "admin", "model", "create a model from another one, or from files", "json"),
    Route("POST", "/api/copy", "admin", "model", "copy a model to a second name"),
    Route("DELETE", "/api/delete", "admin", "model", "delete a model", "json"),
    Route("POST", "/api/blobs/{digest}", "admin", "model", "upload a file for a model", streamed=True),
    Route("HEAD", "/api/blobs/{digest}", "admin", "model", "check whether a file exists"),
    Route("POST", "/api/me", "admin", "account", "show the host's ollama.com account"),
    Route("POST", "/api/signout", "admin", "account", "sign the host out of its ollama.com account"),
    Route("DELETE", "/api/user/keys/{key}", "admin", "account", "remove a key from the host's ollama.com account"),
    Route("POST", "/api/experimental/web_search", "admin", "account", "search the web with the host's account"),
    Route("POST", "/api/experimental/web_fetch", "admin", "account", "fetch a page with the host's account"),
)
PREFLIGHT = Route("OPTIONS", "*", "public", "page", handler="preflight")
SEGMENTS = {
    "id": "[1-9][0-9]{0,17}",
    "digest": "sha256[:-][0-9a-f]{64}",
    "key": "[A-Za-z0-9_=-]+",
    "model": "{0}(?:%2[Ff]{0})*".format("(?![.])(?:[A-Za-z0-9._:@~-]|%3[Aa])+"),
}

FOR_ADMINS = {"model": "changes models", "account": "acts as the owner's ollama.com account",
              "page": "is for administrators of the gateway"}
USAGE_ON_REQUEST = ("/v1/chat/completions", "/v1/completions")  # streams report usage only if stream_options ask for it


def served_routes(metrics_open=False, no_admin_api=False):
    """Return the routes that a gateway with these settings serves."""
    routes = [route for route in ROUTES if not (no_admin_api and route.path.startswith("/admin"))]
    return [route._replace(access="public") if route.path == "/metrics" and metrics_open else route for route in routes]


def at_base(path, base):
    """Return the path at which clients find a path of the table."""
    return base + path[len("/api"):] if path.startswith("/api/") else path


def path_pattern(path):
    """Return a regular expression for a path with a segment; its group is the segment."""
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda match: f"({SEGMENTS[match[1]]})", re.escape(path)))


class Router:
    """Finds the route of a request. Paths are compared as sent; a path that is not in the table is refused."""

    def __init__(self, routes, base="/api", path_tokens=False, cors_origins=()):
        self._path_tokens, self._cors_origins = path_tokens, cors_origins
        self._plain = self._table(routes, (base,))
        self._behind_token = self._table(routes, (base, "/api")) if path_tokens else None

    @staticmethod
    def _table(routes, bases):
        """Return ({path: {method: route}}, [(pattern, {method: route})]) with /api at each base; own pages win."""
        pages, others = {}, {}
        for route in routes:
            for base in bases:
                methods = (pages if route.category == "page" else others).setdefault(at_base(route.path, base), {})
                methods[route.method] = route
        found = {**pages, **others, **pages}    # own pages stand first, and replace others
        return ({path: methods for path, methods in found.items() if "{" not in path},
                [(path_pattern(path), methods) for path, methods in found.items() if "{" in path])

    def match(self, request):
        """Return the request without a token in its path, its route, and its path upstream; raise Refusal."""
        exact, patterns = self._plain
        behind_token = PATH_TOKEN.fullmatch(request.path) if self._path_tokens else None
        if behind_token:
            exact, patterns = self._behind_token
            request = request._replace(path_secret=behind_token[1], path=behind_token[2])
        if request.method == "OPTIONS":
            return request, PREFLIGHT, ""
        methods, segment = exact.get(request.path), ""
        for pattern, candidates in patterns if methods is None else ():
            found = pattern.fullmatch(request.path)
            if found:
                methods, segment = candidates, found[1]
                break
        if methods is None:
            raise Refusal("unknown_route")
        method = "GET" if request.method == "HEAD" and "HEAD" not in methods else request.method
        if method not in methods:
            allowed = ", ".join(sorted({*methods, "OPTIONS", *(["HEAD"] if "GET" in methods else [])}))
            raise Refusal("wrong_method", f"this path takes {allowed}", [("Allow", allowed)])
        route = methods[method]
        return request, route, re.sub(r"\{\w+\}", lambda _: segment, route.path) if segment else route.path

    def cors_fields(self, request):
        """Return the fields that let a page of a configured origin read the response (Fetch 3.2)."""
        if not self._cors_origins:
            return ()
        origin = request.fields.get("origin")
        if "*" not in self._cors_origins and origin not in self._cors_origins:
            return [("Vary", "Origin")]
        allowed = [("Access-Control-Allow-Origin", "*" if "*" in self._cors_origins else origin), ("Vary", "Origin"),
                   ("Access-Control-Expose-Headers",
                    "X-Request-Id, Retry-After, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset")]
        if request.method == "OPTIONS":
            headers = request.fields.get("access-control-request-headers")
            allowed += [("Access-Control-Allow-Methods", "GET, HEAD, POST, PATCH, DELETE"),
                        ("Access-Control-Max-Age", "7200")]
            if headers:     # any may be sent: only those that Ollama needs are forwarded
                allowed.append(("Access-Control-Allow-Headers", headers))
        return allowed


def authorize_route(context):
    """Raise Refusal if the token may not use the route, or the body is compressed and cannot be inspected."""
    route, token, encoding = context.route, context.token, context.request.fields.get("content-encoding")
    if encoding and encoding.lower() != "identity" and not token.admin:
        raise Refusal("encoded", f'the Content-Encoding of the body is "{encoding[:40]}": send it uncompressed')
    if route.access == "admin" and not token.admin:
        raise Refusal("forbidden", f"{route.path} {FOR_ADMINS[route.category]}: it takes an admin token")


def inspect_body(context, body):
    """Return the BodyInfo of a body as Ollama will read it; raise Refusal if it is unclear, except to an admin."""
    route = context.route
    try:
        if route.model_in == "path":
            return BodyInfo(urllib.parse.unquote(context.path.rpartition("/")[2]))
        if not route.model_in or not body.size:
            return BodyInfo()
        if route.model_in == "json":
            return body.inspect(inspect_json, route.path in USAGE_ON_REQUEST)
        if context.request.query:   # net/http looks there first for the fields of a form
            raise AmbiguousBody("there is a query beside the form")
        return body.inspect(inspect_form, context.request.fields.get("content-type", ""))
    except AmbiguousBody as error:
        if context.token.admin:
            return BodyInfo()
        raise Refusal(error.code, f"the model in the body cannot be determined: {error}") from None


def authorize_model(context):
    """Raise Refusal for a model that is not in the token's list or, without a list, is a cloud model."""
    model, token = context.model, context.token
    if not context.route.model_in or token.admin:
        return
    if token.models is None:
        if is_cloud_model(model):
            raise Refusal("forbidden", f"{model} runs on the owner's ollama.com account: it takes an admin token, "
                                       "or one with the model in its list")
    elif not model:
        raise Refusal("malformed", f"the request names no model; this token may use {token.models}")
    elif not model_allowed(model, token.models):
        raise Refusal("forbidden", f'this token may not use the model "{model[:200]}", only {token.models}')

# == Authentication ===========================================================


def secret_of(request):
    """Return the secret in a request, "" for none; raise Refusal for several credentials."""
    bearer, secret = request.bearer, request.fields.get("x-api-key")
    if request.repeated and request.repeated & {"authorization", "x-api-key"}:
        raise Refusal("malformed", "there are two credentials of one kind")
    if request.path_secret is not None:
        if bearer is not None or secret is not None:
            raise Refusal("malformed", "there is a token in the path and another credential beside it")
        return request.path_secret
    if None not in (bearer, secret) and bearer != secret:
        raise Refusal("malformed", "Authorization and x-api-key differ")
    secret = bearer or secret or ""
    return secret if secret.isascii() else secret.encode("latin-1").decode("utf-8", "surrogateescape")


def client_address(peer, request, trusted_proxies):
    """Return the peer's address or, of a trusted proxy, the rightmost untrusted address in X-Forwarded-For."""
    if trusted_proxies and "x-forwarded-for" in request.fields:
        for entry in reversed(request.fields["x-forwarded-for"].split(",")):
            if not any(address_of(peer) in network for network in trusted_proxies):
                break
            try:
                peer = str(address_of(entry))
            except ValueError:
                break   # what stands before it is not from a trusted proxy
    return peer


class AuthThrottle:
    """Counts the failed credentials of each address: a leaky bucket."""

    def __init__(self, clock=time.monotonic):
        self._clock, self._lock = clock, threading.Lock()
        self._levels = OrderedDict()    # {network: (failures, time)}, the latest at the end

    def add(self, address):
        """Count a failure of an address (IPv6: of its /64) and return its present number of failures."""
        network, now = network_of(address), self._clock()
        with self._lock:
            level, when = self._levels.pop(network, (0, now))
            level = max(level - (now - when) / LEAK_SECONDS, 0) + 1
            self._levels[network] = min(level, MAX_FAILURES + 1), now
            while len(self._levels) > FAILING_ADDRESSES:
                self._levels.popitem(last=False)
        return level


class Authenticator:
    """Finds the token of a request."""

    def __init__(self, tokens, throttle, clock=time.time):
        self._tokens, self._throttle, self._clock = tokens, throttle, clock
        self._delays = threading.BoundedSemaphore(DELAYED_AT_ONCE)

    def identify(self, request, address):
        """Return the request's token; raise Refusal if none is valid now.

        An invalid secret counts against the address, and its refusal may be delayed.
        """
        secret = secret_of(request)
        token = self._tokens.lookup(secret) if secret else None
        if token is not None and (token.expires_at is None or self._clock() < token.expires_at):
            return token
        if secret:
            self._delay(address)
        text = 'no valid token: send "Authorization: Bearer TOKEN" or "x-api-key: TOKEN", or ask for a new one'
        if request.path_secret is not None:     # the ollama command shows the text of a 403, and hides that of a 401
            raise Refusal("forbidden", text)
        raise Refusal("unauthorized", text, [("WWW-Authenticate", "Bearer")])

    def _delay(self, address):
        failures = self._throttle.add(address)
        if failures <= FREE_FAILURES:
            return
        if failures > MAX_FAILURES or not self._delays.acquire(blocking=False):
            raise Refusal("too_many_failures")
        try:
            time.sleep(min(FAILED_DELAY, 0.05 * 2 ** (failures - FREE_FAILURES)))
        finally:
            self._delays.release()

    def close(self):
        self._tokens.close()

# == Limits and usage =========================================================


class LimitStatus(NamedTuple):
    """How much is left of one of a token's limits, and in how many seconds there is more."""

    name: str
    limit: int
    remaining: int
    reset: int


def check_limits(statuses):
    """Raise the Refusal of the first limit that is exhausted."""
    for name, limit, remaining, reset in statuses:
        if not remaining and name == "tokens_per_day":  # without X-Should-Retry SDKs sleep until midnight
            raise Refusal("budget_spent", f"this token's {limit} tokens a day are used up: try again after 00:00 UTC",
                          [("X-Should-Retry", "false")], reset)
        if not remaining:
            row = LIMIT_BY_COLUMN[name]
            raise Refusal(row.refusal, f"this token may have {row.phrase.format(plural(limit, 'request'))}: "
                                       f"try again in {reset} s", retry_after=reset)


class UsageLedger:
    """Collects usage in memory, stores it twice a second, and reports how much of a budget is used.

    A running request counts with the tokens that have passed so far: a crash loses one second at most. A request of
    a token with a budget is counted before its last piece is sent, all others by the Journal in the background.
    Where both locks are needed, _storing is taken first.
    """

    def __init__(self, store, tokens, clock=time.time):
        self._store, self._tokens, self._clock = store, tokens, clock
        store.timeout = LEDGER_BUSY_SECONDS    # while the database is locked, log lines are still to be written
        self._lock, self._storing = threading.Lock(), threading.Lock()
        self._running = {}      # {context: the UsageRow counted so far}, until the Journal has finished it
        self._pending = defaultdict(list)   # {USAGE_KEY: UsageRows} to be stored
        self._last_used = {}    # {token id: Unix seconds} to be stored
        self._spent = {}        # {(user, name): (day, tokens used, when they were read)}
        self._latest = 0        # time of the clock
        self._failing = False

    def start(self, context):
        """Count a request from now on."""
        with self._lock:
            self._running[context] = NO_USAGE

    def update(self, context):
        """Count the usage of a request so far."""
        with self._lock:
            self._count(context)

    def finish(self, context):
        """Count a request to its end, if it was started."""
        if context not in self._running:    # a limit or the queue refused it, or it is not for inference
            return
        with self._lock:
            cancelled = context.outcome == "left"
            failed = context.outcome == "broken" or (context.status or 500) >= 400  # no status: a fault of the gateway
            try:
                self._count(context, failed and not cancelled, cancelled)
            finally:
                del self._running[context]

    def _count(self, context, failed=False, cancelled=False):
        """Add the usage of a request since it was last counted."""
        token, hour = context.token, int(self.now()) // HOUR * HOUR
        seconds = (context.released_at or time.monotonic()) - context.sent_at if context.sent_at else 0.0
        *tokens, estimated = context.usage
        row = UsageRow(1, int(failed), int(cancelled), *tokens, seconds, estimated)
        before, self._running[context] = self._running[context], row
        new = row - before if before is not NO_USAGE else row
        key = hour, token.user, token.name, context.model_label, context.route.path
        self._pending[key].append(new)
        day, spent, read_at = self._spent.get((token.user, token.name), (None, 0, 0))
        if day == utc_day(hour):
            self._spent[token.user, token.name] = day, spent + new.tokens_used, read_at

    def running(self):
        """Return the contexts of the requests that are running or queued, the oldest first."""
        with self._lock:
            running = [context for context in self._running if context.released_at is None]
        return sorted(running, key=lambda context: context.started_at)

    def used(self, token_ids):
        """Note that tokens are in use."""
        with self._lock:
            self._last_used.update(dict.fromkeys(token_ids, int(self._clock())))

    def now(self):
        """Return Unix seconds. They stand still while the clock is set back by less than a day: no budget is refilled.

        A clock that goes back by more is followed: it was wrong before.
        """
        now, latest = self._clock(), self._latest
        self._latest = now if now <= latest - DAY else max(now, latest)
        if self._latest < latest:
            LOG.warning("the clock went back from %s to %s: days and budgets go back with it",
                        format_instant(int(latest)), format_instant(int(now)))
        return self._latest

    def day_left(self):
        """Return the seconds until the UTC day ends."""
        return (utc_day(self.now()) + 1) * DAY - int(self._clock())

    def spent(self, token):
        """Return the tokens of the day's budget that are used, 0 without a budget; raise Failure if they are unknown.

        Usage through other gateways on the same database is included a second later.
        """
        if not token.tokens_per_day:
            return 0
        now, key = self._clock(), (token.user, token.name)
        with self._lock:
            day = utc_day(self.now())
            known_day, spent, read_at = self._spent.get(key, (None, 0, 0))
            if known_day == day and (abs(now - read_at) < BUDGET_SECONDS or self._storing.locked()):
                return spent
        with self._storing, self._lock:     # each row is either pending or in the database
            try:
                stored = self._tokens.tokens_used_on(token, day)
            except Failure:
                if known_day != day:
                    raise
                return spent
            spent = stored + sum(row.tokens_used for (hour, *owner, _, _), rows in self._pending.items()
                                 if (*owner,) == key and utc_day(hour) == day for row in rows)
            self._spent[key] = day, spent, now
            return spent

    def store(self):
        """Store the pending rows; rows that cannot be stored are kept for the next time."""
        with self._storing:
            with self._lock:
                for context in self._running:
                    if context.model_label:
                        self._count(context)
                pending, self._pending = self._pending, defaultdict(list)
                last_used, self._last_used = self._last_used, {}
            sums, kept = {key: UsageRow.sum(rows) for key, rows in pending.items()}, {}
            try:
                if not self._store.writable:    # budgets still need the usage of today
                    today = utc_day(self.now()) * DAY
                    kept = {key: row for key, row in sums.items() if key[0] >= today}
                elif sums or last_used:
                    self._store.add_usage(sums, last_used)
                self._failing = False
            except Failure as error:
                kept, self._last_used = sums, {**last_used, **self._last_used}
                if not self._failing:
                    LOG.warning("usage and the tokens' last uses are not stored for now: %s", error)
                self._failing = True
            with self._lock:
                for key, row in kept.items():
                    self._pending[key].append(row)


class FairQueue:
    """Grants slots to requests, `size` at once (0: any number); the other requests wait.

    The next slot goes to the user who was granted one longest ago. Requests of one user keep their order.
    """

    def __init__(self, size, max_waiting, timeout):
        self._size, self._max_waiting, self._timeout = size, max_waiting, timeout
        self._lock = threading.Lock()
        self._queue = []        # the slots that wait, in the order of their arrival
        self._granted = {}      # {user: number of the last grant}, until no request is running or waiting
        self._numbers = itertools.count(1)
        self.running = 0

    @property
    def waiting(self):
        return len(self._queue)

    def enter(self, slot):
        """Grant a slot, or queue it; raise Refusal if too many requests of its user are waiting."""
        with self._lock:
            if self._size and (self._queue or self.running >= self._size):
                waiting = sum(other.user == slot.user for other in self._queue)
                if waiting >= self._max_waiting:
                    raise Refusal("queue_full", f"the server is busy, and {waiting} of your requests are waiting "
                                                "already (--max-queue): try again later")
                try:
                    slot.wakeup = Wakeup()
                except OSError:
                    raise Refusal("no_descriptors") from None
            self._queue.append(slot)
            self._grant()

    def wait(self, slot, cancel_on):
        """Wait until a slot is granted and return the seconds that took; raise Refusal or ClientLeft."""
        if slot.wakeup is None:
            return 0.0
        started = time.monotonic()
        try:
            slot.wakeup.wait(READABLE, Deadline(self._timeout), cancel_on)
            slot.wakeup.close()     # before the descriptor of the upstream connection is needed
        except TimeoutError:
            if not slot.granted:
                raise Refusal("queue_timeout", f"the server is busy: the request was queued for {self._timeout:g} s "
                                               "(--queue-timeout): try again later") from None
        return time.monotonic() - started

    def leave(self, slot):
        """Take back a slot, whether it was granted or still waits."""
        with self._lock:
            if slot.granted:
                self.running -= 1
                self._grant()
            else:
                self._queue.remove(slot)
            if not self.running and not self._queue:
                self._granted.clear()
        if slot.wakeup:
            slot.wakeup.close()

    def _grant(self):
        """Grant as many slots as are free."""
        while self._queue and (not self._size or self.running < self._size):
            slot = min(self._queue, key=lambda slot: self._granted.get(slot.user, 0))   # the first of equal ones
            self._queue.remove(slot)
            self._granted[slot.user] = next(self._numbers)
            slot.granted = True
            self.running += 1
            if slot.wakeup:
                slot.wakeup.set()


class TokenCounters:
    """The number of a token's running requests, and the times of those of the last minute."""

    __slots__ = ("running", "recent")

    def __init__(self):
        self.running, self.recent = 0, deque()


NO_REQUESTS = TokenCounters()


class Limiter:
    """Knows how much is left of each token's limits; `lock` guards `counters`."""

    def __init__(self, queue, ledger, clock=time.monotonic):
        self.queue, self.ledger, self.clock = queue, ledger, clock
        self.lock, self.counters = threading.Lock(), defaultdict(TokenCounters)     # by the token's id

    def budget(self, token):
        """Return a list with the LimitStatus of tokens_per_day, if the token has it; raise Refusal if it is unknown."""
        if not token.tokens_per_day:
            return []
        try:
            spent = self.ledger.spent(token)
        except Failure as error:
            raise Refusal("uncounted", f"the token's usage of today cannot be read: {error}") from None
        return [LimitStatus("tokens_per_day", token.tokens_per_day, max(token.tokens_per_day - spent, 0),
                            self.ledger.day_left())]

    def rates(self, token, counters, own=0, own_recent=0):
        """Return the LimitStatus of rpm and max_parallel; own, own_recent: counted requests that are to be ignored."""
        found, recent = [], counters.recent
        if token.rpm:
            now = self.clock()
            while recent and recent[0] <= now - MINUTE:
                recent.popleft()
            over = max(len(recent) - token.rpm, 0)  # the next one may come when this one is a minute old
            reset = math.ceil(recent[over] + MINUTE - now) if recent else 0
            found.append(LimitStatus("rpm", token.rpm, max(token.rpm - len(recent) + own_recent, 0), reset))
        if token.max_parallel:
            remaining = max(token.max_parallel - counters.running + own, 0)
            found.append(LimitStatus("max_parallel", token.max_parallel, remaining, RETRY_SECONDS))
        return found

    def statuses(self, token, own=0):
        """Return the LimitStatus of each limit of a token; raise Refusal if its usage is unknown."""
        budget = self.budget(token)     # takes the ledger's locks: never while the lock is held
        with self.lock:
            return self.rates(token, self.counters.get(token.id, NO_REQUESTS), own) + budget

    def fields(self, context):
        """Return the RateLimit fields of the limit nearest exhaustion, none without limits.

        The request itself does not count: it has ended when the client reads them.
        """
        token = context.token
        if not (token and (token.rpm or token.max_parallel or token.tokens_per_day)):
            return ()
        try:
            statuses = self.statuses(token, context.slot is not None)
        except Refusal:     # the response is sent although the usage is unknown
            return ()
        nearest = min(statuses, key=lambda status: status.remaining / status.limit)
        return (("RateLimit-Limit", nearest.limit), ("RateLimit-Remaining", nearest.remaining),
                ("RateLimit-Reset", nearest.reset))


class Slot:
    """A request's share of its token's limits and, after wait(), one of the requests upstream: a context manager."""

    __slots__ = ("_limiter", "context", "token", "user", "rate_time", "queued", "granted", "wakeup")

    def __init__(self, limiter, context):
        self._limiter, self.context = limiter, context
        self.token, self.user = context.token, context.token.user   # at the start: its counters are held
        self.rate_time = None   # the time at which the token's rate counts the request
        self.queued = False     # it entered the queue: granted or waiting
        self.granted = False
        self.wakeup = None      # if it has to wait

    def __enter__(self):
        """Count the request, before its body is read; raise Refusal if it exceeds a limit."""
        limiter, token = self._limiter, self.token
        budget = limiter.budget(token)
        with limiter.lock:
            counters = limiter.counters[token.id]
            check_limits(limiter.rates(token, counters) + budget)
            counters.running += 1
            if token.rpm:
                self.rate_time = limiter.clock()
                counters.recent.append(self.rate_time)
        self.context.slot = self
        return self

    def wait(self, cancel_on, check_again):
        """Wait until the request may go upstream; raise Refusal or ClientLeft.

        check_again: raises Refusal if the token has lost its rights meanwhile; it is called after a wait.
        """
        context, limiter = self.context, self._limiter
        budget = limiter.budget(context.token)
        with limiter.lock:      # while the body arrived, the budget may have been used up, or a limit lowered
            counters = limiter.counters[self.token.id]
            check_limits(limiter.rates(context.token, counters, 1, self.rate_time is not None) + budget)
        limiter.queue.enter(self)
        self.queued = True
        limiter.ledger.start(context)
        context.queue_seconds = limiter.queue.wait(self, cancel_on)
        if context.queue_seconds:
            check_again()
            check_limits(limiter.budget(context.token))
        context.sent_at = time.monotonic()

    def release(self):
        """Give the slot back, before the end of the with block.

        The request's usage counts for the budget from now on. A refused request does not count for the rate.
        """
        context, limiter = self.context, self._limiter
        if context.slot is not self:
            return
        context.slot, context.released_at = None, time.monotonic()
        if self.queued:
            if context.token.tokens_per_day:
                limiter.ledger.update(context)
            limiter.queue.leave(self)
        with limiter.lock:
            counters = limiter.counters[self.token.id]
            counters.running -= 1
            if not self.queued and self.rate_time in counters.recent:
                counters.recent.remove(self.rate_time)
            if not counters.running and not counters.recent:
                del limiter.counters[self.token.id]

    def __exit__(self, *_):
        self.release()

# == Backends =================================================================

UPSTREAM_FAILURES = {   # kind of an UpstreamError: the code and the message of its refusal
    "not connected": ("upstream_failed", "Ollama cannot be reached: {}"),   # or lost before the response
    "no response": ("upstream_silent", "Ollama did not answer: {}"),        # in time
    "bad response": ("upstream_failed", "Ollama {}")}                       # not HTTP, too large, or broken off


class UpstreamError(Exception):
    """Ollama gave no complete response: a kind of UPSTREAM_FAILURES, and the text that completes its message."""

    def __init__(self, kind, text):
        super().__init__(text)
        self.kind = kind

    def refusal(self):
        code, message = UPSTREAM_FAILURES[self.kind]
        return Refusal(code, message.format(self))


class EarlyResponse(Exception):
    """Ollama responded, or hung up, before it had the whole request."""


class UpstreamConnection(Connection, contextlib.AbstractContextManager):
    """A connection to Ollama. A streamed request body watches it for an early response."""

    reused = False

    def on_readable(self):
        """Raise EarlyResponse, unless TLS alone had something to read, a session ticket for example."""
        if not self.alive() or self.buffer:
            raise EarlyResponse

    def until_writable(self, deadline, cancel_on):
        """Wait to send more of a request; raise EarlyResponse."""
        self.wait(WRITABLE | READABLE, deadline, cancel_on)
        self.on_readable()

    def __exit__(self, kind, *_):
        if kind:
            self.close()


class UpstreamRequest(urllib.request.Request):
    """A request to Ollama. It knows no host until it is sent; a hang-up on cancel_on cancels it.

    target: path and query; fields: lines of the head; deadline: for the whole exchange, None: the settings' timeouts.
    """

    type, full_url, data, headers = "http", "", None, types.MappingProxyType({})    # for the OpenerDirector

    def __init__(self, method, target, fields, body, cancel_on=None, deadline=None):
        self.method, self.target, self.fields, self.body = method, target, fields, body
        self.cancel_on, self.deadline = cancel_on, deadline


def port_of(url):
    return url.port or (443 if url.scheme == "https" else 80)


class Response(contextlib.AbstractContextManager):
    """A response of Ollama: its head at once, its body piece by piece. Leaving its with block frees the connection."""

    def __init__(self, head, request, connection, upstream):
        parse = parse_cached_response_head if len(head) <= CACHED_HEAD_BYTES else parse_response_head
        self.head = head = parse(head)
        self.status, self.reusable = head.status, head.keep_alive
        bodiless = request.method == "HEAD" or head.status in (204, 304)    # RFC 9112 6.3
        self.body = BodyDecoder(0) if bodiless else BodyDecoder(head.length, head.chunked)
        self.connection, self._upstream, self._request = connection, upstream, request

    def read(self):
        """Return the next piece of the body as soon as it is there, b"" only at its end; raise UpstreamError."""
        deadline = self._request.deadline or Deadline(self._upstream.stall_timeout, "--stall-timeout")
        try:
            return self.body.read(self.connection, deadline, self._request.cancel_on)
        except (OSError, Malformed) as error:
            raise UpstreamError("bad response", f"broke off its response: {error}") from None

    def read_all(self, limit):
        """Return the rest of the body; raise UpstreamError, also if it is larger than the limit."""
        data = bytearray()
        while not self.body.complete:
            data += self.read()
            if len(data) > limit:
                raise UpstreamError("bad response", f"sent more than {limit} bytes")
        return bytes(data)

    def __exit__(self, *_):
        if self.body.complete and self.reusable and not self.connection.buffer:   # unrequested bytes
            self._upstream.release(self.connection)
        else:
            self.connection.close()


def json_object(data):
    """Return the JSON object in bytes, {} for anything else."""
    try:
        found = json.loads(data.decode())     # twice as fast as of bytes
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


class Upstream(urllib.request.BaseHandler):
    """A host with Ollama, below urllib's opener: kept-alive connections, no redirects, no proxies."""

    def __init__(self, url, connect_timeout, first_byte_timeout, stall_timeout, tls=None):
        self._url, self._connect_timeout = url, connect_timeout
        self._first_byte_timeout, self.stall_timeout = first_byte_timeout, stall_timeout
        self._tls = (tls or ssl.create_default_context()) if url.scheme == "https" else None
        self._clock, self._idle = time.monotonic, deque()       # kept connections; the last used is taken first
        self._lock, self._resolver, self._found = threading.Lock(), None, "it met a fault of the gateway"
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(self)

    def send(self, request):
        """Send an UpstreamRequest and return its Response; raise UpstreamError, or Refusal without descriptors."""
        try:
            return self._opener.open(request, timeout=self._first_byte_timeout)
        except Malformed as error:
            raise UpstreamError("bad response", f"does not speak HTTP: {error}") from None
        except OSError as error:
            if is_out_of_descriptors(error):
                raise Refusal("no_descriptors") from None
            raise UpstreamError("no response" if is_late(error) else "not connected", error) from None

    def get_json(self, path, fields="", deadline=None):
        """Return the status and the JSON object ({}: no object) of the response to GET path; raise as `send` does."""
        deadline = deadline or Deadline(self._connect_timeout + PROBE_SECONDS, "--connect-timeout")
        with self.send(UpstreamRequest("GET", path, fields, NO_BODY, deadline=deadline)) as response:
            return response.status, json_object(response.read_all(PROBE_BYTES))

    def default_open(self, request):
        """Exchange a request for a Response, as urllib's opener calls it; twice if a kept-alive connection fails."""
        for fresh in not request.body.replayable, True:
            connection = self._lease(request, fresh)
            try:
                return self._exchange(connection, request)
            except OSError as error:
                if is_late(error) or not connection.reused or connection.buffer:    # bytes of a response came
                    raise
            self.close()    # the other idle connections are as old

    def _exchange(self, connection, request):
        """Send a request and return its Response; Ollama may respond, or hang up, before it has the whole request."""
        head = (f"{request.method} {self._url.path}{request.target} HTTP/1.1\r\nHost: {self._url.netloc}\r\n"
                f"Accept-Encoding: identity\r\n{request.fields}{request.body.framing}\r\n").encode("latin-1")
        pieces, whole = request.body.pieces(connection), False
        with connection:
            try:
                for piece in itertools.chain([head + next(pieces, b"")], pieces):
                    connection.send(piece, Deadline(self.stall_timeout, "--stall-timeout"), request.cancel_on)
                whole = True
            except (EarlyResponse, ConnectionError, ssl.SSLError):
                pass    # the response may have come
            deadline = request.deadline or Deadline(request.timeout, "--first-byte-timeout")
            while True:
                head = read_head(connection, deadline, request.cancel_on)
                connection.reused = False   # it is alive: a later failure is not retried
                response = Response(head, request, connection, self)
                if response.status >= 200:
                    response.reusable = response.reusable and whole
                    return response
                if not whole:
                    raise Malformed("it interrupted the request with an interim response")

    def _lease(self, request, fresh=False):
        """Return a live connection, a kept-alive one unless `fresh`; raise OSError."""
        try:
            while not fresh:
                connection = self._idle.pop()
                unread = self._tls or connection.poll.poll(0)   # poll costs a third of a read in vain
                clean = not unread or connection.alive() and not connection.buffer
                if clean and self._clock() - connection.idle_since <= IDLE_SECONDS:
                    connection.reused = True
                    return connection
                connection.close()
        except IndexError:
            pass    # none is left; other threads take some, too
        return self._connect(request)

    def _connect(self, request):
        """Return a new connection to the first address that accepts; each has an equal share of the time left."""
        deadline = request.deadline or Deadline(self._connect_timeout, "--connect-timeout")
        found = self._addresses(deadline, request.cancel_on)    # at least one
        for number, (family, kind, protocol, _, address) in enumerate(found):
            try:
                with UpstreamConnection(socket.socket(family, kind, protocol)) as connection:
                    self._establish(connection, address, deadline.share(len(found) - number), request.cancel_on)
                    return connection
            except OSError as error:
                if error.errno in OUT_OF_DESCRIPTORS:
                    raise
                failure = ConnectionError(error.strerror or str(error))
        raise failure

    def _addresses(self, deadline, cancel_on):
        """Return the host's addresses, looked up in a thread: getaddrinfo cannot be cancelled and has no timeout.

        One look-up runs at a time, however many requests wait for it: a resolver that hangs holds one thread.
        """
        host = self._url.hostname
        if ":" in host or host.replace(".", "").isdigit():
            return look_up(host, port_of(self._url))    # an IP address needs no resolver
        with self._lock:
            if not (self._resolver and self._resolver.is_alive()):
                self._resolver = threading.Thread(target=self._resolve, name="resolver", daemon=True)
                self._resolver.start()
            resolver = self._resolver
        try:
            while resolver.is_alive():
                resolver.join(min(deadline.left(), 0.2))    # a client that leaves is noticed within 0.2 s
                if cancel_on and cancel_on.watched_events() & READABLE:
                    cancel_on.on_readable()
        except TimeoutError as error:
            raise ConnectionError(f"the look-up of {host} has not ended: {error}") from None
        found = self._found
        if isinstance(found, str):
            raise ConnectionError(f"the look-up of {host} failed: {found}")
        return found

    def _resolve(self):
        try:
            self._found = look_up(self._url.hostname, port_of(self._url))
        except (OSError, UnicodeError) as error:
            self._found = getattr(error, "strerror", None) or str(error)    # for all that wait

    def _establish(self, connection, address, deadline, cancel_on):
        set_tcp_options(connection.sock)
        try:
            connection.sock.connect(address)
        except BlockingIOError:
            connection.wait(WRITABLE, deadline, cancel_on)
            error = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error)) from None
        if self._tls:
            connection.start_tls(self._tls, deadline, cancel_on, server_hostname=self._url.hostname)
        connection.poll = new_poll()
        connection.poll.register(connection.descriptor, READABLE)

    def release(self, connection):
        """Keep a connection for the next request."""
        connection.idle_since = self._clock()
        if len(self._idle) < POOL_SIZE:
            self._idle.append(connection)
        else:
            connection.close()

    def close(self, idle_seconds=0):
        """Close the connections that were idle for so many seconds."""
        latest = self._clock() - idle_seconds
        with contextlib.suppress(IndexError):
            while self._idle[0].idle_since <= latest:
                self._idle.popleft().close()


class HealthProbe:
    """Requests Ollama's version and models every few seconds, in a thread; Ollama is down until the first response."""

    def __init__(self, upstream):
        self.up, self.version, self.models, self.loaded = False, None, [], []
        self._upstream, self._stop, self._thread = upstream, threading.Event(), None

    def start(self, on_first=lambda: None):
        """Start the thread; it calls on_first after the first probe, which takes PROBE_SECONDS at most."""
        self._thread = threading.Thread(target=self._run, args=(on_first,), name="health", daemon=True)
        self._thread.start()

    def _run(self, on_first):
        first = True
        while first or not self._stop.wait(HEALTH_SECONDS):
            try:
                self._probe()
                if first:
                    on_first()
            except Exception:  # a fault must not end the probing
                LOG.exception("the health probe failed")
            self._upstream.close(IDLE_SECONDS)
            first = False

    def _probe(self):
        deadline, answers = Deadline(PROBE_SECONDS), []
        for path in "/api/version", "/api/tags", "/api/ps":
            try:
                status, answer = self._upstream.get_json(path, deadline=deadline)
                answers.append(answer if status == 200 else {})
            except (UpstreamError, Refusal, RuntimeError):  # RuntimeError: no thread could be started for the look-up
                answers.append({})
        self.up, self.version = bool(answers[0]), answers[0].get("version")
        self.models, self.loaded = (models if isinstance(models, list) else []
                                    for models in (answer.get("models") for answer in answers[1:]))

    def close(self):
        self._stop.set()
        if self._thread:
            self._thread.join(ABORT_SECONDS)    # it may hang in on_first, if nobody reads stderr

# == Relay ====================================================================

TOKEN_COUNTS = (("prompt_eval_count", "eval_count"), ("prompt_tokens", "completion_tokens"),
                ("input_tokens", "output_tokens"))      # the names of Ollama, OpenAI and Anthropic
COUNT = re.compile(rb'"(\w+_(?:count|tokens))"\s*:\s*(\d{1,10})(?![\d.eE])')
# The end of a usual answer, or of the last line of one: its counts are read in 1 us instead of 10, a tenth of the CPU
# time of a small answer. The last bracket closes the answer, so that these counts are not those of a nested object.
USUAL_END = re.compile(
    rb'"(?:total_duration":\d+,"load_duration":\d+,"prompt_eval_count":([1-9]\d{0,8})'
    rb'(?:,"prompt_eval_duration":\d+,"eval_count":(\d{1,9}),"eval_duration":\d+)?'
    rb'|usage":\{"prompt_tokens":([1-9]\d{0,8})(?:,"completion_tokens":(\d{1,9}))?,"total_tokens":\d+\})\}\s*\Z')


def whole_tokens(value):
    """Return a reported number of tokens within bounds, 0 for another value."""
    return min(max(value, 0), MAX_TOKENS) if isinstance(value, int) else 0


def parse_usage(answer):
    """Return the Usage in a decoded answer, or in a line of one, of any dialect; None if it reports none.

    A missing count is 0. The prompt includes its cached tokens as in Ollama's openai/openai.go and responses.go, but
    Anthropic's input_tokens do not (UsageFromMetrics in anthropic/anthropic.go): they are added.
    """
    if answer.get("done") is False:
        return None
    response = answer.get("response")       # of an event of /v1/responses
    answer = response if isinstance(response, dict) else answer
    usage = answer.get("usage")
    counts = usage if isinstance(usage, dict) else answer
    names = next((names for names in TOKEN_COUNTS if names[0] in counts or names[1] in counts), None)
    if names is None:
        empty = answer.get("done") is True or "total_duration" in answer or answer.get("embeddings") == []
        return Usage() if empty else None
    prompt, completion = whole_tokens(counts.get(names[0])), whole_tokens(counts.get(names[1]))
    if answer.get("choices") and not prompt and not completion:
        return None     # /v1/completions has zeros in every event but the last
    details = counts.get("prompt_tokens_details", counts.get("input_tokens_details"))
    cached = (details if isinstance(details, dict) else counts).get("cached_tokens", counts.get(
        "prompt_eval_cached_count", counts.get("cache_read_input_tokens")))
    if "cache_read_input_tokens" in counts:
        prompt += whole_tokens(cached) + whole_tokens(counts.get("cache_creation_input_tokens"))
    return Usage(prompt, None if cached is None else min(whole_tokens(cached), prompt), completion)


def read_usage(data, whole=True):
    """Return the Usage in the JSON of an answer, or of a line of one; None if it reports none.

    whole: data has no gap.
    """
    usual = USUAL_END.search(data, len(data) - ENDING_BYTES)
    if usual:
        return Usage(int(usual[1] or usual[3]), None, int(usual[2] or usual[4] or 0))
    if not whole or len(data) > WHOLE_BYTES:    # only texts follow these keys, and the quotes in texts are escaped
        counts = COUNT.findall(data, max(data.rfind(b'"total_duration"'), data.rfind(b'"usage"'), 0))
        return parse_usage({key.decode(): int(number) for key, number in counts})
    return parse_usage(json_object(data))


class UsageReader:
    """Reads the usage in an answer that is passed on as a whole; of a large one, its beginning and its end are kept."""

    ended = False       # the last line of a stream was read

    def __init__(self):
        self._beginning = self._end = b""
        self._unread, self._reported = False, None

    @property
    def reported(self):
        """Return the Usage in the whole answer, or None; it is read at the first access, mostly in the background."""
        if self._unread:    # functools.cached_property takes a lock before Python 3.12
            self._unread, self._reported = False, read_usage(self._beginning + self._end, not self._end)
        return self._reported

    @property
    def usage(self):
        """Return the Usage so far."""
        return self.reported or Usage(None, None, None)

    def feed(self, piece, last):
        """Read a piece of the answer and return the bytes for the client."""
        if len(self._beginning) < WHOLE_BYTES:
            self._beginning += piece
        else:
            self._end = (self._end + piece)[-ENDING_BYTES:]
        self._unread = last
        return piece


class StreamUsageReader(UsageReader):
    """Reads the usage in a stream of lines; until a line reports it, each piece of text counts as a token.

    markers: bytes in a line that may report the usage, bytes in each piece of text and, if another line is the last
    one, its possible beginnings. No text contains the quoted bytes, because its quotes are escaped.
    """

    reported = None

    def __init__(self, markers):
        self._marker, self._piece_marker, *self._last_lines = markers
        self._line, self._pieces = b"", 0       # a line that has not ended yet; the number of pieces of text
        self._recent = deque(maxlen=8)          # whole lines

    @property
    def usage(self):
        usage = self.reported or Usage()
        return usage if usage.completion else usage._replace(completion=self._pieces)

    def feed(self, piece, last):
        data = self._line + piece if self._line else piece
        end = len(data) if last else data.rfind(b"\n") + 1 or data.rfind(b"\r") + 1
        self._line = data[end:] if len(data) - end <= LINE_LIMIT else b""
        self._read_lines(data[:end], last)
        return piece

    def _read_lines(self, lines, last):
        self._pieces += lines.count(self._piece_marker)
        for start in self._last_lines:
            if lines.startswith(start) or b"\n" + start in lines:
                self.ended = True
        if lines:
            self._recent.append(lines)
        whole = lines.splitlines() if self._marker in lines else ()     # beside choices, /v1/completions has zeros:
        found = [line for line in whole if self._marker in line and b'"choices":[{' not in line]
        if last and not found and self.reported is None:
            found = b"".join(self._recent).splitlines()     # its keys may be written with escapes
        for line in found:
            usage = read_usage(line[line.find(b"{"):])
            if usage:
                self.reported, self.ended = usage, self.ended or not self._last_lines


class UsageStripper(StreamUsageReader):
    """Removes the usage from a stream of events that reports it only because the gateway requested it."""

    ADDED_EVENT = re.compile(rb'(?<![^\r\n])data:[^\r\n]*"choices"\s*:\s*\[\s*\],[^\r\n]*"usage"[^\r\n]*[\r\n]*')
    USAGE = re.compile(rb',\s*"usage"\s*:\s*(?:null|\{(?:[^{}]|\{[^{}]*\})*\})(?=\s*\}\s*(?:[\r\n]|\Z))'
                       rb'|,\s*"usage"[^}\r\n]*\Z')     # where a response breaks off

    def feed(self, piece, last):
        data = self._line + piece
        end = max((data.rfind(end) + len(end) for end in (b"\n\n", b"\n\r\n", b"\r\r") if end in data), default=0)
        end = len(data) if last or len(data) > LINE_LIMIT else end
        events, self._line = data[:end], data[end:]
        self._read_lines(events, last)
        return self.USAGE.sub(b"", self.ADDED_EVENT.sub(b"", events)) if b'"usage"' in events else events


STREAM_MARKERS = {    # by content type or path
    "application/x-ndjson": (b"true", b"false"),    # the values of "done"
    "text/event-stream": (b'"prompt_tokens"', b'"choices"', b"data: [DONE]"),
    "/v1/messages": (b'"input_tokens"', b'"content_block_delta"', b"event: message_stop"),
    "/v1/responses": (b'"input_tokens"', b'.delta"', b"event: response.completed", b"event: response.incomplete",
                      b"event: response.failed")}
REPORTS_NO_USAGE = ("/api/embeddings", "/v1/audio/transcriptions")


def usage_reader_for(response, route, strip):
    """Return the UsageReader for a response, None if the request cannot have cost tokens; strip: see UsageStripper."""
    kind = response.head.media_type
    if route.category != "inference" or not 200 <= response.status < 300:
        return None
    if kind not in STREAM_MARKERS or route.path in REPORTS_NO_USAGE:
        return UsageReader()
    markers = STREAM_MARKERS.get(route.path, STREAM_MARKERS[kind])
    return UsageStripper(markers) if strip and kind == "text/event-stream" else StreamUsageReader(markers)


class TokenRatio:
    """Estimates the tokens of a text by its size; each model's ratio is a moving average of Ollama's counts."""

    DEFAULT = (400.0, 100.0)    # bytes and tokens of unknown models: 4 bytes a token

    def __init__(self):
        self._lock, self._sums = threading.Lock(), {}   # {model: (bytes, tokens)}, the least recently learnt first

    def learn(self, model, size, tokens):
        """Add a prompt's size in bytes and its tokens; the weight of earlier prompts falls by a tenth."""
        with self._lock:
            sizes, counts = self._sums.pop(model, self.DEFAULT)
            self._sums[model] = sizes * 0.9 + size, counts * 0.9 + tokens
            if len(self._sums) > MODEL_CACHE_SIZE:
                del self._sums[next(iter(self._sums))]

    def tokens(self, model, size):
        """Return the estimated tokens of a prompt of a size in bytes."""
        sizes, counts = self._sums.get(model, self.DEFAULT)
        return round(size / min(max(sizes / counts, 1), 8))


class PromptCount(contextlib.AbstractContextManager):
    """A with block around the request to Ollama; at its end, a prompt that Ollama did not count gets an estimate."""

    def __init__(self, ratio, context, body):
        self._ratio, self._context, self._body = ratio, context, body

    def __exit__(self, kind, *_):
        context, body = self._context, self._body
        reader, budget = context.usage_reader, context.token.tokens_per_day
        if context.route.path in REPORTS_NO_USAGE or not (kind or budget) and type(reader) is UsageReader:
            return      # the usage in a whole answer is read in the background if no budget depends on it
        usage = reader and reader.reported
        with contextlib.suppress(Refusal):      # the body's file may be unreadable
            if usage and usage.prompt and budget and body.size <= LEARNING_BYTES:
                size = body.inspect(prompt_text_bytes)
                if size * 2 > body.size:        # images are tokens without text
                    self._ratio.learn(normalize_model(context.model), size, usage.prompt)
            elif not usage and (reader or kind and issubclass(kind, ClientLeft)):   # Ollama may have read the prompt
                size = body.inspect(prompt_text_bytes)
                context.estimate = self._ratio.tokens(normalize_model(context.model), size)


def filter_models(response, key, globs):
    """Return a list of models, as the bytes of its JSON, with only those that a token's globs allow; raise Refusal."""
    data = response.read_all(LIST_BYTES)
    if not 200 <= response.status < 300:
        return data
    try:
        whole, name = json.loads(data), "id" if key == "data" else "model"
        whole[key] = [model for model in whole[key] or () if model_allowed(model[name], globs)]
        return json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # or of another shape
        raise Refusal("upstream_failed", "Ollama's list of models cannot be read") from None


def relay(response, client, release_slot):
    """Send a response to the client piece by piece, and return its last piece unsent.

    A client may send its next request after a stream's last line, without waiting for the end of the body: release_slot
    is called before that line is sent. Only UsageStripper holds bytes back, until the end of an event.
    """
    context, head = client.context, response.head
    route, lines, content_type = context.route, head.lines, head.fields.get("content-type", "")
    if response.status == 503 and "retry-after" not in head.fields:     # Ollama's queue is full
        lines += f"Retry-After: {RETRY_SECONDS}\r\n"
    if route.model_list_key and context.token.models:
        listed = filter_models(response, route.model_list_key, context.token.models)
        client.start(response.status, head.phrase, lines, content_type, len(listed))
        return listed
    usage_reader = context.usage_reader = usage_reader_for(response, route, context.insert_at)
    if usage_reader:
        context.model_label = normalize_model(context.model)
    client.start(response.status, head.phrase, lines, content_type,
                 None if isinstance(usage_reader, UsageStripper) else head.length)
    while True:
        if client.pending and not (response.connection.buffer or response.body.complete):   # read() may wait
            client.write(b"")
        try:
            piece = response.read()
        except (UpstreamError, Refusal):    # a Refusal: the server is stopping
            held = usage_reader.feed(b"", True) if usage_reader else b""
            if held:
                client.write(held)
            raise
        if usage_reader:
            piece = usage_reader.feed(piece, response.body.complete)
            if usage_reader.ended:
                release_slot()
        if response.body.complete:
            return piece
        client.write(piece)

# == Logging and metrics ======================================================

PLAIN = re.compile(r"[!#-<>-\[\]-~]+")


def log_value(text):
    return text if PLAIN.fullmatch(text) else json.dumps(text)


def log_line(context):
    """Return the log line of a finished request: never a secret, never a prompt."""
    first = "-" if context.first_byte_at is None else f"{context.first_byte_at - context.started_at:.3f}"
    token = "-" if context.token is None else f"{context.token.user}/{context.token.name}"
    method, path = (context.request.method, context.request.redacted_path) if context.request else ("-", "-")
    values = token, path, context.model or "-"
    token, path, model = values if PLAIN.fullmatch("".join(values)) else map(log_value, values)
    line = (f"id={context.id} peer={context.client_address} token={token} method={method} path={path} model={model} "
            f"status={context.status or '-'} bytes={context.bytes_sent} first={first} "
            f"total={context.ended_at - context.started_at:.3f}")
    if context.sent_at:
        prompt, cached, completion, estimated = context.usage
        line += (f" queued={context.queue_seconds:.3f} prompt={'-' if prompt is None else prompt}"
                 f" completion={'-' if completion is None else completion}")
        line += f" cached={cached}" if cached else ""
        line += f" estimated={estimated}" if estimated else ""
    line += f" outcome={context.outcome}" if context.outcome else ""
    return line + f" why={log_value(context.reason)}" if context.reason else line


def write_all(descriptor, data):
    """Write bytes without a lock of Python's: the exit would wait for a lock that a blocked write holds."""
    while data:
        data = data[os.write(descriptor, data):]


class LogFile:
    """A file for log lines; at LOG_FILE_BYTES it is renamed to FILE.1, FILE.1 to FILE.2, and so on."""

    def __init__(self, path):
        self._names = [path, *(f"{path}.{number}" for number in range(1, LOG_FILES + 1))]
        self._descriptors = deque()     # the last one is used; `write` closes the others
        self.reopen()

    def reopen(self):
        """Open the path again, after another program has renamed the file; raise OSError."""
        self._descriptors.append(os.open(self._names[0], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))

    def write(self, data):
        """Append bytes; raise OSError."""
        if not self._descriptors:   # it was rotated
            self.reopen()
        while len(self._descriptors) > 1:
            os.close(self._descriptors.popleft())
        write_all(self._descriptors[0], data)
        if os.fstat(self._descriptors[0]).st_size >= LOG_FILE_BYTES:
            os.close(self._descriptors.popleft())
            for old, new in zip(self._names[-2::-1], self._names[::-1]):
                with contextlib.suppress(OSError):
                    os.replace(old, new)


class LogWriter(logging.Handler):
    """Writes log lines in the background: a log that blocks or fails delays no request, and the exit only briefly.

    At most LOG_QUEUE characters wait; further lines are dropped, counted, and reported once writing succeeds again.
    """

    def __init__(self, name, write, level):
        super().__init__(level)
        self.name, self._write = name, write    # write takes bytes and raises OSError
        self.dropped = self._queued = self._written = 0     # lines, characters and characters since the start
        self._queue, self._ending = queue.SimpleQueue(), False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def format(self, record):
        """Return the lines of a record, each with the time in UTC and the level before it."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        before = f"{moment}.{int(record.msecs):03d}Z {record.levelname} "
        return before + super().format(record).replace("\n", "\n" + before) + "\n"

    def emit(self, record):
        lines = self.format(record)
        if self._queued - self._written < LOG_QUEUE:
            self._queued += len(lines)
            self._queue.put(lines)
        else:
            self.dropped += lines.count("\n")

    def _run(self):
        reported, failing = 0, False
        while not (self._ending and self._queue.empty()):
            lines = self._queue.get()
            time.sleep(0 if self._ending else LOG_SECONDS)
            lines += "".join([self._queue.get() for _ in range(self._queue.qsize())])
            dropped, report = self.dropped, ""
            if dropped > reported:
                text = f"dropped {plural(dropped - reported, 'log line')}: {self.name} is too slow or cannot be written"
                report = self.format(logging.makeLogRecord({"levelname": "WARNING", "msg": text}))
            try:
                self._write((lines + report).encode("utf-8", "backslashreplace"))
                reported, failing = dropped, False
            except OSError as error:
                with self.lock:
                    self.dropped += lines.count("\n")
                if not failing:
                    LOG.error("log lines are lost: %s cannot be written: %s", self.name, error)
                failing = True
            self._written += len(lines)

    def finish(self):
        """Write the waiting lines, for FLUSH_SECONDS at most."""
        self._ending = True
        self._queue.put("")
        self._thread.join(FLUSH_SECONDS)


METRICS = {     # name: (type, help, labels)
    "requests_total": ("counter", "Requests answered.", ("user", "token", "model", "route", "status")),
    "tokens_total": ("counter", "Tokens: prompt, cached part of it, completion.", ("user", "token", "model", "kind")),
    "cancelled_total": ("counter", "Requests that the client left before their end.", ()),
    "rate_limited_total": ("counter", "Requests refused for a limit.", ("limit",)),
    "upstream_errors_total": ("counter", "Requests that Ollama failed: not reached, silent or broken off.", ("code",)),
    "first_byte_seconds": ("histogram", "From the head of an inference request to its first answer byte.", ("model",)),
    "queue_wait_seconds": ("histogram", "Time that an inference request waited for its turn.", ("model",)),
    "duration_seconds": ("histogram", "From the head of an inference request to the end of its answer.", ("model",)),
    "log_lines_dropped_total": ("counter", "Log lines dropped.", ()),
}
BUCKETS = (0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
LIMIT_BY_REFUSAL = {limit.refusal: limit.column for limit in LIMITS}


def metric_lines(name, kind, text, labels, series):
    """Yield a metric in the text format of Prometheus; series: {values of labels: [count of each bucket, ..., sum]}."""
    name = f"ollama_gateway_{name}"
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for values, (*counts, total) in series.items():
        pairs = [f"{label}={json.dumps(str(value), ensure_ascii=False)}" for label, value in zip(labels, values)]
        samples = [("", pairs, total)]
        if kind == "histogram":
            sums = zip((*BUCKETS, "+Inf"), itertools.accumulate(counts))
            samples = [*(("_bucket", [*pairs, f'le="{bound}"'], number) for bound, number in sums),
                       ("_count", pairs, sum(counts)), ("_sum", pairs, total)]
        for suffix, shown, number in samples:
            yield f"{name}{suffix}" + (f"{{{','.join(shown)}}}" if shown else "") + f" {number:.16g}"


class Metrics:
    """Counts finished requests for Prometheus; it names only models that Ollama has, and bounds the series."""

    def __init__(self, gauges):
        self._gauges, self._lock = gauges, threading.Lock()     # {name: (help, function that returns the number)}
        self._series = {name: defaultdict(lambda: [0] * (len(BUCKETS) + 2)) for name in METRICS}
        self._count("cancelled_total", by=0)

    def observe(self, context):
        """Count a finished request."""
        user, name = (context.token.user, context.token.name) if context.token else ("", "")
        model, code = context.model_label, context.refusal_code
        with self._lock:
            self._count("requests_total", user, name, model,
                        context.route.path if context.route else "", context.status or "none")
            if context.outcome == "left":
                self._count("cancelled_total")
            if code and REFUSALS[code].status == 429:
                self._count("rate_limited_total", LIMIT_BY_REFUSAL.get(code, "failed_credentials"))
            if code in ("upstream_failed", "upstream_silent"):
                self._count("upstream_errors_total", code)
            if context.sent_at:
                for kind, tokens in zip(("prompt", "cached", "completion"), context.usage):
                    if tokens:
                        self._count("tokens_total", user, name, model, kind, by=tokens)
                self._time("queue_wait_seconds", model, context.queue_seconds)
                self._time("duration_seconds", model, context.ended_at - context.started_at)
                if context.first_byte_at:
                    self._time("first_byte_seconds", model, context.first_byte_at - context.started_at)

    def _count(self, name, *labels, by=1):
        """Add to a series, or to the series "other" if there are MAX_SERIES; return its numbers."""
        series = self._series[name]
        if labels not in series and len(series) >= MAX_SERIES:
            labels = ("other",) * len(labels)
        numbers = series[labels]
        numbers[-1] += by
        return numbers

    def _time(self, name, model, seconds):
        self._count(name, model, by=seconds)[bisect.bisect_left(BUCKETS, seconds)] += 1

    def lines(self):
        dropped = sum(handler.dropped for handler in LOG.handlers if isinstance(handler, LogWriter))
        with self._lock:
            self._series["log_lines_dropped_total"][()] = [dropped]
            for name, (kind, text, labels) in METRICS.items():
                yield from metric_lines(name, kind, text, labels, self._series[name])
        for name, (text, number) in self._gauges.items():
            yield from metric_lines(name, "gauge", text, (), {(): [number()]})


class Journal:
    """Records finished requests in a thread: a log line and metrics for each, and twice a second the usage ledger."""

    def __init__(self, ledger, metrics, log):
        self._ledger, self._metrics, self._log = ledger, metrics, log
        self._finished, self._wake, self._closing = deque(), threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def write(self, context):
        """Take a finished request, to be recorded soon."""
        context.ended_at = time.monotonic()
        self._finished.append(context)
        if not self._wake.is_set():
            self._wake.set()

    def _run(self):
        closing, stored = False, time.monotonic()
        while not closing:
            self._wake.wait(STORE_SECONDS)
            time.sleep(0 if self._closing else GATHER_SECONDS)
            self._wake.clear()
            closing = self._closing
            self._attempt(self._write_finished)
            if closing or time.monotonic() - stored >= STORE_SECONDS:
                stored = time.monotonic()
                self._attempt(self._ledger.store)

    def _write_finished(self):
        contexts, lines = [self._finished.popleft() for _ in range(len(self._finished))], []
        records = self._ledger.finish, lambda context: lines.append(log_line(context)), self._metrics.observe
        for context, record in itertools.product(contexts, records):
            self._attempt(record, context)
        self._ledger.used({context.token.id for context in contexts if context.token})
        if lines:
            self._log("\n".join(lines))     # at once: that costs less than line by line

    @staticmethod
    def _attempt(action, *args):
        try:
            action(*args)
        except Exception:   # a fault must neither end the thread nor lose other requests
            LOG.exception("the journal failed%s", f" at {args[0].id}" if args else "")

    def close(self):
        """Record and store everything, and stop."""
        self._closing = True
        self._wake.set()
        self._thread.join()

# == Pipeline =================================================================

INCLUDE_USAGE = b',"stream_options":{"include_usage":true}'    # at an object's end: of equal keys the last one wins
NO_SLOT = contextlib.nullcontext()


class Gateway(types.SimpleNamespace):
    """Takes each request through all stages, which are its attributes: see `build_server`."""

    def serve(self, client):
        """Serve one request: answer it once, and record it once."""
        context = client.context
        try:
            request = client.read_request()
            context.client_address = client_address(context.client_address, request, self.trusted_proxies)
            client.extra_fields = lambda: (*self.router.cors_fields(request), *self.limiter.fields(context))
            context.request, context.route, context.path = self.router.match(request)
            if context.route.access != "public":
                self._authorize(context)
                self.connections.authenticate(client.connection, context.token.id)
            if context.route.category == "page":
                return client.answer(*self._page(client))
            with Slot(self.limiter, context) if context.route.category == "inference" else NO_SLOT as slot:
                last = self._forward(client, slot)
            client.write(last, last=True)   # when the slot is free: the client may send its next request at once
        except Refusal as refusal:
            client.refuse(refusal)
        except UpstreamError as error:
            client.refuse(error.refusal())
        except Failure as error:    # its text may name a path, and the client is not authenticated: only the log has it
            client.refuse(Refusal(error.code), str(error))
        except ClientLeft as error:
            if context.usage_reader is None or not context.usage_reader.ended:   # many leave after the last line
                context.outcome, context.reason = "left", str(error)
            client.abort()
        except Exception:   # a fault of the gateway ends one request, with a response and a traceback in the log
            LOG.exception("request %s met a fault of the gateway", context.id)
            client.refuse(Refusal("internal", f"the gateway failed: see its log, request {context.id}"), "")
        finally:
            self.journal.write(context)

    def _authorize(self, context, model=False):
        """Find the request's token, which may use the route and, if it is known already, the model; raise Refusal."""
        context.token = self.authenticator.identify(context.request, context.client_address)
        authorize_route(context)
        if model:
            authorize_model(context)

    def _page(self, client):
        """Return the response of one of our own pages; raise Refusal."""
        context = client.context
        if context.route.method in ("POST", "PATCH"):
            with client.read_whole_body(page=True) as body:
                context.body = body.inspect(bytes)
            if context.body:    # the token may have been revoked while the body arrived
                self._authorize(context)
        try:
            return getattr(self.endpoints, context.route.handler)(context)
        except (UsageError, Failure) as error:
            raise Refusal(getattr(error, "code", "malformed"), str(error)) from None

    def _forward(self, client, slot):
        """Pass a request on to Ollama and its response to the client; return the last piece, which is not sent yet."""
        context, connection, route = client.context, client.connection, client.context.route
        check_again = functools.partial(self._authorize, context, model=True)   # the token may have changed meanwhile
        connection.had_to_wait = False
        with contextlib.nullcontext(StreamedBody(client, check_again)) if route.streamed \
                else client.read_whole_body() as body:
            if connection.had_to_wait:
                self._authorize(context)
            context.model, context.insert_at = inspect_body(context, body)
            authorize_model(context)
            if context.insert_at:
                body.insertion = context.insert_at, INCLUDE_USAGE
            if slot:
                slot.wait(connection, check_again)
            fields = f"X-Request-Id: {context.id}\r\n{context.request.forwarded}"
            request = UpstreamRequest(route.method, context.path + context.request.query, fields, body, connection)
            with PromptCount(self.ratios, context, body) if slot else NO_SLOT, self.upstream.send(request) as response:
                return relay(response, client, slot and slot.release)

    def close(self):
        for stage in self.journal, self.authenticator, self.health, self.upstream:
            stage.close()

# == OpenAPI ==================================================================

# A shape is one of JSON_TYPES or a tuple of them, object for any value, the name of a schema, [shape], or
# {member: shape}, where "?" marks an optional member.
JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object",
              None: "null"}
TOKEN_SHAPE = {
    "id": int, "user": str, "name": str, "hint": str, "created_at": str, "expires_at": (str, None), "admin": bool,
    **{limit.column: (list if limit.json_type == "string[]" else int, None) for limit in LIMITS}}
CHANGES_SHAPE = {"admin?": bool, "expires_at?": (str, None), **{f"{column}?": object for column in LIMIT_BY_COLUMN}}
USAGE_SHAPE = {
    "requests": int, "errors": int, "cancelled": int, "seconds": float, "estimated_tokens": int,
    "prompt_tokens": (int, None), "cached_tokens": (int, None), "completion_tokens": (int, None)}
SCHEMAS = {
    "Health": {"status": str, "upstream": str, "version": str},
    "TokenChanges": CHANGES_SHAPE,
    "NewToken": {"user": str, "name": str, **CHANGES_SHAPE},
    "Token": {**TOKEN_SHAPE, "last_used_at": (str, None), "expired": bool, "token?": str},    # a new secret
    "Me": {**TOKEN_SHAPE, "left": dict, "usage": [{"day": str, **USAGE_SHAPE}]},
    "Usage": {"user?": str, "name?": str, "model?": str, "day?": str, **USAGE_SHAPE},
    "Running": {"user": str, "name": str, "model": (str, None), "path": str, "waiting": bool, "seconds": float},
    "Status": {"version": str, "in_flight_requests": int, "queued_requests": int, "connections": int,
               "requests": ["Running"], "upstream": dict},
    "OllamaError": {"error": str},
    "OpenaiError": {"error": {"message": str, "type": str, "param": (str, None), "code": (str, None)}},
    "AnthropicError": {"type": str, "error": {"type": str, "message": str}},
}
RESPONSE_SHAPES = {     # by Route.handler
    "health": "Health", "me": "Me", "openapi": dict, "status": "Status", "usage": ["Usage"], "list_tokens": ["Token"],
    "create_token": "Token", "show_token": "Token", "update_token": "Token", "delete_token": "Token",
    "rotate_token": "Token"}
REQUEST_SHAPES = {"create_token": "NewToken", "update_token": "TokenChanges"}
QUERY_PARAMETERS = {"list_tokens": {"user": {"type": "string"}}, "usage": {
    "by": {"enum": list(USAGE_BY), "default": "user"}, "since": {"type": "string", "default": "7d"}}}


def json_response(value, status=200):
    return status, "application/json", json.dumps(value).encode() + b"\n", [("Cache-Control", "no-store")]


def json_schema(shape):
    """Return the JSON Schema of a shape."""
    if isinstance(shape, dict):
        return {"type": "object", "required": [name for name in shape if not name.endswith("?")],
                "properties": {name.rstrip("?"): json_schema(member) for name, member in shape.items()}}
    if isinstance(shape, list):
        return {"type": "array", "items": json_schema(shape[0])}
    if isinstance(shape, tuple):
        return {"type": [JSON_TYPES[kind] for kind in shape]}
    if isinstance(shape, str):
        return {"$ref": f"#/components/schemas/{shape}"}
    return {} if shape is object else {"type": JSON_TYPES[shape]}


def openapi_content(shape):
    """Return the content of a JSON body, {} for None: Ollama documents the bodies of its own routes."""
    return {"content": {"application/json": {"schema": json_schema(shape)}}} if shape else {}


def openapi_operation(route):
    """Return the OpenAPI operation of a route."""
    dialect, request = dialect_of(route.path), REQUEST_SHAPES.get(route.handler)
    tag = "Admin" if route.path.startswith("/admin") else "Gateway" if route.handler else dialect.capitalize()
    parameters = [{"name": name, "in": "path", "required": True,
                   "schema": {"type": "integer" if name == "id" else "string"}}
                  for name in re.findall(r"\{(\w+)\}", route.path)]
    parameters += [{"name": name, "in": "query", "schema": schema}
                   for name, schema in QUERY_PARAMETERS.get(route.handler, {}).items()]
    done = {"description": "done", **openapi_content(RESPONSE_SHAPES.get(route.handler))}
    return {"operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.path}").strip("_"), "tags": [tag],
            "summary": route.summary, "parameters": parameters,
            "responses": {"201" if route.handler == "create_token" else "200": done,
                          "default": {"description": "error", **openapi_content(f"{dialect.capitalize()}Error")}},
            **({"requestBody": {"required": True, **openapi_content(request)}} if request else {}),
            **({"security": []} if route.access == "public" else {}),
            **({"description": "Requires an admin token."} if route.access == "admin" else {})}


@functools.lru_cache(maxsize=8)     # 5 ms for a document that anyone may request
def openapi_response(routes, base):
    """Return the response with the OpenAPI 3.1 document of a gateway with these routes, with /api at the base."""
    paths = {}
    for route in routes:
        paths.setdefault(at_base(route.path, base), {})[route.method.lower()] = openapi_operation(route)
    refusals = "; ".join(f"{status}: {meaning}" for status, meaning in sorted(REFUSALS.values()))
    return json_response({
        "openapi": "3.1.0",
        "info": {"title": "ollama_gateway", "version": VERSION, "description": "Ollama and its OpenAI and Anthropic "
                 f"APIs, for holders of a token. The errors of the gateway: {refusals}."},
        "externalDocs": {"description": "The bodies of Ollama's own routes", "url": "https://docs.ollama.com/api"},
        "security": [{"bearer": []}, {"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"},
                                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"}},
            "schemas": {name: json_schema(shape) for name, shape in SCHEMAS.items()}}})

# == Web pages ================================================================

STYLE = r"""
:root { color-scheme: light dark; accent-color: var(--accent); --paper: #faf9f6; --card: #fff; --ink: #1e2422;
  --dim: #59625d; --line: #dfdcd4; --edge: #868e89; --soft: #e4efec; --mild: #64a195; --accent: #0a695c;
  --on-accent: #fff; --bad: #a2261e; --good: #1b6a35; }
@media (prefers-color-scheme: dark) { :root { --paper: #141716; --card: #1c201f; --ink: #e6eae8; --dim: #a4ada8;
  --line: #343a37; --edge: #78817c; --soft: #21332f; --mild: #3f8073; --accent: #63cdbb; --on-accent: #07241f;
  --bad: #ff9c91; --good: #80d69a; } }
* { box-sizing: border-box; }
body { max-width: 66.5rem; margin: 0 auto; padding: 2.5rem clamp(.9rem, 4vw, 1.25rem) 3rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; -webkit-text-size-adjust: 100%; }
body:not(.signed-in) .private, .signed-in #sign-in, p:empty { display: none; }
h1 { margin: 0 0 .5rem; font-size: 1.9rem; line-height: 1.3; }
h2 { margin: 0 0 .75rem; font-size: 1.2rem; }
h3 { margin: 1.25rem 0 .5rem; font-size: 1rem; }
p { margin: 0 0 .75rem; max-width: 44rem; }
a { color: var(--accent); }
small, summary, footer, figcaption, dt, .dim { color: var(--dim); font-size: .875rem; font-weight: 400; }
section { margin: 1.5rem 0; }
section, dialog { padding: 1.35rem clamp(1rem, 4vw, 1.5rem) 1.5rem; background: var(--card); color: inherit;
  border: 1px solid var(--line); border-radius: .75rem; overflow-wrap: anywhere; }
code, pre { font: .875rem/1.55 ui-monospace, Menlo, Consolas, monospace; }
pre, #answer { margin: 0; padding: .9rem 1rem; background: var(--paper); border: 1px solid var(--line);
  border-radius: .5rem; overflow-x: auto; }
#answer, dialog pre { min-height: 3.2rem; margin-bottom: .75rem; white-space: pre-wrap; }
label { display: block; font-size: .9rem; font-weight: 600; }
input, select, textarea, button { padding: .45rem .75rem; background: var(--paper); border: 1px solid var(--edge);
  border-radius: .45rem; font: inherit; color: inherit; }
label > :is(select, textarea, input:not([type=checkbox])) { display: block; width: 100%; margin-top: .25rem;
  font-weight: 400; resize: vertical; }
button { background: var(--card); cursor: pointer; white-space: nowrap; }
button:hover { background: var(--soft); }
button[type=submit] { background: var(--accent); border-color: transparent; color: var(--on-accent); font-weight: 600; }
button.danger { background: var(--bad); color: var(--card); }
details button, td button { padding: .15rem .55rem; font-size: .85rem; }
:disabled { opacity: .55; }
.row { display: flex; flex-wrap: wrap; gap: .75rem; align-items: end; margin-bottom: .75rem; }
.row > label { flex: 1 1 14rem; }
.head, .head .row { justify-content: space-between; align-items: center; }
section > :last-child, .row .row, .head > *, td .row, figure .row { margin-bottom: 0; }
.problem, .bad { color: var(--bad); font-weight: 600; }
.good { color: var(--good); }
.tag { padding: .05rem .4rem; border-radius: .35rem; background: var(--soft); color: var(--accent); font-size: .8rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1rem; margin: 0 0 1rem; }
dd { display: grid; font-size: 1.3rem; line-height: 1.35; }
dd, figure { margin: 0; }
table { width: 100%; border-collapse: collapse; font-size: .925rem; }
th, td { padding: .45rem .9rem .45rem 0; border-top: 1px solid var(--line); font-weight: 400; text-align: left;
  vertical-align: top; overflow-wrap: break-word; }
thead th { border-top: 0; color: var(--dim); font-size: .85rem; font-weight: 600; }
thead th, th code { white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
td .row { flex-wrap: nowrap; gap: .35rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
progress { display: block; width: 100%; min-width: 5rem; height: .55rem; margin: .4rem 0; }
svg { display: block; width: 100%; height: 9rem; border-bottom: 1px solid var(--edge); }
.prompt { color: var(--mild); fill: var(--mild); }
.answer { color: var(--accent); fill: var(--accent); }
details, pre + button { margin-top: .6rem; }
dialog { width: min(34rem, calc(100vw - 2rem)); }
dialog::backdrop { background: rgb(0 0 0 / 50%); }
dialog form { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .75rem 1rem; }
dialog form > :not(label) { grid-column: 1 / -1; margin: 0; }
dialog .row { justify-content: end; margin-bottom: 0; }
@media (max-width: 40rem) {
  .stack thead, .stack td:empty { display: none; }
  .stack :is(tbody, tr, th, td) { display: block; padding: .1rem 0; border: 0; text-align: left;
    overflow-wrap: anywhere; }
  .stack tr { padding: .6rem 0; border-top: 1px solid var(--line); }
  .stack td[data-label]::before { content: attr(data-label) ": "; color: var(--dim); }
  .stack th { font-weight: 600; }
  .stack code { white-space: normal; }
}
"""

SCRIPT = r"""
const KEY = "ollama_gateway.token";
// Requests go to where the page was found, also behind a proxy's prefix. A secret in that path is sent as a header.
const [, ROOT, PATH_SECRET, PAGE] = location.pathname.match(/^(.*?)(?:\/t\/([^/]+))?(\/[^/]*)$/);
let token = sessionStorage.getItem(KEY) || PATH_SECRET;
let now = Date.now();   // by the gateway's clock, once it has responded

const byId = id => document.getElementById(id);
const show = (id, ...content) => byId(id).replaceChildren(...content);
const number = value => value === null ? "unknown" : value.toLocaleString("en");
const minute = time => time.slice(0, 16).replace("T", " ");
const nameOf = row => `${row.user}/${row.name}`;
const tokensOf = ({prompt_tokens, cached_tokens, completion_tokens}) =>
  prompt_tokens === null ? null : prompt_tokens - cached_tokens + completion_tokens;

const builder = namespace => (name, attributes, ...children) => {
  const node = document.createElementNS(namespace, name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value !== false) node.setAttribute(key, value);
  }
  node.append(...children.flat(Infinity));
  return node;
};
const element = builder("http://www.w3.org/1999/xhtml"), drawing = builder("http://www.w3.org/2000/svg");
const button = (text, click, attributes = {}) => element("button", {type: "button", click, ...attributes}, text);
const tile = (name, ...content) => element("div", {}, element("dt", {}, name), element("dd", {}, content));
const bar = share => element("progress", {value: share || 0, "aria-hidden": "true"});

async function ask(method, path, body, signal) {
  if (!/^[\x21-\x7e]+$/.test(token)) throw new Error("A token is one word of ASCII letters, digits and signs");
  const headers = {Authorization: `Bearer ${token}`, "Content-Type": "application/json"};
  const response = await fetch(ROOT + path, {method, headers, signal, cache: "no-store", body: JSON.stringify(body)})
    .catch(() => { throw new Error("The gateway cannot be reached"); });
  now = Date.parse(response.headers.get("Date")) || now;
  if (response.ok) return response;
  const {status, statusText} = response, retry = response.headers.get("Retry-After");
  const text = status === 401 ? "This token is not valid: it is unknown, expired or deleted"
    : (await response.json().catch(() => null))?.error || `${status} ${statusText}`;
  throw Object.assign(new Error(text + (retry ? `; try again in ${retry} s` : "")), {status});
}
const askJSON = async (...args) => (await ask(...args)).json();

async function attempt(pressed, problem, action) {
  problem.textContent = "";
  pressed.disabled = true;
  await action().catch(error => { problem.textContent = error.message; });
  pressed.disabled = false;
}

function keep(secret) {
  token = secret;
  if (secret !== PATH_SECRET) sessionStorage.setItem(KEY, secret);
}

// Signs in with the token that is kept, or that is typed; load() fills the page, or fails if the token may not.
function signIn(load) {
  const form = byId("sign-in");
  const use = secret => attempt(form.querySelector("button"), byId("sign-in-problem"), async () => {
    token = secret;
    await load();
    keep(secret);
    form.reset();
    document.body.classList.add("signed-in");
  });
  form.addEventListener("submit", event => { event.preventDefault(); use(byId("token").value.trim()); });
  byId("sign-out").addEventListener("click", () => { sessionStorage.removeItem(KEY); location.replace(ROOT + PAGE); });
  if (token) use(token);
}

const copyButton = (source, attributes) => button("Copy", ({target}) => {
  getSelection().selectAllChildren(source);
  target.textContent = document.execCommand("copy") ? "Copied" : "Selected";   // navigator.clipboard requires TLS
}, attributes);

// A row is a list of cells, of which the first names the row.
function table(name, headings, rows) {
  const isNumber = value => value === null || typeof value === "number";
  const style = at => rows.some(cells => isNumber(cells[at])) && "number";
  const head = (heading, at) => element("th", {scope: "col", class: style(at)}, heading);
  const cell = (content, at) => element(at ? "td" : "th", at ? {class: style(at), "data-label": headings[at] || false}
    : {scope: "row"}, isNumber(content) ? number(content) : content);
  return element("table", {class: "stack", "aria-label": name},
    element("thead", {}, element("tr", {}, headings.map(head))),
    element("tbody", {}, rows.map(cells => element("tr", {}, cells.map(cell)))));
}

function usageTable(heading, rows) {
  const key = heading.toLowerCase(), most = Math.max(1, ...rows.map(tokensOf));
  return table(`Usage by ${key}`, [heading, "", "Tokens", "Cached", "Requests"], rows.map(row =>
    [row[key] || "-", bar(tokensOf(row) / most), tokensOf(row), row.cached_tokens || 0, row.requests]));
}

function dayChart(usage, days) {
  const first = Math.floor(now / 86400000) - days + 1, most = Math.max(1, ...usage.map(tokensOf));
  const total = usage.reduce((sum, row) => sum + tokensOf(row), 0);
  const part = (row, name, tokens) => drawing("rect", {class: name, x: Date.parse(row.day) / 86400000 - first + 0.12,
    width: 0.76, y: 100 - tokens / most * 100, height: tokens / most * 100});
  const column = row => drawing("g", {},
    drawing("title", {}, `${row.day}: ${number(tokensOf(row))} tokens, ${number(row.requests)} requests`),
    part(row, "prompt", tokensOf(row)), part(row, "answer", row.completion_tokens));
  const key = name => [element("span", {class: name}, " ■"), ` ${name}s`];
  return element("figure", {},
    element("figcaption", {class: "row head"}, element("span", {}, `most in a day: ${number(most)}`),
      element("span", {}, key("prompt"), key("answer"))),
    drawing("svg", {viewBox: `0 0 ${days} 100`, preserveAspectRatio: "none", role: "img",
      "aria-label": `Tokens of each of the last ${days} days, ${number(total)} in all`}, usage.map(column)),
    element("small", {class: "row head"}, element("span", {}, new Date(first * 86400000).toISOString().slice(0, 10)),
      element("span", {}, "today, in UTC")),
    element("details", {}, element("summary", {}, "As a table"), usageTable("Day", usage)));
}
"""

DOCS_SCRIPT = r"""
let running = new AbortController();

async function loadMe() {
  const me = await askJSON("GET", "/me");
  const limits = Object.entries(me.left).map(([name, {limit, remaining}]) => tile(LIMITS[name].label,
    number(remaining), bar(remaining / limit), element("small", {}, `left of ${number(limit)}`)));
  show("who", nameOf(me));
  show("me", element("dl", {class: "tiles"},
    tile("Valid", me.expires_at ? `until ${minute(me.expires_at)}` : "until deleted"),
    tile("Models", me.models ? me.models.join(", ") : "all"), limits),
  element("h3", {}, "Your last seven days"), dayChart(me.usage, 7));
}

async function showModels() {
  const {models} = await askJSON("GET", `${BASE}/tags`), names = (models || []).map(({name}) => name);
  show("model", ...names.map(name => element("option", {}, name)));
  const example = names.find(name => /^[\w.:\/-]+$/.test(name));    // a shell could read others as more than a name
  if (example) document.querySelectorAll(".model").forEach(place => { place.textContent = example; });
}

async function chat() {
  const start = performance.now();
  const body = {model: byId("model").value, messages: [{role: "user", content: byId("prompt").value}]};
  const response = await ask("POST", `${BASE}/chat`, body, running.signal);
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let first = "";
  for (let rest = "";;) {
    const {value, done} = await reader.read().catch(() => { throw new Error("The response broke off"); });
    if (done) return;
    const lines = (rest + decoder.decode(value, {stream: true})).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const {message = {}, error, eval_count: count, eval_duration: duration} = JSON.parse(line);
      if (error) throw new Error(error);
      byId("thought").append(message.thinking || "");
      byId("said").append(message.content || "");
      if (!first && (message.thinking || message.content)) {
        first = `first token after ${((performance.now() - start) / 1000).toFixed(2)} s, `;
        show("figures", first.slice(0, -2));
      }
      if (count) show("figures", `${first}${number(count)} tokens, ${(count / duration * 1e9).toFixed(1)} a second`);
    }
  }
}

const setBusy = busy => { byId("stop").disabled = !busy; byId("answer").setAttribute("aria-busy", busy); };
byId("console-form").addEventListener("submit", async event => {
  event.preventDefault();
  running = new AbortController();
  ["thought", "said", "figures"].forEach(id => show(id));
  setBusy(true);
  await attempt(byId("send"), byId("problem"), () => chat().catch(error => {
    if (!running.signal.aborted) throw error;
    show("figures", "(stopped)");
  }));
  setBusy(false);
  loadMe().catch(() => {});
});
byId("stop").addEventListener("click", () => running.abort());
byId("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("send").click();
});
for (const place of document.querySelectorAll(".address")) place.textContent = location.origin + ROOT;
for (const pre of document.querySelectorAll("#examples pre")) pre.after(copyButton(pre.firstChild));
signIn(async () => {
  await loadMe();
  attempt(byId("send"), byId("problem"), showModels);
});
"""

ADMIN_SCRIPT = r"""
const FIELDS = {user: {label: "User", example: "a person"}, name: {label: "Name", example: "a device"},
  expires_at: {label: "Expires", example: "30d, 2027-01-31"}, ...LIMITS};

// Opens a form that calls action() when it is submitted, and shows an error beside the field that caused it.
function openDialog(title, content, label, action, {style = false, copy} = {}) {
  const problem = element("p", {class: "problem", role: "alert"});
  const submitter = element("button", {type: "submit", class: style}, label);
  const submit = async event => {
    event.preventDefault();
    await attempt(submitter, problem, async () => {
      await action();
      box.close();
      await loadTokens();
    });
    const field = form.elements[problem.textContent.split(":")[0]];
    if (field) field.focus();
    (field || form.lastChild.previousSibling).after(problem);
  };
  const form = element("form", {submit}, content, problem,
    element("div", {class: "row"}, copy || button("Cancel", () => box.close()), submitter));
  const box = element("dialog", {"aria-labelledby": "dialog-title", close: () => box.remove(),
    cancel: event => { if (copy) event.preventDefault(); }}, element("h2", {id: "dialog-title"}, title), form);
  document.body.append(box);
  box.showModal();
}

function showSecret(made) {
  const secret = element("code", {}, made.token);
  openDialog(`Secret of ${nameOf(made)}`, [
    element("p", {}, "The secret is shown only once. Keep it like a password."), element("pre", {id: "secret"}, secret),
    element("p", {}, "How to use it: ", element("a", {href: "docs", target: "_blank"}, "examples for each client"))],
  "I have saved it", async () => {}, {copy: copyButton(secret, {autofocus: ""})});
}

function editToken(known) {
  const inputs = Object.keys(FIELDS).slice(known.id ? 2 : 0).map(name => element("input",
    {name, value: [known[name] ?? ""].flat().join(","), autocomplete: "off", spellcheck: "false"}));
  const admin = element("input", {type: "checkbox", name: "admin", checked: known.admin});
  const labelled = input => element("label", {}, `${FIELDS[input.name].label} `,
    element("small", {}, FIELDS[input.name].example), input);
  const save = async () => {
    const changes = known.id ? {} : {user: "", name: ""};
    for (const {name, value, defaultValue} of inputs) {
      if (value !== defaultValue) changes[name] = value.trim() || null;
    }
    if (admin.checked !== known.admin) changes.admin = admin.checked;
    if (known.id) await ask("PATCH", `/admin/tokens/${known.id}`, changes);
    else showSecret(await askJSON("POST", "/admin/tokens", changes));
  };
  openDialog(known.id ? `Limits of ${nameOf(known)}` : "New token", [inputs.map(labelled),
    element("label", {}, admin, " Admin ", element("small", {}, "may manage models and tokens")),
    element("p", {class: "dim"}, "An empty field sets no limit.")], known.id ? "Save" : "Create", save);
}

function rotateToken(known) {
  const warning = `The current secret of ${nameOf(known)} stops working at its next request.`;
  openDialog("Create a new secret?", element("p", {}, warning), "New secret", async () => {
    const made = await askJSON("POST", `/admin/tokens/${known.id}/rotate`);
    if (token.startsWith(known.hint)) keep(made.token);     // the page's own token
    showSecret(made);
  });
}

function deleteToken(known) {
  const warning = `${nameOf(known)} stops working at its next request. This cannot be undone.`;
  openDialog("Delete this token?", element("p", {}, warning), "Delete",
    () => ask("DELETE", `/admin/tokens/${known.id}`), {style: "danger"});
}

function tokenRow(row) {
  const actions = Object.entries({Edit: editToken, "New secret": rotateToken, Delete: deleteToken}).map(
    ([text, act]) => button(text, () => act(row), {"aria-label": `${text}: ${nameOf(row)}`}));
  const limits = Object.entries(LIMITS).filter(([name]) => row[name]).map(
    ([name, {phrase}]) => phrase.replace("{}", () => [row[name]].flat().map(number).join(", ")));
  return [[nameOf(row), row.admin ? [" ", element("span", {class: "tag"}, "admin")] : ""],
    element("code", {}, `${row.hint}…`),
    row.expired ? element("span", {class: "bad"}, "expired") : row.expires_at ? minute(row.expires_at) : "never",
    row.last_used_at ? minute(row.last_used_at) : "never", limits.join("; "), element("div", {class: "row"}, actions)];
}

async function loadTokens() {
  const tokens = await askJSON("GET", "/admin/tokens");
  show("tokens", table("Tokens", ["Token", "Secret", "Expires", "Last used", "Limits", ""], tokens.map(tokenRow)));
}

function showStatus({upstream, requests, ...gauges}) {
  const up = upstream.status === "up";
  const rows = requests.map(row => [nameOf(row), row.model || "", element("code", {}, row.path),
    row.waiting ? "queued" : "running", Math.round(row.seconds)]);
  show("status", element("dl", {class: "tiles"},
    tile("Running", number(gauges.in_flight_requests)), tile("Queued", number(gauges.queued_requests)),
    tile("Connections", number(gauges.connections)),
    tile("Ollama", element("span", {class: up ? "good" : "bad"}, up ? `up, ${upstream.version}` : "down")),
    tile("Loaded models", upstream.loaded.map(({name}) => name).join(", ") || "none")),
  rows.length ? table("Requests", ["Token", "Model", "Path", "State", "Seconds"], rows)
    : element("p", {class: "dim"}, "No requests are running or queued."));
}

async function watch() {
  try {
    if (!document.hidden) showStatus(await askJSON("GET", "/admin/status"));
    show("status-problem");
  } catch (error) {
    // A dialog may be about to replace the page's own secret. If not, the page signs in again, and shows why it cannot.
    if ([401, 403].includes(error.status) && !document.querySelector("dialog")) location.reload();
    show("status-problem", error.message);
  }
  setTimeout(watch, 2000);
}

async function loadUsage() {
  const period = byId("period").value, days = parseInt(period);
  const [byDay, byUser, byModel] = await Promise.all(
    ["day", "user", "model"].map(by => askJSON("GET", `/admin/usage?by=${by}&since=${days}d`)));
  if (period !== byId("period").value) return;  // out of date
  show("usage", dayChart(byDay, days), element("h3", {}, "By user"), usageTable("User", byUser),
    element("h3", {}, "By model"), usageTable("Model", byModel));
}
const showUsage = () => attempt(byId("refresh"), byId("usage-problem"), loadUsage);

byId("create").addEventListener("click", () => editToken({admin: false}));
byId("period").addEventListener("change", showUsage);
byId("refresh").addEventListener("click", showUsage);
signIn(async () => {
  await loadTokens();
  showUsage();
  watch();
});
"""

SIGN_IN = """<section id="yours" aria-labelledby="yours-title"><h2 id="yours-title">Your token</h2>
<noscript><p>Signing in requires JavaScript.</p></noscript>
<form id="sign-in">
<div class="row"><label>{}<input id="token" type="password" autocomplete="off" spellcheck="false" required></label>
<button type="submit">Sign in</button></div>
<p class="dim">The token is kept in this tab only, until it is closed.</p>
<p id="sign-in-problem" class="problem" role="alert"></p></form>
<div id="signed-in" class="row head private"><span id="who">Signed in.</span>
<button id="sign-out" type="button">Sign out</button></div>"""
DOCS = """<p>Ollama, OpenAI and Anthropic clients work here, with streaming. Ask the administrator for a token.</p>
<nav class="row"><a href="#yours">Your token</a><a href="#examples">Examples</a><a href="#routes">Routes</a>
<a href="#errors">Errors</a><a href="#settings">Settings</a><a href="openapi.json">OpenAPI</a>{admin}</nav></header>
<main>{sign_in}<div id="me" class="private"></div></section>
<section class="private" aria-labelledby="console-title"><h2 id="console-title">Console</h2>
<form id="console-form"><div class="row"><label>Model<select id="model" required></select></label></div>
<div class="row"><label>Prompt <small>Ctrl+Enter sends it</small>
<textarea id="prompt" rows="4" required>Why is the sky blue?</textarea></label></div>
<div class="row"><button id="send" type="submit">Send</button>
<button id="stop" type="button" disabled>Stop</button></div></form>
<p id="problem" class="problem" role="alert"></p>
<div id="answer" role="log" aria-label="Answer"><p id="thought" class="dim"></p><p id="said"></p></div>
<p id="figures" class="dim" role="status"></p></section>
<section id="examples" aria-labelledby="examples-title"><h2 id="examples-title">Examples</h2>
<p>They read the token from the variable <code>TOKEN</code>: <code>export TOKEN=ogw_…</code></p>
{examples}</section>
<section id="routes" aria-labelledby="routes-title"><h2 id="routes-title">Routes</h2>
<p>Send the token as <code>Authorization: Bearer …</code> or <code>x-api-key: …</code>. Other paths are refused.</p>
{routes}</section>
<section id="errors" aria-labelledby="errors-title"><h2 id="errors-title">Errors</h2>
<p>An error has the format of the route's API. Name its <code>X-Request-Id</code> when you report one.</p>
{errors}</section>
<section id="settings" aria-labelledby="settings-title"><h2 id="settings-title">Settings</h2>
<details><summary>For administrators: the flags of <code>serve</code> and their variables</summary>
{options}</details></section></main>
<footer>This page loads nothing from other servers, and sends your input to this gateway only.</footer>"""
ADMIN = """<p>Tokens, running requests and usage.</p>
<nav><a href="docs">Documentation</a></nav></header>
<main>{sign_in}</section><div id="panel" class="private">
<section aria-labelledby="now-title"><h2 id="now-title">Now</h2>
<p id="status-problem" class="problem" role="alert"></p><div id="status"></div></section>
<section aria-labelledby="tokens-title">
<div class="row head"><h2 id="tokens-title">Tokens</h2><button id="create" type="button">New token</button></div>
<div id="tokens"></div></section>
<section aria-labelledby="usage-title">
<div class="row head"><h2 id="usage-title">Usage</h2><div class="row">
<select id="period" aria-label="Period"><option>7 days</option><option>30 days</option><option>90 days</option></select>
<button id="refresh" type="button">Refresh</button></div></div>
<p id="usage-problem" class="problem" role="alert"></p><div id="usage"></div></section></div></main>
<footer>The token is sent in a header, never in a cookie: pages of other sites cannot use it.</footer>"""
EXAMPLES = r"""
== curl
curl -N {address}{base}/chat \
  -H "Authorization: Bearer $TOKEN" \
  -d '{"model": "{model}", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
== ollama
# The gateway must be started with --path-tokens.
OLLAMA_HOST={address}/t/$TOKEN ollama run {model}
== Python
import os
from ollama import Client
client = Client(host="{host}", headers={"Authorization": f"Bearer {os.environ['TOKEN']}"})
for part in client.generate(model="{model}", prompt="Why is the sky blue?", stream=True):
    print(part.response, end="", flush=True)
== JavaScript
import { Ollama } from "ollama"
const ollama = new Ollama({ host: "{host}", headers: { Authorization: `Bearer ${process.env.TOKEN}` } })
const parts = await ollama.generate({ model: "{model}", prompt: "Why is the sky blue?", stream: true })
for await (const part of parts) process.stdout.write(part.response)
== OpenAI
import os
from openai import OpenAI
client = OpenAI(base_url="{address}/v1", api_key=os.environ["TOKEN"])
answer = client.chat.completions.create(model="{model}", messages=[{"role": "user", "content": "Hello!"}])
print(answer.choices[0].message.content)
== Anthropic
import os
from anthropic import Anthropic
client = Anthropic(base_url="{address}", api_key=os.environ["TOKEN"])
answer = client.messages.create(model="{model}", max_tokens=500, messages=[{"role": "user", "content": "Hello!"}])
print(answer.content[0].text)
"""
ACCESS = {"token": "any", "admin": "admin", "public": "none"}


def html_page(title, body, script, base):
    """Return the response for a page; its only sources are its own style and script, and the gateway's API."""
    limits = {limit.column: {key: getattr(limit, key) for key in ("label", "example", "phrase")} for limit in LIMITS}
    script = f'"use strict";\nconst BASE = {json.dumps(base)}, LIMITS = {json.dumps(limits)};\n{script}'
    style_hash, script_hash = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                               for text in (STYLE, script))     # Content Security Policy 3, 2.3.1
    policy = (f"default-src 'none'; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; "
              "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    page = f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body><header><small>ollama_gateway {VERSION}</small><h1>{title}</h1>
{body}<script>{script}</script></body>
</html>
"""
    return 200, "text/html; charset=utf-8", page.encode(), [
        ("Content-Security-Policy", policy), ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-cache")]


def html_table(headings, rows):
    """Return an HTML table; the first cell of a row is code."""
    labels = ["", *(f' data-label="{heading}"' for heading in headings[2:])]    # the second column needs none
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    body = "".join(f'<tr><th scope="row"><code>{html.escape(first)}</code></th>' + "".join(
        f"<td{label}>{html.escape(cell or '')}</td>" for label, cell in zip(labels, others)) + "</tr>\n"
        for first, *others in rows)
    return f'<table class="stack"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'


def html_examples(base):
    """Return the examples; the script fills in address and model. Ollama's libraries append /api to their host."""
    places = {"{address}": '<span class="address">http://127.0.0.1:8000</span>', "{base}": base,
              "{model}": '<span class="model">llama3.2</span>'}
    places["{host}"] = places["{address}"] + base[:-len("/api")]
    found = []
    for name, text in re.findall(r"(?ms)^== (\w+)\n(.*?)\n(?===|\Z)", EXAMPLES):
        if "{host}" not in text or base.endswith("/api"):
            text = re.sub(r"\{\w+\}", lambda place: places.get(place[0], place[0]), html.escape(text, quote=False))
            found.append(f'<details id="example-{name}" name="example"{"" if found else " open"}>'
                         f"<summary>{name}</summary><pre><code>{text}</code></pre></details>")
    return "\n".join(found)


@functools.lru_cache(maxsize=8)     # 2 ms for a page that anyone may request
def docs_page(routes, base):
    """Return the documentation of a gateway with these routes, with /api at the base."""
    has_admin = any(route.handler == "admin" for route in routes)
    body = DOCS.format(
        admin='<a href="admin">Administration</a>' if has_admin else "",
        sign_in=SIGN_IN.format("Token"), examples=html_examples(base),
        routes=html_table(("Route", "Purpose", "Token"), [
            (f"{route.method} {at_base(route.path, base)}", route.summary, name)
            for access, name in ACCESS.items() for route in routes if route.access == access]),
        errors=html_table(("Status", "Reason"), [
            (str(status), meaning) for status, meaning in sorted(REFUSALS.values())]),
        options=html_table(("Flag", "Meaning", "Variable", "Default"), [
            (option.flag, option.help, option.variable, option.default) for option in OPTIONS]))
    return html_page("A shared Ollama server", body, SCRIPT + DOCS_SCRIPT, base)


def admin_page(base):
    """Return the admin page, which is empty until an admin token is entered."""
    body = ADMIN.format(sign_in=SIGN_IN.format("Admin token"))
    return html_page("Administration", body, SCRIPT + ADMIN_SCRIPT, base)

# == Own endpoints ============================================================


def token_response(token, secret=None, status=200):
    return json_response({**token_json(token), **({"token": secret} if secret else {})}, status)


def checked_members(pairs, names, place):
    """Return pairs of names and values as a dictionary; raise UsageError for other names and for repeated ones."""
    members = dict(pairs)
    if len(members) < len(pairs) or not set(members) <= set(names):
        wrong = min(set(members) - set(names), default="a name twice")
        raise UsageError(f'{place} has "{wrong[:40]}": its names may be {", ".join(names)}, each once')
    return members


def read_query(context, *names):
    pairs = urllib.parse.parse_qsl(context.request.query[1:], keep_blank_values=True)
    return checked_members(pairs, names, "the query")


def read_member(column, value):
    """Return the value for a column of a token from a member of a JSON object; raise UsageError."""
    if column not in SETTABLE:
        if not isinstance(value, bool if column == "admin" else str):
            raise UsageError(f"{column}: the value must be {'true or false' if column == 'admin' else 'a string'}")
        return value
    if isinstance(value, list) and column in LIMIT_BY_COLUMN and LIMIT_BY_COLUMN[column].json_type == "string[]":
        value = ",".join(map(str, value))
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    try:
        return read_column(column, text)
    except ValueError as error:
        raise UsageError(f'{column}: "{text[:200]}" {error}') from None


def read_columns(context, *required):
    """Return the columns of a token from the JSON object in a body; raise UsageError."""
    try:
        pairs = json.loads(context.body, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        pairs = None
    if not isinstance(pairs, tuple):
        raise UsageError("the body is not a JSON object")
    members = {**dict.fromkeys(required), **checked_members(pairs, (*required, "admin", *SETTABLE), "the body")}
    return {column: read_member(column, value) for column, value in members.items()}


class Endpoints:
    """The gateway's own endpoints: the method in Route.handler takes the RequestContext and returns the response."""

    def __init__(self, routes, base, store, health, ledger, limiter, metrics, gauges):
        self._routes, self._base = tuple(routes), base
        self._store, self._health, self._ledger, self._limiter = store, health, ledger, limiter
        self._metrics, self._gauges = metrics, gauges

    def banner(self, _):
        """Respond as Ollama does: its clients send this request first."""
        return 200, "text/plain; charset=utf-8", b"Ollama is running"

    def preflight(self, _):
        return 204, "", b""

    def health(self, _):
        return json_response({"status": "ok", "upstream": "up" if self._health.up else "down", "version": VERSION})

    def me(self, context):
        """Return the token, what is left of its limits, and its usage of the last seven days."""
        left = {name: {"limit": most, "remaining": left, "reset": reset}
                for name, most, left, reset in self._limiter.statuses(context.token)}
        shown = token_json(context.token)
        del shown["last_used_at"], shown["expired"]     # it is in use now
        usage = self._store.usage("day", usage_start("7d", self._ledger.now), context.token)
        return json_response({**shown, "left": left, "usage": usage})

    def metrics(self, _):
        lines = "".join(f"{line}\n" for line in self._metrics.lines())
        return 200, "text/plain; version=0.0.4; charset=utf-8", lines.encode()

    def status(self, _):
        health, now = self._health, time.monotonic()
        requests = [{"user": context.token.user, "name": context.token.name, "model": context.model,
                     "path": context.request.redacted_path, "waiting": context.sent_at is None,
                     "seconds": round(now - context.started_at, 3)} for context in self._ledger.running()]
        return json_response({
            "version": VERSION, **{name: read() for name, (_, read) in self._gauges.items()}, "requests": requests,
            "upstream": {"status": "up" if health.up else "down", "version": health.version,
                         "models": health.models, "loaded": health.loaded}})

    def usage(self, context):
        query = {"by": "user", "since": "7d", **read_query(context, "by", "since")}
        by, since = query["by"], query["since"]
        if by not in USAGE_BY:
            raise UsageError(f'by: "{by[:40]}" is not one of {", ".join(USAGE_BY)}')
        try:
            return json_response(self._store.usage(by, usage_start(since, self._ledger.now)))
        except ValueError as error:
            raise UsageError(f'since: "{since[:40]}" {error}') from None

    def openapi(self, _):
        return openapi_response(self._routes, self._base)

    def docs(self, _):
        return docs_page(self._routes, self._base)

    def admin(self, _):
        return admin_page(self._base)

    def _token(self, context):
        return self._store.get(int(context.path.split("/")[3]))

    def list_tokens(self, context):
        tokens = self._store.list(read_query(context, "user").get("user"))
        return json_response([token_json(token) for token in tokens])

    def create_token(self, context):
        return token_response(*self._store.create(**read_columns(context, "user", "name")), status=201)

    def show_token(self, context):
        return token_response(self._token(context))

    def update_token(self, context):
        changes, token = read_columns(context), self._token(context)
        return token_response(self._store.update(token.user, token.name, **changes))

    def rotate_token(self, context):
        token = self._token(context)
        return token_response(*self._store.rotate(token.user, token.name))

    def delete_token(self, context):
        token = self._token(context)
        return token_response(self._store.delete(token.user, token.name))

# == Assembly =================================================================


def server_tls(settings):
    """Return the TLS context for the settings' certificate; raise Failure if it cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except (OSError, ValueError) as error:
        raise Failure(f"cannot use the certificate {settings.tls_cert} with the key "
                      f"{settings.tls_key or settings.tls_cert}: {error}") from None
    return context


def connections_that_fit(most):
    """Raise the limit of open files for so many connections, with four each; return how many connections fit."""
    # Its socket, a spooled body, and the connection to Ollama or, while it waits in the queue or for a name look-up,
    # the two of its wakeup, which are closed before that connection is opened.
    try:
        import resource
    except ImportError:
        return most  # Windows has no such limit
    spare = POOL_SIZE + SPARE_DESCRIPTORS
    needed = CONNECTION_DESCRIPTORS * most + spare
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return most
    with contextlib.suppress(ValueError, OSError):
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return min(max((soft - spare) // CONNECTION_DESCRIPTORS, 1), most)


def build_server(settings, store, log=LOG.info):
    """Return the gateway's server, bound and ready to serve; `log` takes the finished requests' lines, joined."""
    tls = server_tls(settings) if settings.tls_cert else None
    timeouts = settings.connect_timeout, settings.first_byte_timeout, settings.stall_timeout
    upstream = Upstream(settings.ollama_url, *timeouts)
    health, tokens = HealthProbe(upstream), TokenCache(store)
    connections = ConnectionLimiter(connections_that_fit(settings.max_connections), settings.trusted_proxies)
    ledger = UsageLedger(store, tokens)
    queue = FairQueue(settings.max_parallel, settings.max_queue, settings.queue_timeout)
    limiter = Limiter(queue, ledger)
    gauges = {"in_flight_requests": ("Inference requests that are upstream.", lambda: queue.running),
              "queued_requests": ("Inference requests that wait for their turn.", lambda: queue.waiting),
              "connections": ("Open connections of clients.", lambda: len(connections))}
    metrics = Metrics(gauges)
    routes = served_routes(settings.metrics_open, settings.no_admin_api)
    gateway = Gateway(
        trusted_proxies=settings.trusted_proxies, connections=connections, limiter=limiter, health=health,
        router=Router(routes, settings.base_path, settings.path_tokens, settings.cors_origins),
        authenticator=Authenticator(tokens, AuthThrottle()), upstream=upstream, ratios=TokenRatio(),
        endpoints=Endpoints(routes, settings.base_path, store, health, ledger, limiter, metrics, gauges),
        journal=Journal(ledger, metrics, log))
    try:
        return GatewayServer(settings, gateway, tls)
    except (OSError, UnicodeError) as error:
        gateway.close()
        raise Failure(f"cannot listen on {settings.host} port {settings.port}: "
                      f"{getattr(error, 'strerror', None) or error}; choose another with --host and --port") from None

# == Commands =================================================================

PROGRAM = "python3 ollama_gateway.py"
DEFAULT_ARGS = dict(env_file=None, json=False, quiet=False, format=None)  # of every command
MAX_BAR = 30                # columns of the longest bar in `usage`
MIN_COLUMNS = 11            # of a table's column that was narrowed: a date and an ellipsis
TOKEN_VARIABLE = "GATEWAY_TOKEN"
EXPORT_VERSION = 2          # version 1 has no limits
EXPORTED = Token._fields[1:]    # all but the id
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "'")  # a spreadsheet takes such a cell for a formula or a quote
print_line = functools.partial(print, flush=True)   # to stdout; raises OSError if it cannot be written


def print_error(text):
    """Print to stderr, if it can be written."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def format_minute(seconds, otherwise=""):
    return otherwise if seconds is None else format_instant(seconds)[:16].replace("T", " ")


def can_show(text):
    """Report whether stdout's encoding has these characters."""
    encoding = sys.stdout.encoding or "ascii"
    return text.encode(encoding, "ignore").decode(encoding) == text


def text_width(text):
    """Return the columns that a text takes on a terminal."""
    import unicodedata  # `serve` does not need it
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def fit_width(text, columns):
    """Return a text cut or padded to a width."""
    while text_width(text) > columns:
        text = text[:-2] + "…"
    return text + " " * (columns - text_width(text))


def format_table(rows, margin=0, droppable=()):
    """Return rows as aligned lines that fit a terminal, less a margin, if possible.

    The widest columns shrink, down to MIN_COLUMNS; then droppable ones, by their heading, are left out in turn.
    """
    width = shutil.get_terminal_size().columns - margin if sys.stdout.isatty() else math.inf
    widths = [max(map(text_width, column)) for column in zip(*rows)]
    while sum(widths) + 2 * len(widths) - 2 > width and max(widths) > MIN_COLUMNS:
        widths[widths.index(max(widths))] -= 1
    if sum(widths) + 2 * len(widths) - 2 > width and droppable:
        kept = (column for column in zip(*rows) if column[0].strip() != droppable[0])
        return format_table(list(zip(*kept)), margin, droppable[1:])
    return ["  ".join(map(fit_width, row, widths)).rstrip() for row in rows]


def describe(token):
    """Return a token's names, expiry and limits as a part of a sentence."""
    limits = ((limit.phrase, getattr(token, limit.column)) for limit in LIMITS)
    facts = [f"expires {format_instant(token.expires_at)}" if token.expires_at else "does not expire",
             *(phrase.format(value) for phrase, value in limits if value)]
    return f'the {"admin " if token.admin else ""}token "{token.user}/{token.name}" ({"; ".join(facts)})'


def read_value(name, text, read):
    """Return the value that a reader finds in the text of a flag or a column; raise UsageError."""
    try:
        return read(text)
    except ValueError as error:
        raise UsageError(f'{name}: "{_printable(text)[:100]}" {error}') from None


def columns_in_flags(args):
    """Return the values of the given flags for SETTABLE and admin, by column; raise UsageError."""
    found = {"admin": args.admin} if hasattr(args, "admin") else {}
    for column in SETTABLE:
        if hasattr(args, column):
            flag = LIMIT_BY_COLUMN[column].flag if column in LIMIT_BY_COLUMN else "--expires"
            found[column] = read_value(flag, getattr(args, column), functools.partial(read_column, column))
    return found


def command_settings(args, *flags):
    """Return the settings of some flags for a command that does not serve; of the flags, only --db is read."""
    return load_settings({"db": getattr(args, "db", None)}, os.environ, args.env_file,
                         [option for option in OPTIONS if option.flag in flags])


def open_command_store(args, create=False):
    """Open the database that a command's flag, the environment or .env names."""
    return contextlib.closing(TokenStore(command_settings(args, "--db").db, create))


def url_of(settings):
    """Return the URL at which this machine reaches a `serve` with these settings."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.tls_cert else 'http'}://{host}:{settings.port}"


def show_secret(args, store, done, token, secret):
    """Print a new secret: alone, as JSON, or framed, with the command that uses it."""
    if args.quiet:
        return print_line(secret)
    if args.json:
        return print_line(json.dumps(dict(token_json(token), token=secret), indent=2))
    settings = command_settings(args, "--host", "--port", "--tls-cert", "--base-path")
    rule = "-" * min(len(secret), shutil.get_terminal_size().columns - 1)
    print_line(f"{done} {describe(token)} in {store.path}\n\n{rule}\n{secret}\n{rule}\n\n"
               "The secret is shown only now; keep it like a password. To use it:\n\n"
               f'    curl -H "Authorization: Bearer {secret}" {url_of(settings)}{settings.base_path}/tags')


def cmd_token_create(args):
    with open_command_store(args, create=True) as store:
        show_secret(args, store, "Created", *store.create(args.user, args.name, **columns_in_flags(args)))


def cmd_token_rotate(args):
    with open_command_store(args) as store:
        show_secret(args, store, "Gave a new secret to", *store.rotate(args.user, args.name))


TOKEN_COLUMNS = (
    ("USER", operator.attrgetter("user")), ("NAME", operator.attrgetter("name")),
    ("SECRET", lambda token: token.hint + "…"), ("CREATED", lambda token: format_minute(token.created_at)[:10]),
    ("EXPIRES", lambda token: "expired" if is_expired(token) else format_minute(token.expires_at, "never")[:10]),
    ("LAST USED", lambda token: format_minute(token.last_used_at, "never")),
    ("ADMIN", lambda token: "admin" if token.admin else ""),
    *((limit.heading, operator.attrgetter(limit.column)) for limit in LIMITS),
)


def cmd_token_list(args):
    with open_command_store(args) as store:
        tokens = store.list(getattr(args, "user", None))
    if args.json:
        return print_line(json.dumps([token_json(token) for token in tokens], indent=2))
    columns = [(heading, *(str(value(token) or "") for token in tokens)) for heading, value in TOKEN_COLUMNS]
    rows = list(zip(*(column for column in columns if any(column[1:]))))
    lines = format_table(rows, droppable=("CREATED", "SECRET", "LAST USED"))
    print_line("\n".join([*lines, f"{plural(len(tokens), 'token')} in {store.path}"]))


def cmd_token_update(args):
    changes = columns_in_flags(args)
    if not changes:
        raise UsageError("token update: say what to change: --expires, --admin, --no-admin, or a limit")
    with open_command_store(args) as store:
        print_line(f"Changed {describe(store.update(args.user, args.name, **changes))} in {store.path}")


def cmd_token_delete(args):
    with open_command_store(args) as store:
        token = store.delete(args.user, args.name)
        print_line(f'Deleted the token "{token.user}/{token.name}" from {store.path}: it stops at its next request.')


def as_csv(columns, rows):
    """Return rows, which are dictionaries, as CSV in which a spreadsheet finds no formula."""
    file = io.StringIO()
    texts = [["" if row[column] is None else str(row[column]) for column in columns] for row in rows]
    csv.writer(file, lineterminator="\n").writerows(
        ["'" + cell if cell.startswith(FORMULA_STARTS) else cell for cell in line] for line in (columns, *texts))
    return file.getvalue().rstrip("\n")


def replace_file(path, text):
    """Replace a file by lines of text, atomically; only its owner can read the new one."""
    temporary = f"{path}.{os.getpid()}.new"
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            print(text, file=file, flush=True)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise Failure(f"cannot write {path}: {error.strerror}") from None


def cmd_token_export(args):
    form = args.format or ("json" if args.file == "-" else args.file.rpartition(".")[2].lower())
    if form not in ("csv", "json"):
        raise UsageError(f'token export: "{args.file}" ends neither in .csv nor in .json: add --format csv or json')
    with open_command_store(args) as store:
        tokens = [dict(token._asdict(), admin=bool(token.admin)) for token in store.list()]
    rows = [{column: format_instant(token[column]) if column.endswith("_at") else token[column] for column in EXPORTED}
            for token in tokens]
    text = json.dumps({"version": EXPORT_VERSION, "tokens": rows}, indent=2)
    if form == "csv":
        text = as_csv(("version", *EXPORTED), [dict(row, version=EXPORT_VERSION) for row in rows])
    if args.file == "-":
        return print_line(text)
    replace_file(args.file, text)
    print_line(f"Exported {plural(len(rows), 'token')} from {store.path} to {args.file}")


def parse_export(text):
    """Return the rows of an export in either format, as dictionaries of its values; raise ValueError or csv.Error."""
    if text.lstrip().startswith("{"):
        export = json.loads(text)
        rows = export.get("tokens")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it has no list of tokens")
        return [dict(row, version=export.get("version")) for row in rows]
    lines = [[cell[1:] if cell.startswith("'") else cell for cell in line] for line in csv.reader(io.StringIO(text))]
    if not lines or "version" not in lines[0]:
        raise ValueError("its first line does not name the columns")
    return [dict(zip(lines[0], line)) for line in lines[1:] if line]


REQUIRED = {"user": functools.partial(check_name, "user"), "name": functools.partial(check_name, "name"),
            "digest": str, "hint": str, "created_at": parse_instant, "admin": boolean}     # readers of a row's texts
NULLABLE = {**SETTABLE, "expires_at": parse_instant, "last_used_at": parse_instant}
TYPE_IN_JSON = {"admin": bool, **{limit.column: int for limit in LIMITS if limit.json_type == "integer"}}  # or text


def read_export_row(row):
    """Return an exported row as TokenStore.import_rows takes it; raise ValueError or UsageError."""
    version, values = str(row.get("version")), {}
    if version not in map(str, range(1, EXPORT_VERSION + 1)):
        raise ValueError(f"its version is {ascii(version)[:80]}; this program reads up to {EXPORT_VERSION}")
    row = {"hint": "", "expires_at": None, "last_used_at": None,
           **dict.fromkeys(LIMIT_BY_COLUMN if version == "1" else ()), **row}
    for column, read in {**REQUIRED, **NULLABLE}.items():
        value = row.get(column, [])
        if not isinstance(value, (str, TYPE_IN_JSON.get(column, str))) and not (value is None and column in NULLABLE):
            raise ValueError(f"it has no {column}, or one of a wrong type")
        text = "" if value is None else str(value)
        values[column] = None if column in NULLABLE and not text else read_value(column, text, read)
    if not re.fullmatch("[0-9a-f]{64}", values["digest"]) or values["hint"] != _printable(values["hint"])[:HINT_LENGTH]:
        raise ValueError(f"its digest is not a SHA-256, or its hint is not up to {HINT_LENGTH} printable characters")
    check_rights(values["user"], values["name"], values["admin"], values["models"])
    return values


def cmd_token_import(args):
    rows, where, stdin = [], "", sys.stdin or io.StringIO()     # None if it is closed
    try:
        with open(args.file, encoding="utf-8-sig") if args.file != "-" else contextlib.nullcontext(stdin) as file:
            text = file.read().lstrip("\ufeff")
        for number, row in enumerate(parse_export(text), 1):
            where = f"row {number}: "
            rows.append(read_export_row(row))
    except (OSError, ValueError, RecursionError, UsageError, csv.Error) as error:
        raise Failure(f'cannot import {args.file}, which must be a file written by "token export": {where}'
                      f"{getattr(error, 'strerror', None) or error}; nothing was imported") from None
    with open_command_store(args, create=True) as store:
        added = store.import_rows(rows)
        print_line(f"Imported {plural(added, 'token')} into {store.path}; already there: {len(rows) - added}")


def cmd_usage(args):
    by, since = getattr(args, "by", "user"), read_value("--since", getattr(args, "since", "7d"), usage_start)
    with open_command_store(args) as store:
        rows = store.usage(by, since)
    if args.json:
        return print_line(json.dumps(rows, indent=2))
    if args.format == "csv":
        return print_line(as_csv(USAGE_BY[by] + MEASURED, rows))
    columns = [[key.upper(), *(row[key] or "-" for row in rows)] for key in USAGE_BY[by]]
    for column in MEASURED:
        if column not in ("cached_tokens", "estimated_tokens") or any(row[column] for row in rows):
            cells = ["unknown" if row[column] is None else str(round(row[column], 1)) for row in rows]
            cells.insert(0, column.replace("_tokens", "").upper())
            columns.append([cell.rjust(max(map(len, cells))) for cell in cells])
    used = [UsageRow(*(row[column] for column in MEASURED)).tokens_used for row in rows]
    room = shutil.get_terminal_size().columns - sum(max(map(text_width, column)) + 2 for column in columns)
    if sys.stdout.isatty() and room >= MIN_COLUMNS:
        bar = ("█" if can_show("█") else "#") * min(room, MAX_BAR)
        columns.append(["TOKENS", *(bar[:round(len(bar) * tokens / (max(used) or 1))] for tokens in used)])
    droppable = "ESTIMATED", "SECONDS", "CANCELLED", "ERRORS", "CACHED", "REQUESTS"
    lines = format_table(list(zip(*columns)), droppable=droppable) if rows else []
    requests = plural(sum(row["requests"] for row in rows), "request")
    tokens = plural(sum(used), "token")
    print_line("\n".join([*lines, f"{requests}, {tokens} since {format_minute(since)} UTC in {store.path}"]))


@contextlib.contextmanager
def configure_logging(settings):
    """Log to stderr and to the settings' log file within the with block; yield the LogFile, or None without one."""
    file, writers = None, [LogWriter("stderr", functools.partial(write_all, sys.stderr.fileno()), settings.log_level)]
    if settings.log_file:
        try:
            file = LogFile(settings.log_file)
        except (OSError, ValueError) as error:
            raise Failure(f"cannot write the log {settings.log_file!a}: {getattr(error, 'strerror', error)}") from None
        writers.append(LogWriter(settings.log_file, file.write, settings.log_file_level))
    LOG.setLevel(min(writer.level for writer in writers))
    with contextlib.ExitStack() as stack:
        for writer in writers:  # the file's is finished first: stderr reports its errors
            LOG.addHandler(writer)
            stack.callback(LOG.removeHandler, writer)
            stack.callback(writer.finish)
        yield file


def reload(server, settings, log_file):
    """Reopen the log file and load the certificate again; if one of them fails, the old one stays in use."""
    done = []
    for what, path, renew in (
            ("log file", settings.log_file, lambda: log_file.reopen()),
            ("certificate", settings.tls_cert, lambda: setattr(server, "tls", server_tls(settings)))):
        try:
            if path:
                renew()
                done.append(f"the {what} {path}")
        except (Failure, OSError) as error:
            LOG.error("SIGHUP: the old %s stays: %s", what, error)
    LOG.info("SIGHUP: reloaded %s", " and ".join(done) or "nothing")


def is_loopback(host):
    return host == "::1" or host.startswith("127.")


def announce(settings, server, store):
    """Print to stderr where the gateway listens, the state of Ollama and the database, and warnings for the owner."""
    health, tokens, kind = server.gateway.health, len(store.list()), remote_file_system(store.path)
    held = f"{plural(tokens, 'token')} in {store.path}" if tokens else (
        f"no tokens yet, so no access: create one with {PROGRAM} token create USER NAME --db {store.path}")
    print_error(f"ollama_gateway {VERSION} listening on {server.url}, upstream {settings.ollama_url.geturl()} "
                f"({plural(len(health.models), 'model') if health.up else 'DOES NOT ANSWER yet'}), {held}")
    for wrong, text in (
            (server.connections.most < settings.max_connections, f"Only {server.connections.most} connections fit: "
             f"raise the limit of open files (ulimit -n), or lower --max-connections from {settings.max_connections}."),
            (not store.writable, "The database is read-only: a change of tokens takes effect at the next start."),
            (kind, f"Warning: the database is on a network or FUSE file system ({kind}), which may lose its changes: "
             "move it to a local disk (--db)."),
            (not server.tls and not is_loopback(server.server_address[0]),
             "Warning: it can be reached from the network, and without TLS tokens are sent in clear: "
             "use --tls-cert, or a proxy that speaks HTTPS, and --host 127.0.0.1.")):
        if wrong:
            print_error(text)


def cmd_serve(args):
    """Run the gateway until SIGINT or SIGTERM."""
    settings = load_settings(vars(args), os.environ, args.env_file)
    os.umask(0o077)  # also for logs and the files that SQLite creates beside the database
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # until the server is there
    with configure_logging(settings) as log_file, contextlib.closing(TokenStore(settings.db, create=True)) as store:
        server = build_server(settings, store)

        def handle_hangup(*_):  # in a thread, since a blocked stderr must not stop the main one
            with contextlib.suppress(RuntimeError):  # no thread could be started
                threading.Thread(target=reload, args=(server, settings, log_file), name="reload", daemon=True).start()

        def handle_stop(*_):    # a later signal must not raise: an exception inside Condition.wait() breaks its lock
            for number in signal.SIGINT, signal.SIGTERM:
                signal.signal(number, lambda *_: server.connections.abort_soon())
            raise KeyboardInterrupt
        try:
            for number in signal.SIGINT, signal.SIGTERM:
                signal.signal(number, handle_stop)
            if hasattr(signal, "SIGHUP"):
                signal.signal(signal.SIGHUP, handle_hangup)
            server.gateway.health.start(functools.partial(announce, settings, server, store))
            threading.Thread(target=stay_on_one_core, name="cpu affinity", daemon=True).start()
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            server.server_close(settings.drain_timeout)
            for number in signal.SIGINT, signal.SIGTERM:
                signal.signal(number, signal.SIG_IGN)   # a Python handler would not survive the interpreter's end


def option_keywords(option):
    """Return argparse's keywords for a setting."""
    how = dict(action="store_const", const="on") if option.convert is boolean else dict(metavar=option.metavar)
    return dict(how, help=f"{option.help} ({', default '.join(filter(None, (option.variable, option.default)))})")


ARGUMENTS = {   # name, after "serve" if it is a setting: heading in the help, None for only one of these; keywords
    "user": ("", dict(metavar="USER", help="owner of the token: a person")),
    "name": ("", dict(metavar="NAME", help="label of the token: a device, a program")),
    "file": ("", dict(metavar="FILE", help='a .csv or .json file of tokens; "-" is stdout (as JSON) or stdin')),
    "--expires": ("", dict(dest="expires_at", metavar="WHEN", help='30d, 2027-01-31, 2027-01-31T18:00:00Z, or "none"')),
    "--admin": ("", dict(action="store_true", help="may manage tokens and models, and act as the owner at ollama.com")),
    "--no-admin": ("", dict(dest="admin", action="store_false", help="take the admin rights away")),
    "--user": ("", dict(metavar="USER", help="only the tokens of this user")),
    "--format": ("", dict(choices=("csv", "json"), help="format, whatever the name of the file")),
    "--by": ("", dict(choices=tuple(USAGE_BY), help="what each row stands for (default: user)")),
    "--since": ("", dict(metavar="WHEN", help="7d (UTC days with today), 12h or 2027-01-31 (default: 7d)")),
    "--url": ("", dict(metavar="URL", help=f"the gateway's public URL; a token in {TOKEN_VARIABLE} tests its streams")),
    "--quiet": (None, dict(action="store_true", help="print the secret alone")),
    "--json": (None, dict(action="store_true", help="print JSON")),
    "--csv": (None, dict(dest="format", action="store_const", const="csv", help="print CSV")),
    **{limit.flag: ('limits ("none" removes one)', dict(metavar=limit.metavar, help=limit.help)) for limit in LIMITS},
    **{f"serve {option.flag}": (option.group, option_keywords(option)) for option in OPTIONS
       if option is not DATABASE_OPTION},
    "--db": ("", option_keywords(DATABASE_OPTION)),
    "--env-file": ("", dict(metavar="FILE", help="settings file in place of .env")),
    "--version": ("", dict(action="version", version=f"ollama_gateway {VERSION}", help="show it and exit")),
}
SERVE_FLAGS = tuple(name for name in ARGUMENTS if name.startswith("serve"))
RIGHTS_FLAGS = ("--expires", "--admin", *(limit.flag for limit in LIMITS))
COMMANDS = (    # words, function, help, the rest of its examples, arguments
    ("serve", cmd_serve, "run the gateway", ("", "--host 0.0.0.0 --tls-cert box.pem"), SERVE_FLAGS),
    ("usage", cmd_usage, "show usage: requests and tokens", ("", "--by model"), ("--by", "--since", "--json", "--csv")),
    ("token", None, "create and manage tokens", ("create ada laptop --expires 90d", "list"), ()),
    ("token create", cmd_token_create, "create a token and show its secret, once",
     ("ada laptop --expires 90d", "kim pc --models 'llama3*'"), ("user", "name", *RIGHTS_FLAGS, "--quiet", "--json")),
    ("token list", cmd_token_list, "list the tokens", ("--user ada",), ("--user", "--json")),
    ("token update", cmd_token_update, "change a token, from its next request on",
     ("ada laptop --expires none --rpm 30",), ("user", "name", *RIGHTS_FLAGS, "--no-admin")),
    ("token rotate", cmd_token_rotate, "replace the secret", ("ada laptop",), ("user", "name", "--quiet", "--json")),
    ("token delete", cmd_token_delete, "delete a token: its next request fails", ("ada laptop",), ("user", "name")),
    ("token export", cmd_token_export, "write all tokens without secrets", ("tokens.csv",), ("file", "--format")),
    ("token import", cmd_token_import, "add the tokens of an exported file, all or none", ("tokens.csv",), ("file",)),
)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, and without attributes for arguments that were not given."""

    def __init__(self, purpose, examples, arguments=(), **how):
        width = min(shutil.get_terminal_size().columns, 80) - 2
        super().__init__(
            allow_abbrev=False, argument_default=argparse.SUPPRESS, description=f"{purpose[0].upper()}{purpose[1:]}.",
            usage="%(prog)s [OPTION ...]" if len(arguments) > 15 else None,    # else it fills half a screen
            formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=26, width=width),
            **how)
        self.epilog = "\n".join(["examples:", *(f"  python3 {self.prog} {example}".rstrip() for example in examples)])
        groups = {"": self}
        for name in ("--db", "--env-file", "--version", *arguments):
            title, keywords = ARGUMENTS[name]
            if title not in groups:
                groups[title] = self.add_argument_group(title) if title else self.add_mutually_exclusive_group()
            groups[title].add_argument(name.split()[-1], **keywords)

    def error(self, message):
        """Exit with the message and a suggestion for a mistyped word."""
        import difflib  # only errors need it
        wrong = re.search(r"(invalid choice|unrecognized arguments): '?([^\s'=]+)", message)
        if wrong:
            flags = ["--help", *(name.split()[-1] for name in ARGUMENTS if "--" in name)]
            known = flags if wrong[1][0] == "u" else re.findall(r"[\w-]+", message[wrong.end():])
            message += "".join(f'; did you mean "{near}"?' for near in difflib.get_close_matches(wrong[2], known, 1))
        super().error(message)

    def _print_message(self, message, file=None):
        (print_line if file is sys.stdout else print_error)(message.rstrip("\n"))   # argparse would ignore an OSError

# == Menu =====================================================================

ESCAPE_SECONDS = 0.05       # the rest of a key's escape sequence arrives within this time, over a slow line too
SIGNAL_SECONDS = 0.1        # interval at which signals are acted on
KEY_STEPS = {"\x1bA": -1, "\x10": -1, "\x1bB": 1, "\x0e": 1}    # of the keys up, Ctrl-P, down, Ctrl-N in a list
BACK_KEYS = ("<", "\x1b", "\x1bD")  # <, Esc, left
ERASE = "\r\x1b[J"          # from the cursor's line to the end of the screen


class Back(Exception):
    """The user goes back to the list of actions."""


class LinePrompt:
    """Asks line by line: for pipes, plain terminals, and systems without termios or readline."""

    def choose(self, title, labels, at=0):
        """Return the index of the chosen label; raise Back."""
        print_line(_printable(title))
        for number, label in (*enumerate(labels, 1), (0, "Back")):
            print_line(_printable(f"{number:{len(str(len(labels)))}}  {label}"))
        number = int(self.ask("Number", str(at + 1), functools.partial(integer, low=0, high=len(labels))))
        if not number:
            raise Back
        return number - 1

    def ask(self, question, default, check):
        """Return a line that `check` accepts, the default for an empty line; raise Back."""
        prompt = _printable(f"{question} [{default}]: " if default else f"{question}: ")
        while True:
            answer = self._wait(input, prompt).strip() or default
            if not sys.stdin.isatty():
                print_line(_printable(answer))  # else the next prompt would follow on the same line
            if answer == "<":
                raise Back
            try:
                check(answer)
                return answer
            except (ValueError, UsageError, Failure) as error:
                print_line(_printable(f'"{answer}" {error}' if isinstance(error, ValueError) else str(error)))

    @staticmethod
    def _wait(call, *args):
        return call(*args)


class ArrowPrompt(LinePrompt):
    """Asks on a terminal: lists by arrow keys, in raw mode; everything else by input(), with readline."""

    def __init__(self):
        import readline     # noqa: F401, input() uses it; Windows has neither module
        import termios
        self._termios, self._signals, self._list = termios, [], ()
        self._normal, self._raw = termios.tcgetattr(sys.stdin), termios.tcgetattr(sys.stdin)
        self._raw[3] &= ~(termios.ICANON | termios.ECHO | termios.IEXTEN)

    @contextlib.contextmanager
    def handling_signals(self):
        """Handle signals in the with block so that each of them leaves or suspends a terminal in its normal mode.

        They are only noted when they come. A timer acts on them, also on one that came just before a wait for input,
        but only in such a wait: elsewhere an exception may be ignored, as in a weak reference's callback.
        """
        handlers = dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP),
                                 lambda number, _: self._signals.append(number))
        with contextlib.ExitStack() as stack:
            for number, handler in {**handlers, signal.SIGALRM: self._act}.items():
                stack.callback(signal.signal, number, signal.signal(number, handler))
            stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_REAL, SIGNAL_SECONDS, SIGNAL_SECONDS)
            yield self

    def _act(self, _, frame):
        if not self._signals or frame.f_code is not self._wait.__code__:
            return
        if set(self._signals) != {signal.SIGTSTP}:
            raise KeyboardInterrupt     # again if input() ignores it, as it does while it flushes stdout
        self._signals.remove(signal.SIGTSTP)
        mode = self._termios.tcgetattr(sys.stdin)
        if self._list:
            print(ERASE, end="", flush=True)
        self._set_mode(self._normal)
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)    # returns when the process is continued
        signal.signal(signal.SIGTSTP, handler)
        self._set_mode(mode)
        if self._list:
            self._draw(*self._list)

    def _set_mode(self, mode):
        with contextlib.suppress(self._termios.error):  # the terminal was closed
            self._termios.tcsetattr(sys.stdin, self._termios.TCSANOW, mode)

    def choose(self, title, labels, at=0):
        key = typed = ""
        try:
            self._set_mode(self._raw)
            while key not in ("\r", "\n", *BACK_KEYS):
                typed = next((n for n in (typed + key, key) if n.isdigit() and 0 < int(n) <= len(labels)), "")
                at = int(typed) - 1 if typed else (at + KEY_STEPS.get(key, 0)) % len(labels)
                self._list = title, labels, at
                self._draw(*self._list)
                key = self._read_key()
        finally:
            self._set_mode(self._normal)
            self._list = ()
            print(ERASE, end="", flush=True)
        print_line(_printable(f"{title} > {'Back' if key in BACK_KEYS else labels[at]}"))
        if key in BACK_KEYS:
            raise Back
        return at

    @staticmethod
    def _draw(title, labels, at):
        """Draw a list over the last one; the cursor stays at its top: ERASE works even if its lines are wrapped."""
        columns, lines = shutil.get_terminal_size()
        columns, rows = max(columns, 20) - 1, max(min(lines - 2, len(labels)), 1)
        start, pointer = max(min(at - rows // 2, len(labels) - rows), 0), "❯" if can_show("❯") else ">"
        title = fit_width(_printable(f"{title} ({at + 1}/{len(labels)})"), columns).rstrip()
        drawn, style = [ERASE + title], "\x1b[1m" if os.environ.get("NO_COLOR") else "\x1b[1;36m"     # bold; cyan
        for number, label in list(enumerate(labels, 1))[start:start + rows]:
            mark, bold, plain = (pointer, style, "\x1b[0m") if number == at + 1 else (" ", "", "")
            line = fit_width(_printable(f"{mark} {number:{len(str(len(labels)))}}  {label}"), columns).rstrip()
            drawn.append(f"{bold}{line}{plain}")
        print("\n".join(drawn) + f"\x1b[{rows}A\r\x1b[{text_width(title)}C", end="", flush=True)

    def _read_key(self):
        """Read no byte after a key: it may be for input(). Return a sequence as Esc and its last character."""
        key = self._wait(os.read, sys.stdin.fileno(), 1)
        if key in (b"", b"\x04"):
            raise EOFError
        while re.fullmatch(rb"\x1b([\[O][0-9;]*)?", key) and select.select([sys.stdin], (), (), ESCAPE_SECONDS)[0]:
            key += os.read(sys.stdin.fileno(), 1)
        return (key[:1] + key[-1:] if len(key) > 2 else key[-1:]).decode("ascii", "ignore")


NO_YES = {False: "No", True: "Yes"}
QUESTIONS = {"expires_at": "Expires (30d, 2027-01-31, none)", "admin": "Admin (may manage models and tokens)",
             **{limit.column: limit.label + (limit.example and f" (as {limit.example})") for limit in LIMITS}}


class Menu:
    """The actions: each one asks for the arguments of a command and runs it."""

    def __init__(self, prompt, **args):
        self._prompt, self._args = prompt, dict(DEFAULT_ARGS, **args)

    def run(self):
        """Offer the actions until the user leaves; raise Back then."""
        at = 0
        while True:
            print_line("")
            at = self._prompt.choose("Ollama Gateway", [label for label, *_ in self.ACTIONS], at)
            _, action, *args = self.ACTIONS[at]
            if not action:
                raise Back
            try:
                action(self, *args)
            except Back:
                continue
            except (UsageError, Failure) as error:
                print_line(_printable(str(error)))

    def _run(self, command, **args):
        command(argparse.Namespace(**self._args, **args))

    def _tokens(self):
        with open_command_store(argparse.Namespace(**self._args)) as store:
            return store.list()

    def _choose(self, title, labels, present=None):
        """Return the chosen key of {key: label}."""
        keys = list(labels)
        return keys[self._prompt.choose(title, list(labels.values()), keys.index(present) if present in keys else 0)]

    def _ask_value(self, column, present):
        if column == "admin":
            return self._choose(QUESTIONS[column], NO_YES, present == "Yes")
        return self._prompt.ask(QUESTIONS[column], present, functools.partial(read_column, column))

    def _choose_token(self):
        tokens = self._tokens()
        if not tokens:
            raise Failure("There are no tokens yet: generate one first.")
        counts = Counter(token.user for token in tokens)
        user = self._choose("Whose token?", {user: f"{user} ({plural(counts[user], 'token')})" for user in counts})
        tokens, cells = [token for token in tokens if token.user == user], dict(TOKEN_COLUMNS)
        rows = [[cells[heading](token) for heading in ("NAME", "SECRET", "EXPIRES")] for token in tokens]
        return self._choose("Which token?", dict(zip(tokens, format_table(rows, 8))))

    def _create(self):
        tokens = self._tokens()
        users = {token.user: token.user for token in tokens}
        user = users and self._choose("Whose token?", {"": "A new user", **users})
        user = user or self._prompt.ask("User (a person)", "", functools.partial(check_name, "user"))
        taken = {token.name for token in tokens if token.user == user}

        def check(name):
            if check_name("name", name) in taken:
                raise token_exists(user, name)
        names = itertools.chain(["laptop"], map("laptop-{}".format, itertools.count(2)))
        name = self._prompt.ask("Name (a device, a program)", next(name for name in names if name not in taken), check)
        args = {"expires_at": self._ask_value("expires_at", "none"), "admin": self._ask_value("admin", "No")}
        if self._choose("Limits", {False: "No limits", True: "Set them, one by one"}):
            columns = [column for column in LIMIT_BY_COLUMN if column != "models" or not args["admin"]]
            args.update((column, self._ask_value(column, "none")) for column in columns)
        self._run(cmd_token_create, user=user, name=name, **args)

    def _change(self):
        token = self._choose_token()
        present = {column: str(getattr(token, column) or "none") for column in QUESTIONS}
        present.update(expires_at=format_instant(token.expires_at) or "none", admin=NO_YES[bool(token.admin)])
        lines = format_table([(QUESTIONS[key].partition(" (")[0], present[key]) for key in QUESTIONS], 8)
        column = self._choose(f'Change "{token.user}/{token.name}"', dict(zip(QUESTIONS, lines)))
        value = self._ask_value(column, present[column])
        self._run(cmd_token_update, user=token.user, name=token.name, **{column: value})

    def _confirm(self, command, question):
        token = self._choose_token()
        if self._choose(question.format(token.user, token.name), NO_YES):
            self._run(command, user=token.user, name=token.name)

    def _export(self):
        def check(path):
            if not path.lower().endswith((".csv", ".json")):
                raise ValueError("ends neither in .csv nor in .json")
        file = os.path.expanduser(self._prompt.ask("File (.csv or .json)", "tokens.csv", check))
        if not os.path.exists(file) or self._choose(f"Replace the existing file {file}?", NO_YES):
            self._run(cmd_token_export, file=file)

    def _usage(self):
        by = self._choose("Usage by", dict(zip(USAGE_BY, USAGE_BY)))
        self._run(cmd_usage, by=by, since=self._prompt.ask("Since (7d, 12h, 2027-01-31)", "7d", usage_start))

    ACTIONS = (     # label, function, its arguments; the first four are in the order of the FastAPI gateway
        ("Generate a token", _create),
        ("List all users", _run, cmd_token_list),
        ("Delete a token", _confirm, cmd_token_delete, 'Delete "{}/{}"? It stops at its next request.'),
        ("Export users to file", _export),
        ("Change limits", _change),
        ("Rotate a token", _confirm, cmd_token_rotate, 'Rotate "{}/{}"? Its old secret stops working.'),
        ("Usage", _usage),
        ("Exit", None))


def cmd_token_menu(args):
    if sys.stdin is None:
        raise Failure("token menu: stdin is closed, and the answers come from there")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")     # check_name refuses what cannot be decoded
    with open_command_store(args, create=True) as store:
        path = store.path
    prompts = contextlib.nullcontext(LinePrompt())
    if sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        with contextlib.suppress(ImportError):
            prompts = ArrowPrompt().handling_signals()
    print_line(f"The tokens are in {path}\n"
               'Enter takes the choice or the value in [brackets], "<" goes back, Ctrl-C leaves the menu.')
    try:
        with prompts as prompt:
            Menu(prompt, env_file=args.env_file, db=path).run()
    except (Back, EOFError, KeyboardInterrupt):
        print_line("\nLeft the menu.")


MENU = ("token menu", cmd_token_menu, "manage the tokens from a menu, with arrow keys", ("",), ())

# == Doctor ===================================================================

# A check yields (True if it passed, False if it failed or None if that is unknown; text; advice, if there is any).
FLOORS = (("Python", "%d.%d.%d" % sys.version_info[:3], (3, 8)), ("SQLite", SQLITE_VERSION, (3, 26)))
STREAM_TOKENS = 48      # requested from a model to see whether they arrive one by one
TELLING_SECONDS = 0.02  # a response that took less proves nothing


def local_addresses():
    """Return the addresses by which others may reach this machine, sorted, without loopback and link-local ones."""
    found = set()
    with contextlib.suppress(OSError), open("/proc/net/fib_trie", encoding="ascii") as file:
        found.update(re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", file.read()))
    with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as file:
        found.update(str(ipaddress.IPv6Address(int(line.split()[0], 16))) for line in file)
    with contextlib.suppress(OSError):
        found.update(entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None))
    return sorted(str(address) for address in map(address_of, found)
                  if not (address.is_loopback or address.is_link_local or address.is_unspecified))


def is_local_host(host):
    """Return whether a host name is this machine's; raise OSError for one without an address."""
    found = {address_of(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    return any(address.is_loopback or str(address) in local_addresses() for address in found)


def check_database(settings):
    """Check that the database can be used, and by its owner alone."""
    path, newest = os.path.abspath(settings.db), len(MIGRATIONS)
    found, kind = describe_database(path), remote_file_system(path)
    upgrade = "" if found.version == newest else f", upgraded to {newest} at the next start"
    yield (True, f"the database {path} has {plural(found.tokens, 'token')} (version {found.version}{upgrade})",
           "" if found.tokens else f"nobody has access yet: {PROGRAM} token create USER NAME")
    if os.name == "posix" and found.mode & 0o077:
        yield False, f"other users of this machine can read the database ({found.mode:o})", f"chmod 600 {path}"
    if kind:
        yield (False, f"the database is on a network or FUSE file system ({kind}): its changes may be lost",
               "move it to a local disk and name it with --db")
    if not found.writable:
        yield False, "the database is read-only for this user", f"make {path} and its folder writable"


def upstream_at(url, settings, verify=True):
    """Return an Upstream for a with block; without `verify` it accepts any certificate."""
    tls = ssl.create_default_context()
    if not verify:
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    return contextlib.closing(
        Upstream(url, settings.connect_timeout, settings.first_byte_timeout, settings.stall_timeout, tls))


def names_in(listed):
    """Return the names in Ollama's list of models."""
    models = (listed or {}).get("models")
    return [str(model.get("name")) for model in models if isinstance(model, dict)] if isinstance(models, list) else []


def check_ollama(settings):
    """Check that Ollama answers; show its version and models."""
    url = settings.ollama_url.geturl()
    with upstream_at(settings.ollama_url, settings) as ollama:
        status, about = ollama.get_json("/api/version")
        models = names_in(ollama.get_json("/api/tags")[1])
        refused = ollama.get_json("/api/version", "Origin: https://chat.example\r\n")[0] == 403
    if status == 403:
        yield (False, f"Ollama at {url} refuses requests for that host name",
               "use localhost or its IP address in --ollama-url")
    elif status != 200 or "version" not in (about or ()):
        yield False, f"the server at {url} is not Ollama (status {status})", "set Ollama's address: --ollama-url URL"
    else:
        shown = ", ".join(models[:5]) + (", …" if len(models) > 5 else "") or "get one with ollama pull llama3.2"
        yield True, f"Ollama {about['version']} answers at {url}, with {plural(len(models), 'model')}: {shown}"
        yield (True, "Ollama accepts the gateway's Host" + (
            "; it refuses other sites' Origin, but the gateway forwards none" if refused else " and any Origin"))


def ollama_answers_at(host, settings):
    """Return whether an Ollama answers at a host, on the port of --ollama-url, to requests without a token."""
    url = settings.ollama_url
    there = url._replace(netloc=f"[{host}]:{port_of(url)}" if ":" in host else f"{host}:{port_of(url)}")
    with contextlib.suppress(UpstreamError, Refusal), upstream_at(there, settings, verify=False) as ollama:
        status, about = ollama.get_json("/api/version")
        return status == 200 and "version" in (about or ())
    return False


def check_bypass(settings, addresses):
    """Check that others cannot reach Ollama itself, where they would need no token."""
    host, port = settings.ollama_url.hostname, port_of(settings.ollama_url)
    if not is_local_host(host):
        return (yield None, f"who else can reach Ollama on {host} cannot be checked from here",
                "make sure there that only this machine can")
    found = [address for address in addresses if ollama_answers_at(address, settings)]
    if found:
        yield (False, f"Ollama answers at {', '.join(found)} port {port}: the gateway protects nothing",
               "let it listen on loopback only: OLLAMA_HOST=127.0.0.1 (systemctl edit ollama.service; "
               f"in Docker publish 127.0.0.1:{port}:{port}), or close the port to others")
    elif ollama_answers_at(host, settings):
        others = ", ".join(addresses) or "it has none"
        yield True, f"Ollama's port {port} is closed at this machine's other addresses: {others}"
    else:
        yield None, "whether others reach Ollama itself cannot be checked while it does not answer"


def check_tls(settings):
    """Check certificate and key, or show who could read the tokens without them."""
    if settings.tls_cert and server_tls(settings):
        yield True, f"the certificate {settings.tls_cert} and its key are readable and match"
    elif is_loopback(settings.host):
        yield None, f"no TLS: only this machine can reach {settings.host}"
    else:
        yield (None, f"no TLS: tokens travel to {settings.host} in clear text",
               "use --tls-cert, or a proxy that speaks HTTPS, and --host 127.0.0.1")


def judge_stream(where, model, took, data):
    """Return the result for a response that arrived within so many seconds; Ollama reports how long it took to make."""
    try:
        made = json.loads(data.splitlines()[-1])["eval_duration"] / 1e9
    except (ValueError, LookupError, TypeError):
        return False, f"a streamed response of {where} has no proper end", "see the gateway's log"
    times = f"{model} took {made:.2f} s, and its response arrived within {took:.2f} s"
    if made < TELLING_SECONDS:
        return None, f"whether {where} holds streams back is unknown: {times}"
    if took < made / 2:
        return (False, f"{where} holds streams back: {times}", "let the proxy pass them on: nginx proxy_buffering off; "
                "Caddy flush_interval -1; and no compression of application/x-ndjson")
    return True, f"{where} forwards streams without delay: {times}"


def check_stream(where, gateway, base, secret):
    """Check that a streamed response arrives piece by piece, and that no proxy before the gateway holds it back."""
    untried = f"the stream test of {where} was not tried"
    if not secret:
        return (yield None, untried, f"set a token in the variable {TOKEN_VARIABLE}")
    fields = f"Authorization: Bearer {secret}\r\nContent-Type: application/json\r\n"
    status, listed = gateway.get_json(f"{base}/tags", fields)
    if status != 200:
        return (yield False, f"{where} answers {status} to the token: {(listed or {}).get('error', '')}",
                f"see the token in {TOKEN_VARIABLE}, and the gateway's --base-path")
    for model in names_in(listed):
        body = {"model": model, "prompt": "Count from one to fifty.", "options": {"num_predict": STREAM_TOKENS}}
        request = UpstreamRequest("POST", f"{base}/generate", fields, BufferedBody(json.dumps(body).encode()))
        arrivals, data = [], b""
        with gateway.send(request) as response:
            while not response.body.complete:
                data += response.read()
                arrivals.append(time.monotonic())
        if response.status == 200:
            return (yield judge_stream(where, model, arrivals[-1] - arrivals[0], data))
        if response.status != 400:  # which is for a model that makes no text
            return (yield None, f"{untried}: it answers {response.status}")
    yield None, f"{untried}: no model makes text"


def guarded(check, subject="", advice=""):
    """Yield the results of a check; an exception that ends it is a failure of the subject."""
    try:
        yield from check
    except (UsageError, Failure, UpstreamError, Refusal, OSError) as error:
        yield False, f"{subject}{error}", advice


def check_gateway(url, settings, secret, verify=True):
    """Check that a gateway answers at a URL, reaches Ollama, and streams."""
    where = url.geturl()
    with upstream_at(url, settings, verify) as gateway:
        status, about = gateway.get_json("/health")
        if status != 200 or not {"status", "upstream", "version"} <= set(about or ()):
            raise Failure(f"the server is not this gateway (status {status} to /health)")
        if about["upstream"] != "up":
            return (yield False, f"the gateway {about['version']} at {where} does not reach Ollama", "see its log")
        yield True, f"the gateway {about['version']} answers at {where}, and reaches Ollama"
        yield from guarded(check_stream(where, gateway, settings.base_path, secret), f"a stream of {where}: ")


def check_address(settings, secret):
    """Check that the gateway runs at the address to listen on, or that the address is free."""
    where = f"{settings.host} port {settings.port}"
    try:
        family, _, _, _, address = look_up(settings.host, settings.port, socket.AI_PASSIVE)[0]
        socket.create_server(address, family=family, dualstack_ipv6=family == socket.AF_INET6).close()
        yield True, f"{where} is free: no gateway runs there"
    except (OSError, ValueError) as error:
        url = urllib.parse.urlsplit(url_of(settings))
        subject = f"cannot listen on {where}: {getattr(error, 'strerror', None) or error}; "
        advice = "choose another address with --host and --port"
        yield from guarded(check_gateway(url, settings, secret, verify=False), subject, advice)


def check_all(args, url, secret):
    """Yield the results of all checks; url: the gateway's public address, or None."""
    for name, found, least in FLOORS:
        ok = tuple(map(int, found.split(".")[:2])) >= least
        yield ok, f"{name} {found}", "" if ok else "install {} {}.{} or newer".format(name, *least)
    settings = load_settings(vars(args), os.environ, args.env_file)
    given = [f"{source} {raw}" if source.startswith("--") else f"{source}: {raw}"
             for source, raw in settings.given.values()]
    yield True, f"settings: {'; '.join(given) or 'all by default'}"
    yield from guarded(check_database(settings))
    ollama, host = settings.ollama_url.geturl(), settings.ollama_url.hostname
    yield from guarded(check_ollama(settings), f"Ollama at {ollama}: ", "start it, or see --ollama-url")
    yield from guarded(check_bypass(settings, local_addresses()), f"the host name {host}: ", "see --ollama-url")
    yield from guarded(check_tls(settings), "", "see --tls-cert and --tls-key")
    yield from check_address(settings, secret)
    if url:
        yield from guarded(check_gateway(url, settings, secret), f"the gateway at {url.geturl()}: ",
                           "see whether it runs, and where that address leads")


def cmd_doctor(args):
    """Check what the gateway depends on, itself, and the way to it; return 1 if a check failed."""
    secret = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not secret and hasattr(args, "url") and sys.stdin.isatty():
        import getpass  # only this needs it
        secret = getpass.getpass("A token for the stream test (Enter: none): ").strip()
    if not re.fullmatch(r"[\x21-\x7e]*", secret):
        raise UsageError(f"{TOKEN_VARIABLE}: this is not a valid token: check that it was copied completely")
    try:
        url = upstream_url(args.url) if hasattr(args, "url") else None
    except ValueError:
        raise UsageError(f'--url: "{args.url}" is not a URL like https://public.example/') from None
    markers = dict(zip((True, False, None), ("✓", "✗", "-") if can_show("✓✗") else ("ok  ", "FAIL", "--  ")))
    counts = Counter()
    for ok, text, *advice in guarded(check_all(args, url, secret), "settings: ", "the other checks need valid ones"):
        counts[ok] += 1
        print_line(f"{markers[ok]} {_printable(text)}")     # part of it may come from another server
        for line in filter(None, advice):
            print_line(f"{' ' * len(markers[ok])} {line}")
    checks, failed = plural(sum(counts.values()), "check"), counts[False]
    print_line(f"{failed} of {checks} failed" if failed else f"{checks}, none failed")
    return 1 if failed else 0


DOCTOR = ("doctor", cmd_doctor, "diagnose the configuration, Ollama and the network",
          ("", "--port 8000 --url https://ollama.example/"), (*SERVE_FLAGS, "--url"))

# == Main =====================================================================


def build_parser():
    """Return the parser of the whole command line."""
    parser = Parser("authenticating reverse proxy for Ollama: a token for each person and device",
                    ("token create ada laptop", "serve --port 8000"), prog="ollama_gateway.py")
    groups = {"": parser.add_subparsers(metavar="COMMAND", required=True)}
    for words, run, purpose, examples, arguments in (*COMMANDS, MENU, DOCTOR):
        group, _, name = words.rpartition(" ")
        command = groups[group].add_parser(name, help=purpose, purpose=purpose, examples=examples, arguments=arguments)
        command.set_defaults(run=run)
        if run is None:
            groups[words] = command.add_subparsers(metavar="ACTION", required=True)
    return parser


def main(argv=None):
    """Return the exit status of a command: 1 for a failure, 2 for a wrong value; raise SystemExit for a wrong flag."""
    for name in "stdout", "stderr":
        stream = getattr(sys, name) or open(os.open(os.devnull, os.O_RDONLY), "w")  # printing to a closed one must fail
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show
    try:
        args = build_parser().parse_args(argv, argparse.Namespace(**DEFAULT_ARGS))
        return args.run(args) or 0
    except (UsageError, Failure) as error:
        print_error(f"ollama_gateway: {error}")
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print_error(f"ollama_gateway: cannot write the output: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        for stream in sys.stdout, sys.stderr:
            try:
                stream.flush()
            except OSError:  # Python would try again at exit, complain, and exit with status 120
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
