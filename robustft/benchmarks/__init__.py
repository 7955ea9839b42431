"""How fast the kernels are on this machine, beside their peers; `robustft bench WHAT`."""
