"""Strip: take the compensations of one method out of a file that onnxcomp wrote; what is left is proven to run."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from onnxcomp import account, runtime, targets
from onnxcomp.errors import ModelError
from onnxcomp.graph import files
from onnxcomp.graph.convert import to_graph, to_model
from onnxcomp.graph.mapped import embed
from onnxcomp.graph.strip import load_folds, strip as strip_graph
from onnxcomp.methods.base import find
from onnxcomp.report.json import from_json
from onnxcomp.verify import made_up_feed


@dataclass(frozen=True)
class Stripped:
    """The model without the methods, and the places that they were taken out of."""

    model: files.ModelProto
    places: tuple[str, ...]


def strip(model: runtime.Model, methods: Collection[str], *, output: str | Path | None = None, force: bool = False) -> Stripped:
    """The model without what `methods` (names, such as "nbc") put into it, bit for bit as it was before them; written to
    `output` where that is given, once it has run; once it is loaded, where no made-up inputs will do.

    Later layers keep the ranges that were fitted while the method was there; codes and ranges that were reconstructed with it
    stay so, and a bias comes back as it was in front of both. Raises RecipeError for an unknown method, ModelError for a file
    that onnxcomp did not write, in which none of the methods was adopted, or in which xint merged its terms into one weight or
    input.
    """
    for method in methods:
        find(method)
    source = files.load(model)
    files.check_output(output, model, force=force)
    stored = files.metadata(source)
    if files.REPORT not in stored or files.FOLDS not in stored:
        raise ModelError("The file holds no record of compensations. Give a file that this version of onnxcomp wrote.")
    report = from_json(stored[files.REPORT])
    adopted = [d for d in report.decisions if d.adopted and d.method in methods]
    if not adopted:
        raise ModelError(f"No compensation of {', '.join(methods)} is in the file. `onnxcomp inspect` lists what is.")
    graph = to_graph(source)
    places = dict.fromkeys([*(s.name for s in report.sites), *(d.site for d in adopted)])
    prefixes = [f"{place}/{method}/" for place in places for method in methods]
    folds = strip_graph(graph, prefixes, load_folds(stored[files.FOLDS]), methods)
    targets.find(report.target).settle(graph)
    stripped = embed(to_model(graph, source))
    gone = {d: replace(d, adopted=False, reason="stripped", added_bytes=0) for d in adopted}
    decisions = tuple(gone.get(d, d) for d in report.decisions)
    account.stamp(stripped, replace(report, decisions=decisions), folds)
    session = runtime.Session(stripped)
    try:
        feed = made_up_feed(runtime.Session(source))
    except ModelError:  # no made-up inputs will do, and there are no others here
        pass
    else:
        session.run(feed)
    if output is not None:
        files.save(stripped, output, force=force, source=account.path_of(model))
    return Stripped(stripped, tuple(dict.fromkeys(d.site for d in adopted)))
