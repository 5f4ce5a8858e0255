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
Exit status: 0 done, 1 failed, 2 wrong arguments, 128+n ended by signal n.

It goes with the lesson "Creating, Joining and Leaving Groups" of The Hacker's
Guide to Scaling Python.
"""

import argparse
import contextlib
import logging
import math
import os
import re
import signal
import sys
import time

try:
    from tooz import coordination
except ImportError as missing:
    sys.exit(f"{missing}. Try .venv/bin/python, or: pip install -r requirements.txt")

POLL_EVERY = 0.25  # Seconds between two polls, at most. A service may wait longer.
POLL_LIMIT = 5  # Seconds, at most. A backend that answers a poll later counts as down.
LIMIT = 10  # Seconds for other get()s. In a crowd, joins on memcached take several.
NOT_A_MEMBER = coordination.MemberNotJoined, coordination.GroupNotCreated


def join_and_watch(args):
    """Take the six steps, after refuse_taken_name(); return the exit status.

    `args` is what arguments() returns. The status is 0, or 128 + n after signal n, or 1
    if we could not leave. Raises what Tooz and its driver raise otherwise, such as
    MemberAlreadyExist if the group has our name already.
    """
    # 1. The coordinator is our connection to the backend. Its heart is a thread that
    #    sends heartbeats; a member that sends none for a whole lease is dropped.
    #    heartbeat() sends one, too, and returns the seconds within which the next one
    #    is due, usually our lease. The heart waits for about half of that.
    coordinator = coordination.get_coordinator(args.url, args.me)
    coordinator.start(start_heart=True)
    lease = coordinator.heartbeat()
    say(args, f"1. started a coordinator on {args.url}")

    # 2. Whoever comes first creates the group. The call returns a future at once; get()
    #    waits for its result, or raises its error.
    try:
        coordinator.create_group(args.group_id).get(LIMIT)
        say(args, f"2. created {args.group}")
    except coordination.GroupAlreadyExist:
        say(args, f"2. {args.group} exists already")

    # A member killed by Ctrl-C would stay listed until its lease expires. So from here
    # on, signals are only collected: they end step 5, and we leave in step 6. A signal
    # has to wait for the call that is running, so each get() below has a limit.
    with caught_signals() as signals:
        # 3. From now on the backend lists us, until our heart misses a whole lease.
        coordinator.join_group(args.group_id).get(LIMIT)
        try:
            say(args, f"3. joined {args.group} (lease: {lease:g} s)")

            # 4. The list lives in the backend, so we ask the backend for it.
            asked = now()
            members = coordinator.get_members(args.group_id).get(LIMIT)
            say(args, f"4. {listing(members)}")

            # 5. Nobody calls us when a member joins or leaves: watch() polls the list.
            watch(coordinator, args, lease, members, asked, signals)
            say(args, "5. interrupted" if signals else f"5. waited {args.wait:g} s")
        finally:
            # 6. Once we have joined, we leave, even after an error. The others see it
            #    at their next poll. Without it, they would see us for a whole lease.
            say(args, f"6. leaving {args.group}")
            left = False
            try:
                with contextlib.suppress(*NOT_A_MEMBER):  # Dropped already: as good.
                    coordinator.leave_group(args.group_id).get(LIMIT)
                say(args, f"6. left {args.group}")
                left = True
            except Exception as error:  # noqa: BLE001 (drivers raise what they like)
                coordinator.heart.stop()  # More heartbeats would keep us listed.
                cause = f"{root_cause(error)}; our lease will expire"
                say(args, f"could not leave {args.group}: {cause}", sys.stderr)
    if not left:
        return 1
    coordinator.stop()  # It waits for the heart. Signals may kill us again.
    return 128 + signals[0] if signals else 0


def watch(coordinator, args, lease, members, asked, signals):
    """Show who joins and leaves, for `args.wait` seconds or until a signal is caught.

    `lease` is in seconds; `members`, a set, is the list shown last, and was
    asked for at `asked`, a time of now().
    """

    def event(text):
        say(args, f"{time.strftime('%H:%M:%S')} {text}")

    # Tooz's watchers (see run_watchers()) poll, too, and the first one of a group reads
    # the list anew: who joined since step 4 would never be announced.
    end = now() + args.wait
    # We cannot know when our lease expires, so we assume the worst. With a lease of
    # 30 s, the last heartbeat may be 15 s old when a poll lists us, and 15 s later we
    # are dropped: 14 s, as some backends count whole seconds. (This assumes that
    # heartbeats arrive as soon as polls do.)
    safe = max(lease / 2 - 1, lease / 4)
    safe_until = asked + safe
    down = False
    while not signals and (remaining := end - now()) > 0:
        status(f"{remaining:.0f} s remaining, heartbeats: {coordinator.heart.beats}")
        time.sleep(max(0, min(remaining, POLL_EVERY, safe / 2, safe_until - now())))
        if now() >= safe_until:
            # Here a real service stops what only a member may do: the backend hangs, or
            # we were suspended, and the others may have replaced us already. Whether
            # they have or not, we count ourselves out, and join again.
            event("our lease may have expired: stop acting as a member")
            members, safe_until = members - {args.me}, math.inf
        try:
            if args.me not in members:
                join_again(coordinator, args)
            asked = now()
            found = poll(coordinator, args, min(POLL_LIMIT, safe_until - asked))
        except Exception as error:  # noqa: BLE001 (drivers raise what they like)
            if not down:
                event(f"backend error: {root_cause(error)}; still trying")
            down = True
            continue
        if down:
            event(f"backend is back, {listing(found)}")
        # A group is a set: what is in only one of two lists has joined, or is missing.
        # We say "gone", as the list does not tell a member that left from one that
        # crashed. It may be ourselves. Then a real service stops here, too; it goes on
        # once it has "joined".
        for who in sorted(found ^ members, key=os.fsdecode):
            what = "joined" if who in found else "gone"
            event(f"{os.fsdecode(who)} {what}, {listing(found)}")
        members, down = found, False
        # Who is not listed has no lease that could expire.
        safe_until = asked + safe if args.me in found else math.inf


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
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        before[number] = signal.getsignal(number)
        # An ignored signal stays ignored: somebody may have started us with nohup.
        if before[number] != signal.SIG_IGN:
            signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refuse_taken_name(args):
    """Raise MemberAlreadyExist if a member has our name; free it if it is left over.

    It is called before we have a coordinator: on memcached, our own heartbeats would
    keep a crashed client of this name listed. Raises what Tooz and its driver raise.
    """
    # The observer asks under a name that no client can have. It joins nothing and has
    # no heart, so we save the second that its stop() would take.
    observer = coordination.get_coordinator(args.url, args.me + b"?")
    observer.start()
    with contextlib.suppress(*NOT_A_MEMBER):
        observer.get_member_capabilities(args.group_id, args.me).get(LIMIT)
        if args.me in observer.get_members(args.group_id).get(LIMIT):
            raise coordination.MemberAlreadyExist(args.group_id, args.me)
        # Our name has an entry, but is not listed: on files, a crash (or a long sleep)
        # leaves it over, and we would be refused for ever. So we leave in its place.
        crashed = coordination.get_coordinator(args.url, args.me)
        crashed.start()
        crashed.leave_group(args.group_id).get(LIMIT)


def now():
    """Return seconds, on a clock that nobody sets and that no laptop's sleep stops."""
    # time.monotonic() stands still then. macOS has no CLOCK_BOOTTIME, and needs none.
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def poll(coordinator, args, limit):
    """Return the set of members, or raise what Tooz raises, in `limit` seconds."""
    with contextlib.suppress(coordination.GroupNotCreated):
        return coordinator.get_members(args.group_id).get(limit)
    return set()  # A group that does not exist has no members.


