"""Our transformer as the one of `transformers` that has its shape."""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from reelm.lm.heads import Categorical
from reelm.lm.language_model import LanguageModel
from reelm.lm.norm import EPSILON


def to_qwen3(lm: LanguageModel) -> Qwen3ForCausalLM:
    """The same weights as Qwen3 (arXiv:2505.09388); causal sequences (a prefix of one column) give the same scores.

    Ids that the head does not predict have scores of 0. ValueError where the model is not of that shape: `rope=1d`,
    `sites=null` and a plain categorical head make it so.
    """
    t, head = lm.transformer, lm.head
    if t.rope != "1d" or t.sites is not None or t.context_width or not isinstance(head, Categorical) or head.bits:
        raise ValueError(
            "only lm.rope=1d, lm.sites=null, lm.context_width=0, head=categorical and head.bits=0 is Qwen3"
        )
    heads, kv_heads, size = t.heads, t.kv_heads or t.heads, t.width // t.heads
    config = Qwen3Config(
        vocab_size=head.vocabulary.size,
        hidden_size=t.width,
        intermediate_size=t.blocks[0].mlp.out.in_features,
        num_hidden_layers=t.depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=size,
        rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": t.theta},
        tie_word_embeddings=False,
        max_position_embeddings=1 << 16,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    state = {"model.norm.weight": t.norm.weight}
    ids = torch.arange(head.vocabulary.size, device=t.norm.weight.device)
    state["model.embed_tokens.weight"] = head.embed(ids[None])[0]
    scores = torch.zeros_like(state["model.embed_tokens.weight"])
    scores[head.offset : head.offset + head.size] = (head.scores or head.table).weight
    state["lm_head.weight"] = scores
    for i, block in enumerate(t.blocks):
        here, a = f"model.layers.{i}.", block.attention
        q, k, v = a.qkv.weight.split([heads * size, kv_heads * size, kv_heads * size])
        gate, up = block.mlp.up.weight.chunk(2)
        parts = {
            "input_layernorm": block.attention_norm.weight, "post_attention_layernorm": block.mlp_norm.weight,
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": a.out.weight,
            "self_attn.q_norm": a.query_gain, "self_attn.k_norm": a.key_gain,
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": block.mlp.out.weight,
        }  # fmt: skip
        state |= {f"{here}{name}.weight": weight for name, weight in parts.items()}
    model = Qwen3ForCausalLM(config).eval()
    model.load_state_dict({name: weight.detach().clone() for name, weight in state.items()})
    return model
