"""Measure what the script costs: `tests/run benchmark` prints the README's figures.

Every figure comes from one run, on servers of its own, with the backends in turn. It takes
about ten minutes, and wants the machine to itself. Two of the rows are sweeps, for what a
test on a busy machine cannot aim at: a signal at any moment. If the script does not keep
what it promises, as below, that is said after the table, and the exit status is 1.
"""

import collections
import concurrent.futures
import contextlib
import datetime
import itertools
import os
import pathlib
import platform
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import pexpect
import psutil
from conftest import BACKENDS, LIMIT, README, SCRIPT, Program, command
from tooz import coordination
from tqdm import tqdm

# What the script promises. (That no signal does harm is a promise, too.)
START = 1.08  # times the shortest script's start, at most
SHOWN = 0.3  # seconds until a join or a leave shows, at most: the 95th percentile
# Members: what waiting among them costs is below that percentage of a core.
WAITING = {2: 1, 100: 5, 400: 5}

NAMES = ["etcd", "memcached", "file"]
RUNS = 40  # script and shortest script, in alternation: fewer are too noisy
CHANGES = 40  # joins and leaves, each looked for on another terminal
CRASHES = 8
ROUNDS = 30  # of six clients under one name
LEASE = 5  # seconds, for the crashes
WATCHED = 10  # seconds of waiting, for processor time
CROWD = 100
MOMENTS = 40  # from the start on, and each of the signals at each of them
NEWCOMERS = 24  # that take a living member's name, and get a signal
JOINING = 0.006  # seconds after their first line: then they are just joining
SIGNALS = [signal.SIGINT, signal.SIGTERM]
STAY = ["--wait", "900"]

# The README's bare lesson is the shortest script. It takes NAME GROUP URL SECONDS.
SHORTEST = re.search(r"```python\n(import sys\n.*?)```", README, re.DOTALL).group(1)
# The number of the script's first line that no traceback may show.
LOADED = SCRIPT.read_text().split("import argparse\n")[0].count("\n") + 1
# A cell of the table, and what is wrong with it: mostly nothing.
Figure = collections.namedtuple("Figure", "text wrong", defaults=[""])


def quantiles(values, unit="s", digits=2, most=float("inf")):
    """Return "median / 95th percentile" of the values. The latter has a limit."""
    top = statistics.quantiles(values, n=20, method="inclusive")[-1]
    text = f"{statistics.median(values):.{digits}f} / {top:.{digits}f} {unit}"
    return Figure(text, f"more than {most} {unit}" if top > most else "")


@contextlib.contextmanager
def members(url, group, count):
    """Keep `count` members in the group. They do not beat: their leases are long."""
    them = []
    for number in range(count):
        name = f"m{number:03}".encode()
        them.append(coordination.get_coordinator(url, name, executor="sync"))
        them[-1].start()
        with contextlib.suppress(coordination.GroupAlreadyExist):
            them[-1].create_group(group.encode()).get()
        them[-1].join_group(group.encode()).get()
    yield them
    for one in them:
        one.leave_group(group.encode()).get()
        one.stop()


@contextlib.contextmanager
def program(*arguments):
    """Run the script as a process; kill it if it does not end before."""
    one = Program(*command(*arguments))
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()
        one.close()


@contextlib.contextmanager
def client(*arguments):
    """Run the script until it has shown its first list; then leave by Ctrl-C."""
    with program(*arguments) as one:
        one.sees("4. members: .*\n")
        yield one
        one.hit(signal.SIGINT)
        one.ends(130)


# --- Times ---


def start_up(server, progress):
    """Return how long the first list takes beside the shortest script, as a ratio."""
    ours, shortest = [], []
    for number in range(RUNS):
        # Each is killed once it has shown its list, so each has a group of its own.
        here, there = f"ours{number}", f"shortest{number}"
        script = command("A", here, server.url(), "--wait", "0")
        lesson = [sys.executable, "-c", SHORTEST, "A", there, server.url(), "0"]
        for times, words in (ours, script), (shortest, lesson):
            begun = time.perf_counter()
            with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
                next(line for line in process.stdout if b"members: " in line)
                times.append(time.perf_counter() - begun)
                process.kill()
            progress.update()
    ratio = statistics.median(a / b for a, b in zip(ours, shortest))
    return Figure(
        f"{statistics.median(ours):.2f} s, "
        f"{ratio:.2f} x the shortest script's {statistics.median(shortest):.2f} s",
        f"more than {START} x" if ratio > START else "",
    )


def changes(server, progress, size):
    """Return how soon a join and a leave show on another terminal, in a group that big."""
    url, group, joins, leaves = server.url(timeout=900), f"changes{size}", [], []
    with (
        members(url, group, size - 2),
        client("watcher", group, url, *STAY) as watcher,
    ):
        other = coordination.get_coordinator(url, b"other")
        other.start()
        for _ in range(CHANGES):
            for act, what, times in (
                (other.join_group, "other joined", joins),
                (other.leave_group, "other gone", leaves),
            ):
                time.sleep(random.random() * SHOWN)  # Any moment between two looks.
                act(group.encode()).get()
                begun = time.perf_counter()
                watcher.sees(what)
                times.append(time.perf_counter() - begun)
            progress.update()
        other.stop()
    return quantiles(joins, most=SHOWN), quantiles(leaves, most=SHOWN)


