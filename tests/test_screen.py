"""What a run shows on a terminal, and where there is none."""

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time

import pyte
import tqdm.std

import train_pvs
from conftest import LEARNING, TINY, call

COLUMNS, ROWS = 110, 400


def live(argv, terminal):
    """Run with stdout and stderr on a terminal."""
    for number, name in {1: "stdout", 2: "stderr"}.items():
        os.dup2(os.open(terminal, os.O_RDWR | os.O_NOCTTY), number)
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115
    train_pvs.plt.Figure.savefig = lambda self, file, **_: file.write(b"-")
    sys.exit(train_pvs.main(argv))


def test_log_lines_are_whole_and_begin_at_the_left_of_a_terminal_with_progress_bars(
    nursery, finished, tmp_path
):
    places = ["--data-dir", str(finished.data), "--output-dir", str(tmp_path)]
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", ROWS, COLUMNS, 0, 0))
    argv = [*places, *TINY, *LEARNING, "--test-fraction", "0.3"]
    process = nursery.Process(target=live, args=(argv, os.ttyname(slave)))
    process.start()
    written = b""
    while process.is_alive() or select.select([master], [], [], 0)[0]:
        if select.select([master], [], [], 0.1)[0]:
            written += os.read(master, 65536)
    os.close(master)
    os.close(slave)
    assert process.exitcode in (0, 1), written.decode()
    bars = set(re.findall(r"(caching|training|validation|testing): .*?%\|", written.decode()))
    assert len(bars) >= 3
    screen = pyte.Screen(COLUMNS, ROWS)
    pyte.ByteStream(screen).feed(written)
    shown = [row.rstrip() for row in screen.display if row.strip()]
    log = (tmp_path / "logs" / "train.log").read_text().splitlines()
    pieces = [line[at : at + COLUMNS] for line in log for at in range(0, len(line), COLUMNS)]
    assert shown == [piece.rstrip() for piece in pieces if piece.strip()]


def test_progress_is_plain_lines_where_there_is_no_terminal(
    finished, no_figures, monkeypatch, tmp_path
):
    start = time.time()  # a clock on which a step takes minutes: a line comes every 30 s
    monkeypatch.setattr(tqdm.std, "time", lambda: start + 10_000 * (time.time() - start))
    places = ("--data-dir", finished.data, "--output-dir", tmp_path)
    status, out, err = call(*places, *TINY, *LEARNING, "--test-fraction", 0.3)
    assert status == 0
    assert out == (tmp_path / "logs" / "train.log").read_text()
    assert "\r" not in err
    kinds = set()
    for line in err.splitlines():
        match = re.fullmatch(
            r"(checking and caching|epoch \d+, \w+|testing): +\d+%\|.*\d+/\d+.*", line
        )
        assert match, line
        kinds.add(re.sub(r"\d+", "N", match[1]))
    assert kinds >= {"checking and caching", "epoch N, training", "testing"}
