"""File formats of other programs: GPT-2's weights, nanoGPT's checkpoints, Hugging Face's tokenizers, StableHLO."""
