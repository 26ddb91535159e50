"""Turn signals into a request to stop, so that a program can first finish its files."""

import signal

NAMES = "SIGINT", "SIGTERM", "SIGHUP"  # Ctrl-C, kill, a closed terminal (Windows has no SIGHUP)


class StopRequest:
    """Note signals inside `with`; any number of them is one request.

    is_asked        whether a signal has come
    may_interrupt   set it where the first signal may raise KeyboardInterrupt, once
    """

    is_asked = may_interrupt = False

    def __enter__(self):
        kinds = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        # An ignored signal stays ignored: nohup asks for that.
        kinds = [kind for kind in kinds if signal.getsignal(kind) != signal.SIG_IGN]
        self.before = {kind: signal.signal(kind, self._ask) for kind in kinds}
        return self

    def __exit__(self, *_):
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def _ask(self, *_):
        self.is_asked = True
        if self.may_interrupt:
            self.may_interrupt = False
            raise KeyboardInterrupt
