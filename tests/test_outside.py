"""Tokenizers that others trained: diffusers' classes (where it is installed) and TorchScript programs."""

import importlib.util
import json
import os
import shutil
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from reelm.data.clip import Clip
from reelm.data.tokens import TokenShards
from reelm.data.zoetrope.dataset import Zoetrope
from reelm.engine import outside, store
from reelm.engine.comparison import compare
from reelm.engine.encoding import Encoding, encode
from reelm.engine.loading import load_tokenizer
from reelm.engine.outside import weight_files, weights_digest
from reelm.engine.torchscript import TorchScript
from reelm.tokenizers.streaming import decode_stream, encode_stream

NEEDS = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def noise(frames: int, clips: int = 1) -> torch.Tensor:
    return torch.rand(clips, 3, frames, 32, 32) * 2 - 1


# ---- diffusers: kind -> (configuration, latent channels, compression, tokens' shift and scale)
COG = {"down_block_types": ["CogVideoXDownBlock3D"] * 4, "up_block_types": ["CogVideoXUpBlock3D"] * 4,
       "block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 2}  # fmt: skip
IMAGE = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
         "block_out_channels": [8, 8], "norm_num_groups": 2}  # fmt: skip
VIDTOK = {"ch": 8, "ch_mult": [1, 1, 2], "num_res_blocks": 1}
WAN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 2], "num_res_blocks": 1, "temperal_downsample": [True, True]}
SCALED = {"latents_mean": [1.0, 2.0, -3.0, 0.0], "latents_std": [0.5, 2.0, 1.0, 4.0]}
PATCHES = {"dim_mult": [1, 2, 2], "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
MODELS = {
    "image": ("AutoencoderKL", {**IMAGE, "scaling_factor": 0.5}, 4, (1, 2, 2), (0.0, 2.0)),
    "image with a shift": ("AutoencoderKL", {**IMAGE, "shift_factor": 0.25}, 4, (1, 2, 2), (0.25, 1 / 0.18215)),
    "cogvideox": ("AutoencoderKLCogVideoX", {**COG, "latent_channels": 4}, 4, (4, 8, 8), (0.0, 1 / 1.15258426)),
    "wan": ("AutoencoderKLWan", {**WAN, **SCALED}, 4, (4, 4, 4), tuple(SCALED.values())),
    "wan 2.2": ("AutoencoderKLWan", {**WAN, **SCALED, **PATCHES}, 4, (4, 8, 8), tuple(SCALED.values())),
    "vidtok": ("AutoencoderVidTok", {**VIDTOK, "z_channels": 4, "regularizer": "kl"}, 4, (4, 4, 4), (0.0, 1.0)),
}
DISCRETE = {**VIDTOK, "z_channels": 2, "double_z": False, "regularizer": "fsq", "codebook_size": 64}


def saved(kind: str, config: dict, folder) -> nn.Module:
    """A model of random weights as the library saves it."""
    import diffusers

    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**config).eval()
    model.save_pretrained(folder, safe_serialization=True)
    return model


@pytest.fixture(params=MODELS)
def continuous(request, tmp_path):
    kind, config, *rest = MODELS[request.param]
    return tmp_path, saved(kind, config, tmp_path), *rest


@pytest.fixture
def vidtok(tmp_path):
    return tmp_path, saved("AutoencoderVidTok", DISCRETE, tmp_path)


def own_latents(model: nn.Module, video: torch.Tensor) -> torch.Tensor:
    """The wrapped model's own posterior means."""
    if type(model).__name__ == "AutoencoderVidTok":
        return model(video, sample_posterior=False, encoder_mode=True)
    if type(model).__name__ == "AutoencoderKL":
        return torch.stack([model.encode(frame).latent_dist.mode() for frame in video.unbind(2)], 2)
    return model.encode(video).latent_dist.mode()


