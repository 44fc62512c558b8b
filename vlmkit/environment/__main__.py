"""`python -m vlmkit.environment`: what this machine can run, where even typer may be missing."""

import argparse
import sys

from vlmkit.environment import report


def main(argv=None):
    """What `vlmkit doctor` does, without typer. Returns the exit status: 1 if the course cannot run
    here."""
    parser = argparse.ArgumentParser(
        prog="python -m vlmkit.environment", description="What this machine can run."
    )
    parser.add_argument("--quick", action="store_true", help="leave out which models fit")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    words = parser.parse_args(argv)
    return report(quick=words.quick, as_json=words.json)


if __name__ == "__main__":
    sys.exit(main())
