"""The inside of the sandbox: started by path in an interpreter of its own, with the standard library only.

Three processes: the one that was started makes the namespaces; its child, the first process of the new namespace,
supervises; the grandchild gives up its rights and runs the program. Without namespaces the first one supervises.
"""

import ctypes
import json
import os
import re
import resource
import signal
import struct
import sys
import time

LINUX = sys.platform.startswith("linux")
LIBC: ctypes.CDLL = ctypes.CDLL(None, use_errno=True) if LINUX else None  # type: ignore[assignment]
LONGEST_REASON = 200
NOBODY = 65534

# linux/sched.h, linux/prctl.h, linux/capability.h, linux/landlock.h
NEW_USER, NEW_PID, NEW_NET, NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
DIE_WITH_PARENT, KEEP_CAPABILITIES, CHILD_SUBREAPER, NO_NEW_PRIVILEGES = 1, 8, 36, 38
CAPABILITY_VERSION, READ_ANY_FILE = 0x20080522, 1 << 2
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
WRITE_FILE, READ_FILE, REFER, TRUNCATE = 1 << 1, 1 << 2, 1 << 13, 1 << 14
CHANGE_DIRECTORY = sum(1 << bit for bit in range(4, 13))
LIBRARIES = (
    *("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types", "/proc/self"),
    *("/dev/zero", "/dev/random", "/dev/urandom"),
)


def main():
    request = json.loads(sys.stdin.buffer.read())
    die_with_parent()
    guards = []
    wanted = request["isolation"]
    if "namespaces" in wanted and unshare(NEW_PID | NEW_NET | NEW_IPC | (NEW_USER if os.geteuid() else 0)):
        guards.append("namespaces")
        supervisor = os.fork()
        if supervisor:
            os.waitpid(supervisor, 0)
            return
        die_with_parent()
    answer = supervise(request, guards)
    os.write(1, json.dumps(answer).encode())


# --------------------------------------------------------------------------------------------------------------------
# The supervisor


def supervise(request, guards):
    """Run the program in a process of its own; {passed, reason, isolation}."""
    if LINUX:
        LIBC.prctl(CHILD_SUBREAPER, 1, 0, 0, 0)
    secret = os.urandom(16).hex().encode()
    reader, writer = os.pipe()
    begun = time.monotonic()
    program = os.fork()
    if program == 0:
        try:
            run(request, writer, secret, guards)
        finally:
            os._exit(1)
    os.close(writer)
    status, used = wait(program, begun + request["wall_seconds"])
    kill_descendants(program)
    output = read_available(reader)
    at = output.find(b"guards ")
    isolation = output[at:].split(b"\n")[0].decode().split()[1:] if at == 0 else guards
    passed, reason = verdict(request, status, used, output, secret)
    return {"passed": passed, "reason": reason, "isolation": isolation}


def verdict(request, status, used, output, secret):
    """(passed, reason) from how the process ended and what it wrote to the pipe."""
    if status is None:
        return False, f"timed out after {request['wall_seconds']:g} s on the clock"
    if secret in output:
        reason = output.split(secret, 1)[1].decode(errors="replace")
        if reason == "MemoryError":
            reason = f"memory limit ({request['memory_mib']} MiB)"
        return not reason, reason or "passed"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU or (number == signal.SIGKILL and used >= request["seconds"]):
            return False, f"timed out after {request['seconds']} s"
        return False, f"killed by {signal.Signals(number).name}"
    return False, f"ended before its last statement (exit status {os.WEXITSTATUS(status)})"


def wait(program, deadline):
    """(wait status, processor seconds) of a process; (None, 0) if it has not ended at the deadline."""
    pause = 0.001
    while True:
        found, status, usage = os.wait4(program, os.WNOHANG)
        if found:
            return status, usage.ru_utime + usage.ru_stime
        if time.monotonic() > deadline:
            return None, 0.0
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def kill_descendants(program):
    """Kill what the program has started, and the program itself."""
    if os.getpid() == 1:  # everything else in the namespace
        ignore(os.kill, -1, signal.SIGKILL)
        return
    ignore(os.killpg, program, signal.SIGKILL)
    ignore(os.kill, program, signal.SIGKILL)
    for _ in range(1000):  # orphans are adopted one after the other
        try:
            with open("/proc/thread-self/children") as file:
                children = file.read().split()
        except OSError:  # not Linux, or a kernel without the list
            return
        if not children:
            return
        for child in children:
            ignore(os.kill, int(child), signal.SIGKILL)
            ignore(os.waitpid, int(child), 0)


def read_available(reader):
    """The content of a pipe, without waiting for processes that still hold its other end."""
    os.set_blocking(reader, False)
    try:
        return os.read(reader, 1 << 16)
    except BlockingIOError:
        return b""


def ignore(call, *arguments):
    try:
        call(*arguments)
    except OSError:
        pass


# --------------------------------------------------------------------------------------------------------------------
# The program


