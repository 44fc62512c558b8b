"""Run the tests and the chapters, several at a time: `make test`.

    python scripts/run_tests.py -x       # options for every pytest; none by default

A job is a part of the tests, or a chapter whose outputs are compared with those stored in it. The
solutions are among the tests (`tests/test_exercises.py`). As many jobs run at once as there are
cores and memory, the longest first. Each has one thread: what a second one gains a model of this
size is less than what a second job gains, and numbers do not depend on how many cores there are.

The output of a job comes in one piece when the job is done; that of failed jobs comes at the end.
Ctrl-C ends all jobs.
"""

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import times

from vlmkit.environment import machine

ROOT = Path(__file__).resolve().parent.parent
PARTS = 4
SLOW = ("02_connectors", "07_planning", "08_lora_on_vqa", "10_making_pebble")
"""Chapters that train or search for minutes, on which `make test-all` alone spends the time. What
trains in `make test` is the solution of 06_the_recipe, and the tests of `vlmkit.finetuning`; what
plans is the solutions of 07_planning, and the tests of `vlmkit.planner`."""
SECONDS = 160
"""What a part of the tests takes, about; a chapter takes what `make times` has recorded. More parts
fill the lanes more evenly, and each costs a start of some seconds."""
SELECTED_NOTHING = 5  # pytest's status; with -k, the other jobs may have had something to run


def jobs(options=()):
    """{name: command} of all jobs, the longest first."""
    pytest = [sys.executable, "-m", "pytest", *options]
    # A notebook runs in the kernel of this environment, and must print the outputs that it stores.
    nbval = [*pytest, "--nbval", "--nbval-current-env", "--nbval-cell-timeout=1800"]
    seconds = {row["chapter"]: int(row["seconds"]) for row in times.recorded()}
    found = [
        (seconds.get(name, math.inf), name, [*nbval, times.NOTEBOOKS / f"{name}.ipynb"])
        for name in times.chapters()
        if name not in SLOW
    ]
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    for part in range(PARTS):
        command = [*pytest, "-m", "not slow", *tests[part::PARTS]]
        found.append((SECONDS, f"tests, part {part + 1} of {PARTS}", command))
    return {name: command for _, name, command in sorted(found, key=lambda job: -job[0])}


def lanes():
    """How many jobs run at once: one for each core, if there is memory for them."""
    free = machine.free_memory()
    return max(1, min(machine.cores(), math.inf if free is None else free // machine.WANTED_MEMORY))


def run(jobs, lanes):
    """Run {name: command}, so many at once, and print their outputs. Returns the exit status."""
    begun, waiting, running, statuses, failed = time.monotonic(), list(jobs), {}, {}, {}
    print(f"{len(jobs)} jobs, {lanes} at a time", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < lanes:
                    name, log = waiting.pop(0), Path(folder, str(len(waiting)))
                    running[name] = start(jobs[name], log), log, time.monotonic()
                time.sleep(0.05)
                for name in [name for name, (process, *_) in running.items() if is_done(process)]:
                    process, log, since = running.pop(name)
                    statuses[name] = process.returncode
                    output = log.read_text(encoding="utf-8", errors="replace")
                    print(f"\n--- {len(statuses)} of {len(jobs)}: {name}, {passed(since)}")
                    if process.returncode not in (0, SELECTED_NOTHING):
                        failed[name], output = output, "FAILED; the output is at the end\n"
                    print(output, end="", flush=True)
        finally:
            end([process for process, *_ in running.values()])
    for name, output in failed.items():
        print(f"\n--- FAILED: {name}, status {statuses[name]}\n{output}", end="")
    nothing = set(statuses.values()) == {SELECTED_NOTHING}
    verdict = f"failed: {', '.join(failed)}" if failed else "nothing was selected"
    print(
        f"\n{len(jobs)} jobs in {passed(begun)}; {verdict if failed or nothing else 'all passed'}"
    )
    return 1 if failed or nothing else 0


def start(command, log):
    """A process with one thread that writes into `log`, in a group that can be ended as a whole."""
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def is_done(process):
    return process.poll() is not None


def passed(since):
    """The minutes and seconds since then."""
    return times.minutes(time.monotonic() - since)


def end(processes):
    """End processes and what they have started: pytest gets ten seconds to stop its kernel."""
    for number, seconds in ((signal.SIGINT, 10), (signal.SIGKILL, 0)):
        until = time.monotonic() + seconds
        for process in processes:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                continue
        while time.monotonic() < until and not all(map(is_done, processes)):
            time.sleep(0.05)


def main(options):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    return run(jobs(options), lanes())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
