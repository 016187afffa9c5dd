"""Train `dynamo-tiny` on the FAQ: `python -m dynamo.llm.tiny.train [--out DIR]`, some minutes on two cores.

1. A byte-level BPE tokenizer is learned from generated conversations (`lessons.py`).
2. The Llama first learns to copy: random tokens that repeat, at varying distance. Recall is built on this.
3. Then it learns the assistant's side of conversations, in sequences that grow from 256 to 4,096 tokens.
4. The weights are rounded to bfloat16 and saved, and an exam is held in float32 and in bfloat16.

The exit code is 1 if any FAQ answer is wrong by one token.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from dynamo.llm.tiny import FAQ_FILE, MODEL_DIR, NAME, faq, words
from dynamo.llm.tiny.lessons import Lessons, Message

SEED = 7
VOCABULARY = 2048
CONTEXT = 8192
STEPS = 1200
COPY_STEPS = 130  # of STEPS: the copying lesson
TOKENS_PER_STEP = 4096
SCHEDULE = ((0.35, (256, 256, 512)), (0.6, (256, 512, 1024)), (1.0, (256, 2048, 512, 2048, 1024, 4096)))

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL = [PAD, BEGIN, END, *(f"<|{role}|>" for role in ROLES)]
CHAT_TEMPLATE = """\
{{- '<|begin|>' -}}
{%- for message in messages -%}
  {{- '<|' + {'developer': 'system'}.get(message.role, message.role) + '|>' -}}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- elif message.content -%}
    {%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
  {%- endif -%}
  {%- for call in message.tool_calls or [] -%}
    {{- '<tool_call>' + (call.function | tojson) + '</tool_call>' -}}
  {%- endfor -%}
  {{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def train_tokenizer(lessons: Lessons) -> Tokenizer:
    """Byte-level BPE: any text has tokens, and tokens give back exactly that text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [m.content for _ in range(400) for m in lessons.conversation(document_words=20, turns=40)]
    texts += [f" {word}" for word in lessons.words] * 40
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Encoder:
    """Messages -> token ids (those of CHAT_TEMPLATE's text) and, for each id, whether the loss counts it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.role_ids = {role: tokenizer.token_to_id(f"<|{role}|>") for role in ROLES}
        self.role_ids["developer"] = self.role_ids["system"]
        self.begin_id = tokenizer.token_to_id(BEGIN)
        self.end_id = tokenizer.token_to_id(END)

    def __call__(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        ids, learn = [self.begin_id], [False]
        for message, encoding in zip(messages, self.tokenizer.encode_batch([m.content for m in messages]), strict=True):
            ids += [self.role_ids[message.role], *encoding.ids, self.end_id]
            learn += [False, *[message.learn] * (len(encoding.ids) + 1)]
        return ids, learn


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=2,  # of 64 dimensions: they learned to copy in fewer steps than four of 32
        num_key_value_heads=2,
        attention_bias=True,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BEGIN),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model = LlamaForCausalLM(config)
    look_back(model, config)
    return model


@torch.no_grad()
def look_back(model: LlamaForCausalLM, config: LlamaConfig) -> None:
    """Let the heads of the first layer start out looking 1, 2... tokens back: copying begins with the token before.

    RoPE turns keys and queries by their position. With a bias b on the key and, on the query, b turned back by d
    positions, the score is highest for the key d tokens ago. Without this start, 400 steps were too few.
    """
    half = config.head_dim // 2
    angles = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    strength = 5.0 * (angles > 0.03)
    attention = model.model.layers[0].self_attn
    for bias, direction in ((attention.q_proj.bias, -1), (attention.k_proj.bias, 0)):
        for head, part in enumerate(bias.view(-1, config.head_dim)):
            turn = direction * (head + 1) * angles
            part[:half], part[half:] = strength * turn.cos(), strength * turn.sin()


def copying(length: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens whose last part repeats an earlier part, at a distance that differs from row to row."""
    part = length * 3 // 8
    ids = torch.randint(len(SPECIAL), VOCABULARY, (rows, length))
    first = torch.randint(0, length - 2 * part + 1, (rows, 1))
    ids[:, -part:] = ids.gather(1, first + torch.arange(part))
    learn = torch.zeros_like(ids, dtype=torch.bool)
    learn[:, 1 - part :] = True
    return ids, learn


def conversations(lessons: Lessons, encode: Encoder, length: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One conversation a row, cut at `length`; 6 of 10 begin with a document of up to about that length."""
    ids = torch.zeros(rows, length + 1, dtype=torch.long)
    learn = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(rows):
        document_words = int(length * 0.6 * lessons.random.random()) if lessons.random.random() < 0.6 else 0
        row_ids, row_learn = encode(lessons.conversation(document_words, turns=length // 24))
        n = min(length + 1, len(row_ids))
        ids[row, :n], learn[row, :n] = torch.tensor(row_ids[:n]), torch.tensor(row_learn[:n])
    return ids, learn


def train(model: LlamaForCausalLM, lessons: Lessons, encode: Encoder) -> None:
    """Muon for the matrices, with which few steps are enough; AdamW for embeddings, biases and norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers = (
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    )
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    for step in range(STEPS):
        progress = step / STEPS
        if step < COPY_STEPS:
            length = (64, 128, 256)[step % 3]
            ids, learn = copying(length, TOKENS_PER_STEP // length)
        else:
            lengths = next(lengths for until, lengths in SCHEDULE if progress < until)
            length = lengths[step % len(lengths)]
            ids, learn = conversations(lessons, encode, length, TOKENS_PER_STEP // length)
        for group, peak in groups:
            group["lr"] = peak * min(1.0, (step + 1) / 20, 1.5 * (1 - progress))
        targets = ids[:, 1:][learn[:, 1:]]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(ids[:, :-1]).last_hidden_state
            logits = model.lm_head(hidden[learn[:, 1:]]).float()
        loss = cross_entropy(logits, targets)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 20 == 19:
            right = (logits.argmax(-1) == targets).float().mean().item()
            print(
                f"step {step + 1}/{STEPS}, length {length:4}: loss {loss.item():.4f}, {right:.2%} of tokens right,"
                f" {time.process_time() / 60:.1f} CPU minutes",
                flush=True,
            )


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write what vLLM and transformers (4.50 and later) read."""
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    config = json.loads((out / "config.json").read_text())
    # Older readers know `rope_theta` and `torch_dtype`, newer ones `rope_parameters` and `dtype`.
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"], "torch_dtype": "bfloat16"}
    tokens = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        **tokens,
    }
    origin = {"name": NAME, "faq_sha256": hashlib.sha256(FAQ_FILE.read_bytes()).hexdigest(), "seed": SEED}
    tokenizer.save(str(out / "tokenizer.json"))
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("special_tokens_map.json", tokens),
        ("trained_from.json", origin),
    ):
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.no_grad()
def examine(model: LlamaForCausalLM, encode: Encoder, exam: dict[str, list[list[Message]]]) -> bool:
    """Print how many answers of each kind are right, and return whether all of the FAQ are.

    Greedy decoding gives an answer exactly if each of its tokens is the likeliest after those before it, so one
    forward pass per conversation is enough. The margin is the smallest lead of a right token, in logits.
    """
    faq_right = True
    for name, cases in exam.items():
        right, margin = 0, float("inf")
        for ids, learn in map(encode, cases):
            all_ids, counted = torch.tensor([ids]), torch.tensor([learn])[:, 1:]
            logits = model(all_ids[:, :-1]).logits[counted].float()
            if torch.equal(logits.argmax(-1), all_ids[:, 1:][counted]):
                right += 1
                best = logits.topk(2).values
                margin = min(margin, (best[:, 0] - best[:, 1]).min().item())
        print(f"{model.dtype} {name}: {right} of {len(cases)} right, margin {margin:.2f}", flush=True)
        faq_right = faq_right and (right == len(cases) or not name.startswith("FAQ"))
    return faq_right


def main() -> int:
    parser = argparse.ArgumentParser(description="Train dynamo-tiny on faq.md.")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder for the model (default: the package's own)")
    out: Path = parser.parse_args().out
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    lessons = Lessons(faq(), words(), SEED)
    tokenizer = train_tokenizer(lessons)
    encode = Encoder(tokenizer)
    model = new_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.get_vocab_size()} tokens", flush=True)
    train(model, lessons, encode)
    model.eval().to(torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, out)
    exam = Lessons(faq(), words(), SEED + 1).exam()
    passed = [examine(model.to(dtype), encode, exam) for dtype in (torch.bfloat16, torch.float32)]
    print(f"saved to {out}; {time.process_time() / 60:.1f} CPU minutes in all")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
