"""LoRA recovery of a compressed model (Hu et al., arXiv:2106.09685): the stage that SVD-LLM
(arXiv:2403.07378) adds to whitening.

LoRA  W <- W + (alpha / rank) B A for every matrix that is stored: both factors, pivot rows and
      coefficients, linears left dense

A and B are trained against the dense model's distribution (SVD-LLM: on the labels of an instruction
set, U and V one after the other; here both at once, so that a trained row of another kind has the
same teacher, text and steps beside it), and then added to W: nothing more is stored than without.
The text may go on beyond the calibration set (`num_samples`), as SVD-LLM's does. Comes after
packing and compensation, so every row can have it. The numbers of conf/method/training/lora.yaml
are CHOICES.
"""

from typing import Any, ClassVar

from specomp.errors import needed
from specomp.settings import configurable
from specomp.slots import Method
from specomp.training.phases import Count, LastTraining, Positive
from specomp.training.teacher import TeacherStates


@configurable
class LoRA(LastTraining):
    """Adapters on what is stored. Every setting is explained in conf/method/training/lora.yaml."""

    moves_stored: ClassVar[bool] = True

    rank: Count
    alpha: Positive

    def check(
        self, method: Method, budget: Any, num_samples: int, processes: int, dtype: str
    ) -> None:
        """See Training.check; and whether peft, an extra, is there."""
        needed("peft", "lora", "method/training=lora")
        super().check(method, budget, num_samples, processes, dtype)

    def recover(self, run: Any, teacher: TeacherStates) -> dict[str, Any]:
        """Train and merge."""
        from specomp.training.adapters import adapted  # here: it imports Lightning and peft

        return adapted(run, self, teacher)
