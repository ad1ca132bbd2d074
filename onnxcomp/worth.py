"""What the methods in a finished file are worth: of each, the file without it beside the file, on samples.

Accuracies are paired: both files answer the same questions, so what a method gains has a standard error. Times are those of one
sample on one thread, both files in turn. Limits: one place alone changes too few answers to be told from chance, so a method is
taken out as a whole; what later layers were fitted to stays as it is.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxcomp import runtime
from onnxcomp.comparison import compare
from onnxcomp.data import InputSpec, open_data
from onnxcomp.errors import ModelError, UsageError
from onnxcomp.graph import files
from onnxcomp.methods.base import names
from onnxcomp.report.json import from_json
from onnxcomp.report.model import Comparison, Worth
from onnxcomp.strip import strip


def compare_methods(reference: runtime.Model, model: runtime.Model, data: object, **how: Any) -> Comparison:
    """`compare` with what every method in `model` is worth; arguments as those of `compare`.

    Raises UsageError for a file that holds no method, or that onnxcomp did not write.
    """
    stored = files.metadata(files.load(model)).get(files.REPORT)
    adopted = [d.method for d in from_json(stored).decisions if d.adopted] if stored is not None else []
    methods = [name for name in names() if name in adopted]
    if not methods:
        what = str(model) if isinstance(model, str | Path) else "The model"
        raise UsageError(f"{what} holds no compensation. `onnxcomp inspect` lists what is in a file.")
    feed = open_data(data, InputSpec.of(runtime.Session(model).inputs), preprocess=how.get("preprocess"))[0]
    found, parts = compare(reference, model, data, **how), list[Worth]()
    for method in methods:
        try:
            stripped = strip(model, [method])
        except ModelError:  # terms of xint that were merged into one tensor with what was there
            parts.append(Worth(method, adopted.count(method)))
            continue
        without, gained = compare(reference, stripped.model, data, **how), compare(stripped.model, model, data, **how)
        outputs = [o.sqnr_db for o in without.outputs if o.sqnr_db is not None]
        time, added = runtime.measure([stripped.model, model], [feed])[1], gained.other_bytes - gained.reference_bytes
        spread = time.ratio, time.ratio_low, time.ratio_high
        parts.append(Worth(method, len(stripped.places), min(outputs, default=None), gained.accuracy, added, spread))
    return replace(found, methods=tuple(parts))
