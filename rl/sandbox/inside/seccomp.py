"""The system calls that code in a sandbox may not make, as a classic BPF program.

A list of what is refused, not of what is allowed: it closes what namespaces and resource limits leave open, and takes
the kernel's rarer doors away from an attacker.

- more privilege: new namespaces, mounts, tracing, keys, modules, BPF, io_uring, userfaultfd;
- memory that no process's size shows, and so no limit sees: memfd, System V and POSIX IPC, shared anonymous mappings;
  and mappings that grow downwards, which RLIMIT_DATA does not count;
- sockets of any family but unix: vsock, for one, is in no network namespace;
- power over the supervisor, which has the same user id: limits, priority and affinity of another process.

A number past `LAST`, a system call younger than this list, does not exist (ENOSYS), nor does clone3, whose flags a
filter cannot read; the C library falls back on clone.
"""

from __future__ import annotations

import errno
import struct

# machine: (AUDIT_ARCH_*, index of each call's numbers below)
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
LAST = 450  # set_mempolicy_home_node, Linux 5.17: from 424 on, numbers are the same on every machine
X32 = 0x40000000  # x86_64's second table of calls begins here: refused with what is past LAST

REFUSED = {
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "setns": (308, 268), "unshare": (272, 97), "swapon": (167, 224), "swapoff": (168, 225),
    "reboot": (169, 142), "sethostname": (170, 161), "setdomainname": (171, 162), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "process_madvise": (440, 440), "process_mrelease": (448, 448), "pidfd_getfd": (438, 438),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "syslog": (103, 116), "acct": (163, 89),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "fanotify_init": (300, 262), "lookup_dcookie": (212, 18),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "move_pages": (279, 239), "migrate_pages": (256, 238), "personality": (135, 92), "vhangup": (153, 58),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "vmsplice": (278, 75),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122), "ioprio_set": (251, 30),
}  # fmt: skip
ONLY_X86 = {"iopl": 172, "ioperm": 173, "modify_ldt": 154, "uselib": 134, "ustat": 136, "sysfs": 139, "_sysctl": 156}
CLONE, CLONE3, SOCKET, SOCKETPAIR = (56, 220), (435, 435), (41, 198), (53, 199)
MMAP, PRLIMIT64, SETPRIORITY = (9, 222), (302, 261), (141, 140)

NEW_NAMESPACES = 0x7E020080  # every CLONE_NEW* that clone knows, CLONE_NEWTIME included
SHARED_ANONYMOUS, GROWS_DOWN = 0x21, 0x100  # of mmap's flags
AF_UNIX = 1

_LOAD, _EQUAL, _ABOVE, _BITS, _AND, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x54, 0x06
_NUMBER, _ARCH = 0, 4  # offsets in struct seccomp_data
_ALLOW, _KILL = 0x7FFF0000, 0x80000000


def _op(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, k)


def _refuse(reason: int) -> bytes:
    return _op(_RETURN, 0x00050000 | reason)


def _argument(index: int) -> bytes:
    return _op(_LOAD, 16 + 8 * index)  # the lower half: both machines are little-endian


def _case(number: int, *body: bytes) -> bytes:
    """`body`, which must return, where the call is `number`."""
    return _op(_EQUAL, number, no=len(body)) + b"".join(body)


def program(machine: str) -> bytes:
    """The filter for `machine` (as os.uname names it) as an array of struct sock_filter. KeyError: not known here."""
    arch, column = MACHINES[machine]
    numbers = [number[column] for number in REFUSED.values()] + (list(ONLY_X86.values()) if machine == "x86_64" else [])
    allow, denied = _op(_RETURN, _ALLOW), _refuse(errno.EPERM)
    family = (_argument(0), _op(_EQUAL, AF_UNIX, no=1), allow, _refuse(errno.EAFNOSUPPORT))
    return b"".join(
        [
            _op(_LOAD, _ARCH),
            _op(_EQUAL, arch, yes=1),
            _op(_RETURN, _KILL),
            _op(_LOAD, _NUMBER),
            _op(_ABOVE, LAST, no=1),  # X32 with it
            _refuse(errno.ENOSYS),
            _case(CLONE3[column], _refuse(errno.ENOSYS)),
            _case(CLONE[column], _argument(0), _op(_BITS, NEW_NAMESPACES, no=1), denied, allow),
            _case(SOCKET[column], *family),
            _case(SOCKETPAIR[column], *family),
            _case(
                MMAP[column],
                _argument(3),
                _op(_BITS, GROWS_DOWN, yes=2),
                _op(_AND, SHARED_ANONYMOUS),
                _op(_EQUAL, SHARED_ANONYMOUS, no=1),
                denied,
                allow,
            ),
            _case(PRLIMIT64[column], _argument(0), _op(_EQUAL, 0, no=1), allow, denied),
            _case(
                SETPRIORITY[column],  # of the caller alone, which can only lower it
                _argument(0),
                _op(_EQUAL, 0, no=3),
                _argument(1),
                _op(_EQUAL, 0, no=1),
                allow,
                denied,
            ),
            *(_case(number, denied) for number in numbers),
            allow,
        ]
    )
