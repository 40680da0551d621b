import pytest
import torch
from torch._dynamo.utils import counters

from reelm.lm import packed
from reelm.lm.attention import attention
from reelm.lm.heads import Categorical
from reelm.lm.language_model import LanguageModel
from reelm.lm.layouts import Nearby
from reelm.lm.packed import Packed, in_one_row
from reelm.lm.sequence import Sequence
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import SPECIAL, Vocabulary

SEGMENTS = ((7, 3), (5, 5), (5, 1), (9, 0), (9, 0), (4, 2))


def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool,
) -> torch.Tensor:  # fmt: skip
    """What FlashAttention's function of this name does, by its documentation: sequences one after the other, (L, heads,
    D), of which `cu_seqlens` tell the beginnings; causal counts from the last query and key of each."""
    assert cu_seqlens_q.dtype is cu_seqlens_k.dtype is torch.int32
    made = []
    for i in range(len(cu_seqlens_q) - 1):
        queries = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]].transpose(0, 1)
        keys, values = (x[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].transpose(0, 1) for x in (k, v))
        assert queries.shape[1] <= max_seqlen_q and keys.shape[1] <= max_seqlen_k
        keys, values = (x.repeat_interleave(len(queries) // len(x), 0) for x in (keys, values))
        scores = queries @ keys.transpose(1, 2) / q.shape[-1] ** 0.5
        later = torch.ones_like(scores[0]).triu(1 + keys.shape[1] - queries.shape[1]).bool()
        scores = scores.masked_fill(later, float("-inf")) if causal else scores
        made.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(made)


def qkv(kv_heads: int = 2) -> list[torch.Tensor]:
    columns = sum(length for length, _ in SEGMENTS)
    return [torch.randn(1, heads, columns, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads)]


@pytest.mark.parametrize("backend", ["math", "flash", "reference"])
def test_what_a_pass_without_gradients_made_serves_one_with_them(backend, monkeypatch):
    monkeypatch.setattr(packed, "flash", lambda q, name: {"flash_attn_varlen_func": varlen}[name])
    packed.tables.cache_clear()
    inputs = qkv()
    with torch.inference_mode():  # of validation
        Packed(SEGMENTS, backend)(*inputs)
    Packed(SEGMENTS, backend)(*inputs).sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_the_reference_is_attention_of_each_segment_alone():
    q, k, v = qkv()
    expected, start = [], 0
    for length, prefix in SEGMENTS:
        one = slice(start, start + length)
        expected.append(attention(q[:, :, one], k[:, :, one], v[:, :, one], prefix, "reference"))
        start += length
    torch.testing.assert_close(Packed(SEGMENTS, "reference")(q, k, v), torch.cat(expected, 2))


@pytest.mark.parametrize("backend", ["sdpa", "math", "auto", "flash", "flex"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_backends_equal_the_reference_and_so_do_their_gradients(backend, kv_heads, monkeypatch):
    monkeypatch.setattr(packed, "flash", lambda q, name: {"flash_attn_varlen_func": varlen}[name])
    inputs, weights = qkv(kv_heads), torch.randn(1, 4, 39, 8)
    if backend == "flex":  # which has no backward pass on CPUs
        inputs = [x.detach() for x in inputs]
    expected, got = (Packed(SEGMENTS, name)(*inputs) for name in ("reference", backend))
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    if backend != "flex":
        gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in (got, expected)]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_flash_says_what_it_needs():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="attention=sdpa"):
            Packed(SEGMENTS, "flash")(*qkv())


def model(**changes) -> LanguageModel:
    vocabulary = Vocabulary(visual=16)
    built = LanguageModel(Transformer(32, 2, 4, 2, sites=(4, 4, 4), **changes), Categorical(vocabulary, 32))
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return built


def batches() -> list[Sequence]:
    made = []
    for rows, length, prefix in ((2, 9, 3), (1, 5, 1), (3, 12, 7)):
        loss = (torch.arange(length) >= prefix).expand(rows, -1)
        ids = torch.randint(SPECIAL, SPECIAL + 16, (rows, length))
        made.append(Sequence(ids, torch.randint(0, 4, (rows, length, 3)), prefix, loss))
    return made


@pytest.mark.parametrize("rope", ["3d", "1d"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_row_has_the_loss_and_gradients_of_its_sequences(rope, checkpointing):
    lm, parts = model(rope=rope), batches()
    lm.transformer.checkpointing = checkpointing
    row = in_one_row(parts)
    assert row.segments == ((9, 3),) * 2 + ((5, 1),) + ((12, 7),) * 3 and len(row) == 1
    counts = [int(part.loss.sum()) for part in parts]
    apart = sum(count * lm.loss(part)[0] for count, part in zip(counts, parts, strict=True)) / sum(counts)
    together, metrics = lm.loss(row)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(metrics["nll"], apart.detach(), atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(loss, list(lm.parameters())) for loss in (together, apart)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_other_segments_are_not_compiled_anew():
    lm, (first, second, third) = model(), batches()
    rows, graphs = [in_one_row(part) for part in ([first, second], [second, third], [third, first, second])], []
    expected = [lm.loss(row)[0] for row in rows]
    lm.transformer.blocks[0].compile(dynamic=True, backend="eager")
    for row, loss in zip(rows, expected, strict=True):
        torch.testing.assert_close(lm.loss(row)[0], loss)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] <= graphs[1] == graphs[2]


def test_embedded_text_and_continuous_tokens_are_packed_too():
    first, second = (
        Sequence(
            torch.full((rows, 4), SPECIAL), torch.zeros(rows, 4, 3, dtype=torch.long), 2,
            context=torch.full((rows, words, 5), float(rows)), context_mask=torch.ones(rows, words, dtype=torch.bool),
            latents=torch.randn(rows, 4, 6),
        )
        for rows, words in ((1, 2), (2, 3))
    )  # fmt: skip
    row = in_one_row([first, second])
    assert row.context[0, :, 0].tolist() == [1.0] * 2 + [2.0] * 6 and row.context_mask.shape == (1, 8)
    torch.testing.assert_close(row.latents[0, 4:], second.latents.flatten(0, 1))
    assert row.to("cpu").segments == row.segments
    with pytest.raises(ValueError, match="either all sequences of one row have latents or none has"):
        in_one_row([first, second.replace(latents=None)])


def test_mistakes_are_one_line():
    row = in_one_row(batches())
    with pytest.raises(ValueError, match="do not make up one row of 59 columns"):
        row.replace(segments=((9, 3),))
    loss = row.loss.clone()
    loss[0, 9] = True  # the first column of the second segment
    with pytest.raises(ValueError, match="inside the prefix of 3 columns"):
        row.replace(loss=loss)
    with pytest.raises(ValueError, match="without lm.layout"):
        model(layout=Nearby()).loss(row)
