#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["tooz>=7.0.0", "etcd3gw>=2.4.0", "pymemcache>=4.0.0"]
# ///
"""How do my nodes know who is alive? They join a group, with Tooz.

Run it in two or three terminals at once, each with its own name:

    python tooz_join_group.py clientA group1
    python tooz_join_group.py clientB group1

End one with Ctrl-C and one with kill -9: when do the others see it gone? The lesson is
the first function, join_and_watch(). It takes these steps:

    1. create a coordinator and start its heartbeat
    2. create the group, or find that it exists already
    3. join it
    4. print its members
    5. wait, and show who comes and goes
    6. leave it and stop

The backend keeps the list of members. A member stays listed for one lease after its
last heartbeat: 30 seconds, 10 on files; ?timeout=5 in the URL makes it 5. Backends
matter:

    etcd3+http://localhost       For groups that matter: etcd drops a member by itself
                                 when its heartbeats stop, and keeps its data on disk.
    memcached://127.0.0.1:11211  For what may be lost: live members drop dead ones, and
                                 a restart of memcached forgets all groups.
    file:///tmp/tooz             To learn and to test, on one host, without a server:
                                 members skip those whose heartbeats have stopped.

The default URL is $TOOZ_BACKEND_URL, or etcd's as above.
Exit status: 0 done, 1 failed, 2 wrong arguments, 128+n ended by signal n.

It goes with the lesson "Creating, Joining and Leaving Groups" of The Hacker's Guide to
Scaling Python: https://www.educative.io/courses/hackers-guide-scaling-python
"""

import signal

# Until step 3, Ctrl-C ends us at once and without a traceback, even during the imports.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import logging
import os
import re
import sys
import time
import urllib.parse

try:
    from tooz import coordination
except ImportError as missing:
    sys.exit(f"{missing}. Try .venv/bin/python, or: pip install -r requirements.txt")

POLL_EVERY = 0.25  # Seconds between two polls: a join or a leave shows within 0.3 s.
TIMEOUT = 5  # Seconds. A backend that takes longer to answer a poll counts as down.
NOT_A_MEMBER = coordination.MemberNotJoined, coordination.GroupNotCreated
# Options of Tooz's URLs that set a lease, in whole seconds.
LEASES = "timeout", "membership_timeout", "lock_timeout", "leader_timeout"


def join_and_watch(args, screen):
    """Take the six steps; return the exit status.

    `args` has our url, client, group, and wait, in seconds. The status is 0, or 128 + n
    after signal n, or 1 if we could not leave. Raises what Tooz and its driver raise in
    steps 1 to 4, such as MemberAlreadyExist if our name is in the list already.
    """
    # 1. The coordinator is our connection to the backend. Its heart is a thread that
    #    sends heartbeats; a member that sends none for a whole lease is dropped.
    #    heartbeat() sends one, too, and returns the "number of seconds to wait before
    #    sending a new heartbeat": our lease. The heart waits for half of that.
    coordinator = coordination.get_coordinator(args.url, args.client.encode())
    coordinator.start(start_heart=True)
    lease = coordinator.heartbeat()
    screen.say(f"1. started a coordinator on {args.url}")

    # 2. Whoever comes first creates the group. The call returns a future at once; get()
    #    waits for its result, or raises its error.
    group_id = args.group.encode()  # Tooz takes names as bytes.
    try:
        coordinator.create_group(group_id).get()
        screen.say(f"2. created {args.group}")
    except coordination.GroupAlreadyExist:
        screen.say(f"2. {args.group} exists already")

    # A member killed by Ctrl-C would stay listed until its lease expires. So from here
    # on, signals are only collected: they end step 5, and we leave in step 6. A signal
    # has to wait for the call that is running, so each get() has a limit, in seconds.
    with caught_signals() as signals:
        # 3. From now on the backend lists us, for as long as our heart beats.
        try:
            coordinator.join_group(group_id).get(10)
        except coordination.MemberAlreadyExist:
            # On memcached, our heartbeats keep a crashed client of this name listed.
            coordinator.heart.stop()
            raise
        screen.say(f"3. joined {args.group} (lease: {lease:g} s)")

        # 4. The list lives in the backend, so we ask the backend for it.
        members = coordinator.get_members(group_id).get(10)
        screen.say(f"4. {listing(members)}")

        # 5. Nobody calls us when a member joins or leaves: watch() polls the list.
        watch(coordinator, args, lease, members, signals, screen)
        status = 128 + signals[0] if signals else 0
        screen.say("5. interrupted" if status else f"5. waited {args.wait:g} s")

        # 6. Once we have left, the others see it at their next poll. If we only stopped
        #    our heart, they would see us until our lease expires.
        screen.status("leaving")
        try:
            coordinator.leave_group(group_id).get(10)
        except NOT_A_MEMBER:
            pass  # We have been dropped already, which is just as good.
        except Exception as error:  # noqa: BLE001 (drivers raise what they like)
            cause = root_cause(error)
            screen.warn(f"could not leave {args.group}: {cause}; our lease will expire")
            return 1
        coordinator.stop()  # This stops the heart, too.
        screen.say(f"6. left {args.group} and stopped")
        return status


