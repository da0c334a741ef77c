"""The number of processes W is no part of the result: equal bit for bit up to one process a proxy, else to rounding.

On a GPU, whose kernels may add up in another order at each call, always to rounding: ``UNROTE_TEST_DEVICE=cuda``.
"""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from safetensors.torch import load_file

from forking import DEVICE, Job
from toy import assert_same_run, largest_difference, summary_of, weights_of
from unrote.training.run import Run

pytestmark = pytest.mark.usefixtures("module_cache")

TOLERANCE = 1e-5
"""Of the weights, where ranks share a proxy and its gradients are added up in another order, or on a GPU."""
UNCONDITIONAL = {"training.epochs": 2, "training.batch_size": 7}
LORA = {
    "model.train": "lora", "model.lora.rank": 2, "training.epochs": 2, "training.batch_size": 5,
    "training.lr_warmup_steps": 0, "training.use_ema": False, "text.dropout": 0.1,
}  # fmt: skip


def weights(run, lora):
    return load_file(run.model_folder / "pytorch_lora_weights.safetensors") if lora else weights_of(run)


@pytest.mark.parametrize("lora", [False, True], ids=["unconditional", "text LoRA"])
@pytest.mark.parametrize(("method", "shards"), [("standard", 1), ("iet-agc", 4), ("iet-agc+", 3)])
def test_the_result_is_the_same(request, tmp_path, method, shards, lora):
    settings = LORA | {"model.pretrained": str(request.getfixturevalue("base"))} if lora else UNCONDITIONAL
    settings = settings | {"ensemble.num_shards": shards, "training.checkpointing_steps": 3}
    jobs = {world: Job(tmp_path / str(world), world, method, settings) for world in (1, 2, 3, 4)}
    for world, job in jobs.items():
        assert job.wait(300) == [0] * world, job.messages()
    alone, *others = (Run(tmp_path / str(world)) for world in jobs)
    assert method == "standard" or summary_of(alone)["skipped"] > 0
    for world, run in enumerate(others, 2):
        if world <= shards and DEVICE == "cpu":
            assert_same_run(run, alone)
            continue
        assert largest_difference(weights(run, lora), weights(alone, lora)) < TOLERANCE, world
        assert summary_of(run) == summary_of(alone)
        for column in ("visits", "skips", "augmented", "moves"):
            assert (run.read_ledger()[column] == alone.read_ledger()[column]).all(), (world, column)


def test_all_weights_of_a_text_model_on_latents_that_are_made_at_each_step(base, tmp_path):
    settings = LORA | {"model.train": "full", "model.pretrained": str(base), "data.cache_latents": False}
    runs = []
    for world in (1, 2):
        job = Job(tmp_path / str(world), world, "agc", settings)
        assert job.wait(300) == [0] * world, job.messages()
        runs.append(Run(tmp_path / str(world)))
    assert largest_difference(*map(weights_of, runs)) < TOLERANCE
    assert summary_of(runs[0]) == summary_of(runs[1])
