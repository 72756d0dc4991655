#!/usr/bin/env python3
"""A gateway that lets people share an Ollama server: a token for each person and device, in one file.

    python3 ollama_gateway.py token create ada laptop
    python3 ollama_gateway.py serve

Every Ollama, OpenAI and Anthropic client works through it, streaming; whoever has no token does not get in.

The sections, in order (`grep -n '^# =='` lists them):

    Constants and errors  numbers and names that never change, each with its reason; the exceptions
    Settings              one table of options, read from flags, the environment and .env
    Model                 what the other sections exchange: tokens and their limits, routes, usage
    Connection            a buffered, non-blocking socket with deadlines
    HTTP                  HTTP/1.1 in bytes, strict in both directions: heads, framing, chunks
    Request body          buffered and streamed bodies; what a body says; the names of models
    Store                 the database of tokens and usage: every line of SQL
    Server                the listener, its connections, a request in, a response out
    Pipeline              the stages of a request, in one function
    Routing and access    the table of routes, who may use them, with which models
    Authentication        the client's address and the token of a request
    Limits and usage      rates, budgets, the fair queue, the usage ledger
    Backends              connections to Ollama, requests and responses, its health
    Relay                 the response from Ollama to the client, and the usage it reports
    Logging and metrics   log lines and metrics, written in the background
    OpenAPI               the API described for programs
    Web pages             the documentation and the admin page: style, scripts, HTML
    Own endpoints         the gateway's own JSON endpoints and pages
    Assembly              builds the server from the settings
    Commands              what the command line can do
    Menu                  the same as a menu
    Doctor                checks of the configuration, Ollama and the network
    Main                  the command line's grammar and exit statuses

Calls go up as well as down: a callee stands above its callers. One request, each callee below its caller:

    GatewayServer.process_request_thread  Server
      Handler.handle_one_request          Server: waits for the head
        Gateway.serve                     Pipeline
          Router.match                    Routing and access
          Authenticator.identify          Authentication
          Limiter.enter                   Limits and usage
          ClientStream.read_whole_body    Server
          inspect_body                    Routing and access
          Slot.wait_turn                  Limits and usage
          Upstream.open                   Backends
          relay                           Relay
          Journal.write                   Logging and metrics

Any stage can raise Refusal. It becomes the error response or, if the response has started, an error event at its end.
"""
from __future__ import annotations

import argparse
import base64
import bisect
import codecs
import contextlib
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
from collections import Counter, OrderedDict, deque
from datetime import datetime, timedelta, timezone
from typing import Callable, NamedTuple, Optional

LOG = logging.getLogger(__name__)  # `serve` alone gives it handlers

# == Constants and errors =====================================================

VERSION = "1.0.0"

KIB, MIB = 1024, 1024 * 1024

SECRET_PREFIX = "ogw_"      # lets a scanner, and a reader, tell what a leaked string is
HINT_LENGTH = 8             # enough to recognise a token by, too little to guess it from
NAME_LENGTH = 64            # fits a line of the table and of the log

LINE_BYTES = 8 * KIB        # a request line; RFC 9112 3 asks for 8000 at least
HEAD_BYTES = 32 * KIB       # all fields; SDKs send under 2 KiB, cookies of a shared domain up to 16
HEAD_CACHE_SIZE = 256           # of those that were parsed already, how many are kept
MODEL_CACHE_SIZE = 256           # of models and others, whose spellings are kept
CACHED_HEAD_BYTES = 1 * KIB  # of one that is kept; SDKs stay below that
FIELD_COUNT = 100           # what http.client accepts too
TRAILER_BYTES = 4 * KIB     # nobody sends any
SPOOL_BYTES = 1 * MIB       # a larger body waits in a temporary file, not in memory
BODY_MEMORY = 64 * MIB      # of all bodies in memory together; when it is used up, they go to files
RECEIVE_BYTES = 16 * KIB    # one read from a socket: 64 KiB would leave 3 MB in the heap after a burst
READ_BYTES = 64 * KIB       # one read from elsewhere, and as much of a pipelined request as is kept meanwhile
DRAIN_BYTES = 16 * MIB      # read from a refused client, so that it gets to see the refusal
DECODED_BYTES = 256 * KIB   # a JSON body up to this size is decoded in C, a larger one is scanned in windows
WINDOW_BYTES = 64 * KIB     # one step of a scan: about 0.2 ms in which no other thread can run
JSON_PARTS = 2_000_000      # strings and brackets that a scan may meet: about 0.1 s of CPU
VALUE_BYTES = 4 * KIB       # a longer value is not read; a model's name, all escapes, may take 3.5 KiB
TOP_LEVEL_BYTES = 64 * KIB  # a large body's keys and short values together
FORM_PARTS = 100            # of a form that is looked into
PAGE_BODY_BYTES = 16 * KIB  # of a request for one of our own pages

BODY_SECONDS = 60           # without a byte of a request body that was promised
PAGE_BODY_SECONDS = 15      # for the whole body of a request for one of our own pages
REJUDGE_SECONDS = 1         # how often the token of a body that is passed on as it comes is judged again
SEND_SECONDS = 60           # for a piece of at most 64 KiB to a client that reads slowly
DRAIN_SECONDS = 3
HEALTH_SECONDS = 5          # between two probes: with PROBE_SECONDS, the state in /health is at most 10 s old
PROBE_BYTES = 1 * MIB       # of an answer to the gateway's own request; a list of 2,500 models
LIST_BYTES = 16 * MIB       # of a list of models that is cut down to those of a token
LINE_LIMIT = 8 * MIB        # of a stream's line; Ollama's own client reads no longer ones
WHOLE_BYTES = 256 * KIB     # of an answer, or of a line, that is decoded as a whole to find its token counts
ENDING_BYTES = 1 * KIB      # the end of an answer, where Ollama writes the counts
LEARNING_BYTES = 256 * KIB  # the largest body that teaches how many bytes of text make a token
MAX_TOKENS = 10 ** 9       # that one request can have cost
PROBE_SECONDS = 2           # for a health probe's requests, from the look-up of the name to the last byte
GATHER_SECONDS = 0.01      # how long finished requests gather before they are written; all others wait meanwhile
FINE_TICK = 0.1             # how old a file's time must be, in seconds, to tell its change from a later one,
COARSE_TICK = 3             # and how old where the file system knows whole seconds only: FAT counts in twos
STORE_SECONDS = 0.5         # how long the account and tokens' last uses gather before they are stored
LOG_QUEUE = 1 * MIB         # characters of log lines that wait for a slow log, about 5,000 requests
LOG_SECONDS = 0.05          # how long lines gather before they are written: each wake-up takes the lock from a request
LOG_FILE_BYTES, LOG_FILES = 10_000_000, 5   # when a log file is rotated, and how many old ones are kept
FLUSH_SECONDS = 2           # how long a stop waits for a slow log
ABORT_SECONDS = 2           # how long a stopping server waits for its threads to cut what they serve
REJECT_SECONDS = 2            # how long one that was turned away may take to read why
FAILED_DELAY = 1.0          # the longest that a failed credential waits for its refusal
RETRY_SECONDS = 5           # when a client that met 429 or 503 may try again
BUSY_SECONDS = 20           # how long a command waits for the database's other writers

BACKLOG = 1024              # connections that arrive at once; the system's own maximum applies
AFFINITY_SECONDS = 5        # how often it is seen to that the process has the least used core
MAX_REJECTING = 64            # of those beyond the cap, how many are kept until they have read why
SPARE_DESCRIPTORS = 64      # for the database, logs, spooled bodies, and connections that are on their way out
FREE_FAILURES = 5           # failed credentials of an address in a row that cost it nothing: people mistype
MAX_FAILURES = 30          # as many, and it gets 429 at once
LEAK_SECONDS = 3        # in which one failure is forgiven
FAILING_ADDRESSES = 4096    # remembered; beyond, the one that was quiet longest is forgotten
DELAYED_AT_ONCE = 8         # failed requests that may wait, each on a thread; the others get 429 at once
MINUTE, HOUR, DAY = 60, 3600, 86400
MAX_SERIES = 5000          # of one metric; more labels than that are counted as "other"
POOL_SIZE = 128             # idle upstream connections kept; Ollama has no limit of its own
IDLE_SECONDS = 60           # an older one is not reused: NAT and load balancers forget idle connections, some in 60 s

HOP_BY_HOP = frozenset((    # RFC 9110 7.6.1: these speak of one connection only
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade"))
FRAMING = frozenset(("host", "content-length", "transfer-encoding", "expect"))  # twice is once too often
FORBIDDEN_TRAILERS = HOP_BY_HOP | FRAMING | {  # RFC 9110 6.5.1
    "authorization", "x-api-key", "cookie", "content-type", "content-encoding", "content-range", "cache-control"}
FORWARDED = ("accept", "content-type", "content-encoding", "user-agent")  # all else could leak, or be misread
FORWARDED_PREFIXES = ("anthropic-", "openai-")
STREAM_TYPES = ("application/x-ndjson", "text/event-stream")


class UsageError(Exception):
    """A wrong flag, value or setting: exit status 2."""


class Failure(Exception):
    """Something that could not be done: exit status 1 or, where it was asked for over HTTP, a refusal by its code."""

    def __init__(self, message, code="unstored"):
        super().__init__(message)
        self.code = code


class Reason(NamedTuple):
    """Why requests are refused: HTTP's status and a sentence."""

    status: int
    meaning: str


REFUSALS = {
    "malformed": Reason(400, "the request is malformed, or names two credentials"),
    "unauthorized": Reason(401, "no token, or one that is unknown, expired or deleted"),
    "forbidden": Reason(403, "the token does not allow this"),
    "unknown_route": Reason(404, "the gateway has no such path"),
    "no_such_token": Reason(404, "there is no such token"),
    "wrong_method": Reason(405, "the path takes other methods: see Allow"),
    "too_slow": Reason(408, "the request did not arrive in time"),
    "token_exists": Reason(409, "the user has a token of that name already"),
    "body_too_large": Reason(413, "the body is too large"),
    "line_too_long": Reason(414, "the request line is too long"),
    "encoded": Reason(415, "the body is compressed: its model cannot be judged"),
    "unknown_expectation": Reason(417, "Expect asks for more than 100-continue"),
    "rate_limited": Reason(429, "the token made as many requests in the last minute as it may (--rpm)"),
    "too_many_at_once": Reason(429, "the token has as many requests running as it may (--max-parallel)"),
    "budget_spent": Reason(429, "the token has used up its tokens of the day (--tokens-per-day)"),
    "too_many_failures": Reason(429, "too many requests without a valid token came from this address"),
    "head_too_large": Reason(431, "too many or too long headers"),
    "internal": Reason(500, "a fault of the gateway: its log tells more"),
    "unknown_coding": Reason(501, "a Transfer-Encoding other than chunked"),
    "upstream_failed": Reason(502, "Ollama cannot be reached, or talks nonsense"),
    "no_room": Reason(503, "no disk space for the body: try again later"),
    "no_descriptors": Reason(503, "the gateway is out of file descriptors: try again later"),
    "queue_full": Reason(503, "as many of the user's requests are waiting as may (--max-queue)"),
    "queue_timeout": Reason(503, "the request waited too long for its turn (--queue-timeout)"),
    "uncounted": Reason(503, "what the token used today cannot be read: try again later"),
    "unstored": Reason(503, "the database cannot be read or changed: try again later"),
    "stopping": Reason(503, "the gateway was told to stop: try again later"),
    "upstream_silent": Reason(504, "Ollama did not begin its answer in time"),
    "unknown_version": Reason(505, "an HTTP version other than 1.0 and 1.1"),
}
OPENAI_TYPES = {403: "permission_error", 404: "not_found_error", 429: "rate_limit_error", 500: "api_error",
                502: "api_error", 503: "api_error", 504: "api_error"}
ANTHROPIC_TYPES = {**OPENAI_TYPES, 401: "authentication_error", 413: "request_too_large", 503: "overloaded_error"}


class Refusal(Exception):
    """The end of a request: raised from any depth, answered in one place."""

    def __init__(self, code, message="", fields=(), retry_after=RETRY_SECONDS):
        super().__init__(message or REFUSALS[code].meaning)
        self.code, self.status, self.fields = code, REFUSALS[code].status, list(fields)
        if self.status in (429, 503):  # else SDKs burn their retries within half a second
            self.fields.append(("Retry-After", str(retry_after)))

    def body_for(self, dialect):
        """Return the error object as clients of "ollama", "openai" or "anthropic" expect it."""
        if dialect == "openai":
            kind = OPENAI_TYPES.get(self.status, "invalid_request_error")
            return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}
        if dialect == "anthropic":
            kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
            return {"type": "error", "error": {"type": kind, "message": str(self)}}
        return {"error": str(self)}


class Malformed(Exception):
    """Bytes that are no HTTP: a refusal when the client sent them, a failure when the upstream did."""

    def __init__(self, message, code="malformed"):
        super().__init__(message)
        self.code = code


class ClientLeft(Exception):
    """The client hung up, or stopped reading: there is nobody to answer."""

# == Settings =================================================================

LAST_SECOND = 253402300799  # of the year 9999
SECONDS_IN = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def duration(text):
    """Read "90s", "15m", "12h", "30d" or "8w" as seconds."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhdw])", text)
    if not match or not float(match[1]):
        raise ValueError("is not a duration like 90s, 15m, 12h, 30d or 8w")
    return float(match[1]) * SECONDS_IN[match[2]]


def timeout(text):
    """Read a duration whose unit may be missing: then it is seconds."""
    return duration(text if text[-1:].isalpha() else text + "s")


INSTANT = re.compile(r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d):(\d\d)(?:\.\d+)?(Z|[+-]\d\d:?\d\d)?)?", re.ASCII)


def check_instant(seconds):
    """Return Unix seconds as they are; raise ValueError for those that no date can be written for."""
    if not 0 <= seconds <= LAST_SECOND:
        raise ValueError("is not a time from 1970 to 9999")
    return seconds


def parse_instant(text, naive_is_utc=False):
    """Read a date (its first moment in UTC) or an ISO 8601 time as Unix seconds."""
    match = INSTANT.fullmatch(text)
    zone = match and match[7]
    if not match or match[4] and not zone and not naive_is_utc:
        raise ValueError("is not a date like 2027-01-31 or a time like 2027-01-31T18:00:00Z")
    try:
        moment = datetime(*(int(part or 0) for part in match.groups()[:6]), tzinfo=timezone.utc)
    except ValueError as error:
        raise ValueError(f"is not a valid time: {error}") from None
    offset = timedelta()
    if zone and zone != "Z":
        offset = timedelta(hours=int(zone[1:3]), minutes=int(zone[-2:])) * (-1 if zone[0] == "-" else 1)
    return check_instant(int(moment.timestamp() - offset.total_seconds()))


def format_instant(seconds):
    """Write Unix seconds as ISO 8601 in UTC."""
    return None if seconds is None else (datetime(1970, 1, 1) + timedelta(seconds=seconds)).isoformat() + "Z"


def plural(number, what):
    """Write a number of things: "1 token", "2 tokens"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def boolean(text):
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("is not on or off")


def port_number(text):
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError("is not a port number (0 to 65535)")
    return int(text)


def positive(text):
    if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
        raise ValueError("is not a whole number from 1 to 999999999")
    return int(text)


def non_negative(text):
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError("is not a whole number from 0 to 999999999")
    return int(text)


def model_globs(text):
    """Read a comma list of models' names, in which * and ? stand for others; return it tidied."""
    globs = [part.strip().lower() for part in text.split(",") if part.strip()]
    if not globs or "none" in globs or not all(re.fullmatch(r"[a-z0-9._:/*?-]{1,200}", glob) for glob in globs) \
            or any(glob.rpartition("/")[2].count(":") > 1 for glob in globs):
        raise ValueError("is not a list of models like llama3*,qwen2.5:7b (letters, digits and . _ : / - * ?)")
    return ",".join(globs)


def utc_day(seconds):
    """Return the UTC day of Unix seconds, counted from 1970."""
    return int(seconds) // DAY


def day_start(day):
    """Return the Unix seconds at which a UTC day begins."""
    return day * DAY


def parse_time(text, direction, now):
    """Read a date, a time, or a duration from now, forward (1) or back (-1), as Unix seconds."""
    if re.fullmatch(r"[0-9.]+[a-z]", text):
        return check_instant(max(int(now) + direction * int(duration(text)), 0))
    try:
        return parse_instant(text)
    except ValueError as error:
        raise ValueError(f"{error}, or a duration like 30d") from None


def future_time(text):
    """Read "30d", a date or a time as Unix seconds to come."""
    now = time.time()
    seconds = parse_time(text, 1, now)
    if seconds <= int(now):
        raise ValueError("is in the past")
    return seconds


def usage_start(text, clock=time.time):
    """Read "7d" as the start of seven UTC days, today's included; "12h", a date or a time as the start of an hour."""
    now = clock()
    seconds = parse_time(text, -1, now)
    if seconds > int(now):
        raise ValueError("is in the future")
    if re.fullmatch("[0-9]+[dw]", text):
        return day_start(utc_day(seconds) + 1)
    return seconds // HOUR * HOUR


def byte_size(text):
    """Read "100MiB", "64K" or a number of bytes; K, M and G count in 1024."""
    match = re.fullmatch("([0-9]{1,12}) ?(?:([KMG])(?:i?B)?|B)?", text, re.IGNORECASE)
    if not match or not int(match[1]):
        raise ValueError("is not a size like 100MiB")
    return int(match[1]) * KIB ** " KMG".index((match[2] or " ").upper())


def networks(text):
    """Read a comma list of addresses and networks."""
    try:
        return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"is not a list of addresses or networks: {error}") from None


def log_level(text):
    levels = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "WARN": 30, "ERROR": 40, "CRITICAL": 50}
    if text.upper() not in levels:
        raise ValueError("is not a log level (DEBUG, INFO, WARNING, ERROR or CRITICAL)")
    return levels[text.upper()]


def upstream_url(text):
    """Read an http or https URL, a path prefix allowed, into urllib.parse's parts."""
    wrong = ValueError("is not a URL like http://localhost:11434")
    try:
        parts = urllib.parse.urlsplit(text.rstrip("/"))
        parts.port  # raises for a port out of range
    except ValueError:
        raise wrong from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment \
            or parts.username is not None or not re.fullmatch(r"[\x21-\x7e]+", text):
        raise wrong
    return parts


def base_path(text):
    """Read where /api is to be found, as "/path" or, for the root, ""."""
    path = text.strip("/")
    if path and not re.fullmatch(r"[A-Za-z0-9_~-][A-Za-z0-9._~-]*(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*", path):
        raise ValueError("is not a path of letters, digits, '.', '_', '~' and '-'")
    if path.split("/")[0] in ("v1", "t", "docs", "openapi.json", "admin", "health", "me", "metrics"):
        raise ValueError("starts with a path that the gateway has another use for")
    return "/" + path if path else ""


def origins(text):
    """Read "*" or a comma list of origins, as a browser sends them (RFC 6454 7)."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for origin in found:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+|null", origin):
            raise ValueError(f"contains {origin}, which is not an origin like https://chat.example.com")
    return found


class Option(NamedTuple):
    """A setting: `convert` reads what was typed, and says in a ValueError what is wrong with it."""

    flag: str
    variable: str
    default: Optional[str]
    convert: object
    metavar: str
    help: str

    @property
    def name(self):
        return self.flag[2:].replace("-", "_")


OPTION_GROUPS = {
    "network": (
        Option("--ollama-url", "OLLAMA_BASE_URL", "http://localhost:11434", upstream_url, "URL", "the Ollama to guard"),
        Option("--base-path", "BASE_PATH", "/api", base_path, "PATH", "path at which clients find Ollama's /api"),
        Option("--db", "TOKEN_DB_PATH", "tokens.db", str, "FILE", "the database of tokens"),
        Option("--host", "GATEWAY_HOST", "127.0.0.1", str, "ADDRESS", "the address to listen on; :: for all"),
        Option("--port", "GATEWAY_PORT", "8000", port_number, "PORT", "the port to listen on"),
        Option("--tls-cert", "GATEWAY_TLS_CERT", None, str, "FILE", "serve HTTPS with this certificate chain"),
        Option("--tls-key", "GATEWAY_TLS_KEY", None, str, "FILE", "its private key, if not in the same file"),
    ),
    "access": (
        Option("--cors-origins", "GATEWAY_CORS_ORIGINS", "", origins, "LIST", "origins of web pages that may use the gateway, or *"),
        Option("--path-tokens", "GATEWAY_PATH_TOKENS", "off", boolean, "", "accept /t/SECRET before any path"),
        Option("--trusted-proxies", "GATEWAY_TRUSTED_PROXIES", "", networks, "LIST",
               "addresses or networks of proxies whose X-Forwarded-For is trusted"),
        Option("--metrics-open", "GATEWAY_METRICS_OPEN", "off", boolean, "", "serve /metrics without a token"),
        Option("--no-admin-api", "GATEWAY_NO_ADMIN_API", "off", boolean, "", "do not serve /admin and its API"),
    ),
    "limits": (
        Option("--max-connections", "GATEWAY_MAX_CONNECTIONS", "1024", positive, "N",
               "clients connected at once; one more replaces the one that waits longest"),
        Option("--max-body", "GATEWAY_MAX_BODY", "100MiB", byte_size, "SIZE",
               "largest request body; blobs have no limit"),
        Option("--max-spool", "GATEWAY_MAX_SPOOL", "2GiB", byte_size, "SIZE",
               "disk space for all request bodies together; one over 1 MiB waits in a temporary file"),
        Option("--max-parallel", "GATEWAY_MAX_PARALLEL", "0", non_negative, "N",
               "inference requests that Ollama gets at once, the others wait; 0 is no limit"),
        Option("--max-queue", "GATEWAY_MAX_QUEUE", "128", positive, "N", "requests of one user that may wait in the queue"),
    ),
    "timeouts": (
        Option("--queue-timeout", "GATEWAY_QUEUE_TIMEOUT", "60s", timeout, "TIME", "longest wait of a request in the queue"),
        Option("--connect-timeout", "GATEWAY_CONNECT_TIMEOUT", "5s", timeout, "TIME",
               "to connect to Ollama, name look-up included"),
        Option("--first-byte-timeout", "GATEWAY_FIRST_BYTE_TIMEOUT", "600s", timeout, "TIME",
               "for the first byte of an answer: a model may load, queue and think"),
        Option("--stall-timeout", "GATEWAY_STALL_TIMEOUT", "300s", timeout, "TIME", "for the next byte of an answer"),
        Option("--header-timeout", "GATEWAY_HEADER_TIMEOUT", "15s", timeout, "TIME",
               "for a whole request head, or a TLS handshake"),
        Option("--idle-timeout", "GATEWAY_IDLE_TIMEOUT", "75s", timeout, "TIME",
               "for the next request on a connection"),
        Option("--drain-timeout", "GATEWAY_DRAIN_TIMEOUT", "30s", timeout, "TIME",
               "for running requests to finish at a stop"),
    ),
    "logging": (
        Option("--log-level", "LOG_LEVEL", "INFO", log_level, "LEVEL", "level of the log on stderr"),
        Option("--log-file-level", "LOG_FILE_LEVEL", "INFO", log_level, "LEVEL", "level of the log file"),
        Option("--log-file", "GATEWAY_LOG_FILE", None, str, "FILE",
               "a log file, rotated at 10 MB, reopened on SIGHUP; app.log if LOG_FILE_LEVEL is set"),
    ),
}
OPTIONS = tuple(option for options in OPTION_GROUPS.values() for option in options)
DATABASE_OPTION = next(option for option in OPTIONS if option.flag == "--db")   # every command has it

ENV_LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=(.*)")
QUOTED = re.compile(r"""(?:'([^']*)'|"((?:[^"\\]|\\.)*)")\s*(?:\#.*)?""", re.VERBOSE)


def env_value(text):
    """Read what stands behind the "=" of a .env file's line: quotes and a comment's tail come off."""
    quoted = QUOTED.fullmatch(text.strip())
    if not quoted:
        return re.split(r"(?:^|\s)#", text, maxsplit=1)[0].strip()
    return quoted[1] if quoted[1] is not None else re.sub(r'\\(["\\])', r"\1", quoted[2])


def read_env_file(path):
    """Read a .env file into a dictionary; without a path it is .env, which may be missing."""
    try:
        with open(path or ".env", encoding="utf-8-sig") as file:
            lines = [ENV_LINE.fullmatch(line) for line in file.read().splitlines()]
    except FileNotFoundError:
        if path is None:
            return {}
        raise UsageError(f'--env-file: there is no file "{path}"') from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f'cannot read the settings in "{path or ".env"}": {error}') from None
    return {line[1]: env_value(line[2]) for line in lines if line}


def load_settings(flags, environ, env_file=None, options=OPTIONS):
    """Settle options: a flag beats the environment, that the .env file, that the default; an empty value is none.

    Returns one attribute for each option, by its name, converted, and `given`: {name: (source, text)} of those that are
    not by default. flags: what was typed, by option name. Raises UsageError naming the flag or variable, the value and
    the file.
    """
    file, given = read_env_file(env_file), {}
    settings = types.SimpleNamespace(given=given)
    for option in options:
        for source, raw in ((option.flag, flags.get(option.name)), (option.variable, environ.get(option.variable)),
                            (f'{option.variable} in {env_file or ".env"}', file.get(option.variable))):
            if raw:
                given[option.name] = source, raw
                break
        else:
            source, raw = "default", option.default
        try:
            setattr(settings, option.name, None if raw is None else option.convert(raw))
        except ValueError as error:
            raise UsageError(f'{source}: "{raw}" {error}') from None
    if "log_file_level" in given and "log_file" not in given:
        settings.log_file = "app.log"  # as the replaced system had it
    if "tls_key" in given and "tls_cert" not in given:
        raise UsageError("--tls-key: it needs the certificate too: --tls-cert FILE")
    return settings

# == Model ====================================================================


class Token(NamedTuple):
    """A token as the database has it, but for its digest; times are Unix seconds in UTC."""

    id: int
    user: str
    name: str
    hint: str
    created_at: int
    expires_at: Optional[int]
    last_used_at: Optional[int]
    admin: bool
    models: Optional[str]           # globs, joined by commas: all others are not for this token
    rpm: Optional[int]              # inference requests in any minute
    max_parallel: Optional[int]     # inference requests at once
    tokens_per_day: Optional[int]   # of prompts and completions, in a day of UTC


class Limit(NamedTuple):
    """A limit of a token; flags, admin API, export, list, menu, pages, OpenAPI and messages iterate LIMITS."""

    column: str         # in the database and in JSON
    read: Callable      # returns the value of a text; raises ValueError
    metavar: str
    help: str           # of the flag
    heading: str        # in `token list`
    label: str          # in the menu and on the pages
    example: str        # of a value that is not a number
    phrase: str         # a value in a sentence
    json_type: str
    refusal: str        # of a request beyond it: one of REFUSALS

    @property
    def flag(self):
        return "--" + self.column.replace("_", "-")


LIMITS = (
    Limit("models", model_globs, "LIST", "the only models it may use, as llama3*,qwen2.5:7b", "MODELS", "Models",
          "llama3*,qwen2.5:7b", "models {}", "string[]", "forbidden"),
    Limit("rpm", positive, "N", "inference requests in any minute", "RPM", "Requests a minute",
          "", "{} a minute", "integer", "rate_limited"),
    Limit("max_parallel", positive, "N", "inference requests at once", "PARALLEL", "Requests at once",
          "", "{} at once", "integer", "too_many_at_once"),
    Limit("tokens_per_day", positive, "N", "tokens of prompts and completions in a day of UTC", "A DAY", "Tokens a day",
          "", "{} tokens a day", "integer", "budget_spent"),
)
LIMIT_BY_COLUMN = {limit.column: limit for limit in LIMITS}
SETTABLE = {"expires_at": future_time, **{limit.column: limit.read for limit in LIMITS}}     # columns of a token


def read_column(column, text):
    """Return the value of a text for one of SETTABLE, None for "none"; raise ValueError."""
    try:
        return None if text == "none" else SETTABLE[column](text)
    except ValueError as error:
        alternative = ', or "none"' if str(error).startswith("is not a") else ""
        raise ValueError(f"{error}{alternative}") from None


def is_expired(token):
    return token.expires_at is not None and token.expires_at <= time.time()


def token_json(token):
    """Return a token's columns, ready for JSON."""
    shown = {"id": token.id, "user": token.user, "name": token.name, "hint": token.hint,
             "created_at": format_instant(token.created_at), "expires_at": format_instant(token.expires_at),
             "last_used_at": format_instant(token.last_used_at), "expired": is_expired(token), "admin": bool(token.admin)}
    for limit in LIMITS:
        value = getattr(token, limit.column)
        shown[limit.column] = value.split(",") if value and limit.json_type == "string[]" else value
    return shown


class PageRequest(NamedTuple):
    """A request for one of the gateway's own pages; the body is read whole."""

    request: Request
    path: str           # as the table of routes has it, its segments filled in
    token: Optional[Token]
    body: bytes


class Route(NamedTuple):
    """A path as Ollama knows it (`{name}`: one segment), and what it takes to use it."""

    method: str
    path: str
    access: str             # "public", "token" or "admin"
    category: str               # "page", "read", "inference", "model" or "account"
    model_in: str = ""         # where the request names its model: "json", "form" or "path"
    model_list_key: str = ""         # the key of the list of models in its answer
    handler: str = ""          # which of our own pages answers
    streamed: bool = False  # the request's body is passed on unheld


class Usage(NamedTuple):
    """The tokens of a request; None where Ollama reports none."""

    prompt: Optional[int] = 0
    cached: Optional[int] = None        # of the prompt: read from the model's cache
    completion: Optional[int] = 0
    estimated: int = 0                  # of prompt and completion: counted by the gateway, not by Ollama


class RequestContext:
    """What will be known of a request when it has ended."""

    __slots__ = ("id", "client_address", "token", "method", "path", "route", "model", "model_label", "status", "bytes_sent", "usage_reader",
                 "estimate", "counted", "counted_in", "started_at", "queue_seconds", "sent_at", "released_at", "failure", "first_byte_at",
                 "ended_at", "outcome", "refusal_code", "reason")

    def __init__(self, peer, now):
        self.client_address, self.started_at, self.bytes_sent, self.queue_seconds, self.counted_in = peer, now, 0, 0.0, False
        self.id = self.token = self.method = self.path = self.model = self.status = self.usage_reader = None
        self.route = self.model_label = ""  # the path in the table; the model's full name, once Ollama has owned to it
        self.sent_at = self.released_at = None    # when it went upstream, and when it came back
        self.failure = None                     # the class of the exception that brought it back
        self.first_byte_at = self.ended_at = None       # when its answer began, and when all was over
        self.outcome = self.refusal_code = self.reason = None      # "broken" or "left", if it did not end well; the refusal's
        self.counted = None                     # what of it the account has already
        self.estimate = None                    # tokens of a prompt that Ollama has not counted

    @property
    def usage(self):
        """Return the Usage so far."""
        usage = Usage() if self.usage_reader is None else self.usage_reader.usage
        if self.estimate is None:
            return usage
        return usage._replace(prompt=self.estimate, estimated=self.estimate + (usage.completion or 0))

# == Connection ===============================================================


class Deadline:
    """So many seconds, from the first time that they are waited for, and which flag makes them more."""

    __slots__ = ("_at", "_seconds", "_flag")

    def __init__(self, seconds, flag=""):
        self._at, self._seconds, self._flag = None, seconds, flag

    def left(self):
        """Return the seconds left; raise TimeoutError when there are none."""
        now = time.monotonic()
        if self._at is None:
            self._at = now + self._seconds
        seconds = self._at - now
        if seconds <= 0:
            raise TimeoutError(f"nothing came for {self._seconds:g} s" + (f" ({self._flag})" if self._flag else ""))
        return seconds

    def share(self, parts):
        """Return a deadline for the first of so many equal parts of the time left; raise TimeoutError."""
        part = Deadline(self._seconds, self._flag)
        part._at = time.monotonic() + self.left() / parts
        return part


def is_late(error):
    """Return whether a Deadline has passed; the system's ETIMEDOUT is a TimeoutError too, but a lost connection."""
    return isinstance(error, TimeoutError) and error.errno is None


POLL_LIMIT = 2 ** 31 - 1    # milliseconds that fit poll's argument
READABLE, WRITABLE = getattr(select, "POLLIN", 1), getattr(select, "POLLOUT", 4)
HUNG_UP = getattr(select, "POLLRDHUP", 0)  # Linux tells a half-closed peer without a read; others cannot
BARE_LF = re.compile(rb"(?<!\r)\n")
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError)
# A peer that vanished without a FIN, behind a NAT say, is given up after 30 s: 15 s of silence and 3 probes 5 s apart,
# few enough for a phone's battery. TCP_USER_TIMEOUT, in ms, is for data that nobody acknowledges; Linux applies it to
# the probes too, in place of their number, and to a peer that takes no data for so long (RFC 1122 4.2.3.6, RFC 5482).
KEEP_ALIVE = [(getattr(socket, option), value) for option, value in (
    ("TCP_KEEPIDLE", 15), ("TCP_KEEPALIVE", 15),    # macOS's name for the same
    ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 30_000)) if hasattr(socket, option)]


def keep_alive(sock):
    """Have the system probe the peer of an idle connection, and end a connection whose peer has vanished."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with contextlib.suppress(OSError):  # a system may know an option and still lack it
        for option, value in KEEP_ALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def look_up(host, port, flags=0):
    """Return getaddrinfo's addresses for TCP; a name in ASCII without its codec for others, whose import takes 3 ms."""
    return socket.getaddrinfo(host.encode("ascii") if host.isascii() else host, port, type=socket.SOCK_STREAM,
                              flags=flags)


