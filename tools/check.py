"""The one command before a commit: format, lint, types, layers and tests.

    python tools/check.py            everything but the tests on real models
    python tools/check.py --fast     no tests but the one of the architecture
    python tools/check.py --real     the tests on real models too

Every check runs, whatever became of the one before; the exit code is 1 if any failed, and the summary says which.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = "tests/test_architecture.py"


@dataclass(frozen=True)
class Check:
    """A tool and the arguments it gets, run as a module of this interpreter."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a check went."""

    name: str
    passed: bool
    seconds: float

    def __str__(self) -> str:
        return f"{'ok    ' if self.passed else 'FAILED'} {self.name:<8} {self.seconds:6.1f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run every check that a commit must pass.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--fast", action="store_true", help="no tests but the one of the architecture")
    which.add_argument("--real", action="store_true", help="the tests on real models too")
    options = parser.parse_args(arguments)
    outcomes = [run(check) for check in checks(fast=options.fast, real=options.real)]
    print("\n" + "\n".join(str(outcome) for outcome in outcomes))
    failed = [outcome.name for outcome in outcomes if not outcome.passed]
    print(f"\nFAILED: {', '.join(failed)}" if failed else "\nAll checks passed.")
    return 1 if failed else 0


def checks(*, fast: bool, real: bool) -> list[Check]:
    """The checks in the order in which they run, the quick ones first."""
    quick = [
        Check("format", ("ruff", "format", "--check", ".")),
        Check("lint", ("ruff", "check", ".")),
        Check("types", ("pyright", "--pythonpath", sys.executable)),
        Check("layers", ("pytest", "-q", ARCHITECTURE)),
    ]
    if fast:
        return quick
    chosen = () if real else ("-m", "not real")
    return [*quick, Check("tests", ("pytest", "-q", "-n", "auto", "--dist", "loadfile", "--ignore", ARCHITECTURE, *chosen))]


def run(check: Check) -> Outcome:
    """Run one check in the root of the project, its output shown as it comes."""
    print(f"\n--- {check.name}: {' '.join(check.arguments)}", flush=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, "-m", *check.arguments], cwd=ROOT, check=False).returncode
    return Outcome(check.name, code == 0, time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