def own_pixels(model: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    if type(model).__name__ == "AutoencoderVidTok":
        return model.decode(latents)
    if type(model).__name__ == "AutoencoderKL":
        return torch.stack([model.decode(frame).sample for frame in latents.unbind(2)], 2)
    return model.decode(latents).sample


@NEEDS
@torch.no_grad()
def test_latents_are_the_models_own_scaled_as_its_configuration_says(continuous):
    folder, model, dim, compression, (shift, scale) = continuous
    tokenizer, where = load_tokenizer(str(folder))
    assert where == folder and tokenizer.compression == compression and tokenizer.vocabulary is None
    assert not tokenizer.training and not any(p.requires_grad for p in tokenizer.parameters())
    for frames in (1, 5, 9):
        video = noise(frames, clips=2)
        latents = own_latents(model, video)
        tokens = tokenizer.encode(video)
        assert tokens.shape == (2, *tokenizer.grid(frames, 32, 32), dim) == (2, *latents.shape[2:], dim)
        want = (latents.movedim(1, -1) - torch.tensor(shift)) / torch.tensor(scale)
        torch.testing.assert_close(tokens, want)
        pixels = tokenizer.decode(tokens)
        assert pixels.shape == video.shape
        if "Cog" not in type(model).__name__ or frames != 5:
            torch.testing.assert_close(pixels, own_pixels(model, latents).clamp(-1, 1), atol=1e-4, rtol=1e-4)


@NEEDS
@torch.no_grad()
def test_what_is_causal_and_what_is_nearly(continuous):
    folder, model, *_ = continuous
    tokenizer, video = outside.load(folder), noise(9)
    step = tokenizer.compression[0]
    tokens = tokenizer.encode(video)
    for latents in (1, 2):
        prefix = tokenizer.encode(video[:, :, : 1 + (latents - 1) * step])
        same = torch.allclose(prefix, tokens[:, :latents], atol=1e-4)
        assert same == ("Cog" not in type(model).__name__)


@NEEDS
@torch.no_grad()
def test_an_even_number_of_latent_frames_of_cogvideox(tmp_path):
    """Which alone it takes for a clip without a first frame; here the frames it makes are those of a longer clip."""
    model = saved(*MODELS["cogvideox"][:2], tmp_path)
    tokenizer = outside.load(tmp_path)
    still = noise(1).expand(-1, -1, 5, -1, -1)
    latents = own_latents(model, still)
    assert own_pixels(model, latents).shape[2] == 8 and tokenizer.decode_latents(latents).shape[2] == 5
    longer = own_pixels(model, torch.cat([latents[:, :, :1], latents], 2))
    assert torch.equal(tokenizer.decode_latents(latents), longer[:, :, 4:])


@NEEDS
@torch.no_grad()
def test_codes_of_vidtok(vidtok):
    folder, model = vidtok
    tokenizer = outside.load(folder)
    assert tokenizer.vocabulary == 64 and tokenizer.compression == (4, 4, 4)
    video = noise(9, clips=2)
    ids = tokenizer.encode(video)
    quantized, own = model(video, encoder_mode=True)
    assert ids.dtype == torch.int64 and torch.equal(ids, own.long()) and len(ids.unique()) > 10
    torch.testing.assert_close(tokenizer.quantizer.lookup(ids), quantized)
    pixels = tokenizer.decode(ids)
    torch.testing.assert_close(pixels, model.decode(own, decode_from_indices=True).clamp(-1, 1), atol=1e-5, rtol=0)
    assert pixels.shape == video.shape
    for frames in (1, 5):
        assert torch.equal(tokenizer.encode(video[:, :, :frames]), ids[:, : 1 + frames // 4])
    every = torch.arange(64).view(1, 1, 8, 8)
    assert torch.equal(tokenizer.quantizer(tokenizer.quantizer.lookup(every))[1], every)
    reconstruction, again, losses = tokenizer(video)
    assert torch.equal(again, ids) and reconstruction.shape == video.shape and not losses


@NEEDS
def test_streams_are_joined_and_pieces_refused(vidtok):
    tokenizer, video = outside.load(vidtok[0]), noise(9)
    ids = tokenizer.encode(video)
    assert torch.equal(torch.cat(list(encode_stream(tokenizer, video.split(2, 2), 1)), 1), ids)
    pixels = torch.cat(list(decode_stream(tokenizer, ids.split(1, 1), 1)), 2)
    assert torch.equal(pixels, tokenizer.decode(ids))
    for call, given in ((tokenizer.encode, video), (tokenizer.decode, ids)):
        with pytest.raises(ValueError, match="VidTok takes whole clips, no pieces of a stream"):
            call(given, {})
    with pytest.raises(ValueError, match=r"takes 1 \+ 4k frames of multiples of 4 x 4"):
        tokenizer.encode(video[:, :, :8])


@NEEDS
@pytest.mark.parametrize("discrete", [True, False])
def test_they_are_stored_as_ours_are(discrete, tmp_path):
    kind, config = ("AutoencoderVidTok", DISCRETE) if discrete else MODELS["wan"][:2]
    saved(kind, config, tmp_path / "theirs")
    first = outside.load(tmp_path / "theirs")
    store.save(first, tmp_path / "ours")
    assert sorted(os.listdir(tmp_path / "ours")) == ["config.json", "model.safetensors"]
    second, video = outside.load(tmp_path / "ours"), noise(5)
    assert type(second) is type(first) and store.fingerprint(second) == store.fingerprint(first)
    assert torch.equal(second.encode(video), first.encode(video))
    assert torch.equal(second.decode(second.encode(video)), first.decode(first.encode(video)))
    next(second.parameters()).data.add_(1)
    assert store.fingerprint(second) != store.fingerprint(first)


@NEEDS
def test_they_are_compared_and_encoded(vidtok, tmp_path):
    discrete, clip = outside.load(vidtok[0]), Clip(noise(9))
    figures = compare(clip, discrete, (), None, print)[0].figures
    assert figures["bits"] == 6 * 3 * 8 * 8 and figures["vocabulary"] == 64
    saved(*MODELS["image"][:2], tmp_path / "image")
    continuous = outside.load(tmp_path / "image")
    assert compare(clip, continuous, (), None, print)[0].figures["bits"] == 16 * 4 * 9 * 16 * 16
    for name, tokenizer in (("ids", discrete), ("latents", continuous)):
        source = Zoetrope(frames=5, size=32, length=3)
        encode([Encoding(source, tokenizer, tmp_path / name / "train", {}, shard_clips=2, batch_size=2)], workers=0)
        stored = TokenShards(tmp_path / name)
        assert stored.tokenizer == store.fingerprint(tokenizer) and stored.vocabulary == tokenizer.vocabulary
        torch.testing.assert_close(stored[0].tokens, tokenizer.encode(source.get(0).video), atol=1e-2, rtol=1e-3)


@NEEDS
def test_files_as_they_come(tmp_path):
    """Names of the first days, parts, a variant in half precision."""
    model = saved(*MODELS["image"][:2], tmp_path)
    video, whole = noise(1), tmp_path / WEIGHTS
    want, weights = outside.load(tmp_path).encode(video), load_file(whole)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = weights
    for new, name in old.items():
        renamed = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): w for key, w in renamed.items()}
    assert renamed.keys() != weights.keys() and len(renamed) == len(model.state_dict())
    save_file(renamed, whole)
    assert torch.equal(outside.load(tmp_path).encode(video), want)
    names = sorted(weights)
    save_file({n: weights[n] for n in names[::2]}, tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors")
    save_file({n: weights[n] for n in names[1::2]}, tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors")
    whole.unlink()
    assert torch.equal(outside.load(tmp_path).encode(video), want) and len(weight_files(tmp_path)) == 2
    for part in weight_files(tmp_path):
        part.unlink()
    save_file({n: w.half() for n, w in weights.items()}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    halved = outside.load(tmp_path)
    assert next(halved.parameters()).dtype == torch.float32
    torch.testing.assert_close(halved.encode(video), want, atol=0.05, rtol=0.05)
    save_file(weights, tmp_path / "diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(ValueError, match="several variants"):
        outside.load(tmp_path)


def one_line(call, *arguments, **options) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def described(folder, **config) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def test_folders_that_hold_none(tmp_path):
    assert "config.json is missing" in one_line(outside.load, tmp_path)
    assert "no model" in one_line(load_tokenizer, str(tmp_path / "nowhere"))
    (tmp_path / "model_index.json").write_text("{}")
    assert f"name the folder of its tokenizer: {tmp_path}/vae" in one_line(outside.load, tmp_path)
    described(tmp_path, _class_name="UNet2DModel")
    assert "holds an UNet2DModel; of diffusers AutoencoderKL, " in one_line(outside.load, tmp_path)
    described(tmp_path, _class_name="AutoencoderKL")
    assert f"{WEIGHTS} is missing" in one_line(outside.load, tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "diffusion_pytorch_model.bin, a pickle, which can run code" in one_line(outside.load, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"cut off")
    assert "is not a readable safetensors file" in one_line(outside.load, tmp_path)


def test_without_diffusers_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    described(tmp_path, _class_name="AutoencoderKL")
    save_file({"a": torch.zeros(1)}, tmp_path / WEIGHTS)
    assert "pip install reelm[outside]" in one_line(outside.load, tmp_path)


@NEEDS
@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("AutoencoderKL", {**IMAGE, "latent_channels": 5}, "holds weights of another model"),
        ("AutoencoderKL", {**IMAGE, "act_fn": "none of them"}, "does not describe an AutoencoderKL"),
        ("AutoencoderKL", {**IMAGE, "block_out_channels": "wide"}, "does not describe an AutoencoderKL"),
        ("AutoencoderKL", {**IMAGE, "scaling_factor": "half"}, "does not describe an AutoencoderKL"),
        ("AutoencoderKLWan", WAN, "has 4 channels, but 16 latents_mean"),
        ("AutoencoderKLWan", {**WAN, **SCALED, "temperal_downsample": [False, True]}, "goes in steps of 4 frames"),
        ("AutoencoderVidTok", {**DISCRETE, "is_causal": False}, "only causal ones can be taken"),
        ("AutoencoderVidTok", {**DISCRETE, "codebook_size": 512}, "does not describe an AutoencoderVidTok"),
    ],
)
def test_configurations_that_do_not_fit(kind, config, message, tmp_path):
    saved(*MODELS["image"][:2], tmp_path)
    described(tmp_path, _class_name=kind, **config)
    assert message in one_line(outside.load, tmp_path)


# ---- TorchScript: programs of the form of Cosmos's


class Encoder(nn.Module):
    """4 x 8 x 8, causal, by averages; one weight, so that it has a number format."""

    def __init__(self, discrete: bool = True) -> None:
        super().__init__()
        self.discrete = discrete
        self.gain = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("_levels", torch.tensor([2, 2, 2]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat([x[:, :, :1].expand(-1, -1, 3, -1, -1), x], 2)
        z = F.avg_pool3d(x.float(), (4, 8, 8)).to(self.gain.dtype) * self.gain
        if not self.discrete:
            return z, self.gain
        bits = (z > 0).to(torch.int32)
        return bits[:, 0] + 2 * bits[:, 1] + 4 * bits[:, 2], z


class Decoder(nn.Module):
    def __init__(self, discrete: bool = True) -> None:
        super().__init__()
        self.discrete = discrete
        self.gain = nn.Parameter(torch.tensor(3.0))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if self.discrete:
            z = torch.stack([z & 1, z // 2 & 1, z // 4 & 1], 1).to(self.gain.dtype)
        z = z / self.gain
        return z.repeat_interleave(4, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)[:, :, 3:]


class ImageEncoder(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(F.conv2d(x, torch.ones(5, 3, 1, 1)), 8)


class ImageDecoder(nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return F.interpolate(z[:, :3], scale_factor=8.0)


class Writer(nn.Module):
    """Writes a file when it is loaded, before anything of it is run."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.gain, self.place = nn.Parameter(torch.tensor(3.0)), place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool3d(torch.cat([x[:, :, :1].expand(-1, -1, 3, -1, -1), x], 2), (4, 8, 8))

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return self.gain, self.place, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.gain, self.place, self.training = state[0], state[1], state[2]
        torch.save(state[0], state[1])


def programs(folder, encoder: nn.Module, decoder: nn.Module):
    folder.mkdir(exist_ok=True)
    torch.jit.script(encoder.eval()).save(str(folder / "encoder.jit"))
    torch.jit.script(decoder.eval()).save(str(folder / "decoder.jit"))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("discrete", [True, False])
def test_programs_are_tokenizers(discrete, dtype, tmp_path):
    encoder, decoder = (kind(discrete).to(dtype) for kind in (Encoder, Decoder))
    programs(tmp_path, encoder, decoder)
    tokenizer, _ = load_tokenizer(str(tmp_path), trust=True)
    assert tokenizer.compression == (4, 8, 8) and tokenizer.vocabulary == (8 if discrete else None)
    for frames in (1, 9):
        video = noise(frames, clips=2)
        tokens, own = tokenizer.encode(video), encoder(video.to(dtype))[0]
        if discrete:
            assert tokens.dtype == torch.int64 and torch.equal(tokens, own.long())
        else:
            assert tokens.dtype == torch.float32 and torch.equal(tokens, own.float().movedim(1, -1))
        pixels = tokenizer.decode(tokens)
        assert pixels.shape == video.shape and torch.equal(pixels, decoder(own).float().clamp(-1, 1))
    assert torch.equal(tokenizer.encode(video[:, :, :5]), tokens[:, :2])
    assert torch.equal(torch.cat(list(encode_stream(tokenizer, video.split(2, 2), 1)), 1), tokens)
    figures = compare(Clip(video[:1]), tokenizer, (), None, print)[0].figures
    assert figures["bits"] == 3 * 4 * 4 * (3 if discrete else 3 * 16)


def test_programs_of_images_get_each_frame(tmp_path):
    tokenizer = outside.load(programs(tmp_path, ImageEncoder(), ImageDecoder()), trust=True)
    assert tokenizer.compression == (1, 8, 8) and tokenizer.images
    video = noise(3)
    tokens = tokenizer.encode(video)
    assert tokens.shape == (1, 3, 4, 4, 5) and tokenizer.decode(tokens).shape == video.shape
    assert torch.equal(tokenizer.encode(video[:, :, 1:2]), tokens[:, 1:2])


def test_codes_beyond_what_is_known_are_refused(tmp_path):
    encoder = Encoder()
    encoder._levels = torch.tensor([2, 2])
    tokenizer = outside.load(programs(tmp_path, encoder, Decoder()), trust=True)
    assert tokenizer.vocabulary == 4
    assert "made the code 7; 4 were known of" in one_line(tokenizer.encode, torch.ones(1, 3, 1, 32, 32))
    del encoder._levels
    assert outside.load(programs(tmp_path, encoder, Decoder()), trust=True).vocabulary == 64_000


def test_nothing_of_a_program_runs_before_it_is_trusted(tmp_path):
    place = tmp_path / "written"
    programs(tmp_path / "p", Writer(str(place)), Decoder())
    place.unlink(missing_ok=True)
    said = one_line(load_tokenizer, str(tmp_path / "p"))
    assert "holds TorchScript programs, which can read and write your files" in said and "trust=true" in said
    assert not place.exists()
    outside.load(tmp_path / "p", trust=True)
    assert place.exists()  # what trust means


def test_no_stored_model_can_ask_for_a_program(tmp_path):
    folder = programs(tmp_path / "p", Encoder(), Decoder())
    config = {"_target_": "reelm.engine.torchscript.TorchScript", "folder": str(folder), "trust": True}
    assert "only classes of" in one_line(store.build, config)
    tokenizer = outside.load(folder, trust=True)
    assert "a TorchScript cannot be stored" in one_line(store.save, tokenizer, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_fingerprints_tell_programs_apart_wherever_they_are(tmp_path):
    first = outside.load(programs(tmp_path / "a", Encoder(), Decoder()), trust=True)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert store.fingerprint(outside.load(tmp_path / "b", trust=True)) == store.fingerprint(first)
    programs(tmp_path / "c", Encoder(), Decoder(discrete=True).to(torch.float64))
    shutil.copy(tmp_path / "a/encoder.jit", tmp_path / "c/encoder.jit")
    assert store.fingerprint(TorchScript(tmp_path / "c", trust=True)) == store.fingerprint(first)  # another decoder
    assert weights_digest(tmp_path / "c") != weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")
    changed = Encoder()
    changed.gain.data.mul_(2)
    assert store.fingerprint(outside.load(programs(tmp_path / "d", changed, Decoder()), True)) != store.fingerprint(
        first
    )


def test_files_that_are_no_programs(tmp_path):
    programs(tmp_path, Encoder(), Decoder())
    (tmp_path / "decoder.jit").write_bytes(b"PK no program")
    assert "decoder.jit is no TorchScript program" in one_line(outside.load, tmp_path, trust=True)
    (tmp_path / "decoder.jit").unlink()
    assert "no decoder.jit in" in one_line(outside.load, tmp_path, trust=True)
    programs(tmp_path, nn.Linear(3, 3), Decoder())
    assert "takes no clip and no image" in one_line(outside.load, tmp_path, trust=True)
    programs(tmp_path, nn.Flatten(), Decoder())
    assert "is no causal tokenizer" in one_line(outside.load, tmp_path, trust=True)


def test_shards_of_a_program(tmp_path, monkeypatch):
    tokenizer = outside.load(programs(tmp_path / "p", Encoder(), Decoder()), trust=True)
    source = Zoetrope(frames=5, size=32, length=2)
    job = Encoding(source, tokenizer, tmp_path / "t/train", {}, shard_clips=2, batch_size=2)
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert "cannot be sent to other processes" in one_line(encode, [job], backend="ray")
    encode([job], workers=0)
    assert torch.equal(TokenShards(tmp_path / "t")[1].tokens, tokenizer.encode(source.get(1).video))
