// Products with weights that come in levels (BitStack, arXiv 2410.23918): W = sum over l of S_l * (A_l B_l), where signs
// S are one bit each, A is [rows, rank] and B is [rank, cols] in f16, and `*` goes element by element.
//
// Weights are made where they are used: the tensor cores multiply a tile of A with one of B, the tile is rounded to bf16
// in registers, takes its signs from the bits of one word, and is the operand of the product with the activations, as it
// lies. So signs are all that memory brings in bulk, and a tile costs the same for two tokens as for eight. One token
// alone has a cheaper way (stack_one.cuh).
//
// A token uses the levels whose `from` is at most its own count of blocks; for those that it does not use its activations
// are zeros. What it adds up, and in which order, does not depend on the tokens beside it.
//
// A level in memory: signs, A, B, each in units of a warp's 32 sixteen-byte words, rows padded to 64, columns to 64 and
// the rank to 16 or 32 by zeros. With g = lane / 4 and t = lane % 4 a lane has
//   signs [rows / 64][cols / 64]: a word for each of four tiles of sixteen rows. It is set where a weight is negative: of
//     rows g and g + 8 the sixteen columns from 16 t on. Shifted left by 4 k + j it has the signs of the pair that is
//     operand j of k-step k in bits 15 and 31.
//   A [rows / 64][4 tiles][rank / 16]: the first operand of `mma_half`.
//   B [cols / 64][4 k-steps][rank / 16]: its second operand for two tiles of eight columns. In k-step k column i of tile h
//     is column 16 (i / 2) + 4 k + 2 h + i % 2 of the 64, so that a lane's columns are neighbours.
#pragma once
#include "skinny.cuh"

struct StackEntry {
    const uint4 *level;
    uint32_t from;  // the blocks of the model's stack that a token uses if it uses this level
    uint32_t pad;
};
struct StackPart {
    const StackEntry *entries;  // [levels], `from` rising from 0
    uint32_t levels, rows;
    uint32_t first_block;       // of the grid's
    uint32_t first_sum;         // of a token's sums
};
struct StackParams {
    const bf16 *x;           // [tokens, cols], cols a multiple of 8
    float *sums;             // [splits, tokens, width]
    const uint32_t *blocks;  // [step tokens]
    const uint32_t *index;   // [tokens]: where a token lies among the step's, or null
    uint32_t cols, tokens, width, count;
    Skips skips;
    StackPart parts[3];      // `count` of them
};

constexpr uint32_t STACK_WARPS = 8, STACK_THREADS = STACK_WARPS * 32, STACK_TILES = 4, STACK_GROUPS = 4;
// Words of a row of activations in a block's memory: it ends where the next one's banks begin.
constexpr uint32_t STACK_ROW = STACK_GROUPS * 8 + 1;
constexpr uint32_t SIGN_BITS = 0x80008000u;

// Where a level's arrays lie.
template <uint32_t UNITS>
struct StackLevel {
    const uint4 *signs, *left, *right;

    DEVICE StackLevel(const uint4 *level, uint32_t rows, uint32_t cols) {
        const uint32_t groups = (rows + 63) / 64, columns = (cols + 63) / 64;
        signs = level;
        left = signs + static_cast<size_t>(groups) * columns * 32;
        right = left + static_cast<size_t>(groups) * STACK_TILES * UNITS * 32;
    }
};

DEVICE const StackPart &stack_part(const StackPart (&parts)[3], uint32_t count, uint32_t block) {
    if (count > 2 && block >= parts[2].first_block) return parts[2];
    return count > 1 && block >= parts[1].first_block ? parts[1] : parts[0];
}


// A tile of sixteen rows and sixteen columns, without its signs: c[h] is that of eight columns.
template <uint32_t UNITS>
DEVICE void stack_tile(float (&c)[2][4], const uint4 (&a)[UNITS], const uint4 (&b)[UNITS]) {
#pragma unroll
    for (int i = 0; i < 4; i++) c[0][i] = 0.0f, c[1][i] = 0.0f;
#pragma unroll
    for (uint32_t unit = 0; unit < UNITS; unit++) {
        const uint4 v = a[unit], w = b[unit];
        mma_half(c[0], {v.x, v.y, v.z, v.w}, {w.x, w.y});
        mma_half(c[1], {v.x, v.y, v.z, v.w}, {w.z, w.w});
    }
}

