"""Seconds that `import mqt_llava` takes over `import transformers`, in fresh processes."""

import statistics
import subprocess
import sys


CODE = "import time, transformers; start = time.perf_counter(); import mqt_llava; print(time.perf_counter() - start)"
RUNS = 5


def main() -> None:
    """Prints the median and the slowest of a few runs."""
    subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True)  # fill the caches of the disk
    seconds = [
        float(subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout)
        for _ in range(RUNS)
    ]
    print(f"import mqt_llava after import transformers: median {statistics.median(seconds):.4f} s, "
          f"slowest of {RUNS} {max(seconds):.4f} s")  # fmt: skip


if __name__ == "__main__":
    main()
