"""
How a script ends on something the user can put right: one line on stderr and exit status 2, no traceback.
"""
import sys
from collections.abc import Callable


class UserError(ValueError):
    """The message says what was expected, what arrived and what to do next, on one line."""


def run(main: Callable[[], None]) -> None:
    """Call `main`. Anything but a mistake of the user's keeps its traceback."""
    try:
        main()
    except (UserError, FileNotFoundError) as e:
        spec = getattr(sys.modules.get("__main__"), "__spec__", None)
        print(f"{spec.name if spec else 'nanochat'}: error: {e}", file=sys.stderr)
        sys.exit(2)
