"""Keep a model's answers as they come in, so that an evaluation that was cut short asks the rest.

One line of JSON for each step of the work: one answer of an endpoint, or one whole batch in
process. A line that a crash tore off does not count. What is left to ask is therefore cut into the
same batches as if nothing had happened, and numbers come out the same to the last bit.

In place of lm-eval's own cache, which holds pickles, is cut off in the middle of a batch, hands
one sampled answer out for every repetition of a question, and knows neither model nor settings.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

ASKED = ("generate_until", "loglikelihood", "loglikelihood_rolling")

Key = Callable[[str, Iterable[Any]], "str | None"]


class Answer(str):
    """What a model wrote, and why it ended: ``stop``, ``length``, or what the server says."""

    finish_reason: str | None = None

    @classmethod
    def of(cls, text: str, finish_reason: str | None) -> Answer:
        """Return the text with the reason beside it."""
        answer = cls(text)
        answer.finish_reason = finish_reason
        return answer


class RequestCache:
    """The answers of one model to one evaluation, kept in ``directory``; lm-eval's cache hook.

    Equal questions are told apart by their order: the second time that a question is asked, its
    second answer is taken.
    """

    def __init__(
        self, directory: Path, made_for: Mapping[str, Any], key: Key, *, by_batch: bool
    ) -> None:
        """Read what is there; answers that were made for other settings are dropped.

        Args:
            directory: is made where it is absent, and holds nothing else.
            made_for: what the answers depend on, a JSON mapping.
            key: gives a question its key, or None for one whose answer cannot be kept.
            by_batch: answers count when their batch is complete, that is with :meth:`flush`.
        """
        self.taken = 0
        self._key = key
        self._by_batch = by_batch
        self._pending: list[tuple[str, Any]] = []
        self._added: Counter[str] = Counter()
        directory.mkdir(parents=True, exist_ok=True)
        self._known, self._stream = _open(directory / "answers.jsonl", made_for)

    def remember(self, model_class: Any) -> None:
        """Have the models of a class asked only what is not known yet."""
        for kind in ASKED:
            self._stand_before(model_class, kind)

    def _stand_before(self, model_class: Any, kind: str) -> None:
        ask = getattr(model_class, kind)

        def answer(model: Any, requests: Sequence[Any], *args: Any, **kwargs: Any) -> list[Any]:
            model.set_cache_hook(self)
            return self._complete(kind, requests, lambda rest: ask(model, rest, *args, **kwargs))

        setattr(model_class, kind, answer)

    def _complete(
        self, kind: str, requests: Sequence[Any], ask: Callable[[list[Any]], list[Any]]
    ) -> list[Any]:
        keys = [self._key(kind, request.args) for request in requests]
        kept = {key: iter(self._known[key]) for key in keys if key in self._known}
        answers: list[Any] = [
            None if key is None else next(kept.get(key, iter(())), None) for key in keys
        ]
        rest = [number for number, answer in enumerate(answers) if answer is None]
        self.taken += len(requests) - len(rest)
        self._added.clear()
        fresh = ask([requests[number] for number in rest]) if rest else []
        for number, answer in zip(rest, fresh, strict=True):
            answers[number] = answer
            key = keys[number]
            if key is not None and not self._added[key]:
                self._pending.append((key, answer))  # the model did not report it by itself
            elif key is not None:
                self._added[key] -= 1
        self.flush()
        return [_thaw(answer) for answer in answers]

    def add_partial(self, kind: str, args: Iterable[Any] | None, answer: Any) -> None:
        """Keep an answer; lm-eval calls this for each, and with None for parts of an answer."""
        key = None if args is None else self._key(kind, args)
        if key is None:
            return
        self._added[key] += 1
        self._pending.append((key, answer))
        if not self._by_batch:
            self.flush()

    def flush(self) -> None:
        """Write what came in since the last time, as one step of the work."""
        if self._pending:
            step = [[key, _freeze(answer)] for key, answer in self._pending]
            self._pending.clear()
            self._stream.write(json.dumps(step).encode() + b"\n")
            self._stream.flush()


def _open(path: Path, made_for: Mapping[str, Any]) -> tuple[dict[str, list[Any]], BinaryIO]:
    """Return the answers in ``path`` by their keys, and the file, to be written on."""
    head = json.dumps({"made_for": made_for}, sort_keys=True).encode() + b"\n"
    content = path.read_bytes() if path.exists() else b""
    if not content.startswith(head):
        content = head
        path.write_bytes(head)
    known = defaultdict(list)
    for line in content[len(head) :].split(b"\n")[:-1]:
        try:
            step = [(str(key), answer) for key, answer in json.loads(line)]
        except (ValueError, TypeError):  # damaged by the disk or a crash of the whole machine
            continue
        for key, answer in step:
            known[key].append(answer)
    stream = path.open("r+b")
    stream.truncate(content.rfind(b"\n") + 1)
    stream.seek(0, 2)
    return dict(known), stream


def _freeze(answer: Any) -> Any:
    """Return an answer as JSON: a text and why it ended, a likelihood and whether greedy, a sum."""
    if isinstance(answer, str):
        return {"text": str(answer), "finish_reason": getattr(answer, "finish_reason", None)}
    return answer


def _thaw(answer: Any) -> Any:
    if isinstance(answer, dict):
        return Answer.of(answer["text"], answer["finish_reason"])
    return tuple(answer) if isinstance(answer, list) else answer
