"""Work that Ctrl-C must not cut in two.

A program that updates caches in place takes their buffers. Until each cache has been
given its new one, it has none: a KeyboardInterrupt in between would lose them all, for
a user who goes on, as in a notebook.

Tested by tests/core/test_interrupts.py.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Uninterrupted:
    """A context in which SIGINT waits for the end. Another thread has none to wait for.

    Only a handler of Python's kind is put off: by default it raises KeyboardInterrupt
    between any two instructions of the main thread.
    """

    __slots__ = ("_frame", "_handler", "_is_pending")

    def __enter__(self) -> Uninterrupted:
        self._handler = None
        self._is_pending = False
        # Not current_thread(), which makes an object of a thread that is torch's own,
        # and keeps it.
        if threading.get_ident() == threading.main_thread().ident:
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                # Before the other is replaced, so that __exit__ always puts it back.
                self._handler = handler
                signal.signal(signal.SIGINT, self._put_off)
        return self

    def _put_off(self, number: int, frame: FrameType | None) -> None:
        self._is_pending = True
        self._frame = frame

    def __exit__(self, *_: object) -> None:
        if self._handler is None:
            return
        signal.signal(signal.SIGINT, self._handler)
        if self._is_pending:
            self._handler(signal.SIGINT, self._frame)