def address_of(text):
    """Return an IP address without its zone, IPv4 as such behind ::ffff: too; raise ValueError."""
    address = ipaddress.ip_address(text.strip().partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def network_of(text):
    """Return the bytes of an IPv4 address or of an IPv6 address's /64: what one peer controls."""
    return address_of(text).packed[:8]


OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


def is_out_of_descriptors(error):
    """Report whether an OSError came from a lack of descriptors; getaddrinfo and tempfile raise another one then."""
    try:
        if error.errno not in OUT_OF_DESCRIPTORS:
            os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as found:
        error = found
    return error.errno in OUT_OF_DESCRIPTORS


class Poll:
    """select.poll() as far as it is used here, for Windows, which has none."""

    def __init__(self):
        self._events = {}

    def register(self, descriptor, events):
        self._events[descriptor] = events

    def poll(self, milliseconds):
        """Return the descriptors that are ready, in the order of their registration, each with its events."""
        readable, writable, _ = select.select([fd for fd, events in self._events.items() if events & READABLE],
                                              [fd for fd, events in self._events.items() if events & WRITABLE], [],
                                              milliseconds / 1000)
        return [(fd, READABLE * (fd in readable) | WRITABLE * (fd in writable)) for fd in self._events
                if fd in readable or fd in writable]


new_poll = getattr(select, "poll", Poll)


def wait_for(descriptor, events, deadline, cancel_on=None):
    """Wait for a descriptor's events and return them; when the watched wire stirs first, it decides what that means.

    Raises TimeoutError, and whatever `watched.on_readable()` raises.
    """
    while True:
        poll = new_poll()
        if cancel_on is not None:
            poll.register(cancel_on.descriptor, cancel_on.watched_events())
        poll.register(descriptor, events)
        for ready, found in poll.poll(min(int(deadline.left() * 1000) + 1, POLL_LIMIT)):    # as they were registered
            if ready == descriptor:
                return found
            cancel_on.on_readable()


class Wakeup:
    """Wakes the thread that waits for it; meanwhile that can watch a wire."""

    def __init__(self):
        self._write_end, self._read_end = socket.socketpair()

    def set(self):
        self._write_end.send(b"!")

    def wait(self, deadline, cancel_on):
        wait_for(self._read_end.fileno(), READABLE, deadline, cancel_on)

    def close(self):
        self._write_end.close()
        self._read_end.close()


class Connection:
    """A non-blocking socket, and what was read from it too early; a wait has a deadline, and may watch another wire."""

    waited = False      # `fill` was called since this was last reset
    is_shut = False     # by another thread

    def __init__(self, sock):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or Nagle waits for delayed ACKs, 44 ms an answer
        keep_alive(sock)
        self.sock, self.descriptor, self.buffer = sock, sock.fileno(), b""

    def start_tls(self, context, deadline, cancel_on=None, **how):
        """Speak TLS from here on; `how` goes to SSLContext.wrap_socket."""
        self.sock = context.wrap_socket(self.sock, do_handshake_on_connect=False, **how)
        if self.is_shut:    # meanwhile: shut_down found an empty socket
            raise ConnectionAbortedError("the connection was shut down")
        while True:
            try:
                return self.sock.do_handshake()
            except ssl.SSLWantReadError:
                self.wait(READABLE, deadline, cancel_on)
            except ssl.SSLWantWriteError:
                self.wait(WRITABLE, deadline, cancel_on)

    def wait(self, events, deadline, cancel_on=None):
        """Wait for events here and return them, as `wait_for` does."""
        return wait_for(self.descriptor, events, deadline, cancel_on)

    def watched_events(self):
        """Return what to watch for: with much unread already, only the hang-up."""
        return HUNG_UP if len(self.buffer) >= READ_BYTES else READABLE | HUNG_UP

    def fill(self, deadline, cancel_on=None):
        """Read more into the buffer as soon as there is any; return False at the stream's end."""
        self.waited = True
        while True:
            if not (isinstance(self.sock, ssl.SSLSocket) and self.sock.pending()):  # poll cannot see what TLS holds
                self.wait(READABLE, deadline, cancel_on)
            try:
                data = self.sock.recv(RECEIVE_BYTES)
            except WOULD_BLOCK:
                continue
            except ssl.SSLWantWriteError:
                self.wait(WRITABLE, deadline, cancel_on)
                continue
            self.buffer = self.buffer + data if self.buffer else data
            return bool(data)

    def alive(self):
        """Tell whether the peer is still there, reading without a wait what it has sent."""
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except WOULD_BLOCK:
            return True
        except OSError:
            return False
        self.buffer += data
        return bool(data)

    def send(self, data, deadline, cancel_on=None):
        """Send all of the data."""
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view):]
            except (BlockingIOError, ssl.SSLWantWriteError):
                self.until_writable(deadline, cancel_on)
            except ssl.SSLWantReadError:
                self.wait(READABLE, deadline, cancel_on)

    def until_writable(self, deadline, cancel_on):
        self.wait(WRITABLE, deadline, cancel_on)

    def read_head(self, deadline, cancel_on=None):
        """Read a message's head and return its lines as bytes, without the empty one.

        Raises Malformed for one that is too large, has a bare LF, or ends early (RFC 9112 2.2).
        """
        searched = 0
        while True:
            end = self.buffer.find(b"\r\n\r\n", searched)
            size = end if end >= 0 else len(self.buffer)
            if size > LINE_BYTES and self.buffer.find(b"\r\n", 0, LINE_BYTES + 2) < 0:
                raise Malformed(f"the first line is longer than {LINE_BYTES} bytes", "line_too_long")
            if size > HEAD_BYTES:
                raise Malformed(f"the headers are larger than {HEAD_BYTES} bytes", "head_too_large")
            if end >= 0:
                head, self.buffer = self.buffer[:end + 2], self.buffer[end + 4:]
                return head
            if BARE_LF.search(self.buffer, searched):
                raise Malformed("a line does not end in CR LF")
            searched = max(len(self.buffer) - 3, 0)
            if not self.fill(deadline, cancel_on):
                if not self.buffer:
                    raise ConnectionError("it hung up without a word")
                raise Malformed("the headers end early")

    def shut_down(self):
        """End the connection from another thread: whoever waits on it wakes up."""
        self.is_shut = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # SSLSocket's own would go on in clear first

    def read_piece(self, body, deadline, cancel_on=None):
        """Return a body's next piece as soon as it is there, b"" only at its end; raise Malformed if that is early."""
        while True:
            piece, self.buffer = body.decode(self.buffer)
            if piece or body.complete:
                return piece
            if not self.fill(deadline, cancel_on):
                body.end()

    def close(self):
        with contextlib.suppress(OSError):
            self.sock.close()

    def close_notify(self):
        """Close, under TLS with the word that nothing was cut off (RFC 8446 6.1)."""
        if isinstance(self.sock, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                self.sock.unwrap()
        self.close()

    def reset(self):
        """Close so that the peer sees an error, not an end."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # struct linger {1, 0}
        self.close()

# == HTTP =====================================================================

FIELD_BLOCK = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*")  # RFC 9110 5.1, 5.5


def parse_fields(block):
    """Return a head's field lines as (name, value) pairs (RFC 9112 5): no folding, no space before the colon."""
    if not FIELD_BLOCK.fullmatch(block):
        raise Malformed("a header is malformed")
    lines = block.decode("latin-1").split("\r\n")[:-1]
    if len(lines) > FIELD_COUNT:
        raise Malformed(f"there are more than {FIELD_COUNT} headers", "head_too_large")
    return [(name, value.strip(" \t")) for name, _, value in (line.partition(":") for line in lines)]


def combine_fields(pairs):
    """Return fields by their names in lower case, values of equal ones joined (RFC 9110 5.3), and which were equal."""
    fields, repeated = {}, set()
    for name, value in pairs:
        name = name.lower()
        if name in fields:
            repeated.add(name)
            value = f"{fields[name]}, {value}"
        fields[name] = value
    if repeated & FRAMING:
        raise Malformed(f"there are two {min(repeated & FRAMING)} headers")
    return fields, repeated


def comma_list(value):
    """Return the members of a comma list, in lower case (RFC 9110 5.6.1)."""
    return {member.strip(" \t") for member in value.lower().split(",")}


def content_length(value):
    """Read a Content-Length's value: digits, once."""
    if not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise Malformed(f'Content-Length is "{value[:40]}", not a number')
    return int(value)


class Request(NamedTuple):
    """A request's head, parsed: field names in lower case, a repeated field's values joined by commas."""

    method: str
    path: str
    query: str
    version: str
    fields: dict
    repeated: frozenset                 # names of fields that came more than once
    closes: bool                        # the client wants no other request on the connection
    bearer: Optional[str]               # the secret that its Authorization shows, None without that field
    redacted_path: str                     # without secrets
    forwarded: str                         # those of its fields that go upstream, as lines of a head
    path_secret: Optional[str] = None   # what stood behind /t/, once it is taken out of the path


REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([\x21-\x7e]+) HTTP/([0-9]\.[0-9])")  # RFC 9112 3
HOST = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")  # RFC 9110 7.2, RFC 3986 3.2.2
ABSOLUTE = re.compile(r"https?://([^/?]+)(.*)", re.IGNORECASE)
SECRET_IN_PATH = re.compile(rf"(?<=/t/)[^/]+|{SECRET_PREFIX}[\w-]+", re.IGNORECASE)
PATH_TOKEN = re.compile("/t/([^/]+)(/.*)")
BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)  # RFC 6750 2.1; RFC 9110 11.1: the scheme's case is free
REQUEST_ID = re.compile("[A-Za-z0-9._-]{1,128}")


def forwarded_headers(fields, dropped):
    """Return, as a head's lines, the fields that go upstream: no credential, no cookie, nothing hop-by-hop."""
    return "".join(f"{name}: {value}\r\n" for name, value in fields.items()
                   if (name in FORWARDED or name.startswith(FORWARDED_PREFIXES)) and name not in dropped)


def bearer_of(fields):
    """Return the secret that an Authorization shows, "" if it shows none, None without that field."""
    bearer = BEARER.fullmatch(fields.get("authorization", ""))
    return bearer[1] if bearer else "" if "authorization" in fields else None


def parse_request(head):
    """Read a request's head strictly (RFC 9112 2 to 3); raise Malformed."""
    line, _, block = head.partition(b"\r\n")
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise Malformed("the request line is not METHOD SP PATH SP HTTP/1.1")
    method, target, version = (part.decode("ascii") for part in match.groups())
    if version not in ("1.0", "1.1"):
        raise Malformed(f"HTTP/{version} is not spoken here, HTTP/1.1 is", "unknown_version")
    fields, repeated = combine_fields(parse_fields(block))
    if version == "1.1" and "host" not in fields:
        raise Malformed("there is no Host header")
    host = fields.get("host", "")
    if not HOST.fullmatch(host):
        raise Malformed("the Host header is malformed")
    absolute = None if target.startswith("/") else ABSOLUTE.fullmatch(target)
    if absolute and absolute[1].lower() == host.lower():
        target = absolute[2] if absolute[2].startswith("/") else "/" + absolute[2]
    if not target.startswith("/") or "#" in target:
        raise Malformed("the request target is not a path")
    path, mark, query = target.partition("?")
    named = comma_list(fields.get("connection", ""))
    return Request(method, path, mark + query, version, fields, frozenset(repeated),
                   closes=version == "1.0" or "close" in named, bearer=bearer_of(fields),
                   redacted_path=SECRET_IN_PATH.sub("*", path), forwarded=forwarded_headers(fields, named))


# Clients ask with the same head again and again: not parsing it is a tenth of what a small answer costs.
parse_cached_request = functools.lru_cache(HEAD_CACHE_SIZE)(parse_request)


def dialect_of(path):
    """Return which clients' error objects belong to a path, behind a token too."""
    behind_token = PATH_TOKEN.fullmatch(path)
    path = behind_token[2] if behind_token else path
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return "anthropic"
    return "openai" if path.startswith("/v1/") else "ollama"


STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?")  # RFC 9112 4


class ResponseHead(NamedTuple):
    """The head of the upstream's answer, parsed."""

    status: int
    phrase: str
    fields: dict            # by their names in lower case
    lines: str              # those that go to the client, as they came
    kind: str               # the content type, without its parameters
    length: Optional[int]
    chunked: bool
    keeps: bool             # the connection may go on after the answer


def is_forwardable(name):
    """Tell whether a field of the upstream's answer goes to the client: not the connection's, not ours to say."""
    return name not in HOP_BY_HOP and name not in ("content-length", "x-request-id", "x-accel-buffering") \
        and not name.startswith("access-control-")


def parse_response_head(head):
    """Read an answer's head strictly; raise Malformed."""
    line, _, block = head.partition(b"\r\n")
    match = STATUS_LINE.fullmatch(line)
    if not match or match[2] == b"101":
        raise Malformed("its answer has no status line")
    pairs = parse_fields(block)
    fields, _ = combine_fields(pairs)
    hop = comma_list(fields.get("connection", ""))
    length, coding = fields.get("content-length"), fields.get("transfer-encoding")
    if coding is not None and (length is not None or coding.lower() != "chunked" or match[1] != b"1"):
        raise Malformed("its answer's framing is ambiguous")
    lines = "".join(f"{name}: {value}\r\n" for name, value in pairs
                    if name.lower() not in hop and is_forwardable(name.lower()))
    return ResponseHead(int(match[2]), (match[3] or b"").decode("latin-1"), fields, lines,
                        fields.get("content-type", "").partition(";")[0].strip().lower(),
                        None if length is None else content_length(length), coding is not None,
                        match[1] == b"1" and "close" not in hop)


# Within a second, heads are alike: not parsing them again is a tenth of what a small answer costs.
parse_cached_response_head = functools.lru_cache(HEAD_CACHE_SIZE)(parse_response_head)


def encode_chunk(piece, last=False):
    """Write a piece as a chunk (RFC 9112 7.1), nothing as none, and behind the last one the end."""
    return (b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b"") + (b"0\r\n\r\n" if last else b"")


class LengthBody:
    """Decodes a body whose length was told; of length 0, also one that there is not."""

    def __init__(self, length):
        self.left, self.complete = length, not length

    def decode(self, data):
        """Split data into the body's next piece and what is not of it."""
        piece = data[:self.left]
        self.left -= len(piece)
        self.complete = not self.left
        return piece, data[len(piece):]

    def end(self):
        """Take note that nothing more will come; raise Malformed if that is too early."""
        raise Malformed(f"the body ends {self.left} bytes early")


class CloseDelimitedBody(LengthBody):
    """Decodes a body that lasts until its connection ends (RFC 9112 6.3, the last rule)."""

    def __init__(self):
        self.complete = False

    def decode(self, data):
        return data, b""

    def end(self):
        self.complete = True


class ChunkedBody:
    """Decodes a chunked body (RFC 9112 7.1): plain hex sizes, no extensions, trailers read and dropped."""

    FIRST = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")
    NEXT = re.compile(rb"\r\n([0-9A-Fa-f]{1,16})\r\n")
    PART = re.compile(rb"(?:\r\n)?[0-9A-Fa-f]{0,16}\r?")

    def __init__(self):
        self.complete = False
        self.left = 0           # of the chunk that is being read
        self._size_line = self.FIRST
        self._ending = False    # the last chunk was seen: trailers follow

    def decode(self, data):
        """Split data into the body's next piece, of as many chunks as there are, and what is not of it."""
        pieces, at = [], 0
        while not self._ending:
            if self.left:
                piece = data[at:at + self.left]
                pieces.append(piece)
                at += len(piece)
                self.left -= len(piece)
                if self.left:
                    return b"".join(pieces), b""
            match = self._size_line.match(data, at)
            if not match:
                if not self.PART.fullmatch(data, at):
                    raise Malformed("a chunk is malformed")
                return b"".join(pieces), data[at:]
            self._size_line = self.NEXT
            at = match.end()
            self.left = int(match[1], 16)
            self._ending = not self.left
        return b"".join(pieces), self._trailers(data[at:])

    def _trailers(self, data):
        end = 0 if data.startswith(b"\r\n") else data.find(b"\r\n\r\n") + 2
        if end == 1:  # not found
            if len(data) > TRAILER_BYTES or BARE_LF.search(data):
                raise Malformed("the trailers are too large, or have a line that does not end in CR LF")
            return data
        for name, _ in parse_fields(data[:end]):
            if name.lower() in FORBIDDEN_TRAILERS:
                raise Malformed(f"{name} is not allowed in trailers")
        self.complete = True
        return data[end + 2:]

    def end(self):
        raise Malformed("the body ends before its last chunk")


def request_body_framing(request):
    """Return the decoder of a request's body (RFC 9112 6); raise Malformed where two readers could differ."""
    coding, length = request.fields.get("transfer-encoding"), request.fields.get("content-length")
    if coding is None:
        return LengthBody(content_length(length) if length is not None else 0)
    if length is not None:
        raise Malformed("there are both Content-Length and Transfer-Encoding")
    if request.version == "1.0":
        raise Malformed("there is no Transfer-Encoding in HTTP/1.0")
    if coding.lower() != "chunked":
        raise Malformed(f'the transfer coding "{coding[:40]}" is not "chunked"', "unknown_coding")
    return ChunkedBody()

# == Request body =============================================================


class Unreadable(Exception):
    """A body in which the gateway cannot determine what Ollama will read; `code` is one of REFUSALS."""

    def __init__(self, message, code="malformed"):
        super().__init__(message)
        self.code = code


TOO_LONG = object()     # replaces a value of more than VALUE_BYTES


def fold_keys(pairs):
    """Return {key in lower case: [its values]} of a JSON object's members, as encoding/json matches keys."""
    members = {}
    for key, value in pairs:
        key = key.lower()
        if not key.isascii():
            key = key.replace("\u017f", "s")    # Go folds the long s too
        members.setdefault(key, []).append(value)
    return members


def bounded_int(digits):
    """Return the number, or TOO_LONG if it has more than 1,000 digits: int() takes quadratic time."""
    return int(digits) if len(digits) <= 1000 else TOO_LONG


# newer Pythons have a limit of their own for int(); a call for each number takes twice the time of the decoder
DECODER = json.JSONDecoder(object_pairs_hook=tuple, parse_constant=lambda _: TOO_LONG,
                           parse_int=None if hasattr(sys, "set_int_max_str_digits") else bounded_int)


class TopLevelScanner:
    """Reads the top-level members of a large JSON object without building the object.

    Long strings and nested values are skipped in windows of at most WINDOW_BYTES by methods of bytes; between windows
    other threads run. Nested values are not validated: Ollama refuses a body that has a malformed one.
    """

    MARK = re.compile(rb'["{}\[\]]')
    BRACKET = re.compile(rb"[{}\[\]]")
    STEPS = bytes(1 if mark in b"{[" else 255 for mark in range(256))   # as signed bytes: 1 opens, -1 closes
    NO_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))

    def __init__(self, data):
        self._data, self._parts = data, 0

    def read(self):
        """Return the members as (key, value) pairs, and the object's size in bytes; raise Unreadable.

        A nested object is a tuple of pairs too; a value of more than VALUE_BYTES is TOO_LONG.
        """
        kept, at = bytearray(), 0
        while True:
            mark = self.MARK.search(self._data, at, at + WINDOW_BYTES)
            if mark is None:
                raise Unreadable("it is not a JSON object")
            kept += self._data[at:mark.start()].translate(None, b" \t\r\n")
            start, at = mark.span()
            if mark[0] == b"}":
                return self._decode(kept + b"}"), at
            if mark[0] == b'"':
                at = self._string_end(at)
            elif kept:
                at = self._nested_end(start)
            kept += self._data[start:at] if at - start <= VALUE_BYTES else b"NaN"
            if len(kept) > TOP_LEVEL_BYTES:
                raise Unreadable(f"its keys and short values take more than {TOP_LEVEL_BYTES} bytes", "body_too_large")

    @staticmethod
    def _decode(kept):
        try:
            pairs = DECODER.decode(kept.decode())
        except (ValueError, RecursionError):
            raise Unreadable("it is not a JSON object") from None
        if not isinstance(pairs, tuple):
            raise Unreadable("it is not a JSON object")
        return pairs

    def _windows(self, at):
        """Yield the data from a position outside an escape on, as (position, window) pairs; escapes are masked."""
        size = VALUE_BYTES // 8     # most values are short
        while at < len(self._data):
            window = self._data[at:at + size].replace(b"\\\\", b"--").replace(b'\\"', b"--")
            window = window[:-1] if window.endswith(b"\\") else window   # the rest of that escape is in the next one
            if not window:
                break
            yield at, window
            at += len(window)
            if size == WINDOW_BYTES:
                time.sleep(1e-6)    # releases the interpreter's lock: a waiting thread would have to wait 5 ms for it
            size = min(4 * size, WINDOW_BYTES)
        raise Unreadable("it is not a JSON object")

    def _string_end(self, at):
        """Return the position after a string of which the first character is at a position."""
        for start, window in self._windows(at):
            end = window.find(b'"')
            if end >= 0:
                self._count(1)
                return start + end + 1

    def _nested_end(self, at):
        """Return the position after the object or array that starts at a position."""
        depth, quoted = 0, 0
        for start, window in self._windows(at):
            parts = window.split(b'"')  # strings and what is between them, alternately
            steps = b"".join(parts[quoted::2]).translate(self.STEPS, self.NO_BRACKETS)
            self._count(len(parts) // 2 + len(steps))
            closing = steps.count(255)
            if depth <= closing and depth + min(itertools.accumulate(memoryview(steps).cast("b")), default=0) <= 0:
                return start + self._closing_bracket(parts, quoted, depth)
            depth += len(steps) - 2 * closing
            quoted ^= len(parts) % 2 == 0

    def _closing_bracket(self, parts, quoted, depth):
        """Return the position in a window's parts after the bracket that ends the value."""
        offset = 0
        for number, part in enumerate(parts):
            for bracket in self.BRACKET.finditer(part) if number % 2 == quoted else ():
                depth += 1 if bracket[0] in b"{[" else -1
                if depth <= 0:
                    return offset + bracket.end()
            offset += len(part) + 1

    def _count(self, parts):
        self._parts += parts
        if self._parts > JSON_PARTS:
            raise Unreadable(f"it has more than {JSON_PARTS} strings and brackets", "body_too_large")


def read_object(data):
    """Return the members of the JSON object at the start of data, and its size, as TopLevelScanner does."""
    if len(data) > DECODED_BYTES:
        return TopLevelScanner(data).read()
    try:
        text = data[:].decode()
        pairs, end = DECODER.raw_decode(text, len(text) - len(text.lstrip(" \t\r\n")))
    except (ValueError, RecursionError):
        raise Unreadable("it is not a JSON object") from None
    if not isinstance(pairs, tuple):
        raise Unreadable("it is not a JSON object")
    return pairs, end if text.isascii() else len(text[:end].encode())


class BodyInfo(NamedTuple):
    """What a request asks for, as Ollama will read it."""

    model: str = ""
    insert_at: int = 0   # where in the body include_usage has to go in, if the gateway is to learn what it cost


def requests_usage(members):
    """Tell whether a body's stream_options ask for the usage; equal keys are merged, as encoding/json does."""
    asks = False
    for options in members.get("stream_options", ()):
        if options is TOO_LONG:
            raise Unreadable('its "stream_options" are too long')
        for value in fold_keys(options).get("include_usage", ()) if isinstance(options, tuple) else [False]:
            asks = asks if value is None else value is True
    return asks


def check_utf8(data):
    """Raise Unreadable for a large body that is not UTF-8; a smaller one is decoded anyway."""
    if len(data) <= DECODED_BYTES:
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for at in range(0, len(data), WINDOW_BYTES):
            decoder.decode(data[at:at + WINDOW_BYTES], final=at + WINDOW_BYTES >= len(data))
    except UnicodeDecodeError:
        raise Unreadable("it is not UTF-8") from None


def single_text(members, key):
    """Return the text that is a key's one value, "" if it has none or another value; raise Unreadable."""
    values = members.get(key, ("",))
    if len(values) > 1:
        raise Unreadable(f'it has two keys "{key}"')
    if values[0] is TOO_LONG or isinstance(values[0], str) and len(values[0]) > VALUE_BYTES:
        raise Unreadable(f'its "{key}" is too long')
    return values[0] if isinstance(values[0], str) else ""


def inspect_json(data, wants_usage=False):
    """Read what a JSON body asks for: of its top-level keys "model", or else "name"; raise Unreadable.

    wants_usage: whether a stream tells its tokens only to whoever asks in `stream_options`.
    """
    check_utf8(data)
    pairs, size = read_object(data)
    members = fold_keys(pairs)
    model, name = single_text(members, "model"), single_text(members, "name")
    if not wants_usage or True not in members.get("stream", ()) or requests_usage(members):
        return BodyInfo(model or name)
    if len(data) - size > READ_BYTES:
        raise Unreadable("much follows it")
    return BodyInfo(model or name, size - 1)


FORM = re.compile(r'multipart/form-data(?: *; *charset=[\w-]+)? *; *boundary=(?:"([^"\\]{1,70})"|([^\s";]{1,70}))'
                  r'(?: *; *charset=[\w-]+)? *', re.IGNORECASE)
DISPOSITION = re.compile(
    rb'content-disposition: *form-data((?:; *(?:name|filename)=(?:"(?:[^"\\]|\\.)*"|[\w!#$%&+.^`|~-]+)'
    rb'|; *filename\*=[^\s";]*)+)', re.IGNORECASE)
PARAMETER = re.compile(rb'; *([\w*]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s";]*))')
PART_FIELD = re.compile(rb"(?:content-(?:type|length|id)|mime-version):[^\r\n]*"
                        rb"|content-transfer-encoding: *(?:7bit|8bit|binary) *", re.IGNORECASE)


def find_all(data, delimiter):
    """Yield the positions of a delimiter, which is searched in windows: other threads run in between."""
    at = 0
    while at < len(data):
        found = data.find(delimiter, at, at + WINDOW_BYTES)
        if found >= 0:
            yield found
        at = found + len(delimiter) if found >= 0 else at + WINDOW_BYTES - len(delimiter) + 1


def form_parts(content_type, data):
    """Yield where head and content of each of a form's parts are, as (start, end) pairs (RFC 7578, RFC 2046 5.1.1).

    Raises Unreadable for whatever two readers could take apart in two ways.
    """
    form = FORM.fullmatch(content_type)
    if not form:
        raise Unreadable("it is not multipart/form-data with a plain boundary")
    delimiter = b"--" + (form[1] or form[2]).encode("latin-1")
    found = [(at, at + len(delimiter)) for at in itertools.islice(find_all(data, delimiter), FORM_PARTS + 2)]
    if not found or data[:found[0][0]] not in (b"", b"\r\n") or len(found) > FORM_PARTS + 1 \
            or data[found[-1][1]:found[-1][1] + 5] not in (b"--", b"--\r\n"):
        raise Unreadable("it is not a form, or has too many parts")
    for (_, start), (end, _) in zip(found, found[1:]):
        head_end = data.find(b"\r\n\r\n", start, min(end, start + WINDOW_BYTES))
        if data[start:start + 2] != b"\r\n" or data[end - 2:end] != b"\r\n" or not start < head_end <= end - 4 - 2:
            raise Unreadable("a part of the form is malformed")
        yield (start + 2, head_end), (head_end + 4, end - 2)


def inspect_form(data, content_type):
    """Read the model that a form's field "model" names; raise Unreadable for a form that is not as clients write it."""
    models = []
    for head, content in form_parts(content_type, data):
        lines = data[slice(*head)].split(b"\r\n") if head[1] - head[0] <= VALUE_BYTES else [b""]
        named = [match for match in map(DISPOSITION.fullmatch, lines) if match]
        if len(named) != 1 or not all(PART_FIELD.fullmatch(line) for line in lines if line != named[0][0]):
            raise Unreadable("a part of the form has other headers than clients send")
        names = [(name.lower(), quoted or plain) for name, quoted, plain in PARAMETER.findall(named[0][1])]
        parameters = dict(names)
        if len(parameters) < len(names) or b"\\" in parameters.get(b"name", b"\\"):
            raise Unreadable("a part of the form has no plain name")
        if parameters[b"name"] == b"model":
            if models or len(parameters) > 1 or content[1] - content[0] > VALUE_BYTES:
                raise Unreadable('it has more than one plain field "model"')
            models.append(data[slice(*content)])
    try:
        return BodyInfo(models[0].decode() if models else "")
    except UnicodeDecodeError:
        raise Unreadable("it is not UTF-8") from None


NAME_PART = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,79}", re.ASCII)
HOST_PART = re.compile(r"[a-z0-9_][a-z0-9_.:-]{0,349}", re.ASCII)
CLOUD_MODEL = re.compile(r"[:-]\s*cloud(?:\s*:\s*local)*\Z")  # internal/modelref


@functools.lru_cache(MODEL_CACHE_SIZE)
def name_variants(model):
    """Return the ways to write a model's name in full, the shortest first; none for what is no name.

    Case does not matter, and what is missing is the tag "latest", the namespace "library", and Ollama's own registry
    (types/model/name.go).
    """
    *before, name = model.strip().lower().split("/")
    name = name if ":" in name else name + ":latest"
    if len(before) == 4 and before[0].endswith(":") and not before[1]:
        del before[:2]  # scheme://
    namespace = before[-1] if before else "library"
    host = before[0] if len(before) > 1 else "registry.ollama.ai"
    if len(before) > 2 or not HOST_PART.fullmatch(host) \
            or not all(map(NAME_PART.fullmatch, (namespace, *name.split(":", 1)))):
        return ()
    ways = (name, f"{namespace}/{name}", f"{host}/{namespace}/{name}")
    return ways[2:] if host != "registry.ollama.ai" else ways[1:] if namespace != "library" else ways


def normalize_model(model):
    """Return the shortest full way to write a model's name, "" for what is no name."""
    return (name_variants(model) or ("",))[0]


def is_cloud_model(model):
    """Tell whether a model's name makes Ollama run it on its owner's ollama.com account."""
    model = model.lower()
    return "cloud" in model and CLOUD_MODEL.search(model.strip()) is not None


def model_allowed(model, globs):
    """Tell whether one of a list's globs is the model's, in any spelling; on the account, "cloud" must be in it."""
    ways = name_variants(model)
    for glob in globs.split(","):
        tagged = glob if glob.endswith("*") or ":" in glob.rpartition("/")[2] else glob + ":latest"
        if any(fnmatch.fnmatchcase(way, tagged) for way in ways) and ("cloud" in glob or not is_cloud_model(model)):
            return True
    return False


BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\\"   # a backslash: some escape the slash


def is_base64(string):
    """Return whether a long string is base64 data such as an image; a prefix may name its type (RFC 2397)."""
    return not string[256:].translate(None, BASE64)


def prompt_text_bytes(data):
    """Return the number of bytes in all strings of a JSON body, data such as images left out.

    The body is read in windows: a method of bytes holds the interpreter's lock until it returns.
    """
    total, at, within = 0, 0, False     # within a string
    while at < len(data):
        window = data[at:at + READ_BYTES]
        if (len(window) - len(window.rstrip(b"\\"))) % 2:
            window = window[:-1] or window      # an escape is not cut in two
        at += len(window)
        parts = window.replace(b"\\\\", b"..").replace(b'\\"', b"..").split(b'"')
        strings = parts[0 if within else 1::2]
        within ^= len(parts) % 2 == 0
        total += sum(map(len, strings)) - sum(
            len(string) for string in strings if len(string) > KIB and is_base64(string))
    return total


@contextlib.contextmanager
def disk_errors():
    """Turn what goes wrong in keeping a body on disk into its refusal."""
    try:
        yield
    except OSError as error:
        if is_out_of_descriptors(error):
            raise Refusal("no_descriptors") from None
        raise Refusal("no_room", f"the body cannot be kept: {error.strerror}") from None


class BodyStorage:
    """Bounds the memory and the disk space that request bodies take together; safe to share between threads."""

    def __init__(self, max_spool):
        self._max_spool, self._lock = max_spool, threading.Lock()
        self._memory = self._disk = 0

    def take_memory(self, size):
        """Reserve memory; return False if there is none left."""
        with self._lock:
            fits = self._memory + size <= BODY_MEMORY
            self._memory += size if fits else 0
            return fits

    def take_disk(self, size):
        """Reserve disk space; raise Refusal if there is none left."""
        with self._lock:
            if self._disk + size > self._max_spool:
                raise Refusal("no_room", f"request bodies take {self._disk} bytes of disk space already, of at most "
                                         f"{self._max_spool} (--max-spool): try again later")
            self._disk += size

    def free(self, memory, disk):
        with self._lock:
            self._memory -= memory
            self._disk -= disk


class BufferedBody:
    """A request's body, whole: in memory, or in a temporary file if it is large. It can be sent twice."""

    replayable = True
    _file = None
    _memory = _disk = 0     # what it takes of the storage

    def __init__(self, data=b"", declared=True, storage=None):
        self.size, self._data, self._declared, self._storage = len(data), data, declared, storage

    def append(self, piece):
        """Add a piece; raise Refusal if there is no room for it."""
        if self._file is None and self.size + len(piece) <= SPOOL_BYTES and self._storage.take_memory(len(piece)):
            self._memory += len(piece)
            self._data += piece
        else:
            with disk_errors():
                self._write(piece)
        self.size += len(piece)

    def _write(self, piece):
        if self._file is None:
            import tempfile  # few requests need it, and every start would wait for it
            self._file = tempfile.TemporaryFile()
            piece, self._data = self._data + piece, b""
            self._storage.free(self._memory, 0)
            self._memory = 0
        self._storage.take_disk(len(piece))
        self._disk += len(piece)
        self._file.write(piece)

    @property
    def framing(self):
        return f"content-length: {self.size}\r\n" if self._declared else ""

    def pieces(self, _=None):
        """Yield the bytes as they go on the wire; raise Refusal if they cannot be read."""
        if self._file is None:
            yield self._data
            return
        with disk_errors():
            self._file.seek(0)
        for _ in range(0, self.size, READ_BYTES):
            with disk_errors():
                piece = self._file.read(READ_BYTES)
            yield piece

    def look(self, find, *how):
        """Return what `find(bytes, *how)` finds in the bytes; of a file only those in sight take memory."""
        if self._file is None:
            return find(self._data, *how)
        with disk_errors():
            self._file.flush()
            view = mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_READ)
        with view:
            return find(view, *how)

    def insert(self, at, extra):
        """Put bytes in between; what follows them must fit memory."""
        if self._file is None:
            self._data = self._data[:at] + extra + self._data[at:]
        else:
            with disk_errors():
                self._file.seek(at)
                rest = self._file.read()
                self._file.seek(at)
                self._file.write(extra + rest)
                self._file.flush()
        self.size += len(extra)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._file is not None:
            with contextlib.suppress(OSError):  # what it still has to write is not needed
                self._file.close()
        if self._storage is not None:
            self._storage.free(self._memory, self._disk)


NO_BODY = BufferedBody(declared=False)


class StreamedBody:
    """A request's body that is passed on as it comes, framed as it came, while `judge` does not raise Refusal."""

    replayable = False

    def __init__(self, client, judge):
        self._client, self._judge = client, judge
        self._chunked = isinstance(client.body, ChunkedBody)
        self.framing = "transfer-encoding: chunked\r\n" if self._chunked else f"content-length: {client.body.left}\r\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """There is nothing to put away."""

    def pieces(self, upstream):
        """Yield the bytes as they go on the wire; the upstream is watched while the client is silent."""
        judged = time.monotonic()
        while not self._client.body.complete:
            piece = self._client.read_body(upstream)
            if time.monotonic() - judged > REJUDGE_SECONDS:
                self._judge()
                judged = time.monotonic()
            yield encode_chunk(piece, self._client.body.complete) if self._chunked else piece

# == Store ====================================================================

SQLITE_VERSION = sqlite3.sqlite_version
OWN_TABLES = {"tokens", "state"}    # of every version
MOUNTS, REMOTE = "/proc/self/mountinfo", ("nfs", "cifs", "smb", "fuse", "9p")   # WAL needs memory shared by processes
REPLACED_COLUMNS = {"id", "user_id", "user", "api_name", "token", "created_at", "expires_at"}


def digest_of(secret):
    """Return the SHA-256 of a secret in hex; 256 random bits need no slow hash."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


# In a running server a digest takes 4 us, a twenty-fifth of a small answer's CPU; alone in a loop it takes 0.5 us.
cached_digest_of = functools.lru_cache(HEAD_CACHE_SIZE)(digest_of)


def hint_of(secret):
    """Return a secret's first characters, and never more than half of it."""
    return secret[:min(HINT_LENGTH, len(secret) // 2)]


def check_name(what, name):
    """Return a user's or token's name; raise UsageError for one that no list could show."""
    if not name or len(name) > NAME_LENGTH or not name.isprintable() or name != name.strip() or name.startswith("-"):
        raise UsageError(f"the {what} {json.dumps(name[:80])} must have 1 to {NAME_LENGTH} printable characters, "
                         "none of them '-' at the start or a space at either end")
    return name


def _printable(text):
    return "".join(c if c.isprintable() else "?" for c in text)


def _tame_name(text, taken, user=None):
    """Make any text of the replaced system's database a name that can be shown, and that is not taken."""
    name = _printable(text or "").strip().lstrip("-").strip()
    name = base = name[:NAME_LENGTH].strip() or "unnamed"
    number = 1
    while (user, name) in taken:
        number += 1
        name = f"{base[:NAME_LENGTH - 12]}-{number}"
    return name


def _replaced_instant(value, otherwise):
    """Read a time of the replaced system: ISO text, in UTC where it names no zone, or Unix seconds."""
    try:
        if isinstance(value, (int, float)):
            return check_instant(int(value))
        return parse_instant(str(value).strip(), naive_is_utc=True)
    except (ValueError, OverflowError):
        return otherwise


def _insert(db, **row):
    db.execute(f"INSERT INTO tokens ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", list(row.values()))


def _create_tokens(db, now):
    """Version 1: tokens by digest; the rows of the replaced system's table, if it is there, are carried over."""
    replaced = {row[1] for row in db.execute("PRAGMA table_info(tokens)")}
    rows = []
    if replaced:
        rows = db.execute("""SELECT CAST(user_id AS BLOB), CAST(user AS BLOB), CAST(api_name AS BLOB),
            CAST(token AS BLOB), created_at, expires_at FROM tokens ORDER BY id""").fetchall()  # all may be no UTF-8
        db.execute("DROP TABLE tokens")
    db.execute("""CREATE TABLE tokens (
        id INTEGER PRIMARY KEY AUTOINCREMENT, user TEXT NOT NULL, name TEXT NOT NULL,
        digest TEXT NOT NULL UNIQUE, hint TEXT NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER,
        last_used_at INTEGER, admin INTEGER NOT NULL DEFAULT 0, UNIQUE (user, name))""")
    # generation: the server looks at it to learn whether its copy of the tokens is old; last_used_at does not count
    db.execute("CREATE TABLE state (generation INTEGER NOT NULL, scrub_owed INTEGER NOT NULL)")
    db.execute("INSERT INTO state VALUES (1, ?)", (bool(replaced),))
    for event, when in ("INSERT", ""), ("UPDATE", "WHEN OLD.last_used_at IS NEW.last_used_at"), ("DELETE", ""):
        db.execute(f"CREATE TRIGGER tokens_{event.lower()} AFTER {event} ON tokens {when} "
                   "BEGIN UPDATE state SET generation = generation + 1; END")
    taken, digests = set(), set()
    for *texts, created_at, expires_at in rows:
        user_id, user, name, secret = (text and text.decode("utf-8", "surrogateescape") for text in texts)
        digest = digest_of(secret or "")
        if not secret or digest in digests:
            continue  # could never have been used, or is there already
        digests.add(digest)
        user = _tame_name(user or user_id, ())
        name = _tame_name(name, taken, user)
        taken.add((user, name))
        expires_at = None if expires_at in (None, "") else _replaced_instant(expires_at, now)  # unreadable: expired
        _insert(db, user=user, name=name, digest=digest, hint=_printable(hint_of(secret)),
                created_at=_replaced_instant(created_at, now), expires_at=expires_at)


def _add_limits_and_usage(db, _):
    """Version 2: what each token may, and an account by the hour that outlives the tokens."""
    for column in "models TEXT", "rpm INTEGER", "max_parallel INTEGER", "tokens_per_day INTEGER":
        db.execute(f"ALTER TABLE tokens ADD COLUMN {column}")
    db.execute("""CREATE TABLE usage (
        hour INTEGER NOT NULL, user TEXT NOT NULL, name TEXT NOT NULL, model TEXT NOT NULL, route TEXT NOT NULL,
        requests INTEGER NOT NULL, errors INTEGER NOT NULL, cancelled INTEGER NOT NULL,
        prompt_tokens INTEGER, completion_tokens INTEGER, seconds REAL NOT NULL,
        PRIMARY KEY (user, name, hour, model, route)) WITHOUT ROWID""")  # a token's day is one range
    db.execute("CREATE INDEX usage_by_hour ON usage (hour)")


def _add_cached_and_estimated(db, _):
    """Version 3: how much of the usage was read from the cache, and how much is an estimate."""
    db.execute("ALTER TABLE usage ADD COLUMN cached_tokens INTEGER")
    db.execute("ALTER TABLE usage ADD COLUMN estimated_tokens INTEGER NOT NULL DEFAULT 0")


# The n-th makes version n of its predecessor, once.
MIGRATIONS = (_create_tokens, _add_limits_and_usage, _add_cached_and_estimated)


def _scrub(db):
    """Rewrite the database so that no page of it, free or live, nor its WAL, remembers a clear token."""
    try:
        db.execute("PRAGMA secure_delete = ON")
        db.execute("VACUUM")
        busy, _, _ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if not busy:  # else another opener is in the way, and the scrub stays owed
            db.execute("UPDATE state SET scrub_owed = 0")
    except sqlite3.OperationalError as error:
        LOG.warning("clear tokens of the old gateway are still in the database, until it is opened again: %s", error)


def _migrate(db, now):
    """Bring the database to the newest version, step by step, whoever else is doing the same."""
    db.execute("BEGIN IMMEDIATE")
    try:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        for number, migration in enumerate(MIGRATIONS[version:], version + 1):
            migration(db, now)
            db.execute(f"PRAGMA user_version = {number}")
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def _use_wal(db, patience):
    """Let readers and a writer work side by side; where the file system cannot, stay as it is.

    SQLite's busy handler does not wait for this one, and eight first openers collide here: retried until a deadline.
    """
    deadline = Deadline(patience)
    while db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            deadline.left()
            time.sleep(0.01)


def _connect(path, writable, modes=("mode=ro", "immutable=1"), patience=BUSY_SECONDS):
    """Open the file; where nothing can be written beside it, as it is, or, if SQLite needs more, as if frozen."""
    how = dict(timeout=patience, isolation_level=None, check_same_thread=False)
    if writable:
        return sqlite3.connect(path, **how)
    for mode in modes:
        db = sqlite3.connect(f"file:{urllib.parse.quote(path)}?{mode}", uri=True, **how)
        try:
            db.execute("SELECT 1 FROM sqlite_master").fetchone()
            return db
        except sqlite3.Error as error:
            db.close()
            trouble = error
            if not isinstance(error, sqlite3.OperationalError):
                break   # it is no database, however it is opened
    raise trouble


def _check_version(db, path):
    """Return the version of a database of ours or of the replaced system (0); raise Failure for another's."""
    db.execute("BEGIN")  # one moment for all that is read: somebody else may be upgrading
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    columns = {row[1] for row in db.execute("PRAGMA table_info(tokens)")}
    db.execute("ROLLBACK")
    if version > len(MIGRATIONS):
        raise Failure(f"the database {path} is of version {version}, this program knows up to {len(MIGRATIONS)}: "
                      "use a newer one")
    if version == 0 and tables and not columns >= REPLACED_COLUMNS or version and not tables >= OWN_TABLES:
        raise Failure(f"{path} is a database of another program: name another file with --db")
    return version


def _find_file(path, create):
    """Make sure that there is a file; one that is made is its owner's alone before it holds a byte."""
    if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path)):
        raise Failure(f"the database {path} cannot be there: " + (
            "that is a folder" if os.path.isdir(path) else f"there is no folder {os.path.dirname(path)}"))
    empty = not os.path.exists(path) or not os.path.getsize(path)
    if empty and not create:
        raise Failure(f'there is no database at {path} yet: "token create" makes one, or name another with --db')
    if not os.path.exists(path):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def remote_file_system(path):
    """Return the type of the network or FUSE file system that a file is on, "" for another, or if that is unknown."""
    with contextlib.suppress(OSError), open(MOUNTS, encoding="utf-8", errors="replace") as mounts:
        device = os.stat(os.path.dirname(path)).st_dev
        for line in mounts:     # proc(5): id, parent, major:minor, …, "-", type, source, options
            mount, _, kind = line.partition(" - ")
            if mount.split()[2:3] == [f"{os.major(device)}:{os.minor(device)}"] and kind.startswith(REMOTE):
                return kind.split()[0]
    return ""


