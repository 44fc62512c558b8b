"""`python -m vlmkit`: see `vlmkit.cli`."""

import sys

try:
    from vlmkit.cli import main
except ModuleNotFoundError as error:
    if error.name != "typer":
        raise

    def main(argv=None):
        """Say which package the command line itself needs."""
        print(
            "vlmkit: the command line needs the package typer, which this Python "
            f"({sys.executable}) does not have. To see what else is missing, run "
            "python -m vlmkit.environment",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
