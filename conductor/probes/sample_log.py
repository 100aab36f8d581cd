"""Read the log of samples of one task: what was asked, what came back, and what it scored.

A harness that ends well may still have lost documents, asked some twice, or scored answers that
nobody gave. The log is the evidence, one JSON object in a line. Invariants:

* Rows are measured as they are read and then let go; of each question a key, a score, and digests
  are kept.
* A line that is no row is refused with its number, whatever it holds. Rows carry text of strangers,
  of which nothing is run, and in which nothing is searched for.
* Nothing is judged here: counts go to the gate, and what nobody counted is ``None``.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b, sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from conductor.probes.reading import (
    LARGEST_JSON_BYTES,
    ProbeError,
    open_regular,
    parse_object,
    without_collector,
)

NULL_ANSWER = "<|day0:no-answer|>"
"""What the evaluation sets ``LMEVAL_MODEL_NONE_ANSWER_PLACEHOLDER`` to, so that an answer the
server never gave can be told from an empty one."""

REMEDY = "run the evaluation again with --log_samples and an --output_path of its own"

HASH_CHARACTERS = 16
"""How much of a hash stands in a question's key: 64 bits keep a million documents apart."""

RECOMPUTED = ("mean", "median", "perplexity", "weighted_perplexity", "bits_per_byte")
"""Aggregations that can be worked out from the samples."""

PERPLEXITIES = RECOMPUTED[2:]
"""Aggregations of log-likelihoods; all but the first divide them by words or bytes."""

_DIGEST_BYTES = 16
_SHOWN = 5

DocumentId = int | str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was to be asked of one task.

    ``documents`` are {id: hash or ``None``}, or a range of ids, or ``None`` where only their number
    is known: then the log says which they were, within ``size``, the whole benchmark. ``count`` is
    ``None`` where not even the number is known. ``repeat`` is the one repeat that was planned.
    """

    documents: Mapping[DocumentId, str | None] | range | None
    count: int | None
    size: int | None
    repeat: int | None = None

    def holds(self, document: DocumentId, document_hash: str | None) -> bool:
        """Tell whether a document was planned, with the content that it has."""
        if self.documents is None:
            return not isinstance(document, int) or self.size is None or 0 <= document < self.size
        if document not in self.documents:
            return False
        expected = self.documents[document] if isinstance(self.documents, Mapping) else None
        return expected is None or expected == document_hash


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How to read one task's log: what is the score, and of which kind the answers are.

    ``likelihood`` is ``None`` where the results do not say it; then the first row does.
    ``filters`` are those that must have rows. ``contrasted`` says that the second half of the
    log-likelihoods are those of choices without the question. ``cluster_field`` names the
    document's field that tells which questions belong together.
    """

    metric: str
    filter: str
    aggregation: str
    likelihood: bool | None
    plan: Plan
    filters: tuple[str, ...] = ()
    contrasted: bool = False
    cluster_field: str | None = None

    @property
    def divided(self) -> bool:
        """Tell whether log-likelihoods are divided by the words or bytes that stand beside them."""
        return self.aggregation in PERPLEXITIES[1:]


@dataclass(kw_only=True)
class Column:
    """One answer to each question, in the order asked; every list has one entry per question.

    ``weights`` are empty but for perplexities, ``choices`` but for log-likelihoods and ``clusters``
    but where a field was named. ``prompts`` and ``targets`` are hashes, ``texts`` are hashes of all
    that was put to the model, of which a prompt's hash has only the first.
    """

    documents: list[DocumentId] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    prompts: list[DocumentId] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    scores: array[float] = field(default_factory=lambda: array("d"))
    weights: array[float] = field(default_factory=lambda: array("d"))
    digests: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    lengths: list[float | None] = field(default_factory=list)
    choices: list[tuple[float, ...]] = field(default_factory=list)
    clusters: list[str] = field(default_factory=list)

    def take(self, other: Column, wanted: Sequence[int]) -> None:
        """Append the entries at the places wanted of another column."""
        for name, values in vars(other).items():
            getattr(self, name).extend(values[at] for at in wanted if values)