// The products of one chunk of columns, `groups` sixty-fours, of one level, from the block's memory.
template <uint32_t TILES, uint32_t UNITS>
DEVICE void stack_chunk(float (&sums)[STACK_TILES][TILES][4], const uint4 *signs, const uint4 *left, const uint4 *right,
                        const uint4 *x, uint32_t groups) {
    uint4 a[STACK_TILES][UNITS];
#pragma unroll
    for (uint32_t i = 0; i < STACK_TILES * UNITS; i++) a[i / UNITS][i % UNITS] = left[i * 32];
    for (uint32_t group = 0; group < groups; group++) {
        const uint4 bits = signs[group * 32];
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            uint4 v[TILES];
#pragma unroll
            for (uint32_t tile = 0; tile < TILES; tile++) v[tile] = x[tile * 8 * STACK_ROW + group * 8 + half];
#pragma unroll
            for (uint32_t k = 2 * half; k < 2 * half + 2; k++) {
                uint4 b[UNITS];
#pragma unroll
                for (uint32_t unit = 0; unit < UNITS; unit++) b[unit] = right[((group * 4 + k) * UNITS + unit) * 32];
#pragma unroll
                for (uint32_t i = 0; i < STACK_TILES; i++) {
                    float c[2][4];
                    stack_tile<UNITS>(c, a[i], b);
                    const uint32_t word = word_of(bits, i) << 4 * k;
                    const uint32_t w[4] = {
                        pack(c[0][0], c[0][1]) ^ (word & SIGN_BITS), pack(c[0][2], c[0][3]) ^ (word << 1 & SIGN_BITS),
                        pack(c[1][0], c[1][1]) ^ (word << 2 & SIGN_BITS), pack(c[1][2], c[1][3]) ^ (word << 3 & SIGN_BITS)};
#pragma unroll
                    for (uint32_t tile = 0; tile < TILES; tile++)
                        if (k % 2 == 0) mma(sums[i][tile], w, {v[tile].x, v[tile].y});
                        else mma(sums[i][tile], w, {v[tile].z, v[tile].w});
                }
            }
        }
    }
}

// What a block brings to its memory, ahead of the products: twice, to fill one while the other is used.
template <uint32_t TILES, uint32_t UNITS>
struct StackMemory {
    static constexpr uint32_t LEFT = STACK_WARPS * STACK_TILES * UNITS * 32, SIGNS = STACK_WARPS * STACK_GROUPS * 32;
    static constexpr uint32_t RIGHT = STACK_GROUPS * 4 * UNITS * 32, X = TILES * 8 * STACK_ROW;
    uint4 *left, *signs, *right, *x, *end;

    DEVICE explicit StackMemory(uint4 *memory) {
        left = memory, signs = left + 2 * LEFT, right = signs + 2 * SIGNS, x = right + 2 * RIGHT, end = x + 2 * X;
    }
};

// A block's share of a product: 512 rows of a part (blockIdx.x) and some chunks of the columns (blockIdx.y). Unit u of its
// work is a chunk of a level: all its chunks of the first level, then those of the next.
template <uint32_t TILES, uint32_t UNITS>
struct StackBlock {
    using Memory = StackMemory<TILES, UNITS>;
    const StackParams &p;
    const StackPart &part;
    const Memory memory;
    uint32_t warp, lane, group, columns, begin, own, blocks, units;
    bool has;

