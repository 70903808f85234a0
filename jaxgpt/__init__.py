"""The GPT of "Let's build GPT from scratch" in JAX and Flax."""

from jaxgpt.config import Config, load_config
from jaxgpt.model import GPT, GPTConfig
from jaxgpt.runs.directory import Run, load
from jaxgpt.sampling import generate
from jaxgpt.tokenizer import CharTokenizer
from jaxgpt.training import train

__all__ = ["GPT", "CharTokenizer", "Config", "GPTConfig", "Run", "generate", "load", "load_config", "train"]