class Rows(NamedTuple):
    """What a filter has rows of, by repeat: ids as planned, and how often which were not."""

    seen: dict[int, set[DocumentId]]
    duplicated: Counter[DocumentId]
    unplanned: Counter[DocumentId]


@dataclass(kw_only=True)
class Answers:
    """Counts of answers; ``truncated`` and ``refused`` are ``None`` while no row says either.

    ``characters`` add up over texts. ``repeats`` is the most answers within one row, and
    ``repeated`` counts rows that have several, ``identical`` those of them that are all the same.
    """

    asked: int = 0
    null: int = 0
    empty: int = 0
    non_finite: int = 0
    truncated: int | None = None
    refused: int | None = None
    characters: int = 0
    repeats: int = 1
    repeated: int = 0
    identical: int = 0


@dataclass(kw_only=True)
class SampleLog:
    """What one log, or several of one side together, say about a task.

    ``plans`` are by repeat. ``unnamed`` counts documents that were planned and never seen, so that
    nobody knows their ids. ``unusable`` says why documents do not count as scored. ``task_hash`` is
    over the hashes of all rows in their order, as lm-eval makes it, or ``None``.
    """

    reading: Reading
    rows: dict[str, Rows] = field(default_factory=dict)
    columns: dict[int, Column] = field(default_factory=dict)
    unusable: dict[DocumentId, str] = field(default_factory=dict)
    answers: Answers = field(default_factory=Answers)
    task_hash: str | None = None
    empty_digests: set[str] = field(default_factory=set)
    plans: dict[int, Collection[DocumentId]] = field(default_factory=dict)
    unnamed: int = 0

    @property
    def scored(self) -> int:
        """Count documents that were scored from whole answers in every repeat planned for them."""
        rows = self.rows.get(self.reading.filter)
        seen = rows.seen if rows else {}
        whole = set[DocumentId]().union(*seen.values()) - self.unusable.keys()
        if len(self.plans) == 1:
            return len(whole)
        return sum(
            all(each in seen.get(r, ()) or each not in plan for r, plan in self.plans.items())
            for each in whole
        )

    @property
    def planned(self) -> int:
        """Count the documents that were to be asked at least once."""
        plans = list(self.plans.values())
        named = len(plans[0]) if len(plans) == 1 else len(set[DocumentId]().union(*plans))
        return named + self.unnamed

    def problems(self) -> list[str]:
        """Describe the documents that were not scored from whole answers."""
        if not self.unusable:
            return []
        shown = [f"{each} ({why})" for each, why in [*self.unusable.items()][:_SHOWN]]
        more = ", ..." if len(self.unusable) > len(shown) else ""
        count = len(self.unusable)
        return [f"{count} documents were not scored: {', '.join(shown)}{more}"]

    def recomputed(self) -> float | None:
        """Return the score that follows from the samples, where its aggregation is a known one."""
        scores, weights = array("d"), array("d")
        for column in self.columns.values():
            scores.extend(column.scores)
            weights.extend(column.weights)
        if not scores or self.reading.aggregation not in RECOMPUTED:
            return None
        try:
            return aggregate(self.reading.aggregation, scores, weights)
        except (OverflowError, ZeroDivisionError):
            return None

    def standard_error(self) -> float | None:
        """Return the standard error of a mean over questions; other aggregations have none here."""
        if self.reading.aggregation != "mean":
            return None
        scores: dict[DocumentId, list[float]] = {}
        for column in self.columns.values():
            for document, score in zip(column.documents, column.scores, strict=True):
                scores.setdefault(document, []).append(score)
        means = [math.fsum(each) / len(each) for each in scores.values()]
        if len(means) < 2:
            return None
        mean = math.fsum(means) / len(means)
        return math.sqrt(
            math.fsum((each - mean) ** 2 for each in means) / (len(means) - 1) / len(means)
        )


