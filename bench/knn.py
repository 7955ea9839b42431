"""`python bench/knn.py`: the same as `robustft bench knn`, with choices of its own (--help)."""

import sys

from robustft.benchmarks.knn import main

sys.exit(main())
