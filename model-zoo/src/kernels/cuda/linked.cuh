// Values that blocks hand each other without a meeting: each lies beside a flag, and both are stored and loaded as one, so
// that who waits for the flag has the value with it. A meeting takes as long as three ways to the second cache and back, this
// as long as one.
#pragma once
#include "common.cuh"

// The value in the low half and the flag in the high one.
typedef uint64_t Linked;

DEVICE void store_linked(Linked *at, float value, uint32_t flag) {
    const uint64_t both = static_cast<uint64_t>(flag) << 32 | __float_as_uint(value);
#ifdef __CUDACC__
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(at), "l"(both) : "memory");
#else
    *at = both;
#endif
}

// Four values from `at` on, a multiple of 32 bytes.
struct LinkedFour {
    Linked values[4];

    DEVICE void load(const Linked *at) {
#ifdef __CUDACC__
        asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(values[0]), "=l"(values[1]) : "l"(at) : "memory");
        asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(values[2]), "=l"(values[3]) : "l"(at + 2) : "memory");
#else
        for (int i = 0; i < 4; i++) values[i] = at[i];
#endif
    }
    DEVICE bool has(uint32_t flag) const {
        bool all = true;
#pragma unroll
        for (int i = 0; i < 4; i++) all = all && static_cast<uint32_t>(values[i] >> 32) == flag;
        return all;
    }
    // Once they were stored with this flag.
    DEVICE float4 await(const Linked *at, uint32_t flag) {
        while (!has(flag)) load(at);
        auto value = [&](int i) { return __uint_as_float(static_cast<uint32_t>(values[i])); };
        return {value(0), value(1), value(2), value(3)};
    }
};
