"""Collect completion lengths from NeMo Evaluator Launcher artifacts.

One run directory holds ``[<invocation>/]<harness>.<task>[.<repeat>]/artifacts/`` with
``eval_factory_metrics.json``. Tasks keep their harness, since two harnesses may share a task name,
and nothing is dropped silently: ``diagnostics`` names all that was left out and why.
"""

from __future__ import annotations

import glob as file_patterns
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, TypeGuard

from conductor.probes.reading import ProbeError, read_object, read_text

METRICS_FILE = "eval_factory_metrics.json"

DECLARING_FILES = ("metadata.yaml", "config.yml")
"""Files beside the metrics that may name the task; the second is all that a partial copy has."""

_REMEDY = "copy the artifacts again"


def harvest(
    side: str | Path,
    glob: str = "eval_*",
    exclude: str = "",
    diagnostics: MutableMapping[str, Any] | None = None,
) -> dict[str, list[tuple[float, int]]]:
    """Return ``{task: [(mean completion tokens, successful samples), ...]}``, one pair per run.

    ``glob`` selects run directories within ``side``; those that carry ``exclude`` as whole
    ``_``-delimited tokens are skipped. ``diagnostics`` receives what was left out, and under
    ``collapsed_keys`` the task keys whose runs may belong to different tasks.
    """
    pattern = f"{glob}/**/artifacts/{METRICS_FILE}"
    # Not pathlib: its ** does not follow links, and collected runs are often linked in.
    found = sorted(file_patterns.glob(pattern, root_dir=side, recursive=True))  # noqa: PTH207
    runs: dict[str, list[tuple[float, int]]] = defaultdict(list)
    directories: dict[str, set[str]] = defaultdict(set)
    declared: set[str] = set()
    left_out: dict[str, list[str]] = {
        "excluded_run_dirs": [],
        "excluded_tasks": [],
        "unreadable_metrics": [],
        "metrics_without_tokens": [],
    }
    for relative in found:
        path = Path(side, relative)
        name, run_dir = path.parts[-3], Path(relative).parts[0]
        stated = declared_task(path.parent)
        task = stated or _without_repeat(name)
        if matches_exclude(run_dir, exclude):
            left_out["excluded_run_dirs"].append(run_dir)
            left_out["excluded_tasks"].append(task)
            continue
        try:
            stats = read_object(path, _REMEDY).get("response_stats")
        except ProbeError as error:
            left_out["unreadable_metrics"].append(str(error))
            continue
        if stated:
            declared.add(task)
        else:
            directories[task].add(name)
        stats = stats if isinstance(stats, Mapping) else {}
        tokens, count = stats.get("avg_completion_tokens"), stats.get("successful_count")
        if _is_positive(tokens) and _is_positive(count):
            runs[task].append((float(tokens), int(count)))
        else:
            left_out["metrics_without_tokens"].append(
                f"{task}: avg_completion_tokens={_short(tokens)} successful_count={_short(count)}"
            )
    if diagnostics is not None:
        diagnostics.update({kind: sorted(set(entries)) for kind, entries in left_out.items()})
        diagnostics["partially_excluded_tasks"] = sorted(
            set(left_out["excluded_tasks"]) & set(runs)
        )
        diagnostics["found_metrics_files"] = bool(found)
        if not found:
            diagnostics["no_files_matched"] = str(Path(side, pattern))
        collapsed = _collapsed(directories, declared)
        if collapsed:
            diagnostics["collapsed_keys"] = collapsed
    return dict(runs)


def matches_exclude(run_dir: str, exclude: str) -> bool:
    """Tell whether ``run_dir`` carries ``exclude`` as a run of whole ``_``-delimited tokens.

    Whole tokens, so that ``_high`` does not take ``eval_highctx`` with it.
    """
    wanted = [token for token in exclude.split("_") if token]
    tokens = run_dir.split("_")
    return bool(wanted) and any(
        tokens[start : start + len(wanted)] == wanted for start in range(len(tokens))
    )


def declared_task(artifacts: str | Path) -> str | None:
    """Return the task that the files beside the metrics name, or ``None`` if none names just one.

    A file that lists several tasks describes the whole invocation and says nothing about this
    directory; the next file may still.
    """
    for file in DECLARING_FILES:
        names = set(_task_names(Path(artifacts, file)))
        if len(names) == 1:
            return names.pop()
    return None


def _task_names(path: Path) -> Iterator[str]:
    """Yield the names in the first ``tasks`` list of a YAML file, however deep it lies."""
    import yaml

    if not path.is_file():
        return
    try:
        document = yaml.safe_load(read_text(path, _REMEDY))
    except (ProbeError, yaml.YAMLError, ValueError, RecursionError):
        return
    waiting, seen = [document], set()
    while waiting:
        node = waiting.pop(0)
        if not isinstance(node, Mapping) or id(node) in seen:
            continue
        seen.add(id(node))
        tasks = node.get("tasks")
        if isinstance(tasks, list):
            yield from (
                str(task["name"])
                for task in tasks
                if isinstance(task, Mapping) and task.get("name")
            )
            return
        waiting.extend(node.values())


def _without_repeat(directory: str) -> str:
    """Return ``<harness>.<task>`` of a directory that may end in the number of its repeat."""
    head, _, tail = directory.rpartition(".")
    return head if head and tail.isdecimal() else directory


def _collapsed(directories: Mapping[str, set[str]], declared: set[str]) -> dict[str, list[str]]:
    """Return the keys that may pool different tasks, with the directories behind them.

    Numbered directories are repeats when their key has a harness (``h.task.1``) or stands beside
    them by itself (``task``, ``task.1``). ``inv.0`` and ``inv.1`` alone may as well be two tasks
    of one invocation.
    """
    return {
        key: sorted(names)
        for key, names in directories.items()
        if len(names) > 1 and key not in declared and "." not in key and key not in names
    }


def _is_positive(value: Any) -> TypeGuard[int | float]:
    """Tell a usable mean or count; lengths below one token and counts of a part are neither."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 1 <= value < math.inf


def _short(value: Any) -> str:
    return json.dumps(value, default=str)[:40]
