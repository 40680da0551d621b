"""What is measured of our own models, at toy size."""

import json

import pytest
import torch

from programs import program


def test_the_benchmark_runs_without_a_trained_model(tmp_path):
    output = tmp_path / "b.json"
    assert program("benchmark", "quick=true", "model=null", "tokenizer=tiny", "lm=tiny", f"output={output}") == 0
    results = json.loads(output.read_text())
    assert results["weights"] == "random" and not results["trustworthy"]
    rates = results["rates"]
    assert {"stream", "gemm fp32", "gemm bf16", "conv3d fp32", "render", "loader", "train", "decode"} <= set(rates)
    assert all(entry["rate"] > 0 for entry in rates.values())
    assert 0 < rates["train"]["share"] < 2 and 0 < rates["tokenizer encode"]["share"] < 2


def test_tokenizers_are_measured_without_peers(tmp_path):
    output, small = tmp_path / "b.json", ("tokenizer=tiny", "paper.channels=[8,8,8,8]", "paper.blocks=[1,1,1,1]")
    assert program("benchmark", "suite=tokenizer", "quick=true", *small, f"output={output}") == 0
    results = json.loads(output.read_text())
    assert not results["trustworthy"] and set(results["parameters"]) == {"default", "paper"}
    assert {row["what"] for row in results["rows"]} == {"encode", "decode"} and "conv3d fp32" in results["ceilings"]


def test_ways_of_decoding_are_measured(tmp_path):
    output, small = tmp_path / "b.json", ("tokenizer=tiny", "lm=tiny", "data.train.size=[32,32]", "data.train.frames=5")
    assert program("benchmark", "suite=decode", "quick=true", "model=null", *small, f"output={output}") == 0
    results = json.loads(output.read_text())
    assert not results["trustworthy"] and {"box", "larger"} == set(results["costs"]["parameters"])
    assert all(results["costs"]["times_transformers"][size]["float32"] > 0 for size in ("box", "larger"))
    ways = results["ways"]
    assert ways["Jacobi (float32)"]["same_tokens"] == ways["one by one (float32) again"]["same_tokens"] == 1
    assert ways["Jacobi, window 64 (float32)"]["same_tokens"] == 1
    lenient, exact = (ways[f"Jacobi, {name} (float32)"]["passes"] for name in ("lenience 30", "maximal coupling"))
    assert lenient <= exact < ways["one by one (float32)"]["passes"]


def test_training_is_measured(tmp_path):
    output, small = tmp_path / "b.json", ("tokenizer=tiny", "lm=tiny", "data.train.size=[32,32]", "data.batch_size=4")
    assert program("benchmark", "suite=train", "quick=true", "model=null", *small, f"output={output}") == 0
    results = json.loads(output.read_text())
    assert not results["trustworthy"] and 0.2 < results["loop"]["trainer_over_bare"] < 20
    assert 0.5 < results["tokens"]["default"] <= results["tokens"]["packed"] < 1
    assert 0 <= results["waiting"]["share"] < 1
    assert {"step", "step, packed", "step, checkpointing", "gemm fp32"} < set(results["steps"]["rates"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is written without a GPU")
def test_without_a_gpu_no_figure_stands_under_a_gpu_figures_name(tmp_path, capsys):
    assert program("benchmark", "suite=gpu", "quick=true", f"output={tmp_path}/b.json") == 0
    results = json.loads((tmp_path / "b.json").read_text())
    assert results["figures"] == {} and results["device"] is None and not results["trustworthy"]
    missing = results["missing"]
    ran = ("copy_bytes_per_s", "attention_prefix_flex_over_causal", "decode_1b_graph_share_of_copy")
    assert {missing[name] for name in (*ran, "train_300m_sdpa_tokens_per_s", "train_1b_sdpa_share_of_gemm")} == {
        "no GPU"
    }
    assert all("flash" in name for name, why in missing.items() if why != "no GPU")
    assert "no GPU: everything above was run with toy models" in capsys.readouterr().out
