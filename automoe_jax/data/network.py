"""Tests that a server answers, before a library retries for minutes."""

import functools
import threading
import urllib.error
import urllib.parse
import urllib.request

SECONDS = 5.0


def reachable(url: str, seconds: float = SECONDS) -> bool:
    """True if the server of a URL gives any HTTP answer within `seconds`."""
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
            answered.set()  # an error status is an answer
        except (OSError, ValueError):
            pass

    # In its own thread, because a DNS look-up has no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()
