"""Measure what the script costs: `tests/run benchmark` prints the README's figures.

Every figure comes from one run, on servers of its own, with the backends in turn. It takes
about ten minutes, and wants the machine to itself.
"""

import concurrent.futures
import contextlib
import datetime
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
import time
import urllib.request

import psutil
from conftest import BACKENDS, Client
from tooz import coordination
from tqdm import tqdm

NAMES = ["etcd", "memcached", "file"]
RUNS = 15  # script and shortest script, in alternation
CHANGES = 40  # joins and leaves, each looked for on another terminal
CRASHES = 8
ROUNDS = 30  # of six clients under one name
LEASE = 5  # seconds, for the crashes
SIZES = [2, 100, 400]
WATCHED = 10  # seconds of waiting, for processor time
SHORTEST = """
import sys
from tooz import coordination
me, group, url = sys.argv[1].encode(), sys.argv[2].encode(), sys.argv[3]
coordinator = coordination.get_coordinator(url, me)
coordinator.start(start_heart=True)
try:
    coordinator.create_group(group).get()
except coordination.GroupAlreadyExist:
    pass
coordinator.join_group(group).get()
print("members:", coordinator.get_members(group).get(), flush=True)
coordinator.leave_group(group).get()
coordinator.stop()
"""


def quantiles(values, unit="s", digits=2):
    """Return "median / 95th percentile" of the values as text."""
    top = statistics.quantiles(values, n=20, method="inclusive")[-1]
    return f"{statistics.median(values):.{digits}f} / {top:.{digits}f} {unit}"


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
def client(*arguments):
    """Run the script as a process, and leave by Ctrl-C."""
    one = Client(*arguments)
    yield one
    one.hit(signal.SIGINT)
    one.expect("6. left", timeout=60)
    one.wait()


def start_up(server, progress):
    """Return how long the first list takes beside the shortest script, as a ratio."""
    ours, shortest = [], []
    script = str(pathlib.Path(__file__).parent.parent / "tooz_join_group.py")
    for number in range(RUNS):
        for times, command in (
            (ours, [sys.executable, script]),
            (shortest, [sys.executable, "-c", SHORTEST]),
        ):
            begun = time.perf_counter()
            arguments = ["A", f"start{number}", server.url()]
            arguments += ["--wait", "0"] * (times is ours)
            process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE)
            while b"members: " not in process.stdout.readline():
                pass
            times.append(time.perf_counter() - begun)
            process.communicate()
            progress.update()
    ratio = statistics.median(a / b for a, b in zip(ours, shortest))
    return (
        f"{statistics.median(ours):.2f} s, "
        f"{ratio:.2f} x the shortest script's {statistics.median(shortest):.2f} s"
    )


def changes(server, size, progress):
    """Return how soon a join and a leave show on another terminal, in a group that big."""
    url, group, joins, leaves = server.url(timeout=900), f"changes{size}", [], []
    with (
        members(url, group, size - 2),
        client("watcher", group, url, "--wait", "900") as watcher,
    ):
        watcher.expect("4. members: .*\n")
        other = coordination.get_coordinator(url, b"other")
        other.start()
        for _ in range(CHANGES):
            for act, what, times in (
                (other.join_group, "other joined", joins),
                (other.leave_group, "other gone", leaves),
            ):
                time.sleep(random.random() / 2)  # Any moment between two looks.
                act(group.encode()).get()
                begun = time.perf_counter()
                watcher.expect(what, timeout=60)
                times.append(time.perf_counter() - begun)
            progress.update()
        other.stop()
    return quantiles(joins), quantiles(leaves)


def crashes(server, progress):
    """Return how soon a crash shows on another terminal, in leases."""
    url, times = server.url(timeout=LEASE), []
    with client("watcher", "crashes", url, "--wait", "900") as watcher:
        watcher.expect("4. members")
        for number in range(CRASHES):
            victim = Client(f"victim{number}", "crashes", url)
            victim.expect("4. members")
            watcher.expect(f"victim{number} joined")
            time.sleep(LEASE * number / CRASHES)  # Any moment between two heartbeats.
            victim.hit(signal.SIGKILL)
            begun = time.perf_counter()
            victim.wait()
            watcher.expect(f"victim{number} gone", timeout=60)
            times.append((time.perf_counter() - begun) / LEASE)
            progress.update()
    return quantiles(times, "leases", 1)


