"""Evaluate one model on a suite with lm-evaluation-harness, against an endpoint or in process.

Uses the Python interface rather than the command line: the task index is built from the suite's
own directory when it holds every task (0.06 s instead of 7 to 8 s), and progress can be reported.
The files are lm-eval's own: ``results_*.json`` and one ``samples_*.jsonl`` per task, whose rows
also hold why each answer ended and its length in tokens. Beside them lie ``planned.json`` (what was
to be asked, written before anything is), ``completion_tokens.json`` and ``harness_facts.json``.

Answers are kept as they come in (``request_cache``), and one that is there is not asked for again:
the results are those of an evaluation that ran through.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from determinism import exceptions, use_deterministic_algorithms
from protocol import Progress, WorkerFailure, run, write_json
from pulse import Pulse
from request_cache import Answer, RequestCache

REPORT_EVERY_S = 1.0
ATTEMPTS = 3  # of each request, by lm-eval
# What no answer depends on: another value of these lets the answers kept so far stand.
WITHOUT_INFLUENCE = ("base_url", "output_dir", "request_cache", "concurrency", "timeout_s")
# What stands for an answer of null, which lm-eval would otherwise score as an empty text.
NULL_ANSWER = os.environ["LMEVAL_MODEL_NONE_ANSWER_PLACEHOLDER"]
BOOTSTRAP_DRAWS = 1000  # for metrics that are no means; standard errors of means are exact
DEFAULT_ANSWER_TOKENS = 256  # lm-eval's own limit where a task names none


def report_progress_bars(progress: Progress) -> None:
    """Make the progress bars of lm-eval's models report to the conductor."""
    import lm_eval.models.api_models as api_models
    import tqdm
    import tqdm.asyncio

    reported = 0.0

    def reporting(bar: Any) -> Any:
        class ReportingBar(bar):  # type: ignore[misc]
            def update(self, n: float | None = 1) -> bool | None:
                nonlocal reported
                shown: bool | None = super().update(n)
                now = time.monotonic()
                if self.total and now - reported >= REPORT_EVERY_S:
                    reported = now
                    progress(int(self.n), int(self.total), self.desc or "requests")
                return shown

        return ReportingBar

    api_models.tqdm = reporting(tqdm.tqdm)
    api_models.tqdm_asyncio = reporting(tqdm.asyncio.tqdm_asyncio)
    try:
        import lm_eval.models.huggingface as huggingface
    except ImportError:  # the environment for endpoints has no torch
        return
    huggingface.tqdm = reporting(tqdm.tqdm)


def keep_finish_reasons() -> None:
    """Let the answers of lm-eval's models carry why they ended; lm-eval keeps the text alone."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    def parse_generations(outputs: Any, **kwargs: Any) -> list[Answer | None]:
        replies = outputs if isinstance(outputs, list) else [outputs]
        choices = [
            choice
            for reply in replies
            for choice in sorted(reply["choices"], key=lambda choice: choice["index"])
        ]
        return [
            None
            if choice["text"] is None
            else Answer.of(choice["text"], choice.get("finish_reason"))
            for choice in choices
        ]

    LocalCompletionsAPI.parse_generations = staticmethod(parse_generations)
    try:
        import lm_eval.models.huggingface as huggingface
    except ImportError:  # the environment for endpoints has no torch
        return
    decode, shorten = huggingface.HFLM.tok_decode, huggingface.postprocess_generated_text

    def tok_decode(self: Any, tokens: Any, *args: Any, **kwargs: Any) -> Answer:
        ended = isinstance(tokens, list) and self.eot_token_id in tokens
        return Answer.of(decode(self, tokens, *args, **kwargs), "stop" if ended else None)

    def postprocess(generation: Answer, stop: list[str], **kwargs: Any) -> Answer:
        # In process nothing says why an answer ended; one without any end was cut off.
        ended = generation.finish_reason or any(term in generation for term in stop if term)
        text = shorten(generation=generation, stop=stop, **kwargs)
        return Answer.of(text, "stop" if ended else "length")

    huggingface.HFLM.tok_decode = tok_decode
    huggingface.postprocess_generated_text = postprocess


def model_arguments(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return lm-eval's model type and arguments for the requested backend."""
    match request["backend"]:
        case "endpoint":
            return "local-completions", {
                "model": request["served_name"],
                "base_url": f"{request['base_url']}/completions",
                "tokenizer": request["tokenizer"],
                "tokenizer_backend": "huggingface",
                "tokenized_requests": True,
                "num_concurrent": request["concurrency"],
                "max_retries": ATTEMPTS,
                "timeout": request["timeout_s"],
                "max_length": request["max_length"],
                "seed": request["seed"] + request["repeat"],
            }
        case "in_process":
            return "hf", {
                "pretrained": request["model_path"],
                "tokenizer": request["tokenizer"],
                "dtype": request["dtype"],
                "max_length": request["max_length"],
                "trust_remote_code": False,
            }
        case other:
            raise WorkerFailure("USER_CONFIG_ERROR", f"unknown evaluation backend {other!r}")


