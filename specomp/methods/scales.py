"""Trained scales: what rounding lost is won back by moving the grids instead of the integers on
them (the second stage of EfficientQAT, Chen et al., arXiv:2407.11062, "E2E-QP").

Scales  scale <- scale * g   for every group of every grid that is stored, g trained from 1;
        norms and biases as well, where `vectors` asks for them (CHOICE: the paper trains scales
        alone)

Trained against the dense model's distribution (the paper: on labels), end to end. Integers, zeros,
masks and the scales of columns (AWQ) stay, and so does every size: what a model counts does not
change by a bit. A multiple instead of the scale itself, so that one learning rate fits all
(CHOICE). The numbers of conf/method/training/scales.yaml are CHOICES.
"""

from typing import Any, ClassVar

from specomp.errors import UserError
from specomp.settings import configurable
from specomp.slots import Method
from specomp.training.phases import LastTraining
from specomp.training.teacher import TeacherStates


@configurable
class Scales(LastTraining):
    """Every setting is explained in conf/method/training/scales.yaml."""

    moves_stored: ClassVar[bool] = False  # not off its grid
    weighs: ClassVar[bool] = True

    vectors: bool

    def check(
        self, method: Method, budget: Any, num_samples: int, processes: int, dtype: str
    ) -> None:
        """See Training.check; and whether there are any scales."""
        if not method.rounding.grids:
            lora = "" if method.packing.size_of == "weights" else " method/training=lora, or"
            raise UserError(
                "method/training=scales trains the scales of grids, and quantizer=none stores none:"
                f" use{lora} a quantizer, such as gptq_int4."
            )
        super().check(method, budget, num_samples, processes, dtype)

    def recover(self, run: Any, teacher: TeacherStates) -> dict[str, Any]:
        """Train, and put the scales in their places."""
        from specomp.training.scales import rescaled  # here: it imports Lightning

        return rescaled(run, self, teacher)