    DEVICE StackBlock(const StackParams &params, uint4 *start)
        : p(params), part(stack_part(params.parts, params.count, blockIdx.x)), memory(start) {
        warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        group = (blockIdx.x - part.first_block) * STACK_WARPS + warp;
        has = group < (part.rows + 63) / 64;
        columns = (p.cols + 63) / 64;
        const uint32_t chunks = (columns + STACK_GROUPS - 1) / STACK_GROUPS;
        begin = blockIdx.y * chunks / gridDim.y, own = (blockIdx.y + 1) * chunks / gridDim.y - begin;
        // A lane knows the blocks of one token.
        blocks = lane < p.tokens ? p.blocks[p.index != nullptr ? p.index[lane] : lane] : 0;
        uint32_t most = blocks, levels = 0;
#pragma unroll
        for (int bit = 1; bit < 32; bit *= 2) most = max(most, __shfl_xor_sync(FULL, most, bit));
        while (levels < part.levels && part.entries[levels].from <= most) levels++;
        units = levels * own;
    }
    // Sixty-fours of columns of unit `u`.
    DEVICE uint32_t width(uint32_t u) const { return min(STACK_GROUPS, columns - STACK_GROUPS * (begin + u % own)); }

    DEVICE void bring_weights(uint32_t u) const {
        const uint32_t number = u / own, chunk = begin + u % own, at = u % 2, count = width(u);
        const StackLevel<UNITS> level(part.entries[number].level, part.rows, p.cols);
        if (has) {
            const uint4 *signs = level.signs + (static_cast<size_t>(group) * columns + STACK_GROUPS * chunk) * 32 + lane;
            uint4 *to = memory.signs + at * Memory::SIGNS + warp * STACK_GROUPS * 32 + lane;
            for (uint32_t i = 0; i < count; i++) copy_async(to + i * 32, signs + i * 32);
            const uint4 *left = level.left + static_cast<size_t>(group) * STACK_TILES * UNITS * 32 + lane;
            to = memory.left + number % 2 * Memory::LEFT + warp * STACK_TILES * UNITS * 32 + lane;
            if (u % own == 0)
                for (uint32_t i = 0; i < STACK_TILES * UNITS; i++) copy_async(to + i * 32, left + i * 32);
        }
        const uint4 *right = level.right + static_cast<size_t>(chunk) * Memory::RIGHT;
        for (uint32_t i = threadIdx.x; i < count * 4 * UNITS * 32; i += STACK_THREADS)
            copy_async(memory.right + at * Memory::RIGHT + i, right + i);
    }
    // Activations; zeros past the columns and of tokens that do not use the level.
    DEVICE void bring_x(uint32_t u) const {
        const uint32_t from = part.entries[u / own].from, column = (begin + u % own) * STACK_GROUPS * 64 + lane * 8;
#pragma unroll
        for (uint32_t i = 0; i < TILES; i++) {
            const uint32_t token = warp + 8 * i, allowed = __shfl_sync(FULL, blocks, token);
            uint4 *to = memory.x + u % 2 * Memory::X + token * STACK_ROW + lane;
            if (token < p.tokens && from <= allowed && column < p.cols)
                copy_async(to, p.x + static_cast<size_t>(token) * p.cols + column);
            else
                *to = make_uint4(0, 0, 0, 0);
        }
    }
    // Says whether there is anything to do: all tokens may leave the FFN out.
    DEVICE bool begin_first() const {
        bring_weights(0);
        follow();
        const bool runs = !p.skips.all();
        if (runs) bring_x(0);
        commit_copies();
        if (!runs) wait_copies<0>();
        return runs;
    }
    // Unit `u` is there, and the next one on its way.
    DEVICE void turn(uint32_t u) const {
        wait_copies<0>();
        __syncthreads();
        if (u + 1 < units) bring_weights(u + 1), bring_x(u + 1);
        commit_copies();
    }
    // The warp's own, of unit `u`.
    DEVICE const uint4 *left(uint32_t u) const {
        return memory.left + u / own % 2 * Memory::LEFT + warp * STACK_TILES * UNITS * 32 + lane;
    }
    DEVICE const uint4 *signs(uint32_t u) const {
        return memory.signs + u % 2 * Memory::SIGNS + warp * STACK_GROUPS * 32 + lane;
    }
    DEVICE const uint4 *right(uint32_t u) const { return memory.right + u % 2 * Memory::RIGHT + lane; }
    DEVICE const uint4 *x(uint32_t u) const { return memory.x + u % 2 * Memory::X; }
    // Where the sums of a token begin.
    DEVICE float *sums(uint32_t token) const {
        return p.sums + (static_cast<size_t>(blockIdx.y) * p.tokens + token) * p.width + part.first_sum + group * 64;
    }
};

