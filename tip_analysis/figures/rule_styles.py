"""One look per selection rule, the same in every figure, and no colour of a quadrant.

A rule is known by three things: colour, mark and line, so that figures read in grey and with any
colour-vision deficiency. Colours have middle lightness, for light and dark pages.
"""

from typing import Any
from zlib import crc32

from tip_analysis.figures.style import INK

_STYLES: dict[str, tuple[str, str, str]] = {
    "all": (INK, "o", "-"),
    "random": (INK, "X", ":"),
    "gradient_oracle": (INK, "*", "--"),
    "entropy": ("#2a8f4f", "o", "-"),
    "entropy_sampling": ("#6a9a1f", "v", "--"),
    "soft_or": ("#8250c4", "s", "-"),
    "soft_or_bottom": ("#b08ae0", "<", ":"),
    "q3": ("#c2408f", "D", "-"),
    "divergence": ("#a8791a", "^", "-"),
    "forward_kl": ("#8c564b", ">", "--"),
    "jsd": ("#c9a227", "P", "-."),
    "hellinger": ("#8a8a1c", "h", ":"),
    "entropy_jsd_sampling": ("#128a85", "d", "-."),
    "teachability": ("#a3223f", "s", "--"),
    "position": ("#7a4a7d", "o", ":"),
    "last": ("#7a4a7d", "v", "-."),
    "random_window": (INK, "P", "-."),
    "soft_or_product": ("#6f5ba7", "^", "--"),
    "soft_or_max": ("#6f5ba7", "D", "-."),
    "soft_or_sum": ("#6f5ba7", "v", ":"),
    "soft_or_forward": ("#8250c4", "P", "--"),
    "ier": ("#4d7a2a", "d", "--"),
    "ta_opd": ("#a3223f", "o", "-"),
    "selectkd": ("#1f7f6d", "h", "-"),
    **{
        f"{kind}:Q{number}": (color, mark, line)
        for kind, line in (("quadrant", "-"), ("not", "--"))
        for number, (color, mark) in enumerate(
            (("#9a5b3c", "o"), ("#5f8f3a", "s"), ("#b5485f", "D"), ("#6b4fb3", "^")), 1
        )
    },
    "teacher_entropy": ("#35a588", "^", "-."),
}
"""Colour, mark and line of each built-in rule."""
_OTHER_COLORS = ("#d070a8", "#5f8f3a", "#6b4fb3", "#9a5b3c", "#1f9a6d", "#b5485f")
_OTHER_MARKS, _OTHER_LINES = "osD^vPX<>hd", ("-", "--", "-.", ":")


def rule_style(rule: str) -> dict[str, Any]:
    """`color`, `marker` and `ls` of a rule's line; a user's rule has the look that its name
    gives."""
    color, mark, line = _STYLES.get(rule) or _of_name(rule)
    return {"color": color, "marker": mark, "ls": line}


def _of_name(rule: str) -> tuple[str, str, str]:
    number = crc32(rule.encode())
    number, color = divmod(number, len(_OTHER_COLORS))
    number, mark = divmod(number, len(_OTHER_MARKS))
    return _OTHER_COLORS[color], _OTHER_MARKS[mark], _OTHER_LINES[number % len(_OTHER_LINES)]
