"""Keep secrets out of whatever is written: files, logs, requests, reports, MLflow, messages.

Two things are replaced by ``[REDACTED]``: the values that this process knows to be secret, wherever
they stand and however they are encoded, and what looks like a secret to anybody. Who starts with
secrets says so once (:func:`know`); whoever writes redacts.

Invariants:

* What was redacted stays as it is when it is redacted again.
* A secret is replaced, never removed, so that a reader sees that something stood there.
* A configuration that would be changed by redaction is refused (``conductor.config``), and secrets
  reach workers and servers by environment variables alone. So nothing that a release depends on is
  recorded otherwise than it was.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote

REDACTED = "[REDACTED]"
SHORTEST = 8
"""Characters of a value that is hidden wherever it stands; shorter ones are words of a report."""

SHORTEST_VALUE = 4
"""Characters of a user or a query value that is hidden in messages about its own URI."""

SCHEME = r"[A-Za-z][\w+.-]*://"
LOCAL_URI = re.compile(
    r"((?:sqlite[\w+]*|file):(?:///|/(?!/))[^?]*|\.{0,2}/(?!/)[^?]*)(?:\?.*)?", re.DOTALL
)
SERVED_URI = re.compile(
    rf"((?:{SCHEME})?)(?:[^\s/?#]*@)?"
    r"((?:[\w.-]*|\[[0-9A-Fa-f:.]+\])(?::\d+)?(?:/[^\s?#@]*)?)(?:[?#][^\s@]*)?"
)
UNREADABLE_URI = "a tracking URI that cannot be parsed"

_WORDS = frozenset(
    {
        *("AUTH", "CREDENTIAL", "CREDENTIALS", "KEY", "KEYS", "PASS", "PASSPHRASE", "PAT", "PWD"),
        "SIGNATURE",
    }
)
_WORD_ENDINGS = (
    *("APIKEY", "APIKEYS", "PASSWD", "PASSWORD", "PASSWORDS", "SECRET", "SECRETS", "TOKEN"),
)
_ROOT = Path(__file__).resolve().parents[1]
_WORDED = frozenset({".j2", ".json", ".py", ".yaml"})
_PLACES = frozenset({"DIR", "FILE", "PATH"})
"""Last words of a name whose value says where a secret is, and is none itself."""

_TELLING_URL = re.compile(rf"""(?<![\w+.-]){SCHEME}(?:[^\s'"<>/]*@|[^\s'"<>]*\?)[^\s'"<>]*""")
"""A URL with user information or a query."""
_HOLDS_ONE_URI = ("_PROXY", "TRACKING_URI")
"""Endings of variables that are one URI to its end, with whatever stands in it."""

_PARAMETER = r"[\w-]*(?:auth|credential|key|passwd|password|secret|sig|signature|token)"
_OPTION = r"(?:(?:access|api|secret)-?key|credentials?|passw(?:d|ord)|secret|token)"
_PATTERNS = tuple(
    (hints, re.compile(pattern))
    for hints, pattern in (
        (["hf_"], r"()(?<![A-Za-z0-9])hf_[A-Za-z0-9]{16,}"),
        (["sk-"], r"()(?<![\w-])sk-(?=[\w-]*\d)[\w-]{16,}"),
        (["://"], r"""(://)[^\s/'"<>]+(?=@)"""),
        (["earer", "EARER"], r"(?i:(bearer\s+))(?=[\w.~+/=-]*\d)[\w.~+/=-]{8,}"),
        (
            ["uthorization", "UTHORIZATION"],
            r"""(?i:(authorization['"]?\s*[:=,]\s*b?['"]?(?:basic|bearer|digest|token)\s+))"""
            r"""[^\s'",;]+""",
        ),
        (["?", "&", ";"], rf"""(?i:([?&;]{_PARAMETER}=))[^\s&;'"#<>]+"""),
        (
            ["--"],
            rf"""(?i:((?<![\w-])--(?:[\w-]+-)?{_OPTION}['"]?(?:=|,?\s+)['"]?))"""
            r"""(?!-|\[REDACTED)[^\s'",\]]{8,}""",
        ),
    )
)
"""What looks like a secret: texts one of which is near every match, and the pattern.

The first group stays. Looking for a plain text first is many times faster than the pattern. A
pattern that may go on for long begins where a word begins, so that no text takes quadratic time.
"""


