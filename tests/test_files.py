"""Writes are whole or absent; state files give back what was put in; the average against float64."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from unrote import tensorfiles
from unrote.errors import InputError
from unrote.files import (
    atomic_path,
    atomic_write,
    remove_leftovers,
    sha256_file,
    temporary_path,
    write_bytes,
    write_json,
    write_text,
)
from unrote.method.slots import FolderSlots
from unrote.tensorfiles import (
    Stored,
    clone_state,
    load_state,
    save_state,
    weighted_average,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_is_told_with_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, atomic_path(tmp_path / "page.html"):
        Path("/dev/full").write_bytes(b"x")
    assert caught.value.filename == str(tmp_path / "page.html")
    assert names(tmp_path) == []


class StoppedError(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


@pytest.mark.parametrize("error", [OSError, StoppedError])
@pytest.mark.parametrize("old", [None, b"before"])
def test_a_failed_write_leaves_what_was_there(tmp_path, old, error):
    path = tmp_path / "file.bin"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert names(tmp_path) == ([] if old is None else ["file.bin"])
    if old is not None:
        assert path.read_bytes() == old


@pytest.mark.parametrize("durable", [True, False])
def test_a_folder_appears_whole_or_not_at_all(tmp_path, durable):
    def fill(folder):
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "weights").write_bytes(b"w")
        (folder / "index").write_bytes(b"i")
        assert not path.exists()

    path = tmp_path / "deep" / "model"
    with pytest.raises(StoppedError), atomic_path(path, durable=durable) as temporary:
        fill(temporary)
        raise StoppedError
    assert names(path.parent) == []
    with atomic_path(path, durable=durable) as temporary:
        fill(temporary)
    assert names(path.parent) == ["model"]
    assert (path / "unet" / "weights").read_bytes() == b"w"


def test_a_block_that_writes_nothing_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file"):
        pass
    assert names(tmp_path) == []


def test_a_rename_that_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"), atomic_write(tmp_path / "taken") as file:
        file.write(b"x")
    assert names(tmp_path) == ["taken"]


def test_a_reader_never_sees_a_part(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    """Killed amid a file, a folder, and one that safetensors writes; beside them what is somebody's own."""
    left = """
import os, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from unrote.files import atomic_path, atomic_write
folder = Path(sys.argv[1])
if os.fork() == 0:
    with atomic_path(folder / "model") as temporary, atomic_write(folder / "a.b") as file:
        temporary.mkdir()
        (temporary / "weights").touch()
        os._exit(0)
# It cannot write as much as this: it ends amid writing.
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
save_file({"a": torch.zeros(1 << 16)}, folder / "x.safetensors")
"""
    result = subprocess.run([sys.executable, "-c", left, tmp_path], capture_output=True, check=False)
    assert result.returncode == -signal.SIGXFSZ
    assert len(names(tmp_path)) == 3 and all(name.startswith(".") for name in names(tmp_path))
    own = {".gitignore", ".lock", ".nfs0000000001", ".tmp", ".notes.tmp", ".tmp-mine", "a.b"}
    for name in own:
        (tmp_path / name).touch()
    temporary_path(tmp_path / "link").symlink_to(tmp_path.parent)
    remove_leftovers(tmp_path)
    assert set(names(tmp_path)) == own
    remove_leftovers(tmp_path / "not there")


def test_text_json_and_checksum(tmp_path):
    write_text(tmp_path / "a" / "text", "größer\n")
    assert (tmp_path / "a" / "text").read_bytes() == "größer\n".encode()
    write_json(tmp_path / "json", {"b": [1, None, "ü"], "a": 0.1})
    text = (tmp_path / "json").read_text("ascii")
    assert json.loads(text) == {"b": [1, None, "ü"], "a": 0.1}
    assert text.endswith("}\n")
    content, sizes = bytes(range(256)) * 9000, []
    write_bytes(tmp_path / "bytes", content)
    assert sha256_file(tmp_path / "bytes", sizes.append) == hashlib.sha256(content).hexdigest()
    assert sum(sizes) == len(content)


