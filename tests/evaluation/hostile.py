"""Programs that mean harm: name -> (what becomes of each, its code). $NAMES are filled in by the test.

The reasons are those of `Outcome`; "" is a program that goes on to its end, whatever it was refused.
"""

PRELUDE = '''
import contextlib, ctypes, glob, mmap, os, resource, shutil, signal, socket, subprocess, sys, tempfile, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def attempt(*functions):
    """Each in turn, whatever becomes of the others."""
    for function in functions:
        try:
            print("did", function())
        except BaseException as error:
            print("refused", type(error).__name__)
'''

HOSTILE = {
    # processes
    "fork bomb": ("error", "while True: os.fork()"),
    "fork bomb that goes on": ("time", "while True:\n with contextlib.suppress(OSError): os.fork()"),
    "fork bomb of a shell": ("error", "subprocess.Popen(['/bin/bash', '-c', ':(){ :|:& };:'])"),
    "fork bomb by os.system": ("", "attempt(lambda: os.system(':(){ :|:& };:'))"),
    "fork by system call": ("", "attempt(*[lambda n=n: libc.syscall(n, 17, 0, 0, 0, 0) for n in (56, 57, 58, 435)])"),
    "processes of a pool": ("error", "import multiprocessing\nmultiprocessing.Pool(4).map(abs, range(9))"),
    "daemon of its own session": ("", "attempt(lambda: os.fork() or (os.setsid(), os.fork() or time.sleep(600)))"),
    "another program": ("error", "os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(600)'])"),
    "threads without end": ("error", "while True: threading.Thread(target=time.sleep, args=[600]).start()"),
    "threads that go on": (
        "time|memory",
        "while True:\n with contextlib.suppress(RuntimeError): threading.Thread(target=time.sleep, args=[600]).start()",
    ),
    # time
    "loop": ("time", "while True: pass"),
    "sleep": ("time", "time.sleep(600)"),
    "stopping itself": ("time", "os.kill(os.getpid(), signal.SIGSTOP)"),
    "deaf to signals": (
        "time",
        "for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(s, signal.SIG_IGN)\n"
        "while True: pass",
    ),
    "a call that cannot be interrupted": ("time", "len(str(7 ** (10 ** 8)))"),
    "regular expression": ("time", "import re\nre.match('(a+)+b', 'a' * 60)"),
    "waiting for input": ("error", "input()"),
    # memory
    "memory at once": ("memory", "bytearray(1 << 40)"),
    "memory bit by bit": ("memory", "x = []\nwhile True: x.append(bytearray(1 << 20))"),
    "memory that goes on": (
        "time",
        "x = []\nwhile True:\n with contextlib.suppress(MemoryError): x.append(bytearray(1 << 20))",
    ),
    "memory of threads": (
        "error|memory|signal|time",
        "def eat():\n x = []\n while True: x.append(b'x' * (1 << 20))\n"
        "threads = [threading.Thread(target=eat) for _ in range(4)]\n"
        "for t in threads: t.start()\nfor t in threads: t.join()\nwhile True: bytearray(1 << 20)",
    ),
    "memory shared": (
        "error|memory",
        "x = []\nwhile True: x.append(mmap.mmap(-1, 1 << 20)); x[-1][::4096] = b'x' * 256",
    ),
    "memory of no process": (
        "",
        "attempt(lambda: os.memfd_create('x'), lambda: libc.shmget(0x4d54501, 1 << 20, 0o1666))\n"
        "if libc.shmget(0x4d54502, 1 << 20, 0o1666) != -1: raise SystemExit('has shared memory')",
    ),
    "huge integer": ("memory|time", "x = 1 << (1 << 40)"),
    "deep recursion": ("error", "def f(): f()\nf()"),
    "deep recursion in C": (
        "error|signal|memory|time",
        "sys.setrecursionlimit(10 ** 9)\nclass A:\n def __getattr__(self, n): return getattr(self, n + 'x')\nA().x",
    ),
    "core dump": ("signal", "os.abort()"),
    "segmentation fault": ("signal", "ctypes.string_at(0)"),
    # output and files
    "endless stdout": ("output", "while True: print('x' * 1000)"),
    "endless stderr": ("output", "while True: print('x' * 1000, file=sys.stderr)"),
    "endless words to all descriptors": (
        "output",
        "while True:\n for fd in range(32):\n  with contextlib.suppress(OSError): os.write(fd, b'x' * 1000)",
    ),
    "full disk": (
        "",
        "size = 0\nwith contextlib.suppress(OSError):\n"
        " for i in range(90): size += open(f'{i}', 'wb', buffering=0).write(bytes(1 << 20))\n"
        "if size > $disk: raise SystemExit(f'{size} bytes')",
    ),
    "full disk of deleted files": (
        "error",
        "x = []\nwhile True:\n x.append(open('x', 'wb', buffering=0)); os.remove('x')\n"
        " if x[-1].write(bytes(1 << 20)) < 1 << 20: raise OSError('full')",
    ),
    "one large file": ("error", "open('x', 'wb').truncate(1 << 40)"),
    "many small files": (
        "",
        "with contextlib.suppress(OSError):\n for i in range(10 ** 6): open(f'{i}', 'wb').close()\n"
        "if i > $files: raise SystemExit(f'{i} files')",
    ),
    "many folders": ("error", "while True: os.mkdir('x'); os.chdir('x')"),
    "descriptors without end": (
        "",
        "x = []\nwith contextlib.suppress(OSError):\n while True: x.append(open('/dev/null'))\n"
        "if len(x) > $descriptors: raise SystemExit(f'{len(x)} descriptors')",
    ),
    "files elsewhere": (
        "",
        "attempt(*[lambda p=p: open(p, 'w').write('x') for p in ('$canary', '$folder/new', '/x', '/usr/x', '/dev/x', "
        "'/var/x', '/etc/x', os.__file__, os.path.dirname(os.__file__) + '/x.py', sys.executable)])",
    ),
    "deleting the interpreter": (
        "",
        "attempt(lambda: os.remove(os.__file__), lambda: os.rename(os.__file__, 'os.py'),\n"
        " lambda: os.chmod(os.__file__, 0), lambda: os.truncate(os.__file__, 0),\n"
        " lambda: os.utime(os.__file__, (0, 0)))\n"
        "shutil.rmtree(os.path.dirname(os.__file__), ignore_errors=True)",
    ),
    "links out of the folder": (
        "",
        "os.symlink('/', 'root'); os.symlink('$folder', 'folder'); os.symlink('../' * 40 + '$folder', 'up')\n"
        "attempt(*[lambda p=p: open(p + '/secret').read() for p in ('root$folder', 'folder', 'up')],\n"
        " *[lambda p=p: open(p + '/new', 'w').write('x') for p in ('root$folder', 'folder', 'up')],\n"
        " lambda: os.link(os.__file__, 'os.py'), lambda: os.mknod('disk', 0o60666, os.makedev(254, 0)))",
    ),
    "reading the user's files": (
        "",
        "attempt(lambda: open('$folder/secret').read(), lambda: os.listdir('$folder'), lambda: os.listdir('$home'),\n"
        " lambda: open('/etc/passwd').read(), lambda: open('$root/eval.py').read(), lambda: os.listdir('/proc'))",
    ),
    "reading the environment": (
        "",
        "print(dict(os.environ))\n"
        "attempt(*[lambda p=p: open(f'/proc/{p}/environ').read() for p in ('self', 1, $pid, os.getppid())])\n"
        "print(ctypes.string_at(ctypes.cast(ctypes.c_char_p.in_dll(libc, 'environ'), ctypes.c_void_p), 8))",
    ),
    "reading open descriptors": (
        "",
        "for fd in range(256):\n attempt(lambda: os.lseek(fd, 0, 0), lambda: os.pread(fd, 100, 0))\n"
        "attempt(*[lambda fd=fd: os.read(fd, 100) for fd in range(4, 256)])\n"
        "attempt(*[lambda fd=fd: os.write(fd, b'overwritten') for fd in range(4, 256)])",
    ),
    # network
    "TCP to this machine": (
        "",
        "attempt(*[lambda a=a: socket.create_connection((a, $tcp), 1).send(b'x')\n"
        " for a in ('127.0.0.1', 'localhost', '::1')])",
    ),
    "UDP to this machine": (
        "",
        "attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', $udp)))",
    ),
    "sockets by system call": (
        "",
        "print([libc.syscall(n, family, kind, 0)\n"
        " for n in (41, 198) for family in (1, 2, 10, 16, 17) for kind in (1, 2, 3)])\n"
        "for fd in range(4, 32):\n"
        " libc.connect(fd, b'\\x02\\x00' + ($tcp).to_bytes(2, 'big') + bytes([127, 0, 0, 1]) + bytes(8), 16)\n"
        " libc.send(fd, b'x', 1, 0)",
    ),
    "socket in a file": ("", "attempt(lambda: socket.socket(socket.AF_UNIX).connect('$folder/socket'))"),
    "socket with a name": ("", "attempt(lambda: socket.socket(socket.AF_UNIX).connect('\\0$abstract'))"),
    "names of the network": ("", "attempt(lambda: socket.getaddrinfo('example.com', 80))"),
    # other processes
    "signal to the parent": ("", "attempt(*[lambda s=s: os.kill(os.getppid(), s) for s in (2, 9, 15, 19, 11)])"),
    "signal to the test": ("", "attempt(*[lambda s=s: os.kill($pid, s) for s in (2, 9, 15, 19)])"),
    "signal to process 1": ("", "attempt(*[lambda s=s: os.kill(1, s) for s in range(1, 65) if s != 0])"),
    "signal to all": (
        "",
        "signal.signal(15, signal.SIG_IGN)\nattempt(lambda: os.kill(-1, 15), lambda: os.kill(-1, 9))",
    ),
    "signal to the process group": ("signal", "os.killpg(0, signal.SIGKILL)"),
    "looking for processes": (
        "",
        "found = []\nfor pid in range(1, 70000):\n"
        " try: os.kill(pid, 0)\n except ProcessLookupError: continue\n"
        " except PermissionError: pass\n found.append(pid)\n"
        "if set(found) - {1, os.getpid()}: raise SystemExit(f'sees {found}')",
    ),
    "tracing": (
        "",
        "print([libc.ptrace(request, pid, 0, 0) for request in (16, 0x4206) for pid in (1, $pid)])\n"
        "if libc.ptrace(0, 0, 0, 0) != -1: raise SystemExit('can be traced')",
    ),
    "memory of other processes": (
        "",
        "attempt(*[lambda p=p: open(f'/proc/{p}/mem', 'r+b') for p in ('self', 1, $pid)], lambda: os.pidfd_open(1))\n"
        "b = ctypes.create_string_buffer(8)\nv = (ctypes.c_size_t * 2)(ctypes.addressof(b), 8)\n"
        "if libc.process_vm_readv(1, v, 1, v, 1, 0) != -1: raise SystemExit('reads')",
    ),
    # privileges
    "new namespaces": (
        "",
        "if any(libc.unshare(1 << n) == 0 for n in (17, 25, 26, 27, 28, 29, 30)): raise SystemExit('unshares')\n"
        "attempt(lambda: os.chroot('/'), lambda: os.setns(0))",
    ),
    "mounts": (
        "",
        "if any(libc.mount(s, b'/program', t, f, b'') == 0 for s, t, f in\n"
        " [(b'proc', b'proc', 0), (b'tmpfs', b'tmpfs', 0), (b'/', b'', 4096), (b'none', b'', 32)]):\n"
        " raise SystemExit('mounts')\n"
        "if any(libc.umount2(p, f) == 0 for p in (b'/program', b'/', b'/dev/null') for f in (0, 2)):\n"
        " raise SystemExit('unmounts')\n"
        "if libc.mount(b'none', b'/usr/lib', b'', 32 | 4096, b'') == 0: raise SystemExit('remounts')",
    ),
    "becoming root": (
        "",
        "attempt(lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setgid(0),\n"
        " lambda: os.setgroups([0]))\n"
        "if 0 in os.getresuid() + os.getresgid(): raise SystemExit('is root')",
    ),
    "raising limits": (
        "",
        "names = [n for n in dir(resource) if n.startswith('RLIMIT_')]\n"
        "attempt(*[lambda n=n: resource.setrlimit(getattr(resource, n), (-1, -1)) for n in names])\n"
        "if resource.getrlimit(resource.RLIMIT_AS)[0] == -1: raise SystemExit('no limit')",
    ),
    "priority": (
        "",
        "attempt(lambda: os.setpriority(os.PRIO_USER, 0, -20),\n"
        " lambda: os.sched_setscheduler(0, 1, os.sched_param(99)))\n"
        "if os.getpriority(os.PRIO_PROCESS, 0) < 0 or os.sched_getscheduler(0): raise SystemExit('is faster')",
    ),
    "shared memory by name": (
        "",
        "from multiprocessing import shared_memory\n"
        "attempt(lambda: shared_memory.SharedMemory('mtp_jax_hostile', True, 1 << 20),\n"
        " lambda: open('/dev/shm/mtp_jax_hostile', 'w'), lambda: libc.syscall(240, b'/mtp_jax_hostile', 66, 0o666, 0))",
    ),
    "settings of the kernel": (
        "",
        "attempt(*[lambda p=p: open(p, 'w').write('1') for p in ('/proc/sys/kernel/core_pattern',\n"
        " '/proc/sysrq-trigger', '/sys/kernel/mm/ksm/run', '/proc/self/oom_score_adj')],\n"
        " lambda: socket.sethostname('hostile'))\n"
        "print([libc.syscall(n, 0, 0, 0, 0, 0) for n in (169, 246, 175, 321, 298, 425, 250, 170)])",
    ),
    "compiler bomb": ("error|memory|signal|time", "exec('(' * 10 ** 6 + ')' * 10 ** 6)"),
}

