"""The parts in training loops that are not ours: scripts of well-known structure, changed by the diffs of the docs."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import unrote
from torchvision_standin import standing_in

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "integrate"
IMAGES, BATCH, EPOCHS = 18, 2, 3
# The trainer of denoising-diffusion-pytorch wants 100 images and 16 in a step; each of its steps is two batches.
MANY, MANY_BATCH, STEPS = 100, 8, 40


def apply(diff: str, text: str) -> str:
    """``text`` after a unified diff; every line that it takes away or stands beside must be there."""
    lines, done, out = text.splitlines(), 0, []
    for hunk in re.split(r"^@@ -", diff, flags=re.MULTILINE)[1:]:
        header, *body = hunk.splitlines()
        start = int(re.match(r"\d+", header)[0]) - 1
        out += lines[done:start]
        done = start
        for line in body:
            if line[0] != "+":
                assert lines[done] == line[1:], f"line {done + 1}: {lines[done]!r}"
                done += 1
            if line[0] != "-":
                out.append(line[1:])
    return "\n".join(out + lines[done:]) + "\n"


def changed(name, stages):
    """The script after the first ``stages`` diffs."""
    text = (EXAMPLES / f"{name}.py").read_text()
    for diff in sorted(EXAMPLES.glob(f"{name}.*.diff"))[:stages]:
        text = apply(diff.read_text(), text)
    return text


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return folder_of(IMAGES, tmp_path_factory.mktemp("photos"))


def folder_of(count, folder):
    random = np.random.default_rng(0)
    rows = []
    for index in range(count):
        # The last four are all alike, so that there is something to skip.
        flat = np.full((16, 16, 3), 200, np.uint8)
        pixels = flat if index >= count - 4 else random.integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        rows.append(f'{{"file_name": "{index:02d}.png", "text": "a cat"}}\n')
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    from tiny_pipelines import tiny_stable_diffusion

    folder = tmp_path_factory.mktemp("base")
    pipeline = tiny_stable_diffusion(folder / "tokenizer", vae_levels=2)
    pipeline.scheduler.register_to_config(num_train_timesteps=10)
    pipeline.save_pretrained(folder / "sd")
    return folder / "sd"


def arguments(name, photos, pretrained, out):
    sizes = ["--resolution", "16", "--train_batch_size", str(BATCH)]
    hub = ["--train_data_dir", photos, "--output_dir", out, *sizes]
    base = ["--pretrained_model_name_or_path", pretrained]
    given = {
        "unconditional": [*hub, "--num_epochs", EPOCHS, "--ddpm_num_steps", "10", "--lr_warmup_steps", "1"],
        "text_to_image": [*hub, *base, "--num_train_epochs", EPOCHS],
        "lora": [*hub, *base, "--num_train_epochs", EPOCHS],
        "hf_trainer": [*hub, "--num_train_epochs", EPOCHS, "--timesteps", "10"],
        "ddpm_trainer": [
            "--folder", photos, "--out", out, "--image_size", "16", "--dim", "8", "--timesteps", "10",
            "--train_batch_size", MANY_BATCH, "--train_num_steps", STEPS,
        ],
        "lightning_module": [
            "--data", photos, "--out", out, "--resolution", "16", "--timesteps", "10", "--batch_size", BATCH,
            "--max_epochs", EPOCHS,
        ],
    }  # fmt: skip
    return [str(value) for value in given[name]]


def run(name, stages, folder, given, old="", new=""):
    """Run the changed script, with ``new`` for ``old``, as a module of its own; what gates and ensembles it made."""
    made = {"gates": [], "ensembles": []}

    class Gate(unrote.LossGate):
        def __init__(self, *args, **options):
            # What is below the average is skipped, so that runs as short as these skip.
            bank = unrote.LossBank(args[0], bins=1, warm_start=True)
            super().__init__(*args, **options | {"skip_ratio": 1.0, "bank": bank})
            made["gates"].append(self)

    class Ensemble(unrote.ShardEnsemble):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made["ensembles"].append(self)

    file = folder / f"{name}_{stages}.py"
    file.write_text(changed(name, stages).replace(old, new))
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.setenv("HF_HOME", str(folder / "hub"))
        patch.setattr(unrote, "LossGate", Gate, raising=False)
        patch.setattr(unrote, "ShardEnsemble", Ensemble, raising=False)
        spec = spec_from_file_location(file.stem, file)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(module.parse_args(given))
    return made["gates"], made["ensembles"]


def weights_in(out):
    """What a script saved, by name."""
    found = next(iter(sorted(out.rglob("*unet*/*.safetensors")) + sorted(out.glob("*.safetensors"))), None)
    return load_file(found) if found else torch.load(out / "model-last.pt", weights_only=True)["model"]


NAMES = ["unconditional", "text_to_image", "lora", "ddpm_trainer", "lightning_module", "hf_trainer"]


NEEDED = {"lightning_module": "pytorch_lightning", "ddpm_trainer": "denoising_diffusion_pytorch"}


@pytest.fixture(params=NAMES)
def name(request):
    if (package := NEEDED.get(request.param)) is None:
        return request.param
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if request.param == "ddpm_trainer" and package not in sys.modules:
        with standing_in():
            import_module(package)
    return request.param


def test_a_script_of_somebody_else_and_its_diffs(name, photos, pretrained, tmp_path):
    count, batch, batches = IMAGES, BATCH, EPOCHS * -(-IMAGES // BATCH)
    if name == "ddpm_trainer":
        count, batch, batches = MANY, MANY_BATCH, 2 * STEPS
        (tmp_path / "photos").mkdir()
        photos = folder_of(MANY, tmp_path / "photos")
    for stages in (1, 3):
        out = tmp_path / f"out-{stages}"
        out.mkdir()
        gates, ensembles = run(name, stages, tmp_path, arguments(name, photos, pretrained, out))
        assert (len(gates), len(ensembles)) == (1, stages > 1)
        assert gates[0].batches == batches if stages == 1 else gates[0].batches >= batches
    (gate,), (ensemble,) = gates, ensembles
    # Half-rounds: every image is seen twice in a round. The trainer that counts steps does as many as before, and what
    # it began of a round is no round.
    per_round = 2 * sum(-(-len(shard) // batch) for shard in ensemble.shards)
    rounds, left = divmod(batches, per_round) if name == "ddpm_trainer" else (EPOCHS, 0)
    assert ensemble.round_index == rounds > 0
    visits = gate.ledger.visits
    assert (visits.min() >= 2 * rounds) and visits.sum() <= 2 * rounds * count + left * batch
    assert gate.ledger.skips.sum() > 0
    assert torch.cat(ensemble.shards).sort().values.tolist() == list(range(count))
    assert_saved_is_the_aggregate(name, tmp_path / "out-3", ensemble)


def assert_saved_is_the_aggregate(name, out, ensemble):
    saved, kept = weights_in(out), ensemble.slots.get("global").whole()
    # The first script saves the averaged weights.
    wanted = kept["ema"]["shadow_params"] if name == "unconditional" else list(kept["model"].values())
    key = lambda tensor: (list(tensor.shape), float(tensor.sum()))  # noqa: E731
    assert len(saved) == len(wanted) > 10
    for one, other in zip(sorted(saved.values(), key=key), sorted(wanted, key=key), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("stages", "average"), [(3, False), (4, True)])
def test_a_checkpoint_of_the_trainer_is_of_the_average_by_the_callback(stages, average, photos, tmp_path):
    out = tmp_path / "out"
    every = ('save_strategy="no"', 'save_strategy="epoch"')
    _, (ensemble,) = run("hf_trainer", stages, tmp_path, arguments("hf_trainer", photos, None, out), *every)
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2]))
    assert len(checkpoints) == ensemble.round_index == EPOCHS
    saved = load_file(checkpoints[-1] / "model.safetensors")
    whole = ensemble.slots.get("global").whole()["model"]
    assert all(torch.equal(saved[key], value) for key, value in whole.items()) == average


VALIDATED = """
    def val_dataloader(self):
        return DataLoader(self.dataset, batch_size=self.batch_size)

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        torch.save(self.model.state_dict(), Path(self.trainer.default_root_dir) / "validated.pt")

    def configure_optimizers"""


@pytest.mark.parametrize(("stages", "average"), [(3, False), (4, True)])
def test_lightning_validates_the_average_by_the_callback(stages, average, photos, tmp_path):
    pytest.importorskip("pytorch_lightning")
    out = tmp_path / "out"
    out.mkdir()
    given = arguments("lightning_module", photos, None, out)
    _, (ensemble,) = run("lightning_module", stages, tmp_path, given, "\n    def configure_optimizers", VALIDATED)
    assert ensemble.round_index == EPOCHS
    validated = torch.load(out / "validated.pt", weights_only=True)
    whole = ensemble.slots.get("global").whole()["model"]
    assert all(torch.equal(validated[key], value) for key, value in whole.items()) == average


@pytest.mark.parametrize("name", NAMES)
def test_each_diff_leaves_a_whole_program(name):
    for stages in range(5):
        compile(changed(name, stages), name, "exec")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.diff")), ids=lambda path: path.stem)
def test_a_diff_is_short_and_stands_in_the_docs(path):
    lines = path.read_text().splitlines()
    added = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
    assert 1 <= len([line for line in added if line != "+"]) <= 5
    assert path.read_text().strip() in (ROOT / "docs" / "integrate.md").read_text()


AT_THE_END = """
    import json
    import os
    from pathlib import Path

    known = {"shards": [shard.tolist() for shard in ensemble.shards], "rounds": ensemble.round_index}
    known |= {name: getattr(gate.ledger, name).tolist() for name in ("visits", "moves")}
    known["weights"] = [float(p.double().sum()) for p in ensemble.slots.get("global")["model"].whole().values()]
    (Path(args.output_dir) / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(known))
    accelerator.end_training()