def keep_answers(request: dict[str, Any]) -> RequestCache | None:
    """Have every answer kept in the request's cache, and taken from it where it is there.

    In process, likelihoods depend in their last bits on what else is in a batch, and sampled
    answers on all that were drawn before them: batches are kept whole, sampled answers not at all.
    """
    if request["request_cache"] is None:
        return None
    from lm_eval import __version__
    from lm_eval.api.model import hash_args

    in_process = request["backend"] == "in_process"

    def key(kind: str, args: Iterable[Any]) -> str | None:
        options = [each for each in args if isinstance(each, dict)]
        if in_process and any(is_sampled(each) for each in options):
            return None
        name: str = hash_args(kind, args)
        return name

    made_for = {name: value for name, value in request.items() if name not in WITHOUT_INFLUENCE}
    cache = RequestCache(
        Path(request["request_cache"]),
        {**made_for, "lm_eval": __version__},
        key,
        by_batch=in_process,
    )
    if in_process:
        from lm_eval.models.huggingface import HFLM

        for step in ("_model_call", "_model_generate"):
            flush_before(HFLM, step, cache)
        cache.remember(HFLM)
    else:
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        cache.remember(LocalCompletionsAPI)
    return cache


def is_sampled(options: Mapping[str, Any]) -> bool:
    """Tell whether answers with these options are drawn by lot, as lm-eval reads them."""
    sampled = options.get("do_sample")
    return float(options.get("temperature") or 0) > 0 if sampled is None else bool(sampled)


def flush_before(model_class: Any, step: str, cache: RequestCache) -> None:
    """Write down the answers of one batch before the next one is begun."""
    begin = getattr(model_class, step)

    def flush_and_begin(model: Any, *args: Any, **kwargs: Any) -> Any:
        cache.flush()
        return begin(model, *args, **kwargs)

    setattr(model_class, step, flush_and_begin)


@contextmanager
def refusals_explained(request: Mapping[str, Any]) -> Iterator[None]:
    """Say how an endpoint turned away the last attempt at a request: its status, or no answer."""
    import aiohttp
    import requests

    # lm-eval asks with either library, depending on the concurrency.
    try:
        yield
    except (TimeoutError, requests.Timeout) as error:
        raise WorkerFailure(
            "INFRA_TRANSIENT",
            f"the endpoint left a request without an answer for {request['timeout_s']} s, "
            f"{ATTEMPTS} times in a row; read the server's log, and raise "
            "evaluation.request_timeout_s if answers take that long",
        ) from error
    except (aiohttp.ClientConnectionError, requests.ConnectionError) as error:
        raise WorkerFailure(
            "INFRA_TRANSIENT",
            f"the endpoint took no request or broke off its answer, {ATTEMPTS} times in a row "
            f"({error}); read the server's log",
        ) from error
    except (aiohttp.ClientResponseError, requests.HTTPError) as error:
        status = getattr(error, "status", None) or getattr(error.response, "status_code", 0)
        if status != 429 and status < 500:
            raise
        raise WorkerFailure(
            "INFRA_TRANSIENT",
            f"the endpoint answered a request with HTTP {status}, {ATTEMPTS} times in a row; read "
            "the server's log, and lower evaluation.concurrency if it has too much to do",
        ) from error


