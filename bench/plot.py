"""A horizontal bar chart as SVG, and the frame of any picture."""

from html import escape

COLOURS = ("#0b7285", "#adb5bd", "#e8590c", "#5f3dc4")
STYLE = "text{font:13px system-ui,sans-serif;fill:#343a40}.title{font-weight:600;font-size:15px}"


def bar_chart(title: str, groups: dict[str, dict[str, float]], left: int = 130) -> str:
    """`groups` maps the label of a group of bars to the series' values: {"S = 128": {"ours": 30.0, "theirs": 20.0}}."""
    series = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    top, bar, gap, span = 64, 15, 12, 480
    step = len(series) * bar + gap
    largest = max(value for bars in groups.values() for value in bars.values())
    height = top + step * len(groups)
    parts = [f'<text class="title" x="16" y="26">{escape(title)}</text>']
    for i, name in enumerate(series):
        x = left + 130 * i
        parts.append(f'<rect x="{x}" y="40" width="12" height="12" rx="2" fill="{COLOURS[i % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 18}" y="51">{escape(name)}</text>')
    for row, (label, bars) in enumerate(groups.items()):
        y = top + row * step
        parts.append(f'<text x="{left - 10}" y="{y + step / 2}" text-anchor="end">{escape(label)}</text>')
        for i, name in enumerate(series):
            if name not in bars:
                continue
            width, at = span * bars[name] / largest, y + i * bar
            colour = COLOURS[i % len(COLOURS)]
            parts.append(f'<rect x="{left}" y="{at}" width="{width:.1f}" height="{bar - 2}" rx="2" fill="{colour}"/>')
            parts.append(f'<text x="{left + width + 6:.1f}" y="{at + bar - 4}">{bars[name]:.0f}</text>')
    return svg(left + span + 60, height, parts)


def svg(width: int, height: int, parts: list[str]) -> str:
    """A picture of these elements, on white."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    back = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", back, *parts, "</svg>", ""])
