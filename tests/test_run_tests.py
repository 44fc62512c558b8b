"""scripts/run_tests.py: every test and chapter once, outputs whole, and nothing left running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import run_tests  # noqa: E402

pytestmark = pytest.mark.skipif(os.name == "nt", reason="make test is for POSIX shells")


def test_jobs_are_every_test_and_every_chapter_but_the_slow_ones_once():
    jobs = run_tests.jobs(["-x"])
    files = [part for command in jobs.values() for part in command if isinstance(part, Path)]
    chapters = {path.stem: path for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(run_tests.SLOW) < set(chapters)
    chapters = [path for name, path in chapters.items() if name not in run_tests.SLOW]
    expected = [*(ROOT / "tests").glob("test_*.py"), *chapters]
    assert sorted(files) == sorted(expected)
    assert all("-x" in command for command in jobs.values())


def test_long_jobs_come_first_and_a_chapter_without_a_time_before_them(monkeypatch):
    rows = [{"chapter": "01_a", "seconds": "20"}, {"chapter": "02_b", "seconds": "190"}]
    monkeypatch.setattr(run_tests.times, "recorded", lambda: rows)
    monkeypatch.setattr(run_tests.times, "chapters", lambda: ["01_a", "02_b", "03_c"])
    names = list(run_tests.jobs())
    assert names[0] == "03_c"
    assert [name for name in names if "part" not in name] == ["03_c", "02_b", "01_a"]


@pytest.mark.parametrize(
    ("cores", "free", "lanes"), [(2, 16e9, 2), (2, 3e9, 1), (8, 9e9, 4), (4, None, 4), (1, 0, 1)]
)
def test_lanes(monkeypatch, cores, free, lanes):
    monkeypatch.setattr(run_tests.machine, "cores", lambda: cores)
    monkeypatch.setattr(run_tests.machine, "free_memory", lambda: free)
    assert run_tests.lanes() == lanes


def test_outputs_come_whole_and_those_of_failed_jobs_at_the_end(capfd):
    jobs = {
        "bad": ["sh", "-c", "echo $OMP_NUM_THREADS thread; echo broken >&2; exit 1"],
        "slow": ["sh", "-c", "echo begin; sleep 0.3; echo end"],
        "fast": ["echo", "fine"],
        "nothing": ["sh", "-c", "exit 5"],
    }
    assert run_tests.run(jobs, lanes=2) == 1
    printed = capfd.readouterr().out
    assert "begin\nend\n" in printed and "1 thread\nbroken\n" in printed
    assert printed.index("fine") < printed.index("begin") < printed.index("broken")
    assert printed.rstrip().endswith("failed: bad")


def test_the_status_is_0_if_all_pass_and_1_if_no_job_had_a_test(capfd):
    assert run_tests.run({"one": ["true"], "two": ["sh", "-c", "exit 5"]}, lanes=1) == 0
    assert run_tests.run({"one": ["sh", "-c", "exit 5"]}, lanes=1) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ending_it_ends_what_its_jobs_have_started(tmp_path, number):
    file = tmp_path / "grandchild"
    code = f"""
import signal
import run_tests
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
run_tests.jobs = lambda options: {{"job": ["sh", "-c", "sleep 60 & echo $! >{file}.new; "
                                   "mv {file}.new {file}; wait"]}}
raise SystemExit(run_tests.main([]))
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'scripts'}{os.pathsep}{ROOT}"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    until = time.monotonic() + 60
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    grandchild = int(file.read_text())
    while is_running(grandchild) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(grandchild)


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return (
        "Z"
        not in subprocess.run(
            ["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True
        ).stdout
    )
