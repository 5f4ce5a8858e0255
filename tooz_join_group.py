#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["tooz>=7.0.0", "etcd3gw>=2.4.0", "pymemcache>=4.0.0"]
# ///
"""How do my nodes know who is alive? They join a group, with Tooz.

Run it in two or three terminals at once, each with its own name:

    python tooz_join_group.py clientA group1
    python tooz_join_group.py clientB group1

End one with Ctrl-C and one with kill -9: when do the others see it gone? The
lesson is the first function, join_and_watch(), in six numbered steps.

    group        a named set of zero or more members
    backend      a server, or a folder, that keeps the groups and their members
    coordinator  a client's connection to the backend
    heartbeat    what a coordinator sends about twice per lease: I am alive
    lease        how long a member may go without sending a heartbeat (30 s;
                 10 s on files; 5 s with ?timeout=5 at the end of all URLs)
    future       what a call returns while it still runs; get() waits for it

Backends matter:

    etcd3+http://localhost       For groups that matter: etcd drops a member
                                 whose lease expires, and has its data on disk.
    memcached://127.0.0.1:11211  For what may be lost: clients that poll drop
                                 the dead ones, and a restart loses all groups.
    file:///tmp/tooz             To learn and to test, on one host, without a
                                 server: clients that poll skip the dead ones.

The default URL is $TOOZ_BACKEND_URL, or etcd's as above.
Exit status: 0 done, 1 failed, 2 wrong arguments. After Ctrl-C, SIGTERM or
SIGHUP it leaves, and then that signal ends it (a shell says 130, 143 or 129).
"""

import contextlib
import logging
import os
import re
import signal
import sys
import time
import traceback
from argparse import ArgumentParser, RawTextHelpFormatter

try:
    from tooz import coordination
except ImportError as missing:
    sys.exit(f"{missing}. Try .venv/bin/python, or: pip install -r requirements.txt")

POLL_EVERY = 0.14  # Seconds. A service may poll less often: ten times per lease.
LIMIT = 10  # Seconds for a get(). In a crowd, joins on memcached take several.
URL = os.getenv("TOOZ_BACKEND_URL") or "etcd3+http://localhost"
NOT_A_MEMBER = coordination.MemberNotJoined, coordination.GroupNotCreated
signals = {}  # The number of each signal that was caught, and when it first was.


def join_and_watch(url, me, group, seconds):
    """Take the six steps; return after `seconds`, or once a signal was caught.

    `me` and `group` are names, in bytes. Call refuse_taken_name() before. Raises what
    Tooz and its driver raise, such as MemberAlreadyExist if the group has our name.
    """
    # 1. The coordinator is our connection to the backend. Its heart is a thread that
    #    sends heartbeats; a member that sends none for a whole lease is dropped. Step 5
    #    has to know when one was sent, so the heart beats through our Lease.
    coordinator = coordination.get_coordinator(url, me)
    lease = Lease(coordinator)
    coordinator.heart = coordination.Heart(lease)
    coordinator.start(start_heart=True)
    say(f"1. started a coordinator on {url}")

    # 2. Whoever comes first creates the group. The call returns a future at once; get()
    #    waits for its result, or raises its error.
    try:
        coordinator.create_group(group).get(LIMIT)
        say(f"2. created {group.decode()}")
    except coordination.GroupAlreadyExist:
        say(f"2. {group.decode()} exists already")

    # 3. From now on the backend lists us, until our heart misses a whole lease. If a
    #    signal killed us, we would stay listed as long, so signals only end step 5.
    catch_signals()
    coordinator.join_group(group).get(LIMIT)
    try:
        say(f"3. joined {group.decode()}")

        # 4. The list lives in the backend, so we ask the backend for it.
        members = coordinator.get_members(group).get(LIMIT)
        say(f"4. {listing(members)}")

        # 5. Nobody calls us when a member joins or leaves, so we poll. A group is a
        #    set: whoever is in only one of two lists has joined or is gone, ourselves
        #    included. (A list does not tell a member that left from one that crashed.)
        say(f"5. watching for {seconds:g} s")
        acting = False
        for found, safe in polls(coordinator, group, me, members, lease, seconds):
            for who in sorted(found ^ members, key=os.fsdecode):
                what = "joined" if who in found else "gone"
                say(f"{os.fsdecode(who)} {what}, {listing(found)}")
            # To be listed is one thing, to act as a member another: the list is late,
            # and whoever was dropped may have been replaced. A service works here, but
            # only while it is safe.
            if safe and not acting:
                say(f"start acting as a member, with a lease of {lease.seconds:g} s")
            if acting and not safe:
                say("stop acting as a member: we may have been dropped")
            members, acting = found, safe
    finally:
        # 6. Once we have joined, we leave, even after an error: the others see it at
        #    their next poll, and not a lease later. (A service stops its work first.)
        #    If we cannot leave, more heartbeats would keep us listed: stop the heart.
        say(f"6. leaving {group.decode()}")
        coordinator.heart.stop()
        with contextlib.suppress(*NOT_A_MEMBER):  # We were dropped: as good.
            coordinator.leave_group(group).get(LIMIT)
        say(f"6. left {group.decode()}")
        # stop() waits for the heart, and the heart, perhaps, for a backend that hangs:
        # then wait() returns True after LIMIT, and we do without stop().
        if not coordinator.heart.wait(LIMIT):
            coordinator.stop()