def _identify(*paths):
    """Return device and inode of each file, None for one that is missing or out of reach."""
    found = []
    for path in paths:
        try:
            stat = os.stat(path)
            found.append((stat.st_dev, stat.st_ino))
        except OSError:
            found.append(None)
    return found


def _make_private(*paths):
    """Make files accessible to their owner only; SQLite does not change the mode of a -wal or -shm left behind."""
    for path in paths:
        try:
            if os.name == "posix" and os.stat(path).st_mode & 0o077:
                os.chmod(path, 0o600)
        except FileNotFoundError:
            pass
        except OSError as error:
            LOG.warning("others on this machine may read %s: %s", path, error)


def _empty_wal(db, patience):
    """Move what was committed into the database file: SQLite would apply a -wal to any file that replaces it.

    Do not wait for readers: the next writer does it then.
    """
    with contextlib.suppress(sqlite3.Error):
        db.execute("PRAGMA busy_timeout = 0")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.execute(f"PRAGMA busy_timeout = {int(patience * 1000)}")


def _remove_wal(paths, files):
    """Remove the -wal and -shm of a replaced database, or SQLite would apply them to the new one.

    The lock of the folder prevents that of two gateways one removes the files which the other has just created.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):     # Windows has no such lock, and replaces no open file
            import fcntl
            folder = os.open(os.path.dirname(paths[0]), os.O_RDONLY)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)
        for path in paths[1:] if files[1:] == _identify(*paths[1:]) else ():
            with contextlib.suppress(OSError):
                os.unlink(path)


def _open(paths, create, patience):
    """Open the database, upgrading an old one; return a connection, whether it can write, and the files' identities.

    patience: seconds to wait for other writers. Raise Failure, naming the file and what is wrong; then nothing in it
    has been touched.
    """
    path = paths[0]
    try:
        _find_file(path, create)
        file, = _identify(path)
        writable = os.access(path, os.W_OK) and os.access(os.path.dirname(path), os.W_OK)
        with contextlib.ExitStack() as stack:
            db = stack.enter_context(contextlib.closing(_connect(path, writable, patience=patience)))
            version = _check_version(db, path)
            if version < len(MIGRATIONS) and not writable:
                raise Failure(f"the database {path} must be upgraded and is read-only: make it and its folder writable")
            if writable:
                _make_private(*paths)
                _use_wal(db, patience)
                if version < len(MIGRATIONS):
                    _migrate(db, int(time.time()))
                if db.execute("SELECT scrub_owed FROM state").fetchone()[0]:
                    _scrub(db)
                _empty_wal(db, patience)
            files = _identify(*(paths if writable else paths[:1]))  # an immutable one sees others' -wal come and go
            shares_old_shm = any(files[1:]) and not all(files[1:])  # with a connection of this process
            if files[0] != file or shares_old_shm:
                raise Failure(f"the database {path} was replaced while it was opened: try again")
            stack.pop_all()
            return db, writable, files
    except (sqlite3.Error, OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise Failure(f"cannot use the database {path!a}: {error}") from None


USAGE_KEY = ("hour", "user", "name", "model", "route")
MEASURED = ("requests", "errors", "cancelled", "prompt_tokens", "cached_tokens", "completion_tokens", "seconds",
            "estimated_tokens")
TOKENS_USED = "ifnull(prompt_tokens, 0) - ifnull(cached_tokens, 0) + ifnull(completion_tokens, 0)"   # as tokens_used
USAGE_BY = {"user": ("user",), "token": ("user", "name"), "model": ("model",), "day": ("day",)}


def tokens_used(prompt, cached, completion):
    """Return the tokens that a budget is charged: a cached prompt costs no computation."""
    return (prompt or 0) - (cached or 0) + (completion or 0)


def check_rights(user, name, admin, models):
    """Raise UsageError for an admin's token with a list of models, which nothing would hold it to."""
    if admin and models:
        raise UsageError(f'the token "{user}/{name}" would be an admin\'s, who may use every model, and '
                         "have a list of models: give it --models none, or --no-admin")


def token_exists(user, name):
    return Failure(f'the token "{user}/{name}" exists already: choose another name, or "token rotate" it',
                   "token_exists")


class TokenStore:
    """The tokens on disk; safe to share between threads, and with other processes.

    The file may be replaced or removed at any time: each access first compares device and inode.
    """

    COLUMNS = ", ".join(Token._fields)
    EXPORTED = ("user", "name", "digest", "hint", "created_at", "expires_at", "last_used_at", "admin", *LIMIT_BY_COLUMN)

    def __init__(self, path, create=False, clock=time.time):
        self.path, self._paths = path, (path, path + "-wal", path + "-shm")
        self._lock, self._clock, self._patience = threading.Lock(), clock, BUSY_SECONDS
        self._unusable = None   # (identity of a new file that failed to open, error, when to try again)
        self._db, self.writable, self.files = _open(self._paths, create, BUSY_SECONDS)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._db.close()

    def wait_at_most(self, seconds):
        """Give up on a locked database sooner than a command does."""
        self._patience = seconds
        self._db.execute(f"PRAGMA busy_timeout = {int(seconds * 1000)}")

    def connect(self):
        """Return another connection, and the identities of the database's files; raise Failure or sqlite3.Error."""
        with self._lock:
            self._reopen_if_replaced()
            return _connect(self.path, self.writable, patience=self._patience), self.files

    def _reopen_if_replaced(self):
        """Reopen the database if it was replaced; raise Failure while it is missing or cannot be used."""
        found = _identify(*self._paths[:len(self.files)])
        file = found[0]
        if file is None:
            raise Failure(f"the database {self.path} is gone: move it, or a copy of it, back there")
        if found == self.files:
            return
        if self._unusable and self._unusable[0] == file and time.monotonic() < self._unusable[2]:
            raise Failure(self._unusable[1])
        if len(self.files) > 1 and file != self.files[0]:
            _remove_wal(self._paths, self.files)
        self.files = [None]     # even if the old file comes back
        self._db.close()
        try:
            self._db, self.writable, self.files = _open(self._paths, False, self._patience)
        except Failure as error:
            self._unusable = file, str(error), time.monotonic() + STORE_SECONDS
            raise
        self._unusable = None
        LOG.warning("the database %s was replaced: using the new file", self.path)

    @contextlib.contextmanager
    def _transaction(self, writing=False):
        """Hold a transaction, committed at the block's end; SQLite's errors become Failures."""
        with self._lock:
            self._reopen_if_replaced()
            if writing and not self.writable:
                raise Failure(f"the database {self.path} is read-only: "
                              "make it and its folder writable to change tokens")
            try:
                self._db.execute("BEGIN IMMEDIATE" if writing else "BEGIN")
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise Failure(f"the database {self.path} refuses: {error}") from error
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            if writing:
                if _identify(*self._paths) != self.files:
                    raise Failure(f"the database {self.path} was replaced meanwhile: "
                                  "check whether the change was saved, and repeat it if not")
                _empty_wal(self._db, self._patience)

    @contextlib.contextmanager
    def _token_write(self):
        """Hold a transaction that changes tokens, and have every TokenTable take note."""
        with self._transaction(writing=True) as db:
            yield db
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def _get(self, db, user, name):
        check_name("user", user), check_name("name", name)
        row = db.execute(f"SELECT {self.COLUMNS} FROM tokens WHERE user = ? AND name = ?", (user, name)).fetchone()
        if row is None:
            raise Failure(f'no token "{user}/{name}" in {self.path}: see "token list"', "no_such_token")
        return Token(*row)

    def create(self, user, name, expires_at=None, admin=False, **limits):
        """Make a token; return it and its secret, which nothing but the answer will ever hold.

        limits: by the columns of LIMITS.
        """
        check_name("user", user), check_name("name", name)
        secret = SECRET_PREFIX + secrets.token_urlsafe(32)
        with self._token_write() as db:
            if db.execute("SELECT 1 FROM tokens WHERE user = ? AND name = ?", (user, name)).fetchone():
                raise token_exists(user, name)
            _insert(db, user=user, name=name, digest=digest_of(secret), hint=hint_of(secret),
                    created_at=int(self._clock()), expires_at=expires_at, admin=bool(admin), **limits)
            token = self._get(db, user, name)
            check_rights(user, name, token.admin, token.models)
            return token, secret

    def rotate(self, user, name):
        """Give a token a new secret and return both; the old one stops working."""
        secret = SECRET_PREFIX + secrets.token_urlsafe(32)
        with self._token_write() as db:
            token = self._get(db, user, name)
            db.execute("UPDATE tokens SET digest = ?, hint = ? WHERE id = ?",
                       (digest_of(secret), hint_of(secret), token.id))
            return self._get(db, user, name), secret

    def update(self, user, name, **changes):
        """Change a token's expires_at, admin or limits; return it."""
        with self._token_write() as db:
            token = self._get(db, user, name)
            for column in Token._fields:
                if column in changes:
                    db.execute(f"UPDATE tokens SET {column} = ? WHERE id = ?", (changes[column], token.id))
            token = self._get(db, user, name)
            check_rights(user, name, token.admin, token.models)
            return token

    def delete(self, user, name):
        """Delete a token and return what it was."""
        with self._token_write() as db:
            token = self._get(db, user, name)
            db.execute("DELETE FROM tokens WHERE id = ?", (token.id,))
            return token

    def get(self, token_id):
        """Return the token of a number."""
        with self._transaction() as db:
            row = db.execute(f"SELECT {self.COLUMNS} FROM tokens WHERE id = ?", (token_id,)).fetchone()
        if row is None:
            raise Failure(f"no token has the number {token_id}", "no_such_token")
        return Token(*row)

    def list(self, user=None):
        """Return the tokens, of one user or of all, by user and name."""
        if user is not None:
            check_name("user", user)
        with self._transaction() as db:
            rows = db.execute(f"SELECT {self.COLUMNS} FROM tokens WHERE ? IN (user, '') ORDER BY user, name, id",
                              (user or "",)).fetchall()
        return [Token(*row) for row in rows]

    def add_usage(self, rows, uses):
        """Add to the account, and note when tokens were last used.

        rows: {what makes USAGE_KEY: what is MEASURED}; uses: {token id: Unix seconds}.
        """
        add = ", ".join(f"{column} = coalesce({column} + excluded.{column}, {column}, excluded.{column})"
                        for column in MEASURED)
        with self._transaction(writing=True) as db:
            db.executemany(f"INSERT INTO usage ({', '.join(USAGE_KEY + MEASURED)}) "
                           f"VALUES ({', '.join('?' * len(USAGE_KEY + MEASURED))}) "
                           f"ON CONFLICT ({', '.join(USAGE_KEY)}) DO UPDATE SET {add}",
                           [(*key, *row) for key, row in rows.items()])
            db.executemany("UPDATE tokens SET last_used_at = ? WHERE id = ? AND ifnull(last_used_at, 0) < ?",
                           [(when, token_id, when) for token_id, when in uses.items()])

    def usage(self, by, since, token=None):
        """Return the account by a key of USAGE_BY from an hour on, of one token or of all: a dictionary a row.

        Tokens that Ollama told nothing of are None.
        """
        keys, whose = USAGE_BY[by], (token.user, token.name) if token else ()
        sums = ", ".join(f"sum({column})" for column in MEASURED)
        with self._transaction() as db:
            rows = db.execute(
                f"SELECT {', '.join(keys)}, {sums} FROM (SELECT *, hour / {DAY} AS day FROM usage "
                f"WHERE {'user = ? AND name = ? AND ' if whose else ''}hour >= ?) "
                f"GROUP BY {', '.join(keys)} ORDER BY {'day' if by == 'day' else f'sum({TOKENS_USED}) DESC, 1'}",
                (*whose, since)).fetchall()
        rows = [dict(zip(keys + MEASURED, row)) for row in rows]
        for row in rows:
            row["seconds"] = round(row["seconds"], 3)
            if by == "day":
                row["day"] = format_instant(day_start(row["day"]))[:10]
        return rows

    def export_rows(self):
        """Return all there is to carry to another machine: a dictionary a token, digests, never secrets."""
        with self._transaction() as db:
            rows = db.execute(f"SELECT {', '.join(self.EXPORTED)} FROM tokens ORDER BY user, name").fetchall()
        return [dict(zip(self.EXPORTED, row)) for row in rows]

    def import_rows(self, rows):
        """Add exported rows, all or none; a row that is here already is no change. Return how many were new."""
        added = 0
        with self._token_write() as db:
            for row in rows:
                here = db.execute(f"SELECT {', '.join(self.EXPORTED)} FROM tokens "
                                  "WHERE user = ? AND name = ? OR digest = ?",
                                  (row["user"], row["name"], row["digest"])).fetchall()
                known = [dict(zip(self.EXPORTED, old), last_used_at=row["last_used_at"]) for old in here]
                if known and known != [row]:
                    raise Failure(f'the token "{row["user"]}/{row["name"]}" clashes with one in {self.path}: '
                                  "nothing was imported; delete or rename one of them first")
                if not known:
                    _insert(db, **row)
                    added += 1
        return added


def open_store(path, create=False):
    """Return the TokenStore of a path; `create` allows a missing or empty file. Raise Failure as _open does."""
    return TokenStore(os.path.abspath(path), create)


class DatabaseInfo(NamedTuple):
    """What a database is, as `inspect` finds it."""

    version: int
    tokens: int
    writable: bool      # for this user
    mode: int           # its file's permissions


def describe_database(path):
    """Return the Finding of a database without a change to anything; raise Failure for one that cannot be used."""
    path = os.path.abspath(path)
    try:
        _find_file(path, create=False)
        modes = ("mode=ro", "immutable=1") if os.path.exists(path + "-wal") else ("immutable=1",)
        with contextlib.closing(_connect(path, False, modes)) as db:
            version = _check_version(db, path)
            tokens = db.execute("SELECT count(*) FROM tokens").fetchone()[0]
        writable = os.access(path, os.W_OK) and os.access(os.path.dirname(path), os.W_OK)
        return DatabaseInfo(version, tokens, writable, os.stat(path).st_mode & 0o777)
    except (sqlite3.Error, OSError, ValueError) as error:
        raise Failure(f"cannot use the database {path!a}: {error}") from None


class TokenCache:
    """All tokens by digest, in memory: what a request asks. It is as new as the last change of anyone.

    Whoever changes tokens touches the database's file once that is committed (TokenStore), so while its time is as it
    was, and older than any file system's tick, nothing has changed. Otherwise, and twice a second for those who do not
    touch, SQLite is asked: `PRAGMA data_version` moves with every commit of another connection, the account's too; only
    then is the generation looked at, and only when that has moved are the tokens read again. Asking for each request
    would have them wait for each other. The connection never waits: while the database is locked, the table stays.
    If the file is replaced, the table is read from the new one; while it is missing or unreadable, `find` fails.
    """

    def __init__(self, store):
        self._store, self._path = store, store.path
        self._lock = threading.Lock()
        self._db = self._file = self._files = self._touched = None
        self._asked = 0.0
        self._complaint = ""
        try:
            self._reopen()
        except sqlite3.Error as error:
            self.close()
            raise Failure(f"the database {store.path} refuses: {error}") from None

    def find(self, secret):
        """Return the token of a secret, expired or not, or None; raise Failure while the database cannot be read."""
        now = time.time()
        try:
            found = os.stat(self._path)
            touched, file = found.st_mtime, (found.st_dev, found.st_ino)
        except OSError:
            touched, file = now, None
        tick = FINE_TICK if touched % 1 else COARSE_TICK
        if (touched != self._touched or file != self._file or abs(now - touched) < tick
                or abs(now - self._asked) > STORE_SECONDS):
            with self._lock:
                if self._look(file):
                    self._touched, self._asked = touched, now
        return self._tokens.get((cached_digest_of if len(secret) <= CACHED_HEAD_BYTES else digest_of)(secret))

    def _look(self, file):
        """Update the table and return whether it is up to date; log a failure once, and raise Failure.

        file: identity of the present file, None if it is missing.
        """
        try:
            if file is None or file != self._file or self._files is not self._store.files:
                self._reopen()
            self._refresh()
        except (Failure, sqlite3.Error) as error:
            if "locked" in str(error) and self._file:
                return False    # the old table is good
            self._file, text = None, str(error)
            if not isinstance(error, Failure):
                text = f"the database {self._path} refuses: {error}"
            if text != self._complaint:
                LOG.error("requests are refused, because tokens cannot be checked: %s", text)
            self._complaint = text
            raise Failure(text) from None
        if self._complaint:
            LOG.warning("the database %s is readable again: requests are served", self._path)
            self._complaint = ""
        return True

    def _reopen(self):
        """Connect to the present file and read its tokens; wait while it is locked."""
        self._file = None
        self.close()
        self._db, files = self._store.connect()
        self._seen = self._generation = None
        self._refresh()
        self._db.execute("PRAGMA busy_timeout = 0")
        self._file, self._files = files[0], files

    def spent(self, token, day):
        """Return the tokens that the account has charged a token's budget on a day; raise Failure."""
        try:
            with self._lock:
                return self._db.execute(f"SELECT ifnull(sum({TOKENS_USED}), 0) FROM usage "
                                        "WHERE user = ? AND name = ? AND hour >= ? AND hour < ?",
                                        (token.user, token.name, day_start(day), day_start(day + 1))).fetchone()[0]
        except sqlite3.Error as error:
            raise Failure(f"the database {self._path} refuses: {error}") from None

    def _refresh(self):
        version = self._db.execute("PRAGMA data_version").fetchone()
        if version == self._seen:
            return
        self._db.execute("BEGIN")
        try:
            generation = self._db.execute("SELECT generation FROM state").fetchone()
            if generation != self._generation:
                rows = self._db.execute(f"SELECT {TokenStore.COLUMNS}, digest FROM tokens")
                self._tokens = {digest: Token(*row) for *row, digest in rows}
            self._generation, self._seen = generation, version
        finally:
            self._db.execute("ROLLBACK")

    def close(self):
        if self._db:
            self._db.close()

# == Server ===================================================================


class ClientLimits(NamedTuple):
    """What a connection may take: bytes and seconds."""

    max_body: int
    header_timeout: float
    idle_timeout: float
    storage: object     # the BodyStorage of all connections


class ClientConnection(Connection):
    """A client's connection; watched, it tells when the client has left, or has to."""

    last_request = False    # no further one may follow: the server is stopping
    shutting_down = False       # nor may this one go on
    has_token = False   # the current request has a valid token
    token_id = None      # the id of that token, until the end of the answer is sent
    stalled = False         # the current request has been kept waiting by its client, or for its bad credential

    def wait(self, events, deadline, cancel_on=None):
        """Wait as Wire does, but raise Refusal where the end of the stream is only that of `dismiss`."""
        found = wait_for(self.descriptor, events, deadline, cancel_on)
        if self.shutting_down and events & READABLE:  # a read would end TLS, and no answer could be sent
            raise Refusal("stopping")
        return found

    def on_readable(self):
        """Raise ClientLeft if it hung up, fully or half; a pipelined request is kept for later."""
        if self.shutting_down:
            raise Refusal("stopping")
        if len(self.buffer) >= READ_BYTES or not self.alive():
            raise ClientLeft("the client hung up")

    def until_writable(self, deadline, cancel_on):
        """Wait for a slow reader, unless it has left."""
        self.stalled = True
        if self.wait(WRITABLE | HUNG_UP, deadline, cancel_on) & HUNG_UP:
            raise ClientLeft("the client hung up")

    def pause(self, seconds):
        """Let time pass, unless the client leaves."""
        self.stalled = True
        deadline = Deadline(seconds)
        with contextlib.suppress(TimeoutError):
            while True:
                self.wait(self.watched_events(), deadline)
                self.on_readable()

    def abort_for_shutdown(self):
        """Have the connection's thread tell its client that it is over: whatever it waits for, it wakes up."""
        self.shutting_down = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RD)

    def linger(self):
        """Discard for a moment what a dismissed client still sends: a reset could cost it its answer."""
        end = time.monotonic() + ABORT_SECONDS / 2
        with contextlib.suppress(OSError):
            while time.monotonic() < end:
                if not socket.socket.recv(self.sock, RECEIVE_BYTES):  # nothing now: after SHUT_RD it never blocks
                    time.sleep(0.02)


class ConnectionLimiter:
    """Limits the open connections. Each is waiting, for a TLS handshake or a whole request head, or being served.

    At the limit a waiting one is evicted, the longest first, else one stalled in a request without a valid token.
    """

    def __init__(self, most, trusted=()):
        self.most, self._trusted = most, trusted
        self._share = max(most // 4, 1)     # of one network, in connections that have sent no whole head yet
        self._waiting = OrderedDict()       # {wire: its network until its first request, then None}, longest first
        self._serving = {}                  # {wire: True}, longest first
        self._stopping = False
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    def __len__(self):
        return len(self._waiting) + len(self._serving)

    def admit(self, connection, address):
        """Take a new connection in, evicting another one if need be; return False if none can be evicted.

        An address that has its share already makes room itself.
        """
        proxied = any(address_of(address) in network for network in self._trusted)
        network = None if proxied else network_of(address)
        with self._lock:
            own = self._new_from(network)
            if len(own) >= self._share:
                self._end(own[0])
            elif len(self) >= self.most and not self.evict():
                return False
            self._waiting[connection] = network
            return True

    def _new_from(self, network):
        if network is None or len(self._waiting) < self._share:
            return ()
        return [connection for connection, found in self._waiting.items() if found == network]

    def evict(self):
        """Evict a connection; return whether there was one to evict."""
        with self._lock:
            stalled = (connection for connection in self._serving if connection.stalled and not connection.has_token)
            connection = next(itertools.chain(self._waiting, stalled), None)
            if connection is not None:
                self._end(connection)
            return connection is not None

    def _end(self, connection):
        self._waiting.pop(connection, None)
        self._serving.pop(connection, None)
        connection.shut_down()

    def rest(self, connection):
        """Note that a connection waits for a request; return False if it must end."""
        with self._lock:
            if self._stopping:
                return False
            if self._serving.pop(connection, False):
                self._waiting[connection] = None
            return connection in self._waiting

    def resume(self, connection):
        """Note that a request's head has come; return False if the connection was evicted before."""
        with self._lock:
            if self._waiting.pop(connection, False) is False:
                return False
            connection.has_token, connection.token_id, connection.stalled = False, None, False
            self._serving[connection] = True
            return True

    def authenticate(self, connection, token_id):
        """Note whose request a connection serves; raise Refusal if that token has a quarter of all connections."""
        if len(self._serving) > self._share:
            with self._lock:
                if sum(other.token_id == token_id for other in self._serving) >= self._share:
                    raise Refusal("too_many_at_once", f"this token may have {plural(self._share, 'request')} open, a "
                                                      "quarter of --max-connections: try again later")
        connection.has_token, connection.token_id = True, token_id

    def leave(self, connection):
        with self._lock:
            self._waiting.pop(connection, None)
            self._serving.pop(connection, None)
            self._changed.notify_all()

    def drain(self, seconds):
        """Let running requests finish for so long, then have them cut so that it shows."""
        with self._lock:
            self._stopping = True
            for connection in self._serving:
                connection.last_request = True
            for connection in list(self._waiting):
                self._end(connection)
            for end, patience in (None, seconds), (ClientConnection.abort_for_shutdown, ABORT_SECONDS), (Connection.shut_down, ABORT_SECONDS):
                for connection in self._serving if end else ():
                    end(connection)
                if self._changed.wait_for(lambda: not self._serving, patience):
                    return


class CpuAffinity:
    """Keeps the process, for a with block, on one core, the one that others use least.

    Its threads run one at a time whatever the number of cores, for they share the interpreter's lock, and over several
    cores each hand-over of that lock is a wake-up from one to the other: with 8 connections a small answer took 190 us
    of CPU, on one core 65, and there were 2.5 times as many. Only Linux lets a process choose.
    """

    def __init__(self):
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        self._core, self._busy, self._own = None, {}, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="footprint", daemon=True)

    def __enter__(self):
        self._thread.start()    # in the main thread a signal to stop could interrupt an import

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _run(self):
        self._choose_core()
        while not self._stop.wait(AFFINITY_SECONDS):
            self._choose_core()

    def _choose_core(self):
        """Move if another core was left idle while others used this one."""
        if len(self._cores) < 2:
            return
        with contextlib.suppress(OSError, ValueError, LookupError):  # there is no /proc/stat, or another one
            busy, own = self._busy_seconds(), time.process_time()
            used = {core: busy[core] - self._busy.get(core, 0.0) for core in self._cores}
            if self._core is not None:
                used[self._core] -= own - self._own
            self._busy, self._own = busy, own
            best = min(used, key=used.get)
            if self._core is None or used[self._core] > 2 * used[best] + AFFINITY_SECONDS / 5:
                self._move(best)

    def _move(self, core):
        self._core = core
        for _ in range(2):  # again for those that were begun meanwhile, by one that was still to be moved
            for thread in os.listdir("/proc/self/task"):
                with contextlib.suppress(OSError):  # it has ended
                    os.sched_setaffinity(int(thread), {core})

    @staticmethod
    def _busy_seconds():
        """Return {core: seconds that it was not idle}: proc(5) has user, nice, system, idle, iowait, irq and others."""
        found = {}
        with open("/proc/stat", "rb") as stat:
            for name, *ticks in (line.split() for line in stat if re.match(rb"cpu[0-9]", line)):
                user, nice, system, _, _, *interrupts = map(int, ticks[:8])
                found[int(name[3:])] = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
        return found


class GatewayServer(http.server.ThreadingHTTPServer):
    """Listens; a thread for each connection does the rest, from the TLS handshake on."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = BACKLOG
    allow_reuse_address = os.name == "posix"  # on Windows it would let another program steal the port

    BUSY_RESPONSE = (b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\n"
                     b"Connection: close\r\nContent-Length: 47\r\n\r\n" b'{"error": "too many connections: retry later"}\n')

    def __init__(self, host, port, handler, gateway, limits, connections, tls=None):
        found = look_up(host, port, socket.AI_PASSIVE)[0]
        self.address_family = found[0]
        self.gateway, self.limits, self.tls = gateway, limits, tls
        self.connections = connections
        self._rejecting = deque()     # (wire, when to close it)
        self._warning, self._warned = threading.Lock(), -math.inf
        self._ids = map((secrets.token_hex(4) + "%08x").__mod__, itertools.count())
        super().__init__(found[4], handler)

    def next_id(self):
        """Return an id for a request: nobody else's, at no system call."""
        return next(self._ids)

    def server_bind(self):
        """Bind without http.server's look-up of the host's name; :: takes IPv4 too."""
        if self.address_family == socket.AF_INET6:
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def url(self):
        """Return the address to use, as seen from other machines if it is open to them."""
        host, port = self.server_address[:2]
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        return f"{'https' if self.tls else 'http'}://{shown}:{port}"

    def get_request(self):
        """Accept a connection; when out of descriptors, evict one and back off: the listener stays readable."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (*OUT_OF_DESCRIPTORS, errno.ENOBUFS, errno.ENOMEM):
                if error.errno in OUT_OF_DESCRIPTORS:
                    self.warn_of_descriptors()
                if not self.connections.evict():
                    self.gateway.free_descriptors()
                time.sleep(0.05)
            raise

    def warn_of_descriptors(self):
        """Log, once a minute, that the file descriptors run out."""
        with self._warning:
            now = time.monotonic()
            if now >= self._warned + MINUTE:
                self._warned = now
                LOG.warning("out of file descriptors: raise the limit (ulimit -n, or LimitNOFILE= of the systemd "
                            "unit) or lower --max-connections (now %d)", self.connections.most)

    def process_request(self, request, client_address):
        """Give a new connection its thread, or turn it away where it stands."""
        connection = ClientConnection(request)
        if not self.connections.admit(connection, client_address[0]):
            return self._reject_busy(connection)
        try:
            super().process_request(connection, client_address)
        except RuntimeError:  # no thread could be started
            self.connections.leave(connection)
            self._reject_busy(connection)

    def _reject_busy(self, connection):
        """Tell a connection that there is no room, without a thread, and close it when it has read that."""
        if self.tls:
            return connection.close()  # an answer would cost a handshake
        with contextlib.suppress(OSError):
            connection.sock.send(self.BUSY_RESPONSE)  # a fresh socket's buffer takes it whole
            connection.sock.shutdown(socket.SHUT_WR)
        self._rejecting.append((connection, time.monotonic() + REJECT_SECONDS))

    def service_actions(self):
        """Look after those that were turned away; socketserver calls this again and again."""
        for _ in range(len(self._rejecting)):
            connection, until = self._rejecting.popleft()
            if connection.alive() and time.monotonic() < until and len(self._rejecting) < MAX_REJECTING:
                connection.buffer = b""
                self._rejecting.append((connection, until))
            else:
                connection.close()

    def process_request_thread(self, request, client_address):
        """Serve a connection, in its own thread, until it ends; `request` is its wire."""
        try:
            if self.tls:
                request.start_tls(self.tls, Deadline(self.limits.header_timeout), server_side=True)
            self.RequestHandlerClass(request, client_address, self)
        except (OSError, Refusal):
            pass  # left, never came to speak, or was dismissed before: there was no request to answer
        except Exception:  # as socketserver has it: a connection's failure is told, and is no other's
            self.handle_error(request, client_address)
        finally:
            self.connections.leave(request)
            request.close()

    def shutdown_request(self, request):
        """Close a connection that could not be served; one that a signal to stop met here has a thread that does."""
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            super().shutdown_request(request)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # it left before it was served
            LOG.exception("the connection from %s failed", client_address[0])

    def stop(self, seconds):
        """Let nobody new in, and running requests finish for so many seconds."""
        self.socket.close()
        self.connections.drain(seconds)

    def server_close(self):
        """Stop listening, cut what is open, and stop what works behind the requests."""
        super().server_close()
        self.connections.drain(0)
        while self._rejecting:
            self._rejecting.popleft()[0].close()
        self.gateway.close()


def client_failure(error, late, seconds):
    """Return what becomes of an error in reading from a client: its refusal, or the news that it left."""
    if isinstance(error, Malformed):
        return Refusal(error.code, str(error))
    if is_late(error):
        return Refusal("too_slow", late.format(seconds))
    return ClientLeft(str(error))


class ClientStream:
    """The client's side of one request: its head and body in, one answer out, and how the answer ended."""

    def __init__(self, connection, peer, limits, request_id):
        self.connection, self.limits, self.request = connection, limits, None
        self.body = CloseDelimitedBody()      # until the head tells better, all that comes is of this request
        self.context = RequestContext(peer, time.monotonic())
        self.context.id = request_id
        self.extra = []             # fields that every answer carries
        self.limit_fields = tuple   # returns those that tell how much of the token's limits is left by then
        self.started = False        # bytes of an answer have gone out: it can be changed no more
        self.finished = False
        self._head, self._failures = b"", []    # the request's, and instead what went wrong with it
        self._expects = False       # the client waits for 100 Continue before it sends its body
        self._pending = b""         # a head that waits to go out with the first piece
        self._framing = ""          # "chunked", "length", "open" until the connection ends, or "none"
        self._stream_type = ""      # the answer's content type, if it is one of lines
        self._keep = False          # the connection may go on after the answer
        self._tail = b"\n\n"        # the last bytes of the answer so far

    # -- in

    def receive_head(self):
        """Wait for the request's head; `read_request` raises what went wrong."""
        try:
            self._head = self.connection.read_head(Deadline(self.limits.header_timeout))
        except (Malformed, OSError) as error:
            self._failures.append(client_failure(error, "the headers took longer than {:g} s",
                                                 self.limits.header_timeout))

    def read_request(self):
        """Parse the request's head; raise Refusal."""
        if self._failures:
            raise self._failures.pop()
        head = self._head
        try:
            parse = parse_cached_request if len(head) <= CACHED_HEAD_BYTES else parse_request
            self.request = request = parse(head)
            self._note(request)
            self.body = request_body_framing(request)
        except Malformed as error:
            raise Refusal(error.code, str(error)) from None
        self._keep = not request.closes
        if "expect" in request.fields and request.version == "1.1":
            if request.fields["expect"].lower() != "100-continue":
                raise Refusal("unknown_expectation", "only 100-continue can be expected here")
            self._expects = True
        return request

    def _note(self, request):
        given = request.fields.get("x-request-id", "")
        if given and REQUEST_ID.fullmatch(given):
            self.context.id = given
        self.context.method, self.context.path = request.method, request.redacted_path

    def read_body(self, cancel_on=None, deadline=None):
        """Return the next piece of the request's body, b"" only at its end; raise Refusal if it is not as promised."""
        if self._expects and not self.body.complete and not self.connection.buffer:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._expects = False
        try:
            return self.connection.read_piece(self.body, deadline or Deadline(BODY_SECONDS), cancel_on)
        except (Malformed, OSError) as error:
            late = "the body took longer than {:g} s" if deadline else "nothing of the body came for {:g} s"
            raise client_failure(error, late, PAGE_BODY_SECONDS if deadline else BODY_SECONDS) from None

    def read_page_body(self):
        """Return the whole body of a request for one of our own pages; raise Refusal if it is too large or too slow."""
        body, deadline = bytearray(), Deadline(PAGE_BODY_SECONDS)
        while not self.body.complete:
            body += self.read_body(deadline=deadline)
            if len(body) > PAGE_BODY_BYTES:
                raise Refusal("body_too_large", f"the body is larger than {PAGE_BODY_BYTES} bytes")
        return bytes(body)

    def read_whole_body(self):
        """Read the request's body and return it, for a with block.

        Raises Refusal if it is too large, or there is no room for it.
        """
        if self.body.complete:
            return BufferedBody(declared="content-length" in self.request.fields)
        self._bound_body(self.body.left)
        piece = self.read_body()
        if self.body.complete and len(piece) <= RECEIVE_BYTES:
            return BufferedBody(piece)
        with contextlib.ExitStack() as stack:
            body = stack.enter_context(BufferedBody(bytearray(), storage=self.limits.storage))
            body.append(piece)
            while not self.body.complete:
                body.append(self.read_body())
                self._bound_body(body.size)
            stack.pop_all()
            return body

    def _bound_body(self, size):
        if size > self.limits.max_body:
            raise Refusal("body_too_large", f"the body is larger than {self.limits.max_body} bytes (--max-body)")

    # -- out

    def start(self, status, phrase, lines, content_type, length=None):
        """Begin the answer; without a length it goes on until `write` is told that a piece is the last.

        lines: the head's own fields, as text.
        """
        request = self.request
        if status in (204, 304) or request is not None and request.method == "HEAD":
            self._framing = "none"
        elif length is not None:
            self._framing = "length"
        else:
            self._framing = "chunked" if request.version == "1.1" else "open"
        self._keep = self._keep and self.body.complete and not self.connection.last_request
        head = f"HTTP/1.1 {status} {phrase}\r\n{lines}X-Request-Id: {self.context.id}\r\n"
        if content_type.startswith(STREAM_TYPES):
            self._stream_type = content_type
            head += "X-Accel-Buffering: no\r\n"  # or nginx, before us, holds the pieces back
        for name, value in (*self.extra, *self.limit_fields()):
            head += f"{name}: {value}\r\n"
        if length is not None and status not in (204, 304):
            head += f"Content-Length: {length}\r\n"
        elif self._framing == "chunked":
            head += "Transfer-Encoding: chunked\r\n"
        if not self._keep:
            head += "Connection: close\r\n"
        self._pending = (head + "\r\n").encode("latin-1")
        self.context.status = status

    def write(self, piece, last=False):
        """Send a piece of the answer at once; the last one ends it."""
        data, self._pending = self._pending, b""
        if self._framing != "none":
            data += encode_chunk(piece, last) if self._framing == "chunked" else piece
            self._tail = (self._tail + piece[-2:])[-2:]
            self.context.bytes_sent += len(piece)
        if last:    # who has read it may ask again at once
            self.connection.token_id = None
        if data:
            self._send(data)
            self.started = True
            if self.context.first_byte_at is None:
                self.context.first_byte_at = time.monotonic()
        self.finished = last

    def flush(self):
        """Send the answer's head now, if it still waits for a piece."""
        if self._pending:
            self.write(b"")

    def answer(self, status, content_type, body, fields=()):
        """Give a whole answer of our own."""
        own = [("Date", email.utils.formatdate(usegmt=True)), *fields]
        if body:
            own += [("Content-Type", content_type), ("X-Content-Type-Options", "nosniff")]
        lines = "".join(f"{name}: {value}\r\n" for name, value in own)
        self.start(status, http.HTTPStatus(status).phrase, lines, content_type, len(body))
        self.write(body, last=True)

    def refuse(self, refusal):
        """Answer with the refusal or, if an answer has begun, end that one so that nobody takes it for whole."""
        dialect = dialect_of(self.request.path) if self.request else "ollama"
        told = json.dumps(refusal.body_for(dialect)).encode()
        try:
            if not self.started:
                return self.answer(refusal.status, "application/json", told + b"\n", refusal.fields)
            self.context.outcome = "broken"
            if self._stream_type and self._framing in ("chunked", "open"):
                self.write(self._error_line(told, dialect))
        except ClientLeft:
            self.context.outcome = "left"
        self.abort()

    def _error_line(self, told, dialect):
        """Return the line that tells of a stream's failure, after what ends the line, or the event, that is open."""
        if not self._stream_type.startswith("text/event-stream"):
            return (b"" if self._tail.endswith(b"\n") else b"\n") + told + b"\n"
        opening = b"" if self._tail == b"\n\n" else b"\n" if self._tail.endswith(b"\n") else b"\n\n"
        return opening + (b"event: error\n" if dialect == "anthropic" else b"") + b"data: " + told + b"\n\n"

    def abort(self):
        """Cut the connection short of the answer's end; with a reset where a mere end would look like that."""
        if self._framing == "open" or self.context.outcome == "left":
            self.connection.reset()
        self.connection.close()

    @property
    def reusable(self):
        """Tell whether another request may follow on the connection."""
        return self.finished and self._keep

    def drain(self):
        """Read on, within bounds, what a refused client still sends: a connection closed too soon loses the answer."""
        if self.connection.shutting_down:
            return self.connection.linger()
        deadline, left, self.connection.stalled = Deadline(DRAIN_SECONDS), DRAIN_BYTES, True
        with contextlib.suppress(OSError, Refusal):
            self.connection.sock.shutdown(socket.SHUT_WR)
            while left > 0:
                self.connection.buffer = b""
                if not self.connection.fill(deadline):
                    return
                left -= len(self.connection.buffer)

    def _send(self, data):
        try:
            self.connection.send(data, Deadline(SEND_SECONDS))
        except OSError as error:
            raise ClientLeft(str(error)) from None


