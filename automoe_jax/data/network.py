"""Whether a server answers: asked before a library that would retry for minutes."""

import functools
import threading
import urllib.error
import urllib.parse
import urllib.request

SECONDS = 5.0


def reachable(url: str, seconds: float = SECONDS) -> bool:
    """Whether the server of a URL gives any HTTP answer within `seconds`."""
    parts = urllib.parse.urlsplit(url)
    return _answers(f"{parts.scheme}://{parts.netloc}/", seconds)


@functools.cache
def _answers(url: str, seconds: float) -> bool:
    answered = threading.Event()

    def ask():
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=seconds):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()  # it said no, so it is there
        except (OSError, ValueError):
            pass

    # In a thread of its own: looking up a name has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()
