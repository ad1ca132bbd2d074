from __future__ import annotations

import dataclasses

import pytest

from onnxcomp.report import text
from onnxcomp.report.model import Decision, Report, SiteReport, Skipped, Verification


def site(name: str, after_db: float | None = 30.0, **changes: object) -> SiteReport:
    base = SiteReport(name, "MatMul", "layer", "w8a8", "static", after_db, after_db, "MatMulIntegerToFloat", True, "", 64)
    return dataclasses.replace(base, **changes)  # pyright: ignore[reportArgumentType]


REPORT = Report(
    version="0.1.0",
    model_name="net.onnx",
    model_sha256="ab12",
    model_bytes=22_900_000,
    output_bytes=5_910_000,
    data_sha256="cd34",
    samples=128,
    target="ort-x86",
    recipe='name = "auto"\n',
    requirements=("onnxruntime 1.19 or newer.",),
    sites=(
        site("/fc1", 21.3, before_db=20.1),
        site("/conv", 31.0, kernel="Conv", integer=False, reason="its output goes to a float LeakyRelu"),
        site("/add", None, op="Add", kind="join", bits="a8", kernel="QLinearAdd"),
        site("/head", None, bits="w8", activations="float", kernel="Gemm", integer=False),
    ),
    kernels_by="onnxruntime 1.31.1",
    skipped=(
        Skipped("/qk", "MatMul", "a product"),
        Skipped("/av", "MatMul", "a product"),
        Skipped("/x", "Conv", "not"),
    ),
    decisions=(
        Decision("/fc1", "bias", True, "4 of 4 channels", 1.2, 16),
        Decision("/conv", "bias", False, "held-out samples do not improve", 0.0, 0),
    ),
    verification=Verification("onnx 1.23.2", "onnxruntime 1.31", 16, 200.0, 24.13, 58.2),
    notes=("The opset was raised from 8 to 21.",),
)


def test_report_reads_as_it_should() -> None:
    expected = """\
net.onnx -> w8a8 (2), w8 (1) for ort-x86, 128 samples

Site   Bits  Activations       SQNR dB  Kernel
/fc1   w8a8  static       20.1 -> 21.3  MatMulIntegerToFloat
/conv  w8a8  static               31.0  Conv (float)
/add   a8    static                  -  QLinearAdd
/head  w8    float                   -  Gemm

Kernels       2 of 3 quantized sites run as integer kernels; 1 more have quantized weights and float activations
              1 in float (/conv): its output goes to a float LeakyRelu
Left float    2 MatMul (/qk, /av): a product
              1 Conv (/x): not
Compensation  bias kept at 1 of 2 places, median +1.20 dB, 16 B added
              bias declined at 1 (/conv): held-out samples do not improve
Output        24.1 dB SQNR against the float model on 16 samples
Size          22.9 MB -> 5.91 MB, ratio 0.258
Verified      onnx 1.23.2; onnxruntime 1.31: optimized and plain agree exactly; calibration reproduced to 58.2 dB
Needs         onnxruntime 1.19 or newer.
Note          The opset was raised from 8 to 21."""

    assert text.report(REPORT).splitlines() == expected.splitlines()


def test_without_data_there_is_neither_a_column_of_errors_nor_calibration() -> None:
    sites = tuple(dataclasses.replace(s, before_db=None, after_db=None, activations="dynamic") for s in REPORT.sites[:1])
    proof = dataclasses.replace(REPORT.verification, samples=1, agreement_db=112.3, expected_db=None)
    bare = dataclasses.replace(REPORT, sites=sites, data_sha256=None, samples=0, decisions=(), verification=proof)

    lines = text.report(bare).splitlines()

    assert lines[0] == "net.onnx -> w8a8 for ort-x86, no data"
    assert lines[2] == "Site  Bits  Activations  Kernel"
    assert "Output      24.1 dB SQNR against the float model on 1 made-up sample" in lines
    assert "Verified    onnx 1.23.2; onnxruntime 1.31: optimized and plain agree to 112.3 dB" in lines
    assert not any(line.startswith("Compensation") for line in lines)


def test_a_report_without_sites_says_so() -> None:
    lines = text.report(dataclasses.replace(REPORT, sites=())).splitlines()

    assert lines[0] == "net.onnx -> nothing to quantize for ort-x86, 128 samples"
    assert lines[2] == "No site was quantized."


def test_long_site_tables_are_cut_to_the_worst() -> None:
    """Float fallbacks come first, then the lowest SQNR; a site without one is better than any."""
    rows = [site(f"/s{i}", 50.0 - i) for i in range(24)]
    rows += [site("/join", None), site("/fallback", 99.0, integer=False, reason="r")]

    lines = text.sites(rows).splitlines()

    names = [line.split()[0] for line in lines[1:-1]]
    assert names == ["/fallback", *(f"/s{i}" for i in range(23, 23 - text.LONGEST + 1, -1))]
    assert lines[-1] == "(6 better sites are not shown: --all, or --json)"


def test_all_sites_are_shown_in_graph_order_when_asked_for() -> None:
    rows = [site(f"/s{i}", 50.0 - i) for i in range(24)]

    lines = text.sites(rows, all_sites=True).splitlines()

    assert [line.split()[0] for line in lines[1:]] == [f"/s{i}" for i in range(24)]


def test_a_row_is_one_line_however_long_its_name() -> None:
    name = "/" + "x" * 300

    assert text.sites([site(name)]).splitlines()[1].startswith(name + "  w8a8")


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9_994, "9.99 kB"), (9_996, "10.0 kB"), (99_960, "100 kB"),
     (999_400, "999 kB"), (999_600, "1.00 MB"), (22_950_949, "23.0 MB"), (3_500_000_000, "3.50 GB")],
)  # fmt: skip
def test_sizes_have_three_figures(count: int, shown: str) -> None:
    assert text.size(count) == shown


def test_provenance_names_the_model_and_the_data() -> None:
    assert text.provenance(REPORT) == {
        "Made by": ["onnxcomp 0.1.0"],
        "From": ["net.onnx, 22.9 MB, sha256 ab12"],
        "Data": ["128 samples, sha256 cd34"],
    }
    assert text.provenance(dataclasses.replace(REPORT, data_sha256=None))["Data"] == ["none"]


@pytest.mark.parametrize(("sqnr_db", "lines"), [(5.9, 2), (6.0, 1)])
def test_an_output_that_is_mostly_error_says_what_to_do(sqnr_db: float, lines: int) -> None:
    low = dataclasses.replace(REPORT, verification=dataclasses.replace(REPORT.verification, sqnr_db=sqnr_db))

    found = text.report_facts(low)["Output"]

    assert [found[0], *([text.LOW] * (lines - 1))] == list(found)
