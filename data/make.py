"""Make the embedded problems and policy: ``python data/make.py --out data --seed 0``.

Writes ``train.jsonl``, ``heldout.jsonl``, ``expert.jsonl`` and the Hugging Face folder ``policy/``. The
problems are chains of two or three operations, evaluated from left to right, all of whose values are in
1...99; the policy is a small Qwen2 model, warmed up on other correct chains and stopped while it is right on
about a third of the problems, so that reinforcement learning has something to teach. Plain torch and
transformers; on the CPU, minutes. ``--problems-only`` leaves the policy alone.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AddedToken, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

Problem = dict[str, Any]

LEVELS = {1: (2, False), 2: (2, True), 3: (3, False), 4: (3, True)}  # operations, holds a product or quotient
NUM_TRAIN, EXPERT_EVERY, NUM_HELDOUT, NUM_PROBE = 4000, 4, 400, 512
MAX_NEW_TOKENS = 48
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

PAD, UNKNOWN, USER, ASSISTANT, END, BOX = "<pad>", "<unk>", "<user>", "<assistant>", "<end>", "\\boxed{"
VOCABULARY = [PAD, UNKNOWN, USER, ASSISTANT, END, *"0123456789+-*/()=;", BOX, "}"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<user>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}{{ '<assistant>' + message['content'] + '<end>' }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}"
)

LEARNING_RATE, WARMUP_STEPS, BATCH_SIZE, MAX_STEPS = 2e-3, 50, 128, 4000
# Accuracy climbs from 0.1 to 0.35 within 80 steps, so it is probed often; above this loss it is a tenth at most.
PROBE_EVERY, PROBE_BELOW_LOSS = 5, 0.25
STOP_ABOVE = 0.31
BAND = (0.25, 0.45)


def draw_problem(rng: random.Random, level: int) -> Problem:
    """Draw a chain of this level: ``(28+5)*2-38``, solved as ``28+5=33;33*2=66;66-38=28;\\boxed{28}``."""
    num_operations, wants_product = LEVELS[level]
    while True:
        value = rng.randint(1, 99)
        expression, operations, steps = str(value), "", ""
        for _ in range(num_operations):
            choices = {
                "+": range(1, 100 - value),
                "-": range(1, value),
                "*": [factor for factor in range(2, 10) if value * factor <= 99],
                "/": [divisor for divisor in range(2, 10) if value % divisor == 0],
            }
            operation = rng.choice([name for name, operands in choices.items() if operands])
            operand = rng.choice(choices[operation])
            result = APPLY[operation](value, operand)
            if operation in "*/" and operations[-1:] in ("+", "-"):
                expression = f"({expression})"
            expression += f"{operation}{operand}"
            steps += f"{value}{operation}{operand}={result};"
            value, operations = result, operations + operation
        if any(operation in "*/" for operation in operations) == wants_product:
            solution = f"{steps}\\boxed{{{value}}}"
            return {"problem": expression, "answer": str(value), "level": level, "solution": solution}


def draw_new(rng: random.Random, count: int, seen: set[str]) -> list[Problem]:
    """Draw ``count`` problems, the levels in turn, none of them in ``seen``, and add them to it."""
    problems: list[Problem] = []
    while len(problems) < count:
        problem = draw_problem(rng, 1 + len(problems) % len(LEVELS))
        if problem["problem"] not in seen:
            seen.add(problem["problem"])
            problems.append(problem)
    return problems


def make_problems(seed: int) -> dict[str, list[Problem]]:
    """Make the rows of the three files, by name, and of ``probe``, which decides when the warm-up stops."""
    rng, seen = random.Random(seed), set[str]()
    heldout, train, probe = (draw_new(rng, count, seen) for count in (NUM_HELDOUT, NUM_TRAIN, NUM_PROBE))
    for rows in (heldout, train):
        rng.shuffle(rows)
    train = [{"id": f"train-{index:04d}", **row} for index, row in enumerate(train)]
    heldout = [{"id": f"heldout-{index:03d}", **row} for index, row in enumerate(heldout)]
    for index, row in enumerate(train + heldout):
        if index >= NUM_TRAIN or index % EXPERT_EVERY != 0:
            del row["solution"]
    expert = [row for row in train if "solution" in row]
    return {"train": train, "heldout": heldout, "expert": expert, "probe": probe}


def as_jsonl(rows: list[Problem]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_tokenizer() -> Qwen2Tokenizer:
    """One token a character, ``\\boxed{`` one more: a BPE without merges. No token is added by itself.

    Of this class, since transformers 5 loads the tokenizer of any Qwen2 model as one, whatever its files say.
    """
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(VOCABULARY)},
        merges=[],
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([USER, ASSISTANT], special_tokens=True)
    tokenizer.add_tokens([AddedToken(BOX, normalized=False)])
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def render(tokenizer: Any, problem: Problem) -> str:
    messages = [{"role": "user", "content": problem["problem"]}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def warmup_loss(model: Any, tokenizer: Any, batch: list[Problem]) -> torch.Tensor:
    """Cross-entropy of the solutions and their end tokens, mean over tokens."""
    prompts = [render(tokenizer, problem) for problem in batch]
    texts = [prompt + problem["solution"] + END for prompt, problem in zip(prompts, batch, strict=True)]
    tokens = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
    for row, prompt in enumerate(prompts):
        labels[row, : len(tokenizer(prompt)["input_ids"])] = -100
    logits = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@torch.no_grad()
def sample(model: Any, tokenizer: Any, problems: list[Problem], greedy: bool = False) -> list[tuple[bool, int]]:
    """Sample a response for each problem at temperature 1: is it right, and its tokens, 0 for one cut off."""
    prompts = tokenizer([render(tokenizer, row) for row in problems], padding=True, return_tensors="pt")
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}
    output = model.generate(
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        **sampling,
    )
    results = []
    for problem, padded in zip(problems, output[:, prompts["input_ids"].shape[1] :].tolist(), strict=True):
        length = padded.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in padded else 0
        text = tokenizer.decode(padded[:length])
        results.append((text.endswith(f"\\boxed{{{problem['answer']}}}{END}"), length))
    return results


def warm_up(problems: dict[str, list[Problem]], tokenizer: Any, seed: int) -> Qwen2ForCausalLM:
    """Train on fresh correct chains until the accuracy on the probe problems passes ``STOP_ABOVE``."""
    torch.manual_seed(seed)
    rng = random.Random(seed + 1)
    kept_out = {row["problem"] for rows in problems.values() for row in rows}
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    for step in range(1, MAX_STEPS + 1):
        batch = draw_new(rng, BATCH_SIZE, set(kept_out))
        loss = warmup_loss(model, tokenizer, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS)
        optimizer.step()
        losses.append(loss.item())
        recent = statistics.fmean(losses[-10:])
        if step % PROBE_EVERY == 0 and recent < PROBE_BELOW_LOSS:
            accuracy = statistics.fmean(right for right, _ in sample(model, tokenizer, problems["probe"]))
            print(f"step {step}: loss {recent:.3f}, probe accuracy {accuracy:.3f}", flush=True)
            if accuracy >= STOP_ABOVE:
                return model
        elif step % 50 == 0:
            print(f"step {step}: loss {recent:.3f}", flush=True)
    raise SystemExit(f"probe accuracy below {STOP_ABOVE} after {MAX_STEPS} steps; try another --seed")


def report(model: Any, tokenizer: Any, heldout: list[Problem]) -> float:
    """Print accuracy on held-out problems, avg@4 at temperature 1 and greedy; return the first."""
    draws = list(zip(*(sample(model, tokenizer, heldout) for _ in range(4)), strict=True))
    averages = [statistics.fmean(right for right, _ in four) for four in draws]
    greedy = [right for right, _ in sample(model, tokenizer, heldout, greedy=True)]
    for level in (None, *LEVELS):
        rows = [row for row, problem in enumerate(heldout) if level in (None, problem["level"])]
        mean = statistics.fmean(averages[row] for row in rows)
        margin = 1.96 * statistics.stdev(averages[row] for row in rows) / math.sqrt(len(rows))
        at_zero = statistics.fmean(greedy[row] for row in rows)
        interval = f"[{mean - margin:.3f}, {mean + margin:.3f}]"
        print(f"held-out, level {level or 'any'}: avg@4 {mean:.3f} {interval}, greedy {at_zero:.3f}")
    lengths = [length for four in draws for _, length in four]
    print(f"mean length {statistics.fmean(length or MAX_NEW_TOKENS for length in lengths):.1f} tokens")
    print(f"cut off at {MAX_NEW_TOKENS} tokens: {lengths.count(0)} of {len(lengths)} responses")
    print(f"sometimes right, sometimes not: {sum(0 < a < 1 for a in averages)} of {len(averages)} problems")
    return statistics.fmean(averages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems-only", action="store_true", help="leave the policy alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # another number of threads adds in another order and ends elsewhere
    start = time.monotonic()

    problems = make_problems(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in ("train", "heldout", "expert"):
        (arguments.out / f"{name}.jsonl").write_text(as_jsonl(problems[name]))
        print(f"{name}.jsonl: {len(problems[name])} problems")
    if arguments.problems_only:
        return

    tokenizer = make_tokenizer()
    model = warm_up(problems, tokenizer, arguments.seed)
    accuracy = report(model, tokenizer, problems["heldout"])
    if not BAND[0] <= accuracy <= BAND[1]:
        raise SystemExit(f"held-out accuracy {accuracy:.3f} outside {BAND}: no policy; try another --seed")
    model.save_pretrained(arguments.out / "policy")
    tokenizer.save_pretrained(arguments.out / "policy")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"policy: {num_parameters} parameters, {time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
