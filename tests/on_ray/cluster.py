"""A bulk run on three Ray nodes of this machine, one of which is killed half way.

    python -m tests.on_ray.cluster --lines 100000

prints what went in, what came out, and how long it took. The nodes are processes of their own;
their CPUs are counted, not had.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guard_service.cli import bulk_shards
from guard_service.cli.bulk_run import How
from guard_service.cli.place import Place
from tests.on_ray.conftest import ENVIRONMENT, PATHS

NODES = 3
MIB = 2**20
WORDS = """how do I bake bread kill a process read maps write poems fix cars grow beans learn chess
paint walls sell bikes train dogs cook rice build shelves plan trips""".split()  # noqa: SIM905


@contextmanager
def three_nodes(cpus: int = 2) -> Iterator[Any]:
    """A cluster, head included; the driver is connected to it."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": cpus, "object_store_memory": 100 * MIB}
    cluster = Cluster(
        initialize_head=True, connect=False, head_node_args={**node, "include_dashboard": False}
    )
    try:
        for _ in range(NODES - 1):
            cluster.add_node(**node)
        cluster.wait_for_nodes()
        ray.init(
            address=cluster.address,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": PATHS}},
        )
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def write_lines(folder: Path, count: int, files: int = 4) -> None:
    """So many lines, no two alike, in JSON lines and in Parquet."""
    from pyarrow import Table, parquet

    drawn = random.Random(7)
    folder.mkdir()
    for number in range(files):
        rows = [
            {"id": f"{number}-{at}", "text": f"{number} {at} {' '.join(drawn.choices(WORDS, k=8))}"}
            for at in range(count // files)
        ]
        if number % 2:
            parquet.write_table(Table.from_pylist(rows), folder / f"{number}.parquet")
        else:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{number}.jsonl").write_text(text)


def kill_half_way(
    cluster: Any, result: Path, blocks: int, over: threading.Event
) -> threading.Thread:
    """A thread that kills a node, not the head, when half of the blocks are done."""

    def watch() -> None:
        while len(list(result.glob("part-*.jsonl"))) < blocks // 2:
            if over.is_set():
                return
            time.sleep(0.05)
        cluster.remove_node(sorted(cluster.worker_nodes, key=str)[0], allow_graceful=False)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def counted(source: Path, result: Path) -> dict[str, int]:
    """Ids in, ids out, by reading both anew."""
    from pyarrow import parquet

    asked: Counter[str] = Counter()
    for path in source.iterdir():
        if path.suffix == ".parquet":
            asked.update(parquet.read_table(path)["id"].to_pylist())
        else:
            asked.update(json.loads(line)["id"] for line in path.read_text().splitlines())
    answered: Counter[str] = Counter()
    verdicts = 0
    for path in result.glob("part-*.jsonl"):
        for line in path.read_text().splitlines():
            found = json.loads(line)
            answered[found["id"]] += 1
            verdicts += found["action"] is not None
    return {
        "lines in": asked.total(),
        "lines out": answered.total(),
        "with a verdict": verdicts,
        "duplicates": sum(number - 1 for number in answered.values()),
        "missing": len(asked - answered),
        "not asked for": len(answered - asked),
    }


def trial(folder: Path, lines: int, model: str, block_lines: int) -> dict[str, Any]:
    """The whole of it; what it found."""
    source, result = folder / "in", folder / "out"
    write_lines(source, lines)
    how = How("", "", concurrency=16, patience_s=600.0, timeout_s=300.0, restart=False)
    with three_nodes() as cluster:
        import ray

        over = threading.Event()
        killer = kill_half_way(cluster, result, lines // block_lines, over)
        began = time.monotonic()
        shards = bulk_shards.Shards(block_lines, ray="auto", cpus=2)
        code = bulk_shards.run(source, result, Place(model=model), how, shards)
        took_s = time.monotonic() - began
        over.set()
        killer.join()
        for _ in range(600):  # until the cluster knows
            alive = sum(node["Alive"] for node in ray.nodes())
            if alive < NODES:
                break
            time.sleep(0.1)
    return {
        "nodes at the start": NODES,
        "nodes at the end": alive,
        **counted(source, result),
        "exit code": code,
        "seconds": round(took_s, 1),
    }


def main() -> int:
    """Run the trial in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--block-lines", type=int, default=1000)
    parser.add_argument("--model", default="starter")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        found = trial(Path(folder), arguments.lines, arguments.model, arguments.block_lines)
    for what, value in found.items():
        print(f"{what:<20} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