def merge_logs(logs: Sequence[SampleLog]) -> SampleLog:
    """Return several logs of one task and side as one: more questions, or more answers to them.

    What stands in two of them for the same repeat is counted as duplicated, and kept once.
    """
    merged = SampleLog(reading=logs[0].reading)
    for log in logs:
        kept: dict[int, set[DocumentId]] = {
            repeat: set(column.documents) for repeat, column in merged.columns.items()
        }
        for name, rows in log.rows.items():
            into = merged.rows.setdefault(name, Rows({}, Counter(), Counter()))
            into.duplicated.update(rows.duplicated)
            into.unplanned.update(rows.unplanned)
            for repeat, seen in rows.seen.items():
                known = into.seen.setdefault(repeat, set())
                into.duplicated.update(known & seen)
                known |= seen
        for repeat, column in log.columns.items():
            known = kept.get(repeat, set())
            places = [at for at, each in enumerate(column.documents) if each not in known]
            merged.columns.setdefault(repeat, Column()).take(column, places)
        for repeat, plan in log.plans.items():
            merged.plans[repeat] = {*merged.plans.get(repeat, ()), *plan}
        merged.unusable |= log.unusable
        merged.empty_digests |= log.empty_digests
        merged.unnamed += log.unnamed
    merged.answers = _add_answers([log.answers for log in logs])
    return merged


def _add_answers(parts: Sequence[Answers]) -> Answers:
    names = ("asked", "null", "empty", "non_finite", "characters", "repeated", "identical")
    return Answers(
        **{name: sum(getattr(part, name) for part in parts) for name in names},
        truncated=sum_known(part.truncated for part in parts),
        refused=sum_known(part.refused for part in parts),
        repeats=max(part.repeats for part in parts),
    )


def sum_known(counts: Iterable[int | None]) -> int | None:
    """Return a sum; unknown where one of the counts is."""
    known = list(counts)
    return None if None in known else sum(each for each in known if each is not None)


