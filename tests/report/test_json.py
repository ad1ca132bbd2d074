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

    assert (proof["agreement_db"], proof["sqnr_db"], proof["expected_db"]) == ("nan", "-inf", "inf")


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


def test_text_that_is_not_json_is_refused() -> None:
    with pytest.raises(ModelError) as error:
        from_json("{")

    assert str(error.value) == "The stored report cannot be read. The file was changed after onnxcomp wrote it."


def test_missing_key_is_refused_by_name() -> None:
    plain = json.loads(to_json(REPORT))
    del plain["sites"][0]["kernel"]

    with pytest.raises(ModelError) as error:
        from_json(json.dumps(plain))

    assert str(error.value) == ("The stored report has no 'report.sites[0].kernel'. Another version of onnxcomp wrote it.")


@pytest.mark.parametrize(
    ("change", "where"),
    [({"samples": "3"}, "report.samples"), ({"sites": None}, "report.sites"), ({"notes": [1]}, "report.notes[0]")],
)
def test_value_of_another_type_is_refused_by_name(change: dict[str, object], where: str) -> None:
    plain = json.loads(to_json(REPORT)) | change

    with pytest.raises(ModelError) as error:
        from_json(json.dumps(plain))

    assert str(error.value) == (f"The stored report's '{where}' has an unexpected type. Another version of onnxcomp wrote it.")


def test_a_list_is_no_report() -> None:
    with pytest.raises(ModelError) as error:
        from_json("[]")

    assert str(error.value) == ("The stored report's 'report' has an unexpected type. Another version of onnxcomp wrote it.")
