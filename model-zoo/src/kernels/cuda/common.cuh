// What the kernels share: types, conversions, loads, the tensor-core product, reductions. Everything that differs
// between nvcc and the emulated device (emulate/emulate.h) is in this file.
#pragma once

#ifdef __CUDACC__
#include <cstdint>

// A kernel with one parameter, a struct that params.rs mirrors.
#define KERNEL(name, Params, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params p)
// The block's dynamic shared memory.
extern __shared__ __align__(1024) unsigned char block_memory[];
#define SHARED(type, name) type *name = reinterpret_cast<type *>(block_memory)
#define sincosf_ sincosf
#else
#include "emulate/emulate.h"

#define KERNEL(name, Params, threads, blocks)                                                              \
    static void name(const Params &p);                                                                     \
    static emulate::Entry name##_entry(#name, sizeof(Params),                                              \
                                       [](const void *q) { name(*static_cast<const Params *>(q)); });      \
    static void name(const Params &p)
#define SHARED(type, name) type *name = reinterpret_cast<type *>(emulate::shared())
#endif

#define DEVICE __device__ __forceinline__

// The bits of a bfloat16.
typedef uint16_t bf16;

constexpr unsigned FULL = 0xFFFFFFFFu;
// In place of a row: the token is padding.
constexpr uint32_t NO_ROW = 0xFFFFFFFFu;

DEVICE float to_float(bf16 value) { return __uint_as_float(static_cast<uint32_t>(value) << 16); }
DEVICE float low(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// Two floats to two bf16, to nearest even, the first in the low half.
DEVICE uint32_t pack(float first, float second) {
#ifdef __CUDACC__
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#else
    auto round = [](float value) -> uint32_t {
        uint32_t bits = __float_as_uint(value);
        if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFFu;
        return (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
    };
    return round(first) | round(second) << 16;
#endif
}
DEVICE bf16 to_bf16(float value) { return static_cast<bf16>(pack(value, 0.0f)); }

// a & mask | bits, as one instruction.
DEVICE uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
#ifdef __CUDACC__
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "r"(mask), "r"(bits));
    return result;
#else
    return (a & mask) | bits;
#endif
}

// a * b + c of pairs of bf16.
DEVICE uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDACC__
    uint32_t sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
#else
    return pack(low(a) * low(b) + low(c), high(a) * high(b) + high(c));
#endif
}
// GPUs before Hopper have no other sum of them.
DEVICE uint32_t add_pairs(uint32_t a, uint32_t b) { return fma_pairs(a, 0x3F803F80u, b); }

// An f16 from its bits.
DEVICE float half_to_float(uint32_t bits) {
#ifdef __CUDACC__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
    return value;
#else
    const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float sign = bits >> 15 & 1 ? -1.0f : 1.0f;
    if (exponent == 31) return sign * (mantissa != 0 ? NAN : INFINITY);
    return sign * (exponent == 0 ? ldexpf(mantissa, -24) : ldexpf(mantissa + 1024, static_cast<int>(exponent) - 25));
#endif
}

// Sixteen bytes that are read once: past the first cache.
DEVICE uint4 load_stream(const void *at) {
#ifdef __CUDACC__
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
#else
    return *static_cast<const uint4 *>(at);
#endif
}
// The same of what kernels write.
DEVICE uint4 load_once16(const void *at) {
#ifdef __CUDACC__
    return __ldcg(static_cast<const uint4 *>(at));
#else
    return *static_cast<const uint4 *>(at);
#endif
}
DEVICE uint2 load_once8(const void *at) {
#ifdef __CUDACC__
    return __ldcg(static_cast<const uint2 *>(at));
#else
    return *static_cast<const uint2 *>(at);
#endif
}
template <class T>
DEVICE T load(const void *at) { return *static_cast<const T *>(at); }

