"""On PYTHONPATH, keeps a Python and all that it starts off the network, and notes who tried.

Python imports a module of this name when it starts. An audit hook sees every connection and every
look-up of a name, whichever library makes it, before the system does. What is on this machine is
let through: Jupyter talks to its kernels that way.
"""

import os
import sys
import traceback

HERE = {"localhost", "", None, "::", "::1", "0.0.0.0"}


def _far(event, args):
    """The address outside this machine that an event is about, or None."""
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = args[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg") and args[1]:
        if not isinstance(args[1], tuple):  # a path of this machine
            return None
        host = args[1][0]
    else:
        return None
    host = host.decode() if isinstance(host, bytes) else host
    return None if host in HERE or host.startswith("127.") else host


def _watch(event, args):
    if not event.startswith("socket."):
        return
    host = _far(event, args)
    if host is not None:
        with open(os.environ["OFFLINE_LOG"], "a", encoding="utf-8") as log:
            log.write(f"{event} {host}\n{''.join(traceback.format_stack(limit=12))}\n")
        raise OSError(f"no network here: {host}")


sys.addaudithook(_watch)
