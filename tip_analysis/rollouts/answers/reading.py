"""The answer in a response: after the thought, in the last box, or behind words such as `the answer
is`."""

import re
from typing import NamedTuple

THOUGHT_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
"""What opens and closes a thought, in the models that write one."""

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?P<brace>\{)?")
_BARE_BOX = re.compile(r"\\(?:[A-Za-z]+)|[^\s$\\.,;]+")
_BETWEEN_BOXES = re.compile(
    r"(?:\s|\$|,|\\[,;:! ()\[\]]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|\band\b|\bor\b)*"
)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_SAID = re.compile(
    r"(?:####|\b(?:final\s+)?answer\s*(?:\*\*)?\s*(?:is|are|:|=)\s*:?)[ \t]*(?P<said>[^\n]+)",
    re.IGNORECASE,
)
_SPECIAL_TOKEN = re.compile(r"<\|[^<>|]*\|>|</s>|<eos>|<end_of_turn>|<\|im_end\|>")
_EMPHASIS = re.compile(r"^\*{1,3}([^*\n]+)\*{1,3}(?!\*)(.*)$")


class Answer(NamedTuple):
    """What a response gives as its answer."""

    text: str | None
    """The answer alone; None where only the whole response can be searched."""
    response: str
    """The response without its thought."""
    is_boxed: bool


def read_answer(response: str) -> Answer | None:
    """The answer that a response ends with; None where it gives none: its thought is not closed, or
    its last box is not."""
    rest = after_thought(response)
    if rest is None:
        return None
    boxes = find_boxes(rest)
    if boxes is None:
        return None
    if boxes:
        return Answer(boxes, rest, is_boxed=True)
    return Answer(_said(rest), rest, is_boxed=False)


def after_thought(response: str) -> str | None:
    """What follows the last thought; None if a thought is opened and not closed."""
    for opening, closing in THOUGHT_TAGS:
        end = response.rfind(closing)
        if response.rfind(opening) > end:
            return None
        if end >= 0:
            response = response[end + len(closing) :]
    return response


def opened_thought(prompt_text: str) -> str:
    """The tag of a thought that a prompt opens and leaves open, as some chat templates do; else
    nothing."""
    shown = prompt_text.rstrip()
    return next((opening for opening, _ in THOUGHT_TAGS if shown.endswith(opening)), "")


def find_boxes(text: str) -> str | None:
    """Content of the last box, joined by commas with boxes right before it (`\\boxed{1}` and
    `\\boxed{2}`); empty where there is no box, None where the last one is not closed."""
    contents: list[str] = []
    end = 0
    for box in _BOX.finditer(text):
        if box.start() < end:  # a box in a box
            continue
        content, stop = _content(text, box)
        if content is None:
            return None
        if not _BETWEEN_BOXES.fullmatch(text[end : box.start()]):
            contents.clear()
        contents.append(content)
        end = stop
    return ",".join(contents)


def _content(text: str, box: re.Match[str]) -> tuple[str | None, int]:
    if box["brace"] is None:
        bare = _BARE_BOX.match(text, box.end())
        return (bare[0], bare.end()) if bare else (None, len(text))
    depth, index = 1, box.end()
    while index < len(text):
        if text[index] == "\\":  # \{ and \} are printed, they group nothing
            index += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[box.end() : index], index + 1
        index += 1
    return None, len(text)


def _said(text: str) -> str | None:
    tagged = _TAGGED.findall(text)
    said = tagged or [match["said"] for match in _SAID.finditer(text)]
    found = said[-1] if said else text
    found = _EMPHASIS.sub(r"\1\2", _SPECIAL_TOKEN.sub("", found).strip()).strip("*").strip()
    return found if found and "\n" not in found else None
