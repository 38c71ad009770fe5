"""A process that decodes what it is told on its standard input.

Started as `python -m mhla_gen.media.decoder_worker`. Its parent may end it at any moment, which
is the only way to stop a decoder that hangs.
"""

import os
import pickle
import re
import sys

from mhla_gen.media import frames


def main() -> None:
    """Answer pickled `(function name, arguments)` with pickled `(True, result)` or an error."""
    requests = sys.stdin.buffer
    # FFmpeg and decord print to standard output and error; answers have a descriptor of their own.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, sys.stdout.fileno())
    os.dup2(silent, sys.stderr.fileno())
    while True:
        try:
            name, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = (True, getattr(frames, name)(*arguments))
        except Exception as error:  # decord raises whatever it likes about a broken file
            answer = (False, _reason(error))
        pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()


def _reason(error: Exception) -> str:
    """The last line of a message, without decord's places in its source."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^(\[\S+\] \S+: )+", "", lines[-1])


if __name__ == "__main__":
    main()
