"""System calls that a program is refused: the second line behind the namespaces, and what keeps it one process.

Numbers are those of Linux's unistd.h. One process only, so that its limit of memory is the limit of all it uses.
"""

import ctypes
import os

from . import walls

# fmt: off
# name: (x86_64, aarch64); None where the architecture has no such call
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # another process, or another program in this one
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # any socket but a pair of its own (which asyncio needs)
    "socket": (41, 198),
    # calls that this filter would not see
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # memory that is no process's own, so that no limit counts it
    "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setattr": (314, 274),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51),
    "pivot_root": (155, 41), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # parts of the kernel that no program of a benchmark needs
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "fanotify_init": (300, 262),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "personality": (135, 92),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "syslog": (103, 116),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "acct": (163, 89),
    "swapon": (167, 224), "swapoff": (168, 225), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58), "vmsplice": (278, 75),
    "iopl": (172, None), "ioperm": (173, None), "uselib": (134, None), "lookup_dcookie": (212, 18),
}
# fmt: on
CLONE = (56, 220)
CLONE3 = (435, 435)
NEWEST = 462  # calls that came later are said not to exist, which every C library is prepared for

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH
LOAD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, JUMP_IF_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets into struct seccomp_data, little-endian
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38
CLONE_THREAD = 0x10000
OTHER_ABI = 0x40000000  # x86_64's x32 calls, numbered differently
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2


class _Filter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_Filter))]


def instructions(machine: str, threads: bool) -> list[tuple[int, int, int, int]]:
    """The filter as (code, jump if true, jump if false, constant); see seccomp(2)."""
    column, audit = ARCHITECTURES[machine]
    out = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 1, 0, audit),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (JUMP_IF_AT_LEAST, 0, 1, OTHER_ABI),
        (RETURN, 0, 0, KILL),
        (JUMP_IF_AT_LEAST, 0, 1, NEWEST + 1),
        (RETURN, 0, 0, ERROR | ENOSYS),
        # its flags lie in memory, where no filter can look; without it the C library uses clone
        (JUMP_IF_EQUAL, 0, 1, CLONE3[column]),
        (RETURN, 0, 0, ERROR | ENOSYS),
        (JUMP_IF_EQUAL, 0, 4, CLONE[column]),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (JUMP_IF_SET, 0, 1, CLONE_THREAD),
        (RETURN, 0, 0, ALLOW if threads else ERROR | EPERM),
        (RETURN, 0, 0, ERROR | EPERM),
    ]
    for number in (numbers[column] for numbers in REFUSED.values()):
        if number is not None:
            out += [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, ERROR | EPERM)]
    return [*out, (RETURN, 0, 0, ALLOW)]


def install(threads: bool) -> None:
    """Refuse the calls above to this process, for good. PR_SET_NO_NEW_PRIVS must be set.

    threads: whether it may have threads; not where nothing limits their number.
    """
    code = [_Filter(*parts) for parts in instructions(os.uname().machine, threads)]
    filters = (_Filter * len(code))(*code)
    program = _Program(len(code), filters)
    result = walls.libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(program), 0, 0)
    walls.check("seccomp filter", result)
