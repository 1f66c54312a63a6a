"""Work that Ctrl-C, or another signal, must not cut in two.

A program that updates caches in place takes their buffers. Until each cache has been
given its new one, it has none: a KeyboardInterrupt in between would lose them all, for
a user who goes on, as in a notebook. So would what the handler of an alarm raises, or
one that ends a server.

Tested by tests/core/test_interrupts.py.
"""

from __future__ import annotations

# Without the enumerations that the module signal makes of numbers and handlers, which
# would take as long as all else that is done around a step.
import _signal  # type: ignore[import-not-found]
import signal
import threading
from collections.abc import Callable
from types import FrameType

# Those that come from outside, and whose handlers are likely to raise.
_NUMBERS = tuple(
    int(getattr(signal, f"SIG{name}"))
    for name in ("INT", "TERM", "ALRM", "HUP", "USR1", "USR2")
)


class Uninterrupted:
    """A context in which signals wait for the end. Another thread has none to wait for.

    Only handlers of Python's kind are put off: one runs, and may raise, between any two
    instructions of the main thread. By default that of SIGINT is the only one.
    """

    __slots__ = ("_handlers", "_pending")

    def __enter__(self) -> Uninterrupted:
        self._handlers: list[tuple[int, Callable]] = []
        self._pending: dict[int, tuple[Callable, FrameType | None]] = {}
        # Not current_thread(), which makes an object of a thread that is torch's own,
        # and keeps it.
        if threading.get_ident() == threading.main_thread().ident:
            try:
                for number in _NUMBERS:
                    handler = _signal.getsignal(number)
                    if callable(handler):
                        # Before it is replaced, so that it is always put back.
                        self._handlers.append((number, handler))
                        _signal.signal(number, self._put_off)
            except BaseException:  # raised by one that is not replaced yet
                self._restore()
                raise
        return self

    def _put_off(self, number: int, frame: FrameType | None) -> None:
        self._pending[number] = (dict(self._handlers)[number], frame)

    def _restore(self) -> None:
        try:
            while self._handlers:
                _signal.signal(*self._handlers[-1])
                self._handlers.pop()
        except BaseException:  # raised by one that has been put back
            self._restore()
            raise

    def __exit__(self, *_: object) -> None:
        if self._handlers:
            try:
                self._restore()
            finally:
                self._deliver()

    def _deliver(self) -> None:
        """Runs the handlers of what came, all of them, whatever they raise."""
        while self._pending:
            number, (handler, frame) = self._pending.popitem()
            try:
                handler(number, frame)
            finally:
                self._deliver()
