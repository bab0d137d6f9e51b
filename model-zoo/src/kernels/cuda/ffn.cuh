// Feed-forward blocks that saturated tokens leave out (FFN-SkipLLM, arXiv 2404.03865): decided on the device, layer by layer.
//
// A token is watched in the layers whose FFN it may leave out. Before the FFN `ffn_watch` decides and keeps the token's
// residual stream; the FFN's kernels pass over tokens that leave it out, and over the weights where all do; then `ffn_observe`
// compares the stream with what it was: cos(x, x + FFN(x)) >= threshold lets the next blocks be left out.
#pragma once
#include "common.cuh"

struct Watched {
    uint32_t step_token;  // or NO_ROW: padding
    uint32_t row;
    uint32_t next;        // the next layer in which it is watched, or NO_ROW
};

// How a row decides.
struct FfnRule {
    float threshold;
    uint32_t max_skip, cap;  // blocks that are left out before the next test, and of all
    uint32_t aligned;        // whether the step's rows decide together
    uint32_t votes;          // whether it has a vote in that
};

struct Tally {
    uint32_t votes, needed;  // of rows that would leave the layer's FFN out, and how many of them it takes
    uint32_t runs;           // tokens that run it
};

// A token's state: blocks that it may leave out now, those that it left out, then a bit for each layer's.
constexpr uint32_t STATE_LEFT = 0, STATE_COUNT = 1, STATE_BITS = 2;

struct WatchParams {
    const float *x;          // [step tokens, width]
    float *before;           // [watched, width]
    const Watched *watched;
    const FfnRule *rules;    // [rows]
    Tally *tallies;          // [layers]
    uint32_t *states;        // [step tokens, stride], zeros when the step begins
    uint32_t width, stride, layer, pad;
};

DEVICE bool leaves_out(const uint32_t *state, uint32_t layer) { return state[STATE_BITS + layer / 32] >> layer % 32 & 1; }
DEVICE bool would(const FfnRule &rule, const uint32_t *state) { return state[STATE_LEFT] > 0 && state[STATE_COUNT] < rule.cap; }

// A block a watched token.
KERNEL(ffn_watch, WatchParams, 256, 1) {
    lead();
    follow();
    const Watched own = p.watched[blockIdx.x];
    if (own.step_token == NO_ROW) return;
    if (threadIdx.x == 0) {
        uint32_t *state = p.states + static_cast<size_t>(own.step_token) * p.stride;
        const FfnRule &rule = p.rules[own.row];
        Tally &tally = p.tallies[p.layer];
        if (would(rule, state) && (rule.aligned == 0 || tally.votes >= tally.needed)) {
            state[STATE_LEFT]--, state[STATE_COUNT]++;
            state[STATE_BITS + p.layer / 32] |= 1u << p.layer % 32;
            atomicAdd(&tally.runs, 0xFFFFFFFFu);
        }
    }
    const float *x = p.x + static_cast<size_t>(own.step_token) * p.width;
    float *before = p.before + static_cast<size_t>(blockIdx.x) * p.width;
    for (uint32_t i = threadIdx.x; i < p.width; i += blockDim.x) before[i] = x[i];
}

// A block a watched token.
KERNEL(ffn_observe, WatchParams, 256, 1) {
    lead();
    follow();
    SHARED(float, scratch);
    const Watched own = p.watched[blockIdx.x];
    if (own.step_token == NO_ROW) return;
    uint32_t *state = p.states + static_cast<size_t>(own.step_token) * p.stride;
    const FfnRule &rule = p.rules[own.row];
    if (!leaves_out(state, p.layer)) {
        const float *x = p.x + static_cast<size_t>(own.step_token) * p.width;
        const float *before = p.before + static_cast<size_t>(blockIdx.x) * p.width;
        float both = 0.0f, left = 0.0f, right = 0.0f;
        for (uint32_t i = threadIdx.x; i < p.width; i += blockDim.x) {
            both += before[i] * x[i], left += before[i] * before[i], right += x[i] * x[i];
        }
        both = block_sum(both, scratch), left = block_sum(left, scratch), right = block_sum(right, scratch);
        const float norms = sqrtf(left) * sqrtf(right), cosine = norms > 0.0f ? both / norms : 1.0f;
        if (threadIdx.x == 0 && cosine >= rule.threshold) state[STATE_LEFT] = rule.max_skip;
    }
    if (threadIdx.x == 0 && own.next != NO_ROW && rule.votes != 0 && would(rule, state))
        atomicAdd(&p.tallies[own.next].votes, 1u);
}

// Which tokens a sublayer's kernels pass over; all null where none may be.
struct Skips {
    const uint32_t *runs;    // tokens that run it: with 0 there is nothing to do
    const uint32_t *states;  // see above
    uint32_t stride, layer;

    DEVICE bool all() const { return runs != nullptr && *runs == 0; }
    DEVICE bool of(uint32_t step_token) const {
        return states != nullptr && leaves_out(states + static_cast<size_t>(step_token) * stride, layer);
    }
};
