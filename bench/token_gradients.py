"""`robustft bench token-gradients`, with --device."""

import sys

from robustft.benchmarks.token_gradients import main

sys.exit(main())
