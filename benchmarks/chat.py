"""Answers of `jaxgpt chat` beside those of transformers: the same model, one text at a time, the likeliest tokens.

Each side is a process of its own that has compiled and warmed up; they work in turns of some seconds, never two at
once. A third process reads memory as fast as it can. Prints one JSON line: tokens/s of whole answers and after their
first token, seconds to the first token, each with the paired ratios of jaxgpt to transformers (above 1: jaxgpt is
faster), how many tokens both sides agree on, and the part of the memory's speed at which jaxgpt reads its weights, all
of them for each token.

    python benchmarks/chat.py --run runs/smollm2 --hf exported/smollm2
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from compare import LOADED, QUIET, machine
from comparison import most
from turns import Worker, WorkerError, compare, serve, spread, take_turns, until

from jaxgpt.devices import cores

QUESTION = "Explain in a few sentences why the sky is blue during the day and red in the evening."


def measured(answer, n):
    """The work of a side, from a function that returns when it began and when each of its n tokens was there."""

    def work(seconds):
        answers = []

        def piece():
            answers.append(answer())
            return n

        amount, spent = until(seconds, piece)
        first = statistics.median(there[0] - began for began, there in answers)
        after = statistics.median((n - 1) / (there[-1] - there[0]) for _, there in answers)
        return {"amount": amount, "seconds": spent, "first_token_s": first, "after_first": after}

    work(0.1)
    return work


def ours(spec):
    """The writer of `jaxgpt chat`, which has read nothing of the prompt before."""
    import jax

    from jaxgpt import load
    from jaxgpt.files.compiled import keep_compiled
    from jaxgpt.sampling import make_rule
    from jaxgpt.tools.dialogue import Writer

    keep_compiled()
    model = jax.tree.map(lambda a: a.astype(spec["dtype"]), load(spec["run"]).model)
    writer, rule, tokens = Writer(model), make_rule(0.0), []

    def answer():
        tokens.clear()
        writer.tokens.clear()
        began, there = time.perf_counter(), []
        for ids in writer.write(spec["prompt"], spec["new_tokens"], rule, None):
            if ids:
                there.append(time.perf_counter())
                tokens.extend(ids)
        return began, there

    work = measured(answer, spec["new_tokens"])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    return {"parameters": parameters, "bytes": size, "tokens": tokens}, work


def theirs(spec):
    """`generate` of transformers, with its cache."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        """Notes when each token is there; the first call is for the prompt."""

        def __init__(self):
            self.there = []

        def put(self, value):
            self.there.append(time.perf_counter())

        def end(self):
            pass

    model = AutoModelForCausalLM.from_pretrained(spec["hf"], dtype=getattr(torch, spec["dtype"])).eval()
    model.generation_config.eos_token_id = None  # all tokens, whatever they are
    prompt, tokens = torch.tensor([spec["prompt"]]), []
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}

    @torch.inference_mode()
    def answer():
        clock, began = Clock(), time.perf_counter()
        out = model.generate(prompt, max_new_tokens=spec["new_tokens"], streamer=clock, **options)
        tokens[:] = out[0, prompt.shape[1] :].tolist()
        return began, clock.there[1:]

    work = measured(answer, spec["new_tokens"])
    return {"parameters": model.num_parameters(), "tokens": tokens, "threads": torch.get_num_threads()}, work


def prompt_of(run_dir):
    """The ids of the question as the run's template puts it; without a template, of the question alone."""
    from jaxgpt.runs.loading import files_of, read_files
    from jaxgpt.text.chat import ChatEncoder

    config, tokenizer = read_files(files_of(run_dir), run_dir)
    if tokenizer.chat_template is None:
        return config, tokenizer.encode(QUESTION).tolist()
    return config, ChatEncoder(tokenizer, run_dir).encode([{"role": "user", "content": QUESTION}]).tolist()


def memory(spec):
    """Bytes that this machine reads when each core sums its part of an array of 1 GB."""
    parts = np.array_split(np.ones(1 << 28, np.float32), cores.count())
    threads = ThreadPoolExecutor(len(parts))

    def piece():
        list(threads.map(np.sum, parts))
        return sum(part.nbytes for part in parts)

    def work(seconds):
        amount, spent = until(seconds, piece)
        return {"amount": amount, "seconds": spent}

    work(0.1)
    return {}, work


SIDES = {"jaxgpt": ours, "transformers": theirs, "memory": memory}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run directory")
    parser.add_argument("--hf", required=True, help="folder with the same model for transformers")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of both (default float32)")
    parser.add_argument("--new_tokens", type=int, default=128, help="of an answer (default 128)")
    parser.add_argument("--rounds", type=int, default=5, help="paired measurements (default 5)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a slice (default 10)")
    args = parser.parse_args()
    config, prompt = prompt_of(args.run)
    if args.new_tokens < 2 or len(prompt) + args.new_tokens > config.model.block_size:
        most_new = config.model.block_size - len(prompt)
        parser.error(f"new_tokens is {args.new_tokens}: use 2 to {most_new}, what the window has room for")
    spec, workers = vars(args) | {"prompt": prompt}, {}
    try:
        for side in SIDES:
            workers[side] = Worker(__file__, spec | {"side": side}, os.environ | {"HF_HUB_OFFLINE": "1"})
        facts = {side: worker.facts for side, worker in workers.items()}
        answers = take_turns(workers, args.rounds, args.seconds)
    except WorkerError as error:
        print(f"chat: error: {error}", file=sys.stderr)
        return 1
    finally:
        for worker in workers.values():
            worker.close()

    def of(name, **how):
        return compare({side: [answer[name] for answer in answers[side]] for side in ("jaxgpt", "transformers")}, **how)

    both = [facts[side].pop("tokens") for side in ("jaxgpt", "transformers")]
    agreed = next((i for i, (a, b) in enumerate(zip(*both)) if a != b), args.new_tokens)
    others = most([answer["others"] for side in answers.values() for answer in side])
    if (others or 0) > QUIET:
        print(f"chat: warning: {LOADED.format(others)}", file=sys.stderr)
    record = {"work": "chat", "unit": "tokens/s", **of("rate"), "after_first": of("after_first")}
    record |= {"first_token_s": of("first_token_s", lower_is_better=True), "agreed_tokens": agreed, "others": others}
    read = [answer["after_first"] * facts["jaxgpt"]["bytes"] for answer in answers["jaxgpt"]]
    speeds = [answer["rate"] for answer in answers["memory"]]
    record |= {"bytes_per_s": spread(read), "memory_bytes_per_s": spread(speeds)}
    record |= {"of_memory": spread([a / b for a, b in zip(read, speeds, strict=True)])}
    record |= {"prompt_tokens": len(prompt), "new_tokens": args.new_tokens, "dtype": args.dtype, "facts": facts}
    command = shlex.join(["python", "benchmarks/chat.py", *sys.argv[1:]])
    print(json.dumps(record | {"rounds": args.rounds, "seconds": args.seconds} | machine() | {"command": command}))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):  # a worker, which is given its specification
        serve(lambda spec: SIDES[spec["side"]](spec))
    else:
        sys.exit(main())
