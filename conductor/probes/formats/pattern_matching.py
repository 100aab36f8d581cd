"""Match regular expressions against names: a task of ``guarded``.

Reads ``[[pattern, ...], [name, ...]]`` and writes, for each pattern, the places of the names it
matches from their start; ``null`` for what is no regular expression.
"""

import json
import re
import sys


def main() -> None:
    """Answer one question."""
    patterns, names = json.load(sys.stdin)
    for pattern in patterns:
        try:
            matches = re.compile(pattern).match
        except (re.error, OverflowError, RecursionError):
            found = None
        else:
            found = [place for place, name in enumerate(names) if matches(name)]
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
