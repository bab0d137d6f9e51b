// The next token of each row from its logits.
//
// The order is the CPU sampler's: temperature, min_p, top_k, top_p, draw. Kept tokens are those above a threshold that
// bisection finds on the bits of their weights, which order as the weights do, plus of those at the threshold the ones
// of lowest id. The draw goes through kept tokens by id. Sums are taken in a fixed order.
#pragma once
#include "common.cuh"

constexpr uint32_t BAD_LOGITS = 0xFFFFFFFFu;

// How one row is drawn.
struct Draw {
    uint32_t row;            // its logits
    uint32_t top_k;          // 0 for all
    float temperature;       // 0 takes the likeliest
    float top_p, min_p;
    float uniform;           // in [0, 1)
};

struct SampleParams {
    const float *logits;  // [rows, vocab]
    const Draw *draws;    // one a block
    uint32_t *tokens;     // one a block; BAD_LOGITS where logits are not numbers
    uint32_t vocab, pad;
};

constexpr unsigned SAMPLE_THREADS = 1024;

struct Best {
    float value;
    uint32_t id;
};

// The larger value, of equals the lower id.
DEVICE Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a; }

// Sums over the block of a count and a mass.
struct Mass {
    float mass;
    uint32_t count;
};

DEVICE Mass block_mass(Mass own, float *scratch) {
    uint32_t *counts = reinterpret_cast<uint32_t *>(scratch + 32);
    own.mass = lanes_sum<1, 32>(own.mass);
    for (int bit = 1; bit < 32; bit *= 2) own.count += __shfl_xor_sync(FULL, own.count, bit);
    const uint32_t warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) scratch[warp] = own.mass, counts[warp] = own.count;
    __syncthreads();
    Mass all = {0.0f, 0};
    for (uint32_t w = 0; w < SAMPLE_THREADS / 32; w++) all.mass += scratch[w], all.count += counts[w];
    __syncthreads();
    return all;
}

// The row's weights, and which of them are kept.
struct Kept {
    const float *logits;
    uint32_t vocab;
    float max, scale, least;  // weights below `least` are left out (min_p)
    uint32_t above;           // bits of a weight: heavier ones are kept
    uint32_t ties;            // and so many of exactly that weight, those of lowest id

    DEVICE float weight(uint32_t id) const {
        const float w = expf((logits[id] - max) * scale);
        return w >= least ? w : 0.0f;
    }

    // Count and mass of the weights from `bits` on (and above 0), over the block.
    DEVICE Mass from(uint32_t bits, float *scratch) const {
        Mass own = {0.0f, 0};
        for (uint32_t id = threadIdx.x; id < vocab; id += SAMPLE_THREADS) {
            const float w = weight(id);
            if (w > 0.0f && __float_as_uint(w) >= bits) own.mass += w, own.count++;
        }
        return block_mass(own, scratch);
    }

    // The heaviest bits from which `enough` holds, which it does from 1 on.
    template <class Enough>
    DEVICE uint32_t bisect(Enough enough, float *scratch) const {
        uint32_t low = 1, high = 0x3F800001u;  // weights are at most 1
        while (high - low > 1) {
            const uint32_t middle = low + (high - low) / 2;
            if (enough(from(middle, scratch))) low = middle;
            else high = middle;
        }
        return low;
    }
};

