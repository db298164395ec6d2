"""Runs a function in a child process that is stopped before every change it makes to files.

The kernel stops it: a seccomp filter tells this process of system calls before they are done, and waits
for an answer: that the call may go on, or with which error it ends. So nothing passes by unseen, whoever
makes the call: Python, NumPy, kernels in C++, safetensors and tokenizers in Rust, libraries in C, all
threads, and processes that the child starts. It tells of files that are opened to write or made, of every
write, of what is renamed, linked, removed, cut, made longer or synchronized, and of folders that are made
or removed. It does not tell of pages of a file that is mapped to be written, only of its opening and its
length, nor of what goes through io_uring (nothing here writes by either), nor of times and modes, which
are no bytes.

This needs Linux 5.9 or newer, on x86-64 or ARM64; no rights but those of any user.
"""

import ctypes
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class _Call(NamedTuple):
    """A system call: its numbers, None where there is none, and what its arguments are.

    p is a path, after the folder d that it starts from, if any; o an open file, f the flags of an opening,
    h where they are in memory; _ is anything else.
    """

    x86_64: int | None
    aarch64: int | None
    arguments: str


_CALLS = {
    "open": _Call(2, None, "pf"),
    "openat": _Call(257, 56, "dpf"),
    "openat2": _Call(437, 437, "dph"),
    "creat": _Call(85, None, "p"),
    "rename": _Call(82, None, "pp"),
    "renameat": _Call(264, 38, "dpdp"),
    "renameat2": _Call(316, 276, "dpdp"),
    "link": _Call(86, None, "pp"),
    "linkat": _Call(265, 37, "dpdp"),
    "symlink": _Call(88, None, "_p"),
    "symlinkat": _Call(266, 36, "_dp"),
    "unlink": _Call(87, None, "p"),
    "unlinkat": _Call(263, 35, "dp"),
    "rmdir": _Call(84, None, "p"),
    "mkdir": _Call(83, None, "p"),
    "mkdirat": _Call(258, 34, "dp"),
    "mknod": _Call(133, None, "p"),
    "mknodat": _Call(259, 33, "dp"),
    "truncate": _Call(76, 45, "p"),
    "ftruncate": _Call(77, 46, "o"),
    "fallocate": _Call(285, 47, "o"),
    "fsync": _Call(74, 82, "o"),
    "fdatasync": _Call(75, 83, "o"),
    "sync_file_range": _Call(277, 84, "o"),
    "write": _Call(1, 64, "o"),
    "pwrite": _Call(18, 68, "o"),
    "writev": _Call(20, 66, "o"),
    "pwritev": _Call(296, 70, "o"),
    "pwritev2": _Call(328, 287, "o"),
    "sendfile": _Call(40, 71, "o"),
    "copy_file_range": _Call(326, 285, "__o"),
    "splice": _Call(275, 76, "__o"),
}
WRITES = (
    "write",
    "pwrite",
    "writev",
    "pwritev",
    "pwritev2",
    "sendfile",
    "copy_file_range",
    "splice",
)
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_NEW = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC  # flags of openings that may change a file
_AT_FDCWD = -100
# From linux/seccomp.h, linux/filter.h and linux/prctl.h.
_NO_NEW_PRIVS, _SET_MODE_FILTER, _NEW_LISTENER, _CONTINUE = 38, 1, 1 << 3, 1
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_LOAD, _IF_EQUAL, _IF_ANY, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _TELL = 0x7FFF0000, 0x7FC00000
_TOLD, _ANSWER = struct.Struct("QIIiIQ6Q"), struct.Struct("QqiI")
KILL = -1


@dataclass(frozen=True)
class Event:
    """A system call that changes files, and the paths it names, below the folder that is watched."""

    call: str
    paths: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.call} {' -> '.join(self.paths)}"


Answer = Callable[[int, Event], int]


def missing() -> str | None:
    """Say what is missing here to stop processes so; None if nothing is."""
    if platform.machine() not in _SECCOMP or platform.system() != "Linux":
        return "only Linux on x86-64 and ARM64 stops processes before system calls"
    try:
        run(lambda: 0, Path("/"))
    except OSError as error:
        return f"the kernel does not stop processes before system calls: {error}"
    return None