def names_secret(name: str) -> bool:
    """Tell whether a variable, an option or a parameter of this name holds a secret.

    Words count whole: ``HF_TOKEN`` and ``--api-key`` do, ``MAX_TOKENS`` and ``KEYBOARD`` do not.
    """
    words = [word for word in re.split(r"[\W_]+", name.upper()) if word]
    return (
        bool(words)
        and words[-1] not in _PLACES
        and any(word in _WORDS or word.endswith(_WORD_ENDINGS) for word in words)
    )


def without_credentials(uri: str) -> str:
    """Return ``uri`` without user, password, query and fragment.

    Of one that can be read in two ways, such as with an ``@`` after the host, the scheme is shown.
    """
    if local := LOCAL_URI.fullmatch(uri):
        return local[1]
    if served := SERVED_URI.fullmatch(uri):
        return served[1] + served[2]
    scheme = re.match(SCHEME, uri)
    return f"{scheme[0]}***" if scheme else UNREADABLE_URI


class Secrets:
    """Values that are secret, in every form in which they may be met."""

    def __init__(self) -> None:
        """Know none."""
        self._forms: tuple[str, ...] = ()

    def know(self, environ: Mapping[str, str], argv: Sequence[str] = ()) -> None:
        """Learn the secrets that variables, a command line and the Hub's login file hold.

        They are the values of variables and options whose name says so, and the user information
        and secret parameters of URLs, whatever holds them. Too short to be hidden everywhere, a
        number, a truth value, a path that exists, or what is public: these are no secrets.
        """
        found = {
            *(value for name, value in environ.items() if names_secret(name)),
            *_option_values(argv),
            *_stored_hub_token(environ),
        }
        secrets = {line.strip() for value in found for line in (value, *value.splitlines())}
        forms = {form for secret in secrets if not _is_harmless(secret) for form in _forms(secret)}
        urls = [url for text in (*environ.values(), *argv) for url in _TELLING_URL.findall(text)]
        odd = [value for name, value in environ.items() if name.upper().endswith(_HOLDS_ONE_URI)]
        forms |= {form for url in (*urls, *odd) for form in _secrets_of_url(url)}
        kept = {
            form
            for form in forms.difference(self._forms)
            if len(form) >= SHORTEST and form not in REDACTED and form not in _public()
        }
        self._forms = tuple(sorted({*self._forms, *kept}, key=lambda form: (-len(form), form)))

    def known_forms(self) -> tuple[str, ...]:
        """Return every form of every known value, the longest first."""
        return self._forms

    def redact_known(self, text: str) -> str:
        """Return ``text`` with the known values replaced, and nothing else."""
        for form in self._forms:
            if form in text:
                text = text.replace(form, REDACTED)
        return text

    def begun(self, text: str) -> int:
        """Return how many characters at the end of ``text`` may be the beginning of a secret."""
        return max((_begun(form, text) for form in self._forms), default=0)

    def redact(self, text: str) -> str:
        """Return ``text`` with known values, and what looks like a secret, replaced."""
        text = self.redact_known(text)
        for hints, pattern in _PATTERNS:
            if any(hint in text for hint in hints):
                text = pattern.sub(_keep_first_group, text)
        return text

    def redact_document(self, document: Any) -> Any:
        """Return a JSON document with every text redacted, names included.

        In a list, such as a command, what follows an option whose name says so is redacted too.
        """
        match document:
            case str():
                return self.redact(document)
            case Mapping():
                return {
                    self.redact_document(name): self.redact_document(each)
                    for name, each in document.items()
                }
            case list() | tuple():
                texts = [each if isinstance(each, str) else "-" for each in document]
                values = set(_option_values(texts))
                redacted = [
                    REDACTED
                    if isinstance(each, str) and each in values and not _is_harmless(each)
                    else self.redact_document(each)
                    for each in document
                ]
                return redacted if isinstance(document, list) else tuple(redacted)
            case _:
                return document


def _begun(form: str, text: str) -> int:
    """Return how many characters ``form`` begins with end ``text``, less than all of it."""
    start = max(0, len(text) - len(form) + 1)
    while (start := text.find(form[0], start)) >= 0:
        if form.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0


def _keep_first_group(match: re.Match[str]) -> str:
    return f"{match[1]}{REDACTED}"


@cache
def _public() -> str:
    """Return what everybody knows: the text of day0's own files, and where it runs.

    Were a part of it hidden, because a password is ``candidate`` or a key has the name of a user,
    documents could not be read again, and paths would lead nowhere.
    """
    files = (path for name in ("conductor", "gates") for path in (_ROOT / name).rglob("*"))
    texts = [
        path.read_text(encoding="utf-8", errors="replace")
        for path in files
        if path.suffix in _WORDED
    ]
    places = [str(_ROOT), sys.prefix, os.path.expanduser("~")]  # noqa: PTH111 - no error without one
    with suppress(OSError):
        places.append(os.getcwd())  # noqa: PTH109 - text is wanted
    return "\n".join([*texts, *places])


