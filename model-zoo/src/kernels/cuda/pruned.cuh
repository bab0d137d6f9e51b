// Keys of which only some channels are kept (ThinK, arXiv 2407.21018): the sums that choose the channels, and the moves of
// pages.
//
// Packed pages are one stream of lines of sixteen values, in which sixteen slots take kv_heads * (kept + head_dim) lines:
// keys as [kv_heads, 16 slots, kept], then values as [kv_heads, head_dim, 16 slots]. A line never lies across pages; a
// head's lines may.
#pragma once
#include "common.cuh"

// Tokens of a row whose queries are looked at.
struct Observed {
    uint32_t first;  // the first, among those that run the layer's attention
    uint32_t count;
    uint32_t place;  // of the row's sums
    uint32_t pad;
};

struct ObserveParams {
    const bf16 *q;          // [tokens, heads, head_dim]
    const Observed *items;
    float *sums;            // [places, layers, kv_heads, head_dim]
    uint32_t heads, kv_heads, head_dim, layer, layers, pad;
};

// sums = the sum of q^2 over the item's tokens, by the mean of the heads that share a KV head. A block a KV head and item.
KERNEL(observe, ObserveParams, 128, 1) {
    lead();
    follow();
    const Observed item = p.items[blockIdx.y];
    const uint32_t group = p.heads / p.kv_heads, d = p.head_dim;
    float *sums = p.sums + ((static_cast<size_t>(item.place) * p.layers + p.layer) * p.kv_heads + blockIdx.x) * d;
    for (uint32_t c = threadIdx.x; c < d; c += blockDim.x) {
        float sum = 0.0f;
        for (uint32_t i = 0; i < item.count; i++)
            for (uint32_t head = 0; head < group; head++) {
                const size_t at = static_cast<size_t>(item.first + i) * p.heads + blockIdx.x * group + head;
                const float q = to_float(p.q[at * d + c]);
                sum += q * q;
            }
        sums[c] = sum / group;
    }
}

struct KeySquaresParams {
    const bf16 *pages;      // see place.cuh
    const uint32_t *tables; // [lists, list]
    float *out;             // [lists, kv_heads, head_dim]
    uint32_t list, slots, kv_heads, head_dim, block_size, pad;
};

// out = the sum of k^2 over the first `slots` slots of a list of pages. A block a KV head and list, whose threads share the
// slots of each channel; head_dim is 256 at most.
KERNEL(key_squares, KeySquaresParams, 256, 1) {
    lead();
    follow();
    SHARED(float, parts);  // [threads]
    const uint32_t d = p.head_dim, shares = blockDim.x / d, share = threadIdx.x / d, c = threadIdx.x % d;
    const uint32_t *table = p.tables + blockIdx.y * p.list;
    float sum = 0.0f;
    for (uint32_t slot = share; share < shares && slot < p.slots; slot += shares) {
        const size_t page = table[slot / p.block_size];
        const size_t key = (page * 2 * p.kv_heads + blockIdx.x) * p.block_size + slot % p.block_size;
        const float k = to_float(p.pages[key * d + c]);
        sum += k * k;
    }
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (share != 0) return;
    for (uint32_t other = 1; other < shares; other++) sum += parts[other * d + c];
    p.out[(blockIdx.y * p.kv_heads + blockIdx.x) * d + c] = sum;
}

// A page whose slots are packed.
struct PackMove {
    uint32_t source, first, layer;  // the page, its first slot, its layer
    uint32_t to[2];                 // the packed pages that its lines go to
};

struct PackParams {
    bf16 *pages;
    bf16 *lines;                    // [moves, lines of a page's slots, 16]
    const PackMove *moves;
    const unsigned char *channels;  // [layers, kv_heads, kept]
    uint32_t kept, kv_heads, head_dim, block_size;

    DEVICE uint32_t group_lines() const { return kv_heads * (kept + head_dim); }
    DEVICE uint32_t num_lines() const { return block_size / 16 * group_lines(); }
    DEVICE size_t page_values() const { return static_cast<size_t>(2) * kv_heads * head_dim * block_size; }
};

// The lines of each move, from its page: a value a thread, blocks in x share a move.
KERNEL(pack_read, PackParams, 256, 1) {
    lead();
    follow();
    const PackMove &move = p.moves[blockIdx.y];
    const bf16 *page = p.pages + move.source * p.page_values(), *values = page + p.page_values() / 2;
    const unsigned char *channels = p.channels + static_cast<size_t>(move.layer) * p.kv_heads * p.kept;
    const uint32_t all = p.num_lines() * 16, d = p.head_dim, keys = p.kv_heads * p.kept * 16;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < all; i += gridDim.x * blockDim.x) {
        const uint32_t group = i / (p.group_lines() * 16), at = i % (p.group_lines() * 16);
        bf16 value;
        if (at < keys) {
            const uint32_t head = at / (p.kept * 16), slot = group * 16 + at / p.kept % 16;
            const uint32_t channel = channels[head * p.kept + at % p.kept];
            value = page[(head * p.block_size + slot) * d + channel];
        } else {
            const uint32_t row = (at - keys) / 16;
            value = values[row * p.block_size + group * 16 + at % 16];
        }
        p.lines[static_cast<size_t>(blockIdx.y) * all + i] = value;
    }
}

// The lines of each move, to their packed pages: eight values a thread.
KERNEL(pack_write, PackParams, 256, 1) {
    lead();
    follow();
    const PackMove &move = p.moves[blockIdx.y];
    const uint32_t halves = p.num_lines() * 2, page_lines = static_cast<uint32_t>(p.page_values() / 16);
    const uint32_t first = move.first / 16 * p.group_lines(), skipped = first / page_lines * page_lines;
    const uint4 *lines = reinterpret_cast<const uint4 *>(p.lines) + static_cast<size_t>(blockIdx.y) * halves;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < halves; i += gridDim.x * blockDim.x) {
        const uint32_t line = first - skipped + i / 2;
        bf16 *page = p.pages + move.to[line / page_lines] * p.page_values();
        *reinterpret_cast<uint4 *>(page + line % page_lines * 16 + i % 2 * 8) = lines[i];
    }
}
