"""What a run shows on a terminal, and where there is none."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time

import pyte
import tqdm.std

from conftest import LEARNING
from running import call

COLUMNS, ROWS = 110, 400


def show(launch, argv, stop=None):
    """Run on a terminal till `stop` is there; return what was written, exit status, last rows."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", ROWS, COLUMNS, 0, 0))
    process = launch(argv, 2 * [os.ttyname(slave)])
    written, end = b"", time.monotonic() + 100
    while process.is_alive() or select.select([master], [], [], 0)[0]:
        if select.select([master], [], [], 0.05)[0]:
            written += os.read(master, 65536)
        if stop and stop.exists():
            os.kill(process.pid, signal.SIGINT)
            stop = None
        if time.monotonic() > end:
            process.kill()
    os.close(master)
    os.close(slave)
    screen = pyte.Screen(COLUMNS, ROWS)
    pyte.ByteStream(screen).feed(written)
    rows = [row.rstrip() for row in screen.display if row.strip()]
    return written.decode(), process.exitcode, rows


def rows_of(log):
    """Return the rows that the lines of a log fill on the terminal."""
    lines = log.read_text().splitlines()
    pieces = [line[at : at + COLUMNS] for line in lines for at in range(0, len(line), COLUMNS)]
    return [piece.rstrip() for piece in pieces if piece.strip()]


def test_log_lines_are_whole_on_a_terminal_with_progress_bars(launch, finished, tmp_path):
    argv = ["--data-dir", finished.data, *LEARNING, "--test-fraction", 0.3]
    written, status, rows = show(launch, [*argv, "--output-dir", tmp_path / "whole"])
    assert status in (0, 1), written
    assert len(set(re.findall(r"(caching|training|validation|testing): .*?%\|", written))) >= 3
    assert rows == rows_of(tmp_path / "whole" / "logs" / "train.log")  # of bars nothing is left
    stop = tmp_path / "broken" / "checkpoints" / "last.pth"
    argv += ["--epochs", 999, "--cache-dir", tmp_path / "whole" / "cache"]
    written, status, rows = show(launch, [*argv, "--output-dir", tmp_path / "broken"], stop)
    assert status == 130, written
    rows = [row for row in rows if not re.match(r"epoch \d+, \w+: .*%\|", row)]
    logged = rows_of(tmp_path / "broken" / "logs" / "train.log")
    assert [row for row in rows if row in logged] == logged
    assert len(rows) <= len(logged) + 1  # the signal may come between screen and file
    assert rows[-1].startswith("Interrupted (SIGINT). Go on with the same command")


def test_progress_without_terminal_is_plain_lines(finished, no_figures, monkeypatch, tmp_path):
    start = time.time()  # a clock on which a step takes minutes: a line comes every 30 s
    monkeypatch.setattr(tqdm.std, "time", lambda: start + 10_000 * (time.time() - start))
    places = ("--data-dir", finished.data, "--output-dir", tmp_path)
    status, out, err = call(*places, *LEARNING, "--test-fraction", 0.3)
    assert (status, out) == (0, (tmp_path / "logs" / "train.log").read_text())
    assert "\r" not in err
    pattern = r"(checking and caching|epoch \d+, \w+|testing): +\d+%\|.*\d+/\d+.*"
    matches = [re.fullmatch(pattern, line) for line in err.splitlines()]
    assert None not in matches, err
    kinds = {re.sub(r"\d+", "N", match[1]) for match in matches}
    assert kinds >= {"checking and caching", "epoch N, training", "testing"}
