// Where queries, keys and values of a token go.
#pragma once
#include "common.cuh"

// Heads lie in tile order: channels 16 T + j and 16 T + 8 + j, j < 8, are the pair that RoPE turns by frequency 8 T + j.
// A page holds K as [kv_heads, block_size, head_dim] and V as [kv_heads, head_dim, block_size].
struct PlaceParams {
    bf16 *q;                // [tokens, heads * head_dim]
    bf16 *pages;
    const float2 *table;    // cos and sin, [step tokens, head_dim / 2]
    const uint32_t *rows;   // [step tokens]: its row, or NO_ROW
    const uint32_t *within; // [step tokens]: its index among the row's tokens
    const uint32_t *kv_len; // [rows]: slots held before the step, in this layer
    const uint32_t *starts; // [rows]: where its pages begin in `tables`, in this layer (see decode.cuh)
    const uint32_t *tables;
    uint32_t heads, kv_heads, head_dim, block_size;
};

// Where the keys and values of a token lie: its page and the slot in it. No page where the token is padding.
struct PlaceTarget {
    bf16 *page;
    uint32_t slot;
};

DEVICE PlaceTarget place_target(const PlaceParams &p, uint32_t step_token) {
    const uint32_t owner = p.rows[step_token];
    if (owner == NO_ROW) return {nullptr, 0};
    const uint32_t slot = p.kv_len[owner] + p.within[step_token];
    // Where slots begin that were packed, the list begins as if they were not, maybe before word 0: words wrap around.
    const uint32_t page = p.tables[static_cast<uint32_t>(p.starts[owner] + slot / p.block_size)];
    return {p.pages + static_cast<size_t>(page) * 2 * p.kv_heads * p.head_dim * p.block_size, slot % p.block_size};
}

// By which output `row` and its partner turn: (1, 0) for values.
DEVICE float2 place_turn(const PlaceParams &p, uint32_t step_token, uint32_t row) {
    const uint32_t d = p.head_dim, channel = row % d;
    if (row >= (p.heads + p.kv_heads) * d) return make_float2(1.0f, 0.0f);
    return p.table[step_token * (d / 2) + channel / 16 * 8 + channel % 16];
}

// `first` and `second` are outputs `row` and `row + 8` of the joint Q, K, V product, a tile's j-th pair.
DEVICE void place_pair(const PlaceParams &p, PlaceTarget target, float2 turn, uint32_t token, uint32_t row, float first,
                       float second) {
    const uint32_t d = p.head_dim, q_width = p.heads * d, kv_width = p.kv_heads * d;
    const float turned = first * turn.x - second * turn.y;
    second = second * turn.x + first * turn.y;
    first = turned;
    if (row < q_width) {
        bf16 *q = p.q + static_cast<size_t>(token) * q_width + row;
        q[0] = to_bf16(first);
        q[8] = to_bf16(second);
        return;
    }
    if (target.page == nullptr) return;
    row -= q_width;
    if (row < kv_width) {
        bf16 *k = target.page + (row / d * p.block_size + target.slot) * d + row % d;
        k[0] = to_bf16(first);
        k[8] = to_bf16(second);
    } else {
        bf16 *v = target.page + static_cast<size_t>(row) * p.block_size + target.slot;
        v[0] = to_bf16(first);
        v[8 * p.block_size] = to_bf16(second);
    }
}