KERNEL(sample, SampleParams, SAMPLE_THREADS, 1) {
    lead();
    follow();
    SHARED(float, scratch);  // 32 floats, 32 counts, then one of each a thread
    const Draw draw = p.draws[blockIdx.x];
    const float *logits = p.logits + static_cast<size_t>(draw.row) * p.vocab;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Best best = {-INFINITY, 0};
    uint32_t bad = 0;
    auto look = [&](uint32_t id, float value) {
        bad |= value != value;
        best = better(best, {value, id});
    };
    // By fours where rows lie so; a thread sees ids in rising order either way.
    const uint32_t fours = p.vocab % 4 == 0 ? p.vocab / 4 : 0;
#pragma unroll 8
    for (uint32_t four = threadIdx.x; four < fours; four += SAMPLE_THREADS) {
        const float4 v = load<float4>(logits + 4 * four);
        look(4 * four, v.x), look(4 * four + 1, v.y), look(4 * four + 2, v.z), look(4 * four + 3, v.w);
    }
    for (uint32_t id = 4 * fours + threadIdx.x; id < p.vocab; id += SAMPLE_THREADS) look(id, logits[id]);
    for (int bit = 1; bit < 32; bit *= 2) {
        bad |= __shfl_xor_sync(FULL, bad, bit);
        const float value = __shfl_xor_sync(FULL, best.value, bit);
        const uint32_t id = __shfl_xor_sync(FULL, best.id, bit);
        best = better(best, {value, id});
    }
    uint32_t *ids = reinterpret_cast<uint32_t *>(scratch + 32), *bads = ids + 32;
    if (lane == 0) scratch[warp] = best.value, ids[warp] = best.id, bads[warp] = bad;
    __syncthreads();
    for (uint32_t w = 0; w < SAMPLE_THREADS / 32; w++) best = better(best, {scratch[w], ids[w]}), bad |= bads[w];
    __syncthreads();
    if (bad || !(best.value > -INFINITY) || best.value == INFINITY || draw.temperature == 0.0f) {
        const bool usable = !bad && best.value > -INFINITY && (draw.temperature == 0.0f || best.value < INFINITY);
        if (threadIdx.x == 0) p.tokens[blockIdx.x] = usable ? best.id : BAD_LOGITS;
        return;
    }
    Kept kept = {logits, p.vocab, best.value, 1.0f / draw.temperature, draw.min_p, 0, 0};
    if (draw.top_k > 0 || draw.top_p < 1.0f) {
        uint32_t floor = 1, ties = 0xFFFFFFFFu;
        Mass all = kept.from(1, scratch);
        if (draw.top_k > 0 && draw.top_k < all.count) {
            floor = kept.bisect([&](Mass m) { return m.count >= draw.top_k; }, scratch);
            const Mass heavier = kept.from(floor + 1, scratch);
            ties = draw.top_k - heavier.count;
            all.mass = heavier.mass + ties * __uint_as_float(floor);
        }
        if (draw.top_p < 1.0f) {
            const float target = all.mass * draw.top_p;
            // From the floor of top_k on, more than top_k tokens may be counted: those count no more than theirs.
            const uint32_t own = kept.bisect([&](Mass m) { return m.mass >= target; }, scratch);
            if (own >= floor) {
                const Mass heavier = kept.from(own + 1, scratch);
                float need = ceilf((target - heavier.mass) / __uint_as_float(own));
                const uint32_t least = heavier.count == 0 ? 1 : 0;
                const uint32_t wanted = need > 0.0f ? max(static_cast<uint32_t>(need), least) : least;
                ties = own > floor ? wanted : min(ties, wanted);
                floor = own;
            }
        }
        kept.above = floor;
        kept.ties = ties;
    }
    // Every thread owns neighbouring ids; which thread the draw falls into, then which id.
    float *masses = scratch + 64;
    uint32_t *counts = reinterpret_cast<uint32_t *>(masses + SAMPLE_THREADS);
    const uint32_t each = (p.vocab + SAMPLE_THREADS - 1) / SAMPLE_THREADS;
    const uint32_t begin = min(threadIdx.x * each, p.vocab), end = min(begin + each, p.vocab);
    uint32_t ties = 0;
    for (uint32_t id = begin; id < end; id++) ties += __float_as_uint(kept.weight(id)) == kept.above;
    counts[threadIdx.x] = ties;
    __syncthreads();
    uint32_t rank = 0;
    for (uint32_t other = 0; other < threadIdx.x; other++) rank += counts[other];
    auto own_weight = [&](uint32_t id, uint32_t &tie) {
        const float w = kept.weight(id);
        const uint32_t bits = __float_as_uint(w);
        if (bits > kept.above) return w;
        return bits == kept.above && bits != 0 && tie++ < kept.ties ? w : 0.0f;
    };
    float mass = 0.0f;
    uint32_t tie = rank;
    for (uint32_t id = begin; id < end; id++) mass += own_weight(id, tie);
    masses[threadIdx.x] = mass;
    __syncthreads();
    float before = 0.0f, total = 0.0f;
    uint32_t last = 0;
    for (uint32_t other = 0; other < SAMPLE_THREADS; other++) {
        if (other == threadIdx.x) before = total;
        total += masses[other];
        if (masses[other] > 0.0f) last = other;
    }
    const float target = draw.uniform * total;
    // Rounding may leave a hair: the last kept token owns it.
    const bool here = mass > 0.0f && target >= before && (target < before + mass || threadIdx.x == last);
    if (!here) return;
    uint32_t chosen = begin;
    tie = rank;
    float sum = before;
    for (uint32_t id = begin; id < end; id++) {
        const float w = own_weight(id, tie);
        if (w == 0.0f) continue;
        chosen = id;
        sum += w;
        if (target < sum) break;
    }
    p.tokens[blockIdx.x] = chosen;
}
