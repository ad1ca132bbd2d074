from __future__ import annotations

from onnxcomp.report import text
from onnxcomp.report.model import (
    Benchmark,
    Comparison,
    Count,
    FoundSite,
    Inspection,
    Operator,
    OutputComparison,
    Timing,
)


def inspection(*sites: FoundSite, operators: int = 1) -> Inspection:
    counts = tuple(Count(f"Op{i}", 9 - i) for i in range(operators))
    return Inspection("m.onnx", 10, "", 21, ("com.microsoft 1",), (), (), 12345, counts, (), sites, None, ("Careful.",))


def test_values_that_became_nan_are_pointed_at() -> None:
    output = OutputComparison("y", float("-inf"), 0.0, None, 0, 3)

    lines = text.comparison(Comparison("a", "b", 100, 25, 1, (output,), None)).splitlines()

    assert lines[0] == "a -> b, 1 sample"
    assert lines[3].split() == ["y", "-inf", "dB", "0.00000", "-"]
    assert "NaN or Inf  3 values of 'y' in b, finite in a" in lines
    assert lines[-1] == "Size        100 B -> 25 B, ratio 0.250"


def test_an_integer_output_has_only_an_agreement() -> None:
    output = OutputComparison("y", None, None, 0.75, 4, 0)

    assert text.comparison(Comparison("a", "b", 1, 1, 4, (output,), None)).splitlines()[3].split() == [
        "y", "-", "-", "75.00%", "(3", "of", "4)",
    ]  # fmt: skip


def test_an_inspection_says_what_the_file_is_made_of() -> None:
    lines = text.inspection(inspection(operators=9)).splitlines()

    assert lines[0] == "m.onnx: 10 B, opset 21, com.microsoft 1"
    assert "Parameters  12,345" in lines
    assert next(line for line in lines if line.startswith("Operators")).endswith("3 Op6, 2 Op7, 1 Op8")
    assert "Note        Careful." in lines
    assert lines[-1] == "No site could be quantized."


def test_many_sites_are_cut_unless_all_are_asked_for() -> None:
    sites = [FoundSite(f"/s{i}", "Conv", "layer", (8, 3, 1, 1)) for i in range(22)]

    cut, whole = inspection(*sites), text.inspection(inspection(*sites), all_sites=True).splitlines()

    assert text.inspection(cut).splitlines()[-1] == "(2 more sites are not shown: --all, or --json)"
    assert whole[-1] == "/s21  Conv      8 x 3 x 1 x 1"


def test_timings_have_three_figures_and_operators_a_share() -> None:
    operators = (Operator("Conv", 3.0), Operator("Add", 1.0))
    timing = Timing(4.0, 3.456, 1234.4, 1.0, 0.9, 1.1, "m.onnx", 2000, operators)

    lines = text.benchmark(Benchmark((timing,), 1, ())).splitlines()

    assert lines[1].split() == ["m.onnx", "2.00", "kB", "4.00", "3.46-1234", "1.000", "0.900-1.100"]
    assert [line.split() for line in lines[2:]] == [
        [], ["m.onnx"], ["Operator", "ms", "Share"], ["Conv", "3.00", "75.0%"], ["Add", "1.00", "25.0%"],
    ]  # fmt: skip
