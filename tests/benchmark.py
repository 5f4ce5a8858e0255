"""Measure what the script costs: `tests/run benchmark` prints a table.

It takes about ten minutes, and wants the machine to itself. The last two rows are tests
that need as much time. If a limit is not kept, that is said, and the exit status is 1.
Each row is a function, which returns its text, and whether it keeps its limit.
"""

import os
import pathlib
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from subprocess import PIPE, Popen

import psutil
from conftest import BACKENDS, README, Program, command
from tooz import coordination

START = 1.10  # times the start of the README's lesson, at most
SHOWN = 0.3  # seconds until a join or a leave shows, at most: the 95th percentile
WAITING = 1.5  # % of a core, at most, in a group of two
LEASE = 5  # seconds, for the crashes; 900 where no lease may expire
LESSON = re.search(r"```python\n(import sys\n.*?)```", README, re.DOTALL).group(1)


def client(*arguments):
    """Return the script as a process, once it acts as a member."""
    one = Program(*command(*arguments, "--wait", "900"))
    one.sees("start acting")
    return one


def member(url, group):
    """Return the coordinator of another member. It sends no heartbeats."""
    other = coordination.get_coordinator(url, b"other")
    other.start()
    other.join_group_create(group.encode())
    return other


def start(url):
    """start to first list, and ratio to the lesson"""
    ours, lessons = [], []
    for number in range(40):
        # Each is killed, so each has a group of its own: its name is free there.
        script = command("A", f"ours{number}", url())
        lesson = [sys.executable, "-c", LESSON, "A", f"lesson{number}", url(), "0"]
        for times, words in (ours, script), (lessons, lesson):
            begun = time.perf_counter()
            with Popen(words, stdout=PIPE) as process:
                next(line for line in process.stdout if b"members: " in line)
                times.append(time.perf_counter() - begun)
                process.kill()
    ratio = statistics.median(a / b for a, b in zip(ours, lessons))
    return f"{statistics.median(ours):.2f} s, {ratio:.2f} x", ratio <= START


def changes(url):
    """a join or a leave shows"""
    other, times = member(url(900), "changes"), []
    acts = {"gone": other.leave_group, "joined": other.join_group}
    with client("A", "changes", url(900)) as watcher:
        for what in ["gone", "joined"] * 40:
            time.sleep(random.random() * SHOWN)  # Any moment between two polls.
            acts[what](b"changes").get()
            begun = time.perf_counter()
            watcher.sees(f"other {what}")
            times.append(time.perf_counter() - begun)
    median, top = statistics.median(times), sorted(times)[76]
    return f"{median:.2f} / {top:.2f} s", top <= SHOWN


def crashes(url):
    """a crash shows"""
    leases = []
    with client("A", "crashes", url(LEASE)) as watcher:
        for number in range(8):
            with client(f"B{number}", "crashes", url(LEASE)) as victim:
                time.sleep(LEASE * random.random())  # It sends about two heartbeats.
                victim.hit(signal.SIGKILL)
                begun = time.perf_counter()
                watcher.sees(f"B{number} gone")
                leases.append((time.perf_counter() - begun) / LEASE)
    return f"{statistics.median(leases):.1f} / {max(leases):.1f} leases", True


def waiting(url):
    """waiting: CPU, memory"""
    member(url(900), "waiting")
    with client("A", "waiting", url(900)) as watcher:
        process = psutil.Process(watcher.pid)
        used = process.cpu_percent(10)  # It waits for so many seconds.
        memory = process.memory_info().rss / 2**20
    return f"{used:.1f} %, {memory:.0f} MiB", used <= WAITING


def any_moment(url, name=None):
    """a signal at any moment leaves nothing behind"""
    group, hit, bad = f"moments-{name}", [], []
    other = member(url(900), group)
    for moment in range(40):
        for number in signal.SIGINT, signal.SIGTERM:
            one = Program(*command(name or f"{number.name}{moment}", group, url(900)))
            time.sleep(moment / 40)  # In a second, it is a member for a while.
            one.hit(number)
            hit.append((one, number))
    for one, number in hit:
        try:
            one.ends(-number, 1 if name else -number)  # A taken name may be refused.
        except AssertionError:
            # Until main() begins, KeyboardInterrupt is Python's affair.
            text = one.transcript
            if "KeyboardInterrupt" not in text or ", in main" in text:
                bad.append(text)
    # Whoever was left behind is listed for the whole lease.
    bad += other.get_members(group.encode()).get() - {b"other"}
    print(*bad, sep="\n", end="", file=sys.stderr)
    return f"{len(hit) - len(bad)} of {len(hit)}", not bad


def taken(url):
    """the same, with a name that is taken"""
    return any_moment(url, "other")


def main():
    """Measure all, print the table, and say what is broken."""
    broken = []
    with tempfile.TemporaryDirectory() as folder:
        backends = [kind(pathlib.Path(folder)).start() for kind in BACKENDS.values()]
        print("| what |", " | ".join(BACKENDS), "|")
        print("| --- " * (len(BACKENDS) + 1) + "|")
        for measure in start, changes, crashes, waiting, any_moment, taken:
            cells = [measure(backend.url) for backend in backends]
            print(f"| {measure.__doc__} |", " | ".join(text for text, _ in cells), "|")
            broken += [f"{measure.__doc__}: {text}" for text, kept in cells if not kept]
        for backend in backends:
            backend.kill()
    versions = os.popen("etcd --version | head -n 1; memcached --version").read()
    print(os.uname().sysname, os.cpu_count(), "cores, Python", sys.version, versions)
    if broken:
        sys.exit("Not as promised:\n" + "\n".join(broken))


if __name__ == "__main__":
    main()
