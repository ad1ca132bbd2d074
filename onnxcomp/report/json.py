"""JSON of a report, or of any other frozen result, and the report back from it.

Keys stand in the order of the fields, so the same values give the same bytes. JSON has no NaN and no infinities: they
are written as the strings "NaN", "Infinity" and "-Infinity" and read back as the numbers. A report stored inside a model
leaves out `output_bytes`, the size of the very file that it lies in.

Limits: keys that this version does not know are ignored, so that an older version reads a newer report.
"""

import base64
import json
import zlib

import pydantic_core
from pydantic import TypeAdapter

from onnxcomp.errors import ModelError
from onnxcomp.report.model import Report


def to_json(value: object) -> str:
    """A frozen dataclass, or a list of them, as indented JSON."""
    return pydantic_core.to_json(value, indent=2, inf_nan_mode="strings", ensure_ascii=True).decode("utf-8")


def to_stored(report: Report) -> str:
    """The report as it is stored inside the model: without `output_bytes`, deflated and in base64, a sixth of its size."""
    text = pydantic_core.to_json(report, exclude={"output_bytes"}, inf_nan_mode="strings")
    return base64.b64encode(zlib.compress(text, 9)).decode("ascii")


def from_json(text: str, *, output_bytes: int = 0) -> Report:
    """The report that `to_json` or `to_stored` wrote; `output_bytes` is used where the text has none.

    Raises ModelError for a text that is no such report.
    """
    try:
        plain = json.loads(text if text.startswith("{") else zlib.decompress(base64.b64decode(text, validate=True)))
        return TypeAdapter(Report).validate_python({"output_bytes": output_bytes} | plain)
    except (TypeError, ValueError, zlib.error):
        raise ModelError("The stored report cannot be read. Another version of onnxcomp wrote it, or it was changed.") from None
