"""Limits: how much of the machine this process may use, containers' limits included.

On a JupyterHub, in Docker and in Binder a process sees all the cores and memory of its host, but is
killed when it takes more than its control group allows. On Linux the smallest limit counts, of the
process's own group and of those above it (cgroup v2, in the kernel's Documentation/admin-guide).
"""

import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def cores():
    """How many cores this process may use: at least one, and no more than there are."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    for group in _groups():
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            count = min(count, max(1, int(quota) // int(period)))
    return count


def free_memory():
    """Bytes that this process can still take, or None where that cannot be read."""
    try:
        import psutil

        free = psutil.virtual_memory().available
    except Exception:  # not installed, or a system that it does not know
        return None
    for group in _groups():
        limit, used = _read(group / "memory.max"), _read(group / "memory.current")
        if limit.isdigit() and used.isdigit():
            free = min(free, int(limit) - int(used) + _reclaimable(group))
    return max(free, 0)


def _reclaimable(group):
    """Bytes of files in memory that the kernel drops before it kills anything."""
    for line in _read(group / "memory.stat").splitlines():
        name, _, size = line.partition(" ")
        if name == "inactive_file" and size.isdigit():
            return int(size)
    return 0


def _groups():
    """The process's control group and those above it; none on systems without them."""
    path = next((n[3:] for n in _read(OWN).splitlines() if n.startswith("0::")), "/")
    group = GROUPS / path.lstrip("/")
    return [group, *(above for above in group.parents if GROUPS in (above, *above.parents))]


def _read(file):
    """A file's text, or nothing."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
