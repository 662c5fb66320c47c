"""Child processes that answer requests: one JSON line each way, over stdin and stdout."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Child:
    """A process that runs `serve`. Use it in a `with`, or close it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], **popen: Any):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            **popen,
        )

    def ask(self, **request: Any) -> Any:
        """The answer to a request; `RuntimeError` where the child fails or ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"a child process ended with exit code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def close(self):
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *exc: object):
        self.close()


def serve(answer: Callable[[dict[str, Any]], Any]):
    """Answers requests until stdin ends; an exception is sent as the answer's error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what libraries print out of the answers
    for line in sys.stdin:
        try:
            reply = {"value": answer(json.loads(line))}
        except Exception as e:
            reply = {"error": f"{' '.join(sys.argv)}: {type(e).__name__}: {e}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