class Handler(http.server.BaseHTTPRequestHandler):
    """http.server's part: one request after another on a connection; `request` is its ClientWire."""

    def setup(self):
        self.connection = self.request
        self.patience = self.server.limits.header_timeout   # for the first request; idle_timeout for those to follow

    def finish(self):
        self.connection.close_notify()

    def handle_one_request(self):
        """Wait for a request and serve it; a connection that sends nothing, or is evicted, ends without an answer."""
        self.close_connection = True
        connections = self.server.connections
        if not connections.rest(self.connection) or not (self.connection.buffer or self.connection.fill(Deadline(self.patience))):
            return
        client = ClientStream(self.connection, self.client_address[0], self.server.limits, self.server.next_id())
        client.receive_head()
        if not connections.resume(self.connection):
            return
        self.server.gateway.serve(client)
        if client.context.refusal_code == "no_descriptors":
            self.server.warn_of_descriptors()
        self.close_connection = not client.reusable
        self.patience = self.server.limits.idle_timeout
        if client.finished and not client.body.complete:
            client.drain()

# == Pipeline =================================================================

INCLUDE_USAGE = b',"stream_options":{"include_usage":true}'  # before the object's end: of equal keys the last wins


NOTHING_TO_COUNT = contextlib.nullcontext()


class Gateway:
    """Conducts each request through the stages that it is handed."""

    def __init__(self, proxies, router, authenticator, limiter, upstream, health, relay, journal, pages, count_prompt,
                 connections):
        self.health, self._connections = health, connections
        self._proxies, self._router, self._authenticator, self._limiter = proxies, router, authenticator, limiter
        self._upstream, self._relay, self._journal, self._pages = upstream, relay, journal, pages
        self._count_prompt = count_prompt

    def serve(self, client):
        """Take one request from its head to its record: it is answered once, and written down once."""
        context = client.context
        try:
            request = client.read_request()
            context.client_address = self._proxies.reported(context.client_address, request)
            client.extra += self._router.cors_fields(request)
            request, route, path = self._router.match(request)
            context.route = route.path
            if route.access == "public":
                return client.answer(*self._visit(route, PageRequest(request, path, None, b"")))
            token = self._identify(client, request, route)
            self._connections.authenticate(client.connection, token.id)
            with self._limiter.admit(route, token, context) as slot:
                if route.category == "page":
                    return client.answer(*self._page(client, request, route, path, token))
                last = self._forward(client, request, route, path, token, slot)
            client.write(last, last=True)   # only now: whoever has read it finds the limits and the upstream free again
        except Refusal as refusal:
            context.refusal_code, context.reason = refusal.code, str(refusal)
            client.refuse(refusal)
        except Failure as error:    # the client is not authenticated yet: the log alone names path and cause
            context.refusal_code, context.reason = error.code, str(error)
            client.refuse(Refusal(error.code))
        except ClientLeft as error:
            context.outcome, context.reason = "left", str(error)
            client.abort()
        except Exception:  # a fault of ours must end one request, not the connection's thread without a word
            LOG.exception("request %s met a fault of the gateway", context.id)
            client.refuse(Refusal("internal", f"the gateway failed: its log tells more under {context.id}"))
        finally:
            self._journal.write(context)

    def _identify(self, client, request, route):
        """Return the request's token, which may use the route; raise Refusal."""
        token = client.context.token = self._authenticator.identify(request, client.context.client_address, client.connection.pause)
        client.limit_fields = functools.partial(self._limiter.fields, token, client.context)
        self._router.permit(route, token, request)
        return token

    def _page(self, client, request, route, path, token):
        """Return the answer of one of our own pages; raise Refusal."""
        body = client.read_page_body() if route.method in ("POST", "PATCH") else b""
        if body:    # the token may have been revoked while it arrived
            token = self._identify(client, request, route)
        return self._visit(route, PageRequest(request, path, token, body))

    def _forward(self, client, request, route, path, token, slot):
        """Pass a request on to Ollama and its answer to the client, but for the last piece: return that."""
        def judge():    # again, whenever time has passed: the token may have been revoked or narrowed
            token = self._identify(client, request, route)
            self._router.permit_model(route, body_info, token)
            return token

        body_info, client.connection.waited = None, False
        with StreamedBody(client, judge) if route.streamed else client.read_whole_body() as body:
            if client.connection.waited:
                token = self._identify(client, request, route)
            body_info = self._router.read(route, path, request, body, token)
            client.context.model = body_info.model
            self._router.permit_model(route, body_info, token)
            if body_info.insert_at:
                body.insert(body_info.insert_at, INCLUDE_USAGE)
            token = slot.wait_turn(token, client.connection, judge)
            with self._count_prompt(client.context, body) if route.category == "inference" else NOTHING_TO_COUNT, \
                    self._upstream.open(route.method, path, request, body, client.context.id, client.connection) as response:
                return self._relay(response, client, route, body_info, token, slot.leave)

    def _visit(self, route, page_request):
        """Return a page's answer; raise Refusal."""
        try:
            return getattr(self._pages, route.handler)(page_request)
        except UsageError as error:
            raise Refusal("malformed", str(error)) from None
        except Failure as error:
            raise Refusal(error.code, str(error)) from None

    def free_descriptors(self):
        """Close the idle connections to Ollama."""
        self._upstream.close()

    def close(self):
        for stage in self._journal, self._authenticator, self.health, self._upstream:
            stage.close()

# == Routing and access =======================================================

ROUTES = (
    Route("GET", "/", "public", "page", handler="banner"),
    Route("GET", "/health", "public", "page", handler="health"),
    Route("GET", "/me", "token", "page", handler="me"),
    Route("GET", "/metrics", "admin", "page", handler="metrics"),
    Route("GET", "/docs", "public", "page", handler="docs"),
    Route("GET", "/openapi.json", "public", "page", handler="openapi"),
    Route("GET", "/admin", "public", "page", handler="admin"),
    Route("GET", "/admin/status", "admin", "page", handler="status"),
    Route("GET", "/admin/usage", "admin", "page", handler="usage"),
    Route("GET", "/admin/tokens", "admin", "page", handler="list_tokens"),
    Route("POST", "/admin/tokens", "admin", "page", handler="create_token"),
    Route("GET", "/admin/tokens/{id}", "admin", "page", handler="show_token"),
    Route("PATCH", "/admin/tokens/{id}", "admin", "page", handler="update_token"),
    Route("DELETE", "/admin/tokens/{id}", "admin", "page", handler="delete_token"),
    Route("POST", "/admin/tokens/{id}/rotate", "admin", "page", handler="rotate_token"),
    Route("GET", "/api/version", "token", "read"),
    Route("GET", "/api/status", "token", "read"),
    Route("GET", "/api/tags", "token", "read", model_list_key="models"),
    Route("GET", "/api/ps", "token", "read", model_list_key="models"),
    Route("POST", "/api/show", "token", "read", "json"),
    Route("GET", "/api/experimental/model-recommendations", "token", "read"),
    Route("GET", "/v1/models", "token", "read", model_list_key="data"),
    Route("GET", "/v1/models/{model}", "token", "read", "path"),
    Route("POST", "/api/generate", "token", "inference", "json"),
    Route("POST", "/api/chat", "token", "inference", "json"),
    Route("POST", "/api/embed", "token", "inference", "json"),
    Route("POST", "/api/embeddings", "token", "inference", "json"),
    Route("POST", "/v1/chat/completions", "token", "inference", "json"),
    Route("POST", "/v1/completions", "token", "inference", "json"),
    Route("POST", "/v1/embeddings", "token", "inference", "json"),
    Route("POST", "/v1/responses", "token", "inference", "json"),
    Route("POST", "/v1/messages", "token", "inference", "json"),
    Route("POST", "/v1/audio/transcriptions", "token", "inference", "form"),
    Route("POST", "/api/pull", "admin", "model", "json"),
    Route("POST", "/api/push", "admin", "model", "json"),
    Route("POST", "/api/create", "admin", "model", "json"),
    Route("POST", "/api/copy", "admin", "model"),
    Route("DELETE", "/api/delete", "admin", "model", "json"),
    Route("POST", "/api/blobs/{digest}", "admin", "model", streamed=True),
    Route("HEAD", "/api/blobs/{digest}", "admin", "model"),
    Route("POST", "/api/me", "admin", "account"),
    Route("POST", "/api/signout", "admin", "account"),
    Route("DELETE", "/api/user/keys/{key}", "admin", "account"),
    Route("POST", "/api/experimental/web_search", "admin", "account"),
    Route("POST", "/api/experimental/web_fetch", "admin", "account"),
)
PREFLIGHT = Route("OPTIONS", "*", "public", "page", handler="preflight")
SEGMENTS = {
    "id": "[1-9][0-9]{0,17}",
    "digest": "sha256[:-][0-9a-f]{64}",
    "key": "[A-Za-z0-9_=-]+",
    "model": "{0}(?:%2[Ff]{0})*".format("(?![.])(?:[A-Za-z0-9._:@~-]|%3[Aa])+"),
}


FOR_ADMINS = {"model": "changes models", "account": "acts as the owner's ollama.com account",
              "page": "is for whoever runs the gateway"}
USAGE_ON_REQUEST = ("/v1/chat/completions", "/v1/completions")  # in a stream, by stream_options


def served_routes(metrics_open=False, no_admin_api=False):
    """Return those of the table's routes that a gateway with these settings serves."""
    routes = [route for route in ROUTES if not (no_admin_api and route.path.startswith("/admin"))]
    return [route._replace(access="public") if route.handler == "metrics" and metrics_open else route for route in routes]


def at_base(path, base):
    """Return where clients find a path of the table."""
    return base + path[len("/api"):] if path.startswith("/api/") else path


def path_pattern(path):
    """Return a regular expression for the paths that one with segments stands for; its group is the segment."""
    return re.sub(r"\\{(\w+)\\}", lambda match: f"({SEGMENTS[match[1]]})", re.escape(path))


def inspect_body(route, path, request, body):
    """Return what a request asks for; raise Unreadable if that cannot be told."""
    if route.model_in == "path":
        return BodyInfo(urllib.parse.unquote(path.rpartition("/")[2]))
    if not route.model_in or not body.size:
        return BodyInfo()
    if route.model_in == "json":
        return body.look(inspect_json, route.path in USAGE_ON_REQUEST)
    if request.query:  # where net/http looks first for a form's fields
        raise Unreadable("there is a query beside the form")
    return body.look(inspect_form, request.fields.get("content-type", ""))


class Router:
    """Finds a request's route: what the table does not name is denied, paths are compared as sent."""

    def __init__(self, routes, base="/api", path_tokens=False, cors_origins=()):
        self._path_tokens, self._cors_origins = path_tokens, cors_origins
        self._plain = self._table(routes, (base,))
        self._behind_token = self._table(routes, (base, "/api")) if path_tokens else None

    @staticmethod
    def _table(routes, bases):
        """Return ({path: {method: route}}, [(pattern, {method: route})]) with /api at each base; our own pages win."""
        pages, ollamas = {}, {}
        for route in routes:
            for base in bases:
                methods = (pages if route.category == "page" else ollamas).setdefault(at_base(route.path, base), {})
                methods[route.method] = route
        found = {**ollamas, **pages}
        return ({path: methods for path, methods in found.items() if "{" not in path},
                [(re.compile(path_pattern(path)), methods) for path, methods in found.items() if "{" in path])

    def match(self, request):
        """Return the request, a path token moved out of its path, its route and its path upstream; raise Refusal."""
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
        if methods is None:
            raise Refusal("unknown_route")
        method = "GET" if request.method == "HEAD" and "HEAD" not in methods else request.method
        if method not in methods:
            allowed = sorted(set(methods) | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set()))
            raise Refusal("wrong_method", f"the path takes {', '.join(allowed)}", [("Allow", ", ".join(allowed))])
        route = methods[method]
        return request, route, re.sub(r"\{\w+\}", lambda _: segment, route.path) if segment else route.path

    @staticmethod
    def permit(route, token, request):
        """Refuse what only an admin token may do, or what cannot be looked into."""
        encoding = request.fields.get("content-encoding", "identity")
        if encoding.lower() != "identity" and not token.admin:
            raise Refusal("encoded", f'the body\'s Content-Encoding is "{encoding[:40]}": send it as it is')
        if route.access == "admin" and not token.admin:
            raise Refusal("forbidden", f"{route.path} {FOR_ADMINS[route.category]}: it takes an admin token")

    @staticmethod
    def read(route, path, request, body, token):
        """Return what the request asks for, as Ollama will read it; refuse what cannot be told, but to an admin."""
        try:
            return inspect_body(route, path, request, body)
        except Unreadable as error:
            if token.admin:
                return BodyInfo()
            raise Refusal(error.code, f"the model in the body cannot be determined: {error}") from None

    @staticmethod
    def permit_model(route, body_info, token):
        """Refuse a model that the token's list does not name or, without a list, that runs on the owner's account."""
        model, globs = body_info.model, token.models
        if not route.model_in or token.admin:
            return
        if globs is None and is_cloud_model(model):
            raise Refusal("forbidden", f"{model} runs on the owner's ollama.com account: it takes an admin token, "
                                       "or one whose list of models names it")
        if globs and not model:
            raise Refusal("malformed", f"the request names no model; this token may use {globs}")
        if globs and not model_allowed(model, globs):
            raise Refusal("forbidden", f'this token may not use the model "{model[:200]}", only {globs}')

    def cors_fields(self, request):
        """Return the fields that let a configured origin's page read the answer (Fetch 3.2)."""
        if not self._cors_origins:
            return []
        origin = request.fields.get("origin")
        if "*" not in self._cors_origins and origin not in self._cors_origins:
            return [("Vary", "Origin")]
        allowed = [("Access-Control-Allow-Origin", "*" if "*" in self._cors_origins else origin), ("Vary", "Origin"),
                   ("Access-Control-Expose-Headers",
                    "X-Request-Id, Retry-After, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset")]
        if request.method == "OPTIONS":
            body_info = request.fields.get("access-control-request-headers", "")
            allowed += [("Access-Control-Allow-Methods", "GET, HEAD, POST, PATCH, DELETE"),
                        ("Access-Control-Max-Age", "7200")]
            if body_info:  # any may be sent: only those that Ollama needs go further
                allowed.append(("Access-Control-Allow-Headers", body_info))
        return allowed

# == Authentication ===========================================================


def secret_of(request):
    """Return the secret that a request shows, "" for none; raise Refusal for more than one."""
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


class TrustedProxies:
    """Tells who asks, where proxies stand before the gateway."""

    def __init__(self, trusted=()):
        self._trusted = trusted

    def reported(self, peer, request):
        """Return the connection's address or, of trusted proxies, the rightmost untrusted X-Forwarded-For tells of."""
        if self._trusted and "x-forwarded-for" in request.fields:
            for entry in reversed(request.fields["x-forwarded-for"].split(",")):
                if not any(address_of(peer) in network for network in self._trusted):
                    break
                try:
                    peer = str(address_of(entry))
                except ValueError:
                    break  # whatever stands left of nonsense was not written by whom we trust
        return peer


class AuthThrottle:
    """Counts each address's failed credentials; they are forgiven one by one."""

    def __init__(self, clock=time.monotonic):
        self._clock, self._lock = clock, threading.Lock()
        self._levels = OrderedDict()    # address: (failures, when), the one that failed last at the end

    def add(self, peer):
        """Count one more failure of an address, IPv6 by /64, and return how many are not forgiven yet."""
        peer, now = network_of(peer), self._clock()
        with self._lock:
            level, when = self._levels.pop(peer, (0, now))
            level = max(level - (now - when) / LEAK_SECONDS, 0) + 1
            self._levels[peer] = min(level, MAX_FAILURES + 1), now
            while len(self._levels) > FAILING_ADDRESSES:
                self._levels.popitem(last=False)
        return level


class Authenticator:
    """Tells whose token a request shows."""

    def __init__(self, tokens, failures, clock=time.time):
        self._tokens, self._failures, self._clock = tokens, failures, clock
        self._delays = threading.BoundedSemaphore(DELAYED_AT_ONCE)

    def identify(self, request, peer, pause):
        """Return the request's token; raise Refusal if there is none that is valid now.

        A secret that is not valid counts against the peer, and may have to `pause` for its refusal; a valid one never.
        """
        secret = secret_of(request)
        token = self._tokens.find(secret) if secret else None
        if token is not None and (token.expires_at is None or self._clock() < token.expires_at):
            return token
        if secret:
            self._throttle(peer, pause)
        text = 'no valid token: send "Authorization: Bearer TOKEN" or "x-api-key: TOKEN", or ask for a new one'
        if request.path_secret is not None:  # the ollama command shows the text of a 403, and hides a 401's
            raise Refusal("forbidden", text)
        raise Refusal("unauthorized", text, [("WWW-Authenticate", "Bearer")])

    def _throttle(self, peer, pause):
        failures = self._failures.add(peer)
        if failures <= FREE_FAILURES:
            return
        if failures > MAX_FAILURES or not self._delays.acquire(blocking=False):
            raise Refusal("too_many_failures")
        try:
            pause(min(FAILED_DELAY, 0.05 * 2 ** (failures - FREE_FAILURES)))
        finally:
            self._delays.release()

    def close(self):
        self._tokens.close()

# == Limits and usage =========================================================


class LimitStatus(NamedTuple):
    """One of a token's limits, how much of it is left, and in how many seconds there will be more."""

    name: str
    limit: int
    remaining: int
    reset: int

    def refuse(self):
        """Raise the Refusal of a limit that is reached."""
        if self.name == "tokens_per_day":  # SDKs would sleep until midnight, without a word
            raise Refusal("budget_spent", f"this token's {self.limit} tokens a day are used up: try again after "
                                          "00:00 UTC", [("X-Should-Retry", "false")], self.reset)
        row = LIMIT_BY_COLUMN[self.name]
        raise Refusal(row.refusal, f"this token may have {row.phrase.format(plural(self.limit, 'request'))}: "
                                     f"try again in {self.reset} s", retry_after=self.reset)


def is_limited(token):
    return bool(token.rpm or token.max_parallel or token.tokens_per_day)


class TokenCounters:
    """A token's running requests, and when it began such within the last minute."""

    __slots__ = ("running", "recent")

    def __init__(self):
        self.running, self.recent = 0, deque()


class UsageLedger:
    """Who used what: gathered in memory, stored by the journal within a second, and asked by the limiter for budgets.

    Of a request that runs, the account has what went by so far: a killed gateway loses the last second alone. One that
    has ended is counted when the journal comes to it, behind its back; but a budget is charged before its answer ends.
    """

    def __init__(self, store, tokens, clock=time.time):
        self._store, self._tokens, self._clock = store, tokens, clock
        store.wait_at_most(STORE_SECONDS)   # while the database is locked, log lines are still to be written
        self._lock = threading.Lock()
        self._running = set()   # and those that have ended, until the journal has come to them
        self._storing = threading.Lock()
        self._pending = {}      # what is yet to be stored
        self._uses = {}
        self._spent = {}        # {(user, name): (day, tokens, when that was read)}
        self._latest = 0        # of the clock
        self._warned = False

    def start(self, context):
        """Count a request from now on."""
        with self._lock:
            self._running.add(context)

    def update(self, context):
        """Count what a request has used so far."""
        with self._lock:
            self._add_new(context)

    def finish(self, context):
        """Count a request to its end, if it began."""
        with self._lock:
            if context in self._running:
                self._running.remove(context)
                cancelled = context.failure is not None and issubclass(context.failure, ClientLeft)
                errors = not cancelled and (context.failure is not None or context.status >= 400)
                self._add_new(context, int(errors), int(cancelled))

    def _add_new(self, context, errors=0, cancelled=0):
        """Add what a request has used since it was last counted."""
        token, hour = context.token, int(self.now()) // HOUR * HOUR
        seconds = (context.released_at or time.monotonic()) - context.sent_at if context.sent_at else 0.0
        try:
            usage = context.usage
        except Exception:   # a fault in the reader of one answer must not keep requests from being counted
            LOG.exception("request %s: its tokens cannot be read", context.id)
            usage = Usage(*context.counted[3:6], context.counted[7]) if context.counted else Usage(None, None, None)
            context.usage_reader = types.SimpleNamespace(usage=usage)
        row, before = (1, errors, cancelled, *usage[:3], seconds, usage.estimated), context.counted
        context.counted = row
        if before:
            row = [n if o is None or n is None else n - o for n, o in zip(row, before)]
        self._add((hour, token.user, token.name, context.model_label, context.route), row)
        spent = self._spent.get((token.user, token.name))
        if spent and spent[0] == utc_day(hour):
            self._spent[token.user, token.name] = (spent[0], spent[1] + tokens_used(*row[3:6]), spent[2])

    def _add(self, key, row):
        old = self._pending.get(key)
        self._pending[key] = row if old is None else [o if n is None else n if o is None else o + n
                                                      for o, n in zip(old, row)]

    def running(self):
        """Return the records of the requests that run or wait, the oldest first."""
        with self._lock:
            running = [context for context in self._running if context.released_at is None]
        return sorted(running, key=lambda context: context.started_at)

    def used(self, token_ids):
        """Note that tokens are in use."""
        with self._lock:
            self._uses.update(dict.fromkeys(token_ids, int(self._clock())))

    def now(self):
        """Return Unix seconds that stand still while the clock is set back by up to a day: that refills no budget.

        A clock that goes back further is followed: it was wrong before.
        """
        now, latest = self._clock(), self._latest
        self._latest = now if now <= latest - DAY else max(now, latest)
        if self._latest < latest:
            LOG.warning("the clock went back from %s to %s: days and budgets go back with it",
                        format_instant(int(latest)), format_instant(int(now)))
        return self._latest

    def day_left(self):
        """Return how many seconds are left of the UTC day."""
        return day_start(utc_day(self.now()) + 1) - int(self._clock())

    def spent(self, token):
        """Return how many tokens of its day a token with a budget has used; raise Failure if that cannot be read.

        What other gateways on the database let it use is known a second later.
        """
        if not token.tokens_per_day:
            return 0
        now, key = self._clock(), (token.user, token.name)
        with self._lock:
            day = utc_day(self.now())
            known_day, spent, known_at = self._spent.get(key, (None, 0, 0))
            if known_day == day and (abs(now - known_at) < STORE_SECONDS or self._storing.locked()):
                return spent
        with self._storing, self._lock:     # what is not pending is in the database, and the other way round
            try:
                stored = self._tokens.spent(token, day)
            except Failure:
                if known_day != day:
                    raise
                return spent
            spent = stored + sum(tokens_used(*row[3:6]) for where, row in self._pending.items()
                                 if where[1:3] == key and utc_day(where[0]) == day)
            self._spent[key] = (day, spent, now)
            return spent

    def store(self):
        """Store what was gathered; what cannot be stored is kept for the next time."""
        with self._lock:
            for context in self._running:
                if context.model_label:
                    self._add_new(context)
            if not self._store.writable:
                today = day_start(utc_day(self.now()))  # budgets still need that
                self._pending = {key: row for key, row in self._pending.items() if key[0] >= today}
                return self._uses.clear()
        with self._storing:
            with self._lock:
                rows, self._pending = self._pending, {}
                uses, self._uses = self._uses, {}
            try:
                if rows or uses:
                    self._store.add_usage(rows, uses)
                self._warned = False
            except Failure as error:
                with self._lock:
                    for key, row in rows.items():
                        self._add(key, row)
                    self._uses = {**uses, **self._uses}
                if not self._warned:
                    LOG.warning("the account and tokens' last uses are not stored for now: %s", error)
                self._warned = True


class Ticket:
    """A request's place in the queue."""

    def __init__(self, user, patience):
        self.user, self.granted, self.wakeup = user, False, None
        self._patience = patience

    def wait(self, connection):
        """Wait for the turn and return how many seconds that took; raise Refusal, or ClientLeft."""
        if self.wakeup is None:
            return 0.0
        began = time.monotonic()
        try:
            self.wakeup.wait(Deadline(self._patience), connection)
            self.wakeup.close()   # before the upstream's descriptor is needed
        except TimeoutError:
            if not self.granted:
                raise Refusal("queue_timeout", f"the server is busy: the request waited {self._patience:g} s for its "
                                               "turn (--queue-timeout): try again later") from None
        return time.monotonic() - began


class FairQueue:
    """Lets so many requests at a time go upstream, 0 for any; the others wait, first in, first out within a user.

    The next turn is the user's whose last one was longest ago.
    """

    def __init__(self, most, max_waiting, patience):
        self._most, self._most_waiting, self._patience = most, max_waiting, patience
        self._lock = threading.Lock()
        self._waiting = {}      # {user: their places, in order}
        self._served = {}       # {user: when the last turn was}, in turns, until nobody runs or waits
        self._queue = itertools.count(1)
        self.running = 0

    @property
    def waiting(self):
        with self._lock:
            return sum(map(len, self._waiting.values()))

    def enqueue(self, user):
        """Return a new place, to be given back by `leave`; raise Refusal where too many of the user's wait."""
        place = Ticket(user, self._patience)
        with self._lock:
            if not self._most or self.running < self._most and not self._waiting:
                self._grant(place)
                return place
            line = self._waiting.get(place.user, deque())
            if len(line) >= self._most_waiting:
                raise Refusal("queue_full", f"the server is busy, and {len(line)} of your requests are waiting "
                                            "already (--max-queue): try again later")
            try:
                place.wakeup = Wakeup()
            except OSError:
                raise Refusal("no_descriptors") from None
            line.append(place)
            self._waiting[place.user] = line
            return place

    def leave(self, place):
        """Give back a place, whether its turn has come or not."""
        with self._lock:
            if place.granted:
                self.running -= 1
                self._grant_next()
            else:
                self._waiting[place.user].remove(place)
                if not self._waiting[place.user]:
                    del self._waiting[place.user]
            if not self.running and not self._waiting:
                self._served.clear()
        if place.wakeup:
            place.wakeup.close()

    def _grant(self, place):
        place.granted = True
        self.running += 1
        self._served[place.user] = next(self._queue)

    def _grant_next(self):
        """Call whose turn it is."""
        while self._waiting and self.running < self._most:
            user = min(self._waiting, key=lambda user: self._served.get(user, 0))
            place = self._waiting[user].popleft()
            if not self._waiting[user]:
                del self._waiting[user]
            self._grant(place)
            place.wakeup.set()


class Slot:
    """A request's claim on its token's limits and, from its turn on, on a place upstream: a with block.

    `leave` may end it early. Entering raises Refusal.
    """

    __slots__ = ("_limiter", "_context", "token", "began", "place", "_open")

    def __init__(self, limiter, token, context):
        self._limiter, self._context = limiter, context
        self.token = token      # the one whose counters were changed
        self.began = None       # the time at which the token's rate counts it
        self.place = None       # in the queue, and upstream
        self._open = False

    def __enter__(self):
        self._limiter.enter(self)
        self._open = self._context.counted_in = True
        return self

    def wait_turn(self, token, connection, judge):
        """Wait until the request may go upstream; return its token, which `judge` returned if it had to wait.

        Raises Refusal when it waits too long, or its limits are reached now that its body is there or its turn has come.
        """
        context = self._context
        if is_limited(token):
            self._limiter.check_again(self, token)
        self.place = self._limiter.enqueue(token, context)
        context.queue_seconds = self.place.wait(connection)
        if context.queue_seconds:
            token = judge()
            self._limiter.check_budget(token)
        context.sent_at = time.monotonic()
        return token

    def leave(self):
        self.__exit__(None, None, None)

    def __exit__(self, kind, *_):
        if self._open:
            self._open = self._context.counted_in = False
            self._context.failure = kind
            self._limiter.leave(self, self._context)


class NoSlot:
    """The Admission of a request that is not for inference: it has no limits and does not wait."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """There is nothing to give back."""

    leave = __exit__

    @staticmethod
    def wait_turn(token, *_):
        return token


NO_SLOT = NoSlot()


class Limiter:
    """Holds each token to its limits, and lets inference requests go upstream in turn."""

    def __init__(self, queue, ledger, clock=time.monotonic):
        self._queue, self._ledger, self._clock = queue, ledger, clock
        self._lock, self._counters = threading.Lock(), {}      # {token id: Standing}

    def admit(self, route, token, context):
        """Return the Admission of a request."""
        return Slot(self, token, context) if route.category == "inference" else NO_SLOT

    def enter(self, slot):
        """Count a request, before its body is read; raise Refusal if it exceeds a limit."""
        token = slot.token
        budget = self._budget(token)
        with self._lock:
            counters = self._counters.get(token.id)
            if counters is None:
                counters = self._counters[token.id] = TokenCounters()
            if is_limited(token):
                self._refuse_beyond(self._rates(token, counters) + budget)
            counters.running += 1
            if token.rpm:
                slot.began = self._clock()
                counters.recent.append(slot.began)

    def check_again(self, slot, token):
        """Raise Refusal if a request, now that its body is there, exceeds a limit of its token."""
        budget = self._budget(token)
        with self._lock:
            own = 0 if slot.began is None else 1
            self._refuse_beyond(self._rates(token, self._counters[slot.token.id], 1, own) + budget)

    def enqueue(self, token, context):
        """Return a request's place in the queue; raise Refusal if that is full."""
        place = self._queue.enqueue(token.user)
        self._ledger.start(context)
        return place

    def check_budget(self, token):
        """Raise Refusal if a token's budget is used up."""
        self._refuse_beyond(self._budget(token))

    def leave(self, slot, context):
        """Let a request go; what it used of a budget is missing there from now on. One that was refused counts not."""
        context.released_at = time.monotonic()
        if slot.place is not None:
            if context.token.tokens_per_day:
                self._ledger.update(context)
            self._queue.leave(slot.place)
        with self._lock:
            counters = self._counters[slot.token.id]
            counters.running -= 1
            if slot.place is None and slot.began is not None:
                with contextlib.suppress(ValueError):   # a minute has passed
                    counters.recent.remove(slot.began)
            if not counters.running and not counters.recent:
                del self._counters[slot.token.id]

    @staticmethod
    def _refuse_beyond(statuses):
        for status in statuses:
            if not status.remaining:
                status.refuse()

    def _budget(self, token):
        if not token.tokens_per_day:
            return []
        try:
            spent = self._ledger.spent(token)
        except Failure as error:
            raise Refusal("uncounted", f"what this token used today cannot be read: {error}") from None
        return [LimitStatus("tokens_per_day", token.tokens_per_day, max(token.tokens_per_day - spent, 0),
                            self._ledger.day_left())]

    def _rates(self, token, counters, own_running=0, own_recent=0):
        found = []
        if token.rpm:
            recent, now = counters.recent, self._clock()
            while recent and recent[0] <= now - MINUTE:
                recent.popleft()
            over = max(len(recent) - token.rpm, 0)  # which one has to be a minute old, that another may follow
            reset = recent[over] + MINUTE - now if recent else 0
            left = max(token.rpm - len(recent) + own_recent, 0)
            found.append(LimitStatus("rpm", token.rpm, left, math.ceil(reset)))
        if token.max_parallel:
            left = max(token.max_parallel - counters.running + own_running, 0)
            found.append(LimitStatus("max_parallel", token.max_parallel, left, RETRY_SECONDS))
        return found

    def statuses(self, token, own=0):
        """Return what is left of each of a token's limits, but for what of its own the asking request holds."""
        if not is_limited(token):
            return []
        budget = self._budget(token)
        with self._lock:
            return self._rates(token, self._counters.get(token.id, TokenCounters()), own) + budget

    def fields(self, token, context):
        """Return the fields that tell of the limit nearest exhaustion, none for a token without limits.

        A client that has read the answer finds it so: what the request itself holds is free again by then.
        """
        if not is_limited(token):
            return ()
        try:
            statuses = self.statuses(token, context.counted_in)
        except Refusal:     # what cannot be read now is no reason not to answer
            return ()
        nearest = min(statuses, key=lambda status: status.remaining / status.limit)
        return (("RateLimit-Limit", nearest.limit), ("RateLimit-Remaining", nearest.remaining),
                ("RateLimit-Reset", nearest.reset))

# == Backends =================================================================


class EarlyResponse(Exception):
    """The upstream answers, or hangs up, before it has the whole request."""


class UpstreamConnection(Connection):
    """A connection to the upstream; watched, it tells when the upstream will not wait for more."""

    reused = False
    idle_since = 0      # by the pool's clock

    def __init__(self, sock):
        super().__init__(sock)
        self._poll = new_poll()
        self._poll.register(self.descriptor, READABLE)

    def is_idle(self):
        """Tell whether nothing came since the last answer: no end, and no bytes, which would be of nobody's answer."""
        if self._poll.poll(0) or isinstance(self.sock, ssl.SSLSocket):  # poll costs a third of a read in vain
            return self.alive() and not self.buffer
        return True

    def on_readable(self):
        """Raise EarlyResponse; a word of TLS's own, a session ticket say, is none."""
        if not self.alive() or self.buffer:
            raise EarlyResponse

    def until_writable(self, deadline, cancel_on):
        """Wait to send more of a request, and meanwhile for an answer that does not wait for it."""
        self.wait(WRITABLE | READABLE, deadline, cancel_on)
        self.on_readable()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind:
            self.close()


class UpstreamRequest(urllib.request.Request):
    """A request as it goes up. Its URL is known in parts, so what Request would parse from it is told instead."""

    full_url = data = fragment = None  # in place of Request's properties

    def __init__(self, base, method, path, fields, body, cancel_on=None, deadline=None):
        """deadline: one for all of it, from the look-up to the last byte; None: the timeouts of the settings."""
        self.type, self.host, self.full_url = base.scheme, base.netloc, path
        self.method, self.headers, self.body, self.cancel_on, self.deadline = method, {}, body, cancel_on, deadline
        self.head = (f"{method} {base.path}{path} HTTP/1.1\r\nHost: {base.netloc}\r\nAccept-Encoding: identity\r\n"
                     f"{fields}{body.framing}\r\n").encode("latin-1")


