// What decode attention goes over: the slots of a token's row, and where they lie.
#pragma once
#include "common.cuh"

// Consecutive tokens of one row.
struct Item {
    uint32_t token;  // its first token, among those that run the sublayer
    uint32_t row;    // or NO_ROW
    uint32_t first;  // index of that token among the row's
    uint32_t len;    // tokens
};

// The slots of a row that were packed (pruned.cuh), the first ones.
struct Packed {
    uint32_t channels[2];  // which channels of keys they have, [layers, kv_heads, kept] bytes: the address's low and high word
    uint32_t slots, kept;  // how many, and channels of their keys; 0 where there are none
    uint32_t saved;        // pages that the slots would take less their own
};

struct AttentionParams {
    const bf16 *q;          // [tokens, heads, head_dim]
    bf16 *out;              // [tokens, heads, head_dim]
    const bf16 *pages;      // see place.cuh
    const Item *items;
    const uint32_t *kv_len; // [rows]: slots held before the step, in this layer
    const uint32_t *starts; // [rows]: where its pages begin in `tables`, less `saved` where slots are packed
    const uint32_t *tables;
    const Packed *packed;   // [rows]
    float *parts;           // [items, kv heads, 16-head groups, splits, heads of the group, head_dim + 2], where splits > 1
    uint32_t *done;         // [items, kv heads, groups]: blocks that have finished; zero between launches
    uint32_t heads, kv_heads, block_size, window;  // a window of 0 sees all
    float scale;            // times log2(e)
    uint32_t layer;
};

// Units of sixteen slots that make another block worth it.
constexpr unsigned DECODE_UNITS = 8;

// Values that lie side by side, but for pages: from the `cut`th on they are another page's.
struct Run {
    const bf16 *first, *second;
    uint32_t cut;

    DEVICE const bf16 *at(uint32_t i) const { return (i < cut ? first : second) + i; }
};

// Where a packed unit lies: its first line in the first of its pages, and the pages.
struct PackedPlace {
    uint32_t line, first, second;
};

// Where a block of decode attention is: which item, which of `kv_heads * ceil(group / 16)` groups of heads, and which of
// the `splits` of its slots.
struct DecodePlace {
    uint32_t item, head_group, split, splits;
};

// The attention of one token by the query heads of a group, as far as the step's tables tell it.
struct Attended {
    Item item;
    uint32_t kv_head, head0, heads;  // the first of its query heads, and how many
    uint32_t held, begin, end;       // slots held before the step, and those that are seen
    uint32_t packed, kept, saved;    // units that are packed, channels of their keys, and pages that this saves
    uint32_t start;                  // where the pages begin, less those saved
    const uint32_t *tables;
    const unsigned char *channels;   // of packed keys

    // Reads what no kernel of the step writes. False where the token is padding. Only where `PACKED` rows may have packed
    // slots.
    template <bool PACKED>
    DEVICE bool read(const AttentionParams &p, uint32_t index, uint32_t head_group) {
        item = load_global<Item>(p.items + index);
        if (item.row == NO_ROW) return false;
        const uint32_t group = p.heads / p.kv_heads, tiles = (group + 15) / 16, tile = head_group % tiles;
        kv_head = head_group / tiles;
        head0 = kv_head * group + tile * 16, heads = min(16u, group - tile * 16);
        held = load_global<uint32_t>(p.kv_len + item.row);
        tables = p.tables, start = load_global<uint32_t>(p.starts + item.row);
        packed = 0;
        if (PACKED) read_packed(p);
        end = held + item.first + 1;
        begin = p.window != 0 && end > p.window ? end - p.window : 0;
        return true;
    }
    DEVICE void read_packed(const AttentionParams &p) {
        const Packed *own = p.packed + item.row;
        const uint32_t slots = load_global<uint32_t>(&own->slots);
        if (slots == 0 || held < slots) return;
        packed = slots / 16, kept = load_global<uint32_t>(&own->kept), saved = load_global<uint32_t>(&own->saved);
        const uint64_t low = load_global<uint32_t>(own->channels), high = load_global<uint32_t>(own->channels + 1);
        channels = reinterpret_cast<const unsigned char *>(low | high << 32) +
                   static_cast<size_t>(p.layer * p.kv_heads + kv_head) * kept;
    }
    DEVICE uint32_t units() const { return (end + 15) / 16 - begin / 16; }
    // Blocks that share the slots: few slots are not worth many, for what joins them costs more.
    DEVICE uint32_t shared_by(uint32_t most) const { return min(most, (units() + DECODE_UNITS - 1) / DECODE_UNITS); }

    // The page of dense slots `index * block_size` and on. Words wrap around where pages are saved.
    DEVICE uint32_t page_at(uint32_t index) const { return load_global<uint32_t>(tables + static_cast<uint32_t>(start + index)); }

    // Where packed unit `unit` lies: its lines are fewer than a page's, so that it lies in two pages at most.
    template <int D>
    DEVICE PackedPlace packed_place(const AttentionParams &p, uint32_t unit) const {
        const uint32_t lines = p.kv_heads * (kept + D), page_lines = p.kv_heads * D * p.block_size / 8, first = unit * lines;
        PackedPlace place = {first % page_lines, page_at(saved + first / page_lines), 0};
        place.second = place.line + lines > page_lines ? page_at(saved + first / page_lines + 1) : place.first;
        return place;
    }
    // Keys of the block's KV head at such a place, then values.
    template <int D>
    DEVICE Run packed_keys(const AttentionParams &p, PackedPlace place) const {
        return packed_run<D>(p, place, kv_head * kept);
    }
    template <int D>
    DEVICE Run packed_values(const AttentionParams &p, PackedPlace place) const {
        return packed_run<D>(p, place, p.kv_heads * kept + kv_head * D);
    }
    template <int D>
    DEVICE Run packed_run(const AttentionParams &p, PackedPlace place, uint32_t skip) const {
        const uint32_t page_lines = p.kv_heads * D * p.block_size / 8, line = place.line + skip;
        const size_t values = static_cast<size_t>(page_lines) * 16;
        const bf16 *second = p.pages + place.second * values;
        if (line >= page_lines) return {second + (line - page_lines) * 16, nullptr, 0xFFFFFFFFu};
        const uint32_t cut = (page_lines - line) * 16;
        return {p.pages + place.first * values + line * 16, second - cut, cut};
    }

    // The channels that a lane's queries have for packed units.
    template <class Queries>
    DEVICE void load_channels(Queries &q) const {
        if (packed != 0) q.load_channels(channels, kept);
    }
    // For packed units, whose channels were loaded, or for others.
    template <class Queries>
    DEVICE void load_queries(Queries &q, const AttentionParams &p, bool pruned) const {
        const bf16 *own = p.q + (static_cast<size_t>(item.token) * p.heads + head0) * Queries::DIM;
        auto row = [&](uint32_t row) { return row < heads ? own + row * Queries::DIM : nullptr; };
        if (pruned) q.load_rows(row, kept);
        else q.load_rows(row);
    }
};
