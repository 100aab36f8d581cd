"""``day0 config show`` and ``check``: what configurations say, and what smoke runs change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conductor.cli.ending import EXIT_FAILED, EXIT_UNUSABLE, ending_well, stop
from conductor.cli.options import JsonOption

if TYPE_CHECKING:
    from conductor.config_check import Comparison

CONFIGS = Path("configs")


def show(
    file: Annotated[Path, typer.Argument(help="A configuration file.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Print every setting of a configuration, with the file that it comes from.

    Exit codes: 0 shown, 2 no usable configuration.

    Example: `day0 config show configs/demo/prod/int8.yaml`
    """
    from conductor.config import ENTRY, load_config

    with ending_well():
        document = load_config(file, {}, required=()).document()
        del document[ENTRY]  # that is FILE itself
        if as_json:
            print(json.dumps(document, indent=2))
            return
        print("\n".join(_settings(document)))


def check(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Files, or directories of them. [configs]", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that every smoke configuration is the production one that it extends, with less to do.

    Whatever else differs is refused, unless the file gives the reason under `smoke_purpose:`.

    Exit codes: 0 they are, 1 one is not, 2 a file is no configuration, or no smoke run was found.

    Example: `day0 config check`
    """
    from conductor.config_check import check as compare_all

    with ending_well():
        searched = paths or [CONFIGS]
        checked = compare_all(searched)
        if as_json:
            comparisons = [each.document() for each in checked.comparisons]
            found = {"comparisons": comparisons, "unusable": list(checked.unusable)}
            print(json.dumps(found, indent=2))
        else:
            for comparison in checked.comparisons:
                print("\n".join(_lines(comparison)))
        if checked.unusable:
            stop(EXIT_UNUSABLE, "\n".join(f"error: {each}" for each in checked.unusable))
        if not checked.comparisons:
            where = ", ".join(map(str, searched))
            stop(EXIT_UNUSABLE, f"error: {where}: no smoke configuration was found to check")
        raise typer.Exit(EXIT_FAILED if checked.refused else 0)


def _settings(document: dict[str, dict[str, Any]]) -> Iterator[str]:
    width = max(map(len, document))
    for name, entry in document.items():
        value = json.dumps(entry["value"], ensure_ascii=False)
        yield f"{name:<{width}}  {value}  ({_near(entry['from'])})"


def _lines(comparison: Comparison) -> Iterator[str]:
    verdict = "REFUSED" if comparison.problems else "ok"
    production = _near(comparison.production) if comparison.production else "no production file"
    yield f"{verdict}: {_near(comparison.entry)} beside {production}"
    yield from (f"  differs: {each.words}" for each in comparison.differences if each.allowed)
    yield from (f"  refused: {problem}" for problem in comparison.problems)


def _near(path: Path | str) -> str:
    """Return a path as seen from the working directory, if it lies there."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else str(path)
