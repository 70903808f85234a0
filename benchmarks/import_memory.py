"""Peak memory of `jaxgpt import`, as a multiple of the model's size in the type that the run keeps.

    python benchmarks/import_memory.py --megabytes 500 --dtype float32

A random Llama of that many megabytes in float32 is written, imported in a process of its own, and deleted. From the
peak of the resident memory of that process, that of importing a tiny model is subtracted.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import save_file

from jaxgpt.interop import hf_tokenizer, llama, llama_config
from jaxgpt.interop.gpt2 import flat, shapes
from jaxgpt.model import GPTConfig
from jaxgpt.tokenizer import CharTokenizer

ALPHABET = "".join(map(chr, range(0x4E00, 0x4E00 + 8192)))


def write(folder: pathlib.Path, channels: int, n_layer: int) -> int:
    """Write a random Llama in float32, one file per layer as large models are; return its number of parameters."""
    config = GPTConfig(
        vocab_size=len(ALPHABET), block_size=2048, n_layer=n_layer, n_head=channels // 64, n_embd=channels,
        positions="rope", norm="rmsnorm", activation="silu", bias="none", gated=True, lm_head="tied",
    )  # fmt: skip
    folder.mkdir()
    structs, places = flat(shapes(config)), {}
    rng = np.random.default_rng(0)
    for name, theirs in llama.table(n_layer).items():
        if name in structs:
            shape = structs[name].shape[::-1] if name.endswith(".kernel") else structs[name].shape
            file = (
                f"model-{int(theirs.split('.')[1]) + 2 if theirs.startswith('layers') else 1:05}-of-00000.safetensors"
            )
            places.setdefault(file, {})[f"model.{theirs}"] = shape
    for file, tensors in places.items():
        save_file({name: rng.random(shape, np.float32) for name, shape in tensors.items()}, folder / file)
    index = {name: file for file, tensors in places.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(llama_config.from_config(config, np.float32)))
    hf_tokenizer.write(folder, CharTokenizer(ALPHABET), config.block_size)
    return sum(struct.size for struct in structs.values())


def peak(folder: pathlib.Path, dtype: str) -> int:
    """Import a model in a process of its own; return that process's peak of resident memory in bytes."""
    code = (
        "import resource, sys; from jaxgpt import cli; code = cli.main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    flags = ["import", "--from", str(folder), "--run", f"{folder}-run", "--dtype", dtype]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1]) * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write(folder / "tiny", 64, 1)
        base = peak(folder / "tiny", args.dtype)
        per_layer = 16 * 1024**2 * 4  # bytes of a layer of 1,024 channels: 4 C^2 of attention and 12 C^2 of the MLP
        parameters = write(folder / "large", 1024, max(1, args.megabytes * 10**6 // per_layer))
        more = peak(folder / "large", args.dtype) - base
    size = parameters * (4 if args.dtype == "float32" else 2)
    print(json.dumps({"dtype": args.dtype, "model_bytes": size, "peak_bytes": more, "ratio": round(more / size, 3)}))


if __name__ == "__main__":
    main()