def port_of(url):
    return url.port or (443 if url.scheme == "https" else 80)


class Resolver:
    """Looks up a host's addresses in a thread, because getaddrinfo cannot be cancelled and knows no time limit.

    One look-up runs at a time, however many requests wait for it: a resolver that hangs holds one thread.
    """

    def __init__(self, host, port):
        self._host, self._port = host, port
        self._lock, self._waiting, self._running = threading.Lock(), set(), False
        self._found = None      # by the last look-up: addresses, or an exception

    def addresses(self, deadline, cancel_on):
        """Return getaddrinfo's addresses; raise ConnectionError, or what the watched wire raises."""
        if ":" in self._host or self._host.replace(".", "").isdigit():
            return look_up(self._host, self._port)  # an IP address, for which nobody is asked
        with contextlib.closing(Wakeup()) as wakeup:
            with self._lock:
                if not self._running:
                    threading.Thread(target=self._run, name="resolver", daemon=True).start()
                    self._running = True
                self._waiting.add(wakeup)
            try:
                wakeup.wait(deadline, cancel_on)
            except TimeoutError as error:
                raise ConnectionError(f"the look-up of {self._host} has not ended: {error}") from None
            finally:
                with self._lock:
                    self._waiting.discard(wakeup)
        found = self._found
        if isinstance(found, Exception):
            raise ConnectionError(f"the look-up of {self._host} failed: {getattr(found, 'strerror', None) or found}")
        return found

    def _run(self):
        try:
            found = look_up(self._host, self._port)
        except Exception as error:  # whatever it is, it is raised again in the threads that wait
            found = error
        with self._lock:
            self._found, self._running = found, False
            while self._waiting:
                self._waiting.pop().set()


class Pool:
    """Connections to the upstream, kept alive, the last used first; `clock` is for intervals."""

    def __init__(self, url, connect_timeout, tls=None, clock=time.monotonic):
        self._host, self._resolver = url.hostname, Resolver(url.hostname, port_of(url))
        self._tls = (tls or ssl.create_default_context()) if url.scheme == "https" else None
        self._connect_timeout, self._clock = connect_timeout, clock
        self._idle = deque()

    def lease(self, exchange, fresh=False):
        """Return a live connection, a kept one unless it must be fresh; raise OSError if there is none to be had.

        A kept one that died idle is found out here, or by who uses it.
        """
        self._close_old()
        while self._idle and not fresh:
            with contextlib.suppress(IndexError):
                connection = self._idle.pop()
                if connection.is_idle():
                    connection.reused = True
                    return connection
                connection.close()
        return self._connect(exchange)

    def _close_old(self):
        """Close the connections that were idle for too long: the oldest are at the left."""
        latest = self._clock() - IDLE_SECONDS
        try:
            while self._idle[0].idle_since < latest:
                self._idle.popleft().close()
        except IndexError:  # none is left; other threads take some, too
            pass

    def _connect(self, exchange):
        """Return a new connection to the first address that takes one; each has an equal share of the time left."""
        deadline = Deadline(self._connect_timeout, "--connect-timeout")
        if exchange.deadline and exchange.deadline.left() < self._connect_timeout:
            deadline = exchange.deadline
        trouble = OSError("its name has no address")
        found = self._resolver.addresses(deadline, exchange.cancel_on)
        for number, (family, kind, protocol, _, address) in enumerate(found):
            try:
                with UpstreamConnection(socket.socket(family, kind, protocol)) as connection:
                    return self._establish(connection, address, deadline.share(len(found) - number), exchange.cancel_on)
            except OSError as error:
                if error.errno in OUT_OF_DESCRIPTORS:
                    raise
                trouble = error
        raise ConnectionError(trouble.strerror or str(trouble))

    def _establish(self, connection, address, deadline, cancel_on):
        try:
            connection.sock.connect(address)
        except BlockingIOError:
            connection.wait(WRITABLE, deadline, cancel_on)
            error = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error)) from None
        if self._tls:
            connection.start_tls(self._tls, deadline, cancel_on, server_hostname=self._host)
        return connection

    def release(self, connection):
        connection.idle_since = self._clock()
        if len(self._idle) < POOL_SIZE:
            self._idle.append(connection)
        else:
            connection.close()

    def clear(self):
        while self._idle:
            with contextlib.suppress(IndexError):
                self._idle.pop().close()


class Response:
    """The upstream's answer: its head at once, its body piece by piece; leaving its with block frees the connection."""

    def __init__(self, head, exchange, connection, pool, stall_timeout):
        parse = parse_cached_response_head if len(head) <= CACHED_HEAD_BYTES else parse_response_head
        self.head = head = parse(head)
        self.status, self.length, self.reusable = head.status, head.length, head.keeps
        if exchange.method == "HEAD" or head.status in (204, 304):  # RFC 9112 6.3
            self._body = LengthBody(0)
        elif head.chunked:
            self._body = ChunkedBody()
        else:
            self._body = CloseDelimitedBody() if head.length is None else LengthBody(head.length)
        self._wire, self._pool, self._exchange = connection, pool, exchange
        self._stall_timeout = stall_timeout

    def field(self, name):
        """Return the value of a field, by its name in lower case, "" if there is none."""
        return self.head.fields.get(name, "")

    @property
    def complete(self):
        return self._body.complete

    @property
    def waiting(self):
        """Tell whether `read` may have to wait."""
        return not self._wire.buffer and not self._body.complete

    def read(self):
        """Return the body's next piece as soon as it is there, b"" only at its end; raise Refusal if it breaks off."""
        deadline = self._exchange.deadline or Deadline(self._stall_timeout, "--stall-timeout")
        try:
            return self._wire.read_piece(self._body, deadline, self._exchange.cancel_on)
        except (OSError, Malformed) as error:
            raise Refusal("upstream_failed", f"Ollama broke off its answer: {error}") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._body.complete and self.reusable and not self._wire.buffer:  # surplus bytes: nobody knows of what
            self._pool.release(self._wire)
        else:
            self._wire.close()


class PooledHandler(urllib.request.BaseHandler):
    """What urllib's opener asks to open a URL: pooled connections below, no redirects and no proxies above."""

    def __init__(self, pool, stall_timeout):
        self._pool, self._stall_timeout = pool, stall_timeout

    def default_open(self, exchange):
        """Send the exchange and return the Reply; its timeout is for the answer's head.

        A kept connection may die as we use it: when not a byte of an answer came, and the body can be sent again, it
        is, once, on a new connection; all other kept ones are as old, and are dropped.
        """
        connection = self._pool.lease(exchange, fresh=not exchange.body.replayable)
        try:
            return self._exchange(connection, exchange)
        except OSError as error:
            if is_late(error) or not connection.reused or connection.buffer:
                raise
        self._pool.clear()
        return self._exchange(self._pool.lease(exchange, fresh=True), exchange)

    def _exchange(self, connection, exchange):
        with connection:
            whole = self._send(connection, exchange)
            deadline = exchange.deadline or Deadline(exchange.timeout, "--first-byte-timeout")
            while True:
                head = connection.read_head(deadline, exchange.cancel_on)
                connection.reused = False  # it has proved to be alive: what fails from here on is not tried again
                response = Response(head, exchange, connection, self._pool, self._stall_timeout)
                if response.status >= 200:
                    response.reusable = response.reusable and whole
                    return response
                if not whole:
                    raise Malformed("it interrupted the request with an interim answer")

    def _send(self, connection, exchange):
        """Send head and body; return whether all of it went: an upstream may answer, and stop reading, before."""
        head = exchange.head
        try:
            for piece in exchange.body.pieces(connection):
                connection.send(head + piece, Deadline(self._stall_timeout, "--stall-timeout"), exchange.cancel_on)
                head = b""
            if head:
                connection.send(head, Deadline(self._stall_timeout, "--stall-timeout"), exchange.cancel_on)
            return True
        except TimeoutError:
            raise
        except (EarlyResponse, OSError):
            return False


class Upstream:
    """Ollama, as the gateway sees it; `tls` is an SSLContext that trusts others than the system does."""

    def __init__(self, url, connect_timeout, first_byte_timeout, stall_timeout, tls=None):
        self._url, self._connect_timeout, self._first_byte_timeout = url, connect_timeout, first_byte_timeout
        self._pool = Pool(url, connect_timeout, tls)
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(PooledHandler(self._pool, stall_timeout))

    def open(self, method, path, request, body, request_id, cancel_on):
        """Pass a request on and return the Reply; raise Refusal if none comes. Leaving, the watched client ends it."""
        fields = f"X-Request-Id: {request_id}\r\n{request.forwarded}"
        return self._send(UpstreamRequest(self._url, method, path + request.query, fields, body, cancel_on))

    def _send(self, exchange):
        try:
            return self._opener.open(exchange, timeout=self._first_byte_timeout)
        except Malformed as error:
            raise Refusal("upstream_failed", f"Ollama does not talk HTTP: {error}") from None
        except OSError as error:
            if is_out_of_descriptors(error):
                raise Refusal("no_descriptors") from None
            if is_late(error):
                raise Refusal("upstream_silent", f"Ollama did not answer: {error}") from None
            raise Refusal("upstream_failed", f"Ollama cannot be reached: {error}") from None

    def probe(self, path, fields="", cancel_on=None, deadline=None):
        """Return the status and the JSON object, None for none, of the answer to GET path; raise Refusal.

        fields: of the request's head, as text; deadline: for all of it, or the time to connect and PROBE_SECONDS more.
        """
        data = bytearray()
        deadline = deadline or Deadline(self._connect_timeout + PROBE_SECONDS)
        with self._send(UpstreamRequest(self._url, "GET", path, fields, NO_BODY, cancel_on, deadline)) as response:
            while not response.complete and len(data) < PROBE_BYTES:
                data += response.read()
        try:
            answer = json.loads(bytes(data))
        except (ValueError, RecursionError):
            answer = None
        return response.status, answer if isinstance(answer, dict) else None

    def post(self, path, fields, data):
        """Return the Reply to bytes; raise Refusal."""
        return self._send(UpstreamRequest(self._url, "POST", path, fields, BufferedBody(data)))

    def close(self):
        self._pool.clear()


class Stopped(Exception):
    """The health probe has to end."""


class StopSignal(Wakeup):
    """Ends a wait that watches it by Stopped, as soon as it rings."""

    @property
    def descriptor(self):
        return self._read_end.fileno()

    def watched_events(self):
        return READABLE

    def on_readable(self):
        raise Stopped


class HealthProbe:
    """Knows whether Ollama is up and which models it has, from a thread that requests this every few seconds.

    Before the first answers, Ollama counts as down.
    """

    def __init__(self, upstream):
        self.up, self.version, self.models, self.loaded = False, None, [], []
        self._upstream, self._stop, self._thread = upstream, None, None

    def start(self, on_first=lambda: None):
        """Start the thread; it calls on_first after the first answers, or after PROBE_SECONDS without them."""
        self._stop = StopSignal()
        self._thread = threading.Thread(target=self._run, args=(on_first,), name="health", daemon=True)
        self._thread.start()

    def _run(self, on_first):
        with contextlib.closing(self._stop), contextlib.suppress(Stopped):
            for number in itertools.count():
                try:
                    self._probe()
                    if not number:
                        on_first()
                except Stopped:
                    raise
                except Exception:  # a fault of ours must not end the probing
                    LOG.exception("the health probe failed")
                with contextlib.suppress(TimeoutError):
                    return self._stop.wait(Deadline(HEALTH_SECONDS), None)

    def _probe(self):
        deadline = Deadline(PROBE_SECONDS)
        version, tags, ps = (self._get(path, deadline) for path in ("/api/version", "/api/tags", "/api/ps"))
        self.up, self.version = bool(version), version.get("version")
        self.models, self.loaded = (found if isinstance(found, list) else []
                                    for found in (tags.get("models"), ps.get("models")))

    def _get(self, path, deadline):
        """Return the JSON object that Ollama answers to GET path, {} for none."""
        try:
            status, answer = self._upstream.probe(path, cancel_on=self._stop, deadline=deadline)
        except (Refusal, RuntimeError):     # or no thread could be started for the look-up
            return {}
        return answer or {} if status == 200 else {}

    def close(self):
        if self._thread:
            with contextlib.suppress(OSError):      # the thread has ended
                self._stop.set()
            self._thread.join(ABORT_SECONDS)        # it may hang in on_first, if nobody reads what that prints

# == Relay ====================================================================


class UsageReader:
    """Looks at an answer that passes by for the tokens it cost."""

    reported = None     # the Usage that Ollama reports
    ended = False       # the last line that matters was seen
    alters = False      # the client gets other bytes than Ollama sent
    held = b""          # what the client is still to get, should no more come

    @property
    def usage(self):
        """Return the Usage so far."""
        return self.reported or Usage(None, None, None)

    def feed(self, piece, last):
        """Take a piece and return what the client gets of it."""
        return piece


TOKEN_COUNTS = (("prompt_eval_count", "eval_count"), ("prompt_tokens", "completion_tokens"),
                ("input_tokens", "output_tokens"))  # as Ollama, OpenAI and Anthropic call them
COUNT = re.compile(rb'"(\w+_(?:count|tokens))"\s*:\s*(\d{1,10})(?![\d.eE])')


# How /api/chat, generate and embed end today; read so, the counts cost 1 us instead of 10, a twentieth of the answer.
USUAL_END = re.compile(rb'"total_duration":\d+,"load_duration":\d+,"prompt_eval_count":(\d{1,9})'
                       rb'(?:,"prompt_eval_duration":\d+,"eval_count":(\d{1,9}),"eval_duration":\d+)?\}\s*\Z')


def counts_at_end(data):
    """Return the token counts that an answer, or a line of one, ends with; {} if it ends otherwise.

    Ollama writes them last. No text has their keys, for its quotes are escaped; if they are those of a nested object,
    more brackets follow.
    """
    at = max(data.rfind(b'"total_duration"', -ENDING_BYTES), data.rfind(b'"usage"', -ENDING_BYTES))
    end = data[at:] if at >= 0 else b""
    if b"[" in end or end.count(b"}") - end.count(b"{") != 1:
        return {}
    return {key.decode(): int(number) for key, number in COUNT.findall(end)}


def decoded_answer(data, whole=True):
    """Return the members of an answer, or of a line of one, or only the token counts; {} for neither.

    whole: data has no gap.
    """
    members = counts_at_end(data)
    if members or not whole or len(data) > WHOLE_BYTES:
        return members or {key.decode(): int(number) for key, number in COUNT.findall(data)}
    try:
        members = json.loads(data.decode())     # twice as fast as of bytes
    except (ValueError, RecursionError):
        return {}
    return members if isinstance(members, dict) else {}


def whole_tokens(value):
    """Return a reported number of tokens, within bounds; 0 for what is not one."""
    return min(max(value, 0), MAX_TOKENS) if isinstance(value, int) else 0


def reported_usage(answer):
    """Return the Usage that a decoded answer reports, in any dialect; None if it has none, or is not the last line.

    A missing count is 0. The prompt includes its cached tokens, as in Ollama's openai/openai.go and responses.go; of
    Anthropic's input_tokens they are no part (UsageFromMetrics in anthropic/anthropic.go), so they are added.
    """
    if answer.get("done") is False:
        return None
    response = answer.get("response")       # of an event of /v1/responses
    answer = response if isinstance(response, dict) else answer
    usage = answer.get("usage")
    counts = usage if isinstance(usage, dict) else answer
    for names in TOKEN_COUNTS:
        if names[0] in counts or names[1] in counts:
            break
    else:
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


class JsonUsageReader(UsageReader):
    """Reads the tokens in an answer that is one JSON object; of a large one its beginning and its end are kept."""

    def __init__(self):
        self._beginning = self._end = b""
        self._unread, self._reported = False, None

    @property
    def reported(self):
        """Return the Usage; it is read when it is first needed, mostly in the background."""
        if self._unread:
            self._unread, data = False, self._beginning + self._end
            usual = USUAL_END.search(data, max(len(data) - ENDING_BYTES, 0))
            self._reported = Usage(int(usual[1]), None, int(usual[2] or 0)) if usual else reported_usage(
                decoded_answer(data, not self._end))
        return self._reported

    def feed(self, piece, last):
        if len(self._beginning) < WHOLE_BYTES:
            self._beginning += piece
        else:
            self._end = (self._end + piece)[-ENDING_BYTES:]
        self._unread = last
        return piece


class StreamUsageReader(UsageReader):
    """Reads the tokens in a stream of lines: where none reports them, the pieces that went by count.

    marks: what a line has in it that may report them, what each piece has, and how the last line may begin, if that is
    another one. White space may be anywhere. No text has the quoted ones, for its quotes are escaped.
    """

    def __init__(self, markers):
        self._marker, self._piece_marker, *self._final_lines = markers
        self._line = b""        # one that has not ended yet
        self._pieces = 0
        self._recent = deque(maxlen=8)      # whole lines

    @property
    def usage(self):
        usage = self.reported or Usage()
        return usage if usage.completion else usage._replace(completion=self._pieces)

    def feed(self, piece, last):
        data = self._line + piece if self._line else piece
        end = len(data) if last else data.rfind(b"\n") + 1 or data.rfind(b"\r") + 1
        self.scan(data[:end])
        self._line = data[end:] if len(data) - end <= LINE_LIMIT else b""
        if last:
            self.finish()
        return piece

    def scan(self, lines):
        """Count the pieces in whole lines, and read the tokens in the line that reports them."""
        self._pieces += lines.count(self._piece_marker)
        if lines:
            self._recent.append(lines)
        if self._marker in lines:
            for line in lines.splitlines():
                if self._marker in line and b'"choices":[{' not in line:   # there /v1/completions has zeros
                    self.read(line)
        for start in self._final_lines:
            if lines.startswith(start) or b"\n" + start in lines:
                self.ended = True

    def finish(self):
        """Read the last lines again if the tokens have not been found: JSON may spell a key with escapes."""
        for line in b"".join(self._recent).splitlines() if self.reported is None else ():
            self.read(line)

    def read(self, line):
        """Read the tokens that a line reports."""
        answer = decoded_answer(line[max(line.find(b"{"), 0):])
        usage = reported_usage(answer)
        if usage:
            self.reported = usage
            self.ended = self.ended or answer.get("done", b'"done":true' in line) is True


class UsageStripper(StreamUsageReader):
    """Takes the usage out again that a stream of events reports only because the gateway asked for it."""

    alters = True
    _event = b""        # one that has not ended yet
    END = re.compile(rb"(\n\r?\n|\r\r)")  # of an event
    USAGE = re.compile(rb',\s*"usage"\s*:\s*(?:null|\{(?:[^{}]|\{[^{}]*\})*\})(?=\s*\}\s*\Z)')
    NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')

    def feed(self, piece, last):
        data = self._event + piece
        end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\n\r\n") + 3, data.rfind(b"\r\r") + 2)
        end = len(data) if last or len(data) > LINE_LIMIT else end if end > 2 else 0    # 2: not found
        events, self._event = data[:end], data[end:]
        self.scan(events)
        if last:
            self.finish()
        if b'"usage"' not in events:
            return events
        parts = self.END.split(events)      # of each event: what it says, how it ends
        return b"".join(map(self._without_usage, parts[::2], parts[1::2] + [b""]))

    @property
    def held(self):
        return re.split(rb',\s*"usage"', self._event)[0]

    def _without_usage(self, event, end):
        usage = self.USAGE.search(event)
        if usage and self.NO_CHOICES.search(event):     # the extra event
            return b""
        return event[:usage.start()] + event[usage.end():] + end if usage else event + end


STREAM_MARKERS = {    # by content type and path, where that matters
    "application/x-ndjson": (b"true", b"false"),    # the values of "done"
    "text/event-stream": (b'"prompt_tokens"', b'"choices"', b"data: [DONE]"),
    "/v1/messages": (b'"input_tokens"', b'"content_block_delta"', b"event: message_stop"),
    "/v1/responses": (b'"input_tokens"', b'.delta"', b"event: response.completed", b"event: response.incomplete",
                      b"event: response.failed")}
REPORTS_NO_USAGE = ("/api/embeddings", "/v1/audio/transcriptions")


def usage_reader_for(response, route, body_info):
    """Return what is to look at an answer; None if it can have cost nothing."""
    kind = response.head.kind
    if route.category != "inference" or not 200 <= response.status < 300:
        return None
    if route.path in REPORTS_NO_USAGE or kind not in STREAM_MARKERS and kind != "application/json":
        return UsageReader()
    if kind == "application/json":
        return JsonUsageReader()
    markers = STREAM_MARKERS.get(route.path, STREAM_MARKERS[kind])
    return UsageStripper(markers) if body_info.insert_at and kind == "text/event-stream" else StreamUsageReader(markers)


class TokenRatio:
    """Estimates tokens by the bytes of a text, by a ratio learnt for each model from what Ollama counts.

    A moving average: with each new prompt, earlier ones weigh a tenth less.
    """

    BEFORE = (400.0, 100.0)     # bytes and tokens; 4 bytes a token until a model's own are known

    def __init__(self):
        self._lock, self._sums = threading.Lock(), {}   # {model: (bytes, tokens)}, the one learnt longest ago first

    def learn(self, model, size, tokens):
        """Take the size and the count of a prompt."""
        with self._lock:
            sizes, counts = self._sums.pop(model, self.BEFORE)
            self._sums[model] = sizes * 0.9 + size, counts * 0.9 + tokens
            if len(self._sums) > MODEL_CACHE_SIZE:
                del self._sums[next(iter(self._sums))]

    def tokens(self, model, size):
        """Return how many tokens a model's prompt of this size probably has."""
        sizes, counts = self._sums.get(model, self.BEFORE)
        return round(size / min(max(sizes / counts, 1), 8))


class PromptCount:
    """A with block around a request's time upstream, after which its prompt has a count, Ollama's or an estimate."""

    __slots__ = ("_ratio", "_context", "_body")

    def __init__(self, ratio, context, body):
        self._ratio, self._context, self._body = ratio, context, body

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        usage_reader, token, body = self._context.usage_reader, self._context.token, self._body
        if self._context.route in REPORTS_NO_USAGE:
            return
        if kind is None and not token.tokens_per_day and isinstance(usage_reader, JsonUsageReader):
            return  # whole, and no budget depends on it: it is read in the background
        with contextlib.suppress(Refusal):      # a disk that fails to give the body back
            if usage_reader and usage_reader.reported:
                if usage_reader.reported.prompt and token.tokens_per_day and body.size <= LEARNING_BYTES:
                    self._learn(body.look(prompt_text_bytes), usage_reader.reported.prompt)
            elif usage_reader or kind and issubclass(kind, ClientLeft):      # else Ollama did not take the request
                self._context.estimate = self._ratio.tokens(self._model, body.look(prompt_text_bytes))

    @property
    def _model(self):
        return normalize_model(self._context.model)

    def _learn(self, size, tokens):
        if size * 2 > self._body.size:      # images are tokens without text
            self._ratio.learn(self._model, size, tokens)


def filter_models(response, key, globs):
    """Read a list of models and return it as bytes, those alone that a token's globs name; raise Refusal."""
    data = bytearray()
    while not response.complete:
        data += response.read()
        if len(data) > LIST_BYTES:
            raise Refusal("upstream_failed", f"Ollama's list of models is larger than {LIST_BYTES} bytes")
    if not 200 <= response.status < 300:
        return bytes(data)
    name = "id" if key == "data" else "model"
    try:
        whole = json.loads(bytes(data))
        whole[key] = [model for model in whole[key] or () if model_allowed(model[name], globs)]
        return json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # or of another shape
        raise Refusal("upstream_failed", "Ollama's list of models cannot be read") from None


def relay(response, client, route, body_info, token, leave):
    """Pass the answer on, each piece when it comes, but for the last one: return that.

    While the client does not read, nothing is read for it. A client may ask again as soon as it has seen a stream's
    last line, and not wait for the body's end: before that line goes out, the request has to `leave` its place.
    """
    context, lines = client.context, response.head.lines
    if response.status == 503 and not response.field("retry-after"):  # Ollama's queue is full
        lines += f"Retry-After: {RETRY_SECONDS}\r\n"
    if route.model_list_key and token.models:
        listed = filter_models(response, route.model_list_key, token.models)
        client.start(response.status, response.head.phrase, lines, response.field("content-type"), len(listed))
        return listed
    if route.category == "inference" and 200 <= response.status < 300:
        context.model_label = normalize_model(body_info.model)
    usage_reader = context.usage_reader = usage_reader_for(response, route, body_info)
    client.start(response.status, response.head.phrase, lines, response.field("content-type"),
                 None if usage_reader and usage_reader.alters else response.length)
    while True:
        if response.waiting:
            client.flush()
        try:
            piece = response.read()
        except Refusal:
            if usage_reader and usage_reader.held:
                client.write(usage_reader.held)
            raise
        if usage_reader:
            piece = usage_reader.feed(piece, response.complete)
            if usage_reader.ended:
                leave()
        if response.complete:
            return piece
        client.write(piece)

# == Logging and metrics ======================================================

PLAIN = re.compile(r"[!#-<>-\[\]-~]+")


@functools.lru_cache(MODEL_CACHE_SIZE)   # without it a small answer takes 6 % more CPU: the same values come again and again
def log_value(value):
    """Return a value for a log line: as it is if it is plain, else quoted, control characters escaped."""
    text = "-" if value in (None, "") else str(value)
    return text if PLAIN.fullmatch(text) else json.dumps(text)


def log_line(context):
    """Return what there is to say of a finished request: never a secret, never a prompt."""
    first = "-" if context.first_byte_at is None else f"{context.first_byte_at - context.started_at:.3f}"
    token = "-" if context.token is None else log_value(f"{context.token.user}/{context.token.name}")
    line = (f"id={context.id} peer={context.client_address} token={token} method={context.method or '-'} "
            f"path={log_value(context.path)} model={log_value(context.model)} status={context.status or '-'} "
            f"bytes={context.bytes_sent} first={first} total={context.ended_at - context.started_at:.3f}")
    if context.sent_at:
        usage = context.usage
        prompt, completion = ("-" if tokens is None else tokens for tokens in (usage.prompt, usage.completion))
        line += f" queued={context.queue_seconds:.3f} prompt={prompt} completion={completion}"
        line += f" cached={usage.cached}" if usage.cached else ""
        line += f" estimated={usage.estimated}" if usage.estimated else ""
    if context.outcome:
        line += f" outcome={context.outcome}"
    return line + f" why={log_value(context.reason)}" if context.reason else line


def write_all(descriptor, data):
    """Write bytes without a lock of Python's: the exit would wait for one that a blocked write holds."""
    while data:
        data = data[os.write(descriptor, data):]


class LogFile:
    """A file for log lines; at LOG_FILE_BYTES it is renamed to FILE.1, FILE.1 to FILE.2, and so on."""

    def __init__(self, path):
        self._names = [path, *(f"{path}.{number}" for number in range(1, LOG_FILES + 1))]
        self._reopened = deque()    # descriptors to use from the next write on
        self._descriptor = self._open()

    def _open(self):
        return os.open(self._names[0], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def close(self):
        os.close(self._descriptor)
        self._descriptor = None     # the system gives the number to another file

    def reopen(self):
        """Open the file of that name again, for another program has renamed the old one; raise OSError."""
        self._reopened.append(self._open())

    def write(self, data):
        """Append bytes; raise OSError."""
        while self._reopened:
            if self._descriptor is not None:
                self.close()
            self._descriptor = self._reopened.popleft()
        size = 0 if self._descriptor is None else os.fstat(self._descriptor).st_size
        if size and size + len(data) > LOG_FILE_BYTES:
            self.close()
            for old, new in zip(self._names[-2::-1], self._names[::-1]):
                with contextlib.suppress(OSError):
                    os.replace(old, new)
        if self._descriptor is None:
            self._descriptor = self._open()
        write_all(self._descriptor, data)


class LogWriter(logging.Handler):
    """Writes log lines in the background: a log that blocks or fails delays nobody, and not the exit for long.

    LOG_QUEUE characters may wait; lines beyond are dropped, counted, and reported when writing succeeds again.
    """

    def __init__(self, name, write, level):
        super().__init__(level)
        self.dropped = 0                        # lines, since the start
        self.name, self._write = name, write    # write takes bytes and raises OSError
        self._queue = queue.SimpleQueue()       # a signal handler that logs may interrupt its put
        self._queued = self._written = 0        # characters, since the start
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def format(self, record):
        """Return a record's lines, each with the time in UTC and the level before it."""
        seconds, fraction = divmod(record.created, 1)
        before = f"{format_instant(seconds)[:19]}.{int(fraction * 1000):03d}Z {record.levelname} "
        return before + super().format(record).replace("\n", "\n" + before) + "\n"

    def emit(self, record):
        lines = self.format(record)
        if self._queued - self._written < LOG_QUEUE:
            self._queued += len(lines)
            self._queue.put(lines)
        else:
            self.dropped += lines.count("\n")
            if self._queue.empty():
                self._queue.put("")     # wakes the thread to report this

    def _run(self):
        reported, failing = 0, False
        while not (self._ending and self._queue.empty()):
            lines = self._queue.get()
            if not self._ending:
                time.sleep(LOG_SECONDS)
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
        """Write what waits, for FLUSH_SECONDS at most."""
        self._ending = True
        self._queue.put("")
        self._thread.join(FLUSH_SECONDS)


PREFIX = "ollama_gateway_"
ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def metric_lines(name, kind, text, samples):
    """Write a metric in Prometheus' text format; samples: (suffix, {label: value}, number)."""
    yield f"# HELP {PREFIX}{name} {text}"
    yield f"# TYPE {PREFIX}{name} {kind}"
    for suffix, labels, number in samples:
        told = ",".join(f'{label}="{str(value).translate(ESCAPES)}"' for label, value in labels.items())
        yield f"{PREFIX}{name}{suffix}" + (f"{{{told}}}" if told else "") + f" {number:.16g}"


COUNTERS = {
    "requests_total": ("Requests answered.", ("user", "token", "model", "route", "status")),
    "tokens_total": ("Tokens of prompts, those of them that were cached, and of completions.",
                     ("user", "token", "model", "kind")),
    "cancelled_total": ("Requests whose client left before their end.", ()),
    "rate_limited_total": ("Requests refused for a limit.", ("limit",)),
    "upstream_errors_total": ("Requests that failed because Ollama could not be reached or broke off.", ("code",)),
}
LIMIT_BY_REFUSAL = {limit.refusal: limit.column for limit in LIMITS}
HISTOGRAMS = {
    "first_byte_seconds": "Time from an inference request's head to its answer's first byte.",
    "queue_wait_seconds": "Time that an inference request waited for its turn.",
    "duration_seconds": "Time from an inference request's head to its answer's end.",
}
BUCKETS = (0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts finished requests for Prometheus; a model is named only if Ollama has it, and the series are bounded."""

    def __init__(self, gauges):
        self._gauges, self._lock = gauges, threading.Lock()     # {name: (help, what returns the number)}
        self._counts = {name: {} for name in COUNTERS}
        self._buckets = {name: {} for name in HISTOGRAMS}

    def observe(self, context):
        """Count a finished request."""
        user, name = (context.token.user, context.token.name) if context.token else ("", "")
        model, usage = context.model_label, context.usage
        with self._lock:
            self._count("requests_total", user, name, model, context.route, context.status or "none")
            for kind in "prompt", "cached", "completion":
                if getattr(usage, kind):
                    self._count("tokens_total", user, name, model, kind, by=getattr(usage, kind))
            if context.outcome == "left":
                self._count("cancelled_total")
            if context.refusal_code and REFUSALS[context.refusal_code].status == 429:
                self._count("rate_limited_total", LIMIT_BY_REFUSAL.get(context.refusal_code, "failed_credentials"))
            if context.refusal_code in ("upstream_failed", "upstream_silent"):
                self._count("upstream_errors_total", context.refusal_code)
            if context.sent_at:
                self._time("queue_wait_seconds", model, context.queue_seconds)
                self._time("duration_seconds", model, context.ended_at - context.started_at)
                if context.first_byte_at:
                    self._time("first_byte_seconds", model, context.first_byte_at - context.started_at)

    def _count(self, name, *labels, by=1):
        series = self._counts[name]
        if labels not in series and len(series) >= MAX_SERIES:
            labels = ("other",) * len(labels)
        series[labels] = series.get(labels, 0) + by

    def _time(self, name, model, seconds):
        series = self._buckets[name]
        if model not in series and len(series) >= MAX_SERIES:
            model = "other"
        counts = series.get(model)
        if counts is None:
            counts = series[model] = [0] * len(BUCKETS) + [0, 0.0]  # ..., beyond the last bucket, their sum
        counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        counts[-1] += seconds

    def lines(self):
        """Yield all there is to tell, line by line."""
        with self._lock:
            for name, (text, labels) in COUNTERS.items():
                series = self._counts[name] or ({} if labels else {(): 0})
                yield from metric_lines(name, "counter", text, [("", dict(zip(labels, values)), number)
                                                                for values, number in series.items()])
            for name, text in HISTOGRAMS.items():
                yield from metric_lines(name, "histogram", text, self._histogram(self._buckets[name]))
        for name, (text, tell) in self._gauges.items():
            yield from metric_lines(name, "gauge", text, [("", {}, tell())])
        dropped = sum(handler.dropped for handler in LOG.handlers if isinstance(handler, LogWriter))
        yield from metric_lines("log_lines_dropped_total", "counter", "Log lines dropped.", [("", {}, dropped)])

    @staticmethod
    def _histogram(series):
        for model, (*counts, total) in series.items():
            for bound, number in zip((*BUCKETS, "+Inf"), itertools.accumulate(counts)):
                yield "_bucket", {"model": model, "le": bound}, number
            yield "_sum", {"model": model}, total
            yield "_count", {"model": model}, sum(counts)


class Journal:
    """Writes down finished requests in a thread of its own: a log line each, and twice a second the account."""

    def __init__(self, ledger, metrics, log):
        self._ledger, self._metrics, self._log = ledger, metrics, log
        self._finished = deque()
        self._stirred, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def write(self, context):
        """Take a record to be written soon."""
        context.ended_at = time.monotonic()
        self._finished.append(context)
        if not self._stirred.is_set():
            self._stirred.set()

    def _run(self):
        stored = time.monotonic()
        while not self._closing.is_set():
            self._stirred.wait(STORE_SECONDS)
            self._closing.wait(GATHER_SECONDS)  # gather: a wake-up for each request would cost it more than the line
            self._stirred.clear()
            self._write_finished()
            if time.monotonic() - stored >= STORE_SECONDS:
                stored = time.monotonic()
                self._attempt(self._ledger.store)
        self._write_finished()
        self._attempt(self._ledger.store)

    @staticmethod
    def _attempt(action, *args):
        """Return what an action returns; log its failure, which must not lose other records."""
        try:
            return action(*args)
        except Exception:
            LOG.exception("the journal failed%s", "".join(f" at {arg.id}" for arg in args if isinstance(arg, RequestContext)))

    def _write_finished(self):
        contexts, lines = [self._finished.popleft() for _ in range(len(self._finished))], []
        for context in contexts:
            self._attempt(self._ledger.finish, context)
            self._attempt(self._metrics.observe, context)
            lines.append(self._attempt(log_line, context))
        self._attempt(self._ledger.used, {context.token.id for context in contexts if context.token})
        if contexts:
            self._attempt(self._log, "\n".join(filter(None, lines)))   # at once: that costs less than line by line

    def close(self):
        """Write and store what there is, and stop."""
        self._closing.set()
        self._stirred.set()
        self._thread.join()

# == OpenAPI ==================================================================


class RouteDoc(NamedTuple):
    """A route's summary, and which of SCHEMAS its request and its answer have."""

    summary: str
    request: str
    answer: str


ROUTE_DOCS = """
GET    / | health check of Ollama's clients -> text/plain
GET    /health | state of the gateway and of Ollama -> Health
GET    /me | the token's limits, what is left of them, and its usage of seven days -> Me
GET    /metrics | metrics for Prometheus -> text/plain
GET    /docs | documentation, with a console -> text/html
GET    /openapi.json | this API as an OpenAPI document -> Object
GET    /admin | admin page -> text/html
GET    /admin/status | running and queued requests, and the state of Ollama -> Status
GET    /admin/usage | usage by user, token, model or day -> Use[]
GET    /admin/tokens | list the tokens -> Token[]
POST   /admin/tokens | create a token; only this answer has its secret: NewToken -> TokenWithSecret
GET    /admin/tokens/{id} | show a token -> Token
PATCH  /admin/tokens/{id} | change a token's expiry, rights or limits; null removes a limit: TokenChanges -> Token
DELETE /admin/tokens/{id} | delete a token: it stops working at its next request -> Token
POST   /admin/tokens/{id}/rotate | give a token a new secret; only this answer has it -> TokenWithSecret
GET    /api/version | Ollama's version
GET    /api/status | Ollama's state
GET    /api/tags | list the models
GET    /api/ps | list the loaded models
POST   /api/show | show a model
GET    /api/experimental/model-recommendations | models that Ollama recommends
GET    /v1/models | list the models
GET    /v1/models/{model} | show a model
POST   /api/generate | continue a prompt
POST   /api/chat | continue a conversation
POST   /api/embed | embed texts
POST   /api/embeddings | embed a text (superseded by /api/embed)
POST   /v1/chat/completions | continue a conversation
POST   /v1/completions | continue a prompt
POST   /v1/embeddings | embed texts
POST   /v1/responses | continue a conversation (OpenAI Responses)
POST   /v1/messages | continue a conversation (Anthropic Messages)
POST   /v1/audio/transcriptions | transcribe speech
POST   /api/pull | download a model from a registry
POST   /api/push | upload a model to a registry
POST   /api/create | create a model from another one, or from files
POST   /api/copy | copy a model to a second name
DELETE /api/delete | delete a model
POST   /api/blobs/{digest} | upload a file for a model
HEAD   /api/blobs/{digest} | check whether a file exists
POST   /api/me | show the host's ollama.com account
POST   /api/signout | sign the host out of its ollama.com account
DELETE /api/user/keys/{key} | remove a key from the host's ollama.com account
POST   /api/experimental/web_search | search the web with the host's account
POST   /api/experimental/web_fetch | fetch a page with the host's account
"""
SCHEMAS = f"""
Object:
Health: status!, upstream!, version!
TokenChanges: admin: boolean, expires_at?, {", ".join(f"{column}: any" for column in LIMIT_BY_COLUMN)}
NewToken: user!, name!, *TokenChanges
named: id!: integer, user!, name!, hint!, created_at!, expires_at!?, admin!: boolean, *limits
limits: {", ".join(f"{limit.column}!?: {limit.json_type}" for limit in LIMITS)}
Token: *named, last_used_at!?, expired!: boolean
TokenWithSecret: *Token, token!
Me: *named, left!: Object, usage!: DayUse[]
used: requests!: integer, errors!: integer, cancelled!: integer, *cost, seconds!: number
cost: prompt_tokens!?: integer, cached_tokens!?: integer, completion_tokens!?: integer, estimated_tokens!: integer
DayUse: day!, *used
Use: user, name, model, day, *used
Status: version!, *gauges, requests!: Running[], upstream!: Object
gauges: in_flight_requests!: integer, queued_requests!: integer, connections!: integer
Running: user!, name!, model!?, path!, waiting!: boolean, seconds!: number
"""     # the gateway's own; members are strings by default; "!": required; "?": nullable; "*": another line's members
MEMBER = re.compile(r"(\w+)(!?)(\??)(?:: ([\w\[\]]+))?")
BODY_TYPES = {"json": "application/json", "form": "multipart/form-data"}     # by Route.names


def route_doc(route):
    """Return the RouteDoc of a route."""
    line = re.search(rf"(?m)^{route.method} +{re.escape(route.path)} +\| (.*?)(?:: (\S+))?(?: -> (\S+))?$", ROUTE_DOCS)
    return RouteDoc(line[1], line[2] or "", line[3] or "")


def members_of(name):
    """Yield the members of one of SCHEMAS: their names, "!", "?" and types."""
    for part in re.search(rf"(?m)^{name}:(.*)$", SCHEMAS)[1].split(","):
        if part.strip().startswith("*"):
            yield from members_of(part.strip()[1:])
        elif part:
            yield MEMBER.fullmatch(part.strip()).groups()


def type_schema(name):
    """Return the JSON schema of a type: one of JSON Schema, "any", one of SCHEMAS, or a list of such."""
    if name.endswith("[]"):
        return {"type": "array", "items": type_schema(name[:-2])}
    if name == "any":
        return {}
    return {"$ref": f"#/components/schemas/{name}"} if name[0].isupper() else {"type": name}


def object_schema(name):
    """Return the JSON schema of one of SCHEMAS."""
    properties, required = {}, []
    for member, needed, nullable, kind in members_of(name):
        schema = properties[member] = type_schema(kind or "string")
        if nullable and "type" in schema:
            schema["type"] = [schema["type"], "null"]
        if needed:
            required.append(member)
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def example_schema(value):
    """Return the JSON schema of an example: an object with these keys, or a string or null."""
    if isinstance(value, dict):
        return {"type": "object", "required": list(value),
                "properties": {key: example_schema(member) for key, member in value.items()}}
    return {"type": ["string", "null"]}


PATH_PARAMETERS = {"id": {"type": "integer", "minimum": 1}, "model": {"type": "string"},
                   "key": {"type": "string", "pattern": f"^{SEGMENTS['key']}$"},
                   "digest": {"type": "string", "pattern": f"^{SEGMENTS['digest']}$"}}
QUERY_PARAMETERS = {"list_tokens": {"user": {"type": "string"}},
                    "usage": {"by": {"enum": list(USAGE_BY), "default": "user"},
                              "since": {"type": "string", "default": "7d"}}}


def openapi_parameters(route):
    """Return the OpenAPI parameters of a route."""
    segments = re.findall(r"\{(\w+)\}", route.path)
    return ([{"name": name, "in": "path", "required": True, "schema": PATH_PARAMETERS[name]} for name in segments]
            + [{"name": name, "in": "query", "schema": schema}
               for name, schema in QUERY_PARAMETERS.get(route.handler, {}).items()])


def openapi_bodies(route, doc):
    """Return the OpenAPI request body and the content of the answer; of Ollama's routes no more than the types."""
    answer = {"content": {doc.answer if "/" in doc.answer else "application/json": {
        "schema": type_schema("string" if "/" in doc.answer else doc.answer)}}} if doc.answer else {}
    if route.category != "page" and route.method in ("POST", "DELETE") and "{key}" not in route.path:
        kind = "application/octet-stream" if route.streamed else BODY_TYPES.get(route.model_in, "application/json")
        schema = {} if route.streamed else {"schema": {"type": "object"}}
        return {"requestBody": {"content": {kind: schema}}}, answer
    content = {"application/json": {"schema": type_schema(doc.request)}} if doc.request else {}
    return {"requestBody": {"required": True, "content": content}} if content else {}, answer


def possible_refusals(route):
    """Return the statuses by which the gateway may refuse a well-formed request."""
    found = {400, 500, 503}
    if route.access != "public":
        found |= {401, 403, 429}
    if route.method in ("POST", "PATCH", "DELETE"):
        found |= {408, 413, 415}
    if "{id}" in route.path:
        found.add(404)
    if route.handler == "create_token":
        found.add(409)
    return sorted(found if route.category == "page" else found | {502, 504})


def openapi_operation(route):
    """Return the OpenAPI operation of a route."""
    doc, dialect = route_doc(route), dialect_of(route.path)
    tag = "Admin" if route.path.startswith("/admin") else "Gateway" if route.category == "page" else dialect.capitalize()
    body, answer = openapi_bodies(route, doc)
    found = {"operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.path}").strip("_"), "tags": [tag],
             "summary": doc.summary, "parameters": openapi_parameters(route), **body, "responses": {
                 "201" if route.handler == "create_token" else "200": {"description": "done", **answer},
                 **{str(status): {"$ref": f"#/components/responses/{dialect}-{status}"}
                    for status in possible_refusals(route)},
                 "default": {"$ref": f"#/components/responses/{dialect}"}}}
    if route.access == "public":
        found["security"] = []
    elif route.access == "admin":
        found["description"] = "Requires an admin token."
    return found


def openapi_refusals():
    """Return the OpenAPI responses of each status that refuses, in each dialect."""
    found = {}
    for dialect in "ollama", "openai", "anthropic":
        content = {"application/json": {"schema": example_schema(Refusal("malformed").body_for(dialect))}}
        found[dialect] = {"description": "another refusal, or an error of Ollama's own"}
        for status in sorted({reason.status for reason in REFUSALS.values()}):
            meanings = [reason.meaning for reason in REFUSALS.values() if reason.status == status]
            found[f"{dialect}-{status}"] = {"description": "; or ".join(meanings), "content": content}
    return found


def openapi_document(routes, base):
    """Return the OpenAPI 3.1 document of a gateway with these routes, with /api at the base."""
    paths = {}
    for route in routes:
        paths.setdefault(at_base(route.path, base), {})[route.method.lower()] = openapi_operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "ollama_gateway", "version": VERSION,
                 "description": "Ollama and its OpenAI and Anthropic APIs, for holders of a token."},
        "externalDocs": {"description": "The bodies of Ollama's own routes", "url": "https://docs.ollama.com/api"},
        "security": [{"bearer": []}, {"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"},
                                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"}},
            "schemas": {name: object_schema(name) for name in re.findall(r"(?m)^([A-Z]\w+):", SCHEMAS)},
            "responses": openapi_refusals()}}

