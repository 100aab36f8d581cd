"""Say of a smoke run, from its report document alone, whether it reached every stage."""

from __future__ import annotations

from conductor.report.wording import Document, counted


def missing(document: Document) -> list[str]:
    """Return what a smoke run should have done and did not, one sentence each.

    Whether metrics were logged is read from ``tracking``, so that it is true as well after a
    release was sent later.
    """
    found = list(document["smoke"]["missing"])
    tracking = document["tracking"]
    if tracking["status"] != "logged":
        found.append(f"no metric was logged ({tracking['detail'] or tracking['status']})")
    return found


def sentence(document: Document) -> str | None:
    """Return what a smoke run reached in one line; None for any other release."""
    smoke = document.get("smoke")
    if smoke is None:
        return None
    if found := missing(document):
        return f"smoke: NOT reached: {'; '.join(found)}"
    samples, scored = smoke["calibration_samples"], smoke["scored_samples"]
    fewest = min(count for counts in scored.values() for count in counts.values())
    done = (
        "no calibration needed" if samples is None else counted(samples, "calibration sample"),
        counted(smoke["served_answers"], "served answer"),
        f"{counted(fewest, 'scored sample')} or more of each of {counted(len(scored), 'task')}",
        "metrics logged",
    )
    return f"smoke: every stage was reached: {', '.join(done)}"