DEVICE uint32_t word_of(const uint4 &v, uint32_t i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// From the device's memory, where the compiler cannot see that a pointer leads there.
template <class T>
DEVICE T load_global(const void *at) {
#ifdef __CUDACC__
    return *static_cast<const T *>(__cvta_global_to_generic(__cvta_generic_to_global(at)));
#else
    return *static_cast<const T *>(at);
#endif
}

// Sixteen bytes from global to shared memory, beside what the thread does; `wait_copies` ends it.
DEVICE void copy_async(void *shared, const void *global) {
#ifdef __CUDACC__
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global));
#else
    *static_cast<uint4 *>(shared) = *static_cast<const uint4 *>(global);
#endif
}
DEVICE void commit_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;");
#endif
}
// Until at most `N` of the committed groups are under way.
template <int N>
DEVICE void wait_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(N));
#endif
}

// Launches overlap on a GPU that can: a kernel starts while the one before it ends. Until `follow` it may read what no
// kernel of the step writes (weights, tables, slots that lay there before), and nothing else; all that came before is done
// and seen after it. Every thread of every kernel
// calls it, so that kernels end in their order. `lead` lets the next kernel start: its blocks wait for a place until all
// of this one's have begun.
DEVICE void follow() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void lead() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

#ifndef __CUDACC__
// c += a * b as `mma` says, where `value` widens the low or the high half of an operand's word.
template <class Value>
DEVICE void mma_emulated(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Value value) {
    struct Own {
        uint32_t a[4], b[2];
    } own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const unsigned lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
    // All lanes' operands lie side by side in the exchange's slots.
    const unsigned char *slots = static_cast<const unsigned char *>(emulate::exchange(&own, sizeof own, 0));
    auto of = [&](unsigned other) { return reinterpret_cast<const Own *>(slots + 32 * other); };
    for (int i = 0; i < 4; i++) {
        const unsigned row = g + 8 * (i / 2), column = 2 * t + i % 2;
        for (unsigned k = 0; k < 16; k++) {
            const uint32_t x = of(row % 8 * 4 + k % 8 / 2)->a[row / 8 + 2 * (k / 8)];
            const uint32_t y = of(column * 4 + k % 8 / 2)->b[k / 8];
            c[i] += value(x, k % 2) * value(y, k % 2);
        }
    }
}
#endif

// c[16 x 8] += a[16 x 16] * b[16 x 8], bf16 in, f32 out, by a whole warp. With g = lane / 4 and t = lane % 4 a lane has
// a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8) and each one's right neighbour; b: (2t, g), (2t + 8, g) and each
// one's lower neighbour; c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    mma_emulated(c, a, b, [](uint32_t pair, bool second) { return second ? high(pair) : low(pair); });
#endif
}

// The same of f16.
DEVICE void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    mma_emulated(c, a, b, [](uint32_t pair, bool second) { return half_to_float(second ? pair >> 16 : pair); });
#endif
}

// 2 to the power of x, to two units in the last place; 0 of what is far below.
DEVICE float exp2_fast(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// Over the lanes that differ in the bits from `FROM` to `TO` (excluded) of their index.
template <int FROM, int TO>
DEVICE float lanes_sum(float value) {
#pragma unroll
    for (int bit = FROM; bit < TO; bit *= 2) value += __shfl_xor_sync(FULL, value, bit);
    return value;
}
template <int FROM, int TO>
DEVICE float lanes_max(float value) {
#pragma unroll
    for (int bit = FROM; bit < TO; bit *= 2) value = fmaxf(value, __shfl_xor_sync(FULL, value, bit));
    return value;
}

// Over the block, in an order that depends on its size alone; `scratch` holds a value a warp. Ends with a barrier.
DEVICE float block_sum(float value, float *scratch) {
    value = lanes_sum<1, 32>(value);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
    for (unsigned warp = 0; warp < blockDim.x / 32; warp++) sum += scratch[warp];
    __syncthreads();
    return sum;
}

// Gate activations: 0 is SiLU, 1 is GELU in its tanh form.
DEVICE float activate(float gate, uint32_t kind) {
    if (kind == 0) return gate / (1.0f + __expf(-gate));
    const float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
    return 0.5f * gate * (1.0f + tanhf(inner));
}
