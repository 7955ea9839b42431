"""`robustft bench score`, with --data and --model."""

import sys

from robustft.benchmarks.score import main

sys.exit(main())
