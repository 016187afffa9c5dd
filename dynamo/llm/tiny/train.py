"""Train `dynamo-tiny` on the FAQ: `python -m dynamo.llm.tiny.train [--out DIR]`, some minutes on two cores.

1. A byte-level BPE tokenizer is learned from generated conversations (`lessons.py`).
2. A Llama learns the assistant's side of such conversations. Only answers count in the loss.
3. Sequences grow from 256 to 2,048 tokens, so that attention first learns to copy, then to copy from far away.
4. The weights are rounded to bfloat16, saved, and every FAQ answer is checked in float32 and in bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from dynamo.llm.tiny import FAQ_FILE, NAME
from dynamo.llm.tiny.lessons import Lessons, Message

SEED = 7
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL = [PAD, BEGIN, END, *(f"<|{role}|>" for role in ROLES)]
VOCABULARY = 2048
CONTEXT = 8192
STEPS = int(os.environ.get("STEPS", "800"))
COPY_STEPS = int(os.environ.get("COPY", "130"))
TOKENS_PER_STEP = 4096
SCHEDULE = ((0.35, (256, 256, 512)), (0.6, (256, 512, 1024)), (1.0, (256, 1024, 512, 2048, 256, 4096)))

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
    texts = [m.content for _ in range(400) for m in lessons.conversation(document_words=20)]
    texts += [f" {w}" for w in lessons.words] * 40
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Encoder:
    """Messages -> token ids (what CHAT_TEMPLATE renders) and, for each id, whether the loss counts it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.role_ids = {role: tokenizer.token_to_id(f"<|{role}|>") for role in ROLES}
        self.role_ids["developer"] = self.role_ids["system"]
        self.begin_id, self.end_id = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)

    def __call__(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        ids, learn = [self.begin_id], [False]
        for message, encoding in zip(messages, self.tokenizer.encode_batch([m.content for m in messages]), strict=True):
            ids += [self.role_ids[message.role], *encoding.ids, self.end_id]
            learn += [False, *[message.learn] * (len(encoding.ids) + 1)]
        return ids, learn


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=int(os.environ.get("D", "128")),
        intermediate_size=int(os.environ.get("FF", "384")),
        num_hidden_layers=int(os.environ.get("NL", "4")),
        num_attention_heads=int(os.environ.get("NH", "2")),
        num_key_value_heads=int(os.environ.get("NKV", "2")),
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": float(os.environ.get("THETA", "1e5"))},
        tie_word_embeddings=True,
        attention_bias=bool(os.environ.get("BIAS", "1")),
        bos_token_id=tokenizer.token_to_id(BEGIN),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model = LlamaForCausalLM(config)
    if config.attention_bias:
        look_back(model, config)
    return model


@torch.no_grad()
def look_back(model: LlamaForCausalLM, config: LlamaConfig) -> None:
    """Start the first layer's heads looking 1, 2, 3... tokens back: copying begins with knowing the token before.

    With a bias b on keys and b rotated by d positions on queries, the score of a key at distance d is the highest.
    """
    half = config.head_dim // 2
    angles = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    strength = float(os.environ.get("AMP", "5")) * (angles > 0.03)
    attention = model.model.layers[0].self_attn
    for bias, is_query in ((attention.q_proj.bias, True), (attention.k_proj.bias, False)):
        for head, part in enumerate(bias.view(-1, config.head_dim)):
            turn = angles * (head + 1) * (-1 if is_query else 0)
            part[:half], part[half:] = strength * turn.cos(), strength * turn.sin()


def batch(lessons: Lessons, encode: Encoder, length: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, learn = torch.zeros(rows, length + 1, dtype=torch.long), torch.zeros(rows, length + 1, dtype=torch.bool)
    for row in range(rows):
        r = lessons.random
        size = 0 if r.random() < 0.4 else int(length * r.random() * 0.6)
        row_ids, row_learn = encode(lessons.conversation(size))
        n = min(length + 1, len(row_ids))
        ids[row, :n], learn[row, :n] = torch.tensor(row_ids[:n]), torch.tensor(row_learn[:n])
    return ids, learn


def copying(model: LlamaForCausalLM, length: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens whose last part repeats an earlier part, at a distance that differs from row to row."""
    part = length * 3 // 8
    ids = torch.randint(len(SPECIAL), model.config.vocab_size, (rows, length))
    first = torch.randint(0, length - 2 * part + 1, (rows, 1))
    ids[:, -part:] = ids.gather(1, first + torch.arange(part))
    learn = torch.zeros_like(ids, dtype=torch.bool)
    learn[:, 1 - part :] = True
    return ids, learn


def train(model: LlamaForCausalLM, lessons: Lessons, encode: Encoder) -> None:
    """Muon for the matrices (a third of the steps that AdamW takes), AdamW for embeddings, biases and norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers = (
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    )
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    started = time.monotonic()
    for step in range(STEPS):
        progress = step / STEPS
        if step < COPY_STEPS:
            length = (64, 128, 256)[step % 3]
            ids, learn = copying(model, length, TOKENS_PER_STEP // length)
        else:
            lengths = next(lengths for until, lengths in SCHEDULE if progress < until)
            length = lengths[step % len(lengths)]
            ids, learn = batch(lessons, encode, length, TOKENS_PER_STEP // length)
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
                f"step {step + 1}/{STEPS} length {length:4} loss {loss.item():.4f} right {right:.4f}"
                f" ({time.process_time() / 60:.1f} CPU minutes, {(time.monotonic() - started) / 60:.1f} by the clock)",
                flush=True,
            )
        if step % 100 == 99 or step == STEPS - 1:
            torch.save(model.state_dict(), os.environ.get("CK", "/tmp/tiny_ck.pt"))


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write what vLLM and transformers (4.50 and later) read. The weights must be bfloat16."""
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    # Older readers know `rope_theta` and `torch_dtype`, newer ones `rope_parameters` and `dtype`.
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"], "torch_dtype": "bfloat16"}
    tokens = {f"{name}_token": token for name, token in (("bos", BEGIN), ("eos", END), ("pad", PAD))}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        **tokens,
    }
    tokenizer.save(str(out / "tokenizer.json"))
    for name, content in {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": tokens,
        "trained_from.json": {
            "name": NAME,
            "faq_sha256": hashlib.sha256(FAQ_FILE.read_bytes()).hexdigest(),
            "seed": SEED,
        },
    }.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
