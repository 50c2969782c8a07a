"""The filter of system calls, interpreted: also for the architecture that this machine has not."""

import pytest

from mtp_jax.evaluation import sandbox_runner

ALLOWED = {  # name: (x86_64, aarch64)
    **{"read": (0, 63), "write": (1, 64), "mmap": (9, 222), "exit_group": (231, 94), "openat": (257, 56)},
    **{
        "socketpair": (53, 199),
        "futex": (202, 98),
        "getrandom": (318, 278),
        "kill": (62, 129),
        "prlimit64": (302, 261),
    },
}
ERROR_EPERM, ERROR_ENOSYS, ALLOW, KILL = 0x50001, 0x50026, 0x7FFF0000, 0x80000000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
COLUMN = {"x86_64": 0, "aarch64": 1}


def answer(machine, number, argument=0, audit=None, threads=True):
    """Action of the kernel on a call, by seccomp(2)."""
    memory = {0: number, 4: AUDIT[machine] if audit is None else audit, 16: argument & 0xFFFFFFFF}
    code, at, value = sandbox_runner.instructions(machine, threads), 0, 0
    while True:
        operation, yes, no, constant = code[at]
        if operation == 0x20:  # load a word
            value, at = memory[constant], at + 1
        elif operation == 0x06:  # return
            return constant
        else:
            holds = {0x15: value == constant, 0x35: value >= constant, 0x45: value & constant != 0}[operation]
            at += 1 + (yes if holds else no)


@pytest.mark.parametrize("machine", AUDIT)
def test_what_is_named_is_refused_and_the_rest_allowed(machine):
    refused = {numbers[COLUMN[machine]] for numbers in sandbox_runner.REFUSED.values()} - {None}
    special = {sandbox_runner.CLONE[COLUMN[machine]], sandbox_runner.CLONE3[COLUMN[machine]]}
    for number in set(range(sandbox_runner.NEWEST + 1)) - special:
        assert answer(machine, number) == (ERROR_EPERM if number in refused else ALLOW), number
    for number in range(sandbox_runner.NEWEST + 1, sandbox_runner.NEWEST + 100):
        assert answer(machine, number) == ERROR_ENOSYS
    assert not refused & {numbers[COLUMN[machine]] for numbers in ALLOWED.values()}


@pytest.mark.parametrize("machine", AUDIT)
def test_threads_are_no_processes(machine):
    clone, clone3 = sandbox_runner.CLONE[COLUMN[machine]], sandbox_runner.CLONE3[COLUMN[machine]]
    process, thread = 0x1200011, 0x3D0F00  # the flags of glibc's fork and of its pthread_create
    assert answer(machine, clone, process) == ERROR_EPERM and answer(machine, clone, thread) == ALLOW
    assert answer(machine, clone, thread, threads=False) == ERROR_EPERM
    assert answer(machine, clone3) == ERROR_ENOSYS


@pytest.mark.parametrize("machine", AUDIT)
def test_calls_numbered_otherwise_end_the_program(machine):
    assert answer(machine, 1, audit=0x40000003) == KILL  # 32-bit x86
    assert answer(machine, 1 | 0x40000000) == KILL  # x32


def test_numbers_are_the_systems_own():
    """The two columns as the kernel's headers have them, where they are installed."""
    import pathlib
    import re

    headers = {
        "x86_64": pathlib.Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        "aarch64": pathlib.Path("/usr/include/asm-generic/unistd.h"),
    }
    calls = sandbox_runner.REFUSED | {"clone": sandbox_runner.CLONE, "clone3": sandbox_runner.CLONE3} | ALLOWED
    if not any(path.is_file() for path in headers.values()):
        pytest.skip("the kernel's headers are not installed")
    for machine, path in headers.items():
        if not path.is_file():
            continue
        known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text()))
        for name, numbers in calls.items():
            number = numbers[COLUMN[machine]]
            if number is None or name in known:
                assert known.get(name) == (None if number is None else str(number)), (machine, name)
