"""The first process of a program inside the sandbox (`sandbox.py`): confines itself permanently, then runs the program.

It is executed as a script with the standard library only: importing mtp_jax takes longer than most programs.
"""

import builtins
import ctypes
import json
import os
import resource
import struct
import sys
import types

NAME = "program"  # the program's __name__: not __main__, so its script part is not run
HOME = "/program"
NOBODY = 65534
READY = b"ready\n"  # written to REPORT before the program starts
REPORT = 3  # its file descriptor
MAX_DETAIL = 500

# fmt: off
# Refused system calls, name: (x86_64, aarch64), as in Linux's unistd.h; None where the architecture has no such call.
# Without them a program is one process, so its memory limit covers everything it uses.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # another process, another program in this one, or a new namespace
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "unshare": (272, 97), "setns": (308, 268),
    # any socket but a socket pair (which asyncio needs): not every kind belongs to the network namespace
    "socket": (41, 198),
    # memory that belongs to no process, so that no limit counts it
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # access to other processes: bubblewrap's own is visible
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    # parts of the kernel that belong to no namespace, or that bypass this filter
    "io_uring_setup": (425, 425), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "syslog": (103, 116),
}
# fmt: on
CLONE = (56, 220)
CLONE3 = (435, 435)
NEWEST = 462  # later calls return ENOSYS, which every C library handles
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH

LOAD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, JUMP_IF_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets into struct seccomp_data, little-endian
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
CLONE_THREAD = 0x10000
OTHER_ABI = 0x40000000  # x86_64's x32 calls, numbered differently
PR_SET_DUMPABLE, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, CAPABILITY_VERSION_3 = 4, 22, 2, 0x20080522
REMOUNT_NO_SETUID_NO_DEVICES = 32 | 2 | 4


def instructions(machine: str, threads: bool) -> list[tuple[int, int, int, int]]:
    """Returns the filter of system calls as (code, jump if true, jump if false, constant); see seccomp(2)."""
    column, audit = ARCHITECTURES[machine]
    out = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 1, 0, audit),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (JUMP_IF_AT_LEAST, 0, 1, OTHER_ABI),
        (RETURN, 0, 0, KILL),
        (JUMP_IF_AT_LEAST, 0, 1, NEWEST + 1),
        (RETURN, 0, 0, ENOSYS),
        # its flags are in memory, which a filter cannot read; without it the C library uses clone
        (JUMP_IF_EQUAL, 0, 1, CLONE3[column]),
        (RETURN, 0, 0, ENOSYS),
        (JUMP_IF_EQUAL, 0, 4, CLONE[column]),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (JUMP_IF_SET, 0, 1, CLONE_THREAD),
        (RETURN, 0, 0, ALLOW if threads else EPERM),
        (RETURN, 0, 0, EPERM),
    ]
    for number in (numbers[column] for numbers in REFUSED.values()):
        if number is not None:
            out += [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, EPERM)]
    return [*out, (RETURN, 0, 0, ALLOW)]


