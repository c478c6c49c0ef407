"""The demo's text tower: a CLIP text model of width 64 and a byte-pair tokenizer in CLIP's file format."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo.concepts import CONCEPTS, LAYOUTS, STYLES, scene_caption, single_caption
from demo.stage import run_stage

WIDTH = 64
LENGTH = 77
MERGES = 600


def byte_letters() -> list[str]:
    """The printable letter of each byte, in the order of byte-level BPE vocabularies (Radford et al., 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def captions() -> list[str]:
    """Every kind of caption, enough for each word to occur."""
    return [single_caption(n, s) for n, s in product(CONCEPTS, STYLES)] + [
        scene_caption(a, b, layout, "flat") for a, b in pairwise(CONCEPTS) for layout in LAYOUTS
    ]


def _merges(words: dict[tuple[str, ...], int], count: int) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first (Sennrich et al., 2016)."""
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: dict[tuple[str, str], int] = {}
        for word, frequency in words.items():
            for pair in pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + frequency
        if not pairs:
            break
        best = max(sorted(pairs), key=pairs.__getitem__)
        merges.append(best)
        merged: dict[tuple[str, ...], int] = {}
        for word, frequency in words.items():
            parts, i = [], 0
            while i < len(word):
                step = 2 if word[i : i + 2] == best else 1
                parts.append("".join(word[i : i + step]))
                i += step
            merged[tuple(parts)] = frequency
        words = merged
    return merges


def write_clip_folder(folder: Path) -> None:
    """Writes tokenizer and config.json, as ``CLIPTextModel`` and the host's ``FrozenCLIPEmbedder`` read them."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = byte_letters()
    words: dict[tuple[str, ...], int] = {}
    for caption in captions():
        for word in caption.replace(",", " ,").split():
            key = (*word[:-1], word[-1] + "</w>")
            words[key] = words.get(key, 0) + 1
    merges = _merges(words, MERGES)
    tokens = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
               "pad_token": "<|endoftext|>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, **special}, indent=1), "utf-8"
    )
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1), "utf-8")
    config = {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": len(vocab),
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "projection_dim": WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": LENGTH, "hidden_act": "quick_gelu",
        "bos_token_id": start, "eos_token_id": end, "pad_token_id": end,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")


def new_text_tower(clip_folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer and an untrained text model of the folder's configuration."""
    config = CLIPTextConfig.from_pretrained(clip_folder)
    return CLIPTokenizer.from_pretrained(clip_folder), CLIPTextModel(config)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]):
    """Token ids (B,77), padded with the end token as SD1 does."""
    return tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def train_text(tokenizer: CLIPTokenizer, text: CLIPTextModel, *, steps: int, folder: Path) -> None:
    """Teaches the text model to say what a caption says, at every position from the end token on.

    CLIP's states are like that before a U-Net ever sees them. Without it the U-Net learns styles and ignores objects:
    one word among 77 positions moves its prediction too little to be noticed.
    """
    targets = {"first": [*CONCEPTS, ""], "second": [*CONCEPTS, ""], "layout": [*LAYOUTS, ""], "style": [*STYLES, ""]}
    device = text.device
    heads = nn.ModuleDict({key: nn.Linear(WIDTH, len(values)) for key, values in targets.items()}).to(device)

    def loss_of(_: int, generator: torch.Generator) -> torch.Tensor:
        def pick(values: list[str]) -> str:
            return values[int(torch.randint(len(values), (), generator=generator))]

        captions, facts = [], []
        for i in range(48):
            first, second, layout, style = pick(CONCEPTS), pick(CONCEPTS), pick(list(LAYOUTS)), pick(list(STYLES))
            if i < 2:
                first = second = layout = style = text_ = ""
            elif i < 24:
                second, layout, text_ = "", "", single_caption(first, style)
            else:
                text_ = scene_caption(first, second, layout, style)
            captions.append(text_)
            facts.append({"first": first, "second": second, "layout": layout, "style": style})
        ids = tokenize(tokenizer, captions).to(device)
        states = text(ids).last_hidden_state.float()
        ended = (ids == tokenizer.eos_token_id).float()
        loss = states.new_zeros(())
        for key, values in targets.items():
            target = torch.tensor([values.index(fact[key]) for fact in facts], device=device)
            guess = heads[key](states).transpose(1, 2)
            losses = F.cross_entropy(guess, target[:, None].expand(ids.shape), reduction="none")
            loss = loss + (losses * ended).sum() / ended.sum()
        return loss

    run_stage("text", nn.ModuleDict({"text": text, "heads": heads}), loss_of, steps=steps, lr=3e-3, folder=folder,
              ema_decay=0.98)
