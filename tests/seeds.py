"""The seed of planted faults, generated cases and random weights: what holds must hold for others.

`VOXELITH_TEST_SEED=7 pytest ...` runs with another; the fixture `seed` gives it too.
"""

import os

SEED = int(os.environ.get("VOXELITH_TEST_SEED", "0"))
