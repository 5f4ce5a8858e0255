"""Real backends on free ports, and the script as a process, as users run it."""

import contextlib
import io
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse

import fasteners
import mirakuru
import pexpect.popen_spawn
import port_for
import psutil
import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "tooz_join_group.py"
# Seconds to wait for what must come. Machines are slow, and no test is about speed.
LIMIT = 60
CLOCK = r"\d\d:\d\d:\d\d"

# What changes how a URL is reached has no place in a test.
DETOURS = r"(?i)(\w+_proxy|(requests|curl)_ca_bundle|tooz_backend_url)"
for name in [*os.environ]:
    if re.fullmatch(DETOURS, name):
        del os.environ[name]


# Each worker of pytest-xdist takes its ports from a range of its own, and each port once.
WORKER = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 30)
PORTS = set(range(20000 + 300 * WORKER, 20300 + 300 * WORKER))


def free_port():
    """Return a port that nobody listens on."""
    port = port_for.select_random(PORTS)
    PORTS.remove(port)
    return port


def command(*arguments):
    """Return the command line of the script, as a list."""
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def run(*arguments, **options):
    """Run the script to its end; return its CompletedProcess, with text in it."""
    options = {"capture_output": True, "text": True, "timeout": LIMIT, **options}
    begun = time.monotonic()
    done = subprocess.run(command(*arguments), check=False, **options)
    if time.monotonic() - begun > 2:
        # True on a busy machine, and no fault of the script.
        slow = r".*: no answer; trying for another \d+ s\n.* answers again\n"
        done.stderr = re.sub(slow, "", done.stderr)
    assert "Traceback" not in done.stderr or "--debug" in arguments
    return done


def wait_until(it_is_so):
    """Wait until the function returns something true."""
    limit = time.monotonic() + LIMIT
    while not it_is_so():
        assert time.monotonic() < limit, "it did not come"
        time.sleep(0.02)


def start_afresh():
    """Inherit nothing from whoever started pytest: perhaps it was nohup, or a script's &."""
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)
    # In a terminal, pexpect has made a session already.
    if os.getpid() != os.getsid(0):
        os.setsid()


class Watched:
    """What both kinds of client below share: patterns to wait for, and an end."""

    def begin(self):
        self.logfile_read = io.StringIO()
        # Else PopenSpawn looks for output every 0.1 ms: a few such waits fill a core.
        self.delayafterread = 0.005

    def sees(self, *patterns):
        """Wait until the patterns appear in the output, one after the other."""
        for pattern in patterns:
            try:
                self.expect(pattern, timeout=LIMIT)
            except (pexpect.TIMEOUT, pexpect.EOF) as error:
                pytest.fail(
                    f"{pattern!r} did not come ({type(error).__name__}):\n{self.transcript}"
                )

    @property
    def transcript(self):
        """All output until now."""
        return self.logfile_read.getvalue()

    def hit(self, number):
        """Send a signal to the script."""
        os.kill(self.pid, number)


class Client(Watched, pexpect.popen_spawn.PopenSpawn):
    """The script, writing to a pipe: stdout and stderr together."""

    def __init__(self, *arguments, under=()):
        super().__init__(
            [*under, *command(*arguments)],
            encoding="utf-8",
            preexec_fn=start_afresh,
        )
        self.begin()

    def ends(self, status, timeout=LIMIT):
        """Wait for the script's end; hold it to its status and to no traceback."""
        self.expect(pexpect.EOF, timeout=timeout)
        assert self.proc.wait(timeout) == status, self.transcript
        assert "Traceback" not in self.transcript, self.transcript


class Terminal(Watched, pexpect.spawn):
    """A command in a real terminal of 80 columns."""

    def __init__(self, program, *arguments, **options):
        options = {"encoding": "utf-8", "preexec_fn": start_afresh, **options}
        super().__init__(program, [*arguments], **options)
        self.begin()

    def ends(self, status):
        """Wait for the script's end; hold it to its status and to no traceback."""
        self.expect(pexpect.EOF, timeout=LIMIT)
        self.close()
        assert self.exitstatus == status, self.transcript
        assert "Traceback" not in self.transcript, self.transcript


class TerminalClient(Terminal):
    """The script in a terminal."""

    def __init__(self, *arguments, under=()):
        super().__init__(*under, *command(*arguments))


