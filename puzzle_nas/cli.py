"""The command `puzzle`: its entry point, and what becomes of errors and Ctrl-C."""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
import threading
from typing import Any

import typer

# As help orders them.
# isort: off
from puzzle_nas.commands import runs, planning, parents, searching, quality, serving, families  # noqa: F401

# isort: on
from puzzle_nas.commands.app import app
from puzzle_nas.errors import PuzzleError

INTERRUPTED = 130
"""Exit code after Ctrl-C, by convention; typer returns exit codes instead of raising."""

STOPPED = "\nStopped. What is done is kept; the same command goes on from here."


def main() -> None:
    """Entry point: users' mistakes become one sentence and exit code 2."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    parallel: Any = None
    try:
        _write_what_the_terminal_can()
        _set_environment()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from puzzle_nas.training import parallel

            parallel.join()
        _catch_interrupts()
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if parallel is not None:
            parallel.leave()
        sys.exit(code or 0)
    except PuzzleError as error:
        print(f"puzzle: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(STOPPED, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except Exception as error:
        if (format_message := getattr(error, "format_message", None)) is not None and hasattr(error, "exit_code"):
            print(f"puzzle: {format_message()}", file=sys.stderr)
            sys.exit(2)
        if parallel is not None and parallel.is_lost_peer(error):
            parallel.wait_for_the_cause()
            sys.exit(parallel.PEER_LOST)
        raise


PLAIN = {"█": "#", "·": ".", "±": "+-", "…": "...", "–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"'}


def _write_what_the_terminal_can() -> None:
    """Where output is not in UTF-8, characters that it lacks become plain ones."""

    def plain(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        lacking = error.object[error.start : error.end]
        return "".join(PLAIN.get(character, "?") for character in lacking), error.end

    codecs.register_error("puzzle-plain", plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="puzzle-plain")


def _catch_interrupts() -> None:
    """The first Ctrl-C stops in good order; a second, while that goes on, at once: nothing is lost by either.

    Where the first falls into a destructor or a weak reference's callback, Python would drop what it raises there: it
    is raised once more, after that.
    """

    def stop_at_once(*_: object) -> None:
        os.write(2, f"{STOPPED}\n".encode())
        os._exit(INTERRUPTED)

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, stop_at_once)
        raise KeyboardInterrupt

    def raise_again(dropped: Any) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            signal.signal(signal.SIGINT, stop)
            again = threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
            again.daemon = True
            again.start()
        else:
            sys.__unraisablehook__(dropped)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
        sys.unraisablehook = raise_again


def _set_environment() -> None:
    """Before torch is imported: no chatter, and OpenMP threads that wait without spinning for long.

    GNU OpenMP's default spins so long at every barrier that one other busy process makes small products ten times
    slower; with this count an idle machine loses nothing.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    main()
