"""A process that decodes what it reads from standard input.

Started as `python -m mhla_gen.media.decoder_worker`. Its parent may end it at any moment, which
is the only way to stop a decoder that hangs.
"""

import os
import pickle
import sys
import traceback

from mhla_gen.media import frames
from mhla_gen.media.pictures import UnreadableImageError


def main() -> None:
    """Answer pickled `(function name, arguments)` with pickled `(True, result)`.

    What cannot be read is answered with False and its error, another error with None and where.
    """
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
        except UnreadableImageError as error:
            answer = (False, error)
        except Exception:  # a mistake of ours, which the parent raises
            answer = (None, traceback.format_exc())
        pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    main()
