"""What nanoGPT's train.py does, with the reference models: a whole run in one process, for compare.py to time.

`python benchmarks/torch_train.py SPECIFICATION`. The same evaluations, checkpoints and lines on the screen.
"""

import json
import math
import pathlib
import sys

import torch
from torch_side import Trainer, autocast, get_batch


@torch.no_grad()
def estimate_loss(trainer):
    """Mean loss of each split over random batches."""
    trainer.model.eval()
    means = {}
    for name, tokens in (("train", trainer.train_split), ("val", trainer.val_split)):
        losses = []
        for _ in range(trainer.spec["config"]["train"]["eval_batches"]):
            with autocast(trainer.spec):
                losses.append(trainer.loss_of(*get_batch(tokens, trainer.spec)).item())
        means[name] = sum(losses) / len(losses)
    trainer.model.train()
    return means


def main():
    """Train to the last step."""
    spec = json.loads(sys.argv[1])
    trainer, best, train = Trainer(spec), math.inf, spec["config"]["train"]
    for step in range(train["steps"] + 1):
        if step % train["eval_interval"] == 0:
            losses = estimate_loss(trainer)
            print(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
            if losses["val"] < best and step:
                checkpoint = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
                torch.save(checkpoint | {"step": step}, pathlib.Path(spec["out"], "ckpt.pt"))
            best = min(best, losses["val"])
        loss = trainer.step()
        print(f"iter {step}: loss {loss.item():.4f}")  # --log_interval=1, which nanoGPT's README says for a CPU


if __name__ == "__main__":
    main()
