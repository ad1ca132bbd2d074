from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from onnxcomp.cli import main
from onnxcomp.report import html
from onnxcomp.report.model import Decision, Report, SiteReport, Skipped, Verification

ROOT = Path(__file__).resolve().parents[2]
MODEL, DATA = ROOT / "models" / "cnn_digits.onnx", ROOT / "models" / "digits_calib.npz"
VOID = {"meta", "br", "wbr", "rect"}

SITES = (
    SiteReport("/<fc1>", "MatMul", "layer", "w8a8", "static", 15.0, 30.0, "MatMulIntegerToFloat", True, "", 64),
    SiteReport("/conv", "Conv", "layer", "w8a8", "static", 90.0, 90.0, "Conv", False, "a float LeakyRelu reads it", 64),
    SiteReport("/head", "Gemm", "layer", "w8", "float", None, None, "Gemm", False, "", 64),
)
DECISIONS = (
    Decision("/<fc1>", "bias", True, "4 of 4 channels", 1.2, 16, 0.25),
    Decision("/conv", "bias", False, "held-out samples do not improve", 0.0, 0),
)
REPORT = Report(
    "0.1.0", "net.onnx", "ab12", 22_900_000, 5_910_000, "cd34", 128, "ort-x86", 'name = "a<b"\n', ("ONNX Runtime 1.19.",),
    SITES, "onnxruntime 1.32.0", (Skipped("/qk", "MatMul", "a product"),), DECISIONS,
    Verification("onnx 1.23.2", "onnxruntime 1.32.0", 16, 200.0, 24.13, 58.2), ("The opset was raised.",),
)  # fmt: skip


class Page(HTMLParser):
    """The texts of a page, its attributes, and whether every element that is opened is closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_says_what_the_report_says_and_is_well_formed() -> None:
    page = Page(html.page(REPORT))

    assert page.open == []
    text = "".join(page.texts)
    facts = ["net.onnx -> w8a8 (2), w8 (1) for ort-x86", "0.258", "24.1 dB", "1 of 2", "a product", "The opset was raised."]
    rows = ["/<fc1>", "15.0 -> 30.0", "Conv (float)", "held-out samples do not improve", "+1.20", "16 B", "0.250"]
    for said in (*facts, *rows, 'name = "a<b"', "sha256 ab12", "ONNX Runtime 1.19."):
        assert said in text


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = Page(html.page(REPORT))

    assert not [found for found in page.attributes if found[1] in ("src", "href")]
    assert "script" not in {tag for tag, _, _ in page.attributes}
    assert "url(" not in html.page(REPORT)


@pytest.mark.parametrize(("site", "widths"), [(0, ["50.0%", "25.0%"]), (1, ["100.0%", "100.0%"]), (2, [])])
def test_a_bar_is_as_long_as_the_share_of_sixty_decibels_that_is_reached(site: int, widths: list[str]) -> None:
    page = Page(html.page(dataclasses.replace(REPORT, sites=SITES[site : site + 1])))

    assert [value for tag, key, value in page.attributes if (tag, key) == ("rect", "width")] == widths


def test_a_report_without_decisions_has_no_table_of_them() -> None:
    page = Page(html.page(dataclasses.replace(REPORT, decisions=())))

    assert "Decisions" not in page.texts


def test_quantize_and_inspect_write_the_same_page_but_for_the_measured_times(tmp_path: Path) -> None:
    first, second, model = tmp_path / "a.html", tmp_path / "b.html", tmp_path / "q.onnx"
    command = ["quantize", MODEL, "--data", DATA, "--samples", "8", "--recipe", "bc", "-o", model, "--report", first]

    made = CliRunner().invoke(main, [str(part) for part in command])
    read = CliRunner().invoke(main, ["inspect", str(model), "--report", str(second)])

    assert (made.exit_code, read.exit_code) == (0, 0), made.output + read.output
    assert first.read_text(encoding="utf-8") == second.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html", "q.onnx"]


def test_a_page_that_exists_is_kept_and_nothing_is_done(tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    page.write_text("mine", encoding="utf-8")

    done = CliRunner().invoke(main, ["inspect", str(MODEL), "--report", str(page)])

    assert (done.exit_code, page.read_text(encoding="utf-8")) == (2, "mine")
    assert done.stderr == f"UsageError: {page} exists. Pass --force to overwrite it.\n"


def test_a_file_without_a_report_has_no_page(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["inspect", str(MODEL), "--report", str(tmp_path / "a.html")])

    assert done.exit_code == 2
    assert done.stderr == f"UsageError: {MODEL} has no report, for onnxcomp did not quantize it. Leave --report out.\n"
    assert not list(tmp_path.iterdir())
