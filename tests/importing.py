"""What the tests of imports share: files written, imported and refused."""

import json

import pytest
from small_tokenizers import make_tokenizer

from tip_analysis.core.contract_checks import validate
from tip_analysis.core.errors import ImportFormatError
from tip_analysis.core.schema import RolloutTable
from tip_analysis.rollouts.importers.formats import import_rollouts

CHAT = make_tokenizer()
FINGERPRINT = "0123456789abcdef"


def write_lines(path, rows, *, end="\n"):
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + end,
        encoding="utf-8",
    )
    return path


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def imported(format, *files, tokenizer=CHAT, **options):
    frame, report = import_rollouts(
        format, files, tokenizer=tokenizer, tokenizer_fingerprint=FINGERPRINT, **options
    )
    validate(frame, RolloutTable)
    assert report.rollouts == frame.height == report.ids_exact + report.ids_retokenized
    assert frame.height == report.template_exact + report.template_reapplied + report.template_none
    assert frame["source"].unique().to_list() == [format]
    json.dumps(report.to_dict())
    return frame.rows(named=True), report


def refused(message, format, *files, error=ImportFormatError, **options):
    with pytest.raises(error, match=message) as caught:
        imported(format, *files, **options)
    assert "\n" not in str(caught.value)


def stripped(text, tokenizer=CHAT):
    return tokenizer.decode(
        tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True
    )


def encoded(text, tokenizer=CHAT):
    return tokenizer(text, add_special_tokens=False)["input_ids"]