def assert_same(found, expected):
    """Equal in value, type and structure, tensors bit for bit."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(found)
    else:
        assert found == expected


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.99))
    for _ in range(3):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_state_of_a_model_and_its_optimizer_round_trips(tmp_path):
    """An optimizer's state has whole-number keys and tuples, which JSON alone would lose."""
    model, optimizer = trained()
    state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    save_state(tmp_path / "s.safetensors", state)
    loaded = load_state(tmp_path / "s.safetensors")
    assert_same(loaded, state)
    assert list(loaded["optimizer"]["state"]) == list(range(6))
    assert loaded["optimizer"]["param_groups"][0]["betas"] == (0.8, 0.99)
    other = torch.optim.AdamW(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).parameters())
    other.load_state_dict(loaded["optimizer"])
    assert_same(other.state_dict(), optimizer.state_dict())


def test_moments_come_back_in_the_memory_format_of_the_weights(tmp_path):
    """A fused optimizer goes through weights and moments as they lie in memory."""

    def make():
        torch.manual_seed(0)
        model = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(model, optimizer, seed):
        images = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(seed))
        model(images.to(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = make()
    for seed in range(3):
        step(model, optimizer, seed)
    save_state(tmp_path / "state.safetensors", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    state = load_state(tmp_path / "state.safetensors")
    other, other_optimizer = make()
    other.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["optimizer"])
    step(model, optimizer, 3)
    step(other, other_optimizer, 3)
    assert torch.equal(model.weight, other.weight)


def test_every_kind_of_leaf_round_trips(tmp_path):
    shared = torch.arange(12.0)
    state = {
        "plain": [None, True, 0, -3, 2**60, 0.1, 1e-300, math.inf, math.nan, "text ü", ""],
        "empty": [{}, [], (), torch.zeros(0), torch.zeros(2, 0)],
        "nested": ({"a": [(torch.tensor(1),)]}, {}),
        "types": [torch.ones(2).to(t) for t in (torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.float64)],
        "strided": torch.arange(6).view(2, 3).t(),
        "views of one memory": [shared[:4], shared[2:6], shared, shared[::2]],
        "colliding": {1: torch.tensor(1), "1": torch.tensor(2), "a/b": torch.tensor(3), "a": {"b": torch.tensor(4)}},
        "needs gradient": nn.Parameter(torch.ones(2)).data,
    }
    save_state(tmp_path / "s.safetensors", state)
    assert_same(load_state(tmp_path / "s.safetensors"), state)


def test_a_state_may_be_a_tensor_or_a_list(tmp_path):
    for state in (torch.ones(3), [torch.ones(1), 2], 5):
        save_state(tmp_path / "s.safetensors", state)
        assert_same(load_state(tmp_path / "s.safetensors"), state)


def test_parts_of_a_state(tmp_path):
    save_state(tmp_path / "s.safetensors", {"a": torch.ones(1), "b": {"c": 1}, "d": None})
    assert_same(load_state(tmp_path / "s.safetensors", ["b", "unknown"]), {"b": {"c": 1}})


@pytest.mark.parametrize("leaf", [object(), {1, 2}, b"bytes", 1j, torch.float32])
def test_another_kind_of_leaf_is_named_and_nothing_is_written(tmp_path, leaf):
    with pytest.raises(TypeError, match=rf"/optimizer/0: .*{type(leaf).__name__}"):
        save_state(tmp_path / "s.safetensors", {"optimizer": [leaf]})
    assert names(tmp_path) == []


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_torn_file_is_noticed(tmp_path, keep):
    path = tmp_path / "s.safetensors"
    save_state(path, {"a": torch.ones(50)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"s\.safetensors: is no state that unrote wrote, or is damaged"):
        load_state(path)


def test_a_clone_shares_nothing():
    model, optimizer = trained()
    state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    clone = clone_state(state)
    assert_same(clone, state)
    before = clone_state(clone)
    for parameter in model.parameters():
        parameter.data.zero_()
    optimizer.state_dict()["state"][0]["exp_avg"].zero_()
    state["optimizer"]["param_groups"][0]["lr"] = 7
    assert_same(clone, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_the_average_is_the_exact_one_rounded_once(count, dtype):
    draw = torch.Generator().manual_seed(count)
    tensors = [(torch.randn(50, generator=draw) * 10 ** (k % 5)).to(dtype) for k in range(count)]
    weights = [(k + 1) / (count * (count + 1) / 2) for k in range(count)]
    states = ({"w": tensor, "steps": torch.tensor(k)} for k, tensor in enumerate(tensors))
    found = weighted_average(states, weights)
    exact = [
        math.fsum(weight * float(tensor[i]) for weight, tensor in zip(weights, tensors, strict=True)) for i in range(50)
    ]
    assert found["w"].dtype == dtype
    tolerance = {"rtol": 1e-12, "atol": 1e-9} if dtype == torch.float64 else {"rtol": torch.finfo(dtype).eps / 2}
    expected = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(found["w"].double(), expected, **({"atol": 1e-9} | tolerance))
    assert found["steps"].item() == 0
    if count == 1:
        assert torch.equal(found["w"], tensors[0])


def test_averaging_changes_and_keeps_none_of_the_states():
    states = [{"w": torch.full((3,), float(k))} for k in range(2)]
    found = weighted_average(states, [0.25, 0.75])
    assert found["w"].tolist() == [0.75] * 3
    assert [state["w"].tolist() for state in states] == [[0.0] * 3, [1.0] * 3]


def test_states_or_weights_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="fewer states than"):
        weighted_average([{"w": torch.ones(1)}], [0.5, 0.5])
    with pytest.raises(ValueError, match="more states than the 1"):
        weighted_average([{"w": torch.ones(1)}] * 2, [1.0])
    with pytest.raises(ValueError, match="other tensors than the first"):
        weighted_average([{"w": torch.ones(1)}, {}], [0.5, 0.5])


def test_averaging_holds_one_state_at_a_time():
    alive = weakref.WeakSet()

    def states():
        for k in range(4):
            assert not alive
            tensor = torch.full((3,), float(k))
            alive.add(tensor)
            yield {"w": tensor}
            del tensor

    assert weighted_average(states(), [0.25] * 4)["w"].tolist() == [1.5] * 3


def test_the_average_lies_in_memory_as_the_states_do():
    states = [{"w": torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)} for _ in range(3)]
    assert weighted_average(states, [0.5, 0.25, 0.25])["w"].is_contiguous(memory_format=torch.channels_last)


def test_a_state_is_read_into_the_memory_of_another(tmp_path, monkeypatch):
    """What has another form is made anew; what lies in one file is read in bundles, as what lies in memory is."""
    model, optimizer = trained()
    image = torch.randn(6, 4, 2, 2).to(memory_format=torch.channels_last)
    state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "images": [image, image[:, :3]]}
    save_state(tmp_path / "s.safetensors", state)
    for small in (1, 1 << 20):
        monkeypatch.setattr(tensorfiles, "SMALL", small)
        for stored in (Stored.at(tmp_path / "s.safetensors"), Stored.of(state)):
            assert len(stored.bundles()) == (len(stored.forms) if small == 1 else 1)
            live = clone_state(state)
            weight, moment = live["model"]["0.weight"], live["optimizer"]["state"][0]["exp_avg"]
            live["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7)
            live["images"][0] = image.contiguous()
            for tensor in (weight, moment):
                tensor.zero_()
            found = stored.into(live)
            assert_same(found, state)
            assert found["model"]["0.weight"] is weight
            assert found["optimizer"]["state"][0]["exp_avg"] is not moment
            assert found["images"][0].is_contiguous(memory_format=torch.channels_last)
            assert_same(stored["optimizer"]["param_groups"].whole(), state["optimizer"]["param_groups"])


def test_both_factors_of_an_adapter_are_read_at_once(monkeypatch):
    monkeypatch.setattr(tensorfiles, "SMALL", 1)
    names = [f"{layer}/lora_{factor}/default/weight" for layer in "xy" for factor in "AB"]
    assert list(map(len, Stored.of(dict.fromkeys([*names, "z"], torch.ones(3))).bundles())) == [2, 2, 1]


def test_a_state_that_is_expected_is_read_ahead(tmp_path):
    """The system has it in its cache before it is asked for, though it was evicted."""
    slots = FolderSlots(tmp_path)
    slots.put("proxy-0", {"weights": torch.randn(1 << 20)})
    slots.expect("proxy-1")  # there is none
    with (tmp_path / slots.files()[0]).open("rb") as file:
        os.fsync(file.fileno())

        def cached():
            try:
                return os.preadv(file.fileno(), [bytearray(4096)], 2 << 20, os.RWF_NOWAIT) == 4096
            except BlockingIOError:
                return False

        try:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            evicted = not cached()
        except (AttributeError, OSError):
            evicted = False
        if not evicted:
            pytest.skip("this system or its file system does not let a file be evicted from the cache")
        slots.expect("proxy-0")
        end = time.monotonic() + 10
        while not cached():
            assert time.monotonic() < end
            time.sleep(0.01)