def aggregate(name: str, scores: Sequence[float], weights: Sequence[float]) -> float:
    """Return the score of all questions as lm-eval's aggregation of that name has it.

    Raises:
        OverflowError, ZeroDivisionError: there is no such number.
    """
    match name:
        case "mean":
            return math.fsum(scores) / len(scores)
        case "median":
            return sorted(scores)[len(scores) // 2]
        case "perplexity":
            return math.exp(-math.fsum(scores) / len(scores))
        case "weighted_perplexity":
            return math.exp(-math.fsum(scores) / math.fsum(weights))
        case "bits_per_byte":
            return -math.fsum(scores) / math.fsum(weights) / math.log(2)
        case _:
            raise ValueError(f"{name} is not recomputed")


def read_log(log: Path, reading: Reading) -> SampleLog:
    """Read a log of samples.

    Raises:
        ProbeError: a line is no row of a sample log, is cut off, or is larger than any row.
    """
    rows = _rows(log, _row_type(reading))
    head = list(islice(rows, 1))
    if reading.likelihood is None:
        likelihood = reading.aggregation in PERPLEXITIES or any(
            _holds_pairs(row) for _, row in head
        )
        reading = replace(reading, likelihood=likelihood)
    reader = _Reader(reading)
    with without_collector():
        for number, row in chain(head, rows):
            try:
                reader.add(row)
            except _NoClusterError as error:
                remedy = "correct the field that the suite's clusters names, or leave it out"
                raise ProbeError(Path(f"{log}:{number}"), str(error), remedy) from None
    return reader.finish()


class _NoClusterError(Exception):
    """A document without the field that says which questions belong together."""


_ROW_FIELDS: tuple[Any, ...] = (
    ("doc_id", int | str),
    ("filter", str, "none"),
    ("resps", Any, None),
    ("doc_hash", str | None, None),
    ("prompt_hash", str | None, None),
    ("target_hash", str | None, None),
    ("target", Any, None),
    ("doc", Any, None),
    ("arguments", Any, None),
    ("repeat", int | None, None),
    ("finish_reasons", Any, None),
    ("finish_reason", Any, None),
    ("completion_tokens", Any, None),
)


def _row_type(reading: Reading) -> type[Any]:
    """Return a type with the fields that are read; all others of a row are passed over."""
    fields = [*_ROW_FIELDS, ("value", Any, None)]
    known = {name for name, *_ in fields}
    # A metric named like a field of every row has no value of its own.
    rename = {} if reading.metric in known else {"value": reading.metric}
    return msgspec.defstruct("Row", fields, rename=rename, gc=False)


def _rows(log: Path, row_type: type[Any]) -> Iterator[tuple[int, Any]]:
    """Yield each row with the number of its line."""
    decode = msgspec.json.Decoder(row_type).decode
    with open_regular(log, REMEDY) as stream:
        number = 0
        while line := stream.readline(LARGEST_JSON_BYTES + 1):
            number += 1
            if not line.strip():
                continue
            try:
                row = decode(line)
            except (ValueError, RecursionError):
                row = _tolerant(line, row_type, Path(f"{log}:{number}"))
            yield number, row


def _tolerant(line: bytes, row_type: type[Any], place: Path) -> Any:
    """Read a row that is no strict JSON: lm-eval writes NaN and infinities as Python does."""
    if len(line) > LARGEST_JSON_BYTES:
        raise ProbeError(place, f"has more than {LARGEST_JSON_BYTES} bytes, as no row has", REMEDY)
    try:
        document = parse_object(line, place, REMEDY)
    except ProbeError:
        if line.endswith(b"\n"):
            raise
        problem = "is cut off: the log ends in the middle of a row"
        raise ProbeError(place, problem, REMEDY) from None
    try:
        return msgspec.convert(document, row_type)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ProbeError(place, f"is no row of a sample log ({error})", REMEDY) from None


class _Reader:
    """Takes the rows of one log, one after the other."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.log = SampleLog(reading=reading)
        self.likely = reading.aggregation in PERPLEXITIES
        self.reasons_given = False
        self.hashes: Any = sha256()
        for name in (*reading.filters, reading.filter):
            self._rows_of(name)

    def _rows_of(self, name: str) -> Rows:
        rows = self.log.rows.get(name)
        if rows is None:
            rows = self.log.rows[name] = Rows({}, Counter(), Counter())
        return rows

    def add(self, row: Any) -> None:
        """Count a row; measure its answers where it is of the filter that scores."""
        plan = self.reading.plan
        self._hash(row)
        document = row.doc_id
        if type(document) is str:
            document = document_id(document)
        repeat = (plan.repeat or 0) if row.repeat is None else row.repeat
        rows = self._rows_of(row.filter)
        seen = rows.seen.get(repeat)
        if seen is None:
            seen = rows.seen[repeat] = set()
        planned = plan.holds(document, row.doc_hash) and plan.repeat in (None, repeat)
        first = document not in seen
        if planned and first:
            seen.add(document)
        else:
            (rows.duplicated if planned else rows.unplanned)[document] += 1
        if row.filter != self.reading.filter:
            return
        value = score_of(row.value, weighted=self.reading.divided)
        requests = requests_of(row.arguments)
        problem, choices = self._answers(row)
        if requests and isinstance(row.resps, list) and len(row.resps) != len(requests):
            problem = f"{len(row.resps)} answers to {len(requests)} requests"
        if value is None:
            problem = f"{self.reading.metric} is not a number"
        if problem:
            self.log.unusable[document] = problem
        if planned and first and value is not None:
            self._keep(row, document, repeat, value, choices, texts_of(requests))

    def _hash(self, row: Any) -> None:
        """Take a row into the hash of them all, as long as rows have what it is made of."""
        if self.hashes is None:
            return
        if row.doc_hash is None or row.prompt_hash is None or row.target_hash is None:
            self.hashes = None
        else:
            hashes = row.doc_hash + row.prompt_hash + row.target_hash
            self.hashes.update(hashes.encode(errors="surrogatepass"))

    def _answers(self, row: Any) -> tuple[str, tuple[float, ...]]:
        """Count the answers of a row; return why it is unusable, and its log-likelihoods."""
        counts = self.log.answers
        resps = row.resps
        if self.reading.likelihood and (values := _usual_log_likelihoods(resps)):
            counts.asked += 1
            return "", values
        answers: Any = resps[0] if type(resps) is list and len(resps) == 1 else None
        if type(answers) is not list or any(type(each) is list for each in answers):
            answers = list(leaves(resps))
        if self.reading.likelihood:
            counts.asked += 1
            missing = not answers or None in answers or NULL_ANSWER in answers
            counts.null += missing
            if missing:
                return ("null answer" if answers else "no answer"), ()
            values = log_likelihoods(resps)
            if values and all(map(_is_loggable, answers)):
                return "", values
            counts.non_finite += 1
            return "log-probability is not finite", ()
        counts.asked += len(answers) or 1
        self._reasons(row)
        texts = [each for each in answers if type(each) is str and each != NULL_ANSWER]
        unusable = len(answers) - sum(map(_is_answer, answers))
        empty = 0
        for text in texts:
            counts.characters += len(text)
            empty += not text or text.isspace()
        counts.empty += empty
        if len(answers) > 1:
            counts.repeats = max(counts.repeats, len(answers))
            counts.repeated += 1
            counts.identical += all(each == answers[0] for each in answers)
        if unusable or not answers:
            counts.null += unusable or 1
            return ("null answer" if answers else "no answer"), ()
        if empty == len(answers):
            self.log.empty_digests.add(digest(resps))
        return "", ()

    def _reasons(self, row: Any) -> None:
        """Count answers by why they ended, as the server said it."""
        reasons = row.finish_reasons if row.finish_reason is None else row.finish_reason
        if reasons is None:
            return
        if type(reasons) is not list:
            reasons = [reasons]
        if reasons.count(None) == len(reasons):
            return
        self.reasons_given = True
        counts = self.log.answers
        counts.truncated = (counts.truncated or 0) + reasons.count("length")
        counts.refused = (counts.refused or 0) + reasons.count("content_filter")

    def _keep(
        self,
        row: Any,
        document: DocumentId,
        repeat: int,
        value: tuple[float, float],
        choices: tuple[float, ...],
        asked: list[str],
    ) -> None:
        """Keep what comparing needs of a question: its key, score and digests."""
        column = self.log.columns.get(repeat)
        if column is None:
            column = self.log.columns[repeat] = Column()
        texts = digest(asked)[:HASH_CHARACTERS] if asked else ""
        prompt = (row.prompt_hash or texts)[:HASH_CHARACTERS]
        content = row.doc_hash or ("" if row.doc is None else digest(row.doc))
        content = content[:HASH_CHARACTERS]
        column.documents.append(document)
        column.keys.append(f"{document}:{content}:{prompt}")
        column.prompts.append(prompt or document)
        column.texts.append(texts)
        column.scores.append(value[0])
        if self.likely:
            column.weights.append(value[1])
        column.digests.append(digest(row.resps))
        target = row.target_hash
        if target is None:
            target = "" if row.target is None else digest(row.target)
        column.targets.append(target[:HASH_CHARACTERS])
        column.lengths.append(_mean_length(row.completion_tokens))
        if self.reading.likelihood:
            column.choices.append(
                choices[: len(choices) // 2] if self.reading.contrasted else choices
            )
        if self.reading.cluster_field:
            column.clusters.append(_cluster(row.doc, self.reading.cluster_field))

    def finish(self) -> SampleLog:
        """Settle what was planned, now that the log was read."""
        log, plan = self.log, self.reading.plan
        log.task_hash = self.hashes.hexdigest() if self.hashes else None
        if not self.reasons_given and not self.reading.likelihood:
            log.answers.truncated = log.answers.refused = None
        elif self.reading.likelihood:
            log.answers.truncated = log.answers.refused = 0
        seen = [ids for rows in log.rows.values() for ids in rows.seen.values()]
        documents: Collection[DocumentId]
        if plan.documents is None:
            documents = set().union(*seen)
            count = len(documents) if plan.count is None else plan.count
            log.unnamed = max(0, count - len(documents))
        else:
            documents = plan.documents
        repeats = {repeat for rows in log.rows.values() for repeat in rows.seen}
        planned = repeats if plan.repeat is None else {plan.repeat}
        log.plans = dict.fromkeys(sorted(planned) or [plan.repeat or 0], documents)
        return log


def document_id(name: str) -> DocumentId:
    """Return a document's number, or its name where it has none."""
    short = len(name) < 19 and name.isascii() and name.isdigit()
    return int(name) if short and str(int(name)) == name else name


def score_of(value: Any, *, weighted: bool) -> tuple[float, float] | None:
    """Return a document's score and weight, or nothing where the metric is not a number.

    Where several numbers stand, the second is the weight or, without weights, their mean counts.
    """
    if type(value) is float or type(value) is int or type(value) is bool:
        single = finite(value)
        return None if single is None or weighted else (single, 1.0)
    if not isinstance(value, list):
        return None
    numbers = [each for each in map(finite, value) if each is not None]
    if not numbers or len(numbers) < len(value):
        return None
    if not weighted:
        return math.fsum(numbers) / len(numbers), 1.0
    return (numbers[0], numbers[1]) if len(numbers) == 2 and numbers[1] > 0 else None


def finite(value: Any) -> float | None:
    """Return a finite number; rates of single documents may be true or false."""
    if not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def leaves(value: Any) -> Iterator[Any]:
    """Yield what nested lists hold, in any order, however deep they are."""
    waiting = [value]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, list):
            waiting.extend(entry)
        else:
            yield entry


