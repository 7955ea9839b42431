"""`robustft bench linear-token-stats`, with --device."""

import sys

from robustft.benchmarks.linear_token_stats import main

sys.exit(main())
