from __future__ import annotations

import base64
import dataclasses
import json
import math
import zlib

import pytest

from onnxcomp.errors import ModelError
from onnxcomp.report.json import from_json, to_json, to_stored
from onnxcomp.report.model import Decision, Report, SiteReport, Skipped, Verification

REPORT = Report(
    version="0.1.0",
    model_name="é.onnx",
    model_sha256="ab",
    model_bytes=1000,
    output_bytes=300,
    data_sha256=None,
    samples=3,
    target="ort-x86",
    recipe='name = "auto"\n',
    requirements=("onnxruntime 1.19 or newer.",),
    sites=(SiteReport("/a", "Conv", "layer", "w8a8", "static", 20.5, None, "QLinearConv", True, "", 64),),
    kernels_by="onnxruntime 1.31.1",
    skipped=(Skipped("/b", "MatMul", "product"),),
    decisions=(Decision("/a", "bias", True, "4 of 4 channels", 0.5, 0),),
    verification=Verification("full", "onnxruntime 1.31.1", 3, 200.0, -math.inf, math.inf),
    notes=(),
)


def test_report_to_json_and_back_is_the_identity() -> None:
    assert from_json(to_json(REPORT)) == REPORT


def test_stored_report_is_one_line_without_the_size_of_its_own_file() -> None:
    text = to_stored(REPORT)

    assert "\n" not in text
    assert "output_bytes" not in json.loads(zlib.decompress(base64.b64decode(text)))
    assert from_json(text, output_bytes=300) == REPORT


def test_equal_reports_give_equal_text() -> None:
    assert to_json(dataclasses.replace(REPORT)) == to_json(REPORT)
    assert list(json.loads(to_json(REPORT))) == [field.name for field in dataclasses.fields(Report)]


def test_numbers_that_json_lacks_are_strings() -> None:
    proof = json.loads(to_json(dataclasses.replace(REPORT.verification, agreement_db=math.nan)))

    assert (proof["agreement_db"], proof["sqnr_db"], proof["expected_db"]) == ("NaN", "-Infinity", "Infinity")


def test_nan_is_read_back() -> None:
    proof = dataclasses.replace(REPORT.verification, agreement_db=math.nan)

    assert math.isnan(from_json(to_json(dataclasses.replace(REPORT, verification=proof))).verification.agreement_db)


def test_a_list_of_results_is_a_json_list() -> None:
    assert json.loads(to_json([REPORT.skipped[0]])) == [{"name": "/b", "op": "MatMul", "reason": "product"}]


def test_a_whole_number_is_read_as_a_float_where_a_float_belongs() -> None:
    plain = json.loads(to_json(REPORT))
    plain["sites"][0]["before_db"] = 20

    assert from_json(json.dumps(plain)).sites[0].before_db == 20.0


def test_keys_of_a_newer_version_are_ignored() -> None:
    plain = json.loads(to_json(REPORT)) | {"latency_ms": 3}

    assert from_json(json.dumps(plain)) == REPORT


PLAIN = json.loads(to_json(REPORT))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "it is not JSON"),
        (json.dumps(PLAIN | {"sites": [{"name": "fc"}]}), "a key is missing"),
        (json.dumps(PLAIN | {"sites": None}), "a list is none"),
        (json.dumps(PLAIN | {"verification": 3}), "a part is a number"),
        ("[]", "it is a list"),
    ],
)
def test_a_text_that_is_no_report_is_refused(text: str, why: str) -> None:
    with pytest.raises(ModelError) as error:
        from_json(text)

    message = "The stored report cannot be read. Another version of onnxcomp wrote it, or it was changed."
    assert str(error.value) == message, why