def _holds_pairs(row: Any) -> bool:
    """Tell whether the answers of a row are log-likelihoods, each with whether it is the best."""
    try:
        ((_, best), *_), *_ = row.resps
    except (TypeError, ValueError):
        return False
    return best in ("False", "True") or isinstance(best, bool)


def requests_of(arguments: Any) -> list[list[Any]]:
    """Return the arguments of each request of a row, in either of the forms that lm-eval wrote."""
    requests = list(arguments.values()) if isinstance(arguments, dict) else arguments
    if not isinstance(requests, list):
        return []
    found = [list(each.values()) if isinstance(each, dict) else each for each in requests]
    return found if all(isinstance(each, list) for each in found) else []


def texts_of(requests: Iterable[list[Any]]) -> list[str]:
    """Return what was put to the model: prompts and, after them, choices."""
    return [each for each in leaves([*requests]) if isinstance(each, str)]


def _usual_log_likelihoods(resps: Any) -> tuple[float, ...]:
    """Return the log-likelihoods where each choice has one, with whether it is the best one."""
    try:
        values = tuple([float(value) for ((value, _),) in resps])
    except (TypeError, ValueError, OverflowError):
        return ()
    return values if all(map(math.isfinite, values)) else ()


def log_likelihoods(resps: Any) -> tuple[float, ...]:
    """Return the log-likelihood of each choice; nothing where some is not a finite number."""
    values = []
    for each in resps if isinstance(resps, list) else ():
        while isinstance(each, list) and each:
            each = each[0]
        try:
            values.append(float(each))
        except (TypeError, ValueError, OverflowError):
            return ()
    return tuple(values) if all(map(math.isfinite, values)) else ()


