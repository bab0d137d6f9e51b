// Closing the gaps that dropped tokens leave in the slots of sequences.
#pragma once
#include "common.cuh"

// What is kept of a sequence's slots in a layer.
struct KeptSlots {
    uint32_t table, kept;   // where its pages, and the slots that are kept, begin among the words
    uint32_t count, first;  // slots that are kept; the slot from which on all are counted
};

struct CompactParams {
    bf16 *pages;            // see place.cuh
    const uint32_t *words;  // the lists, then what they tell the places of
    uint32_t kv_heads, head_dim, block_size, pad;
};

// Slots that a thread moves at once.
constexpr uint32_t COMPACT_EACH = 4;

// Slot first + kept[i] becomes slot first + i. A block sixteen channels of the keys or the values of a head, for all slots
// of a list: the slots ascend and move towards the first one, so that what a round writes no later one reads.
KERNEL(compact, CompactParams, 256, 1) {
    lead();
    follow();
    const KeptSlots list = reinterpret_cast<const KeptSlots *>(p.words)[blockIdx.z];
    const uint32_t *table = p.words + list.table, *kept = p.words + list.kept;
    const uint32_t d = p.head_dim, head = blockIdx.y / 2;
    const bool values = blockIdx.y % 2 == 1;
    // Neighbouring threads have neighbours in memory.
    const uint32_t near = threadIdx.x % 16, far = threadIdx.x / 16;
    const uint32_t own = values ? near : far, channel = blockIdx.x * 16 + (values ? far : near);
    auto at = [&](uint32_t slot) -> bf16 * {
        const size_t half_page = static_cast<size_t>(p.kv_heads) * d * p.block_size;
        bf16 *page = p.pages + table[slot / p.block_size] * 2 * half_page;
        const uint32_t place = slot % p.block_size;
        if (values) return page + half_page + (head * d + channel) * p.block_size + place;
        return page + (head * p.block_size + place) * d + channel;
    };
    for (uint32_t round = 0; round < list.count; round += 16 * COMPACT_EACH) {
        bf16 moved[COMPACT_EACH] = {};
#pragma unroll
        for (uint32_t i = 0; i < COMPACT_EACH; i++) {
            const uint32_t slot = round + 16 * i + own;
            if (slot < list.count) moved[i] = *at(list.first + kept[slot]);
        }
        __syncthreads();
#pragma unroll
        for (uint32_t i = 0; i < COMPACT_EACH; i++) {
            const uint32_t slot = round + 16 * i + own;
            if (slot < list.count) *at(list.first + slot) = moved[i];
        }
        __syncthreads();
    }
}
