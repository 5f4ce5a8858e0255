"""Measure what the script costs: `tests/run benchmark` prints the README's figures.

It measures one backend after the other, each on a server of its own, takes about ten
minutes, and wants the machine to itself. Two rows try what a test on a busy machine cannot
aim at: a signal at any moment. If the script does not keep what it promises, as below, that
is said after the table, and the exit status is 1.
"""

import concurrent.futures
import contextlib
import datetime
import functools
import itertools
import os
import pathlib
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import pexpect
import psutil
from conftest import BACKENDS, README, Program, command
from tooz import coordination

# What the script promises, besides that no signal does harm.
START = 1.10  # times the shortest script's start, at most
SHOWN = 0.3  # seconds until a join or a leave shows, at most: the 95th percentile
WAITING = 1  # % of a core, in a group of two: not reached
RUNS = 40  # pairs of the script and the shortest script: fewer are too noisy
SIZE = 10  # members of the group in which joins and leaves show
CHANGES = 40  # joins, and as many leaves
CRASHES = 8
LEASE = 5  # seconds, for the crashes
MOMENTS = 40  # from the start on, and each of the signals at each of them

# The README's 21 lines are the shortest script. It takes NAME GROUP URL SECONDS.
SHORTEST = re.search(r"```python\n(import sys\n.*?)```", README, re.DOTALL).group(1)


def quantiles(values):
    """Return the median and the 95th percentile."""
    top = statistics.quantiles(values, n=20, method="inclusive")[-1]
    return statistics.median(values), top


@contextlib.contextmanager
def members(url, group, count):
    """Keep `count` members in the group, without heartbeats: their leases are long."""
    them = []
    for number in range(count):
        # On memcached, whoever stops could remove a later member with the same name.
        name = f"{group}-{number}".encode()
        them.append(coordination.get_coordinator(url, name, executor="sync"))
        them[-1].start()
        them[-1].join_group_create(group.encode())
    yield them
    for one in them:
        one.leave_group(group.encode()).get()
        one.stop()


def program(*arguments):
    """Run the script as a process; kill it if it does not end before."""
    return contextlib.closing(Program(*command(*arguments, "--wait", "900")))


@contextlib.contextmanager
def client(*arguments):
    """Run the script until it has shown its first list; then leave by Ctrl-C."""
    with program(*arguments) as one:
        one.sees("4. members: .*\n")
        yield one
        one.hit(signal.SIGINT)
        one.ends(130)


# --- Rows: each returns its cell, and what is wrong with it: mostly nothing ---


def start_up(server):
    """Return how long the first list takes, and the ratio to the shortest script."""
    url, ours, shortest = server.url(), [], []
    for number in range(RUNS):
        # Each is killed once it has shown its list, so each has a group of its own.
        script = command("A", f"ours{number}", url, "--wait", "0")
        lesson = [sys.executable, "-c", SHORTEST, "A", f"shortest{number}", url, "0"]
        for times, words in (ours, script), (shortest, lesson):
            begun = time.perf_counter()
            with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
                next(line for line in process.stdout if b"members: " in line)
                times.append(time.perf_counter() - begun)
                process.kill()
    ratio = statistics.median(a / b for a, b in zip(ours, shortest))
    wrong = f"more than {START} x" if ratio > START else ""
    return f"{statistics.median(ours):.2f} s, {ratio:.2f} x", wrong


def changes(server):
    """Return how soon a join or a leave shows on another terminal."""
    url, times = server.url(timeout=900), []
    with (
        members(url, "changes", SIZE - 2),
        client("watcher", "changes", url) as watcher,
    ):
        other = coordination.get_coordinator(url, b"other")
        other.start()
        acts = [("joined", other.join_group), ("gone", other.leave_group)]
        for what, act in acts * CHANGES:
            time.sleep(random.random() * SHOWN)  # Any moment between two polls.
            act(b"changes").get()
            begun = time.perf_counter()
            watcher.sees(f"other {what}")
            times.append(time.perf_counter() - begun)
        other.stop()
    median, top = quantiles(times)
    wrong = f"more than {SHOWN} s" if top > SHOWN else ""
    return f"{median:.2f} / {top:.2f} s", wrong


def crashes(server):
    """Return how soon a crash shows on another terminal, in leases."""
    url, times = server.url(timeout=LEASE), []
    with client("watcher", "crashes", url) as watcher:
        for number in range(CRASHES):
            with program(f"victim{number}", "crashes", url) as victim:
                victim.sees("4. members")
                # Any moment between two heartbeats: there are two per lease.
                time.sleep(LEASE / 2 * number / CRASHES)
                victim.hit(signal.SIGKILL)
                begun = time.perf_counter()
                watcher.sees(f"victim{number} gone")
                times.append((time.perf_counter() - begun) / LEASE)
    return "{:.1f} / {:.1f} leases".format(*quantiles(times)), ""


