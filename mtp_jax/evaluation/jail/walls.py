"""The walls around a program: namespaces, a root folder of its own, resource limits, no privileges.

Every function either does what it says or raises `Refused`; none goes on without.
"""

import ctypes
import os
import resource
import stat
from collections.abc import Sequence

libc = ctypes.CDLL(None, use_errno=True)

NEW_USER, NEW_MOUNT, NEW_PID, NEW_NET = 0x10000000, 0x00020000, 0x20000000, 0x40000000
NEW_IPC, NEW_UTS, NEW_CGROUP = 0x08000000, 0x04000000, 0x02000000
READ_ONLY, NO_SETUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
DETACH = 2
# statvfs and mount(2) number these alike; relatime differs
KEPT_FLAGS, STAT_RELATIME, RELATIME = READ_ONLY | NO_SETUID | NO_DEVICES | 8 | 1024 | 2048, 4096, 1 << 21
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
CAPABILITY_VERSION_3 = 0x20080522
SIGKILL = 9
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

NOBODY = 65534  # the program's user and group inside, and outside too where the launcher is root
HOME = "/program"  # its folder, also known as /tmp: unless the interpreter or its packages lie below /tmp
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
MOUNT_POINTS = ("/sys", "/mnt", "/srv", "/media")  # one is hidden while the new root is built


class Refused(Exception):
    """A wall that this machine does not allow. step: which; reason: the system's words."""

    def __init__(self, step: str, reason: str):
        super().__init__(step, reason)
        self.step, self.reason = step, reason


def check(step: str, result: int) -> None:
    """Raise for a C call that returned -1."""
    if result == -1:
        raise Refused(step, os.strerror(ctypes.get_errno()))


def prctl(step: str, option: int, value: int) -> None:
    check(step, libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)))


def die_with_parent() -> None:
    """SIGKILL for this process when its parent is gone. To be called after the user is changed, which resets it."""
    prctl("PR_SET_PDEATHSIG", PR_SET_PDEATHSIG, SIGKILL)


def enter_namespaces() -> None:
    """Leave the machine's users, mounts, network, System V IPC, host name; the next child is process 1."""
    flags = NEW_USER | NEW_MOUNT | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS | NEW_CGROUP
    check("new namespaces", libc.unshare(flags))


def map_users(pid: int) -> bool:
    """Give a process in new namespaces its users; from outside, by whoever it was before.

    Returns:
      whether the program can be another user than its launcher: so where the launcher is root, who is under no limit of
      processes and may read what belongs to root.
    """
    uid, gid = os.geteuid(), os.getegid()
    other = uid == 0 and is_mapped("/proc/self/uid_map") and is_mapped("/proc/self/gid_map")
    own = 0 if other else NOBODY
    extra = f"\n{NOBODY} {NOBODY} 1\n" if other else "\n"
    try:
        if not other:  # without privileges outside, groups may be mapped only if they can no longer be dropped
            _write(f"/proc/{pid}/setgroups", "deny")
        _write(f"/proc/{pid}/uid_map", f"{own} {uid} 1{extra}")
        _write(f"/proc/{pid}/gid_map", f"{own} {gid} 1{extra}")
    except OSError as error:
        raise Refused("users of the new namespace", error.strerror or str(error)) from error
    return other


