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

    GatewayServer.process_request_thread  Server
      Handler.handle_one_request          Server: waits for the head
        Gateway.serve                     Pipeline
          Router.match                    Routing and access
          Authenticator.identify          Authentication
          Slot.__enter__                  Limits and usage
          ClientStream.read_whole_body    Server
          inspect_body, authorize_model   Routing and access
          Slot.wait                       Limits and usage
          Upstream.send                   Backends
          relay                           Relay
          Journal.write                   Logging and metrics: in the background, with UsageLedger.finish

Any stage can raise Refusal. It becomes the error response or, if the response has started, an error event at its end.
"""
from __future__ import annotations

import argparse
import base64
import bisect
import codecs
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
TRAILING_BYTES = 64 * KIB   # after a body's object: an insertion moves them in memory
FORM_PARTS = 100            # most parts of a form that is searched for its model
PAGE_BODY_BYTES, PAGE_BODY_SECONDS = 16 * KIB, 15   # for the whole body of a request to an own page

BODY_SECONDS = 60           # longest silence within a request body
REJUDGE_SECONDS = 1         # interval at which the token of a streamed request body is checked again
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
GATHER_SECONDS = 0.01       # finished requests gather before they are written: all other threads wait meanwhile
STORE_SECONDS = 0.5         # interval at which usage and the tokens' last uses are stored
BUDGET_SECONDS = 0.5        # for which a sum of stored tokens is used: other gateways may add to it
REOPEN_SECONDS = 0.5        # between two attempts to open a replaced database
BUSY_SECONDS = 20           # for which a command waits for other writers of the database
LEDGER_BUSY_SECONDS = 0.5   # for which the background writer waits for other writers: log lines wait meanwhile
LOG_QUEUE = 1 * MIB         # characters of log lines that wait for a slow log, about 5,000 requests
LOG_SECONDS = 0.05          # lines gather before they are written: each wake-up takes the lock from a request
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

LAST_SECOND = 253402300799  # of the year 9999
INSTANT = re.compile(r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d:\d\d)(?:\.\d+)?(Z|[+-]\d\d:?\d\d)?)?", re.ASCII)


def duration(text):
    """Read "90s", "15m", "12h", "30d", "8w" or a number of seconds as seconds."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhdw]?)", text)
    if not match or not float(match[1]):
        raise ValueError("is not a duration like 90s, 15m, 12h, 30d or 8w")
    return float(match[1]) * {"": 1, "s": 1, "m": MINUTE, "h": HOUR, "d": DAY, "w": 7 * DAY}[match[2]]


def check_instant(seconds):
    """Return Unix seconds unchanged; raise ValueError if they are no time from 1970 to 9999."""
    if not 0 <= seconds <= LAST_SECOND:
        raise ValueError("is not a time from 1970 to 9999")
    return seconds


def parse_instant(text, naive_is_utc=False):
    """Read a date (its first moment in UTC) or an ISO 8601 time as Unix seconds."""
    match = INSTANT.fullmatch(text)
    if not match or match[2] and not match[3] and not naive_is_utc:
        raise ValueError("is not a date like 2027-01-31 or a time like 2027-01-31T18:00:00Z")
    date, clock, zone = match.groups()
    zone = "+00:00" if zone in (None, "Z") else f"{zone[:3]}:{zone[-2:]}"
    try:
        moment = datetime.fromisoformat(f"{date}T{clock or '00:00:00'}{zone}")
    except ValueError as error:
        raise ValueError(f"is not a valid time: {error}") from None
    return check_instant(int(moment.timestamp()))


def parse_time(text, direction, now):
    """Read a date, a time, or a duration from now, as Unix seconds after now (direction 1) or not after it (-1)."""
    if re.fullmatch(r"[0-9.]+[a-z]", text):
        seconds = check_instant(max(now + direction * int(duration(text)), 0))
    else:
        try:
            seconds = parse_instant(text)
        except ValueError as error:
            raise ValueError(f"{error}, or a duration like 30d") from None
    if seconds > now and direction < 0 or seconds <= now and direction > 0:
        raise ValueError("is in the future" if direction < 0 else "is in the past")
    return seconds


def future_time(text):
    """Read "30d", a date or a time as Unix seconds in the future."""
    return parse_time(text, 1, int(time.time()))


def utc_day(seconds):
    """Return the UTC day of Unix seconds, counted from 1970."""
    return int(seconds) // DAY


def day_start(day):
    """Return the Unix seconds at which a UTC day begins."""
    return day * DAY


def usage_start(text, clock=time.time):
    """Read "7d" as the start of seven UTC days, today's included; "12h", a date or a time as the start of an hour."""
    seconds = parse_time(text, -1, int(clock()))
    if re.fullmatch("[0-9]+[dw]", text):
        return day_start(utc_day(seconds) + 1)
    return seconds // HOUR * HOUR


def format_instant(seconds):
    """Format Unix seconds as ISO 8601 in UTC; None stays None."""
    return None if seconds is None else (datetime(1970, 1, 1) + timedelta(seconds=seconds)).isoformat() + "Z"


def plural(number, noun):
    """Return "1 token", "2 tokens"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def integer(low, high=999_999_999, kind="whole number"):
    """Return a reader of decimal digits for a number within a range."""
    def read(text):
        if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(f"is not a {kind} from {low} to {high}")
        return int(text)
    return read


def one_of(values, kind):
    """Return a reader of a word, in either case, for the value that a table has for it."""
    def read(text):
        if text.lower() not in values:
            raise ValueError(f"is not {kind}")
        return values[text.lower()]
    return read


non_negative, positive, port_number = integer(0), integer(1), integer(0, 65535, "port number")
boolean = one_of({"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False,
                  "off": False}, "on or off")
log_level = one_of({"debug": 10, "info": 20, "warning": 30, "warn": 30, "error": 40, "critical": 50},
                   "a log level (DEBUG, INFO, WARNING, ERROR or CRITICAL)")


def model_globs(text):
    """Read a comma list of model names, in which * and ? are wildcards; return it in lower case without blanks."""
    globs = [part.strip().lower() for part in text.split(",") if part.strip()]
    if not globs or "none" in globs or not all(re.fullmatch(r"[a-z0-9._:/*?-]{1,200}", glob) for glob in globs) \
            or any(glob.rpartition("/")[2].count(":") > 1 for glob in globs):
        raise ValueError("is not a list of models like llama3*,qwen2.5:7b (letters, digits and . _ : / - * ?)")
    return ",".join(globs)


def byte_size(text):
    """Read "100MiB", "64K" or a number of bytes; K, M and G are powers of 1024."""
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
    for origin in found:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+|null", origin):
            raise ValueError(f"contains {origin}, which is not an origin like https://chat.example.com")
    return found


class Option(NamedTuple):
    """A setting; `convert` reads its text and raises ValueError with the end of a message."""

    flag: str
    default: Optional[str]
    convert: Callable
    metavar: str
    help: str
    inherited: str = ""     # its variable, if that has the name of the replaced system

    @property
    def name(self):
        return self.flag[2:].replace("-", "_")

    @property
    def variable(self):
        return self.inherited or "GATEWAY_" + self.name.upper()


OPTION_GROUPS = {
    "network": (
        Option("--ollama-url", "http://localhost:11434", upstream_url, "URL", "Ollama to protect", "OLLAMA_BASE_URL"),
        Option("--base-path", "/api", base_path, "PATH", "path at which clients find Ollama's /api", "BASE_PATH"),
        Option("--db", "tokens.db", str, "FILE", "the database of tokens", "TOKEN_DB_PATH"),
        Option("--host", "127.0.0.1", str, "ADDRESS", "address to listen on; :: is all addresses"),
        Option("--port", "8000", port_number, "PORT", "port to listen on"),
        Option("--tls-cert", None, str, "FILE", "certificate chain: serve HTTPS"),
        Option("--tls-key", None, str, "FILE", "private key, if it is not in the file of --tls-cert"),
    ),
    "access": (
        Option("--cors-origins", "", origins, "LIST", "origins of web pages that may use the gateway, or *"),
        Option("--path-tokens", "off", boolean, "", "accept /t/SECRET before any path"),
        Option("--trusted-proxies", "", networks, "LIST", "addresses or networks of proxies that send X-Forwarded-For"),
        Option("--metrics-open", "off", boolean, "", "serve /metrics without a token"),
        Option("--no-admin-api", "off", boolean, "", "do not serve /admin and its API"),
    ),
    "limits": (
        Option("--max-connections", "1024", positive, "N", "client connections; one more replaces the longest idle"),
        Option("--max-body", "100MiB", byte_size, "SIZE", "largest request body; blobs have no limit"),
        Option("--max-spool", "2GiB", byte_size, "SIZE", "disk space for request bodies; those over 1 MiB are files"),
        Option("--max-parallel", "0", non_negative, "N", "inference requests at once, others queue; 0: no limit"),
        Option("--max-queue", "128", positive, "N", "requests of one user that may be queued"),
    ),
    "timeouts": (
        Option("--queue-timeout", "60s", duration, "TIME", "longest wait of a request in the queue"),
        Option("--connect-timeout", "5s", duration, "TIME", "to connect to Ollama, name look-up included"),
        Option("--first-byte-timeout", "600s", duration, "TIME", "for the first byte of a response; models load first"),
        Option("--stall-timeout", "300s", duration, "TIME", "for the next byte of a response"),
        Option("--header-timeout", "15s", duration, "TIME", "for a whole request head, or a TLS handshake"),
        Option("--idle-timeout", "75s", duration, "TIME", "for the next request on a connection"),
        Option("--drain-timeout", "30s", duration, "TIME", "for running requests to finish at a stop"),
    ),
    "logging": (
        Option("--log-level", "INFO", log_level, "LEVEL", "level of the log on stderr", "LOG_LEVEL"),
        Option("--log-file-level", "INFO", log_level, "LEVEL", "level of the log file", "LOG_FILE_LEVEL"),
        Option("--log-file", None, str, "FILE",
               "a log file, rotated at 10 MB, reopened on SIGHUP; app.log if LOG_FILE_LEVEL is set"),
    ),
}
OPTIONS = tuple(option for options in OPTION_GROUPS.values() for option in options)
DATABASE_OPTION = next(option for option in OPTIONS if option.flag == "--db")   # every command has it

ENV_LINE = re.compile(r"""\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*      # name; then a value in quotes, or words
    (?:'([^']*)'|"((?:[^"\\]|\\.)*)"|([^\s\#]\S*(?:\s+[^\s\#]\S*)*))?\s*(?:\#.*)?""", re.VERBOSE)


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
    return {line[1]: line[2] or re.sub(r'\\(["\\])', r"\1", line[3] or "") or line[4] for line in lines if line}


def load_settings(flags, environ, env_file=None, options=OPTIONS):
    """Settle options: a flag beats the environment, that the .env file, that the default; an empty value is none.

    Returns one attribute for each option, by its name, converted, and `given`: {name: (source, text)} of the options
    that have no default value. flags: texts by option name. Raises UsageError with the source and the value.
    """
    file, given = read_env_file(env_file), {}
    settings = types.SimpleNamespace(given=given)
    for option in options:
        sources = ((option.flag, flags.get(option.name)), (option.variable, environ.get(option.variable)),
                   (f'{option.variable} in {env_file or ".env"}', file.get(option.variable)))
        source, text = next((pair for pair in sources if pair[1]), ("default", option.default))
        if source != "default":
            given[option.name] = source, text
        try:
            setattr(settings, option.name, None if text is None else option.convert(text))
        except ValueError as error:
            raise UsageError(f'{source}: "{text}" {error}') from None
    if "log_file_level" in given and "log_file" not in given:
        settings.log_file = "app.log"  # as in the replaced system
    if "tls_key" in given and "tls_cert" not in given:
        raise UsageError("--tls-key: --tls-cert FILE is missing")
    return settings

# == Model ====================================================================


class Token(NamedTuple):
    """A row of the database without its digest; times are Unix seconds in UTC."""

    id: int
    user: str
    name: str
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
    read: Callable      # returns the value of a text; raises ValueError
    metavar: str
    help: str           # of the flag
    heading: str        # in `token list`
    label: str          # in the menu and on the pages
    phrase: str         # a value in a sentence
    json_type: str
    refusal: str        # of a request beyond the limit: one of REFUSALS
    example: str = ""   # of a value that is not a number

    @property
    def flag(self):
        return "--" + self.column.replace("_", "-")


LIMITS = (
    Limit("models", model_globs, "LIST", "the only models that it may use, like llama3*,qwen2.5:7b", "MODELS", "Models",
          "models {}", "string[]", "forbidden", "llama3*,qwen2.5:7b"),
    Limit("rpm", positive, "N", "inference requests in any minute", "RPM", "Requests a minute",
          "{} a minute", "integer", "rate_limited"),
    Limit("max_parallel", positive, "N", "inference requests at once", "PARALLEL", "Requests at once",
          "{} at once", "integer", "too_many_at_once"),
    Limit("tokens_per_day", positive, "N", "tokens of prompts and completions in a UTC day", "A DAY", "Tokens a day",
          "{} tokens a day", "integer", "budget_spent"),
)
LIMIT_BY_COLUMN = {limit.column: limit for limit in LIMITS}
SETTABLE = {"expires_at": future_time, **{limit.column: limit.read for limit in LIMITS}}     # columns of a token


def read_column(column, text):
    """Return the value of a text for one of SETTABLE, None for "none"; raise ValueError."""
    try:
        return None if text == "none" else SETTABLE[column](text)
    except ValueError as error:
        raise ValueError(f'{error}, or "none"' if str(error).startswith("is not a") else str(error)) from None


def is_expired(token):
    return token.expires_at is not None and token.expires_at <= time.time()


def token_json(token):
    """Return a token's columns, ready for JSON."""
    shown = {"id": token.id, "user": token.user, "name": token.name, "hint": token.hint,
             "created_at": format_instant(token.created_at), "expires_at": format_instant(token.expires_at),
             "last_used_at": format_instant(token.last_used_at), "expired": is_expired(token),
             "admin": bool(token.admin)}
    for limit in LIMITS:
        value = getattr(token, limit.column)
        shown[limit.column] = value.split(",") if value and limit.json_type == "string[]" else value
    return shown


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

    __slots__ = ("id", "client_address", "request", "route", "path", "token", "slot", "body", "insert_at", "model",
                 "model_label", "status", "bytes_sent", "usage_reader", "estimate", "started_at", "queue_seconds",
                 "sent_at", "released_at", "first_byte_at", "ended_at", "outcome", "refusal_code", "reason")

    def __init__(self, client_address, now):
        self.client_address, self.started_at, self.bytes_sent, self.queue_seconds = client_address, now, 0, 0.0
        self.id = self.request = self.route = self.token = self.slot = self.status = None
        self.path = ""                              # the route's path, with its segment: without base path and token
        self.body = b""                             # of a request for one of our own pages
        self.insert_at = 0                          # where the body is to get INCLUDE_USAGE, 0: nowhere
        self.model, self.model_label = None, ""     # as requested; its full name, once Ollama has accepted it
        self.usage_reader = self.estimate = None    # the estimate: of a prompt that Ollama has not counted
        self.sent_at = self.released_at = self.first_byte_at = self.ended_at = None
        self.outcome = None                         # "left" or "broken" if the response did not reach its end
        self.refusal_code = self.reason = None

    @property
    def route_label(self):
        """Return the path in the table of routes, "" before a route is found."""
        return self.route.path if self.route else ""

    @property
    def usage(self):
        """Return the Usage so far."""
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
        """Return a deadline for the first of a number of equal parts of the time left; raise TimeoutError."""
        return Deadline(self._seconds, self._flag, time.monotonic() + self.left() / parts)


def is_late(error):
    """Return whether a Deadline has passed; the system's ETIMEDOUT, a lost connection, is a TimeoutError too."""
    return isinstance(error, TimeoutError) and error.errno is None


POLL_LIMIT = 2 ** 31 - 1    # milliseconds: the largest argument of poll
READABLE, WRITABLE = getattr(select, "POLLIN", 1), getattr(select, "POLLOUT", 4)
HUNG_UP = getattr(select, "POLLRDHUP", 0)  # reports a half-closed peer without a read; Linux only
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError)
# A peer that vanished without a FIN, such as behind a NAT, is given up after 30 s: 15 s of silence and 3 probes 5 s
# apart, few enough for a phone's battery. TCP_USER_TIMEOUT (ms) is for unacknowledged data; Linux applies it to the
# probes too, and to a peer that takes no data for so long (RFC 1122 4.2.3.6, RFC 5482). macOS has TCP_KEEPALIVE.
KEEP_ALIVE = [(getattr(socket, option), value) for option, value in (
    ("TCP_KEEPIDLE", 15), ("TCP_KEEPALIVE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3),
    ("TCP_USER_TIMEOUT", 30_000)) if hasattr(socket, option)]


def look_up(host, port, flags=0):
    """Return the TCP addresses of getaddrinfo; an ASCII name avoids the IDNA codec, whose import takes 3 ms."""
    host = host.encode("ascii") if host.isascii() else host
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)