def crashes(server, progress):
    """Return how soon a crash shows on another terminal, in leases."""
    url, killed, times = server.url(timeout=LEASE), {}, []

    def kill(name, victim):
        victim.hit(signal.SIGKILL)
        killed[name] = time.perf_counter()

    with (
        client("watcher", "crashes", url, *STAY) as watcher,
        contextlib.ExitStack() as stack,
    ):
        victims = {}
        for name in [f"victim{number}" for number in range(CRASHES)]:
            one = program(name, "crashes", url, *STAY)
            victims[name] = stack.enter_context(one)
        for one in victims.values():
            one.sees("4. members")
        # They began at once, so they beat at once: they die at any moment between beats.
        for number, victim in enumerate(victims.items()):
            threading.Timer(LEASE * number / CRASHES, kill, victim).start()
        for _ in victims:
            watcher.sees(r"(victim\d+) gone")
            times.append((time.perf_counter() - killed[watcher.match[1]]) / LEASE)
            progress.update()
    return quantiles(times, "leases", 1)


def waiting(server, progress, size):
    """Return what waiting costs in a group that big: of one core, and in memory."""
    url, group = server.url(timeout=900), f"waiting{size}"
    with (
        members(url, group, size - 1),
        client("watcher", group, url, *STAY) as watcher,
    ):
        process = psutil.Process(watcher.process.pid)
        before = sum(process.cpu_times()[:2])
        for _ in range(WATCHED):
            time.sleep(1)
            progress.update()
        used = 100 * (sum(process.cpu_times()[:2]) - before) / WATCHED
        memory = process.memory_info().rss / 2**20
    wrong = f"not below {WAITING[size]} %" if used >= WAITING[size] else ""
    return Figure(f"{used:.1f} %, {memory:.0f} MiB", wrong)


def crowd(server, progress):
    """Return how long 100 clients that start at once take until all show all."""
    names = [f"c{number:02}" for number in range(CROWD)]
    words = ["crowd", server.url(timeout=120), *STAY]
    begun = time.perf_counter()
    with contextlib.ExitStack() as stack:  # It kills them all, as the server goes, too.
        for one in [stack.enter_context(program(name, *words)) for name in names]:
            # What the others print meanwhile is 30 kB each: their pipes hold 64.
            one.expect("members: " + ", ".join(names) + "\n", timeout=300)
            progress.update()
        return Figure(f"{time.perf_counter() - begun:.0f} s")


# --- Requests, and what Tooz does about namesakes ---


def namesakes(server, progress):
    """Return in how many rounds more than one of six, joining under one name, got in."""
    several, group, stops = 0, b"namesakes", []
    # Each stop() waits for a thread, for up to a second: let them all do so together.
    with concurrent.futures.ThreadPoolExecutor(6 * ROUNDS) as threads:
        for number in range(ROUNDS):
            name = f"same{number}".encode()
            six = [coordination.get_coordinator(server.url(), name) for _ in range(6)]
            for one in six:
                one.start()
            with contextlib.suppress(coordination.GroupAlreadyExist):
                six[0].create_group(group).get()
            admitted = 0
            for future in [one.join_group(group) for one in six]:
                with contextlib.suppress(coordination.MemberAlreadyExist):
                    future.get()
                    admitted += 1
            several += admitted > 1
            with contextlib.suppress(coordination.MemberNotJoined):
                six[0].leave_group(group).get()
            stops += [threads.submit(one.stop) for one in six]
            progress.update()
        for stop in stops:
            stop.result()
    return Figure(f"{several} of {ROUNDS} rounds")


def requests(server, _):
    """Return how many requests one look is, in a group of ten."""
    if not server.port:
        return Figure("no server")

    def count():
        if "etcd" in server.base:
            with urllib.request.urlopen(f"http://{server.addresses}/metrics") as page:
                text = page.read().decode()
            pattern = r'grpc_server_started_total{grpc_method="Range",.* (\d+)'
            return int(re.search(pattern, text).group(1))
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.sendall(b"stats\r\n")
            return int(re.search(rb"cmd_get (\d+)", line.recv(10000)).group(1))

    with members(server.url(), "requests", 10) as them:
        before = count()
        them[0].get_members(b"requests").get()
        return Figure(str(count() - before))


# --- Sweeps ---


def complaint(one, number):
    """Wait for the end after a signal; return what is wrong with it, or nothing."""
    try:
        text, status = one.read(), one.process.wait(LIMIT)
    except (pexpect.TIMEOUT, subprocess.TimeoutExpired):
        return "it does not end"
    if "5. interrupted" in text and "4. members" not in text.split("5. int")[0]:
        return "interrupted before it had waited"
    if "Traceback" in text:
        # Python's own, with its own status, before the script has taken Ctrl-C from it?
        lines = re.findall(rf'{SCRIPT.name}", line (\d+)', text)
        early = "KeyboardInterrupt" in text and "1. started" not in text
        fine = early and all(int(line) < LOADED for line in lines)
        return "" if fine else f"a traceback through the lines {lines}"
    return "" if status in (128 + number, -number) else f"exit status {status}"


