"""A Hessian of inputs whose matrix a test chooses."""

import torch

from stages.compress.statistics import Hessian


class ChosenHessian(Hessian):
    """A statistic whose `matrix` is the given one, `[in, in]`, with no dead feature."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__(len(matrix), matrix.device)
        self.add(matrix.diagonal().sqrt().diag())
        self._chosen = matrix

    def matrix(self) -> torch.Tensor:
        return self._chosen.float()