# --- Failures ---


@contextlib.contextmanager
def caught_signals():
    """Collect Ctrl-C, SIGTERM and SIGHUP in the list that the `with` block gets.

    The handler raises nothing, so it interrupts no call of Tooz: the block checks the
    list when it can. After the first signal, Ctrl-C kills us: leaving may take long.
    """
    caught, before = [], {}

    def catch(number, _):
        caught.append(number)
        if signal.SIGINT in before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        # An ignored signal stays ignored: somebody may have started us with nohup.
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch(coordinator, args, lease, members, signals, screen):
    """Show who joins and leaves, for `args.wait` seconds or until a signal is caught.

    `lease` is in seconds; `members`, a set of bytes, is the list shown last. Tooz has
    watchers, but they poll as well: watch_join_group() registers a callback, and
    run_watchers() calls get_members() and takes the same two differences.
    """
    me, group_id = args.client.encode(), args.group.encode()
    end = time.monotonic() + args.wait
    down = False
    # While a laptop sleeps, time.monotonic() may stand still; our lease does not.
    beats, expires = coordinator.heart.beats, time.time() + lease
    while not signals and (remaining := end - time.monotonic()) > 0:
        screen.status(f"{remaining:.0f} s remaining, {lease_bar(expires, lease)}")
        time.sleep(min(remaining, POLL_EVERY))
        try:
            found = seen = poll(coordinator, group_id)
            if me not in found:
                join_again(coordinator, group_id)
                seen = poll(coordinator, group_id)
        except Exception as error:  # noqa: BLE001 (drivers raise what they like)
            if not down:
                screen.warn(f"backend error: {root_cause(error)}; still trying")
            down = True
            continue
        if down:
            screen.say(f"backend is back, {listing(found)}")
        down = False
        if me not in found:
            screen.say("3. joined again")
            screen.say(f"4. {listing(seen)}")
        # A heartbeat renews our lease if it arrives. We count it once a poll has been
        # answered since: by then it has most likely arrived. Nobody can be certain, as
        # memcached's driver asks for no reply.
        if me not in found or coordinator.heart.beats != beats:
            beats, expires = coordinator.heart.beats, time.time() + lease
        # A group is a set: two differences tell who is new and who is missing. We say
        # "gone", as the list does not tell a member that left from one that crashed.
        news = [(shown(who), "joined") for who in seen - members - {me}]
        news += [(shown(who), "gone") for who in members - seen - {me}]
        for who, what in sorted(news):
            screen.say(f"{time.strftime('%H:%M:%S')} {who} {what}, {listing(seen)}")
        members = seen


def poll(coordinator, group_id):
    """Return the members, a set of bytes.

    Raises what Tooz and its driver raise, after TIMEOUT seconds at the latest.
    """
    try:
        return coordinator.get_members(group_id).get(TIMEOUT)
    except coordination.GroupNotCreated:
        return set()  # A group that does not exist has no members.


