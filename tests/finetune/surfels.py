"""Where the surfels of a mask are, for oracles."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finetune.surfaces import Surface, _steps


def points(found: Surface) -> NDArray[np.float64]:
    """Positions [N, 3 or 2] in mm from the first corner of the mask's first voxel."""
    return (found.index() - _steps(found.spacing).reach) * np.asarray(found.spacing)
