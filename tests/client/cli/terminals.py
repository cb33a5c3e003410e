"""A terminal of a given width, and the commands that run on it: a real pty, a process of its own.

Knows ptys, processes, escape sequences. Does not know what a command does.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import termios
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.forked import Forked

__all__ = ["on_terminal"]

PATIENCE = 60.0
#: Runs commands one after the other, so that the interpreter starts once; argv of each is a line of the file.
PROGRAM = """
import os, sys
from pathlib import Path
from ema_client.cli import main

# A forked process has the streams of another one, on other files; its input is the terminal, too, of
# which no variable says another size.
os.dup2(1, 0)
os.environ["TERM"] = "xterm"
os.environ.pop("COLUMNS", None)
sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
for line in Path(sys.argv[1]).read_text().splitlines():
    sys.argv = ["ema", *line.split("\\t")]
    print(f"$ {line}", flush=True)
    try:
        main()
    except SystemExit as ended:
        print(f"exit {ended.code or 0}", flush=True)
"""


def on_terminal(folder: Path, commands: Sequence[Sequence[object]], *, width: int) -> dict[str, str]:
    """What commands show on a terminal of ``width`` characters, by their first word: as it came, escapes and all."""
    program, words = folder / "program.py", folder / "commands"
    program.write_text(PROGRAM)
    words.write_text("\n".join("\t".join(map(str, each)) for each in commands))
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    shown: list[bytes] = []
    reader = threading.Thread(target=_read, args=(ours, shown))
    reader.start()
    process = Forked([str(program), str(words)], Path(os.ttyname(theirs)))
    try:
        assert process.wait(PATIENCE) == 0, b"".join(shown).decode()
    finally:
        process.kill()
        os.close(theirs)
        reader.join(PATIENCE)
        os.close(ours)
    parts = re.split(r"^\$ (\S+).*$", b"".join(shown).decode().replace("\r\n", "\n"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _read(terminal: int, shown: list[bytes]) -> None:
    try:
        while piece := os.read(terminal, 1 << 16):
            shown.append(piece)
    except OSError:
        return  # EIO: the last process has closed the other end
