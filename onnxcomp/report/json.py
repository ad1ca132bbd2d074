"""JSON of a report, or of any other frozen result, and the report back from it.

Keys stand in the order of the fields, so the same values give the same bytes. JSON has no NaN and no infinities: they
are written as the strings "nan", "inf" and "-inf" and read back as the numbers. A report stored inside a model leaves
out `output_bytes`, the size of the very file that it lies in.

Limits: keys that this version does not know are ignored, so that an older version reads a newer report.
"""

import base64
import dataclasses
import json
import math
import zlib
from typing import Any

from pydantic import TypeAdapter

from onnxcomp.errors import ModelError
from onnxcomp.report.model import Report


def to_json(value: object) -> str:
    """A frozen dataclass, or a list of them, as indented JSON."""
    return json.dumps(_plain(value), indent=2, allow_nan=False, default=str)


def to_stored(report: Report) -> str:
    """The report as it is stored inside the model: without `output_bytes`, deflated and in base64, a sixth of its size."""
    plain = _plain(report)
    del plain["output_bytes"]
    return base64.b64encode(zlib.compress(json.dumps(plain, allow_nan=False).encode("utf-8"), 9)).decode("ascii")


def from_json(text: str, *, output_bytes: int = 0) -> Report:
    """The report that `to_json` or `to_stored` wrote; `output_bytes` is used where the text has none.

    Raises ModelError for a text that is no such report.
    """
    try:
        plain = json.loads(text if text.startswith("{") else zlib.decompress(base64.b64decode(text, validate=True)))
        return TypeAdapter(Report).validate_python({"output_bytes": output_bytes} | plain)
    except (TypeError, ValueError, zlib.error):
        raise ModelError("The stored report cannot be read. Another version of onnxcomp wrote it, or it was changed.") from None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {name: _plain(item) for name, item in vars(value).items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
