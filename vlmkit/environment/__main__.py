"""`python -m vlmkit.environment`: what this machine can run, where even typer may be missing."""

import sys

from vlmkit.environment.doctor import main

if __name__ == "__main__":
    sys.exit(main())
