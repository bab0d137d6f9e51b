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

// The weights of a row's tokens, at most 1.
struct Row {
    const float *logits;
    uint32_t vocab;
    float max, scale, least;  // weights below `least` are left out (min_p)

    DEVICE uint32_t size() const { return vocab; }
    DEVICE uint32_t id(uint32_t i) const { return i; }
    DEVICE float weight(uint32_t i) const {
        const float w = expf((logits[i] - max) * scale);
        return w >= least ? w : 0.0f;
    }
};

// The heavier ones of them, by id: most draws need no others, and to go over these takes next to nothing.
struct Heavier {
    const float *weights;
    const uint32_t *ids;
    uint32_t count;

    DEVICE uint32_t size() const { return count; }
    DEVICE uint32_t id(uint32_t i) const { return ids[i]; }
    DEVICE float weight(uint32_t i) const { return weights[i]; }
};

constexpr uint32_t HEAVIER = 4096;   // tokens that the block's memory has room for
constexpr uint32_t LEVELS = 4;       // weights from which tokens may count as heavier
constexpr uint32_t SCRATCH = 64 + 2 * SAMPLE_THREADS;
DEVICE float level(uint32_t i) { return __uint_as_float((127u - (i == 0 ? 30 : i == 1 ? 20 : i == 2 ? 14 : 8)) << 23); }

// Lanes before this one for which it holds too, and of the whole warp.
DEVICE uint32_t lanes_before(bool holds, uint32_t &all) {
    const uint32_t lanes = __ballot_sync(FULL, holds);
    all = __popc(lanes);
    return __popc(lanes & ((1u << threadIdx.x % 32) - 1));
}

// Count and mass of the row's weights above 0; and gathers the heavier ones, as many levels of them as there is room for.
DEVICE Mass gather(const Row &row, Heavier &heavier, float *scratch) {
    constexpr uint32_t WARPS = SAMPLE_THREADS / 32;
    float *weights = scratch + SCRATCH;
    uint32_t *ids = reinterpret_cast<uint32_t *>(weights + HEAVIER), *counts = reinterpret_cast<uint32_t *>(scratch + 64);
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t each = (row.vocab + 32 * WARPS - 1) / (32 * WARPS) * 32;
    const uint32_t begin = min(warp * each, row.vocab), end = min(begin + each, row.vocab);
    Mass own = {0.0f, 0};
    uint32_t near[LEVELS] = {};
    for (uint32_t i = begin + lane; i < end; i += 32) {
        const float w = row.weight(i);
        own.mass += w, own.count += w > 0.0f;
#pragma unroll
        for (uint32_t l = 0; l < LEVELS; l++) near[l] += w >= level(l);
    }
    for (uint32_t l = 0; l < LEVELS; l++) {
        for (int bit = 1; bit < 32; bit *= 2) near[l] += __shfl_xor_sync(FULL, near[l], bit);
        if (lane == 0) counts[l * WARPS + warp] = near[l];
    }
    const Mass all = block_mass(own, scratch);
    // The lightest level for which there is room; where there is none, none.
    uint32_t chosen = 0, at = 0;
    for (heavier.count = 0; chosen < LEVELS; chosen++) {
        uint32_t sum = 0;
        for (uint32_t w = 0; w < WARPS; w++) at = w == warp ? sum : at, sum += counts[chosen * WARPS + w];
        if (sum > HEAVIER) continue;
        heavier.count = sum;
        break;
    }
    heavier.weights = weights, heavier.ids = ids;
    for (uint32_t base = begin; chosen < LEVELS && base < end; base += 32) {
        const uint32_t i = base + lane;
        const float w = i < end ? row.weight(i) : 0.0f;
        const bool is = w >= level(chosen);
        uint32_t count;
        const uint32_t place = at + lanes_before(is, count);
        if (is) weights[place] = w, ids[place] = i;
        at += count;
    }
    __syncthreads();
    return all;
}

// Which weights are kept.
template <class Weights>
struct Kept {
    const Weights &weights;
    uint32_t above;  // bits of a weight: heavier ones are kept
    uint32_t ties;   // and so many of exactly that weight, those of lowest id

