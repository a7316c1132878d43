"""The process in which a model's code runs: cells of one stateful session as in Jupyter, or one whole program.

It is hostile from its first line of foreign code on; nothing that it says is more than a claim about itself.
"""

from __future__ import annotations

import ast
import fcntl
import io
import linecache
import os
import signal
import socket
import sys
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import frames

MAX_ERROR = 500  # characters
MAX_FRAMES = 8  # of a traceback
MAX_REPR = 100_000  # characters of a value that are written out; the supervisor cuts further


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:MAX_ERROR]
    except BaseException as second:  # a hostile __str__
        return f"{type(error).__name__}: (its text raised {type(second).__name__})"[:MAX_ERROR]


def _show(error: BaseException) -> None:
    """Writes the traceback's last frames, without those of this file."""
    try:
        shown = traceback.TracebackException(type(error), error, error.__traceback__, limit=-MAX_FRAMES, compact=True)
        shown.stack = traceback.StackSummary.from_list([f for f in shown.stack if f.filename != __file__])
        sys.stderr.write("".join(shown.format()))
    except BaseException:  # out of memory, or an error that will not be shown
        os.write(2, (_describe(error) + "\n").encode(errors="replace"))


def _register(source: str, name: str) -> None:
    """Lets tracebacks show the lines."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # closed or replaced by the code
            continue


class Interpreter:
    """Cells that share their variables. `output`: a descriptor of the pipe, from which 1 and 2 are made anew each time,
    since a cell may have closed or replaced them."""

    def __init__(self, output: int) -> None:
        self.output = output
        self.cells = 0
        self.in_cell = False
        self.was_interrupted = False
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        self.variables: dict[str, Any] = module.__dict__

    def interrupted(self, *_: object) -> None:
        self.was_interrupted = True
        if self.in_cell:
            raise KeyboardInterrupt

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        signal.signal(signal.SIGINT, self.interrupted)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        self.in_cell = True
        try:
            yield
        finally:
            self.in_cell = False

    def _wire_output(self) -> None:
        _flush()
        for standard in (1, 2):
            os.dup2(self.output, standard)
        _open_output()

    def _reap(self) -> None:
        """After an interrupt, for which the supervisor killed the code's children: the dead count as processes."""
        self.was_interrupted = False
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return

    def _execute(self, code: str, name: str) -> None:
        tree = compile(code, name, "exec", int(ast.PyCF_ONLY_AST), dont_inherit=True)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec", dont_inherit=True), self.variables)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), self.variables)
            if value is not None:
                self.variables["_"] = value
                print(repr(value)[:MAX_REPR])

    def run(self, code: str) -> str | None:
        """Runs a cell; what it raised, or None."""
        self.cells += 1
        self._wire_output()
        if self.was_interrupted:
            self._reap()
        name = f"<cell {self.cells}>"
        error: BaseException | None = None
        try:
            with self._interruptible():
                try:
                    _register(code, name)
                    self._execute(code, name)
                except BaseException as raised:  # SystemExit too: a cell that exits leaves the session alive
                    error = raised
        except KeyboardInterrupt as raised:  # it came between the two
            error = raised
        if error is None:
            _flush()
            return None
        self._wire_output()
        _show(error)
        _flush()
        error.__traceback__ = None  # what the frames hold may go
        return _describe(error)


class _Errors(io.TextIOWrapper):
    """Standard error, which comes after whatever was printed before it."""

    def write(self, text: str) -> int:
        if sys.__stdout__ is not None and not sys.__stdout__.closed:
            sys.__stdout__.flush()
        return super().write(text)


def _open_output() -> None:
    def wrap(kind: type[io.TextIOWrapper], number: int) -> io.TextIOWrapper:
        raw = open(number, "wb", closefd=False)
        return kind(raw, encoding="utf-8", errors="replace", line_buffering=True)

    sys.stdout = sys.__stdout__ = wrap(io.TextIOWrapper, 1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = wrap(_Errors, 2)  # type: ignore[misc]


def _wire(stdin: int, stdout: int, stderr: int) -> None:
    """Makes these the standard streams."""
    for standard, descriptor in enumerate((stdin, stdout, stderr)):
        os.dup2(descriptor, standard)
    _open_output()
    opened = open(0, encoding="utf-8", errors="replace", closefd=False)
    sys.stdin = sys.__stdin__ = opened  # type: ignore[misc]


def serve(channel: socket.socket, output: int, max_request: int) -> None:
    """Answers {"id", "code"} with {"id", "error"} until the supervisor is gone."""
    _wire(os.open("/dev/null", os.O_RDONLY), output, output)
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (channel.detach(), output)]  # out of the way of each other
    keep, spare = os.dup2(moved[0], 3, inheritable=False), os.dup2(moved[1], 4, inheritable=False)
    os.closerange(5, 1 << 10)
    own = os.getpid()
    interpreter = Interpreter(spare)
    signal.signal(signal.SIGINT, interpreter.interrupted)
    received = bytearray()
    while True:
        request = frames.take(received, max_request)
        if request is None:
            more = os.read(keep, 1 << 16)
            if not more:
                os._exit(0)
            received += more
            continue
        error = interpreter.run(request["code"])
        if os.getpid() != own:
            os._exit(0)  # a fork that ran on to the cell's end: the answer is its parent's
        answer = frames.pack({"id": request["id"], "error": error})
        while answer:
            answer = answer[os.write(keep, answer) :]


def run_program(source: str, stdin: int, stdout: int, stderr: int) -> None:
    """Runs `source` as `python program.py` would, and leaves as that would."""
    _wire(stdin, stdout, stderr)
    os.closerange(3, 1 << 10)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    try:
        _register(source, "program.py")
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        _flush()
        _show(error)
        sys.exit(1)
