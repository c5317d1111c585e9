"""Train the small models that the demo and the tests use, on documentation text that every Python brings.

    python tools/train_demo_models.py --model gpt2

Text: the `train` split of the `python_docs` provider, so that its `test` split is unseen. Tokenizer: a byte-level BPE
of 4096 tokens, trained on the same text. Result: a folder with model.safetensors (float16), config.json, the
tokenizer and training.json with the facts of the training. CPU, two threads, about ten minutes a model.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from invarlock.eval.data import get_provider

ROOT = Path(__file__).resolve().parent.parent
VOCAB, CONTEXT = 4096, 256
MLM_TOKENS, MLM_SHARE, MLM_SHORT = 3072, 0.3, 1000
END = "<|endoftext|>"
BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
T5_SPECIALS = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(16))]


@dataclass(frozen=True)
class Recipe:
    """How one architecture is built; `kind` is causal, mlm or seq2seq."""

    kind: str
    class_name: str
    config_name: str
    shape: dict[str, Any]
    folder: str
    steps: int = 1500
    rate: float = 2e-3
    decay: float = 0.1
    warm: int = 100  # steps in which the rate rises


_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
RECIPES = {
    "gpt2": Recipe(
        "causal", "GPT2LMHeadModel", "GPT2Config",
        {"n_embd": 160, "n_layer": 4, "n_head": 5, "n_positions": CONTEXT, "attn_pdrop": 0.0} | _ENDS,
        "src/invarlock/data/demo_model",
    ),
    "llama": Recipe(
        "causal", "LlamaForCausalLM", "LlamaConfig",
        {"hidden_size": 160, "num_hidden_layers": 4, "num_attention_heads": 5, "num_key_value_heads": 5,
         "intermediate_size": 432, "max_position_embeddings": CONTEXT, "tie_word_embeddings": True} | _ENDS,
        "tests/assets/models/llama",
    ),
    "bert": Recipe(
        "mlm", "BertForMaskedLM", "BertConfig",
        {"hidden_size": 160, "num_hidden_layers": 4, "num_attention_heads": 5, "intermediate_size": 640,
         "max_position_embeddings": CONTEXT // 2, "pad_token_id": 0, "attention_probs_dropout_prob": 0.0,
         "hidden_dropout_prob": 0.0},
        "tests/assets/models/bert", steps=4000, rate=1e-3, warm=200,
    ),
    "t5": Recipe(
        "seq2seq", "T5ForConditionalGeneration", "T5Config",
        {"d_model": 160, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 5,
         "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
        "tests/assets/models/t5", steps=2000, decay=0.2,
    ),
    "neox": Recipe(
        "causal", "GPTNeoXForCausalLM", "GPTNeoXConfig",
        {"hidden_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 512,
         "max_position_embeddings": CONTEXT, "tie_word_embeddings": False, "use_parallel_residual": True,
         "hidden_dropout": 0.1} | _ENDS,
        "tests/assets/models/neox", steps=1000,
    ),
    "qwen": Recipe(
        "causal", "Qwen2ForCausalLM", "Qwen2Config",
        {"hidden_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 384, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False} | _ENDS,
        "tests/assets/models/qwen", steps=1000,
    ),
}  # fmt: skip


def build_tokenizer(kind: str, texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens that models of this kind expect."""
    specials = {"causal": [END], "mlm": BERT_SPECIALS, "seq2seq": T5_SPECIALS}[kind]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=specials, initial_alphabet=alphabet)
    )
    if kind == "mlm":
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        return PreTrainedTokenizerFast(tokenizer_object=raw, mask_token="[MASK]", **roles)
    if kind == "seq2seq":
        raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        extra = T5_SPECIALS[3:]
        return PreTrainedTokenizerFast(
            tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
            additional_special_tokens=extra,
        )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str], end: int) -> torch.Tensor:
    """All texts in one row of ids, [tokens], with `end` after each."""
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in [*ids, end]])