def join_again(coordinator, args):
    """Become a member again: we slept, were cut off, or the backend lost its data.

    Raises what Tooz and its driver raise. On an error, call it again.
    """
    # Does the backend answer? heartbeat() would wait for the driver's limit.
    with contextlib.suppress(coordination.GroupAlreadyExist):
        coordinator.create_group(args.group_id).get(POLL_LIMIT)
    # On etcd, the heartbeat replaces a lease that has expired: without one we could not
    # join. On memcached, the others would drop us at their next poll if it had not been
    # sent. And our heart may be late: its clock stands still while a laptop sleeps.
    coordinator.heartbeat()
    # Our name may be listed still, or a join of ours arrived late. (Or another client
    # has taken it. In a service, make names unique: host and process ID, for example.)
    with contextlib.suppress(coordination.MemberAlreadyExist):
        coordinator.join_group(args.group_id).get(LIMIT)


def root_cause(error):
    """Return the type and the message of an error's first cause."""
    while error.__cause__ or (error.__context__ and not error.__suppress_context__):
        error = error.__cause__ or error.__context__
    message = getattr(error, "detail_text", "") or str(error) or "no answer"
    return f"{type(error).__name__}: {message.strip()[:200]}"


# --- Input and output ---

# Without a host, most drivers silently take localhost; ZooKeeper's takes several. With
# a lease of 0, memcached keeps a member for ever, and the heart never rests.
HOST = r"(\[[\w.:%]+\]|[\w.-]+)(:0*[1-9]\d*)?"
SERVER = rf"(?!file:)[\w+.-]+://([^/?#\s]*@)?{HOST}(,{HOST})*(/[^?#]*)?"
URL = rf"(?ai)(?!.*timeout=([+-]|0+(&|$)))({SERVER}|file:///[^?#]+)(\?[^#]*)?"


