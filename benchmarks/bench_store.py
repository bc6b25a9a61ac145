"""A store of many adapters: writing, asking for the newest version, reading and listing, at several sizes.

    python benchmarks/bench_store.py [--most 100000] [--bytes 20000]

Adapters are random bytes of the size of a small model's; 1,000 tenants. Writing is measured as one client's, each put acknowledged after it is on disk, and the rest is
filled in large transactions. Reads are of random adapters, the file's pages as the system has them cached. Writes results/store.jsonl.
"""

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.progress import track

from veratune.analysis.machine import describe_machine
from veratune.serving.store.base import Version
from veratune.serving.store.sqlite import SqliteStore

HERE = Path(__file__).parent
TENANTS = 1000


def times(calls):
    """p50 and p99 of each call, in milliseconds."""
    found = []
    for call in calls:
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return {f"p{p}_ms": round(1e3 * float(np.percentile(found, p)), 3) for p in (50, 99)}


def main():
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--most", type=int, default=100_000)
    words.add_argument("--bytes", type=int, default=20_000)
    words.add_argument("--folder", default=None)
    flags = words.parse_args()
    draw, lines, have = random.Random(0), [], 0
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        store = SqliteStore(Path(folder) / "adapters.db")
        data = os.urandom(flags.bytes)

        def name(i):
            return f"t{i % TENANTS}", f"adapter-{i // TENANTS}"

        for size in (flags.most // 100, flags.most // 10, flags.most):
            for start in track(range(have, size - 500, 5000), description=f"{size:,}"):
                version = Version(1, flags.bytes, 0.0)
                rows = range(start, min(start + 5000, size - 500))
                store.insert_many((*name(i), version, data) for i in rows)
            put = times(lambda i=i: store.put(*name(i), data) for i in range(size - 500, size))
            have = size
            who = [draw.randrange(size) for _ in range(2000)]
            lines.append({
                "adapters": size, "bytes_each": flags.bytes, "file_bytes": store.path.stat().st_size, "put": put,
                "newest": times(lambda i=i: store.newest(*name(i)) for i in who), "get": times(lambda i=i: store.get(*name(i), 1) for i in who),
                "unknown": times(lambda i=i: store.list_adapters(f"t{i % TENANTS}", "adapter-999", 1) for i in who[:500]),
                "names": times(lambda i=i: store.list_adapters(f"t{i % TENANTS}", "", 100) for i in who[:200]), **describe_machine(),
            })  # fmt: skip
            print(json.dumps(lines[-1]))
        store.close()
    (HERE / "results" / "store.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )


if __name__ == "__main__":
    main()
