"""Programs that know nothing of ours, in a Python process of their own: one for all, since imports take long."""

import json
import subprocess
import sys

SERVER = """
import contextlib, io, json, sys, traceback
answers = sys.stdout
for line in sys.stdin:
    code, sys.argv = json.loads(line)
    out, error = io.StringIO(), None
    with contextlib.redirect_stdout(out):
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            error = traceback.format_exc()
    print(json.dumps([out.getvalue(), error]), file=answers, flush=True)
"""


class Elsewhere:
    """That process. It can import the package, and a program may say that it did not."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, code, *words):
        """What ``code``, with these as ``sys.argv[1:]``, prints; AssertionError with the traceback if it fails."""
        self._process.stdin.write(json.dumps([code, ["-c", *map(str, words)]]) + "\n")
        self._process.stdin.flush()
        out, error = json.loads(self._process.stdout.readline())
        assert error is None, error
        return out

    def close(self):
        """End it."""
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()
