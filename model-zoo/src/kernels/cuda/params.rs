//! The kernels' parameters, as the `.cuh` files declare them.

use super::device::Part;

/// A pointer of a kernel.
pub(super) type Pointer = u64;

/// Mirrors structs of the kernels; every byte of them is a field's.
macro_rules! params {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $ty:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Debug, Clone, Copy)]
            pub(super) struct $name { $(pub(super) $field: $ty,)* }

            const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$ty>())*);

            // SAFETY: integers and floats, without padding by the assertion; all zeros are valid.
            unsafe impl bytemuck::Zeroable for $name {}
            // SAFETY: as above, `repr(C)`, and every bit pattern is valid.
            unsafe impl bytemuck::Pod for $name {}
        )*
    };
}

params! {
    PlaceParams {
        q: Pointer, pages: Pointer, table: Pointer, rows: Pointer, within: Pointer, kv_len: Pointer,
        starts: Pointer, tables: Pointer, heads: u32, kv_heads: u32, head_dim: u32, block_size: u32,
    }
    SkipParams { runs: Pointer, states: Pointer, stride: u32, layer: u32 }
    SkinnyParams {
        weight: Pointer, x: Pointer, norm: Pointer, bias: Pointer, out: Pointer, index: Pointer, rows: u32,
        cols: u32, tokens: u32, activation: u32, eps: f32, pad: u32, skips: SkipParams, place: PlaceParams,
    }
    QuantizedPartParams { units: Pointer, first_row: u32, format: u32 }
    QuantizedMatrixParams { parts: [QuantizedPartParams; 3], count: u32, pad: u32 }
    QuantizedParams { skinny: SkinnyParams, matrix: QuantizedMatrixParams, after: u32, pad: u32 }
    QuantizedWholeParams { out: Pointer, rows: u32, cols: u32, matrix: QuantizedMatrixParams }
    EmbedParams { table: Pointer, tokens: Pointer, x: Pointer, width: u32, scale: f32, format: u32, pad: u32 }
    PutParams { rows: Pointer, tokens: Pointer, x: Pointer, width: u32, pad: u32 }
    RotaryParams { frequencies: Pointer, positions: Pointer, table: Pointer, half: u32, magnitude: f32 }
    NormParams { x: Pointer, index: Pointer, weight: Pointer, out: Pointer, width: u32, eps: f32 }
    AddParams { y: Pointer, bias: Pointer, norm: Pointer, index: Pointer, x: Pointer, width: u32, eps: f32 }
    ActivateParams {
        gate_up: Pointer, bias: Pointer, out: Pointer, index: Pointer, width: u32, activation: u32,
        skips: SkipParams,
    }
    WatchParams {
        x: Pointer, before: Pointer, watched: Pointer, rules: Pointer, tallies: Pointer, states: Pointer,
        width: u32, stride: u32, layer: u32, pad: u32,
    }
    PlaceRowsParams {
        qkv: Pointer, bias: Pointer, q_norm: Pointer, k_norm: Pointer, index: Pointer, eps: f32, pad: u32,
        place: PlaceParams,
    }
    AttentionParams {
        q: Pointer, out: Pointer, pages: Pointer, items: Pointer, kv_len: Pointer, starts: Pointer,
        tables: Pointer, packed: Pointer, parts: Pointer, done: Pointer, heads: u32, kv_heads: u32, block_size: u32,
        window: u32, scale: f32, layer: u32,
    }
    StageParams {
        kind: u32, tokens: u32, head_groups: u32, splits: u32, links: Pointer, skinny: SkinnyParams,
        quantized: QuantizedMatrixParams, attention: AttentionParams, embed: EmbedParams, rotary: RotaryParams,
    }
    FusedParams {
        stages: Pointer, maps: Pointer, arrived: Pointer, from: u32, to: u32, room: u32, slots: u32, ahead: u32,
        pad: u32,
    }
    StackPartParams { entries: Pointer, levels: u32, rows: u32, first_block: u32, first_sum: u32 }
    StackParams {
        x: Pointer, sums: Pointer, blocks: Pointer, index: Pointer, cols: u32, tokens: u32, width: u32, count: u32,
        skips: SkipParams, parts: [StackPartParams; 3],
    }
    StackJoinParams {
        sums: Pointer, splits: u32, tokens: u32, width: u32, eights: u32, rows: [u32; 2], first: [u32; 3], pad: u32,
        skinny: SkinnyParams,
    }
    StackWholeParams {
        out: Pointer, blocks: u32, cols: u32, eights: u32, count: u32, parts: [StackPartParams; 3],
    }
    ObserveParams {
        q: Pointer, items: Pointer, sums: Pointer, heads: u32, kv_heads: u32, head_dim: u32, layer: u32,
        layers: u32, pad: u32,
    }
    KeySquaresParams {
        pages: Pointer, tables: Pointer, out: Pointer, list: u32, slots: u32, kv_heads: u32, head_dim: u32,
        block_size: u32, pad: u32,
    }
    PackParams {
        pages: Pointer, lines: Pointer, moves: Pointer, channels: Pointer, kept: u32, kv_heads: u32,
        head_dim: u32, block_size: u32,
    }
    CompactParams {
        pages: Pointer, words: Pointer, kv_heads: u32, head_dim: u32, block_size: u32, pad: u32,
    }
    GazeParams {
        q: Pointer, pages: Pointer, kv_len: Pointer, starts: Pointer, tables: Pointer, onlookers: Pointer,
        places: Pointer, lse: Pointer, weights: Pointer, sums: Pointer, maxima: Pointer, heads: u32, kv_heads: u32,
        block_size: u32, window: u32, scale: f32, share: f32,
    }
    DrawParams { row: u32, top_k: u32, temperature: f32, top_p: f32, min_p: f32, uniform: f32 }
    SampleParams { logits: Pointer, draws: Pointer, tokens: Pointer, vocab: u32, pad: u32 }
}

impl Part {
    /// As a kernel takes it: null for no memory.
    pub(super) fn pointer(self) -> Pointer {
        self.address
    }
}
