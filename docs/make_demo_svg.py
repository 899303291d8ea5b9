"""Records a command in a terminal of its own and draws it as an animated SVG.

    python docs/make_demo_svg.py docs/demo.svg -- python examples/smollm2/main.py

Every frame is what the command printed; only the pace is evened out. Where animation is off, the last frame stands.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import struct
import sys
import termios
from html import escape
from pathlib import Path

COLUMNS, ROWS = 100, 40
FRAME_S, LAST_FRAME_S = 0.14, 6.0
CELL_W, CELL_H, MARGIN, BAR = 8.2, 19, 20, 34
COLOURS = {"": "#d8dee9", "2": "#7b8794", "1;36": "#67d5e8", "32": "#8bd17c", "1;31": "#ff7b72"}
TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(\r\n|\n|\r)|([^\x1b\r\n]+)")

Span = tuple[str, str]  # style, text
Frame = tuple[tuple[Span, ...], ...]


def record(command: list[str]) -> str:
    """Everything that the command writes to a terminal of COLUMNS x ROWS."""
    pid, terminal = pty.fork()
    if pid == 0:
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
        os.execvpe(command[0], command, environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    written = b""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not chunk:
            break
        written += chunk
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        sys.exit(f"{' '.join(command)}: exit status {status}\n{written.decode(errors='replace')[-2000:]}")
    return written.decode("utf-8")


def frames(output: str) -> list[Frame]:
    """The screen before each time that it is rewritten, and at the end."""
    lines: list[list[Span]] = [[]]
    row, style, found = 0, "", []

    def snapshot() -> Frame:
        return tuple(tuple(line) for line in lines)

    for match in TOKEN.finditer(output):
        argument, command, newline, text = match.groups()
        if text:
            lines[row].append((style, text))
        elif newline and "\n" in newline:
            row += 1
            if row == len(lines):
                lines.append([])
        elif command == "m":
            style = "" if argument in ("", "0") else argument
        elif command == "F":
            found.append(snapshot())
            row = max(0, row - int(argument or 1))
        elif command == "J":
            del lines[row:]
            lines.append([])
        elif command and command not in "hl":
            sys.exit(f"unknown escape sequence {match.group()!r}")
    return [*found, snapshot()]


def draw(shown: list[Frame], title: str) -> str:
    rows = max(len(frame) for frame in shown)
    total = FRAME_S * (len(shown) - 1) + LAST_FRAME_S
    width, height = COLUMNS * CELL_W + 2 * MARGIN, rows * CELL_H + MARGIN + BAR + 8
    styles, texts = {}, []
    for row in range(rows):
        start = 0
        contents = [frame[row] if row < len(frame) else () for frame in shown]
        for i in range(1, len(contents) + 1):
            if i < len(contents) and contents[i] == contents[start]:
                continue
            if contents[start]:
                texts.append(draw_line(row, contents[start], start, i, len(shown), total, styles))
            start = i
    font = "13.6px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
    css = [f"text{{font:{font};white-space:pre;fill:{COLOURS['']}}}", ".early{visibility:hidden}", *styles.values()]
    css.append("@media (prefers-reduced-motion:reduce){text{animation:none!important}}")
    colours = ("#ff5f57", "#febc2e", "#28c840")
    lights = "".join(f'<circle cx="{22 + 20 * i}" cy="17" r="6" fill="{c}"/>' for i, c in enumerate(colours))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'height="{height:.0f}" role="img"><title>{escape(title)}</title>',
            f"<style>{''.join(css)}</style>",
            f'<rect width="100%" height="100%" rx="10" fill="#1b2028"/>{lights}',
            f'<text x="50%" y="22" text-anchor="middle" style="fill:#7b8794">{escape(title)}</text>',
            *texts,
            "</svg>\n",
        ]
    )


def draw_line(
    row: int,
    spans: tuple[Span, ...],
    start: int,
    end: int,
    count: int,
    total: float,
    styles: dict[tuple[int, int], str],
) -> str:
    """One line of text, visible from frame `start` to frame `end`."""
    classes = []
    if (start, end) != (0, count):
        classes.append(f"f{start}-{end}")
        first, last = (100 * FRAME_S * i / total for i in (start, end))
        steps = "" if start == 0 else "0%{visibility:hidden}"
        steps += f"{first:.2f}%{{visibility:visible}}"
        steps += f"{last:.2f}%,100%{{visibility:hidden}}" if end < count else "100%{visibility:visible}"
        name = classes[0]
        styles[start, end] = f"@keyframes {name}{{{steps}}}.{name}{{animation:{name} {total:.2f}s step-end infinite}}"
    if end < count:
        classes.append("early")
    y = BAR + MARGIN + row * CELL_H
    words = "".join(escape(t) if not s else f'<tspan style="{look(s)}">{escape(t)}</tspan>' for s, t in spans)
    return f'<text x="{MARGIN}" y="{y}" xml:space="preserve" class="{" ".join(classes)}">{words}</text>'


def look(style: str) -> str:
    return f"fill:{COLOURS.get(style, COLOURS[''])}" + (";font-weight:600" if style.startswith("1") else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("svg", type=Path)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    shown = frames(record(args.command))
    args.svg.write_text(draw(shown, " ".join([Path(args.command[0]).name, *args.command[1:]])), encoding="utf-8")
    print(f"{args.svg}: {len(shown)} frames, {args.svg.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