class Lease:
    """Our lease of `seconds`: we rely on it until `safe_until`, a time of now().

    Tooz's heart renews it. Both are 0 until the first heartbeat has been sent.
    """

    def __init__(self, coordinator):
        self.coordinator, self.seconds, self.safe_until = coordinator, 0, 0

    def heartbeat(self):
        """Send a heartbeat; return the seconds within which the next one is due.

        The heart waits for half of that, or, if this raises an error, for a second.
        """
        # The lease may begin as soon as the heartbeat is sent, so we count from before.
        # Two thirds are safe: memcached counts whole seconds, and polls take a while.
        sent = now()
        self.seconds = self.coordinator.heartbeat()
        self.safe_until = sent + self.seconds * 2 / 3
        return self.seconds


def polls(coordinator, group, me, members, lease, seconds):
    """Yield the set of members, and whether it is safe to act as one of them.

    It yields every POLL_EVERY seconds, until `seconds` have passed or a signal was
    caught, and never waits for the backend. `members` is the list that is known already.
    """
    # Tooz's watchers (see run_watchers()) poll, too, but they wait for the answer.
    end, safe_until, poll, outage = now() + seconds, 0, None, ""
    while not signals and (remaining := end - now()) > 0:
        if poll is None:
            renewed_until = lease.safe_until
            if me not in members and renewed_until > safe_until and not outage:
                # We were dropped. After each heartbeat we try to join again: before one,
                # etcd has no lease for us, and memcached's others would drop us. The
                # next poll tells whether it has worked.
                coordinator.create_group(group)
                coordinator.join_group(group)
                safe_until = renewed_until
            poll = coordinator.get_members(group)
        time.sleep(min(remaining, POLL_EVERY))
        if poll.done():
            try:
                members, cause = poll.get(), ""
            except coordination.GroupNotCreated:
                members, cause = set(), ""
            except Exception as error:  # noqa: BLE001 (drivers raise what they like)
                cause = root_cause(error)
            if bool(cause) != bool(outage):
                say(f"backend error: {cause}" if cause else "backend is back")
            # A heartbeat counts once a poll lists us that was sent after it: memcached
            # answers polls, but not heartbeats.
            if me in members and not cause:
                safe_until = renewed_until
            poll, outage = None, cause
        safe_for = max(0, safe_until - now()) if me in members else 0
        status(f"{remaining:.0f} s remaining, safe to act for {safe_for:.1f} s")
        yield members, safe_for > 0


# --- Failures, input and output ---


def refuse_taken_name(url, me, group):
    """Raise MemberAlreadyExist if a member has our name; free it if it is left over.

    Call it before there is a coordinator: on memcached, our own heartbeats would keep
    a crashed client of this name listed. Raises what Tooz and its driver raise.
    """
    # It asks under a name that no client has. It joins nothing: no need to stop it.
    observer = coordination.get_coordinator(url, me + b"?")
    observer.start()
    with contextlib.suppress(*NOT_A_MEMBER):
        # This raises MemberNotJoined if our name has no entry yet, so that the leave
        # below does not hit a client that is just joining.
        with contextlib.suppress(coordination.SerializationError):  # After a power cut.
            observer.get_member_capabilities(group, me).get(LIMIT)
        if me in observer.get_members(group).get(LIMIT):
            raise coordination.MemberAlreadyExist(group, me)
        # An entry that is not listed: on files, a client that crashed leaves it over,
        # and we would be refused for ever. So we leave in its place.
        crashed = coordination.get_coordinator(url, me)
        crashed.start()
        crashed.leave_group(group).get(LIMIT)


def catch_signals():
    """Collect signals, and interrupt no call of Tooz. A second Ctrl-C kills us."""

    def catch(number, _):
        # One Ctrl-C may arrive twice: from the terminal, and passed on by `timeout`.
        if now() > signals.setdefault(number, now()) + 0.5 and number == signal.SIGINT:
            end_by(number)

    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        # An ignored signal stays ignored: somebody may have started us with nohup.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, catch)


