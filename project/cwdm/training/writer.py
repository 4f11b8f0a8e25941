"""A thread that writes while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """Writes one thing after the other; what went wrong is raised at the next call."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "writer")
        self._job: Future[None] | None = None

    def write(self, job: Callable[[], None]) -> None:
        """Begin with a job, once the one before is done."""
        self.wait()
        self._job = self._thread.submit(job)

    def check(self) -> None:
        """Raise what went wrong, if the job has come to its end."""
        if self._job and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the job's end; raise what went wrong."""
        job, self._job = self._job, None
        if job:
            job.result()