def join_again(coordinator, group_id):
    """Become a member again: we slept, were cut off, or the backend lost its data.

    Raises what Tooz and its driver raise. On an error, call it again.
    """
    # A heartbeat comes first. On etcd, a lease is an object: if ours has expired, the
    # heartbeat makes a new one, and without a lease we cannot join. On memcached, the
    # others would drop us at their next poll if it had not been sent. The heart stops
    # meanwhile: on etcd, two heartbeats at once could make two leases, and nobody would
    # renew the one that we join with.
    coordinator.heart.stop()
    try:
        if coordinator.heart.wait(TIMEOUT):  # True: the thread still runs.
            raise coordination.OperationTimedOut("the heartbeat hangs, or fails")
        coordinator.heartbeat()
    finally:
        coordinator.heart.start()
    # The group may be gone, too, so we use Tooz's call for steps 2 and 3 in one. It
    # blocks, and returns no future. If our name is listed already, the heartbeat was
    # enough (on files), a join of ours arrived late, or another client took the name.
    with contextlib.suppress(coordination.MemberAlreadyExist):
        coordinator.join_group_create(group_id)


def lease_bar(expires, lease):
    """Return a bar: what remains of our lease, in seconds, until the time it expires.

    Once it has expired, the others may see us as gone, and while we are cut off nobody
    can tell us. A real member must notice that by itself, and stop doing what only a
    member may do, early: `expires` counts from a poll, some time after the heartbeat.
    (While a poll waits for its answer, the bar is not redrawn, but the lease runs on.)
    """
    left = max(0, round(expires - time.time()))
    bar = "#" * round(10 * left / lease)
    return f"lease [{bar:.<10}] {f'{left} s' if left else 'expired'}"


def name_comes_free(args, screen):
    """Wait until our name is free, for a lease and 2 s at most; return whether it is.

    Another client with our name is alive, or it has crashed and its lease may not have
    expired yet. Nobody can tell which, except by waiting.
    """
    me, group_id = args.client.encode(), args.group.encode()
    # We poll under a name that no client can have. Under our own, memcached's driver
    # would never drop the crashed client, and stop() would drop a live one.
    observer = coordination.get_coordinator(args.url, f"{args.client}?".encode())
    observer.start()
    limit = observer.heartbeat() + 2  # Backends drop a member a little late.
    screen.warn(
        f"{args.client} is taken; waiting up to {limit:g} s, in case it crashed"
    )
    end = time.monotonic() + limit
    while (taken := me in poll(observer, group_id)) and time.monotonic() < end:
        screen.status(f"waiting for the name, {end - time.monotonic():.0f} s remaining")
        time.sleep(POLL_EVERY)
    if taken:
        screen.warn(f"{args.client} is still taken: choose another name")
    elif urllib.parse.urlsplit(args.url).scheme == "file":
        # On files, a member whose lease has expired is skipped, but its name is still
        # refused until somebody leaves under it, as we do here for the crashed client.
        crashed = coordination.get_coordinator(args.url, me)
        crashed.start()
        with contextlib.suppress(*NOT_A_MEMBER):
            crashed.leave_group(group_id).get(TIMEOUT)
        crashed.stop()
    observer.stop()
    return not taken


def root_cause(error):
    """Return the type and the message of an error's first cause, on one line."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    message = getattr(error, "detail_text", "") or str(error) or "no answer"
    # In detail_text etcd3gw keeps the answer: etcd's is JSON, with a message.
    message = re.sub(r'(?s)^{.*"message": ?"([^"]+)".*', r"\1", message)
    return f"{type(error).__name__}: {shown(message.strip())[:200]}"


# --- Input and output ---


def arguments():
    """Return the command line's arguments; exit with status 2 if they are wrong."""
    url = os.getenv("TOOZ_BACKEND_URL") or "etcd3+http://localhost"
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("client", type=name, help="our name")
    add("group", type=name, help="the group to join")
    add("url", nargs="?", type=tooz_url, default=url, help="a Tooz URL")
    add("--wait", metavar="SECONDS", type=seconds, default=60, help="time to stay: 60")
    return parser.parse_args()


def name(text):
    """Return the name of a client or a group; raise ArgumentTypeError if it is odd."""
    # On etcd, a "/" would nest one group in another; memcached's keys take no spaces.
    if re.fullmatch(r"[A-Za-z0-9._-]{1,100}", text):
        return text
    raise argparse.ArgumentTypeError("use 1 to 100 of A-Z a-z 0-9 . _ -")


def seconds(text):
    """Return a number of seconds; raise ArgumentTypeError unless it is 0 or more."""
    with contextlib.suppress(ValueError):
        if float(text) >= 0:
            return float(text)
    raise argparse.ArgumentTypeError("use a number of seconds, 0 or more")


