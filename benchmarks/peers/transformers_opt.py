"""Times generation with the OPT of Hugging Face transformers, dense.

    python benchmarks/peers/transformers_opt.py --model opt-30b --batch 1,8,32

Needs torch with CUDA and transformers, in any environment; nothing of FlashJAX. The
figures mean what those of `flashjax bench generate` mean: random weights, a request
from token ids to new ones, medians after a warm-up. Prefill and steps have no programs
of their own here: a prefill is a request of one token, a step the rest by `new - 1`.
Writes results of the same form.
"""

import argparse
import datetime
import json
import pathlib
import re
import statistics
import sys
import time

# Hidden size, layers, heads; OPT-350M has its norms elsewhere and is left out.
SIZES = {
    "opt-125m": (768, 12, 12),
    "opt-1.3b": (2048, 24, 32),
    "opt-2.7b": (2560, 32, 32),
    "opt-6.7b": (4096, 32, 32),
    "opt-13b": (5120, 40, 40),
    "opt-30b": (7168, 48, 56),
    "opt-66b": (9216, 64, 72),
    "opt-175b": (12288, 96, 96),
}


def build(torch, transformers, name: str, layers: int, dtype: str):
    hidden, all_layers, heads = SIZES[name]
    config = transformers.OPTConfig(
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers or all_layers,
        num_attention_heads=heads,
    )
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(config)
    model = model.to(getattr(torch, dtype)).to_empty(device="cuda").eval()
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    return model


def median_seconds(torch, call, repetitions: int) -> float:
    call()
    times = []
    for _ in range(repetitions):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(torch, model, batch: int, prompt: int, new: int, repetitions: int) -> dict:
    vocab = model.config.vocab_size
    ids = torch.randint(4, vocab, (batch, prompt), device="cuda")
    torch.cuda.reset_peak_memory_stats()

    def request(tokens: int) -> None:
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
            ).cpu()

    prefill = median_seconds(torch, lambda: request(1), repetitions)
    whole = median_seconds(torch, lambda: request(new), repetitions)
    step = (whole - prefill) / (new - 1)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "prefill_ms": round(prefill * 1e3, 3),
        "step_ms": round(step * 1e3, 4),
        "request_ms": round(whole * 1e3, 3),
        "prefill_tokens_per_s": round(batch * prompt / prefill, 1),
        "decode_tokens_per_s": round(batch / step, 1),
        "tokens_per_s": round(batch * new / whole, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="opt-30b")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers; 0: all")
    parser.add_argument("--batch", default="1,8", help="list")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results"))
    parser.add_argument("--name", default="transformers")
    options = parser.parse_args()
    try:
        import torch
        import transformers
    except ImportError as error:
        sys.exit(f"expected torch and transformers, got: {error}")
    if not torch.cuda.is_available():
        sys.exit("expected torch with a CUDA device, got none")
    batches = [int(part) for part in options.batch.split(",")]
    model = build(torch, transformers, options.model, options.layers, options.dtype)
    common = {
        "model": options.model,
        "layers": model.config.num_hidden_layers,
        "sparsity": 0.0,
        "dtype": options.dtype,
        "prompt": options.prompt,
        "new": options.new,
        "weight_bytes": sum(p.nbytes for p in model.parameters()),
    }
    results = []
    for batch in batches:
        row = common | {"batch": batch}
        try:
            row |= measure(
                torch, model, batch, options.prompt, options.new, options.repetitions
            )
        except torch.cuda.OutOfMemoryError:
            print(f"batch {batch}: out of memory")
        results.append(row)
        print(json.dumps(row))
    now = datetime.datetime.now(datetime.UTC)
    device = torch.cuda.get_device_name()
    content = {
        "environment": {
            "device": device,
            "platform": "gpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        },
        "device_bytes": torch.cuda.get_device_properties(0).total_memory,
        "results": results,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = options.out / f"{options.name}-{stem}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