# == Web pages ================================================================

STYLE = r"""
:root { color-scheme: light dark; --paper: #faf9f6; --card: #fff; --ink: #1e2422; --dim: #59625d; --line: #dfdcd4;
  --edge: #868e89; --accent: #0a695c; --on-accent: #fff; --soft: #e4efec; --mild: #64a195; --bad: #a2261e;
  --good: #1b6a35; }
@media (prefers-color-scheme: dark) { :root { --paper: #141716; --card: #1c201f; --ink: #e6eae8; --dim: #a4ada8;
  --line: #343a37; --edge: #78817c; --accent: #63cdbb; --on-accent: #07241f; --soft: #21332f; --mild: #3f8073;
  --bad: #ff9c91; --good: #80d69a; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
html { scroll-behavior: smooth; scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
body > header, main, body > footer { max-width: 64rem; margin: 0 auto; padding: 0 1.25rem; }
body > header { padding-top: 2.5rem; }
body > footer { padding-top: 1rem; padding-bottom: 3rem; color: var(--dim); font-size: .9rem; }
h1 { margin: .25rem 0 .5rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em; }
h2 { margin: 0 0 .75rem; font-size: 1.2rem; line-height: 1.3; letter-spacing: -.01em; }
h3 { margin: 1.25rem 0 .5rem; font-size: 1rem; }
p { margin: 0 0 .75rem; max-width: 44rem; }
a { color: var(--accent); text-underline-offset: .15em; }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; margin: 1rem 0 0; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
.brand, small, .dim { color: var(--dim); }
.brand { margin: 0; font-size: .9rem; }
small { font-size: .85rem; }
main > section, #desk > section { margin: 1.5rem 0; padding: 1.35rem 1.5rem 1.5rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .75rem; }
section > :last-child { margin-bottom: 0; }
code, pre { font: .875rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
pre { margin: 0; padding: .9rem 1rem; background: var(--paper); border: 1px solid var(--line); border-radius: .5rem;
  overflow-x: auto; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
label { display: block; font-size: .9rem; font-weight: 600; }
label small { font-weight: 400; }
input, select, textarea, button { border: 1px solid var(--edge); border-radius: .45rem; font: inherit; color: inherit; }
input, select, textarea { display: block; width: 100%; margin-top: .25rem; padding: .45rem .65rem;
  background: var(--paper); font-weight: 400; }
input[type=checkbox] { display: inline-block; width: 1.05rem; height: 1.05rem; margin: 0 .35rem 0 0;
  vertical-align: -.15rem; accent-color: var(--accent); }
::placeholder { color: var(--dim); opacity: 1; }
textarea { min-height: 5.5rem; resize: vertical; }
button { padding: .45rem .9rem; background: transparent; cursor: pointer; white-space: nowrap; }
button:hover { background: var(--soft); }
button[type=submit] { background: var(--accent); border-color: transparent; color: var(--on-accent); font-weight: 600; }
button[type=submit]:hover { filter: brightness(1.08); }
button.danger[type=submit] { background: var(--bad); color: var(--card); }
button.small, td button { padding: .15rem .55rem; font-size: .85rem; }
:disabled { opacity: .55; cursor: default; }
fieldset { min-width: 0; margin: 0; padding: 0; border: 0; }
.row, .head { display: flex; flex-wrap: wrap; gap: .75rem; align-items: flex-end; margin-bottom: .75rem; }
.row > label { flex: 1 1 14rem; }
label + .row { margin-top: .75rem; }
.head { justify-content: space-between; }
.head, .head .row { align-items: center; }
.head h2, .head .row, .head input, .head select { margin: 0; }
.head input, .head select { width: auto; max-width: 11rem; }
.problem { margin: .5rem 0 .75rem; color: var(--bad); font-weight: 600; }
.problem:empty, .note:empty { display: none; }
.note { margin: .6rem 0 0; color: var(--dim); font-size: .9rem; font-variant-numeric: tabular-nums; }
.answer { min-height: 4.5rem; font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; }
.thought { color: var(--dim); font-style: italic; }
.thought:not(:empty) + .said:not(:empty)::before { content: "\A\A"; }
.tag { padding: .05rem .4rem; border-radius: .35rem; background: var(--soft); color: var(--accent); font-size: .8rem; }
.bad { color: var(--bad); }
.good { color: var(--good); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1rem; margin: 0 0 1rem; }
.tiles dt { color: var(--dim); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.3rem; line-height: 1.35; overflow-wrap: anywhere; }
.tiles dd svg { margin: .1rem 0 .2rem; }
.tiles dd small { display: block; line-height: 1.4; }
.tabs { display: flex; flex-wrap: wrap; gap: .35rem; margin-bottom: .75rem; }
.tabs [aria-selected=true] { background: var(--soft); border-color: var(--accent); color: var(--accent); }
.example { position: relative; }
.example > button { position: absolute; top: .45rem; right: .45rem; background: var(--card); }
.example pre { padding-right: 5.5rem; }
table { width: 100%; border-collapse: collapse; font-size: .925rem; }
th, td { padding: .45rem .9rem .45rem 0; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
th { font-weight: 600; }
tbody th[scope=row] { font-weight: 400; overflow-wrap: anywhere; }
tbody th[scope=rowgroup] { padding-top: 1.2rem; border-top: 0; color: var(--dim); }
thead th { border-top: 0; color: var(--dim); font-size: .85rem; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td:last-child, th:last-child { padding-right: 0; }
td[data-label=Expires] { min-width: 6.4rem; }
td .row { flex-wrap: nowrap; gap: .35rem; margin: 0; }
th code { white-space: nowrap; }
svg { display: block; width: 100%; fill: var(--accent); }
svg.days { height: 9rem; border-bottom: 1px solid var(--edge); }
svg.bar { height: .55rem; min-width: 5rem; border-radius: .3rem; background: var(--soft); }
td svg.bar { margin-top: .5rem; }
svg .prompt { fill: var(--mild); }
figure { margin: 0; }
figcaption, .axis { display: flex; justify-content: space-between; gap: 1rem; color: var(--dim); font-size: .85rem; }
.key { white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: .7rem; height: .7rem; margin: 0 .35rem 0 .8rem;
  border-radius: .15rem; background: var(--accent); }
.key.prompt::before { background: var(--mild); }
details { margin-top: .6rem; font-size: .9rem; }
summary { color: var(--dim); cursor: pointer; }
dialog { width: min(34rem, calc(100vw - 2rem)); padding: 1.5rem; background: var(--card); color: inherit;
  border: 1px solid var(--line); border-radius: .75rem; overflow-wrap: anywhere; }
dialog::backdrop { background: rgb(0 0 0 / 50%); }
dialog form { display: grid; grid-template-columns: 1fr 1fr; gap: .75rem 1rem; align-items: start; }
dialog form > * { grid-column: 1 / -1; margin: 0; }
dialog form > .half { grid-column: auto; }
dialog pre { white-space: pre-wrap; overflow-wrap: anywhere; margin-bottom: .75rem; }
dialog .row { justify-content: flex-end; margin: .5rem 0 0; }
dialog .problem { margin: .35rem 0 0; font-size: .9rem; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media (max-width: 40rem) {
  body > header, main, body > footer { padding-left: .9rem; padding-right: .9rem; }
  main > section, #desk > section { padding: 1.1rem 1rem; }
  .stack thead { display: none; }
  .stack, .stack tbody, .stack tr, .stack th, .stack td { display: block; }
  .stack tr { padding: .6rem 0; border-top: 1px solid var(--line); }
  .stack th, .stack td { padding: .1rem 0; border: 0; text-align: left; overflow-wrap: anywhere; }
  .stack td[data-label]::before { content: attr(data-label) ": "; color: var(--dim); }
  .stack td[data-label=Actions]::before, .stack td[data-label=Share]::before { content: none; }
  .stack td:empty { display: none; }
  #desk .stack th { font-weight: 600; }
  .example > button { position: static; margin-top: .5rem; }
  .example pre { padding-right: 1rem; }
  .stack td svg.bar { margin: .15rem 0; }
  .stack td .row { flex-wrap: wrap; margin-top: .3rem; }
  .stack code { white-space: normal; }
  dialog form > .half { grid-column: 1 / -1; }
}
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
"""

SCRIPT = r"""
"use strict";
const KEY = "ollama_gateway.token";
// All is asked for below where the page is seen, behind a proxy's prefix too; a secret in the path goes as a header.
const [, ROOT, PATH_SECRET] = location.pathname.match(/^(.*?)(?:\/t\/([^/]+))?\/[^/]*$/);
const BASE = document.documentElement.dataset.base;
const LIMITS = JSON.parse(document.getElementById("limits").textContent);
const ADDRESS = location.origin + ROOT;

const byId = id => document.getElementById(id);
const token = () => sessionStorage.getItem(KEY) || PATH_SECRET;
const keep = secret => secret === PATH_SECRET || sessionStorage.setItem(KEY, secret);
const number = value => value === null ? "unknown" : value.toLocaleString("en");
const minute = time => time.slice(0, 16).replace("T", " ");
const spent = row => row.prompt_tokens === null ? null : row.prompt_tokens - row.cached_tokens + row.completion_tokens;
let now = Date.now();   // by the gateway's clock, once it has answered
const dayAgo = days => new Date(now - days * 86400000).toISOString().slice(0, 10);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity));
  return node;
}
const element = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);
const drawn = (name, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
const button = (text, click, attributes = {}) => element("button", {type: "button", click, ...attributes}, text);

async function refusal(reply) {
  const told = await reply.json().catch(() => null), retry = reply.headers.get("Retry-After");
  const text = reply.status === 401 ? "This token is not valid: it is unknown, expired or deleted"
    : told && told.error || `${reply.status} ${reply.statusText}`;
  return Object.assign(new Error(text + (retry ? `; try again in ${retry} s` : "")), {status: reply.status});
}

async function ask(method, path, {body, secret = token(), signal} = {}) {
  if (!/^[\x21-\x7e]+$/.test(secret)) throw new Error("A token is one word of plain letters, digits and signs");
  const headers = {Authorization: `Bearer ${secret}`, "Content-Type": "application/json"};
  const reply = await fetch(ROOT + path, {method, headers, signal, cache: "no-store", body: JSON.stringify(body)})
    .catch(error => { throw error.name === "AbortError" ? error : new Error("The gateway cannot be reached"); });
  now = Date.parse(reply.headers.get("Date")) || now;
  if (!reply.ok) throw await refusal(reply);
  return reply;
}
const askJSON = async (...args) => (await ask(...args)).json();

async function attempt(pressed, problem, action) {
  problem.textContent = "";
  pressed.disabled = true;
  await action().catch(error => { problem.textContent = error.message; });
  pressed.disabled = false;
}

// Asks for the token, until it is forgotten: `enter` keeps the one it is given, or throws if it is not good enough.
function signIn(enter, leave) {
  const form = byId("sign-in"), problem = byId("sign-in-problem"), field = byId("token");
  const use = secret => attempt(form.querySelector("button"), problem, async () => {
    await enter(secret).catch(error => {
      if (error.status === 401 && secret === token()) sessionStorage.removeItem(KEY);
      throw error;
    });
    field.value = "";
    form.hidden = true;
    byId("signed-in").hidden = false;
  });
  const forget = (why = "") => {
    sessionStorage.removeItem(KEY);
    problem.textContent = why;
    form.hidden = false;
    byId("signed-in").hidden = true;
    leave();
    field.focus();
  };
  form.addEventListener("submit", event => { event.preventDefault(); use(field.value.trim()); });
  byId("forget").addEventListener("click", () => forget());
  if (token()) use(token());
  return forget;
}

function copy(pressed, source) {
  getSelection().selectAllChildren(source);
  pressed.textContent = document.execCommand("copy") ? "Copied" : "Selected";   // the newer way takes TLS
}
const copyButton = (source, attributes) => button("Copy", event => copy(event.target, source), attributes);

// A row is a list of cells, a cell what an element may hold; the first names its row, those in `numbers` are figures.
function table(caption, headings, rows, numbers = []) {
  const style = at => numbers.includes(at) && "number";
  const head = (heading, at) => element("th", {scope: "col", class: style(at)}, heading);
  const cell = (content, at) => at ? element("td", {class: style(at), "data-label": headings[at]}, content)
    : element("th", {scope: "row"}, content);
  return element("table", {class: "stack"}, element("caption", {class: "unseen"}, caption),
    element("thead", {}, element("tr", {}, headings.map(head))),
    element("tbody", {}, rows.map(cells => element("tr", {}, cells.map(cell)))));
}

const bar = share => drawn("svg", {class: "bar", "aria-hidden": "true"},
  drawn("rect", {width: `${100 * share}%`, height: "100%"}));

function dayChart(rows, days) {
  const known = new Map(rows.map(row => [row.day, row]));
  const all = Array.from({length: days}, (_, at) => dayAgo(days - 1 - at)).map(
    day => known.get(day) || {day, requests: 0, prompt_tokens: 0, cached_tokens: 0, completion_tokens: 0});
  const most = Math.max(1, ...all.map(spent)), total = all.reduce((sum, row) => sum + spent(row), 0);
  const column = (row, at) => {
    const said = row.completion_tokens / most * 100, asked = (row.prompt_tokens - row.cached_tokens) / most * 100;
    return drawn("g", {},
      drawn("title", {}, `${row.day}: ${number(spent(row))} tokens, ${number(row.requests)} requests`),
      drawn("rect", {x: at + 0.12, width: 0.76, y: 100 - said, height: said}),
      drawn("rect", {class: "prompt", x: at + 0.12, width: 0.76, y: 100 - said - asked, height: asked}));
  };
  return element("figure", {},
    element("figcaption", {}, element("span", {}, `most in a day: ${number(most)}`), element("span", {},
      element("span", {class: "key prompt"}, "prompts"), element("span", {class: "key"}, "answers"))),
    drawn("svg", {class: "days", viewBox: `0 0 ${days} 100`, preserveAspectRatio: "none", role: "img",
      "aria-label": `Tokens of each of the last ${days} days, ${number(total)} in all`}, all.map(column)),
    element("div", {class: "axis"}, element("span", {}, all[0].day), element("span", {}, "today, in UTC")),
    element("details", {}, element("summary", {}, "As a table"), table("Use by day", ["Day", "Tokens", "Requests"],
      all.filter(row => row.requests).map(row => [row.day, number(spent(row)), number(row.requests)]), [1, 2])));
}
"""

DOCS_SCRIPT = r"""
let running = null;

const tile = (name, ...content) => element("div", {}, element("dt", {}, name), element("dd", {}, content));

function showMe(me) {
  byId("who").textContent = `${me.user}/${me.name}`;
  byId("me").replaceChildren(
    element("dl", {class: "tiles"},
      tile("Valid", me.expires_at ? `until ${minute(me.expires_at)}` : "until deleted"),
      tile("Models", me.models ? me.models.join(", ") : "all"),
      Object.entries(me.left).map(([name, {limit, remaining}]) => tile(LIMITS[name].label,
        number(remaining), bar(remaining / limit), element("small", {}, `left of ${number(limit)}`)))),
    element("h3", {}, "Your last seven days"), dayChart(me.usage, 7));
}

async function showModels() {
  const {models} = await askJSON("GET", `${BASE}/tags`);
  byId("model").replaceChildren(...(models || []).map(({name}) => element("option", {}, name)));
  byId("talk").disabled = false;
  nameModel();
}

function nameModel() {
  const name = byId("model").value;     // what could be more than a name in a shell's eyes is not put there
  if (/^[\w.:\/-]+$/.test(name)) for (const place of document.querySelectorAll(".model")) place.textContent = name;
}

async function enter(secret) {
  showMe(await askJSON("GET", "/me", {secret}));
  keep(secret);
  byId("me").hidden = false;
  showModels().catch(error => { byId("problem").textContent = error.message; });
}

function leave() {
  if (running) running.abort();
  byId("me").hidden = byId("talk").disabled = true;
  for (const id of ["me", "who", "model", "thought", "said", "figures", "problem"]) byId(id).replaceChildren();
}

async function* linesOf(body) {
  const reader = body.getReader(), decoder = new TextDecoder();
  for (let rest = "", ended = false; !ended;) {
    const {value, done} = await reader.read().catch(() => { throw new Error("The answer broke off before its end"); });
    const lines = (rest + decoder.decode(value, {stream: !done})).split("\n");
    rest = done ? "" : lines.pop();
    ended = done;
    yield* lines;
  }
}

async function talk(signal) {
  const began = performance.now(), seconds = () => (performance.now() - began) / 1000;
  const body = {model: byId("model").value, messages: [{role: "user", content: byId("prompt").value}]};
  let first = 0;
  for await (const line of linesOf((await ask("POST", `${BASE}/chat`, {body, signal})).body)) {
    const {message = {}, error, done, eval_count: count, eval_duration: lasted} = JSON.parse(line.trim() || "{}");
    if (error) throw new Error(error);
    byId("thought").append(message.thinking || "");
    byId("said").append(message.content || "");
    if (!first && (message.thinking || message.content)) {
      first = seconds();
      byId("figures").textContent = `first token after ${first.toFixed(2)} s`;
    }
    if (done && count) {
      const rate = count / (lasted / 1e9 || seconds() - first);
      byId("figures").append(`, ${number(count)} tokens, ${rate.toFixed(1)} a second`);
    }
  }
}

async function send(event) {
  event.preventDefault();
  if (running) return;
  for (const id of ["thought", "said", "figures"]) byId(id).replaceChildren();
  const {signal} = running = new AbortController();
  byId("stop").disabled = false;
  byId("answer").setAttribute("aria-busy", "true");
  await attempt(byId("send"), byId("problem"), () => talk(signal).catch(error => {
    if (!signal.aborted) throw error;
    byId("figures").append(" (stopped)");
  }));
  running = null;
  byId("stop").disabled = true;
  byId("answer").setAttribute("aria-busy", "false");
  if (token()) askJSON("GET", "/me").then(me => token() && showMe(me), () => {});
}

function showTab(shown, tabs) {
  for (const tab of tabs) {
    tab.setAttribute("aria-selected", tab === shown);
    tab.tabIndex = tab === shown ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = tab !== shown;
  }
}

function makeTabs() {
  const examples = [...document.querySelectorAll(".example")];
  const tabs = examples.map(example => {
    const heading = example.querySelector("h3");
    heading.hidden = true;
    example.append(copyButton(example.querySelector("code"), {class: "small"}));
    fill(example, {role: "tabpanel", "aria-label": heading.textContent}, []);
    const attributes = {role: "tab", "aria-controls": example.id};
    return button(heading.textContent, event => showTab(event.target, tabs), attributes);
  });
  const turn = event => {
    const step = {ArrowRight: 1, ArrowLeft: tabs.length - 1}[event.key], at = tabs.indexOf(event.target);
    if (!step) return;
    const next = tabs[(at + step) % tabs.length];
    showTab(next, tabs);
    next.focus();
  };
  examples[0].before(element("div", {class: "tabs", role: "tablist", "aria-label": "Clients", keydown: turn}, tabs));
  showTab(tabs[0], tabs);
}

for (const place of document.querySelectorAll(".address")) place.textContent = ADDRESS;
makeTabs();
byId("console").hidden = false;
byId("console-form").addEventListener("submit", send);
byId("stop").addEventListener("click", () => running && running.abort());
byId("model").addEventListener("change", nameModel);
byId("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("console-form").requestSubmit();
});
signIn(enter, leave);
"""

ADMIN_SCRIPT = r"""
const FIELDS = {user: ["User", "a person"], name: ["Name", "a device, a program"],
  expires_at: ["Expires", "30d, 2027-01-31"],
  ...Object.fromEntries(Object.entries(LIMITS).map(([name, {label, example}]) => [name, [label, example]]))};
let tokens = [], watching = 0, renewing = false;

const nameOf = row => `${row.user}/${row.name}`;
const asText = value => value === null || value === undefined ? "" : [].concat(value).join(",");
const doing = (text, style = false) => element("button", {type: "submit", class: style}, text);

function dialog(title, ...content) {
  const box = element("dialog", {"aria-labelledby": "dialog-title", close: () => box.remove()},
    element("h2", {id: "dialog-title"}, title), content);
  document.body.append(box);
  box.showModal();
  return box;
}

// A dialog whose form does something when it is submitted, and says what went wrong where it went wrong.
function formDialog(title, content, submitter, action) {
  const problem = element("p", {class: "problem", role: "alert"});
  const submit = async event => {
    event.preventDefault();
    await attempt(submitter, problem, async () => { await action(form); box.close(); });
    const wrong = form.elements[problem.textContent.split(":")[0]];
    if (wrong) wrong.focus();
    if (wrong) wrong.after(problem);
    else form.lastChild.before(problem);
  };
  const form = element("form", {submit}, content, problem,
    element("div", {class: "row"}, button("Cancel", () => box.close()), submitter));
  const box = dialog(title, form);
}

function showSecret(made) {
  const secret = element("code", {}, made.token);
  const usage = element("code", {}, `curl -H "Authorization: Bearer ${made.token}" ${ADDRESS}${BASE}/tags`);
  const box = dialog(`The secret of ${nameOf(made)}`,
    element("p", {}, "It is shown only now. Keep it like a password."), element("pre", {id: "secret"}, secret),
    element("p", {}, "To use it:"), element("pre", {}, usage),
    element("p", {}, element("a", {href: "docs", target: "_blank"}, "How each client takes it")),
    element("div", {class: "row"}, copyButton(secret, {autofocus: ""}), button("I have kept it", () => box.close())));
  box.addEventListener("cancel", event => event.preventDefault());
}

function editToken(title, names, known, text, save) {
  const fields = names.map(name => element("label", {class: "half"},
    FIELDS[name][0] + " ", element("small", {}, FIELDS[name][1]),
    element("input", {name, value: asText(known[name]), autocomplete: "off", spellcheck: "false"})));
  const box = element("input", {type: "checkbox", name: "admin"});
  box.checked = known.admin;
  formDialog(title, [fields, element("label", {}, box, "Admin ", element("small", {}, "may manage models and tokens")),
    element("p", {class: "dim"}, "A field that is empty sets no limit.")], doing(text),
    async form => {
      const changes = {};
      for (const name of names) {
        const typed = form.elements[name].value.trim();
        if (typed !== asText(known[name])) changes[name] = typed || null;
      }
      if (box.checked !== known.admin) changes.admin = box.checked;
      await save(changes);
      await loadTokens();
    });
}

function createToken() {
  editToken("New token", Object.keys(FIELDS), {admin: false}, "Create",
    async changes => showSecret(await askJSON("POST", "/admin/tokens", {body: {user: "", name: "", ...changes}})));
}

function changeToken(known) {
  editToken(`Limits of ${nameOf(known)}`, Object.keys(FIELDS).slice(2), known, "Save",
    changes => ask("PATCH", `/admin/tokens/${known.id}`, {body: changes}));
}

function rotateToken(known) {
  const text = `The secret of ${nameOf(known)} stops working at its next request.`;
  formDialog("Give it a new secret?", element("p", {}, text), doing("New secret"), async () => {
    renewing = token().startsWith(known.hint);      // it is the one in use: the old one is refused from here on
    const made = await askJSON("POST", `/admin/tokens/${known.id}/rotate`).then(answer => {
      if (renewing) keep(answer.token);
      return answer;
    }).finally(() => { renewing = false; });
    showSecret(made);
    await loadTokens();
  });
}

function deleteToken(known) {
  const text = `${nameOf(known)} stops working at its next request, and does not come back.`;
  formDialog("Delete this token?", element("p", {}, text), doing("Delete", "danger"), async () => {
    await ask("DELETE", `/admin/tokens/${known.id}`);
    await loadTokens();
  });
}

function limitsOf(row) {
  const shown = value => Array.isArray(value) ? value.join(", ") : number(value);
  return Object.entries(LIMITS).filter(([name]) => row[name])
    .map(([name, {phrase}]) => phrase.replace("{}", shown(row[name]))).join("; ");
}

function tokenRow(row) {
  const actions = Object.entries({Edit: changeToken, "New secret": rotateToken, Delete: deleteToken}).map(
    ([text, act]) => button(text, () => act(row), {"aria-label": `${text}: ${nameOf(row)}`}));
  return [[nameOf(row), row.admin ? [" ", element("span", {class: "tag"}, "admin")] : ""],
    element("code", {}, `${row.hint}…`),
    row.expired ? element("span", {class: "bad"}, "expired") : row.expires_at ? minute(row.expires_at) : "never",
    row.last_used_at ? minute(row.last_used_at) : "never", limitsOf(row),
    element("div", {class: "row"}, actions)];
}

function showTokens() {
  const words = byId("filter").value.toLowerCase().split(/\s+/);
  const shown = tokens.filter(row => {
    const text = `${nameOf(row)} ${row.hint} ${row.admin ? "admin" : ""} ${limitsOf(row)}`.toLowerCase();
    return words.every(word => text.includes(word));
  });
  byId("token-count").textContent = `${shown.length} of ${tokens.length}`;
  byId("tokens").replaceChildren(
    table("Tokens", ["Token", "Secret", "Expires", "Last used", "Limits", "Actions"], shown.map(tokenRow)));
}

async function loadTokens() {
  tokens = await askJSON("GET", "/admin/tokens");
  showTokens();
}

function showStatus({upstream, requests, ...gauges}) {
  const up = upstream.status === "up";
  byId("in-flight").textContent = number(gauges.in_flight_requests);
  byId("queued").textContent = number(gauges.queued_requests);
  byId("connections").textContent = number(gauges.connections);
  byId("ollama").textContent = up ? `up, ${upstream.version}` : "down";
  byId("ollama").className = up ? "good" : "bad";
  byId("loaded").textContent = upstream.loaded.map(({name}) => name).join(", ") || "none";
  byId("requests").replaceChildren(requests.length ? table("Requests in flight and queued",
    ["Token", "Model", "Path", "State", "Seconds"], requests.map(row => [nameOf(row), row.model || "",
      element("code", {}, row.path), row.waiting ? "waiting" : "running", row.seconds.toFixed(1)]), [4])
    : element("p", {class: "dim"}, "Nothing runs or waits now."));
}

async function watch() {
  const problem = byId("status-problem"), secret = token();
  await askJSON("GET", "/admin/status", {secret}).then(status => {
    if (!byId("desk").hidden) showStatus(status);
    problem.textContent = "";
  }, error => {
    if (renewing || secret !== token()) return;     // that one is in use no more
    if (error.status === 401 || error.status === 403) forget(error.message);
    problem.textContent = error.message;
  });
  clearTimeout(watching);
  if (!document.hidden && !byId("desk").hidden) watching = setTimeout(watch, 2000);
}

function usageTable(caption, heading, rows) {
  const most = Math.max(1, ...rows.map(spent));
  return table(caption, [heading, "Share", "Tokens", "Cached", "Requests"],
    rows.map(row => [row[heading.toLowerCase()] || "-", bar(spent(row) / most), number(spent(row)),
      number(row.cached_tokens || 0), number(row.requests)]), [2, 3, 4]);
}

async function loadUsage() {
  const days = byId("period").value;
  const [byDay, byUser, byModel] = await Promise.all(
    ["day", "user", "model"].map(by => askJSON("GET", `/admin/usage?by=${by}&since=${days}d`)));
  if (days !== byId("period").value || byId("desk").hidden) return;    // nobody waits for this any more
  byId("by-day").replaceChildren(dayChart(byDay, Number(days)));
  byId("by-user").replaceChildren(usageTable("Use by user", "User", byUser));
  byId("by-model").replaceChildren(usageTable("Use by model", "Model", byModel));
}
const showUsage = () => attempt(byId("refresh"), byId("usage-problem"), loadUsage);

async function enter(secret) {
  tokens = await askJSON("GET", "/admin/tokens", {secret});
  keep(secret);
  byId("desk").hidden = false;
  showTokens();
  showUsage();
  watch();
}

function leave() {
  clearTimeout(watching);
  tokens = [];
  byId("desk").hidden = true;
  for (const id of ["loaded", "requests", "tokens", "by-day", "by-user", "by-model"]) byId(id).replaceChildren();
}

byId("create").addEventListener("click", createToken);
byId("filter").addEventListener("input", showTokens);
byId("period").addEventListener("change", showUsage);
byId("refresh").addEventListener("click", showUsage);
document.addEventListener("visibilitychange", () => { if (!document.hidden && !byId("desk").hidden) watch(); });
const forget = signIn(enter, leave);
"""

