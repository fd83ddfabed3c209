"""Tiny random models of the supported families, saved as local Hugging Face folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

FAMILIES = ("gemma3", "llama", "gpt2", "gpt_neox")
CONTEXT = 64
SENTENCES = [
    "the cat sat on the mat",
    "the dog sat on the cat",
    "x y z; the mat; the dog, the cat; x y z",
] * 4
SPECIAL = ["<pad>", "<eos>", "<bos>"]


def byte_level_bpe() -> Tokenizer:
    """All bytes, three special tokens and the few words of `SENTENCES`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def tiny_tokenizer(bos: bool = False, padding: bool = False) -> PreTrainedTokenizerFast:
    """Gemma's adds <bos> and has <pad>; the others have only <eos>."""
    tokenizer = byte_level_bpe()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    extra = {"pad_token": "<pad>"} if padding else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        **extra,
    )


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """Width 32, four layers (GPT-2 three), weights wide enough that predictions differ from each other."""
    common: dict[str, Any] = {
        "vocab_size": 280,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": False,
    }
    grouped = {"num_key_value_heads": 2, "head_dim": 8}
    if family == "gemma3":
        kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
        own = {**grouped, "sliding_window": 5, "layer_types": kinds, "tie_word_embeddings": True}
        return Gemma3TextConfig(**{**common, **own, **changes})
    if family == "llama":
        return LlamaConfig(**{**common, **grouped, **changes})
    if family == "gpt_neox":
        return GPTNeoXConfig(**{**common, **changes})
    gpt2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT, "tie_word_embeddings": True}
    shared = ("vocab_size", "initializer_range", "pad_token_id", "eos_token_id", "bos_token_id")
    return GPT2Config(**{**{key: common[key] for key in shared}, **gpt2, **changes})


def build(folder: Path, family: str, **changes: Any) -> Path:
    """Save a random model of the family with its tokenizer; the same weights every time."""
    torch.manual_seed(FAMILIES.index(family))
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    model.save_pretrained(folder)
    tiny_tokenizer(bos=family == "gemma3", padding=family == "gemma3").save_pretrained(folder)
    return folder


def build_bert(folder: Path) -> Path:
    """A language model whose modules have none of the names we know."""
    config = BertConfig(
        vocab_size=280,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        is_decoder=True,
    )
    BertLMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def raw_model(folder: str | Path) -> PreTrainedModel:
    """The same folder as plain transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def raw_blocks(raw: PreTrainedModel) -> torch.nn.ModuleList:
    """Its transformer blocks, whatever the family calls them."""
    for path in ("model.layers", "transformer.h", "gpt_neox.layers"):
        try:
            return raw.get_submodule(path)  # type: ignore[return-value]
        except AttributeError:
            continue
    raise AssertionError("unknown family")


def as_hub_cache(cache: Path, hub_id: str, folder: Path, commit: str) -> Path:
    """Put a model's files where the hub's client would have put a download."""
    repo = cache / ("models--" + hub_id.replace("/", "--"))
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        os.link(file, snapshot / file.name)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return snapshot


def write_gguf(path: Path) -> Path:
    """A Llama-style GGUF file: one block of width 32, float32, with the byte-level tokenizer."""
    import gguf

    bpe = json.loads(byte_level_bpe().to_str())["model"]
    vocab = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    for key, value in {
        "context_length": CONTEXT,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 8,
        "vocab_size": len(vocab),
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in vocab])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    shapes = {
        "token_embd": (len(vocab), 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_norm": (32,),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