def is_mapped(path: str) -> bool:
    """Whether NOBODY exists where this process is: not in a container of one user."""
    with open(path) as lines:
        ranges = [[int(x) for x in line.split()] for line in lines]
    return any(start <= NOBODY < start + length for start, _, length in ranges)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def enter_root(visible: Sequence[str], disk_bytes: int, num_files: int) -> None:
    """Make a root folder that holds `visible` read-only, four devices and an empty HOME in memory; nothing else.

    There is no /proc: no other process, no memory of this one, no settings of the kernel.
    """
    usable = [d for d in MOUNT_POINTS if os.path.isdir(d) and not any(p.startswith(d + "/") for p in visible)]
    if not usable:
        raise Refused("a folder to mount on", f"none of {', '.join(MOUNT_POINTS)} is free")
    root = usable[0]
    try:
        _mount("none", "/", "", RECURSIVE | PRIVATE)
        _mount("tmpfs", root, "tmpfs", NO_SETUID | NO_DEVICES, "mode=755,size=1m")
        for path in outermost(visible):
            os.makedirs(root + path)
            _mount(path, root + path, "", BIND | RECURSIVE)
        os.mkdir(root + "/dev")
        for path in DEVICES:
            os.mknod(root + path, 0o600 | stat.S_IFREG)
            _mount(path, root + path, "", BIND)
        os.mkdir(root + HOME)
        if not os.path.exists(root + "/tmp"):
            os.symlink(HOME, root + "/tmp")
        for point in _mount_points(root):
            _make_read_only(point)
        options = f"mode=777,size={disk_bytes},nr_inodes={num_files + 1}"
        _mount("tmpfs", root + HOME, "tmpfs", NO_SETUID | NO_DEVICES, options)
        os.chdir(root)
        check("pivot_root", libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"."))
        check("leaving the old root", libc.umount2(b".", DETACH))
        os.chdir(HOME)
    except OSError as error:
        raise Refused("a root folder", str(error)) from error


def outermost(paths: Sequence[str]) -> list[str]:
    """The existing folders of `paths` that lie in no other of them."""
    out: list[str] = []
    for path in sorted({os.path.abspath(p) for p in paths if os.path.isdir(p)}, key=len):
        if not any(path.startswith(other.rstrip("/") + "/") for other in out):
            out.append(path)
    return out


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    arguments = [part.encode() or None for part in (source, target, kind)]
    result = libc.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None)
    check(f"mount of {source} on {target}", result)


def _mount_points(root: str) -> list[str]:
    """The newest mount on `root`, and all below it: a bound folder brings the mounts that it has inside."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        mounts = [line.split(" ")[:5] for line in lines]  # id, id of the parent, device, root, mount point
    ids = {[own for own, _, _, _, point in mounts if point == root][-1]}
    while more := {own for own, parent, *_ in mounts if parent in ids} - ids:
        ids |= more
    points = [point for own, *_, point in mounts if own in ids]
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        points = [p.replace(code, character) for p in points]
    return points


def _make_read_only(point: str) -> None:
    """Other flags of a mount are locked in a namespace of an ordinary user: they must be repeated."""
    now = os.statvfs(point).f_flag
    flags = now & KEPT_FLAGS | (RELATIME if now & STAT_RELATIME else 0)
    _mount("none", point, "", REMOUNT | BIND | READ_ONLY | NO_SETUID | flags)


def limit(limits: dict[str, int]) -> None:
    """Resource limits of this process, which its own threads share; it may lower but not raise them."""
    values = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_FSIZE: limits["disk_bytes"],
        resource.RLIMIT_NOFILE: limits["num_open_files"],
        # of this user in this namespace, since Linux 5.14: guard and init are two of them for an ordinary user
        resource.RLIMIT_NPROC: limits["num_threads"] + 2,
        resource.RLIMIT_STACK: 8 << 20,  # of each thread
        resource.RLIMIT_CORE: 1,  # byte: with 0 a program that the system pipes cores to would still be started
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 256,
    }
    try:
        for name, value in values.items():
            hard = resource.getrlimit(name)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(name, (value, value))
    except (OSError, ValueError) as error:
        raise Refused("resource limits", str(error)) from error


def counts_processes() -> bool:
    """Whether RLIMIT_NPROC holds for this process: not for the machine's root, whatever its number in a namespace."""
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


def drop_privileges(change_user: bool) -> None:
    """Become NOBODY where that is another user, and lose every capability for good."""
    try:
        if change_user:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
    except OSError as error:
        raise Refused("another group", error.strerror or str(error)) from error
    capability = 0
    while libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) == 0:
        capability += 1
    if capability == 0:
        raise Refused("dropping capabilities", os.strerror(ctypes.get_errno()))
    try:
        if change_user:
            os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError as error:
        raise Refused("another user", error.strerror or str(error)) from error
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    check("dropping capabilities", libc.capset(header, (ctypes.c_uint32 * 6)()))
    prctl("PR_SET_NO_NEW_PRIVS", PR_SET_NO_NEW_PRIVS, 1)
