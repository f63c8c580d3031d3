"""`refrag encode --engine ray`: the same job on Ray Data, on one node or a cluster."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from refrag.data.sources import Slice
from refrag.encoding.encode_job import EncodeJob, Step


def run_on_ray(job: EncodeJob, slices: Sequence[Slice], *, workers: int | None = None) -> Iterator[Step]:
    """Run the job with Ray Data: ``map_batches`` over the slices, with actors that have an encoder each.

    Workers receive slices instead of passages. Each worker reads its own part of the files and writes its own shards,
    so all nodes need access to the files and the store. One worker at a time holds the store's lock.

    Parameters
    ----------
    job : EncodeJob
    slices : sequence of Slice
    workers : int, optional
        Number of workers. Defaults to one per GPU for a job on "cuda", otherwise to one per node.

    Yields
    ------
    Step
        In the order in which slices are finished.

    Raises
    ------
    ValueError
        If Ray is missing, the cluster has fewer CPUs or GPUs than workers, or a worker raised an error of
        ``EncodeJob.steps``.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError("--engine: ray is not installed: pip install 'refrag-kernels[ray]'") from None
    # Create or open the store here, once, so that problems with it or the encoder are reported before workers start.
    job.open_store(job.passage_encoder().fingerprint)
    if not slices:
        return
    # Send Ray's messages to its log files only: the command reports progress itself.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    if not ray.is_initialized():
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    resource = "GPU" if job.device.startswith("cuda") else "CPU"
    has = int(ray.cluster_resources().get(resource, 0))
    workers = workers or (has if resource == "GPU" else len(ray.nodes()))
    if not 1 <= workers <= has:
        raise ValueError(f"--workers: got {workers}, needs 1 to {has}, the {resource}s of the Ray cluster")
    # Ray limits torch's threads in a worker to the worker's CPUs.
    asked: dict[str, Any] = {"num_gpus": 1} if resource == "GPU" else {"num_cpus": has // workers}
    records = [{"slice": pickle.dumps(part)} for part in slices]
    done = ray.data.from_items(records, override_num_blocks=len(records)).map_batches(
        _Worker, fn_constructor_args=(job,), batch_size=1, compute=ray.data.ActorPoolStrategy(size=workers), **asked
    )
    for row in done.iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, Exception):
            raise result
        yield result


class _Worker:
    """An actor of the pool, with its own encoder."""

    def __init__(self, job: EncodeJob) -> None:
        self.job = job
        self.encoder: Any = job.passage_encoder()  # of the kind that fills the job's store
        self.store = job.open_store(self.encoder.fingerprint)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        results: list[Step | Exception] = []
        try:
            for part in batch["slice"]:
                results += self.job.steps(self.encoder, self.store, [pickle.loads(part)])
        except (ValueError, OSError) as error:
            # Return errors that the user can fix as results: Ray would wrap exceptions and log them at length.
            results.append(error)
        return {"result": [pickle.dumps(result) for result in results]}
