import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def _pools(tmp_path_factory, *module):
    from pool import Pool

    made = {}

    def get(size):
        if size not in made or not made[size].is_open:
            made[size] = Pool(size, tmp_path_factory.mktemp("pool"), *module)
        return made[size]

    yield get
    for pool in made.values():
        pool.close(kill=True)


@pytest.fixture(scope="session")
def pools(tmp_path_factory):
    """The pool of a size: started at its first use, and again after a job that failed."""
    yield from _pools(tmp_path_factory)


@pytest.fixture(scope="session")
def gpu_pools(tmp_path_factory):
    """Likewise on GPUs."""
    yield from _pools(tmp_path_factory, "gpu_jobs")
