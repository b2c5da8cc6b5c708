"""The arms of the experiment as settings of one code path (spec of the comparison: which losses there are, what they
predict, and where their gradient goes)."""

from dataclasses import dataclass
from typing import Literal

from palate.unihetero.model import Pixels, Semantic, SemanticLoss, Target, UniHeteroConfig

ArmName = Literal[
    "understanding",
    "encoder",
    "embedding",
    "pixel",
    "decoder",
    "isolated",
    "curriculum",
    "capacity",
    "shuffled",
    "unshifted",
    "open",
]


@dataclass(frozen=True)
class Arm:
    """What is learned beside the next text token.

    ``semantic``, ``target``, ``shift``, ``pixels`` are the model's (see ``UniHeteroConfig``).
    """

    semantic: Semantic = "none"
    target: Target = "ema"
    shift: bool = True
    isolated: bool = False
    """Generation in an upper branch of its own (GAS)."""
    pixels: Pixels = "none"
    weighted: bool = True
    """False: the heads are computed, at weight 0 (same cost, no signal)."""
    shuffled: bool = False
    """Semantic targets of other images, which the source draws (the experiment's does)."""
    generation_first: float = 0.0
    """Share of the steps, at the beginning, in which there is no text loss."""


ARMS: dict[ArmName, Arm] = {
    "understanding": Arm(),
    "encoder": Arm(semantic="encoder"),
    "embedding": Arm(semantic="embedding"),  # UniHetero
    "pixel": Arm(pixels="inside"),
    "decoder": Arm(semantic="embedding", pixels="decoder"),
    "isolated": Arm(semantic="embedding", isolated=True),
    "curriculum": Arm(semantic="embedding", generation_first=0.2),
    # Controls: the cost of a head without its signal; its signal without its meaning; its meaning without prediction;
    # and prediction of what is itself free to move.
    "capacity": Arm(semantic="embedding", weighted=False),
    "shuffled": Arm(semantic="embedding", shuffled=True),
    "unshifted": Arm(semantic="embedding", shift=False),
    "open": Arm(semantic="embedding", target="open"),
}


def configured(config: UniHeteroConfig, arm: Arm, loss: SemanticLoss, branch_from: int) -> UniHeteroConfig:
    """The model's settings with what the arm decides."""
    values = config.to_dict() | {
        "semantic": arm.semantic,
        "semantic_loss": loss,
        "target": arm.target,
        "shift": arm.shift,
        "branch_from": branch_from if arm.isolated else None,
        "pixels": arm.pixels,
    }
    values.pop("model_type", None)
    return UniHeteroConfig(**values)