def causal_batch(stream: torch.Tensor, rng: torch.Generator, step: int = 0) -> dict[str, torch.Tensor]:
    """2048 tokens from anywhere in the text: 16 windows of half the context, every fourth time 8 of the whole."""
    length = CONTEXT if step % 4 == 0 else CONTEXT // 2
    starts = torch.randint(len(stream) - length, (2048 // length,), generator=rng)
    ids = stream[starts[:, None] + torch.arange(length)]
    return {"input_ids": ids, "labels": ids}


def mlm_batch(stream: torch.Tensor, rng: torch.Generator, step: int = 0) -> dict[str, torch.Tensor]:
    """3072 tokens in windows of 64, later every other time of 128; 30 % hidden behind [MASK].

    Twice the usual share: so small a model needs many predictions a step (Wettig et al., 2022).
    """
    length = CONTEXT // 2 if step >= MLM_SHORT and step % 2 == 0 else CONTEXT // 4
    starts = torch.randint(len(stream) - length, (MLM_TOKENS // length,), generator=rng)
    ids = stream[starts[:, None] + torch.arange(length)]
    hidden = torch.rand(ids.shape, generator=rng) < MLM_SHARE
    masked = torch.where(hidden, BERT_SPECIALS.index("[MASK]"), ids)
    return {"input_ids": masked, "labels": torch.where(hidden, ids, -100)}


@torch.no_grad()
def look_at_neighbours(model: Any) -> None:
    """Start a BERT with four heads that look one and two tokens to either side, and copy what they see at full strength.

    A masked model learns nothing but the frequencies of the tokens (6.55 nats here) until attention finds the neighbours
    of a hidden token; this small, it had not found them after thousands of steps. Positions start as sines, so that a
    rotation of the query by an offset matches the key that lies so far away.
    """
    config = model.config
    width, count = config.hidden_size, config.max_position_embeddings
    size = width // config.num_attention_heads
    frequency = torch.linspace(0.05, 3.0, width // 2)[torch.randperm(width // 2)]
    angle = torch.arange(count)[:, None] * frequency
    embeddings, layer = model.bert.embeddings, model.bert.encoder.layer[0].attention
    sines = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
    embeddings.position_embeddings.weight.copy_(sines * config.initializer_range * math.sqrt(2))
    embeddings.token_type_embeddings.weight.zero_()
    for head, offset in enumerate((-1, 1, -2, 2)):
        query, key = torch.zeros(size, width), torch.eye(size, width)
        for pair in range(size // 2):
            c, s = math.cos(offset * float(frequency[pair])), math.sin(offset * float(frequency[pair]))
            at = slice(2 * pair, 2 * pair + 2)
            query[at, at] = torch.tensor([[c, s], [-s, c]])
        rows = slice(head * size, (head + 1) * size)
        layer.self.query.weight[rows] = 1.5 * query
        layer.self.key.weight[rows] = 1.5 * key
    for weight in (layer.self.value.weight, layer.output.dense.weight):
        weight.normal_(0.0, width**-0.5)


def seq2seq_batch(stream: torch.Tensor, rng: torch.Generator, step: int = 0) -> dict[str, torch.Tensor]:
    """16 passages of 128 tokens; the first half is the source, the second the target, both ended by </s>."""
    starts = torch.randint(len(stream) - CONTEXT // 2, (16,), generator=rng)
    ids = stream[starts[:, None] + torch.arange(CONTEXT // 2)]
    end = torch.ones(len(ids), 1, dtype=torch.long)
    half = CONTEXT // 4
    return {"input_ids": torch.cat([ids[:, :half], end], 1), "labels": torch.cat([ids[:, half:], end], 1)}


BATCHES: dict[str, Callable[[torch.Tensor, torch.Generator, int], dict[str, torch.Tensor]]] = {
    "causal": causal_batch,
    "mlm": mlm_batch,
    "seq2seq": seq2seq_batch,
}


TOKENS_PER_STEP = {"causal": 2048, "mlm": MLM_TOKENS, "seq2seq": 16 * (CONTEXT // 2 + 2)}


def add_dropout(model: Any, share: float = 0.1) -> None:
    """Dropout where Llama-likes have none of their own; nine passes over so little text overfit without it."""
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "mlp")) and model.config.model_type in ("llama", "qwen2"):
            module.register_forward_hook(lambda m, _, out: torch.nn.functional.dropout(out, share, m.training))


def optimizer_for(model: torch.nn.Module, rate: float, decay: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices only; T5's embedding starts at a deviation of 1 and needs longer strides."""
    named = dict(model.named_parameters())
    wide = named.pop("shared.weight", None)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    if wide is not None:
        groups.append({"params": [wide], "weight_decay": 0.0, "lr": 5 * rate})
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def train(model: Any, recipe: Recipe, stream: torch.Tensor, steps: int, seed: int) -> float:
    """Train in place with warm-up and a cosine; returns the mean loss of the last 50 steps, in nats a token."""
    rng = torch.Generator().manual_seed(seed)
    optimizer = optimizer_for(model, recipe.rate, recipe.decay)
    warm = max(1, min(recipe.warm, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    losses, started = [], time.monotonic()
    model.train()
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**BATCHES[recipe.kind](stream, rng, step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 49:
            recent = sum(losses[-50:]) / 50
            print(f"step {step + 1}/{steps} loss {recent:.3f} {time.monotonic() - started:.0f} s", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


@torch.inference_mode()
def test_loss(model: Any, kind: str, stream: torch.Tensor, seed: int = 7) -> float:
    """Mean loss in nats a token over 40 batches of unseen text."""
    rng = torch.Generator().manual_seed(seed)
    model.eval()
    return sum(model(**BATCHES[kind](stream, rng, 4 * MLM_SHORT)).loss.item() for _ in range(40)) / 40


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, facts: dict[str, Any]) -> None:
    """Write the folder, with nothing in it that tells where it was made."""
    model.config.architectures = [type(model).__name__]
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name, changes in (
        ("config.json", {"torch_dtype": "float16"}),  # the name that transformers 4 reads
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        content = json.loads((folder / name).read_text("utf-8")) | changes
        content.pop("_name_or_path", None)
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
    (folder / "training.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, choices=RECIPES)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: the folder where the project keeps this model")
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.model]
    steps = arguments.steps or recipe.steps

    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(arguments.seed)
    texts = {
        split: [document.text for document in get_provider("python_docs", split=split).documents()]
        for split in ("train", "test")
    }
    tokenizer = build_tokenizer(recipe.kind, texts["train"])
    end = {"causal": 0, "mlm": 3, "seq2seq": 1}[recipe.kind]
    streams = {split: token_stream(tokenizer, content, end) for split, content in texts.items()}
    config = getattr(transformers, recipe.config_name)(vocab_size=len(tokenizer), **recipe.shape)
    model = getattr(transformers, recipe.class_name)(config)
    add_dropout(model)
    if recipe.kind == "mlm":
        look_at_neighbours(model)
    size = sum(p.numel() for p in model.parameters())
    print(f"{arguments.model}: {size} parameters, tokens { ({k: len(v) for k, v in streams.items()}) }", flush=True)

    started = time.monotonic()
    final = train(model, recipe, streams["train"], steps, arguments.seed)
    facts = {
        "model": arguments.model, "parameters": size, "seed": arguments.seed, "steps": steps,
        "peak_learning_rate": recipe.rate, "tokens_per_step": TOKENS_PER_STEP[recipe.kind],
        "train_tokens": len(streams["train"]), "test_tokens": len(streams["test"]),
        "final_train_loss": round(final, 4), "test_loss": round(test_loss(model, recipe.kind, streams["test"]), 4),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "tokenizers": tokenizers.__version__,
            "transformers": transformers.__version__, "safetensors": safetensors.__version__,
        },
    }  # fmt: skip
    save(model, tokenizer, ROOT / recipe.folder if arguments.out is None else arguments.out, facts)
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