def load_tasks(manager: Any, shots: dict[str, int | None]) -> dict[str, Any]:
    """Load the tasks; a number of shots given by the suite overrides the task's own."""
    tasks = manager.load(list(shots))["tasks"]
    if groups := sorted(shots.keys() - tasks.keys()):
        raise WorkerFailure(
            "USER_CONFIG_ERROR",
            f"{', '.join(groups)}: lm-eval knows this as a group of tasks; list the tasks "
            f"themselves in the suite ({', '.join(sorted(tasks.keys() - shots.keys())[:5])}, ...)",
        )
    for name, task in tasks.items():
        if shots[name] is not None:
            task.set_config(key="num_fewshot", value=shots[name])
    return dict(tasks)


def choose_questions(
    name: str, size: int, wanted: Mapping[str, int] | None, request: dict[str, Any]
) -> list[int]:
    """Return the documents of one task to ask, in their order: drawn by lot, or the first ones.

    The lot depends on the seed and the task alone, so that both sides and all rounds share it.
    """
    if wanted is None:
        return list(range(size))[: request["limit"]]
    lot = random.Random(f"{request['seed']}:{name}")  # noqa: S311 - anybody can draw it again
    order = lot.sample(range(size), size)
    return order[wanted["from"] : wanted["to"]]