def run(request, report, secret, guards):
    """Give up every right, run the program, and report the secret with the reason of its failure (empty: it passed)."""
    os.setpgid(0, 0)
    die_with_parent()
    quiet(report)
    if LINUX:
        LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    wanted = request["isolation"]
    guards = guards + (["landlock"] if "landlock" in wanted and landlock() else [])
    guards = guards + (["nobody"] if "nobody" in wanted and give_up_rights("landlock" in guards) else [])
    limit(request)
    os.write(report, f"guards {' '.join(guards)}\n".encode())
    if "namespaces" not in guards:
        take_away_sockets_and_signals()
    write, leave, number_of, own, here = os.write, os._exit, os.getpid, os.getpid(), os.getcwd()
    source = request.pop("source")
    try:
        exec(compile(source, "<program>", "exec"), {})  # in an empty namespace, as the published scorers do
        reason = ""
    except BaseException as error:  # SystemExit among them: a program that leaves has not passed
        reason = describe(error, here)
    if number_of() == own:  # a fork of the program may come here as well
        write(report, secret + reason.encode(errors="replace"))
    leave(0)


def describe(error, here):
    """One line about an exception, the same in every run: without addresses and the temporary directory `here`."""
    name = type(error).__name__
    if isinstance(error, MemoryError):
        return "MemoryError"
    if isinstance(error, SystemExit):
        return "left by sys.exit before its last statement"
    try:
        text = str(error)
    except BaseException:
        text = ""
    text = " ".join(text[: 4 * LONGEST_REASON].split()).replace(here, ".")
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    line = f"{name}: {text}" if text else name
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 3] + "..."


def quiet(report):
    """/dev/null for input and output, and no other file open but the report, which no started program inherits."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.closerange(3, report)
    os.closerange(report + 1, 4096)
    os.set_inheritable(report, False)


def limit(request):
    """The resource limits; a system without one of them does without it."""
    mib, seconds = 1 << 20, request["seconds"]  # a new process has used no time yet
    for name, soft, hard in (
        ("RLIMIT_CPU", seconds, seconds + 1),
        ("RLIMIT_AS", request["memory_mib"] * mib, request["memory_mib"] * mib),
        ("RLIMIT_FSIZE", request["file_mib"] * mib, request["file_mib"] * mib),
        ("RLIMIT_NPROC", request["processes"], request["processes"]),
        ("RLIMIT_NOFILE", 64, 64),
        ("RLIMIT_CORE", 0, 0),
    ):
        try:
            resource.setrlimit(getattr(resource, name), (soft, hard))
        except (AttributeError, ValueError, OSError):
            pass


def take_away_sockets_and_signals():
    """For ordinary programs where the kernel does not do it: one that means to can get them back."""
    import _socket
    import socket

    def refused(*arguments, **settings):
        raise PermissionError("not in the sandbox")

    for module in (socket, _socket):
        for name in ("socket", "SocketType", "socketpair", "create_connection", "create_server", "getaddrinfo"):
            if hasattr(module, name):
                setattr(module, name, refused)
    for name in ("kill", "killpg"):
        setattr(os, name, refused)


# --------------------------------------------------------------------------------------------------------------------
# What the kernel can do


def die_with_parent():
    if LINUX:
        LIBC.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)


def unshare(flags):
    return LINUX and LIBC.unshare(flags) == 0


def landlock():
    """Allow writing below the working directory only, and reading there and of the interpreter's libraries."""
    if not LINUX:
        return False
    version = LIBC.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    change = WRITE_FILE | CHANGE_DIRECTORY | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    # rights to files, to TCP ports (none), and what stays inside: abstract sockets and signals
    attributes = struct.pack("QQQ", change | READ_FILE, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = LIBC.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    if ruleset < 0:
        return False
    write_null = READ_FILE | WRITE_FILE | (change & TRUNCATE)
    rules = [(".", change | READ_FILE), (os.devnull, write_null)]
    rules += [(path, READ_FILE) for path in (*LIBRARIES, sys.prefix, sys.base_prefix, *sys.path) if path]
    for path, rights in rules:
        try:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rule = struct.pack("=Qi", rights, beneath)
        LIBC.syscall(ADD_RULE, ruleset, ctypes.c_int(1), rule, ctypes.c_uint32(0))
        os.close(beneath)
    held = LIBC.syscall(RESTRICT_SELF, ruleset, ctypes.c_uint32(0)) == 0
    os.close(ruleset)
    return held


def give_up_rights(landlocked):
    """Drop every capability; root becomes nobody, whose processes can be limited. Returns whether it did."""
    if not LINUX:
        return False
    became = False
    if os.getuid() == 0 and (landlocked or nobody_can_read(os.__file__)):
        os.chown(".", NOBODY, NOBODY)
        LIBC.prctl(KEEP_CAPABILITIES, 1, 0, 0, 0)
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            became = True
        except OSError:  # a container that knows no other user
            pass
        die_with_parent()  # a new user forgets it
    if not became:
        unshare(NEW_USER)  # root, or its capabilities, mean nothing to the files and processes outside
    # the interpreter's libraries may lie in a home directory; landlock has named what may be read
    kept = READ_ANY_FILE if became and landlocked else 0
    header = struct.pack("Ii", CAPABILITY_VERSION, 0)
    LIBC.capset(header, struct.pack("6I", kept, kept, 0, 0, 0, 0))
    return became


def nobody_can_read(path):
    os.seteuid(NOBODY)
    try:
        with open(path, "rb"):
            return True
    except OSError:
        return False
    finally:
        os.seteuid(0)


if __name__ == "__main__":
    main()