def address_of(text):
    """Return an IP address without its zone, an IPv4-mapped one as IPv4; raise ValueError."""
    address = ipaddress.ip_address(text.strip().partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


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


class Poll(dict):
    """The part of select.poll() that is used here, for Windows: {descriptor: its events}."""

    register = dict.__setitem__

    def poll(self, milliseconds):
        """Return the descriptors that are ready, in the order of their registration, each with its events."""
        readers, writers = ([fd for fd in self if self[fd] & event] for event in (READABLE, WRITABLE))
        readable, writable, _ = select.select(readers, writers, [], milliseconds / 1000)
        found = [(fd, READABLE * (fd in readable) | WRITABLE * (fd in writable)) for fd in self]
        return [(fd, events) for fd, events in found if events]


new_poll = getattr(select, "poll", Poll)


def wait_for(descriptor, events, deadline, cancel_on=None):
    """Wait for events of a descriptor and return them; if `cancel_on` is ready first, call its on_readable().

    Raises TimeoutError, and what on_readable() raises.
    """
    while True:
        poll = new_poll()
        if cancel_on is not None:
            poll.register(cancel_on.descriptor, cancel_on.watched_events())
        poll.register(descriptor, events)
        for ready, found in poll.poll(min(deadline.left() * 1000, POLL_LIMIT)):    # in the order of registration
            if ready == descriptor:
                return found
            cancel_on.on_readable()


class Wakeup:
    """Wakes the thread that waits for it; that wait can be cancelled."""

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
    """A buffered non-blocking socket; each wait has a deadline, and another connection may cancel it."""

    waited = False      # `fill` was called since this was last reset
    is_shut = False     # by another thread

    def __init__(self, sock):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else Nagle delays each response by 44 ms
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with contextlib.suppress(OSError):  # a system may know an option and not support it
            for option, value in KEEP_ALIVE:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self.sock, self.descriptor, self.buffer = sock, sock.fileno(), b""

    def start_tls(self, context, deadline, cancel_on=None, **how):
        """Do the TLS handshake; `how` is passed to SSLContext.wrap_socket."""
        self.sock = context.wrap_socket(self.sock, do_handshake_on_connect=False, **how)
        if self.is_shut:    # shut_down was called meanwhile, and found a detached socket
            raise ConnectionAbortedError("the connection was shut down")
        while True:
            try:
                return self.sock.do_handshake()
            except ssl.SSLWantReadError:
                self.wait(READABLE, deadline, cancel_on)
            except ssl.SSLWantWriteError:
                self.wait(WRITABLE, deadline, cancel_on)

    def wait(self, events, deadline, cancel_on=None):
        """Wait for events of this connection as `wait_for` does."""
        return wait_for(self.descriptor, events, deadline, cancel_on)

    def watched_events(self):
        """Return the events to watch for: only the hang-up if much is unread."""
        return HUNG_UP if len(self.buffer) >= PIPELINED_BYTES else READABLE | HUNG_UP

    def fill(self, deadline, cancel_on=None):
        """Read into the buffer as soon as there is data; return False at the end of the stream."""
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
            self.buffer += data
            return bool(data)

    def read_piece(self, decoder, deadline, cancel_on=None):
        """Return the next piece as soon as it is there, b"" only at the end; raise Malformed if that is early."""
        while True:
            piece, self.buffer = decoder.decode(self.buffer)
            if piece or decoder.complete:
                return piece
            if not self.fill(deadline, cancel_on):
                decoder.end()

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
            except (BlockingIOError, ssl.SSLWantWriteError):
                self.until_writable(deadline, cancel_on)
            except ssl.SSLWantReadError:
                self.wait(READABLE, deadline, cancel_on)
            else:
                data = memoryview(data)[sent:] if sent < len(data) else b""

    def until_writable(self, deadline, cancel_on):
        self.wait(WRITABLE, deadline, cancel_on)

    def shut_down(self):
        """End the connection from another thread: a thread that waits on it wakes up."""
        self.is_shut = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # SSLSocket.shutdown would go on without TLS

    def close(self):
        with contextlib.suppress(OSError):
            self.sock.close()

    def close_notify(self):
        """Close; under TLS, send close_notify, so that the end does not look like a truncation (RFC 8446 6.1)."""
        if isinstance(self.sock, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                self.sock.unwrap()
        self.close()

    def reset(self):
        """Close so that the peer sees an error instead of an end."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # struct linger {1, 0}
        self.close()

# == HTTP =====================================================================

BARE_LF = re.compile(rb"(?<!\r)\n")
FIELD_BLOCK = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*")  # RFC 9110 5.1, 5.5


class HeadDecoder:
    """Decodes a message's head, which is one piece, without the empty line at its end (RFC 9112 2.2)."""

    complete = False
    _size = 0       # of the data so far, in which the head has no end

    def decode(self, data):
        """Return (the head, the data behind it), or (b"", data) while the head is not complete; raise Malformed."""
        if not data:
            return b"", data
        start = self._size and max(self._size - 3, 0)
        end = data.find(b"\r\n\r\n", start)
        if 0 <= end <= LINE_BYTES:
            return data[:end + 2], data[end + 4:]
        self._size = len(data) if end < 0 else end
        if self._size > LINE_BYTES and data.find(b"\r\n", 0, LINE_BYTES + 2) < 0:
            raise Malformed(f"the first line is longer than {LINE_BYTES} bytes", "line_too_long")
        if self._size > HEAD_BYTES:
            raise Malformed(f"the headers are larger than {HEAD_BYTES} bytes", "head_too_large")
        if end < 0 and BARE_LF.search(data, start):
            raise Malformed("a line does not end in CR LF")
        return (b"", data) if end < 0 else (data[:end + 2], data[end + 4:])

    def end(self):
        if not self._size:
            raise ConnectionError("the connection was closed before any data")
        raise Malformed("the headers end early")


def parse_fields(block):
    """Return the fields of a head as (name, value) pairs, as {name in lower case: value}, and the repeated names.

    The mapping is read-only; values of equal names are joined by commas (RFC 9110 5.3). Raises Malformed for a folded
    line, a space before a colon (RFC 9112 5) or a repeated field of FRAMING.
    """
    if not FIELD_BLOCK.fullmatch(block):
        raise Malformed("a header is malformed")
    lines = block.decode("latin-1").split("\r\n")[:-1]
    if len(lines) > FIELD_COUNT:
        raise Malformed(f"there are more than {FIELD_COUNT} headers", "head_too_large")
    pairs = [(name, value.strip(" \t")) for name, _, value in (line.partition(":") for line in lines)]
    fields, repeated = {}, set()
    for name, value in pairs:
        name = name.lower()
        if name in fields:
            repeated.add(name)
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    if repeated & FRAMING:
        raise Malformed(f"there are two {min(repeated & FRAMING)} headers")
    return pairs, types.MappingProxyType(fields), frozenset(repeated)


def comma_list(value):
    """Return the members of a comma list, in lower case (RFC 9110 5.6.1)."""
    return {member.strip(" \t") for member in value.lower().split(",")}


def body_framing(fields, version):
    """Return (length or None, whether chunked) of a body (RFC 9112 6); raise Malformed if readers could differ."""
    coding, length = fields.get("transfer-encoding"), fields.get("content-length")
    if coding is None:
        if length is not None and not (length.isascii() and length.isdigit() and len(length) <= 18):
            raise Malformed(f'Content-Length is "{length[:40]}", not a number')
        return length and int(length), False
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
    length: Optional[int]               # of the body, None if it is chunked or ambiguous
    closes: bool                        # the client sends no other request on the connection
    bearer: Optional[str]               # the secret in Authorization: "" if it has none, None without that field
    redacted_path: str                  # the path without secrets
    forwarded: str                      # the fields that go to Ollama, as lines of a head
    path_secret: Optional[str] = None   # the secret behind /t/, which is then not in `path`


REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([\x21-\x7e]+) HTTP/([0-9]\.[0-9])")  # RFC 9112 3
HOST = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")  # RFC 9110 7.2, RFC 3986 3.2.2
ABSOLUTE = re.compile(r"https?://([^/?]+)(.*)", re.IGNORECASE)
SECRET_IN_PATH = re.compile(rf"(?<=/t/)[^/]+|{SECRET_PREFIX}[\w-]+", re.IGNORECASE)
PATH_TOKEN = re.compile("/t/([^/]+)(/.*)")
BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)  # RFC 6750 2.1; RFC 9110 11.1: the case of the scheme is free
REQUEST_ID = re.compile("[A-Za-z0-9._-]{1,128}")


def origin_form(target, host):
    """Return a request target as a path and query, one in absolute form if it names the Host (RFC 9112 3.2)."""
    absolute = None if target.startswith("/") else ABSOLUTE.fullmatch(target)
    if absolute and absolute[1].lower() == host.lower():
        target = absolute[2] if absolute[2].startswith("/") else "/" + absolute[2]
    if not target.startswith("/") or "#" in target:
        raise Malformed("the request target is not a path")
    return target


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
    if version == "1.1" and "host" not in fields:
        raise Malformed("there is no Host header")
    host = fields.get("host", "")
    if not HOST.fullmatch(host):
        raise Malformed("the Host header is malformed")
    path, mark, query = origin_form(target, host).partition("?")
    length = None
    with contextlib.suppress(Malformed):    # request_decoder raises it, when the request is known
        length, chunked = body_framing(fields, version)
        length = None if chunked else length or 0
    hop = comma_list(fields.get("connection", ""))
    authorization = fields.get("authorization")
    bearer = None if authorization is None else (BEARER.fullmatch(authorization) or ("", ""))[1]
    forwarded = "".join(f"{name}: {value}\r\n" for name, value in fields.items()
                        if (name in FORWARDED or name.startswith(FORWARDED_PREFIXES)) and name not in hop)
    return Request(method, path, mark + query, version, fields, repeated, length, version == "1.0" or "close" in hop,
                   bearer, SECRET_IN_PATH.sub("*", path), forwarded)


# Clients send equal heads again and again: parsing one takes a tenth of the CPU of a small response.
parse_cached_request = functools.lru_cache(HEAD_CACHE_SIZE)(parse_request)


def dialect_of(path):
    """Return the dialect of error objects that clients expect at a path, which may begin with /t/SECRET."""
    behind_token = PATH_TOKEN.fullmatch(path)
    path = behind_token[2] if behind_token else path
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
    version, hop = match[1].decode(), comma_list(fields.get("connection", ""))
    dropped = hop | NOT_RELAYED
    lines = "".join(f"{name}: {value}\r\n" for name, value in pairs
                    if name.lower() not in dropped and not name.lower().startswith("access-control-"))
    return ResponseHead(int(match[2]), (match[3] or b"").decode("latin-1"), fields, lines,
                        fields.get("content-type", "").partition(";")[0].strip().lower(),
                        *body_framing(fields, version), version == "1.1" and "close" not in hop)


# Within a second, heads are equal: parsing one takes a tenth of the CPU of a small response.
parse_cached_response_head = functools.lru_cache(HEAD_CACHE_SIZE)(parse_response_head)


def encode_chunk(piece, last=False):
    """Return a piece as a chunk (RFC 9112 7.1), nothing for an empty one; behind the last one the end of the body."""
    return (b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b"") + (b"0\r\n\r\n" if last else b"")


class LengthBody:
    """Decodes a body of known length, 0 for none; without a length it ends with the connection (RFC 9112 6.3)."""

    def __init__(self, length):
        self.left, self.complete = length, length == 0

    def decode(self, data):
        """Return (the next piece of the body, the data behind it)."""
        if self.left is None:
            return data, b""
        piece = data[:self.left]
        self.left -= len(piece)
        self.complete = not self.left
        return piece, data[len(piece):]

    def end(self):
        """Note the end of the stream; raise Malformed if the body is not complete."""
        if self.left is not None:
            raise Malformed(f"the body ends {self.left} bytes early")
        self.complete = True


class ChunkedBody:
    """Decodes a chunked body (RFC 9112 7.1): sizes in plain hex, no extensions; trailers are read and dropped."""

    FIRST = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")
    NEXT = re.compile(rb"\r\n([0-9A-Fa-f]{1,16})\r\n")
    PART = re.compile(rb"(?:\r\n)?[0-9A-Fa-f]{0,16}\r?")

    def __init__(self):
        self.complete = False
        self.left = 0           # bytes of the current chunk
        self._size_line = self.FIRST
        self._ending = False    # the last chunk was read: trailers follow

    def decode(self, data):
        """Return (the data of all chunks, as far as they are there, and the data behind them); raise Malformed."""
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
            if not self.left:
                self._ending = True
                at -= 2     # the trailers end at the first empty line, which may be their first line
        return b"".join(pieces), self._trailers(data[at:])

    def _trailers(self, data):
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > TRAILER_BYTES or BARE_LF.search(data):
                raise Malformed("the trailers are too large, or have a line that does not end in CR LF")
            return data
        forbidden = FORBIDDEN_TRAILERS & parse_fields(data[2:end + 2])[1].keys()
        if forbidden:
            raise Malformed(f"{min(forbidden)} is not allowed in trailers")
        self.complete = True
        return data[end + 4:]

    def end(self):
        raise Malformed("the body ends before its last chunk")


def request_decoder(request):
    """Return the decoder of a request's body; raise Malformed."""
    if request.length is not None:
        return LengthBody(request.length)
    body_framing(request.fields, request.version)   # raises Malformed unless the body is chunked
    return ChunkedBody()


def response_decoder(head, method):
    """Return the decoder of the body of a response to a method (RFC 9112 6.3)."""
    if method == "HEAD" or head.status in (204, 304):
        return LengthBody(0)
    return ChunkedBody() if head.chunked else LengthBody(head.length)

# == Request body =============================================================


class Unreadable(Malformed):
    """A body in which the gateway cannot determine what Ollama will read; `code` is one of REFUSALS."""


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


# int() without a limit on digits takes quadratic time: older Pythons get float(), slower for short numbers
DECODER = json.JSONDecoder(object_pairs_hook=tuple, parse_constant=lambda _: TOO_LONG,
                           parse_int=None if hasattr(sys, "set_int_max_str_digits") else float)


def masked_windows(data, at=0, size=WINDOW_BYTES):
    """Yield (position, window) pairs of JSON, with masked escapes, from a position outside an escape.

    The windows start with a size and grow to WINDOW_BYTES: a method of bytes blocks all threads until it returns.
    """
    while at < len(data):
        window = data[at:at + size].replace(b"\\\\", b"--").replace(b'\\"', b"--")
        if window.endswith(b"\\"):  # the next window has the rest of the escape
            window = window[:-1]
        if not window:
            return
        yield at, window
        at += len(window)
        if size == WINDOW_BYTES and at > DECODED_BYTES:
            time.sleep(1e-6)    # releases the interpreter's lock: a waiting thread would have to wait 5 ms for it
        size = min(4 * size, WINDOW_BYTES)


MARK, BRACKET = re.compile(rb'["{}\[\]]'), re.compile(rb"[{}\[\]]")
STEPS = bytes(1 if mark in b"{[" else 255 for mark in range(256))   # of depth, as signed bytes: 1 opens, -1 closes
NO_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))


