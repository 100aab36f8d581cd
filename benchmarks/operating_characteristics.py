"""Measure how often the comparison decides rightly, wrongly or not at all.

Suites with a known true drop are drawn with fixed seeds and judged by the functions the gates use,
under the gates' rule: ACCEPT when every task passes (`p_within` at most 5 %), REGRESSION when a
task fails after Holm's correction, undecided otherwise. The tables and the plot go to `docs/`; the
exit code is 1 when an error rate or the time limit is broken, so this is a test that can fail.

    python benchmarks/operating_characteristics.py            # minutes; writes docs/
    python benchmarks/operating_characteristics.py --quick    # seconds; writes nothing
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent.parent))

from gates.statistics import (
    at_least,
    compare_binary,
    compare_means,
    power,
    questions_needed,
    sequence_path,
)

ALPHA = 0.05
MARGIN = 0.01
SEED = 20260
PLANNED = 12_000
SIZES = (30, 100, 300, 1000, 3000, PLANNED)
DISCORDANCES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15)
DROPS = (-0.01, 0.0, 0.005, 0.01, 0.02, 0.03, 0.05)
TASKS = (1, 4, 8, 12)
MIXED = ((*SIZES, *SIZES), (1000, 3000, 3000, PLANNED))
ERRORS_ALLOWED = 3.0
"""Standard errors of the simulation above 5 % at which an error rate counts as broken: some hundred
cells are looked at, so two would be crossed by chance."""
BATCH = 100
LONGEST_S = 2.0
FEWER, USUAL_DISCORDANCE = 2, 0.1
"""How many times fewer questions than planned the median lossless run must need, and the largest
discordance at which it must."""


@dataclass(frozen=True)
class Effort:
    """Runs a cell, by kind, and the sizes of single tasks and of the tasks of a suite."""

    counts: int
    suites: int
    means: int
    sequences: int
    sizes: tuple[int, ...]
    suite_sizes: tuple[int, ...]


FULL = Effort(20_000, 10_000, 2000, 1000, SIZES, (300, 3000, PLANNED))
QUICK = Effort(1000, 500, 40, 20, SIZES[:4], (300,))

Labels = NDArray[np.int64]
Draw = Callable[[np.random.Generator], tuple[NDArray[np.float64], Labels | None]]


@dataclass
class Findings:
    """What was measured against a target, and the pages made of the rest."""

    lines: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def text(self, *paragraphs: str) -> None:
        """Add paragraphs."""
        for paragraph in paragraphs:
            self.lines += [paragraph, ""]

    def table(self, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Add a table."""
        self.lines += [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
        self.lines += [f"| {' | '.join(row)} |" for row in rows]
        self.lines.append("")

    def error_rates(self, what: str, cells: dict[str, float], draws: int) -> None:
        """Hold the error rate of every cell against 5 %."""
        error = math.sqrt(ALPHA * (1 - ALPHA) / draws)
        limit = ALPHA + ERRORS_ALLOWED * error
        worst = max(cells, key=lambda name: cells[name])
        self.text(
            f"**{what}:** largest of {len(cells)} cells {percent(cells[worst])} ({worst}); "
            f"simulation error of a cell {percent(error)}, limit 5 % + "
            f"{ERRORS_ALLOWED:g} of them = {percent(limit)}."
        )
        self.broken += [
            f"{what}: {percent(rate)} in {name}, limit {percent(limit)}"
            for name, rate in cells.items()
            if rate > limit
        ]

    def require(self, what: str, met: bool) -> None:
        """Note a broken target."""
        if not met:
            self.broken.append(what)


def percent(share: float) -> str:
    """Write a share, with two decimals where it is small."""
    return f"{100 * share:.1f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.2f} %"


@cache
def passing_losses(gained: int, questions: int) -> int:
    """Return the most losses that pass beside so many gains; -1 where none does."""
    return highest(
        lambda lost: at_least(lost, gained, questions, MARGIN), questions - gained, ALPHA
    )


@cache
def failing_gains(lost: int, questions: int, alpha: float) -> int:
    """Return the most gains that still fail beside so many losses; -1 where none does."""
    return highest(
        lambda gained: at_least(gained, lost, questions, -MARGIN), questions - lost, alpha
    )


def highest(p_value: Callable[[int], float], most: int, alpha: float) -> int:
    """Return the highest count whose p-value, which grows with it, is at most alpha."""
    low, step = -1, 1
    while low + step <= most and p_value(low + step) <= alpha:
        low, step = low + step, 2 * step
    high = min(low + step, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if p_value(middle) <= alpha else (low, middle)
    return low


def decided(
    counts: Labels, questions: int, tasks: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which draws of one task, rows of losses and gains, pass, and which fail.

    Holm's correction declares some failure exactly when the smallest p-value is at most 5 % over
    the number of tasks.
    """
    lost, gained = counts[:, 0], counts[:, 1]
    most_lost = at_each(gained, lambda each: passing_losses(each, questions))
    most_gained = at_each(lost, lambda each: failing_gains(each, questions, ALPHA / tasks))
    return lost <= most_lost, gained <= most_gained


def at_each(values: Labels, function: Callable[[int], int]) -> Labels:
    """Return the function at each value, counted once per distinct value."""
    found, places = np.unique(values, return_inverse=True)
    return np.array([function(int(each)) for each in found])[places]


def chances(discordance: float, drop: float) -> list[float]:
    """Return the chances that a question is lost, gained, or neither."""
    share = max(discordance, abs(drop))
    return [(share + drop) / 2, (share - drop) / 2, 1 - share]


def single_tasks(findings: Findings, draws: int, sizes: Sequence[int]) -> None:
    """Measure one binary task: every size, discordance and drop."""
    rng = np.random.default_rng(SEED)
    rates: dict[tuple[int, float, float], tuple[float, float]] = {}
    for questions in sizes:
        for discordance in DISCORDANCES:
            for drop in DROPS:
                counts = rng.multinomial(questions, chances(discordance, drop), draws)
                passed, failed = decided(counts, questions, 1)
                rates[questions, discordance, drop] = (float(passed.mean()), float(failed.mean()))
    findings.text(
        "## One task, right or wrong answers",
        f"{draws:,} runs a cell. The share of runs that pass / fail; the rest is undecided. "
        "Discordance is the share of questions right on one side only, and at least the drop.",
    )
    findings.table(
        ["questions", "discordance", *(f"drop {100 * drop:g}" for drop in DROPS)],
        (
            [
                f"{questions:,}",
                f"{100 * discordance:g} %",
                *(
                    "{:.1f} / {:.1f}".format(
                        *(100 * x for x in rates[questions, discordance, drop])
                    )
                    for drop in DROPS
                ),
            ]
            for questions in sizes
            for discordance in DISCORDANCES
        ),
    )
    names = {key: f"{key[0]:,} questions, {100 * key[1]:g} % discordance" for key in rates}
    findings.error_rates(
        "Wrong pass at a drop equal to the margin",
        {names[key]: rate[0] for key, rate in rates.items() if key[2] == MARGIN},
        draws,
    )
    findings.error_rates(
        "Wrong fail at a drop equal to the margin",
        {names[key]: rate[1] for key, rate in rates.items() if key[2] == MARGIN},
        draws,
    )


@dataclass(frozen=True)
class Suite:
    """Tasks by their numbers of questions, all with one discordance."""

    sizes: tuple[int, ...]
    discordance: float

    @property
    def name(self) -> str:
        """Say what the suite is made of."""
        low, high = min(self.sizes), max(self.sizes)
        of = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        return f"{len(self.sizes)} task(s) of {of}, {100 * self.discordance:g} % discordance"

    def outcome(
        self, rng: np.random.Generator, drops: Sequence[float], draws: int
    ) -> tuple[float, float, float]:
        """Return the shares of ACCEPT, REGRESSION, and of what a plain threshold accepts."""
        passed, below = np.ones(draws, dtype=bool), np.ones(draws, dtype=bool)
        failed = np.zeros(draws, dtype=bool)
        for questions, drop in zip(self.sizes, drops, strict=True):
            counts = rng.multinomial(questions, chances(self.discordance, drop), draws)
            one_passed, one_failed = decided(counts, questions, len(self.sizes))
            passed &= one_passed
            failed |= one_failed
            below &= counts[:, 0] - counts[:, 1] <= MARGIN * questions
        return (
            float((passed & ~failed).mean()),
            float(failed.mean()),
            float(below.mean()),
        )


def suites(findings: Findings, draws: int, one_size: Sequence[int]) -> None:
    """Measure whole suites: wrong answers, right answers, no answer, and the plain threshold."""
    rng = np.random.default_rng(SEED + 1)
    all_sizes = [
        *((questions,) * tasks for tasks in TASKS for questions in one_size),
        *MIXED[: len(one_size) - 1],
    ]
    wrong_accepts, wrong_regressions, at_margin, rows = {}, {}, {}, []
    for sizes in all_sizes:
        for discordance in (0.0, 0.02, 0.08, 0.15):
            suite = Suite(sizes, discordance)
            others = [0.0] * (len(sizes) - 1)
            lossless = suite.outcome(rng, [0.0, *others], draws)
            broken = suite.outcome(rng, [3 * MARGIN, *others], draws)
            wrong_accepts[suite.name] = suite.outcome(rng, [MARGIN, *others], draws)[0]
            at_margin[suite.name] = suite.outcome(rng, [MARGIN] * len(sizes), draws)[1]
            wrong_regressions[suite.name] = lossless[1]
            shares = (*lossless[:2], 1 - lossless[2], *broken)
            rows.append([suite.name, *map(percent, shares)])
    findings.text(
        "## Suites",
        f"{draws:,} runs a cell. Lossless: no task has a drop. Broken: the first task is three "
        "points worse, the others lossless. The plain rule compares observed scores alone.",
    )
    findings.table(
        [
            *("suite", "lossless: ACCEPT", "lossless: REGRESSION", "lossless: plain rule refuses"),
            *("broken: ACCEPT", "broken: REGRESSION", "broken: plain rule accepts"),
        ],
        rows,
    )
    findings.error_rates(
        "Wrong ACCEPT, one task at the margin, the others lossless", wrong_accepts, draws
    )
    findings.error_rates("Wrong REGRESSION of a lossless suite", wrong_regressions, draws)
    findings.error_rates("Wrong REGRESSION, every task at the margin", at_margin, draws)


def rare_losses(questions: int, noise: float) -> Draw:
    """One question in a hundred is lost entirely, the others hardly move."""

    def draw(rng: np.random.Generator) -> tuple[NDArray[np.float64], None]:
        lost = rng.random(questions) < MARGIN
        return np.where(lost, 1.0, np.clip(rng.normal(0, noise, questions), -1, 1)), None

    return draw


def repeats(questions: int, count: int) -> Draw:
    """Every question is asked so often; its chance of a right answer falls by a sixtieth."""

    def draw(rng: np.random.Generator) -> tuple[NDArray[np.float64], None]:
        rates = rng.beta(0.6, 0.4, questions)
        before, after = rng.binomial(count, rates), rng.binomial(count, rates * (1 - MARGIN / 0.6))
        return (before - after) / count, None

    return draw


def clusters(groups: int, size: int, discordance: float, likeness: float, *, unequal: bool) -> Draw:
    """Questions of a cluster are lost or gained together, with this intra-cluster correlation."""

    def together(rng: np.random.Generator, chance: float) -> NDArray[np.float64]:
        if likeness == 1:
            return (rng.random(groups) < chance) * 1.0
        scale = (1 - likeness) / likeness
        return rng.beta(chance * scale, (1 - chance) * scale, groups)

    def draw(rng: np.random.Generator) -> tuple[NDArray[np.float64], Labels]:
        sizes = rng.geometric(1 / size, groups) if unequal else np.full(groups, size)
        labels = np.repeat(np.arange(groups), sizes)
        lost = together(rng, discordance / 2 + MARGIN)[labels]
        gained = together(rng, discordance / 2)[labels]
        draws = rng.random((2, len(labels)))
        return (draws[0] < lost) * 1.0 - (draws[1] < gained), labels

    return draw


def means(findings: Findings, draws: int) -> None:
    """Measure scores that are not right or wrong, at a drop equal to the margin."""
    cells: dict[str, Draw] = {
        **{
            f"{n:,} questions, 1 in 100 lost, others ±{noise:g}": rare_losses(n, noise)
            for n in (100, 300, 1000, 3000)
            for noise in (0.0, 0.001, 0.05)
        },
        **{f"{n:,} questions, {k} repeats": repeats(n, k) for n in (50, 300, 3000) for k in (2, 8)},
        **{
            f"{groups} {'unequal ' * unequal}clusters of {size}, {100 * discordance:g} % "
            f"discordance, correlation {likeness:g}": clusters(
                groups, size, discordance, likeness, unequal=unequal
            )
            for groups, size, discordance, likeness, unequal in (
                (9, 300, 0.05, 0.1, False),
                (30, 100, 0.1, 1.0, False),
                (57, 250, 0.1, 0.05, False),
                (100, 20, 0.1, 0.05, False),
                (300, 10, 0.02, 0.05, False),
                (300, 10, 0.1, 0.3, False),
                (1000, 3, 0.02, 0.3, False),
                (500, 10, 0.05, 0.2, True),
                (300, 5, 0.15, 0.1, True),
            )
        },
    }
    passes, fails = {}, {}
    for place, (name, draw) in enumerate(cells.items()):
        rng = np.random.default_rng([SEED + 2, place])
        found = [
            compare_means(values, MARGIN, clusters=labels)
            for values, labels in (draw(rng) for _ in range(draws))
        ]
        passes[name] = float(np.mean([each.p_within <= ALPHA for each in found]))
        fails[name] = float(np.mean([each.p_worse <= ALPHA for each in found]))
    findings.text(
        "## Means, repeats and clusters",
        f"{draws:,} runs a cell, all with a true drop equal to the margin: both answers are wrong.",
    )
    findings.table(
        ["cell", "passes", "fails"],
        ([name, percent(passes[name]), percent(fails[name])] for name in cells),
    )
    findings.error_rates("Wrong pass of a mean", passes, draws)
    findings.error_rates("Wrong fail of a mean", fails, draws)


def differences(
    rng: np.random.Generator, questions: int, discordance: float, drop: float
) -> NDArray[np.float64]:
    """Draw the difference of every question, in the order asked."""
    values = np.array([1.0, -1.0, 0.0])
    return rng.choice(values, p=chances(discordance, drop), size=questions)


def sequences(findings: Findings, draws: int) -> None:
    """Measure the sequence: error under continuous peeking, and questions to a decision."""
    rng = np.random.default_rng(SEED + 3)
    passes, fails = {}, {}
    for discordance in DISCORDANCES:
        paths = [
            sequence_path(differences(rng, PLANNED, discordance, MARGIN), MARGIN)
            for _ in range(draws)
        ]
        name = f"{100 * max(discordance, MARGIN):g} % discordance"
        name += ", all lost" * (discordance == 0)
        passes[name] = float(np.mean([within[-1] <= ALPHA for within, _ in paths]))
        fails[name] = float(np.mean([worse[-1] <= ALPHA for _, worse in paths]))
    findings.text(
        "## Deciding with fewer questions",
        f"{draws:,} runs a cell. A task may stop at any question, up to {PLANNED:,}.",
    )
    findings.error_rates("Wrong pass at the margin, looking after every question", passes, draws)
    findings.error_rates("Wrong fail at the margin, looking after every question", fails, draws)
    rows, lossless_fails, ratios = [], {}, {}
    for discordance in (0.0, 0.005, *DISCORDANCES[1:]):
        paths = [
            sequence_path(differences(rng, PLANNED, discordance, 0.0), MARGIN) for _ in range(draws)
        ]
        name = f"{100 * discordance:g} % discordance"
        lossless_fails[name] = float(np.mean([worse[-1] <= ALPHA for _, worse in paths]))
        stops = sorted(stop(within) for within, _ in paths)
        median = stops[len(stops) // 2]
        usual, sure = (needed(discordance, wanted) for wanted in (0.8, 0.95))
        ratio = PLANNED / median
        ratios[discordance] = ratio
        rows.append(
            [
                f"{100 * discordance:g} %",
                shown(median),
                shown(stops[int(0.8 * len(stops))]),
                percent(sum(each <= PLANNED for each in stops) / len(stops)),
                percent(power(PLANNED, MARGIN, discordance=discordance)),
                f"{ratio:.1f}",
                f"{sure:,} ({sure / median:.1f})",
                f"{usual:,} ({usual / median:.1f})",
            ]
        )
    findings.text(
        f"Lossless candidates, with a look every {BATCH} questions. In brackets how many times "
        "fewer questions the median run needs."
    )
    findings.table(
        [
            *("discordance", "median questions", "80 % of runs decided by"),
            *(f"passed by {PLANNED:,}", f"fixed test of {PLANNED:,} passes"),
            f"times fewer than {PLANNED:,}",
            *("smallest fixed size with 95 % power", "smallest fixed size with 80 % power"),
        ],
        rows,
    )
    findings.error_rates("Wrong fail of a lossless candidate under peeking", lossless_fails, draws)
    short = [f"{100 * each:g} %" for each, ratio in ratios.items() if ratio < FEWER]
    findings.require(
        f"the sequence needs more than half of {PLANNED:,} questions at {', '.join(short)}",
        all(ratio >= FEWER or each > USUAL_DISCORDANCE for each, ratio in ratios.items()),
    )
    findings.text(
        f"At least {FEWER} times fewer questions than the planned {PLANNED:,}: "
        + ("everywhere." if not short else f"everywhere but at {', '.join(short)} discordance.")
        + " Against the smallest fixed size with 80 % power that is out of reach: by Wald's bound "
        "no sequential test with that power asks fewer than 38,000 questions times the "
        "discordance on average, the fixed test asks 62,000 times the discordance, so 1.6 times "
        "fewer is the most there is; and the fixed size must know the discordance beforehand, the "
        "sequence need not.",
    )


def shown(questions: float) -> str:
    """Write a number of questions that may be beyond the planned ones."""
    return f"{questions:,.0f}" if questions <= PLANNED else f"over {PLANNED:,}"


def stop(p_values: NDArray[np.float64]) -> float:
    """Return the look at which a run stops; infinite where it never does."""
    looks = p_values[BATCH - 1 :: BATCH] <= ALPHA
    return float((np.argmax(looks) + 1) * BATCH) if looks.any() else math.inf


def needed(discordance: float, wanted: float) -> int:
    """Return the smallest fixed size at which a lossless candidate passes this often."""
    found = questions_needed(MARGIN, variance=discordance, power=wanted)
    if found is None:
        raise ValueError(f"no number of questions has power {wanted} at {discordance}")
    return found


def planned_power(findings: Findings, draws: int) -> None:
    """Hold the planned power against the measured one."""
    rng = np.random.default_rng(SEED + 4)
    rows = []
    for discordance in (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15):
        questions = needed(discordance, 0.8)
        counts = rng.multinomial(questions, chances(discordance, 0.0), draws)
        passed = float(decided(counts, questions, 1)[0].mean())
        planned = power(questions, MARGIN, discordance=discordance)
        findings.require(
            f"power at {100 * discordance:g} % discordance: planned {percent(planned)}, measured "
            f"{percent(passed)}",
            abs(passed - planned) < 0.03 and passed > 0.77,
        )
        rows.append(
            [f"{100 * discordance:g} %", f"{questions:,}", percent(planned), percent(passed)]
        )
    findings.text(
        "## Questions needed",
        "What `day0 plan` says a lossless candidate needs for 80 % power, and how often such a "
        f"candidate passes then ({draws:,} runs).",
    )
    findings.table(["discordance", "questions", "planned power", "measured"], rows)


def million(findings: Findings) -> None:
    """Time one task with a million questions."""
    rng = np.random.default_rng(SEED + 5)
    values = differences(rng, 10**6, 0.05, 0.001)
    rows = []
    for name, compare in (
        (
            "compare_binary",
            lambda: compare_binary(
                lost=int((values > 0).sum()),
                gained=int((values < 0).sum()),
                questions=len(values),
                margin=MARGIN,
            ),
        ),
        ("compare_means", lambda: compare_means(values, MARGIN)),
        (
            "compare_means, clusters of 10",
            lambda: compare_means(values, MARGIN, clusters=np.arange(len(values)) // 10),
        ),
    ):
        started = time.perf_counter()
        compare()
        seconds = time.perf_counter() - started
        findings.require(f"{name} of a million questions: {seconds:.2f} s", seconds < LONGEST_S)
        rows.append([name, f"{seconds:.2f} s"])
    findings.text("## A million questions")
    findings.table(["comparison", "time on one core"], rows)


def plot(path: Path, draws: int) -> None:
    """Draw the chances of ACCEPT and REGRESSION against the true drop of a suite of 8 tasks."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "operating characteristics"
    from matplotlib import pyplot as plt

    rng = np.random.default_rng(SEED + 6)
    drops = np.linspace(-0.01, 0.05, 25)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
    tasks = 8
    for axis, questions in zip(axes, (300, 3000, PLANNED), strict=True):
        suite = Suite((questions,) * tasks, 0.08)
        curves = [suite.outcome(rng, [float(drop)] * tasks, draws) for drop in drops]
        accept, regression, plain = np.array(curves).T
        axis.plot(100 * drops, accept, color="#1a7f37", label="interval rule: ACCEPT")
        axis.plot(100 * drops, regression, color="#cf222e", label="interval rule: REGRESSION")
        axis.plot(100 * drops, plain, "--", color="#57606a", label="plain threshold: accepts")
        axis.axvline(100 * MARGIN, color="#8c959f", linewidth=0.8)
        axis.axhline(ALPHA, color="#8c959f", linewidth=0.8, linestyle=":")
        axis.set_title(f"{tasks} tasks of {questions:,} questions")
        axis.set_xlabel("true drop of every task, points")
    axes[0].set_ylabel("share of runs")
    axes[0].legend(loc="center right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    """Measure, write the page and the plot, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few runs a cell; write nothing")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs")
    arguments = parser.parse_args()
    quick, effort = arguments.quick, QUICK if arguments.quick else FULL
    findings = Findings()
    findings.text(
        "# Operating characteristics",
        "How often the comparison decides rightly, wrongly or not at all, measured on simulated "
        "suites whose true drop is known. Made by "
        f"`python benchmarks/operating_characteristics.py`, seeds {SEED} to {SEED + 6}; that "
        "command fails when an error rate is broken. The margin is one point, confidence 95 % "
        "one-sided; drops are in points of the full score.",
        "A suite is accepted when every task passes. This needs no correction for the number of "
        "tasks: a suite with one task at the margin is accepted only if that task passes, which "
        "happens in at most 5 % of runs, and the others make it rarer. A failure needs one task "
        "only, so there Holm's correction keeps the error of the whole suite at 5 %.",
    )
    if not quick:
        findings.text("![Operating characteristics](operating-characteristics.svg)")
    started = time.perf_counter()
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("one task", lambda: single_tasks(findings, effort.counts, effort.sizes)),
        ("suites", lambda: suites(findings, effort.suites, effort.suite_sizes)),
        ("means", lambda: means(findings, effort.means)),
        ("sequences", lambda: sequences(findings, effort.sequences)),
        ("questions needed", lambda: planned_power(findings, effort.counts)),
        ("a million questions", lambda: million(findings)),
    )
    for name, step in steps:
        step()
        print(f"{time.perf_counter() - started:6.1f} s  {name}", file=sys.stderr, flush=True)
    if quick:
        print("\n".join(line for line in findings.lines if line.startswith("**")))
    else:
        page = "\n".join(findings.lines).rstrip() + "\n"
        (arguments.docs / "operating-characteristics.md").write_text(page, encoding="utf-8")
        plot(arguments.docs / "operating-characteristics.svg", 4000)
    for broken in findings.broken:
        print(f"broken: {broken}", file=sys.stderr)
    print(f"{time.perf_counter() - started:6.1f} s, {len(findings.broken)} target(s) broken")
    return 1 if findings.broken else 0


if __name__ == "__main__":
    sys.exit(main())
