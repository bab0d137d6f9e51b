//! Hugging Face tensor names in GGUF's spelling.

/// GGUF's name of the tensor that Hugging Face checkpoints call `hf_name`, in a file of `architecture`;
/// `None` when GGUF has no such tensor. GGUF's own `rope_freqs.weight` passes through.
pub(super) fn gguf_name(hf_name: &str, architecture: &str) -> Option<String> {
    let whole = match hf_name {
        "model.embed_tokens.weight" => "token_embd.weight",
        "model.norm.weight" => "output_norm.weight",
        "lm_head.weight" => "output.weight",
        "rope_freqs.weight" => "rope_freqs.weight",
        _ => "",
    };
    if !whole.is_empty() {
        return Some(whole.to_owned());
    }
    let (layer, rest) = hf_name.strip_prefix("model.layers.")?.split_once('.')?;
    let layer = layer.parse::<usize>().ok()?;
    let (module, parameter) = rest.rsplit_once('.')?;
    let sandwich = architecture.starts_with("gemma");
    let module = match module {
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "input_layernorm" => "attn_norm",
        // Gemma has norms on both sides of a sublayer, so the same words mean another place.
        "post_attention_layernorm" if sandwich => "post_attention_norm",
        "post_attention_layernorm" => "ffn_norm",
        "pre_feedforward_layernorm" => "ffn_norm",
        "post_feedforward_layernorm" => "post_ffw_norm",
        _ => return None,
    };
    Some(format!("blk.{layer}.{module}.{parameter}"))
}
