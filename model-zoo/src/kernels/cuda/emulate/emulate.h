// Lets a host compiler build the kernels: the parts of CUDA C++ that they use, for one block at a time.
//
// Threads of a block are fibers on one OS thread. A fiber runs until it waits at a barrier of its block or warp, and
// then the next one runs, upwards or downwards by thread index as the launch says: a missing barrier shows in one of
// the two orders, because shared memory holds NaN when a block begins. Blocks run one after another, in that order too.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct dim3_ {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

namespace emulate {

// What a thread sees of its place.
struct Place {
    dim3_ thread, block, block_dim, grid_dim;
};

const Place &place();
unsigned char *shared();
void sync_block();
// Waits until `threads` threads are here, whatever the block's others do.
void sync_some(unsigned threads);
// Lets the block's other threads go on.
void yield();
// Hands `value` of `size` bytes to the other lanes of the warp, waits for theirs, and returns lane `source`'s. What it
// points to stays until the lane's second next exchange.
const void *exchange(const void *value, unsigned size, unsigned source);

// A barrier in memory: arrivals that a phase takes, those still to come, announced bytes still to come, and the phase.
struct BarrierState {
    uint8_t count, pending;
    uint16_t phase;
    uint32_t bytes;
};
inline BarrierState &barrier(uint64_t &state) { return reinterpret_cast<BarrierState &>(state); }
inline void barrier_turn(BarrierState &b) {
    if (b.pending == 0 && b.bytes == 0) b.pending = b.count, b.phase ^= 1;
}
inline void barrier_init(uint64_t &state, uint32_t count) {
    barrier(state) = {static_cast<uint8_t>(count), static_cast<uint8_t>(count), 0, 0};
}
inline void barrier_arrive(uint64_t &state, uint32_t bytes) {
    BarrierState &b = barrier(state);
    b.bytes += bytes;
    b.pending--;
    barrier_turn(b);
}
inline void barrier_copied(uint64_t &state, uint32_t bytes) {
    BarrierState &b = barrier(state);
    b.bytes -= bytes;
    barrier_turn(b);
}
inline bool barrier_ended(uint64_t &state, uint32_t parity) { return barrier(state).phase != parity; }

// A kernel by name.
struct Entry {
    Entry(const char *name, unsigned params, void (*run)(const void *));
    const char *name;
    unsigned params;
    void (*run)(const void *);
    Entry *next;
};

}  // namespace emulate

#define threadIdx (emulate::place().thread)
#define blockIdx (emulate::place().block)
#define blockDim (emulate::place().block_dim)
#define gridDim (emulate::place().grid_dim)
#define __device__
#define __forceinline__ inline
#define __restrict__

inline void __syncthreads() { emulate::sync_block(); }

template <class T>
inline T __shfl_sync(unsigned, T value, int source) {
    return *static_cast<const T *>(emulate::exchange(&value, sizeof value, source & 31));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return __shfl_sync(mask, value, (threadIdx.x & 31) ^ bits);
}
template <class T>
inline T __shfl_up_sync(unsigned, T value, unsigned by) {
    unsigned lane = threadIdx.x & 31;
    return *static_cast<const T *>(emulate::exchange(&value, sizeof value, lane < by ? lane : lane - by));
}
inline unsigned __ballot_sync(unsigned mask, bool holds) {
    unsigned lanes = 0;
    for (int lane = 0; lane < 32; lane++) lanes |= static_cast<unsigned>(__shfl_sync(mask, holds, lane)) << lane;
    return lanes;
}
inline unsigned __popc(unsigned bits) { return static_cast<unsigned>(__builtin_popcount(bits)); }
inline void __syncwarp() {
    int nothing = 0;
    emulate::exchange(&nothing, sizeof nothing, threadIdx.x & 31);
}

inline void __threadfence() {}
inline unsigned atomicAdd(unsigned *at, unsigned value) {
    unsigned old = *at;
    *at = old + value;
    return old;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float __expf(float x) { return expf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline void sincosf_(float x, float *s, float *c) { *s = sinf(x), *c = cosf(x); }
template <class T>
inline T max(T a, T b) { return a > b ? a : b; }
template <class T>
inline T min(T a, T b) { return a < b ? a : b; }