def plan_questions(tasks: Mapping[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Return what is to be asked: {task: {version, size, documents in order, repeat}}."""
    from lm_eval.utils import handle_non_serializable, hash_string

    planned = {}
    for name, task in tasks.items():
        documents = task.eval_docs
        stated = request["sizes"][name]
        if stated not in (None, len(documents)):
            raise WorkerFailure(
                "SAMPLE_ACCOUNTING_FAILED",
                f"the suite says that {name} has {stated} documents, and {len(documents)} were "
                "found; correct its `samples`, or find out what became of its data",
            )
        chosen = choose_questions(
            name, len(documents), (request["questions"] or {}).get(name), request
        )
        planned[name] = {
            "version": task.VERSION,
            "size": len(documents),
            "documents": {
                # As lm-eval hashes the documents that it logs.
                str(number): hash_string(
                    json.dumps(
                        documents[number],
                        indent=2,
                        default=handle_non_serializable,
                        ensure_ascii=False,
                    )
                )
                for number in chosen
            },
            "repeat": request["repeat"],
        }
    return planned


def complete_rows(
    samples: dict[str, list[dict[str, Any]]],
    tasks: Mapping[str, Any],
    planned: Mapping[str, Any],
    tokenizer: Any,
) -> dict[str, Any]:
    """Put rows into the order asked, with what lm-eval leaves out; return completion lengths.

    Rows get ``repeat``; those of generated answers also ``finish_reasons`` and
    ``completion_tokens``, one per answer, in tokens of the source tokenizer.
    """
    lengths = {}
    for name, rows in samples.items():
        order = {int(number): at for at, number in enumerate(planned[name]["documents"])}
        rows.sort(key=lambda row: order[row["doc_id"]])
        counts: dict[int, list[int]] = {}
        for row in rows:
            row["repeat"] = planned[name]["repeat"]
            if tasks[name].OUTPUT_TYPE == "generate_until":
                answers = list(generated(row["resps"]))
                if row["doc_id"] not in counts:
                    counts[row["doc_id"]] = [
                        0 if answer == NULL_ANSWER else len(ids)
                        for answer, ids in zip(answers, encode(tokenizer, answers), strict=True)
                    ]
                row["completion_tokens"] = counts[row["doc_id"]]
                row["finish_reasons"] = [
                    getattr(answer, "finish_reason", None) for answer in answers
                ]
        means = [sum(each) / len(each) for each in counts.values() if each]
        if means:
            lengths[name] = {"mean": sum(means) / len(means), "count": len(means)}
    return lengths


def generated(resps: Any) -> Iterator[str]:
    """Yield every answer of a row, however deep lm-eval nests them."""
    for each in resps:
        if isinstance(each, str):
            yield each
        else:
            yield from generated(each)


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the tokens of each text."""
    ids: list[list[int]] = tokenizer([*texts], add_special_tokens=False)["input_ids"]
    return ids


def count_overflows(
    tasks: Mapping[str, Any], tokenizer: Any, max_length: int | None
) -> dict[str, int]:
    """Return how many documents of each task had a prompt cut off to fit ``max_length`` tokens."""
    if max_length is None:
        return {}
    overflows = {}
    for name, task in tasks.items():
        cut = set()
        for instance in task.instances:
            match task.OUTPUT_TYPE, instance.args:
                case "generate_until", (str(prompt), dict(options), *_):
                    room = max_length - options.get("max_gen_toks", DEFAULT_ANSWER_TOKENS)
                case "loglikelihood" | "multiple_choice", (str(context), str(continuation)):
                    prompt, room = context + continuation, max_length
                case _:
                    continue  # a rolling likelihood is taken in windows, and images have no length
            # A text has at most as many tokens as bytes.
            if len(prompt.encode()) > room and len(encode(tokenizer, [prompt])[0]) > room:
                cut.add(instance.doc_id)
        overflows[name] = len(cut)
    return overflows


def evaluate(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Run the suite and save results, samples and facts about them under ``output_dir``."""
    started = time.monotonic()
    progress = Pulse(progress)
    progress(0, 0, "loading lm-eval")
    from lm_eval import __version__, simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    report_progress_bars(progress)
    keep_finish_reasons()
    cache = keep_answers(request)
    include_path = request["include_path"]
    if include_path:
        os.chdir(include_path)  # task files name their data relative to their own directory
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if missing := sorted(set(request["tasks"]) - set(manager.all_tasks)):
        progress(0, 0, "indexing lm-eval's own tasks")
        manager = TaskManager(include_path=include_path)
        missing = sorted(set(missing) - set(manager.all_tasks))
    if missing:
        raise WorkerFailure(
            "USER_CONFIG_ERROR",
            f"lm-eval {__version__} has no task {', '.join(missing)}; correct the suite's task "
            "names or point its include_path at the task files",
        )
    progress(0, 0, "loading the tasks")
    tasks = load_tasks(manager, request["tasks"])
    planned = plan_questions(tasks, request)
    output = Path(request["output_dir"])
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "planned.json", planned)
    tracker = EvaluationTracker(output_path=request["output_dir"])
    if request["backend"] == "in_process":
        use_deterministic_algorithms()
    model, arguments = model_arguments(request)
    arguments = {name: value for name, value in arguments.items() if value is not None}
    progress(0, 0, "preparing the questions")
    with refusals_explained(request):
        results = simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=list(tasks.values()),
            batch_size=request["batch_size"],
            device=request["device"],
            samples=parts_to_ask(planned),
            apply_chat_template=request["apply_chat_template"],
            gen_kwargs=request["generation"],
            task_manager=manager,
            evaluation_tracker=tracker,
            log_samples=True,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            random_seed=request["seed"],
            numpy_random_seed=request["seed"],
            torch_random_seed=request["seed"] + request["repeat"],
            fewshot_random_seed=request["seed"],
        )
    progress(0, 0, "writing the results")
    samples = results.pop("samples")
    tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"])
    lengths = complete_rows(samples, tasks, planned, tokenizer)
    save(tracker, results, samples)
    write_json(output / "completion_tokens.json", lengths)
    overflows = count_overflows(tasks, tokenizer, request["max_length"])
    write_json(output / "harness_facts.json", {"context_overflow": overflows})
    return {
        "results_dir": request["output_dir"],
        "sizes": {name: plan["size"] for name, plan in planned.items()},
        "answers_kept": cache.taken if cache else 0,
        "lm_eval_version": __version__,
        "seconds": time.monotonic() - started,
        **exceptions(),
    }


def parts_to_ask(planned: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the documents to ask of each task that is not asked whole.

    In ascending order: lm-eval walks a task in its own order and numbers what it meets by this
    list.
    """
    return {
        name: sorted(map(int, plan["documents"]))
        for name, plan in planned.items()
        if len(plan["documents"]) < plan["size"]
    }


def save(tracker: Any, results: dict[str, Any], samples: dict[str, Any]) -> None:
    """Write lm-eval's files, and make sure that they exist: lm-eval only logs a failed write."""
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in results["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    directory = Path(tracker.output_path)
    written = len(list(directory.rglob("samples_*.jsonl")))
    if not list(directory.rglob("results_*.json")) or written < len(results["configs"]):
        raise WorkerFailure(
            "INFRA_TRANSIENT",
            f"lm-eval could not write its results under {directory}; check the disk's free space "
            "and the directory's permissions",
        )
    for path in directory.rglob("results_*.json"):
        json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(evaluate)
