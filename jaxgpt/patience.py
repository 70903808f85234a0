"""Early stopping: how long the validation loss has not become lower. Checkpoints keep it, so resuming is exact."""

import math
from typing import Any, NamedTuple


class Patience(NamedTuple):
    """What the evaluations have said so far."""

    best_loss: float | None = None
    """Lowest validation loss; None before the first evaluation."""
    best_step: int = 0
    """Where that was."""
    waited: int = 0
    """Evaluations since then."""

    def after(self, step: int, val_loss: float) -> "Patience":
        """With one more evaluation."""
        if val_loss < (math.inf if self.best_loss is None else self.best_loss):
            return Patience(val_loss, step)
        return self._replace(waited=self.waited + 1)

    def spent(self, patience: int) -> bool:
        """Whether `patience` evaluations brought nothing; never if it is 0."""
        return 0 < patience <= self.waited


def from_manifest(manifest: dict[str, Any]) -> Patience:
    """As a checkpoint's manifest has it; one of an earlier version has none."""
    return Patience(**manifest.get("patience", {}))
