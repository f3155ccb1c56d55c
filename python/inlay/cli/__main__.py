"""`python -m inlay.cli`, for launchers that start modules: `torchrun -m inlay.cli train cfg.yaml`."""

import sys

from . import main

sys.exit(main())
