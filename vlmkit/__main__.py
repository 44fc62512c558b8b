"""`python -m vlmkit`: see `vlmkit.cli`."""

import sys

try:
    from vlmkit.cli import main
except ModuleNotFoundError as error:
    if error.name != "typer":
        raise

    def main(argv=None):
        """Say what the command line itself lacks."""
        print(
            "vlmkit: the command line needs the package typer, which this Python "
            f"({sys.executable}) does not have. What else is missing: python -m vlmkit.environment",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
