"""Decoding in processes of its own, so that a file that hangs or crashes costs only itself.

Not a pool of the standard library, which cannot end one call, nor pebble's, which would leave the
FFmpeg that a killed worker had started running.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mhla_gen
from mhla_gen.media import ffmpeg
from mhla_gen.media.frames import ClipFacts, Crop
from mhla_gen.media.patience import decode_patiently
from mhla_gen.media.pictures import LastingError, UnreadableImageError


class Decoder:
    """Decodes videos in a few processes, with a time limit for each call.

    A file that seems damaged is read again, see `decode_patiently`.

    May be called from several threads; each call takes a free process or waits for one.

    Args:
        timeout: Seconds that one call may take. The process of a call that takes longer is killed.
        workers: Processes; they start when they are needed.
        setting: What messages call the limit.
    """

    def __init__(self, timeout: float = 60.0, workers: int = 1, setting: str = "clips.timeout"):
        self.timeout, self._setting = timeout, setting
        self._free: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        self._workers = workers
        for _ in range(workers):
            self._free.put(None)

    def facts(self, path: str | Path, tone_map: bool = False) -> ClipFacts:
        """Frame times and size of a file; see `clip_facts`.

        Raises:
            UnreadableImageError: If it cannot be decoded in time.
            ReadFailedError: If its file cannot be read.
        """
        return self._patiently("clip_facts", str(path), tone_map)

    def frames(
        self,
        path: str | Path,
        indices: Sequence[int],
        crop: Crop | None,
        tone_map: bool = False,
    ) -> np.ndarray:
        """uint8 `[len(indices), height, width, 3]`; see `read_frames`.

        Raises:
            UnreadableImageError: If it cannot be decoded in time.
            ReadFailedError: If its file cannot be read.
        """
        return self._patiently("read_frames", str(path), list(indices), crop, tone_map)

    def close(self) -> None:
        """End the processes."""
        for _ in range(self._workers):
            process = self._free.get()
            if process is not None:
                _end(process)
            self._free.put(None)

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _patiently(self, name: str, path: str, *arguments: Any) -> Any:
        return decode_patiently(lambda: self._call(name, path, *arguments), path)

    def _call(self, *request: Any) -> Any:
        process = self._free.get()
        try:
            if process is not None and process.poll() is not None:
                _end(process)
                process = None
            process = process or _start()
            answer = _ask(process, request, self.timeout, self._setting)
        except BaseException:
            # Also if it was interrupted: its answer must not be taken for that of the next call.
            if process is not None:
                _end(process)
            process = None
            raise
        finally:
            self._free.put(process)
        good, result = answer
        if good is None:
            raise RuntimeError(f"decoding {request[1]} failed:\n{result}")
        if not good:
            raise result
        return result


def _start() -> subprocess.Popen[bytes]:
    # -P: the folder that the user is in must not hide the modules of the standard library. So the
    # place of this package is named, for those who run it without having installed it.
    command = [sys.executable, "-P", "-m", "mhla_gen.media.decoder_worker"]
    places = [str(Path(mhla_gen.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    environment["IMAGEIO_FFMPEG_EXE"] = ffmpeg.executable()
    # In a session of its own, it is ended together with the programs that it runs.
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    if os.name == "posix" and process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _ask(
    process: subprocess.Popen[bytes], request: Any, timeout: float, setting: str
) -> tuple[bool | None, Any]:
    assert process.stdin is not None and process.stdout is not None
    late = threading.Event()

    def stop() -> None:
        late.set()
        _kill(process)

    timer = threading.Timer(timeout, stop)
    timer.start()
    try:
        name, *arguments = request
        pickle.dump((name, arguments), process.stdin)
        process.stdin.flush()
        return pickle.load(process.stdout)
    except (EOFError, OSError, pickle.UnpicklingError) as error:
        status = process.wait()
        if late.is_set():
            reason = f"takes longer than {timeout:g} s; {setting} allows more"
            raise LastingError(f"cannot be decoded ({reason})") from error
        reason = f"makes the decoder end with status {status}"
        raise UnreadableImageError(f"cannot be decoded ({reason})") from error
    finally:
        timer.cancel()
        timer.join()
        if late.is_set():
            # Killed after its answer: the next call must find it dead, not dying.
            process.wait()


def _end(process: subprocess.Popen[bytes]) -> None:
    _kill(process)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            # What is left of a request has nobody to read it.
            with contextlib.suppress(BrokenPipeError):
                stream.close()
