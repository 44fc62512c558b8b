"""The processes of a launch, as `accelerate launch` tells each of them in its environment."""

import os


def count():
    """How many processes there are: 1 without a launch."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first():
    """Whether this is the one that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"
