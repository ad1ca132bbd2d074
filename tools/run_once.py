"""What another ONNX Runtime makes of model files: their outputs and their optimized models, for tools/versions.py.

    PYTHON tools/run_once.py JOBS FOLDER     with the PYTHON of an environment that holds onnxruntime and nothing of ours

JOBS is JSON: a list of [model, feeds.npz, mark]. FOLDER gets `{mark}.npz`, the outputs by name, `{mark}.onnx`, the model as
the runtime executes it, or `{mark}.txt`, what was wrong. The runtime's version is printed.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


def run(model: str, feeds: str, mark: str, folder: Path) -> None:
    """Load and run one model."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(folder / f"{mark}.onnx")
    options.add_session_config_entry("optimization.disable_specified_optimizers", "NchwcTransformer;NhwcTransformer")
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        with np.load(feeds) as archive:
            values = session.run(None, dict(archive))
    except Exception as error:
        # The runtime has no base class of its own for errors, and whatever it is, it is the answer.
        (folder / f"{mark}.txt").write_text(" ".join(str(error).split()), encoding="utf-8")
        return
    np.savez(folder / f"{mark}.npz", **dict(zip((o.name for o in session.get_outputs()), values, strict=True)))


def main() -> None:
    jobs, folder = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    for model, feeds, mark in jobs:
        run(model, feeds, mark, folder)
    print(ort.__version__)


if __name__ == "__main__":
    main()
