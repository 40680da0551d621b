"""Measures of sound by sounds whose answer is known."""

import math

import pytest
import torch

from reelm.data.spectrum import mel_filters, mel_spectrogram, spectrogram
from reelm.evaluation.sound import mel_distance, picture, pitch_kept, si_sdr, snr, strongest_frequency

RATE = 16_000


def tone(pitch: float, loud: float = 0.4, seconds: float = 0.5, channels: int = 2) -> torch.Tensor:
    clock = torch.arange(round(seconds * RATE)) / RATE
    return (loud * torch.sin(2 * math.pi * pitch * clock)).expand(1, channels, -1)


def test_noise_ratios_by_the_formula():
    true, noise = torch.randn(3, 2, 500) * 0.1, torch.randn(3, 2, 500) * 0.01
    want = [10 * math.log10(t.square().sum() / n.square().sum()) for t, n in zip(true, noise)]
    assert snr(true + noise, true).tolist() == pytest.approx(want, rel=1e-4)
    assert si_sdr(3 * (true + noise), true).tolist() == pytest.approx(si_sdr(true + noise, true).tolist(), abs=1e-3)
    assert snr(2 * true, true).tolist() == pytest.approx([0, 0, 0], abs=1e-4) and (si_sdr(2 * true, true) > 60).all()


def test_a_voice_on_the_wrong_side_is_an_error():
    left = torch.cat([tone(300, channels=1), torch.zeros(1, 1, 8000)], 1)
    assert si_sdr(left.flip(1), left) < -40 and snr(left, left) > 60


def test_silence_has_finite_figures():
    silence = torch.zeros(1, 2, 3000)
    for made in (silence, tone(300)[..., :3000]):
        assert snr(made, silence).isfinite() and si_sdr(made, silence).isfinite()
        assert mel_distance(made, silence, RATE).isfinite() and not picture(made).isnan().any()
    assert snr(silence, silence) > snr(tone(300)[..., :3000], silence)


def test_a_spectrogram_shows_a_sine_at_its_place_with_its_amplitude():
    shown = spectrogram(tone(1000, 0.4), 512, 128).abs()
    assert shown.shape == (1, 2, 257, 63)
    assert shown[0, 0, :, 30].argmax() == 32 and shown[0, 0, 32, 30].item() == pytest.approx(0.4, rel=1e-3)


def test_mel_bands_cover_all_frequencies_and_rise():
    filters = mel_filters(RATE, 1024, 64)
    assert filters.shape == (64, 513) and (filters.sum(1) > 0).all()
    assert (filters.argmax(1).diff() > 0).all()
    bands = [mel_spectrogram(tone(pitch), RATE, 1024, 256, 64)[0, 0, :, 10].argmax() for pitch in (200, 700, 3000)]
    assert bands[0] < bands[1] < bands[2]


def test_the_mel_distance_of_half_the_loudness_is_six_decibels_where_it_is_heard():
    loud = (torch.rand(1, 2, 16000) * 2 - 1) * 0.9
    assert mel_distance(loud, loud, RATE) == 0
    assert mel_distance(loud / 2, loud, RATE).item() == pytest.approx(6.02, abs=0.05)


@pytest.mark.parametrize("pitch", [196.0, 262.0, 698.0])
def test_the_strongest_frequency(pitch):
    both = tone(pitch, 0.3) + tone(1500, 0.1)
    assert strongest_frequency(both, RATE).item() == pytest.approx(pitch, abs=1)
    assert pitch_kept(tone(pitch * 1.02), both, RATE).item() and not pitch_kept(tone(pitch * 1.06), both, RATE).item()


def test_pictures_show_low_tones_below_and_the_second_channel_right():
    sound = torch.cat([tone(250, channels=1), torch.zeros(1, 1, 8000)], 1)
    shown = picture(sound)
    assert shown.shape[:4] == (1, 3, 1, 128) and shown.abs().max() <= 1
    half = shown.shape[-1] // 2
    assert shown[0, 0, 0, -16:, :half].max() > 0.4 and shown[0, 0, 0, :, half + 1 :].max() == -1
    assert shown[0, 0, 0, :64, :half].mean() < -0.9