"""


def test_two_processes_share_the_batches_and_agree_on_the_shards(photos, tmp_path):
    """The first script, by torchrun on gloo, with gradients accumulated over two batches."""
    program = changed("unconditional", 3).replace("    accelerator.end_training()\n", AT_THE_END)
    # What is below the average is skipped, as above.
    often = "skip_ratio=1.0, bank=unrote.LossBank(args.ddpm_num_steps, bins=1, warm_start=True)"
    program = program.replace("skip_ratio=0.5", often)
    shutil.copy(EXAMPLES / "shared.py", tmp_path)
    (tmp_path / "script.py").write_text(program)
    (tmp_path / "out").mkdir()
    given = [*arguments("unconditional", photos, None, tmp_path / "out"), "--gradient_accumulation_steps", "2"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [*launch, "script.py", *given], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / "out" / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert one["shards"] == two["shards"]
    assert one["weights"] == two["weights"]
    assert one["moves"] == two["moves"]
    assert sum(one["moves"]) > 0
    assert sorted(index for shard in one["shards"] for index in shard) == list(range(IMAGES))
    assert one["rounds"] == EPOCHS
    # Each image by one process or the other; accelerate repeats some, so that both have equally many.
    visits = np.array(one["visits"]) + np.array(two["visits"])
    assert (visits >= 2 * EPOCHS).all()
