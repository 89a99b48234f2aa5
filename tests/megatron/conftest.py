"""Where the tests of this folder run: gloo ranks with a stand-in for CUDA, or NCCL ranks on the GPUs there are."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # training, state and standin, by the names the ranks import them with