def waiting(server, size, progress):
    """Return what waiting costs in a group that big: of one core, and in memory."""
    url, group = server.url(timeout=900), f"waiting{size}"
    with (
        members(url, group, size - 1),
        client("watcher", group, url, "--wait", "900") as watcher,
    ):
        watcher.expect("4. members")
        process = psutil.Process(watcher.pid)
        before = sum(process.cpu_times()[:2])
        for _ in range(WATCHED):
            time.sleep(1)
            progress.update()
        used = sum(process.cpu_times()[:2]) - before
        memory = process.memory_info().rss / 2**20
    return f"{100 * used / WATCHED:.1f} %, {memory:.0f} MiB"


def crowd(server, progress):
    """Return how long 100 clients that start at once take until all show all."""
    url, group = server.url(timeout=120), "crowd"
    names = [f"c{number:02}" for number in range(100)]
    begun = time.perf_counter()
    clients = [Client(name, group, url, "--wait", "900") for name in names]
    for one in clients:
        one.expect("members: " + ", ".join(names) + "\n", timeout=300)
        progress.update()
    took = time.perf_counter() - begun
    for one in clients:
        one.hit(signal.SIGTERM)
    for one in clients:
        one.wait()
    return f"{took:.0f} s"


def namesakes(server, progress):
    """Return in how many rounds more than one of six, joining under one name, got in."""
    several, group = 0, b"namesakes"
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
        # Each stop() waits for a thread, for up to a second: let them do so together.
        with concurrent.futures.ThreadPoolExecutor() as threads:
            list(threads.map(lambda one: one.stop(), six))
        progress.update()
    return f"{several} of {ROUNDS} rounds"


def requests(server, name):
    """Return how many requests one look is, in a group of ten."""
    if name == "file":
        return "no server"

    def count():
        if name == "etcd":
            with urllib.request.urlopen(f"{server.endpoint}/metrics") as page:
                text = page.read().decode()
            pattern = r'grpc_server_started_total{grpc_method="Range",.* (\d+)'
            return int(re.search(pattern, text).group(1))
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.sendall(b"stats\r\n")
            return int(re.search(rb"cmd_get (\d+)", line.recv(10000)).group(1))

    with members(server.url(), "requests", 10) as them:
        before = count()
        them[0].get_members(b"requests").get()
        return str(count() - before)


def main():
    """Measure all, and print the table for the README."""
    rows = {}
    steps = 2 * RUNS + 2 * CHANGES + CRASHES + ROUNDS + len(SIZES) * WATCHED + 100
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=steps * len(NAMES), smoothing=0) as progress,
    ):
        for name in NAMES:
            server = BACKENDS[name](pathlib.Path(folder)).start()
            try:
                progress.set_description(f"{name}: start")
                row = {"start to first list": start_up(server, progress)}
                for size in SIZES[:2]:
                    progress.set_description(f"{name}: changes among {size}")
                    joins, leaves = changes(server, size, progress)
                    row[f"a join shows, among {size} members"] = joins
                    row[f"a leave shows, among {size} members"] = leaves
                progress.set_description(f"{name}: crashes")
                row["a crash shows"] = crashes(server, progress)
                for size in SIZES:
                    progress.set_description(f"{name}: waiting among {size}")
                    row[f"waiting among {size} members"] = waiting(
                        server, size, progress
                    )
                progress.set_description(f"{name}: namesakes")
                row["six join under one name at once: more than one gets in"] = (
                    namesakes(server, progress)
                )
                row["requests for one look, among 10 members"] = requests(server, name)
                progress.set_description(f"{name}: 100 at once")
                row["100 clients start at once, until all show all"] = crowd(
                    server, progress
                )
            finally:
                server.kill()
            for what, figure in row.items():
                rows.setdefault(what, []).append(figure)
    print("| | " + " | ".join(NAMES) + " |")
    print("| --- " * (len(NAMES) + 1) + "|")
    for what, figures in rows.items():
        print(f"| {what} | " + " | ".join(figures) + " |")
    print(
        f"\n{datetime.date.today():%Y-%m-%d}, {os.cpu_count()} cores, "
        f"{platform.system()}, Python {platform.python_version()}, median / 95th percentile"
    )


if __name__ == "__main__":
    main()
