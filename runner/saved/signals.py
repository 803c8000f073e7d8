"""The signals that end a run: turned into exceptions, but never while something must not be interrupted."""

import signal
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C that ends the run."""

    def __init__(self, number):
        super().__init__()
        self.number = number


class DeferredSignals:
    """Turns the signals that end a run into KeyboardInterrupt or Terminated, but never within `deferred`."""

    NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def __init__(self):
        self.handlers, self.is_deferring, self.pending = {}, False, None

    def install(self):
        """Handle the signals that are not ignored. Only the main thread can."""
        for number in self.NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self.receive)

    def uninstall(self):
        """Restore the handlers that were there before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        """The handler: end the run now, or when nothing must wait any more."""
        self.pending = self.pending or number
        if not self.is_deferring:
            self.end_run()

    def end_run(self):
        """Raises KeyboardInterrupt or Terminated."""
        self.is_deferring = True  # a second signal must not disturb what the first one has started
        raise KeyboardInterrupt if self.pending == signal.SIGINT else Terminated(self.pending)

    @contextmanager
    def deferred(self, stay=False):
        """Signals wait until this is over; with `stay` they go on waiting, until a later call without is over."""
        self.is_deferring = True
        try:
            yield
        finally:
            self.is_deferring = stay
        if self.pending is not None and not stay:
            self.end_run()
