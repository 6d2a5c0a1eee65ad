"""Templates without end are stopped, or refused before they are computed."""

import threading
import time

import pytest
from small_tokenizers import CHAT_TEMPLATE, make_tokenizer

from tip_analysis.core.errors import PromptFileError
from tip_analysis.rollouts.rendering import render
from tip_analysis.rollouts.template_limits import check_template, time_limit

MESSAGES = [{"role": "user", "content": "x"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_without_end_is_stopped_in_any_thread(monkeypatch):
    monkeypatch.setattr("tip_analysis.rollouts.template_limits.SECONDS", 0.2)
    said: list[str] = []

    def work() -> None:
        with pytest.raises(PromptFileError) as refused:
            render(make_tokenizer(ENDLESS), MESSAGES)
        said.append(str(refused.value))

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert [line.split(": ")[-1] for line in said] == ["it did not end within 0.2 s"] * 2


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 9 ** 9 ** 9 }}", "raises to a power in line 1"),
        ("x\n{{ 2 **3 }}", "raises to a power in line 2"),
        ("{{ 'x' * 10000000000 }}", "holds more than 1000000 in line 1"),
        ("{{ 'x' * 0xFFFFFFFFFF }}", "holds more than 1000000"),
        ("{{ 'x' * 1_000_000_0 }}", "holds more than 1000000"),
        ("{{ " + "9" * 6000 + " }}", "holds more than 1000000"),
    ],
)
def test_what_would_exhaust_the_machine_is_refused(template, says):
    with pytest.raises(PromptFileError, match=says):
        render(make_tokenizer(template), MESSAGES)


@pytest.mark.parametrize(
    "template",
    [CHAT_TEMPLATE, "{{ dict(**{'a': 1}) }}", "{{ dict(a=1, **{}) }}", "2 ** 3", "{% for"],
)
def test_what_templates_need_is_left(template):
    check_template(template)


def test_a_limit_that_is_kept_leaves_nothing_behind():
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # nothing is raised later
    with pytest.raises(ZeroDivisionError), time_limit(0.05):
        _ = 1 / 0
    time.sleep(0.1)
