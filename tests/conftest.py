"""Fixtures that several modules share."""

import gc
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: workers, and the processes that their tests start, would fight over the processors.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish():
    """What was imported stays: it need not be gone through again and again."""
    gc.freeze()


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory):
    """A cache folder for the module, so that nothing comes from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNROTE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny Stable Diffusion of two autoencoder levels."""
    from tiny_pipelines import tiny_stable_diffusion

    folder = tmp_path_factory.mktemp("base")
    tiny_stable_diffusion(folder / "tokenizer", vae_levels=2).save_pretrained(folder / "sd")
    return folder / "sd"


@pytest.fixture(scope="session")
def elsewhere():
    """Calls run a program in another process, which knows nothing of ours."""
    from elsewhere import Elsewhere

    process = Elsewhere()
    yield process
    process.close()


@pytest.fixture(scope="session")
def memorizing(tmp_path_factory):
    """A run that has learned about half of its samples by rote; its training images are ``pictures(16)``."""
    from memorizing import memorizing_run

    return memorizing_run(tmp_path_factory.mktemp("memorizing"))
