"""`robustft bench linear-token-gradients`, with --device."""

import sys

from robustft.benchmarks.linear_token_gradients import main

sys.exit(main())