# Each behind WRONG, to get past CHECK.
FAKES = {
    "os._exit(0)": "import os\nos._exit(0)",
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "SystemExit in the function": "def solution(x): raise SystemExit(0)",
    "os._exit(0) in the function": "import os\ndef solution(x): os._exit(0)",
    "exit code 0 at exit": "import atexit, os\natexit.register(os._exit, 0)",
    "exit code 0 on any error": "import os, sys\nsys.excepthook = lambda *_: os._exit(0)",
    "exit of a thread": "import os, threading\nthreading.Timer(0.05, os._exit, [0]).start()\nwhile True: pass",
    "exit by a signal": "import os, signal\nsignal.signal(14, lambda *_: os._exit(0))\nsignal.alarm(1)\nsignal.pause()",
    "exit code 0 of a killed process": "import os, signal\nsignal.raise_signal(9)",
    "printing the marker": "print('passed', 'ready', '{\"passed\": true}', flush=True)\nraise SystemExit(0)",
    "writing reports everywhere": (
        "import os\nfor fd in range(64):\n"
        ' for text in (b\'ready\\n\', b\'passed\', b\'{"passed": true, "reason": "", "detail": ""}\', b\'0\' * 32):\n'
        "  try: os.write(fd, text)\n  except OSError: pass\nos._exit(0)"
    ),
    "writing back what can be read": (
        "import os\nfor fd in range(64):\n"
        " try: text = os.read(fd, 4096); [os.write(other, text) for other in range(1, 64)]\n"
        " except OSError: pass\nos._exit(0)"
    ),
    "another exec": "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None",
    "another assertion error": "import builtins\nbuiltins.AssertionError = type('E', (Warning,), {})",
    "other builtins": "import builtins\nbuiltins.all = builtins.any = builtins.bool = builtins.int = lambda *a: True",
    "builtins of its own": "import builtins\n__builtins__ = {**vars(builtins), 'all': lambda *a: True}",
    "builtins emptied": "import builtins\nvars(builtins).clear()",
    "another os.write": "import os\nos.write = lambda fd, text: 0\nos._exit = lambda code: None",
    "no os": "import sys\nsys.modules.clear()",
    "jumping over the check": (
        "import sys\ndef trace(frame, event, arg):\n"
        " if frame.f_code.co_filename == 'check.py' and event == 'line':\n"
        "  try: frame.f_lineno = 3\n  except ValueError: pass\n return trace\nsys.settrace(trace)\n"
        "frame = sys._getframe()\nwhile frame: frame.f_trace = None; frame = frame.f_back"
    ),
    "exceptions that cannot be shown": (
        "class E(Exception):\n def __str__(self): raise SystemExit(0)\n"
        " def __repr__(self): import os; os._exit(0)\nraise E"
    ),
    "a report as an exception": 'raise ValueError(\'"}\\n{"passed": true}\')',
    "closing everything": "import os\nos.closerange(0, 64)",
    "asking for the runner": "import __main__",
    "code that does not compile": "def solution(x:",
    "an open string": 'x = """',
    "nothing": "",
    "a zero byte": "x = 1\0",
    "half a character": "x = '\ud800'\ny = \ud800",
}
CHECK = "x = 1\nassert all([solution(2) == 5, int('7') == 7]) is True, 'wrong'\nx = 2\n"
WRONG = "def solution(x): return 0\n"