def run(
    function: Callable[[], int], folder: Path, answer: Answer = lambda number, event: 0
) -> tuple[int, list[Event]]:
    """Run a function in a child, which does what `answer` says before each event.

    Parameters
    ----------
    function
        Returns the child's exit status.
    folder
        Only events below it count; without links in its path.
    answer
        Is given the number of an event, from 0, and the event. Returns 0 to let it happen, `KILL`, or
        the number of the error that it ends with instead, such as ``errno.ENOSPC``.

    Returns
    -------
    int
        The exit status, negative after a signal.
    list
        The events, the one before which the child was killed included.
    """
    ours, theirs = socket.socketpair()
    with warnings.catch_warnings():  # of threads here, which the child does not need
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        ours.close()
        os.setsid()  # so that processes it starts are killed, too
        try:
            listener = _listen()
        except OSError as error:
            theirs.send(struct.pack("i", error.errno or 1))
            os._exit(1)
        socket.send_fds(theirs, [struct.pack("i", 0)], [listener])
        os.close(listener)
        theirs.close()
        status = 1
        try:
            status = function()
        finally:
            os._exit(status)
    theirs.close()
    with ours:
        message, descriptors, _, _ = socket.recv_fds(ours, 4, 1)
    if not descriptors:
        os.waitpid(child, 0)
        number = struct.unpack("i", message)[0]
        raise OSError(number, os.strerror(number))
    (listener,) = descriptors
    events: list[Event] = []
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while not poll.poll()[0][1] & select.POLLHUP:  # until nobody is left
        told = bytearray(_TOLD.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, told)
        except OSError:  # of a process that has just been killed
            continue
        identity, process, _, number, _, _, *arguments = _TOLD.unpack(told)
        event, what = None, 0
        with suppress(OSError):  # calls with paths or files that are none have errors of their own
            event = _event(process, number, arguments, folder)
        if event is not None:
            events.append(event)
            what = answer(len(events) - 1, event)
        if what == KILL:
            os.killpg(child, signal.SIGKILL)
            continue
        told = bytearray(_ANSWER.pack(identity, 0, -what, 0 if what else _CONTINUE))
        with suppress(OSError):
            fcntl.ioctl(listener, _SEND, told)
    os.close(listener)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), events


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def _names() -> dict[int, str]:
    """Return the calls here by their numbers."""
    numbers = {name: getattr(call, platform.machine()) for name, call in _CALLS.items()}
    return {number: name for name, number in numbers.items() if number is not None}


def _listen() -> int:
    """Have the kernel tell of this process's calls, and return the open file it does so by."""
    steps = [(_LOAD, 0, 0, 0)]  # the call's number
    for number, name in _names().items():
        if "f" in _CALLS[name].arguments:
            steps += [
                (_IF_EQUAL, 0, 4, number),
                (_LOAD, 0, 0, 16 + 8 * _CALLS[name].arguments.index("f")),
                (_IF_ANY, 0, 1, _NEW),
                (_RETURN, 0, 0, _TELL),
                (_RETURN, 0, 0, _ALLOW),
            ]
        else:
            steps += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _TELL)]
    steps.append((_RETURN, 0, 0, _ALLOW))
    instructions = (_Instruction * len(steps))(*(_Instruction(*step) for step in steps))
    program = _Program(len(steps), instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    listener: int = libc.syscall(
        _SECCOMP[platform.machine()], _SET_MODE_FILTER, _NEW_LISTENER, ctypes.byref(program)
    )
    if listener < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return listener


def _event(process: int, number: int, arguments: list[int], folder: Path) -> Event | None:
    """Return what a process is about to do; None if it is not below the folder."""
    call = _names()[number]
    root = f"{folder}".rstrip("/") + "/"
    start, paths = f"/proc/{process}/cwd", list[str]()
    for place, argument in zip(_CALLS[call].arguments, arguments, strict=False):
        if place == "d":
            at = ctypes.c_int(argument & 0xFFFFFFFF).value
            start = f"/proc/{process}/" + ("cwd" if at == _AT_FDCWD else f"fd/{at}")
        elif place == "o":
            paths.append(os.readlink(f"/proc/{process}/fd/{argument & 0xFFFFFFFF}"))
        elif place == "p":
            path = os.fsdecode(_memory(process, argument).split(b"\0")[0])
            paths.append(os.path.normpath(os.path.join(os.readlink(start), path)))
            start = f"/proc/{process}/cwd"
        elif place == "h" and not struct.unpack("Q", _memory(process, argument)[:8])[0] & _NEW:
            return None
    if not any(path.startswith(root) for path in paths):
        return None
    return Event(call, tuple(path.removeprefix(root) for path in paths))


def _memory(process: int, address: int, size: int = 4096) -> bytes:
    """Return what another process holds from an address to the end of its page, or of the next one."""
    size += -address % 4096  # a string may go on in the next page, which may not be there
    with open(f"/proc/{process}/mem", "rb", buffering=0) as file:
        try:
            return os.pread(file.fileno(), size, address)
        except OSError:
            return os.pread(file.fileno(), -address % 4096 or 4096, address)