def _is_harmless(value: str) -> bool:
    """Tell whether a value is none that could be a secret, whatever its name says."""
    if len(value) < SHORTEST:
        return True
    with suppress(ValueError):
        float(value)
        return True
    return os.sep in value and os.path.exists(os.path.expanduser(value))  # noqa: PTH110, PTH111 - bears any text


def _option_values(argv: Sequence[str]) -> Iterator[str]:
    """Yield what options give whose name says that it is secret: ``--api-key=x``, ``--token x``."""
    for argument, following in zip_longest(argv, argv[1:], fillvalue="-"):
        name, equals, value = argument.partition("=")
        if name.startswith("-") and names_secret(name):
            given = value if equals else following
            if not given.startswith("-"):
                yield given


def _stored_hub_token(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield the token that logging in to the Hub left on disk, where huggingface_hub looks."""
    home = environ.get("HOME") or os.path.expanduser("~")  # noqa: PTH111 - no error without a home
    cache = Path(environ.get("XDG_CACHE_HOME") or f"{home}/.cache")
    hub = Path(environ.get("HF_HOME") or cache / "huggingface")
    with suppress(OSError, ValueError):
        yield Path(environ.get("HF_TOKEN_PATH") or hub / "token").read_text(encoding="utf-8")


def _forms(secret: str) -> set[str]:
    """Return ``secret`` as it is, quoted and unquoted for URLs, in JSON, in Python, in base64."""
    return {
        secret,
        unquote(secret),
        *(_quoted(secret), _quoted(secret, safe=""), quote_plus(secret, errors="surrogateescape")),
        *(json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]),
        repr(secret)[1:-1],
        *_base64(secret),
    }


def _quoted(text: str, safe: str = "/") -> str:
    return quote(text, safe=safe, errors="surrogateescape")


def _base64(text: str) -> set[str]:
    """Return the base64 of ``text`` alone, and of it amid other text less the ends that differ."""
    encoded = {text.encode("utf-8", "surrogateescape"), text.encode("latin-1", "replace")}
    found, amid = set(), set()
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for data in encoded:
            found.add(encode(data).decode().rstrip("="))
            for before, first in enumerate((0, 2, 3)):  # bytes before it, characters they touch
                last = (before + len(data)) * 8 // 6
                amid.add(encode(bytes(before) + data).decode()[first:last])
    return found | {part for part in amid if len(part) >= SHORTEST}


def uri_secrets(uri: str) -> set[str]:
    """Return what may not be shown of ``uri``, however short: user, password, and the query.

    Each as it is, quoted, unquoted, and in the base64 of an Authorization header.
    """
    found: set[str] = set()
    for form in (uri, unquote(uri)):
        query = re.split(r"[?#]", form, maxsplit=1)[1:]
        values = [part.rpartition("=")[2] for part in re.split(r"[&;#]", "".join(query))]
        if not LOCAL_URI.fullmatch(form):
            user, password = _user_information(form)
            pairs = {f"{user}:{each}" for each in (password, password.strip()) if user + each}
            found |= {
                password,
                *pairs,
                *(code for pair in pairs for code in _base64(unquote(pair))),
            }
            values += [user, *re.split(r"[:@/]", password)]
        found |= {*query, *(value for value in values if len(value) >= SHORTEST_VALUE)}
    stripped = {secret.strip() for secret in found}
    forms = {form for secret in stripped for form in (secret, unquote(secret), _quoted(secret))}
    return forms - {""}


def _user_information(uri: str) -> tuple[str, str]:
    """Return user and password as they stand in a URI, also in one with an odd password."""
    user, _, password = re.sub(rf"^{SCHEME}", "", uri).rpartition("@")[0].partition(":")
    return user, password


def _secrets_of_url(url: str) -> set[str]:
    """Return the secrets of a URL that may be hidden anywhere.

    A user's name alone is a token. Beside a password it is the name of a home directory too, and
    stays.
    """
    user, password = _user_information(url)
    names = {user, unquote(user)} if password else set()
    return uri_secrets(url) - names


_OURS = Secrets()
know = _OURS.know
redact = _OURS.redact
redact_known = _OURS.redact_known
known_forms = _OURS.known_forms
redact_document = _OURS.redact_document