    // Count and mass of the weights from `bits` on (and above 0), over the block.
    DEVICE Mass from(uint32_t bits, float *scratch) const {
        Mass own = {0.0f, 0};
        for (uint32_t i = threadIdx.x; i < weights.size(); i += SAMPLE_THREADS) {
            const float w = weights.weight(i);
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

    // Finds what top_k and top_p keep of `all`, the row's weights.
    DEVICE void find(const Draw &draw, Mass all, float *scratch) {
        uint32_t floor = 1, least_ties = 0xFFFFFFFFu;
        if (draw.top_k > 0 && draw.top_k < all.count) {
            floor = bisect([&](Mass m) { return m.count >= draw.top_k; }, scratch);
            const Mass heavier = from(floor + 1, scratch);
            least_ties = draw.top_k - heavier.count;
            all.mass = heavier.mass + least_ties * __uint_as_float(floor);
        }
        if (draw.top_p < 1.0f) {
            const float target = all.mass * draw.top_p;
            // From the floor of top_k on, more than top_k tokens may be counted: those count no more than theirs.
            const uint32_t own = bisect([&](Mass m) { return m.mass >= target; }, scratch);
            if (own >= floor) {
                const Mass heavier = from(own + 1, scratch);
                float need = ceilf((target - heavier.mass) / __uint_as_float(own));
                const uint32_t least = heavier.count == 0 ? 1 : 0;
                const uint32_t wanted = need > 0.0f ? max(static_cast<uint32_t>(need), least) : least;
                least_ties = own > floor ? wanted : min(least_ties, wanted);
                floor = own;
            }
        }
        above = floor, ties = least_ties;
    }

    // Draws by `uniform`: every thread owns neighbouring ids; which thread the draw falls into, then which id.
    DEVICE void draw(float uniform, uint32_t *token, float *scratch) const {
        float *masses = scratch + 64;
        uint32_t *counts = reinterpret_cast<uint32_t *>(masses + SAMPLE_THREADS);
        const uint32_t each = (weights.size() + SAMPLE_THREADS - 1) / SAMPLE_THREADS;
        const uint32_t begin = min(threadIdx.x * each, weights.size()), end = min(begin + each, weights.size());
        uint32_t own_ties = 0;
        for (uint32_t i = begin; i < end; i++) own_ties += __float_as_uint(weights.weight(i)) == above;
        counts[threadIdx.x] = own_ties;
        __syncthreads();
        uint32_t rank = 0;
        for (uint32_t other = 0; other < threadIdx.x; other++) rank += counts[other];
        auto own_weight = [&](uint32_t i, uint32_t &tie) {
            const float w = weights.weight(i);
            const uint32_t bits = __float_as_uint(w);
            if (bits > above) return w;
            return bits == above && bits != 0 && tie++ < ties ? w : 0.0f;
        };
        float mass = 0.0f;
        uint32_t tie = rank;
        for (uint32_t i = begin; i < end; i++) mass += own_weight(i, tie);
        masses[threadIdx.x] = mass;
        __syncthreads();
        float before = 0.0f, total = 0.0f;
        uint32_t last = 0;
        for (uint32_t other = 0; other < SAMPLE_THREADS; other++) {
            if (other == threadIdx.x) before = total;
            total += masses[other];
            if (masses[other] > 0.0f) last = other;
        }
        const float target = uniform * total;
        // Rounding may leave a hair: the last kept token owns it.
        const bool here = mass > 0.0f && target >= before && (target < before + mass || threadIdx.x == last);
        if (!here) return;
        uint32_t chosen = begin;
        tie = rank;
        float sum = before;
        for (uint32_t i = begin; i < end; i++) {
            const float w = own_weight(i, tie);
            if (w == 0.0f) continue;
            chosen = i;
            sum += w;
            if (target < sum) break;
        }
        *token = weights.id(chosen);
    }
};

KERNEL(sample, SampleParams, SAMPLE_THREADS, 1) {
    lead();
    follow();
    SHARED(float, scratch);  // 32 floats, 32 counts, then one of each a thread, then the heavier tokens
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
    const Row row = {logits, p.vocab, best.value, 1.0f / draw.temperature, draw.min_p};
    uint32_t *token = p.tokens + blockIdx.x;
    if (draw.top_k == 0 && draw.top_p >= 1.0f) return Kept<Row>{row, 0, 0}.draw(draw.uniform, token, scratch);
    Heavier heavier = {};
    const Mass all = gather(row, heavier, scratch);
    Kept<Heavier> few = {heavier, 0, 0};
    // All that is kept is among the heavier ones where these are as many, or weigh as much, as what is kept.
    const bool enough = heavier.count > 0 && (heavier.count >= (draw.top_k > 0 ? min(draw.top_k, all.count) : all.count) ||
                                              (draw.top_k == 0 && few.from(1, scratch).mass >= all.mass * draw.top_p));
    if (enough) {
        few.find(draw, all, scratch);
        return few.draw(draw.uniform, token, scratch);
    }
    Kept<Row> kept = {row, 0, 0};
    kept.find(draw, all, scratch);
    kept.draw(draw.uniform, token, scratch);
}