def arguments():
    """Return the command line's arguments; exit with status 2 if they are wrong.

    `me` and `group_id` are the names as Tooz takes them, as bytes.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    # On etcd, a "/" would nest one group in another; memcached's keys take no spaces.
    name = matching(r"[A-Za-z0-9._-]{1,100}", "1 to 100 of A-Z a-z 0-9 . _ -")
    add("client", type=name, help="a name for this client, and for no other")
    add("group", type=name, help="the group to join")
    use = "DRIVER://HOST[:PORT] or file:///PATH, no port or timeout below 1, and no #"
    url = matching(URL, f"{use} (here, or in $TOOZ_BACKEND_URL)")
    default = os.getenv("TOOZ_BACKEND_URL") or "etcd3+http://localhost"
    add("url", type=url, nargs="?", default=default, help="a Tooz URL")
    wait = matching(r"(\d+\.?\d*|\.\d+)(e-?\d+)?|inf", "a number, 0 or more", float)
    add("--wait", type=wait, metavar="SECONDS", default="60", help="time to stay: 60")
    args = parser.parse_intermixed_args()  # Options may stand before the URL, too.
    args.me, args.group_id = args.client.encode(), args.group.encode()
    return args


def matching(pattern, use, kind=str):
    """Return a type for argparse: `kind` of a text that matches; an error says how."""

    def check(text):
        if re.fullmatch(pattern, text):
            return kind(text)
        quoted = "" if "://" in text else f"{text!a}: "  # A URL may have a password.
        raise argparse.ArgumentTypeError(f"{quoted}use {use}")

    return check


def listing(members):
    """Return the members as they are always shown: sorted, on one line."""
    # A member's name is bytes, in any encoding; on files it may be a str.
    return f"members: {', '.join(sorted(map(os.fsdecode, members))) or '(none)'}"


def say(args, text, file=None):
    """Print a line, to stdout by default. If nobody reads it, that is a hang-up."""
    status("")
    try:
        print(f"{args.client}: {printable(text)}", file=file, flush=True)
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
    args = arguments()
    logging.disable()  # The heart logs its failures. Keep that log in a service.
    logging.captureWarnings(True)  # urllib3 warns about the SSL library of macOS.
    try:
        status(f"asking {args.url}")
        refuse_taken_name(args)
        return join_and_watch(args)
    except coordination.MemberAlreadyExist:
        why = (
            f"{args.client} is a member of {args.group} already: it is running, or it "
            "crashed less than a lease ago. Try again then, or choose another name"
        )
    except Exception as error:  # noqa: BLE001 (drivers raise what they like)
        say(args, f"cannot use {args.url}: {root_cause(error)}", sys.stderr)
        why = (
            "check the URL (etcd3+http://localhost, memcached://127.0.0.1, or, without "
            "a server, file:///tmp/tooz), that the backend runs there, and NO_PROXY"
        )
    say(args, why, sys.stderr)
    return 1


if __name__ == "__main__":
    # A request that hangs keeps a thread of Tooz busy; sys.exit() would wait for it.
    os._exit(main())
