"""
How every command ends: 0 done, 2 a mistake of the user's (one line says what to do), 130 Ctrl-C, 143 SIGTERM.
"""
import signal
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can put right. The message says what was expected, what arrived and what to do next, on one line."""


class Terminated(BaseException):
    """SIGTERM arrived."""


def _terminate(signum, frame):
    raise Terminated


def run(main: Callable[[], None]) -> None:
    """Call `main` and leave the process with the right exit status; no traceback for what the user can put right."""
    signal.signal(signal.SIGTERM, _terminate)
    name = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = name.name if name else "nanochat_cl"
    try:
        main()
    except UserError as e:
        print(f"{name}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)
    except Terminated:
        print(f"{name}: terminated; the same command continues", file=sys.stderr)
        sys.exit(143)
