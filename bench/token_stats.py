"""`robustft bench token-stats`, with --device."""

import sys

from robustft.benchmarks.token_stats import main

sys.exit(main())