def any_moment(server, progress):
    """Send SIGINT and SIGTERM at any moment; return how often nothing was left behind."""
    url, group, times, ends = server.url(timeout=900), "moments", [], {}
    with (
        members(url, group, 1) as (other,),
        contextlib.ExitStack() as stack,
        concurrent.futures.ThreadPoolExecutor(2 * MOMENTS) as threads,
    ):
        for number in range(5):
            begun = time.perf_counter()
            with client(f"first{number}", group, url):
                times.append(time.perf_counter() - begun)
        last = statistics.median(times) + 0.5
        for moment, number in itertools.product(range(MOMENTS), SIGNALS):
            after = last * moment / (MOMENTS - 1)
            # No name comes twice: on memcached, a namesake that stops would hide a ghost.
            name, begun = f"{number.name}.{after:.3f}", time.perf_counter()
            one = stack.enter_context(program(name, group, url))
            time.sleep(max(0, begun + after - time.perf_counter()))
            one.hit(number)
            # To leave is to wait, for up to a second: the next one starts meanwhile.
            ends[name] = threads.submit(complaint, one, number)
            progress.update()
        bad = {name: end.result() for name, end in ends.items() if end.result()}
        # Ghosts would stay for the whole lease: all of them are still there.
        for name in other.get_members(group.encode()).get() - {b"m000"}:
            bad[name.decode()] = "still a member"
    text = f"{len(ends.keys() - bad)} of {len(ends)} left nothing behind"
    return Figure(text, "; ".join(": ".join(item) for item in bad.items()))


def at_namesakes(server, progress):
    """Send signals to newcomers under a living member's name; return whom they hurt."""
    url, group, bad = server.url(), "newcomers", []
    with (
        client("A", group, url, *STAY) as living,
        client("watcher", group, url, *STAY) as watcher,
    ):
        for moment in range(NEWCOMERS):
            number = SIGNALS[moment % 2]
            with program("A", group, url) as newcomer:
                newcomer.sees("1. started")
                time.sleep(JOINING * moment / (NEWCOMERS - 1))
                newcomer.hit(number)
                bad += filter(None, [complaint(newcomer, number)])
            time.sleep(2 * SHOWN)  # The others look twice.
            progress.update()
    # Both have ended by now, the watcher first: so it has not seen the other one leave.
    gone = watcher.transcript.count("A gone")
    again = living.transcript.count("3. joined again")
    bad += [f"A gone {gone} times, joined again {again} times"] * bool(gone + again)
    text = f"{NEWCOMERS - max(gone, again)} of {NEWCOMERS} threw nobody out"
    return Figure(text, "; ".join(bad))


# --- The table ---


def figures(server, name, progress):
    """Measure all on one backend: yield the rows' names, each with its Figure."""

    def of(function, *size):
        progress.set_description(" ".join(map(str, (name, function.__name__, *size))))
        return function(server, progress, *size)

    yield "start to first list", of(start_up)
    for size in 2, 100:
        joins, leaves = of(changes, size)
        yield f"a join shows, among {size} members", joins
        yield f"a leave shows, among {size} members", leaves
    yield "a crash shows", of(crashes)
    for size in WAITING:
        yield f"waiting among {size} members", of(waiting, size)
    yield "six join under one name at once: more than one gets in", of(namesakes)
    yield "requests for one look, among 10 members", of(requests)
    yield "a signal at any moment", of(any_moment)
    yield "a signal at a namesake that is just joining", of(at_namesakes)
    # The last, as it leaves a crowd behind.
    yield f"{CROWD} clients start at once, until all show all", of(crowd)


def main():
    """Measure all, print the table for the README, and say what is wrong."""
    rows, wrong = {}, []
    steps = 2 * RUNS + 2 * CHANGES + CRASHES + len(WAITING) * WATCHED + ROUNDS
    steps += 2 * MOMENTS + NEWCOMERS + CROWD
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=steps * len(NAMES), smoothing=0) as progress,
    ):
        for name in NAMES:
            server = BACKENDS[name](pathlib.Path(folder)).start()
            try:
                for what, figure in figures(server, name, progress):
                    rows.setdefault(what, []).append(figure.text)
                    if figure.wrong:
                        wrong.append(f"{name}: {what}: {figure.text}: {figure.wrong}")
            finally:
                server.kill()
    print("| | " + " | ".join(NAMES) + " |")
    print("| --- " * (len(NAMES) + 1) + "|")
    for what, texts in rows.items():
        print(f"| {what} | " + " | ".join(texts) + " |")
    print(
        f"\n{datetime.date.today():%Y-%m-%d}, {os.cpu_count()} cores, "
        f"{platform.system()}, Python {platform.python_version()}, median / 95th percentile"
    )
    if wrong:
        sys.exit("\nNot as promised:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
