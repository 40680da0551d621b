import pytest
import torch

from reelm.lm.attention import _flash_function, attention, visible


def qkv(heads=4, kv_heads=4, queries=12, keys=12, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, queries, 16, generator=g)
    k, v = (torch.randn(2, kv_heads, keys, 16, generator=g) for _ in range(2))
    return [t.to(dtype) for t in (q, k, v)]


def test_prefix_sees_itself_and_the_rest_looks_back():
    assert visible(4, 4, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible(1, 4, 0).all()
    assert visible(2, 4, 0).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_reference_is_softmax_attention():
    q, k, v = qkv()
    for row in range(12):
        seen = max(row + 1, 5)
        weights = (q[:, :, row : row + 1] @ k[:, :, :seen].transpose(-1, -2) / 4).softmax(-1)
        expected = weights @ v[:, :, :seen]
        torch.testing.assert_close(attention(q, k, v, 5, "reference")[:, :, row : row + 1], expected)


@pytest.mark.parametrize("backend", ["sdpa", "math", "flex"])
@pytest.mark.parametrize("prefix", [0, 1, 5, 11, 12])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_backends_equal_the_reference(backend, prefix, kv_heads):
    q, k, v = qkv(kv_heads=kv_heads)
    torch.testing.assert_close(
        attention(q, k, v, prefix, backend), attention(q, k, v, prefix, "reference"), atol=2e-6, rtol=1e-5
    )


@pytest.mark.parametrize("backend", ["sdpa", "math", "flex"])
@pytest.mark.parametrize("queries,prefix", [(1, 0), (1, 5), (4, 0), (4, 5), (4, 10), (4, 12)])
def test_fewer_queries_are_the_last_columns(backend, queries, prefix):
    q, k, v = qkv(kv_heads=2)
    whole = attention(q, k, v, prefix, "reference")[:, :, -queries:]
    torch.testing.assert_close(attention(q[:, :, -queries:], k, v, prefix, backend), whole, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_gradients_equal_the_reference(backend, kv_heads):
    inputs = [t.requires_grad_() for t in qkv(kv_heads=kv_heads)]
    weights = torch.randn(2, 4, 12, 16)
    expected = torch.autograd.grad((attention(*inputs, 5, "reference") * weights).sum(), inputs)
    got = torch.autograd.grad((attention(*inputs, 5, backend) * weights).sum(), inputs)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "math", "auto"])
def test_bfloat16_stays_near_the_reference(backend):
    q, k, v = qkv(dtype=torch.bfloat16)
    got, expected = attention(q, k, v, 5, backend), attention(q, k, v, 5, "reference")
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.float(), expected.float(), atol=0.03, rtol=0.03)


def test_grouped_queries_equal_repeated_keys_and_values():
    q, k, v = qkv(kv_heads=2)
    repeated = attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), 5, "reference")
    torch.testing.assert_close(attention(q, k, v, 5, "reference"), repeated)


def test_flash_says_what_it_needs():
    if torch.cuda.is_available() and _flash_function() is not None:
        q, k, v = (t.cuda() for t in qkv(kv_heads=2, dtype=torch.bfloat16))
        expected = attention(q, k, v, 5, "reference")
        torch.testing.assert_close(attention(q, k, v, 5, "flash"), expected, atol=0.03, rtol=0.03)
    else:
        with pytest.raises(ValueError, match="attention=sdpa"):
            attention(*qkv(), 5, "flash")
