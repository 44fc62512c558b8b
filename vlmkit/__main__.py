"""`python -m vlmkit`: see `vlmkit.cli`."""

import sys

from vlmkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
