"""Shows several growing texts side by side on a terminal, or as plain text elsewhere."""

import os
import shutil
import sys
import textwrap
from types import TracebackType


class Screen:
    """`show` takes the whole page as lines; on a terminal it overwrites the previous one."""

    def __init__(self, height: int) -> None:
        size = shutil.get_terminal_size()
        self.width = min(size.columns, 100) - 1
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and size.lines > height
        self.colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._shown = 0

    def __enter__(self) -> "Screen":
        self._write("\x1b[?25l" if self.live else "")  # hides the cursor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write("\x1b[?25h" if self.live else "")

    def show(self, lines: list[str], *, final: bool = False) -> None:
        if self.live:
            erase = f"\x1b[{self._shown}F\x1b[J" if self._shown else ""
            self._write(erase + "\n".join(lines) + "\n")
            self._shown = len(lines)
        elif final:
            self._write("\n".join(lines) + "\n")

    def paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour else text

    def wrap(self, text: str, indent: str = "  ") -> list[str]:
        lines: list[str] = []
        for paragraph in text.split("\n"):
            lines += textwrap.wrap(paragraph, self.width - len(indent)) or [""]
        return [indent + line for line in lines]

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