def end_by(number):
    """End as if nobody had caught the signal: shells and systemd look at that."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    os._exit(128 + number)  # In a container, process 1 survives its own signals.


def now():
    """Return seconds, on a clock that nobody sets and that no laptop's sleep stops."""
    # time.monotonic() stands still then. macOS has no CLOCK_BOOTTIME, and needs none.
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def root_cause(error):
    """Return the type and the message of an error's first cause."""
    while error.__cause__ or (error.__context__ and not error.__suppress_context__):
        error = error.__cause__ or error.__context__
    message = getattr(error, "detail_text", "") or str(error) or "no answer"
    return f"{type(error).__name__}: {message.strip()[:200]}"


def arguments():
    """Return what join_and_watch() takes; exit with status 2 if an argument is wrong."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("client", type=os.fsencode, help="a name that nobody else has")
    parser.add_argument("group", type=os.fsencode, help="the group to join")
    parser.add_argument("url", nargs="?", default=URL, help="a Tooz URL")
    parser.add_argument("--wait", type=float, default=60, help="seconds (60), or inf")
    args = parser.parse_intermixed_args()  # Options may stand before the URL, too.
    for name in args.client, args.group:
        # On etcd, a "/" would nest one group in another; memcached takes no spaces.
        if not re.fullmatch(rb"[A-Za-z0-9._-]{1,100}", name):
            parser.error(f"{os.fsdecode(name)!a}: use 1 to 100 of A-Z a-z 0-9 . _ -")
    if not args.wait >= 0:
        parser.error(f"--wait {args.wait}: use a number, 0 or more")
    # Tooz takes localhost if there is no host, and says nothing if it ignores a server's
    # path. With a timeout of 0, memcached keeps a member for ever.
    place = args.url.partition("://")[2].partition("?")[0]
    form = "/.+" if args.url.lower().startswith("file:") else "([^/]*@)?[^/:@][^/@]*/?"
    if not re.fullmatch(form, place) or re.search(r"#|timeout=[^1-9]|\?.*@", args.url):
        parser.error("url: DRIVER://HOST[:PORT] or file:///PATH, no #, no timeout=0")
    return args.url, args.client, args.group, args.wait


def listing(members):
    """Return the members as they are always shown: sorted, on one line."""
    # A member's name is bytes, in any encoding; on files it may be a str.
    return f"members: {', '.join(sorted(map(os.fsdecode, members))) or '(none)'}"


def say(text, file=None):
    """Print a line, to stdout by default. If nobody reads it, that is a hang-up."""
    status("")
    try:
        print(time.strftime("%H:%M:%S"), printable(text), file=file, flush=True)
    except OSError:
        signal.raise_signal(signal.SIGHUP)


def status(text):
    """Redraw the last line of a terminal, unless we run in its background."""
    with contextlib.suppress(OSError):  # stdout is not, or no longer, our terminal.
        if os.tcgetpgrp(1) == os.getpgrp() and os.getenv("TERM") != "dumb":
            # Without ?7l, a line that is too long would wrap, and a part of it stay.
            print(f"\r\x1b[K\x1b[?7l{printable(text)}\x1b[?7h", end="", flush=True)


def printable(text):
    """Return the text in ASCII, without passwords of URLs and without control codes."""
    text = re.sub(r"(://[^:@\s]*:)\S*(?=@)|(password=)[^&\s]*", r"\1\2***", text)
    return text.encode("unicode_escape").decode()


def main():
    """Run the program; return its exit status."""
    # Until step 3 there is nothing to leave: Ctrl-C kills us, without a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    url, me, group, seconds = arguments()
    logging.disable()  # The heart logs its failures. Keep that log in a service.
    logging.captureWarnings(True)  # urllib3 warns about the SSL library of macOS.
    advice = f"check {url} and NO_PROXY, start the backend, or use file:///tmp/tooz"
    try:
        status(f"asking {url}")
        refuse_taken_name(url, me, group)
        advice = "if we are still listed, we are dropped when our lease expires"
        join_and_watch(url, me, group, seconds)
        if signals:
            end_by(next(iter(signals)))
        return 0
    except coordination.MemberAlreadyExist:
        say(f"{me.decode()} is a member already. Crashed? Wait for a lease", sys.stderr)
    except Exception as error:
        frames = traceback.format_tb(error.__traceback__)
        if not any("tooz/coordination.py" in frame for frame in frames):
            raise  # A mistake in this file: Python shows its traceback.
        say(f"backend error: {root_cause(error)}", sys.stderr)
        say(advice, sys.stderr)
    return 1


if __name__ == "__main__":
    # A request that hangs keeps a thread of Tooz busy; sys.exit() would wait for it.
    os._exit(main())