def tooz_url(text):
    """Return the URL; raise ArgumentTypeError if it lacks a host or has an odd lease.

    Without a host, most drivers silently take localhost. With a lease of 0, memcached
    keeps a member for ever, and the heart never rests.
    """
    good = re.match("(?i)file:///[^?#]", text)
    with contextlib.suppress(ValueError):  # Its message may show part of a password.
        url = urllib.parse.urlsplit(text)
        hosts = url.netloc.rpartition("@")[2].split(",")  # ZooKeeper takes several.
        hosts = [urllib.parse.urlsplit(f"//{host}") for host in hosts]
        if url.scheme not in ("", "file"):
            good = all(host.hostname and host.port != 0 for host in hosts)
    use = "DRIVER://HOST[:PORT] or file:///PATH" if not good else ""
    for option, value in urllib.parse.parse_qsl(text.partition("?")[2]):
        if option in LEASES and not re.fullmatch(r"[1-9]\d{0,5}", value):
            use = f"{option}=SECONDS, a whole number from 1 to 999999"
    if use:
        raise argparse.ArgumentTypeError(f"use {use} (here, or in $TOOZ_BACKEND_URL)")
    return text


def shown(text):
    """Escape text that we did not write, so that it cannot control the terminal.

    A member's name is bytes, in any encoding; on files it may be a str.
    """
    return ascii(os.fsdecode(text))[1:-1]


def listing(members):
    """Return the members as they are always shown: sorted, on one line."""
    return f"members: {', '.join(sorted(map(shown, members))) or '(none)'}"


class Screen:
    """What the learner sees: each line immediately, with our name before it.

    The story goes to stdout, failures to stderr. A terminal has a status line, too.
    """

    def __init__(self, client):
        self.client, self.line = client, ""
        terminal = sys.stdout and sys.stdout.isatty() and os.getenv("TERM") != "dumb"
        self.erase = "\r\x1b[K" if terminal else ""  # Erases the status line.

    def say(self, text):
        """Print a line of the story. If nobody reads it any more, that is a hang-up."""
        try:
            print(f"{self.erase}{self.named(text)}\n{self.line}", end="", flush=True)
        except OSError:
            signal.raise_signal(signal.SIGHUP)

    def warn(self, text):
        """Print a failure."""
        self.status("")
        with contextlib.suppress(OSError):
            print(self.named(text), file=sys.stderr, flush=True)

    def status(self, text):
        """Redraw the status line, in a terminal, unless we run in the background."""
        self.line = ""
        # OSError means that stdout is not, or no longer, our terminal.
        with contextlib.suppress(OSError):
            if self.erase and os.tcgetpgrp(1) == os.getpgrp():
                # A line that is too long for the terminal could not be erased.
                room = (os.get_terminal_size(1).columns or 80) - 1
                self.line = self.named(text)[:room] if text else ""
                print(self.erase + self.line, end="", flush=True)

    def named(self, text):
        """Return the text with our name before it, and no password of a URL in it."""
        text = re.sub(r"(://[^:@\s]*:)\S*@", r"\1***@", text)
        return f"{self.client}: " + re.sub(r"(password=)[^&\s]*", r"\1***", text)


def main():
    """Run the program; return its exit status."""
    args = arguments()
    screen = Screen(args.client)
    logging.disable()  # The heart logs its failures. Keep that log in a service.
    logging.captureWarnings(True)  # urllib3 warns about the SSL library of macOS.
    try:
        while True:
            screen.status(f"asking {args.url}")
            try:
                return join_and_watch(args, screen)
            except coordination.MemberAlreadyExist:
                pass  # Handled below, or later errors would have this one as context.
            if not name_comes_free(args, screen):
                return 1
    except Exception as error:  # noqa: BLE001 (drivers raise what they like)
        screen.warn(
            f"cannot use {args.url}: {root_cause(error)}\n"
            "  Is the backend running there, and reached without a proxy (NO_PROXY)?\n"
            "  Examples: etcd3+http://localhost, memcached://127.0.0.1, and, without a"
            " server, file:///tmp/tooz"
        )
        return 1
    finally:
        screen.status("")


if __name__ == "__main__":
    # A request that hangs keeps a thread of Tooz busy; sys.exit() would wait for it.
    os._exit(main())
