"""Metrics that need networks, with tiny random ones; what is not there is said to be missing."""

import json

import pytest
import torch
from paroattn_lab.quality import learned_metrics
from paroattn_lab.quality.learned_metrics import find_learned_metrics, frechet_distance, temporal_flickering


def video(seed=0, frames=3, size=24):
    return torch.rand(frames, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "cat</w>", "dog</w>", "a", "c", "t", "d", "o", "g"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def video_network(tmp_path_factory):
    class Network(torch.nn.Module):
        def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
            assert rescale
            assert resize
            assert return_features
            return (x / 255).mean((2, 3, 4))

    path = tmp_path_factory.mktemp("i3d") / "i3d.pt"
    torch.jit.script(Network()).save(path)
    return path


def test_nothing_is_downloaded_and_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    found = find_learned_metrics()
    assert {"lpips", "clip_score", "fvd", "vbench"} == found.missing.keys()
    assert "torchvision" in found.missing["lpips"] or "alexnet" in found.missing["lpips"]
    assert "--clip-model" in found.missing["clip_score"]
    assert "--fvd-model" in found.missing["fvd"]
    assert set(found.compare(video(), video(1), "a cat")) == {"temporal_flickering", "temporal_flickering_change"}
    assert found.compare(video(frames=1), video(1, frames=1), "a cat") == {}
    assert found.features(video()) is None


def test_lpips_is_used_where_its_weights_are(monkeypatch, tmp_path):
    """Torchvision and AlexNet's weights are played: LPIPS is then the mean over the frames, also in chunks."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / learned_metrics.LPIPS_WEIGHTS).touch()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(learned_metrics.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(learned_metrics, "_CHUNK", 2)
    import torchmetrics.image.lpip as library

    class Played:
        def __init__(self, net_type, normalize):
            assert (net_type, normalize) == ("alex", True)

        def __call__(self, a, b):
            return (a - b).abs().mean()

    monkeypatch.setattr(library, "LearnedPerceptualImagePatchSimilarity", Played)
    found = find_learned_metrics()
    assert "lpips" not in found.missing
    a, b = video(), video(1)
    assert found.compare(a, b, "a cat")["lpips"] == pytest.approx(float((a - b).abs().mean()), rel=1e-5)


def test_the_clip_score_is_that_of_transformers_and_its_change_is_paired(clip_folder):
    from transformers import CLIPModel, CLIPProcessor

    found = find_learned_metrics(clip_model=clip_folder)
    frames, reference = video(frames=2), video(1, frames=2)
    figures = found.compare(frames, reference, "a cat")
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)

    def expected(chosen):
        pixels = list((chosen * 255).round().byte())
        inputs = processor(text=["a cat"], images=pixels, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits_per_image / model.logit_scale.exp()
        return 100 * max(float(logits.mean()), 0)

    assert figures["clip_score"] == pytest.approx(expected(frames), abs=1e-3)
    assert figures["clip_score_change"] == pytest.approx(expected(frames) - expected(reference), abs=1e-3)
    assert found.compare(frames, frames, "a cat")["background_consistency_change"] == 0
    still = frames[:1].expand(2, -1, -1, -1)
    assert found.compare(still, frames, "a dog")["background_consistency"] == pytest.approx(1)


def test_features_of_a_video_network_give_a_frechet_distance(video_network):
    found = find_learned_metrics(fvd_model=video_network)
    frames = video()
    assert found.features(frames) == pytest.approx(frames.mean((0, 2, 3)).tolist(), abs=1e-3)
    a = [[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]]
    moved = [[x + 3, y + 4] for x, y in a]
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(moved, a) == pytest.approx(25)
    assert frechet_distance(a[:1], a) is None


def test_temporal_flickering_is_the_mean_change_between_frames():
    frames = torch.zeros(3, 3, 4, 4)
    assert temporal_flickering(frames) == 1
    frames[1] = 51 / 255
    assert temporal_flickering(frames) == pytest.approx((255 - 51) / 255)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("clip_model", r"clip-model '.*nothing' holds no CLIP model"), ("fvd_model", r"fvd-model '.*' is no TorchScript")],
)
def test_a_path_without_a_network_is_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        find_learned_metrics(**{arguments: tmp_path / "nothing"})
