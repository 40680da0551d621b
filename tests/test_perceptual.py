import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reelm.tokenizers.perceptual import LPIPS, alexnet, read_weights, squeezenet

LPIPS_FILES = Path(__file__).parents[2] / "shared" / "weights" / "lpips"
WIDTHS = {"alex": (64, 192, 384, 256, 256), "squeeze": (64, 128, 256, 384, 384, 512, 512)}


def write(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in weights.items()})
    else:
        save_file(weights, path)
    return path


@pytest.fixture(scope="module", params=[("alex", ".npz"), ("squeeze", ".safetensors")], ids=["alex", "squeeze"])
def files(request, tmp_path_factory) -> tuple[Path, Path]:
    """Random weights of the right shapes."""
    network, suffix = request.param
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    layers = (alexnet if network == "alex" else squeezenet)()[0]
    features = {f"features.{name}": value.detach().clone() for name, value in layers.state_dict().items()}
    linear = {f"{network}.lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(WIDTHS[network])}
    return write(folder / f"features{suffix}", features), write(folder / f"linear{suffix}", linear)


def videos(frames: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.rand(2, 2, 3, frames, 40, 32) * 2 - 1)


def test_it_is_a_distance(files):
    lpips = LPIPS(*files)
    a, b = videos()
    assert lpips(a, a) == 0
    assert lpips(a, b) > 0
    torch.testing.assert_close(lpips(a, b), lpips(b, a))
    assert lpips(a, a + 0.1 * (b - a)) < lpips(a, b)


def test_gradients_reach_the_video_and_not_the_weights(files):
    lpips = LPIPS(*files)
    a, b = videos(1)
    a.requires_grad_()
    lpips(a, b).backward()
    assert a.grad.isfinite().all() and (a.grad != 0).float().mean() > 0.5
    assert not any(p.requires_grad for p in lpips.parameters())


def test_flat_and_equal_videos_have_finite_gradients(files):
    lpips = LPIPS(*files)
    for value in (-1.0, 0.0, 1.0):
        flat = torch.full((1, 3, 1, 32, 32), value, requires_grad=True)
        lpips(flat, flat.detach()).backward()
        assert flat.grad.isfinite().all()


def test_only_some_frames_are_compared(files):
    lpips = LPIPS(*files, frames=2)
    a, b = videos(5)
    middle = a.clone()
    middle[:, :, 1:4] = b[:, :, 1:4]
    assert lpips(a, middle) == 0 and lpips(a, b) > 0
    torch.testing.assert_close(lpips(a, b), LPIPS(*files)(a[:, :, [0, 4]], b[:, :, [0, 4]]))


def refused(error: type[Exception], match: str, *paths: Path) -> None:
    with pytest.raises(error, match=match) as caught:
        LPIPS(*paths)
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_weights_are_refused_in_one_line(files, tmp_path):
    features, linear = files
    refused(FileNotFoundError, "no weights file", tmp_path / "absent.npz", linear)
    refused(ValueError, "do not hold LPIPS weights", linear, linear)
    refused(ValueError, "do not hold LPIPS weights", features, features)
    for suffix in (".npz", ".safetensors", ".npy"):
        broken = tmp_path / f"broken{suffix}"
        broken.write_bytes(features.read_bytes()[:1000])
        refused(ValueError, "is not a readable", broken, linear)
    bad = write(tmp_path / "bad.npz", {name: value.flatten() for name, value in read_weights(linear).items()})
    refused(ValueError, "does not hold LPIPS weights: layer 0", features, bad)
    half = {name: value for name, value in read_weights(features).items() if "0." not in name}
    refused(ValueError, "do not hold LPIPS weights", write(tmp_path / "half.npz", half), linear)


class Trap:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_refused_and_never_run(files, tmp_path):
    trace = tmp_path / "trace"
    array = np.empty(1, object)
    array[0] = Trap(trace)
    np.savez(tmp_path / "object.npz", weight=array)
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(Trap(trace)))
    torch.save({"weight": Trap(trace)}, tmp_path / "torch.npz")
    for name in ("object.npz", "raw.npz", "torch.npz"):
        refused(ValueError, "is not a readable|do not hold", tmp_path / name, files[1])
    assert not trace.exists()


@pytest.mark.skipif(not LPIPS_FILES.is_dir(), reason="no LPIPS weights here")
def test_published_distances():
    from PIL import Image

    def image(name: str) -> torch.Tensor:
        pixels = np.array(Image.open(LPIPS_FILES / f"{name}.png").convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1

    lpips = LPIPS(LPIPS_FILES / "alexnet_features.npz", LPIPS_FILES / "lpips_v0.1_linear.npz")
    reference = image("ex_ref")
    assert lpips(reference, image("ex_p0")).item() == pytest.approx(0.722, abs=2e-3)
    assert lpips(reference, image("ex_p1")).item() == pytest.approx(0.138, abs=2e-3)
    squeeze = LPIPS(LPIPS_FILES / "squeezenet1_1_features.npz", LPIPS_FILES / "lpips_v0.1_linear.npz")
    assert squeeze(reference, image("ex_p1")) < squeeze(reference, image("ex_p0"))
