"""``gate_ptq``: from a checkpoint, or a summary of one, to the verdict on it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gates
from conductor.gate_commands.command import make_parser, run_gate, sourced
from conductor.gate_commands.documents import InputError, probed, read_document

if TYPE_CHECKING:
    from conductor.probes.servability import Target


def ptq_main(argv: Sequence[str] | None = None) -> int:
    """Ask the gate on a quantized checkpoint."""
    parser = make_parser(
        "gate_ptq",
        "Prove what is inside a quantized checkpoint, from its files alone: whole files, nothing\n"
        "of the source lost, exactly the layers quantized that the recipe means, the size that\n"
        "follows, sound scales and weights, the source's metadata, and what engines make of it.",
        "gate_ptq --checkpoint out/model-fp8 --source models/model --recipe fp8",
    )
    parser.add_argument("--summary", type=Path, help="checkpoint summary (JSON)")
    parser.add_argument("--checkpoint", type=Path, help="directory of the quantized checkpoint")
    parser.add_argument("--source", type=Path, help="directory of the source checkpoint")
    parser.add_argument(
        "--recipe",
        help=f"one of {', '.join(gates.RECIPES)}; overrides the one in a summary",
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="read every byte: all blocks of quantized tensors, all bytes of those left alone; "
        "without it both are sampled (scales are always read whole)",
    )
    _add_target(parser)
    return run_gate("ptq", parser, _evaluate_checkpoint, argv)


def _add_target(parser: argparse.ArgumentParser) -> None:
    target = parser.add_argument_group(
        "servability",
        "Would this engine load it? Without --engine all engines that the tables know are asked,\n"
        "and their answers are notes. docs/reference/servability.md has the tables.",
    )
    target.add_argument("--engine", help="vllm or transformers; what it would not load, fails")
    target.add_argument("--engine-version", help="default: the newest version in the tables")
    target.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda")
    target.add_argument(
        "--compute-capability", metavar="X.Y", help="of the CUDA device, such as 9.0 or 10.0"
    )
    target.add_argument(
        "--tensor-parallel", type=int, metavar="RANKS", help="ranks that share each matrix"
    )


def _evaluate_checkpoint(args: argparse.Namespace) -> Mapping[str, Any]:
    if args.summary and (args.checkpoint or args.source or args.deep):
        raise InputError("arguments", "give either --summary or --checkpoint and --source")
    if args.summary:
        summary = read_document(args.summary, "checkpoint_summary", {"recipe": args.recipe})
        return sourced(gates.evaluate_checkpoint(summary), args.summary)
    if not (args.checkpoint and args.source and args.recipe):
        raise InputError("arguments", "give --summary, or --checkpoint with --source and --recipe")
    recipe = gates.RECIPES.get(args.recipe.lower())
    if recipe is None:
        raise InputError(
            "--recipe", f"unknown recipe {args.recipe!r}; known: {', '.join(gates.RECIPES)}"
        )
    from conductor.probes.checkpoint import probe_checkpoint

    target = _target(args)
    with _progress("reading tensors") as progress:
        summary = probed(
            lambda: probe_checkpoint(
                args.checkpoint,
                args.source,
                recipe,
                deep=args.deep,
                target=target,
                progress=progress,
            )
        )
    return sourced(gates.evaluate_checkpoint(summary), args.checkpoint)


def _target(args: argparse.Namespace) -> Target | None:
    """Return what is to load the checkpoint, where an engine is named."""
    from conductor.probes.servability import Target, loaders

    details = ("engine_version", "device", "compute_capability", "tensor_parallel")
    if args.engine is None:
        for name in details:
            if getattr(args, name) is not None:
                raise InputError(f"--{name.replace('_', '-')}", "is about an engine; give --engine")
        return None
    versions = [version for engine, version, _ in loaders.targets() if engine == args.engine]
    if not versions:
        known = ", ".join(dict.fromkeys(engine for engine, _, _ in loaders.targets()))
        raise InputError("--engine", f"no table knows {args.engine!r}; known: {known}")
    ranks = 1 if args.tensor_parallel is None else args.tensor_parallel
    if ranks < 1:
        raise InputError("--tensor-parallel", f"must be at least 1, got {ranks}")
    return Target(
        engine=args.engine,
        version=args.engine_version or versions[-1],
        device=args.device or "cuda",
        capability=_capability(args.compute_capability),
        tensor_parallel=ranks,
    )


def _capability(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    major, dot, minor = text.partition(".")
    if not (dot and major.isascii() and major.isdigit() and minor.isascii() and minor.isdigit()):
        raise InputError("--compute-capability", f"must be as 9.0, got {text!r}")
    return int(major[:3]), int(minor[:3])


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show bytes done of bytes to do on standard error, where a person may be reading it."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