@pytest.fixture
def start():
    """Start clients with start(name, group, url, …); none survives its test."""
    clients = []

    def start(*arguments, kind=Client, **options):
        clients.append(kind(*arguments, **options))
        return clients[-1]

    yield start
    for client in clients:
        with contextlib.suppress(ProcessLookupError):
            client.hit(signal.SIGKILL)
        if isinstance(client, Client):
            client.proc.wait()
        else:
            client.close(force=True)


class Server:
    """What all backends share: a URL, and, where there is one, a process to torment."""

    executors = ()

    def url(self, **options):
        """Return the Tooz URL, with options in its query."""
        query = "&".join(f"{key}={value}" for key, value in options.items())
        return self.base + ("?" + query if query else "")

    def start(self):
        for executor in self.executors:
            executor.start()
        return self

    def kill(self):
        for executor in self.executors:
            executor.kill()

    def pause(self):
        for executor in self.executors:
            os.killpg(executor.process.pid, signal.SIGSTOP)
            status = psutil.Process(executor.process.pid).status
            wait_until(lambda status=status: status() == psutil.STATUS_STOPPED)

    def resume(self):
        for executor in self.executors:
            os.killpg(executor.process.pid, signal.SIGCONT)


def executor(kind, arguments, *where):
    """Return a mirakuru executor of that kind, for a command that need not be heard."""
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    if kind is mirakuru.HTTPExecutor:
        quiet["method"] = "GET"  # etcd refuses HEAD
    return kind(arguments, *where, timeout=LIMIT, **quiet)


