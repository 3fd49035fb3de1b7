"""`python -m svd_bench.gpu_check --out DIR`: `svd-bench gpu-check` from a checkout, without installing it."""

import sys

from svd_bench.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "gpu-check")
    main()
