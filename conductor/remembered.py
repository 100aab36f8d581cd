"""What a release recalls of its source: the evaluation and the canary's answers of an earlier one.

Both are found by everything that they depend on, and by nothing else. What is put into the cache
has passed its gate, and what is taken out of it is judged again like an evaluation of today. Files
that were edited while a server answered from what it had loaded keep its answers out of the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from conductor.baseline_cache import (
    KEY_FILE,
    BaselineCache,
    baseline_key,
    canary_key,
    has_same_files,
)
from conductor.engines.opening import longest_request, planned_settings
from conductor.evaluation import Inquiry
from conductor.files import read_json, write_json
from conductor.inputs import Scalar
from conductor.journal import timestamp
from conductor.release_state import Release

ANSWERS = "source-answers.json"
"""What the source answered to the canary's prompts, in the directory of the deploy stage."""


def recall(release: Release, inquiry: Inquiry) -> None:
    """Lay down the answers to ``inquiry`` if an earlier release has them."""
    if release.config.dry_run or inquiry.is_answered():
        return
    key = _evaluation_key(release, inquiry)
    directory = inquiry.directory
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / KEY_FILE, key)
    if from_run := _take(release, key, directory):
        inquiry.adopt(from_run, release.plan.model.path)


def keep(release: Release, inquiries: Iterable[Inquiry]) -> None:
    """Put what the source answered, and its gate has passed, where later releases find it."""
    if release.config.dry_run:
        return
    for inquiry in inquiries:
        if "recalled_from" not in read_json(inquiry.directory / "evaluation.json"):
            key = _evaluation_key(release, inquiry)
            looked_for = read_json(inquiry.directory / KEY_FILE)
            if looked_for == key and has_same_files(key, release.inputs):
                cache = _cache(release)
                cache.keep(key, inquiry.directory, **_signature(release))
                release.remarks += cache.notes


def recall_canary(release: Release, directory: Path) -> list[dict[str, Any]] | None:
    """Return what the source answered to the canary's prompts in an earlier release, if it did."""
    if release.config.dry_run:
        return None
    if _take(release, _canary_key(release), directory) is None:
        return None
    answers: list[dict[str, Any]] = read_json(directory / ANSWERS)
    return answers


def keep_canary(release: Release, evidence: Mapping[str, Any], directory: Path) -> None:
    """Put what the source answered to the canary's prompts where later releases find it."""
    if release.config.dry_run or (directory / ANSWERS).exists():
        return
    write_json(directory / ANSWERS, [each["source"] for each in evidence["prompts"]])
    key = _canary_key(release)
    if has_same_files(key, release.inputs):
        cache = _cache(release)
        cache.keep(key, directory, **_signature(release), names=(ANSWERS,))
        release.remarks += cache.notes


def _take(release: Release, key: Mapping[str, Scalar], directory: Path) -> str | None:
    """Lay down the entry for ``key`` and return the run that it comes from; None on a miss."""
    if release.config.fresh_baseline:
        return None
    cache = _cache(release)
    entry = cache.find(key)
    taken = entry if entry and cache.restore(entry, directory) else None
    release.remarks += cache.notes
    if taken is None:
        return None
    release.journal.record("recalled", directory=directory, from_run=taken.run_id)
    return taken.run_id


def _evaluation_key(release: Release, inquiry: Inquiry) -> dict[str, Scalar]:
    return baseline_key(
        release.config,
        release.plan,
        release.world,
        _engine_settings(release),
        inquiry.batch,
        release.digests,
    )


def _canary_key(release: Release) -> dict[str, Scalar]:
    return canary_key(release.plan, release.world, _engine_settings(release), release.digests)


def _engine_settings(release: Release) -> Mapping[str, Any]:
    """Return the settings of the engine as they are planned; nothing has to run to know them."""
    row, longest = release.plan.row, longest_request(release.plan.suite, release.plan.model)
    nodes = release.world.serving_nodes
    return planned_settings(release.config, row.engine, row.device, longest, nodes)


def _signature(release: Release) -> dict[str, str]:
    journal = release.journal
    return {"run_id": journal.run_id, "created": timestamp(journal.clock())}


def _cache(release: Release) -> BaselineCache:
    return BaselineCache(root=release.config.workspace / "cache" / "baseline")