class Etcd(Server):
    """One etcd; `cluster` maps the names of its members to their peer ports."""

    def __init__(self, folder, port=None, name="default", cluster=None, tls=()):
        self.folder, self.port = folder / name, port or free_port()
        cluster = cluster or {name: free_port()}
        scheme = "https" if tls else "http"
        client = f"{scheme}://127.0.0.1:{self.port}"
        peer = f"http://127.0.0.1:{cluster[name]}"
        peers = [f"{one}=http://127.0.0.1:{at}" for one, at in cluster.items()]
        self.base, self.endpoint = f"etcd3+{client}", client
        arguments = ["etcd", "--name", name, "--data-dir", str(self.folder), *tls]
        arguments += ["--listen-client-urls", client, "--advertise-client-urls", client]
        arguments += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        arguments += ["--initial-cluster", ",".join(peers)]
        if tls:
            kind, *where = mirakuru.TCPExecutor, "127.0.0.1", self.port
        else:
            kind, *where = mirakuru.HTTPExecutor, f"{client}/health"
        self.executors = [executor(kind, arguments, *where)]

    def wait_until_healthy(self):
        """Wait until this node knows a leader, and answers."""
        self.executors[0].wait_for(self.executors[0].after_start_check)

    def ctl(self, *arguments):
        """Run etcdctl; return its output."""
        environment = {**os.environ, "ETCDCTL_API": "3"}
        return subprocess.run(
            ["etcdctl", "--endpoints", self.endpoint, *arguments],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    def forget(self):
        """Come back empty."""
        self.kill()
        shutil.rmtree(self.folder)
        self.start()

    def wipe(self):
        """Throw all members out: revoke their leases."""
        leases = self.ctl("lease", "list")
        for lease in re.findall(r"(?m)^[0-9a-f]{8,}$", leases):
            self.ctl("lease", "revoke", lease)


class Cluster(Etcd):
    """Three etcds behind etcd's own TCP gateway, whose address the clients get."""

    def __init__(self, folder):
        peers = {f"node{one}": free_port() for one in range(3)}
        self.nodes = [Etcd(folder, name=name, cluster=peers) for name in peers]
        gateway = free_port()
        addresses = [f"127.0.0.1:{node.port}" for node in self.nodes]
        arguments = ["etcd", "gateway", "start", "--endpoints", ",".join(addresses)]
        arguments += ["--listen-addr", f"127.0.0.1:{gateway}", "--retry-delay", "1s"]
        self.base = f"etcd3+http://127.0.0.1:{gateway}"
        self.endpoint = ",".join(addresses)
        self.gateway = executor(mirakuru.TCPExecutor, arguments, "127.0.0.1", gateway)
        self.executors = [*(node.executors[0] for node in self.nodes), self.gateway]

    def start(self):
        # A node is healthy only once it has met a second one: start all, then wait.
        for node in self.nodes:
            mirakuru.base.SimpleExecutor.start(node.executors[0])
        for node in self.nodes:
            node.wait_until_healthy()
        self.gateway.start()
        return self

    def forget(self):
        self.kill()
        for node in self.nodes:
            shutil.rmtree(node.folder)
        self.start()

    def split(self):
        """Return the nodes as (the leader, the others)."""
        table = self.ctl("endpoint", "status", "--write-out", "fields")
        ids = re.findall(r'"MemberID" : (\d+)', table)
        leader = re.search(r'"Leader" : (\d+)', table).group(1)
        nodes = dict(zip(ids, self.nodes))
        return nodes.pop(leader), [*nodes.values()]


class Memcached(Server):
    def __init__(self, folder):
        self.port = free_port()
        self.base = f"memcached://127.0.0.1:{self.port}"
        where = ("127.0.0.1", self.port)
        arguments = f"memcached -u nobody -l 127.0.0.1 -p {self.port}".split()
        self.executors = [executor(mirakuru.TCPExecutor, arguments, *where)]

    def forget(self):
        self.kill()
        self.start()

    def wipe(self):
        with socket.create_connection(("127.0.0.1", self.port)) as line:
            line.sendall(b"flush_all\r\n")
            assert line.recv(100) == b"OK\r\n"


class Files(Server):
    def __init__(self, folder):
        self.folder = folder / "tooz"
        self.base = f"file://{self.folder}"

    def wipe(self):
        for member in self.folder.glob("groups/*/*.raw"):
            member.unlink()


BACKENDS = {"etcd": Etcd, "cluster": Cluster, "memcached": Memcached, "file": Files}


def pytest_sessionstart(session):
    """Start what is slow to start: once, before pytest-xdist starts its workers."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    folder = tempfile.TemporaryDirectory()
    session.config.add_cleanup(folder.cleanup)
    for name in "etcd", "cluster":
        server = BACKENDS[name](pathlib.Path(folder.name, name))
        session.config.add_cleanup(server.kill)
        os.environ[f"SHARED_{name}"] = server.start().base


@pytest.fixture
def launch(request, tmp_path):
    """Return a function that starts a backend of the test's own."""

    def launch(name):
        server = BACKENDS[name](tmp_path)
        request.addfinalizer(server.kill)
        return server.start()

    return launch


@pytest.fixture
def servers(launch):
    """Return a function from a backend's name to one that runs: do it no harm.

    All tests share etcd and the cluster, but not memcached: there, a client that stops
    takes its namesakes in all groups with it, until their next heartbeat.
    """

    def server(name):
        if f"SHARED_{name}" not in os.environ:
            return launch(name)
        shared = Server()
        shared.base = os.environ[f"SHARED_{name}"]
        shared.port = urllib.parse.urlsplit(shared.base).port
        return shared

    return server


@pytest.fixture
def backend(request, servers):
    """A backend to do no harm."""
    return servers(request.param)


@pytest.fixture
def own_backend(request, launch):
    """A backend of the test's own, to torment."""
    return launch(request.param)


def pytest_collection_modifyitems(items):
    """Begin with the longest tests; end with those that wait for all others to end."""

    def order(item):
        alone = item.get_closest_marker("alone") is not None
        return alone, item.path.stem != "test_readme"

    items.sort(key=order)


@pytest.fixture(autouse=True)
def alone(request, tmp_path_factory):
    """Let the tests that take the whole machine run while no other test does."""
    path = tmp_path_factory.getbasetemp().parent / "alone.lock"
    lock = fasteners.InterProcessReaderWriterLock(path)
    marked = request.node.get_closest_marker("alone")
    with lock.write_lock() if marked else lock.read_lock():
        yield


@pytest.fixture
def default_etcd_port(tmp_path_factory):
    """Two tests use it: not at once."""
    path = tmp_path_factory.getbasetemp().parent / "2379.lock"
    with fasteners.InterProcessLock(path):
        yield


@pytest.fixture
def group(request):
    """A group of the test's own."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", request.node.name).strip("-")
    return f"{name[:60]}.{time.time_ns() % 10**9}"


def own(name):
    """Run a test on a backend of its own, of that kind."""
    return pytest.mark.parametrize("own_backend", [name], indirect=True)


def three(fixture="backend"):
    """Run a test on etcd, memcached and files."""
    return pytest.mark.parametrize(
        fixture, ["etcd", "memcached", "file"], indirect=True
    )