// Up to 8 `TILES` tokens.
template <uint32_t TILES, uint32_t UNITS>
DEVICE void stack_few(const StackParams &p) {
    lead();
    SHARED(uint4, memory);
    const StackBlock<TILES, UNITS> block(p, memory);
    const uint32_t g = block.lane / 4, t = block.lane % 4;
    float sums[STACK_TILES][TILES][4] = {};
    if (!block.begin_first()) return;
    for (uint32_t u = 0; u < block.units; u++) {
        block.turn(u);
        if (!block.has) continue;
        const uint4 *x = block.x(u) + g * STACK_ROW + t * 2;
        stack_chunk<TILES, UNITS>(sums, block.signs(u), block.left(u), block.right(u), x, block.width(u));
    }
    if (!block.has) return;
#pragma unroll
    for (uint32_t i = 0; i < STACK_TILES; i++)
#pragma unroll
        for (uint32_t j = 0; j < TILES * 4; j++) {
            const uint32_t token = j / 4 * 8 + 2 * t + j % 2;
            if (token < p.tokens) block.sums(token)[i * 16 + g + j % 4 / 2 * 8] = sums[i][j / 4][j % 4];
        }
}

KERNEL(stack_8, StackParams, STACK_THREADS, 2) { stack_few<1, 1>(p); }
KERNEL(stack_32, StackParams, STACK_THREADS, 1) { stack_few<4, 1>(p); }
KERNEL(stack_8_deep, StackParams, STACK_THREADS, 1) { stack_few<1, 2>(p); }
KERNEL(stack_32_deep, StackParams, STACK_THREADS, 1) { stack_few<4, 2>(p); }

struct StackJoinParams {
    const float *sums;  // [splits, tokens, width]
    uint32_t splits, tokens, width;
    uint32_t eights;    // two parts whose rows alternate in eights; else one part follows the other
    uint32_t rows[2];   // of the first two parts
    uint32_t first[3];  // of the parts' sums
    uint32_t pad;
    SkinnyParams skinny;
};

// Where the sum of joint row `row` lies among a token's.
DEVICE uint32_t stack_sum_of(const StackJoinParams &p, uint32_t row) {
    if (p.eights != 0) return p.first[row % 16 / 8] + row / 16 * 8 + row % 8;
    if (row < p.rows[0]) return p.first[0] + row;
    row -= p.rows[0];
    return row < p.rows[1] ? p.first[1] + row : p.first[2] + row - p.rows[1];
}

// Adds up the shares of a token's outputs, and its bias; a thread has an output and the eighth after it.
template <class Epilogue>
DEVICE void stack_join(const StackJoinParams &p) {
    lead();
    follow();
    if (p.skinny.skips.all()) return;
    const uint32_t pair = blockIdx.x * STACK_THREADS + threadIdx.x, token = blockIdx.y, row = pair / 8 * 16 + pair % 8;
    if (row >= p.skinny.rows) return;
    const bool second = row + 8 < p.skinny.rows;
    const float *sums = p.sums + static_cast<size_t>(token) * p.width;
    const float *first = sums + stack_sum_of(p, row), *last = sums + stack_sum_of(p, second ? row + 8 : row);
    float a = 0.0f, b = 0.0f;
    // Sixteen shares are under way at once.
    for (uint32_t base = 0; base < p.splits; base += 16) {
        float x[16], y[16];
#pragma unroll
        for (uint32_t i = 0; i < 16; i++) {
            const bool there = base + i < p.splits;
            const size_t at = static_cast<size_t>(there ? base + i : 0) * p.tokens * p.width;
            x[i] = there ? first[at] : 0.0f, y[i] = there ? last[at] : 0.0f;
        }
#pragma unroll
        for (uint32_t i = 0; i < 16; i++) a += x[i], b += y[i];
    }
    if (p.skinny.bias != nullptr) a += p.skinny.bias[row], b += second ? p.skinny.bias[row + 8] : 0.0f;
    const uint32_t step_token = p.skinny.index != nullptr ? p.skinny.index[token] : token;
    Epilogue::pair(p.skinny, token, step_token, row, a, b);
}