SIGN_IN = """
<form id="sign-in">
<div class="row">
<label>{label}<input id="token" type="password" autocomplete="off" spellcheck="false" required></label>
<button type="submit">Use this token</button>
</div>
<p class="dim">It stays in this tab, and is forgotten with it.</p>
<p id="sign-in-problem" class="problem" role="alert"></p>
</form>
<div id="signed-in" class="head" hidden><span id="who">{signed_in}</span>
<button id="forget" type="button">Forget the token</button></div>
"""
DOCS = """
<header>
<p class="brand">ollama_gateway {version}</p>
<h1>An Ollama to share</h1>
<p>Every Ollama, OpenAI and Anthropic client works here, streaming. It takes a token: ask whoever runs this gateway.</p>
<nav><a href="#yours">Your token</a><a href="#examples">Examples</a><a href="#routes">Routes</a>
<a href="#errors">Errors</a><a href="#settings">Settings</a>{links}</nav>
</header>
<main>
<section id="yours" aria-labelledby="yours-title">
<h2 id="yours-title">Your token</h2>
<noscript><p>Trying a token here takes JavaScript; all else on this page does without.</p></noscript>
{sign_in}
<div id="me" hidden></div>
</section>
<section id="console" aria-labelledby="console-title" hidden>
<h2 id="console-title">Console</h2>
<form id="console-form"><fieldset id="talk" disabled>
<div class="row"><label>Model<select id="model"></select></label></div>
<label>Prompt <small>Ctrl+Enter sends it</small><textarea id="prompt" required>Why is the sky blue?</textarea></label>
<div class="row"><button id="send" type="submit">Send</button>
<button id="stop" type="button" disabled>Stop</button></div>
</fieldset></form>
<p id="problem" class="problem" role="alert"></p>
<pre id="answer" class="answer" aria-label="Answer" aria-live="polite"><span id="thought" class="thought"></span
><span id="said" class="said"></span></pre>
<p id="figures" class="note" role="status"></p>
</section>
<section id="examples" aria-labelledby="examples-title">
<h2 id="examples-title">Examples</h2>
<p>The token is in the variable <code>TOKEN</code>: <code>export TOKEN=ogw_…</code></p>
{examples}
</section>
<section id="routes" aria-labelledby="routes-title">
<h2 id="routes-title">Routes</h2>
<p>The token goes into <code>Authorization: Bearer …</code> or <code>x-api-key: …</code>.
Whatever is not in this table is refused.</p>
{routes}
</section>
<section id="errors" aria-labelledby="errors-title">
<h2 id="errors-title">Errors</h2>
<p>They come in the dialect of the route. Ollama's own errors pass through as they are. Every answer has an
<code>X-Request-Id</code> to ask after it by.</p>
{errors}
</section>
<section id="settings" aria-labelledby="settings-title">
<h2 id="settings-title">Settings</h2>
<details><summary>For whoever runs the gateway: flags of <code>serve</code>, and variables</summary>
{options}</details>
</section>
</main>
<footer>Nothing on this page comes from elsewhere, and what you send goes to this gateway alone.</footer>
"""
ADMIN = """
<header>
<p class="brand">ollama_gateway {version}</p>
<h1>Administration</h1>
<p>Tokens, what runs now, and who used how much.</p>
<nav><a href="docs">Documentation</a></nav>
</header>
<main>
<section aria-labelledby="yours-title">
<h2 id="yours-title">Your token</h2>
<noscript><p>This page takes JavaScript; <code>ollama_gateway.py token</code> on the box does without.</p></noscript>
{sign_in}
</section>
<div id="desk" hidden>
<section aria-labelledby="now-title">
<h2 id="now-title">Now</h2>
<dl class="tiles">
<div><dt>In flight</dt><dd id="in-flight"></dd></div>
<div><dt>Queued</dt><dd id="queued"></dd></div>
<div><dt>Connections</dt><dd id="connections"></dd></div>
<div><dt>Ollama</dt><dd id="ollama"></dd></div>
<div><dt>Loaded models</dt><dd id="loaded"></dd></div>
</dl>
<p id="status-problem" class="problem" role="alert"></p>
<div id="requests"></div>
</section>
<section aria-labelledby="tokens-title">
<div class="head"><h2 id="tokens-title">Tokens <small id="token-count" role="status"></small></h2>
<div class="row"><input id="filter" type="search" placeholder="Filter" aria-label="Filter the tokens">
<button id="create" type="button">New token</button></div></div>
<div id="tokens"></div>
</section>
<section aria-labelledby="usage-title">
<div class="head"><h2 id="usage-title">Usage</h2>
<div class="row"><select id="period" aria-label="Period"><option value="7">7 days</option>
<option value="30">30 days</option><option value="90">90 days</option></select>
<button id="refresh" type="button">Refresh</button></div></div>
<p id="usage-problem" class="problem" role="alert"></p>
<div id="by-day"></div>
<h3>By user</h3><div id="by-user"></div>
<h3>By model</h3><div id="by-model"></div>
</section>
</div>
</main>
<footer>The token travels in a header, never in a cookie: no other site's page can act with it.</footer>
"""
EXAMPLES = r"""
== curl
curl -N {address}{base}/chat \
  -H "Authorization: Bearer $TOKEN" \
  -d '{"model": "{model}", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
== ollama
# It takes a gateway that was started with --path-tokens.
OLLAMA_HOST={address}/t/$TOKEN ollama run {model}
== Python
import os
from ollama import Client

client = Client(host="{host}", headers={"Authorization": f"Bearer {os.environ['TOKEN']}"})
question = {"role": "user", "content": "Why is the sky blue?"}
for part in client.chat(model="{model}", messages=[question], stream=True):
    print(part.message.content, end="", flush=True)
== JavaScript
import { Ollama } from "ollama"

const headers = { Authorization: `Bearer ${process.env.TOKEN}` }
const ollama = new Ollama({ host: "{host}", headers })
const question = { role: "user", content: "Why is the sky blue?" }
const parts = await ollama.chat({ model: "{model}", messages: [question], stream: true })
for await (const part of parts) process.stdout.write(part.message.content)
== OpenAI
import os
from openai import OpenAI

client = OpenAI(base_url="{address}/v1", api_key=os.environ["TOKEN"])
question = {"role": "user", "content": "Why is the sky blue?"}
answer = client.chat.completions.create(model="{model}", messages=[question])
print(answer.choices[0].message.content)
== Anthropic
import os
from anthropic import Anthropic

client = Anthropic(base_url="{address}", api_key=os.environ["TOKEN"])
question = {"role": "user", "content": "Why is the sky blue?"}
answer = client.messages.create(model="{model}", max_tokens=500, messages=[question])
print(answer.content[0].text)
"""
ACCESS = {"token": "With any token", "admin": "With an admin token", "public": "Without a token"}


def source_hash(text):
    """Return what a Content-Security-Policy calls an inline style or script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def html_page(title, body, script, base):
    """Return a page that is nothing but itself: no source beside its own style and script, no target but its origin."""
    limits = json.dumps({limit.column: {"label": limit.label, "example": limit.example, "phrase": limit.phrase}
                         for limit in LIMITS})
    policy = (f"default-src 'none'; style-src {source_hash(STYLE)}; script-src {source_hash(script)}; "
              "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    page = (f'<!doctype html>\n<html lang="en" data-base="{base}">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" '
            f'content="light dark">\n<title>{title}</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n'
            f'</head>\n<body>{body}<script type="application/json" id="limits">{limits}</script>'
            f"<script>{script}</script>\n</body>\n</html>\n")
    return 200, "text/html; charset=utf-8", page.encode(), [
        ("Content-Security-Policy", policy), ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-cache")]


def html_rows(headings, rows, group=""):
    """Return a table's rows, below the name of their group; a row's first cell is code."""
    told = [f'<tr><th scope="rowgroup" colspan="{len(headings)}">{group}</th></tr>\n'] if group else []
    labels = [f' data-label="{heading}"' if at else "" for at, heading in enumerate(headings[1:])]
    for first, *others in rows:
        cells = "".join(f"<td{label}>{html.escape(cell or '')}</td>" for label, cell in zip(labels, others))
        told.append(f'<tr><th scope="row"><code>{html.escape(first)}</code></th>{cells}</tr>\n')
    return "<tbody>\n" + "".join(told) + "</tbody>\n"


def html_table(headings, bodies):
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    return f'<table class="stack">\n<thead><tr>{head}</tr></thead>\n{bodies}</table>'


def example_sections(base):
    """Return the examples, with what the script replaces marked; Ollama's libraries put /api behind their host."""
    places = {"{address}": '<span class="address">http://127.0.0.1:8000</span>', "{base}": base,
              "{model}": '<span class="model">llama3.2</span>'}
    places["{host}"] = places["{address}"] + base[:-len("/api")]
    found = []
    for name, text in re.findall(r"(?ms)^== (\w+)\n(.*?)\n(?===|\Z)", EXAMPLES):
        if "{host}" not in text or base.endswith("/api"):
            text = re.sub(r"\{\w+\}", lambda place: places.get(place[0], place[0]), html.escape(text, quote=False))
            found.append(
                f'<div class="example" id="example-{name}"><h3>{name}</h3><pre><code>{text}</code></pre></div>')
    return "\n".join(found)


def docs_page(routes, base):
    """Return the documentation of a gateway with these routes, with /api at the base."""
    ways, when, flags = ("Route", "What it does"), ("Status", "When"), ("Flag", "What it is", "Variable", "Default")
    told = {access: [] for access in ACCESS}
    for route in routes:
        told[route.access].append((f"{route.method} {at_base(route.path, base)}", route_doc(route).summary))
    errors = {}
    for status, meaning in sorted(REFUSALS.values()):
        errors[str(status)] = f"{errors[str(status)]}; or {meaning}" if str(status) in errors else meaning
    links = '<a href="openapi.json">OpenAPI</a>'
    if any(route.handler == "admin" for route in routes):
        links += '<a href="admin">Administration</a>'
    body = DOCS.format(
        version=VERSION, links=links, sign_in=SIGN_IN.format(label="Token", signed_in=""),
        examples=example_sections(base),
        routes=html_table(ways, "".join(html_rows(ways, told[access], group) for access, group in ACCESS.items())),
        errors=html_table(when, html_rows(when, errors.items())),
        options=html_table(flags, html_rows(flags, [
            (option.flag, option.help, option.variable, option.default) for option in OPTIONS])))
    return html_page("An Ollama to share", body, SCRIPT + DOCS_SCRIPT, base)


def admin_page(base):
    """Return the shell of the page for whoever runs the gateway: it knows nothing until it is given an admin token."""
    body = ADMIN.format(version=VERSION, sign_in=SIGN_IN.format(label="Admin token", signed_in="Signed in."))
    return html_page("Administration", body, SCRIPT + ADMIN_SCRIPT, base)

# == Own endpoints ============================================================


def json_page(value, status=200):
    return status, "application/json", json.dumps(value).encode() + b"\n", [("Cache-Control", "no-store")]


def read_query(page_request, *known):
    """Return the values of a query by their names; raise UsageError for those that are not known, or come twice."""
    pairs = urllib.parse.parse_qsl(page_request.request.query[1:], keep_blank_values=True)
    for at, (name, _) in enumerate(pairs):
        if name not in known or name in dict(pairs[:at]):
            raise UsageError(f'the query\'s "{name[:40]}" is ' + (
                "there twice" if name in known else f"not known here, only {' and '.join(known)}"))
    return dict(pairs)


def read_json_object(page_request, known):
    """Return the members of a body's JSON object; raise UsageError for one that is none, or has others than known."""
    try:
        pairs = json.loads(page_request.body, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        pairs = None
    if not isinstance(pairs, tuple):
        raise UsageError("the body is not a JSON object")
    members = dict(pairs)
    if len(members) < len(pairs) or not set(members) <= set(known):
        wrong = min(set(members) - set(known), default="a key twice")
        raise UsageError(f'the body has "{wrong[:40]}": its keys may be {", ".join(known)}, each once')
    return members


def columns_in_body(members):
    """Return the values that a body's members have for SETTABLE and admin, by column; raise UsageError."""
    found = {}
    for column in SETTABLE:
        if column in members:
            value = members[column]
            if isinstance(value, list) and column in LIMIT_BY_COLUMN and LIMIT_BY_COLUMN[column].json_type == "string[]":
                value = ",".join(map(str, value))
            text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
            try:
                found[column] = read_column(column, text)
            except ValueError as error:
                raise UsageError(f'{column}: "{text[:200]}" {error}') from None
    if "admin" in members:
        if not isinstance(members["admin"], bool):
            raise UsageError("admin: it must be true or false")
        found["admin"] = members["admin"]
    return found


class Pages:
    """The gateway's own pages: each is a method, of the name that the table of routes has for it."""

    CHANGED = ("admin", *SETTABLE)

    def __init__(self, routes, base, store, health, ledger, limiter, metrics, gauges):
        self._routes, self._base = routes, base
        self._store, self._health, self._ledger, self._limiter = store, health, ledger, limiter
        self._metrics, self._gauges = metrics, gauges

    @staticmethod
    def banner(_):
        """Answer as Ollama itself does: its clients ask for this first."""
        return 200, "text/plain; charset=utf-8", b"Ollama is running"

    @staticmethod
    def preflight(_):
        return 204, "", b""

    def health(self, _):
        """Tell, without a token, whether the gateway and Ollama are there."""
        return json_page({"status": "ok", "upstream": "up" if self._health.up else "down", "version": VERSION})

    def me(self, page_request):
        """Tell a token what it may, what of that is left, and what it used in the last seven days."""
        left = {name: {"limit": most, "remaining": left, "reset": reset}
                for name, most, left, reset in self._limiter.statuses(page_request.token)}
        told = token_json(page_request.token)
        del told["last_used_at"], told["expired"]   # it is used now, and is not
        usage = self._store.usage("day", usage_start("7d", self._ledger.now), page_request.token)
        return json_page(dict(told, left=left, usage=usage))

    def metrics(self, _):
        """Tell what Prometheus asks for."""
        lines = "".join(f"{line}\n" for line in self._metrics.lines())
        return 200, "text/plain; version=0.0.4; charset=utf-8", lines.encode()

    def status(self, _):
        """Tell what runs and waits, and how Ollama is."""
        health, now = self._health, time.monotonic()
        requests = [{"user": context.token.user, "name": context.token.name, "model": context.model, "path": context.path,
                     "waiting": context.sent_at is None, "seconds": round(now - context.started_at, 3)}
                    for context in self._ledger.running()]
        return json_page({
            "version": VERSION, **{name: tell() for name, (_, tell) in self._gauges.items()}, "requests": requests,
            "upstream": {"status": "up" if health.up else "down", "version": health.version,
                         "models": health.models, "loaded": health.loaded}})

    def usage(self, page_request):
        """Tell the account: by a key of USAGE_BY, since a time."""
        body_info = read_query(page_request, "by", "since")
        by, since = body_info.get("by", "user"), body_info.get("since", "7d")
        if by not in USAGE_BY:
            raise UsageError(f'by: "{by[:40]}" is none of {", ".join(USAGE_BY)}')
        try:
            return json_page(self._store.usage(by, usage_start(since, self._ledger.now)))
        except ValueError as error:
            raise UsageError(f'since: "{since[:40]}" {error}') from None

    @functools.cached_property
    def _document(self):
        return json_page(openapi_document(self._routes, self._base))

    @functools.cached_property
    def _docs(self):
        return docs_page(self._routes, self._base)

    @functools.cached_property
    def _admin(self):
        return admin_page(self._base)

    def openapi(self, _):
        return self._document

    def docs(self, _):
        return self._docs

    def admin(self, _):
        return self._admin

    def list_tokens(self, page_request):
        return json_page([token_json(token) for token in self._store.list(read_query(page_request, "user").get("user"))])

    def create_token(self, page_request):
        """Make a token; this answer alone has its secret."""
        members = read_json_object(page_request, ("user", "name", *self.CHANGED))
        for key in "user", "name":
            if not isinstance(members.get(key), str):
                raise UsageError(f"{key}: a text has to be there")
        token, secret = self._store.create(members["user"], members["name"], **columns_in_body(members))
        return json_page(dict(token_json(token), token=secret), 201)

    def _token(self, page_request):
        return self._store.get(int(page_request.path.split("/")[3]))

    def show_token(self, page_request):
        return json_page(token_json(self._token(page_request)))

    def update_token(self, page_request):
        changes = columns_in_body(read_json_object(page_request, self.CHANGED))
        token = self._token(page_request)
        return json_page(token_json(self._store.update(token.user, token.name, **changes)))

    def rotate_token(self, page_request):
        """Give a token a new secret; this answer alone has it."""
        token = self._token(page_request)
        token, secret = self._store.rotate(token.user, token.name)
        return json_page(dict(token_json(token), token=secret))

    def delete_token(self, page_request):
        token = self._token(page_request)
        return json_page(token_json(self._store.delete(token.user, token.name)))

# == Assembly =================================================================


def server_tls(settings):
    """Return the TLS context of the settings' certificate, None without one; raise Failure if it cannot be used."""
    if not settings.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except (OSError, ValueError) as error:
        raise Failure(f"cannot use the certificate {settings.tls_cert} with the key "
                      f"{settings.tls_key or settings.tls_cert}: {error}") from None
    return context


def connections_that_fit(most, each):
    """Raise the limit of descriptors for so many connections, of so many each; return how many there may be."""
    try:
        import resource
    except ImportError:
        return most  # Windows has no such limit
    needed = each * most + POOL_SIZE + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        if soft < needed:
            return max((soft - POOL_SIZE - SPARE_DESCRIPTORS) // each, 1)
    return most


def build_server(settings, store, log=None):
    """Return the gateway's server, bound and ready to serve; `log` takes the finished requests' lines, joined."""
    tls = server_tls(settings)
    upstream = Upstream(settings.ollama_url, settings.connect_timeout, settings.first_byte_timeout,
                        settings.stall_timeout)
    health = HealthProbe(upstream)
    limits = ClientLimits(settings.max_body, settings.header_timeout, settings.idle_timeout,
                          BodyStorage(settings.max_spool))
    # A connection's descriptors at most: its socket, a spooled body, and either the upstream connection or, while it
    # waits in the queue, the two of its wakeup, which are closed before the upstream connection is opened.
    connections = ConnectionLimiter(connections_that_fit(settings.max_connections, 4 if settings.max_parallel else 3),
                                    settings.trusted_proxies)
    tokens = TokenCache(store)
    ledger = UsageLedger(store, tokens)
    queue = FairQueue(settings.max_parallel, settings.max_queue, settings.queue_timeout)
    limiter = Limiter(queue, ledger)
    gauges = {"in_flight_requests": ("Inference requests that are upstream.", lambda: queue.running),
              "queued_requests": ("Inference requests that wait for their turn.", lambda: queue.waiting),
              "connections": ("Open connections of clients.", lambda: len(connections))}
    metrics = Metrics(gauges)
    routes = served_routes(settings.metrics_open, settings.no_admin_api)
    gateway = Gateway(
        proxies=TrustedProxies(settings.trusted_proxies),
        router=Router(routes, settings.base_path, settings.path_tokens, settings.cors_origins),
        authenticator=Authenticator(tokens, AuthThrottle()),
        limiter=limiter,
        upstream=upstream,
        health=health,
        connections=connections,
        relay=relay,
        count_prompt=functools.partial(PromptCount, TokenRatio()),
        journal=Journal(ledger, metrics, log or LOG.info),
        pages=Pages(routes, settings.base_path, store, health, ledger, limiter, metrics, gauges))
    try:
        return GatewayServer(settings.host, settings.port, Handler, gateway, limits, connections, tls)
    except (OSError, UnicodeError) as error:
        gateway.close()
        raise Failure(f"cannot listen on {settings.host} port {settings.port}: "
                      f"{getattr(error, 'strerror', None) or error}; "
                      "choose another with --host and --port") from None

# == Commands =================================================================

PROGRAM = "python3 ollama_gateway.py"
PURPOSE = "Authenticating reverse proxy for Ollama: a token for each person and device"
DEFAULT_ARGS = dict(env_file=None, json=False, quiet=False, format=None)  # what commands ask for whether typed or not
BAR_COLUMNS, MOST_BAR_COLUMNS = 10, 60
EXPORT_VERSION = 2          # 1 knew no limits
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "'")  # a spreadsheet takes a cell that starts so for a formula, or for a quote


def print_line(text):
    """Print to stdout; raise OSError if it cannot be written."""
    print(text, flush=True)


def print_error(text):
    """Print to stderr, if it can be written."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def format_day(seconds, otherwise):
    return otherwise if seconds is None else format_instant(seconds)[:10]


def format_minute(seconds, otherwise):
    return otherwise if seconds is None else format_instant(seconds)[:16].replace("T", " ")


def terminal_width():
    """Return how many columns there are for what is printed, 0 where it goes into a file or another program."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def can_show(text):
    """Tell whether stdout's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeError:
        return False
    return True


def text_width(text):
    """Return how many columns of a terminal a text takes."""
    import unicodedata  # which `serve` never needs
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def fit_width(text, columns):
    """Return a text cut or padded to so many columns."""
    if text_width(text) > columns:
        while text_width(text) >= columns:
            text = text[:-1]
        text += "…"
    return text + " " * (columns - text_width(text))


def format_table(rows, width, elastic, dispensable):
    """Return rows, the first of them the columns' names, as aligned lines that fit the width, 0 for any.

    What is too wide is taken from elastic columns, down to 8, and then dispensable ones go, one after the other.
    """
    widths = [max(map(text_width, column)) for column in zip(*rows)]
    names = [name.strip() for name in rows[0]]
    elastic = [at for at, name in enumerate(names) if name in elastic]
    spare = sum(max(widths[at] - 8, 0) for at in elastic)
    excess = sum(widths) + 2 * len(widths) - 2 - (width or sys.maxsize)
    going = [names.index(name) for name in dispensable if name in names]
    if excess > spare and going:
        rows = [row[:going[0]] + row[going[0] + 1:] for row in rows]
        return format_table(rows, width, [names[at] for at in elastic], dispensable)
    for _ in range(min(excess, spare)):
        widths[max(elastic, key=lambda at: widths[at])] -= 1
    return ["  ".join(fit_width(cell, columns) for cell, columns in zip(row, widths)).rstrip() for row in rows]


def limit_phrases(token):
    """Return a token's limits, each in a few words."""
    return [limit.phrase.format(getattr(token, limit.column)) for limit in LIMITS if getattr(token, limit.column)]


def describe(token):
    """Return a token and all it may in a sentence's part."""
    limits = "; ".join(limit_phrases(token))
    return (f'the {"admin " if token.admin else ""}token "{token.user}/{token.name}", which '
            + (f"expires {format_instant(token.expires_at)}" if token.expires_at else "does not expire")
            + (f" (limits: {limits})" if limits else ""))


def columns_in_flags(args):
    """Return the values of the flags for SETTABLE that were given, by column; raise UsageError."""
    found = {}
    for column in SETTABLE:
        if hasattr(args, column):
            try:
                found[column] = read_column(column, getattr(args, column))
            except ValueError as error:
                flag = LIMIT_BY_COLUMN[column].flag if column in LIMIT_BY_COLUMN else "--expires"
                raise UsageError(f'{flag}: "{getattr(args, column)}" {error}') from None
    return found


def command_settings(args, *wanted):
    """Return what flag, environment or .env say of some settings, to a command that does not serve."""
    typed = {"db": getattr(args, "db", None)}   # its other flags are its own
    return load_settings(typed, os.environ, args.env_file, [option for option in OPTIONS if option.flag in wanted])


def open_command_store(args, create=False):
    """Open the database that flag, environment or .env name for a command."""
    return open_store(command_settings(args, "--db").db, create)


def url_of(settings):
    """Return where `serve` with these settings is to be found from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.tls_cert else 'http'}://{host}:{settings.port}"


def local_url(args):
    """Return where clients on this machine find /api."""
    settings = command_settings(args, "--host", "--port", "--tls-cert", "--base-path")
    return url_of(settings) + settings.base_path


def boxed(text, width):
    """Return a line in a frame as wide as needed, or, on a narrower terminal, between rules: selected, it is whole."""
    across, down, *corners = "─│╭╮╰╯" if can_show("─│╭╮╰╯") else "-|++++"
    rule = across * (len(text) + 4)
    if width < len(rule) + 2:
        return f"{across * (width - 1)}\n{text}\n{across * (width - 1)}"
    return f"{corners[0]}{rule}{corners[1]}\n{down}  {text}  {down}\n{corners[2]}{rule}{corners[3]}"


def show_secret(args, store, done, token, secret):
    """Show a new secret, this once: alone, as JSON, or with how to use it."""
    if args.quiet:
        return print_line(secret)
    if args.json:
        return print_line(json.dumps(dict(token_json(token), token=secret), indent=2))
    shown = boxed(secret, terminal_width()) if terminal_width() else "    " + secret
    print_line(f"{done} {describe(token)}, in {store.path}\n\n{shown}\n\n"
               "It is shown only now; keep it like a password. To use it:\n\n"
               f'    curl -H "Authorization: Bearer {secret}" {local_url(args)}/tags')


def cmd_token_create(args):
    with open_command_store(args, create=True) as store:
        token, secret = store.create(args.user, args.name, admin=getattr(args, "admin", False), **columns_in_flags(args))
        show_secret(args, store, "Created", token, secret)


def cmd_token_rotate(args):
    with open_command_store(args) as store:
        token, secret = store.rotate(args.user, args.name)
        show_secret(args, store, "Gave a new secret to", token, secret)


TOKEN_COLUMNS = (
    ("USER", lambda token: token.user),
    ("NAME", lambda token: token.name),
    ("SECRET", lambda token: token.hint + "…"),
    ("CREATED", lambda token: format_day(token.created_at, "")),
    ("EXPIRES", lambda token: "expired" if is_expired(token) else format_day(token.expires_at, "never")),
    ("LAST USED", lambda token: format_minute(token.last_used_at, "never")),
    ("ADMIN", lambda token: "admin" if token.admin else ""),
    *((limit.heading, operator.attrgetter(limit.column)) for limit in LIMITS),
)


def cmd_token_list(args):
    with open_command_store(args) as store:
        tokens = store.list(getattr(args, "user", None))
        if args.json:
            return print_line(json.dumps([token_json(token) for token in tokens], indent=2))
        if not tokens:
            whose = f' of "{args.user}"' if hasattr(args, "user") else ""
            return print_line(f"No tokens{whose} in {store.path}.")
        columns = [(head, *(str(tell(token) or "") for token in tokens)) for head, tell in TOKEN_COLUMNS]
        shown = [column for column in columns if any(column[1:])]
        for line in format_table(list(zip(*shown)), terminal_width(), ("USER", "NAME", "MODELS"),
                                 ("CREATED", "EXPIRES", "SECRET", "LAST USED")):
            print_line(line)
        print_line(f"{plural(len(tokens), 'token')} in {store.path}")


def cmd_token_update(args):
    changes = columns_in_flags(args)
    if hasattr(args, "admin"):
        changes["admin"] = args.admin
    if not changes:
        raise UsageError("token update: say what to change: --expires, --admin, --no-admin, or a limit")
    with open_command_store(args) as store:
        print_line(f"Changed {describe(store.update(args.user, args.name, **changes))}, in {store.path}")


def cmd_token_delete(args):
    with open_command_store(args) as store:
        token = store.delete(args.user, args.name)
        print_line(f'Deleted the token "{token.user}/{token.name}" from {store.path}: it stops at its next request.')


def as_csv(keys, rows):
    """Write rows, dictionaries, as CSV that a spreadsheet takes for text."""
    import csv  # here and in exported_rows: `serve` never needs it
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(keys)
    for row in rows:
        cells = ["" if row[key] is None else str(row[key]) for key in keys]
        writer.writerow(["'" + cell if cell.startswith(FORMULA_STARTS) else cell for cell in cells])
    return file.getvalue()


def replace_file(path, text):
    """Put text in the place of a file at once, readable by its owner alone."""
    temporary = f"{path}.{os.getpid()}.new"
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise Failure(f"cannot write {path}: {error.strerror}") from None


def export_format(file, form):
    """Return the format that is asked for, or else the file's by its ending."""
    form = form or ("json" if file == "-" else file.rpartition(".")[2].lower())
    if form not in ("csv", "json"):
        raise UsageError(f'token export: "{file}" ends neither in .csv nor in .json: add --format csv or json')
    return form


def cmd_token_export(args):
    form = export_format(args.file, args.format)
    with open_command_store(args) as store:
        rows = [dict(row, **{key: format_instant(row[key]) for key in row if key.endswith("_at")},
                     admin=bool(row["admin"])) for row in store.export_rows()]
        if form == "csv":
            text = as_csv(("version",) + TokenStore.EXPORTED, [dict(row, version=EXPORT_VERSION) for row in rows])
        else:
            text = json.dumps({"version": EXPORT_VERSION, "tokens": rows}, indent=2)
        if args.file == "-":
            return print_line(text.rstrip("\n"))
        replace_file(args.file, text.rstrip("\n") + "\n")
        print_line(f"Exported {plural(len(rows), 'token')} from {store.path} to {args.file}")


def exported_rows(text):
    """Return the rows of an exported file, either format, as dictionaries of what stands in it; raise ValueError."""
    import csv
    if text.lstrip().startswith("{"):
        whole = json.loads(text)
        rows = whole.get("tokens")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it has no list of tokens")
        versions = {str(whole.get("version"))}
    else:
        reader = csv.DictReader(io.StringIO(text, newline=""), restkey="")
        try:
            rows = [{key: cell[1:] if cell and cell.startswith("'") else cell for key, cell in row.items() if key}
                    for row in reader]
        except csv.Error as error:
            raise ValueError(str(error)) from None
        if "version" not in (reader.fieldnames or ()):
            raise ValueError("its first line does not name the columns")
        if any(None in row.values() for row in rows):
            raise ValueError("a row ends early")
        versions = {row["version"] for row in rows}
    if versions - set(map(str, range(1, EXPORT_VERSION + 1))):
        raise ValueError(f"its version is {' and '.join(sorted(versions))}, this program reads up to {EXPORT_VERSION}")
    return [dict(dict.fromkeys(LIMIT_BY_COLUMN), **row) for row in rows] if versions == {"1"} else rows


def imported_limit(column, value):
    """Read a limit of an exported row; raise ValueError naming it."""
    try:
        return None if value in (None, "") else LIMIT_BY_COLUMN[column].read(str(value))
    except ValueError as error:
        raise ValueError(f'{column}: "{value}" {error}') from None


def imported_row(row, number):
    """Return an exported row as the store takes it; raise ValueError naming the row and what is wrong with it."""
    try:
        texts = {key: row.get(key) or None for key in TokenStore.EXPORTED if key not in ("admin", *LIMIT_BY_COLUMN)}
        for key, value in texts.items():
            if not isinstance(value, str) and (value or key not in ("hint", "expires_at", "last_used_at")):
                raise ValueError(f"it has no {key}")
        hint = texts["hint"] or ""
        if not re.fullmatch("[0-9a-f]{64}", texts["digest"]):
            raise ValueError("its digest is not a SHA-256")
        if len(hint) > HINT_LENGTH or not hint.isprintable():
            raise ValueError(f"its hint is not up to {HINT_LENGTH} printable characters")
        times = {key: parse_instant(texts[key]) if texts[key] else None for key in texts if key.endswith("_at")}
        limits = {key: imported_limit(key, row[key]) for key in LIMIT_BY_COLUMN}
        admin = int(boolean(str(row.get("admin"))))
        check_rights(row.get("user"), row.get("name"), admin, limits["models"])
        return dict(texts, hint=hint, user=check_name("user", texts["user"]), name=check_name("name", texts["name"]),
                    admin=admin, **times, **limits)
    except KeyError as error:
        raise ValueError(f"row {number}: it has no {error.args[0]}") from None
    except (ValueError, UsageError) as error:
        raise ValueError(f"row {number}: {error}") from None


def cmd_token_import(args):
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin if args.file == "-" else stack.enter_context(open(args.file, encoding="utf-8-sig"))
            text = file.read()
        rows = [imported_row(row, number) for number, row in enumerate(exported_rows(text.lstrip("\ufeff")), 1)]
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"cannot read {args.file}: {getattr(error, 'strerror', None) or error}") from None
    except (ValueError, RecursionError) as error:
        raise Failure(f'{args.file} is not a file written by "token export": {error}; nothing was imported') from None
    with open_command_store(args, create=True) as store:
        added = store.import_rows(rows)
        print_line(f"Imported {plural(added, 'token')} into {store.path}; "
                   f"already there: {len(rows) - added}")


def tokens_in(row):
    return tokens_used(row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"])


def format_bars(shares, columns):
    """Return a bar for each share of 0 to 1, the whole of so many columns long."""
    eighths = "▏▎▍▌▋▊▉"
    if not can_show(eighths):
        return ["#" * round(share * columns) for share in shares]
    lengths = [round(share * columns * 8) for share in shares]
    return ["█" * (length // 8) + (eighths[length % 8 - 1] if length % 8 else "") for length in lengths]


def usage_table(rows, keys, width):
    """Return the account's rows as a table's lines, with a bar each where the width, 0 for none, leaves room for it."""
    shown = [column for column in MEASURED
             if column not in ("cached_tokens", "estimated_tokens") or any(row[column] for row in rows)]
    numbers = [[column.replace("_tokens", "").upper() for column in shown]]
    numbers += [["unknown" if row[column] is None else f"{row[column]:.1f}" if column == "seconds" else str(row[column])
                 for column in shown] for row in rows]
    widths = [max(map(len, column)) for column in zip(*numbers)]
    names = [[key.upper() for key in keys]] + [[row[key] or "-" for key in keys] for row in rows]
    cells = [[*name, *(cell.rjust(columns) for cell, columns in zip(number, widths))]
             for name, number in zip(names, numbers)]
    room = width - max(map(text_width, format_table(cells, 0, (), ()))) - 2
    if room < BAR_COLUMNS:
        return format_table(cells, width, cells[0][:len(keys)],
                            ("ESTIMATED", "SECONDS", "CANCELLED", "ERRORS", "CACHED", "REQUESTS"))
    amounts = [tokens_in(row) for row in rows]
    shares = format_bars([amount / (max(amounts) or 1) for amount in amounts], min(room, MOST_BAR_COLUMNS))
    return format_table([cell + [bar] for cell, bar in zip(cells, ["TOKENS", *shares])], width, cells[0][:len(keys)], ())


def cmd_usage(args):
    """Print the account."""
    by, typed = getattr(args, "by", "user"), getattr(args, "since", "7d")
    try:
        since = usage_start(typed)
    except ValueError as error:
        raise UsageError(f'--since: "{typed}" {error}') from None
    with open_command_store(args) as store:
        rows = store.usage(by, since)
        if args.json:
            return print_line(json.dumps(rows, indent=2))
        if args.format == "csv":
            return print_line(as_csv(USAGE_BY[by] + MEASURED, rows).rstrip("\n"))
        for line in usage_table(rows, USAGE_BY[by], terminal_width()) if rows else ():
            print_line(line)
        print_line(f"{plural(sum(row['requests'] for row in rows), 'request')}, {plural(sum(map(tokens_in, rows)), 'token')} "
                   f"since {format_minute(since, '')} UTC in {store.path}")


@contextlib.contextmanager
def configure_logging(settings):
    """Log to stderr and, if the settings name one, to a LogFile, which the with block gets; flush both at its end."""
    file, writers = None, []
    if settings.log_file:
        try:
            file = LogFile(settings.log_file)
        except (OSError, ValueError) as error:
            raise Failure(f"cannot write the log file {settings.log_file!a}: "
                          f"{getattr(error, 'strerror', error)}") from None
        writers.append(LogWriter(settings.log_file, file.write, settings.log_file_level))
    if sys.stderr:  # if that was closed from the start, its number is another file's
        write = functools.partial(write_all, sys.stderr.fileno())
        writers.append(LogWriter("stderr", write, settings.log_level))
    LOG.propagate = False
    LOG.setLevel(min((writer.level for writer in writers), default=logging.CRITICAL))
    for writer in writers:
        LOG.addHandler(writer)
    try:
        yield file
    finally:
        for writer in writers:
            writer.finish()
            LOG.removeHandler(writer)


def reload(server, settings, log_file):
    """Reopen the log file and load the certificate again; one that fails stays as it was."""
    def load_certificate():
        server.tls = server_tls(settings)
    done = []
    for what, path, renew in (("log file", settings.log_file, log_file and log_file.reopen),
                              ("certificate", settings.tls_cert, load_certificate)):
        try:
            if path:
                renew()
                done.append(f"the {what} {path}")
        except (Failure, OSError) as error:
            LOG.error("SIGHUP: the old %s stays: %s", what, error)
    LOG.info("SIGHUP: reloaded %s", " and ".join(done) or "nothing")


def reload_on_hangup(server, settings, log_file):
    """Reload on SIGHUP, where there is one; in a thread, since a blocked stderr must not stop the main one."""
    def handle(*_):
        with contextlib.suppress(RuntimeError):  # no thread could be started
            threading.Thread(target=reload, args=(server, settings, log_file), name="reload", daemon=True).start()
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, handle)


def is_loopback(host):
    return host == "::1" or host.startswith("127.")


def announce(settings, server, store):
    """Say on stderr where the gateway is, what stands behind it, and what the owner should mind."""
    host = server.server_address[0]
    health = server.gateway.health
    state = f"which has {plural(len(health.models), 'model')}" if health.up else "which DOES NOT ANSWER yet"
    tokens = len(store.list())
    held = f"{plural(tokens, 'token')} in {store.path}"
    if not tokens:
        held = f"nobody gets in without a token: make one with {PROGRAM} token create USER NAME --db {store.path}"
    print_error(f"ollama_gateway {VERSION} at {server.url}, before {settings.ollama_url.geturl()}, {state}; {held}")
    if server.connections.most < settings.max_connections:
        print_error(f"Only {server.connections.most} connections fit the limit of open files, "
                    f"not {settings.max_connections}: raise it (ulimit -n) or lower --max-connections.")
    if not store.writable:
        print_error("The database is read-only: a change of tokens counts from the next start.")
    if remote_file_system(store.path):
        LOG.warning("the database %s is on a network or FUSE file system (%s): its changes may be lost, "
                    "move it to a local disk (--db)", store.path, remote_file_system(store.path))
    if not server.tls and not is_loopback(host):
        print_error(f"Warning: {host} can be reached from the network, and without TLS tokens travel in clear: "
                    "use --tls-cert, or a proxy that speaks HTTPS, and --host 127.0.0.1.")


def cmd_serve(args):
    """Run the gateway until it is told to stop."""
    settings = load_settings(vars(args), os.environ, args.env_file)
    os.umask(0o077)  # logs and what SQLite puts beside the database are the owner's alone, too
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with configure_logging(settings) as log_file, open_store(settings.db, create=True) as store:
        server = build_server(settings, store)
        try:
            reload_on_hangup(server, settings, log_file)
            server.gateway.health.start(functools.partial(announce, settings, server, store))
            with CpuAffinity():
                server.serve_forever()
        except KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt):  # a second one does not wait
                server.stop(settings.drain_timeout)
        finally:
            for number in signal.SIGINT, signal.SIGTERM:
                signal.signal(number, signal.SIG_IGN)   # what follows takes few seconds, and stores the account
            server.server_close()


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves examples as they are, and no line longer than 80 columns."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=26, width=min(shutil.get_terminal_size().columns, 80) - 2)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations and without defaults of its own: what was not typed is not there."""

    def __init__(self, **how):
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=HelpFormatter, **how)

    def _flags(self):
        """Yield the flags, those of commands too."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action.choices, dict):
                for command in action.choices.values():     # --by's choices are a dict, too, but of no parsers
                    yield from getattr(command, "_flags", tuple)()

    def _print_message(self, message, file=None):
        """Print help or an error; argparse ignores a stdout that cannot be written."""
        (print_line if file is sys.stdout else print_error)(message.rstrip("\n"))

    def error(self, message):
        """Say what is wrong, and what was probably meant."""
        import difflib  # which nobody needs who types well
        wrong = re.search(r"(invalid choice|unrecognized arguments): '?([^\s'=]+)", message)
        known = wrong and (self._flags() if wrong[1][0] == "u" else re.findall(r"[\w-]+", message[wrong.end():]))
        near = wrong and difflib.get_close_matches(wrong[2], known, 1)
        super().error(message + (f'; did you mean "{near[0]}"?' if near else ""))


def add_serve(parser):
    parser.usage = "%(prog)s [OPTION ...]"
    for title, options in OPTION_GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            how = dict(action="store_const", const="on") if option.convert is boolean else dict(metavar=option.metavar)
            default = f", default {option.default}" if option.default else ""
            if option is not DATABASE_OPTION:
                group.add_argument(option.flag, help=f"{option.help} ({option.variable}{default})", **how)


def add_names(parser):
    parser.add_argument("user", metavar="USER", help="owner of the token: a person")
    parser.add_argument("name", metavar="NAME", help="label of the token: a device, a program")


def add_rights(parser):
    parser.add_argument("--expires", dest="expires_at", metavar="WHEN",
                        help='30d, 2027-01-31 (00:00 UTC), 2027-01-31T18:00:00Z, or "none": never')
    parser.add_argument("--admin", action="store_true",
                        help="may manage tokens and models, and act as the owner's ollama.com account")


def add_limits(parser):
    group = parser.add_argument_group('limits ("none" removes one)')
    for limit in LIMITS:
        group.add_argument(limit.flag, metavar=limit.metavar, help=limit.help)


def add_usage(parser):
    parser.add_argument("--by", choices=USAGE_BY, help="what each row stands for (default: user)")
    parser.add_argument("--since", metavar="WHEN", help="7d (of UTC, today included), 12h or 2027-01-31 (default: 7d)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON list")
    form.add_argument("--csv", dest="format", action="store_const", const="csv", help="print CSV")


def add_no_admin(parser):
    parser.add_argument("--no-admin", dest="admin", action="store_false", help="take the admin rights away")


def add_secret_form(parser):
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quiet", action="store_true", help="print the secret alone")
    form.add_argument("--json", action="store_true", help="print the token as JSON")


def add_list_form(parser):
    parser.add_argument("--user", metavar="USER", help="only this user's")
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def add_export_file(parser):
    parser.add_argument("file", metavar="FILE", help='a .csv or .json file; "-" is JSON on stdout')
    parser.add_argument("--format", choices=("csv", "json"), help="format, whatever the name of the file")


def add_import_file(parser):
    parser.add_argument("file", metavar="FILE", help='what "token export" wrote; "-" is stdin')


COMMANDS = (    # name, what runs, help, examples, what it takes
    ("serve", cmd_serve, "run the gateway", ("serve", "serve --host 0.0.0.0 --tls-cert box.pem"),
     (add_serve,)),
    ("usage", cmd_usage, "show usage by user, token, model or day", ("usage", "usage --by model --since 30d --csv"), (add_usage,)),
)
TOKEN_COMMANDS = (
    ("create", cmd_token_create, "create a token and show its secret, once",
     ("token create ada laptop --expires 90d", "token create kim school --models 'llama3*' --rpm 60"),
     (add_names, add_rights, add_limits, add_secret_form)),
    ("list", cmd_token_list, "list the tokens", ("token list --user ada",), (add_list_form,)),
    ("update", cmd_token_update, "change a token; this counts from its next request",
     ("token update ada laptop --expires none --rpm 30",), (add_names, add_rights, add_no_admin, add_limits)),
    ("rotate", cmd_token_rotate, "give a token a new secret, and nothing else", ("token rotate ada laptop",),
     (add_names, add_secret_form)),
    ("delete", cmd_token_delete, "delete a token; it stops working at its next request", ("token delete ada laptop",),
     (add_names,)),
    ("export", cmd_token_export, "write all tokens to a file: digests, never secrets", ("token export tokens.csv",),
     (add_export_file,)),
    ("import", cmd_token_import, "add the tokens of an exported file, all or none", ("token import tokens.csv",),
     (add_import_file,)),
)


def help_texts(text, examples):
    """Return how a command's help begins and ends."""
    return dict(description=f"{text[0].upper()}{text[1:]}.",
                epilog="examples:\n" + "\n".join(f"  {PROGRAM} {example}" for example in examples))


