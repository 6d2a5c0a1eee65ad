"""Prompts and imports from strangers: read to the end, or refused in one line."""

import json
import resource

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults.texts import import_cases, prompt_cases
from small_tokenizers import make_tokenizer

from tip_analysis.cli import main as cli
from tip_analysis.core.errors import ImportFormatError, InputError, PromptFileError
from tip_analysis.rollouts.importers.formats import import_rollouts
from tip_analysis.rollouts.prompts import read_prompts
from tip_analysis.rollouts.rendering import render

LIMITS = resource.getrlimit(resource.RLIMIT_AS)
DOUBLING = (
    "{% set n = namespace(x=START) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)
SHORT, WHOLE = 100, 2000
"""Mutations in the gate, and in the marked target."""


KINDS = {prompt_cases: "prompts: mutations", import_cases: "imports: mutations"}


def run_all(cases, kind: str, count_check) -> None:
    """Each case ends well or is refused in one line of a length that one reads."""
    decided = refused = 0
    for name, check in cases:
        try:
            check()
            said = None
        except InputError as problem:
            said = str(problem)
        except BaseException as problem:
            problem.add_note(name)
            raise
        decided += 1
        count_check(kind)
        if said is not None:
            refused += 1
            assert "\n" not in said, name
            assert len(said) < 700, name
    assert 0 < refused < decided


@pytest.mark.parametrize("cases", [prompt_cases, import_cases])
def test_spoiled_files(tmp_path, count_check, cases):
    run_all(cases(0, SHORT, tmp_path), KINDS[cases], count_check)


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cases", [prompt_cases, import_cases])
def test_many_spoiled_files(tmp_path, count_check, cases):
    run_all(cases(1, WHOLE, tmp_path), KINDS[cases], count_check)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"problem": "a\\ud800b"}', "half of a surrogate pair"),
        (b'{"problem": "x", "\\uDfff": 1}', "half of a surrogate pair"),
        (b'{"problem": "a\xed\xa0\x80b"}', "not UTF-8"),
        (b'{"problem": "\xff"}', "not UTF-8"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"problem": "x", "m": ' + b"[" * 150 + b"]" * 150 + b"}", "deeper than 100 levels"),
        (b'{"problem": "x", "m": ' + b"9" * 5000 + b"}", "broken JSON"),
        (b'{"problem": "x"', "broken JSON"),
        (b"\x00", "broken JSON"),
        (b'"text"', "expected a JSON object, found a string"),
        (b'{"messages": [{"role": "user\\n\\u001b[31m"}]}', "has no content"),
        (b'{"' + b"k" * 5000 + b'": 1}', "expected one of the fields"),
    ],
)
def test_lines_that_are_no_prompts(tmp_path, line, says):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"problem": "fine"}\n' + line + b"\n")
    with pytest.raises(PromptFileError, match=says) as refused:
        read_prompts(file)
    assert "line 2" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("text", ["a😀b", "a\u2028b", "\x00", "{{ 1 }}"])
def test_odd_text_that_is_text_is_kept(tmp_path, text):
    (tmp_path / "p.jsonl").write_text(json.dumps({"problem": text}), "utf-8")
    (prompt,) = read_prompts(tmp_path / "p.jsonl")
    assert prompt.problem == text


@pytest.mark.parametrize("name", ["1²2.jsonl", "٣.jsonl", "½.jsonl", "é" * 60 + ".jsonl"])
def test_numbers_in_names_are_those_that_can_be_counted(tmp_path, name):
    (tmp_path / name).write_text('{"prompt_token_ids": [4], "response_token_ids": [5]}')
    (tmp_path / "10.jsonl").write_text('{"prompt_token_ids": [4], "response_token_ids": [6]}')
    rollouts, _ = import_rollouts(
        "native", [tmp_path], tokenizer=make_tokenizer(), tokenizer_fingerprint="f"
    )
    assert rollouts.height == 2


@pytest.mark.parametrize("name", ["x" * 300 + ".jsonl", "a\0b.jsonl", "", "p.jsonl/q.jsonl"])
def test_names_that_no_file_can_have(tmp_path, name):
    (tmp_path / "p.jsonl").write_text("{}")
    with pytest.raises(ImportFormatError):
        import_rollouts(
            "text", [f"{tmp_path}/{name}"], tokenizer=make_tokenizer(), tokenizer_fingerprint="f"
        )


def test_parquet_values_that_json_cannot_hold_are_refused(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "x", "image": b"\xff"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    with pytest.raises(PromptFileError, match="a value that JSON cannot"):
        read_prompts(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{% for",
        "{{ messages.x.y.z }}",
        "{{ 'x' + 1 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ messages[0].content.nope() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_broken_chat_templates_are_refused_in_one_line(template):
    with pytest.raises(
        PromptFileError, match=r"the chat template (refuses|raises to a power)"
    ) as refused:
        render(make_tokenizer(template), [{"role": "user", "content": "x"}])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "template",
    [
        DOUBLING.replace("START", "'a'").replace("~", "~"),
        DOUBLING.replace("START", "'a'").replace("~", "+"),
        DOUBLING.replace("START", "[1]").replace("~", "+"),
        "{{ ('x' * 1000000) * 20000 }}",
        "{{ ('a' * 1000000) | replace('a', 'b' * 10000) }}",
        "{{ ('a' * 1000000) | join('b' * 10000) }}",
        "{{ '%*d' % (1000000 * 9000, 1) }}",
        "{{ '{:>9000000000}'.format(1) }}",
        "{{ [1] * 1000000 * 1000000 }}",
    ],
)
def test_templates_that_would_take_all_memory_are_refused(template, monkeypatch):
    monkeypatch.setattr("tip_analysis.rollouts.template_limits.BYTES", 2**27)
    with pytest.raises(PromptFileError, match=r"it needs more than 1 GB$") as refused:
        render(make_tokenizer(template), [{"role": "user", "content": "x"}])
    assert refused.value.__cause__ is None  # it would keep what was allocated
    assert resource.getrlimit(resource.RLIMIT_AS) == LIMITS


def test_a_template_of_endless_text_is_refused(monkeypatch):
    monkeypatch.setattr("tip_analysis.rollouts.rendering.MAX_CHARACTERS", 10**4)
    with pytest.raises(PromptFileError, match=r"a text of 30,000 characters"):
        render(make_tokenizer("{{ 'abc' * 10000 }}"), [{"role": "user", "content": "x"}])


def test_a_prompt_beyond_the_context_is_refused_before_anything_is_made(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "long", "problem": "12+34+56=" * 40}))
    arguments = ["--student", "arithmetic-student", "--prompts", str(tmp_path / "p.jsonl")]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["rollout", str(tmp_path / "run"), *arguments, "--max-new-tokens", "4"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'long'" in line
    assert "the context of arithmetic-student ends at 128" in line
    assert not (tmp_path / "run" / "rollouts").exists()