KERNEL(stack_join_place, StackJoinParams, STACK_THREADS, 1) { stack_join<Place>(p); }
KERNEL(stack_join_half, StackJoinParams, STACK_THREADS, 1) { stack_join<StoreHalf>(p); }
KERNEL(stack_join_float, StackJoinParams, STACK_THREADS, 1) { stack_join<StoreFloat>(p); }
KERNEL(stack_join_gate, StackJoinParams, STACK_THREADS, 1) { stack_join<Gate>(p); }
KERNEL(stack_join_add, StackJoinParams, STACK_THREADS, 1) { stack_join<AddFloat>(p); }

struct StackWholeParams {
    bf16 *out;             // [joint rows, cols]
    uint32_t blocks, cols;
    uint32_t eights;       // as in StackJoinParams
    uint32_t count;
    StackPart parts[3];    // `first_sum` is the first of the part's joint rows; `first_block` is of blocks of 128 rows
};

// The levels that `blocks` blocks have of a matrix, added up: 128 rows (blockIdx.x), 64 columns (blockIdx.y).
template <uint32_t UNITS>
DEVICE void stack_whole(const StackWholeParams &p) {
    lead();
    follow();
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const StackPart &part = stack_part(p.parts, p.count, blockIdx.x);
    const uint32_t tile = (blockIdx.x - part.first_block) * STACK_WARPS + warp, group = tile / STACK_TILES;
    const uint32_t columns = (p.cols + 63) / 64, column = blockIdx.y;
    if (tile * 16 >= part.rows) return;
    float sums[4][2][4] = {};
    for (uint32_t number = 0; number < part.levels; number++) {
        const StackEntry entry = part.entries[number];
        if (entry.from > p.blocks) break;
        const StackLevel<UNITS> level(entry.level, part.rows, p.cols);
        const uint4 *signs = level.signs + (static_cast<size_t>(group) * columns + column) * 32 + lane;
        const uint32_t bits = reinterpret_cast<const uint32_t *>(signs)[tile % STACK_TILES];
        uint4 a[UNITS], b[UNITS];
#pragma unroll
        for (uint32_t unit = 0; unit < UNITS; unit++)
            a[unit] = level.left[(static_cast<size_t>(tile) * UNITS + unit) * 32 + lane];
#pragma unroll
        for (uint32_t k = 0; k < 4; k++) {
#pragma unroll
            for (uint32_t unit = 0; unit < UNITS; unit++)
                b[unit] = level.right[((static_cast<size_t>(column) * 4 + k) * UNITS + unit) * 32 + lane];
            float c[2][4];
            stack_tile<UNITS>(c, a, b);
#pragma unroll
            for (uint32_t i = 0; i < 8; i++) {
                const uint32_t flip = bits << (4 * k + i / 2 + (i % 2 == 0 ? 16 : 0)) & 0x80000000u;
                sums[k][i / 4][i % 4] += __uint_as_float(__float_as_uint(c[i / 4][i % 4]) ^ flip);
            }
        }
    }
    const uint32_t first = column * 64 + t * 16;
    if (first >= p.cols) return;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        const uint32_t row = tile * 16 + g + 8 * half;
        if (row >= part.rows) continue;
        const uint32_t joint = p.eights != 0 ? row / 8 * 16 + row % 8 + part.first_sum : row + part.first_sum;
        uint4 *out = reinterpret_cast<uint4 *>(p.out + static_cast<size_t>(joint) * p.cols + first);
        uint32_t w[8];
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) w[i] = pack(sums[i / 2][i % 2][2 * half], sums[i / 2][i % 2][2 * half + 1]);
        out[0] = make_uint4(w[0], w[1], w[2], w[3]);
        out[1] = make_uint4(w[4], w[5], w[6], w[7]);
    }
}

KERNEL(stack_whole, StackWholeParams, STACK_THREADS, 2) { stack_whole<1>(p); }
KERNEL(stack_whole_deep, StackWholeParams, STACK_THREADS, 2) { stack_whole<2>(p); }