def confine(limits: dict[str, int], change_user: bool) -> None:
    """Confines this process permanently; raises, or exits with a line on stderr, if a part of that is refused.

    change_user: whether the process starts as root of its user namespace, which has NOBODY.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def check(step: str, result: int) -> None:
        if result == -1:
            raise SystemExit(f"{step}: {os.strerror(ctypes.get_errno())}")

    options = f"size={limits['disk_bytes']},nr_inodes={limits['num_files'] + 1}".encode()  # bwrap cannot set nr_inodes
    check("file system", libc.mount(b"none", HOME.encode(), b"tmpfs", REMOUNT_NO_SETUID_NO_DEVICES, options))
    values = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_FSIZE: limits["disk_bytes"],
        resource.RLIMIT_NOFILE: limits["num_open_files"],
        # counted per user and namespace since Linux 5.14: for an ordinary user bubblewrap's process is one of them
        resource.RLIMIT_NPROC: limits["num_threads"] + 2,
        resource.RLIMIT_STACK: 8 << 20,  # per thread
        resource.RLIMIT_CORE: 1,  # byte: with 0 a program to which the system pipes core dumps would still be started
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 256,
    }
    for name, value in values.items():
        most = value + (name == resource.RLIMIT_CPU)  # SIGXCPU, which identifies this limit, and a second later SIGKILL
        hard = resource.getrlimit(name)[1]
        hard = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(name, (min(value, hard), hard))
    if change_user:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    # bubblewrap has set no_new_privs, so dropped capabilities cannot be regained
    check("capabilities", libc.capset(struct.pack("II", CAPABILITY_VERSION_3, 0), bytes(24)))
    check("PR_SET_DUMPABLE", libc.prctl(PR_SET_DUMPABLE, *map(ctypes.c_ulong, (0, 0, 0, 0))))
    code = instructions(os.uname().machine, threads=_processes_are_counted())
    memory = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *parts) for parts in code))
    program = struct.pack("HP", len(code), ctypes.addressof(memory))
    mode = ctypes.c_ulong(SECCOMP_MODE_FILTER)
    check("filter of system calls", libc.prctl(PR_SET_SECCOMP, mode, program, ctypes.c_ulong(0), ctypes.c_ulong(0)))


def _processes_are_counted() -> bool:
    """Returns whether RLIMIT_NPROC applies to this process; the machine's root is exempt in every namespace."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
    try:
        pid = os.fork()
    except BlockingIOError:
        return True
    finally:
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return False


def run(code: str, check: str, token: bytes) -> None:
    """Executes `code` and then `check` in one namespace; does not return.

    The token is written to REPORT only after the last line of `check`, so a program that exits before has not passed,
    whatever its exit code and output. Changes of builtins are undone before the check, and every name that this
    function uses is resolved before the program starts.
    """
    write, leave, compiled, execute = os.write, os._exit, compile, exec
    names, kept, untrace, unprofile = vars(builtins), dict(vars(builtins)), sys.settrace, sys.setprofile
    report, explain = REPORT, describe
    module = types.ModuleType(NAME)
    del sys.modules["__main__"]
    sys.modules[NAME] = module
    namespace = vars(module)
    write(report, READY)
    try:
        execute(compiled(code, "program.py", "exec", dont_inherit=True), namespace)
        names.update(kept)
        namespace["__builtins__"] = builtins
        untrace(None)
        unprofile(None)
        execute(compiled(check, "check.py", "exec", dont_inherit=True), namespace)
    except BaseException as error:
        names.update(kept)
        write(report, explain(error))
        leave(1)
    write(report, token)
    leave(0)


def describe(error: BaseException) -> bytes:
    """Returns {"kind", "detail"} of an exception as JSON; it may be a program's own class, so any access may raise."""
    kind = "memory" if isinstance(error, MemoryError) else "exit" if isinstance(error, SystemExit) else "error"
    try:
        line = str(error).strip().split("\n")[0][:MAX_DETAIL]
        detail = f"{type(error).__name__}: {line}" if line else str(type(error).__name__)
    except BaseException:
        detail = "an exception that cannot be shown"
    try:
        sys.stdout.flush()
    except BaseException:
        pass
    return json.dumps({"kind": kind, "detail": detail}).encode()


def main() -> None:
    """Runs the job on standard input; the first argument is the descriptor to report to."""
    job = json.load(sys.stdin.buffer)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(int(sys.argv[1]), REPORT)
    os.closerange(REPORT + 1, os.sysconf("SC_OPEN_MAX"))
    sys.path += job["packages"]
    sys.argv[:] = ["program.py"]
    code, check, token = job["code"], job["check"], job["token"].encode()
    confine(job["limits"], job["change_user"])
    job.clear()
    run(code, check, token)


if __name__ == "__main__":
    main()