def nested_end(data, at, parts):
    """Return the position after the object or array at a position; add its strings and brackets to a number of parts.

    Raises ValueError if it does not end, and Unreadable at more than JSON_PARTS.
    """
    depth, quoted = 0, 0
    for start, window in masked_windows(data, at, VALUE_BYTES // 8):
        texts = window.split(b'"')  # alternately outside and inside a string
        steps = b"".join(texts[quoted::2]).translate(STEPS, NO_BRACKETS)
        parts += len(texts) // 2 + len(steps)
        if parts > JSON_PARTS:
            raise Unreadable(f"it has more than {JSON_PARTS} strings and brackets", "body_too_large")
        closing = steps.count(255)
        if depth <= closing and depth + min(itertools.accumulate(memoryview(steps).cast("b")), default=0) <= 0:
            texts[1 - quoted::2] = [b"-" * len(text) for text in texts[1 - quoted::2]]
            for bracket in BRACKET.finditer(b'"'.join(texts)):
                depth += 1 if bracket[0] in b"{[" else -1
                if depth <= 0:
                    return start + bracket.end(), parts
        depth += len(steps) - 2 * closing
        quoted ^= len(texts) % 2 == 0
    raise ValueError


def reduce_object(data):
    """Return the JSON object at the start of data with NaN for each value of more than VALUE_BYTES, and its size.

    Long strings and nested values are skipped in windows and not validated: Ollama refuses malformed ones. Raises
    ValueError or StopIteration if the object does not end, and Unreadable if its top level is too large.
    """
    kept, at, parts = bytearray(), 0, 0
    while True:
        mark = MARK.search(data, at, at + WINDOW_BYTES)
        if mark is None:
            raise ValueError
        kept += data[at:mark.start()].translate(None, b" \t\r\n")
        start, at = mark.span()
        if mark[0] == b"}":
            return (kept + b"}").decode(), at
        if mark[0] == b'"':     # most strings are short
            at = next(start + window.find(b'"') + 1 for start, window in masked_windows(data, at, VALUE_BYTES // 8)
                      if b'"' in window)
        elif kept:
            at, parts = nested_end(data, start, parts)
        kept += data[start:at] if at - start <= VALUE_BYTES else b"NaN"
        if len(kept) > TOP_LEVEL_BYTES:
            raise Unreadable(f"its keys and short values take more than {TOP_LEVEL_BYTES} bytes", "body_too_large")


def read_object(data):
    """Return the (key, value) pairs of the JSON object at the start of data, and its size; raise Unreadable.

    A nested object is a tuple of pairs too; in a large object, a value of more than VALUE_BYTES is TOO_LONG.
    """
    try:
        if len(data) > DECODED_BYTES:
            windows = (data[at:at + WINDOW_BYTES] for at in range(0, len(data), WINDOW_BYTES))
            deque(codecs.iterdecode(windows, "utf-8"), maxlen=0)    # raises UnicodeDecodeError
            reduced, size = reduce_object(data)
            pairs = DECODER.decode(reduced)
        else:
            text = data[:].decode()
            pairs, end = DECODER.raw_decode(text, len(text) - len(text.lstrip(" \t\r\n")))
            size = end if text.isascii() else len(text[:end].encode())
    except UnicodeDecodeError:
        raise Unreadable("it is not UTF-8") from None
    except (ValueError, RecursionError, StopIteration):
        raise Unreadable("it is not a JSON object") from None
    if not isinstance(pairs, tuple):
        raise Unreadable("it is not a JSON object")
    return pairs, size


class BodyInfo(NamedTuple):
    """What a request's body says, as Ollama will read it."""

    model: str = ""
    insert_at: int = 0      # the position for INCLUDE_USAGE, without which the usage is not reported; 0: none


def single_text(members, key):
    """Return the string that is a key's only value, "" for no value or another type; raise Unreadable."""
    values = members.get(key, ("",))
    if len(values) > 1:
        raise Unreadable(f'it has two keys "{key}"')
    if values[0] is TOO_LONG or isinstance(values[0], str) and len(values[0]) > VALUE_BYTES:
        raise Unreadable(f'its "{key}" is too long')
    return values[0] if isinstance(values[0], str) else ""


def requests_usage(members):
    """Return whether stream_options request the usage; the values of equal keys are merged as encoding/json does."""
    requested = False
    for options in members.get("stream_options", ()):
        if options is TOO_LONG:
            raise Unreadable('its "stream_options" are too long')
        for value in fold_keys(options).get("include_usage", ()) if isinstance(options, tuple) else [False]:
            requested = requested if value is None else value is True
    return requested


def inspect_json(data, usage_on_request=False):
    """Return the BodyInfo of a JSON body: the model is the top-level key "model", or else "name"; raise Unreadable.

    usage_on_request: a streamed response reports its usage only if `stream_options` request it.
    """
    pairs, size = read_object(data)
    members = fold_keys(pairs)
    model, name = single_text(members, "model"), single_text(members, "name")
    if not usage_on_request or True not in members.get("stream", ()) or requests_usage(members):
        return BodyInfo(model or name)
    if len(data) - size > TRAILING_BYTES:   # an insertion moves it
        raise Unreadable("too many bytes follow the JSON object")
    return BodyInfo(model or name, size - 1)


FORM = re.compile(r'multipart/form-data(?: *; *charset=[\w-]+)? *; *boundary=(?:"([^"\\]{1,70})"|([^\s";]{1,70}))'
                  r'(?: *; *charset=[\w-]+)? *', re.IGNORECASE)
UNQUOTED = rb"[\w!#$%&+.^`|~-]+"
FILE_NAME = rb'(?:; *filename=(?:"(?:[^"\\\r\n]|\\[^\r\n])*"|%b))?(?:; *filename\*=[^\s";]*)?' % UNQUOTED
PART_FIELD = (rb"(?:(?:content-(?:type|length|id)|mime-version):[^\r\n]*"
              rb"|content-transfer-encoding: *(?:7bit|8bit|binary) *)")
PART_HEAD = re.compile(
    rb'(?:%b\r\n)*content-disposition: *form-data(%b); *name=(?:"([^"\\\r\n]*)"|(%b))(%b)(?:\r\n%b)*'
    % (PART_FIELD, FILE_NAME, UNQUOTED, FILE_NAME, PART_FIELD), re.IGNORECASE)


def form_parts(content_type, data):
    """Yield the head of each part of a form, and the start and end of its content (RFC 7578, RFC 2046 5.1.1).

    Raises Unreadable for a form that two readers could split in two ways. The data is searched in windows.
    """
    form = FORM.fullmatch(content_type)
    if not form:
        raise Unreadable("it is not multipart/form-data with a plain boundary")
    delimiter = b"--" + (form[1] or form[2]).encode("latin-1")
    found, at = [], 0       # the positions of the delimiters
    while at < len(data) and len(found) < FORM_PARTS + 2:
        position = data.find(delimiter, at, at + WINDOW_BYTES)
        at = position + len(delimiter) if position >= 0 else at + WINDOW_BYTES - len(delimiter) + 1
        if position >= 0:
            found.append((position, at))
    if not found or data[:found[0][0]] not in (b"", b"\r\n") or len(found) > FORM_PARTS + 1 \
            or data[found[-1][1]:found[-1][1] + 5] not in (b"--", b"--\r\n"):
        raise Unreadable(f"it is not a form, or has more than {FORM_PARTS} parts")
    for (_, start), (end, _) in zip(found, found[1:]):
        head_end = data.find(b"\r\n\r\n", start, min(end, start + VALUE_BYTES))
        if data[start:start + 2] != b"\r\n" or data[end - 2:end] != b"\r\n" or not start < head_end <= end - 4 - 2:
            raise Unreadable("a part of the form is malformed")
        yield data[start + 2:head_end], head_end + 4, end - 2


def inspect_form(data, content_type):
    """Return the BodyInfo of a form with a field "model"; raise Unreadable for a form that no client writes."""
    models = []
    for head, start, end in form_parts(content_type, data):
        match = PART_HEAD.fullmatch(head)
        if not match:
            raise Unreadable("a part of the form has no plain name, or other headers than clients send")
        if b"model" in (match[2], match[3]):
            if models or match[1] or match[4] or end - start > VALUE_BYTES:
                raise Unreadable('it has more than one plain field "model"')
            models.append(data[start:end])
    try:
        return BodyInfo(models[0].decode() if models else "")
    except UnicodeDecodeError:
        raise Unreadable("it is not UTF-8") from None


NAME_PART = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,79}", re.ASCII)
HOST_PART = re.compile(r"[a-z0-9_][a-z0-9_.:-]{0,349}", re.ASCII)
CLOUD_MODEL = re.compile(r"[:-]\s*cloud(?:\s*:\s*local)*\s*\Z")     # Ollama's internal/modelref


@functools.lru_cache(MODEL_CACHE_SIZE)
def name_variants(model):
    """Return the full spellings of a model's name, the shortest first; () for an invalid name.

    Names ignore case. The defaults are Ollama's registry, "library" and "latest" (Ollama's types/model/name.go).
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
    variants = (name, f"{namespace}/{name}", f"{host}/{namespace}/{name}")
    return variants[2:] if host != "registry.ollama.ai" else variants[1:] if namespace != "library" else variants


def normalize_model(model):
    """Return the shortest full spelling of a model's name, "" for an invalid name."""
    return (name_variants(model) or ("",))[0]


def is_cloud_model(model):
    """Return whether Ollama runs a model on its owner's ollama.com account, by the model's name."""
    model = model.lower()
    return "cloud" in model and CLOUD_MODEL.search(model) is not None


def model_allowed(model, globs):
    """Return whether a list of globs allows a model in any spelling; a cloud model only by a glob with "cloud"."""
    variants = name_variants(model)
    for glob in globs.split(","):
        tagged = glob if glob.endswith("*") or ":" in glob.rpartition("/")[2] else glob + ":latest"
        if any(fnmatch.fnmatchcase(name, tagged) for name in variants) \
                and ("cloud" in glob or not is_cloud_model(model)):
            return True
    return False


BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\\"   # a backslash may escape the slash


def prompt_text_bytes(data):
    """Return the number of bytes in all strings of a JSON body; long base64 strings, such as images, do not count."""
    total, quoted = 0, 0
    for _, window in masked_windows(data):
        parts = window.split(b'"')
        strings = parts[1 - quoted::2]
        images = [string for string in strings if len(string) > KIB
                  and not string[256:].translate(None, BASE64)]     # a prefix may name the type (RFC 2397)
        total += sum(map(len, strings)) - sum(map(len, images))
        quoted ^= len(parts) % 2 == 0
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
    _reserved = 0       # bytes of the storage: disk space if there is a file, else memory

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
                piece, self._data = self._data + piece, b""
                self._storage.take("memory", -self._reserved)
                self._reserved = 0
            if not self._storage.take("disk", len(piece)):
                raise Refusal("no_room", "request bodies already take the disk space of --max-spool: try again later")
            self._reserved += len(piece)
            self._file.write(piece)

    @property
    def framing(self):
        return f"content-length: {self.size}\r\n" if self._declared else ""

    def pieces(self, _=None):
        """Yield the bytes to send; raise Refusal if they cannot be read."""
        if self._file is None:
            yield self._data
            return
        for at in range(0, self.size, FILE_PIECE_BYTES):
            with disk_errors():
                self._file.seek(at)
                piece = self._file.read(FILE_PIECE_BYTES)
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

    def insert(self, at, extra):
        """Insert bytes at a position; the bytes after it must fit in memory."""
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

    def __exit__(self, *_):
        if self._file is not None:
            with contextlib.suppress(OSError):  # unwritten data is not needed any more
                self._file.close()
        if self._storage is not None:
            self._storage.take("disk" if self._file else "memory", -self._reserved)


NO_BODY = BufferedBody(declared=False)


class StreamedBody(contextlib.AbstractContextManager):
    """A request body that is forwarded while it arrives, with the framing of the client; `judge` may raise Refusal."""

    replayable = False

    def __init__(self, client, judge):
        self._client, self._judge = client, judge
        self._chunked = isinstance(client.body, ChunkedBody)
        self.framing = "transfer-encoding: chunked\r\n" if self._chunked else f"content-length: {client.body.left}\r\n"

    def __exit__(self, *_):
        """Do nothing: the body holds no resources."""

    def pieces(self, upstream):
        """Yield the bytes to send; a response of the upstream ends the wait for the client."""
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
REPLACED_COLUMNS = {"id", "user_id", "user", "api_name", "token", "created_at", "expires_at"}
MOUNTS, REMOTE = "/proc/self/mountinfo", ("nfs", "cifs", "smb", "fuse", "9p")   # WAL needs memory shared by processes
RECHECK_SECONDS = 0.5   # interval at which SQLite is queried although its index has not changed


def digest_of(secret):
    """Return the SHA-256 of a secret in hex; 256 random bits need no slow hash."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def hint_of(secret):
    """Return a secret's first characters, and never more than half of it."""
    return secret[:min(HINT_LENGTH, len(secret) // 2)]


def check_name(what, name):
    """Return a user's or token's name; raise UsageError if a list could not show it."""
    if not name or len(name) > NAME_LENGTH or not name.isprintable() or name != name.strip() or name.startswith("-"):
        raise UsageError(f"the {what} {json.dumps(name[:80])} must have 1 to {NAME_LENGTH} printable characters, "
                         "none of them '-' at the start or a space at either end")
    return name


def _printable(text):
    return "".join(c if c.isprintable() else "?" for c in text)


def _valid_name(text, taken):
    """Return a valid name, not one of those taken, for any text of the replaced system's database."""
    base = _printable(text or "").strip().lstrip("-").strip()[:NAME_LENGTH].strip() or "unnamed"
    numbered = (f"{base[:NAME_LENGTH - 12]}-{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([base], numbered) if name not in taken)


def _replaced_instant(value, otherwise):
    """Read a time of the replaced system: Unix seconds or ISO text, which is in UTC if it names no zone."""
    try:
        if isinstance(value, (int, float)):
            return check_instant(int(value))
        return parse_instant(str(value).strip(), naive_is_utc=True)
    except (ValueError, OverflowError):
        return otherwise


def _insert(db, **row):
    db.execute(f"INSERT INTO tokens ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", list(row.values()))


def _create_tokens(db, now):
    """Version 1: tokens by digest; the rows of the replaced system's table, if it exists, are carried over."""
    replaced = db.execute("PRAGMA table_info(tokens)").fetchall()
    rows = []
    if replaced:    # read as bytes, because a text may not be UTF-8
        rows = db.execute("""SELECT CAST(user_id AS BLOB), CAST(user AS BLOB), CAST(api_name AS BLOB),
            CAST(token AS BLOB), created_at, expires_at FROM tokens ORDER BY id""").fetchall()
        db.execute("DROP TABLE tokens")
    db.execute("""CREATE TABLE tokens (
        id INTEGER PRIMARY KEY AUTOINCREMENT, user TEXT NOT NULL, name TEXT NOT NULL,
        digest TEXT NOT NULL UNIQUE, hint TEXT NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER,
        last_used_at INTEGER, admin INTEGER NOT NULL DEFAULT 0, UNIQUE (user, name))""")
    # generation: changes with the tokens, but not with last_used_at; TokenCache compares it
    db.execute("CREATE TABLE state (generation INTEGER NOT NULL, scrub_owed INTEGER NOT NULL)")
    db.execute("INSERT INTO state VALUES (1, ?)", (bool(replaced),))
    for event, when in ("INSERT", ""), ("UPDATE", "WHEN OLD.last_used_at IS NEW.last_used_at"), ("DELETE", ""):
        db.execute(f"CREATE TRIGGER tokens_{event.lower()} AFTER {event} ON tokens {when} "
                   "BEGIN UPDATE state SET generation = generation + 1; END")
    names, digests = defaultdict(set), set()
    for *texts, created_at, expires_at in rows:
        user_id, user, name, secret = (text and text.decode("utf-8", "surrogateescape") for text in texts)
        digest = digest_of(secret or "")
        if not secret or digest in digests:
            continue  # could never have been used, or is there already
        digests.add(digest)
        user = _valid_name(user or user_id, ())
        name = _valid_name(name, names[user])
        names[user].add(name)
        expires_at = None if expires_at in (None, "") else _replaced_instant(expires_at, now)  # unreadable: expired
        _insert(db, user=user, name=name, digest=digest, hint=_printable(hint_of(secret)),
                created_at=_replaced_instant(created_at, now), expires_at=expires_at)


def _add_limits_and_usage(db, _):
    """Version 2: the limits of a token, and usage by the hour, which outlives the tokens."""
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


MIGRATIONS = (_create_tokens, _add_limits_and_usage, _add_cached_and_estimated)     # the n-th makes version n


@contextlib.contextmanager
def _database_errors(path):
    """Raise Failure, naming the database, for the errors of SQLite and the file system."""
    try:
        yield
    except (sqlite3.Error, OSError, ValueError) as error:   # ValueError: a NUL in the path
        raise Failure(f"cannot use the database {path!r}: {error}") from error


@contextlib.contextmanager
def _transaction(db, begin="BEGIN"):
    """Hold a transaction; commit it at the block's end, roll it back on an error."""
    db.execute(begin)
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def _upgrade(db):
    """Bring the database to the newest version, even if others are doing the same."""
    with _transaction(db, "BEGIN IMMEDIATE"):
        version = db.execute("PRAGMA user_version").fetchone()[0]
        for number, migration in enumerate(MIGRATIONS[version:], version + 1):
            migration(db, int(time.time()))
            db.execute(f"PRAGMA user_version = {number}")


def _scrub(db):
    """Rewrite the database, so that no page of it, free or live, nor its WAL, holds a clear token."""
    try:
        db.execute("PRAGMA secure_delete = ON")
        db.execute("VACUUM")
        busy, _, _ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if not busy:  # otherwise another opener reads the WAL, and the scrub stays owed
            db.execute("UPDATE state SET scrub_owed = 0")
    except sqlite3.OperationalError as error:
        LOG.warning("clear tokens of the old gateway stay in the database until it is opened again: %s", error)


def _use_wal(db, patience):
    """Let readers and a writer work side by side; return whether the file system can."""
    deadline = time.monotonic() + patience
    while True:     # SQLite itself does not wait here for others that open a new database
        try:
            return db.execute("PRAGMA journal_mode = WAL").fetchone()[0] == "wal"
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _connect(path, writable, patience=BUSY_SECONDS, modes=("mode=ro", "immutable=1")):
    """Open the file; without the right to write, in the first of the modes in which SQLite can read it."""
    modes = ("mode=rw",) if writable else modes
    for mode in modes:
        db = sqlite3.connect(f"file:{urllib.parse.quote(os.fsencode(path))}?{mode}", uri=True, timeout=patience,
                             isolation_level=None, check_same_thread=False)
        try:
            db.execute("SELECT 1 FROM sqlite_master").fetchone()
            return db
        except sqlite3.Error as error:
            db.close()
            if mode == modes[-1] or not isinstance(error, sqlite3.OperationalError):    # it is not a database
                raise


def _check_version(db, path):
    """Return the version of a database of ours or of the replaced system (0); raise Failure for another's."""
    with _transaction(db):  # one moment for all that is read: another process may be upgrading the database
        version = db.execute("PRAGMA user_version").fetchone()[0]
        tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        columns = {row[1] for row in db.execute("PRAGMA table_info(tokens)")}
    if version > len(MIGRATIONS):
        raise Failure(f"the database {path} has version {version}, and this program knows versions up to "
                      f"{len(MIGRATIONS)}: use a newer program")
    if version == 0 and tables and not columns >= REPLACED_COLUMNS or version and not tables >= OWN_TABLES:
        raise Failure(f"{path} is a database of another program: name another file with --db")
    return version


def _find_file(path, create):
    """Make sure that the file exists; a new one is its owner's alone before it holds a byte."""
    folder = os.path.dirname(path)
    if os.path.isdir(path) or not os.path.isdir(folder):
        raise Failure(f"the database cannot be {path}: "
                      + ("that is a folder" if os.path.isdir(path) else f"there is no folder {folder}"))
    exists = os.path.exists(path)
    if not create and not (exists and os.path.getsize(path)):
        raise Failure(f'there is no database at {path} yet: "token create" makes one, or name another with --db')
    if not exists:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def _is_writable(path):
    return os.access(path, os.W_OK) and os.access(os.path.dirname(path), os.W_OK)


def remote_file_system(path):
    """Return the type of the network or FUSE file system that holds a file, "" for others or if it is unknown."""
    with contextlib.suppress(OSError), open(MOUNTS, encoding="utf-8", errors="replace") as mounts:
        device = os.stat(os.path.dirname(path)).st_dev
        for line in mounts:     # proc(5): id, parent, major:minor, …, "-", type, source, options
            mount, _, kind = line.partition(" - ")
            if mount.split()[2:3] == [f"{os.major(device)}:{os.minor(device)}"] and kind.startswith(REMOTE):
                return kind.split()[0]
    return ""


def _identify(path):
    """Return device and inode of a file, None if it is missing or out of reach."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _make_private(paths):
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
    """Move what was committed into the database file: SQLite would apply a -wal to any file that replaces it."""
    with contextlib.suppress(sqlite3.Error):
        db.execute("PRAGMA busy_timeout = 0")   # if there are readers, the next writer does it
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.execute(f"PRAGMA busy_timeout = {int(patience * 1000)}")


def _remove_wal(paths, files):
    """Remove the -wal and -shm of a replaced database: SQLite would apply them to the new one."""
    with contextlib.ExitStack() as stack:   # with a lock, or one gateway removes what another has just created
        with contextlib.suppress(OSError, ImportError):     # Windows has no such lock, and replaces no open file
            import fcntl
            folder = os.open(os.path.dirname(paths[0]), os.O_RDONLY)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)
        for path in paths[1:] if files[1:] == [_identify(path) for path in paths[1:]] else ():
            with contextlib.suppress(OSError):
                os.unlink(path)


WAL_INDEXES, WAL_INDEXES_LOCK = weakref.WeakValueDictionary(), threading.Lock()     # {(device, inode): header}


def _map_wal_index(path, file):
    """Map the header of a WAL index, 48 bytes of the -shm file that each commit changes; return b"" if that fails.

    It has a count of transactions, and the WAL's salts and checksums, which restart and recovery change, too
    (sqlite.org/walformat.html 2.1). A process that closes any descriptor of a file loses all its locks on the file
    (fcntl), and SQLite holds some on this one: so a process maps it once, and keeps the map until it has no connection.
    """
    with contextlib.suppress(OSError, ValueError), WAL_INDEXES_LOCK:
        if os.name == "posix" and file not in WAL_INDEXES:
            descriptor = os.open(path, os.O_RDONLY)     # stays open after an error, for the locks
            header = mmap.mmap(descriptor, 48, access=mmap.ACCESS_READ)
            weakref.finalize(header, os.close, descriptor).atexit = False
            WAL_INDEXES[_identify(descriptor)] = header
        return WAL_INDEXES.get(file, b"")
    return b""


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

    def __add__(self, other):
        """Return the sums by column; None counts as nothing, and None + None is None."""
        return UsageRow(*(b if a is None else a if b is None else a + b for a, b in zip(self, other)))

    def __sub__(self, other):
        return UsageRow(*(a if a is None or b is None else a - b for a, b in zip(self, other)))

    @property
    def tokens_used(self):
        """The tokens that a budget is charged: the cached part of a prompt costs no computation."""
        return (self.prompt_tokens or 0) - (self.cached_tokens or 0) + (self.completion_tokens or 0)


USAGE_KEY = ("hour", "user", "name", "model", "route")
MEASURED = UsageRow._fields
TOKENS_USED = "ifnull(prompt_tokens, 0) - ifnull(cached_tokens, 0) + ifnull(completion_tokens, 0)"   # as UsageRow's
USAGE_BY = {"user": ("user",), "token": ("user", "name"), "model": ("model",), "day": ("day",)}


def check_rights(user, name, admin, models):
    """Raise UsageError for an admin token with a list of models, because admin tokens may use every model."""
    if admin and models:
        raise UsageError(f'the token "{user}/{name}" would be an admin\'s, and admin tokens may use every model: '
                         "give it --models none, or --no-admin")


def token_exists(user, name):
    return Failure(f'the token "{user}/{name}" exists already: choose another name, or "token rotate" it',
                   "token_exists")


class TokenStore(contextlib.AbstractContextManager):
    """The database of tokens and usage, for threads and processes; each access first follows a replaced file."""

    COLUMNS = ", ".join(Token._fields)
    EXPORTED = ("user", "name", "digest", "hint", "created_at", "expires_at", "last_used_at", "admin", *LIMIT_BY_COLUMN)

    def __init__(self, path, create=False, clock=time.time):
        self.path, self._paths = path, (path, path + "-wal", path + "-shm")
        self._lock, self._clock, self._patience = threading.Lock(), clock, BUSY_SECONDS
        self._unusable = None   # (identity of a new file that failed to open, error, when to try again)
        self._open(create)

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._db.close()
        self._wal_index = b""

    def wait_at_most(self, seconds):
        """Set how long to wait for a locked database; commands wait longer than a server may."""
        self._patience = seconds
        self._db.execute(f"PRAGMA busy_timeout = {int(seconds * 1000)}")

    def connect(self):
        """Return a new connection, the identities of the database's files, and the WAL index; raise Failure."""
        with self._lock, _database_errors(self.path):
            self._reopen_if_replaced()
            return _connect(self.path, self.writable, self._patience), self.files, self._wal_index

    def _open(self, create=False):
        """Open the database and upgrade an older one; raise Failure if it cannot be used, and leave it untouched."""
        path, patience = self.path, self._patience
        with _database_errors(path), contextlib.ExitStack() as stack:
            _find_file(path, create)
            file, writable, is_wal = _identify(path), _is_writable(path), False
            db = stack.enter_context(contextlib.closing(_connect(path, writable, patience)))
            version = _check_version(db, path)
            if version < len(MIGRATIONS) and not writable:
                raise Failure(f"the database {path} must be upgraded and is read-only: make it and its folder writable")
            if writable:
                _make_private(self._paths)
                is_wal = _use_wal(db, patience)
                if version < len(MIGRATIONS):
                    _upgrade(db)
                if db.execute("SELECT scrub_owed FROM state").fetchone()[0]:
                    _scrub(db)
                _empty_wal(db, patience)
            # Of a read-only database only the file itself counts: other processes create and remove the -wal.
            files = [_identify(path) for path in (self._paths if writable else self._paths[:1])]
            shares_old_shm = any(files[1:]) and not all(files[1:])  # with a connection of this process
            if files[0] != file or shares_old_shm:
                raise Failure(f"the database {path} was replaced while it was opened: try again")
            stack.pop_all()
        self._db, self.writable, self.files = db, writable, files
        self._wal_index = _map_wal_index(self._paths[2], files[2]) if is_wal else b""

    def _reopen_if_replaced(self):
        """Reopen the database if it was replaced; raise Failure while it is missing or cannot be used."""
        found = [_identify(path) for path in self._paths[:len(self.files)]]
        file = found[0]
        if file is None:
            raise Failure(f"the database {self.path} is gone: move it, or a copy of it, back there")
        if found == self.files:
            return
        if self._unusable and self._unusable[0] == file and time.monotonic() < self._unusable[2]:
            raise Failure(self._unusable[1])
        if file != self.files[0]:
            _remove_wal(self._paths, self.files)
        self.files = [None]     # even if the old file comes back
        self.close()
        try:
            self._open()
        except Failure as error:
            self._unusable = file, str(error), time.monotonic() + REOPEN_SECONDS
            raise
        self._unusable = None
        LOG.warning("the database %s was replaced: using the new file", self.path)

    @contextlib.contextmanager
    def _read(self):
        """Hold a transaction that reads; raise Failure if the database cannot be used."""
        with self._lock, _database_errors(self.path):
            self._reopen_if_replaced()
            with _transaction(self._db):
                yield self._db

    @contextlib.contextmanager
    def _write(self):
        """Hold a transaction that writes; raise Failure if that is impossible or the file was replaced meanwhile."""
        with self._lock:
            self._reopen_if_replaced()
            if not self.writable:
                raise Failure(f"the database {self.path} is read-only: "
                              "make it and its folder writable to change tokens")
            with _database_errors(self.path), _transaction(self._db, "BEGIN IMMEDIATE"):
                yield self._db
            if [_identify(path) for path in self._paths] != self.files:
                raise Failure(f"the database {self.path} was replaced meanwhile: "
                              "check whether the change was saved, and repeat it if not")
            _empty_wal(self._db, self._patience)

    def _select(self, db, condition, *values):
        """Return the tokens that meet a condition, by user and name."""
        return [Token(*row) for row in db.execute(
            f"SELECT {self.COLUMNS} FROM tokens WHERE {condition} ORDER BY user, name", values)]

    def _get(self, db, user, name):
        found = self._select(db, "user = ? AND name = ?", check_name("user", user), check_name("name", name))
        if not found:
            raise Failure(f'no token "{user}/{name}" in {self.path}: see "token list"', "no_such_token")
        return found[0]

    def create(self, user, name, expires_at=None, admin=False, **limits):
        """Make a token; return it and its secret, which is not stored. limits: by the columns of LIMITS."""
        check_name("user", user)
        check_name("name", name)
        check_rights(user, name, admin, limits.get("models"))
        secret = SECRET_PREFIX + secrets.token_urlsafe(32)
        with self._write() as db:
            if self._select(db, "user = ? AND name = ?", user, name):
                raise token_exists(user, name)
            _insert(db, user=user, name=name, digest=digest_of(secret), hint=hint_of(secret),
                    created_at=int(self._clock()), expires_at=expires_at, admin=bool(admin), **limits)
            return self._get(db, user, name), secret

    def rotate(self, user, name):
        """Give a token a new secret and return both; the old secret stops working."""
        secret = SECRET_PREFIX + secrets.token_urlsafe(32)
        return self.update(user, name, digest=digest_of(secret), hint=hint_of(secret)), secret

    def update(self, user, name, **changes):
        """Change columns of a token: expires_at, admin or limits; return the token."""
        with self._write() as db:
            token = self._get(db, user, name)
            for column, value in changes.items():
                db.execute(f"UPDATE tokens SET {column} = ? WHERE id = ?", (value, token.id))
            token = self._get(db, user, name)
            check_rights(user, name, token.admin, token.models)
            return token

    def delete(self, user, name):
        """Delete a token and return it."""
        with self._write() as db:
            token = self._get(db, user, name)
            db.execute("DELETE FROM tokens WHERE id = ?", (token.id,))
            return token

    def get(self, token_id):
        """Return the token with an id."""
        with self._read() as db:
            found = self._select(db, "id = ?", token_id)
        if not found:
            raise Failure(f"no token has the number {token_id}", "no_such_token")
        return found[0]

    def list(self, user=None):
        """Return the tokens of a user or of all, by user and name."""
        with self._read() as db:
            return self._select(db, "? IN (user, '')", "" if user is None else check_name("user", user))

    def add_usage(self, rows, uses):
        """Add {USAGE_KEY's values: UsageRow} to the usage, and set when tokens were last used: {id: Unix seconds}."""
        columns = USAGE_KEY + MEASURED
        add = ", ".join(f"{column} = coalesce({column} + excluded.{column}, {column}, excluded.{column})"
                        for column in MEASURED)
        with self._write() as db:
            db.executemany(f"INSERT INTO usage ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) "
                           f"ON CONFLICT ({', '.join(USAGE_KEY)}) DO UPDATE SET {add}",
                           [(*key, *row) for key, row in rows.items()])
            db.executemany("UPDATE tokens SET last_used_at = ? WHERE id = ? AND ifnull(last_used_at, 0) < ?",
                           [(when, token_id, when) for token_id, when in uses.items()])

    def usage(self, by, since, token=None):
        """Return the usage since the start of an hour, of a token or of all: a dictionary for each value of `by`."""
        keys, owner = USAGE_BY[by], (token.user, token.name) if token else ()
        sums = ", ".join("round(sum(seconds), 3)" if column == "seconds" else f"sum({column})" for column in MEASURED)
        with self._read() as db:
            rows = db.execute(
                f"SELECT {', '.join(keys)}, {sums} FROM (SELECT *, date(hour, 'unixepoch') AS day FROM usage "
                f"WHERE {'user = ? AND name = ? AND ' if owner else ''}hour >= ?) "
                f"GROUP BY {', '.join(keys)} ORDER BY {'day' if by == 'day' else f'sum({TOKENS_USED}) DESC, 1'}",
                (*owner, since)).fetchall()
        return [dict(zip(keys + MEASURED, row)) for row in rows]

    def _exported(self, db, condition, *values):
        return [dict(zip(self.EXPORTED, row)) for row in db.execute(
            f"SELECT {', '.join(self.EXPORTED)} FROM tokens WHERE {condition} ORDER BY user, name", values)]

    def export_rows(self):
        """Return the tokens to carry to another machine: a dictionary each, with digests, never secrets."""
        with self._read() as db:
            return self._exported(db, "1")

    def import_rows(self, rows):
        """Add exported rows, all or none; an identical row is no change. Return how many were new."""
        added = 0
        with self._write() as db:
            for row in rows:
                known = [dict(old, last_used_at=row["last_used_at"]) for old in self._exported(
                    db, "user = ? AND name = ? OR digest = ?", row["user"], row["name"], row["digest"])]
                if known and known != [row]:
                    raise Failure(f'the token "{row["user"]}/{row["name"]}" clashes with one in {self.path}: '
                                  "nothing was imported; delete or rename one of them first")
                if not known:
                    _insert(db, **row)
                    added += 1
        return added


def open_store(path, create=False):
    """Return the TokenStore of a path; `create` allows a missing or empty file. Raise Failure if it cannot be used."""
    return TokenStore(os.path.abspath(path), create)


DatabaseInfo = namedtuple("DatabaseInfo", "version tokens writable mode")    # writable by this user; mode of its file


def describe_database(path):
    """Return the DatabaseInfo of a database without any change to it; raise Failure if it cannot be used."""
    path = os.path.abspath(path)
    with _database_errors(path):
        _find_file(path, create=False)
        modes = ("mode=ro", "immutable=1") if os.path.exists(path + "-wal") else ("immutable=1",)
        with contextlib.closing(_connect(path, False, modes=modes)) as db:
            version = _check_version(db, path)
            tokens = db.execute("SELECT count(*) FROM tokens").fetchone()[0]
        return DatabaseInfo(version, tokens, _is_writable(path), os.stat(path).st_mode & 0o777)


class TokenCache:
    """All tokens by digest, in memory, as new as the last commit of any process.

    A lookup compares the file's device and inode, and the header of the WAL index, with those of the last refresh. If
    they differ, and every RECHECK_SECONDS, it asks SQLite (`PRAGMA data_version`), which costs 42 µs of CPU with
    8 threads; without a WAL index every lookup asks. Tokens are read again only if their generation has changed.
    The connection never waits: while the database is locked, the old tokens count. If the file is replaced, the tokens
    are read from the new one; while it is missing or cannot be read, a lookup fails.
    """

    def __init__(self, store):
        self._store, self._path, self._lock = store, store.path, threading.Lock()
        self._db = self._file = self._files = self._header = None
        self._wal_index, self._asked_at, self._complaint = b"", 0.0, ""
        try:
            with _database_errors(self._path):
                self._reopen()
        except Failure:
            self.close()
            raise

    def lookup(self, secret):
        """Return the token of a secret, expired or not, or None; raise Failure while the database cannot be read."""
        file, header, now = _identify(self._path), self._wal_index[:], time.monotonic()
        if (file != self._file or not header or header != self._header
                or self._files is not self._store.files or now - self._asked_at > RECHECK_SECONDS):
            with self._lock:
                if self._update(file):
                    self._header, self._asked_at = header, now
        return self._tokens.get(digest_of(secret))

    def _update(self, file):
        """Update the tokens; return False if the database is locked; raise Failure, logged once, if it is unusable."""
        try:
            with _database_errors(self._path):
                if file is None or file != self._file or self._files is not self._store.files:
                    self._reopen()
                self._refresh()
        except Failure as error:
            if "locked" in str(error.__cause__) and self._file:
                return False
            self._file = None
            if str(error) != self._complaint:
                LOG.error("requests are refused, because tokens cannot be checked: %s", error)
            self._complaint = str(error)
            raise
        if self._complaint:
            LOG.warning("the database %s is readable again: requests are served", self._path)
            self._complaint = ""
        return True

    def _reopen(self):
        """Connect to the present file and read its tokens; wait while it is locked."""
        self._file = None
        self.close()
        self._db, files, self._wal_index = self._store.connect()
        self._seen = self._generation = None
        self._refresh()
        self._db.execute("PRAGMA busy_timeout = 0")
        self._file, self._files = files[0], files

    def _refresh(self):
        """Read the tokens if they have changed."""
        version = self._db.execute("PRAGMA data_version").fetchone()
        if version == self._seen:
            return
        with _transaction(self._db):
            generation = self._db.execute("SELECT generation FROM state").fetchone()
            if generation != self._generation:
                rows = self._db.execute(f"SELECT {TokenStore.COLUMNS}, digest FROM tokens")
                self._tokens = {digest: Token(*row) for *row, digest in rows}
        self._generation, self._seen = generation, version

    def tokens_used_on(self, token, day):
        """Return the tokens charged to a token's budget on a UTC day, as stored; raise Failure."""
        with self._lock, _database_errors(self._path):
            return self._db.execute(
                f"SELECT ifnull(sum({TOKENS_USED}), 0) FROM usage "
                "WHERE user = ? AND name = ? AND hour >= ? AND hour < ?",
                (token.user, token.name, day_start(day), day_start(day + 1))).fetchone()[0]

    def close(self):
        if self._db:
            self._db.close()
        self._wal_index = b""   # after the connection: see _map_wal_index

# == Server ===================================================================


class ClientConnection(Connection):
    """A client's connection. As `cancel_on` it ends a wait when the client leaves or the server aborts its requests."""

    last_request = False    # the server is stopping: no further request may follow
    shutting_down = False   # the server aborts requests: the current one must end too
    has_token = False       # the current request has a valid token
    token_id = None         # the id of that token, until the last piece of the response is sent
    stalled = False         # the current request waited for its client, or for the delay of a wrong credential

    def wait(self, events, deadline, cancel_on=None):
        """Wait for events and return them; raise Refusal if `abort_for_shutdown` caused them."""
        found = wait_for(self.descriptor, events, deadline, cancel_on)
        if self.shutting_down and events & READABLE:  # a read would end TLS, and no response could be sent
            raise Refusal("stopping")
        return found

    def on_readable(self):
        """Raise ClientLeft if the client closed its side; keep a pipelined request for later."""
        if self.shutting_down:
            raise Refusal("stopping")
        if len(self.buffer) >= PIPELINED_BYTES or not self.alive():
            raise ClientLeft("the client hung up")

    def until_writable(self, deadline, cancel_on):
        """Wait for a slow reader; raise ClientLeft if it hung up."""
        self.stalled = True
        if self.wait(WRITABLE | HUNG_UP, deadline, cancel_on) & HUNG_UP:
            raise ClientLeft("the client hung up")

    def pause(self, seconds):
        """Wait for some seconds; raise ClientLeft if the client leaves meanwhile."""
        self.stalled, deadline = True, Deadline(seconds)
        with contextlib.suppress(TimeoutError):
            while True:
                self.wait(self.watched_events(), deadline)
                self.on_readable()

    def abort_for_shutdown(self):
        """Wake the connection's thread, which then sends its client an error."""
        self.shutting_down = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RD)

    def drain(self):
        """Discard what a refused client still sends: closing with unread data would reset the response."""
        aborted, self.shutting_down, self.stalled = self.shutting_down, False, True
        deadline, left = Deadline(ABORT_SECONDS / 2 if aborted else DRAIN_SECONDS), DRAIN_BYTES
        with contextlib.suppress(OSError, Refusal):
            self.sock.shutdown(socket.SHUT_WR)
            while left > 0 and (self.fill(deadline) or aborted):
                left -= len(self.buffer)
                if not self.buffer:     # after SHUT_RD: nothing has arrived
                    time.sleep(0.02)
                self.buffer = b""


class ConnectionLimiter:
    """Limits the open connections.

    A connection is idle until the head of a request has arrived, then active until its response has ended. At the limit
    the one that is idle longest is evicted; if none is idle, an active one that stalls without a valid token.
    """

    def __init__(self, most, trusted=()):
        self.most, self._trusted = most, trusted
        self._share = max(most // 4, 1)     # of a network's connections without a request, and of a token's requests
        self._idle = OrderedDict()          # {connection: its network until its first request, then None}, oldest first
        self._active = {}                   # {connection: True}, oldest first
        self._stopping = self._aborting = False
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    def __len__(self):
        return len(self._idle) + len(self._active)

    def admit(self, connection, address):
        """Add a new connection, evicting another one if necessary; return False if none can be evicted.

        A network that has its share of connections without a request loses the oldest of these.
        """
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
        """Evict a connection; return False if none can be evicted."""
        with self._lock:
            stalled = (connection for connection in self._active if connection.stalled and not connection.has_token)
            connection = next(itertools.chain(self._idle, stalled), None)
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
            return connection in self._idle and not self._stopping

    def mark_active(self, connection):
        """Note that the head of a request has arrived; return False if the connection was evicted before."""
        with self._lock:
            if self._idle.pop(connection, False) is False:
                return False
            connection.has_token, connection.token_id, connection.stalled = False, None, False
            self._active[connection] = True
            return True

    def authenticate(self, connection, token_id):
        """Note the token of a connection's request; raise Refusal if it has a quarter of all connections already."""
        if len(self._active) > self._share:
            with self._lock:
                if sum(other.token_id == token_id for other in self._active) >= self._share:
                    raise Refusal("too_many_at_once", f"this token may have {plural(self._share, 'request')} open, a "
                                                      "quarter of --max-connections: try again later")
        connection.has_token, connection.token_id = True, token_id

    def remove(self, connection):
        with self._lock:
            self._idle.pop(connection, None)
            self._active.pop(connection, None)
            self._changed.notify_all()

    def drain(self, seconds):
        """Let active connections finish for some seconds, then abort them so that their clients see an error."""
        with self._lock:
            self._stopping = True
            for connection in self._active:
                connection.last_request = True
            for connection in list(self._idle):
                self._end(connection)
            deadline = time.monotonic() + seconds
            while self._active and not self._aborting and time.monotonic() < deadline:
                self._changed.wait(STOP_CHECK_SECONDS)
            for end in ClientConnection.abort_for_shutdown, Connection.shut_down:
                for connection in self._active:
                    end(connection)
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

    Its threads share the interpreter's lock, so they run one at a time; on several cores each handover of the lock
    wakes another core. On two cores, 8 clients without a pause got 11, 15 and 35 % more responses in three runs; paced
    clients, and those beside two busy processes, showed no difference outside the noise.
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


class GatewayServer(http.server.ThreadingHTTPServer):
    """Accepts connections and serves each in its own thread, from the TLS handshake on."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = BACKLOG
    allow_reuse_address = os.name == "posix"  # on Windows it would let another program steal the port

    BUSY_RESPONSE = (b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\n"
                     b"Connection: close\r\nContent-Length: 47\r\n\r\n"
                     b'{"error": "too many connections: retry later"}\n')

    def __init__(self, settings, handler, gateway, connections, tls=None):
        found = look_up(settings.host, settings.port, socket.AI_PASSIVE)[0]
        self.address_family = found[0]
        self.settings, self.gateway, self.connections, self.tls = settings, gateway, connections, tls
        self.storage = BodyStorage(settings.max_spool)
        self.next_id = map((secrets.token_hex(4) + "%08x").__mod__, itertools.count()).__next__     # ids of requests
        self._rejecting = deque()     # (connection, when to close it)
        self._warned_at = -math.inf
        super().__init__(found[4], handler)

    def server_bind(self):
        """Bind without http.server's lookup of the host's name; :: accepts IPv4 too."""
        if self.address_family == socket.AF_INET6:
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)

    @property
    def url(self):
        """Return the gateway's URL, with the machine's name if it listens on all addresses."""
        host, port = self.server_address[:2]
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        return f"{'https' if self.tls else 'http'}://{shown}:{port}"

    def get_request(self):
        """Accept a connection; without free descriptors, evict one and back off: the listener stays readable."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in OUT_OF_DESCRIPTORS:
                self.warn_of_descriptors()
            if error.errno in (*OUT_OF_DESCRIPTORS, errno.ENOBUFS, errno.ENOMEM):
                if not self.connections.evict():
                    self.gateway.free_descriptors()
                time.sleep(0.05)
            raise

    def warn_of_descriptors(self):
        """Log, once a minute, that no file descriptors are free."""
        now = time.monotonic()
        if now >= self._warned_at + MINUTE:
            self._warned_at = now
            LOG.warning("out of file descriptors: raise the limit (ulimit -n, or LimitNOFILE= of the systemd unit) or "
                        "lower --max-connections (now %d)", self.connections.most)

    def process_request(self, request, client_address):
        """Start a thread for a new connection, or reject it."""
        connection = ClientConnection(request)
        if self.connections.admit(connection, client_address[0]):
            try:
                return super().process_request(connection, client_address)
            except RuntimeError:  # no thread could be started
                self.connections.remove(connection)
        self._reject_busy(connection)

    def _reject_busy(self, connection):
        """Answer 503 without a thread, and close the connection later: a reset now could lose the response."""
        if self.tls:
            return connection.close()  # a response would cost a handshake
        with contextlib.suppress(OSError):
            connection.sock.send(self.BUSY_RESPONSE)  # fits the buffer of a new socket
            connection.sock.shutdown(socket.SHUT_WR)
        self._rejecting.append((connection, time.monotonic() + REJECT_SECONDS))

    def service_actions(self):
        """Close rejected connections in time, sooner if there are many; socketserver calls this twice a second."""
        while self._rejecting and (len(self._rejecting) > MAX_REJECTING or self._rejecting[0][1] < time.monotonic()):
            self._rejecting.popleft()[0].close()

    def process_request_thread(self, request, client_address):
        """Serve a connection (`request`) in its own thread until it ends."""
        try:
            if self.tls:
                request.start_tls(self.tls, Deadline(self.settings.header_timeout), server_side=True)
            self.RequestHandlerClass(request, client_address, self)
        except Exception:  # like socketserver: a connection's failure is logged and ends no other one
            self.handle_error(request, client_address)
        finally:
            self.connections.remove(request)
            request.close()

    def shutdown_request(self, request):
        """Close a connection that was not served; after a signal to stop, its thread may have started and closes it."""
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):
            super().shutdown_request(request)

    def handle_error(self, request, client_address):
        """Log a failure, unless the connection ended or was aborted before there was a request to answer."""
        if not isinstance(sys.exc_info()[1], (OSError, Refusal)):
            LOG.exception("the connection from %s failed", client_address[0])

    def stop(self, seconds):
        """Accept no new connections, and let running requests finish for some seconds."""
        self.socket.close()
        self.connections.drain(seconds)

    def server_close(self):
        """Stop listening, close all connections, and stop the gateway's background threads."""
        super().server_close()
        self.connections.drain(0)
        for connection, _ in self._rejecting:
            connection.close()
        self.gateway.close()


def client_failure(error, late):
    """Return the exception for an error in reading from a client: Refusal, with the text `late`, or ClientLeft."""
    if isinstance(error, Malformed):
        return Refusal(error.code, str(error))
    return Refusal("too_slow", late) if is_late(error) else ClientLeft(str(error))


class RequestReader:
    """Reads a request; `head` has been read before: bytes, or the exception that `read_request` raises."""

    request = None          # once its head is parsed
    keep_alive = False      # another request may follow on the connection
    _expects_continue = False

    def __init__(self, server, connection, context, head):
        self.connection, self.context, self._server, self._head = connection, context, server, head
        self.body = LengthBody(None)    # until the head is parsed: all that arrives belongs to this request

    def read_request(self):
        """Parse and return the request's head; raise Refusal or ClientLeft."""
        head, context = self._head, self.context
        if isinstance(head, Exception):
            raise head
        try:
            parse = parse_cached_request if len(head) <= CACHED_HEAD_BYTES else parse_request
            self.request = context.request = request = parse(head)
            given = request.fields.get("x-request-id")
            if given and REQUEST_ID.fullmatch(given):
                context.id = given
            self.body = request_decoder(request)
        except Malformed as error:
            raise Refusal(error.code, str(error)) from None
        self.keep_alive = not request.closes
        self._expects_continue = "expect" in request.fields and request.version == "1.1"
        if self._expects_continue and request.fields["expect"].lower() != "100-continue":
            raise Refusal("unknown_expectation", "only 100-continue can be expected here")
        return request

    def read_body(self, cancel_on=None, deadline=None):
        """Return the next piece of the request's body, b"" at its end; raise Refusal if it is malformed or too slow."""
        late = "the body took longer than {:g} s" if deadline else "nothing of the body arrived for {:g} s"
        try:
            if self._expects_continue and not self.body.complete and not self.connection.buffer:
                self.connection.send(b"HTTP/1.1 100 Continue\r\n\r\n", Deadline(SEND_SECONDS))
            self._expects_continue = False
            return self.connection.read_piece(self.body, deadline or Deadline(BODY_SECONDS), cancel_on)
        except (Malformed, OSError) as error:
            raise client_failure(error, late.format(PAGE_BODY_SECONDS if deadline else BODY_SECONDS)) from None

    def read_page_body(self):
        """Return the whole body of a request to one of our own pages; raise Refusal if it is too large or too slow."""
        body, deadline = b"", Deadline(PAGE_BODY_SECONDS)
        while not self.body.complete:
            body += self.read_body(deadline=deadline)
            self._check_size(len(body), PAGE_BODY_BYTES)
        return body

    def read_whole_body(self):
        """Read and return the request's body, for a with block; raise Refusal if it is too large or cannot be kept."""
        most = self._server.settings.max_body
        if self.body.complete:
            return BufferedBody(declared="content-length" in self.request.fields)
        self._check_size(self.body.left, most, " (--max-body)")
        piece = self.read_body()
        if self.body.complete and len(piece) <= RECEIVE_BYTES:
            return BufferedBody(piece)
        with contextlib.ExitStack() as stack:
            body = stack.enter_context(BufferedBody(bytearray(), storage=self._server.storage))
            body.append(piece)
            while not self.body.complete:
                body.append(self.read_body())
                self._check_size(body.size, most, " (--max-body)")
            stack.pop_all()
            return body

    @staticmethod
    def _check_size(size, most, flag=""):
        if size > most:
            raise Refusal("body_too_large", f"the body is larger than {most} bytes{flag}")


class ClientStream(RequestReader):
    """The client's side of a request: reads the request and writes the response."""

    limit_fields = tuple    # returns the fields that report the token's limits, as of now
    finished = False        # the last piece was sent
    _pending = b""          # a head that waits for the first piece
    _framing = ""           # "chunked", "length", "open" (until the connection ends) or "none"
    _stream_type = ""       # the response's content type, if its body consists of lines
    _tail = b"\n\n"         # the last two bytes of the response's body

    def __init__(self, *reader):
        super().__init__(*reader)
        self.extra = []     # fields for each response

    def start(self, status, phrase, lines, content_type, length=None):
        """Begin the response; without a length, its body ends with the last piece that `write` gets.

        lines: the head's own fields, as text.
        """
        request, bodiless = self.request, status in (204, 304)
        if bodiless or request and request.method == "HEAD":
            self._framing = "none"
        elif length is not None:
            self._framing = "length"
        else:
            self._framing = "chunked" if request.version == "1.1" else "open"
        self.keep_alive = self.keep_alive and self.body.complete and not self.connection.last_request
        head = f"HTTP/1.1 {status} {phrase}\r\n{lines}X-Request-Id: {self.context.id}\r\n"
        if content_type.startswith(STREAM_TYPES):
            self._stream_type = content_type
            head += "X-Accel-Buffering: no\r\n"  # or an nginx in front of the gateway holds pieces back
        for name, value in (*self.extra, *self.limit_fields()):
            head += f"{name}: {value}\r\n"
        if length is not None and not bodiless:
            head += f"Content-Length: {length}\r\n"
        elif self._framing == "chunked":
            head += "Transfer-Encoding: chunked\r\n"
        if not self.keep_alive:
            head += "Connection: close\r\n"
        self._pending = (head + "\r\n").encode("latin-1")
        self.context.status = status

    def write(self, piece, last=False):
        """Send a piece of the response at once; the last one ends it. Raise ClientLeft if it cannot be sent."""
        data, self._pending = self._pending, b""
        if self._framing != "none":
            data += encode_chunk(piece, last) if self._framing == "chunked" else piece
            self._tail = (self._tail + piece[-2:])[-2:]
            self.context.bytes_sent += len(piece)
        if last:    # a client that has read it may send its next request at once
            self.connection.token_id = None
        if data:
            try:
                self.connection.send(data, Deadline(SEND_SECONDS))
            except OSError as error:
                raise ClientLeft(str(error)) from None
            if self.context.first_byte_at is None:
                self.context.first_byte_at = time.monotonic()
        self.finished = last

    def flush(self):
        """Send the response's head now, if it still waits for a piece."""
        if self._pending:
            self.write(b"")

    def answer(self, status, content_type, body, fields=()):
        """Send a whole response of the gateway's own."""
        own = [("Date", email.utils.formatdate(usegmt=True)), *fields]
        if body:
            own += [("Content-Type", content_type), ("X-Content-Type-Options", "nosniff")]
        lines = "".join(f"{name}: {value}\r\n" for name, value in own)
        self.start(status, http.HTTPStatus(status).phrase, lines, content_type, len(body))
        self.write(body, last=True)

    def refuse(self, refusal):
        """Send a refusal; if a response has begun, end it with an error so that it does not look complete."""
        dialect = dialect_of(self.request.path) if self.request else "ollama"
        error = json.dumps(refusal.body_for(dialect)).encode()
        try:
            if self.context.first_byte_at is None:
                return self.answer(refusal.status, "application/json", error + b"\n", refusal.fields)
            self.context.outcome = "broken"
            if self._stream_type and self._framing in ("chunked", "open"):
                self.write(self._error_line(error, dialect))
        except ClientLeft:
            self.context.outcome = "left"
        self.abort()

    def _error_line(self, error, dialect):
        """Return a stream's error line or event, after the end of the line or event that is open."""
        line_ends = len(self._tail) - len(self._tail.rstrip(b"\n"))
        if not self._stream_type.startswith("text/event-stream"):
            return b"\n" * (not line_ends) + error + b"\n"
        event = b"event: error\n" if dialect == "anthropic" else b""
        return b"\n" * (2 - line_ends) + event + b"data: " + error + b"\n\n"

    def abort(self):
        """Close the connection before the response's end; reset it where a normal close would look like the end."""
        if self._framing == "open" or self.context.outcome == "left":
            self.connection.reset()
        self.connection.close()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the requests of a connection, one after the other; `request` is the ClientConnection."""

    def setup(self):
        self.patience = self.server.settings.header_timeout     # for the first request; idle_timeout for later ones

    def finish(self):
        self.request.close_notify()

    def handle_one_request(self):
        """Wait for a request and serve it; end without a response if none arrives or the connection is evicted."""
        connection, server = self.request, self.server
        self.close_connection = True
        if not server.connections.mark_idle(connection):
            return
        if not connection.buffer and not connection.fill(Deadline(self.patience)):
            return
        context = RequestContext(self.client_address[0], time.monotonic())
        context.id = server.next_id()
        try:
            head = connection.read_piece(HeadDecoder(), Deadline(server.settings.header_timeout))
        except (Malformed, OSError) as error:
            head = client_failure(error, f"the headers took longer than {server.settings.header_timeout:g} s")
        if not server.connections.mark_active(connection):
            return
        client = ClientStream(server, connection, context, head)
        server.gateway.serve(client)
        if context.refusal_code == "no_descriptors":
            server.warn_of_descriptors()
        self.close_connection = not (client.finished and client.keep_alive)
        self.patience = server.settings.idle_timeout
        if client.finished and not client.body.complete:
            connection.drain()

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
            raise Unreadable("there is a query beside the form")
        return body.inspect(inspect_form, context.request.fields.get("content-type", ""))
    except Unreadable as error:
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
                                       "or one whose list of models names it")
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
                break   # a trusted proxy did not write what is left of it
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

    def identify(self, request, address, pause):
        """Return the request's token; raise Refusal if none is valid now.

        An invalid secret counts against the address, and its refusal may be delayed by `pause(seconds)`.
        """
        secret = secret_of(request)
        token = self._tokens.lookup(secret) if secret else None
        if token is not None and (token.expires_at is None or self._clock() < token.expires_at):
            return token
        if secret:
            self._delay(address, pause)
        text = 'no valid token: send "Authorization: Bearer TOKEN" or "x-api-key: TOKEN", or ask for a new one'
        if request.path_secret is not None:     # the ollama command shows the text of a 403, and hides that of a 401
            raise Refusal("forbidden", text)
        raise Refusal("unauthorized", text, [("WWW-Authenticate", "Bearer")])

    def _delay(self, address, pause):
        failures = self._throttle.add(address)
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
    """How much is left of one of a token's limits, and in how many seconds there is more."""

    name: str
    limit: int
    remaining: int
    reset: int

    def refusal(self):
        """Return the Refusal of a request that exceeds the limit."""
        if self.name == "tokens_per_day":   # without X-Should-Retry SDKs sleep until midnight
            return Refusal("budget_spent", f"this token's {self.limit} tokens a day are used up: try again after "
                                           "00:00 UTC", [("X-Should-Retry", "false")], self.reset)
        limit = LIMIT_BY_COLUMN[self.name]
        return Refusal(limit.refusal, f"this token may have {limit.phrase.format(plural(self.limit, 'request'))}: "
                                      f"try again in {self.reset} s", retry_after=self.reset)


def is_limited(token):
    return bool(token.rpm or token.max_parallel or token.tokens_per_day)


class UsageLedger:
    """Collects usage in memory, stores it twice a second, and reports how much of a budget is used.

    A running request counts with the tokens that have passed so far: a crash loses one second at most. A request of
    a token with a budget is counted before its last piece is sent, all others by the Journal in the background.
    Where both locks are needed, _storing is taken first.
    """

    def __init__(self, store, tokens, clock=time.time):
        self._store, self._tokens, self._clock = store, tokens, clock
        store.wait_at_most(LEDGER_BUSY_SECONDS)   # while the database is locked, log lines are still to be written
        self._lock, self._storing = threading.Lock(), threading.Lock()
        self._running = {}      # {context: the UsageRow counted so far, or None}, until the Journal has finished it
        self._pending = {}      # {USAGE_KEY: UsageRow} to be stored
        self._last_used = {}    # {token id: Unix seconds} to be stored
        self._spent = {}        # {(user, name): (day, tokens used, when they were read)}
        self._latest = 0        # time of the clock
        self._failing = False

    def start(self, context):
        """Count a request from now on."""
        with self._lock:
            self._running[context] = None

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
        token, before, hour = context.token, self._running[context], int(self.now()) // HOUR * HOUR
        seconds = (context.released_at or time.monotonic()) - context.sent_at if context.sent_at else 0.0
        try:
            prompt, cached, completion, estimated = context.usage
        except Exception:   # a fault in the reader of one response must not keep requests from being counted
            LOG.exception("request %s: its usage cannot be read", context.id)
            prompt, cached, completion, estimated = before[3:6] + before[7:] if before else Usage(None, None, None)
            context.usage_reader = types.SimpleNamespace(usage=Usage(prompt, cached, completion, estimated))
        row = UsageRow(1, int(failed), int(cancelled), prompt, cached, completion, seconds, estimated)
        self._running[context] = row
        new = row - before if before else row
        self._add((hour, token.user, token.name, context.model_label, context.route.path), new)
        day, spent, read_at = self._spent.get((token.user, token.name), (None, 0, 0))
        if day == utc_day(hour):
            self._spent[token.user, token.name] = day, spent + new.tokens_used, read_at

    def _add(self, key, row):
        self._pending[key] = self._pending[key] + row if key in self._pending else row

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
        return day_start(utc_day(self.now()) + 1) - int(self._clock())

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
            spent = stored + sum(row.tokens_used for (hour, *owner, _, _), row in self._pending.items()
                                 if (*owner,) == key and utc_day(hour) == day)
            self._spent[key] = day, spent, now
            return spent

    def store(self):
        """Store the pending rows; rows that cannot be stored are kept for the next time."""
        with self._lock:
            for context in self._running:
                if context.model_label:
                    self._count(context)
            if not self._store.writable:
                today = day_start(utc_day(self.now()))      # budgets still need that
                self._pending = {key: row for key, row in self._pending.items() if key[0] >= today}
                return self._last_used.clear()
        with self._storing:
            with self._lock:
                rows, self._pending = self._pending, {}
                last_used, self._last_used = self._last_used, {}
            try:
                if rows or last_used:
                    self._store.add_usage(rows, last_used)
                self._failing = False
            except Failure as error:
                with self._lock:
                    for key, row in rows.items():
                        self._add(key, row)
                    self._last_used = {**last_used, **self._last_used}
                if not self._failing:
                    LOG.warning("usage and the tokens' last uses are not stored for now: %s", error)
                self._failing = True


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
            if not self._size or self.running < self._size and not self._queue:
                return self._grant(slot)
            waiting = sum(other.user == slot.user for other in self._queue)
            if waiting >= self._max_waiting:
                raise Refusal("queue_full", f"the server is busy, and {waiting} of your requests are waiting "
                                            "already (--max-queue): try again later")
            try:
                slot.wakeup = Wakeup()
            except OSError:
                raise Refusal("no_descriptors") from None
            self._queue.append(slot)

    def wait(self, slot, cancel_on):
        """Wait until a slot is granted and return the seconds that took; raise Refusal or ClientLeft."""
        if slot.wakeup is None:
            return 0.0
        started = time.monotonic()
        try:
            slot.wakeup.wait(Deadline(self._timeout), cancel_on)
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
                self._grant_next()
            else:
                self._queue.remove(slot)
            if not self.running and not self._queue:
                self._granted.clear()
        if slot.wakeup:
            slot.wakeup.close()

    def _grant(self, slot):
        slot.granted = True
        self.running += 1
        self._granted[slot.user] = next(self._numbers)

    def _grant_next(self):
        while self._queue and self.running < self._size:
            slot = min(self._queue, key=lambda slot: self._granted.get(slot.user, 0))   # the first of equal ones
            self._queue.remove(slot)
            self._grant(slot)
            slot.wakeup.set()


class Slot:
    """A request's share of its token's limits and, from `wait` on, one of the requests upstream: a context manager."""

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
        self._limiter.enter(self)
        return self

    def wait(self, cancel_on, check_again):
        """Wait until the request may go upstream; raise Refusal or ClientLeft.

        check_again: raises Refusal if the token has lost its rights meanwhile; it is called after a wait.
        """
        self._limiter.wait(self, cancel_on, check_again)

    def release(self):
        """Give the slot back, before the end of the with block."""
        if self.context.slot is self:
            self.context.slot = None
            self._limiter.leave(self)

    def __exit__(self, *_):
        self.release()


class TokenCounters:
    """The number of a token's running requests, and the times of those of the last minute."""

    __slots__ = ("running", "recent")

    def __init__(self):
        self.running, self.recent = 0, deque()


class Limiter:
    """Enforces the tokens' limits, and lets inference requests go upstream by the fair queue."""

    def __init__(self, queue, ledger, clock=time.monotonic):
        self._queue, self._ledger, self._clock = queue, ledger, clock
        self._lock, self._counters = threading.Lock(), {}   # {token id: TokenCounters}

    def enter(self, slot):
        """Count a request; raise Refusal if it exceeds a limit."""
        token = slot.token
        budget = self._budget(token)
        with self._lock:
            counters = self._counters.get(token.id)
            if counters is None:
                counters = self._counters[token.id] = TokenCounters()
            if is_limited(token):
                self._check(self._rates(token, counters) + budget)
            counters.running += 1
            if token.rpm:
                slot.rate_time = self._clock()
                counters.recent.append(slot.rate_time)
        slot.context.slot = slot

    def wait(self, slot, cancel_on, check_again):
        """Check the limits again, now that the body is there, and wait in the queue; see Slot.wait."""
        context = slot.context
        if is_limited(context.token):
            budget = self._budget(context.token)
            with self._lock:
                own = self._counters[slot.token.id], 1, slot.rate_time is not None
                self._check(self._rates(context.token, *own) + budget)
        self._queue.enter(slot)
        slot.queued = True
        self._ledger.start(context)
        context.queue_seconds = self._queue.wait(slot, cancel_on)
        if context.queue_seconds:
            check_again()
            self._check(self._budget(context.token))
        context.sent_at = time.monotonic()

    def leave(self, slot):
        """End a request: its usage counts for the budget from now on. A refused request does not count for the rate."""
        context = slot.context
        context.released_at = time.monotonic()
        if slot.queued:
            if context.token.tokens_per_day:
                self._ledger.update(context)
            self._queue.leave(slot)
        with self._lock:
            counters = self._counters[slot.token.id]
            counters.running -= 1
            if not slot.queued and slot.rate_time in counters.recent:
                counters.recent.remove(slot.rate_time)
            if not counters.running and not counters.recent:
                del self._counters[slot.token.id]

    @staticmethod
    def _check(statuses):
        for status in statuses:
            if not status.remaining:
                raise status.refusal()

    def _budget(self, token):
        if not token.tokens_per_day:
            return []
        try:
            spent = self._ledger.spent(token)
        except Failure as error:
            raise Refusal("uncounted", f"the token's usage of today cannot be read: {error}") from None
        return [LimitStatus("tokens_per_day", token.tokens_per_day, max(token.tokens_per_day - spent, 0),
                            self._ledger.day_left())]

    def _rates(self, token, counters, own_running=0, own_recent=0):
        """Return the statuses of rpm and max_parallel, without so many requests of the one that asks."""
        found = []
        if token.rpm:
            recent, now = counters.recent, self._clock()
            while recent and recent[0] <= now - MINUTE:
                recent.popleft()
            over = max(len(recent) - token.rpm, 0)  # the next one may come when this one is a minute old
            reset = recent[over] + MINUTE - now if recent else 0
            found.append(LimitStatus("rpm", token.rpm, max(token.rpm - len(recent) + own_recent, 0), math.ceil(reset)))
        if token.max_parallel:
            remaining = max(token.max_parallel - counters.running + own_running, 0)
            found.append(LimitStatus("max_parallel", token.max_parallel, remaining, RETRY_SECONDS))
        return found

    def statuses(self, token, own=0):
        """Return the LimitStatus of each limit of a token; own: running requests that are not to count."""
        if not is_limited(token):
            return []
        budget = self._budget(token)
        with self._lock:
            return self._rates(token, self._counters.get(token.id, TokenCounters()), own) + budget

    def fields(self, context):
        """Return the RateLimit fields of the limit nearest exhaustion, none without limits.

        The request itself does not count: it has ended when the client reads them.
        """
        if context.token is None or not is_limited(context.token):
            return ()
        try:
            statuses = self.statuses(context.token, context.slot is not None)
        except Refusal:     # the response is sent although the usage is unknown
            return ()
        nearest = min(statuses, key=lambda status: status.remaining / status.limit)
        return (("RateLimit-Limit", nearest.limit), ("RateLimit-Remaining", nearest.remaining),
                ("RateLimit-Reset", nearest.reset))

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
        self.body = response_decoder(head, request.method)
        self.connection, self._upstream, self._request = connection, upstream, request

    def read(self):
        """Return the next piece of the body as soon as it is there, b"" only at its end; raise UpstreamError."""
        deadline = self._request.deadline or Deadline(self._upstream.stall_timeout, "--stall-timeout")
        try:
            return self.connection.read_piece(self.body, deadline, self._request.cancel_on)
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
                head = connection.read_piece(HeadDecoder(), deadline, request.cancel_on)
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
        self._unread, self._reported = True, None

    @property
    def reported(self):
        """Return the Usage that Ollama reports, or None; it is read at the first access, mostly in the background."""
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
        if not (response.connection.buffer or response.body.complete):      # read may wait
            client.flush()
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
    if not PLAIN.fullmatch("".join(values)):
        values = map(log_value, values)
    token, path, model = values
    line = (f"id={context.id} peer={context.client_address} token={token} method={method} "
            f"path={path} model={model} status={context.status or '-'} "
            f"bytes={context.bytes_sent} first={first} total={context.ended_at - context.started_at:.3f}")
    if context.sent_at:
        usage = context.usage
        prompt, completion = ("-" if tokens is None else tokens for tokens in (usage.prompt, usage.completion))
        line += f" queued={context.queue_seconds:.3f} prompt={prompt} completion={completion}"
        line += f" cached={usage.cached}" if usage.cached else ""
        line += f" estimated={usage.estimated}" if usage.estimated else ""
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

    def close(self):
        while self._descriptors:
            os.close(self._descriptors.pop())

    def write(self, data):
        """Append bytes; raise OSError."""
        if not self._descriptors:   # the last rotation failed
            self.reopen()
        while len(self._descriptors) > 1:
            os.close(self._descriptors.popleft())
        size = os.fstat(self._descriptors[0]).st_size
        if size and size + len(data) > LOG_FILE_BYTES:
            self.close()
            for old, new in zip(self._names[-2::-1], self._names[::-1]):
                with contextlib.suppress(OSError):
                    os.replace(old, new)
            self.reopen()
        write_all(self._descriptors[-1], data)


class LogWriter(logging.Handler):
    """Writes log lines in the background: a log that blocks or fails delays no request, and the exit only briefly.

    At most LOG_QUEUE characters wait; further lines are dropped, counted, and reported once writing succeeds again.
    """

    def __init__(self, name, write, level):
        super().__init__(level)
        self.name, self._write = name, write    # write takes bytes and raises OSError
        self.dropped = 0                        # lines since the start
        self._queued = self._written = 0        # characters since the start
        self._queue = queue.SimpleQueue()       # its put may be interrupted by a signal handler that logs
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def format(self, record):
        """Return the lines of a record, each with the time in UTC and the level before it."""
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
        """Write the waiting lines, for FLUSH_SECONDS at most."""
        self._ending = True
        self._queue.put("")
        self._thread.join(FLUSH_SECONDS)


ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
METRICS = {     # name: (type, help, labels)
    "requests_total": ("counter", "Requests answered.", ("user", "token", "model", "route", "status")),
    "tokens_total": ("counter", "Tokens of prompts, those of them that were cached, and of completions.",
                     ("user", "token", "model", "kind")),
    "cancelled_total": ("counter", "Requests that the client left before their end.", ()),
    "rate_limited_total": ("counter", "Requests refused for a limit.", ("limit",)),
    "upstream_errors_total": ("counter", "Requests that Ollama failed: not reached, silent or broken off.", ("code",)),
    "first_byte_seconds": ("histogram", "From the head of an inference request to its first answer byte.", ("model",)),
    "queue_wait_seconds": ("histogram", "Time that an inference request waited for its turn.", ("model",)),
    "duration_seconds": ("histogram", "From the head of an inference request to the end of its answer.", ("model",)),
}
BUCKETS = (0.005, 0.02, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
LIMIT_BY_REFUSAL = {limit.refusal: limit.column for limit in LIMITS}


def metric_lines(name, kind, text, samples):
    """Yield a metric in the text format of Prometheus; samples: (suffix, {label: value}, number)."""
    name = f"ollama_gateway_{name}"
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for suffix, labels, number in samples:
        pairs = ",".join(f'{label}="{str(value).translate(ESCAPES)}"' for label, value in labels.items())
        yield f"{name}{suffix}" + (f"{{{pairs}}}" if pairs else "") + f" {number:.16g}"


def metric_samples(kind, labels, numbers):
    """Yield the samples of a series for metric_lines; its numbers are a count for each bucket, and the sum."""
    *counts, total = numbers
    if kind == "histogram":
        for bound, number in zip((*BUCKETS, "+Inf"), itertools.accumulate(counts)):
            yield "_bucket", {**labels, "le": bound}, number
        yield "_count", labels, sum(counts)
    yield "_sum" if kind == "histogram" else "", labels, total


class Metrics:
    """Counts finished requests for Prometheus; it names only models that Ollama has, and bounds the series."""

    def __init__(self, gauges):
        self._gauges, self._lock = gauges, threading.Lock()     # {name: (help, function that returns the number)}
        self._series = {name: {} for name in METRICS}   # {name: {values of labels: counts of the buckets, and the sum}}
        self._count("cancelled_total", by=0)

    def observe(self, context):
        """Count a finished request."""
        user, name = (context.token.user, context.token.name) if context.token else ("", "")
        model, code = context.model_label, context.refusal_code
        with self._lock:
            self._count("requests_total", user, name, model, context.route_label, context.status or "none")
            for kind, tokens in zip(("prompt", "cached", "completion"), context.usage):
                if tokens:
                    self._count("tokens_total", user, name, model, kind, by=tokens)
            if context.outcome == "left":
                self._count("cancelled_total")
            if code and REFUSALS[code].status == 429:
                self._count("rate_limited_total", LIMIT_BY_REFUSAL.get(code, "failed_credentials"))
            if code in ("upstream_failed", "upstream_silent"):
                self._count("upstream_errors_total", code)
            if context.sent_at:
                self._time("queue_wait_seconds", model, context.queue_seconds)
                self._time("duration_seconds", model, context.ended_at - context.started_at)
                if context.first_byte_at:
                    self._time("first_byte_seconds", model, context.first_byte_at - context.started_at)

    def _count(self, name, *labels, by=1):
        """Add to a series, or to the series "other" if there are MAX_SERIES; return its numbers."""
        series = self._series[name]
        numbers = series.get(labels)
        if numbers is None:
            labels = labels if len(series) < MAX_SERIES else ("other",) * len(labels)
            numbers = series.setdefault(labels, [0] * (len(BUCKETS) + 2))
        numbers[-1] += by
        return numbers

    def _time(self, name, model, seconds):
        self._count(name, model, by=seconds)[bisect.bisect_left(BUCKETS, seconds)] += 1

    def lines(self):
        """Yield the lines of all metrics."""
        with self._lock:
            for name, (kind, text, labels) in METRICS.items():
                yield from metric_lines(name, kind, text, itertools.chain.from_iterable(
                    metric_samples(kind, dict(zip(labels, values)), numbers)
                    for values, numbers in self._series[name].items()))
        for name, (text, number) in self._gauges.items():
            yield from metric_lines(name, "gauge", text, [("", {}, number())])
        dropped = sum(handler.dropped for handler in LOG.handlers if isinstance(handler, LogWriter))
        yield from metric_lines("log_lines_dropped_total", "counter", "Log lines dropped.", [("", {}, dropped)])


class Journal:
    """Records finished requests in a thread: a log line and metrics for each, and twice a second the usage ledger."""

    def __init__(self, ledger, metrics, log):
        self._ledger, self._metrics, self._log = ledger, metrics, log
        self._finished = deque()
        self._wake, self._closing = threading.Event(), threading.Event()
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
            closing = self._closing.wait(GATHER_SECONDS)    # a wake-up for each request would cost more than its line
            self._wake.clear()
            self._attempt(self._write_finished)
            if closing or time.monotonic() - stored >= STORE_SECONDS:
                stored = time.monotonic()
                self._attempt(self._ledger.store)

    @staticmethod
    def _attempt(action, *args):
        try:
            action(*args)
        except Exception:   # a fault must neither end the thread nor lose other requests
            LOG.exception("the journal failed%s", f" at {args[0].id}" if args else "")

    def _write_finished(self):
        contexts, lines = [self._finished.popleft() for _ in range(len(self._finished))], []
        for context in contexts:
            self._attempt(self._record, context, lines)
        self._ledger.used({context.token.id for context in contexts if context.token})
        if lines:
            self._log("\n".join(lines))     # at once: that costs less than line by line

    def _record(self, context, lines):
        """Record a request in the ledger, the log and the metrics: in each, even if another one fails."""
        try:
            self._ledger.finish(context)
        finally:
            try:
                lines.append(log_line(context))
            finally:
                self._metrics.observe(context)

    def close(self):
        """Record and store everything, and stop."""
        self._closing.set()
        self._wake.set()
        self._thread.join()

# == Pipeline =================================================================

INCLUDE_USAGE = b',"stream_options":{"include_usage":true}'    # at an object's end: of equal keys the last one wins
NO_SLOT = contextlib.nullcontext()


class Gateway:
    """Takes each request through all stages."""

    def __init__(self, trusted_proxies, router, connections, authenticator, limiter, endpoints, upstream, ratios,
                 health, journal):
        self._trusted_proxies, self._router, self._connections = trusted_proxies, router, connections
        self._authenticator, self._limiter, self._endpoints = authenticator, limiter, endpoints
        self._upstream, self._ratios, self.health, self._journal = upstream, ratios, health, journal

    def serve(self, client):
        """Serve one request: answer it once, and record it once."""
        context = client.context
        try:
            request = client.read_request()
            context.client_address = client_address(context.client_address, request, self._trusted_proxies)
            client.extra = self._router.cors_fields(request)
            context.request, context.route, context.path = self._router.match(request)
            if context.route.access == "public":
                return client.answer(*self._endpoint(context))
            client.limit_fields = functools.partial(self._limiter.fields, context)
            self._authorize(client)
            self._connections.authenticate(client.connection, context.token.id)
            with Slot(self._limiter, context) if context.route.category == "inference" else NO_SLOT as slot:
                if context.route.category == "page":
                    return client.answer(*self._page(client))
                last = self._forward(client, slot)
            client.write(last, last=True)   # when the slot is free: the client may send its next request at once
        except Refusal as refusal:
            self._refuse(client, refusal)
        except UpstreamError as error:
            self._refuse(client, error.refusal())
        except Failure as error:    # its text may name a path, and the client is not authenticated: only the log has it
            self._refuse(client, Refusal(error.code), str(error))
        except ClientLeft as error:
            if context.usage_reader is None or not context.usage_reader.ended:   # many leave after the last line
                context.outcome, context.reason = "left", str(error)
            client.abort()
        except Exception:   # a fault of the gateway ends one request, with a response and a traceback in the log
            LOG.exception("request %s met a fault of the gateway", context.id)
            client.refuse(Refusal("internal", f"the gateway failed: see its log, request {context.id}"))
        finally:
            self._journal.write(context)

    @staticmethod
    def _refuse(client, refusal, reason=""):
        client.context.refusal_code, client.context.reason = refusal.code, reason or str(refusal)
        client.refuse(refusal)

    def _authorize(self, client):
        """Find the request's token, which may use the route; raise Refusal."""
        context = client.context
        context.token = self._authenticator.identify(context.request, context.client_address, client.connection.pause)
        authorize_route(context)

    def _endpoint(self, context):
        """Return the response of one of our own endpoints; raise Refusal."""
        try:
            return getattr(self._endpoints, context.route.handler)(context)
        except UsageError as error:
            raise Refusal("malformed", str(error)) from None
        except Failure as error:
            raise Refusal(error.code, str(error)) from None

    def _page(self, client):
        """Return the response of an endpoint that needs a token; raise Refusal."""
        if client.context.route.method in ("POST", "PATCH"):
            client.context.body = client.read_page_body()
            if client.context.body:     # the token may have been revoked while the body arrived
                self._authorize(client)
        return self._endpoint(client.context)

    def _forward(self, client, slot):
        """Pass a request on to Ollama and its response to the client; return the last piece, which is not sent yet."""
        context, connection = client.context, client.connection

        def check_again():  # whenever time has passed: the token may have been revoked or narrowed
            self._authorize(client)
            authorize_model(context)

        connection.waited = False
        with StreamedBody(client, check_again) if context.route.streamed else client.read_whole_body() as body:
            if connection.waited:
                self._authorize(client)
            context.model, context.insert_at = inspect_body(context, body)
            authorize_model(context)
            if context.insert_at:
                body.insert(context.insert_at, INCLUDE_USAGE)
            if slot:
                slot.wait(connection, check_again)
            fields = f"X-Request-Id: {context.id}\r\n{context.request.forwarded}"
            target = context.path + context.request.query
            request = UpstreamRequest(context.route.method, target, fields, body, connection)
            with PromptCount(self._ratios, context, body) if slot else NO_SLOT, \
                    self._upstream.send(request) as response:
                return relay(response, client, slot and slot.release)

    def free_descriptors(self):
        """Close the idle connections to Ollama."""
        self._upstream.close()

    def close(self):
        for stage in self._journal, self._authenticator, self.health, self._upstream:
            stage.close()

# == OpenAPI ==================================================================

# A shape is a type, a schema's name, a media type, [shape], {member: shape} ("?": optional) or (shape, None): nullable.
TOKEN_SHAPE = {
    "id": int, "user": str, "name": str, "hint": str, "created_at": str, "expires_at": (str, None), "admin": bool,
    **{limit.column: ([str] if limit.json_type == "string[]" else int, None) for limit in LIMITS}}
LISTED_SHAPE = {**TOKEN_SHAPE, "last_used_at": (str, None), "expired": bool}
CHANGES_SHAPE = {"admin?": bool, "expires_at?": (str, None), **{f"{column}?": object for column in LIMIT_BY_COLUMN}}
USAGE_SHAPE = {
    "requests": int, "errors": int, "cancelled": int, "seconds": float, "estimated_tokens": int,
    "prompt_tokens": (int, None), "cached_tokens": (int, None), "completion_tokens": (int, None)}
RUNNING_SHAPE = {"user": str, "name": str, "model": (str, None), "path": str, "waiting": bool, "seconds": float}
SCHEMAS = {
    "Health": {"status": str, "upstream": str, "version": str},
    "TokenChanges": CHANGES_SHAPE,
    "NewToken": {"user": str, "name": str, **CHANGES_SHAPE},
    "Token": LISTED_SHAPE,
    "TokenWithSecret": {**LISTED_SHAPE, "token": str},
    "Me": {**TOKEN_SHAPE, "left": {}, "usage": [{"day": str, **USAGE_SHAPE}]},
    "Usage": {"user?": str, "name?": str, "model?": str, "day?": str, **USAGE_SHAPE},
    "Status": {"version": str, "in_flight_requests": int, "queued_requests": int, "connections": int,
               "requests": [RUNNING_SHAPE], "upstream": {}},
}
REQUEST_SHAPES = {"create_token": "NewToken", "update_token": "TokenChanges"}     # by Route.handler
RESPONSE_SHAPES = {
    "banner": "text/plain", "health": "Health", "me": "Me", "metrics": "text/plain", "docs": "text/html",
    "openapi": {}, "admin": "text/html", "status": "Status", "usage": ["Usage"], "list_tokens": ["Token"],
    "create_token": "TokenWithSecret", "show_token": "Token", "update_token": "Token", "delete_token": "Token",
    "rotate_token": "TokenWithSecret"}
PATH_PARAMETERS = {"id": {"type": "integer", "minimum": 1}, "model": {"type": "string"},
                   "key": {"type": "string", "pattern": f"^{SEGMENTS['key']}$"},
                   "digest": {"type": "string", "pattern": f"^{SEGMENTS['digest']}$"}}
QUERY_PARAMETERS = {"list_tokens": {"user": {"type": "string"}},
                    "usage": {"by": {"enum": list(USAGE_BY), "default": "user"},
                              "since": {"type": "string", "default": "7d"}}}


def json_schema(shape):
    """Return the JSON Schema of a shape."""
    if isinstance(shape, str):
        return {"$ref": f"#/components/schemas/{shape}"}
    if isinstance(shape, list):
        return {"type": "array", "items": json_schema(shape[0])}
    if isinstance(shape, tuple):
        schema = json_schema(shape[0])
        return {**schema, "type": [schema["type"], "null"]}
    if isinstance(shape, dict):
        return {"type": "object", "required": [name for name in shape if not name.endswith("?")],
                "properties": {name.rstrip("?"): json_schema(member) for name, member in shape.items()}}
    kind = {str: "string", int: "integer", float: "number", bool: "boolean"}.get(shape)
    return {"type": kind} if kind else {}


def openapi_content(shape):
    """Return the content of an OpenAPI body, {} without a shape."""
    if shape is None:
        return {}
    if isinstance(shape, str) and "/" in shape:
        return {"content": {shape: {"schema": {"type": "string"}}}}
    return {"content": {"application/json": {"schema": json_schema(shape)}}}


def openapi_body(route):
    """Return the OpenAPI request body of a route, None for none. Ollama documents the bodies of its own routes."""
    if route.handler in REQUEST_SHAPES:
        return {"required": True, **openapi_content(REQUEST_SHAPES[route.handler])}
    if route.category == "page" or route.method in ("GET", "HEAD") or "{key}" in route.path:
        return None
    if route.streamed:
        return {"content": {"application/octet-stream": {}}}
    media_type = "multipart/form-data" if route.model_in == "form" else "application/json"
    return {"content": {media_type: {"schema": {"type": "object"}}}}


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
    dialect, body = dialect_of(route.path), openapi_body(route)
    tag = "Gateway" if route.category == "page" else dialect.capitalize()
    if route.path.startswith("/admin"):
        tag = "Admin"
    parameters = [{"name": name, "in": "path", "required": True, "schema": PATH_PARAMETERS[name]}
                  for name in re.findall(r"\{(\w+)\}", route.path)]
    parameters += [{"name": name, "in": "query", "schema": schema}
                   for name, schema in QUERY_PARAMETERS.get(route.handler, {}).items()]
    done = {"description": "done", **openapi_content(RESPONSE_SHAPES.get(route.handler))}
    refusals = {str(status): {"$ref": f"#/components/responses/{dialect}-{status}"}
                for status in possible_refusals(route)}
    return {"operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.path}").strip("_"), "tags": [tag],
            "summary": route.summary, "parameters": parameters, **({"requestBody": body} if body else {}),
            "responses": {"201" if route.handler == "create_token" else "200": done, **refusals,
                          "default": {"$ref": f"#/components/responses/{dialect}"}},
            **({"security": []} if route.access == "public" else {}),
            **({"description": "Requires an admin token."} if route.access == "admin" else {})}


def error_shape(value):
    """Return the shape of an error object: its values are objects, or strings that may be null."""
    return {key: error_shape(member) for key, member in value.items()} if isinstance(value, dict) else (str, None)


def openapi_refusals():
    """Return the OpenAPI responses for the statuses of refusals, in each dialect."""
    found = {}
    for dialect in "ollama", "openai", "anthropic":
        content = openapi_content(error_shape(Refusal("malformed").body_for(dialect)))
        found[dialect] = {"description": "another refusal, or an error from Ollama"}
        for status in sorted({reason.status for reason in REFUSALS.values()}):
            meanings = [reason.meaning for reason in REFUSALS.values() if reason.status == status]
            found[f"{dialect}-{status}"] = {"description": "; or ".join(meanings), **content}
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
            "schemas": {name: json_schema(shape) for name, shape in SCHEMAS.items()},
            "responses": openapi_refusals()}}

# == Web pages ================================================================

STYLE = r"""
:root { color-scheme: light dark; --paper: #faf9f6; --card: #fff; --ink: #1e2422; --dim: #59625d; --line: #dfdcd4;
  --edge: #868e89; --soft: #e4efec; --mild: #64a195; --accent: #0a695c; --on-accent: #fff; --bad: #a2261e;
  --good: #1b6a35; }
@media (prefers-color-scheme: dark) { :root { --paper: #141716; --card: #1c201f; --ink: #e6eae8; --dim: #a4ada8;
  --line: #343a37; --edge: #78817c; --soft: #21332f; --mild: #3f8073; --accent: #63cdbb; --on-accent: #07241f;
  --bad: #ff9c91; --good: #80d69a; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { max-width: 66.5rem; margin: 0 auto; padding: 2.5rem clamp(.9rem, 4vw, 1.25rem) 3rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; -webkit-text-size-adjust: 100%; }
h1 { margin: 0 0 .5rem; font-size: 1.9rem; line-height: 1.3; }
h2 { margin: 0 0 .75rem; font-size: 1.2rem; }
h3 { margin: 1.25rem 0 .5rem; font-size: 1rem; }
p { margin: 0 0 .75rem; max-width: 44rem; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; }
small, summary, footer, figcaption, dt, .axis, .dim { color: var(--dim); font-size: .875rem; font-weight: 400; }
section { margin: 1.5rem 0; }
section, dialog { padding: 1.35rem clamp(1rem, 4vw, 1.5rem) 1.5rem; background: var(--card); color: inherit;
  border: 1px solid var(--line); border-radius: .75rem; overflow-wrap: anywhere; }
section > :last-child, .row .row, .head > *, td .row, dialog .row { margin-bottom: 0; }
code, pre { font: .875rem/1.55 ui-monospace, Menlo, Consolas, monospace; }
pre, #answer { margin: 0; padding: .9rem 1rem; background: var(--paper); border: 1px solid var(--line);
  border-radius: .5rem; overflow-x: auto; }
#answer, dialog pre { white-space: pre-wrap; }
#answer { min-height: 4.5rem; }
#figures { margin-top: .75rem; }
#thought { color: var(--dim); font-style: italic; }
label { display: block; font-size: .9rem; font-weight: 600; }
input, select, textarea, button { padding: .45rem .75rem; background: var(--paper); border: 1px solid var(--edge);
  border-radius: .45rem; font: inherit; color: inherit; }
label > input, label > select, textarea { display: block; width: 100%; margin-top: .25rem; font-weight: 400; }
label > input[type=checkbox] { display: inline; width: auto; accent-color: var(--accent); }
textarea { margin-bottom: .75rem; resize: vertical; }
button { background: var(--card); cursor: pointer; white-space: nowrap; }
button:hover { background: var(--soft); }
button[type=submit] { background: var(--accent); border-color: transparent; color: var(--on-accent); font-weight: 600; }
button.danger { background: var(--bad); color: var(--card); }
details button, td button { padding: .15rem .55rem; font-size: .85rem; }
:disabled { opacity: .55; }
fieldset { min-width: 0; margin: 0; padding: 0; border: 0; }
.row { display: flex; flex-wrap: wrap; gap: .75rem; align-items: end; margin-bottom: .75rem; }
.row > label { flex: 1 1 14rem; }
.head { justify-content: space-between; }
.head, .head .row { align-items: center; }
#filter { width: 11rem; }
.problem, .bad { color: var(--bad); font-weight: 600; }
p:empty { display: none; }
.good { color: var(--good); }
.tag { padding: .05rem .4rem; border-radius: .35rem; background: var(--soft); color: var(--accent); font-size: .8rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1rem; margin: 0 0 1rem; }
dd { margin: 0; font-size: 1.3rem; line-height: 1.35; }
dd small { display: block; }
table { width: 100%; border-collapse: collapse; font-size: .925rem; }
th, td { padding: .45rem .9rem .45rem 0; border-top: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 400; }
td { overflow-wrap: break-word; }
thead th, th[scope=rowgroup] { border-top: 0; color: var(--dim); font-size: .85rem; font-weight: 600; }
thead th, th code, td button { white-space: nowrap; }
th[scope=rowgroup] { padding-top: 1.2rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td:last-child, th:last-child { padding-right: 0; }
td .row { flex-wrap: nowrap; gap: .35rem; }
progress { display: block; width: 100%; min-width: 5rem; height: .55rem; margin: .4rem 0; accent-color: var(--accent); }
svg { display: block; width: 100%; height: 9rem; border-bottom: 1px solid var(--edge); fill: var(--accent); }
.prompt { color: var(--mild); fill: var(--mild); }
.answer { color: var(--accent); }
figure { margin: 0; }
figcaption, .axis { display: flex; justify-content: space-between; gap: 1rem; }
details { margin-top: .6rem; }
pre + button { margin-top: .5rem; }
dialog { width: min(34rem, calc(100vw - 2rem)); }
dialog::backdrop { background: rgb(0 0 0 / 50%); }
dialog form { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .75rem 1rem; }
dialog form > :not(label) { grid-column: 1 / -1; margin: 0; }
dialog .row { justify-content: end; }
dialog pre { margin-bottom: .75rem; }
@media (max-width: 40rem) {
  .stack thead, .stack td:empty { display: none; }
  .stack :is(tbody, tr, th, td) { display: block; padding: .1rem 0; border: 0; text-align: left; }
  .stack td { overflow-wrap: anywhere; }
  .stack tr { padding: .6rem 0; border-top: 1px solid var(--line); }
  .stack td[data-label]::before { content: attr(data-label) ": "; color: var(--dim); }
  #panel .stack th { font-weight: 600; }
  .stack code { white-space: normal; }
}
"""

SCRIPT = r"""
const KEY = "ollama_gateway.token";
// Requests go to where the page was found, also behind a proxy's prefix. A secret in that path is sent as a header.
const [, ROOT, PATH_SECRET] = location.pathname.match(/^(.*?)(?:\/t\/([^/]+))?\/[^/]*$/);
const ADDRESS = location.origin + ROOT;

const byId = id => document.getElementById(id);
const show = (id, ...content) => byId(id).replaceChildren(...content);
const clear = (...ids) => ids.forEach(id => show(id));
const token = () => sessionStorage.getItem(KEY) || PATH_SECRET;
const keep = secret => secret === PATH_SECRET || sessionStorage.setItem(KEY, secret);
const number = value => value === null ? "unknown" : value.toLocaleString("en");
const minute = time => time.slice(0, 16).replace("T", " ");
const nameOf = row => `${row.user}/${row.name}`;
const tokensOf = ({prompt_tokens, cached_tokens, completion_tokens}) =>
  prompt_tokens === null ? null : prompt_tokens - cached_tokens + completion_tokens;
let now = Date.now();   // by the gateway's clock, once it has answered
const dayAgo = days => new Date(now - days * 86400000).toISOString().slice(0, 10);

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

async function ask(method, path, {body, secret = token(), signal} = {}) {
  if (!/^[\x21-\x7e]+$/.test(secret)) throw new Error("A token is one word of ASCII letters, digits and signs");
  const headers = {Authorization: `Bearer ${secret}`, "Content-Type": "application/json"};
  const response = await fetch(ROOT + path, {method, headers, signal, cache: "no-store", body: JSON.stringify(body)})
    .catch(error => { throw error.name === "AbortError" ? error : new Error("The gateway cannot be reached"); });
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

// Signs in with the token that is kept, or that is typed: enter(JSON at path) shows the page, leave() clears it.
function signIn(path, enter, leave) {
  const form = byId("sign-in"), problem = byId("sign-in-problem"), field = byId("token");
  const setSignedIn = signedIn => { form.hidden = signedIn; byId("signed-in").hidden = !signedIn; };
  const use = secret => attempt(form.querySelector("button"), problem, async () => {
    const content = await askJSON("GET", path, {secret}).catch(error => {
      if (error.status === 401 && secret === token()) sessionStorage.removeItem(KEY);
      throw error;
    });
    keep(secret);
    field.value = "";
    setSignedIn(true);
    enter(content);
  });
  const signOut = reason => {
    sessionStorage.removeItem(KEY);
    problem.textContent = reason;
    setSignedIn(false);
    leave();
    field.focus();
  };
  form.addEventListener("submit", event => { event.preventDefault(); use(field.value.trim()); });
  byId("sign-out").addEventListener("click", () => signOut(""));
  if (token()) use(token());
  return signOut;
}

const copyButton = (source, attributes) => button("Copy", ({target}) => {
  getSelection().selectAllChildren(source);
  target.textContent = document.execCommand("copy") ? "Copied" : "Selected";   // navigator.clipboard requires TLS
}, attributes);

// A row is a list of cells: the first names the row, those in `numbers` are aligned as numbers.
function table(name, headings, rows, numbers = []) {
  const style = at => numbers.includes(at) && "number";
  const head = (heading, at) => element("th", {scope: "col", class: style(at)}, heading);
  const cell = (content, at) => at ? element("td", {class: style(at), "data-label": headings[at] || false}, content)
    : element("th", {scope: "row"}, content);
  return element("table", {class: "stack", "aria-label": name},
    element("thead", {}, element("tr", {}, headings.map(head))),
    element("tbody", {}, rows.map(cells => element("tr", {}, cells.map(cell)))));
}

function dayColumn(row, at, most) {
  const answers = row.completion_tokens / most * 100, prompts = (row.prompt_tokens - row.cached_tokens) / most * 100;
  const part = (y, height, style) => drawing("rect", {class: style, x: at + 0.12, width: 0.76, y, height});
  return drawing("g", {},
    drawing("title", {}, `${row.day}: ${number(tokensOf(row))} tokens, ${number(row.requests)} requests`),
    part(100 - answers, answers, "answer"), part(100 - answers - prompts, prompts, "prompt"));
}

function dayChart(used, days) {
  const unused = {requests: 0, prompt_tokens: 0, cached_tokens: 0, completion_tokens: 0};
  const rows = Array.from({length: days}, (_, at) => dayAgo(days - 1 - at))
    .map(day => used.find(row => row.day === day) || {day, ...unused});
  const most = Math.max(1, ...rows.map(tokensOf)), total = rows.reduce((sum, row) => sum + tokensOf(row), 0);
  const key = name => [element("span", {class: name}, " ■"), ` ${name}s`];
  return element("figure", {},
    element("figcaption", {}, element("span", {}, `most in a day: ${number(most)}`),
      element("span", {}, key("prompt"), key("answer"))),
    drawing("svg", {viewBox: `0 0 ${days} 100`, preserveAspectRatio: "none", role: "img",
      "aria-label": `Tokens of each of the last ${days} days, ${number(total)} in all`},
    rows.map((row, at) => dayColumn(row, at, most))),
    element("div", {class: "axis"}, element("span", {}, rows[0].day), element("span", {}, "today, in UTC")),
    element("details", {}, element("summary", {}, "As a table"), table("Usage by day", ["Day", "Tokens", "Requests"],
      rows.filter(row => row.requests).map(row => [row.day, number(tokensOf(row)), number(row.requests)]), [1, 2])));
}
"""

DOCS_SCRIPT = r"""
let running = null;     // the AbortController of the request that is running

function showMe(me) {
  show("who", nameOf(me));
  const limits = Object.entries(me.left).map(([name, {limit, remaining}]) => tile(LIMITS[name].label,
    number(remaining), bar(remaining / limit), element("small", {}, `left of ${number(limit)}`)));
  show("me", element("dl", {class: "tiles"},
    tile("Valid", me.expires_at ? `until ${minute(me.expires_at)}` : "until deleted"),
    tile("Models", me.models ? me.models.join(", ") : "all"), limits),
  element("h3", {}, "Your last seven days"), dayChart(me.usage, 7));
}

async function showModels() {
  const {models} = await askJSON("GET", `${BASE}/tags`);
  show("model", ...(models || []).map(({name}) => element("option", {}, name)));
  byId("talk").disabled = false;
  nameModel();
}

// Puts the model's name into the examples, unless a shell could read it as more than a name.
function nameModel() {
  const name = byId("model").value;
  if (/^[\w.:\/-]+$/.test(name)) for (const place of document.querySelectorAll(".model")) place.textContent = name;
}

async function* linesOf(body) {
  const reader = body.getReader(), decoder = new TextDecoder();
  for (let rest = "", ended = false; !ended;) {
    const {value, done} = await reader.read().catch(() => { throw new Error("The response broke off"); });
    const lines = (rest + decoder.decode(value, {stream: !done})).split("\n");
    rest = done ? "" : lines.pop();
    ended = done;
    yield* lines;
  }
}

async function chat(signal) {
  const start = performance.now(), seconds = () => (performance.now() - start) / 1000;
  const body = {model: byId("model").value, messages: [{role: "user", content: byId("prompt").value}]};
  let first = 0;
  for await (const line of linesOf((await ask("POST", `${BASE}/chat`, {body, signal})).body)) {
    const {message = {}, error, done, eval_count: count, eval_duration: duration} = JSON.parse(line.trim() || "{}");
    if (error) throw new Error(error);
    byId("thought").append(message.thinking || "");
    byId("said").append(message.content || "");
    if (!first && (message.thinking || message.content)) {
      first = seconds();
      show("figures", `first token after ${first.toFixed(2)} s`);
    }
    if (done && count) {
      const rate = count / (duration / 1e9 || seconds() - first);
      byId("figures").append(`, ${number(count)} tokens, ${rate.toFixed(1)} a second`);
    }
  }
}

async function send(event) {
  event.preventDefault();
  if (running) return;
  const setBusy = busy => { byId("stop").disabled = !busy; byId("answer").setAttribute("aria-busy", busy); };
  const {signal} = running = new AbortController();
  clear("thought", "said", "figures");
  setBusy(true);
  await attempt(byId("send"), byId("problem"), () => chat(signal).catch(error => {
    if (!signal.aborted) throw error;
    byId("figures").append(" (stopped)");
  }));
  running = null;
  setBusy(false);
  if (token()) askJSON("GET", "/me").then(me => token() && showMe(me), () => {});
}

for (const place of document.querySelectorAll(".address")) place.textContent = ADDRESS;
for (const pre of document.querySelectorAll("#examples pre")) pre.after(copyButton(pre.firstChild));
byId("console").hidden = false;
byId("console-form").addEventListener("submit", send);
byId("stop").addEventListener("click", () => running && running.abort());
byId("model").addEventListener("change", nameModel);
byId("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("console-form").requestSubmit();
});
signIn("/me", me => {
  showMe(me);
  showModels().catch(error => show("problem", error.message));
}, () => {
  if (running) running.abort();
  byId("talk").disabled = true;
  clear("me", "who", "model", "thought", "said", "figures", "problem");
});
"""

ADMIN_SCRIPT = r"""
const FIELDS = {user: ["User", "a person"], name: ["Name", "a device"], expires_at: ["Expires", "30d, 2027-01-31"]};
for (const [name, {label, example}] of Object.entries(LIMITS)) FIELDS[name] = [label, example];
let tokens = [], timer = 0, renewing = false;

const asText = value => [value ?? ""].flat().join(",");

function dialog(title, ...content) {
  const box = element("dialog", {"aria-labelledby": "dialog-title", close: () => box.remove()},
    element("h2", {id: "dialog-title"}, title), content);
  document.body.append(box);
  box.showModal();
  return box;
}

// Opens a form that calls action(form) when it is submitted, and shows an error beside the field that caused it.
function formDialog(title, content, label, action, style = false) {
  const problem = element("p", {class: "problem", role: "alert"});
  const submitter = element("button", {type: "submit", class: style}, label);
  const submit = async event => {
    event.preventDefault();
    await attempt(submitter, problem, async () => { await action(form); await loadTokens(); box.close(); });
    const field = form.elements[problem.textContent.split(":")[0]];
    if (field) field.focus();
    if (field) field.after(problem);
    else form.lastChild.before(problem);
  };
  const form = element("form", {submit}, content, problem,
    element("div", {class: "row"}, button("Cancel", () => box.close()), submitter));
  const box = dialog(title, form);
}

function showSecret(made) {
  const secret = element("code", {}, made.token);
  const example = element("code", {}, `curl -H "Authorization: Bearer ${made.token}" ${ADDRESS}${BASE}/tags`);
  const box = dialog(`Secret of ${nameOf(made)}`,
    element("p", {}, "The secret is shown only once. Keep it like a password."), element("pre", {id: "secret"}, secret),
    element("p", {}, "To use it:"), element("pre", {}, example),
    element("p", {}, element("a", {href: "docs", target: "_blank"}, "Examples for each client")),
    element("div", {class: "row"}, copyButton(secret, {autofocus: ""}), button("I have saved it", () => box.close())));
  box.addEventListener("cancel", event => event.preventDefault());
}

async function saveToken(known, names, {elements}) {
  const changes = known.id ? {} : {user: "", name: ""};
  for (const name of names) {
    const typed = elements[name].value.trim();
    if (typed !== asText(known[name])) changes[name] = typed || null;
  }
  if (elements.admin.checked !== known.admin) changes.admin = elements.admin.checked;
  if (known.id) await ask("PATCH", `/admin/tokens/${known.id}`, {body: changes});
  else showSecret(await askJSON("POST", "/admin/tokens", {body: changes}));
}

function editToken(known) {
  const names = Object.keys(FIELDS).slice(known.id ? 2 : 0);
  const fields = names.map(name => element("label", {}, `${FIELDS[name][0]} `, element("small", {}, FIELDS[name][1]),
    element("input", {name, value: asText(known[name]), autocomplete: "off", spellcheck: "false"})));
  const admin = element("label", {}, element("input", {type: "checkbox", name: "admin", checked: known.admin}),
    " Admin ", element("small", {}, "may manage models and tokens"));
  formDialog(known.id ? `Limits of ${nameOf(known)}` : "New token",
    [fields, admin, element("p", {class: "dim"}, "An empty field sets no limit.")],
    known.id ? "Save" : "Create", form => saveToken(known, names, form));
}

function rotateToken(known) {
  const text = `The current secret of ${nameOf(known)} stops working at its next request.`;
  formDialog("Create a new secret?", element("p", {}, text), "New secret", async () => {
    renewing = token().startsWith(known.hint);      // the page's own token: from here on its old secret is refused
    try {
      const made = await askJSON("POST", `/admin/tokens/${known.id}/rotate`);
      if (renewing) keep(made.token);
      showSecret(made);
    } finally {
      renewing = false;
    }
  });
}

function deleteToken(known) {
  const text = `${nameOf(known)} stops working at its next request. This cannot be undone.`;
  formDialog("Delete this token?", element("p", {}, text), "Delete",
    () => ask("DELETE", `/admin/tokens/${known.id}`), "danger");
}

function limitsOf(row) {
  const shown = value => Array.isArray(value) ? value.join(", ") : number(value);
  return Object.entries(LIMITS).filter(([name]) => row[name])
    .map(([name, {phrase}]) => phrase.replace("{}", shown(row[name]))).join("; ");
}

function tokenRow(row) {
  const actions = Object.entries({Edit: editToken, "New secret": rotateToken, Delete: deleteToken}).map(
    ([text, act]) => button(text, () => act(row), {"aria-label": `${text}: ${nameOf(row)}`}));
  return [[nameOf(row), row.admin ? [" ", element("span", {class: "tag"}, "admin")] : ""],
    element("code", {}, `${row.hint}…`),
    row.expired ? element("span", {class: "bad"}, "expired") : row.expires_at ? minute(row.expires_at) : "never",
    row.last_used_at ? minute(row.last_used_at) : "never", limitsOf(row), element("div", {class: "row"}, actions)];
}

function showTokens() {
  const words = byId("filter").value.toLowerCase().split(/\s+/);
  const text = row => `${nameOf(row)} ${row.hint} ${row.admin ? "admin" : ""} ${limitsOf(row)}`.toLowerCase();
  const shown = tokens.filter(row => words.every(word => text(row).includes(word)));
  show("token-count", `${shown.length} of ${tokens.length}`);
  show("tokens", table("Tokens", ["Token", "Secret", "Expires", "Last used", "Limits", ""], shown.map(tokenRow)));
}

async function loadTokens() {
  tokens = await askJSON("GET", "/admin/tokens");
  showTokens();
}

function showStatus({upstream, requests, ...gauges}) {
  const up = upstream.status === "up";
  const rows = requests.map(row => [nameOf(row), row.model || "", element("code", {}, row.path),
    row.waiting ? "queued" : "running", row.seconds.toFixed(1)]);
  show("status", element("dl", {class: "tiles"},
    tile("Running", number(gauges.in_flight_requests)), tile("Queued", number(gauges.queued_requests)),
    tile("Connections", number(gauges.connections)),
    tile("Ollama", element("span", {class: up ? "good" : "bad"}, up ? `up, ${upstream.version}` : "down")),
    tile("Loaded models", upstream.loaded.map(({name}) => name).join(", ") || "none")),
  rows.length ? table("Requests", ["Token", "Model", "Path", "State", "Seconds"], rows, [4])
    : element("p", {class: "dim"}, "No requests are running or queued."));
}

async function watch() {
  const secret = token(), hidden = () => byId("panel").hidden;
  if (hidden()) return;     // signed out
  await askJSON("GET", "/admin/status", {secret}).then(status => {
    if (!hidden()) showStatus(status);
    show("status-problem");
  }, error => {
    if (renewing || secret !== token()) return;     // the secret was replaced meanwhile
    if (error.status === 401 || error.status === 403) signOut(error.message);
    show("status-problem", error.message);
  });
  clearTimeout(timer);
  if (!document.hidden && !hidden()) timer = setTimeout(watch, 2000);
}

function usageTable(name, heading, rows) {
  const most = Math.max(1, ...rows.map(tokensOf));
  return table(name, [heading, "", "Tokens", "Cached", "Requests"],
    rows.map(row => [row[heading.toLowerCase()] || "-", bar(tokensOf(row) / most), number(tokensOf(row)),
      number(row.cached_tokens || 0), number(row.requests)]), [2, 3, 4]);
}

async function loadUsage() {
  const days = byId("period").value;
  const [byDay, byUser, byModel] = await Promise.all(
    ["day", "user", "model"].map(by => askJSON("GET", `/admin/usage?by=${by}&since=${days}d`)));
  if (days !== byId("period").value || byId("panel").hidden) return;    // out of date
  show("by-day", dayChart(byDay, Number(days)));
  show("by-user", usageTable("Usage by user", "User", byUser));
  show("by-model", usageTable("Usage by model", "Model", byModel));
}
const showUsage = () => attempt(byId("refresh"), byId("usage-problem"), loadUsage);

byId("create").addEventListener("click", () => editToken({admin: false}));
byId("filter").addEventListener("input", showTokens);
byId("period").addEventListener("change", showUsage);
byId("refresh").addEventListener("click", showUsage);
document.addEventListener("visibilitychange", () => { if (!document.hidden && !byId("panel").hidden) watch(); });
const signOut = signIn("/admin/tokens", list => {
  tokens = list;
  byId("panel").hidden = false;
  showTokens();
  showUsage();
  watch();
}, () => {
  clearTimeout(timer);
  tokens = [];
  byId("panel").hidden = true;
  clear("status", "tokens", "by-day", "by-user", "by-model");
});
"""

SIGN_IN = """<section id="yours" aria-labelledby="yours-title"><h2 id="yours-title">Your token</h2>
<noscript><p>{noscript}</p></noscript>
<form id="sign-in">
<div class="row"><label>{label}<input id="token" type="password" autocomplete="off" spellcheck="false" required></label>
<button type="submit">Sign in</button></div>
<p class="dim">The token is kept in this tab only, until it is closed.</p>
<p id="sign-in-problem" class="problem" role="alert"></p>
</form>
<div id="signed-in" class="row head" hidden><span id="who">Signed in.</span>
<button id="sign-out" type="button">Sign out</button></div>"""
DOCS = """
<header><small>ollama_gateway {version}</small><h1>A shared Ollama server</h1>
<p>Every Ollama, OpenAI and Anthropic client works here, with streaming. You need a token: ask the administrator.</p>
<nav><a href="#yours">Your token</a><a href="#examples">Examples</a><a href="#routes">Routes</a>
<a href="#errors">Errors</a><a href="#settings">Settings</a>{links}</nav></header>
<main>{sign_in}
<div id="me"></div></section>
<section id="console" aria-labelledby="console-title" hidden><h2 id="console-title">Console</h2>
<form id="console-form"><fieldset id="talk" disabled>
<div class="row"><label>Model<select id="model"></select></label></div>
<label>Prompt <small>Ctrl+Enter sends it</small>
<textarea id="prompt" rows="4" required>Why is the sky blue?</textarea></label>
<div class="row"><button id="send" type="submit">Send</button>
<button id="stop" type="button" disabled>Stop</button></div>
</fieldset></form>
<p id="problem" class="problem" role="alert"></p>
<div id="answer" role="log" aria-label="Answer"><p id="thought"></p><p id="said"></p></div>
<p id="figures" class="dim" role="status"></p></section>
<section id="examples" aria-labelledby="examples-title"><h2 id="examples-title">Examples</h2>
<p>They read the token from the variable <code>TOKEN</code>: <code>export TOKEN=ogw_…</code></p>
{examples}</section>
<section id="routes" aria-labelledby="routes-title"><h2 id="routes-title">Routes</h2>
<p>Send the token as <code>Authorization: Bearer …</code> or <code>x-api-key: …</code>. Other paths are refused.</p>
{routes}</section>
<section id="errors" aria-labelledby="errors-title"><h2 id="errors-title">Errors</h2>
<p>An error has the format of the route's API. Ollama's own errors are passed on unchanged. Every response has an
<code>X-Request-Id</code>: name it when you report a problem.</p>
{errors}</section>
<section id="settings" aria-labelledby="settings-title"><h2 id="settings-title">Settings</h2>
<details><summary>For administrators: the flags of <code>serve</code> and their variables</summary>
{options}</details></section></main>
<footer>This page loads nothing from other servers, and sends your input to this gateway only.</footer>
"""
ADMIN = """
<header><small>ollama_gateway {version}</small><h1>Administration</h1>
<p>Tokens, running requests and usage.</p>
<nav><a href="docs">Documentation</a></nav></header>
<main>{sign_in}</section>
<div id="panel" hidden>
<section aria-labelledby="now-title"><h2 id="now-title">Now</h2>
<p id="status-problem" class="problem" role="alert"></p>
<div id="status"></div></section>
<section aria-labelledby="tokens-title">
<div class="row head"><h2 id="tokens-title">Tokens <small id="token-count" role="status"></small></h2>
<div class="row"><input id="filter" type="search" placeholder="Filter" aria-label="Filter the tokens">
<button id="create" type="button">New token</button></div></div>
<div id="tokens"></div></section>
<section aria-labelledby="usage-title">
<div class="row head"><h2 id="usage-title">Usage</h2>
<div class="row"><select id="period" aria-label="Period"><option value="7">7 days</option>
<option value="30">30 days</option><option value="90">90 days</option></select>
<button id="refresh" type="button">Refresh</button></div></div>
<p id="usage-problem" class="problem" role="alert"></p>
<div id="by-day"></div>
<h3>By user</h3><div id="by-user"></div>
<h3>By model</h3><div id="by-model"></div></section></div></main>
<footer>The token is sent in a header, never in a cookie: pages of other sites cannot use it.</footer>
"""
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
    """Return the source expression for an inline style or script (Content Security Policy 3, 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def html_page(title, body, script, base):
    """Return the response for a page; its only sources are its own style and script, and the gateway's API."""
    limits = {limit.column: {key: getattr(limit, key) for key in ("label", "example", "phrase")} for limit in LIMITS}
    script = f'"use strict";\nconst BASE = {json.dumps(base)}, LIMITS = {json.dumps(limits)};\n{script}'
    policy = (f"default-src 'none'; style-src {source_hash(STYLE)}; script-src {source_hash(script)}; "
              "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    page = (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" '
            f'content="light dark">\n<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n'
            f"</head>\n<body>{body}<script>{script}</script>\n</body>\n</html>\n")
    return 200, "text/html; charset=utf-8", page.encode(), [
        ("Content-Security-Policy", policy), ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-cache")]


def html_table(headings, groups):
    """Return an HTML table of {heading of a group, or "": rows}; the first cell of a row is code."""
    labels = ["", *(f' data-label="{heading}"' for heading in headings[2:])]    # the second column needs none
    parts = ['<table class="stack">\n<thead><tr>', *(f'<th scope="col">{heading}</th>' for heading in headings),
             "</tr></thead>\n"]
    for group, rows in groups.items():
        parts.append("<tbody>\n")
        if group:
            parts.append(f'<tr><th scope="rowgroup" colspan="{len(headings)}">{group}</th></tr>\n')
        for first, *others in rows:
            cells = "".join(f"<td{label}>{html.escape(cell or '')}</td>" for label, cell in zip(labels, others))
            parts.append(f'<tr><th scope="row"><code>{html.escape(first)}</code></th>{cells}</tr>\n')
        parts.append("</tbody>\n")
    return "".join(parts) + "</table>"


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
    groups = {group: [(f"{route.method} {at_base(route.path, base)}", route.summary)
                      for route in routes if route.access == access] for access, group in ACCESS.items()}
    errors = {}
    for status, meaning in sorted(REFUSALS.values()):
        errors[str(status)] = f"{errors[str(status)]}; or {meaning}" if str(status) in errors else meaning
    links = '<a href="openapi.json">OpenAPI</a>'
    if any(route.handler == "admin" for route in routes):
        links += '<a href="admin">Administration</a>'
    body = DOCS.format(
        version=VERSION, links=links, examples=html_examples(base),
        sign_in=SIGN_IN.format(label="Token", noscript="Signing in requires JavaScript. All else here does not."),
        routes=html_table(("Route", "Purpose"), groups),
        errors=html_table(("Status", "Reason"), {"": errors.items()}),
        options=html_table(("Flag", "Meaning", "Variable", "Default"), {
            "": [(option.flag, option.help, option.variable, option.default) for option in OPTIONS]}))
    return html_page("A shared Ollama server", body, SCRIPT + DOCS_SCRIPT, base)


def admin_page(base):
    """Return the admin page, which is empty until an admin token is entered."""
    noscript = "This page requires JavaScript. The command <code>ollama_gateway.py token</code> does not."
    body = ADMIN.format(version=VERSION, sign_in=SIGN_IN.format(label="Admin token", noscript=noscript))
    return html_page("Administration", body, SCRIPT + ADMIN_SCRIPT, base)

# == Own endpoints ============================================================


def json_page(value, status=200):
    return status, "application/json", json.dumps(value).encode() + b"\n", [("Cache-Control", "no-store")]


@functools.lru_cache(maxsize=8)     # 5 ms for a document that anyone may request
def openapi_page(routes, base):
    return json_page(openapi_document(routes, base))


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


def read_json_object(context, *names):
    try:
        pairs = json.loads(context.body, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        pairs = None
    if not isinstance(pairs, tuple):
        raise UsageError("the body is not a JSON object")
    return checked_members(pairs, names, "the body")


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


class Pages:
    """The gateway's own pages: the method in Route.handler takes the RequestContext and returns the response."""

    CHANGEABLE = ("admin", *SETTABLE)

    def __init__(self, routes, base, store, health, ledger, limiter, metrics, gauges):
        self._routes, self._base = tuple(routes), base
        self._store, self._health, self._ledger, self._limiter = store, health, ledger, limiter
        self._metrics, self._gauges = metrics, gauges

    @staticmethod
    def banner(_):
        """Answer as Ollama does: its clients send this request first."""
        return 200, "text/plain; charset=utf-8", b"Ollama is running"

    @staticmethod
    def preflight(_):
        return 204, "", b""

    def health(self, _):
        return json_page({"status": "ok", "upstream": "up" if self._health.up else "down", "version": VERSION})

    def me(self, context):
        """Return the token, what is left of its limits, and its usage of the last seven days."""
        left = {name: {"limit": most, "remaining": left, "reset": reset}
                for name, most, left, reset in self._limiter.statuses(context.token)}
        shown = token_json(context.token)
        del shown["last_used_at"], shown["expired"]     # it is in use now
        usage = self._store.usage("day", usage_start("7d", self._ledger.now), context.token)
        return json_page({**shown, "left": left, "usage": usage})

    def metrics(self, _):
        lines = "".join(f"{line}\n" for line in self._metrics.lines())
        return 200, "text/plain; version=0.0.4; charset=utf-8", lines.encode()

    def status(self, _):
        health, now = self._health, time.monotonic()
        requests = [{"user": context.token.user, "name": context.token.name, "model": context.model,
                     "path": context.request.redacted_path, "waiting": context.sent_at is None,
                     "seconds": round(now - context.started_at, 3)} for context in self._ledger.running()]
        return json_page({
            "version": VERSION, **{name: read() for name, (_, read) in self._gauges.items()}, "requests": requests,
            "upstream": {"status": "up" if health.up else "down", "version": health.version,
                         "models": health.models, "loaded": health.loaded}})

    def usage(self, context):
        query = {"by": "user", "since": "7d", **read_query(context, "by", "since")}
        by, since = query["by"], query["since"]
        if by not in USAGE_BY:
            raise UsageError(f'by: "{by[:40]}" is not one of {", ".join(USAGE_BY)}')
        try:
            return json_page(self._store.usage(by, usage_start(since, self._ledger.now)))
        except ValueError as error:
            raise UsageError(f'since: "{since[:40]}" {error}') from None

    def openapi(self, _):
        return openapi_page(self._routes, self._base)

    def docs(self, _):
        return docs_page(self._routes, self._base)

    def admin(self, _):
        return admin_page(self._base)

    def _token(self, context):
        return self._store.get(int(context.path.split("/")[3]))

    def list_tokens(self, context):
        tokens = self._store.list(read_query(context, "user").get("user"))
        return json_page([token_json(token) for token in tokens])

    def create_token(self, context):
        members = {"user": None, "name": None, **read_json_object(context, "user", "name", *self.CHANGEABLE)}
        token, secret = self._store.create(**{key: read_member(key, value) for key, value in members.items()})
        return json_page({**token_json(token), "token": secret}, 201)

    def show_token(self, context):
        return json_page(token_json(self._token(context)))

    def update_token(self, context):
        members = read_json_object(context, *self.CHANGEABLE)
        changes = {column: read_member(column, value) for column, value in members.items()}
        token = self._token(context)
        return json_page(token_json(self._store.update(token.user, token.name, **changes)))

    def rotate_token(self, context):
        token = self._token(context)
        token, secret = self._store.rotate(token.user, token.name)
        return json_page({**token_json(token), "token": secret})

    def delete_token(self, context):
        token = self._token(context)
        return json_page(token_json(self._store.delete(token.user, token.name)))

# == Assembly =================================================================


def server_tls(settings):
    """Return the TLS context for the settings' certificate, or None; raise Failure if it cannot be used."""
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


def connections_that_fit(most):
    """Raise the limit of open files for so many connections; return how many connections fit.

    A connection has four descriptors at most: its socket, a spooled body, and the connection to Ollama or, while it
    waits in the queue, the two of its wakeup, which are closed before that connection is opened.
    """
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
    tls = server_tls(settings)
    upstream = Upstream(settings.ollama_url, settings.connect_timeout, settings.first_byte_timeout,
                        settings.stall_timeout)
    health = HealthProbe(upstream)
    connections = ConnectionLimiter(connections_that_fit(settings.max_connections), settings.trusted_proxies)
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
        trusted_proxies=settings.trusted_proxies,
        router=Router(routes, settings.base_path, settings.path_tokens, settings.cors_origins),
        connections=connections,
        authenticator=Authenticator(tokens, AuthThrottle()),
        limiter=limiter,
        endpoints=Pages(routes, settings.base_path, store, health, ledger, limiter, metrics, gauges),
        upstream=upstream,
        ratios=TokenRatio(),
        health=health,
        journal=Journal(ledger, metrics, log or LOG.info))
    try:
        return GatewayServer(settings, Handler, gateway, connections, tls)
    except (OSError, UnicodeError) as error:
        gateway.close()
        reason = getattr(error, "strerror", None) or error
        raise Failure(f"cannot listen on {settings.host} port {settings.port}: {reason}; "
                      "choose another with --host and --port") from None

# == Commands =================================================================

PROGRAM = "python3 ollama_gateway.py"
DEFAULT_ARGS = dict(env_file=None, json=False, quiet=False, format=None)  # of every command
MIN_BAR_COLUMNS, MAX_BAR_COLUMNS = 10, 60
MIN_COLUMNS = 8             # of a table's column that was narrowed
TOKEN_VARIABLE = "GATEWAY_TOKEN"
EXPORT_VERSION = 2          # version 1 has no limits
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "'")  # a spreadsheet takes such a cell for a formula or a quote


def print_line(text):
    """Print to stdout; raise OSError if it cannot be written."""
    print(text, flush=True)


def print_error(text):
    """Print to stderr, if it can be written."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def format_minute(seconds, otherwise=""):
    return otherwise if seconds is None else format_instant(seconds)[:16].replace("T", " ")


def terminal_width():
    """Return the terminal's columns; 0 if stdout is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


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


def format_table(rows, width, elastic, dispensable):
    """Return rows as aligned lines that fit a width (0: any width); the first row has the names of the columns.

    Elastic columns get narrower, down to MIN_COLUMNS; then dispensable columns are left out, in the given order.
    """
    names = [name.strip() for name in rows[0]]
    widths = [max(map(text_width, column)) for column in zip(*rows)]
    narrowing = range(max(*widths, MIN_COLUMNS), MIN_COLUMNS - 1, -1)
    for left_out, most in itertools.product(range(len(dispensable) + 1), narrowing):
        fitted = {at: min(widths[at], most) if name in elastic else widths[at]
                  for at, name in enumerate(names) if name not in dispensable[:left_out]}
        if not width or sum(fitted.values()) + 2 * len(fitted) - 2 <= width:
            break
    return ["  ".join(fit_width(row[at], columns) for at, columns in fitted.items()).rstrip() for row in rows]


def format_bar(share, columns):
    """Return a bar for a share from 0 to 1; the bar for 1 has this many columns."""
    if not can_show("█▏"):
        return "#" * round(share * columns)
    full, eighths = divmod(round(share * columns * 8), 8)
    return "█" * full + "▏▎▍▌▋▊▉"[:eighths][-1:]


def describe(token):
    """Return a token's names, expiry and limits as a part of a sentence."""
    facts = [f"expires {format_instant(token.expires_at)}" if token.expires_at else "does not expire"]
    for limit in LIMITS:
        if getattr(token, limit.column):
            facts.append(limit.phrase.format(getattr(token, limit.column)))
    return f'the {"admin " if token.admin else ""}token "{token.user}/{token.name}" ({"; ".join(facts)})'


def columns_in_flags(args):
    """Return the values of the given flags for SETTABLE and admin, by column; raise UsageError."""
    found = {"admin": args.admin} if hasattr(args, "admin") else {}
    for column in SETTABLE:
        if hasattr(args, column):
            try:
                found[column] = read_column(column, getattr(args, column))
            except ValueError as error:
                flag = LIMIT_BY_COLUMN[column].flag if column in LIMIT_BY_COLUMN else "--expires"
                raise UsageError(f'{flag}: "{getattr(args, column)}" {error}') from None
    return found


def command_settings(args, *flags):
    """Return the settings of some flags for a command that does not serve; of the flags, only --db is read."""
    typed = {"db": getattr(args, "db", None)}
    return load_settings(typed, os.environ, args.env_file, [option for option in OPTIONS if option.flag in flags])


def open_command_store(args, create=False):
    """Open the database that a command's flag, the environment or .env names."""
    return open_store(command_settings(args, "--db").db, create)


def url_of(settings):
    """Return the URL at which this machine reaches a `serve` with these settings."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.tls_cert else 'http'}://{host}:{settings.port}"


def framed(text):
    """Return a line indented; on a terminal framed, or on a narrow one between rules, so that it can be selected."""
    width = terminal_width()
    if not width:
        return "    " + text
    across, down, *corners = "─│╭╮╰╯" if can_show("─│╭╮╰╯") else "-|++++"
    rule = across * (len(text) + 4)
    if width < len(rule) + 2:
        return f"{across * (width - 1)}\n{text}\n{across * (width - 1)}"
    return f"{corners[0]}{rule}{corners[1]}\n{down}  {text}  {down}\n{corners[2]}{rule}{corners[3]}"


def show_secret(args, store, done, token, secret):
    """Print a new secret: alone, as JSON, or with the command that uses it."""
    if args.quiet:
        return print_line(secret)
    if args.json:
        return print_line(json.dumps(dict(token_json(token), token=secret), indent=2))
    settings = command_settings(args, "--host", "--port", "--tls-cert", "--base-path")
    print_line(f"{done} {describe(token)} in {store.path}\n\n{framed(secret)}\n\n"
               "The secret is shown only now; keep it like a password. To use it:\n\n"
               f'    curl -H "Authorization: Bearer {secret}" {url_of(settings)}{settings.base_path}/tags')


def cmd_token_create(args):
    with open_command_store(args, create=True) as store:
        token, secret = store.create(args.user, args.name, **columns_in_flags(args))
        show_secret(args, store, "Created", token, secret)


def cmd_token_rotate(args):
    with open_command_store(args) as store:
        token, secret = store.rotate(args.user, args.name)
        show_secret(args, store, "Gave a new secret to", token, secret)


TOKEN_COLUMNS = (
    ("USER", lambda token: token.user),
    ("NAME", lambda token: token.name),
    ("SECRET", lambda token: token.hint + "…"),
    ("CREATED", lambda token: format_minute(token.created_at)[:10]),
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
    if not tokens:
        of_user = f' of "{args.user}"' if hasattr(args, "user") else ""
        return print_line(f"No tokens{of_user} in {store.path}.")
    columns = [(heading, *(str(value(token) or "") for token in tokens)) for heading, value in TOKEN_COLUMNS]
    rows = list(zip(*(column for column in columns if any(column[1:]))))
    lines = format_table(rows, terminal_width(), ("USER", "NAME", "MODELS"),
                         ("CREATED", "EXPIRES", "SECRET", "LAST USED"))
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
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = ["" if row[column] is None else str(row[column]) for column in columns]
        writer.writerow(["'" + cell if cell.startswith(FORMULA_STARTS) else cell for cell in cells])
    return file.getvalue().rstrip("\n")


def replace_file(path, text):
    """Replace a file atomically; only its owner can read the new one."""
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


EXPORT_COLUMNS = {  # of TokenStore.EXPORTED: what writes a value, the type in JSON besides text, what reads the text
    "user": (str, str, functools.partial(check_name, "user")),
    "name": (str, str, functools.partial(check_name, "name")),
    "digest": (str, str, str),
    "hint": (str, str, str),
    "created_at": (format_instant, str, parse_instant),
    "expires_at": (format_instant, str, parse_instant),
    "last_used_at": (format_instant, str, parse_instant),
    "admin": (bool, bool, boolean),
    **{limit.column: (lambda value: value, int, limit.read) for limit in LIMITS},
}
OPTIONAL_COLUMNS = ("hint", "expires_at", "last_used_at")   # an imported row need not have them


def cmd_token_export(args):
    form = args.format or ("json" if args.file == "-" else args.file.rpartition(".")[2].lower())
    if form not in ("csv", "json"):
        raise UsageError(f'token export: "{args.file}" ends neither in .csv nor in .json: add --format csv or json')
    with open_command_store(args) as store:
        rows = [{column: write(row[column]) for column, (write, _, _) in EXPORT_COLUMNS.items()}
                for row in store.export_rows()]
    text = json.dumps({"version": EXPORT_VERSION, "tokens": rows}, indent=2)
    if form == "csv":
        text = as_csv(("version", *EXPORT_COLUMNS), [dict(row, version=EXPORT_VERSION) for row in rows])
    if args.file == "-":
        return print_line(text)
    replace_file(args.file, text + "\n")
    print_line(f"Exported {plural(len(rows), 'token')} from {store.path} to {args.file}")


def parse_export(text):
    """Return the rows of an export in either format, as dictionaries of its values; raise ValueError or csv.Error."""
    if text.lstrip().startswith("{"):
        export = json.loads(text)
        rows, versions = export.get("tokens"), {str(export.get("version"))}
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it has no list of tokens")
    else:
        lines = list(csv.reader(io.StringIO(text, newline="")))
        if not lines or "version" not in lines[0]:
            raise ValueError("its first line does not name the columns")
        rows = [dict(zip(lines[0], [cell[1:] if cell.startswith("'") else cell for cell in line]))
                for line in lines[1:] if line]
        versions = {str(row.get("version")) for row in rows}
    if not versions <= set(map(str, range(1, EXPORT_VERSION + 1))):
        found = ascii(" and ".join(sorted(versions)))[:80]
        raise ValueError(f"its version is {found}; this program reads up to {EXPORT_VERSION}")
    missing = dict.fromkeys([*OPTIONAL_COLUMNS, *(LIMIT_BY_COLUMN if versions == {"1"} else ())])
    return [{**missing, **row} for row in rows]


def read_export_row(row):
    """Return an exported row as TokenStore.import_rows takes it; raise ValueError or UsageError."""
    values = {}
    for column, (_, json_type, read) in EXPORT_COLUMNS.items():
        if column not in row:
            raise ValueError(f"it has no {column}")
        value = "" if row[column] is None else row[column]
        is_null = value == "" and column in (*OPTIONAL_COLUMNS, *LIMIT_BY_COLUMN)
        try:
            if not isinstance(value, (str, json_type)):
                raise ValueError("has the wrong type")
            values[column] = None if is_null else read(str(value))
        except ValueError as error:
            raise ValueError(f"{column}: {json.dumps(value)[:100]} {error}") from None
    if not re.fullmatch("[0-9a-f]{64}", values["digest"]):
        raise ValueError("its digest is not a SHA-256")
    values["hint"] = values["hint"] or ""
    if len(values["hint"]) > HINT_LENGTH or not values["hint"].isprintable():
        raise ValueError(f"its hint is not up to {HINT_LENGTH} printable characters")
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
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"cannot read {args.file}: {getattr(error, 'strerror', None) or error}") from None
    except (ValueError, RecursionError, UsageError, csv.Error) as error:
        raise Failure(f'{args.file} is not a file written by "token export": {where}{error}; '
                      "nothing was imported") from None
    with open_command_store(args, create=True) as store:
        added = store.import_rows(rows)
        print_line(f"Imported {plural(added, 'token')} into {store.path}; already there: {len(rows) - added}")


def tokens_in(row):
    return UsageRow(*(row[column] for column in MEASURED)).tokens_used


def usage_table(rows, keys, width):
    """Return usage rows as lines of a table, with a bar for each row if the width (0: not a terminal) has room."""
    columns = [[key.upper(), *(row[key] or "-" for row in rows)] for key in keys]
    for column in MEASURED:
        if column not in ("cached_tokens", "estimated_tokens") or any(row[column] for row in rows):
            form = "{:.1f}" if column == "seconds" else "{}"
            cells = ["unknown" if row[column] is None else form.format(row[column]) for row in rows]
            cells.insert(0, column.replace("_tokens", "").upper())
            longest = max(map(len, cells))
            columns.append([cell.rjust(longest) for cell in cells])
    room = min(width - sum(max(map(text_width, column)) + 2 for column in columns), MAX_BAR_COLUMNS)
    if room >= MIN_BAR_COLUMNS:
        most = max(map(tokens_in, rows)) or 1
        columns.append(["TOKENS", *(format_bar(tokens_in(row) / most, room) for row in rows)])
    return format_table(list(zip(*columns)), width, [key.upper() for key in keys],
                        ("ESTIMATED", "SECONDS", "CANCELLED", "ERRORS", "CACHED", "REQUESTS"))


def cmd_usage(args):
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
        return print_line(as_csv(USAGE_BY[by] + MEASURED, rows))
    lines = usage_table(rows, USAGE_BY[by], terminal_width()) if rows else []
    requests, tokens = sum(row["requests"] for row in rows), sum(map(tokens_in, rows))
    total = f"{plural(requests, 'request')}, {plural(tokens, 'token')} since {format_minute(since)} UTC"
    print_line("\n".join([*lines, f"{total} in {store.path}"]))


@contextlib.contextmanager
def configure_logging(settings):
    """Log to stderr and to the settings' log file within the with block; yield the LogFile, or None without one."""
    file, writers = None, []
    if settings.log_file:
        try:
            file = LogFile(settings.log_file)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            raise Failure(f"cannot write the log file {settings.log_file!a}: {reason}") from None
        writers.append(LogWriter(settings.log_file, file.write, settings.log_file_level))
    writers.append(LogWriter("stderr", functools.partial(write_all, sys.stderr.fileno()), settings.log_level))
    LOG.propagate = False
    LOG.setLevel(min(writer.level for writer in writers))
    with contextlib.ExitStack() as stack:
        for writer in reversed(writers):    # the file's is finished first: stderr reports its errors
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
    host, health, tokens = server.server_address[0], server.gateway.health, len(store.list())
    state = plural(len(health.models), "model") if health.up else "DOES NOT ANSWER yet"
    held = f"{plural(tokens, 'token')} in {store.path}"
    if not tokens:
        held = f"no tokens yet, so no access: create one with {PROGRAM} token create USER NAME --db {store.path}"
    print_error(f"ollama_gateway {VERSION} listening on {server.url}, "
                f"upstream {settings.ollama_url.geturl()} ({state}), {held}")
    if server.connections.most < settings.max_connections:
        print_error(f"Only {server.connections.most} connections fit the limit of open files, "
                    f"not {settings.max_connections}: raise it (ulimit -n) or lower --max-connections.")
    if not store.writable:
        print_error("The database is read-only: a change of tokens takes effect at the next start.")
    if remote_file_system(store.path):
        LOG.warning("the database %s is on a network or FUSE file system (%s): its changes may be lost, "
                    "move it to a local disk (--db)", store.path, remote_file_system(store.path))
    if not server.tls and not is_loopback(host):
        print_error(f"Warning: {host} can be reached from the network, and without TLS tokens are sent in clear: "
                    "use --tls-cert, or a proxy that speaks HTTPS, and --host 127.0.0.1.")


def cmd_serve(args):
    """Run the gateway until SIGINT or SIGTERM."""
    settings = load_settings(vars(args), os.environ, args.env_file)
    os.umask(0o077)  # also for logs and the files that SQLite creates beside the database
    with configure_logging(settings) as log_file, open_store(settings.db, create=True) as store:
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
            server.stop(settings.drain_timeout)
        finally:
            server.server_close()


def option_keywords(option):
    """Return argparse's keywords for a setting."""
    how = dict(action="store_const", const="on") if option.convert is boolean else dict(metavar=option.metavar)
    default = f", default {option.default}" if option.default else ""
    return dict(how, help=f"{option.help} ({option.variable}{default})")


ONE_OF = "only one of these"
ARGUMENTS = {   # name, after "serve" if it is a setting: heading in the help, or ONE_OF; keywords of argparse
    "user": ("", dict(metavar="USER", help="owner of the token: a person")),
    "name": ("", dict(metavar="NAME", help="label of the token: a device, a program")),
    "file": ("", dict(metavar="FILE", help='a .csv or .json file of tokens; "-" is stdout (as JSON) or stdin')),
    "--expires": ("", dict(dest="expires_at", metavar="WHEN",
                           help='30d, 2027-01-31 (00:00 UTC), 2027-01-31T18:00:00Z, or "none": never')),
    "--admin": ("", dict(action="store_true",
                         help="may manage tokens and models, and act as the owner's ollama.com account")),
    "--no-admin": ("", dict(dest="admin", action="store_false", help="take the admin rights away")),
    "--user": ("", dict(metavar="USER", help="only the tokens of this user")),
    "--format": ("", dict(choices=("csv", "json"), help="format, whatever the name of the file")),
    "--by": ("", dict(choices=tuple(USAGE_BY), help="what each row stands for (default: user)")),
    "--since": ("", dict(metavar="WHEN", help="7d (UTC days with today), 12h or 2027-01-31 (default: 7d)")),
    "--url": ("", dict(metavar="URL", help="the public URL of the gateway, behind any proxy; streams are tested with "
                                           f"the token in {TOKEN_VARIABLE}, or one that is typed in")),
    "--quiet": (ONE_OF, dict(action="store_true", help="print the secret alone")),
    "--json": (ONE_OF, dict(action="store_true", help="print JSON")),
    "--csv": (ONE_OF, dict(dest="format", action="store_const", const="csv", help="print CSV")),
    **{limit.flag: ('limits ("none" removes one)', dict(metavar=limit.metavar, help=limit.help)) for limit in LIMITS},
    **{f"serve {option.flag}": (title, option_keywords(option))
       for title, options in OPTION_GROUPS.items() for option in options if option is not DATABASE_OPTION},
    "--db": ("", option_keywords(DATABASE_OPTION)),
    "--env-file": ("", dict(metavar="FILE", help="settings file in place of .env")),
    "--version": ("", dict(action="version", version=f"ollama_gateway {VERSION}", help="show it and exit")),
}
SERVE_FLAGS = tuple(name for name in ARGUMENTS if name.startswith("serve"))
RIGHTS_FLAGS = ("--expires", "--admin", *(limit.flag for limit in LIMITS))
COMMANDS = (    # words, function, help, the rest of its examples, arguments
    ("serve", cmd_serve, "run the gateway", ("", "--host 0.0.0.0 --tls-cert box.pem"), SERVE_FLAGS),
    ("usage", cmd_usage, "show usage by user, token, model or day", ("", "--by model --since 30d --csv"),
     ("--by", "--since", "--json", "--csv")),
    ("token", None, "create and manage tokens", ("create ada laptop --expires 90d", "list"), ()),
    ("token create", cmd_token_create, "create a token and show its secret, once",
     ("ada laptop --expires 90d", "kim school --models 'llama3*' --rpm 60"),
     ("user", "name", *RIGHTS_FLAGS, "--quiet", "--json")),
    ("token list", cmd_token_list, "list the tokens", ("--user ada",), ("--user", "--json")),
    ("token update", cmd_token_update, "change a token, from its next request on",
     ("ada laptop --expires none --rpm 30",), ("user", "name", *RIGHTS_FLAGS, "--no-admin")),
    ("token rotate", cmd_token_rotate, "replace the secret of a token", ("ada laptop",),
     ("user", "name", "--quiet", "--json")),
    ("token delete", cmd_token_delete, "delete a token; it stops at its next request", ("ada laptop",),
     ("user", "name")),
    ("token export", cmd_token_export, "write all tokens to a file, without secrets", ("tokens.csv",),
     ("file", "--format")),
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
                groups[title] = (self.add_mutually_exclusive_group() if title == ONE_OF
                                 else self.add_argument_group(title))
            groups[title].add_argument(name.split()[-1], **keywords)

    def _print_message(self, message, file=None):
        """Print help or an error; argparse itself ignores that stdout cannot be written."""
        (print_line if file is sys.stdout else print_error)(message.rstrip("\n"))

    def error(self, message):
        """Exit with the message and a suggestion for the wrong word."""
        import difflib  # only errors need it
        wrong = re.search(r"(invalid choice|unrecognized arguments): '?([^\s'=]+)", message)
        if wrong:
            flags = ["--help", *(name.split()[-1] for name in ARGUMENTS if "--" in name)]
            known = flags if wrong[1][0] == "u" else re.findall(r"[\w-]+", message[wrong.end():])
            message += "".join(f'; did you mean "{near}"?' for near in difflib.get_close_matches(wrong[2], known, 1))
        super().error(message)

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
        It raises in these waits only: elsewhere the exception may be ignored, as in a weak reference's callback.
        """
        left, waits = threading.Event(), (self._read_line.__code__, self._read_byte.__code__)

        def leave(*_):
            if not left.is_set():   # a second signal must not interrupt the cleanup
                left.set()
                signal.setitimer(signal.ITIMER_REAL, 1e-6, SIGNAL_SECONDS)

        def interrupt(_, frame):
            if left.is_set() and frame.f_code in waits:
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
        print(self._drawing(lines), end="", flush=True)

    def _drawing(self, lines):
        """Return the text that draws (text, colour) lines over the last ones, which a narrower terminal has wrapped."""
        columns = max(shutil.get_terminal_size().columns, 20)
        up = sum(max(1, -(-text_width(text) // columns)) for text, _ in self._drawn) - 1
        self._drawn = [(fit_width(printable_text(text), columns - 1).rstrip(), colour) for text, colour in lines]
        shown = "\n".join(self._paint(text, colour) for text, colour in self._drawn)
        return (f"\x1b[{up}A" if up > 0 else "") + "\r\x1b[J" + shown

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
        drawing = self._drawing(lines) if lines else ""
        os.write(sys.stdout.fileno(), drawing.encode(sys.stdout.encoding))  # print() may be what was interrupted

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


MENU = ("token menu", cmd_token_menu, "manage the tokens from a menu, with arrow keys", ("",), ())

# == Doctor ===================================================================

FLOORS = (("Python", "%d.%d.%d" % sys.version_info[:3], (3, 8)), ("SQLite", SQLITE_VERSION, (3, 26)))
STREAM_TOKENS = 48      # requested from a model to see whether they arrive one by one
TELLING_SECONDS = 0.02  # a response that took less proves nothing


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
            status, about = ollama.get_json("/api/version")
            _, listed = ollama.get_json("/api/tags")
            refused, _ = ollama.get_json("/api/version", "Origin: https://chat.example\r\n")
        except (UpstreamError, Refusal) as error:
            return (yield CheckResult(False, f"Ollama at {url}: {error}", "start it, or see --ollama-url"))
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
            status, about = ollama.get_json("/api/version")
            return status == 200 and "version" in (about or ())
        except (UpstreamError, Refusal):
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
        status, about = gateway.get_json("/health")
    except (UpstreamError, Refusal) as error:
        return False, CheckResult(False, f"the gateway at {where}: {error}", "is it running there?")
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
    request = UpstreamRequest("POST", f"{base}/generate", fields, BufferedBody(json.dumps(body).encode()))
    with gateway.send(request) as response:
        while not response.body.complete:
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
        status, listed = gateway.get_json(f"{base}/tags", fields)
        if status != 200:
            advice = f"set a valid one in {TOKEN_VARIABLE}, and the gateway's --base-path"
            return CheckResult(False, f"{where} answers {status} to the token: {(listed or {}).get('error', '')}",
                               advice if status in (401, 404) else "")
        results = (time_stream(where, gateway, base, fields, model) for model in names_in(listed))
        untried = CheckResult(None, f"the stream test of {where} was not tried: no model makes text")
        return next(filter(None, results), untried)
    except (UpstreamError, Refusal) as error:
        return CheckResult(False, f"a streamed response of {where}: {error}")


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


def run_command(argv):
    """Run a command; return its exit status."""
    try:
        args = build_parser().parse_args(argv, argparse.Namespace(**DEFAULT_ARGS))
        return args.run(args) or 0
    except SystemExit as stop:  # argparse has printed its message
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
    """Run a command; return 0 for success, 1 for a failure, 2 for a wrong flag, value or setting."""
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:  # closed: printing must fail, and no other file may get the descriptor
            setattr(sys, name, open(os.open(os.devnull, os.O_RDONLY), "w"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show
    status = run_command(argv)
    for stream in sys.stdout, sys.stderr:
        try:
            stream.flush()
        except OSError:  # Python would try again at exit, complain, and exit with status 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


if __name__ == "__main__":
    sys.exit(main())