def add_command(commands, common, name, run, text, examples, takes):
    """Add a command to the parser of a group."""
    parser = commands.add_parser(name, parents=[common], help=text, **help_texts(text, examples))
    parser.set_defaults(run=run)
    for add in takes:
        add(parser)

# == Menu =====================================================================

ESCAPE_SECONDS = 0.05       # the rest of a key's escape sequence arrives within this time, over a slow line too
SIGNAL_SECONDS = 0.2        # a signal that arrives just before a wait for a key is noticed within this time
BEGUN_SEQUENCE = re.compile(rb"\x1b([\[O][0-9;]*)?")
KEYS = (("enter", rb"[\r\n]"), ("back", rb"\x1b"),
        ("up", rb"\x1b[\[O][0-9;]*A|\x10"), ("down", rb"\x1b[\[O][0-9;]*B|\x0e"),
        ("home", rb"\x1b[\[O][0-9;]*H|\x1b\[[17]~|\x01"), ("end", rb"\x1b[\[O][0-9;]*F|\x1b\[[48]~|\x05"),
        ("page up", rb"\x1b\[5~"), ("page down", rb"\x1b\[6~"))
BOLD, DIM, RED, CYAN = "1", "2", "31", "36"
BACK = ("<", "\x1b")        # lines that go back to the question before


def printable_text(text):
    """Return a text as stdout can show it, on one line, without control characters."""
    encoding = sys.stdout.encoding or "ascii"
    return _printable(text).encode(encoding, "backslashreplace").decode(encoding)


def move_cursor(key, at, digits, number, page):
    """Return the index that a key leads to in a list of `number` lines, and the digits typed for it so far."""
    if re.fullmatch("[0-9]", key):
        for typed in digits + key, key:
            if 1 <= int(typed) <= number:
                return int(typed) - 1, typed
    places = {"up": (at - 1) % number, "down": (at + 1) % number, "home": 0, "end": number - 1,
              "page up": max(at - page, 0), "page down": min(at + page, number - 1)}
    return places.get(key, at), ""


class LinePrompt:
    """Asks line by line: for pipes, plain terminals, and systems without termios or readline."""

    def choose(self, title, labels, at=0):
        """Return the index of the chosen label, or None to go back."""
        def check(text):
            if not re.fullmatch("[0-9]{1,9}", text) or int(text) > len(labels):
                raise ValueError(f"is not a number from 0 to {len(labels)}")
        digits = len(str(len(labels)))
        for number, label in (("", title), *enumerate(labels, 1), (0, "Back")):
            print_line(printable_text(f"{number:{digits}}  {label}" if label is not title else title))
        answer = self.ask("Number", str(at + 1), check)
        return int(answer) - 1 if answer and int(answer) else None

    def ask(self, question, default, check):
        """Return a line that `check` accepts, the default for an empty line, or None to go back."""
        prompt = printable_text(f"{question} [{default}]: " if default else f"{question}: ")
        while True:
            answer = self._read_line(prompt).strip() or default
            if not sys.stdin.isatty():
                print_line(printable_text(answer))  # else the next prompt would follow on the same line
            if answer in BACK:
                return None
            try:
                check(answer)
                return answer
            except ValueError as error:
                self.complain(f'"{answer}" {error}')
            except (UsageError, Failure) as error:
                self.complain(str(error))

    def complain(self, text):
        print_line(self._paint(printable_text(text), RED))

    def _read_line(self, prompt):
        return input(prompt)

    def _paint(self, text, _):
        return text


class ArrowPrompt(LinePrompt):
    """Asks on a terminal: lists by arrow keys, everything else by input().

    The terminal is in raw mode only while a list is open. Keys are read one byte at a time, as readline does:
    the keys that follow may be for input().
    """

    def __init__(self):
        import readline     # input() uses it; Windows has neither module
        import termios
        self._readline, self._termios = readline, termios
        self._normal, self._raw = termios.tcgetattr(sys.stdin), termios.tcgetattr(sys.stdin)
        self._raw[3] &= ~(termios.ICANON | termios.ECHO | termios.IEXTEN)
        self._raw[6][termios.VMIN], self._raw[6][termios.VTIME] = 1, 0
        self._drawn, self._ahead = [], b""
        for enter in "jm":  # Escape and Enter go back from a line, too
            readline.parse_and_bind(rf'"\e\C-{enter}": "\C-e\C-u{BACK[0]}\C-{enter}"')

    @contextlib.contextmanager
    def handling_signals(self):
        """Handle signals in the with block so that each of them leaves or suspends a terminal in its normal mode.

        Python runs a handler when the wait for a key is interrupted. The timer interrupts it for a signal that came
        just before, and alone raises: input() of Python 3.8 fails if a handler is left to run after an exception.
        """
        left = threading.Event()

        def leave(*_):
            if not left.is_set():   # a second signal must not interrupt the cleanup
                left.set()
                signal.setitimer(signal.ITIMER_REAL, 1e-6, SIGNAL_SECONDS)

        def interrupt(*_):
            if left.is_set():
                signal.setitimer(signal.ITIMER_REAL, 0)
                raise KeyboardInterrupt
        handlers = dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT), leave)
        handlers.update({signal.SIGTSTP: self._suspend, signal.SIGALRM: interrupt})
        with contextlib.ExitStack() as stack:
            for number, handler in handlers.items():
                stack.callback(signal.signal, number, signal.signal(number, handler))
            stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_REAL, SIGNAL_SECONDS, SIGNAL_SECONDS)
            stack.callback(self._set_mode, self._normal)
            yield self

    def choose(self, title, labels, at=0):
        key = digits = ""
        try:
            self._set_mode(self._raw)
            print_line(self._paint(printable_text(title), BOLD))
            while key not in ("enter", "back"):
                rows = max(min(shutil.get_terminal_size().lines - 3, len(labels)), 1)
                at, digits = move_cursor(key, at, digits, len(labels), rows)
                self._draw(self._list_lines(labels, at, rows))
                key = self._read_key()
        finally:
            self._set_mode(self._normal)
            self._draw(())
        print_line(printable_text("> " + (re.sub("  +", ", ", labels[at]) if key == "enter" else "Back")))
        return at if key == "enter" else None

    @staticmethod
    def _list_lines(labels, at, rows):
        """Yield as many lines of a list as there are rows, with the selected one in the middle where possible."""
        start, digits = max(min(at - rows // 2, len(labels) - rows), 0), len(str(len(labels)))
        pointer = "❯" if can_show("❯") else ">"
        for here in range(start, start + rows):
            selected = here == at
            yield f"{pointer if selected else ' '} {here + 1:{digits}}  {labels[here]}", CYAN if selected else ""
        yield f"Enter chooses, Esc goes back ({at + 1}/{len(labels)})", DIM

    def _draw(self, lines):
        """Draw (text, colour) lines in the place of those drawn before, which a narrower terminal has wrapped."""
        columns = max(shutil.get_terminal_size().columns, 20)
        up = sum(max(1, -(-text_width(text) // columns)) for text, _ in self._drawn) - 1
        self._drawn = [(fit_width(printable_text(text), columns - 1).rstrip(), colour) for text, colour in lines]
        shown = "\n".join(self._paint(text, colour) for text, colour in self._drawn)
        print((f"\x1b[{up}A" if up > 0 else "") + "\r\x1b[J" + shown, end="", flush=True)

    def _read_key(self):
        """Return the name of the next key, or its text; raise EOFError for Ctrl-D and a closed terminal."""
        key, self._ahead = self._ahead or self._read_byte(), b""
        while BEGUN_SEQUENCE.fullmatch(key) and select.select([sys.stdin], (), (), ESCAPE_SECONDS)[0]:
            key += self._read_byte()
        if key[:1] == b"\x1b" and not re.fullmatch(rb"\x1b[\[O][0-9;]*[@-~]", key):
            key, self._ahead = key[:1], key[1:]     # Escape, and another key close behind it
        return next((name for name, pattern in KEYS if re.fullmatch(pattern, key)), key.decode("ascii", "ignore"))

    @staticmethod
    def _read_byte():
        byte = b""
        with contextlib.suppress(OSError):  # the terminal was closed
            byte = os.read(sys.stdin.fileno(), 1)
        if byte in (b"", b"\x04"):
            raise EOFError
        return byte

    def _read_line(self, prompt):
        ahead, self._ahead = self._ahead.decode("ascii", "ignore"), b""
        if ahead in ("\n", "\x1b"):
            print_line(prompt)
            return ahead
        self._readline.set_startup_hook(functools.partial(self._readline.insert_text, ahead))
        return input(prompt)

    def _suspend(self, *_):
        mode = self._termios.tcgetattr(sys.stdin)
        self._set_mode(self._normal)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)    # returns when the process is continued
        signal.signal(signal.SIGTSTP, self._suspend)
        self._set_mode(mode)
        lines, self._drawn = self._drawn, []    # the shell has written below the list
        self._draw(lines)

    def _set_mode(self, mode):
        with contextlib.suppress(self._termios.error):  # the terminal was closed
            self._termios.tcsetattr(sys.stdin, self._termios.TCSANOW, mode)

    def _paint(self, text, colour):
        return f"\x1b[{colour}m{text}\x1b[0m" if colour and not os.environ.get("NO_COLOR") else text


SKIP = object()     # the answer of a question that the answers before it make needless
NO_YES = (("No", False), ("Yes", True))
QUESTIONS = {"expires_at": "Expires (30d, 2027-01-31, none)", "admin": "Admin (may manage models and tokens)",
             **{limit.column: limit.label + (limit.example and f" (as {limit.example})") for limit in LIMITS}}


class Menu:
    """The actions: each one asks for the arguments of a command and runs it.

    A question returns a value, SKIP, or None to go back to the question before.
    """

    def __init__(self, prompt, **args):
        self._prompt, self._args = prompt, dict(DEFAULT_ARGS, **args)

    def run(self):
        """Offer the actions until the user leaves."""
        at = 0
        while True:
            print_line("")
            at = self._prompt.choose("Ollama Gateway", [label for label, *_ in self.ACTIONS], at)
            _, command, *questions = self.ACTIONS[-1 if at is None else at]
            if not command:
                return
            self._attempt(self._ask_and_run, command, questions)

    def _attempt(self, call, *args):
        """Call a function; report why it failed, and go on."""
        try:
            call(*args)
        except (UsageError, Failure) as error:
            self._prompt.complain(str(error))

    def _ask_and_run(self, command, questions):
        """Ask (name, question) pairs in order, each with the answers so far, and run the command with all answers."""
        answers, answered, at = {}, [], 0
        while at < len(questions):
            name, question = questions[at]
            answer = question(self, answers)
            if answer is None:
                if not answered:
                    return
                at = answered.pop()
                answers.pop(questions[at][0], None)
                continue
            if answer is not SKIP:
                answers[name] = answer
                answered.append(at)
            at += 1
        if answers.get("sure", True):
            self._run(command, answers)

    def _run(self, command, answers):
        command(argparse.Namespace(**self._args, **answers))

    def _tokens(self, user=None):
        with open_command_store(argparse.Namespace(**self._args)) as store:
            return [token for token in store.list() if user in (None, token.user)]

    def _choose(self, title, options, present=None):
        """Return the value of the chosen (label, value) pair, or None to go back."""
        labels, values = zip(*options)
        at = self._prompt.choose(title, labels, values.index(present) if present in values else 0)
        return None if at is None else values[at]

    def _ask_value(self, column, present):
        if column == "admin":
            return self._choose(QUESTIONS[column], NO_YES, present == "Yes")
        return self._prompt.ask(QUESTIONS[column], present, functools.partial(read_column, column))

    def _ask_owner(self, _):
        users = dict.fromkeys(token.user for token in self._tokens())
        return self._choose("Whose token?", (("A new user", ""), *zip(users, users))) if users else SKIP

    def _ask_new_user(self, answers):
        if answers.get("user"):
            return SKIP
        return self._prompt.ask("User (a person)", "", functools.partial(check_name, "user"))

    def _ask_new_name(self, answers):
        """Ask for a name that the user has no token of yet."""
        taken = {token.name for token in self._tokens(answers["user"])}

        def check(name):
            if check_name("name", name) in taken:
                raise token_exists(answers["user"], name)
        names = itertools.chain(["laptop"], map("laptop-{}".format, itertools.count(2)))
        return self._prompt.ask("Name (a device, a program)", next(name for name in names if name not in taken), check)

    def _limit(column):     # noqa: N805, used in the table below
        def ask(self, answers):
            needless = not answers["limits"] or column == "models" and answers["admin"]
            return SKIP if needless else self._ask_value(column, "none")
        return column, ask

    def _ask_user(self, _):
        counts = Counter(token.user for token in self._tokens())
        if not counts:
            raise Failure("There are no tokens yet: generate one first.")
        return self._choose("Whose token?", [(f"{user} ({plural(counts[user], 'token')})", user) for user in counts])

    def _ask_name(self, answers):
        tokens, heads, cells = self._tokens(answers["user"]), ("NAME", "SECRET", "EXPIRES"), dict(TOKEN_COLUMNS)
        rows = [heads, *([cells[head](token) for head in heads] for token in tokens)]
        width = max(terminal_width() - 8, 0)    # 8: the pointer, the number, and one column
        lines = format_table(rows, width, ("NAME",), ("EXPIRES",))[1:]
        return self._choose("Which token?", list(zip(lines, (token.name for token in tokens))))

    def _ask_changes(self, answers):
        """Change one column of a token after the other until the user goes back."""
        column = "expires_at"
        while True:
            token = next((token for token in self._tokens(answers["user"]) if token.name == answers["name"]), None)
            if not token:   # it was deleted meanwhile
                return None
            present = {column: str(getattr(token, column) or "none") for column in QUESTIONS}
            present.update(expires_at=format_instant(token.expires_at) or "none", admin="Yes" if token.admin else "No")
            lines = format_table([(QUESTIONS[key].partition(" (")[0], present[key]) for key in QUESTIONS], 0, (), ())
            column = self._choose(f'Change "{token.user}/{token.name}"', list(zip(lines, QUESTIONS)), column)
            if column is None:
                return None
            value = self._ask_value(column, present[column])
            if value is not None:
                self._attempt(self._run, cmd_token_update, {**answers, column: value})

    def _ask_file(self, _):
        def check(file):
            if not file.lower().endswith((".csv", ".json")):
                raise ValueError("ends neither in .csv nor in .json")
        file = self._prompt.ask("File (.csv or .json)", "tokens.csv", check)
        return file and os.path.expanduser(file)

    def _ask_to_replace(self, answers):
        file = answers["file"]
        return self._choose(f"Replace the existing file {file}?", NO_YES) if os.path.exists(file) else SKIP

    def _sure(question):    # noqa: N805, used in the table below
        return "sure", lambda self, answers: self._choose(question.format(**answers), NO_YES)

    TOKEN = (("user", _ask_user), ("name", _ask_name))
    ACTIONS = (     # label, command, its arguments; the first four in the order of the system that this one replaces
        ("Generate a token", cmd_token_create,
         ("user", _ask_owner), ("user", _ask_new_user), ("name", _ask_new_name),
         ("expires_at", lambda self, _: self._ask_value("expires_at", "none")),
         ("admin", lambda self, _: self._ask_value("admin", "No")),
         ("limits", lambda self, _: self._choose("Limits", (("No limits", False), ("Set them, one by one", True)))),
         *map(_limit, LIMIT_BY_COLUMN)),
        ("List all users", cmd_token_list),
        ("Delete a token", cmd_token_delete, *TOKEN, _sure('Delete "{user}/{name}"? It stops at its next request.')),
        ("Export users to file", cmd_token_export, ("file", _ask_file), ("sure", _ask_to_replace)),
        ("Change limits", cmd_token_update, *TOKEN, ("changes", _ask_changes)),
        ("Rotate a token", cmd_token_rotate, *TOKEN, _sure('Rotate "{user}/{name}"? Its old secret stops working.')),
        ("Usage", cmd_usage, ("by", lambda self, _: self._choose("Usage by", [(key, key) for key in USAGE_BY])),
         ("since", lambda self, _: self._prompt.ask("Since (7d, 12h, 2027-01-31)", "7d", usage_start))),
        ("Exit", None))


def choose_prompt():
    """Return a context manager of the prompt that the terminal is good for."""
    if sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        with contextlib.suppress(ImportError):
            return ArrowPrompt().handling_signals()
    return contextlib.nullcontext(LinePrompt())


def cmd_token_menu(args):
    """Offer the actions as a menu until the user leaves."""
    if sys.stdin is None:
        raise Failure("token menu: stdin is closed, and the answers come from there")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")     # check_name refuses what cannot be decoded
    with open_command_store(args, create=True) as store:
        path = store.path
    print_line(f"The tokens are in {path}\n"
               f'An empty line takes the value in [brackets], "{BACK[0]}" goes back, Ctrl-C leaves the menu.')
    try:
        with choose_prompt() as prompt:
            Menu(prompt, env_file=args.env_file, db=path).run()
    except (EOFError, KeyboardInterrupt):
        print_line("\nLeft the menu.")


MENU = ("menu", cmd_token_menu, "manage the tokens from a menu, with arrow keys", ("token menu",), ())

# == Doctor ===================================================================

FLOORS = (("Python", "%d.%d.%d" % sys.version_info[:3], (3, 8)), ("SQLite", SQLITE_VERSION, (3, 26)))
STREAM_TOKENS = 48      # requested from a model to see whether they arrive one by one
TELLING_SECONDS = 0.02  # a response that took less proves nothing
TOKEN_VARIABLE = "GATEWAY_TOKEN"


class CheckResult(NamedTuple):
    """The result of a check: passed (True), failed (False) or unknown (None), and what to do."""

    ok: Optional[bool]
    text: str
    advice: str = ""


def local_addresses():
    """Return the addresses by which others may reach this machine, sorted, without loopback and link-local ones."""
    found = set()
    with contextlib.suppress(OSError), open("/proc/net/fib_trie", encoding="ascii") as file:
        found.update(re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", file.read()))
    with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as file:
        found.update(str(ipaddress.IPv6Address(int(line.split()[0], 16))) for line in file)
    with contextlib.suppress(OSError):
        found.update(entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None))
    for family, elsewhere in (socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"):  # RFC 5737, RFC 3849
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))   # sends nothing, but chooses the source address
            found.add(probe.getsockname()[0])
    return sorted(str(address) for address in map(address_of, found)
                  if not (address.is_loopback or address.is_link_local or address.is_unspecified))


def is_local_host(host):
    """Return whether a host name is this machine's; raise OSError for one without an address."""
    found = {address_of(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    return any(address.is_loopback or str(address) in local_addresses() for address in found)


def cause_of(refusal):
    """Return what kept an answer away, of whomever it was asked."""
    return re.sub(r"^Ollama (did not answer: |cannot be reached: )?", "", str(refusal))


def check_settings(settings):
    """Show the settings that differ from the defaults, with their sources."""
    given = [f"{source} {raw}" if source.startswith("--") else f"{source}: {raw}"
             for source, raw in settings.given.values()]
    yield CheckResult(True, f"settings: {'; '.join(given) or 'all by default'}")


def check_versions():
    for name, found, least in FLOORS:
        ok = tuple(map(int, found.split(".")[:2])) >= least
        yield CheckResult(ok, f"{name} {found}", "" if ok else "install {} {}.{} or newer".format(name, *least))


def check_database(settings):
    """Check that the database can be used, and by its owner alone."""
    path = os.path.abspath(settings.db)
    try:
        found = describe_database(path)
    except Failure as error:
        return (yield CheckResult(False, str(error)))
    newest, kind = len(MIGRATIONS), remote_file_system(path)
    upgrade = "" if found.version == newest else f", upgraded to {newest} at the next start"
    tokens = plural(found.tokens, "token")
    yield CheckResult(True, f"the database {path} has {tokens} (version {found.version}{upgrade})",
                      "" if found.tokens else f"nobody has access yet: {PROGRAM} token create USER NAME")
    for wrong, text, advice in (
            (os.name == "posix" and found.mode & 0o077,
             f"other users of this machine can read the database ({found.mode:o})", f"chmod 600 {path}"),
            (kind, f"the database is on a network or FUSE file system ({kind}): its changes may be lost",
             "move it to a local disk and name it with --db"),
            (not found.writable, "the database is read-only for this user", f"make {path} and its folder writable")):
        if wrong:
            yield CheckResult(False, text, advice)


def names_in(listed):
    """Return the names in Ollama's list of models."""
    models = (listed or {}).get("models")
    return [str(model.get("name")) for model in models if isinstance(model, dict)] if isinstance(models, list) else []


def upstream_at(url, settings, tls=None):
    return Upstream(url, settings.connect_timeout, settings.first_byte_timeout, settings.stall_timeout, tls)


def check_ollama(settings):
    """Check that Ollama answers; show its version and models, and whether it accepts the headers that matter."""
    url, ollama = settings.ollama_url.geturl(), upstream_at(settings.ollama_url, settings)
    with contextlib.closing(ollama):
        try:
            status, about = ollama.probe("/api/version")
            _, listed = ollama.probe("/api/tags")
            refused, _ = ollama.probe("/api/version", "Origin: https://chat.example\r\n")
        except Refusal as refusal:
            return (yield CheckResult(False, f"Ollama at {url}: {cause_of(refusal)}", "start it, or see --ollama-url"))
    if status == 403:
        return (yield CheckResult(False, f"Ollama at {url} refuses requests for that host name",
                                  "use localhost or its IP address in --ollama-url"))
    if status != 200 or "version" not in (about or ()):
        return (yield CheckResult(False, f"the server at {url} is not Ollama (status {status})",
                                  "set Ollama's address: --ollama-url URL"))
    models = names_in(listed)
    shown = ", ".join(models[:5]) + (", …" if len(models) > 5 else "")
    yield CheckResult(True, f"Ollama {about['version']} answers at {url}, with {plural(len(models), 'model')}"
                      + (f": {shown}" if models else ""), "" if models else "get one: ollama pull llama3.2")
    yield CheckResult(True, "Ollama accepts the gateway's Host" + (
        "; it refuses other sites' Origin, but the gateway forwards none" if refused == 403 else " and any Origin"))


def unverified(url):
    """Return a TLS context for this machine's own servers: their certificates have other names than the URL."""
    if url.scheme != "https":
        return None
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def ollama_answers_at(host, url):
    """Return whether an Ollama answers at a host, on the URL's port, to requests without a token."""
    shown = f"[{host}]" if ":" in host else host
    there = urllib.parse.urlsplit(f"{url.scheme}://{shown}:{port_of(url)}{url.path}")
    with contextlib.closing(Upstream(there, 1, 1, 1, unverified(url))) as ollama:
        try:
            status, about = ollama.probe("/api/version")
            return status == 200 and "version" in (about or ())
        except Refusal:
            return False


def check_bypass(settings, addresses):
    """Check that others cannot reach Ollama itself, where they would need no token."""
    url, port = settings.ollama_url, port_of(settings.ollama_url)
    try:
        local = is_local_host(url.hostname)
    except OSError as error:
        return CheckResult(False, f"the host name {url.hostname} has no address: {error.strerror}", "see --ollama-url")
    if not local:
        return CheckResult(None, f"who else can reach Ollama on {url.hostname} cannot be checked from here",
                           "make sure there that only this machine can")
    found = [address for address in addresses if ollama_answers_at(address, url)]
    if found:
        return CheckResult(False, f"Ollama answers at {', '.join(found)} port {port}: the gateway protects nothing",
                           "let it listen on loopback only: OLLAMA_HOST=127.0.0.1 (systemctl edit ollama.service; "
                           f"in Docker publish 127.0.0.1:{port}:{port}), or close the port to others")
    if not ollama_answers_at(url.hostname, url):
        return CheckResult(None, "whether others reach Ollama itself cannot be checked while it does not answer")
    return CheckResult(True, f"Ollama's port {port} is closed at this machine's other addresses: "
                       + (", ".join(addresses) or "it has none"))


def check_tls(settings):
    """Check certificate and key, or show who could read the tokens without them."""
    if settings.tls_cert:
        try:
            server_tls(settings)
            return CheckResult(True, f"the certificate {settings.tls_cert} and its key are readable and match")
        except Failure as error:
            return CheckResult(False, str(error), "see --tls-cert and --tls-key")
    if is_loopback(settings.host):
        return CheckResult(None, f"no TLS: only this machine can reach {settings.host}")
    return CheckResult(None, f"no TLS: tokens travel to {settings.host} in clear text",
                       "use --tls-cert, or a proxy that speaks HTTPS, and --host 127.0.0.1")


def check_health(where, gateway):
    """Return whether a server is a gateway, and the CheckResult of its health."""
    try:
        status, about = gateway.probe("/health")
    except Refusal as refusal:
        return False, CheckResult(False, f"the gateway at {where}: {cause_of(refusal)}", "is it running there?")
    if status != 200 or not {"status", "upstream", "version"} <= set(about or ()):
        return False, CheckResult(False, f"the server at {where} is not this gateway (status {status} to /health)",
                                  "see which server has that address, and where it forwards requests")
    if about["upstream"] != "up":
        return True, CheckResult(False, f"the gateway {about['version']} at {where} does not reach Ollama",
                                 "see above, or its log")
    return True, CheckResult(True, f"the gateway {about['version']} answers at {where}, and reaches Ollama")


def check_address(settings, gateway):
    """Return whether the gateway runs at its address, and a CheckResult: it must, or the address must be free."""
    where = f"{settings.host} port {settings.port}"
    try:
        family, kind, _, _, address = look_up(settings.host, settings.port, socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as probe:
            if GatewayServer.allow_reuse_address:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
        return False, CheckResult(True, f"{where} is free: no gateway runs there")
    except (OSError, UnicodeError) as error:
        running, result = check_health(where, gateway)
        failure = CheckResult(False, f"cannot listen on {where}: {getattr(error, 'strerror', None) or error}",
                              "choose another address with --host and --port")
        return running, result if running else failure


def time_stream(where, gateway, base, fields, model):
    """Return how a model's streamed response arrived, or None for a model that makes no text.

    Ollama reports how long it generated. Pieces that arrive together after that were held back.
    """
    body = {"model": model, "prompt": "Count from one to fifty.", "options": {"num_predict": STREAM_TOKENS}}
    arrivals, data = [], b""
    with gateway.post(f"{base}/generate", fields, json.dumps(body).encode()) as response:
        while not response.complete:
            data += response.read()
            arrivals.append(time.monotonic())
        if response.status == 400:
            return None
        if response.status != 200:
            return CheckResult(None, f"the stream test of {where} was not tried: it answers {response.status}")
    try:
        made = json.loads(data.splitlines()[-1])["eval_duration"] / 1e9
    except (ValueError, LookupError, TypeError):
        return CheckResult(False, f"a streamed response of {where} has no proper end", "see the gateway's log")
    took = arrivals[-1] - arrivals[0]
    times = f"{model} took {made:.2f} s, and its response arrived within {took:.2f} s"
    if made < TELLING_SECONDS:
        return CheckResult(None, f"whether {where} holds streams back is unknown: {times}")
    if took < made / 2:
        return CheckResult(False, f"{where} holds streams back: {times}", "let the proxy pass them on: nginx "
                           "proxy_buffering off; Caddy flush_interval -1; and no compression of application/x-ndjson")
    return CheckResult(True, f"{where} forwards streams without delay: {times}")


def check_stream(where, gateway, base, secret):
    """Check that streamed responses arrive piece by piece, and that no proxy before the gateway holds them back."""
    if not secret:
        return CheckResult(None, f"the stream test of {where} was not tried",
                           f"set a token in the variable {TOKEN_VARIABLE}")
    fields = f"Authorization: Bearer {secret}\r\nContent-Type: application/json\r\n"
    try:
        status, listed = gateway.probe(f"{base}/tags", fields)
        if status != 200:
            advice = f"set a valid one in {TOKEN_VARIABLE}, and the gateway's --base-path"
            return CheckResult(False, f"{where} answers {status} to the token: {(listed or {}).get('error', '')}",
                               advice if status in (401, 404) else "")
        results = (time_stream(where, gateway, base, fields, model) for model in names_in(listed))
        untried = CheckResult(None, f"the stream test of {where} was not tried: no model makes text")
        return next(filter(None, results), untried)
    except Refusal as refusal:
        return CheckResult(False, f"a streamed response of {where}: {cause_of(refusal)}")


def secret_to_try(url):
    """Return the token of the environment or, for a URL, one typed without echo; never an argument."""
    secret = os.environ.get(TOKEN_VARIABLE, "")
    if not secret and url and sys.stdin.isatty():
        import getpass
        secret = getpass.getpass("A token for the stream test (Enter: none): ")
    secret = secret.strip()
    if secret and not re.fullmatch(r"[\x21-\x7e]+", secret):
        raise UsageError(f"{TOKEN_VARIABLE}: this is not a valid token: check that it was copied completely")
    return secret


def check_gateway(url, settings, tls, check, secret):
    """Yield the result of a check of the gateway at a URL and, if that passed, of a streamed response."""
    with contextlib.closing(upstream_at(url, settings, tls)) as gateway:
        running, result = check(gateway)
        yield result
        if running and result.ok:
            yield check_stream(url.geturl(), gateway, settings.base_path, secret)


def check_all(settings, url, secret, addresses):
    """Yield the results of all checks; url: the gateway's public address, or None."""
    for results in check_settings(settings), check_versions(), check_database(settings), check_ollama(settings):
        yield from results
    yield check_bypass(settings, addresses)
    yield check_tls(settings)
    local = urllib.parse.urlsplit(url_of(settings))
    yield from check_gateway(local, settings, unverified(local), functools.partial(check_address, settings), secret)
    if url:
        yield from check_gateway(url, settings, None, functools.partial(check_health, url.geturl()), secret)


def cmd_doctor(args):
    """Check what the gateway depends on, itself, and the way to it; return 1 if a check failed."""
    try:
        url = upstream_url(args.url) if hasattr(args, "url") else None
    except ValueError:
        raise UsageError(f'--url: "{args.url}" is not a URL like https://public.example/') from None
    secret = secret_to_try(url)
    try:
        settings = load_settings(vars(args), os.environ, args.env_file)
        results = check_all(settings, url, secret, local_addresses())
    except UsageError as error:
        results = [CheckResult(False, f"settings: {error}", "the other checks need valid settings"), *check_versions()]
    markers = dict(zip((True, False, None), ("✓", "✗", "-") if can_show("✓✗") else ("ok  ", "FAIL", "--  ")))
    counts = Counter()
    for result in results:
        counts[result.ok] += 1
        print_line(f"{markers[result.ok]} {_printable(result.text)}")    # part of it may come from another server
        if result.advice:
            print_line(f"{' ' * len(markers[True])} {result.advice}")
    checks, failed = plural(sum(counts.values()), "check"), counts[False]
    print_line(f"{failed} of {checks} failed" if failed else f"{checks}, none failed")
    return 1 if failed else 0


def add_url(parser):
    parser.add_argument("--url", metavar="URL", help="the gateway's public address, behind any proxy; the stream test "
                        f"uses the token in {TOKEN_VARIABLE}, or asks for one")


DOCTOR = ("doctor", cmd_doctor, "diagnose the configuration, Ollama and the network",
          ("doctor", "doctor --port 8000 --url https://ollama.example/"), (add_serve, add_url))

# == Main =====================================================================


def build_parser():
    """Return the parser of the whole command line."""
    common = Parser(add_help=False)
    common.add_argument("--db", metavar="FILE", help=DATABASE_OPTION.help)
    common.add_argument("--env-file", metavar="FILE", help="settings in place of .env")
    common.add_argument("--version", action="version", version=f"ollama_gateway {VERSION}", help="show it and exit")
    parser = Parser(prog="ollama_gateway.py", parents=[common],
                    **help_texts(PURPOSE, ("token create ada laptop", "serve --port 8000")))
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (*COMMANDS, DOCTOR):
        add_command(commands, common, *command)
    text = "make and manage tokens"
    token = commands.add_parser("token", parents=[common], help=text,
                                **help_texts(text, ("token create ada laptop --expires 90d", "token list")))
    tokens = token.add_subparsers(metavar="ACTION", required=True)
    for command in (*TOKEN_COMMANDS, MENU):
        add_command(tokens, common, *command)
    return parser


def run_command(argv):
    """Run a command; return its exit status."""
    try:
        args = build_parser().parse_args(argv, argparse.Namespace(**DEFAULT_ARGS))
        return args.run(args) or 0
    except SystemExit as stop:  # argparse has spoken
        return stop.code or 0
    except (UsageError, Failure) as error:
        print_error(f"ollama_gateway: {error}")
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:
        return 1
    except OSError as error:
        print_error(f"ollama_gateway: cannot write the output: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


def main(argv=None):
    """Run a command; return 0 when it is done, 1 when it could not be done, 2 for a wrong flag, value or setting."""
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:  # it is closed: printing must fail, and no other file may get its descriptor
            setattr(sys, name, open(os.open(os.devnull, os.O_RDONLY), "w"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to fail
    status = run_command(argv)
    for stream in sys.stdout, sys.stderr:
        try:
            stream.flush()
        except OSError:  # Python would try once more at exit, complain, and end with status 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


if __name__ == "__main__":
    sys.exit(main())
