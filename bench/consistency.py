"""`python bench/consistency.py`: the same as `robustft bench consistency`."""

import sys

from robustft.benchmarks.consistency import main

sys.exit(main())