def _is_answer(answer: Any) -> bool:
    """Tell whether a model may have generated this; numbers stand in logs made by hand."""
    return answer != NULL_ANSWER if type(answer) is str else finite(answer) is not None


def _is_loggable(answer: Any) -> bool:
    """Tell whether a logged log-likelihood is finite, or says which choice is the best one."""
    if answer in ("False", "True") or isinstance(answer, bool):
        return True
    try:
        return math.isfinite(float(answer))
    except (TypeError, ValueError, OverflowError):
        return False


def digest(value: Any) -> str:
    """Return a short digest of all that a model returned; equal ones mean identical answers."""
    try:
        text = msgspec.json.encode(value)
    except (UnicodeEncodeError, OverflowError):
        text = json.dumps(value).encode()
    return blake2b(text, digest_size=_DIGEST_BYTES).hexdigest()


def _mean_length(tokens: Any) -> float | None:
    if tokens is None:
        return None
    counts = tokens if isinstance(tokens, list) else [tokens]
    numbers = [each for each in map(finite, counts) if each is not None and each >= 0]
    return math.fsum(numbers) / len(numbers) if numbers and len(numbers) == len(counts) else None


def _cluster(document: Any, name: str) -> str:
    if isinstance(document, Mapping) and document.get(name) is not None:
        return str(document[name])
    raise _NoClusterError(f"the document has no field {name!r}")
