"""SIGTERM and Ctrl-C: the first asks for a stop, the second ends the process at once, whatever it is doing."""

import os
import signal
import socket
import threading
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_NOTICE = b"\nstopping as soon as the run is saved; once more to stop at once\n"


class StopSignals:
    """Watches for SIGTERM and SIGINT as a context manager; outside the main thread it does nothing.

    Python runs a signal's handler in the main thread between two bytecodes: not while that waits for a device, for a
    compilation or for storage that hangs. What the interpreter's own handler does at once is to write the signal's
    number to a socket, so a thread that reads there can answer the second signal.

    Args:
        on_first: Called in the main thread, as soon as that is back in Python, for the first signal. It may raise.

    Attributes:
        seen: Whether there was a signal.
    """

    def __init__(self, on_first: Callable[[], None]):
        self.seen = False
        self._on_first = on_first
        self._handlers = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            receiver, self._sender = socket.socketpair()
            self._sender.setblocking(False)
            self._watcher = threading.Thread(target=self._watch, args=(receiver,), name="signals", daemon=True)
            self._watcher.start()
            self._former_sender = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        if self._handlers:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._former_sender)
            self._sender.close()
            self._watcher.join()

    def _handle(self, number: int, frame) -> None:
        if not self.seen:
            self.seen = True
            self._on_first()

    def _watch(self, receiver: socket.socket) -> None:
        with receiver:
            asked = False
            while content := receiver.recv(1):
                if content[0] in SIGNALS:
                    if asked:
                        os._exit(128 + content[0])
                    asked = True
                    os.write(2, _NOTICE)