def waiting(server):
    """Return what waiting costs in a group of two: of one core, and in memory."""
    url = server.url(timeout=900)
    with members(url, "waiting", 1), client("watcher", "waiting", url) as watcher:
        process = psutil.Process(watcher.pid)
        used = process.cpu_percent(10)  # It waits for so many seconds.
        memory = process.memory_info().rss / 2**20
    wrong = f"not below {WAITING} %" if used >= WAITING else ""
    return f"{used:.1f} %, {memory:.0f} MiB", wrong


def complaint(one, *statuses):
    """Wait for the end after a signal; return what is wrong with it, or nothing."""
    try:
        one.ends(*statuses)
    except (AssertionError, pexpect.TIMEOUT) as error:
        # Until main() has begun, Ctrl-C and its traceback are Python's affair.
        text = one.transcript
        begun = re.search(r'join_group.py", line \d+, in main', text)
        early = "KeyboardInterrupt" in text and not begun
        return "" if early else f"{error}"
    return ""


def any_moment(server, taken=False):
    """Send SIGINT and SIGTERM at any moment; return how many ended as they should.

    The clients have names of their own, or, if `taken`, the name of a member. Afterwards
    that member is the only one.
    """
    url, group, ends = server.url(timeout=900), f"taken-{taken}", {}
    with (
        members(url, group, 1) as (other,),
        contextlib.ExitStack() as stack,
        concurrent.futures.ThreadPoolExecutor(2 * MOMENTS) as threads,
    ):
        begun = time.perf_counter()
        with client("first", group, url):
            last = time.perf_counter() - begun + 0.5
        moments = [last * moment / (MOMENTS - 1) for moment in range(MOMENTS)]
        for after, number in itertools.product(
            moments, (signal.SIGINT, signal.SIGTERM)
        ):
            # No name comes twice: on memcached, another client with the same name would,
            # when it stops, hide a member that was left behind.
            key, begun = f"{number.name}.{after:.3f}", time.perf_counter()
            name = f"{group}-0" if taken else key
            one = stack.enter_context(program(name, group, url))
            time.sleep(max(0, begun + after - time.perf_counter()))
            one.hit(number)
            # To leave is to wait, for up to a second: the next one starts meanwhile.
            fine = [128 + number, -number] + [1] * taken
            ends[key] = threads.submit(complaint, one, *fine)
        bad = {name: end.result() for name, end in ends.items() if end.result()}
        # Whoever was left behind stays for the whole lease: all of them are still there.
        listed = other.get_members(group.encode()).get()
        if listed != {f"{group}-0".encode()}:
            bad["members"] = f"{listed}"
    text = f"{len(ends.keys() - bad)} of {len(ends)}"
    return text, "; ".join(": ".join(item) for item in bad.items())


# --- The table ---

ROWS = {
    "start to first list, and ratio to the 21 lines": start_up,
    "a join or a leave shows": changes,
    "a crash shows": crashes,
    "waiting: CPU, memory": waiting,
    "a signal at any moment leaves nothing behind": any_moment,
    "the same, with a name that is taken": functools.partial(any_moment, taken=True),
}


def version(server):
    """Return the version that a server's command prints: only the number."""
    return re.search(r"\d[\d.]+", os.popen(f"{server} --version").read()).group()


def main():
    """Measure all, print the table for the README, and say what is wrong."""
    rows, wrong = {what: [] for what in ROWS}, []
    with tempfile.TemporaryDirectory() as folder:
        for name, backend in BACKENDS.items():
            server = backend(pathlib.Path(folder)).start()
            try:
                for what, measure in ROWS.items():
                    print(f"{name}: {what}", file=sys.stderr)
                    text, fault = measure(server)
                    rows[what].append(text)
                    if fault:
                        wrong.append(f"{name}: {what}: {text}: {fault}")
            finally:
                server.kill()
    print("| what | " + " | ".join(BACKENDS) + " |")
    print("| --- " * (len(BACKENDS) + 1) + "|")
    for what, texts in rows.items():
        print(f"| {what} | " + " | ".join(texts) + " |")
    print(
        f"\n{datetime.date.today():%Y-%m-%d}, {platform.system()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, etcd {version('etcd')}, "
        f"memcached {version('memcached')}, median / 95th percentile"
    )
    if wrong:
        sys.exit("\nNot as promised:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
