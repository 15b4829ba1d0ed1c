"""What a training run can be told."""

import dataclasses
from typing import Any

from flashjax.models import opt


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run: model, training and pruning.

    Attributes:
      vocab_size, hidden_size, num_layers, ffn_size, num_heads, max_positions: the
        architecture; sequences are as long as the model has positions.
      batch_size: sequences of an optimizer step.
      chunk: about how many steps go to the device in one dispatch; sparsity rises
        before each.
      epochs: passes over the training text, dense.
      learning_rate, weight_decay, dropout: of the dense phase; `dropout` may hold
        several rates, then each is tried and the validation text decides.
      prune_epochs: passes in which sparsity rises.
      recover_epochs: passes with the final masks.
      prune_learning_rate, prune_dropout: of these two phases.
      distill: share of the loss, in [0, 1], that compares with the dense model's
        distribution instead of the next token, while pruning and recovering.
      sparsity: share of zeros in every pruned matrix in the end.
      validation, held_out: fractions of every text that are not trained on.
      excerpt_size: characters of held-out text that are stored with the model.
      seed: of all randomness.
    """

    vocab_size: int = 8192
    hidden_size: int = 256
    num_layers: int = 8
    ffn_size: int = 1024
    num_heads: int = 8
    max_positions: int = 512
    batch_size: int = 32
    chunk: int = 50
    epochs: int = 30
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    dropout: tuple[float, ...] = (0.2,)
    prune_epochs: int = 8
    recover_epochs: int = 10
    prune_learning_rate: float = 7.5e-4
    prune_dropout: float = 0.1
    distill: float = 0.5
    sparsity: float = 0.65
    validation: float = 0.015
    held_out: float = 0.05
    excerpt_size: int = 60_000
    seed: int = 0

    def __post_init__(self):
        problems = []
        for name in ("batch_size", "chunk", "epochs", "recover_epochs"):
            if getattr(self, name) < 1:
                problems.append(f"{name} must be at least 1")
        for name in ("sparsity", "prune_dropout", "validation", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name} must be in [0, 1)")
        if not 0 <= self.distill <= 1:
            problems.append("distill must be in [0, 1]")
        if self.prune_epochs < 0:
            problems.append("prune_epochs must be at least 0")
        if not self.dropout or not all(0 <= rate < 1 for rate in self.dropout):
            problems.append("dropout must be one or more rates in [0, 1)")
        if not 0 < self.validation + self.held_out < 0.5:
            problems.append("validation and held_out together must be in (0, 0.5)")
        if problems:
            raise ValueError(f"expected other settings: {'; '.join(problems)}")

    def model_config(self) -> opt.OPTConfig:
        """Returns the architecture: pre-norm, tied embeddings, ReLU."""
        return opt.OPTConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            ffn_size=self.ffn_size,
            num_heads=self.num_heads,
            max_positions=self.max_positions,
        )


DEMO = Settings()

# Seconds on a CPU; shows that everything works, writes no English.
TINY = Settings(
    vocab_size=512,
    hidden_size=32,
    num_layers=2,
    ffn_size=64,
    num_heads=2,
    max_positions=32,
    batch_size=8,
    chunk=5,
    epochs=2,
    prune_epochs=1,
    recover_epochs=1,
    excerpt_size=2_000,
)

# Minutes on a CPU core; just large enough for pruning methods to differ.
SMALL = Settings(
    vocab_size=1024,
    hidden_size=128,
    num_layers=3,
    ffn_size=512,
    num_heads=4,
    max_positions=128,
    batch_size=8,
    epochs=1,
    learning_rate=3e-3,
    dropout=(0.0,),
    prune_epochs=1,
    recover_epochs=1,
    prune_learning_rate=1.5e-3,
    prune_dropout=0.0,
)

PRESETS = {"demo": DEMO, "small": SMALL, "tiny": TINY}


def settings(preset: str, **changes: Any) -> Settings:
    """Returns a preset with changes; those that are None do not count.

    Raises:
      ValueError: an unknown preset, or a value out of range.
    """
    if preset not in PRESETS:
        raise ValueError(f"expected a preset of {', '.join(PRESETS)}, got {preset!r}")
    changes = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(PRESETS[preset], **changes)
